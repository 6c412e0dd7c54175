"""moco/data.py: splits, image modes, augmentations, loaders."""

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin
from torchvision import datasets
from torchvision import transforms as T

from moco import InputError, data

ROOT = Path(__file__).parents[1]


def write_images(folder, names="abc", colour=(200, 100, 50), size=(6, 5)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size, colour).save(folder / f"{name}.png")


@pytest.fixture(scope="module")
def digits():
    return data.load_splits("digits"), data.load_splits("digits", eval_split="validation")


def indices(images) -> set[int]:
    return set(images.indices)


def test_digits_are_all_there_and_stratified(digits):
    splits, _ = digits
    assert len(splits.train) + len(splits.val) == 1797 and len(splits.val) == pytest.approx(1797 / 5, abs=5)
    assert indices(splits.train).isdisjoint(indices(splits.val))
    assert splits.class_names == list("0123456789")
    for images, share in ((splits.train, 0.8), (splits.val, 0.2)):
        counts = np.bincount(images.labels) / np.bincount(splits.train.labels + splits.val.labels)
        assert counts == pytest.approx(share, abs=0.01)
    image, label = splits.train[0]
    assert image.mode == "RGB" and image.size == (8, 8) and isinstance(label, int)
    assert max(np.asarray(image).max() for image, _ in splits.val) == 255


def test_the_validation_part_comes_out_of_the_training_split(digits):
    splits, validation = digits
    assert indices(validation.train) | indices(validation.val) == indices(splits.train)
    assert indices(validation.train).isdisjoint(indices(validation.val))
    assert set(validation.val.labels) == set(range(10))


def test_the_split_does_not_depend_on_the_seed_but_the_subset_does(digits):
    few = [data.load_splits("digits", labels_per_class=3, seed=seed) for seed in (0, 0, 1)]
    assert all(indices(splits.val) == indices(digits[0].val) for splits in few)
    assert indices(few[0].train) == indices(few[1].train) != indices(few[2].train)
    assert np.bincount(few[0].train.labels).tolist() == [3] * 10
    assert indices(few[2].train) <= indices(digits[0].train)
    with pytest.raises(InputError, match="class 0 has only"):
        data.load_splits("digits", labels_per_class=1000)


def test_digits_refuse_a_data_dir(tmp_path):
    with pytest.raises(InputError, match="use --dataset imagefolder"):
        data.load_splits("digits", data_dir=tmp_path)


def test_a_folder_with_train_and_val(tmp_path):
    for part, names in (("train", "abc"), ("val", "d")):
        for label in ("dog", "cat"):
            write_images(tmp_path / part / label / "deeper", names)
    splits = data.load_splits("imagefolder", tmp_path)
    assert splits.class_names == ["cat", "dog"]
    assert (splits.train.labels, splits.val.labels) == ([0, 0, 0, 1, 1, 1], [0, 1])
    assert splits.train[5][0].getpixel((0, 0)) == (200, 100, 50)


def test_one_set_of_class_folders_is_split_the_same_each_time(tmp_path):
    for label in ("cat", "dog"):
        write_images(tmp_path / label, [str(i) for i in range(50)])
    first, second = (data.load_splits("imagefolder", tmp_path, seed=seed) for seed in (0, 1))
    assert list(first.val.relative_names()) == list(second.val.relative_names()) and first.digest() == second.digest()
    assert set(first.train.relative_names()) | set(first.val.relative_names()) == {
        f"{c}/{i}.png" for c in ("cat", "dog") for i in range(50)
    }
    assert set(first.train.relative_names()).isdisjoint(first.val.relative_names())
    assert np.bincount(first.val.labels) == pytest.approx(10, abs=6)


def test_an_added_image_moves_no_other(tmp_path):
    for label in ("cat", "dog"):
        write_images(tmp_path / label, [str(i) for i in range(20)])
    before = data.load_splits("imagefolder", tmp_path)
    write_images(tmp_path / "cat", ["0a", "more", "zz"])
    write_images(tmp_path / "ant", "abcdef")  # the other classes have other numbers now
    after = data.load_splits("imagefolder", tmp_path)
    for part in ("train", "val"):
        assert set(getattr(before, part).relative_names()) <= set(getattr(after, part).relative_names())
    assert after.digest() != before.digest()


