"""Every method against its formula written plainly, in float64; NAS-Bench-201; what is measured."""
import itertools
import json
import math
from pathlib import Path

import pytest
import textbook
import torch
from conftest import (DARTS, TINY, batch, close, log, run, same_weights, searching,
                      with_textbook)
from torch.nn import functional as F

import evaluate
import search
from genotypes import (agreement, from_plain, from_string, nas_bench_201,
                       random_genotype, random_string, to_string, truth)
from model_search import NB201, Network
from operations import Inputs


def same_gradients(method, book, valid):
    """Logits, and the gradients of the alphas, are those of the textbook's network."""
    close(method.network(valid[0]), book(valid[0]))
    got, *_ = search.first_order(method, valid)
    for a, b in zip(got, torch.autograd.grad(textbook.loss(book, valid), list(book.alphas))):
        close(a, b)


def same_step(method, book, pairs, train):
    """A step of the weights is that of plain SGD, clipped at 5, on the textbook's network."""
    args = method.args
    search.weight_step(method, train, search.optimizers(method.network, args)[0])
    for w in book.weights():
        w.grad = torch.zeros_like(w)            # of an operation that is not drawn, too
    textbook.Step(book, False, args.weight_decay, nesterov=args.nesterov).weight_step(train)
    same_weights(pairs)


def straight_through(alpha, gumbel, temperature):
    """GDAS: one-hot of Gumbel's argmax, with the gradient of the softmax."""
    q = F.softmax((F.log_softmax(alpha, 1) + gumbel) / temperature, 1)
    return F.one_hot(q.argmax(1), alpha.shape[1]).double() - q.detach() + q


@pytest.mark.parametrize('seed', range(6))
def test_derived_networks_of_nb201_equal_the_textbook(float64, seed):
    names = ['none'] * 5 + ['nor_conv_3x3'] if seed == 5 else from_string(random_string(seed))
    ours = Network(4, 4, 5, to_string(names))
    book = textbook.NB201Network(4, 4, 1, names)
    pairs = textbook.copy_weights(ours, book)
    x, y = batch(16)
    close(ours(x), book(x))
    F.cross_entropy(ours(x), y).backward()
    F.cross_entropy(book(x), y).backward()
    for p, block, q in pairs:
        if p.requires_grad:
            close(torch.zeros_like(q) if p.grad is None else p.grad[block],
                  torch.zeros_like(q) if q.grad is None else q.grad)
    close(ours.eval()(x), book.eval()(x))


@pytest.mark.parametrize('space', ['darts', 'nb201'])
def test_gdas_draws_one_operation_straight_through(float64, monkeypatch, space):
    method, ours, book, pairs = with_textbook('--method', 'gdas', '--space', space)
    method.set_tensors(temperature=0.7)
    exponentials = [torch.rand_like(alpha) + 0.1 for alpha in book.alphas]
    draws, cells = itertools.cycle(exponentials), [id(alpha) for alpha in book.alphas]
    monkeypatch.setattr(torch.Tensor, 'exponential_', lambda self: self.copy_(next(draws)))
    book.mix = lambda alpha: straight_through(alpha, -exponentials[cells.index(id(alpha))].log(),
                                              0.7)

    def darts_edge(edge, x, weights):
        best = weights.argmax().item()
        return weights[best] * edge.ops[best](x)

    def nb201_edge(edge, x, weights):       # the benchmark's code adds the others' weights, too
        best = weights.argmax().item()
        return weights[best] * edge[best](x) + weights.sum() - weights[best]

    monkeypatch.setattr(textbook.MixedOp, 'forward', darts_edge)
    monkeypatch.setattr(textbook.NB201Edge, 'forward', nb201_edge)
    same_gradients(method, book, batch())
    same_step(method, book, pairs, batch())


@pytest.mark.parametrize('space', ['darts', 'nb201'])
def test_gdas_goes_on_if_nothing_is_drawn(space):
    method, network = searching('--method', 'gdas', '--space', space)
    method.set_tensors(temperature=0.1)
    with torch.no_grad():
        for alpha in network.alphas.values():
            alpha[:, 0] = 1000                          # none
    grads, loss, _ = search.first_order(method, batch())
    assert loss.isfinite() and not any(grad.any() for grad in grads)
    before = network.classifier.weight.clone()
    search.weight_step(method, batch(), search.optimizers(network, method.args)[0])
    assert not torch.equal(network.classifier.weight, before)


