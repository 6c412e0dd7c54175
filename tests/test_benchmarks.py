"""The scripts in benchmarks/: each on its smallest input, and what it writes. Nothing checks a clock."""

import argparse
import importlib.util
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

from benchmarks import (
    answering,
    choose,
    compare_peers,
    digit_scenes,
    domain,
    few_labels,
    growth,
    loading,
    model_zoo,
    quality,
    roofline,
    time_to_accuracy,
)
from lora_utils import read_adapter_file
from toolkit import InputError
from toolkit.run import optim


def test_steps_are_measured_side_by_side(tmp_path, monkeypatch, capsys):
    sizes = {"build_bytes": 10**8, "memory_bytes": 10**9, "resident_bytes": 2 * 10**9}
    monkeypatch.setattr(compare_peers, "measure_memory_apart", lambda *_: sizes)
    monkeypatch.setattr(compare_peers.gc, "collect", lambda: None)  # which is slow among all that tests import
    command = "--model resnet18 --image-size 32 --batch-size 2 --steps 2 --variants full,lora"
    compare_peers.main([*command.split(), "--output-dir", str(tmp_path)])
    result = json.loads((tmp_path / "resnet18_b2_cpu_fp32.json").read_text())
    lora, full = result["variants"]["lora"], result["variants"]["full"]
    ratios = [f / own for f, own in zip(full["seconds"], lora["seconds"], strict=True)]
    assert lora["speedup_over_full"][1] == pytest.approx(sum(ratios) / 2)  # of each round, not of the medians
    assert lora["trainable_share"] < 0.1 < full["trainable_share"]
    assert "| LoRA here |" in capsys.readouterr().out
    assert (tmp_path / "resnet18_b2_cpu_fp32.png").stat().st_size > 10_000


def test_heads_with_few_labels(tmp_path, capsys, base):
    """Every row of a draw has the same labels, and what is measured once is not measured again."""
    command = f"--checkpoint {base} --labels 2 4 --draws 2 --pool 120 --held-out 60 --output-dir {tmp_path}".split()
    runs = few_labels.main(command)
    assert [(run["labels"], run["draw"], run["row"]) for run in runs[:3]] == [
        (2, 0, "before"),
        (2, 0, "probe"),
        (2, 0, "unlabelled"),
    ]
    kept = (tmp_path / "runs.jsonl").read_text()
    assert few_labels.main(command) == runs == [json.loads(line) for line in kept.splitlines()]
    assert (tmp_path / "runs.jsonl").read_text() == kept and len(kept.splitlines()) == 12
    assert capsys.readouterr().out.count("| 4 | ") == 2
    assert few_labels.gain([0.5, 0.7], [0.4, 0.4]) == "+20.0 ± 10.0"
    with pytest.raises(InputError, match="--pool with the row"):
        few_labels.parse(["--pool", "100", "--rows", "trained"])


@pytest.mark.parametrize(
    ("script", "options"),
    [(compare_peers, "--variants full,lora"), (roofline, "--variants full,lora"), (model_zoo, "")],
    ids=["compare_peers", "roofline", "model_zoo"],
)
def test_the_folder_for_what_is_measured_is_made_before(script, options, tmp_path, monkeypatch):
    """In a fresh clone it is not there yet, and a measurement takes minutes."""
    measure = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(script, "current_commit", measure)
    with pytest.raises(KeyboardInterrupt):
        script.main([*options.split(), "--output-dir", str(tmp_path / "new/measured")])
    assert (tmp_path / "new/measured").is_dir()


def test_how_cost_grows(tmp_path, monkeypatch, capsys):
    """A point is measured once, also by the next run. Memory is 1 GB and 0.1 GB an image: 70 images fit into 8 GB."""
    measured = []

    def main(argv: list[str]) -> dict:
        args = compare_peers.parse_arguments(argv)
        measured.append((args.model, args.batch_size, args.rank))
        size = 10**9 + args.batch_size * 10**8
        variant = {"step_seconds": 1.0, "memory_bytes": size, "resident_bytes": size}
        result = {"machine": {"device": "a CPU", "threads": 2}, "versions": {}, "commit": "abc", "left_out": {}}
        result |= {"image_size": args.image_size, "variants": {"full": variant, "lora": variant}}
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / f"point_cpu_{args.precision}.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(compare_peers, "main", main)
    command = "--batches 4 8 --ranks 4 8 --variants full lora"
    for _ in range(2):
        result = growth.main([*command.split(), "--output-dir", str(tmp_path)])
    middle = [("vit_b_16", batch, 8) for batch in (4, 8)]
    assert measured == [*middle, ("vit_b_16", 8, 4), ("vit_small", 8, 8), ("vit_l_16", 8, 8)]
    assert result["fits"] == {"full": 70, "lora": 70}
    assert "| LoRA here | 1 s, 1,400 MB | 1 s, 1,800 MB |" in capsys.readouterr().out
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_how_pairs_scenes_and_answers_grow(tmp_path, monkeypatch):
    for what, size in ((growth.list_pairs, 6), (growth.map_scene, 300), (growth.predict_images, 5)):
        folder = tmp_path / what.__name__
        folder.mkdir()
        assert what(size, folder) > 0
    assert len(list((tmp_path / "predict_images" / "answers").iterdir())) == 2  # a part and its manifest


