"""Evaluate runs: what a search found and what it cost, what a retrained network is worth.

    python evaluate.py runs/NAME                        # one run; a retrained network is tested
    python evaluate.py runs/NAME [runs/NAME ...]        # a table, seeds of one setting in a line
    python evaluate.py runs/retrain-* --csv table.csv
    python evaluate.py runs/search-* --plot curves.svg  # what runs did, by epoch (matplotlib)
    python evaluate.py runs/NAME --predict photo.jpg    # class and probabilities, as CSV
    python evaluate.py runs/NAME --scores scores.csv    # a probability for each test image, label
    python evaluate.py --arch DARTS_V2 --plot cell.svg  # parameters, multiply-adds, a drawing

The networks of --arch are those of the papers: for CIFAR C=36 and 20 cells, for ImageNet C=48, 14
cells and 224 px, in NAS-Bench-201 C=16 and 3 x 5 cells.
A retrained network is tested anew from its weights.pt. The true accuracy of a cell of
NAS-Bench-201 is looked up. `params, full size` of a search are those of the network for CIFAR that
retrain.py makes of its cell.
"""
import csv
import glob
import io
import json
import math
import os
import sys
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from itertools import chain, combinations
from pathlib import Path
from typing import NamedTuple

# Before torch: generate_data sets how OpenMP's threads wait.
from generate_data import (CHEXPERT, DATA, DEFAULTS, KINDS, REAL, Batches, Progress, Setting,
                           UserError, choose_device, leave, load_file, num_processes, number,
                           one_line_errors, parse_flags, read, read_chexpert, read_image, readable,
                           refuse_idle, settings_of, try_pictures, write_file)

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import genotypes
from genotypes import ACCURACIES, NB201_LARGEST, find_genotype, from_plain, nas_bench_201, plain
from model_search import Network

# Settings that change rounding at most: they may differ on resume, and between runs of a table.
MAY_DIFFER = {'save', 'resume', 'gpu', 'graph', 'workers', 'checkpoint_minutes', 'data_dir',
              'download', 'typed'}

# ---- Loss and metrics -----------------------------------------------------------------------


def loss_of(logits, y, smoothing=0.0):
    """Return the cross-entropy for classes y (B,), or the binary one for labels y (B, classes).

    Labels below 0 are unknown and add nothing. The sum is divided by all B * classes.
    """
    if y.dim() == 1:
        return F.cross_entropy(logits, y, label_smoothing=smoothing)
    return F.binary_cross_entropy_with_logits(logits, y.clamp(min=0), (y >= 0).to(logits.dtype))


def correct(logits, y):
    """How many of a batch are right; with several labels the shares of right ones, summed."""
    if y.dim() == 2:
        known = y >= 0
        right = ((logits > 0) == (y > 0.5)) & known
        return (right.sum(1) / known.sum(1).clamp(min=1)).sum()
    return (logits.argmax(1) == y).float().sum()


def top_error(scores, labels, classes, k=1):
    """Per cent of the rows of scores (N, classes) whose label is not among the k best, or None."""
    if len(classes) <= k:
        return None
    best = scores.topk(k, 1).indices
    return 100 * (1 - (best == labels.unsqueeze(1)).any(1).double().mean().item())


# The five observations of CheXpert's competition (arXiv 1901.07031)
TASKS = ['Atelectasis', 'Cardiomegaly', 'Consolidation', 'Edema', 'Pleural Effusion']


def auroc(scores, labels):
    """Area under the ROC curve of (N,) arrays, ties counted half; labels below 0 are unknown."""
    positive, negative = scores[labels == 1], np.sort(scores[labels == 0])
    if not len(positive) or not len(negative):
        return None
    wins = np.searchsorted(negative, positive) + np.searchsorted(negative, positive, 'right')
    return float(wins.mean() / 2 / len(negative))


def areas(scores, labels, classes):
    """{class: area under its ROC curve} of the classes where that is defined."""
    values = map(auroc, np.asarray(scores).T, np.asarray(labels).T)
    return {name: value for name, value in zip(classes, values) if value is not None}


def mean_area(scores, labels, classes, names=()):
    """Mean area under the ROC curve, of those `names` that are classes; None if one is undefined.

    Without names it is the mean of all classes whose area is defined.
    """
    values = areas(scores, labels, classes)
    chosen = [values.get(name) for name in names or values if name in classes]
    return float(np.mean(chosen)) if chosen and None not in chosen else None


class Metric(NamedTuple):
    """of(scores (N, classes), labels (N,) or (N, classes), class names) -> number or None."""
    header: str
    digits: int
    of: object
    multilabel: bool = False    # for several labels per image


PARTS = {'test': 'test', 'fit': 'final training', 'holdout': 'held-out'}    # words in headers
METRICS = {
    'error': Metric('error %', 2, top_error),
    'top5_error': Metric('top-5 error %', 2, partial(top_error, k=5)),
    'auroc_tasks': Metric('AUROC of 5 tasks', 3, partial(mean_area, names=TASKS), multilabel=True),
    'auroc': Metric('mean AUROC', 3, mean_area, multilabel=True),
}


