"""The adapter file: what it holds, how it is written and read, and the base that it names.

Keys: `format_version`, `tensors`, `layers` (a record of each adapted layer), `base_hash`, `metadata`.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora.adapted import NO_ADAPTER, recorded_in_4_bits
from toolkit import InputError, files, listed, printable
from toolkit.answers import tasks
from toolkit.models import backbones, dense, names, published

FORMAT_VERSION = 2  # the latest; adapters whose outputs are classes get 1, which every version reads
_FIELDS = {"format_version": int, "tensors": dict, "layers": dict, "base_hash": str, "metadata": dict}
LAYER_FIELDS = ("kind", *NO_ADAPTER)
# Measured of, or chosen for, the tensors beside it; scores, too, which begin with val_. Older files have `kept_share`.
_MEASURED = {"epoch", "loss", "kept_share", "keeps_start", "thresholds chosen", "cut to rank"}


def write_adapter_file(content: dict[str, Any], path: str | Path) -> None:
    """Write the content of an adapter file, see `read_adapter_file`, as `.safetensors` if the name ends so."""
    if files.is_safetensors(path):
        described = {key: value for key, value in content.items() if key != "tensors"}
        files.write_safetensors(content["tensors"], path, {"adapter": json.dumps(described)})
    else:
        files.save_atomically(content, path)


def read_adapter_file(path: str | Path) -> dict[str, Any]:
    """The content of an adapter file. Raises InputError if it is missing, none, damaged, or of a later version."""
    content = files.read_described(path)
    if not _looks_like_one(content):
        raise InputError(f"{path} is not an adapter file of this toolkit")
    wrong = [key for key, kind in _FIELDS.items() if type(content.get(key)) is not kind]
    if not wrong:
        wrong = [name for name, tensor in content["tensors"].items() if not files.is_plain_tensor(tensor)]
        wrong += [name for name, record in content["layers"].items() if not _is_layer_record(name, record)]
    if wrong:
        raise InputError(f"{path} is damaged: {listed(wrong)} is missing, of the wrong type or impossible")
    if sum(tensor.nbytes for tensor in content["tensors"].values()) > os.path.getsize(path):
        raise InputError(f"{path} is damaged: its tensors are larger than the file")  # such as one number, expanded
    if content["format_version"] > FORMAT_VERSION:
        version = printable(content["format_version"])
        raise InputError(f"{path} has format version {version}, this toolkit reads {FORMAT_VERSION}")
    return content


def unmeasured(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata without what was measured of, or chosen for, the very tensors that they came with."""
    return {key: value for key, value in metadata.items() if key not in _MEASURED and not str(key).startswith("val_")}


def holds_adapter(path: str | Path) -> bool:
    """Is this an adapter file, and no checkpoint?"""
    return names.is_path(path) and _looks_like_one(files.read_described(path))


def _looks_like_one(content: Any) -> bool:
    return isinstance(content, dict) and {"layers", "tensors"} <= content.keys()


def _is_layer_record(name: Any, record: Any) -> bool:
    if not isinstance(name, str) or not isinstance(record, dict) or set(record) != set(LAYER_FIELDS):
        return False
    if type(record["kind"]) is not str or type(record["use_rslora"]) is not bool or type(record["r"]) is not int:
        return False
    numbers = [record[field] for field in ("r", "lora_alpha", "lora_dropout", "scaling")]
    if not all(type(n) in (int, float) and abs(n) < 1e30 for n in numbers):  # no NaN, nor what float32 cannot hold
        return False
    if record["r"] == 0:
        return recorded_in_4_bits(record) and record == {"kind": record["kind"], **NO_ADAPTER}
    return record["r"] >= 1 and record["lora_alpha"] > 0 and 0 <= record["lora_dropout"] < 1


def find_base(
    path: str | Path, metadata: dict, checkpoint: str | Path | None = None, stage1_adapter: str | Path | None = None
) -> tuple[Path, Path | None]:
    """Find a file's base, and the stage-1 adapter merged into it, if any: beside the file, or where metadata say."""
    base = files.found_path(metadata["checkpoint"]) if checkpoint is None else Path(checkpoint)
    if names.is_path(base) and not os.path.exists(base):
        known = published.described(base)
        place = known["name"] if known["source"] else "its place"
        raise InputError(f"{path}: its base, {printable(base)}, is not there; give {place} as the checkpoint")
    if (stored := metadata.get("stage1_adapter")) is None:
        return base, None
    if stage1_adapter is not None:
        places = [Path(stage1_adapter)]
    else:
        places = [Path(path).with_name(Path(str(stored)).name), files.found_path(str(stored))]
    found = next(filter(os.path.exists, places), None)
    if found is None:
        wanted = printable(stage1_adapter or stored)
        raise InputError(f"{path}: its stage-1 adapter, {wanted}, is not there; put it next to the file")
    return base, found


def model_shape(metadata: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `load_backbone` after the path. Older files have the arch's own heads, and RGB images."""
    shape = {"num_classes": len(metadata["class_names"]), "arch": metadata["arch"], "heads": heads_of(metadata)}
    shape |= {"image_size": metadata["image_size"], "channels": metadata.get("channels") or 3}
    return shape | {"channel_fit": metadata.get("channel_fit")}


def heads_of(metadata: dict[str, Any]) -> int | None:
    """The attention heads of the ViT under an adapter; None: it is no torchvision ViT."""
    heads = metadata.get("heads")
    return names.default_heads(str(metadata.get("arch"))) if heads is None else heads


def check_metadata(path: str | Path, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise InputError if an adapter file's metadata describe no model, or one that its tensors do not fit."""
    kinds = {"arch": str, "class_names": list, "image_size": int, "checkpoint": str}
    if "moco_version" in metadata:
        raise InputError(f"{path} is of stage 1 and has no classifier: fine-tune over it with --stage1-adapter {path}")
    if lacking := [key for key in kinds if key not in metadata]:
        raise InputError(f"{path} does not say its {', '.join(lacking)}: build the model and use LoRAManager")
    wrong = [key for key, kind in kinds.items() if type(metadata[key]) is not kind]
    wrong += [key for key in ("heads", "channels") if type(metadata.get(key)) not in (int, type(None))]
    if metadata.get("channel_fit") not in (None, "timm"):
        wrong.append("channel_fit")
    if wrong or not set(map(type, metadata["class_names"])) <= {str}:
        raise InputError(f"{path} is damaged: {', '.join(wrong) or 'class_names'} in its metadata of the wrong type")
    task = tasks.from_record(metadata.get("task"), metadata["class_names"], path)
    shape = model_shape(metadata)
    del shape["channel_fit"]  # of the weights, which are not looked at
    classes = shape["num_classes"]
    with torch.device("meta"):  # takes no memory, whatever a file asks for
        model = backbones.build_backbone(**shape)
        if task.per_pixel:
            model = dense.DenseModel(model, classes, shape["image_size"], shape["channels"])
    head = backbones.head_name(model)
    for name, wanted in model.get_submodule(head).state_dict(prefix=f"{head}.").items():
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        if found != tuple(wanted.shape):
            problem = f"for its {classes} classes {name} is {found}, not {(*wanted.shape,)}"
            raise InputError(f"{path} is damaged, or of an earlier version: {problem}")
