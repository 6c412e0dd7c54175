"""The search for a learning rate."""

import contextlib

from moco.search import RATES, Trial, find_learning_rate


def test_the_best_rate_is_found_by_accuracy_and_then_by_loss():
    accuracies = dict(zip(RATES, [0.5, 0.6, 0.9, 0.8, 0.9, 0.9, 0.0], strict=True))
    rate, trials = find_learning_rate(lambda rate: (accuracies[rate], abs(rate - 1e-3)))
    assert rate == 1e-3 and accuracies[1e-3] == 0.9
    assert [(trial.learning_rate, trial.val_accuracy) for trial in trials] == list(accuracies.items())


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
        find_learning_rate(trial, tried=stop_after_five)
    rate, trials = find_learning_rate(trial, known=saved)
    assert rate == RATES[0] and made == list(RATES) == [trial.learning_rate for trial in trials]
