"""evaluate.py: metrics by hand, tables, reports, plots and predictions of runs."""
import csv
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (DARTS, NOISE, ONE_STEP, RETRAIN, SIZES, TINY, fake_cifar, folder_of_images,
                      make_set, one_line, printed, read_rows, reports, run)

import evaluate
import retrain
import search
from generate_data import read
from genotypes import PUBLISHED, find_genotype, nas_bench_201, to_json, to_string, truth


def test_errors_by_hand(monkeypatch):
    scores = torch.tensor([[3., 2, 1, 0, 0, 9], [1, 2, 3, 0, 0, 0], [0, 0, 0, 0, 0, 1]])
    labels, names = torch.tensor([0, 2, 5]), list('abcdef')
    assert evaluate.measure('fit', 0.5, scores, labels, names) == {
        'fit_loss': 0.5, 'fit_n': 3, 'fit_error': pytest.approx(100 / 3), 'fit_top5_error': 0}
    two = evaluate.measure('fit', 0.5, scores[:, :2], labels.clamp(max=1), names[:2])
    assert two['fit_top5_error'] is None
    assert evaluate.correct(scores, labels) == 2
    assert evaluate.correct(torch.tensor([[1., -1]]), torch.tensor([[1., 1]])) == 0.5
    metric = evaluate.Metric('three', 1, lambda *_: torch.tensor(3))
    monkeypatch.setitem(evaluate.METRICS, 'three', metric)
    assert type(evaluate.measure('fit', 0.5, scores, labels, names)['fit_three']) is float


def test_areas_under_curves_by_hand_of_unknown_labels_and_with_intervals():
    # Pairs of a positive and a negative: 3 x 2; won 3, tied 2, lost 1.
    scores, labels = np.array([.9, .5, .3, .5, .3]), np.array([1, 1, 1, 0, 0])
    assert evaluate.auroc(scores, labels) == (2 + 1.5 + 0.5) / 6
    rng = np.random.default_rng(0)
    labels = (rng.random((300, 3)) < 0.4).astype(int)
    scores = labels + rng.normal(0, 1, labels.shape)
    labels[:, 2] = 0                                    # one value only: not defined
    labels[:9, 0] = -1                                  # not known
    names = ['Edema', 'x', 'y']
    areas = evaluate.areas(scores, labels, names)
    assert list(areas) == ['Edema', 'x']
    assert areas['Edema'] == evaluate.auroc(scores[9:, 0], labels[9:, 0])
    found = evaluate.measure('fit', 0.5, torch.from_numpy(scores), torch.from_numpy(labels), names)
    assert found == {'fit_loss': 0.5, 'fit_n': 300, 'fit_auroc_tasks': areas['Edema'],
                     'fit_auroc': np.mean(list(areas.values()))}
    none = evaluate.mean_area(scores, labels, names, ['Edema', 'y'])    # never of fewer tasks
    assert none is None
    low, high = evaluate.bootstrap(scores, labels, names, range(300))['Edema']
    assert low < areas['Edema'] < high and 0.04 < high - low < 0.15     # about .76 +- .03
    twice = [np.repeat(values, 2, 0) for values in (scores, labels)]    # says no more
    wide = evaluate.bootstrap(*twice, names, np.repeat(range(300), 2))['Edema']
    narrow = evaluate.bootstrap(*twice, names, range(600))['Edema']
    assert wide == pytest.approx([low, high]) and np.diff(narrow) < 0.85 * np.diff(wide)
    few, also_few, enough = (evaluate.area_text(0.9, 0.8, 1, *counts)
                             for counts in ((9, 99), (99, 9), (10, 10)))
    assert 'too few' in few and 'too few' in also_few
    assert enough == '0.900 (95%: 0.800 to 1.000), 10 of 20 positive'


SKIPS, CONVS, POINTS = (to_string([name] * 6) for name in (
    'skip_connect', 'nor_conv_3x3', 'nor_conv_1x1'))


@pytest.fixture
def searches(monkeypatch):
    """Runs s0, s1, s2 of NAS-Bench-201 that differ in their seeds, with known results."""
    for k, arch in enumerate((SKIPS, CONVS, POINTS)):
        monkeypatch.setattr(search.Darts, 'result', lambda self, arch=arch: (arch, {}))
        run(search.main, f's{k}', *TINY, '--seed', str(k), *ONE_STEP)


