"""What a run learns, a task: what is minimised, what the outputs of the head mean, and a report on the answers."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit import NO_LABEL, choices, distributed
from toolkit.answers import evaluation, measures, probe
from toolkit.answers.answer_reports import Report, cell
from toolkit.images.bands import are_numbers
from toolkit.images.data import LabelledImages
from toolkit.images.masks import MaskReader, palette

VIEW_SMOOTHING = 0.02  # of the targets of training images, most of which may be answered right


@dataclass
class Answers:
    """The result of `Task.evaluate`. It has `targets` too. An `Evaluation` of a classification is alike."""

    MEASURED: ClassVar[tuple[str, ...]]  # the figures of metrics.csv, with val_ before them; the first is the score
    # By weights of the images (n, N) these figures, (n,), and maybe others of each class or label, (n, K), by name
    weighted: ClassVar[Callable[[Tensor], Mapping[str, Tensor]]]
    loss: float  # plain, the mean over images

    def figures(self) -> dict[str, Tensor]:
        """What `weighted` has, (), or (K,), of all images."""
        return {name: figure[0] for name, figure in self.weighted(torch.ones(1, len(self.targets))).items()}

    @property
    def score(self) -> float:
        return self.measured()[self.MEASURED[0]]

    def measured(self) -> dict[str, float]:
        return {name: figure.item() for name, figure in self.figures().items() if name in self.MEASURED}


@dataclass
class ColumnAnswers(Answers):
    """Answers to K questions on each image, each of which counts where its target is known."""

    values: Tensor  # (N, K)
    targets: Tensor  # (N, K), NaN where unknown

    def known(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each column the images of which it is known, (M,): their values, their targets, and which they are."""
        for values, targets in zip(self.values.T, self.targets.T, strict=True):
            images = (~targets.isnan()).nonzero().flatten()
            yield values[images], targets[images], images


