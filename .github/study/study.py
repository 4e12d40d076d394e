"""The first study, "does architecture search need real data?": its tables and its figure.

    python .github/study/study.py                           # tables, from nb201.csv
    python .github/study/study.py --plot nb201.svg          # and the figure, PNG or SVG
    python .github/study/study.py --csv my.csv --add RUN... # append finished searches
    python .github/study/study.py --fit fit.jsonl           # how well cells fit what they are given

Needs scipy, and matplotlib for --plot. README.md beside this file has the question, the arms
and the rules.
"""
import argparse
import csv
import fcntl
import json
import sys
from pathlib import Path

import numpy as np

try:
    from scipy import special, stats
except ImportError:
    sys.exit('study.py needs scipy: pip install scipy')

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))             # the scripts of the repository
from genotypes import NB201_LARGEST, agreement, nas_bench_201, truth  # noqa: E402

MARGIN = 10.0               # percentile points within which two arms count as equal
LEVEL = 0.05                # of every test
ENOUGH = 8                  # seeds of an arm, of real data and of no data, for a verdict
RANDOM = 50.0               # percentile of a random cell, on average
REAL, UNREAL = 'cifar10', ['random_labels', 'generated', 'noise']
NO_DATA, TRAIN = 'no data', ', alphas on train'
CONTROLS = [NO_DATA, 'no steps', 'random cell']
HELD_OUT = [REAL, *UNREAL]                              # arms that differ in their data alone
FRACTALS = 'fractal', 'medium'                          # the generator of the study, its difficulty
ARMS = [REAL, *UNREAL, 'random_labels 0.5', REAL + TRAIN, 'random_labels' + TRAIN,
        'noise' + TRAIN, *CONTROLS]
MAIN_METHODS = ['darts', 'pcdarts', 'gdas', 'betadarts']
METHODS = [*MAIN_METHODS, 'dartsminus', 'sdarts', 'random']
ACCURACIES = ['cifar10', 'cifar100', 'imagenet16']
COLUMNS = ['command', 'commit', 'arm', 'method', 'arch_data', 'seed', 'genotype', *ACCURACIES,
           'percentile', 'skips', 'nones', 'entropy', 'signal', 'steps', 'seconds', 'alphas']


# ---------------------------------------------------------------------------------------------
# The CSV: a row for each search


def read_rows(path):
    """Return {(method, arm): rows}, in the order of ARMS; arms of one seed are left out."""
    def place(key):
        method, arm = key
        return [*METHODS, method].index(method), method, [*ARMS, arm].index(arm)

    if not Path(path).exists():
        sys.exit(f'{path} is missing. Make it with --add.')
    arms = {}
    with open(path, newline='') as file:
        for row in csv.DictReader(file):
            for key in (*ACCURACIES, 'percentile', 'skips', 'nones', 'seconds'):
                row[key] = float(row[key])
            row['collapsed'] = row['skips'] + row['nones'] >= 4
            arms.setdefault((row['method'], row['arm']), []).append(row)
    ordered = {}
    for key in sorted(arms, key=place):
        if len(arms[key]) > 1:
            ordered[key] = sorted(arms[key], key=lambda row: int(row['seed']))
    return ordered


def arm_of(settings):
    """Return the arm of the study that a search belongs to, by its settings."""
    if settings['method'] == 'random':
        return 'random cell'
    if settings.get('max_steps') == 0:
        return 'no steps'
    if settings['arch_data'] == 'none':
        return NO_DATA
    arm = settings['data']
    if arm == 'random_labels' and settings['label_noise'] < 1:
        arm += f' {settings["label_noise"]:g}'
    if arm == 'generated' and (settings['generator'], settings['difficulty']) != FRACTALS:
        arm += f' {settings["generator"]} {settings["difficulty"]}'
    return arm + TRAIN if settings['arch_data'] == 'train' else arm


def row_of(run):
    """Return the CSV's row of a search that evaluate.read_run has read."""
    last = run['log'][-1] if run['log'] else {}
    alphas = np.ravel(last.get('alphas', {}).get('cell', []))
    row = {key: run[key] for key in COLUMNS if key in run}
    row.update(commit=run['git_commit'], arm=arm_of(run['settings']),
               method=run['method'].removesuffix(', no steps'), seconds=round(run['seconds'], 1),
               steps=sum(line.get('steps', 0) for line in run['log']),
               alphas=' '.join(f'{alpha:.9g}' for alpha in alphas))     # all of a float32
    for name in ('entropy', 'signal'):
        value = last.get(f'{name}_cell')
        row[name] = None if value is None else f'{value:.4g}'
    return row


