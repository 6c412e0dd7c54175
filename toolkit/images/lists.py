"""Lists of images: a line each, with the path, and what is known of the image."""

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from toolkit import InputError, listed, printable
from toolkit.images import remote
from toolkit.images.bands import ARRAY_SUFFIXES
from toolkit.images.folders import IMAGE_SUFFIXES, one_spelling

TITLES = ("path", "file", "filename", "image")  # of the first column, where the first line names the columns
PROBABILITY, ANSWER = " probability", " answer"  # what the columns of a run's answers add to a label's name


class Targets(NamedTuple):
    """What a list says of its images beyond one class each."""

    paths: list[str]  # as listed
    names: list[str]  # of the K labels, or numbers
    values: Tensor  # (N, K): 1 or 0 in float32, or numbers in float64; NaN where nothing is known
    in_columns: bool = True  # else an image's labels are named in one column, and it has no others


def folder_of(path: Path, other: str | Path | None) -> Path:
    """What a list's paths are relative to: its own folder or, where only that has the first one, the other folder."""
    if other is None or remote.is_remote(other):  # an adapter's file may have named it
        return path.parent
    _, [(first, *_), *_] = _rows(path)
    if remote.is_file(remote.located(path.parent, first)) or not remote.is_file(remote.located(other, first)):
        return path.parent
    return Path(other)


def list_has_labels(path: Path) -> bool:
    """Does a list have a class for each image in its second column, and no more?"""
    _, rows = _rows(path)
    labels = [row[1] for row in rows if len(row) == 2]
    return len(labels) == len(rows) and "," not in "".join(labels) and not look_like_numbers(labels)


def look_like_numbers(labels: Sequence[str]) -> bool:
    """Are labels numbers that tell how much, and not which class: all different, or with decimals?"""
    numbers = list(map(_number, labels))
    if len(labels) < 3 or None in numbers:
        return False
    return len(set(numbers)) == len(labels) or any(number != int(number) for number in numbers)


def read_paths(path: Path, folder: Path) -> list[str]:
    """The paths in a list of images, whatever stands behind them. The arguments are `read_list`'s."""
    _, rows = _rows(path)
    return checked_files(path, folder, map(itemgetter(0), rows), ())


def read_list(
    path: Path,
    folder: Path,
    group_by: str | None = None,
    label_columns: Sequence[str] | None = None,
    line: str = "path,label",
) -> tuple[list[str], list[str]]:
    """The paths as listed, and the labels as text, in a list of images, a line each.

    Args:
        path: a text or CSV file in UTF-8 with commas or tabs between the columns; its first line may name them.
        folder: what relative paths are relative to.
        group_by: a column that is no label, if it is one: see `read_groups`.
        label_columns: the one column that is the label: see `_label_columns`.
        line: what a line is to have. A label is put into one spelling, anything else stays as listed.

    Raises InputError for a file that is none of this, files that are not there, or two labels for one file.
    """
    _, rows = _label_columns(path, group_by, label_columns)
    kind = line.partition(",")[2]
    if max(map(len, rows)) == 1:
        raise _error(path, f"its images have no {kind}s; write `{line}` lines")
    names = []
    labels = []
    for row in rows:
        if len(row) != 2 or not all(row):
            advice = ""
            if len(row) > 2 and kind == "label":
                advice = " (for several labels or numbers: --task multilabel or regression)"
            raise _error(path, f"the line '{_shown(row)}' is not a path and a {kind}, one for each image", advice)
        if kind == "label" and "," in row[1]:
            label = f"the label '{printable(row[1])}' of {printable(row[0])}"
            problem = f"{label} has a comma: write the name of its class without"
            raise _error(path, problem, ", or use --task multilabel")
        names.append(row[0])
        labels.append(one_spelling(row[1]) if kind == "label" else row[1])
    return checked_files(path, folder, names, labels), labels


def _shown(row: Sequence[str]) -> str:
    return printable(",".join(row))


def _error(path: Path, problem: str, advice: str = "") -> InputError:
    return InputError(f"{path}: {problem}", advice)


def checked_files(path: Path, folder: Path, names: Iterable[str], labels: Sequence[str], remedy: str = "") -> list[str]:
    """The files' names, without ./ and //. Raises InputError for files that are not there, or have two labels."""
    root = folder if remote.is_remote(folder) else os.path.abspath(folder)
    # What .. leaves depends on links, so it stays.
    short = [str(PurePosixPath(name)) if "./" in name or "//" in name else name for name in names]
    files = [remote.located(root, name) for name in short]
    missing = [name for name, file in zip(short, files, strict=True) if not remote.is_file(file)]
    if missing:
        raise _error(path, f"{len(missing)} of its files are not in {folder}: {listed(missing)}{remedy}")
    label_of: dict[str, str] = {}
    torn = {}
    for name, file, label in zip(short, files, labels, strict=False):  # of paths alone there are no labels
        if label_of.setdefault(os.path.normpath(file), label) != label:
            torn[name] = label
    if torn:
        raise _error(path, f"two labels for {listed(torn)}; leave one of the lines out")
    return short


