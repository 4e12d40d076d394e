"""The study's statistics on made-up data with known answers, its CSV, table and figure."""
import csv
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

import evaluate
import search
from genotypes import from_string, random_string, to_string, truth
from operations import NB201_OPERATIONS

import pytest

CELLS = [random_string(seed) for seed in range(400)]


def rows(method='darts', **arms):
    """Rows of a CSV: by arm (mean, deviation, n), or a list of percentiles."""
    out, rng = [], np.random.Generator(np.random.Philox(1))
    for arm, what in arms.items():
        if isinstance(what, tuple):
            mean, deviation, n = what
            z = rng.standard_normal(n)
            z = (z - z.mean()) / z.std(ddof=1) if n > 1 else z
            what = mean + deviation * z
        for seed, value in enumerate(what):
            out.append({'arm': arm.replace('_', ' '), 'method': method, 'percentile': float(value),
                        'genotype': CELLS[(seed * 7 + len(out)) % 400], 'collapsed': False,
                        'cifar10': 90.0, 'cifar100': 70.0, 'imagenet16': 40.0, 'seed': seed})
    return out


def line(found, arm, method='darts'):
    return next(x for x in found if x['arm'] == arm and x['method'] == method)


def test_equal_arms_are_equivalent():
    found = line(evaluate.compare(rows(cifar10=(90, 5, 16), noise=(90, 5, 16),
                                       no_data=(50, 5, 16))), 'noise')
    assert found['verdict'] == 'equivalent' and found['p'] > 0.9
    assert found['difference'] == pytest.approx(0)
    # Means of 16 with deviation 5: the difference has a standard error of 1.77.
    assert found['interval'] == pytest.approx([-3.4, 3.4], abs=0.4)
    assert found['power'][0] > 0.99 and found['power'][1] > 0.99


def test_three_points_apart_is_equivalent_or_undecided_by_the_spread():
    near = evaluate.compare(rows(cifar10=(90, 5, 16), noise=(87, 5, 16), no_data=(50, 5, 16)))
    assert line(near, 'noise')['verdict'] == 'equivalent'
    wide = line(evaluate.compare(rows(cifar10=(90, 25, 16), noise=(87, 25, 16),
                                      no_data=(50, 25, 16))), 'noise')
    assert wide['verdict'] == 'undecided' and wide['power'][1] < 0.3


def test_twenty_points_apart_is_worse_or_better():
    found = evaluate.compare(rows(cifar10=(70, 15, 16), noise=(50, 15, 16),
                                  generated=(90, 15, 16), no_data=(30, 15, 16)))
    assert line(found, 'noise')['verdict'] == 'worse'
    assert line(found, 'generated')['verdict'] == 'better'
    assert line(found, 'noise')['interval'][1] < 0 < line(found, 'generated')['interval'][0]


def test_a_collapsed_arm():
    """Where real data do well it is worse; where both collapse nothing is learned."""
    data = rows(cifar10=(90, 3, 16), noise=(5, 1, 16), no_data=(50, 10, 16))
    for row in data:
        row['collapsed'] = row['arm'] == 'noise'
    assert line(evaluate.compare(data), 'noise')['verdict'] == 'worse'
    assert line(evaluate.compare(data), 'noise')['collapsed'] == 1
    data = rows(cifar10=(5, 1, 16), noise=(5, 1, 16), no_data=(50, 10, 16))
    for row in data:
        row['collapsed'] = row['arm'] != 'no data'
    assert line(evaluate.compare(data), 'noise')['verdict'] == 'uninformative'


def test_both_pinned_to_one_cell_is_uninformative():
    data = rows(cifar10=[99.0] * 16, noise=[99.0] * 16, no_data=(50, 10, 16))
    for row in data:
        if row['arm'] != 'no data':
            row['genotype'] = CELLS[0]
    found = line(evaluate.compare(data), 'noise')
    assert found['verdict'] == 'uninformative' and found['interval'] == [0, 0]
    free = rows(cifar10=(95, 2, 16), noise=(95, 2, 16), no_data=(50, 10, 16))
    assert line(evaluate.compare(free), 'noise')['verdict'] == 'equivalent'
    without = evaluate.compare(rows(cifar10=(95, 2, 16), noise=(95, 2, 16)))
    assert line(without, 'noise')['verdict'] == 'undecided'         # no control without data
    same = evaluate.compare(rows(cifar10=(95, 2, 16), noise=(95, 2, 16), no_data=(95, 2, 16)))
    assert line(same, 'noise')['verdict'] == 'uninformative'        # the method's prior did it


