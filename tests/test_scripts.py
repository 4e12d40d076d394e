"""search.py and retrain.py as a user runs them, at tiny size: results, resume, flags, names."""
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (CPU, DARTS, NOISE, ONE_STEP, ONESHOT, RETRAIN, ROOT, SIZES, TINY, chexpert,
                      fake_cifar, folder_of_images, one_line, run, same_run, stop_in_every_step)

import evaluate
import generate_data
import retrain
import search
from genotypes import PUBLISHED, find_genotype, from_plain, random_cell, to_json


def test_a_search_leaves_its_result_its_log_and_the_scripts(monkeypatch):
    lines = run(search.main, 'r', *TINY)
    names = {path.name for path in Path('r').iterdir() if not path.name.startswith('.')}
    assert names == {'args.json', 'log.jsonl', 'genotype.json', 'genotype.svg', 'checkpoint.pt',
                     'scripts'}
    assert Path('r/scripts/search.py').read_text() == (ROOT / 'search.py').read_text()
    fields = json.loads(Path('r/genotype.json').read_text())
    assert (fields['data'], fields['method'], fields['seed']) == ('noise', 'darts', 0)
    assert from_plain(fields) == from_plain(lines[-1]['genotype'])
    saved = torch.load('r/checkpoint.pt', weights_only=True)['network']
    for name, alpha in lines[-1]['alphas'].items():     # those after the last step
        assert torch.equal(torch.tensor(alpha), saved[f'alphas.{name}'])
    about = json.loads(Path('r/args.json').read_text())
    assert {'settings', 'versions', 'git_commit', 'hardware', 'command'} <= set(about)
    data, = Path('data').glob('noise-*')
    assert about['data_sha256'] == json.loads((data / 'meta.json').read_text())['sha256']
    monkeypatch.chdir(ROOT)                     # where torch's modules without a file seem to lie
    names = ['evaluate', 'generate_data', 'genotypes', 'model_search', 'operations', 'retrain']
    assert [*retrain.own_scripts()] == [f'{name}.py' for name in [*names, 'search']]


def test_a_long_run_on_a_cpu_says_at_its_first_step_how_to_make_it_shorter(capsys, monkeypatch):
    clock = itertools.count(0, 2000)                    # seconds later at every look
    monkeypatch.setattr(generate_data.Progress, 'last', 0)
    monkeypatch.setattr(time, 'monotonic', lambda: next(clock))
    run(search.main, 'r', *TINY)
    said = capsys.readouterr()
    assert re.search('about 1:40:00 left for the steps, until .*; --preset laptop or', said.out)
    assert '1/4 steps  2000.0 s each  1:40:00 left  epoch 1/2' in said.err


def test_a_retraining_leaves_weights_and_measures_the_fit():
    first, last = run(retrain.main, 'r', *RETRAIN, '--auxiliary', '--image_size', '32',
                      '--steps_per_epoch', '9')             # one more than the images give
    assert first['drop_path_prob'] == 0 and last['drop_path_prob'] == 0.1
    assert 'fit_loss' not in first and last['fit_n'] == 64 and 0 <= last['fit_error'] <= 100
    assert 'test_error' not in last                     # unreal data have no test images
    network, meta = evaluate.load_weights('r/weights.pt')
    assert meta['found_by']['data'] is None and not network.training


def test_the_epoch_that_is_kept_is_the_one_that_is_best_on_held_out_images(capsys):
    flags = [*RETRAIN, '--holdout_patients', '0.5', '--epochs', '6', '--learning_rate', '0.5',
             '--seed', '3']
    lines = run(retrain.main, 'r', *flags)
    best = min(lines, key=lambda line: line['holdout_error'])
    assert best not in (lines[0], lines[-1])
    network, _ = evaluate.load_weights('r/weights.pt')
    data = generate_data.find_or_make('noise', vars(retrain.parse(flags)))
    _, held = generate_data.stratified_split(data.labels, 0.5, 3)
    found = evaluate.test('holdout', network, data, held, CPU)
    assert found['holdout_loss'] == pytest.approx(best['holdout_loss'], rel=1e-5)
    assert lines[-1]['kept_after_epochs'] == best['epoch'] + 1
    result = re.search('result: kept: the network after epoch .*', capsys.readouterr().out)[0]
    assert 'training loss' not in result                # which is of the last epoch
    assert evaluate.mean_of(lines[-2], 'holdout_error') == lines[-2]['holdout_error']
    assert evaluate.mean_of(lines[-1], 'holdout_error') is None         # no jump in the plot


