"""Labelled images, their splits, augmentations and loaders, for pretraining and for fine-tuning."""

import contextlib
import functools
import hashlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision import datasets
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from moco import InputError, distributed
from moco.folders import ImageFiles, class_folders, labelled_files, unreadable

# The statistics MoCo checkpoints were trained with, so those every data set is normalised with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# torchvision's sets: class, the arguments of its training part, those of its held-out part (None: it has none, so the
# images are split here).
_TORCHVISION = {
    "cifar10": (datasets.CIFAR10, {"train": True}, {"train": False}),
    "cifar100": (datasets.CIFAR100, {"train": True}, {"train": False}),
    "mnist": (datasets.MNIST, {"train": True}, {"train": False}),
    "fashion_mnist": (datasets.FashionMNIST, {"train": True}, {"train": False}),
    "svhn": (datasets.SVHN, {"split": "train"}, {"split": "test"}),
    "stl10": (datasets.STL10, {"split": "train"}, {"split": "test"}),
    "flowers102": (datasets.Flowers102, {"split": "train"}, {"split": "test"}),
    "food101": (datasets.Food101, {"split": "train"}, {"split": "test"}),
    "oxford_iiit_pet": (datasets.OxfordIIITPet, {"split": "trainval"}, {"split": "test"}),
    "dtd": (datasets.DTD, {"split": "train"}, {"split": "test"}),
    "eurosat": (datasets.EuroSAT, {}, None),
}
DATASETS = ("digits", "imagefolder", *_TORCHVISION)
EVAL_SPLITS = ("held-out", "validation")
HELD_OUT_FRACTION = 0.2  # of sets that come in one part, and of the training split for eval_split="validation"
SPLIT_SEED = 0  # fixed: every run, whatever its seed, holds out the same images


class LabelledImages(Dataset):
    """(PIL RGB image, int label) pairs; `labels` holds all labels without reading an image.

    Args:
        source: has (image, label) at each index.
        labels: the label of each.
        indices: those of the source that are meant, in order; None: all.
    """

    def __init__(self, source: Sequence[tuple[Any, int]], labels: Sequence[int], indices: Sequence[int] | None = None):
        self.source = source
        self.indices = np.arange(len(labels)) if indices is None else np.asarray(indices)
        self.labels = [int(labels[i]) for i in self.indices]
        self.times_split = 0  # how often `validation_part` or the like has made this set smaller

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        image, _ = self.source[int(self.indices[i])]
        return to_rgb(image), self.labels[i]

    def subset(self, positions: Sequence[int]) -> "LabelledImages":
        """The images at these positions, in this order."""
        images = LabelledImages(self.source, [])
        images.indices = self.indices[positions]
        images.labels = [self.labels[i] for i in positions]
        images.times_split = self.times_split
        return images

    def at_most(self, count: int) -> "LabelledImages":
        """All of the images, or so many drawn at random, always the same ones."""
        if len(self) <= count:
            return self
        return self.subset(torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:count].numpy())

    def name(self, i: int) -> str:
        """What to call an image in a message: its file, if it is one."""
        position = self.indices[i]
        return self.source.path(position) if isinstance(self.source, ImageFiles) else f"image {position}"

    def keys(self) -> Iterator[str]:
        """What tells each image from the others wherever the set lies: a path within its folder, or an index."""
        return map(self.source.names.__getitem__ if isinstance(self.source, ImageFiles) else str, self.indices)

    @functools.cached_property
    def digest(self) -> str:
        """Equal for sets of the same files with the same labels in the same order."""
        hashed = hashlib.sha256()
        for label, key in zip(self.labels, self.keys(), strict=True):
            hashed.update(os.fsencode(f"{label} {key}\n"))
        return hashed.hexdigest()


class Splits(NamedTuple):
    train: LabelledImages
    val: LabelledImages
    class_names: list[str]

    def digest(self) -> str:
        """Equal for splits of the same files with the same labels into the same parts."""
        return hashlib.sha256(f"{self.train.digest} {self.val.digest}".encode()).hexdigest()


