"""Runs of several labels an image and of numbers, through every door: files, commands, resumption, other formats."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import deploy_lora
import finetune_lora
from finetune_lora import load_finetuned
from lora_utils import LoRAManager, read_adapter_file
from tests.run_folders import rows_of
from toolkit import InputError
from toolkit.answers import comparison
from toolkit.answers.tasks import from_record
from toolkit.images.transforms import eval_transform
from toolkit.models.checkpoints import load_backbone

KINDS = ("multilabel", "regression")
SCORES = {"multilabel": "macro_ap", "regression": "r2"}


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """Images whose upper and left halves are bright, or not, some answers unknown; and how bright the halves are."""
    folder, random = tmp_path_factory.mktemp("labelled"), np.random.RandomState(0)
    for part, count in (("train", 24), ("val", 16)):
        rows = {"multilabel": [["path", "up", "left"]], "regression": [["path", "upper light", "left light"]]}
        for i in range(count):
            light = random.randint(0, 120, 2)
            pixels = random.randint(0, 60, (16, 16, 3))
            pixels[:8] += light[0]
            pixels[:, :8] += light[1]
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{part}{i}.png")
            answers = [str(int(value > 60)) for value in light]
            if part == "train" and i % 8 == 0:
                answers[0] = "-1"
            rows["multilabel"].append([f"{part}{i}.png", *answers])
            rows["regression"].append([f"{part}{i}.png", *map(str, light)])
        for kind, lines in rows.items():
            (folder / f"{kind}_{part}.csv").write_text("\n".join(map(",".join, lines)) + "\n")
    return folder


@pytest.fixture(scope="module")
def train(finetune_into, lists):
    """train("regression", folder, "--epochs 2", "time") trains on a pair of lists; its results."""

    def train(kind: str, folder, options: str = "", name: str = "") -> dict:
        argv = f"--task {kind} --data-dir {lists} --data-list {lists}/{name or kind}_train.csv"
        argv += f" {lists}/{name or kind}_val.csv --epochs 1 --learning-rate 1e-4 --workers 0"
        return finetune_into(folder, f"{argv} {options}")

    return train


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """The results of a run by its kind."""
    folder = tmp_path_factory.mktemp("trained")
    return {kind: train(kind, folder / kind) for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_its_files_and_every_door_tells_the_same(trained, lists, kind, tmp_path, capsys):
    results, folder = trained[kind], trained[kind]["folder"]
    score = SCORES[kind]
    low, high = results[f"val_{score}_interval"]
    assert results["task"] == kind and low <= high
    assert json.loads((folder / "results.json").read_text()) | {"folder": folder} == results
    assert results[f"val_{score}"] > results[f"probe_{score}_before"] - 0.3
    assert f"val_{score}" in rows_of(folder / "metrics.csv")[0]
    picture = "precision_recall.png" if kind == "multilabel" else "scatter.png"
    assert {picture, "mistakes.png", "report.html", "training_curves.png"} <= {path.name for path in folder.iterdir()}
    content = read_adapter_file(folder / "lora.pth")
    assert content["format_version"] == 2 and content["metadata"]["task"]["kind"] == kind
    assert ("temperature" in content["metadata"]) == ("calibration_error" in results) == (kind == "multilabel")

    evaluated = deploy_lora.main(["evaluate", str(folder / "lora.pth"), "--output", str(tmp_path / "again.json")])
    assert evaluated[score] == pytest.approx(results[f"val_{score}"], abs=1e-4)
    listed = deploy_lora.main(["evaluate", str(folder / "lora.pth"), str(lists / f"{kind}_val.csv")])
    assert listed[score] == evaluated[score]
    assert f"{kind}_val.csv" in capsys.readouterr().out
    same = comparison.compare(folder / "results.json", tmp_path / "again.json")
    assert all(of.first == pytest.approx(of.second, abs=1e-4) for of in same)


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_what_the_evaluation_had(trained, lists, kind, tmp_path):
    results, folder = trained[kind], trained[kind]["folder"]
    table = deploy_lora.main(["predict", str(folder / "lora.pth"), str(lists), "--output", str(tmp_path / "p.csv")])
    by_name = {row["path"].rpartition("/")[2]: row for row in table}
    answers = rows_of(comparison.answers_path(folder / "results.json"))
    for row in answers:
        said = by_name[row["image"]]
        if kind == "regression":
            assert float(said["upper light"]) == pytest.approx(float(row["upper light answer"]), rel=1e-3)
            continue
        shares = {name: float(row[f"{name} probability"]) for name in ("up", "left")}
        assert float(said["up probability"]) == pytest.approx(shares["up"], abs=1e-3)
        thresholds = {name: label["threshold"] for name, label in results["labels"].items()}
        assert said["labels"].split(",") == [name for name in ("up", "left") if shares[name] > thresholds[name]] or [""]


def test_thresholds_are_chosen_anew_without_training(trained, lists, once, tmp_path):
    """On the evaluation images each label then has the sensitivity that was asked for, and nothing else changes."""
    folder = trained["multilabel"]["folder"]
    argv = ["threshold", str(folder / "lora.pth"), str(lists / "multilabel_val.csv"), "--goal", "sensitivity=0.9"]
    for _ in range(2):  # the second file replaces the first
        deploy_lora.main([*argv, "--output", str(tmp_path / "lora90.pth")])
    before, after = (read_adapter_file(path) for path in (folder / "lora.pth", tmp_path / "lora90.pth"))
    thresholds = after["metadata"]["task"].pop("thresholds")
    assert thresholds != before["metadata"]["task"].pop("thresholds")
    assert after["metadata"].pop("thresholds chosen") == f"for sensitivity=0.9, in {lists / 'multilabel_val.csv'}"
    assert after["metadata"] == before["metadata"] and after["base_hash"] == before["base_hash"]
    assert all(torch.equal(tensor, before["tensors"][name]) for name, tensor in after["tensors"].items())
    labels = deploy_lora.main(["evaluate", str(tmp_path / "lora90.pth")])["labels"]
    assert [label["threshold"] for label in labels.values()] == pytest.approx(thresholds)
    assert all(label["sensitivity"] >= 0.9 for label in labels.values())
    with pytest.raises(InputError, match="has no thresholds: only adapters with several labels have them"):
        deploy_lora.main(["threshold", str(once / "lora.pth"), "list.csv", "--output", str(tmp_path / "other.pth")])


def test_a_label_that_no_image_shows_keeps_its_threshold(trained, lists, tmp_path, capsys):
    """As where the list has no column for it."""
    adapter = trained["multilabel"]["folder"] / "lora.pth"
    rows = rows_of(lists / "multilabel_val.csv")
    (lists / "left.csv").write_text("\n".join(["path,left", *(f"{row['path']},{row['left']}" for row in rows)]))
    argv = ["threshold", str(adapter), str(lists / "left.csv"), "--goal", "sensitivity=0.9"]
    task = deploy_lora.main([*argv, "--output", str(tmp_path / "other.pth")])
    before = read_adapter_file(adapter)["metadata"]["task"]["thresholds"]
    after = read_adapter_file(tmp_path / "other.pth")["metadata"]["task"]["thresholds"]
    assert before[0] != 0.5 and after[0] == before[0] and after[1] != before[1]
    assert task.head.thresholds.tolist() == after
    told = capsys.readouterr().out
    assert f"{'kept as it was':<22}up\n" in told and f"{'kept as it was':<22}left" not in told


def test_labels_of_which_none_is_no_are_no_measure(trained, lists):
    """As in CelebA's lists, where -1 is no: every figure would be perfect."""
    (lists / "celeba.csv").write_text((lists / "multilabel_val.csv").read_text().replace(",0", ",-1"))
    with pytest.raises(InputError, match=r"celeba\.csv: no answer is 0 for no; -1 and nothing are unknown"):
        deploy_lora.main(["evaluate", str(trained["multilabel"]["folder"] / "lora.pth"), str(lists / "celeba.csv")])


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_the_runs_lists_may_have_another_order_by_now(trained, lists, kind):
    """As when another program has written them anew: each truth is still compared with its own answers."""
    adapter = str(trained[kind]["folder"] / "lora.pth")
    expected = deploy_lora.main(["evaluate", adapter])
    contents = {path: path.read_text() for path in lists.glob(f"{kind}_*.csv")}
    try:
        for path, content in contents.items():
            rows = (line.split(",") for line in content.splitlines())
            path.write_text("".join(f"{image},{second},{first}\n" for image, first, second in rows))
        assert deploy_lora.main(["evaluate", adapter]) == expected
    finally:
        for path, content in contents.items():
            path.write_text(content)