def test_gdas_computes_only_what_is_drawn_and_draws_anew():
    method, network = searching('--method', 'gdas')
    assert [method.begin_epoch(e, 250, 0)['temperature'] for e in (0, 249)] == \
        pytest.approx([10, 0.1])
    calls = []
    for name, module in network.named_modules():
        if '.blocks.' in name and name.count('.') == 6:
            module.register_forward_hook(lambda module, *_: calls.append(module))
    x = torch.ones(2, 3, 8, 8)
    one = network(x)
    assert 10 < len(calls) == len(set(calls)) <= 14 * 3         # three cells of 14 edges
    assert not torch.equal(one, network(x))


def test_dartsminus_adds_an_auxiliary_skip_that_does_not_count(float64):
    method, ours, book, pairs = with_textbook('--space', 'nb201', '--method', 'dartsminus')
    assert [method.begin_epoch(e, 50, 0)['skip_weight'] for e in (0, 25)] == [1, 0.5]
    method.set_tensors(skip_weight=0.3)
    book.mix = lambda alpha: F.softmax(alpha, 1) + 0.3 * torch.tensor([0., 1, 0, 0, 0])
    same_gradients(method, book, batch())
    same_step(method, book, pairs, batch())
    with torch.no_grad():                       # what is added is not what is chosen by
        ours.alphas['cell'].copy_(torch.tensor([0, 0.1, 0.2, 0, 0]).expand(6, 5))
    assert method.result()[0] == to_string(['nor_conv_1x1'] * 6)


def test_betadarts_adds_lambda_times_the_mean_of_logsumexp_to_the_alphas_loss(float64):
    method, ours, book, pairs = with_textbook('--space', 'nb201', '--method', 'betadarts')
    sgd, adam = search.optimizers(ours, method.args)
    assert method.args.weight_decay == 3e-4
    assert [method.begin_epoch(e, 50, 0)['lambda_'] for e in (0, 25)] == [0, 25]
    method.set_tensors(lambda_=2.5)
    train, valid = batch(), batch()
    book_adam = torch.optim.Adam(book.alphas, 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    regularised = textbook.loss(book, valid) + 2.5 * torch.logsumexp(book.alphas[0], 1).mean()
    book.alphas[0].grad, = torch.autograd.grad(regularised, book.alphas)
    book_adam.step()
    search.architecture_step(method, train, valid, sgd, adam)
    close(ours.alphas['cell'], book.alphas[0])
    same_step(method, book, pairs, train)
    # In DARTS's space over both cells together.
    method, ours, book, _ = with_textbook('--method', 'betadarts')
    method.set_tensors(lambda_=2.5)
    mean = torch.cat([torch.logsumexp(alpha, 1) for alpha in book.alphas]).mean()
    zeros = [torch.zeros_like(alpha) for alpha in book.alphas]
    for a, b in zip(method.alpha_gradients(zeros),
                    torch.autograd.grad(2.5 * mean, list(book.alphas))):
        close(a, b)


def to_simplex(q):
    return q.clamp(0, 1) / q.clamp(0, 1).sum(1, keepdim=True)


@pytest.mark.parametrize('space, perturb', [
    ('darts', 'random'), ('nb201', 'random'), ('nb201', 'adversarial')])
def test_sdarts_trains_the_weights_with_perturbed_edges(float64, space, perturb, monkeypatch):
    method, ours, book, pairs = with_textbook('--space', space, '--method', 'sdarts',
                                              '--perturb', perturb)
    assert [method.begin_epoch(e, 50, 0)['radius'] for e in (0, 25)] == \
        pytest.approx([0.03, 0.165])
    method.set_tensors(radius=0.2)
    plain, train, valid = book.mix, batch(), batch()
    cells, starts = [id(a) for a in book.alphas], [torch.rand_like(a) for a in book.alphas]
    draws = itertools.cycle(starts)
    monkeypatch.setattr(torch, 'rand_like', lambda t: next(draws).clone())
    near = [F.softmax(alpha, 1).detach() for alpha in book.alphas]
    moved = [to_simplex(p + 0.2 * (2 * start - 1)) for p, start in zip(near, starts)]

    def loss_at(edges):
        book.mix = lambda alpha: edges[cells.index(id(alpha))]
        return textbook.loss(book, train)

    if perturb == 'adversarial':
        book.eval()
        for _ in range(7):
            moved = [q.requires_grad_() for q in moved]
            grads = torch.autograd.grad(loss_at(moved), moved)
            for k, grad in enumerate(grads):
                shift = moved[k].detach() + 2 * 0.2 / 7 * grad.sign() - near[k]
                moved[k] = to_simplex(near[k] + shift.clamp(-0.2, 0.2))
        assert loss_at(moved) > loss_at(near)
        book.train()
    statistics = {k: v.clone() for k, v in ours.state_dict().items() if 'running' in k}
    for found, wanted in zip(method.perturbation(train).values(), moved, strict=True):
        close(found, wanted)
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in statistics.items())
    assert all(w.requires_grad for w in ours.parameters())
    book.mix = lambda alpha: moved[cells.index(id(alpha))]
    same_step(method, book, pairs, train)
    book.mix = plain                                        # the alphas' step is DARTS's
    same_gradients(method, book, valid)
    assert ours.mix == method.mix


