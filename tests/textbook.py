"""DARTS and PC-DARTS as the papers describe them: one module per edge and operation, plain, slow.

The fast supernet is held against it, in float64 and in time, and shares only the order of
operations and edges. Sources: DARTS (arXiv 1806.09055), PC-DARTS (arXiv 1907.05737).
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

NAMES = ['none', 'max_pool_3x3', 'avg_pool_3x3', 'skip_connect', 'sep_conv_3x3', 'sep_conv_5x5',
         'dil_conv_3x3', 'dil_conv_5x5']
NODES = 4


class Zero(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return x[:, :, ::self.stride, ::self.stride] * 0


def conv_bn(c, stride, size, dilation, affine):
    padding = dilation * (size // 2)
    return [nn.ReLU(),
            nn.Conv2d(c, c, size, stride, padding, dilation, groups=c, bias=False),
            nn.Conv2d(c, c, 1, bias=False),
            nn.BatchNorm2d(c, affine=affine)]


class FactorizedReduce(nn.Module):
    def __init__(self, c_in, c_out, affine):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out // 2, 1, 2, bias=False)
        self.conv2 = nn.Conv2d(c_in, c_out - c_out // 2, 1, 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out, affine=affine)

    def forward(self, x):
        x = F.relu(x)
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.bn(torch.cat([self.conv1(x), self.conv2(x[:, :, 1:, 1:])], 1))


def operation(name, c, stride, affine):
    if name == 'none':
        return Zero(stride)
    if name == 'max_pool_3x3':
        pool = nn.MaxPool2d(3, stride, 1)
    elif name == 'avg_pool_3x3':
        pool = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    elif name == 'skip_connect':
        return nn.Identity() if stride == 1 else FactorizedReduce(c, c, affine)
    else:
        size = int(name[-1])
        if name.startswith('dil'):
            return nn.Sequential(*conv_bn(c, stride, size, 2, affine))
        return nn.Sequential(*conv_bn(c, stride, size, 1, affine), *conv_bn(c, 1, size, 1, affine))
    return pool if affine else nn.Sequential(pool, nn.BatchNorm2d(c, affine=False))


class MixedOp(nn.ModuleDict):
    """The candidates of one edge by name, on the first 1/partial of the channels."""
    def __init__(self, operations, stride=1, partial=1):
        super().__init__(operations)
        self.stride, self.partial = stride, partial

    def forward(self, x, weights):
        c = x.shape[1] // self.partial
        y = sum(w * op(x[:, :c]) for w, op in zip(weights, self.values()))
        if self.partial == 1:
            return y
        rest = x[:, c:] if self.stride == 1 else F.max_pool2d(x[:, c:], 2, ceil_mode=True)
        return F.channel_shuffle(torch.cat([y, rest], 1), self.partial)


def relu_conv_bn(c_in, c_out, affine):
    return nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False),
                         nn.BatchNorm2d(c_out, affine=affine))


class Cell(nn.Module):
    """A cell of the supernet, or of a derived network where `pairs` is given."""
    def __init__(self, c_before, c_last, c, reduction, reduction_before, partial, pairs, concat):
        super().__init__()
        self.reduction, affine = reduction, pairs is not None
        before = FactorizedReduce if reduction_before else relu_conv_bn
        self.pre0, self.pre1 = before(c_before, c, affine), relu_conv_bn(c_last, c, affine)
        self.concat, self.edges = concat, nn.ModuleDict()
        for node in range(2, 2 + NODES):
            inputs = pairs[2 * node - 4:2 * node - 2] if affine else enumerate(range(node))
            for name, state in inputs:
                stride = 2 if reduction and state < 2 else 1
                names = [name] if affine else NAMES
                ops = {name: operation(name, c // partial, stride, affine) for name in names}
                self.edges[f'{node},{state}'] = MixedOp(ops, stride, partial)

    def forward(self, s0, s1, weights, shares, drop_path_prob):
        states = [self.pre0(s0), self.pre1(s1)]
        rows = iter(zip(weights, shares)) if weights is not None else None
        for node in range(2, 2 + NODES):
            total = 0
            for state, x in enumerate(states):
                key = f'{node},{state}'
                if rows:
                    row, share = next(rows)
                    total = total + share * self.edges[key](x, row)
                elif key in self.edges:
                    op, = self.edges[key].values()
                    y = op(x)
                    if drop_path_prob and not isinstance(op, nn.Identity):
                        keep = torch.rand(len(y), 1, 1, 1, device=y.device) >= drop_path_prob
                        y = y / (1 - drop_path_prob) * keep
                    total = total + y
            states.append(total)
        return torch.cat([states[node] for node in self.concat], 1)


class Network(nn.Module):
    """Supernet, or the derived network of a genotype (auxiliary logits beside, when training)."""
    def __init__(self, c, num_classes, layers, genotype=None, partial=1, auxiliary=False,
                 stem='cifar'):
        super().__init__()
        self.partial, self.drop_path_prob = partial, 0
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * c, 3, 1, 1, bias=False), nn.BatchNorm2d(3 * c))
        self.stem1, last, reduction_before = None, 3 * c, False
        if stem == 'imagenet':
            last, reduction_before = 3 * c if genotype is None else c, True
            self.stem = nn.Sequential(
                nn.Conv2d(3, last // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(last // 2), nn.ReLU(),
                nn.Conv2d(last // 2, last, 3, 2, 1, bias=False), nn.BatchNorm2d(last))
            self.stem1 = nn.Sequential(nn.ReLU(), nn.Conv2d(last, last, 3, 2, 1, bias=False),
                                       nn.BatchNorm2d(last))
        before = last
        self.cells = nn.ModuleList()
        self.auxiliary_at = 2 * layers // 3 if auxiliary else None
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            c = 2 * c if reduction else c
            pairs, concat = None, range(2, 2 + NODES)
            if genotype is not None:
                pairs = genotype.reduce if reduction else genotype.normal
                concat = genotype.reduce_concat if reduction else genotype.normal_concat
            self.cells.append(Cell(before, last, c, reduction, reduction_before, partial, pairs,
                                   concat))
            before, last, reduction_before = last, len(concat) * c, reduction
            if layer == self.auxiliary_at:
                small = stem == 'cifar'
                self.auxiliary = nn.Sequential(
                    nn.ReLU(), nn.AvgPool2d(5, 3 if small else 2, count_include_pad=False),
                    nn.Conv2d(last, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
                    nn.Conv2d(128, 768, 2, bias=False),
                    nn.BatchNorm2d(768) if small else nn.Identity(), nn.ReLU(),
                    nn.Flatten(), nn.Linear(768, num_classes))
        self.classifier = nn.Linear(last, num_classes)
        self.mix = lambda alpha: F.softmax(alpha, 1)        # methods replace it
        self.alphas = nn.ParameterList()
        if genotype is None:
            self.alphas.extend(nn.Parameter(1e-3 * torch.randn(14, 8)) for _ in range(2))
            if partial > 1:
                self.alphas.extend(nn.Parameter(1e-3 * torch.randn(14)) for _ in range(2))

    def forward(self, x):
        s0 = s1 = self.stem(x)
        if self.stem1 is not None:
            s1 = self.stem1(s0)
        auxiliary = None
        for layer, cell in enumerate(self.cells):
            weights, shares = None, [1] * 14
            if len(self.alphas):
                weights = self.mix(self.alphas[int(cell.reduction)])
            if self.partial > 1:
                beta = self.alphas[2 + int(cell.reduction)]
                shares = torch.cat([F.softmax(b, 0) for b in beta.split([2, 3, 4, 5])])
            s0, s1 = s1, cell(s0, s1, weights, shares, self.drop_path_prob)
            if layer == self.auxiliary_at and self.training:
                auxiliary = self.auxiliary(s1)
        logits = self.classifier(F.adaptive_avg_pool2d(s1, 1).flatten(1))
        return logits if auxiliary is None else (logits, auxiliary)

    def weights(self):
        return [p for name, p in self.named_parameters() if not name.startswith('alphas')]


# NAS-Bench-201 (arXiv 2001.00326), one module per edge and operation
NB201_NAMES = ['none', 'skip_connect', 'nor_conv_1x1', 'nor_conv_3x3', 'avg_pool_3x3']


def nb201_operation(name, c, affine):
    if not name.startswith('nor_conv'):
        return operation(name, c, 1, True)                  # which has no BatchNorm
    size = int(name[-1])
    return nn.Sequential(nn.ReLU(), nn.Conv2d(c, c, size, 1, size // 2, bias=False),
                         nn.BatchNorm2d(c, affine=affine, track_running_stats=affine))


class NB201Cell(nn.Module):
    def __init__(self, c, names=None):
        super().__init__()
        self.edges = nn.ModuleDict()
        for e, edge in enumerate(['1,0', '2,0', '2,1', '3,0', '3,1', '3,2']):
            left = NB201_NAMES if names is None else [names[e]]
            self.edges[edge] = MixedOp({name: nb201_operation(name, c, bool(names))
                                        for name in left})

    def forward(self, x, weights):
        states, rows = [x], iter(weights)
        for node in (1, 2, 3):
            states.append(sum(self.edges[f'{node},{k}'](state, next(rows))
                              for k, state in enumerate(states)))
        return states[-1]


class NB201Reduction(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.convs = nn.Sequential(
            nn.ReLU(), nn.Conv2d(c, 2 * c, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * c),
            nn.ReLU(), nn.Conv2d(2 * c, 2 * c, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * c))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(c, 2 * c, 1, bias=False))

    def forward(self, x, _):
        return self.convs(x) + self.shortcut(x)


class NB201Network(nn.Module):
    """Supernet, or the network of six operations."""
    def __init__(self, c, num_classes, cells_per_stage, names=None):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c))
        self.cells = nn.ModuleList()
        for stage in range(3):
            if stage:
                self.cells.append(NB201Reduction(c))
                c *= 2
            self.cells.extend(NB201Cell(c, names) for _ in range(cells_per_stage))
        self.last, self.classifier = nn.BatchNorm2d(c), nn.Linear(c, num_classes)
        self.alphas = nn.ParameterList() if names else \
            nn.ParameterList([nn.Parameter(1e-3 * torch.randn(6, 5))])
        self.mix = lambda alpha: F.softmax(alpha, 1)

    def forward(self, x):
        weights = self.mix(self.alphas[0]) if len(self.alphas) else torch.ones(6, 1).to(x)
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x, weights)
        x = F.relu(self.last(x))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))

    weights = Network.weights


def architecture_gradients(network, train, valid, sgd, unrolled):
    """Gradients of the alphas: equation 6 of the DARTS paper, or 7 and 8 if `unrolled`."""
    alphas, weights = list(network.alphas), network.weights()
    if not unrolled:
        return torch.autograd.grad(loss(network, valid), alphas)
    virtual = copy.deepcopy(network)
    twin = torch.optim.SGD(virtual.weights(), **sgd.defaults)
    grads = torch.autograd.grad(loss(network, train), weights)
    for w, v, g in zip(weights, virtual.weights(), grads):
        v.grad = g
        if sgd.state:
            twin.state[v]['momentum_buffer'] = sgd.state[w]['momentum_buffer'].clone()
    twin.step()
    both = torch.autograd.grad(loss(virtual, valid), virtual.weights() + list(virtual.alphas))
    dw, dalpha = both[:len(weights)], both[len(weights):]
    eps = 0.01 / torch.sqrt(sum((g ** 2).sum() for g in dw))
    sides = []
    for sign in (1, -1):
        moved = copy.deepcopy(network)
        for w, g in zip(moved.weights(), dw):
            w.data += sign * eps * g
        sides.append(torch.autograd.grad(loss(moved, train), list(moved.alphas)))
    lr = sgd.defaults['lr']
    return [a - lr * (p - n) / (2 * eps) for a, p, n in zip(dalpha, *sides)]


def loss(network, batch):
    return F.cross_entropy(network(batch[0]), batch[1])


class Step:
    """One architecture and one weight step with torch's own optimizers."""
    def __init__(self, network, unrolled, weight_decay=3e-4, nesterov=False):
        self.network, self.unrolled = network, unrolled
        rate = torch.tensor(0.025).item()           # our rate is a tensor of float32
        self.sgd = torch.optim.SGD(network.weights(), rate, momentum=0.9,
                                   weight_decay=weight_decay, nesterov=nesterov)
        self.adam = torch.optim.Adam(network.alphas, 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)

    def __call__(self, x, y, *valid):
        train = x, y
        grads = architecture_gradients(self.network, train, valid, self.sgd, self.unrolled)
        for alpha, grad in zip(self.network.alphas, grads):
            alpha.grad = grad
        self.adam.step()
        return self.weight_step(train)

    def weight_step(self, train):
        value = loss(self.network, train)
        value.backward()
        nn.utils.clip_grad_norm_(self.network.weights(), 5)
        self.sgd.step()
        self.network.zero_grad()
        return value.item()


