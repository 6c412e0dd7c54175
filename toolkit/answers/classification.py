"""One class an image: softmax and cross-entropy, judged by the accuracy."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit import InputError
from toolkit.answers import evaluation, measures, probe
from toolkit.answers.answer_reports import (
    Headline,
    Report,
    calibration_figures,
    calibration_rows,
    finite,
    reliability_section,
    right_of,
)
from toolkit.answers.evaluation import Evaluation
from toolkit.answers.parts import UNSURE, Head, Objective, Task, mixed
from toolkit.answers.report_page import drawn, html_picture, html_table, new_figure, save_figure
from toolkit.images.data import LabelledImages

TOP = 5  # classes of each image in a table of predictions
WRITTEN_OUT = 20  # classes up to which a confusion matrix has names and numbers
MOST_ROWS = 1_000  # of a confusion matrix
CONFUSIONS = 30  # rows in the table of what is taken for what
WRONG_SHOWN = 12  # pictures of mistakes.png
UNCERTAIN_SHOWN = 6


class ClassObjective(Objective):
    """Cross-entropy of logits (N, K) and labels (N,), or (N, K) if mixed.

    Args:
        class_weights: (K,), how much each class's images count; None: 1.
        mixup: alpha of mixup; 0: nothing is mixed.
    """

    def __init__(self, classes: int, class_weights: Tensor | None, label_smoothing: float, mixup: float):
        self.classes = classes
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing
        self.mixup = mixup

    def to(self, device: torch.device) -> None:
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            outputs, targets, self.class_weights, reduction="sum", label_smoothing=self.label_smoothing
        )

    def plain_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="sum")

    def hits(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return evaluation.count_right(outputs, targets)

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        shares = F.one_hot(targets.clamp_min(0), self.classes).float()
        shares[targets == evaluation.NO_LABEL] = torch.nan
        mixed_images, mixed_shares = mixed(images, shares, self.mixup)
        if mixed_shares is shares:  # nothing is mixed
            return images, targets
        return mixed_images, mixed_shares

    def counts(self, images: LabelledImages) -> Counter:
        return Counter(images.labels)

    def constant_loss(self, images: LabelledImages) -> float:
        loss = 0.0
        for count in Counter(images.labels).values():
            share = count / len(images)
            loss -= share * math.log(share)
        return loss


class ClassHead(Head):
    """Logits of K classes."""

    def __init__(self, names: Sequence[str], objective: ClassObjective):
        super().__init__(names)
        self.objective = objective

    def evaluate(self, model, loader, device, dtype=torch.float32) -> Evaluation:
        return evaluation.evaluate(model, loader, device, dtype, self.temperature)

    def score(self, model, features, targets) -> float:
        return probe.head_accuracy(model, features, targets)

    def knn_score(self, train_features, train_targets, features, targets) -> float:
        return evaluation.knn_accuracy(train_features, train_targets, features, targets)

    def constant_score(self, images: LabelledImages) -> float:
        return max(Counter(images.labels).values()) / len(images)

    def variance(self, score: float, images: int) -> float:
        return score * (1 - score) / images

    def start(self, model, features, targets, views=1, clusters=None) -> probe.Probe:
        weights = "none" if self.objective.class_weights is None else "balanced"
        return probe.init_head_from_probe(model, features, targets, views, weights, clusters)

    def first_temperature(self, model, features, targets, features_train) -> probe.HeadTemperature:
        def loss(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits, targets, label_smoothing=self.objective.label_smoothing)

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
        if abstain is not None:
            columns.append("likeliest")

        def rows() -> Iterator[list[str]]:
            for shares, numbers in zip(probabilities.tolist(), classes.tolist(), strict=True):
                cells = []
                for share, number in zip(shares, numbers, strict=True):
                    cells += [self.names[number], f"{share:.4f}"]
                if abstain is not None:
                    cells.append(cells[0])
                    if shares[0] < abstain:
                        cells[0] = UNSURE
                yield cells

        return columns, rows()

    def check_abstain(self) -> None:
        if UNSURE in self.names:
            raise InputError(f"--abstain: the adapter has a class called {UNSURE}, which would mean two things")


class ClassReport(Report):
    """The report on an `Evaluation`."""

    picture = "confusion_matrix.png"
    HEADLINES: Mapping[str, Headline] = {
        "accuracy": Headline("accuracy"),
        "balanced_accuracy": Headline("balanced accuracy"),
        "macro_f1": Headline("macro F1"),
    }

    def __init__(self, head: ClassHead, answers: Evaluation, clusters: Tensor | None = None):
        super().__init__(head, answers, clusters)
        self.measure_headlines(self._headlines)
        self.headlines[0] = answers.accuracy
        self.intervals[0] = measures.share_interval(answers.labels == answers.predictions, clusters)

    def _headlines(self, weights: Tensor) -> Tensor:
        means = measures.by_rows(self.answers.class_means, weights, len(self.answers.labels))
        return torch.cat([means[:, :1], means], 1)  # of the accuracy there is a better interval

    def figures(self) -> dict[str, Any]:
        answers = self.answers
        right, images, _ = answers.class_counts(len(self.names))
        shares = map(finite, (right / images).tolist())  # None for a class without images
        return {
            **self.headline_figures(),
            **calibration_figures(self.head.temperature, answers),
            "accuracy_per_class": dict(zip(self.names, shares, strict=True)),
        }

    def title(self) -> str:
        return f"{self.answers.accuracy:.2%} of {len(self.answers.labels)} images right"

    def rows(self) -> list[tuple[str, str]]:
        accuracy, balanced, f1 = self.headlines
        return [
            ("accuracy", right_of(accuracy, len(self.answers.labels), self.intervals[0])),
            ("balanced over classes", f"{balanced:.2%}, macro F1 {f1:.2%}"),
            *calibration_rows(self.head.temperature, self.answers),
        ]

    def printed(self) -> list[tuple[str, str]]:
        rows = [(name, f"{right} of {images} right") for name, images, right, _ in self.by_class()]
        return self.shortened("by class", "the worst first:", rows)

    def sections(self, picture: Path) -> list[str]:
        return [
            "<h2>What is taken for what</h2>",
            html_picture(picture.read_bytes(), "answers by true class"),
            html_table(self.most_confused(), ("true class", "taken for", "images", "of the class")),
            "<h2>By class</h2>",
            html_table(self.by_class(), ("class", "images", "right", "share")),
            *reliability_section(self.answers),
        ]

    def by_class(self) -> list[tuple[str, int, int, str]]:
        """(class, images, right answers, their share), the worst first; classes without images last."""
        right, images, _ = self.answers.class_counts(len(self.names))
        shares = (right / images).nan_to_num(2.0)
        rows = []
        for i in shares.argsort(stable=True).tolist():
            share = f"{shares[i]:.1%}" if images[i] else "no images"
            rows.append((self.names[i], int(images[i]), int(right[i]), share))
        return rows

    def most_confused(self) -> list[tuple[str, str, int, str]]:
        """The most frequent wrong answers: (true class, answer, images, share of the class)."""
        answers = self.answers
        wrong = answers.labels != answers.predictions
        pairs = torch.stack([answers.labels[wrong], answers.predictions[wrong]], 1)
        found, images = pairs.unique(dim=0, return_counts=True)  # not all pairs: they are the square of the classes
        totals = answers.labels.bincount(minlength=len(self.names))
        rows = []
        for place in images.argsort(descending=True, stable=True)[:CONFUSIONS].tolist():
            true, answer = found[place].tolist()
            count = int(images[place])
            rows.append((self.names[true], self.names[answer], count, f"{count / int(totals[true]):.1%}"))
        return rows

    def draw(self, path: Path) -> None:
        """The confusion matrix: rows are true classes, columns answers. Up to 20 classes have names and numbers.

        Of more than 1,000 classes, neighbours are counted as one: the picture would have no room for all.
        """
        from matplotlib.ticker import MaxNLocator
        from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

        answers = self.answers
        size = math.ceil(len(self.names) / MOST_ROWS)
        groups = range(math.ceil(len(self.names) / size))
        matrix = confusion_matrix(answers.labels // size, answers.predictions // size, labels=groups)
        side = min(12, 3 + 0.4 * len(self.names))
        figure = new_figure(side + 0.8, side)
        axes = figure.subplots()
        if len(self.names) <= WRITTEN_OUT:
            rotation = 45 if max(map(len, self.names)) > 3 else "horizontal"
            display = ConfusionMatrixDisplay(matrix, display_labels=[drawn(name) for name in self.names])
            display.plot(ax=axes, cmap="Blues", xticks_rotation=rotation)
        else:
            ConfusionMatrixDisplay(matrix).plot(ax=axes, include_values=False, cmap="Blues")
            axes.xaxis.set_major_locator(MaxNLocator(20, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(20, integer=True))
        axes.set_title(self.title() + (f", {size} classes per row" if size > 1 else ""))
        save_figure(figure, path)

    def mistakes(self) -> dict[str, list[tuple[int, str]]]:
        """The wrong answers that were given with most confidence, and the right ones with least."""
        answers = self.answers
        wrong = answers.predictions != answers.labels
        ranked = answers.confidences.argsort(descending=True, stable=True)

        def described(images: Tensor) -> list[tuple[int, str]]:
            found = []
            for i in images.tolist():
                name = self.names[answers.labels[i]]
                if wrong[i]:
                    name += f", taken for {self.names[answers.predictions[i]]}"
                found.append((i, f"{name} {answers.confidences[i]:.0%}"))
            return found

        return {
            "Wrong, most confident first": described(ranked[wrong[ranked]][:WRONG_SHOWN]),
            "Right, least confident first": described(ranked[~wrong[ranked]].flip(0)[:UNCERTAIN_SHOWN]),
        }

    def answer_columns(self) -> dict[str, Sequence[Any]]:
        answers = self.answers
        return {
            "class": [self.names[i] for i in answers.labels.tolist()],
            "answer": [self.names[i] for i in answers.predictions.tolist()],
            "probability": [f"{share:.6f}" for share in answers.confidences.tolist()],
        }


class Classification(Task):
    """One class an image.

    Args:
        names: of the K classes.
        class_weights, label_smoothing, mixup: as for `ClassObjective`.
    """

    kind = "classification"
    score = "accuracy"
    score_title = "accuracy"
    loss_title = "cross-entropy"
    outputs_are = ("class", "classes")
    measured = ("accuracy", "balanced_accuracy", "macro_f1")
    best_by: Mapping[str, str] = {"accuracy": "val_accuracy", "balanced": "val_balanced_accuracy", "f1": "val_macro_f1"}
    Report = ClassReport

    def __init__(
        self,
        names: Sequence[str],
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
    ):
        objective = ClassObjective(len(names), class_weights, label_smoothing, mixup)
        super().__init__(objective, ClassHead(names, objective))

    def record(self) -> None:
        return None  # a file without a task is of this one