def test_a_report_of_a_known_cell_and_a_table_with_seeds_in_one_line(searches, capsys):
    row, = reports(capsys, 's0')
    assert (row['cifar10'], row['percentile']) == pytest.approx((54.3, 2.5), abs=0.1)
    largest = 93.76, 71.11, 41.44
    difference = np.subtract((54.30, 15.61, 16.32), largest)
    assert row['vs_largest_network'] == pytest.approx(difference, abs=0.02)
    assert (row['skips'], row['nones'], row['searched_on']) == (6, 0, 'noise')
    assert row['params_full_size'] == nas_bench_201()[0][SKIPS]['params'] and 'log' not in row
    out = printed(capsys, 's0').out
    search.say(search.parse([]), SKIPS)
    said = capsys.readouterr().out
    assert 'collapsed' in said and '--arch NB201_LARGEST' in said
    assert '54.30\n' in out and '73,306' in out and '-39.46' in out
    values = [truth(arch)['cifar10'] for arch in (SKIPS, CONVS, POINTS)]
    mean, deviation = np.mean(values), np.std(values, ddof=1)
    assert len(reports(capsys, 's0', '--gpu', '-1', 's1')) == 2     # also after flags
    run(search.main, 't', *TINY, '--arch_data', 'train', *ONE_STEP)
    out = printed(capsys, 's0', 's1', 's2', 's0/', 't', '--csv', 't.csv').out
    head, first, second = out.splitlines()
    assert f'{mean:.2f} ± {deviation:.2f}' in first and 'CIFAR-10 %' in head
    assert '±' not in second and ' train ' in second
    first, second = read_rows('t.csv')
    assert (first['n'], first['arch_data'], second['arch_data']) == ('3', 'valid', 'train')
    assert float(first['cifar10']) == pytest.approx(mean)
    assert float(first['cifar10_std']) == pytest.approx(deviation)
    run(search.main, 'w', *TINY, '--init_channels', '8', *ONE_STEP)
    shutil.copytree('s1', 'again')
    shutil.copy('s0/genotype.json', 'again')            # as by other code
    said = printed(capsys, 's0', 's1', 'w', 'again')            # none averaged with others
    head, first, second = said.out.splitlines()[-3:]
    assert ' init_channels=4 ' in first and ' init_channels=8 ' in second and 'settings' in head
    assert ' epochs=1 ' in first and ' data=' not in first      # typed, and in no other column
    assert 'again is left out, since it repeats s1' in said.err
    about = json.loads(Path('again/args.json').read_text())
    Path('again/args.json').write_text(json.dumps({**about, 'code': 'other'}))
    printed(capsys, 's0', 's1', 'again', '--csv', 't.csv')
    assert [(row['n'], 'code=' in row['settings']) for row in read_rows('t.csv')] == [
        ('2', True), ('1', True)]
    run(search.main, 'v', *TINY, '--augment', 'none', '--seed', '5', *ONE_STEP)     # auto's choice
    printed(capsys, 's0', 'v', '--csv', 't.csv')
    assert [row['n'] for row in read_rows('t.csv')] == ['2']
    run(search.main, 'l', *TINY, '--preset', 'laptop', '--arch_weight_decay', '0')
    run(search.main, 'm', *TINY, '--preset', 'laptop')
    _, *lines = printed(capsys, 's0', 'l', 'm').out.splitlines()
    assert [' preset=laptop ' in line for line in lines] == [False, True, True]
    assert ['arch_weight_decay=0.0 ' in line for line in lines] == [False, True, False]


