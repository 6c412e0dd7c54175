"""finetune_lora.py as a user runs it: main(argv), then what it printed, returned and left in the output folder."""

import argparse
import contextlib
import csv
import functools
import gc
import io
import json
import math
import multiprocessing
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import nn

import deploy_lora
import finetune_lora
from finetune_lora import FineTuning, LoRALayer, build_model, count_parameters, load_finetuned, read_options
from lora.followed_norms import followers
from lora.initialization import adapter_pairs, start_at_gradient
from lora_utils import LoRAManager, read_adapter_file
from toolkit import InputError, files
from toolkit.answers.evaluation import Evaluation, evaluate
from toolkit.answers.measures import wilson_interval
from toolkit.answers.tasks import Classification
from toolkit.devices import seed_everything
from toolkit.files import read_checkpoint
from toolkit.images import bands
from toolkit.images.data import LabelledImages, Transformed, build_loader, load_splits
from toolkit.models.backbones import build_backbone
from toolkit.models.checkpoints import load_backbone
from toolkit.run import collapse, feeding, optim, runs, training
from toolkit.run.collapse import Collapsed, CollapseGuard
from toolkit.run.evaluator import Evaluator
from toolkit.run.training import MicroBatches

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CLASSES = ["bright", "dark", "striped"]


def tensors(path) -> dict[str, torch.Tensor]:
    return read_adapter_file(path)["tensors"]


def metrics(folder: Path) -> list[dict[str, float]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.fixture
def start(base, images, tmp_path):
    """A run that has not begun yet, for a look at single steps."""

    def start(options: str = "") -> FineTuning:
        argv = f"--checkpoint {base} --data-dir {images} --output-dir {tmp_path} --device cpu --augmentation none"
        args, _ = read_options([*argv.split(), "--learning-rate", "1e-2", *options.split()])
        seed_everything(args.seed)
        splits = load_splits(args.dataset, args.data_dir, args.eval_split, args.labels_per_class, args.seed)
        model, report = build_model(args, len(splits.class_names))
        args.normalization = bands.settle(args, report["arch"], report["channels"], splits.train)
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        return FineTuning(args, model.train(), report, splits, CPU, dtype, [])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "STEPS_TO_TRAIN", 1)
        yield start


# ------------------------------------------------------------------------------------------------------------- options


def test_the_flags_defaults_are_the_guides(base, tmp_path):
    args, sources = read_options(["--checkpoint", str(base)])
    assert (args.lora_rank, args.lora_alpha, args.learning_rate, args.epochs) == (8, 16, 1e-4, 10)
    assert args.freeze_backbone and not args.use_qlora
    assert str(args.output_dir) == "checkpoints/lora" and args.dataset == "digits"
    assert {key for key, source in sources.items() if source != "default"} == {"checkpoint"}


def test_the_shipped_config_serves_the_shipped_checkpoint_alone(base):
    shipped = yaml.safe_load((ROOT / "configs/stage1.yaml").read_text())["finetune"]
    args, sources = read_options([])
    assert args.checkpoint == files.SHIPPED == read_options(["--checkpoint", "shipped"])[0].checkpoint
    assert args.learning_rate == float(shipped["learning_rate"]) and sources["learning_rate"] == "config"
    for name in ("shipped", str(files.SHIPPED)):
        args, sources = read_options(["--checkpoint", name])
        assert args.weight_decay == shipped["weight_decay"] and sources["weight_decay"] == "config"
    args, _ = read_options(["--checkpoint", str(base)])
    assert args.config is None and args.learning_rate == 1e-4


def test_defaults_then_file_then_command_line(base, tmp_path):
    (tmp_path / "my.yaml").write_text("finetune: {lora_rank: 2, learning_rate: 1e-3}\nmodel: {arch: vit_mini}\n")
    args, sources = read_options(f"--config {tmp_path / 'my.yaml'} --checkpoint {base} --lora-rank 4".split())
    assert (args.lora_rank, args.learning_rate, args.epochs, args.arch) == (4, 1e-3, 10, "vit_mini")
    where = [sources[key] for key in ("lora_rank", "learning_rate", "epochs")]
    assert where == ["command line", "config", "default"]


def test_settings_that_do_nothing_may_be_the_defaults_or_a_files(base, tmp_path):
    """They are there for other runs."""
    (tmp_path / "my.yaml").write_text("finetune: {lora_alpha: 8, target_modules: [mlp]}\ndata: {crop_min: 0.5}")
    flags = f"--checkpoint {base} --config {tmp_path / 'my.yaml'} --lora-rank 0 --lora-dropout 0 --augmentation none"
    args, _ = read_options(flags.split())
    assert (args.lora_alpha, args.crop_min, args.lora_rank) == (8, 0.5, 0)


