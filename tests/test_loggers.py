"""--log: each row of metrics.csv goes to a tracker, in its mode without a network."""

import importlib.util
import json
import math
from pathlib import Path
from unittest import mock

import pytest

import finetune_lora
from moco import pretrain
from tests.run_folders import metrics
from toolkit import InputError
from toolkit.run import loggers

# A row also has what is no finite number.
ROWS = [
    {"epoch": 1, "train_loss": 0.5, "val_accuracy": 0.25, "val_r2": math.nan, "note": "text"},
    {"epoch": 2, "train_loss": 0.25, "val_accuracy": 0.75, "val_r2": 0.5, "note": "text"},
]


def log_rows(name: str, folder: Path) -> None:
    with loggers.opened(name, folder, {"finetune": {"lora_rank": 8}}) as log:
        for row in ROWS:
            log(row)


def test_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_rows("tensorboard", tmp_path)
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("val_accuracy")] == [(1, 0.25), (2, 0.75)]
    assert [event.step for event in found.Scalars("val_r2")] == [2]


def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sent = []
    send = wandb.Run.log

    def log(run, numbers):
        sent.append((run.project, run.name, run.config["finetune"]["lora_rank"], numbers["epoch"]))
        send(run, numbers)

    monkeypatch.setattr(wandb.Run, "log", log)
    log_rows("wandb", tmp_path)
    assert sent == [(loggers.PROJECT, tmp_path.name, 8, epoch) for epoch in (1, 2)]
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.fixture
def asked(monkeypatch) -> list:
    """Stands in for a tracker: what it is asked for."""
    asked = []

    def begin(folder: Path, settings: dict):
        asked.append((folder.name, settings["finetune"]["lora_rank"]))
        return lambda numbers, epoch: asked.append((epoch, numbers["val_accuracy"])), lambda: asked.append("ended")

    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", begin)
    return asked


def test_a_run_logs_its_settings_and_rows_and_may_begin_to_where_it_goes_on(once, finetune, asked):
    config = json.loads((once / "results.json").read_text())["config"]
    assert finetune("--epochs 1 --resume --log tensorboard")["config"] == config
    assert asked == [("out", 8), "ended"]  # its one epoch was over
    asked.clear()
    [row] = metrics(finetune("--epochs 1 --log tensorboard", "logged")["folder"])
    assert asked == [("logged", 8), (1, pytest.approx(row["val_accuracy"])), "ended"]


def test_a_stopped_run_ends_its_tracker_and_one_that_cannot_begin_is_a_line(tmp_path, monkeypatch):
    end = mock.Mock()
    stops = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", lambda *_: (stops, end))
    with pytest.raises(KeyboardInterrupt):
        log_rows("tensorboard", tmp_path)
    end.assert_called_once()
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", lambda *_: 1 / 0)
    with pytest.raises(InputError, match=r"^--tracker tensorboard cannot begin: division by zero$"):
        log_rows("tensorboard", tmp_path)


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for main in (finetune_lora.main, pretrain.main):
        with pytest.raises(InputError, match=r"^--tracker wandb: needs wandb: pip install wandb$"):
            main(["--log", "wandb", "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
