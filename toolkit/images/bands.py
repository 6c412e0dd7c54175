"""Images other than RGB photographs: which bands are read from their files, and what their numbers mean.

Such an image is a float32 array (H, W, bands) of its file's numbers; networks see ``(numbers / scale - mean) / std``.
"""

import importlib
import io
import logging
import lzma
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision  # its decoders are looked up where they are used: 0.29 says that they will go
from PIL import Image, ImageOps

from toolkit import InputError, listed, optional_package, printable
from toolkit.images import dicom, remote
from toolkit.images.families import FAMILIES, Scaling
from toolkit.models import backbones, names

ARRAY_SUFFIXES = (".npy", ".npz")
ZEROS = "0"  # in --bands: a band of zeros, for one that the network was trained with and the files lack
_NOT_A_NUMBER = 0.0  # replaces NaN and infinity, with which files mark pixels without data
_LARGEST = 1e38  # of numbers; ArcGIS marks pixels without data by -3.4e38
# Pillow goes by a file's content, and would start Ghostscript for an EPS that is called .jpg.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000")


class WrongBands(ValueError):
    """A file that can be read, but has other bands than the network takes."""


class Bands(NamedTuple):
    """Which bands are read from each image file, and how."""

    channels: int  # how many the network takes
    # The numbers of a file's bands, from 1, that become the channels, in order, or ZEROS. Empty: all as they are.
    chosen: tuple[str, ...] = ()
    scale: float = 1.0  # by which all values are divided

    def array(self, image: np.ndarray | Image.Image | str | os.PathLike) -> np.ndarray:
        """An image as (H, W, channels): a file's chosen bands, or an array with as many. Raises as `decoded`."""
        if isinstance(image, str | os.PathLike):
            return self.picked(decoded(remote.read(image)))
        if isinstance(image, Image.Image):
            image = _pixels(image)
        return self._checked(floats(np.asarray(image)))

    def picked(self, array: np.ndarray) -> np.ndarray:
        """The chosen ones of an image's bands, (H, W, bands)."""
        if self.chosen:
            count = array.shape[2]
            if missing := [band for band in self.chosen if not band.isdecimal() or int(band) > count]:
                raise WrongBands(f"it has no band {listed(missing)}, but 1 to {count}")
            with_zeros = np.pad(array, ((0, 0), (0, 0), (1, 0)))  # band 0 is ZEROS
            array = with_zeros[..., list(map(int, self.chosen))]
        return self._checked(array)

    def _checked(self, array: np.ndarray) -> np.ndarray:
        count = array.shape[2]
        if count != self.channels:
            takes = f"and the network takes {self.channels} (training chooses by --bands"
            if count == 1:
                raise WrongBands(f"it has 1 band, {takes} {','.join(['1'] * self.channels)})")
            raise WrongBands(f"it has {count} bands, {takes})")
        return array

    def picture(self, image: torch.Tensor) -> np.ndarray:
        """A picture of an image (C, H, W): its likely colours as (H, W, 3) from 0 to 1, 2% clipped at each end."""
        likely = [0, 1, 2][: max(1, self.channels // 3 * 3)]
        if self.channels >= 11 and not self.chosen:  # all bands of Sentinel-2, or of Landsat 8
            likely = [3, 2, 1]
        levels = image[likely].numpy()
        low, high = np.percentile(levels, (2, 98), axis=(1, 2), keepdims=True)
        levels = np.clip((levels - low) / np.maximum(high - low, 1e-12), 0, 1)
        return np.broadcast_to(levels, (3, *levels.shape[1:])).transpose(1, 2, 0)


# ---------------------------------------------------------------------------------------------------------------- files

_SAMPLES_OF_PNG = {0: 1, 2: 3, 4: 2}  # of a pixel, by the kind of colours; else 4
MOST_PAGES = 1024
TIFF_BEGINS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def open_image(path: str | os.PathLike) -> Image.Image:
    """Open an image with Pillow, without decoding it unless it is DICOM. Raises OSError, or InputError if remote."""
    if remote.is_remote(path) or dicom.is_dicom(path) or dicom.is_bare_dicom(path):
        return picture_of(remote.read(path), path)
    remote.check_is_file(path)
    return Image.open(path, formats=FORMATS)


def picture_of(content: bytes, path: str | os.PathLike) -> Image.Image:
    """What `open_image` returns, of a file's content. `path` is what messages call it."""
    if dicom.is_dicom(path, content):
        image = dicom.picture(content)
    else:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    image.filename = os.fspath(path)
    return image


def import_tifffile() -> ModuleType:
    """The package tifffile, which writes no line for a damaged tag, and inflates no strip beyond its size."""
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
    tifffile = optional_package("tifffile", "a TIFF file", "tifffile imagecodecs")
    # What takes the place of imagecodecs, where that is missing, knows no end.
    codecs = importlib.import_module("tifffile._imagecodecs")
    codecs.zlib_decode = lambda strip, out: zlib.decompressobj().decompress(strip, out)
    codecs.lzma_decode = lambda strip, out: lzma.LZMADecompressor().decompress(strip, out)
    for codec in (codecs.zlib_decode, codecs.lzma_decode):
        codec.__module__ = codecs.__name__  # tifffile of November 2026 refuses functions of other modules
    return tifffile


def decoded(content: bytes) -> np.ndarray:
    """The content of an image file as (H, W, bands), float32. Raises ValueError or a library's own error."""
    nodata = _NOT_A_NUMBER
    if content.startswith((b"PK", b"\x93NUMPY")):
        array = _bands_last(array_of(content))
    elif content[:4] in TIFF_BEGINS:
        array, nodata = levels_of_tiff(content)
    elif content[128:132] == b"DICM":
        array, _ = dicom.read(content)
    elif content.startswith(b"\x89PNG") and content[24:25] == b"\x10":  # 16 bits, which Pillow cuts to 8 for RGB
        width, height, _, colours = struct.unpack(">IIBB", content[16:26])
        remote.check_size(2 * width * height * _SAMPLES_OF_PNG.get(colours, 4), len(content))
        levels = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        array = torchvision.io.decode_png(levels, torchvision.io.ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    else:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            remote.check_size(math.prod(image.size) * len(image.getbands()), len(content))
            if image.format == "JPEG2000":  # Pillow shifts numbers of fewer bits, as Sentinel-2's 15
                raise ValueError("it is JPEG 2000, of which the numbers are not read: write a TIFF of it")
            array = _pixels(image)
    return floats(array, nodata)


def _pixels(image: Image.Image) -> np.ndarray:
    """The unchanged levels of a PIL image, upright: (H, W) or (H, W, bands)."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGB", "RGBA", "CMYK", "L", "F") or image.mode.startswith("I"):
        return np.asarray(image)
    return np.asarray(image.convert("L" if image.mode in ("1", "LA") else "RGB"))


def levels_of_tiff(content: bytes) -> tuple[np.ndarray, float]:
    """The numbers of a TIFF as they are, bands last; and GDAL's number for no data, 0 without. Raises as `decoded`."""
    with import_tifffile().TiffFile(io.BytesIO(content), is_ome=False) as file:  # OME's bands may be in other files
        if len(file.pages) > MOST_PAGES:
            raise ValueError(f"it has {len(file.pages)} pages, and at most {MOST_PAGES} are read")
        series = file.series[0]
        remote.check_size(series.nbytes, len(content))
        array = series.asarray()
        axes = series.axes
        nodata = file.pages.first.nodata
    if array.ndim == 3 and axes.count("Y") == axes.count("X") == 1:  # the third axis is samples or pages
        return np.moveaxis(array, axes.index(axes.replace("Y", "").replace("X", "")), -1), nodata
    return _bands_last(array), nodata


def array_of(content: bytes) -> np.ndarray:
    """The array of an .npy file, or the one of an .npz."""
    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            remote.check_size(sum(member.file_size for member in archive.infolist()), len(content))
    try:
        loaded = np.load(io.BytesIO(content), allow_pickle=False)
        if not isinstance(loaded, np.ndarray):
            if len(loaded.files) != 1:
                raise ValueError(f"it has {len(loaded.files)} arrays ({listed(loaded.files)}), and an image is one")
            loaded = loaded[loaded.files[0]]
        return np.asarray(loaded)  # of what is no array these are bytes
    except MemoryError:
        raise ValueError("its header says that it is larger than it can be") from None


def _bands_last(array: np.ndarray) -> np.ndarray:
    """An array with its bands first or last as (H, W, bands): there are fewer bands than rows or columns."""
    return np.moveaxis(array, 0, -1) if array.ndim == 3 and array.shape[0] < array.shape[2] else array


def floats(array: np.ndarray, nodata: float = _NOT_A_NUMBER) -> np.ndarray:
    """An image's numbers as float32, (H, W, bands), 0 for no data. Raises ValueError for other arrays."""
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"it is an array of {array.dtype}, {array.shape}, and not of numbers, (H, W) or (H, W, bands)")
    numbers = array.astype(np.float32).reshape(*array.shape[:2], -1)
    has_data = (array.reshape(numbers.shape) != nodata) & (np.abs(numbers) < _LARGEST)  # which NaN is not
    numbers[~has_data] = _NOT_A_NUMBER
    return numbers


# --------------------------------------------------------------------------------------------------------------- values


def bands_of(scaling: Scaling, channels: int) -> Bands | None:
    """What is read for a network of `channels`; None: RGB photographs. Raises InputError for too many or few values."""
    for name, numbers in (("mean", scaling.mean), ("std", scaling.std)):
        if numbers and len(numbers) not in (1, channels):
            raise InputError(f"--{name}: {len(numbers)} numbers; give one, or one for each of {channels}")
    chosen = tuple(scaling.bands or ())
    if channels == 3 and not chosen and scaling.scale is None:
        return None
    if chosen and len(chosen) != channels:
        raise InputError(f"--bands names {len(chosen)} bands, and the network takes {channels}")
    return Bands(channels, chosen, scaling.scale or 1.0)


CHECKED_IMAGES = 256
DARK = 64  # of 255: photographs without a level above it likely have fewer bits than their files, or reflectances
# Beyond these standard deviations of a channel after normalisation, the scale is taken to be wrong.
SMALLEST_STD = 0.01
LARGEST_STD = 30.0


def measured(images: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The mean, std, smallest and largest value of each channel, (channels,), over images (H, W, channels)."""
    found = []
    for image in images:
        pixels = image.reshape(-1, image.shape[2]).astype(np.float64)
        found.append((len(pixels), pixels.sum(0), (pixels**2).sum(0), pixels.min(0), pixels.max(0)))
    counts, sums, squares, low, high = map(np.array, zip(*found, strict=True))
    mean = sums.sum(0) / counts.sum()
    return mean, np.sqrt(np.maximum(squares.sum(0) / counts.sum() - mean**2, 0)), low.min(0), high.max(0)


def settle(scaling: Scaling, arch: str, channels: int, images: Any) -> dict[str, Any]:
    """Decide how the images of a run are normalised: `mean` and `std` of each channel, and `bands` (None: photographs).

    What `scaling` says takes precedence over the values of the arch. Prints the result. Raises InputError if some
    training `images` have values after normalisation that are far from any that networks are trained on.
    """
    bands = bands_of(scaling, channels)
    known = {"mean": (0.0,), "std": (1.0,)}
    if channels == 3:
        known = backbones.normalization(arch)
    mean = scaling.mean or known["mean"]
    std = scaling.std or known["std"]
    if bands is None:
        few = images.at_most(4)
        with suppress(InputError):  # of a file that cannot be read, which is told when its turn comes
            if max(np.asarray(few[i][0]).max() for i in range(len(few))) < DARK:
                dark = f"images: no level of {len(few)} training images is above {DARK} of 255, as with 12 bits"
                print(f"{dark} or reflectances: say what is white, as --scale 4095 with --bands 1,1,1 (grey) or 1,2,3")
    if bands is not None or scaling.normalise:
        some = images.at_most(CHECKED_IMAGES)
        found = measured(np.asarray(some[i][0]) for i in range(len(some)))
        if len(found[0]) != channels:  # those in files were read as so many
            raise InputError(f"the digits have {len(found[0])} bands, not {channels}: name your images by --data-dir")
    source = ""
    if scaling.normalise:
        source = f", measured on {len(some)} training images"
        scale = 255.0 if bands is None else bands.scale
        level, deviation, *_ = found
        varies = deviation > 1e-6 * np.maximum(1, np.abs(level))
        mean = level / scale
        std = np.where(varies, deviation / scale, 1)
    mean, std = (tuple(np.broadcast_to(np.array(numbers, float), channels).tolist()) for numbers in (mean, std))
    if bands is not None:
        chosen = f" ({','.join(bands.chosen)} of each file)" if bands.chosen else ""
        then = f"then mean {_distinct(mean)}, std {_distinct(std)}{source}"
        print(f"images: {channels} channels{chosen}, divided by {bands.scale:g}; {then}")
        _check_values(found, bands, std)
    return {"mean": mean, "std": std, "bands": bands}


def _distinct(numbers: Sequence[float]) -> str:
    return ", ".join(map("{:.4g}".format, dict.fromkeys(numbers)))


def _check_values(found: Sequence[np.ndarray], bands: Bands, std: Sequence[float]) -> None:
    """Raise InputError if one channel that the network would see varies far too much, or most far too little."""
    mean, deviation, low, high = found
    seen = deviation / (bands.scale * np.asarray(std))
    is_read = np.array(bands.chosen or [""] * bands.channels) != ZEROS
    weak = np.flatnonzero(is_read & (seen < SMALLEST_STD)).tolist()
    strong = np.flatnonzero(is_read & (seen > LARGEST_STD)).tolist()
    if strong or 2 * len(weak) > is_read.sum():
        likely = 10000 if mean.max() < 15000 else 65535  # reflectances in ten thousandths, or 16 bits
        if high.max() <= 255:
            likely = 1 if high.max() <= 2 else 255
        worst = [*strong, *weak][0]
        raise InputError(
            f"channel {worst + 1} has a standard deviation of {seen[worst]:.3g} after normalisation, and networks are "
            f"trained on about 1: in the files its numbers go from {low[worst]:.4g} to {high[worst]:.4g} "
            f"(mean {mean[worst]:.4g}, std {deviation[worst]:.4g}), and are divided by {bands.scale:g}; "
            f"--scale {likely} is likely, or measure mean and std with --normalise data"
        )
    for i in weak:  # as Sentinel-2's B10, which in SSL4EO-S12 has a standard deviation of 0.0005
        spread = f"{seen[i]:.2g} after normalisation (in the files {deviation[i]:.3g})"
        print(f"channel {i + 1} hardly varies: its std is {spread}; if it should count, use --normalise data")


def recorded(values: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """The metadata about images in an adapter file or an exported one: only mean and std for RGB photographs."""
    bands = values["bands"]
    about = {"mean": list(values["mean"]), "std": list(values["std"])}
    if report.get("channel_fit") is not None:
        about |= {"channels": report["channels"], "channel_fit": report["channel_fit"]}
    if bands is not None:
        about |= {"channels": bands.channels, "bands": list(bands.chosen), "scale": bands.scale}
    return about


def from_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """What `recorded` wrote, as `settle` has it; of an older file its arch's values. Raises InputError if damaged."""
    channels = metadata.get("channels") or 3
    names.check_channels(channels)
    known = backbones.normalization(metadata["arch"])
    mean = metadata.get("mean", list(known["mean"]))
    std = metadata.get("std", list(known["std"]))
    scale = metadata.get("scale", 1.0)
    chosen = metadata.get("bands", [])
    are_names = type(chosen) is list and len(chosen) in (0, channels) and set(map(type, chosen)) <= {str}
    are_all_numbers = are_numbers(mean, channels) and are_numbers(std, channels) and are_numbers([scale], 1)
    if not are_names or not are_all_numbers or min(*std, scale) <= 0:
        raise InputError("the file is damaged: its mean, std, scale or bands are of no image")
    bands = None
    if "scale" in metadata:
        bands = Bands(channels, tuple(chosen), float(scale))
    return {"mean": tuple(mean), "std": tuple(std), "bands": bands}


def are_numbers(values: Any, count: int) -> bool:
    """Is this a list of `count` numbers that float64 can hold?"""
    is_list = type(values) is list and len(values) == count
    return is_list and all(type(value) in (int, float) and abs(value) < 1e300 for value in values)


def known_scaling(given: Scaling, channels: int, metadata: Mapping[str, Any], file: str | Path | None) -> Scaling:
    """The values of the checkpoint's pretraining, which are printed, where the options give none; else `given`.

    `metadata` are the file's, as `recorded` writes them, and its `arch`. InputError if they are damaged, or if
    the family that `given.normalise` names is for other `channels`.
    """
    if given.normalise in FAMILIES:
        expected = FAMILIES[given.normalise].channels
        if channels not in expected:
            takes = f"is for {', '.join(map(str, expected))} channels, and the network takes {channels}"
            raise InputError(f"--normalise {given.normalise} {takes}: give --scale, --mean and --std instead")
        return _of_family(given.normalise, given.bands, "")
    if file is None or any((given.mean, given.std, given.normalise)):
        return given
    if metadata:  # its mean and std hold after any scale that brings files to the same units
        return _as_recorded(given, channels, metadata, file)
    if given.scale is not None:
        return given
    file_name = Path(file).name
    for name, family in FAMILIES.items():
        if family.file and channels in family.channels and re.search(family.file, file_name):
            return _of_family(name, given.bands, f", which the name of {printable(file_name)} says: else give --scale")
    return given


def _of_family(name: str, bands: Sequence[str] | None, reason: str) -> Scaling:
    family = FAMILIES[name]
    # Wrong units are this field's commonest silent error: whatever is taken is printed.
    print(f"images: the scale, mean and std of {name} ({family.source}){reason}")
    return Scaling(family.scale, list(family.mean), list(family.std), bands)


def _as_recorded(given: Scaling, channels: int, metadata: Mapping[str, Any], file: str | Path) -> Scaling:
    try:
        values = from_metadata(dict(metadata))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    bands = values.pop("bands")
    if channels != len(values["mean"]) or (bands is None and values == backbones.normalization(metadata["arch"])):
        return given
    found = given._replace(mean=list(values["mean"]), std=list(values["std"]))
    if bands is not None:
        found = found._replace(scale=given.scale or bands.scale, bands=given.bands or list(bands.chosen) or None)
    taken = "mean, std and bands" if given.scale else "scale, mean, std and bands"
    print(f"images: {taken} as in the pretraining, which {printable(Path(file).name)} says")
    return found
