"""The kernels of all adapted convolutions of a model with their BatchNorms folded in, those of one shape at a time.

Layer by layer a kernel ``g (W + s B A)`` takes seven operators forward and one backward, which a GPU has to wait for.
Here it takes two, and one more for all of a shape.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora.frozen_norms import constant_scale_and_shift
from lora.nf4 import NF4Weight, dense_weight


class Folded(NamedTuple):
    """A convolution whose BatchNorm is in its kernel: ``kernel x + shift``, with ``kernel = g W + sB A``."""

    A: Tensor  # (r, in / groups * kh * kw)
    sB: Tensor  # s g B, (out, r)
    kernel: Tensor  # (out, in / groups, kh, kw), rounded once
    shift: Tensor  # (out,)
    # If the BatchNorm follows the adapters: log |g| but for a constant, and the shift; these take their gradients.
    followed: tuple[Tensor, Tensor] | None = None


class Constants:
    """What BatchNorms give their convolutions, kept as long as all that they depend on stays what it is."""

    def __init__(self, pairs: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]]):
        self.pairs = pairs
        self.state = None
        self.sources = []
        self.values = []

    def of(self, dtype: torch.dtype) -> tuple[list[tuple[Tensor, Tensor]], bool]:
        """For each pair g (out, 1, 1, 1) in float32 and the shift (out,) in ``dtype``; and are they new?"""
        sources = []
        for conv, norm in self.pairs:
            weights, buffers = norm._parameters, norm._buffers
            # PyTorch counts the batch where it changes the statistics, but not their versions.
            sources += buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
            sources += weights["weight"], weights["bias"], conv._parameters["bias"]
        sources = [t for t in sources if t is not None]
        state = [dtype, *(norm.eps for _, norm in self.pairs)]
        state += [t.data_ptr() for t in sources]
        state += [t._version for t in sources]
        if state == self.state:
            return self.values, False
        values = [constant_scale_and_shift(norm, conv.bias) for conv, norm in self.pairs]
        self.values = [(scale.float()[:, None, None, None], shift.to(dtype)) for scale, shift in values]
        # The aliases keep the memory from being used again for other numbers.
        self.state, self.sources = state, [t.detach() for t in sources]
        return self.values, True


def fold_together(
    weights: Sequence[Tensor | NF4Weight], scales: Sequence[Tensor], A: Tensor, sB: Tensor, dtype: torch.dtype
) -> Sequence[Tensor]:
    """``g W + sB A`` for n convolutions of one shape and memory format, rounded once to ``dtype``.

    Args:
        weights: (out, in / groups, kh, kw) each.
        scales: g, (out, 1, 1, 1) each, float32.
        A: (n, r, in / groups * kh * kw), float32.
        sB: (n, out, r), float32.
    """
    n, (out, channels, kh, kw) = len(weights), weights[0].shape
    if lies_last(weights[0]):
        kernels = A.new_empty(n, out, kh, kw, channels)
        A = A.view(n, -1, channels, kh, kw).permute(0, 1, 3, 4, 2)
        as_weights = kernels.permute(0, 1, 4, 2, 3)
    else:
        as_weights = kernels = A.new_empty(n, out, channels, kh, kw)
    for weight, scale, kernel in zip(weights, scales, as_weights.unbind(), strict=True):
        W = weight if isinstance(weight, Tensor) else dense_weight(weight, torch.float32)
        torch.mul(W, scale, out=kernel)
    kernels.view(n, out, -1).baddbmm_(sB, A.reshape(n, -1, channels * kh * kw))
    return as_weights.to(dtype).unbind()


def lies_last(weight: Tensor | NF4Weight) -> bool:
    """Do the channels of a kernel lie last in memory, and only so?"""
    channels_last = isinstance(weight, Tensor) and weight.is_contiguous(memory_format=torch.channels_last)
    return channels_last and not weight.is_contiguous()
