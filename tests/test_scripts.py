"""Each script as a user runs it, at tiny size: results, seeds, resume, kill -9, every flag."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_data import fake_cifar, folder_of_images

import evaluate
import retrain
import search
from generate_data import Batches, find_or_make, stratified_split
from genotypes import PUBLISHED, from_json, random_genotype, to_json

TINY = ['--num_images', '64', '--image_size', '8', '--layers', '3', '--init_channels', '4',
        '--batch_size', '8', '--epochs', '2', '--steps_per_epoch', '2', '--gpu', '-1']
TINY_REAL = TINY[4:]                            # without what only noise has
MEASURED = ('seconds', 'images_per_second', 'peak_memory_mib')


def log(folder):
    """The lines of a run without what is measured."""
    lines = [json.loads(line) for line in Path(folder, 'log.jsonl').read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def run_search(save, *flags, base=TINY):
    assert search.main([*base, '--save', save, *flags]) == 0
    return log(save)


def test_search_leaves_a_whole_run_folder(capsys):
    lines = run_search('r', '--data', 'noise')
    names = {p.name for p in Path('r').iterdir() if not p.name.startswith('.')}
    assert names == {'args.json', 'log.jsonl', 'genotype.json', 'genotype.svg', 'checkpoint.pt',
                     'scripts'}
    assert (Path('r/scripts/search.py').read_text()
            == (ROOT / 'search.py').read_text())
    assert len(lines) == 2 and lines[0]['learning_rate'] == 0.025
    assert {'train_loss', 'valid_loss', 'train_accuracy', 'valid_accuracy', 'entropy_normal',
            'skips_reduce', 'genotype', 'alphas'} <= set(lines[0])
    assert {'seconds', 'images_per_second', 'peak_memory_mib'} <= set(json.loads(
        Path('r/log.jsonl').read_text().splitlines()[0]))
    fields = json.loads(Path('r/genotype.json').read_text())
    assert (fields['data'], fields['method'], fields['seed']) == ('noise', 'darts', 0)
    assert list(from_json(fields)) == [tuple(tuple(p) if isinstance(p, list) else p for p in part)
                                       for part in list(lines[-1]['genotype'].values())]
    # The log holds the alphas after the last update: those of the checkpoint.
    checkpoint = torch.load('r/checkpoint.pt', weights_only=True)
    for name, alpha in lines[-1]['alphas'].items():
        assert torch.equal(torch.tensor(alpha), checkpoint['network']['alphas.' + name])
    about = json.loads(Path('r/args.json').read_text())
    assert {'settings', 'versions', 'git_commit', 'hardware', 'command'} <= set(about)
    assert 'next: python retrain.py --arch r' in capsys.readouterr().out
    assert Path('r/genotype.svg').read_text().startswith('<svg')
    assert [p.name for p in Path('data').iterdir()] == ['noise-64x8px-10classes-seed0']


@pytest.mark.parametrize('method', [['--method', 'darts'], ['--method', 'pcdarts'],
                                    ['--unrolled'], ['--method', 'pcdarts', '--unrolled']])
def test_same_seed_same_result_and_stopped_equals_never_stopped(method):
    whole = run_search('a', *method, '--seed', '3')
    assert run_search('b', *method, '--seed', '3') == whole
    assert run_search('c', *method, '--seed', '4')[-1]['alphas'] != whole[-1]['alphas']
    # Stop after every step: SIGTERM is a flag that the loop reads.
    for _ in range(5):
        original = search.weight_step

        def step_and_stop(*args, original=original):
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)

        search.weight_step = step_and_stop
        try:
            status = search.main([*TINY, '--save', 'd', *method, '--seed', '3', '--resume'])
        finally:
            search.weight_step = original
    assert status == 0 and log('d') == whole
    assert Path('d/genotype.json').read_text() == Path('a/genotype.json').read_text()


def test_alphas_move_and_only_after_the_frozen_epochs():
    lines = run_search('f', '--frozen_epochs', '1')
    torch.manual_seed(0)
    first = search.Network(4, 10, 3).alphas['normal'].tolist()
    assert lines[0]['alphas']['normal'] == first and lines[0]['valid_loss'] is None
    assert lines[1]['alphas']['normal'] != first and lines[1]['valid_loss'] is not None


def test_kill_9_at_any_moment(empty_folder):
    """A run killed at random moments and resumed equals one that was never disturbed."""
    command = [sys.executable, str(ROOT / 'search.py'), *TINY, '--epochs', '3',
               '--checkpoint_minutes', '0', '--seed', '1', '--resume']
    whole = run_search('whole', '--epochs', '3', '--seed', '1')
    rng, seen = random.Random(0), ''
    for _ in range(3):
        process = subprocess.Popen([*command, '--save', 'killed'], stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL)
        while not Path('killed/args.json').exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        text = Path('killed/log.jsonl').read_text() if Path('killed/log.jsonl').exists() else ''
        assert text.startswith(seen[:seen.rfind('\n') + 1])             # lines stay as they were
        seen = text
    with open('killed/log.jsonl', 'a') as file:
        file.write('{"epoch": 2, "torn')                                # killed while writing
    assert subprocess.run([*command, '--save', 'killed'], stderr=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL).returncode == 0
    assert log('killed') == whole
    assert Path('killed/genotype.json').read_text() == Path('whole/genotype.json').read_text()
    done = Path('killed/log.jsonl').read_text()
    shutil.rmtree('data')
    assert search.main([*TINY, '--epochs', '3', '--seed', '1', '--resume', '--save',
                        'killed']) == 0
    assert Path('killed/log.jsonl').read_text() == done                 # finished: nothing done
    assert not Path('data').exists()                                    # nor read


def test_random_is_a_control_without_data():
    assert search.main(['--method', 'random', '--seed', '5', '--save', 'r']) == 0
    assert from_json(Path('r/genotype.json').read_text()) == random_genotype(5)
    assert json.loads(Path('r/genotype.json').read_text())['data'] is None
    assert not Path('data').exists()
    drawn = [random_genotype(seed) for seed in range(300)]
    ops = [op for g in drawn for op, _ in g.normal + g.reduce]
    counts = np.unique(ops, return_counts=True)[1]
    assert len(counts) == 7 and counts.min() > 0.8 * len(ops) / 7 and 'none' not in ops
    inputs = {tuple(state for _, state in g.normal[6:]) for g in drawn}
    assert len(inputs) == 10                            # every pair of five inputs


def test_no_steps_gives_the_genotype_of_an_untrained_supernet():
    assert search.main([*TINY, '--max_steps', '0', '--save', 'y']) == 0
    torch.manual_seed(0)
    assert from_json(Path('y/genotype.json').read_text()) == search.Network(4, 10, 3).genotype()


def test_schedules_scale_to_what_is_left():
    def lengths(*flags):
        args = search.parse(['--method', 'pcdarts', *flags])
        epochs, steps, total = evaluate.shortened(args, 97)
        return epochs, steps, total, round(args.frozen_epochs * epochs / args.epochs)
    assert lengths() == (50, 97, 4850, 15)
    assert lengths('--max_steps', '100') == (50, 2, 100, 15)
    assert lengths('--steps_per_epoch', '20') == (50, 20, 1000, 15)
    assert lengths('--steps_per_epoch', '20', '--max_steps', '210') == (11, 20, 210, 3)
    assert lengths('--max_steps', '20') == (20, 1, 20, 6)


SEARCH_FLAGS = [
    ['--unrolled'], ['--init_channels', '8'], ['--layers', '4'], ['--train_portion', '0.6'],
    ['--arch_learning_rate', '0.01'], ['--arch_weight_decay', '0.5'], ['--frozen_epochs', '1'],
    ['--partial', '2'], ['--epochs', '3'], ['--steps_per_epoch', '1'], ['--max_steps', '3'],
    ['--batch_size', '4'], ['--learning_rate', '0.1'], ['--learning_rate_min', '0.01'],
    ['--momentum', '0.1'], ['--weight_decay', '0.1'], ['--grad_clip', '0.1'], ['--seed', '9'],
    ['--data_seed', '1'], ['--augment', 'standard'], ['--num_images', '80'],
    ['--num_classes', '5'], ['--multilabel'], ['--image_size', '12'], ['--amp']]


@pytest.fixture(scope='module')
def plain_log(tmp_path_factory):
    folder = tmp_path_factory.mktemp('plain')
    before = os.getcwd()
    os.chdir(folder)
    lines = run_search('plain')
    os.chdir(before)
    return lines


@pytest.mark.parametrize('flags', SEARCH_FLAGS, ids=lambda f: f[0][2:])
def test_every_flag_of_the_search_changes_the_result(flags, plain_log):
    assert run_search('x', *flags) != plain_log


def test_flags_of_the_search_that_change_no_number(plain_log, capsys):
    assert run_search('x', '--tf32', '--workers', '0', '--checkpoint_minutes', '0') == plain_log
    assert not torch.backends.cuda.matmul.allow_tf32 or capsys
    assert search.main([*TINY, '--gpu', '3', '--save', 'y']) == (0 if not torch.cuda.is_available()
                                                                else 2)


def test_default_names_tell_runs_apart():
    def name(*flags):
        return search.parse(list(flags)).save
    assert name() == 'runs/search-noise-darts-seed0'
    names = {name(*flags) for flags in SEARCH_FLAGS} | {name('--quick'), name()}
    assert len(names) == len(SEARCH_FLAGS) + 2
    long = [f for flags in SEARCH_FLAGS for f in flags]
    assert len(Path(name(*long)).name) < 210 and name(*long) != name(*long, '--seed', '8')
    assert name(*long[1:], '--quick') != name(*long[1:], '--quick', '--amp', '--epochs', '4')
    assert name('--gpu', '-1', '--resume', '--workers', '3') == name()


def test_random_labels_and_label_flags():
    fake_cifar()
    base = [*TINY_REAL, '--data', 'random_labels']
    lines = run_search('a', base=base)
    assert run_search('b', '--label_mode', 'balanced', base=base) != lines
    assert run_search('c', '--label_noise', '0.5', base=base) != lines
    assert len(list(Path('data').glob('random_labels-cifar10-*'))) == 3
    folder_of_images('own', n=20, size=(8, 8))
    assert run_search('d', '--source', 'own', '--image_size', '8', base=base) != lines
    Path('moved').mkdir()
    Path('data/cifar-10-batches-py').rename('moved/cifar-10-batches-py')
    assert run_search('e', '--data_dir', 'moved', base=base) == lines
    assert {p.name for p in Path('moved').iterdir()} == {'cifar-10-batches-py'}


RETRAIN = ['--arch', 'DARTS_V2', '--data', 'noise', '--num_images', '64', '--image_size', '32',
           '--layers', '3', '--init_channels', '4', '--batch_size', '8', '--epochs', '2',
           '--steps_per_epoch', '2', '--gpu', '-1']


def run_retrain(save, *flags, base=RETRAIN):
    assert retrain.main([*base, '--save', save, *flags]) == 0
    return log(save)


@pytest.mark.parametrize('main, flags', [(search.main, TINY), (retrain.main, RETRAIN)])
def test_without_its_checkpoint_a_run_and_its_log_start_again(main, flags):
    assert main([*flags, '--save', 'r']) == 0
    lines = log('r')
    for name in ('checkpoint.pt', 'genotype.json', 'weights.pt'):
        Path('r', name).unlink(missing_ok=True)
    Path('r/log.jsonl').write_text('{"epoch": 9}\n')                    # of another day
    assert main([*flags, '--save', 'r', '--resume']) == 0 and log('r') == lines


@pytest.fixture(scope='module')
def plain_retrain(tmp_path_factory):
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp('plain'))
    lines = run_retrain('plain', '--auxiliary', '--cutout')
    os.chdir(before)
    return lines


@pytest.mark.parametrize('flags', [
    ['--auxiliary_weight', '1'], ['--drop_path_prob', '0.9'], ['--cutout_length', '4'],
    ['--arch', 'PDARTS'], ['--init_channels', '6'], ['--layers', '4'], ['--augment', 'standard'],
    ['--learning_rate', '0.1'], ['--grad_clip', '0.1'], ['--weight_decay', '0.1'],
    ['--momentum', '0.1'], ['--seed', '1'], ['--amp'], ['--multilabel'],
    ['--train_portion', '0.5']], ids=lambda f: f[0][2:])
def test_every_flag_of_retrain_changes_the_result(flags, plain_retrain):
    assert run_retrain('x', '--auxiliary', '--cutout', *flags) != plain_retrain


def test_retrain_on_unreal_data(plain_retrain):
    last = plain_retrain[-1]
    assert last['test_error'] is None and 0 <= last['fit_accuracy'] <= 1 and last['fit_loss'] > 0
    assert last['drop_path_prob'] == 0.1 and 'fit_loss' not in plain_retrain[0]
    assert run_retrain('n') != run_retrain('c', '--cutout')
    assert last['fit_images'] == 64
    assert 32 <= run_retrain('p', '--train_fraction', '0.5')[-1]['fit_images'] <= 32 + 10
    small = retrain.parse(['--arch', 'DARTS_V2', '--data', 'noise', '--preset', 'laptop'])
    assert (small.train_portion, small.image_size, small.layers, small.epochs) == (.04, 16, 5, 20)


def test_retrain_stopped_equals_never_stopped():
    whole = run_retrain('a', '--auxiliary')
    for _ in range(5):
        original = retrain.train_step

        def step_and_stop(*args, original=original):
            os.kill(os.getpid(), signal.SIGINT)
            return original(*args)

        retrain.train_step = step_and_stop
        try:
            status = retrain.main([*RETRAIN, '--save', 'b', '--auxiliary', '--resume'])
        finally:
            retrain.train_step = original
    assert status == 0 and log('b') == whole
    a, b = (torch.load(f'{run}/weights.pt', weights_only=True)['network'] for run in 'ab')
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_search_retrain_evaluate_and_predict(capsys):
    folder_of_images('photos/train', n=20, size=(40, 36))
    folder_of_images('photos/val', n=5, size=(40, 36))
    size = ['--image_size', '8']
    run_search('found', '--data', 'photos', *size, base=TINY_REAL)
    run_retrain('net', '--arch', 'found', '--data', 'photos', *size, base=RETRAIN[8:])
    lines = log('net')
    assert 0 <= lines[-1]['test_error'] <= 100
    assert lines[-1]['best_test_error_selected_on_test'] <= lines[-1]['test_error']
    capsys.readouterr()
    assert evaluate.main(['net', '--gpu', '-1', '--json']) == 0
    row = json.loads(capsys.readouterr().out)
    assert abs(row['test_error'] - lines[-1]['test_error']) < 1e-9
    assert row['top5'] is None and row['top1_interval'][0] < row['top1'] <= row['top1_interval'][1]
    assert (row['searched_on'], row['method']) == ('photos', 'darts')
    assert evaluate.main(['found']) == 0 and 'normal' in capsys.readouterr().out
    assert evaluate.main(['found', 'net', '--csv', 'table.csv']) == 0
    assert len(Path('table.csv').read_text().splitlines()) == 3
    Path('photos').rename('elsewhere')
    assert evaluate.main(['net']) == 2
    # The README's prediction on one image
    from evaluate import load_weights
    from generate_data import read_image
    network, meta = load_weights('net/weights.pt')
    pixels = torch.from_numpy(read_image('elsewhere/val/dog/0.png', meta['image_size']).copy())
    x = (pixels / 255 - torch.tensor(meta['mean'])) / torch.tensor(meta['std'])
    logits = network(x.permute(2, 0, 1).unsqueeze(0))
    assert meta['classes'][logits.argmax()] in ('cat', 'dog')


def test_table_groups_runs(capsys):
    for seed in '012':
        run_search(f'runs/s{seed}', '--seed', seed, '--max_steps', '1')
    capsys.readouterr()
    rows = [evaluate.report(f'runs/s{seed}') for seed in '012']
    line, = evaluate.table(rows)
    values = [row['skips_normal'] for row in rows]
    assert line['n'] == 3 and line['skips_normal'] == np.mean(values)
    assert abs(line['skips_normal_std'] - np.std(values, ddof=1)) < 1e-12
    assert evaluate.main(['runs/s0', 'runs/s1', 'runs/s2', 'runs/s0', '--csv', 't.csv']) == 0
    assert ',3,' in Path('t.csv').read_text()                   # a run named twice counts once
    assert '±' in capsys.readouterr().out


def test_metrics():
    mean, std, (low, high) = evaluate.mean_std_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and abs(std - 1.290994) < 1e-6 and abs(high - 4.554) < 2e-3 and low < 1
    assert evaluate.mean_std_interval([1.0]) == (1.0, None, None)
    low, high = evaluate.wilson(0.5, 100)
    assert abs(low - 0.4038) < 1e-4 and abs(high - 0.5962) < 1e-4
    assert evaluate.wilson(0, 10)[0] < 1e-12
    logits = torch.tensor([[3., 2, 1], [1, 2, 3]])
    y = torch.tensor([1, 2])
    assert evaluate.correct(logits, y) == 1 and evaluate.correct(logits, y, 2) == 2
    assert evaluate.correct(logits, y, 5) == 2                  # fewer than 5 classes
    assert evaluate.correct(torch.tensor([[1., -1]]), torch.tensor([[1., 1]])) == 0.5


def test_cost_command(capsys):
    assert evaluate.main(['--arch', 'DARTS_V2', '--cost', '--json']) == 0
    line = capsys.readouterr().out
    assert json.loads(line) == {'params': 3349342, 'params_auxiliary': 3825768,
                                'multiply_adds': 528359040} and line.count('\n') == 1
    assert evaluate.main(['--arch', 'DARTS_V2', '--cost', '--init_channels', '16', '--layers',
                          '8', '--num_classes', '3', '--image_size', '64']) == 0
    assert '528,359,040' not in capsys.readouterr().out


def test_published_genotypes_round_trip():
    for name, genotype in PUBLISHED.items():
        assert from_json(to_json(genotype), name) == genotype


def test_runs_started_in_the_same_second():
    """The shell's `&`: every one finishes in a folder of its own, on one data set."""
    command = [sys.executable, str(ROOT / 'search.py'), *TINY, '--max_steps', '1']
    processes = [subprocess.Popen([*command, '--seed', str(seed)], stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL) for seed in range(4)]
    assert [p.wait() for p in processes] == [0] * 4
    assert len(list(Path('runs').glob('*/genotype.json'))) == 4
    assert len(list(Path('data').iterdir())) == 1


