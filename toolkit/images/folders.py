"""Image files: finding them below a folder, keeping their names in little memory, and opening them."""

import hashlib
import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from toolkit import InputError, listed, printable
from toolkit.images.bands import ARRAY_SUFFIXES, Bands, WrongBands, open_image, read_file

# The first frame of an animated file is the image.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jp2")
# What network drives, archivers and systems put among images: thumbnails, deleted files.
_OF_SYSTEMS = {"@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
EVALUATION_NAMES = ("val", "valid", "validation")  # or else test
_PART_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}


class ImageFiles(Dataset):
    """(PIL image, label) of image files. The image is open, but `transforms.to_rgb` decodes it.

    Args:
        folder: where the files are.
        names: their paths relative to it, with / between the parts.
        labels: their classes.
        bands: what is read of files that are no RGB photographs; each image is then an array, (H, W, C).
    """

    def __init__(self, folder: str | Path, names: Iterable[str], labels: Sequence[int], bands: Bands | None = None):
        self.folder = str(folder)
        self.names = list(names)
        self.labels = labels
        self.bands = bands

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Image.Image | np.ndarray, int]:
        """Raises InputError for a file that is no image."""
        try:
            return self._open(i) if self.bands is None else self._read(i), self.labels[i]
        except (MemoryError, InputError):
            raise
        except Exception as error:  # a damaged file fails in a hundred places of Pillow
            raise unreadable(self.path(i), error) from None

    def _open(self, i: int) -> Image.Image:
        return open_image(self.path(i))

    def _read(self, i: int) -> np.ndarray:
        return self.bands.read_path(self.path(i))

    def path(self, i: int) -> str:
        return os.path.join(self.folder, self.names[i])

    def parts(self, i: int) -> list[str]:
        """The paths of all that an image is read of: one, or one for each of its bands."""
        if self.bands is None:
            return [self.path(i)]
        return list(self.bands.files(self.path(i)).values())

    def size(self, i: int) -> int:
        """In bytes; -1 for what cannot be read, which is found out when it is."""
        paths = self.parts(i)
        return sum(map(os.path.getsize, paths)) if all(os.access(path, os.R_OK) for path in paths) else -1

    def content(self, i: int) -> bytes:
        return b"".join(map(read_file, self.parts(i)))


class UnreadableImage(InputError):
    """A file that cannot be read as an image."""


def unreadable(path: str, error: Exception) -> UnreadableImage:
    """What to raise for such a file."""
    problem = printable(error)
    if not isinstance(error, WrongBands):
        problem = f"not a readable image ({problem}); repair or remove it, or use --skip-unreadable"
    return UnreadableImage(f"{path}: {problem}")


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def evaluation_folder(root: Path, is_needed: bool = False) -> Path | None:
    """The folder beside train/ to evaluate on, by the name that it has; test/ only where there is no other.

    Raises InputError where several have such a name, or where one `is_needed` and there is none.
    """
    found = [root / name for name in EVALUATION_NAMES if os.path.isdir(root / name)]
    if len(found) > 1:
        raise InputError(f"{root} has {' and '.join(path.name for path in found)}: name one of them with --val-dir")
    test = root / "test"
    has_test = os.path.isdir(test)
    if found and has_test:
        print(f"evaluating on {found[0]}; {test} is left alone")
    elif has_test:
        print(f"evaluating on {test}")
        return test
    if is_needed and not found:
        raise InputError(
            f"{root} has train/ but no {'/, '.join(EVALUATION_NAMES)}/ or test/: add one, name it with --val-dir, or "
            "put what is in train/ straight into --data-dir"
        )
    return next(iter(found), None)


def class_folders(folder: Path, at_least: int = 2) -> list[str]:
    """The names of the class folders in a folder, sorted.

    Raises InputError if there are fewer than `at_least`, or if they are the parts of a set (train, val) instead.
    """
    names = list(folders_by_class(folder))
    if names and set(map(str.lower, names)) <= _PART_NAMES:
        raise InputError(
            f"{folder}: {', '.join(names)} are parts, not classes; name them train and val, in lower case, or give "
            "them as --data-dir and --val-dir"
        )
    if len(names) < at_least:
        found = f"only {names[0]}" if names else "none"
        raise InputError(f"{folder}: expected a folder of images for each of at least two classes, found {found}")
    return names


def folders_by_class(folder: Path) -> dict[str, list[str]]:
    """The names of the folders of each class, by the class's, sorted."""
    found = {}
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir() and not _is_hidden(entry.name):
                    found.setdefault(one_spelling(entry.name), []).append(entry.name)
    except OSError as error:
        raise _unlisted(error) from None
    return dict(sorted(found.items()))


