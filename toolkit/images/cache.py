"""A cache of the features that frozen blocks compute, in a file, from which later epochs train."""

import copy
import itertools
import math
import operator
import os
import platform
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from toolkit import InputError, distributed, homed
from toolkit.images.data import LabelledImages

CACHED_VIEWS = 4  # made a run of ten epochs as accurate as new views in each epoch
plain_view = operator.itemgetter(0)  # of the cached features of an image, (views, ...): the plain image's


def drawn_view(features: Tensor) -> Tensor:
    """From the cached features of an image: a random augmented view's, or else the plain image's."""
    return features[torch.randint(min(1, len(features) - 1), len(features), ())]


def cache_features(images: LabelledImages, views: Sequence[Iterable[Tensor]], batch_size: int) -> LabelledImages:
    """(features, label) pairs in place of images, with features (views, ...) in a file that vanishes with the process.

    `views` has for each view, the plain one first, batches of features (n, ...) of the images in order: of the
    `batch_size` images of a batch each process computes its share, and all processes read all features.
    Raises InputError if the folder cannot be made or has too little room, or the processes are on several machines.
    """
    features = None
    for view, batches in enumerate(views):
        for start, share in zip(itertools.count(0, batch_size), batches, strict=False):
            if features is None:  # each process has a share of the first batch
                features = _shared_tensor((len(images), len(views), *share.shape[1:]), share.dtype)
            features[start + distributed.rank() :: distributed.world_size(), view][: len(share)] = share.cpu()
    distributed.all_sum(0)  # wait until all have written their share
    cached = copy.copy(images)
    cached.source = features
    cached.indices = np.arange(len(images))
    return cached


def _shared_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose memory is one file for all processes. Its name is removed at once, so no file is left behind."""
    if len(set(distributed.gather(platform.node()))) > 1:
        raise InputError("--cache-features: processes on several machines share no file; use --cache-features none")
    parent = homed(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "moco-images"
    numel = math.prod(shape)
    needed = numel * dtype.itemsize
    print(f"caching features in {parent}: {needed / 1e9:.2f} GB")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        # On Windows a file in use cannot lose its name.
        with tempfile.TemporaryDirectory(prefix="features-", dir=parent, ignore_cleanup_errors=True) as folder:
            if distributed.is_main():
                with open(Path(folder, "features"), "wb") as file:
                    reserve(file, needed)
            path = Path(distributed.gather(folder)[0], "features")
            tensor = torch.from_file(str(path), shared=True, size=numel, dtype=dtype).view(shape)
            distributed.all_sum(0)  # wait until all have opened it
    except OSError as error:
        problem = f"--cache-features: cannot make a file of {needed / 1e9:.2f} GB in {parent} ({error.strerror})"
        raise InputError(f"{problem}: free some, set XDG_CACHE_HOME, or use --cache-features none") from None
    return tensor


def reserve(file: IO[bytes], size: int) -> None:
    """Give a file its room: if the disk filled up later, writing into the mapped file would be a bus error."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