def add_runs(path, folders):
    """Append finished searches to the CSV, or start it; write nothing if a seed is there twice."""
    from evaluate import read_run
    with open(path, 'a+', newline='') as file:
        fcntl.flock(file, fcntl.LOCK_EX)                # one writer at a time
        file.seek(0)
        text = file.read()
        known, new = {}, []
        for row in csv.DictReader(text.splitlines()):
            known[row['method'], row['arm'], row['seed']] = row['command']
        for run in map(read_run, folders):
            if run['type'] != 'search' or run['settings'].get('space') != 'nb201':
                sys.exit(f'{run["run"]} is no search of --space nb201. Leave it out.')
            if not run['finished']:
                print(f'{run["run"]} is not finished, so it was left out')
                continue
            row = row_of(run)
            key = row['method'], row['arm'], str(row['seed'])
            if key not in known:
                known[key] = row['command']
                new.append(row)
            elif known[key] != row['command']:
                sys.exit(f'{run["run"]}: {path} or another run has seed {key[2]} of {key[0]} on '
                         f'{key[1]}. Leave one of the two out.')
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        if not text:
            writer.writeheader()
        elif not text.endswith('\n'):                   # as an editor may leave it
            file.write('\n')
        writer.writerows(new)
    print(f'{len(new)} searches added to {path}')


# ---------------------------------------------------------------------------------------------
# Statistics. A contrast is (estimate, standard error, degrees of freedom): of two means, or of any
# weighted sum of means.


def welch(*terms):
    """Return the contrast of (weight, sample) pairs, by Welch and Satterthwaite.

    A sample of one value is a known number.
    """
    estimate, variance, square = 0.0, 0.0, 0.0
    for weight, sample in terms:
        n = len(sample)
        estimate += weight * np.mean(sample)
        if n > 1:
            part = weight ** 2 * np.var(sample, ddof=1) / n
            variance += part
            square += part ** 2 / (n - 1)
    if variance < 1e-20:                                # but for rounding, no spread at all
        return estimate, 0.0, np.inf
    return estimate, variance ** 0.5, variance ** 2 / square


def p_greater(estimate, error, df, by=0.0):
    """Return the one-sided p of a contrast that is more than a number."""
    if error == 0:
        return 0.0 if estimate - by > 1e-9 else 1.0
    return stats.t.sf((estimate - by) / error, df)


def p_different(estimate, error, df):
    """Return the two-sided p of a contrast that is not 0."""
    return min(1.0, 2 * p_greater(abs(estimate), error, df))


def p_equivalent(estimate, error, df, margin=MARGIN):
    """Return the p of two one-sided tests (TOST) that a contrast is within the margin."""
    return p_greater(-abs(estimate), error, df, -margin)


def bootstrap(*pairs):
    """Return the 95% interval of mean(a) - mean(b), or of its mean over several pairs."""
    rng = np.random.Generator(np.random.Philox(0))
    total = 0
    for pair in pairs:
        for sign, sample in zip((1, -1), map(np.asarray, pair)):
            draws = rng.integers(0, len(sample), (10000, len(sample)))
            total = total + sign * sample[draws].mean(1)
    return np.percentile(total / len(pairs), [2.5, 97.5])


def holm(p):
    """Return Holm's corrected p-values of a family of tests."""
    order = np.argsort(p)
    steps = np.asarray(p)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected


def power(error, df, tests, difference=20.0, margin=MARGIN):
    """Return the chances to find such a difference, and to find equal arms equivalent.

    The level is 5% / tests, the strictest of Holm's correction. Student's distribution is shifted
    by the difference; simulated studies have up to .03 more.
    """
    if error == 0:
        return 1.0, 1.0
    t, level = stats.t(df), LEVEL / tests
    two_sided, shift = t.isf(level / 2), difference / error
    return (t.sf(two_sided - shift) + t.sf(two_sided + shift),
            max(0.0, 2 * t.cdf(margin / error - t.isf(level)) - 1))


# ---------------------------------------------------------------------------------------------
# Verdicts and answers, by the rules of the protocol


def percentiles(arms, method, arm):
    return [row['percentile'] for row in arms.get((method, arm), [])]


