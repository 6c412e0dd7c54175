"""What a layer multiplies by: here a weight of floats, or in 4 bits. In 8 bits it is one of `lora.int8`."""

import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora import backends
from toolkit import optional_package


class Weight:
    """A weight (out, ...) of floats, frozen or not. Those in fewer bits are derived from it, and never train."""

    dtype = torch.float32  # of its numbers, if they are in fewer bits
    requires_grad = False
    multiplies_dense = True  # is it a dense tensor in products, to which an update may be added first?

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self.requires_grad = tensor.requires_grad

    def __getitem__(self, rows: slice) -> "Weight":
        """Some of the weight's rows, not copied."""
        return Weight(self.tensor[rows])

    def dense(self, dtype: torch.dtype, copy: bool = False) -> Tensor:
        """The weight as a tensor of this dtype: itself, if it is one and need be no copy, else a temporary."""
        if self.tensor.dtype != dtype:  # to a compiler `to` would always be another tensor
            return self.tensor.to(dtype)
        return self.tensor.clone() if copy else self.tensor

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + b``, (N, in) -> (N, out), in x's dtype."""
        return backends.linear(x, self.dense(x.dtype), bias)

    def back(self, gy: Tensor) -> Tensor:
        """``gy W``, (N, out) -> (N, in), in gy's dtype."""
        return backends.linear(gy, self.dense(gy.dtype).T)


class NF4Weight(Weight):
    """A frozen weight in 4.13 bits a value: NF4 blocks of 64 with double quantisation (QLoRA, 2305.14314, section 3).

    `packed` and `state`, bitsandbytes' `QuantState`, are of a whole weight of this shape; this is some rows of it.
    """

    BLOCK = 64

    def __init__(self, packed: Tensor, state, shape: Sequence[int], rows: slice = slice(None)):
        self.packed = packed
        self.state = state
        self._full_shape = tuple(shape)
        self._rows = rows
        self.shape = torch.Size([len(range(*rows.indices(shape[0]))), *shape[1:]])

    @classmethod
    def quantize(cls, weight: Tensor) -> "NF4Weight":
        """Quantise a float tensor of any shape, on the device where it lies."""
        blocks = weight.detach().contiguous().flatten()
        # A block a row: with odd row lengths, as 3x3 kernels have, bitsandbytes leaves its fast CPU kernel.
        blocks = F.pad(blocks, (0, -len(blocks) % cls.BLOCK)).view(-1, cls.BLOCK)
        quantize = bitsandbytes_functional().quantize_4bit
        packed, state = quantize(blocks, blocksize=cls.BLOCK, quant_type="nf4", compress_statistics=True)
        return cls(packed, state, weight.shape)

    def __getitem__(self, rows: slice) -> "NF4Weight":
        return NF4Weight(self.packed, self.state, self._full_shape, rows)

    def dense(self, dtype: torch.dtype, copy: bool = True) -> Tensor:
        state = self.state
        scales = vars(state).get("flat_scales")  # (blocks,), kept at half a bit a value: they take three operators
        if scales is None or scales.device != self.packed.device:
            from bitsandbytes.functional import dequantize_blockwise  # a compiler traces no `optional_package`

            scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
            if not backends.is_traced():  # a compiler lets no tensor leave its graph so
                state.flat_scales = scales
        written = dtype if dtype in backends.LOW_PRECISION else torch.float32  # bitsandbytes rounds on the way
        blocks = backends.dequantize_nf4(self.packed, scales, self.BLOCK, state.shape, written)
        dense = blocks.flatten()[: math.prod(self._full_shape)].view(self._full_shape)  # the last may not be full
        return dense[self._rows].to(dtype)


def bitsandbytes_functional():
    """`bitsandbytes.functional`, imported here, since only 4-bit weights need it. InputError if it is missing."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # without CUDA it warns of optimizers, unused here
    return optional_package("bitsandbytes", "a weight in 4 bits").functional
