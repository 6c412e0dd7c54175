"""finetune_lora.py as a user runs it: its options, then what it printed, returned and left in the output folder."""

import argparse
import contextlib
import copy
import dataclasses
import functools
import io
import json
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from conftest import PICTURES, plotting
from PIL import Image

import finetune_lora
from finetune_lora import read_options
from lora_utils import read_adapter_file
from moco import pretrain
from tests.run_folders import assert_same_tensors, column, metrics, names_in, tensors
from toolkit import VERSION, InputError, config, files
from toolkit.answers.measures import share_interval
from toolkit.run import commands, options, run_state, verdict


def test_options_are_defaults_then_file_then_command_line(base, images, pairs, tmp_path):
    for file, typed, expected in (
        ("", "", {"lora_rank": 8, "lora_alpha": 16, "learning_rate": 1e-4, "epochs": 10}),
        ("model: {arch: vit_mini}", "", {"arch": "vit_mini", "lora_rank": 8}),
        # Alpha is twice the rank. Only what is typed has to go with a rank of 0
        ("", "--rank 16", {"lora_rank": 16, "lora_alpha": 32}),
        ("", "--lora-rank 0", {"lora_alpha": 16}),
        ("finetune: {lora_alpha: 5, target_modules: [mlp]}", "--lora-rank 0 --lora-dropout 0", {"lora_alpha": 5}),
        ("", "--lr 1e-3 --rank 4 --alpha 3 --qlora", {"learning_rate": 1e-3, "lora_alpha": 3, "use_qlora": True}),
        # A head over random weights starts at random, unless a probe is typed
        ("", "--checkpoint none --arch vit_mini --no-freeze-backbone", {"head_init": "random"}),
        ("", "--checkpoint none --arch vit_mini --no-freeze-backbone --head-init probe", {"head_init": "probe"}),
        # A folder has images of one's own, unless a set is named
        ("", "--data-dir {images}", {"dataset": "imagefolder"}),
        ("", "--data-dir {images} --dataset digits", {"dataset": "digits"}),
        ("data: {dataset: digits}", "--data-dir {images}", {"dataset": "digits"}),
        ("data: {augmentation: none}", "--task segmentation --data-dir {pairs}", {"augmentation": "none"}),
        # A list in parts is one list
        ("", "--target-modules fc --target-modules conv1 layer4", {"target_modules": ("fc", "conv1", "layer4")}),
        ("finetune: {lora_rank: 2, learning_rate: 1e-3}", "--lora-rank 4", {"lora_rank": 4, "learning_rate": 1e-3}),
    ):
        (tmp_path / "my.yaml").write_text(file)
        typed = f"--config {tmp_path / 'my.yaml'} --checkpoint {base} {typed.format(images=images, pairs=pairs)}"
        args, sources = read_options(typed.split())
        assert vars(args) == vars(args) | expected
    given = {name: source for name, source in sources.items() if source != "default"}  # where each came from
    typed = dict.fromkeys(("config", "checkpoint", "lora_rank"), "command line")
    assert given == typed | {"learning_rate": "config"}


def test_a_home_is_found_where_no_shell_puts_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.yaml").write_text("data: {data_list: ['~/list.csv']}\nmodel: {checkpoint: ~/my.yaml}")
    args, _ = read_options(["--config=~/my.yaml", "--output-dir=~/out"])
    deployed = commands.read_options(["embed", "~/lora.pth", "~/a.png", "--output=~/f.npy", "--checkpoint=~/b.pth"])
    found = [args.output_dir, args.checkpoint, *args.data_list, deployed.output, deployed.checkpoint, *deployed.images]
    assert found == list(map(tmp_path.joinpath, ("out", "my.yaml", "list.csv", "f.npy", "b.pth", "a.png")))


def test_python_fine_tunes_by_keywords_as_the_command_does():
    asked = {"data_dir": Path("my images"), "epochs": 20, "use_qlora": True, "freeze_backbone": False, "resume": None}
    asked |= {"mean": (-0.5, 0.25), "learning_rate": 1e-3}
    typed = "--epochs=20 --use-qlora --no-freeze-backbone --mean -0.5 0.25 --learning-rate=0.001"
    with mock.patch.object(finetune_lora, "main") as command:
        finetune_lora.finetune(after_epoch=print, **asked)
    command.assert_called_once_with(["--data-dir=my images", *typed.split()], print)
    with pytest.raises(InputError, match=r"--epoch=3: no such option \(did you mean --epochs\?\)"):
        finetune_lora.finetune(epoch=3)


