"""--folds: a run for each part, one table, and what a stopped or changed cross-validation does."""

import json
import shlex
import statistics

import pytest
import torch

import finetune_lora
from tests.run_folders import rows_of
from tests.test_splitting import patients
from toolkit import InputError
from toolkit.files import SHIPPED, read_checkpoint
from toolkit.images.sources import load_splits
from toolkit.run import folds
from toolkit.run.guard import Collapsed


def test_each_part_is_a_run_of_its_own_and_a_table_has_them_all(finetune, hospital, capsys):
    options = f"--data-dir {hospital / 'scans'} --group-by 2 --epochs 1 --lora-rank 0 --labels-per-class 6"
    found = finetune(f"{options} --folds 2")
    printed, folder = capsys.readouterr().out, found["folder"]
    evaluated = set()
    for number, results in enumerate(found["folds"], 1):
        own = folder / "folds" / str(number)
        assert json.loads((own / "results.json").read_text()) == results and (own / "lora.pth").exists()
        assert results["config"]["data"]["folds"] == f"{number}/2"
        val = load_splits("imagefolder", hospital / "scans", group_by="2", folds=f"{number}/2").val
        assert results["val_images"] == len(val) and not evaluated & patients(val)
        evaluated |= patients(val)
    assert len(evaluated) == 20
    *rows, mean, spread = rows_of(folder / "folds.csv")
    scores = [results["val_accuracy"] for results in found["folds"]]
    probes = [results["probe_accuracy_before"] for results in found["folds"]]
    assert [row["part"] for row in (*rows, mean, spread)] == ["1", "2", "mean", "spread"]
    assert [float(row["val_accuracy"]) for row in rows] == scores
    for column, values in (("val_accuracy", scores), ("probe_accuracy_before", probes)):
        assert float(mean[column]) == pytest.approx(statistics.mean(values))
        assert float(spread[column]) == pytest.approx(statistics.stdev(values))
    assert found["val_accuracy"] == pytest.approx(statistics.mean(scores))
    assert f"{100 * statistics.mean(scores):.2f}" in printed
    again = finetune(f"{options} --folds 2/2", "alone")
    assert again["val_accuracy"] == scores[1] and again["val_loss"] == found["folds"][1]["val_loss"]


class Runs:
    """Stands in for `finetune_lora.main`: writes what a run leaves, and stops or collapses where it is told to."""

    def __init__(self):
        self.commands: list[list[str]] = []
        self.stops_at = self.collapses_at = None

    def __call__(self, command: list[str], after_epoch) -> dict:
        self.commands.append(command)
        args, _ = finetune_lora.read_options(command)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "last.pth").touch()
        if args.folds == self.stops_at:
            raise KeyboardInterrupt
        accuracy = int(args.folds.partition("/")[0]) / 10
        results = {"val_images": 7, "val_accuracy": accuracy, "probe_accuracy_before": None}
        (args.output_dir / "results.json").write_text(json.dumps(results))
        if args.folds == self.collapses_at:
            raise Collapsed(1, 1e-3, 0, args.output_dir / "lora.pth", results)
        return results

    @property
    def parts(self) -> list[str]:
        """Which parts were run, with an r for those that went on."""
        found = [finetune_lora.read_options(command)[0] for command in self.commands]
        return [args.folds + " r" * (args.resume is not None) for args in found]


@pytest.fixture
def stand_in():
    return Runs()


@pytest.fixture
def validate(stand_in, tmp_path):
    """validate("--epochs 3") cross-validates over three parts with the runs that stand in."""

    def run(options: str = "") -> dict:
        command = [*shlex.split(options), "--folds", "3", "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
        args, _ = finetune_lora.read_options(command)
        return folds.cross_validate(stand_in, command, None, args)

    return run


def test_a_stopped_cross_validation_goes_on(validate, stand_in, tmp_path):
    """Finished parts are not run again, and an unfinished one goes on."""
    stand_in.stops_at = "2/3"
    with pytest.raises(KeyboardInterrupt):
        validate()
    with pytest.raises(InputError, match=r"has parts of another run \(finetune.epochs was 10, is 4\)"):
        validate("--epochs 4 --resume")
    stand_in.stops_at = None
    found = validate("--workers 1 --resume")
    assert stand_in.parts == ["1/3", "2/3", "2/3 r", "3/3"]
    assert [part["val_accuracy"] for part in found["folds"]] == [0.1, 0.2, 0.3]
    assert found["val_accuracy"] == pytest.approx(0.2) and found["val_accuracy_spread"] == pytest.approx(0.1)
    assert rows_of(tmp_path / "out/folds.csv")[3] == {
        **{"part": "mean", "val_images": "", "probe_accuracy_before": ""},
        "val_accuracy": str(found["val_accuracy"]),
    }
    assert validate("--resume") == found and len(stand_in.commands) == 4  # nothing was left to run


def test_parts_of_other_images_or_another_base_are_not_gone_on_with(validate, stand_in, tmp_path):
    """Every image is to be evaluated once, by a model that did not train on it."""
    stand_in.stops_at = "2/3"
    with pytest.raises(KeyboardInterrupt):
        validate()
    with pytest.raises(InputError, match=r"another run \(data.labels_per_class was None, is 3, other images\)"):
        validate("--labels-per-class 3 --resume")
    torch.save(read_checkpoint(SHIPPED) | {"note": "another file"}, tmp_path / "copy.pth")
    with pytest.raises(InputError, match="other base"):
        validate(f"--checkpoint {tmp_path / 'copy.pth'} --resume")
    assert stand_in.parts == ["1/3", "2/3"]


def test_parts_that_are_not_there_are_one_line(validate, stand_in):
    with pytest.raises(InputError, match="has no parts to go on with; start without it"):
        validate("--resume")


def test_a_part_that_collapses_counts_and_the_others_run(validate, stand_in, capsys):
    stand_in.collapses_at = "2/3"
    assert validate()["val_accuracy"] == pytest.approx(0.2) and stand_in.parts == ["1/3", "2/3", "3/3"]
    assert "training collapses in epoch 1" in capsys.readouterr().out


def test_a_new_cross_validation_moves_what_was_there_aside(validate, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/lora.pth").touch()
    validate()
    assert (tmp_path / "out-1/lora.pth").exists() and not (tmp_path / "out/lora.pth").exists()
    assert "unfinished" in capsys.readouterr().out
    validate("--epochs 3")
    assert {path.name for path in (tmp_path / "out-2").iterdir()} == {"folds", "folds.csv", "config.yaml"}
    assert "unfinished" not in capsys.readouterr().out and (tmp_path / "out/folds/3/results.json").exists()
