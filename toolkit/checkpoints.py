"""MoCo checkpoints: the backbone of any file of the MoCo family, matched key by key.

The layouts that `load_backbone` knows are those of the official code, v1 and v2 (arXiv 1911.05722, 2003.04297) and v3
(2104.02057), and of what their users convert and export. timm's models, which are named, are loaded as they are.
"""

import functools
import hashlib
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models.vision_transformer import interpolate_embeddings

from toolkit import InputError, listed, printable
from toolkit.backbones import ARCHS, HEAD_NAMES, TIMM, build_backbone, default_image_size, head_name
from toolkit.files import is_plain_tensor, read_checkpoint, read_safetensors, stored_path

OFFICIAL_CHECKPOINTS = (
    "for photographs give --checkpoint: moco_v2_800ep_pretrain.pth.tar (github.com/facebookresearch/moco), or "
    "r-50-1000ep.pth.tar, vit-s-300ep.pth.tar, vit-b-300ep.pth.tar (github.com/facebookresearch/moco-v3)"
)


def load_backbone(
    path: str | os.PathLike, num_classes: int, arch: str | None = None, image_size: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone in a checkpoint, in a torchvision model with a fresh classifier head for `num_classes`.

    Args:
        path: a file of MoCo v1, v2 or v3, main_lincls, convert_to_deit, lightly, this toolkit's stage 1 or torchvision;
            a `.safetensors` file of tensors under timm's or torchvision's names; with a `timm:` arch, any file that has
            that model's own keys. 'none': random weights.
        num_classes: outputs of the new head. A classifier in the file is always dropped: the head is to be trained.
        arch: one of `toolkit.backbones.ARCHS`, or `timm:` and a model of timm; by default what the file says or its
            shapes imply.
        image_size: by default the file's own. A ViT's position embedding is interpolated to any other.

    Returns:
        The model and a report: `family`, `arch`, `image_size`, `epoch` (None if unknown), `loaded` (names in the
        model), `dropped` (names in the file: projector, predictor, key encoder, queue, classifier).
        `model.base_digests` says what the checkpoint holds (name -> SHA-256): adapter files know their base by it.

    Raises:
        InputError: the file cannot be read, or not every backbone tensor of the arch is in it, or others are too.
    """
    if is_none(path):
        return _random_backbone(num_classes, arch, image_size)
    content = _read(path)
    source = _identify(path, content, arch)
    arch = _find_arch(source) if arch is None else arch
    size = _find_image_size(source, arch) if image_size is None else image_size
    if arch == "vit_small":
        _check_head_count(source, arch)
    model = build_backbone(arch, num_classes, size)
    weights = _resize_positions(source.weights, model)
    _check_match(source, weights, model, arch)
    model.load_state_dict({**model.state_dict(), **weights})
    _record_digests(model, source.weights)
    report = {
        "family": source.family,
        "arch": arch,
        "image_size": size,
        "epoch": source.epoch,
        "loaded": list(weights),
        "dropped": source.dropped,
    }
    return model, report


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
    tensors = _find_state_dict(path, _read(path))[1]
    prefix, encoder, dropped = _split(path, tensors)
    parts: dict[str, dict[str, torch.Tensor]] = {"projector": {}, "predictor": {}}
    if prefix not in ("encoder_q.", "base_encoder."):
        return None, parts
    _check_tensors(path, tensors)
    for key, full in encoder.items():
        if key.startswith(_HEADS):
            parts["projector"][key.partition(".")[2]] = tensors[full]
    for full in dropped:
        name = full.removeprefix("module.")
        if name.startswith("predictor."):
            parts["predictor"][name.removeprefix("predictor.")] = tensors[full]
    if parts["predictor"] or prefix == "base_encoder.":
        return 3, parts
    return (2 if "0.weight" in parts["projector"] else 1), parts


def _read(path: str | os.PathLike) -> Any:
    return read_safetensors(path)[0] if Path(path).suffix == ".safetensors" else read_checkpoint(path)


NO_CHECKPOINT = "none"


def is_none(path: str | os.PathLike) -> bool:
    """Is this 'none', which stands for random weights in the place of a checkpoint?"""
    return str(path) == NO_CHECKPOINT


def stored_checkpoint(path: str | os.PathLike) -> str:
    """A checkpoint's path as files keep it: absolute, or relative to the toolkit if it is inside."""
    return NO_CHECKPOINT if is_none(path) else str(stored_path(Path(path).absolute()))


def option_problems(path: str | os.PathLike, arch: str | None, fewer_bits: str | None) -> list[str]:
    """What is wrong with the options `--checkpoint` and `--arch`, before any file is read.

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
        except InputError as error:
            problems.append(f"--arch {arch}: {error}")
    return problems


def _random_backbone(num_classes: int, arch: str | None, image_size: int | None) -> tuple[nn.Module, dict[str, Any]]:
    if arch is None:
        raise InputError("random weights have no architecture of their own: give an arch")
    model = build_backbone(arch, num_classes, image_size)
    model.base_digests = {}  # no file has these weights: an adapter file holds all of them
    size = default_image_size(arch) if image_size is None else image_size
    return model, {
        "family": NO_CHECKPOINT,
        "arch": arch,
        "image_size": size,
        "epoch": None,
        "loaded": [],
        "dropped": [],
    }


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
    model.base_digests = {name: tensor_digest(tensor) for name, tensor in state.items()}
    model.resized_digests = {}
    for name in _POSITIONS:
        if name in weights and weights[name].shape != state[name].shape:
            model.resized_digests[name] = model.base_digests[name]
            model.base_digests[name] = tensor_digest(weights[name].float())


@dataclass
class _Source:
    """What a file holds, under the model's names."""

    path: str | os.PathLike
    family: str
    arch: str | None
    epoch: int | None
    image_size: int | None
    weights: dict[str, torch.Tensor]
    dropped: list[str]


# Where the query encoder lies in files that hold more than one network, and what else lies there.
_LAYOUTS = {
    "encoder_q.": ("encoder_k.", "queue", "predictor."),
    "base_encoder.": ("momentum_encoder.", "predictor."),
    "backbone.": (
        "backbone_momentum.",
        "criterion.",
        "online_classifier.",
        "prediction_head.",
        "projection_head.",
        "projection_head_momentum.",
        "query_backbone.",
        "query_projection_head.",
    ),
}
_HEADS = tuple(f"{name}." for name in HEAD_NAMES)


def _identify(path: str | os.PathLike, content: Any, wanted: str | None) -> _Source:
    """Finds the family by where the backbone lies and takes it from there. timm's models have the file's own names."""
    own = wanted is not None and wanted.startswith(TIMM)
    heads, name_here = ((f"{head_name(_meta_model(wanted))}.",), str) if own else (_HEADS, _torchvision_name)
    wrapper, tensors = _find_state_dict(path, content)
    info = content if wrapper else {}
    prefix, encoder, dropped = _split(path, tensors)
    dropped += [full for key, full in encoder.items() if key.startswith(heads)]
    names = {full: name_here(key) for key, full in encoder.items() if not key.startswith(heads)}
    _check_tensors(path, {full: tensors[full] for full in names})
    if len(set(names.values())) < len(names):
        raise InputError(f"{path}: some tensors are there twice, under timm's and torchvision's names")
    arch, epoch = info.get("arch"), info.get("epoch")
    return _Source(
        path=path,
        family="timm" if own else _family(prefix, wrapper, encoder, info),
        arch=arch if arch in ARCHS else None,  # the official code's vit_base, say, is found by its shapes
        epoch=epoch if isinstance(epoch, int) else None,
        image_size=_declared_image_size(info),
        weights={name: tensors[full] for full, name in names.items()},
        dropped=dropped,
    )


def _find_state_dict(path: str | os.PathLike, content: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """The dictionary of tensors and the key that it lies at, '' if it is the file's whole content."""
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a state_dict")
    wrapper = next((key for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), "")
    tensors = content[wrapper] if wrapper else content
    foreign = [str(key) for key, value in tensors.items() if not isinstance(key, str) or not torch.is_tensor(value)]
    if foreign or not tensors:
        found = f"; {listed(foreign)} hold no tensors" if foreign else ""
        raise InputError(f"{path}: no state_dict at its top, at 'state_dict' or at 'model'{found}")
    return wrapper, dict(tensors)


def _split(path: str | os.PathLike, tensors: Iterable[str]) -> tuple[str, dict[str, str], list[str]]:
    """Returns the backbone's prefix, its tensors' names without the prefix -> in the file, and all other names."""
    wrapped = all(key.startswith("module.") for key in tensors)  # by DistributedDataParallel
    keys = {key.removeprefix("module.") if wrapped else key: key for key in tensors}
    prefix = next((p for p in _LAYOUTS if any(key.startswith(p) for key in keys)), "")
    unknown = [key for key in keys if not key.startswith((prefix, *_LAYOUTS.get(prefix, ())))]
    if unknown:
        raise InputError(f"{path}: beside the backbone at {prefix}* it holds tensors of unknown use: {listed(unknown)}")
    encoder = {key.removeprefix(prefix): full for key, full in keys.items() if key.startswith(prefix)}
    return prefix, encoder, [full for key, full in keys.items() if not key.startswith(prefix)]


def _check_tensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises InputError for 8-bit floats, which mean nothing without their scales, complex numbers and the like."""
    for name, tensor in tensors.items():
        if not is_plain_tensor(tensor):
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
            raise InputError(f"{path}: {printable(name)} is stored as {kind}; save it as a dense tensor of float32")


def _family(prefix: str, wrapper: str, encoder: Iterable[str], info: Mapping) -> str:
    if prefix == "encoder_q.":
        return "moco_stage1" if wrapper == "model" else "moco_v2" if "fc.0.weight" in encoder else "moco_v1"
    if prefix:
        return {"base_encoder.": "moco_v3", "backbone.": "lightly"}[prefix]
    timm = any(key.startswith("blocks.") for key in encoder)
    return "linear_probe" if "best_acc1" in info else "deit" if timm else "torchvision"


_LAYER = r"encoder.layers.encoder_layer_\1."
_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        # timm's ViTs
        (r"cls_token$", "class_token"),
        (r"pos_embed$", "encoder.pos_embedding"),
        (r"patch_embed\.proj\.(weight|bias)$", r"conv_proj.\1"),
        *[(rf"patch_embed\.proj\.{3 * i}\.", f"conv_proj.conv_bn_relu_{i}.0.") for i in range(4)],
        *[(rf"patch_embed\.proj\.{3 * i + 1}\.", f"conv_proj.conv_bn_relu_{i}.1.") for i in range(4)],
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
        # lightly's ResNets: nn.Sequential of torchvision's layers
        (r"0\.", "conv1."),
        (r"1\.", "bn1."),
        *[(rf"{3 + i}\.", f"layer{i}.") for i in range(1, 5)],
    ]
]


def _torchvision_name(key: str) -> str:
    """torchvision's name for a tensor; what has none keeps its own and is reported as surplus."""
    for pattern, replacement in _RENAMES:
        if pattern.match(key):
            return pattern.sub(replacement, key, count=1)
    return key


def _find_arch(source: _Source) -> str:
    """What the file says, else the arch whose tensors agree with most of the file's in name and shape."""
    if source.arch:
        return source.arch
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


def _declared_image_size(info: Mapping) -> int | None:
    """The image size in the configuration that this toolkit's pretraining stores."""
    config = info.get("config")
    size = config.get("image_size") if isinstance(config, Mapping) else None
    return size if isinstance(size, int) else None


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


def _check_head_count(source: _Source, arch: str) -> None:
    """Raises InputError, or warns, where a ViT-S may be timm's or DeiT's, with 6 heads: MoCo v3's has 12.

    All shapes are the same, so the wrong one would load in silence. What tells them apart is the position embedding:
    MoCo v3 never trains it and gives the class token none (section 4.4); a trained one is never zero.
    """
    positions = source.weights.get(_POSITIONS[0])
    fixed = positions is not None and positions.dim() == 3 and not positions[:, 0].any()
    if source.family != "deit" or source.arch == arch or fixed:
        return
    doubt = f"{source.path}: a ViT-S of unknown origin: with timm's 6 heads it would compute something else here"
    if any(name.removeprefix("module.").startswith("head.") for name in source.dropped):
        raise InputError(f"{doubt}; use MoCo v3's own file, with 12 heads")
    warnings.warn(f"{doubt}; it is taken for MoCo v3's, with 12 heads", stacklevel=3)


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
            f"{source.path} ({source.family}) does not hold a {arch}: {len(common) - len(misshapen)} of its "
            f"{len(expected)} backbone tensors match; {found}{_other_channels(weights, expected)}"
            f"{_better_arch(source, arch)}"
        )
    counters = {key for key in common if key.endswith("num_batches_tracked")}  # cast, as by half(), they are floats
    broken = [key for key in common if key not in counters and not _is_usable(weights[key], expected[key])]
    if broken:
        raise InputError(f"{source.path}: NaN, infinite or not real numbers in {listed(broken)}; use an earlier epoch")


def _is_usable(value: torch.Tensor, expected: torch.Tensor) -> bool:
    # One NaN or infinity makes the sum one, and a sum takes a fraction of the time of looking at each number.
    return value.is_floating_point() == expected.is_floating_point() and bool(value.sum(dtype=torch.float64).isfinite())


def _other_channels(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """Says so where a first convolution is for other images than RGB."""
    for name in weights.keys() & expected.keys():
        found, wanted = weights[name].shape, expected[name].shape
        if len(wanted) == 4 and wanted[1] == 3 != found[1] and found == (wanted[0], found[1], *wanted[2:]):
            return f"; it is for images of {found[1]} channels, and those of this toolkit have 3"
    return ""


def _better_arch(source: _Source, arch: str) -> str:
    found = {(key, tuple(value.shape)) for key, value in source.weights.items() if key not in _POSITIONS}
    fitting = next((other for other in ARCHS if _shapes(other) == found), arch)
    return f"; it looks like {fitting}: give that as the arch" if fitting != arch else ""


def describe_base(report: dict[str, Any], from_scratch: bool = False) -> str:
    """What the backbone is and what was recognised in its checkpoint, in a line."""
    if from_scratch or report["family"] == NO_CHECKPOINT:
        return f"backbone: {report['arch']} for {report['image_size']} pixels with random weights"
    epoch = f", epoch {report['epoch']}" if report["epoch"] is not None else ""
    return (
        f"backbone: {report['arch']} for {report['image_size']} pixels from a {report['family']} checkpoint{epoch}; "
        f"{len(report['loaded'])} tensors loaded, {len(report['dropped'])} left out"
    )
