"""Checkpoint files: written whole or not at all, read without running anything in them, matched key by key.

`load_backbone` takes a backbone out of any file of the MoCo family. The layouts are those of the official code:
v1 and v2 (arXiv 1911.05722, 2003.04297), v3 (2104.02057), and what their users convert and export.
"""

import argparse
import contextlib
import csv
import functools
import io
import math
import os
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from torchvision.models.vision_transformer import interpolate_embeddings

from moco import InputError, listed, printable
from moco.backbones import ARCHS, HEAD_NAMES, build_backbone, default_image_size, head_name, patch_size

# --- Writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_atomically(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends, or leaves no trace if anything fails.

    Raises InputError if the disk is full, the folder is missing or cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: a rename cannot cross file systems
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch's zip writer stumbles over the operating system's error and raises its own in its place.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        kept = "; the previous file is intact" if path.is_file() else ""
        reason = cause.strerror or cause
        raise InputError(f"cannot write {path}: {reason}; check the folder and its free space{kept}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_atomically(obj: Any, path: str | os.PathLike) -> None:
    """`torch.save(obj, path)`, but whole or not at all; raises InputError as `open_atomically`."""
    with open_atomically(path) as file:
        torch.save(obj, file)


def write_csv(rows: list[dict[str, Any]], columns: Sequence[str], path: str | os.PathLike) -> None:
    """A table with a header, whole or not at all; raises InputError as `open_atomically`."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    with open_atomically(path) as file:
        file.write(text.getvalue().encode())


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike) -> Any:
    """The content of a `torch.save` file, tensors on the CPU, without running anything in it.

    Tensors, plain Python data, numpy numbers and argparse.Namespace are read; a file that needs more is refused. What
    it declares is compared with its size before memory is taken. Raises InputError for every file that cannot be read.
    """
    try:
        zipped = _inspect(Path(path))
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        _check_unfolded(content, Path(path).stat().st_size)
        return content
    except _Refused as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or printable(error)}") from error
    except Exception as error:  # a damaged file fails in a hundred places of zipfile, pickle and torch
        reason = f"{type(error).__name__}: {printable(error)}"
        raise InputError(f"cannot read {path}: damaged or cut short ({reason}); download or copy it again") from error


class _Refused(Exception):
    """A file that is understood and not accepted."""


# torch.save's first format, in use until 1.6 and in the official MoCo v1 and v2 files, starts with this number.
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


def _inspect(path: Path) -> bool:
    """Whether a torch file is of the zip format; raises if it needs code or declares more than it holds."""
    if not path.exists():
        raise _Refused("file not found; give the path of an existing checkpoint")
    if not path.is_file():
        raise _Refused("not a file; give the path of a checkpoint")
    with open(path, "rb") as file:
        start = file.read(len(_LEGACY_MAGIC))
        file.seek(0)
        if start.startswith(b"PK\x03\x04"):
            _inspect_zip(file, path.stat().st_size)
            return True
        if start == _LEGACY_MAGIC:
            _inspect_legacy(file, path.stat().st_size)
            return False
    raise _Refused(f"not a PyTorch checkpoint ({what_starts_so(start)}); give a file written by torch.save")


def what_starts_so(start: bytes) -> str:
    """What a file that is no checkpoint most likely is, by its first bytes."""
    if not start:
        return "it is empty"
    if start.startswith(b"version http"):
        return "a pointer of git-lfs, not the file itself: run git lfs pull"
    if start.lstrip().startswith(b"<"):
        return f"a web page, it starts with {start[:12]!r}: download the file itself"
    return f"it starts with {start[:12]!r}"


def _inspect_zip(file: IO[bytes], file_size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise _Refused("its zip records are compressed; give a file as torch.save writes it")
        names = {record.filename.lower() for record in records}  # torch finds records whatever their case
        if len(names) < len(records) or sum(record.file_size for record in records) > file_size:
            raise _Refused("its zip records overlap; give a file as torch.save writes it")
        if damaged := archive.testzip():
            raise _Refused(f"{printable(damaged)} in it does not match its checksum; download or copy it again")
        root = records[0].filename.split("/")[0] if records else ""
        if f"{root}/data.pkl" not in archive.namelist():
            raise _Refused("a zip archive, but not a PyTorch checkpoint; give a file written by torch.save")
        with archive.open(f"{root}/data.pkl") as content:
            storages = _take_inventory(content, file_size)
    for key, declared in storages.items():
        held = archive.getinfo(f"{root}/data/{key}").file_size
        if declared != held:
            raise _Refused(f"storage {printable(key)} declares {declared} bytes and holds {held}")


def _inspect_legacy(file: IO[bytes], file_size: int) -> None:
    for _ in range(3):  # magic number, format version, byte order; then content, storage keys and storages
        _take_inventory(file, file_size)
    storages = _take_inventory(file, file_size)
    _take_inventory(file, file_size)
    declared, held = sum(8 + size for size in storages.values()), file_size - file.tell()
    if declared > held:
        raise _Refused(f"it declares {declared} bytes of tensors and holds {held}: cut short, or made up")


def _check_unfolded(content: Any, file_size: int) -> None:
    """Raises if references to the same values again and again make more of them than the file could hold."""
    pending, count, most = [content], 0, 10_000 + 10 * file_size
    while pending:
        value = pending.pop()
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, Mapping):
            pending += value.keys()
            pending += value.values()
        elif isinstance(value, list | tuple | set):
            pending += value
        count += 1
        if count + len(pending) > most:
            raise _Refused(f"it unfolds to more than {most} values, in a file of {file_size} bytes")


def _take_inventory(file: IO[bytes], file_size: int) -> dict[str, int]:
    """Walks the next pickle in `file`; storage key -> declared bytes. Raises if it names anything not allowed."""
    inventory = _Inventory(file, file_size)
    inventory.load()
    if inventory.refused:
        raise _Refused(
            f"it needs {listed(sorted(inventory.refused))}, and only tensors and plain data are read, because anything "
            "else may run code; save a state_dict from where the file was made"
        )
    return inventory.storages


_ITEM_SIZES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
}

_ALLOWED = {
    "_codecs.encode",  # bytes, in pickle protocol 2
    "__builtin__.set",
    "argparse.Namespace",
    "collections.Counter",
    "collections.OrderedDict",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "torch.Size",
    "torch._utils._rebuild_parameter",
}


class _Placeholder:
    """Stands for whatever a pickle names."""

    def __init__(self, *_: Any):
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def _weighed(load_tuple: Callable[["_Inventory"], None]) -> Callable[["_Inventory"], None]:
    def load(inventory: "_Inventory") -> None:
        load_tuple(inventory)
        inventory.weigh(inventory.stack[-1])

    return load


class _Inventory(pickle._Unpickler):
    """Walks a pickle with placeholders for all that it names, so that nothing in it runs, and adds up what it declares.

    torch.load alone would take the memory that a legacy file declares before it reads a byte of it. This is Python's
    own implementation of the unpickler because the one in C takes memory for the largest memo index a file claims.
    """

    # Protocol 2 is what torch.save writes and weights_only reads. BUILD would set attributes of the placeholders.
    dispatch = {
        ord(op.code): pickle._Unpickler.dispatch[ord(op.code)] for op in pickletools.opcodes if op.proto <= 2
    } | {pickle.BUILD[0]: lambda self: self.stack.pop()}
    for _code in (pickle.TUPLE[0], pickle.TUPLE1[0], pickle.TUPLE2[0], pickle.TUPLE3[0]):
        dispatch[_code] = _weighed(dispatch[_code])

    def __init__(self, file: IO[bytes], file_size: int):
        super().__init__(file)
        self.file_size = file_size
        self.storages: dict[str, int] = {}
        self.refused: set[str] = set()
        self.weights: dict[int, tuple[int, tuple]] = {}  # by id, with the tuple itself, so that no other gets its id

    def weigh(self, made: tuple) -> None:
        """Counts all that a tuple unfolds to: as a dictionary's key, one of shared parts would be hashed for ever."""
        weight = 1 + sum(self.weights[id(part)][0] if id(part) in self.weights else 1 for part in made)
        if weight > self.file_size:
            raise _Refused(f"a tuple in it unfolds to {printable(weight)} values, in a file of {self.file_size} bytes")
        self.weights[id(made)] = weight, made

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _ITEM_SIZES:
            return name
        full_name = f"{module}.{name}"
        if full_name == "torch._utils._rebuild_tensor_v2":
            return self.check_tensor
        if full_name not in _ALLOWED:
            self.refused.add(full_name)
        return _Placeholder

    def persistent_load(self, pid: tuple) -> int:
        """Notes the size of a storage; returns how many elements it has."""
        if pid[0] != "storage":
            raise _Refused("it holds a whole module, whose loading may run code; save its state_dict instead")
        _, kind, key, _, numel, *view = pid
        size = numel * _ITEM_SIZES[kind]
        if not 0 <= size <= self.file_size or self.storages.setdefault(key, size) != size:
            raise _Refused(f"storage {printable(key)} declares {size} bytes in a file of {self.file_size}")
        if view and view[0] is not None:  # only files from before PyTorch 1.0
            raise _Refused("it holds views of storages; save it again with a newer PyTorch")
        return numel

    def check_tensor(self, numel: int, offset: int, shape: tuple, stride: tuple, *_: Any) -> _Placeholder:
        """A tensor must lie within its storage of `numel` elements, and not repeat them to look larger."""
        sane = len(shape) <= 64 and min((offset, *shape, *stride)) >= 0 and max(shape, default=1) <= numel
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if sane else numel
        if 0 not in shape and (last >= numel or math.prod(shape) > numel):
            raise _Refused(f"a tensor of shape {printable(shape)} does not fit into its storage of {numel} elements")
        return _Placeholder()


class _NumpyDtype:
    """In place of numpy.dtype, whose own unpickling trusts what it is given."""

    def __init__(self, code: str, *_: Any):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1].replace("|", "<")


