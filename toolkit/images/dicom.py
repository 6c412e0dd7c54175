"""DICOM files of radiology: X-rays, CT, MR. pydicom, which reads them, is optional."""

import contextlib
import io
import itertools
import os

import numpy as np
from PIL import Image

from toolkit import optional_package
from toolkit.images import remote

SUFFIXES = (".dcm", ".dicom")
_MARK = slice(128, 132)
_INSTALL = "pydicom pylibjpeg[all]"
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # the mark of files that pydicom would inflate to any size


def is_dicom(path: str | os.PathLike, content: bytes = b"") -> bool:
    """Is this a DICOM file, by its suffix, or by the mark in its content?"""
    return str(path).lower().endswith(SUFFIXES) or content[_MARK] == b"DICM"


def is_bare_dicom(path: str | os.PathLike) -> bool:
    """Has a file no suffix (IM0001, 1.2.840.11), but DICOM's mark? Only such files are opened."""
    name = os.path.basename(path)
    # The one of this name lists the files of a disc.
    if os.path.splitext(name)[1].strip(".0123456789") or name.upper() == "DICOMDIR":
        return False
    with contextlib.suppress(OSError):  # of what is no file
        return is_dicom(name, remote.read(path, 0, _MARK.stop))
    return False


def picture(content: bytes) -> Image.Image:
    """A file's first image in grey or RGB, of 8 bits: through the window that it names, or in the range of its bits."""
    levels, greys = read(content)
    if levels.ndim == 2:
        levels = (255 * greys).round()
    return Image.fromarray(levels.astype(np.uint8))


def read(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """A file's first image: numbers in their own unit, as Hounsfield's of a CT, and greys from 0 to 1; or RGB for both.

    Both are (H, W), with high numbers bright; RGB is (H, W, 3). Raises pydicom's errors.
    """
    pydicom = optional_package("pydicom", "a DICOM file", _INSTALL)
    pixels = optional_package("pydicom.pixels", "a DICOM file", _INSTALL)  # from its release 3 on
    if _DEFLATED in content:
        raise ValueError("it is compressed as a whole: write it anew without, as dcmconv does")
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
    # What the stored bits can hold, and not the ends of this image: the same tissue is to be the same grey.
    ends = np.array([0, 2**dataset.BitsStored - 1])
    if dataset.PixelRepresentation:  # they have a sign
        ends -= 2 ** (dataset.BitsStored - 1)
    dark, bright = pixels.apply_rescale(ends, dataset).tolist()
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
