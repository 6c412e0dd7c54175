"""Who stands on which side: toolkit/images/splitting.py, --group-by, and cross-validation with --folds."""

import json
import math
import re
import shlex
import shutil
import statistics
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml

import deploy_lora
import finetune_lora
from tests.image_files import touch, write
from tests.run_folders import column, names_in, rows_of
from toolkit import InputError, distributed
from toolkit.answers import probe
from toolkit.answers.measures import share_interval
from toolkit.images import splitting
from toolkit.images.sources import load_splits
from toolkit.run import folds, output_folder, search
from toolkit.run.guard import Collapsed
from toolkit.run.options import stored_sections


def patients(images) -> set[str]:
    return {name.split("/")[-2] for name in images.relative_names()}


def test_no_patient_is_on_two_sides(hospital):
    listed = {"data_dir": hospital, "group_by": "Patient"}
    for how in (
        {"data_dir": hospital / "scans", "group_by": "2"},
        listed | {"data_list": [hospital / "all.csv"]},
        listed | {"data_list": [hospital / "labels.csv"], "task": "multilabel"},
        listed | {"data_list": [hospital / "numbers.csv"], "task": "regression"},
    ):
        splits, again = (load_splits("imagefolder", seed=seed, **how) for seed in (0, 5))
        assert again.digest() == splits.digest()
        chosen = load_splits("imagefolder", eval_split="validation", **how)
        for train, val, *_ in (splits, search.parts_of(splits), chosen):
            assert patients(train) and patients(val) and not patients(train) & patients(val)
        assert not patients(chosen.train) & patients(splits.val)
        train, val, *_ = splits
        assert len(patients(train) | patients(val)) == 20
        counts = {"train_images": len(train), "train_groups": len(patients(train))}
        assert splits.counts() == counts | {"val_images": len(val), "val_groups": len(patients(val))}


def test_groups_are_dealt_so_that_each_part_has_its_share_of_each_label():
    groups = np.random.RandomState(0).randint(0, 60, 600)
    labels = np.where(groups < 6, 1, 0) + 5  # a rare class, in six of the groups; labels need not begin at 0
    names = groups.astype(str)
    number = splitting.folds(labels, names, 3)
    for group in range(60):
        assert len(set(number[groups == group])) == 1
    for label in (5, 6):
        shares = np.bincount(number[labels == label], minlength=3) / (labels == label).sum()
        assert shares == pytest.approx(1 / 3, abs=0.08)
    in_part = splitting.by_groups(labels, names, 0.2, 0)
    assert not set(groups[~in_part]) & set(groups[in_part])
    assert 0.15 < in_part.mean() < 0.25 and set(labels[~in_part]) == set(labels[in_part]) == {5, 6}


def test_parts_are_disjoint_and_alike():
    labels = np.array([0] * 50 + [1] * 13 + [2] * 2)
    number = splitting.folds(labels, map(str, range(65)), 5)
    assert set(np.bincount(number)) == {13}
    for label in range(3):
        counts = np.bincount(number[labels == label], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert (number != splitting.folds(labels, map(str, range(65)), 5, turn=1)).any()
    number = splitting.folds([0] * 6, "aaabcd", 2)  # the largest group first
    assert np.bincount(number).tolist() == [3, 3]
    number = splitting.folds([0] * 6 + [0, 1, 0, 1], "aaaaaabbcc", 2)  # a rare label weighs as much as a frequent one
    assert number[7] != number[9]
    labels = np.array([0, 0, 0, 0, 1, 1])
    in_part = splitting.by_groups(labels, np.array(["a", "b", "c", "d", "e", "e"]), 0.5, 0)
    assert set(labels[~in_part]) == {0, 1}
    assert splitting.by_groups([0, 1, 0], np.array(["a", "b", "c"]), 0.2, 0).sum() == 1  # a third: there are no five
    assert splitting.some_of_each([0, 1, 0, 1], 2, "ab", 0) == [0, 1, 2, 3]
    for turn in range(20):  # an image that is listed several times, to count more often in training, stays on one side
        in_part = splitting.by_hash("abc" * 9, [0] * 27, 0.2, turn).reshape(9, 3)
        assert (in_part == in_part[0]).all() and 0 < in_part[0].sum() < 3
    of_one_image = splitting.by_hash(["a"] * 9, [0] * 9, 0.2, 0), splitting.at_random([0], 0.2)
    assert not np.concatenate(of_one_image).any()
    several = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 1, 1], [math.nan, 1, 0], [0, math.nan, 0]])
    assert splitting.strata(several).tolist() == [0, 2, 2, 1, 3]  # an image of several labels is dealt by the rarest


