"""What the reports on the answers of all tasks share: figures as people read them, and pictures."""

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from toolkit import printable
from toolkit.answers import heat_maps, measures
from toolkit.answers.report_page import PICTURE_ALONE, drawn, new_figure, save_figure, small_picture
from toolkit.images.data import LabelledImages

TOLERATED_ERROR = 0.05  # of probabilities; a larger one is reported
LABELS_SHOWN = 15  # labels, in the table that is printed
COLUMNS = 6  # of mistakes.png
PICTURES = 18  # in it
CELL = 1.29  # times as high as wide, with what is written above and below a picture
Named = list[tuple[str, str]]  # names of images, and what is said of each


class Headline(NamedTuple):
    title: str
    undefined: str = ""  # why there may be no figure
    bounds: tuple[float, float] = measures.SHARE  # see `measures.jackknife`
    form: str = ".2%"
    form_of_ends: str = ".1%"
    note: str = ""  # behind the figure


class Report:
    """The report on the answers to a task, intervals over `clusters`. Annotated: what a derived class adds."""

    HEADLINES: Mapping[str, Headline]  # by the names of the figures; the first is the score
    printed: Callable[[], Iterable[tuple[str, str]]]  # rows on the classes, labels or numbers, the worst first
    sections: Callable[[Path], list[str]]  # for the page, in HTML, with the picture that `draw` has drawn
    draw: Callable[[Path], None]
    picture: str  # the file that it writes
    in_summary = False  # a run's summary has what is `printed`
    worst_title = "Wrong, most confident first"  # of the picture of `mistakes`
    mistakes: Callable[[], Iterator[tuple[int, str]]]  # (image, what is said of it), the worst first
    answer_columns: Callable[[], dict[str, Sequence[Any]]]  # of `results_answers.csv`: what is true, and was answered

    def __init__(self, task: Any, answers: Any, clusters: Tensor | None = None):
        self.task = task
        self.answers = answers
        self.names = task.names
        self.clusters = torch.arange(len(answers.targets)) if clusters is None else clusters
        bounds = {name: headline.bounds for name, headline in self.HEADLINES.items()}
        self.found = measures.jackknife(self.measure, self.clusters, bounds)

    def measure(self, weights: Tensor) -> Mapping[str, Tensor]:
        """The headlines, (n,), and shares of each class or label, (n, K), by name, of weights of the images (n, N)."""
        return self.answers.weighted(weights)

    def headlines(self) -> list[measures.Figure]:
        return [self.found[name][0] for name in self.HEADLINES]

    def figures(self) -> dict[str, Any]:
        """For `results.json`: the score and the rest by name, intervals of 95% as `NAME_interval`."""
        figures: dict[str, Any] = {}
        for name, figure in zip(self.HEADLINES, self.headlines(), strict=True):
            figures[name] = finite(figure.value)
            figures[f"{name}_interval"] = finite_interval(figure.interval)
        if self.task.activation != "none":
            figures["calibration_error"] = measures.calibration_error(self.answers.reliability())  # expected, 0 to 1
        if self.task.temperature != 1:  # a run has just been calibrated
            figures["temperature"] = self.task.temperature
        return figures

    def title(self) -> str:
        headline = next(iter(self.HEADLINES.values()))
        score = cell(self.headlines()[0].value, headline.form) or "not defined"
        return f"{headline.title} {score} on {len(self.answers.targets)} images"

    def rows(self) -> Iterator[tuple[str, str]]:
        """The headlines for people, (name, value) each, of which the first is the score."""
        for headline, (value, ends, _) in zip(self.HEADLINES.values(), self.headlines(), strict=True):
            text = f"{value:{headline.form}} ({interval_text(*ends, headline.form_of_ends)})"
            if math.isnan(value):
                text = f"not defined: {headline.undefined}"
            yield headline.title, text + headline.note
        if self.task.activation != "none":
            yield from self.calibration_rows()

    def draw_mistakes(self, images: LabelledImages, path: Path, explainer: heat_maps.Explainer | None = None) -> Named:
        """Draw the worst answers, and next to each what decided, if there is an explainer; return what is on it."""
        chosen = list(self.mistakes())
        wide = 1 if explainer is None else 2  # columns for an image, and for what decided
        rows = max(1, math.ceil(wide * len(chosen) / COLUMNS))
        figure = new_figure(1.7 * COLUMNS, 2.2 * rows)
        figure.suptitle(self.worst_title if chosen else f"{self.worst_title}: none")
        axes = figure.subplots(subplot_kw=PICTURE_ALONE)  # one for all: each takes longer than a picture in it
        for place, (i, text) in enumerate(chosen):
            row, column = divmod(wide * place, COLUMNS)
            file = drawn(Path(images.name(i)).name, 26)
            said = drawn("\n".join(textwrap.wrap(text, 20)))
            place_picture(axes, row, column, small_picture(images, i, 192), said, file)
            if explainer is not None:
                place_picture(axes, row, column + 1, explainer.explain(images.undecoded(i)[0])[1], "what decided")
        axes.set(xlim=(0, COLUMNS), ylim=(rows * CELL, 0))
        save_figure(figure, path)
        return [(images.name(i), text) for i, text in chosen]

    def calibration_rows(self) -> Iterator[tuple[str, str]]:
        """The calibration error where it is worth a line: large, and more than chance makes of so few images."""
        bins = self.answers.reliability()
        error = measures.calibration_error(bins)
        if error > max(TOLERATED_ERROR, measures.calibration_error_by_chance(bins)):  # NaN is not
            yield "probabilities off by", f"{error:.1%} on average"


