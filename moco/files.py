"""Files: written whole or not at all, read without running anything in them, and named relative to the toolkit.

`read_checkpoint` relies on `torch.load(weights_only=True)`, which runs no code, and on mapping a file instead of
reading it, which takes memory only for what is used. It adds what these two leave open: see `_check_pickle` and
`_check_size`.
"""

import argparse
import contextlib
import copy
import csv
import io
import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import torch

from moco import InputError, listed, printable

TOOLKIT = Path(__file__).resolve().parents[1]

# --- Paths -----------------------------------------------------------------------------------------------------------


def stored_path(path: str | os.PathLike) -> Path:
    """The path to write into a file: one inside the toolkit relative to it, so that it holds on other machines too.

    Relative paths, and those outside the toolkit, stay as they are.
    """
    path = Path(path)
    return path.relative_to(TOOLKIT) if path.is_relative_to(TOOLKIT) else path


def found_path(path: str | os.PathLike) -> Path:
    """Where a path read from a file leads: from the current folder, else from the toolkit.

    A path that exists in neither place stays as it is.
    """
    path = Path(path)
    inside = TOOLKIT / path
    return inside if not os.path.exists(path) and os.path.exists(inside) else path


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


def read_checkpoint(path: str | os.PathLike, mapped: bool = True) -> Any:
    """The content of a `torch.save` file, tensors on the CPU, without running anything in it.

    Tensors, plain Python data, dtypes, devices, numpy numbers and argparse.Namespace are read.

    Args:
        path: a file in the zip format, or in the one that PyTorch wrote before 1.6.
        mapped: the tensors may stay in the file, which then cannot be replaced on Windows while they are in use.

    Raises:
        InputError: the file cannot be read, is damaged, or holds something else.
    """
    path = Path(path)
    try:
        zipped = _check_file(path)
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        _check_size(content, _most_values(path))
        return content if mapped else copy.deepcopy(content)
    except _Refused as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or printable(error)}") from error
    except Exception as error:  # a damaged file fails in a hundred places of zipfile, pickle and torch
        reason = f"{type(error).__name__}: {printable(error)}"
        raise InputError(f"cannot read {path}: damaged or cut short ({reason}); download or copy it again") from error


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a `.safetensors` file, on the CPU, and its metadata. Raises InputError if it cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; give the path of an existing one")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no dict
    except Exception as error:  # its own errors, and those of types unknown to PyTorch
        with open(path, "rb") as file:
            start = describe_header(file.read(12))
        reason = f"{printable(error)}; {start}"
        raise InputError(f"{path} is no readable safetensors file: {reason}; download or copy it again") from None


def describe_header(start: bytes) -> str:
    """What a file that is no checkpoint most likely is, by its first bytes."""
    if not start:
        return "it is empty"
    if start.startswith(b"version http"):
        return "a pointer of git-lfs, not the file itself: run git lfs pull"
    if start.lstrip().startswith(b"<"):
        return f"a web page, it starts with {start[:12]!r}: download the file itself"
    return f"it starts with {start[:12]!r}"


class _Refused(Exception):
    """A file that is understood and not accepted."""


# torch.save's first format, in use until 1.6 and in the official MoCo v1 and v2 files, starts with this number.
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


def _check_file(path: Path) -> bool:
    """Whether a torch file is of the zip format. Raises _Refused for what `torch.load` should not be given."""
    if not path.exists():
        raise _Refused("file not found; give the path of an existing checkpoint")
    if not path.is_file():
        raise _Refused("not a file; give the path of a checkpoint")
    with open(path, "rb") as file:
        start = file.read(len(_LEGACY_MAGIC))
        file.seek(0)
        if start.startswith(b"PK\x03\x04"):
            _check_zip(file, path)
            return True
        if start == _LEGACY_MAGIC:
            for _ in range(5):  # magic number, format version, byte order, content, storage keys; then the storages
                _check_pickle(file, _most_values(path))
            return False
    raise _Refused(f"not a PyTorch checkpoint ({describe_header(start)}); give a file written by torch.save")