def compare(arms):
    """Return {(method, arm): its line: measures, tests, and next to real data a verdict}."""
    lines = {}
    largest = truth(NB201_LARGEST)['percentile']
    for (method, arm), rows in arms.items():
        mine, none = percentiles(arms, method, arm), percentiles(arms, method, NO_DATA)
        line = lines[method, arm] = {
            'n': len(mine), 'mean': np.mean(mine), 'median': np.median(mine),
            'std': np.std(mine, ddof=1), 'from_random': bootstrap((mine, [RANDOM])),
            'over_random': p_greater(*welch((1, mine), (-1, [RANDOM]))),
            'collapsed': np.mean([row['collapsed'] for row in rows]),
            'over_largest': sum(value > largest for value in mine),
            'cells': len({row['genotype'] for row in rows})}
        if none and arm != NO_DATA:
            line['over_no_data'] = p_greater(*welch((1, mine), (-1, none)))
        like = REAL + TRAIN if arm.endswith(TRAIN) and (method, REAL + TRAIN) in arms else REAL
        real = percentiles(arms, method, like)
        if real and arm not in (like, *CONTROLS):
            contrast = welch((1, mine), (-1, real))
            line.update(real=like, difference=contrast[0], interval=bootstrap((mine, real)),
                        contrast=contrast, verdict='undecided', p=p_different(*contrast),
                        p_equivalent=p_equivalent(*contrast),
                        enough=min(len(mine), len(real), len(none)) >= ENOUGH)
    for name in dict.fromkeys(arm for _, arm in arms):
        judge(arms, lines, [(method, arm) for method, arm in arms
                            if arm == name and lines[method, arm].get('enough')])
    return lines


def judge(arms, lines, family):
    """Correct the tests of one arm's methods by Holm, then add each verdict and power."""
    for name in ('p', 'p_equivalent'):
        for key, p in zip(family, holm([lines[key][name] for key in family])):
            lines[key][name] = p
    for key in family:
        line, real = lines[key], (key[0], lines[key]['real'])
        stuck = is_pinned(arms[key]) or is_pinned(arms[real])
        line['verdict'] = verdict(line, lines[real], stuck)
        line['power'] = power(*line['contrast'][1:], len(family))


def beats_controls(line):
    """Return whether an arm is better than a random cell and than no data."""
    return max(line['over_random'], line.get('over_no_data', 1)) < LEVEL


def is_pinned(rows):
    """Return whether 80% of the seeds ended in one cell, or most in a collapsed one."""
    cells = [row['genotype'] for row in rows]
    most = max(map(cells.count, cells))
    return most >= 0.8 * len(cells) or np.mean([row['collapsed'] for row in rows]) > 0.5


def verdict(line, real, stuck):
    """Return the verdict on an arm with enough seeds; real: the line of real data."""
    worse = line['difference'] < 0
    higher = real if worse else line
    if line['p'] < LEVEL <= line['p_equivalent'] and higher['over_random'] < LEVEL:
        return 'worse' if worse else 'better'
    if stuck or not (beats_controls(line) and beats_controls(real)):
        return 'uninformative'
    return 'equivalent' if line['p_equivalent'] < LEVEL else 'undecided'


def answer(lines, arm):
    """Return what the verdicts of the main methods on a kind of data come to."""
    verdicts = {lines.get((method, arm), {}).get('verdict', 'undecided')
                for method in MAIN_METHODS}
    if verdicts & {'equivalent', 'better'}:
        return 'it depends on the method' if 'worse' in verdicts else 'no real data are needed'
    if 'worse' in verdicts:
        return 'real data are needed'
    return 'uninformative' if verdicts == {'uninformative'} else 'undecided'


def sound_methods(lines, arm=REAL):
    """Return the main methods that beat a random cell and no data on an arm."""
    return [method for method in MAIN_METHODS
            if (method, arm) in lines and beats_controls(lines[method, arm])]


def pooled(arms, lines, arm):
    """Return the mean difference from real data over the methods that are sound on them.

    Returns (methods, difference, 95% interval).
    """
    methods, pairs = [], []
    for method, name in lines:
        real = lines[method, name].get('real')
        if name == arm and real and method in sound_methods(lines, real):
            methods.append(method)
            pairs.append((percentiles(arms, method, arm), percentiles(arms, method, real)))
    if not pairs:
        return [], None, None
    return methods, np.mean([lines[m, arm]['difference'] for m in methods]), bootstrap(*pairs)


