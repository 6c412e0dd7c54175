"""toolkit/config.py: defaults, YAML and command line; types, choices and nearest names."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

import finetune_lora
from moco import pretrain
from toolkit import InputError, config
from toolkit.run.options import OF_FINE_TUNING, YAML_SECTIONS, FineTuneOptions, Plan


def test_a_list_given_in_parts_is_one_list():
    command = "--data-list a.csv --data-list b.csv --target-modules fc --target-modules conv1 layer4"
    args, _ = config.parse_args(finetune_lora.make_parser(), command.split())
    assert args.data_list == [Path("a.csv"), Path("b.csv")] and args.target_modules == ["fc", "conv1", "layer4"]


def test_stage_1_reads_the_config_of_a_fine_tuning_and_passes_over_its_own_keys(tmp_path):
    def keys(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
        return {group.title: {action.dest for action in group._group_actions} for group in parser._action_groups}

    fine_tuning, stage1 = keys(finetune_lora.make_parser()), keys(pretrain.make_parser())
    shared = {*config.SECTIONS} & fine_tuning.keys() & stage1.keys()
    assert shared == {"model", "data"} == OF_FINE_TUNING.keys()
    for section in shared:
        assert fine_tuning[section] - stage1[section] == OF_FINE_TUNING[section], section
    settings = config.stored_sections(YAML_SECTIONS, finetune_lora.read_options([])[0])
    settings["model"]["arch"] = "vit_mini"  # stage 1 cannot leave it to a checkpoint
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    args, _ = pretrain.read_options(["--config", str(tmp_path / "config.yaml")])
    assert args.arch == "vit_mini" and args.dataset == "digits" and args.checkpoint is None


@pytest.mark.parametrize("script", [finetune_lora, pretrain])
def test_options_that_were_read_cannot_be_changed(script):
    args, _ = script.read_options([])
    assert dataclasses.replace(args, epochs=3).epochs == 3 != args.epochs
    for name in ("epochs", "learning_rate", "a_new_one"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(args, name, 1)
    args, _ = script.read_options(["--mean", "0.5", "--std", "0.25"])
    assert (args.mean, args.std) == ((0.5,), (0.25,))  # lists could be


def settled(**changes) -> Plan:
    values = {"bands": ("4", "3", "2"), "scale": 10000.0, "mean": (0.5,), "std": (0.25,), "normalise": None}
    rest = {"learning_rate": 3e-4, "precision": "fp32", "arithmetic": "int8", "norms": "follow"} | changes
    return Plan(device=torch.device("cpu"), dtype=torch.float32, image_values=values, normalization={}, **rest)


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "--lora-rank 16 --target-modules mlp.0 mlp.3 --adapt-last 2",
        "--learning-rate auto --norms auto --arithmetic float --wise-ft 0.5 --mixup 0.2 --keep-best f1",
        "--checkpoint none --arch vit_mini --no-freeze-backbone --lora-rank 0",
    ],
)
def test_the_settings_of_a_plan_are_a_config_that_gives_the_same_options(base, tmp_path, typed):
    """With what was settled in place of what was left open."""
    args, _ = finetune_lora.read_options(["--checkpoint", str(base), *typed.split()])
    arithmetic = "int8" if args.freeze_backbone else "float"
    plan = settled(norms=args.norms if args.lora_rank == 0 else "follow", arithmetic=arithmetic)
    settings = plan.settings(args)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    again, sources = finetune_lora.read_options(["--config", str(tmp_path / "config.yaml")])
    assert plan.settings(again) == settings
    names = ("learning_rate", "precision", "arithmetic", "norms")
    found = {name: getattr(plan, name) for name in names} | plan.image_values
    assert again == dataclasses.replace(args, config=tmp_path / "config.yaml", **found)
    in_file = {name for section in settings.values() for name in section}
    assert {name for name, source in sources.items() if source == "config"} == in_file


def problems_of(*typed: str) -> list[str]:
    with pytest.raises(InputError) as raised:
        finetune_lora.read_options([*typed, "--device", "cpu"])
    return str(raised.value).splitlines()


@pytest.mark.parametrize("section", ["model", "data", "finetune"])
@pytest.mark.parametrize("last", [False, True])
def test_an_old_configuration_may_have_removed_options_at_their_defaults(base, tmp_path, section, last):
    """Some have two, as 0 and 0.0."""
    old = {name: values[-1 if last else 0] for name, values in config.REMOVED.items()}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({section: old}))
    finetune_lora.read_options(["--checkpoint", str(base), "--config", str(tmp_path / "my.yaml")])


def test_another_value_of_a_removed_option_is_one_line(tmp_path):
    removed = {"cached_views": 8, "show_bands": [4], "head_learning_rate": 0.1, "cutmix": 1.0, "ema": 0.99}
    removed |= {"schedule": "constant", "base_dtype": "bf16", "crop_min": 0.5, "tensorboard": True}
    removed |= {"alpha_pattern": ["a=1"], "cache_images": "uint8", "channel_fit": "mean"}
    replaced = {
        "from_scratch": "write --checkpoint none, with an --arch",
        "use_rslora": "write --lora-alpha with as much times the square root of the rank",
        "train_norms": "write --norms train",
        "exclude_modules": "write --target-modules with a regular expression, as '(?!layer4|fc).*'",
        "rank_pattern": "give `add_lora_to_model` its rank_pattern",
        "unknown": "write 0 or 1 in the list in place of -1",
    }
    old = {"finetune": removed | dict.fromkeys(replaced, True)}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(old, sort_keys=False))
    found = problems_of("--config", str(tmp_path / "my.yaml"))
    for (name, value), line in zip(removed.items(), found[:12], strict=True):
        assert line.startswith(f"finetune.{name} was removed, and {value} cannot be had any more; delete the line")
    for (name, remedy), line in zip(replaced.items(), found[12:], strict=True):
        assert line.startswith(f"finetune.{name}: replaced; delete the line, and {remedy}")


def test_a_removed_option_that_is_typed_is_one_line():
    removed = ["--ema", "--cutmix=1", "--no-tensorboard", "--no-use-rslora"]
    found = problems_of(*removed, "--from-scratch", "--use-rslora", "--eval-only", "lora.pth")
    assert found[:4] == [f"{typed}: the option was removed; leave it out" for typed in removed]
    assert found[4:] == [
        "--from-scratch: replaced; write --checkpoint none, with an --arch",
        "--use-rslora: replaced; write --lora-alpha with as much times the square root of the rank",
        "--eval-only: replaced; use deploy_lora.py evaluate",
    ]


def test_no_option_is_among_the_removed_ones_of_its_script():
    """Stage 1 has still the smallest share of a crop."""
    fields = {field.name for field in dataclasses.fields(FineTuneOptions)}
    assert not fields & config.REMOVED.keys() and not fields & config.REPLACED.keys()
    assert pretrain.read_options([])[0].crop_min == 0.2
