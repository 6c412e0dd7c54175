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
from toolkit.run.options import OF_FINE_TUNING, YAML_SECTIONS, Plan


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


def test_what_an_old_configuration_leaves_empty_does_not_matter(tmp_path):
    """The config.yaml of a run has all options, of which a later version may lack some."""
    (tmp_path / "config.yaml").write_text("finetune: {rank_pattern: null, epochs: 3}")
    args, _ = finetune_lora.read_options(["--config", str(tmp_path / "config.yaml")])
    assert args.epochs == 3
    (tmp_path / "config.yaml").write_text("finetune: {rank_pattern: 4}")
    with pytest.raises(InputError, match=r"finetune\.rank_pattern: no such key in .*; delete the line"):
        finetune_lora.read_options(["--config", str(tmp_path / "config.yaml")])


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
        "--learning-rate auto --norms auto --arithmetic float --wise-ft 0.5 --keep-best f1",
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
