"""Labelled images, their splits, augmentations and loaders, for pretraining and for fine-tuning."""

import contextlib
import functools
import hashlib
import math
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
        image, label = self.undecoded(i)
        return to_rgb(image), label

    def undecoded(self, i: int) -> tuple[Image.Image, int]:
        """The same, as it comes from the source: in any mode, and of files only opened."""
        return self.source[int(self.indices[i])][0], self.labels[i]

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

    def relative_names(self) -> Iterator[str]:
        """What tells each image from the others wherever the set lies: a path within its folder, or an index."""
        return map(self.source.names.__getitem__ if isinstance(self.source, ImageFiles) else str, self.indices)

    @functools.cached_property
    def digest(self) -> str:
        """Equal for sets of the same files with the same labels in the same order."""
        hashed = hashlib.sha256()
        for label, key in zip(self.labels, self.relative_names(), strict=True):
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
        rest, part = _split_by_hash(images.relative_names(), images.labels, share, images.times_split)
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
# Images


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image, upright and as RGB: rotated as its EXIF data say, over white, 16-bit and float levels scaled to 8.

    What `Image.open` returns is decoded first; an InputError names a file that cannot be.
    """
    name = getattr(image, "filename", "") or "an image"
    with _named_if_unreadable(name):
        image.load()
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):  # convert() would clip these at 255
        image = _to_8_bits(image, name)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@contextlib.contextmanager
def _named_if_unreadable(name: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # a damaged file fails in a hundred places of Pillow
        raise unreadable(name, error) from None


def _orientation(image: Image.Image) -> int:
    """1: upright; 5 to 8: lying on a side."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


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


# ----------------------------------------------------------------------------------------------------------------------
# Transforms


class View:
    """Any PIL image -> (3, S, S): a rectangle of it, resized, and what follows.

    A JPEG that is not decoded yet is decoded at 1/2, 1/4 or 1/8 of its size, which takes an eighth of the time for a
    photograph of 12 megapixels, as far as the rectangle still has the pixels that it needs.

    Args:
        place: (width, height) of the upright image -> the rectangle (left, top, right, bottom) and the size
            (width, height) that it gets. Its `margin` is how many times that size to keep, at least, in decoding.
        steps: transforms of the resized image, as torchvision's.
    """

    def __init__(self, place: Callable[[int, int], tuple[tuple, tuple]], *steps: Callable):
        self.place = place
        self.steps = T.Compose(steps)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return render(image, [self])[0]


class TwoCrops:
    """Two random views of one image: PIL image -> two tensors (3, S, S)."""

    def __init__(self, first: View, second: View):
        self.views = first, second

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = render(image, self.views)
        return first, second


