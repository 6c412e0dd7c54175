"""The learning rates of a run: the default, the schedule, and the search for one."""

import math
import shutil
from unittest import mock

import pytest
import torch

import finetune_lora
from finetune_lora import FineTuning
from lora import initialization
from tests.run_folders import assert_same_tensors, metrics, rows_of
from toolkit import InputError
from toolkit.answers.probe import HeadTemperature
from toolkit.answers.tasks import Classification, Regression
from toolkit.files import read_checkpoint
from toolkit.run import optim, reports, training
from toolkit.run.options import FineTuneOptions
from toolkit.run.search import RATES, Trial, choose, rates_that_differ


def test_a_short_run_trains_at_a_lower_rate():
    """From 80 steps on it is the one that was typed; below it grows with the steps, and hardly with what was typed."""
    assert optim.rate_divisor(1e-2, 80) == optim.rate_divisor(1e-4, 1000) == 1
    assert optim.rate_divisor(1e-4, 20) == 32 and optim.rate_divisor(1e-4, 5) == 1024
    rates = [rate / optim.rate_divisor(rate, 5) for rate in (1e-4, 1e-3, 1e-2)]
    assert rates == pytest.approx([9.77e-8, 9.77e-8, 9.77e-8], rel=1e-2)
    steps = [1e-2 / optim.rate_divisor(1e-2, steps) for steps in (10, 40, 70, 78)]
    assert steps == sorted(steps) and steps[-1] == pytest.approx(1.54e-3, rel=1e-2)
    assert optim.warmup_steps(1, steps_per_epoch=50, total_steps=500) == 50
    assert optim.warmup_steps(1, steps_per_epoch=1, total_steps=10) == 5
    assert optim.warmup_steps(1, steps_per_epoch=3, total_steps=300) == 20
    assert optim.warmup_steps(1, steps_per_epoch=50, total_steps=50) == 25
    assert optim.warmup_steps(8, steps_per_epoch=50, total_steps=500) == 400  # as typed
    assert FineTuneOptions().warmup_epochs == 1
    assert optim.warmup_steps(0, steps_per_epoch=1, total_steps=10) == 0


def test_a_step_that_float16_cannot_hold_changes_no_weight():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for gradient, expected in ((math.inf, 1.0), (1.0, 0.9)):
        scaler.scale(weight.sum() * 0)  # which begins a step
        weight.grad = torch.full((2,), gradient * scaler.get_scale())
        optim.take_step(scaler, optimizer)
        assert weight.tolist() == pytest.approx([expected] * 2)
    assert scaler.get_scale() == 2.0


def test_a_file_of_another_device_does_not_say_how_this_one_steps(start):
    """Its steps are taken by one kernel on a GPU, which is told so; a CPU goes on by itself."""
    run = start()
    state = run.trained()
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = True
    run.restore(state)
    assert {group["fused"] for group in run.optimizer.param_groups} == {None}


def test_more_passes_over_few_images_do_not_raise_the_rate():
    """Of an epoch of n steps, 5 n passes count."""

    def divisor(epochs: int, steps_per_epoch: int) -> float:
        return optim.run_divisor(FineTuneOptions(epochs=epochs), rate=1e-4, steps_per_epoch=steps_per_epoch)

    assert divisor(5, 2) > divisor(10, 2) == divisor(50, 2) == optim.rate_divisor(1e-4, 20)
    assert divisor(5, 3) > divisor(15, 3) == divisor(50, 3) == optim.rate_divisor(1e-4, 45)
    assert divisor(20, 4) == divisor(2, 40) == 1


@pytest.mark.parametrize(
    "other",
    [{"head_init": "random"}, {"lora_init": "random"}, {"freeze_backbone": False}, {"task": "segmentation"}],
    ids=str,
)
def test_only_adapters_of_whole_images_that_start_at_the_gradient_get_another_rate(other):
    assert optim.run_divisor(FineTuneOptions(epochs=1, **other), rate=1e-2, steps_per_epoch=2) == 1


