"""The learning rates of a run: the default, the schedule, and the search for one."""

import math
from functools import partial
from unittest import mock

import pytest
import torch
import yaml

import finetune_lora
from tests.run_folders import assert_same_tensors, column, names_in, rows_of
from toolkit import InputError
from toolkit.answers.probe import HeadTemperature
from toolkit.answers.tasks import Classification, Regression
from toolkit.run import optim, output_folder, reports, search
from toolkit.run.guard import Guard, Keep
from toolkit.run.options import FineTuneOptions, read_options
from toolkit.run.search import RATES, Trial, choose

USUAL = 1e-4
VARIANCE = Classification(["cat", "dog"]).variance


def test_a_short_run_trains_at_a_lower_rate():
    """From 80 steps on it is the one that was typed; below it grows with the steps, and hardly with what was typed."""
    divisor = partial(optim.run_divisor, FineTuneOptions())
    assert divisor(1e-2, 80) == divisor(1e-4, 1000) == 1
    assert divisor(1e-4, 20) == 32 and divisor(1e-4, 5) == 1024
    rates = [rate / divisor(rate, 5) for rate in (1e-4, 1e-3, 1e-2)]
    assert rates == pytest.approx([9.77e-8, 9.77e-8, 9.77e-8], rel=1e-2)
    steps = [1e-2 / divisor(1e-2, steps) for steps in (10, 40, 70, 78)]
    assert steps == sorted(steps) and steps[-1] == pytest.approx(1.54e-3, rel=1e-2)
    for epochs, an_epoch, in_all, steps in ((1, 50, 500, 50), (1, 1, 10, 5), (1, 3, 300, 20), (1, 50, 50, 25)):
        assert optim.warmup_steps(epochs, an_epoch, in_all) == steps
    assert FineTuneOptions().warmup_epochs == 1  # any other number is as typed
    assert optim.warmup_steps(8, 50, 500) == 400 and optim.warmup_steps(0, 1, 10) == 0
    # Of adapters of whole images that start at the gradient alone.
    others = {"head_init": "random", "lora_init": "random", "freeze_backbone": False, "task": "segmentation"}
    for name, value in others.items():
        assert optim.run_divisor(FineTuneOptions(**{name: value}), rate=1e-2, steps=2) == 1


@pytest.mark.parametrize(("options", "remedy"), [("", "--lora-init random"), ("--lora-rank 0", "--head-init random")])
def test_the_way_to_a_rate_as_it_is_typed_goes_with_the_other_options(start, monkeypatch, options, remedy):
    """Without adapters there is nothing that --lora-init could start: it is refused."""
    monkeypatch.setattr(optim, "STEPS_TO_TRAIN", 80)
    run = start(f"{options} --epochs 5")
    assert run.rate == pytest.approx(1e-2 / optim.run_divisor(FineTuneOptions(), 1e-2, 5 * run.steps_per_epoch))
    told = reports.describe_rates(run)
    assert f"so few steps cannot correct what a high rate does (with {remedy} it stays as typed)" in told
    assert start(f"{options} {remedy}").rate == 1e-2


@pytest.mark.parametrize("norms", ["follow", "frozen"])
def test_adapters_of_a_resnet_learn_twice_as_fast_from_a_head_as_soft(norms, start, saved, narrow):
    runs = [start(f"--checkpoint {saved(narrow)} --image-size 32 --norms {norms} --labels-per-class 2"), start()]
    assert [run.adapter_lr_factor for run in runs] == [48, 24]
    for run in runs:
        run.head_temperature = HeadTemperature(per_rate=100.0)
        assert run.temperature == pytest.approx(100 * run.rate * 24)


def test_of_rates_that_chance_may_have_ordered_the_nearest_to_the_usual_one_is_taken():
    accuracies = [0.5, 0.88, 0.85, 0.88, 0.9, 0.89, 0.0]
    trials = [Trial(rate, accuracy, 0.0) for rate, accuracy in zip(RATES, accuracies, strict=True)]
    for images, expected in ((20, 1e-4), (100, 3e-4), (10_000, 1e-3)):
        assert choose(trials, partial(VARIANCE, images=images), USUAL) == expected
    alike = [Trial(rate, 1.0, 0.0) for rate in RATES]
    for options, expected in (("", 1e-4), ("--lora-rank 0 --no-freeze-backbone", 1e-3), ("--lora-rank 0", 1e-4)):
        usual = search.usual_rate(read_options(options.split())[0])
        assert choose(alike, partial(VARIANCE, images=5), usual) == expected


def test_a_rate_at_which_training_collapses_is_not_taken_for_numbers_that_no_rate_learns():
    """Their R2 is below 0, which is what a collapsed trial is given."""
    variance = partial(Regression(["age"], mean=torch.zeros(1), std=torch.ones(1)).variance, images=100)
    trials = [Trial(rate, -0.1, 1.1) if rate < 1e-4 else Trial(rate, 0.0, math.inf) for rate in RATES]
    assert choose(trials, variance, USUAL) == 3e-5
    assert choose([Trial(rate, 0.0, math.inf) for rate in RATES], variance, USUAL) == 1e-4


def test_where_no_trial_has_a_score_the_lowest_loss_chooses(capsys):
    """As of numbers that do not differ on the validation part; the trials are paid for."""
    trials = [Trial(rate, math.nan, abs(math.log(rate / 1e-3))) for rate in RATES]
    assert choose(trials, partial(VARIANCE, images=100), USUAL) == 1e-3
    assert "the score is not defined on the validation part" in capsys.readouterr().out
    trials[0] = Trial(RATES[0], 0.5, 9.0)
    assert choose(trials, partial(VARIANCE, images=100), USUAL) == RATES[0]