def pairs_of_operation(ours, book, e=0):
    """[(tensor of our module, slice of its channels, tensor of book's), ...]

    Ours may serve several edges, of which book's is number e.
    """
    layers, pairs = (nn.Conv2d, nn.BatchNorm2d, nn.Linear), []
    books = [m for m in book.modules() if isinstance(m, layers)]
    mine = [m for m in ours.modules() if isinstance(m, layers)]
    for a, b in zip(mine, books, strict=True):
        c = b.num_features if isinstance(b, nn.BatchNorm2d) else len(b.weight)
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            if getattr(a, name, None) is not None:
                pairs.append((getattr(a, name), slice(e * c, e * c + c), getattr(b, name)))
    return pairs


def pairs_of_cell(ours, book):
    """The pairs of the operations of a cell."""
    pairs = []
    for leaving, mixed_op in zip(ours.leaving, ours.mixed_ops):
        blocks = [((0, len(leaving)), mixed_op.shared)]
        for (start, end), block in [*blocks, *zip(mixed_op.spans, mixed_op.blocks.values())]:
            for name, operation in block.items():
                for e in range(start, end):
                    if name in mixed_op.names[e] and operation.state_dict():
                        place = 0 if hasattr(operation, 'shared') else e - start    # 0: one for all
                        edge = book.edges['{},{}'.format(*leaving[e])]
                        pairs += pairs_of_operation(operation, edge[name], place)
    return pairs


