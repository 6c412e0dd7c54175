"""The parts of a task: an objective that is minimised, a head whose outputs are answers, and a report on these."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.answers import evaluation, probe
from toolkit.answers.answer_reports import Report
from toolkit.choices import KEEP_BEST, TRUTHS
from toolkit.images.bands import are_numbers
from toolkit.images.data import LabelledImages
from toolkit.images.masks import MaskReader

VIEW_SMOOTHING = 0.02  # of the targets of training images, most of which may be answered right


# The result of a task's `evaluate`: `loss`, the mean plain loss of an image, `targets`, `score`, and `measured()`,
# figures by the names in the task's `measured`.
Answers = Any


@dataclass
class ColumnAnswers:
    """Answers to K questions on each image, each of which counts where its target is known."""

    MEASURED: ClassVar[tuple[str, ...]]  # the names of the figures, of which the first is the score
    # Of weights of the images (n, N): a row of these figures, and maybe others, for each; of None: their one row
    figures: ClassVar[Callable[..., Tensor]]
    loss: float
    values: Tensor  # (N, K)
    targets: Tensor  # (N, K), NaN where unknown

    @property
    def score(self) -> float:
        return self.figures()[0].item()

    def measured(self) -> dict[str, float]:
        return dict(zip(self.MEASURED, self.figures().tolist(), strict=False))

    def known(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each column the images of which it is known, (M,): their values, their targets, and which they are."""
        for values, targets in zip(self.values.T, self.targets.T, strict=True):
            images = (~targets.isnan()).nonzero().flatten()
            yield values[images], targets[images], images


