"""What is kept for the next epochs, in memory or on disk: decoded images, or what frozen blocks make of them.

Images of training are kept at twice the size of the model's input. Views are then made of the kept image: crops of a
large photograph that take less than half of its shorter side are enlarged, as they are of ImageNet's photographs of
some 375 pixels. Evaluation reads the files themselves.

Features are kept below the first block that trains: of each image as it is, and of some augmented views of it, of which
an epoch then draws one.
"""

import contextlib
import errno
import hashlib
import itertools
import math
import multiprocessing
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from toolkit import InputError, distributed
from toolkit.bands import Bands
from toolkit.data import LabelledImages
from toolkit.folders import ImageFiles, unreadable
from toolkit.transforms import ShrinkTo, View

CACHES = ("none", "ram", "disk")
_FORMAT = 2  # raise it with every change to what is kept
_MEMORY = Path("/dev/shm")  # a file system in memory: Linux's
_PREFIX = "moco-images-"


class CachedImages(ImageFiles):
    """`ImageFiles` whose images, once decoded and resized, are kept in a folder, a file each.

    A file's name is a digest of the image's path, size and times of change and of how it was resized: what is kept is
    never of an older image, and several runs can share a folder. Each is written whole or not at all.

    Args:
        files: the images.
        folder: where they are kept.
        shorter: pixels along the shorter side, at most.
    """

    def __init__(self, files: ImageFiles, folder: Path, shorter: int):
        super().__init__(files.folder, (), files.labels, files.bands)
        self.names = files.names
        self.files, self.kept, self.shorter = files, folder, shorter
        self.is_full = False

    def __getitem__(self, i: int) -> tuple[Image.Image | np.ndarray, int]:
        place = self.place(i)
        image = _read(place, self.bands)
        if image is None:
            image = View(ShrinkTo(self.shorter))(self.files[i][0])
            image = image.permute(1, 2, 0).numpy() if torch.is_tensor(image) else image
            self._keep(image, place)
        return image, self.labels[i]

    def place(self, i: int) -> Path:
        """The file that this image is kept in."""
        path = self.path(i)
        try:
            found = [os.stat(file) for file in self.parts(i)]
        except OSError as error:
            raise unreadable(path, error) from None
        # A copy that keeps the old time of modification (rsync -t) shows in the time of change, which nobody can set.
        states = " ".join(f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}" for status in found)
        of_file = f" {self.bands.chosen}" if self.bands else ""
        key = f"{_FORMAT} {self.shorter} {os.path.abspath(path)} {states}{of_file}"
        name = hashlib.blake2b(os.fsencode(key), digest_size=16).hexdigest()
        return self.kept / name[:2] / name

    def _keep(self, image: Image.Image | np.ndarray, place: Path) -> None:
        if self.is_full:
            return
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            file, name = tempfile.mkstemp(dir=place.parent)
            try:
                with os.fdopen(file, "wb") as kept:
                    kept.write(np.array(_size(image), dtype="<u4").tobytes() + image.tobytes())
                os.replace(name, place)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:  # the images can be had without
            self.is_full = True
            warnings.warn(f"no more images are kept in {self.kept}: {error.strerror}", stacklevel=2)


def _size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(width, height)."""
    return image.shape[1::-1] if isinstance(image, np.ndarray) else image.size


def _bytes_per_pixel(bands: Bands | None) -> int:
    return 3 if bands is None else 4 * bands.channels


def _read(place: Path, bands: Bands | None) -> Image.Image | np.ndarray | None:
    """What was kept there; None where nothing is, or not all of it."""
    try:
        content = place.read_bytes()
    except OSError:
        return None
    size = tuple(np.frombuffer(content[:8], dtype="<u4").tolist()) if len(content) > 8 else (0, 0)
    if len(content) != 8 + _bytes_per_pixel(bands) * size[0] * size[1] or 0 in size:
        return None
    if bands is None:
        return Image.frombytes("RGB", size, content[8:])
    return np.frombuffer(content, np.float32, offset=8).reshape(size[1], size[0], bands.channels)


def cache_images(images: LabelledImages, where: str, image_size: int) -> LabelledImages:
    """The same images, kept `where`, one of CACHES, once they are decoded; says where, and how much it will take.

    Raises:
        InputError: there is no such place, or not enough room.
    """
    if where == "none" or type(images.source) is not ImageFiles:  # others are in memory, or read from archives
        return images
    # All processes of a run use the folder of the first.
    folder = distributed.gather(
        str(_memory_folder() if where == "ram" else _disk_folder()) if distributed.is_main() else ""
    )[0]
    kept = LabelledImages(CachedImages(images.source, Path(folder), 2 * image_size), images.labels)
    kept.indices, kept.labels, kept.times_split = images.indices, images.labels, images.times_split
    kept.targets = images.targets
    needed, missing = _bytes_needed(kept)
    print(
        f"keeping decoded images in {folder}: {needed / 1e9:.2f} GB, of which {missing / 1e9:.2f} GB are still to come"
    )
    _check_room("--cache-images", where, folder, missing)
    return kept


def _check_room(option: str, where: str, folder: str | Path, needed: int) -> None:
    """Raises InputError if fewer bytes than needed are free in this folder."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{option} {where}: {folder} has room for {free / 1e9:.2f} GB, not for {needed / 1e9:.2f} GB: free some, "
            f"or use {option} {'disk or ' if where == 'ram' else ''}none"
        )


