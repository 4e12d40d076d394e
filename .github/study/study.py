"""The second study, "does architecture search need real data?": commands, rows, tests, figure.

    python .github/study/study.py                       # all tables and answers, from the rows
    python .github/study/study.py --plot study.svg      # and the figure, as SVG or PNG
    python .github/study/study.py --power               # the chances of each answer, simulated
    python .github/study/study.py --commands B | xargs -P 2 -I{} sh -c '{}'     # make the runs
    python .github/study/study.py --add runs/study-*    # append those that ended to the rows

It needs scipy, and matplotlib for --plot. README.md beside this file has the protocol.
scoring.csv: a row for each run of parts B and C and each of its scores. gradient.csv: a row for
each search of part A. nb201.csv and fit.jsonl: the rows of the first study.
"""
import argparse
import csv
import fcntl
import json
import math
import sys
from functools import cache
from operator import itemgetter
from pathlib import Path

import numpy as np

try:
    from scipy import special, stats
except ImportError:
    sys.exit('study.py needs scipy: pip install scipy')

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))             # the scripts of the repository
from genotypes import (NB201_LARGEST, distinct_cells, from_string, nas_bench_201,  # noqa: E402
                       truth)
from operations import NB201_OPERATIONS  # noqa: E402

REAL, UNREAL = 'cifar10', ['random_labels', 'generated', 'noise']
KINDS = [REAL, *UNREAL]
METHODS = ['darts', 'pcdarts', 'betadarts']     # that beat a random cell in the first study
SCORES = ['train_loss', 'valid_loss', 'valid_accuracy', 'angle']       # of oneshot; primary first
LEVEL = 0.05                    # of every test
MARGIN_B = 0.05                 # of rank correlations
MARGINS_A = 4.5, 7.0            # of E2; 7 of E2 are about 10 percentile points
PLACEMENT = 10.0                # points within which placements are equal
NEAR_CHANCE = 0.15              # accuracy on the training images, chosen when Bdose was known
CONTROL_OF = {'A3': 'A1', 'A4': 'A1', 'A2b': 'A2'}      # parts, less which those are told


# ---------------------------------------------------------------------------------------------
# Runs. A run's folder is runs/study-PART-ARM-METHOD-SEED. `@` in an arm stands before the number
# of images, if it is not that of the part.

SMALL = '--space nb201 --cells_per_stage 1 --image_size 16 --init_channels 8'    # for one-shot
FIRST = '--preset laptop --init_channels 8 --batch_size 32'                       # first study
ALPHAS = f'{FIRST} --augment none'


def data_flags(kind, images=None):
    """Flags for a kind of data; of an unreal set not more is drawn than is needed."""
    if kind in ('generated', 'noise') and images:
        return f'--data {kind} --num_images {2 * images}'
    return f'--data {kind}'


