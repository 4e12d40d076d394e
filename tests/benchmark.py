"""Time, calls and memory of our steps against the textbook's, the same weights in both.

    python tests/benchmark.py                   # the table; about 20 minutes on two cores
    python tests/benchmark.py --only darts1_b16
    python tests/benchmark.py --imagenet        # steps at 224 px, and the batches that fit a GPU
    python tests/benchmark.py --methods         # every method's step; NAS-Bench-201's textbook
    python tests/benchmark.py --probe FOLDER    # how learnable a data set is

A search step is one architecture and one weight step (C=16, 8 cells, 32 px); a retrain step one
of DARTS_V2 (C=36, 20 cells, auxiliary head, drop-path). CPU seconds of the process: medians of n,
the two sides taking turns. Calls reach torch's dispatcher; views and reading a number do not count.
Peak memory is that of one step, each side in a process of its own.
"""
import argparse
import functools
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import generate_data
import retrain
import search
from genotypes import DARTS_V2
from model_search import Network

import numpy as np
import textbook
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Case(NamedTuple):
    """A step to measure. Above 64 pixels the networks are ImageNet's."""
    partial: int            # of the channels; 0: a step of retraining
    unrolled: bool
    batch: int
    repeats: int            # 0: memory only
    pixels: int = 32
    width: int = 16         # C of a search


CASES = {
    'darts1_b16': Case(1, False, 16, 5), 'darts1_b64': Case(1, False, 64, 3),
    'darts2_b16': Case(1, True, 16, 5), 'darts2_b64': Case(1, True, 64, 0),
    'pcdarts1_b32': Case(4, False, 32, 5), 'pcdarts2_b32': Case(4, True, 32, 5),
    'retrain_b96': Case(0, False, 96, 3)}
IMAGENET = {
    'darts1_224_b8': Case(1, False, 8, 3, 224), 'darts2_224_b8': Case(1, True, 8, 0, 224),
    'pcdarts1_224_b8': Case(2, False, 8, 3, 224), 'retrain_224_b8': Case(0, False, 8, 3, 224)}
CPU = torch.device('cpu')


class Calls(TorchDispatchMode):
    """Counts what a GPU would launch."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        free = ('empty', 'new_empty', 'detach', '_local_scalar_dense', '_unsafe_view')
        self.count += not (function.is_view or function.__name__.startswith(free))
        return function(*args, **(kwargs or {}))


def batch(n, size=32, device=CPU):
    return torch.randn(n, 3, size, size, device=device), torch.randint(10, (n,), device=device)


def steps(case, sides=('ours', 'book'), device=CPU, graph=False, flags=()):
    """{side: a function that takes one step}, the same weights on both sides.

    graph: whether ours is a CUDA graph; flags: more flags for our side.
    """
    torch.manual_seed(0)
    retraining, large = case.partial == 0, case.pixels > 64
    shape, extra = (case.width, 1000 if large else 10, 8), {'partial': case.partial}
    if retraining:
        shape = (48, 1000, 14, DARTS_V2) if large else (36, 10, 20, DARTS_V2)
        extra = {'auxiliary': True}
    extra['stem'] = 'imagenet' if large else 'cifar'
    networks = {'ours': Network(*shape, **extra)}
    if 'book' in sides:
        networks['book'] = textbook.Network(*shape, **extra)
        textbook.copy_weights(networks['ours'], networks['book'])
    data = (*batch(case.batch, case.pixels, device), *batch(case.batch, case.pixels, device))
    functions = {}
    for side in sides:
        network = networks[side].to(device).train()
        if retraining:
            network.drop_path_prob, data = torch.tensor(0.1, device=device), data[:2]
            step, changed = retrain_step(network, flags)
        elif side == 'ours':
            step, changed = search_step(network, case.unrolled, flags)
        else:
            step, changed = textbook.Step(network, case.unrolled), None
        step = retrain.GraphedStep(step, changed, device, graph and side == 'ours')
        functions[side] = functools.partial(step, *data)
    return functions


def search_step(network, unrolled, flags=()):
    """(our step, what it changes), with search.py's own optimizers."""
    args = search.parse([*flags, *(['--unrolled'] if unrolled else [])])
    method = search.Darts(args, 10, 'cifar', next(network.parameters()).device)
    method.network = network
    sgd, adam = search.optimizers(network, args)
    return (lambda a, b, c, d: search.bilevel_step(method, (a, b), (c, d), sgd, adam),
            lambda: retrain.tensors_of_a_step(network, sgd, adam))


