"""The search for a learning rate."""

import math

import pytest
import torch

import finetune_lora
from toolkit.answers.tasks import Classification, Regression
from toolkit.run import optim
from toolkit.run.search import RATES, Trial, choose, rates_that_differ


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


def test_rates_that_a_short_run_lowers_alike_are_tried_once():
    def tried(steps: int) -> list[float]:
        return rates_that_differ(lambda rate: rate / optim.rate_divisor(rate, steps))

    assert tried(200) == list(RATES)
    assert tried(20) == [1e-5, 3e-5, 1e-4]
    assert tried(150) == [1e-5, 3e-5, 1e-4, 3e-4]


def test_a_short_run_searches_among_the_rates_that_it_can_train_at(base, images, tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def asked(train, rates, task, **settings):
        assert rates == [1e-5, 3e-5, 1e-4] and settings["epochs"] == 2
        raise Asked

    monkeypatch.setattr(finetune_lora.search, "choose_learning_rate", asked)
    command = f"--checkpoint {base} --data-dir {images} --output-dir {tmp_path} --epochs 2 --learning-rate auto"
    with pytest.raises(Asked):
        finetune_lora.main([*command.split(), "--device", "cpu"])
