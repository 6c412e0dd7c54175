"""Images with their labels, and the loaders that make batches of them."""

import copy
import functools
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from toolkit import distributed
from toolkit.images import folders, shards, transforms
from toolkit.images.bands import Bands

UNLABELLED = -1  # the label of an image without one


class LabelledImages(Dataset):
    """(PIL RGB image, int label) pairs, or (array (H, W, C), int label) where the source has `bands`."""

    of_any_size = False  # are they evaluated as they are?
    most_probed = 10_000  # of those that train: for the k-NN accuracy before training and for the linear probe
    collate: Callable | None = None  # makes a batch; None: as PyTorch does

    def __init__(self, source: Sequence[Any], labels: Sequence[int] | None = None, targets: torch.Tensor | None = None):
        if labels is None:
            labels = [UNLABELLED] * len(source)
        self.source = source  # has the images
        self.indices = np.arange(len(labels))  # of the source, which are meant, in order
        self.labels = list(map(int, labels))
        self.targets = targets  # (N, K): a row takes the label's place; labels say which are alike: `splitting.strata`
        self.groups: np.ndarray | None = None  # (N,): the name of each image's group, such as a patient
        self.times_split = 0  # how often `validation_part` or the like has made this set smaller

    @staticmethod
    def views(image_size: int, augmentation: str, **normalization: Any) -> tuple[Callable, ...]:
        """A run's transforms, to (C, S, S): augmented, strongly for training without a label, plain, for evaluation."""
        augmented = strong = transforms.train_transform(image_size, augmentation, **normalization)
        if augmentation == "crop" and normalization["bands"] is None:
            strong = transforms.train_transform(image_size, "trivial", **normalization)
        plain = transforms.eval_transform(image_size, **normalization)
        return augmented, strong, plain, plain

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Image.Image, int | torch.Tensor]:
        image, label = self.undecoded(i)
        if isinstance(image, Image.Image):
            image = transforms.decoded(image, 1)
        return image, label

    def undecoded(self, i: int) -> tuple[Image.Image | np.ndarray, int | torch.Tensor]:
        """(image, label) as the source has them: in any mode, and an image file opened but not decoded."""
        return self.source[int(self.indices[i])], self.labels[i] if self.targets is None else self.targets[i]

    def subset(self, positions: Sequence[int]) -> "LabelledImages":
        """The images at these positions, in this order."""
        positions = np.array(positions, dtype=int)
        images = copy.copy(self)
        images.indices = self.indices[positions]
        images.labels = np.array(self.labels)[positions].tolist()
        if self.targets is not None:
            images.targets = self.targets[positions]
        if self.groups is not None:
            images.groups = self.groups[positions]
        return images

    def split(self, in_part: np.ndarray) -> tuple["LabelledImages", "LabelledImages"]:
        """The images outside and inside of a part, (N,) of bool. The next split draws anew from each."""
        rest = self.subset(np.flatnonzero(~in_part))
        part = self.subset(np.flatnonzero(in_part))
        rest.times_split = part.times_split = self.times_split + 1
        return rest, part

    def at_most(self, count: int) -> "LabelledImages":
        """At most `count` images: all, or a fixed random choice, with one or more of each class if that fits."""
        if len(self) <= count:
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0)).numpy()
        _, first = np.unique(np.asarray(self.labels)[order], return_index=True)  # of each class
        others = np.setdiff1d(np.arange(len(self)), first)
        return self.subset(order[np.sort(np.concatenate([first, others])[:count])])

    def clusters(self) -> torch.Tensor | None:
        """The number of each image's group, (N,), counted from 0; None where images have none."""
        return None if self.groups is None else torch.from_numpy(np.unique(self.groups, return_inverse=True)[1])

    @property
    def in_files(self) -> bool:
        return isinstance(self.source, folders.ImageFiles)

    @property
    def bands(self) -> Bands | None:
        """What is read of their files; None: they are RGB photographs."""
        return self.source.bands if self.in_files else None

    def name(self, i: int) -> str:
        """What to call an image in a message: its file, if it is one."""
        position = self.indices[i]
        return self.source.path(position) if self.in_files else f"image {position}"

    def relative_names(self) -> Iterator[str]:
        """What tells each image from the others wherever the set lies: a path within its folder, or an index."""
        if self.in_files:
            return map(self.source.names.__getitem__, self.indices)
        return map(str, self.indices)

    @property
    def digest(self) -> str:
        """Equal for sets of the same files with the same labels, or targets, in the same order."""
        hashed = hashlib.sha256()
        for label, key in zip(self.labels, self.relative_names(), strict=True):
            hashed.update(os.fsencode(f"{label} {key}\n"))
        if self.targets is not None:
            hashed.update(self.targets.numpy().tobytes())
        return hashed.hexdigest()