def metric_columns():
    """{part_METRIC: (header, digits)}, for the table, the line of an epoch and the plots."""
    out = {}
    for part, word in PARTS.items():
        for name, metric in METRICS.items():
            out[f'{part}_{name}'] = (f'{word} {metric.header}', metric.digits)
    return out


def gather(value):
    """[value of each process], of plain types and tensors on the CPU."""
    values = [value] * num_processes()
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


@torch.no_grad()
def predictions(part, network, data, rows, device, workers=2):
    """(loss, scores (N, classes), labels) of a network in evaluation mode, on the CPU.

    Every process tests a share of the rows of a Data. The views of a study become one, by the
    maximum.
    """
    size = 50 if data.image_size > 64 else 250          # which changes no result
    batches = Batches(data, rows, size, device, shuffle=False, workers=workers)
    network.eval()
    total, scores, labels = 0.0, [], []
    for x, y in Progress(len(batches), f'batches, {part}').over(batches.epoch()):
        logits = network(x)
        total += (loss_of(logits, y) * len(y)).item()
        scores.append(logits.float().cpu())
        labels.append(y.cpu())
    totals, scores, labels, tested_rows = zip(*gather((total, scores, labels, batches.indices)))
    scores, labels = torch.cat(sum(scores, [])), torch.cat(sum(labels, []))
    loss = sum(totals) / len(labels)
    if data.studies is not None:
        names, study = np.unique(data.studies[np.concatenate(tested_rows)], return_inverse=True)
        study = torch.from_numpy(study).unsqueeze(1).expand_as(scores)
        empty = torch.full((len(names), scores.shape[1]), -math.inf)
        scores = empty.scatter_reduce(0, study, scores, 'amax')
        labels = empty.scatter_reduce(0, study, labels, 'amax')
    return loss, scores, labels


def measure(part, loss, scores, labels, classes):
    """{part_loss, part_n, part_METRIC, ...}, with the METRICS that suit the labels."""
    values = {f'{part}_loss': loss, f'{part}_n': len(labels)}
    for name, metric in METRICS.items():
        if metric.multilabel == (labels.dim() == 2):
            value = metric.of(scores, labels, classes)
            values[f'{part}_{name}'] = None if value is None else float(value)
    return values


def test(part, network, data, rows, device, workers=2):
    """{part_loss, part_n, part_METRIC, ...} of a network on rows of a Data, in evaluation mode."""
    return measure(part, *predictions(part, network, data, rows, device, workers), data.classes)


def bootstrap(scores, labels, classes, patients):
    """{class: 95% interval of its area under the ROC curve}, by drawing patients with replacement.

    scores, labels: (N, classes) arrays; labels below 0 are unknown. patients: (N,), of each row.
    """
    rng, drawn = np.random.Generator(np.random.Philox(0)), {}
    _, patient_of = np.unique(patients, return_inverse=True)
    rows_of = [np.flatnonzero(patient_of == k) for k in range(patient_of.max() + 1)]
    for _ in range(1000):
        rows = np.concatenate([rows_of[k] for k in rng.integers(0, len(rows_of), len(rows_of))])
        for name, value in areas(scores[rows], labels[rows], classes).items():
            drawn.setdefault(name, []).append(value)
    return {name: np.percentile(values, [2.5, 97.5]).tolist() for name, values in drawn.items()}


# ---- Architectures and networks -------------------------------------------------------------


