"""Frozen weights in 8 bits that are multiplied in 8 bits.

Both products with a frozen weight, forward and to the input, are sums of integers here (after SwitchBack, arXiv
2304.13013), with a float32 scale for each row of W, x and gy. Sums are in int32, which 130,000 columns cannot overflow:

    W = d Wq,   x = sx xq,   gy d = s (gy d)q

    y  = x W^T  = (xq Wq^T) sx d            (N, out)
    gx = gy W   = ((gy d)q Wq) s            (N, in)

gy is multiplied by the scales d before it is rounded, so both products read the same codes: W is stored once. Only CPUs
that do it exactly multiply in 8 bits; elsewhere the weight is made dense for each product.
"""

import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from lora import backends
from lora.weights import Weight

LARGEST = 127  # -128 has no counterpart
ROUNDED_AT_ONCE = 2**17  # numbers in a block of rows, which when rounding stays in a core's cache
MULTIPLIED_AT_ONCE = 2**20  # numbers in a block of a product's rows: worth reading W for
NO_ROW = 1e-30  # the least that counts as a row's largest number: all rows have a scale, zeros too
ALIGNMENT = 64  # of the scales behind the codes, in bytes


class Int8Weight(Weight):
    """A frozen weight as 8-bit codes (out, in), with a float32 scale (out,) for each row."""

    def __init__(self, codes: Tensor, scale: Tensor):
        self.codes = codes
        self.scale = scale
        self.shape = codes.shape

    @classmethod
    def quantize(cls, weight: Tensor) -> "Int8Weight":
        """Round a float weight, each number to the nearest code of its row."""
        multiplies_exactly(weight.device.type, *weight.shape)  # asked once, outside any graph
        codes, scale = quantize_rows(weight)
        return cls(codes, scale.squeeze(1))

    @classmethod
    def unpacked(cls, packed: Tensor, shape: torch.Size) -> "Int8Weight":
        """The weight of this shape behind the bytes of `packed`, which are not copied."""
        size = shape.numel()
        return cls(packed[:size].view(shape), packed[size + -size % ALIGNMENT :].view(torch.float32))

    def packed(self) -> Tensor:
        """Codes and scales as one int8 vector: a layer then has one tensor to move, copy and save."""
        codes = F.pad(self.codes.flatten(), (0, -self.codes.numel() % ALIGNMENT))
        return torch.cat([codes, self.scale.view(torch.int8)])

    def __getitem__(self, rows: slice) -> "Int8Weight":
        return Int8Weight(self.codes[rows], self.scale[rows])

    @property
    def multiplies_dense(self) -> bool:
        return not multiplies_exactly(self.codes.device.type, self.shape[1])

    def dense(self, dtype: torch.dtype, copy: bool = True) -> Tensor:
        return (self.codes * self.scale[:, None]).to(dtype)

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.multiplies_dense:
            return super().times(x, bias)
        return _multiplied(x, None, self.codes.T, self.scale, bias)

    def back(self, gy: Tensor) -> Tensor:
        if self.multiplies_dense:
            return super().back(gy)
        return _multiplied(gy, self.scale, self.codes, None, None)


@torch.compiler.assume_constant_result
def multiplies_exactly(device: str, *numbers: int) -> bool:
    """Does a device of this type add up these numbers of products of codes exactly?"""
    return device == "cpu" and all(map(_is_exact, numbers))


@functools.cache
def _is_exact(columns: int) -> bool:
    """Does this CPU add up this many products of the largest codes exactly? In 16 bits, without VNNI or AMX, not."""
    largest = torch.full((32, columns), LARGEST, dtype=torch.int8)
    sums = columns * LARGEST**2
    by_rows = _product(largest, -largest.T.contiguous())
    return bool((_product(largest, largest.T) == sums).all() and (by_rows == -sums).all())


def _product(codes: Tensor, matrix: Tensor) -> Tensor:
    """``codes matrix`` in int32. codes: (N, k), matrix: (k, n), int8."""
    if matrix.shape[0] == 1:  # a transposed column, of which oneDNN reads other numbers
        matrix = matrix.flatten()[None]
    return torch._int_mm(codes, matrix)


@torch.no_grad()
def quantize_rows(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (N, in), multiplied by `columns` (in,) if they are given, as codes (N, in) in int8 and scales (N, 1)."""
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    for rows, its_codes, its_scale in _blocks(ROUNDED_AT_ONCE, x, codes, scale):
        rows = (rows if columns is None else rows * columns).to(torch.float32)
        largest = rows.abs().amax(1, keepdim=True).clamp_min_(NO_ROW)  # NaN and infinity stay, as in what comes of it
        its_codes.copy_((rows * (LARGEST / largest)).round_())
        torch.mul(largest, 1 / LARGEST, out=its_scale)
    return codes, scale


@torch.no_grad()
def _multiplied(x: Tensor, before: Tensor | None, matrix: Tensor, after: Tensor | None, bias: Tensor | None) -> Tensor:
    """``((x before) matrix) after + bias``, (N, k) -> (N, n), with x's rows as codes. matrix: (k, n), int8."""
    codes, scale = quantize_rows(x, before)
    y = scale.new_empty(x.shape[0], matrix.shape[1], dtype=x.dtype)
    for part, its_codes, its_scale in _blocks(MULTIPLIED_AT_ONCE, y, codes, scale):
        sums = part if x.dtype == torch.float32 else torch.empty_like(part, dtype=torch.float32)
        sums.copy_(_product(its_codes, matrix))
        if after is not None:
            sums.mul_(after)
        if bias is None:
            torch.mul(sums, its_scale, out=part)
        else:
            torch.addcmul(bias, sums, its_scale, out=part)
    return y


def _blocks(numbers: int, first: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The same rows of all, in blocks in which the first has at most this many numbers."""
    if backends.is_traced():  # a compiler decides
        return [(first, *others)]
    size = max(numbers // max(first.shape[1], 1), 1)
    return zip(*(t.split(size) for t in (first, *others)), strict=True)
