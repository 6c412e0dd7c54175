"""A ViT's block with adapters in two operations around attention's heads: what a GPU waits for is Python.

    q, k, v = heads(qkv(ln_1(x)))                        `queries_keys_values`
    x = x + out_proj(attend(q, k, v))                    `rest_of_block`
    x = x + second(gelu(first(ln_2(x))))                 `rest_of_block`

The numbers, what is saved and what is computed again in backward are those of `lora.functional.lora_linear` layer by
layer. But there are four nodes of autograd in a block in place of some twenty, and nothing is asked twice. With `keep`
the outputs of LayerNorm and GELU are saved, not computed again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora import backends, functional
from lora.functional import adapted_input_gradient, adapted_product, compute_dtype, pull_back
from lora.nf4 import NF4Weight


class Frozen(NamedTuple):
    """The frozen part of an adapted layer, or of several layers on one input with their weights stacked by rows."""

    weight: Tensor | NF4Weight  # (out, in)
    bias: Tensor | None  # (out,)
    scaling: float
    groups: int = 1


def _product(rows: Tensor, layer: Frozen, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor | None]:
    return adapted_product(rows, layer.weight, A, B, layer.bias, layer.scaling, layer.groups)


def _adapter_gradients(
    gy: Tensor, rows: Tensor, h: Tensor | None, layer: Frozen, A: Tensor, B: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return functional.adapter_gradients(gy, rows, h, A, B, layer.scaling, layer.groups, *needed)


def _input_gradient(gy: Tensor, gh: Tensor, layer: Frozen, A: Tensor, B: Tensor) -> Tensor:
    return adapted_input_gradient(gy, gh, layer.weight, A, B, layer.scaling, layer.groups)


def _normalized_rows(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """``norm(x)`` as rows (N L, E) in ``dtype``, and what its derivative needs beside x (N, L, E)."""
    x = x.flatten(0, -2)
    y, *statistics = backends.layer_norm(x if norm.weight is None else _in(norm.weight.dtype, x), norm)
    return _in(dtype, y), statistics


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # a call that changes nothing takes time as well


class _QueriesKeysValues(torch.autograd.Function):
    """The heads of q, k and v from one product; or q of the first tokens alone, and k and v of all from another."""

    @staticmethod
    def forward(ctx, x, A, B, settings):
        ctx.settings = norm, layers, tokens, num_heads, dtype, keep = settings
        A, B = _in(dtype, A), _in(dtype, B)
        rows, statistics = _normalized_rows(x, norm, dtype)
        ys, hs = [], []
        for layer, own_A, own_B, own_rows in zip(layers, *_split(layers, A, B), _inputs(rows, x, tokens), strict=True):
            y, h = _product(own_rows, layer, own_A, own_B)
            ys.append(y.view(len(x), -1, y.shape[1]))
            hs.append(h)
        ctx.save_for_backward(x, A, B, *((rows, *statistics) if keep else ()), *hs)
        if tokens is not None:
            return tuple(ys)
        return ys[0].view(*x.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    @backends.first_derivative
    def backward(ctx, *gradients):
        x, A, B, *hs = ctx.saved_tensors
        norm, layers, tokens, _, dtype, keep = ctx.settings
        need_x, *needed, _ = ctx.needs_input_grad
        if tokens is None:  # (N, H, L, D) three times -> (N, L, 3 H, D)
            gradients = [torch.cat([g.transpose(1, 2) for g in gradients], 2).flatten(2)]
        if keep:
            rows, *statistics = hs[:3]
            del hs[:3]
        else:
            rows, statistics = _normalized_rows(x, norm, dtype)
        own = zip(layers, *_split(layers, A, B), strict=True)
        gx = None
        gAs = []
        gBs = []
        for (layer, *factors), gy, h, own_rows in zip(own, gradients, hs, _inputs(rows, x, tokens), strict=True):
            gy = _in(dtype, gy).flatten(0, 1)
            gh, gA, gB = _adapter_gradients(gy, own_rows, h, layer, *factors, needed)
            gAs.append(gA)
            gBs.append(gB)
            if need_x:
                g_rows = _input_gradient(gy, gh, layer, *factors)
                gx = g_rows if gx is None else _plus_first_tokens(g_rows, gx, x)
        del rows, own_rows  # of the input's size, and no longer needed
        if need_x:
            gx = pull_back(norm, gx, x.flatten(0, -2), statistics).view(x.shape)
        return gx, *(_joined(parts) if need else None for parts, need in zip((gAs, gBs), needed, strict=True)), None


def _split(layers: Sequence[Frozen], *factors: Tensor) -> list[Sequence[Tensor]]:
    """The rows of each factor that belong to each layer."""
    if len(layers) == 1:
        return [(factor,) for factor in factors]
    return [factor.split([len(factor) // 3 * layer.groups for layer in layers]) for factor in factors]


def _inputs(rows: Tensor, x: Tensor, tokens: int | None) -> tuple[Tensor, ...]:
    """The inputs of the layers, (N L, E); with ``tokens`` the first layer reads the first tokens alone."""
    return (rows,) if tokens is None else (rows.view(x.shape)[:, :tokens].flatten(0, 1), rows)


def _plus_first_tokens(rows: Tensor, of_tokens: Tensor, x: Tensor) -> Tensor:
    """Add the gradients of the first tokens, (N tokens, E), to those of all tokens, (N L, E), in place."""
    first = of_tokens.view(len(x), -1, of_tokens.shape[1])
    rows.view(x.shape)[:, : first.shape[1]].add_(first)
    return rows


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def queries_keys_values(
    x: Tensor, norm: nn.LayerNorm, attention: nn.MultiheadAttention, tokens: int | None = None, keep: bool = False
) -> Sequence[Tensor]:
    """Queries, keys and values of an adapted attention, (N, H, L, D) each, of ``norm(x)``. x: (N, L, E).

    Args:
        tokens: compute the queries of this many first tokens alone, (N, H, tokens, D).
        keep: save LayerNorm's output for backward.
    """
    dtype = compute_dtype(x)
    parameters = attention._parameters
    A, B = ([parameters[f"lora_{factor}_{projection}"] for projection in "qkv"] for factor in "AB")
    A, B, bias = torch.cat(A), torch.cat(B), parameters["in_proj_bias"]
    layer = Frozen(attention.base("in_proj_weight"), bias if bias is None else _in(dtype, bias), attention.scaling, 3)
    E, heads = x.shape[2], (attention.num_heads, -1)
    if tokens is None:
        return _QueriesKeysValues.apply(x, A, B, (norm, (layer,), None, heads[0], dtype, keep))
    layers = _rows(layer, slice(0, E), 1), _rows(layer, slice(E, None), 2)
    q, kv = _QueriesKeysValues.apply(x, A, B, (norm, layers, tokens, heads[0], dtype, keep))
    # Apart outside, since within a backward pass its inputs stay: in a ViT's last block memory is at its peak.
    return [t.unflatten(-1, heads).transpose(1, 2) for t in (q, *kv.chunk(2, -1))]


def _rows(layer: Frozen, rows: slice, groups: int) -> Frozen:
    bias = layer.bias if layer.bias is None else layer.bias[rows]
    return Frozen(layer.weight[rows], bias, layer.scaling, groups)


class _RestOfBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attended, residual, A, B, A_1, B_1, A_2, B_2, settings):
        ctx.settings = out_proj, norm, first, gelu, second, dtype, keep = settings
        A, B, A_1, B_1, A_2, B_2 = factors = [_in(dtype, factor) for factor in (A, B, A_1, B_1, A_2, B_2)]
        ctx.num_heads = attended.shape[1]
        attended = _in(dtype, attended.transpose(1, 2).flatten(2))  # (N, H, L, D) -> (N, L, E)
        y, h = _product(attended.flatten(0, 1), out_proj, A, B)
        y = y.view(residual.shape)
        x = y + residual
        rows, statistics = _normalized_rows(x, norm, dtype)
        u, h_1 = _product(rows, first, A_1, B_1)
        again = (rows, *statistics) if keep else (None, None, None)
        del rows, statistics
        activated = _gelu(u, gelu)
        z, h_2 = _product(activated, second, A_2, B_2)
        again += (activated if keep else None,)
        del activated
        # In low precision x is in float32, but attention's share is half as wide, and the rest is saved anyway.
        kept = (y, residual) if y.dtype != x.dtype else (x, None)
        ctx.save_for_backward(attended, *kept, u.view(*x.shape[:2], -1), *again, h, h_1, h_2, *factors)
        return x + z.view(x.shape)

    @staticmethod
    @backends.first_derivative
    def backward(ctx, gradient):
        attended, x, residual, u, rows, mean, deviation, activated, h, h_1, h_2, *factors = ctx.saved_tensors
        A, B, A_1, B_1, A_2, B_2 = factors
        backends.clear_saved_tensors(ctx)  # each goes when it has been used
        out_proj, norm, first, gelu, second, dtype, _ = ctx.settings
        need_attended, need_residual, *needed, _ = ctx.needs_input_grad
        need_x = need_attended or need_residual or any(needed[:2])
        shape, u = x.shape, u.flatten(0, -2)

        gz = _in(dtype, gradient).flatten(0, -2)
        activated = _gelu(u, gelu) if activated is None else activated
        gh, gA_2, gB_2 = _adapter_gradients(gz, activated, h_2, second, A_2, B_2, needed[4:6])
        del activated
        gu = _input_gradient(gz, gh, second, A_2, B_2)
        gu = pull_back(gelu, gu, u, [])
        del u, gz

        x = (x if residual is None else x + residual).flatten(0, -2)
        statistics = [mean, deviation]
        if rows is None:
            rows, statistics = _normalized_rows(x, norm, dtype)
        gh, gA_1, gB_1 = _adapter_gradients(gu, rows, h_1, first, A_1, B_1, needed[2:4])
        del rows
        gx = g_attended = gA = gB = None
        if need_x:
            gx = _input_gradient(gu, gh, first, A_1, B_1)
            del gu
            gx = pull_back(norm, gx, x, statistics).view(shape).add_(gradient)
            del x
            gy = _in(dtype, gx).flatten(0, -2)
            gh, gA, gB = _adapter_gradients(gy, attended.flatten(0, 1), h, out_proj, A, B, needed[:2])
            if need_attended:
                g_attended = _input_gradient(gy, gh, out_proj, A, B).view(*shape[:2], ctx.num_heads, -1).transpose(1, 2)
        return g_attended, gx if need_residual else None, gA, gB, gA_1, gB_1, gA_2, gB_2, None


def _gelu(x: Tensor, gelu: nn.GELU) -> Tensor:
    return torch.nn.functional.gelu(x, approximate=gelu.approximate)


def rest_of_block(
    attended: Tensor,
    residual: Tensor,
    out_proj: nn.Linear,
    norm: nn.LayerNorm,
    first: nn.Linear,
    gelu: nn.GELU,
    second: nn.Linear,
    keep: bool = False,
) -> Tensor:
    """``x + second(gelu(first(norm(x))))`` with ``x = residual + out_proj(attended)``, (N, L, E), of adapted layers.

    Args:
        attended: what attention's heads return, (N, H, L, D).
        residual: (N, L, E).
        keep: save the outputs of LayerNorm and GELU for backward.
    """
    dtype = compute_dtype(residual)
    factors, frozen = [], []
    for layer in (out_proj, first, second):
        parameters = layer._parameters
        A, B, bias = parameters["lora_A"], parameters["lora_B"], parameters["bias"]
        factors += [A, B]
        frozen.append(Frozen(layer.base(), bias if bias is None else _in(dtype, bias), layer.scaling))
    settings = frozen[0], norm, frozen[1], gelu, frozen[2], dtype, keep
    return _RestOfBlock.apply(attended, residual, *factors, settings)
