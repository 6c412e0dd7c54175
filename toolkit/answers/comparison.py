"""Two runs over the same images: is the one better than the other by more than chance?"""

import csv
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit import InputError, listed, printable
from toolkit.answers import measures
from toolkit.answers.answer_reports import interval_text
from toolkit.answers.multilabel import LabelAnswers
from toolkit.answers.regression import NumberAnswers
from toolkit.files import write_cells
from toolkit.images.data import LabelledImages
from toolkit.images.lists import ANSWER, PROBABILITY

IMAGE = "image"  # the first column, and the second; a label may be called the same, and then stands behind them
GROUP = "group"
# The figures that are compared, by how the columns of answers end: the first of the answers' `figures`.
SHOWN = {PROBABILITY: ("macro AP", "micro AP", "macro AUROC"), ANSWER: ("R2", "mean absolute error")}


def answers_path(results: Path) -> Path:
    """Where the answers for each image are: beside `results.json`."""
    return results.with_name(f"{results.stem}_answers.csv")


def write_answers(columns: dict[str, Sequence[Any]], images: LabelledImages, results: Path) -> None:
    """Write what is true of each image and what was answered, a row each, beside the results.

    If the images have groups, these are in the second column.
    """
    first: dict[str, Sequence[Any]] = {IMAGE: images.relative_names()}
    if images.groups is not None:
        first[GROUP] = images.groups
    rows = zip(*first.values(), *columns.values(), strict=True)
    write_cells(rows, [*first, *columns], answers_path(results))


class Answered(NamedTuple):
    """A file of answers: what `write_answers` wrote."""

    images: list[str]
    groups: list[str] | None
    columns: dict[str, list[str]]  # by title

    def of(self, images: Sequence[str]) -> "Answered":
        """The same, in the order of these images."""
        place = {name: i for i, name in enumerate(self.images)}

        def ordered(cells: list[str]) -> list[str]:
            return [cells[place[name]] for name in images]

        columns = {title: ordered(cells) for title, cells in self.columns.items()}
        return Answered(list(images), ordered(self.groups) if self.groups else None, columns)


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
    one = _read(answers_path(first))
    other = _read(answers_path(second))
    if one.columns.keys() != other.columns.keys():
        raise InputError(f"{second} is of other classes, labels or numbers than {first}: nothing to compare")
    missing = sorted(set(one.images) - set(other.images))
    if missing or len(set(other.images)) != len(one.images):
        what = f", such as {printable(missing[0])}" if missing else ""
        raise InputError(f"{first} and {second} are over other images{what}: evaluate both on the same ones")
    other = other.of(one.images)
    is_truth = _truth(one.columns)
    if not is_truth:
        raise InputError(f"{answers_path(first)} is not a table of answers, or damaged: evaluate again")
    differing = [title for title in is_truth if one.columns[title] != other.columns[title]]
    if differing:
        columns = listed(differing, 4)
        raise InputError(f"{first} and {second} do not agree on what is true: look at the column {columns}")
    groups = one.groups or other.groups
    if other.groups is not None and other.groups != groups:
        raise InputError(f"{first} and {second} have the images in other groups: evaluate both with one --group-by")
    return _differences(one.columns, other.columns, is_truth, None if groups is None else _numbered(groups))


def _truth(titles: Container[str]) -> list[str]:
    """The columns that say what is true."""
    found = [title for title in titles if _kind(title, titles) is not None]
    if not found and "class" in titles and "answer" in titles:
        return ["class"]
    return found


def _kind(title: str, titles: Container[str]) -> str | None:
    """What the column of answers beside the column of a label or number ends with; None: it is no such column."""
    for kind in (ANSWER, PROBABILITY):
        if title + kind in titles:
            return kind
    return None


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
    if titles[1:2] == [GROUP] and not is_label:
        return Answered(columns[0], columns[1], dict(zip(titles[2:], columns[2:], strict=True)))
    return Answered(columns[0], None, dict(zip(titles[1:], columns[1:], strict=True)))


Table = dict[str, list[str]]


def _differences(first: Table, second: Table, truth: Sequence[str], clusters: Tensor | None) -> list[Difference]:
    kind = _kind(truth[0], first)
    if kind is None:
        pair = [_right(first), _right(second)]
        [found] = _compared(["accuracy"], _accuracy, pair, len(pair[0]), clusters)
        return [found._replace(p=measures.mcnemar(*pair, clusters))]
    answers = LabelAnswers if kind == PROBABILITY else NumberAnswers
    titles = [title + kind for title in truth]
    targets = _numbers(first, truth)
    runs = [answers(0.0, _numbers(table, titles), targets) for table in (first, second)]
    return _compared(SHOWN[kind], answers.figures, runs, len(targets), clusters)


def _compared(
    names: Sequence[str],
    figures: Callable[[Any, Tensor], Tensor],
    runs: Sequence[Any],
    images: int,
    clusters: Tensor | None,
) -> list[Difference]:
    """Compare two runs by the figures with these names, of all images and of parts that are the same for both.

    So what makes images easy for both does not blur the difference.

    Args:
        figures: of the answers of a run, (n, columns) for weights (n, images); further columns are left out.
    """
    first, second = runs
    shown = len(names)

    def difference(weights: Tensor) -> Tensor:
        return (figures(second, weights) - figures(first, weights))[:, :shown]

    before, after = (figures(run, torch.ones(1, images))[0].tolist()[:shown] for run in runs)
    found = measures.jackknife(difference, images, clusters, [measures.UNBOUNDED] * shown)
    differences = []
    for name, one, other, ends, p in zip(names, before, after, found.intervals, found.p, strict=True):
        differences.append(Difference(name, one, other, *ends, p))
    return differences


def _right(table: Table) -> Tensor:
    return torch.tensor([true == answer for true, answer in zip(table["class"], table["answer"], strict=True)])


def _accuracy(right: Tensor, weights: Tensor) -> Tensor:
    return (measures.weighted_sum(right, weights) / weights.sum(1))[:, None]


def _numbers(table: Table, titles: Sequence[str]) -> Tensor:
    """These columns as numbers, (N, K), NaN where nothing stands."""
    columns = []
    try:
        for title in titles:
            columns.append([float(cell or "nan") for cell in table[title]])
    except ValueError as error:
        raise InputError(f"a table of answers is damaged: {printable(error)}; evaluate again") from None
    return torch.tensor(columns, dtype=torch.float64).T


def table(differences: Sequence[Difference], first: Path, second: Path) -> list[tuple[str, str]]:
    """Rows of (name, value) for people."""
    rows = [("first", str(first)), ("second", str(second))]
    for measure, before, after, low, high, p in differences:
        form = ".4f" if measure in SHOWN[ANSWER] else ".2%"  # a share in per cent
        interval = interval_text(low, high, f"+{form}")
        rows.append((measure, f"{before:{form}}, {after:{form}}: {after - before:+{form}} ({interval}), p = {p:.2g}"))
    return rows