def _disk_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "moco-images")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make {folder} for what is kept: {error.strerror}; set XDG_CACHE_HOME to another place"
        ) from None
    return folder


class CachedFeatures(LabelledImages):
    """(features, label) pairs: what frozen blocks make of images. The source is a `TensorDataset` of the features.

    Features are (views, ...): of the image as it is, then of augmented views, if there are any.
    """

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.undecoded(i)


def plain_view(features: Tensor) -> Tensor:
    """Of `CachedFeatures`: those of the image as it is."""
    return features[0]


def drawn_view(features: Tensor) -> Tensor:
    """Of `CachedFeatures`: those of an augmented view, drawn at random, or of the image as it is where that is all."""
    return features[torch.randint(min(1, len(features) - 1), len(features), ())]


def cache_features(
    images: LabelledImages, views: Sequence[Iterable[Tensor]], batch_size: int, where: str
) -> CachedFeatures:
    """Keep the features of all images in a file that is gone when the processes end, and say how much they take.

    Args:
        views: batches of features (n, ...), of the images in order: first of the images as they are, then of each
            augmented view. With several processes each has its share of each batch, and every process gets all.
        batch_size: of all processes together.
        where: 'ram' or 'disk'.

    Raises:
        InputError: there is no such place, not enough room, or the processes are on several machines.
    """
    first, step, kept = distributed.rank(), distributed.world_size(), None
    for view, batches in enumerate(views):
        for start, features in zip(itertools.count(0, batch_size), batches, strict=False):
            if kept is None:  # each process has a share of the first batch
                kept = _shared_tensor((len(images), len(views), *features.shape[1:]), features.dtype, where)
            kept[start + first :: step, view][: len(features)] = features.cpu()
    distributed.all_sum(0)  # all have written their share
    return CachedFeatures(TensorDataset(kept), images.labels, targets=images.targets)


def _shared_tensor(shape: tuple[int, ...], dtype: torch.dtype, where: str) -> Tensor:
    """A tensor whose memory is one file for all processes; it has no name any more, so that nothing is left behind."""
    if len(set(distributed.gather(platform.node()))) > 1:
        raise InputError("--cache-features: processes on several machines share no file; use --cache-features none")
    folder, numel = _memory_folder() if where == "ram" else _disk_folder(), math.prod(shape)
    needed = numel * dtype.itemsize
    print(f"keeping features in {folder}: {needed / 1e9:.2f} GB")
    _check_room("--cache-features", where, folder, needed)
    path = Path(distributed.gather(_empty_file(folder, needed) if distributed.is_main() else "")[0])
    tensor = torch.from_file(str(path), shared=True, size=numel, dtype=dtype).view(shape)
    distributed.all_sum(0)  # all have opened it
    if distributed.is_main():
        with contextlib.suppress(PermissionError):  # on Windows a file in use cannot lose its name
            path.unlink()
    return tensor


def _empty_file(folder: Path, size: int) -> str:
    """A file with its room reserved: if another run took it later, writing to the tensor would end in a bus error."""
    file, name = tempfile.mkstemp(prefix="features-", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            os.unlink(name)
            raise InputError(f"--cache-features: {folder} has no room for {size / 1e9:.2f} GB: free some") from None
    finally:
        os.close(file)
    return name


_own_memory: tempfile.TemporaryDirectory | None = None  # removed at an ordinary exit; before os._exit: `free_memory`


def _memory_folder() -> Path:
    """A folder in memory that ends with this process; what killed processes have left there is removed."""
    global _own_memory
    if not _MEMORY.is_dir():
        raise InputError(
            f"this system has no {_MEMORY}, where images and features are kept in memory: use disk instead of ram"
        )
    for folder in _MEMORY.glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(folder, ignore_errors=True)
    _own_memory = _own_memory or tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", dir=_MEMORY)
    return Path(_own_memory.name)


def free_memory() -> None:
    """Remove what this process keeps in memory; its loading processes, which would write it anew, are killed."""
    if _own_memory is not None:
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        shutil.rmtree(_own_memory.name, ignore_errors=True)


def _bytes_needed(images: LabelledImages) -> tuple[int, int]:
    """Estimates from a few images: bytes of all, and of those that are not kept yet."""
    source, step = images.source, max(1, len(images) // 64)
    sizes, missing = [], []
    for i in images.indices[::step].tolist():
        with contextlib.suppress(InputError):  # what cannot be read is told when it is its turn
            place = source.place(i)
            width, height = ShrinkTo(source.shorter)(*_size(source.files[i][0]))[1]
            sizes.append(8 + _bytes_per_pixel(source.bands) * width * height)
            missing.append(0 if place.exists() else sizes[-1])
    share = len(images) / max(1, len(sizes))
    return round(share * sum(sizes)), round(share * sum(missing))
