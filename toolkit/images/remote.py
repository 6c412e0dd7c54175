"""Files and folders by their address: `s3://`, `gs://`, `https://` and what else fsspec reads.

An address travels as a path, where // is /: `Path("s3://bucket/a.csv")` is `s3:/bucket/a.csv`. So its parent, and what
lies beside it, are found as those of any path. Credentials are fsspec's business: an address that has some is refused.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO
from urllib.parse import unquote

from toolkit import InputError, printable

# Two letters at least: C:/ is a drive of Windows.
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):[/\\]+(?=[^/\\])", re.IGNORECASE)
_WITHIN_TEXT = re.compile(r",?( url=)?['\"(]?[a-z][a-z0-9+.-]+://\S+", re.IGNORECASE)
_MEANING = re.compile("%(23|25|2f|3f)", re.IGNORECASE)  # quoted, lest it mean something else in an address


def is_remote(path: str | os.PathLike) -> bool:
    return _ADDRESS.match(os.fspath(path)) is not None


def address(path: str | os.PathLike) -> str:
    """An address as others write it, with its //; a path as it is."""
    text = os.fspath(path)
    if not is_remote(text):
        return text
    text = _ADDRESS.sub(r"\1://", text.replace("\\", "/"), count=1)
    return re.sub("^file:", "file:/", text, flags=re.IGNORECASE)


def located(folder: str | os.PathLike, name: str | os.PathLike) -> str:
    """A path or address in a folder, or by itself."""
    return address(name if is_remote(name) else os.path.join(folder, name))


def is_file(path: str | os.PathLike) -> bool:
    """Is this a file? An address is taken for one: to ask for each of a million would take hours."""
    return is_remote(path) or os.path.isfile(path)


def exists(path: str | os.PathLike) -> bool:
    if not is_remote(path):
        return os.path.exists(path)
    with _at(path) as (system, place):
        return system.exists(place)


def is_folder(path: str | os.PathLike) -> bool:
    """Is this a folder? On a web server it is a page, which lists what is in it."""
    if not is_remote(path):
        return os.path.isdir(path)
    with contextlib.suppress(FileNotFoundError), _at(path) as (system, place):
        about = system.info(place)
        return about["type"] == "directory" or about.get("mimetype") == "text/html"
    return False


def listing(folder: str | os.PathLike) -> Iterator[tuple[str, bool]]:
    """The names of what is in a folder, in any order, and whether each is a folder. Raises OSError, or InputError."""
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            for entry in entries:
                yield entry.name, entry.is_dir()
        return
    with _at(folder) as (system, place):
        for entry in system.ls(place, detail=True):
            above, _, name = entry["name"].rstrip("/").rpartition("/")
            if above != place.rstrip("/") or "?" in name:  # links of a web page that lead elsewhere, or sort it
                continue
            is_quoted = place.startswith(("http:", "https:")) and not _MEANING.search(name)
            yield unquote(name) if is_quoted else name, entry["type"] == "directory"
        system.invalidate_cache(place)  # it would keep a kilobyte for each file


def read(path: str | os.PathLike, start: int | None = None, end: int | None = None) -> bytes:
    """The content at an address, or its bytes from `start` to `end`. Raises InputError if it cannot be had."""
    with _at(path) as (system, place):
        content = system.cat_file(place, start=start, end=end)
    if start is not None and len(content) > end - start:  # a server that knows no ranges sends all
        content = content[start:end]
    return content


@contextlib.contextmanager
def opened(path: str | os.PathLike, at_once: int = 2**22) -> Iterator[BinaryIO]:
    """A file, or what is at an address, to be read in any order. Of the latter so many bytes are fetched at once."""
    if not is_remote(path):
        with open(path, "rb") as file:
            yield file
        return
    # Some systems' files have no buffer of their own.
    with _at(path) as (system, place), io.BufferedReader(system.open(place, "rb", block_size=at_once), at_once) as file:
        yield file


@contextlib.contextmanager
def _at(path: str | os.PathLike) -> Iterator[tuple[Any, str]]:
    """The file system of an address and the place in it. What goes wrong within this block names the address."""
    import fsspec  # comes with PyTorch, and takes a while

    url = address(path)
    host, _, rest = url.partition("://")[2].partition("/")
    if "@" in host or "?" in url:
        place = f"{host.rpartition('@')[2]}/{rest.partition('?')[0]}"
        problem = "a password or signature in its address would be written into files; see fsspec's settings"
        raise InputError(f"{place}: {problem}")
    try:
        yield fsspec.core.url_to_fs(url)
    except InputError:
        raise
    except FileNotFoundError:  # of an image, that is one that cannot be read
        raise FileNotFoundError("nothing is there") from None
    except Exception as error:  # each file system has its own
        # The address is named already, and one to which a server has led further may have a signature.
        why = _WITHIN_TEXT.sub("", printable(error)).rstrip(": ") or type(error).__name__
        raise InputError(f"{url} cannot be read: {why}") from None
