"""Find a learning rate: short runs at rates over three decades, the best of them longer (--learning-rate auto).

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943). What a run is stays with the caller.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
ROUNDS = ((len(RATES), 1), (3, 3))  # how many rates are tried in each round, and for how many epochs
EPOCHS = sum(rates * epochs for rates, epochs in ROUNDS)


class Trial(NamedTuple):
    learning_rate: float
    epochs: int
    val_accuracy: float  # 0 to 1
    val_loss: float


def find_learning_rate(
    trial: Callable[[float, int], tuple[float, float]],
    known: Iterable[Trial] = (),
    tried: Callable[[list[Trial]], None] = lambda trials: None,
) -> tuple[float, list[Trial]]:
    """The best rate by validation accuracy, by loss where that is equal, and every trial that was made.

    Args:
        trial: trains at a rate for a number of epochs and returns validation accuracy and loss.
        known: trials of an interrupted search, which are not repeated.
        tried: called after each trial with all so far.
    """
    trials = {(t.learning_rate, t.epochs): t for t in known}
    ranked = list(RATES)
    for number, epochs in ROUNDS:
        results = []
        for rate in ranked[:number]:
            if (rate, epochs) not in trials:
                trials[rate, epochs] = Trial(rate, epochs, *trial(rate, epochs))
                tried(list(trials.values()))
            results.append(trials[rate, epochs])
        ranked = [t.learning_rate for t in sorted(results, key=lambda t: (-t.val_accuracy, t.val_loss))]
    return ranked[0], list(trials.values())