def test_the_digest_knows_files_labels_and_parts_but_not_the_place(tmp_path):
    def digest(**files) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, letters in files.items():
            write_images(folder / name.replace("_", "/"), letters)
        return data.load_splits("imagefolder", folder).digest()

    one = {"train_cat": "ab", "train_dog": "cd", "val_cat": "ef"}
    assert digest(**one) == digest(**one)
    others = [
        one | {"train_cat": "abx"},
        one | {"train_cat": "a"},
        one | {"train_cat": "ax"},
        one | {"val_dog": "f"},
        {"train_cat": "ab", "train_cow": "x", "train_dog": "cd", "val_cat": "ef"},
        {"train_cat": "ef", "train_dog": "cd", "val_cat": "ab"},
    ]
    assert len({digest(**files) for files in (one, *others)}) == 1 + len(others)


def test_the_digest_of_a_set_without_files_is_that_of_its_indices(digits):
    splits, validation = digits
    assert splits.digest() == data.load_splits("digits").digest() != validation.digest()
    two = [("image", 0), ("image", 0)]
    sets = [([0, 0], [0]), ([0, 0], [1]), ([1, 0], [0]), ([0, 0], [0, 1]), ([0, 0], [1, 0])]
    assert len({data.LabelledImages(two, labels, indices).digest for labels, indices in sets}) == len(sets)


def test_a_class_may_lack_validation_images_but_not_training_images(tmp_path):
    write_images(tmp_path / "train" / "cat")
    write_images(tmp_path / "train" / "dog")
    write_images(tmp_path / "val" / "dog")
    splits = data.load_splits("imagefolder", tmp_path)
    assert splits.class_names == ["cat", "dog"] and set(splits.val.labels) == {1}
    (tmp_path / "train" / "eel").mkdir()
    with pytest.raises(InputError, match="no images in eel"):
        data.load_splits("imagefolder", tmp_path)


def test_folders_that_cannot_be_used(tmp_path):
    def problem(data_dir) -> str:
        with pytest.raises(InputError) as error:
            data.load_splits("imagefolder", data_dir)
        return str(error.value)

    assert "needs --data-dir" in problem(None)
    assert "no such folder" in problem(tmp_path / "absent")
    assert "found none" in problem(tmp_path)
    write_images(tmp_path / "train" / "cat")
    assert "no val/" in problem(tmp_path)
    (tmp_path / "val").mkdir()
    assert "found only cat" in problem(tmp_path)
    write_images(tmp_path / "train" / "dog")
    assert "found none" in problem(tmp_path)
    write_images(tmp_path / "val" / "eel")
    assert "classes that" in problem(tmp_path) and "eel" in problem(tmp_path)


def test_an_unknown_data_set():
    with pytest.raises(InputError, match="'digit' is none of digits, imagefolder, cifar10"):
        data.load_splits("digit")


@pytest.mark.parametrize("content", [b"", b"not an image", "half"])
def test_an_unreadable_image_is_named(tmp_path, content):
    write_images(tmp_path / "cat", "ab", size=(40, 40))
    write_images(tmp_path / "dog", "ab")
    broken = tmp_path / "cat" / "a.png"
    broken.write_bytes(broken.read_bytes()[:60] if content == "half" else content)
    splits = data.load_splits("imagefolder", tmp_path)
    with pytest.raises(InputError, match=r"a\.png: not a readable image"):
        for images in (splits.train, splits.val):
            for _ in images:
                pass


