"""What is told of the answers of a task: figures, tables and pictures."""

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from toolkit import listed, printable
from toolkit.answers import measures
from toolkit.answers.evaluation import Evaluation
from toolkit.answers.report_page import (
    BLUE,
    ORANGE,
    by_class,
    class_sections,
    confusion_counts,
    drawn,
    html_picture,
    html_table,
)
from toolkit.answers.tasks import Classification, LabelAnswers, MultiLabel, NumberAnswers, Regression, Task
from toolkit.files import open_atomically
from toolkit.images.bands import Bands
from toolkit.images.data import LabelledImages
from toolkit.images.lists import ANSWER, PROBABILITY
from toolkit.images.transforms import ShrinkTo, View

WORTH_TELLING = 0.05  # of calibration errors
SHOWN = 15  # labels, in the table that is printed
COLUMNS, PICTURES = 6, 18  # of mistakes.png


def interval_text(low: float, high: float, form: str = ".1%") -> str:
    """How far chance reaches."""
    return "no interval" if math.isnan(low) else f"95% interval {low:{form}} to {high:{form}}"


def finite(value: float | None) -> float | None:
    """The value, or None for NaN, which is no JSON."""
    return None if value is None or math.isnan(value) else value


def finite_interval(interval: tuple[float, float]) -> list[float] | None:
    """The same of an interval."""
    return None if math.isnan(interval[0]) else list(interval)


def right_of(accuracy: float, images: int, interval: tuple[float, float] | None = None) -> str:
    """An accuracy as counted images, per cent, and how far chance reaches: if not said, over independent images."""
    low, high = interval or measures.wilson_interval(accuracy * images, images)
    digits = 0 if images < 200 else 1  # more would be chance's own
    told = interval_text(low, high, f".{digits}%")
    return f"{round(accuracy * images):,} of {images:,} images, {accuracy:.2%} ({told})"


class Report(Protocol):
    """What every kind of answers has."""

    task: Task
    picture: str  # the file that `draw` writes

    def figures(self) -> dict[str, Any]:
        """For `results.json`: the score and the rest by name, intervals of 95% as `NAME_interval`."""

    def title(self) -> str: ...

    def rows(self) -> list[tuple[str, str]]:
        """The headlines, (name, value) each, of which the first is the score."""

    def printed(self) -> list[tuple[str, str]]:
        """Rows on the classes, labels or numbers, the worst first."""

    def sections(self, picture: Path) -> list[str]:
        """For the page, in HTML; `picture` is what `draw` has drawn."""

    def draw(self, path: Path) -> None: ...

    def draw_mistakes(self, images: LabelledImages, path: Path, bands: Bands | None = None) -> None:
        """Pictures of the worst answers; of images that are no RGB photographs, the three `bands` meant for it."""

    def answer_columns(self) -> dict[str, Sequence[Any]]:
        """What `results_answers.csv` has of each image: what is true, and what was answered."""