def one_spelling(name: str) -> str:
    """The name of a class, in Unicode's form NFC. A Mac may write an e and an accent where others write one letter."""
    return unicodedata.normalize("NFC", name)


def _is_hidden(name: str) -> bool:
    """Does it begin with a dot, as the Mac's ._cat.jpg beside each cat.jpg and Jupyter's .ipynb_checkpoints do?"""
    return name.startswith(".") or name in _OF_SYSTEMS


def labelled_files(folder: Path, class_names: list[str], every: bool = True, bands: Bands | None = None) -> ImageFiles:
    """All images below the class folders; says which other files are there.

    Raises InputError if there are no images or, with `every`, none of some class.
    """
    folders = folders_by_class(folder)
    others = Counter()
    names = []
    labels = []
    empty = []
    for label, class_name in enumerate(class_names):
        before = len(names)
        for inner in folders.get(class_name, ()):
            names += image_names(folder, inner, others, bands)
        if len(names) == before:
            empty.append(class_name)
        labels += [label] * (len(names) - before)
    if not names or (every and empty):
        raise InputError(f"{folder}: no images in {', '.join(empty)} {looked_for(others, bands)}")
    report_others(folder, others)
    return ImageFiles(folder, names, labels, bands)


def suffixes(bands: Bands | None = None) -> tuple[str, ...]:
    """The suffixes of image files. Arrays count only where bands are read: elsewhere they may be stored features."""
    return IMAGE_SUFFIXES if bands is None else (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES)


def image_names(folder: Path, within: str = "", others: Counter | None = None, bands: Bands | None = None) -> list[str]:
    """The images below a folder, or below one `within` it, in a fixed order: paths relative to `folder`, with /.

    Links are followed. What is no image is counted in `others`, by suffix. Raises InputError for a folder that cannot
    be listed.
    """
    try:
        found = sorted(_image_folders(folder, within, (), Counter() if others is None else others, bands))
    except OSError as error:
        raise _unlisted(error) from None
    return [posixpath.join(inner, name) for inner, names in found for name in sorted(names)]


def first_image(folder: Path) -> str | None:
    """Some image below a folder, if there is one. Raises InputError for a folder that cannot be listed."""
    try:
        for inner, names in _image_folders(folder, "", (), Counter(), None):
            if names:
                return posixpath.join(inner, names[0])
    except OSError as error:
        raise _unlisted(error) from None
    return None


def _image_folders(
    folder: Path, within: str, above: tuple[os.stat_result, ...], others: Counter, bands: Bands | None
) -> Iterator[tuple[str, list[str]]]:
    """(path relative to `folder`, names of its images) for a folder and for each below it."""
    here = os.stat(folder / within)
    if any(os.path.samestat(here, other) for other in above):
        return  # a link to a folder around it
    names = []
    folders = []
    with os.scandir(folder / within) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                folders.append(posixpath.join(within, entry.name))
            elif entry.name.lower().endswith(suffixes(bands)):
                names.append(entry.name)
            else:
                others[os.path.splitext(entry.name)[1].lower() or "without suffix"] += 1
    if bands is not None:
        names, apart = bands.one_for_each_image(names)
        if apart:
            others["of other bands"] += apart
    yield within, names
    for inner in folders:
        yield from _image_folders(folder, inner, (*above, here), others, bands)


def looked_for(others: Counter, bands: Bands | None = None) -> str:
    """For a message that there are no images: what would be one, and what is there instead."""
    instead = f"; found {_counted(others)}" if others else ""
    return f"(looked for {' '.join(suffixes(bands))}{instead})"


def report_others(folder: str | Path, others: Counter) -> None:
    """Say how many files of which kinds are not read."""
    if others:
        print(f"{folder}: files that are not read as images: {_counted(others)}")


def _counted(others: Counter) -> str:
    return listed((f"{count} {suffix}" for suffix, count in others.most_common()), 6)


def _unlisted(error: OSError) -> InputError:
    return InputError(f"{error.filename}: cannot be listed: {error.strerror}")


# ----------------------------------------------------------------------------------------------------------------------
# Copies


def copies(
    files: ImageFiles, chosen: Iterable[int], others: ImageFiles, others_chosen: Iterable[int]
) -> list[tuple[str, str]]:
    """(file, other) for each of the chosen files whose content one of the others has too. Only equal sizes are read."""
    sizes = {i: files.size(i) for i in chosen}
    other_sizes = {i: others.size(i) for i in others_chosen}
    common = set(sizes.values()) & set(other_sizes.values()) - {-1}
    known = {}
    for i, size in other_sizes.items():
        if size in common:
            known[_digest(others.content(i))] = others.path(i)
    found = []
    for i, size in sizes.items():
        if size in common and (other := known.get(_digest(files.content(i)))):
            found.append((files.path(i), other))
    return found


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content).digest()