def load_splits(
    dataset: str = "digits",
    data_dir: str | Path | None = None,
    eval_split: str = "held-out",
    labels_per_class: int | None = None,
    seed: int = 0,
) -> Splits:
    """The training and evaluation images of a data set, without any transform.

    Args:
        dataset: one of DATASETS.
        data_dir: folder of `imagefolder`; where torchvision's sets are kept (default `data`).
        eval_split: what `val` is: 'held-out', or 'validation', the `validation_part` of the training split, for
            choosing hyperparameters without a look at the held-out images.
        labels_per_class: keep only so many random training images of each class.
        seed: draws those; the splits themselves never depend on it.

    Raises:
        InputError: a missing, empty or unreadable folder, fewer than two classes, or too few images.
    """
    if dataset == "digits":
        splits = _digits(data_dir)
    elif dataset == "imagefolder":
        splits = _image_folder(data_dir)
    elif dataset in _TORCHVISION:
        splits = _torchvision(dataset, Path(data_dir or "data"))
    else:
        raise InputError(f"dataset {dataset!r} is none of {', '.join(DATASETS)}")
    train, val, class_names = splits
    if eval_split == "validation":
        train, val = validation_part(train)
    if labels_per_class is not None:
        train = train.subset(_some_of_each(train.labels, labels_per_class, class_names, seed))
    return Splits(train, val, class_names)


# ----------------------------------------------------------------------------------------------------------------------
# Sources


def _digits(data_dir: str | Path | None) -> Splits:
    """1,797 handwritten digits of 8x8 pixels and 17 grey levels (UCI optdigits test set) that scikit-learn contains."""
    if data_dir is not None:
        raise InputError(f"the digits need no --data-dir; for the images in {data_dir} use --dataset imagefolder")
    from sklearn.datasets import load_digits  # here, because it takes a second to import

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = [(Image.fromarray(image), int(label)) for image, label in zip(pixels, digits.target, strict=True)]
    train, held_out = validation_part(LabelledImages(images, digits.target))
    return Splits(train, held_out, [str(name) for name in digits.target_names])


def _image_folder(data_dir: str | Path | None) -> Splits:
    """`train/` and `val/` with a folder per class each, or one set of class folders, split here."""
    if data_dir is None:
        raise InputError("dataset imagefolder needs --data-dir, a folder with train/ and val/ or with class folders")
    root = Path(data_dir)
    if not os.path.isdir(root):  # Path.is_dir raises an error for a name too long for the file system
        what = "a file; give the folder with the images" if os.path.exists(root) else "no such folder"
        raise InputError(f"--data-dir {root}: {what}")
    if not (root / "train").is_dir():
        class_names = class_folders(root)
        train, val = validation_part(_folder_images(root, class_names))
        return Splits(train, val, class_names)
    if not (root / "val").is_dir():
        raise InputError(f"{root} has train/ but no val/; add it, or put the class folders straight into --data-dir")
    class_names = class_folders(root / "train")
    unknown = set(class_folders(root / "val", at_least=1)) - set(class_names)
    if unknown:
        raise InputError(f"{root / 'val'} has classes that {root / 'train'} lacks: {', '.join(sorted(unknown))}")
    return Splits(
        _folder_images(root / "train", class_names), _folder_images(root / "val", class_names, every=False), class_names
    )


def _folder_images(folder: Path, class_names: list[str], every: bool = True) -> LabelledImages:
    files = labelled_files(folder, class_names, every)
    return LabelledImages(files, files.labels)


def _torchvision(name: str, root: Path) -> Splits:
    make, train_part, held_out_part = _TORCHVISION[name]
    source = _present_or_downloaded(name, make, root, train_part)
    class_names = [str(c) for c in getattr(source, "classes", range(1 + max(_labels_of(source))))]
    train = LabelledImages(source, _labels_of(source))
    if held_out_part is None:
        return Splits(*validation_part(train), class_names)
    held_out = _present_or_downloaded(name, make, root, held_out_part)
    return Splits(train, LabelledImages(held_out, _labels_of(held_out)), class_names)