def pairs_of_weights(ours, book):
    """The pairs of two networks: every weight and every running statistic once, no alphas."""
    pairs = pairs_of_operation(ours.stem, book.stem)
    pairs += pairs_of_operation(ours.classifier, book.classifier)
    if isinstance(book, NB201Network):
        pairs += pairs_of_operation(ours.last, book.last)
    elif book.stem1:
        pairs += pairs_of_operation(ours.stem1, book.stem1)
    if hasattr(book, 'auxiliary'):
        pairs += pairs_of_operation(ours.auxiliary_head, book.auxiliary)
    for cell, book_cell in zip(ours.cells, book.cells):
        if isinstance(book_cell, NB201Reduction):
            pairs += pairs_of_operation(cell, book_cell)
            continue
        if isinstance(book_cell, Cell):
            pairs += pairs_of_operation(cell.preprocess0, book_cell.pre0)
            pairs += pairs_of_operation(cell.preprocess1, book_cell.pre1)
        pairs += pairs_of_cell(cell, book_cell)
    return pairs


def copy_weights(ours, book):
    """Fill the textbook network with our network's weights, statistics and alphas."""
    pairs = pairs_of_weights(ours, book)
    for a, block, b in pairs:
        b.data.copy_(a[block])
    for a, b in zip(ours.architecture_parameters(), book.alphas):
        b.data.copy_(a)
    return pairs
