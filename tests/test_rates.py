"""The learning rates of a run: the default and the schedule."""

import copy
import math

import pytest
import torch

from tests.run_folders import metrics
from toolkit.answers.probe import HeadTemperature
from toolkit.run import optim, reports
from toolkit.run.options import FineTuneOptions


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


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_float16_cannot_hold_changes_no_weight(fused):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for gradient, expected in ((math.inf, 1.0), (1.0, 0.9)):
        scaler.scale(weight.sum() * 0)  # which begins a step
        weight.grad = torch.full((2,), gradient * scaler.get_scale())
        optim.take_step(scaler, optimizer)
        assert weight.tolist() == pytest.approx([expected] * 2)
    assert scaler.get_scale() == 2.0


def test_steps_are_those_of_adamw_tensor_by_tensor():
    """Of a bias without weight decay and of adapters at a rate of their own."""
    ours = torch.nn.Linear(3, 2)
    ours.lora_A = torch.nn.Parameter(torch.ones(2, 3))
    theirs = copy.deepcopy(ours)
    groups = [
        {"params": [theirs.weight], "lr": 0.1, "weight_decay": 0.5},
        {"params": [theirs.bias], "lr": 0.1, "weight_decay": 0.0},
        {"params": [theirs.lora_A], "lr": 0.2, "weight_decay": 0.5},
    ]
    steps = [(ours, optim.build_optimizer(ours, 0.1, 2.0, 0.5)), (theirs, torch.optim.AdamW(groups, foreach=False))]
    for seed in range(3):
        for model, optimizer in steps:
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()
    assert steps[0][1].defaults["fused"]
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name))


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


def test_a_run_without_a_probe_trains_at_the_rate_that_it_is_given(start, monkeypatch):
    monkeypatch.setattr(optim, "rate_divisor", lambda rate, steps: 50.0)
    assert start("--head-init random").rate == 1e-2
    assert start().rate == pytest.approx(2e-4)


def test_the_rates_that_are_told_are_those_of_the_optimizer(finetune, capsys):
    rates = {}

    def look(run):
        names = {id(parameter): name for name, parameter in run.model.named_parameters()}
        for group in run.optimizer.param_groups:
            for parameter in group["params"]:
                rates[names[id(parameter)]] = group["initial_lr"]

    results = finetune("--epochs 1 --labels-per-class 2 --lora-rank 2 --learning-rate 1e-4", after_epoch=look)
    assert "learning rate: head 1e-4, adapters 2.4e-3 (24x: they start at the gradient)" in capsys.readouterr().out
    assert [results["head_learning_rate"], results["adapter_learning_rate"]] == pytest.approx([1e-4, 24e-4])
    for name, rate in rates.items():
        assert rate == pytest.approx(24e-4 if "lora_" in name else 1e-4), name
    [row] = metrics(results["folder"])
    assert [row["learning_rate"], row["adapter_learning_rate"]] == pytest.approx([1e-4, 24e-4])


@pytest.mark.parametrize(("options", "remedy"), [("", "--lora-init random"), ("--lora-rank 0", "--head-init random")])
def test_the_way_to_a_rate_as_it_is_typed_goes_with_the_other_options(start, monkeypatch, options, remedy):
    """Without adapters there is nothing that --lora-init could start: it is refused."""
    monkeypatch.setattr(optim, "STEPS_TO_TRAIN", 80)
    told = reports.describe_rates(start(options))
    assert f"so few steps cannot correct what a high rate does ({remedy}: as typed)" in told
    assert start(f"{options} {remedy}").rate == 1e-2


@pytest.mark.parametrize("norms", ["follow", "frozen"])
def test_adapters_of_a_resnet_learn_twice_as_fast_from_a_head_as_soft(norms, start, saved, narrow):
    resnet = start(f"--checkpoint {saved(narrow, 'resnet.pth')} --image-size 32 --norms {norms}")
    vit = start()
    assert (resnet.adapter_lr_factor, vit.adapter_lr_factor) == (48, 24)
    for run in (resnet, vit):
        run.head_temperature = HeadTemperature(per_rate=100.0)
    assert resnet.temperature == vit.temperature == pytest.approx(100 * vit.rate * 24)
