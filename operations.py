"""Candidate operations of both spaces, each written once for all edges that leave a state.

To add an operation, write below OPERATIONS, near the end, what DARTS's code has for it:

    OPERATIONS['conv_3x3'] = per_edge(lambda C, stride, affine: nn.Sequential(
        nn.ReLU(), nn.Conv2d(C, C, 3, stride, 1, bias=False), nn.BatchNorm2d(C, affine=affine)))

Those here are faster, because one call serves all E edges that leave a state. Their maps are
(B, E*C, H, W), channels_last, edge e in channels e*C to (e+1)*C.
`operation(channels, edges, stride, affine)` builds one. Its forward takes Inputs and returns
(B, E*C, H/stride, W/stride), or `Unnormalised`, whose last BatchNorm is still to be done. A module
with `shared = True` has no weights: its result (B, C, H/stride, W/stride) serves every edge.
The score naswot sees each nn.ReLU, and the ReLUs of the classes that search.NasWot.prepare names.

Sources: DARTS (arXiv 1806.09055) and NAS-Bench-201 (arXiv 2001.00326) for the operations, P-DARTS
(arXiv 1904.12760) for the dropout on skips, BatchNorm (arXiv 1502.03167).
"""
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---- What leaves a state --------------------------------------------------------------------


def sub_grids(x):
    """(B, C, H, W) -> (4B, C, H/2, W/2): even and odd rows and columns as images of their own.

    A convolution of dilation 2 is an ordinary one on each. An odd size is padded with zeros.
    """
    b, c, h, w = x.shape
    if h % 2 or w % 2:
        return sub_grids(F.pad(x, (0, w % 2, 0, h % 2)))
    x = x.permute(0, 2, 3, 1).reshape(b, h // 2, 2, w // 2, 2, c).permute(2, 4, 0, 1, 3, 5)
    return x.contiguous().view(4 * b, h // 2, w // 2, c).permute(0, 3, 1, 2)


def from_grids(x, other=None):
    """(4B, C, h, w) -> (B, C, 2h, 2w): undoes sub_grids of maps of even size, and adds `other`."""
    b, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(2, 2, b // 4, h, w, c).permute(2, 3, 0, 4, 1, 5)
    x = x.contiguous() if other is None else other.permute(0, 2, 3, 1).reshape(x.shape) + x
    return x.view(b // 4, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


class Inputs:
    """A state (B, C, H, W) in the forms that operations take, each made once."""
    def __init__(self, state):
        self.state, self.forms = state, {}

    def form(self, name, edges, make):
        if (name, edges) not in self.forms:
            form = make() if edges == 1 else torch.cat([self.form(name, 1, make)] * edges, 1)
            self.forms[name, edges] = form
        return self.forms[name, edges]

    def relu(self, edges=1):
        """After ReLU: (B, E*C, H, W)."""
        return self.form('relu', edges, lambda: F.relu(self.state))

    def grids(self, edges=1):
        """After ReLU, its four sub-grids as images: (4B, E*C, H/2, W/2)."""
        return self.form('grids', edges, lambda: sub_grids(self.relu()))

    def grid(self, k, edges=1):
        """After ReLU, sub-grid k: (B, E*C, H/2, W/2), the pixels (k // 2, k % 2) of every 2x2."""
        return self.form(k, edges, lambda: self.grids().chunk(4)[k])


# ---- BatchNorm and convolutions -------------------------------------------------------------


class Unnormalised(NamedTuple):
    """A result whose last BatchNorm is still to be done, so that it can take the edge weights."""
    x: torch.Tensor         # (B, E*C, H, W)
    norm: nn.BatchNorm2d    # over E*C channels
    on_grids: bool = False  # x is (4B, E*C, H/2, W/2), the sub-grids of the result


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose weight takes a scale by channel, at no cost."""
    def forward(self, x, scale=None):
        weight, bias = self.weight, self.bias
        if scale is not None:
            weight, bias = (scale, None) if weight is None else (scale * weight, scale * bias)
        mean, var = self.running_mean, self.running_var
        if self.training and not self.track_running_stats:
            mean = var = None
        if x.device.type == 'cpu' and x.shape[1] < 8:      # torch's channels_last path is slow then
            x = x.contiguous()
        by_batch = self.training or mean is None
        y = F.batch_norm(x, mean, var, weight, bias, by_batch, self.momentum, self.eps)
        return y.contiguous(memory_format=torch.channels_last)


class PointwiseConv(nn.Conv2d):
    """1x1 convolution in groups."""
    def forward(self, x):
        # One dense product is faster; on meta its zeros would be counted as multiply-adds.
        if self.groups > 1 and self.in_channels <= 32 and x.device.type != 'meta':
            blocks = torch.block_diag(*self.weight.flatten(1).chunk(self.groups))
            return F.conv2d(x, blocks[:, :, None, None])
        return super().forward(x)


def depthwise_conv(channels, size, stride=1):
    """Depthwise convolution of `channels` channels, padded to keep the size (or halve it)."""
    return nn.Conv2d(channels, channels, size, stride, size // 2, groups=channels, bias=False)


# ---- Operations -----------------------------------------------------------------------------


class PerEdge(nn.Module):
    """A module of its own for every edge: written in a minute, but slower than one for all."""
    def __init__(self, build, channels, edges, stride, affine):
        super().__init__()
        self.edges = nn.ModuleList(build(channels, stride, affine) for _ in range(edges))

    def forward(self, inputs):
        return torch.cat([module(inputs.state) for module in self.edges], 1)


def per_edge(build):
    """An operation for the tables below from build(C, stride, affine), a module for one edge."""
    return partial(PerEdge, build)


class Pool(nn.Module):
    """3x3 max or average pooling; in the supernet of DARTS (`norm`) a BatchNorm follows."""
    shared = True

    def __init__(self, channels, edges, stride, affine, largest, norm=True):
        super().__init__()
        self.pool = nn.MaxPool2d(3, stride, 1) if largest \
            else nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        self.norm = BatchNorm(channels, affine=False) if norm and not affine else nn.Identity()

    def forward(self, inputs):
        return self.norm(self.pool(inputs.state))


class Identity(nn.Module):
    shared = True

    def forward(self, inputs):
        return inputs.state


class SepConv(nn.Module):
    """Separable convolution, twice: depthwise, pointwise, BatchNorm, with a ReLU between."""
    def __init__(self, channels, edges, stride, affine, size):
        super().__init__()
        c = channels * edges
        self.edges = edges
        self.depthwise1 = depthwise_conv(c, size, stride)
        self.pointwise1 = PointwiseConv(c, c, 1, groups=edges, bias=False)
        self.norm1 = BatchNorm(c, affine=affine)
        self.depthwise2 = depthwise_conv(c, size)
        self.pointwise2 = PointwiseConv(c, c, 1, groups=edges, bias=False)
        self.norm2 = BatchNorm(c, affine=affine)

    def forward(self, inputs):
        x = self.pointwise1(self.depthwise1(inputs.relu(self.edges)))
        x = F.relu(self.norm1(x), inplace=True)
        return Unnormalised(self.pointwise2(self.depthwise2(x)), self.norm2)


class DilConv(nn.Module):
    """Dilated separable convolution: depthwise of dilation 2, pointwise, BatchNorm."""
    def __init__(self, channels, edges, stride, affine, size):
        super().__init__()
        c = channels * edges
        self.edges, self.stride = edges, stride
        self.depthwise = depthwise_conv(c, size)
        self.pointwise = PointwiseConv(c, c, 1, groups=edges, bias=False)
        self.norm = BatchNorm(c, affine=affine)

    def forward(self, inputs):
        h, w = inputs.state.shape[2:]
        on_grids = self.stride == 1 and h % 2 == w % 2 == 0
        if self.stride == 2:                    # one sub-grid, which has the size of the result
            x = self.depthwise(inputs.grid(0, self.edges))
        elif inputs.state.is_meta and not on_grids:     # or cost would count the zeros
            x, conv = inputs.relu(self.edges), self.depthwise
            x = F.conv2d(x, conv.weight, None, 1, 2 * conv.padding[0], 2, conv.groups)
        else:
            # On CUDA too: cuDNN has hardly any deterministic dilated convolution in channels_last.
            x = self.depthwise(inputs.grids(self.edges))
            if not on_grids:                    # cut off the zeros that sub_grids has added
                x = from_grids(x)[:, :, :h, :w].contiguous(memory_format=torch.channels_last)
        return Unnormalised(self.pointwise(x), self.norm, on_grids)


class FactorizedReduce(nn.Module):
    """Halves the size: two 1x1 convolutions on the even and on the odd pixels, then BatchNorm."""
    def __init__(self, channels_in, channels, edges, affine):
        super().__init__()
        self.edges = edges
        half = channels // 2
        self.even = nn.Conv2d(channels_in, half * edges, 1, bias=False)
        self.odd = nn.Conv2d(channels_in, (channels - half) * edges, 1, bias=False)
        self.norm = BatchNorm(channels * edges, affine=affine)

    def forward(self, inputs):
        halves = self.even(inputs.grid(0)), self.odd(inputs.grid(3))
        halves = [half.unflatten(1, (self.edges, -1)) for half in halves]
        x = torch.cat(halves, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        return Unnormalised(x, self.norm)


class ReLUConvBN(nn.Module):
    """ReLU, convolution, BatchNorm; as edges see one state, one convolution serves them all."""
    def __init__(self, channels_in, channels, affine, size=1, stride=1, statistics=True):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, size, stride, size // 2, bias=False)
        self.norm = BatchNorm(channels, affine=affine, track_running_stats=statistics)

    def forward(self, inputs):
        return Unnormalised(self.conv(inputs.relu()), self.norm)


class DroppedSkip(nn.Module):
    """Identity whose values are dropped with `probability` in training, by edge (P-DARTS)."""
    def __init__(self, edges):
        super().__init__()
        self.edges = edges
        self.register_buffer('probability', torch.zeros(()), persistent=False)

    def forward(self, inputs):
        x = inputs.form('state', self.edges, lambda: inputs.state)
        if not self.training:
            return x
        kept = torch.rand(x.shape, device=x.device) >= self.probability
        return x * (kept / (1 - self.probability)).to(x.dtype)


def drop_path(x, probability):
    """Factor (B, 1, 1, 1) that zeroes images with `probability`, and scales (arXiv 1605.07648)."""
    keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= probability
    return (keep / (1 - probability)).to(x.dtype)


def skip_connect(channels, edges, stride, affine):
    return Identity() if stride == 1 else FactorizedReduce(channels, channels, edges, affine)


def dropped_skip(channels, edges, stride, affine):
    return DroppedSkip(edges) if stride == 1 else skip_connect(channels, edges, stride, affine)


def nor_conv(channels, edges, stride, affine, size):
    """NAS-Bench-201's convolution, which has no running statistics in a supernet."""
    return ReLUConvBN(channels, channels * edges, affine, size, stride, statistics=affine)


# The search spaces, in the order of their papers. `none` only takes softmax mass.
OPERATIONS = {
    'none': None,
    'max_pool_3x3': partial(Pool, largest=True),
    'avg_pool_3x3': partial(Pool, largest=False),
    'skip_connect': skip_connect,
    'sep_conv_3x3': partial(SepConv, size=3),
    'sep_conv_5x5': partial(SepConv, size=5),
    'dil_conv_3x3': partial(DilConv, size=3),
    'dil_conv_5x5': partial(DilConv, size=5),
}

NB201_OPERATIONS = {
    'none': None,
    'skip_connect': skip_connect,
    'nor_conv_1x1': partial(nor_conv, size=1),
    'nor_conv_3x3': partial(nor_conv, size=3),
    'avg_pool_3x3': partial(Pool, largest=False, norm=False),
}