def test_an_adversarial_perturbation_that_does_no_harm_is_undone(float64, monkeypatch):
    method, ours = searching('--space', 'nb201', '--method', 'sdarts', '--perturb', 'adversarial')
    method.set_tensors(radius=0.2)
    losses, forward = iter([2.0, *[1.0] * 8]), search.forward

    def lower(*given):
        loss, right = forward(*given)
        return loss * 0 + next(losses), right

    monkeypatch.setattr(search, 'forward', lower)
    assert torch.equal(method.perturbation(batch())['cell'], ours.probabilities('cell'))


def test_pdarts_keeps_the_strongest_operations_and_goes_deeper(float64):
    method, network = searching('--method', 'pdarts')
    names, sizes = list(network.space.operations), [len(network.cells)]
    for count in (5, 3):
        before, method.network = network, network
        method.next_stage()
        for cell in ('normal', 'reduce'):
            for p, has in zip(before.probabilities(cell).tolist(), method.kept[cell]):
                best = sorted(range(8), key=lambda k: -p[k])[:count]
                assert has == [names[k] for k in sorted(best)]
        network = method.build()
        sizes.append(len(network.cells))
        with torch.no_grad():
            for alpha in network.alphas.values():
                alpha.mul_(500)
    assert sizes == [3, 9, 15]


def test_dropout_on_skips_by_edge_and_epoch():
    method, _ = searching('--method', 'pdarts')
    method.stage = 1
    network = method.build()
    rates = [method.begin_epoch(e, 25, 10)['skip_dropout'] for e in (0, 9, 10, 15)]
    assert rates == pytest.approx([0.4 * 24 / 25, 0.4 * 15 / 25, 0.4, 0.4 * math.exp(-1)])
    skips = [m for m in network.modules() if isinstance(m, search.DroppedSkip)]
    assert len(skips) > 9 and skips[0].probability.item() == pytest.approx(rates[-1])
    skip = search.DroppedSkip(3).train()
    skip.probability.fill_(0.4)
    y = skip(Inputs(torch.ones(64, 4, 8, 8)))
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert (y == 0).float().mean() == pytest.approx(0.4, abs=0.01)
    first, second, _ = y.chunk(3, 1)
    assert not torch.equal(first, second)                       # each edge by itself
    y = skip.eval()(Inputs(torch.ones(64, 4, 8, 8)))
    assert torch.equal(y, torch.ones_like(y))


def test_restriction_to_two_skips_strikes_out_the_weakest(float64):
    method, network = searching('--method', 'pdarts')
    names = list(network.space.operations)
    with torch.no_grad():
        network.alphas['normal'].zero_()
        network.alphas['normal'][:, names.index('skip_connect')] = 3 + 0.01 * torch.arange(14.)
        network.alphas['normal'][:, names.index('sep_conv_3x3')] = 1
        network.alphas['reduce'][:, names.index('skip_connect')] = 3
    free, (held, beside) = network.genotype(), method.result()
    assert [op for op, _ in free.normal] == ['skip_connect'] * 8 and free.reduce == held.reduce
    assert sum(op == 'sep_conv_3x3' for op, _ in held.normal) == 6
    assert [pair for pair in held.normal if pair[0] == 'skip_connect'] == \
        [('skip_connect', 3), ('skip_connect', 4)]              # the strongest, on the last edges
    assert network.genotype() == free == from_plain(beside['without_restriction'])