class ClassReport:
    """The report on an `Evaluation`: one class an image."""

    picture = "confusion_matrix.png"

    def __init__(self, task: Classification, result: Evaluation, clusters: Tensor | None = None):
        self.task = task
        self.result = result
        self.names = task.names
        self.clusters = clusters
        self.interval = measures.share_interval(result.labels == result.predictions, clusters)

    def figures(self) -> dict[str, Any]:
        result = self.result
        return {
            "accuracy": result.accuracy,
            "accuracy_interval": list(self.interval),
            "accuracy_per_class": accuracy_per_class(result, self.names),
            "balanced_accuracy": result.balanced_accuracy,
            "macro_f1": result.macro_f1,
            **calibration_figures(self.task, result),
            **dict(zip(("balanced_accuracy_interval", "macro_f1_interval"), self._intervals(), strict=True)),
        }

    def _intervals(self) -> list[list[float] | None]:
        """The intervals of the means over classes."""
        right = torch.where(self.result.labels == self.result.predictions, self.result.labels, -1)
        counted = (right, self.result.labels, self.result.predictions)

        def means(weights: Tensor) -> Tensor:
            right, images, answers = (_by_class(weights, classes, len(self.names)) for classes in counted)
            figures = torch.stack([right / images, 2 * right / (images + answers)], 1)  # (n, 2, K)
            return figures.nanmean(-1)  # of the classes that are there

        found = measures.jackknife(means, len(right), self.clusters)
        return [finite_interval(interval) for interval in found.intervals]

    def title(self) -> str:
        return f"{self.result.accuracy:.2%} of {len(self.result.labels)} images right"

    def rows(self) -> list[tuple[str, str]]:
        result = self.result
        return [
            ("accuracy", right_of(result.accuracy, len(result.labels), self.interval)),
            ("balanced over classes", f"{result.balanced_accuracy:.2%}, macro F1 {result.macro_f1:.2%}"),
            *calibration_rows(self.task, result),
        ]

    def printed(self) -> list[tuple[str, str]]:
        classes = by_class(confusion_counts(self.result, len(self.names)), self.names)
        rows = [(printable(name, 20), f"{right} of {images} right") for name, images, right, _ in classes[:SHOWN]]
        more = [("", f"and {len(classes) - SHOWN} more")] if len(classes) > SHOWN else []
        return [("by class", "the worst first:"), *rows, *more]

    def sections(self, picture: Path) -> list[str]:
        return [*class_sections(self.result, self.names), *reliability_section(self.result)]

    def draw(self, path: Path) -> None:
        plot_confusion_matrix(self.result, self.names, path)

    def draw_mistakes(self, images: LabelledImages, path: Path, bands: Bands | None = None) -> None:
        plot_mistakes(self.result, images, self.names, path, bands)

    def answer_columns(self) -> dict[str, Sequence[Any]]:
        result = self.result
        return {
            "class": [self.names[i] for i in result.labels.tolist()],
            "answer": [self.names[i] for i in result.predictions.tolist()],
            "probability": [f"{share:.6f}" for share in result.confidences.tolist()],
        }


def _by_class(weights: Tensor, classes: Tensor, number: int) -> Tensor:
    """The sum of weights (n, N) over the images of each class, (n, number); -1 is none."""
    sums = torch.zeros(len(weights), number + 1, dtype=torch.float64)
    return sums.index_add_(1, classes % (number + 1), weights.double())[:, :number]


# ----------------------------------------------------------------------------------------------------------------------
# How far probabilities can be believed: of `Evaluation` and `LabelAnswers` alike


def calibration_figures(task: Task, answers: Evaluation | LabelAnswers) -> dict[str, float]:
    """The expected calibration error (0 to 1) and, where a run has just been calibrated, what that changed."""
    figures = {"calibration_error": measures.calibration_error(answers.reliability())}
    if answers.before is not None:
        figures["calibration_error_before"] = measures.calibration_error(answers.reliability(before=True))
        figures["temperature"] = task.temperature
    return figures


def calibration_rows(task: Task, answers: Evaluation | LabelAnswers) -> list[tuple[str, str]]:
    """The same for people, where it is worth a line."""
    figures = calibration_figures(task, answers)
    if figures["calibration_error"] <= WORTH_TELLING:
        return []
    before = figures.get("calibration_error_before")
    was = "" if before is None else f" (before calibration {before:.1%})"
    return [("probabilities off by", f"{figures['calibration_error']:.1%} on average{was}")]


def reliability_section(answers: Evaluation | LabelAnswers) -> list[str]:
    """A picture for the page: how often answers of each probability are right."""
    told = (
        "<p>On the line probabilities mean what they say. Below it they are too high, above it too low. "
        "The larger a point, the more answers it stands for.</p>"
    )
    picture = html_picture(plot_reliability(answers), "the share that is right by probability")
    return ["<h2>Can the probabilities be believed?</h2>", told, picture]


