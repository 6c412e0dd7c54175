"""Lists of images: a line each, with the path, and what is known of the image."""

import csv
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from toolkit import InputError, did_you_mean, listed, printable
from toolkit.images.bands import ARRAY_SUFFIXES, check_is_file
from toolkit.images.folders import IMAGE_SUFFIXES, one_spelling

UNKNOWN = ("ignore", "negative", "positive")  # what a label of which nothing is known means
TITLES = ("path", "file", "filename", "image")  # of the first column, where the first line names the columns
PROBABILITY, ANSWER = " probability", " answer"  # what the columns of a run's answers add to a label's name


class Targets(NamedTuple):
    """What a list says of its images beyond one class each."""

    paths: list[str]  # as listed
    names: list[str]  # of the K labels, or numbers
    values: Tensor  # (N, K): 1 or 0 in float32, or numbers in float64; NaN where nothing is known
    in_columns: bool = True  # else an image's labels are named in one column, and it has no others


def list_has_labels(path: Path) -> bool:
    """Does a list have a class for each image in its second column, and no more?"""
    _, rows = _rows(path)
    labels = [row[1] for row in rows if len(row) == 2]
    return len(labels) == len(rows) and "," not in "".join(labels) and not look_like_numbers(labels)


def read_paths(path: Path, folder: Path) -> list[str]:
    """The paths in a list of images, whatever stands behind them. The arguments are `read_list`'s."""
    _, rows = _rows(path)
    return _checked_files(path, folder, [row[0] for row in rows], ())


def read_list(
    path: Path, folder: Path, group_by: str | None = None, label_columns: Sequence[str] | None = None
) -> tuple[list[str], list[str]]:
    """The names and the labels in a list of images: a line each, `path,label`, or `path` where there are no labels.

    Args:
        path: a text or CSV file in UTF-8 with commas or tabs between the columns, or spaces where an image file is
            followed by a number, as in VTAB's and FGVC's lists; its first line may name them.
        folder: what relative paths are relative to.
        group_by: a column that is no label, if it is one: see `read_groups`.
        label_columns: the one column that is the label: see `_label_columns`.

    Returns:
        The paths as listed, and the labels as text; no labels if the list has none.

    Raises:
        InputError: a file that is none of this, files that are not there, or two labels for one file.
    """
    _, rows = _label_columns(path, group_by, label_columns)
    columns = min(2, len(rows[0]))
    for row in rows:
        if len(row) != columns or not all(row):
            expected = "a path and a label, one for each image" if columns == 2 else "a path alone, as the first line"
            several = " (for several labels or numbers: --task multilabel or regression)" if len(row) > 2 else ""
            raise InputError(f"--data-list {path}: the line '{printable(','.join(row))}' is not {expected}{several}")
        if "," in row[-1] and columns == 2:
            raise InputError(
                f"--data-list {path}: the label '{printable(row[1])}' of {printable(row[0])} has a comma, and an image "
                "has one label; write the name of its class without one, or use --task multilabel"
            )
    labels = [one_spelling(row[1]) for row in rows if columns == 2]
    return _checked_files(path, folder, [row[0] for row in rows], labels), labels


