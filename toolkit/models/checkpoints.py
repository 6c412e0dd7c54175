"""Loads the backbone from any checkpoint of the MoCo family, matched key by key.

`load_backbone` knows the layouts in the table `_LAYOUTS`: of the official code, v1 and v2 (arXiv 1911.05722,
2003.04297) and v3 (2104.02057), of projects that pretrain with MoCo, and of converted files. timm's names stay.
"""

import contextlib
import functools
import hashlib
import math
import os
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision.models.vision_transformer import interpolate_embeddings

from toolkit import InputError, listed, printable
from toolkit.files import ForeignObject, is_plain_tensor, is_safetensors, read_checkpoint, read_safetensors, stored_path
from toolkit.models import backbones, names
from toolkit.models.names import ARCHS, NO_CHECKPOINT, TIMM, default_heads, is_none, is_path


def load_backbone(
    path: str | os.PathLike,
    num_classes: int,
    arch: str | None = None,
    image_size: int | None = None,
    heads: int | None = None,
    channels: int | None = None,
    channel_fit: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load the backbone of a checkpoint into a torchvision model with a new classifier head for `num_classes`.

    Args:
        path: a file in one of the layouts of `_LAYOUTS`, also as `.safetensors`; with a `timm:` arch, any file that has
            that model's own keys. `timm:NAME`: what timm publishes. 'none': random weights. A classifier is dropped.
        arch: one of `names.ARCHS`, or `timm:` and a name of timm's; by default what path, file or shapes say.
        image_size: pixels along each side; by default the file's own. A ViT's position embedding is interpolated.
        heads: the attention heads of a torchvision ViT; by default what the layout implies, or a guess with a warning.
        channels: the images' channels; by default those that the file's first layer takes.
        channel_fit: how to convert the first layer for another number, 'timm' (`_fitted_to_channels`); None: refuse.

    Returns the model and a report, whose `loaded` are names in the model, `dropped` in the file: projector, predictor,
    key encoder, queue, classifier. `record_of(model).base_digests` has the SHA-256 of each tensor, by which adapter
    files identify their base. Raises InputError if the file cannot be read, lacks tensors of the backbone or has
    others, or was trained on images with another number of channels.
    """
    source = _identify(path, arch)
    arch = source.arch
    if image_size is None:
        image_size = _find_image_size(source)
    if heads is None:
        heads = _find_heads(source)
    first, own_channels = _find_channels(source)
    if channels is None:
        channels = own_channels
    if channels == own_channels or is_none(path):
        channel_fit = None
    elif channel_fit is None:
        is_for = f"is for images of {own_channels} channels, not {channels}"
        raise InputError(f"{path} {is_for}: read as many bands, or fit its first layer with channel_fit='timm'")
    model = backbones.build_backbone(arch, num_classes, image_size, heads, channels)
    weights = _resize_positions(source.weights, model)
    if channel_fit is not None and first in weights:
        weights = weights | {first: _fitted_to_channels(weights[first], channels)}
    if is_none(path):
        # No checkpoint has these weights, so an adapter file stores all of them.
        backbones.record_of(model).base_digests = {}
    else:
        _check_match(source, weights, model)
        model.load_state_dict(weights, strict=False)
        record = backbones.record_of(model)
        state = _backbone_state(model)
        record.base_digests = {name: tensor_digest(state[name]) for name in state} | backbones.other_heads(model)
        for name in weights.keys() & _POSITIONS:
            if weights[name] is not source.weights[name]:  # it was interpolated
                record.resized_digests[name] = record.base_digests[name]
                record.base_digests[name] = tensor_digest(source.weights[name].float())
    return model, {
        "family": source.layout.family,
        "arch": arch,
        "image_size": image_size,
        "heads": heads,
        "channels": channels,
        "channel_fit": channel_fit,
        "file_channels": own_channels,
        "epoch": _whole_number(source.info, "epoch"),
        "licence": None if is_path(path) or is_none(path) else names.timm_config(str(path)).license,
        "loaded": list(weights),
        "dropped": source.dropped,
    }


def find_images(path: str | os.PathLike, arch: str | None = None) -> tuple[int, dict[str, Any]]:
    """The channels that a checkpoint's first layer takes; and its metadata on images, as `bands.recorded` has them."""
    source = _identify(path, arch)
    _, channels = _find_channels(source)
    about = source.info.get("normalization")  # of this toolkit's pretraining
    norms = source.info.get("norms")  # of CEM500K's: mean and std of grey
    if isinstance(norms, list) and len(norms) == 2:
        about = {"mean": norms[:1], "std": norms[1:], "channels": 1, "bands": [], "scale": 255.0}
    if not about or not isinstance(about, Mapping):
        return channels, {}
    return channels, {**about, "arch": source.arch}


def _find_channels(source: "_Source") -> tuple[str | None, int]:
    """The name of the first convolution's weight, and its input channels; without one, None and the arch's own."""
    model = _meta_model(source.arch)
    name = f"{backbones.first_convolution(model)}.weight"
    kernel = source.weights.get(name)
    if kernel is None or kernel.dim() != 4 or kernel.shape[1] == 0:
        return None, backbones.input_channels(model)
    return name, kernel.shape[1]


def _fitted_to_channels(kernel: torch.Tensor, channels: int) -> torch.Tensor:
    """Convert a first convolution's weight (out, C, h, w) to other channels, by timm's rule (`adapt_input_conv`)."""
    if channels == 1:
        return kernel.float().sum(1, keepdim=True).to(kernel.dtype)
    found = kernel.shape[1]
    return (kernel[:, torch.arange(channels) % found].float() * (found / channels)).to(kernel.dtype)


def load_contrast(path: str | os.PathLike) -> tuple[int | None, dict[str, dict[str, torch.Tensor]]]:
    """The version of MoCo that wrote a checkpoint, 2 (for 1, too), 3 or None, and its `projector` and `predictor`."""
    tensors, _, layout, encoder, dropped = _recognise(path)
    if not layout.family.startswith("moco_"):
        return None, {"projector": {}, "predictor": {}}
    _check_tensors(path, tensors)
    projector = {key.partition(".")[2]: tensors[full] for key, full in encoder.items() if key.startswith(_HEADS)}
    others = {full.removeprefix("module."): tensors[full] for full in dropped}
    predictor = {name.partition(".")[2]: others[name] for name in others if name.startswith("predictor.")}
    version = 3 if predictor or layout.family == "moco_v3" else 2
    return version, {"projector": projector, "predictor": predictor}


def stored_checkpoint(path: str | os.PathLike) -> str:
    """A checkpoint's path as files record it: absolute, or relative to the toolkit if it is inside."""
    return str(stored_path(Path(path).absolute())) if is_path(path) else str(path)


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values, which does not depend on memory format and device."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def state_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Equal for the same tensors under the same names."""
    lines = [f"{name} {tensor_digest(tensor)}" for name, tensor in sorted(tensors.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


_POSITIONS = ("encoder.pos_embedding", "pos_embed")  # torchvision's and timm's

# Other projects' names of layers -> the names in timm's ViTs, or in torchvision's and timm's ResNets.
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


class _Layout(NamedTuple):
    """Where a project's files have the backbone, and how to recognise these: by all of prefix, signs and entry."""

    family: str
    prefix: str = ""  # of the backbone's tensors
    signs: tuple[str, ...] = ("",)  # with one of which some name begins, without DDP's `module.`
    entry: str = ""  # a path through the dictionaries around the tensors, at which there is something
    renames: _Renames = _SEQUENTIAL
    # The attention heads of a ViT-S with a fixed position embedding, as in MoCo v3, and of one with a learned one.
    heads: tuple[int, int] = (12, 12)
    heads_certain: bool = False  # False: they are the likelier of two numbers

    def fits(self, keys: Collection[str], info: Mapping) -> bool:
        has_entry = not self.entry or value_at(info, self.entry) is not None
        has_prefix = any(key.startswith(self.prefix) for key in keys)
        return has_entry and has_prefix and any(key.startswith(self.signs) for key in keys)


_SOLO_LEARN_SIGNS = ("classifier", "momentum_", "predictor", "projector")
_OPENMMLAB_SIGNS = ("data_preprocessor.", "encoder_k.", "neck.", "backbone.patch_embed.projection.")
_OF_TIMM = {"heads": (12, 6), "heads_certain": True}  # for projects that use MoCo v3's ViT-S under MoCo v3, else timm's

# The first layout that fits counts, so those with more signs come first.
_LAYOUTS = (
    _Layout("moco_stage1", "encoder_q.", entry="model", heads_certain=True),  # this toolkit's own
    _Layout("seco", "encoder_q.", ("heads_q.",)),
    _Layout("moco_v2", "encoder_q.", ("encoder_q.fc.0.", "encoder_q.classifier.0.")),
    _Layout("moco_v1", "encoder_q."),
    _Layout("moco_v3", "base_encoder."),
    _Layout("mmpretrain", "backbone.", _OPENMMLAB_SIGNS, renames=_MMPRETRAIN, **_OF_TIMM),
    _Layout("mmpretrain", "backbone.", entry="meta", renames=_MMPRETRAIN, **_OF_TIMM),
    _Layout("solo_learn", "backbone.", _SOLO_LEARN_SIGNS, **_OF_TIMM),
    _Layout("solo_learn", "encoder.", _SOLO_LEARN_SIGNS, **_OF_TIMM),  # its first releases
    _Layout("torchgeo", "backbone.", entry="hyper_parameters/model", heads=(6, 6), heads_certain=True),
    _Layout("torchgeo", "model.", entry="hyper_parameters/model", heads=(6, 6), heads_certain=True),
    _Layout("lightning", "model."),
    _Layout("lightly", "backbone."),
    _Layout("vissl", "_feature_blocks."),
    _Layout("linear_probe", entry="best_acc1"),
    _Layout("mmpretrain", signs=("patch_embed.projection.",), renames=_MMPRETRAIN, **_OF_TIMM),
    _Layout("deit", signs=("blocks.",), heads=(12, 6)),
    _Layout("torchvision"),
)
_PLACES = ("state_dict", "model", "classy_state_dict/base_model/model/trunk")  # of the tensors; the last is VISSL's
_HEADS = tuple(map("{}.".format, backbones.HEAD_NAMES))
_BY_TIMM = {"densenet121": f"{TIMM}densenet121"}  # architectures that files name, and that only timm builds here


class _Source(NamedTuple):
    """The content of a file, with tensors under the model's names."""

    path: str | os.PathLike
    layout: _Layout
    arch: str  # the one that was asked for, or that the file names, or else that its tensors' shapes imply
    info: Mapping[str, Any]  # what the file has around the tensors
    weights: dict[str, torch.Tensor]
    dropped: list[str]


def _identify(path: str | os.PathLike, wanted: str | None) -> _Source:
    """Recognise the layout, and take the backbone out of it. A model of timm has its tensors under timm's names."""
    if is_none(path):
        if wanted is None:
            raise InputError(f"{names.NO_ARCH}: give an arch")
        return _Source(path, _Layout(NO_CHECKPOINT, heads_certain=True), wanted, {}, {}, [])
    tensors, info, layout, encoder, dropped = _recognise(path)
    arch = wanted or _BY_TIMM.get(str(info.get("arch")), str(info.get("arch")))
    is_timm = arch.startswith(TIMM)
    head = _HEADS
    if is_timm:
        head = f"{backbones.head_name(_meta_model(arch))}."
        if layout.family in ("deit", "torchvision"):
            layout = layout._replace(family="timm")
    weights = {}
    for key, full in encoder.items():
        if key.startswith(head):
            dropped.append(full)
            continue
        name = _renamed(key, layout.renames)
        if not is_timm:
            name = _renamed(name, _TO_TORCHVISION)
        if name in weights:
            raise InputError(f"{path}: some tensors are there twice, under two projects' names")
        weights[name] = tensors[full]
    _check_tensors(path, weights)
    if not wanted and not is_timm and arch not in ARCHS:  # the official code has other names, such as vit_base
        found = shapes_of(weights)
        arch = max(ARCHS, key=lambda own: len(found & _shapes(own)))  # a ResNet-18 is a part of a 34, which comes later
        if not found & _shapes(arch):
            known = _hint_of_timm(path) or f"known are {', '.join(ARCHS)}; timm's models by --arch timm:NAME"
            none = f"none of its {len(weights)} tensors belongs to a known backbone ({listed(weights)})"
            raise InputError(f"{path}: {none}; {known}")
    return _Source(path, layout, arch, info, weights, dropped)


def value_at(content: Any, place: str) -> Any:
    """The value at `place`, keys of nested dictionaries joined by slashes; None if there is none."""
    for key in place.split("/"):
        if not isinstance(content, Mapping):
            return None
        content = content.get(key)
    return content


def _whole_number(info: Mapping, place: str) -> int | None:
    value = value_at(info, place)
    return value if type(value) is int else None


def _find_state_dict(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], Mapping]:
    """The dictionary of tensors, and the dictionary around it, empty if the tensors are the file's whole content."""
    if not is_path(path):
        return _weights_of_timm(str(path)), {"arch": str(path)}
    content = read_safetensors(path)[0] if is_safetensors(path) else read_checkpoint(path, objects=True)
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a state_dict")
    tensors = content
    info = {}
    for place in reversed(_PLACES):  # the first counts
        if isinstance(value_at(content, place), Mapping):
            tensors = value_at(content, place)
            info = content
    foreign = [key for key, value in tensors.items() if not isinstance(key, str) or not torch.is_tensor(value)]
    if foreign or not tensors:
        problem = f"{path}: no state_dict at its top, at 'state_dict' or at 'model'; {listed(foreign)} hold no tensors"
        for key in foreign:
            if isinstance(tensors[key], ForeignObject):
                problem += f"; {printable(key)} is a {printable(tensors[key].kind)}: "
                problem += "save its state_dict() from where the file was made"
        raise InputError(problem)
    return dict(tensors), info


def _weights_of_timm(arch: str) -> dict[str, torch.Tensor]:
    """The tensors of ``timm.create_model(NAME, pretrained=True)``; an InputError says what to fetch elsewhere."""
    config = names.timm_config(arch)
    import timm  # here: few have it

    try:
        with torch.random.fork_rng(devices=[]):  # lest a run from the same file draw other numbers
            return timm.create_model(arch.removeprefix(TIMM), pretrained=True).state_dict()
    except Exception as error:  # of a library for HTTP, which is another in each of its releases
        why = printable((str(error).splitlines() or [type(error).__name__])[0])
        place = config.url
        if config.hf_hub_id:
            file = config.hf_hub_filename or "model.safetensors"
            place = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{file}"
        remedy = f"fetch {place} elsewhere and give its path as --checkpoint, and when training add --arch {arch}"
        raise InputError(f"{arch} cannot be loaded ({why}): {remedy}") from None


def _recognise(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], Mapping, _Layout, dict[str, str], list[str]]:
    """What `_find_state_dict` returns; the layout, the backbone's names (short -> in the file), and all other names."""
    tensors, info = _find_state_dict(path)
    wrapper = "module." if all(key.startswith("module.") for key in tensors) else ""  # of DistributedDataParallel
    keys = {key.removeprefix(wrapper): key for key in tensors}
    layout = next(layout for layout in _LAYOUTS if layout.fits(keys, info))
    encoder = {}
    others = []
    for key, full in keys.items():
        if key.startswith(layout.prefix):
            encoder[key.removeprefix(layout.prefix)] = full
        else:
            others.append(full)
    return tensors, info, layout, encoder, others


def _check_tensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError for 8-bit floats, which mean nothing without their scales, for complex numbers and the like."""
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
    *((rf"patch_embed\.proj\.{3 * i + j}\.", f"conv_proj.conv_bn_relu_{i}.{j}.") for i in range(4) for j in range(2)),
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
    """A tensor's new name, or its old one if no rule fits; the model's check reports it if it is surplus."""
    for pattern, replacement in renames:
        if re.match(pattern, key):
            return re.sub(pattern, replacement, key, count=1)
    return key


def _shapes(arch: str) -> frozenset[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a backbone's tensors, without those that depend on the image size or class count."""
    return shapes_of(_backbone_state(_meta_model(arch)))


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> frozenset[tuple[str, tuple[int, ...]]]:
    """Names and shapes of tensors, without the position embedding."""
    return frozenset((key, tuple(value.shape)) for key, value in tensors.items() if key not in _POSITIONS)


@functools.cache
def _meta_model(arch: str) -> nn.Module:
    """A model of this architecture, with its own image size, that takes no memory."""
    with torch.device("meta"):
        return backbones.build_backbone(arch, 1)


def _backbone_state(model: nn.Module) -> dict[str, torch.Tensor]:
    head = f"{backbones.head_name(model)}."
    return {key: value for key, value in model.state_dict().items() if not key.startswith(head)}


def _find_image_size(source: _Source) -> int:
    """A ViT's position embedding implies the image size of the pretraining; this toolkit's file of a ResNet has it."""
    for name in source.weights.keys() & _POSITIONS:
        patch, tokens = _patch_and_tokens(_meta_model(source.arch))
        if patch and (side := _grid(source.weights[name], tokens)):
            return side * patch
    return _whole_number(source.info, "config/image_size") or names.default_image_size(source.arch)


def _patch_and_tokens(model: nn.Module) -> tuple[int | None, int]:
    """The side of a ViT's patches in pixels, and the number of positions that belong to no patch."""
    if not hasattr(model, "patch_embed"):  # torchvision's
        return getattr(model, "patch_size", None), 1
    positions = getattr(model, "pos_embed", None)
    if positions is None or positions.dim() != 3:
        return None, 0
    return model.patch_embed.patch_size[0], positions.shape[1] - model.patch_embed.num_patches


def _grid(positions: torch.Tensor, tokens: int) -> int:
    """The patches along each side in a position embedding (1, tokens + grid * grid, D); 0 if they form no square."""
    if positions.dim() != 3 or positions.shape[1] < tokens:
        return 0
    count = positions.shape[1] - tokens
    side = math.isqrt(count)
    return side if side * side == count else 0


def _resize_positions(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Interpolate a position embedding to the model's image size, as torchvision or timm does."""
    state = model.state_dict()
    for name in weights.keys() & _POSITIONS & state.keys():
        _, tokens = _patch_and_tokens(model)
        positions = weights[name].float()
        if positions.shape == state[name].shape or not _grid(positions, tokens):
            continue
        if hasattr(model, "patch_embed"):
            from timm.layers import resample_abs_pos_embed

            return weights | {name: resample_abs_pos_embed(positions, model.patch_embed.grid_size, None, tokens)}
        return weights | interpolate_embeddings(model.image_size, model.patch_size, {name: positions})
    return weights


def _find_heads(source: _Source) -> int | None:
    """The number of heads of a torchvision ViT. No tensor shows it: for a ViT-S it may be a guess, with a warning."""
    recorded = _whole_number(source.info, "config/heads")
    if source.arch != "vit_small" or recorded:
        return recorded or default_heads(source.arch)
    if source.layout.family == "deit" and "vit_small_patch16" in os.path.basename(source.path):  # timm's, or torchgeo's
        return 6
    heads_if_fixed, heads = source.layout.heads
    positions = source.weights.get(_POSITIONS[0])
    # MoCo v3 fixes the position embedding, and its class token's is zero (section 4.4); a trained one is never zero.
    if positions is not None and positions.dim() == 3 and not positions[:, 0].any():
        heads = heads_if_fixed
    if not source.layout.heads_certain:
        guess = f"the number of heads of a ViT-S is in no tensor, and {heads} is a guess"
        known = "MoCo v3's own has 12, SSL4EO-S12's and timm's have 6"
        warnings.warn(f"{source.path}: {guess}: {known}; say which with --heads", stacklevel=3)
    return heads


def _check_match(source: _Source, weights: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Raise InputError, with all differences, unless the file holds the whole backbone and nothing else."""
    expected = _backbone_state(model)
    # Files from before PyTorch 0.4.1 lack BatchNorm's counter, which no output depends on.
    missing = [key for key in expected if key not in weights and not key.endswith("num_batches_tracked")]
    surplus = [key for key in weights if key not in expected]
    shapes = []
    for key, value in weights.items():
        if key in expected and value.shape != expected[key].shape:
            shapes.append(f"{key} {tuple(value.shape)} instead of {tuple(expected[key].shape)}")
    if missing or surplus or shapes:
        found = f"{len(weights) - len(surplus) - len(shapes)} of its {len(expected)} backbone tensors match"
        for keys, problem in ((missing, "missing"), (surplus, "not expected"), (shapes, "of another shape")):
            if keys:
                found += f"; {len(keys)} {problem}: {listed(keys)}"
        if likely := [arch for arch in ARCHS if arch != source.arch and _shapes(arch) == shapes_of(source.weights)]:
            found += f"; it looks like {likely[0]}: give the --checkpoint of a {source.arch}, or leave out --arch"
        elif is_path(source.path) and (hint := _hint_of_timm(source.path)):
            found = hint
        raise InputError(f"{source.path} ({source.layout.family}) does not hold a {source.arch}: {found}")
    broken = []
    for key, value in weights.items():
        is_of_kind = value.is_floating_point() == expected[key].is_floating_point()
        # A single NaN or infinity makes the sum NaN or infinite, and a sum is much faster than checking each number.
        if not key.endswith("num_batches_tracked") and not (is_of_kind and value.sum(dtype=torch.float64).isfinite()):
            broken.append(key)
    if broken:
        raise InputError(f"{source.path}: NaN, infinite or not real numbers in {listed(broken)}; use an earlier epoch")


MOST_CANDIDATES = 40  # of timm's models that are built to compare them with a file, in some seconds


def _hint_of_timm(path: str | os.PathLike) -> str:
    """Which models of timm a file may be of, by its tensors; empty if none is found."""
    tensors, _, _, encoder, _ = _recognise(path)
    shapes = {key: tuple(tensors[full].shape) for key, full in encoder.items()}
    fitting = []
    for name in names.timm_candidates(path, shapes)[:MOST_CANDIDATES]:
        with contextlib.suppress(InputError):
            own = _shapes(f"{TIMM}{name}")
            others = [key for key, _ in shapes.items() - own if not key.startswith(_HEADS) and key not in _POSITIONS]
            if own <= shapes.items() and not others:
                fitting.append(f"{TIMM}{name}")
    for name in fitting.copy():  # TensorFlow's pads otherwise, which no tensor shows
        with contextlib.suppress(InputError):
            twin = name.replace(TIMM, f"{TIMM}tf_")
            names.timm_config(twin)
            fitting.append(twin)
    return f"it could be of {listed(fitting)}: say which, as --arch {fitting[0]}" if fitting else ""


def describe_base(report: dict[str, Any]) -> str:
    """A description of the backbone and its checkpoint, in two lines of a terminal."""
    arch = report["arch"]
    text = f"backbone: {arch}"
    if report["heads"] != default_heads(arch):
        text += f" with {report['heads']} heads"
    text += f" for {report['image_size']} pixels"
    if report["channels"] != 3:
        text += f" of {report['channels']} channels"
    if report["family"] == NO_CHECKPOINT:
        return f"{text} with random weights"
    text += f" from a {report['family']} checkpoint"
    if report["epoch"] is not None:
        text += f", epoch {report['epoch']}"
    if report["licence"] is not None:
        text += f", licence {report['licence']}"
    loaded = f"all {len(report['loaded'])} backbone tensors loaded"
    if report["channel_fit"] is not None:
        loaded += f", the first layer fitted from {report['file_channels']} channels, in their order"
    return f"{text};\n          {loaded}; {len(report['dropped'])} others in the file left out"
