"""The supernet that is searched and the network derived from a genotype: one Cell, one skeleton.

    network = Network(16, 10, 8)                                  # supernet of DARTS
    network = Network(16, 10, 8, partial=4)                       # supernet of PC-DARTS
    network = Network(16, 10, 17, space=NB201)                    # supernet of NAS-Bench-201
    network = Network(36, 10, 20, DARTS_V2, auxiliary=True)       # derived network, as retrained
    network = Network(48, 1000, 14, DARTS_V2, stem='imagenet')    # for images of 224 px

A derived cell is a supernet cell with one operation per edge and affine BatchNorm. Work is done by
state, not by edge: see MixedOp.
Sources: DARTS (arXiv 1806.09055), PC-DARTS (arXiv 1907.05737), NAS-Bench-201 (arXiv 2001.00326).
"""
import math
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from genotypes import ALL_NODES, NODES, Genotype, from_string, to_string
from operations import (NB201_OPERATIONS, OPERATIONS, BatchNorm, FactorizedReduce, Inputs,
                        ReLUConvBN, Unnormalised, drop_path, from_grids)


class Space(NamedTuple):
    """A search space: what its edges choose from, and the shape of its cells."""
    operations: dict
    cell_types: tuple       # the cells that are searched
    inputs: int             # states that a cell gets from the cells before it
    nodes: int
    extras: dict = {}       # operations without alphas, whose weights `mix` appends (DARTS-)

    @property
    def node_states(self):
        """The states that are nodes; each has as many inputs as its number says."""
        return range(self.inputs, self.inputs + self.nodes)

    @property
    def edges(self):
        """(node, input state), in the order of the rows of the alphas."""
        edges = []
        for node in self.node_states:
            edges += [(node, state) for state in range(node)]
        return edges


class Drawn(NamedTuple):
    """What `mix` may return: one operation per edge, and only that is computed."""
    weights: object         # (edges, operations) of 1 and 0, for their gradient (GDAS), or None
    best: list              # of each edge, the column of the operation drawn


DARTS = Space(OPERATIONS, ('normal', 'reduce'), 2, NODES)
NB201 = Space(NB201_OPERATIONS, ('cell',), 1, 3)
EDGES = DARTS.edges


# ---- The mixed operation --------------------------------------------------------------------


class MixedOp(nn.Module):
    """All candidate operations on all E edges that leave one state (DARTS, equation 2).

    names: each edge's operations, one in a derived network. An operation without weights is
    computed once for all edges, the others in blocks of at most `width` adjacent edges.
    """
    def __init__(self, operations, channels, stride, names, affine, width):
        super().__init__()
        self.names, self.channels, self.stride = names, channels, stride
        self.columns, self.spans = list(operations), []     # spans: edges of the blocks
        self.shared, self.blocks = nn.ModuleDict(), nn.ModuleDict()
        for name, build in operations.items():
            edges = [k for k, own in enumerate(names) if name in own and build is not None]
            for start, end in spans(edges, width):
                operation = build(channels, end - start, stride, affine)
                if getattr(operation, 'shared', False):
                    self.shared[name] = operation
                    break
                block = f'edges{start}to{end}'
                if block not in self.blocks:
                    self.blocks[block] = nn.ModuleDict()
                    self.spans.append((start, end))
                self.blocks[block][name] = operation

    def factors(self, weights, best, add_others):
        """What `forward` multiplies with; one result serves all cells of a type and width.

        weights: (E, operations). Returns (shared, blocks). shared (E, n): the weights of the n
        shared operations. blocks: for each block a list that has, for each of its operations, a
        factor for each channel, (edges * C,).
        best: the column that was drawn for each edge. If it is given, returns for each edge (name,
        weight, sum of the other weights), where both numbers are None if weights is None.
        """
        if weights is None:
            return [(self.columns[k], None, None) for k in best]
        if best is not None:
            return [(self.columns[k], row[k], row.sum() - row[k] if add_others else None)
                    for k, row in zip(best, weights.unbind())]
        columns = dict(zip(self.columns, weights.unbind(1)))
        shared = torch.stack([columns[name] for name in self.shared], 1) if self.shared else None
        own, factors = list(dict.fromkeys(chain(*self.blocks.values()))), []
        if not own:
            return shared, []
        scales = torch.stack([columns[name] for name in own]).unsqueeze(2)
        scales = scales.expand(-1, -1, self.channels).contiguous().flatten(1)
        for (start, end), block in zip(self.spans, self.blocks.values()):
            part = scales[:, start * self.channels:end * self.channels].unbind()
            factors.append([part[own.index(name)] for name in block])
        return shared, factors

    def forward(self, state, factors=None, memo=None):
        """E maps (B, C, H', W') of a state (B, C, H, W), None where nothing arrives.

        factors: from `factors`, a list if one operation per edge was drawn; None if derived.
        memo: see Cell.forward.
        """
        if isinstance(factors, list):
            return self.forward_drawn(state, factors, {} if memo is None else memo)
        inputs, out = Inputs(state), [None] * len(self.names)
        maps = {name: operation(inputs) for name, operation in self.shared.items()}
        if factors is None:                     # a derived cell: one operation for each edge
            scales = [(None,)] * len(self.spans)
            out = [maps.get(name) for name, in self.names]
        else:
            shared, scales = factors
            if maps:
                out = weighted_sums(list(maps.values()), shared)
        for (start, end), block, scale in zip(self.spans, self.blocks.values(), scales):
            total = add_up([operation(inputs) for operation in block.values()], scale)
            for e, y in zip(range(start, end), total.chunk(end - start, 1)):
                out[e] = add_map(out[e], y)
        return out

    def forward_drawn(self, state, drawn, memo):
        """Compute only what was drawn. Each block has one edge, since width is 1."""
        inputs, maps = Inputs(state), {}
        for e, (name, weight, others) in enumerate(drawn):
            if (self, e, name) in memo:
                continue
            if name == 'none' and weight is None:
                y = None
            elif name == 'none':
                size = [math.ceil(side / self.stride) for side in state.shape[2:]]
                y = state.new_zeros(*state.shape[:2], *size) * weight       # for its gradient
            elif name in self.shared:
                if name not in maps:
                    maps[name] = self.shared[name](inputs)
                y = maps[name] if weight is None else maps[name] * weight
            else:
                result, scale = self.blocks[f'edges{e}to{e + 1}'][name](inputs), None
                if weight is not None:          # contiguous, as BatchNorm takes no strides
                    scale = weight.expand(self.channels).contiguous()
                y = add_up([result], [scale])
            memo[self, e, name] = y if others is None else y + others
        return [memo[self, e, name] for e, (name, *_) in enumerate(drawn)]


