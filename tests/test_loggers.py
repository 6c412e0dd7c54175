"""--log: each row of metrics.csv goes to a tracker, in its mode without a network."""

import importlib.util
import json
from unittest import mock

import pytest

import finetune_lora
from moco import pretrain
from tests.run_folders import metrics
from toolkit import InputError
from toolkit.run import loggers


def test_tensorboard(finetune):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = finetune("--log tensorboard")["folder"]
    found = events.EventAccumulator(str(folder / "tensorboard")).Reload()
    for name in ("train_loss", "val_accuracy"):
        logged = [(event.step, event.value) for event in found.Scalars(name)]
        assert logged == [(row["epoch"], pytest.approx(row[name])) for row in metrics(folder)]


def test_wandb(finetune, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sent = []
    send = wandb.Run.log

    def log(run, numbers):
        of_run = run.project, run.name, run.config["finetune"]["lora_rank"]
        sent.append((*of_run, numbers["epoch"], numbers["val_accuracy"]))
        send(run, numbers)

    monkeypatch.setattr(wandb.Run, "log", log)
    folder = finetune("--log wandb")["folder"]
    of_run = (loggers.PROJECT, "out", 8)
    assert sent == [(*of_run, row["epoch"], pytest.approx(row["val_accuracy"])) for row in metrics(folder)]
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for main in (finetune_lora.main, pretrain.main):
        with pytest.raises(InputError, match=r"^--tracker wandb: needs wandb: pip install wandb$"):
            main(["--log", "wandb", "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_not_logged_may_go_on_logged(once, finetune):
    pytest.importorskip("tensorboard")
    config = json.loads((once / "results.json").read_text())["config"]
    results = finetune("--epochs 1 --resume --log tensorboard")
    assert results["config"] == config


def test_a_stopped_run_ends_its_tracker_and_one_that_cannot_begin_is_a_line(finetune, monkeypatch):
    ended = []
    stops = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", lambda *_: (stops, lambda: ended.append(True)))
    with pytest.raises(KeyboardInterrupt):
        finetune("--tracker tensorboard")
    assert ended == [True]
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", lambda *_: 1 / 0)
    with pytest.raises(InputError, match=r"^--tracker tensorboard cannot begin: division by zero$"):
        finetune("--tracker tensorboard", "other")
