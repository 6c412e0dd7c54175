"""The products of an adapted linear layer that have the rank for a side, in the form that suits the device.

On a CPU a pass over memory is what costs: thin matrices lie transposed, with the long dimension contiguous, and the
groups of a packed weight take turns. On a GPU every kernel costs: the groups are one product, the thin product comes
first and the wide one adds to it, so that the thin one reads no output, and nothing is transposed or copied. A compiler
for a GPU is given the sum by itself, in float32: it adds where it computes what comes next, and would copy a matrix
before it lets a product add to it.

    h  = x A^T              (N, groups r)
    gh = s gy B             (N, groups r)
    gA = gh^T x             (groups r, in)
    gB = s gy^T h           (out, r)
"""

import torch
from torch import Tensor

from lora import backends, int8
from lora.int8 import Int8Weight


def add_side_path(
    rows: Tensor, W: Tensor | Int8Weight, bias: Tensor | None, h: Tensor, B: Tensor, scaling: float, groups: int
) -> Tensor:
    """``rows W^T + b + s h B^T``, (N, out).

    Args:
        rows: (N, in).
        W: (out, in), the weights of ``groups`` layers stacked by rows.
        h: (N, groups r).
        B: (out, r).
    """
    if h.shape[1] == 0:  # a layer of rank 0: adding nothing would read and write y as well
        return int8.linear(rows, W, bias)
    if backends.counts_kernels(rows):
        if backends.is_traced() and not isinstance(W, Int8Weight):
            own = torch.bmm(_apart(h, groups), B.unflatten(0, (groups, -1)).mT)  # (groups, N, out / groups)
            y = _sum(rows @ W.T, own.transpose(0, 1).flatten(1), scaling)
            return (y if bias is None else y + bias).to(rows.dtype)
        wide = _side_by_side(B, groups)  # (out, groups r)
        if isinstance(W, Int8Weight):
            return W.linear(rows, bias).addmm_(h, wide.T, alpha=scaling)
        if bias is None:
            y = h.new_empty(h.shape[0], W.shape[0]).addmm_(h, wide.T, beta=0, alpha=scaling)
        else:
            y = torch.addmm(bias, h, wide.T, alpha=scaling)
        return y.addmm_(rows, W.T)
    y = int8.linear(rows, W, bias)
    width = W.shape[0] // groups
    for g, (h_g, B_g) in enumerate(zip(h.chunk(groups, 1), B.chunk(groups), strict=True)):
        # (N, r) -> (N, out / groups), in place: in a slice, as torch.export lets no chunk be changed.
        y[:, g * width : (g + 1) * width].addmm_(h_g, B_g.T, alpha=scaling)
    return y


def adapter_gradients(
    gy: Tensor, rows: Tensor, h: Tensor | None, A: Tensor, B: Tensor, scaling: float, groups: int, *needed: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute gh (N, groups r) and, where needed, gA (groups r, in) and gB (out, r). h is computed if it is None."""
    gradients = _in_few_kernels if backends.counts_kernels(gy) else _in_few_passes
    return gradients(gy, rows, h, A, B, scaling, groups, *needed)


def _in_few_kernels(gy, rows, h, A, B, scaling, groups, need_A, need_B):
    h = rows @ A.T if h is None else h
    gB = None
    if groups == 1:  # beta=0: of the first operand only the shape counts
        gh = torch.addmm(h, gy, B, beta=0, alpha=scaling)
        gB = torch.addmm(B, gy.T, h, beta=0, alpha=scaling) if need_B else None
    else:
        gy = _apart(gy, groups)
        own_B = B.view(groups, -1, B.shape[1])
        if backends.is_traced():  # a compiler cannot change such a view
            gh = torch.baddbmm(_apart(h, groups), gy, own_B, beta=0, alpha=scaling).transpose(0, 1).flatten(1)
        else:
            gh = torch.empty_like(h)
            _apart(gh, groups).baddbmm_(gy, own_B, beta=0, alpha=scaling)
        if need_B:
            gB = torch.baddbmm(own_B, gy.mT, _apart(h, groups), beta=0, alpha=scaling).view(B.shape)
    return gh, gh.T @ rows if need_A else None, gB


def _in_few_passes(gy, rows, h, A, B, scaling, groups, need_A, need_B):
    # The thin matrices lie transposed, with the long dimension contiguous: up to six times faster.
    gy_groups = gy.chunk(groups, 1)
    pairs = zip(B.chunk(groups), gy_groups, strict=True)
    gh = [backends.product(B_g.T.contiguous(), gy_g.T) for B_g, gy_g in pairs]
    gh = _stacked(gh).mul_(scaling)  # (groups r, N)
    gA = backends.product(gh, rows) if need_A else None
    gB = None
    if need_B:
        h = backends.product(A, rows.T) if h is None else h.T.contiguous()  # (groups r, N)
        pairs = zip(h.chunk(groups), gy_groups, strict=True)
        gB = [backends.product(h_g, gy_g).T for h_g, gy_g in pairs]
        gB = _stacked(gB).mul_(scaling)
    return gh.T, gA, gB


def input_gradient(gy: Tensor, W: Tensor | Int8Weight, gh: Tensor, A: Tensor) -> Tensor:
    """``gy W + gh A``, (N, in)."""
    if backends.counts_kernels(gy):
        gx = gh @ A
        if isinstance(W, Int8Weight):
            return W.input_gradient(gy).add_(gx)
        return _sum(gy @ W, gx).to(gy.dtype) if backends.is_traced() else gx.addmm_(gy, W)
    return int8.input_gradient(gy, W).addmm_(gh, A)


def _apart(matrix: Tensor, groups: int) -> Tensor:
    """(N, groups n) as (groups, N, n), a view."""
    rows, columns = matrix.shape
    return matrix.view(rows, groups, columns // groups).transpose(0, 1)


def side_by_side(B: Tensor, groups: int) -> Tensor:
    """``groups`` matrices stacked by rows, (..., out, r), as a block-diagonal one, (..., out, groups r)."""
    blocks = B.unflatten(-2, (groups, -1))  # (..., groups, out / groups, r)
    wide = B.new_zeros(*blocks.shape[:-1], groups, B.shape[-1])
    wide.diagonal(dim1=-4, dim2=-2).copy_(blocks.movedim(-3, -1))
    return wide.view(*B.shape[:-1], -1)


def _side_by_side(B: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return B
    # Of all layers at once, by `lora.together`, which leaves it to a compiler to fuse them.
    known = None if backends.is_traced() else vars(B).get("side_by_side")
    return side_by_side(B, groups) if known is None else known


def _sum(wide: Tensor, thin: Tensor, scaling: float = 1.0) -> Tensor:
    """``wide + s thin``, in float32 or more."""
    precise = torch.promote_types(wide.dtype, torch.float32)
    return wide.to(precise) + scaling * thin.to(precise)


def _stacked(parts: list[Tensor]) -> Tensor:
    """`torch.cat` that does not copy a single tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