class Task:
    """What is minimised, what outputs (N, K) of a head mean and how it starts. Annotated: what a derived class adds."""

    kind: str  # its name in --task, in adapter files and in the tables of toolkit/choices.py
    score: str  # the figure that judges a run, its report's first; columns of it begin with val_ or probe_
    score_title: str  # for people
    loss_title: str
    outputs_are: tuple[str, str]  # one of them, and several
    axis: tuple[float, str] = (100.0, " (%)")  # what scores are multiplied by in a picture, and their unit
    score_format = ".2%"
    predicted_into = "answers.csv"  # an --output of `deploy_lora.py predict`
    pipeline: str | None = None  # what the Hugging Face Hub calls it
    counts_images = False  # an answer, the highest output, is right or wrong: the score is the share of right ones
    activation = "softmax"  # of the outputs, or sigmoid, or none
    output_name = "logits"  # of what `output_layer` makes of the outputs
    recorded: tuple[str, ...] = ()  # what `record` has besides the kind: numbers for each output
    served: Mapping[str, str] = {}  # what a server has to know of the `record`, and how `usage` calls it
    probed_in_views = False  # is a probe of few images better if it sees several augmented views of each?
    always_calibrates = False  # also where the head's optimism is not known
    Report: type[Report]

    temperature = 1.0  # what the outputs were divided by at the end of the run
    thresholds: Tensor | None = None  # (K,), above which probabilities are answers
    masks: MaskReader | None = None  # reads the truth, where that is masks
    constant_logits: Tensor | float = 0.0  # what outputs have at an infinite temperature
    # Training images whose label the probe contradicts, as `choosing.contradicted` has them; None: it cannot tell
    contradicted: list[tuple[int, int, float]] | None = None

    # The task that the options of a run ask for: of the names of its outputs, the training images, and these options
    of_run: Callable[[Sequence[str], LabelledImages, Any], "Task"]
    loss: evaluation.Loss  # what is minimised
    plain_loss: evaluation.Loss  # without weights and smoothing: reported, and watched by the guard
    counts: Callable[[LabelledImages], Mapping[Any, int]]  # how many images say something about each output
    constant_loss: Callable[[LabelledImages], float]  # plain, of the best answer that is the same for all, an image
    constant_score: Callable[[LabelledImages], float]  # of such an answer
    answers: Callable[[Tensor, Tensor], Answers]  # of outputs and targets
    # Set the head to the linear probe of features, targets, views and clusters as `fit_linear_probe` takes them
    start: Callable[..., probe.Probe]
    # The temperature before training, by features and targets; do features train? See `probe.choose_temperature`
    first_temperature: Callable[[nn.Module, Tensor, Tensor, bool], probe.HeadTemperature]
    # The temperature of outputs with the smallest plain loss, by outputs, targets and a label smoothing that bounds it
    fitted_temperature: Callable[..., float]
    # A table of predictions, for outputs: what stands in each column, for each image
    columns: Callable[[Tensor], Mapping[str, Sequence[str]]]

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "Report"):
            cls.score, headline = next(iter(cls.Report.HEADLINES.items()))
            cls.score_title = headline.title
            cls.truth = choices.TRUTHS[cls.kind]
            cls.per_pixel = cls.kind in choices.PER_PIXEL

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self.best_by = choices.KEEP_BEST[self.kind]

    def to(self, device: torch.device) -> None:
        """Put what the loss needs onto the device."""

    def progress(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The `plain_loss` of a training batch, and its right answers; 0 if answers are not right or wrong."""
        loss = self.plain_loss(outputs, targets)
        if not self.counts_images:
            return loss, outputs.new_zeros(())
        return loss, (outputs.argmax(1) == targets).sum().float()

    def evaluate(self, model: nn.Module, loader: Iterable, device: torch.device, dtype=torch.float32) -> Answers:
        return self.answers(*evaluation.all_outputs(model, loader, device, dtype))

    def probe_score(self, model: nn.Module, features: Tensor, targets: Tensor) -> float:
        return self.answers(probe.head_outputs(model, features).cpu(), targets.cpu()).score

    def knn_score(self, train_features, train_targets, features, targets) -> float | None:
        """Of answers taken from the most similar training images; None: they say nothing."""

    def features(self, model, loader, device, dtype, images: int) -> tuple[Tensor, Tensor]:
        """What the head of `model` receives over a loader of this many images, (N, D), and the targets."""
        return evaluation.extract_features(model, loader, device, dtype)

    def variance(self, score: float, images: int) -> float:
        """The square of the standard error of a score that is measured on this many images: here a share's."""
        return score * (1 - score) / images

    @torch.no_grad()
    def soften(self, model: nn.Module, temperature: float) -> None:
        """Divide the head's weight and bias by a temperature: its answers stay, its confidence falls."""
        head = probe.linear_head(model)
        head.weight.div_(temperature)
        head.bias.sub_(self.constant_logits).div_(temperature).add_(self.constant_logits)
        distributed.broadcast([head.weight, head.bias])

    def softened(self, outputs: Tensor, temperature: float) -> Tensor:
        """What outputs (N, K) become where the head is softened so."""
        constant = torch.as_tensor(self.constant_logits, dtype=outputs.dtype, device=outputs.device)
        return torch.lerp(constant, outputs, 1 / temperature)

    def calibrate(self, outputs: Tensor, targets: Tensor, temperature: float) -> None:
        """Take a temperature, and choose all that depends on it by outputs for training views."""
        self.temperature = temperature

    def believable_temperature(self, outputs: Tensor, targets: Tensor, optimism: float | None) -> float:
        """What makes probabilities believable, by outputs for training views; 1 if the head's optimism is unknown."""
        if optimism is None:
            return 1.0
        return optimism * self.fitted_temperature(outputs, targets, VIEW_SMOOTHING)

    def record(self) -> dict[str, Any] | None:
        """What an adapter file says of the task: what `from_record` reads; None: it is classification."""
        return {"kind": self.kind} | {name: getattr(self, name).tolist() for name in self.recorded}

    @classmethod
    def from_record(cls, names: Sequence[str], record: Mapping[str, Any]) -> "Task":
        """The task that `record` described. Raises ValueError for anything else."""
        recorded = {}
        for field in cls.recorded:
            if not are_numbers(record.get(field), len(names)):
                raise ValueError("not a number for each output")
            recorded[field] = torch.tensor(record[field], dtype=torch.float64)
        return cls(names, **recorded)

    def chosen(self) -> dict[str, Any]:
        """What `calibrate` chose, for the metadata of an adapter file."""
        record = self.record()
        return {"temperature": self.temperature} | ({} if record is None else {"task": record})

    def take_chosen(self, metadata: Mapping[str, Any]) -> None:
        self.temperature = metadata["temperature"]
        for name in self.recorded:
            setattr(self, name, getattr(self, name).new_tensor(metadata["task"][name]))

    def table(self, outputs: Tensor) -> tuple[list[str], Iterable[Sequence[str]]]:
        """The titles of `columns`, and for each image what stands in them."""
        columns = self.columns(outputs)
        return list(columns), zip(*columns.values(), strict=True)

    def palette(self) -> np.ndarray:
        """The colours of the classes in masks and maps, (K, 3) from 0 to 1."""
        return palette(len(self.names), None if self.masks is None else self.masks.colours)

    def output_layer(self) -> nn.Module:
        """What an exported graph ends with, so that its outputs mean something by themselves."""
        if self.output_name == "probabilities":
            return {"softmax": nn.Softmax(1), "sigmoid": nn.Sigmoid()}[self.activation]
        return nn.Identity()

    def report(self, answers: Answers, clusters: Tensor | None = None) -> Report:
        """The report on answers, whose intervals are over clusters of images, as for `measures.share_interval`."""
        return self.Report(self, answers, clusters)

    @classmethod
    def reported(cls, score: float) -> str:
        return cell(score, cls.score_format) or "not defined"


class SoftmaxObjective(Task):
    """Cross-entropy of logits of K classes, weighted by (K,): of each image the mean over its label or known pixels."""

    outputs_are = ("class", "classes")

    def __init__(self, names: Sequence[str], class_weights: Tensor | None = None, label_smoothing: float = 0.0):
        super().__init__(names)
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing

    def to(self, device: torch.device) -> None:
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(device)

    def loss(self, outputs: Tensor, targets: Tensor, counts: Tensor | None = None) -> Tensor:
        """Summed over images, of which each counts as much as `counts` (N,) says. None: all alike."""
        losses = self.losses(outputs, targets, self.class_weights, self.label_smoothing)
        if counts is not None:  # else a GPU would start two more kernels in each step
            losses = losses * counts
        return losses.sum()

    def plain_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.losses(outputs, targets).sum()

    def losses(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None, smoothing=0.0) -> Tensor:
        """Of each image. What smoothing spreads counts by the true class's weight, not by those it goes to."""
        losses = F.cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing)
        if weights is not None:
            losses = losses * weights[targets.clamp_min(0)]
        known = (targets != NO_LABEL).reshape(len(targets), -1).sum(1).clamp_min(1)
        return losses.reshape(len(targets), -1).sum(1) / known

    def first_temperature(self, model, features, targets, features_train) -> probe.HeadTemperature:
        loss = functools.partial(F.cross_entropy, target=targets, label_smoothing=self.label_smoothing)
        return probe.choose_temperature(model, features, loss, features_train, self.constant_logits)

    def fitted_temperature(self, outputs, targets, smoothing=0.0) -> float:
        loss = functools.partial(F.cross_entropy, target=targets, label_smoothing=smoothing)
        return measures.fit_temperature(outputs, loss)