def test_folds_evaluate_each_image_once_spread_numbers_and_tell_what_nothing_trains(hospital, tmp_path, capsys):
    classes = {"data_dir": hospital / "scans", "group_by": "2"}
    numbers = {"data_list": [hospital / "numbers.csv"], "task": "regression", "group_by": "Patient"}
    seen = []
    for number in (1, 2, 3):
        train, val, *_ = load_splits("imagefolder", folds=f"{number}/3", **classes)
        assert not patients(train) & patients(val)
        seen += list(val.relative_names())
        of_numbers = load_splits("imagefolder", folds=f"{number}/3", **numbers)
        assert abs(of_numbers.train.targets.mean() - of_numbers.val.targets.mean()) < 2.5  # of ages from 0 to 19
    assert len(seen) == len(set(seen)) == len(train) + len(val)
    assert len(load_splits("digits", folds="1/5").val) == 360  # of all 1,797, none is set aside before
    touch(tmp_path, "well/1.png", "well/2.png", "sick/3.png", "sick/4.png", "rare/5.png")
    for number in (1, 2):
        load_splits("imagefolder", tmp_path, folds=f"{number}/2")
    assert capsys.readouterr().out.count("no training image of rare is left: all are evaluated on") == 1


def test_given_sets_that_share_a_patient_are_refused(hospital, tmp_path):
    """With --eval-split validation nothing is evaluated on the second list, so it may."""
    title, *lines = (hospital / "all.csv").read_text().splitlines()
    for name, part in (("train.csv", lines[:40]), ("val.csv", lines[38:])):
        (tmp_path / name).write_text("\n".join([title, *part]))
    lists = {"data_dir": hospital, "data_list": [tmp_path / "train.csv", tmp_path / "val.csv"], "group_by": "Patient"}
    with pytest.raises(InputError) as raised:
        load_splits("imagefolder", **lists)
    assert str(raised.value).startswith("--group-by Patient: p11 on both sides, with 4 of 28")
    train, val, *_ = load_splits("imagefolder", eval_split="validation", **lists)
    assert not patients(train) & patients(val)


def test_the_probe_of_a_grouped_run_holds_out_patients(hospital, start, spy):
    listed = f"--data-dir {hospital} --group-by Patient --data-list {hospital}"
    for fitted, told in (
        ("fit_linear_probe", f"--data-dir {hospital}/scans --group-by 2"),
        ("fit_one_vs_rest", f"--task multilabel {listed}/labels.csv"),
        ("fit_ridge", f"--task regression {listed}/numbers.csv"),
    ):
        run = start(told)
        fit = spy(probe, fitted)
        run.start()
        *_, clusters = fit.call_args.args
        names = [name.split("/")[-2] for name in run.splits.train.relative_names()]
        assert [sorted(set(names))[number] for number in clusters.tolist()] == names


def test_each_part_of_a_grouped_run_is_a_run_of_its_own_and_a_table_has_them_all(finetune, hospital, tmp_path, capsys):
    options = f"--data-dir {hospital / 'scans'} --group-by 2 --epochs 1 --lora-rank 0 --labels-per-class 6"
    found = finetune(f"{options} --folds 2")
    printed = capsys.readouterr().out
    for number, results in enumerate(found["folds"], 1):
        own = found["folder"] / "folds" / str(number)
        assert json.loads((own / "results.json").read_text()) == results
        assert results["config"]["data"]["folds"] == f"{number}/2"
        val = load_splits("imagefolder", hospital / "scans", group_by="2", folds=f"{number}/2").val
        assert results["val_images"] == len(val)
        of_images = share_interval(torch.arange(len(val)) < round(results["val_accuracy"] * len(val)))
        assert results["val_accuracy_interval"] != pytest.approx(of_images)  # it is of patients
        told = rf"{len(val)} evaluation images \(part {number} of 2: --folds\), 2 classes, in \d+ \+ 10 groups \(2\)"
        assert re.search(told, printed) and len(patients(val)) == 10
        for row in rows_of(own / "results_answers.csv"):
            assert row["image"].split("/")[1] == row["group"]
    scores = column(found["folds"], "val_accuracy")
    assert f"{statistics.mean(scores):.4f} ± {statistics.stdev(scores):.4f}" in printed

    deploy_lora.main(f"evaluate {own}/lora.pth {hospital}/scans --device cpu --output {tmp_path}/o.json".split())
    assert "in 20 groups; intervals are over groups" in capsys.readouterr().out
    assert (tmp_path / "o_answers.csv").read_text().startswith("image,group,class,")


