"""Factors and biases of all adapted layers, rounded to the dtype of the products at once.

A and B are float32, and 16 bits in a product. Layer by layer that takes two kernels forward and two backward for each,
which on a GPU take longer than the numbers that they move. A fused model rounds them together as its forward pass
begins, and their gradients come back together. What is not there is rounded by the layer itself, to the same numbers.
"""

import contextlib
import functools
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora import backends, thin
from lora.adapted import is_adapted
from lora.backends import LOW_PRECISION
from lora.folding import Constants, Folded, fold_together, lies_last


class _Now(threading.local):
    rounded: dict[int, Tensor] | None = None  # within a forward pass, by the id of the first of what was joined
    folded: dict[int, Folded] | None = None  # by the id of the convolution
    fold: Callable[[], dict[int, Folded]] | None = None  # makes them
    pairs: dict[int, nn.BatchNorm2d] | None = None  # what is folded into which of these convolutions


_now = _Now()
Pairs = list[tuple[nn.Conv2d, nn.BatchNorm2d]]  # an adapted convolution, and what is folded into it


class Run(NamedTuple):
    """Tensors of one shape, which lie one after another in a row of numbers."""

    number: int
    joined: int  # how many are joined row by row, as the factors of packed q, k and v are
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return self.number * self.joined * math.prod(self.shape)


class Factors(NamedTuple):
    """Factors that a product takes as one, and what those beside them in memory have in common."""

    tensors: list[Tensor]
    kind: tuple
    pair: int | None = None  # the number of the convolution whose B this is


class Plan:
    """What there is to round in a model, in an order in which tensors of one kind are neighbours."""

    def __init__(self, model: nn.Module, pairs: Pairs):
        layers = [module for module in model.modules() if is_adapted(module)]
        numbers = {id(conv): number for number, (conv, _) in enumerate(pairs)}
        found = [factors for layer in layers for factors in _factors(layer, numbers.get(id(layer)))]
        self.pairs = pairs
        self.constants = Constants(pairs)
        self.scales = None
        self.found, self.runs = _in_runs(found)
        self.joined = [factors.tensors for factors in self.found]
        self.factors = [factor for factors in self.joined for factor in factors]
        biases = [Factors([bias], ()) for layer in layers if (bias := _frozen_bias(layer)) is not None]
        biases, self.bias_runs = _in_runs(biases)
        self.biases = [bias for ((bias,), *_) in biases]
        ends = itertools.accumulate(run.number for run in self.runs)
        self.ranges = [slice(end - run.number, end) for run, end in zip(self.runs, ends, strict=True)]
        self.kernels = [_kernel_run(self, some) for some in self.ranges if self.found[some][0].pair is not None]
        # Which are the B of packed q, k and v, a range for each shape: products want them side by side.
        of_q = {id(layer._parameters.get("lora_B_q")) for layer in layers}
        self.packed = [some for some in self.ranges if id(self.joined[some][0][0]) in of_q]


class KernelRun(NamedTuple):
    """Convolutions of one kind, and where their factors are."""

    pairs: Pairs
    numbers: list[int]
    of_A: int  # the number of the run
    of_B: int
    A: slice  # among the joined
    B: slice


def _kernel_run(plan: Plan, some: slice) -> KernelRun:
    """The run of convolutions whose B are these: their A, in the same order, are a run as well."""
    numbers = [factors.pair for factors in plan.found[some]]
    first = plan.pairs[numbers[0]][0]._parameters["lora_A"]
    (of_A,) = [i for i, own in enumerate(plan.ranges) if plan.joined[own][0][0] is first]
    pairs = [plan.pairs[number] for number in numbers]
    return KernelRun(pairs, numbers, of_A, plan.ranges.index(some), plan.ranges[of_A], some)


def _in_runs(found: list[Factors]) -> tuple[list[Factors], list[Run]]:
    kinds: dict[tuple, list[Factors]] = {}
    for factors in found:
        key = len(factors.tensors), factors.tensors[0].shape, factors.kind
        kinds.setdefault(key, []).append(factors)
    runs = [Run(len(own), number, shape) for (number, shape, _), own in kinds.items()]
    return list(itertools.chain(*kinds.values())), runs


def _apart(flat: Tensor, runs: list[Run], joined: bool) -> list[Tensor]:
    """Views of the numbers in a row, for each tensor or for each group of joined ones.

    By runs, since a view of its own for each takes as long as a product.
    """
    parts = []
    for run, own in zip(runs, _apart_by_run(flat, runs), strict=True):
        split = joined or run.joined == 1
        parts += own.unbind() if split else own.view(-1, *run.shape).unbind()
    return parts


def _apart_by_run(flat: Tensor, runs: list[Run]) -> list[Tensor]:
    """A view of each run: (number, rows of all joined, ...)."""
    shapes = [(run.number, run.joined * run.shape[0], *run.shape[1:]) for run in runs]
    return [own.view(shape) for own, shape in zip(flat.split([run.numel for run in runs]), shapes, strict=True)]


