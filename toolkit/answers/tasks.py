"""The tasks that there are, which of them a run has, and how its head starts."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from toolkit import InputError, choices
from toolkit.answers import probe
from toolkit.answers.classification import Classification
from toolkit.answers.multilabel import MultiLabel
from toolkit.answers.parts import VIEW_SMOOTHING, Answers, Task  # noqa: F401
from toolkit.answers.regression import Regression
from toolkit.answers.segmentation import Segmentation
from toolkit.answers.unlabelled import Start
from toolkit.images.sources import Splits

TASKS: Mapping[str, type[Task]] = {task.kind: task for task in (Classification, MultiLabel, Regression, Segmentation)}
SURE_IMAGES = 100  # of fewer the answers for overlaid ones say more of how sure a network may be than those for views


class Features(NamedTuple):
    training_images: tuple[Tensor, Tensor]  # features (N, D) and targets, as `Task.features` has them
    evaluation_images: tuple[Tensor, Tensor] | None = None  # None: they are not measured by
    augmented_views: tuple[Tensor, Tensor] | None = None  # for a probe: all images in one view, then in the next
    images_without_labels: tuple[Tensor, Tensor] | None = None  # which may know a better head than the probe

    def for_probe(self) -> tuple[Tensor, Tensor, int]:
        """Features and targets of training images and, behind them, of their views; and how often each is there."""
        rows, targets = map(torch.cat, zip(self.training_images, self.augmented_views, strict=True))
        return rows, targets, len(targets) // len(self.training_images[1])


def start_head(
    task: Task, model: nn.Module, features: Features, args: argparse.Namespace, clusters: Tensor | None
) -> tuple[dict[str, float | None], probe.HeadTemperature, Start | None]:
    """Make the head of `model` its linear probe (--head-init), and measure what the backbone knows before training.

    Returns the scores of k-NN (`knn`) and of the `probe` (None: not measured), the head's temperature, and what the
    images without labels say, if there are any. `clusters` are as for `toolkit.answers.probe.fit_linear_probe`.
    """
    train, queries, augmented, others = features
    baseline: dict[str, float | None] = {"knn": None, "probe": None}
    if queries is not None:
        baseline["knn"] = task.knn_score(*train, *queries)
    if args.head_init != "probe":
        return baseline, probe.HeadTemperature(), None
    rows, targets, views = features.for_probe()
    started = task.start(model, rows, targets, views, clusters)
    if queries is not None:
        baseline["probe"] = task.probe_score(model, *queries)
    found = None
    if others is not None:
        found = task.start_by_unlabelled(model, rows, targets, others[0], started, views, clusters)
        started = found.probe
    # A head that trains alone cannot harm the features.
    features_train = args.lora_rank > 0 or args.norms == "train" or not args.freeze_backbone
    temperature = task.first_temperature(model, *augmented, features_train)
    if started.held_out is not None:
        temperature = temperature._replace(optimism=optimism(task, model, *augmented))
    return baseline, temperature, found


def optimism(task: Task, model: nn.Module, features: Tensor, targets: Tensor) -> float:
    """How many times softer a probe has to be for unseen images than for training images, of views' features (N, D)."""
    # For unseen images it is as soft as it has to be: its strength was chosen by their loss, in cross-validation.
    return 1 / task.fitted_temperature(probe.head_outputs(model, features).cpu(), targets.cpu(), VIEW_SMOOTHING)


def task_of_run(args: argparse.Namespace, splits: Splits, device: torch.device) -> Task:
    task = TASKS[args.task].of_run(splits.class_names, splits.train, args)
    task.to(device)
    return task


def from_record(record: Any, names: Sequence[str], path: Any) -> Task:
    """The task that `Task.record` described, of outputs with these names. Raises InputError for anything else."""
    if record is None:
        record = {"kind": choices.DEFAULT_TASK}
    kind = record.get("kind") if isinstance(record, dict) else None
    task = TASKS.get(str(kind))
    if task is None:
        raise InputError(f"{path} is of another version of the toolkit, or damaged: its task is none of this one's")
    try:
        return task.from_record(names, record)
    except (TypeError, ValueError, IndexError, OverflowError):  # an InputError is a ValueError
        raise InputError(f"{path} is damaged: its record of {kind} does not fit its {len(names)} outputs") from None
