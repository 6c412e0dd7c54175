"""Which weights of a fine-tuning run are evaluated, and on which images."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from toolkit.answers import evaluation
from toolkit.answers.tasks import Answers, Task
from toolkit.run import optim
from toolkit.run.collapse import SHARE_DIVISORS, CollapseGuard, EpochCollapsed
from toolkit.run.feeding import Feed


class Evaluator:
    """Evaluates a network with the weights that are saved, not those that train, and BatchNorm statistics for them.

    Args:
        network: takes what the feed yields: images, or cached features.
        average: holds the weights that are saved.
        task: defines what the answers are.
        write_statistics: gives the BatchNorms of a network that follow its adapters their statistics.
    """

    def __init__(
        self,
        network: nn.Module,
        feed: Feed,
        average: optim.WeightAverage,
        task: Task,
        device: torch.device,
        dtype: torch.dtype,
        write_statistics: Callable[[nn.Module], None],
    ):
        self.network = network
        self.feed = feed
        self.average = average
        self.task = task
        self.device = device
        self.dtype = dtype
        self.write_statistics = write_statistics

    def evaluate(self, batches: Iterable) -> Answers:
        """Evaluate batches with the weights that the model has now."""
        return self.task.evaluate(self.network, batches, self.device, self.dtype)

    def validate(self, watched: Callable[[Iterable], Iterable] = iter) -> Answers:
        """Evaluate the evaluation images. `watched` wraps their batches, to check for stop requests between them."""
        with self.averaged():
            return self.evaluate(watched(self.feed.val_loader))

    def watch(self) -> Answers:
        """Evaluate the collapse guard's training images, in the same augmented views each time."""
        with self.averaged():
            return self.evaluate(self.feed.watched_views())

    def calibrate(self, model: nn.Module, optimism: float | None, divided_by: float = 1.0) -> bool:
        """Make the probabilities of `model` believable, by training images: divide its head's outputs by a temperature.

        For several labels it also chooses the thresholds above which they are answers. False where there is nothing
        to do: for numbers, and for classes if the head did not start as a probe.

        Args:
            optimism: see `toolkit.answers.tasks.optimism`; None: not known, and the temperature is 1.
            divided_by: the temperature of an earlier calibration, which is undone first.
        """
        if self.task.kind == "regression" or (self.task.kind == "classification" and optimism is None):
            return False
        self.task.soften_head(model, 1 / divided_by)
        views = self.feed.calibration_views()
        outputs, targets = evaluation.all_outputs(self.network, views, self.device, self.dtype)
        self.task.calibrate(outputs, targets, optimism)
        self.task.soften_head(model, self.task.temperature)
        return True

    def judge(self, guard: CollapseGuard, may_shrink: bool) -> float:
        """The score on the guard's images after an epoch.

        Args:
            may_shrink: lower the WiSE-FT share if the images are answered worse than before training.

        Raises:
            EpochCollapsed: the training has collapsed, or learns nothing.
        """
        self.average.share = self.average.wise_ft_alpha
        watched = self.watch()
        if guard.has_collapsed(watched.score, watched.loss):
            raise EpochCollapsed
        if may_shrink and self.average.start:
            self.shrink_to_sound_share(guard, watched.score)
            if guard.learns_nothing(self.average.share, watched.loss):
                raise EpochCollapsed("training gains nothing")
        return watched.score

    def shrink_to_sound_share(self, guard: CollapseGuard, score: float) -> None:
        """Lower the WiSE-FT share until the guard's images are answered as well as before training."""
        for divisor in SHARE_DIVISORS:
            if not guard.is_below_start(score):
                return
            self.average.share = self.average.wise_ft_alpha / divisor
            score = self.watch().score

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this block the model has the weights that are saved, and BatchNorm statistics for them."""
        with self.average.in_place():
            self.estimate_statistics()
            yield

    def estimate_statistics(self) -> bool:
        """Give BatchNorms that train or follow adapters the statistics for the present weights. Does any train?"""
        self.write_statistics(self.network)
        if self.feed.statistics_loader is None:
            return False
        evaluation.estimate_statistics(self.network, self.feed.statistics_loader, self.device, self.dtype)
        return True

    def worst_batch_loss(self) -> float | None:
        """The highest loss of a batch of the guard's images; None if no BatchNorm makes losses depend on the batch."""
        if self.feed.statistics_loader is None:
            return None
        views, loss = self.feed.watched_views(), self.task.plain_loss
        return evaluation.worst_batch_loss(self.network, views, self.device, self.dtype, loss)