class Runs:
    """Stands in for `finetune_lora.main`: writes what a run leaves, and stops or collapses where it is told to."""

    stops_at = collapses_at = None
    stop = KeyboardInterrupt()

    def __init__(self, folder: Path):
        self.folder = folder
        self.parts: list[str] = []  # which were run, with an r for those that went on

    def validate(self, typed: str = "") -> dict:
        command = [*shlex.split(typed), "--folds", "3", "--output-dir", str(self.folder), "--device", "cpu"]
        args, sources = finetune_lora.read_options(command)
        return folds.cross_validate(self, None, args, stored_sections(args, sources))

    def __call__(self, command: list[str], after_epoch) -> dict:
        args, _ = finetune_lora.read_options(command)
        assert args.config == self.folder / ".folds.yaml" and args.device == "cpu"
        self.parts.append(args.folds + " r" * (args.resume is not None))
        write(args.output_dir / "last.pth", b"\0lora_rank")  # as torch writes it
        (args.output_dir / "results.json").unlink(missing_ok=True)
        if args.folds == self.stops_at:
            raise self.stop
        number = int(args.folds[0])
        settled = {"precision": len(self.parts)}  # by each part, as of --precision auto
        results = {"task": "classification", "val_images": 7 + number, "val_accuracy": number / 10}
        results["config"] = {"data": {"folds": args.folds}, "finetune": settled}
        (args.output_dir / "results.json").write_text(json.dumps(results))
        if args.folds == self.collapses_at:
            raise Collapsed(1, 1e-3, 0, args.output_dir / "lora.pth", results)
        return results


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path / "out")


@pytest.mark.parametrize("way", ["--resume", "--resume {}", "--resume={}", "--resume last.pth"])
def test_a_stopped_cross_validation_goes_on_with_its_settings_alone(runs, tmp_path, way, capsys):
    """A finished part goes on as well, and has nothing left to train."""
    with pytest.raises(InputError, match="has no parts to go on with; start without it"):
        runs.validate("--resume")
    runs.stops_at = "2/3"
    with pytest.raises(KeyboardInterrupt):
        runs.validate("--epochs 2")
    runs.stops_at = None
    config = tmp_path / "out/config.yaml"
    config.write_text("of the next")
    config.with_name(".folds.yaml").write_text("finetune: {epochs: 7}")
    found = runs.validate(f"--epochs 2 --workers 1 {way.format(tmp_path / 'out/last.pth')}")
    assert runs.parts == ["1/3", "2/3", "1/3 r", "2/3 r", "3/3"]
    assert column(found["folds"], "val_accuracy") == [0.1, 0.2, 0.3]
    assert f"0.2000 ± 0.1000       3 of {tmp_path}/out/folds/1/results.json; " in capsys.readouterr().out
    assert config.read_text() == "of the next"
    runs.stop = InputError("of other settings")
    for part in ("1/3", "3/3"):
        runs.stops_at = part
        with pytest.raises(InputError, match="of other settings"):
            runs.validate("--epochs 3 --resume")
        assert config.read_text() == "of the next"


def test_a_part_that_collapses_counts_and_a_new_cross_validation_moves_what_was_there_aside(runs, tmp_path, capsys):
    write(tmp_path / "out/lora.pth", b"\0lora_rank")
    runs.collapses_at = "2/3"
    assert len(runs.validate()["folds"]) == 3 and runs.parts == ["1/3", "2/3", "3/3"]
    printed = capsys.readouterr().out
    assert "training collapses in epoch 1" in printed and "0.2000 ± 0.1000" in printed
    assert (tmp_path / "out-1/lora.pth").exists() and not (tmp_path / "out/lora.pth").exists()
    assert "unfinished" in printed
    (tmp_path / "out/.folds.yaml").write_text("finetune: {epochs: 7}")  # it was killed once
    runs.validate("--epochs 3")
    assert names_in(tmp_path / "out-2") == {"folds", "config.yaml", ".folds.yaml"}
    assert "unfinished" not in capsys.readouterr().out
    with mock.patch.object(Runs, "__call__", side_effect=InputError("no image")), pytest.raises(InputError):
        runs.validate()
    assert [names_in(tmp_path), names_in(tmp_path / "out")] == [{"out", "out-1", "out-2"}, {"config.yaml", "folds"}]


@pytest.mark.parametrize("place", ["out/config.yaml", "out/folds/1/config.yaml", "my.yaml"])
def test_the_parts_read_the_settings_wherever_they_were(place, runs, tmp_path):
    """Those of an earlier run are moved aside with it."""
    config = tmp_path / place
    text = "finetune: {epochs: 3}\nsettled: null\n"
    write(config, text)
    (config.parent / "last.pth").touch()
    runs.validate(f"--config {config} --lora-rank 2")
    assert len(runs.parts) == 3
    asked = {"model": {}, "data": {"folds": "3"}, "finetune": {"lora_rank": 2, "epochs": 3}}
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text()) == asked | {"settled": None}
    assert (tmp_path / place.replace("out/", "out-1/")).read_text() == text


def test_no_process_takes_the_parts_of_an_earlier_run_for_its_own(runs, tmp_path, monkeypatch):
    """The first of several processes moves them aside, and may be slow: the others wait at the next exchange."""
    runs.validate()
    begin = mock.Mock()
    monkeypatch.setattr(output_folder, "begin_folder", begin)

    def gather(value):
        if begin.called:  # by the first process
            shutil.rmtree(tmp_path / "out/folds", ignore_errors=True)
            (tmp_path / "out/.folds.yaml").touch()
        return [value, value]

    monkeypatch.setattr(distributed, "gather", gather)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    runs.validate()
    assert runs.parts == ["1/3", "2/3", "3/3"] * 2