def test_false_by_keyword_turns_a_switch_off_or_is_no_word_or_is_refused_by_name():
    for field in dataclasses.fields(options.FineTuneOptions):
        typed = list(config.as_typed(options.FineTuneOptions, {field.name: False, "unknown": False}))
        assert typed.pop() == "--no-unknown"
        if isinstance(field.default, bool):
            assert typed == [config.flag(f"no_{field.name}")]
        elif field.default is None:
            assert typed == [], field.name
        else:
            with pytest.raises(InputError, match=f"{config.flag(field.name)}: expected a value, got none"):
                read_options(typed)


def test_the_shipped_config_serves_the_shipped_checkpoint_alone(base, pairs):
    shipped = yaml.safe_load((files.TOOLKIT / "configs/stage1.yaml").read_text())["finetune"]
    for typed in ([], ["--checkpoint", "shipped"], ["--checkpoint", str(files.SHIPPED)]):
        args, sources = read_options(typed)
        assert args.checkpoint == files.SHIPPED
        assert args.weight_decay == shipped["weight_decay"] and sources["weight_decay"] == config.OF_SHIPPED
    args, _ = read_options(["--checkpoint=shipped", "--task=segmentation", f"--data-dir={pairs}"])
    assert args.augmentation == "crop"  # and not affine, which is for digits
    args, _ = read_options(["--checkpoint", str(base)])
    assert args.config is None and args.learning_rate == 1e-4
    assert read_options(["--rank", "4"])[0].lora_alpha == 8  # which the shipped file leaves open too


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_help_has_the_options_that_people_need_with_their_defaults(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    printed = {}
    for flag in ("--version", "--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            finetune_lora.main([flag])
        printed[flag] = capsys.readouterr().out
    assert printed["--version"] == f"{VERSION}\n"
    assert f'version: "{VERSION}"' in (files.TOOLKIT / "CITATION.cff").read_text()
    first = printed["--help"]
    flags = re.findall(r"^  --([a-z0-9-]+)", first, re.MULTILINE)
    assert flags == " ".join(finetune_lora.options.NEEDED).replace("_", "-").split()
    assert max(map(len, first.splitlines())) <= int(columns)
    told = " ".join(first.split())
    assert "(default: shipped)" in told and "(default: 0.0001)" in told and "(default: off)" in told
    assert "default: 2 r" in told and "--lora-rank, --rank" in told and "--no-" not in first.split("\n\n")[2]
    assert all(action.option_strings[0] in printed["--help-all"] for action in finetune_lora.make_parser()._actions)


def test_the_config_of_a_run_repeats_it_bit_for_bit(finetune, tmp_path, capsys):
    """It is named where the run begins, and so is the new one's."""
    options = "--epochs 1 --labels-per-class 3 --lora-rank 2 --label-smoothing 0.1 --seed 5"
    first = finetune(f"{options} --target-modules (?!.*_1).*mlp[.][03]")
    layers = read_adapter_file(first["folder"] / "lora.pth")["layers"]
    assert len(layers) == 2 and all(".mlp." in name and "_1." not in name for name in layers)
    config = first["folder"] / "config.yaml"
    assert yaml.safe_load(config.read_text())["settled"] == first["config"]
    capsys.readouterr()
    again = finetune_lora.main(f"--config {config} --output-dir {tmp_path / 'again'} --device cpu".split())
    said = f"settings: {config} and what was typed; all go into {tmp_path}/again/config.yaml"
    assert capsys.readouterr().out.splitlines()[0] == said
    assert again["config"] == first["config"] and again["val_loss"] == first["val_loss"]
    assert_same_tensors(first["folder"] / "lora.pth", tmp_path / "again/lora.pth")


@pytest.fixture(scope="module")
def finished(finetune_into, tmp_path_factory) -> tuple[dict, Path, str]:
    """A run of two epochs that others look at: its results, its folder and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, plotting(PICTURES):
        results = finetune_into(tmp_path_factory.mktemp("finished"), "--lora-rank 4 --warmup-epochs 1")
    return results, results.pop("folder"), printed.getvalue()


def test_a_run_leaves_these_files_and_says_what_was_recognised(finished):
    _, folder, printed = finished
    assert names_in(folder) == {
        *("config.yaml", "confusion_matrix.png", "labels_to_check.csv", "last.pth", "lora.pth"),
        *("metrics.csv", "mistakes.png", "report.html", "results.json", "results_answers.csv", "training_curves.png"),
    }
    for name in ("confusion_matrix.png", "mistakes.png", "training_curves.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200 and len(picture.convert("L").getcolors()) > 10
    assert files.read_checkpoint(folder / "last.pth")["good"] is None  # no second state where the present one is good
    told = "backbone: vit_mini for 16 pixels from a moco_v3 checkpoint, epoch 7;\n"
    assert f"{told}          all 30 backbone tensors loaded" in printed


def test_metrics_has_a_row_per_epoch_and_results_and_a_short_summary_say_what_came_out(finished):
    results, folder, printed = finished
    rows = metrics(folder)
    columns = "epoch train_loss val_loss val_accuracy val_balanced_accuracy val_macro_f1 learning_rate "
    assert list(rows[0]) == f"{columns} adapter_learning_rate seconds".split()
    assert column(rows, "epoch") == [1, 2]
    assert results["seconds"] == pytest.approx(sum(column(rows, "seconds")))
    # 21 images in batches of 8, so 6 steps: half of them warm up, and then it falls.
    assert column(rows, "learning_rate") == pytest.approx([1e-3 / 3, 1e-3])

    assert json.loads((folder / "results.json").read_text()) == results
    assert not {"accuracy", "accuracy_interval"} & results.keys()  # of the evaluation images: val_...
    best = max(rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert results["best_epoch"] == best["epoch"] and results["best_val_accuracy"] == best["val_accuracy"]
    assert results["val_accuracy"] == rows[-1]["val_accuracy"]
    assert (results["val_images"], results["eval_split"]) == (15, "held-out")
    right = torch.arange(15) < round(15 * results["val_accuracy"])
    assert results["val_accuracy_interval"] == pytest.approx(share_interval(right))
    assert results["adapter_bytes"] == (folder / "lora.pth").stat().st_size < results["backbone_bytes"] / 10
    assert results["trainable_parameters"] == sum(t.numel() for t in tensors(folder / "lora.pth").values())
    of_adapters = results["lora_parameters"]
    assert results["trainable_parameters"] - of_adapters == 3 * 192 + 3
    assert results["peak_memory_bytes"] > results["backbone_bytes"] == 4 * (results["total_parameters"] - of_adapters)
    assert list(results["accuracy_per_class"]) == ["bright", "dark", "striped"]
    table = printed.rpartition("\n\n")[2]
    assert len(table.splitlines()) <= 16 and "trained parameters" in table
    assert f"{results['val_accuracy']:.2%}" in table and f"{results['knn_accuracy_before']:.2%}" in table


def test_a_run_ends_with_the_command_that_answers_new_images_once(finetune, once, capsys, monkeypatch):
    for few in (25, 0):  # more labels come next, or nothing else does
        monkeypatch.setattr(verdict, "FEW_IMAGES", few)
        finetune("--epochs 1 --resume")
        last = capsys.readouterr().out.partition("results in")[2]
        assert last.count(" predict ") == 1 and " merge " not in last


def test_what_lies_in_the_toolkit_is_stored_relative_to_it_and_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = str(files.SHIPPED.relative_to(files.TOOLKIT))
    (tmp_path / "list.csv").touch()
    written = {"model": {"checkpoint": inside}, "data": {"data_list": ["list.csv"]}, "finetune": {}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    args, sources = read_options(["--config", "config.yaml"])
    assert args.checkpoint == files.SHIPPED and args.data_list == (Path("list.csv"),)
    assert options.stored_sections(args, sources) == written


# --------------------------------- toolkit/config.py: defaults, YAML and command line; types, choices and nearest names


def test_stage_1_reads_the_config_of_a_fine_tuning_and_passes_over_its_own_keys(tmp_path):
    def keys(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
        return {group.title: {action.dest for action in group._group_actions} for group in parser._action_groups}

    fine_tuning = keys(finetune_lora.make_parser())
    stage1 = keys(pretrain.make_parser())
    shared = {*config.SECTIONS} & fine_tuning.keys() & stage1.keys()
    assert shared == {"model", "data"} == options.OF_FINE_TUNING.keys()
    for section in shared:
        assert fine_tuning[section] - stage1[section] == options.OF_FINE_TUNING[section], section
    settings = options.stored_sections(read_options([])[0])
    settings["model"]["arch"] = "vit_mini"  # stage 1 cannot leave it to a checkpoint
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    args, _ = pretrain.read_options(["--config", str(tmp_path / "config.yaml")])
    assert args.arch == "vit_mini" and args.dataset == "digits" and args.checkpoint is None


def settled(norms: str = "follow") -> options.Plan:
    values = {"bands": ("4", "3", "2"), "scale": 10000.0, "mean": (0.5,), "std": (0.25,), "normalise": None}
    computing = {"device": torch.device("cpu"), "dtype": torch.float32, "precision": "fp32", "norms": norms}
    return options.Plan(**computing, image_values=values, normalization={})


def test_the_config_of_an_older_version_is_read_as_if_all_that_its_run_settled_had_been_typed(base, tmp_path):
    for typed in (
        "--lora-rank 16 --target-modules mlp.0 mlp.3 --adapt-last 2 --keep-best f1",
        "--checkpoint none --arch vit_mini --no-freeze-backbone --lora-rank 0 --learning-rate 3e-4 --norms auto",
    ):
        args, _ = read_options(["--checkpoint", str(base), *typed.split()])
        plan = settled(norms=args.norms if args.lora_rank == 0 else "follow")
        settings = plan.settings(args)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        again, _ = read_options(["--config", str(tmp_path / "config.yaml")])
        assert plan.settings(again) == settings
        found = plan.image_values | {"precision": plan.precision, "norms": plan.norms}
        assert again == dataclasses.replace(args, config=tmp_path / "config.yaml", **found)


def values_to_type(action: argparse.Action) -> list[str]:
    """Words for the command line that give an option this and that value, of which it may refuse some."""
    flags = action.option_strings
    if isinstance(action, argparse.BooleanOptionalAction):
        return [flags[0], flags[-1]]
    return [f"{flags[0]} {value}" for value in action.choices or ("auto", "16", "0.5", "{base}")]


RUNS = {
    "of all weights": "--data-dir {images} --checkpoint none --arch vit_mini --no-freeze-backbone --head-init probe",
    "masks": "--data-dir {pairs} --task segmentation",
    "a file": "--data-dir {images} --config {file} --learning-rate auto --precision fp32",
    "the shipped backbone": "--data-dir {images} --checkpoint shipped --epochs 3",
}


@pytest.mark.parametrize("run", RUNS)
def test_a_config_with_a_changed_option_is_its_command_with_that(run, base, images, pairs, tmp_path, monkeypatch):
    """For every option: no default that followed from others, and nothing that the run has settled, counts as asked."""
    monkeypatch.setattr(options, "make_parser", functools.cache(options.make_parser))  # which takes a third of the time
    parsed = functools.cache(yaml.safe_load)
    monkeypatch.setattr(yaml, "safe_load", lambda text: copy.deepcopy(parsed(text)))  # half of the rest
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    (tmp_path / "my.yaml").write_text("finetune: {lora_rank: 32, head_init: random, lora_init: null}")
    places = {"base": base, "images": images, "pairs": pairs, "file": tmp_path / "my.yaml"}
    command = [f"--checkpoint={base}", *RUNS[run].format(**places).split()]
    args, sources = read_options(command)
    run_state.write_config(path, options.stored_sections(args, sources), settled().settings(args))
    accepted = set()
    for action in finetune_lora.make_parser()._actions:
        for words in values_to_type(action):
            words = words.format(**places).split()
            try:
                typed, _ = read_options([*command, *words])
            except (InputError, SystemExit):  # a value that it does not take; a YAML file may be refused less
                continue
            again, _ = read_options(["--config", str(path), *words])
            assert dataclasses.replace(again, config=typed.config) == typed
            accepted.add(action.dest)
    assert len(accepted) > 30
