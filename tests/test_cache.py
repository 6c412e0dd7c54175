"""toolkit/images/cache.py: images come from the cache as they were decoded, and never older than their files."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.vision_transformer import VisionTransformer

import finetune_lora
from lora.split import split_model
from lora_utils import read_adapter_file
from moco import pretrain
from toolkit import InputError
from toolkit.answers import evaluation
from toolkit.images import cache, data, transforms
from toolkit.models.backbones import build_backbone
from toolkit.run import runs

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """Where the images of these tests are cached, on disk or in what passes for memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(cache, "_MEMORY", tmp_path / "shm")
    monkeypatch.setattr(cache, "_own_memory", None)
    return tmp_path / "home" / "moco-images"


@pytest.fixture
def photos(tmp_path) -> data.LabelledImages:
    rng, names = np.random.RandomState(0), ["a.jpg", "b.png", "c.bmp"]
    (tmp_path / "images").mkdir()
    for name, size in zip(names, [(300, 200), (40, 90), (7, 5)], strict=True):
        Image.fromarray(rng.randint(0, 256, (*size[::-1], 3)).astype(np.uint8)).save(tmp_path / "images" / name)
    files = data.ImageFiles(tmp_path / "images", names, [0, 1, 0])
    return data.LabelledImages(files, files.labels)


def count_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def pixels(images) -> list[np.ndarray]:
    return [np.asarray(images[i][0]) for i in range(len(images))]


def decodes(monkeypatch) -> list[str]:
    """The names of the files that are opened from here on."""
    opened, real = [], data.ImageFiles.__getitem__
    monkeypatch.setattr(data.ImageFiles, "__getitem__", lambda self, i: opened.append(self.names[i]) or real(self, i))
    return opened


@pytest.mark.parametrize("where", ["disk", "ram"])
def test_each_image_is_decoded_once_and_comes_back_the_same(photos, where, monkeypatch, capsys):
    cached = cache.cache_images(photos, where, 32)
    assert "caching decoded images in " in capsys.readouterr().out
    first, opened = pixels(cached), decodes(monkeypatch)
    assert all(np.array_equal(*pair) for pair in zip(first, pixels(cached), strict=True)) and opened == []
    assert [image.shape for image in first] == [(64, 96, 3), (90, 40, 3), (5, 7, 3)]  # never enlarged
    assert [label for _, label in cached] == photos.labels and cached.digest == photos.digest
    for mine, file in zip(first[1:], pixels(photos)[1:], strict=True):
        assert np.array_equal(mine, file)
    part = cache.cache_images(photos.subset([2, 0]), where, 32)
    assert [np.array_equal(*pair) for pair in zip(pixels(part), (first[2], first[0]), strict=True)] == [True, True]
    usage = shutil.disk_usage("/")._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)  # what is there already needs no room
    again = cache.cache_images(photos, where, 32)  # another run
    assert "0.00 GB are still to come" in capsys.readouterr().out
    assert all(np.array_equal(*pair) for pair in zip(first, pixels(again), strict=True))


def test_what_is_cached_is_never_older_than_its_file(photos, place, tmp_path):
    cached = cache.cache_images(photos, "disk", 32)
    before = pixels(cached)
    path = tmp_path / "images" / "c.bmp"
    status = os.stat(path)
    Image.new("RGB", (7, 5), "red").save(path)  # of as many bytes
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as rsync and cp -p do
    assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    after = pixels(cached)
    assert (after[2] == (255, 0, 0)).all() and np.array_equal(after[0], before[0])
    larger = pixels(cache.cache_images(photos, "disk", 64))  # another size is another image
    assert larger[0].shape == (128, 192, 3) and count_files(place) == 3 + 1 + 3
    path.unlink()
    with pytest.raises(InputError, match=r"c\.bmp: not a readable image"):
        pixels(cached)


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: content[:8]])
def test_what_is_not_whole_is_made_anew(photos, place, damage):
    cached = cache.cache_images(photos, "disk", 32)
    before = pixels(cached)
    for path in place.rglob("*"):
        if path.is_file():
            path.write_bytes(damage(path.read_bytes()))
    assert all(np.array_equal(*pair) for pair in zip(before, pixels(cached), strict=True))
    assert all(np.array_equal(*pair) for pair in zip(before, pixels(cached), strict=True))