def test_answering_is_measured_beside_its_parts(images, capsys):
    argv = f"--data-dir {images}/val --arch resnet18 --images 2 --batch-size 2 --workers 0 --rounds 1"
    rates = answering.main(argv.split())
    ways = {"decoding alone", "network alone", "predict", "of archives", "torchvision", "timm"}
    assert ways - set(rates["resnet18"]) <= {"timm"}  # which need not be installed
    assert "| resnet18 |" in capsys.readouterr().out


def test_what_choosing_is_worth(base, images, tmp_path, capsys):
    """Of 18 images 3 to 12 get labels, in rounds: what is chosen stays, and each number of labels has its accuracy."""
    argv = (
        f"--data-dir {images} --checkpoint {base} --pool 18 --labels 3 6 12 --draws 2 --output {tmp_path / 'out.json'}"
    )
    result = choose.main(argv.split())
    assert json.loads((tmp_path / "out.json").read_text())["pool"] == 18
    for by_number in result["accuracies"].values():
        assert {number: len(found) for number, found in by_number.items()} == {3: 2, 6: 2, 12: 2}
    assert len(result["wrong_labels"]["auroc"]) == 2
    assert "| balanced |" in capsys.readouterr().out
    features = torch.randn(18, 4)
    rounds = choose.in_rounds(choose.Pool(features, features, torch.arange(18) % 3), [3, 6, 16, 18], 3)
    assert [len({*chosen}) for chosen in rounds] == [3, 6, 16, 18]
    assert [rounds[0], rounds[1]] == [rounds[1][:3], rounds[2][:6]]


def test_how_many_labels_a_way_needs():
    random = {10: [0.3, 0.5], 30: [0.6, 0.6], 100: [0.7, 0.9]}
    assert choose.labels_needed(random, random) == 100
    assert choose.labels_needed({10: [0.4], 30: [0.7], 100: [0.9]}, random) == pytest.approx(65)  # 0.8 is half way
    assert choose.labels_needed({10: [0.8], 30: [0.9], 100: [0.9]}, random) == 10
    assert choose.labels_needed({10: [0.4], 30: [0.5], 100: [0.6]}, random) is None


def test_scenes_of_digits_are_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(digit_scenes, "SCENES", {"train": 2, "val": 1})
    digit_scenes.main([str(tmp_path)])
    image, mask = (Image.open(tmp_path / "train" / kind / "001.png") for kind in ("images", "masks"))
    assert image.size == mask.size == (96, 96) and image.mode == mask.mode == "L"
    assert 2 <= len(set(mask.getdata())) <= 7


def test_each_loader_makes_the_same_views_of_each_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "PHOTOGRAPHS", {"small": ((130, 90), 4)})
    rows = loading.main(["--only", "views", "--images", "3", "--output-dir", str(tmp_path)])["views"]
    assert {(row["view"], row["pixels"]) for row in rows} == {(v, p) for v in loading.VIEWS for p in (224, 32)}
    assert capsys.readouterr().out.count("| moco_v2 |") == 2
    assert json.loads((tmp_path / "loading_views.json").read_text())["views"] == rows


@pytest.mark.slow
def test_each_row_fine_tunes_the_backbone_of_its_own_stage_1(base, images, tmp_path, monkeypatch, capsys):
    given = []

    def few_labels(flags):
        given.append(" ".join(flags))
        row = {"accuracies": [0.5, 0.6], "mean": 0.55, "spread": 0.07, "learning_rate": 3e-3}
        return {"rows": [{"labels_per_class": n, **row} for n in (2, 3)]}

    monkeypatch.setattr(domain.quality, "main", few_labels)
    monkeypatch.setattr(domain, "STEPS", 2)
    monkeypatch.setattr(domain, "DRAWS", 2)
    monkeypatch.setattr(domain, "apart", lambda function, argument: function(argument))
    for name, (title, own, rates) in domain.ROWS.items():
        monkeypatch.setitem(domain.ROWS, name, (title, own, rates[:1]))
    argv = f"--checkpoint {base} --data-dir {images} --output-dir {tmp_path} --device cpu --labels 2 3".split()
    argv += ["--stage1", "--epochs 1 --batch-size 4 --two-crops digits --workers 0 --dim 8 --mlp-dim 16"]
    result = domain.main([*argv, "--finetune", "--epochs 7", "--rows", "none", "adapters"])
    none, adapters = given
    assert f"--checkpoint {base}" in none and "--stage1-adapter" not in none
    assert f"--checkpoint {base} --stage1-adapter {tmp_path}/adapters/" in adapters
    assert read_adapter_file(adapters.split()[-1])["layers"] and len(result["rows"]) == 4
    assert "| 55.0% ± 7.1% (+0.0 ± 0.0 points) |" in capsys.readouterr().out
    assert json.loads((tmp_path / "domain.json").read_text())["rows"]


