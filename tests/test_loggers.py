"""--log: each row of metrics.csv goes to a tracker, in its mode without a network."""

import csv
import json
import sys

import pytest

import finetune_lora
from moco import pretrain
from toolkit import InputError
from toolkit.run import loggers


def rows(folder) -> list[dict[str, float]]:
    with open(folder / "metrics.csv") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_tensorboard(finetune):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = finetune("--log tensorboard")["folder"]
    found = events.EventAccumulator(str(folder / "tensorboard")).Reload()
    for name in ("train_loss", "val_accuracy"):
        logged = [(event.step, event.value) for event in found.Scalars(name)]
        assert logged == [(row["epoch"], pytest.approx(row[name])) for row in rows(folder)]


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
    assert sent == [(*of_run, row["epoch"], pytest.approx(row["val_accuracy"])) for row in rows(folder)]
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


def test_mlflow(finetune, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder = finetune("--log mlflow")["folder"]
    client = mlflow.MlflowClient(f"file://{tmp_path}/mlruns")
    experiment = client.get_experiment_by_name(loggers.PROJECT)
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.params["finetune.lora_rank"] == "8"
    logged = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "val_accuracy")]
    assert logged == [(row["epoch"], pytest.approx(row["val_accuracy"])) for row in rows(folder)]


def test_trackio(finetune, monkeypatch):
    """What it is asked for: its own files belong to a process that it starts."""
    asked = []

    class Run:
        def log(self, numbers):
            asked.append((numbers["epoch"], numbers["val_accuracy"]))

        def finish(self):
            asked.append("finished")

    class Trackio:
        @staticmethod
        def init(project, name, config):
            asked.append((project, name, config["finetune"]["lora_rank"]))
            return Run()

    monkeypatch.setitem(sys.modules, "trackio", Trackio)
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: True)
    folder = finetune("--log trackio")["folder"]
    epochs = [(row["epoch"], pytest.approx(row["val_accuracy"])) for row in rows(folder)]
    assert asked == [(loggers.PROJECT, "out", 8), *epochs, "finished"]


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    for main in (finetune_lora.main, pretrain.main):
        with pytest.raises(InputError, match=r"^--tracker mlflow: needs mlflow: pip install mlflow$"):
            main(["--log", "mlflow", "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_not_logged_may_go_on_logged(once, finetune):
    pytest.importorskip("tensorboard")
    config = json.loads((once / "results.json").read_text())["config"]
    results = finetune("--epochs 1 --resume --log tensorboard")
    assert results["config"] == config


def test_a_stopped_run_ends_its_tracker_and_one_that_cannot_begin_is_a_line(finetune, monkeypatch):
    class Trackio:
        ended = 0

        @classmethod
        def init(cls, **_):
            return cls()

        def log(self, numbers):
            raise KeyboardInterrupt

        def finish(self):
            Trackio.ended += 1

    monkeypatch.setitem(sys.modules, "trackio", Trackio)
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(KeyboardInterrupt):
        finetune("--tracker trackio")
    assert Trackio.ended == 1
    monkeypatch.setattr(Trackio, "init", lambda **_: 1 / 0)
    with pytest.raises(InputError, match=r"^--tracker trackio cannot begin: division by zero$"):
        finetune("--tracker trackio", "other")
