"""toolkit/images/masks.py: formats and faults of masks, where pairs lie, how they are split, one draw for both."""

import os
import unicodedata
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.image_files import bytes_of, oriented, png_of, save_image
from toolkit import NO_LABEL, InputError
from toolkit.images import data, masks, sources
from toolkit.images.bands import Bands
from toolkit.images.lists import ImageList
from toolkit.images.masks import Classes, MaskedImages, MaskReader, pairs_in, palette, read_classes

tifffile = pytest.importorskip("tifffile")

LEVELS = np.array([[0, 1, 2, 255], [2, 2, 0, 1], [1, 255, 0, 0]], np.uint8)
EXPECTED = np.where(LEVELS == 255, NO_LABEL, LEVELS.astype(int))
THREE = Classes(("sea", "land", "ice"))
COLOURS = ((0, 0, 255), (0, 200, 0), (255, 255, 255))
BLACK_LAST = Classes(("cell", "ground"), colours=((255, 255, 255), (0, 0, 0)))
IN_COLOURS = Classes(("sea", "land", "ice"), colours=COLOURS, unknown=((9, 9, 9),))
TWO_BANDS = {"mean": (0, 0), "std": (1, 1), "bands": Bands(2)}
TABLE = np.full((256, 3), 9, np.uint8)
TABLE[:3] = COLOURS
RGB = TABLE[LEVELS]


def levels_of(seed: int, rare: bool = False) -> np.ndarray:
    """6 x 8 pixels of two classes, or three; the last one is unknown."""
    levels = np.random.RandomState(seed).randint(0, 2, (6, 8)).astype(np.uint8)
    levels[5, 7] = 255
    if rare:
        levels[0, 0] = 2
    return levels


def write_pair(root: Path, image: str, mask: str, levels: np.ndarray, seed: int = 0) -> None:
    save_image(root / image, np.random.RandomState(seed).randint(0, 256, (*levels.shape[:2], 3), dtype=np.uint8))
    save_image(root / mask, levels)


def write_pairs(root: Path, masks: Iterable[np.ndarray]) -> Path:
    for i, levels in enumerate(masks):
        write_pair(root, f"images/{i}.png", f"masks/{i}.png", levels, i)
    return root


def load_pairs(data_dir=None, data_list=None, classes=None, unknown=None, **more) -> sources.Splits:
    reader = MaskReader(classes, unknown)
    return sources.load_splits("imagefolder", data_dir, data_list=data_list, task="segmentation", masks=reader, **more)


def refused(root: Path | None, problem: str, **options) -> None:
    with pytest.raises(InputError, match=problem):
        load_pairs(root, **options)


def save_with_overview(path: Path) -> None:
    with tifffile.TiffWriter(path) as writer:
        writer.write(LEVELS, subifds=0, metadata=None)
        writer.write(LEVELS[::2, ::2], subfiletype=1, metadata=None)


RGBA = np.dstack([RGB, np.full((3, 4), 255, np.uint8)])
OF_ANY_COLOURS = Image.fromarray(LEVELS)
OF_ANY_COLOURS.putpalette(np.random.RandomState(0).randint(0, 256, 768).tolist())
# What writes the file, the classes, and what is read.
FORMATS = {
    "l.png": (Image.fromarray(LEVELS).save, None, EXPECTED),
    "p.png": (OF_ANY_COLOURS.save, None, EXPECTED),
    "16.png": (Image.fromarray(LEVELS.astype(np.uint16)).save, THREE, EXPECTED),
    "signed.tif": (partial(tifffile.imwrite, data=LEVELS.astype(np.int16)), None, EXPECTED),
    "float.tif": (partial(tifffile.imwrite, data=LEVELS.astype(np.float32)), None, EXPECTED),
    "white_is_zero.tif": (partial(tifffile.imwrite, data=LEVELS, photometric="miniswhite"), None, EXPECTED),
    "overviews.tif": (save_with_overview, None, EXPECTED),
    "one_band.tif": (partial(tifffile.imwrite, data=LEVELS[None], photometric="minisblack"), None, EXPECTED),
    "first.npy": (partial(np.save, arr=LEVELS[None].astype(np.int16)), None, EXPECTED),
    "last.npy": (partial(np.save, arr=LEVELS[..., None]), None, EXPECTED),
    # The colour says the class, whatever its number in the file.
    "rgb.png": (Image.fromarray(RGB).save, IN_COLOURS, EXPECTED),
    "a row with alpha.png": (Image.fromarray(RGBA[:1]).save, IN_COLOURS, EXPECTED[:1]),
    "a palette of the colours that there are.png": (Image.fromarray(RGB).quantize(8).save, IN_COLOURS, EXPECTED),
    "one bit.png": (Image.fromarray(LEVELS == 2).save, None, LEVELS == 2),
    "black and white.png": (Image.fromarray(LEVELS == 2).save, BLACK_LAST, LEVELS != 2),
    "greys.png": (Image.fromarray((LEVELS == 2) * np.uint8(255)).save, BLACK_LAST, LEVELS != 2),
}


