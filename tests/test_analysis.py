"""Look-ups, agreement and plots: of made-up runs with known answers, and of real ones."""
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import torch

import evaluate
import retrain
import search
from genotypes import PUBLISHED, plain, to_json, to_string, truth

from test_data import folder_of_images

import pytest


def made_up(run, method, data, arch, alphas, seed=0, space='nb201', arch_data='valid'):
    """A folder of a search that ended in a genotype and some alphas."""
    Path(run).mkdir(parents=True)
    settings = {'method': method, 'data': data, 'space': space, 'seed': seed,
                'arch_data': arch_data}
    Path(run, 'args.json').write_text(json.dumps(
        {'settings': settings, 'hardware': {'device': 'cpu'}, 'date': '2026-01-01'}))
    Path(run, 'genotype.json').write_text(to_json(
        arch, method=method, data=data, seed=seed, arch_data=arch_data))
    kinds = ['cell'] if space == 'nb201' else ['normal', 'reduce']
    log = [{'epoch': e, 'genotype': plain(arch), 'seconds': 1.5, 'entropy_cell': 1.6 - e,
            'skips_cell': e, 'alphas': dict.fromkeys(kinds, alphas)} for e in range(2)]
    if space == 'nb201':
        for line in log:
            line['truth_for_analysis_only'] = truth(arch)
    Path(run, 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in log))
    return run


SKIPS, CONVS, POINTS = (to_string([name] * 6) for name in (
    'skip_connect', 'nor_conv_3x3', 'nor_conv_1x1'))


def test_report_of_a_known_cell(capsys):
    made_up('skips', 'darts', 'noise', SKIPS, [[0.0] * 5] * 6)
    assert evaluate.main(['skips', '--json']) == 0
    row = json.loads(capsys.readouterr().out)
    assert row['cifar10'] == pytest.approx(54.30, abs=0.01) and row['rank'] == 15231
    assert row['to_optimum'] == pytest.approx([54.30 - 94.37, 15.61 - 73.51, 16.32 - 47.31],
                                              abs=0.02)
    assert row['to_median'] == pytest.approx([54.30 - 90.75, 15.61 - 65.29, 16.32 - 36.39],
                                             abs=0.02)
    assert row['to_largest'] == pytest.approx([54.30 - 93.76, 15.61 - 71.11, 16.32 - 41.44],
                                              abs=0.02)
    assert row['collapsed'] and row['skips'] == 6 and row['nones'] == 0 and 'log' not in row
    assert evaluate.main(['skips']) == 0
    out = capsys.readouterr().out
    assert '54.30%' in out and '15,231' in out and '-40.08' in out


def test_table_averages_true_accuracies(capsys):
    for k, arch in enumerate((SKIPS, CONVS, POINTS)):
        made_up(f'a{k}', 'darts', 'noise', arch, [[0.0] * 5] * 6, k)
    made_up('t', 'darts', 'noise', CONVS, [[0.0] * 5] * 6, arch_data='train')
    assert evaluate.main(['a0', 'a1', 'a2', 't', '--csv', 't.csv']) == 0
    out = capsys.readouterr().out
    values = [truth(arch)['cifar10'] for arch in (SKIPS, CONVS, POINTS)]
    mean, std, _ = evaluate.mean_std_interval(values)
    assert f'{mean:.2f} ± {std:.2f}' in out and f'median {sorted(values)[1]:.2f}' in out
    head, line, *_ = out[out.index('for analysis only'):].splitlines()[1:]
    assert head.endswith('n  epoch 1  epoch 2')
    assert line.split() == ['noise', 'darts', 'valid', '3', f'{mean:.2f}', f'{mean:.2f}']
    rows = [line.split(',') for line in Path('t.csv').read_text().splitlines()]
    first, second = (dict(zip(rows[0], row)) for row in rows[1:])
    assert (first['n'], first['collapsed'], first['arch_data']) == ('3', '1', 'valid')
    assert float(first['cifar10']) == pytest.approx(mean) and second['arch_data'] == 'train'


