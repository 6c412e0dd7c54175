"""Scenes in rows are what whole images are, and maps have the georeference of their scene."""

import os
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from toolkit import InputError
from toolkit.images.bands import Bands, open_image
from toolkit.images.maps import write_map, write_mask
from toolkit.images.scenes import open_scene
from toolkit.images.transforms import to_rgb

tifffile = pytest.importorskip("tifffile")

UTM = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32632)
CODES = (33550, 33922, 34264, 34735, 34736, 34737)


def geotags(keys=UTM, matrix=None):
    tags = [(34735, "H", len(keys), keys, True), (34736, "d", 2, (6378137.0, 298.25), True)]
    tags.append((34737, "s", 0, "WGS 84 / UTM zone 32N|", True))
    if matrix is not None:
        return [*tags, (34264, "d", 16, matrix, True)]
    scale = (33550, "d", 3, (10.0, 10.0, 0.0), True)
    return [*tags, scale, (33922, "d", 6, (0.0, 0.0, 0.0, 500000.0, 5400000.0, 0.0), True)]


def read_tags(path):
    with tifffile.TiffFile(path) as file:
        tags = file.pages[0].tags
        return {code: tags[code].value for code in CODES if code in tags}


def in_rows(path, bands, height=23):
    """The whole image by parts that overlap, as windows do."""
    with open_scene(path, bands) as scene:
        whole = scene.rows(0, 1)[:0]
        for first in range(0, scene.height, height - 9):
            part = scene.rows(first, min(first + height, scene.height))
            whole = np.concatenate([whole[:first], part])
        assert whole.shape[:2] == (scene.height, scene.width)
        return whole


