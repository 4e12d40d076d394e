"""The supernet and the derived network against the textbook, counts, and the genotype rule."""
import pytest
import textbook
import torch
from conftest import batch, close, same_weights, with_textbook
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import model_search
import operations
import search
from evaluate import cost
from genotypes import PUBLISHED, Genotype, from_string, nas_bench_201, random_cell, to_string
from model_search import EDGES, Network, derive

pytestmark = pytest.mark.usefixtures('float64')


def agree(ours, book, x, y):
    """The same logits, gradients of everything, running statistics, and logits in evaluation."""
    logits = [z if isinstance(z, tuple) else (z,) for z in (ours(x), book(x))]
    for a, b in zip(*logits):
        close(a, b)
    for outputs in logits:
        sum(nn.functional.cross_entropy(z, y) for z in outputs).backward()
    pairs = textbook.pairs_of_weights(ours, book)
    for p, block, q in pairs:
        if p.requires_grad:         # NAS-Bench-201's cells may have no use for an operation
            p, q = (torch.zeros_like(t) if t.grad is None else t.grad for t in (p, q))
        close(p[block], q)
    trained = [q for p, _, q in pairs if p.requires_grad]
    assert sum(q.numel() for q in trained) == sum(p.numel() for p in ours.weights)
    for p, q in zip(ours.architecture_parameters(), book.alphas):
        close(p.grad, q.grad)
    close(ours.eval()(x), book.eval()(x))


@pytest.mark.parametrize('shape, more, size', [
    ((8, 10, 3), {}, 14), ((8, 10, 3), {'partial': 4}, 14),
    ((4, 10, 4, PUBLISHED['DARTS_V1']), {'auxiliary': True}, 32),
    ((4, 10, 4, random_cell('darts', 3)), {'auxiliary': True}, 32),
    ((4, 10, 4, random_cell('darts', 4)._replace(normal_concat=(3, 5))), {'auxiliary': True}, 32),
    ((8, 10, 3), {'partial': 2, 'stem': 'imagenet'}, 45),
    ((4, 10, 3, PUBLISHED['DARTS_V2']), {'auxiliary': True, 'stem': 'imagenet'}, 193)])
def test_networks_equal_the_textbook(shape, more, size):
    ours, book = Network(*shape, **more), textbook.Network(*shape, **more)
    for alpha in ours.alphas.values():
        alpha.data.mul_(500)                                    # far from uniform
    textbook.copy_weights(ours, book)
    agree(ours, book, *batch(size, 3))


@pytest.mark.parametrize('arch', [
    random_cell('nb201', 0), random_cell('nb201', 1), to_string(['none'] * 5 + ['nor_conv_3x3'])])
def test_networks_of_nb201_equal_the_textbook_and_have_the_parameters_of_the_table(arch):
    ours, book = Network(4, 4, 5, arch), textbook.NB201Network(4, 4, 1, from_string(arch))
    textbook.copy_weights(ours, book)
    agree(ours, book, *batch(16))
    assert cost(arch, 16, 17)['params'] == nas_bench_201()[0][arch]['params']


@pytest.mark.parametrize('flags', [
    '', '--unrolled', '--space nb201', '--space nb201 --unrolled'])
def test_two_bilevel_steps_equal_the_textbook(flags):
    method, ours, book, pairs = with_textbook('--init_channels', '8', *flags.split())
    sgd, adam = search.optimizers(ours, method.args)
    more = (5e-4, True) if 'nb201' in flags else ()         # weight decay, Nesterov's momentum
    step = textbook.Step(book, 'unrolled' in flags, *more)
    for _ in range(2):
        train, valid = batch(), batch()
        before = {k: v.clone() for k, v in ours.state_dict().items()}
        search.architecture_step(method, train, valid, sgd, adam)
        for k, v in ours.state_dict().items():      # nothing but the alphas has moved
            assert k.startswith('alphas') or torch.equal(v, before[k]), k
        loss, _ = search.weight_step(method, train, sgd)
        close(loss, torch.tensor(step(*train, *valid)))
    for p, q in zip(ours.architecture_parameters(), book.alphas):
        close(p, q)
    same_weights(pairs)


