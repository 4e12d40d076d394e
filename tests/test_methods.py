"""Every method against its formula written plainly, in float64; NAS-Bench-201; what is logged."""
import copy
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import textbook
import torch
from conftest import (CELLS, CPU, DARTS, ONE_STEP, SIZES, TINY, UNTRAINED, batch, close, log,
                      make_set, read_rows, reports, run, same_weights, searching, with_textbook)
from scipy.stats import rankdata, spearmanr
from torch.nn import functional as F

import evaluate
import search
from generate_data import Batches, read
from genotypes import (distinct_cells, expression, find_genotype, from_string, random_cell,
                       to_string, truth)
from model_search import EDGES, NB201
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
    textbook.Step(book, False, args.weight_decay, args.nesterov).weight_step(train)
    same_weights(pairs)


@pytest.mark.parametrize('space', ['darts', 'nb201'])
def test_gdas_draws_one_operation_straight_through(float64, monkeypatch, space):
    method, ours, book, pairs = with_textbook('--method', 'gdas', '--space', space)
    assert [method.begin_epoch(e, 250)['temperature'] for e in (0, 249)] == pytest.approx([10, 0.1])
    method.set_tensors(temperature=0.7)
    exponentials = [torch.rand_like(alpha) + 0.1 for alpha in book.alphas]
    draws, cells = itertools.cycle(exponentials), [id(alpha) for alpha in book.alphas]
    monkeypatch.setattr(torch.Tensor, 'exponential_', lambda self: self.copy_(next(draws)))

    def mix(alpha):
        gumbel = -exponentials[cells.index(id(alpha))].log()
        q = F.softmax((F.log_softmax(alpha, 1) + gumbel) / 0.7, 1)
        return F.one_hot(q.argmax(1), alpha.shape[1]).double() - q.detach() + q

    def drawn(edge, x, weights):
        best = weights.argmax().item()
        y = weights[best] * [*edge.values()][best](x)
        return y if space == 'darts' else y + weights.sum() - weights[best]     # as NB201's code

    book.mix = mix
    monkeypatch.setattr(textbook.MixedOp, 'forward', drawn)
    same_gradients(method, book, batch())
    same_step(method, book, pairs, batch())


@pytest.mark.parametrize('space', ['darts', 'nb201'])
def test_gdas_goes_on_if_nothing_is_drawn(space):
    method, network = searching('--method', 'gdas', '--space', space)
    method.set_tensors(temperature=0.1)
    for alpha in network.alphas.values():
        alpha.data[:, 0] = 1000                         # none
    grads, loss, _ = search.first_order(method, batch())
    assert loss.isfinite() and not any(grad.any() for grad in grads)
    before = network.classifier.weight.clone()
    search.weight_step(method, batch(), search.optimizers(network, method.args)[0])
    assert not torch.equal(network.classifier.weight, before)


@pytest.mark.parametrize('method', ['gdas', 'oneshot'])
@pytest.mark.parametrize('space', ['darts', 'nb201'])
def test_a_step_computes_only_the_operations_that_are_drawn_and_draws_anew(method, space):
    torch.manual_seed(0)
    method, network = searching('--method', method, '--space', space)
    assert method.one_path
    calls, draws = [], set()
    for name, module in network.named_modules():
        if '.blocks.' in name and name.count('.') == 6:
            module.register_forward_hook(lambda module, *_: calls.append(module))
    sgd, _ = search.optimizers(network, method.args)
    method.begin_epoch(0, 1)
    for _ in range(3):
        calls.clear()
        search.weight_step(method, batch(), sgd)
        # One on each of three cells' edges at most, which are 6, or 8 or 14 with a cell drawn.
        edges = 6 if space == 'nb201' else 8 if method.scores else 14
        assert len(calls) == len(set(calls)) <= 3 * edges
        draws.add(frozenset(map(id, calls)))
    assert len(draws) == 3


