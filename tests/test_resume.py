"""Runs that are stopped and go on, in their own folder or in another."""

import json
import os
import shutil
import signal

import pytest
import torch

import finetune_lora
from lora_utils import read_adapter_file
from tests.run_folders import assert_same_tensors, metrics, stop, tensors
from toolkit import InputError, devices
from toolkit.files import read_checkpoint
from toolkit.run import reports, runs


def test_a_run_that_was_begun_before_there_was_calibration_goes_on_without(finetune, once):
    state = read_checkpoint(once / "last.pth")
    torch.save(state | {"head_temperature": state["head_temperature"][:2]}, once / "old.pth")
    results = finetune(f"--epochs 1 --resume {once / 'old.pth'}")
    assert "temperature" not in results and "temperature" not in read_adapter_file(once / "lora.pth")["metadata"]


@pytest.mark.slow
@pytest.mark.parametrize("done", ["within an epoch", "all epochs"])
def test_a_run_resumed_into_another_folder_leaves_all_its_files_there(finetune, monkeypatch, tmp_path, done):
    if done == "within an epoch":
        monkeypatch.setattr(runs.StopRequests, "check", stop)
        with pytest.raises(runs.Stopped):
            finetune(output="first")
        monkeypatch.undo()
    else:
        finetune(output="first")
    moved = (tmp_path / "first" / "last.pth").rename(tmp_path / "last.pth")
    whole = finetune(output="whole")
    results = finetune(f"--resume {moved}", output="second")
    assert {path.name for path in results["folder"].iterdir()} == {path.name for path in whole["folder"].iterdir()}
    assert len(metrics(results["folder"])) == 2
    assert_same_tensors(results["folder"] / "lora.pth", whole["folder"] / "lora.pth")