@distributed.main_first()
def _present_or_downloaded(name: str, make: Callable[..., Dataset], root: Path, part: dict[str, Any]) -> Dataset:
    try:
        return make(str(root), **part)
    except RuntimeError:  # torchvision's way to say that it is not there
        print(f"{name} is not in {root}: downloading it")
    try:
        return make(str(root), **part, download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{name} is not in {root} and could not be downloaded: {error}") from None


def _labels_of(source: Dataset) -> list[int]:
    """torchvision's sets keep their labels under one of three names."""
    labels = next(getattr(source, name) for name in ("targets", "labels", "_labels") if hasattr(source, name))
    return [int(label) for label in labels]


# ----------------------------------------------------------------------------------------------------------------------
# Splits


def validation_part(images: LabelledImages, share: float = HELD_OUT_FRACTION) -> tuple[LabelledImages, LabelledImages]:
    """Split a part off: (rest, part). `part` has about this share of each class, always the same images.

    Of files, the paths within their folder decide, so that an added file changes the place of no other. (The exception
    is a class of a few images that all fall to one side: one of them goes to the other side until an added one does.)

    Raises:
        InputError: every class has only one image, which stays in `rest`.
    """
    if isinstance(images.source, ImageFiles):
        rest, part = _split_by_hash(images.keys(), images.labels, share, images.times_split)
    else:
        rest, part = _split_at_random(images.labels, share)
    if not len(part):
        raise InputError("too few images to hold some out: every class has only one")
    parts = images.subset(rest), images.subset(part)
    for one in parts:
        one.times_split += 1
    return parts


def _split_by_hash(
    keys: Iterable[str], labels: Sequence[int], share: float, turn: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions (rest, part). Each image draws a number in [0, 1) from its key and goes to `part` if it is below share.

    What an earlier turn left has no small numbers any more, so each turn draws anew.
    """
    labels = np.asarray(labels)
    drawn = np.array([_uniform(f"{turn} {key}") for key in keys])
    in_part = drawn < share
    order = np.lexsort((drawn, labels))  # by class, and in each by the number drawn
    last = np.append(np.flatnonzero(np.diff(labels[order])), len(order) - 1)
    first = np.append(0, last[:-1] + 1)
    in_part[order[first]] = True  # at least one of each class,
    in_part[order[last]] = False  # never all of it, and not the only one
    return np.flatnonzero(~in_part), np.flatnonzero(in_part)


def _uniform(key: str) -> float:
    return int.from_bytes(hashlib.blake2b(os.fsencode(key), digest_size=8).digest(), "big") / 2**64


def _split_at_random(labels: Sequence[int], share: float) -> tuple[list[int], list[int]]:
    """Positions (rest, part) of a set that never changes: `part` has this share of each class to the nearest image.

    It has at least one image of each class and never all of it; a class of a single image stays in `rest`.
    """
    rng, labels = np.random.RandomState(SPLIT_SEED), np.asarray(labels)
    rest, part = [], []
    for label in np.unique(labels):
        positions = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(share * len(positions))), len(positions) - 1)
        part += positions[:count].tolist()
        rest += positions[count:].tolist()
    return sorted(rest), sorted(part)


def _some_of_each(labels: Sequence[int], count: int, class_names: list[str], seed: int) -> list[int]:
    rng, labels = np.random.RandomState(seed), np.asarray(labels)
    chosen = []
    for label, name in enumerate(class_names):
        positions = rng.permutation(np.flatnonzero(labels == label))
        if len(positions) < count:
            raise InputError(f"--labels-per-class {count}: class {name} has only {len(positions)} training images")
        chosen += positions[:count].tolist()
    return sorted(chosen)


# ----------------------------------------------------------------------------------------------------------------------
# Images and transforms


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image, upright and as RGB: rotated as its EXIF data say, over white, 16-bit and float levels scaled to 8.

    What `Image.open` returns is decoded first; an InputError names a file that cannot be.
    """
    name = getattr(image, "filename", "") or "an image"
    try:
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file fails in a hundred places of Pillow
        raise unreadable(name, error) from None
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):  # convert() would clip these at 255
        image = _to_8_bits(image, name)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


_warned_of_12_bits = False


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey levels of 16 bits, or floats up to 1 or 255, as grey levels of 8 bits."""
    levels = np.asarray(image).astype(np.float32)
    wide = image.mode.startswith("I;16") or levels.max() > 255
    if wide and levels.max() < 2**12:
        _warn_of_12_bits(name)
    scale = 1 / 257 if wide else 255 if image.mode == "F" and levels.max() <= 1 else 1
    return Image.fromarray(np.clip(levels * scale, 0, 255).round().astype(np.uint8))


def _warn_of_12_bits(name: str) -> None:
    """Once per run: of the loading processes the first one speaks."""
    global _warned_of_12_bits
    worker = get_worker_info()
    if not _warned_of_12_bits and (worker is None or worker.id == 0):
        warnings.warn(
            f"{name}: no level of this 16-bit image is above 4095, so it will be nearly black; if its levels have "
            "12 bits, multiply them by 16 in all such files",
            stacklevel=2,
        )
    _warned_of_12_bits = True


class Transformed(Dataset):
    """(transform(image), label) of a data set of (image, label).

    An index may come with a seed, as (i, seed): what the transform draws from PyTorch then depends on that alone, and
    nobody else's draws depend on the transform's.
    """

    def __init__(self, dataset: Dataset, transform: Callable[[Image.Image], Any]):
        self.dataset = dataset
        self.transform = transform
        self.being_read: torch.Tensor | None = None  # by each worker, in memory that the processes share; -1: nothing

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Any, int]:
        i, seed = index if isinstance(index, tuple) else (index, None)
        with self._noted(i):
            image, label = self.dataset[i]
            if seed is None:
                return self.transform(image), label
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds GPUs as well
                return self.transform(image), label

    @contextlib.contextmanager
    def _noted(self, i: int) -> Iterator[None]:
        """A worker that is killed leaves behind what it was reading."""
        worker = get_worker_info()
        if worker is None or self.being_read is None:
            yield
            return
        self.being_read[worker.id] = i
        yield
        self.being_read[worker.id] = -1

    def names_being_read(self) -> list[str]:
        """The images that workers are reading now, or were when they were killed."""
        reading = [] if self.being_read is None else [i for i in self.being_read.tolist() if i >= 0]
        return [self.dataset.name(i) if isinstance(self.dataset, LabelledImages) else f"image {i}" for i in reading]


def _tensor() -> list[Callable]:
    return [T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]


def eval_transform(image_size: int) -> T.Compose:
    """Any PIL image -> (3, image_size, image_size): its central 224/256, small sizes whole.

    It takes what `Image.open` returns: `to_rgb` is its first step.
    """
    if image_size <= 64:
        return T.Compose([to_rgb, T.Resize((image_size, image_size)), *_tensor()])
    return T.Compose([to_rgb, T.Resize(round(image_size * 256 / 224)), T.CenterCrop(image_size), *_tensor()])


AUGMENTATIONS = ("crop", "affine", "none")


def train_transform(image_size: int, augmentation: str = "crop") -> T.Compose:
    """PIL image -> (3, image_size, image_size), for fine-tuning.

    Args:
        image_size: pixels along each side.
        augmentation: 'crop' (random resized crop and horizontal flip, for natural images), 'affine' (a little
            rotation, shift and scale, for digits and documents, which no flip leaves what they are) or 'none'.
    """
    if augmentation == "crop":
        return T.Compose([T.RandomResizedCrop(image_size), T.RandomHorizontalFlip(), *_tensor()])
    if augmentation == "affine":
        return T.Compose([T.Resize((image_size, image_size)), _affine(10, 0.08, (0.9, 1.1)), *_tensor()])
    return eval_transform(image_size)


def _affine(rotation: float, shift: float, scale: tuple[float, float]) -> T.RandomAffine:
    return T.RandomAffine(rotation, (shift, shift), scale, interpolation=InterpolationMode.BILINEAR)


TWO_CROPS = ("moco_v1", "moco_v2", "moco_v3", "digits")


class TwoCrops:
    """Two random views of one image: PIL image -> two tensors (3, S, S)."""

    def __init__(self, first: Callable, second: Callable):
        self.first = first
        self.second = second

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first(image), self.second(image)


def two_crops(
    image_size: int,
    augmentation: str,
    crop_min: float = 0.2,
    rotation: float = 15.0,
    scale: float = 0.2,
    shift: float = 0.15,
    noise: float = 0.05,
) -> TwoCrops:
    """The views that MoCo contrasts.

    Args:
        image_size: pixels along each side.
        augmentation: 'moco_v1' (1911.05722, section 3.3), 'moco_v2' (2003.04297: blur added), 'moco_v3' (2104.02057:
            blur and solarisation differ between the two views), or 'digits' (affine and noise: no flip, no colour).
        crop_min: smallest share of the image's area in a crop, for the first three.
        rotation, scale, shift, noise: for 'digits': at most so many degrees, so much larger or smaller than 1, so much
            of the side, and the standard deviation of the noise in units of the pixel range.
    """
    if augmentation == "digits":
        view = T.Compose(
            [
                T.Resize((image_size, image_size)),
                _affine(rotation, shift, (1 - scale, 1 + scale)),
                T.ToTensor(),
                GaussianNoise(noise),
                T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )
        return TwoCrops(view, view)
    crop, flip = T.RandomResizedCrop(image_size, scale=(crop_min, 1.0)), T.RandomHorizontalFlip()
    grey = T.RandomGrayscale(p=0.2)
    if augmentation == "moco_v1":
        view = T.Compose([crop, grey, T.ColorJitter(0.4, 0.4, 0.4, 0.4), flip, *_tensor()])
        return TwoCrops(view, view)
    # SimCLR's blur (2002.05709, appendix A): a kernel of a tenth of the image, here the next odd number of pixels.
    blur = T.GaussianBlur(max(3, image_size // 10 | 1), sigma=(0.1, 2.0))
    if augmentation == "moco_v2":
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
        view = T.Compose([crop, jitter, grey, T.RandomApply([blur], p=0.5), flip, *_tensor()])
        return TwoCrops(view, view)
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    first = T.Compose([crop, jitter, grey, blur, flip, *_tensor()])
    solarize = T.RandomSolarize(threshold=128, p=0.2)
    second = T.Compose([crop, jitter, grey, T.RandomApply([blur], p=0.1), solarize, flip, *_tensor()])
    return TwoCrops(first, second)


class GaussianNoise:
    """Add noise of standard deviation `std` to a (C, H, W) tensor, the same to every channel: grey stays grey."""

    def __init__(self, std: float):
        self.std = std

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image + self.std * torch.randn_like(image[:1])


# ----------------------------------------------------------------------------------------------------------------------
# Loaders


class Batches(Sampler):
    """This process's share of the positions of each batch, in an order that depends on (seed, epoch) alone.

    In shuffled order, which is for training, positions come with a seed each, as `Transformed` takes them, that depends
    on (seed, epoch, position): neither the number of workers or processes nor where a run was interrupted changes what
    an epoch consists of. Every pass is the next epoch. Set `epoch` and `start` to choose: `start` batches are left out.

    A share is every W-th position of a batch. Where W processes do not all get one, a process without has no such batch
    in fixed order, and in shuffled order the batch's first image as a stand-in (`has_share` tells).
    """

    def __init__(self, count: int, batch_size: int, shuffle: bool = False, seed: int = 0, drop_last: bool = False):
        self.count, self.batch_size, self.shuffle, self.seed = count, batch_size, shuffle, seed
        self.epoch = self.start = 0
        self.number = count // batch_size if drop_last else -(-count // batch_size)

    def __len__(self) -> int:
        return self.number

    def has_share(self, number: int) -> bool:
        """Does this process get a share of this batch (0 is the first)?"""
        return min(self.batch_size, self.count - number * self.batch_size) > distributed.rank()

    def __iter__(self) -> Iterator[list[int] | list[tuple[int, int]]]:
        epoch, start = self.epoch, self.start
        self.epoch, self.start = epoch + 1, 0
        order = torch.arange(self.count)
        if self.shuffle:
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(_derive_seed(self.seed, epoch)))
        for number in range(start, self.number):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size].tolist()
            share = batch[distributed.rank() :: distributed.world_size()]
            if self.shuffle:
                yield [(i, _derive_seed(self.seed, epoch, i)) for i in share or batch[:1]]
            elif share:
                yield share


def _derive_seed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def build_loader(
    dataset: Transformed,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
    device: torch.device | None = None,
    keep_workers: bool = True,
) -> DataLoader:
    """A DataLoader over `Batches`, which is its `batch_sampler`: what it yields depends on `seed` and the epoch alone.

    Args:
        batch_size: images at a time, of all processes together. In fixed order it is rounded up to a multiple of their
            number, so that shares of batches are shares of the whole (`distributed.interleave` puts them in order).
        shuffle: a new order each epoch, and augmentations that can be repeated.
        device: what the batches are for.
        keep_workers: they wait for the next pass, instead of ending with each. They take seconds to start where
            processes do not fork (macOS, Windows).
    """
    if not shuffle:
        batch_size = -(-batch_size // distributed.world_size()) * distributed.world_size()
    if workers > 0:
        dataset.being_read = torch.full((workers,), -1).share_memory_()
    return DataLoader(
        dataset,
        batch_sampler=Batches(len(dataset), batch_size, shuffle, seed, drop_last),
        num_workers=workers,
        persistent_workers=keep_workers and workers > 0,
        pin_memory=device is not None and device.type == "cuda",
        worker_init_fn=_leave_stopping_to_the_main_process,
        generator=torch.Generator(),  # an iterator draws a number nobody needs: not from the global generator
    )


def _leave_stopping_to_the_main_process(worker: int) -> None:
    # A terminal sends Ctrl-C, and some schedulers SIGTERM, to every process. The main process then finishes its step,
    # in which the sudden end of a worker would be an error; so a worker ends on its main process's SIGTERM alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_told_by, args=(multiprocessing.parent_process().pid,), daemon=True).start()


def _end_when_told_by(process: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != process:
        pass
    os._exit(0)
