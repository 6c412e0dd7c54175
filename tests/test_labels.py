"""Runs of several labels an image and of numbers, through every door: files, commands, resumption, other formats."""

import json

import numpy as np
import pytest

import deploy_lora
from lora_utils import read_adapter_file
from tests.image_files import save_image, write
from tests.run_folders import assert_same, column, rows_of
from toolkit import InputError
from toolkit.answers import comparison, tasks


def run(command: str):
    return deploy_lora.main(command.split())


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """Images whose upper and left halves are bright, or not, as columns among others; and how bright the halves are."""
    folder = tmp_path_factory.mktemp("labelled")
    random = np.random.RandomState(0)
    for part, count in (("train", 24), ("val", 16)):
        labels = ["path,Sex,patient,up,left"]
        numbers = ["path,upper light,left light"]
        for i in range(count):
            up, left = random.randint(0, 120, 2)
            pixels = random.randint(0, 60, (16, 16, 3))
            pixels[:8] += up
            pixels[:, :8] += left
            save_image(folder / f"{part}{i}.png", pixels.clip(0, 255).astype(np.uint8))
            is_unknown = part == "train" and i % 8 == 0
            labels.append(f"{part}{i}.png,Female,{part}{i // 2},{-1 if is_unknown else int(up > 60)},{int(left > 60)}")
            numbers.append(f"{part}{i}.png,{up},{left}")
        (folder / f"multilabel_{part}.csv").write_text("\n".join(labels) + "\n")
        (folder / f"regression_{part}.csv").write_text("\n".join(numbers) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(finetune_into, lists, tmp_path_factory):
    results = {}
    for kind, columns in (("multilabel", "--group-by patient --label-columns up left"), ("regression", "")):
        argv = f"--task {kind} --data-list {lists}/{kind}_train.csv {lists}/{kind}_val.csv --data-dir {lists}"
        argv += f" --epochs 1 --learning-rate 1e-4 --workers 0 {columns}"
        results[kind] = finetune_into(tmp_path_factory.mktemp(kind) / "out", argv)
    return results


@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_a_run_leaves_its_files_and_every_door_tells_the_same(trained, lists, kind, tmp_path, capsys):
    results = trained[kind]
    folder = results["folder"]
    score = tasks.TASKS[kind].score
    assert results["task"] == kind
    assert json.loads((folder / "results.json").read_text()) | {"folder": folder} == results
    assert results[f"val_{score}"] > results[f"probe_{score}_before"] - 0.3
    assert f"val_{score}" in rows_of(folder / "metrics.csv")[0]
    content = read_adapter_file(folder / "lora.pth")
    assert content["format_version"] == 2 and content["metadata"]["task"]["kind"] == kind
    assert ("temperature" in content["metadata"]) == ("calibration_error" in results) == (kind == "multilabel")

    evaluated = run(f"evaluate {folder}/lora.pth {lists}/{kind}_val.csv --output {tmp_path}/again.json")
    assert evaluated[score] == pytest.approx(results[f"val_{score}"], abs=1e-4)
    assert f"{kind}_val.csv" in capsys.readouterr().out
    for figure in comparison.compare(folder / "results.json", tmp_path / "again.json"):
        assert figure.first == pytest.approx(figure.second, abs=1e-4)
    if kind == "multilabel":  # its columns are known for another list too
        labels = run(f"evaluate {folder}/lora.pth {lists}/{kind}_train.csv")["labels"]
        assert column(labels.values(), "unknown") == [3, 0]

    table = run(f"predict {folder}/lora.pth {lists} --output {tmp_path}/p.csv")
    by_name = {row["path"].rpartition("/")[2]: row for row in table}
    for row in rows_of(comparison.answers_path(folder / "results.json")):
        said = by_name[row["image"]]
        if kind == "regression":
            assert float(said["upper light"]) == pytest.approx(float(row["upper light answer"]), rel=1e-3)
            continue
        shares = {name: float(row[f"{name} probability"]) for name in ("up", "left")}
        assert float(said["up probability"]) == pytest.approx(shares["up"], abs=1e-3)
        thresholds = {name: label["threshold"] for name, label in results["labels"].items()}
        assert said["labels"] == ",".join(name for name in ("up", "left") if shares[name] > thresholds[name])


def test_thresholds_are_chosen_anew_without_training(trained, lists, tmp_path, capsys):
    """On the evaluation images each label then has the sensitivity that was asked for, and nothing else changes."""
    adapter = trained["multilabel"]["folder"] / "lora.pth"
    images = lists / "multilabel_val.csv"
    chosen = tmp_path / "lora90.pth"
    for _ in range(2):  # the second file replaces the first
        run(f"threshold {adapter} {images} --goal sensitivity=0.9 --output {chosen}")
    before = read_adapter_file(adapter)
    after = read_adapter_file(chosen)
    first = before["metadata"]["task"].pop("thresholds")
    thresholds = after["metadata"]["task"].pop("thresholds")
    assert thresholds != first
    assert after["metadata"].pop("thresholds chosen") == f"for sensitivity=0.9, in {images}"
    assert after["metadata"] == before["metadata"] and after["base_hash"] == before["base_hash"]
    assert_same(after["tensors"], before["tensors"])
    labels = run(f"evaluate {chosen} {images}")["labels"]
    assert column(labels.values(), "threshold") == pytest.approx(thresholds)
    assert min(column(labels.values(), "sensitivity")) >= 0.9
    # A label that no image shows, as where the list has no column for it, keeps its threshold.
    capsys.readouterr()
    rows = [f"{row['path']},{row['left']}" for row in rows_of(images)]
    left = write(lists / "left.csv", "\n".join(["path,left", *rows]))
    task = run(f"threshold {adapter} {left} --goal sensitivity=0.9 --output {tmp_path}/other.pth")
    after = read_adapter_file(tmp_path / "other.pth")["metadata"]["task"]["thresholds"]
    assert first[0] != 0.5 and after[0] == first[0] and after[1] != first[1]
    assert task.thresholds.tolist() == after
    told = capsys.readouterr().out
    assert f"{'kept as it was':<22}up\n" in told and f"{'kept as it was':<22}left" not in told
    # Labels of which none is no are no measure: as in CelebA's lists, where -1 is no, every figure would be perfect.
    (lists / "celeba.csv").write_text((lists / "multilabel_val.csv").read_text().replace(",0", ",-1"))
    with pytest.raises(InputError, match=r"celeba\.csv: no answer is 0 for no; -1 and nothing are unknown"):
        run(f"evaluate {adapter} {lists}/celeba.csv")
