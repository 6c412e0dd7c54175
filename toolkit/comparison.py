"""Two runs over the same images: is the one better than the other by more than chance?"""

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit import InputError, listed, measures, printable
from toolkit.data import LabelledImages
from toolkit.files import write_csv
from toolkit.tasks import LabelAnswers, NumberAnswers

PROBABILITY, ANSWER = " probability", " answer"  # at the end of the titles of columns of answers
IN_UNITS = ("R2", "mean absolute error")  # shown as numbers; all else is a share, shown in per cent


def answers_path(results: Path) -> Path:
    """Where the answers for each image are: beside `results.json`."""
    return results.with_name(f"{results.stem}_answers.csv")


def write_answers(columns: dict[str, Sequence[Any]], images: LabelledImages, results: Path) -> None:
    """Write what is true of each image and what was answered, a row each, beside the results."""
    table = {"image": list(images.relative_names()), **columns}
    rows = [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]
    write_csv(rows, tuple(table), answers_path(results))


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

    Raises:
        InputError: answers are missing, or are for other images or by another truth.
    """
    tables = [_read(answers_path(path)) for path in (first, second)]
    for path, table in zip((first, second), tables, strict=True):
        if table.keys() != tables[0].keys():
            raise InputError(f"{path} is of other classes, labels or numbers than {first}: nothing to compare")
    images = tables[0].pop("image")
    place = {name: i for i, name in enumerate(tables[1].pop("image"))}
    missing = [name for name in images if name not in place]
    if missing or len(place) != len(images):
        what = f", such as {printable(missing[0])}" if missing else ""
        raise InputError(f"{first} and {second} are over other images{what}: evaluate both on the same ones")
    order = [place[name] for name in images]
    tables[1] = {title: [cells[i] for i in order] for title, cells in tables[1].items()}
    is_truth = [title for title in tables[0] if not title.endswith((PROBABILITY, ANSWER))]
    if "class" in tables[0] and "answer" in tables[0]:
        is_truth = ["class"]
    other = [title for title in is_truth if tables[0][title] != tables[1][title]]
    if other:
        raise InputError(f"{first} and {second} do not agree on what is true: look at the column {listed(other, 4)}")
    return _differences(tables, is_truth)


def _read(path: Path) -> dict[str, list[str]]:
    """The columns of a file of answers, by title."""
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
    if titles[:1] != ["image"] or len(rows) < 2 or any(len(row) != len(titles) for row in rows):
        raise InputError(f"{path} is not a table of answers, or damaged: evaluate again")
    return {title: [row[i] for row in rows[1:]] for i, title in enumerate(titles)}


def _differences(tables: Sequence[dict[str, list[str]]], truth: Sequence[str]) -> list[Difference]:
    count = len(next(iter(tables[0].values())))
    if truth == ["class"]:
        return _of_classes(tables)
    kind = PROBABILITY if f"{truth[0]}{PROBABILITY}" in tables[0] else ANSWER
    targets = torch.tensor([_numbers(tables[0][title]) for title in truth]).T
    answers = [torch.tensor([_numbers(table[f"{title}{kind}"]) for title in truth]).T for table in tables]
    both: list[Any]
    measured: dict[str, Callable[[Any, Tensor], Tensor]]
    if kind == PROBABILITY:
        both = [LabelAnswers(0.0, probabilities, targets) for probabilities in answers]
        measured = {
            "macro AP": lambda of, weights: of.macro("average_precision", weights),
            "micro AP": lambda of, weights: of.micro_average_precision(weights),
            "macro AUROC": lambda of, weights: of.macro("auroc", weights),
        }
    else:
        both = [NumberAnswers(0.0, numbers, targets) for numbers in answers]
        measured = {
            "R2": lambda of, weights: of.mean("r2", weights),
            "mean absolute error": lambda of, weights: of.mean("mean_absolute_error", weights),
        }
    return [_difference(name, measure, both, count, len(truth)) for name, measure in measured.items()]


def _difference(
    name: str, measure: Callable[[Any, Tensor], Tensor], both: Sequence[Any], images: int, labels: int
) -> Difference:
    first, second = ((lambda weights, of=of: measure(of, weights)) for of in both)
    ones = torch.ones(1, images)
    _, low, high, p = measures.paired_difference(first, second, images, labels)
    return Difference(name, first(ones).item(), second(ones).item(), low, high, p)


def _of_classes(tables: Sequence[dict[str, list[str]]]) -> list[Difference]:
    right = [
        torch.tensor([true == said for true, said in zip(table["class"], table["answer"], strict=True)])
        for table in tables
    ]

    def accuracy(hits: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda weights: (weights * hits).sum(-1) / weights.sum(-1)

    first, second = map(accuracy, right)
    ones = torch.ones(1, len(right[0]))
    _, low, high, _ = measures.paired_difference(first, second, len(right[0]))
    return [Difference("accuracy", first(ones).item(), second(ones).item(), low, high, measures.mcnemar(*right))]


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
        change, lowest, highest = (f"{value:+{form}}" for value in (after - before, low, high))
        rows.append((measure, f"{told[0]}, {told[1]}: {change} (95% interval {lowest} to {highest}), p = {p:.2g}"))
    return rows
