"""Evaluate runs: what a search found and what it cost, what a retrained network is worth.

    python evaluate.py runs/NAME                        # one run; a retrained network is tested
    python evaluate.py runs/NAME [runs/NAME ...]        # a table, seeds of one setting in a line
    python evaluate.py runs/retrain-* --csv table.csv
    python evaluate.py runs/search-* --plot curves.svg  # what runs did, by epoch (matplotlib)
    python evaluate.py runs/NAME --predict photo.jpg    # classes of pictures, as CSV
    python evaluate.py --arch DARTS_V2 --cost           # parameters and multiply-adds

A retrained network is tested anew from its weights.pt. The true accuracy of a cell of
NAS-Bench-201 is looked up. A metric is a row of METRICS: it is then in the log of a training, in
the report and in the table.
"""
import csv
import io
import json
import math
import os
import sys
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Before torch: generate_data sets how OpenMP's threads wait.
from generate_data import (CHEXPERT, REAL, Batches, Setting, UserError, choose_device, leave,
                           load_file, number, one_line_errors, parse_flags, read, read_chexpert,
                           read_image, world, write_file)

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import genotypes
from genotypes import ACCURACIES, NB201_LARGEST, from_plain, from_string, nas_bench_201, plain
from model_search import Network

EVALUATION_BATCH = 250, 50      # images up to 64 px, and above; it changes no result
DRAWS = 1000                    # of the bootstrap
# Settings that change rounding at most: they may differ on resume, and between runs of a table.
MAY_DIFFER = {'save', 'resume', 'gpu', 'graph', 'workers', 'checkpoint_minutes', 'data_dir',
              'download'}

# ---------------------------------------------------------------------------------------------
# Loss and metrics


def loss_of(logits, y, smoothing=0.0):
    """Return the cross-entropy for classes y (B,), or the binary one for labels y (B, classes).

    Labels below 0 are unknown and add nothing. The sum is still divided by all B * classes, so
    that the mean over parts of a batch is that of the batch.
    """
    if y.dim() == 1:
        return F.cross_entropy(logits, y, label_smoothing=smoothing)
    return F.binary_cross_entropy_with_logits(logits, y.clamp(min=0), (y >= 0).to(logits.dtype))


def correct(logits, y):
    """Return how many of a batch are right, or the sum of the shares of right known labels (B, K).

    It is a tensor on the device: the caller knows when to wait for it.
    """
    if y.dim() == 2:
        known = y >= 0
        right = ((logits > 0) == (y > 0.5)) & known
        return (right.sum(1) / known.sum(1).clamp(min=1)).sum()
    return (logits.argmax(1) == y).float().sum()


def top_error(scores, labels, k=1):
    """Per cent of the rows of scores (N, classes) whose label is not among the k best."""
    best = scores.topk(min(k, scores.shape[1]), 1).indices
    return 100 * (1 - (best == labels.unsqueeze(1)).any(1).double().mean().item())


# The five observations of CheXpert's competition (arXiv 1901.07031)
TASKS = ['Atelectasis', 'Cardiomegaly', 'Consolidation', 'Edema', 'Pleural Effusion']


def auroc(scores, labels):
    """Area under the ROC curve by Mann and Whitney's statistic, ties counted half, in float64.

    scores, labels: (N,) arrays, labels 0, 1 or below 0 (unknown). None if only one of 0 and 1 is
    there.
    """
    positive = scores[labels == 1].astype(np.float64)
    negative = np.sort(scores[labels == 0].astype(np.float64))
    if not len(positive) or not len(negative):
        return None
    below, upto = (np.searchsorted(negative, positive, side) for side in ('left', 'right'))
    return float((below + upto).mean() / 2 / len(negative))


