"""Images larger than the memory: GeoTIFFs, and others, that are read in rows."""

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np

from toolkit.images import bands as reading
from toolkit.images import remote
from toolkit.images.bands import Bands, import_tifffile
from toolkit.images.folders import named_faults
from toolkit.images.transforms import to_rgb

_RGB = 2  # a photometric interpretation of TIFFs
_JPEG = (6, 7)  # compressions
_ORIENTATION = 274  # a tag
_READ_AT_ONCE = 2**20  # bytes of a compressed TIFF


class Levels(NamedTuple):
    """An image that lies uncompressed in a file. Each part is mapped anew, since the pages of a map stay in memory."""

    file: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int = 0
    bands_axis: int = 2
    names: Sequence[str] | None = None
    nodata: float = 0.0

    @property
    def size(self) -> tuple[int, int]:
        height, width = (side for axis, side in enumerate(self.shape) if axis != self.bands_axis)
        return height, width

    def rows(self, first: int, last: int) -> np.ndarray:
        levels = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        if levels.ndim == 3:
            levels = np.moveaxis(levels, self.bands_axis, 2)
        return np.array(levels[first:last])

    def floats(self, first: int, last: int) -> np.ndarray:
        return reading.floats(self.rows(first, last), self.nodata)


class Scene:
    """An image that is read in rows."""

    def __init__(self, path: str, bands: Bands | None, sources: Mapping[str, Levels], like: str | None):
        self.path = path  # of its file, or of one of its bands' files
        self.bands = bands  # None: an RGB photograph
        self.sources = sources  # what reads each band's file, by band; or the one file, by an empty name
        self.like = like  # the TIFF whose georeference the image has, if any
        self.height, self.width = max((source.size for source in sources.values()), key=math.prod)

    def rows(self, first: int, last: int) -> np.ndarray:
        """What `Bands.array` has in these rows, without the last; or RGB, (rows, W, 3) of uint8. Raises InputError."""
        with named_faults(self.path):
            if "" not in self.sources:
                found = {name: self._band(name, first, last) for name in self.sources}
                return self.bands.stacked(found, (last - first, self.width))
            source = self.sources[""]
            if self.bands is None:
                return source.rows(first, last)[..., :3]
            return self.bands.picked(source.floats(first, last), source.names)

    def _band(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows of a band that has its own file, (rows, W): those of the whole enlarged band."""
        source = self.sources[name]
        times = reading.enlarging_factor(source.size, (self.height, self.width), name)
        start = max(0, first // times - 1)  # each row of the result is a mean of neighbours
        end = min(source.size[0], last // times + 2)
        band = reading.one_band(source.floats(start, end), name)
        return reading.enlarged(band, times)[first - times * start : last - times * start]


@contextmanager
def open_scene(path: str | os.PathLike, bands: Bands | None) -> Iterator[Scene]:
    """Open an image, in one file or in a file for each band, to read it in rows.

    A TIFF that is not compressed is read where it lies; other files are decoded at once, into temporary ones. Raises
    InputError for what is no image, or has other bands.
    """
    files = {"": os.fspath(path)} if bands is None else bands.files(path)
    with ExitStack() as opened:
        sources = {}
        for name, file in files.items():
            scratch = opened.enter_context(tempfile.TemporaryFile())
            with named_faults(file):
                sources[name] = _in_tiff(file, bands, scratch) or _decoded(file, bands, scratch)
        finest = files[max(sources, key=lambda name: math.prod(sources[name].size))]
        scene = Scene(os.fspath(path), bands, sources, finest if _is_tiff(finest) else None)
        scene.rows(0, 1)
        yield scene


def _is_tiff(path: str) -> bool:
    with remote.opened(path) as file:
        return file.read(4) in reading.TIFF_BEGINS


def _in_tiff(path: str, bands: Bands | None, scratch: Any) -> Levels | None:
    """The levels of a TIFF, in memory for a few strips or tiles; None if it has to be decoded by other means."""
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
            return Levels(path, series.shape, dtype, series.dataoffset, axis, nodata=page.nodata)
        remote.check_size(series.nbytes, source.seek(0, os.SEEK_END))
        if hasattr(os, "posix_fallocate"):  # if the disk filled up later, writing to the map would be a bus error
            os.posix_fallocate(scratch.fileno(), 0, series.nbytes)
        levels = np.memmap(scratch, series.dtype, "w+", shape=series.shape)
        series.asarray(out=levels, buffersize=_READ_AT_ONCE)
        return Levels(scratch, series.shape, series.dtype, bands_axis=axis, nodata=page.nodata)
    return None


def _decoded(path: str, bands: Bands | None, scratch: Any) -> Levels:
    names = None
    if bands is None:
        with reading.open_image(path) as image:
            levels = np.asarray(to_rgb(image))
    else:
        levels, names = reading.decoded(remote.read(path))
    scratch.seek(0)  # `_in_tiff` may have begun to write
    scratch.write(np.ascontiguousarray(levels))
    scratch.flush()
    return Levels(scratch, levels.shape, levels.dtype, names=names)