def spans(indices, longest):
    """[(start, end), ...] of the consecutive numbers in a sorted list, cut to `longest`."""
    out = []
    for k in indices:
        start = k
        if out and out[-1][1] == k and k - out[-1][0] < longest:
            start, _ = out.pop()
        out.append((start, k + 1))
    return out


def weighted_sums(maps, weights):
    """Weighted sums of n maps (B, C, H, W): E of them for weights (E, n)."""
    b, c, h, w = maps[0].shape
    sums = weights @ torch.stack([y.permute(0, 2, 3, 1).flatten() for y in maps])
    return [y.view(b, h, w, c).permute(0, 3, 1, 2) for y in sums.unbind()]


def add_up(results, scales=(None,)):
    """Sum of results (B, E*C, H, W), Unnormalised or not, each times its scale (E*C,), if any."""
    totals = {}                                     # on the sub-grids (True), and not
    for result, scale in zip(results, scales):
        on_grids = False
        if isinstance(result, Unnormalised):
            on_grids, result = result.on_grids, result.norm(result.x, scale)
        elif scale is not None:
            result = result * scale.view(-1, 1, 1)
        totals[on_grids] = totals[on_grids].add_(result) if on_grids in totals else result
    return from_grids(totals[True], totals.get(False)) if True in totals else totals[False]


def add_map(total, y, factor=None):
    """total + y * factor, in one pass. total and factor may be None."""
    if total is None:
        return y if factor is None else y * factor
    return total + y if factor is None else torch.addcmul(total, y, factor)


# ---- The cell -------------------------------------------------------------------------------


