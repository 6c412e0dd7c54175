"""DICOM files of radiology: X-rays, CT, MR. pydicom, which reads them, is optional."""

import contextlib
import io
import itertools
import os
import zlib
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from toolkit import optional_package
from toolkit.images import remote

SUFFIXES = (".dcm", ".dicom")
_MARK = slice(128, 132)
_INSTALL = "pydicom pylibjpeg[all]"


def is_dicom(path: str | os.PathLike, content: bytes = b"") -> bool:
    """Is this a DICOM file, by its suffix, or by the mark in its content?"""
    return str(path).lower().endswith(SUFFIXES) or content[_MARK] == b"DICM"


def is_bare_dicom(path: str | os.PathLike) -> bool:
    """Has a file no suffix (IM0001, 1.2.840.11), but DICOM's mark? Only such files are opened."""
    name = os.path.basename(path)
    # The one of this name lists the files of a disc.
    if os.path.splitext(name)[1].strip(".0123456789") or name.upper() == "DICOMDIR":
        return False
    if remote.is_file(path):  # opening a pipe would wait for ever
        with contextlib.suppress(OSError), remote.opened(path, at_once=_MARK.stop) as file:
            return is_dicom(name, file.read(_MARK.stop))
    return False


def picture(content: bytes, path: str | os.PathLike) -> Image.Image:
    """A file's first image in grey or RGB, of 8 bits: through the window that it names, or in the range of its bits."""
    levels, greys = _read(content)
    if levels.ndim == 2:
        levels = (255 * greys).round()
    image = Image.fromarray(levels.astype(np.uint8))
    image.filename = os.fspath(path)  # what messages call it
    return image


def levels(content: bytes) -> np.ndarray:
    """The numbers of a file's first image in their own unit, (H, W), or RGB, (H, W, 3): Hounsfield units of a CT."""
    return _read(content)[0]


def _read(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The numbers, and their greys from 0 to 1, both with high numbers bright. Raises pydicom's errors."""
    pydicom = optional_package("pydicom", "a DICOM file", _INSTALL)
    pixels = optional_package("pydicom.pixels", "a DICOM file", _INSTALL)  # from its release 3 on
    _check_inflated(content, pydicom.filereader)
    dataset = pydicom.dcmread(io.BytesIO(content))
    shared = dataset.get("SharedFunctionalGroupsSequence", ())
    own = dataset.get("PerFrameFunctionalGroupsSequence", ())[:1]
    for group, name in itertools.product([*shared, *own], ("PixelValueTransformationSequence", "FrameVOILUTSequence")):
        for values in group.get(name, ()):  # of CT and MR in many frames
            dataset.update(values)
    samples = dataset.Rows * dataset.Columns * dataset.SamplesPerPixel
    remote.check_size(samples * dataset.BitsAllocated // 8, len(content))
    array = pixels.pixel_array(dataset, index=0)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        array = pixels.apply_color_lut(array, dataset)
    if array.ndim == 3:
        array = array // 257 if array.dtype == np.uint16 else array
        return array, array
    rescaled = pixels.apply_rescale(array, dataset)
    numbers = rescaled.astype(np.float64)
    dark, bright = _ends(dataset, pixels)  # and not those of this image: the same tissue is to be the same grey
    low, high = sorted((dark, bright))  # which a negative slope exchanges
    greys = (numbers - low) / (high - low)
    with contextlib.suppress(ValueError):  # a window without width, or of an unknown kind, is none
        windowed = pixels.apply_voi_lut(rescaled, dataset)
        if windowed.dtype.kind == "u" and "VOILUTSequence" in dataset:  # it was looked up in a table
            dark, bright = 0, 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
        if windowed is not rescaled:
            greys = (windowed - dark) / (bright - dark)
    if dataset.PhotometricInterpretation == "MONOCHROME1":  # high numbers are dark
        numbers, greys = low + high - numbers, 1 - greys
    return numbers, greys.clip(0, 1)


def _check_inflated(content: bytes, reader: ModuleType) -> None:
    """Raise ValueError for a deflated file of more than an image can have: pydicom would inflate it to any size."""
    file = io.BytesIO(content)
    reader.read_preamble(file, force=False)
    meta = reader.read_dataset(file, False, True, stop_when=lambda tag, *_: tag.group != 2)  # the first group alone
    if meta.get("TransferSyntaxUID") == "1.2.840.10008.1.2.1.99":
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        inflater.decompress(file.read(), max(remote.LARGE_IMAGE, remote.MOST_COMPRESSED_IF_LARGE * len(content)))
        if inflater.unconsumed_tail:
            raise ValueError("it is compressed by more than an image can be")


def _ends(dataset: Any, pixels: ModuleType) -> tuple[float, float]:
    """What the smallest and the largest number mean that the stored bits can hold: in their unit, after the rescale."""
    if "BitsStored" not in dataset:  # numbers with decimals
        return 0.0, 1.0
    if table := dataset.get("ModalityLUTSequence"):
        return 0.0, 2.0 ** table[0].LUTDescriptor[2] - 1
    numbers = np.array([0, 2**dataset.BitsStored - 1])
    if dataset.PixelRepresentation:  # they have a sign
        numbers -= 2 ** (dataset.BitsStored - 1)
    return tuple(pixels.apply_rescale(numbers, dataset).tolist())
