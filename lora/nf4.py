"""Frozen weights in 4 bits."""

import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora import backends
from lora.weights import Weight
from toolkit import optional_package


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
