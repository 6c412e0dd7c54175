"""toolkit/images/masks.py: formats and faults of masks, where pairs lie, how they are split, one draw for both."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.image_files import png_of
from toolkit import InputError
from toolkit.images import data, masks, sources
from toolkit.images.bands import Bands
from toolkit.images.lists import ImageList
from toolkit.images.masks import UNKNOWN, Classes, MaskReader, pair_transforms, pairs_in, palette, read_classes

tifffile = pytest.importorskip("tifffile")

LEVELS = np.array([[0, 1, 2, 255], [2, 2, 0, 1], [1, 255, 0, 0]], np.uint8)
EXPECTED = np.where(LEVELS == 255, UNKNOWN, LEVELS.astype(int))
THREE = Classes(("sea", "land", "ice"))
COLOURS = ((0, 0, 255), (0, 200, 0), (255, 255, 255))
BLACK_LAST = Classes(("cell", "ground"), colours=((255, 255, 255), (0, 0, 0)))
IN_COLOURS = Classes(("sea", "land", "ice"), colours=COLOURS, unknown=((9, 9, 9),))


def write_mask(path: Path, levels: np.ndarray = LEVELS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(path)
    return path


def write_image(path: Path, size: tuple[int, int] = (4, 3), seed: int = 0) -> None:
    write_mask(path, np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def write_pairs(root: Path, masks: list[np.ndarray]) -> None:
    """images/0.png and masks/0.png, and so on, in the size of LEVELS."""
    for i, levels in enumerate(masks):
        write_image(root / f"images/{i}.png", seed=i)
        write_mask(root / f"masks/{i}.png", levels)


def load_pairs(data_dir=None, data_list=None, classes=None, unknown=None, **more) -> sources.Splits:
    reader = MaskReader(classes, unknown)
    return sources.load_splits("imagefolder", data_dir, data_list=data_list, task="segmentation", masks=reader, **more)


def names_in(images) -> set[str]:
    return set(images.relative_names())


TABLE = np.full((256, 3), 9, np.uint8)
TABLE[:3] = COLOURS
RGB = TABLE[LEVELS]


def pal(colours: np.ndarray) -> Image.Image:
    image = Image.fromarray(LEVELS)
    image.putpalette(colours.astype(np.uint8).ravel().tolist())
    return image


# ----------------------------------------------------------------------------------------------------------- formats


GREY = {"photometric": "minisblack"}


def save_with_overview(path: Path) -> None:
    with tifffile.TiffWriter(path) as writer:
        writer.write(LEVELS, subifds=0, metadata=None)
        writer.write(LEVELS[::2, ::2], subfiletype=1, metadata=None)


FORMATS = {
    "l.png": write_mask,
    "l.tif": write_mask,
    "p.png": lambda path: pal(np.random.RandomState(0).randint(0, 256, (256, 3))).save(path),
    "16.png": lambda path: Image.fromarray(LEVELS.astype(np.uint16)).save(path),
    "signed.tif": lambda path: tifffile.imwrite(path, LEVELS.astype(np.int16)),
    "32.tif": lambda path: tifffile.imwrite(path, LEVELS.astype(np.int32)),
    "float.tif": lambda path: tifffile.imwrite(path, LEVELS.astype(np.float32)),
    "white_is_zero.tif": lambda path: tifffile.imwrite(path, LEVELS, photometric="miniswhite"),
    "overviews.tif": save_with_overview,
    "one_band.tif": lambda path: tifffile.imwrite(path, LEVELS[None], **GREY),
    "first.npy": lambda path: np.save(path, LEVELS[None].astype(np.int16)),
    "64.npy": lambda path: np.save(path, LEVELS.astype(np.int64)),
    "last.npy": lambda path: np.save(path, LEVELS[..., None]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_masks_of_all_formats(name, tmp_path):
    path = tmp_path / name
    FORMATS[name](path)
    for classes in (None, THREE):
        assert np.array_equal(MaskReader(classes, [255])(str(path)), EXPECTED)


RGBA = np.dstack([RGB, np.full((3, 4), 255, np.uint8)])
# The image in the file, the classes, and what is read.
IMAGES = {
    "rgb": (Image.fromarray(RGB), IN_COLOURS, EXPECTED),
    "a row": (Image.fromarray(RGB[:1]), IN_COLOURS, EXPECTED[:1]),
    "a row with alpha": (Image.fromarray(RGBA[:1]), IN_COLOURS, EXPECTED[:1]),
    "alpha": (Image.fromarray(RGBA), IN_COLOURS, EXPECTED),
    "a palette": (pal(TABLE), IN_COLOURS, EXPECTED),
    "a palette of the colours that there are": (Image.fromarray(RGB).quantize(8), IN_COLOURS, EXPECTED),
    "one bit": (Image.fromarray(LEVELS == 2), None, LEVELS == 2),
    "black and white": (Image.fromarray(LEVELS == 2), BLACK_LAST, LEVELS != 2),
    "greys": (Image.fromarray((LEVELS == 2) * np.uint8(255)), BLACK_LAST, LEVELS != 2),
}


@pytest.mark.parametrize("name", IMAGES)
def test_the_colour_says_the_class_whatever_its_number(name, tmp_path):
    image, classes, expected = IMAGES[name]
    image.save(tmp_path / "m.png")
    assert np.array_equal(MaskReader(classes)(str(tmp_path / "m.png")), expected)


@pytest.mark.parametrize("bits", [2, 4])
def test_numbers_of_few_bits_are_what_the_file_has(bits, tmp_path):
    """Pillow spreads greys over 0 to 255: 1 becomes 85 or 17, and the largest 255."""
    levels = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.uint8)
    packed = np.packbits(np.unpackbits(levels[..., None], axis=2)[..., -bits:].reshape(2, -1), axis=1)
    (tmp_path / "m.png").write_bytes(png_of(4, 2, bits, 0, b"".join(b"\0" + row.tobytes() for row in packed)))
    assert np.array_equal(MaskReader(None)(str(tmp_path / "m.png")), levels)
    greys = Classes(("a", "b", "c", "d"), colours=tuple((255 // (2**bits - 1) * i,) * 3 for i in (3, 2, 1, 0)))
    assert np.array_equal(MaskReader(greys)(str(tmp_path / "m.png")), 3 - levels)  # as an RGB image of such greys


@pytest.mark.parametrize(
    ("levels", "unknown", "expected"),
    [
        (np.array([[-1, 30000], [7, -9999]], np.int32), [-1, -9999], [[UNKNOWN, 1], [0, UNKNOWN]]),
        (np.array([[-1, 30000], [7, -9999]], np.int32), [-1, -9999, 7.5], [[UNKNOWN, 1], [0, UNKNOWN]]),  # is not 7
        (np.array([[7, -3.4e38]], np.float32), [-(10**38)], [[0, UNKNOWN]]),
    ],
)
def test_values_that_are_no_numbers_of_classes(tmp_path, levels, unknown, expected):
    tifffile.imwrite(tmp_path / "m.tif", levels)
    classes = Classes(("a", "b"), values=(7, 30000))
    assert MaskReader(classes, unknown)(str(tmp_path / "m.tif")).tolist() == expected


# ------------------------------------------------------------------------------------------------------------- faults


PAGES = np.stack([LEVELS] * 5)
# What the mask is, the classes, and what the message says besides the name of the mask.
FAULTS = {
    "jpeg": (lambda path: Image.fromarray(LEVELS).save(path, format="JPEG"), None, "format JPEG"),
    "rgb": (lambda path: write_mask(path, RGB), THREE, "`name r g b`"),
    "rgb without classes": (lambda path: write_mask(path, RGB), None, "`name r g b`"),
    "colour": (lambda path: write_mask(path, RGB // 2), IN_COLOURS, "colour 0 0 127, which is no class's"),
    "value": (lambda path: write_mask(path, LEVELS % 254 + 5), THREE, "value 5, which is no class's"),
    "negative": (lambda path: np.save(path.with_suffix(".npy"), LEVELS - 1.0), None, "--unknown-value -1"),
    "large": (lambda path: np.save(path.with_suffix(".npy"), LEVELS * np.int64(999)), None, "`NAME 999`"),
    "decimals": (lambda path: np.save(path.with_suffix(".npy"), LEVELS / 2), THREE, "decimals"),
    "nan": (lambda path: np.save(path.with_suffix(".npy"), LEVELS * np.nan), THREE, "NaN"),
    "bands": (lambda path: np.save(path.with_suffix(".npy"), np.zeros((3, 4, 5))), THREE, "whole numbers"),
    "pages": (lambda path: tifffile.imwrite(path.with_suffix(".tif"), PAGES, **GREY), THREE, "it has uint8 (3, 4, 5)"),
    "numbers": (lambda path: np.save(path.with_suffix(".npy"), LEVELS), IN_COLOURS, "a mask of numbers"),
    "text": (lambda path: path.write_text("no image"), THREE, "not a readable image"),
    "cut": (lambda path: path.write_bytes(write_mask(path).read_bytes()[:50]), THREE, "not a readable image"),
    "size": (lambda path: write_mask(path, LEVELS[:2]), THREE, "the mask is 4x2, and its image (upright) 4x3"),
    "unknown": (lambda path: write_mask(path, LEVELS * 0 + 255), THREE, "all pixels are unknown"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_mask_is_one_line(fault, tmp_path, capsys):
    make, classes, message = FAULTS[fault]
    write_pairs(tmp_path, [RGB if classes is IN_COLOURS else LEVELS] * 3)
    (tmp_path / "masks/1.png").unlink()
    make(tmp_path / "masks/1.png")
    with pytest.raises(InputError, match=r"masks.1\.(png|npy|tif): ") as raised:
        load_pairs(tmp_path, classes=classes)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    splits = load_pairs(tmp_path, classes=classes, skip_unreadable=True)
    assert {Path(images.name(0)).name for images in splits[:2]} == {"0.png", "2.png"}
    assert raised.value.problem in capsys.readouterr().out


def refused(root: Path | None, problem: str, *more, **options) -> None:
    with pytest.raises(InputError, match=problem):
        load_pairs(root, *more, **options)


def test_what_is_missing_or_cannot_be_read(tmp_path, capsys):
    refused(tmp_path / "none", "masks/")
    refused(tmp_path, "masks/")
    write_image(tmp_path / "images alone" / "a.png")
    refused(tmp_path / "images alone", "no pairs of images and masks")
    root = pair_folder(tmp_path / "pairs")
    write_image(root / "images/alone.png")
    refused(root, r"images.alone\.png: there is no mask alone\.png or alone_mask\.png")
    os.rename(root / "images/alone.png", root / "masks/lone.png")
    refused(root, r"masks.lone\.png: there is no image")
    (root / "images/3.png").write_text("nothing")
    splits = load_pairs(root, skip_unreadable=True)
    assert len(splits.train) + len(splits.val) == 9 and "lone.png" in capsys.readouterr().out
    (root / "masks/lone.png").unlink()
    refused(root, r"3\.png: not a readable image")
    np.save(root / "masks/3.npy", LEVELS)
    refused(root, r"3\.(png|npy).* has the same name")


def test_masks_of_0_and_255_and_of_one_class(tmp_path):
    """As many programs save two classes; without a word 255 is unknown. To evaluate on, one class will do."""
    write_pairs(tmp_path, [LEVELS * 0 + 1] * 4)
    refused(tmp_path, "all known pixels are of one class, land", classes=THREE)
    assert len(pairs_in(tmp_path, None, MaskReader(THREE, [255]))) == 4
    levels = np.where(LEVELS == 1, 255, 0).astype(np.uint8)
    write_pairs(tmp_path, [*[levels] * 5, levels | 255])
    house = Classes(("ground", "house"), values=(0, 255))
    refused(tmp_path, r"`background 0` and `NAME 255`")
    refused(tmp_path, r"`background 0` and `NAME 255`", classes=Classes(("ground", "house")))
    refused(tmp_path, "value 255, which is no class's; add a line `NAME 255`", unknown=())
    refused(tmp_path, "house has the value 255, which counts as unknown", classes=house, unknown=[255])
    assert load_pairs(tmp_path, classes=house).train.targets.sum(0).gt(0).all()


def test_an_image_that_its_exif_data_turn_lies_under_its_mask(tmp_path):
    """In crops and as a whole, pixel by pixel: the image shows its own mask."""
    for i in range(4):
        levels = np.kron(np.random.RandomState(i).randint(0, 2, (4, 6)), np.ones((16, 16), int)).astype(np.uint8)
        write_mask(tmp_path / "masks" / f"{i}.png", levels)
        (tmp_path / "images").mkdir(exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6  # stored on its side
        on_its_side = Image.fromarray(255 * levels).convert("RGB").transpose(Image.Transpose.ROTATE_90)
        on_its_side.save(tmp_path / "images" / f"{i}.jpg", exif=exif, quality=95)
    images = load_pairs(tmp_path).train
    for augmentation in ("none", "crop"):
        crop, whole = pair_transforms(32, augmentation, mean=(0,) * 3, std=(1,) * 3)
        for transform, size in ((crop, (32, 32)), (whole, (64, 96))):
            image, mask = data.Transformed(images, transform)[0, 1]
            assert image.shape[1:] == mask.shape == size
            known = mask != UNKNOWN
            assert (((image.mean(0) > 0.5) == mask)[known]).float().mean() > 0.99


# ------------------------------------------------------------------------------------------------------------ classes

CLASS_FILES = {
    "sea\nland\nice\n": Classes(("sea", "land", "ice")),
    "open sea\npaved area": Classes(("open sea", "paved area")),
    "name,value\nsea,7\nopen land,-1\n": Classes(("sea", "open land"), values=(7, -1)),
    "sea 1\nland\t2\nunknown 0": Classes(("sea", "land"), values=(1, 2), unknown=(0,)),
    "name,r,g,b\nsea,0,0,255\nland,0, 200, 0\nUnknown,9,9,9": Classes(
        ("sea", "land"), colours=((0, 0, 255), (0, 200, 0)), unknown=((9, 9, 9),)
    ),
    'sea 0 0 255\n"open land" 0 200 0': Classes(("sea", "open land"), colours=((0, 0, 255), (0, 200, 0))),
    "\ufeffclass A\nclass B\n": Classes(("class A", "class B")),
}


@pytest.mark.parametrize("text", CLASS_FILES)
def test_files_of_classes(text, tmp_path):
    (tmp_path / "classes.csv").write_text(text, encoding="utf-8")
    assert read_classes([str(tmp_path / "classes.csv")]) == CLASS_FILES[text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sea\n", "1 classes"),
        ("", "0 classes"),
        ("sea 1\nland", "mixed"),
        ("sea 1\nland 1 2 3", "mixed"),
        ("sea 1\nland 1", "2 lines have the value or colour"),
        ("sea\nsea", "2 lines have the name sea"),
        ("sea 1 2 300\nland 1 2 3", "sea 1 2 300"),
        ("a,1,2,3,4\nb,1,2,3,4", "is not `name`"),
        ("sea 1\nland 99999", "land 99999"),
        ("sea 1\nland " + "9" * 5000, "mixed"),
        ("\0", "1 classes"),
    ],
)
def test_files_that_name_no_classes(text, message, tmp_path):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        read_classes([str(tmp_path / "classes.txt")])


def test_names_of_classes():
    assert read_classes(None) is None
    assert read_classes(["sea", "land"]) == read_classes(["sea,land"]) == Classes(("sea", "land"))


def test_colours_are_apart_and_what_is_unknown_is_grey():
    many = palette(256)
    assert np.array_equal(palette(9), many[:9])
    distances = np.linalg.norm(many[:, None] - many[None], axis=2) + np.eye(256)
    assert distances.min() > 0.07
    in_8_bits = masks.coloured(torch.tensor([[156]], dtype=torch.uint8), many)  # -100 in 8 bits is 156
    assert np.array_equal(in_8_bits[0, 0], many[156])
    picture = masks.coloured(torch.tensor([[0, UNKNOWN, 2]]), palette(3))
    assert picture.shape == (1, 3, 3) and np.array_equal(picture[0, 2], many[2])
    assert picture[0, 1].tolist() == [0.6] * 3
    assert np.array_equal(palette(2, [(255, 0, 0), (0, 0, 51)]), [[1, 0, 0], [0, 0, 0.2]])


# ---------------------------------------------------------------------------------------------------- where pairs lie


def write_pair(root: Path, image: str, mask: str, seed: int, rare: bool = False) -> None:
    write_image(root / image, (8, 6), seed)
    levels = np.random.RandomState(seed).randint(0, 2, (6, 8)).astype(np.uint8)
    if rare:
        levels[0, 0] = 2
    levels[5, 7] = 255
    write_mask(root / mask, levels)


def pair_folder(root: Path, count: int = 10) -> Path:
    for i in range(count):
        write_pair(root, f"images/{i}.png", f"masks/{i}.png", i)
    return root


LAYOUTS = {
    "parts": ("train/images/{}.jpg", "train/masks/{}.png", "val/images/{}.jpg", "val/masks/{}.png"),
    "valid": ("train/images/{}.jpg", "train/labels/{}_label.png", "valid/images/{}.png", "valid/mask/{}.png"),
    "ADE20K": ("images/training/{}.jpg", "annotations/training/{}.png", "images/validation/{}.jpg",
               "annotations/validation/{}.png"),
    "nested": ("images/train/a/{}.jpg", "masks/train/a/{}_gt.png", "images/test/b/{}.jpg", "masks/test/b/{}_seg.png"),
    "suffixes": ("train/{}_image.png", "train/{}_mask.png", "val/a/{}.png", "val/a/{}_labels.png"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_in_two_parts(layout, tmp_path):
    image, mask, val_image, val_mask = LAYOUTS[layout]
    for i in range(6):
        write_pair(tmp_path, image.format(i), mask.format(i), i)
        write_pair(tmp_path, val_image.format(i + 9), val_mask.format(i + 9), i + 9)
    splits = load_pairs(tmp_path, classes=THREE)
    assert splits.class_names == ["sea", "land", "ice"]
    for images, expected in zip(splits[:2], ([0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 9]), strict=True):
        numbers = [int(Path(images.name(i)).stem.split("_")[0]) for i in range(len(images))]
        assert numbers == expected
        for i, number in enumerate(numbers):
            levels = np.random.RandomState(number).randint(0, 2, (6, 8))
            assert np.array_equal(images.mask(i).numpy().ravel()[:-1], levels.ravel()[:-1])
    validation = load_pairs(tmp_path, classes=THREE, eval_split="validation")
    assert len(validation.train) + len(validation.val) == 6
    evaluated = pairs_in(tmp_path, None, MaskReader(THREE))  # no image that trained
    assert list(evaluated.relative_names()) == list(splits.val.relative_names())


@pytest.mark.parametrize(("image", "mask"), [("images/{}.png", "masks/{}.png"), ("{}_img.png", "{}_seg.png")])
def test_one_set_is_split_by_the_rarest_class(image, mask, tmp_path):
    for i in range(60):
        write_pair(tmp_path, image.format(i), mask.format(i), i, rare=i % 12 == 0)
    splits = load_pairs(tmp_path)
    assert splits.class_names == ["class 0", "class 1", "class 2"]
    for images in splits[:2]:
        assert [label == 2 for label in images.labels] == (images.targets[:, 2] > 0).tolist()
        assert 2 in images.labels
    trained = names_in(splits.train)
    assert not trained & names_in(splits.val) and 5 <= len(splits.val) <= 20
    inner = load_pairs(tmp_path, eval_split="validation")
    assert names_in(inner.train) | names_in(inner.val) == trained
    held_out = [names_in(load_pairs(tmp_path, folds=f"{part}/5").val) for part in range(1, 6)]
    assert sorted(map(len, held_out)) == [12] * 5 and len(set.union(*held_out)) == 60
    few = splits.train.at_most(7)
    assert len(few) == 7 and 2 in few.labels


@pytest.fixture
def listed(tmp_path) -> list[str]:
    """The lines of twenty pairs; the images of each fifth lie in one folder."""
    rows = []
    for i in range(20):
        write_pair(tmp_path, f"x/f{i % 5}/{i}.png", f"y/{i}.tif", i)
        rows.append(f"x/f{i % 5}/{i}.png,y/{i}.tif")
    return rows


def test_pairs_of_a_list_are_split_by_groups(tmp_path, listed):
    with_fields = [f"{row},field{i % 4}" for i, row in enumerate(listed)]
    (tmp_path / "all.csv").write_text("\n".join(["image,mask,field", *with_fields]))
    write_image(tmp_path / "x/f0/0.png")  # of 12 pixels
    tifffile.imwrite(tmp_path / "y/0.tif", LEVELS)
    splits = load_pairs(None, [tmp_path / "all.csv"], group_by="field")
    assert splits.train.source.largest == 48 > splits.train.targets.sum(1).max()  # with unknown pixels
    assert len(splits.train) + len(splits.val) == 20
    assert not set(splits.train.groups) & set(splits.val.groups)
    (tmp_path / "all.txt").write_text("\n".join(listed))
    by_folder = load_pairs(tmp_path, [tmp_path / "all.txt"], group_by="2")
    assert set(by_folder.train.groups) | set(by_folder.val.groups) == {f"f{i}" for i in range(5)}


def test_two_lists_are_two_sets(tmp_path, listed, capsys):
    lists = [tmp_path / "train.txt", tmp_path / "val.txt"]
    lists[0].write_text("\n".join(listed[:15]))
    lists[1].write_text("\n".join(listed[15:]))
    splits = load_pairs(None, lists)
    assert (len(splits.train), len(splits.val)) == (15, 5)
    assert len(pairs_in(ImageList(lists[1]), None, MaskReader(None, [255]))) == 5
    assert "left alone" not in capsys.readouterr().out
    splits = load_pairs(None, lists, eval_split="validation")
    assert len(splits.train) + len(splits.val) == 15
    assert "is left alone" in capsys.readouterr().out


def test_a_list_names_masks_as_the_file_system_does(tmp_path):
    name = unicodedata.normalize("NFD", "forêt, 1.png")  # as a Mac writes it; on Linux another name than in NFC
    write_pair(tmp_path, f"x/{name}", f"y/{name}", 0)
    (tmp_path / "all.csv").write_text(f'"x/{name}","y/{name}"\n', encoding="utf-8")
    assert len(pairs_in(ImageList(tmp_path / "all.csv"), None, MaskReader(None))) == 1


def test_a_folder_for_evaluation_elsewhere(tmp_path):
    pair_folder(tmp_path / "a")
    pair_folder(tmp_path / "b", 4)
    splits = load_pairs(tmp_path / "a", val_dir=tmp_path / "b")
    assert (len(splits.train), len(splits.val)) == (10, 4)
    validation = load_pairs(tmp_path / "a", val_dir=tmp_path / "b", eval_split="validation")
    assert len(validation.train) + len(validation.val) == 10
    os.rename(tmp_path / "a", tmp_path / "train")
    refused(tmp_path, "has train/ but no val/")
    assert len(load_pairs(tmp_path, folds="1/5").val) == 2


def test_bands_and_their_masks(tmp_path):
    rng = np.random.RandomState(0)
    for place in ("images", "masks"):
        (tmp_path / place).mkdir()
    for i in range(6):
        tifffile.imwrite(tmp_path / f"images/{i}.tif", rng.randint(0, 99, (5, 6, 8)).astype(np.uint16))
        np.save(tmp_path / f"masks/{i}.npy", rng.randint(0, 3, (6, 8)))
    images = load_pairs(tmp_path, bands=Bands(5)).train
    image, mask = images[1]
    assert image.shape == (6, 8, 5) and mask.shape == (6, 8)
    assert images.picture(1, 1).shape == (6, 8, 3)


def test_digests_follow_names_of_images_and_pixels_of_masks(tmp_path):
    folders = {name: pair_folder(tmp_path / name, 4) for name in ("same", "mask", "pixel", "image")}
    os.rename(folders["mask"] / "masks/3.png", folders["mask"] / "masks/3_mask.png")
    for kind in ("images", "masks"):
        os.rename(folders["image"] / kind / "3.png", folders["image"] / kind / "33.png")
    levels = np.array(Image.open(folders["pixel"] / "masks/3.png"))
    levels[0, 0] = 1 - levels[0, 0]
    write_mask(folders["pixel"] / "masks/3.png", levels)
    digests = {name: load_pairs(folder).digest() for name, folder in folders.items()}
    assert digests["same"] == digests["mask"]
    assert len({*digests.values()}) == 3


def test_targets_count_the_pixels_that_evaluation_sees(tmp_path):
    images = load_pairs(pair_folder(tmp_path), classes=THREE).train
    whole = data.Transformed(images, pair_transforms(4, "crop", mean=(0.5,) * 3, std=(0.5,) * 3)[1])
    for i in range(len(images)):
        image, mask = whole[i]
        levels = torch.from_numpy(np.asarray(images[i][0]).copy()).permute(2, 0, 1)
        torch.testing.assert_close(image, levels / 127.5 - 1)
        known = mask[mask != UNKNOWN]
        assert torch.equal(torch.bincount(known, minlength=3).float(), images.targets[i])
        np.testing.assert_allclose(images.picture(i, 2), levels.permute(1, 2, 0)[::2, ::2] / 255)


# ------------------------------------------------------------------------------------------------- one draw for both


def ramp(height: int, width: int) -> tuple[np.ndarray, torch.Tensor]:
    """Levels that rise by 1 from pixel to pixel, to the right and downwards, and a mask of the same numbers."""
    mask = np.add.outer(np.arange(height), np.arange(width))
    return mask.astype(np.float32), torch.from_numpy(mask)


def crop_of_two_bands(size: int, augmentation: str):
    return pair_transforms(size, augmentation, mean=(0,) * 2, std=(1,) * 2, bands=Bands(2))[0]


@pytest.mark.parametrize("augmentation", ["crop", "none"])
@pytest.mark.parametrize(("height", "width"), [(100, 120), (40, 130), (20, 17)])
@pytest.mark.parametrize(("channels", "scale"), [(3, 255), (5, 10)])
def test_image_and_mask_stay_together(channels, scale, height, width, augmentation):
    """The image is made of its own mask; each known pixel still has its level, to half a pixel of the original."""
    levels, mask = ramp(height, width)
    bands = Bands(5, scale=10.0)
    image = np.stack([levels] * channels, axis=2)
    if channels == 3:
        bands = None
        image = Image.fromarray(image.astype(np.uint8))
    crop = pair_transforms(32, augmentation, mean=(0.1,) * channels, std=(0.25,) * channels, bands=bands)[0]
    flipped = set()
    for seed in range(16):
        torch.manual_seed(seed)
        found, classes = crop(image, mask)
        assert found.shape == (channels, 32, 32) and classes.shape == (32, 32) and found.dtype == torch.float32
        found = (found * 0.25 + 0.1) * scale
        known = classes != UNKNOWN
        inner = F.avg_pool2d(known[None].float(), 5, 1, 2)[0] == 1  # at the border pixels of the window are repeated
        assert (found[:, inner] - classes[inner]).abs().max() <= (0.01 if augmentation == "none" else 1.6)
        flipped.add(bool(classes.diff(dim=1)[inner[:, 1:]].float().mean() < 0))
        if augmentation == "none" and min(height, width) > 32:
            assert known.all()
        if augmentation == "none" and max(height, width) < 32:
            assert known.sum() == height * width
            assert found.amax() <= height + width  # the border is repeated
    assert flipped == ({True, False} if augmentation == "crop" else {False})


@pytest.mark.parametrize("augmentation", ["crop", "none"])
def test_a_crop_has_a_known_pixel_wherever_these_are(augmentation):
    """Of a scene in which a few points were visited on the ground."""
    mask = torch.full((300, 200), UNKNOWN)
    for row, column in ((0, 0), (299, 199), (150, 20)):
        mask[row : row + 3, column : column + 3] = 1
    crop = crop_of_two_bands(32, augmentation)
    image = (mask == 1).float().numpy()[..., None].repeat(2, 2)
    torch.manual_seed(0)
    columns = []
    for _ in range(60):
        found, classes = crop(image, mask)
        known = classes == 1
        assert (found[:, known] > 0).all()
        columns.append(set(known.any(0).nonzero().flatten().tolist()))
    assert sum(map(bool, columns)) > (50 if augmentation == "crop" else 59)  # a smaller crop may leave out one pixel
    assert len(set.union(*columns)) > 20  # anywhere in the crop


def test_places_and_zooms_vary():
    levels, mask = ramp(100, 120)
    image = np.stack([levels] * 2, axis=2)
    crop = crop_of_two_bands(32, "crop")
    spans = []
    corners = []
    torch.manual_seed(0)
    for _ in range(200):
        _, classes = crop(image, mask)
        spans.append((classes[-1, 0] - classes[0, 0]).item() / 31)  # pixels of the image for one of the crop
        corners.append(classes[0].min().item())
    assert 0.45 < min(spans) < 0.55 and 1.9 < max(spans) < 2.1
    assert abs(np.mean(np.log2(spans))) < 0.1  # as often smaller as larger
    assert min(corners) < 15 and max(corners) > 150


def test_a_batch_of_images_of_several_sizes_is_a_list():
    image = torch.zeros(3, 6, 8)
    mask = torch.zeros(6, 8)
    images, classes = masks.collate_pairs([(image, mask)] * 3)
    assert images.shape == (3, 3, 6, 8) and classes.shape == (3, 6, 8)
    images, classes = masks.collate_pairs([(image, mask), (image[:, 1:], mask[1:])])
    assert [len(classes[0]), len(classes[1]), len(images)] == [6, 5, 2]


def test_a_crop_of_known_pixels_stays_where_it_is_drawn():
    """Only one that shows nothing known is drawn anew: else pixels in the middle would be seen more often."""
    crop = crop_of_two_bands(16, "none")
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(60), indexing="ij")
    image = torch.stack([rows, columns], 2).float().numpy()
    for seed in range(5):
        torch.manual_seed(seed)
        found, _ = crop(image, torch.zeros(40, 60, dtype=torch.long))
        torch.manual_seed(seed)
        expected = [torch.randint(0, length - 16 + 1, ()).item() for length in (40, 60)]
        assert found[:, 0, 0].tolist() == expected