WAYS = {
    "adapters": "--lora-dropout 0.1 --accumulation-steps 2 --wise-ft auto",
    "4 bits": "--use-qlora --label-smoothing 0.1",
    "features of a ResNet": "--checkpoint {resnet} --arch resnet18 --image-size 32 --adapt-last 1"
    " --cache-features disk",
    "features of views": "--adapt-last 1 --augmentation crop --cache-features disk",
    "masks": "--task segmentation --data-dir {pairs} --batch-size 4",
    "labels": "--task multilabel --data-dir {hospital} --data-list {hospital}/labels.csv --label-columns sick well"
    " --adapt-last 1 --cache-features disk",
    "numbers": "--task regression --data-dir {hospital} --data-list {hospital}/numbers.csv --label-columns age",
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_goes_on_bit_for_bit(finetune, saved, narrow, hospital, pairs, monkeypatch, tmp_path, way):
    """It stopped at the first step of its second epoch, and has other workers from then on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = WAYS[way].format(resnet=saved(narrow), hospital=hospital, pairs=pairs)
    whole = finetune(options, output="whole")
    with pytest.raises(runs.Stopped):
        finetune(options, output="stopped", after_epoch=lambda run: run.stop._note(2, None))
    resumed = finetune(f"{options} --workers 1 --resume", output="stopped")
    assert resumed["epochs"] == 2 and resumed["val_loss"] == whole["val_loss"]
    files = [results["folder"] / "lora.pth" for results in (resumed, whole)]
    ours, theirs = (read_adapter_file(path)["metadata"].get("task") for path in files)
    assert ours == theirs
    assert_same_tensors(*files)


def test_an_automatic_precision_is_recorded_and_kept(finetune, monkeypatch):
    """Measured once: by a resumed run no more, whatever the processor."""
    monkeypatch.setattr(devices, "faster_dtype", lambda *_: torch.bfloat16)
    folder = finetune("--epochs 1", output="automatic")["folder"]
    assert_same_tensors(
        folder / "lora.pth", finetune("--epochs 1 --precision bf16", output="typed")["folder"] / "lora.pth"
    )
    assert read_adapter_file(folder / "lora.pth")["metadata"]["config"]["finetune"]["precision"] == "bf16"
    monkeypatch.setattr(devices, "faster_dtype", lambda *_: torch.float32)
    assert finetune("--epochs 1 --resume", output="automatic")["precision"] == "bfloat16"


@pytest.mark.slow
def test_a_resumed_run_reports_times_and_images_of_the_whole_run(finetune, monkeypatch):
    whole = finetune("--epochs 2")
    again = finetune("--epochs 2 --resume")  # nothing is left to do
    for name in ("seconds", "images_per_second", "waiting_share"):
        assert again[name] == whole[name] > 0, name
    seen, stopped = [], lambda run: seen.append(run.meter.images) or run.stop._note(2, None)
    with pytest.raises(runs.Stopped):
        finetune("--epochs 2", after_epoch=stopped)  # which is at the first step of the second epoch
    finetune("--epochs 2 --resume", after_epoch=lambda run: seen.append(run.meter.images))
    assert seen[1] > seen[0]


def test_a_run_is_not_resumed_on_other_images(finetune, once, images, tmp_path):
    """An added image moves none of the others, but training would go on with what the run has not begun with."""
    shutil.copytree(images, tmp_path / "moved")
    again = finetune(f"--data-dir {tmp_path / 'moved'} --epochs 1 --resume")  # the same images, wherever they lie
    assert again["images"] == json.loads((once / "results.json").read_text())["images"]
    shutil.copy(images / "train/dark/0.png", tmp_path / "moved/train/dark/new.png")
    with pytest.raises(InputError, match=r"trained on other images than .*moved holds now: .*drop --resume"):
        finetune(f"--data-dir {tmp_path / 'moved'} --epochs 1 --resume")


def test_a_resumed_run_keeps_how_much_faster_adapters_learn(finetune, once, monkeypatch):
    """It is in the optimizer's state, and the head's temperature depends on it."""
    resumed, train = [], finetune_lora.train
    monkeypatch.setattr(finetune_lora.initialization, "ADAPTER_LR_FACTOR", 2.0)
    monkeypatch.setattr(finetune_lora, "train", lambda run, *args: resumed.append(run) or train(run, *args))
    finetune("--epochs 1 --resume")
    assert resumed[0].adapter_lr_factor == 24


def test_the_best_epoch_is_not_looked_for_in_another_folder(finetune):
    results = finetune("--epochs 1 --keep-best accuracy")
    with pytest.raises(InputError, match=r"--keep-best: the best adapter is beside .*resume with that folder"):
        finetune(f"--epochs 1 --keep-best accuracy --resume {results['folder'] / 'last.pth'}", output="elsewhere")


def test_a_network_without_batch_norm_goes_on_on_a_gpu(finetune, once, monkeypatch):
    """Where the norms of a ResNet would be frozen; to a ViT that is no other setting."""
    monkeypatch.setattr(finetune_lora, "settled_norms", lambda *_: "frozen")
    assert finetune("--epochs 1 --resume")["epochs"] == 1


@pytest.mark.slow
def test_a_stopped_run_whose_norms_follow_goes_on_bit_for_bit(finetune, monkeypatch, saved, narrow):
    options = f"--checkpoint {saved(narrow)} --image-size 32 --lora-rank 2 --epochs 2"
    whole = finetune(f"{options} --norms follow", output="whole")
    with pytest.raises(runs.Stopped):  # at the first step of the second epoch
        finetune(options, output="stopped", after_epoch=lambda run: run.stop._note(2, None))
    with monkeypatch.context() as on_a_gpu:  # where `auto` is another thing, and the message names what it was
        on_a_gpu.setattr(finetune_lora, "settled_norms", lambda *_: "frozen")
        with pytest.raises(InputError, match="norms was follow, is frozen"):
            finetune(f"{options} --resume", output="stopped")
    again = finetune(f"{options} --norms follow --resume", output="stopped")
    files = [results["folder"] / "lora.pth" for results in (again, whole)]
    assert "layer1.0.bn1.running_var" in tensors(files[0])
    assert_same_tensors(*files)


def test_a_stop_after_the_last_step_stops_too(finetune):
    """Of a cross-validation the next part would begin otherwise."""

    def interrupt(run):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(runs.Stopped, match="1 of 1 epochs are saved"):
        finetune("--epochs 1", after_epoch=interrupt)
    assert finetune("--epochs 1 --resume")["epochs"] == 1


def test_an_adapter_is_calibrated_once_however_often_its_run_ends(finetune, monkeypatch):
    """A run killed between its calibrated lora.pth and its results leaves the same file when it goes on."""
    options = "--epochs 1 --keep-best accuracy"
    whole = finetune(options, output="whole")
    with monkeypatch.context() as patch:
        patch.setattr(reports, "write_finetuning", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(options, output="parts")
    resumed = finetune(f"{options} --resume", output="parts")
    assert_same_tensors(resumed["folder"] / "lora.pth", whole["folder"] / "lora.pth")
    for name in ("temperature", "calibration_error", "val_loss"):
        assert resumed[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-6), name