def retrain_step(network, flags=()):
    args = retrain.parse(['--arch', 'DARTS_V2', '--auxiliary', *flags])
    sgd = retrain.make_optimizer(list(network.parameters()), args)
    return (lambda *batch: retrain.train_step(network, batch, sgd, args),
            lambda: retrain.tensors_of_a_step(network, sgd))


def seconds(functions, n):
    """{name: median CPU seconds of n calls}, the functions taking turns after one call each."""
    taken = {name: [] for name in functions}
    for turn in range(n + 1):
        for name, function in functions.items():
            began = time.process_time()
            function()
            if turn:
                taken[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in taken.items()}


def peak(name, side):
    """Peak MiB of one step above what the process held before it, in a process of its own."""
    command = [sys.executable, __file__, '--only', name, '--peak', side]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure(name):
    """{'ratio', 'memory_ratio', 'launches', 'launches_textbook', 'cpu_seconds', ...}"""
    case = {**CASES, **IMAGENET}[name]
    ours, book = peak(name, 'ours'), peak(name, 'book')
    row = {'n': case.repeats}
    if case.repeats:
        taken = seconds(steps(case), case.repeats)
        row.update(ratio=taken['book'] / taken['ours'], cpu_seconds=taken['ours'],
                   cpu_seconds_textbook=taken['book'])
        for side, step in steps(case._replace(batch=2)).items():    # as many calls as for more
            step()                          # the optimizers' first step makes their buffers
            with Calls() as calls:
                step()
            row['launches' if side == 'ours' else 'launches_textbook'] = calls.count
    for gib in (11, 24, 80) if name in IMAGENET else ():            # memory grows with the images
        row[f'batch_in_{gib}_gib'] = int(0.9 * gib * 1024 / ours * case.batch)
    return {**row, 'memory_mib': ours, 'memory_mib_textbook': book, 'memory_ratio': ours / book}


def show(name, row):
    words = [f'{key} {value:.3g}' if isinstance(value, float) else f'{key} {value}'
             for key, value in row.items()]
    print(f'{name:<13}', '  '.join(words), flush=True)


# Space, cells or cells a stage, batch, pixels
SETTINGS = {'darts, 8 cells, batch 16, 32 px': ('darts', 8, 16, 32),
            'nb201, N=5, batch 16, 32 px': ('nb201', 5, 16, 32),
            'nb201, N=1, batch 64, 16 px': ('nb201', 1, 64, 16)}
METHODS = {'darts': [], 'pcdarts': [], 'gdas': [], 'sdarts': [],
           'sdarts adversarial': ['--perturb', 'adversarial'], 'dartsminus': [], 'betadarts': []}


def methods(n=5):
    """{setting, method: CPU seconds of a first-order step, and those of DARTS by them}.

    In NAS-Bench-201 the textbook's supernet beside them, with the weights of the one of DARTS.
    """
    rows = {}
    for setting, (space, cells, size, pixels) in SETTINGS.items():
        data, functions = (batch(size, pixels), batch(size, pixels)), {}
        for name, flags in METHODS.items():
            length = '--layers' if space == 'darts' else '--cells_per_stage'
            args = search.parse(['--space', space, '--method', name.split()[0], length, str(cells),
                                 *flags])
            method = search.METHODS[args.method](args, 10, 'cifar', CPU)
            network = method.build()
            method.begin_epoch(10, 50)
            functions[name] = functools.partial(search.bilevel_step, method, *data,
                                                *search.optimizers(network, args))
            if name == 'darts' and space == 'nb201':
                book = textbook.NB201Network(16, 10, cells)
                textbook.copy_weights(network, book)
                functions['textbook'] = functools.partial(textbook.Step(book, False),
                                                           *sum(data, ()))
        taken = seconds(functions, n)
        for name, value in taken.items():
            rows[f'{setting}, {name}'] = {'cpu_seconds': value,
                                          'darts_by_it': taken['darts'] / value}
    return rows