def test_dartsminus_adds_an_auxiliary_skip_that_does_not_count(float64):
    method, ours, book, pairs = with_textbook('--space', 'nb201', '--method', 'dartsminus')
    assert [method.begin_epoch(e, 50)['skip_weight'] for e in (0, 25)] == [1, 0.5]
    method.set_tensors(skip_weight=0.3)
    book.mix = lambda alpha: F.softmax(alpha, 1) + 0.3 * torch.tensor([0., 1, 0, 0, 0])
    same_gradients(method, book, batch())
    same_step(method, book, pairs, batch())
    ours.alphas['cell'].data[:] = torch.tensor([0, 0.1, 0.2, 0, 0])   # no skip is added to these
    assert method.result()[0] == to_string(['nor_conv_1x1'] * 6)


def test_betadarts_adds_lambda_times_the_mean_of_logsumexp_to_the_alphas_loss(float64):
    method, ours, book, pairs = with_textbook('--space', 'nb201', '--method', 'betadarts')
    sgd, adam = search.optimizers(ours, method.args)
    assert [method.begin_epoch(e, 50)['lambda_'] for e in (0, 25)] == [0, 25]
    method.set_tensors(lambda_=2.5)
    train, valid = batch(), batch()
    book_adam = textbook.Step(book, False).adam
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
    got = torch.autograd.grad(method.alpha_loss(), ours.architecture_parameters())
    for a, b in zip(got, torch.autograd.grad(2.5 * mean, list(book.alphas))):
        close(a, b)


def test_a_method_may_read_its_alphas_in_another_way():
    class Fair(search.Darts):                           # FairDARTS (arXiv 1911.12126)
        def probabilities(self, alpha):
            return alpha.sigmoid()

    method = Fair(search.parse(DARTS), 4, 'cifar', CPU)
    network = method.build()
    alpha = network.alphas['normal'].data
    assert torch.equal(network.edge_weights('normal')[0], alpha.sigmoid())
    alpha[[EDGES.index((3, 0)), EDGES.index((3, 1))]] = 5.0     # a softmax would take state 2
    alpha[EDGES.index((3, 2))] = torch.tensor([-3., -3, -3, -3, 1, -3, -3, -3])
    assert [state for _, state in network.genotype().normal[2:4]] == [0, 1]


def to_simplex(q):
    return q.clamp(0, 1) / q.clamp(0, 1).sum(1, keepdim=True)


@pytest.mark.parametrize('space, perturb', [('darts', 'random'), ('nb201', 'adversarial')])
def test_sdarts_trains_the_weights_with_perturbed_edges(float64, space, perturb, monkeypatch):
    method, ours, book, pairs = with_textbook('--space', space, '--method', 'sdarts',
                                              '--perturb', perturb)
    assert [method.begin_epoch(e, 50)['radius'] for e in (0, 25)] == pytest.approx([0.03, 0.165])
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


def test_an_adversarial_perturbation_that_does_no_harm_is_undone(monkeypatch):
    method, ours = searching('--space', 'nb201', '--method', 'sdarts', '--perturb', 'adversarial')
    method.set_tensors(radius=0.2)
    losses, forward = iter([2.0, *[1.0] * 8]), search.forward
    monkeypatch.setattr(search, 'forward', lambda *given: (
        forward(*given)[0] * 0 + next(losses), torch.zeros(())))
    assert torch.equal(method.perturbation(batch())['cell'], ours.softmax(ours.alphas['cell']))


def test_pdarts_holds_two_skips_keeps_the_strongest_operations_and_goes_deeper(float64):
    method, network = searching('--method', 'pdarts')
    names, sizes = list(network.space.operations), [3]
    normal, reduce = (alpha.data for alpha in network.alphas.values())
    normal.zero_()
    normal[:, names.index('skip_connect')] = 3 + 0.01 * torch.arange(14.)
    normal[:, names.index('sep_conv_3x3')] = 1
    reduce[:, names.index('skip_connect')] = 3
    free, (held, _) = network.genotype(), method.result()
    assert [op for op, _ in free.normal] == ['skip_connect'] * 8 and free.reduce == held.reduce
    assert sum(op == 'sep_conv_3x3' for op, _ in held.normal) == 6
    assert [pair for pair in held.normal if pair[0] == 'skip_connect'] == \
        [('skip_connect', 3), ('skip_connect', 4)]              # the strongest, on the last edges
    assert network.genotype() == free
    for count in (5, 3):
        for alpha in network.alphas.values():
            alpha.data.normal_()
        method.next_stage()
        for cell, kept in method.kept.items():
            for p, has in zip(network.softmax(network.alphas[cell]).tolist(), kept):
                best = sorted(range(8), key=lambda k: -p[k])[:count]
                assert has == [names[k] for k in sorted(best)]
        network = method.build()
        sizes.append(len(network.cells))
    assert sizes == [3, 9, 15]


