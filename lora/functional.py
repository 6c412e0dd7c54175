"""Tensor functions under the LoRA layers: exact low-rank forward and backward, 4-bit storage, attention.

Training a layer whose weight W is frozen needs one product forward and one for the input gradient. Automatic
differentiation of ``W x + s B (A x)`` spends much of what that saves on extra passes over activations. The two
`torch.autograd.Function`s below write the gradients of LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3) out by hand, with
``h = x A^T``, ``gy`` the output's gradient and ``s`` the scaling:

    y  = x (W + s B A)^T + b        gh = s gy B         (rows x r)
    gx = gy (W + s B A)             gA = gh^T x         (r x in)
                                    gB = s gy^T h       (out x r)

The dense weight gradient is never formed, and nothing of the output's size is allocated but the output. What is saved
for backward is the layer's input, which full fine-tuning saves as well.

Two ways lead to y and gx. Dropout, which acts on the adapter's share alone, takes the second one:
- *merged*: one product with ``W + s B A``, which is built for the call and not kept;
- *side path*: a product with W, then ``s h B^T`` accumulated in place.
`_merge_pays` chooses for linear layers: by size in full precision; in low precision always the side path, which costs
less there than building the weight in float32 and rounding it. A convolution's kernel, small beside what it reads, is
merged, in low precision too: built in float32 and rounded once, see `_kernel_merges`.

Second derivatives are not defined, and backward refuses a graph of its own (`_first_derivative`).
"""

import contextlib
import copy
import functools
import logging
import math
import os
import platform
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel

LOW_PRECISION = (torch.bfloat16, torch.float16)
ALL_ROWS = slice(None)
# The gradient through a recomputed operation is computed in at most so many parts, each of at least so many numbers.
PARTS, PART_NUMEL = 8, 2**17


def _describe_cpu() -> str:
    """On Linux with the instructions that it knows."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            return file.read(4096)  # the first core
    return platform.processor()


CPU = _describe_cpu()
# What `torch.compile` calls on CPUs. PyTorch's eager mode reaches oneDNN's float32 product in no other way, and MKL,
# which it uses, keeps its fastest code for Intel's processors.
PREFERS_ONEDNN_LINEAR = (
    "AVX512" in torch.backends.cpu.get_cpu_capability()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and "AuthenticAMD" in CPU
)
# In which dtypes oneDNN's convolutions take an addition or a ReLU along on this CPU.
ONEDNN_DTYPES: tuple[torch.dtype, ...] = ()
if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
    ONEDNN_DTYPES = (torch.float32,)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        ONEDNN_DTYPES += (torch.bfloat16,)
# On a CPU with products in bfloat16 PyTorch's attention is made of many small ones, unless there is a matrix unit
# (AMX), for which it has a path of its own. `_Attention` is faster up to MOST_SCORES scores in a head, one for each
# query and key, and slower above.
PREFERS_BATCHED_ATTENTION = torch.bfloat16 in ONEDNN_DTYPES and "avx512_bf16" in CPU and "amx_" not in CPU
MOST_SCORES = 2**19
# `_Attention` computes some images, or some heads of one, at a time: about so many scores.
SCORES_AT_A_TIME = 2**19
# Attention's weights may be kept for backward if keys <= MOST_KEYS_KEPT * head width. They then take at most that many
# times the memory of q: 3.1 times in a ViT-B/16 at 224 pixels; at 384 it would be 9 times.
MOST_KEYS_KEPT = 4
# The ReLU of oneDNN turns NaN into 0, which would hide that training diverges. With a leak NaN stays NaN, and one of
# this size is zero beside any number that float32 adds it to. A smaller one would have products with gradients below
# float32's normal range, for which Intel's processors are slow: with 1e-30 they are a third of a ResNet-18's step. With
# 1e-15 Adam's squares of the gradients of channels that are rectified everywhere would be there.
LEAK = 1e-20


class NF4Weight:
    """A frozen weight in 4 bits: NF4 blocks of 64 with double quantisation (QLoRA, arXiv 2305.14314, section 3).

    Stored by bitsandbytes: two values a byte, one 8-bit scale per block and one float scale per 256 of those, 4.13 bits
    a value in all. Only this class touches bitsandbytes, which is imported when the first weight is quantised.

    Args:
        packed: uint8, two values each.
        state: the `QuantState` of bitsandbytes.
        shape: the weight's own.
        rows: which rows of that weight this is.
    """

    BLOCK = 64

    def __init__(self, packed: Tensor, state, shape: Sequence[int], rows: slice = ALL_ROWS):
        self.packed, self.state, self._full_shape, self._rows = packed, state, tuple(shape), rows

    @classmethod
    def quantize(cls, weight: Tensor) -> "NF4Weight":
        """Quantise a float tensor of any shape, on the device where it lies."""
        blocks = weight.detach().contiguous().flatten()
        # A block a row: with odd row lengths, as 3x3 kernels have, bitsandbytes leaves its fast CPU kernel.
        blocks = F.pad(blocks, (0, -len(blocks) % cls.BLOCK)).view(-1, cls.BLOCK)
        quantize = bitsandbytes_functional().quantize_4bit
        packed, state = quantize(blocks, blocksize=cls.BLOCK, quant_type="nf4", compress_statistics=True)
        return cls(packed, state, weight.shape)

    @property
    def shape(self) -> torch.Size:
        out, *fan_in = self._full_shape
        return torch.Size([len(range(*self._rows.indices(out))), *fan_in])

    def __getitem__(self, rows: slice) -> "NF4Weight":
        """The same storage seen as some of the whole weight's rows."""
        return NF4Weight(self.packed, self.state, self._full_shape, rows)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """A fresh dense tensor of the weight's shape."""
        state = self.state
        if dtype in LOW_PRECISION:  # bitsandbytes then rounds on the way
            state = copy.copy(state)
            state.dtype = dtype
        blocks = bitsandbytes_functional().dequantize_4bit(self.packed, state)
        dense = blocks.flatten()[: math.prod(self._full_shape)].view(self._full_shape)
        return dense[self._rows].to(dtype)


