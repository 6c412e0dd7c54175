"""Tensor functions under the LoRA layers: exact low-rank forward and backward.

Training a layer whose weight W is frozen needs one product forward and one for the input gradient. Automatic
differentiation of ``W x + s B (A x)`` spends much of what that saves on extra passes over activations. The two
`torch.autograd.Function`s below write the gradients of LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3) out by hand, with
``h = x A^T``, ``gy`` the output's gradient and ``s`` the scaling:

    y  = x (W + s B A)^T + b        gh = s gy B         (rows x r)
    gx = gy (W + s B A)             gA = gh^T x         (r x in)
                                    gB = s gy^T h       (out x r)

The dense weight gradient is never formed, and nothing of the output's size is allocated but the output. Backward
needs the layer's input, which full fine-tuning saves as well.

There are two ways to y and gx:
- *merged*: one product with ``W + s B A``, which is built for the call and not kept;
- *side path*: a product with W, then ``s h B^T`` accumulated in place.
Dropout acts on the adapter's share alone, so it always takes the side path. Otherwise `_merge_pays` chooses for linear
layers: by size in full precision; in low precision always the side path, which costs less there than building the
weight in float32 and rounding it. A convolution's kernel is small beside its input, so it is merged in low precision
too: it is built in float32 and rounded once, see `_kernel_merges`.

Second derivatives are not defined, and backward refuses a graph of its own (`backends.first_derivative`).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import backends, int8
from lora.attention import SelfAttention
from lora.backends import LOW_PRECISION, compute_dtype
from lora.int8 import Int8Weight
from lora.nf4 import NF4Weight, dense_weight

# The gradient through a recomputed LayerNorm is computed in at most PARTS parts, of PART_NUMEL numbers or more.
PARTS = 8
PART_NUMEL = 2**17


def _is_trainable(weight: Tensor | NF4Weight) -> bool:
    return isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled()


def _merge_pays(weight: Tensor | Int8Weight, output_numel: int) -> bool:
    """Merged or side path? In full precision whichever passes over fewer elements; in 16 and 8 bits never merged."""
    any_number = isinstance(output_numel, torch.SymInt)  # as torch.export has it where the batch may be of any size
    floats = isinstance(weight, Tensor) and weight.dtype not in LOW_PRECISION
    return floats and (any_number or weight.numel() <= output_numel)


# ---------------------------------------------------------------------------------------------------------- linear


def frozen_linear(x: Tensor, W: Tensor | Int8Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` of a stock layer that does not train, by the fastest product where no gradient is needed.

    Args:
        x: (..., in).
        W: (out, in).
    """
    if isinstance(W, Int8Weight):  # an adapter of rank 0
        return lora_linear(x, W, x.new_empty(0, x.shape[-1]), x.new_empty(W.shape[0], 0), bias)
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, W, bias))
    if needs_gradient or compute_dtype(x) != x.dtype or x.dim() == 1:
        return F.linear(x, W, bias)
    return backends.linear(x.flatten(0, -2), W, bias).view(*x.shape[:-1], W.shape[0])


def effective_weight(
    weight: Tensor, A: Tensor, B: Tensor, scaling: float, groups: int = 1, in_place: bool = False
) -> Tensor:
    """``W + s B A``, differentiable, as a fresh tensor.

    Args:
        weight: (out, in). With ``groups`` > 1 its rows are that many layers on one input: attention's packed q, k, v.
        A: (groups * r, in).
        B: (out, r).
        in_place: add to ``weight``, which then has to be a temporary.
    """
    W, A, B = (t.unflatten(0, (groups, -1)) for t in (weight, A, B))
    W = W if in_place else W.clone()  # autocast would round the operands of a product that is not in place
    return W.baddbmm_(B, A, alpha=scaling).flatten(0, 1)


def merged_weight(
    weight: Tensor | NF4Weight | Int8Weight, A: Tensor, B: Tensor, scaling: float, groups: int = 1
) -> Tensor:
    """The weight after merging: `effective_weight` in the adapter's precision, rounded once to the weight's.

    A small update would vanish if it were added in bfloat16. A weight in 4 or 8 bits becomes a float one.
    """
    return _rounded(effective_weight(dense_weight(weight, B.dtype), A, B, scaling, groups), weight)


