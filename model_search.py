"""The supernet that is searched and the network derived from a genotype: one Cell, one skeleton.

    network = Network(16, 10, 8)                                  # supernet of DARTS
    network = Network(16, 10, 8, partial=4)                       # supernet of PC-DARTS
    network = Network(36, 10, 20, DARTS_V2, auxiliary=True)       # derived network, as retrained
    network = Network(48, 1000, 14, DARTS_V2, stem='imagenet')    # for images of 224 px

A derived cell is a supernet cell with one operation left per edge, affine BatchNorm and nothing to
mix. Work is done state by state, not edge by edge: see MixedOp.
Sources: DARTS (arXiv 1806.09055), PC-DARTS (arXiv 1907.05737).
"""
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from genotypes import NODES, PRIMITIVES, Genotype
from operations import (OPERATIONS, BatchNorm, FactorizedReduce, Inputs, ReLUConvBN, Unnormalised,
                        drop_path, from_grids)

# The 14 edges of a cell as (node, input), in the order of the rows of the alphas.
EDGES = [(node, state) for node in range(2, 2 + NODES) for state in range(node)]


# ---------------------------------------------------------------------------------------------
# The mixed operation


class MixedOp(nn.Module):
    """All candidate operations on all E edges that leave one state (DARTS, equation 2).

    names: for each edge, the names of the operations that it has: all of them in a supernet, one
    in a derived network, a shrinking set in P-DARTS. An operation without weights is computed
    once for all edges, the others in blocks of at most `width` adjacent edges that have them.
    """
    def __init__(self, channels, stride, names, affine, width):
        super().__init__()
        self.names, self.channels = names, channels
        self.shared, self.blocks = nn.ModuleDict(), nn.ModuleDict()
        self.spans, self.own = [], []   # the edges of each block; names of what the blocks hold
        for name, build in OPERATIONS.items():
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
        columns = dict(zip(PRIMITIVES, weights.unbind(1)))
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
        """state: (B, C, H, W); mixing: from `mixing`, or None where an edge has one operation.

        Returns E maps (B, C, H', W').
        """
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
    """Two preprocessed inputs, four nodes that sum their edges, the nodes concatenated.

    edges: {(node, input): names of its operations}: all 14 edges with all operations in a
    supernet, two a node with one operation each in a derived network. concat: the nodes that make
    the output. partial: operations see the first 1/partial of the channels (PC-DARTS).
    """
    def __init__(self, channels_in, channels, reduction, reduction_before, edges, concat, affine,
                 partial=1):
        super().__init__()
        before, last = channels_in
        self.preprocess0 = (HalvingPreprocess if reduction_before else ReLUConvBN)(
            before, channels, affine)
        self.preprocess1 = ReLUConvBN(last, channels, affine)
        self.channels, self.edges, self.concat, self.partial = channels, edges, concat, partial
        self.leaving = [sorted((edge for edge in edges if edge[1] == state), key=edges.get)
                        for state in range(1 + NODES)]      # edges with the same operations adjoin
        self.strides = [2 if reduction and state < 2 else 1 for state in range(1 + NODES)]
        # Where maps are largest, a block of 32 channels stays in a CPU's cache, and its products
        # are one dense convolution.
        width = max(1, 32 // (channels // partial)) if channels < 32 else len(edges)
        self.mixed_ops = nn.ModuleList(
            MixedOp(channels // partial, stride, [edges[edge] for edge in leaving], affine, width)
            for stride, leaving in zip(self.strides, self.leaving))

    def forward(self, s0, s1, weights=None, shares=None, drop_path_prob=None):
        """s0, s1: (B, C, H, W), the outputs of the two cells before.

        weights: what `leave` returns, or None in a derived cell; shares: (14,), each edge's share
        of its node (beta of PC-DARTS), or None.
        """
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        arriving, passing = {node: [] for node in range(2, 2 + NODES)}, []
        for state, (leaving, mixed_op) in enumerate(zip(self.leaving, self.mixed_ops)):
            if state >= 2:
                states.append(self.node(state, arriving, passing, shares))
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
        states.append(self.node(1 + NODES, arriving, passing, shares))
        if states[-1].requires_grad:    # else each edge would copy its slice of the gradient
            states[-1].register_hook(
                lambda grad: grad.contiguous(memory_format=torch.channels_last))
        return torch.cat([states[node] for node in self.concat], 1)

    def leave(self, weights):
        """(14, operations), in the order of EDGES -> what each state's MixedOp mixes with."""
        by_edge = dict(zip(EDGES, weights.unbind()))
        return [mixed_op.mixing(torch.stack([by_edge[edge] for edge in leaving]))
                for leaving, mixed_op in zip(self.leaving, self.mixed_ops)]

    def node(self, node, arriving, passing, shares):
        """Sum of what arrives at a node; with partial channels, of what passes by as well."""
        total = None
        for y, keep in arriving[node]:
            if total is None:
                total = y if keep is None else y * keep
            else:
                total = total + y if keep is None else torch.addcmul(total, y, keep)
        if self.partial == 1:
            return total
        share = shares.split(list(range(2, 2 + NODES)))[node - 2]
        rest, = mixed_maps(passing[:node], share.unsqueeze(0))
        # Channel shuffle, so that other channels come first in the next operation.
        return F.channel_shuffle(torch.cat([total, rest], 1), self.partial)


class HalvingPreprocess(nn.Module):
    """Brings the output of the cell before a reduction to this cell's size and width."""
    def __init__(self, channels_in, channels, affine):
        super().__init__()
        self.reduce = FactorizedReduce(channels_in, channels, 1, affine)

    def forward(self, x):
        return finished(self.reduce(Inputs(x)))


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


class Network(nn.Module):
    """Stem, cells with a reduction at one and at two thirds of the depth, pooling, classifier.

    stem: 'cifar', one convolution, or 'imagenet', three of stride 2. genotype: None builds the
    supernet, with its alphas; a Genotype the derived network.
    forward(x): (B, 3, H, W) -> logits (B, num_classes); a training network with an auxiliary
    head gives its logits too. drop_path_prob is an attribute, set from outside, as in DARTS: a
    number, or a tensor on the device where a CUDA graph must see it change.
    """
    def __init__(self, init_channels, num_classes, layers, genotype=None, partial=1,
                 auxiliary=False, stem='cifar'):
        super().__init__()
        affine = genotype is not None
        self.partial, self.drop_path_prob = partial, None
        channels, reduction_before = init_channels, stem == 'imagenet'
        self.stem, self.stem1 = image_stem(channels) if stem == 'imagenet' else (
            nn.Sequential(nn.Conv2d(3, 3 * channels, 3, padding=1, bias=False),
                          BatchNorm(3 * channels)), None)
        self.cells, self.auxiliary_at = nn.ModuleList(), None
        before = last = channels if stem == 'imagenet' else 3 * channels
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            channels *= 2 if reduction else 1
            edges, concat = cell_edges(genotype, reduction)
            self.cells.append(Cell((before, last), channels, reduction, reduction_before, edges,
                                   concat, affine, partial))
            before, last, reduction_before = last, len(concat) * channels, reduction
            if auxiliary and layer == 2 * layers // 3:
                self.auxiliary_at = layer
                self.auxiliary_head = AuxiliaryHead(last, num_classes, stem)
        self.reductions = [layer in (layers // 3, 2 * layers // 3) for layer in range(layers)]
        self.classifier = nn.Linear(last, num_classes)
        if genotype is None:
            self.alphas = nn.ParameterDict()
            for kind in ('normal', 'reduce'):
                self.alphas[kind] = nn.Parameter(1e-3 * torch.randn(len(EDGES), len(PRIMITIVES)))
            for kind in ('beta_normal', 'beta_reduce') if partial > 1 else ():
                self.alphas[kind] = nn.Parameter(1e-3 * torch.randn(len(EDGES)))
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        mixing = self.mixing() if hasattr(self, 'alphas') else {}
        s0 = s1 = self.stem(x.contiguous(memory_format=torch.channels_last))
        if self.stem1:
            s1 = self.stem1(s0)
        auxiliary_logits, leaving = None, {}
        for layer, (cell, reduction) in enumerate(zip(self.cells, self.reductions)):
            kind = 'reduce' if reduction else 'normal'
            weights, shares = mixing.get(kind, (None, None))
            if weights is not None and (kind, cell.channels) not in leaving:
                leaving[kind, cell.channels] = cell.leave(weights)
            s0, s1 = s1, cell(s0, s1, leaving.get((kind, cell.channels)), shares,
                              self.drop_path_prob)
            if layer == self.auxiliary_at and self.training:
                auxiliary_logits = self.auxiliary_head(s1)
        logits = self.classifier(s1.mean((2, 3)))
        return logits if auxiliary_logits is None else (logits, auxiliary_logits)

    def mixing(self):
        """What each cell type mixes with: {type: (weights (14, operations), shares (14,))}."""
        mixing = {}
        for kind in ('normal', 'reduce'):
            shares = None
            if self.partial > 1:
                shares = edge_shares(self.alphas['beta_' + kind])
            mixing[kind] = edge_weights(self.alphas[kind], shares), shares
        return mixing

    def weight_parameters(self):
        """All parameters but the alphas: what SGD trains."""
        return [p for name, p in self.named_parameters() if not name.startswith('alphas.')]

    def architecture_parameters(self):
        return list(self.alphas.values()) if hasattr(self, 'alphas') else []

    @contextmanager
    def frozen_statistics(self):
        """Forward passes inside normalise with batch statistics but leave the running ones."""
        norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in norms:
                norm.track_running_stats = True

    def genotype(self):
        """The strongest architecture in the alphas as they are now."""
        mixing = self.mixing()
        return derive(mixing['normal'][0].detach(), mixing['reduce'][0].detach())


def cell_edges(genotype, reduction):
    """{(node, input): operations} and the concatenated nodes of a cell; None: of the supernet."""
    if genotype is None:
        return {edge: tuple(PRIMITIVES) for edge in EDGES}, tuple(range(2, 2 + NODES))
    pairs = genotype.reduce if reduction else genotype.normal
    concat = genotype.reduce_concat if reduction else genotype.normal_concat
    edges = {}
    for k, (name, state) in enumerate(pairs):
        edges[2 + k // 2, state] = (name,)
    return edges, concat


# ---------------------------------------------------------------------------------------------
# From alphas to weights, from weights to a genotype


def edge_weights(alpha, shares=None):
    """Weights of every operation on every edge: softmax(alpha), times the edge's share.

    alpha: (14, operations) logits; shares: (14,) or None. Returns (14, operations), rows summing
    to 1 (DARTS, equation 2) or to the edge's share (PC-DARTS, equation 5).
    """
    weights = F.softmax(alpha, 1)
    return weights if shares is None else weights * shares.unsqueeze(1)


def edge_shares(beta):
    """beta: (14,) logits -> (14,), softmax over the inputs of each node (PC-DARTS, equation 4)."""
    return torch.cat([F.softmax(b, 0) for b in beta.split(list(range(2, 2 + NODES)))])


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