def test_the_run_says_what_was_typed_what_the_file_changes_and_where_the_rest_is(finetune, tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("finetune:\n  weight_decay: 0.03\n  epochs: 9\n  seed: 0\n")
    folder = finetune(f"--config {tmp_path / 'my.yaml'} --epochs 1 --lora-rank 2 --norms frozen")["folder"]
    header = " ".join(capsys.readouterr().out.split("\ndata: ")[0].split())
    typed, rest = header.split(f" {tmp_path / 'my.yaml'} changes: ")
    assert typed.startswith("command line: --config ") and "--lora-rank 2 --norms frozen" in typed
    assert "--learning-rate 0.001" in typed and "--epochs 1 " in typed
    assert rest == f"weight_decay 0.03 all settings: {folder}/config.yaml"  # the seed is the default


def test_alpha_is_twice_the_rank_unless_it_is_given(base, tmp_path):
    def alpha(options: str) -> float:
        return read_options(["--checkpoint", str(base), *options.split()])[0].lora_alpha

    (tmp_path / "my.yaml").write_text("finetune: {lora_alpha: 5}")
    assert alpha("") == alpha("--lora-rank 0") == 16
    assert alpha("--lora-rank 16") == alpha("--rank 16") == 32
    assert alpha("--rank 16 --alpha 4") == 4 and alpha(f"--rank 16 --config {tmp_path / 'my.yaml'}") == 5
    assert read_options(["--rank", "4"])[0].lora_alpha == 8  # the shipped file leaves it open too


def test_the_usual_short_names_are_those_of_the_options(base):
    short, long = (
        "--lr 1e-3 --rank 4 --alpha 3 --qlora",
        "--learning-rate 1e-3 --lora-rank 4 --lora-alpha 3 --use-qlora",
    )
    read = [read_options(["--checkpoint", str(base), *options.split()]) for options in (short, long)]
    assert read[0] == read[1]


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_help_has_the_options_that_people_need_with_their_defaults(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)

    def printed(flag: str) -> str:
        with pytest.raises(SystemExit) as ended:
            finetune_lora.main([flag])
        assert ended.value.code == 0
        return capsys.readouterr().out

    first, whole = printed("--help"), printed("--help-all")
    flags = re.findall(r"^  --([a-z0-9-]+)", first, re.MULTILINE)
    assert flags == [name.replace("_", "-") for name in finetune_lora.options.NEEDED]
    assert max(map(len, first.splitlines())) <= int(columns)
    told = " ".join(first.split())
    assert "(default: shipped)" in told and "(default: 0.0001)" in told and "(default: off)" in told
    assert "default: 2 r" in told and "--lora-rank, --rank" in told and "--no-" not in first.split("\n\n")[2]
    assert all(action.option_strings[0] in whole for action in finetune_lora.make_parser()._actions)
    assert "(default: 0.75)" in whole


def test_a_data_dir_means_your_own_images_unless_a_set_is_named(images, tmp_path):
    own = ["--checkpoint", "shipped", "--data-dir", str(images)]
    assert read_options(own)[0].dataset == "imagefolder"
    assert read_options([*own, "--dataset", "cifar10"])[0].dataset == "cifar10"
    (tmp_path / "my.yaml").write_text("data: {dataset: cifar10}")
    args, sources = read_options([*own, "--config", str(tmp_path / "my.yaml")])
    assert (args.dataset, sources["dataset"], sources["data_dir"]) == ("cifar10", "config", "command line")


def test_resume_and_eval_only_look_into_the_output_folder(tmp_path):
    args, _ = read_options(["--resume", "--output-dir", str(tmp_path)])
    assert args.resume == tmp_path / "last.pth"
    args, _ = read_options(["--eval-only", "--output-dir", str(tmp_path)])
    assert args.eval_only == tmp_path / "lora.pth"
    (tmp_path / "elsewhere.pth").touch()
    args, _ = read_options(["--resume", str(tmp_path / "elsewhere.pth"), "--output-dir", "other"])
    assert args.resume == tmp_path / "elsewhere.pth"


def test_the_config_of_a_run_repeats_it_bit_for_bit(finetune, tmp_path):
    first = finetune("--lora-rank 2 --label-smoothing 0.1 --seed 5 --target-modules self_attention mlp.0")
    again = finetune_lora.main(
        ["--config", str(first["folder"] / "config.yaml"), "--output-dir", str(tmp_path / "again"), "--device", "cpu"]
    )
    assert again["config"] == first["config"] and again["val_loss"] == first["val_loss"]
    ours, theirs = tensors(first["folder"] / "lora.pth"), tensors(tmp_path / "again" / "lora.pth")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --------------------------------------------------------------------------------------------------- a run's own files


@pytest.fixture(scope="module")
def finished(base, images, tmp_path_factory, drawing) -> tuple[dict, Path, str]:
    """A run of six epochs that others look at: its results, its folder and what it printed."""
    folder, printed = tmp_path_factory.mktemp("finished"), io.StringIO()
    argv = f"--checkpoint {base} --data-dir {images} --output-dir {folder} --device cpu --batch-size 8 --epochs 6"
    argv += " --learning-rate 3e-4 --lora-rank 4 --warmup-epochs 1"
    with contextlib.redirect_stdout(printed), drawing():
        results = finetune_lora.main(argv.split())
    return results, folder, printed.getvalue()


def test_a_run_leaves_these_files_and_no_others(finished):
    _, folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        *("config.yaml", "confusion_matrix.png", "last.pth", "lora.pth"),
        *("metrics.csv", "mistakes.png", "report.html", "results.json", "results_answers.csv", "training_curves.png"),
    ]
    for name in ("confusion_matrix.png", "mistakes.png", "training_curves.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300 and len(picture.convert("L").getcolors()) > 10


def test_it_says_what_was_recognised(finished):
    *_, printed = finished
    told = "backbone: vit_mini for 16 pixels from a moco_v3 checkpoint, epoch 7;\n"
    told += "          all 78 backbone tensors loaded\n"
    assert told in printed


@pytest.mark.slow
def test_a_function_of_the_caller_s_sees_every_epoch(base, images, tmp_path):
    argv = f"--checkpoint {base} --data-dir {images} --output-dir {tmp_path} --device cpu --epochs 2 --lora-rank 2"
    seen = []
    finetune_lora.main(argv.split(), after_epoch=lambda run: seen.append(run.history[-1]["epoch"]))
    assert seen == [1, 2]


def test_metrics_has_a_row_per_epoch(finished):
    results, folder, _ = finished
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    assert header == (
        "epoch,train_loss,val_loss,val_accuracy,val_balanced_accuracy,val_macro_f1,learning_rate,head_learning_rate,"
        "adapter_learning_rate,seconds"
    )
    rows = metrics(folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert results["val_accuracy"] == rows[-1]["val_accuracy"]
    assert results["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    # 21 images in batches of 8, so 18 steps: half of them warm up, to a part of the rate, and then it falls.
    peak = 3e-4 / optim.rate_divisor(3e-4, 18)
    rates = [row["learning_rate"] for row in rows]
    assert rates[:4] == pytest.approx([peak / 9, peak * 4 / 9, peak * 7 / 9, peak])
    assert rates[3:] == sorted(rates[3:], reverse=True) and rates[-1] > 0


def test_the_saved_head_is_calibrated_and_training_goes_on_from_the_one_that_is_not(finetune):
    """And once only: a finished run that is resumed leaves the same file again."""
    results = finetune("--keep-best accuracy --epochs 1 --learning-rate 1e-3")
    temperature, folder = results["temperature"], results["folder"]
    assert results["calibration_error"] < results["calibration_error_before"] and temperature < 1  # it was softened
    content = read_adapter_file(folder / "lora.pth")
    assert content["metadata"]["temperature"] == temperature
    start = read_checkpoint(folder / "last.pth")["average"]["start"]["heads.head.weight"]
    if results["kept_epoch"] == 0:
        torch.testing.assert_close(content["tensors"]["heads.head.weight"] * temperature, start)
    assert start.norm() < content["tensors"]["heads.head.weight"].norm()
    again = finetune("--keep-best accuracy --epochs 1 --learning-rate 1e-3 --resume")
    for name in ("temperature", "calibration_error", "calibration_error_before", "val_loss"):
        assert again[name] == pytest.approx(results[name], rel=1e-3, abs=1e-6), name


def test_a_run_that_was_begun_before_there_was_calibration_goes_on_without(finetune):
    folder = finetune("--epochs 1")["folder"]
    state = read_checkpoint(folder / "last.pth")
    torch.save(state | {"head_temperature": state["head_temperature"][:2]}, folder / "old.pth")
    results = finetune(f"--epochs 1 --resume {folder / 'old.pth'}")
    assert "temperature" not in results and "temperature" not in read_adapter_file(folder / "lora.pth")["metadata"]


def test_results_say_what_came_out(finished):
    results, folder, _ = finished
    assert json.loads((folder / "results.json").read_text()) == results
    best = max(metrics(folder), key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert results["best_epoch"] == best["epoch"] and results["best_val_accuracy"] == best["val_accuracy"]
    assert results["val_accuracy"] == metrics(folder)[-1]["val_accuracy"]
    assert (results["val_images"], results["eval_split"]) == (15, "held-out")
    assert results["val_accuracy_interval"] == pytest.approx(wilson_interval(15 * results["val_accuracy"], 15))
    assert results["epochs"] == 6 and 0 <= results["knn_accuracy_before"] <= 1
    assert results["adapter_bytes"] == (folder / "lora.pth").stat().st_size < results["backbone_bytes"] / 10
    assert results["trainable_parameters"] == sum(t.numel() for t in tensors(folder / "lora.pth").values())
    assert results["trainable_parameters"] - results["lora_parameters"] == 3 * 192 + 3
    assert results["peak_memory_bytes"] > results["backbone_bytes"]
    assert list(results["accuracy_per_class"]) == CLASSES
    assert sum(results["accuracy_per_class"].values()) / 3 == pytest.approx(results["val_accuracy"])


def test_training_learns_what_can_be_learned(finished):
    results, folder, _ = finished
    rows = metrics(folder)
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]
    assert results["val_accuracy"] >= 0.9


def test_the_adapter_file_describes_itself(finished, base):
    _, folder, _ = finished
    content = read_adapter_file(folder / "lora.pth")
    about = content["metadata"]
    assert about["class_names"] == CLASSES and (about["arch"], about["image_size"]) == ("vit_mini", 16)
    assert about["checkpoint"] == str(base) and about["config"]["finetune"]["lora_rank"] == 4
    assert about["lora"]["r"] == 4 and about["epoch"] == 6
    assert {name for name in content["tensors"] if "lora_" not in name} == {"heads.head.weight", "heads.head.bias"}
    assert {record["r"] for record in content["layers"].values()} == {4}


def test_the_summary_is_short_and_its_command_works(finished, tmp_path, monkeypatch):
    results, _, printed = finished
    table = printed.rpartition("\n\n")[2].splitlines()
    assert len(table) <= 12
    for expected in (f"{results['val_accuracy']:.2%}", f"{results['knn_accuracy_before']:.2%}", "trained parameters"):
        assert expected in "\n".join(table)
    monkeypatch.chdir(tmp_path)
    [command] = (line.partition("deploy_lora.py")[2] for line in table if "deploy_lora.py" in line)
    deploy_lora.main(shlex.split(command))
    assert (tmp_path / "merged.pth").exists()


def test_three_lines_predict(finished, images):
    results, folder, _ = finished
    # The docstring's own lines, on one of these images.
    snippet = [line.strip() for line in load_finetuned.__doc__.split("\n\n")[1].splitlines()]
    code = "\n".join(snippet).replace("checkpoints/lora/lora.pth", str(folder / "lora.pth"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        names = {"load_finetuned": load_finetuned, "Image": Image}
        exec(code.replace("image.png", str(images / "val/dark/0.png")), names)
    assert printed.getvalue().strip() in CLASSES

    model, info = load_finetuned(folder / "lora.pth")
    assert not model.training
    right = 0
    for path in sorted((images / "val").glob("*/*.png")):
        logits = model(info["transform"](Image.open(path).convert("RGB"))[None])
        right += info["class_names"][logits.argmax()] == path.parent.name
    assert right / 15 == pytest.approx(results["val_accuracy"])


def test_the_last_adapter_is_kept_and_its_accuracy_is_the_headline(finetune, monkeypatch, capsys):
    """The best epoch would be chosen on the very images that measure it: told, but no number to publish."""
    scripted = iter([0.85, 0.9, 0.8, 0.82])
    adapters = []

    def scripted_evaluate(model, real: Evaluation) -> Evaluation:
        adapters.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        return real._replace(accuracy=next(scripted, 0.82))

    with_evaluations(monkeypatch, scripted_evaluate)
    results = finetune("--epochs 4")
    assert (results["val_accuracy"], results["best_epoch"], results["best_val_accuracy"]) == (0.82, 2, 0.9)
    assert "accuracy after        12 of 15 images, 82.00% (95% interval" in capsys.readouterr().out
    kept = tensors(results["folder"] / "lora.pth")
    assert all(torch.equal(kept[name], adapters[3][name]) for name in adapters[3] if "lora_" in name)
    assert all(torch.equal(kept[name], adapters[4][name]) for name in adapters[4])  # with its head calibrated
    assert not all(torch.equal(kept[name], adapters[1][name]) for name in adapters[1])


def test_crop_min_reaches_the_crops(finetune, monkeypatch):
    made, real = [], feeding.train_transform
    monkeypatch.setattr(feeding, "train_transform", lambda *a, **given: made.append(given) or real(*a, **given))
    finetune("--augmentation crop --epochs 1")
    finetune("--augmentation crop --epochs 1 --crop-min 0.4", output="other")
    assert [given["crop_min"] for given in made] == [0.75, 0.4]


def test_the_curves_show_losses_that_can_be_compared(finetune):
    """Label smoothing raises the loss that is minimised, even of a perfect classifier; the table has the plain one."""
    results = finetune("--label-smoothing 0.5 --epochs 6 --learning-rate 3e-2 --head-init random")
    assert metrics(results["folder"])[-1]["train_loss"] < 0.8  # what is minimised stays above 0.86


def test_a_run_makes_its_folder_its_own(finetune, monkeypatch):
    """Files of an earlier run beside this one's config.yaml would pass for its own."""
    folder = finetune("--epochs 1")["folder"]
    (folder / "notes.txt").touch()
    monkeypatch.setattr(FineTuning, "train_epoch", lambda run: (_ for _ in ()).throw(runs.Stopped(2)))
    with pytest.raises(runs.Stopped):
        finetune("--epochs 1 --lora-rank 2")
    begun = ["config.yaml", "last.pth", "lora.pth", "metrics.csv", "notes.txt"]
    assert sorted(path.name for path in folder.iterdir()) == begun
    content = read_adapter_file(folder / "lora.pth")  # of the probe that it begins with
    assert content["metadata"]["epoch"] == 0 and {layer["r"] for layer in content["layers"].values()} == {2}


@pytest.mark.slow
@pytest.mark.parametrize("done", ["within an epoch", "all epochs"])
@pytest.mark.parametrize("options", ["", "--ema 0.9 --mixup 0.2 --cutmix 1"])
def test_a_run_resumed_into_another_folder_leaves_all_its_files_there(finetune, monkeypatch, tmp_path, done, options):
    finetune = functools.partial(finetune, options)
    if done == "within an epoch":
        monkeypatch.setattr(runs.StopRequests, "check", lambda requests: (_ for _ in ()).throw(runs.Stopped(2)))
        with pytest.raises(runs.Stopped):
            finetune(output="first")
        monkeypatch.undo()
    else:
        finetune(output="first")
    moved = (tmp_path / "first" / "last.pth").rename(tmp_path / "last.pth")
    whole = finetune(output="whole")
    results = finetune.func(f"{options} --resume {moved}", output="second")
    assert {path.name for path in results["folder"].iterdir()} == {path.name for path in whole["folder"].iterdir()}
    assert len(metrics(results["folder"])) == 2
    ours, theirs = tensors(results["folder"] / "lora.pth"), tensors(whole["folder"] / "lora.pth")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


@pytest.mark.slow
def test_a_resumed_run_reports_times_and_images_of_the_whole_run(finetune, monkeypatch):
    whole = finetune("--epochs 2")
    again = finetune("--epochs 2 --resume")  # nothing is left to do
    for name in ("seconds", "images_per_second", "waiting_share"):
        assert again[name] == whole[name] > 0, name
    seen, stopped = [], lambda run: seen.append(run.meter.images) or run.stop._note(2, None)
    with pytest.raises(runs.Stopped):
        finetune("--epochs 2", after_epoch=stopped)  # which is at the first step of the second epoch
    finetune("--epochs 2 --resume", after_epoch=lambda run: seen.append(run.meter.images))
    assert seen[1] > seen[0]


def test_a_run_is_not_resumed_on_other_images(finetune, images, tmp_path):
    """An added image moves none of the others, but training would go on with what the run has not begun with."""
    shutil.copytree(images, tmp_path / "own")
    finetune(f"--data-dir {tmp_path / 'own'} --epochs 1")
    (tmp_path / "own").rename(tmp_path / "moved")
    again = finetune(f"--data-dir {tmp_path / 'moved'} --epochs 1 --resume")  # the same images, wherever they lie
    assert again["images"] == json.loads((again["folder"] / "results.json").read_text())["images"]
    shutil.copy(images / "train/dark/0.png", tmp_path / "moved/train/dark/new.png")
    with pytest.raises(InputError, match=r"trained on other images than .*moved holds now: .*without --resume"):
        finetune(f"--data-dir {tmp_path / 'moved'} --epochs 1 --resume")


# ------------------------------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize(
    "way",
    ["--lora-init random", "--lora-init random --use-qlora", "--lora-rank 0 --no-freeze-backbone --learning-rate 3e-3"],
)
def test_the_average_of_the_weights_is_what_is_evaluated_and_saved(finetune, images, monkeypatch, way):
    """It follows `average += (1 - d) (weight - average)` with d = min(decay, (1 + n) / (10 + n)) in step n."""
    averages, real_step = {}, FineTuning.step

    def step(run, micro_batches):
        result, n = real_step(run, micro_batches), len(steps) + 1
        decay = min(0.3, (1 + n) / (10 + n))
        for name, weight in run.model.named_parameters():
            if weight.requires_grad:
                average = averages.get(name, weight.detach())
                averages[name] = decay * average + (1 - decay) * weight.detach()
        steps.append(run)
        return result

    steps: list[FineTuning] = []
    monkeypatch.setattr(FineTuning, "step", step)
    results = finetune(f"--ema 0.3 --wise-ft 1 --learning-rate 1e-2 {way}")
    saved, weights = tensors(results["folder"] / "lora.pth"), dict(steps[-1].model.named_parameters())
    assert len(averages) > 2 and len(steps) == 6
    for name, average in averages.items():
        average = average / results["temperature"] if ".head." in name else average
        torch.testing.assert_close(saved[name], average, rtol=1e-4, atol=1e-6, msg=name)
        assert not torch.allclose(weights[name], average, rtol=1e-4, atol=1e-6), name  # training goes on from these
    model, info = load_finetuned(results["folder"] / "lora.pth")
    loader = build_loader(Transformed(load_splits("imagefolder", images).val, info["transform"]), 32)
    assert evaluate(model, loader, CPU).loss == pytest.approx(results["val_loss"], rel=1e-4, abs=1e-6)


def test_a_step_on_mixed_images_is_on_their_shares_of_the_classes(start, monkeypatch):
    run, plain = start("--mixup 1 --label-smoothing 0.1 --class-weights balanced"), start()
    images = torch.stack([run.feed.train_loader.dataset[i][0] for i in range(6)])
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    seen, real = [], run.loss
    monkeypatch.setattr(run, "loss", lambda logits, targets: seen.append((logits, targets)) or real(logits, targets))
    _, loss, right = run.step(MicroBatches(iter([(images, labels)]), 1, 6)).read()
    [(logits, shares)] = seen
    share = shares.max(1).values  # of the image itself or of the one before it in the batch
    assert torch.allclose(shares.sum(1), torch.ones(6)) and 0.5 < share[0] < 1 and torch.allclose(share, share[0])
    own = shares[0, 0]
    mixed = own * images + (1 - own) * images.roll(1, 0)
    torch.testing.assert_close(logits, plain.model(mixed), rtol=1e-4, atol=1e-4)
    assert loss == pytest.approx(-(shares * logits.log_softmax(1)).sum().item(), rel=1e-4)
    assert right == (logits.argmax(1) == shares.argmax(1)).sum()


def gradients(run: FineTuning, sizes: list[int]) -> tuple[tuple[float, int], dict[str, torch.Tensor]]:
    """What step() returns, and the gradients, for the first images of the training set in batches of these sizes."""
    batches, position = [], 0
    for size in sizes:
        samples = [run.feed.train_loader.dataset[i * 5 % 21] for i in range(position, position + size)]
        batches.append((torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])))
        position += size
    _, *result = run.step(MicroBatches(iter(batches), len(batches), sum(sizes))).read()
    return result, {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", ["", "--use-qlora", "--norms train", "--no-freeze-backbone --lora-rank 0"])
def test_part_of_the_change_is_evaluated_and_saved(finetune, images, monkeypatch, way):
    """Of the adapters, the head and what else trains; training itself goes on from all of it."""
    starts, steps, real_step = [], [], FineTuning.step

    def step(run, micro_batches):
        if not steps:
            starts.append({name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad})
        steps.append(run)
        return real_step(run, micro_batches)

    monkeypatch.setattr(FineTuning, "step", step)
    results = finetune(f"--wise-ft 0.25 --learning-rate 1e-3 {way}")
    assert results["kept_share"] == 0.25
    saved, weights = tensors(results["folder"] / "lora.pth"), dict(steps[-1].model.named_parameters())
    for name, start in starts[0].items():
        share = 1.0 if "lora_A" in name else 0.25  # of the update BA, in which B starts at zero
        mixture = torch.lerp(start, weights[name], share)
        mixture = mixture / results["temperature"] if ".head." in name else mixture
        torch.testing.assert_close(saved[name], mixture, rtol=1e-4, atol=1e-6, msg=name)
    assert any(not torch.equal(start, weights[name]) for name, start in starts[0].items())
    model, info = load_finetuned(results["folder"] / "lora.pth")
    loader = build_loader(Transformed(load_splits("imagefolder", images).val, info["transform"]), 32)
    assert evaluate(model, loader, CPU).loss == pytest.approx(results["val_loss"], rel=1e-4)


@pytest.mark.parametrize("options", ["", "--label-smoothing 0.2 --clip-grad-norm 0.01", "--use-qlora"])
def test_accumulated_batches_are_one_big_batch(start, options):
    # Of unequal sizes too: the last batch of an epoch is smaller, and its images count like any others.
    runs = [start(options), start(options)]
    for run in runs:  # else B is zero and A gets no gradient
        gradients(run, [5])
    (loss, right), whole = gradients(runs[0], [12])
    (loss_parts, right_parts), parts = gradients(runs[1], [5, 5, 2])
    assert right == right_parts
    assert loss == pytest.approx(loss_parts, rel=1e-5)
    assert whole.keys() == parts.keys() and any("lora_A" in name for name in whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_step_is_adamw_on_the_dense_gradient_of_the_smoothed_loss(start):
    run = start("--lora-rank 0 --label-smoothing 0.3 --weight-decay 0.1")
    images = torch.stack([run.feed.train_loader.dataset[i][0] for i in range(6)])
    labels = torch.tensor([run.feed.train_loader.dataset[i][1] for i in range(6)])
    head = run.model.heads.head
    weight, bias = (p.detach().clone().requires_grad_() for p in (head.weight, head.bias))
    with torch.no_grad():
        features = run.model.eval()._process_input(images)
        features = torch.cat([run.model.class_token.expand(6, -1, -1), features], dim=1)
        features = run.model.encoder(features)[:, 0]
    run.model.train()
    log_p = F.log_softmax(features @ weight.T + bias, dim=1)
    expected = -(0.7 * log_p.gather(1, labels[:, None]).mean() + 0.3 * log_p.mean())
    optimizer = torch.optim.AdamW([weight, bias], lr=1e-2, weight_decay=0.1)
    expected.backward()
    optimizer.step()
    _, loss, _ = run.step(MicroBatches(iter([(images, labels)]), 1, 6)).read()
    assert loss == pytest.approx(F.nll_loss(log_p, labels, reduction="sum").item(), rel=1e-5)
    for ours, theirs in zip((head.weight, head.bias), (weight, bias), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_clipping_bounds_the_norm_of_the_whole_step(start):
    _, free = gradients(start(), [8])
    _, clipped = gradients(start("--clip-grad-norm 0.01"), [8])
    norm = math.sqrt(sum(g.square().sum().item() for g in free.values()))
    assert norm > 0.02
    for name, gradient in free.items():
        torch.testing.assert_close(clipped[name], gradient * (0.01 / norm), rtol=1e-3, atol=1e-9)


@pytest.mark.slow
def test_bf16_computes_in_it_and_keeps_the_adapters_in_float32(start, finetune):
    runs = [start(), start("--precision bf16")]
    for run in runs:  # the head is zero before
        gradients(run, [8])
    ((exact, *_), _), ((loss, *_), found) = (gradients(run, [8]) for run in runs)
    assert loss != exact and loss == pytest.approx(exact, rel=0.02)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    results = finetune("--precision bf16 --epochs 1")
    assert results["precision"] == "bfloat16"
    assert {tensor.dtype for tensor in tensors(results["folder"] / "lora.pth").values()} == {torch.float32}


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradient_checkpointing_changes_nothing_but_memory(start, mode):
    (loss, *_), expected = gradients(start(), [8])
    (loss_again, *_), found = gradients(start(f"--gradient-checkpointing {mode}"), [8])
    assert loss_again == pytest.approx(loss, rel=1e-5) and found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_an_epoch_sees_every_image_once_in_a_new_order(start, monkeypatch):
    run, seen = start("--batch-size 8 --accumulation-steps 2 --learning-rate 1e-5"), []
    real_step = run.step

    def step(micro_batches):
        batches = list(micro_batches.batches)
        seen.append([labels for _, labels in batches])
        assert (micro_batches.number, micro_batches.images) == (len(batches), sum(len(labels) for _, labels in batches))
        return real_step(micro_batches._replace(batches=iter(batches)))

    monkeypatch.setattr(run, "step", step)
    run.train_epoch()
    run.train_epoch()
    sizes = [[len(labels) for labels in step] for step in seen]
    assert sizes == [[8, 8], [5], [8, 8], [5]] and run.schedule.last_epoch == 4
    orders = [torch.cat([labels for step in seen[i : i + 2] for labels in step]) for i in (0, 2)]
    assert torch.equal(orders[0].bincount(), torch.tensor([7, 7, 7])) and not torch.equal(*orders)


def test_accumulated_batches_are_read_one_at_a_time(start, monkeypatch):
    run, events = start("--batch-size 3 --accumulation-steps 7"), []
    run.model.register_forward_hook(lambda *_: events.append("forward"))
    read = Transformed.__getitem__
    monkeypatch.setattr(Transformed, "__getitem__", lambda self, i: events.append("read") or read(self, i))
    run.train_epoch()
    assert events[:8] == ["read", "read", "read", "forward"] * 2


@pytest.mark.slow
def test_a_last_batch_of_one_image_is_left_to_another_epoch_where_batch_norm_trains(images, tmp_path):
    """Of 21 images in batches of 4 one is left over; a ResNet at 32 pixels ends in maps of 1x1."""
    torch.save(build_backbone("resnet18", 5).state_dict(), tmp_path / "resnet.pth")
    argv = f"--checkpoint {tmp_path / 'resnet.pth'} --data-dir {images} --output-dir {tmp_path / 'out'} --device cpu"
    argv += " --image-size 32 --epochs 1 --lora-rank 0 --no-freeze-backbone"
    finetune_lora.main(f"{argv} --batch-size 4".split())
    assert read_checkpoint(tmp_path / "out/last.pth")["schedule"]["last_epoch"] == 5
    with pytest.raises(InputError, match=r"BatchNorm that trains needs 2 images or more.*raise --batch-size"):
        finetune_lora.main(f"{argv} --batch-size 1".split())
    # To evaluate, BatchNorm needs no other image.
    alone = f"--eval-only {tmp_path / 'out/lora.pth'} --data-dir {images} --batch-size 1 --device cpu"
    assert 0 <= finetune_lora.main(alone.split())["val_accuracy"] <= 1


@pytest.mark.slow
def test_a_head_starts_on_the_statistics_that_training_will_see(images, monkeypatch, tmp_path):
    """Those of the training images: with a file's own the head would not fit what BatchNorm gives it in training.

    What the backbone knows before training is told as the file has it.
    """
    torch.manual_seed(0)
    resnet = build_backbone("resnet18", 5)
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    argv = f"--checkpoint {tmp_path / 'resnet.pth'} --data-dir {images} --output-dir {tmp_path / 'out'} --device cpu"
    monkeypatch.setattr(runs.StopRequests, "check", lambda requests: (_ for _ in ()).throw(runs.Stopped(2)))
    with pytest.raises(runs.Stopped):  # at the first step: the file is the probe's
        finetune_lora.main(f"{argv} --image-size 32 --epochs 1 --lora-rank 0 --norms train --batch-size 7".split())
    model, info = load_finetuned(tmp_path / "out/lora.pth")
    pixels = torch.stack([info["transform"](image) for image, _ in load_splits("imagefolder", images).train])
    maps = resnet.conv1(pixels)
    torch.testing.assert_close(model.bn1.running_mean, maps.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert resnet.bn1.running_mean.abs().max() == 0  # what the file has
    argv = f"{argv} --output-dir {tmp_path}/frozen --image-size 32 --epochs 1 --lora-rank 0 --batch-size 7"
    with pytest.raises(runs.Stopped):
        finetune_lora.main(argv.split())
    baselines = [read_checkpoint(tmp_path / name / "last.pth")["before"] for name in ("out", "frozen")]
    assert baselines[0] == baselines[1]


# ------------------------------------------------------------------------------------- the start, the rate, no collapse


@pytest.mark.parametrize("flags", ["", "--use-qlora", "--precision bf16"])
def test_only_the_upper_blocks_are_adapted_and_differentiated(finetune, flags):
    """Also in what the file says, from which the model is built anew, with what was in 4 bits below."""
    seen, real_step = [], FineTuning.step

    def step(run, micro_batches):
        blocks = run.model.encoder.layers
        handles = [b.register_forward_hook(lambda m, i, out: seen.append(out.requires_grad)) for b in blocks]
        result = real_step(run, micro_batches)
        [handle.remove() for handle in handles]
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuning, "step", step)
        results = finetune(f"--adapt-last 2 --epochs 1 {flags}")
    assert seen[:6] == [False] * 4 + [True] * 2
    layers = read_adapter_file(results["folder"] / "lora.pth")["layers"]
    blocks = {
        int(re.match(r"encoder\.layers\.encoder_layer_(\d)\.", name)[1]): r["r"] > 0 for name, r in layers.items()
    }
    adapted = {4: True, 5: True}
    assert blocks == ({0: False, 1: False, 2: False, 3: False} | adapted if flags == "--use-qlora" else adapted)
    model, _ = load_finetuned(results["folder"] / "lora.pth")
    assert {name for name, m in model.named_modules() if isinstance(m, LoRALayer)} == set(layers)
    again = finetune(f"{flags} --eval-only {results['folder'] / 'lora.pth'}")
    assert again["val_loss"] == pytest.approx(results["val_loss"], rel=1e-6)


def test_a_run_begins_as_the_linear_probe_that_it_saves(finetune, images, monkeypatch, tmp_path):
    monkeypatch.setattr(FineTuning, "train_epoch", lambda run: (_ for _ in ()).throw(runs.Stopped(2)))
    with pytest.raises(runs.Stopped):
        finetune("--augmentation crop")
    model, info = load_finetuned(tmp_path / "out/lora.pth")
    loader = build_loader(Transformed(load_splits("imagefolder", images).val, info["transform"]), 8)
    assert evaluate(model, loader, CPU).accuracy == info["val_accuracy"] == 1.0 and info["epoch"] == 0


def test_a_random_head_and_a_rate_of_its_own(finetune, start):
    results = finetune("--head-init random --epochs 1")
    assert results["probe_accuracy_before"] is None and results["knn_accuracy_before"] == 1.0
    groups = start("--head-learning-rate 0.5").optimizer.param_groups
    rates = [(group["lr"], group["weight_decay"]) for group in groups]
    assert sorted(rates) == [(0.24, 0.01), (0.5, 0.0), (0.5, 0.01)]  # adapters, the head's bias and weight
    assert start("--lora-init random").optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("options", ["", "--use-qlora", "--lora-dropout 0.5 --norms train"])
def test_adapters_start_at_the_gradient_that_the_first_images_have(start, options):
    """With the head as it then is, and without dropout. What is still in `.grad` would be added to the first step's."""
    run, reference = start(options), start(options)
    run.start()
    reference.model.load_state_dict(
        {name: p for name, p in run.model.state_dict().items() if "lora_" not in name}, strict=False
    )

    def backward():
        for images, labels in build_loader(run.feed.train_loader.dataset, batch_size=32):  # all 21, in another order
            F.cross_entropy(reference.model(images), labels, reduction="sum").backward()

    reference.model.eval()
    start_at_gradient(reference.model, backward)
    for (A, B), (expected, _) in zip(adapter_pairs(run.model), adapter_pairs(reference.model), strict=True):
        cosines = torch.linalg.svdvals(A.detach() @ expected.detach().T) * 3  # of the two spaces
        assert cosines[0] > 0.999 and cosines.mean() > 0.9
        assert not B.any() and A.grad is None
    assert run.model.training


def test_adapters_start_alike_in_float16_where_the_gradient_is_small(start, monkeypatch):
    """Of a loss so small float16 would hold no gradient, were it not scaled."""
    monkeypatch.setattr(FineTuning, "loss", lambda run, *batch: 1e-5 * F.cross_entropy(*batch, reduction="sum"))
    precise, low = start("--learning-rate 1e-4"), start("--learning-rate 1e-4")
    low.dtype, low.scaler = torch.float16, torch.amp.GradScaler("cpu")
    for run in (precise, low):
        run.start()
    for (A, _), (expected, _) in zip(adapter_pairs(low.model), adapter_pairs(precise.model), strict=True):
        assert torch.linalg.svdvals(A.detach() @ expected.detach().T)[0] * 3 > 0.99


@pytest.mark.parametrize("options", ["--lora-init random", "--head-init random", "--lora-rank 0"])
def test_adapters_start_at_random_where_there_is_no_gradient_to_go_by(start, options):
    run = start(options)
    before = {name: p.clone() for name, p in run.model.named_parameters() if "lora_" in name}
    run.start()
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters() if "lora_" in name)


def test_a_step_that_float16_cannot_hold_advances_neither_schedule_nor_average(start):
    run = start("--ema 0.5")
    run.scaler = torch.amp.GradScaler("cpu")
    run.average.begin()
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    overflow = next(iter(trained.values())).register_hook(lambda gradient: gradient * math.inf)
    run.step(next(run.feed.steps(1)))
    assert run.schedule.last_epoch == 0 and all(torch.equal(p, before[name]) for name, p in trained.items())
    assert run.average.steps == 0
    overflow.remove()
    run.step(next(run.feed.steps(1)))
    assert run.schedule.last_epoch == 1 and run.average.steps == 1


def with_evaluations(monkeypatch, changed: Callable[[nn.Module, Evaluation], Evaluation]) -> None:
    """Runs get other results on the evaluation images: what `changed` makes of the network and the real ones."""
    real = Evaluator.evaluate

    def evaluate(evaluator: Evaluator, batches) -> Evaluation:
        result = real(evaluator, batches)
        return result if batches is evaluator.feed.watched_loader else changed(evaluator.network, result)

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)


@pytest.fixture
def watched(monkeypatch):
    """watched([1.0, 0.4, ...]): what the guard sees of its training images, at the start and after each epoch.

    The runs keep their usual share of the change.
    """

    real = Evaluator.watch

    def script(accuracies: list[float]) -> None:
        left = iter(accuracies)
        monkeypatch.setattr(Evaluator, "watch", lambda evaluator: real(evaluator)._replace(accuracy=next(left)))
        monkeypatch.setattr(Evaluator, "shrink_to_sound_share", lambda *_: None)

    return script


def guard(images: int, accuracies: list[float], classes: int = 10, all_train: bool = False) -> CollapseGuard:
    """One that watches so many images, of classes that are equally frequent, and has seen these accuracies."""
    watched = LabelledImages([None] * images, [i % classes for i in range(images)])
    judge = CollapseGuard(Classification([str(i) for i in range(classes)]), watched, watched, all_train)
    judge.accuracies = accuracies
    return judge


@pytest.mark.parametrize(("all_train", "share"), [(False, 1 / 4), (True, 1 / 3)])
def test_how_much_may_be_lost(all_train, share):
    """Of 30 points above a constant answer, on so many images that chance hardly counts."""
    judge = guard(100_000, [0.4, 0.35], all_train=all_train)
    assert judge.has_collapsed(0.4 - 0.3 * share - 0.01, loss=1.0)
    assert not judge.has_collapsed(0.4 - 0.3 * share + 0.01, loss=1.0)


def test_what_is_lost_by_chance_alone_is_no_collapse_but_not_all_of_it_is_good():
    """On few images a collapse must be clear. A state to go back to must be as good as the best one."""
    judge = guard(100, [0.3])
    assert judge.has_collapsed(0.15, loss=1.0) and not judge.has_collapsed(0.2, loss=1.0)
    assert judge.is_recoverable()  # the start always is
    assert not guard(1000, [0.3, 0.24]).is_recoverable() and guard(1000, [0.3, 0.285]).is_recoverable()


def test_four_images_tell_a_constant_answer_by_its_loss():
    """Half of two classes' images right is what a constant answer has, and no chance on so few."""
    judge = guard(4, [1.0], classes=2)
    assert judge.has_collapsed(0.5, loss=0.70) and not judge.has_collapsed(0.5, loss=0.68)


def test_a_loss_that_explodes_is_seen_within_the_epoch():
    """One step that is worse than a constant answer is not; nor is a start that was worse."""
    judge = guard(100, [0.9])
    assert not any(judge.explodes(loss) for loss in (2.0, 1.8, 6.0, 1.5))
    assert judge.explodes(40.0) and guard(100, [0.9]).explodes(math.nan)
    bad_start = guard(100, [0.1])
    assert not any(bad_start.explodes(loss) for loss in (9.0, 8.0, 15.0))


def test_the_guard_sees_training_images_alone(finetune, monkeypatch):
    """Whatever the accuracy on the evaluation images is, it changes nothing that is saved."""
    one = finetune("--epochs 2", output="one")
    with_evaluations(monkeypatch, lambda network, real: real._replace(accuracy=0.0))
    other = finetune("--epochs 2", output="other")
    assert other["val_accuracy"] == 0 != one["val_accuracy"] and not other["retreats"]
    ours, theirs = (tensors(results["folder"] / "lora.pth") for results in (one, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def test_few_training_images_are_watched_in_several_views(start, monkeypatch):
    monkeypatch.setattr(collapse, "WATCHED_VIEWS", 128)
    run = start()
    assert len(run.splits.train) == 21 and run.guard.images == len(run.feed.watched_loader.dataset) == 126
    first, second = run.evaluator.watch(), run.evaluator.watch()
    assert first.loss == second.loss  # the same views


def test_training_that_harms_the_probe_keeps_less_of_its_change(start, monkeypatch):
    """The largest share that answers the training images as well as the start; in the end nothing of the change."""
    run = start("--wise-ft auto")
    run.start()
    head = run.model.heads.head.weight
    with torch.no_grad():
        head.neg_()  # every answer is wrong, until the start weighs more
    run.evaluator.shrink_to_sound_share(run.guard, run.evaluator.watch().accuracy)
    assert 0 < run.average.share <= run.average.wise_ft_alpha / 2
    assert run.evaluator.watch().accuracy >= run.guard.accuracies[0]
    monkeypatch.setattr(Evaluator, "watch", lambda _: Evaluation(0.0, 0.1, *[None] * 3))
    run.evaluator.shrink_to_sound_share(run.guard, 0.1)
    assert run.average.share == 0


def test_training_that_gains_nothing_in_two_epochs_goes_back_at_a_lower_rate(finetune, monkeypatch, capsys):
    """As adapters that die: no share of their change is kept, and the loss rises. It is no reason to stop the run."""

    def a_little_worse(evaluator: Evaluator) -> Evaluation:
        trained = any(p.any() for name, p in evaluator.network.named_parameters() if "lora_B" in name)
        return Evaluation(1.01 if trained else 1.0, 0.79 if trained else 0.8, *[None] * 3)

    monkeypatch.setattr(Evaluator, "watch", a_little_worse)
    results = finetune("--epochs 3 --wise-ft auto")
    assert [went["epoch"] for went in results["retreats"]] == [2, 2, 2] and results["epochs"] == 3
    assert "epoch 2: training gains nothing; back to epoch 0, learning rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("share", "loss"), [pytest.param(0.1, 1.1, id="a little is kept"), pytest.param(0.0, 0.9, id="the loss falls")]
)
def test_what_gains_anything_is_left_alone(share, loss):
    judge = guard(100, [])
    judge.begin(None, Evaluation(1.0, 0.8, *[None] * 3))

    def learns_nothing(share: float, loss: float) -> bool:
        found = judge.learns_nothing(share, loss)
        judge.end_epoch(0.8)
        return found

    assert not learns_nothing(0.0, 1.1)
    assert not learns_nothing(share, loss)
    assert not learns_nothing(0.0, 1.1) and learns_nothing(0.0, 1.1)


def test_an_epoch_that_gains_nothing_counts_once_however_often_it_is_judged():
    """It is judged again when a run goes on that was stopped within the evaluation."""
    judge = guard(100, [])
    judge.begin(None, Evaluation(1.0, 0.8, *[None] * 3))
    assert not judge.learns_nothing(0.0, 1.1) and not judge.learns_nothing(0.0, 1.1)
    judge.end_epoch(0.8)
    assert judge.learns_nothing(0.0, 1.1)


@pytest.mark.parametrize(("typed", "kept"), [("auto", 0.0), ("0.9", 0.9)])
def test_a_share_that_was_typed_stays(start, monkeypatch, typed, kept):
    """Also if the training images are answered a little worse than at the start."""
    run = start(f"--wise-ft {typed}")
    run.start()
    run.guard.accuracies = [1.0]
    monkeypatch.setattr(Evaluator, "watch", lambda _: Evaluation(0.0, 0.99, *[None] * 3))
    run.train_epoch()
    assert run.average.share == kept


@pytest.mark.slow
def test_no_process_of_a_run_or_of_its_trials_outlives_it(finetune):
    """Left to the collector of cycles they would wait there, and then take five seconds each to end."""
    before, alive = {*multiprocessing.active_children()}, []

    def note(run):
        alive.append(len({*multiprocessing.active_children()} - before))

    gc.disable()
    try:
        finetune("--workers 1 --learning-rate auto --epochs 1 --lora-rank 2", after_epoch=note)
        assert alive[-1] in (1, 2)  # of the run's own loaders; the seven trials had theirs
        assert {*multiprocessing.active_children()} <= before
    finally:
        gc.enable()


def test_a_short_run_trains_at_a_lower_rate():
    """From 200 steps on it is the one that was typed; below it grows with the steps, and hardly with what was typed."""
    assert optim.rate_divisor(1e-2, 200) == optim.rate_divisor(1e-4, 1000) == 1
    assert optim.rate_divisor(1e-4, 50) == 8 and optim.rate_divisor(1e-4, 2) == pytest.approx(1000)
    rates = [rate / optim.rate_divisor(rate, 10) for rate in (1e-4, 1e-3, 1e-2)]
    assert rates == pytest.approx([1.12e-6, 1.13e-6, 1.13e-6], rel=1e-2)
    steps = [1e-2 / optim.rate_divisor(1e-2, steps) for steps in (10, 50, 150, 190)]
    assert steps == sorted(steps) and steps[-1] == pytest.approx(1.25e-3, rel=1e-2)


def test_more_passes_over_few_images_do_not_raise_the_rate():
    """Of an epoch of n steps, 5 n passes count."""

    def divisor(epochs: int, steps_per_epoch: int) -> float:
        args = argparse.Namespace(epochs=epochs, learning_rate=1e-4, head_init="probe", warmup_epochs=0)
        return optim.plan_rates(args, steps_per_epoch)[1]

    assert divisor(5, 2) > divisor(10, 2) == divisor(50, 2) == optim.rate_divisor(1e-4, 20)
    assert divisor(10, 4) > divisor(20, 4) == divisor(50, 4) == optim.rate_divisor(1e-4, 80)
    assert divisor(25, 8) == divisor(5, 40) == 1


def test_a_run_without_a_probe_trains_at_the_rate_that_it_is_given(finetune, monkeypatch):
    monkeypatch.setattr(optim, "STEPS_TO_TRAIN", 200)
    results = finetune("--epochs 1 --head-init random --warmup-epochs 0", output="random")
    assert metrics(results["folder"])[0]["learning_rate"] == 1e-3
    results = finetune("--epochs 1 --warmup-epochs 0", output="probe")
    assert metrics(results["folder"])[0]["learning_rate"] < 1e-4


def test_a_warm_up_is_a_few_steps_long_where_an_epoch_is_one_step():
    assert optim.warmup_steps(1, steps_per_epoch=50, total_steps=500) == 50
    assert optim.warmup_steps(1, steps_per_epoch=1, total_steps=10) == 5
    assert optim.warmup_steps(1, steps_per_epoch=3, total_steps=300) == 20
    assert optim.warmup_steps(0, steps_per_epoch=1, total_steps=10) == 0


def test_a_collapsed_run_goes_back_to_the_last_good_epoch_with_an_eighth_of_the_rate(finetune, watched, capsys):
    # The third epoch is neither good nor a collapse: the run goes on, but it will not come back to there.
    watched([1.0, 1.0, 0.4, 1.0, 0.87, 0.4, 1.0, 1.0, 1.0])
    results = finetune("--schedule constant --epochs 4 --warmup-epochs 0")
    assert [(retreat["epoch"], retreat["learning_rate"]) for retreat in results["retreats"]] == [
        (2, 1e-3),
        (4, pytest.approx(1e-3 / 8)),
    ]
    rates = [row["learning_rate"] for row in metrics(results["folder"])]
    assert rates == pytest.approx([1e-3, 1e-3 / 8, 1e-3 / 64, 1e-3 / 64])
    told = capsys.readouterr().out
    assert "epoch 2: training collapsed; back to epoch 1, learning rate 1.3e-04" in told
    assert "epoch 4: training collapsed; back to epoch 2, learning rate" in told


@pytest.mark.slow
def test_the_time_that_a_collapse_has_undone_was_spent(finetune, watched, monkeypatch):
    """Each evaluation of the guard takes ten seconds here, and nothing else any time."""
    watched([1.0, 1.0, 0.87, 0.4, 1.0, 1.0])
    scripted_watch, now = Evaluator.watch, [0.0]

    def ten_seconds(evaluator):
        now[0] += 10
        return scripted_watch(evaluator)

    monkeypatch.setattr(Evaluator, "watch", ten_seconds)
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    results = finetune("--epochs 3")
    assert [retreat["epoch"] for retreat in results["retreats"]] == [3]
    assert sum(row["seconds"] for row in metrics(results["folder"])) == 30
    assert results["seconds"] == 50  # the second epoch was undone with the third


def test_what_a_collapse_did_is_undone(finetune, watched):
    """Back at the start, the run is one that had the lower rate from the first, its softer head included."""
    dropout = "--epochs 2 --schedule constant --lora-dropout 0.2 --ema 0.9"
    watched([1.0, 0.87, 0.4, 1.0, 1.0, 1.0])  # the last three once it is back at the start
    repeated = finetune(f"{dropout} --learning-rate 8e-3", output="repeated")
    watched([1.0] * 3)
    lower = finetune(f"{dropout} --learning-rate 1e-3", output="lower")
    ours, theirs = (tensors(results["folder"] / "lora.pth") for results in (repeated, lower))
    assert repeated["retreats"] and not lower["retreats"]
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    losses = [read_checkpoint(of["folder"] / "last.pth")["guard"]["start_loss"] for of in (repeated, lower)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_a_run_stopped_after_a_retreat_goes_on_to_the_same_end(finetune, watched, monkeypatch):
    """Also if it then collapses once more: the state to go back to is in last.pth."""
    whole_run = [1.0, 1.0, 0.4, 0.4, 1.0]
    watched(whole_run)
    whole = finetune("--epochs 2", output="whole")
    watched(whole_run[:3])
    steps, real_step = [], FineTuning.step

    def step(run, micro_batches):
        steps.append(None)
        if len(steps) == 8:  # the second step of the repeated second epoch
            run.stop.signum = 2
        return real_step(run, micro_batches)

    monkeypatch.setattr(FineTuning, "step", step)
    with pytest.raises(runs.Stopped):
        finetune("--epochs 2", output="stopped")
    watched(whole_run[3:])
    resumed = finetune("--epochs 2 --resume", output="stopped")
    assert len(resumed["retreats"]) == 2 and resumed["retreats"] == whole["retreats"]
    ours, theirs = (tensors(results["folder"] / "lora.pth") for results in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


@pytest.mark.slow
def test_a_stop_within_the_evaluation_leaves_the_guard_as_it_was_before_the_epoch(finetune, monkeypatch):
    """The epoch has been judged by then, and is judged again when the run goes on."""
    whole = finetune("--epochs 2", output="whole")

    def stop_request(requests, batches):
        raise runs.Stopped(2)

    monkeypatch.setattr(runs.StopRequests, "watched", stop_request)
    with pytest.raises(runs.Stopped):
        finetune("--epochs 2", output="stopped")
    state = read_checkpoint(whole["folder"].parent / "stopped/last.pth")
    assert state["history"] == [] and len(state["guard"]["accuracies"]) == 1
    monkeypatch.undo()
    resumed = finetune("--epochs 2 --resume", output="stopped")
    states = [read_checkpoint(results["folder"] / "last.pth") for results in (whole, resumed)]
    assert states[0]["guard"]["accuracies"] == states[1]["guard"]["accuracies"]


@pytest.mark.slow
@pytest.mark.parametrize(("accuracies", "good"), [([1.0] + [0.3] * 4, 1), ([0.3, 1.0] * 4, 0)])
def test_a_run_that_collapses_at_every_rate_stops_with_the_remedy(finetune, watched, tmp_path, accuracies, good):
    """And with the files of its last good adapter."""
    watched([1.0, *accuracies])
    with pytest.raises(
        Collapsed, match=r"collapses in epoch . even at learning rate .*lower --learning-rate"
    ) as stopped:
        finetune("--epochs 3")
    assert read_adapter_file(tmp_path / "out/lora.pth")["metadata"]["epoch"] == good
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results == json.loads(json.dumps(stopped.value.results))
    assert results["epochs"] == good and len(results["retreats"]) == 4
    assert (tmp_path / "out/report.html").exists() and (tmp_path / "out/training_curves.png").exists()
    watched([0.3])
    with pytest.raises(Collapsed) as resumed:
        finetune("--epochs 3 --resume")
    assert str(resumed.value) == str(stopped.value)  # it has collapsed at the same rate again


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last", "kept"),
    [
        ([[2, 2, 1, 2], [0, 0, 0, 0]], 3),  # the third epoch, trained again, is the best that is left
        ([[0, 0, 0, 0], [0, 0, 0, 0]], 1),  # the first epoch is: its file comes back
    ],
)
def test_the_best_epoch_is_forgotten_if_it_is_one_of_those_that_are_undone(finetune, watched, monkeypatch, last, kept):
    """The third epoch is best by balanced accuracy, but has lost too much on training images to come back to."""
    watched([1.0, 1.0, 1.0, 0.87, 0.4, 1.0, 1.0])
    labels = torch.tensor([0] * 16 + [1, 1, 2, 2])  # right of them: 17, 16, 15, but of all classes, and none
    answers = [[0] * 16 + [1, 0, 0, 0], [0] * 20, [0] * 11 + [1] * 7 + [2] * 2]
    answers += [[0] * 16 + answer for answer in last]

    def evaluation(_, real: Evaluation) -> Evaluation:
        if not answers:
            return real
        answer = torch.tensor(answers.pop(0))
        accuracy = (answer == labels).float().mean().item()
        return real._replace(accuracy=accuracy, predictions=answer, labels=labels)

    with_evaluations(monkeypatch, evaluation)
    results = finetune("--epochs 4 --keep-best balanced --head-init random")
    assert [retreat["epoch"] for retreat in results["retreats"]] == [4]
    assert results["kept_epoch"] == kept == read_adapter_file(results["folder"] / "lora.pth")["metadata"]["epoch"]


def test_a_resumed_run_keeps_how_much_faster_adapters_learn(finetune, monkeypatch):
    """It is in the optimizer's state, and the head's temperature depends on it."""
    runs_made = []
    finetune("--epochs 1", after_epoch=runs_made.append)
    monkeypatch.setattr(finetune_lora.initialization, "ADAPTER_LR_FACTOR", 2.0)
    real_train = FineTuning.train
    monkeypatch.setattr(FineTuning, "train", lambda run, *args: runs_made.append(run) or real_train(run, *args))
    finetune("--epochs 1 --resume")
    assert (
        runs_made[0].adapter_lr_factor
        == runs_made[1].adapter_lr_factor
        == 24
        != finetune_lora.initialization.ADAPTER_LR_FACTOR
    )


def test_the_best_epoch_is_not_looked_for_in_another_folder(finetune):
    results = finetune("--epochs 1 --keep-best accuracy")
    with pytest.raises(InputError, match=r"--keep-best: the best adapter is beside .*resume with that folder"):
        finetune(f"--epochs 1 --keep-best accuracy --resume {results['folder'] / 'last.pth'}", output="elsewhere")


def test_a_loss_that_is_not_finite_is_a_collapse(finetune, monkeypatch):
    real_loss, calls = FineTuning.loss, []

    def loss(run, logits, labels):
        calls.append(None)
        return real_loss(run, logits, labels) * (math.nan if len(calls) == 3 + 2 else 1)

    monkeypatch.setattr(FineTuning, "loss", loss)
    results = finetune("--epochs 1")
    assert len(results["retreats"]) == 1 and math.isfinite(metrics(results["folder"])[0]["train_loss"])
    # The step that was under way is undone with it; before each start, three batches give the gradient.
    assert len(calls) == (3 + 3) + (3 + 3)


@pytest.mark.slow
@pytest.mark.parametrize(("by", "kept"), [("accuracy", 1), ("balanced", 2), (None, 3)])
def test_the_best_epoch_is_kept(finetune, images, monkeypatch, capsys, by, kept):
    """What `lora.pth` has is then what is evaluated at the end; a run that is resumed knows it too."""
    labels = torch.tensor([0, 0, 0, 0, 1, 2])  # right of them: five, of the frequent class; four, of all; three
    answers = [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 0, 2]]
    left = [torch.tensor(answer) for answer in answers]

    def evaluation(_, real: Evaluation) -> Evaluation:
        if not left:
            return real
        answer = left.pop(0)
        return real._replace(accuracy=(answer == labels).float().mean().item(), predictions=answer, labels=labels)

    with_evaluations(monkeypatch, evaluation)
    options = f"--epochs 3 --learning-rate 1e-3 --head-init random {f'--keep-best {by}' if by else ''}"
    results = finetune(options)
    assert results["kept_epoch"] == kept and results["best_epoch"] == (kept if by else 1)
    assert (f"epoch {kept} of 3 chosen by the evaluation images" in capsys.readouterr().out) == (by is not None)
    adapter = results["folder"] / "lora.pth"
    assert read_adapter_file(adapter)["metadata"]["epoch"] == kept
    model, info = load_finetuned(adapter)
    loader = build_loader(Transformed(load_splits("imagefolder", images).val, info["transform"]), 32)
    assert evaluate(model, loader, CPU).loss == pytest.approx(results["val_loss"], rel=1e-4)
    again = finetune(f"{options} --resume")
    assert again["val_loss"] == pytest.approx(results["val_loss"], rel=1e-4)
    assert again["kept_epoch"] == kept


@pytest.mark.slow
@pytest.mark.parametrize("way", ["--use-qlora", "--lora-rank 0", "--lora-rank 0 --no-freeze-backbone"])
def test_a_search_for_other_ways_to_train_tells_its_cost_beforehand(finetune, monkeypatch, capsys, way):
    monkeypatch.setattr(finetune_lora.search, "RATES", (1e-4, 1e-3))
    results = finetune(f"--learning-rate auto --epochs 1 {way}")
    told = capsys.readouterr().out
    assert told.index("searching for a learning rate: 2 runs of 1 epochs") < told.index("learning rate 1e-04: accuracy")
    assert results["learning_rate"] in (1e-4, 1e-3) and results["config"]["finetune"]["learning_rate"] != "auto"


@pytest.mark.slow
def test_a_rate_is_found_and_an_interrupted_search_goes_on(finetune, monkeypatch, tmp_path):
    monkeypatch.setattr(finetune_lora.search, "RATES", (1e-5, 1e-4, 1e-3))
    whole = finetune("--learning-rate auto", output="whole")
    rows = list(csv.DictReader((tmp_path / "whole/learning_rates.csv").read_text().splitlines()))
    assert len(rows) == 3 and (tmp_path / "whole/learning_rates.png").exists()
    assert whole["learning_rate"] in {float(row["learning_rate"]) for row in rows}
    assert whole["config"]["finetune"]["learning_rate"] == whole["learning_rate"]
    real, left = finetune_lora.search.save_atomically, iter(range(1))
    monkeypatch.setattr(
        finetune_lora.search,
        "save_atomically",
        lambda *args: real(*args) if next(left, None) is not None else (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        finetune("--learning-rate auto", output="stopped")
    monkeypatch.setattr(finetune_lora.search, "save_atomically", real)
    made = []
    monkeypatch.setattr(FineTuning, "start", note_calls(FineTuning.start, made))
    resumed = finetune("--learning-rate auto --resume", output="stopped")
    assert len(made) == 3 - 1 + 1  # what is left of the search, and the run
    ours, theirs = (tensors(results["folder"] / "lora.pth") for results in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    assert finetune("--learning-rate auto --resume", output="stopped")["learning_rate"] == whole["learning_rate"]


@pytest.mark.slow
def test_trials_keep_the_share_of_the_change_that_the_run_will_keep(finetune, monkeypatch):
    """They train on fewer images, of which `--wise-ft auto` would keep less."""
    monkeypatch.setattr(finetune_lora.search, "RATES", (1e-4, 1e-3))
    made, start = [], FineTuning.start
    monkeypatch.setattr(FineTuning, "start", lambda run, *given: made.append(run) or start(run, *given))
    results = finetune("--learning-rate auto --epochs 1 --keep-best f1")
    assert list(results["chosen_by"]) == ["learning rate", "epoch"]
    assert [len(run.splits.train) for run in made] == [16, 16, 21]
    assert [run.average.share for run in made] == [7 / 12] * 3  # seven images of each class


@pytest.mark.slow
def test_a_search_goes_on_elsewhere_and_with_other_workers(finetune, monkeypatch, tmp_path, images):
    """All trials are made, but the run has not begun."""
    monkeypatch.setattr(finetune_lora.search, "RATES", (1e-4, 1e-3))
    monkeypatch.setattr(finetune_lora.search.reports, "plot_learning_rates", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune("--learning-rate auto", output="stopped")
    monkeypatch.undo()
    moved = shutil.copytree(images, tmp_path / "moved")
    command = f"--learning-rate auto --resume {tmp_path / 'stopped/last.pth'}"
    monkeypatch.setattr(finetune_lora.search, "RATES", (1e-4, 1e-3))
    columns = training.metrics_columns(Classification.measured)
    monkeypatch.setattr(FineTuning, "train_epoch", lambda run: run.history.append(dict.fromkeys(columns, 0.5)))
    with pytest.raises(InputError, match=r"of a search with other settings \(finetune\.batch_size was 8, is 4\)"):
        finetune(f"{command} --batch-size 4", output="elsewhere")
    results = finetune(f"{command} --data-dir {moved} --workers 1", output="elsewhere")
    assert results["learning_rate"] == 1e-4 and (tmp_path / "elsewhere/learning_rates.png").exists()


def test_a_search_is_not_resumed_from_pretraining(finetune, tmp_path):
    torch.save({"config": {"epochs": 3}, "images": ""}, tmp_path / "last.pth")
    with pytest.raises(InputError, match=r"last\.pth is not a last\.pth of this version of the script"):
        finetune(f"--learning-rate auto --resume {tmp_path / 'last.pth'}")


def test_weights_that_are_no_numbers_are_a_collapse(finetune, monkeypatch):
    """The last step of an epoch has a finite loss and leaves NaN: every answer is then the first class."""
    real, done = FineTuning.step, []

    def step(self, micro_batches):
        result = real(self, micro_batches)
        if not done and self.schedule.last_epoch == self.steps_per_epoch:
            done.append(1)
            list(self.model.parameters())[-1].data.fill_(math.nan)  # the head's bias
        return result

    monkeypatch.setattr(FineTuning, "step", step)
    results = finetune("--head-init random")
    assert len(results["retreats"]) == 1 and results["epochs"] == 2 and math.isfinite(results["val_loss"])


@pytest.mark.slow
def test_a_run_whose_rate_was_found_is_repeated_by_its_config(finetune, monkeypatch, tmp_path):
    """Random numbers of training included."""
    monkeypatch.setattr(finetune_lora.search, "RATES", (1e-4, 1e-3))
    found = finetune("--learning-rate auto --mixup 0.5 --epochs 1", output="found")
    main = finetune_lora.main
    main(["--config", str(found["folder"] / "config.yaml"), "--output-dir", str(tmp_path / "again"), "--device", "cpu"])
    ours, theirs = (tensors(tmp_path / name / "lora.pth") for name in ("found", "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def test_a_search_goes_on_from_its_own_files_alone(finetune, tmp_path):
    torch.save({"trials": []}, tmp_path / "other.pth")
    for rate in ("auto", "1e-3"):  # the second is no search, which could go on with this
        with pytest.raises(InputError, match=r"other\.pth is not a last\.pth of this version"):
            finetune(f"--learning-rate {rate} --resume {tmp_path / 'other.pth'}")


def note_calls(function, calls: list):
    return lambda *args: calls.append(None) or function(*args)


def test_the_rates_that_are_told_are_those_of_the_optimizer(finetune, capsys):
    rates = {}

    def look(run):
        names = {id(parameter): name for name, parameter in run.model.named_parameters()}
        for group in run.optimizer.param_groups:
            for parameter in group["params"]:
                rates[names[id(parameter)]] = group["initial_lr"]

    results = finetune("--epochs 1 --lora-rank 2 --learning-rate 1e-4 --head-learning-rate 3e-4", after_epoch=look)
    assert "learning rate: head 3e-4, adapters 2.4e-3 (24x: they start at the gradient)" in capsys.readouterr().out
    assert (
        {rate for name, rate in rates.items() if "lora_" in name} == {results["adapter_learning_rate"]} == {24 * 1e-4}
    )
    assert {rate for name, rate in rates.items() if "heads" in name} == {results["head_learning_rate"]} == {3e-4}
    [row] = metrics(results["folder"])
    told = [row[name] for name in ("learning_rate", "head_learning_rate", "adapter_learning_rate")]
    assert told == pytest.approx([1e-4, 3e-4, 24e-4])


def test_rare_classes_can_count_as_much_as_frequent_ones(start):
    run = start("--class-weights balanced")
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    assert run.task.class_weights.tolist() == pytest.approx([1, 1, 1])  # as many of each here
    run.task.class_weights = torch.tensor([1.0, 2.0, 3.0])
    expected = F.cross_entropy(logits, labels, torch.tensor([1.0, 2.0, 3.0]), reduction="sum")
    torch.testing.assert_close(run.loss(logits, labels), expected)


# --------------------------------------------------------------------------------------------------- ways to fine-tune


WAYS = {
    "lora": "--lora-rank 2",
    "qlora": "--lora-rank 2 --use-qlora",
    "rslora": "--lora-rank 4 --use-rslora --lora-dropout 0.1",
    "norms": "--lora-rank 2 --norms train",
    "linear probe": "--lora-rank 0",
    "full fine-tuning": "--lora-rank 0 --no-freeze-backbone --learning-rate 1e-3",
    "lora and base": "--lora-rank 2 --no-freeze-backbone --learning-rate 1e-3",
    "from scratch": "--from-scratch --lora-rank 0 --no-freeze-backbone --learning-rate 1e-3",
}


@pytest.fixture(scope="module")
def ways(base, images, tmp_path_factory) -> dict[str, dict]:
    """Two epochs of each way to fine-tune."""
    results = {}
    for name, options in WAYS.items():
        folder = tmp_path_factory.mktemp("way")
        argv = f"--checkpoint {base} --data-dir {images} --output-dir {folder} --device cpu --epochs 2 --batch-size 8"
        results[name] = finetune_lora.main([*argv.split(), *f"--learning-rate 1e-3 {options}".split()])
        results[name]["folder"] = folder
    return results


def backbone_names(base) -> set[str]:
    return {name for name in load_backbone(base, 3)[0].state_dict() if not name.startswith("heads")}


def test_the_linear_probe_trains_the_head_alone(ways):
    results = ways["linear probe"]
    assert results["trainable_parameters"] == 3 * 192 + 3 and results["lora_parameters"] == 0
    assert tensors(results["folder"] / "lora.pth").keys() == {"heads.head.weight", "heads.head.bias"}


def test_full_fine_tuning_trains_everything(ways, base):
    results = ways["full fine-tuning"]
    # A ViT's stored positions are a parameter like the others here; MoCo froze them, full fine-tuning does not.
    assert results["trainable_parameters"] == results["total_parameters"] and results["lora_parameters"] == 0
    moved = tensors(results["folder"] / "lora.pth").keys()
    assert moved >= backbone_names(base)


def test_from_scratch_starts_elsewhere_and_is_saved_whole(ways, base):
    found, start = tensors(ways["from scratch"]["folder"] / "lora.pth"), load_backbone(base, 3)[0].state_dict()
    assert found.keys() == start.keys()
    name = "encoder.layers.encoder_layer_0.mlp.0.weight"
    assert (found[name] - start[name]).abs().mean() > 0.01  # two epochs alone move it by a tenth of that


def test_what_random_weights_start_with_comes_back_from_its_file(finetune, tmp_path, monkeypatch):
    def killed(_):
        raise InputError("killed in the first epoch")

    monkeypatch.setattr(FineTuning, "train_epoch", killed)
    with pytest.raises(InputError, match="killed"):
        finetune("--from-scratch --lora-rank 2 --no-freeze-backbone")
    state = load_finetuned(tmp_path / "out/lora.pth")[0].state_dict()
    saved = tensors(tmp_path / "out/lora.pth")
    assert saved.keys() == state.keys() and all(torch.equal(state[name], saved[name]) for name in saved)


@pytest.mark.parametrize("way", ["lora", "qlora", "rslora"])
def test_adapters_train_and_the_base_does_not(ways, way):
    results = ways[way]
    trained = tensors(results["folder"] / "lora.pth")
    assert {name for name in trained if "lora_" not in name} == {"heads.head.weight", "heads.head.bias"}
    assert all(trained[name].any() for name in trained if "lora_B" in name)  # zero before training
    load_finetuned(results["folder"] / "lora.pth")  # compares the hash of the base with the checkpoint's


@pytest.mark.parametrize("way", WAYS)
def test_every_way_comes_back_from_its_file(ways, way, images):
    results = ways[way]
    again = finetune_lora.main(
        ["--eval-only", str(results["folder"] / "lora.pth"), "--data-dir", str(images), "--device", "cpu"]
    )
    assert again["val_accuracy"] == results["val_accuracy"]
    assert again["val_loss"] == pytest.approx(results["val_loss"], rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_merges_into_plain_torchvision(ways, way, tmp_path):
    adapter, merged = ways[way]["folder"] / "lora.pth", tmp_path / "merged.pth"
    deploy_lora.main(["merge", str(adapter), "--output", str(merged)])
    plain = build_backbone("vit_mini", 3, 16).eval()
    plain.load_state_dict(torch.load(merged, weights_only=True), strict=True)
    assert not any("lora" in type(module).__module__ for module in plain.modules())
    model, _ = load_finetuned(adapter)
    x = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model(x), plain(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(found.argmax(1), expected.argmax(1)) and expected.std() > 1e-3


def test_norms_may_train_beside_the_adapters(ways):
    results = ways["norms"]
    trained = {name for name in tensors(results["folder"] / "lora.pth") if "lora_" not in name and "head" not in name}
    assert {name.split(".")[-2] for name in trained} == {"ln_1", "ln_2", "ln"} and len(trained) == 2 * (2 * 6 + 1)


@pytest.mark.slow
@pytest.mark.parametrize("norms", ["", "--norms train", "--norms frozen"])
def test_a_resnet_goes_the_same_way(norms, images, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(build_backbone("resnet18", 5).state_dict(), tmp_path / "resnet.pth")
    argv = f"--checkpoint {tmp_path / 'resnet.pth'} --data-dir {images} --output-dir {tmp_path / 'out'} --device cpu"
    argv += f" --image-size 32 --epochs 1 --lora-rank 2 --batch-size 8 {norms}"
    results = finetune_lora.main(argv.split())
    assert ("norms: 19 BatchNorms follow the adapters (--norms follow)" in capsys.readouterr().out) is (norms == "")
    deploy_lora.main(["merge", str(tmp_path / "out/lora.pth"), "--output", str(tmp_path / "merged.pth")])
    plain = build_backbone("resnet18", 3).eval()
    plain.load_state_dict(torch.load(tmp_path / "merged.pth", weights_only=True), strict=True)
    model, info = load_finetuned(tmp_path / "out/lora.pth")
    assert info["arch"] == "resnet18" and info["image_size"] == 32 and results["total_parameters"] > 11e6
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=1e-3, atol=1e-4)
    # A frozen BatchNorm keeps the statistics of the checkpoint, if it does not follow the adapters.
    start = torch.load(tmp_path / "resnet.pth", weights_only=True)
    assert torch.equal(plain.layer1[0].bn1.running_var, start["layer1.0.bn1.running_var"]) is (
        norms == "--norms frozen"
    )
    assert torch.equal(plain.bn1.weight, start["bn1.weight"]) is (norms != "--norms train")
    kept = results["val_accuracy"], results["val_loss"]
    again = finetune_lora.main([*argv.split(), "--resume"])
    assert (again["val_accuracy"], again["val_loss"]) == kept


def test_norms_follow_on_a_cpu_unless_they_are_asked_to_elsewhere(start):
    feed = start().feed
    for norms, device, settled in (
        ("auto", "cpu", "auto"),
        ("auto", "cuda", "frozen"),
        ("follow", "cuda", "follow"),
        ("frozen", "cpu", "frozen"),
    ):
        feed.args.norms = norms
        finetune_lora.options.settle_norms(feed.args, torch.device(device))
        assert feed.args.norms == settled  # which config.yaml has, and a resumed run compares
        assert bool(list(feed.followed_batches())) is (settled != "frozen")


def test_a_network_without_batch_norm_goes_on_on_a_gpu(finetune, monkeypatch):
    """Where the norms of a ResNet would be frozen; to a ViT that is no other setting."""
    options = "--lora-rank 2 --epochs 2"
    with pytest.raises(runs.Stopped):
        finetune(options, output="stopped", after_epoch=lambda run: run.stop._note(2, None))
    monkeypatch.setattr(finetune_lora.options, "settle_norms", lambda args, _: setattr(args, "norms", "frozen"))
    assert finetune(f"{options} --resume", output="stopped")["epochs"] == 2


@pytest.mark.slow
def test_a_stopped_run_whose_norms_follow_goes_on_bit_for_bit(finetune, monkeypatch, tmp_path):
    torch.manual_seed(0)
    torch.save(build_backbone("resnet18", 5).state_dict(), tmp_path / "resnet.pth")
    options = f"--checkpoint {tmp_path / 'resnet.pth'} --image-size 32 --lora-rank 2 --epochs 2"
    whole = finetune(f"{options} --norms follow", output="whole")
    with pytest.raises(runs.Stopped):  # at the first step of the second epoch
        finetune(options, output="stopped", after_epoch=lambda run: run.stop._note(2, None))
    with monkeypatch.context() as on_a_gpu:  # where `auto` is another thing, and the message names what it was
        on_a_gpu.setattr(finetune_lora.options, "settle_norms", lambda args, _: setattr(args, "norms", "frozen"))
        with pytest.raises(InputError, match="norms was follow, is frozen"):
            finetune(f"{options} --resume", output="stopped")
    again = finetune(f"{options} --norms follow --resume", output="stopped")
    ours, theirs = (tensors(results["folder"] / "lora.pth") for results in (again, whole))
    assert ours.keys() == theirs.keys() and "layer1.0.bn1.running_var" in ours
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.slow
def test_the_last_evaluation_gives_norms_that_follow_their_statistics_itself(finetune, tmp_path):
    """A process that goes on with a finished run has evaluated nothing before."""
    torch.manual_seed(0)
    torch.save(build_backbone("resnet18", 5).state_dict(), tmp_path / "resnet.pth")
    options = f"--checkpoint {tmp_path / 'resnet.pth'} --image-size 32 --lora-rank 2 --norms follow --epochs 1"
    options += " --learning-rate 1e-2 --wise-ft 1"

    def forget(run):
        for conv in followers(run.model):
            conv.followed.norm.reset_running_stats()

    usual, forgetful = (finetune(options, output=name, after_epoch=f) for name, f in (("a", None), ("b", forget)))
    assert forgetful["temperature"] == usual["temperature"] and forgetful["val_loss"] == usual["val_loss"]


def test_targets_choose_the_layers(finetune):
    targets = "--target-modules mlp.0 mlp.3 --exclude-modules encoder_layer_5"
    results = finetune(f"--epochs 1 {targets} --rank-pattern encoder_layer_4=+3 --alpha-pattern mlp.0=2.5")
    layers = read_adapter_file(results["folder"] / "lora.pth")["layers"]
    assert len(layers) == 10 and all(".mlp." in name and "_5." not in name for name in layers)
    assert {name for name, layer in layers.items() if layer["r"] == 3} == {n for n in layers if "_4." in n}
    assert {name for name, layer in layers.items() if layer["lora_alpha"] == 2.5} == {n for n in layers if "mlp.0" in n}
    load_finetuned(results["folder"] / "lora.pth")


# ------------------------------------------------------------------------------------------------------ your own images


def save_odd_images(folder: Path) -> None:
    """Class folders whose images are grey, RGBA, palette, 16-bit, CMYK, bilevel and JPEG, of several sizes."""
    rng = np.random.RandomState(1)
    for name, level in (("cat", 200), ("dog", 50)):
        (folder / name).mkdir(parents=True)
        for i, mode in enumerate(["L", "RGBA", "P", "I;16", "CMYK", "1", "LA", "RGB"]):
            pixels = Image.fromarray((level + rng.randint(0, 50, (5 + i, 30 - i, 3))).astype(np.uint8))
            if mode == "I;16":
                image = Image.fromarray(np.asarray(pixels.convert("L")).astype(np.uint16) * 257)
            else:
                image = pixels.convert(mode)
            image.save(folder / name / (f"{i}.jpg" if mode in ("CMYK", "RGB") else f"{i}.png"))


@pytest.mark.slow
def test_your_own_images_of_any_kind(base, tmp_path):
    save_odd_images(tmp_path / "pets")
    argv = f"--checkpoint {base} --data-dir {tmp_path / 'pets'} --output-dir {tmp_path / 'out'} --epochs 2"
    results = finetune_lora.main([*argv.split(), "--batch-size", "8", "--workers", "1", "--device", "cpu"])
    assert list(results["accuracy_per_class"]) == ["cat", "dog"]
    assert load_finetuned(tmp_path / "out/lora.pth")[1]["class_names"] == ["cat", "dog"]


def test_a_class_without_validation_images_has_no_accuracy_of_its_own(base, images, tmp_path):
    for part in ("train", "val"):
        (tmp_path / "some" / part).mkdir(parents=True)
        for name in CLASSES if part == "train" else CLASSES[:2]:
            (tmp_path / "some" / part / name).symlink_to(images / part / name)
    argv = f"--checkpoint {base} --data-dir {tmp_path / 'some'} --output-dir {tmp_path / 'out'} --epochs 1"
    results = finetune_lora.main([*argv.split(), "--device", "cpu"])
    assert results["accuracy_per_class"]["striped"] is None  # results.json stays JSON: NaN is not
    assert json.loads((tmp_path / "out/results.json").read_text(), parse_constant=pytest.fail) == results


@pytest.mark.slow
def test_few_labels(finetune, capsys):
    results = finetune("--labels-per-class 2 --epochs 1 --batch-size 4")
    assert results["config"]["data"]["labels_per_class"] == 2
    state = read_checkpoint(results["folder"] / "last.pth")
    assert state["schedule"]["last_epoch"] == 2  # steps: 6 images in batches of 4
    with pytest.raises(InputError, match="--labels-per-class 8: class bright has only 7 training images"):
        finetune("--labels-per-class 8")


def test_eval_only_writes_nothing_and_wants_the_same_classes(finished, images, tmp_path):
    results, folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    argv = ["--eval-only", "--output-dir", str(folder), "--device", "cpu"]
    assert finetune_lora.main([*argv, "--data-dir", str(images)])["val_accuracy"] == results["val_accuracy"]
    # As the run's last line has it: the run's own configuration says where its images are.
    again = finetune_lora.main(["--config", str(folder / "config.yaml"), *argv])
    assert again["val_accuracy"] == results["val_accuracy"]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(InputError, match=r"knows the classes bright, dark, striped, the data has 0, 1.*--data-dir"):
        finetune_lora.main([*argv, "--dataset", "digits"])


# ------------------------------------------------------------------------------------------------- the guide's commands


GUIDE = [
    "",
    "--checkpoint ./checkpoints/moco_stage1/moco_stage1_epoch_100.pth --config ./configs/stage1.yaml --lora-rank 8 "
    "--epochs 10",
    "--use-qlora --lora-rank 4 --epochs 10",
    "--lora-rank 4 --use-qlora --learning-rate 5e-5",
    "--lora-rank 16 --lora-alpha 32 --learning-rate 5e-5 --epochs 20",
    "--use-qlora --lora-rank 4",
    "--lora-rank 4",
    "--learning-rate 1e-5",
    "--epochs 1",
]


@pytest.fixture
def fresh_clone(tmp_path, monkeypatch):
    """A folder with the shipped files in their places."""
    checkpoint = tmp_path / "checkpoints/moco_stage1/moco_stage1_epoch_100.pth"
    checkpoint.parent.mkdir(parents=True)
    torch.manual_seed(0)
    state = {f"encoder_q.{k}": v for k, v in build_backbone("vit_mini", 1).state_dict().items() if "heads" not in k}
    torch.save({"model": state, "arch": "vit_mini", "epoch": 100}, checkpoint)
    (tmp_path / "configs").mkdir()
    config = (ROOT / "configs/stage1.yaml").read_text()
    (tmp_path / "configs/stage1.yaml").write_text(config)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("toolkit.files.TOOLKIT", tmp_path)
    monkeypatch.setattr(finetune_lora, "DEFAULT_CHECKPOINT", checkpoint)
    monkeypatch.setattr(finetune_lora, "DEFAULT_CONFIG", tmp_path / "configs/stage1.yaml")
    return yaml.safe_load(config)["finetune"]


@pytest.mark.slow
@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("command", GUIDE)
def test_every_command_of_the_guide_runs(command, fresh_clone):
    results = finetune_lora.main(command.split())
    used, words = results["config"]["finetune"], command.split()
    for flag, key in (("--lora-rank", "lora_rank"), ("--epochs", "epochs"), ("--learning-rate", "learning_rate")):
        assert used[key] == float(words[words.index(flag) + 1] if flag in words else fresh_clone[key])
    assert used["use_qlora"] == ("--use-qlora" in words)
    assert results["config"]["model"]["checkpoint"] == "checkpoints/moco_stage1/moco_stage1_epoch_100.pth"
    assert results["epochs"] == used["epochs"] == len(metrics(Path("checkpoints/lora")))
    model, _ = load_finetuned("checkpoints/lora/lora.pth")
    assert LoRAManager(model).get_lora_info()["lora_parameters"] == count_parameters(model)["lora"] > 0


@pytest.mark.slow
def test_a_run_started_elsewhere_is_repeated_from_its_config(images, fresh_clone, tmp_path, monkeypatch):
    """What lies in the toolkit is stored relative to it, and found from any folder."""
    shutil.copytree(images, tmp_path / "mine")
    listed = [
        f"{path.relative_to(tmp_path / 'mine')},{path.parent.name}" for path in (tmp_path / "mine").rglob("*.png")
    ]
    (tmp_path / "mine/list.csv").write_text("\n".join(listed))
    (tmp_path / "else/where").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "else/where")
    common = "--checkpoint shipped --device cpu --epochs 1 --lora-rank 2"
    for sources in (f"--data-dir {tmp_path / 'mine'}", f"--data-list {tmp_path / 'mine/list.csv'}"):
        results = finetune_lora.main(f"{sources} --output-dir first {common}".split())
        again = finetune_lora.main(["--config", "first/config.yaml", "--output-dir", "second", "--device", "cpu"])
        assert again["val_loss"] == results["val_loss"]
        assert deploy_lora.main(["evaluate", "first/lora.pth"])["accuracy"] == results["val_accuracy"]


def test_adapters_that_do_nothing_are_named_once(finetune, monkeypatch, capsys):
    def build(args, num_classes):
        model, report = build_model(args, num_classes)
        model.spare = finetune_lora.LoRALinear(4, 4)
        return model, report

    build_model = finetune_lora.build_model
    monkeypatch.setattr(finetune_lora, "build_model", build)
    finetune()
    assert capsys.readouterr().out.count("no gradient reaches the adapters of spare: leave them out") == 1
