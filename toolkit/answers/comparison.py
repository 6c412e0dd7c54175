"""Two runs over the same images: is the one better than the other by more than chance?"""

import csv
import math
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit import InputError, listed, printable
from toolkit.answers import measures
from toolkit.answers.answer_reports import interval_text
from toolkit.answers.tasks import LabelAnswers, NumberAnswers
from toolkit.files import write_cells
from toolkit.images.data import LabelledImages
from toolkit.images.lists import ANSWER, PROBABILITY

IMAGE, GROUP = "image", "group"  # the first columns; a label may be called the same, and then stands behind them
IN_UNITS = ("R2", "mean absolute error")  # shown as numbers; all else is a share, shown in per cent


def answers_path(results: Path) -> Path:
    """Where the answers for each image are: beside `results.json`."""
    return results.with_name(f"{results.stem}_answers.csv")


def write_answers(columns: dict[str, Sequence[Any]], images: LabelledImages, results: Path) -> None:
    """Write what is true of each image and what was answered, a row each, beside the results.

    If the images have groups, these are in the second column.
    """
    first = {IMAGE: images.relative_names()} | ({} if images.groups is None else {GROUP: images.groups})
    rows = zip(*first.values(), *columns.values(), strict=True)
    write_cells(rows, [*first, *columns], answers_path(results))


class Answered(NamedTuple):
    """A file of answers: what `write_answers` wrote."""

    images: list[str]
    groups: list[str] | None
    columns: dict[str, list[str]]  # by title

    def in_order(self, order: Sequence[int]) -> "Answered":
        """The images at these positions."""
        groups = None if self.groups is None else [self.groups[i] for i in order]
        columns = {title: [cells[i] for i in order] for title, cells in self.columns.items()}
        return Answered([self.images[i] for i in order], groups, columns)


class Difference(NamedTuple):
    """How much better the second of two runs is by one measure; the interval is of 95%."""

    measure: str
    first: float
    second: float
    low: float
    high: float
    p: float


def compare(first: Path, second: Path) -> list[Difference]:
    """Compare the answers beside two `results.json`, image by image.

    If one of them says which group each image is of, groups are what chance draws.

    Raises:
        InputError: answers are missing, or are for other images, by another truth or in other groups.
    """
    one, other = (_read(answers_path(path)) for path in (first, second))
    if one.columns.keys() != other.columns.keys():
        raise InputError(f"{second} is of other classes, labels or numbers than {first}: nothing to compare")
    place = {name: i for i, name in enumerate(other.images)}
    missing = [name for name in one.images if name not in place]
    if missing or len(place) != len(one.images):
        what = f", such as {printable(missing[0])}" if missing else ""
        raise InputError(f"{first} and {second} are over other images{what}: evaluate both on the same ones")
    other = other.in_order([place[name] for name in one.images])
    tables = [one.columns, other.columns]
    is_truth = [title for title in tables[0] if _kind(title, tables[0]) is not None]
    if not is_truth and {"class", "answer"} <= tables[0].keys():
        is_truth = ["class"]
    if not is_truth:
        raise InputError(f"{answers_path(first)} is not a table of answers, or damaged: evaluate again")
    differing = [title for title in is_truth if tables[0][title] != tables[1][title]]
    if differing:
        columns = listed(differing, 4)
        raise InputError(f"{first} and {second} do not agree on what is true: look at the column {columns}")
    groups = {tuple(table.groups) for table in (one, other) if table.groups is not None}
    if len(groups) > 1:
        raise InputError(f"{first} and {second} have the images in other groups: evaluate both with one --group-by")
    return _differences(tables, is_truth, _numbered(groups.pop()) if groups else None)


def _kind(title: str, titles: Container[str]) -> str | None:
    """What the column of answers beside the column of a label or number ends with; None: it is no such column."""
    return next((kind for kind in (ANSWER, PROBABILITY) if title + kind in titles), None)


