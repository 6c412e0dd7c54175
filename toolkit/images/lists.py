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
from toolkit.images.bands import ARRAY_SUFFIXES
from toolkit.images.folders import IMAGE_SUFFIXES, one_spelling

UNKNOWN = ("ignore", "negative", "positive")  # what a label of which nothing is known means
TITLES = ("path", "file", "filename", "image")  # of the first column, where the first line names them
PROBABILITY, ANSWER = " probability", " answer"  # what the columns of a run's answers add to a label's name


class Targets(NamedTuple):
    """What a list says of its images beyond one class each."""

    paths: list[str]  # as listed
    names: list[str]  # of the K labels, or numbers
    values: Tensor  # float32 (N, K): 1 or 0, or a number; NaN where nothing is known


def list_has_labels(path: Path) -> bool:
    """Does a list of images have a second column?"""
    return len(_rows(path)[1][0]) > 1


def read_list(path: Path, folder: Path, group_by: str | None = None) -> tuple[list[str], list[str]]:
    """The names and the labels in a list of images: a line each, `path,label`, or `path` where there are no labels.

    Args:
        path: a text or CSV file in UTF-8 with commas or tabs between the columns, or spaces where an image file is
            followed by a number, as in VTAB's and FGVC's lists; its first line may name them.
        folder: what relative paths are relative to.
        group_by: a column that is no label, if it is one: see `read_groups`.

    Returns:
        The paths as listed, and the labels as text; no labels if the list has none.

    Raises:
        InputError: a file that is none of this, files that are not there, or two labels for one file.
    """
    _, rows = _without(path, group_by)
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
                rows += [cells] if any(cells) else []
    except OSError as error:
        raise InputError(f"--data-list {path}: cannot read it: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--data-list {path}: not a text file of `path,label` lines: {printable(error)}") from None
    except csv.Error as error:
        raise InputError(
            f"--data-list {path}: line {number} is not `path,label` ({error}); look at its quotation marks: "
            f"'{printable(line.strip())}'"
        ) from None
    titles = rows.pop(0) if rows and rows[0][0].lower() in TITLES else []
    if not rows:
        raise InputError(f"--data-list {path}: lists no images; write a line `path,label` for each")
    return titles, rows


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


def _without(path: Path, column: str | None) -> tuple[list[str], list[list[str]]]:
    """Titles and lines of a list without a column, if that is one of the list's and no folder's level."""
    titles, rows = _rows(path)
    if column is None or column.isdecimal():
        return titles, rows
    place = _place_of(column, titles, path)
    for row in rows:
        if len(row) != len(titles):
            line = printable(",".join(row))
            raise InputError(f"--data-list {path}: the line '{line}' has {len(row)} columns and not {len(titles)}")
    return titles[:place] + titles[place + 1 :], [row[:place] + row[place + 1 :] for row in rows]


def _place_of(column: str, titles: Sequence[str], path: Path) -> int:
    """Where a column stands behind the paths, by its title or else by that in other letters."""
    if not titles:
        raise InputError(
            f"--group-by {printable(column)}: the first line of {path} names no columns; write it, as "
            f"path,label,{printable(column)}, or give the number of a folder's level"
        )
    for same in (str, str.lower):
        found = [place for place, title in enumerate(titles) if place and same(title) == same(column)]
        if found:
            return found[0]
    hint = did_you_mean(column, titles[1:])
    raise InputError(
        f"--group-by {printable(column)}: no such column in {path}, which has {listed(titles[1:], 20)}"
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


def read_label_list(path: Path, folder: Path, unknown: str = "ignore", group_by: str | None = None) -> Targets:
    """A list of images with several labels: `path,"a,b"`, or a column for each label that the first line names.

    In columns 1 is yes, 0 is no, and -1 or nothing is unknown (as in CheXpert's lists). In the other form what is not
    named is no.

    Args:
        path, folder, group_by: as for `read_list`.
        unknown: one of UNKNOWN: what becomes of unknown labels.

    Raises:
        InputError: a file that is none of this, files that are not there, or two lines for one file.
    """
    titles, rows = _without(path, group_by)
    if _has_columns(titles, rows):
        targets = _columns(path, titles, rows, _ANSWERS.get, "1, 0, or -1 or nothing for unknown")
    else:
        targets = _named_labels(path, rows)
    if unknown != "ignore":
        targets.values.nan_to_num_(float(unknown == "positive"))
    return _checked(path, folder, targets)


def read_targets(path: Path, folder: Path, task: str, unknown: str = "ignore", group_by: str | None = None) -> Targets:
    """`read_label_list` for 'multilabel', `read_number_list` for 'regression'."""
    if task == "multilabel":
        return read_label_list(path, folder, unknown, group_by)
    return read_number_list(path, folder, group_by)


_ANSWERS = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "-1": math.nan, "-1.0": math.nan, "": math.nan}


def read_number_list(path: Path, folder: Path, group_by: str | None = None) -> Targets:
    """A list of images with one or several numbers each; a first line may name them. Nothing is unknown.

    Raises:
        InputError: a file that is none of this, files that are not there, or two lines for one file.
    """
    titles, rows = _without(path, group_by)
    count = len(rows[0]) - 1
    titles = titles or ["path", *(["number"] if count == 1 else [f"number {i}" for i in range(1, count + 1)])]
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
    for row in rows:
        if len(row) != len(titles):
            line = printable(",".join(row))
            raise InputError(f"--data-list {path}: the line '{line}' has {len(row)} columns and not {len(titles)}")
    values = [[read(cell) for cell in row[1:]] for row in rows]
    for row, numbers in zip(rows, values, strict=True):
        if None in numbers:
            place = numbers.index(None)
            raise InputError(
                f"--data-list {path}: '{printable(row[1 + place])}' in the column {printable(names[place])} is not "
                f"{expected}; leave out columns that are no answers"
            )
    return Targets([row[0] for row in rows], names, torch.tensor(values))


def _named_labels(path: Path, rows: Sequence[Sequence[str]]) -> Targets:
    """What stands behind the paths is the names of the labels that an image has."""
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
    return Targets([row[0] for row in rows], names, values)


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


def like(targets: Targets, names: Sequence[str], path: Path, other: str | Path) -> Targets:
    """The same with its columns in the order of these names. A label that it never names, no image of it has.

    Raises:
        InputError: it has names that are not among them.
    """
    unknown = sorted(set(targets.names) - set(names))
    if unknown:
        raise InputError(f"--data-list {path} has {listed(unknown)}, which {other} lacks")
    values = torch.zeros(len(targets.values), len(names))
    values[:, [names.index(name) for name in targets.names]] = targets.values
    return Targets(targets.paths, list(names), values)
