"""From a PIL image to a tensor: decoding, the crops and augmentations of both stages, and evaluation's transform."""

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFilter, ImageOps
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from toolkit import InputError
from toolkit.images.bands import Bands
from toolkit.images.folders import UnreadableImage, named_faults
from toolkit.models.backbones import IMAGENET_MEAN, IMAGENET_STD


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL image to RGB: upright by its EXIF data, over white, 16-bit levels and floats to 1 as 8 bits.

    Transparency of TIFF and JPEG 2000 is left out: GDAL calls a band of near-infrared so. Raises InputError for a file
    that cannot be decoded, or whose numbers do not say what is white.
    """
    name = _name_of(image)
    has_bands = image.format in ("TIFF", "JPEG2000")
    with named_faults(name):
        image.load()
        tags = getattr(image, "tag_v2", {})  # of a TIFF: 258 are bits, 259 is compression, 284 whether bands lie apart
        if image.mode == "RGB" and 16 in tags.get(258, ()) and (tags.get(259), tags.get(284)) == (1, 2):
            raise ValueError("Pillow misreads 16 bits whose bands lie apart: save it anew, or train with --scale 65535")
        if orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):  # convert() would clip these at 255. NaN and infinity become black
        levels = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0.0, neginf=0.0)
        white = {"F": 1, "I": 255}.get(image.mode, 65535)
        if image.mode == "I" and not has_bands and levels.max() > 255:
            white = 65535
        if levels.min() < 0 or levels.max() > white:
            found = f"its numbers go from {levels.min():.4g} to {levels.max():.4g}"
            raise UnreadableImage(f"{name}: {found}: training is to say what is white, by --scale and --bands 1,1,1")
        image = Image.fromarray((levels * 255 / white).round().astype(np.uint8))
    if not has_bands and (image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def decoded(image: Image.Image, reduction: int) -> Image.Image:
    """An open image in RGB, from memory if it is kept: a JPEG as drafted, at 1 / reduction of its size; 0: no JPEG."""
    kept, i = vars(image).get("kept", (None, 0))  # from `ImageFiles`
    if kept is None:
        return to_rgb(image)
    array = kept.get(i, reduction.bit_length())
    if array is None:
        array = np.asarray(to_rgb(image))
        kept.put(i, reduction.bit_length(), array)
    return Image.fromarray(array)


def _name_of(image: Image.Image | np.ndarray | str | os.PathLike) -> str:
    """What messages call an image."""
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    return getattr(image, "filename", "") or "an image"


def orientation(image: Image.Image) -> int:
    """The orientation in the EXIF data. 1: upright, also if the data make no sense; 5 to 8: lying on a side."""
    with named_faults(_name_of(image)):
        found = image.getexif().get(ExifTags.Base.Orientation)
    return found if found in range(1, 9) else 1


class View:
    """Any PIL image -> (3, S, S): a rectangle of it, by its width and height, resized; then `steps`, if any.

    An array (H, W, C) becomes (C, S, S), with its own values; `bands` are read of files that are no photographs. A JPEG
    is decoded at 1/2, 1/4 or 1/8 of its size if the rectangle then still has enough pixels: in a third of the time.
    """

    def __init__(self, place: Callable[[int, int], "Place"], *steps: Callable, bands: Bands | None = None):
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


def render(image: Image.Image, views: Sequence[View]) -> list[torch.Tensor]:
    """Several views of an image, which is decoded once."""
    if views[0].bands is not None:
        with named_faults(_name_of(image)):
            image = views[0].bands.array(image)
    if isinstance(image, np.ndarray):
        height, width = image.shape[:2]
        return [view.steps(_resized(image, *view.place(width, height)[:2])) for view in views]
    is_jpeg = image.format in ("JPEG", "MPO")  # only these show their upright size, and can be reduced, undecoded
    if not is_jpeg:
        image = decoded(image, 0)
    turned = orientation(image)  # 1 unless it is a JPEG
    width, height = image.size if turned < 5 else image.size[::-1]
    places = [view.place(width, height) for view in views]
    reduction = 1
    if is_jpeg:
        room = 8.0  # the strongest reduction that leaves each box large enough
        for (left, top, right, bottom), size, margin in places:
            room = min(room, (right - left) / size[0] / margin, (bottom - top) / size[1] / margin)
        for factor in (2, 4, 8):  # by which libjpeg can shrink an image while it decodes
            # Of an image that is turned, pixels at the end become the first ones: the last block has to be whole.
            if factor <= room and (turned == 1 or width % factor == height % factor == 0):
                reduction = factor
        if image.draft(None, (image.width // reduction, image.height // reduction)) is None:
            reduction = 1  # it is decoded already
        image = decoded(image, reduction)
    return [view.steps(_resized(image, *place[:2], reduction)) for place, view in zip(places, views, strict=True)]


def _resized(image: Image.Image | np.ndarray, box: tuple, size: tuple, reduction=1) -> Image.Image | torch.Tensor:
    """Cut a box of the full image out of a reduced one and resize it; of an array (H, W, C), (C, height, width)."""
    if isinstance(image, np.ndarray):
        bands = (Image.fromarray(np.ascontiguousarray(image[..., band])) for band in range(image.shape[2]))
        return torch.stack([torch.from_numpy(np.array(_resized(band, box, size))) for band in bands])
    left, top, right, bottom = (np.array(box) / reduction).tolist()
    outer = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    if outer != (0, 0, *image.size):
        image = image.crop(outer)
    inner = left - outer[0], top - outer[1], right - outer[0], bottom - outer[1]
    return image.resize(size, Image.Resampling.BILINEAR, box=inner)


# A rectangle (left, top, right, bottom), the size to resize it to, and how many times as large decoding leaves it.
Place = tuple[tuple[float, ...], tuple[int, int], int]


def random_crop(size: int, scale: tuple[float, float], width: int, height: int) -> Place:
    """torchvision's RandomResizedCrop, with the same draws."""
    shape = torch.empty(3, height, width, device="meta")
    top, left, h, w = T.RandomResizedCrop.get_params(shape, scale, (3 / 4, 4 / 3))
    return (left, top, left + w, top + h), (size, size), 1


