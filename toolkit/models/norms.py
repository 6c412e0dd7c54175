"""BatchNorms that stay in eval mode while they are frozen, and BatchNorms over the images of all processes."""

import contextlib
import functools
import weakref
from collections.abc import Iterator, MutableMapping
from contextvars import ContextVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from toolkit import InputError, devices, distributed

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


class Extended:
    """A module of any class, such as timm's BatchNorm with an activation, that does something more, or otherwise."""

    def __reduce_ex__(self, protocol):  # pickle cannot find a class by name that was made at run time
        return _new, (type(self).extends, type(self).mixin), vars(self)


@functools.cache
def extended(stock: type[nn.Module], mixin: type[Extended]) -> type[nn.Module]:
    return type(f"{mixin.__name__}{stock.__name__}", (mixin, stock), {"extends": stock, "mixin": mixin})


def _new(stock: type[nn.Module], mixin: type[Extended]) -> nn.Module:
    """An empty module for `pickle` and `deepcopy`."""
    return object.__new__(extended(stock, mixin))


def unextended(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was extended: a BatchNorm to be frozen or shared, a block to be fused."""
    kind = type(module)
    while issubclass(kind, Extended):
        kind = kind.extends
    return kind


def is_hooked(*modules: nn.Module) -> bool:
    """Does one of these have a hook, or a forward of its own? Each must see what it would see in the stock model."""
    return bool(_has_any_global_hook()) or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or "forward" in vars(m)
        for m in modules
    )


class _ConstantNorm(torch.autograd.Function):
    """``batch_norm(x)`` by the running statistics. Differentiable twice."""

    @staticmethod
    def forward(ctx, x, norm):
        scale, _ = constant_scale_and_shift(norm, norm.running_mean, norm.running_var, None)
        ctx.save_for_backward(scale)
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)

    @staticmethod
    def backward(ctx, gy):
        (scale,) = ctx.saved_tensors
        if gy.dtype == scale.dtype:
            return gy * scale.view(-1, *[1] * (gy.dim() - 2)), None
        # 16 bits times 32 in one pass: a product would first widen the gradient
        return F.batch_norm(gy, torch.zeros_like(scale), torch.ones_like(scale), scale, eps=0.0), None


class _ReLU6(torch.autograd.Function):
    """``relu6(x)`` in the memory of x, differentiable twice. The output is kept, where PyTorch copies the input."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        y = x.clamp_(0, 6)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gy):
        return torch.ops.aten.hardtanh_backward(gy, *ctx.saved_tensors, 0.0, 6.0)


# Within a block of timm's: the BatchNorm behind each convolution, until that folds it in; then the output, by the norm.
FOLDING: ContextVar[dict[nn.Module, nn.Module | Tensor]] = ContextVar("folding")


class Freezable(Extended):
    """A BatchNorm that stays in eval mode while it is `frozen`, whatever `train()` says.

    It is then a constant scale and shift, whose input PyTorch keeps for backward all the same. Here nothing is kept but
    what the activation in one of timm's keeps: of a ReLU the output, which the next layer keeps anyway.
    """

    frozen = False

    def train(self, mode: bool = True):
        return super().train(mode and not self.frozen)

    def reset_running_stats(self) -> None:
        if not self.frozen:  # as `torch.optim.swa_utils.update_bn` would, and then never count a batch
            super().reset_running_stats()

    def forward(self, x: Tensor) -> Tensor:
        if not devices.is_traced() and FOLDING.get({}).pop(self, None) is x:  # the convolution has normalised it
            return self._activated(x)
        is_known = self.has_activation or unextended(self).forward is _BatchNorm.forward
        trains = self.training or any(parameter.requires_grad for parameter in self.parameters())
        if trains or not is_known or not x.requires_grad or self.running_mean is None or devices.is_traced():
            return super().forward(x)
        self._check_input_dim(x)
        y = _ConstantNorm.apply(x, self)
        return self._activated(y) if self.has_activation else y

    @property
    def has_activation(self) -> bool:
        return unextended(self).__name__ == "BatchNormAct2d"  # timm's

    def _activated(self, y: Tensor) -> Tensor:
        """What timm's norm does behind the normalisation, whose output is nobody else's."""
        if type(self.act) is nn.ReLU6 and type(self.drop) is nn.Identity and not is_hooked(self.act, self.drop):
            return _ReLU6.apply(y)
        return self.act(self.drop(y))


FreezableBatchNorm2d = extended(nn.BatchNorm2d, Freezable)


def is_frozen(module: nn.Module) -> bool:
    """Is this a BatchNorm whose statistics stay as they are in training?"""
    return isinstance(module, Freezable) and module.frozen


def freeze_statistics(norm: nn.Module, freeze: bool, training: bool) -> None:
    """Freeze a BatchNorm in eval mode, or let it follow `train()` again, starting with `training`; nothing else."""
    if isinstance(norm, _BatchNorm) and not isinstance(norm, Freezable):
        norm.__class__ = extended(type(norm), Freezable)
    if isinstance(norm, Freezable):
        norm.frozen = freeze
        norm.train(training)


# Within `constants_kept`, by the norm: what was given, and what came of it.
_kept: ContextVar[MutableMapping[nn.Module, tuple] | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def constants_kept() -> Iterator[None]:
    """Within this block `constant_scale_and_shift` computes what does not train once: five kernels a norm and step."""
    with contextlib.ExitStack() as stack:
        stack.callback(_kept.reset, _kept.set(weakref.WeakKeyDictionary()))
        yield


def constant_scale_and_shift(norm: _BatchNorm, mean: Tensor, var: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``g = gamma / sqrt(var + eps)`` and ``beta + (bias - mean) g`` for these statistics, (out,) each."""
    given = [t for t in (norm.weight, norm.bias, mean, var, bias) if t is not None]
    kept = None if devices.is_traced() else _kept.get()
    if kept is None or any(t.requires_grad or t.is_inference() for t in given):  # the latter change without a trace
        return _scale_and_shift(norm, mean, var, bias)
    # It differs for what was replaced, moved or written to: writing through `.data` alone leaves no trace.
    # A weak reference reserves the storage's number, not its memory.
    now = [norm.eps, *((StorageWeakRef(t.untyped_storage()), t.storage_offset(), t._version) for t in given)]
    seen, constants = kept.get(norm, (None, None))
    if seen != now:
        with torch.inference_mode(False):  # training, too, is to take them
            constants = _scale_and_shift(norm, mean, var, bias)
        kept[norm] = now, constants
    return constants


def _scale_and_shift(norm: _BatchNorm, mean: Tensor, var: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean if bias is None else bias - mean
    if norm.bias is None:
        return scale, shift * scale
    return scale, torch.addcmul(norm.bias, shift, scale)


def share_statistics(model: nn.Module) -> None:
    """Make every BatchNorm that is not `frozen` normalise by the statistics of all processes in training, in place.

    With a single process nothing changes. Every process must call the model equally often, with an image or more.
    Raises InputError if a BatchNorm computes more than PyTorch's own, as those of some timm models do.
    """
    if distributed.world_size() == 1:
        return
    for module in model.modules():
        if not isinstance(module, _BatchNorm) or isinstance(module, SharedStatistics) or is_frozen(module):
            continue
        if unextended(module).forward is not _BatchNorm.forward:
            remedy = "train in one, or freeze the norms (--freeze-backbone, no --norms train)"
            raise InputError(f"{type(module).__name__} cannot take statistics over several processes: {remedy}")
        module.__class__ = extended(type(module), SharedStatistics)


class SharedStatistics(Extended):
    """A BatchNorm whose statistics are, in training, those of all processes. x: (N, C, ...), N may differ."""

    # So several processes train as one does, to rounding. PyTorch's SyncBatchNorm does this on GPUs alone.

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        if self.num_batches_tracked is not None:  # a block that is recomputed counts its batch once
            self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        all_but_channels = [0, *range(2, x.dim())]
        sums = values.sum(all_but_channels)
        sums = _Sum.apply(torch.cat([sums, sums.new_full((1,), x.numel() / x.shape[1])]))
        count = sums[-1].detach()
        mean = (sums[:-1] / count).view(1, -1, *[1] * (x.dim() - 2))
        centred = values - mean
        variance = _Sum.apply((centred**2).sum(all_but_channels, keepdim=True)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), momentum)
            self.running_var.lerp_(variance.flatten() * count / (count - 1), momentum)
        normalized = centred * (variance + self.eps).rsqrt()
        if self.weight is not None:
            normalized = normalized * self.weight.view_as(mean) + self.bias.view_as(mean)
        return normalized.to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose losses add up: so its gradient is their sum too."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gy):
        return _Sum.apply(gy)