@pytest.fixture
def two_rates(monkeypatch):
    monkeypatch.setattr(quality, "RATES", (1e-4, 3e-4))
    monkeypatch.setattr(optim, "STEPS_TO_TRAIN", 1)


def test_each_method_is_compared_at_its_best_rate(base, images, two_rates, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "apart", quality.train)
    command = f"--methods full --labels 2 --seeds 1 --output-dir {tmp_path} --checkpoint {base}"
    command += f" --data-dir {images} --epochs 1 --batch-size 6 --device cpu"
    result = quality.main(command.split())
    assert f"| 2 | full fine-tuning | {result['rows'][0]['mean']:.2%} ± 0.00% |" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    tuning = [record for record in records if record["run"][4] == "validation"]
    best = max(tuning, key=lambda record: (record["accuracy"], -record["loss"]))
    assert len(records) == 3 and len(tuning) == 2 and result["rows"][0]["learning_rate"] == best["run"][2]
    assert result["rows"][0]["share_of_full"] == 1 and (tmp_path / "quality.png").stat().st_size > 10_000
    monkeypatch.setattr(quality, "apart", None)
    assert quality.main(command.split()) == result  # nothing is trained twice


FAST = ["timm:eva02_tiny_patch14_224", "timm:convnext_atto", "torchvision:mobilenet_v3_small", "transformers:ViT"]
FAST += ["transformers:Swinv2", "transformers:Segformer"]


def test_whole_commands_are_timed_and_a_plain_loop_has_its_best_rate(base, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(time_to_accuracy, "RATES", (1e-4, 1e-3))
    apart = lambda command, check: time_to_accuracy.main(command[3:])  # noqa: E731 - the same, in this process
    monkeypatch.setattr(time_to_accuracy, "subprocess", argparse.Namespace(run=apart))
    monkeypatch.chdir(tmp_path)
    options = f"--data-dir {images} --checkpoint {base} --epochs 2 --batch-size 8 --workers 0".split()
    command = ["--methods", "default", "plain", "--seeds", "1", "--output-dir", str(tmp_path / "out"), *options]
    for _ in range(2):  # nothing is run again
        rows = time_to_accuracy.main(command)
    assert len((tmp_path / "out/runs.jsonl").read_text().splitlines()) == 4
    ours, plain = rows
    assert ours["rate"] is None and plain["rate"] in (1e-4, 1e-3)
    for row in rows:
        seconds = [second for second, _ in row["curve"]]
        assert len(seconds) == 2 and 0 < seconds[0] < seconds[1] < row["seconds"]
    assert plain["reached_full_after"] <= plain["curve"][-1][0]
    assert "| full fine-tuning, plain loop |" in capsys.readouterr().out
    assert (tmp_path / "out/time_to_accuracy.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", FAST)
def test_adapters_of_other_libraries_models_are_exact(name):
    library = name.split(":")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    result = model_zoo.check(name)
    assert model_zoo.is_exact(result) and result["layers"] > 10


def test_the_table_of_models_is_that_of_all_and_exact(capsys, tmp_path):
    model_zoo.main(["--only", "torchvision:squeezenet1_1", "--output-dir", str(tmp_path)])
    assert "| torchvision:squeezenet1_1 | 25 of 26 |" in capsys.readouterr().out
    results = json.loads((Path(model_zoo.__file__).parent / "results/model_zoo.json").read_text())["models"]
    assert list(results) == model_zoo.MODELS and all(map(model_zoo.is_exact, results.values()))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or torch.version.cuda is not None, reason="needs g++ and no CUDA")
def test_steps_are_predicted_eager_and_compiled(tmp_path):
    """What the compiler plans has the products of the eager step, but for what it computes again in backward."""
    command = f"--model vit_small --batch-size 8 --variants full,lora,lora_compiled --output-dir {tmp_path}"
    roofline.main(command.split())
    result = json.loads((tmp_path / "predicted_vit_small_b8_bf16.json").read_text())
    full, lora, compiled = (result["variants"][name] for name in ("full", "lora", "lora_compiled"))
    assert lora["peak_bytes"] < 0.5 * full["peak_bytes"] and lora["flops"] < full["flops"]
    assert compiled["flops"] == pytest.approx(lora["flops"], rel=0.05)
    assert compiled["kernels"] < 0.75 * lora["kernels"]
