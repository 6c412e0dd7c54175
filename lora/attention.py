"""Attention of several heads: masks, and the fastest kernel for bfloat16 on a CPU."""

import contextlib
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora import backends
from lora.backends import ONEDNN_DTYPES, PROCESSOR

# On a CPU with products in bfloat16 PyTorch's attention is made of many small ones, unless there is a matrix unit
# (AMX), for which it has a path of its own. `_Attention` is faster up to MOST_SCORES scores in a head, one for each
# query and key, and slower above.
PREFERS_BATCHED_ATTENTION = torch.bfloat16 in ONEDNN_DTYPES and "avx512_bf16" in PROCESSOR and "amx_" not in PROCESSOR
MOST_SCORES = 2**19
# `_Attention` computes about this many scores at a time, for some images or for some heads of one image.
SCORES_AT_A_TIME = 2**19
# Attention's weights may be kept for backward if keys <= MOST_KEYS_KEPT * head width. They then take at most that many
# times the memory of q: 3.1 times in a ViT-B/16 at 224 pixels; at 384 it would be 9 times.
MOST_KEYS_KEPT = 4


def once_each(function: Callable, *tensors: Tensor) -> list:
    """Call the function once for each distinct tensor, and return one result for each tensor."""
    distinct = {id(tensor): tensor for tensor in tensors}
    results = {key: function(tensor) for key, tensor in distinct.items()}
    return [results[id(tensor)] for tensor in tensors]


def attention_mask(
    q: Tensor, k: Tensor, num_heads: int, attn_mask: Tensor | None = None, key_padding_mask: Tensor | None = None
) -> Tensor | None:
    """Combine the two masks of `nn.MultiheadAttention` into one to add to the scores, broadcastable to (N, H, L, S)."""
    N, L, _ = q.shape
    S = k.shape[1]
    mask = _additive("attn_mask", attn_mask, q.dtype, (L, S), (N * num_heads, L, S))
    padding = _additive("key_padding_mask", key_padding_mask, q.dtype, (N, S))
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (N, num_heads))
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


def attend(
    q: Tensor,  # (N, L, E)
    k: Tensor,  # (N, S, E), as v
    v: Tensor,
    num_heads: int,
    mask: Tensor | None = None,  # as `attention_mask` returns it
    dropout: float = 0.0,
    need_weights: bool = False,
    keep_weights: bool = False,  # for backward, where they are computed here and take little memory: 40% less time
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention of several heads: (N, L, E), and its weights (N, H, L, S) if asked for."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (N, ., E) -> (N, H, ., D)
    weights = None
    if need_weights:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (N, H, L, S)
        if mask is not None:
            scores = scores + mask
        weights = F.dropout(scores.softmax(-1), dropout)
        attended = weights.to(v.dtype) @ v
    elif mask is None and dropout == 0 and _batched_attention_pays(q, k, v):
        keep_weights = keep_weights and torch.is_grad_enabled() and k.shape[-2] <= MOST_KEYS_KEPT * k.shape[-1]
        attended = _Attention.apply(q, k, v, keep_weights)
    else:
        kernels = contextlib.nullcontext()
        if q.device.type == "cuda" and q.shape[-2] == 1 and not backends.is_traced():
            # Not cuDNN's, whose gradient for a single query may be NaN (github.com/NVIDIA/cudnn-frontend, issue 1072).
            kernels = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
        with kernels:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    return attended.transpose(1, 2).flatten(-2), weights


def _batched_attention_pays(q: Tensor, k: Tensor, v: Tensor) -> bool:
    in_bf16 = q.device.type == "cpu" and q.dtype == k.dtype == v.dtype == torch.bfloat16
    able = PREFERS_BATCHED_ATTENTION and torch.backends.mkldnn.enabled and not backends.is_traced()
    return in_bf16 and able and 0 < q.shape[-2] * k.shape[-2] <= MOST_SCORES


class _Attention(torch.autograd.Function):
    """``softmax(q k^T / sqrt(D)) v`` of bfloat16 tensors (N, H, ., D) by products over all heads at once.

    Scores and softmax are in float32; backward computes the weights again, unless `keep_weights` saves them.
    """

    @staticmethod
    def forward(ctx, q, k, v, keep_weights=False):
        attended = torch.empty_like(q)  # heads of a token side by side in memory, as in q
        kept = q.new_empty(*q.shape[:-1], k.shape[-2]) if keep_weights else None
        for part in _parts_of_heads(q, k):
            q_p, k_p, v_p = (t[part].flatten(0, 1) for t in (q, k, v))
            weights = _attention_weights(q_p, k_p)
            if keep_weights:
                kept[part] = weights.view_as(kept[part])
            attended[part] = (weights @ v_p).view_as(attended[part])
        ctx.save_for_backward(q, k, v, kept)
        return attended

    @staticmethod
    @backends.first_derivative
    def backward(ctx, gy):
        q, k, v, kept = ctx.saved_tensors
        scaling = 1 / math.sqrt(q.shape[-1])
        gq, gk, gv = map(torch.empty_like, (q, k, v))
        for part in _parts_of_heads(q, k):
            q_p, k_p, v_p, gy_p = (t[part].flatten(0, 1) for t in (q, k, v, gy.to(q.dtype)))
            weights = _attention_weights(q_p, k_p) if kept is None else kept[part].flatten(0, 1)
            gv[part] = (weights.mT @ gy_p).view_as(gv[part])
            # A constant added to all values changes no score's gradient, so the mean goes: it would only be rounded.
            g_weights = gy_p @ (v_p - v_p.mean(1, keepdim=True)).mT
            g_scores = backends.softmax_gradient(g_weights, weights, -1, weights.dtype)
            gq[part] = (g_scores @ k_p).mul_(scaling).view_as(gq[part])
            gk[part] = (g_scores.mT @ q_p).mul_(scaling).view_as(gk[part])
        return gq, gk, gv, None


def _attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """q: (N, L, D), k: (N, S, D) -> (N, L, S). Scores rounded to bfloat16 would double attention's error."""
    scores = q.new_empty(len(q), q.shape[1], k.shape[1], dtype=torch.float32)
    # In place, as in `effective_weight`.
    scores.baddbmm_(q.float(), k.float().mT, beta=0, alpha=1 / math.sqrt(q.shape[-1]))
    return scores.softmax(-1).to(q.dtype)


def _parts_of_heads(q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
    """Which images and which heads of them to compute at a time."""
    N, H, L, _ = q.shape
    scores = L * k.shape[2]  # of a head
    images = max(SCORES_AT_A_TIME // (H * scores), 1)
    heads = max(SCORES_AT_A_TIME // scores, 1)
    firsts = itertools.product(range(0, N, images), range(0, H, heads))
    return [(slice(n, n + images), slice(h, h + heads)) for n, h in firsts]
