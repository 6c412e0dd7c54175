"""MoCo checkpoints: the backbone of any file of the MoCo family, matched key by key.

The layouts that `load_backbone` knows are those of the official code, v1 and v2 (arXiv 1911.05722, 2003.04297) and v3
(2104.02057), of the projects that pretrain with MoCo, and of what their users convert and export: the table `_LAYOUTS`.
timm's models, which are named, are loaded as they are.
"""

import functools
import hashlib
import math
import os
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models.vision_transformer import interpolate_embeddings

from toolkit import InputError, listed, printable
from toolkit.backbones import (
    ARCHS,
    HEAD_NAMES,
    TIMM,
    build_backbone,
    check_heads,
    default_heads,
    default_image_size,
    first_convolution,
    head_name,
    input_channels,
    other_heads,
)
from toolkit.files import (
    TOOLKIT,
    ForeignObject,
    is_plain_tensor,
    is_safetensors,
    read_checkpoint,
    read_safetensors,
    stored_path,
)

SHIPPED = TOOLKIT / "checkpoints/moco_stage1/moco_stage1_epoch_100.pth"
OFFICIAL_CHECKPOINTS = (
    "for photographs give --checkpoint: moco_v2_800ep_pretrain.pth.tar (github.com/facebookresearch/moco), or "
    "r-50-1000ep.pth.tar, vit-s-300ep.pth.tar, vit-b-300ep.pth.tar (github.com/facebookresearch/moco-v3)"
)


