"""Reads where on Earth an image is: the centre of a GeoTIFF, from the tags in its file.

The tags are those of OGC's GeoTIFF 1.1 (19-008r4): the position of one pixel and the size of all, or a matrix, in
degrees or in the units of a projection that an EPSG code names.
"""

import math
import os
from collections.abc import Iterable
from typing import Any

from toolkit.images.bands import import_tifffile

COLUMNS = ("x", "y", "epsg")
_SCALE = "ModelPixelScale"
_TIEPOINT = "ModelTiepoint"
_MATRIX = "ModelTransformation"
_PROJECTED = "ProjectedCSTypeGeoKey"
_GEOGRAPHIC = "GeographicTypeGeoKey"
_POINT = 2  # value of GTRasterTypeGeoKey: positions are those of pixels' centres, not of their upper left corners
_UNNAMED = 32767  # a reference system that has no code


def centre(path: str | os.PathLike) -> dict[str, Any]:
    """The `x`, `y` and `epsg` of an image's centre; an empty dictionary if the file has no such tags.

    x is the longitude and y the latitude in degrees, or both are in the units of the projection. `epsg` is the code of
    the reference system, or empty if it has none.
    """
    try:
        tifffile = import_tifffile()
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            tags = page.geotiff_tags or {}
        half = 0.5 * (int(tags.get("GTRasterTypeGeoKey", 1)) == _POINT)
        x, y = _position(tags, page.imagewidth / 2 - half, page.imagelength / 2 - half)
        code = int(tags.get(_PROJECTED, tags.get(_GEOGRAPHIC, _UNNAMED)))
    except Exception:  # damaged tags, of which there are many kinds: the image itself can be read
        return {}
    if not (math.isfinite(x) and math.isfinite(y)):
        return {}
    return {"x": x, "y": y, "epsg": "" if code == _UNNAMED else code}


def _position(tags: dict[str, Any], column: float, row: float) -> tuple[float, float]:
    """The x and y of a pixel. Raises KeyError if the tags do not tell."""
    if _MATRIX in tags:
        x, y = (float(a) * column + float(b) * row + float(d) for a, b, _, d in tags[_MATRIX][:2])
        return x, y
    across, down = map(float, tags[_SCALE][:2])
    at_column, at_row, _, x, y = map(float, tags[_TIEPOINT][:5])
    return x + (column - at_column) * across, y - (row - at_row) * down


def centres(paths: Iterable[str]) -> list[dict[str, Any]]:
    """The `centre` of each file, or empty columns; an empty list if no file has tags, or tifffile is missing."""
    paths = list(paths)
    if not any(path.lower().endswith((".tif", ".tiff")) for path in paths):
        return []
    try:
        import_tifffile()
    except ImportError:
        print("the geotags of TIFFs are not read: pip install tifffile")
        return []
    found = list(map(centre, paths))
    return [dict.fromkeys(COLUMNS, "") | place for place in found] if any(found) else []
