"""The supernet that is searched and the network derived from a genotype: one Cell, one skeleton.

    network = Network(16, 10, 8)                                  # supernet of DARTS
    network = Network(16, 10, 8, partial=4)                       # supernet of PC-DARTS
    network = Network(16, 10, 17, space=NB201)                    # supernet of NAS-Bench-201
    network = Network(36, 10, 20, DARTS_V2, auxiliary=True)       # derived network, as retrained
    network = Network(48, 1000, 14, DARTS_V2, stem='imagenet')    # for images of 224 px

A derived cell is a supernet cell with one operation left per edge, affine BatchNorm and nothing to
mix. Work is done state by state, not edge by edge: see MixedOp.
Sources: DARTS (arXiv 1806.09055), PC-DARTS (arXiv 1907.05737), NAS-Bench-201 (arXiv 2001.00326).
"""
import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from genotypes import NODES, PRIMITIVES, Genotype, from_string, to_string
from operations import (NB201_OPERATIONS, OPERATIONS, BatchNorm, FactorizedReduce, Inputs,
                        ReLUConvBN, Unnormalised, drop_path, from_grids)


class Space(NamedTuple):
    """What the cells of a search space are like, and what their edges choose from."""
    operations: dict
    kinds: tuple            # the cells that are searched
    inputs: int             # states that a cell gets from the cells before it
    nodes: int

    @property
    def edges(self):
        """(node, input state), in the order of the rows of the alphas."""
        return [(node, state) for node in range(self.inputs, self.inputs + self.nodes)
                for state in range(node)]


DARTS = Space(OPERATIONS, ('normal', 'reduce'), 2, NODES)
NB201 = Space(NB201_OPERATIONS, ('cell',), 1, 3)
EDGES = DARTS.edges


# ---------------------------------------------------------------------------------------------
# The mixed operation


