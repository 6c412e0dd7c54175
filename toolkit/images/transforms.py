"""From a PIL image to a tensor: decoding, the crops and augmentations of both stages, and evaluation's transform."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from toolkit import InputError
from toolkit.images.bands import Bands
from toolkit.images.folders import unreadable
from toolkit.models.backbones import IMAGENET_MEAN, IMAGENET_STD

# ----------------------------------------------------------------------------------------------------------------------
# Images


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL image to RGB: upright by its EXIF data, over white, 16-bit and float levels scaled to 8 bits.

    What `Image.open` returns is decoded first; an InputError names a file that cannot be decoded.
    """
    with _named_if_unreadable(image):
        image.load()
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):  # convert() would clip these at 255
        image = _to_8_bits(image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The orientation in the EXIF data. 1: upright, also if the data make no sense; 5 to 8: lying on a side."""
    with _named_if_unreadable(image):
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in range(1, 9) else 1


@contextlib.contextmanager
def _named_if_unreadable(image: Image.Image) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # a damaged file fails in a hundred places of Pillow
        raise unreadable(getattr(image, "filename", "") or "an image", error) from None


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey levels of 16 bits, or floats up to 1 or 255, as grey levels of 8 bits; NaN and infinity become black."""
    levels = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0.0, neginf=0.0)
    scale = 1
    if image.mode.startswith("I;16") or levels.max() > 255:
        scale = 1 / 257
    elif image.mode == "F" and levels.max() <= 1:
        scale = 255
    return Image.fromarray(np.clip(levels * scale, 0, 255).round().astype(np.uint8))


# ----------------------------------------------------------------------------------------------------------------------
# Transforms


class View:
    """Any PIL image -> (3, S, S): a rectangle of it, resized, then transformed; without steps a PIL image.

    An array (H, W, C) becomes (C, S, S), with the array's own values.

    A JPEG that is not decoded yet is decoded at 1/2, 1/4 or 1/8 of its size if the rectangle then still has enough
    pixels. This takes a third of the time for a photograph of 12 megapixels.

    Args:
        place: (width, height) of the upright image -> the rectangle (left, top, right, bottom), and the size
            (width, height) to resize it to. Decoding leaves the rectangle at least `place.margin` times that size.
        steps: transforms of the resized image, such as torchvision's.
        bands: the bands of images that are not RGB photographs.
    """

    def __init__(self, place: Callable[[int, int], tuple[tuple, tuple]], *steps: Callable, bands: Bands | None = None):
        self.place = place
        self.steps = T.Compose(steps)
        self.bands = bands

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return render(image, [self])[0]


class TwoCrops:
    """Two random views of one image: PIL image -> two tensors (3, S, S)."""

    def __init__(self, first: View, second: View):
        self.views = first, second

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, ...]:
        return tuple(render(image, self.views))


_REDUCTIONS = (1, 2, 4, 8)  # by these factors libjpeg can shrink an image while it decodes


