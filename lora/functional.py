"""Tensor functions under the LoRA layers: exact low-rank forward and backward.

Training a layer whose weight W is frozen needs one product forward and one for the input gradient. Automatic
differentiation of ``W x + s B (A x)`` spends much of what that saves on extra passes over activations. The two
`torch.autograd.Function`s below write the gradients of LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3) out by hand, with
``h = x A^T``, ``gy`` the output's gradient and ``s`` the scaling:

    y  = x (W + s B A)^T + b        gh = s gy B         (rows x r)
    gx = gy (W + s B A)             gA = gh^T x         (r x in)
                                    gB = s gy^T h       (out x r)

The dense weight gradient is never formed, and nothing of the output's size is allocated but the output. There are two
ways to y and gx, between which `_merge_pays` and `_kernel_merges` choose; with dropout it is always the latter:

- *merged*: one product with ``W + s B A``, which is built for the call and not kept;
- *side path*: a product with W, then ``s h B^T`` accumulated in place.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import backends
from lora.backends import LOW_PRECISION, compute_dtype
from lora.weights import Weight

MOST_PARTS = 8  # at most, in which a CPU computes the gradient through a recomputed LayerNorm
PART_NUMEL = 2**17  # numbers in each, or more


def _merge_pays(weight: Weight, dtype: torch.dtype, output_numel: int) -> bool:
    """Merged or side path? In full precision what passes over fewer elements; else the latter: rounding costs more."""
    if not weight.multiplies_dense or dtype in LOW_PRECISION:
        return False
    any_number = isinstance(output_numel, torch.SymInt)  # as torch.export has it where the batch may be of any size
    return any_number or math.prod(weight.shape) <= output_numel


def frozen_linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` of a layer that does not train, by the fastest product where no gradient is needed."""
    if not weight.multiplies_dense:  # an adapter of rank 0
        return lora_linear(x, weight, x.new_empty(0, x.shape[-1]), x.new_empty(weight.shape[0], 0), bias)
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if needs_gradient or compute_dtype(x) != x.dtype or x.dim() == 1:
        return F.linear(x, weight.tensor, bias)
    return backends.linear(x.flatten(0, -2), weight.tensor, bias).view(*x.shape[:-1], weight.shape[0])


