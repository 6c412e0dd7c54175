"""toolkit/config.py: defaults, YAML and command line; types, choices and nearest names."""

import argparse
from pathlib import Path

import pytest

import finetune_lora
from moco import pretrain
from toolkit import InputError, config
from toolkit.run import options


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
    both = "model: {checkpoint: moco.pth, arch: resnet18}"
    assert parse("", both, ignored={"model": ["checkpoint"]})[0].arch == "resnet18"
    assert parse("", "")[0].epochs == 10  # an empty file is a file without settings


def test_stage_1_passes_over_the_keys_that_only_fine_tuning_has():
    def keys(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
        return {group.title: {action.dest for action in group._group_actions} for group in parser._action_groups}

    fine_tuning, stage1 = keys(finetune_lora.make_parser()), keys(pretrain.make_parser())
    for section in {*config.SECTIONS} & fine_tuning.keys() & stage1.keys():
        assert fine_tuning[section] - stage1[section] <= {*options.OF_FINE_TUNING[section]}, section


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
