"""toolkit/images/splitting.py, and what `load_splits` makes of --group-by and --folds: who stands on which side."""

import json

import numpy as np
import pytest

import deploy_lora
from toolkit import InputError
from toolkit.answers import probe
from toolkit.answers.measures import wilson_interval
from toolkit.images import splitting
from toolkit.images.sources import load_splits, validation_part
from toolkit.run import search


def patients(images) -> set[str]:
    return {name.split("/")[-2] for name in images.relative_names()}


@pytest.mark.parametrize(
    ("list_name", "task", "by"),
    [
        ("all.csv", "classification", "Patient"),
        ("labels.csv", "multilabel", "Patient"),
        ("numbers.csv", "regression", "Patient"),
        (None, "classification", "2"),
    ],
)
def test_no_patient_is_on_two_sides(hospital, list_name, task, by):
    where = {"data_dir": hospital / "scans"} if list_name is None else {"data_list": [hospital / list_name]}
    splits = load_splits("imagefolder", **where, task=task, group_by=by)
    parts = search.parts_of(splits)
    chosen = load_splits("imagefolder", **where, eval_split="validation", task=task, group_by=by)
    for train, val, _ in (splits, parts, chosen):
        assert patients(train) and patients(val) and not patients(train) & patients(val)
    assert len(patients(splits.train) | patients(splits.val)) == 20
    assert not patients(chosen.train) & patients(splits.val)
    again = load_splits("imagefolder", **where, seed=5, task=task, group_by=by)
    assert again.digest() == splits.digest()
    if task == "multilabel":
        assert splits.class_names == ["sick", "well"]


def test_without_groups_patients_are_on_both_sides(hospital):
    train, val, _ = load_splits("imagefolder", data_list=None, data_dir=hospital / "scans")
    assert patients(train) & patients(val)
    images = load_splits("digits").train
    rest, part = validation_part(images)
    assert (len(images), len(rest), len(part)) == (1438, 1151, 287)


def test_groups_are_dealt_so_that_each_part_has_its_share_of_each_label():
    rng = np.random.RandomState(0)
    groups = rng.randint(0, 60, 600)
    labels = np.where(groups < 6, 1, 0) + 5  # a rare class, in six of the groups; labels need not begin at 0
    number = splitting.folds(labels, [f"p{group}" for group in groups], 3)
    for group in range(60):
        assert len(set(number[groups == group])) == 1
    for label in (5, 6):
        share = np.bincount(number[labels == label], minlength=3) / (labels == label).sum()
        assert abs(share - 1 / 3).max() < 0.08
    in_part = splitting.by_groups(labels, np.array([f"p{group}" for group in groups]), 0.2, 0)
    rest, part = np.flatnonzero(~in_part), np.flatnonzero(in_part)
    assert sorted([*rest, *part]) == list(range(600)) and not set(groups[rest]) & set(groups[part])
    assert 0.15 < len(part) / 600 < 0.25 and set(labels[rest]) == set(labels[part]) == {5, 6}


def test_parts_are_disjoint_and_alike():
    labels = [0] * 50 + [1] * 13 + [2] * 2
    number = splitting.folds(labels, map(str, range(65)), 5)
    assert set(np.bincount(number)) == {13}
    for label in range(3):
        counts = np.bincount(number[np.array(labels) == label], minlength=5)
        assert counts.max() - counts.min() <= 1
    more = splitting.folds(labels, map(str, range(65)), 5, turn=1)
    assert (number != more).any()
    labels, groups = [0, 0, 0, 0, 1, 1], np.array(["a", "b", "c", "d", "e", "e"])
    in_part = splitting.by_groups(labels, groups, 0.5, 0)
    assert set(np.array(labels)[~in_part]) == {0, 1}


