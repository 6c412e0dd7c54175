"""One class an image: softmax and cross-entropy, judged by the accuracy."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.answers import answer_reports, choosing, evaluation, measures, parts, probe, report_page
from toolkit.answers.answer_reports import PICTURES, Headline, Report, finite, worst_first
from toolkit.answers.unlabelled import Start, last_head, seen, start
from toolkit.images.data import LabelledImages

TOP = 5  # classes of each image in a table of predictions
MOST_ROWS = 1_000  # of a confusion matrix
CONFUSIONS = 30  # rows in the table of what is taken for what


class ClassReport(Report):
    picture = "confusion_matrix.png"
    HEADLINES: Mapping[str, Headline] = {
        "accuracy": Headline("accuracy"),
        "balanced_accuracy": Headline("balanced accuracy"),
        "macro_f1": Headline("macro F1"),
    }

    def __init__(self, task: parts.Task, answers: evaluation.Evaluation, clusters: Tensor | None = None):
        super().__init__(task, answers, clusters)
        hits = answers.labels == answers.predictions
        self.found["accuracy"] = [measures.Figure(answers.accuracy, measures.share_interval(hits, clusters))]
        classes = len(self.names)
        self.right = answers.labels[hits].bincount(minlength=classes).double()  # of each class
        self.images = answers.labels.bincount(minlength=classes).double()
        self.shares = self.right / self.images  # NaN for a class without images
        independent = self.images * (int(self.clusters.max()) + 1) / len(self.clusters)
        is_there = self.images > 0
        low, high = measures.mean_interval(self.shares[is_there], independent[is_there])
        # Where a class has all right, leaving out images of it changes nothing, and yet its share is not sure.
        [balanced] = self.found["balanced_accuracy"]
        interval = min(low, balanced.interval[0]), max(high, balanced.interval[1])
        self.found["balanced_accuracy"] = [balanced._replace(interval=interval)]

    def figures(self) -> dict[str, Any]:
        by_class = {"accuracy_per_class": dict(zip(self.names, map(finite, self.shares.tolist()), strict=True))}
        return super().figures() | by_class

    def rows(self) -> Iterator[tuple[str, str]]:
        accuracy, balanced, f1 = self.headlines()
        images = len(self.answers.labels)
        digits = int(images >= 200)  # more would be chance's own
        chance = answer_reports.interval_text(*accuracy.interval, f".{digits}%")
        yield "accuracy", f"{round(accuracy.value * images):,} of {images:,} images, {accuracy.value:.2%} ({chance})"
        yield "balanced over classes", f"{balanced.value:.2%}, macro F1 {f1.value:.2%}"
        yield from self.calibration_rows()

    def printed(self) -> Iterator[tuple[str, str]]:
        rows = [(name, f"{right} of {images} right") for name, images, right, _ in self.by_class()]
        return answer_reports.shortened("by class", "the worst first:", rows)

    def sections(self, picture: Path) -> list[str]:
        matrix = report_page.html_picture(picture.read_bytes(), "answers by true class")
        confused = report_page.html_table(self.most_confused(), ("true class", "taken for", "images", "of the class"))
        by_class = report_page.html_table(self.by_class(), ("class", "images", "right", "share"))
        return ["<h2>What is taken for what</h2>", matrix, confused, "<h2>By class</h2>", by_class]

    def by_class(self) -> Iterator[tuple[str, int, int, str]]:
        """(class, images, right answers, their share), the worst first; classes without images last."""
        for i in worst_first(self.shares):
            share = f"{self.shares[i]:.1%}" if self.images[i] else "no images"
            yield self.names[i], int(self.images[i]), int(self.right[i]), share

    def most_confused(self) -> Iterator[tuple[str, str, int, str]]:
        """The most frequent wrong answers: (true class, answer, images, share of the class)."""
        both = torch.stack([self.answers.labels, self.answers.predictions], 1)
        wrong = both[both[:, 0] != both[:, 1]]
        for (true, answer), count in Counter(map(tuple, wrong.tolist())).most_common(CONFUSIONS):
            yield self.names[true], self.names[answer], count, f"{count / self.images[true]:.1%}"

    def draw(self, path: Path) -> None:
        """The confusion matrix. Of more than 1,000 classes, neighbours are counted as one: it has no room for all."""
        size = math.ceil(len(self.names) / MOST_ROWS)
        groups = math.ceil(len(self.names) / size)
        pairs = groups * (self.answers.labels // size) + self.answers.predictions // size
        matrix = pairs.bincount(minlength=groups**2).view(groups, groups).numpy()
        per_row = f", {size} classes per row" if size > 1 else ""
        answer_reports.plot_confusion(matrix, self.names, self.title() + per_row, path)

    def mistakes(self) -> Iterator[tuple[int, str]]:
        *_, predictions, labels, confidences = self.answers
        ranked = confidences.argsort(descending=True, stable=True)
        wrong = ranked[predictions[ranked] != labels[ranked]]
        for i in wrong[:PICTURES].tolist():
            yield i, f"{self.names[labels[i]]}, taken for {self.names[predictions[i]]} ({confidences[i]:.0%})"

    def answer_columns(self) -> dict[str, Sequence[Any]]:
        return {
            "class": list(map(self.names.__getitem__, self.answers.labels.tolist())),
            "answer": list(map(self.names.__getitem__, self.answers.predictions.tolist())),
            "probability": list(map("{:.6f}".format, self.answers.confidences.tolist())),
        }


class Classification(parts.SoftmaxObjective):
    """One class an image: logits (N, K) and labels (N,)."""

    kind = "classification"
    loss_title = "cross-entropy"
    pipeline = "image-classification"
    counts_images = True
    probed_in_views = True
    Report = ClassReport

    knn_score = staticmethod(evaluation.knn_accuracy)
    answers = staticmethod(evaluation.Evaluation.of)

    @classmethod
    def of_run(cls, names, train, args):
        weights = None
        if args.class_weights == "balanced":  # all classes count alike; the mean over the images is 1
            counts = torch.tensor(train.labels).bincount(minlength=len(names))
            shares = (counts > 0).sum() * counts.double() / len(train.labels)
            weights = 1 / shares.where(counts > 0, 1.0).float()
        return cls(names, weights, args.label_smoothing)

    def record(self) -> None:
        return None  # a file without a task is of this one

    def counts(self, images: LabelledImages) -> Counter:
        return Counter(images.labels)

    def constant_loss(self, images: LabelledImages) -> float:
        shares = torch.tensor(images.labels).bincount().double() / len(images)
        return torch.special.entr(shares).sum().item()

    def constant_score(self, images: LabelledImages) -> float:
        return max(Counter(images.labels).values()) / len(images)

    def start(self, model, features, targets, views=1, clusters=None) -> probe.Probe:
        fitted = probe.fit_linear_probe(features, targets, len(self.names), views, self.class_weights, clusters)
        if fitted.held_out is not None:
            self.contradicted = choosing.contradicted(fitted.held_out, targets.cpu()[: len(targets) // views])
        return probe.set_head(model, fitted)

    def start_by_unlabelled(self, model, features, targets, unlabelled, fitted: probe.Probe, views, clusters) -> Start:
        """Set the head of `model` to the probe that was fitted, or to what `toolkit.answers.unlabelled.start` finds."""
        images = seen(features, targets, unlabelled, len(self.names), views, self.class_weights)
        found = start(*images, fitted, views, clusters)
        probe.set_head(model, found.probe)
        return found

    def end_by_unlabelled(self, model, features, targets, unlabelled, views) -> None:
        """Set the head of `model`, which has trained on images without labels, to the one that their features show."""
        images = seen(features, targets, unlabelled, len(self.names), views, self.class_weights)
        probe.set_head(model, last_head(*images))

    def columns(self, outputs: Tensor) -> dict[str, list[str]]:
        probabilities, classes = outputs.softmax(1).topk(min(TOP, len(self.names)))  # (N, classes) -> (N, TOP)
        columns = {}
        for place in range(classes.shape[1]):
            suffix = f"_{place + 1}" if place else ""
            columns[f"class{suffix}"] = list(map(self.names.__getitem__, classes[:, place].tolist()))
            columns[f"probability{suffix}"] = list(map("{:.4f}".format, probabilities[:, place].tolist()))
        return columns
