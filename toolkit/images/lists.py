"""Lists of images: a line each, with the path, and what is known of the image."""

import csv
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from toolkit import InputError, listed, printable
from toolkit.images import bands, folders, remote

TITLES = ("path", "file", "filename", "image")  # of the first column, where the first line names the columns
PROBABILITY, ANSWER = " probability", " answer"  # what the columns of a run's answers add to a label's name
_ANSWERS = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "-1": math.nan, "-1.0": math.nan, "": math.nan}
_BYTE = re.compile("[\udc80-\udcff]")  # that is no UTF-8, as `surrogateescape` decodes it
_YES_OR_NO = {"yes", "no", "y", "n", "true", "false", "t", "f"}


class Targets(NamedTuple):
    """What a list says of its images beyond one class each."""

    paths: list[str]  # as listed
    names: list[str]  # of the K labels, or numbers
    values: Tensor  # (N, K): 1 or 0 in float32, or numbers in float64; NaN where nothing is known
    in_columns: bool = True  # else an image's labels are named in one column, and it has no others


@dataclass
class ImageList:
    """A text or CSV file in UTF-8, with commas, tabs or (below titles) semicolons, a line for each image.

    Its first line may name the columns. Each of the methods raises InputError for a file that is none of what it reads.
    """

    path: Path
    folder: Path | None = None  # what relative paths are relative to; without it, the list's own folder
    group_by: str | None = None  # a column that is no label but names the group, such as a patient, if it is a column
    label_columns: Sequence[str] | None = None  # are labels or numbers, by their titles, `A..B` from A to B; None: all

    def __str__(self) -> str:
        return str(self.path)

    def __post_init__(self) -> None:
        self.folder = self.folder or self.path.parent
        self.titles, self.rows = _rows(self.path)
        if self.group_by is not None and self.group_by.isdecimal():
            self.group_by = None  # it is a level of folders

    @staticmethod
    def as_in_run(path: Path, data: Mapping[str, Any]) -> "ImageList":
        """A list for the adapter of a run with this section `data`; its paths may be relative to the run's folder."""
        found = ImageList(path, None, data.get("group_by"))
        known = set(map(folders.one_spelling, data.get("label_columns") or ()))  # one without a column is unknown
        found.label_columns = [title for title in found.titles[1:] if folders.one_spelling(title) in known]
        if found.group_by not in found.titles[1:]:
            found.group_by = None
        other = data.get("data_dir")
        if other is not None and not remote.is_remote(other):  # an adapter's file may have named an address
            first = found.rows[0][0]
            if not remote.is_file(remote.located(found.folder, first)) and remote.is_file(remote.located(other, first)):
                found.folder = Path(other)
                print(f"{path}: no {printable(first)} is beside it: its images are in the run's {printable(other)}")
        return found

    def has_labels(self) -> bool:
        """Is there a class for each image in the second column, and no more?"""
        labels = [row[1] for row in self.rows if len(row) == 2]
        return len(labels) == len(self.rows) and "," not in "".join(labels) and not look_like_numbers(labels)

    def paths(self) -> list[str]:
        """The paths as listed, whatever stands behind them."""
        return self._checked(map(itemgetter(0), self.rows))

    def labels(self, line: str = "path,label") -> tuple[list[str], list[str]]:
        """The paths as listed, and the labels as text, in one spelling; or what else `line` says, as it is listed."""
        _, rows = self._label_columns()
        kind = line.partition(",")[2]
        if bare := [row[0] for row in rows if not any(row[1:])]:
            missing = f"{len(bare)} of its {len(rows)} images have no {kind}, as {printable(bare[0])}"
            raise self._error(f"{missing}: write `{line}` lines, and delete those of images that have none")
        labels = []
        for row in rows:
            if len(row) != 2 or not all(row):
                advice = ""
                if len(row) > 2 and kind == "label":
                    advice = " (for several labels or numbers: --task multilabel or regression)"
                raise self._error(f"the line '{_shown(row)}' is not a path and a {kind}, one for each image", advice)
            if kind == "label" and "," in row[1]:
                label = f"the label '{printable(row[1])}' of {printable(row[0])}"
                problem = f"{label} has a comma: write the name of its class without"
                raise self._error(problem, ", or use --task multilabel")
            labels.append(folders.one_spelling(row[1]) if kind == "label" else row[1])
        return self._checked(map(itemgetter(0), rows), labels), labels

    def pairs(self) -> list[tuple[str, str]]:
        names, masks = self.labels("image,mask")
        return list(zip(names, self._checked(masks, (), "; write `image,mask` lines"), strict=True))

    def targets(self, truth: str) -> Targets:
        """Several labels of each image (`truth` 'labels'), or one or several numbers ('numbers').

        Labels are named as `path,"a,b"`, where what is not named is no; or each has a column, in which 1 is yes, 0 is
        no, and -1 or nothing is unknown (as in CheXpert's lists). Numbers have columns, and nothing is unknown.
        """
        titles, rows = self._label_columns()
        # Two columns are a path and a label's answers, or the names of labels.
        is_answered = len(titles) == 2 and titles[1].lower() not in ("label", "labels")
        is_answered = is_answered and all(row[-1] in _ANSWERS for row in rows)
        if truth == "numbers":
            numbers = list(map("number {}".format, range(1, len(rows[0]))))
            if len(numbers) == 1:
                numbers = ["number"]
            targets = self._columns(titles or ["path", *numbers], rows, _number, "a number, or nothing for unknown")
        elif self.label_columns or len(titles) > 2 or is_answered:
            targets = self._columns(titles, rows, _ANSWERS.get, "1, 0, or -1 or nothing for unknown")
        else:
            targets = self._named_labels(titles, rows)
        labels = list(map(str, targets.values.tolist()))  # as text, since NaN is no other NaN
        return targets._replace(paths=self._checked(targets.paths, labels))

    def groups(self) -> np.ndarray:
        """The group of each image, (N,). Raises InputError for an image of none."""
        place = self._place_of(self.group_by)
        self._check_widths(self.titles, self.rows)
        if bare := [row[0] for row in self.rows if not row[place]]:
            nothing = f"nothing in the column {printable(self.group_by)} for {listed(bare)}"
            raise self._error(f"{nothing}; write a name, one of its own where the group is not known")
        return np.array([folders.one_spelling(row[place]) for row in self.rows])

    def _error(self, problem: str, advice: str = "") -> InputError:
        return InputError(f"{self.path}: {problem}", advice)

    def _checked(self, names: Iterable[str], labels: Sequence[str] = (), remedy: str = "") -> list[str]:
        """The files' names, without ./ and //. Raises InputError for files that are not there, or have two labels."""
        root = self.folder if remote.is_remote(self.folder) else os.path.abspath(self.folder)
        # What .. leaves depends on links, so it stays.
        short = [str(PurePosixPath(name)) if "./" in name or "//" in name else name for name in names]
        files = [remote.located(root, name) for name in short]
        if missing := [name for name, file in zip(short, files, strict=True) if not remote.is_file(file)]:
            raise self._error(f"{len(missing)} of its files are not in {self.folder}: {listed(missing)}{remedy}")
        label_of: dict[str, str] = {}
        torn = {}
        for name, file, label in zip(short, files, labels, strict=False):  # of paths alone there are no labels
            if label_of.setdefault(os.path.normpath(file), label) != label:
                torn[name] = label
        if torn:
            raise self._error(f"two labels for {listed(torn)}; leave one of the lines out")
        return short

    def _label_columns(self) -> tuple[list[str], list[list[str]]]:
        """Titles and lines with the columns that are labels or numbers alone, and the paths in front."""
        if not self.label_columns and self.group_by is None:
            return self.titles, self.rows
        places = list(range(len(self.titles)))
        if self.label_columns:
            places = [0]
            for entry in self.label_columns:
                first, _, last = entry.partition("..")
                ends = [self._place_of(column, "--label-columns") for column in (first, last or first)]
                places += range(min(ends), max(ends) + 1)
        if self.group_by is not None:
            group = self._place_of(self.group_by)
            places = [place for place in places if place != group]
        self._check_widths(self.titles, self.rows)
        titles, *rows = np.array([self.titles, *self.rows], dtype=object)[:, places].tolist()
        return titles, rows

    def _check_widths(self, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        for row in rows:
            if len(row) != len(titles):
                raise self._error(f"the line '{_shown(row)}' has {len(row)} columns and not {len(titles)}")

    def _place_of(self, column: str, option: str = "--group-by") -> int:
        """Where the column of this title stands behind the paths."""
        asked = f"{option} {printable(column)}"
        if not self.titles:
            problem = f"the first line of {self.path} names no columns; write it, as path,label,{printable(column)}"
            if option == "--group-by":
                problem += ", or give the number of a folder's level"
            raise InputError(f"{asked}: {problem}")
        names = self.titles[1:]
        if column not in names:
            raise InputError(f"{asked}: no such column in {self.path}, which has {listed(names, 20)}")
        return 1 + names.index(column)

    def _columns(self, titles: Sequence[str], rows: Sequence[Sequence[str]], read: Callable, expected: str) -> Targets:
        names = list(map(folders.one_spelling, titles[1:]))
        ending = ANSWER if read is _number else PROBABILITY
        taken = {*names, *(name + ending for name in names)}  # the columns of `results_answers.csv`
        if not names or not all(names) or len(taken) < 2 * len(names):
            columns = "expected a column with a name of its own"
            raise self._error(f"{columns}, and not with{ending} behind it, for each label or number")
        self._check_widths(titles, rows)
        values = [list(map(read, row[1:])) for row in rows]
        for row, numbers in zip(rows, values, strict=True):
            if None in numbers:
                place = numbers.index(None)
                cell = f"'{printable(row[1 + place])}' in the column {printable(names[place])}"
                raise self._error(f"{cell} is not {expected}", "; name the answers' columns with --label-columns")
        dtype = torch.float64 if read is _number else torch.float32
        return Targets(list(map(itemgetter(0), rows)), names, torch.tensor(values, dtype=dtype))

    def _named_labels(self, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Targets:
        """What stands behind the paths is the names of the labels that an image has."""
        given = {row[-1].lower() for row in rows} - {""}
        if len(titles) == 2 and given and given <= _YES_OR_NO:
            column = printable(titles[1])
            raise self._error(f"the column {column} says {listed(sorted(given))}: write 1 for yes and 0 for no")
        found = []
        for row in rows:
            if len(row) != 2 or set("|;") & set(row[1]):  # ChestX-ray14 has | between labels
                remedy = "put labels into quotation marks, or name columns first, as path,cat,dog"
                raise self._error(f"the line '{_shown(row)}' is not `path,\"a,b\"`; {remedy}")
            found.append([folders.one_spelling(label) for label in map(str.strip, row[1].split(",")) if label])
        names = in_order(set().union(*found))
        if not names:
            raise self._error("no image has a label")
        values = torch.zeros(len(rows), len(names))
        for i, labels in enumerate(found):
            values[i, list(map(names.index, labels))] = 1
        return Targets(list(map(itemgetter(0), rows)), names, values, in_columns=False)


def _shown(row: Sequence[str]) -> str:
    return printable(",".join(row))


def _rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """A list's titles, if its first line has some, and its lines, in cells."""
    if path.suffix.lower() in (".tar", ".zip", ".gz", ".tgz", ".7z"):
        raise InputError(f"{path} is an archive: name the folder that holds it; what is no plain .tar, unpack there")
    rows = []
    begun = 0  # where the row begins that is read
    try:
        text = remote.read(path).decode("utf-8-sig", "surrogateescape")
        lines = io.StringIO(text, newline=None).readlines()
        heading = "".join(lines[:1])
        delimiter = "\t" if "\t" in heading else ","
        if heading.partition(";")[0].strip('"').lower() in TITLES:  # spreadsheets write it where commas are in numbers
            delimiter = ";"
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
        for cells in reader:
            name = "".join(cells[:1])
            rest = "".join(cells[1:])
            if "\n" in rest:  # a name of a file may have one; elsewhere a quotation mark lacks its other
                raise csv.Error("a line break")
            # Nor need the name of a file be UTF-8.
            if _BYTE.search(rest) or (_BYTE.search(name) and not os.path.isfile(os.path.join(path.parent, name))):
                raise InputError(f"{path}: line {begun + 1} is not in UTF-8, '{_shown(cells)}': save the list as such")
            cells = list(map(str.strip, cells))
            if any(cells):
                rows.append(cells)
            begun = reader.line_num
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror or error}") from None
    except csv.Error as error:
        marks = f"look at its quotation marks: '{printable(lines[begun].strip())}'"
        raise InputError(f"{path}: line {begun + 1} is not `path,label` ({error}); {marks}") from None
    titles = []
    if rows:
        first = rows[0][0]
        # Titles begin with a usual word, or with one that is no file where the second line begins with an image.
        is_followed = len(rows) > 1 and rows[1][0].lower().endswith((*folders.IMAGE_SUFFIXES, *bands.ARRAY_SUFFIXES))
        if first.lower() in TITLES or (is_followed and "." not in first and "/" not in first):
            titles = rows.pop(0)
            rows = list(filter(titles.__ne__, rows))  # lists that were joined have them again
    if not rows:
        raise InputError(f"{path}: lists no images; write a line `path,label` for each")
    return titles, rows


def look_like_numbers(labels: Sequence[str]) -> bool:
    """Are labels numbers that tell how much, and not which class: all different, or with decimals?"""
    numbers = list(map(_number, labels))
    if len(labels) < 3 or None in numbers:
        return False
    return len(set(numbers)) == len(labels) or not all(map(float.is_integer, numbers))


def _number(text: str) -> float | None:
    """NaN for nothing; None for what is no finite number."""
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) or not text else None


def in_order(names: Iterable[str]) -> list[str]:
    """Sorted; numbers by their value, so that 10 comes after 9."""
    return sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))


def like(targets: Targets, names: Sequence[str], path: Path, other: str | Path) -> Targets:
    """The same in the order of these names. Raises InputError for other columns, or if numbers are missing."""
    if surplus := sorted(set(targets.names) - set(names)):
        raise InputError(f"{path}: it has {listed(surplus)}, which {other} lacks")
    missing = [name for name in names if name not in targets.names]
    if missing and targets.values.dtype == torch.float64:
        raise InputError(f"{path}: it has no column {listed(missing)}, which {other} has; add it")
    fill = math.nan if targets.in_columns else 0.0  # a label without a column is unknown; one never named is no
    values = targets.values.new_full((len(targets.values), len(names)), fill)
    values[:, list(map(names.index, targets.names))] = targets.values
    return targets._replace(names=list(names), values=values)