def bitsandbytes_functional():
    """`bitsandbytes.functional`, imported at the first call: whoever uses no 4-bit weights need not have it.

    Raises:
        ImportError: it is missing. The message says how to install it.
    """
    # On a machine without CUDA its start-up warns that some optimizers are missing; none of them is used here.
    if not torch.compiler.is_compiling():  # it cannot trace this
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ImportError(f"4-bit weights need bitsandbytes ({error}): pip install bitsandbytes") from error
    return bitsandbytes.functional


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product of ``x`` runs in: autocast's if that is on, else x's own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def dense_weight(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    """The weight as a dense tensor of ``dtype``: itself if it is one already, else a temporary."""
    return weight.dequantize(dtype) if isinstance(weight, NF4Weight) else weight.to(dtype)


def _is_trainable(weight: Tensor | NF4Weight) -> bool:
    return isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled()


def _is_traced() -> bool:
    """Are the operations recorded, as by `torch.compile` and `torch.export`, where PyTorch's own alone may run?"""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _refuse_jit() -> None:
    if torch.jit.is_tracing():  # which sees no operation of an autograd.Function
        raise RuntimeError(
            "torch.jit.trace cannot follow adapters: use torch.export, or trace what "
            "LoRAManager(model).unload(merge=True) returns"
        )


def _merge_pays(weight: Tensor, output_numel: int) -> bool:
    """Merged or side path? In full precision whichever passes over fewer elements; in low precision never merged."""
    any_number = isinstance(output_numel, torch.SymInt)  # as torch.export has it where the batch may be of any size
    return weight.dtype not in LOW_PRECISION and (any_number or weight.numel() <= output_numel)


# ---------------------------------------------------------------------------------------------- saved activations


class SavedIn16Bits(torch.autograd.graph.saved_tensors_hooks):
    """Within this `with` block float32 activations are saved for backward as bfloat16; arithmetic stays in float32:

        with SavedIn16Bits():
            logits = model(images)

    Half the memory of the activations, and gradients with a relative error of some 0.2% (after Gist, ISCA 2018, and
    Mesa, arXiv 2111.11124). The output is exact. Kept as they are: parameters, tensors of one or two dimensions, such
    as A and B, and the statistics of LayerNorm and of attention, whoever calls `F.scaled_dot_product_attention`: it is
    replaced within the block. A block that is computed again as a whole (`set_gradient_checkpointing` with 'full')
    saves nothing that could be rounded, and raises InputError.
    """

    def __init__(self):
        super().__init__(functools.partial(self._pack, least_dim=3), self._unpack)
        # A tensor that two operations save is kept once, by its storage and version, as long as one of them needs it.
        self._known: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[Tensor]]] = {}

    def __enter__(self):
        super().__enter__()
        self._attention, F.scaled_dot_product_attention = F.scaled_dot_product_attention, self._attend

    def __exit__(self, *args):
        F.scaled_dot_product_attention = self._attention
        self._known.clear()
        super().__exit__(*args)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args, **kwargs):
        # q, k, v and the output have four dimensions, the log-sum-exp three. A mask has four as well, but CUDA's
        # kernels want back the padded layout that they saved: with one, all is kept as it is.
        least_dim = 4 if attn_mask is None else math.inf
        pack = functools.partial(self._pack, least_dim=least_dim)
        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            return self._attention(query, key, value, attn_mask, *args, **kwargs)

    def _pack(self, tensor: Tensor, least_dim: float) -> Tensor | tuple:
        is_activation = tensor.dtype == torch.float32 and tensor.dim() >= least_dim and tensor.shape[-1] > 1
        if not is_activation or isinstance(tensor, nn.Parameter):
            return tensor
        storage = tensor.untyped_storage()
        if storage.nbytes() != 4 * tensor.numel() or not torch.ops.aten.is_non_overlapping_and_dense(tensor):
            return tensor.to(torch.bfloat16), None
        reference = StorageWeakRef(storage)  # keeps its number from being used again, not its memory
        key, layout = (reference.cdata, tensor._version), (tensor.shape, tensor.stride())
        low = self._known[key][1]() if key in self._known else None
        if low is None:
            low = tensor.as_strided((tensor.numel(),), (1,), 0).to(torch.bfloat16)
            self._known[key] = reference, weakref.ref(low, lambda _: self._known.pop(key, None))
        return low, layout

    @staticmethod
    def _unpack(packed: Tensor | tuple) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        low, layout = packed
        return low.float() if layout is None else low.float().as_strided(*layout)


def saves_in_16_bits() -> bool:
    """Is this within a `SavedIn16Bits` block?"""
    return isinstance(getattr(F.scaled_dot_product_attention, "__self__", None), SavedIn16Bits)


def saved_in(bits: int) -> contextlib.AbstractContextManager:
    """`SavedIn16Bits`, or for 32 bits a context that changes nothing."""
    return SavedIn16Bits() if bits == 16 else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------- linear