@pytest.mark.parametrize('flags', [DARTS, TINY])
def test_controls_need_no_data_or_no_steps(flags):
    assert search.main(['--method', 'random', '--space', flags[-1], '--seed', '5',
                        '--save', 'r']) == 0
    assert find_genotype('r')[0] == random_cell(flags[-1], 5) and not Path('data').exists()
    assert run(search.main, 'untrained', *flags, '--epochs', '0') == []
    torch.manual_seed(0)
    network = search.Darts(search.parse(flags), 10, 'cifar', CPU).build()
    assert find_genotype('untrained')[0] == network.genotype()


def test_search_and_retrain_on_real_images():
    """The main job: real CIFAR-10 images, with random and with real labels; then retrain."""
    folder = Path(os.environ.get('UNREALNAS_DATA', ROOT / 'data'))
    if not (folder / 'cifar-10-batches-py').is_dir():
        pytest.skip('no real CIFAR-10: put cifar-10-batches-py into data/')
    flags = ['--data_dir', str(folder), *SIZES]
    random_labels = run(search.main, 'random', '--data', 'random_labels', *flags)
    real = run(search.main, 'real', '--data', 'cifar10', *flags)
    assert random_labels[-1]['alphas'] != real[-1]['alphas']
    lines = run(retrain.main, 'net', '--arch', 'random', '--data', 'cifar10', *flags, '--epochs',
                '1', '--steps_per_epoch', '150', '--batch_size', '32', '--learning_rate', '0.05',
                '--train_portion', '0.1', '--image_size', '16')
    assert lines[-1]['test_error'] < 85                 # chance: 90


COMMANDS = {
    'darts': (DARTS, ''),
    'pcdarts': (TINY, '--method pcdarts --unrolled --frozen_epochs 1'),
    'pdarts': (DARTS, '--method pdarts --epochs 4 --steps_per_epoch 1 --frozen_epochs 0'),
    'gdas': (TINY, '--method gdas'),
    'sdarts': (TINY, '--method sdarts --perturb adversarial'),
    'dartsminus': (TINY, '--method dartsminus --arch_data train'),
    'betadarts': (TINY, '--method betadarts --arch_data none --amp'),
    'hessian': (TINY, '--hessian 1 --valid_fraction 0.125'),    # an epoch draws images twice
    'oneshot': (ONESHOT, '--train_portion 0.1'),        # more steps than its images give
    'fresh': (TINY, '--fresh --workers 0'),
    'retrain': (RETRAIN, '--auxiliary --cutout --image_size 32 --holdout_patients 0.2 '
                '--drop_path_prob 0.9')}


@pytest.mark.parametrize('name', COMMANDS)
def test_stopped_in_every_step_equals_never_stopped(name, monkeypatch):
    monkeypatch.setattr(search.PDarts, 'MORE_CELLS', (0, 1, 2))         # quicker
    flags, more = COMMANDS[name]
    main, flags = (retrain if flags is RETRAIN else search).main, [*flags, *more.split()]
    run(main, 'whole', *flags)
    assert stop_in_every_step(main, 'parts', *flags) == 5
    same_run('parts', 'whole')


def test_a_run_goes_on_with_another_number_of_processes():
    def as_of_two():
        content = torch.load('parts/checkpoint.pt', weights_only=True)
        halves = torch.tensor([1, 0.5, 1, 0.5])         # means of losses, counts of right answers
        content['sums'] = torch.cat([content['sums'] * halves] * 2)
        generate_data.write_file('parts/checkpoint.pt', content)

    run(search.main, 'whole', *TINY)
    stop_in_every_step(search.main, 'parts', *TINY, after=as_of_two)
    same_run('parts', 'whole')