def effective_weight(W: Tensor, A: Tensor, B: Tensor, scaling: float, groups: int = 1) -> Tensor:
    """``W + s B A``, which may take the memory of W: (out, in), or a kernel. B: (out, r), A: (groups r, fan_in)."""
    if not W.is_contiguous() and W.is_contiguous(memory_format=torch.channels_last):
        # Permute the small factor too, so that the product comes out in the kernel's own order.
        A = A.view(len(A), *W.shape[1:]).permute(0, 2, 3, 1).flatten(1)
        return effective_weight(W.permute(0, 2, 3, 1), A, B, scaling, groups).permute(0, 3, 1, 2)
    matrices, A, B = (t.flatten(1).unflatten(0, (groups, -1)) for t in (W, A, B))
    return matrices.baddbmm_(B, A, alpha=scaling).reshape(W.shape)  # in place: autocast would round others' operands


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., in) as (N, in) in this dtype."""
    return torch.atleast_2d(x.to(dtype)).flatten(0, -2)


def _add_update_(y: Tensor, h: Tensor, B: Tensor, scaling: float, groups: int) -> None:
    """``y += s h B^T``, in place. y: (N, out), h: (N, groups r), B: (out, r)."""
    width = y.shape[1] // groups
    if h.shape[1] > 0:  # in a layer of rank 0 adding nothing would read and write y as well
        for g, (h_g, B_g) in enumerate(zip(h.chunk(groups, 1), B.chunk(groups), strict=True)):
            # (N, r) -> (N, out / groups), in a slice, since torch.export lets no chunk be changed.
            y[:, g * width : (g + 1) * width].addmm_(h_g, B_g.T, alpha=scaling)


def _adapter_gradients(gy, rows, h, A, B, scaling, groups):
    """gh (N, groups r), gA (groups r, in) and gB (out, r). h is computed if it is None."""
    # The thin matrices lie transposed, with the long dimension contiguous: up to six times faster.
    h = backends.product(A, rows.T) if h is None else h.T.contiguous()  # (groups r, N)
    parts = list(zip(gy.chunk(groups, 1), h.chunk(groups), B.chunk(groups), strict=True))
    gh = stacked([backends.product(B_g.T.contiguous(), gy_g.T) for gy_g, _, B_g in parts]).mul_(scaling)  # (r, N) each
    gB = stacked([backends.product(h_g, gy_g).T for gy_g, h_g, _ in parts]).mul_(scaling)  # (out / groups, r) each
    return gh.T, backends.product(gh, rows), gB


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat` that does not copy a single tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, adapter_x, A, B, bias, constants):
        weight, scaling, groups, prologue, dtype = constants  # one argument, since each takes time
        ctx.shape = x.shape
        ctx.drops = adapter_x is not None
        read = [x]  # by the prologue or, without one, by the adapter
        if isinstance(prologue, RecomputedNorm):
            read = [t.detach() for t in prologue.summands]
            prologue = prologue.norm
        ctx.constants = (weight, scaling, groups, prologue, dtype)
        rows = _rows(_evaluate(prologue, x)[0], dtype)
        adapter_rows = _rows(adapter_x, dtype) if ctx.drops else rows
        A = A.to(dtype)
        B = B.to(dtype)
        if bias is not None:
            bias = bias.to(dtype)
        h = None
        if not ctx.drops and _merge_pays(weight, dtype, rows.shape[0] * weight.shape[0]):
            merged = effective_weight(weight.dense(dtype, copy=True), A, B, scaling, groups)  # W + s B A
            y = backends.linear(rows, merged, bias)  # x (W + s B A)^T + b
        else:
            h = backends.linear(adapter_rows, A)  # x A^T: (N, in) -> (N, groups r)
            y = weight.times(rows, bias)
            _add_update_(y, h, B, scaling, groups)  # x W^T + b + s (x A^T) B^T
        if prologue is None:
            read = [adapter_rows.view(x.shape)]
        ctx.save_for_backward(A, B, h, *read)  # h is thin
        return backends.unsafe_view(y, [*x.shape[:-1], y.shape[1]])  # no view: nn.ReLU(inplace=True) may modify it

    @staticmethod
    @backends.first_derivative
    def backward(ctx, gy):
        A, B, h, *summands = ctx.saved_tensors
        weight, scaling, groups, prologue, dtype = ctx.constants
        need_x, need_adapter_x, _, _, need_bias, _ = ctx.needs_input_grad
        x = summands[0] if len(summands) == 1 else torch.add(*summands)
        x = _rows(x, x.dtype)
        adapter_rows, statistics = _evaluate(prologue, x)
        gy = _rows(gy, dtype)  # (N, out)
        gh, gA, gB = _adapter_gradients(gy, _rows(adapter_rows, dtype), h, A, B, scaling, groups)
        del adapter_rows  # of the output's size or more, and no longer needed
        gx = g_adapter_x = g_bias = None
        if need_x:
            if not ctx.drops and _merge_pays(weight, dtype, gy.shape[0] * weight.shape[1]):
                merged = effective_weight(weight.dense(dtype, copy=True), A, B, scaling, groups)
                gx = backends.linear(gy, merged.T)  # gy (W + s B A)
            else:
                gx = weight.back(gy)  # gy W
                if not ctx.drops:  # else the adapter's share reaches x through the dropout
                    gx.addmm_(gh, A)  # + (s gy B) A
            gx = _pull_back(prologue, gx, x, statistics).view(ctx.shape)
        if need_adapter_x:
            g_adapter_x = (gh @ A).view(ctx.shape)
        if need_bias:
            g_bias = gy.sum(0)
        return gx, g_adapter_x, gA, gB, g_bias, None


class RecomputedNorm(NamedTuple):
    """A LayerNorm as a `prologue` whose input is a sum, which backward adds again: others save its summands anyway."""

    norm: nn.LayerNorm
    summands: tuple[Tensor, Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.norm(x)


def _evaluate(prologue: nn.LayerNorm | nn.GELU | None, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """``prologue(x)`` and what its derivative needs besides x: for a LayerNorm each row's mean and 1 / deviation."""
    if prologue is None:
        return x, []
    if isinstance(prologue, nn.GELU):
        return F.gelu(x, approximate=prologue.approximate), []
    if prologue.weight is not None:
        x = x.to(prologue.weight.dtype)
    y, *statistics = torch.native_layer_norm(x, prologue.normalized_shape, prologue.weight, prologue.bias, prologue.eps)
    return y, statistics