def test_three_seeds_decide_nothing():
    found = line(evaluate.compare(rows(cifar10=(90, 1, 3), noise=(20, 1, 3))), 'noise')
    assert found['n'] == 3 and found['verdict'] == 'undecided' and found['p'] < 0.05
    one = evaluate.compare(rows(cifar10=[90.0], noise=[20.0]))
    assert line(one, 'noise')['verdict'] == 'undecided' and line(one, 'noise')['std'] is None


def test_holm_over_methods():
    assert evaluate.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert evaluate.holm([0.5, 0.9]) == [1.0, 1.0]
    one = rows(cifar10=(70, 20, 16), noise=(56, 20, 16), no_data=(30, 9, 16))
    alone = line(evaluate.compare(one), 'noise')
    more = [*one, *(row for method in evaluate.MAIN_METHODS[1:] for row in rows(
        method, cifar10=(70, 20, 16), noise=(70, 20, 16), no_data=(30, 9, 16)))]
    held = line(evaluate.compare(more), 'noise')
    assert alone['p'] == pytest.approx(0.057, abs=0.003) and held['p'] == pytest.approx(
        4 * alone['p'])


@pytest.mark.parametrize('t, df, p', [(2.228, 10, 0.975), (12.706, 1, 0.975), (-1.812, 10, 0.05),
                                      (0, 5, 0.5), (2.042, 30, 0.975)])
def test_students_distribution(t, df, p):
    assert evaluate.student(t, df) == pytest.approx(p, abs=3e-4)


def test_welch_by_hand():
    a, b = [1.0, 2, 3, 4], [2.0, 4, 6]
    # means 2.5 and 4, variances / n .41667 and 1.33333: t = -1.1339, df = 3.0625 / .... = 2.9308
    t = -1.5 / math.sqrt(5 / 12 + 4 / 3)
    df = (5 / 12 + 4 / 3) ** 2 / ((5 / 12) ** 2 / 3 + (4 / 3) ** 2 / 2)
    assert evaluate.greater(a, b) == pytest.approx(1 - evaluate.student(t, df))
    assert evaluate.greater(b, a) == pytest.approx(evaluate.student(t, df))
    assert evaluate.greater([60.0, 70, 80], 50) == pytest.approx(1 - evaluate.student(
        20 / math.sqrt(100 / 3), 2))


@pytest.mark.parametrize('p, df', [(0.975, 10), (0.05, 3.5), (0.9996, 30)])
def test_students_quantiles(p, df):
    assert evaluate.student(evaluate.student_quantile(p, df), df) == pytest.approx(p, abs=1e-6)


