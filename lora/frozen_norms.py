"""BatchNorms that stay in eval mode while they are frozen, whatever `train()` says."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


class Freezable:
    """A BatchNorm that stays in eval mode while it is `frozen`, whatever `train()` says."""

    frozen = False

    def train(self, mode: bool = True):
        return super().train(mode and not self.frozen)

    def __reduce_ex__(self, protocol):  # pickle cannot find a class by name that was made at run time
        return _new_freezable, (stock_norm(self),), vars(self)


FREEZABLE: dict[type[_BatchNorm], type[Freezable]] = {}  # stock class -> its freezable kind


def _freezable_kind(stock: type[_BatchNorm]) -> type[Freezable]:
    """The freezable subclass of a BatchNorm class, such as timm's with an activation."""
    if stock not in FREEZABLE:
        FREEZABLE[stock] = type(f"Freezable{stock.__name__}", (Freezable, stock), {})
    return FREEZABLE[stock]


FreezableBatchNorm2d = _freezable_kind(nn.BatchNorm2d)


def _new_freezable(stock: type[_BatchNorm]) -> Freezable:
    kind = _freezable_kind(stock)
    return kind.__new__(kind)


def stock_norm(norm: Freezable) -> type[_BatchNorm]:
    return next(stock for stock, kind in FREEZABLE.items() if isinstance(norm, kind))


def freeze_statistics(norm: nn.Module, freeze: bool, training: bool) -> None:
    """Freeze a BatchNorm in eval mode, or let it follow `train()` again, starting with `training`.

    Other modules are left alone.
    """
    if isinstance(norm, _BatchNorm) and not isinstance(norm, Freezable):
        norm.__class__ = _freezable_kind(type(norm))
    if isinstance(norm, Freezable):
        norm.frozen = freeze
        norm.train(training)


def constant_scale_and_shift(norm: nn.BatchNorm2d, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``g = gamma / sqrt(var + eps)`` and ``beta + (bias - mean) g``, both (out,)."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    return scale, shift * scale if norm.bias is None else torch.addcmul(norm.bias, shift, scale)
