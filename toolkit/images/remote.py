"""Lists, archives and images by their address: `s3://`, `gs://`, `https://` and what else fsspec reads.

An address travels as a path, where // is /: `Path("s3://bucket/a.csv")` is `s3:/bucket/a.csv`. So its parent, and what
lies beside it, are found as those of any path. Credentials are fsspec's business: an address that has some is refused.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from toolkit import InputError, printable

# Two letters at least: C:/ is a drive of Windows.
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):[/\\]+(?=[^/\\])", re.IGNORECASE)


def is_remote(path: str | os.PathLike) -> bool:
    return _ADDRESS.match(os.fspath(path)) is not None


def located(folder: str | os.PathLike, name: str | os.PathLike) -> str:
    """A path or address in a folder, or by itself."""
    return os.fspath(name) if is_remote(name) else os.path.join(folder, name)


def is_file(path: str | os.PathLike) -> bool:
    """Is this a file? An address is taken for one: to ask for each of a million would take hours."""
    return is_remote(path) or os.path.isfile(path)


def is_folder(path: str | os.PathLike) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    with _at(path) as (system, place):
        return system.isdir(place)


def archives(folder: str | os.PathLike) -> list[str]:
    """The sorted names of the tar archives at an address."""
    with contextlib.suppress(FileNotFoundError), _at(folder) as (system, place):
        names = (entry.rstrip("/").rpartition("/")[2] for entry in system.ls(place, detail=False))
        return sorted(name for name in names if name.endswith(".tar"))
    return []


def read(path: str | os.PathLike, start: int | None = None, end: int | None = None) -> bytes:
    """The content at an address, or its bytes from `start` to `end`. Raises InputError if it cannot be had."""
    with _at(path) as (system, place):
        content = system.cat_file(place, start=start, end=end)
    if start is not None and len(content) > end - start:  # a server that knows no ranges sends all
        content = content[start:end]
    return content


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file, or what is at an address, to be read in any order."""
    if not is_remote(path):
        with open(path, "rb") as file:
            yield file
        return
    # Of an archive small parts are read, one for each image: a large buffer would fetch all of it.
    with _at(path) as (system, place), system.open(place, "rb", block_size=2**16) as file:
        yield file


@contextlib.contextmanager
def _at(path: str | os.PathLike) -> Iterator[tuple[Any, str]]:
    """The file system of an address and the place in it. What goes wrong within this block names the address."""
    try:
        import fsspec
    except ImportError:
        raise InputError(f"{path}: addresses need fsspec: pip install fsspec, with s3fs, gcsfs or aiohttp") from None
    url = _ADDRESS.sub(r"\1://", os.fspath(path).replace("\\", "/"), count=1)
    host, _, rest = url.partition("://")[2].partition("/")
    if "@" in host or "?" in url:
        place = f"{host.rpartition('@')[2]}/{rest.partition('?')[0]}"
        raise InputError(
            f"{place}: a password or signature in its address would be written into files; see fsspec's settings"
        )
    try:
        yield fsspec.core.url_to_fs(url)
    except (InputError, FileNotFoundError):  # of an image, that is one that cannot be read
        raise
    except Exception as error:  # each file system has its own
        raise InputError(f"{url} cannot be read: {printable(error) or type(error).__name__}") from None