def oneshot(kind, images, more='', score='train_loss'):
    """Flags of a one-shot search of about 8,000 steps of 64 on so many images."""
    epochs = math.ceil(8000 / (images // 64))
    return f'{data_flags(kind, images)} {SMALL} --learning_rate 0.1 --augment none --score ' \
           f'{score} --train_portion {images} --epochs {epochs}{more}'


def parts():
    """{part: [(arm, methods, seeds, flags)]}, in the order of the work."""
    dose = []
    for n in (250, 4000, 16000):                # a set of random labels may have 256 images
        more = f' --steps_per_epoch {n // 64}'
        dose += [(f'{kind}@{n}', ['oneshot'], range(8), oneshot(kind, n, more)) for kind in KINDS]
    frozen = '--learning_rate 0 --learning_rate_min 0'
    few = f'{ALPHAS} --train_portion 640'
    training_free = ['naswot', 'snip']
    return {
        'C': [*[(kind, training_free, range(3), f'{data_flags(kind, 1000)} --preset laptop')
                for kind in (REAL, 'cifar100', 'generated', 'noise')],
              ('random_labels', ['snip'], range(3), '--data random_labels --preset laptop'),
              ('ones', ['synflow'], range(3), f'{data_flags("noise", 1000)} --preset laptop')],
        'B': [(kind, ['oneshot'], range(24), oneshot(kind, 1000)) for kind in KINDS],
        'Bdose': [*dose, ('half_random', ['oneshot'], range(8),
                          oneshot('random_labels', 1000, ' --label_noise 0.5'))],
        'Bbest': [('cifar10@25000', ['oneshot'], range(24),
                   oneshot(REAL, 25000, score='valid_accuracy')),
                  ('cifar100@5000', ['oneshot'], range(12), oneshot('cifar100', 5000)),
                  ('generated_fresh', ['oneshot'], range(12),
                   oneshot('generated', 2000, ' --fresh 4')),
                  ('noise_fresh', ['oneshot'], range(8), oneshot('noise', 2000, ' --fresh'))],
        'A0': [(REAL, ['darts'], range(16), f'--data {REAL} {FIRST}')],
        'A1': [(kind, METHODS, range(16, 80), f'--data {kind} {ALPHAS}') for kind in KINDS],
        'A3': [(kind, METHODS, range(80, 104), f'--data {kind} {ALPHAS} {frozen}')
               for kind in (REAL, 'noise')],
        'A2': [(kind, METHODS, range(104, 128), f'{data_flags(kind, 640)} {few} --arch_data train')
               for kind in KINDS],
        'A2b': [(kind, METHODS, range(104, 120), f'--data {kind} {few} --valid_fraction 0.0128')
                for kind in (REAL, 'noise')],                           # 640 of 50,000
        'A4': [(kind, ['darts'], range(80, 96), f'--data {kind} {ALPHAS} --steps_per_epoch 100')
               for kind in (REAL, 'noise')]}


def runs(part):
    """[(seed, arm, method, flags)] of a part, seed by seed."""
    out = []
    for arm, methods, seeds, flags in parts()[part]:
        for method in methods:
            out += [(seed, arm, method, flags) for seed in seeds]
    return sorted(out, key=itemgetter(0))


def commands(part):
    """The commands of a part."""
    return [f'OMP_NUM_THREADS=1 python search.py --gpu -1 --resume --method {method} --seed {seed} '
            f'{flags} --save runs/study-{part}-{arm}-{method}-{seed}'
            for seed, arm, method, flags in runs(part)]


# ---------------------------------------------------------------------------------------------
# Rows


@cache
def space():
    """(accuracies, percentiles) of all cells, (5,) * 6 by operation of each edge."""
    names = list(NB201_OPERATIONS)
    accuracy = np.empty((5,) * 6)
    for cell, row in nas_bench_201()[0].items():
        accuracy[tuple(names.index(name) for name in from_string(cell))] = row['cifar10']
    return accuracy, (stats.rankdata(accuracy) - 0.5).reshape(accuracy.shape) / accuracy.size * 100


def soft_percentile(alphas):
    """E2: expected percentile of a cell that draws its operations from softmax(2 z).

    z (6, 5): alphas, centred by edge, by their standard deviation over all 30.
    """
    z = alphas - alphas.mean(1, keepdims=True)
    expected = space()[1]
    for p in special.softmax(2 * z / z.std(), 1):
        expected = np.tensordot(p, expected, 1)
    return float(expected)


@cache
def same_operations():
    """{sorted operations: percentiles of all cells that have them}."""
    groups = {}
    for index, percentile in np.ndenumerate(space()[1]):
        groups.setdefault(tuple(sorted(index)), []).append(percentile)
    return {key: np.array(values) for key, values in groups.items()}


def place(genotype):
    """(percentile, mean percentile with shuffled edges, percentile among the shuffled or NaN)."""
    names = list(NB201_OPERATIONS)
    index = tuple(names.index(name) for name in from_string(genotype))
    mine, like = space()[1][index], same_operations()[tuple(sorted(index))]
    among = 100 * ((like < mine).mean() + (like == mine).mean() / 2)
    return mine, like.mean(), among if len(like) >= 8 else math.nan


def read_rows(name):
    """Rows of a CSV beside this file, numbers as floats; none if it is not there yet."""
    rows = []
    if (HERE / name).exists():
        with open(HERE / name, newline='') as file:
            rows = list(csv.DictReader(file))
    for row in rows:
        for key, value in row.items():
            if key not in ('part', 'arm', 'method', 'score', 'genotype', 'alphas', 'commit',
                           'processor', 'command', 'arch_data'):
                row[key] = float(value) if value else math.nan
        if row.get('genotype'):
            row['percentile'], row['shuffled'], row['placement'] = place(row['genotype'])
        if row.get('alphas'):
            row['e2'] = soft_percentile(np.array(row['alphas'].split(), float).reshape(6, 5))
    return rows


def rows_of(run):
    """(file, rows) of a search that evaluate.read_run has read."""
    _, part, arm, method, seed = Path(run['run']).name.split('-')
    training = [line for line in run['log'] if 'cells' not in line]
    about = json.loads(Path(run['run'], 'args.json').read_text())
    row = {'part': part, 'arm': arm, 'method': method, 'seed': seed, 'genotype': run['genotype'],
           'steps': sum(line['steps'] for line in training),
           'seconds': round(run['seconds'], 1), 'commit': run['git_commit'],
           'processor': f'{about["hardware"]["cpu"]} {about["hardware"]["instructions"]}'}
    if 'score' not in run:
        last = run['log'][-1]
        alphas = ' '.join(f'{alpha:.9g}' for alpha in np.ravel(last['alphas']['cell']))
        return 'gradient.csv', [{**row, 'fit': f'{last["train_accuracy"]:.4f}',
                                 'alphas': alphas}]
    row['fit'] = f'{training[-1]["train_accuracy"]:.4f}' if training else ''
    return 'scoring.csv', [{**row, 'score': score, 'genotype': run['genotype']
                            if score == run['score'] else '', **ranking(run['run'], score)}
                           for score in (SCORES if method == 'oneshot' else [run['score']])]


def ranking(folder, score):
    """What a run's scores are worth, as texts for its row."""
    from evaluate import read_cell_scores, spearman
    columns, _ = read_cell_scores(folder)
    value, true, params = columns[score], columns['cifar10'], columns['cell_params']
    rng, draws = np.random.Generator(np.random.Philox(0)), []
    for _ in range(200):
        rows = rng.integers(0, len(true), len(true))
        draws.append(spearman(value[rows], true[rows]))
    rho, better_half, best, ten_best = worth(value, true)
    numbers = {'rho': rho, 'rho_error': np.std(draws, ddof=1),
               'given_params': spearman(value, true, params), 'better_half': better_half,
               'best': best, 'ten_best': ten_best}
    return {name: f'{number:.4f}' for name, number in numbers.items()}


def worth(value, true):
    """(rank correlation, within the better half; percentiles of the best cell, of the ten best).

    Of equal cells it is the mean.
    """
    from evaluate import spearman
    ordered = np.array(nas_bench_201()[1])
    percentile = 50 * (np.searchsorted(ordered, true) + np.searchsorted(ordered, true, 'right')) \
        / len(ordered)
    better, tenth = true >= np.median(true), np.sort(value)[-10]
    above, equal = percentile[value > tenth], percentile[value == tenth]
    ten_best = (above.sum() + (10 - len(above)) * equal.mean()) / 10
    return spearman(value, true), spearman(value[better], true[better]), \
        percentile[value == value.max()].mean(), ten_best


def add_runs(folders):
    """Append finished runs to their CSV files; those that are in them already are left out."""
    from evaluate import read_run
    for run in map(read_run, folders):
        if not run['finished']:
            print(f'{run["run"]} is not finished, so it is left out')
            continue
        name, new = rows_of(run)
        with open(HERE / name, 'a+', newline='') as file:
            fcntl.flock(file, fcntl.LOCK_EX)            # one writer at a time
            file.seek(0)
            key_of = itemgetter('part', 'arm', 'method', 'seed')
            known = set(map(key_of, csv.DictReader(file)))
            writer = csv.DictWriter(file, list(new[0]), lineterminator='\n')
            if not known:
                writer.writeheader()
            if key_of(new[0]) not in known:
                writer.writerows(new)


def sample(rows, outcome, part, arm, method=None, score=None):
    """Values of an outcome in the rows of an arm."""
    return np.array([row[outcome] for row in rows if row['part'] == part and row['arm'] == arm
                     and method in (None, row['method']) and score in (None, row.get('score'))])


def complete(rows, part):
    """Whether all runs of a part are in the rows."""
    known = {(row['seed'], row['arm'], row['method']) for row in rows if row['part'] == part}
    return known == {run[:3] for run in runs(part)}


# ---------------------------------------------------------------------------------------------
# Statistics. A contrast is (estimate, standard error, degrees of freedom).


def contrast(*pairs):
    """Mean over pairs (a, b) of samples of mean(a) - mean(b), by Welch and Satterthwaite."""
    estimate, variance, square = 0.0, 0.0, 0.0
    for sign, samples in ((1, [a for a, _ in pairs]), (-1, [b for _, b in pairs])):
        for values in samples:
            estimate += sign * np.mean(values) / len(pairs)
            if len(values) > 1:
                part = np.var(values, ddof=1) / len(values) / len(pairs) ** 2
                variance += part
                square += part ** 2 / (len(values) - 1)
    if not math.isfinite(estimate):
        raise ValueError('a sample is empty, or a value is not known')
    return estimate, math.sqrt(variance), variance ** 2 / square if square else math.inf


def interval(estimate, error, df):
    """The 95% interval of a contrast."""
    reach = stats.t.isf(LEVEL / 2, df) * error
    return estimate - reach, estimate + reach


def p_different(estimate, error, df):
    """Two-sided p of a contrast that is not 0."""
    if error == 0:
        return float(estimate == 0)
    return 2 * stats.t.sf(abs(estimate) / error, df)


def p_greater(estimate, error, df):
    """One-sided p of a contrast above 0."""
    return stats.t.sf(estimate / error, df) if error else float(estimate <= 0)


def p_equivalent(estimate, error, df, margin):
    """The p of two one-sided tests that a contrast is within the margin."""
    return p_greater(margin - abs(estimate), error, df)


def holm(p):
    """{name: p} -> {name: Holm's corrected p}."""
    out, largest = {}, 0.0
    for k, name in enumerate(sorted(p, key=p.get)):
        largest = out[name] = max(largest, min(1.0, p[name] * (len(p) - k)))
    return out


def heterogeneity(contrasts):
    """The p of Cochran's Q: that contrasts differ from one another."""
    estimates, errors, _ = map(np.array, zip(*contrasts))
    weights = 1 / errors ** 2
    q = (weights * (estimates - (weights * estimates).sum() / weights.sum()) ** 2).sum()
    return stats.chi2.sf(q, len(estimates) - 1)


# ---------------------------------------------------------------------------------------------
# Answers by the rules of the protocol


def answers_b(rho, given_params):
    """{unreal kind: (answer, contrast of rho, contrast given parameters)}, of {kind: values}."""
    found = {kind: (contrast((rho[kind], rho[REAL])),
                    contrast((given_params[kind], given_params[REAL]))) for kind in UNREAL}
    equal, worse = {}, {}
    for kind, pair in found.items():
        equal[kind] = max(p_equivalent(*c, MARGIN_B) for c in pair)
        for k, c in enumerate(pair):
            worse[kind, k] = p_different(*c) if c[0] < 0 else 1.0
    equal, worse = holm(equal), holm(worse)
    out = {}
    for kind, pair in found.items():
        answer, is_lower = 'undecided', min(worse[kind, 0], worse[kind, 1]) < LEVEL
        if equal[kind] < LEVEL:
            answer = 'not needed, but lower' if is_lower else 'not needed'
        elif is_lower:
            answer = 'needed'
        out[kind] = answer, *pair
    return out


def answers_a(e2, placement):
    """{unreal kind: (answer, contrast of E2)}; both are {(method, kind): values}."""
    found, equal = {}, {margin: {} for margin in MARGINS_A}
    for kind in UNREAL:
        c = found[kind] = contrast(*[(e2[m, kind], e2[m, REAL]) for m in METHODS])
        for margin, p in equal.items():
            p[kind] = p_equivalent(*c, margin)
    worse = holm({kind: p_different(*c) if c[0] < 0 else 1.0 for kind, c in found.items()})
    equal = {margin: holm(p) for margin, p in equal.items()}
    placed = [m for m in METHODS if len(placement[m, REAL]) > 1]
    places = placed and p_greater(*contrast(*[(placement[m, REAL], [50.0]) for m in placed]))
    out = {}
    for kind, c in found.items():
        margin = next((m for m in MARGINS_A if equal[m][kind] < LEVEL), None)
        single = {m: contrast((e2[m, kind], e2[m, REAL])) for m in METHODS}
        losers = holm({m: p_different(*s) if s[0] < 0 else 1.0 for m, s in single.items()})
        losers = [m for m in METHODS if losers[m] < LEVEL]
        both = [m for m in placed if len(placement[m, kind]) > 1]
        moved = both and contrast(*[(placement[m, kind], placement[m, REAL]) for m in both])
        if margin is None:
            answer = 'needed' if worse[kind] < LEVEL else 'undecided'
        elif losers and heterogeneity(list(single.values())) < LEVEL:
            answer = f'depends: {" and ".join(losers)} worse'
        elif not placed or places >= LEVEL:     # real data do not say where operations belong
            answer = 'not shown that data teach where operations belong'
        elif both and p_equivalent(*moved, PLACEMENT) < LEVEL:
            lower = ', but lower' if worse[kind] < LEVEL else ''
            answer = f'not needed, within {margin} of E2{lower}'
        else:
            answer = 'undecided'
        out[kind] = answer, c
    return out


def gates(rows, part, largest):
    """{what real data are compared with: contrast} of the searches on CIFAR-10 in a part of A."""
    methods = [m for m in METHODS if len(sample(rows, 'e2', part, REAL, m))]

    def real(name):
        return [sample(rows, name, part, REAL, m) for m in methods]

    pairs = zip(real('percentile'), real('shuffled'))
    out = {'a random cell, E2': contrast(*[(values, [50.0]) for values in real('e2')]),
           'shuffled edges, percentile': contrast(*[(a - b, [0.0]) for a, b in pairs]),
           'the largest network, percentile': contrast(*[(values, [largest])
                                                         for values in real('percentile')])}
    placed = [values[np.isfinite(values)] for values in real('placement')]
    placed = [(values, [50.0]) for values in placed if len(values) > 1]
    if placed:
        out['chance, placement'] = contrast(*placed)
    if part == 'A1' and complete(rows, 'A3'):
        frozen = [sample(rows, 'e2', 'A3', REAL, m) for m in methods]
        out['frozen weights, E2'] = contrast(*zip(real('e2'), frozen))
    return out


# ---------------------------------------------------------------------------------------------
# Tables


def print_table(rows):
    """Print lists of texts as a table of Markdown; the first is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in [rows[0], ['-' * width for width in widths], *rows[1:]]:
        print('| ' + ' | '.join(map(str.ljust, row, widths)) + ' |')
    print()


def spread(values, digits=3):
    """Mean ± standard deviation as text, without values that are not known."""
    values = values[np.isfinite(values)] if len(values) else values
    if not len(values):
        return '-'
    deviation = f' ± {np.std(values, ddof=1):.{digits}f}' if len(values) > 1 else ''
    return f'{np.mean(values):.{digits}f}{deviation}'


def difference(c, digits=3):
    low, high = interval(*c)
    return f'{c[0]:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]'


def print_scoring(rows, part):
    """Table of a part of scoring, and for B its answers."""
    arms = list(dict.fromkeys((row['arm'], row['method'], row['score']) for row in rows
                              if row['part'] == part))
    table = [['data', 'method', 'score', 'n', 'rank correlation', 'given parameters',
              'better half', 'best cell', 'ten best', 'fit', 'seconds']]
    for arm, method, score in arms:
        cells = [spread(sample(rows, name, part, arm, method, score), digits) for name, digits in
                 (('rho', 3), ('given_params', 3), ('better_half', 3), ('best', 1),
                  ('ten_best', 1), ('fit', 3), ('seconds', 0))]
        n = len(sample(rows, 'rho', part, arm, method, score))
        table.append([arm, method, score, str(n), *cells])
    print_table(table)
    if part == 'Bdose':
        dots = [row for row in rows if row['part'] in ('B', part) and row['score'] == SCORES[0]]
        for some in (dots, [row for row in dots if row['fit'] > NEAR_CHANCE]):
            print(f'Rank correlations of fit, over {len(some)} supernets of B and Bdose, with')
            for name in ('rho', 'given_params'):
                r = stats.spearmanr([row['fit'] for row in some], [row[name] for row in some])
                print(f'{name} {r.statistic:.2f}')
    if part == 'Bbest' and complete(rows, 'B'):
        real = sample(rows, 'rho', part, 'cifar10@25000', score='valid_accuracy')
        others = {kind: sample(rows, 'rho', 'B', kind, score=SCORES[0]) for kind in UNREAL}
        others['generated_fresh'] = sample(rows, 'rho', part, 'generated_fresh', score=SCORES[0])
        found = {kind: contrast((values, real)) for kind, values in others.items()}
        p = holm({kind: p_different(*c) for kind, c in found.items()})
        for kind, c in found.items():
            print(f'{kind} less real data at their best: {difference(c)}, p {p[kind]:.3f}')
    if part == 'B':
        rho, given_params = {}, {}
        for kind in KINDS:
            rho[kind] = sample(rows, 'rho', 'B', kind, score=SCORES[0])
            given_params[kind] = sample(rows, 'given_params', 'B', kind, score=SCORES[0])
        for kind, (answer, c, partial) in answers_b(rho, given_params).items():
            print(f'{kind}: {answer}; rank correlation from real {difference(c)}, given '
                  f'parameters {difference(partial)}')
            for name in ('better_half', 'best', 'ten_best'):
                both = [sample(rows, name, 'B', k, score=SCORES[0]) for k in (kind, REAL)]
                print(f'    {name} from real {difference(contrast(both))}')
        print()


def print_gradient(rows, part):
    """Table of a part of searches by gradient; where it has all kinds of data, its answers."""
    arms = list(dict.fromkeys(row['arm'] for row in rows if row['part'] == part))
    methods = [m for m in METHODS if len(sample(rows, 'e2', part, REAL, m))]
    table = [['data', 'n', 'percentile', 'shuffled', 'placement', 'E2', 'from real: E2',
              'from real: percentile', 'methods differ, p']]
    for arm in arms:
        pooled = {name: sample(rows, name, part, arm) for name in
                  ('percentile', 'shuffled', 'placement', 'e2')}
        line = [arm, str(len(pooled['e2'])), *(spread(values, 1) for values in pooled.values())]
        single = {}
        for name in ('e2', 'percentile'):
            single[name] = [(sample(rows, name, part, arm, m), sample(rows, name, part, REAL, m))
                            for m in methods]
            line.append('-' if arm == REAL else difference(contrast(*single[name]), 1))
        p = heterogeneity([contrast(pair) for pair in single['e2']]) if len(methods) > 1 else 1
        table.append([*line, '-' if arm == REAL else f'{p:.3f}'])
    print_table(table)
    if part == 'A0':
        before = sample(first_study(), 'e2', 'held out', REAL, 'darts')
        c = contrast((sample(rows, 'e2', part, REAL), before))
        print(f'E2 less that of the first study: {difference(c, 1)}')
    for name, c in gates(rows, part, truth(NB201_LARGEST)['percentile']).items():
        print(f'{REAL} less {name}: {difference(c, 1)}')
    processors = sorted({row.get('processor', '') for row in rows if row['part'] == part})
    print_control(rows, part, arms, methods, processors)
    if len(methods) > 1:
        print_methods(rows, part, [kind for kind in KINDS if kind in arms])
    if set(KINDS) <= set(arms):
        print_answers(rows, part)
    for processor in processors if len(processors) > 1 else []:
        own = [row for row in rows if row.get('processor', '') == processor]
        if min(len(sample(own, 'e2', part, kind, m)) for kind in arms for m in methods) > 1:
            print(f'{sum(row["part"] == part for row in own)} rows of {processor} alone:')
            print_gradient(own, part)
    print()


def print_control(rows, part, arms, methods, processors):
    """Print E2 of a part's control less that of the part, of all rows and of its processors."""
    other = CONTROL_OF.get(part)
    if not other or not complete(rows, other):
        return
    same = [row for row in rows if row.get('processor', '') in processors]
    for some, words in ((rows, ''), (same, f' ({" and ".join(processors)})')):
        for kind in arms if some is rows or len(same) < len(rows) else []:
            pairs = [(sample(some, 'e2', other, kind, m), sample(some, 'e2', part, kind, m))
                     for m in methods]
            single = [f'{m} {difference(contrast(pair), 1)}' for m, pair in zip(methods, pairs)]
            print(f'{kind}, E2 of {other}{words} less that of {part}: '
                  f'{difference(contrast(*pairs), 1)}: {", ".join(single)}')


def print_answers(rows, part):
    """The answer for each unreal kind in a part of searches by gradient."""
    for kind, (answer, c) in answers_a(*by_method(rows, part)).items():
        print(f'{kind}: {answer}; E2 from real {difference(c, 1)}')
    print()


def print_methods(rows, part, kinds):
    """Table of a part of searches by gradient, a line for each kind of data and method."""
    largest = truth(NB201_LARGEST)['percentile']
    table = [['data', 'method', 'n', 'percentile', 'placement', 'E2', 'from real: E2',
              'from real: percentile', 'above the largest']]
    for kind in kinds:
        for method in METHODS:
            values = {name: sample(rows, name, part, kind, method) for name in
                      ('percentile', 'placement', 'e2')}
            line = [kind, method, str(len(values['e2'])),
                    *(spread(numbers, 1) for numbers in values.values())]
            for name in ('e2', 'percentile'):
                c = contrast((values[name], sample(rows, name, part, REAL, method)))
                line.append('-' if kind == REAL else difference(c, 1))
            table.append([*line, str((values['percentile'] > largest).sum())])
    print_table(table)


def by_method(rows, part):
    """({(method, kind): E2}, {(method, kind): placements that are known}) of a part."""
    e2, placement = {}, {}
    for method in METHODS:
        for kind in KINDS:
            e2[method, kind] = sample(rows, 'e2', part, kind, method)
            values = sample(rows, 'placement', part, kind, method)
            placement[method, kind] = values[np.isfinite(values)]
    return e2, placement


def first_study():
    """Rows of the first study as those of two parts of A: `held out` and `alphas on train`."""
    rows = []
    for row in read_rows('nb201.csv'):
        arm, _, train = row['arm'].partition(', ')
        if row['method'] in METHODS and arm in KINDS:
            rows.append({**row, 'arm': arm, 'part': train or 'held out'})
    return rows


def print_no_search():
    """What takes no search; returns percentile of the best of 100, rank correlation of all."""
    accuracy, percentile = space()
    params = np.array([row['params'] for row in nas_bench_201()[0].values()], float)
    rank = np.array([truth(cell)['percentile'] for cell in nas_bench_201()[0]])
    draws = np.random.Generator(np.random.Philox(0)).integers(0, len(rank), (10000, 100))
    best = rank[draws[np.arange(10000), params[draws].argmax(1)]].mean()
    print(f'largest network: percentile {truth(NB201_LARGEST)["percentile"]:.1f}, '
          f'{truth(NB201_LARGEST)["cifar10"]:.2f}%; best of 100 cells by parameters: {best:.1f}; '
          f'random cell: percentile and E2 {percentile.mean():.1f}; optimum: {accuracy.max():.2f}%')
    cells = [nas_bench_201()[0][cell] for cell in distinct_cells()]
    numbers = worth(*np.array([[row['params'], row['cifar10']] for row in cells], float).T)
    print('{} distinct cells by parameters: rank correlation {:.3f}, better half {:.3f}, best cell '
          '{:.1f}, ten best {:.1f}\n'.format(len(cells), *numbers))
    return best, numbers[0]


def print_expressivity():
    """How cells of the first study fit what they are given, and what goes with their worth."""
    from evaluate import spearman
    rows = [json.loads(line) for line in (HERE / 'fit.jsonl').read_text().splitlines()]
    cells = {}
    for row in rows:
        cells.setdefault(row['genotype'], {})[row['data']] = row
    error = [100 - truth(cell)['cifar10'] for cell in cells]
    params = [next(iter(fits.values()))['params'] for fits in cells.values()]
    table = [['trained on', 'found cells: accuracy %', 'random cells: accuracy %',
              'loss with true error', 'given parameters']]
    for data in dict.fromkeys(row['data'] for row in rows):
        mine = [row for row in rows if row['data'] == data]     # a random cell was found on none
        found = [100 * row['fit_accuracy'] for row in mine if row['searched_on']]
        drawn = [100 * row['fit_accuracy'] for row in mine if not row['searched_on']]
        loss = [fits[data]['fit_loss'] for fits in cells.values()]
        table.append([data, spread(np.array(found), 1), spread(np.array(drawn), 1),
                      f'{spearman(loss, error):+.2f}', f'{spearman(loss, error, params):+.2f}'])
    print(f'Expressivity: {len(cells)} cells, 20 epochs on 2,000 images. Parameters with the true '
          f'error: {stats.spearmanr(params, error).statistic:+.2f}')
    print_table(table)


def print_study():
    print_no_search()
    scoring, gradient = read_rows('scoring.csv'), read_rows('gradient.csv')
    for part in parts():
        by_gradient = part.startswith('A')
        rows, show = (gradient, print_gradient) if by_gradient else (scoring, print_scoring)
        print(f'## Part {part}' + ('' if complete(rows, part) else ': not run'))
        if complete(rows, part):
            show(rows, part)
    first = first_study()
    for part in ('held out', 'alphas on train'):
        print(f'## First study, {part}')
        print_gradient(first, part)
    print_expressivity()


# ---------------------------------------------------------------------------------------------
# Power, by simulation


def print_power(repeats=2000):
    """Chances of each answer: A from the first study's rows, B from a deviation of supernets."""
    rng = np.random.Generator(np.random.Philox(0))
    e2, placement = by_method(first_study(), 'held out')
    words = 'not needed', 'not shown', 'depends', 'needed', 'undecided'
    table = [['part', 'when real data are worth', *words, 'half-width']]

    def line(part, worth, answers, widths):
        counts = dict.fromkeys(words, 0)
        for answer in answers:
            counts[next(word for word in words if answer.startswith(word))] += 1
        table.append([part, worth, *(f'{n / len(answers):.2f}' for n in counts.values()),
                      f'{np.mean(widths):.3f}'])

    for loss in (0.0, *MARGINS_A):
        answers, widths = [], []
        for _ in range(repeats):
            drawn, places = {}, {}
            for method, kind in e2:             # every kind has the spread of its own rows
                values = e2[method, kind]
                centred = (values - values.mean()) * math.sqrt(len(values) / (len(values) - 1))
                drawn[method, kind] = rng.choice(centred, 64) + e2[method, REAL].mean() \
                    - loss * (kind != REAL)
                places[method, kind] = rng.choice(placement[method, kind], 64)
            for answer, c in answers_a(drawn, places).values():
                answers.append(answer)
                widths.append(interval(*c)[1] - c[0])
        line('A1', f'{loss} of E2', answers, widths)
    for deviation in (0.03, 0.04, 0.055):
        for loss in (0.0, 0.05, 0.1):
            answers, widths = [], []
            for _ in range(repeats):
                rho, given = {}, {}
                for kind in KINDS:
                    rho[kind], given[kind] = rng.normal(-loss * (kind != REAL), deviation, (2, 24))
                for answer, c, _ in answers_b(rho, given).values():
                    answers.append(answer)
                    widths.append(interval(*c)[1] - c[0])
            line('B', f'{loss:.2f}, deviation {deviation:.3f}', answers, widths)
    print_table(table)


# ---------------------------------------------------------------------------------------------
# Figure


def draw_study(path):
    """Two panels by data: percentiles of found cells, and how scores rank all of them."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        sys.exit('--plot needs matplotlib: pip install matplotlib')
    plt.rcParams.update({'font.size': 9, 'svg.hashsalt': 'study', 'svg.fonttype': 'none'})
    scoring, gradient = read_rows('scoring.csv'), read_rows('gradient.csv')
    groups = [('one-shot, 1,000 images', scoring, 'B'), ('one-shot', scoring, 'Bbest'),
              ('by gradient', gradient, 'A1'), ('by gradient, alphas on train', gradient, 'A2'),
              ('by gradient, first study', first_study(), 'held out'),
              ('training-free', scoring, 'C')]
    lines = []                                  # label, colour, rows
    for title, rows, part in groups:
        if part in parts() and not complete(rows, part):
            continue
        rows = [row for row in rows if row['part'] == part and row['genotype']]
        keys = dict.fromkeys((row['arm'], row['method'] if part == 'C' else '') for row in rows)
        for arm, method in keys:
            mine = [row for row in rows if row['arm'] == arm and method in ('', row['method'])]
            kind = arm.partition('@')[0].removesuffix('_fresh')
            colour = f'C{KINDS.index(kind)}' if kind in KINDS else 'dimgray'
            lines.append((f'{title}: {method + " " if method else ""}{arm} ({len(mine)})', colour,
                          mine))
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.2 + 0.25 * len(lines)), layout='constrained',
                                sharey=True, width_ratios=(3, 2))
    found, ranked = axes
    best_of_100, rho_of_parameters = print_no_search()
    for y, (_, colour, rows) in enumerate(lines):
        found.plot(np.mean([row['shuffled'] for row in rows]), y, 'o', color=colour, mfc='none')
        draw_mean(found, y, colour, rows, 'percentile')
        if 'rho' in rows[0]:
            draw_mean(ranked, y, colour, rows, 'rho')
    lines_to_compare = ((50, '--', 'random cell'), (best_of_100, '-.', 'best of 100 by parameters'),
                        (truth(NB201_LARGEST)['percentile'], ':', 'largest network'),
                        (100, '-', 'best cell'))
    for value, style, label in lines_to_compare:
        found.axvline(value, color='gray', ls=style, lw=1, label=label, zorder=0)
    ranked.axvline(rho_of_parameters, color='gray', ls=(0, (1, 4)), label='number of parameters')
    found.plot([], [], 'ko', label='mean and 95% interval')
    found.plot([], [], 'ko', mfc='none', label='same operations on shuffled edges')
    found.plot([], [], 'k|', label='a method, or a seed of three')
    found.set(yticks=range(len(lines)), yticklabels=[line[0] for line in lines],
              ylim=(len(lines) - 0.5, -0.5), xlim=(20, 101),
              xlabel='percentile of the cell found, among all of NAS-Bench-201')
    ranked.set(xlim=(0, 0.9), xlabel='rank correlation, all scores')
    figure.legend(loc='outside lower center', ncols=3, fontsize=8)
    save(figure, path)
    if complete(scoring, 'Bdose'):
        figure, axis = plt.subplots(figsize=(7, 4.5), layout='constrained')
        draw_dose(axis, [row for row in scoring if row['part'] in ('B', 'Bdose')
                         and row['score'] == SCORES[0]])
        save(figure, Path(path).with_stem(Path(path).stem + '-dose'))


def draw_dose(axis, rows):
    """Rank correlation over fit: a dot for each supernet, a line through the means by images."""
    for k, kind in enumerate([*KINDS, 'half_random']):
        means = []
        for arm, images in ((f'{kind}@250', '250'), (kind, '1,000'), (f'{kind}@4000', '4,000'),
                            (f'{kind}@16000', '16,000')):
            points = np.array([(row['fit'], row['rho']) for row in rows if row['arm'] == arm])
            if len(points):
                axis.plot(*points.T, '.', color=f'C{k}', alpha=0.3)
                means.append(points.mean(0))
                if means[-1][0] < 0.9:              # the others lie on top of one another
                    axis.annotate(images, means[-1], (6, 9 * (2 - k)), color=f'C{k}', fontsize=8,
                                  textcoords='offset points')
        axis.plot(*np.transpose(means), 'o-', color=f'C{k}', label=kind)
    axis.set(xlim=(0.07, 1.09), xlabel='accuracy on the training images, at the end',
             ylabel='rank correlation of training losses and true accuracies')
    axis.legend(title='data; numbers: images, if not fitted', fontsize=8)


def draw_mean(axis, y, colour, rows, outcome):
    """A dot and its interval, with a tick for each method, or for each of three seeds."""
    by = {}
    for row in rows:
        by.setdefault(row['method'], []).append(row[outcome])
    samples = list(by.values())
    means = [np.mean(values) for values in samples]
    axis.plot(np.mean(means), y, 'o', color=colour)
    if len(rows) > 3:
        ends = interval(*contrast(*[(values, [0.0]) for values in samples]))
        axis.plot(ends, [y, y], '-', color=colour)
    ticks = samples[0] if len(rows) <= 3 else means if len(means) > 1 else []
    axis.plot(ticks, [y + 0.25] * len(ticks), '|', color=colour, ms=5)


def save(figure, path):
    figure.savefig(path, dpi=120, metadata={'Date': None} if Path(path).suffix == '.svg' else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--commands', choices=list(parts()), help='print the commands of a part')
    parser.add_argument('--add', nargs='+', metavar='RUN', help='append finished runs')
    parser.add_argument('--power', action='store_true', help='chances of each answer')
    parser.add_argument('--plot', metavar='FILE', help='draw the figure, PNG or SVG')
    args = parser.parse_args()
    if args.commands:
        print('\n'.join(commands(args.commands)))
    elif args.add:
        add_runs(args.add)
    elif args.power:
        print_power()
    elif args.plot:
        draw_study(args.plot)
    else:
        print_study()


if __name__ == '__main__':
    main()