def test_search_and_retrain_on_real_images(real_data):
    """The main job: real CIFAR-10 images, with random and with real labels; then retrain."""
    flags = ['--data_dir', real_data, '--layers', '3', '--init_channels', '4', '--batch_size',
             '16', '--steps_per_epoch', '2', '--epochs', '2', '--gpu', '-1']
    assert search.main(['--data', 'random_labels', '--save', 'random', *flags]) == 0
    assert search.main(['--data', 'cifar10', '--save', 'real', *flags]) == 0
    assert log('random')[-1]['alphas'] != log('real')[-1]['alphas']
    assert retrain.main(['--arch', 'random', '--data', 'cifar10', '--data_dir', real_data,
                         '--layers', '3', '--init_channels', '8', '--batch_size', '32',
                         '--epochs', '1', '--steps_per_epoch', '250', '--learning_rate', '0.05',
                         '--save', 'net', '--gpu', '-1']) == 0
    assert log('net')[-1]['test_error'] < 75                            # chance: 90


def test_images_of_readme_exist():
    text = (ROOT / 'README.md').read_text()
    for name in ('sheet.png', 'cell.svg'):
        assert f'.github/{name}' in text and (ROOT / '.github' / name).stat().st_size > 1000
    assert Image.open(ROOT / '.github/sheet.png').format == 'PNG'