def test_kill_9_at_random_moments():
    flags = [*TINY, '--epochs', '30', '--checkpoint_minutes', '0', '--resume']
    run(search.main, 'whole', *flags)
    command = [sys.executable, ROOT / 'search.py', *flags, '--save', 'killed']
    path = Path('killed/checkpoint.pt')
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while not Path('killed/.lock').exists() and process.poll() is None:
                time.sleep(0.02)
            before = path.exists() and path.stat().st_mtime_ns
            time.sleep(random.uniform(0, 0.2))
            while before and path.stat().st_mtime_ns == before and process.poll() is None:
                time.sleep(0.01)                        # at least a step further
            process.kill()
    assert not Path('killed/genotype.json').exists()
    run(search.main, 'killed', *flags)
    same_run('killed', 'whole')
    assert not list(Path('killed').glob('.*.tmp'))


def test_a_stopped_run_saves_and_dies_of_its_signal_so_that_a_shell_loop_stops():
    command = [sys.executable, ROOT / 'search.py', *TINY, '--epochs', '300', '--augment', 'crop',
               '--workers', '1', '--save', 'r']
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        while not Path('r/checkpoint.pt').exists() and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)          # the worker gets it too, as from Slurm
        said = process.stdout.read()
    assert process.returncode == -signal.SIGTERM and 'saved in r: run the same' in said


