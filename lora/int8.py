"""Frozen weights in 8 bits that are multiplied in 8 bits.

Training in 8 bits has to compute the dense weight gradient in more (SwitchBack, arXiv 2304.13013). A frozen weight has
none: its two products, forward and to the input, are sums of integers here. With a float32 scale for each row of W, x
and gy, and sums in int32, which 130,000 columns cannot overflow:

    W = d Wq,   x = sx xq,   gy d = s (gy d)q

    y  = x W^T  = (xq Wq^T) sx d            (N, out)
    gx = gy W   = ((gy d)q Wq) s            (N, in)

gy is multiplied by the scales d before it is rounded, so both products read the same codes: W is stored once. Rows are
rounded some at a time, as many as stay in the cache. What an adapter adds is not rounded. Only CPUs multiply in 8 bits;
on other devices the weight is made dense for each product.
"""

import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import backends
from toolkit import devices, distributed
from toolkit.models.backbones import in_head
from toolkit.run import training

LARGEST = 127  # -128 has no counterpart
# Numbers in a block of rows: when rounding it stays in a core's cache, in a product it is worth reading W for.
ROUNDED_AT_ONCE, MULTIPLIED_AT_ONCE = 2**17, 2**20
MEASURED_TOKENS = 512  # as many as keep a processor busy
WORTH_ROUNDING = 1.5  # times as fast: less is lost in the rest of a step
NO_ROW = 1e-30  # the least that counts as a row's largest number: all rows have a scale, those of zeros too
ALIGNMENT = 64  # of the scales behind the codes, in bytes


class Int8Weight:
    """A frozen weight as 8-bit codes (out, in), with a float32 scale (out,) for each row.

    Args:
        codes: int8, the rows of the weight.
        scale: what each row is multiplied by.
    """

    def __init__(self, codes: Tensor, scale: Tensor):
        self.codes = codes
        self.scale = scale
        self.shape = codes.shape

    @classmethod
    def quantize(cls, weight: Tensor) -> "Int8Weight":
        """Round a float weight, each number to the nearest code of its row."""
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
        """Some of the weight's rows, not copied."""
        return Int8Weight(self.codes[rows], self.scale[rows])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """A fresh dense tensor of the weight's shape."""
        return (self.codes * self.scale[:, None]).to(dtype)

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
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(x.shape[0], 1, dtype=torch.float32)
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
        floats = part if dtype == torch.float32 else torch.empty_like(part, dtype=torch.float32)
        sums = floats.copy_(torch._int_mm(its_codes, matrix))
        if columns is not None:
            sums.mul_(columns)
        torch.mul(sums, its_scale, out=part) if bias is None else torch.addcmul(bias, sums, its_scale, out=part)
    return y


def _blocks(numbers: int, first: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The same rows of all, so many that those of the first have at most so many numbers.

    All rows at once where a compiler decides.
    """
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
    """In which dtype a run stores its frozen weights: `training.base_dtype`, but in 8 bits only if that pays."""
    dtype = training.base_dtype(args)
    if dtype != torch.int8:
        return dtype
    precision = devices.select_precision(args.precision, devices.CPU)
    return dtype if pays(model, precision) else precision


def pays(model: nn.Module, precision: torch.dtype) -> bool:
    """Are the model's products faster in 8 bits on this CPU? Measured on its widest linear layer, and told.

    Rounding passes over the activations: in narrow layers that takes as long as the products.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not in_head(model, name)}
    if not layers:
        return True  # `adapt_layers` refuses 8 bits without such layers
    widest = max((layer.weight for layer in layers.values()), key=Tensor.numel)
    return speedups(*widest.shape)[precision] >= WORTH_ROUNDING


@functools.cache
def speedups(out: int, width: int) -> dict[torch.dtype, float]:
    """How many times as fast as in floats a CPU multiplies by a weight (out, width) in 8 bits, by the floats' dtype.

    Measured once, and told. Several processes get one answer.
    """
    precisions = torch.float32, torch.bfloat16
    weight = torch.ones(out, width)
    tokens = torch.ones(MEASURED_TOKENS, width)
    stored = Int8Weight.quantize(weight)
    ways = [functools.partial(F.linear, tokens.to(dtype), weight.to(dtype)) for dtype in precisions]
    ways.append(functools.partial(stored.linear, tokens))
    seconds = [devices.shortest_seconds(way) for way in ways]
    *in_floats, in_8_bits = distributed.all_sum(*seconds)
    times = {dtype: own / in_8_bits for dtype, own in zip(precisions, in_floats, strict=True)}
    names = {dtype: name for name, dtype in devices.DTYPES.items()}
    told = [f"{ratio:.1f} times the speed of {names[dtype]}" for dtype, ratio in times.items()]
    print(
        f"products in 8 bits ({width} to {out}): {', '.join(told)}; used from {WORTH_ROUNDING} times on, else "
        "--arithmetic float"
    )
    return times
