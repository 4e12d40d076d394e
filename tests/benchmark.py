"""Time, calls and memory of our steps against the textbook's, the same weights in both.

    python tests/benchmark.py                   # the table; some 15 minutes on two cores
    python tests/benchmark.py --only darts1_b16 --json

A search step is one architecture and one weight step (C=16, 8 cells, 32 px); a retrain step one
of DARTS_V2 (C=36, 20 cells, auxiliary head, drop-path). CPU seconds are those of the process, the
two sides taking turns in it: medians of n. Calls are those that reach torch's dispatcher, without
views, `empty*`, `detach` and reading a number. Peak memory is that of one step, each side in a
process of its own. The allocator is set as every script of ours sets it, for both sides.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import evaluate
import retrain
import search
from genotypes import DARTS_V2
from model_search import Network

import textbook
import torch
from torch.utils._python_dispatch import TorchDispatchMode

CASES = {                   # name: (partial, unrolled, batch, n); partial 0 is retraining
    'darts1_b16': (1, False, 16, 5), 'darts1_b64': (1, False, 64, 3),
    'darts2_b16': (1, True, 16, 5), 'darts2_b64': (1, True, 64, 0),
    'pcdarts1_b32': (4, False, 32, 5), 'pcdarts2_b32': (4, True, 32, 5),
    'retrain_b96': (0, False, 96, 3)}


class Calls(TorchDispatchMode):
    """Counts what a GPU would launch."""
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if not function.is_view and not name.startswith(
                ('empty', 'new_empty', 'detach', '_local_scalar_dense')):
            self.count += 1
        return function(*args, **(kwargs or {}))


def batch(n):
    return torch.randn(n, 3, 32, 32), torch.randint(10, (n,))


def steps(case, sides=('ours', 'book')):
    """{side: a function that takes one step}, the same weights on both sides."""
    partial, unrolled, size, _ = CASES[case]
    torch.manual_seed(0)
    shape = (36, 10, 20, DARTS_V2) if partial == 0 else (16, 10, 8)
    extra = {'auxiliary': True} if partial == 0 else {'partial': partial}
    networks = {'ours': Network(*shape, **extra)}
    if 'book' in sides:
        networks['book'] = textbook.Network(*shape, **extra)
        textbook.copy_weights(networks['ours'], networks['book'])
    train, valid, out = batch(size), batch(size), {}
    for side in sides:
        network = networks[side].train()
        if partial == 0:
            network.drop_path_prob = 0.1
            out[side] = retrain_step(network, train)
        elif side == 'book':
            step = textbook.Step(network, unrolled)
            out[side] = lambda step=step: step(train, valid)
        else:
            out[side] = search_step(network, unrolled, train, valid)
    return out


def search_step(network, unrolled, train, valid):
    args = search.parse(['--unrolled'] if unrolled else [])
    sgd = torch.optim.SGD(network.weight_parameters(), 0.025, momentum=0.9, weight_decay=3e-4,
                          foreach=True)
    adam = torch.optim.Adam(network.architecture_parameters(), 3e-4, betas=(0.5, 0.999),
                            weight_decay=1e-3, foreach=True)

    def step():
        search.architecture_step(network, train, valid, sgd, adam, args)
        search.weight_step(network, train, sgd, args)
    return step


def retrain_step(network, train):
    args = retrain.parse(['--arch', 'DARTS_V2', '--auxiliary'])
    sgd = torch.optim.SGD(network.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
    return lambda: retrain.train_step(network, train, sgd, args)


def peak_mib(case, side):
    """Peak memory of one step above what the process held before it, in a process of its own."""
    out = subprocess.run([sys.executable, __file__, '--only', case, '--peak', side],
                         capture_output=True, text=True, check=True)
    return float(out.stdout)


def measure(case):
    """{'ratio', 'memory_ratio', 'launches', 'launches_textbook', 'cpu_seconds', ...}"""
    out, n = {'n': CASES[case][3]}, CASES[case][3]
    if n:
        pair = steps(case)
        seconds = {side: [] for side in pair}
        for turn in range(n + 1):
            for side, step in pair.items():
                began = time.process_time()
                step()
                if turn:                                    # the first one warms up
                    seconds[side].append(time.process_time() - began)
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        out.update(ratio=medians['book'] / medians['ours'], cpu_seconds=medians['ours'],
                   cpu_seconds_textbook=medians['book'])
        for side, name in (('ours', 'launches'), ('book', 'launches_textbook')):
            with Calls() as calls:
                pair[side]()
            out[name] = calls.count
        del pair
    ours, book = (peak_mib(case, side) for side in ('ours', 'book'))
    return {**out, 'memory_mib': ours, 'memory_mib_textbook': book, 'memory_ratio': ours / book}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--json', action='store_true', help='one JSON object')
    parser.add_argument('--only', choices=list(CASES), help='one case')
    parser.add_argument('--peak', choices=['ours', 'book'], help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = evaluate.choose_device(-1)
    if args.peak:
        step = steps(args.only, ('ours', 'book') if args.peak == 'book' else ('ours',))[args.peak]
        held = int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()
        step()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held) / 2 ** 20)
        return
    results = {}
    for case in [args.only] if args.only else CASES:
        results[case] = row = measure(case)
        if not args.json:
            print(f'{case:<13}', '  '.join(
                f'{key} {value:.2f}' if isinstance(value, float) else f'{key} {value}'
                for key, value in row.items()), flush=True)
    if args.json:
        print(json.dumps(results))
    else:
        print(evaluate.hardware(device), 'torch', torch.__version__)


if __name__ == '__main__':
    main()
