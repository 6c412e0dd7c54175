"""Factors and biases of all adapted layers, rounded to the dtype of the products at once.

A and B are float32, and 16 bits in a product. Layer by layer that takes two kernels forward and two backward for each,
which on a GPU take longer than the numbers that they move. A fused model rounds them together as its forward pass
begins, and their gradients come back together. What is not there is rounded by the layer itself, to the same numbers.
"""

import contextlib
import itertools
import math
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora import backends, thin
from lora.adapted import is_adapted
from lora.backends import LOW_PRECISION


class _Now(threading.local):
    rounded: dict[int, Tensor] | None = None  # within a forward pass, by the id of the first of what was joined


_now = _Now()


class Run(NamedTuple):
    """Tensors of one shape, which lie one after another in a row of numbers."""

    number: int
    joined: int  # so many of them are joined row by row, as those of packed q, k and v are
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return self.number * self.joined * math.prod(self.shape)


class Plan:
    """What there is to round in a model, in an order in which tensors of one shape are neighbours."""

    def __init__(self, model: nn.Module):
        layers = [module for module in model.modules() if is_adapted(module)]
        self.joined, self.runs = _in_runs(factors for layer in layers for factors in _factors(layer))
        self.factors = [factor for factors in self.joined for factor in factors]
        biases = (bias for layer in layers if (bias := _frozen_bias(layer)) is not None)
        biases, self.bias_runs = _in_runs([bias] for bias in biases)
        self.biases = [bias for (bias,) in biases]
        # Which of the joined are B of packed q, k and v, a range for each shape: products want them side by side.
        of_q = {id(layer._parameters.get("lora_B_q")) for layer in layers}
        ends = itertools.accumulate(run.number for run in self.runs)
        ranges = (slice(end - run.number, end) for run, end in zip(self.runs, ends, strict=True))
        self.packed = [some for some in ranges if id(self.joined[some][0][0]) in of_q]


def _in_runs(tensors: Iterable[list[Tensor]]) -> tuple[list[list[Tensor]], list[Run]]:
    kinds: dict[tuple, list[list[Tensor]]] = {}
    for joined in tensors:
        kinds.setdefault((len(joined), joined[0].shape), []).append(joined)
    return list(itertools.chain(*kinds.values())), [Run(len(own), *kind) for kind, own in kinds.items()]


def _apart(flat: Tensor, runs: list[Run], joined: bool) -> list[Tensor]:
    """Views of the numbers in a row, for each tensor or for each group of joined ones.

    By runs, since a view of its own for each takes as long as a product.
    """
    parts = []
    for run, own in zip(runs, flat.split([run.numel for run in runs]), strict=True):
        rows, *rest = run.shape
        shape = (run.number, run.joined * rows, *rest) if joined else (run.number * run.joined, rows, *rest)
        parts += own.view(shape).unbind()
    return parts


def _factors(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Those that products take as they are; a convolution's B is scaled by its BatchNorm first."""
    for prefix in ("lora_A",) if isinstance(layer, nn.Conv2d) else ("lora_A", "lora_B"):
        factors = [p for name, p in layer._parameters.items() if name.startswith(prefix) and p is not None]
        alike = len({factor.shape[1:] for factor in factors}) == 1
        if alike and all(factor.dtype == torch.float32 and factor.numel() for factor in factors):
            yield factors


def _frozen_bias(layer: nn.Module) -> Tensor | None:
    if isinstance(layer, nn.Conv2d):  # its BatchNorm makes another of it
        return None
    bias = layer._parameters.get("in_proj_bias", layer._parameters.get("bias"))
    return None if bias is None or bias.requires_grad or bias.dtype != torch.float32 else bias


_PLANS: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


def forget_plan(model: nn.Module) -> None:
    """Its layers have changed."""
    _PLANS.pop(model, None)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, dtype, *factors):
        ctx.set_materialize_grads(False)  # a layer that took no part gets no gradient
        ctx.plan, ctx.dtype = plan, dtype
        return tuple(_apart(backends.flatten_dense_tensors(factors).to(dtype), plan.runs, joined=True))

    @staticmethod
    def backward(ctx, *gradients):
        plan = ctx.plan
        dtype, absent = plan.factors[0].dtype, [i for i, gradient in enumerate(gradients) if gradient is None]
        gradients = list(gradients)
        for i in absent:
            gradients[i] = torch.zeros_like(torch.cat(plan.joined[i]), dtype=ctx.dtype)
        parts = _apart(backends.flatten_dense_tensors(gradients).to(dtype), plan.runs, joined=False)
        if absent:
            of_factor = [i for i, factors in enumerate(plan.joined) for _ in factors]
            parts = [None if i in absent else part for i, part in zip(of_factor, parts, strict=True)]
        return None, None, *parts


@contextlib.contextmanager
def rounded_together(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Within this block, in which the model's forward pass of x runs, `rounded` finds all."""
    device = x.device.type
    known = _now.rounded is not None  # by a block around this one
    if known or not backends.counts_kernels(x) or backends.is_traced() or not torch.is_autocast_enabled(device):
        yield
        return
    dtype = torch.get_autocast_dtype(device)
    plan = _PLANS.get(model) or _PLANS.setdefault(model, Plan(model))
    _now.rounded = {}
    try:
        if plan.factors and dtype in LOW_PRECISION:
            rounded = _Rounded.apply(plan, dtype, *plan.factors)
            _put_side_by_side(plan, rounded)
            _now.rounded = {id(factors[0]): low for factors, low in zip(plan.joined, rounded, strict=True)}
        if plan.biases and dtype in LOW_PRECISION:
            flat = backends.flatten_dense_tensors(plan.biases).to(dtype)
            biases = _apart(flat, plan.bias_runs, joined=True)
            _now.rounded |= {id(bias): low for bias, low in zip(plan.biases, biases, strict=True)}
        yield
    finally:
        _now.rounded = None


@torch.no_grad()
def _put_side_by_side(plan: Plan, rounded: Sequence[Tensor]) -> None:
    """Let each packed B know what `thin.add_side_path` multiplies by: for all layers in three kernels, not for each."""
    for some in plan.packed:
        wide = thin.side_by_side(torch.stack(rounded[some]), groups=3)
        for B, own in zip(rounded[some], wide.unbind(), strict=True):
            B.side_by_side = own


def rounded(
    A: Tensor | Sequence[Tensor], B: Tensor | Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors, those of several layers joined row by row, and the bias; in ``dtype`` what was prepared in it."""
    known = None if backends.is_traced() else _now.rounded
    if known is not None and bias is not None:
        low = known.get(id(bias._base if bias._is_view() else bias))
        bias = low if low is not None and low.dtype == dtype and low.shape == bias.shape else bias
    return _rounded(known, A, dtype), _rounded(known, B, dtype), bias


def rounded_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """One factor alone."""
    return _rounded(None if backends.is_traced() else _now.rounded, factor, dtype)


def _rounded(known: dict[int, Tensor] | None, factors: Tensor | Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    first, count = (factors, 1) if isinstance(factors, Tensor) else (factors[0], len(factors))
    low = None if known is None else known.get(id(first))
    if low is not None and low.dtype == dtype and low.shape[0] == count * first.shape[0]:
        return low
    return first if count == 1 else torch.cat(factors)