def test_a_worker_that_is_killed_ends_the_run_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(generate_data.Data, '__getitem__',
                        lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    flags = ['--augment', 'crop', '--workers', '1', '--save', 'r']
    one_line(capsys, search.main([*TINY, *flags]), 'a worker was killed')


def test_a_signal_while_cells_are_scored_ends_the_run_at_once(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(search.OneShot, 'score', lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert search.main([*ONESHOT, '--save', 'r']) == 130
    assert 'stopped: the steps are saved in r: run the same' in capsys.readouterr().err
    assert run(search.main, 'r', *ONESHOT, '--resume') == run(search.main, 'whole', *ONESHOT)


def test_a_signal_while_the_last_checkpoint_is_written_ends_the_run_when_it_is(monkeypatch, capsys):
    def write(path, content):
        if path.name == 'checkpoint.pt' and content['epoch'] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        write_file(path, content)

    write_file = retrain.write_file
    with monkeypatch.context() as patch:
        patch.setattr(retrain, 'write_file', write)
        assert search.main([*TINY, '--save', 'r']) == 130
    assert 'saved in r: run the same' in capsys.readouterr().out
    assert run(search.main, 'r', *TINY, '--resume') == run(search.main, 'whole', *TINY)


@pytest.mark.parametrize('main, flags', [(search.main, TINY), (retrain.main, RETRAIN)])
def test_a_lost_log_is_written_again_a_lost_checkpoint_starts_again_and_the_end_is_skipped(
        main, flags, capsys):
    Path('r/scripts').mkdir(parents=True)               # killed before its first file
    whole, path = run(main, 'r', *flags, '--resume'), Path('r/log.jsonl')
    lines = path.read_text().splitlines(keepends=True)
    Path('r/scripts/operations.py').write_text('other')
    about = json.loads(Path('r/args.json').read_text())
    about['hardware']['threads'] += 1
    Path('r/args.json').write_text(json.dumps(about))
    for lost in ('log.jsonl', 'checkpoint.pt', 'lines'):
        for name in ('genotype.json', 'weights.pt', lost):
            Path('r', name).unlink(missing_ok=True)
        if lost == 'lines':
            path.write_text(lines[0] + '{"epoch": 1, "tor')
        assert run(main, 'r', *flags, '--resume') == whole
    shutil.rmtree('data')
    assert 'r began on other hardware (threads: ' in capsys.readouterr().err
    assert run(main, 'r', *flags, '--resume') == whole and not Path('data').exists()
    said = capsys.readouterr()
    assert 'r is finished' in said.out and 'next: python' in said.out
    assert said.err == 'note: changed since r began: operations.py\n'
    path.unlink()
    assert main([*flags, '--save', 'r', '--resume']) == 0


def test_a_setting_that_was_added_since_is_compared_if_it_is_typed(monkeypatch, capsys):
    lines = run(search.main, 'r', *TINY, *ONE_STEP)
    monkeypatch.setitem(search.SEARCH, 'tau', generate_data.Setting(1.0, 'over 50% of it'))
    assert run(search.main, 'r', *TINY, *ONE_STEP, '--resume') == lines
    assert 'over 50% of it (1.0)' in help_of(search.main, capsys)
    one_line(capsys, search.main([*TINY, *ONE_STEP, '--save', 'r', '--resume', '--tau', '2']),
             '--tau')


def table(rows):
    """{flag: (more flags, its value)} of lines 'flag value, flag value: more flags'."""
    found = {}
    for line in rows.splitlines():
        flags, _, more = line.partition(':')
        for flag, *value in map(str.split, flags.split(',')):
            found[flag] = more.strip(), ' '.join(value)
    return found


# Each flag with a value that gives another result, and the flags which that needs.
SHARED = """data generated, image_size 12, num_images 160, num_classes 5, multilabel
source own, label_mode balanced, label_noise 0.5: random_labels
generator spectrum, difficulty hard, data_seed 1: --data generated
fresh: --epochs 2
uncertain ones, views all: chexpert
test_fraction 0.1: own
augment standard, epochs 3, steps_per_epoch 1, batch_size 4, grad_accum 2
learning_rate 0.1, learning_rate_min 0.01, momentum 0.1, weight_decay 0.1, grad_clip 0.1
warmup_epochs 2: --epochs 3
stem imagenet: --image_size 32
init_channels 8, seed 9, amp, quick"""
SEARCH_FLAGS = table(SHARED + """
method gdas, unrolled, arch_data train, partial 2, train_portion 0.6
valid_fraction 0.3, arch_learning_rate 0.01, arch_weight_decay 0.5, frozen_epochs 1, hessian 1
early_stop: --epochs 17 --steps_per_epoch 1
cells_per_stage 2: --space nb201
perturb adversarial: --method sdarts
preset chexpert: --num_images 400""")
RETRAIN_FLAGS = table(SHARED + """
arch PDARTS, layers 4, drop_path_prob 0.9, cutout 4, label_smoothing 0.1
holdout_patients 0.2, train_portion 0.5, preset nb201
auxiliary: --image_size 32""")
SCRIPTS = {'search': (search, TINY, SEARCH_FLAGS), 'retrain': (retrain, RETRAIN, RETRAIN_FLAGS)}
SAME = evaluate.MAY_DIFFER - {'typed'} | {'tf32'}       # flags that change no result on a CPU
PLACES = {'random_labels': '--data random_labels --image_size 8',
          'chexpert': '--data chexpert --image_size 16 --preset cifar',
          'own': '--data own --image_size 8'}


@pytest.fixture(scope='module')
def result(tmp_path_factory):
    """result(script, flags): the log of a tiny run beside real data; equal ones are run once."""
    folder, known = tmp_path_factory.mktemp('shared'), {}
    fake_cifar(folder / 'data')
    chexpert(folder / 'data', patients=40)
    folder_of_images(folder / 'own', n=30, size=(8, 8))

    def log_of(script, flags):
        os.chdir(folder)
        key = script, *flags
        if key not in known:
            known[key] = run(SCRIPTS[script][0].main, f'run{len(known)}', *flags)
            for line in known[key]:             # what was asked for is no effect of it
                line.update(learning_rate=0, drop_path_prob=0)
        return known[key]
    return log_of


def help_of(main, capsys, *flags):
    with pytest.raises(SystemExit):
        main([*flags, '--help'])
    return capsys.readouterr().out


def test_every_flag_is_in_a_table_of_this_file_and_there_are_at_most_76(capsys):
    elsewhere, found = {'candidates', 'score', 'repeats', 'space', 'layers'}, {}    # other tests
    for main in (search.main, retrain.main, evaluate.main, generate_data.main):
        words = help_of(main, capsys).split('examples:')[0].replace(',', ' ').split()
        found[main] = {word[2:] for word in words if re.match('--(?!help)', word)}
    assert found[search.main] == SEARCH_FLAGS.keys() | SAME | elsewhere | {'skip_broken'}
    assert found[retrain.main] == RETRAIN_FLAGS.keys() | SAME | {'skip_broken'}
    assert 60 < len(set.union(*found.values())) <= 76


@pytest.mark.parametrize('script, flag', [(script, flag) for script, row in SCRIPTS.items()
                                          for flag in row[2]])
def test_every_flag_changes_the_result(script, flag, result):
    _, base, table = SCRIPTS[script]
    more, value = table[flag]
    if more in PLACES:
        at = base.index('--data')
        base = base[:at] + base[at + len(NOISE):] + PLACES[more].split()
        more = '--uncertain ones' if flag == 'views' else ''
    base = [*base, *more.split()]
    assert result(script, [*base, f'--{flag}', *value.split()]) != result(script, base)


@pytest.mark.parametrize('script', SCRIPTS)
def test_flags_that_change_no_result(script, result):
    _, flags, _ = SCRIPTS[script]
    plain = result(script, flags)
    Path('moved').mkdir(exist_ok=True)
    free = ['--tf32', '--workers', '0', '--checkpoint_minutes', '0', '--graph', 'off',
            '--data_dir', 'moved', '--download', '--resume', '--gpu', '-1']
    assert {f[2:] for f in free if f.startswith('--')} | {'save'} == SAME
    assert result(script, [*flags, *free]) == plain


@pytest.mark.parametrize('script, flags', [
    ('search', ''), ('search', '--method pdarts'), ('search', '--preset laptop --method gdas'),
    ('search', '--data imagenet --method pcdarts'), ('search', '--quick --space nb201'),
    ('retrain', '--arch DARTS_V2'), ('retrain', '--arch DARTS_V2 --data chexpert'),
    ('retrain', '--arch DARTS_V2 --preset imagenet')])
def test_help_shows_the_defaults_of_what_stands_beside_it(script, flags, capsys):
    module = SCRIPTS[script][0]
    text = help_of(module.main, capsys, *flags.split())
    assert 'None' not in text and len(text.splitlines()) <= 100
    words = ' '.join(text.split('examples:')[0].split())
    unsaid = {'save', 'data_seed', 'arch_grad_clip', 'schedule', 'least_batches',
              'genotype', 'nesterov', 'optimizer', 'typed', *re.findall(r'--(\w+)', flags)}
    for name, value in vars(module.parse(flags.split())).items():
        if value not in (None, False) and name not in unsaid:
            flag = f'--{name} '
            assert f'({value})' in words[words.rindex(flag):].split(' --')[0]


def test_typed_wins_over_quick_over_preset_over_method_over_space():
    for name, flags, value in (
            ('epochs', '', 50), ('epochs', '--method gdas', 250),
            ('epochs', '--method gdas --preset laptop', 50),
            ('epochs', '--method gdas --preset laptop --quick', 3),
            ('epochs', '--method gdas --preset laptop --quick --epochs 7', 7),
            ('weight_decay', '--space nb201', 5e-4),
            ('nesterov', '', False), ('nesterov', '--preset laptop', True),
            ('train_portion', '--quick --train_portion 0.3', 0.3),
            ('hessian', '', None), ('hessian', '--early_stop', 2)):
        assert vars(search.parse(flags.split()))[name] == value, (name, flags)
    assert retrain.parse(['--arch', random_cell('nb201', 0), '--preset', 'cifar']).epochs == 600


def test_schedules_keep_their_shape_in_shorter_runs():
    for flags, lengths in (
            ('', (50, 97, 4850, 15)), ('--steps_per_epoch 2', (50, 2, 100, 15)),
            ('--epochs 10', (10, 97, 970, 3)), ('--epochs 10 --frozen_epochs 5', (10, 97, 970, 5)),
            ('--quick', (3, 4, 12, 0))):
        args = search.parse(['--method', 'pcdarts', '--save', 'r', *flags.split()])
        plan = retrain.Run(args, CPU, 'genotype.json')
        plan.plan(97)
        assert (plan.epochs, plan.steps, plan.total, args.frozen_epochs) == lengths, flags
    args = search.parse(['--method', 'oneshot', '--preset', 'laptop', '--save', 'r'])
    plan = retrain.Run(args, CPU, 'genotype.json')
    plan.plan(2)                                        # as long for few images
    assert (retrain.batch_of(plan.args, 113), plan.total) == (56, 8029)
    args = search.parse(['--epochs', '4'])
    assert np.allclose([retrain.learning_rate_at(args, epoch, 4) for epoch in range(4)],
                       0.001 + 0.024 * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2)
    assert search.parse(['--learning_rate', '0.0001']).learning_rate_min == 0.0001


def name(flags, module=search):
    return module.parse(shlex.split(flags)).save


def test_names_of_runs_hold_what_was_typed_and_nothing_that_was_derived():
    for flags, expected in (
            ('', 'noise-darts-seed0'), ('--gpu -1 --resume --workers 3', 'noise-darts-seed0'),
            ('--learning_rate 0.025', 'noise-darts-seed0-learning_rate=0.025'),    # the default
            ('--seed 3 --data_seed 5', 'noise-darts-seed3-data_seed=5'),
            ('--data imagenet --batch_size 512', 'imagenet-darts-seed0-batch_size=512'),
            ('--method random --seed 2', 'noise-random-seed2'),
            ('--data sets/photos/ --quick', 'photos-darts-seed0-quick')):
        assert name(flags) == f'runs/search-{expected}'
    for k in 'ab':
        Path(f'runs/{k}').mkdir(parents=True)
        Path(f'runs/{k}/genotype.json').write_text(to_json(PUBLISHED['DARTS_V1']))
    assert name('--arch runs/a', retrain) == name('--arch runs/a/genotype.json', retrain) \
        == 'runs/retrain-cifar10-a-seed0' != name('--arch runs/b', retrain)
    # All are short, without bars, and differ.
    arch = f'--arch {shlex.quote(random_cell("nb201", 0))} --data '
    names = [name(arch + 'random_labels --label_noise 0.5 --seed 3', retrain),
             name(arch + 'cifar10 --preset laptop', retrain)]
    for flag, (more, value) in SEARCH_FLAGS.items():
        if more not in PLACES:
            names.append(name(f'{more} --{flag} {value}'))
    assert len(set(names)) == len(names) and not any('|' in text for text in names)
    assert all(len(Path(text).name) < 80 for text in names)


def test_the_next_command_is_one_that_retrain_takes(capsys):
    folder_of_images('own', n=16)
    chexpert('d')
    for out, source in (('written', 'chexpert --data_dir d'),
                        ('relabelled', 'own --test_fraction 0.4')):
        generate_data.main(['--kind', 'random_labels', '--image_size', '8', '--out', out,
                            '--source', *source.split()])
    run(search.main, 'my run', *DARTS, '--epochs', '0')
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == 'next: ' + search.next_command(search.parse(DARTS), 'my run')
    retrain.parse(shlex.split(said)[3:])
    script, here = shlex.quote(os.path.relpath(ROOT / 'retrain.py')), os.getcwd()
    for data, expected in (
            ('own', 'own --image_size 8'),
            ('noise', 'cifar10 --auxiliary --cutout --download'),
            ('noise --quick', 'cifar10 --quick --download'),
            ('noise --preset laptop', 'cifar10 --preset laptop --download'),
            ('random_labels --source own --data_dir d', 'own --image_size 8'),
            ('chexpert --uncertain ones --data_dir d --preset cifar --image_size 16',
             'chexpert --data_dir d --uncertain ones'),
            ('noise --multilabel', 'chexpert --data_dir DIR'),
            ('random_labels --source chexpert', 'chexpert'),
            ('written --data_dir d', 'chexpert --data_dir d'),
            ('relabelled', f'{here}/own --image_size 8 --test_fraction 0.4'),
            ('relabelled --preset laptop',
             f'{here}/own --preset laptop --image_size 8 --test_fraction 0.4'),
            ('own --preset chexpert --image_size 224', 'own --image_size 224')):
        args = search.parse(['--image_size', '8', '--gpu', '-1', '--data', *data.split()])
        said = search.next_command(args, 'my run')
        assert said == f"python {script} --arch 'my run' --data {expected} --gpu -1"
        retrain.parse(shlex.split(said)[2:])
    assert '--gpu' not in search.next_command(search.parse(['--gpu', '0']), 'a')   # the default
