"""A cache of the features that frozen blocks compute, in a file, from which later epochs train."""

import contextlib
import itertools
import math
import os
import platform
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from toolkit import InputError, distributed
from toolkit.images.data import LabelledImages

CACHED_VIEWS = 4  # made a run of ten epochs as accurate as new views in each epoch


def plain_view(features: Tensor) -> Tensor:
    """From the cached features of an image, (views, ...): the plain image's."""
    return features[0]


def drawn_view(features: Tensor) -> Tensor:
    """From the cached features of an image: a random augmented view's, or else the plain image's."""
    return features[torch.randint(min(1, len(features) - 1), len(features), ())]


def cache_features(images: LabelledImages, views: Sequence[Iterable[Tensor]], batch_size: int) -> LabelledImages:
    """(features, label) pairs in place of images, with features (views, ...) in a file that vanishes with the process.

    `views` has for each view, the plain one first, batches of features (n, ...) of the images in order: of the
    `batch_size` images of a batch each process computes its share, and all processes read all features.
    Raises InputError if the folder cannot be made or has too little room, or the processes are on several machines.
    """
    cached = None
    for view, batches in enumerate(views):
        for start, features in zip(itertools.count(0, batch_size), batches, strict=False):
            if cached is None:  # each process has a share of the first batch
                cached = _shared_tensor((len(images), len(views), *features.shape[1:]), features.dtype)
            cached[start + distributed.rank() :: distributed.world_size(), view][: len(features)] = features.cpu()
    distributed.all_sum(0)  # wait until all have written their share
    found = LabelledImages(cached, images.labels, targets=images.targets)
    found.groups = images.groups
    return found


def _shared_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose memory is one file for all processes. Its name is removed at once, so no file is left behind."""
    if len(set(distributed.gather(platform.node()))) > 1:
        raise InputError("--cache-features: processes on several machines share no file; use --cache-features none")
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "moco-images")
    numel = math.prod(shape)
    needed = numel * dtype.itemsize
    print(f"caching features in {folder}: {needed / 1e9:.2f} GB")
    name = _empty_file(folder, needed) if distributed.is_main() else ""
    path = Path(distributed.gather(name)[0])
    try:
        tensor = torch.from_file(str(path), shared=True, size=numel, dtype=dtype).view(shape)
        distributed.all_sum(0)  # wait until all have opened it
    finally:
        if distributed.is_main():
            with contextlib.suppress(PermissionError):  # on Windows a file in use cannot lose its name
                path.unlink()
    return tensor


def _empty_file(folder: Path, size: int) -> str:
    """A new file with its space reserved: if the disk filled up later, writing to the tensor would be a bus error."""
    name = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file, name = tempfile.mkstemp(prefix="features-", dir=folder)
        with open(file, "wb"):  # which closes it
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, size)
    except OSError as error:
        if name is not None:
            os.unlink(name)
        problem = f"--cache-features: cannot make a file of {size / 1e9:.2f} GB in {folder} ({error.strerror})"
        raise InputError(f"{problem}: free some, set XDG_CACHE_HOME, or use --cache-features none") from None
    return name