class Objective:
    """What training minimises, for outputs (N, K) and a loader's targets. Annotated: what a derived class adds."""

    loss: evaluation.Loss  # what is minimised
    plain_loss: evaluation.Loss  # without weights and smoothing: reported, and watched by the guard
    constant_logits: Tensor | float = 0.0  # what outputs have at an infinite temperature
    counts: Callable[[LabelledImages], Mapping[Any, int]]  # how many images say something about each output
    constant_loss: Callable[[LabelledImages], float]  # plain, of the best answer that is the same for all, an image

    def hits(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The number of right answers, for a progress bar; 0 if answers are not right or wrong."""
        return outputs.new_zeros(())

    def progress(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The figures of a training batch: `plain_loss` and `hits`."""
        return self.plain_loss(outputs, targets), self.hits(outputs, targets).float()

    def to(self, device: torch.device) -> None:
        """Put what the loss needs onto the device."""


class SoftmaxObjective(Objective):
    """Cross-entropy of logits of K classes, weighted by (K,): of each image the mean over its label or known pixels."""

    def __init__(self, class_weights: Tensor | None = None, label_smoothing: float = 0.0):
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing

    def to(self, device: torch.device) -> None:
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.cross_entropy(outputs, targets, self.class_weights, self.label_smoothing)

    def plain_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.cross_entropy(outputs, targets, None, 0.0)

    def cross_entropy(self, outputs: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
        """Summed over images. What smoothing spreads counts by the true class's weight, not by those it goes to."""
        losses = F.cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing)
        if weights is not None:
            losses = losses * weights[targets.clamp_min(0)]
        known = (targets != evaluation.NO_LABEL).reshape(len(targets), -1).sum(1).clamp_min(1)
        return (losses.reshape(len(targets), -1).sum(1) / known).sum()


class Head:
    """What the K outputs of a head mean, and how it starts. Annotated: what a derived class adds."""

    temperature = 1.0  # what the outputs were divided by at the end of the run
    activation = "softmax"  # of the outputs, or sigmoid, or none
    served: Mapping[str, str] = {}  # what a server has to know of the `record`, and how `usage` calls it
    thresholds: Tensor | None = None  # (K,), above which probabilities are answers
    masks: MaskReader | None = None  # reads the truth, where that is masks
    always_calibrates = False  # also where the head's optimism is not known
    # Training images whose label the probe contradicts, as `choosing.contradicted` has them; None: it cannot tell
    contradicted: list[tuple[int, int, float]] | None = None
    output_name = "logits"  # of what `output_layer` makes of the outputs
    answers: Callable[[Tensor, Tensor], Answers]  # of outputs and targets
    constant_score: Callable[[LabelledImages], float]  # of the best answer that is the same for all images
    # Set the head to the linear probe of features, targets, views and clusters as `fit_linear_probe` takes them
    start: Callable[..., probe.Probe]
    # A table of predictions, for outputs: what stands in each column, for each image
    columns: Callable[[Tensor], Mapping[str, Sequence[str]]]

    def __init__(self, names: Sequence[str], objective: Any):
        self.names = list(names)
        self.objective = objective

    def evaluate(self, model: nn.Module, loader: Iterable, device: torch.device, dtype=torch.float32) -> Answers:
        """The answers of a model over a loader."""
        return self.answers(*evaluation.all_outputs(model, loader, device, dtype))

    def score(self, model: nn.Module, features: Tensor, targets: Tensor) -> float | None:
        """Of the head's answers for features; None: ask `evaluate`."""

    def knn_score(self, train_features, train_targets, features, targets) -> float | None:
        """Of answers taken from the most similar training images; None: they say nothing."""

    def features(self, model, loader, device, dtype, images: int) -> tuple[Tensor, Tensor]:
        """What the head of `model` receives over a loader of this many images, (N, D), and the targets."""
        return evaluation.extract_features(model, loader, device, dtype)

    def variance(self, score: float, images: int) -> float:
        """The square of the standard error of a score that is measured on this many images: here a share's."""
        return score * (1 - score) / images

    def first_temperature(self, model, features, targets, features_train: bool) -> probe.HeadTemperature:
        """The temperature before training, by features, which are to train or not: see `choose_temperature`."""
        loss = functools.partial(F.cross_entropy, target=targets, label_smoothing=self.objective.label_smoothing)
        return probe.choose_temperature(model, features, loss, features_train)

    def soften(self, model: nn.Module, temperature: float) -> None:
        probe.soften_head(model, temperature, self.objective.constant_logits)

    def fitted_temperature(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> float | None:
        """What divides outputs for the smallest plain loss, bounded by smoothing; None if they are no probabilities."""

    def calibrate(self, outputs: Tensor, targets: Tensor, optimism: float | None) -> None:
        """Choose the temperature, and all that depends on it: see `believable_temperature`."""
        self.temperature = self.believable_temperature(outputs, targets, optimism)

    def believable_temperature(self, outputs: Tensor, targets: Tensor, optimism: float | None) -> float:
        """What makes probabilities believable, by outputs for training views; 1 if the head's optimism is unknown."""
        views = None if optimism is None else self.fitted_temperature(outputs, targets, VIEW_SMOOTHING)
        return 1.0 if views is None else optimism * views

    def record(self) -> dict[str, list[float]]:
        """What an adapter file has to say of the head: numbers for each output, by name."""
        return {}

    def restore(self, record: Mapping[str, list[float]]) -> None:
        """Take what `record` once said of choices."""

    def output_layer(self) -> nn.Module:
        """What an exported graph ends with, so that its outputs mean something by themselves."""
        return nn.Identity()


class Task:
    """An objective, a head and a report, under one name. The methods that a loop needs are its own, too."""

    kind: str  # its name in --task, in adapter files and in the tables of toolkit/choices.py
    score: str  # the name of the score that judges a run, higher is better; its columns begin with val_ or probe_
    score_title: str  # for people
    measured: tuple[str, ...]  # the names in `Answers.measured`; columns of metrics.csv, with val_ before them
    loss_title: str
    outputs_are: tuple[str, str]  # one of them, and several
    axis: tuple[float, str] = (100.0, " (%)")  # what scores are multiplied by in a picture, and their unit
    score_format = ".2%"
    predicted_into = "answers.csv"  # an --output of `deploy_lora.py predict`
    pipeline: str | None = None  # what the Hugging Face Hub calls it
    counts_images = False  # an answer, the highest output, is right or wrong: the score is the share of right ones
    recorded: tuple[str, ...] = ()  # what `Head.record` has: numbers for each output
    Report: type[Report]
    # The task that the options of a run ask for: of the names of its outputs, the training images, and these options
    of_run: Callable[[Sequence[str], LabelledImages, Any], "Task"]

    def __init__(self, objective: Objective, head: Head):
        self.objective = objective
        self.head = head
        self.names = head.names
        self.best_by = KEEP_BEST[self.kind]
        self.truth = TRUTHS[self.kind]
        self.per_pixel = self.truth == "mask"
        self.loss = objective.loss
        self.plain_loss = objective.plain_loss
        self.progress = objective.progress
        self.evaluate = head.evaluate

    @classmethod
    def from_record(cls, names: Sequence[str], record: Mapping[str, Any]) -> "Task":
        """The task that `record` described. Raises ValueError for anything else."""
        recorded = {}
        for field in cls.recorded:
            if not are_numbers(record.get(field), len(names)):
                raise ValueError("not a number for each output")
            recorded[field] = torch.tensor(record[field], dtype=torch.float64)
        return cls(names, **recorded)

    def table(self, outputs: Tensor) -> tuple[list[str], Iterable[Sequence[str]]]:
        """The columns of a table of predictions (`Head.columns`), and for each image what stands in them."""
        columns = self.head.columns(outputs)
        return list(columns), zip(*columns.values(), strict=True)

    def record(self) -> dict[str, Any] | None:
        """What an adapter file says of the task: what `from_record` reads; None: it is classification."""
        return {"kind": self.kind, **self.head.record()}

    def chosen(self) -> dict[str, Any]:
        """What `Head.calibrate` chose, for the metadata of an adapter file."""
        record = self.record()
        return {"temperature": self.head.temperature} | ({} if record is None else {"task": record})

    def take_chosen(self, metadata: Mapping[str, Any]) -> None:
        """Take what `Head.calibrate` once chose, from the metadata of an adapter file."""
        self.head.temperature = metadata["temperature"]
        self.head.restore(metadata.get("task") or {})

    def report(self, answers: Answers, clusters: Tensor | None = None) -> Report:
        """The report on answers, whose intervals are over clusters of images, as for `measures.share_interval`."""
        return self.Report(self.head, answers, clusters)

    @classmethod
    def reported(cls, score: float) -> str:
        """A score as people read it."""
        return "not defined" if score != score else f"{score:{cls.score_format}}"  # NaN is not itself