def test_a_run_chooses_its_thresholds_by_what_it_is_told(train, tmp_path):
    labels = []
    for goal in ("sensitivity=0.99", "sensitivity=0.3"):
        labels.append(train("multilabel", tmp_path / goal, f"--threshold {goal}")["labels"])
    assert all(labels[0][name]["threshold"] < labels[1][name]["threshold"] for name in labels[0])
    with pytest.raises(InputError, match="--threshold with --task classification: only labels have it"):
        finetune_lora.read_options(["--threshold", "sensitivity=0.9"])
    with pytest.raises(InputError, match=r"expected f1, or a share as in sensitivity=0\.95 or specificity=0\.9"):
        finetune_lora.read_options(["--task", "multilabel", "--threshold", "precision=0.9"])


def test_adapters_of_every_task_share_a_base(trained, once, base, lists):
    """Each answers as it does alone, in whatever order they are used, and knows what its answers mean."""
    folders = {kind: results["folder"] for kind, results in trained.items()} | {"classification": once}
    model, report = load_backbone(base, 1)
    manager = LoRAManager(model.eval())
    for kind, folder in folders.items():
        manager.load_lora_checkpoint(folder / "lora.pth", name=kind)
    image = eval_transform(report["image_size"])(Image.open(lists / "val0.png"))[None]
    for kind in (*folders, "multilabel"):
        info = manager.use(kind)
        task = from_record(info.get("task"), info["class_names"], kind)
        alone, _ = load_finetuned(folders[kind] / "lora.pth")
        with torch.no_grad():
            ours, theirs = model(image), alone(image)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert task.kind == kind
        assert [list(row) for row in task.table(ours)[1]] == [list(row) for row in task.table(theirs)[1]]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "by"), [("multilabel", "macro-ap"), ("regression", "r2")])