def fit_probe(data, rows):
    """Train four convolutions on some images of a Data: 10 epochs, batch 128, Adam 1e-3."""
    torch.manual_seed(0)
    layers = [torch.nn.AvgPool2d(max(1, data.image_size // 64), ceil_mode=True)]    # to 64 px
    for c_in, c_out in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [torch.nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
                   torch.nn.BatchNorm2d(c_out), torch.nn.ReLU(),
                   torch.nn.MaxPool2d(2, ceil_mode=True)]
    network = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                                  torch.nn.Linear(128, len(data.classes)))
    network.to(memory_format=torch.channels_last)
    adam = torch.optim.Adam(network.parameters(), 1e-3)
    batches = generate_data.Batches(data, rows, min(128, len(rows)), CPU)
    for epoch in range(10):
        for x, y in batches.epoch(epoch):
            torch.nn.functional.cross_entropy(network(x), y).backward()
            adam.step()
            adam.zero_grad()
    return network.eval()


def nearest_neighbour(data, rows):
    """predict(x): scores of the class that the nearest of some images has, by pixels."""
    pool = torch.nn.AvgPool2d(max(1, data.image_size // 64), ceil_mode=True)
    batches = generate_data.Batches(data, rows, 200, CPU, shuffle=False)
    known, labels = map(torch.cat, zip(*batches.epoch()))
    known, eye = pool(known).flatten(1), torch.eye(len(data.classes))
    return lambda x: eye[labels[torch.cdist(pool(x).flatten(1), known).argmin(1)]]


@torch.no_grad()
def accuracy(predict, data, rows):
    """Per cent right of predict(x) -> scores (B, classes)."""
    batches = generate_data.Batches(data, rows, 200, CPU, shuffle=False)
    right = sum((predict(x).argmax(1) == y).sum().item() for x, y in batches.epoch())
    return 100 * right / len(rows)


def probe(folder, against, data_dir):
    """Train on nine tenths, test on the rest; `against` a real set also each on the other."""
    data = generate_data.read(folder, {})
    train, test = generate_data.stratified_split(data.labels, 0.9, 0)
    found = {'network': accuracy(fit_probe(data, train), data, test),
             'nearest_neighbour': accuracy(nearest_neighbour(data, train), data, test),
             'n_test': len(test)}
    if against:
        s = {'data_dir': data_dir, 'image_size': data.image_size}
        real = generate_data.read(against, s)
        held_out = generate_data.read(against, s, 'test') or real
        as_many = np.sort(np.random.default_rng(0).permutation(len(real))[:len(data)])
        made, learned = fit_probe(data, range(len(data))), fit_probe(real, as_many)
        found.update(generated_to_real=accuracy(made, held_out, range(len(held_out))),
                     real_to_generated=accuracy(learned, data, range(len(data))),
                     real_to_real=accuracy(learned, held_out, range(len(held_out))))
    return {folder: found}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--only', choices=[*CASES, *IMAGENET], help='one case')
    parser.add_argument('--imagenet', action='store_true', help='steps at 224 px')
    parser.add_argument('--methods', action='store_true', help="every method's step")
    parser.add_argument('--peak', choices=['ours', 'book'], help=argparse.SUPPRESS)
    parser.add_argument('--probe', metavar='FOLDER', help='how learnable a data set is')
    parser.add_argument('--against', help='with --probe: the real set that its generator learned')
    parser.add_argument('--data_dir', default='data', help='of --against')
    args = parser.parse_args(argv)
    device = generate_data.choose_device(-1)
    if args.peak:
        step = steps({**CASES, **IMAGENET}[args.only], {'ours', args.peak})[args.peak]
        held = retrain.peak_memory_mib(CPU)
        step()
        print(retrain.peak_memory_mib(CPU) - held)
        return
    if args.probe:
        results = probe(args.probe, args.against, args.data_dir)
    elif args.methods:
        results = methods()
    else:
        names = [args.only] if args.only else IMAGENET if args.imagenet else CASES
        results = {name: measure(name) for name in names}
    for name, row in results.items():
        show(name, row)
    print(retrain.hardware(device), 'torch', torch.__version__)


if __name__ == '__main__':
    main()
