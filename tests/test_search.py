"""The search for a learning rate."""

import contextlib

from moco.search import EPOCHS, RATES, ROUNDS, Trial, find_learning_rate


def test_the_best_rates_go_on_and_the_best_of_those_is_found():
    made = []

    def trial(rate: float, epochs: int) -> tuple[float, float]:
        made.append((rate, epochs))
        best = 1e-3 if epochs == 1 else 3e-4  # a longer run wants a lower one
        return 0.5, abs(rate - best)

    rate, trials = find_learning_rate(trial)
    assert rate == 3e-4
    assert made == [(rate, 1) for rate in RATES] + [(rate, ROUNDS[1][1]) for rate in (1e-3, 3e-4, 1e-4)]
    assert [(t.learning_rate, t.epochs) for t in trials] == made and sum(epochs for _, epochs in made) == EPOCHS


def test_accuracy_counts_before_loss():
    rate, _ = find_learning_rate(lambda rate, epochs: (0.9 if rate == 1e-2 else 0.8, rate))
    assert rate == 1e-2


def test_an_interrupted_search_goes_on_with_what_it_knows():
    """To the same rate; no trial is made twice."""
    saved, made = [], []

    def trial(rate: float, epochs: int) -> tuple[float, float]:
        made.append((rate, epochs))
        return 1 - rate, 0.0

    def stop_after_nine(trials: list[Trial]) -> None:
        saved[:] = trials
        if len(trials) == 9:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        find_learning_rate(trial, tried=stop_after_nine)
    rate, _ = find_learning_rate(trial, known=saved)
    assert rate == RATES[0] and len(made) == len(set(made)) == sum(number for number, _ in ROUNDS)