def test_dropout_on_skips_is_by_element_and_edge():
    skip = search.DroppedSkip(3).train()
    skip.probability.fill_(0.4)
    y = skip(Inputs(torch.ones(64, 4, 8, 8)))
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert (y == 0).float().mean() == pytest.approx(0.4, abs=0.01)
    first, second, _ = y.chunk(3, 1)
    assert not torch.equal(first, second)
    y = skip.eval()(Inputs(torch.ones(64, 4, 8, 8)))
    assert torch.equal(y, torch.ones_like(y))


def test_pdarts_from_start_to_genotype(monkeypatch):
    """Cells, frozen epochs and dropout of the three stages, in a run."""
    def step(method, *given):
        skips = [m for m in method.network.modules() if isinstance(m, search.DroppedSkip)]
        seen.append((len(method.network.cells), given[-1], skips[0].probability.item()))
        return original(method, *given)

    seen, original = [], search.bilevel_step
    monkeypatch.setattr(search, 'bilevel_step', step)
    monkeypatch.setattr(search.PDarts, 'MORE_CELLS', (0, 1, 2))         # quicker
    lines = run(search.main, 'p', *DARTS, '--method', 'pdarts', '--epochs', '7',
                '--steps_per_epoch', '1', '--frozen_epochs', '1', '--init_channels', '2')
    assert [lines[k]['learning_rate'] for k in (0, 2, 4)] == [0.025] * 3    # each stage's own fall
    cells, frozen, dropped = zip(*seen)
    assert cells == (3, 3, 4, 4, 5, 5, 5)
    assert frozen == (True, False, True, False, True, False, False)
    decay = math.exp(-0.2 * 25 / 3)
    assert dropped == pytest.approx([0, 0, 0.2, 0.4, 0.7 * 2 / 3, 0.7, 0.7 * decay])
    assert sum(op == 'skip_connect' for op, _ in find_genotype('p')[0].normal) <= 2


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


def test_images_of_the_alphas_begin_again_in_another_order_if_they_are_fewer():
    batches = Batches(make_set('n'), range(16), 4, CPU)
    at = SimpleNamespace(step=0, epochs=3)
    whole = [x for x, _ in itertools.islice(search.endless(batches, 1, at), 10)]
    turns = [torch.cat(whole[k:k + 4]).flatten(1) for k in (0, 4)]
    assert not torch.equal(*turns) and torch.equal(*(turn.sort(0).values for turn in turns))
    batches = Batches(read('n', {'fresh': 2}), range(16), 4, CPU, workers=0)
    assert len(list(itertools.islice(search.endless(batches, 1, at), 10))) == 10
    assert (batches.turns == 0).all()                   # epochs 0, 1: one draw


def test_early_stop_is_that_of_robustdarts():
    rising = [1.0] * 9 + [2.0] * 16             # from epoch 18: the mean at 22 is 1.6, at 20 1.2
    for values, epoch in (([1.0] * 25, None), (rising[:12], 10), (rising, 10),
                          (rising[:11], None),              # epoch 20 is too early
                          ([1.0] * 20 + [1.4] * 5, 46 - 12), ([1.0] * 20 + [1.29] * 5, None),
                          ([-1.0] * 20 + [-1.2] * 5, None)):
        lines = [{'epoch': 2 * k, 'eigenvalue': value} for k, value in enumerate(values)]
        found = search.before_growth(lines, 50)
        assert (found and found['epoch']) == epoch
    assert search.before_growth([{'epoch': e} for e in range(50)], 50) is None


