"""What the result of a fine-tuning means, in plain words: what was gained, what limits it, and one next step.

It looks at the evaluation images: whoever follows it has used them, and a number to publish needs others.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from toolkit.answers.parts import Task
from toolkit.choices import TRUTHS
from toolkit.models.checkpoints import value_at

FEW_IMAGES = 25  # of each class: up to so many, training hardly finds more than the probe does
OVERFITTED = 2.0  # of the evaluation's loss to the training's
RISING = 0.1  # of the whole gain, in the last quarter of the epochs
LOWERED = 1.5  # times: a learning rate that is worth a word
FEWEST_APART = 6  # images that more or fewer are right: with 5, McNemar's exact p is at least 1 / 16


class Verdict(NamedTuple):
    """What `results.json` has under `verdict`. `limits` may be empty."""

    gained: str
    limits: list[str]
    next_step: str


def judge(
    results: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    task: Task | type[Task],
    images_per_class: float,
    adapter: str = "lora.pth",
) -> Verdict:
    """Judge a finished run by the content of `results.json`, the rows of `metrics.csv`, and training images a class."""
    score = task.score
    factor, _ = task.axis  # 100: differences are points
    probe = results[f"probe_{score}_before"]
    interval = results[f"val_{score}_interval"]
    chosen_by = results.get("chosen_by", {})
    is_rising = _rises([row[f"val_{score}"] for row in history], probe)
    is_overfitted = bool(history) and history[-1]["val_loss"] > OVERFITTED * history[-1]["train_loss"]
    lowered = results["learning_rate"] / results["head_learning_rate"]
    is_short = lowered > LOWERED and not results.get("retreats") and images_per_class > FEW_IMAGES

    limits = []
    if images_per_class <= FEW_IMAGES:
        limits.append(f"few images, {images_per_class:.0f} of each {task.outputs_are[0]}")
    if lowered > LOWERED:
        limits.append(f"a learning rate that was lowered {lowered:.0f}-fold")
    if is_rising:
        limits.append("few epochs: the score still rose at the end")
    if is_overfitted:
        limits.append("overfitting: the evaluation's loss is far above the training's")

    more = f"the same command with --epochs {2 * max(1, results['epochs'])}"
    augmentation = value_at(results, "config/data/augmentation")  # affine: a flip would make another sign
    can_vary = TRUTHS[task.kind] == "class" and value_at(results, "normalization/scale") is None  # photographs
    next_step = f"python deploy_lora.py predict {adapter} new_images --output {task.predicted_into}"
    if is_rising:
        next_step = more
    elif is_overfitted and can_vary and augmentation not in ("trivial", "affine"):
        next_step = "the same command with --augmentation trivial"
    if probe is None:
        return Verdict("there is no score of a linear probe to compare it with", limits, next_step)

    gained = results[f"val_{score}"] - probe
    gain = f"{factor * gained:+.2g}{' points' if factor == 100 else ''} against the linear probe"
    if interval is None:
        return Verdict(f"{gain}; there is no interval to judge it by", limits, next_step)
    low, high = interval
    if not task.counts_images:  # it was moved by the bias of the score, which that of the probe has as well
        moved = results[f"val_{score}"] - (low + high) / 2
        low, high = low + moved, high + moved
    elif round(abs(gained) * results["val_images"]) < FEWEST_APART:
        low, high = 0.0, 1.0
    if probe > high:
        next_step = "the same command with --learning-rate auto"
        if is_short:
            next_step = more
        elif "learning rate" in chosen_by:
            next_step = "the same command with --lora-rank 0 --freeze-backbone, without --use-qlora and --adapt-last"
        return Verdict(f"{gain}: worse, beyond chance", limits, next_step)
    if probe < low:
        is_flattered = "epoch" in chosen_by
        why = "flattered: the evaluation images chose the epoch" if is_flattered else "more than chance explains"
        return Verdict(f"{gain}, {why}", limits, next_step)
    if images_per_class <= FEW_IMAGES:
        more = "more labelled images"
        if task.counts_images:
            more = f"more labels, of those images that teach most: python deploy_lora.py choose {adapter} new_images "
            more += "--output to_label; or images without labels: the same command with --unlabelled FOLDER"
    elif is_overfitted or probe == 1:  # a longer run would be no better
        more = next_step
    return Verdict(f"{gain}, which may be chance with {results['val_images']:,} evaluation images", limits, more)


def _rises(scores: Sequence[float], probe: float | None) -> bool:
    """Whether the last quarter of the epochs has brought a good part of the gain."""
    if len(scores) < 4 or probe is None:
        return False
    earlier = max(scores[: -(len(scores) // 4)])
    return scores[-1] > probe and scores[-1] - earlier > RISING * (scores[-1] - probe)
