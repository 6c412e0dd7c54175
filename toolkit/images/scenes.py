"""Images larger than the memory: GeoTIFFs, and others, that are read in rows."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.images import cache, folders, remote, transforms
from toolkit.images.bands import TIFF_BEGINS, Bands, decoded, floats, import_tifffile, open_image

_RGB = 2  # a photometric interpretation of TIFFs
_JPEG = (6, 7)  # compressions
_ORIENTATION = 274  # a tag
_READ_AT_ONCE = 2**20  # bytes of a compressed TIFF


@dataclass
class Scene:
    """An image that lies uncompressed in a file and is read in rows."""

    path: str  # what messages name
    bands: Bands | None  # None: an RGB photograph
    file: Any  # which has the numbers
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int = 0
    bands_axis: int = 2
    nodata: float = 0.0
    like: str | None = None  # the TIFF whose georeference the image has, if any

    def __post_init__(self) -> None:
        self.height, self.width = (side for axis, side in enumerate(self.shape) if axis != self.bands_axis)

    def rows(self, first: int, last: int) -> np.ndarray:
        """What `Bands.array` has in these rows, without the last; or RGB, (rows, W, 3) of uint8. Raises InputError."""
        with folders.named_faults(self.path):
            # Mapped anew for each part, since the pages of a map stay in memory.
            levels = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
            if levels.ndim == 3:
                levels = np.moveaxis(levels, self.bands_axis, 2)
            rows = np.array(levels[first:last])
            if self.bands is None:
                return rows[..., :3]
            return self.bands.picked(floats(rows, self.nodata))


@contextmanager
def open_scene(path: str | os.PathLike, bands: Bands | None) -> Iterator[Scene]:
    """Open an image, to read it in rows. Raises InputError for what is no image, or has other bands."""
    path = os.fspath(path)
    with tempfile.TemporaryFile() as scratch:
        with folders.named_faults(path):
            scene = _in_tiff(path, bands, scratch) or _decoded(path, bands, scratch)
            if remote.read(path, 0, 4) in TIFF_BEGINS:
                scene.like = path
        scene.rows(0, 1)
        yield scene


def _in_tiff(path: str, bands: Bands | None, scratch: Any) -> Scene | None:
    """The scene in a TIFF, in memory for a few strips or tiles; None if it has to be decoded by other means."""
    with suppress(Exception), remote.opened(path) as source, import_tifffile().TiffFile(source, is_ome=False) as file:
        page = file.pages[0]
        series = file.series[0]
        # A photograph is to be as Pillow would read it: upright RGB of 8 bits, no JPEG, not multiplied by alpha (1).
        is_upright = _ORIENTATION not in page.tags or page.tags[_ORIENTATION].value == 1
        is_rgb = page.photometric == _RGB and 1 not in page.extrasamples and page.dtype == np.uint8
        found = {series.axes.find("Y"), series.axes.find("X")}
        is_read_alike = bands is not None or (is_upright and is_rgb and page.compression not in _JPEG)
        if series.ndim not in (2, 3) or -1 in found or not is_read_alike:
            return None
        axis = ({0, 1, 2} - found).pop()
        if series.dataoffset is not None and not remote.is_remote(path):
            dtype = np.dtype(file.byteorder + series.dtype.char)
            return Scene(path, bands, path, series.shape, dtype, series.dataoffset, axis, nodata=page.nodata)
        remote.check_size(series.nbytes, source.seek(0, os.SEEK_END))
        cache.reserve(scratch, series.nbytes)
        series.asarray(out=np.memmap(scratch, series.dtype, "w+", shape=series.shape), buffersize=_READ_AT_ONCE)
        return Scene(path, bands, scratch, series.shape, series.dtype, bands_axis=axis, nodata=page.nodata)
    return None


def _decoded(path: str, bands: Bands | None, scratch: Any) -> Scene:
    if bands is None:
        with open_image(path) as image:
            levels = np.asarray(transforms.to_rgb(image))
    else:
        levels = decoded(remote.read(path))
    scratch.seek(0)  # `_in_tiff` may have begun to write
    scratch.write(np.ascontiguousarray(levels))
    scratch.flush()
    return Scene(path, bands, scratch, levels.shape, levels.dtype)