def levels(height=150, width=117, bands=5, dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(0, 250, (height, width, bands)).astype(dtype)


WRITTEN = {
    "one strip": {},
    "strips": {"rowsperstrip": 16},
    "compressed strips": {"rowsperstrip": 7, "compression": "deflate"},
    "one compressed strip": {"rowsperstrip": 5000, "compression": "deflate"},
    "tiles": {"tile": (32, 48)},
    "compressed tiles": {"tile": (64, 32), "compression": "deflate", "predictor": True},
    "BigTIFF": {"tile": (32, 32), "bigtiff": True, "compression": "deflate"},
    "big-endian": {"byteorder": ">", "tile": (32, 32)},
    "big-endian strips": {"byteorder": ">", "rowsperstrip": 16},
}


@pytest.mark.parametrize("planar", ["contig", "separate", "pages"])
@pytest.mark.parametrize("how", WRITTEN)
def test_rows_of_a_tiff_are_those_of_the_whole(tmp_path, how, planar):
    array = levels(dtype=np.float32 if how == "tiles" else np.uint16)
    if how == "tiles":
        array[3, 4, 0] = np.nan
    if planar != "contig":
        array = array.transpose(2, 0, 1)
    config = {"planarconfig": planar} if planar != "pages" else {"metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", **config, **WRITTEN[how])
    for chosen in ((), ("3", "0", "1")):
        bands = Bands(len(chosen) or 5, chosen)
        assert np.array_equal(in_rows(tmp_path / "a.tif", bands), bands.array(tmp_path / "a.tif"))


@pytest.mark.parametrize("name", ["a.jp2", "a.png", "a.npy", "a.npz"])
def test_rows_of_other_files_are_those_of_the_whole(tmp_path, name):
    if name.endswith((".jp2", ".png")):
        Image.fromarray(levels(bands=1)[..., 0]).save(tmp_path / name)
        bands = Bands(1)
    elif name == "a.npz":
        np.savez(tmp_path / name, red=levels()[..., 0], nir=levels()[..., 1])
        bands = Bands(2, ("nir", "red"))
    else:
        np.save(tmp_path / name, levels())
        bands = Bands(5)
    assert np.array_equal(in_rows(tmp_path / name, bands), bands.array(tmp_path / name))


@pytest.mark.parametrize(
    "name, how",
    [
        ("a.jpg", {}),
        ("a.png", {}),
        ("a.tif", {"rowsperstrip": 16, "compression": "deflate"}),
        ("b.tif", {"tile": (32, 32)}),
    ],
)
def test_rows_of_photographs_are_those_of_the_whole(tmp_path, name, how):
    array = levels(bands=3, dtype=np.uint8)
    if name.endswith(".tif"):
        tifffile.imwrite(tmp_path / name, array, photometric="rgb", **how)
    else:
        image = Image.fromarray(array)
        exif = image.getexif()
        exif[274] = 6
        image.save(tmp_path / name, exif=exif)
    expected = np.asarray(to_rgb(open_image(tmp_path / name)))
    assert np.array_equal(in_rows(tmp_path / name, None), expected)


def test_a_compression_that_pillow_alone_knows(tmp_path, monkeypatch):
    def unknown(*_, **__):
        raise ValueError("requires the 'imagecodecs' package")

    tifffile.imwrite(tmp_path / "a.tif", levels(bands=3, dtype=np.uint8), photometric="rgb", compression="deflate")
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", unknown)
    assert np.array_equal(in_rows(tmp_path / "a.tif", None), np.asarray(to_rgb(open_image(tmp_path / "a.tif"))))


def test_a_photograph_of_16_bits_becomes_one_of_8(tmp_path):
    Image.fromarray(levels(bands=1)[..., 0] * 200).save(tmp_path / "a.tif")
    assert np.array_equal(in_rows(tmp_path / "a.tif", None), np.asarray(to_rgb(open_image(tmp_path / "a.tif"))))


@pytest.mark.parametrize("suffix", ["tif", "jp2"])
def test_bands_of_other_resolutions_are_enlarged_as_whole_ones(tmp_path, suffix):
    rng = np.random.default_rng(0)
    for name, side in (("B02_10m", 240), ("B05_20m", 120), ("B01_60m", 40)):
        array = rng.integers(0, 10000, (side, side // 2 + side // 10)).astype(np.uint16)
        if suffix == "tif":
            tifffile.imwrite(
                tmp_path / f"T_{name}.tif", array, photometric="minisblack", extratags=geotags(), tile=(32, 32)
            )
        else:
            Image.fromarray(array).save(tmp_path / f"T_{name}.jp2", irreversible=False)
    path = tmp_path / f"T_B02_10m.{suffix}"
    bands = Bands(4, ("B01", "0", "B02", "B05"))
    np.testing.assert_allclose(in_rows(path, bands), bands.array(path), rtol=2e-7)  # a last bit
    with open_scene(tmp_path / f"T_B01_60m.{suffix}", bands) as scene:
        assert scene.like == (os.fspath(path) if suffix == "tif" else None)


def test_few_rows_of_scenes_and_maps_are_held(tmp_path):
    array = levels(2000, 1000)  # 20 MB
    how = {"planarconfig": "contig", **WRITTEN["compressed tiles"]}
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", **how)
    tracemalloc.start()
    with open_scene(tmp_path / "a.tif", Bands(5)) as scene:
        for first in range(0, 2000, 50):
            scene.rows(first, first + 50)
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()
    held = []

    def parts():
        for _ in range(40):
            held.append(tracemalloc.get_traced_memory()[1])
            yield np.zeros((100, 300), np.float32)

    tracemalloc.start()
    write_map(tmp_path / "map.tif", parts(), 4000, 300, None)
    tracemalloc.stop()
    assert held[-1] < held[10] + 100_000


@pytest.mark.parametrize(
    "bands, wrong", [(Bands(4), "has 5 bands, and the network takes 4"), (Bands(1, ("7",)), "has no band 7")]
)
def test_other_bands_are_refused_by_name(tmp_path, bands, wrong):
    tifffile.imwrite(tmp_path / "a.tif", levels(), photometric="minisblack", planarconfig="contig")
    with pytest.raises(InputError, match=f"a.tif: .*{wrong}"), open_scene(tmp_path / "a.tif", bands):
        pass


def test_what_is_damaged_or_no_image_is_named(tmp_path):
    how = {"photometric": "minisblack", "compression": "deflate", "rowsperstrip": 10}
    tifffile.imwrite(tmp_path / "a.tif", levels(), planarconfig="contig", **how)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        start = file.pages[0].dataoffsets[7]
    content[start : start + 40] = bytes(40)
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(InputError, match=r"a.tif: not a readable image"), open_scene(tmp_path / "a.tif", Bands(5)):
        pass
    (tmp_path / "a.tif").write_bytes(b"II*\0" + bytes(20))
    with pytest.raises(InputError, match=r"a.tif: not a readable image"), open_scene(tmp_path / "a.tif", Bands(5)):
        pass


# ----------------------------------------------------------------------------------------------------------------------
# Maps

COLOURS = np.array([[0, 0, 0], [1, 0.5, 0], [0, 0, 1]])


def scene_file(folder, extratags, height=600, width=530):
    path = folder / "scene.tif"
    tifffile.imwrite(
        path, levels(height, width, 2), photometric="minisblack", planarconfig="contig", extratags=extratags
    )
    return path


def cut(array, rows=70):
    return (array[first : first + rows] for first in range(0, len(array), rows))


def test_a_map_of_classes_has_the_georeference_of_its_scene(tmp_path):
    like = scene_file(tmp_path, geotags())
    classes = levels(600, 530, 1, np.uint8)[..., 0] % 3
    write_map(tmp_path / "map.tif", cut(classes), 600, 530, str(like), COLOURS, ["sea", "<b> & c", "é"])
    assert np.array_equal(tifffile.imread(tmp_path / "map.tif"), classes)
    assert read_tags(tmp_path / "map.tif") == read_tags(like)
    assert len(read_tags(like)) == 5
    with tifffile.TiffFile(tmp_path / "map.tif") as file:
        page = file.pages[0]
        assert (page.is_tiled, page.tags[42113].value, page.photometric.name) == (True, "255", "PALETTE")
        assert page.colormap[:, :3].T.tolist() == [[0, 0, 0], [65535, 32768, 0], [0, 0, 65535]]
        assert "&lt;b&gt; &amp; c" in page.tags[42112].value
    with Image.open(tmp_path / "map.tif") as image:
        assert np.array_equal(np.asarray(image), classes)


def test_a_map_of_probabilities_has_a_band_for_each_class_and_a_mask_a_palette(tmp_path):
    values = np.random.default_rng(0).random((300, 270, 3), np.float32)
    write_map(tmp_path / "map.tif", cut(values), 300, 270, None, names=["a", "b", "c"])
    assert np.array_equal(tifffile.imread(tmp_path / "map.tif"), values)
    assert not read_tags(tmp_path / "map.tif")
    classes = levels(9, 7, 1, np.uint8)[..., 0] % 3
    classes[0, 0] = 255
    write_mask(tmp_path / "mask.png", classes, COLOURS)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), classes)
        assert image.getpalette()[3:6] == [255, 128, 0]


@pytest.mark.parametrize("point", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_pixels_of_a_coarser_map_lie_where_their_windows_do(tmp_path, point, turned):
    keys = tuple(2 if point and i == 11 else value for i, value in enumerate(UTM))
    matrix = (0.0, 10.0, 0.0, 500000.0, -10.0, 0.0, 0.0, 5400000.0, *[0.0] * 7, 1.0) if turned else None
    like = scene_file(tmp_path, geotags(keys, matrix), 640, 512)
    write_map(tmp_path / "map.tif", cut(levels(10, 8, 1, np.uint8)[..., 0]), 10, 8, str(like), COLOURS, step=64)
    place, coarse = read_tags(like), read_tags(tmp_path / "map.tif")
    assert coarse[34735] == place[34735]

    def at(tags, column, row):  # by 19-008r4, of positions in pixels; those of a point count from its centre
        if turned:
            a = tags[34264]
            return a[0] * column + a[1] * row + a[3], a[4] * column + a[5] * row + a[7]
        i, j, _, x, y, _ = tags[33922]
        return x + (column - i) * tags[33550][0], y - (row - j) * tags[33550][1]

    half = 0.5 if point else 0.0
    for column, row in ((0, 0), (8, 10), (3, 7)):  # corners of pixels
        expected = at(place, 64 * column - half, 64 * row - half)
        assert at(coarse, column - half, row - half) == pytest.approx(expected, abs=1e-6)


def test_a_map_that_ends_early_leaves_the_old_one(tmp_path):
    (tmp_path / "map.tif").write_bytes(b"old")

    def parts():
        yield np.zeros((10, 600), np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_map(tmp_path / "map.tif", parts(), 600, 600, None, COLOURS)
    assert (tmp_path / "map.tif").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["map.tif"]