@pytest.mark.parametrize('deviation, n, tests', [(20, 16, 1), (10, 16, 6), (12, 8, 4)])
def test_power_is_that_of_simulated_studies(deviation, n, tests):
    rng = np.random.Generator(np.random.Philox(3))
    a = deviation * math.sqrt((n - 1) / n) * np.tile([-1.0, 1.0], n // 2)
    told, hits, draws = evaluate.power(a, a, tests), np.zeros(2), 500
    for _ in range(draws):
        x, y, z = (rng.normal(mean, deviation, n) for mean in (50, 70, 50))
        hits += (2 * min(evaluate.greater(x, y), evaluate.greater(y, x)) < 0.05 / tests,
                 max(evaluate.greater(x, z, -10), evaluate.greater(z, x, -10)) < 0.05 / tests)
    assert told == pytest.approx(hits / draws, abs=0.07)


@pytest.mark.parametrize('verdicts, answer', [
    (['equivalent', 'undecided'], 'no real data are needed'), (['better', 'uninformative'],
                                                             'no real data are needed'),
    (['worse', 'undecided'], 'real data are needed'), (['worse', 'better'], 'it depends'),
    (['uninformative'] * 2, 'uninformative'), (['uninformative', 'undecided'], 'undecided')])
def test_answers(verdicts, answer):
    lines = [{'arm': 'noise', 'method': m, 'verdict': v}
             for m, v in zip(evaluate.MAIN_METHODS, verdicts)]
    other = [{**lines[0], 'verdict': 'worse', **change} for change in (
        {'method': 'sdarts'}, {'arm': 'noise, alphas on train'}, {'arm': 'random_labels 0.5'})]
    found = evaluate.answers([*lines, *other])
    assert list(found) == ['noise'] and found['noise'].startswith(answer)


def test_controls_get_no_verdict_and_others_are_in_holms_family():
    data = rows(cifar10=(80, 9, 16), noise=(60, 9, 16), no_data=(1, 1, 16), no_steps=(50, 9, 16))
    alone = evaluate.compare(data)
    both = evaluate.compare(data + [row for m in ('sdarts', 'dartsminus') for row in rows(
        m, cifar10=(80, 9, 16), noise=(79, 9, 16), no_data=(1, 1, 16))])
    for arm in ('no data', 'no steps'):
        assert 'verdict' not in line(alone, arm)
    assert line(both, 'noise')['p'] == pytest.approx(3 * line(alone, 'noise')['p'])


def test_share_of_the_variance_between_arms():
    found = evaluate.explained(rows(cifar10=[80.0, 90.0], noise=[20.0, 30.0]))
    # total 4 * 925 = 3700, within 4 * 25 = 100
    assert found['darts'] == pytest.approx((3600 / 3700, 1 / 3))
    assert evaluate.explained(rows(cifar10=[80.0, 90.0])) == {}
    assert evaluate.explained(rows(cifar10=[80.0], noise=[20.0])) == {}
    others = {'no data': [1.0, 2.0], 'no steps': [3.0, 60.0],
              'noise, alphas on train': [5.0, 9.0], 'random_labels 0.5': [99.0, 1.0]}
    assert evaluate.explained(rows(cifar10=[80.0, 90.0], noise=[20.0, 30.0], **others)) == found


def test_seeds_over_the_largest_network():
    largest = truth(evaluate.NB201_LARGEST)['percentile']
    found = evaluate.compare(rows(noise=[99.9, largest, 10.0, largest + 0.01]))
    assert line(found, 'noise')['over_largest'] == 2


def test_pooled_over_the_methods_whose_search_on_real_data_finds_something():
    arms = {'cifar10': (80, 9, 16), 'no_data': (10, 9, 16)}
    data = [*rows(**arms, noise=(70, 9, 16)), *rows('pcdarts', **arms, noise=(84, 9, 16)),
            *rows('gdas', cifar10=(20, 9, 16), noise=(90, 9, 16), no_data=(10, 9, 16)),
            *rows('sdarts', **arms, noise=(10, 9, 16))]
    lines = evaluate.compare(data)
    methods, difference, interval = evaluate.pooled(data, lines)['noise']
    assert methods == ['darts', 'pcdarts'] and difference == pytest.approx(-3)
    # Standard error of a difference 9 sqrt(2 / 16) = 3.18, of the mean of two 2.25.
    assert interval == pytest.approx([-3 - 4.4, -3 + 4.4], abs=0.5)
    alone = [row for row in data if row['method'] == 'darts']
    lines = evaluate.compare(alone)
    assert evaluate.pooled(alone, lines)['noise'][1:] == (
        pytest.approx(-10), line(lines, 'noise')['interval'])


TINY = ['--space', 'nb201', '--num_images', '64', '--image_size', '8', '--cells_per_stage', '1',
        '--init_channels', '4', '--batch_size', '8', '--steps_per_epoch', '2', '--epochs', '2',
        '--gpu', '-1']


def test_csv_table_and_figure(capsys):
    runs = []
    for seed in (0, 1):
        for k, flags in enumerate((['--data', 'noise'], ['--data', 'noise', '--arch_data', 'train'],
                                   ['--data', 'noise', '--arch_data', 'none'],
                                   ['--method', 'random'], ['--max_steps', '0'],
                                   ['--data', 'generated'])):
            runs.append(f'r{seed}{k}')
            command = [*TINY, *flags, '--seed', str(seed), '--save', runs[-1]]
            assert search.main(command) == 0
            about = json.loads(Path(runs[-1], 'args.json').read_text())
            about['command'] = ' '.join(['python search.py', *command])     # not that of pytest
            Path(runs[-1], 'args.json').write_text(json.dumps(about))
    before = Path('r00/args.json').read_text()          # an unlike row leaves no lock behind
    Path('r00/args.json').write_text(before.replace('--save', '--epochs 9 --save'))
    assert evaluate.main([*runs, '--add', 's.csv']) == 2 and '--epochs' in capsys.readouterr().err
    assert not Path('s.csv').exists() and not list(Path().glob('.*.lock'))
    Path('r00/args.json').write_text(before)
    Path('unfinished').mkdir()
    Path('unfinished/args.json').write_text(Path(runs[0], 'args.json').read_text())
    assert evaluate.main([*runs[:5], runs[0], 'unfinished', '--add', 's.csv']) == 0
    assert 'not finished: unfinished' in capsys.readouterr().out
    Path('s.csv').write_text(Path('s.csv').read_text().rstrip('\n'))    # as an editor may leave it
    assert evaluate.main([*runs, '--add', 's.csv']) == 0            # those five stay as they are
    assert '7 searches added to the 5' in capsys.readouterr().out
    with open('s.csv', newline='') as file:
        table = list(csv.DictReader(file))
    assert len(table) == 12 and list(table[0]) == evaluate.STUDY
    assert [row['arm'] for row in table[:5]] == ['noise', 'noise, alphas on train', 'no data',
                                                 'random cell', 'no steps']
    for row in table:
        assert float(row['cifar10']) == truth(row['genotype'])['cifar10']
        searched = row['arm'] not in ('random cell', 'no steps')
        assert row['steps'] == ('4' if searched else '0')
        assert len(row['alphas'].split()) == (30 if searched else 0)
        if searched:        # the alphas as they were: the cell follows from them
            alphas = np.array(row['alphas'].split(), np.float32).reshape(6, 5)
            assert tuple(list(NB201_OPERATIONS)[k] for k in alphas.argmax(1)) == from_string(
                row['genotype'])
    assert evaluate.main(['unfinished', '--add', 'none.csv']) == 0
    assert not Path('none.csv').exists() and not list(Path().glob('.*.lock'))
    # Its stored command gives the same cell.
    command = table[1]['command'].split()[2:]
    assert search.main([*command[:-1], 'again']) == 0
    assert json.loads(Path('again/genotype.json').read_text())['arch_str'] == table[1]['genotype']
    capsys.readouterr()
    assert evaluate.main(['--study', 's.csv', '--plot', 'f.svg']) == 0
    out = capsys.readouterr().out
    assert '12 searches' in out and 'no data' in out and 'of the variance' in out
    tree = ElementTree.parse('f.svg').getroot()
    assert sum(node.tag.endswith('circle') for node in tree.iter()) == 12


def test_a_broken_csv(capsys):
    row = dict.fromkeys(evaluate.STUDY, '1') | {'genotype': CELLS[0], 'alphas': ''}

    def write(*changes):
        with open('s.csv', 'w', newline='') as file:
            writer = csv.DictWriter(file, evaluate.STUDY)
            writer.writeheader()
            writer.writerows({**row, **change} for change in changes)
        return evaluate.main(['--study', 's.csv'])

    assert write({}, {'seed': '2'}) == 0
    assert write(*({'seed': str(k), 'command': f'python search.py --seed {k} --epochs=50 --resume'
                    f' --checkpoint_minutes {k} --download'} for k in (1, 2))) == 0
    for changes in ([], [{'genotype': '|x|'}], [{'alphas': '1 2 3'}], [{'alphas': 'x'}],
                    [{'percentile': 'nan'}], [{'percentile': '101'}], [{'seconds': 'inf'}],
                    [{'cifar10': ''}], [{}, {}], [{'command': 'python x.py --name "'}],
                    [{}, {'seed': '2', 'command': 'python search.py --epochs 25'}]):
        assert write(*changes) == 2
        error = capsys.readouterr().err
        assert 's.csv' in error and error.count('\n') == 1
    text = Path('s.csv').read_text()
    for broken in (text.replace('alphas', 'alpha'), text.replace('arm,', ''), text + '1,2\n',
                   text.strip() + ',more\n', text + '"' + 'x' * 140000):
        Path('s.csv').write_text(broken)
        assert evaluate.main(['--study', 's.csv']) == 2
        assert capsys.readouterr().err.count('\n') == 1


def test_small_groups_do_not_count_in_holms_family():
    full = rows(cifar10=(90, 5, 16), noise=(80, 10, 16), no_data=(50, 5, 16))
    few = [row for method in evaluate.MAIN_METHODS[1:]
           for row in rows(method, cifar10=(90, 5, 2), noise=(80, 5, 2))]
    alone, beside = (line(evaluate.compare(part), 'noise') for part in (full, full + few))
    assert alone['p'] == beside['p'] and alone['verdict'] == beside['verdict'] == 'worse'
    pair = rows(cifar10=(90, 2, 16), noise=(90, 2, 16), no_data=(50, 5, 2))
    assert line(evaluate.compare(pair), 'noise')['verdict'] == 'undecided'      # two controls


def test_significant_but_within_the_margin_and_below_a_random_cell():
    near = rows(cifar10=(95, 1, 16), noise=(92, 1, 16), no_data=(50, 5, 16))
    found = line(evaluate.compare(near), 'noise')
    assert found['p'] < 1e-6 and found['verdict'] == 'equivalent'
    low = rows(cifar10=(5, 3, 16), noise=(30, 3, 16), no_data=(50, 5, 16))
    assert line(evaluate.compare(low), 'noise')['verdict'] == 'uninformative'


def test_alphas_on_train_are_compared_with_their_like():
    data = rows(cifar10=(90, 5, 16), no_data=(50, 5, 16))
    data += [dict(row, arm=f'{row["arm"]}, alphas on train') for row in
             rows(cifar10=(60, 5, 16), noise=(60, 5, 16))]
    assert line(evaluate.compare(data), 'noise, alphas on train')['difference'] == pytest.approx(0)
    alone = [row for row in data if row['arm'] != 'cifar10, alphas on train']
    assert line(evaluate.compare(alone), 'noise, alphas on train')['difference'] == \
        pytest.approx(-30)


@pytest.mark.parametrize('flags, words', [
    (['--study', 'no.csv'], 'no.csv is missing'), (['typo', '--add', 'new.csv'], 'typo'),
    (['--study', 'bad.csv'], 'bad.csv: no study'),
    (['run', '--study', 'bad.csv'], 'leave out run'), (['--add', 'no/s.csv'], '--add no/s.csv'),
    (['--study', 'bad.csv', '--json'], '--json does nothing'),
    (['--add', 'new.csv', '--plot', 'p.svg'], '--plot does nothing')])
def test_what_cannot_be(flags, words, capsys):
    Path('bad.csv').write_text('a,b\n1,2\n')
    assert evaluate.main(flags) == 2
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1


def test_label_noise_and_real_data_are_arms_of_their_own():
    settings = {'generator': 'fractal', 'difficulty': 'medium', 'method': 'darts',
                'max_steps': None, 'arch_data': 'valid', 'data': 'random_labels',
                'label_noise': 0.5}
    assert evaluate.arm_of(settings) == 'random_labels 0.5'
    assert evaluate.arm_of({**settings, 'label_noise': 1.0}) == 'random_labels'
    assert evaluate.arm_of({**settings, 'data': 'cifar10'}) == 'cifar10'
    made = {**settings, 'data': 'generated'}
    assert evaluate.arm_of(made) == 'generated'
    assert evaluate.arm_of({**made, 'difficulty': 'hard'}) == 'generated fractal hard'
    assert to_string(['none'] * 6) in evaluate.nas_bench_201()[0]