def place_picture(axes: Any, row: int, column: int, picture: Any, above: str, below: str = "") -> None:
    """Draw a picture in a cell, one wide and CELL high, of axes whose rows are counted from above."""
    height, width = np.shape(picture)[:2]
    scale = 0.94 / max(height, width)
    middle = column + 0.5
    top = row * CELL + 0.26
    bottom = top + scale * height
    axes.imshow(picture, extent=(middle - scale * width / 2, middle + scale * width / 2, bottom, top))
    axes.text(middle, top - 0.02, above, fontsize=8, ha="center", va="bottom")
    axes.text(middle, bottom + 0.02, below, fontsize=6, ha="center", va="top")


class ColumnReport(Report):
    by: Mapping[str, Sequence[float]]  # figures by name, of each of them (K,)
    suffix: str  # of the columns of answers in `results_answers.csv`, behind the names of the truths
    intervals: Callable[[int], dict[str, measures.Interval]]  # of 95%, by name, of some figures of one of them

    def figures(self) -> dict[str, Any]:
        by_name = {}
        for i, (name, *row) in enumerate(zip(self.names, *self.by.values(), strict=True)):
            by_name[name] = dict(zip(self.by, map(finite, row), strict=True))
            for figure, interval in self.intervals(i).items():
                by_name[name][f"{figure}_interval"] = finite_interval(interval)
        return super().figures() | {self.task.outputs_are[1]: by_name}

    def cells(self, i: int, names: Iterable[str], form: str) -> dict[str, str]:
        """Some figures of one of them for a table, with their intervals in brackets."""
        cells = {name: cell(self.by[name][i], form) for name in names}
        for name, (low, high) in self.intervals(i).items():
            if math.isfinite(high - low):
                cells[name] += f" ({low:{form}} to {high:{form}})"
        return cells

    def answer_columns(self) -> dict[str, Sequence[Any]]:
        columns = {}
        for name, truth, values in zip(self.names, self.answers.targets.T, self.answers.values.T, strict=True):
            columns[name] = list(map(shortest_text, truth.numpy()))
            columns[name + self.suffix] = list(map(shortest_text, values.numpy()))
        return columns

    @staticmethod
    def worst(errors: Tensor) -> list[tuple[int, int]]:
        """(image, column) of the largest errors (N, K), each image once; 0 and NaN are none."""
        largest, columns = errors.nan_to_num(0.0).max(1)
        ranked = largest.argsort(descending=True, stable=True)[:PICTURES]
        return [(i, int(columns[i])) for i in ranked.tolist() if largest[i] > 0]


def shortest_text(number: Any) -> str:
    """A number of NumPy in as many digits as its type needs; nothing for NaN."""
    return "" if math.isnan(number) else str(number).removesuffix(".0")


def shortened(title: str, order: str, rows: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Rows by class, label or number for a terminal: the first ones, and how many there are besides."""
    yield title, order
    for name, text in rows[:LABELS_SHOWN]:
        yield printable(name, 20), text
    if len(rows) > LABELS_SHOWN:
        yield "", f"and {len(rows) - LABELS_SHOWN} more"


def worst_first(shares: Tensor | Sequence[float]) -> list[int]:
    """The places of shares (K,), the lowest first; those that are not defined last."""
    return torch.as_tensor(shares, dtype=torch.float64).nan_to_num(2.0).argsort(stable=True).tolist()


def cell(value: float, form: str) -> str:
    """A figure in a table; nothing for NaN."""
    return "" if math.isnan(value) else f"{value:{form}}"


def interval_text(low: float, high: float, form: str = ".1%") -> str:
    if math.isinf(high - low):
        return "no interval: too few images or groups to tell"
    return "no interval" if math.isnan(low) else f"95% interval {low:{form}} to {high:{form}}"


def finite(value: float | None) -> float | None:
    """The value, or None for NaN, which is no JSON."""
    return None if value is None or math.isnan(value) else value


def finite_interval(interval: tuple[float, float]) -> list[float] | None:
    """The same of an interval, also of one that leaves all open."""
    return list(interval) if math.isfinite(interval[1] - interval[0]) else None


def plot_confusion(matrix: Any, names: Sequence[str], title: str, path: Path, form: str = "d") -> None:
    """A confusion matrix of NumPy: rows are true classes, columns answers. Up to 20 classes have names and numbers."""
    side = min(12, 3 + 0.4 * len(names))
    figure = new_figure(side + 0.8, side)
    axes = figure.subplots()
    figure.colorbar(axes.imshow(matrix, cmap="Blues"))
    axes.set(xlabel="answer", ylabel="true class", title=title)
    if len(names) <= 20:  # of more nobody could read names and numbers
        titles = list(map(drawn, names))
        rotation = 45 if max(map(len, names)) > 3 else "horizontal"
        axes.set_xticks(range(len(names)), titles, rotation=rotation)
        axes.set_yticks(range(len(names)), titles)
        middle = (matrix.min() + matrix.max()) / 2
        for (row, column), value in np.ndenumerate(matrix):
            color = "white" if value > middle else "black"
            axes.text(column, row, f"{value:{form}}", ha="center", va="center", color=color)
    save_figure(figure, path)
