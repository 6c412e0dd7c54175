"""Finds a learning rate: trains at up to seven rates over three decades, on a part of the training images.

The trials are as long as the run itself, up to MOST_TRIAL_EPOCHS: the gain of a higher rate over a head that starts as
a linear probe shows only in the last epochs. Each is saved when it ends, so a stopped search can be resumed.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from toolkit.images import sources
from toolkit.run import options

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
FULL_RATE = 1e-3  # advised for full fine-tuning, in docs/choosing.md too
DISTINCT_RATIO = 1.5  # times a rate: below it a higher one is no other trial
MOST_TRIAL_EPOCHS = 20
SEARCH_IMAGES = 2_000  # the most images that a trial trains on, and the most that it validates on


def rates_that_differ(peak: Callable[[float], float]) -> list[float]:
    """The RATES that are worth a trial: a short run lowers many of them to nearly the same `peak` of it."""
    chosen: list[float] = []
    for rate in RATES:
        if not chosen or peak(rate) > DISTINCT_RATIO * peak(chosen[-1]):
            chosen.append(rate)
    return chosen


class Trial(NamedTuple):
    learning_rate: float
    val_score: float  # the task's, such as the accuracy
    val_loss: float


def usual_rate(args: options.FineTuneOptions) -> float:
    """The rate that suits most runs like this one."""
    return FULL_RATE if args.lora_rank == 0 and not args.freeze_backbone else options.TuneOptions.learning_rate


def choose(trials: Sequence[Trial], variance: Callable[[float], float], usual: float) -> float:
    """The rate nearest to the usual one within one standard error of the best score (Breiman, CART, 1984, 3.4.3)."""
    # A trial that has collapsed is never the best, though R2 may be below its 0.
    trials = [trial for trial in trials if math.isfinite(trial.val_loss)] or trials
    scored = [trial for trial in trials if not math.isnan(trial.val_score)]
    if not scored:
        print("the score is not defined on the validation part: the rate with the lowest loss is taken")
        return min(trials, key=lambda trial: trial.val_loss).learning_rate
    best = max(trial.val_score for trial in scored)
    alike = [trial.learning_rate for trial in scored if trial.val_score >= best - math.sqrt(variance(best))]
    return min(alike, key=lambda rate: abs(math.log(rate / usual)))


def parts_of(splits: sources.Splits) -> sources.Splits:
    """The images that a search trains and validates on: two parts of the training images."""
    rest, part = sources.validation_part(splits.train)
    return sources.Splits(rest.at_most(SEARCH_IMAGES), part.at_most(SEARCH_IMAGES), splits.class_names)
