"""Images in tar archives, as the webdataset library writes them: `000123.jpg` and, if it has a label, `000123.cls`.

They are not streamed, as in webdataset, but indexed: an epoch uses each image once and can be resumed in the middle.
"""

import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from toolkit import InputError, listed, printable
from toolkit.images import folders, remote
from toolkit.images.bands import Bands, picture_of


class ShardedImages(folders.ImageFiles):
    """`ImageFiles` that lie in archives. An image's path is the archive's path, followed by its name in the archive."""

    def __init__(self, folder: Path, shards: Sequence[str], names: Sequence[str], places: np.ndarray, bands):
        super().__init__(folder, names, bands)  # the archive's name / its own
        self.shards = list(shards)
        self.places = places  # (number of the archive, offset in bytes, size in bytes) of each

    def opened(self, i: int) -> Image.Image:
        return picture_of(self.content(i), self.path(i))

    def size(self, i: int) -> int:
        return int(self.places[i, 2])

    def content(self, i: int) -> bytes:
        shard, offset, size = self.places[i].tolist()
        return remote.read(os.path.join(self.folder, self.shards[shard]), offset, offset + size)


def read_shards(folder: Path, bands: Bands | None = None) -> tuple[ShardedImages, list[str]] | None:
    """The images in a folder's archives, and their labels as text, none if no image has one; None without archives.

    Raises InputError for archives that are no plain tar, images next to archives, labels of some images, or no images.
    """
    shards = [name for name in folders.visible_names(folder)[1] if name.endswith(".tar")]
    if not shards:
        return None
    if images := folders.image_names(folder):
        both = f"{folder} has both archives, as {shards[0]}, and image files, as {images[0]}"
        raise InputError(f"{both}: move those that are not meant elsewhere")
    found: list[tuple[str, tuple[int, int, int], str | None]] = []
    for number, shard in enumerate(shards):
        images, labels = _members(folder / shard, folders.suffixes(bands))
        for name, (offset, size) in images.items():
            place, file = posixpath.split(name)
            key = posixpath.join(place, file.partition(".")[0])  # by which webdataset finds labels
            text = labels.get(posixpath.splitext(name)[0], labels.get(key))
            found.append((f"{shard}/{name}", (number, offset, size), text))
    if not found:
        raise InputError(f"{folder}: no images in its {len(shards)} archives {folders.looked_for(Counter(), bands)}")
    names, places, texts = zip(*found, strict=True)
    bare = [name for name, text in zip(names, texts, strict=True) if text is None]
    if 0 < len(bare) < len(names):
        raise InputError(f"{folder}: {len(bare)} images in its archives have no label next to them: {listed(bare)}")
    return ShardedImages(folder, shards, names, np.array(places), bands), [] if bare else list(texts)


def _members(path: Path, endings: tuple[str, ...]) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """The members of one archive: image -> (offset, size) in bytes, and a label's name without .cls -> label."""
    images = {}
    labels = {}
    try:
        # Small parts are read, one for each image: a large buffer would fetch all.
        with remote.opened(path, at_once=2**16) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if posixpath.basename(member.name).startswith("."):  # as in folders: ._0001.jpg is macOS's
                    continue
                if member.name.lower().endswith(endings) and member.isfile():
                    images[member.name] = member.offset_data, member.size
                elif member.name.endswith(".cls"):
                    text = archive.extractfile(member).read(1000).decode()
                    labels[member.name.removesuffix(".cls")] = folders.one_spelling(text.strip())
            archive.fileobj.seek(archive.offset)
            if any(archive.fileobj.read(tarfile.BLOCKSIZE)):  # an archive ends in zeros, or in nothing
                raise tarfile.ReadError("it is damaged after its first members")
    except (OSError, tarfile.TarError, UnicodeDecodeError, AttributeError, KeyError, RecursionError) as error:
        problem = f"{path}: not a tar archive that can be read ({printable(error)})"
        raise InputError(f"{problem}; compressed ones must be unpacked to .tar") from None
    return images, labels
