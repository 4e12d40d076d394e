"""Time, calls and memory of our steps against the textbook's.

    python tests/benchmark.py               # on the CPU, minutes on two cores
    python tests/benchmark.py --gpu         # equality and speed on a CUDA device, 8 minutes

A search step is one architecture and one weight step (C=16, 8 cells, 32 px); a retrain step one
of DARTS_V2 (C=36, 20 cells, auxiliary head, drop-path). On the CPU a step has 16 images, and each
row is measured in a process of its own, with the peak memory of its steps. Calls are those that
reach torch's dispatcher; views and reading a number do not count.
"""
import argparse
import functools
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import generate_data
import retrain
import search
from genotypes import DARTS_V2
from model_search import Network

import textbook
import torch
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device('cpu')
# name: (partial, or 0 for retraining; unrolled; batch; images that a full published run computes)
RUNS = {
    'darts, first order': (1, False, 64, 50 * 50000),
    'darts, second order': (1, True, 64, 50 * 50000),
    'pcdarts': (4, False, 256, 50 * 50000),
    'retrain DARTS_V2': (0, False, 96, 600 * 50000)}
WAYS = {                        # name: (side, graph, more flags)
    'textbook': ('book', False, []), 'eager': ('ours', False, []), 'graph': ('ours', True, []),
    'graph, TF32': ('ours', True, ['--tf32']), 'graph, bf16': ('ours', True, ['--amp'])}
GRAPHED = ['darts', 'darts --unrolled', 'darts --grad_accum 2', 'pcdarts', 'sdarts', 'dartsminus',
           'sdarts --perturb adversarial', 'betadarts', 'pdarts --layers 5', 'pcdarts --layers 5',
           'darts --unrolled --layers 5']


class Calls(TorchDispatchMode):
    """Counts what a GPU would launch."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        free = ('empty', 'new_empty', 'detach', '_local_scalar_dense', '_unsafe_view')
        self.count += not (function.is_view or function.__name__.startswith(free))
        return function(*args, **(kwargs or {}))


def batch(n, size=32, device=CPU):
    return torch.randn(n, 3, size, size, device=device), torch.randint(10, (n,), device=device)


def step_of(side, partial, unrolled, size, device, graph=False, flags=()):
    """A function that takes one step, of 'ours' or of the 'book'; graph, flags: of our side."""
    torch.manual_seed(0)
    build, changed = Network if side == 'ours' else textbook.Network, None
    data = (*batch(size, device=device), *batch(size, device=device))
    if partial == 0:
        network = build(36, 10, 20, DARTS_V2, auxiliary=True).to(device).train()
        network.drop_path_prob, data = torch.tensor(0.1, device=device), data[:2]
        step, changed = retrain_step(network, flags)
    else:
        network = build(16, 10, 8, partial=partial).to(device).train()
        if side == 'ours':
            order = ['--unrolled'] if unrolled else []
            step, changed, *_ = search_step([*flags, *order], device, network)
        else:
            step = textbook.Step(network, unrolled)
    return functools.partial(retrain.GraphedStep(step, changed, device, graph), *data)


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


def show(name, row):
    words = [f'{key} {value:.3g}' if isinstance(value, float) else f'{key} {value}'
             for key, value in row.items()]
    print(f'{name:<38}', '  '.join(words), flush=True)


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def equality(device, dtype, partial, unrolled, width=8, layers=5, size=16, pixels=32):
    """Largest relative differences to the textbook: at first, and of the weights after 5 steps."""
    torch.manual_seed(0)
    ours = Network(width, 10, layers, partial=partial).to(device, dtype)
    book = textbook.Network(width, 10, layers, partial=partial).to(device, dtype)
    textbook.copy_weights(ours, book)
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
    pairs = textbook.copy_weights(ours, book)
    for _ in range(5):
        step(*train, *valid)
        book_step(*train, *valid)
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
    """{'ms', 'calls', 'peak_mib', 'images_per_second', 'n', 'hours of a run'} of a step."""
    partial, unrolled, size, images_of_a_run = RUNS[name]
    side, graph, flags = WAYS[way]
    on_cuda = device.type == 'cuda'
    size = size if on_cuda else min(16, size)
    generate_data.set_tf32('--tf32' in flags)
    step = step_of(side, partial, unrolled, size, device, graph, flags)
    held = 0 if on_cuda else retrain.peak_memory_mib(device)
    step()                                          # optimizers make their buffers
    with Calls() as calls:
        step()
    synchronize = torch.cuda.synchronize if on_cuda else lambda: None
    if on_cuda:
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
    if graph and on_cuda and step.func.graph is None:
        sys.exit(f'{name}, {way}: no CUDA graph')
    each = (time.perf_counter() - began) / count
    generate_data.set_tf32(False)
    rate = size * (2 if partial else 1) / each          # a search step has two batches
    return {'ms': 1000 * each, 'calls': calls.count,
            'peak_mib': retrain.peak_memory_mib(device) - held, 'images_per_second': rate,
            'n': count, 'hours of a run': images_of_a_run / rate / 3600}


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
            show(f'{name}, {way}', timing(name, way, device))
            torch.cuda.empty_cache()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--gpu', action='store_true', help='equality and speed on a CUDA device')
    parser.add_argument('--row', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.gpu:
        return check_gpu()
    device = generate_data.choose_device(-1)
    if args.row:
        return show(', '.join(args.row), timing(*args.row, device))
    for name in RUNS:
        for way in ('textbook', 'eager'):       # each in a process, because memory only grows
            subprocess.run([sys.executable, __file__, '--row', name, way], check=True)
    print(retrain.hardware(device), 'torch', torch.__version__)


if __name__ == '__main__':
    main()
