"""Paths: where the toolkit lies, and those that files store."""

import os
import stat
from pathlib import Path

from toolkit import InputError, printable

TOOLKIT = Path(__file__).resolve().parents[1]
SHIPPED = TOOLKIT / "checkpoints/moco_stage1/moco_stage1_epoch_100.pth"  # the backbone of the first run


def stored_path(path: str | os.PathLike) -> Path:
    """The path to write into a file. A path inside the toolkit is made relative to it, and so fits other machines too.

    Relative paths, and those outside the toolkit, stay as they are.
    """
    normal = Path(os.path.normpath(path))  # resolves toolkit/../x, which is not inside
    return normal.relative_to(TOOLKIT) if normal.is_relative_to(TOOLKIT) else Path(path)


def found_path(path: str | os.PathLike) -> Path:
    """Where a path read from a file leads: relative to the current folder, or else to the toolkit.

    A path that exists in neither place stays as it is.
    """
    inside = TOOLKIT / path
    return inside if not os.path.exists(path) and os.path.exists(inside) else Path(path)


def same_file(first: str | os.PathLike | None, second: str | os.PathLike | None) -> bool:
    """Do both paths lead to one existing file?"""
    exist = None not in (first, second) and os.path.exists(first) and os.path.exists(second)
    return exist and os.path.samefile(first, second)


def check_file(path: Path) -> None:
    """Raise InputError for a path that leads to no file."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return
        problem = "not a file"
    except FileNotFoundError:
        problem = "file not found"
    except OSError as error:  # such as a name that is too long
        problem = error.strerror
    raise InputError(f"cannot read {printable(path, 1000)}: {problem}; give the path of an existing file")
