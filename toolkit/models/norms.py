"""BatchNorms that stay in eval mode while they are frozen, and BatchNorms over the images of all processes.

With the latter training in several processes is training in one, to rounding. PyTorch's SyncBatchNorm does this on GPUs
alone. On them its function computes here too.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules._functions import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit import InputError, distributed

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)

# (mixin, class) -> the class with the mixin in front, made once for each.
_KINDS: dict[tuple[type, type[_BatchNorm]], type[_BatchNorm]] = {}


class _Extended:
    """A BatchNorm of any class, such as timm's with an activation, that does something more."""

    def __reduce_ex__(self, protocol):  # pickle cannot find a class by name that was made at run time
        return _new, (type(self).extends, type(self).mixin), vars(self)


def _extended(stock: type[_BatchNorm], mixin: type[_Extended]) -> type[_BatchNorm]:
    """The class of BatchNorms with this mixin."""
    if (mixin, stock) not in _KINDS:
        members = {"extends": stock, "mixin": mixin}
        _KINDS[mixin, stock] = type(f"{mixin.__name__}{stock.__name__}", (mixin, stock), members)
    return _KINDS[mixin, stock]


def _new(stock: type[_BatchNorm], mixin: type[_Extended]) -> _BatchNorm:
    """An empty module for `pickle` and `deepcopy`."""
    kind = _extended(stock, mixin)
    return kind.__new__(kind)


def stock_norm(norm: _BatchNorm) -> type[_BatchNorm]:
    """The class of a BatchNorm before it was made freezable or shared."""
    kind = type(norm)
    while issubclass(kind, _Extended):
        kind = kind.extends
    return kind


# -------------------------------------------------------------------------------------------------------------- frozen


class Freezable(_Extended):
    """A BatchNorm that stays in eval mode while it is `frozen`, whatever `train()` says."""

    frozen = False

    def train(self, mode: bool = True):
        return super().train(mode and not self.frozen)


FreezableBatchNorm2d = _extended(nn.BatchNorm2d, Freezable)


def freeze_statistics(norm: nn.Module, freeze: bool, training: bool) -> None:
    """Freeze a BatchNorm in eval mode, or let it follow `train()` again, starting with `training`.

    Other modules are left alone.
    """
    if isinstance(norm, _BatchNorm) and not isinstance(norm, Freezable):
        norm.__class__ = _extended(type(norm), Freezable)
    if isinstance(norm, Freezable):
        norm.frozen = freeze
        norm.train(training)


def constant_scale_and_shift(
    norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``g = gamma / sqrt(var + eps)`` and ``beta + (bias - mean) g`` for these statistics, (out,) each."""
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean if bias is None else bias - mean
    if norm.bias is None:
        return scale, shift * scale
    return scale, torch.addcmul(norm.bias, shift, scale)


# -------------------------------------------------------------------------------------------------------------- shared


def share_statistics(model: nn.Module) -> None:
    """Make every BatchNorm that is not `frozen` normalise by the statistics of all processes in training, in place.

    With a single process nothing changes. Every process must call the model equally often, with an image or more.

    Raises:
        InputError: a BatchNorm computes more than PyTorch's own, as those of some timm models do.
    """
    if distributed.world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not getattr(module, "frozen", False):
            if isinstance(module, SharedStatistics):
                continue
            if type(module).forward is not _BatchNorm.forward:
                raise InputError(
                    f"{type(module).__name__} has a forward of its own, which cannot take statistics over several "
                    "processes: train in one, or freeze the norms (--freeze-backbone, no --norms train)"
                )
            module.__class__ = _extended(type(module), SharedStatistics)


class SharedStatistics(_Extended):
    """A BatchNorm whose statistics are, in training, those of all processes. x: (N, C, ...), N may differ."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        if x.is_cuda:
            return SyncBatchNorm.apply(
                x,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                self.eps,
                momentum,
                dist.group.WORLD,
                distributed.world_size(),
            )
        mean, variance, count = shared_statistics(_precise(x.detach()))
        with torch.no_grad():
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1), momentum)
        return _Normalized.apply(x, self.weight, self.bias, mean, (variance + self.eps).rsqrt(), count)


def shared_statistics(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean (C,), variance (C,) and number of the values in each channel of x (N, C, ...) in all processes.

    One exchange: variances about the own means are put together as in Chan, Golub and LeVeque (1979), eq. 2.1.
    """
    variance, mean = torch.var_mean(x, _all_but_channels(x), correction=0)
    count = x.new_full((1,), x.numel() / x.shape[1])
    own = torch.cat([mean, variance, count])
    shares = [torch.empty_like(own) for _ in range(distributed.world_size())]
    dist.all_gather(shares, own)
    means, variances, counts = torch.stack(shares).split([len(mean), len(mean), 1], dim=1)
    weights = counts / counts.sum()
    mean = (weights * means).sum(0)
    variance = (weights * (variances + (means - mean) ** 2)).sum(0)
    return mean, variance, counts.sum().item()


class _Normalized(torch.autograd.Function):
    """``(x - mean) / deviation * weight + bias``, where mean and deviation are of x in all processes.

    The gradient of x is that of BatchNorm (Ioffe and Szegedy, arXiv 1502.03167, section 3) with its two means over all
    values of a channel, wherever they are. Those of weight and bias are this process's share.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, reciprocal_deviation, count):
        ctx.count = count
        ctx.save_for_backward(x, weight, mean, reciprocal_deviation)
        normalized = _normalize(x, mean, reciprocal_deviation)
        if weight is not None:
            normalized = normalized * _as_channels(weight, x) + _as_channels(bias, x)
        return normalized.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, weight, mean, reciprocal_deviation = ctx.saved_tensors
        normalized = _normalize(x, mean, reciprocal_deviation)
        gy = _precise(gy)
        dimensions = _all_but_channels(x)
        g_bias = gy.sum(dimensions)
        g_weight = (gy * normalized).sum(dimensions)
        sums = torch.stack([g_bias, g_weight])
        dist.all_reduce(sums)
        of_mean, of_deviation = sums / ctx.count
        gx = gy - _as_channels(of_mean, x) - normalized * _as_channels(of_deviation, x)
        if weight is None:
            gx = gx * _as_channels(reciprocal_deviation, x)
            return gx.to(x.dtype), None, None, None, None, None
        gx = gx * _as_channels(reciprocal_deviation * weight, x)
        return gx.to(x.dtype), g_weight, g_bias, None, None, None


def _normalize(x: Tensor, mean: Tensor, reciprocal_deviation: Tensor) -> Tensor:
    return (_precise(x) - _as_channels(mean, x)) * _as_channels(reciprocal_deviation, x)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _as_channels(values: Tensor, x: Tensor) -> Tensor:
    """(C,) -> (C, 1, ...), to be broadcast over x (N, C, ...)."""
    return values.view(-1, *[1] * (x.dim() - 2))