def _rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """A list's titles, if its first line has some, and its lines, in cells."""
    rows = []
    number = 0
    try:
        with io.StringIO(remote.read(path).decode("utf-8-sig"), newline=None) as file:
            delimiter = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            for line in file:
                number += 1
                # Each line by itself: a quotation mark without its other would make one cell of all behind it.
                [cells] = csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True)
                cells = list(map(str.strip, cells))
                if any(cells):
                    rows.append(cells)
    except OSError as error:
        raise _error(path, f"cannot read it: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise _error(path, f"not a text file of `path,label` lines: {printable(error)}") from None
    except csv.Error as error:
        marks = f"look at its quotation marks: '{printable(line.strip())}'"
        raise _error(path, f"line {number} is not `path,label` ({error}); {marks}") from None
    titles = []
    if rows:
        first = rows[0][0]
        # Titles begin with a usual word, or with one that is no file where the second line begins with an image.
        is_followed = len(rows) > 1 and rows[1][0].lower().endswith((*IMAGE_SUFFIXES, *ARRAY_SUFFIXES))
        if first.lower() in TITLES or (is_followed and "." not in first and "/" not in first):
            titles = rows.pop(0)
    if not rows:
        raise _error(path, "lists no images; write a line `path,label` for each")
    return titles, rows


def read_groups(path: Path, column: str) -> np.ndarray:
    """What stands in a column: the group, such as a patient, of each image, (N,). Raises InputError for nothing."""
    titles, rows = _rows(path)
    place = _place_of(column, titles, path)
    _check_widths(path, titles, rows)
    if bare := [row[0] for row in rows if not row[place]]:
        nothing = f"nothing in the column {printable(column)} for {listed(bare)}"
        raise _error(path, f"{nothing}; write a name, one of its own where the group is not known")
    return np.array([one_spelling(row[place]) for row in rows])


def has_column(path: Path, column: str) -> bool:
    """Does the first line of a list name this column, behind the path?"""
    return column in _rows(path)[0][1:]


def _label_columns(
    path: Path, group_by: str | None, label_columns: Sequence[str] | None
) -> tuple[list[str], list[list[str]]]:
    """Titles and lines of a list with the columns that are labels or numbers, and the paths in front.

    They are `label_columns` by their titles, `A..B` for all from A to B, or all; without `group_by` if it is a column.
    """
    titles, rows = _rows(path)
    grouped = group_by is not None and not group_by.isdecimal()
    if not label_columns and not grouped:
        return titles, rows
    places = list(range(len(titles)))
    if label_columns:
        places = [0]
        for entry in label_columns:
            first, _, last = entry.partition("..")
            ends = [_place_of(column, titles, path, "--label-columns") for column in (first, last or first)]
            places += range(min(ends), max(ends) + 1)
    if grouped:
        group = _place_of(group_by, titles, path)
        places = [place for place in places if place != group]
    _check_widths(path, titles, rows)
    for cells in (titles, *rows):
        cells[:] = [cells[place] for place in places]
    return titles, rows


def _check_widths(path: Path, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Raise InputError for a line with more or fewer cells than there are titles."""
    for row in rows:
        if len(row) != len(titles):
            raise _error(path, f"the line '{_shown(row)}' has {len(row)} columns and not {len(titles)}")


def _place_of(column: str, titles: Sequence[str], path: Path, option: str = "--group-by") -> int:
    """Where the column of this title stands behind the paths."""
    if not titles:
        problem = f"the first line of {path} names no columns; write it, as path,label,{printable(column)}"
        if option == "--group-by":
            problem += ", or give the number of a folder's level"
        raise InputError(f"{option} {printable(column)}: {problem}")
    names = titles[1:]
    if column not in names:
        raise InputError(f"{option} {printable(column)}: no such column in {path}, which has {listed(names, 20)}")
    return 1 + names.index(column)


_ANSWERS = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "-1": math.nan, "-1.0": math.nan, "": math.nan}
_YES_OR_NO = {"yes", "no", "y", "n", "true", "false", "t", "f"}


def read_targets(
    path: Path, folder: Path, truth: str, group_by: str | None = None, label_columns: Sequence[str] | None = None
) -> Targets:
    """A list of images with several labels, or with one or several numbers.

    Labels are named as `path,"a,b"`, where what is not named is no; or each has a column, in which 1 is yes, 0 is no,
    and -1 or nothing is unknown (as in CheXpert's lists). Numbers have columns, and nothing is unknown.

    `truth` is 'labels' or 'numbers'; the other arguments are as for `read_list`, with one label column or several.
    Raises InputError for a file that is none of this, files that are not there, or two lines for one file.
    """
    titles, rows = _label_columns(path, group_by, label_columns)
    # Two columns are a path and a label's answers, or the names of labels.
    is_answered = len(titles) == 2 and titles[1].lower() not in ("label", "labels")
    is_answered = is_answered and all(row[-1] in _ANSWERS for row in rows)
    if truth == "numbers":
        numbers = [f"number {i}" for i in range(1, len(rows[0]))]
        if len(numbers) == 1:
            numbers = ["number"]
        targets = _columns(path, titles or ["path", *numbers], rows, _number, "a number, or nothing for unknown")
    elif label_columns or len(titles) > 2 or is_answered:
        targets = _columns(path, titles, rows, _ANSWERS.get, "1, 0, or -1 or nothing for unknown")
    else:
        targets = _named_labels(path, titles, rows)
    labels = list(map(str, targets.values.tolist()))  # as text, since NaN is no other NaN
    return targets._replace(paths=checked_files(path, folder, targets.paths, labels))


def _number(text: str) -> float | None:
    """NaN for nothing; None for what is no finite number."""
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) or not text else None


def _columns(
    path: Path, titles: Sequence[str], rows: Sequence[Sequence[str]], read: Callable[[str], float | None], expected: str
) -> Targets:
    """What stands in the columns behind the paths. Raises InputError where a cell cannot be read."""
    names = list(map(one_spelling, titles[1:]))
    ending = ANSWER if read is _number else PROBABILITY
    taken = {*names, *(name + ending for name in names)}  # the columns of `results_answers.csv`
    if not names or not all(names) or len(taken) < 2 * len(names):
        problem = f"expected a column with a name of its own, and not with{ending} behind it, for each label or number"
        raise _error(path, problem)
    _check_widths(path, titles, rows)
    values = [list(map(read, row[1:])) for row in rows]
    for row, numbers in zip(rows, values, strict=True):
        if None in numbers:
            place = numbers.index(None)
            cell = f"'{printable(row[1 + place])}' in the column {printable(names[place])}"
            raise _error(path, f"{cell} is not {expected}", "; name the columns that are answers with --label-columns")
    dtype = torch.float64 if read is _number else torch.float32
    return Targets(list(map(itemgetter(0), rows)), names, torch.tensor(values, dtype=dtype))


def _named_labels(path: Path, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Targets:
    """What stands behind the paths is the names of the labels that an image has."""
    given = {row[-1].lower() for row in rows} - {""}
    if len(titles) == 2 and given and given <= _YES_OR_NO:
        column = printable(titles[1])
        raise _error(path, f"the column {column} says {listed(sorted(given))}: write 1 for yes and 0 for no")
    for row in rows:
        if len(row) != 2 or set("|;") & set(row[1]):  # ChestX-ray14 has | between labels
            remedy = "put labels into quotation marks, or name columns first, as path,cat,dog"
            raise _error(path, f"the line '{_shown(row)}' is not `path,\"a,b\"`; {remedy}")
    found = []
    for row in rows:
        labels = map(str.strip, row[1].split(","))
        found.append([one_spelling(label) for label in labels if label])
    names = in_order(set().union(*found))
    if not names:
        raise _error(path, "no image has a label")
    values = torch.zeros(len(rows), len(names))
    for i, labels in enumerate(found):
        values[i, list(map(names.index, labels))] = 1
    return Targets(list(map(itemgetter(0), rows)), names, values, in_columns=False)


def in_order(names: Iterable[str]) -> list[str]:
    """Sorted; numbers by their value, so that 10 comes after 9."""
    return sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))


def like(targets: Targets, names: Sequence[str], path: Path, other: str | Path) -> Targets:
    """The same with its columns in the order of these names. Raises InputError for others, or if numbers are missing.

    A label without a column is unknown; one that a list of names never names is no.
    """
    if surplus := sorted(set(targets.names) - set(names)):
        raise _error(path, f"it has {listed(surplus)}, which {other} lacks")
    missing = [name for name in names if name not in targets.names]
    if missing and targets.values.dtype == torch.float64:
        raise _error(path, f"it has no column {listed(missing)}, which {other} has; add it")
    fill = math.nan if targets.in_columns else 0.0
    values = targets.values.new_full((len(targets.values), len(names)), fill)
    values[:, list(map(names.index, targets.names))] = targets.values
    return targets._replace(names=list(names), values=values)