def test_names_of_runs_do_not_collide():
    def name(*flags):
        return search.parse([*flags]).save
    names = [name(*f) for f in ((), ('--learning_rate', '0.05'), ('--learning_rate', '0.07'),
                                ('--data', 'a/x'), ('--data', 'b/x'), ('--data', 'a/x.y'))]
    assert len(set(names)) == len(names)
    assert 'learning_rate=0.05' in names[1]
    for k in 'ab':
        Path(f'runs/{k}').mkdir(parents=True)
        Path(f'runs/{k}/genotype.json').write_text(to_json(PUBLISHED['DARTS_V1']))
    archs = [retrain.parse(['--arch', f'runs/{k}/genotype.json']).save for k in 'ab']
    assert len(set(archs)) == 2 and '-a-' in archs[0]


def test_frozen_epochs_keep_their_share():
    def frozen(*flags):
        return search.parse(['--method', 'pcdarts', *flags]).frozen_epochs
    assert frozen() == 15 and frozen('--epochs', '10') == 3
    assert frozen('--epochs', '10', '--frozen_epochs', '5') == 5
    assert 'frozen' not in search.parse(['--method', 'pcdarts', '--epochs', '10']).save


def test_learning_rate_min_gives_way():
    assert search.parse(['--learning_rate', '0.0001']).learning_rate_min == 0.0001


