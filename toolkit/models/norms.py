"""BatchNorms that stay in eval mode while they are frozen, and BatchNorms over the images of all processes."""

import contextlib
import functools
import weakref
from collections.abc import Iterator, MutableMapping
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit import InputError, distributed
from toolkit.devices import is_traced

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


def stock_norm(norm: _BatchNorm) -> type[_BatchNorm]:
    """The class of a BatchNorm before it was made freezable."""
    return norm.stock if isinstance(norm, Freezable) else type(norm)


class _ConstantNorm(torch.autograd.Function):
    """``batch_norm(x)`` by the running statistics. Differentiable twice."""

    @staticmethod
    def forward(ctx, x, norm):
        scale, _ = constant_scale_and_shift(norm, norm.running_mean, norm.running_var, None)
        ctx.save_for_backward(scale.view(-1, *[1] * (x.dim() - 2)))
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)

    @staticmethod
    def backward(ctx, gy):
        [scale] = ctx.saved_tensors
        return (gy * scale).to(gy.dtype), None


class Freezable:
    """A BatchNorm, of PyTorch or timm, that stays in eval mode while it is `frozen`, whatever `train()` says.

    It is then a constant scale and shift, whose input PyTorch keeps for backward all the same. Here nothing is kept but
    what the activation in one of timm's keeps: of a ReLU the output, which the next layer keeps anyway.
    """

    frozen = False

    def __reduce_ex__(self, protocol):  # pickle cannot find a class by name that was made at run time
        return _empty, (self.stock,), vars(self)

    def train(self, mode: bool = True):
        return super().train(mode and not self.frozen)

    def reset_running_stats(self) -> None:
        if not self.frozen:  # as `torch.optim.swa_utils.update_bn` would, and then never count a batch
            super().reset_running_stats()

    def forward(self, x: Tensor) -> Tensor:
        stock = stock_norm(self)
        has_activation = stock.__name__ == "BatchNormAct2d"  # timm's
        is_known = has_activation or stock.forward is _BatchNorm.forward
        trains = self.training or any(parameter.requires_grad for parameter in self.parameters())
        if trains or not is_known or not x.requires_grad or self.running_mean is None or is_traced():
            return super().forward(x)
        self._check_input_dim(x)
        y = _ConstantNorm.apply(x, self)
        return self.act(self.drop(y)) if has_activation else y


@functools.cache
def _freezable(stock: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(f"Freezable{stock.__name__}", (Freezable, stock), {"stock": stock})


def _empty(stock: type[_BatchNorm]) -> _BatchNorm:
    """A freezable module without attributes, for `pickle` and `deepcopy`."""
    return object.__new__(_freezable(stock))


FreezableBatchNorm2d = _freezable(nn.BatchNorm2d)


def freeze_statistics(norm: nn.Module, freeze: bool, training: bool) -> None:
    """Freeze a BatchNorm in eval mode, or let it follow `train()` again, starting with `training`; nothing else."""
    if isinstance(norm, _BatchNorm) and not isinstance(norm, Freezable):
        norm.__class__ = _freezable(type(norm))
    if isinstance(norm, Freezable):
        norm.frozen = freeze
        norm.train(training)


# Within `constants_kept`, by the norm: what was given, and what came of it.
Kept = MutableMapping[nn.Module, tuple[list, tuple[Tensor, Tensor]]]
_kept: ContextVar[Kept | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def constants_kept() -> Iterator[None]:
    """Within this block `constant_scale_and_shift` computes what does not train once: five kernels a norm and step.

    It does so again where a tensor was replaced, moved or written to. Writing through `.data` alone leaves no trace.
    """
    before = _kept.set(weakref.WeakKeyDictionary())
    try:
        yield
    finally:
        _kept.reset(before)


def constant_scale_and_shift(
    norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``g = gamma / sqrt(var + eps)`` and ``beta + (bias - mean) g`` for these statistics, (out,) each."""
    given = [t for t in (norm.weight, norm.bias, mean, variance, bias) if t is not None]
    kept = None if is_traced() else _kept.get()
    if kept is None or any(t.requires_grad or t.is_inference() for t in given):  # the latter change without a trace
        return _scale_and_shift(norm, mean, variance, bias)
    # A weak reference reserves the storage's number, not its memory.
    now = [norm.eps, *((StorageWeakRef(t.untyped_storage()), t.storage_offset(), t._version) for t in given)]
    seen, constants = kept.get(norm, (None, None))
    if seen != now:
        with torch.inference_mode(False):  # training, too, is to take them
            constants = _scale_and_shift(norm, mean, variance, bias)
        kept[norm] = now, constants
    return constants


def _scale_and_shift(
    norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean if bias is None else bias - mean
    if norm.bias is None:
        return scale, shift * scale
    return scale, torch.addcmul(norm.bias, shift, scale)


def share_statistics(model: nn.Module, device: torch.device) -> None:
    """Make every BatchNorm that is not `frozen` normalise by the statistics of all processes in training, in place.

    With a single process nothing changes. Raises InputError on CPUs, for which PyTorch has no such BatchNorm, and if a
    BatchNorm computes more than PyTorch's own, as those of some timm models do.
    """
    if distributed.world_size() == 1:
        return
    for module in model.modules():
        if not isinstance(module, _BatchNorm) or getattr(module, "frozen", False):
            continue
        if stock_norm(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            remedy = "train in one, or freeze the norms (--freeze-backbone, no --norms train)"
            raise InputError(f"{type(module).__name__} cannot take statistics over several processes: {remedy}")
        if device.type != "cuda":
            remedy = "train in one (in stage 1 also with --moco-version 2), or freeze the norms"
            raise InputError(f"BatchNorms that train take statistics over several processes on GPUs alone: {remedy}")
        module.__class__ = nn.SyncBatchNorm
        module.process_group = None  # all processes