def test_early_stop_takes_the_genotype_of_then_and_resumes(monkeypatch):
    """With eigenvalues that grow: the run ends, with the genotype of an epoch before."""
    flags = [*TINY, '--epochs', '20', '--steps_per_epoch', '1', '--hessian', '1',
             '--arch_learning_rate', '0.1']
    logs, found = {}, {}
    for name, more in (('go', []), ('r', ['--early_stop'])):
        values = iter([1.0] * 12 + [9.0] * 8)
        monkeypatch.setattr(search, 'largest_eigenvalue', lambda *_, values=values: next(values))
        logs[name] = run(search.main, name, *flags, *more)
        found[name] = json.loads(Path(name, 'genotype.json').read_text())
    assert len(logs['go']) == 20 and len(logs['r']) == 13 and found['r']['early_stop'] == 6
    assert found['r']['arch_str'] == logs['r'][6]['genotype'] and 'early_stop' not in found['go']
    assert found['go']['arch_str'] == logs['go'][-1]['genotype']
    Path('r/genotype.json').unlink()                # killed before the end was written
    assert run(search.main, 'r', *flags, '--early_stop', '--resume') == logs['r']
    assert json.loads(Path('r/genotype.json').read_text()) == found['r']


def test_what_the_log_says_of_the_alphas(capsys):
    lines = run(search.main, 'r', *TINY, '--epochs', '4', '--hessian', '2', '--frozen_epochs', '1',
                '--arch_learning_rate', '0.05')
    # Of every second epoch, but not while the alphas are not trained.
    assert ['eigenvalue' in line for line in lines] == [False, False, True, False]
    for line in lines:
        p = F.softmax(torch.tensor(line['alphas']['cell']).double(), 1)
        entropy = -(p * p.log()).sum(1).mean().item()
        assert line['entropy_cell'] == pytest.approx(entropy, rel=1e-4)
        names = [list(NB201.operations)[k] for k in p.argmax(1)]
        assert line['genotype'] == to_string(names)
        assert line['skips_cell'] == names.count('skip_connect')
        assert line['truth_for_analysis_only'] == truth(line['genotype'])
    accuracy = truth(lines[-1]['genotype'])['cifar10']
    assert f'CIFAR-10 {accuracy:.2f}%' in capsys.readouterr().out


def test_arch_data_are_other_images_or_the_same_or_none(monkeypatch):
    seen, step = [], search.bilevel_step
    monkeypatch.setattr(search, 'bilevel_step', lambda method, train, valid, *more: seen.append(
        (train[0].clone(), valid[0].clone())) or step(method, train, valid, *more))
    for which in ('valid', 'train', 'none'):
        run(search.main, which, *TINY, '--arch_data', which)
        assert all(torch.equal(a, b) == (which != 'valid') for a, b in seen[-4:])
    assert all(torch.equal(seen[k][0], seen[k + 4][0]) for k in range(4))       # the same images
    first, last = log('none')
    assert np.abs(last['alphas']['cell']).sum() <= np.abs(first['alphas']['cell']).sum()
    assert first['valid_loss'] is None
    assert log('train')[-1]['valid_loss'] is not None


def test_random_cells_are_uniform():
    found = Counter(op for seed in range(500) for op in from_string(random_cell('nb201', seed)))
    assert set(found) == set(NB201.operations)
    assert all(abs(count / 3000 - 0.2) < 0.03 for count in found.values())
    cells = [random_cell('darts', seed) for seed in range(300)]
    found = Counter(op for cell in cells for op, _ in cell.normal + cell.reduce)
    assert len(found) == 7 and 'none' not in found and min(found.values()) > 0.8 * 4800 / 7
    assert len({tuple(state for _, state in cell.normal[6:]) for cell in cells}) == 10  # all pairs


# Methods that score cells

def network_of(supernet, arch):
    """The textbook's network of a cell, with the weights of its supernet."""
    chosen = {}                                 # of each edge, for deepcopy to put in its place
    for cell in supernet.cells:
        if isinstance(cell, textbook.NB201Cell):
            for edge, name in zip(cell.edges.values(), from_string(arch)):
                chosen[id(edge)] = textbook.MixedOp({name: copy.deepcopy(edge[name])})
    network = copy.deepcopy(supernet, chosen)
    network.alphas = torch.nn.ParameterList()
    return network


