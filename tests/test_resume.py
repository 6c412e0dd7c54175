"""Runs that are stopped and go on, in their own folder or in another."""

import json
import os
import shutil
import signal

import pytest
import torch

import finetune_lora
from lora_utils import read_adapter_file
from tests.run_folders import metrics, tensors
from toolkit import InputError, devices
from toolkit.files import read_checkpoint
from toolkit.models.backbones import build_backbone
from toolkit.run import reports, runs

# --------------------------------------------------------------------------------------------------- a run's own files


def test_a_run_that_was_begun_before_there_was_calibration_goes_on_without(finetune):
    folder = finetune("--epochs 1")["folder"]
    state = read_checkpoint(folder / "last.pth")
    torch.save(state | {"head_temperature": state["head_temperature"][:2]}, folder / "old.pth")
    results = finetune(f"--epochs 1 --resume {folder / 'old.pth'}")
    assert "temperature" not in results and "temperature" not in read_adapter_file(folder / "lora.pth")["metadata"]


@pytest.mark.slow
@pytest.mark.parametrize("done", ["within an epoch", "all epochs"])
def test_a_run_resumed_into_another_folder_leaves_all_its_files_there(finetune, monkeypatch, tmp_path, done):
    if done == "within an epoch":
        monkeypatch.setattr(runs.StopRequests, "check", lambda requests: (_ for _ in ()).throw(runs.Stopped(2)))
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
    ours, theirs = tensors(results["folder"] / "lora.pth"), tensors(whole["folder"] / "lora.pth")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