def _pull_back(prologue: nn.Module | None, gradient: Tensor, x: Tensor, statistics: list[Tensor]) -> Tensor:
    """The gradient of x from the one of ``prologue(x)``, (N, in), in the same memory if it fits."""
    if prologue is None:
        return gradient
    result = gradient if gradient.dtype == x.dtype else torch.empty_like(x)
    if isinstance(prologue, nn.GELU):
        return backends.gelu_gradient(gradient.to(x.dtype), x, approximate=prologue.approximate, grad_input=result)
    dtype = x.dtype if prologue.weight is None else prologue.weight.dtype
    size = max(len(x), 1)
    if x.device.type == "cpu":  # all rows at once would be the peak of a ViT's memory; on a GPU each part is kernels
        size = max(math.ceil(len(x) / MOST_PARTS), PART_NUMEL // max(x.shape[1], 1), 1)
    pieces = zip(*(t.split(size) for t in (result, gradient, x, *statistics)), strict=True)
    for of_result, of_gradient, of_x, mean, deviation in pieces:
        rows = (of_gradient.to(dtype), of_x.to(dtype), prologue.normalized_shape, mean, deviation)
        of_result.copy_(backends.layer_norm_gradient(*rows, prologue.weight, prologue.bias, [True, False, False])[0])
    return result


def lora_linear(
    x: Tensor,  # (..., in)
    weight: Weight,  # (out, in)
    A: Tensor,  # (groups * r, in)
    B: Tensor,  # (out, r)
    bias: Tensor | None = None,  # (out,)
    scaling: float = 1.0,
    groups: int = 1,  # how many layers on the same input the weight holds, one below the other
    adapter_x: Tensor | None = None,  # what the adapter sees in place of x: x after dropout
    prologue: nn.Module | RecomputedNorm | None = None,  # applied to x first; recomputed, not saved; excludes adapter_x
) -> Tensor:
    """``x (W + s B A)^T + b`` with exact gradients for x, A, B, b, and for W if it is not frozen, which is slower."""
    dtype = compute_dtype(x)
    trains = weight.requires_grad and torch.is_grad_enabled()
    # The compiler decides by itself what to recompute, pointwise operations first; it cannot trace how it is done here.
    if prologue is not None and (trains or backends.is_traced()):
        x = prologue(x)
        prologue = None
    if not trains:
        backends.refuse_jit()
        return _LoRALinear.apply(x, adapter_x, A, B, bias, (weight, scaling, groups, prologue, dtype))
    if adapter_x is None:
        adapter_x = x
    h = F.linear(adapter_x.to(dtype), A.to(dtype)).unflatten(-1, (groups, -1))  # (..., groups, r)
    B = B.to(dtype).unflatten(0, (groups, -1))
    return F.linear(x, weight.tensor, bias) + scaling * torch.einsum("...gr,gor->...go", h, B).flatten(-2)


def pad_for_conv2d(x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, tuple[int, int]]:
    """Pad x where `F.conv2d` cannot (circular, a lopsided 'same'). Returns x and the padding left to it, in numbers."""
    if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        return x, conv.padding  # as it is now: networks are made dilated by changing it
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    if conv.padding_mode == "zeros" and left == right and top == bottom:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom), conv.padding_mode.replace("zeros", "constant")), (0, 0)