def _checked_files(path: Path, folder: Path, names: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The files' names, short. Raises InputError for files that are not there, or have two labels."""
    names = [_shortest(name) for name in names]
    root = os.path.abspath(folder)
    files = [os.path.join(root, name) for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if not os.path.isfile(file)]
    if missing:
        raise InputError(f"--data-list {path}: {len(missing)} of its files are not in {folder}: {listed(missing)}")
    files = [os.path.normpath(file) if ".." in file else file for file in files]
    label_of = dict(zip(files, labels, strict=False))
    torn = [name for name, file, label in zip(names, files, labels, strict=False) if label_of[file] != label]
    if torn:
        raise InputError(
            f"--data-list {path}: two labels for {listed(dict.fromkeys(torn))}; leave one of the lines out"
        )
    return names


def _shortest(name: str) -> str:
    """A path without ./ and //. What .. leaves depends on links, so it stays."""
    return str(PurePosixPath(name)) if "./" in name or "//" in name else name


def _rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """A list's titles, if its first line has some, and its lines, in cells."""
    rows = []
    number = 0
    line = ""
    try:
        check_is_file(path)
        with open(path, encoding="utf-8-sig") as file:
            first = file.readline()
            is_spaced = _is_spaced(first, path)
            delimiter = "\t" if "\t" in first else ","
            file.seek(0)
            for line in file:
                number += 1
                spaced = _SPACED.fullmatch(line.strip())
                if is_spaced:
                    cells = list(spaced.groups()) if spaced else [line]
                else:
                    # Each line by itself: a quotation mark without its other would make one cell of all behind it.
                    [cells] = csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True)
                cells = [cell.strip() for cell in cells]
                if any(cells):
                    rows.append(cells)
    except OSError as error:
        raise InputError(f"--data-list {path}: cannot read it: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--data-list {path}: not a text file of `path,label` lines: {printable(error)}") from None
    except csv.Error as error:
        raise InputError(
            f"--data-list {path}: line {number} is not `path,label` ({error}); look at its quotation marks: "
            f"'{printable(line.strip())}'"
        ) from None
    titles = []
    if rows and _are_titles(rows):
        titles = rows.pop(0)
    if not rows:
        raise InputError(f"--data-list {path}: lists no images; write a line `path,label` for each")
    return titles, rows


def _are_titles(rows: Sequence[Sequence[str]]) -> bool:
    """Does the first line name the columns: by a usual word, or by one that is no file, and the second is an image?"""
    first = rows[0][0]
    if first.lower() in TITLES:
        return True
    if len(rows) < 2 or "." in first or "/" in first:
        return False
    return rows[1][0].lower().endswith((*IMAGE_SUFFIXES, *ARRAY_SUFFIXES))


def read_groups(path: Path, column: str) -> np.ndarray:
    """What stands in a column of a list: the name of the group, such as a patient, that each image belongs to, (N,).

    Raises:
        InputError: the list has no such column, or nothing stands there for some image.
    """
    titles, rows = _rows(path)
    place = _place_of(column, titles, path)
    bare = [row[0] for row in rows if len(row) > place and not row[place]]
    if bare:
        raise InputError(
            f"--data-list {path}: nothing in the column {printable(column)} for {listed(bare)}; write a name, "
            "one of its own where the group is not known"
        )
    return np.array([one_spelling(row[place]) for row in rows])


def has_column(path: Path, column: str) -> bool:
    """Does the first line of a list name this column, behind the path?"""
    return column.lower() in map(str.lower, _rows(path)[0][1:])


def _label_columns(
    path: Path, group_by: str | None, label_columns: Sequence[str] | None
) -> tuple[list[str], list[list[str]]]:
    """Titles and lines of a list with the columns that are labels or numbers, and the paths in front.

    Args:
        group_by: a column that is none, if it is one of the list's and no folder's level.
        label_columns: the columns that are, by their titles; `A..B` is all from A to B. None: all.
    """
    titles, rows = _rows(path)
    places = list(range(len(titles)))
    if label_columns:
        places = [0]
        for entry in label_columns:
            first, _, last = entry.partition("..")
            start = _place_of(first, titles, path, "--label-columns")
            end = _place_of(last or first, titles, path, "--label-columns")
            places += range(start, end + 1)
    grouped = group_by is not None and not group_by.isdecimal()
    if grouped:
        group = _place_of(group_by, titles, path)
        places = [place for place in places if place != group]
    if not label_columns and not grouped:
        return titles, rows
    _check_widths(path, titles, rows)
    return [titles[place] for place in places], [[row[place] for place in places] for row in rows]