def explained(arms, method):
    """Return the share of a method's variance between kinds of data (eta squared), and by chance.

    The kinds are real data and the three unreal ones, alphas held out. None if only one is there.
    """
    samples = [percentiles(arms, method, arm) for arm in HELD_OUT if (method, arm) in arms]
    if len(samples) < 2:
        return None
    values = np.concatenate(samples)
    between = sum(len(v) * (np.mean(v) - values.mean()) ** 2 for v in samples)
    return between / ((values - values.mean()) ** 2).sum(), (len(samples) - 1) / (len(values) - 1)


def agreements(arms, methods):
    """Return {which pairs: (number, share of equal operations, correlation of probabilities)}.

    The pairs are searches with a method or a kind of data in common, alphas held out. Other data
    are also other images.
    """
    rows, found = [], {}
    for (method, arm), members in arms.items():
        if method in methods and arm in HELD_OUT:
            rows += members
    vectors = [operation_probabilities(row) for row in rows]
    for k, a in enumerate(rows):
        for j, b in enumerate(rows[:k]):
            same = a['method'] == b['method'], a['arm'] == b['arm']
            if any(same):
                alike = vectors[k] @ vectors[j]
                found.setdefault(same, []).append((agreement(a['genotype'], b['genotype']), alike))
    names = {(True, True): 'same method, same data (seeds)',
             (True, False): 'same method, other data', (False, True): 'other method, same data'}
    return {name: (len(found[same]), *np.nanmean(found[same], 0)) for same, name in names.items()
            if same in found}


def operation_probabilities(row):
    """Return the softmax of a row's alphas, less its mean and at length 1; nan without spread."""
    p = special.softmax(np.array(row['alphas'].split(), float).reshape(-1, 5), 1).ravel()
    if p.size == 0 or np.ptp(p) < 1e-12:
        return np.full(30, np.nan)
    p -= p.mean()
    return p / np.linalg.norm(p)


# ---------------------------------------------------------------------------------------------
# Tables of the study

DIFFERENCE = '{:+.1f} [{:+.1f}, {:+.1f}]'