def _numpy_scalar(dtype: _NumpyDtype, data: bytes) -> float | int | bool:
    """A numpy number, such as a best accuracy, as a Python number."""
    return struct.unpack(dtype.order + _STRUCT_CODES[dtype.code], data)[0]


# numpy's names of number types -> the struct module's.
_STRUCT_CODES = {"b1": "?", "f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q"}
_STRUCT_CODES |= {"u1": "B", "u2": "H", "u4": "I", "u8": "Q"}

_SAFE_GLOBALS = [
    argparse.Namespace,
    (_NumpyDtype, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]


# --- Backbones -------------------------------------------------------------------------------------------------------


def load_backbone(
    path: str | os.PathLike, num_classes: int, arch: str | None = None, image_size: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone in a checkpoint, in a torchvision model with a fresh classifier head for `num_classes`.

    Args:
        path: a file of MoCo v1, v2 or v3, main_lincls, convert_to_deit, lightly, this toolkit's stage 1 or torchvision.
        num_classes: outputs of the new head. A classifier in the file is always dropped: the head is to be trained.
        arch: one of `moco.backbones.ARCHS`; by default what the file says or its shapes imply.
        image_size: by default the file's own. A ViT's position embedding is interpolated to any other.

    Returns:
        The model and a report: `family`, `arch`, `image_size`, `epoch` (None if unknown), `loaded` (names in the
        model), `dropped` (names in the file: projector, predictor, key encoder, queue, classifier).

    Raises:
        InputError: the file cannot be read, or not every backbone tensor of the arch is in it, or others are too.
    """
    source = _identify(path, read_checkpoint(path))
    arch = _find_arch(source) if arch is None else arch
    size = _find_image_size(source, arch) if image_size is None else image_size
    if arch == "vit_small":
        _check_head_count(source, arch)
    model = build_backbone(arch, num_classes, size)
    weights = _resize_positions(source.weights, model)
    _check_match(source, weights, model, arch)
    model.load_state_dict({**model.state_dict(), **weights})
    report = {
        "family": source.family,
        "arch": arch,
        "image_size": size,
        "epoch": source.epoch,
        "loaded": list(weights),
        "dropped": source.dropped,
    }
    return model, report


@dataclass
class _Source:
    """What a file holds, under torchvision's names."""

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

# The names of the same models in the official code.
_ARCH_ALIASES = {"vit_base": "vit_b_16"}


def _identify(path: str | os.PathLike, content: Any) -> _Source:
    """Finds the family by where the backbone lies and takes it from there."""
    wrapper, tensors = _find_state_dict(path, content)
    info = content if wrapper else {}
    prefix, encoder, dropped = _split(path, tensors)
    dropped += [full for key, full in encoder.items() if key.startswith(_HEADS)]
    names = {full: _torchvision_name(key) for key, full in encoder.items() if not key.startswith(_HEADS)}
    if len(set(names.values())) < len(names):
        raise InputError(f"{path}: some tensors are there twice, under timm's and torchvision's names")
    arch, epoch = info.get("arch"), info.get("epoch")
    arch = _ARCH_ALIASES.get(arch, arch) if isinstance(arch, str) else None
    return _Source(
        path=path,
        family=_family(prefix, wrapper, encoder, info),
        arch=arch if arch in ARCHS else None,
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
    """The prefix of the backbone, its names without the prefix -> those in the file, and the names of all others."""
    wrapped = all(key.startswith("module.") for key in tensors)  # by DistributedDataParallel
    keys = {key.removeprefix("module.") if wrapped else key: key for key in tensors}
    prefix = next((p for p in _LAYOUTS if any(key.startswith(p) for key in keys)), "")
    unknown = [key for key in keys if not key.startswith((prefix, *_LAYOUTS.get(prefix, ())))]
    if unknown:
        raise InputError(f"{path}: beside the backbone at {prefix}* it holds tensors of unknown use: {listed(unknown)}")
    encoder = {key.removeprefix(prefix): full for key, full in keys.items() if key.startswith(prefix)}
    return prefix, encoder, [full for key, full in keys.items() if not key.startswith(prefix)]


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
    found = {(key, tuple(value.shape)) for key, value in source.weights.items() if key != _POSITIONS}
    best = max(ARCHS, key=lambda arch: len(found & _shapes(arch)) / len(found | _shapes(arch)))
    if not found & _shapes(best):
        raise InputError(
            f"{source.path}: none of its {len(source.weights)} tensors belongs to a known backbone "
            f"({listed(source.weights)}); known are {', '.join(ARCHS)}"
        )
    return best


_POSITIONS = "encoder.pos_embedding"


@functools.cache
def _shapes(arch: str) -> frozenset[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a backbone's tensors, without those that depend on the image size or class count."""
    with torch.device("meta"):
        state = _backbone_state(build_backbone(arch, 1))
    return frozenset((key, tuple(value.shape)) for key, value in state.items() if key != _POSITIONS)


def _backbone_state(model: nn.Module) -> dict[str, torch.Tensor]:
    head = f"{head_name(model)}."
    return {key: value for key, value in model.state_dict().items() if not key.startswith(head)}


def _declared_image_size(info: Mapping) -> int | None:
    """The image size in the configuration that this toolkit's pretraining stores."""
    config = info.get("config")
    size = config.get("image_size") if isinstance(config, Mapping) else None
    return size if isinstance(size, int) and size > 0 else None


def _find_image_size(source: _Source, arch: str) -> int:
    """A ViT was trained at the size that its position embedding covers, a ResNet at the one that its file declares."""
    patch, positions = patch_size(arch), source.weights.get(_POSITIONS)
    if patch and positions is not None and _grid(positions):
        return _grid(positions) * patch
    return source.image_size or default_image_size(arch)


def _grid(positions: torch.Tensor) -> int:
    """Patches along each side under a position embedding (1, 1 + grid * grid, D); 0 if they form no square."""
    count = positions.shape[1] - 1 if positions.dim() == 3 else 0
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0


def _resize_positions(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Interpolates a position embedding for the model's image size, as torchvision does."""
    positions = weights.get(_POSITIONS)
    wanted = model.state_dict().get(_POSITIONS)
    if positions is None or wanted is None or positions.shape == wanted.shape or not _grid(positions):
        return weights
    resized = interpolate_embeddings(model.image_size, model.patch_size, {_POSITIONS: positions.float()})
    return weights | {_POSITIONS: resized[_POSITIONS]}


def _check_head_count(source: _Source, arch: str) -> None:
    """MoCo v3's vit_small has 12 heads, timm's and DeiT's 6, and no shape tells: the wrong one would load in silence.

    MoCo v3 never trains its positions and gives the class token none (section 4.4); learned ones are never zero.
    """
    positions = source.weights.get(_POSITIONS)
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
            f"{len(expected)} backbone tensors match; {found}{_better_arch(source, arch)}"
        )
    broken = [key for key in common if not _is_usable(weights[key], expected[key])]
    if broken:
        raise InputError(f"{source.path}: NaN, infinite or not real numbers in {listed(broken)}; use an earlier epoch")


def _is_usable(value: torch.Tensor, expected: torch.Tensor) -> bool:
    # One NaN or infinity makes the sum one, and a sum takes a fraction of the time of looking at each number.
    return value.is_floating_point() == expected.is_floating_point() and bool(value.sum(dtype=torch.float64).isfinite())


def _better_arch(source: _Source, arch: str) -> str:
    found = {(key, tuple(value.shape)) for key, value in source.weights.items() if key != _POSITIONS}
    fitting = next((other for other in ARCHS if _shapes(other) == found), arch)
    return f"; it looks like {fitting}: give that as the arch" if fitting != arch else ""