class MixedOp(nn.Module):
    """All candidate operations on all E edges that leave one state (DARTS, equation 2).

    names: for each edge, the names of the operations that it has: all of them in a supernet, one
    in a derived network, a shrinking set in P-DARTS. An operation without weights is computed
    once for all edges, the others in blocks of at most `width` adjacent edges that have them.
    """
    def __init__(self, operations, channels, stride, names, affine, width):
        super().__init__()
        self.names, self.channels, self.stride = names, channels, stride
        self.columns = list(operations)
        self.shared, self.blocks = nn.ModuleDict(), nn.ModuleDict()
        self.spans, self.own = [], []   # the edges of each block; names of what the blocks hold
        for name, build in operations.items():
            for start, end in runs([name in has and build is not None for has in names], width):
                operation = build(channels, end - start, stride, affine)
                if operation.shared:
                    self.shared[name] = operation
                    break
                block = f'edges{start}to{end}'
                if block not in self.blocks:
                    self.blocks[block] = nn.ModuleDict()
                    self.spans.append((start, end))
                self.blocks[block][name] = operation
                self.own.append(name)
        self.own = list(dict.fromkeys(self.own))
        has = [[name in edge for name in self.shared] for edge in names]
        self.register_buffer('has', None if all(map(all, has)) else torch.tensor(has),
                             persistent=False)

    def mixing(self, weights):
        """What `forward` mixes with, once for all cells of a type and width.

        weights: (E, operations). Returns the weights of the shared operations, (E, n), and for
        each block those of its operations, (edges * C,) each: every channel's factor.
        """
        columns = dict(zip(self.columns, weights.unbind(1)))
        shared = [columns[name] for name in self.shared]
        shared = torch.stack(shared, 1) if shared else None
        if self.has is not None:
            shared = shared * self.has
        if not self.own:
            return shared, []
        scales = torch.stack([columns[name] for name in self.own]).unsqueeze(2)
        scales = scales.expand(-1, -1, self.channels).contiguous().flatten(1)
        parts = [scales[:, start * self.channels:end * self.channels].unbind()
                 for start, end in self.spans]
        return shared, [[part[self.own.index(name)] for name in block]
                        for part, block in zip(parts, self.blocks.values())]

    def forward(self, state, mixing=None):
        """state: (B, C, H, W); mixing: from `mixing` or `drawn`, or None where an edge has one
        operation.

        Returns E maps (B, C, H', W').
        """
        if isinstance(mixing, list):
            return self.forward_drawn(state, mixing)
        inputs, out = Inputs(state), [None] * len(self.names)
        shared, scales = mixing or (None, self.spans)
        if self.shared:
            maps = {name: operation(inputs) for name, operation in self.shared.items()}
            out = [maps.get(name) for name, in self.names] if mixing is None else \
                mixed_maps(list(maps.values()), shared)
        for (start, end), scale, block in zip(self.spans, scales, self.blocks.values()):
            results = [operation(inputs) for operation in block.values()]
            total = finished(results[0]) if mixing is None else mixed_results(results, scale)
            for e, y in zip(range(start, end), total.chunk(end - start, 1)):
                out[e] = y if out[e] is None else out[e] + y
        return out

    def drawn(self, weights, best, others):
        """Like `mixing`, for one operation an edge (GDAS), whose place `best` has for each.

        weights: (E, operations), 1 for the operation drawn and 0 for the others. Returns [(name,
        its weight, sum of the other weights or None)]. others: whether these are added to the map
        as numbers, so that each gets a gradient.
        """
        return [(self.columns[k], row[k], row.sum() - row[k] if others else None)
                for k, row in zip(best, weights.unbind())]

    def forward_drawn(self, state, drawn):
        """Only what was drawn is computed; every block has one edge."""
        inputs, maps, out = Inputs(state), {}, []
        for e, (name, weight, others) in enumerate(drawn):
            if name == 'none':
                size = [math.ceil(side / self.stride) for side in state.shape[2:]]
                y = state.new_zeros(*state.shape[:2], *size)
            elif name in self.shared:
                if name not in maps:
                    maps[name] = self.shared[name](inputs)
                y = maps[name] * weight
            else:
                result = self.blocks[f'edges{e}to{e + 1}'][name](inputs)
                scale = weight.expand(self.channels).contiguous()   # BatchNorm takes no strides
                y = mixed_results([result], [scale])
            out.append(y if others is None else y + others)
        return out


def runs(has, longest):
    """[(start, end), ...] of the runs of True in a list, cut to `longest`."""
    spans = []
    for k in (k for k, yes in enumerate(has) if yes):
        if spans and spans[-1][1] == k and k - spans[-1][0] < longest:
            spans[-1] = (spans[-1][0], k + 1)
        else:
            spans.append((k, k + 1))
    return spans


def mixed_maps(maps, weights):
    """Weighted sums of n maps (B, C, H, W): E of them for weights (E, n)."""
    b, c, h, w = maps[0].shape
    sums = weights @ torch.stack([y.permute(0, 2, 3, 1).flatten() for y in maps])
    return [y.view(b, h, w, c).permute(0, 3, 1, 2) for y in sums.unbind()]


def mixed_results(results, scales):
    """Sum of results (B, E*C, H, W), Unnormalised or not, each times its scale (E*C,)."""
    totals = {}                                     # on the sub-grids (True), and not
    for result, scale in zip(results, scales):
        if isinstance(result, Unnormalised):
            on_grids, y = result.on_grids, result.norm(result.x, scale)
        else:
            on_grids, y = False, result * scale.view(-1, 1, 1)
        totals[on_grids] = totals[on_grids].add_(y) if on_grids in totals else y
    if True not in totals:
        return totals[False]
    return from_grids(totals[True], totals.get(False))


def finished(result):
    if not isinstance(result, Unnormalised):
        return result
    y = result.norm(result.x)
    return from_grids(y) if result.on_grids else y


# ---------------------------------------------------------------------------------------------
# The cell