def test_scores_of_200_cells_are_those_of_networks_built_cell_by_cell(float64):
    method, _, book, _ = with_textbook('--space', 'nb201', '--method', 'oneshot')
    method.halves = [batch(), batch()]
    method.products = {}
    cells = distinct_cells()
    assert len(cells) == len({expression(cell)[0] for cell in cells}) == 6466
    assert expression(to_string(['skip_connect'] * 6))[0] == 'x+x+x+x'
    cells = cells[::32][:200]
    for arch in cells:
        method.take(arch)
        scores, network = method.measure(arch), network_of(book, arch)
        for half, (x, y) in zip(('train', 'valid'), method.halves):
            logits = network(x)
            loss = F.cross_entropy(logits, y).item()
            assert scores[f'{half}_loss'] == pytest.approx(loss, abs=1e-10)
            right = (logits.argmax(1) == y).double().mean().item()
            assert scores[f'{half}_accuracy'] == pytest.approx(right)


def test_angle_is_that_of_the_weights_on_the_paths_before_and_after(float64):
    torch.manual_seed(0)                        # --seed
    method, _, before, _ = with_textbook('--space', 'nb201', '--method', 'oneshot')
    for p in method.network.weights:
        p.data.add_(0.1 * torch.randn_like(p))
    after = textbook.NB201Network(4, 4, 1)
    textbook.copy_weights(method.network, after)
    method.batches, method.fixed_batch = [0, 0], lambda *_: batch()
    method.prepare()
    # Node 2 leads nowhere: on paths are edges 1,0 and 3,1, and edge 3,0 has no weights.
    names = ['nor_conv_3x3', 'none', 'nor_conv_1x1', 'skip_connect', 'nor_conv_3x3', 'none']
    vectors = []
    for book in (before, after):
        cells = [cell for cell in book.cells if isinstance(cell, textbook.NB201Cell)]
        vectors.append(torch.cat([cell.edges[edge]['nor_conv_3x3'][1].weight.flatten()
                                  for cell in cells for edge in ('1,0', '3,1')]))
    angle = torch.acos(torch.cosine_similarity(*vectors, dim=0)).item()
    # Here the last edge is behind a node that gets nothing.
    dead = ['nor_conv_3x3', 'none', 'none', 'none', 'none', 'nor_conv_1x1']
    for arch, wanted in ((names, angle), (['skip_connect'] * 6, 0), (dead, 0)):
        method.take(to_string(arch))
        assert method.measure(to_string(arch))['angle'] == pytest.approx(wanted, abs=1e-10)


def naswot(network, x, y):
    """log |det| of the kernel of how many ReLUs agree, from Hamming's distance."""
    codes = []
    relus = [module for module in network.modules() if isinstance(module, torch.nn.ReLU)]
    for module in (*relus, network.last):               # the last is before a functional ReLU
        module.register_forward_hook(lambda module, x, out: codes.append((out > 0).flatten(1)))
    network(x)
    code = torch.cat(codes, 1)
    distance = (code[:, None] != code[None]).sum(2)
    return torch.linalg.slogdet((code.shape[1] - distance).double())[1].item()


def snip(network, x, y):
    F.cross_entropy(network(x), y).backward()
    return sum((p * p.grad).abs().sum().item() for p in network.parameters()
               if p.dim() > 1 and p.grad is not None)


def synflow(network, x, y):
    for module in [*network.modules()]:
        for name, child in module.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(module, name, torch.nn.Identity())
    for p in network.parameters():
        p.data.abs_()
    network(torch.ones_like(x[:1])).sum().backward()
    return sum((p * p.grad).sum().item() for p in network.parameters()
               if p.dim() > 1 and p.grad is not None)


@pytest.mark.parametrize('formula', [naswot, snip, synflow])
def test_scores_of_untrained_cells_are_those_of_plain_formulas(float64, formula):
    name, pair = formula.__name__, batch()
    method, _, book, _ = with_textbook('--space', 'nb201', '--method', name)
    method.batches = [SimpleNamespace(data=SimpleNamespace(image_size=8))]
    rows = [*range(6), 2] if name == 'naswot' else range(6)     # it takes equal images once
    method.fixed_batch = lambda *_: (pair[0][rows], pair[1])
    method.prepare()
    for seed in range(12):
        arch = random_cell('nb201', seed)
        method.take(arch)
        got, wanted = method.measure(arch)[name], formula(network_of(book, arch), *pair)
        assert got == pytest.approx(wanted, rel=1e-9) or got == wanted == -math.inf


