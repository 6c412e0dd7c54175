"""What the outputs of a head mean: one class for each image, several labels, or numbers.

A `Task` answers all that a run asks about it: the loss, how the head starts, the one score by which a run is judged,
the measures of its answers, and how they look in a table. To add a task, derive a class from `Task`
and put it into TASKS.
"""

import argparse
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit import InputError
from toolkit.answers import evaluation, measures, probe
from toolkit.images.data import LabelledImages, Splits


class Answers(Protocol):
    """The result of a task's `evaluate`."""

    loss: float  # the mean plain loss of an image
    targets: Tensor

    @property
    def score(self) -> float: ...

    def measured(self) -> dict[str, float]:
        """Figures by the names in the task's `measured`."""


TOP = 5  # classes of each image in a table of predictions
THRESHOLD = 0.5  # above which probability a label is an answer, where no better one is known
VIEW_SMOOTHING = 0.02  # of the targets of training images, most of which may be answered right
SURE_IMAGES = 500  # from so many on a temperature fitted in cross-validation says more than that it should be 1
UNSURE = "unsure"  # in a table of predictions, for what is too uncertain to be an answer


class Task:
    """The interface of a task. Outputs are float32 (N, K); targets come from the loader beside the images.

    Args:
        names: of the K outputs.
    """

    kind: str
    score: str  # the name of the score that judges a run, higher is better; its columns begin with val_ or probe_
    score_title: str  # for people
    measured: tuple[str, ...]  # the names in `Evaluation.measured`; columns of metrics.csv, with val_ before them
    best_by: Mapping[str, str]  # the values of --keep-best, and the column that each means
    loss_title: str
    temperature = 1.0  # what the head's outputs were divided by at the end of the run

    def __init__(self, names: Sequence[str]):
        self.names = list(names)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss that is minimised, summed over images."""
        raise NotImplementedError

    def plain_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss without weights and smoothing, which is reported and which the guard watches."""
        raise NotImplementedError

    def hits(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The number of right answers, for a progress bar; 0 if answers are not right or wrong."""
        return outputs.new_zeros(())

    def progress(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The figures of a training batch: `plain_loss` and `hits`."""
        return self.plain_loss(outputs, targets), self.hits(outputs, targets).float()

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images, and their targets; nothing is mixed by default."""
        return images, targets

    def evaluate(
        self, model: nn.Module, loader: Iterable, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Answers:
        """The answers of a model over a loader."""
        raise NotImplementedError

    def knn_score(self, bank: Tensor, bank_targets: Tensor, features: Tensor, targets: Tensor) -> float:
        """The score of answers taken from the most similar training images, by features (N, D)."""
        raise NotImplementedError

    def start_head(
        self, model: nn.Module, features: Tensor, targets: Tensor, views: int = 1, clusters: Tensor | None = None
    ) -> probe.Probe:
        """Set the head to the linear probe of features (views * N, D), and return it.

        Args:
            clusters: as for `toolkit.answers.probe.fit_linear_probe`.
        """
        raise NotImplementedError

    def head_score(self, model: nn.Module, features: Tensor, targets: Tensor) -> float:
        """The score of the head's answers for features (N, D)."""
        raise NotImplementedError

    def head_temperature(
        self, model: nn.Module, features: Tensor, targets: Tensor, features_train: bool
    ) -> probe.HeadTemperature:
        """The temperature of the head before training: `toolkit.answers.probe.choose_temperature`."""
        raise NotImplementedError

    def soften_head(self, model: nn.Module, temperature: float) -> None:
        probe.soften_head(model, temperature)

    def fitted_temperature(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> float | None:
        """What outputs are to be divided by for the smallest plain loss; None if the task has no probabilities.

        Args:
            smoothing: what share of each target is spread over all answers. It bounds the confidence in images that
                are all answered right.
        """

    def calibrate(self, outputs: Tensor, targets: Tensor, optimism: float | None) -> None:
        """Choose the temperature, and all that depends on it, by outputs for views of training images.

        Args:
            optimism: `HeadTemperature.optimism`; None: the temperature stays 1.
        """
        views = None if optimism is None else self.fitted_temperature(outputs, targets, VIEW_SMOOTHING)
        self.temperature = 1.0 if views is None else optimism * views

    def chosen(self) -> dict[str, Any]:
        """What `calibrate` chose, for the metadata of an adapter file."""
        record = self.record()
        return {"temperature": self.temperature} | ({} if record is None else {"task": record})

    def counts(self, images: LabelledImages) -> Mapping[Any, int]:
        """How many training images say something about each output: for `toolkit.run.training.kept_share`."""
        raise NotImplementedError

    def constant_score(self, images: LabelledImages) -> float:
        """The score of the best answer that is the same for all images."""
        raise NotImplementedError

    def constant_loss(self, images: LabelledImages) -> float:
        """The plain loss of the best answer that is the same for all images, for one image."""
        raise NotImplementedError

    def variance(self, score: float, images: int) -> float:
        """The square of the standard error of a score that is measured on so many images."""
        raise NotImplementedError

    axis: tuple[float, str] = (100.0, " (%)")  # what scores are multiplied by in a picture, and their unit
    outputs_are: str  # for people

    def told(self, score: float) -> str:
        """A score as people read it."""
        return f"{score:.2%}"

    def table(self, outputs: Tensor, abstain: float | None = None) -> tuple[list[str], Iterable[Sequence[str]]]:
        """The columns of a table of predictions, and for each image what stands in them.

        Args:
            abstain: an answer whose probability is below this is none, but unsure, if the task passes
                `check_abstain`; None: all are answers.
        """
        raise NotImplementedError

    def check_abstain(self) -> None:
        """Raises InputError if the task's answers have no probability, or its names no room for `UNSURE`."""

    output_name = "logits"  # of what `output_layer` makes of the outputs

    def output_layer(self) -> nn.Module:
        """What an exported graph ends with, so that its outputs mean something by themselves."""
        return nn.Identity()

    def to(self, device: torch.device) -> "Task":
        """Put what the loss needs onto the device; returns the task."""
        return self

    def record(self) -> dict[str, Any] | None:
        """What an adapter file says of the task: what `from_record` reads; None: it is classification."""
        return {"kind": self.kind}


# ----------------------------------------------------------------------------------------------------------------------
# One class an image


class Classification(Task):
    """Softmax and cross-entropy; judged by the accuracy.

    Args:
        class_weights: (K,), how much each class's images count in the loss; None: 1.
        mixing: mixup, CutMix, or both; None: nothing is mixed.
    """

    kind = "classification"
    score = "accuracy"
    score_title = "accuracy"
    loss_title = "cross-entropy"
    outputs_are = "classes"
    measured = ("accuracy", "balanced_accuracy", "macro_f1")
    best_by = evaluation.BEST_BY

    def __init__(
        self,
        names: Sequence[str],
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
        mixing: evaluation.BatchMixing | None = None,
    ):
        super().__init__(names)
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing
        self.mixing = mixing

    def to(self, device: torch.device) -> "Classification":
        self.class_weights = None if self.class_weights is None else self.class_weights.to(device)
        return self

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of logits (N, K) and labels (N,), or (N, K) if mixed."""
        how = {"reduction": "sum", "label_smoothing": self.label_smoothing}
        return F.cross_entropy(outputs, targets, self.class_weights, **how)

    def plain_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="sum")

    def hits(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return evaluation.count_right(outputs, targets)

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return (images, targets) if self.mixing is None else self.mixing(images, targets)

    def evaluate(self, model, loader, device, dtype=torch.float32) -> evaluation.Evaluation:
        return evaluation.evaluate(model, loader, device, dtype, self.temperature)

    def knn_score(self, bank, bank_targets, features, targets) -> float:
        return evaluation.knn_accuracy(bank, bank_targets, features, targets)

    def start_head(self, model, features, targets, views=1, clusters=None) -> probe.Probe:
        weights = "none" if self.class_weights is None else "balanced"
        return probe.init_head_from_probe(model, features, targets, views, weights, clusters)

    def head_score(self, model, features, targets) -> float:
        return probe.head_accuracy(model, features, targets)

    def head_temperature(self, model, features, targets, features_train) -> probe.HeadTemperature:
        def loss(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

        return probe.choose_temperature(model, features, loss, features_train)

    def fitted_temperature(self, outputs, targets, smoothing=0.0) -> float:
        def loss(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)

        return measures.fit_temperature(outputs, loss)

    def table(self, outputs: Tensor, abstain: float | None = None) -> tuple[list[str], Iterator[list[str]]]:
        """The most probable classes and their probabilities. With `abstain` the last column is the likeliest class."""
        probabilities, classes = outputs.softmax(1).topk(min(TOP, len(self.names)))  # (N, classes) -> (N, TOP)
        columns = ["class", "probability"]
        for place in range(2, probabilities.shape[1] + 1):
            columns += [f"class_{place}", f"probability_{place}"]

        def rows() -> Iterator[list[str]]:
            for shares, numbers in zip(probabilities.tolist(), classes.tolist(), strict=True):
                pairs = zip(shares, numbers, strict=True)
                cells = [cell for share, n in pairs for cell in (self.names[n], f"{share:.4f}")]
                if abstain is not None:
                    cells.append(cells[0])
                    cells[0] = UNSURE if shares[0] < abstain else cells[0]
                yield cells

        return columns if abstain is None else [*columns, "likeliest"], rows()

    def check_abstain(self) -> None:
        if UNSURE in self.names:
            raise InputError(f"--abstain: the adapter has a class called {UNSURE}, which would mean two things")

    def counts(self, images: LabelledImages) -> Counter:
        return Counter(images.labels)

    def constant_score(self, images: LabelledImages) -> float:
        return max(Counter(images.labels).values()) / len(images)

    def constant_loss(self, images: LabelledImages) -> float:
        shares = [count / len(images) for count in Counter(images.labels).values()]
        return -sum(share * math.log(share) for share in shares)

    def variance(self, score: float, images: int) -> float:
        return score * (1 - score) / images

    def record(self) -> None:
        return None  # a file without a task is of this one


# ----------------------------------------------------------------------------------------------------------------------
# Several labels an image


@dataclass
class LabelAnswers:
    """Answers to several questions of yes and no for each image.

    Only images of which a label is known count for it. A label of which no image is a positive, or for AUROC all are,
    has no figure (NaN) and no share in the mean.
    """

    loss: float  # binary cross-entropy, the mean over images and labels; unknown labels have none
    probabilities: Tensor  # (N, K)
    targets: Tensor  # (N, K): 1, 0, or NaN where unknown
    before: Tensor | None = None  # (N, K), the probabilities before calibration, if there was one

    @property
    def score(self) -> float:
        return self.macro()[0].item()

    def measured(self) -> dict[str, float]:
        macro_ap, macro_auroc = self.macro().tolist()
        return {"macro_ap": macro_ap, "micro_ap": self.micro_average_precision().item(), "macro_auroc": macro_auroc}

    def reliability(self, before: bool = False) -> Tensor:
        """`toolkit.answers.measures.calibration` over all labels of all images, after calibration or before."""
        known = ~self.targets.isnan()
        probabilities = self.before if before else self.probabilities
        return measures.calibration(probabilities[known], self.targets[known])

    def by_label(self, weights: Tensor | None = None) -> Tensor:
        """AP and AUROC of each label, (2, K), or (n, 2, K) for weights of the images (n, N)."""
        figures = []
        for scores, positive, images in self._known():
            figures.append(measures.Ranking(scores, positive, images).figures(weights))
        return torch.stack(figures, -1)

    def macro(self, weights: Tensor | None = None) -> Tensor:
        """The means of AP and AUROC over the labels that have one, (2,) or (n, 2)."""
        return self.by_label(weights).nanmean(-1)

    def micro_average_precision(self, weights: Tensor | None = None) -> Tensor:
        """All labels of all images in one ranking."""
        known = ~self.targets.isnan()
        images = torch.arange(len(known))[:, None].expand_as(known)[known]
        return measures.Ranking(self.probabilities[known], self.targets[known], images).figures(weights)[..., 0]

    def f1(self, thresholds: Tensor, weights: Tensor | None = None) -> Tensor:
        """The F1 of each label, whose answer is a probability above its threshold; NaN for one without positives."""
        answers = (self.probabilities > thresholds) & ~self.targets.isnan()
        positive = self.targets.nan_to_num()
        found = measures.f1(answers, positive, weights)
        return found.where(measures.weighted_sum(positive.double(), weights) > 0, torch.nan)

    def macro_f1(self, thresholds: Tensor, weights: Tensor | None = None) -> Tensor:
        """The mean over the labels that have positives."""
        return self.f1(thresholds, weights).nanmean(-1)

    def micro_f1(self, thresholds: Tensor, weights: Tensor | None = None) -> Tensor:
        """Over all labels of all images."""
        answers = (self.probabilities > thresholds) & ~self.targets.isnan()
        return measures.micro_f1(answers, self.targets.nan_to_num(), weights)

    def best_thresholds(self) -> Tensor:
        """The threshold of each label that has the highest F1 here, (K,)."""
        return torch.tensor([measures.best_threshold(scores, positive) for scores, positive, _ in self._known()])

    def positives(self) -> Tensor:
        """How many images have each label, (K,)."""
        return self.targets.nansum(0).long()

    def unknown(self) -> Tensor:
        """How many images do not say whether they have each label, (K,)."""
        return self.targets.isnan().sum(0)

    def _known(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Scores and targets of each label, and the images of which it is known."""
        for scores, targets in zip(self.probabilities.T, self.targets.T, strict=True):
            known = ~targets.isnan()
            yield scores[known], targets[known], known.nonzero().flatten()


class MultiLabel(Task):
    """A sigmoid and a binary cross-entropy for each label, none where it is unknown; judged by macro AP.

    Args:
        targets: of the training images, (N, K): 1, 0, or NaN where unknown.
        balanced: of each label its positives count as much as its negatives, together as much as they all did.
        mixup: alpha of mixup; 0: none. A label that one of the two images does not know is unknown.
        thresholds: (K,), above which probabilities labels are answers.
    """

    kind = "multilabel"
    score = "macro_ap"
    score_title = "macro AP"
    loss_title = "binary cross-entropy"
    outputs_are = "labels"
    measured = ("macro_ap", "micro_ap", "macro_auroc")
    best_by: Mapping[str, str] = {"macro-ap": "val_macro_ap", "micro-ap": "val_micro_ap", "auroc": "val_macro_auroc"}

    def __init__(
        self,
        names: Sequence[str],
        targets: Tensor | None = None,
        balanced: bool = False,
        mixup: float = 0.0,
        thresholds: Tensor | None = None,
    ):
        super().__init__(names)
        self.mixup, self.balanced = mixup, balanced
        self.thresholds = torch.full((len(names),), THRESHOLD) if thresholds is None else thresholds
        targets = torch.full((1, len(names)), math.nan) if targets is None else targets
        known, positive = (~targets.isnan()).sum(0), targets.nansum(0)
        self.positives = positive  # (K,)
        self.shares = positive / known.clamp_min(1)
        both = torch.stack([known - positive, positive])
        self.weights = (known / (2 * both)).where(both.amin(0) > 0, 1.0) if balanced else torch.ones(2, len(names))
        odds = self.weights * (both + 0.5)
        self.constant_logits = (odds[1] / odds[0]).log()

    def to(self, device: torch.device) -> "MultiLabel":
        self.weights, self.constant_logits = self.weights.to(device), self.constant_logits.to(device)
        return self

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over all K labels of an image, where unknown ones count 0; summed over images."""
        # A share of a mixed image weighs as much of a positive as it is one.
        weights = torch.lerp(self.weights[0], self.weights[1], targets.nan_to_num())
        return self._summed(outputs, targets, weights)

    def plain_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._summed(outputs, targets, None)

    @staticmethod
    def _summed(outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        known = ~targets.isnan()
        losses = F.binary_cross_entropy_with_logits(outputs, targets.nan_to_num(), weights, reduction="none")
        return losses.masked_fill(~known, 0).sum() / outputs.shape[1]

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return mixed(images, targets, self.mixup)

    def evaluate(self, model, loader, device, dtype=torch.float32) -> LabelAnswers:
        outputs, targets = evaluation.all_outputs(model, loader, device, dtype)
        before = None if self.temperature == 1 else self._tempered(outputs, 1 / self.temperature).sigmoid()
        return LabelAnswers(self.plain_loss(outputs, targets).item() / len(targets), outputs.sigmoid(), targets, before)

    def knn_score(self, bank, bank_targets, features, targets) -> float:
        return LabelAnswers(0.0, neighbours_say(bank, bank_targets, features).cpu(), targets.cpu()).score

    def start_head(self, model, features, targets, views=1, clusters=None) -> probe.Probe:
        weights = self.weights if self.balanced else None
        return probe.set_head(model, probe.fit_one_vs_rest(features, targets, views, weights, clusters))

    @torch.no_grad()
    def head_score(self, model, features, targets) -> float:
        return LabelAnswers(0.0, probe.head_outputs(model, features).cpu(), targets.cpu()).score

    def head_temperature(self, model, features, targets, features_train) -> probe.HeadTemperature:
        def loss(logits: Tensor) -> Tensor:
            return self.loss(logits, targets)

        return probe.choose_temperature(model, features, loss, features_train, self.constant_logits)

    def soften_head(self, model: nn.Module, temperature: float) -> None:
        probe.soften_head(model, temperature, self.constant_logits)

    def _tempered(self, outputs: Tensor, temperature: float) -> Tensor:
        """What a head that is softened so gives in the place of outputs."""
        return torch.lerp(self.constant_logits.to(outputs.device), outputs, 1 / temperature)

    def fitted_temperature(self, outputs, targets, smoothing=0.0) -> float:
        constant = self.constant_logits.to(outputs.device)
        smoothed = torch.lerp(targets, torch.full_like(targets, 0.5), smoothing).double()

        def loss(distances: Tensor) -> Tensor:
            return self.plain_loss(distances + constant, smoothed) / len(targets)

        return measures.fit_temperature(outputs - constant, loss)

    def calibrate(self, outputs, targets, optimism) -> None:
        """The thresholds are those with the highest F1 on these views."""
        super().calibrate(outputs, targets, optimism)
        probabilities = self._tempered(outputs, self.temperature).sigmoid()
        self.thresholds = LabelAnswers(0.0, probabilities, targets).best_thresholds()

    def table(self, outputs: Tensor, abstain: float | None = None) -> tuple[list[str], Iterator[list[str]]]:
        """The labels whose probability is above their threshold, and the probability of each label.

        With `abstain` a label is unsure, and in a column of its own, if the answer on it, yes or no, is less probable.
        """
        probabilities = outputs.sigmoid()
        said = probabilities > self.thresholds
        unsure = torch.where(said, probabilities, 1 - probabilities) < (abstain or 0.0)

        def named(chosen: Tensor) -> list[str]:
            return [",".join(itertools.compress(self.names, row)) for row in chosen.tolist()]

        columns = {"labels": named(said & ~unsure)} | ({} if abstain is None else {UNSURE: named(unsure)})
        for name, shares in zip(self.names, probabilities.T.tolist(), strict=True):
            columns[f"{name} probability"] = [f"{share:.4f}" for share in shares]
        return list(columns), zip(*columns.values(), strict=True)

    output_name = "probabilities"

    def output_layer(self) -> nn.Module:
        return nn.Sigmoid()

    def counts(self, images: LabelledImages) -> Mapping[int, int]:
        return dict(enumerate(images.targets.nansum(0).long().tolist()))

    def constant_score(self, images: LabelledImages) -> float:
        targets = images.targets
        return LabelAnswers(0.0, torch.zeros_like(targets), targets).score

    def constant_loss(self, images: LabelledImages) -> float:
        targets = images.targets
        known, positive = (~targets.isnan()).sum(0), targets.nansum(0)
        share = positive / known.clamp_min(1)
        entropies = torch.special.entr(share) + torch.special.entr(1 - share)
        return (known * entropies).sum().item() / targets.numel()

    def variance(self, score: float, images: int) -> float:
        """Each label's AP is about as sure as a share of its positives, and the labels' are independent."""
        seen = self.shares[self.positives > 0]
        if not len(seen):
            return math.inf
        return score * (1 - score) * (1 / (images * seen).clamp_min(1)).mean().item() / len(seen)

    def record(self) -> dict[str, Any]:
        return {"kind": self.kind, "thresholds": self.thresholds.tolist()}


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


@dataclass
class NumberAnswers:
    """Answers that are K numbers for each image, in their own units; only known ones count."""

    loss: float  # squared error, in units of the training images' standard deviations
    answers: Tensor  # (N, K)
    targets: Tensor  # (N, K), NaN where unknown

    @property
    def score(self) -> float:
        return self.mean("r2").item()

    def measured(self) -> dict[str, float]:
        names = {"r2": "r2", "mae": "mean_absolute_error", "rmse": "root_mean_squared_error", "spearman": "spearman"}
        return {name: self.mean(measure).item() for name, measure in names.items()}

    def by_number(self, measure: str, weights: Tensor | None = None) -> Tensor:
        """A function of `toolkit.answers.measures` for each number, (K,), or (draws, K) for a bootstrap's weights."""
        function, found = vars(measures)[measure], []
        for answers, targets in zip(self.answers.T, self.targets.T, strict=True):
            known = ~targets.isnan()
            counts = None if weights is None else weights[:, known]
            found.append(function(answers[known], targets[known], counts))
        return torch.stack(found, -1)

    def mean(self, measure: str, weights: Tensor | None = None) -> Tensor:
        """The mean over the numbers that have a figure."""
        return self.by_number(measure, weights).nanmean(-1)


class Regression(Task):
    """Numbers, by the squared error of what is left when the training images' mean and spread are taken out.

    Args:
        targets: of the training images, (N, K), NaN where unknown; or give mean and std, (K,).
        mixup: alpha of mixup; 0: none.

    Raises:
        InputError: a number is the same for all training images, or known of fewer than two.
    """

    kind = "regression"
    score = "r2"
    score_title = "R2"
    loss_title = "squared error (standardised)"
    axis, outputs_are = (1.0, ""), "numbers"
    measured = ("r2", "mae", "rmse", "spearman")
    best_by: Mapping[str, str] = {"r2": "val_r2", "spearman": "val_spearman"}

    def __init__(
        self,
        names: Sequence[str],
        targets: Tensor | None = None,
        mixup: float = 0.0,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ):
        super().__init__(names)
        self.mixup = mixup
        self.mean, self.std = (mean, std) if targets is None else self._standard(targets)

    def _standard(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = [], []
        for name, column in zip(self.names, targets.double().T, strict=True):
            known = column[~column.isnan()]
            if len(known) < 2 or known.min() == known.max():
                raise InputError(f"the number {name} is the same in all training images: there is nothing to learn")
            mean.append(known.mean())
            std.append(known.std(correction=0))
        return torch.stack(mean).float(), torch.stack(std).float()

    def to(self, device: torch.device) -> "Regression":
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def standardised(self, targets: Tensor) -> Tensor:
        return (targets - self.mean.to(targets.device)) / self.std.to(targets.device)

    def in_units(self, outputs: Tensor) -> Tensor:
        return outputs * self.std.to(outputs.device) + self.mean.to(outputs.device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over all K numbers of an image, where unknown ones count 0; summed over images."""
        wanted = self.standardised(targets)
        errors = (outputs - wanted.nan_to_num()).square().masked_fill(wanted.isnan(), 0)
        return errors.sum() / outputs.shape[1]

    plain_loss = loss

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return mixed(images, targets, self.mixup)

    def evaluate(self, model, loader, device, dtype=torch.float32) -> NumberAnswers:
        outputs, targets = evaluation.all_outputs(model, loader, device, dtype)
        return NumberAnswers(self.loss(outputs, targets).item() / len(targets), self.in_units(outputs), targets)

    def knn_score(self, bank, bank_targets, features, targets) -> float:
        return NumberAnswers(0.0, neighbours_say(bank, bank_targets, features).cpu(), targets.cpu()).score

    def start_head(self, model, features, targets, views=1, clusters=None) -> probe.Probe:
        return probe.set_head(model, probe.fit_ridge(features, self.standardised(targets), views, clusters))

    @torch.no_grad()
    def head_score(self, model, features, targets) -> float:
        answers = self.in_units(probe.head_outputs(model, features))
        return NumberAnswers(0.0, answers.cpu(), targets.cpu()).score

    def head_temperature(self, model, features, targets, features_train) -> probe.HeadTemperature:
        return probe.HeadTemperature()  # a softer head would answer other numbers

    def check_abstain(self) -> None:
        raise InputError("--abstain: numbers have no probability that could be too low")

    def table(self, outputs: Tensor, abstain: float | None = None) -> tuple[list[str], Iterator[list[str]]]:
        """The numbers."""
        rows = ([f"{number:.6g}" for number in numbers] for numbers in self.in_units(outputs).tolist())
        return list(self.names), rows

    output_name = "numbers"

    def output_layer(self) -> nn.Module:
        return InUnits(self.mean, self.std)

    def counts(self, images: LabelledImages) -> Mapping[int, int]:
        return dict(enumerate((~images.targets.isnan()).sum(0).tolist()))

    def told(self, score: float) -> str:
        return f"{score:.3f}"

    def constant_score(self, images: LabelledImages) -> float:
        return 0.0

    def constant_loss(self, images: LabelledImages) -> float:
        targets = self.standardised(images.targets)
        return self.plain_loss(targets.nanmean(0).expand_as(targets), images.targets).item() / len(images)

    def variance(self, score: float, images: int) -> float:
        """Of R2 from many images (Olkin and Finn, Psychological Bulletin 118, 1995, table 1)."""
        share = min(1.0, max(0.0, score))
        return 4 * share * (1 - share) ** 2 / images

    def record(self) -> dict[str, Any]:
        return {"kind": self.kind, "mean": self.mean.tolist(), "std": self.std.tolist()}


class InUnits(nn.Module):
    """Standardised outputs (N, K) -> numbers in their own units."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, outputs: Tensor) -> Tensor:
        return outputs * self.std + self.mean


# ----------------------------------------------------------------------------------------------------------------------
# What both share


def mixed(images: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """mixup (arXiv 1710.09412) with targets (N, K): each image with the one before it, by one share for the batch.

    A batch that stands in for a missing one, of which nothing is known, stays as it is.
    """
    if alpha == 0 or targets.isnan().all():
        return images, targets
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    return tuple(torch.lerp(of.roll(1, 0), of, share) for of in (images, targets))


NEIGHBOURS, NEIGHBOUR_TEMPERATURE = 20, 0.07  # as `toolkit.answers.evaluation.knn_accuracy`


def neighbours_say(bank: Tensor, targets: Tensor, features: Tensor) -> Tensor:
    """The mean targets (N, K) of the most similar features of a bank, weighted as in k-NN; unknown ones left out.

    Where all are unknown it is the bank's mean.
    """
    bank, found = F.normalize(bank.float(), dim=1), []
    known, values = (~targets.isnan()).float(), targets.nan_to_num()
    mean = values.sum(0) / known.sum(0).clamp_min(1)
    for queries in features.float().split(1024):
        similarity = F.normalize(queries, dim=1) @ bank.T
        nearest = similarity.topk(min(NEIGHBOURS, len(bank)), dim=1)
        votes = ((nearest.values - 1) / NEIGHBOUR_TEMPERATURE).exp()[..., None]  # (B, k, 1)
        told, weight = (votes * values[nearest.indices]).sum(1), (votes * known[nearest.indices]).sum(1)
        found.append(torch.where(weight > 0, told / weight, mean))
    return torch.cat(found)


def start_head(
    task: Task,
    model: nn.Module,
    features: list[tuple[Tensor, Tensor]],
    args: argparse.Namespace,
    clusters: Tensor | None = None,
) -> tuple[dict[str, float | None], probe.HeadTemperature]:
    """Measure what the backbone knows before training, and make the head of `model` its linear probe (--head-init).

    Args:
        features: of training images, of evaluation images and, for a probe, of augmented training images, (N, D) each,
            with their targets.
        clusters: of the training images, as for `toolkit.answers.probe.fit_linear_probe`.

    Returns:
        The scores of k-NN and of the probe (None without one), by `baseline_keys`, and what to divide the head's
        logits by.
    """
    bank, queries, *augmented = features
    of_knn, of_probe = baseline_keys(task)
    baseline = {of_knn: task.knn_score(*bank, *queries), of_probe: None}
    if args.head_init != "probe":
        return baseline, probe.HeadTemperature()
    both = [torch.cat(views) for views in zip(bank, *augmented, strict=True)]
    started = task.start_head(model, *both, views=2, clusters=clusters)
    baseline[of_probe] = task.head_score(model, *queries)
    # A head that trains alone cannot harm the features.
    features_train = args.lora_rank > 0 or args.norms == "train" or not args.freeze_backbone
    temperature = task.head_temperature(model, *augmented[0], features_train)
    if started.held_out is not None:
        temperature = temperature._replace(optimism=optimism(task, model, started.held_out, *augmented[0]))
    return baseline, temperature


def optimism(task: Task, model: nn.Module, held_out: Tensor, features: Tensor, targets: Tensor) -> float:
    """How much softer the head of `model`, a probe, has to be for unseen images than for its training images: a factor.

    What training does to the confidence shows in training images alone, and in those it is too high, by a factor
    that was measured here. The temperature of a trained head is that factor times the one that fits its training views.

    The probe's strength was chosen by the loss of these held-out answers, so that their temperature is about 1: few
    images say less than that.

    Args:
        held_out: `Probe.held_out` for the images and for their views, (2 N, K), of which at least one is known.
        features: (N, D), of the views.
        targets: of the images.
    """
    targets, views = targets.cpu(), probe.head_outputs(model, features).cpu()
    known = held_out.isfinite().all(1)
    unseen = task.fitted_temperature(held_out[known], torch.cat([targets, targets])[known])
    unseen **= len(targets) / (len(targets) + SURE_IMAGES)
    return unseen / task.fitted_temperature(views, targets, VIEW_SMOOTHING)


def baseline_keys(task: Task | type[Task]) -> tuple[str, str]:
    """What the scores of k-NN and of the linear probe are called."""
    return f"knn_{task.score}", f"probe_{task.score}"


TASKS: Mapping[str, type[Task]] = {task.kind: task for task in (Classification, MultiLabel, Regression)}


def task_of_run(args: argparse.Namespace, splits: Splits, device: torch.device) -> Task:
    """What the options ask for, with what the training images say of it."""
    names = splits.class_names
    train = splits.train
    balanced = args.class_weights == "balanced"
    if args.task == "multilabel":
        return MultiLabel(names, train.targets, balanced, args.mixup).to(device)
    if args.task == "regression":
        return Regression(names, train.targets, args.mixup).to(device)
    weights = evaluation.balanced_weights(Counter(train.labels), len(names)) if balanced else None
    mixing = evaluation.BatchMixing(args.mixup, len(names))
    return Classification(names, weights, args.label_smoothing, mixing).to(device)


def from_record(record: Any, names: Sequence[str], path: Any) -> Task:
    """The task that `Task.record` described, of outputs with these names. Raises InputError for anything else."""
    if record is None:
        return Classification(names)
    kind = record.get("kind") if isinstance(record, dict) else None
    fields = {"multilabel": ("thresholds",), "regression": ("mean", "std")}.get(str(kind))
    if fields is None:
        raise InputError(f"{path} is of another version of the toolkit, or damaged: its task is none of this one's")
    values = [record.get(field) for field in fields]
    for value in values:
        numbers = isinstance(value, list) and all(isinstance(number, float) for number in value)
        if not numbers or len(value) != len(names) or not all(map(math.isfinite, value)):
            raise InputError(f"{path} is damaged: {' or '.join(fields)} of its task is not a number for each output")
    return TASKS[kind](names, **dict(zip(fields, map(torch.tensor, values), strict=True)))
