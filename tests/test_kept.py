"""toolkit/images/kept.py: what a run reads again and again is decoded once, and is the same, bit for bit."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from moco import pretrain
from tests.image_files import oriented, save_image
from toolkit.images import bands, data, folders, kept, transforms


def test_arrays_stay_while_there_is_room_and_nobody_waits_for_a_lock():
    arrays = kept.KeptArrays(2, room=40, channels=2, dtype=np.float32)
    first, second = np.arange(6, dtype=np.float32).reshape(1, 3, 2), np.full((1, 2, 2), 7, np.float32)
    arrays.put(0, 0, first)
    arrays.put(0, 4, second)  # another version, and the last byte
    arrays.put(1, 0, second[:, :1])
    assert np.array_equal(arrays.get(0, 0), first) and np.array_equal(arrays.get(0, 4), second)
    assert arrays.get(1, 0) is None and arrays.get(0, 1) is None
    arrays.get(0, 0)[:] = 9
    assert np.array_equal(arrays.get(0, 0), first)  # a copy was given away
    with arrays.lock:
        arrays.put(0, 0, second)
        assert arrays.get(0, 0) is None
    assert np.array_equal(arrays.get(0, 0), first)


@pytest.fixture(params=["jpg", "png", "npy"])
def files(request, tmp_path) -> folders.ImageFiles:
    """Three images, of two channels or lying on a side."""
    names = [f"{number}.{request.param}" for number in range(3)]
    for number, name in enumerate(names):
        pixels = np.random.RandomState(number).randint(0, 256, (48, 40 + 8 * number, 3), dtype=np.uint8)
        if request.param == "npy":
            save_image(tmp_path / name, pixels[..., :2].astype(np.float32))
        else:
            save_image(tmp_path / name, pixels, exif=oriented(6))
    return folders.ImageFiles(tmp_path, names, bands.Bands(2) if request.param == "npy" else None)


def views(images: data.LabelledImages, workers: int) -> list[torch.Tensor]:
    """Crops at about a quarter of the images' sizes, and whole images, by processes of a loader or by this one."""
    found = []
    values = {"mean": [0.5] * 2, "std": [0.2] * 2, "bands": images.bands} if images.bands else {}
    for transform in (transforms.train_transform(9, **values), transforms.eval_transform(40, **values)):
        for batch, _ in data.build_loader(data.Transformed(images, transform), 2, workers=workers):
            found.append(batch)
    return found


def test_what_a_process_of_a_loader_has_decoded_no_other_decodes_again(files, spy):
    plain = views(data.LabelledImages(files), workers=0)
    images = data.LabelledImages(files)
    data.keep_decoded(images, None)
    whole, _ = images[2]  # as masks need it
    version = 0 if files.bands else 1
    assert np.array_equal(files.kept.get(2, version), whole) and files.kept.get(1, version) is None
    to_rgb = spy(transforms, "to_rgb")
    assert all(map(torch.equal, views(images, workers=1), plain))
    if not files.names[0].endswith(".jpg"):  # whose size is read anew
        for i in range(3):
            Path(files.path(i)).unlink()
    assert all(map(torch.equal, views(images, workers=0), plain))
    assert not to_rgb.called or files.names[0].endswith(".png")  # it has nothing to do there
    assert pickle.loads(pickle.dumps(files)).kept is None


def test_sources_share_the_room_alike_however_few_of_their_images_are_used(monkeypatch, tmp_path):
    monkeypatch.setattr(kept, "KEPT_BYTES", 4_000)
    few, many = (folders.ImageFiles(tmp_path, ["x.png"] * count) for count in (1, 3))
    parts = data.LabelledImages(many).split(np.array([True, False, False]))  # of one source
    data.keep_decoded(*parts, data.LabelledImages(few), data.LabelledImages(torch.zeros(2)))
    assert [len(few.kept.memory), len(many.kept.memory)] == [2_000, 2_000]


def test_runs_of_both_stages_keep_what_they_decode(start, images):
    splits = start().loaders.images
    args, _ = pretrain.read_options(["--data-dir", str(images), "--knn-dir", str(images)])
    pretraining, labelled = pretrain.load_images(args, None)
    for each in (splits.train, splits.val, pretraining, *labelled):
        assert each.source.kept is not None
