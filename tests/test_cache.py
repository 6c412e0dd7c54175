"""toolkit/images/cache.py: fine-tuning over cached features is what it is over images."""

import errno
import itertools
import multiprocessing
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.vision_transformer import VisionTransformer

from lora.split import split_model
from tests.run_folders import assert_same_tensors, stop
from toolkit import InputError
from toolkit.answers import evaluation
from toolkit.images import cache, data, transforms
from toolkit.run import runs


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """Where the features of these tests are cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "moco-images"


@pytest.fixture
def photos(tmp_path) -> data.LabelledImages:
    rng = np.random.RandomState(0)
    names = ["a.jpg", "b.png", "c.bmp"]
    (tmp_path / "images").mkdir()
    for name, size in zip(names, [(300, 200), (40, 90), (7, 5)], strict=True):
        Image.fromarray(rng.randint(0, 256, (*size[::-1], 3)).astype(np.uint8)).save(tmp_path / "images" / name)
    files = data.ImageFiles(tmp_path / "images", names, [0, 1, 0])
    return data.LabelledImages(files, files.labels)


def test_places_that_cannot_be_used(photos, tmp_path, monkeypatch):
    def refused(problem: str) -> None:
        with pytest.raises(InputError, match=problem):
            cache.cache_features(photos, [[torch.zeros(3, 5)]], 3)

    with monkeypatch.context() as patch:
        patch.setattr(cache.distributed, "gather", lambda value: [value, f"not {value}"])
        refused("several machines share no file; use --cache-features none")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    refused(r"cannot make .*Not a directory.* set XDG_CACHE_HOME")


def count_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be reserved")
def test_room_for_features_is_reserved(tmp_path, monkeypatch):
    """Where another process takes it meanwhile, writing to the tensor would end this one without a word."""
    assert os.stat(cache._empty_file(tmp_path, 100_000)).st_blocks * 512 >= 100_000
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", mock.Mock(side_effect=full))
    with pytest.raises(InputError, match=r"a file of 0\.10 GB in .*No space left.* use --cache-features none"):
        cache._empty_file(tmp_path, 100_000_000)
    assert len(list(tmp_path.glob("features-*"))) == 1  # the first one


@pytest.mark.parametrize(
    "flags",
    [
        "--adapt-last 1",
        pytest.param("--adapt-last 1 --use-qlora --precision bf16", marks=pytest.mark.slow),
        pytest.param("--lora-rank 0", marks=pytest.mark.slow),
    ],
)
def test_fine_tuning_over_cached_features_is_what_it_is_over_images(finetune, flags, place, tmp_path, capsys):
    """Bit for bit, while what is below sees each of the 21 + 15 images once, in batches of 8.

    In bf16 the last bits of a product depend on the number of its rows where the processor has a matrix unit.
    """
    plain, calls, embed = finetune(flags, "plain"), [], VisionTransformer._process_input
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionTransformer, "_process_input", lambda vit, x: calls.append(len(x)) or embed(vit, x))
        cached = finetune(f"{flags} --cache-features disk", "cached")
    assert calls == [8, 8, 5, 8, 7]
    assert capsys.readouterr().out.count("caching features in") == 2
    assert cached["knn_accuracy_before"] == plain["knn_accuracy_before"]
    if "bf16" in flags:
        assert cached["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-2)
    else:
        assert cached["val_loss"] == plain["val_loss"]
        assert_same_tensors(cached["folder"] / "lora.pth", plain["folder"] / "lora.pth")
    assert count_files(place) == 0


def test_norms_follow_over_cached_features_in_16_bits(finetune, narrow, tmp_path):
    """Of so narrow a network 16 bits round the loss by a tenth or two; wrong features would have chance's 1.1."""
    torch.save(narrow, tmp_path / "resnet.pth")
    told = f"--checkpoint {tmp_path / 'resnet.pth'} --image-size 32 --lora-rank 2 --learning-rate 1e-5 --epochs 1"
    told += " --norms follow --adapt-last 1 --precision bf16"
    plain, cached = finetune(told, "plain"), finetune(f"{told} --cache-features disk", "cached")
    assert cached["val_loss"] == pytest.approx(plain["val_loss"], abs=0.3)


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("forkserver", 0)])
def test_only_forked_processes_load_what_is_cached_beside_a_gpu(start, monkeypatch, method, workers):
    """Others, as Python starts them from 3.14 on, cannot open a file that has no name any more."""
    run = start("--adapt-last 1 --cache-features disk --workers 2")
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: method)
    run.loaders.device = torch.device("cuda")
    assert run.loaders.add_loader(run.loaders.images.train, cache.plain_view).num_workers == workers


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("flags", ["--use-qlora", "--precision fp16", "--adapt-last 1 --cache-features disk"])
def test_a_run_on_a_gpu_goes_on_as_if_it_had_not_stopped(finetune, flags):
    """But for the rounding of sums in another order."""
    flags = f"{flags} --augmentation crop --lora-dropout 0.1 --device cuda"
    whole = finetune(flags, "whole")
    with pytest.raises(runs.Stopped):
        finetune(flags, "stopped", after_epoch=stop)
    resumed = finetune(f"{flags} --resume", "stopped")
    assert resumed["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-2) and resumed["epochs"] == 2


def test_cached_views_are_of_what_augmentation_makes_of_the_images(finetune):
    """First of each image as it is, then as four epochs would draw it; an epoch takes one of those four."""
    found = []

    def look(run) -> None:
        plain = transforms.eval_transform(16, **run.plan.normalization)
        drawn = transforms.train_transform(16, "crop", **run.plan.normalization)
        loaders = [data.build_loader(data.Transformed(run.splits.train, view), 21) for view in (plain, drawn)]
        loaders += loaders[1:] * 3
        with evaluation.eval_mode(run.model), torch.no_grad():
            below = split_model(run.model, 1)[0]
            expected = [below(images) for loader in loaders for images, _ in loader]
        found.append((run.loaders.images.train.source.tensors[0], torch.stack(expected, 1)))
        taken = next(iter(run.loaders.train))[0]
        found.append((taken, expected))

    finetune("--adapt-last 1 --augmentation crop --cache-features disk --epochs 1", after_epoch=look)
    (cached, images), (taken, (as_it_is, *views)) = found
    torch.testing.assert_close(cached, images)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations((as_it_is, *views), 2))
    distances = torch.stack([(taken[:, None] - view[None]).abs().amax((2, 3)).amin(1) for view in (as_it_is, *views)])
    assert (distances[1:].amin(0) < 1e-5).all() and (distances[1:].amax(1) > 1e-3).all()  # all, and nothing else


def test_processes_that_load_share_what_is_cached(photos):
    """As they do for a GPU, which would wait for the copies otherwise."""
    features = torch.randn(3, 2, 5, 4)
    cached = cache.cache_features(photos, [[view] for view in features.unbind(1)], 3)
    batches = [next(iter(data.build_loader(data.Transformed(cached, torch.clone), 3, workers=w))) for w in (0, 1)]
    assert all(torch.equal(batch, features) and labels.tolist() == [0, 1, 0] for batch, labels in batches)
