"""The quality table: one real run, and the bookkeeping around many."""

import json

import children
import pytest

from benchmarks import quality
from toolkit import InputError


def record(method, budget, rate, seed, split, accuracy, loss=0.5):
    costs = {
        "seconds": 1.0,
        "cpu_seconds": 2.0,
        "trainable_share": 0.03,
        "peak_memory_bytes": 5e8,
        "adapter_bytes": 4e5,
        "probe": 0.9,
        "retreats": 1,
    }
    run, flags = (method, budget, rate, seed, split), quality.METHODS[method][1]
    return {"run": run, "flags": flags, "accuracy": accuracy, "loss": loss, **costs}


@pytest.mark.slow
def test_a_run_is_a_run_of_the_command_line():
    options = ["--epochs", "1", "--batch-size", "10"]
    result = quality.apart((("probe", 2, 0.01, 3, "validation"), options, 1))
    assert 0 <= result["accuracy"] <= 1 and result["loss"] > 0 and result["adapter_bytes"] > 0
    assert result["run"] == ("probe", 2, 0.01, 3, "validation")


def test_the_learning_rate_is_searched_until_the_best_has_a_worse_one_on_either_side(tmp_path):
    log = quality.Log(tmp_path / "runs.jsonl", [])
    accuracies = {1e-3: (0.7, 0.9), 3e-4: (0.6, 1.2), 3e-3: (0.8, 0.7), 1e-2: (0.8, 0.6), 3e-2: (0.5, 2.0)}
    tried = []
    while runs := log.rates_to_try("probe", 10):
        tried.append([rate for _, _, rate, _, _ in runs])
        for run in runs:
            log.add(record(*run, *accuracies[run[2]]))
    assert tried == [[3e-4, 1e-3, 3e-3], [1e-2], [3e-2]]
    log.add(record("probe", 10, 3e-4, 0, "held-out", 1.0))
    assert log.best_rate("probe", 10) == 1e-2  # as accurate as 3e-3, with the lower loss; held-out runs do not count


def test_finished_runs_are_found_again_and_other_options_are_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    quality.Log(path, ["--epochs", "3"]).add(record("full", None, 1e-3, 0, "held-out", 0.98))
    again = quality.Log(path, ["--epochs", "3"])
    assert again.find(("full", None, 1e-3, 0, "held-out"))["accuracy"] == 0.98
    assert again.find(("full", 10, 1e-3, 0, "held-out")) is None
    with pytest.raises(InputError, match="other options"):
        quality.Log(path, ["--epochs", "4"])


def test_a_line_that_was_cut_short_is_forgotten(tmp_path):
    path = tmp_path / "runs.jsonl"
    quality.Log(path, []).add(record("full", None, 1e-3, 0, "held-out", 0.98))
    whole = path.read_text()
    path.write_text(whole + whole[:50])
    log = quality.Log(path, [])
    assert len(log.runs) == 1 and path.read_text() == whole


@pytest.mark.slow
def test_a_killed_run_ends_the_command_and_is_named(monkeypatch):
    """A Pool would wait for it for ever."""
    job = ("lora_8", 10, 3e-3, 4, "held-out"), [], 1
    for end in (children.kill_yourself, children.stop_yourself):
        monkeypatch.setattr(quality, "train", end)
        with pytest.raises(InputError, match="run lora_8, 10 labels"):
            quality.apart(job)


@pytest.mark.slow
def test_an_error_in_a_run_is_the_command_s(monkeypatch):
    monkeypatch.setattr(quality, "train", children.fail)
    with pytest.raises(InputError, match="out of images"):
        quality.apart((("lora_8", 10, 3e-3, 4, "held-out"), [], 1))


def test_runs_of_a_method_that_has_other_flags_now_are_forgotten(tmp_path):
    path, run = tmp_path / "runs.jsonl", record("lora_4", 10, 1e-3, 0, "held-out", 0.9)
    log = quality.Log(path, [])
    log.add({**run, "flags": ["--lora-rank", "4"]})
    assert not quality.Log(path, []).runs
    log.add(run)
    assert len(quality.Log(path, []).runs) == 1


def test_rows_state_mean_spread_and_share_of_full_fine_tuning(tmp_path):
    log = quality.Log(tmp_path / "runs.jsonl", [])
    for seed, (lora, full) in enumerate([(0.96, 0.98), (0.98, 1.0)]):
        log.add(record("lora_8", None, 1e-2, seed, "held-out", lora))
        log.add(record("full", None, 1e-3, seed, "held-out", full))
    rows = [log.row("lora_8", None, 1e-2, 2), log.row("full", None, 1e-3, 2)]
    quality.add_shares(rows)
    assert rows[0]["mean"] == pytest.approx(0.97) and rows[0]["spread"] == pytest.approx(0.02 / 2**0.5)
    assert rows[0]["share_of_full"] == pytest.approx(0.97 / 0.99) and rows[1]["share_of_full"] == 1
    assert "| all | LoRA r=8 | 97.00% ± 1.41% | +7.0 | 98.0% |" in quality.table(rows)
    quality.plot(rows, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert json.dumps(rows)


def test_a_sweep_trains_at_every_rate_and_shows_where_a_method_works(tmp_path, monkeypatch, capsys):
    jobs = []

    def pretend(job):
        jobs.append(job[0])
        method, budget, rate, seed, split = job[0]
        return record(method, budget, rate, seed, split, 0.95 if rate < 1e-2 else 0.5 + 0.1 * seed)

    monkeypatch.setattr(quality, "apart", pretend)
    flags = ["--rates", "--methods", "lora_8", "--labels", "10", "--seeds", "2", "--output-dir", str(tmp_path)]
    rows = quality.main(flags)["rows"]
    assert sorted(jobs) == sorted(("lora_8", 10, rate, s, "held-out") for rate in quality.SWEPT for s in (0, 1))
    assert [row["mean"] for row in rows] == pytest.approx([0.95] * 6 + [0.55])
    assert "| 10 | LoRA r=8 | 95.0% |" in (shown := capsys.readouterr().out) and "| 55.0% | -40.0 | 14 |" in shown
    assert (tmp_path / "rates.png").stat().st_size > 10_000 and (tmp_path / "rates.json").exists()
    quality.main(flags)
    assert len(jobs) == 14  # nothing is trained twice


def test_peft_s_layers_train_in_the_same_loop():
    peft = pytest.importorskip("peft")
    before = quality.finetune_lora.add_lora_to_model
    with quality._peft_layers():
        args, _ = quality.finetune_lora.read_options(quality.METHODS["peft"][1])
        model, _ = quality.finetune_lora.build_model(args, 10)
    assert quality.finetune_lora.add_lora_to_model is before
    adapted = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert adapted and {name for name in trained if "lora_" not in name} == {"heads.head.weight", "heads.head.bias"}


def test_bad_options_are_found_before_anything_runs(tmp_path):
    with pytest.raises(InputError, match="--epochs"):
        quality.main(["--output-dir", str(tmp_path), "--epochs", "0"])
    with pytest.raises(InputError, match="--labels"):
        quality.main(["--output-dir", str(tmp_path), "--labels", "few"])
