"""moco/data.py: splits, image modes, augmentations, loaders."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from moco import InputError, data


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
    assert all(splits.val.indices == digits[0].val.indices for splits in few)
    assert few[0].train.indices == few[1].train.indices != few[2].train.indices
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
        write_images(tmp_path / label, "abcdefghij")
    first, second = (data.load_splits("imagefolder", tmp_path, seed=seed) for seed in (0, 1))
    assert (len(first.train), len(first.val)) == (16, 4) and sorted(first.val.labels) == [0, 0, 1, 1]
    assert first.val.indices == second.val.indices


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


def test_stratified_split_takes_at_least_one_and_never_all():
    labels = [0] * 10 + [1] * 2 + [2]
    rest, part = data.stratified_split(labels, 0.2, seed=0)
    assert sorted(rest + part) == list(range(13))
    assert np.bincount([labels[i] for i in part], minlength=3).tolist() == [2, 1, 0]


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


def test_a_16_bit_png_file(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for name in "ab":
            Image.fromarray(np.full((3, 2), 257 * 90, dtype=np.uint16)).save(tmp_path / label / f"{name}.png")
    assert data.load_splits("imagefolder", tmp_path).train[0][0].getpixel((0, 0)) == (90, 90, 90)


def all_transforms(size: int):
    yield data.eval_transform(size)
    for name in data.AUGMENTATIONS:
        yield data.train_transform(size, name)
    for name in data.TWO_CROPS:
        yield data.two_crops(size, name).first
        yield data.two_crops(size, name).second


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
    assert sorted(images.name(i) for i in range(4))[0].startswith(str(tmp_path / "cat"))
    transformed = data.Transformed(images, data.eval_transform(2))
    assert transformed.names_being_read() == []
    list(data.build_loader(transformed, 2, workers=2))
    assert transformed.names_being_read() == []  # they have finished
    transformed.being_read[1] = 3
    assert transformed.names_being_read() == [images.name(3)]
