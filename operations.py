"""Candidate operations of both spaces, each written once for all edges that leave a state.

Every edge that leaves a state sees the same input, so an operation here serves E edges at once:
its maps are (B, E*C, H, W), channels_last, edge e in channels e*C to (e+1)*C. A derived network,
where an edge has one operation left, uses the same classes with the edges that kept them.

To add an operation, write a module and a line in OPERATIONS at the end; it is then searched, kept
in genotypes, drawn, retrained and counted. `operation(C, edges, stride, affine)` builds it; its
forward takes Inputs, the state in every form that may be wanted, and returns (B, E*C, H/stride,
W/stride), or that with its last BatchNorm not yet done, as `Unnormalised`, which is faster. A
module without weights, whose result is the same for every edge, sets `shared = True`: it returns
(B, C, H/stride, W/stride) and is computed once.

Sources: DARTS (arXiv 1806.09055) and NAS-Bench-201 (arXiv 2001.00326) for the operations, P-DARTS
(arXiv 1904.12760) for the dropout on skips, BatchNorm (arXiv 1502.03167).
"""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------
# What leaves a state


def sub_grids(x):
    """(B, C, H, W) -> (4B, C, H/2, W/2): even and odd rows and columns as images of their own.

    A convolution of dilation 2 is an ordinary one on each. An odd size is padded with zeros.
    """
    b, c, h, w = x.shape
    if h % 2 or w % 2:
        x = F.pad(x, (0, w % 2, 0, h % 2))
        h, w = h + h % 2, w + w % 2
    x = x.permute(0, 2, 3, 1).reshape(b, h // 2, 2, w // 2, 2, c).permute(2, 4, 0, 1, 3, 5)
    return x.contiguous().view(4 * b, h // 2, w // 2, c).permute(0, 3, 1, 2)


def from_grids(x, other=None):
    """(4B, C, h, w) -> (B, C, 2h, 2w): undoes sub_grids of maps of even size, and adds `other`."""
    b, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(2, 2, b // 4, h, w, c).permute(2, 3, 0, 4, 1, 5)
    x = x.contiguous() if other is None else other.permute(0, 2, 3, 1).reshape(x.shape) + x
    return x.view(b // 4, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


class Repeated(torch.autograd.Function):
    """(B, C, H, W) -> (B, E*C, H, W), whose backward is one sum and not E slices to add up."""
    @staticmethod
    def forward(ctx, x, edges):
        ctx.edges = edges
        return torch.cat([x] * edges, 1)

    @staticmethod
    def backward(ctx, grad):
        b, c, h, w = grad.shape
        grad = grad.permute(0, 2, 3, 1).reshape(b, h, w, ctx.edges, c // ctx.edges)
        return grad.sum(3).permute(0, 3, 1, 2), None


class Inputs:
    """A state (B, C, H, W) in every form that operations take, each made once, when asked for.

    edges: how many times its channels are repeated, once for each edge that they serve.
    """
    def __init__(self, state):
        self.state, self.made = state, {}

    def form(self, name, edges, make):
        if (name, edges) not in self.made:
            self.made[name, edges] = make() if edges == 1 else \
                Repeated.apply(self.form(name, 1, make), edges)
        return self.made[name, edges]

    def relu(self, edges=1):
        """After ReLU: (B, E*C, H, W)."""
        return self.form('relu', edges, lambda: F.relu(self.state))

    def grids(self, edges=1):
        """After ReLU, its four sub-grids as images: (4B, E*C, H/2, W/2)."""
        return self.form('grids', edges, lambda: sub_grids(self.relu()))

    def grid(self, k, edges=1):
        """After ReLU, sub-grid k: (B, E*C, H/2, W/2), the pixels (k // 2, k % 2) of every 2x2."""
        return self.form(k, edges, lambda: self.grids().chunk(4)[k])


# ---------------------------------------------------------------------------------------------
# BatchNorm


class Unnormalised(NamedTuple):
    """A result whose last BatchNorm is still to be done, so that it can take the edge weights."""
    x: torch.Tensor         # (B, E*C, H, W)
    norm: nn.BatchNorm2d    # over E*C channels
    on_grids: bool = False  # x is (4B, E*C, H/2, W/2), the sub-grids of the result


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose result can be scaled, channel by channel, at no cost.

    The scale takes the place of the affine weight, so that its gradient, which is that of the edge
    weights in a supernet, comes from BatchNorm's own backward.
    """
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


# ---------------------------------------------------------------------------------------------
# Convolutions


class ConvOnCPU(torch.autograd.Function):
    """F.conv2d whose kernel's gradient is `kernel_gradient(grad, x, weight, stride)`.

    oneDNN is slow at the gradients of grouped 1x1 and of wide depthwise kernels: those take up to
    a half and up to nine tenths less this way.
    """
    @staticmethod
    def forward(ctx, x, weight, stride, groups, kernel_gradient):
        ctx.save_for_backward(x, weight)
        ctx.how = stride, groups, kernel_gradient
        return F.conv2d(x, weight, None, stride, weight.shape[2] // 2, 1, groups)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, groups, kernel_gradient = ctx.how
        grad, dx, dw = grad.contiguous(memory_format=torch.channels_last), None, None
        if ctx.needs_input_grad[0]:
            padding = [weight.shape[2] // 2] * 2
            dx = backward_of_conv(grad, x, weight, stride, padding, groups, (True, False, False))[0]
        if ctx.needs_input_grad[1]:
            dw = kernel_gradient(grad, x, weight, stride)
        return dx, dw, None, None, None


def backward_of_conv(grad, x, weight, stride, padding, groups, wanted):
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, padding, [1, 1], False, [0, 0], groups, wanted)


def depthwise_gradient(grad, x, weight, stride):
    """Gradient (C, 1, 5, 5) of a 5x5 depthwise kernel, in parts of three and two columns."""
    def part(x, height, width, top):
        kernel = x.new_empty(x.shape[1], 1, height, width)
        return backward_of_conv(grad, x, kernel, stride, [top, 0], len(kernel),
                                (False, True, False))[1]

    sides = (F.pad(x, (2, 0)), 3), (F.pad(x, (-1, 2)), 2)
    if x.shape[3] > 4:
        return torch.cat([part(side, 5, width, 2) for side, width in sides], 3)
    # Maps narrower than the kernel: in parts of rows as well, or it would take ten times as long.
    return torch.cat([torch.cat([part(F.pad(side, (0, 0, 2, 0)), 3, width, 0),
                                 part(F.pad(side, (0, 0, -1, 2)), 2, width, 0)], 2)
                      for side, width in sides], 3)


def pointwise_gradient(grad, x, weight, stride):
    """Gradient (E*C out, C in, 1, 1) of a 1x1 kernel of E groups, by matrix products."""
    edges = x.shape[1] // weight.shape[1]
    x, grad = (t.permute(0, 2, 3, 1).reshape(-1, edges, t.shape[1] // edges).transpose(0, 1)
               for t in (x, grad))                          # (E, B*H*W, C), views
    return torch.bmm(grad.transpose(1, 2), x).view(weight.shape)


def plain(x):
    """Whether torch's own backward is to be used: on a GPU, under autocast, without gradients."""
    return x.device.type != 'cpu' or torch.is_autocast_enabled('cpu') \
        or not torch.is_grad_enabled()


class PointwiseConv(nn.Conv2d):
    """1x1 convolution of `edges` groups."""
    def __init__(self, channels_in, channels, edges):
        super().__init__(channels_in, channels, 1, groups=edges, bias=False)

    def forward(self, x):
        # One dense product is faster; on meta, where multiply-adds are counted, its zeros would be.
        if self.groups > 1 and self.in_channels <= 32 and x.device.type != 'meta':
            blocks = torch.block_diag(*self.weight.flatten(1).chunk(self.groups))
            return F.conv2d(x, blocks[:, :, None, None])
        if self.groups == 1 or plain(x):
            return super().forward(x)
        return ConvOnCPU.apply(x, self.weight, 1, self.groups, pointwise_gradient)


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of `channels` channels, padded to keep the size (or halve it)."""
    def __init__(self, channels, size, stride=1):
        super().__init__(channels, channels, size, stride, size // 2, groups=channels, bias=False)

    def forward(self, x, dilation=1):
        if dilation > 1:
            padding = dilation * (self.kernel_size[0] // 2)
            return F.conv2d(x, self.weight, None, 1, padding, dilation, self.groups)
        if self.kernel_size != (5, 5) or plain(x):
            return super().forward(x)
        return ConvOnCPU.apply(x, self.weight, self.stride[0], self.groups, depthwise_gradient)


# ---------------------------------------------------------------------------------------------
# Operations


class Pool(nn.Module):
    """3x3 max or average pooling; the supernet alone normalises after it (no `affine`)."""
    shared = True

    def __init__(self, channels, stride, affine, kind):
        super().__init__()
        self.stride, self.kind = stride, kind
        self.norm = nn.Identity() if affine else BatchNorm(channels, affine=False)

    def forward(self, inputs):
        if self.kind == 'max':
            return self.norm(F.max_pool2d(inputs.state, 3, self.stride, 1))
        return self.norm(F.avg_pool2d(inputs.state, 3, self.stride, 1, count_include_pad=False))


class Identity(nn.Module):
    shared = True

    def forward(self, inputs):
        return inputs.state


class SepConv(nn.Module):
    """Separable convolution, twice: depthwise, pointwise, BatchNorm, with a ReLU between."""
    shared = False

    def __init__(self, channels, edges, stride, affine, size):
        super().__init__()
        c = channels * edges
        self.edges = edges
        self.depthwise1 = DepthwiseConv(c, size, stride)
        self.pointwise1 = PointwiseConv(c, c, edges)
        self.norm1 = BatchNorm(c, affine=affine)
        self.depthwise2 = DepthwiseConv(c, size)
        self.pointwise2 = PointwiseConv(c, c, edges)
        self.norm2 = BatchNorm(c, affine=affine)

    def forward(self, inputs):
        x = self.pointwise1(self.depthwise1(inputs.relu(self.edges)))
        x = F.relu(self.norm1(x), inplace=True)
        return Unnormalised(self.pointwise2(self.depthwise2(x)), self.norm2)


class DilConv(nn.Module):
    """Dilated separable convolution: depthwise of dilation 2, pointwise, BatchNorm."""
    shared = False

    def __init__(self, channels, edges, stride, affine, size):
        super().__init__()
        c = channels * edges
        self.edges, self.stride = edges, stride
        self.depthwise = DepthwiseConv(c, size)
        self.pointwise = PointwiseConv(c, c, edges)
        self.norm = BatchNorm(c, affine=affine)

    def forward(self, inputs):
        h, w = inputs.state.shape[2:]
        on_grids = self.stride == 1 and inputs.state.device.type == 'cpu' and h % 2 == w % 2 == 0
        if self.stride == 2:
            x = self.depthwise(inputs.grid(0, self.edges))
        elif on_grids:
            x = self.depthwise(inputs.grids(self.edges))
        else:
            x = self.depthwise(inputs.relu(self.edges), dilation=2)
        return Unnormalised(self.pointwise(x), self.norm, on_grids)


class FactorizedReduce(nn.Module):
    """Halves the size: two 1x1 convolutions on the even and on the odd pixels, then BatchNorm."""
    shared = False

    def __init__(self, channels_in, channels, edges, affine):
        super().__init__()
        self.edges = edges
        self.even = PointwiseConv(channels_in, channels // 2 * edges, 1)
        self.odd = PointwiseConv(channels_in, (channels - channels // 2) * edges, 1)
        self.norm = BatchNorm(channels * edges, affine=affine)

    def forward(self, inputs):
        halves = self.even(inputs.grid(0)), self.odd(inputs.grid(3))
        halves = [half.unflatten(1, (self.edges, -1)) for half in halves]
        x = torch.cat(halves, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        return Unnormalised(x, self.norm)


class ConvBN(nn.Module):
    """ReLU, convolution, BatchNorm, as NAS-Bench-201 has it: in a supernet without statistics."""
    shared = False

    def __init__(self, channels, edges, stride, affine, size):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels * edges, size, stride, size // 2, bias=False)
        self.norm = BatchNorm(channels * edges, affine=affine, track_running_stats=affine)

    def forward(self, inputs):
        return Unnormalised(self.conv(inputs.relu()), self.norm)    # all edges see one state


class DroppedSkip(nn.Module):
    """Identity whose values are dropped with `probability` in training, by edge (P-DARTS)."""
    shared = False

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


class ReLUConvBN(nn.Module):
    """1x1 convolution between a ReLU and BatchNorm: brings a cell's input to its width."""
    def __init__(self, channels_in, channels, affine):
        super().__init__()
        self.conv = PointwiseConv(channels_in, channels, 1)
        self.norm = BatchNorm(channels, affine=affine)

    def forward(self, inputs):
        return Unnormalised(self.conv(inputs.relu()), self.norm)


def drop_path(x, probability):
    """Factor (B, 1, 1, 1) that zeroes whole images of x with `probability` and scales the rest
    (arXiv 1605.07648)."""
    keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= probability
    return (keep / (1 - probability)).to(x.dtype)


def skip_connect(channels, edges, stride, affine):
    if stride == 1:
        return Identity()
    return FactorizedReduce(channels, channels, edges, affine)


def dropped_skip(channels, edges, stride, affine):
    return DroppedSkip(edges) if stride == 1 else skip_connect(channels, edges, stride, affine)


# The search spaces, in the order of their papers. `none` multiplies by zero: it only takes softmax
# mass.
OPERATIONS = {
    'none': None,
    'max_pool_3x3': lambda C, edges, stride, affine: Pool(C, stride, affine, 'max'),
    'avg_pool_3x3': lambda C, edges, stride, affine: Pool(C, stride, affine, 'avg'),
    'skip_connect': skip_connect,
    'sep_conv_3x3': lambda C, edges, stride, affine: SepConv(C, edges, stride, affine, 3),
    'sep_conv_5x5': lambda C, edges, stride, affine: SepConv(C, edges, stride, affine, 5),
    'dil_conv_3x3': lambda C, edges, stride, affine: DilConv(C, edges, stride, affine, 3),
    'dil_conv_5x5': lambda C, edges, stride, affine: DilConv(C, edges, stride, affine, 5),
}

NB201_OPERATIONS = {
    'none': None,
    'skip_connect': skip_connect,
    'nor_conv_1x1': lambda C, edges, stride, affine: ConvBN(C, edges, stride, affine, 1),
    'nor_conv_3x3': lambda C, edges, stride, affine: ConvBN(C, edges, stride, affine, 3),
    'avg_pool_3x3': lambda C, edges, stride, affine: Pool(C, stride, True, 'avg'),
}
