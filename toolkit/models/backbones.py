"""Backbones by name: unmodified models of torchvision or timm, so that a merged `state_dict` loads into plain ones."""

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchvision import models
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

from toolkit import InputError, did_you_mean, dotted
from toolkit.models import names

# The statistics MoCo checkpoints were trained with, so images for torchvision's models are normalised with them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# MoCo v3 freezes a ViT's patch embedding (2104.02057, section 4). Its names in torchvision, timm and transformers.
PATCH_EMBEDDINGS = ("conv_proj", "patch_embed", "patch_embedding", "patch_embeddings")

LARGEST_IMAGE = 4096  # pixels along each side; without a limit a damaged file or a typing error could ask for terabytes

HEAD_NAMES = ("fc", "heads", "head", "classifier")


@dataclass
class ModelRecord:
    """What is known of a model that is not in its modules: `record_of`. A shallow copy of the model shares it."""

    head: tuple[str, ...] | None = None  # the names of the classifier head's modules; None: see `head_names`
    heads: int | None = None  # attention heads of a ViT, if they are not the arch's own
    base_digests: dict[str, str] | None = None  # SHA-256 of each tensor of the base by name; None: not taken yet
    # Of an interpolated position embedding, which CPUs round differently: above is the checkpoint's, here the model's.
    resized_digests: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)  # of the file whose adapter, without a name, is in use
    digest: str = ""  # of that file's tensors
    adapters: Any = None  # those with names: `lora.adapter_set.AdapterSet`


def record_of(model: nn.Module) -> ModelRecord:
    """The record of a model, empty at first."""
    if "toolkit_record" not in vars(model):
        model.toolkit_record = ModelRecord()
    return model.toolkit_record


def other_heads(model: nn.Module) -> dict[str, str]:
    """A ViT's number of attention heads, which no tensor shows, if it differs from the arch's own."""
    heads = record_of(model).heads
    return {} if heads is None else {"heads": str(heads)}


def build_backbone(arch: str, num_classes: int, image_size: int | None = None, heads=None, channels=3) -> nn.Module:
    """A randomly initialised model: images (N, channels, image_size, image_size) -> logits (N, num_classes).

    `heads`: of a torchvision ViT. Raises InputError for an unknown arch, numbers that do not fit it, or missing timm.
    """
    size = names.default_image_size(arch)  # raises for an unknown arch
    if image_size is not None:
        size = image_size
    names.check_heads(arch, heads)
    if num_classes < 1:
        raise InputError(f"num_classes is {num_classes}; a classifier needs at least 1 class")
    if not 1 <= size <= LARGEST_IMAGE:
        raise InputError(f"image size is {size}; give a positive number of pixels, at most {LARGEST_IMAGE}")
    names.check_channels(channels)
    if arch.startswith(names.TIMM):
        return _build_timm(arch, num_classes, size, channels)
    if arch in names.RESNETS:
        return _for_channels(getattr(models, arch)(weights=None, num_classes=num_classes), channels)
    shape = names.VITS[arch] | {"num_heads": heads or names.default_heads(arch)}
    _check_patches(arch, size, shape["patch_size"])
    stem = None
    if "conv" in arch:  # 3x3 convolutions of stride 2 that double the width each time; torchvision appends the 1x1
        stem = [ConvStemConfig(shape["hidden_dim"] // n, kernel_size=3, stride=2) for n in (8, 4, 2, 1)]
    model = VisionTransformer(size, num_classes=num_classes, conv_stem_configs=stem, **shape)
    if shape != names.VITS[arch]:
        record_of(model).heads = heads
    return _for_channels(model, channels)


def _check_patches(arch: str, size: int, patch: int) -> None:
    if size % patch:
        fitting = max(1, round(size / patch)) * patch
        raise InputError(f"image size {size} is not a multiple of {arch}'s patch of {patch}; {fitting} would fit")


def first_convolution(model: nn.Module) -> str | None:
    """The name of the first convolution, which sees the images; None if the model has none."""
    return next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)


def input_channels(model: nn.Module) -> int:
    name = first_convolution(model)
    return 3 if name is None else model.get_submodule(name).in_channels


def _for_channels(model: nn.Module, channels: int) -> nn.Module:
    """The model with a first convolution for `channels`, initialised as torchvision does; as it is for 3."""
    if channels == 3:
        return model
    name = first_convolution(model)
    old = model.get_submodule(name)
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None)
    if name == "conv1":
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    elif name == "conv_proj":
        nn.init.trunc_normal_(new.weight, std=math.sqrt(1 / new.weight[0].numel()))
        nn.init.zeros_(new.bias)
    model.set_submodule(name, new)
    return model


