"""Reads and writes files: writes them whole or not at all, and runs no code that they contain."""

import argparse
import contextlib
import csv
import io
import json
import os
import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING  # of the names in Python 2, which pickles still use
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch

import toolkit
from toolkit import SHIPPED, TOOLKIT, InputError, check_file, found_path, printable, same_file, stored_path  # noqa: F401


@contextlib.contextmanager
def open_atomically(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends, or leaves no trace; InputError if it cannot."""
    path = toolkit.place_of(Path(path))
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"cannot write {path}: it is a folder, a device or the like; name a file")
    if os.path.exists(path) and not os.access(path, os.W_OK):  # a rename would not mind
        raise InputError(f"cannot write {path}: somebody has made it read-only; name another")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.half")  # same folder: a rename cannot cross file systems
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, toolkit.place_of(path))  # again: to write may have taken hours
    except (OSError, RuntimeError) as error:
        # torch's zip writer raises a RuntimeError of its own in the place of the system's error.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        advice = "check the folder and its free space"
        if os.path.isfile(path):  # pathlib's own raises an error for a name too long
            advice += "; the previous file is intact"
        raise InputError(f"cannot write {path}: {cause.strerror or cause}; {advice}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_atomically(obj: Any, path: str | os.PathLike) -> None:
    """`torch.save(obj, path)`, but whole or not at all; raises InputError as `open_atomically`."""
    with open_atomically(path) as file:
        torch.save(obj, file)


def write_text(text: str, path: str | os.PathLike) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    try:
        content = text.encode(errors="surrogateescape")  # names of files need not be UTF-8
    except UnicodeEncodeError:  # nor need names of classes be text: a half of a pair of UTF-16 is no character
        content = text.encode(errors="replace")
    with open_atomically(path) as file:
        file.write(content)


def write_cells(rows: Iterable[Iterable[Any]], titles: Sequence[str], path: str | os.PathLike) -> None:
    """A table under titles, whole or not at all; raises InputError as `open_atomically`."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([titles, *rows])
    write_text(text.getvalue(), path)


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a file of JSON; an empty one for a file that has none, or cannot be read."""
    with contextlib.suppress(OSError, TypeError, ValueError, RecursionError):
        if path.is_file():  # a pipe has no end
            return {**json.loads(path.read_text(encoding="utf-8"))}
    return {}


def read_checkpoint(path: str | os.PathLike, mapped: bool = True, objects: bool = False) -> Any:
    """The content of a `torch.save` file, tensors on the CPU, without running anything in it; or InputError.

    Reads what `torch.load(weights_only=True)` reads, and numpy numbers and argparse.Namespace; but compares checksums,
    also with `mapped`: then the tensors of a zip file stay on disk until they are used. With `objects` objects of other
    classes in a dictionary become empty `ForeignObject`s.
    """
    path = Path(path)
    check_file(path)
    mapped &= str(path).isprintable()  # PyTorch maps no file whose name is not UTF-8
    try:
        is_zip, names = _check_format(path)
        return _load(path, is_zip and mapped, names if objects else set())
    except InputError as error:  # it is understood, but not accepted
        reason = str(error)
    except OSError as error:
        reason = error.strerror or printable(error)
    except Exception as error:  # a damaged file fails in a hundred places of zipfile, pickle and torch
        message = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]  # without advice
        reason = f"damaged or cut short ({type(error).__name__}: {printable(message)}); download or copy it again"
        if needed := re.search(r"GLOBAL (\S+)", str(error)):  # so torch names what it does not allow
            reason = f"it needs {printable(needed[1])}, and only tensors and plain data are read, because anything "
            reason += "else may run code; save a state_dict from where the file was made, if you trust it: "
            reason += "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)"
    raise InputError(f"cannot read {path}: {reason}")


class ForeignObject:
    """Stands in for an object of an unknown class: it holds nothing, and none of that class's code has run."""

    kind = ""  # the name of that class, with the module

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _load(path: Path, mapped: bool, names: set[str]) -> Any:
    """`torch.load` tensors and plain data; if the file needs classes by these names, load their objects empty."""

    def load(known: list) -> Any:
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)

    try:
        return load(_SAFE_GLOBALS)
    except pickle.UnpicklingError:
        if 0 < len(names) <= 1_000:  # torch searches all of them for each object
            names -= {name for _, name in _SAFE_GLOBALS}
            stand_ins = [(type("Stand-in", (ForeignObject,), {"kind": name}), name) for name in names]
            with contextlib.suppress(Exception):
                content = load(_SAFE_GLOBALS + stand_ins)
                if isinstance(content, dict):
                    return content
        raise


def is_safetensors(path: str | os.PathLike) -> bool:
    """Does the name say that the file is read and written by `read_safetensors` and `write_safetensors`?"""
    return Path(path).suffix == ".safetensors"