def test_pdarts_from_start_to_genotype(monkeypatch):
    """Cells, frozen epochs and dropout of the three stages, in a run."""
    seen, step = [], search.bilevel_step

    def watched(method, train, valid, sgd, adam, frozen, moments):
        skips = [m.probability.item() for m in method.network.modules()
                 if isinstance(m, search.DroppedSkip)]
        seen.append((len(method.network.cells), frozen, max(skips, default=None)))
        return step(method, train, valid, sgd, adam, frozen, moments)

    monkeypatch.setattr(search, 'bilevel_step', watched)
    monkeypatch.setattr(search.PDarts, 'MORE_CELLS', (0, 1, 2))         # quicker
    lines = run(search.main, 'p', *DARTS, '--method', 'pdarts', '--epochs', '7',
                '--steps_per_epoch', '1', '--frozen_epochs', '1', '--init_channels', '2')
    cells, frozen, dropped = zip(*seen)
    assert cells == (3, 3, 4, 4, 5, 5, 5)
    assert frozen == (True, False, True, False, True, False, False)
    decay = math.exp(-0.2 * 25 / 3)
    assert dropped == pytest.approx([0, 0, 0.2, 0.4, 0.7 * 2 / 3, 0.7, 0.7 * decay])
    found = json.loads(Path('p/genotype.json').read_text())
    assert sum(op == 'skip_connect' for op, _ in from_plain(found).normal) <= 2
    assert from_plain(found['without_restriction']) == from_plain(lines[-1]['genotype'])


def test_largest_eigenvalue_is_that_of_the_hessian(float64):
    method, ours, book, _ = with_textbook('--space', 'nb201')
    valid, before = batch(n=8), ours.alphas['cell'].detach().clone()

    def loss(alpha):
        book.mix = lambda _: F.softmax(alpha.view(6, 5), 1)
        return textbook.loss(book, valid)

    matrix = torch.autograd.functional.hessian(loss, before.flatten())
    expected = torch.linalg.eigvalsh(matrix)[-1].item() + 1e-3
    got = search.largest_eigenvalue(ours, valid, method.args, iterations=30)
    assert got == pytest.approx(expected, rel=1e-3)
    assert search.largest_eigenvalue(ours, valid, method.args) == pytest.approx(expected, rel=0.02)
    assert torch.equal(ours.alphas['cell'], before)


def test_early_stop_is_that_of_robustdarts():
    def stop(values):
        lines = [{'epoch': 2 * k, 'eigenvalue': value} for k, value in enumerate(values)]
        found = search.before_growth(lines, 50)
        return found and found['epoch']

    assert stop([1.0] * 25) is None
    rising = [1.0] * 9 + [2.0] * 16             # from epoch 18: the mean at 22 is 1.6, at 20 1.2
    assert stop(rising[:11]) is None            # epoch 20 is too early
    assert stop(rising[:12]) == 10 and stop(rising) == 10
    assert stop([1.0] * 20 + [1.4] * 5) == 46 - 12
    assert stop([-1.0] * 20 + [-1.2] * 5) is None
    assert stop([1.0] * 20 + [1.29] * 5) is None
    assert search.before_growth([{'epoch': e} for e in range(50)], 50) is None


def test_early_stop_takes_the_genotype_of_then_and_resumes(monkeypatch):
    """With eigenvalues that grow: the run ends, with the genotype of an epoch before."""
    monkeypatch.setattr(search, 'largest_eigenvalue', lambda *_: next(values))
    flags = [*TINY, '--epochs', '40', '--steps_per_epoch', '1', '--hessian', '1',
             '--arch_learning_rate', '0.1']
    values = iter([1.0] * 12 + [9.0] * 28)
    going = run(search.main, 'go', *flags)
    values = iter([1.0] * 12 + [9.0] * 28)
    lines = run(search.main, 'r', *flags, '--early_stop')
    found = json.loads(Path('r/genotype.json').read_text())
    stop = found['early_stop']
    assert len(going) == 40 and len(lines) == 15 and stop['epoch'] == 8
    assert found['arch_str'] == stop['genotype'] == lines[8]['genotype']
    other = json.loads(Path('go/genotype.json').read_text())
    assert other['early_stop'] == stop and other['arch_str'] == going[-1]['genotype']
    Path('r/genotype.json').unlink()                # killed before the end was written
    assert run(search.main, 'r', *flags, '--early_stop', '--resume') == lines
    assert json.loads(Path('r/genotype.json').read_text()) == found


