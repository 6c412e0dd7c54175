"""The door for all that is read of images: a file, of a size that has a limit, in a time that has one.

It is of this machine, or at an address: `s3://`, `gs://`, `https://` and what else fsspec reads.
An address travels as a path, where // is /: `Path("s3://bucket/a.csv")` is `s3:/bucket/a.csv`. So its parent, and what
lies next to it, are found as for any path. Credentials are fsspec's business: an address that has some is refused.
"""

import contextlib
import io
import os
import re
import stat
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO
from urllib.parse import unquote

from toolkit import InputError, printable

TIME_OUT = 60.0  # seconds in which a web server sends nothing, and a tenth of those that a request may last
LARGEST_FILE = 2**33  # bytes of what is read at once
LARGEST_AT_ADDRESS = 2**30
# Deflate never compresses by this factor: a larger image is a damaged header, and allocating it could take minutes.
MOST_COMPRESSED = 1100
LARGE_IMAGE = 2**28  # bytes. A file of zeros is as small; so from here on an image is compressed by less.
MOST_COMPRESSED_IF_LARGE = 100
# Two letters at least: C:/ is a drive of Windows. Behind :: is an address within which the first one lies.
_ADDRESS = re.compile(r"((?:[a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]+):[/\\]+(?=[^/\\])", re.IGNORECASE)
_WITHIN_TEXT = re.compile(r",?( url=)?['\"(]?[a-z][a-z0-9+.-]+://\S+", re.IGNORECASE)
_WEB = ("http:", "https:")
_MEANING = re.compile("%(23|25|2f|3f)", re.IGNORECASE)  # quoted, lest it mean something else in an address


def check_is_file(path: str | os.PathLike) -> None:
    """Raise OSError for what is no file: reading a pipe waits for ever, and a device may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a file")


def check_size(size: int, stored: int) -> None:
    """Raise ValueError for an image of more bytes than those that are stored can mean."""
    most = MOST_COMPRESSED_IF_LARGE if size > LARGE_IMAGE else MOST_COMPRESSED
    if size > most * stored:
        raise ValueError(f"it says that it is an image of {size:,} bytes, which is more than its bytes can hold")


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
                # Of a link to itself `is_dir` raises an error.
                yield entry.name, os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
        return
    with _at(folder) as (system, place):
        for entry in system.ls(place, detail=True):
            above, _, name = entry["name"].rstrip("/").rpartition("/")
            if above != place.rstrip("/") or "?" in name:  # links of a web page that lead elsewhere, or sort it
                continue
            is_quoted = place.startswith(_WEB) and not _MEANING.search(name)
            yield unquote(name) if is_quoted else name, entry["type"] == "directory"
        system.invalidate_cache(place)  # it would keep a kilobyte for each file


def read(path: str | os.PathLike, start: int = 0, end: int | None = None) -> bytes:
    """The content of a file, or its bytes from `start` to `end`. Raises OSError, or InputError if it is remote."""
    if not is_remote(path):
        with opened(path) as file:
            length = (end or os.fstat(file.fileno()).st_size) - start
            if length > LARGEST_FILE:
                raise OSError(f"more than {LARGEST_FILE:,} bytes are not read at once")
            file.seek(start)
            return file.read(length)
    last = min(end or sys.maxsize, start + LARGEST_AT_ADDRESS + 1)
    with _at(path, reads=True) as (system, place):
        if place.startswith(_WEB):
            headers = {**system.kwargs.get("headers", {}), "Range": f"bytes={start}-{last - 1}"}
            content = bytearray()
            # With blocks of size 0, and any size of its own, fsspec asks once, and hands on what comes.
            with system.open(place, "rb", block_size=0, size=1, headers=headers) as file:
                while len(content) < last and (block := file.read(2**16)):
                    content += block
        else:
            content = system.cat_file(place, start=start, end=last)
        if len(content) > last - start:  # of a server that knows no ranges
            content = content[start:last]
        if len(content) > LARGEST_AT_ADDRESS:
            raise OSError(f"more than {LARGEST_AT_ADDRESS:,} bytes are not read at once")
    return bytes(content)


@contextlib.contextmanager
def opened(path: str | os.PathLike, at_once: int = 2**22) -> Iterator[BinaryIO]:
    """A file, or what is at an address, to be read in any order. Of the latter `at_once` bytes are fetched."""
    if not is_remote(path):
        check_is_file(path)
        with open(path, "rb") as file:
            yield file
        return
    with _at(path, reads=True) as (system, place), system.open(place, "rb", block_size=at_once) as source:
        yield io.BufferedReader(source, at_once)  # some systems' files have no buffer of their own


@contextlib.contextmanager
def _at(path: str | os.PathLike, reads: bool = False) -> Iterator[tuple[Any, str]]:
    """The file system of an address, and the place in it: a file's, if this block `reads`. Faults name the address."""
    import fsspec  # comes with PyTorch, and takes a while
    from fsspec.exceptions import FSTimeoutError
    from fsspec.implementations.local import LocalFileSystem

    url = address(path)
    if re.search("::|://[^/]*@|[?]", url):
        place = re.sub("/[^/]*@", "/", url.partition("?")[0])
        problem = "a password, signature or further address in it would be written into files; see fsspec's settings"
        raise InputError(f"{place}: {problem}")
    try:
        options = {}
        if url.lower().startswith(_WEB):
            import aiohttp

            options["timeout"] = aiohttp.ClientTimeout(10 * TIME_OUT, sock_connect=TIME_OUT, sock_read=TIME_OUT)
        system, place = fsspec.core.url_to_fs(url, **options)
        if reads and isinstance(system, LocalFileSystem):
            check_is_file(place)
        yield system, place
    except (TimeoutError, FSTimeoutError):
        raise InputError(f"{url} cannot be read: nothing has arrived for {TIME_OUT:g} seconds") from None
    except InputError:
        raise
    except FileNotFoundError:  # of an image, that is one that cannot be read
        raise FileNotFoundError("nothing is there") from None
    except Exception as error:  # each file system has its own
        # The address is named already, and one to which a server has led further may have a signature.
        why = _WITHIN_TEXT.sub("", printable(error)).rstrip(": ") or type(error).__name__
        raise InputError(f"{url} cannot be read: {why}") from None
