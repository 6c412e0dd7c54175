"""toolkit/images/cache.py: fine-tuning over cached features is what it is over images."""

import errno
import itertools
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from dense import assert_close
from torchvision.models.vision_transformer import VisionTransformer

from lora import followed_norms, split
from tests.run_folders import tensors
from toolkit import InputError
from toolkit.answers import evaluation, tasks
from toolkit.images import cache, data, transforms


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


def test_cached_views_are_of_what_augmentation_makes_of_the_images(start):
    """First of each image as it is, then as four epochs would draw it; an epoch takes one of those four."""
    run = start("--adapt-last 1 --augmentation crop --cache-features disk --workers 1")
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