class Cell(nn.Module):
    """Inputs, brought to one size and width, and nodes that sum their edges.

    DARTS: two inputs, four nodes, concatenated. NAS-Bench-201: the input as it is, and the last of
    three nodes is the output. edges: {(node, input): names of its operations}: all edges with all
    operations in a supernet, one operation each in a derived network. concat: the nodes that make
    the output. partial: operations see the first 1/partial of the channels (PC-DARTS). width: the
    most edges that one call serves.
    """
    def __init__(self, space, channels_in, channels, reduction, reduction_before, edges, concat,
                 affine, partial=1, width=None):
        super().__init__()
        if space.inputs == 2:
            before, last = channels_in
            self.preprocess0 = FactorizedReduce(before, channels, 1, affine) if reduction_before \
                else ReLUConvBN(before, channels, affine)
            self.preprocess1 = ReLUConvBN(last, channels, affine)
        self.space, self.channels, self.edges = space, channels, edges
        self.concat, self.partial = concat, partial
        states = range(space.inputs + space.nodes - 1)
        self.leaving = [sorted((edge for edge in edges if edge[1] == state), key=edges.get)
                        for state in states]                # edges with the same operations adjoin
        self.strides = [2 if reduction and state < 2 else 1 for state in states]
        # Where maps are largest, a block of 32 channels stays in a CPU's cache, and its products
        # are one dense convolution.
        if width is None:
            width = max(1, 32 // (channels // partial)) if channels < 32 and space.inputs == 2 \
                else len(space.edges)
        self.mixed_ops = nn.ModuleList(
            MixedOp(space.operations, channels // partial, stride,
                    [edges[edge] for edge in leaving], affine, width)
            for stride, leaving in zip(self.strides, self.leaving))

    def forward(self, s0, s1, weights=None, shares=None, drop_path_prob=None):
        """s0, s1: (B, C, H, W), the outputs of the two cells before.

        weights: what `leave` returns, or None in a derived cell; shares: (edges,), each edge's
        share of its node (beta of PC-DARTS), or None.
        """
        first = self.space.inputs
        states = [s1] if first == 1 else [
            finished(bring(Inputs(s))) for bring, s in ((self.preprocess0, s0),
                                                        (self.preprocess1, s1))]
        arriving, passing = {node: [] for node in range(first, first + self.space.nodes)}, []
        for state, (leaving, mixed_op) in enumerate(zip(self.leaving, self.mixed_ops)):
            if state >= first:
                states.append(self.node(state, arriving, passing, shares, states[0]))
            x, w = states[state], weights and weights[state]
            if self.partial > 1:
                part = x.shape[1] // self.partial
                x, rest = (y.contiguous(memory_format=torch.channels_last)
                           for y in x.split([part, x.shape[1] - part], 1))
                passing.append(F.max_pool2d(rest, 2, ceil_mode=True)
                               if self.strides[state] == 2 else rest)
            for edge, y in zip(leaving, mixed_op(x, w) if leaving else ()):
                identity = self.edges[edge] == ('skip_connect',) and self.strides[state] == 1
                drop = self.training and drop_path_prob is not None and not identity
                arriving[edge[0]].append((y, drop_path(y, drop_path_prob) if drop else None))
        states.append(self.node(len(states), arriving, passing, shares, states[0]))
        if states[-1].requires_grad:    # else each edge would copy its slice of the gradient
            states[-1].register_hook(
                lambda grad: grad.contiguous(memory_format=torch.channels_last))
        outputs = [states[node] for node in self.concat]
        return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]

    def leave(self, weights, drawn=None):
        """(edges, operations), in the order of space.edges -> what each state's MixedOp mixes with.

        drawn: each edge's one operation, see MixedOp.drawn.
        """
        by_edge = dict(zip(self.space.edges, weights.unbind()))
        rows = [torch.stack([by_edge[edge] for edge in leaving]) for leaving in self.leaving]
        if drawn is None:
            return [mixed_op.mixing(row) for mixed_op, row in zip(self.mixed_ops, rows)]
        best = dict(zip(self.space.edges, drawn))
        return [mixed_op.drawn(row, [best[edge] for edge in leaving], self.space.inputs == 1)
                for mixed_op, row, leaving in zip(self.mixed_ops, rows, self.leaving)]

    def node(self, node, arriving, passing, shares, like):
        """Sum of what arrives at a node; with partial channels, of what passes by as well.

        like: a map of the shape that a node of NAS-Bench-201 has where nothing arrives.
        """
        total = None
        for y, keep in arriving[node]:
            if total is None:
                total = y if keep is None else y * keep
            else:
                total = total + y if keep is None else torch.addcmul(total, y, keep)
        if self.partial == 1:
            return torch.zeros_like(like) if total is None else total
        first = self.space.inputs
        share = shares.split(list(range(first, first + self.space.nodes)))[node - first]
        rest, = mixed_maps(passing[:node], share.unsqueeze(0))
        # Channel shuffle, so that other channels come first in the next operation.
        return F.channel_shuffle(torch.cat([total, rest], 1), self.partial)


