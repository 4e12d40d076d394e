"""Two processes under torchrun do what one does; a run whose process was killed goes on."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CPU, RETRAIN, ROOT, TINY, UNTRAINED, log, run

import evaluate
import generate_data
import retrain
import search
import torch
from genotypes import DARTS_V2
from model_search import Network

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2',
            '--rdzv_backend', 'c10d', '--rdzv_endpoint', 'localhost:0']
LONG = [*TINY, '--epochs', '9', '--checkpoint_minutes', '0']
SCORED = [*UNTRAINED, '--method', 'naswot']


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    """The folder in which two processes have run this file as a script."""
    folder = tmp_path_factory.mktemp('shared')
    subprocess.run([*TORCHRUN, __file__], cwd=folder, check=True, timeout=240)
    return folder


def network(*shape, **more):
    """In float64; its BatchNorms use fixed statistics, which have moved from 0 and 1."""
    torch.manual_seed(0)
    out = Network(*shape, **more).double().train()
    out(torch.randn(16, 3, 8, 8).double())
    for module in out.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return out


def steps(*flags):
    """{name: numbers} after three steps on this process's part of a batch of 8."""
    rank, processes = generate_data.world()
    torch.manual_seed(1)
    x, y = torch.randn(3, 2, 8, 3, 8, 8).double(), torch.randint(4, (3, 2, 8))
    part, out = slice(rank * 8 // processes, (rank + 1) * 8 // processes), {}
    for order in ([], ['--unrolled']):
        args = search.parse([*TINY, *flags, *order])
        method = search.Darts(args, 4, 'cifar', CPU)
        method.network = network(4, 4, 3, partial=2)
        sgd, adam = search.optimizers(method.network, args)
        for k in range(3):
            train, valid = ((x[k, n, part], y[k, n, part]) for n in (0, 1))
            sums = search.bilevel_step(method, train, valid, sgd, adam)
        out[f'losses {order}'] = retrain.average([sums])[0][[0, 2]]
        out[f'weights {order}'] = torch.cat([p.flatten() for p in method.network.parameters()])
    args = retrain.parse([*RETRAIN, *flags])
    ours = network(4, 4, 3, DARTS_V2)
    sgd = retrain.make_optimizer(list(ours.parameters()), args)
    for k in range(3):
        retrain.train_step(ours, (x[k, 0, part], y[k, 0, part]), sgd, args)
    out['retrained'] = torch.cat([p.flatten() for p in ours.parameters()])
    data = generate_data.Data('x', 'noise', generate_data.noise_images(0, range(7), 8),
                              y[0, 0, :7].numpy(), list('abcd'), [.5] * 3, [.2] * 3, 8)
    found = evaluate.test('test', ours.float(), data, range(7), CPU)
    assert found['test_n'] == 7                         # each image once
    out['tested'] = torch.tensor([found['test_loss'], found['test_error']]).double()
    return {name: value.detach() for name, value in out.items()}


def test_two_processes_and_two_parts_equal_one_process_with_the_whole_batch(shared):
    whole, parts = steps(), steps('--grad_accum', '2')
    of_two = torch.load(shared / 'steps.pt')
    for name, value in whole.items():
        assert (parts[name] - value).abs().max() < 1e-10, name
        assert (of_two[name] - value).abs().max() < 1e-10, name
        assert value.abs().max() > 1e-6


def test_a_process_killed_under_torchrun_goes_on_from_the_last_checkpoint(shared):
    command = [str(ROOT / 'search.py'), *LONG, '--save', 'broken', '--resume']
    with subprocess.Popen([*TORCHRUN, '--max_restarts', '1', *command],
                          stderr=subprocess.DEVNULL) as process:
        path = Path('broken/log.jsonl')
        while not (path.exists() and path.read_text().count('\n')):
            assert process.poll() is None
            time.sleep(0.01)
        children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text()
        os.kill(int(children.split()[-1]), signal.SIGKILL)
        before = path.read_text().count('\n')
        assert process.wait(240) == 0
    assert 0 < before < 9 and log('broken') == log(shared / 'whole')
    assert json.loads(Path('broken/args.json').read_text())['world_size'] == 2


def test_two_processes_share_the_cells_that_are_scored(shared):
    run(search.main, 'one', *SCORED)
    assert Path('one/scores.csv').read_text() == (shared / 'two/scores.csv').read_text()


def test_bad_input_under_torchrun_ends_all_processes_with_the_one_line():
    done = subprocess.run([*TORCHRUN, str(ROOT / 'search.py'), *TINY, '--batch_size', '9'],
                          capture_output=True, text=True, timeout=240)
    assert done.returncode != 0 and '--batch_size 9' in done.stderr
    assert 'search.py: error: ' in done.stderr and f'{ROOT / "search.py"}", line' not in done.stderr
    assert not Path('runs').exists()


if __name__ == '__main__':
    generate_data.choose_device(-1)
    results = steps()
    mine = torch.cat([results['weights []'].flatten(), results['retrained'].flatten()])
    assert all(torch.equal(mine, other) for other in evaluate.gather(mine))
    if not generate_data.world()[0]:
        torch.save(results, 'steps.pt')
    for flags, save in ((LONG, 'whole'), (SCORED, 'two')):
        assert search.main([*flags, '--save', save]) == 0
    generate_data.leave(0)
