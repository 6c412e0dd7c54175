"""Which files a command wrote itself, and nobody has changed since: their digests are in a list in the user's cache."""

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def note(paths: Iterable[Path], by: str) -> None:
    """Note the content of files that were just written, so that what writes `by` this name may replace them."""
    with contextlib.suppress(OSError, RuntimeError):  # without a list or a home none is known, and none is replaced
        path = _list()
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write("".join(_digest(path, by) + "\n" for path in paths))


def is_free(path: Path, by: str) -> bool:
    """Is there nothing at this place, or what was written `by` this name and has not been changed since?"""
    with contextlib.suppress(OSError, RuntimeError):
        if os.path.isfile(path):  # a pipe has no end
            return _digest(path, by) in _list().read_text().split()
    return not os.path.lexists(path)


def _list() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "moco-lora-written")


def _digest(path: Path, by: str) -> str:
    digest = hashlib.sha256(by.encode(errors="surrogateescape"))
    with open(path, "rb") as file:
        while content := file.read(2**20):
            digest.update(content)
    return digest.hexdigest()