def test_agreement_within_and_between():
    """Data that determine everything, seeds that change half of the edges."""
    def alphas(names):
        return [[3.0 * (name == other) for other in search.NB201.operations] for name in names]

    half = ['nor_conv_3x3'] * 3 + ['avg_pool_3x3'] * 3
    kinds = {'noise': (['skip_connect'] * 6, ['skip_connect'] * 6),
             'cifar10': (['nor_conv_3x3'] * 6, half)}
    rows = []
    for data, cells in kinds.items():
        for seed, names in enumerate(cells):
            run = made_up(f'{data}{seed}', 'darts', data, to_string(names), alphas(names), seed)
            rows.append(evaluate.report(run))
    found = {line['pairs']: line for line in evaluate.agreements(rows)}
    same, other = found['same method, same data (seeds)'], found['same method, other data']
    assert same['n'] == 2 and same['genotypes'] == pytest.approx((1 + 0.5) / 2)
    assert other['n'] == 4 and other['genotypes'] == 0 and other['alphas'] == pytest.approx(-0.25)
    assert same['alphas'] == pytest.approx((1 + 0.375) / 2)
    assert 'other method, same data' not in found
    rows.append(evaluate.report(made_up('g', 'gdas', 'noise', SKIPS, alphas(kinds['noise'][0]))))
    found = {line['pairs']: line for line in evaluate.agreements(rows)}
    assert found['other method, same data']['n'] == 2
    assert found['other method, same data']['genotypes'] == 1
    rows.append(evaluate.report(made_up('d', 'darts', 'noise', PUBLISHED['DARTS_V1'],
                                        [[0.0] * 8] * 14, space='darts')))
    assert {line['pairs']: line for line in evaluate.agreements(rows)} == found     # other space


def test_plot_of_what_had_no_alphas(capsys):
    assert search.main(['--method', 'random', '--save', 'r']) == 0
    assert evaluate.main(['r', '--plot', 'p.svg']) == 2
    assert '--plot: nothing to draw' in capsys.readouterr().err and not Path('p.svg').exists()


def test_plot_of_searches():
    made_up('a', 'darts', 'noise', SKIPS, [[0.0] * 5] * 6)
    made_up('b', 'gdas', 'cifar10', CONVS, [[0.0] * 5] * 6)
    assert evaluate.main(['a', 'b', '--plot', 'p.svg']) == 0
    tree = ElementTree.parse('p.svg').getroot()
    lines = [node for node in tree.iter() if node.tag.endswith('polyline')]
    texts = [node.text for node in tree.iter() if node.tag.endswith('text')]
    assert len(lines) == 6 and {'darts on noise', 'gdas on cifar10'} <= set(texts)
    spots = [[float(v) for v in spot.split(',')] for spot in lines[0].get('points').split()]
    assert spots[0] == [64, 34] and spots[1] == [694, 254]      # entropy falls from top to bottom


@pytest.mark.parametrize('low, high', [(0, 1), (1.6090, 1.6094), (-3, 250), (5, 5.001)])
def test_ticks(low, high):
    marks = evaluate.ticks(low, high)
    assert 2 <= len(marks) <= 8 and all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)


@pytest.mark.parametrize('flags, words', [
    (['a', '--plot', 'no/p.svg'], '--plot no/p.svg'),
    (['--cost', '--arch', '|none~0|'], '--arch'),
    (['--cost', '--arch', CONVS, '--layers', '6'], '--layers 6')])
def test_what_cannot_be(flags, words, capsys):
    made_up('a', 'darts', 'noise', SKIPS, [[0.0] * 5] * 6)
    assert evaluate.main(flags) == 2
    error = capsys.readouterr().err
    assert words in error and 'Traceback' not in error


def test_a_string_is_an_architecture(capsys):
    assert evaluate.main(['--cost', '--arch', CONVS, '--json']) == 0
    assert json.loads(capsys.readouterr().out)['params'] == 1531546