def keep_decoded(*sets: LabelledImages | None) -> None:
    """From now on decode the files of these images once each, as far as they fit into KEPT_BYTES."""
    sources = {images.source for images in sets if images is not None and images.in_files}
    for source in sources:
        source.keep(folders.KEPT_BYTES // len(sources))


def copies(images: LabelledImages, others: LabelledImages) -> dict[str, str]:
    """The images whose content one of the others has too, each with that one: their files. Reads only equal sizes."""
    if not images.in_files or not others.in_files:
        return {}
    sizes = {i: images.source.size(i) for i in images.indices.tolist()}
    other_sizes = {i: others.source.size(i) for i in others.indices.tolist()}
    common = set(sizes.values()) & set(other_sizes.values()) - {-1}  # of what cannot be read
    known = {}
    for i, size in other_sizes.items():
        if size in common:
            known[hash(others.source.content(i))] = others.source.path(i)
    found = {}
    for i, size in sizes.items():
        if size in common and (other := known.get(hash(images.source.content(i)))):
            found[images.source.path(i)] = other
    return found


def among(images: LabelledImages, others: LabelledImages) -> np.ndarray:
    """Which images, (N,), are among the others, by their paths or their content."""
    known = {*map(others.name, range(len(others))), *copies(images, others)}
    return np.array([images.name(i) in known for i in range(len(images))], bool)


def look_at_each(look: Callable[[int], Any], count: int, what: str) -> list[Any]:
    """What `look` finds at each position below `count`. Each process looks at its share of them."""
    share = range(distributed.rank(), count, distributed.world_size())
    shown = {"unit": what, "delay": 2, "mininterval": 1, "leave": False, "disable": not distributed.is_main()}
    with ThreadPool(usable_cores()) as pool:  # Pillow decodes without the interpreter's lock
        bar = tqdm(pool.imap(look, share, chunksize=16), f"{what}s", len(share), **shown)
        shares = distributed.gather(list(bar))
    return list(itertools.chain.from_iterable(itertools.zip_longest(*shares)))[:count]  # the last turn may lack some


@dataclass(eq=False)
class Transformed(Dataset):
    """(transform(image), label) of a data set of (image, label)."""

    dataset: Dataset
    transform: Callable[[Image.Image], Any]

    def __post_init__(self) -> None:
        # Views decode files themselves, at the size that they need.
        is_view = isinstance(self.transform, transforms.View | transforms.TwoCrops)
        undecoded = is_view and isinstance(self.dataset, LabelledImages)
        self.read = self.dataset.undecoded if undecoded else self.dataset.__getitem__

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Any, int]:
        """An index may come with a seed, as (i, seed): the transform's draws from PyTorch then depend on that alone."""
        i, seed = index if isinstance(index, tuple) else (index, None)
        image, label = self.read(i)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds GPUs as well
            if hasattr(self.transform, "takes_label"):  # one draw for an image and its mask
                return self.transform(image, label)
            return self.transform(image), label


@dataclass(eq=False)
class TolerantImages(Transformed):
    """(image, problem): "", or what is wrong with an image that cannot be read, for which `stand_in` is there."""

    stand_in: torch.Tensor

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[torch.Tensor, str]:
        try:
            return super().__getitem__(index)[0], ""
        except folders.UnreadableImage as error:
            return self.stand_in, error.problem


