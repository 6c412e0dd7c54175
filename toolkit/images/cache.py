"""Caches in memory or on disk that later epochs read: decoded images, or the features that frozen blocks compute.

Training images are cached at twice the size of the model's input, and views are made from the cached image. Crops that
take less than half of a large photograph's shorter side are therefore enlarged, as they are in ImageNet's photographs
of some 375 pixels. Evaluation reads the files themselves.

Features are cached below the first block that trains: those of each plain image and of some augmented views, of which
each epoch draws one.
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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from toolkit import InputError, distributed
from toolkit.images.bands import Bands
from toolkit.images.data import LabelledImages
from toolkit.images.folders import ImageFiles, unreadable
from toolkit.images.transforms import ShrinkTo, View

CACHES = ("none", "ram", "disk")
_FORMAT = 2  # raise it with every change to what is cached
_MEMORY = Path("/dev/shm")  # Linux's file system in memory
_PREFIX = "moco-images-"


class CachedImages(ImageFiles):
    """`ImageFiles` whose decoded and resized images are cached in a folder, one file for each.

    A cached file's name is a digest of the image's path, size and times of change and of how it was resized. A changed
    image is therefore decoded anew, and several runs can share a folder. Each file is written whole or not at all.

    Args:
        files: the images.
        folder: where the cached files are.
        shorter: the most pixels along the shorter side.
    """

    def __init__(self, files: ImageFiles, folder: Path, shorter: int):
        super().__init__(files.folder, (), files.labels, files.bands)
        self.names = files.names
        self.files = files
        self.cache_folder = folder
        self.shorter = shorter
        self.is_full = False

    def __getitem__(self, i: int) -> tuple[Image.Image | np.ndarray, int]:
        place = self.place(i)
        image = _read(place, self.bands)
        if image is None:
            image = View(ShrinkTo(self.shorter))(self.files[i][0])
            if torch.is_tensor(image):
                image = image.permute(1, 2, 0).numpy()
            self._write(image, place)
        return image, self.labels[i]

    def place(self, i: int) -> Path:
        """The file that this image is cached in."""
        path = self.path(i)
        try:
            found = [os.stat(file) for file in self.parts(i)]
        except OSError as error:
            raise unreadable(path, error) from None
        # A copy with the old time of modification (rsync -t) shows in the time of change, which nobody can set.
        states = " ".join(f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}" for status in found)
        of_file = f" {self.bands.chosen}" if self.bands else ""
        key = f"{_FORMAT} {self.shorter} {os.path.abspath(path)} {states}{of_file}"
        name = hashlib.blake2b(os.fsencode(key), digest_size=16).hexdigest()
        return self.cache_folder / name[:2] / name

    def _write(self, image: Image.Image | np.ndarray, place: Path) -> None:
        if self.is_full:
            return
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            file, name = tempfile.mkstemp(dir=place.parent)
            try:
                size = np.array(_size(image), dtype="<u4")
                with os.fdopen(file, "wb") as opened:
                    opened.write(size.tobytes() + image.tobytes())
                os.replace(name, place)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:  # the run goes on without caching the rest
            self.is_full = True
            warnings.warn(f"no more images are cached in {self.cache_folder}: {error.strerror}", stacklevel=2)


def _size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(width, height)."""
    return image.shape[1::-1] if isinstance(image, np.ndarray) else image.size


def _bytes_per_pixel(bands: Bands | None) -> int:
    return 3 if bands is None else 4 * bands.channels


def _read(place: Path, bands: Bands | None) -> Image.Image | np.ndarray | None:
    """The image cached in this file; None if the file is missing or incomplete."""
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
    """The same images, cached once they are decoded. Prints the folder and the bytes that they will take.

    Args:
        where: one of CACHES.

    Raises:
        InputError: the folder cannot be made, or has too little room.
    """
    if where == "none" or type(images.source) is not ImageFiles:  # others are in memory, or read from archives
        return images
    folder = _first_of_all(lambda: str(_cache_folder(where)))
    cached = LabelledImages(CachedImages(images.source, Path(folder), 2 * image_size), images.labels)
    cached.indices = images.indices
    cached.labels = images.labels
    cached.targets = images.targets
    cached.groups = images.groups
    cached.times_split = images.times_split
    needed, missing = _bytes_needed(cached)
    print(
        f"caching decoded images in {folder}: {needed / 1e9:.2f} GB, of which {missing / 1e9:.2f} GB are still to come"
    )
    _check_room("--cache-images", where, folder, missing)
    return cached


def _first_of_all(text: Callable[[], str]) -> str:
    """The text that this function returns in the first process, for all processes of the run."""
    return distributed.gather(text() if distributed.is_main() else "")[0]


def _cache_folder(where: str) -> Path:
    return _memory_folder() if where == "ram" else _disk_folder()