def areas(scores, labels, classes):
    """{class: area under its ROC curve} of the classes where that is defined."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    values = {name: auroc(scores[:, k], labels[:, k]) for k, name in enumerate(classes)}
    return {name: value for name, value in values.items() if value is not None}


def mean_area(scores, labels, classes, names):
    """Mean area under the ROC curve over some classes, or over all if none of them is there."""
    values = areas(scores, labels, classes)
    chosen = [values[name] for name in names if name in values] or list(values.values())
    return float(np.mean(chosen)) if chosen else None


class Metric(NamedTuple):
    """of(scores (N, classes), labels (N,) or (N, classes), class names) -> number or None."""
    header: str
    digits: int
    of: object
    multilabel: bool = False    # for several labels per image


METRICS = {
    'error': Metric('error %', 2, lambda scores, labels, classes: top_error(scores, labels)),
    'top5_error': Metric('top-5 error %', 2, lambda scores, labels, classes:
                         top_error(scores, labels, 5) if len(classes) > 4 else None),
    'auroc_tasks': Metric('AUROC, 5 tasks', 3, lambda scores, labels, classes:
                          mean_area(scores, labels, classes, TASKS), multilabel=True),
    'auroc': Metric('AUROC, all labels', 3, lambda scores, labels, classes:
                    mean_area(scores, labels, classes, classes), multilabel=True),
}


def gathered(value):
    """[value of each process], of plain types and tensors on the CPU."""
    values = [None] * world()[1]
    if len(values) == 1:
        return [value]
    torch.distributed.all_gather_object(values, value)
    return values


@torch.no_grad()
def predictions(network, batches):
    """(loss, scores (N, classes), labels) of a network in evaluation mode, on the CPU.

    Every process tests a share of the images, each image once. The scores of a study's views
    become one by their maximum, and its labels too (CheXpert).
    """
    network.eval()
    total, scores, labels = 0.0, [], []
    for x, y in batches.epoch():
        logits = network(x)
        total += (loss_of(logits, y) * len(y)).item()
        scores.append(logits.float().cpu())
        labels.append(y.cpu())
    totals, scores, labels, rows = zip(*gathered((total, scores, labels, batches.indices)))
    scores, labels = torch.cat(sum(scores, [])), torch.cat(sum(labels, []))
    loss = sum(totals) / len(labels)
    studies = batches.data.studies
    if studies is None:
        return loss, scores, labels
    _, study = np.unique(studies[np.concatenate(rows)], return_inverse=True)
    study = torch.from_numpy(study).unsqueeze(1).expand_as(scores)
    empty = torch.full((int(study.max()) + 1, scores.shape[1]), -math.inf)
    return loss, empty.scatter_reduce(0, study, scores, 'amax'), \
        empty.scatter_reduce(0, study, labels.float(), 'amax')


def measure(scores, labels, classes):
    """{metric: value} by METRICS, of those that suit the labels."""
    suited = {name: metric for name, metric in METRICS.items()
              if metric.multilabel == (labels.dim() == 2)}
    return {name: metric.of(scores, labels, classes) for name, metric in suited.items()}


def test(network, batches):
    """{'loss', 'n' and every metric} of a network on some images, in evaluation mode."""
    loss, scores, labels = predictions(network, batches)
    return {'loss': loss, 'n': len(labels), **measure(scores, labels, batches.data.classes)}


def bootstrap(scores, labels, classes):
    """{class: 95% interval of its area under the ROC curve}, by drawing rows with replacement."""
    rng, drawn = np.random.Generator(np.random.Philox(0)), {}
    for _ in range(DRAWS):
        rows = rng.integers(0, len(labels), len(labels))
        for name, value in areas(scores[rows], labels[rows], classes).items():
            drawn.setdefault(name, []).append(value)
    return {name: np.percentile(values, [2.5, 97.5]).tolist() for name, values in drawn.items()}


# ---------------------------------------------------------------------------------------------
# Architectures and networks


def find_genotype(arch):
    """(genotype, where it came from) of what --arch names; UserError if there is no such."""
    try:
        return genotypes.find_genotype(arch)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_layers(genotype, layers):
    """UserError if a network of NAS-Bench-201 would not have three equal stages."""
    if isinstance(genotype, str) and (layers < 5 or layers % 3 != 2):
        raise UserError(f'--layers {layers}: a network of NAS-Bench-201 has three stages of N '
                        'cells and two blocks between them, 3 N + 2: take 5, 8, 11, 14, 17, ...')


def cost(genotype, init_channels=36, layers=20, num_classes=10, image_size=32, stem='cifar'):
    """Parameters without and with the auxiliary head, and multiply-adds of one image.

    Multiply-adds are those of convolutions and linear layers, without the auxiliary head.
    """
    with torch.device('meta'):
        network = Network(init_channels, num_classes, layers, genotype, auxiliary=True,
                          stem=stem).eval()
        image = torch.empty(1, 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    params = sum(p.numel() for p in network.parameters())
    head = sum(p.numel() for p in network.auxiliary_head.parameters())
    return {'params': params - head, 'params_auxiliary': params,
            'multiply_adds': counter.get_total_flops() // 2}


def stem_for(stem, image_size, init_channels, auxiliary=False):
    """'cifar' or 'imagenet' for --stem; UserError if it leaves too few pixels."""
    if stem == 'auto':
        stem = 'imagenet' if image_size > 64 else 'cifar'
    least = {'cifar': (8, 29), 'imagenet': (32, 193)}[stem][auxiliary]
    if stem == 'imagenet' and init_channels == 1:
        raise UserError('--init_channels 1 is too few for --stem imagenet, which halves it: take 2 '
                        'or more')
    if image_size < least:
        with_head = ' with --auxiliary' if auxiliary else ''
        raise UserError(f'{image_size} px are too few for --stem {stem}{with_head}: take {least} '
                        'or more')
    return stem


def load_weights(path):
    """(network in evaluation mode, meta) from a weights.pt.

    meta: genotype, init_channels, layers, auxiliary, stem, classes, mean and std (3,) of pixels /
    255, image_size, zoom (1 in old files), multilabel, arch, found_by, data, has_test and the
    settings with which the data are read.
    """
    content = load_file(path, 'retrain again')
    try:
        meta = content['meta']
        network = Network(meta['init_channels'], len(meta['classes']), meta['layers'],
                          from_plain(meta['genotype'], str(path)), auxiliary=meta['auxiliary'],
                          stem=meta['stem'])
        network.load_state_dict(content['network'])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'{path} is no network that this code can build ({reason}): retrain again, '
                        'or use the code in scripts/ beside it') from None
    return network.eval(), meta


def predict(network, meta, paths):
    """Probabilities, float (N, classes), of the classes (or labels) of picture files.

    The pictures are prepared as those of the test are: see read_image.
    """
    mean, std = torch.tensor(meta['mean']) * 255, torch.tensor(meta['std']) * 255
    rows = []
    with torch.no_grad():
        for path in paths:
            pixels = read_image(path, meta['image_size'], meta.get('zoom', 1.0))
            x = (torch.from_numpy(pixels.copy()).float() - mean) / std
            rows.append(network(x.permute(2, 0, 1).unsqueeze(0)).squeeze(0))
    logits = torch.stack(rows)
    return logits.sigmoid() if meta['multilabel'] else logits.softmax(1)


# ---------------------------------------------------------------------------------------------
# Reading runs


def read_json(path):
    """The object in a JSON file of a run; UserError for a damaged or missing one."""
    try:
        content = json.loads(Path(path).read_text())
        if isinstance(content, dict):
            return content
    except FileNotFoundError:
        raise UserError(f'{path} is missing: give the folder of a run') from None
    except ValueError:
        pass
    raise UserError(f'{path} is damaged: take it from a copy, or run again')


def read_log(folder):
    """The lines of log.jsonl, as dictionaries; a line that a kill cut short is left out."""
    path, lines = Path(folder) / 'log.jsonl', []
    text = path.read_text() if path.exists() else ''
    for number_, line in enumerate(text.split('\n')[:-1], 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise UserError(f'{path}: line {number_} is damaged: --resume the run, which writes '
                            'it again') from None
    return lines


def method_name(settings):
    """The method of a search, with what makes it another one."""
    name = settings['method']
    if settings.get('unrolled'):
        name += ', second order'
    if name == 'sdarts' and settings['perturb'] != 'random':
        name += ', adversarial'
    if settings.get('max_steps') == 0:
        name += ', no steps'
    return name


def read_run(run):
    """What a run's folder says of it, as a dictionary; a retrained network is not tested.

    Keys: run, type ('search' or 'retrain'), finished, settings, command, git_commit, device, seed,
    searched_on, method, arch_data, genotype (None before the end), epochs, seconds, log; of a
    search its space and what is known of the cell; of a retraining arch, trained_on and the
    metrics of the last epoch.
    """
    folder = Path(run)
    about = read_json(folder / 'args.json')
    settings, log = about['settings'], read_log(folder)
    row = {'run': str(folder), 'type': 'search' if 'method' in settings else 'retrain',
           'finished': False, 'settings': settings, 'command': about['command'],
           'git_commit': about.get('git_commit'), 'device': about['hardware']['device'],
           'seed': settings['seed'], 'genotype': None, 'epochs': len(log),
           'seconds': sum(line['seconds'] for line in log), 'log': log}
    if row['type'] == 'search':
        row.update(space=settings.get('space', 'darts'), method=method_name(settings),
                   searched_on=settings['data'], arch_data=settings.get('arch_data'))
        if (folder / 'genotype.json').exists():
            genotype, found_by = find_genotype(str(folder))
            row.update(finished=True, genotype=plain(genotype), searched_on=found_by['data'],
                       arch_data=found_by['arch_data'], **known_of(genotype))
        return row
    noise = settings.get('label_noise', 1.0)
    trained_on = settings['data']
    if trained_on == 'random_labels' and noise < 1:
        trained_on += f' {noise:g}'
    row.update(arch=settings['arch'], trained_on=trained_on,
               finished=(folder / 'weights.pt').exists())
    for name, value in (log[-1] if log else {}).items():
        if name.startswith(('fit_', 'test_', 'holdout_')):
            row[name] = value
    return with_gap(row)


def with_gap(row):
    """A row with the gap between its test and its training error, in points, if it has both."""
    if row.get('test_error') is not None and row.get('fit_error') is not None:
        row['gap'] = row['test_error'] - row['fit_error']
    return row


def known_of(genotype):
    """What is known of a cell: skips, parameters of the network that it is retrained as by default,
    and, in NAS-Bench-201, its true accuracy.

    Distances are in points of CIFAR-10, CIFAR-100 and ImageNet16-120 test accuracy: to the best
    cell, to the median one and to the largest network, which a search must beat to have been of
    use.
    """
    if not isinstance(genotype, str):
        skips = {f'skips_{cell}': sum(op == 'skip_connect' for op, _ in getattr(genotype, cell))
                 for cell in ('normal', 'reduce')}
        return {**skips, 'params': cost(genotype)['params']}
    table, ordered = nas_bench_201()
    names, true = from_string(genotype), genotypes.truth(genotype)
    others = {'to_optimum': {name: ordered[name][-1] for name in ACCURACIES},
              'to_median': {name: ordered[name][len(table) // 2] for name in ACCURACIES},
              'to_largest': table[NB201_LARGEST]}
    distances = {key: [round(true[name] - values[name], 2) for name in ACCURACIES]
                 for key, values in others.items()}
    return {**true, **distances, 'skips': names.count('skip_connect'),
            'nones': names.count('none'), 'params': table[genotype]['params']}


def read_test(meta, data_dir=None, table=None):
    """The test images of a retrained network, with its own classes, mean and deviation.

    data_dir: where real data are now; table: a CSV of CheXpert's test set. None if there are none.
    """
    settings = {**meta['settings'], 'image_size': meta['image_size']}
    if data_dir:
        settings['data_dir'] = data_dir
    if table:
        if meta['classes'] != list(CHEXPERT):
            raise UserError(f'--test_labels {table}: the network was not trained on chexpert: '
                            'leave it out')
        data = read_chexpert('chexpert', settings, 'test', table)
    elif not meta['has_test']:
        return None
    else:
        moved = data_dir and meta['data'] not in REAL
        data = read(data_dir if moved else meta['data'], settings, 'test')
    if data is None:
        raise UserError(f'{data_dir or meta["data"]} has no test images any more: give the folder '
                        'that the network was trained on')
    if data.classes != meta['classes']:
        unknown = sorted(set(data.classes) - set(meta['classes']))
        if unknown or data.multilabel:
            raise UserError(f'{data.name} has classes that the network does not know: '
                            f'{", ".join(unknown[:5])}: give the data that it was trained on')
        place = np.array([meta['classes'].index(name) for name in data.classes])
        data = replace(data, labels=place[data.labels], classes=meta['classes'])
    return replace(data, mean=meta['mean'], std=meta['std'])


def report(run, device, data_dir=None, test_labels=None):
    """What read_run returns, and for a finished retraining its cost and its test."""
    row = read_run(run)
    if row['type'] == 'search' or not row['finished']:
        return row
    network, meta = load_weights(Path(run) / 'weights.pt')
    found_by = meta['found_by']
    row.update(searched_on=found_by['data'], method=found_by['method'],
               arch_data=found_by.get('arch_data'), genotype=meta['genotype'],
               **cost(from_plain(meta['genotype']), meta['init_channels'], meta['layers'],
                      len(meta['classes']), meta['image_size'], meta['stem']))
    data = read_test(meta, data_dir, test_labels)
    if data is None:
        return row
    batches = Batches(data, range(len(data)), EVALUATION_BATCH[data.image_size > 64], device,
                      shuffle=False)
    loss, scores, labels = predictions(network.to(device), batches)
    values = measure(scores, labels, data.classes)
    row.update(test_loss=loss, test_n=len(labels),
               tested=(scores.numpy(), labels.numpy(), data.classes),
               **{f'test_{name}': value for name, value in values.items()})
    if data.multilabel:
        intervals = bootstrap(scores.numpy(), labels.numpy(), data.classes)
        values = areas(scores, labels, data.classes)
        row['test_areas'] = {name: [value, *intervals[name]] for name, value in values.items()}
    return with_gap(row)


# ---------------------------------------------------------------------------------------------
# One run, and the table of several


UNSAID = 'log', 'settings', 'tested'        # of a run: too long for a list


def show(row):
    """Print one run as a list, with units."""
    print(row['run'])
    for name, value in row.items():
        if value is None or name in ('run', 'finished', *UNSAID):
            continue
        if name == 'genotype' and isinstance(value, dict):
            for cell in ('normal', 'reduce'):
                pairs = '  '.join(f'{op}:{state}' for op, state in value[cell])
                print(f'  {cell:<17} {pairs}')
        elif name == 'test_areas':
            for label, (area, low, high) in value.items():
                print(f'  {label:<28} AUROC {area:.3f} (95%: {low:.3f} to {high:.3f})')
        else:
            print(f'  {name.replace("_", " "):<17} {text_of(name, value)}')


def text_of(name, value):
    """A number of a report with its unit."""
    if name in ACCURACIES or name.endswith('error'):
        return f'{value:.2f}%'
    if name == 'gap' or name.startswith('to_'):
        return '  '.join(f'{points:+.2f}' for points in np.atleast_1d(value)) + ' points'
    if name == 'seconds':
        return f'{timedelta(seconds=round(value))} (h:mm:ss)'
    if isinstance(value, float):
        return f'{value:,.4g}'
    return f'{value:,}' if isinstance(value, int) and name != 'seed' else value


def columns():
    """{measure: (header, digits)} of the table, in its order."""
    out = {}
    for part in ('test', 'fit', 'holdout'):
        for name, metric in METRICS.items():
            out[f'{part}_{name}'] = (f'{part} {metric.header}', metric.digits)
    return {**out, 'gap': ('test - fit, points', 2), 'fit_loss': ('fit loss', 3),
            'cifar10': ('CIFAR-10 %', 2), 'cifar100': ('CIFAR-100 %', 2),
            'imagenet16': ('ImageNet16 %', 2), 'percentile': ('percentile', 1),
            'skips': ('skips', 1), 'nones': ('nones', 1), 'skips_normal': ('skips (normal)', 1),
            'params': ('params', 0), 'seconds': ('seconds', 0)}


GROUPS = 'type', 'space', 'searched_on', 'method', 'arch_data', 'trained_on'


def table(rows):
    """Runs that differ only in their seeds, in one line: [{group, n, measure, measure_std}]."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in GROUPS), []).append(row)
    lines = []
    for key, runs in groups.items():
        line = {**dict(zip(GROUPS, key)), 'n': len(runs)}
        for name in columns():
            values = [row[name] for row in runs if row.get(name) is not None]
            if values:
                line[name] = float(np.mean(values))
                line[f'{name}_std'] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        lines.append(line)
        names = sorted(differences(runs))
        if names:
            print(f'{" ".join(str(word) for word in key if word)}: averaged over runs that differ '
                  f'in {", ".join(names)}', file=sys.stderr)
    return lines