def test_torchvision_sets_by_name(tmp_path):
    class Fake(datasets.FakeData):
        """Absent until download=True, as torchvision's sets are."""

        def __init__(self, root, train, download=False):
            if not download:
                raise RuntimeError("Dataset not found. You can use download=True to download it")
            super().__init__(size=20 if train else 10, image_size=(1, 4, 4), num_classes=2)
            self.targets, self.classes = [i % 2 for i in range(self.size)], ["even", "odd"]

    table = {"fake": (Fake, {"train": True}, {"train": False}), "one_part": (Fake, {"train": True}, None)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_TORCHVISION", table)
        splits = data.load_splits("fake", tmp_path)
        assert (len(splits.train), len(splits.val), splits.class_names) == (20, 10, ["even", "odd"])
        assert [splits.train[1][1], splits.train[1][0].mode] == [1, "RGB"]
        assert [len(part) for part in data.load_splits("one_part", tmp_path)[:2]] == [16, 4]


def test_a_failing_download_is_one_clear_error(tmp_path):
    def absent(root, download=False):
        raise OSError("no network") if download else RuntimeError("Dataset not found")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_TORCHVISION", {"absent": (absent, {}, None)})
        with pytest.raises(InputError, match=r"absent is not in .* and could not be downloaded: no network"):
            data.load_splits("absent", tmp_path)


def set_of(folder, **classes: int) -> data.LabelledImages:
    """So many files of each class, which need not be there."""
    names = [f"{name}/{i}.png" for name, count in classes.items() for i in range(count)]
    labels = [label for label, count in enumerate(classes.values()) for _ in range(count)]
    return data.LabelledImages(data.ImageFiles(folder, names, labels), labels)


@pytest.mark.parametrize("make", [set_of, lambda _, **counts: data.LabelledImages(
    [("image", i) for i, n in enumerate(counts.values()) for _ in range(n)],
    [i for i, n in enumerate(counts.values()) for _ in range(n)],
)], ids=["files", "others"])  # fmt: skip
def test_a_validation_part_has_some_of_each_class_and_never_all(make, tmp_path):
    images = make(tmp_path, many=1000, few=4, two=2, one=1)
    for share in (1e-9, 0.2, 0.7, 1 - 1e-9):
        rest, part = data.validation_part(images, share)
        assert indices(rest) | indices(part) == set(range(1007)) and indices(rest).isdisjoint(indices(part))
        counts = np.bincount(part.labels, minlength=4)
        assert counts[0] == pytest.approx(1000 * share, abs=40) and 0 < counts[0] < 1000
        assert 0 < counts[1] < 4 and counts[2] == 1 and counts[3] == 0
        assert [images.labels[i] for i in part.indices] == part.labels


def test_a_part_is_taken_off_again_and_again(tmp_path):
    images, seen = set_of(tmp_path, many=2000, more=2000), set()
    for turn in range(3):
        expected = len(images) / 5
        images, part = data.validation_part(images)
        assert len(part) == pytest.approx(expected, rel=0.15), turn
        assert seen.isdisjoint(indices(part))
        seen |= indices(part)
    _, part = data.validation_part(images.subset(range(100)))  # which remembers what was taken off before
    assert 10 < len(part) < 30


def test_a_set_of_lone_images_has_no_validation_part(tmp_path):
    with pytest.raises(InputError, match="every class has only one"):
        data.validation_part(set_of(tmp_path, cat=1, dog=1))


def pixel(image: Image.Image) -> tuple[int, int, int]:
    rgb = data.to_rgb(image)
    assert rgb.mode == "RGB" and rgb.size == image.size
    return rgb.getpixel((0, 0))


def test_every_image_mode_becomes_rgb():
    grey16 = Image.fromarray(np.full((3, 2), 257 * 90, dtype=np.uint16))
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(Image.new("RGB", (1, 1), (1, 2, 3))) == (1, 2, 3)
    assert pixel(Image.new("L", (3, 1), 90)) == (90, 90, 90)
    assert pixel(Image.new("1", (1, 3), 1)) == (255, 255, 255)
    assert pixel(palette) == (10, 20, 30)
    assert pixel(grey16) == (90, 90, 90)
    assert pixel(Image.new("I", (1, 1), 257 * 90)) == (90, 90, 90)
    assert pixel(Image.new("I", (1, 1), 90)) == (90, 90, 90)
    assert pixel(Image.new("F", (1, 1), 0.5)) == (128, 128, 128)
    assert pixel(Image.new("CMYK", (1, 1), (0, 0, 0, 255))) == (0, 0, 0)


def test_transparency_is_over_white():
    assert pixel(Image.new("RGBA", (2, 2), (10, 20, 30, 255))) == (10, 20, 30)
    assert pixel(Image.new("RGBA", (2, 2), (10, 20, 30, 0))) == (255, 255, 255)
    assert pixel(Image.new("LA", (2, 2), (0, 0))) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.info["transparency"] = 1
    assert pixel(palette) == (255, 255, 255)


def odd_files(folder) -> dict:
    """Image files whose pixels Image.open alone does not give as evaluation sees them, by what is odd about them."""
    rng, exif = np.random.RandomState(0), Image.Exif()
    levels = rng.randint(0, 256, (40, 30, 3)).astype(np.uint8)
    exif[274] = 6  # lies on its side
    transparent = np.dstack([levels, rng.randint(0, 256, (40, 30)).astype(np.uint8)])
    palette = Image.fromarray(levels).quantize(16)
    files = {
        "plain.png": (Image.fromarray(levels), {}),
        "rotated.jpg": (Image.fromarray(levels), {"exif": exif}),
        "rotated.png": (Image.fromarray(levels), {"exif": exif}),
        "rotated.tif": (Image.fromarray(levels), {"exif": exif}),
        "rgba.png": (Image.fromarray(transparent), {}),
        "palette.png": (palette, {}),
        "transparent palette.png": (palette, {"transparency": 3}),
        "16 bits.png": (Image.fromarray(levels[..., 0].astype(np.uint16) * 257), {}),
        "cmyk.jpg": (Image.fromarray(levels).convert("CMYK"), {}),
    }
    folder.mkdir(parents=True)
    for name, (image, options) in files.items():
        image.save(folder / name, **options)
    return files


@pytest.mark.parametrize("size", [32, 96])
def test_a_transform_takes_what_image_open_returns(tmp_path, size):
    """As `load_finetuned` gives it to those who predict: the same bits as in evaluation."""
    for label in ("cat", "dog"):
        odd_files(tmp_path / "train" / label)
        odd_files(tmp_path / "val" / label)
    images, transform = data.load_splits("imagefolder", tmp_path).val, data.eval_transform(size)
    for i, (evaluated, _) in enumerate(data.Transformed(images, transform)):
        assert torch.equal(transform(Image.open(images.name(i))), evaluated), images.name(i)


def test_a_file_is_upright_over_white_and_of_8_bits(tmp_path):
    files = odd_files(tmp_path / "all")
    seen = {name: data.to_rgb(Image.open(tmp_path / "all" / name)) for name in files}
    assert {image.mode for image in seen.values()} == {"RGB"}
    upright = seen["plain.png"].transpose(Image.Transpose.ROTATE_270)
    for name in ("rotated.png", "rotated.tif"):
        assert np.array_equal(seen[name], upright), name
    assert seen["rotated.jpg"].size == (40, 30)
    for image in seen.values():
        assert data.to_rgb(image) is image  # nothing is done twice
    alpha = np.asarray(files["rgba.png"][0])[..., 3:] / 255
    over_white = np.asarray(files["plain.png"][0]) * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(seen["rgba.png"]) - over_white).max() <= 1
    assert np.array_equal(np.asarray(seen["16 bits.png"])[..., 0], np.asarray(files["plain.png"][0])[..., 0])
    assert (np.asarray(seen["transparent palette.png"])[np.asarray(files["palette.png"][0]) == 3] == 255).all()


