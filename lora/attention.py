"""Attention of several heads, and its masks."""

import contextlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora import backends


def once_each(function: Callable, *tensors: Tensor) -> list:
    """Call the function once for each distinct tensor, and return one result for each tensor."""
    results = {}
    for tensor in tensors:
        if id(tensor) not in results:
            results[id(tensor)] = function(tensor)
    return [results[id(tensor)] for tensor in tensors]


def attention_mask(q: Tensor, k: Tensor, heads: int, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """Combine the two masks of `nn.MultiheadAttention` into one to add to the scores, broadcastable to (N, H, L, S)."""
    N, L, _ = q.shape
    S = k.shape[1]
    mask = _additive("attn_mask", mask, q.dtype, (L, S), (N * heads, L, S))
    padding = _additive("key_padding_mask", padding, q.dtype, (N, S))
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (N, heads))
    if padding is None:
        return mask
    padding = padding[:, None, None]  # (N, 1, 1, S)
    return padding if mask is None else mask + padding


def _additive(name: str, mask: Tensor | None, dtype: torch.dtype, *shapes: tuple[int, ...]) -> Tensor | None:
    if mask is None:
        return None
    if tuple(mask.shape) not in shapes:  # it might broadcast and mask something else
        raise RuntimeError(f"{name} has shape {tuple(mask.shape)}, it must be {' or '.join(map(str, shapes))}")
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, of: nn.MultiheadAttention, mask=None, need_weights=False) -> tuple:
    """Attention of several heads: q (N, L, E), k, v (N, S, E) -> (N, L, E); its weights (N, H, L, S) if asked for."""
    q, k, v = (t.unflatten(-1, (of.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (N, ., E) -> (N, H, ., D)
    weights = None
    dropout = of.dropout if of.training else 0.0
    if need_weights:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (N, H, L, S)
        if mask is not None:  # as `attention_mask` returns it
            scores = scores + mask
        weights = F.dropout(scores.softmax(-1), dropout)
        attended = weights.to(v.dtype) @ v
    else:
        kernels = contextlib.nullcontext()
        if q.device.type == "cuda" and q.shape[-2] == 1 and not backends.is_traced():
            # Not cuDNN's, whose gradient for a single query may be NaN (github.com/NVIDIA/cudnn-frontend, issue 1072).
            kernels = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
        with kernels:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    return attended.transpose(1, 2).flatten(-2), weights
