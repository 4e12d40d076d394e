"""Candidate operations of the DARTS space, each written once for all edges that leave a state.

Every edge that leaves a state sees the same input, so an operation here serves E edges at once:
its maps are (B, E*C, H, W), channels_last, edge e in channels e*C to (e+1)*C. A derived network,
where an edge has one operation left, uses the same classes with the edges that kept them.

To add an operation, write a module and a line in OPERATIONS at the end; it is then searched, kept
in genotypes, drawn, retrained and counted. `operation(C, edges, stride, affine)` builds it, its
forward takes (B, E*C, H, W), after ReLU, and returns (B, E*C, H/stride, W/stride), or the last
pointwise convolution and BatchNorm not yet done, as a `Product`, which is faster. A module
without weights whose result is the same for every edge sets `shared = True`: it takes the state
itself, before ReLU, as (B, C, H, W), and is computed once.

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
# Pointwise convolution and BatchNorm in one


class Product(NamedTuple):
    """A result whose last pointwise convolution and BatchNorm are still to be done."""
    x: torch.Tensor         # (B, E*C, H, W)
    conv: nn.Conv2d         # 1x1, one group an edge
    norm: nn.BatchNorm2d    # over E*C channels


class NormalisedProducts(torch.autograd.Function):
    """base + sum over o of scale_o * BatchNorm(x_o P_o) + shift_o; no x_o P_o is ever stored.

    Mean and variance of x P follow from the mean m and the second moment G = x'x / N of x:
        mu = m P,   var = diag(P' G P) - mu^2,
    so normalisation, edge weight and the sum over operations become one scaling of P's columns:
    two passes over x forward and two backward, where plain torch takes eleven.
    base: (E, N*C), added to in place, or None: then the result is a channels_last map.
    scale, shift: (O, E, C); products: x_0, P_0, x_1, P_1, ...: (B, E*C, H, W), (E*C, C, 1, 1).
    Returns the sum and, for the running statistics, mu and var (O, E, C).
    """
    @staticmethod
    def forward(ctx, base, scale, shift, eps, *products):
        operations, edges, _ = scale.shape
        xs = [rows(x, edges) for x in products[::2]]
        weight = torch.stack([p.view(edges, -1, p.shape[1]) for p in products[1::2]])
        weight = weight.transpose(2, 3)                                       # (O, E, C in, C out)
        n, width = xs[0].shape[1:]
        mean = scale.new_empty(operations, edges, 1, width)
        moment = scale.new_empty(operations, edges, width, width)
        for x, m, g in zip(xs, mean, moment):
            torch.sum(x, 1, keepdim=True, out=m)
            torch.bmm(x.transpose(1, 2), x, out=g)
        mean, moment = mean.div_(n), moment.div_(n)
        spread = moment @ weight
        mu = (mean @ weight).squeeze(2)
        var = (weight * spread).sum(2).addcmul_(mu, mu, value=-1).clamp_(min=0)
        inverse = (var + eps).rsqrt_()
        factor = scale * inverse
        constant = (shift - mu * factor).sum(0).unsqueeze(1)                            # (E, 1, C)
        scaled = weight * factor.unsqueeze(2)
        if base is None:
            b, _, h, w = products[0].shape
            out = torch.empty(b, edges * scale.shape[2], h, w, dtype=scale.dtype,
                              device=scale.device, memory_format=torch.channels_last)
            total = rows(out, edges)
            torch.baddbmm(constant, xs[0], scaled[0], out=total)
        else:
            out, total = base, base.view(edges, n, -1)
            total.add_(constant).baddbmm_(xs[0], scaled[0])
            ctx.mark_dirty(base)
        for x, p in zip(xs[1:], scaled[1:]):
            total.baddbmm_(x, p)
        ctx.in_place = base is not None
        ctx.save_for_backward(scale, weight, mean, spread, mu, inverse, *products[::2])
        ctx.mark_non_differentiable(mu, var)
        return out, mu, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _mu, _var):
        scale, weight, mean, spread, mu, inverse, *maps = ctx.saved_tensors
        operations, edges, _ = scale.shape
        xs = [rows(x, edges) for x in maps]
        g = grad.view(edges, xs[0].shape[1], -1) if ctx.in_place else rows(grad, edges)
        n, factor = g.shape[1], scale * inverse
        total = g.sum(1)
        cross = torch.empty_like(spread)
        for x, d in zip(xs, cross):
            torch.bmm(x.transpose(1, 2), g, out=d)
        along = ((weight * cross).sum(2) - mu * total) * inverse          # sum of grad times x_hat
        k = factor * inverse * along / n
        c = factor * total / n - mu * k                               # d(xP) = factor g - k xP - c
        to_g = (weight * factor.unsqueeze(2)).transpose(2, 3)
        to_x = (weight * k.unsqueeze(2)) @ weight.transpose(2, 3)
        to_1 = -(c.unsqueeze(2) @ weight.transpose(2, 3))
        grads = []
        for o, (map_, x) in enumerate(zip(maps, xs)):
            dx = torch.empty_like(map_, memory_format=torch.channels_last)
            d = rows(dx, edges)
            torch.baddbmm(to_1[o], g, to_g[o], out=d)
            d.baddbmm_(x, to_x[o], alpha=-1)
            grads += [dx, None]
        if any(ctx.needs_input_grad[5::2]):
            dw = cross * factor.unsqueeze(2) - n * torch.addcmul(
                spread * k.unsqueeze(2), mean.transpose(2, 3), c.unsqueeze(2))
            grads[1::2] = dw.transpose(2, 3).flatten(1, 2).unsqueeze(3).unsqueeze(4).unbind()
        dshift = total.expand_as(scale) if ctx.needs_input_grad[2] else None
        return grad if ctx.in_place else None, along, dshift, None, *grads


def fused(x, norm):
    """Whether the one-pass version applies: batch statistics, and no autocast.

    Under autocast the second moment would be rounded to 16 bits, so torch's own calls are used.
    """
    return norm.training and not torch.is_autocast_enabled(x.device.type)


def normalised_products(products, edges, weights=None, base=None):
    """Finish Products: each normalised, times its edge weight, and summed over operations.

    products: list of O Products of the same E edges; weights: (E, O) or None for 1.
    Returns base (E, N*C) plus the sum, or a map (B, E*C, H, W) where base is None.
    """
    norms = [p.norm for p in products]
    if not fused(products[0].x, norms[0]):
        return plain_products(products, edges, weights, base)
    shape = (len(products), edges, -1)
    if norms[0].affine:
        scale = torch.stack([n.weight for n in norms]).view(shape)
        shift = torch.stack([n.bias for n in norms]).view(shape)
    else:
        scale = products[0].x.new_ones(1)
        shift = scale.new_zeros(1)
    if weights is not None:
        scale, shift = scale * weights.t().unsqueeze(2), shift * weights.t().unsqueeze(2)
    scale = scale.expand(*shape[:2], products[0].conv.out_channels // edges)
    tensors = [t for p in products for t in (p.x, p.conv.weight)]
    out, mu, var = NormalisedProducts.apply(base, scale, shift, norms[0].eps, *tensors)
    if norms[0].track_running_stats:
        n = products[0].x.numel() // products[0].x.shape[1]
        running = [s for norm in norms for s in (norm.running_mean, norm.running_var)]
        batch = [s.flatten() for m, v in zip(mu, var * (n / max(n - 1, 1))) for s in (m, v)]
        torch._foreach_lerp_(running, batch, norms[0].momentum)
    return out


def plain_products(products, edges, weights=None, base=None):
    """normalised_products in torch's own calls: for evaluation, autocast, and as its test."""
    maps = [p.norm(p.conv(p.x)) for p in products]
    if weights is not None:
        channels = maps[0].shape[1] // edges
        maps = [m * w.repeat_interleave(channels).view(1, -1, 1, 1)
                for m, w in zip(maps, weights.unbind(1))]
    total = sum(maps[1:], maps[0])
    return total if base is None else base + rows(total, edges).flatten(1)


# ---------------------------------------------------------------------------------------------
# Depthwise convolution


class DepthwiseOnCPU(torch.autograd.Function):
    """A depthwise convolution of stride 1 whose backward avoids oneDNN's slow paths.

    The gradient of the input is a convolution with the flipped kernel. That of the kernel is
    taken on the four sub-grids where the kernel is dilated, and as four 3x3 blocks where it is
    5x5 (measured on two cores, C=64, 32 px: dilated 3x3 14.1 ms -> 1.2, dilated 5x5 29 -> 6).
    """
    @staticmethod
    def forward(ctx, x, weight, dilation):
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        padding = dilation * (weight.shape[-1] // 2)
        return F.conv2d(x, weight, None, 1, padding, dilation, x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        size, dilation, dx, dw = weight.shape[-1], ctx.dilation, None, None
        if ctx.needs_input_grad[0]:
            padding = dilation * (size // 2)
            dx = F.conv2d(grad, weight.flip(2, 3), None, 1, padding, dilation, x.shape[1])
        if ctx.needs_input_grad[1]:
            if dilation == 2:
                x, grad = sub_grids(x), sub_grids(grad)
            dw = depthwise_weight_gradient(x, grad, size)
        return dx, dw, None


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


def depthwise_weight_gradient(x, grad, size):
    """Gradient (C, 1, size, size) of an undilated depthwise kernel of stride 1."""
    c, (h, w) = x.shape[1], grad.shape[2:]

    def block(x, padding, size):
        return torch.ops.aten.convolution_backward(
            grad, x, x.new_empty(c, 1, size, size), None, [1, 1], [padding] * 2, [1, 1], False,
            [0, 0], c, [False, True, False])[1]

    if size != 5:
        return block(x, size // 2, size)
    padded, out = F.pad(x, (2, 2, 2, 2)), x.new_empty(c, 1, 5, 5)
    for i in (0, 2):
        for j in (0, 2):
            part = padded[:, :, i:i + h + 2, j:j + w + 2]
            part = part.contiguous(memory_format=torch.channels_last)
            out[:, :, i:i + 3, j:j + 3] = block(part, 0, 3)
    return out


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
        if self.stride == (1, 1) and x.device.type == 'cpu' and torch.is_grad_enabled():
            return DepthwiseOnCPU.apply(x, self.weight, self.dilation[0])
        return super().forward(x)


# ---------------------------------------------------------------------------------------------
# Operations


class Pool(nn.Module):
    """3x3 max or average pooling; the supernet alone normalises after it (no `affine`)."""
    shared = True

    def __init__(self, channels, stride, affine, kind):
        super().__init__()
        self.stride, self.kind = stride, kind
        self.norm = nn.Identity() if affine else nn.BatchNorm2d(channels, affine=False)

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
        self.pointwise1 = nn.Conv2d(c, c, 1, groups=edges, bias=False)
        self.norm1 = nn.BatchNorm2d(c, affine=affine)
        self.depthwise2 = DepthwiseConv(c, size)
        self.pointwise2 = nn.Conv2d(c, c, 1, groups=edges, bias=False)
        self.norm2 = nn.BatchNorm2d(c, affine=affine)

    def forward(self, x):
        first = Product(self.depthwise1(x), self.pointwise1, self.norm1)
        x = F.relu(normalised_products([first], self.edges), inplace=True)
        return Product(self.depthwise2(x), self.pointwise2, self.norm2)


class DilConv(nn.Module):
    """Dilated separable convolution: depthwise of dilation 2, pointwise, BatchNorm."""
    shared = False

    def __init__(self, channels, edges, stride, affine, size):
        super().__init__()
        c = channels * edges
        self.depthwise = DepthwiseConv(c, size, stride, dilation=2)
        self.pointwise = nn.Conv2d(c, c, 1, groups=edges, bias=False)
        self.norm = nn.BatchNorm2d(c, affine=affine)

    def forward(self, x):
        return Product(self.depthwise(x), self.pointwise, self.norm)


class FactorizedReduce(nn.Module):
    """Halves the size: two 1x1 convolutions on the even and on the odd pixels, then BatchNorm.

    Takes maps after ReLU: (B, E*C in, H, W) -> (B, E*C out, ceil(H/2), ceil(W/2)).
    """
    shared = False

    def __init__(self, channels_in, channels, edges, affine):
        super().__init__()
        self.edges = edges
        self.even = nn.Conv2d(channels_in * edges, channels // 2 * edges, 1, groups=edges,
                              bias=False)
        self.odd = nn.Conv2d(channels_in * edges, (channels - channels // 2) * edges, 1,
                             groups=edges, bias=False)
        self.norm = nn.BatchNorm2d(channels * edges, affine=affine)

    def forward(self, x):
        if x.shape[2] % 2 or x.shape[3] % 2:      # else the odd grid would be smaller
            x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        halves = [conv(x[:, :, i::2, i::2].contiguous(memory_format=torch.channels_last))
                  for i, conv in enumerate((self.even, self.odd))]
        halves = [half.unflatten(1, (self.edges, -1)) for half in halves]
        return self.norm(torch.cat(halves, 2).flatten(1, 2)
                         .contiguous(memory_format=torch.channels_last))


class ReLUConvBN(nn.Module):
    """1x1 convolution between a ReLU and BatchNorm: brings a cell's input to its width."""
    def __init__(self, channels_in, channels, affine):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels, affine=affine)

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
