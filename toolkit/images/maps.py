"""Maps: what a model answers for each pixel of an image, as files, with the georeference of the image."""

import os
from collections.abc import Iterable, Iterator, Sequence
from html import escape

import numpy as np
from PIL import Image

from toolkit.files import open_atomically
from toolkit.images.bands import import_tifffile

_TILE = 256
# Tags of OGC's GeoTIFF 1.1 (19-008r4), and of GDAL.
_SCALE = 33550
_TIE_POINTS = 33922
_MATRIX = 34264
_KEYS = (34735, 34736, 34737)
_GDAL_METADATA = 42112
_GDAL_NODATA = 42113
_POINT = (1025, 0, 1, 2)  # among the keys: positions are those of pixels' centres


def unsure(classes: int) -> np.integer:
    """What stands in a map of so many classes for a pixel without an answer: the largest number of its type."""
    return np.uint8(255) if classes <= 255 else np.uint16(65535)


def write_map(
    path: str | os.PathLike,
    parts: Iterable[np.ndarray],
    height: int,
    width: int,
    like: str | None,
    palette: np.ndarray | None = None,
    names: Sequence[str] = (),
    step: int = 1,
) -> None:
    """Write a GeoTIFF in compressed tiles, whole or not at all, in memory for some rows of it.

    Args:
        parts: its rows from the top downwards, some at a time: (rows, W) classes, or (rows, W, K) of float32.
        like: the TIFF whose georeference the map takes; None: it has none.
        palette: (K, 3) from 0 to 1, the colours of classes. What is `unsure` has no data.
        names: of the classes.
        step: how many of that TIFF's pixels one of the map is wide and high.
    """
    parts = iter(parts)
    first = next(parts)
    shape = (height, width, *first.shape[2:])
    extra = georeference(like, step)
    items = ""
    for i, name in enumerate(names):
        where = f'name="class {i}"'
        if palette is None:
            where = f'name="DESCRIPTION" sample="{i}" role="description"'
        items += f"<Item {where}>{escape(name)}</Item>"
    if items:
        extra.append((_GDAL_METADATA, "s", 0, f"<GDALMetadata>{items}</GDALMetadata>".encode(), True))
    colours = None
    kind = "minisblack"
    if palette is not None:
        extra.append((_GDAL_NODATA, "s", 0, str(unsure(len(palette))), True))
        kind = "palette"
        colours = np.zeros((3, 1 + np.iinfo(first.dtype).max), np.uint16)
        colours[:, : len(palette)] = np.round(palette.T * 65535)
    with open_atomically(path) as file:
        is_large = np.prod(shape, dtype=float) * first.dtype.itemsize > 2**31
        with import_tifffile().TiffWriter(file, bigtiff=bool(is_large)) as writer:
            writer.write(
                _tiles(first, parts),
                shape=shape,
                dtype=first.dtype,
                tile=(_TILE, _TILE),
                compression="deflate",
                photometric=kind,
                planarconfig="contig",
                colormap=colours,
                extratags=extra,
                metadata=None,
            )


def _tiles(first: np.ndarray, parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The tiles of a map, row by row; those at its borders are filled up with zeros."""
    rows = first
    for part in parts:
        rows = np.concatenate([rows, part])
        while len(rows) >= _TILE:
            yield from _cut(rows[:_TILE])
            rows = rows[_TILE:]
    for top in range(0, len(rows), _TILE):
        yield from _cut(rows[top : top + _TILE])


def _cut(rows: np.ndarray) -> Iterator[np.ndarray]:
    for left in range(0, rows.shape[1], _TILE):
        part = rows[:, left : left + _TILE]
        tile = np.zeros((_TILE, _TILE, *rows.shape[2:]), rows.dtype)
        tile[: part.shape[0], : part.shape[1]] = part
        yield tile


def georeference(path: str | None, step: int = 1) -> list[tuple]:
    """The tags of a TIFF that say where on Earth it is, for one whose pixels are `step` times as wide and high."""
    if path is None:
        return []
    found = {}
    with import_tifffile().TiffFile(path) as file:
        tags = file.pages[0].tags
        for code in (_SCALE, _TIE_POINTS, _MATRIX, *_KEYS):
            if code in tags:
                found[code] = tags[code].value
    shift = 0.0  # of the first pixel's place, in pixels of the TIFF
    if list(_POINT) in np.reshape(found.get(_KEYS[0], ()), (-1, 4)).tolist():
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
    kinds = dict(zip(_KEYS, "Hds", strict=True))
    extra = []
    for code, value in found.items():
        count = 0  # of a text: as long as it is
        if not isinstance(value, str):
            value = np.ravel(value).tolist()
            count = len(value)
        extra.append((code, kinds.get(code, "d"), count, value, True))
    return extra


def write_mask(path: str | os.PathLike, classes: np.ndarray, palette: np.ndarray) -> None:
    """Write classes (H, W) as a PNG in the colours (K, 3), from 0 to 1. Of 16 bits it has none."""
    image = Image.fromarray(classes)
    if classes.dtype == np.uint8:
        colours = np.full((256, 3), 0.6)
        colours[: len(palette)] = palette
        image.putpalette(np.round(255 * colours).astype(np.uint8).tobytes())
    with open_atomically(path) as file:
        image.save(file, "PNG")
