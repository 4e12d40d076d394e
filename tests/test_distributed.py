"""Two processes under torchrun do what one does; a run whose process was killed goes on."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import pytest  # noqa: E402

import evaluate  # noqa: E402
import generate_data  # noqa: E402
import retrain  # noqa: E402
import search  # noqa: E402
import torch  # noqa: E402
from genotypes import DARTS_V2  # noqa: E402
from model_search import Network  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2',
            '--master_port', '0', '--rdzv_backend', 'c10d', '--rdzv_endpoint', 'localhost:0']
TINY = ['--num_images', '64', '--image_size', '8', '--layers', '3', '--init_channels', '4',
        '--batch_size', '8', '--steps_per_epoch', '2', '--gpu', '-1']


def network(*shape, **more):
    """In float64; its BatchNorms use fixed statistics, which have moved from 0 and 1."""
    torch.manual_seed(0)
    out = Network(*shape, **more).double().train()
    out(torch.randn(16, 3, 8, 8).double())
    for module in out.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return out


def steps(flags):
    """Three steps of each kind on this process's part of a batch of 8: what has come out."""
    rank, processes = generate_data.world()
    torch.manual_seed(1)
    x, y = torch.randn(3, 2, 8, 3, 8, 8).double(), torch.randint(4, (3, 2, 8))
    part = slice(rank * 8 // processes, (rank + 1) * 8 // processes)
    out = {}
    for order in ('first', 'second'):
        args = search.parse([*flags, *(['--unrolled'] if order == 'second' else [])])
        ours = network(4, 4, 3, partial=2)
        sgd, adam = search.optimizers(ours, args)
        losses = []
        for k in range(3):
            train, valid = ((x[k, n, part], y[k, n, part]) for n in (0, 1))
            if k == 2:
                grads, *_ = search.first_order(ours, valid, args) if order == 'first' else \
                    search.second_order(ours, train, valid, sgd, args)
                out[order + ' gradients'] = torch.cat([g.flatten() for g in grads])
            losses.append(search.bilevel_step(ours, train, valid, sgd, adam, args))
        out[order + ' losses'] = evaluate.averaged(losses)[2][[0, 2]]
        out[order + ' weights'] = torch.cat([p.detach().flatten() for p in ours.parameters()])
    args = retrain.parse(['--arch', 'DARTS_V2', *flags])
    ours = network(4, 4, 3, DARTS_V2)
    shared = DistributedDataParallel(ours) if processes > 1 else ours
    sgd = retrain.optimizer(ours, args)
    for k in range(3):
        retrain.train_step(shared, (x[k, 0, part], y[k, 0, part]), sgd, args)
    out['retrained'] = torch.cat([p.detach().flatten() for p in ours.parameters()])
    data = generate_data.Data('x', 'noise', (x[0, 0].permute(0, 2, 3, 1) * 9 + 99)
                              .byte().numpy()[:7], y[0, 0, :7].numpy(), list('abcd'), [.5] * 3,
                              [.2] * 3, 8, {})
    batches = generate_data.Batches(data, range(7), 2, torch.device('cpu'), shuffle=False)
    score = evaluate.test(ours.float(), batches)
    assert score['n'] == 7                                              # each image once
    out['tested'] = torch.tensor([score['loss'], score['top1']]).double()
    return out


def test_two_processes_and_two_parts_equal_one_process_with_the_whole_batch():
    whole = steps(['--batch_size', '8'])
    parts = steps(['--batch_size', '8', '--grad_accum', '2'])
    for name, value in parts.items():
        assert (value - whole[name]).abs().max() < 1e-10, name
    subprocess.run([*TORCHRUN, __file__], check=True, timeout=120)
    for name, value in torch.load('steps.pt').items():
        assert (value - whole[name]).abs().max() < 1e-10, name
        assert whole[name].abs().max() > 1e-6


def without_times(folder):
    text = Path(folder, 'log.jsonl').read_text()            # its last line may be in the writing
    lines = [json.loads(line) for line in text[:text.rfind('\n') + 1].splitlines()]
    return [{k: v for k, v in line.items() if k not in (
        'seconds', 'images_per_second', 'peak_memory_mib')} for line in lines]


@pytest.mark.parametrize('script, more', [
    ('search.py', []),
    ('retrain.py', ['--arch', 'DARTS_V2', '--data', 'noise', '--ema', '0.9'])])
def test_a_process_killed_under_torchrun_goes_on_from_the_last_checkpoint(script, more):
    flags = [str(ROOT / script), *TINY, *more, '--epochs', '6', '--checkpoint_minutes', '0']
    subprocess.run([*TORCHRUN, *flags, '--save', 'whole'], check=True, timeout=240)
    with open('said', 'w') as said, subprocess.Popen(
            [*TORCHRUN, '--max_restarts', '1', *flags, '--save', 'broken', '--resume'],
            stderr=said) as run:
        while not (Path('broken/log.jsonl').exists() and without_times('broken')):
            assert run.poll() is None
            time.sleep(0.01)
        for status in Path('/proc').glob('[0-9]*/environ'):
            try:
                environ = status.read_bytes()
            except OSError:
                continue
            if b'LOCAL_RANK=1' in environ and os.getcwd().encode() in environ:
                os.kill(int(status.parent.name), signal.SIGKILL)
        before = len(without_times('broken'))
        assert run.wait(240) == 0
    assert f'File "{ROOT / script}"' not in Path('said').read_text()
    assert before < 6 and without_times('broken') == without_times('whole')
    assert json.loads(Path('broken/args.json').read_text())['world_size'] == 2


def test_bad_input_under_torchrun_ends_all_processes_with_the_one_line():
    run = subprocess.run([*TORCHRUN, str(ROOT / 'search.py'), *TINY, '--batch_size', '9'],
                         capture_output=True, text=True, timeout=120)
    assert run.returncode != 0 and '--batch_size 9' in run.stderr
    assert 'search.py: error: ' in run.stderr and f'File "{ROOT / "search.py"}"' not in run.stderr
    assert not Path('runs').exists()


if __name__ == '__main__':
    generate_data.choose_device(-1)
    results = steps(['--batch_size', '8'])
    evaluate.check_alike([results['first weights'], results['retrained']], 'weights')
    if not generate_data.world()[0]:
        torch.save(results, 'steps.pt')
    torch.distributed.destroy_process_group()