def load_backbone(
    path: str | os.PathLike,
    num_classes: int,
    arch: str | None = None,
    image_size: int | None = None,
    heads: int | None = None,
    channels: int | None = None,
    channel_fit: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone in a checkpoint, in a torchvision model with a fresh classifier head for `num_classes`.

    Args:
        path: a file in one of the layouts of `_LAYOUTS`, also as `.safetensors`; with a `timm:` arch, any file that has
            that model's own keys. 'none': random weights.
        num_classes: outputs of the new head. A classifier in the file is always dropped: the head is to be trained.
        arch: one of `toolkit.backbones.ARCHS`, or `timm:` and a model of timm; by default what the file says or its
            shapes imply.
        image_size: by default the file's own. A ViT's position embedding is interpolated to any other.
        heads: attention heads of a ViT of torchvision's; by default what the layout implies. Where that is a guess, it
            warns: the tensors of a ViT-S with 6 heads and of one with 12 are alike.
        channels: of the images; by default those that the file's first layer takes.
        channel_fit: how that layer is made for others, one of CHANNEL_FITS; None: it is not.

    Returns:
        The model and a report: `family`, `arch`, `image_size`, `heads` (None: not a ViT of torchvision's), `channels`,
        `channel_fit` (None where the first layer is the file's own), `epoch`
        (None if unknown), `loaded` (names in the model), `dropped` (names in the file: projector, predictor, key
        encoder, queue, classifier).
        `model.base_digests` says what the checkpoint holds (name -> SHA-256): adapter files know their base by it.

    Raises:
        InputError: the file cannot be read, or not every backbone tensor of the arch is in it, or others are too, or
            its images have other channels.
    """
    if is_none(path):
        report = _report_of_random(arch, image_size, heads, channels)
        return random_backbone(num_classes, report), report
    source = _identify(path, _read(path), arch)
    arch = _find_arch(source) if source.arch is None else source.arch
    size = _find_image_size(source, arch) if image_size is None else image_size
    likely, certain = _find_heads(source, arch)
    first, own_channels = _find_channels(source.weights, arch)
    channels = own_channels if channels is None else channels
    model = build_backbone(arch, num_classes, size, heads or likely, channels)
    weights = _resize_positions(source.weights, model)
    if channels != own_channels:
        _check_channel_fit(path, own_channels, channels, channel_fit)
        weights = weights | {first: fitted_to_channels(weights[first], channels)}
    _check_match(source, weights, model, arch)
    model.load_state_dict({**model.state_dict(), **weights})
    _record_digests(model, source.weights)
    if not (heads or certain):
        _warn_of_heads(path, likely)
    report = {
        "family": source.layout.family,
        "arch": arch,
        "image_size": size,
        "heads": heads or likely,
        "channels": channels,
        "channel_fit": channel_fit if channels != own_channels else None,
        "epoch": source.epoch,
        "loaded": list(weights),
        "dropped": source.dropped,
    }
    return model, report


CHANNEL_FITS = ("timm",)


def find_images(path: str | os.PathLike, arch: str | None = None) -> tuple[int, dict[str, Any]]:
    """What the images are that a checkpoint was trained on.

    Returns:
        How many channels its first layer takes, 3 for random weights; and what the file says of their numbers, as
        `toolkit.bands.recorded` writes it, with the `arch`: nothing, as a rule.

    Raises:
        InputError: where `load_backbone` does so because of what the file is.
    """
    if is_none(path):
        return 3, {}
    source = _identify(path, _read(path), arch)
    found = _find_arch(source) if source.arch is None else source.arch
    told = {**source.images, "arch": found} if source.images else {}
    return _find_channels(source.weights, found)[1], told


def _find_channels(weights: Mapping[str, torch.Tensor], arch: str) -> tuple[str | None, int]:
    """The name of the first convolution's weight and its input channels; 3 where the file has none of this shape."""
    model = _meta_model(arch)
    name = f"{first_convolution(model)}.weight"
    expected = model.state_dict().get(name)
    if expected is None or name not in weights or weights[name].dim() != 4:
        return None, input_channels(model)
    (out, channels, *kernel), found = expected.shape, weights[name].shape
    return name, found[1] if found == (out, found[1], *kernel) and found[1] > 0 else channels


def _check_channel_fit(path: str | os.PathLike, found: int, wanted: int, fit: str | None) -> None:
    if fit is None:
        raise InputError(
            f"{path} is for images of {found} channels, not {wanted}: leave --channels out and choose as many --bands, "
            "or, if it must be, fit its first layer with --channel-fit timm"
        )


def fitted_to_channels(kernel: torch.Tensor, channels: int) -> torch.Tensor:
    """A first convolution's weight (out, C, h, w) for other channels, by timm's rule (`adapt_input_conv`).

    For one channel the weights of all are added up, so that grey gives what it gave as grey RGB. For more they are
    repeated in turn, and scaled by the ratio of the numbers.
    """
    found = kernel.shape[1]
    if channels == 1:
        return kernel.float().sum(1, keepdim=True).to(kernel.dtype)
    turns = -(-channels // found)
    return (kernel.float().repeat(1, turns, 1, 1)[:, :channels] * (found / channels)).to(kernel.dtype)


def load_contrast(path: str | os.PathLike) -> tuple[int | None, dict[str, dict[str, torch.Tensor]]]:
    """What a MoCo checkpoint holds beside its backbone.

    Args:
        path: any file that `load_backbone` reads.

    Returns:
        MoCo's version, 1, 2 or 3, or None where the file is not one of MoCo's pretraining; and the tensors of
        `projector` and `predictor` by their names in the modules of `moco.builder`, empty where the file has none.

    Raises:
        InputError: the file cannot be read, or these tensors are of no use.
    """
    tensors, info = _find_state_dict(path, _read(path))
    layout, encoder, dropped = _recognise(path, tensors, info)
    parts: dict[str, dict[str, torch.Tensor]] = {"projector": {}, "predictor": {}}
    if layout.family not in ("moco_v1", "moco_v2", "moco_v3", "moco_stage1"):
        return None, parts
    _check_tensors(path, tensors)
    for key, full in encoder.items():
        if key.startswith(_HEADS):
            parts["projector"][key.partition(".")[2]] = tensors[full]
    for full in dropped:
        name = full.removeprefix("module.")
        if name.startswith("predictor."):
            parts["predictor"][name.removeprefix("predictor.")] = tensors[full]
    if parts["predictor"] or layout.family == "moco_v3":
        return 3, parts
    return (2 if "0.weight" in parts["projector"] else 1), parts


def _read(path: str | os.PathLike) -> Any:
    if is_safetensors(path):
        return read_safetensors(path)[0]
    return read_checkpoint(path, objects=True)


NO_CHECKPOINT = "none"


def checkpoint_path(text: str) -> Path:
    """What `--checkpoint` names: a file, where 'shipped' stands for the one that comes with the toolkit."""
    return SHIPPED if text == "shipped" else Path(text)


def is_none(path: str | os.PathLike) -> bool:
    """Is this 'none', which stands for random weights in the place of a checkpoint?"""
    return str(path) == NO_CHECKPOINT


def stored_checkpoint(path: str | os.PathLike) -> str:
    """A checkpoint's path as files keep it: absolute, or relative to the toolkit if it is inside."""
    return NO_CHECKPOINT if is_none(path) else str(stored_path(Path(path).absolute()))


def option_problems(path: str | os.PathLike, arch: str | None, heads: int | None, fewer_bits: str | None) -> list[str]:
    """What is wrong with the options `--checkpoint`, `--arch` and `--heads`, before any file is read.

    Args:
        fewer_bits: the option that stores the weights in fewer bits, if one does.
    """
    problems = []
    if is_none(path) and arch is None:
        problems.append("--checkpoint none: random weights have no architecture of their own; say which with --arch")
    if is_none(path) and fewer_bits is not None:
        problems.append(
            f"{fewer_bits} with --checkpoint none: an adapter over weights in fewer bits needs their file, and random "
            "weights are in none; drop one of the two"
        )
    if not is_none(path) and not os.path.exists(path):
        problems.append(f"--checkpoint {path}: file not found; give the path of an existing checkpoint")
    if arch is not None:
        try:
            default_image_size(arch)
            check_heads(arch, heads)
        except InputError as error:
            problems.append(f"--arch {arch}: {error}")
    return problems


def _report_of_random(
    arch: str | None, image_size: int | None, heads: int | None, channels: int | None
) -> dict[str, Any]:
    if arch is None:
        raise InputError("random weights have no architecture of their own: give an arch")
    size = default_image_size(arch) if image_size is None else image_size
    shape = {"arch": arch, "image_size": size, "heads": heads or default_heads(arch), "channels": channels or 3}
    shape["channel_fit"] = None
    return {"family": NO_CHECKPOINT, **shape, "epoch": None, "loaded": [], "dropped": []}


def random_backbone(num_classes: int, report: Mapping[str, Any]) -> nn.Module:
    """The architecture that a report of `load_backbone` describes, with random weights."""
    model = build_backbone(report["arch"], num_classes, report["image_size"], report["heads"], report["channels"])
    model.base_digests = {}  # no file has these weights: an adapter file holds all of them
    return model


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values, in whatever memory format and on whatever device they lie."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _record_digests(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Sets `model.base_digests`, and `model.resized_digests` where the model holds other values than the checkpoint.

    Interpolation rounds differently from one CPU to the next, so an interpolated position embedding is known by what
    the checkpoint holds.
    """
    state = _backbone_state(model)
    model.base_digests = {name: tensor_digest(tensor) for name, tensor in state.items()} | other_heads(model)
    model.resized_digests = {}
    for name in _POSITIONS:
        if name in weights and weights[name].shape != state[name].shape:
            model.resized_digests[name] = model.base_digests[name]
            model.base_digests[name] = tensor_digest(weights[name].float())


# What other projects call layers, in the names of timm's ViTs and of torchvision's and timm's ResNets.
_Renames = tuple[tuple[str, str], ...]
_SEQUENTIAL: _Renames = (  # an nn.Sequential of a ResNet's children
    (r"0\.", "conv1."),
    (r"1\.", "bn1."),
    *((rf"{3 + i}\.", f"layer{i}.") for i in range(1, 5)),
)
_MMPRETRAIN: _Renames = (
    (r"patch_embed\.projection\.", "patch_embed.proj."),
    (r"layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
    (r"layers\.(\d+)\.attn\.", r"blocks.\1.attn."),
    (r"layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
    (r"ln1\.", "norm."),
)


@dataclass(frozen=True)
class _Layout:
    """Where a project's files have the backbone, and how these files are told from others.

    A file is in this layout if a tensor's name starts with `prefix`, one starts with any of `signs`, and there is
    something at `told`, a path through the dictionaries around the tensors. `module.` of DistributedDataParallel does
    not count.
    """

    family: str
    prefix: str = ""  # of the backbone's tensors
    beside: tuple[str, ...] = ()  # how the names of all others begin, which are left out
    signs: tuple[str, ...] = ("",)
    told: str = ""
    renames: _Renames = _SEQUENTIAL
    # Heads of a ViT-S whose position embedding is fixed, as MoCo v3 has it, and of one that has learned it.
    heads: tuple[int, int] = (12, 12)
    heads_certain: bool = False  # or else they are the likelier of two numbers

    def fits(self, keys: Collection[str], info: Mapping) -> bool:
        told = not self.told or _at(info, self.told) is not None
        return told and all(any(key.startswith(begin) for key in keys) for begin in (self.prefix, self.signs))


_MOCO = ("encoder_k.", "queue", "predictor.")
_LIGHTLY = (
    *("backbone_momentum.", "criterion.", "online_classifier.", "prediction_head.", "projection_head."),
    *("projection_head_momentum.", "query_backbone.", "query_projection_head."),
)
_SOLO_LEARN_SIGNS = ("classifier", "momentum_", "predictor", "projector")
_SOLO_LEARN = (*_SOLO_LEARN_SIGNS, "queue")
_OPENMMLAB = ("data_preprocessor.", "encoder_k.", "head.", "momentum_encoder.", "neck.", "queue")
_OPENMMLAB_SIGNS = ("data_preprocessor.", "encoder_k.", "neck.", "backbone.patch_embed.projection.")
_OF_TIMM = {"heads": (12, 6), "heads_certain": True}  # projects whose ViT-S is MoCo v3's under MoCo v3, else timm's

# The first that fits counts, so those with more signs come first.
_LAYOUTS = (
    _Layout("moco_stage1", "encoder_q.", _MOCO, told="model", heads_certain=True),  # this toolkit's own
    _Layout("seco", "encoder_q.", (*_MOCO, "heads_q.", "heads_k."), ("heads_q.",)),
    _Layout("moco_v2", "encoder_q.", _MOCO, ("encoder_q.fc.0.", "encoder_q.classifier.0.")),
    _Layout("moco_v1", "encoder_q.", _MOCO),
    _Layout("moco_v3", "base_encoder.", ("momentum_encoder.", "predictor.")),
    _Layout("mmpretrain", "backbone.", _OPENMMLAB, _OPENMMLAB_SIGNS, renames=_MMPRETRAIN, **_OF_TIMM),
    _Layout("mmpretrain", "backbone.", _OPENMMLAB, told="meta", renames=_MMPRETRAIN, **_OF_TIMM),
    _Layout("solo_learn", "backbone.", _SOLO_LEARN, _SOLO_LEARN_SIGNS, **_OF_TIMM),
    _Layout("solo_learn", "encoder.", _SOLO_LEARN, _SOLO_LEARN_SIGNS, **_OF_TIMM),  # its first releases
    _Layout("torchgeo", "backbone.", _LIGHTLY, told="hyper_parameters/model", heads=(6, 6), heads_certain=True),
    _Layout("torchgeo", "model.", ("criterion.",), told="hyper_parameters/model", heads=(6, 6), heads_certain=True),
    _Layout("lightning", "model.", ("criterion.",)),
    _Layout("lightly", "backbone.", _LIGHTLY),
    _Layout("vissl", "_feature_blocks."),
    _Layout("linear_probe", told="best_acc1"),
    _Layout("mmpretrain", signs=("patch_embed.projection.",), renames=_MMPRETRAIN, **_OF_TIMM),
    _Layout("deit", signs=("blocks.",), heads=(12, 6)),
    _Layout("torchvision"),
)
_PLACES = ("state_dict", "model", "classy_state_dict/base_model/model/trunk")  # of the tensors; the last is VISSL's
_HEADS = tuple(f"{name}." for name in HEAD_NAMES)
_BY_TIMM = {"densenet121": f"{TIMM}densenet121"}  # architectures that files name and torchvision's list here lacks


@dataclass
class _Source:
    """What a file holds, under the model's names."""

    path: str | os.PathLike
    layout: _Layout
    arch: str | None  # that was asked for, else the one that the file names
    epoch: int | None
    image_size: int | None
    heads: int | None
    images: dict[str, Any]  # what the file says of them
    weights: dict[str, torch.Tensor]
    dropped: list[str]


def _identify(path: str | os.PathLike, content: Any, wanted: str | None) -> _Source:
    """Finds the layout by where the backbone lies and takes it from there. timm's models keep timm's own names."""
    tensors, info = _find_state_dict(path, content)
    layout, encoder, dropped = _recognise(path, tensors, info)
    arch = _named_arch(info) if wanted is None else wanted
    own = arch is not None and arch.startswith(TIMM)
    heads = (f"{head_name(_meta_model(arch))}.",) if own else _HEADS
    dropped += [full for key, full in encoder.items() if key.startswith(heads)]
    names = {full: _renamed(key, layout.renames) for key, full in encoder.items() if not key.startswith(heads)}
    if not own:
        names = {full: _renamed(name, _TO_TORCHVISION) for full, name in names.items()}
    _check_tensors(path, {full: tensors[full] for full in names})
    if len(set(names.values())) < len(names):
        raise InputError(f"{path}: some tensors are there twice, under two projects' names")
    return _Source(
        path=path,
        layout=replace(layout, family="timm") if own and layout.family in ("deit", "torchvision") else layout,
        arch=arch,
        epoch=_whole_number(info, "epoch"),
        image_size=_whole_number(info, "config/image_size"),  # that this toolkit's pretraining stores
        heads=_whole_number(info, "config/heads"),
        images=_told_of_images(info),
        weights={name: tensors[full] for full, name in names.items()},
        dropped=dropped,
    )


def _at(content: Any, place: str) -> Any:
    """What lies at `place`, keys of nested dictionaries with slashes between them; None if nothing does."""
    for key in place.split("/"):
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _whole_number(info: Mapping, place: str) -> int | None:
    value = _at(info, place)
    return value if type(value) is int else None


def _told_of_images(info: Mapping) -> dict[str, Any]:
    """What this toolkit's pretraining says, or CEM500K's: `norms`, mean and std of grey from 0 to 1."""
    told, norms = info.get("normalization"), info.get("norms")
    if isinstance(norms, list) and len(norms) == 2:
        return {"mean": norms[:1], "std": norms[1:], "channels": 1, "bands": [], "scale": 255.0, "show_bands": [1]}
    return dict(told) if isinstance(told, Mapping) else {}


def _named_arch(info: Mapping) -> str | None:
    """The architecture that a file names. The official code's vit_base, say, is found by its shapes."""
    arch = info.get("arch")
    arch = _BY_TIMM.get(arch, arch) if isinstance(arch, str) else None
    return arch if arch and (arch in ARCHS or arch.startswith(TIMM)) else None


def _find_state_dict(path: str | os.PathLike, content: Any) -> tuple[dict[str, torch.Tensor], Mapping]:
    """The dictionary of tensors, and the one around it, which is empty if the tensors are the file's whole content."""
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a state_dict")
    place = next((place for place in _PLACES if isinstance(_at(content, place), Mapping)), None)
    tensors = content if place is None else _at(content, place)
    foreign = [str(key) for key, value in tensors.items() if not isinstance(key, str) or not torch.is_tensor(value)]
    if foreign or not tensors:
        found = f"; {listed(foreign)} hold no tensors" if foreign else ""
        objects = [f"{key} is a {value.kind}" for key, value in tensors.items() if isinstance(value, ForeignObject)]
        remedy = f" ({listed(objects)}: save its state_dict() from where the file was made)" if objects else ""
        raise InputError(f"{path}: no state_dict at its top, at 'state_dict' or at 'model'{found}{remedy}")
    return dict(tensors), content if place else {}


def _recognise(
    path: str | os.PathLike, tensors: Collection[str], info: Mapping
) -> tuple[_Layout, dict[str, str], list[str]]:
    """The file's layout, the backbone's tensors as name without the prefix -> name in the file, and all other names."""
    wrapped = all(key.startswith("module.") for key in tensors)  # by DistributedDataParallel
    keys = {key.removeprefix("module.") if wrapped else key: key for key in tensors}
    layout = next(layout for layout in _LAYOUTS if layout.fits(keys, info))
    unknown = [key for key in keys if not key.startswith((layout.prefix, *layout.beside))]
    if unknown:
        raise InputError(
            f"{path} ({layout.family}): beside the backbone at {layout.prefix}* it holds tensors of unknown use: "
            f"{listed(unknown)}"
        )
    encoder = {key.removeprefix(layout.prefix): full for key, full in keys.items() if key.startswith(layout.prefix)}
    return layout, encoder, [full for key, full in keys.items() if not key.startswith(layout.prefix)]


def _check_tensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises InputError for 8-bit floats, which mean nothing without their scales, complex numbers and the like."""
    for name, tensor in tensors.items():
        if not is_plain_tensor(tensor):
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
            raise InputError(f"{path}: {printable(name)} is stored as {kind}; save it as a dense tensor of float32")


_LAYER = r"encoder.layers.encoder_layer_\1."
_TO_TORCHVISION: _Renames = (
    # timm's ViTs
    (r"cls_token$", "class_token"),
    (r"pos_embed$", "encoder.pos_embedding"),
    (r"patch_embed\.proj\.(weight|bias)$", r"conv_proj.\1"),
    *((rf"patch_embed\.proj\.{3 * i}\.", f"conv_proj.conv_bn_relu_{i}.0.") for i in range(4)),
    *((rf"patch_embed\.proj\.{3 * i + 1}\.", f"conv_proj.conv_bn_relu_{i}.1.") for i in range(4)),
    (r"patch_embed\.proj\.12\.", "conv_proj.conv_last."),
    (r"blocks\.(\d+)\.norm([12])\.", _LAYER + r"ln_\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)$", _LAYER + r"self_attention.in_proj_\2"),
    (r"blocks\.(\d+)\.attn\.proj\.", _LAYER + "self_attention.out_proj."),
    (r"blocks\.(\d+)\.mlp\.fc1\.", _LAYER + "mlp.0."),
    (r"blocks\.(\d+)\.mlp\.fc2\.", _LAYER + "mlp.3."),
    (r"norm\.", "encoder.ln."),
    # torchvision's ViTs before its release 0.14, and the files that it still publishes
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.linear_1\.", _LAYER + "mlp.0."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.linear_2\.", _LAYER + "mlp.3."),
)


def _renamed(key: str, renames: _Renames) -> str:
    """A tensor's other name; what has none keeps its own, and is reported as surplus if no model has it."""
    for pattern, replacement in renames:
        if re.match(pattern, key):
            return re.sub(pattern, replacement, key, count=1)
    return key


def _find_arch(source: _Source) -> str:
    """The arch whose tensors agree with most of the file's in name and shape."""
    found = {(key, tuple(value.shape)) for key, value in source.weights.items() if key not in _POSITIONS}
    best = max(ARCHS, key=lambda arch: len(found & _shapes(arch)))  # a ResNet-18 is a part of a 34, which comes later
    if not found & _shapes(best):
        raise InputError(
            f"{source.path}: none of its {len(source.weights)} tensors belongs to a known backbone "
            f"({listed(source.weights)}); known are {', '.join(ARCHS)}; timm's models by --arch timm:NAME"
        )
    return best


_POSITIONS = ("encoder.pos_embedding", "pos_embed")  # torchvision's and timm's


@functools.cache
def _shapes(arch: str) -> frozenset[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a backbone's tensors, without those that depend on the image size or class count."""
    state = _backbone_state(_meta_model(arch))
    return frozenset((key, tuple(value.shape)) for key, value in state.items() if key not in _POSITIONS)


def _meta_model(arch: str) -> nn.Module:
    """A model of this architecture's own image size that takes no memory."""
    with torch.device("meta"):
        return build_backbone(arch, 1)


def _backbone_state(model: nn.Module) -> dict[str, torch.Tensor]:
    head = f"{head_name(model)}."
    return {key: value for key, value in model.state_dict().items() if not key.startswith(head)}


def _find_image_size(source: _Source, arch: str) -> int:
    """A ViT was trained at the size that its position embedding covers, a ResNet at the one that its file declares."""
    name = next((name for name in _POSITIONS if name in source.weights), None)
    patch, tokens = _patch_and_tokens(_meta_model(arch)) if name else (None, 0)
    if patch and _grid(source.weights[name], tokens):
        return _grid(source.weights[name], tokens) * patch
    return source.image_size or default_image_size(arch)


def _patch_and_tokens(model: nn.Module) -> tuple[int | None, int]:
    """The side of a ViT's patches in pixels, and how many positions its position embedding has beside theirs."""
    if not hasattr(model, "patch_embed"):  # torchvision's
        return getattr(model, "patch_size", None), 1
    patch, positions = model.patch_embed.patch_size[0], getattr(model, "pos_embed", None)
    if positions is None or positions.dim() != 3:
        return None, 0
    return patch, positions.shape[1] - model.patch_embed.num_patches


def _grid(positions: torch.Tensor, tokens: int) -> int:
    """Patches along each side under a position embedding (1, tokens + grid * grid, D); 0 if they form no square."""
    count = positions.shape[1] - tokens if positions.dim() == 3 else 0
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0


def _resize_positions(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Interpolates a position embedding for the model's image size, as torchvision or timm does."""
    state = model.state_dict()
    name = next((name for name in _POSITIONS if name in weights and name in state), None)
    if name is None or weights[name].shape == state[name].shape:
        return weights
    _, tokens = _patch_and_tokens(model)
    if not _grid(weights[name], tokens):
        return weights
    positions = weights[name].float()
    if hasattr(model, "patch_embed"):
        from timm.layers import resample_abs_pos_embed

        return weights | {name: resample_abs_pos_embed(positions, model.patch_embed.grid_size, None, tokens)}
    return weights | interpolate_embeddings(model.image_size, model.patch_size, {name: positions})


def _find_heads(source: _Source, arch: str) -> tuple[int | None, bool]:
    """How many heads a ViT of torchvision's has, and whether that is certain: it is not where the shapes are the same.

    MoCo v3 never trains the position embedding and gives the class token none (section 4.4); a trained one is never
    zero.
    """
    own = default_heads(arch)
    if own is None or source.heads or arch != "vit_small":
        return own and (source.heads or own), True
    positions = source.weights.get(_POSITIONS[0])
    fixed = positions is not None and positions.dim() == 3 and not positions[:, 0].any()
    return source.layout.heads[0 if fixed else 1], source.layout.heads_certain


def _warn_of_heads(path: str | os.PathLike, heads: int) -> None:
    warnings.warn(
        f"{path}: the number of heads of a ViT-S is in no tensor, and {heads} is a guess: MoCo v3's own has 12, "
        "SSL4EO-S12's and timm's have 6; say which with --heads",
        stacklevel=3,
    )


def _check_match(source: _Source, weights: dict[str, torch.Tensor], model: nn.Module, arch: str) -> None:
    """The file must hold the whole backbone and nothing else; raises InputError with all differences."""
    expected = _backbone_state(model)
    # BatchNorm's counter, which files from before PyTorch 0.4.1 lack, takes no part in any output.
    missing = [key for key in expected if key not in weights and not key.endswith("num_batches_tracked")]
    surplus = [key for key in weights if key not in expected]
    common = [key for key in expected if key in weights]
    misshapen = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in common
        if weights[key].shape != expected[key].shape
    ]
    if missing or surplus or misshapen:
        problems = {"missing": missing, "not expected": surplus, "of another shape": misshapen}
        found = "; ".join(f"{len(keys)} {problem}: {listed(keys)}" for problem, keys in problems.items() if keys)
        raise InputError(
            f"{source.path} ({source.layout.family}) does not hold a {arch}: {len(common) - len(misshapen)} of its "
            f"{len(expected)} backbone tensors match; {found}"
            f"{_other_stem(weights, expected)}{_better_arch(source, arch)}"
        )
    counters = {key for key in common if key.endswith("num_batches_tracked")}  # cast, as by half(), they are floats
    broken = [key for key in common if key not in counters and not _is_usable(weights[key], expected[key])]
    if broken:
        raise InputError(f"{source.path}: NaN, infinite or not real numbers in {listed(broken)}; use an earlier epoch")


def _is_usable(value: torch.Tensor, expected: torch.Tensor) -> bool:
    # One NaN or infinity makes the sum one, and a sum takes a fraction of the time of looking at each number.
    return value.is_floating_point() == expected.is_floating_point() and bool(value.sum(dtype=torch.float64).isfinite())


def _other_stem(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """Says so where a ResNet was made for small images: it has the other tensors of this one, and another function."""
    kernels = [tuple(tensors["conv1.weight"].shape[2:]) for tensors in (weights, expected) if "conv1.weight" in tensors]
    if kernels != [(3, 3), (7, 7)]:
        return ""
    return (
        "; it has solo-learn's stem for CIFAR, a 3x3 conv1 without pooling behind it, which this toolkit's ResNets do "
        "not have; take one that was pretrained with the stem for ImageNet"
    )


def _better_arch(source: _Source, arch: str) -> str:
    found = {(key, tuple(value.shape)) for key, value in source.weights.items() if key not in _POSITIONS}
    fitting = next((other for other in ARCHS if _shapes(other) == found), arch)
    if fitting == arch:
        return ""
    return f"; it looks like {fitting}: give the --checkpoint of a {arch}, or leave out --arch"


def describe_base(report: dict[str, Any], from_scratch: bool = False) -> str:
    """What the backbone is and what was recognised in its checkpoint, in two lines of a terminal."""
    images = f"{report['image_size']} pixels" + (f" of {n} channels" if (n := report["channels"]) != 3 else "")
    if from_scratch or report["family"] == NO_CHECKPOINT:
        return f"backbone: {report['arch']} for {images} with random weights"
    epoch = f", epoch {report['epoch']}" if report["epoch"] is not None else ""
    heads = f" with {report['heads']} heads" if report["heads"] != default_heads(report["arch"]) else ""
    needless = _parts_of(report["dropped"])
    others = f"; the file's {needless} not needed" if needless else ""
    return (
        f"backbone: {report['arch']}{heads} for {images} from a {report['family']} "
        f"checkpoint{epoch};\n          all {len(report['loaded'])} backbone tensors loaded{others}"
    )


_PARTS = {  # how the names of what is left out tell what it is; the first that matches counts
    "momentum encoder": r"(.*\.)?(encoder_k|heads_k|momentum_\w+|\w+_momentum)\.",
    "projector": r"(.*\.)?(projector|projection_head|\w+_projection_head|heads_q|neck)\.|(base_encoder|encoder_q)\.",
    "predictor": r"(.*\.)?(predictor|prediction_head)\.",
    "queue": r"(.*\.)?queue",
    "classifier": r"(.*\.)?(classifier|online_classifier|fc|heads?)\.",
}


def _parts_of(dropped: Collection[str]) -> str:
    """What the tensors left out are, as 'projector and queue are'; nothing where none was."""
    names = [name.removeprefix("module.") for name in dropped]
    found = {next((part for part, form in _PARTS.items() if re.match(form, name)), "other tensors") for name in names}
    parts = [part for part in (*_PARTS, "other tensors") if part in found]
    verb = "is" if len(parts) == 1 and parts[0] in _PARTS else "are"
    return f"{' and '.join([', '.join(parts[:-1])] * (len(parts) > 1) + parts[-1:])} {verb}" if parts else ""