def test_the_best_epoch_by_the_tasks_own_figure_is_kept(train, tmp_path, kind, by):
    results = train(kind, tmp_path, f"--epochs 2 --keep-best {by}")
    column = f"val_{by.replace('-', '_')}"
    scores = [float(row[column]) for row in rows_of(tmp_path / "metrics.csv")]
    kept = results["kept_epoch"]  # of two that are alike, the one of the lower loss
    assert (kept == 0 or scores[kept - 1] == max(scores)) and results[f"best_{column}"] == max(scores)


def changed_adapter(folder, path, change):
    """A copy of an adapter file whose metadata are changed."""
    content = read_adapter_file(folder / "lora.pth")
    change(content["metadata"])
    torch.save(content, path)
    return str(path)


def test_a_list_with_other_columns_says_which_are_labels_as_chexperts(train, lists, tmp_path):
    for part in ("train", "val"):
        lines = (lists / f"multilabel_{part}.csv").read_text().splitlines()[1:]
        rows = ["Path,Sex,Age,patient,No-Finding,Pleural-Effusion"]
        for i, line in enumerate(lines):
            path, up, left = line.split(",")
            rows.append(f"{path},Female,{40 + i},{part}{i // 2},{up},{left if i else ''}")
        (lists / f"chexpert_{part}.csv").write_text("\n".join(rows) + "\n")
    columns = "--group-by patient --label-columns No-Finding..Pleural-Effusion"
    results = train("multilabel", tmp_path / "out", columns, "chexpert")
    assert list(results["labels"]) == ["No-Finding", "Pleural-Effusion"]
    adapter = str(results["folder"] / "lora.pth")
    again = deploy_lora.main(["evaluate", adapter])
    assert again["macro_ap"] == pytest.approx(results["val_macro_ap"])
    elsewhere = deploy_lora.main(["evaluate", adapter, str(lists / "chexpert_train.csv")])
    assert elsewhere["labels"]["Pleural-Effusion"]["unknown"] == 1

    def damage(metadata):
        metadata["config"]["data"]["label_columns"] = [3]

    damaged = changed_adapter(results["folder"], tmp_path / "damaged.pth", damage)
    with pytest.raises(InputError, match=r"in the column Sex is not 1, 0, or -1 or nothing for unknown$"):
        deploy_lora.main(["evaluate", damaged, str(lists / "chexpert_train.csv")])


def test_seconds_since_1970_are_learned_and_predicted(train, lists, tmp_path):
    """Minutes apart: float32 would round them to two minutes, and their R2 to nothing."""
    for part in ("train", "val"):
        lines = (lists / f"regression_{part}.csv").read_text().splitlines()[1:]
        rows = [f"{path},{1_700_000_000 + 3 * int(light)}" for path, light, _ in (line.split(",") for line in lines)]
        (lists / f"time_{part}.csv").write_text("\n".join(["path,time", *rows]) + "\n")
    results = train("regression", tmp_path / "out", "--cache-features none", "time")
    assert math.isfinite(results["val_r2"]) and results["mae"] < 360
    answers = rows_of(results["folder"] / "results_answers.csv")
    assert all(int(row["time"]) % 3 == 1_700_000_000 % 3 for row in answers)
    command = ["predict", str(tmp_path / "out/lora.pth"), str(lists / "val0.png"), "--output", str(tmp_path / "p.csv")]
    [row] = deploy_lora.main(command)
    said = {row["image"]: float(row["time answer"]) for row in answers}["val0.png"]
    assert float(row["time"]) == pytest.approx(said, abs=0.5)
