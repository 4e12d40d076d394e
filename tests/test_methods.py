"""Every method against its formula, the NAS-Bench-201 space against the textbook, look-ups."""
import json
import math
from pathlib import Path

import textbook
import torch
from torch import nn
from torch.nn import functional as F

import evaluate
import search
from evaluate import cost
from genotypes import (PUBLISHED, agreement, draw, from_json, from_string, nas_bench_201, plain,
                       random_genotype, random_string, to_json, to_string, truth)
from model_search import NB201, Network

import pytest

CPU = torch.device('cpu')


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def close(a, b, tolerance=1e-10):
    error = (a - b).norm()
    assert error <= tolerance * b.norm() + 1e-14, (error / b.norm()).item()


def batch(size=8, n=6):
    return torch.randn(n, 3, size, size), torch.randint(4, (n,))


def supernets(method='darts', *flags, n=1):
    """(args, our supernet of NAS-Bench-201 with its optimizers, the textbook's) of one state."""
    args = search.parse(['--space', 'nb201', '--method', method, '--init_channels', '4',
                         '--cells_per_stage', str(n), '--partial', '1', *flags])
    network, sgd, adam = search.build(args, 4, 'cifar', CPU, 0, None)
    with torch.no_grad():
        network.alphas['cell'].mul_(500)        # far from uniform
    book = textbook.NB201Network(4, 4, n)
    pairs = textbook.copy_nb201(network, book)
    return args, network, sgd, adam, book, pairs


# ---------------------------------------------------------------------------------------------
# NAS-Bench-201