def frozen_linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` of a stock layer that does not train, by the fastest product where no gradient is needed.

    Args:
        x: (..., in).
        W: (out, in).
    """
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, W, bias))
    if needs_gradient or compute_dtype(x) != x.dtype or x.dim() == 1:
        return F.linear(x, W, bias)
    return _linear(x.flatten(0, -2), W, bias).view(*x.shape[:-1], W.shape[0])


def effective_weight(
    weight: Tensor, A: Tensor, B: Tensor, scaling: float, groups: int = 1, in_place: bool = False
) -> Tensor:
    """``W + s B A``, differentiable, as a fresh tensor.

    Args:
        weight: (out, in). With ``groups`` > 1 its rows are that many layers on one input: attention's packed q, k, v.
        A: (groups * r, in).
        B: (out, r).
        in_place: ``weight`` is a temporary that nobody else needs: add to it.
    """
    W, A, B = (t.unflatten(0, (groups, -1)) for t in (weight, A, B))
    W = W if in_place else W.clone()  # autocast would round the operands of a product that is not in place
    return W.baddbmm_(B, A, alpha=scaling).flatten(0, 1)


def merged_weight(weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float, groups: int = 1) -> Tensor:
    """What merging makes of a weight: `effective_weight` in the adapter's precision, rounded once to the weight's.

    Added on the grid of bfloat16, a small update would vanish. 4 bits merge into float.
    """
    return _rounded(effective_weight(dense_weight(weight, B.dtype), A, B, scaling, groups), weight)


def _rounded(merged: Tensor, base: Tensor | NF4Weight) -> Tensor:
    return merged.to(base.dtype) if isinstance(base, Tensor) else merged


def _linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` as `F.linear`, without a gradient of its own. x: (N, in), W: (out, in).

    In float32 on an AMD processor with AVX-512 oneDNN is called, which adds the bias on the way: up to 20% faster than
    the product of MKL, which PyTorch chooses. Without AVX-512 MKL's is the faster one, by 20 to 60%, and on Intel's
    processors by 5 to 9%. In bfloat16 all products are oneDNN's, but PyTorch copies the bias into the output first: 2
    to 4% of a product. ``torch.backends.mkldnn.enabled = False`` goes back to MKL everywhere.
    """
    on_cpu = x.device.type == "cpu" and torch.backends.mkldnn.enabled and not _is_traced()
    if x.dtype == torch.bfloat16:  # autocast may still have to round the others
        pays = bias is not None and bias.dtype == W.dtype == x.dtype and x.dtype in ONEDNN_DTYPES
    else:
        pays = x.dtype == torch.float32 and PREFERS_ONEDNN_LINEAR
    if on_cpu and pays and x.numel() > 0:
        bias = None if bias is None else bias.contiguous()  # oneDNN does not look at its stride
        return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
    return F.linear(x, W, bias)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` by the product that `_linear` chooses: where that is oneDNN's, thin ones are up to three times as fast.

    Not where b is some columns of a wider matrix, which oneDNN reads number by number.
    """
    return _linear(a, b.T) if b.is_contiguous() or b.T.is_contiguous() else a @ b


def _first_derivative(backward):
    """Make a backward pass refuse `create_graph`, and compute in the dtype of its forward pass, even under autocast.

    PyTorch's `once_differentiable` refuses only where the output's gradient has a graph. Where it has none, as that of
    a sum, the gradients would count as constants, and a gradient penalty would train nothing.
    """

    @functools.wraps(backward)
    def run(ctx, gy):
        if torch.compiler.is_compiling():  # Dynamo would leave autocast off for all that it traces after this
            return backward(ctx, gy)
        if torch.is_grad_enabled():  # in a backward pass, by `create_graph` alone
            raise RuntimeError(
                "second derivatives through adapted layers are not defined: leave out create_graph=True, or take the "
                "adapters out with LoRAManager(model).unload(merge=True)"
            )
        with torch.autocast(gy.device.type, enabled=False):
            return backward(ctx, gy)

    return run


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, adapter_x, A, B, weight, bias, scaling, groups, before, dtype):
        ctx.rebuild, parts = None, ()
        if isinstance(before, Rebuilt):
            before, ctx.rebuild, parts = before
            parts = [part.detach() for part in parts]
        rows = (x if before is None else _evaluate(before, x)[0]).to(dtype).flatten(0, -2)  # (..., in) -> (N, in)
        adapter_rows = rows if adapter_x is None else adapter_x.to(dtype).flatten(0, -2)  # what the adapter sees
        ctx.weight, ctx.scaling, ctx.groups, ctx.before, ctx.dtype = weight, scaling, groups, before, dtype
        ctx.shape, ctx.has_adapter_x = x.shape, adapter_x is not None

        factors, h = (A, B), None
        W, A, B = dense_weight(weight, dtype), A.to(dtype), B.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        if adapter_x is None and _merge_pays(W, rows.shape[0] * len(W)):
            y = _linear(rows, effective_weight(W, A, B, scaling, groups, in_place=W is not weight), bias)
        else:
            y = _linear(rows, W, bias)
            h = _linear(adapter_rows, A)  # (N, in) -> (N, groups r)
            width = len(W) // groups
            for g, (h_g, B_g) in enumerate(zip(h.chunk(groups, 1), B.chunk(groups), strict=True)):
                # (N, r) -> (N, out / groups), in place: in a slice, as torch.export lets no chunk be changed.
                y[:, g * width : (g + 1) * width].addmm_(h_g, B_g.T, alpha=scaling)
        # With W frozen, the input is needed for the adapter's gradients alone. h is thin: it is kept where it is known.
        kept = x if before is not None else adapter_rows.view(x.shape)
        ctx.save_for_backward(kept if ctx.rebuild is None else None, *factors, h, *parts)
        # As F.linear does: a view could not be modified in place, as nn.ReLU(inplace=True) does.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(W)])

    @staticmethod
    @_first_derivative
    def backward(ctx, gy):
        saved, A, B, h, *parts = ctx.saved_tensors
        if ctx.rebuild is not None:
            with torch.autocast(gy.device.type, ctx.dtype, enabled=ctx.dtype in LOW_PRECISION):
                saved = ctx.rebuild(*parts)
        A, B, gy = A.to(ctx.dtype), B.to(ctx.dtype), gy.to(ctx.dtype).flatten(0, -2)  # gy: (N, out)
        need_x, need_adapter_x, need_A, need_B, _, need_bias = ctx.needs_input_grad[:6]
        if not isinstance(ctx.before, SelfAttention):  # which is not row by row
            saved = saved.flatten(0, -2)
        adapter_rows, statistics = saved, ()
        if ctx.before is not None:
            adapter_rows, statistics = _evaluate(ctx.before, saved, in_backward=True)
            adapter_rows = adapter_rows.to(ctx.dtype).flatten(0, -2)
        gy_groups = gy.chunk(ctx.groups, 1)
        # The thin matrices lie transposed, with the long dimension contiguous: on CPU up to six times faster.
        gh = [_product(B_g.T.contiguous(), gy_g.T) for gy_g, B_g in zip(gy_groups, B.chunk(ctx.groups), strict=True)]
        gh = _stacked(gh).mul_(ctx.scaling)  # (groups r, N)
        gA = _product(gh, adapter_rows) if need_A else None  # (groups r, in)
        gB = None
        if need_B:
            h = _product(A, adapter_rows.T) if h is None else h.T.contiguous()  # (groups r, N)
            gB = [_product(h_g, gy_g).T for gy_g, h_g in zip(gy_groups, h.chunk(ctx.groups), strict=True)]
            gB = _stacked(gB).mul_(ctx.scaling)  # (out, r)
        del adapter_rows  # of the output's size or more, and no longer needed
        gx = _linear_input_gradient(ctx, gy, gh, A, B) if need_x else None
        if need_x and isinstance(ctx.before, SelfAttention):
            (gx,) = torch.autograd.grad(statistics[1], statistics[0], gx.to(saved.dtype).view_as(statistics[1]))
        elif need_x and ctx.before is not None:
            gx = _pull_back(ctx.before, gx, saved, statistics)
        return (
            None if gx is None else gx.view(ctx.shape),
            (gh.T @ A).view(ctx.shape) if need_adapter_x else None,
            gA,
            gB,
            None,
            gy.sum(0) if need_bias else None,
            *[None] * 4,
        )