def test_levels_of_12_bits_in_a_16_bit_file_are_told_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_warned_of_12_bits", False)
    for name, top in (("dark", 4095), ("bright", 4096)):
        Image.fromarray(np.array([[0, top]], dtype=np.uint16)).save(tmp_path / f"{name}.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.to_rgb(Image.open(tmp_path / "bright.png"))
        data.to_rgb(Image.new("I", (2, 2), 200))  # of 8 bits
        assert caught == []
        for _ in range(2):
            data.to_rgb(Image.open(tmp_path / "dark.png"))
        assert pixel(Image.fromarray(np.full((3, 2), 257, dtype=np.uint16))) == (1, 1, 1)  # the type tells the width
        assert pixel(Image.fromarray(np.full((3, 2), 250, dtype=np.uint16))) == (1, 1, 1)
    [message] = [str(warning.message) for warning in caught]
    assert str(tmp_path / "dark.png") in message and "multiply them by 16" in message and "\n" not in message


def all_transforms(size: int):
    yield data.eval_transform(size)
    for name in data.AUGMENTATIONS:
        yield data.train_transform(size, name)
    for name in data.TWO_CROPS:
        yield from data.two_crops(size, name).views


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("source", [(1, 1), (8, 8), (200, 30)])
def test_every_transform_takes_images_of_any_size(size, source):
    for transform in all_transforms(size):
        tensor = transform(Image.new("RGB", source, (120, 130, 140)))
        assert tensor.shape == (3, size, size) and tensor.dtype == torch.float32 and tensor.isfinite().all()


def test_normalisation_and_central_crop():
    image = Image.new("RGB", (300, 256))
    image.paste((255, 255, 255), (100, 100, 200, 156))  # the centre is white, the border black
    white = [(1 - m) / s for m, s in zip(data.IMAGENET_MEAN, data.IMAGENET_STD, strict=True)]
    assert data.eval_transform(224)(image)[:, 112, 112].tolist() == pytest.approx(white)
    assert data.eval_transform(32)(Image.new("RGB", (8, 8), "white"))[:, 0, 0].tolist() == pytest.approx(white)
    gradient = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 256, 3)))
    rows = data.eval_transform(224)(gradient)[0, :, 0] * data.IMAGENET_STD[0] + data.IMAGENET_MEAN[0]
    assert (rows * 255).round()[[0, -1]].tolist() == [16, 239]