def write_safetensors(tensors: dict[str, torch.Tensor], path: str | Path, metadata: dict | None = None) -> None:
    """Write contiguous tensors, and their metadata, whole or not at all."""
    with open_atomically(path) as file:
        file.write(safetensors.torch.save(tensors, metadata=metadata))


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a `.safetensors` file, on the CPU, and its metadata. Raises InputError if it cannot be read."""
    path = Path(path)
    check_file(path)
    try:
        with open(path, "rb") as opened:
            place = path if str(path).isprintable() else f"/dev/fd/{opened.fileno()}"  # it takes UTF-8 alone
            with safetensors.safe_open(place, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no dict
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or printable(error)}") from None
    except Exception as error:  # its own errors, and others for types unknown to PyTorch
        with open(path, "rb") as file:
            header = describe_header(file.read(12))
        problem = f"{printable(error)}; {header}; download or copy it again"
        raise InputError(f"{path} is no readable safetensors file: {problem}") from None


def read_described(path: str | os.PathLike) -> Any:
    """The content of a `torch.save` file; of `.safetensors` what JSON under `adapter` says, and its `tensors`."""
    if not is_safetensors(path):
        return read_checkpoint(path)
    tensors, header = read_safetensors(path)
    try:
        content = json.loads(header.get("adapter", "null"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: its description is no JSON ({printable(error)})") from None
    if isinstance(content, dict):
        content["tensors"] = tensors
    return content


def describe_header(header: bytes) -> str:
    """Guess from its first bytes what a file is that is no checkpoint."""
    if not header:
        return "it is empty"
    if header.startswith(b"version http"):
        return "a pointer of git-lfs, not the file itself: run git lfs pull"
    if header.lstrip().startswith(b"<"):
        return f"a web page, it starts with {header[:12]!r}: download the file itself"
    return f"it starts with {header[:12]!r}"


_PLAIN_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_PLAIN_DTYPES |= {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}


def is_plain_tensor(value: Any) -> bool:
    """Can the value be copied into a parameter or buffer? 8-bit floats cannot: without scales they mean nothing."""
    is_here = torch.is_tensor(value) and value.device.type == "cpu"  # and not on meta, which holds no numbers
    return is_here and value.dtype in _PLAIN_DTYPES and value.layout == torch.strided


def _check_format(path: Path) -> tuple[bool, set[str]]:
    """Is the file a zip file (else a legacy one); and the names of the classes and functions that it needs."""
    # torch.save's first format, in use until 1.6 and in the official MoCo v1 and v2 files, starts with this number.
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    with open(path, "rb") as file:
        header = file.read(len(magic))
        file.seek(0)
        if header.startswith(b"PK\x03\x04"):
            return True, _check_zip(file)
        if header == magic:
            # Magic number, format version, byte order, content, storage keys; then the storages.
            return False, set().union(*(_check_pickle(file) for _ in range(5)))
    raise InputError(f"not a PyTorch checkpoint ({describe_header(header)}); give a file written by torch.save")


def _check_zip(file: IO[bytes]) -> set[str]:
    """The names that the pickle in a zip file needs. Compressed records are refused: they cannot be mapped."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise InputError("its zip records are compressed; give a file as torch.save writes it")
        for record in records:
            record.CRC = record.CRC or None  # 0 if saved without checksums; for None zipfile compares nothing
        if damaged := archive.testzip():
            raise InputError(f"{printable(damaged)} in it does not match its checksum; download or copy it again")
        content = f"{records[0].filename.split('/')[0]}/data.pkl" if records else ""
        if content not in archive.namelist():
            raise InputError("a zip archive, but not a PyTorch checkpoint; give a file written by torch.save")
        with archive.open(content) as pickled:
            return _check_pickle(pickled)


def _check_pickle(file: IO[bytes]) -> set[str]:
    """The classes and functions that the next pickle names. Refused are tuples whose hash would take for ever."""
    # The sizes of the values that an unpickler would have on its stack; None is a mark. A tuple's doubles with every
    # level of nesting, and counts repeated values again: so its hash overflows the stack, or does not end.
    stack: list[int | None] = []
    memo: dict[int, int | None] = {}
    names = set()
    for op, argument, _ in pickletools.genops(file):
        if op.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif op.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif op.name == "MARK":
            stack.append(None)
        else:
            if op.name == "GLOBAL":
                module, _, name = argument.partition(" ")
                names.add(f"{IMPORT_MAPPING.get(module, module)}.{name}")
            parts = []
            for kind in reversed(op.stack_before):
                if kind is pickletools.stackslice:  # all down to the mark
                    while stack[-1] is not None:
                        parts.append(stack.pop())
                else:
                    parts.append(stack.pop() or 0)  # 0: of the mark
            size = 2 * (1 + sum(parts)) if op.name.startswith("TUPLE") else 1
            if size > 10_000_000:
                raise InputError("a tuple in it is nested too deeply, or holds the same values too often")
            stack += [size] * len(op.stack_after)
    return names


class _NumpyDtype:
    """Stands in for numpy.dtype, which would take sizes and flags from a file unchecked."""

    def __init__(self, code: str, *_: Any):
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


def _numpy_scalar(kind: _NumpyDtype, data: bytes) -> Any:
    """A numpy number, such as a best accuracy, as a Python number."""
    return np.frombuffer(data, kind.dtype)[0].item()


_SAFE_GLOBALS = [
    (argparse.Namespace, "argparse.Namespace"),
    (_NumpyDtype, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]  # what pickles may name, and the names that they use