def test_a_table_keeps_apart_cells_of_one_name_fresh_images_and_other_labels(capsys):
    flags = [*RETRAIN[2:], *ONE_STEP]
    for k, name in enumerate(('DARTS_V1', 'DARTS_V2')):
        Path(f'{k}').mkdir()
        Path(f'{k}/cell.json').write_text(to_json(PUBLISHED[name]))
        run(retrain.main, f'net{k}', '--arch', f'{k}/cell.json', *flags)
    run(retrain.main, 'net2', '--arch', 'DARTS_V2', *flags)
    said = printed(capsys, 'net0', 'net1', 'net2', '--csv', 't.csv').out
    assert [row['n'] for row in read_rows('t.csv')] == ['1', '1', '1']
    assert 'arch=1/cell.json' in said and 'arch=DARTS_V2' not in said
    make_set('set', '--num_images', '64')
    for name, more in (('s0', []), ('s1', ['--fresh'])):
        run(search.main, name, *TINY[len(NOISE):], '--data', 'set', *more, *ONE_STEP)
    shutil.rmtree('set')
    make_set('set', '--num_images', '64', '--label_mode', 'balanced')
    run(search.main, 's2', *TINY[len(NOISE):], '--data', 'set', '--seed', '1', *ONE_STEP)
    shutil.rmtree('set')
    printed(capsys, 's0', 's1', 's2', '--csv', 't.csv')
    assert [row['n'] for row in read_rows('t.csv')] == ['1', '1', '1']


def test_plots_and_an_unfinished_run_beside_finished_ones(searches, capsys):
    run(search.main, 'u', *TINY)
    Path('u/genotype.json').unlink()
    Path('u/log.jsonl').write_text(Path('u/log.jsonl').read_text().split('\n')[0] + '\n')
    said = printed(capsys, 's0', 'u', 's1')
    assert ' 2 ' in said.out and 'u: not finished after 1 epochs' in said.err
    run(retrain.main, 'net', *RETRAIN)
    for name, start in (('p.png', b'\x89PNG'), ('p.pdf', b'%PDF'), ('p.svg', b'<?xml')):
        assert f'wrote {name}\n' in printed(capsys, 's0', 'u', 'net', '--plot', name).err
        assert Path(name).read_bytes().startswith(start)
    run(search.main, 'other', *TINY, *ONE_STEP, '--arch_weight_decay', '0')
    text = Path('p.svg').read_text()
    assert text.count('not finished') == 1
    printed(capsys, 's0', 'other', '--plot', 'q.svg')
    assert 'arch_weight_decay=0.0' in Path('q.svg').read_text()
    about = Path('other/args.json').read_text().replace('"data": "noise"', '"data": "photos"')
    Path('other/args.json').write_text(about.replace('"num_images": ', '"num_images": 1'))
    printed(capsys, 's0', 'other', '--plot', 'q.svg')           # which photos does not take
    assert Path('q.svg').read_text().count(', num_images=') == 1
    evaluate.write_csv('c.csv', [[os.fsdecode(b'caf\xe9.jpg')]])        # a name not in UTF-8
    assert Path('c.csv').read_bytes() == b'caf\xe9.jpg\n'
    assert 'epoch' in text and 'training accuracy, %' in text and 'alphas: valid' in text
    assert search.main(['--method', 'random', '--save', 'r']) == 0
    capsys.readouterr()
    one_line(capsys, evaluate.main(['r', '--plot', 'r.svg']), '--plot')
    assert not Path('r.svg').exists()


def test_what_is_not_the_same_search_has_a_name_of_its_own():
    for flags, name in (('--epochs 0', 'darts, no steps'), ('--unrolled', 'darts, second order'),
                        ('--method sdarts --perturb adversarial --unrolled',
                         'sdarts, second order, adversarial')):
        assert evaluate.method_name(vars(search.parse(flags.split()))) == name


