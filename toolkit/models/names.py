"""Models by their names: what `--arch` and `--checkpoint` may say. PyTorch is loaded only where a name needs it.

A model of timm is `timm:` and its name, as in `timm.list_models()`; as a checkpoint that stands for timm's weights.
"""

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from toolkit import SHIPPED, InputError, did_you_mean, homed, optional_package, printable
from toolkit.models.published import PUBLISHED, fetched, is_published  # noqa: F401

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")

# MoCo v3 (arXiv 2104.02057, section 4.4): vit_small has 12 heads where timm and DeiT have 6.
VITS = {
    "vit_mini": {"patch_size": 8, "num_layers": 6, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768},
    "vit_small": {"patch_size": 16, "num_layers": 12, "num_heads": 12, "hidden_dim": 384, "mlp_dim": 1536},
    "vit_b_16": {"patch_size": 16, "num_layers": 12, "num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072},
    "vit_l_16": {"patch_size": 16, "num_layers": 24, "num_heads": 16, "hidden_dim": 1024, "mlp_dim": 4096},
    # The convolutional stem takes the place of one transformer block.
    "vit_conv_small": {"patch_size": 16, "num_layers": 11, "num_heads": 12, "hidden_dim": 384, "mlp_dim": 1536},
    "vit_conv_base": {"patch_size": 16, "num_layers": 11, "num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072},
}

TIMM = "timm:"
ARCHS = (*RESNETS, *VITS)  # of torchvision


def default_image_size(arch: str) -> int:
    """Side in pixels of the square images that `arch` was designed for; raises InputError for an unknown name."""
    if arch.startswith(TIMM):
        return timm_config(arch).input_size[-1]
    if arch not in ARCHS:
        hint = f"{did_you_mean(arch, ARCHS)} choose one of {', '.join(ARCHS)}, {TIMM}NAME"
        raise InputError(f"unknown arch {arch!r}: {hint.lstrip()}")
    return 32 if arch == "vit_mini" else 224


def default_heads(arch: str) -> int | None:
    """The number of attention heads of a torchvision ViT; None for ResNets, and for timm, whose names imply it."""
    return VITS.get(arch, {}).get("num_heads")


def check_heads(arch: str, heads: int | None) -> None:
    """Raise InputError if `arch` cannot have this number of attention heads. None stands for its own."""
    if heads is None:
        return
    if arch not in VITS:
        raise InputError(f"{heads} heads are not for {arch}: only torchvision's ViTs take a number; drop --heads")
    width = VITS[arch]["hidden_dim"]
    if type(heads) is not int or heads < 1 or width % heads:
        own = default_heads(arch)
        raise InputError(f"{printable(heads)} heads do not divide the {width} features of {arch}; {own} do")


MOST_CHANNELS = 1024  # enough for hyperspectral images; without a limit a damaged file could ask for terabytes


def check_channels(channels: int) -> None:
    """Raise InputError for a number of channels that no image has."""
    if type(channels) is not int or not 1 <= channels <= MOST_CHANNELS:
        raise InputError(f"{printable(channels)} channels; give a whole number from 1 to {MOST_CHANNELS}")


def timm_config(arch: str):
    """timm's `PretrainedCfg` of a model. Raises InputError if timm lacks the name or the images are not square."""
    name = arch.removeprefix(TIMM)
    timm = optional_package("timm", arch)
    if not timm.is_model(name):
        hint = did_you_mean(arch.split(".")[0], list(map("timm:{}".format, timm.list_models())))
        raise InputError(f"timm has no model {name!r}: {hint or 'timm.list_models() has their names'}")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag
        raise InputError(f"{arch}: {error}") from None
    _, height, width = config.input_size
    if height != width:
        raise InputError(f"{arch} takes images of {height} x {width} pixels; here images are square")
    return config


SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}  # of ViTs in timm's names, by their width


def timm_candidates(path: str | os.PathLike, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The models of timm that a path names or else, by their first layers, a file may be of; none without timm."""
    if importlib.util.find_spec("timm") is None:
        return []
    import timm

    named = sorted(set(timm.list_models()).intersection(re.split(r"--|-[0-9a-f]{8}|\W", str(path))))
    with_its_patch = []
    without_patches = []
    for name in timm.list_models():
        first = shapes.get(f"{timm.get_pretrained_cfg(name).first_conv}.weight", ())
        patch = re.search(r"patch(\d+)", name)
        if len(first) == 4 and patch is None:
            without_patches.append(name)
        elif len(first) == 4 and first[2] == int(patch[1]) and SIZES.get(first[0], "") in name:
            with_its_patch.append(name)
    return named or with_its_patch or without_patches


NO_CHECKPOINT = "none"
NO_ARCH = "random weights have no architecture of their own"


def checkpoint_path(text: str) -> Path:
    """What `--checkpoint` names: 'shipped', a path, or a published file, whose name stays until it is `fetched`."""
    return SHIPPED if text == "shipped" else homed(text)


def is_none(path: str | os.PathLike) -> bool:
    """Is this 'none', which stands for random weights instead of a checkpoint?"""
    return str(path) == NO_CHECKPOINT


def is_path(checkpoint: str | os.PathLike) -> bool:
    """Is this a path, and not 'none' or a model of timm, which are recorded and loaded by their names?"""
    return not is_none(checkpoint) and not str(checkpoint).startswith(TIMM)


def model_problems(path: str | os.PathLike, arch: str | None, heads: int | None) -> Iterator[str]:
    """What is wrong with `--checkpoint`, `--arch` and `--heads`, as far as it shows without reading files."""
    if is_none(path) and arch is None:
        yield f"--checkpoint none: {NO_ARCH}; say which with --arch"
    if is_path(path) and not is_published(Path(path).as_posix()) and not os.path.exists(path):
        problem = f"--checkpoint {path}: file not found; give the path of an existing checkpoint"
        yield "; ".join(filter(None, [problem, did_you_mean(str(path), PUBLISHED)]))
    try:
        named = f"--checkpoint {path}"
        if str(path).startswith(TIMM) and not timm_config(str(path)).has_weights:
            raise InputError("timm has no weights of it; timm.list_pretrained() has others")
        named = f"--arch {arch}"
        if arch is not None:
            default_image_size(arch)
            check_heads(arch, heads)
    except InputError as error:
        yield f"{named}: {error}"