def render(image: Image.Image, views: Sequence[View]) -> list[torch.Tensor]:
    """The views of an image, which is decoded once."""
    if image.format not in ("JPEG", "MPO"):  # only these know their size upright, and can be reduced, before decoding
        image = to_rgb(image)
    with _named_if_unreadable(getattr(image, "filename", "")):
        orientation = _orientation(image)
    width, height = image.size[::-1] if orientation >= 5 else image.size
    places = [view.place(width, height) for view in views]
    reduction = min(_reduction(*place, view.place.margin) for place, view in zip(places, views, strict=True))
    while orientation != 1 and (width % reduction or height % reduction):
        reduction //= 2  # the last pixel would stand for fewer than the others, and come first when turned
    if reduction > 1 and image.draft(None, (image.width // reduction, image.height // reduction)) is None:
        reduction = 1  # it is decoded already
    image = to_rgb(image)
    return [view.steps(_resized(image, *place, reduction)) for place, view in zip(places, views, strict=True)]


def _reduction(box: tuple[int, ...], size: tuple[int, int], margin: int) -> int:
    """The strongest of libjpeg's reductions after which a box has `margin` times its size in pixels."""
    left, top, right, bottom = box
    room = min((right - left) / size[0], (bottom - top) / size[1]) / margin
    return max(factor for factor in (1, 2, 4, 8) if factor <= max(1, room))


def _resized(image: Image.Image, box: tuple[int, ...], size: tuple[int, int], reduction: int) -> Image.Image:
    """The box, whose corners are those of the full image, cut out of the reduced one and resized."""
    left, top, right, bottom = (corner / reduction for corner in box)
    whole = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    if whole != (0, 0, *image.size):
        image = image.crop(whole)
    inner = left - whole[0], top - whole[1], right - whole[0], bottom - whole[1]
    return image.resize(size, Image.Resampling.BILINEAR, box=inner)


class RandomCrop:
    """A place for `View`: torchvision's RandomResizedCrop, with the same draws."""

    margin = 1

    def __init__(self, size: int, scale: tuple[float, float] = (0.08, 1.0)):
        self.size, self.scale = size, scale

    def __call__(self, width: int, height: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        shape = torch.empty(3, height, width, device="meta")
        top, left, h, w = T.RandomResizedCrop.get_params(shape, self.scale, (3 / 4, 4 / 3))
        return (left, top, left + w, top + h), (self.size, self.size)


class Whole:
    """A place for `View`: all of the image, `size` pixels wide and high, or along its `shorter` side."""

    margin = 2  # evaluation: the pixels are then, within 1 or 2 levels, those of the image decoded in full

    def __init__(self, size: int | None = None, shorter: int | None = None):
        self.size, self.shorter = size, shorter

    def __call__(self, width: int, height: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        side = min(width, height)
        scaled = (int(self.shorter * width / side), int(self.shorter * height / side)) if self.shorter else None
        return (0, 0, width, height), scaled or (self.size, self.size)


def _tensor() -> list[Callable]:
    return [T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD, inplace=True)]


def eval_transform(image_size: int) -> View:
    """Any PIL image -> (3, image_size, image_size): its central 224/256, small sizes whole.

    It takes what `Image.open` returns, and then gives the same pixels as evaluation.
    """
    if image_size <= 64:
        return View(Whole(image_size), *_tensor())
    return View(Whole(shorter=round(image_size * 256 / 224)), T.CenterCrop(image_size), *_tensor())


AUGMENTATIONS = ("crop", "affine", "none")


def train_transform(image_size: int, augmentation: str = "crop") -> View:
    """Any PIL image -> (3, image_size, image_size), for fine-tuning.

    Args:
        image_size: pixels along each side.
        augmentation: 'crop' (random resized crop and horizontal flip, for natural images), 'affine' (a little
            rotation, shift and scale, for digits and documents, which no flip leaves what they are) or 'none'.
    """
    if augmentation == "crop":
        return View(RandomCrop(image_size), T.RandomHorizontalFlip(), *_tensor())
    if augmentation == "affine":
        return View(Whole(image_size), _affine(10, 0.08, (0.9, 1.1)), *_tensor())
    return eval_transform(image_size)


def _affine(rotation: float, shift: float, scale: tuple[float, float]) -> T.RandomAffine:
    return T.RandomAffine(rotation, (shift, shift), scale, interpolation=InterpolationMode.BILINEAR)


TWO_CROPS = ("moco_v1", "moco_v2", "moco_v3", "digits")


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
        affine = _affine(rotation, shift, (1 - scale, 1 + scale))
        to_tensor, normalize = _tensor()
        view = View(Whole(image_size), affine, to_tensor, GaussianNoise(noise), normalize)
        return TwoCrops(view, view)
    crop, flip = RandomCrop(image_size, (crop_min, 1.0)), T.RandomHorizontalFlip()
    grey = T.RandomGrayscale(p=0.2)
    if augmentation == "moco_v1":
        view = View(crop, grey, T.ColorJitter(0.4, 0.4, 0.4, 0.4), flip, *_tensor())
        return TwoCrops(view, view)
    # SimCLR's blur (2002.05709, appendix A): a kernel of a tenth of the image, here the next odd number of pixels.
    blur = GaussianBlur(max(3, image_size // 10 | 1), sigma=(0.1, 2.0))
    if augmentation == "moco_v2":
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
        view = View(crop, jitter, grey, T.RandomApply([blur], p=0.5), flip, *_tensor())
        return TwoCrops(view, view)
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    first = View(crop, jitter, grey, blur, flip, *_tensor())
    solarize = T.RandomSolarize(threshold=128, p=0.2)
    second = View(crop, jitter, grey, T.RandomApply([blur], p=0.1), solarize, flip, *_tensor())
    return TwoCrops(first, second)


class GaussianBlur(T.GaussianBlur):
    """torchvision's to a level of 256, in a twentieth of the time.

    One pass along each dimension, each weight at once with the one on the other side, none of those beyond four
    standard deviations: they add up to 6e-5.
    """

    def forward(self, image: Image.Image) -> Image.Image:
        sigma = self.get_params(*self.sigma)
        radius = min(self.kernel_size[0] // 2, math.ceil(4 * sigma))
        weights = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(radius + 1)]
        total = 2 * sum(weights) - weights[0]
        x = torch.from_numpy(np.array(image)).float()  # (H, W, 3)
        for dim in (0, 1):
            length = x.shape[dim]
            positions = torch.arange(-radius, length + radius).abs()
            mirrored = torch.minimum(positions, 2 * (length - 1) - positions)  # at the borders, as torchvision does
            padded = x.index_select(dim, mirrored)
            x = padded.narrow(dim, radius, length) * (weights[0] / total)
            for distance in range(1, radius + 1):
                pair = padded.narrow(dim, radius - distance, length) + padded.narrow(dim, radius + distance, length)
                x.add_(pair, alpha=weights[distance] / total)
        return Image.fromarray(x.round_().to(torch.uint8).numpy())


class GaussianNoise:
    """Add noise of standard deviation `std` to a (C, H, W) tensor, the same to every channel: grey stays grey."""

    def __init__(self, std: float):
        self.std = std

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image + self.std * torch.randn_like(image[:1])


# ----------------------------------------------------------------------------------------------------------------------
# Loaders


class Transformed(Dataset):
    """(transform(image), label) of a data set of (image, label).

    An index may come with a seed, as (i, seed): what the transform draws from PyTorch then depends on that alone, and
    nobody else's draws depend on the transform's.
    """

    def __init__(self, dataset: Dataset, transform: Callable[[Image.Image], Any]):
        self.dataset = dataset
        self.transform = transform
        # Views decode files themselves, at the size that they need.
        undecoded = isinstance(dataset, LabelledImages) and isinstance(transform, View | TwoCrops)
        self.read = dataset.undecoded if undecoded else dataset.__getitem__
        self.being_read: torch.Tensor | None = None  # by each worker, in memory that the processes share; -1: nothing

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Any, int]:
        i, seed = index if isinstance(index, tuple) else (index, None)
        with self._noted(i):
            image, label = self.read(i)
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