class Cell(nn.Module):
    """Inputs, in DARTS brought to one size and width, and nodes that sum their edges.

    edges: {(node, input): names of its operations}. concat: the nodes that make the output.
    partial: operations see 1/partial of the channels (PC-DARTS). width: most edges of one call.
    """
    def __init__(self, space, channels_in, channels, reduction, reduction_before, edges, concat,
                 affine, partial, width):
        super().__init__()
        if space.inputs == 2:
            before, last = channels_in
            self.preprocess0 = FactorizedReduce(before, channels, 1, affine) if reduction_before \
                else ReLUConvBN(before, channels, affine)
            self.preprocess1 = ReLUConvBN(last, channels, affine)
        self.space, self.channels, self.concat, self.partial = space, channels, concat, partial
        # Where maps are largest, a block of 32 channels stays in a CPU's cache, and its products
        # are one dense convolution.
        if width is None:
            width = len(space.edges)
            if channels < 32 and space.inputs == 2:
                width = 32 // (channels // partial)
        operations = {**space.operations, **space.extras}
        self.leaving, self.mixed_ops = [], nn.ModuleList()
        for state in range(space.inputs + space.nodes - 1):
            leaving = [edge for edge in edges if edge[1] == state]
            leaving.sort(key=edges.get)                     # edges with the same operations adjoin
            stride = 2 if reduction and state < 2 else 1
            names = [edges[edge] for edge in leaving]
            self.leaving.append(leaving)
            self.mixed_ops.append(MixedOp(operations, channels // partial, stride, names, affine,
                                          width))

    def factors(self, weights, best):
        """What each state's MixedOp multiplies with, from weights and `best` as Drawn has them."""
        out = []
        for mixed_op, leaving in zip(self.mixed_ops, self.leaving):
            order = [self.space.edges.index(edge) for edge in leaving]
            own = None if weights is None else torch.stack([weights[k] for k in order])
            drawn = None if best is None else [best[k] for k in order]
            # NAS-Bench-201's code adds the weights of what is not drawn, for their gradient.
            out.append(mixed_op.factors(own, drawn, self.space.inputs == 1))
        return out

    def forward(self, s0, s1, factors=None, shares=None, drop_path_prob=None, memo=None):
        """Output of the cell. s0, s1: outputs (B, C, H, W) of the two cells before it.

        factors: from `factors`, or None in a derived cell. shares: from Network.shares. memo: the
        maps {(MixedOp, edge, operation): map} of calls with the same states and weights, where only
        the operations on edges into the last node differ.
        """
        states, totals, rests = [s1], {}, []
        drops = self.training and drop_path_prob is not None
        if self.space.inputs == 2:
            states = [add_up([self.preprocess0(Inputs(s0))]),
                      add_up([self.preprocess1(Inputs(s1))])]
        for state, (mixed_op, leaving) in enumerate(zip(self.mixed_ops, self.leaving)):
            x = states[state]
            if self.partial > 1:
                part = x.shape[1] // self.partial
                x, rest = x.split([part, x.shape[1] - part], 1)
                x = x.contiguous(memory_format=torch.channels_last)
                rest = rest.contiguous(memory_format=torch.channels_last)
                rests.append(rest if mixed_op.stride == 1 else
                             F.max_pool2d(rest, 2, ceil_mode=True))
            maps = mixed_op(x, None if factors is None else factors[state], memo)
            for (node, _), names, y in zip(leaving, mixed_op.names, maps):
                if y is None:
                    continue
                identity = names == ('skip_connect',) and mixed_op.stride == 1
                keep = drop_path(y, drop_path_prob) if drops and not identity else None
                totals[node] = add_map(totals.get(node), y, keep)
            if state + 1 == len(states):        # all edges into the next state are done
                states.append(self.node(totals, rests, shares, states))
        if states[-1].requires_grad:    # else each edge would copy its slice of the gradient
            states[-1].register_hook(
                lambda grad: grad.contiguous(memory_format=torch.channels_last))
        outputs = [states[node] for node in self.concat]
        return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]

    def node(self, totals, rests, shares, states):
        """The next node's map: the sum of its edges; with partial channels, of the rest as well."""
        node = len(states)
        if self.partial == 1:           # nodes of derived nb201 cells may have no edge
            return totals[node] if node in totals else torch.zeros_like(states[0])
        share = shares.split(list(self.space.node_states))[node - self.space.inputs]
        rest, = weighted_sums(rests, share.unsqueeze(0))
        # Channel shuffle, so that other channels come first in the next operation.
        return F.channel_shuffle(torch.cat([totals[node], rest], 1), self.partial)


# ---- The network ----------------------------------------------------------------------------


class AuxiliaryHead(nn.Module):
    """A classifier that helps training; as in DARTS's code, it depends on the stem."""
    def __init__(self, channels, num_classes, stem):
        super().__init__()
        stride, norm = (3, nn.BatchNorm2d(768)) if stem == 'cifar' else (2, nn.Identity())
        self.features = nn.Sequential(
            nn.ReLU(), nn.AvgPool2d(5, stride, count_include_pad=False),
            nn.Conv2d(channels, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(inplace=True),
            nn.Conv2d(128, 768, 2, bias=False), norm, nn.ReLU(inplace=True))
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def conv_bn(c_in, c_out, stride):
    """3x3 convolution and BatchNorm, for nn.Sequential."""
    return nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), BatchNorm(c_out)