def plot_reliability(answers: Evaluation | LabelAnswers) -> bytes:
    """The share that is right by probability, with the calibrated ones and those before, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "-", color="0.6", linewidth=1)
    series = [("saved", BLUE, "o", answers.reliability())]
    if answers.before is not None:
        series.insert(0, ("before calibration", ORANGE, "s", answers.reliability(before=True)))
    for name, color, marker, bins in series:
        probability, share, count = bins[bins[:, 2] > 0].T
        label = f"{name}: off by {measures.calibration_error(bins):.1%}"
        axes.plot(probability, share, ":", color=color, alpha=0.5)
        axes.scatter(probability, share, s=20 + 200 * count / count.sum(), color=color, marker=marker, label=label)
    axes.set(xlabel="probability", ylabel="share that is right", xlim=(-0.02, 1.04), ylim=(-0.04, 1.04))
    axes.grid(alpha=0.3)
    legend = figure.legend(loc="outside upper center", ncols=len(series))
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    file = io.BytesIO()
    figure.savefig(file, dpi=120)
    return file.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# Several labels


class LabelReport:
    """Of `LabelAnswers`, for the evaluation images.

    Args:
        task: has the thresholds.
    """

    picture = "precision_recall.png"

    def __init__(self, task: MultiLabel, answers: LabelAnswers, clusters: Tensor | None = None):
        self.task = task
        self.answers = answers
        self.names = task.names
        found = measures.jackknife(self._headlines, len(answers.targets), clusters)
        self.headlines = found.values.tolist()
        self.intervals = found.intervals
        self.average_precisions, self.aurocs = answers.by_label().tolist()
        self.f1s = answers.f1(task.thresholds).tolist()

    HEADLINES = ("macro_ap", "micro_ap", "macro_auroc", "macro_f1", "micro_f1")

    def _headlines(self, weights: Tensor) -> Tensor:
        answers = self.answers
        thresholds = self.task.thresholds
        macro_ap, macro_auroc = answers.macro(weights).T
        found = [
            macro_ap,
            answers.micro_average_precision(weights),
            macro_auroc,
            answers.macro_f1(thresholds, weights),
            answers.micro_f1(thresholds, weights),
        ]
        return torch.stack(found, -1)

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value, interval in zip(self.HEADLINES, self.headlines, self.intervals, strict=True):
            found[name] = finite(value)
            found[f"{name}_interval"] = finite_interval(interval)
        found |= calibration_figures(self.task, self.answers)
        return found | {"labels": {name: self._label(i) for i, name in enumerate(self.names)}}

    def _label(self, i: int) -> dict[str, Any]:
        return {
            "positives": int(self.answers.positives()[i]),
            "unknown": int(self.answers.unknown()[i]),
            "average_precision": finite(self.average_precisions[i]),
            "auroc": finite(self.aurocs[i]),
            "f1": finite(self.f1s[i]),
            "threshold": self.task.thresholds[i].item(),
        }

    def title(self) -> str:
        return f"macro AP {self.headlines[0]:.2%} on {len(self.answers.targets)} images"

    def rows(self) -> list[tuple[str, str]]:
        told = dict(zip(self.HEADLINES, zip(self.headlines, self.intervals, strict=True), strict=True))
        texts = {name: f"{value:.2%} ({interval_text(*interval)})" for name, (value, interval) in told.items()}
        missing = [name for name, value in zip(self.names, self.average_precisions, strict=True) if math.isnan(value)]
        left_out = f"no evaluation image has {listed(missing, 4)}: left out of the means"
        return [
            ("macro AP", texts["macro_ap"]),
            *([("", left_out)] if missing else []),
            ("micro AP", texts["micro_ap"]),
            ("macro AUROC", texts["macro_auroc"]),
            ("macro F1", f"{texts['macro_f1']}, at thresholds chosen on training images"),
            *calibration_rows(self.task, self.answers),
        ]

    def by_label(self) -> list[tuple[str, int, int, str, str, str, str]]:
        """(label, positives, unknown, AP, AUROC, F1, threshold), the worst first; labels without positives last."""
        order = sorted(range(len(self.names)), key=lambda i: (math.isnan(v := self.average_precisions[i]), v))
        positives, unknown = self.answers.positives().tolist(), self.answers.unknown().tolist()
        shares = [[_share(v) for v in of] for of in (self.average_precisions, self.aurocs, self.f1s)]
        thresholds = [f"{threshold:.2f}" for threshold in self.task.thresholds.tolist()]
        columns = (self.names, positives, unknown, *shares, thresholds)
        return [tuple(column[i] for column in columns) for i in order]

    def printed(self) -> list[tuple[str, str]]:
        """Rows on the labels, the worst first, for a terminal."""
        labels = self.by_label()
        rows = [(printable(name, 20), f"AP {ap} of {count} positives") for name, count, _, ap, *_ in labels[:SHOWN]]
        more = [("", f"and {len(labels) - SHOWN} more")] if len(labels) > SHOWN else []
        return [("by label", "the worst first:"), *rows, *more]

    def sections(self, picture: Path) -> list[str]:
        titles = ("label", "images", "unknown", "AP", "AUROC", "F1", "threshold")
        shown = html_picture(picture.read_bytes(), "precision by recall of the labels with the lowest AP")
        table = html_table(self.by_label(), titles)
        return ["<h2>By label</h2>", table, shown, *reliability_section(self.answers)]

    def draw(self, path: Path) -> None:
        plot_precision_recall(self, path)

    def mistakes(self) -> list[tuple[int, str]]:
        """(image, what is told of it) of the most confidently wrong labels, each image once."""
        answers = self.answers
        wrong = ((answers.probabilities > self.task.thresholds) != (answers.targets == 1)) & ~answers.targets.isnan()
        distance = (answers.probabilities - answers.targets.nan_to_num()).abs() * wrong
        found: dict[int, str] = {}
        for place in distance.flatten().argsort(descending=True, stable=True).tolist():
            image, label = divmod(place, len(self.names))
            if not wrong[image, label] or len(found) == PICTURES:
                break
            is_there = "is there" if answers.targets[image, label] == 1 else "is not there"
            told = f"{self.names[label]} {is_there}: {answers.probabilities[image, label]:.0%}"
            found.setdefault(image, told)
        return list(found.items())

    def draw_mistakes(self, images: LabelledImages, path: Path, bands: Bands | None = None) -> None:
        plot_worst_answers(self.mistakes(), images, path, bands)

    def answer_columns(self) -> dict[str, Sequence[Any]]:
        """The truth and the probability of each label."""
        columns = {}
        for name, truth, shares in zip(self.names, self.answers.targets.T, self.answers.probabilities.T, strict=True):
            columns[name] = ["" if math.isnan(value) else f"{value:g}" for value in truth.tolist()]
            columns[name + PROBABILITY] = [f"{share:.6f}" for share in shares.tolist()]
        return columns


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}"


def _precision_recall(scores: Tensor, targets: Tensor) -> tuple[list[float], list[float]]:
    known = ~targets.isnan()
    positive = targets[known][scores[known].argsort(descending=True)]
    hits = positive.cumsum(0)
    return (hits / hits[-1]).tolist(), (hits / torch.arange(1, len(hits) + 1)).tolist()


class NumberReport:
    """Of `NumberAnswers`, for the evaluation images."""

    picture = "scatter.png"
    HEADLINES: Mapping[str, str] = {
        "r2": "r2",
        "mae": "mean_absolute_error",
        "rmse": "root_mean_squared_error",
        "spearman": "spearman",
    }
    BOUNDS = (measures.BELOW_1, measures.POSITIVE, measures.POSITIVE, measures.CORRELATION)

    def __init__(self, task: Regression, answers: NumberAnswers, clusters: Tensor | None = None):
        self.task = task
        self.answers = answers
        self.names = task.names
        found = measures.jackknife(self._headlines, len(answers.targets), clusters, self.BOUNDS)
        self.headlines = found.values.tolist()
        self.intervals = found.intervals
        self.by = {name: answers.by_number(measure).tolist() for name, measure in self.HEADLINES.items()}

    def _headlines(self, weights: Tensor) -> Tensor:
        return torch.stack([self.answers.mean(measure, weights) for measure in self.HEADLINES.values()], -1)

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value, interval in zip(self.HEADLINES, self.headlines, self.intervals, strict=True):
            found[name] = finite(value)
            found[f"{name}_interval"] = finite_interval(interval)
        numbers = {
            name: {"images": int(known), **{measure: finite(values[i]) for measure, values in self.by.items()}}
            for i, (name, known) in enumerate(zip(self.names, self._known(), strict=True))
        }
        return found | {"numbers": numbers}

    def _known(self) -> list[int]:
        return (~self.answers.targets.isnan()).sum(0).tolist()

    def title(self) -> str:
        return f"R2 {self.headlines[0]:.3f} on {len(self.answers.targets)} images"

    def rows(self) -> list[tuple[str, str]]:
        texts = [
            f"{value:.4g} ({interval_text(*interval, '.4g')})"
            for value, interval in zip(self.headlines, self.intervals, strict=True)
        ]
        titles = ("R2", "mean absolute error", "RMS error", "rank correlation")
        mean = f", the mean of {len(self.names)} numbers" if len(self.names) > 1 else ""
        return [(title, text + mean) for title, text in zip(titles, texts, strict=True)]

    def by_number(self) -> list[tuple]:
        """(number, images, R2, MAE, RMSE, Spearman)."""
        columns = [[f"{value:.4g}" for value in values] for values in self.by.values()]
        return list(zip(self.names, self._known(), *columns, strict=True))

    def printed(self) -> list[tuple[str, str]]:
        """Rows on the numbers, for a terminal."""
        rows = [
            (printable(name, 20), f"R2 {of_r2}, mean absolute error {mae}")
            for name, _, of_r2, mae, *_ in self.by_number()[:SHOWN]
        ]
        return [("by number", "in their own units:"), *rows] if len(self.names) > 1 else []

    def sections(self, picture: Path) -> list[str]:
        titles = ("number", "images", "R2", "mean absolute error", "root mean squared error", "rank correlation")
        shown = html_picture(picture.read_bytes(), "the answer for each image by what is true")
        return ["<h2>Answers and truth</h2>", html_table(self.by_number(), titles), shown]

    def draw(self, path: Path) -> None:
        plot_scatter(self, path)

    def mistakes(self) -> list[tuple[int, str]]:
        """(image, what is told of it) of the largest errors by the numbers' spread, each image once."""
        errors = (self.answers.answers - self.answers.targets).abs() / self.task.std.cpu()
        found: dict[int, str] = {}
        for place in errors.nan_to_num().flatten().argsort(descending=True, stable=True)[:1000].tolist():
            image, number = divmod(place, len(self.names))
            if len(found) < PICTURES and not errors[image, number].isnan():
                true, said = self.answers.targets[image, number], self.answers.answers[image, number]
                found.setdefault(image, f"{self.names[number]} {true:.4g}, answered {said:.4g}")
        return list(found.items())

    def draw_mistakes(self, images: LabelledImages, path: Path, bands: Bands | None = None) -> None:
        plot_worst_answers(self.mistakes(), images, path, bands)

    def answer_columns(self) -> dict[str, Sequence[Any]]:
        """The truth and the answer of each number."""
        columns = {}
        for name, truth, answers in zip(self.names, self.answers.targets.T, self.answers.answers.T, strict=True):
            columns[name] = ["" if math.isnan(value) else f"{value:.8g}" for value in truth.tolist()]
            columns[name + ANSWER] = [f"{value:.8g}" for value in answers.tolist()]
        return columns


