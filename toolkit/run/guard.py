"""Detects that training has collapsed or harms what the start knew, and says what the run is to do about it.

Published LoRA collapses on MoCo v3 at a common rate (SNELL, NeurIPS 2024, table 2): a collapsed classifier has a finite
loss, and answers as if it saw no image. Only training images are looked at: others judge the run in the end.
"""

import math
from pathlib import Path
from typing import Any

from toolkit import InputError, attributes
from toolkit.answers.tasks import Answers, Task
from toolkit.images.data import LabelledImages

RETREATS = 3  # how often a collapsed run goes back
RETREAT_FACTOR = 8.0  # divides the learning rate each time
WATCHED_VIEWS = 128  # of training images, repeated if there are few, which are evaluated after each epoch
LOST_SHARE = 1 / 4  # of the best lead over a constant answer: who loses more has collapsed
EARLY_LOST_LOSS = 0.9  # of the lead of the loss before training: in the first half of a run, with all of the score's
HARMLESS_LOSS = 0.01  # of the score before training: about one view, of which the probe was fitted to all
LOSS_DECAY = 0.8  # per step, of the moving average of the loss
EXPLODED_RATIO = 2.0  # of the recent loss to a constant answer's
BARREN_EPOCHS = 2  # in a row, after which a lower rate is tried


class Collapsed(InputError):
    """Training has collapsed too often. `results` are the last good adapter's, whose files are complete."""

    def __init__(self, epoch: int, rate: float, good_epoch: int, adapter: Path, results: dict[str, Any]):
        remedy = "try a lower --learning-rate, --precision fp32 or --clip-grad-norm 1"
        kept = f"the adapter of epoch {good_epoch} is in {adapter}"
        super().__init__(f"training collapses in epoch {epoch} even at learning rate {rate:.1e}: {remedy}; {kept}")
        self.results = results


class GoBack(Exception):
    """The run is to go back to its last good state, and on at a lower rate. The message says why."""


class Guard:
    """Judges a run by its steps' losses, and after each epoch by its answers for some training images, `watched`."""

    def __init__(self, task: Task, train: LabelledImages, watched: LabelledImages, has_start=False, epochs=1):
        self.task = task
        self.epochs = epochs
        self.images = len(watched)
        self.has_start = has_start  # may the weights before training be kept?
        self.constant_score = task.constant_score(watched)
        self.constant_loss = task.constant_loss(train)
        self.first_loss: float | None = None  # of the first step: the loss before training
        self.recent_loss: float | None = None  # a moving average
        self.scores: list[float] = []  # before training, and after each epoch
        self.start_loss = math.inf  # of the watched images
        self.barren_epochs = 0  # in a row, lately
        self.retreats: list[dict[str, float]] = []
        self.lost_seconds = 0.0  # spent on epochs that were undone

    def note_start(self, worst_batch_loss: float | None, watched: Answers) -> None:
        """Note the answers before training, or anew for a head of another temperature; the loss if batches matter."""
        self.first_loss = self.recent_loss = worst_batch_loss
        self.scores = [watched.score]
        self.start_loss = watched.loss

    def note_step(self, loss: float) -> None:
        """Note the mean loss over the images of a step."""
        if self.first_loss is None and math.isfinite(loss):
            self.first_loss = self.recent_loss = loss
        self.recent_loss = LOSS_DECAY * (self.recent_loss or 0.0) + (1 - LOSS_DECAY) * loss

    def after_step(self) -> None:
        """Raise GoBack if the recent loss is above twice a constant answer's, or of the start if that is higher."""
        if not self.recent_loss <= EXPLODED_RATIO * max(self.constant_loss, self.first_loss or 0.0):  # which NaN is not
            raise GoBack("training collapsed")

    def after_epoch(self, trained: Answers, still_sure: bool | None = None) -> bool:
        """Did the epoch harm what the start knew, by the watched images? Raises GoBack if it is to be undone."""
        if self.has_collapsed(trained.score, trained.loss):
            raise GoBack("training collapsed")
        if not self.has_start:
            return False
        does_harm = trained.score < self.scores[0] - HARMLESS_LOSS
        if still_sure is not None:  # of images without labels: the others' score flatters the start, fitted to them
            does_harm = not still_sure or (does_harm and trained.loss >= self.start_loss)
        # Adapters may die without a collapse: two barren epochs in a row count, if later ones may hardly mend them.
        is_due = self.barren_epochs + 1 >= BARREN_EPOCHS and not self.is_early
        if self.task.per_pixel and trained.loss < self.start_loss:  # later epochs may mend it, if there are any
            is_due = len(self.scores) == self.epochs
        if len(self.retreats) < RETREATS and self.is_barren(trained, does_harm) and is_due:
            raise GoBack("training gains nothing")
        return does_harm

    def has_collapsed(self, score: float, loss: float) -> bool:
        """Has the score lost much of its best lead over a constant answer, by more than two standard errors?"""
        best = max(self.scores, default=0.0)
        # On very few images no loss is so large: there a constant answer's score, with a higher loss, counts as well.
        least = best - math.sqrt(self.task.variance(best, self.images))  # one that knows nothing may be just above it
        useless = least > self.constant_score >= score and loss > max(self.constant_loss, self.first_loss or 0)
        if useless or not math.isfinite(loss):
            return True
        if not self.is_early:
            return self._lost(score, LOST_SHARE, errors=2)
        # In the first half of a run a little that is left grows again: there it has lost all, and the loss nearly all.
        lost_loss = self.start_loss + EARLY_LOST_LOSS * (self.constant_loss - self.start_loss)
        return loss > lost_loss and self._lost(score, 1, errors=2)

    @property
    def is_early(self) -> bool:
        """Is the epoch in the first half of the run? Later ones mend what the first steps harm."""
        return 2 * len(self.scores) <= self.epochs

    def is_barren(self, trained: Answers, does_harm: bool) -> bool:
        """Does the epoch do harm, and has it no lower loss than the start? With masks the first is enough."""
        return does_harm and (self.task.per_pixel or trained.loss >= self.start_loss)

    def note_epoch(self, trained: Answers, does_harm: bool) -> None:
        self.scores.append(trained.score)
        self.barren_epochs = self.barren_epochs + 1 if self.is_barren(trained, does_harm) else 0

    def note_retreat(self, epoch: int, learning_rate: float, good_epochs: int, seconds: float) -> None:
        """Note that this epoch collapsed at this rate, and forget the undone epochs, which took these seconds."""
        self.lost_seconds += seconds
        self.retreats.append({"epoch": epoch, "learning_rate": learning_rate})
        self.scores = self.scores[: good_epochs + 1]
        self.recent_loss = self.first_loss
        self.barren_epochs = 0

    @property
    def is_recoverable(self) -> bool:
        """Is the present state good enough to go back to? The start is, and any that has lost next to no score."""
        if not self.scores:  # before a run has begun
            return True
        return self.barren_epochs == 0 and not self._lost(self.scores[-1], share=1 / 8, errors=1)

    def _lost(self, score: float, share: float, errors: float) -> bool:
        """Has the score lost this share of its best lead over a constant answer, and this many standard errors?"""
        best = max(self.scores, default=0.0)
        chance = errors * math.sqrt(2 * self.task.variance((best + score) / 2, self.images))
        return score < best - max((best - self.constant_score) * share, chance)

    def state_dict(self) -> dict[str, Any]:
        of_answers = attributes(self, "first_loss", "recent_loss", "scores", "start_loss", "barren_epochs")
        return of_answers | attributes(self, "retreats", "lost_seconds")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