class ResidualBlock(nn.Module):
    """Halves the size and doubles the width between the stages of NAS-Bench-201."""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.convs = nn.Sequential(nn.ReLU(), *conv_bn(c_in, c_out, 2),
                                   nn.ReLU(), *conv_bn(c_out, c_out, 1))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True),
                                      nn.Conv2d(c_in, c_out, 1, bias=False))

    def forward(self, _, s1, *__):
        return self.convs(s1) + self.shortcut(s1)


class Network(nn.Module):
    """Stem, cells with a reduction at one and at two thirds of the depth, pooling, classifier.

    stem: 'cifar', one convolution, or 'imagenet', three of stride 2. genotype: None builds the
    supernet of `space`; a Genotype, or a string of NAS-Bench-201, the derived network. There
    `layers` is 3 N + 2: three stages of N cells and two ResidualBlocks. kept: {cell type: names of
    each edge's operations}, if not all (P-DARTS). width: 1 if `mix` draws (see Cell).
    forward(x): (B, 3, H, W) -> logits (B, num_classes); in training also the auxiliary head's.

    Set from outside: drop_path_prob, None or a tensor. memo: None, or a dictionary for the maps of
    the first cell, for one batch and one operation per edge (see Cell.forward). softmax: a function
    that turns alphas (edges, operations) into probabilities. mix: a function mix(cell_type, p) that
    turns probabilities p into edge weights, like p with a column more for each of the space's
    extras, or Drawn.
    """
    def __init__(self, init_channels, num_classes, layers, genotype=None, partial=1,
                 auxiliary=False, stem='cifar', space=DARTS, kept=None, width=None):
        super().__init__()
        affine = genotype is not None
        self.space = space = NB201 if isinstance(genotype, str) else space
        self.partial, self.drop_path_prob, self.memo = partial, None, None
        self.softmax = lambda alpha: F.softmax(alpha, 1)
        self.mix = lambda cell_type, p: p
        channels, reduction_before = init_channels, stem == 'imagenet'
        # As published, the stem has C channels in NAS-Bench-201 and in a derived network for large
        # images, else 3C.
        narrow = space.inputs == 1 or stem == 'imagenet' and affine
        before = last = channels if narrow else 3 * channels
        if stem == 'imagenet':
            self.stem = nn.Sequential(*conv_bn(3, last // 2, 2), nn.ReLU(inplace=True),
                                      *conv_bn(last // 2, last, 2))
            self.stem1 = nn.Sequential(nn.ReLU(), *conv_bn(last, last, 2))
        else:
            self.stem = nn.Sequential(*conv_bn(3, last, 1))
            self.stem1 = nn.Identity()
        self.cells, self.cell_types, self.auxiliary_at = nn.ModuleList(), [], None
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            channels *= 2 if reduction else 1
            cell_type = space.cell_types[-1 if reduction else 0]
            if reduction and space.inputs == 1:
                cell_type, last = None, channels
                self.cells.append(ResidualBlock(channels // 2, channels))
            else:
                edges, concat = cell_edges(genotype, cell_type, space, kept)
                self.cells.append(Cell(space, (before, last), channels, reduction,
                                       reduction_before, edges, concat, affine, partial, width))
                before, last, reduction_before = last, len(concat) * channels, reduction
            self.cell_types.append(cell_type)
            if auxiliary and layer == 2 * layers // 3:
                self.auxiliary_at = layer
                self.auxiliary_head = AuxiliaryHead(last, num_classes, stem)
        self.last = nn.Sequential(BatchNorm(last), nn.ReLU(inplace=True)) if space.inputs == 1 \
            else nn.Identity()
        self.classifier = nn.Linear(last, num_classes)
        self.alphas = nn.ParameterDict()                    # stays empty in a derived network
        if genotype is None:
            names = list(space.operations)
            for cell_type in space.cell_types:
                alpha = 1e-3 * torch.randn(len(space.edges), len(names))
                for e, own in enumerate(kept[cell_type] if kept else ()):
                    gone = [k for k, name in enumerate(names) if name not in own]
                    alpha[e, gone] = -1e4                   # probability 0, in float64 too
                self.alphas[cell_type] = nn.Parameter(alpha)
            if partial > 1:
                for cell_type in space.cell_types:
                    beta = 1e-3 * torch.randn(len(space.edges))
                    self.alphas[f'beta_{cell_type}'] = nn.Parameter(beta)
        self.to(memory_format=torch.channels_last)
        # What SGD trains. Found once: to look through all modules takes as long as a small step.
        self.weights = [p for name, p in self.named_parameters() if not name.startswith('alphas.')]
        self.norms = [m for m in self.modules() if getattr(m, 'track_running_stats', False)]

    def forward(self, x):
        s0 = self.stem(x.contiguous(memory_format=torch.channels_last))
        s1 = self.stem1(s0)
        factors, auxiliary_logits = {}, None
        mixed = {name: self.edge_weights(name) for name in self.space.cell_types if self.alphas}
        for layer, (cell, cell_type) in enumerate(zip(self.cells, self.cell_types)):
            key, shares = None, None
            if cell_type in mixed:
                weights, best, shares = mixed[cell_type]
                key = cell_type, cell.channels
                if key not in factors:
                    factors[key] = cell.factors(weights, best)
            s0, s1 = s1, cell(s0, s1, factors.get(key), shares, self.drop_path_prob,
                              self.memo if layer == 0 else None)
            if layer == self.auxiliary_at and self.training:
                auxiliary_logits = self.auxiliary_head(s1)
        logits = self.classifier(self.last(s1).mean((2, 3)))
        return logits if auxiliary_logits is None else (logits, auxiliary_logits)

    def edge_weights(self, cell_type):
        """(weights (edges, operations) or None, `best` of Drawn or None, shares (edges,) or None).

        Without `mix` rows sum to 1 (DARTS, equation 2) or to the edge's share (PC-DARTS).
        """
        weights, best = self.mix(cell_type, self.softmax(self.alphas[cell_type])), None
        if isinstance(weights, Drawn):
            weights, best = weights
        shares = self.shares(cell_type)
        return weights if shares is None else weights * shares.unsqueeze(1), best, shares

    def shares(self, cell_type):
        """Each edge's share of a node: softmax of beta over its inputs (PC-DARTS, section 3.3)."""
        if self.partial == 1:
            return None
        parts = self.alphas[f'beta_{cell_type}'].split(list(self.space.node_states))
        return torch.cat([F.softmax(beta, 0) for beta in parts])

    def architecture_parameters(self):
        return list(self.alphas.values())

    @contextmanager
    def frozen_statistics(self):
        """Forward passes inside normalise with batch statistics but leave the running ones."""
        for norm in self.norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in self.norms:
                norm.track_running_stats = True

    @torch.no_grad()
    def choice_weights(self, seed):
        """[float64 (edges, operations)] of the cell types: probabilities times the edges' shares.

        Very small alphas have equal probabilities in float32, and `none` would win all the ties.
        Those that are left in float64, to 14 digits, are broken by seed.
        """
        rng, out = torch.Generator().manual_seed(seed), []
        for cell_type in self.space.cell_types:
            p = self.softmax(self.alphas[cell_type].double())
            if self.partial > 1:
                p = p * self.shares(cell_type).unsqueeze(1)
            p = p.cpu()
            out.append(p * (1 + 1e-14 * torch.rand(p.shape, generator=rng, dtype=p.dtype)))
        return out

    def genotype(self, seed=0):
        """The strongest architecture in the alphas as they are now, whatever a method adds."""
        weights = self.choice_weights(seed)
        if self.space.inputs == 1:
            names = list(self.space.operations)
            return to_string(names[k] for k in weights[0].argmax(1).tolist())
        return derive(*weights)


def cell_edges(genotype, cell_type, space, kept=None):
    """({(node, input): operations}, nodes to concatenate) of a genotype; None: of the supernet."""
    nodes = space.node_states
    if genotype is None:
        names = kept[cell_type] if kept else \
            [[*space.operations, *space.extras]] * len(space.edges)
        edges = dict(zip(space.edges, map(tuple, names)))
        return edges, tuple(nodes) if space.inputs == 2 else (nodes[-1],)
    if isinstance(genotype, str):
        edges = zip(space.edges, from_string(genotype))
        return {edge: (name,) for edge, name in edges if name != 'none'}, (nodes[-1],)
    pairs = getattr(genotype, cell_type)
    edges = {(2 + k // 2, state): (name,) for k, (name, state) in enumerate(pairs)}
    return edges, getattr(genotype, cell_type + '_concat')


def derive(normal, reduce):
    """Genotype rule of DARTS, section 2.4, for weights (14, operations) of both cell types.

    Each node keeps the two inputs whose best operation (other than none) is strongest, in the
    order of the inputs, and that operation. Ties keep the lower index.
    """
    cells, names = [], list(OPERATIONS)[1:]            # without none
    for weights in (normal, reduce):
        (strongest, best), cell = weights[:, 1:].max(1), []
        for node in ALL_NODES:
            edges = [EDGES.index((node, state)) for state in range(node)]
            edges.sort(key=strongest.__getitem__, reverse=True)
            cell += [(names[best[e]], EDGES[e][1]) for e in sorted(edges[:2])]
        cells += [tuple(cell), ALL_NODES]
    return Genotype(*cells)