def test_a_run_without_a_probe_trains_at_the_rate_that_it_is_given(finetune, monkeypatch):
    monkeypatch.setattr(optim, "rate_divisor", lambda rate, steps: 50.0)
    results = finetune("--epochs 1 --labels-per-class 2 --head-init random --warmup-epochs 0", output="random")
    assert metrics(results["folder"])[0]["learning_rate"] == 1e-3
    results = finetune("--epochs 1 --labels-per-class 2 --warmup-epochs 0", output="probe")
    assert metrics(results["folder"])[0]["learning_rate"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("way", ["--use-qlora", "--lora-rank 0 --no-freeze-backbone"])
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
    rows = rows_of(tmp_path / "whole/learning_rates.csv")
    assert len(rows) == 3
    assert whole["learning_rate"] in {float(row["learning_rate"]) for row in rows}
    assert whole["config"]["finetune"]["learning_rate"] == whole["learning_rate"]
    save = finetune_lora.save_atomically
    save_once = mock.Mock(wraps=save, side_effect=[mock.DEFAULT, KeyboardInterrupt])
    with mock.patch.object(finetune_lora, "save_atomically", save_once), pytest.raises(KeyboardInterrupt):
        finetune("--learning-rate auto", output="stopped")
    with mock.patch.object(FineTuning, "start", autospec=True, side_effect=FineTuning.start) as start:
        resumed = finetune("--learning-rate auto --resume", output="stopped")
    assert start.call_count == 3 - 1 + 1  # what is left of the search, and the run
    assert_same_tensors(resumed["folder"] / "lora.pth", whole["folder"] / "lora.pth")
    assert finetune("--learning-rate auto --resume", output="stopped")["learning_rate"] == whole["learning_rate"]
    elsewhere = finetune(f"--learning-rate auto --resume {tmp_path / 'stopped/last.pth'}", output="elsewhere")
    assert list(elsewhere["chosen_by"]) == ["learning rate"]  # though its table of trials is not there


def test_a_run_draws_the_same_random_numbers_whether_its_rate_was_searched_or_typed(finetune, monkeypatch):
    monkeypatch.setattr(finetune_lora.search, "RATES", (1e-3,))
    searched, typed = (
        finetune(f"--lr {rate} --epochs 1 --lora-dropout 0.2", rate)["folder"] for rate in ("auto", "1e-3")
    )
    assert_same_tensors(searched / "lora.pth", typed / "lora.pth")


def test_a_search_over_blocks_that_the_gradient_chose_goes_on_bit_for_bit(finetune, monkeypatch):
    """The resumed run builds one model less, which drew random numbers."""
    monkeypatch.setattr(initialization, "MOST", 0.01)  # which the last block alone has
    monkeypatch.setattr(finetune_lora.search, "RATES", (1e-4, 1e-3))
    options = "--adapt-last auto --learning-rate auto --epochs 1 --lora-dropout 0.2"
    whole = finetune(options, output="whole")
    save_once = mock.Mock(wraps=finetune_lora.save_atomically, side_effect=[mock.DEFAULT, KeyboardInterrupt])
    with mock.patch.object(finetune_lora, "save_atomically", save_once), pytest.raises(KeyboardInterrupt):
        finetune(options, output="killed")
    resumed = finetune(f"{options} --resume", output="killed")
    assert_same_tensors(resumed["folder"] / "lora.pth", whole["folder"] / "lora.pth")


@pytest.mark.slow
def test_trials_keep_the_share_of_the_change_that_the_run_will_keep(finetune, monkeypatch):
    """They train on fewer images, of which `--wise-ft auto` would keep less."""
    monkeypatch.setattr(finetune_lora.search, "RATES", (1e-4, 1e-3))
    made, start = [], FineTuning.start
    monkeypatch.setattr(FineTuning, "start", lambda run, *given: made.append(run) or start(run, *given))
    results = finetune("--learning-rate auto --epochs 1 --keep-best f1")
    assert list(results["chosen_by"]) == ["learning rate", "epoch"]
    assert [len(run.splits.train) for run in made] == [16, 16, 21]
    assert [run.wise_ft.alpha for run in made] == [7 / 12] * 3  # seven images of each class


@pytest.mark.slow
def test_a_search_goes_on_elsewhere_and_with_other_workers(finetune, monkeypatch, tmp_path, images):
    """All trials are made, but the run has not begun."""
    monkeypatch.setattr(finetune_lora.search, "RATES", (1e-4, 1e-3))
    monkeypatch.setattr(finetune_lora.search, "choose", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune("--learning-rate auto", output="stopped")
    monkeypatch.undo()
    moved = shutil.copytree(images, tmp_path / "moved")
    command = f"--learning-rate auto --resume {tmp_path / 'stopped/last.pth'}"
    monkeypatch.setattr(finetune_lora.search, "RATES", (1e-4, 1e-3))
    columns = training.metrics_columns(Classification.measured)

    def no_steps(run, after_epoch=None):
        run.save_start()
        run.history.append(dict.fromkeys(columns, 0.5))

    monkeypatch.setattr(finetune_lora, "train", no_steps)
    with pytest.raises(InputError, match=r"belongs to a run with other settings \(finetune\.batch_size was 8, is 4\)"):
        finetune(f"{command} --batch-size 4", output="elsewhere")
    results = finetune(f"{command} --data-dir {moved} --workers 1", output="elsewhere")
    assert results["learning_rate"] == 1e-4 and len(rows_of(tmp_path / "elsewhere/learning_rates.csv")) == 2


def test_trials_over_another_base_say_nothing(finetune, base, monkeypatch, tmp_path):
    """A stopped search may find its checkpoint elsewhere, but not another one."""
    monkeypatch.setattr(finetune_lora.search, "RATES", (1e-4,))
    monkeypatch.setattr(finetune_lora.search, "choose", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune("--learning-rate auto --epochs 1")
    content = read_checkpoint(base, mapped=False)
    next(iter(content["state_dict"].values())).add_(1)
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"was trained over another base than .*other\.pth"):
        finetune(f"--learning-rate auto --epochs 1 --resume --checkpoint {tmp_path / 'other.pth'}")
    shutil.copy(base, tmp_path / "moved.pth")
    with pytest.raises(ZeroDivisionError):  # as before: no trial is left to make
        finetune(f"--learning-rate auto --epochs 1 --resume --checkpoint {tmp_path / 'moved.pth'}")


def test_a_rate_that_was_typed_was_not_searched_however_the_run_goes_on(finetune, once):
    assert finetune("--epochs 1 --learning-rate auto --resume")["chosen_by"] == {}


def test_a_search_goes_on_from_its_own_files_alone(finetune, tmp_path):
    torch.save({"trials": []}, tmp_path / "other.pth")
    for rate in ("auto", "1e-3"):  # the second is no search, which could go on with this
        with pytest.raises(InputError, match=r"other\.pth is not a last\.pth of this version"):
            finetune(f"--learning-rate {rate} --resume {tmp_path / 'other.pth'}")


def test_the_rates_that_are_told_are_those_of_the_optimizer(finetune, capsys):
    rates = {}

    def look(run):
        names = {id(parameter): name for name, parameter in run.model.named_parameters()}
        for group in run.optimizer.param_groups:
            for parameter in group["params"]:
                rates[names[id(parameter)]] = group["initial_lr"]

    results = finetune("--epochs 1 --labels-per-class 2 --lora-rank 2 --learning-rate 1e-4", after_epoch=look)
    assert "learning rate: head 1e-4, adapters 2.4e-3 (24x: they start at the gradient)" in capsys.readouterr().out
    assert (
        {rate for name, rate in rates.items() if "lora_" in name} == {results["adapter_learning_rate"]} == {24 * 1e-4}
    )
    assert {rate for name, rate in rates.items() if "heads" in name} == {results["head_learning_rate"]} == {1e-4}
    [row] = metrics(results["folder"])
    assert [row["learning_rate"], row["adapter_learning_rate"]] == pytest.approx([1e-4, 24e-4])


@pytest.mark.parametrize(("options", "remedy"), [("", "--lora-init random"), ("--lora-rank 0", "--head-init random")])
def test_the_way_to_a_rate_as_it_is_typed_goes_with_the_other_options(start, monkeypatch, options, remedy):
    """Without adapters there is nothing that --lora-init could start: it is refused."""
    monkeypatch.setattr(optim, "STEPS_TO_TRAIN", 80)
    told = reports.describe_rates(start(options))
    assert f"so few steps cannot correct what a high rate does ({remedy}: as typed)" in told
    assert start(f"{options} {remedy}").rate == 1e-2


# ----------------------------------------------------------------------------------------------------------- the search


def variance_on(images: int):
    """Of accuracies that are measured on so many images."""
    return lambda accuracy: Classification(["cat", "dog"]).head.variance(accuracy, images)


def test_of_rates_that_chance_may_have_ordered_the_nearest_to_the_default_is_taken():
    accuracies = [0.5, 0.88, 0.84, 0.88, 0.9, 0.89, 0.0]
    trials = [Trial(rate, accuracy, 0.0) for rate, accuracy in zip(RATES, accuracies, strict=True)]
    assert (
        choose(trials, variance_on(100)) == 3e-4
        and choose(trials, variance_on(20)) == 1e-4
        and choose(trials, variance_on(10_000)) == 1e-3
    )
    assert choose([Trial(rate, 1.0, 0.0) for rate in RATES], variance_on(5)) == 1e-4


def test_a_rate_at_which_training_collapses_is_not_taken_for_numbers_that_no_rate_learns():
    """Their R2 is below 0, which is what a collapsed trial is given."""
    variance = Regression(["age"], mean=torch.zeros(1), std=torch.ones(1)).head.variance
    trials = [Trial(rate, -0.1, 1.1) if rate < 1e-3 else Trial(rate, 0.0, math.inf) for rate in RATES]
    assert choose(trials, lambda score: variance(score, 100)) == 1e-4
    assert choose([Trial(rate, 0.0, math.inf) for rate in RATES], lambda score: variance(score, 100)) == 1e-4


def test_where_no_trial_has_a_score_the_lowest_loss_chooses(capsys):
    """As of numbers that do not differ on the validation part; the trials are paid for."""
    trials = [Trial(rate, math.nan, abs(math.log(rate / 1e-3))) for rate in RATES]
    assert choose(trials, variance_on(100)) == 1e-3
    assert "the score is not defined on the validation part" in capsys.readouterr().out
    trials[0] = Trial(RATES[0], 0.5, 9.0)
    assert choose(trials, variance_on(100)) == RATES[0]


def test_a_short_run_searches_among_the_rates_that_it_can_train_at(base, images, tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def asked(peak):
        assert rates_that_differ(peak) == [1e-5, 3e-5, 1e-4]
        raise Asked

    monkeypatch.setattr(finetune_lora.search, "rates_that_differ", asked)
    command = f"--checkpoint {base} --data-dir {images} --output-dir {tmp_path} --epochs 2 --learning-rate auto"
    with pytest.raises(Asked):
        finetune_lora.main([*command.split(), "--device", "cpu"])


@pytest.mark.parametrize("norms", ["follow", "frozen", "train"])
def test_adapters_of_a_resnet_learn_twice_as_fast_from_a_head_as_soft(norms, start, saved, narrow):
    resnet, vit = start(f"--checkpoint {saved(narrow, 'resnet.pth')} --norms {norms}"), start()
    assert (resnet.adapter_lr_factor, vit.adapter_lr_factor) == (48, 24)
    for run in (resnet, vit):
        run.head_temperature = HeadTemperature(per_rate=100.0)
    assert resnet.temperature == vit.temperature == pytest.approx(100 * vit.rate * 24)
