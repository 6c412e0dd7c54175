"""When has training left the region in which the model knows something? A run then goes back and lowers its rate.

On MoCo v3 published LoRA collapses at a common learning rate (SNELL, NeurIPS 2024, table 2). A loss that is not finite
comes too late to tell: a collapsed classifier has a finite one, and answers as if it saw no image.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit import InputError

RETREATS, RETREAT_FACTOR = 3, 8.0  # how often a collapsed run goes back, and what divides its learning rate then
SETTLING_STEPS = 30  # after which 96% of a BatchNorm's running statistics are new, at its usual momentum


class Collapsed(InputError):
    """Training has collapsed too often. `results` are those of the last good adapter, whose files are all there."""

    def __init__(self, epoch: int, rate: float, good_epoch: int, adapter: Path, results: dict[str, Any]):
        super().__init__(
            f"training collapses in epoch {epoch} even at learning rate {rate:.1e}: try a lower --learning-rate, "
            "--precision fp32 or --clip-grad-norm 1; "
            f"the adapter of epoch {good_epoch} is in {adapter}"
        )
        self.results = results


class CollapseGuard:
    """Judges a run by its accuracies (0 to 1), of which the first is its linear probe's, or 0.

    Args:
        constant_accuracy: of always answering the most frequent class.
        images: on how many the accuracies are measured.
        norms_train: BatchNorm trains, so that nothing can be told until its statistics have followed the weights.
        all_train: the whole backbone does.
    """

    def __init__(self, constant_accuracy: float, images: int, norms_train: bool, all_train: bool = False):
        self.constant_accuracy, self.images, self.norms_train = constant_accuracy, images, norms_train
        self.all_train = all_train

    def has_collapsed(self, accuracy: float, earlier: Sequence[float], step: int) -> bool:
        """Is a quarter lost of what the best of the earlier ones is better than a constant answer? Not by chance?

        Where BatchNorm or the whole backbone trains it is a third: good runs lose more than a quarter at first as well.
        """
        share = 1 / 3 if self.norms_train or self.all_train else 1 / 4
        return self._settled(step) and self._lost(accuracy, earlier, share, errors=3)

    def is_good(self, accuracies: Sequence[float], step: int) -> bool:
        """Is the state after these epochs one to go back to? The start is, and one that has lost next to nothing."""
        if len(accuracies) == 1:
            return True
        return self._settled(step) and not self._lost(accuracies[-1], accuracies, share=1 / 8, errors=1)

    def _lost(self, accuracy: float, earlier: Sequence[float], share: float, errors: float) -> bool:
        """More than this share, and more than so many standard errors of the difference."""
        best = max(earlier)
        middle = (best + accuracy) / 2
        chance = errors * math.sqrt(2 * middle * (1 - middle) / self.images)
        return accuracy < best - max((best - self.constant_accuracy) * share, chance)

    def _settled(self, step: int) -> bool:
        return not self.norms_train or step >= SETTLING_STEPS