# ---------------------------------------------------------------------------------------------
# The network


class AuxiliaryHead(nn.Module):
    """A classifier at two thirds of the depth that helps training.

    Maps of 8 px or more; with the ImageNet stem 7 or more, and then, as in DARTS's code, without
    BatchNorm after the last convolution.
    """
    def __init__(self, channels, num_classes, stem):
        super().__init__()
        last = nn.BatchNorm2d(768) if stem == 'cifar' else nn.Identity()
        self.features = nn.Sequential(
            nn.ReLU(), nn.AvgPool2d(5, 3 if stem == 'cifar' else 2, count_include_pad=False),
            nn.Conv2d(channels, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(inplace=True),
            nn.Conv2d(128, 768, 2, bias=False), last, nn.ReLU(inplace=True))
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def image_stem(channels):
    """Two modules for images of many pixels: to a quarter of the size, and on to an eighth."""
    def halving(c_in, c_out):
        return nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False), BatchNorm(c_out)
    half = max(1, channels // 2)
    return (nn.Sequential(*halving(3, half), nn.ReLU(inplace=True), *halving(half, channels)),
            nn.Sequential(nn.ReLU(), *halving(channels, channels)))


class ResidualBlock(nn.Module):
    """Halves the size and doubles the width between the stages of NAS-Bench-201."""
    def __init__(self, channels):
        super().__init__()
        self.convs = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False),
            BatchNorm(2 * channels),
            nn.ReLU(), nn.Conv2d(2 * channels, 2 * channels, 3, 1, 1, bias=False),
            BatchNorm(2 * channels))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True),
                                      nn.Conv2d(channels, 2 * channels, 1, bias=False))

    def forward(self, _, s1, *__):
        return self.convs(s1) + self.shortcut(s1)


