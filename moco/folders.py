"""Image files: finding them below a folder, keeping their names in little memory, and opening them."""

import itertools
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from moco import InputError, printable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_PART_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}


class FileNames(Sequence[str]):
    """Many names in two arrays.

    A list of strings takes three times the memory, and reading a string writes its reference count: each loading
    process would end up with a copy of the list of its own.
    """

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        ends = np.cumsum([0, *map(len, encoded)])
        self._starts, self._ends = ends[:-1], ends[1:]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self._bytes[self._starts[i] : self._ends[i]].tobytes())


class ImageFiles(Dataset):
    """(PIL image, label) of image files. The image is open but not decoded: `moco.data.to_rgb` does that.

    Args:
        folder: where the files are.
        names: their paths relative to it, with / between the parts.
        labels: their classes.
    """

    def __init__(self, folder: str | Path, names: Iterable[str], labels: Sequence[int]):
        self.folder = str(folder)
        self.names = FileNames(names)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        """Raises InputError for a file that is no image."""
        try:
            return Image.open(self.path(i)), self.labels[i]
        except MemoryError:
            raise
        except Exception as error:  # a damaged file fails in a hundred places of Pillow
            raise unreadable(self.path(i), error) from None

    def path(self, i: int) -> str:
        return os.path.join(self.folder, self.names[i])


def unreadable(path: str, error: Exception) -> InputError:
    """What to raise for a file that Pillow cannot read."""
    return InputError(f"{path}: not a readable image ({printable(error)}); repair or remove it")


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def class_folders(folder: Path, at_least: int = 2) -> list[str]:
    """The names of the class folders in a folder, sorted.

    Raises InputError if there are fewer than `at_least`, or if they are the parts of a set (train, val) instead.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise _unlisted(error) from None
    if names and {name.lower() for name in names} <= _PART_NAMES:
        raise InputError(f"{folder}: {', '.join(names)} are parts, not classes; name them train and val, in lower case")
    if len(names) < at_least:
        found = f"only {names[0]}" if names else "none"
        raise InputError(f"{folder}: expected a folder of images for each of at least two classes, found {found}")
    return names


def labelled_files(folder: Path, class_names: list[str], every: bool = True) -> ImageFiles:
    """All images below the class folders. Raises InputError if there are none or, with `every`, none of some class."""
    found = [image_names(folder, name) if (folder / name).is_dir() else [] for name in class_names]
    empty = [name for name, images in zip(class_names, found, strict=True) if not images]
    if len(empty) == len(class_names) or (every and empty):
        raise InputError(f"{folder}: no images in {', '.join(empty)} (looked for {' '.join(IMAGE_SUFFIXES)})")
    labels = [label for label, images in enumerate(found) for _ in images]
    return ImageFiles(folder, itertools.chain(*found), labels)


def image_names(folder: Path, within: str = "") -> list[str]:
    """The images below a folder, or below one `within` it, in a fixed order: paths relative to `folder`, with /.

    Links are followed. Raises InputError for a folder that cannot be listed.
    """
    try:
        found = sorted(_image_folders(folder, within, ()))
    except OSError as error:
        raise _unlisted(error) from None
    return [posixpath.join(inner, name) for inner, names in found for name in sorted(names)]


def _image_folders(folder: Path, within: str, above: tuple[os.stat_result, ...]) -> Iterator[tuple[str, list[str]]]:
    """(path relative to `folder`, names of its images) for a folder and for each below it.

    What begins with a dot is no image: the Mac's ._cat.jpg beside each cat.jpg, Jupyter's .ipynb_checkpoints.
    """
    here = os.stat(folder / within)
    if any(os.path.samestat(here, other) for other in above):
        return  # a link to a folder around it
    names, folders = [], []
    with os.scandir(folder / within) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(posixpath.join(within, entry.name))
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                names.append(entry.name)
    yield within, names
    for inner in folders:
        yield from _image_folders(folder, inner, (*above, here))


def _unlisted(error: OSError) -> InputError:
    return InputError(f"{error.filename}: cannot be listed: {error.strerror}")
