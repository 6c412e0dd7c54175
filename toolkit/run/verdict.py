"""What the result of a fine-tuning means, in plain words: what was gained, what limits it, and one next step.

It looks at the evaluation images: whoever follows it has used them, and a number to publish needs others.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from toolkit import typed
from toolkit.answers.parts import Task
from toolkit.models.checkpoints import value_at
from toolkit.run.output_folder import free_beside
from toolkit.run.training import column

FEW_IMAGES = 25  # of each class: up to this many, training hardly finds more than the probe does
OVERFITTED = 2.0  # of the evaluation's loss to the training's
ALMOST_PERFECT = 0.98  # a score at which both losses are so small that their ratio says nothing
RISING = 0.1  # of the whole gain, in the last quarter of the epochs
LOWERED = 1.5  # times: a learning rate that is worth a word
FEWEST_APART = 6  # images that more or fewer are right: with 5, McNemar's exact p is at least 1 / 16


class Verdict(NamedTuple):
    """What `results.json` has under `verdict`. `limits` may be empty."""

    gained: str
    limits: list[str]
    next_step: str


def judge(
    results: Mapping, history: Sequence[Mapping], task: Task | type[Task], images_per_class: float, places: Mapping
) -> Verdict:
    """Judge a finished run by the content of `results.json`, the rows of `metrics.csv`, and training images a class."""
    probe = results[f"probe_{task.score}_before"]
    lowered = results["learning_rate"] / results["head_learning_rate"]
    has_few = images_per_class <= FEW_IMAGES
    scores = column(history, f"val_{task.score}")
    is_rising = False
    if len(scores) >= 4 and probe is not None:
        earlier = max(scores[: -(len(scores) // 4)])
        is_rising = scores[-1] > probe and scores[-1] - earlier > RISING * (scores[-1] - probe)
    last = history[-1] if history else {"val_loss": 0.0, "train_loss": 0.0}
    has_room = (results[f"val_{task.score}"] or 0.0) < ALMOST_PERFECT  # None where it is not defined
    is_overfitted = has_room and last["val_loss"] > OVERFITTED * last["train_loss"]
    losses = f"loss {last['val_loss']:.2g} against {last['train_loss']:.2g}"
    why = "training collapsed, or gained nothing" if results.get("retreats") else "there are few training steps"
    limits = {
        f"few images, {images_per_class:.0f} of each {task.outputs_are[0]}": has_few,
        f"{why}: the learning rate was lowered to {100 / lowered:.2g}% of the one asked for": lowered > LOWERED,
        "few epochs: the score still rose at the end": is_rising,
        f"overfitting: evaluation images are answered far worse than training images ({losses})": is_overfitted,
    }

    gained, is_worse, may_be_chance = _compared(results, task, probe)
    is_photograph = task.truth == "class" and value_at(results, "normalization/scale") is None
    augmentation = value_at(results, "config/data/augmentation")  # affine: a flip would make another sign
    can_vary = is_photograph and augmentation not in ("trivial", "affine")
    again = "the same command with"
    longer = f"{again} --epochs {2 * max(1, results['epochs'])}"
    label = f"more labels, of those images that teach most: {typed('deploy')} choose {places['adapter']} "
    label += f"{places['unlabelled'] or 'new_images'} --output {free_beside(Path('to_label'))}"
    if places["labelled"]:
        label += f" --labelled {places['labelled']}"
    if value_at(results, "config/data/labels_per_class") is not None:
        label = "more of the labels that are there: the same command without --labels-per-class"
    if results["unlabelled"] is None:
        label += f"; or images without labels: {again} --unlabelled {places['unlabelled'] or 'FOLDER'}"
    lacks_labels = has_few and (may_be_chance or is_overfitted)
    can_search = "learning rate" not in results.get("chosen_by", {}) and results["unlabelled"] is None
    steps = [  # of which the first one that is due is taken
        (is_worse and lowered > LOWERED and not results.get("retreats"), longer),
        (is_worse and has_few and task.counts_images, label),  # too few to choose a rate by
        (is_worse and can_search, f"{again} --learning-rate auto"),
        (is_worse, f"{again} --learning-rate {results['learning_rate'] / 3:.0e}"),
        (lacks_labels and task.counts_images, label),
        (lacks_labels, "more labelled images"),
        (may_be_chance and not is_overfitted and probe != 1, longer),
        (is_rising, longer),
        (is_overfitted and can_vary, f"{again} --augmentation trivial"),
        (True, predict_command(task, places["adapter"])),
    ]
    next_step = next(step for is_due, step in steps if is_due)
    return Verdict(gained, [limit for limit, holds in limits.items() if holds], next_step)


def _compared(results: Mapping[str, Any], task: Task | type[Task], probe: float | None) -> tuple[str, bool, bool]:
    """The gain over the linear probe in words; is it a loss, beyond chance, and may it be chance?"""
    score = results[f"val_{task.score}"]
    if probe is None or score is None:  # not defined on these images, or there is no probe
        return "there are no scores of the run and of a linear probe to compare", False, False
    images = results["val_images"]
    factor, _ = task.axis
    points = " points" if factor == 100 else ""
    gain = f"{factor * (score - probe):+.2g}{points} against the linear probe"
    interval = results[f"val_{task.score}_interval"]
    if interval is None:
        return f"{gain}; there is no interval to judge it by", False, False
    low, high = interval
    if not task.counts_images:  # it was moved by the bias of the score, which the probe's has as well
        moved = score - (low + high) / 2
        low += moved
        high += moved
    is_slight = task.counts_images and round(abs(score - probe) * images) < FEWEST_APART
    if is_slight or low <= probe <= high:
        return f"{gain}, which may be chance with {images:,} evaluation images", False, True
    if probe > high:
        return f"{gain}: worse, beyond chance", True, False
    if "epoch" in results.get("chosen_by", {}):
        return f"{gain}, flattered: the evaluation images chose the epoch", False, False
    return f"{gain}, more than chance explains", False, False


def predict_command(task: Task | type[Task], adapter: str) -> str:
    return f"{typed('deploy')} predict {adapter} new_images --output {task.predicted_into}"