def differences(runs):
    """Names of the settings, apart from seeds and MAY_DIFFER, in which runs differ."""
    first, names = runs[0]['settings'], set()
    for run in runs:
        names |= {name for name in first.keys() | run['settings'].keys()
                  if run['settings'].get(name) != first.get(name)}
    return names - MAY_DIFFER - {'seed', 'data_seed', 'arch'}


def print_table(lines):
    """Print what `table` returns: mean ± standard deviation over the runs of a group."""
    known = {name: text for name, text in columns().items()
             if any(line.get(name) is not None for line in lines)}
    about = [name for name in (*GROUPS, 'n') if any(line.get(name) is not None for line in lines)]
    texts = [[name.replace('_', ' ') for name in about] + [header for header, _ in known.values()]]
    for line in lines:
        cells = ['-' if line.get(name) is None else str(line[name]) for name in about]
        for name, (_, digits) in known.items():
            cell = '-' if line.get(name) is None else f'{line[name]:,.{digits}f}'
            if line.get(f'{name}_std') is not None:
                cell += f' ± {line[f"{name}_std"]:,.{digits}f}'
            cells.append(cell)
        texts.append(cells)
    widths = [max(map(len, column)) for column in zip(*texts)]
    for cells in texts:
        print('  '.join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())


# ---------------------------------------------------------------------------------------------
# Plots