def test_second_order_gradient_is_that_through_the_virtual_step(monkeypatch):
    """Against autograd through equation 7, with smooth functions: it does not see kinks."""
    F = nn.functional
    monkeypatch.setattr(F, 'relu', lambda x, inplace=False: F.softplus(x))
    monkeypatch.setattr(F, 'max_pool2d', lambda x, size, stride, padding, *_, **__: F.avg_pool2d(
        x, size, stride, padding))
    method, ours, book, _ = with_textbook('--unrolled', '--init_channels', '8')
    train, valid = batch(), batch()
    sgd = torch.optim.SGD(ours.weights, 0.025, momentum=0.9, weight_decay=3e-4)
    search.weight_step(method, train, sgd)                              # momentum is not zero
    pairs = textbook.copy_weights(ours, book)
    got = search.second_order(method, train, valid, sgd)[0]
    first = search.first_order(method, valid)[0]
    names = [n for n, _ in book.named_parameters() if not n.startswith('alphas')]
    grads = torch.autograd.grad(textbook.loss(book, train), book.weights(), create_graph=True)
    momentum = {id(q): sgd.state[p]['momentum_buffer'][block]
                for p, block, q in pairs if p.requires_grad}
    moved = {n: w - 0.025 * (g + 3e-4 * w + 0.9 * momentum[id(w)])
             for n, w, g in zip(names, book.weights(), grads)}
    logits = torch.func.functional_call(book, moved, (valid[0],))
    expected = torch.autograd.grad(F.cross_entropy(logits, valid[1]), list(book.alphas))
    for a, b, c in zip(got, expected, first):
        assert (a - b).norm() < 0.02 * b.norm() < 0.1 * (c - b).norm(), (a, b)


def test_parameter_counts():
    def count(*args, **kwargs):
        return sum(p.numel() for p in Network(*args, **kwargs).weights)
    assert count(16, 10, 8) == 1_930_618
    assert count(16, 10, 8, partial=4) == 299_578
    for name, without, with_head in (('DARTS_V1', 3_169_414, 3_645_840),
                                     ('DARTS_V2', 3_349_342, 3_825_768),
                                     ('PC_DARTS_cifar', 3_634_678, 4_111_104)):
        assert cost(PUBLISHED[name])['params'] == without
        assert count(36, 10, 20, PUBLISHED[name], auxiliary=True) == with_head
    assert cost(PUBLISHED['DARTS_V2'], num_classes=100)['params'] == 3_401_272
    assert round(cost(PUBLISHED['DARTS_V2'])['multiply_adds'] / 1e6, 1) == 528.4
    large = cost(PUBLISHED['DARTS_V2'], 48, 14, 1000, 224, 'imagenet')
    assert large['params'] == 4_718_752
    assert count(48, 1000, 14, PUBLISHED['DARTS_V2'], auxiliary=True, stem='imagenet') == 5_979_528
    assert round(large['multiply_adds'] / 1e6, 1) == 529.9
    # The stem of a search at 224 px and C=16 has 24, 48 and 48 channels, as PC-DARTS's code has.
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        network = Network(16, 10, 1, stem='imagenet')
        network.stem1(network.stem(torch.empty(1, 3, 224, 224)))
    assert counter.get_total_flops() == 2 * 56_899_584
    # Narrow ones too: 1x1 convolutions that are computed as one dense product count as they are.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        textbook.Network(8, 10, 4, PUBLISHED['DARTS_V2'], auxiliary=True).eval()(batch(32, 1)[0])
    assert cost(PUBLISHED['DARTS_V2'], 8, 4)['multiply_adds'] == counter.get_total_flops() // 2


