"""benchmarks/domain.py: its stage 1 and its backbones are those of the command line, and what is finished stays."""

import json

import pytest

from benchmarks import domain
from finetune_lora import load_base
from lora_utils import read_adapter_file
from toolkit import InputError

STAGE1 = "--epochs 1 --batch-size 4 --two-crops digits --workers 0 --dim 8 --mlp-dim 16"


@pytest.fixture
def run(base, images, tmp_path, monkeypatch):
    """run("none adapters") is the benchmark with fine-tuning left out; the flags that fine-tuning was given."""
    given = []

    def quality(flags):
        given.append(flags)
        rows = [{"labels_per_class": n, "accuracies": [0.5, 0.6], "mean": 0.55, "spread": 0.07} for n in (2, 3)]
        return {"rows": [{**row, "learning_rate": 3e-3} for row in rows]}

    monkeypatch.setattr(domain.quality, "main", quality)
    monkeypatch.setattr(domain, "STEPS", 2)
    monkeypatch.setattr(domain, "DRAWS", 2)
    monkeypatch.setattr(domain, "apart", lambda function, argument: function(argument))

    for name, (title, own, rates) in domain.ROWS.items():
        monkeypatch.setitem(domain.ROWS, name, (title, own, rates[:1]))

    def run(rows: str):
        argv = ["--checkpoint", str(base), "--data-dir", str(images), "--output-dir", str(tmp_path / "out")]
        argv += ["--device", "cpu", "--stage1", STAGE1, "--finetune", "--epochs 7", "--labels", "2", "3"]
        return domain.main([*argv, "--rows", *rows.split()])

    run.given = given
    return run


@pytest.mark.slow
def test_each_row_fine_tunes_the_backbone_of_its_own_stage_1(run, base, tmp_path, capsys):
    result = run("none adapters full scratch")
    none, adapters, full, scratch = (" ".join(flags) for flags in run.given)
    assert all("--epochs 7" in flags and "--labels 2 3" in flags for flags in (none, adapters, full, scratch))
    assert f"--checkpoint {base}" in none and "--stage1-adapter" not in none
    assert f"--checkpoint {base} --stage1-adapter {tmp_path}/out/adapters/" in adapters
    assert f"--checkpoint {tmp_path}/out/full/" in full and f"--checkpoint {tmp_path}/out/scratch/" in scratch
    configs = {row["row"]: row["stage1"]["config"] for row in result["rows"] if row["stage1"]}
    assert configs["adapters"]["lora_rank"] == 8 and configs["full"]["lora_rank"] == 0
    assert configs["scratch"]["checkpoint"] is None and configs["full"]["checkpoint"] == str(base)
    same = ("arch", "image_size", "moco_version", "dim", "epochs", "eval_split")
    assert len({tuple(config[name] for name in same) for config in configs.values()}) == 1
    load_base(base, adapters.split()[-1], 3)
    assert read_adapter_file(adapters.split()[-1])["layers"]
    assert result["costs"]["times_faster"] > 0 and len(result["costs"]["seconds"]["full"]) == domain.STEPS
    table = capsys.readouterr().out
    assert "| 55.0% ± 7.1% (+0.0 ± 0.0 points) |" in table and table.count("| 3 | stage 1 continued in adapters |") == 1
    assert json.loads((tmp_path / "out/domain.json").read_text())["rows"] and len(result["rows"]) == 8
    assert all(len(row["probes"]) == 2 and max(row["probes"]) > 1 / 3 for row in result["rows"])
    probed = len(run.given)
    again = run("adapters --probes-only")
    assert len(run.given) == probed and again["rows"][0]["probes"] == result["rows"][2]["probes"]  # repeats itself


def test_the_rate_of_stage_1_is_that_of_the_best_knn_accuracy_and_what_is_finished_stays(run, tmp_path, monkeypatch):
    monkeypatch.setitem(domain.ROWS, "adapters", ("title", domain.ADAPTERS, ("1e-3", "3e-3", "1e-2")))
    for rate, accuracy in (("1e-3", 0.5), ("3e-3", 0.7), ("1e-2", 0.6)):
        folder = tmp_path / "out/adapters" / rate
        folder.mkdir(parents=True)
        result = {
            "knn_accuracy": accuracy,
            "before": {"knn_accuracy": 0.4},
            "checkpoint": f"{rate}.pth",
            "config": {"learning_rate": float(rate)},
        }
        (folder / "results.json").write_text(json.dumps(result))
    monkeypatch.setattr(domain.pretrain, "main", None)  # not called
    monkeypatch.setattr(domain, "probes", lambda flags, labels: {n: [0.5] for n in labels})
    run("adapters")
    assert run.given[0][-1] == "3e-3.pth"


def test_accuracies_are_compared_with_the_same_labels_drawn():
    assert domain.accuracy([0.5, 0.7], None) == "60.0% ± 14.1%"
    assert domain.accuracy([0.5, 0.7], [0.4, 0.6]) == "60.0% ± 14.1% (+10.0 ± 0.0 points)"


def test_bad_options_are_found_before_anything_runs(base):
    with pytest.raises(InputError, match="--epochs"):
        domain.main(["--checkpoint", "absent.pth", "--stage1", "--epochs 0"])
    with pytest.raises(InputError, match="--batch-size"):
        domain.main(["--checkpoint", str(base), "--finetune", "--batch-size 0"])


def test_options_of_both_stages_go_to_both(base, images):
    _, passed_on = domain.parse(["--checkpoint", str(base), "--data-dir", str(images), "--workers", "0"])
    assert passed_on == ["--data-dir", str(images), "--workers", "0"]