def _check_zip(file: IO[bytes], path: Path) -> None:
    """Raises _Refused for records that are compressed, which cannot be mapped, ambiguous or damaged."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise _Refused("its zip records are compressed; give a file as torch.save writes it")
        if len({record.filename.lower() for record in records}) < len(records):  # torch ignores the case
            raise _Refused("two of its zip records have one name; give a file as torch.save writes it")
        for record in records:
            record.CRC = record.CRC or None  # 0 if saved without checksums, and zipfile then compares nothing
        if damaged := archive.testzip():
            raise _Refused(f"{printable(damaged)} in it does not match its checksum; download or copy it again")
        content = f"{records[0].filename.split('/')[0]}/data.pkl" if records else ""
        if content not in archive.namelist():
            raise _Refused("a zip archive, but not a PyTorch checkpoint; give a file written by torch.save")
        with archive.open(content) as pickled:
            _check_pickle(pickled, _most_values(path))


def _most_values(path: Path) -> int:
    """A file of so many bytes has no honest reason to hold more values; views may repeat some of them."""
    return 10_000 + 10 * path.stat().st_size


# What a pickle may name, beside dtypes and the classes of storages. PyTorch allows more, such as sparse tensors and
# bytearray, which takes any amount of memory.
_ALLOWED = {
    "__builtin__ complex",
    "__builtin__ set",
    "_codecs encode",  # bytes, in pickle protocol 2
    "argparse Namespace",
    "collections Counter",
    "collections OrderedDict",
    "numpy dtype",
    "numpy._core.multiarray scalar",
    "numpy.core.multiarray scalar",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch.serialization _get_layout",
    "torch.storage UntypedStorage",
}


def _is_allowed(name: str) -> bool:
    module, _, attribute = name.partition(" ")
    of_torch = attribute.endswith("Storage") or isinstance(getattr(torch, attribute, None), torch.dtype)
    return name in _ALLOWED or (module == "torch" and of_torch)


def _check_pickle(file: IO[bytes], most: int) -> None:
    """Goes through the next pickle in `file` without loading it. Raises _Refused if it names what is not allowed, or
    for a tuple whose hash, as a dictionary's key, would take for ever or overflow the stack.

    A tuple is given a size, which doubles with every level of nesting, and all that it repeats counts again. `stack`
    holds the sizes of what an unpickler would have on its own; None is a mark.
    """
    stack: list[int | None] = []
    memo: dict[int, int | None] = {}
    refused = set()
    for op, argument, _ in pickletools.genops(file):
        if op.name == "GLOBAL" and not _is_allowed(argument):
            refused.add(argument.replace(" ", "."))
        if op.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif op.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif op.name == "MARK":
            stack.append(None)
        else:
            parts, below = [], len(op.stack_before)
            if pickletools.markobject in op.stack_before:
                below = op.stack_before.index(pickletools.markobject)
                while (part := stack.pop()) is not None:
                    parts.append(part)
            parts += [stack.pop() for _ in range(below)]
            size = 2 * (1 + sum(parts)) if op.name.startswith("TUPLE") else 1
            if size > most:
                raise _Refused("a tuple in it is nested too deeply, or holds the same values too often")
            stack += [size] * len(op.stack_after)
    if refused:
        raise _Refused(
            f"it needs {listed(sorted(refused))}, and only tensors and plain data are read, because anything "
            "else may run code; save a state_dict from where the file was made"
        )


def _check_size(content: Any, most: int) -> None:
    """Raises _Refused if a file, by naming the same values again and again, holds more of them than its size allows.

    Whoever copies, compares or prints what is in it would take memory and time for each of them.
    """
    pending, count = [(content, 0)], 0
    while pending:
        value, depth = pending.pop()
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        parts = ()
        if isinstance(value, Mapping):
            parts = (*value.keys(), *value.values())
        elif isinstance(value, list | tuple | set):
            parts = value
        pending += [(part, depth + 1) for part in parts]
        count += value.numel() if isinstance(value, torch.Tensor) else 1
        if count + len(pending) > most:
            raise _Refused(f"it unfolds to more than {most} values, far more than its bytes; a tensor may be expanded")
        if depth > 100:
            raise _Refused("its content is nested more than 100 levels deep")


class _NumpyDtype:
    """In place of numpy.dtype, whose own unpickling trusts what it is given."""

    def __init__(self, code: str, *_: Any):
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


def _numpy_scalar(kind: _NumpyDtype, data: bytes) -> Any:
    """A numpy number, such as a best accuracy, as a Python number."""
    return np.frombuffer(data, kind.dtype)[0].item()


_SAFE_GLOBALS = [
    argparse.Namespace,
    (_NumpyDtype, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]