def test_genotype_rule_on_ties_and_none():
    normal = torch.zeros(14, 8)
    normal[:, 0] = 0.9                                          # none is never chosen
    normal[EDGES.index((4, 1)), 5] = 0.5
    normal[EDGES.index((4, 3)), 6] = 0.4
    normal[EDGES.index((4, 3)), 7] = 0.4                        # a tie of operations
    genotype = derive(normal, torch.full((14, 8), 0.125))
    assert genotype.normal[4:6] == (('sep_conv_5x5', 1), ('dil_conv_3x3', 3))
    first = (('max_pool_3x3', 0), ('max_pool_3x3', 1))          # ties keep the lower index
    assert genotype.normal[:2] == first and genotype.reduce == first * 4
    assert genotype.normal_concat == genotype.reduce_concat == (2, 3, 4, 5)
    # Of partial channels: of alpha times beta.
    network = Network(8, 10, 1, partial=4)
    for alpha in network.architecture_parameters():
        alpha.data.zero_()
    network.alphas['normal'].data[:, 4] = 1.0
    network.alphas['beta_normal'].data[EDGES.index((5, 4))] = 3.0
    assert network.genotype().normal[-1] == ('sep_conv_3x3', 4)


def test_drop_path_drops_whole_images_and_spares_identities(monkeypatch):
    torch.set_default_dtype(torch.float32)
    x = torch.ones(4000, 2, 1, 1)
    y = x * operations.drop_path(x, 0.3)
    assert len(y.unique()) == 2 and not y.min() and abs(y.mean() - 1) < 0.05
    assert (y[:, 0] == y[:, 1]).all()
    skips, calls = tuple(('skip_connect', state) for state in (0, 1) * 4), []
    monkeypatch.setattr(model_search, 'drop_path', lambda x, p: calls.append(p) or torch.ones(()))
    network = Network(4, 10, 3, Genotype(skips, (2, 3, 4, 5), skips, (2, 3, 4, 5)))
    network.drop_path_prob = 0.5
    network(torch.randn(8, 3, 8, 8))
    network.eval()(torch.randn(8, 3, 8, 8))
    assert calls == [0.5] * 16              # one normal cell of identities, two reduction cells


def test_kept_operations_equal_the_textbook():
    """Of P-DARTS: the others have no weight."""
    names, kept, dropped = list(operations.OPERATIONS), [], torch.full((14, 8), True)
    for e in range(14):
        own = sorted(torch.randperm(8)[:3].tolist())
        kept.append([names[k] for k in own])
        dropped[e, own] = False
    ours = Network(4, 10, 3, kept={'normal': kept, 'reduce': kept})
    book = textbook.Network(4, 10, 3)
    textbook.copy_weights(ours, book)
    book.mix = lambda alpha: nn.functional.softmax(alpha.masked_fill(dropped, -torch.inf), 1)
    agree(ours, book, *batch())


def test_auxiliary_skip_has_reductions_of_its_own():
    """DARTS-: on each of 2 x 8 edges of stride 2, C x C weights more; its weight has no alpha."""
    space = model_search.DARTS._replace(extras={'auxiliary_skip': operations.skip_connect})
    ours, plain = Network(4, 10, 5, space=space), Network(4, 10, 5)
    own = sum(p.numel() for p in ours.weights)
    without = sum(p.numel() for p in plain.weights)
    assert own == 138_742 and own - without == 8 * (8 ** 2 + 16 ** 2)
    assert ours.alphas['normal'].shape == (14, 8) and len(ours.genotype().normal) == 8
    share = torch.tensor(0.3, requires_grad=True)
    ours.mix = lambda cell_type, p: torch.cat([p, share.expand(len(p), 1)], 1)
    # If the two reductions of an edge are equal, the skip has the sum of both weights.
    skip = torch.tensor([name == 'skip_connect' for name in space.operations])
    plain.mix = lambda cell_type, p: p + share.detach() * skip
    state = {name: value for name, value in ours.state_dict().items() if 'auxiliary' not in name}
    plain.load_state_dict(state)
    ours.load_state_dict({name: state[name.replace('auxiliary_skip', 'skip_connect')]
                          for name in ours.state_dict()})
    x, _ = batch()
    close(ours(x), plain(x))
    ours(x).square().sum().backward()
    assert share.grad and all(p.grad is not None for p in ours.parameters())
