"""--folds: a run for each part, one table, and what a stopped or changed cross-validation does."""

import csv
import json
import statistics

import pytest

import finetune_lora
from tests.test_splitting import patients
from toolkit import InputError
from toolkit.data import load_splits


def read_table(folder) -> list[dict[str, str]]:
    with open(folder / "folds.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_each_part_is_a_run_of_its_own_and_a_table_has_them_all(finetune, hospital, capsys):
    options = f"--data-dir {hospital / 'scans'} --group-by 2 --epochs 1"
    found = finetune(f"{options} --folds 3")
    printed, folder = capsys.readouterr().out, found["folder"]
    evaluated = set()
    for number, results in enumerate(found["folds"], 1):
        own = folder / "folds" / str(number)
        assert json.loads((own / "results.json").read_text()) == results and (own / "lora.pth").exists()
        assert results["config"]["data"]["folds"] == f"{number}/3"
        val = load_splits("imagefolder", hospital / "scans", group_by="2", folds=f"{number}/3").val
        assert results["val_images"] == len(val) and not evaluated & patients(val)
        evaluated |= patients(val)
    assert len(evaluated) == 20
    *rows, mean, spread = read_table(folder)
    scores = [results["val_accuracy"] for results in found["folds"]]
    probes = [results["probe_accuracy_before"] for results in found["folds"]]
    assert [row["part"] for row in (*rows, mean, spread)] == ["1", "2", "3", "mean", "spread"]
    assert [float(row["val_accuracy"]) for row in rows] == scores
    for column, values in (("val_accuracy", scores), ("probe_accuracy_before", probes)):
        assert float(mean[column]) == pytest.approx(statistics.mean(values))
        assert float(spread[column]) == pytest.approx(statistics.stdev(values))
    assert found["val_accuracy"] == pytest.approx(statistics.mean(scores))
    assert f"{100 * statistics.mean(scores):.2f}" in printed
    again = finetune(f"{options} --folds 2/3", "alone")
    assert again["val_accuracy"] == scores[1] and again["val_loss"] == found["folds"][1]["val_loss"]


def test_a_stopped_cross_validation_goes_on(finetune, monkeypatch, tmp_path):
    """With finished parts as they are, and an unfinished one from where it was."""
    whole = finetune("--folds 3", "whole")
    epochs = []

    def stop(run) -> None:
        epochs.append(run.args.folds)
        if len(epochs) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune("--folds 3", after_epoch=stop)
    first = (tmp_path / "out/folds/1/results.json").read_bytes()
    with pytest.raises(InputError, match=r"config.yaml has other settings \(finetune.lora_rank was 8, is 4"):
        finetune("--folds 3 --resume --lora-rank 4")
    resumed = finetune("--folds 3 --resume", after_epoch=lambda run: epochs.append(run.args.folds))
    assert epochs == ["1/3", "1/3", "2/3", "2/3", "3/3", "3/3"]
    assert (tmp_path / "out/folds/1/results.json").read_bytes() == first
    losses = [[part["val_loss"] for part in run["folds"]] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    monkeypatch.setattr(finetune_lora, "FineTuning", None)
    assert finetune("--folds 3 --resume")["folds"] == resumed["folds"]  # nothing is left to run


def test_a_new_cross_validation_moves_the_old_one_aside(finetune, tmp_path, capsys):
    finetune("--folds 2 --epochs 1")
    finetune("--epochs 1")
    assert (tmp_path / "out-1/folds/2/lora.pth").exists() and (tmp_path / "out-1/folds.csv").exists()
    assert not (tmp_path / "out/folds").exists() and (tmp_path / "out/lora.pth").exists()
    finetune("--folds 2 --epochs 1")
    assert not (tmp_path / "out/lora.pth").exists() and (tmp_path / "out-2/lora.pth").exists()
    assert "unfinished" not in capsys.readouterr().out
