"""The scripts in benchmarks/, each on its smallest input, without a clock; the figures of the book are the runs'."""

import argparse
import functools
import importlib.util
import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import finetune_lora
from benchmarks import choose, compare_peers, domain, few_labels, model_zoo, quality, roofline, stages, tables
from benchmarks.digit_scenes import main as write_scenes
from tests.pages import commands
from tests.run_folders import column
from toolkit import InputError
from toolkit.run import optim

BOOK = Path(tables.__file__).parent / "RESULTS.md"


def test_what_others_wrote_is_neither_replaced_nor_taken_for_what_is_asked(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        write_scenes([str(tmp_path)])
    assert f"error: {tmp_path} is there, maybe with images of yours: name another folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        domain.refuse_others(tmp_path / "stage1.json", ["--epochs", "1"])
    with pytest.raises(InputError, match=f"{tmp_path} has a stage 1 with other options: give another --output-dir"):
        domain.refuse_others(tmp_path / "stage1.json", ["--epochs", "2"])


def test_steps_are_measured_side_by_side(tmp_path, monkeypatch, capsys):
    sizes = {"build_bytes": 10**8, "memory_bytes": 10**9, "resident_bytes": 2 * 10**9}
    monkeypatch.setattr(compare_peers, "measure_memory_apart", lambda *_: sizes)
    monkeypatch.setattr(compare_peers.gc, "collect", lambda: None)  # which is slow among all that tests import
    output = tmp_path / "new/measured"  # in a fresh clone it is not there yet
    command = "--model resnet18 --image-size 32 --batch-size 2 --steps 2 --variants full,lora"
    compare_peers.main([*command.split(), "--output-dir", str(output)])
    result = json.loads((output / "resnet18_b2_cpu_fp32.json").read_text())
    lora = result["variants"]["lora"]
    full = result["variants"]["full"]
    ratios = [f / own for f, own in zip(full["seconds"], lora["seconds"], strict=True)]
    assert lora["speedup_over_full"][1] == pytest.approx(sum(ratios) / 2)  # of each round, not of the medians
    assert lora["trainable_share"] < 0.1 < full["trainable_share"]
    assert "| LoRA here |" in capsys.readouterr().out
    assert (output / "resnet18_b2_cpu_fp32.png").stat().st_size > 10_000


def test_heads_with_few_labels(tmp_path, capsys, base):
    """Every row of a draw has the same labels, and what is measured once is not measured again."""
    rows = ["before", "one_view", "probe", "unlabelled"]
    argv = f"--checkpoint {base} --labels 2 --draws 2 --pool 60 --held-out 30 --output-dir {tmp_path} --rows".split()
    runs = few_labels.main(argv + rows)
    assert [(run["labels"], run["draw"], run["row"]) for run in runs] == list(itertools.product([2], [0, 1], rows))
    assert column(runs[1::4], "accuracy") != column(runs[2::4], "accuracy")  # eight views tell more
    kept = (tmp_path / "runs.jsonl").read_text()
    assert few_labels.main(argv + rows) == runs == list(map(json.loads, kept.splitlines()))
    assert (tmp_path / "runs.jsonl").read_text() == kept
    assert capsys.readouterr().out.count("| 2 | ") == 2
    assert few_labels.gain([0.5, 0.7], [0.4, 0.4]) == "+20.0 ± 10.0"
    with pytest.raises(InputError, match="--pool with the row"):
        few_labels.parse(["--pool", "100", "--rows", "trained"])


def test_what_choosing_is_worth(base, images, tmp_path, monkeypatch, capsys):
    """Of 18 images 3 to 6 get labels, in rounds: what is chosen stays, and each number of labels has its accuracy."""
    argv = f"--data-dir {images} --checkpoint {base} --pool 18 --labels 3 6 --draws 2 --output {tmp_path / 'out.json'}"
    result = choose.main(argv.split())
    assert json.loads((tmp_path / "out.json").read_text())["pool"] == 18
    for by_number in result["accuracies"].values():
        assert {number: len(found) for number, found in by_number.items()} == {3: 2, 6: 2}
    assert len(result["wrong_labels"]["auroc"]) == 2
    assert "| balanced |" in capsys.readouterr().out
    monkeypatch.setattr("toolkit.WRITTEN", tmp_path / "gone")
    with pytest.raises(InputError, match=r"out\.json is there, not known to be as this wrote it: .*gone would tell"):
        choose.main(argv.split())
    features = torch.randn(18, 4)
    first, second, _, last = choose.in_rounds(choose.Pool(features, features, torch.arange(18) % 3), [3, 6, 16, 18], 3)
    assert first == second[:3] and len({*second}) == 6 and len({*last}) == 18
    # How many labels a way needs to be as good as random ones.
    random = {10: [0.3, 0.5], 30: [0.6, 0.6], 100: [0.7, 0.9]}
    assert choose.labels_needed(random, random) == 100
    assert choose.labels_needed({10: [0.4], 30: [0.7], 100: [0.9]}, random) == pytest.approx(65)  # 0.8 is half way
    assert choose.labels_needed({10: [0.8], 30: [0.9], 100: [0.9]}, random) == 10
    assert choose.labels_needed({10: [0.4], 30: [0.5], 100: [0.6]}, random) is None


def test_each_method_is_compared_at_its_best_rate(base, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "RATES", (1e-4, 3e-4))
    monkeypatch.setattr(optim, "STEPS_TO_TRAIN", 1)
    monkeypatch.setattr(quality, "apart", quality.train)
    runs = f"--data-dir {images} --checkpoint {base} --epochs 1 --batch-size 6 --device cpu"
    command = f"--methods full --labels 2 --seeds 1 --output-dir {tmp_path} {runs}"
    result = quality.main(command.split())
    assert f"| 2 | full fine-tuning | {result['rows'][0]['mean']:.2%} ± 0.00% |" in capsys.readouterr().out
    *tuning, last = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    best = max(tuning, key=lambda record: (record["accuracy"], -record["loss"]))
    assert [record["run"][4] == "validation" for record in (*tuning, last)] == [True, True, False]
    assert result["rows"][0]["learning_rate"] == best["run"][2]
    monkeypatch.setattr(quality, "apart", None)
    assert quality.main(command.split()) == result  # nothing is trained twice


def test_what_may_be_expected_is_what_the_defaults_gain_over_their_probe(tmp_path, monkeypatch, capsys):
    """By hand: two draws that gain 2 and 4 points, over probes of 60 and 64%."""
    asked = []

    def run(flags):
        asked.append(flags)
        seed = int(flags[flags.index("--seed") + 1])
        unseen = ("val_loss", "seconds", "trainable_parameters", "total_parameters", "peak_memory_bytes")
        found = {"val_accuracy": 0.62 + 0.06 * seed, "probe_accuracy_before": 0.60 + 0.04 * seed, "retreats": []}
        return dict.fromkeys((*unseen, "adapter_bytes"), 1) | found

    monkeypatch.setattr(quality.finetune_lora, "main", run)
    monkeypatch.setattr(quality, "apart", quality.train)
    quality.main(f"--defaults --labels 5 all --seeds 2 --output-dir {tmp_path} --image-size 32".split())
    out = capsys.readouterr().out
    assert "| 5 | 62.0% | 65.0% | +3.0 ± 1.0 | 0 s |\n| all | 62.0% | 65.0% | +3.0 ± 1.0 | 0 s |" in out
    assert [flags[:2] for flags in asked] == [["--image-size", "32"]] * 4
    assert not any("--learning-rate" in flags for flags in asked)
    assert ["--labels-per-class" in flags for flags in asked].count(True) == 2


def test_a_stage_has_the_seconds_that_no_stage_within_it_has(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(stages.time, "process_time", lambda: clock[0])

    def passes(seconds: float) -> None:
        clock[0] += seconds

    run = argparse.Namespace(evaluate=lambda: passes(2))
    run.train = lambda: (passes(3), run.evaluate(), passes(4))
    watch = stages.Stopwatch()
    watch.measures(run, "evaluate", "evaluation between epochs", within="training")
    watch.measures(run, "train", "training")
    passes(1)
    run.train()
    run.evaluate()
    watch.note()
    assert watch.seconds == {"other": 3, "training": 7, "evaluation between epochs": 2}


def test_adapters_of_other_libraries_models_are_exact_as_the_table_of_all_says(capsys, tmp_path):
    for name in ("torchvision:mobilenet_v3_small", "timm:convnext_atto", "transformers:Segformer"):
        if importlib.util.find_spec(name.split(":")[0]):
            result = model_zoo.check(name)
            assert model_zoo.is_exact(result) and result["layers"] > 10
    model_zoo.main(["--only", "torchvision:squeezenet1_1", "--output-dir", str(tmp_path)])
    assert "| torchvision:squeezenet1_1 | 25 of 26 |" in capsys.readouterr().out
    results = json.loads((Path(model_zoo.__file__).parent / "results/model_zoo.json").read_text())["models"]
    assert list(results) == model_zoo.MODELS and all(map(model_zoo.is_exact, results.values()))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or torch.version.cuda is not None, reason="needs g++ and no CUDA")
def test_steps_are_predicted_and_have_no_more_kernels_than_peft_s(tmp_path, small_backbones):
    pytest.importorskip("peft")
    roofline.main(f"--model vit_small --batch-size 8 --variants peft,lora --output-dir {tmp_path}".split())
    result = json.loads((tmp_path / "predicted_vit_small_b8_bf16.json").read_text())
    peft, lora = (result["variants"][name] for name in ("peft", "lora"))
    assert 0 < lora["kernels"] <= peft["kernels"]
    assert lora["peak_bytes"] < 0.6 * peft["peak_bytes"] and 0 < lora["flops"] < 1.05 * peft["flops"]


def test_pages_have_the_figures_of_the_runs(monkeypatch):
    """After a change of the files: `python -m benchmarks.tables`."""
    monkeypatch.setattr(tables, "definitions", functools.cache(tables.definitions))
    monkeypatch.setattr(tables, "figures", functools.cache(tables.figures))
    for page in tables.PAGES:
        assert tables.rewritten(page.read_text()) == page.read_text(), page.name
    assert (tables.RESULTS / "figures.jsonl").read_text() == tables.index()
    assert len(BOOK.read_text().splitlines()) <= 300  # who looks for a figure finds it in seconds
    for figure in map(json.loads, (tables.RESULTS / "figures.jsonl").read_text().splitlines()):
        assert figure["machine"] and figure["date"] and figure["commit"], figure["id"]  # its ground
        assert figure["seeds"] == len(figure["values"]) >= 1
    in_pages = re.findall(r"<!-- table: (\w+) -->", BOOK.read_text() + tables.PAGES[0].read_text())
    in_sentences = {name for name, table in tables.definitions().items() if table.get("in_sentences")}
    assert sorted(in_pages) == sorted(tables.definitions().keys() - in_sentences)  # each once, in the book or in README
    assert in_sentences <= {found[2].split(".")[0] for found in tables.CITED.finditer(BOOK.read_text())}


SENTENCES = re.findall(r"`(python -m benchmarks\.(?!tables)[^`]+)`", BOOK.read_text())


@pytest.mark.parametrize("command", [c for c in commands(BOOK.read_text()) if "pytest" not in c] + SENTENCES)
def test_every_command_of_the_book_is_understood(command, monkeypatch):
    """A script ends where it has read its options; what it passes on is understood by the runs that it starts."""
    real = argparse.ArgumentParser.parse_known_args

    def parse(parser, argv, namespace=None):
        _, passed_on = real(parser, argv, namespace)
        _, unknown = real(finetune_lora.make_parser(), passed_on)
        assert unknown == []
        raise InputError("understood")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    words = [word for word in shlex.split(command, comments=True) if "=" not in word or word.startswith("-")]
    with pytest.raises(InputError, match=r"^understood$"):
        if words[1] == "finetune_lora.py":
            finetune_lora.make_parser().parse_args(words[2:])
        importlib.import_module(words[2]).main(words[3:])


def test_a_cell_is_the_mean_over_its_seeds_or_the_median_of_its_rounds(tmp_path, monkeypatch):
    """By hand: two seeds of a method, three rounds of a ratio, a cell without a run, and a figure in a sentence."""
    runs = ['{"method": "a", "acc": 0.5, "val": 40}', '{"method": "a", "acc": 0.75, "val": 40}']
    runs.append('{"method": "b", "acc": 0.1, "val": 40}')
    (tmp_path / "runs.jsonl").write_text("\n".join(runs))
    (tmp_path / "steps.json").write_text(json.dumps({"variants": {"x": {"faster": [1.0, 4.0, 2.0]}}}))
    (tmp_path / "tables.yaml").write_text("""
small:
  {title: t, machine: m, date: 2026-01-02, commit: c, file: runs.jsonl, columns: {
    score: {of: acc, as: percent}, speed: {of: faster, as: ratio, file: steps.json, at: variants/x}},
    rows: {A: {score: {where: {method: a}}}, B: {score: {where: {method: b}}, speed: null}}}
""")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.written("small") == (
        "| t (m, 2026-01-02, c) | score | speed |\n|---|---|---|\n"
        "| A | 62.5% (50.0, 75.0) | 2.00x (1.50 to 3.00) |\n| B | 10.0% |  |\n"
    )
    cited = "from **9%**<!-- small.a.score --> to (9x<!-- small.a.speed -->)"
    assert tables.rewritten(cited) == "from **62.5%**<!-- small.a.score --> to (2.00x<!-- small.a.speed -->)"
    assert json.loads(tables.index().splitlines()[0])["images"] == 40
    (tmp_path / "runs.jsonl").write_text(runs[2])
    with pytest.raises(ValueError, match=r"runs\.jsonl has no run with \{'method': 'a'\}"):
        tables.written("small")
