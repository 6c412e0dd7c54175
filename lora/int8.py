"""Frozen weights in 8 bits that are multiplied in 8 bits.

A frozen weight allows what a trained one does not: its products, forward and to the input, need no precision of their
own, because the product that does, the dense weight gradient, is not formed (SwitchBack, arXiv 2304.13013). With a
scale for each row of W, x and gy, all in float32, and sums in int32:

    W = d Wq,   x = sx xq,   gy d = s (gy d)q

    y  = x W^T  = (xq Wq^T) sx d            (N, out)
    gx = gy W   = ((gy d)q Wq) s            (N, in)

The scales d go into gy before that is rounded, so both products read the same codes: W is stored once. Rows are rounded
some at a time, as many as stay in the cache. What an adapter adds is not rounded, see `lora.thin`.
"""

import functools
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import backends
from toolkit import distributed, training

LARGEST = 127  # -128 has no counterpart
# Numbers that a block of rows has: the first two fit a core's cache beside a copy, the others amortise reading W.
ROUNDED_AT_ONCE, MULTIPLIED_AT_ONCE = 2**17, 2**20
WORTH_ROUNDING = 1.5  # times as fast: in a step, of which products are a part, a tenth is left of that
NO_ROW = 1e-30  # the least that counts as a row's largest number: all rows have a scale, those of zeros too
ALIGNMENT = 64


class Int8Weight:
    """A frozen weight as 8-bit codes (out, in), with a float32 scale (out,) for each row.

    Args:
        codes: int8, the rows of the weight.
        scale: what each row is multiplied by.
        shape: the weight's own: (out, in), or that of a 1x1 kernel.
    """

    def __init__(self, codes: Tensor, scale: Tensor, shape: Sequence[int] | None = None):
        self.codes, self.scale = codes, scale
        self.shape = torch.Size(codes.shape if shape is None else shape)

    @classmethod
    def quantize(cls, weight: Tensor) -> "Int8Weight":
        """Round a float weight, each number to the nearest code of its row."""
        codes, scale = quantize_rows(weight.detach().flatten(1))
        return cls(codes, scale[:, 0], weight.shape)

    @classmethod
    def unpacked(cls, packed: Tensor, shape: Sequence[int]) -> "Int8Weight":
        """The weight of this shape behind the bytes of `packed`, which are not copied."""
        out, size = shape[0], torch.Size(shape).numel()
        scales = packed[size + -size % ALIGNMENT :].view(torch.float32)
        return cls(packed[:size].view(out, -1), scales, shape)

    def packed(self) -> Tensor:
        """Codes and scales as one int8 vector: a layer then has one tensor to move, copy and save."""
        codes = F.pad(self.codes.flatten(), (0, -self.codes.numel() % ALIGNMENT))
        return torch.cat([codes, self.scale.view(torch.int8)])

    def __getitem__(self, rows: slice) -> "Int8Weight":
        """Some of the weight's rows, not copied."""
        return Int8Weight(self.codes[rows], self.scale[rows])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """A fresh dense tensor of the weight's shape."""
        return (self.codes * self.scale[:, None]).to(dtype).view(self.shape)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + b``, (N, in) -> (N, out), in x's dtype."""
        return _multiplied(x.dtype, *quantize_rows(x), self.codes.T, self.scale, bias)

    def input_gradient(self, gy: Tensor) -> Tensor:
        """``gy W``, (N, out) -> (N, in), in gy's dtype."""
        return _multiplied(gy.dtype, *quantize_rows(gy, self.scale), self.codes)