def stock(name: str, size: int) -> list[T.Compose]:
    """torchvision's transforms for what the data module does itself: one transform, or those of both views."""
    tensor = [T.ToTensor(), T.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)]
    crop, flip, grey = T.RandomResizedCrop(size, scale=(0.2, 1)), T.RandomHorizontalFlip(), T.RandomGrayscale(0.2)
    blur = T.GaussianBlur(max(3, size // 10 | 1), sigma=(0.1, 2.0))
    if name == "eval":
        resize = [T.Resize((size, size))] if size <= 64 else [T.Resize(round(size * 256 / 224)), T.CenterCrop(size)]
        return [T.Compose([*resize, *tensor])]
    if name == "crop":
        return [T.Compose([T.RandomResizedCrop(size), flip, *tensor])]
    if name == "moco_v1":
        return 2 * [T.Compose([crop, grey, T.ColorJitter(0.4, 0.4, 0.4, 0.4), flip, *tensor])]
    if name == "moco_v2":
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
        return 2 * [T.Compose([crop, jitter, grey, T.RandomApply([blur], p=0.5), flip, *tensor])]
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    ends = [T.RandomApply([blur], p=0.1), T.RandomSolarize(128, p=0.2), flip, *tensor]
    return [T.Compose([crop, jitter, grey, blur, flip, *tensor]), T.Compose([crop, jitter, grey, *ends])]


def views_of(name: str, size: int) -> list[data.View]:
    if name == "eval":
        return [data.eval_transform(size)]
    return [data.train_transform(size)] if name == "crop" else list(data.two_crops(size, name).views)


@pytest.mark.parametrize("name", ["eval", "crop", "moco_v1", "moco_v2", "moco_v3"])
@pytest.mark.parametrize(("size", "source"), [(32, (50, 41)), (96, (300, 170)), (96, (60, 200))])
def test_a_view_is_what_torchvision_makes_of_the_image(name, size, source):
    """From the same draws; bit for bit, except that the blur may round to the next of 256 levels."""
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (*source[::-1], 3)).astype(np.uint8))
    level = 1.01 / 255 / min(data.IMAGENET_STD) if name in ("moco_v2", "moco_v3") else 0
    for ours, theirs in zip(views_of(name, size), stock(name, size), strict=True):
        for seed in range(8):
            views = []
            for transform in (ours, theirs):
                torch.manual_seed(seed)
                views.append(transform(image))
            torch.testing.assert_close(*views, rtol=0, atol=level)
            assert (views[0] != views[1]).float().mean() < 1e-3


@pytest.mark.parametrize("kernel", [3, 9, 23])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_the_blur_is_torchvisions(kernel, sigma):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 25, 3)).astype(np.uint8))
    ours, theirs = (kind(kernel, (sigma, sigma))(image) for kind in (data.GaussianBlur, T.GaussianBlur))
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1
    assert (np.asarray(ours) != np.asarray(theirs)).mean() < 0.005


