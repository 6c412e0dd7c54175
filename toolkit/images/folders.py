"""Image files: finding them below a folder, keeping their names in little memory, opening and remembering them."""

import contextlib
import mmap
import multiprocessing
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from toolkit import InputError, choices, listed, printable
from toolkit.images import dicom, remote
from toolkit.images.bands import ARRAY_SUFFIXES, Bands, WrongBands, decoded, open_image

# The first frame of an animated file is the image.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jp2")
IMAGE_SUFFIXES += dicom.SUFFIXES
# What network drives, archivers and systems put among images: thumbnails, deleted files.
_OF_SYSTEMS = {"@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
_PART_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}
KEPT_BYTES = 2**30  # at the most, of decoded images, which a process and those that load for it read some ten times
VERSIONS = 5  # of an image: as it is, or a JPEG decoded at 1, 1/2, 1/4, 1/8 of its size


class KeptArrays:
    """Arrays (H, W, channels) by an image's number and version, while there is room. Forked processes share them."""

    def __init__(self, images: int, room: int, channels: int = 3, dtype: type = np.uint8):
        self.channels = channels
        self.dtype = np.dtype(dtype)
        self.memory = mmap.mmap(-1, room)  # what is never written to takes no memory
        self.used = np.ndarray(1, np.int64, mmap.mmap(-1, 8))  # bytes
        places = mmap.mmap(-1, 24 * VERSIONS * images)
        self.places = np.ndarray((images, VERSIONS, 3), np.int64, places)  # first byte, height, width; 0: none
        # Nobody waits for it: a process that was killed may have left it locked.
        self.lock = multiprocessing.Lock()

    def get(self, image: int, version: int) -> np.ndarray | None:
        """A copy of what was put there, if that is here."""
        if not self.lock.acquire(block=False):
            return None
        first, height, width = self.places[image, version].tolist()
        self.lock.release()
        if height == 0:
            return None
        return np.ndarray((height, width, self.channels), self.dtype, self.memory, first).copy()

    def put(self, image: int, version: int, array: np.ndarray) -> None:
        if not self.lock.acquire(block=False):
            return
        first = int(self.used[0])
        if first + array.nbytes <= len(self.memory):
            np.ndarray(array.shape, self.dtype, self.memory, first)[:] = array
            self.used[0] += array.nbytes
            self.places[image, version] = first, *array.shape[:2]
        self.lock.release()


class ImageFiles(Dataset):
    """The images in files: PIL images, open but not decoded; or, with `bands`, arrays (H, W, C)."""

    def __init__(self, folder: str | Path, names: Iterable[str], bands: Bands | None = None):
        self.folder = str(folder)
        self.names = list(names)  # paths relative to the folder, with / between the parts
        self.bands = bands  # what is read of files that are no RGB photographs
        self.kept: KeptArrays | None = None  # what was decoded since `keep` was called

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Image.Image | np.ndarray:
        """Raises InputError for a file that is no image."""
        with named_faults(self.path(i)):
            if self.kept is not None and (array := self.kept.get(i, 0)) is not None:
                return Image.fromarray(array) if self.bands is None else array
            if self.bands is None:
                image = self.opened(i)
                image.kept = self.kept, i  # for `transforms.decoded`
                return image
            array = self.bands.picked(decoded(self.content(i)))
            if self.kept is not None:
                self.kept.put(i, 0, array)
            return array

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"kept": None}  # a process that is not forked has none of this memory

    def keep(self, room: int) -> None:
        """From now on decode each image once, and keep it in memory, up to `room` bytes of all."""
        kind = () if self.bands is None else (self.bands.channels, np.float32)
        with contextlib.suppress(OSError):  # the machine does not give so much
            self.kept = KeptArrays(len(self), room, *kind)

    def opened(self, i: int) -> Image.Image:
        return open_image(self.path(i))

    def path(self, i: int) -> str:
        return remote.located(self.folder, self.names[i])

    def size(self, i: int) -> int:
        """In bytes; -1 for what cannot be read, which is found out when it is."""
        path = self.path(i)
        return os.path.getsize(path) if os.access(path, os.R_OK) else -1

    def content(self, i: int) -> bytes:
        return remote.read(self.path(i))


class UnreadableImage(InputError):
    """A file that cannot be read as an image."""


@contextlib.contextmanager
def named_faults(path: str) -> Iterator[None]:
    """Whatever a damaged file raises, in a hundred places of Pillow, becomes an `UnreadableImage` that names it."""
    try:
        yield
    except (MemoryError, InputError):
        raise
    except Exception as error:
        problem = printable(error)
        if isinstance(error, WrongBands):
            raise UnreadableImage(f"{path}: {problem}") from None
        if isinstance(error, UnidentifiedImageError) and path.lower().endswith((".tif", ".tiff")):
            problem += "; training reads bands of more than 8 bits with --scale, as 65535"
        advice = "; repair or remove it, or use --skip-unreadable"
        raise UnreadableImage(f"{path}: not a readable image ({problem})", advice) from None


def evaluation_folder(root: Path) -> Path:
    """The folder next to train/ to evaluate on; test/ only where there is no other. Raises InputError for several."""
    found = [root / name for name in choices.EVALUATION_NAMES if remote.is_folder(root / name)]
    if len(found) > 1:
        both = " and ".join(path.name for path in found)
        raise InputError(f"{root} has {both}: name one of them", " with --val-dir")
    test = root / "test"
    if remote.is_folder(test):
        found.append(test)
        left_alone = f"; {test} is left alone" if len(found) > 1 else ""
        print(f"evaluating on {found[0]}{left_alone}")
    if not found:
        names = "/, ".join(choices.EVALUATION_NAMES)
        raise InputError(f"{root} has train/ but no {names}/ or test/: add one", ", or name it with --val-dir")
    return found[0]