def test_a_retrained_network_is_tested_again_and_says_where_its_cell_is_from(capsys):
    fake_cifar()
    run(search.main, 's', *DARTS, *ONE_STEP)
    flags = ['--arch', 's', *SIZES]
    lines = run(retrain.main, 'c', *flags, '--data', 'cifar10')
    row, = reports(capsys, 'c')
    assert row['test_error'] == lines[-1]['test_error'] and row['test_n'] == 20
    assert row['test_loss'] == pytest.approx(lines[-1]['test_loss'], rel=1e-5)
    assert row['gap'] == pytest.approx(row['test_error'] - row['fit_error'])
    assert [row[name] for name in ('searched_on', 'method', 'trained_on', 'space')] == \
        ['noise', 'darts', 'cifar10', 'darts']
    run(retrain.main, 'n', *flags, '--data', 'random_labels', '--label_noise', '0.5')
    run(retrain.main, 'd', *flags, '--data', 'cifar10', '--seed', '1')
    out = printed(capsys, 'c', 'd', 'n').out
    assert 'random_labels, label_noise 0.5' in out and '±' in out
    assert 'test - training, points' in out
    run(search.main, 'PDARTS', *DARTS, *ONE_STEP, '--arch_weight_decay', '0')  # no name
    run(retrain.main, 'e', '--arch', 'PDARTS', *SIZES, '--data', 'cifar10')
    _, first, second = printed(capsys, 'c', 'd', 'e').out.splitlines()  # of two kinds of search
    assert 'search_arch_weight_decay=0.001 ' in first and 'arch_weight_decay=0.0 ' in second
    content = torch.load('d/weights.pt', weights_only=True)
    content['meta']['found_by']['settings']['code'] = 'other'
    torch.save(content, 'd/weights.pt')
    _, first, second = printed(capsys, 'c', 'd').out.splitlines()       # searches by other scripts
    assert 'search_code=' in first and 'search_code=other ' in second
    shutil.move('data', 'moved')
    one_line(capsys, evaluate.main(['c', '--gpu', '-1']), 'cifar-10-batches-py')
    assert reports(capsys, 'c', '--data_dir', 'moved')[0]['test_error'] == row['test_error']


def test_a_prediction_is_that_of_the_test_and_classes_are_matched_by_name(capsys):
    for split in ('train', 'val'):
        folder_of_images(f'photos/{split}', ('cat', 'dog', '鸟'), n=8, size=(90, 70))
    for size in ('16', '72'):                           # above 64 px the middle is cut out
        run(retrain.main, size, *RETRAIN[:2], '--data', 'photos', '--image_size', size, *SIZES)
        out = printed(capsys, size, '--predict', 'photos/val').out
        rows = list(csv.DictReader(out.splitlines()))
        wrong = [row['class'] != Path(row['file']).parent.name for row in rows]
        assert len(rows) == 24 and all(
            float(row[row['class']]) == max(map(float, [*row.values()][2:])) for row in rows)
        assert reports(capsys, size)[0]['test_error'] == pytest.approx(100 * np.mean(wrong))
    shutil.copy(f'{size}/weights.pt', 'my.pt')
    for weights in (f'{size}/weights.pt', 'my.pt'):
        alone = printed(capsys, weights, '--predict', rows[3]['file']).out.splitlines()
        assert alone[1] == ','.join(rows[3].values())
    Path('photos/val/cat/bad.png').write_bytes(b'no picture')
    said = printed(capsys, size, '--predict', 'photos/val')
    assert said.out.count('photos/') == 24 and 'bad.png' not in said.out and 'bad.png' in said.err
    Path('photos/val/cat/bad.png').unlink()
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'Glyph')       # which the font lacks
        assert evaluate.main([size, '--scores', 's.csv', '--plot', 'p.svg']) == 0
    assert 'predicted class' in Path('p.svg').read_text()       # a confusion matrix
    assert '2 is 鸟' in capsys.readouterr().err
    lines = read_rows('s.csv')
    assert list(lines[0]) == ['image', 'label', 'score', 'true'] and len(lines) == 24 * 3
    assert all((line['true'] == '1') == (Path(line['image']).parent.name == line['label'])
               for line in lines)
    scores = {(os.path.relpath(line['image']), line['label']): line['score'] for line in lines}
    for row in rows:
        assert float(scores[row['file'], 'dog']) == pytest.approx(float(row['dog']), rel=1e-4)
    one_line(capsys, evaluate.main([size, '16', '--scores', 's.csv']), '--scores')
    # Classes are matched by name: dog and the bird keep their numbers.
    loss = reports(capsys, size)[0]['test_loss']
    Path('photos/train/cat/0.png').unlink()             # other mean and deviation
    said = printed(capsys, size, '--json')
    assert json.loads(said.out)['test_loss'] == loss and 'warning' not in said.err
    shutil.copy('photos/val/cat/0.png', 'photos/val/cat/1.png')
    assert 'images have changed since its training' in printed(capsys, size).err
    for split in ('train', 'val'):
        shutil.move(f'photos/{split}/cat', f'{split}-cat')
    assert reports(capsys, size)[0]['test_n'] == 16
    for split in ('train', 'val'):
        shutil.move(f'{split}-cat', f'photos/{split}/zebra')
    one_line(capsys, evaluate.main([size, '--gpu', '-1']), 'zebra')
    shutil.move('photos', 'elsewhere')
    one_line(capsys, evaluate.main([size, '--gpu', '-1']), '--data_dir')
    one_line(capsys, evaluate.main([size, '--data_dir', 'elsewhere', '--gpu', '-1']), 'zebra')