@pytest.mark.parametrize("name", FORMATS)
def test_masks_of_all_formats(name, tmp_path):
    write, classes, expected = FORMATS[name]
    write(tmp_path / name)
    assert np.array_equal(MaskReader(classes)(str(tmp_path / name)), expected)


@pytest.mark.parametrize("bits", [2, 4])
def test_numbers_of_few_bits_are_what_the_file_has(bits, tmp_path):
    """Pillow spreads greys over 0 to 255: 1 becomes 85 or 17, and the largest 255."""
    levels = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.uint8)
    packed = np.packbits(np.unpackbits(levels[..., None], axis=2)[..., -bits:].reshape(2, -1), axis=1)
    (tmp_path / "m.png").write_bytes(png_of(4, 2, bits, 0, b"".join(b"\0" + row.tobytes() for row in packed)))
    assert np.array_equal(MaskReader(None)(str(tmp_path / "m.png")), levels)
    greys = Classes(("a", "b", "c", "d"), colours=tuple((255 // (2**bits - 1) * i,) * 3 for i in (3, 2, 1, 0)))
    assert np.array_equal(MaskReader(greys)(str(tmp_path / "m.png")), 3 - levels)  # as an RGB image of such greys


def test_values_that_are_no_numbers_of_classes(tmp_path):
    path = str(save_image(tmp_path / "m.tif", np.array([[-1, 30000], [7, -9999]], np.int32)))
    classes = Classes(("a", "b"), values=(7, 30000))
    for unknown in ([-1, -9999], [-1, -9999, 7.5]):  # which is not 7
        assert MaskReader(classes, unknown)(path).tolist() == [[NO_LABEL, 1], [0, NO_LABEL]]
    tifffile.imwrite(path, np.array([[7, -3.4e38]], np.float32))
    assert MaskReader(classes, [-(10**38)])(path).tolist() == [[0, NO_LABEL]]


# The suffix and the content of the mask, the classes, and what the message says besides the name of the mask.
FAULTS = {
    "jpeg": (".png", bytes_of(Image.fromarray(LEVELS).save, "JPEG"), None, "format JPEG"),
    "rgb": (".png", RGB, None, "`name r g b`"),
    "colour": (".png", RGB // 2, IN_COLOURS, "colour 0 0 127, which is no class's"),
    "value": (".png", LEVELS % 254 + 5, THREE, "value 5, which is no class's"),
    "negative": (".npy", LEVELS - 1.0, None, "--unknown-value -1"),
    "large": (".npy", LEVELS * np.int64(999), None, "`NAME 999`"),
    "decimals": (".npy", LEVELS / 2, THREE, "decimals"),
    "nan": (".npy", LEVELS * np.nan, THREE, "NaN"),
    "pages": (".tif", np.zeros((5, 3, 7), np.uint8), THREE, "it has uint8 (3, 7, 5)"),
    "numbers": (".npy", LEVELS, IN_COLOURS, "a mask of numbers"),
    "text": (".png", b"no image", THREE, "not a readable image"),
    "size": (".png", LEVELS[:2], THREE, "the mask is 4x2, and its image (upright) 4x3"),
    "unknown": (".png", LEVELS * 0 + 255, THREE, "all pixels are unknown"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_mask_is_one_line(fault, tmp_path, capsys):
    suffix, content, classes, message = FAULTS[fault]
    write_pairs(tmp_path, [RGB if classes is IN_COLOURS else LEVELS] * 3)
    (tmp_path / "masks/1.png").unlink()
    path = tmp_path / f"masks/1{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_image(path, content)
    with pytest.raises(InputError, match=r"masks.1\.(png|npy|tif): ") as raised:
        load_pairs(tmp_path, classes=classes)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    splits = load_pairs(tmp_path, classes=classes, skip_unreadable=True)
    assert {Path(images.name(0)).name for images in splits[:2]} == {"0.png", "2.png"}
    assert raised.value.problem in capsys.readouterr().out


def test_what_is_missing_or_cannot_be_read(tmp_path, capsys):
    refused(tmp_path / "none", "masks/")
    refused(tmp_path, "masks/")
    save_image(tmp_path / "images alone" / "a.png", RGB)
    refused(tmp_path / "images alone", "no pairs of images and masks")
    root = write_pairs(tmp_path / "pairs", map(levels_of, range(10)))
    save_image(root / "images/alone.png", RGB)
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
    for i in range(4):
        levels = np.kron(np.random.RandomState(i).randint(0, 2, (4, 6)), np.ones((16, 16), int)).astype(np.uint8)
        save_image(tmp_path / f"masks/{i}.png", levels)
        on_its_side = Image.fromarray(255 * levels).convert("RGB").transpose(Image.Transpose.ROTATE_90)
        save_image(tmp_path / f"images/{i}.jpg", on_its_side, exif=oriented(6), quality=95)
    images = load_pairs(tmp_path).train
    for augmentation in ("none", "crop"):
        crop, *_, whole = MaskedImages.views(32, augmentation, mean=(0,) * 3, std=(1,) * 3)
        for transform, size in ((crop, (32, 32)), (whole, (64, 96))):
            image, mask = data.Transformed(images, transform)[0, 1]
            assert image.shape[1:] == mask.shape == size
            assert (((image.mean(0) > 0.5) == mask)[mask != NO_LABEL]).float().mean() > 0.99


CLASS_FILES = {
    "name,value\nsea,7\nopen land,-1\n": Classes(("sea", "open land"), values=(7, -1)),
    "sea 1\nland\t2\nunknown 0": Classes(("sea", "land"), values=(1, 2), unknown=(0,)),
    "name,r,g,b\na,0,0,255\nb,0, 200, 0\nUnknown,9,9,9": Classes(("a", "b"), None, COLOURS[:2], ((9, 9, 9),)),
    'sea 0 0 255\n"open land" 0 200 0': Classes(("sea", "open land"), colours=COLOURS[:2]),
    "\ufeffclass A\nclass B\n": Classes(("class A", "class B")),
}
NO_CLASSES = {
    "sea\n": "1 classes",
    "sea 1\nland 1 2 3": "mixed",
    "sea 1\nland 1": "2 lines have the value or colour",
    "sea\nsea": "2 lines have the name sea",
    "sea 1 2 300\nland 1 2 3": "sea 1 2 300",
    "a,1,2,3,4\nb,1,2,3,4": "is not `name`",
    "sea 1\nland 99999": "land 99999",
    "sea 1\nland " + "9" * 5000: "mixed",
}


def test_classes_are_words_or_lines_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_classes(None) is None
    assert read_classes(["sea", "land"]) == read_classes(["sea,land"]) == Classes(("sea", "land"))
    path = tmp_path / "classes.csv"
    for text, expected in CLASS_FILES.items():
        path.write_text(text, encoding="utf-8")
        assert read_classes([str(path)]) == read_classes(["~/classes.csv"]) == expected
    for text, message in NO_CLASSES.items():
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_classes([str(path)])


def test_colours_are_apart_and_what_is_unknown_is_grey():
    many = palette(256)
    assert np.array_equal(palette(9), many[:9])
    assert (np.linalg.norm(many[:, None] - many[None], axis=2) + np.eye(256)).min() > 0.07
    in_8_bits = masks.coloured(torch.tensor([[156]], dtype=torch.uint8), many)  # -100 in 8 bits is 156
    assert np.array_equal(in_8_bits[0, 0], many[156])
    picture = masks.coloured(torch.tensor([[0, NO_LABEL, 2]]), palette(3))
    assert np.array_equal(picture, [[many[0], [0.6] * 3, many[2]]])
    assert np.array_equal(palette(2, [(255, 0, 0), (0, 0, 51)]), [[1, 0, 0], [0, 0, 0.2]])


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
        write_pair(tmp_path, image.format(i), mask.format(i), levels_of(i))
        write_pair(tmp_path, val_image.format(i + 9), val_mask.format(i + 9), levels_of(i + 9))
    splits = load_pairs(tmp_path, classes=THREE)
    assert splits.class_names == ["sea", "land", "ice"] and len(splits.train) == len(splits.val) == 6
    for images, numbers in zip(splits[:2], ([0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 9]), strict=True):
        for i, number in enumerate(numbers):
            assert Path(images.name(i)).stem.removesuffix("_image") == str(number)
            assert np.array_equal(images.mask(i).numpy().ravel()[:-1], levels_of(number).ravel()[:-1])
    validation = load_pairs(tmp_path, classes=THREE, eval_split="validation")
    assert len(validation.train) + len(validation.val) == 6
    evaluated = pairs_in(tmp_path, None, MaskReader(THREE))  # no image that trained
    assert list(evaluated.relative_names()) == list(splits.val.relative_names())


@pytest.mark.parametrize(("image", "mask"), [("images/{}.png", "masks/{}.png"), ("{}_img.png", "{}_seg.png")])
def test_one_set_is_split_by_the_rarest_class(image, mask, tmp_path):
    for i in range(60):
        write_pair(tmp_path, image.format(i), mask.format(i), levels_of(i, rare=i % 12 == 0))
    splits = load_pairs(tmp_path)
    assert splits.class_names == ["class 0", "class 1", "class 2"]
    for images in splits[:2]:
        assert np.equal(images.labels, 2).tolist() == (images.targets[:, 2] > 0).tolist()
        assert 2 in images.labels
    trained = {*splits.train.relative_names()}
    assert trained.isdisjoint(splits.val.relative_names()) and 5 <= len(splits.val) <= 20
    inner = load_pairs(tmp_path, eval_split="validation")
    assert {*inner.train.relative_names(), *inner.val.relative_names()} == trained
    held_out = [[*load_pairs(tmp_path, folds=f"{part}/5").val.relative_names()] for part in range(1, 6)]
    assert list(map(len, held_out)) == [12] * 5 and len(set().union(*held_out)) == 60
    few = splits.train.at_most(7)
    assert len(few) == 7 and 2 in few.labels


def test_pairs_of_a_list_are_split_by_groups_and_those_of_two_lists_are_two_sets(tmp_path, capsys):
    rows = []
    for i in range(20):
        rows.append(f"x/f{i % 5}/{i}.png,y/{i}.tif")
        write_pair(tmp_path, *rows[i].split(","), levels_of(i) if i else LEVELS)
    with_fields = [f"{row},field{i % 4}" for i, row in enumerate(rows)]
    (tmp_path / "all.csv").write_text("\n".join(["image,mask,field", *with_fields]))
    splits = load_pairs(None, [tmp_path / "all.csv"], group_by="field")
    assert splits.train.source.largest == 48 > splits.train.targets.sum(1).max()  # with unknown pixels
    assert len(splits.train) + len(splits.val) == 20
    assert not set(splits.train.groups) & set(splits.val.groups)
    (tmp_path / "all.txt").write_text("\n".join(rows))
    by_folder = load_pairs(tmp_path, [tmp_path / "all.txt"], group_by="2")
    assert set(by_folder.train.groups) | set(by_folder.val.groups) == {"f0", "f1", "f2", "f3", "f4"}

    lists = [tmp_path / "train.txt", tmp_path / "val.txt"]
    lists[0].write_text("\n".join(rows[:15]))
    lists[1].write_text("\n".join(rows[15:]))
    splits = load_pairs(None, lists)
    assert (len(splits.train), len(splits.val)) == (15, 5)
    assert len(pairs_in(ImageList(lists[1]), None, MaskReader(None, [255]))) == 5
    assert "left alone" not in capsys.readouterr().out
    splits = load_pairs(None, lists, eval_split="validation")
    assert len(splits.train) + len(splits.val) == 15
    assert "is left alone" in capsys.readouterr().out

    name = unicodedata.normalize("NFD", "forêt, 1.png")  # as a Mac writes it; on Linux another name than in NFC
    write_pair(tmp_path, f"x/{name}", f"y/{name}", LEVELS)
    lists[0].write_text(f'"x/{name}","y/{name}"\n', encoding="utf-8")
    assert len(pairs_in(ImageList(lists[0]), None, MaskReader(None))) == 1


def test_a_folder_for_evaluation_elsewhere(tmp_path):
    write_pairs(tmp_path / "a", map(levels_of, range(10)))
    write_pairs(tmp_path / "b", map(levels_of, range(4)))
    splits = load_pairs(tmp_path / "a", val_dir=tmp_path / "b")
    assert (len(splits.train), len(splits.val)) == (10, 4)
    validation = load_pairs(tmp_path / "a", val_dir=tmp_path / "b", eval_split="validation")
    assert len(validation.train) + len(validation.val) == 10
    os.rename(tmp_path / "a", tmp_path / "train")
    refused(tmp_path, "has train/ but no val/")
    assert len(load_pairs(tmp_path, folds="1/5").val) == 2


def test_digests_follow_names_of_images_and_pixels_of_masks(tmp_path):
    found = []
    for image, mask, pixel in (("3", "3", 0), ("3", "3_mask", 0), ("3", "3", 1), ("33", "33", 0)):
        root = write_pairs(tmp_path / f"{mask} {pixel}", map(levels_of, range(3)))
        levels = levels_of(3)
        levels[0, 0] = pixel
        write_pair(root, f"images/{image}.png", f"masks/{mask}.png", levels)
        found.append(load_pairs(root).digest())
    first, of_another_mask_s_name, *others = found
    assert first == of_another_mask_s_name and len({first, *others}) == 3


def test_targets_count_the_pixels_that_evaluation_sees(tmp_path):
    images = load_pairs(write_pairs(tmp_path, map(levels_of, range(10))), classes=THREE).train
    whole = data.Transformed(images, images.views(4, "crop", mean=(0.5,) * 3, std=(0.5,) * 3)[-1])
    for i, (image, mask) in enumerate(whole):
        levels = torch.from_numpy(np.asarray(images[i][0]).copy()).permute(2, 0, 1)
        torch.testing.assert_close(image, levels / 127.5 - 1)
        assert torch.equal(torch.bincount(mask[mask != NO_LABEL], minlength=3).float(), images.targets[i])
        np.testing.assert_allclose(images.picture(i, 2), levels.permute(1, 2, 0)[::2, ::2] / 255)


def ramp(height: int, width: int, channels: int) -> tuple[np.ndarray, torch.Tensor]:
    """Levels that rise by 1 from pixel to pixel, to the right and downwards, and a mask of the same numbers."""
    mask = np.add.outer(np.arange(height), np.arange(width))
    return np.stack([mask.astype(np.float32)] * channels, axis=2), torch.from_numpy(mask)


@pytest.mark.parametrize("augmentation", ["crop", "none"])
@pytest.mark.parametrize(("height", "width"), [(100, 120), (40, 130), (20, 17)])
@pytest.mark.parametrize(("channels", "scale"), [(3, 255), (5, 10)])
def test_image_and_mask_stay_together(channels, scale, height, width, augmentation):
    """The image is made of its own mask; each known pixel still has its level, to half a pixel of the original."""
    image, mask = ramp(height, width, channels)
    bands = Bands(5, scale=10.0)
    if channels == 3:
        bands = None
        image = Image.fromarray(image.astype(np.uint8))
    crop, *_ = MaskedImages.views(32, augmentation, mean=(0.1,) * channels, std=(0.25,) * channels, bands=bands)
    flipped = set()
    for seed in range(16):
        torch.manual_seed(seed)
        found, classes = crop(image, mask)
        assert found.shape == (channels, 32, 32) and classes.shape == (32, 32) and found.dtype == torch.float32
        found = (found * 0.25 + 0.1) * scale
        known = classes != NO_LABEL
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
    mask = torch.full((300, 200), NO_LABEL)
    for row, column in ((0, 0), (299, 199), (150, 20)):
        mask[row : row + 3, column : column + 3] = 1
    crop, *_ = MaskedImages.views(32, augmentation, **TWO_BANDS)
    image = (mask == 1).float().numpy()[..., None].repeat(2, 2)
    columns = []
    for _ in range(60):
        found, classes = crop(image, mask)
        known = classes == 1
        assert (found[:, known] > 0).all()
        columns.append(set(known.any(0).nonzero().flatten().tolist()))
    assert sum(map(bool, columns)) > (50 if augmentation == "crop" else 59)  # a smaller crop may leave out one pixel
    assert len(set.union(*columns)) > 20  # anywhere in the crop


def test_places_and_zooms_vary_and_a_crop_of_known_pixels_stays_where_it_is_drawn():
    image, mask = ramp(100, 120, 2)
    crop, *_ = MaskedImages.views(32, "crop", **TWO_BANDS)
    spans = []
    corners = []
    for _ in range(200):
        _, classes = crop(image, mask)
        spans.append((classes[-1, 0] - classes[0, 0]).item() / 31)  # pixels of the image for one of the crop
        corners.append(classes[0].min().item())
    assert 0.45 < min(spans) < 0.55 and 1.9 < max(spans) < 2.1
    assert abs(np.mean(np.log2(spans))) < 0.1  # as often smaller as larger
    assert min(corners) < 15 and max(corners) > 150
    # Only a crop that shows nothing known is drawn anew: else pixels in the middle would be seen more often.
    crop, *_ = MaskedImages.views(16, "none", **TWO_BANDS)
    image = np.indices((40, 60)).transpose(1, 2, 0).astype(np.float32)  # each pixel's row and column
    for seed in range(5):
        torch.manual_seed(seed)
        found, _ = crop(image, (torch.arange(60) % 2 * NO_LABEL).expand(40, 60))  # half of it is known
        torch.manual_seed(seed)
        assert found[:, 0, 0].tolist() == [torch.randint(0, length - 16 + 1, ()).item() for length in (40, 60)]
