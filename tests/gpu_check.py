"""Check and time everything on a CUDA device, in one table. Under 8 minutes.

    python tests/gpu_check.py                   # on any machine with CUDA

First equality with the textbook on the device, in float64 and float32, eager and as a CUDA graph.
Then each method's graph against its eager steps, batch by batch, while rates and draws change. Then
the time, calls, and memory of the textbook's steps and of ours, eager and as a graph, and the
hours of a whole run. Without CUDA it says so and does nothing.
"""
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import benchmark
import generate_data
import retrain
import search
from model_search import Network

import textbook
import torch

RUNS = {                        # name: (step, images in it, steps of the full published run)
    'darts, first order': (benchmark.Case(1, False, 64, 0), 128, 50 * (25000 // 64)),
    'darts, second order': (benchmark.Case(1, True, 64, 0), 128, 50 * (25000 // 64)),
    'pcdarts': (benchmark.Case(4, False, 256, 0), 512, 50 * (25000 // 256)),
    'retrain DARTS_V2': (benchmark.Case(0, False, 96, 0), 96, 600 * (50000 // 96))}
WAYS = {                        # name: (side, graph, more flags)
    'textbook': ('book', False, []), 'eager': ('ours', False, []), 'graph': ('ours', True, []),
    'graph, TF32': ('ours', True, ['--tf32']), 'graph, bf16': ('ours', True, ['--amp'])}

METHODS = ['darts', 'darts --unrolled', 'darts --grad_accum 2', 'pcdarts', 'sdarts', 'dartsminus',
           'sdarts --perturb adversarial', 'betadarts', 'pdarts --space darts --layers 5']


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def equality(device, dtype, partial, unrolled, graph, width=8, layers=5, size=16):
    """Largest relative differences to the textbook; a graph is captured at the fourth step of 5."""
    torch.manual_seed(0)
    ours = Network(width, 10, layers, partial=partial)
    book = textbook.Network(width, 10, layers, partial=partial)
    textbook.copy_weights(ours, book)
    ours, book = ours.to(device, dtype), book.to(device, dtype)
    (x, y), (x2, y2) = (benchmark.batch(size, device=device) for _ in range(2))
    x, x2 = x.to(dtype), x2.to(dtype)
    logits = ours(x), book(x)
    out = {'logits': relative(*logits)}
    grads = [torch.autograd.grad(torch.nn.functional.cross_entropy(z, y), list(p))
             for z, p in zip(logits, (ours.alphas.values(), book.alphas))]
    out['alpha gradients'] = max(map(relative, *grads))
    textbook.copy_weights(ours, book)               # of the running statistics
    step, changed = benchmark.search_step(ours, unrolled)
    step = retrain.GraphedStep(step, changed, device, graph)
    book_step = textbook.Step(book, unrolled)
    for _ in range(5):
        step(x, y, x2, y2)
        book_step(x, y, x2, y2)
    pairs = textbook.pairs_of_weights(ours, book)
    out['weights'] = max(relative(a[block], b) for a, block, b in pairs if a.requires_grad)
    out['captured'] = step.graph is not None
    return out


def replays(flags, device, graph):
    """(weights and alphas of a method after 8 steps, whether a graph was captured).

    Each step has its own batch, and after the fifth what changes by epoch changes.
    """
    torch.manual_seed(0)
    args = search.parse(['--space', 'nb201', '--cells_per_stage', '1', '--init_channels', '8',
                         '--batch_size', '16', '--method', *flags.split()])
    method = search.METHODS[args.method](args, 10, 'cifar', device)
    network = method.build()
    sgd, adam = search.optimizers(network, args)

    def step(*batch):
        return search.bilevel_step(method, batch[:2], batch[2:], sgd, adam)

    step = retrain.GraphedStep(step, lambda: retrain.tensors_of_a_step(network, sgd, adam), device,
                               graph)
    for k in range(8):
        method.stage = 2                            # of pdarts, whose skips are dropped
        method.begin_epoch(5 * (k > 4), 10)
        sgd.param_groups[0]['lr'].fill_(0.025 / (1 + k))
        step(*benchmark.batch(16, 16, device), *benchmark.batch(16, 16, device))
    tensors = [*network.weights, *network.architecture_parameters()]
    return torch.cat([t.detach().flatten() for t in tensors]), step.graph is not None


def timing(name, way, device, seconds=6.0):
    """{'ms', 'calls', 'peak_mib', 'images_per_second', 'n'} of a step."""
    case, images, steps = RUNS[name]
    side, graph, flags = WAYS[way]
    generate_data.set_tf32('--tf32' in flags)
    step = benchmark.steps(case, {'ours', side}, device, graph, flags)[side]
    step()                                          # optimizers make their buffers
    with benchmark.Calls() as calls:
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
            'hours of a run': steps / 3.6e6 * ms}


def main():
    if not torch.cuda.is_available():
        print('no CUDA on this machine: nothing to check here')
        return
    device = generate_data.choose_device(0)
    print(retrain.hardware(device), 'torch', torch.__version__)
    for partial, unrolled in ((1, False), (1, True), (4, False)):
        # In float64 without a graph, whose learning rate is float32.
        for dtype, graph in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
            row = equality(device, dtype, partial, unrolled, graph)
            name = f'{dtype}, K={partial}, unrolled={unrolled}, graph={graph}'
            benchmark.show(name, row)
            if graph and not row['captured']:
                sys.exit(f'{name}: no CUDA graph')
            limit = 1e-9 if dtype == torch.float64 else 1e-2
            moved = row['weights'] > (1e-6 if dtype == torch.float64 else 1e-2)
            if max(row['logits'], row['alpha gradients']) > limit or moved and not unrolled:
                sys.exit(f'{name}: differs from the textbook')
    for flags in METHODS:
        (eager, _), (graphed, captured) = (replays(flags, device, on) for on in (False, True))
        benchmark.show(flags, {'difference': relative(graphed, eager), 'captured': captured})
        if not captured or not relative(graphed, eager) < 1e-3:
            sys.exit(f'{flags}: no CUDA graph, or another result')
    for name in RUNS:
        for way in WAYS:
            benchmark.show(f'{name + ", " + way:<38}', timing(name, way, device))
            torch.cuda.empty_cache()


if __name__ == '__main__':
    main()
