"""Time, calls and memory of our steps against the textbook's, the same weights in both.

    python tests/benchmark.py                   # the table; about 20 minutes on two cores
    python tests/benchmark.py --only darts1_b16
    python tests/benchmark.py --imagenet        # steps at 224 px, and the batches that fit a GPU
    python tests/benchmark.py --gpu             # equality and speed on a CUDA device, 8 minutes
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
    """{side: a function that takes one step}, of equal weights; graph, flags: of our side."""
    torch.manual_seed(0)
    retraining, large = case.partial == 0, case.pixels > 64
    shape, extra = (16, 1000 if large else 10, 8), {'partial': case.partial}
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
            more = ['--unrolled'] * case.unrolled
            step, changed, *_ = search_step([*flags, *more], device, network)
        else:
            step, changed = textbook.Step(network, case.unrolled), None
        step = retrain.GraphedStep(step, changed, device, graph and side == 'ours')
        functions[side] = functools.partial(step, *data)
    return functions


def search_step(flags, device=CPU, network=None):
    """(our step, what it changes, method, SGD) by search.py's flags; without a network its own."""
    args = search.parse(flags)
    method = search.METHODS[args.method](args, 10, 'cifar', device)
    method.network = network or method.build()
    sgd, adam = search.optimizers(method.network, args)
    return (lambda *batches: search.bilevel_step(method, batches[:2], batches[2:], sgd, adam),
            lambda: retrain.tensors_of_a_step(method.network, sgd, adam), method, sgd)


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