def folders_by_class(folder: Path) -> dict[str, list[str]]:
    """The names of the folders of each class, by the class's, sorted."""
    found: dict[str, list[str]] = {}
    for name in visible_names(folder)[0]:
        found.setdefault(one_spelling(name), []).append(name)
    return dict(sorted(found.items()))


def visible_names(folder: Path) -> tuple[list[str], list[str]]:
    """The sorted names of the folders and of the files in a folder that are not hidden. Raises InputError."""
    folders = []
    files = []
    try:
        for name, is_folder in remote.listing(folder):
            if not name.startswith(".") and name not in _OF_SYSTEMS:
                (folders if is_folder else files).append(name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror or error}") from None
    return sorted(folders), sorted(files)


def one_spelling(name: str) -> str:
    """The name of a class, in Unicode's form NFC. A Mac may write an e and an accent where others write one letter."""
    return unicodedata.normalize("NFC", name)


def labelled_files(folder: Path, known=(), bands: Bands | None = None) -> tuple[ImageFiles, list[str], list[str]]:
    """The images below class folders, the class of each, and the names of the folders' classes; reports other files.

    Those `known` come first, and may have no images. Raises InputError for parts (train, val) instead of classes, for
    no images, and where no classes are known for fewer than two, or one without images.
    """
    inside = folders_by_class(folder)
    own = list(inside)
    parts = [name for name in own if name.lower() in _PART_NAMES]
    counted = Counter(own)
    for part in parts:
        counted.update(folders_by_class(folder / part).keys())
    if parts and (parts == own or max(counted.values()) > 1):  # else a class may be called so
        problem = f"{folder}: {', '.join(parts)} are parts, not classes; put the classes into train and val"
        raise InputError(problem, ", in lower case, or --data-dir and --val-dir")
    if not own or (len(own) == 1 and not known):
        found = f"only {own[0]}" if own else "none"
        raise InputError(f"{folder}: expected a folder of images for each of at least two classes, found {found}")
    stray = [name for name in visible_names(folder)[1] if name.lower().endswith(suffixes(bands))]
    others = Counter(["next to the class folders"] * len(stray))
    names = []
    labels: list[str] = []
    empty = []
    for class_name in dict.fromkeys((*known, *own)):
        for inner in inside.get(class_name, ()):
            names += image_names(folder, inner, others, bands)
        if len(names) == len(labels):
            empty.append(class_name)
        labels += [class_name] * (len(names) - len(labels))
    if not names or (empty and not known):
        raise InputError(f"{folder}: no images in {', '.join(empty)} {looked_for(others, bands)}")
    report_others(folder, others)
    return ImageFiles(folder, names, bands), labels, own


def suffixes(bands: Bands | None = None) -> tuple[str, ...]:
    """The suffixes of image files. Arrays count only where bands are read: elsewhere they may be stored features."""
    return IMAGE_SUFFIXES if bands is None else (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES)


def without_suffix(name: str) -> str:
    """A name without the suffix of an image, if it has one: 1.2.840.100, as DICOM files are called, has none."""
    stem, suffix = posixpath.splitext(name)
    return stem if suffix.lower() in (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES) else name


def image_names(folder: Path, within: str = "", others: Counter | None = None, bands: Bands | None = None) -> list[str]:
    """The images below a folder, or below one `within` it, in a fixed order: paths relative to `folder`, with /.

    Links are followed. `others` counts what is no image, by suffix, and masks, x_mask.png next to x.jpg, which without
    it are among the images. Raises InputError for a folder it cannot list.
    """
    known = suffixes(bands)
    found = []
    strange: Counter = Counter()
    waiting: list[tuple[str, tuple[str, ...]]] = [(within, ())]
    while waiting:
        inner, above = waiting.pop()
        here = os.path.realpath(folder / inner)
        if here in above:
            continue  # a link to a folder around it
        inside, files = visible_names(folder / inner)
        for name in files:
            if name.lower().endswith(known) or dicom.is_bare_dicom(folder / inner / name):
                found.append((inner, name))
            else:
                strange[os.path.splitext(name)[1].lower() or "without suffix"] += 1
        waiting += [(posixpath.join(inner, name), (*above, here)) for name in inside]
    names = [posixpath.join(*place) for place in sorted(found)]
    if others is None:
        return names
    stems = set(map(without_suffix, names))
    masks = {name: re.fullmatch(r"(.+)_mask(_\d+)?\.[^./]*", name, re.DOTALL) for name in names}
    images = [name for name, mask in masks.items() if mask is None or mask[1] not in stems]
    others += strange + Counter({"masks": len(names) - len(images)})
    return images


def looked_for(others: Counter, bands: Bands | None = None) -> str:
    """For a message that there are no images: what would be one, and what is there instead."""
    instead = f"; found {_counted(others)}" if others else ""
    return f"(looked for {' '.join(suffixes(bands))}{instead})"


def report_others(folder: str | Path, others: Counter) -> None:
    if others:
        print(f"{remote.address(folder)}: files that are not read as images: {_counted(others)}")


def _counted(others: Counter) -> str:
    by_count = sorted(others.items(), key=lambda item: (-item[1], item[0]))  # in no order of the file system's
    return listed((f"{count} {suffix}" for suffix, count in by_count), 6)
