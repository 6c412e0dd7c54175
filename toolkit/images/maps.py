"""Maps, what a model answers for each pixel, as files; and their place on Earth, in OGC's GeoTIFF 1.1 (19-008r4)."""

import itertools
import os
from collections.abc import Iterable, Iterator
from html import escape

import numpy as np
from PIL import Image

from toolkit import MADE_BY, files
from toolkit.images import bands, remote

_SCALE = 33550
_TIE_POINTS = 33922
_MATRIX = 34264
_KEYS = {34735: "H", 34736: "d", 34737: "s"}
_POINT = 2  # a raster type: positions are of pixels' centres, not of their upper left corners
_GDAL_METADATA = 42112  # tags of GDAL
_GDAL_NODATA = 42113
_TILE = 256
NO_CLASS = 255  # stands in a map for a pixel without an answer


def georeference(path: str | None, step: int = 1) -> Iterator[tuple]:
    """The tags of a TIFF that say where it is, for one whose pixels are `step` times as wide and high."""
    if path is None:
        return
    with remote.opened(path) as source, bands.import_tifffile().TiffFile(source) as file:
        page = file.pages[0]
        found = {code: page.tags[code].value for code in (_SCALE, _TIE_POINTS, _MATRIX, *_KEYS) if code in page.tags}
        shift = 0.0  # of the first pixel's place, in pixels
        if (page.geotiff_tags or {}).get("GTRasterTypeGeoKey") == _POINT:
            shift = (step - 1) / 2
    if _SCALE in found:
        found[_SCALE] = np.array(found[_SCALE]) * (step, step, 1)
    if _TIE_POINTS in found:
        points = np.reshape(found[_TIE_POINTS], (-1, 6)).astype(float)
        points[:, :2] = (points[:, :2] - shift) / step
        found[_TIE_POINTS] = points
    if _MATRIX in found:
        matrix = np.reshape(found[_MATRIX], (4, 4)).astype(float)
        matrix[:, 3] += shift * (matrix[:, 0] + matrix[:, 1])
        matrix[:, :2] *= step
        found[_MATRIX] = matrix
    for code, value in found.items():
        # As bytes tifffile writes any text, and else ASCII alone: a projection may be called Réseau géodésique.
        value = value.encode() if isinstance(value, str) else np.ravel(value).tolist()
        yield code, _KEYS.get(code, "d"), len(value), value, True


def write_map(path, parts: Iterable, height: int, width: int, like: str | None, palette=None, names=(), step=1) -> None:
    """Write a GeoTIFF in compressed tiles, whole or not at all, in memory for some rows of it.

    Args:
        parts: its rows from the top downwards, some at a time: (rows, W) of uint8, or (rows, W, K) of floats.
        like: the TIFF whose georeference the map takes, if any; a pixel of the map is `step` of its wide and high.
        palette: (K, 3) from 0 to 1, the colours of the classes in `names`. NO_CLASS is the number without data.
    """
    parts = iter(parts)
    first = next(parts)
    shape = (height, width, *first.shape[2:])
    extra = list(georeference(like, step))
    where = 'name="DESCRIPTION" sample="{}" role="description"'
    look = {"photometric": "minisblack"}
    if palette is not None:
        where = 'name="class {}"'
        extra.append((_GDAL_NODATA, "s", 0, str(NO_CLASS), True))
        look = {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}
        look["colormap"][:, : len(palette)] = np.round(palette.T * 65535)
    if items := "".join(f"<Item {where.format(i)}>{escape(name)}</Item>" for i, name in enumerate(names)):
        extra.append((_GDAL_METADATA, "s", 0, f"<GDALMetadata>{items}</GDALMetadata>".encode(), True))
    with files.open_atomically(path) as file:
        is_large = np.prod(shape, dtype=float) * first.dtype.itemsize > 2**31
        with bands.import_tifffile().TiffWriter(file, bigtiff=bool(is_large)) as writer:
            look |= {"tile": (_TILE, _TILE), "compression": "deflate", "planarconfig": "contig", "metadata": None}
            tiles = _tiles(first, parts)
            writer.write(tiles, shape=shape, dtype=first.dtype, **look, software=MADE_BY, extratags=extra)


def _tiles(rows: np.ndarray, parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The tiles of a map, row by row; tifffile fills up those at its borders."""
    for part in itertools.chain(parts, [None]):
        while len(rows) >= _TILE or (part is None and len(rows)):
            for left in range(0, rows.shape[1], _TILE):
                yield rows[:_TILE, left : left + _TILE]
            rows = rows[_TILE:]
        if part is not None:
            rows = np.concatenate([rows, part])


def write_mask(path: str | os.PathLike, classes: np.ndarray, palette: np.ndarray) -> None:
    """Write classes (H, W), uint8, as a PNG in the colours (K, 3), from 0 to 1."""
    image = Image.fromarray(classes)
    colours = np.full((256, 3), 0.6)
    colours[: len(palette)] = palette
    image.putpalette(np.round(255 * colours).astype(np.uint8).tobytes())
    with files.open_atomically(path) as file:
        image.save(file, "PNG")