def _check_room(option: str, where: str, folder: str | Path, needed: int) -> None:
    """Raise InputError if fewer bytes than needed are free in this folder."""
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
            f"cannot make {folder} for the cache: {error.strerror}; set XDG_CACHE_HOME to another place"
        ) from None
    return folder


class CachedFeatures(LabelledImages):
    """(features, label) pairs, where frozen blocks computed the features. The source is a `TensorDataset` of these.

    An image's features are (views, ...): first the plain image's, then those of its augmented views, if there are any.
    """

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.undecoded(i)


def plain_view(features: Tensor) -> Tensor:
    """From the features (views, ...) of `CachedFeatures`: those of the plain image."""
    return features[0]


def drawn_view(features: Tensor) -> Tensor:
    """From the features (views, ...) of `CachedFeatures`: a random augmented view's, or else the plain image's."""
    return features[torch.randint(min(1, len(features) - 1), len(features), ())]


def cache_features(
    images: LabelledImages, views: Sequence[Iterable[Tensor]], batch_size: int, where: str
) -> CachedFeatures:
    """Cache the features of all images in a file that vanishes when the processes end. Prints its size.

    Args:
        views: for each view, the plain one first, batches of features (n, ...) of the images in order. With several
            processes each computes its share of every batch, and all processes read all features.
        batch_size: the images per batch of all processes together.
        where: 'ram' or 'disk'.

    Raises:
        InputError: the folder cannot be made or has too little room, or the processes are on several machines.
    """
    first, step = distributed.rank(), distributed.world_size()
    cached = None
    for view, batches in enumerate(views):
        for start, features in zip(itertools.count(0, batch_size), batches, strict=False):
            if cached is None:  # each process has a share of the first batch
                cached = _shared_tensor((len(images), len(views), *features.shape[1:]), features.dtype, where)
            cached[start + first :: step, view][: len(features)] = features.cpu()
    distributed.all_sum(0)  # wait until all have written their share
    found = CachedFeatures(TensorDataset(cached), images.labels, targets=images.targets)
    found.groups = images.groups
    return found


def _shared_tensor(shape: tuple[int, ...], dtype: torch.dtype, where: str) -> Tensor:
    """A tensor whose memory is one file for all processes. Its name is removed at once, so no file is left behind."""
    if len(set(distributed.gather(platform.node()))) > 1:
        raise InputError("--cache-features: processes on several machines share no file; use --cache-features none")
    folder = _cache_folder(where)
    numel = math.prod(shape)
    needed = numel * dtype.itemsize
    print(f"caching features in {folder}: {needed / 1e9:.2f} GB")
    _check_room("--cache-features", where, folder, needed)
    path = Path(_first_of_all(lambda: _empty_file(folder, needed)))
    tensor = torch.from_file(str(path), shared=True, size=numel, dtype=dtype).view(shape)
    distributed.all_sum(0)  # wait until all have opened it
    if distributed.is_main():
        with contextlib.suppress(PermissionError):  # on Windows a file in use cannot lose its name
            path.unlink()
    return tensor


def _empty_file(folder: Path, size: int) -> str:
    """A new file with its space reserved: if the disk filled up later, writing to the tensor would be a bus error."""
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


# This process's folder in memory. An ordinary exit removes it; before os._exit `free_memory` must.
_own_memory: tempfile.TemporaryDirectory | None = None


def _memory_folder() -> Path:
    """A folder in memory that is removed when this process ends. Removes the folders that killed processes left."""
    global _own_memory
    if not _MEMORY.is_dir():
        raise InputError(
            f"this system has no {_MEMORY}, in which images and features are cached: use disk instead of ram"
        )
    for folder in _MEMORY.glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(folder, ignore_errors=True)
    _own_memory = _own_memory or tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", dir=_MEMORY)
    return Path(_own_memory.name)


def free_memory() -> None:
    """Remove what this process has cached in memory, and kill its loading processes, which would write it anew."""
    if _own_memory is not None:
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        shutil.rmtree(_own_memory.name, ignore_errors=True)


def _bytes_needed(images: LabelledImages) -> tuple[int, int]:
    """Estimate from a few images: the bytes of all, and of those that are not cached yet."""
    source = images.source
    step = max(1, len(images) // 64)
    sizes, missing = [], []
    for i in images.indices[::step].tolist():
        with contextlib.suppress(InputError):  # an unreadable image is reported when it is its turn
            place = source.place(i)
            width, height = ShrinkTo(source.shorter)(*_size(source.files[i][0]))[1]
            sizes.append(8 + _bytes_per_pixel(source.bands) * width * height)
            missing.append(0 if place.exists() else sizes[-1])
    share = len(images) / max(1, len(sizes))
    return round(share * sum(sizes)), round(share * sum(missing))
