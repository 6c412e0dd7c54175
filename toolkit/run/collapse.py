"""Detects that training has collapsed, takes the run back to its last good state, and lowers the learning rate.

Published LoRA collapses on MoCo v3 at a common learning rate (SNELL, NeurIPS 2024, table 2). Waiting for a loss that is
not finite would be too late: a collapsed classifier has a finite loss, and answers as if it saw no image.

Only training images are looked at. What a run does must not depend on the images that judge it in the end.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from toolkit import InputError, distributed
from toolkit.answers.tasks import Answers, Task
from toolkit.files import read_checkpoint, save_atomically
from toolkit.images.data import LabelledImages
from toolkit.run.run_state import Part, copy_to_cpu

RETREATS = 3  # how often a collapsed run goes back
RETREAT_FACTOR = 8.0  # divides the learning rate each time
WATCHED_VIEWS = 128
SHARE_DIVISORS = (2, 4, 8, math.inf)  # of `wise_ft_alpha`, tried in this order if training has made answers worse
LOSS_DECAY = 0.8  # per step, of the moving average of the loss
EXPLODED_RATIO = 2.0  # of the recent loss to that of a constant answer
BARREN_EPOCHS = 2  # in a row, after which a lower rate is tried


class Collapsed(InputError):
    """Training has collapsed too often. `results` are those of the last good adapter, whose files are complete."""

    def __init__(self, epoch: int, rate: float, good_epoch: int, adapter: Path, results: dict[str, Any]):
        super().__init__(
            f"training collapses in epoch {epoch} even at learning rate {rate:.1e}: try a lower --learning-rate, "
            "--precision fp32 or --clip-grad-norm 1; "
            f"the adapter of epoch {good_epoch} is in {adapter}"
        )
        self.results = results


class EpochCollapsed(Exception):
    """The run goes back, for training has collapsed in this epoch, or as the message says."""


def watched_images(images: LabelledImages) -> LabelledImages:
    """The training images that are evaluated after each epoch: always the same, repeated if there are few."""
    some = images.at_most(WATCHED_VIEWS)
    return some.subset([*range(len(some))] * (WATCHED_VIEWS // len(some)))


class CollapseGuard:
    """Judges a run by the losses of its steps, and after each epoch by its score on some views of training images.

    Args:
        task: defines the score, how certain it is, and the score and loss of a constant answer.
        train: all training images.
        watched: those that are evaluated after each epoch.
        all_train: whether the whole backbone trains, or BatchNorm.
    """

    def __init__(self, task: Task, train: LabelledImages, watched: LabelledImages, all_train: bool = False):
        self.variance = task.variance
        self.images = len(watched)
        self.share = 1 / 3 if all_train else 1 / 4  # good runs of a whole backbone lose more at first
        self.constant_accuracy = task.constant_score(watched)
        self.constant_loss = task.constant_loss(train)
        self.first_loss: float | None = None  # of the first step: the loss before training
        self.recent_loss: float | None = None  # a moving average
        self.accuracies: list[float] = []  # before training, and after each epoch
        self.start_loss = math.inf  # of the watched images
        self.is_barren = False  # is the epoch that was judged last?
        self.barren_epochs = 0  # in a row, lately
        self.retreats: list[dict[str, float]] = []
        self.lost_seconds = 0.0  # spent on epochs that were undone

    def begin(self, worst_batch_loss: float | None, watched: Answers) -> None:
        """Note the answers before training, or before it begins anew with a head of another temperature.

        Args:
            worst_batch_loss: the highest loss of a batch of the watched images, if the batch matters; else None.
        """
        self.first_loss = self.recent_loss = worst_batch_loss
        self.accuracies, self.start_loss = [watched.score], watched.loss

    def explodes(self, loss: float) -> bool:
        """Is the recent training loss above twice that of a constant answer, or of the start if that is higher?

        Args:
            loss: the mean over the images of this step.
        """
        if not math.isfinite(loss):
            return True
        if self.first_loss is None:
            self.first_loss = self.recent_loss = loss
        self.recent_loss = LOSS_DECAY * self.recent_loss + (1 - LOSS_DECAY) * loss
        return self.recent_loss > EXPLODED_RATIO * max(self.constant_loss, self.first_loss)

    def has_collapsed(self, accuracy: float, loss: float) -> bool:
        """Has accuracy lost a quarter of its best lead over a constant answer, by more than two standard errors?

        The share is a third if the whole backbone trains. On very few images no loss of accuracy exceeds two standard
        errors: there an accuracy no better than a constant answer's, with a higher loss, counts as a collapse too.
        """
        if not math.isfinite(loss):
            return True
        best = max(self.accuracies, default=0.0)
        useless = best > self.constant_accuracy >= accuracy and loss > max(self.constant_loss, self.first_loss or 0)
        return useless or self._lost(accuracy, self.share, errors=2)

    def learns_nothing(self, share: float, loss: float) -> bool:
        """Was this one of two epochs in a row that left nothing to keep, and no lower loss than at the start?

        Adapters may die without a collapse: where features are weak, a constant answer is hardly worse than the probe.
        A run that may not go back any more is left alone.

        Args:
            share: of the change that is kept.
            loss: of the watched images, with all of the change.
        """
        self.is_barren = share == 0 and loss >= self.start_loss
        return self.is_barren and self.barren_epochs + 1 >= BARREN_EPOCHS and len(self.retreats) < RETREATS

    def end_epoch(self, accuracy: float) -> None:
        """Note the accuracy after an epoch that stays. Judged twice, as after a stop between, it counts once."""
        self.accuracies.append(accuracy)
        self.barren_epochs = self.barren_epochs + 1 if self.is_barren else 0

    def is_recoverable(self) -> bool:
        """Is the present state good enough to go back to? The start is, and any that has lost next to no accuracy."""
        if len(self.accuracies) <= 1:
            return True
        return self.barren_epochs == 0 and not self._lost(self.accuracies[-1], share=1 / 8, errors=1)

    def is_below_start(self, accuracy: float) -> bool:
        return accuracy < self.accuracies[0]

    def _lost(self, accuracy: float, share: float, errors: float) -> bool:
        """Has accuracy lost this share of its best lead over a constant answer, and so many standard errors?"""
        best = max(self.accuracies, default=0.0)
        middle = (best + accuracy) / 2
        chance = errors * math.sqrt(2 * self.variance(middle, self.images))
        return accuracy < best - max((best - self.constant_accuracy) * share, chance)

    def retreat(self, epoch: int, learning_rate: float, good_epochs: int, seconds: float) -> None:
        """Note that this epoch collapsed at this rate, and forget what came after the good epochs.

        Args:
            seconds: how long the undone epochs took.
        """
        self.lost_seconds += seconds
        self.retreats.append({"epoch": epoch, "learning_rate": learning_rate})
        self.accuracies = self.accuracies[: good_epochs + 1]
        self.recent_loss = self.first_loss
        self.barren_epochs = 0

    def state_dict(self) -> dict[str, Any]:
        names = ("first_loss", "recent_loss", "accuracies", "start_loss", "barren_epochs", "retreats", "lost_seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Recovery:
    """Remembers the last good state of a run, and takes the run back there once training has collapsed.

    Args:
        guard: judges the run.
        rate: the peak learning rate before any collapse.
    """

    def __init__(self, guard: CollapseGuard, rate: float):
        self.guard = guard
        self.first_rate = rate
        self.last_good: dict[str, Any] | None = None  # None: the present state is good, or no epoch has begun

    @property
    def rate(self) -> float:
        """The peak learning rate, which each collapse lowers."""
        lowered = min(len(self.guard.retreats), RETREATS)  # the last collapse ends the run and lowers nothing
        return self.first_rate / RETREAT_FACTOR**lowered

    @property
    def has_failed(self) -> bool:
        """Has the run gone back too often?"""
        return len(self.guard.retreats) > RETREATS

    def parts(self) -> dict[str, Part]:
        """The parts of a run's state that are its own, by key of `last.pth`."""
        return {"guard": Part.of(self.guard), "good": Part.attribute(self, "last_good")}

    def begin_epoch(self, epochs: int, trained: Callable[[], dict[str, Any]], best_file: Path | None) -> None:
        """Remember the present state, if it is good.

        Args:
            epochs: how many epochs are finished.
            trained: returns what training changes.
            best_file: the best adapter so far, with --keep-best: an epoch that is undone later may replace it.
        """
        if not self.guard.is_recoverable():
            return
        best = None
        if best_file is not None and best_file.exists() and distributed.is_main():
            best = read_checkpoint(best_file)
        self.last_good = copy_to_cpu({"epochs": epochs, "state": trained(), "best": best})

    def end_epoch(self, accuracy: float) -> None:
        """Note the accuracy on the watched images after an epoch that has not collapsed."""
        self.guard.end_epoch(accuracy)
        if self.guard.is_recoverable():
            self.last_good = None

    def go_back(self, history: Sequence[dict[str, float]], seconds: float, best_file: Path) -> dict[str, Any]:
        """Note that the epoch after these has collapsed, restore the best adapter file, return the last good state.

        Args:
            history: the rows of the finished epochs.
            seconds: how long the collapsed epoch took.
            best_file: the file of the best adapter, with --keep-best.
        """
        good, self.last_good = self.last_good, None
        if good["best"] is not None and distributed.is_main():
            save_atomically(good["best"], best_file)
        undone = sum(row["seconds"] for row in history[good["epochs"] :]) + seconds
        self.guard.retreat(len(history) + 1, self.rate, good["epochs"], undone)
        return good