def whole(size: int | None, width: int, height: int) -> Place:
    """All of an image, `size` pixels wide and high, or at its own pixels."""
    # With 2, reduced decoding changes evaluation's pixels by less than one level of 256 on average.
    return (0, 0, width, height), (size or width, size or height), 2


def whole_along(shorter: int, width: int, height: int, enlarges: bool = True) -> Place:
    """All of an image, `shorter` pixels along its shorter side; or as it is if that enlarges it and is not to."""
    side = min(width, height)
    if not enlarges:
        shorter = min(shorter, side)
    return (0, 0, width, height), (int(shorter * width / side), int(shorter * height / side)), 2


SEEN_WHOLE = 64  # pixels: up to this size an image is not cut to its middle


def eval_transform(image_size: int | None, mean=IMAGENET_MEAN, std=IMAGENET_STD, bands: Bands | None = None) -> View:
    """Any PIL image -> (3, image_size, image_size): its central 224/256, or all of it for sizes up to 64.

    Without a size it is all of the image at its own pixels. The channels are normalised by `mean` and `std`. With
    `bands` it takes arrays (H, W, channels), paths and PIL images, and returns (channels, image_size, image_size).
    """
    tensor = _tensor(mean, std, bands)
    if image_size is None or image_size <= SEEN_WHOLE:
        return View(partial(whole, image_size), *tensor, bands=bands)
    return View(partial(whole_along, shorter_side(image_size)), T.CenterCrop(image_size), *tensor, bands=bands)


def _tensor(mean=IMAGENET_MEAN, std=IMAGENET_STD, bands: Bands | None = None) -> list[Callable]:
    levels = T.ToTensor() if bands is None else partial(torch.div, other=bands.scale)
    return [levels, T.Normalize(mean, std, inplace=True)]


def shorter_side(image_size: int) -> int:
    """To how many pixels evaluation resizes the shorter side of an image, before it takes the centre."""
    return round(image_size * 256 / 224)


