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
    """A file's first image in grey or RGB, of 8 bits: through the window that it names, its darkest level black."""
    levels, windowed = _read(content)
    if levels.ndim == 2:
        low, high = float(windowed.min()), float(windowed.max())
        levels = (255 * (windowed - low) / max(high - low, 1e-12)).round()
    image = Image.fromarray(levels.astype(np.uint8))
    image.filename = os.fspath(path)  # what messages call it
    return image


def levels(content: bytes) -> np.ndarray:
    """The numbers of a file's first image in their own unit, (H, W), or RGB, (H, W, 3): Hounsfield units of a CT."""
    return _read(content)[0]


def _read(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The numbers, and the same through the file's window, both with high numbers bright. Raises pydicom's errors."""
    pydicom = optional_package("pydicom", "a DICOM file", _INSTALL)
    pixels = optional_package("pydicom.pixels", "a DICOM file", _INSTALL)  # from its release 3 on
    dataset = pydicom.dcmread(io.BytesIO(content))
    shared = dataset.get("SharedFunctionalGroupsSequence", ())
    own = dataset.get("PerFrameFunctionalGroupsSequence", ())[:1]
    for group, name in itertools.product([*shared, *own], ("PixelValueTransformationSequence", "FrameVOILUTSequence")):
        for values in group.get(name, ()):  # of CT and MR in many frames
            dataset.update(values)
    array = pixels.pixel_array(dataset, index=0)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        array = pixels.apply_color_lut(array, dataset)
    if array.ndim == 3:
        array = array // 257 if array.dtype == np.uint16 else array
        return array, array
    numbers = pixels.apply_rescale(array, dataset).astype(np.float64)
    windowed = numbers
    with contextlib.suppress(ValueError):  # a window without width, or of an unknown kind, is none
        windowed = pixels.apply_voi_lut(pixels.apply_rescale(array, dataset), dataset).astype(np.float64)
    if dataset.PhotometricInterpretation == "MONOCHROME1":  # high numbers are dark
        return numbers.max() + numbers.min() - numbers, -windowed
    return numbers, windowed
