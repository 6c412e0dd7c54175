"""moco/training.py: options, configuration, randomness, precision, schedule, k-NN accuracy."""

import argparse
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moco import InputError, training


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="script", description="What it does.")
    parser.add_argument_group("run").add_argument("--config", type=Path)
    model = parser.add_argument_group("model")
    model.add_argument("--arch", choices=("resnet18", "vit_mini"), default="vit_mini")
    finetune = parser.add_argument_group("finetune")
    finetune.add_argument("--epochs", type=training.positive_int, default=10)
    finetune.add_argument("--learning-rate", type=training.positive_float, default=1e-4)
    finetune.add_argument("--target-modules", nargs="+")
    finetune.add_argument("--freeze-backbone", action=argparse.BooleanOptionalAction, default=True)
    finetune.add_argument("--use-qlora", action="store_true")
    return parser


@pytest.fixture
def parse(tmp_path):
    def parse(command_line: str = "", yaml: str | None = None, **options):
        argv = command_line.split()
        if yaml is not None:
            path = tmp_path / "config.yaml"
            path.write_text(yaml)
            argv += ["--config", str(path)]
        return training.parse_args(make_parser(), argv, **options)

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


def test_switches_and_lists_work_in_the_file(parse):
    args, sources = parse("", "finetune: {freeze_backbone: false, use_qlora: true, target_modules: [q, k]}")
    assert args.freeze_backbone is False and args.use_qlora is True and args.target_modules == ["q", "k"]
    assert sources["freeze_backbone"] == "config"


def test_null_is_allowed_where_it_is_the_default(parse):
    assert parse("", "finetune: {target_modules: null}")[0].target_modules is None
    assert problems(parse, "", "finetune: {epochs: null}") == ["finetune.epochs: expected a value, got none"]


def test_the_other_scripts_section_is_passed_over(parse):
    assert parse("", "moco:\n  anything: 1\nmodel:\nfinetune: {epochs: 2}")[0].epochs == 2
    assert parse("", "model: {checkpoint: moco.pth, arch: resnet18}")[0].arch == "resnet18"
    assert parse("", "")[0].epochs == 10  # an empty file is a file without settings


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
        training.parse_args(make_parser(), ["--help"])
    assert exit_.value.code == 0
    assert "{resnet18,vit_mini}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("convert", "good", "bad"),
    [
        (training.positive_int, {"1": 1}, ["0", "-1", "1.0", "", "1" * 5000]),
        (training.non_negative_int, {"0": 0}, ["-1", "x"]),
        (training.positive_float, {"1e-3": 1e-3}, ["0", "inf", "nan", "-1"]),
        (training.non_negative_float, {"0": 0.0}, ["-1e-9", "inf"]),
        (training.fraction, {"0": 0.0, "0.5": 0.5}, ["1", "-0.1"]),
        (training.boolean, {"true": True, "False": False}, ["1", "yes"]),
    ],
)
def test_option_types(convert, good, bad):
    assert {text: convert(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            convert(text)


def test_run_script_ends_bad_input_with_one_message_and_exit_code_2(capsys):
    def main():
        raise InputError("no such thing")

    with pytest.raises(SystemExit) as exit_:
        training.run_script(main)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: no such thing\n"


def test_run_script_ends_an_interruption_with_exit_code_130():
    code = "from moco.training import run_script\ndef main(): raise KeyboardInterrupt\nrun_script(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def draw() -> tuple:
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_seeding_repeats_every_generator():
    training.seed_everything(3)
    first = draw()
    training.seed_everything(3)
    assert draw() == first


def test_rng_state_survives_a_file_read_with_weights_only(tmp_path):
    training.seed_everything(0)
    draw()  # leaves a cached Gaussian in both random and NumPy
    torch.save(training.rng_state(), tmp_path / "rng.pth")
    expected = draw()
    training.restore_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True))
    assert draw() == expected


def test_device_and_precision():
    cpu = training.select_device("cpu")
    assert training.select_device("auto").type in ("cpu", "cuda", "mps")
    assert training.select_precision("auto", cpu) == training.select_precision("fp32", cpu) == torch.float32
    assert training.select_precision("bf16", cpu) == torch.bfloat16
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        training.select_precision("fp16", cpu)
    with pytest.raises(InputError, match="'abacus' is not available"):
        training.select_device("abacus")


def test_autocast_computes_in_its_dtype():
    cpu, layer, x = torch.device("cpu"), nn.Linear(2, 2), torch.ones(1, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with training.autocast(cpu, dtype):
            assert layer(x).dtype == dtype


def learning_rates(**options) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = training.lr_schedule(optimizer, 10, **options)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_schedules():
    cosine = learning_rates(warmup_steps=2)
    assert cosine[:3] == [1.0, 2.0, 2.0]
    assert cosine[6] == pytest.approx(1.0)  # halfway between warm-up and end
    assert cosine[2:] == sorted(cosine[2:], reverse=True) and cosine[-1] > 0
    assert learning_rates(schedule="constant") == [2.0] * 10
    assert learning_rates(schedule="step") == pytest.approx([2.0] * 6 + [0.2] * 2 + [0.02] * 2)


def test_peak_memory_grows_with_what_is_allocated():
    before = training.peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(before // 4 + 64 * 2**20 // 4)  # more than the process ever held
    assert training.peak_memory_bytes(torch.device("cpu")) >= before + 32 * 2**20
    del block


def test_extract_features_runs_in_eval_mode_and_restores_every_modules_mode():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9))
    model[0].eval()  # a frozen layer within a training model
    images = torch.randn(5, 3)
    batches = [(images[:3], torch.tensor([0, 1, 2])), (images[3:], torch.tensor([3, 4]))]
    features, labels = training.extract_features(model, batches, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(features, images / (1 + 1e-5) ** 0.5)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert model.training and model[1].training and not model[0].training


def test_knn_accuracy_agrees_with_a_vote_counted_by_hand():
    generator = torch.Generator().manual_seed(0)
    bank, labels = torch.randn(40, 5, generator=generator), torch.arange(40) % 4
    queries, targets = torch.randn(30, 5, generator=generator), torch.arange(30) % 4
    correct = 0
    for query, target in zip(queries, targets, strict=True):
        similarity = F.cosine_similarity(bank, query[None])
        votes = [0.0] * 4
        for i in similarity.argsort(descending=True)[:7]:
            votes[labels[i]] += float(torch.exp(similarity[i] / 0.1))
        correct += votes.index(max(votes)) == target
    assert training.knn_accuracy(bank, labels, queries, targets, k=7, temperature=0.1) == correct / 30
    assert training.knn_accuracy(bank, labels, bank * 3, labels, k=1) == 1.0
    assert 0 <= training.knn_accuracy(bank, labels, queries, targets, k=1000) <= 1