# Measured in benchmarks/RESULTS.md: with 0.08, usual from scratch, a short fine-tuning on few labels loses points.
CROP_MIN = 0.75


def train_transform(image_size: int, augmentation: str = "crop", crop_min=CROP_MIN, **normalization: Any) -> View:
    """Any PIL image -> (3, image_size, image_size), for fine-tuning; `mean`, `std`, `bands` as for `eval_transform`.

    `augmentation`: 'crop' (of at least `crop_min` of the area, resized; horizontal flip), 'trivial' (the same, and
    TrivialAugment, 2103.10158; not for bands), 'affine' (a little rotation, shift, scale: digits, documents), 'none'.
    """
    bands = normalization.get("bands")
    if augmentation == "none":
        return eval_transform(image_size, **normalization)
    place = partial(random_crop, image_size, (crop_min, 1.0))
    changes = [T.RandomHorizontalFlip()]
    if augmentation == "affine":
        place = partial(whole, image_size)
        changes = [T.RandomAffine(10, (0.08, 0.08), (0.9, 1.1), interpolation=InterpolationMode.BILINEAR)]
    elif augmentation == "trivial":
        if bands is not None:
            raise InputError("--augmentation trivial is for RGB photographs; use crop")
        changes.append(T.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR))
    return View(place, *changes, *_tensor(**normalization), bands=bands)


def two_crops(image_size: int, augmentation: str, crop_min: float = 0.2, **normalization: Any) -> TwoCrops:
    """The views that MoCo contrasts; `mean`, `std` and `bands` as for `eval_transform`.

    `augmentation` is 'moco_v2' (2003.04297), 'moco_v3' (2104.02057: blur and solarisation differ between the two
    views), each with crops of at least `crop_min` of the area, or 'digits' (a little rotation, shift and scale, and
    noise: no flip, no colour). With bands, their brightness varies instead of colour and grey.
    """
    bands = normalization.get("bands")
    levels, normalize = _tensor(**normalization)
    if augmentation == "digits":
        affine = T.RandomAffine(10, (0.1, 0.1), (0.88, 1.12), interpolation=InterpolationMode.BILINEAR)
        view = View(partial(whole, image_size), affine, levels, partial(grey_noise, 0.05), normalize, bands=bands)
        return TwoCrops(view, view)
    crop = partial(random_crop, image_size, (crop_min, 1.0))
    if bands is not None:
        colour = [T.RandomApply([partial(band_brightness, 0.4)], p=0.8)]
        # SimCLR's (2002.05709, appendix A): a kernel of a tenth of the image, made an odd number of pixels.
        blur = T.GaussianBlur(max(3, image_size // 10 | 1), sigma=(0.1, 2.0))
    else:
        saturation = {"moco_v2": 0.4, "moco_v3": 0.2}[augmentation]
        colour = [T.RandomApply([T.ColorJitter(0.4, 0.4, saturation, 0.1)], p=0.8), T.RandomGrayscale(p=0.2)]
        blur = blurred
    rest = (T.RandomHorizontalFlip(), levels, normalize)
    if augmentation == "moco_v2":
        first = second = [T.RandomApply([blur], p=0.5)]
    else:
        first = [blur]
        second = [T.RandomApply([blur], p=0.1)]
        if bands is None:
            second.append(T.RandomSolarize(threshold=128, p=0.2))
    return TwoCrops(View(crop, *colour, *first, *rest, bands=bands), View(crop, *colour, *second, *rest, bands=bands))


def band_brightness(strength: float, image: torch.Tensor) -> torch.Tensor:
    """Each band of a (C, H, W) tensor times a number of its own, from 1 - strength to 1 + strength."""
    return image * (1 + strength * (2 * torch.rand(len(image), 1, 1) - 1))


def blurred(image: Image.Image) -> Image.Image:
    """A photograph under MoCo's own blur, which is Pillow's, with a standard deviation from 0.1 to 2 pixels."""
    return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(0.1, 2.0).item()))


def grey_noise(std: float, image: torch.Tensor) -> torch.Tensor:
    """A (C, H, W) tensor with noise, the same in every channel: grey stays grey."""
    return image + std * torch.randn_like(image[:1])