def _factors(layer: nn.Module, pair: int | None) -> Iterator[Factors]:
    """The factors that products take as they are: B of a convolution only if it is folded, as BatchNorm scales B."""
    by_kernel = isinstance(layer, nn.Conv2d)
    for prefix in ("lora_A",) if by_kernel and pair is None else ("lora_A", "lora_B"):
        factors = [p for name, p in layer._parameters.items() if name.startswith(prefix) and p is not None]
        kind = (prefix, *layer.base().shape, lies_last(layer.base())) if pair is not None else (prefix,)
        alike = len({factor.shape[1:] for factor in factors}) == 1
        if alike and all(factor.dtype == torch.float32 and factor.numel() for factor in factors):
            yield Factors(factors, kind, pair if prefix == "lora_B" else None)


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
    def forward(ctx, plan, scales, low, *factors):
        ctx.set_materialize_grads(False)  # a layer that took no part gets no gradient
        ctx.plan = plan
        ctx.dtype = low.dtype
        ctx.scales = scales
        return tuple(_apart(low, plan.runs, joined=True))

    @staticmethod
    def backward(ctx, *gradients):
        plan = ctx.plan
        dtype, absent = plan.factors[0].dtype, [i for i, gradient in enumerate(gradients) if gradient is None]
        gradients = list(gradients)
        for i in absent:
            gradients[i] = torch.zeros_like(torch.cat(plan.joined[i]), dtype=ctx.dtype)
        flat = backends.flatten_dense_tensors(gradients).to(dtype)
        flat = flat if ctx.scales is None else flat * ctx.scales
        parts = _apart(flat, plan.runs, joined=False)
        if absent:
            of_factor = [i for i, factors in enumerate(plan.joined) for _ in factors]
            parts = [None if i in absent else part for i, part in zip(of_factor, parts, strict=True)]
        return None, None, None, *parts


@contextlib.contextmanager
def rounded_together(model: nn.Module, x: Tensor, folding: Callable[[], Pairs] = list) -> Iterator[None]:
    """Within this block, in which the model's forward pass of x runs, `rounded` and `folded` find all.

    Args:
        folding: which convolutions have a BatchNorm folded into them, now.
    """
    device = x.device.type
    known = _now.rounded is not None  # by a block around this one
    if known or not backends.counts_kernels(x) or backends.is_traced() or not torch.is_autocast_enabled(device):
        yield
        return
    dtype, pairs = torch.get_autocast_dtype(device), folding()
    plan = _PLANS.get(model)
    if plan is None or plan.pairs != pairs:
        plan = _PLANS[model] = Plan(model, pairs)
    _now.rounded = {}
    try:
        if plan.factors and dtype in LOW_PRECISION:
            with torch.no_grad():
                constants, scales = _constants(plan, dtype), plan.scales
                flat = backends.flatten_dense_tensors(plan.factors)
                flat = flat if scales is None else flat * scales
            rounded = _Rounded.apply(plan, scales, flat.to(dtype), *plan.factors)
            _put_side_by_side(plan, rounded)
            _now.rounded = {id(factors[0]): low for factors, low in zip(plan.joined, rounded, strict=True)}
            if pairs:
                _now.fold = functools.partial(_fold, plan, constants, flat, rounded)
                _now.pairs = {id(conv): norm for conv, norm in pairs}
        if plan.biases and dtype in LOW_PRECISION:
            flat = backends.flatten_dense_tensors(plan.biases).to(dtype)
            biases = _apart(flat, plan.bias_runs, joined=True)
            _now.rounded |= {id(bias): low for bias, low in zip(plan.biases, biases, strict=True)}
        yield
    finally:
        _now.rounded = _now.folded = _now.fold = _now.pairs = None


def _constants(plan: Plan, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The constants of each convolution. If they have changed, the plan's scales are computed anew."""
    constants, changed = plan.constants.of(dtype)
    if changed and constants:
        scales = []
        for tensors, _, pair in plan.found:
            scale = torch.ones_like(tensors[0])
            if pair is not None:
                scale *= constants[pair][0][:, :, 0, 0] * plan.pairs[pair][0].scaling
            scales += [scale] * len(tensors)
        plan.scales = backends.flatten_dense_tensors(scales)
    return constants


@torch.no_grad()
def _fold(plan: Plan, constants: list, flat: Tensor, rounded: Sequence[Tensor]) -> dict[int, Folded]:
    """Every convolution's part in this forward pass. `flat`: the numbers of which `rounded` was made."""
    result = {}
    precise = _apart_by_run(flat, plan.runs) if plan.kernels else []
    for run in plan.kernels:
        weights = [conv.base() for conv, _ in run.pairs]
        scales, shifts = zip(*[constants[number] for number in run.numbers], strict=True)
        kernels = fold_together(weights, scales, precise[run.of_A], precise[run.of_B], rounded[0].dtype)
        factors = rounded[run.A], rounded[run.B]
        for (conv, _), *found in zip(run.pairs, *factors, kernels, shifts, strict=True):
            result[id(conv)] = Folded(*found)
    return result


def knows_statistics(conv: nn.Module) -> bool:
    """Can this convolution be folded with others: are its BatchNorm's statistics constant?"""
    return "followed" not in vars(conv) or not torch.is_grad_enabled()


@contextlib.contextmanager
def each_apart() -> Iterator[None]:
    """Within this block `folded` finds nothing: what runs again in backward must save the same again."""
    before, _now.pairs = _now.pairs, None
    try:
        yield
    finally:
        _now.pairs = before


def folded(conv: nn.Module, norm: nn.Module) -> Folded | None:
    """The convolution with this BatchNorm folded into it, if the current forward pass has it."""
    if _now.pairs is None or _now.pairs.get(id(conv)) is not norm:
        return None
    if _now.folded is None:  # not before: upper kernels are not to be there while lower layers compute
        _now.folded, _now.fold = _now.fold(), None
    return _now.folded[id(conv)]


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