def mean_of(line, start):
    """Mean over the cells of a log line's values whose names begin with `start`, or None."""
    values = [value for name, value in line.items()
              if name.startswith(start) and value is not None]
    return sum(values) / len(values) if values else None


def percent(share):
    return None if share is None else 100 * share


# A panel: its title, and a function from a line of the log to what it shows, or None.
PANELS = {
    'training loss': lambda line: line.get('train_loss'),
    'training accuracy, %': lambda line: percent(line.get('train_accuracy')),
    'held-out loss': lambda line: line.get('valid_loss'),
    'held-out accuracy, %': lambda line: percent(line.get('valid_accuracy')),
    'entropy of the alphas, nats': lambda line: mean_of(line, 'entropy_'),
    'skips in a cell': lambda line: mean_of(line, 'skips_'),
    'true CIFAR-10 accuracy, %':
        lambda line: line.get('truth_for_analysis_only', {}).get('cifar10'),
    'held-out error, %': lambda line: line.get('holdout_error'),
    'held-out AUROC': lambda line: line.get('holdout_auroc_tasks'),
    'test error, %': lambda line: line.get('test_error'),
    'test AUROC': lambda line: line.get('test_auroc_tasks'),
}


def plot(rows, path):
    """Draw runs to a PNG, SVG or PDF file: one panel per quantity over the epochs, one colour per
    group. Three or more retrainings: also fit against test error. One retraining: also its test.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError('--plot needs matplotlib: pip install matplotlib') from None
    matplotlib.use('Agg')
    from matplotlib import pyplot
    panels, colours = [], {}                            # functions that draw on an axis
    for row in rows:
        words = [row.get('method') or row.get('arch'), row.get('searched_on'),
                 row.get('trained_on')]
        row['group'] = ' on '.join(word for word in words if word)
        colours.setdefault(row['group'], f'C{len(colours)}')
    for title, value_of in PANELS.items():
        lines = [(colours[row['group']], [value_of(line) for line in row['log']]) for row in rows]
        if any(value is not None for _, values in lines for value in values):
            panels.append(partial(draw_curves, title, lines))
    fits = [row for row in rows if row.get('gap') is not None]
    if len(fits) > 2:
        panels.append(partial(draw_fits, fits, colours))
    elif len(rows) == 1 and 'tested' in rows[0]:
        panels.append(partial(draw_test, *rows[0]['tested'], rows[0].get('test_areas')))
    if not panels:
        raise UserError('--plot: these runs have no log to draw: give runs that have begun')
    heights = [6 if panel.func is draw_test else 2.4 for panel in panels]
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(8, sum(heights)), squeeze=False,
                                   layout='constrained', height_ratios=heights)
    for axis, panel in zip(axes[:, 0], panels):
        panel(axis)
    handles = [pyplot.Line2D([], [], color=c, label=name) for name, c in colours.items()]
    figure.legend(handles=handles, loc='outside lower center', ncols=2, fontsize=9)
    buffer = io.BytesIO()
    try:
        figure.savefig(buffer, format=Path(path).suffix[1:] or 'png', dpi=120)
    except ValueError:
        raise UserError(f'--plot {path}: unknown kind of picture: name it .png, .svg or '
                        '.pdf') from None
    pyplot.close(figure)
    write_file(path, buffer.getvalue())


def draw_curves(title, lines, axis):
    """lines: (colour, the value of each epoch or None)."""
    for colour, values in lines:
        points = [(epoch, value) for epoch, value in enumerate(values, 1) if value is not None]
        if points:
            axis.plot(*zip(*points), color=colour, marker='.', alpha=0.8)
    axis.set_title(title, fontsize=10, loc='left')
    axis.set_xlabel('epoch', fontsize=9)
    axis.grid(alpha=0.3)


def draw_fits(rows, colours, axis):
    """One dot per retraining; the axis is logarithmic, because most losses are close to 0."""
    for row in rows:
        axis.plot(row['fit_loss'], row['test_error'], 'o', color=colours[row['group']], alpha=0.7)
    axis.set(xscale='log', xlabel='loss on training images', ylabel='test error, %')
    axis.set_title('fit and generalization, one dot per network', fontsize=10, loc='left')
    axis.grid(alpha=0.3)


def draw_test(scores, labels, classes, test_areas, axis):
    """The confusion matrix of a test, or the ROC curve of each label."""
    if labels.ndim == 1:
        counts = np.zeros((len(classes), len(classes)), int)
        np.add.at(counts, (labels, scores.argmax(1)), 1)
        axis.imshow(counts, cmap='Blues')
        if len(classes) <= 20:
            axis.set(xticks=range(len(classes)), yticks=range(len(classes)), yticklabels=classes)
            axis.set_xticklabels(classes, rotation=90)
            for (row, column), count in np.ndenumerate(counts):
                dark = count > counts.max() / 2
                axis.text(column, row, count, ha='center', va='center', fontsize=8,
                          color='white' if dark else 'black')
        axis.set(xlabel='predicted class', ylabel='true class')
        axis.set_title('test images by class', fontsize=10, loc='left')
        return
    for name, (area, low, high) in test_areas.items():
        k = classes.index(name)
        known = labels[:, k] >= 0
        truth = labels[known, k][np.argsort(-scores[known, k], kind='stable')] == 1
        axis.plot(np.cumsum(~truth) / (~truth).sum(), np.cumsum(truth) / truth.sum(),
                  label=f'{name} {area:.2f} ({low:.2f} to {high:.2f})')
    axis.plot([0, 1], [0, 1], '--', color='gray', lw=1)
    axis.legend(fontsize=7, title='area (95%)', title_fontsize=8)
    axis.set(xlabel='false positive rate', ylabel='true positive rate')
    axis.set_title('ROC curves of the test', fontsize=10, loc='left')


# ---------------------------------------------------------------------------------------------

RUNS = {
    'runs': Setting([], 'folders of runs'),
    'json': Setting(False, 'print one JSON line for each run'),
    'csv': Setting(None, 'write the table to this file'),
    'plot': Setting(None, 'draw what the runs did by epoch: .png, .svg or .pdf'),
    'predict': Setting(None, 'a picture, or a folder of pictures, for one retrained network'),
    'data_dir': Setting(None, 'where the real data are now'),
    'gpu': Setting(0, 'CUDA device, -1: the CPU', number(int, -1)),
    'test_labels': Setting(None, "a CSV of CheXpert's test set"),
}
COST = {
    'cost': Setting(False, 'count the network of --arch'),
    'arch': Setting(None, 'a published name, a genotype.json or the folder of a search'),
    'init_channels': Setting(36, 'of NAS-Bench-201 by default 16', number(int, 1, 4096)),
    'layers': Setting(20, 'cells; of NAS-Bench-201 by default 17', number(int, 1, 200)),
    'num_classes': Setting(10, 'classes of the network', number(int, 1, 10 ** 6)),
    'image_size': Setting(32, 'pixels', number(int, 8, 4096)),
    'stem': Setting('auto', 'one convolution, or three of stride 2; auto: these above 64 px',
                    ['auto', 'cifar', 'imagenet']),
}


def show_cost(s, as_json):
    """Print parameters and multiply-adds of the network of --arch."""
    if not s['arch']:
        raise UserError('--cost needs --arch: give a published name, a genotype.json or a run')
    genotype, _ = find_genotype(s['arch'])
    check_layers(genotype, s['layers'])
    stem = stem_for(s['stem'], s['image_size'], s['init_channels'])
    counts = cost(genotype, s['init_channels'], s['layers'], s['num_classes'], s['image_size'],
                  stem)
    if as_json:
        print(json.dumps(counts))
        return
    for name, count in counts.items():
        print(f'{name:<18} {count:>15,}')


def show_predictions(run, target):
    """Print the class of each picture and its probability, or the probability of each label."""
    network, meta = load_weights(Path(run) / 'weights.pt')
    paths = [Path(target)]
    if paths[0].is_dir():
        from torchvision.datasets.folder import IMG_EXTENSIONS
        paths = sorted(path for path in paths[0].rglob('*')
                       if path.suffix.lower() in IMG_EXTENSIONS)
    writer = csv.writer(sys.stdout, lineterminator='\n')
    if meta['multilabel']:
        writer.writerow(['file', *meta['classes']])
    else:
        writer.writerow(['file', 'class', 'probability'])
    for path in paths:
        row = predict(network, meta, [path])[0]
        if meta['multilabel']:
            writer.writerow([path, *(f'{p:.4f}' for p in row.tolist())])
        else:
            writer.writerow([path, meta['classes'][row.argmax()], f'{row.max():.4f}'])


@one_line_errors
def main(argv=None):
    def defaults_for(typed, chosen):
        is_string = chosen['arch'] and isinstance(find_genotype(chosen['arch'])[0], str)
        return {'init_channels': 16, 'layers': 17} if is_string else {}

    s, typed, _ = parse_flags(__doc__, {'runs': RUNS, 'cost without training': COST}, argv,
                              defaults_for)
    unused = (RUNS if s['cost'] else COST).keys() & typed.keys() - {'json', 'gpu'}
    if unused:
        raise UserError(f'--{min(unused)} means nothing {"with" if s["cost"] else "without"} '
                        '--cost: leave it out')
    for name in ('csv', 'plot'):
        if s[name] and (Path(s[name]).is_dir() or not Path(s[name]).resolve().parent.is_dir()):
            raise UserError(f'--{name} {s[name]}: it must be a file in a folder that exists: '
                            'choose another')
    if s['cost']:
        show_cost(s, s['json'])
        return
    if not s['runs']:
        raise UserError('nothing to evaluate: give the folders of runs, or --arch NAME --cost')
    if s['predict']:
        if len(s['runs']) > 1 or typed.keys() - {'runs', 'predict', 'gpu'}:
            raise UserError('--predict takes one run and no other flag: leave the others out')
        show_predictions(s['runs'][0], s['predict'])
        return
    folders = list(dict.fromkeys(os.path.normpath(run) for run in s['runs']))
    trained = any((Path(run) / 'weights.pt').exists() for run in folders)
    device = choose_device(s['gpu'] if trained else -1)
    rows = [report(run, device, s['data_dir'], s['test_labels']) for run in folders]
    for row in rows:
        if not row['finished']:
            print(f'{row["run"]}: {row["epochs"]} of {row["settings"]["epochs"]} epochs, not '
                  'finished: --resume it', file=sys.stderr)
    done = [row for row in rows if row['finished']]
    lines = table(done)
    if s['json']:
        for row in done:
            print(json.dumps({name: value for name, value in row.items()
                              if name not in ('log', 'tested')}))
    elif len(done) == 1:
        show(done[0])
    elif done:
        print_table(lines)
    if s['plot']:
        plot(rows, s['plot'])
    if s['csv']:
        text = io.StringIO()
        names = dict.fromkeys(name for line in lines for name in line)
        writer = csv.DictWriter(text, names, lineterminator='\n')
        writer.writeheader()
        writer.writerows(lines)
        write_file(s['csv'], text.getvalue())


if __name__ == '__main__':
    leave(main())
