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
from toolkit.run.options import OF_FINE_TUNING, FineTuneOptions
from toolkit.run.plan import YAML_SECTIONS, Plan


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="script", description="What it does.")
    parser.add_argument_group("run").add_argument("--config", type=Path)
    model = parser.add_argument_group("model")
    model.add_argument("--arch", choices=("resnet18", "vit_mini"), default="vit_mini")
    finetune = parser.add_argument_group("finetune")
    finetune.add_argument("--epochs", type=config.positive_int, default=10)
    finetune.add_argument("--learning-rate", type=config.positive_float, default=1e-4)
    finetune.add_argument("--target-modules", nargs="+")
    finetune.add_argument("--freeze-backbone", action=argparse.BooleanOptionalAction, default=True)
    finetune.add_argument("--use-qlora", action="store_true")
    return parser


@pytest.fixture
def parse(tmp_path):
    def parse(command_line: str = "", yaml: str | None = None, **how):
        argv = command_line.split()
        if yaml is not None:
            path = tmp_path / "config.yaml"
            path.write_text(yaml)
            argv += ["--config", str(path)]
        return config.parse_args(make_parser(), argv, **how)

    return parse


def problems(parse, *args) -> list[str]:
    with pytest.raises(InputError) as error:
        parse(*args)
    return str(error.value).splitlines()


def test_defaults(parse):
    args, sources = parse()
    assert args.config is None
    assert (args.arch, args.epochs, args.learning_rate, args.target_modules) == ("vit_mini", 10, 1e-4, None)
    assert args.freeze_backbone is True and args.use_qlora is False
    assert set(sources.values()) == {"default"}


def test_the_command_line_overrides_the_file_which_overrides_the_defaults(parse):
    args, sources = parse("--epochs 3", "finetune:\n  epochs: 5\n  learning_rate: 1e-3\n")
    assert args.epochs == 3 and sources["epochs"] == "command line"
    assert args.learning_rate == 1e-3 and sources["learning_rate"] == "config"
    assert sources["arch"] == "default" and sources["config"] == "command line"


def test_switches_and_lists_work_on_the_command_line(parse):
    args, _ = parse("--no-freeze-backbone --use-qlora --target-modules q k")
    assert args.freeze_backbone is False and args.use_qlora is True and args.target_modules == ["q", "k"]


def test_a_list_given_in_parts_is_one_list():
    command = "--data-list a.csv --data-list b.csv --exclude-modules fc --exclude-modules conv1 layer4"
    args, _ = config.parse_args(finetune_lora.make_parser(), command.split())
    assert args.data_list == [Path("a.csv"), Path("b.csv")] and args.exclude_modules == ["fc", "conv1", "layer4"]


def test_switches_and_lists_work_in_the_file(parse):
    args, sources = parse("", "finetune: {freeze_backbone: false, use_qlora: true, target_modules: [q, k]}")
    assert args.freeze_backbone is False and args.use_qlora is True and args.target_modules == ["q", "k"]
    assert sources["freeze_backbone"] == "config"


def test_null_is_allowed_where_it_is_the_default(parse):
    assert parse("", "finetune: {target_modules: null}")[0].target_modules is None
    assert problems(parse, "", "finetune: {epochs: null}") == ["finetune.epochs: expected a value, got none"]


def test_the_other_scripts_section_is_passed_over(parse):
    assert parse("", "moco:\n  anything: 1\nmodel:\nfinetune: {epochs: 2}")[0].epochs == 2
    ignored = {"model": {"checkpoint"}}
    assert parse("", "model: {checkpoint: moco.pth, arch: resnet18}", ignored=ignored)[0].arch == "resnet18"
    assert parse("", "")[0].epochs == 10  # an empty file is a file without settings