def _numbered(groups: Sequence[str]) -> Tensor:
    """The number of each image's group, counted from 0."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in groups])


def _read(path: Path) -> Answered:
    """The content of a file of answers."""
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; the answers for each image lie there if a run, or evaluate --output, wrote them"
        ) from None
    except csv.Error as error:
        raise InputError(f"{path} is damaged: {printable(error)}") from None
    titles = rows[0] if rows else []
    if titles[:1] != [IMAGE] or len(rows) < 2 or any(len(row) != len(titles) for row in rows):
        raise InputError(f"{path} is not a table of answers, or damaged: evaluate again")
    columns = [list(cells) for cells in zip(*rows[1:], strict=True)]
    is_label = titles[2:3] in ([GROUP + PROBABILITY], [GROUP + ANSWER])  # one that is called group
    grouped = titles[1:2] == [GROUP] and not is_label
    start = 2 if grouped else 1
    by_title = dict(zip(titles[start:], columns[start:], strict=True))
    return Answered(columns[0], columns[1] if grouped else None, by_title)


def _differences(
    tables: Sequence[dict[str, list[str]]], truth: Sequence[str], clusters: Tensor | None
) -> list[Difference]:
    count = len(next(iter(tables[0].values())))
    kind = _kind(truth[0], tables[0])
    if kind is None:
        return _of_classes(tables, clusters)
    targets = torch.tensor([_numbers(tables[0][title]) for title in truth]).T
    answers = [torch.tensor([_numbers(table[f"{title}{kind}"]) for title in truth]).T for table in tables]
    both: list[Any]
    measured: dict[str, Callable[[Any, Tensor], Tensor]]
    if kind == PROBABILITY:
        both = [LabelAnswers(0.0, probabilities, targets) for probabilities in answers]
        measured = {
            "macro AP": lambda of, weights: of.macro(weights)[:, 0],
            "micro AP": lambda of, weights: of.micro_average_precision(weights),
            "macro AUROC": lambda of, weights: of.macro(weights)[:, 1],
        }
    else:
        both = [NumberAnswers(0.0, numbers, targets) for numbers in answers]
        measured = {
            "R2": lambda of, weights: of.mean("r2", weights),
            "mean absolute error": lambda of, weights: of.mean("mean_absolute_error", weights),
        }
    return [_difference(name, measure, both, count, len(truth), clusters) for name, measure in measured.items()]


def _difference(
    name: str,
    measure: Callable[[Any, Tensor], Tensor],
    both: Sequence[Any],
    images: int,
    labels: int,
    clusters: Tensor | None,
) -> Difference:
    first, second = ((lambda weights, of=of: measure(of, weights)) for of in both)
    ones = torch.ones(1, images)
    _, low, high, p = measures.paired_difference(first, second, images, clusters=clusters)
    return Difference(name, first(ones).item(), second(ones).item(), low, high, p)


def _of_classes(tables: Sequence[dict[str, list[str]]], clusters: Tensor | None) -> list[Difference]:
    right = [
        torch.tensor([true == said for true, said in zip(table["class"], table["answer"], strict=True)])
        for table in tables
    ]

    def accuracy(hits: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda weights: (weights * hits).sum(-1) / weights.sum(-1)

    first, second = map(accuracy, right)
    ones = torch.ones(1, len(right[0]))
    _, low, high, _ = measures.paired_difference(first, second, len(right[0]), clusters=clusters)
    p = measures.mcnemar(*right, clusters)
    return [Difference("accuracy", first(ones).item(), second(ones).item(), low, high, p)]


def _numbers(cells: Sequence[str]) -> list[float]:
    try:
        return [float(cell) if cell else math.nan for cell in cells]
    except ValueError as error:
        raise InputError(f"a table of answers is damaged: {printable(error)}; evaluate again") from None


def table(differences: Sequence[Difference], first: Path, second: Path) -> list[tuple[str, str]]:
    """Rows of (name, value) for people."""
    rows = [("first", str(first)), ("second", str(second))]
    for measure, before, after, low, high, p in differences:
        form = ".4f" if measure in IN_UNITS else ".2%"
        told = [f"{value:{form}}" for value in (before, after)]
        interval = interval_text(low, high, f"+{form}")
        rows.append((measure, f"{told[0]}, {told[1]}: {after - before:+{form}} ({interval}), p = {p:.2g}"))
    return rows