def cost(genotype, init_channels=36, layers=20, num_classes=10, image_size=32, stem='cifar'):
    """Parameters without the auxiliary head; multiply-adds of convolutions and linears."""
    with torch.device('meta'):
        network = Network(init_channels, num_classes, layers, genotype, stem=stem)
        image = torch.empty(1, 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(image)
    return {'params': sum(p.numel() for p in network.parameters()),
            'multiply_adds': counter.get_total_flops() // 2}


def load_weights(path):
    """(network in evaluation mode, meta) of a retraining or weights.pt; meta: retrain.finish."""
    file = Path(path, 'weights.pt') if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise UserError(f'{path} is no finished retraining: it has no weights.pt')
    content = load_file(file, 'retrain again')
    with readable(f'{path} is no network of this code', 'Retrain again.'):
        meta = content['meta']
        network = Network(meta['init_channels'], len(meta['classes']), meta['layers'],
                          from_plain(meta['genotype'], str(path)), auxiliary=meta['auxiliary'],
                          stem=meta['stem'])
        network.load_state_dict(content['network'])
    return network.eval(), meta


# ---- Reading runs ---------------------------------------------------------------------------


def read_json(path):
    """The object in a JSON file of a run; UserError for a damaged or missing one."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f'{path.parent} is no run: it has no {path.name}')
    with readable(f'{path} is damaged', 'Run again.'):
        return dict(json.loads(path.read_text()))


def read_log(folder):
    """The lines of log.jsonl, as dictionaries."""
    path = Path(folder, 'log.jsonl')
    with readable(f'{path} is damaged', '--resume the run.'):
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def method_name(settings):
    """The method of a search, with the settings that make it another method."""
    name = settings['method']
    if settings['unrolled']:
        name += ', second order'
    if settings['method'] == 'sdarts' and settings['perturb'] != 'random':
        name += ', adversarial'
    if settings['epochs'] == 0:
        name += ', no steps'
    return name


def data_name(settings):
    """--data, with the settings that make it another kind of data."""
    settings = {**DEFAULTS, **settings}
    name, used = settings['data'], settings_of(settings['data'], settings)
    used.add('fresh')                           # which a set that is gone does not say
    for key in ('source', 'generator', 'difficulty', 'label_mode', 'label_noise', 'fresh'):
        if key in used and settings[key] != DEFAULTS[key]:
            name += f', {key} {settings[key]}'
    return name


def read_run(run):
    """What a run's folder says of it, as a dictionary; a retrained network is not tested.

    Of a search also what is known of its cell, of a retraining the metrics of the last epoch.
    """
    folder = Path(run)
    about = read_json(folder / 'args.json')
    settings, log = {**about['settings'], 'code': about.get('code')}, read_log(folder)
    row = {'run': str(folder), 'type': 'search' if 'method' in settings else 'retrain',
           'finished': False, 'settings': settings, 'command': about['command'],
           'data_sha256': about['data_sha256'], 'git_commit': about['git_commit'],
           'device': about['hardware']['device'], 'seed': settings['seed'], 'genotype': None,
           'epochs': sum('cells' not in line for line in log),
           'seconds': sum(line['seconds'] for line in log), 'log': log}
    if row['type'] == 'search':
        row.update(space=settings['space'], method=method_name(settings),
                   searched_on=data_name(settings), arch_data=settings['arch_data'])
        if (folder / 'genotype.json').exists():
            genotype, found_by = find_genotype(str(folder))
            row.update(finished=True, genotype=plain(genotype), arch_data=found_by['arch_data'],
                       **look_up(genotype))
            if found_by['data'] is None:                # a random cell
                row['searched_on'] = None
            if (folder / 'scores.csv').exists():
                row.update(ranking(folder))
        return row
    row.update(arch=settings['arch'], trained_on=data_name(settings),
               finished=(folder / 'weights.pt').exists())
    last = log[-1] if log else {}
    row.update({name: last[name] for name in last if name.split('_')[0] in (*PARTS, 'kept')})
    return row


def look_up(genotype):
    """Skips and parameters of a cell; in NAS-Bench-201 also its true accuracies, and how many
    points they are above those of the largest network.
    """
    if not isinstance(genotype, str):
        return {'skips_normal': str(genotype.normal).count('skip_connect'),
                'skips_reduce': str(genotype.reduce).count('skip_connect'),
                'params_full_size': cost(genotype)['params']}
    table, _ = nas_bench_201()
    found, largest = genotypes.truth(genotype), table[NB201_LARGEST]
    found['vs_largest_network'] = [round(found[name] - largest[name], 2) for name in ACCURACIES]
    return {**found, 'skips': genotype.count('skip_connect'), 'nones': genotype.count('none'),
            'params_full_size': table[genotype]['params']}


def read_cell_scores(folder):
    """({column: float64 (N,)} of scores.csv, name of the score that chose the cell).

    Losses are negative, so that more is better.
    """
    rows = list(csv.DictReader(Path(folder, 'scores.csv').read_text().splitlines()))
    columns = {}
    for name in rows[0].keys() - {'genotype'}:
        if rows[0][name]:                       # the truth may be unknown
            values = np.array([float(row[name]) for row in rows])
            columns[name] = -values if name.endswith('loss') else values
    return columns, read_json(Path(folder, 'genotype.json'))['score']


def ranks(values):
    """Ranks from 0, of equal values their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]


def spearman(a, b, given=None):
    """Rank correlation of two arrays; partial, if `given` a third. NaN if one is constant."""
    with np.errstate(invalid='ignore', divide='ignore'):
        if given is None:
            return float(np.corrcoef(ranks(a), ranks(b))[0, 1])
        ab, ac, bc = spearman(a, b), spearman(a, given), spearman(b, given)
        return float((ab - ac * bc) / np.sqrt((1 - ac ** 2) * (1 - bc ** 2)))


def ranking(folder):
    """How well the scores of a search rank its cells; without the truth only their number."""
    scores, by = read_cell_scores(folder)
    out = {'score': by, 'cells': len(scores[by])}
    if 'cifar10' not in scores:
        return out
    truth, params, value = scores.pop('cifar10'), scores.pop('cell_params'), scores[by]
    return {**out, 'spearman': spearman(value, truth),
            'spearman_given_params': spearman(value, truth, params),
            'spearman_of_params': spearman(params, truth),
            'spearman_by_score': {name: spearman(scores[name], truth) for name in sorted(scores)}}


def read_test(meta, data_dir=None, table=None):
    """The test images of a retrained network, with its own classes, mean and deviation, or None.

    data_dir: where real data are now; table: a CSV of CheXpert's test set.
    """
    if not (meta['has_test'] or table):
        return None
    name = meta['data'] if meta['data'] in REAL else data_dir or meta['data']
    settings = {**meta['settings'], 'image_size': meta['image_size']}
    settings['data_dir'] = data_dir or settings['data_dir']
    if table:
        if meta['classes'] != list(CHEXPERT):
            raise UserError("--test_labels: this network was not trained on CheXpert's labels")
        data = read_chexpert('chexpert', settings, 'test', table)
        print(f'tested on the {len(np.unique(data.studies))} studies of {table}, for example '
              f'{data.files[0]}', file=sys.stderr)
    elif name in REAL or Path(name).exists():
        data = read(name, settings, 'test')
    else:
        raise UserError(f'{name}: the training data are not there. Say where with --data_dir.')
    if data is None:
        raise UserError(f'{name} has no test images any more: bring them back, or check '
                        '--data_dir')
    if not data.multilabel:                     # CheXpert's labels are always the same
        there = {data.classes[k] for k in np.unique(data.labels)}
        unknown = sorted(there - {*meta['classes']})
        if unknown:
            raise UserError(f'{data.name}: the network does not know {", ".join(unknown[:5])}: '
                            'give the data that it was trained on')
        place = np.array([meta['classes'].index(name) if name in there else -1
                          for name in data.classes])
        data = replace(data, labels=place[data.labels], classes=meta['classes'])
    return replace(data, mean=meta['mean'], std=meta['std'])


def report(run, device, data_dir=None, test_labels=None, alone=True):
    """What read_run returns, and for a finished retraining its cost and its test.

    If its data cannot be read, it has the test of its log, unless it is `alone`.
    """
    row = read_run(run)
    if row['type'] == 'search' or not row['finished']:
        return row
    network, meta = load_weights(run)
    found_by = meta['found_by']
    row.update(searched_on=found_by['data'], method=found_by['method'],
               arch_data=found_by.get('arch_data'), genotype=meta['genotype'],
               search_settings=found_by.get('settings'),
               space='nb201' if isinstance(meta['genotype'], str) else 'darts',
               **cost(from_plain(meta['genotype']), meta['init_channels'], meta['layers'],
                      len(meta['classes']), meta['image_size'], meta['stem']))
    try:
        data = read_test(meta, data_dir, test_labels)
    except UserError as error:
        if alone or data_dir or test_labels or 'test_n' not in row:
            raise
        print(f'{run}: {error} Its test is that of the last epoch, from its log.', file=sys.stderr)
        return row
    if data is None:
        return row
    loss, scores, labels = predictions('test', network.to(device), data, range(len(data)), device)
    if not test_labels and meta.get('test_sha256') not in (None, data.sha256()):
        print(f'warning: {run}: its test images have changed since its training ended. If some '
              'were moved and not only added, they may be of the training.', file=sys.stderr)
    names = patients = data.files or range(len(data))
    if data.studies is not None:
        names = np.unique(data.studies)
        patients = [study.split('/')[0] for study in names]
    row.update(measure('test', loss, scores, labels, data.classes), tested_on=test_labels,
               tested=(scores.numpy(), labels.numpy(), data.classes, names))
    if data.multilabel:
        intervals, row['test_areas'] = bootstrap(*row['tested'][:3], patients), {}
        for name, value in areas(scores, labels, data.classes).items():
            column = labels[:, data.classes.index(name)]
            counts = [(column == truth).sum().item() for truth in (1, 0)]
            row['test_areas'][name] = [value, *intervals[name], *counts]
    return row


# ---- One run, and the table of several ------------------------------------------------------

HIDDEN = 'run', 'finished', 'log', 'settings', 'search_settings', 'tested', 'data_sha256'


def show(row):
    """Print one run as a list."""
    print(row['run'])
    for name, value in row.items():
        if name == 'test_areas':
            _, labels, classes, _ = row['tested']
            for label, column in zip(classes, labels.T):
                area = f'not defined, {(column == 1).sum()} of {(column >= 0).sum()} positive'
                if label in value:
                    area = area_text(*value[label])
                print(f'  {label:<28} AUROC {area}')
        elif name not in HIDDEN and (value is not None or 'auroc' in name):
            words = name.replace('fit', 'final training').replace('holdout', 'held-out') \
                .replace('spearman', 'rank correlation')
            header, digits = columns().get(name, (words.replace('_', ' '), None))
            print(f'  {header:<25} {text_of(name, value, digits)}')


def area_text(area, low, high, positives, negatives):
    """An area under a ROC curve with its interval, which few images of either kind forbid."""
    enough = min(positives, negatives) >= 10
    interval = f'95%: {low:.3f} to {high:.3f}' if enough else 'below 10: too few for an interval'
    return f'{area:.3f} ({interval}), {positives} of {positives + negatives} positive'


def text_of(name, value, digits=None):
    """A value of a report; digits: after the point, None if the table has no such column."""
    if value is None:
        return 'not defined'
    if isinstance(value, float):
        return f'{value:,.4g}' if digits is None else f'{value:,.{digits}f}'
    if name == 'vs_largest_network':
        return ', '.join(map('{} {:+.2f}'.format, ACCURACIES, value)) + ' points'
    if name == 'genotype':                      # in DARTS's words, or as NAS-Bench-201 has it
        return from_plain(value)
    if isinstance(value, dict):
        return ', '.join(f'{key} {number:.3f}' for key, number in value.items())
    return f'{value:,}' if isinstance(value, int) and name != 'seed' else value


def columns():
    """{measure: (header, digits)} of the table, in its order."""
    return {**metric_columns(), 'test_n': ('test n', 0), 'gap': ('test - training, points', 2),
            'fit_loss': ('final training loss', 3), 'cifar10': ('CIFAR-10 %', 2),
            'cifar100': ('CIFAR-100 %', 2), 'imagenet16': ('ImageNet16 %', 2),
            'percentile': ('percentile', 1), 'spearman': ('rank correlation', 3),
            'spearman_given_params': ('partial correlation, params', 3),
            'skips': ('skips', 1), 'nones': ('nones', 1), 'skips_normal': ('skips normal', 1),
            'params': ('params', 0), 'params_full_size': ('params, full size', 0),
            'seconds': ('seconds, without tests', 0)}


GROUPS = 'type', 'space', 'searched_on', 'method', 'arch_data', 'trained_on', 'tested_on'
REPEATS = 'seed', 'data_seed', 'arch', 'genotype'       # in which runs of a line may differ
NAMED = {'data', 'space', 'method', 'unrolled', 'perturb', 'arch_data', 'source', 'generator',
         'difficulty', 'label_mode', 'label_noise', 'fresh'}        # settings in other columns


def compared_settings(settings, prefix=''):
    """{(prefix + name, value)} of what runs of one line have in common."""
    kind = KINDS.get(settings['data'])
    if kind and not kind.augment and settings.get('augment') == 'auto':
        settings = {**settings, 'augment': 'none'}          # which auto means for this kind
    own = settings.keys() - MAY_DIFFER - set(REPEATS)
    own -= DATA.keys() - settings_of(settings['data'], {**DEFAULTS, **settings})
    return {(prefix + name, settings[name]) for name in own}


def table(rows):
    """Runs that differ only in their seeds, in one line: [{group, n, measure, measure_std}].

    `settings` of a line: what was typed, and those in which lines of the same data and method
    differ; those of the search begin with search_. Runs of other scripts, or on other images of a
    real --data, are in other lines.
    """
    large = {'quick', 'preset', 'search_quick', 'search_preset'}        # each sets many others
    groups, shown, lines = {}, set(large), []
    for row in rows:
        settings, search = row['settings'], row.get('search_settings') or {}
        own, arch = compared_settings(settings), settings.get('arch')
        shown.update(settings.get('typed', ()))
        shown.update(f'search_{name}' for name in search.get('typed', ()) if name not in NAMED)
        if row['data_sha256'] and settings['data'] not in KINDS:        # a folder may change
            hashes = [sha256[:6] for sha256 in row['data_sha256'].values()]
            own.add(('data_sha256', '-'.join(hashes)))
        if search:
            own |= compared_settings(search, 'search_')
        elif row.get('searched_on') is None and arch != row.get('method') and '|' not in f'{arch}':
            own.add(('arch', arch))             # a file: others may have its name
        key = tuple(row.get(name) for name in GROUPS), frozenset(own)
        repeat = tuple(settings.get(name) for name in REPEATS)
        same = groups.setdefault(key, {}).setdefault(repeat, row)
        if same is not row:
            print(f'{row["run"]} is left out, since it repeats {same["run"]}', file=sys.stderr)
    for (group, own), (other_group, other) in combinations(groups, 2):
        differ = {name for name, _ in own ^ other}      # in which the two lines differ
        if group == other_group and not differ & large:
            shown |= differ
    for (group, own), runs in groups.items():
        settings, runs, words = dict(own), runs.values(), []
        for name in sorted((shown & settings.keys()) - NAMED):
            value = settings[name]
            if value is not False and value not in (None, 'auto'):      # 0 is a value
                words.append(name if value is True else f'{name}={value}')
        line = {**dict(zip(GROUPS, group)), 'settings': ' '.join(words) or None, 'n': len(runs)}
        for name in columns():
            values = [row[name] for row in runs if row.get(name) is not None]
            if values:
                line[name] = float(np.mean(values))
                line[f'{name}_std'] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        lines.append(line)
    return lines


def print_table(lines):
    """Print what `table` returns: mean ± standard deviation over the runs of a group."""
    formats = [(name, name.replace('_', ' '), '') for name in (*GROUPS, 'settings', 'n')]
    formats += [(name, header, f',.{digits}f') for name, (header, digits) in columns().items()]
    shown = []                                  # texts, by column
    for name, header, spec in formats:
        texts = [header]
        for line in lines:
            values = [line.get(name), line.get(f'{name}_std')]
            parts = [format(value, spec) for value in values if value is not None]
            texts.append(' ± '.join(parts) or '-')
        if {*texts[1:]} != {'-'}:
            shown.append([text.ljust(max(map(len, texts))) for text in texts])
    for cells in zip(*shown):
        print('  '.join(cells).rstrip())


# ---- Plots ----------------------------------------------------------------------------------

# Curves besides the METRICS: {title: pattern of the log's entries whose mean is drawn}
PANELS = {
    'training loss': 'train_loss', 'training accuracy, %': 'train_accuracy',
    "loss on the alphas' images": 'valid_loss',
    "accuracy on the alphas' images, %": 'valid_accuracy',
    'entropy of the alphas, nats': 'entropy_*', 'skips, mean over the cells': 'skips_*',
    'true CIFAR-10 accuracy, % (80: or less)': 'truth_*',
}


def mean_of(line, pattern):
    """Mean of a log line's values whose names fit, accuracies in per cent; None without any."""
    kept = line.get('kept_after_epochs')
    if kept and kept <= line['epoch'] and pattern.startswith(('holdout_', 'test_')):
        return None             # the network that was kept is of an earlier epoch
    values = [value['cifar10'] if isinstance(value, dict) else value
              for name, value in line.items()
              if value is not None and (name == pattern or fnmatch(name, pattern))]
    scale = 100 if pattern.endswith('_accuracy') else 1
    return scale * sum(values) / len(values) if values else None


def plot(rows, path):
    """Draw curves by epoch and scores of cells; of one retraining its test, of three their fits."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    panels, colours = [], {}                    # panels: title, inches, function, its arguments
    palette = colormaps['tab20'].colors[::2] + colormaps['tab20'].colors[1::2]
    typed = set(chain(*(row['settings'].get('typed', ()) for row in rows))) - NAMED
    for row in rows:
        group = row.get('method') or row['arch']
        words = {'searched_on': ' on ', 'space': ', ', 'arch_data': ', alphas: ',
                 'trained_on': ', trained on '}
        group += ''.join(words[key] + row[key] for key in words if row.get(key))
        alike = [compared_settings(other['settings']) for other in rows
                 if other['type'] == row['type']]
        for name, value in sorted(compared_settings(row['settings']) - set.intersection(*alike)):
            if name in typed:
                group += f', {name}={value}'
        if not row['finished']:
            group += ', not finished'
        row['colour'] = colours.setdefault(group, palette[len(colours) % 20])
    metrics = {header: name for name, (header, _) in metric_columns().items()
               if not name.startswith('fit_')}  # which is measured once
    for title, pattern in {**PANELS, **metrics}.items():
        if any(mean_of(line, pattern) is not None for row in rows for line in row['log']):
            panels.append((title, 2.4, draw_curves, [rows, pattern]))
    scored = {}                                 # {(space, score): runs}
    for row in rows:
        if row.get('score'):
            scored.setdefault((row['space'], row['score']), []).append(row)
    for (space, by), runs in scored.items():
        panels.append((f'cells of {space}, scored by {by}', 4, draw_scores, [runs]))
    for name, label in (('test_error', 'test error, %'), ('test_auroc', 'test AUROC')):
        fits = [row for row in rows if row.get('fit_loss') and row.get(name) is not None]
        if len(fits) > 2:
            panels.append(('fit and generalization, one dot per network', 2.4, draw_fits,
                           [fits, name, label]))
    if len(rows) == 1 and 'tested' in rows[0]:
        labels = rows[0]['tested_on']
        panels.append((f'test on {labels}' if labels else 'test', 6, draw_test, rows))
    if not panels:
        raise UserError('--plot: these runs have no log to draw: give runs that have begun')
    heights = [panel[1] for panel in panels]
    figure = Figure((8, sum(heights) + 0.2 * len(colours)), layout='constrained')
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, _, draw, arguments) in zip(axes, panels):
        axis.set_title(title, fontsize=10, loc='left')
        draw(axis, *arguments)
    handles = [Line2D([], [], color=c, label=name) for name, c in colours.items()]
    figure.legend(handles=handles, loc='outside lower center', fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix[1:], dpi=120)
    write_file(path, buffer.getvalue())


def draw_curves(axis, rows, pattern):
    """The mean of the log's entries whose names fit, by epoch."""
    for row in rows:
        values = np.array([mean_of(line, pattern) for line in row['log']], float)   # None: a gap
        if pattern == 'truth_*':                # cells without convolutions are far below
            values = values.clip(80)
        axis.plot(np.arange(len(values)) + 1, values, color=row['colour'], marker='.', alpha=0.8)
    axis.set_xlabel('epoch', fontsize=9)
    axis.ticklabel_format(useOffset=False)
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.grid(alpha=0.3)


def draw_scores(axis, rows):
    """One dot per cell, over the true accuracy of those above 80%, or over parameters."""
    for row in rows:
        scores, by = read_cell_scores(row['run'])
        x, label = scores['cell_params'] / 1e3, 'parameters of the operations, thousands'
        kept = scores[by] > -np.inf
        if 'cifar10' in scores:
            x, label = scores['cifar10'], 'true CIFAR-10 accuracy, % (of cells above 80%)'
            kept &= x > 80
        axis.plot(x[kept], np.abs(scores[by][kept]), '.', color=row['colour'], ms=2, alpha=0.5)
    low, high = axis.dataLim.intervaly
    axis.set_yscale('log' if high > 1000 * low > 0 else 'linear')
    better = 'lower' if by.endswith('loss') else 'higher'
    axis.set(xlabel=label, ylabel=f'{by.replace("_", " ")} ({better} is better)')
    axis.grid(alpha=0.3)


def draw_fits(axis, rows, name, label):
    """One dot per retraining; the axis is logarithmic if some losses are close to 0."""
    for row in rows:
        axis.plot(row['fit_loss'], row[name], 'o', color=row['colour'], alpha=0.7)
    low, high = axis.dataLim.intervalx
    axis.set(xscale='log' if high > 10 * low > 0 else 'linear', ylabel=label,
             xlabel='loss on training images')
    axis.grid(alpha=0.3)


def draw_test(axis, row):
    """The confusion matrix of a test, or the ROC curve of each label."""
    from matplotlib import colormaps
    from matplotlib.font_manager import findfont, get_font
    scores, labels, classes, _ = row['tested']
    if labels.ndim == 1:
        letters = get_font(findfont('DejaVu Sans')).get_charmap()
        # A name that the font cannot show is its number, as on the sheet of a set.
        names = [name if {*map(ord, name)} <= letters.keys() else str(k)
                 for k, name in enumerate(classes)]
        unshown = [f'{k} is {name}' for k, name in enumerate(classes) if name != names[k]]
        if unshown:
            print("the plot's font lacks letters:", ', '.join(unshown), file=sys.stderr)
        counts = np.zeros((len(classes), len(classes)), int)
        np.add.at(counts, (labels, scores.argmax(1)), 1)
        axis.imshow(counts, cmap='Blues')
        axis.set(xlabel='predicted class', ylabel='true class')
        if len(classes) <= 20:
            axis.set_xticks(range(len(names)), names, rotation=90)
            axis.set_yticks(range(len(names)), names)
            for (true, predicted), count in np.ndenumerate(counts):
                axis.text(predicted, true, count, ha='center', va='center', fontsize=8,
                          color='white' if count > counts.max() / 2 else 'black')
        return
    axis.set_prop_cycle(color=colormaps['tab20'].colors)
    for name, area in row['test_areas'].items():
        k = classes.index(name)
        known = labels[:, k] >= 0
        truth = labels[known, k][np.argsort(-scores[known, k], kind='stable')] == 1
        false_share = np.append(0, np.cumsum(~truth) / (~truth).sum())
        true_share = np.append(0, np.cumsum(truth) / truth.sum())
        axis.plot(false_share, true_share, label=f'{name} {area_text(*area)}')
    axis.plot([0, 1], [0, 1], '--', color='gray', lw=1)
    axis.legend(loc='lower right', fontsize=7, title='area under the curve', title_fontsize=8)
    axis.set(xlabel='false positive rate', ylabel='true positive rate')


# ---- Flags, predictions and files -----------------------------------------------------------

FLAGS = {
    'runs': Setting([], 'folders of runs; --predict takes a weights.pt alone, too'),
    'arch': Setting(None, "a published name, a search, or a file with a genotype"),
    'json': Setting(False, 'print one JSON line for each run'),
    'csv': Setting(None, 'write the table to this file'),
    'plot': Setting(None, 'draw runs by epoch: .png, .svg or .pdf; of --arch the cells: .svg'),
    'predict': Setting(None, 'a picture, or a folder of pictures, for one retrained network'),
    'scores': Setting(None, 'CSV of one retraining: image (or study), label, score, true'),
    'data_dir': Setting(None, 'where the real data, or the folder of pictures, are now'),
    'gpu': Setting(0, 'CUDA device, -1: the CPU', number(int, -1)),
    'test_labels': Setting(None, "a CSV of CheXpert's test set"),
}


def prepare(path, meta):
    """float (1, 3, S, S) of a picture, as the network of load_weights takes it."""
    pixels = torch.tensor(read_image(path, meta['image_size'], meta['zoom']))
    mean, std = torch.tensor(meta['mean']) * 255, torch.tensor(meta['std']) * 255
    return ((pixels.float() - mean) / std).permute(2, 0, 1).unsqueeze(0)


@torch.no_grad()
def show_predictions(run, target, device):
    """Print the class of each picture, and the probability of each class or label."""
    network, meta = load_weights(run)
    network.to(device)
    paths = [Path(target)]
    if not paths[0].exists():
        raise UserError(f'--predict {target}: no such picture or folder. Check the path.')
    if paths[0].is_dir():
        from torchvision.datasets.folder import IMG_EXTENSIONS
        inside = sorted(glob.glob('**', root_dir=target, recursive=True))       # follows links
        paths = [Path(target, name) for name in inside if name.lower().endswith(IMG_EXTENSIONS)]
    faults = dict(zip(paths, try_pictures(paths, [Path(target)])))
    if all(faults.values()):
        raise UserError(next(iter(faults.values()), f'--predict {target}: no pictures in it'))
    writer = csv.writer(sys.stdout, lineterminator='\n')
    writer.writerow(['file', *([] if meta['multilabel'] else ['class']), *meta['classes']])
    for path, fault in faults.items():
        if fault:
            print(f'left out: {fault}', file=sys.stderr)
            continue
        logits = network(prepare(path, meta).to(device)).squeeze(0)
        found = [] if meta['multilabel'] else [meta['classes'][logits.argmax()]]
        p = logits.sigmoid() if meta['multilabel'] else logits.softmax(0)
        writer.writerow([path, *found, *(f'{share:.6g}' for share in p.tolist())])


def show_arch(arch, as_json, drawing):
    """Print what a cell costs in the papers' networks, and draw it if there is a file for it."""
    genotype = find_genotype(arch)[0]
    if isinstance(genotype, str):
        counts = {**cost(genotype, 16, 17), **genotypes.truth(genotype)}
    else:
        counts = cost(genotype)
        for name, count in cost(genotype, 48, 14, 1000, 224, 'imagenet').items():
            counts[f'imagenet_{name}'] = count
    if drawing:
        write_file(drawing, genotypes.draw(genotype, arch))
        print('wrote', drawing, file=sys.stderr)
    lines = [f'{name:<25} {round(count, 2):>15,}' for name, count in counts.items()]
    print(json.dumps(counts) if as_json else '\n'.join([str(genotype), *lines]))


def write_probabilities(path, run):
    """Write the probability of each label (or class) for each test image (or study) of one run."""
    if 'tested' not in run:
        raise UserError('--scores: give one finished retraining, on data that have test images')
    scores, labels, classes, names = run['tested']
    scores = torch.from_numpy(scores)
    scores = scores.sigmoid() if labels.ndim == 2 else scores.softmax(1)
    truth = labels if labels.ndim == 2 else np.eye(len(classes))[labels]

    def rows():                                 # of ImageNet 50 million: one at a time
        yield 'image', 'label', 'score', 'true'
        for name, row, true in zip(names, scores, truth):
            for label, value, is_true in zip(classes, row.tolist(), true.tolist()):
                yield name, label, f'{value:.9g}', int(is_true)

    write_csv(path, rows())


def write_csv(path, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(rows)
    write_file(path, text.getvalue())


def parse(argv):
    """Settings; UserError for flags that do not go together and files that cannot be written."""
    s, typed, _ = parse_flags(__doc__, {'flags': FLAGS}, argv)
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise UserError('evaluate.py is one process: run it without torchrun')
    folders = [os.path.dirname(run) if os.path.basename(run) == 'weights.pt' else run
               for run in s['runs']]
    s['runs'] = list(dict.fromkeys(map(os.path.normpath, folders)))
    if bool(s['runs']) == bool(s['arch']):
        raise UserError('give either the folders of runs, or --arch NAME')
    if s['arch']:
        refuse_idle(typed, FLAGS.keys() - {'arch', 'json', 'plot', 'gpu'}, 'with --arch')
    if s['predict']:
        refuse_idle(typed, FLAGS.keys() - {'runs', 'predict', 'gpu'},
                    'with --predict, which prints CSV')
    if len(s['runs']) > 1 and (s['predict'] or s['scores']):
        raise UserError('--predict and --scores take one run, and --predict one picture or folder: '
                        'leave the others out')
    for name in ('csv', 'plot', 'scores'):      # which are written after the tests
        if not s[name]:
            continue
        path = Path(s[name])
        if not path.resolve().parent.is_dir() or path.exists() and not path.is_file():
            raise UserError(f'--{name} {path}: give a file in a folder that exists')
    suffixes = ['.svg'] if s['arch'] else ['.png', '.svg', '.pdf']
    if s['plot'] and Path(s['plot']).suffix not in suffixes:
        raise UserError(f'--plot {s["plot"]}: its name must end in {" or ".join(suffixes)}')
    if s['plot'] and not s['arch'] and not find_spec('matplotlib'):
        raise UserError('--plot needs matplotlib: pip install matplotlib')
    return s


@one_line_errors
def main(argv=None):
    s = parse(argv)
    if s['arch']:
        return show_arch(s['arch'], s['json'], s['plot'])
    if s['predict']:
        return show_predictions(s['runs'][0], s['predict'], choose_device(s['gpu']))
    trained = any((Path(run) / 'weights.pt').exists() for run in s['runs'])
    device = choose_device(s['gpu'] if trained else -1)
    rows = []
    for run in s['runs']:
        try:
            rows.append(report(run, device, s['data_dir'], s['test_labels'], len(s['runs']) == 1))
        except UserError as error:
            if len(s['runs']) == 1:
                raise
            print(f'{run} is left out: {error}', file=sys.stderr)
    done = [row for row in rows if row['finished']]
    if s['scores']:
        write_probabilities(s['scores'], rows[0])
    if s['csv'] and not done:
        raise UserError('--csv: none of these runs is finished: --resume them')
    for row in rows:
        if not row['finished']:
            print(f'{row["run"]}: not finished after {row["epochs"]} epochs: --resume it',
                  file=sys.stderr)
        if {'test_error', 'fit_error'} <= row.keys():
            row['gap'] = row['test_error'] - row['fit_error']
    lines = table(done) if s['csv'] or (len(done) > 1 and not s['json']) else []
    if s['json']:
        for row in done:
            print(json.dumps({key: row[key] for key in row if key not in ('log', 'tested')}))
    elif len(done) == 1:
        show(done[0])
    elif done:
        print_table(lines)
    if s['csv']:
        names = dict.fromkeys(chain(*lines))
        write_csv(s['csv'], [names, *(map(line.get, names) for line in lines)])
    if s['plot']:
        plot(rows, s['plot'])
    written = [s[name] for name in ('csv', 'plot', 'scores') if s[name]]
    if written:
        print('wrote', ', '.join(written), file=sys.stderr)
    return 2 if len(rows) < len(s['runs']) else 0


if __name__ == '__main__':
    leave(main())
