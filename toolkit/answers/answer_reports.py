"""What the reports on the answers of all tasks share: figures as people read them, and pictures."""

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from toolkit import printable
from toolkit.answers import measures
from toolkit.answers.report_page import BLUE, ORANGE, drawn, html_picture, new_figure, save_figure
from toolkit.images.bands import Bands
from toolkit.images.data import LabelledImages
from toolkit.images.transforms import ShrinkTo, View

TOLERATED_ERROR = 0.05  # of probabilities; a larger one is reported
SHOWN = 15  # labels, in the table that is printed
COLUMNS = 6  # of mistakes.png
PICTURES = 18  # in it


class Headline(NamedTuple):
    """How people are shown a figure that has an interval."""

    title: str
    undefined: str = ""  # why there may be no figure
    bounds: tuple[float, float] = measures.SHARE  # see `measures.jackknife`
    form: str = ".2%"
    form_of_ends: str = ".1%"


class Report:
    """The report on a task's answers.

    Args:
        head: of the task: `toolkit.answers.parts.Head`.
        answers: what its `evaluate` returns.
        clusters: as for `measures.share_interval`: intervals are over these.
    """

    picture: str  # the file that `draw` writes
    HEADLINES: Mapping[str, Headline] = {}  # by the names of the figures; the first is the score

    def __init__(self, head: Any, answers: Any, clusters: Tensor | None = None):
        self.head = head
        self.answers = answers
        self.names = head.names
        self.clusters = clusters

    def measure_headlines(self, measure: Callable[[Tensor], Tensor]) -> None:
        """Set `headlines` and `intervals`, lists, to the columns of a measure as `measures.jackknife` takes it."""
        bounds = [headline.bounds for headline in self.HEADLINES.values()]
        found = measures.jackknife(measure, len(self.answers.targets), self.clusters, bounds)
        self.headlines = found.values.tolist()
        self.intervals = found.intervals

    def headline_figures(self) -> dict[str, Any]:
        """The headlines and their intervals by name, for `results.json`."""
        figures: dict[str, Any] = {}
        for name, value, interval in zip(self.HEADLINES, self.headlines, self.intervals, strict=True):
            figures[name] = finite(value)
            figures[f"{name}_interval"] = finite_interval(interval)
        return figures

    def headline_rows(self) -> list[tuple[str, str]]:
        """The same for people, or why there is no figure."""
        rows = []
        for headline, value, ends in zip(self.HEADLINES.values(), self.headlines, self.intervals, strict=True):
            text = f"{value:{headline.form}} ({interval_text(*ends, headline.form_of_ends)})"
            rows.append((headline.title, f"not defined: {headline.undefined}" if math.isnan(value) else text))
        return rows

    def figures(self) -> dict[str, Any]:
        """For `results.json`: the score and the rest by name, intervals of 95% as `NAME_interval`."""
        raise NotImplementedError

    def title(self) -> str:
        raise NotImplementedError

    def rows(self) -> list[tuple[str, str]]:
        """The headlines, (name, value) each, of which the first is the score."""
        raise NotImplementedError

    def printed(self) -> list[tuple[str, str]]:
        """Rows on the classes, labels or numbers, the worst first."""
        raise NotImplementedError

    def sections(self, picture: Path) -> list[str]:
        """For the page, in HTML; `picture` is what `draw` has drawn."""
        raise NotImplementedError

    def draw(self, path: Path) -> None:
        raise NotImplementedError

    def mistakes(self) -> Mapping[str, Sequence[tuple[int, str]]]:
        """The worst answers under a title each: (image, what is said of it)."""
        raise NotImplementedError

    def answer_columns(self) -> dict[str, Sequence[Any]]:
        """What `results_answers.csv` has of each image: what is true, and what was answered."""
        raise NotImplementedError

    def draw_mistakes(self, images: LabelledImages, path: Path, bands: Bands | None = None) -> None:
        """Pictures of the worst answers; of images that are no RGB photographs, the three `bands` meant for it."""
        plot_worst_answers(self.mistakes(), images, path, bands)

    @staticmethod
    def shortened(title: str, order: str, rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Rows by class, label or number for a terminal: the first ones, and how many there are besides."""
        shown = [(title, order)]
        for name, text in rows[:SHOWN]:
            shown.append((printable(name, 20), text))
        if len(rows) > SHOWN:
            shown.append(("", f"and {len(rows) - SHOWN} more"))
        return shown


def interval_text(low: float, high: float, form: str = ".1%") -> str:
    """How far chance reaches."""
    return "no interval" if math.isnan(low) else f"95% interval {low:{form}} to {high:{form}}"


def finite(value: float | None) -> float | None:
    """The value, or None for NaN, which is no JSON."""
    return None if value is None or math.isnan(value) else value


def finite_interval(interval: tuple[float, float]) -> list[float] | None:
    """The same of an interval."""
    return None if math.isnan(interval[0]) else list(interval)


def right_of(accuracy: float, images: int, interval: tuple[float, float]) -> str:
    """An accuracy as counted images, per cent, and how far chance reaches."""
    digits = 0 if images < 200 else 1  # more would be chance's own
    chance = interval_text(*interval, f".{digits}%")
    return f"{round(accuracy * images):,} of {images:,} images, {accuracy:.2%} ({chance})"


def exact_cells(values: Tensor) -> list[str]:
    """The shortest texts that are read as the same numbers; nothing for NaN."""
    return ["" if math.isnan(value) else str(value).removesuffix(".0") for value in values.numpy()]


# ----------------------------------------------------------------------------------------------------------------------
# How far probabilities can be believed


class Calibrated(Protocol):
    """Answers with probabilities; `before` has those before calibration, if there was one."""

    before: Tensor | None

    def reliability(self, before: bool = False) -> Tensor:
        """`toolkit.answers.measures.calibration` of the answers, after calibration or before."""


def calibration_figures(temperature: float, answers: Calibrated) -> dict[str, float]:
    """The expected calibration error (0 to 1) and, where a run has just been calibrated, what that changed."""
    figures = {"calibration_error": measures.calibration_error(answers.reliability())}
    if answers.before is not None:
        figures["calibration_error_before"] = measures.calibration_error(answers.reliability(before=True))
        figures["temperature"] = temperature
    return figures


def calibration_rows(temperature: float, answers: Calibrated) -> list[tuple[str, str]]:
    """The same for people, where it is worth a line."""
    figures = calibration_figures(temperature, answers)
    error = figures["calibration_error"]
    if not error > TOLERATED_ERROR:
        return []
    text = f"{error:.1%} on average"
    if "calibration_error_before" in figures:
        text += f" (before calibration {figures['calibration_error_before']:.1%})"
    return [("probabilities off by", text)]


def reliability_section(answers: Calibrated) -> list[str]:
    """A picture for the page: how often answers of each probability are right."""
    explained = (
        "<p>On the line probabilities mean what they say. Below it they are too high, above it too low. "
        "The larger a point, the more answers it stands for.</p>"
    )
    picture = html_picture(plot_reliability(answers), "the share that is right by probability")
    return ["<h2>Can the probabilities be believed?</h2>", explained, picture]


def plot_reliability(answers: Calibrated) -> bytes:
    """The share that is right by probability, with the calibrated ones and those before, as a PNG."""
    figure = new_figure(5.2, 4.8)
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
    figure.savefig(file)
    return file.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# The worst answers


def plot_worst_answers(
    groups: Mapping[str, Sequence[tuple[int, str]]], images: LabelledImages, path: Path, bands: Bands | None = None
) -> None:
    """Pictures of images, with what is said of each, in groups under a title: see `Report.draw_mistakes`."""
    shrink = View(ShrinkTo(256))  # matplotlib would draw a large photograph from its every pixel
    rows = [max(1, math.ceil(len(chosen) / COLUMNS)) for chosen in groups.values()]
    figure = new_figure(1.7 * COLUMNS, 2.2 * sum(rows))
    parts = figure.subfigures(len(groups), 1, height_ratios=rows, squeeze=False)[:, 0]
    for part, (title, chosen), height in zip(parts, groups.items(), rows, strict=True):
        part.suptitle(title if chosen else f"{title}: none")
        places = part.subplots(height, COLUMNS, squeeze=False).ravel()
        for place in places:
            place.axis("off")
        for (i, text), place in zip(chosen, places, strict=False):
            shrunk = shrink(images.undecoded(i)[0])
            place.imshow(bands.picture(shrunk) if torch.is_tensor(shrunk) else shrunk)
            place.set_title(drawn("\n".join(textwrap.wrap(text, 20))), fontsize=8)
    save_figure(figure, path)