def probe(folder):
    """Per cent right on a tenth of a set: of four convolutions trained on the rest, and 1-NN."""
    torch.manual_seed(0)
    data = generate_data.read(folder, {})
    train, test = generate_data.stratified_split(data.labels, 0.9, 0)
    pool = torch.nn.AvgPool2d(max(1, data.image_size // 64), ceil_mode=True)        # to 64 px
    layers = [pool]
    for c_in, c_out in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [torch.nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
                   torch.nn.BatchNorm2d(c_out), torch.nn.ReLU(),
                   torch.nn.MaxPool2d(2, ceil_mode=True)]
    network = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                                  torch.nn.Linear(128, len(data.classes)))
    network.to(memory_format=torch.channels_last)
    adam = torch.optim.Adam(network.parameters(), 1e-3)
    batches = generate_data.Batches(data, train, min(128, len(train)), CPU)
    for epoch in range(10):
        for x, y in batches.epoch(epoch):
            torch.nn.functional.cross_entropy(network(x), y).backward()
            adam.step()
            adam.zero_grad()
    right, known = torch.zeros(2), generate_data.Batches(data, train, 200, CPU, shuffle=False)
    known, labels = map(torch.cat, zip(*((pool(x).flatten(1), y) for x, y in known.epoch())))
    network.eval()
    with torch.no_grad():
        for x, y in generate_data.Batches(data, test, 200, CPU, shuffle=False).epoch():
            nearest = labels[torch.cdist(pool(x).flatten(1), known).argmin(1)]
            right += torch.stack([(network(x).argmax(1) == y).sum(), (nearest == y).sum()])
    names = 'network', 'nearest_neighbour'
    return {folder: dict(zip(names, (100 * right / len(test)).tolist()), n_test=len(test))}


# On a GPU: equality with the textbook; each method's graph against its eager steps, while rates
# and draws change; time, calls and memory of a step, hours of a whole run.
RUNS = {                        # name: (step, images in it, steps of the full published run)
    'darts, first order': (Case(1, False, 64, 0), 128, 50 * (25000 // 64)),
    'darts, second order': (Case(1, True, 64, 0), 128, 50 * (25000 // 64)),
    'pcdarts': (Case(4, False, 256, 0), 512, 50 * (25000 // 256)),
    'retrain DARTS_V2': (Case(0, False, 96, 0), 96, 600 * (50000 // 96))}
WAYS = {                        # name: (side, graph, more flags)
    'textbook': ('book', False, []), 'eager': ('ours', False, []), 'graph': ('ours', True, []),
    'graph, TF32': ('ours', True, ['--tf32']), 'graph, bf16': ('ours', True, ['--amp'])}

GRAPHED = ['darts', 'darts --unrolled', 'darts --grad_accum 2', 'pcdarts', 'sdarts', 'dartsminus',
           'sdarts --perturb adversarial', 'betadarts', 'pdarts --layers 5', 'pcdarts --layers 5',
           'darts --unrolled --layers 5']


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def equality(device, dtype, partial, unrolled, width=8, layers=5, size=16, pixels=32):
    """Largest relative differences to the textbook: at first, and of the weights after 5 steps."""
    torch.manual_seed(0)
    ours = Network(width, 10, layers, partial=partial)
    book = textbook.Network(width, 10, layers, partial=partial)
    textbook.copy_weights(ours, book)
    ours, book = ours.to(device, dtype), book.to(device, dtype)
    (x, y), (x2, y2) = (batch(size, pixels, device) for _ in range(2))
    train, valid = (x.to(dtype), y), (x2.to(dtype), y2)
    out = {'logits': relative(ours(train[0]), book(train[0]))}
    textbook.copy_weights(ours, book)               # of the running statistics
    step, _, method, sgd = search_step(['--unrolled'] * unrolled, device, ours)
    book_step = textbook.Step(book, unrolled)
    grads, *_ = search.second_order(method, train, valid, sgd) if unrolled \
        else search.first_order(method, valid)
    book_grads = textbook.architecture_gradients(book, train, valid, book_step.sgd, unrolled)
    out['alpha gradients'] = torch.tensor([*map(relative, grads, book_grads)]).max().item()
    textbook.copy_weights(ours, book)
    for _ in range(5):
        step(*train, *valid)
        book_step(*train, *valid)
    pairs = textbook.pairs_of_weights(ours, book)
    out['weights'] = max(relative(a[block], b) for a, block, b in pairs if a.requires_grad)
    return out


def replays(flags, device, graph):
    """(weights and alphas of a method after 8 steps in two epochs, whether it was captured)."""
    torch.manual_seed(0)
    space = [] if '--layers' in flags else ['--space', 'nb201', '--cells_per_stage', '1']
    step, changed, method, sgd = search_step(
        [*space, '--init_channels', '8', '--batch_size', '16', '--method', *flags.split()], device)
    step = retrain.GraphedStep(step, changed, device, graph)
    for k in range(8):
        method.stage = 2                            # of pdarts, whose skips are dropped
        method.begin_epoch(5 * (k > 4), 10)
        sgd.param_groups[0]['lr'].fill_(0.025 / (1 + k))
        step(*batch(16, 16, device), *batch(16, 16, device))
    tensors = [*method.network.weights, *method.network.architecture_parameters()]
    return torch.cat([t.detach().flatten() for t in tensors]), step.graph is not None


def timing(name, way, device, seconds=6.0):
    """{'ms', 'calls', 'peak_mib', 'images_per_second', 'n'} of a step."""
    case, images, total = RUNS[name]
    side, graph, flags = WAYS[way]
    generate_data.set_tf32('--tf32' in flags)
    step = steps(case, {'ours', side}, device, graph, flags)[side]
    step()                                          # optimizers make their buffers
    with Calls() as calls:
        step()
    synchronize = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(retrain.GraphedStep.WARM_UP + 1):
        step()
    synchronize()
    began, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - began < seconds:
        step()
        count += 1
        if count % 10 == 0:
            synchronize()
    synchronize()
    if graph and device.type == 'cuda' and step.func.graph is None:
        sys.exit(f'{name}, {way}: no CUDA graph')
    ms = 1000 * (time.perf_counter() - began) / count
    generate_data.set_tf32(False)
    return {'ms': ms, 'calls': calls.count, 'peak_mib': retrain.peak_memory_mib(device),
            'images_per_second': 1000 * images / ms, 'n': count,
            'hours of a run': total / 3.6e6 * ms}


def check_gpu():
    """Check and time everything on a CUDA device, in one table. Under 8 minutes."""
    if not torch.cuda.is_available():
        print('no CUDA on this machine: nothing to check here')
        return
    device = generate_data.choose_device(0)
    print(retrain.hardware(device), 'torch', torch.__version__)
    for partial, unrolled in ((1, False), (1, True), (4, False)):
        for dtype, limit, drift in ((torch.float64, 1e-9, 1e-6), (torch.float32, 1e-2, 1e-2)):
            row = equality(device, dtype, partial, unrolled)
            name = f'{dtype}, K={partial}, unrolled={unrolled}'
            show(name, row)
            checks = [row['logits'] < limit, row['alpha gradients'] < limit]
            if dtype == torch.float64 or not unrolled:
                checks.append(row['weights'] < drift)
            if not all(checks):                 # also if one is not finite
                sys.exit(f'{name}: differs from the textbook')
    for flags in GRAPHED:
        (eager, _), (graphed, captured) = (replays(flags, device, on) for on in (False, True))
        show(flags, {'difference': relative(graphed, eager), 'captured': captured})
        if not captured or not relative(graphed, eager) < 1e-3:
            sys.exit(f'{flags}: no CUDA graph, or another result')
    for name in RUNS:
        for way in WAYS:
            show(f'{name + ", " + way:<38}', timing(name, way, device))
            torch.cuda.empty_cache()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--only', choices=[*CASES, *IMAGENET], help='one case')
    parser.add_argument('--imagenet', action='store_true', help='steps at 224 px')
    parser.add_argument('--gpu', action='store_true', help='equality and speed on a CUDA device')
    parser.add_argument('--peak', choices=['ours', 'book'], help=argparse.SUPPRESS)
    parser.add_argument('--probe', metavar='FOLDER', help='how learnable a data set is')
    args = parser.parse_args(argv)
    if args.gpu:
        return check_gpu()
    device = generate_data.choose_device(-1)
    if args.peak:
        step = steps({**CASES, **IMAGENET}[args.only], {'ours', args.peak})[args.peak]
        held = retrain.peak_memory_mib(CPU)
        step()
        print(retrain.peak_memory_mib(CPU) - held)
        return
    if args.probe:
        results = probe(args.probe)
    else:
        names = [args.only] if args.only else IMAGENET if args.imagenet else CASES
        results = {name: measure(name) for name in names}
    for name, row in results.items():
        show(name, row)
    print(retrain.hardware(device), 'torch', torch.__version__)


if __name__ == '__main__':
    main()