def print_table(rows):
    """Print lists of texts as a table of Markdown; the first is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in [rows[0], ['-' * width for width in widths], *rows[1:]]:
        print('| ' + ' | '.join(map(str.ljust, row, widths)) + ' |')


def fill(form, *values):
    """Return the format with its values, or a dash if one is missing."""
    return '-' if None in values else form.format(*values)


def main_table(lines):
    """Return the texts of the table that README.md shows."""
    table = [['method', 'arm', 'n', 'percentile', 'from real [95%]', 'from random [95%]',
              'verdict', 'collapsed', 'over largest', 'cells']]
    for (method, arm), line in lines.items():
        table.append([
            method, arm, str(line['n']), f'{line["mean"]:.1f} ± {line["std"]:.1f}',
            fill(DIFFERENCE, line.get('difference'), *line.get('interval', [None, None])),
            DIFFERENCE.format(line['mean'] - RANDOM, *line['from_random']),
            line.get('verdict', '-'), f'{line["collapsed"]:.0%}', str(line['over_largest']),
            str(line['cells'])])
    return table


def second_table(arms, lines):
    """Return the texts of the table of accuracies, and of the tests behind the verdicts."""
    table = [['method', 'arm', 'n', 'median percentile', 'CIFAR-10 %', 'CIFAR-100 %',
              'ImageNet16 %', 'p over random', 'p over no data', 'p different', 'p equivalent',
              'power: 20 points', 'equality']]
    for (method, arm), line in lines.items():
        row = [method, arm, str(line['n']), f'{line["median"]:.1f}']
        for name in ACCURACIES:
            values = [search[name] for search in arms[method, arm]]
            row.append(f'{np.mean(values):.2f} ({np.median(values):.2f})')
        for name in ('over_random', 'over_no_data', 'p', 'p_equivalent'):
            p = line.get(name)
            row.append('<.001' if p is not None and p < 0.001 else fill('{:.3f}', p))
        row += [fill('{:.2f}', chance) for chance in line.get('power', (None, None))]
        table.append(row)
    return table


def print_study(arms):
    """Print the tables of the study, the answers, and what describes them."""
    lines = compare(arms)
    print(f'Percentile of the found cell among the {len(nas_bench_201()[0]):,} of NAS-Bench-201 '
          'by CIFAR-10 test accuracy')
    print_table(main_table(lines))
    print('\nTrue test accuracies, mean (median), and p-values. Those of difference and '
          "equivalence are Holm's if power is given.")
    print_table(second_table(arms, lines))
    print('\nCollapsed: 4 or more of 6 edges skip or none (17.9% of all cells). Over largest: '
          'seeds\nwhose cell is better than the largest network, which is at '
          f'{truth(NB201_LARGEST)["percentile"]:.1f}.')
    seconds = [row['seconds'] for rows in arms.values() for row in rows]
    print(f'{len(seconds)} searches, {sum(seconds) / 3600:.1f} hours of them')
    for arm in UNREAL:
        print(f'{arm}: {answer(lines, arm)}')
    for arm in dict.fromkeys(arm for _, arm in arms):
        methods, difference, interval = pooled(arms, lines, arm)
        if methods:
            print(f'{arm}: mean difference from real data over {", ".join(methods)} '
                  + DIFFERENCE.format(difference, *interval))
    for method in dict.fromkeys(method for method, _ in arms):
        shares = explained(arms, method)
        if shares:
            print(f'{method}: {shares[0]:.0%} of the variance of the percentile lies between '
                  f'kinds of data, alphas held out (by chance {shares[1]:.0%})')
    for methods in (MAIN_METHODS, sound_methods(lines)):
        for pairs, (n, genotypes, alphas) in agreements(arms, methods).items():
            print(f'{", ".join(methods)}, {pairs}: {n} pairs, genotypes agree in '
                  f'{genotypes:.2f} of the edges, probabilities correlate by {alphas:+.2f}')


# ---------------------------------------------------------------------------------------------
# Expressivity: cells trained on each kind of data, a line of evaluate.py --json for each training

KNOWN = 'CIFAR-10, by NAS-Bench-201'                    # a test error that is looked up
FITS = ['fit_loss', 'fit_accuracy', 'train_area']


def mean_text(values, scale=1, digits=2):
    """Return mean ± standard deviation [95% t-interval] as text."""
    mean, std, n = np.mean(values) * scale, np.std(values, ddof=1) * scale, len(values)
    reach = stats.t.ppf(0.975, n - 1) * std / n ** 0.5
    return f'{mean:.{digits}f} ± {std:.{digits}f} ' \
           f'[{mean - reach:.{digits}f}, {mean + reach:.{digits}f}]'


def fit_table(rows):
    """Return the texts of a table of fits and test errors, by where the cells come from."""
    groups, together = {}, {}
    for row in rows:
        origin, where = row['searched_on'] or '-', (row['arch_data'] or '-', row['data'])
        groups.setdefault((origin, row['method'], *where), []).append(row)
        if row['searched_on']:
            together.setdefault((origin, 'all', *where), []).append(row)
    table = [['architecture from', 'method', 'alphas on', 'trained on', 'n', 'loss', 'accuracy %',
              'area under the training curve %', 'test error %', 'train - test, points']]
    for key, members in (groups | together).items():
        loss = [row['fit_loss'] for row in members]
        accuracy = [row['fit_accuracy'] for row in members]
        area = [row['train_area'] for row in members]
        line = [*key, str(len(members)), mean_text(loss, 1, 3), mean_text(accuracy, 100),
                mean_text(area, 100), '-', '-']
        if members[0]['test_error'] is not None:
            line[-2] = mean_text([row['test_error'] for row in members])
            line[-1] = mean_text([100 * row['fit_accuracy'] - row['top1'] for row in members])
        table.append(line)
    return table


def correlation_table(rows):
    """Return the texts of a table of rank correlations with the test error, over cells."""
    cells, kinds = {}, list(dict.fromkeys(row['data'] for row in rows))
    for row in rows:
        cells.setdefault(row['genotype'], []).append(row)
    known = [100 - truth(genotype)['cifar10'] for genotype in cells]
    size = cell_means(cells, 'params')
    own = cell_means(cells, 'test_error', REAL)
    table = [['measure', 'trained on', 'test error on', 'n', 'correlation', 'given params']]
    for tested_on, error in ((REAL, own), (KNOWN, known)):
        measures = [(kind, name, cell_means(cells, name, kind)) for kind in kinds for name in FITS]
        measures.append(('-', 'params', size))
        if tested_on == KNOWN:
            measures.append((REAL, 'test_error', own))
        for kind, name, values in measures:
            r, low, high = spearman(values, error)
            partial = None if name == 'params' else partial_spearman(values, error, size)
            table.append([name, kind, tested_on, str(len(cells)),
                          f'{r:+.2f} [{low:+.2f}, {high:+.2f}]', fill('{:+.2f}', partial)])
    return table


def cell_means(cells, measure, data=None):
    """Return a list: the mean of each cell's trainings on some data, or on all."""
    means = []
    for rows in cells.values():
        means.append(np.mean([row[measure] for row in rows if data in (None, row['data'])]))
    return means