def plot_precision_recall(report: LabelReport, path: Path) -> None:
    """Precision by recall, of the ten labels with the lowest AP."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, count, *_ in report.by_label()[:10]:
        if count:
            i = report.names.index(name)
            recall, precision = _precision_recall(report.answers.probabilities[:, i], report.answers.targets[:, i])
            axes.plot(recall, precision, label=drawn(printable(name, 24)), drawstyle="steps-post")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title=report.title())
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)
    with open_atomically(path) as file:
        figure.savefig(file, dpi=150)


def plot_scatter(report: NumberReport, path: Path) -> None:
    """The answer for each image by the truth, a panel for each of the first six numbers."""
    from matplotlib.figure import Figure

    shown = report.names[:6]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.2 * columns, 4 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for place in places[len(shown) :]:
        place.axis("off")
    for i, (name, place) in enumerate(zip(shown, places, strict=False)):
        truth, answers = report.answers.targets[:, i], report.answers.answers[:, i]
        known = ~truth.isnan()
        place.plot(truth[known], answers[known], ".", color=BLUE, alpha=0.5)
        ends = [truth[known].min().item(), truth[known].max().item()] if known.any() else [0, 1]
        place.plot(ends, ends, "--", color=ORANGE)
        place.set(xlabel="true", ylabel="answer", title=drawn(f"{printable(name, 24)}: R2 {report.by['r2'][i]:.3f}"))
        place.grid(alpha=0.3)
    with open_atomically(path) as file:
        figure.savefig(file, dpi=120)


def plot_worst_answers(
    mistakes: Sequence[tuple[int, str]], images: LabelledImages, path: Path, bands: Bands | None = None
) -> None:
    """Pictures of images, with what is told of each.

    Of images that are no RGB photographs they show the three `bands` that are meant for it.
    """
    from matplotlib.figure import Figure

    rows, shrink = max(1, -(-len(mistakes) // COLUMNS)), View(ShrinkTo(256))
    figure = Figure(figsize=(1.7 * COLUMNS, 2.2 * rows), layout="constrained")
    figure.suptitle("The worst answers, the most confident first" if mistakes else "No wrong answers")
    places = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for place in places:
        place.axis("off")
    for (i, told), place in zip(mistakes, places, strict=False):
        shrunk = shrink(images.undecoded(i)[0])
        place.imshow(bands.picture(shrunk) if torch.is_tensor(shrunk) else shrunk)
        place.set_title(drawn("\n".join(textwrap.wrap(told, 20))), fontsize=8)
    with open_atomically(path) as file:
        figure.savefig(file, dpi=120)


def plot_confusion_matrix(result: Evaluation, class_names: Sequence[str], path: Path) -> None:
    """Rows are true classes, columns predictions; the counts are written out for up to 20 classes.

    Of more than 1,000 classes, neighbours are counted as one: the picture would have no room for all.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    size = -(-len(class_names) // 1000)
    groups = range(-(-len(class_names) // size))
    matrix = confusion_matrix(result.labels // size, result.predictions // size, labels=groups)
    few = len(class_names) <= 20
    side = min(12, 3 + 0.4 * len(class_names))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(matrix, display_labels=[drawn(name) for name in class_names] if few else None)
    rotation = 45 if few and max(map(len, class_names)) > 3 else "horizontal"
    display.plot(ax=axes, include_values=few, cmap="Blues", xticks_rotation=rotation)
    if not few:
        axes.xaxis.set_major_locator(MaxNLocator(20, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(20, integer=True))
    counted = f", {size} classes per row" if size > 1 else ""
    axes.set_title(f"{result.accuracy:.1%} of {len(result.labels)} images right{counted}")
    with open_atomically(path) as file:
        figure.savefig(file, dpi=150)


def plot_mistakes(
    result: Evaluation, images: LabelledImages, class_names: Sequence[str], path: Path, bands: Bands | None = None
) -> None:
    """Pictures: the wrong answers that were given with most confidence, and the right ones with least.

    Of images that are no RGB photographs they show the three `bands` that are meant for it.
    """
    from matplotlib.figure import Figure

    columns = 6
    wrong = result.predictions != result.labels
    shrink = View(ShrinkTo(256))
    ranked = result.confidences.argsort(descending=True, stable=True)
    shown = {
        "Wrong, most confident first": ranked[wrong[ranked]][: 2 * columns],
        "Right, least confident first": ranked[~wrong[ranked]].flip(0)[:columns],
    }
    rows = [max(1, -(-len(chosen) // columns)) for chosen in shown.values()]
    figure = Figure(figsize=(1.7 * columns, 2.2 * sum(rows)), layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=rows)
    for part, (title, chosen), height in zip(parts, shown.items(), rows, strict=True):
        part.suptitle(title if len(chosen) else f"{title}: none")
        axes = part.subplots(height, columns, squeeze=False).ravel()
        for place in axes:
            place.axis("off")
        for i, place in zip(chosen.tolist(), axes, strict=False):
            said, true = (class_names[labels[i]] for labels in (result.predictions, result.labels))
            told = true if said == true else f"{true}, taken for {said}"
            shrunk = shrink(images.undecoded(i)[0])
            place.imshow(bands.picture(shrunk) if torch.is_tensor(shrunk) else shrunk)
            place.set_title(drawn("\n".join([*textwrap.wrap(told, 18), f"{result.confidences[i]:.0%}"])), fontsize=8)
    with open_atomically(path) as file:
        figure.savefig(file, dpi=120)


def accuracy_per_class(result: Evaluation, class_names: Sequence[str]) -> dict[str, float | None]:
    """The share of each class's images that are right; None for a class without any (NaN would not be JSON)."""
    hits = [(result.predictions[result.labels == i] == i).float() for i in range(len(class_names))]
    return dict(zip(class_names, [hit.mean().item() if len(hit) else None for hit in hits], strict=True))


REPORTS: Mapping[str, Callable[[Any, Any], Report]] = {
    "classification": ClassReport,
    "multilabel": LabelReport,
    "regression": NumberReport,
}


def headline(task: Task, answers: Any) -> str:
    """The score and its interval, in a line."""
    title, told = REPORTS[task.kind](task, answers).rows()[0]
    return told if task.kind == "classification" else f"{title} {told}"