def _rounded(merged: Tensor, base: Tensor | NF4Weight) -> Tensor:
    return merged.to(base.dtype) if isinstance(base, Tensor) else merged


def _operand(weight: Tensor | NF4Weight | Int8Weight, dtype: torch.dtype) -> Tensor | Int8Weight:
    """The weight as products take it: on a CPU in 8 bits as it is, else dense in ``dtype``."""
    in_8_bits = isinstance(weight, Int8Weight) and weight.codes.device.type == "cpu"
    return weight if in_8_bits else dense_weight(weight, dtype)


def adapted_product(
    rows: Tensor,
    weight: Tensor | NF4Weight | Int8Weight,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    scaling: float,
    groups: int = 1,
    adapter_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``rows (W + s B A)^T + b``, (N, out), and h, (N, groups r), if it was needed. No gradient of its own.

    Args:
        rows: (N, in), in the dtype of A, B and b.
        weight: (out, in), of any dtype.
        adapter_rows: what the adapter sees in place of rows.
    """
    W = _operand(weight, rows.dtype)
    if adapter_rows is None:
        if _merge_pays(W, rows.shape[0] * W.shape[0]):
            merged = effective_weight(W, A, B, scaling, groups, in_place=W is not weight)  # W + s B A
            return backends.linear(rows, merged, bias), None
        adapter_rows = rows
    h = backends.linear(adapter_rows, A)  # (N, in) -> (N, groups r)
    return add_side_path(rows, W, bias, h, B, scaling, groups), h


def adapted_input_gradient(
    gy: Tensor,
    gh: Tensor,
    weight: Tensor | NF4Weight | Int8Weight,
    A: Tensor,
    B: Tensor,
    scaling: float,
    groups: int = 1,
) -> Tensor:
    """``gy (W + s B A)``, (N, in); gh (N, groups r) is s gy B."""
    W = _operand(weight, gy.dtype)
    if _merge_pays(W, gy.shape[0] * W.shape[1]):
        merged = effective_weight(W, A, B, scaling, groups, in_place=W is not weight)
        return backends.linear(gy, merged.T)
    return int8.input_gradient(gy, W).addmm_(gh, A)  # (N, out) -> (N, in)


def add_side_path(
    rows: Tensor, W: Tensor | Int8Weight, bias: Tensor | None, h: Tensor, B: Tensor, scaling: float, groups: int
) -> Tensor:
    """``rows W^T + b + s h B^T``, (N, out).

    Args:
        rows: (N, in).
        W: (out, in), the weights of ``groups`` layers stacked by rows.
        h: (N, groups r).
        B: (out, r).
    """
    y = int8.linear(rows, W, bias)
    if h.shape[1] == 0:  # a layer of rank 0: adding nothing would read and write y as well
        return y
    width = W.shape[0] // groups
    for g, (h_g, B_g) in enumerate(zip(h.chunk(groups, 1), B.chunk(groups), strict=True)):
        # (N, r) -> (N, out / groups), in place: in a slice, as torch.export lets no chunk be changed.
        y[:, g * width : (g + 1) * width].addmm_(h_g, B_g.T, alpha=scaling)
    return y


def adapter_gradients(
    gy: Tensor, rows: Tensor, h: Tensor | None, A: Tensor, B: Tensor, scaling: float, groups: int, need_A, need_B
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute gh (N, groups r) and, where needed, gA (groups r, in) and gB (out, r). h is computed if it is None."""
    # The thin matrices lie transposed, with the long dimension contiguous: up to six times faster.
    gy_groups = gy.chunk(groups, 1)
    pairs = zip(B.chunk(groups), gy_groups, strict=True)
    gh = [backends.product(B_g.T.contiguous(), gy_g.T) for B_g, gy_g in pairs]
    gh = _stacked(gh).mul_(scaling)  # (groups r, N)
    gA = backends.product(gh, rows) if need_A else None
    gB = None
    if need_B:
        h = backends.product(A, rows.T) if h is None else h.T.contiguous()  # (groups r, N)
        pairs = zip(h.chunk(groups), gy_groups, strict=True)
        gB = [backends.product(h_g, gy_g).T for h_g, gy_g in pairs]
        gB = _stacked(gB).mul_(scaling)
    return gh.T, gA, gB


def _stacked(parts: Tensor | Sequence[Tensor]) -> Tensor:
    """`torch.cat` that does not copy a single tensor."""
    if isinstance(parts, Tensor):
        return parts
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, adapter_x, A, B, bias, settings):  # each argument of `apply` takes time: the constants are one
        weight, scaling, groups, prologue, dtype = settings
        ctx.rebuild, parts = None, ()
        if isinstance(prologue, RecomputedNorm):
            prologue, ctx.rebuild, parts = prologue
            parts = [part.detach() for part in parts]
        rows = x if prologue is None else _evaluate(prologue, x)[0]
        rows = rows.to(dtype).flatten(0, -2)  # (..., in) -> (N, in)
        adapter_rows = rows if adapter_x is None else adapter_x.to(dtype).flatten(0, -2)  # what the adapter sees
        ctx.weight = weight
        ctx.scaling = scaling
        ctx.groups = groups
        ctx.dtype = dtype
        ctx.prologue = prologue
        ctx.shape = x.shape
        ctx.has_adapter_x = adapter_x is not None

        if A.dtype != dtype or B.dtype != dtype:  # a call that changes nothing takes time as well
            A = A.to(dtype)
            B = B.to(dtype)
        bias = bias if bias is None or bias.dtype == dtype else bias.to(dtype)
        seen = None if adapter_x is None else adapter_rows
        y, h = adapted_product(rows, weight, A, B, bias, scaling, groups, seen)
        # W is frozen, so that only the adapter's gradients need the input. h is thin and is saved if it was computed.
        kept = x if prologue is not None else adapter_rows.view(x.shape)
        ctx.save_for_backward(kept if ctx.rebuild is None else None, A, B, h, *parts)
        # Like F.linear's output this is no view, which nn.ReLU(inplace=True) could not modify.
        return backends.unsafe_view(y, [*x.shape[:-1], y.shape[1]])

    @staticmethod
    @backends.first_derivative
    def backward(ctx, gy):
        saved, A, B, h, *parts = ctx.saved_tensors
        need_x, need_adapter_x, need_A, need_B, need_bias, _ = ctx.needs_input_grad
        if ctx.rebuild is not None:
            saved = ctx.rebuild(*parts)
        gy = (gy if gy.dtype == ctx.dtype else gy.to(ctx.dtype)).flatten(0, -2)  # (N, out)
        saved, adapter_rows, statistics = _rows_of_the_adapter(ctx, saved)
        gh, gA, gB = adapter_gradients(gy, adapter_rows, h, A, B, ctx.scaling, ctx.groups, need_A, need_B)
        del adapter_rows  # of the output's size or more, and no longer needed
        gx = None
        if need_x:
            if ctx.has_adapter_x:  # the adapter's share reaches x through the dropout
                gx = int8.input_gradient(gy, _operand(ctx.weight, ctx.dtype))
            else:
                gx = adapted_input_gradient(gy, gh, ctx.weight, A, B, ctx.scaling, ctx.groups)
            gx = pull_back(ctx.prologue, gx, saved, statistics).view(ctx.shape)
        return (
            gx,
            (gh @ A).view(ctx.shape) if need_adapter_x else None,
            gA,
            gB,
            gy.sum(0) if need_bias else None,
            None,
        )