TINY = ['--num_images', '64', '--image_size', '8', '--batch_size', '8', '--steps_per_epoch', '3',
        '--epochs', '2', '--gpu', '-1']


def test_search_and_retrain_in_nas_bench_201():
    assert search.main([*TINY, '--space', 'nb201', '--cells_per_stage', '1', '--save', 's']) == 0
    for data in ('noise', 'generated'):
        assert retrain.main([*TINY, '--arch', 's', '--data', data, '--layers', '5',
                             '--init_channels', '4', '--save', data]) == 0
    settings = json.loads(Path('noise/args.json').read_text())['settings']
    assert settings['nesterov'] and settings['learning_rate'] == 0.1
    assert settings['weight_decay'] == 5e-4 and settings['drop_path_prob'] == 0
    network, meta = evaluate.load_weights('noise/weights.pt')
    assert meta['genotype'] == json.loads(Path('s/genotype.json').read_text())['arch_str']
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_what_was_not_the_same_search_or_data_is_told_apart(capsys):
    """No steps, another order and label noise are names of their own in tables."""
    space = ['--space', 'nb201', '--cells_per_stage', '1']
    assert search.main([*TINY, *space, '--max_steps', '0', '--save', 's']) == 0
    assert json.loads(Path('s/genotype.json').read_text())['method'] == 'darts, no steps'
    folder_of_images('photos', n=16)
    assert retrain.main([*TINY[2:], '--arch', 's', '--data', 'random_labels', '--source', 'photos',
                         '--label_noise', '0.5', '--layers', '5', '--init_channels', '4',
                         '--save', 'n']) == 0
    capsys.readouterr()
    assert evaluate.main(['--json', 'n']) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row['data'], row['method']) == ('random_labels 0.5', 'darts, no steps')
    # Seeds are averaged, and other settings too, but not without a word.
    for k, width in enumerate(('8', '8', '4')):
        assert search.main([*TINY, *space, '--seed', str(k), '--init_channels', width,
                            '--save', f's{k}']) == 0
    capsys.readouterr()
    assert evaluate.main(['s0', 's1']) == 0 and 'averaged' not in capsys.readouterr().err
    assert evaluate.main(['s0', 's1', 's2']) == 0
    assert capsys.readouterr().err.strip() == \
        'search nb201 noise darts valid: averaged over runs that differ in init_channels'


def test_what_comes_next_has_the_settings(capsys):
    def after(*flags):
        """The line that a search of no steps ends with."""
        assert search.main([*flags, '--image_size', '16', '--batch_size', '8', '--max_steps', '0',
                            '--init_channels', '4', '--gpu', '-1', '--save', 'next']) == 0
        shutil.rmtree('next')
        return capsys.readouterr().out.splitlines()[-1]
    folder_of_images('photos', n=16)
    assert after('--data', 'photos') == \
        'next: python retrain.py --arch next --data photos --image_size 16 --gpu 0'
    assert after('--data', 'noise', '--num_images', '64', '--data_dir', 'sets') == \
        'next: python retrain.py --arch next --data cifar10 --auxiliary --cutout ' \
        '--data_dir sets --gpu 0'
    made = str(next(Path('data').glob('noise-*')))
    assert after('--data', made, '--preset', 'laptop', '--steps_per_epoch', '3') == \
        'next: python retrain.py --arch next --data cifar10 --preset laptop --gpu 0'


def test_recipe_of_the_benchmark():
    args = retrain.parse(['--arch', CONVS])
    assert (args.epochs, args.batch_size, args.learning_rate, args.learning_rate_min) == \
        (200, 256, 0.1, 0)
    assert (args.init_channels, args.layers, args.nesterov, args.weight_decay) == \
        (16, 17, True, 5e-4)
    assert retrain.parse(['--arch', CONVS, '--data', 'imagenet']).epochs == 250
    assert retrain.parse(['--arch', 'DARTS_V1']).epochs == 600
