"""Images larger than the memory: GeoTIFFs, and others, that are read in rows."""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from toolkit.images import bands as reading
from toolkit.images.bands import Bands, import_tifffile
from toolkit.images.folders import named_faults
from toolkit.images.transforms import to_rgb

_RGB = 2  # a photometric interpretation of TIFFs
_JPEG = (6, 7)  # compressions
_ORIENTATION = 274  # a tag


class Levels(NamedTuple):
    """An image that lies uncompressed in a file. Each part is mapped anew, since the pages of a map stay in memory."""

    file: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int = 0
    bands_axis: int = 2
    names: Sequence[str] | None = None

    @property
    def size(self) -> tuple[int, int]:
        height, width = (side for axis, side in enumerate(self.shape) if axis != self.bands_axis)
        return height, width

    def rows(self, first: int, last: int) -> np.ndarray:
        levels = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        if levels.ndim == 3:
            levels = np.moveaxis(levels, self.bands_axis, 2)
        return np.array(levels[first:last])


class Segments:
    """The strips or tiles of a TIFF, decoded as rows ask for them. Those of the last rows are kept."""

    names = None

    def __init__(self, pages: Sequence[Any]):
        self.pages = pages  # of one image; several are its bands
        self.layout = pages[0].keyframe
        self.size = self.layout.imagelength, self.layout.imagewidth
        self.length = self.layout.tilelength if self.layout.is_tiled else self.layout.rowsperstrip
        self.kept: dict[int, np.ndarray | None] = {}  # by the number of a row of segments

    def rows(self, first: int, last: int) -> np.ndarray:
        needed = range(first // self.length, math.ceil(last / self.length))
        self.kept = {number: self.kept.get(number) for number in needed}
        for number, levels in self.kept.items():
            if levels is None:
                self.kept[number] = np.concatenate([self._decoded(page, number) for page in self.pages], axis=2)
        start = needed[0] * self.length
        return np.concatenate(list(self.kept.values()))[first - start : last - start]

    def _decoded(self, page: Any, number: int) -> np.ndarray:
        """A row of strips or tiles, (rows, W, bands)."""
        layout = self.layout
        height, width = self.size
        down = math.ceil(height / self.length)
        across = math.ceil(width / (layout.tilewidth or width))  # strips have no such width
        tables = {}
        if layout.compression in _JPEG:
            tables = {"jpegtables": page.jpegtables, "jpegheader": layout.jpegheader}
        planes, _, _, _, samples = layout.shaped
        rows = min(self.length, height - number * self.length)
        levels = np.full((planes, rows, width, samples), layout.nodata, layout.dtype)
        for plane in range(planes):
            start = (plane * down + number) * across
            for index in range(start, start + across):
                content = None  # of a segment that a sparse file leaves out
                if page.databytecounts[index]:
                    page.parent.filehandle.seek(page.dataoffsets[index])
                    content = page.parent.filehandle.read(page.databytecounts[index])
                segment, (_, _, _, left, _), _ = layout.decode(content, index, **tables)
                if segment is not None:
                    part = segment[0, :rows, : width - left]
                    levels[plane, : len(part), left : left + part.shape[1]] = part
        return levels.transpose(1, 2, 0, 3).reshape(rows, width, planes * samples)


class Scene:
    """An image that is read in rows."""

    def __init__(self, path: str, bands: Bands | None, sources: Mapping[str, Levels | Segments], like: str | None):
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
            levels = self.sources[""].rows(first, last)
            return levels if self.bands is None else self.bands.from_levels(levels, self.sources[""].names)

    def _band(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows of a band that has its own file, (rows, W), with the bits of the whole enlarged band.

        Pillow enlarges along rows first, each by itself. Then each row of the result is a sum of two or three, whose
        weights follow from its number in the whole band: they are computed here as Pillow does.
        """
        source = self.sources[name]
        times = reading.enlarging_factor(source.size, (self.height, self.width), name)
        start = max(0, first // times - 1)
        end = min(source.size[0], last // times + 2)
        band = reading.one_band(reading.floats(source.rows(start, end)), name)
        if times == 1:
            return band[first - start : last - start]
        wide = Image.fromarray(band).resize((self.width, len(band)), Image.Resampling.BILINEAR)
        band = np.asarray(wide, np.float64)
        enlarged = np.zeros((last - first, self.width))
        for row in range(first, last):
            centre = (row + 0.5) * (source.size[0] / self.height)
            near = range(max(0, int(centre - 0.5)), min(source.size[0], int(centre + 1.5)))
            weights = [max(0.0, 1 - abs(i - centre + 0.5)) for i in near]
            for i, weight in zip(near, weights, strict=True):
                enlarged[row - first] += band[i - start] * (weight / sum(weights))
        return enlarged.astype(np.float32)


@contextlib.contextmanager
def open_scene(path: str | os.PathLike, bands: Bands | None) -> Iterator[Scene]:
    """Open an image, in one file or in a file for each band, to read it in rows.

    Strips and tiles of a TIFF are decoded when their rows are read; other files at once, into temporary ones. Raises
    InputError for what is no image, or has other bands.
    """
    files = {"": os.fspath(path)} if bands is None else bands.files(path)
    with contextlib.ExitStack() as opened:
        sources = {}
        for name, file in files.items():
            scratch = opened.enter_context(tempfile.TemporaryFile())
            with named_faults(file):
                sources[name] = _in_tiff(file, bands, opened) or _decoded(file, bands, scratch)
        finest = files[max(sources, key=lambda name: math.prod(sources[name].size))]
        scene = Scene(os.fspath(path), bands, sources, finest if _is_tiff(finest) else None)
        scene.rows(0, 1)
        yield scene


def _is_tiff(path: str) -> bool:
    reading.check_is_file(path)
    with open(path, "rb") as file:
        return file.read(4) in reading.TIFF_BEGINS


def _in_tiff(path: str, bands: Bands | None, opened: contextlib.ExitStack) -> Levels | Segments | None:
    """What reads the rows of a TIFF; None if the whole of it has to be decoded by other means."""
    if not _is_tiff(path):
        return None
    try:
        file = opened.enter_context(import_tifffile().TiffFile(path))
    except ImportError:
        return None
    page = file.pages[0]
    series = file.series[0]
    # A photograph has to be what Pillow would make of it: upright RGB of 8 bits, not compressed as a JPEG.
    is_upright = _ORIENTATION not in page.tags or page.tags[_ORIENTATION].value == 1
    is_rgb = page.photometric == _RGB and page.samplesperpixel == 3 and page.dtype == np.uint8
    if bands is None and not (is_upright and is_rgb and page.compression not in _JPEG):
        return None
    found = {series.axes.find("Y"), series.axes.find("X")}
    if series.ndim not in (2, 3) or -1 in found:
        return None
    axis = ({0, 1, 2} - found).pop()
    if series.dataoffset is not None:
        return Levels(path, series.shape, np.dtype(file.byteorder + series.dtype.char), series.dataoffset, axis)
    source = Segments(series.pages)
    with contextlib.suppress(Exception):  # of a compression that Pillow reads, perhaps
        source.rows(0, 1)
        return source
    return None


def _decoded(path: str, bands: Bands | None, scratch: Any) -> Levels:
    names = None
    if bands is None:
        with reading.open_image(path) as image:
            levels = np.asarray(to_rgb(image))
    else:
        levels, names = reading.decoded(reading.read_file(path))
    scratch.write(np.ascontiguousarray(levels))
    scratch.flush()
    return Levels(scratch, levels.shape, levels.dtype, names=names)