class Network(nn.Module):
    """Stem, cells with a reduction at one and at two thirds of the depth, pooling, classifier.

    stem: 'cifar', one convolution, or 'imagenet', three of stride 2. genotype: None builds the
    supernet of `space`, with its alphas; a Genotype, or a string of NAS-Bench-201, the derived
    network. In NAS-Bench-201, `layers` is 3 N + 2: three stages of N cells and two ResidualBlocks.
    kept: {kind: names of each edge's operations}, where they are not all (P-DARTS). drawn: one
    operation an edge is computed, that which `change` draws (GDAS).
    forward(x): (B, 3, H, W) -> logits (B, num_classes); a training network with an auxiliary
    head gives its logits too. drop_path_prob is an attribute, set from outside, as in DARTS: a
    number, or a tensor on the device where a CUDA graph must see it change. So are, of methods
    that change what edges mix with, change(kind, p), which gives weights for probabilities p
    (edges, operations), and `strength`, what it goes by.
    """
    def __init__(self, init_channels, num_classes, layers, genotype=None, partial=1,
                 auxiliary=False, stem='cifar', space=DARTS, kept=None, drawn=False):
        super().__init__()
        affine = genotype is not None
        self.space = space = NB201 if isinstance(genotype, str) else space
        self.partial, self.drop_path_prob = partial, None
        self.drawn, self.change, self.strength = drawn, None, None
        channels, reduction_before = init_channels, stem == 'imagenet'
        before = last = channels if stem == 'imagenet' or space is NB201 else 3 * channels
        self.stem, self.stem1 = image_stem(channels) if stem == 'imagenet' else (
            nn.Sequential(nn.Conv2d(3, last, 3, padding=1, bias=False), BatchNorm(last)), None)
        self.cells, self.auxiliary_at = nn.ModuleList(), None
        self.kinds = [space.kinds[-1 if layer in (layers // 3, 2 * layers // 3) else 0]
                      for layer in range(layers)]
        for layer, kind in enumerate(self.kinds):
            reduction = layer in (layers // 3, 2 * layers // 3)
            if reduction and space is NB201:
                self.cells.append(ResidualBlock(channels))
                channels = last = 2 * channels
            else:
                channels *= 2 if reduction else 1
                edges, concat = cell_edges(genotype, kind, space, kept)
                self.cells.append(Cell(space, (before, last), channels, reduction,
                                       reduction_before, edges, concat, affine, partial,
                                       1 if drawn else None))
                before, last, reduction_before = last, len(concat) * channels, reduction
            if auxiliary and layer == 2 * layers // 3:
                self.auxiliary_at = layer
                self.auxiliary_head = AuxiliaryHead(last, num_classes, stem)
        self.last = nn.Sequential(BatchNorm(last), nn.ReLU(inplace=True)) if space is NB201 \
            else nn.Identity()
        self.classifier = nn.Linear(last, num_classes)
        if genotype is None:
            self.alphas = nn.ParameterDict()
            size = len(space.edges), len(space.operations)
            for kind in space.kinds:
                self.alphas[kind] = nn.Parameter(1e-3 * torch.randn(size))
                self.register_buffer(f'dropped_{kind}', kept and torch.tensor(
                    [[name not in names for name in space.operations] for names in kept[kind]]),
                    persistent=False)
            for kind in space.kinds if partial > 1 else ():
                self.alphas[f'beta_{kind}'] = nn.Parameter(1e-3 * torch.randn(size[0]))
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        mixing = self.mixing() if hasattr(self, 'alphas') else {}
        s0 = s1 = self.stem(x.contiguous(memory_format=torch.channels_last))
        if self.stem1:
            s1 = self.stem1(s0)
        auxiliary_logits, leaving = None, {}
        drawn = {kind: weights.argmax(1).tolist() for kind, (weights, _) in mixing.items()} \
            if self.drawn else {}
        for layer, (cell, kind) in enumerate(zip(self.cells, self.kinds)):
            weights, shares = None, None
            if kind in mixing and isinstance(cell, Cell):
                weights, shares = mixing[kind]
                if (kind, cell.channels) not in leaving:
                    leaving[kind, cell.channels] = cell.leave(weights, drawn.get(kind))
                weights = leaving[kind, cell.channels]
            s0, s1 = s1, cell(s0, s1, weights, shares, self.drop_path_prob)
            if layer == self.auxiliary_at and self.training:
                auxiliary_logits = self.auxiliary_head(s1)
        logits = self.classifier(self.last(s1).mean((2, 3)))
        return logits if auxiliary_logits is None else (logits, auxiliary_logits)

    def mixing(self):
        """What each cell type mixes with: {kind: (weights (edges, operations), shares (edges,))}.

        Rows sum to 1 (DARTS, equation 2) or to the edge's share (PC-DARTS, section 3.3), unless
        the method changes that.
        """
        mixing = {}
        for kind in self.space.kinds:
            weights = self.probabilities(kind)
            if self.change is not None:
                weights = self.change(kind, weights)
            shares = self.shares(kind)
            mixing[kind] = weights if shares is None else weights * shares.unsqueeze(1), shares
        return mixing

    def probabilities(self, kind):
        """Softmax of the alphas over the operations that each edge has: (edges, operations)."""
        alpha, dropped = self.alphas[kind], getattr(self, f'dropped_{kind}')
        return F.softmax(alpha if dropped is None else alpha.masked_fill(dropped, -math.inf), 1)

    def shares(self, kind):
        """Each edge's share of a node: softmax of beta over its inputs (PC-DARTS, section 3.3)."""
        if self.partial == 1:
            return None
        first = self.space.inputs
        parts = self.alphas[f'beta_{kind}'].split(list(range(first, first + self.space.nodes)))
        return torch.cat([F.softmax(beta, 0) for beta in parts])

    def weight_parameters(self):
        """All parameters but the alphas: what SGD trains."""
        return [p for name, p in self.named_parameters() if not name.startswith('alphas.')]

    def architecture_parameters(self):
        return list(self.alphas.values()) if hasattr(self, 'alphas') else []

    @contextmanager
    def frozen_statistics(self):
        """Forward passes inside normalise with batch statistics but leave the running ones."""
        norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        norms = [norm for norm in norms if norm.track_running_stats]
        for norm in norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in norms:
                norm.track_running_stats = True

    @torch.no_grad()
    def genotype(self):
        """The strongest architecture in the alphas as they are now, whatever a method adds."""
        strength = []
        for kind in self.space.kinds:
            p, shares = self.probabilities(kind), self.shares(kind)
            strength.append(p if shares is None else p * shares.unsqueeze(1))
        if self.space is NB201:
            names = list(self.space.operations)
            return to_string(names[k] for k in strength[0].argmax(1).tolist())
        return derive(*strength)


def cell_edges(genotype, kind, space=DARTS, kept=None):
    """{(node, input): operations} and the concatenated nodes of a cell; None: of the supernet."""
    if space.inputs == 1:
        names = [(name,) for name in from_string(genotype)] if genotype else \
            [tuple(space.operations)] * len(space.edges)
        return {edge: has for edge, has in zip(space.edges, names) if has != ('none',)}, (3,)
    if genotype is None:
        names = kept[kind] if kept else [tuple(space.operations)] * len(space.edges)
        return dict(zip(space.edges, map(tuple, names))), tuple(range(2, 2 + NODES))
    pairs, concat = getattr(genotype, kind), getattr(genotype, kind + '_concat')
    return {(2 + k // 2, state): (name,) for k, (name, state) in enumerate(pairs)}, concat


# ---------------------------------------------------------------------------------------------
# From weights to a genotype


def derive(normal, reduce):
    """Genotype rule of DARTS, section 2.4, for weights (14, operations) of both cell types.

    Each node keeps the two inputs whose best operation (other than none) is strongest, and that
    operation. Ties keep the lower index. Pairs are in the order of the inputs, so that the same
    cell is the same genotype.
    """
    cells, concat = [], tuple(range(2, 2 + NODES))
    for weights in (normal, reduce):
        weights = weights.double().cpu().clone()
        weights[:, PRIMITIVES.index('none')] = -1
        best = [max(range(len(PRIMITIVES)), key=row.__getitem__) for row in weights.tolist()]
        strength = weights.max(1).values.tolist()
        cell = []
        for node in range(2, 2 + NODES):
            edges = [EDGES.index((node, state)) for state in range(node)]
            kept = sorted(sorted(edges, key=lambda e: -strength[e])[:2])
            cell += [(PRIMITIVES[best[e]], EDGES[e][1]) for e in kept]
        cells += [tuple(cell), concat]
    return Genotype(*cells)
