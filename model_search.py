"""The supernet that is searched and the network derived from a genotype: one Cell, one skeleton.

    network = Network(16, 10, 8)                                  # supernet of DARTS
    network = Network(16, 10, 8, partial=4)                       # supernet of PC-DARTS
    network = Network(36, 10, 20, DARTS_V2, auxiliary=True)       # derived network, as retrained

A derived cell is a supernet cell with one operation left per edge, affine BatchNorm and nothing to
mix. Work is done state by state, not edge by edge: see MixedOp.
Sources: DARTS (arXiv 1806.09055), PC-DARTS (arXiv 1907.05737).
"""
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from genotypes import NODES, PRIMITIVES, Genotype
from operations import (OPERATIONS, BatchNorm, FactorizedReduce, ReLUConvBN, Unnormalised,
                        drop_path, rows)

# The 14 edges of a cell as (node, input), in the order of the rows of the alphas.
EDGES = [(node, state) for node in range(2, 2 + NODES) for state in range(node)]


# ---------------------------------------------------------------------------------------------
# The mixed operation


class MixedOp(nn.Module):
    """All candidate operations on all E edges that leave one state.

    names: for each edge, the names of the operations that it has: all of them in a supernet, one
    in a derived network, a shrinking set in P-DARTS. Operations with the same edges are mixed in
    one go (DARTS, equation 2).
    """
    def __init__(self, channels, stride, names, affine):
        super().__init__()
        self.operations, groups = nn.ModuleDict(), {}
        for name, build in OPERATIONS.items():
            edges = tuple(e for e, has in enumerate(names) if name in has)
            if edges and build is not None:
                self.operations[name] = build(channels, len(edges), stride, affine)
                groups.setdefault(edges, []).append(name)
        self.groups, self.edges = list(groups.items()), len(names)

    def forward(self, state, weights=None):
        """state: (B, C, H, W); weights: (E, operations), or None where an edge has but one.

        Returns E maps (B, C, H', W').
        """
        relu = F.relu(state)
        out = [None] * self.edges
        for edges, names in self.groups:
            x = torch.cat([relu] * len(edges), 1) if len(edges) > 1 else relu
            operations = [self.operations[name] for name in names]
            results = [op(state if op.shared else x) for op in operations]
            if weights is not None:
                w = weights if len(edges) == self.edges else \
                    torch.stack([weights[e] for e in edges])
                columns = w.unbind(1)
                columns = [columns[PRIMITIVES.index(name)] for name in names]
                maps = mixed(results, [op.shared for op in operations], columns)
            elif operations[0].shared:
                maps = results * len(edges)
            else:
                maps = finished(results[0]).chunk(len(edges), 1)
            for e, y in zip(edges, maps):
                out[e] = y if out[e] is None else out[e] + y
        return out