def spearman(x, y):
    """Return the rank correlation and its 95% interval (Bonett and Wright 2000)."""
    value = stats.spearmanr(x, y).statistic
    reach = 1.96 * np.sqrt((1 + value ** 2 / 2) / (len(x) - 3))
    return value, np.tanh(np.arctanh(value) - reach), np.tanh(np.arctanh(value) + reach)


def partial_spearman(x, y, z):
    """Return the rank correlation of x and y if z is held."""
    r = stats.spearmanr(np.transpose([x, y, z])).statistic
    return (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))


def print_fit(path):
    """Print how well cells fit what they are given, their test errors, and rank correlations."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    print('Fit to the data of the training, and test error on real data')
    print_table(fit_table(rows))
    print('\nRank correlation with the test error, over different cells')
    print_table(correlation_table(rows))


# ---------------------------------------------------------------------------------------------
# Figure


def draw_study(arms, path):
    """Draw a panel for each method and a dot for each search; PNG or SVG by the file's name."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        sys.exit('--plot needs matplotlib: pip install matplotlib')
    plt.rcParams.update({'font.size': 9, 'svg.hashsalt': 'study', 'svg.fonttype': 'none'})
    methods = list(dict.fromkeys(method for method, _ in arms))
    rows = len(methods) // 2 + 1                        # at least one place is left to the legend
    figure, axes = plt.subplots(rows, 2, figsize=(11, 2.75 * rows), squeeze=False)
    for axis in axes.flat[len(methods):]:
        axis.axis('off')
    for axis, method in zip(axes.flat, methods):
        draw_method(axis, method, arms)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc='lower right',
                  title='A dot is a seed (n): percentile of its cell\namong all of NAS-Bench-201')
    plt.tight_layout()
    plt.savefig(path, dpi=120, metadata={'Date': None} if str(path).endswith('.svg') else None)


def draw_method(axis, method, arms):
    """Draw the arms of one method: dots, mean and interval, and the lines to compare with."""
    names = []
    for arm in [arm for name, arm in arms if name == method]:
        found, y = percentiles(arms, method, arm), len(names)
        names.append(f'{arm} ({len(found)})')
        colour = f'C{ARMS.index(arm)}' if arm in ARMS[:10] else 'gray'
        heights = y + np.where(np.arange(len(found)) % 2, 0.15, -0.15)
        axis.plot(found, heights, '.', color=colour, alpha=0.6, ms=7, mew=0)
        reach = RANDOM + bootstrap((found, [RANDOM]))
        axis.plot(reach, [y, y], 'k-', lw=1.5, label='95% interval' if y == 0 else None)
        axis.plot(np.mean(found), y, 'k|', ms=13, mew=2, label='mean' if y == 0 else None)
    largest = truth(NB201_LARGEST)['percentile']
    for value, style, label in ((RANDOM, '--', 'random cell (50)'), (100, '-', 'best cell (100)'),
                                (largest, ':', f'largest network ({largest:.1f})')):
        axis.axvline(value, color='gray', ls=style, lw=1, label=label, zorder=0)
    axis.set_title(method, loc='left', weight='bold')
    axis.set(yticks=range(len(names)), yticklabels=names, xlim=(-2, 102),
             ylim=(max(5, len(names)) - 0.5, -0.5))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--csv', metavar='FILE', default=HERE / 'nb201.csv', help='rows to read')
    parser.add_argument('--add', nargs='+', metavar='RUN', help='append finished searches')
    parser.add_argument('--plot', metavar='FILE', help='draw the figure, PNG or SVG')
    parser.add_argument('--fit', metavar='FILE', help='tables of trained cells, from JSON lines')
    args = parser.parse_args()
    if args.add:
        add_runs(args.csv, args.add)
    elif args.fit:
        print_fit(args.fit)
    else:
        arms = read_rows(args.csv)
        print_study(arms)
        if args.plot:
            draw_study(arms, args.plot)


if __name__ == '__main__':
    main()