def test_a_short_run_searches_among_the_rates_that_it_can_train_at(monkeypatch):
    """Four steps lower all the others to nearly the same."""
    monkeypatch.setattr(search, "RATES", RATES)
    peaks = [rate / optim.run_divisor(FineTuneOptions(), rate, steps=4) for rate in RATES]
    distinct = search.rates_that_differ(dict(zip(RATES, peaks, strict=True)).get)
    assert distinct == [1e-5, 3e-5, 1e-4]
    assert search.rates_that_differ(lambda rate: rate**0.4) == list(RATES)  # at least 3^0.4 = 1.55 apart
    assert search.rates_that_differ(lambda rate: rate**0.35) == list(RATES[::2])  # 3^0.35 = 1.47


def test_a_stopped_search_goes_on_and_its_run_is_that_of_what_it_finds(finetune, spy, monkeypatch, tmp_path):
    def highest(trials, variance, usual):
        assert usual == USUAL and variance(0.5) == pytest.approx(0.25 / 4)  # of the four images that judge
        return max(trial.learning_rate for trial in trials)

    monkeypatch.setattr(search, "choose", highest)
    common = "--epochs 1 --labels-per-class 4 --lora-dropout 0.2 --lr"
    save_once = mock.Mock(wraps=finetune_lora.save_atomically, side_effect=[mock.DEFAULT, KeyboardInterrupt])
    with mock.patch.object(finetune_lora, "save_atomically", save_once), pytest.raises(KeyboardInterrupt):
        finetune(f"{common} auto", "stopped")
    with pytest.raises(InputError, match=r"belongs to a run with other settings \(finetune\.batch_size was 8, is 4\)"):
        finetune(f"{common} auto --batch-size 4 --resume", "stopped")
    trials = spy(finetune_lora.TrialRun, "start")
    resumed = finetune(f"{common} auto --resume", "stopped")
    assert trials.call_count == 1
    assert yaml.safe_load((resumed["folder"] / "config.yaml").read_text())["finetune"]["learning_rate"] == "auto"
    assert names_in(resumed["folder"]) < {*output_folder.FINE_TUNING_FILES}
    assert column(rows_of(resumed["folder"] / "learning_rates.csv"), "learning_rate") == ["0.0001", "0.001"]
    typed = finetune(f"{common} 1e-3", "typed")
    assert_same_tensors(resumed["folder"] / "lora.pth", typed["folder"] / "lora.pth")
    (tmp_path / "stopped/last.pth").rename(tmp_path / "stopped/copy.pth")
    copied = finetune(f"{common} auto --resume copy.pth", "stopped")  # whose trials are moved aside
    for results in (resumed, typed, copied):
        assert results["learning_rate"] == results["config"]["finetune"]["learning_rate"] == 1e-3
    assert list(copied["chosen_by"]) == ["learning rate"]
    # A rate that was typed was not searched, however its run goes on; what is no run's file is refused.
    assert finetune(f"{common} auto --resume", "typed")["chosen_by"] == {}
    torch.save({"trials": []}, tmp_path / "other.pth")
    for rate in ("auto", "1e-3"):  # the second is no search, which could go on with this
        with pytest.raises(InputError, match=r"other\.pth is not a last\.pth of this version"):
            finetune(f"{common} {rate} --resume {tmp_path / 'other.pth'}")


def test_trials_are_short_and_leave_no_file(finetune, spy, monkeypatch, capsys):
    """They train on fewer images. One that collapses has a score of 0."""
    made = []
    train = finetune_lora.train

    def note(run, *given):
        made.append(run)
        if len(made) == 1:
            run.go_back("as if it had collapsed")
        if len(made) == 2:
            assert not run.path("lora.pth").exists() and run.path("last.pth").exists()
        train(run, *given)
        if len(made) == 2:
            run.history.append(run.history[0] | {"val_accuracy": 0.25, "val_loss": 7.0})

    monkeypatch.setattr(finetune_lora, "train", note)
    monkeypatch.setattr(Guard, "after_epoch", lambda *_: Keep())
    counted = spy(finetune_lora, "steps_of_epoch")  # which knows of epochs that have more than one pass
    features = spy(finetune_lora.Loaders, "features")
    divisor = spy(optim, "run_divisor")
    finetune("--learning-rate auto --labels-per-class 4 --batch-size 4 --accumulation-steps 2")
    assert features.call_count == 2  # the trials share theirs
    assert divisor.call_args_list[0].args[2] == 2  # steps of two epochs on 8 images, by which rates to try are chosen
    assert counted.call_count == 1 and len(counted.call_args.args[1].train) == 8
    trial, second, run = ((len(run.splits.train), run.args.epochs) for run in made)
    assert trial == second == (8, 2) and run == (12, 2)
    told = capsys.readouterr().out
    assert "searching for a learning rate: 2 runs of 2 epochs on 8 training images, judged by 4 others of them" in told
    assert "learning rate 1e-04: accuracy 0.00%, loss inf" in told and told.count("epoch 1: training loss") == 1
    assert "learning rate 1e-03: accuracy 25.00%, loss 7.0000" in told  # of its last epoch
    assert "learning rate 1e-3 chosen by trials on a part of the training images" in told
