"""What a layer multiplies by: here a weight of floats. In fewer bits it is one of `lora.nf4` or `lora.int8`."""

import torch
from torch import Tensor

from lora import backends


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