def name_head(model: nn.Module, head: str | Sequence[str] | None) -> None:
    """Record which modules are the classifier head; None: as before. Raises InputError for a name that none has."""
    if head is None:
        return
    heads = (head,) if isinstance(head, str) else tuple(head)
    modules = dict(model.named_modules())
    for name in heads:
        if not name or name not in modules:
            hint = did_you_mean(str(name), modules)
            raise InputError(f"no module is named {name!r}, so it cannot be the classifier head: {hint}".rstrip(": "))
    record_of(model).head = heads


def head_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the modules that are the classifier head: those that `name_head` recorded, or the one found."""
    recorded = record_of(model).head
    if recorded is not None:
        return recorded
    stated = (vars(model).get("pretrained_cfg") or {}).get("classifier")
    for name in (stated, *HEAD_NAMES):
        if isinstance(name, str) and name.split(".")[0] in model._modules:
            return (name,)
    # In a module that holds a model, as one of Lightning, it is the one of such a name with which the parameters end.
    found = []
    for name, module in model.named_modules():
        inside = found and f"{name}.".startswith(f"{found[-1]}.")
        if name.rpartition(".")[2] in HEAD_NAMES and not inside and next(module.parameters(), None) is not None:
            found.append(name)
    if len(found) == 1:
        *_, (last, _) = model.named_parameters()
        if last.startswith(f"{found[0]}."):
            return tuple(found)
    return ()


def head_name(model: nn.Module) -> str | None:
    """The name of the classifier head, the last if there are several; None if it is not clear which module it is."""
    return next(reversed(head_names(model)), None)


def in_head(model: nn.Module, name: str) -> bool:
    """Is this the name of the classifier head, or of a module, parameter or buffer in it?"""
    return any(f"{name}.".startswith(f"{head}.") for head in head_names(model))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel or torch.compile, all of which prefix its names."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return unwrapped(model.module)
    if "_orig_mod" in model._modules:  # torch.compile's OptimizedModule
        return unwrapped(model._orig_mod)
    return model


def headless(model: nn.Module) -> nn.Module:
    """A shallow copy of the model without its classifier head, sharing every layer: images -> features (N, D)."""

    def without(module: nn.Module, name: str) -> nn.Module:
        child, _, rest = name.partition(".")
        copied = copy.copy(module)
        replacement = without(module._modules[child], rest) if rest else nn.Identity()
        copied._modules = {**module._modules, child: replacement}
        return copied

    name = head_name(model)  # with all that is in it: a projector would go on updating its BatchNorms' statistics
    return model if name is None else without(model, name)


def block_names(model: nn.Module) -> list[str]:
    """The names of a model's blocks, from the first to the last: a ResNet's stages, a ViT's encoder blocks."""
    if isinstance(model._modules.get("backbone"), nn.Module):  # a head of another kind is put on it
        return list(map("backbone.{}".format, block_names(model.backbone)))
    if stages := [name for name, _ in model.named_children() if re.fullmatch(r"layer\d+", name)]:
        return stages
    # In other models: the modules of the first `Sequential` or `ModuleList` that has several, all of one type.
    for name, module in model.named_modules():
        if not isinstance(module, nn.Sequential | nn.ModuleList) or len(module) < 2:
            continue
        for kind in map(type, module):
            if all(isinstance(child, kind) for child in module):  # fused blocks are subclasses of the plain ones
                return [dotted(name, child) for child, _ in module.named_children()]
    return []


def normalization(arch: str) -> dict[str, tuple[float, ...]]:
    """The `mean` and `std` of each channel with which `arch` was pretrained: ImageNet's, or what timm states."""
    if not arch.startswith(names.TIMM):
        return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    config = names.timm_config(arch)
    return {"mean": tuple(config.mean), "std": tuple(config.std)}


def _build_timm(arch: str, num_classes: int, size: int, channels: int) -> nn.Module:
    import timm

    config = names.timm_config(arch)
    name = arch.removeprefix(names.TIMM)
    shape = {"num_classes": num_classes, "in_chans": channels}
    try:
        try:
            model = timm.create_model(name, img_size=size, **shape)
        except TypeError:  # a model without this argument takes any size
            model = timm.create_model(name, **shape)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"timm cannot build {name} for {size} pixels and {channels} channels: {error}") from None
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None) or (1, 1)
    _check_patches(arch, size, patch[0])
    if not isinstance(config.classifier, str) or not isinstance(model.get_classifier(), nn.Linear):
        raise InputError(f"{arch} has no single linear classifier, from which this toolkit could start: take another")
    return model