def photograph(path, size=(1210, 900), **options) -> Image.Image:
    """A JPEG of smooth and of sharp parts."""
    y, x = np.mgrid[: size[1], : size[0]] / 60
    levels = np.stack([np.sin(x) * np.cos(y), np.sin(x + y), np.sign(np.sin(x * y / 9))], axis=2)
    image = Image.fromarray((127.5 + 100 * levels).astype(np.uint8))
    image.save(path, quality=95, **options)
    return image


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("format", ["JPEG", "MPO"])
@pytest.mark.parametrize(("name", "levels"), [("eval", 1.0), ("crop", 2.5), ("moco_v1", 2.5)])
def test_a_large_jpeg_is_decoded_at_a_reduced_size_to_nearly_the_same_pixels(
    tmp_path, monkeypatch, name, levels, format, orientation
):
    exif = Image.Exif()
    exif[274] = orientation
    photograph(tmp_path / "large.jpg", exif=exif, format=format)
    decoded, load = [], data.to_rgb
    monkeypatch.setattr(data, "to_rgb", lambda image: decoded.append(image.size) or load(image))
    for seed in range(4):
        for view in views_of(name, 96):
            views = []
            for image in (Image.open(tmp_path / "large.jpg"), load(Image.open(tmp_path / "large.jpg"))):
                torch.manual_seed(seed)
                views.append(view(image))
            assert (views[0] - views[1]).abs().mean() * 255 * min(data.IMAGENET_STD) < levels
    assert any(max(size) <= 605 for size in decoded)


@pytest.mark.parametrize("name", ["eval", "crop", "moco_v1"])
@pytest.mark.parametrize("size", [20, 96])
def test_no_view_is_made_of_fewer_pixels_than_it_has(tmp_path, monkeypatch, name, size):
    photograph(tmp_path / "large.jpg")
    ratios, resize = [], Image.Image.resize

    def noted(self, target, *args, box, **options):
        ratios.extend([(box[2] - box[0]) / target[0], (box[3] - box[1]) / target[1]])
        return resize(self, target, *args, box=box, **options)

    monkeypatch.setattr(Image.Image, "resize", noted)
    for seed in range(10):
        torch.manual_seed(seed)
        image = Image.open(tmp_path / "large.jpg")
        data.two_crops(size, name)(image) if name == "moco_v1" else views_of(name, size)[0](image)
    assert min(ratios) >= (2 if name == "eval" else 1)
    assert min(ratios) < 6  # nor of many more


def test_a_file_is_decoded_once_for_both_views(tmp_path, monkeypatch):
    photograph(tmp_path / "large.jpg")
    loads, load = [], JpegImagePlugin.JpegImageFile.load
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", lambda self: loads.append(len(self.tile)) or load(self))
    images = data.LabelledImages(data.ImageFiles(tmp_path, ["large.jpg"], [0]), [0])
    (first, second), _ = data.Transformed(images, data.two_crops(32, "moco_v1"))[0]
    assert first.shape == second.shape == (3, 32, 32)
    assert sum(loads) == 1  # with something left to decode


def test_a_transform_of_ones_own_gets_decoded_rgb_images(tmp_path):
    odd_files(tmp_path / "all")
    images = data.LabelledImages(data.ImageFiles(tmp_path / "all", ["rotated.jpg", "rgba.png"], [0, 1]), [0, 1])
    seen = [image for image, _ in data.Transformed(images, lambda image: image)]
    assert [(image.mode, image.size) for image in seen] == [("RGB", (40, 30)), ("RGB", (30, 40))]


def test_two_crops_differ_from_each_other_and_repeat_with_the_seed(digits):
    image, _ = digits[0].train[0]
    for name in data.TWO_CROPS:
        pairs = []
        for _ in range(2):
            torch.manual_seed(0)
            pairs.append(data.two_crops(32, name)(image))
        assert not torch.equal(*pairs[0])
        assert torch.equal(pairs[0][0], pairs[1][0]) and torch.equal(pairs[0][1], pairs[1][1])


def test_digits_views_without_strength_are_the_image(digits):
    image, _ = digits[0].train[0]
    still = data.two_crops(32, "digits", rotation=0, scale=0, shift=0, noise=0)
    torch.testing.assert_close(still(image)[0], data.eval_transform(32)(image))


def draws(epochs: int = 1, start: int = 0, **options) -> list[list]:
    """Per batch, for each of its items, its number and what its transform drew."""
    numbered = data.Transformed([(i, i) for i in range(10)], lambda i: (i, torch.rand(1), torch.randn(1)))
    loader = data.build_loader(numbered, 4, **options)
    loader.batch_sampler.start = start
    return [
        [tuple(item) for item in torch.stack([column.double().flatten() for column in columns], dim=1).tolist()]
        for _ in range(epochs)
        for columns, _ in loader
    ]