@torch.no_grad()
def quantize_rows(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (N, in), multiplied by `columns` (in,) if they are given, as codes (N, in) in int8 and scales (N, 1).

    A row with NaN or infinity has a scale that is not finite, and so has what is computed of it.
    """
    codes, scale = torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)
    for rows, its_codes, its_scale in _blocks(ROUNDED_AT_ONCE, x, codes, scale):
        rows = (rows if columns is None else rows * columns).to(torch.float32)
        largest = rows.abs().amax(1, keepdim=True).clamp_min_(NO_ROW)
        its_codes.copy_((rows * (LARGEST / largest)).round_())
        torch.mul(largest, 1 / LARGEST, out=its_scale)
    return codes, scale


@torch.no_grad()
def _multiplied(
    dtype: torch.dtype,
    codes: Tensor,
    scale: Tensor,
    matrix: Tensor,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``(codes matrix) scale columns + bias`` in ``dtype``. codes: (N, k); scale: (N, 1); matrix: (k, n), int8."""
    y = scale.new_empty(codes.shape[0], matrix.shape[1], dtype=dtype)
    for part, its_codes, its_scale in _blocks(MULTIPLIED_AT_ONCE, y, codes, scale):
        sums = part if dtype == torch.float32 else torch.empty_like(part, dtype=torch.float32)
        sums.copy_(backends.int8_product(its_codes, matrix))
        sums = sums if columns is None else sums.mul_(columns)
        torch.mul(sums, its_scale, out=part) if bias is None else torch.addcmul(bias, sums, its_scale, out=part)
    return y


def _blocks(numbers: int, first: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The same rows of all, so many that those of the first have at most so many numbers; traced, all rows at once."""
    if backends.is_traced():
        return [(first, *others)]
    size = max(numbers // max(first.shape[1], 1), 1)
    return zip(*(t.split(size) for t in (first, *others)), strict=True)


# ------------------------------------------------------------------------------------------- whichever the weight is


def linear(x: Tensor, W: Tensor | Int8Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``. x: (N, in), W: (out, in)."""
    return W.linear(x, bias) if isinstance(W, Int8Weight) else backends.linear(x, W, bias)


def input_gradient(gy: Tensor, W: Tensor | Int8Weight) -> Tensor:
    """``gy W``. gy: (N, out), W: (out, in)."""
    return W.input_gradient(gy) if isinstance(W, Int8Weight) else backends.linear(gy, W.T)


# ------------------------------------------------------------------------------------------------- whether it pays


def base_dtype(args, model: nn.Module) -> torch.dtype | None:
    """In which dtype a run stores its frozen weights: `training.base_dtype`, but in 8 bits only if that pays.

    It is measured on the model's widest linear layer, and told. Rounding passes over the activations: in narrow layers
    that takes as long as the products.
    """
    dtype = training.base_dtype(args)
    widest = max((m.weight for m in model.modules() if isinstance(m, nn.Linear)), key=Tensor.numel, default=None)
    if dtype != torch.int8 or widest is None:
        return dtype
    precision = training.select_precision(args.precision, torch.device("cpu"))
    return torch.int8 if speedups(*widest.shape)[precision] >= WORTH_ROUNDING else precision


@functools.cache
def speedups(out: int, width: int) -> dict[torch.dtype, float]:
    """How many times as fast as in float32 and in bf16 this CPU multiplies by a weight (out, width) in 8 bits.

    Measured once, and told. Several processes get one answer.
    """
    tokens, weight = torch.ones(512, width), torch.ones(out, width)
    low, stored = (tokens.bfloat16(), weight.bfloat16()), Int8Weight.quantize(weight)
    ways = (lambda: F.linear(tokens, weight)), (lambda: F.linear(*low)), (lambda: stored.linear(tokens))
    *in_floats, in_8_bits = distributed.all_sum(*map(training.shortest_seconds, ways))
    fp32, bf16 = (seconds / in_8_bits for seconds in in_floats)
    print(
        f"products in 8 bits ({width} to {out}): {fp32:.1f} times as fast as in fp32, {bf16:.1f} times as in bf16; "
        f"used from {WORTH_ROUNDING} times on, else --arithmetic float"
    )
    return {torch.float32: fp32, torch.bfloat16: bf16}
