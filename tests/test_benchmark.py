"""The graphed step, its comparison with the eager one, and the scripts that measure."""
import copy
from contextlib import nullcontext

from retrain import GraphedStep

import benchmark
import pytest
import search
import torch
from conftest import CPU


class Emulated(GraphedStep):
    """What CUDA does, on the CPU: capturing records the step, replaying runs it."""
    spoil = None

    def capture(self):
        if self.spoil == 'capture':
            raise RuntimeError('operation not permitted when stream is capturing\nmore')
        result = torch.zeros(4)

        class Graph:
            def replay(graph):
                result.copy_(self.step(*self.batch))
                if self.spoil == 'alphas':
                    for alpha in self.changed()['alphas']:
                        alpha.data.mul_(1.1)
        return Graph(), result


def search_step():
    torch.manual_seed(0)
    network = benchmark.Network(4, 10, 3)
    return network, *benchmark.search_step([], CPU, network)[:2]


def batches(count):
    torch.manual_seed(1)
    return [(*benchmark.batch(4, 8), *benchmark.batch(4, 8)) for _ in range(count)]


@pytest.mark.parametrize('spoil, message', [
    (None, ''), ('capture', 'capture failed (operation not permitted'), ('alphas', 'the alphas')])
def test_graphed_step_takes_the_eager_steps(monkeypatch, capsys, spoil, message):
    """Every call is one step on its own batch, whether the graph is taken or refused."""
    monkeypatch.setattr(Emulated, 'spoil', spoil)
    monkeypatch.setattr(GraphedStep, 'works', True)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: None)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: nullcontext())
    network, step, changed = search_step()
    expected = [step(*b) for b in batches(6)]
    again, step, changed = search_step()
    graphed = Emulated(step, changed, CPU)
    graphed.on = True
    for b, value in zip(batches(6), expected):
        assert torch.equal(graphed(*b), value)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(),
                                                 again.state_dict().values()))
    assert (graphed.graph is not None) == (spoil is None)
    assert GraphedStep.works == (spoil != 'capture')
    error = capsys.readouterr().err
    assert error.count('\n') == bool(spoil) and message in error


def test_all_that_a_step_changes_is_compared_and_its_learning_rate_is_a_tensor():
    _, step, changed = search_step()
    step(*batches(1)[0])
    before = copy.deepcopy(changed())
    step(*batches(1)[0])
    assert list(before) == ['weights', 'alphas', 'statistics', 'optimizers']
    for name, part in changed().items():
        assert any(not torch.equal(a, b) for a, b in zip(part, before[name])), name
    sgd, _ = search.optimizers(benchmark.Network(4, 10, 3), search.parse([]))
    assert torch.is_tensor(sgd.param_groups[0]['lr'])


def test_gpu_check_compares_and_times_steps(monkeypatch, capsys):
    for unrolled in (False, True):
        row = benchmark.equality(CPU, torch.float64, 4, unrolled, 4, 3, 4, 8)
        assert all(value < 1e-11 for value in row.values()), row
    steps = {'search': (4, False, 2, 9), 'retrain': (0, False, 2, 9)}
    monkeypatch.setattr(benchmark, 'RUNS', steps)
    for module in (benchmark, benchmark.textbook):
        real = module.Network
        monkeypatch.setattr(module, 'Network',
                            lambda *a, real=real, **k: real(4, 10, 3, *a[3:], **k))
    calls = {}
    for run, way in (('search', 'textbook'), ('search', 'graph'), ('retrain', 'graph')):
        row = benchmark.timing(run, way, CPU, 0.0)
        assert row['ms'] > 0 and row['n'] == 3 and row['calls'] > 100
        calls[run, way] = row['calls']
    assert calls['search', 'graph'] < calls['search', 'textbook'] / 2
    for flags in benchmark.GRAPHED:
        search.parse(['--method', *flags.split()])
    for flags in benchmark.GRAPHED[::4]:                # darts, sdarts, pdarts
        result, captured = benchmark.replays(f'{flags} --init_channels 4', CPU, True)
        assert result.isfinite().all() and not captured
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    benchmark.check_gpu()
    assert 'no CUDA' in capsys.readouterr().out