class Geometry(NamedTuple):
    """What `torch.nn.functional.conv2d` takes after the bias, with the padding as `pad_for_conv2d` returns it."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


PLAIN = Geometry()


class _LoRAConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, adapter_x, A, B, bias, residual, row_scale, log_scale, constants):
        weight, scaling, geometry, relu, dtype = constants
        ctx.constants = constants
        ctx.follows = log_scale is not None
        ctx.drops = adapter_x is not None
        scale = None  # of the output, instead of a kernel that is larger than its input
        any_number = isinstance(x.numel(), torch.SymInt)  # as torch.export has it where the batch may be of any size
        if row_scale is not None and not any_number and math.prod(weight.shape) > x.numel():
            scale = row_scale
            row_scale = None
        ctx.side_path = ctx.drops or scale is not None or not _kernel_merges(weight, row_scale, dtype)
        x = x.to(dtype)
        adapter_x = adapter_x.to(dtype) if ctx.drops else x
        if bias is not None:
            bias = bias.to(dtype)
        ctx.factors = scaling  # s g, by which B's rows are multiplied: in float32 if g is
        if row_scale is not None:
            ctx.factors = (row_scale * scaling)[:, None]
        sB = B * ctx.factors
        if ctx.side_path:
            added = bias if scale is None else None
            y = F.conv2d(x, scaled_kernel(weight, row_scale, dtype), added, *geometry)  # g W x + b
            _add_conv_update_(y, adapter_x, A.to(dtype), sB.to(dtype), weight.shape, geometry)  # + s g B (A x)
            if scale is not None:
                y.mul_(scale[:, None, None])
                if bias is not None:
                    y.add_(bias[:, None, None])
            y = backends.added_and_rectified(y, residual, relu)
        else:
            y = backends.conv2d(x, _folded_kernel(weight, A, sB, row_scale, dtype), bias, geometry, residual, relu)
        if not ctx.follows:  # the derivative of log g alone reads these
            bias = residual = None
        kept = y if relu or ctx.follows else None
        # Backward builds the kernel again: saved, all layers' would be in memory at once.
        ctx.save_for_backward(adapter_x, A, sB, row_scale, scale, kept, bias, residual)
        return y

    @staticmethod
    @backends.first_derivative
    def backward(ctx, gy):
        adapter_x, A, sB, row_scale, scale, y, bias, residual = ctx.saved_tensors
        weight, _, geometry, relu, dtype = ctx.constants
        need_x, need_adapter_x, _, _, need_bias, need_residual, *_ = ctx.needs_input_grad
        gy = gy.to(dtype)
        if relu:
            gy = backends.relu_gradient(gy, y, 0)
        g_bias = g_log_scale = None
        if ctx.follows:  # where gy is not 0, y is g conv + bias + residual
            g_log_scale, g_bias = backends.channel_sums(gy, y)
            g_log_scale = g_log_scale.addcmul_(bias, g_bias, value=-1)
            if residual is not None:
                g_log_scale = g_log_scale - backends.channel_sums(gy, residual)[0]
        elif need_bias:
            g_bias = gy.sum((0, 2, 3))
        g_residual = gy if need_residual else None
        if scale is not None:
            gy = (gy * scale[:, None, None]).to(dtype)
        needed = need_adapter_x or (need_x and ctx.side_path and not ctx.drops)
        gA, gB, g_adapter_x = _conv_gradients(gy, adapter_x, A.to(dtype), sB.to(dtype), weight.shape, geometry, needed)
        gx = None
        if need_x:
            if ctx.side_path:
                kernel = scaled_kernel(weight, row_scale, dtype)
            else:
                kernel = _folded_kernel(weight, A, sB, row_scale, dtype)
            gx = backends.conv2d_gradient(gy, adapter_x, kernel, geometry, of_weight=False)
            if g_adapter_x is not None and not ctx.drops:
                gx = gx.add_(g_adapter_x)
                g_adapter_x = None
        return gx, g_adapter_x, gA, gB * ctx.factors, g_bias, g_residual, None, g_log_scale, None


def _kernel_merges(weight: Weight, row_scale: Tensor | None, dtype: torch.dtype) -> bool:
    """May ``g (W + s B A)`` be rounded to ``dtype`` as one? Only if rounding W alone would change W as well."""
    # Small updates then survive on average, as in full fine-tuning; a weight on the grid of 16 bits would swallow them.
    return dtype not in LOW_PRECISION or weight.dtype not in LOW_PRECISION or row_scale is not None


def scaled_kernel(weight: Weight, row_scale: Tensor | None, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """``g W``, rounded once to ``dtype``: W itself if that is the same and need be no copy, else a temporary."""
    if row_scale is None:
        return weight.dense(dtype, copy)
    precise = torch.promote_types(dtype, torch.float32)
    return (weight.dense(weight.dtype) * row_scale.to(precise)[:, None, None, None]).to(dtype)  # 16 bits widen in it


def _folded_kernel(weight: Weight, A: Tensor, sB: Tensor, row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``g W + (s g B) A``, rounded once to ``dtype``; sB is s g B."""
    precise = torch.promote_types(dtype, torch.float32)
    W = scaled_kernel(weight, row_scale, precise, copy=True)
    return effective_weight(W, A.to(precise), sB.to(precise), 1.0).to(dtype)