def test_quick_takes_the_steps_that_there_are():
    args = retrain.parse(['--arch', 'DARTS_V2', '--quick'])
    before = dict(vars(args))
    assert evaluate.shortened(args, 31) == (2, 31, 62) and vars(args) == before


def test_quick_is_resumed_when_it_is_done(capsys):
    flags = ['--quick', '--resume', '--num_images', '128', '--image_size', '8', '--layers', '3',
             '--gpu', '-1', '--epochs', '1']
    for main, more in ((search.main, []), (retrain.main, ['--arch', 'DARTS_V2', '--data',
                                                          'noise', '--layers', '4'])):
        for _ in range(2):
            assert main([*flags, *more]) == 0
        assert 'is finished' in capsys.readouterr().out


def test_a_run_started_again_has_a_log_of_its_own():
    whole = run_search('run')
    Path('run/log.jsonl').write_text(''.join(
        json.dumps({**line, 'train_loss': 99, 'seconds': 1}) + '\n' for line in whole))
    for name in ('genotype.json', 'checkpoint.pt'):
        Path('run', name).unlink()
    assert run_search('run', '--resume') == whole


def test_the_fit_is_that_of_the_weights_that_are_kept():
    flags = ['--holdout_patients', '0.5', '--epochs', '6', '--learning_rate', '0.5']
    lines = run_retrain('r', *flags)
    assert min(lines, key=lambda line: line['holdout_error']) != lines[-1]
    network, _ = evaluate.load_weights('r/weights.pt')
    data = find_or_make(retrain.parse([*RETRAIN, *flags]))
    rows = stratified_split(data.labels, 0.5, 0)[0]
    fit = evaluate.test(network, Batches(data, rows, 50, torch.device('cpu'), shuffle=False))
    assert fit['loss'] == pytest.approx(lines[-1]['fit_loss'], rel=1e-5)
