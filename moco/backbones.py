"""Backbones by name: unmodified torchvision models, so that a merged `state_dict` loads into plain torchvision."""

import copy
import difflib

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torchvision.models import resnet18, resnet34, resnet50, resnet101
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

from moco import InputError

_RESNETS = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50, "resnet101": resnet101}

# MoCo v3 (arXiv 2104.02057, section 4.4): vit_small has 12 heads where timm and DeiT have 6.
_VITS = {
    "vit_mini": {"patch_size": 8, "num_layers": 6, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768},
    "vit_small": {"patch_size": 16, "num_layers": 12, "num_heads": 12, "hidden_dim": 384, "mlp_dim": 1536},
    "vit_b_16": {"patch_size": 16, "num_layers": 12, "num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072},
    "vit_l_16": {"patch_size": 16, "num_layers": 24, "num_heads": 16, "hidden_dim": 1024, "mlp_dim": 4096},
    # The convolutional stem takes the place of one transformer block.
    "vit_conv_small": {"patch_size": 16, "num_layers": 11, "num_heads": 12, "hidden_dim": 384, "mlp_dim": 1536},
    "vit_conv_base": {"patch_size": 16, "num_layers": 11, "num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072},
}

LARGEST_IMAGE = 4096  # pixels along each side; a file or a slip of the keyboard could otherwise ask for any memory

ARCHS = (*_RESNETS, *_VITS)
HEAD_NAMES = ("fc", "heads", "head", "classifier")


def default_image_size(arch: str) -> int:
    """Side in pixels of the square images that `arch` was designed for; raises InputError for an unknown name."""
    _check_arch(arch)
    return 32 if arch == "vit_mini" else 224


def patch_size(arch: str) -> int | None:
    """Side in pixels of a ViT's patch; None for a ResNet; raises InputError for an unknown name."""
    _check_arch(arch)
    return _VITS[arch]["patch_size"] if arch in _VITS else None


def build_backbone(arch: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """A randomly initialised torchvision model: images (N, 3, image_size, image_size) -> logits (N, num_classes).

    `image_size` None means the arch's own default; ResNets take any size, ViTs multiples of their patch.
    Raises InputError for an unknown arch, a size that does not fit or a class count below 1.
    """
    _check_arch(arch)
    size = default_image_size(arch) if image_size is None else image_size
    if num_classes < 1:
        raise InputError(f"num_classes is {num_classes}; a classifier needs at least 1 class")
    if not 1 <= size <= LARGEST_IMAGE:
        raise InputError(f"image size is {size}; give a positive number of pixels, at most {LARGEST_IMAGE}")
    if arch in _RESNETS:
        return _RESNETS[arch](weights=None, num_classes=num_classes)
    shape = _VITS[arch]
    patch = shape["patch_size"]
    if size % patch:
        fitting = max(patch, round(size / patch) * patch)
        raise InputError(f"image size {size} is not a multiple of {arch}'s patch of {patch}; {fitting} would fit")
    stem = _conv_stem(shape["hidden_dim"]) if "conv" in arch else None
    return VisionTransformer(size, num_classes=num_classes, conv_stem_configs=stem, **shape)


def head_name(model: nn.Module) -> str | None:
    """Name of the direct child that is the classifier head: 'fc' (ResNet), 'heads' (ViT), 'head' or 'classifier'."""
    children = dict(model.named_children())
    return next((name for name in HEAD_NAMES if name in children), None)


def block_names(model: nn.Module) -> list[str]:
    """Names of a ViT's blocks or a ResNet's stages, from the images to the head; empty for other models."""
    layers = getattr(getattr(model, "encoder", None), "layers", None)
    if isinstance(layers, nn.Sequential):
        return [f"encoder.layers.{name}" for name, _ in layers.named_children()]
    return [name for name in ("layer1", "layer2", "layer3", "layer4") if hasattr(model, name)]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel or torch.compile, all of which prefix its names."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's OptimizedModule
            model = model._orig_mod
        else:
            return model


def forward_features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the classifier head receives: images (N, 3, H, W) -> (N, D). The model and its head stay untouched."""
    name = head_name(model)
    if name is None:
        return model(images)
    # A shallow copy shares every layer, whatever was swapped in, and lacks only the head: a head that was merely
    # ignored would still run, and a projector's BatchNorm would take these images into its statistics.
    headless = copy.copy(model)
    headless._modules = {**model._modules, name: nn.Identity()}
    return headless(images)


def _check_arch(arch: str) -> None:
    if arch not in ARCHS:
        near = difflib.get_close_matches(str(arch), ARCHS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"unknown arch {arch!r}: {hint}choose one of {', '.join(ARCHS)}")


def _conv_stem(hidden_dim: int) -> list[ConvStemConfig]:
    """Four 3x3 stride-2 convolutions that double the width each time; torchvision appends the final 1x1."""
    widths = [hidden_dim // 8, hidden_dim // 4, hidden_dim // 2, hidden_dim]
    return [ConvStemConfig(out_channels=width, kernel_size=3, stride=2) for width in widths]