def _rows_of_the_adapter(ctx, saved: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """In backward: the saved input, the rows (N, in) that the adapter read, and what `pull_back` needs beside them."""
    if not isinstance(ctx.prologue, SelfAttention):  # which does not work row by row
        saved = saved.flatten(0, -2)
    if ctx.prologue is None:
        return saved, saved, []
    rows, statistics = _evaluate(ctx.prologue, saved, in_backward=True)
    return saved, rows.to(ctx.dtype).flatten(0, -2), statistics


class RecomputedNorm(NamedTuple):
    """A LayerNorm as the `prologue` of a layer, whose input is computed again in backward instead of saved.

    ``rebuild(*parts)`` is that input, to the last bit. The parts are saved, so it pays where others save them anyway.
    """

    norm: nn.LayerNorm
    rebuild: Callable[..., Tensor]
    parts: tuple[Tensor, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return self.norm(x)


def _evaluate(
    prologue: nn.LayerNorm | nn.GELU | SelfAttention, x: Tensor, in_backward: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """``prologue(x)`` and what its derivative needs beside x.

    A LayerNorm needs each row's mean and reciprocal deviation. Attention needs input and output of a graph of its own,
    which is built in backward alone: from the forward pass on it would hold memory.
    """
    if isinstance(prologue, nn.GELU):
        return F.gelu(x, approximate=prologue.approximate), []
    if isinstance(prologue, SelfAttention):
        graph = prologue.graph(x) if in_backward else (x, prologue(x))
        return graph[1].detach(), list(graph)
    x = x if prologue.weight is None else x.to(prologue.weight.dtype)
    y, *statistics = backends.layer_norm(x, prologue)
    return y, statistics


def pull_back(
    prologue: nn.LayerNorm | nn.GELU | SelfAttention | None, gradient: Tensor, x: Tensor, statistics: list[Tensor]
) -> Tensor:
    """The gradient of x from that of ``prologue(x)``, (N, in), in the same memory if it fits.

    A LayerNorm takes some of the rows at a time: all at once would be the peak of a ViT's memory.
    """
    if prologue is None:
        return gradient
    if isinstance(prologue, SelfAttention):
        qkv, attended = statistics
        return torch.autograd.grad(attended, qkv, gradient.to(x.dtype).view_as(attended))[0]
    if isinstance(prologue, nn.GELU):
        result = gradient if gradient.dtype == x.dtype else torch.empty_like(x)
        return backends.gelu_gradient(gradient.to(x.dtype), x, prologue.approximate, out=result)
    result = gradient if gradient.dtype == x.dtype else torch.empty_like(x)
    size = max(math.ceil(len(x) / PARTS), PART_NUMEL // max(x.shape[1], 1), 1)
    for part, *in_part in zip(*(t.split(size) for t in (result, gradient, x, *statistics)), strict=True):
        part.copy_(_pull_back_norm(prologue, *in_part))
    return result


def _pull_back_norm(norm: nn.LayerNorm, gradient: Tensor, x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    dtype = x.dtype if norm.weight is None else norm.weight.dtype
    return backends.layer_norm_gradient(gradient.to(dtype), x.to(dtype), norm, mean, deviation)


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight | Int8Weight,
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    scaling: float = 1.0,
    groups: int = 1,
    adapter_x: Tensor | None = None,
    prologue: nn.LayerNorm | nn.GELU | SelfAttention | RecomputedNorm | None = None,
) -> Tensor:
    """``x (W + s B A)^T + b`` with exact gradients for x, A, B and b.

    Args:
        x: (..., in).
        weight: (out, in), frozen in the fast path. One that requires a gradient gets it, by automatic differentiation.
        A: (groups * r, in), or the A of each layer.
        B: (out, r), or likewise.
        bias: (out,).
        groups: how many layers on the same input ``weight`` holds, one below the other.
        adapter_x: what the adapter sees in place of x, (..., in): x after dropout.
        prologue: a LayerNorm over the last dimension, GELU or attention, to apply first. Its output is not saved but
            recomputed; x is then what it takes.

    Raises:
        ValueError: both adapter_x and prologue are given. Dropout would need the output that is not saved.
    """
    if adapter_x is not None and prologue is not None:
        raise ValueError("adapter_x and prologue exclude each other: apply the operation first")
    dtype = compute_dtype(x)
    A = _stacked(A)
    B = _stacked(B)
    # The compiler decides by itself what to recompute, pointwise operations first; it cannot trace how it is done here.
    if prologue is not None and (_is_trainable(weight) or backends.is_traced()):
        x = prologue(x)
        prologue = None
    if _is_trainable(weight):
        if adapter_x is None and dtype not in LOW_PRECISION:
            return F.linear(x, effective_weight(weight, A, B, scaling, groups), bias)
        h = F.linear((x if adapter_x is None else adapter_x).to(dtype), A.to(dtype))  # (..., groups r)
        h = h.unflatten(-1, (groups, -1))
        B = B.to(dtype).unflatten(0, (groups, -1))
        delta = torch.einsum("...gr,gor->...go", h, B).flatten(-2)  # (..., out)
        return F.linear(x, weight, bias) + scaling * delta
    if x.dim() == 1:
        adapter_x = None if adapter_x is None else adapter_x[None]
        return lora_linear(x[None], weight, A, B, bias, scaling, groups, adapter_x, prologue)[0]
    backends.refuse_jit()
    return _LoRALinear.apply(x, adapter_x, A, B, bias, (weight, scaling, groups, prologue, dtype))


# ----------------------------------------------------------------------------------------------------- convolution


def effective_kernel(
    weight: Tensor, A: Tensor, B: Tensor, scaling: float, row_scale: Tensor | None = None, in_place: bool = False
) -> Tensor:
    """``g (W + s B A)`` for a convolution, differentiable, as a fresh tensor in the memory format of ``weight``.

    Args:
        weight: (out, in / groups, kh, kw).
        A: (r, in / groups * kh * kw).
        B: (out, r).
        row_scale: g, (out,): the scale of a BatchNorm folded into the kernel.
        in_place: add to ``weight``, a temporary that nobody else needs.
    """
    if row_scale is not None:
        scale = row_scale[:, None, None, None]
        weight = weight.mul_(scale) if in_place else weight * scale
        B = B * row_scale[:, None]
        in_place = True
    return _plus_low_rank(weight, A, B, scaling, in_place)


def _plus_low_rank(weight: Tensor, A: Tensor, B: Tensor, scaling: float, in_place: bool) -> Tensor:
    channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    if channels_last:  # permute the small factor, so that the product comes out in the kernel's own order
        W = weight.permute(0, 2, 3, 1).flatten(1)  # a view
        A = A.view(len(A), *weight.shape[1:]).permute(0, 2, 3, 1).flatten(1)
    else:
        W = weight.flatten(1)
    W = (W if in_place else W.clone()).addmm_(B, A, alpha=scaling)  # in place, as in `effective_weight`
    if channels_last:
        out, channels, kh, kw = weight.shape
        return W.view(out, kh, kw, channels).permute(0, 3, 1, 2)
    return W.view(weight.shape)


def merged_kernel(weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """As `merged_weight`, for the kernel of a convolution."""
    return _rounded(effective_kernel(dense_weight(weight, B.dtype), A, B, scaling), weight)


def pad_for_conv2d(
    x: Tensor, padding: str | tuple[int, int], mode: str, explicit: Sequence[int]
) -> tuple[Tensor, tuple[int, int]]:
    """Pad x where `conv2d` cannot (circular, a lopsided 'same'). Returns x and the padding left to it, in numbers.

    Args:
        padding, mode: `padding` and `padding_mode` of `nn.Conv2d`.
        explicit: the same padding as (left, right, top, bottom).
    """
    if mode == "zeros" and not isinstance(padding, str):
        return x, padding
    left, right, top, bottom = explicit
    if mode == "zeros" and left == right and top == bottom:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom), mode="constant" if mode == "zeros" else mode), (0, 0)


class Geometry(NamedTuple):
    """What `torch.nn.functional.conv2d` takes after the bias, with the padding as `pad_for_conv2d` returns it."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


PLAIN = Geometry()


class _LoRAConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, adapter_x, A, B, bias, residual, log_scale, settings):
        weight, row_scale, scaling, geometry, relu, dtype = settings
        x = x.to(dtype)
        ctx.has_adapter_x = adapter_x is not None
        adapter_x = adapter_x.to(dtype) if ctx.has_adapter_x else x
        ctx.weight = weight
        ctx.scaling = scaling
        ctx.geometry = geometry
        ctx.dtype = dtype
        ctx.side_path = ctx.has_adapter_x or not _kernel_merges(weight, row_scale, dtype)

        bias = None if bias is None else bias.to(dtype)
        given, A = (A, B), A.to(dtype)
        row_scales = _scaled(row_scale, scaling)  # s g
        row_B = _scale_rows(B, scaling, row_scales)
        sB = row_B.to(dtype)
        kernel = None
        if not ctx.side_path:
            kernel = _folded_kernel(weight, given[0], row_B, row_scale, dtype)
            y = backends.conv2d(x, kernel, bias, geometry, residual, relu)
        else:
            y = F.conv2d(x, _scaled_kernel(weight, row_scale, dtype), bias, *geometry)
            if geometry.groups > 1:
                y.add_(F.conv2d(adapter_x, (sB @ A).view(weight.shape), None, *geometry))
            else:
                h = F.conv2d(adapter_x, A.view(len(A), *weight.shape[1:]), None, *geometry)  # (N, r, H', W')
                _add_pointwise_(y, h, sB)
            y = y if residual is None else y.add_(residual)
            y = y.relu_() if relu else y
        # Backward builds the kernel again: saved, those of all layers would be in memory at once.
        ctx.relu = relu
        ctx.follows = log_scale is not None
        followed = (bias, residual) if ctx.follows else ()
        kept = y if relu or ctx.follows else None, row_scale, *given, *followed
        ctx.save_for_backward(adapter_x, *kept)
        return y

    @staticmethod
    @backends.first_derivative
    def backward(ctx, gy):
        adapter_x, y, row_scale, precise_A, B, *followed = ctx.saved_tensors
        need_x, need_adapter_x, _, _, need_bias, need_residual, *_ = ctx.needs_input_grad
        gy = gy.to(ctx.dtype)
        gy = backends.relu_gradient(gy, y) if ctx.relu else gy  # through the ReLU
        g_bias = None
        g_log_scale = None
        if ctx.follows:
            g_log_scale, g_bias = _scale_gradients(gy, y, *followed)
        elif need_bias:
            g_bias = gy.sum((0, 2, 3))
        row_scales = _scaled(row_scale, ctx.scaling)
        row_B = _scale_rows(B, ctx.scaling, row_scales)
        A = precise_A.to(ctx.dtype)
        sB = row_B.to(ctx.dtype)
        adapter_gradients = _adapter_gradients if ctx.geometry.groups == 1 else _grouped_adapter_gradients
        need_input = need_adapter_x or (need_x and ctx.side_path and not ctx.has_adapter_x)
        gA, gB, g_adapter_x = adapter_gradients(gy, adapter_x, A, sB, ctx.weight.shape, ctx.geometry, need_input)
        gx = None
        if need_x:
            if ctx.side_path:
                kernel = _scaled_kernel(ctx.weight, row_scale, ctx.dtype)
            else:
                kernel = _folded_kernel(ctx.weight, precise_A, row_B, row_scale, ctx.dtype)
            gx = backends.conv2d_gradient(gy, adapter_x, kernel, ctx.geometry, of_weight=False)
            if g_adapter_x is not None and not ctx.has_adapter_x:
                gx = gx.add_(g_adapter_x)
                g_adapter_x = None
        gB = _scale_rows(gB, ctx.scaling, row_scales)
        return gx, g_adapter_x, gA, gB, g_bias, gy if need_residual else None, g_log_scale, None


def _scale_gradients(gy: Tensor, y: Tensor, bias: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of log g and of the bias, (out,), of ``y = g conv + bias + residual``, where gy is not 0."""
    of_scale, of_bias = backends.channel_sums(gy, y)
    of_scale = of_scale.addcmul_(bias, of_bias, value=-1)
    return of_scale if residual is None else of_scale - backends.channel_sums(gy, residual)[0], of_bias


def _kernel_merges(weight: Tensor | NF4Weight, row_scale: Tensor | None, dtype: torch.dtype) -> bool:
    """May ``g (W + s B A)`` be rounded to ``dtype`` as one? Only if rounding W alone would change W as well.

    Rounded with numbers that lie anywhere between the grid's points, small updates survive on average, as they do when
    full fine-tuning rounds its float32 weights in each step. A weight on the grid would swallow them.
    """
    on_the_grid = isinstance(weight, Tensor) and weight.dtype in LOW_PRECISION and row_scale is None
    return dtype not in LOW_PRECISION or not on_the_grid


def _adapter_gradients(gy, adapter_x, A, sB, kernel_shape, geometry, need_input):
    """The gradients of A, of sB and, if needed, of the adapter's input. All of them go through r channels."""
    is_pointwise = kernel_shape[2:] == (1, 1) and geometry[:2] == PLAIN[:2]
    A4 = A.view(len(A), *kernel_shape[1:])
    gh = _pointwise(gy, sB.T)  # (N, out, H', W') -> (N, r, H', W')
    if is_pointwise:
        gA = _pointwise_gradient(gh, adapter_x)
        h = _pointwise(adapter_x, A)
    else:
        gA = backends.conv2d_gradient(gh, adapter_x, A4, geometry, of_weight=True).flatten(1)
        h = F.conv2d(adapter_x, A4, None, *geometry)  # (N, in, H, W) -> (N, r, H', W')
    gB = _pointwise_gradient(h, gy).T
    g_adapter_x = backends.conv2d_gradient(gh, adapter_x, A4, geometry, of_weight=False) if need_input else None
    return gA, gB, g_adapter_x


def _grouped_adapter_gradients(gy, adapter_x, A, sB, kernel_shape, geometry, need_input):
    """`_adapter_gradients` for groups > 1, where h would have groups * r channels: the dense gradient is smaller."""
    delta = (sB @ A).view(kernel_shape)
    dense = backends.conv2d_gradient(gy, adapter_x, delta, geometry, of_weight=True).flatten(1)  # (out, fan_in)
    g_adapter_x = backends.conv2d_gradient(gy, adapter_x, delta, geometry, of_weight=False) if need_input else None
    return sB.T @ dense, dense @ A.T, g_adapter_x


# If the channels lie last, a thin 1x1 convolution is a matrix product over the pixels: up to twice as fast on a CPU.


def _pointwise(x: Tensor, matrix: Tensor) -> Tensor:
    """``conv2d(x, matrix)`` for a 1x1 kernel. x: (N, in, H, W), matrix: (out, in)."""
    if (pixels := backends.pixels(x)) is None:
        return F.conv2d(x, matrix[:, :, None, None])
    return backends.linear(pixels, matrix).view(len(x), *x.shape[2:], len(matrix)).permute(0, 3, 1, 2)


def _pointwise_gradient(gh: Tensor, x: Tensor) -> Tensor:
    """The kernel's gradient (r, in) from that of the output, (N, r, H, W), and the input, (N, in, H, W)."""
    gradients = backends.pixels(gh)
    pixels = backends.pixels(x)
    if gradients is None or pixels is None:
        matrix = x.new_empty(gh.shape[1], x.shape[1], 1, 1)  # only its shape is looked at
        return backends.conv2d_gradient(gh, x, matrix, PLAIN, of_weight=True).flatten(1)
    return backends.product(gradients.T, pixels)


def _scaled(row_scale: Tensor | None, scaling: float) -> Tensor | None:
    return row_scale if row_scale is None or scaling == 1 else row_scale * scaling


def _scale_rows(matrix: Tensor, scaling: float, row_scales: Tensor | None) -> Tensor:
    """``s g matrix``. The scales hold s already; if they are float32, so is the product of any matrix with them."""
    if row_scales is not None:
        return matrix * row_scales[:, None]
    return matrix if scaling == 1 else matrix * scaling


def _folded_kernel(
    weight: Tensor | NF4Weight, A: Tensor, row_B: Tensor, row_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``g W + (s g B) A``, rounded once to ``dtype``; `row_B` is s g B."""
    precise = torch.promote_types(dtype, torch.float32)
    if row_scale is not None and isinstance(weight, Tensor):
        W, in_place = weight * row_scale.to(precise)[:, None, None, None], True  # 16 bits times 32, in one pass
    else:
        W = dense_weight(weight, precise)
        in_place = W is not weight
        W = W if row_scale is None else W.mul_(row_scale[:, None, None, None])
    return _plus_low_rank(W, A.to(precise), row_B.to(precise), 1.0, in_place).to(dtype)


def _scaled_kernel(weight: Tensor | NF4Weight, row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if row_scale is None:
        return dense_weight(weight, dtype)
    precise = torch.promote_types(dtype, torch.float32)
    return (dense_weight(weight, precise) * row_scale[:, None, None, None]).to(dtype)


def _add_pointwise_(y: Tensor, h: Tensor, sB: Tensor) -> Tensor:
    """``y += conv2d(h, sB)`` for a 1x1 kernel, in place. y: (N, out, H, W); h: (N, r, H, W); sB: (out, r)."""
    if (pixels := backends.pixels(y)) is not None:
        pixels.addmm_(h.permute(0, 2, 3, 1).flatten(0, 2), sB.T)
    else:
        y.flatten(2).baddbmm_(sB.expand(len(y), -1, -1), h.flatten(2))
    return y


def lora_conv2d(
    x: Tensor,
    weight: Tensor | NF4Weight,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    geometry: Geometry = PLAIN,
    row_scale: Tensor | None = None,
    adapter_x: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    log_scale: Tensor | None = None,
) -> Tensor:
    """``relu(conv2d(x, g (W + s B A), b) + residual)`` with exact gradients for x, A, B, b and residual.

    Args:
        x: (N, in, H, W), in any memory format.
        weight: (out, in / groups, kh, kw), frozen in the fast path. One that requires a gradient gets it, by automatic
            differentiation.
        A: (r, in / groups * kh * kw).
        B: (out, r).
        bias: (out,), added as it is: g does not scale it.
        row_scale: g, (out,), constant: the scale of a frozen BatchNorm behind the convolution.
        adapter_x: what the adapter sees in place of x, of x's shape: x after dropout.
        residual: (N, out, H', W'), added to the output.
        relu: rectify the output, after the addition.
        log_scale: (out,), log |g| but for a constant: takes the gradient of a row_scale that is no constant.
    """
    dtype = compute_dtype(x)
    if not _is_trainable(weight):
        backends.refuse_jit()
        settings = weight, row_scale, scaling, geometry, relu, dtype
        return _LoRAConv2d.apply(x, adapter_x, A, B, bias, residual, log_scale, settings)
    if log_scale is not None:  # its gradient, for automatic differentiation
        row_scale = row_scale * (log_scale - log_scale.detach()).exp()
    if adapter_x is None and dtype not in LOW_PRECISION:
        y = F.conv2d(x, effective_kernel(weight, A, B, scaling, row_scale), bias, *geometry)
    else:
        delta = effective_kernel(torch.zeros_like(weight, dtype=A.dtype), A, B, scaling, row_scale).to(dtype)
        y = F.conv2d(x, _scaled_kernel(weight, row_scale, weight.dtype), bias, *geometry)
        y = y + F.conv2d((x if adapter_x is None else adapter_x).to(dtype), delta, None, *geometry)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


# --------------------------------------------------------------------------------------------------------- pooling


class _MaxPool2dReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel_size, stride, padding, dilation, ceil_mode):
        ctx.options = kernel_size, stride, padding, dilation, ceil_mode
        y, indices = backends.max_pool2d(x, ctx.options)
        y.relu_()
        # 32 bits hold the positions in a channel of an image, for which PyTorch uses 64.
        ctx.save_for_backward(y, indices.to(torch.int32))
        ctx.shape = x.shape
        return y

    @staticmethod
    @backends.first_derivative
    def backward(ctx, gy):
        y, indices = ctx.saved_tensors
        gy = backends.relu_gradient(gy, y)
        channels_last = y.is_contiguous(memory_format=torch.channels_last)
        x = torch.empty(  # only its shape and its memory format are looked at
            ctx.shape,
            dtype=y.dtype,
            device=y.device,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        )
        gx = backends.max_pool2d_gradient(gy, x, ctx.options, indices.long())
        return gx, *[None] * 5


def max_pool2d_relu(x: Tensor, kernel_size, stride, padding=0, dilation=1, ceil_mode: bool = False) -> Tensor:
    """``max_pool2d(relu(x))``, without keeping x or relu(x) for backward.

    ReLU is monotonic, so ``relu(max_pool2d(x))`` is the same bit for bit. It rectifies a fraction of the elements, and
    its backward needs only the output and the positions of the maxima. A compiler plans memory itself, and
    Inductor gave the stem of a ResNet in bfloat16 no gradient with this order (PyTorch 2.13, on a CPU).
    """
    if backends.is_traced():
        return F.max_pool2d(F.relu(x), kernel_size, stride, padding, dilation, ceil_mode)
    return _MaxPool2dReLU.apply(x, kernel_size, stride, padding, dilation, ceil_mode)
