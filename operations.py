"""Candidate operations of the DARTS space, each written once for all edges that leave a state.

Every edge that leaves a state sees the same input, so an operation here serves E edges at once:
its maps are (B, E*C, H, W), channels_last, edge e in channels e*C to (e+1)*C. A derived network,
where an edge has one operation left, uses the same classes with the edges that kept them.

To add an operation, write a module and a line in OPERATIONS at the end; it is then searched, kept
in genotypes, drawn, retrained and counted. `operation(C, edges, stride, affine)` builds it, its
forward takes (B, E*C, H, W), after ReLU, and returns (B, E*C, H/stride, W/stride), or that with
its last BatchNorm not yet done, as `Unnormalised`, which is faster. A module without weights whose
result is the same for every edge sets `shared = True`: it takes the state itself, before ReLU, as
(B, C, H, W), and is computed once.

Sources: DARTS (arXiv 1806.09055) for the operations, BatchNorm (arXiv 1502.03167).
"""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def rows(x, edges=1):
    """(B, E*C, H, W), channels_last -> (E, B*H*W, C), a view: the unit of all matrix products."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1).reshape(-1, edges, x.shape[1] // edges).transpose(0, 1)


# ---------------------------------------------------------------------------------------------
# BatchNorm, and pointwise convolution by matrix products


class Unnormalised(NamedTuple):
    """A result whose last BatchNorm is still to be done, so that it can take the edge weights."""
    x: torch.Tensor         # (B, E*C, H, W)
    norm: nn.BatchNorm2d    # over E*C channels


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
        if x.device.type == 'cpu' and x.shape[1] % 8:      # torch's channels_last path is slow then
            x = x.contiguous()
        y = F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)
        return y.contiguous(memory_format=torch.channels_last)


class Products(torch.autograd.Function):
    """1x1 convolution with one group an edge, as one batched matrix product.

    x: (B, E*C in, H, W); weight: (E*C out, C in, 1, 1). Equals F.conv2d(x, weight, groups=E).
    """
    @staticmethod
    def forward(ctx, x, weight, edges):
        ctx.save_for_backward(x, weight)
        ctx.edges = edges
        return multiplied(x, blocks(weight, edges))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        p, dx, dw = blocks(weight, ctx.edges), None, None
        if ctx.needs_input_grad[0]:
            dx = multiplied(grad, p.transpose(1, 2))
        if ctx.needs_input_grad[1]:
            dw = torch.bmm(rows(grad, len(p)).transpose(1, 2), rows(x, len(p)))
            if len(p) != ctx.edges:
                dw = dw.view(ctx.edges, -1, ctx.edges, weight.shape[1]).diagonal(0, 0, 2)
                dw = dw.permute(2, 0, 1)
            dw = dw.reshape(weight.shape)
        return dx, dw, None


def blocks(weight, edges):
    """(E*C out, C in, 1, 1) -> (E, C in, C out), or one block-diagonal matrix where C is small."""
    p = weight.view(edges, -1, weight.shape[1]).transpose(1, 2)
    return torch.block_diag(*p).unsqueeze(0) if edges > 1 and weight.shape[1] < 16 else p


def multiplied(x, p):
    """(B, E*C in, H, W), (E, C in, C out) -> (B, E*C out, H, W), channels_last."""
    b, _, h, w = x.shape
    out = torch.empty(b, p.shape[0] * p.shape[2], h, w, dtype=x.dtype, device=x.device,
                      memory_format=torch.channels_last)
    torch.bmm(rows(x, len(p)), p, out=rows(out, len(p)))
    return out


class PointwiseConv(nn.Conv2d):
    """1x1 convolution of `edges` groups."""
    def __init__(self, channels_in, channels, edges):
        super().__init__(channels_in, channels, 1, groups=edges, bias=False)

    def forward(self, x):
        if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return Products.apply(x, self.weight, self.groups)


# ---------------------------------------------------------------------------------------------
# Depthwise convolution


class DepthwiseOnCPU(torch.autograd.Function):
    """A depthwise convolution, 5x5 or dilated, whose backward avoids oneDNN's slow paths.

    The gradient of a kernel wider than 3 is taken in two parts, that of a dilated one on the four
    sub-grids, and the input's gradient of a dilated one is a convolution with the flipped kernel
    (measured on two cores, C=64, 32 px: 5x5 7.4 ms -> 1.4, dilated 3x3 11 -> 1, 5x5 29 -> 2).
    """
    @staticmethod
    def forward(ctx, x, weight, stride, dilation):
        ctx.save_for_backward(x, weight)
        padding = dilation * (weight.shape[-1] // 2)
        ctx.how = stride, padding, dilation
        return F.conv2d(x, weight, None, *ctx.how, x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad, dx, dw = grad.contiguous(memory_format=torch.channels_last), None, None
        stride, padding, dilation = ctx.how
        if ctx.needs_input_grad[0] and dilation == 1:
            dx = backward_of_conv(grad, x, weight, stride, padding, (True, False, False))[0]
        elif ctx.needs_input_grad[0]:
            dx = F.conv2d(grad, weight.flip(2, 3), None, *ctx.how, x.shape[1])
        if ctx.needs_input_grad[1]:
            if dilation == 2:
                x, grad = sub_grids(x), sub_grids(grad)
            dw = depthwise_weight_gradient(x, grad, weight, stride)
        return dx, dw, None, None


def backward_of_conv(grad, x, weight, stride, padding, wanted):
    padding = [padding] * 2 if isinstance(padding, int) else padding
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, padding, [1, 1], False, [0, 0], x.shape[1], wanted)


def sub_grids(x):
    """(B, C, H, W) -> (4B, C, H/2, W/2): even and odd rows and columns as images of their own.

    A kernel of dilation 2 is an ordinary one there; an odd size is padded with zeros.
    """
    b, c, h, w = x.shape
    if h % 2 or w % 2:
        x = F.pad(x, (0, w % 2, 0, h % 2)).contiguous(memory_format=torch.channels_last)
        h, w = h + h % 2, w + w % 2
    x = x.permute(0, 2, 3, 1).reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(4 * b, h // 2, w // 2, c).permute(0, 3, 1, 2)


def depthwise_weight_gradient(x, grad, weight, stride):
    """Gradient (C, 1, k, k) of an undilated depthwise kernel."""
    def columns(x, width, padding):
        part = weight.new_empty(weight.shape[:3] + (width,))
        return backward_of_conv(grad, x, part, stride, [half, padding], (False, True, False))[1]

    half = weight.shape[2] // 2
    if half == 1:
        return columns(x, 3, 1)
    return torch.cat([columns(F.pad(x, (2, 0)), 3, 0), columns(F.pad(x, (-1, 2)), 2, 0)], 3)


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of `channels` channels, padded to keep the size (or halve it)."""
    def __init__(self, channels, size, stride=1, dilation=1):
        # On every second pixel a kernel of dilation 2 is an ordinary one.
        self.every = 2 if dilation == stride == 2 else 1
        stride, dilation = stride // self.every, dilation // self.every
        super().__init__(channels, channels, size, stride, dilation * (size // 2), dilation,
                         groups=channels, bias=False)

    def forward(self, x):
        if self.every == 2:
            x = x[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
        slow = self.dilation == (2, 2) or self.kernel_size == (5, 5)
        if slow and x.device.type == 'cpu' and torch.is_grad_enabled() \
                and not torch.is_autocast_enabled('cpu'):
            return DepthwiseOnCPU.apply(x, self.weight, self.stride[0], self.dilation[0])
        return super().forward(x)


# ---------------------------------------------------------------------------------------------
# Operations


class Pool(nn.Module):
    """3x3 max or average pooling; the supernet alone normalises after it (no `affine`)."""
    shared = True

    def __init__(self, channels, stride, affine, kind):
        super().__init__()
        self.stride, self.kind = stride, kind
        self.norm = nn.Identity() if affine else BatchNorm(channels, affine=False)

    def forward(self, x):
        if self.kind == 'max':
            return self.norm(F.max_pool2d(x, 3, self.stride, 1))
        return self.norm(F.avg_pool2d(x, 3, self.stride, 1, count_include_pad=False))


class Identity(nn.Module):
    shared = True

    def forward(self, x):
        return x


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

    def forward(self, x):
        x = F.relu(self.norm1(self.pointwise1(self.depthwise1(x))), inplace=True)
        return Unnormalised(self.pointwise2(self.depthwise2(x)), self.norm2)


class DilConv(nn.Module):
    """Dilated separable convolution: depthwise of dilation 2, pointwise, BatchNorm."""
    shared = False

    def __init__(self, channels, edges, stride, affine, size):
        super().__init__()
        c = channels * edges
        self.depthwise = DepthwiseConv(c, size, stride, dilation=2)
        self.pointwise = PointwiseConv(c, c, edges)
        self.norm = BatchNorm(c, affine=affine)

    def forward(self, x):
        return Unnormalised(self.pointwise(self.depthwise(x)), self.norm)


class FactorizedReduce(nn.Module):
    """Halves the size: two 1x1 convolutions on the even and on the odd pixels, then BatchNorm.

    Takes maps after ReLU: (B, E*C in, H, W) -> (B, E*C out, ceil(H/2), ceil(W/2)).
    """
    shared = False

    def __init__(self, channels_in, channels, edges, affine):
        super().__init__()
        self.edges = edges
        self.even = PointwiseConv(channels_in * edges, channels // 2 * edges, edges)
        self.odd = PointwiseConv(channels_in * edges, (channels - channels // 2) * edges, edges)
        self.norm = BatchNorm(channels * edges, affine=affine)

    def forward(self, x):
        if x.shape[2] % 2 or x.shape[3] % 2:      # else the odd grid would be smaller
            x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        halves = [conv(x[:, :, i::2, i::2].contiguous(memory_format=torch.channels_last))
                  for i, conv in enumerate((self.even, self.odd))]
        halves = [half.unflatten(1, (self.edges, -1)) for half in halves]
        x = torch.cat(halves, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        return Unnormalised(x, self.norm)


class ReLUConvBN(nn.Module):
    """1x1 convolution between a ReLU and BatchNorm: brings a cell's input to its width."""
    def __init__(self, channels_in, channels, affine):
        super().__init__()
        self.conv = PointwiseConv(channels_in, channels, 1)
        self.norm = BatchNorm(channels, affine=affine)

    def forward(self, x):
        return self.norm(self.conv(F.relu(x)))


def drop_path(x, probability):
    """Zero whole images of (B, C, H, W) with `probability`, scaling the rest (arXiv 1605.07648)."""
    keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= probability
    return x * (keep / (1 - probability)).to(x.dtype)


def skip_connect(channels, edges, stride, affine):
    if stride == 1:
        return Identity()
    return FactorizedReduce(channels, channels, edges, affine)


# The search space, in DARTS's order. `none` multiplies by zero: it only takes softmax mass.
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