@pytest.mark.parametrize('name', ['oneshot', 'naswot', 'snip', 'synflow'])
@pytest.mark.parametrize('space', ['darts', 'nb201'])
def test_every_scoring_method_takes_the_best_of_its_scores(name, space, capsys):
    some = ONE_STEP if name == 'oneshot' else ['--repeats', '2']
    cells = CELLS if space == 'nb201' else SIZES[:2]
    lines = run(search.main, 'run', *UNTRAINED[:-len(CELLS)], *cells, *some, '--method', name)
    assert lines[-1]['cells'] == 6
    rows = read_rows('run/scores.csv')
    found = json.loads(Path('run/genotype.json').read_text())
    by = 'train_loss' if name == 'oneshot' else name            # noise: labels are random
    assert found['score'] == by and len(rows) == 6 and found['arch_data'] is None
    best = (min if by == 'train_loss' else max)(rows, key=lambda row: float(row[by]))
    cell = {'arch_str': best['genotype']} if space == 'nb201' else json.loads(best['genotype'])
    assert cell.items() <= found.items()
    row, = reports(capsys, 'run')
    assert row['score'] == by and ('spearman' in row) == (space == 'nb201')
    evaluate.main(['run', '--plot', 'scores.svg', '--gpu', '-1'])
    drawn = Path('scores.svg').read_text()
    assert ('true CIFAR-10' if space == 'nb201' else 'parameters') in drawn


def test_score_and_repeats_have_an_effect_and_rank_correlations_are_those_of_scipy(capsys):
    flags = [*UNTRAINED, '--candidates', '12', '--method', 'oneshot', '--epochs', '1',
             '--train_portion', '0.75', '--valid_fraction', '0.2']
    lines = run(search.main, 'run', *flags)
    assert lines[0]['steps'] == 48 // 8         # all training images, if 12 others make one batch
    run(search.main, 'angle', *flags, '--score', 'angle')
    assert json.loads(Path('angle/genotype.json').read_text())['score'] == 'angle'
    assert Path('angle/scores.csv').read_text() == Path('run/scores.csv').read_text()
    for repeats in '12':
        run(search.main, repeats, *UNTRAINED, '--method', 'naswot', '--repeats', repeats)
    assert Path('1/scores.csv').read_text() != Path('2/scores.csv').read_text()
    scores, by = evaluate.read_cell_scores('run')
    row, = reports(capsys, 'run')
    assert by == 'train_loss' and row['cells'] == 12
    value, truth, params = (rankdata(scores[name]) for name in (by, 'cifar10', 'cell_params'))
    assert row['spearman'] == pytest.approx(spearmanr(value, truth)[0])
    left = [v - np.polyval(np.polyfit(params, v, 1), params) for v in (value, truth)]
    assert row['spearman_given_params'] == pytest.approx(np.corrcoef(*left)[0, 1])


def test_the_slightest_alpha_decides_and_equal_ones_are_broken_by_seed():
    method, network = searching('--method', 'pdarts')
    _, supernet = searching('--space', 'nb201')
    for alpha in (*network.alphas.values(), *supernet.alphas.values()):
        alpha.data.zero_()
    method.next_stage()
    assert len(set(map(tuple, method.kept['normal']))) > 7          # of 14 edges
    found = Counter(name for seed in range(50) for name in from_string(supernet.genotype(seed)))
    assert min(found[name] for name in NB201.operations) > 30              # 60 are expected
    assert supernet.genotype(3) == supernet.genotype(3)
    supernet.alphas['cell'].data[:, 3] = 1e-9                   # float32's softmax is flat
    assert supernet.genotype() == to_string(['nor_conv_3x3'] * 6)


def test_a_method_whose_numbers_change_by_epoch_gets_new_cuda_graphs_unless_they_are_tensors(
        monkeypatch):
    class Ramp(search.Darts):
        def begin_epoch(self, epoch, epochs):
            self.weight = float(epoch > 0)
            return {'weight': self.weight}

    made = []
    monkeypatch.setitem(search.METHODS, 'ramp', Ramp)
    monkeypatch.setattr(search, 'GraphedStep', lambda step, *_: made.append(step) or step)
    lines = run(search.main, 'ramp', *TINY, '--method', 'ramp', '--epochs', '3')
    assert [line['weight'] for line in lines] == [0, 1, 1] and len(made) == 2
    run(search.main, 'beta', *TINY, '--method', 'betadarts')
    assert len(made) == 3