WAYS = {
    "adapters": "--lora-dropout 0.1 --accumulation-steps 2 --wise-ft auto",
    "4 bits": "--use-qlora --mixup 0.2",
    "features of a ResNet": "--checkpoint {resnet} --arch resnet18 --image-size 32 --adapt-last 1 --cache-features ram",
    "features of views": "--adapt-last 1 --augmentation crop --cache-features disk",
    "masks": "--task segmentation --data-dir {pairs} --batch-size 4",
    "labels": "--task multilabel --data-dir {hospital} --data-list {hospital}/labels.csv --label-columns sick well"
    " --adapt-last 1 --cache-features disk",
    "numbers": "--task regression --data-dir {hospital} --data-list {hospital}/numbers.csv --label-columns age",
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_goes_on_bit_for_bit(finetune, saved, resnet, hospital, pairs, monkeypatch, tmp_path, way):
    """It stopped at the first step of its second epoch, and has other workers from then on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = WAYS[way].format(resnet=saved(resnet, "resnet.pth"), hospital=hospital, pairs=pairs)
    whole = finetune(options, output="whole")
    with pytest.raises(runs.Stopped):
        finetune(options, output="stopped", after_epoch=lambda run: run.stop._note(2, None))
    resumed = finetune(f"{options} --workers 1 --resume", output="stopped")
    assert resumed["epochs"] == 2 and resumed["val_loss"] == whole["val_loss"]
    ours, theirs = (read_adapter_file(results["folder"] / "lora.pth") for results in (resumed, whole))
    assert ours["metadata"].get("task") == theirs["metadata"].get("task")
    assert ours["tensors"].keys() == theirs["tensors"].keys()
    assert all(torch.equal(tensor, theirs["tensors"][name]) for name, tensor in ours["tensors"].items())


def test_an_automatic_precision_is_recorded_and_kept(finetune, monkeypatch):
    """Measured once: by a resumed run no more, whatever the processor."""
    monkeypatch.setattr(devices, "faster_dtype", lambda *_: torch.bfloat16)
    folder = finetune("--epochs 1", output="automatic")["folder"]
    typed = tensors(finetune("--epochs 1 --precision bf16", output="typed")["folder"] / "lora.pth")
    assert all(torch.equal(tensor, typed[name]) for name, tensor in tensors(folder / "lora.pth").items())
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


def test_a_run_is_not_resumed_on_other_images(finetune, images, tmp_path):
    """An added image moves none of the others, but training would go on with what the run has not begun with."""
    shutil.copytree(images, tmp_path / "own")
    finetune(f"--data-dir {tmp_path / 'own'} --epochs 1")
    (tmp_path / "own").rename(tmp_path / "moved")
    again = finetune(f"--data-dir {tmp_path / 'moved'} --epochs 1 --resume")  # the same images, wherever they lie
    assert again["images"] == json.loads((again["folder"] / "results.json").read_text())["images"]
    shutil.copy(images / "train/dark/0.png", tmp_path / "moved/train/dark/new.png")
    with pytest.raises(InputError, match=r"trained on other images than .*moved holds now: .*without --resume"):
        finetune(f"--data-dir {tmp_path / 'moved'} --epochs 1 --resume")


# ------------------------------------------------------------------------------------- the start, the rate, no collapse


def test_a_resumed_run_keeps_how_much_faster_adapters_learn(finetune, monkeypatch):
    """It is in the optimizer's state, and the head's temperature depends on it."""
    runs_made = []
    finetune("--epochs 1", after_epoch=runs_made.append)
    monkeypatch.setattr(finetune_lora.initialization, "ADAPTER_LR_FACTOR", 2.0)
    real_train = finetune_lora.train
    monkeypatch.setattr(finetune_lora, "train", lambda run, *args: runs_made.append(run) or real_train(run, *args))
    finetune("--epochs 1 --resume")
    assert (
        runs_made[0].adapter_lr_factor
        == runs_made[1].adapter_lr_factor
        == 24
        != finetune_lora.initialization.ADAPTER_LR_FACTOR
    )


def test_the_best_epoch_is_not_looked_for_in_another_folder(finetune):
    results = finetune("--epochs 1 --keep-best accuracy")
    with pytest.raises(InputError, match=r"--keep-best: the best adapter is beside .*resume with that folder"):
        finetune(f"--epochs 1 --keep-best accuracy --resume {results['folder'] / 'last.pth'}", output="elsewhere")


# --------------------------------------------------------------------------------------------------- ways to fine-tune


def test_a_network_without_batch_norm_goes_on_on_a_gpu(finetune, monkeypatch):
    """Where the norms of a ResNet would be frozen; to a ViT that is no other setting."""
    options = "--lora-rank 2 --epochs 2"
    with pytest.raises(runs.Stopped):
        finetune(options, output="stopped", after_epoch=lambda run: run.stop._note(2, None))
    monkeypatch.setattr(finetune_lora, "settled_norms", lambda *_: "frozen")
    assert finetune(f"{options} --resume", output="stopped")["epochs"] == 2


@pytest.mark.slow
def test_a_stopped_run_whose_norms_follow_goes_on_bit_for_bit(finetune, monkeypatch, tmp_path):
    torch.manual_seed(0)
    torch.save(build_backbone("resnet18", 5).state_dict(), tmp_path / "resnet.pth")
    options = f"--checkpoint {tmp_path / 'resnet.pth'} --image-size 32 --lora-rank 2 --epochs 2"
    whole = finetune(f"{options} --norms follow", output="whole")
    with pytest.raises(runs.Stopped):  # at the first step of the second epoch
        finetune(options, output="stopped", after_epoch=lambda run: run.stop._note(2, None))
    with monkeypatch.context() as on_a_gpu:  # where `auto` is another thing, and the message names what it was
        on_a_gpu.setattr(finetune_lora, "settled_norms", lambda *_: "frozen")
        with pytest.raises(InputError, match="norms was follow, is frozen"):
            finetune(f"{options} --resume", output="stopped")
    again = finetune(f"{options} --norms follow --resume", output="stopped")
    ours, theirs = (tensors(results["folder"] / "lora.pth") for results in (again, whole))
    assert ours.keys() == theirs.keys() and "layer1.0.bn1.running_var" in ours
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_a_stop_after_the_last_step_stops_too(finetune, tmp_path):
    """Of a cross-validation the next part would begin otherwise."""

    def interrupt(run):
        if len(run.history) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(runs.Stopped, match="2 of 2 epochs are saved"):
        finetune("--epochs 2", after_epoch=interrupt)
    assert finetune("--epochs 2 --resume")["epochs"] == 2


def test_an_adapter_is_calibrated_once_however_often_its_run_ends(finetune, monkeypatch):
    """A run killed between its calibrated lora.pth and its results leaves the same file when it goes on."""
    options = "--epochs 2 --keep-best accuracy"
    whole = finetune(options, output="whole")
    with monkeypatch.context() as patch:
        patch.setattr(reports, "write_finetuning", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(options, output="parts")
    resumed = finetune(f"{options} --resume", output="parts")
    ours, theirs = (tensors(of["folder"] / "lora.pth") for of in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    for name in ("temperature", "calibration_error", "val_loss"):
        assert resumed[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-6), name
