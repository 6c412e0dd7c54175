"""Find a learning rate: short runs at rates over three decades, the best of them longer (--learning-rate auto).

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943). The trials are saved as they are made, so that a search
that was stopped goes on where it was.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from moco import InputError, data, distributed, reports
from moco.files import read_checkpoint, save_atomically, write_csv

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
ROUNDS = ((len(RATES), 1), (3, 3))  # how many rates are tried in each round, and for how many epochs
EPOCHS = sum(rates * epochs for rates, epochs in ROUNDS)
IMAGES = 2_000  # at most so many train, and as many validate


class Trial(NamedTuple):
    """A short run and how it ended."""

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


def parts_of(splits: data.Splits) -> data.Splits:
    """What a search trains and validates on: two parts of the training images."""
    rest, part = data.validation_part(splits.train)
    return data.Splits(rest.at_most(IMAGES), part.at_most(IMAGES), splits.class_names)


def was_interrupted(path: Path) -> bool:
    """Was this `last.pth` written during a search, before its run began?"""
    return "trials" in read_checkpoint(path)


def choose_learning_rate(
    short_run: Callable[[float, int], Any],
    begin: Callable[[], None],
    folder: Path,
    resume: Path | None,
    settings: dict[str, Any],
) -> float:
    """The best rate, found by a search, or recalled from the run to go on with.

    Args:
        short_run: makes a run at a rate for a number of epochs. It has `train_epoch`, which is False if training
            collapses, and `history`.
        begin: makes the folder ready; called when there is something to save.
        folder: gets `last.pth`, `learning_rates.csv` and `learning_rates.png`.
        resume: the `last.pth` to go on from.
        settings: `config` and `images` of the run, which an interrupted search must share.
    """
    known = []
    if resume is not None:
        state = read_checkpoint(resume)
        if "trials" not in state:
            return state["config"]["finetune"]["learning_rate"]
        if {name: state[name] for name in settings} != settings:
            raise InputError(f"{resume} is of a search with other settings or images; start without --resume")
        known = [Trial(*trial) for trial in state["trials"]]

    def trial(rate: float, epochs: int) -> tuple[float, float]:
        run = short_run(rate, epochs)
        for _ in range(epochs):
            if not run.train_epoch():
                return 0.0, math.inf
        return run.history[-1]["val_accuracy"], run.history[-1]["val_loss"]

    def tried(trials: list[Trial]) -> None:
        print("  learning rate {:.0e}, epochs {}: val accuracy {:.4f}, val loss {:.4f}".format(*trials[-1]))
        begin()
        if distributed.is_main():
            save_atomically({"trials": [tuple(trial) for trial in trials], **settings}, folder / "last.pth")
            write_csv([trial._asdict() for trial in trials], Trial._fields, folder / "learning_rates.csv")

    print(f"searching for a learning rate: {EPOCHS} epochs in all, over at most {IMAGES:,} images")
    rate, trials = find_learning_rate(trial, known, tried)
    if distributed.is_main():
        reports.plot_learning_rates(trials, folder / "learning_rates.png")
    print(f"learning rate {rate:.0e}")
    return rate