def render(image: Image.Image, views: Sequence[View]) -> list[torch.Tensor]:
    """Several views of an image, which is decoded once."""
    if views[0].bands is not None:
        image = views[0].bands.array(image)
    if isinstance(image, np.ndarray):
        height, width = image.shape[:2]
        return [view.steps(_resized_bands(image, *view.place(width, height))) for view in views]
    is_jpeg = image.format in ("JPEG", "MPO")  # only these show their upright size, and can be reduced, undecoded
    if not is_jpeg:
        image = to_rgb(image)
    orientation = _orientation(image)  # 1 unless it is a JPEG
    width, height = image.size if orientation < 5 else image.size[::-1]
    places = [view.place(width, height) for view in views]
    reduction = 1
    if is_jpeg:
        reduction = min(_reduction(*place, view.place.margin) for place, view in zip(places, views, strict=True))
        # The pixels at the end become the first ones, so the last block must be as large as the others.
        if orientation != 1:
            reduction = max(n for n in _REDUCTIONS if n <= reduction and width % n == 0 and height % n == 0)
        if image.draft(None, (image.width // reduction, image.height // reduction)) is None:
            reduction = 1  # it is decoded already
        image = to_rgb(image)
    return [view.steps(_resized(image, *place, reduction)) for place, view in zip(places, views, strict=True)]


def _reduction(box: tuple[int, ...], size: tuple[int, int], margin: int) -> int:
    """The strongest of libjpeg's reductions that leaves a box at least `margin` times its final size."""
    left, top, right, bottom = box
    room = min((right - left) / size[0], (bottom - top) / size[1]) / margin
    return max(factor for factor in _REDUCTIONS if factor <= max(1, room))


def _resized(image: Image.Image, box: tuple[int, ...], size: tuple[int, int], reduction: int) -> Image.Image:
    """Cut a box out of a reduced image and resize it. The box's corners are those in the full image."""
    left, top, right, bottom = (corner / reduction for corner in box)
    whole = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    if whole != (0, 0, *image.size):
        image = image.crop(whole)
    inner = left - whole[0], top - whole[1], right - whole[0], bottom - whole[1]
    return image.resize(size, Image.Resampling.BILINEAR, box=inner)


def _resized_bands(image: np.ndarray, box: tuple[int, ...], size: tuple[int, int]) -> torch.Tensor:
    """Cut a box out of an array (H, W, C) and resize it as a photograph, but in floats: (C, height, width)."""
    resized = []
    for band in range(image.shape[2]):
        levels = Image.fromarray(np.ascontiguousarray(image[..., band]))
        resized.append(torch.from_numpy(np.array(_resized(levels, box, size, reduction=1))))
    return torch.stack(resized)


class RandomCrop:
    """A place for `View`: torchvision's RandomResizedCrop, with the same draws."""

    margin = 1

    def __init__(self, size: int, scale: tuple[float, float]):
        self.size = size
        self.scale = scale

    def __call__(self, width: int, height: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        shape = torch.empty(3, height, width, device="meta")
        top, left, h, w = T.RandomResizedCrop.get_params(shape, self.scale, (3 / 4, 4 / 3))
        return (left, top, left + w, top + h), (self.size, self.size)


class ResizeWhole:
    """A place for `View`: the whole image, resized to `size` pixels wide and high, or along its `shorter` side."""

    margin = 2  # with it, reduced decoding changes evaluation's pixels by less than one level of 256 on average

    def __init__(self, size: int | None = None, shorter: int | None = None):
        self.size = size
        self.shorter = shorter

    def __call__(self, width: int, height: int) -> tuple[tuple[float, ...], tuple[int, int]]:
        if self.shorter is None:
            return (0, 0, width, height), (self.size, self.size)
        side = min(width, height)
        return (0, 0, width, height), (int(self.shorter * width / side), int(self.shorter * height / side))


class ShrinkTo:
    """A place for `View`: the whole image, shrunk to at most so many pixels along its shorter side."""

    margin = 1

    def __init__(self, shorter: int):
        self.shorter = shorter

    def __call__(self, width: int, height: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        factor = min(1.0, self.shorter / min(width, height))
        return (0, 0, width, height), (round(factor * width), round(factor * height))


def _tensor(
    mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD, bands: Bands | None = None
) -> list[Callable]:
    return [T.ToTensor() if bands is None else bands.scaled, T.Normalize(mean, std, inplace=True)]


SEEN_WHOLE = 64  # pixels: up to this size an image is not cut to its middle


def eval_transform(
    image_size: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    bands: Bands | None = None,
) -> View:
    """Any PIL image -> (3, image_size, image_size): its central 224/256, or all of it for sizes up to 64.

    Given what `Image.open` returns, it yields the same pixels as evaluation. The channels are normalised by `mean` and
    `std`; see `backbones.normalization`. With `bands` it takes arrays (H, W, channels), paths of files, and PIL
    images, and returns (channels, image_size, image_size).
    """
    tensor = _tensor(mean, std, bands)
    if image_size <= SEEN_WHOLE:
        return View(ResizeWhole(image_size), *tensor, bands=bands)
    return View(ResizeWhole(shorter=round(image_size * 256 / 224)), T.CenterCrop(image_size), *tensor, bands=bands)


# Measured in benchmarks/RESULTS.md: with 0.08, usual for training from scratch, a short fine-tuning on few labels loses
# several points of accuracy.
CROP_MIN = 0.75
AUGMENTATIONS = ("crop", "trivial", "affine", "none")


def train_transform(
    image_size: int,
    augmentation: str = "crop",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    crop_min: float = CROP_MIN,
    bands: Bands | None = None,
) -> View:
    """Any PIL image -> (3, image_size, image_size), for fine-tuning.

    Args:
        image_size: pixels along each side.
        augmentation: 'crop' (random resized crop and horizontal flip, for natural images), 'trivial' (the same and one
            more change of random strength: TrivialAugment, arXiv 2103.10158), 'affine' (a little rotation, shift and
            scale, for digits and documents, which a flip would change into something else) or 'none'.
        mean, std, bands: as for `eval_transform`. 'trivial' is for photographs and refuses bands.
        crop_min: smallest share of the image's area in a crop, for 'crop' and 'trivial'.
    """
    crop = RandomCrop(image_size, (crop_min, 1.0))
    flip = T.RandomHorizontalFlip()
    tensor = _tensor(mean, std, bands)
    if augmentation == "crop":
        return View(crop, flip, *tensor, bands=bands)
    if augmentation == "trivial":
        if bands is not None:
            raise InputError("--augmentation trivial is for RGB photographs; use crop")
        return View(crop, flip, T.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR), *tensor)
    if augmentation == "affine":
        return View(ResizeWhole(image_size), _affine(10, 0.08, (0.9, 1.1)), *tensor, bands=bands)
    return eval_transform(image_size, mean, std, bands)


def _affine(rotation: float, shift: float, scale: tuple[float, float]) -> T.RandomAffine:
    return T.RandomAffine(rotation, (shift, shift), scale, interpolation=InterpolationMode.BILINEAR)


TWO_CROPS = ("moco_v1", "moco_v2", "moco_v3", "digits")


def two_crops(
    image_size: int,
    augmentation: str,
    crop_min: float = 0.2,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    bands: Bands | None = None,
) -> TwoCrops:
    """The views that MoCo contrasts.

    Args:
        image_size: pixels along each side.
        augmentation: 'moco_v1' (1911.05722, section 3.3), 'moco_v2' (2003.04297: blur added), 'moco_v3' (2104.02057:
            blur and solarisation differ between the two views), or 'digits' (a little rotation, shift and scale, and
            noise: no flip, no colour).
        crop_min: smallest share of the image's area in a crop, for the first three.
        mean, std, bands: as for `eval_transform`. With bands, each band's brightness varies instead of colour, grey
            and solarisation.
    """
    levels, normalize = _tensor(mean, std, bands)
    if augmentation == "digits":
        affine = _affine(10, 0.1, (0.88, 1.12))
        noise = GaussianNoise(0.05)
        view = View(ResizeWhole(image_size), affine, levels, noise, normalize, bands=bands)
        return TwoCrops(view, view)
    crop = RandomCrop(image_size, (crop_min, 1.0))
    flip = T.RandomHorizontalFlip()
    blur = _blur(image_size)
    grey = T.RandomGrayscale(p=0.2)
    if bands is not None:
        colour = [T.RandomApply([BandBrightness(0.4)], p=0.8)]
    elif augmentation == "moco_v1":
        colour = [grey, T.ColorJitter(0.4, 0.4, 0.4, 0.4)]
    elif augmentation == "moco_v2":
        colour = [T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), grey]
    else:
        colour = [T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), grey]
    first = second = []
    if augmentation == "moco_v2":
        first = second = [T.RandomApply([blur], p=0.5)]
    elif augmentation == "moco_v3":
        first = [blur]
        second = [T.RandomApply([blur], p=0.1)]
        if bands is None:
            second.append(T.RandomSolarize(threshold=128, p=0.2))
    return TwoCrops(
        View(crop, *colour, *first, flip, levels, normalize, bands=bands),
        View(crop, *colour, *second, flip, levels, normalize, bands=bands),
    )


class BandBrightness:
    """Multiply each band of a (C, H, W) tensor by a number of its own, from 1 - strength to 1 + strength."""

    def __init__(self, strength: float):
        self.strength = strength

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image * (1 + self.strength * (2 * torch.rand(len(image), 1, 1) - 1))


def _blur(image_size: int) -> "GaussianBlur":
    """The blur of SimCLR (2002.05709, appendix A): a kernel of a tenth of the image, made an odd number of pixels."""
    return GaussianBlur(max(3, image_size // 10 | 1), sigma=(0.1, 2.0))


class GaussianBlur(T.GaussianBlur):
    """torchvision's GaussianBlur to within one level of 256, in a twentieth of the time.

    It makes one pass along each dimension, applies each weight to both sides at once, and leaves out the weights beyond
    four standard deviations, which add up to 6e-5.
    """

    def forward(self, image: Image.Image | torch.Tensor) -> Image.Image | torch.Tensor:
        if torch.is_tensor(image):  # (C, H, W)
            return self.blurred(image.permute(1, 2, 0)).permute(2, 0, 1)
        levels = self.blurred(torch.from_numpy(np.array(image)).float())
        return Image.fromarray(levels.round_().to(torch.uint8).numpy())

    def blurred(self, x: torch.Tensor) -> torch.Tensor:
        """An image of floats, (H, W, C), blurred at random."""
        sigma = self.get_params(*self.sigma)
        radius = min(self.kernel_size[0] // 2, math.ceil(4 * sigma))
        weights = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(radius + 1)]
        total = 2 * sum(weights) - weights[0]
        for dim in (0, 1):
            length = x.shape[dim]
            positions = torch.arange(-radius, length + radius).abs()
            mirrored = torch.minimum(positions, 2 * (length - 1) - positions)  # at the borders, as torchvision does
            padded = x.index_select(dim, mirrored)
            x = padded.narrow(dim, radius, length) * (weights[0] / total)
            for distance in range(1, radius + 1):
                pair = padded.narrow(dim, radius - distance, length) + padded.narrow(dim, radius + distance, length)
                x.add_(pair, alpha=weights[distance] / total)
        return x


class GaussianNoise:
    """Add noise of standard deviation `std` to a (C, H, W) tensor, the same in every channel: grey stays grey."""

    def __init__(self, std: float):
        self.std = std

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image + self.std * torch.randn_like(image[:1])
