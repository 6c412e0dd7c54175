"""Splits a model in two halves: a lower one that is computed once for each image, and an upper one that trains."""

import copy
import functools
from collections.abc import Callable

from torch import Tensor, nn
from torchvision.models import ResNet, VisionTransformer

from lora.fusion import resnet_from_stage, vit_from_block
from toolkit import InputError
from toolkit.models.backbones import block_names, head_name, headless
from toolkit.models.norms import unextended

FROM_BLOCK = {ResNet: resnet_from_stage, VisionTransformer: vit_from_block}


class UpperHalf(nn.Module):
    """A model that begins with one of its blocks or, with `first` None, with its head."""

    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            return self.get_submodule(head_name(self))(x)
        return self.from_block(self, x, self.first)


def split_model(model: nn.Module, last: int | None) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    """Split a model into ``lower`` and ``upper``, so that ``upper(lower(images))`` is the model's output.

    The upper half, a shallow copy that shares every layer, has the `last` blocks (see `backbones.block_names`) and
    the head; None: only the head. InputError if torchvision has no such class with blocks.
    """
    upper = copy.copy(model)
    upper.__class__ = UpperHalf
    upper.first = None
    if last is None:
        return headless(model), upper
    kind = unextended(model)
    if kind not in FROM_BLOCK:
        what = f"only ResNets and ViTs of torchvision's class can begin with a block, not {kind.__name__}"
        raise InputError(f"{what}: use --cache-features none")
    blocks = block_names(model)
    upper.from_block = FROM_BLOCK[kind]
    upper.first = len(blocks) - last
    return functools.partial(input_of, model, blocks[-last]), upper


class _Reached(Exception):
    """Ends a model's forward early, with what a block was given."""


def input_of(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """The input of the module of this name in ``model(x)``, which is stopped there."""

    def stop(module: nn.Module, inputs: tuple) -> None:
        raise _Reached(inputs[0])

    with model.get_submodule(name).register_forward_pre_hook(stop):
        try:
            model(x)
        except _Reached as reached:
            return reached.args[0]