def test_a_disk_that_fills_up_meanwhile_is_told_and_the_images_come_all_the_same(photos, place, monkeypatch):
    cached = cache.cache_images(photos, "disk", 32)
    expected = pixels(cache.cache_images(photos, "ram", 32))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match=r"no more images are cached in .*: No space left on device") as told:
        found = pixels(cached)
    assert len(told) == 1 and count_files(place) == 0
    assert all(np.array_equal(*pair) for pair in zip(expected, found, strict=True))


def test_too_little_room_is_told_before(photos, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"--cache-images ram: .* use --cache-images disk or none"):
        cache.cache_images(photos, "ram", 32)
    with pytest.raises(InputError, match=r"--cache-images disk: .* has room for 0.00 GB, .* use --cache-images none"):
        cache.cache_images(photos, "disk", 32)


def test_places_that_cannot_be_used(photos, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot make .*: Not a directory; set XDG_CACHE_HOME"):
        cache.cache_images(photos, "disk", 32)
    monkeypatch.setattr(cache, "_MEMORY", tmp_path / "gone")
    with pytest.raises(InputError, match=r"this system has no .*gone, .*: use disk instead of ram"):
        cache.cache_images(photos, "ram", 32)


@pytest.mark.parametrize("end", ["pass", "raise KeyboardInterrupt"])
def test_memory_is_given_back(photos, tmp_path, end):
    """At a stop as well, after which Python does not clear up, and a loading process would write it anew."""
    left = tmp_path / "shm" / "moco-images-999999999-abc"
    left.mkdir()
    for i in range(8):
        shutil.copy(tmp_path / "images" / "b.png", tmp_path / "images" / f"b{i}.png")
    program = f"""
import time
from pathlib import Path
from toolkit import cache, data, runs, transforms
cache._MEMORY = Path({str(tmp_path / "shm")!r})
read = cache._read
cache._read = lambda *place: time.sleep(0.2) or read(*place)
def main():
    files = data.ImageFiles({str(tmp_path / "images")!r}, [f"b{{i}}.png" for i in range(8)], [0] * 8)
    images = cache.cache_images(data.LabelledImages(files, [0] * 8), "ram", 32)
    loader = data.build_loader(data.Transformed(images, transforms.eval_transform(32)), 1, workers=1)
    for _ in loader:
        print(any(path.is_file() for path in cache._MEMORY.rglob("*")))
        {end}
runs.run_script(main)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "True" and done.returncode == (0 if end == "pass" else 128 + signal.SIGINT)
    time.sleep(0.5)
    assert list((tmp_path / "shm").iterdir()) == []  # nor what a killed process had left


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be reserved")
def test_room_for_features_is_reserved(tmp_path, monkeypatch):
    """Where another process takes it meanwhile, writing to the tensor would end this one without a word."""
    assert os.stat(cache._empty_file(tmp_path, 100_000)).st_blocks * 512 >= 100_000

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"has no room for 0\.10 GB"):
        cache._empty_file(tmp_path, 100_000_000)
    assert len(list(tmp_path.glob("features-*"))) == 1


def test_views_of_cached_images_do_not_depend_on_who_cached_them(photos):
    def views(workers: int) -> list[torch.Tensor]:
        cached = data.Transformed(cache.cache_images(photos, "disk", 32), transforms.two_crops(32, "moco_v2"))
        loader = data.build_loader(cached, 2, shuffle=True, workers=workers)
        return [view for _ in range(2) for pair, _ in loader for view in pair]

    first, second = views(0), views(2)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_images_in_memory_and_no_cache_are_left_alone(photos):
    digits = data.load_splits("digits").val
    assert cache.cache_images(digits, "ram", 32) is digits and cache.cache_images(photos, "none", 32) is photos


@pytest.mark.parametrize("where", ["disk", pytest.param("ram", marks=pytest.mark.slow)])
def test_fine_tuning_with_cached_images_is_what_it_is_without(finetune, where, place, tmp_path):
    """Images that are no larger than twice the model's input are cached as they are."""
    plain, cached = finetune("--workers 1", "plain"), finetune(f"--cache-images {where} --workers 1", "cached")
    assert cached["val_accuracy"] == plain["val_accuracy"] and cached["images"] == plain["images"]
    ours, theirs = (read_adapter_file(results["folder"] / "lora.pth")["tensors"] for results in (cached, plain))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert count_files(place if where == "disk" else tmp_path / "shm") == 21  # of training alone


# ------------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize(
    "flags, where",
    [
        ("--adapt-last 2", "disk"),
        pytest.param("--adapt-last 1 --use-qlora --precision bf16", "ram", marks=pytest.mark.slow),
        ("--lora-rank 0", "disk"),
    ],
)
def test_fine_tuning_over_cached_features_is_what_it_is_over_images(finetune, flags, where, place, tmp_path, capsys):
    """Bit for bit, while what is below sees each of the 21 + 15 images once, in batches of 8.

    In bf16 the last bits of a product depend on the number of its rows where the processor has a matrix unit.
    """
    plain, calls, embed = finetune(flags, "plain"), [], VisionTransformer._process_input
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionTransformer, "_process_input", lambda vit, x: calls.append(len(x)) or embed(vit, x))
        cached = finetune(f"{flags} --cache-features {where}", "cached")
    assert calls == [8, 8, 5, 8, 7]
    assert capsys.readouterr().out.count("caching features in") == 2
    assert cached["knn_accuracy_before"] == plain["knn_accuracy_before"]
    if "bf16" in flags:
        assert cached["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-2)
    else:
        assert cached["val_loss"] == plain["val_loss"]
        ours, theirs = (read_adapter_file(results["folder"] / "lora.pth")["tensors"] for results in (cached, plain))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert count_files(place if where == "disk" else tmp_path / "shm") == 0


@pytest.mark.slow
def test_a_resnet_begins_with_what_is_cached_of_its_stages(tmp_path, images, few_images):
    """Through the script, and resumed with the features elsewhere."""
    torch.manual_seed(0)
    torch.save(build_backbone("resnet18", 3).state_dict(), tmp_path / "base.pth")
    argv = f"--checkpoint {tmp_path / 'base.pth'} --data-dir {images} --image-size 32 --device cpu --augmentation none"
    argv += " --adapt-last 1 --lora-rank 2 --batch-size 8 --epochs 2 --output-dir "
    plain = finetune_lora.main(f"{argv} {tmp_path / 'plain'}".split())
    with pytest.raises(runs.Stopped):
        finetune_lora.main(f"{argv} {tmp_path / 'cached'} --cache-features disk".split(), stop_after_an_epoch)
    cached = finetune_lora.main(f"{argv} {tmp_path / 'cached'} --cache-features ram --resume".split())
    assert cached["val_loss"] == plain["val_loss"] and cached["epochs"] == 2


def test_a_run_over_cached_views_goes_on_as_if_it_had_not_stopped(finetune):
    flags = "--adapt-last 1 --augmentation crop --cache-features disk --cached-views 2"
    whole = finetune(flags, "whole")
    with pytest.raises(runs.Stopped):
        finetune(flags, "stopped", after_epoch=stop_after_an_epoch)
    with pytest.raises(InputError, match=r"other settings \(data\.cached_views was 2, is None\)"):
        finetune("--adapt-last 1 --augmentation crop --resume", "stopped")
    resumed = finetune(f"{flags} --workers 1 --resume", "stopped")
    assert resumed["val_loss"] == whole["val_loss"] and resumed["epochs"] == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("flags", ["--use-qlora", "--precision fp16", "--adapt-last 1 --cache-features disk"])
def test_a_run_on_a_gpu_goes_on_as_if_it_had_not_stopped(finetune, flags):
    """But for the rounding of sums in another order."""
    flags = f"{flags} --augmentation crop --lora-dropout 0.1 --device cuda"
    whole = finetune(flags, "whole")
    with pytest.raises(runs.Stopped):
        finetune(flags, "stopped", after_epoch=stop_after_an_epoch)
    resumed = finetune(f"{flags} --resume", "stopped")
    assert resumed["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-2) and resumed["epochs"] == 2


def stop_after_an_epoch(run) -> None:
    raise runs.Stopped(2)


def test_cached_views_are_of_what_augmentation_makes_of_the_images(finetune):
    """First of each image as it is, then as two epochs would draw it; an epoch takes one of those two."""
    found = []

    def look(run) -> None:
        plain = transforms.eval_transform(16, **run.args.normalization)
        drawn = transforms.train_transform(16, "crop", **run.args.normalization)
        loaders = [data.build_loader(data.Transformed(run.splits.train, view), 21) for view in (plain, drawn)]
        with evaluation.eval_mode(run.model), torch.no_grad():
            below = split_model(run.model, 1)[0]
            expected = [below(images) for loader in (loaders[0], loaders[1], loaders[1]) for images, _ in loader]
        found.append((run.feed.images.train.source.tensors[0], torch.stack(expected, 1)))
        taken = next(iter(run.feed.train_loader))[0]
        found.append((taken, expected))

    finetune("--adapt-last 1 --augmentation crop --cache-features ram --cached-views 2 --epochs 1", after_epoch=look)
    (cached, images), (taken, (as_it_is, *views)) = found
    torch.testing.assert_close(cached, images)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations((as_it_is, *views), 2))
    distances = torch.stack([(taken[:, None] - view[None]).abs().amax((2, 3)).amin(1) for view in (as_it_is, *views)])
    assert (distances[1:].amin(0) < 1e-5).all() and (distances[1:].amax(1) > 1e-3).all()  # both, and nothing else


def test_processes_that_load_share_what_is_cached(photos):
    """As they do for a GPU, which would wait for the copies otherwise."""
    features = torch.randn(3, 2, 5, 4)
    cached = cache.cache_features(photos, [[view] for view in features.unbind(1)], 3, "disk")
    batches = [next(iter(data.build_loader(data.Transformed(cached, torch.clone), 3, workers=w))) for w in (0, 1)]
    assert all(torch.equal(batch, features) and labels.tolist() == [0, 1, 0] for batch, labels in batches)


def test_augmented_views_are_drawn_alike_and_the_plain_one_where_it_is_alone():
    views = torch.arange(3.0)[:, None]
    torch.manual_seed(0)
    drawn = [cache.drawn_view(views).item() for _ in range(400)]
    assert set(drawn) == {1.0, 2.0} and 160 < drawn.count(1.0) < 240
    assert cache.drawn_view(views[:1]).item() == cache.plain_view(views).item() == 0.0


def test_the_trials_of_auto_share_what_is_cached(finetune, monkeypatch):
    calls, embed = [], VisionTransformer._process_input
    monkeypatch.setattr(VisionTransformer, "_process_input", lambda vit, x: calls.append(len(x)) or embed(vit, x))
    finetune("--adapt-last 1 --cache-features disk --learning-rate auto")
    assert sum(calls) == 21 + 21 + 15  # the parts of the training images once, and for the run both splits


def test_processes_on_several_machines_share_no_features(photos, monkeypatch):
    monkeypatch.setattr(cache.distributed, "gather", lambda value: [value, f"not {value}"])
    with pytest.raises(InputError, match="several machines share no file; use --cache-features none"):
        cache.cache_features(photos, [[torch.zeros(3, 5)]], 3, "disk")


def test_features_that_find_no_room_are_refused(photos, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(
        InputError, match=r"--cache-features disk: .* has room for 0.00 GB, .* use --cache-features none"
    ):
        cache.cache_features(photos, [[torch.zeros(3, 5)]], 3, "disk")


def test_pretraining_with_cached_images_is_what_it_is_without(place, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(8):
        Image.new("L", (12, 9), 30 * i).save(flat / f"{i}.png")
    argv = f"--data-dir {flat} --image-size 8 --batch-size 4 --epochs 1 --dim 8 --mlp-dim 8 --device cpu --output-dir "
    runs = [pretrain.main(f"{argv}{tmp_path / where} --cache-images {where}".split()) for where in ("none", "disk")]
    states = [torch.load(results["checkpoint"])["model"] for results in runs]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert count_files(place) == 8