def _check_widths(path: Path, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Raise InputError for a line with more or fewer cells than there are titles."""
    for row in rows:
        if len(row) != len(titles):
            line = printable(",".join(row))
            raise InputError(f"--data-list {path}: the line '{line}' has {len(row)} columns and not {len(titles)}")


def _place_of(column: str, titles: Sequence[str], path: Path, option: str = "--group-by") -> int:
    """Where a column stands behind the paths, by its title or else by that in other letters."""
    if not titles:
        remedy = ", or give the number of a folder's level" if option == "--group-by" else ""
        raise InputError(
            f"{option} {printable(column)}: the first line of {path} names no columns; write it, as "
            f"path,label,{printable(column)}{remedy}"
        )
    for same in (str, str.lower):
        found = [place for place, title in enumerate(titles) if place and same(title) == same(column)]
        if found:
            return found[0]
    hint = did_you_mean(column, titles[1:])
    raise InputError(
        f"{option} {printable(column)}: no such column in {path}, which has {listed(titles[1:], 20)}"
        + (f" ({hint})" if hint else "")
    )


_IMAGE = f".+(?:{'|'.join(map(re.escape, (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES)))})"
_SPACED = re.compile(rf"({_IMAGE}) +(\d+)", re.IGNORECASE)  # a path may have spaces of its own
_BEFORE_A_COMMA = re.compile(rf"{_IMAGE} *", re.IGNORECASE)


def _is_spaced(first: str, path: Path) -> bool:
    """Does a list's first line say that spaces stand between its columns? Raises InputError where commas may, too."""
    if "\t" in first or not _SPACED.fullmatch(first.strip()):
        return False
    before, comma, _ = first.partition(",")
    if comma and _BEFORE_A_COMMA.fullmatch(before.strip()):
        raise InputError(
            f"--data-list {path}: the line '{printable(first.strip())}' may be `path,label` or `path label`: put a tab "
            "between path and label"
        )
    return True


# ----------------------------------------------------------------------------------------------------------------------
# Several labels an image, or numbers


def read_label_list(
    path: Path,
    folder: Path,
    unknown: str = "ignore",
    group_by: str | None = None,
    label_columns: Sequence[str] | None = None,
) -> Targets:
    """A list of images with several labels: `path,"a,b"`, or a column for each label that the first line names.

    In columns 1 is yes, 0 is no, and -1 or nothing is unknown (as in CheXpert's lists). In the other form what is not
    named is no.

    Args:
        path, folder, group_by: as for `read_list`.
        unknown: one of UNKNOWN: what becomes of unknown labels.
        label_columns: the columns that are labels, where others are none: see `_label_columns`.

    Raises:
        InputError: a file that is none of this, files that are not there, or two lines for one file.
    """
    titles, rows = _label_columns(path, group_by, label_columns)
    if label_columns or _has_columns(titles, rows):
        targets = _columns(path, titles, rows, _ANSWERS.get, "1, 0, or -1 or nothing for unknown")
    else:
        targets = _named_labels(path, titles, rows)
    if unknown != "ignore":
        targets.values.nan_to_num_(float(unknown == "positive"))
    return _checked(path, folder, targets)


def read_targets(
    path: Path,
    folder: Path,
    task: str,
    unknown: str = "ignore",
    group_by: str | None = None,
    label_columns: Sequence[str] | None = None,
) -> Targets:
    """`read_label_list` for 'multilabel', `read_number_list` for 'regression'."""
    if task == "multilabel":
        return read_label_list(path, folder, unknown, group_by, label_columns)
    return read_number_list(path, folder, group_by, label_columns)


_ANSWERS = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "-1": math.nan, "-1.0": math.nan, "": math.nan}


def read_number_list(
    path: Path, folder: Path, group_by: str | None = None, label_columns: Sequence[str] | None = None
) -> Targets:
    """A list of images with one or several numbers each; a first line may name them. Nothing is unknown.

    Raises:
        InputError: a file that is none of this, files that are not there, or two lines for one file.
    """
    titles, rows = _label_columns(path, group_by, label_columns)
    count = len(rows[0]) - 1
    if not titles and count == 1:
        titles = ["path", "number"]
    elif not titles:
        titles = ["path", *(f"number {i}" for i in range(1, count + 1))]
    return _checked(path, folder, _columns(path, titles, rows, _number, "a number, or nothing for unknown"))


def _number(text: str) -> float | None:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        return None
    return None if math.isinf(value) or text.lower().lstrip("+-") == "nan" else value


