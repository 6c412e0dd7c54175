"""The search for a learning rate."""

import contextlib
import math

import torch

from toolkit.answers.tasks import Classification, Regression
from toolkit.run.search import RATES, Trial, choose, find_learning_rate


def variance_on(images: int):
    """Of accuracies that are measured on so many images."""
    return lambda accuracy: Classification(["cat", "dog"]).variance(accuracy, images)


def test_a_rate_is_found_that_is_better_by_more_than_chance():
    accuracies = dict(zip(RATES, [0.5, 0.6, 0.7, 0.8, 0.9, 0.89, 0.0], strict=True))
    rate, trials = find_learning_rate(
        lambda rate: (accuracies[rate], 0.0), variance_on(100)
    )  # 0.9 has an error of 0.03
    assert rate == 1e-3
    assert [(trial.learning_rate, trial.val_score) for trial in trials] == list(accuracies.items())


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
    variance = Regression(["age"], mean=torch.zeros(1), std=torch.ones(1)).variance
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


def test_an_interrupted_search_goes_on_with_what_it_knows():
    """To the same rate; no trial is made twice."""
    saved, made = [], []

    def trial(rate: float) -> tuple[float, float]:
        made.append(rate)
        return 1 - rate, 0.0

    def stop_after_five(trials: list[Trial]) -> None:
        saved[:] = trials
        if len(trials) == 5:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        find_learning_rate(trial, variance_on(1000), tried=stop_after_five)
    rate, trials = find_learning_rate(trial, variance_on(1000), known=saved)
    assert rate == 1e-4 and made == list(RATES) == [trial.learning_rate for trial in trials]
