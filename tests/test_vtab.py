"""benchmarks/vtab.py end to end, on made-up data sets in VTAB-1k's layout."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import quality, vtab
from toolkit import InputError
from toolkit.images import transforms
from toolkit.run import optim

COUNTS = {"train800": 12, "val200": 6, "test": 10}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One of the 19 data sets, of three classes that can be told apart and a fourth that its tests alone have."""
    folder, rng = tmp_path_factory.mktemp("vtab"), np.random.RandomState(0)
    for part, count in COUNTS.items():
        (folder / "eurosat/images" / part).mkdir(parents=True)
        lines = []
        for i in range(count):
            pixels = rng.randint(0, 60, (16, 24, 3)) + 80 * (i % 3)
            path = f"images/{part}/{i:06}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "eurosat" / path)
            lines.append(f"{path} {7 if part == 'test' and i >= 8 else i % 3}\n")
        (folder / f"eurosat/{part}.txt").write_text("".join(lines))
    both = [(folder / f"eurosat/{part}.txt").read_text() for part in ("train800", "val200")]
    (folder / "eurosat/train800val200.txt").write_text("".join(both))
    (folder / "dtd").mkdir()  # without lists
    return folder


@pytest.fixture
def few_rates(monkeypatch):
    monkeypatch.setattr(quality, "RATES", (1e-4, 1e-3))
    monkeypatch.setattr(optim, "STEPS_TO_TRAIN", 1)


def test_the_protocol_runs_and_is_not_run_again(root, base, few_rates, tmp_path, monkeypatch, capsys):
    command = f"--root {root} --checkpoint {base} --methods lora_8 --epochs 1 --batch-size 6 --device cpu"
    command = [*command.split(), "--output-dir", str(tmp_path / "out")]
    judged, evaluate = [], vtab.deploy_lora.main
    monkeypatch.setattr(vtab.deploy_lora, "main", lambda argv: judged.append(argv[2]) or evaluate(argv))
    result = vtab.main(command)
    printed = capsys.readouterr().out
    assert f"not in {root}, or without one of its lists: cifar, caltech101, dtd," in printed

    records = [json.loads(line) for line in (tmp_path / "out/runs.jsonl").read_text().splitlines()]
    [row] = result["rows"]
    tried = [(record["run"][2], record["run"][4], record["images"]) for record in records]
    chosen = row["learning_rates"]["eurosat"], "test", 10
    assert tried == [(1e-4, "validation", 6), (1e-3, "validation", 6), chosen]
    assert len(judged) == 1  # the test images were evaluated on once
    assert records[2]["accuracy"] <= 0.8  # two of the ten are of a class of which nothing was known

    accuracy = pytest.approx(100 * records[2]["accuracy"])
    assert row["accuracy"] == {"eurosat": accuracy} and row["groups"] == {"specialized": accuracy}
    assert (row["mean"], row["mean_of_groups"]) == (accuracy, accuracy)
    assert "| mean of groups (incomplete) | mean (1 of 19) | natural (0 of 7) | specialized (1 of 4) |" in printed
    assert "| published: LoRA-8 | 44.3 |" in printed and len(result["missing"]) == 18

    monkeypatch.setattr(vtab, "train", None)
    assert vtab.main(command) == result
    with pytest.raises(InputError, match="has runs with other options"):
        vtab.main([*command, "--epochs", "2"])
    assert transforms.SEEN_WHOLE == 64


def test_images_are_seen_whole():
    """A mark at the border of a wide image, which the usual transform cuts away, is seen."""
    pixels = np.zeros((224, 448, 3), np.uint8)
    pixels[:, -20:] = 255
    seen = {}
    for name, context in (("usual", None), ("whole", vtab.whole_images())):
        if context is None:
            seen[name] = transforms.eval_transform(224)(Image.fromarray(pixels))
            continue
        with context:
            seen[name] = transforms.eval_transform(224)(Image.fromarray(pixels))
    assert seen["usual"].max() < 0 < seen["whole"].max() and seen["whole"].shape == (3, 224, 224)


def test_the_mean_of_all_and_of_the_groups_differ(tmp_path):
    log = quality.Log(tmp_path / "runs.jsonl", [])
    for i, name in enumerate(vtab.DATA_SETS):
        for split, seed in (("validation", quality.TUNING_SEED), ("test", 0)):
            run = "full", name, 3e-4, seed, split
            log.add({"run": run, "flags": quality.FULL, "accuracy": i / 100, "loss": 1.0})
    row = vtab.row("full", log, vtab.DATA_SETS)
    assert len(vtab.DATA_SETS) == 19 and row["mean"] == pytest.approx(9)
    assert row["groups"] == pytest.approx({"natural": 3, "specialized": 8.5, "structured": 14.5})
    assert row["mean_of_groups"] == pytest.approx(26 / 3)
    assert "incomplete" not in vtab.table([row], vtab.DATA_SETS)


def test_mistakes_are_told_before_anything_runs(root, base, tmp_path):
    command = ["--root", str(tmp_path), "--checkpoint", str(base), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match=r"none of cifar, caltech101.* has train800.txt, val200.txt"):
        vtab.main(command)
    with pytest.raises(InputError, match="--epochs: expected"):
        vtab.main([*command, "--epochs", "none"])
    with pytest.raises(InputError, match="--data-list without --checkpoint"):
        vtab.main(["--root", str(root), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