def test_folds_evaluate_each_image_once_and_spread_numbers(hospital):
    everything, seen = {"data_dir": hospital / "scans", "group_by": "2"}, []
    for number in (1, 2, 3):
        train, val, _ = load_splits("imagefolder", folds=f"{number}/3", **everything)
        assert not patients(train) & patients(val)
        seen += list(val.relative_names())
    assert len(seen) == len(set(seen)) == len(train) + len(val)
    assert len(load_splits("digits", folds="1/5").val) == 360  # of all 1,797, none is set aside before
    list_ = {"data_list": [hospital / "numbers.csv"], "task": "regression", "group_by": "Patient"}
    for number in (1, 2, 3):
        train, val, _ = load_splits("imagefolder", folds=f"{number}/3", **list_)
        assert abs(train.targets.mean() - val.targets.mean()) < 2.5  # of ages from 0 to 19


def test_given_sets_that_share_a_patient_are_refused(hospital, tmp_path):
    """With --eval-split validation nothing is evaluated on the second list, so it may."""
    title, *lines = (hospital / "all.csv").read_text().splitlines()
    for name, part in (("train.csv", lines[:40]), ("val.csv", lines[38:])):
        (tmp_path / name).write_text("\n".join([title, *part]))
    lists = {"data_dir": hospital, "data_list": [tmp_path / "train.csv", tmp_path / "val.csv"], "group_by": "Patient"}
    with pytest.raises(InputError) as raised:
        load_splits("imagefolder", **lists)
    assert str(raised.value).startswith("--group-by Patient: p11 on both sides, with 4 of 28")
    train, val, _ = load_splits("imagefolder", eval_split="validation", **lists)
    assert not patients(train) & patients(val)


def test_a_grouped_run_and_its_adapter_know_their_groups(hospital, finetune, tmp_path, capsys):
    run = finetune(f"--data-dir {hospital / 'scans'} --group-by 2 --epochs 1 --lora-rank 0")
    assert "evaluation images, 2 classes, in 16 + 4 groups (2)" in capsys.readouterr().out
    again = deploy_lora.main(["evaluate", str(run["folder"] / "lora.pth"), "--device", "cpu"])
    assert again["images"] == run["val_images"] and again["loss"] == pytest.approx(run["val_loss"], abs=1e-5)
    assert again["accuracy_interval"] == pytest.approx(run["val_accuracy_interval"])
    of_images = wilson_interval(run["val_accuracy"] * run["val_images"], run["val_images"])
    assert run["val_accuracy_interval"] != pytest.approx(of_images)  # it is of patients
    assert json.loads((run["folder"] / "results.json").read_text())["config"]["data"]["group_by"] == "2"
    answers = (run["folder"] / "results_answers.csv").read_text().splitlines()
    assert all(line.split(",")[0].split("/")[1] == line.split(",")[1] for line in answers[1:])

    def evaluated(images) -> dict:
        adapter = str(run["folder"] / "lora.pth")
        return deploy_lora.main(["evaluate", adapter, str(images), "--device", "cpu", "--output", f"{tmp_path}/o.json"])

    found = evaluated(hospital / "scans")
    by_image = wilson_interval(found["accuracy"] * found["images"], found["images"])
    assert found["accuracy_interval"] != pytest.approx(by_image)
    assert (tmp_path / "o_answers.csv").read_text().startswith("image,group,class,")
    flat = tmp_path / "flat"
    for path in (hospital / "scans").glob("*/*/*.png"):
        target = flat / path.parts[-3] / f"{path.parts[-2]}_{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    assert evaluated(flat)["accuracy_interval"] == pytest.approx(by_image)
    assert (tmp_path / "o_answers.csv").read_text().startswith("image,class,")


@pytest.mark.parametrize("cache", ["", "--adapt-last 1 --cache-features disk"])
def test_the_probe_of_a_grouped_run_holds_out_patients(hospital, finetune, monkeypatch, cache):
    given = []

    def fit(features, labels, classes, views, weights, clusters):
        given.append(clusters)
        raise KeyboardInterrupt

    monkeypatch.setattr(probe, "fit_linear_probe", fit)
    with pytest.raises(KeyboardInterrupt):
        finetune(f"--data-dir {hospital / 'scans'} --group-by 2 --epochs 1 {cache}")
    train = load_splits("imagefolder", data_dir=hospital / "scans", group_by="2").train
    names = [name.split("/")[-2] for name in train.relative_names()]
    assert [sorted(set(names))[number] for number in given[-1].tolist()] == names