def _stacked(parts: list[Tensor]) -> Tensor:
    """As `torch.cat`, which copies a single one too."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _linear_input_gradient(ctx, gy: Tensor, gh: Tensor, A: Tensor, B: Tensor) -> Tensor:
    W = dense_weight(ctx.weight, ctx.dtype)
    if ctx.has_adapter_x:  # the adapter's share reaches x through the dropout
        return _linear(gy, W.T)
    if _merge_pays(W, len(gy) * W.shape[1]):
        return _linear(gy, effective_weight(W, A, B, ctx.scaling, ctx.groups, in_place=W is not ctx.weight).T)
    return _linear(gy, W.T).addmm_(gh.T, A)  # (N, out) -> (N, in)


class SelfAttention:
    """Attention of several heads as an operation `before` a layer: (N, L, 3 E), which is q, k and v, -> (N, L, E).

    In backward it is computed once more: by the layer's own backward pass, or shortly before that by `replay`, if the
    layer's output is needed again.
    """

    def __init__(self, num_heads: int):
        self.num_heads = num_heads
        self._replayed: tuple[Tensor, Tensor] | None = None

    def __call__(self, qkv: Tensor) -> Tensor:
        return attend(*qkv.chunk(3, -1), self.num_heads, keep_weights=True)[0]  # of a graph of its own, gone at once

    def replay(self, qkv: Tensor) -> Tensor:
        """The output once more. It is kept, with its graph, for the layer's backward pass, which comes next."""
        self._replayed = self._with_graph(qkv)
        return self._replayed[1].detach()

    def graph(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output of a graph of their own; what `replay` kept is handed over."""
        replayed, self._replayed = self._replayed, None
        return replayed or self._with_graph(qkv)

    @torch.enable_grad()
    def _with_graph(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        qkv = qkv.detach().requires_grad_()
        return qkv, self(qkv)


class Rebuilt(NamedTuple):
    """A LayerNorm as an operation `before` a layer, whose input is computed again in backward instead of saved.

    ``rebuild(*parts)`` is that input, to the last bit. The parts are saved; it pays if others save them anyway.
    """

    norm: nn.LayerNorm
    rebuild: Callable[..., Tensor]
    parts: tuple[Tensor, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return self.norm(x)


def _evaluate(
    before: nn.LayerNorm | nn.GELU | SelfAttention, x: Tensor, in_backward: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """``before(x)`` and what its derivative needs beside x.

    Of a LayerNorm each row's mean and reciprocal deviation, of attention input and output of its own graph, which in
    the forward pass would only hold memory.
    """
    if isinstance(before, nn.GELU):
        return F.gelu(x, approximate=before.approximate), []
    if isinstance(before, SelfAttention):
        graph = before.graph(x) if in_backward else (x, before(x))
        return graph[1].detach(), list(graph)
    norm = before.normalized_shape, before.weight, before.bias, before.eps
    y, *statistics = torch.ops.aten.native_layer_norm(x if norm[1] is None else x.to(norm[1].dtype), *norm)
    return y, statistics


def _pull_back(before: nn.LayerNorm | nn.GELU, gradient: Tensor, x: Tensor, statistics: list[Tensor]) -> Tensor:
    """From the gradient of ``before(x)`` to that of x, both (N, in), in the same memory if it fits.

    Of a LayerNorm on a CPU some of the rows at a time: all at once would be the peak of a ViT's memory. On a GPU all at
    once, as more calls would cost more than the memory is worth.
    """
    if isinstance(before, nn.GELU):
        result = gradient if gradient.dtype == x.dtype else torch.empty_like(x)
        approximate = {"approximate": before.approximate}
        return torch.ops.aten.gelu_backward.grad_input(gradient.to(x.dtype), x, **approximate, grad_input=result)
    if x.device.type != "cpu":
        return _pull_back_norm(before, gradient, x, *statistics).to(x.dtype)
    result = gradient if gradient.dtype == x.dtype else torch.empty_like(x)
    size = max(math.ceil(len(x) / PARTS), PART_NUMEL // max(x.shape[1], 1), 1)
    for part, *in_part in zip(*(t.split(size) for t in (result, gradient, x, *statistics)), strict=True):
        part.copy_(_pull_back_norm(before, *in_part))
    return result


def _pull_back_norm(norm: nn.LayerNorm, gradient: Tensor, x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    dtype = x.dtype if norm.weight is None else norm.weight.dtype
    settings = norm.normalized_shape, mean, deviation, norm.weight, norm.bias, [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(gradient.to(dtype), x.to(dtype), *settings)[0]


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    groups: int = 1,
    adapter_x: Tensor | None = None,
    before: nn.LayerNorm | nn.GELU | SelfAttention | Rebuilt | None = None,
) -> Tensor:
    """``x (W + s B A)^T + b`` with exact gradients for x, A, B and b.

    Args:
        x: (..., in).
        weight: (out, in), frozen in the fast path. One that requires a gradient gets it, by automatic differentiation.
        A: (groups * r, in).
        B: (out, r).
        bias: (out,).
        groups: how many layers on the same input ``weight`` holds, one below the other.
        adapter_x: what the adapter sees in place of x, (..., in): x after dropout.
        before: a LayerNorm over the last dimension, GELU or attention, to apply first. Its output is not saved but
            recomputed; x is then what it takes.

    Raises:
        ValueError: both of the last two are given. Dropout would need the output that is not saved.
    """
    if adapter_x is not None and before is not None:
        raise ValueError("adapter_x and before exclude each other: apply the operation first")
    # The compiler decides by itself what to recompute, pointwise operations first; it cannot trace how it is done here.
    if before is not None and (_is_trainable(weight) or _is_traced()):
        x, before = before(x), None
    if _is_trainable(weight):
        dtype = compute_dtype(x)
        if adapter_x is None and dtype not in LOW_PRECISION:
            return F.linear(x, effective_weight(weight, A, B, scaling, groups), bias)
        h = F.linear((x if adapter_x is None else adapter_x).to(dtype), A.to(dtype))  # (..., groups r)
        h, B = h.unflatten(-1, (groups, -1)), B.to(dtype).unflatten(0, (groups, -1))
        delta = torch.einsum("...gr,gor->...go", h, B).flatten(-2)  # (..., out)
        return F.linear(x, weight, bias) + scaling * delta
    if x.dim() == 1:
        adapter_x = None if adapter_x is None else adapter_x[None]
        return lora_linear(x[None], weight, A, B, bias, scaling, groups, adapter_x, before)[0]
    _refuse_jit()
    return _LoRALinear.apply(x, adapter_x, A, B, weight, bias, scaling, groups, before, compute_dtype(x))


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
        in_place: ``weight`` is a temporary that nobody else needs: add to it.
    """
    channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    if channels_last:  # permute the small factor, so that the product comes out in the kernel's own order
        W = weight.permute(0, 2, 3, 1).flatten(1)  # a view
        A = A.view(len(A), *weight.shape[1:]).permute(0, 2, 3, 1).flatten(1)
    else:
        W = weight.flatten(1)
    if row_scale is not None:
        W, B = (W.mul_ if in_place else W.mul)(row_scale[:, None]), B * row_scale[:, None]
        in_place = True
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
    """x, padded if `conv2d` cannot do it (circular, a lopsided 'same'), and the padding left to it, in numbers.

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
    def forward(ctx, x, adapter_x, A, B, weight, bias, residual, row_scale, scaling, geometry, relu, dtype):
        x = x.to(dtype)
        ctx.has_adapter_x = adapter_x is not None
        adapter_x = adapter_x.to(dtype) if ctx.has_adapter_x else x
        ctx.weight, ctx.scaling, ctx.geometry, ctx.relu, ctx.dtype = weight, scaling, geometry, relu, dtype
        ctx.side_path = ctx.has_adapter_x or not _kernel_merges(weight, row_scale, dtype)

        factors, bias = (A, B), None if bias is None else bias.to(dtype)
        if not ctx.side_path:
            y = _conv2d(x, _folded_kernel(weight, A, B, scaling, row_scale, dtype), bias, geometry, residual, relu)
        else:
            y = F.conv2d(x, _scaled_kernel(weight, row_scale, dtype), bias, *geometry)
            A, sB = A.to(dtype), _scale_rows(B, scaling, row_scale).to(dtype)
            if geometry.groups > 1:
                y.add_(F.conv2d(adapter_x, (sB @ A).view(weight.shape), None, *geometry))
            else:
                h = F.conv2d(adapter_x, A.view(len(A), *weight.shape[1:]), None, *geometry)  # (N, r, H', W')
                _add_pointwise_(y, h, sB)
            y = y if residual is None else y.add_(residual)
            y = y.relu_() if relu else y
        ctx.save_for_backward(adapter_x, *factors, row_scale, y if relu else None)
        return y

    @staticmethod
    @_first_derivative
    def backward(ctx, gy):
        adapter_x, A, B, row_scale, y = ctx.saved_tensors
        need_x, need_adapter_x, _, _, _, need_bias, need_residual = ctx.needs_input_grad[:7]
        gy = gy.to(ctx.dtype)
        gy = gy if y is None else torch.ops.aten.threshold_backward(gy, y, 0)  # through the ReLU
        low_A, sB = A.to(ctx.dtype), _scale_rows(B, ctx.scaling, row_scale).to(ctx.dtype)
        adapter_gradients = _adapter_gradients if ctx.geometry.groups == 1 else _grouped_adapter_gradients
        need_input = need_adapter_x or (need_x and ctx.side_path and not ctx.has_adapter_x)
        gA, gB, g_adapter_x = adapter_gradients(gy, adapter_x, low_A, sB, ctx.weight.shape, ctx.geometry, need_input)
        gx = None
        if need_x:
            if ctx.side_path:
                kernel = _scaled_kernel(ctx.weight, row_scale, ctx.dtype)
            else:
                kernel = _folded_kernel(ctx.weight, A, B, ctx.scaling, row_scale, ctx.dtype)
            gx = _conv_gradient(gy, adapter_x, kernel, ctx.geometry, of_weight=False)
            if g_adapter_x is not None and not ctx.has_adapter_x:
                gx, g_adapter_x = gx.add_(g_adapter_x), None
        gB, g_bias = _scale_rows(gB, ctx.scaling, row_scale), gy.sum((0, 2, 3)) if need_bias else None
        return gx, g_adapter_x, gA, gB, None, g_bias, gy if need_residual else None, *[None] * 5


def _kernel_merges(weight: Tensor | NF4Weight, row_scale: Tensor | None, dtype: torch.dtype) -> bool:
    """May ``g (W + s B A)`` be rounded to ``dtype`` as one? Only if rounding W alone would change W as well.

    Rounded with numbers that lie anywhere between the grid's points, small updates survive on average, as they do when
    full fine-tuning rounds its float32 weights in each step. A weight on the grid would swallow them.
    """
    on_the_grid = isinstance(weight, Tensor) and weight.dtype in LOW_PRECISION and row_scale is None
    return dtype not in LOW_PRECISION or not on_the_grid


def _conv2d(x: Tensor, kernel: Tensor, bias, geometry: Geometry, residual: Tensor | None, relu: bool) -> Tensor:
    """``relu(conv2d(x, kernel, bias) + residual)``; both of the latter are optional. No gradient of its own.

    On a CPU oneDNN adds or rectifies while it writes the output, which spares a pass over the activations.
    """
    fuses = (relu or residual is not None) and x.device.type == "cpu" and torch.backends.mkldnn.enabled
    if fuses and x.numel() > 0 and x.dtype in ONEDNN_DTYPES and not _is_traced():
        stride, padding, dilation, groups = geometry
        sizes, bias = (padding, stride, dilation, groups), None if bias is None else bias.contiguous()
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(x, kernel, bias, *sizes, "leaky_relu", [LEAK], "")
        if residual.dtype == x.dtype:  # what comes after an addition has no leak
            with_residual = torch.ops.mkldnn._convolution_pointwise.binary
            y = with_residual(x, residual, kernel, bias, *sizes, "add", 1.0, None, [], None)
            return y.relu_() if relu else y
    y = F.conv2d(x, kernel, bias, *geometry)
    y = y if residual is None else y.add_(residual)
    return y.relu_() if relu else y


def _adapter_gradients(gy, adapter_x, A, sB, kernel_shape, geometry, need_input):
    """The gradients of A, of sB and, if needed, of the adapter's input. All of them go through r channels."""
    A4, is_pointwise = A.view(len(A), *kernel_shape[1:]), kernel_shape[2:] == (1, 1) and geometry[:2] == PLAIN[:2]
    gh = _pointwise(gy, sB.T)  # (N, out, H', W') -> (N, r, H', W')
    if is_pointwise:
        gA, h = _pointwise_gradient(gh, adapter_x), _pointwise(adapter_x, A)
    else:
        gA = _conv_gradient(gh, adapter_x, A4, geometry, of_weight=True).flatten(1)
        h = F.conv2d(adapter_x, A4, None, *geometry)  # (N, in, H, W) -> (N, r, H', W')
    gB = _pointwise_gradient(h, gy).T
    return gA, gB, _conv_gradient(gh, adapter_x, A4, geometry, of_weight=False) if need_input else None


def _grouped_adapter_gradients(gy, adapter_x, A, sB, kernel_shape, geometry, need_input):
    """The same for groups > 1. There h has groups * r channels: the dense gradient is smaller."""
    delta = (sB @ A).view(kernel_shape)
    dense = _conv_gradient(gy, adapter_x, delta, geometry, of_weight=True).flatten(1)  # (out, fan_in)
    g_adapter_x = _conv_gradient(gy, adapter_x, delta, geometry, of_weight=False) if need_input else None
    return sB.T @ dense, dense @ A.T, g_adapter_x


def _conv_gradient(gy: Tensor, x: Tensor, kernel: Tensor, geometry: Geometry, of_weight: bool) -> Tensor:
    """One of the two gradients of ``conv2d(x, kernel)``: the kernel's or the input's."""
    stride, padding, dilation, groups = geometry
    mask = [not of_weight, of_weight, False]
    return torch.ops.aten.convolution_backward(
        gy, x, kernel, None, stride, padding, dilation, False, [0, 0], groups, mask
    )[int(of_weight)]


# Pixel by pixel a thin 1x1 convolution is a matrix product, if the channels lie last: up to twice as fast on a CPU.


def _pixels(x: Tensor) -> Tensor | None:
    """(N, C, H, W) as (N H W, C), a view; None if the channels do not lie last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2) if x.is_contiguous(memory_format=torch.channels_last) else None


def _pointwise(x: Tensor, matrix: Tensor) -> Tensor:
    """``conv2d(x, matrix)`` for a 1x1 kernel. x: (N, in, H, W), matrix: (out, in)."""
    if (pixels := _pixels(x)) is None:
        return F.conv2d(x, matrix[:, :, None, None])
    return _linear(pixels, matrix).view(len(x), *x.shape[2:], len(matrix)).permute(0, 3, 1, 2)


def _pointwise_gradient(gh: Tensor, x: Tensor) -> Tensor:
    """The kernel's gradient (r, in) from that of the output, (N, r, H, W), and the input, (N, in, H, W)."""
    thin, pixels = _pixels(gh), _pixels(x)
    if thin is None or pixels is None:
        matrix = x.new_empty(gh.shape[1], x.shape[1], 1, 1)  # only its shape is looked at
        return _conv_gradient(gh, x, matrix, PLAIN, of_weight=True).flatten(1)
    return _product(thin.T, pixels)


def _scale_rows(matrix: Tensor, scaling: float, row_scale: Tensor | None) -> Tensor:
    matrix = matrix * scaling
    return matrix if row_scale is None else matrix * row_scale.to(matrix.dtype)[:, None]


def _folded_kernel(
    weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float, row_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``g (W + s B A)``, rounded once to ``dtype``."""
    precise = torch.promote_types(dtype, torch.float32)
    W = dense_weight(weight, precise)
    return effective_kernel(W, A.to(precise), B.to(precise), scaling, row_scale, in_place=W is not weight).to(dtype)


def _scaled_kernel(weight: Tensor | NF4Weight, row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if row_scale is None:
        return dense_weight(weight, dtype)
    precise = torch.promote_types(dtype, torch.float32)
    return (dense_weight(weight, precise) * row_scale[:, None, None, None]).to(dtype)


def _add_pointwise_(y: Tensor, h: Tensor, sB: Tensor) -> Tensor:
    """``y += conv2d(h, sB)`` for a 1x1 kernel, in place. y: (N, out, H, W); h: (N, r, H, W); sB: (out, r)."""
    if (pixels := _pixels(y)) is not None:
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
    """
    dtype = compute_dtype(x)
    if not _is_trainable(weight):
        _refuse_jit()
        settings = row_scale, scaling, geometry, relu, dtype
        return _LoRAConv2d.apply(x, adapter_x, A, B, weight, bias, residual, *settings)
    if adapter_x is None and dtype not in LOW_PRECISION:
        y = F.conv2d(x, effective_kernel(weight, A, B, scaling, row_scale), bias, *geometry)
    else:
        delta = effective_kernel(torch.zeros_like(weight, dtype=A.dtype), A, B, scaling, row_scale).to(dtype)
        y = F.conv2d(x, _scaled_kernel(weight, row_scale, weight.dtype), bias, *geometry)
        y = y + F.conv2d((x if adapter_x is None else adapter_x).to(dtype), delta, None, *geometry)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


# ------------------------------------------------------------------------------------------------------- attention


def once_each(function: Callable, *tensors: Tensor) -> list:
    """``function(t)`` of each tensor, called once for each distinct one: what was one tensor stays one."""
    results = {key: function(tensor) for key, tensor in {id(t): t for t in tensors}.items()}
    return [results[id(tensor)] for tensor in tensors]


def to_batch_first(is_batched: bool, is_batch_first: bool) -> Callable[[Tensor], Tensor]:
    """The function from (L, E), (L, N, E) or (N, L, E) to (N, L, E)."""
    if not is_batched:
        return lambda x: x[None]
    return (lambda x: x) if is_batch_first else (lambda x: x.transpose(0, 1))


def attention_mask(
    q: Tensor, k: Tensor, num_heads: int, attn_mask: Tensor | None = None, key_padding_mask: Tensor | None = None
) -> Tensor | None:
    """Both masks of `nn.MultiheadAttention` as one to add to the scores, broadcastable to (N, H, L, S); None for none.

    Args:
        q: (N, L, E).
        k: (N, S, E).
        attn_mask: (L, S) or (N * H, L, S); True blocks, numbers are added.
        key_padding_mask: (N, S), of the same two kinds.

    Raises:
        RuntimeError: a mask of another shape. It might broadcast, and mask something else.
    """
    N, L, S = *q.shape[:2], k.shape[1]
    _check_shape("attn_mask", attn_mask, (L, S), (N * num_heads, L, S))
    _check_shape("key_padding_mask", key_padding_mask, (N, S))
    masks = []
    if attn_mask is not None:
        mask = _additive(attn_mask, q.dtype)
        masks.append(mask if mask.dim() == 2 else mask.unflatten(0, (N, num_heads)))
    if key_padding_mask is not None:
        masks.append(_additive(key_padding_mask, q.dtype)[:, None, None])  # (N, 1, 1, S)
    return sum(masks[1:], masks[0]) if masks else None


def _check_shape(name: str, mask: Tensor | None, *allowed: tuple[int, ...]) -> None:
    if mask is not None and tuple(mask.shape) not in allowed:
        raise RuntimeError(f"{name} has shape {tuple(mask.shape)}, it must be {' or '.join(map(str, allowed))}")


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def append_keys(
    k: Tensor, v: Tensor, mask: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """k, v and the mask with what `nn.MultiheadAttention` appends to the S keys: its biases and a position of zeros.

    Args:
        k, v: (N, S, E).
        mask: as `attention_mask` returns it. What is appended, every query sees.
        bias_k, bias_v: (1, 1, E), both or none.
    """
    N, S, E = k.shape
    if bias_k is not None:
        k, v = (torch.cat([t, bias.expand(N, 1, E).to(t.dtype)], 1) for t, bias in ((k, bias_k), (v, bias_v)))
    if add_zero:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    return k, v, None if mask is None else F.pad(mask, (0, k.shape[1] - S))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    need_weights: bool = False,
    keep_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention of several heads: (N, L, E), and its weights (N, H, L, S) if asked for.

    Args:
        q: (N, L, E).
        k, v: (N, S, E).
        mask: as `attention_mask` returns it.
        dropout: probability of dropping a weight.
        keep_weights: where the weights are computed here and take little memory, save them for backward, which then
            computes no score once more and takes some 40% less time.
    """
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (N, ., E) -> (N, H, ., D)
    weights = None
    if need_weights:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (N, H, L, S)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        attended = weights.to(v.dtype) @ v
    else:
        by_products = mask is None and dropout == 0 and _batched_attention_pays(q, k, v)
        keep_weights = keep_weights and torch.is_grad_enabled() and k.shape[-2] <= MOST_KEYS_KEPT * k.shape[-1]
        with _sound_kernels(q):
            stock = F.scaled_dot_product_attention
            attended = _Attention.apply(q, k, v, keep_weights) if by_products else stock(q, k, v, mask, dropout)
    return attended.transpose(1, 2).flatten(-2), weights


def _sound_kernels(q: Tensor) -> contextlib.AbstractContextManager:
    """PyTorch's kernels but cuDNN's for a single query, as of a class token alone: on CUDA its gradient may be NaN then
    (github.com/NVIDIA/cudnn-frontend, issue 1072)."""
    if q.device.type != "cuda" or q.shape[-2] > 1 or _is_traced():
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _batched_attention_pays(q: Tensor, k: Tensor, v: Tensor) -> bool:
    in_bf16 = q.device.type == "cpu" and q.dtype == k.dtype == v.dtype == torch.bfloat16
    able = PREFERS_BATCHED_ATTENTION and torch.backends.mkldnn.enabled and not _is_traced()
    return in_bf16 and able and 0 < q.shape[-2] * k.shape[-2] <= MOST_SCORES


class _Attention(torch.autograd.Function):
    """``softmax(q k^T / sqrt(D)) v`` of bfloat16 tensors (N, H, ., D) by products over all heads at once.

    As in PyTorch's kernel the scores and their softmax are in float32, the weights are rounded for the product with v,
    and nothing of the scores' size is kept: backward computes the weights once more. With `keep_weights` they are kept.
    """

    @staticmethod
    def forward(ctx, q, k, v, keep_weights=False):
        attended = _empty_heads(q, v.shape[-1])
        kept = q.new_empty(*q.shape[:-1], k.shape[-2]) if keep_weights else None
        for part in _parts_of_heads(q, k):
            q_p, k_p, v_p = (t[part].flatten(0, 1) for t in (q, k, v))
            weights = _attention_weights(q_p, k_p, None if kept is None else kept[part].flatten(0, 1))
            attended[part] = (weights @ v_p).view_as(attended[part])
        ctx.save_for_backward(q, k, v, kept)
        return attended

    @staticmethod
    @_first_derivative
    def backward(ctx, gy):
        q, k, v, kept = ctx.saved_tensors
        scaling = 1 / math.sqrt(q.shape[-1])
        gq, gk, gv = (_empty_heads(t, t.shape[-1]) for t in (q, k, v))
        for part in _parts_of_heads(q, k):
            q_p, k_p, v_p, gy_p = (t[part].flatten(0, 1) for t in (q, k, v, gy.to(q.dtype)))
            weights = _attention_weights(q_p, k_p) if kept is None else kept[part].flatten(0, 1)
            gv[part] = (weights.mT @ gy_p).view_as(gv[part])
            # What all values have in common changes no score's gradient, and would only be rounded.
            g_weights = gy_p @ (v_p - v_p.mean(1, keepdim=True)).mT
            g_scores = torch.ops.aten._softmax_backward_data(g_weights, weights, -1, weights.dtype)
            gq[part] = (g_scores @ k_p).mul_(scaling).view_as(gq[part])
            gk[part] = (g_scores.mT @ q_p).mul_(scaling).view_as(gk[part])
        return gq, gk, gv, None


def _attention_weights(q: Tensor, k: Tensor, out: Tensor | None = None) -> Tensor:
    """q: (N, L, D), k: (N, S, D) -> (N, L, S). Scores rounded to bfloat16 would double attention's error."""
    scores = q.new_empty(len(q), q.shape[1], k.shape[1], dtype=torch.float32)
    # In place, as in `effective_weight`.
    scores.baddbmm_(q.float(), k.float().mT, beta=0, alpha=1 / math.sqrt(q.shape[-1]))
    weights = scores.softmax(-1)
    return weights.to(q.dtype) if out is None else out.copy_(weights)


def _parts_of_heads(q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
    """Which images and which heads of them to compute at a time."""
    N, H, L, _ = q.shape
    images, heads = (max(SCORES_AT_A_TIME // (n * L * k.shape[2]), 1) for n in (H, 1))
    return [(slice(n, n + images), slice(h, h + heads)) for n in range(0, N, images) for h in range(0, H, heads)]


def _empty_heads(like: Tensor, width: int) -> Tensor:
    """(N, H, L, width), with the heads of a token side by side in memory: (N, L, H width) is then a view."""
    N, H, L, _ = like.shape
    return like.new_empty(N, L, H, width).transpose(1, 2)


# --------------------------------------------------------------------------------------------------------- pooling


class _MaxPool2dReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel_size, stride, padding, dilation, ceil_mode):
        ctx.options = kernel_size, stride, padding, dilation, ceil_mode
        y, indices = torch.ops.aten.max_pool2d_with_indices(x, *ctx.options)
        y.relu_()
        # Positions in one channel of one image: 32 bits hold them, PyTorch gives 64.
        ctx.save_for_backward(y, indices.to(torch.int32))
        ctx.shape = x.shape
        return y

    @staticmethod
    @_first_derivative
    def backward(ctx, gy):
        y, indices = ctx.saved_tensors
        gy = torch.ops.aten.threshold_backward(gy, y, 0)
        channels_last = y.is_contiguous(memory_format=torch.channels_last)
        x = torch.empty(  # of x, only the shape and the memory format are looked at
            ctx.shape,
            dtype=y.dtype,
            device=y.device,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        )
        gx = torch.ops.aten.max_pool2d_with_indices_backward(gy, x, *ctx.options, indices.long())
        return gx, *[None] * 5


def max_pool2d_relu(x: Tensor, kernel_size, stride, padding=0, dilation=1, ceil_mode: bool = False) -> Tensor:
    """``max_pool2d(relu(x))``, without keeping x or relu(x) for backward.

    ReLU is monotonic, so ``relu(max_pool2d(x))`` is the same bit for bit. It rectifies a fraction of the elements, and
    its backward needs only the output and the positions of the maxima. A compiler plans memory itself, and
    with this order Inductor gave the stem of a ResNet in bfloat16 no gradient (PyTorch 2.13, on a CPU).
    """
    if _is_traced():
        return F.max_pool2d(F.relu(x), kernel_size, stride, padding, dilation, ceil_mode)
    return _MaxPool2dReLU.apply(x, kernel_size, stride, padding, dilation, ceil_mode)