@dataclass(eq=False)
class Batches(Sampler):
    """This process's share of the positions of each batch, in an order that depends on (seed, epoch) alone.

    Each position comes with a seed, as `Transformed` takes it, from (seed, epoch, position): neither the number of
    workers or processes nor an interruption changes an epoch. Every pass is the next epoch, from batch `start` on.

    Process k of W gets the positions k, k + W, ... of each batch. If a batch has fewer than W images, a process without
    one skips the batch in fixed order, and gets its first image as a stand-in in shuffled order: see `has_share`.
    """

    ARCHIVES_AT_A_TIME: ClassVar[int] = 8  # of which a shuffled order takes images
    count: int
    batch_size: int
    shuffle: bool = False
    seed: int = 0
    drop_last: bool = False
    archives: np.ndarray | None = None  # the number of each image's archive, if the images are in archives
    batches: int | None = None  # of an epoch, if shuffled: a piece of an endless row of passes; None: one pass
    epoch: int = 0
    start: int = 0

    def __len__(self) -> int:
        if self.batches is not None:
            return self.batches
        if self.drop_last:
            return self.count // self.batch_size
        return -(-self.count // self.batch_size)

    @property
    def drawn(self) -> int:
        """The number of images in an epoch."""
        return self.count if self.batches is None else self.batches * self.batch_size

    def has_share(self, number: int) -> bool:
        """Does this process get a share of this batch (0 is the first)?"""
        return min(self.batch_size, self.drawn - number * self.batch_size) > distributed.rank()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.epoch * self.drawn  # of all draws, pass after pass
        numbers = range(self.start, len(self))
        self.epoch += 1
        self.start = 0
        orders = functools.lru_cache(2)(self.shuffled)
        for number in numbers:
            draws = range(number * self.batch_size, min((number + 1) * self.batch_size, self.drawn))
            share = draws[distributed.rank() :: distributed.world_size()]
            if self.shuffle:
                share = share or draws[:1]
            batch = []
            for draw in share:
                turn, i = divmod(first + draw, self.count)
                if self.shuffle:
                    i = int(orders(turn)[i])
                batch.append((i, _derive_seed(self.seed, turn, i)))
            if batch:
                yield batch

    def shuffled(self, epoch: int) -> torch.Tensor:
        """The order of an epoch, (count,)."""
        generator = torch.Generator().manual_seed(_derive_seed(self.seed, epoch))
        order = torch.randperm(self.count, generator=generator)
        if self.archives is None:
            return order
        turns = torch.randperm(int(self.archives.max()) + 1, generator=generator) // self.ARCHIVES_AT_A_TIME
        return order[turns[self.archives[order]].argsort(stable=True)]


def _derive_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@dataclass
class LoadingMeter:
    """Watches a training loop take batches from a loader: how many images it gets, and how long it waits for them."""

    images: int = 0
    waited: float = 0.0
    seconds: float = 0.0

    def timed(self, loader: DataLoader) -> Iterator[Any]:
        """The loader's batches, (anything, labels) each."""
        asked = time.perf_counter()
        for batch in loader:
            self.waited += time.perf_counter() - asked
            try:
                yield batch
            finally:  # after the last batch of an epoch a loop need not ask for another
                self.seconds += time.perf_counter() - asked
                asked = time.perf_counter()
                self.images += len(batch[1]) * distributed.world_size()

    def results(self) -> dict[str, float]:
        """`images_per_second`, of all processes together, and `waiting_share` of the time, 0 to 1."""
        seconds = max(self.seconds, 1e-9)
        return {"images_per_second": self.images / seconds, "waiting_share": self.waited / seconds}

    def shown(self) -> dict[str, str]:
        """For a progress bar: the share of waiting, from a tenth on, which is worth more loading processes."""
        share = self.results()["waiting_share"]
        return {"waiting for images": f"{share:.0%}"} if self.images and share >= 0.1 else {}


# So many images in memory, or in files, are read before a loading process has started.
SMALL_DATASET_IMAGES = 2_000
SMALL_DATASET_FILES = 500
MOST_WORKERS = 16


def _helpful_workers(dataset: Transformed, device: torch.device | None) -> int:
    """A process per core for a GPU, which computes meanwhile; for a CPU, which is to compute, one for four cores."""
    in_files = isinstance(dataset.dataset, LabelledImages) and dataset.dataset.in_files
    if len(dataset) < (SMALL_DATASET_FILES if in_files else SMALL_DATASET_IMAGES):
        return 0
    workers = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device is None or device.type == "cpu":
        workers //= 4
    return min(MOST_WORKERS, max(1, workers))


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fixed_order_batch(batch_size: int) -> int:
    """The least multiple of the number of processes that is no less than a batch size."""
    return -(-batch_size // distributed.world_size()) * distributed.world_size()


OPEN_LOADERS: weakref.WeakSet[DataLoader] = weakref.WeakSet()  # whose processes may be waiting


def build_loader(
    dataset: Transformed, batch_size, *, shuffle=False, workers=0, device=None, keep_workers=True, collate=None, **order
) -> DataLoader:
    """A DataLoader over `Batches`, which is its `batch_sampler`: what it yields depends on `seed` and the epoch alone.

    Args:
        batch_size: images at a time, of all processes together. In fixed order it is rounded up to a multiple of their
            number, so that shares of batches are shares of the whole (`distributed.interleave` puts them in order).
        workers: processes that load images; 'auto' for as many as are likely to help.
        device: what the batches are for: on the way to a GPU they wait in pinned memory.
        keep_workers: they wait for the next pass. Without fork (macOS, Windows) each start would take seconds.
        order: `seed`, `drop_last` and `batches` of `Batches`.
    """
    if not shuffle:
        batch_size = fixed_order_batch(batch_size)
    if workers == "auto":
        workers = _helpful_workers(dataset, device)
    images = dataset.dataset
    if isinstance(images, LabelledImages) and isinstance(images.source, shards.ShardedImages):
        order["archives"] = images.source.places[images.indices, 0]
    loader = DataLoader(
        dataset,
        batch_sampler=Batches(len(dataset), batch_size, shuffle, **order),
        num_workers=workers,
        persistent_workers=keep_workers and workers > 0,
        pin_memory=device is not None and device.type == "cuda",
        worker_init_fn=_leave_stopping_to_the_main_process,
        collate_fn=collate,
        generator=torch.Generator(),  # an iterator draws a number nobody needs: not from the global generator
    )
    OPEN_LOADERS.add(loader)
    return loader


def end_workers() -> None:
    """End the processes that wait for the next pass over a loader."""
    # Python's collector of cycles would end them late and take five seconds for each: it closes their queues first.
    for loader in OPEN_LOADERS:
        loader._iterator = None  # PyTorch has no public name for it
    OPEN_LOADERS.clear()


def _leave_stopping_to_the_main_process(worker: int) -> None:
    # A terminal sends Ctrl-C, and some schedulers SIGTERM, to every process. The main process then finishes its step,
    # in which the sudden end of a worker would be an error; so a worker ends on its main process's SIGTERM alone.
    def end_when_told() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != multiprocessing.parent_process().pid:
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=end_when_told, daemon=True).start()


REMEMBERED_BYTES = 2**27  # at the most, of the batches of a loader that stay in memory


class Remembered:
    """The batches of a loader, the same in each pass. If they need little memory, they are loaded only once."""

    def __init__(self, loader: DataLoader):
        self.loader = loader
        self.batches: list[Sequence[torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Sequence[torch.Tensor]]:
        if self.batches:
            yield from self.batches
            return
        self.loader.batch_sampler.epoch = 0
        batches = []
        needed = 0
        for batch in self.loader:
            needed += sum(part.nbytes for part in batch)
            if needed <= REMEMBERED_BYTES:
                batches.append(batch)
            yield batch
        if needed <= REMEMBERED_BYTES:
            self.batches = batches
            self.loader._iterator = None  # its processes end: see `end_workers`
