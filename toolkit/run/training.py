"""Batches of an epoch, and how far it is in them."""

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from toolkit import InputError, distributed
from toolkit.answers.evaluation import Evaluation, batch_norm_trains, no_labels
from toolkit.devices import select_device, select_precision
from toolkit.images.data import LoadingMeter
from toolkit.models.checkpoints import is_none


def base_dtype(args) -> torch.dtype | None:
    """The dtype in which a run stores its frozen weights; None: that of the checkpoint.

    Random weights stay as they are, since an adapter file has to hold all of them.
    Raises InputError for fp16 on a CPU.
    """
    if not args.freeze_backbone or args.lora_rank == 0 or is_none(args.checkpoint):
        return None
    if args.arithmetic == "int8":
        return torch.int8
    option = "precision" if args.base_dtype == "auto" else "base_dtype"
    return select_precision(vars(args)[option], select_device(args.device), f"--{option.replace('_', '-')}")


def check_processes(*images: int) -> None:
    """Raises InputError if one of the image sets, given by their sizes, has fewer images than there are processes."""
    if distributed.world_size() > min(images):
        raise InputError(
            f"{distributed.world_size()} processes are more than there are images to train or evaluate on; start fewer"
        )


def check_batches(model: nn.Module, train_images: int, val_images: int, batch_size: int) -> None:
    """Raises InputError if a batch leaves too few images for each process or for BatchNorm."""
    check_processes(train_images, val_images)
    needed = max(2, distributed.world_size())
    if batch_norm_trains(model) and min(batch_size, train_images) < needed:
        raise InputError(
            f"BatchNorm that trains needs {needed} images or more, and one in each process: raise --batch-size, or use "
            "--freeze-backbone without --norms train"
        )


class MicroBatches(NamedTuple):
    """The batches of one optimizer step, read one at a time."""

    batches: Iterator[tuple[Tensor, Tensor]]  # images (N, 3, S, S) and labels (N,): this process's share
    number: int
    images: int  # of all processes together


def micro_batches(
    loader: DataLoader, meter: LoadingMeter, epoch: int, start: int = 0, accumulation_steps: int = 1
) -> Iterator[MicroBatches]:
    """The optimizer steps of an epoch (1 is the first) from `start` on; the last may have fewer batches than others.

    Args:
        loader: of `toolkit.data.build_loader`, shuffled.
        meter: watches the loading.
    """
    sampler, size = loader.batch_sampler, accumulation_steps
    sampler.epoch, sampler.start = epoch - 1, start * size
    shares = (
        (images, labels if sampler.has_share(number) else no_labels(labels))
        for number, (images, labels) in enumerate(meter.watched(loader), start * size)
    )
    for first in range(start * size, len(sampler), size):
        number = min(size, len(sampler) - first)
        images = min(number * sampler.batch_size, sampler.count - first * sampler.batch_size)
        yield MicroBatches(itertools.islice(shares, number), number, images)


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
        """Count an optimizer step."""
        self.steps += 1
        self.images += images
        self.correct += correct
        self.loss_sum += loss_sum

    @property
    def loss(self) -> float:
        return self.loss_sum / self.images

    def shown(self) -> dict[str, str]:
        """For a progress bar."""
        loss = {"loss": f"{self.loss:.3f}"}
        return loss | {"accuracy": f"{self.correct / self.images:.1%}"} if self.correct else loss

    def row(self, epoch: int, result: "Evaluation", own_rates: Sequence[float | None]) -> dict[str, float | None]:
        """The finished epoch in `metrics.csv`; `own_rates` are the head's and the adapters'."""
        values = (epoch, self.loss, result.loss, *result.measured().values())
        values += (self.learning_rate, *own_rates, self.seconds)
        return dict(zip(metrics_columns(result.measured()), values, strict=True))


def metrics_columns(measured: Iterable[str]) -> tuple[str, ...]:
    """The columns of `metrics.csv`, where these are measured on the evaluation images."""
    rates = ("learning_rate", "head_learning_rate", "adapter_learning_rate")
    return ("epoch", "train_loss", "val_loss", *(f"val_{name}" for name in measured), *rates, "seconds")


def best_epoch(history: Sequence[dict[str, float]], column: str) -> dict[str, float]:
    """The row with the highest value in a column and, among equal ones, the lowest loss."""
    return max(history, key=lambda row: (row[column], -row["val_loss"]))


def last_is_best(history: Sequence[dict[str, float]], column: str | None) -> bool:
    """Is the last epoch, or the start before any, the one that --keep-best keeps? Without it the last one always is."""
    return column is None or not history or best_epoch(history, column) is history[-1]