def test_a_cell_goes_to_darts_and_comes_back(capsys):
    run(search.main, 's', *DARTS, *ONE_STEP)
    said = capsys.readouterr().out.splitlines()
    text, = [line for line in said if line.startswith('Genotype(')]
    assert text.startswith("Genotype(normal=(('") and 'normal_concat=(2, 3, 4, 5), red' in text
    text_of_log = f'2019-01-01 01:02:03 genotype = {text}'.replace(
        '(2, 3, 4, 5)', 'range(2,6)', 1).replace('(2, 3, 4, 5)', 'range(2, 6)')
    Path('cell.txt').write_text(text_of_log)
    assert find_genotype('cell.txt') == (find_genotype('s')[0], dict.fromkeys(
        ('data', 'seed', 'arch_data'), None) | {'method': 'cell'})
    run(retrain.main, 'net', '--arch', 'cell.txt', *RETRAIN[2:])
    capsys.readouterr()
    run(search.main, 'c', *TINY, *ONE_STEP)
    string = find_genotype('c')[0]
    assert string in capsys.readouterr().out.splitlines()
    for cell, words in {'s': text, 'net': text, 'c': string}.items():
        assert f'genotype                  {words}\n' in printed(capsys, cell).out
    for cell, words in {'cell.txt': text, string: string}.items():
        assert printed(capsys, '--arch', cell).out.startswith(words + '\n')
    counts, = reports(capsys, '--arch', 'DARTS_V2', '--plot', 'cell.svg')
    assert 'dil_conv_3x3' in Path('cell.svg').read_text() and counts['imagenet_params'] == 4718752


def test_a_test_keeps_its_pictures_if_others_come_or_go(capsys):
    folder_of_images('photos', n=20)
    for path in [*Path('photos').glob('*/*.png')]:      # each in a folder of its own
        path.with_suffix('').mkdir()
        shutil.move(path, path.with_suffix('') / path.name)
    flags = ['--arch', 'DARTS_V1', '--image_size', '8', *SIZES, '--batch_size', '4']
    run(retrain.main, 'net', *flags, '--data', 'photos')
    before, = reports(capsys, 'net')
    test = read('photos', {'image_size': 8}, 'test').files
    assert before['test_n'] == len(test) > 0
    run(retrain.main, 'other', *flags, '--data', 'photos', '--seed', '1', '--test_fraction', '0.5')
    *_, first, second = printed(capsys, 'net', 'other').out.splitlines()
    assert ' test_fraction=0.2 ' in first and ' test_fraction=0.5 ' in second
    for path in {*Path('photos').rglob('*.png')} - {*test}:
        path.unlink()                                   # its training pictures
    assert reports(capsys, 'net') == [before]
    test[0].unlink()
    assert reports(capsys, 'net')[0]['test_n'] == len(test) - 1
    folder_of_images('few')
    run(retrain.main, 'r', *flags, '--data', 'few', '--test_fraction', '0')
    assert 'test_n' not in reports(capsys, 'r')[0]
    shutil.rmtree('photos')
    said = printed(capsys, 'net', 'r')                          # with what the log has
    assert len(said.out.splitlines()) == 3 and 'from its log' in said.err
    assert evaluate.main(['net', 'r', '--data_dir', 'nowhere']) == 2
    said = capsys.readouterr()
    assert said.out.startswith('r\n') and 'net is left out' in said.err