def _add_conv_update_(y: Tensor, adapter_x: Tensor, A: Tensor, sB: Tensor, shape: torch.Size, geometry: Geometry):
    """``y += conv2d(adapter_x, sB A)``, in place: through r channels, or in groups with the kernel of this shape."""
    if geometry.groups > 1:
        y.add_(F.conv2d(adapter_x, (sB @ A).view(shape), None, *geometry))
        return
    h = F.conv2d(adapter_x, A.view(len(A), *shape[1:]), None, *geometry)  # (N, r, H', W')
    pixels = backends.pixels(y)
    if pixels is None:
        y.flatten(2).baddbmm_(sB.expand(len(y), -1, -1), h.flatten(2))
    else:
        pixels.addmm_(h.permute(0, 2, 3, 1).flatten(0, 2), sB.T)


def _conv_gradients(gy, adapter_x, A, sB, shape, geometry, need_input):
    """The gradients of A, of sB and, if needed, of the adapter's input."""
    if geometry.groups > 1:  # the dense gradient is smaller than groups * r channels, through which the others go
        kernel = (sB @ A).view(shape)
        gh = gy
        dense = backends.conv2d_gradient(gy, adapter_x, kernel, geometry, of_weight=True).flatten(1)  # (out, fan_in)
        gA = sB.T @ dense
        gB = dense @ A.T
    else:
        kernel = A.view(len(A), *shape[1:])
        gh = _pointwise(gy, sB.T)  # (N, out, H', W') -> (N, r, H', W')
        if shape[2:] == (1, 1) and geometry[:2] == PLAIN[:2]:
            gA = _pointwise_gradient(gh, adapter_x)
            h = _pointwise(adapter_x, A)
        else:
            gA = backends.conv2d_gradient(gh, adapter_x, kernel, geometry, of_weight=True).flatten(1)
            h = F.conv2d(adapter_x, kernel, None, *geometry)  # (N, in, H, W) -> (N, r, H', W')
        gB = _pointwise_gradient(h, gy).T
    if not need_input:
        return gA, gB, None
    return gA, gB, backends.conv2d_gradient(gh, adapter_x, kernel, geometry, of_weight=False)


def _pointwise(x: Tensor, matrix: Tensor) -> Tensor:
    """``conv2d(x, matrix)`` of a 1x1 kernel, over pixels up to twice as fast. x: (N, in, H, W), matrix: (out, in)."""
    pixels = backends.pixels(x)
    if pixels is None:
        return F.conv2d(x, matrix[:, :, None, None])
    return backends.linear(pixels, matrix).view(len(x), *x.shape[2:], len(matrix)).permute(0, 3, 1, 2)