def test_what_is_drawn_for_an_image_depends_on_seed_and_epoch_alone():
    first = draws(epochs=2, shuffle=True)
    torch.rand(5)  # the state of the global generator has no part in it
    assert draws(epochs=2, shuffle=True, workers=2) == draws(epochs=2, shuffle=True) == first
    epochs = [sorted(item for batch in first[k : k + 3] for item in batch) for k in (0, 3)]
    assert [[i for i, *_ in epoch] for epoch in epochs] == [list(range(10))] * 2
    assert draws(shuffle=True, seed=1)[0] != first[0]
    for column in (1, 2):  # no two images, nor one image in two epochs, get the same
        assert len({item[column] for epoch in epochs for item in epoch}) == 20


def test_drawing_for_images_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    for workers in (0, 1):
        draws(shuffle=True, workers=workers)
    assert torch.rand(1) == expected


def test_what_workers_receive_and_import_is_little(digits):
    """Where processes do not fork, each gets all of this by pickle and imports the scripts anew."""
    for transform in all_transforms(32):
        loaded = pickle.loads(pickle.dumps(data.Transformed(digits[0].val.subset(range(3)), transform)))
        assert len(loaded) == 3
    heavy = "{'matplotlib', 'sklearn', 'scipy', 'bitsandbytes'} & {name.split('.')[0] for name in sys.modules}"
    program = f"import sys, finetune_lora, moco.pretrain; print({heavy})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_workers_stay_for_the_next_pass():
    def processes(keep: bool) -> list[set[int]]:
        loader = data.build_loader(
            data.Transformed([(None, 0)] * 8, lambda _: os.getpid()), 2, workers=2, keep_workers=keep
        )
        return [{int(pid) for pids, _ in loader for pid in pids} for _ in range(2)]

    first, second = processes(keep=True)
    assert first == second and len(first) == 2
    first, second = processes(keep=False)
    assert first.isdisjoint(second)


def test_a_pass_that_was_left_does_not_show_in_the_next():
    numbered = data.Transformed([(i, i) for i in range(40)], lambda i: (i, torch.rand(1)))
    left, whole = (data.build_loader(numbered, 4, shuffle=True, workers=workers) for workers in (2, 0))
    next(iter(left))
    left.batch_sampler.epoch = whole.batch_sampler.epoch = 5
    for ours, theirs in zip(left, whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True))


def test_an_epoch_can_begin_in_the_middle():
    whole = draws(epochs=2, shuffle=True)
    assert draws(epochs=2, start=2, shuffle=True) == whole[2:]
    assert [len(batch) for batch in draws(shuffle=True, drop_last=True)] == [4, 4]


@pytest.mark.parametrize(("count", "size"), [(11, 4), (9, 4), (8, 4), (3, 8), (7, 2)])
@pytest.mark.parametrize("processes", [2, 3])
def test_shares_of_all_processes_are_the_batches_of_one(monkeypatch, count, size, processes):
    alone = list(data.Batches(count, size, shuffle=True))
    shares, stand_ins = [], 0
    for rank in range(processes):
        monkeypatch.setattr(data.distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(data.distributed, "world_size", lambda: processes)
        batches = data.Batches(count, size, shuffle=True)
        shares.append([share if batches.has_share(n) else [] for n, share in enumerate(batches)])
        stand_ins += sum(not batches.has_share(n) for n in range(len(batches)))
    assert stand_ins == sum(max(0, processes - len(batch)) for batch in alone)
    for batch, parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert [batch[rank::processes] for rank in range(processes)] == list(parts)


def test_an_image_knows_its_file_and_workers_say_what_they_read(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for name in "abc":
            Image.new("RGB", (2, 2)).save(tmp_path / label / f"{name}.png")
    images = data.load_splits("imagefolder", tmp_path).train
    assert [images.name(i) for i in range(4)] == [f"{tmp_path}/{key}" for key in images.relative_names()]
    transformed = data.Transformed(images, data.eval_transform(2))
    assert transformed.names_being_read() == []
    list(data.build_loader(transformed, 2, workers=2))
    assert transformed.names_being_read() == []  # they have finished
    transformed.being_read[1] = 3
    assert transformed.names_being_read() == [images.name(3)]
