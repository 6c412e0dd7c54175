"""What a run computes and reads once: features (toolkit/images/cache.py), decoded images (folders.py), bit for bit."""

import errno
import itertools
import os
import pickle
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from dense import assert_close
from torchvision.models.vision_transformer import VisionTransformer

from lora import followed_norms, split
from moco import pretrain
from tests.image_files import oriented, save_image
from tests.run_folders import tensors
from toolkit import InputError
from toolkit.answers import evaluation, tasks
from toolkit.images import bands, cache, data, folders, transforms


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "~/home")  # as where no shell has read it
    return tmp_path / "home" / "moco-images"


def cached_three() -> data.LabelledImages:
    return cache.cache_features(data.LabelledImages([], [0, 1, 0]), [[torch.zeros(3, 5)]], 3)


def test_what_cannot_be_cached_leaves_no_file_and_says_what_to_do(place, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cache.distributed, "gather", lambda value: [value, f"not {value}"])
        with pytest.raises(InputError, match="several machines share no file; use --cache-features none"):
            cached_three()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # as a stop while other processes open it
        patch.setattr(torch, "from_file", mock.Mock(side_effect=KeyboardInterrupt))
        cached_three()
    assert list(place.iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot make .*Not a directory.* set XDG_CACHE_HOME"):
        cached_three()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be reserved")
def test_room_for_features_is_reserved(place, tmp_path, monkeypatch):
    """Where another process takes it meanwhile, writing to the tensor would end this one without a word."""
    with open(tmp_path / "features", "wb") as file:
        cache.reserve(file, 100_000)
    assert (tmp_path / "features").stat().st_blocks * 512 >= 100_000
    reserve = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(os, "posix_fallocate", reserve)
    with pytest.raises(InputError, match=r"a file of 0\.00 GB in .*No space left.* use --cache-features none"):
        cached_three()
    assert reserve.call_args.args[2] == 3 * 5 * 4
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("flags", ["--adapt-last 1", pytest.param("--lora-rank 0", marks=pytest.mark.slow)])
def test_fine_tuning_over_cached_features_is_what_it_is_over_images(finetune, flags, place, capsys, monkeypatch):
    """To rounding, as batches of other sizes round, while what is below sees each of the 21 + 15 images once."""
    monkeypatch.setattr(tasks, "SURE_IMAGES", 0)  # else features are laid one over another in place of images
    plain = finetune(flags, "plain")
    calls = []
    embed = VisionTransformer._process_input

    def embedded(vit, x):
        calls.append((len(x), vit.training))
        return embed(vit, x)

    monkeypatch.setattr(VisionTransformer, "_process_input", embedded)
    cached = finetune(f"{flags} --cache-features disk", "cached")
    assert calls == [(21, False), (15, False)]
    assert capsys.readouterr().out.count("caching features in") == 2
    assert cached["knn_accuracy_before"] == plain["knn_accuracy_before"]
    assert cached["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-5)
    ours, theirs = (tensors(results["folder"] / "lora.pth") for results in (cached, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert list(place.iterdir()) == []


def test_what_goes_with_an_image_goes_with_its_features():
    images = data.LabelledImages([], [0, 1, 0], targets=torch.eye(3))
    images.groups = np.array(["a", "b", "a"])
    cached = cache.cache_features(images, [[torch.zeros(3, 5)], [torch.ones(3, 5)]], 3)
    features, target = cached[1]
    assert cache.plain_view(features).tolist() == [0] * 5 and cache.drawn_view(features).tolist() == [1] * 5
    assert target.tolist() == [0, 1, 0] and cached.groups.tolist() == ["a", "b", "a"]


def test_norms_follow_over_cached_features_in_16_bits(start, saved, narrow):
    told = f"--checkpoint {saved(narrow)} --image-size 32 --lora-rank 2 --norms follow --adapt-last 1 --precision bf16"
    plain, cached = (start(f"{told} --cache-features {where}") for where in ("none", "disk"))
    for ours, theirs in zip(followed_norms.followers(cached.model), followed_norms.followers(plain.model), strict=True):
        assert_close(ours.followed.centre, theirs.followed.centre, 0.05)
    losses = [run.evaluate(run.loaders.val).loss for run in (cached, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)


def test_cached_views_are_of_what_augmentation_makes_of_the_images(start, monkeypatch):
    """First of each image as it is, then as four epochs would draw it; an epoch takes one of those four."""
    monkeypatch.setattr("toolkit.run.loaders.ANSWERED_PIXELS", 9 * 16**2)  # nine images at once, where eight train
    run = start("--adapt-last 1 --augmentation crop --cache-features disk --workers 1 --batch-size 8")
    assert run.loaders.train.num_workers == 0  # there is nothing to decode
    plain = transforms.eval_transform(16, **run.plan.normalization)
    drawn = transforms.train_transform(16, "crop", **run.plan.normalization)
    loaders = [data.build_loader(data.Transformed(run.splits.train, view), 21) for view in (plain, drawn)]
    loaders += loaders[1:] * 3
    with evaluation.eval_mode(run.model), torch.no_grad():
        below = split.split_model(run.model, 1)[0]
        views = [below(images) for loader in loaders for images, _ in loader]
    taken = next(iter(run.loaders.train))[0]
    torch.testing.assert_close(run.loaders.images.train.source, torch.stack(views, 1))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(views, 2))
    distances = torch.stack([(taken[:, None] - view[None]).abs().amax((2, 3)).amin(1) for view in views])
    assert (distances[1:].amin(0) < 1e-5).all() and (distances[1:].amax(1) > 1e-3).all()  # all, and nothing else


def test_the_trials_of_a_search_train_on_cached_features(finetune, spy):
    """Of each trial's parts of the training images, and for the run of both splits."""
    embed = spy(VisionTransformer, "_process_input")
    finetune("--adapt-last 1 --cache-features disk --learning-rate auto --epochs 1")
    assert sum(len(images) for (_, images), _ in embed.call_args_list) == 21 + 21 + 21 + 15


# -------------------------------------------------------------------------------------------- toolkit/images/folders.py


def test_arrays_stay_while_there_is_room_and_nobody_waits_for_a_lock():
    arrays = folders.KeptArrays(2, room=40, channels=2, dtype=np.float32)
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
    monkeypatch.setattr(folders, "KEPT_BYTES", 4_000)
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