@pytest.mark.parametrize('unrolled', [[], ['--unrolled']])
def test_nb201_steps_equal_the_textbook(float64, unrolled):
    args, ours, sgd, adam, book, pairs = supernets('darts', *unrolled, n=2)
    assert args.nesterov and args.weight_decay == 5e-4
    x, y = batch()
    close(ours(x), book(x))
    book_sgd = torch.optim.SGD(book.weights(), 0.025, momentum=0.9, weight_decay=5e-4,
                               nesterov=True)
    book_adam = torch.optim.Adam(book.alphas, 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    for _ in range(3):
        train, valid = batch(), batch()
        search.bilevel_step(ours, train, valid, sgd, adam, args)
        book.alphas[0].grad = gradient_of_alpha(book, train, valid, book_sgd, unrolled)
        book_adam.step()
        book_sgd.zero_grad()
        textbook.loss(book, train).backward()
        nn.utils.clip_grad_norm_(book.weights(), 5)
        book_sgd.step()
    close(ours.alphas['cell'], book.alphas[0])
    for p, block, q in pairs:
        if p.requires_grad:
            close(p[block], q)


def gradient_of_alpha(book, train, valid, sgd, unrolled):
    """Equation 6 of DARTS, or 7 and 8 for a virtual step with Nesterov's momentum."""
    if not unrolled:
        return torch.autograd.grad(textbook.loss(book, valid), book.alphas)[0]
    import copy
    weights = book.weights()
    virtual = copy.deepcopy(book)
    twin = torch.optim.SGD(virtual.weights(), 0.025, momentum=0.9, weight_decay=5e-4,
                           nesterov=True)
    for w, v in zip(weights, virtual.weights()):
        if sgd.state:
            twin.state[v]['momentum_buffer'] = sgd.state[w]['momentum_buffer'].clone()
    for v, g in zip(virtual.weights(), torch.autograd.grad(textbook.loss(book, train), weights)):
        v.grad = g
    twin.step()
    both = torch.autograd.grad(textbook.loss(virtual, valid),
                               virtual.weights() + list(virtual.alphas))
    eps = 0.01 / math.sqrt(sum((g ** 2).sum().item() for g in both[:-1]))
    sides = []
    for sign in (1, -1):
        moved = copy.deepcopy(book)
        with torch.no_grad():
            for w, g in zip(moved.weights(), both):
                w += sign * eps * g
        sides.append(torch.autograd.grad(textbook.loss(moved, train), moved.alphas)[0])
    return both[-1] - 0.025 * (sides[0] - sides[1]) / (2 * eps)


@pytest.mark.parametrize('seed', range(6))
def test_derived_nb201_networks_equal_the_textbook(float64, seed):
    names = ['none'] * 5 + ['nor_conv_3x3'] if seed == 5 else from_string(random_string(seed))
    ours = Network(4, 4, 5, to_string(names))
    book = textbook.NB201Network(4, 4, 1, names)
    pairs = textbook.copy_nb201(ours, book)
    x, y = batch(16)
    close(ours(x), book(x))
    F.cross_entropy(ours(x), y).backward()
    F.cross_entropy(book(x), y).backward()
    for p, block, q in pairs:
        if p.requires_grad:
            close(torch.zeros_like(q) if p.grad is None else p.grad[block],
                  torch.zeros_like(q) if q.grad is None else q.grad)
    close(ours.eval()(x), book.eval()(x))


def test_parameters_of_nb201_are_those_of_the_table():
    table, _ = nas_bench_201()
    for seed in range(12):
        arch = random_string(seed)
        assert cost(arch, 16, 17)['params'] == table[arch]['params'], arch


def test_look_ups():
    skips, convs = (to_string([name] * 6) for name in ('skip_connect', 'nor_conv_3x3'))
    table, ordered = nas_bench_201()
    assert len(table) == 15625 and list(table).index(convs) == 1462
    assert [round(ordered[name][-1], 2) for name in ordered] == [94.37, 73.51, 47.31]
    for arch, values in ((skips, (54.30, 15.61, 16.32)), (convs, (93.76, 71.11, 41.44))):
        found = truth(arch)
        assert tuple(round(found[name], 2) for name in ordered) == values
    best = max(table, key=lambda arch: table[arch]['cifar10'])
    assert truth(best)['rank'] == 1 and truth(best)['percentile'] > 99.99
    means = [sum(values) / len(values) for values in ordered.values()]
    assert [round(mean, 2) for mean in means] == [87.06, 61.41, 33.59]
    worth = [truth(random_string(seed)) for seed in range(2000)]
    for name, mean, deviation in zip(ordered, means, (12.93, 12.17, 9.51)):
        got = sum(row[name] for row in worth) / len(worth)
        assert abs(got - mean) < 3 * deviation / math.sqrt(len(worth)), name
    assert abs(sum(row['percentile'] for row in worth) / len(worth) - 50) < 2


def test_strings_json_drawing_and_agreement():
    for seed in range(20):
        arch = random_string(seed)
        assert to_string(from_string(arch)) == arch == from_json(to_json(arch, data='noise'))
        assert draw(arch).count('<path') == sum(op != 'none' for op in from_string(arch))
    for broken in ('', '|none~0|', random_string(0).replace('~0', '~1'), random_string(0) + '|',
                   '|conv~0|+|none~0|none~1|+|none~0|none~1|none~2|'):
        with pytest.raises(ValueError, match=r'found\.json'):
            from_string(broken, 'found.json')
    one = random_string(0)
    other = to_string(['none' if op != 'none' else 'skip_connect' for op in from_string(one)[:3]]
                      + list(from_string(one)[3:]))
    assert agreement(one, one) == 1 and agreement(one, other) == 0.5
    first = PUBLISHED['DARTS_V1']
    assert agreement(first, first) == 1 and 0 < agreement(first, PUBLISHED['DARTS_V2']) < 1


# ---------------------------------------------------------------------------------------------
# Methods


def test_gdas_draws_one_operation_straight_through(float64, monkeypatch):
    """Edge weights, gradient of the alphas and one step of both, for given Gumbel draws."""
    args, ours, sgd, adam, book, pairs = supernets('gdas')
    ours.strength.fill_(0.7)
    gumbel = -torch.log(-torch.log(torch.rand(6, 5)))
    monkeypatch.setattr(torch.Tensor, 'exponential_',
                        lambda self: self.copy_((-gumbel).exp()) if self.shape == (6, 5) else 1 / 0)

    def mix(alpha):
        q = F.softmax((F.softmax(alpha, 1).log() + gumbel) / 0.7, 1)
        hard = F.one_hot(q.argmax(1), 5).double()
        return hard - q.detach() + q

    # Of what was not drawn, the benchmark's code adds the weight itself, without the operation.
    def forward(cell, x, weights):
        states, row = [x], 0
        for node in (1, 2, 3):
            total = 0
            for state in range(node):
                best = weights[row].argmax().item()
                total = total + sum(w * op(states[state]) if k == best else w for k, (w, op) in
                                    enumerate(zip(weights[row], cell.edges[row])))
                row += 1
            states.append(total)
        return states[-1]

    book.mix = mix
    monkeypatch.setattr(textbook.NB201Cell, 'forward', forward)
    train, valid = batch(), batch()
    close(ours.mixing()['cell'][0], mix(book.alphas[0]))
    close(ours(train[0]), book(train[0]))
    got, *_ = search.first_order(ours, valid, args)
    expected, = torch.autograd.grad(textbook.loss(book, valid), book.alphas)
    close(got[0], expected)
    step_equal(ours, sgd, args, book, pairs, train)


def step_equal(ours, sgd, args, book, pairs, train):
    """One weight step of ours against plain SGD on the textbook network as it is."""
    book_sgd = torch.optim.SGD(book.weights(), 0.025, momentum=0.9, weight_decay=args.weight_decay,
                               nesterov=True)
    search.weight_step(ours, train, sgd, args)
    loss = textbook.loss(book, train)
    grads = torch.autograd.grad(loss, book.weights(), allow_unused=True, materialize_grads=True)
    for w, g in zip(book.weights(), grads):
        w.grad = g
    nn.utils.clip_grad_norm_(book.weights(), 5)
    book_sgd.step()
    for p, block, q in pairs:
        if p.requires_grad:
            close(p[block], q)


def darts_supernets(method, *flags):
    """Of the DARTS space: (args, our supernet, the textbook's, which mixes with `mix(kind)`)."""
    args = search.parse(['--method', method, '--init_channels', '4', '--layers', '3', *flags])
    ours, *_ = search.build(args, 4, 'cifar', CPU, 0, None)
    with torch.no_grad():
        for alpha in ours.alphas.values():
            alpha.mul_(500)
    book = textbook.Network(4, 4, 3)
    textbook.copy_weights(ours, book)
    return args, ours, book


def same_in_darts(args, ours, book, valid):
    close(ours(valid[0]), book(valid[0]))
    got, *_ = search.first_order(ours, valid, args)
    for a, b in zip(got, torch.autograd.grad(textbook.loss(book, valid), list(book.alphas))):
        close(a, b)


def test_methods_in_the_darts_space(float64, monkeypatch):
    """Both cell types, strides of 2, and for GDAS nothing added for what was not drawn."""
    valid = batch()
    args, ours, book = darts_supernets('dartsminus')
    ours.strength.fill_(0.3)
    second = 0.3 * F.one_hot(torch.tensor(3), 8)
    book.mix = lambda alpha: F.softmax(alpha, 1) + second
    same_in_darts(args, ours, book, valid)

    args, ours, book = darts_supernets('betadarts')
    ours.strength.fill_(2.5)
    both = torch.cat([torch.logsumexp(alpha, 1) for alpha in book.alphas])
    for a, b in zip(search.beta_decay(ours), torch.autograd.grad(2.5 * both.mean(),
                                                                 list(book.alphas))):
        close(a, b)

    args, ours, book = darts_supernets('sdarts')
    ours.strength.fill_(0.1)
    torch.manual_seed(5)
    near = search.perturbed(ours, valid, args)
    assert all(p.shape == (14, 8) and 0.05 < (p - ours.probabilities(kind)).abs().max() < 0.2
               for kind, p in near.items())
    assert not torch.equal(*near.values())
    shift = {kind: (p - ours.probabilities(kind)).detach() for kind, p in near.items()}
    ours.change = lambda kind, p: p + shift[kind]
    kinds = dict(zip(map(id, book.alphas), ('normal', 'reduce')))
    book.mix = lambda alpha: F.softmax(alpha, 1) + shift[kinds[id(alpha)]]
    same_in_darts(args, ours, book, valid)

    args, ours, book = darts_supernets('gdas')
    ours.strength.fill_(0.7)
    noise = {}

    def draw(t):
        return t.copy_(noise.setdefault(len(noise), torch.rand(14, 8).add(0.1))) \
            if t.shape == (14, 8) else None

    def mix(alpha):
        gumbel = -noise[['normal', 'reduce'].index(kinds[id(alpha)])].log()
        q = F.softmax((F.log_softmax(alpha, 1) + gumbel) / 0.7, 1)
        hard = F.one_hot(q.argmax(1), 8).double()
        return hard - q.detach() + q

    def one(mixed_op, x, weights):
        best = weights.argmax().item()
        return weights[best] * mixed_op.ops[best](x)

    monkeypatch.setattr(torch.Tensor, 'exponential_', draw)
    monkeypatch.setattr(textbook.MixedOp, 'forward', one)
    kinds, book.mix = dict(zip(map(id, book.alphas), ('normal', 'reduce'))), mix
    logits = ours(valid[0])
    close(logits, book(valid[0]))
    got = torch.autograd.grad(F.cross_entropy(logits, valid[1]),
                              ours.architecture_parameters())
    for a, b in zip(got, torch.autograd.grad(textbook.loss(book, valid), list(book.alphas))):
        close(a, b)


@pytest.mark.parametrize('space', ['darts', 'nb201'])
def test_gdas_where_nothing_is_drawn(space):
    args = search.parse(['--method', 'gdas', '--space', space])
    network, sgd, _ = search.build(args, 4, 'cifar', CPU, 0, None)
    network.strength.fill_(0.1)
    with torch.no_grad():
        for alpha in network.alphas.values():
            alpha[:, 0] = 50
    grads, loss, _ = search.first_order(network, batch(), args)
    assert loss.isfinite() and not any(grad.any() for grad in grads)
    before = network.classifier.weight.clone()
    search.weight_step(network, batch(), sgd, args)
    assert not torch.equal(network.classifier.weight, before)


def test_gdas_computes_only_what_is_drawn():
    args = search.parse(['--method', 'gdas'])
    network, *_ = search.build(args, 4, 'cifar', CPU, 0, None)
    network.strength.fill_(1)
    calls = []
    for name, module in network.named_modules():
        if '.blocks.' in name and name.count('.') == 6:
            module.register_forward_hook(lambda module, *_: calls.append(module))
    torch.manual_seed(0)
    network(torch.randn(2, 3, 8, 8))
    assert 20 < len(calls) == len(set(calls)) <= 14 * 8
    torch.manual_seed(0)
    one = network(torch.ones(2, 3, 8, 8))
    torch.manual_seed(1)
    assert not torch.equal(one, network(torch.ones(2, 3, 8, 8)))        # drawn anew
    temperatures = [search.strength_at(args, e, 250, 0) for e in (0, 249)]
    assert temperatures == pytest.approx([10, 0.1])


def test_dartsminus_adds_an_auxiliary_skip(float64):
    args, ours, sgd, adam, book, pairs = supernets('dartsminus')
    ours.strength.fill_(0.3)
    book.mix = lambda alpha: F.softmax(alpha, 1) + 0.3 * torch.tensor([0., 1, 0, 0, 0])
    train, valid = batch(), batch()
    close(ours(train[0]), book(train[0]))
    got, *_ = search.first_order(ours, valid, args)
    close(got[0], torch.autograd.grad(textbook.loss(book, valid), book.alphas)[0])
    step_equal(ours, sgd, args, book, pairs, train)
    assert [search.strength_at(args, e, 50, 0) for e in (0, 25)] == [1, 0.5]
    with torch.no_grad():                       # what is added is not what is chosen by
        ours.alphas['cell'].copy_(torch.tensor([0, 0.1, 0.2, 0, 0]).expand(6, 5))
    assert ours.genotype() == to_string(['nor_conv_1x1'] * 6)


def test_betadarts_regularises_the_alphas(float64):
    args, ours, sgd, adam, book, pairs = supernets('betadarts')
    assert args.weight_decay == 3e-4
    ours.strength.fill_(2.5)
    train, valid = batch(), batch()
    book_adam = torch.optim.Adam(book.alphas, 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    regularised = textbook.loss(book, valid) + 2.5 * torch.logsumexp(book.alphas[0], 1).mean()
    book.alphas[0].grad, = torch.autograd.grad(regularised, book.alphas)
    book_adam.step()
    moments = [torch.zeros(2, 6, 5)]
    search.architecture_step(ours, train, valid, sgd, adam, args, moments)
    close(ours.alphas['cell'], book.alphas[0])
    assert moments[0].any() and [search.strength_at(args, e, 50, 0) for e in (0, 25)] == [0, 25]
    step_equal(ours, sgd, args, book, pairs, train)


@pytest.mark.parametrize('kind', ['random', 'adversarial'])
def test_sdarts_trains_the_weights_with_perturbed_edges(float64, kind, monkeypatch):
    args, ours, sgd, adam, book, pairs = supernets('sdarts', '--perturb', kind)
    ours.strength.fill_(0.2)
    start, train, valid = torch.rand(6, 5), batch(), batch()
    monkeypatch.setattr(torch, 'rand_like', lambda t: start.clone())
    p = F.softmax(book.alphas[0], 1).detach()

    def to_simplex(q):
        return q.clamp(0, 1) / q.clamp(0, 1).sum(1, keepdim=True)

    moved = to_simplex(p + 0.2 * (2 * start - 1))
    if kind == 'adversarial':
        def loss_at(q):
            book.mix = lambda _: q
            return textbook.loss(book, train)

        for _ in range(7):
            moved = moved.requires_grad_()
            grad, = torch.autograd.grad(loss_at(moved), moved)
            shift = (moved.detach() + 2 * 0.2 / 7 * grad.sign() - p).clamp(-0.2, 0.2)
            moved = to_simplex(p + shift)
        assert loss_at(moved) > loss_at(p)
    statistics = {k: v.clone() for k, v in ours.state_dict().items() if 'running' in k}
    close(search.perturbed(ours, train, args)['cell'], moved)
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in statistics.items())
    assert all(w.requires_grad for w in ours.parameters()) and ours.change is None
    got, *_ = search.first_order(ours, valid, args)         # the alphas' step is as in DARTS
    book.mix = lambda alpha: F.softmax(alpha, 1)
    close(got[0], torch.autograd.grad(textbook.loss(book, valid), book.alphas)[0])
    book.mix = lambda _: moved
    step_equal(ours, sgd, args, book, pairs, train)
    assert ours.change is None
    eps = [search.strength_at(args, e, 50, 0) for e in (0, 25)]
    assert eps == pytest.approx([0.03, 0.165])


def test_a_perturbation_that_does_no_harm_is_undone(float64, monkeypatch):
    args, ours, *_ = supernets('sdarts', '--perturb', 'adversarial')
    ours.strength.fill_(0.2)
    losses = iter([2.0, *[1.0] * 8])
    forward = search.forward

    def lower(*given):
        loss, right = forward(*given)
        return loss * 0 + next(losses), right

    monkeypatch.setattr(search, 'forward', lower)
    assert torch.equal(search.perturbed(ours, batch(), args)['cell'], ours.probabilities('cell'))


def test_simplex():
    rows = torch.tensor([[0.5, 0.7, -0.2], [-0.1, -0.3, -0.2], [2.0, 0.5, 0.5]])
    expected = torch.tensor([[0.5 / 1.2, 0.7 / 1.2, 0], [1, 0, 0], [0.5, 0.25, 0.25]])
    assert torch.allclose(search.simplex(rows), expected)


# ---------------------------------------------------------------------------------------------
# P-DARTS


def pdarts(stage=0, kept=None, *flags):
    args = search.parse(['--method', 'pdarts', '--init_channels', '4', '--layers', '3', *flags])
    return args, *search.build(args, 4, 'cifar', CPU, stage, kept)


def test_pdarts_keeps_the_strongest_and_goes_deeper(float64):
    args, network, *_ = pdarts()
    names = list(network.space.operations)
    with torch.no_grad():
        for alpha in network.alphas.values():
            alpha.mul_(500)
    kept = search.strongest(network, 5)
    for kind in ('normal', 'reduce'):
        for row, has in zip(network.alphas[kind].tolist(), kept[kind]):
            best = sorted(range(8), key=lambda k: -row[k])[:5]
            assert has == [names[k] for k in sorted(best)]
    args, second, *_ = pdarts(1, kept)
    assert len(second.cells) == 9 and len(network.cells) == 3
    with torch.no_grad():
        second.alphas['normal'].mul_(500)
    for row, has, p in zip(second.alphas['normal'], kept['normal'],
                           second.probabilities('normal')):
        columns = [names.index(name) for name in has]
        close(p[columns], F.softmax(row[columns], 0))
        assert p.sum().item() == pytest.approx(1) and (p > 0).sum() == 5
    x, y = batch()
    grads = torch.autograd.grad(F.cross_entropy(second(x), y), second.alphas['normal'])[0]
    for row, has in zip(grads, kept['normal']):
        assert all((g == 0) == (name not in has) for g, name in zip(row, names))
    third = search.strongest(second, 3)
    assert all(set(a) < set(b) for a, b in zip(third['normal'], kept['normal']))


def test_pdarts_supernet_of_fewer_operations_is_the_plain_sum(float64):
    """Against the textbook supernet with the weights of dropped operations set to zero."""
    _, network, *_ = pdarts()
    kept = search.strongest(network, 5)
    ours = Network(4, 4, 3, kept=kept)
    book = textbook.Network(4, 4, 3)
    textbook.copy_weights(ours, book)
    with torch.no_grad():
        for kind, alpha in zip(('normal', 'reduce'), book.alphas):
            alpha[ours.get_buffer(f'dropped_{kind}')] = -math.inf
    x, _ = batch()
    close(ours(x), book(x))


def test_dropout_on_skips():
    args, network, *_ = pdarts(1, None)
    skips = [m for m in network.modules() if isinstance(m, search.DroppedSkip)]
    assert len(skips) > 9
    rates = [search.strength_at(args, e, 25, 10) for e in (0, 9, 10, 15)]
    assert rates == pytest.approx([24 / 25, 15 / 25, 1, math.exp(-1)])
    inputs = search.partial(type('Inputs', (), {}))()
    inputs.state = torch.ones(64, 4, 8, 8)
    inputs.form = lambda name, edges, make: torch.cat([make()] * edges, 1)
    skip = skips[0]
    skip.probability.fill_(0.4)
    y = skip(inputs)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert (y == 0).float().mean() == pytest.approx(0.4, abs=0.01)
    first, second = y.chunk(skip.edges, 1)[:2]
    assert not torch.equal(first, second)                       # each edge by itself
    assert torch.equal(skip.eval()(inputs), torch.ones_like(y))


def test_restriction_to_two_skips(float64):
    _, network, *_ = pdarts()
    names = list(network.space.operations)
    with torch.no_grad():
        network.alphas['normal'].zero_()
        network.alphas['normal'][:, names.index('skip_connect')] = 3 + 0.01 * torch.arange(14.)
        network.alphas['normal'][:, names.index('sep_conv_3x3')] = 1
        network.alphas['reduce'][:, names.index('skip_connect')] = 3
    free, held = network.genotype(), search.restricted(network)
    assert [op for op, _ in free.normal] == ['skip_connect'] * 8 and free.reduce == held.reduce
    assert sum(op == 'skip_connect' for op, _ in held.normal) == 2
    assert sum(op == 'sep_conv_3x3' for op, _ in held.normal) == 6
    # The strongest skips, on the last edges, are those that stay.
    assert [pair for pair in held.normal if pair[0] == 'skip_connect'] == \
        [('skip_connect', 3), ('skip_connect', 4)]
    assert network.genotype() == free                            # nothing was changed


# ---------------------------------------------------------------------------------------------
# What is measured


def test_largest_eigenvalue_is_that_of_the_hessian(float64):
    args, ours, _, _, book, _ = supernets()
    valid = batch(n=8)
    before = ours.alphas['cell'].detach().clone()

    def loss(alpha):
        book.mix = lambda _: F.softmax(alpha.view(6, 5), 1)
        return textbook.loss(book, valid)

    matrix = torch.autograd.functional.hessian(loss, before.flatten())
    expected = torch.linalg.eigvalsh(matrix)[-1].item() + 1e-3
    got = search.largest_eigenvalue(ours, valid, args, iterations=30)
    assert got == pytest.approx(expected, rel=1e-3)
    assert search.largest_eigenvalue(ours, valid, args) == pytest.approx(expected, rel=0.02)
    assert torch.equal(ours.alphas['cell'], before)


def test_early_stop_is_that_of_robustdarts():
    def log(values):
        return [{'epoch': e, 'eigenvalue': values[e // 2] if e % 2 == 0 else None}
                for e in range(2 * len(values))]

    flat = [1.0] * 25
    assert search.early_stop(log(flat), 50) is None
    rising = [1.0] * 9 + [2.0] * 16             # at epoch 18: the mean at 22 is 1.6, at 20 1.2
    assert search.early_stop(log(rising[:11]), 50) is None              # epoch 20 is too early
    assert search.early_stop(log(rising[:12]), 50)['epoch'] == 10
    assert search.early_stop(log(rising), 50)['epoch'] == 10
    assert search.early_stop(log([1.0] * 20 + [1.4] * 5), 50)['epoch'] == 46 - 12
    assert search.early_stop(log([-1.0] * 20 + [-1.2] * 5), 50) is None
    assert search.early_stop(log([1.0] * 20 + [1.29] * 5), 50) is None
    assert search.early_stop([{'epoch': e} for e in range(50)], 50) is None


TINY = ['--num_images', '64', '--image_size', '8', '--layers', '3', '--cells_per_stage', '1',
        '--init_channels', '4', '--batch_size', '8', '--steps_per_epoch', '3', '--epochs', '3',
        '--gpu', '-1', '--frozen_epochs', '0']
METHODS = [['darts', '--hessian', '1'], ['pcdarts'], ['pdarts'],
           ['pdarts', '--epochs', '5', '--frozen_epochs', '1'], ['gdas'], ['sdarts'],
           ['sdarts', '--perturb', 'adversarial'], ['dartsminus'], ['betadarts'],
           ['darts', '--arch_data', 'train'], ['betadarts', '--arch_data', 'none'],
           ['gdas', '--arch_data', 'train'], ['betadarts', '--unrolled']]


@pytest.mark.parametrize('method', METHODS, ids='-'.join)
def test_every_method_resumes_bit_for_bit(method, monkeypatch):
    spaces = ['nb201'] if method[0] != 'pdarts' else ['darts']
    for space in spaces:
        flags = [*TINY, '--space', space, '--method', *method, '--arch_learning_rate', '0.01']
        assert search.main([*flags, '--save', 'whole']) == 0
        original, calls = search.weight_step, []

        def step_and_stop(*given, original=original, calls=calls):
            calls.append(1)
            if len(calls) in (2, 5, 6, 9):
                import os
                import signal
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*given)

        monkeypatch.setattr(search, 'weight_step', step_and_stop)
        status = 143
        while status == 143:
            status = search.main([*flags, '--save', 'parts', '--resume'])
        assert status == 0 and len(calls) == 3 * len(lines('whole'))
        for name in ('genotype.json', 'log.jsonl'):
            whole, parts = (Path(run, name).read_text().splitlines() for run in ('whole', 'parts'))
            for a, b in zip(map(json.loads, whole), map(json.loads, parts), strict=True):
                for key in ('seconds', 'images_per_second', 'peak_memory_mib'):
                    a.pop(key, None), b.pop(key, None)
                assert a == b


def lines(run):
    return [json.loads(line) for line in Path(run, 'log.jsonl').read_text().splitlines()]


def test_what_the_log_says(capsys):
    flags = [*TINY, '--space', 'nb201', '--arch_learning_rate', '0.05', '--save', 'r']
    assert search.main([*flags, '--early_stop']) == 0
    log = lines('r')
    assert [line.get('eigenvalue') is not None for line in log] == [True, False, True]
    for line in log:
        p = F.softmax(torch.tensor(line['alphas']['cell']).double(), 1)
        top = p.sort(1, descending=True).values
        names = [list(NB201.operations)[k] for k in p.argmax(1)]
        assert line['genotype'] == to_string(names)
        assert line['entropy_cell'] == pytest.approx(-(p * p.log()).sum(1).mean().item())
        assert line['margin_cell'] == pytest.approx((top[:, 0] - top[:, 1]).mean().item())
        assert line['skips_cell'] == names.count('skip_connect')
        assert line['none_cell'] == names.count('none')
        assert line['truth_for_analysis_only'] == truth(line['genotype'])
        assert line['signal_cell'] > 0
    assert 'agreement' not in log[0]
    assert log[1]['agreement'] == agreement(log[0]['genotype'], log[1]['genotype'])
    found = json.loads(Path('r/genotype.json').read_text())
    assert found['arch_str'] == log[-1]['genotype']
    accuracy = truth(found['arch_str'])['cifar10']
    assert f'CIFAR-10 {accuracy:.2f}%' in capsys.readouterr().out


def test_early_stop_takes_the_genotype_of_then_and_resumes(monkeypatch):
    """With eigenvalues that grow: the run ends, with the genotype of an epoch before."""
    def grown(network, *_):
        return 1.0 if network.seen < 12 else 9.0

    describe = search.describe

    def counted(network, moments, steps, before):
        network.seen = before['epoch'] + 1 if before else 0
        return describe(network, moments, steps, before)

    monkeypatch.setattr(search, 'largest_eigenvalue', grown)
    monkeypatch.setattr(search, 'describe', counted)
    flags = [*TINY, '--space', 'nb201', '--epochs', '40', '--steps_per_epoch', '1', '--hessian',
             '1', '--arch_learning_rate', '0.1']
    assert search.main([*flags, '--save', 'go']) == 0
    assert search.main([*flags, '--early_stop', '--save', 'r']) == 0
    log, found = lines('r'), json.loads(Path('r/genotype.json').read_text())
    stop = found['early_stop']
    assert len(lines('go')) == 40 and len(log) == 15 and stop['epoch'] == 8
    assert found['arch_str'] == stop['genotype'] == log[8]['genotype']
    going = json.loads(Path('go/genotype.json').read_text())
    assert going['early_stop'] == stop and going['arch_str'] == lines('go')[-1]['genotype']
    assert evaluate.report('r')['log'][-1]['epoch'] == 8
    Path('r/genotype.json').unlink()                # killed before the end was written
    text = Path('r/log.jsonl').read_text()
    assert search.main([*flags, '--early_stop', '--save', 'r', '--resume']) == 0
    assert json.loads(Path('r/genotype.json').read_text()) == found
    assert Path('r/log.jsonl').read_text() == text


def test_signal_is_mean_over_deviation_of_an_epochs_gradients(monkeypatch):
    grads, first_order = [], search.first_order

    def watched(*given):
        out = first_order(*given)
        grads.append(out[0][0].clone())
        return out

    monkeypatch.setattr(search, 'first_order', watched)
    assert search.main([*TINY, '--space', 'nb201', '--save', 'r']) == 0
    last = torch.stack(grads[-3:]).double()
    expected = last.mean(0).norm() / last.std(0, unbiased=False).norm()
    assert lines('r')[-1]['signal_cell'] == pytest.approx(expected.item(), rel=1e-4)


def test_arch_data(monkeypatch):
    """valid: other images; train: the weights' own; none: the method's own prior alone."""
    seen, step = [], search.bilevel_step

    def watched(network, train, valid, *given, **more):
        seen.append((train[0].clone(), valid[0].clone()))
        return step(network, train, valid, *given, **more)

    monkeypatch.setattr(search, 'bilevel_step', watched)
    for which in ('valid', 'train', 'none'):
        seen.clear()
        assert search.main([*TINY, '--space', 'nb201', '--arch_data', which, '--save', which]) == 0
        assert all(torch.equal(a, b) == (which != 'valid') for a, b in seen) and len(seen) == 9
        if which == 'valid':
            halves = [a for a, _ in seen]
    assert all(torch.equal(a, b) for a, (b, _) in zip(halves, seen))    # of the same half
    start = torch.tensor(lines('none')[0]['alphas']['cell'])
    for line in lines('none'):                                          # they shrink, if anything
        assert line['valid_loss'] is None and line['signal_cell'] is None
        assert torch.tensor(line['alphas']['cell']).abs().sum() <= start.abs().sum() + 1e-6
    assert lines('train')[-1]['valid_loss'] is not None


def test_pdarts_from_start_to_genotype(monkeypatch):
    """Three stages as published: cells, operations an edge, dropout, frozen epochs."""
    assert search.STAGES == [(0, 8, 0.0), (6, 5, 0.4), (12, 3, 0.7)]
    seen, step = [], search.bilevel_step

    def watched(network, *given):
        skips = [m.probability.item() for m in network.modules()
                 if isinstance(m, search.DroppedSkip)]
        seen.append((len(network.cells), given[5], max(skips, default=None)))
        return step(network, *given)

    monkeypatch.setattr(search, 'bilevel_step', watched)
    assert search.main([*TINY, '--method', 'pdarts', '--epochs', '7', '--steps_per_epoch', '1',
                        '--frozen_epochs', '1', '--save', 'p']) == 0
    cells, frozen, dropped = zip(*seen)
    assert cells == (3, 3, 9, 9, 15, 15, 15)            # --layers 3, then 6 and 12 more
    assert frozen == (True, False, True, False, True, False, False)
    decay = math.exp(-0.2 * 25 / 3)
    assert dropped == pytest.approx([0, 0, 0.2, 0.4, 0.7 * 2 / 3, 0.7, 0.7 * decay])
    found = json.loads(Path('p/genotype.json').read_text())
    genotype = from_json(found)
    assert sum(op == 'skip_connect' for op, _ in genotype.normal) <= 2
    assert from_json(found['without_restriction']) == from_json(lines('p')[-1]['genotype'])
    checkpoint = torch.load('p/checkpoint.pt', weights_only=True)
    assert checkpoint['stage'] == 2 and {len(row) for row in checkpoint['kept']['normal']} == {3}


def test_controls():
    for seed in range(3):
        assert search.main(['--method', 'random', '--space', 'nb201', '--seed', str(seed),
                            '--save', f'r{seed}']) == 0
        assert from_json(Path(f'r{seed}/genotype.json').read_text()) == random_string(seed)
    assert not list(Path().glob('data/*'))                              # it needs none
    assert search.main([*TINY, '--space', 'nb201', '--max_steps', '0', '--save', 'untrained']) == 0
    torch.manual_seed(0)
    assert from_json(Path('untrained/genotype.json').read_text()) == \
        Network(4, 10, 5, space=NB201).genotype()
    counts = torch.zeros(5)
    for seed in range(500):
        for op in from_string(random_string(seed)):
            counts[list(NB201.operations).index(op)] += 1
    assert (counts / counts.sum() - 0.2).abs().max() < 0.03
    assert plain(random_genotype(0))['normal'] and isinstance(plain(random_string(0)), str)


@pytest.mark.parametrize('flags, words', [
    (['--method', 'pdarts', '--space', 'nb201'], 'pdarts'),
    (['--method', 'gdas', '--unrolled'], '--unrolled'),
    (['--method', 'gdas', '--hessian', '2'], '--hessian: gdas'),
    (['--method', 'pdarts', '--early_stop'], '--early_stop: pdarts'),
    (['--method', 'pdarts', '--unrolled'], '--unrolled: pdarts'),
    (['--method', 'pdarts', '--epochs', '2'], '--epochs'),
    (['--arch_data', 'none', '--unrolled'], '--unrolled'),
    (['--arch_data', 'none', '--hessian', '1'], '--hessian'),
    (['--method', 'nas'], '--method'), (['--hessian', '0'], '--hessian'),
    (['--perturb', 'much'], '--perturb'), (['--arch_data', 'test'], '--arch_data')])
def test_what_cannot_be(flags, words, capsys):
    assert search.main([*TINY, *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.splitlines()[-1].startswith('search.py: error')
    assert 'Traceback' not in error and not Path('runs').exists()


def test_presets_and_defaults():
    def settings(*flags):
        return vars(search.parse(list(flags)))

    laptop = settings('--preset', 'laptop', '--method', 'betadarts')
    assert laptop['space'] == 'nb201' and laptop['cells_per_stage'] == 1
    assert laptop['epochs'] * laptop['steps_per_epoch'] == 1000 and laptop['image_size'] == 16
    assert settings('--preset', 'laptop', '--epochs', '7')['epochs'] == 7
    pdarts = settings('--method', 'pdarts')
    assert (pdarts['epochs'], pdarts['frozen_epochs'], pdarts['layers']) == (75, 10, 5)
    assert settings('--method', 'pdarts', '--epochs', '30')['frozen_epochs'] == 4
    assert settings('--method', 'gdas')['epochs'] == 250
    assert settings('--method', 'gdas', '--space', 'nb201')['weight_decay'] == 5e-4
    assert not settings()['nesterov'] and settings('--nesterov')['nesterov']
    assert not settings('--space', 'nb201', '--no-nesterov')['nesterov']
    assert settings('--early_stop')['hessian'] == 2