def mixed(results, shared, weights):
    """Sum of the results of O operations, each times its weight; weights: O vectors (E,).

    Results are maps of all edges (B, E*C, H, W), Unnormalised or not, or, where `shared`, one map
    for every edge (B, C, H, W). Returns E maps (B, C, H, W).
    """
    edges, total, maps = len(weights[0]), None, None
    for result, once, w in zip(results, shared, weights):
        if not once:
            x = result.x if isinstance(result, Unnormalised) else result
            # contiguous: with one edge the stride is 0, and BatchNorm's backward silently wrong.
            scale = w.unsqueeze(1).expand(-1, x.shape[1] // edges).flatten().contiguous()
            y = result.norm(x, scale) if isinstance(result, Unnormalised) \
                else x * scale.view(-1, 1, 1)
            total = y if total is None else total.add_(y)
    if any(shared):                       # a matrix product: (E, ops) times (ops, pixels and C)
        maps = torch.stack([rows(y)[0] for y, once in zip(results, shared) if once]).flatten(1)
        maps = torch.stack([w for w, once in zip(weights, shared) if once], 1) @ maps
        b, _, h, w = results[shared.index(True)].shape
        maps = [y.view(b, h, w, -1).permute(0, 3, 1, 2) for y in maps.unbind()]
    if maps is None or total is None:
        return total.chunk(edges, 1) if maps is None else maps
    return [a + b for a, b in zip(maps, total.chunk(edges, 1))]


def finished(result):
    return result.norm(result.x) if isinstance(result, Unnormalised) else result


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
        self.edges, self.concat, self.partial = edges, concat, partial
        self.leaving = [[edge for edge in edges if edge[1] == state] for state in range(1 + NODES)]
        self.strides = [2 if reduction and state < 2 else 1 for state in range(1 + NODES)]
        self.mixed_ops = nn.ModuleList(
            MixedOp(channels // partial, stride, [edges[edge] for edge in leaving], affine)
            for stride, leaving in zip(self.strides, self.leaving))

    def forward(self, s0, s1, weights=None, shares=None, drop_path_prob=0):
        """s0, s1: (B, C, H, W), the outputs of the two cells before.

        weights: (14, operations) in the order of EDGES, or None in a derived cell; shares: (14,),
        each edge's share of its node (beta of PC-DARTS), or None.
        """
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        arriving, passing = {node: [] for node in range(2, 2 + NODES)}, []
        for state, (leaving, mixed_op) in enumerate(zip(self.leaving, self.mixed_ops)):
            if state >= 2:
                states.append(self.node(state, arriving, passing, shares))
            x, w = states[state], None
            if self.partial > 1:
                x, rest = x.tensor_split([x.shape[1] // self.partial], 1)
                if self.strides[state] == 2:
                    rest = F.max_pool2d(rest, 2, ceil_mode=True)
                passing.append(rest)
            if weights is not None:
                w = weights[[EDGES.index(edge) for edge in leaving]]
            for edge, y in zip(leaving, mixed_op(x, w) if leaving else ()):
                identity = self.edges[edge] == ('skip_connect',) and self.strides[state] == 1
                if self.training and drop_path_prob and not identity:
                    y = drop_path(y, drop_path_prob)
                arriving[edge[0]].append(y)
        states.append(self.node(1 + NODES, arriving, passing, shares))
        return torch.cat([states[node] for node in self.concat], 1)

    def node(self, node, arriving, passing, shares):
        """Sum of what arrives at a node; with partial channels, of what passes by as well."""
        total = sum(arriving[node][1:], arriving[node][0])
        if self.partial == 1:
            return total
        b, c, h, w = total.shape
        share = shares[[EDGES.index((node, state)) for state in range(node)]]
        rest = share @ torch.stack([rows(x)[0] for x in passing[:node]]).flatten(1)
        # Channel shuffle, so that other channels come first in the next operation.
        both = torch.cat([rows(total)[0], rest.view(b * h * w, -1)], 1)
        both = both.view(b, h, w, self.partial, c).transpose(3, 4)
        return both.reshape(b, h, w, -1).permute(0, 3, 1, 2)


class HalvingPreprocess(nn.Module):
    """Brings the output of the cell before a reduction to this cell's size and width."""
    def __init__(self, channels_in, channels, affine):
        super().__init__()
        self.reduce = FactorizedReduce(channels_in, channels, 1, affine)

    def forward(self, x):
        return finished(self.reduce(F.relu(x)))


# ---------------------------------------------------------------------------------------------
# The network


class AuxiliaryHead(nn.Module):
    """A classifier at two thirds of the depth that helps training; maps of 8 px or more."""
    def __init__(self, channels, num_classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(), nn.AvgPool2d(5, stride=3, count_include_pad=False),
            nn.Conv2d(channels, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(inplace=True),
            nn.Conv2d(128, 768, 2, bias=False), nn.BatchNorm2d(768), nn.ReLU(inplace=True))
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class Network(nn.Module):
    """Stem, cells with a reduction at one and at two thirds of the depth, pooling, classifier.

    genotype: None builds the supernet, with its alphas; a Genotype the derived network.
    forward(x): (B, 3, H, W) -> logits (B, num_classes); a training network with an auxiliary
    head gives its logits too. drop_path_prob is an attribute, set from outside, as in DARTS.
    """
    def __init__(self, init_channels, num_classes, layers, genotype=None, partial=1,
                 auxiliary=False):
        super().__init__()
        affine = genotype is not None
        self.partial, self.drop_path_prob = partial, 0
        stem_channels = 3 * init_channels
        self.stem = nn.Sequential(nn.Conv2d(3, stem_channels, 3, padding=1, bias=False),
                                  BatchNorm(stem_channels))
        self.cells, self.auxiliary_at = nn.ModuleList(), None
        before = last = stem_channels
        channels, reduction_before = init_channels, False
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            channels *= 2 if reduction else 1
            edges, concat = cell_edges(genotype, reduction)
            self.cells.append(Cell((before, last), channels, reduction, reduction_before, edges,
                                   concat, affine, partial))
            before, last, reduction_before = last, len(concat) * channels, reduction
            if auxiliary and layer == 2 * layers // 3:
                self.auxiliary_at, self.auxiliary_head = layer, AuxiliaryHead(last, num_classes)
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
        auxiliary_logits = None
        for layer, (cell, reduction) in enumerate(zip(self.cells, self.reductions)):
            weights, shares = mixing.get('reduce' if reduction else 'normal', (None, None))
            s0, s1 = s1, cell(s0, s1, weights, shares, self.drop_path_prob)
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
        return list(self.alphas.values())

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