def _has_columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Has a list a column for each label? One of two columns has, if those are answers and not called labels."""
    if len(titles) != 2:
        return len(titles) > 2
    return titles[1].lower() not in ("label", "labels") and all(row[-1] in _ANSWERS for row in rows)


def _columns(
    path: Path, titles: Sequence[str], rows: Sequence[Sequence[str]], read: Callable[[str], float | None], expected: str
) -> Targets:
    """What stands in the columns behind the paths. Raises InputError where a cell cannot be read."""
    names = [one_spelling(title) for title in titles[1:]]
    if not names or not all(names) or len(set(names)) < len(names):
        raise InputError(f"--data-list {path}: expected a column with a name of its own for each label or number")
    _check_widths(path, titles, rows)
    values = [[read(cell) for cell in row[1:]] for row in rows]
    for row, numbers in zip(rows, values, strict=True):
        if None in numbers:
            place = numbers.index(None)
            raise InputError(
                f"--data-list {path}: '{printable(row[1 + place])}' in the column {printable(names[place])} is not "
                f"{expected}; leave out columns that are no answers, or name those that are with --label-columns"
            )
    dtype = torch.float64 if read is _number else torch.float32
    return Targets([row[0] for row in rows], names, torch.tensor(values, dtype=dtype))


_YES_OR_NO = {"yes", "no", "y", "n", "true", "false", "t", "f"}


def _named_labels(path: Path, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Targets:
    """What stands behind the paths is the names of the labels that an image has."""
    given = {row[-1].lower() for row in rows} - {""}
    if len(titles) == 2 and given and given <= _YES_OR_NO:
        raise InputError(
            f"--data-list {path}: the column {printable(titles[1])} says {listed(sorted(given))}: write 1 for yes and "
            "0 for no"
        )
    for sign in ";|":
        if sign in "".join(given) and "," not in "".join(given):
            raise InputError(
                f"--data-list {path}: '{sign}' stands between the labels of an image, as it seems: put commas there, "
                'and quotation marks around them, as `path,"a,b"`'
            )
    for row in rows:
        if len(row) != 2:
            raise InputError(
                f"--data-list {path}: the line '{printable(','.join(row))}' is not `path,\"a,b\"`; put the labels of "
                "an image into quotation marks, or name the columns in the first line, as path,cat,dog"
            )
    found = [list(filter(None, (one_spelling(name.strip()) for name in row[1].split(",")))) for row in rows]
    names = in_order({name for labels in found for name in labels})
    if not names:
        raise InputError(f"--data-list {path}: no image has a label")
    place = {name: number for number, name in enumerate(names)}
    values = torch.zeros(len(rows), len(names))
    for i, labels in enumerate(found):
        values[i, [place[name] for name in labels]] = 1
    return Targets([row[0] for row in rows], names, values, in_columns=False)


def _checked(path: Path, folder: Path, targets: Targets) -> Targets:
    for name in targets.names:
        for of_answers in (name + PROBABILITY, name + ANSWER):
            if of_answers in targets.names:
                raise InputError(
                    f"--data-list {path}: '{printable(of_answers)}' is what the answers for {printable(name)} will be "
                    "called; give that label another name"
                )
    labels = [str(row) for row in targets.values.tolist()]  # NaN is no other NaN
    return targets._replace(paths=_checked_files(path, folder, targets.paths, labels))


def look_like_numbers(labels: Sequence[str]) -> bool:
    """Are labels numbers that tell how much, and not which class: all different, or with decimals?"""
    numbers = [_number(label) for label in labels]
    if len(labels) < 3 or None in numbers:
        return False
    return len(set(numbers)) == len(labels) or any(number != int(number) for number in numbers)


def in_order(names: Iterable[str]) -> list[str]:
    """Sorted; numbers by their value, so that 10 comes after 9."""
    return sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))


def like(targets: Targets, names: Sequence[str], path: Path, other: str | Path, unknown: str = "ignore") -> Targets:
    """The same with its columns in the order of these names.

    A label without a column is `unknown`, as for `read_label_list`; one that a list of names never names is no.

    Raises:
        InputError: it has names that are not among them, or lacks a column of numbers.
    """
    surplus = sorted(set(targets.names) - set(names))
    if surplus:
        raise InputError(f"--data-list {path} has {listed(surplus)}, which {other} lacks")
    missing = [name for name in names if name not in targets.names]
    if missing and targets.values.dtype == torch.float64:
        raise InputError(f"--data-list {path} has no column {listed(missing)}, which {other} has; add it")
    fill = 0.0
    if targets.in_columns:
        fill = {"ignore": math.nan, "negative": 0.0, "positive": 1.0}[unknown]
    values = targets.values.new_full((len(targets.values), len(names)), fill)
    for place, name in enumerate(targets.names):
        values[:, names.index(name)] = targets.values[:, place]
    return targets._replace(names=list(names), values=values)
