"""The batches of an epoch, what their steps sum up, and how far the epoch is."""

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from toolkit import InputError, distributed
from toolkit.answers.evaluation import training_norms

# Reading a step's figures makes the processor wait for a GPU: there several steps are read together.
STEPS_READ_TOGETHER = {"cpu": 1, "cuda": 8, "mps": 8}


def check_batches(model: nn.Module, train_images: int, val_images: int, batch_size: int) -> None:
    """Raises InputError if the images or a batch are too few for each process or for BatchNorm."""
    processes = distributed.world_size()
    if processes > min(train_images, val_images):
        raise InputError(f"{processes} processes are more than there are images to train or evaluate on; start fewer")
    needed = max(2, processes)
    if training_norms(model) and min(batch_size, train_images) < needed:
        remedy = "raise --batch-size, or use --freeze-backbone without --norms train"
        raise InputError(f"BatchNorm that trains needs {needed} images or more, and one in each process: {remedy}")


class MicroBatches(NamedTuple):
    """The batches of one optimizer step, read one at a time."""

    # This process's share, (N, 3, S, S), and labels (N,). Images without labels follow: see `Teacher.extend`.
    batches: Iterator[tuple[Tensor, ...]]
    number: int
    images: int  # with a label, of all processes together
    is_last: bool  # of the epoch


def read_figures(steps: list[tuple[int, list[Tensor]]], stop: Any) -> list[tuple[int, list[float]]]:
    """The images of each step, and its figures summed over batches, (n,) each, and processes. Empties the list."""
    images, figures = zip(*steps, strict=True)
    sums = torch.stack(list(map(sum, figures))).tolist()  # waits once
    steps.clear()
    *flat, asked = distributed.all_sum(*itertools.chain(*sums), float(stop.signum > 0))
    stop.others_asked |= asked > 0
    sums = torch.tensor(flat, dtype=torch.float64).view(len(sums), -1).tolist()
    return list(zip(images, sums, strict=True))


@dataclass
class Progress:
    """How far an epoch is: optimizer steps, images seen, right answers, the sum of their losses, and seconds taken."""

    learning_rate: float  # at its first step
    steps: int = 0
    images: int = 0
    correct: int = 0
    loss_sum: float = 0.0  # of cross-entropies without label smoothing, as in the evaluation
    seconds: float = 0.0

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Add the seconds of this block, however it ends."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def add(self, images: int, correct: int, loss_sum: float) -> None:
        self.steps += 1
        self.images += images
        self.correct += correct
        self.loss_sum += loss_sum

    @property
    def loss(self) -> float:
        return self.loss_sum / self.images

    def shown(self) -> dict[str, str]:
        shown = {"loss": f"{self.loss:.3f}"}
        if self.correct:
            shown["accuracy"] = f"{self.correct / self.images:.1%}"
        return shown


def column(history: Iterable[dict[str, Any]], name: str) -> list[Any]:
    """What the rows of `metrics.csv` have under this title."""
    return [row[name] for row in history]


def best_epoch(history: Sequence[dict[str, float]], column: str) -> dict[str, float]:
    """The row with the highest value in a column and, among equal ones, the lowest loss; the last if none has one."""
    defined = [row for row in history if not math.isnan(row[column])]
    return max(defined or history[-1:], key=lambda row: (row[column], -row["val_loss"]))


def last_is_best(history: Sequence[dict[str, float]], column: str | None) -> bool:
    """Is the last epoch, or the start before any, the one that --keep-best keeps? Without it the last one always is."""
    return column is None or not history or best_epoch(history, column) is history[-1]