def test_what_the_log_says_of_the_alphas(monkeypatch, capsys):
    grads, first_order = [], search.first_order

    def watched(*given):
        out = first_order(*given)
        grads.append(out[0][0].clone())
        return out

    monkeypatch.setattr(search, 'first_order', watched)
    lines = run(search.main, 'r', *TINY, '--epochs', '3', '--early_stop', '--arch_learning_rate',
                '0.05')
    assert [line.get('eigenvalue') is not None for line in lines] == [True, False, True]
    for k, line in enumerate(lines):
        p = F.softmax(torch.tensor(line['alphas']['cell']).double(), 1)
        top = p.sort(1, descending=True).values
        names = [list(NB201.operations)[k] for k in p.argmax(1)]
        assert line['genotype'] == to_string(names)
        assert line['entropy_cell'] == pytest.approx(-(p * p.log()).sum(1).mean().item())
        assert line['margin_cell'] == pytest.approx((top[:, 0] - top[:, 1]).mean().item())
        assert line['skips_cell'] == names.count('skip_connect')
        assert line['none_cell'] == names.count('none')
        assert line['truth_for_analysis_only'] == truth(line['genotype'])
        steps = torch.stack(grads[2 * k:2 * k + 2]).double()        # mean over deviation
        signal = steps.mean(0).norm() / steps.std(0, unbiased=False).norm()
        assert line['signal_cell'] == pytest.approx(signal.item(), rel=1e-4)
    assert 'agreement' not in lines[0]
    assert lines[1]['agreement'] == agreement(lines[0]['genotype'], lines[1]['genotype'])
    accuracy = truth(lines[-1]['genotype'])['cifar10']
    assert f'CIFAR-10 {accuracy:.2f}%' in capsys.readouterr().out


def test_arch_data_are_other_images_or_the_same_or_none(monkeypatch):
    seen, step = [], search.bilevel_step

    def watched(method, train, valid, *more):
        seen.append((train[0].clone(), valid[0].clone()))
        return step(method, train, valid, *more)

    monkeypatch.setattr(search, 'bilevel_step', watched)
    halves = {}
    for which in ('valid', 'train', 'none'):
        seen.clear()
        run(search.main, which, *TINY, '--arch_data', which)
        assert all(torch.equal(a, b) == (which != 'valid') for a, b in seen) and len(seen) == 4
        halves[which] = torch.stack([a for a, _ in seen])
    assert torch.equal(halves['valid'], halves['train'])        # of the same half
    sizes = [torch.tensor(line['alphas']['cell']).abs().sum() for line in log('none')]
    assert sizes[1] <= sizes[0]                                 # they shrink, if anything
    assert log('none')[0]['valid_loss'] is None and log('none')[0]['signal_cell'] is None
    assert log('train')[-1]['valid_loss'] is not None


def test_parameters_of_nb201_are_those_of_the_table():
    table, _ = nas_bench_201()
    for seed in range(6):
        arch = random_string(seed)
        assert evaluate.cost(arch, 16, 17)['params'] == table[arch]['params'], arch


def test_look_ups():
    convs, (table, ordered) = to_string(['nor_conv_3x3'] * 6), nas_bench_201()
    assert len(table) == 15625 and list(table).index(convs) == 1462
    assert [round(ordered[name][-1], 2) for name in ordered] == [94.37, 73.51, 47.31]
    assert [round(truth(convs)[name], 2) for name in ordered] == [93.76, 71.11, 41.44]
    best = max(table, key=lambda arch: table[arch]['cifar10'])
    assert truth(best)['rank'] == 1 and truth(best)['percentile'] > 99.99


def test_random_cells_are_uniform():
    counts = torch.zeros(5)
    for seed in range(500):
        for op in from_string(random_string(seed)):
            counts[list(NB201.operations).index(op)] += 1
    assert (counts / counts.sum() - 0.2).abs().max() < 0.03
    cells = [random_genotype(seed) for seed in range(300)]
    names = [op for cell in cells for op, _ in cell.normal + cell.reduce]
    kinds = set(names)
    assert len(kinds) == 7 and 'none' not in kinds
    assert min(map(names.count, kinds)) > 0.8 * len(names) / 7
    assert len({tuple(state for _, state in cell.normal[6:]) for cell in cells}) == 10    # 5 over 2