def test_stage_1_passes_over_the_keys_that_only_fine_tuning_has():
    def keys(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
        return {group.title: {action.dest for action in group._group_actions} for group in parser._action_groups}

    fine_tuning, stage1 = keys(finetune_lora.make_parser()), keys(pretrain.make_parser())
    shared = {*config.SECTIONS} & fine_tuning.keys() & stage1.keys()
    assert shared == {"model", "data"} == OF_FINE_TUNING.keys()
    for section in shared:
        assert fine_tuning[section] - stage1[section] == OF_FINE_TUNING[section], section


def test_stage_1_reads_the_config_of_a_fine_tuning(tmp_path):
    settings = config.stored_sections(YAML_SECTIONS, finetune_lora.read_options([])[0])
    settings["model"]["arch"] = "vit_mini"  # stage 1 cannot leave it to a checkpoint
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    args, _ = pretrain.read_options(["--config", str(tmp_path / "config.yaml")])
    assert args.arch == "vit_mini" and args.dataset == "digits" and args.checkpoint is None


def test_the_default_config_is_used_unless_another_is_named_or_it_does_not_apply(parse, tmp_path):
    default = tmp_path / "default.yaml"
    default.write_text("finetune: {epochs: 7}")
    args, sources = parse(default_config=default)
    assert args.epochs == 7 and args.config == default and sources["config"] == "default"
    assert parse("", "finetune: {epochs: 2}", default_config=default)[0].epochs == 2
    seen = []
    args, _ = parse("--arch resnet18", default_config=default, default_config_applies=seen.append)
    assert args.epochs == 10 and args.config is None and seen == [{"arch": "resnet18"}]


def test_all_problems_come_in_one_message(parse):
    found = problems(
        parse,
        "--epoch 5 --learning-rate fast --arch vit_mimi",
        "finetune: {learning_rate: [1], epochs: true, frze_backbone: no, use_qlora: 1}\nmodle: {}\nmodel: 3",
    )
    text = "\n".join(found)
    assert len(found) == 9
    for expected in (
        "--epoch: no such option (did you mean --epochs?)",
        "--learning-rate: expected a number above 0, got 'fast'",
        "--arch: 'vit_mimi' is none of resnet18, vit_mini (did you mean vit_mini?)",
        "finetune.learning_rate: expected a value, got [1]",
        "finetune.epochs: expected a value, got true",
        "finetune.frze_backbone: no such key",
        "(did you mean freeze_backbone?)",
        "finetune.use_qlora: expected true or false, got 1",
        "modle: no such section",
        "model: expected a section",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("command_line", "problem"),
    [
        ("--epochs", "--epochs: expected a value, got none"),
        ("--epochs 2.5", "--epochs: expected a whole number above 0, got '2.5'"),
        ("--epochs 0", "--epochs: expected a whole number above 0, got '0'"),
        ("--learning-rate nan", "--learning-rate: expected a number above 0, got 'nan'"),
        ("--target-modules", "--target-modules: expected at least one value"),
        ("--modules mlp", "--modules: no such option (did you mean --target-modules?); see --help"),
        ("--lear 1", "--lear: no such option (did you mean --learning-rate?); see --help"),
        ("5", "5: unexpected argument; see --help"),
        ("--use-qlora=yes", "--use-qlora=yes: write --use-qlora alone; it takes no value"),
    ],
)
def test_bad_command_lines(parse, command_line, problem):
    assert problems(parse, command_line) == [problem]


@pytest.mark.parametrize("yaml", ["a: [b", "- a list", "just text"])
def test_a_file_that_is_not_a_mapping(parse, yaml):
    (problem,) = problems(parse, "", yaml)
    assert problem.startswith("--config") and "config.yaml" in problem


def test_a_missing_file(parse):
    assert problems(parse, "--config absent.yaml") == [
        "--config absent.yaml: cannot read it: No such file or directory"
    ]


def test_help_shows_the_choices(capsys):
    with pytest.raises(SystemExit) as exit_:
        config.parse_args(make_parser(), ["--help"])
    assert exit_.value.code == 0
    assert "{resnet18,vit_mini}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("convert", "good", "bad"),
    [
        (config.positive_int, {"1": 1}, ["0", "-1", "1.0", "", "1" * 5000]),
        (config.non_negative_int, {"0": 0}, ["-1", "x"]),
        (config.positive_float, {"1e-3": 1e-3}, ["0", "inf", "nan", "-1"]),
        (config.non_negative_float, {"0": 0.0}, ["-1e-9", "inf"]),
        (config.fraction, {"0": 0.0, "0.5": 0.5}, ["1", "-0.1"]),
        (config.boolean, {"true": True, "False": False}, ["1", "yes"]),
    ],
)
def test_option_types(convert, good, bad):
    assert {text: convert(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            convert(text)


# ----------------------------------------------------------------------------------------- options that nobody changes


@pytest.mark.parametrize("script", [finetune_lora, pretrain])
def test_options_that_were_read_cannot_be_changed(script):
    args, _ = script.read_options([])
    assert dataclasses.replace(args, epochs=3).epochs == 3 != args.epochs
    for name in ("epochs", "learning_rate", "a_new_one"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(args, name, 1)
    args, _ = script.read_options(["--mean", "0.5", "--std", "0.25"])
    assert (args.mean, args.std) == ((0.5,), (0.25,))  # lists could be


def settled(args: FineTuneOptions, **changes) -> Plan:
    values = {"bands": ("4", "3", "2"), "scale": 10000.0, "mean": (0.5,), "std": (0.25,), "normalise": None}
    plan = Plan(
        device=torch.device("cpu"),
        dtype=torch.float32,
        image_values=values,
        normalization={},
        learning_rate=3e-4,
        arithmetic="int8",
        norms="follow",
    )
    return dataclasses.replace(plan, **changes)


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "--lora-rank 16 --target-modules mlp.0 mlp.3 --rank-pattern encoder_layer_4=3 --adapt-last 2",
        "--learning-rate auto --norms auto --arithmetic float --wise-ft 0.5 --mixup 0.2 --keep-best f1",
        "--checkpoint none --arch vit_mini --no-freeze-backbone --lora-rank 0",
    ],
)
def test_the_settings_of_a_plan_are_a_config_that_gives_the_same_options(base, tmp_path, typed):
    """With what was settled in place of what was left open."""
    args, _ = finetune_lora.read_options(["--checkpoint", str(base), *typed.split()])
    plan = settled(args, norms=args.norms if args.lora_rank == 0 else "follow")
    plan = plan if args.freeze_backbone else dataclasses.replace(plan, arithmetic="float")
    settings = plan.settings(args)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    again, sources = finetune_lora.read_options(["--config", str(tmp_path / "config.yaml")])
    assert plan.settings(again) == settings
    expected = dataclasses.replace(
        args,
        config=tmp_path / "config.yaml",
        learning_rate=plan.learning_rate,
        arithmetic=plan.arithmetic,
        norms=plan.norms,
        **plan.image_values,
    )
    assert again == expected
    in_file = {name for section in settings.values() for name in section}
    assert {name for name, source in sources.items() if source == "config"} == in_file


# --------------------------------------------------------------------------------------- configurations of old versions

REMOVED_AT = [(name, value) for name, values in config.REMOVED.items() for value in values]


@pytest.mark.parametrize("section", ["model", "data", "finetune"])
@pytest.mark.parametrize(("name", "value"), REMOVED_AT, ids=str)
def test_an_old_configuration_may_have_a_removed_option_at_its_default(parse, section, name, value):
    args, _ = parse("", yaml.safe_dump({section: {name: value}, "finetune": {"epochs": 2} | {name: value}}))
    assert args.epochs == 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("cached_views: 8", "finetune.cached_views was removed, and 8 cannot be had any more; delete the line"),
        ("show_bands: [4]", "finetune.show_bands was removed, and [4] cannot be had any more; delete the line"),
        ("head_learning_rate: 0.1", "finetune.head_learning_rate was removed, and 0.1 cannot be had any more; delete"),
        ("cutmix: 1.0", "finetune.cutmix was removed, and 1.0 cannot be had any more; delete the line"),
        ("ema: 0.99", "finetune.ema was removed, and 0.99 cannot be had any more; delete the line"),
        ("schedule: constant", "finetune.schedule was removed, and constant cannot be had any more; delete the line"),
        ("base_dtype: bf16", "finetune.base_dtype was removed, and bf16 cannot be had any more; delete the line"),
        ("crop_min: 0.5", "finetune.crop_min was removed, and 0.5 cannot be had any more; delete the line"),
        ("tensorboard: true", "finetune.tensorboard was removed, and True cannot be had any more; delete the line"),
        ("alpha_pattern: [a=1]", "finetune.alpha_pattern was removed, and ['a=1'] cannot be had any more; delete"),
        ("cache_images: uint8", "finetune.cache_images was removed, and uint8 cannot be had any more; delete the line"),
        ("channel_fit: mean", "finetune.channel_fit was removed, and mean cannot be had any more; delete the line"),
        ("from_scratch: true", "finetune.from_scratch: replaced; delete the line, and write --checkpoint none, with"),
        ("use_rslora: true", "finetune.use_rslora: replaced; delete the line, and write --lora-alpha with as much"),
        ("train_norms: true", "finetune.train_norms: replaced; delete the line, and write --norms train"),
    ],
)
def test_another_value_of_a_removed_option_is_one_line(parse, line, problem):
    [found] = problems(parse, "", f"finetune: {{{line}}}")
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ("--ema 0.9", "--ema: the option was removed; leave it out"),
        ("--cutmix=1", "--cutmix=1: the option was removed; leave it out"),
        ("--no-tensorboard", "--no-tensorboard: the option was removed; leave it out"),
        ("--no-use-rslora", "--no-use-rslora: the option was removed; leave it out"),
        ("--from-scratch", "--from-scratch: replaced; write --checkpoint none, with an --arch"),
        (
            "--use-rslora",
            "--use-rslora: replaced; write --lora-alpha with as much times the square root of the rank",
        ),
        ("--eval-only lora.pth", "--eval-only: replaced; use deploy_lora.py evaluate"),
    ],
)
def test_a_removed_option_that_is_typed_is_one_line(parse, typed, problem):
    [found] = problems(parse, typed)
    assert found.startswith(problem)


def test_no_option_is_among_the_removed_ones_of_its_script():
    """Stage 1 has still a schedule and the smallest share of a crop."""
    fields = {field.name for field in dataclasses.fields(FineTuneOptions)}
    assert not fields & config.REMOVED.keys() and not fields & config.REPLACED.keys()
    (args, _), (again, _) = (pretrain.read_options(typed) for typed in ([], ["--schedule", "constant"]))
    assert (args.schedule, again.schedule, args.crop_min) == ("cosine", "constant", 0.2)