def _pointwise_gradient(gh: Tensor, x: Tensor) -> Tensor:
    """The kernel's gradient (r, in) from the output's, (N, r, H, W), and the input, (N, in, H, W)."""
    gradients = backends.pixels(gh)
    pixels = backends.pixels(x)
    if gradients is None or pixels is None:
        matrix = x.new_empty(gh.shape[1], x.shape[1], 1, 1)  # only its shape is looked at
        return backends.conv2d_gradient(gh, x, matrix, PLAIN, of_weight=True).flatten(1)
    return backends.product(gradients.T, pixels)


def lora_conv2d(
    x: Tensor,  # (N, in, H, W), in any memory format
    weight: Weight,  # (out, in / groups, kh, kw)
    A: Tensor,  # (r, in / groups * kh * kw)
    B: Tensor,  # (out, r)
    bias: Tensor | None = None,  # (out,), added as it is: g does not scale it
    scaling: float = 1.0,
    geometry: Geometry = PLAIN,
    row_scale: Tensor | None = None,  # g, (out,), constant: the scale of a frozen BatchNorm behind the convolution
    adapter_x: Tensor | None = None,  # what the adapter sees in place of x: x after dropout
    residual: Tensor | None = None,  # (N, out, H', W')
    relu: bool = False,
    log_scale: Tensor | None = None,  # (out,), log |g| but for a constant: takes the gradient of g if it has one
) -> Tensor:
    """``relu(conv2d(x, g (W + s B A), b) + residual)`` with exact gradients; of W, if it trains, by autograd."""
    dtype = compute_dtype(x)
    if not weight.requires_grad or not torch.is_grad_enabled():
        backends.refuse_jit()
        constants = (weight, scaling, geometry, relu, dtype)
        return _LoRAConv2d.apply(x, adapter_x, A, B, bias, residual, row_scale, log_scale, constants)
    if log_scale is not None:  # its gradient, for automatic differentiation
        row_scale = row_scale * (log_scale - log_scale.detach()).exp()
    sB = scaling * B
    if row_scale is not None:
        sB = row_scale[:, None] * sB
    if adapter_x is None and dtype not in LOW_PRECISION:
        y = F.conv2d(x, _folded_kernel(weight, A, sB, row_scale, dtype), bias, *geometry)
    else:
        if adapter_x is None:
            adapter_x = x
        delta = effective_weight(torch.zeros_like(weight.tensor, dtype=A.dtype), A, sB, 1.0).to(dtype)
        y = F.conv2d(x, scaled_kernel(weight, row_scale, weight.dtype), bias, *geometry)
        y = y + F.conv2d(adapter_x.to(dtype), delta, None, *geometry)
    return backends.added_and_rectified(y, residual, relu)


class _MaxPool2dReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, options):
        ctx.options = options
        ctx.shape = x.shape
        y, indices = backends.max_pool2d(x, *options)
        y.relu_()
        ctx.save_for_backward(y, indices.to(torch.int32))  # enough for positions in a channel; PyTorch uses 64 bits
        return y

    @staticmethod
    @backends.first_derivative
    def backward(ctx, gy):
        y, indices = ctx.saved_tensors
        gy = backends.relu_gradient(gy, y, 0)
        x = y.new_empty(ctx.shape)  # only its shape and its memory format are looked at
        if y.is_contiguous(memory_format=torch.channels_last):
            x = torch.empty_like(x, memory_format=torch.channels_last)
        return backends.max_pool2d_gradient(gy, x, *ctx.options, indices.long()), None


def max_pool2d_relu(x: Tensor, kernel_size, stride, padding=0, dilation=1, ceil_mode: bool = False) -> Tensor:
    """``max_pool2d(relu(x))`` as ``relu(max_pool2d(x))``, the same bit for bit, ReLU being monotonic: less to save."""
    if backends.is_traced():  # Inductor gave a ResNet's stem in bfloat16 no gradient in this order (2.13, on a CPU)
        return F.max_pool2d(F.relu(x), kernel_size, stride, padding, dilation, ceil_mode)
    return _MaxPool2dReLU.apply(x, (kernel_size, stride, padding, dilation, ceil_mode))
