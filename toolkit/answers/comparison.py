"""Two runs over the same images: is the one better than the other by more than chance? And a table of many runs."""

import csv
import json
import statistics
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from toolkit import InputError, config, files, listed, printable
from toolkit.answers import answer_reports, measures, multilabel, regression, tasks
from toolkit.answers.segmentation import COUNTED, PixelReport, pixel_figures
from toolkit.images import data, lists
from toolkit.models.checkpoints import value_at

IMAGE = "image"  # the first column, and the second; a label may be called the same, and then stands behind them
GROUP = "group"
PIXELS, *_ = COUNTED
# The figures that are compared, and their titles, by how the columns of answers end; None: these are classes
FIGURES = {
    None: {"accuracy": "accuracy"},
    lists.PROBABILITY: {"macro_ap": "macro AP", "micro_ap": "micro AP", "macro_auroc": "macro AUROC"},
    lists.ANSWER: {"r2": "R2", "mae": "mean absolute error"},
    PIXELS: {name: headline.title for name, headline in PixelReport.HEADLINES.items()},
}


def answers_path(results: Path) -> Path:
    return results.with_name(f"{results.stem}_answers.csv")


def write_answers(columns: dict[str, Sequence[Any]], images: data.LabelledImages, results: Path) -> None:
    """Write the truth and the answer for each image next to the results, a row each, with its group if it has one."""
    first: dict[str, Sequence[Any]] = {IMAGE: images.relative_names()}
    if images.groups is not None:
        first[GROUP] = images.groups
    files.write_cells(zip(*first.values(), *columns.values(), strict=True), [*first, *columns], answers_path(results))


class Difference(NamedTuple):
    """How much better the second of two runs is by one measure; the interval is of 95%."""

    measure: str
    first: float
    second: float
    low: float
    high: float
    p: float


def compare(first: Path, second: Path) -> list[Difference]:
    """Compare the answers next to two `results.json`, image by image, or by groups if one has these; or InputError."""
    images, groups, one = _read(answers_path(first))
    other_images, other_groups, other = _read(answers_path(second))
    if one.keys() != other.keys():
        raise InputError(f"{second} is of other classes, labels or numbers than {first}: nothing to compare")
    if images != other_images:
        some = listed(sorted(set(images) ^ set(other_images)), 1)
        raise InputError(f"{first} and {second} are over other images, such as {some}: evaluate both on the same")
    truth, kind = _truth(one)
    if not truth:
        raise InputError(f"{answers_path(first)} does not say what is true: evaluate again")
    if differing := [title for title in truth if (one[title] != other[title]).any()]:
        raise InputError(f"{first} and {second} do not agree on what is true: look at the column {listed(differing)}")
    if groups is None:
        groups = other_groups
    elif other_groups is not None and (groups != other_groups).any():
        raise InputError(f"{first} and {second} have the images in other groups: evaluate both with one --group-by")
    clusters = torch.arange(len(images))
    if groups is not None:
        clusters = torch.from_numpy(np.unique(groups, return_inverse=True)[1])
    runs = [_answered(table, truth, kind) for table in (one, other)]

    def differences(weights: Tensor) -> dict[str, Tensor]:
        """How the runs differ in each figure, and the figures of both: (n, 3)."""
        # Of the same parts of the images: what is easy for both blurs no difference.
        before, after = (run(weights) for run in runs)
        return {name: torch.stack([after[name] - before[name], before[name], after[name]], 1) for name in FIGURES[kind]}

    bounds = dict.fromkeys(FIGURES[kind], measures.UNBOUNDED)
    compared = []
    for name, (difference, before, after) in measures.jackknife(differences, clusters, bounds).items():
        p = difference.p
        if kind is None:
            p = measures.mcnemar(_hits(one), _hits(other), clusters)
        compared.append(Difference(FIGURES[kind][name], before.value, after.value, *difference.interval, p))
    return compared


def _truth(titles: Collection[str]) -> tuple[list[str], str | None]:
    """The columns of what is true, and what the columns of answers to it end with; None: these are classes."""
    # Of both endings the more frequent one: a label may be called as the column of another's answers.
    kind = max((lists.PROBABILITY, lists.ANSWER), key=lambda ending: sum(title + ending in titles for title in titles))
    if truth := [title for title in titles if title + kind in titles]:
        return truth, kind
    if "class" in titles and "answer" in titles:
        return ["class"], None
    return [title for title in titles if title.endswith(PIXELS)], PIXELS


def _read(path: Path) -> tuple[list[str], np.ndarray | None, dict[str, np.ndarray]]:
    """The images in the order of their names, their groups, and the columns of texts that `write_answers` wrote."""
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            titles, *rows = csv.reader(file)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; a run, or evaluate --output, writes answers there") from None
    except (csv.Error, ValueError):
        titles, rows = [], []
    if titles[:1] != [IMAGE] or not rows or any(len(row) != len(titles) for row in rows):
        raise InputError(f"{path} is not a table of answers, or damaged: evaluate again")
    images, *columns = np.array(sorted(rows), dtype=object).T
    del titles[0]
    groups = None
    is_label = titles[1:2] in ([GROUP + lists.PROBABILITY], [GROUP + lists.ANSWER])  # one that is called group
    if titles[:1] == [GROUP] and not is_label:
        groups = columns.pop(0)
        del titles[0]
    return images.tolist(), groups, dict(zip(titles, columns, strict=True))


def _answered(table: dict[str, np.ndarray], truth: Sequence[str], kind: str | None) -> Callable:
    """What returns the figures of a run by weights of the images, as `Answers.weighted`."""
    if kind is None:
        return lambda weights: {"accuracy": measures.weighted_mean(_hits(table), weights)}
    if kind == PIXELS:
        counts = _numbers(table, list(table))  # class by class what COUNTED names
        return lambda weights: pixel_figures(measures.weighted_sum(counts, weights).unflatten(1, (-1, len(COUNTED))).mT)
    answers = {lists.PROBABILITY: multilabel.LabelAnswers, lists.ANSWER: regression.NumberAnswers}[kind]
    return answers(0.0, _numbers(table, [title + kind for title in truth]), _numbers(table, truth)).weighted


def _hits(table: dict[str, np.ndarray]) -> Tensor:
    return torch.from_numpy(table["class"] == table["answer"])


def _numbers(table: dict[str, np.ndarray], titles: Sequence[str]) -> Tensor:
    """These columns as numbers, (N, K), NaN where nothing stands."""
    cells = np.stack([table[title] for title in titles], 1)
    cells[cells == ""] = "nan"
    try:
        return torch.from_numpy(cells.astype(float))
    except ValueError as error:
        raise InputError(f"a table of answers is damaged: {printable(error)}; evaluate again") from None


def table(differences: Sequence[Difference], first: Path, second: Path) -> list[tuple[str, str]]:
    rows = [("first", str(first)), ("second", str(second))]
    for measure, before, after, low, high, p in differences:
        form = ".4g" if measure in FIGURES[lists.ANSWER].values() else ".2%"  # a share in per cent
        interval = answer_reports.interval_text(low, high, f"+{form}")
        text = f"{before:{form}}, {after:{form}}: {after - before:+{form}} ({interval}), p = {p:.2g}"
        if np.isnan(after - before):
            text = "not defined on these images"
        rows.append((measure, text))
    return rows


def table_of_runs(paths: Sequence[Path], are_parts: bool = False) -> list[tuple[str, str]]:
    """(score, what has it) of many `results.json`, the best first; of runs that differ by seed or fold alone a row."""
    kinds = set()
    groups: dict[str, list[tuple[Path, float]]] = {}
    for path in dict.fromkeys(paths):
        results = read_results(path)
        images = results.get("val_images", results.get("images"))
        if value_at(results, "config/data/folds") is not None:
            images = "parts of the"
        kinds.add(f"{results['task']} of {images} images")
        score = tasks.TASKS[results["task"]].score
        value = results.get(f"val_{score}", results.get(score))
        settings: dict[str, Any] = {}  # but for seed and part
        if not are_parts:  # each of which settles anew what is `auto`
            settings = config.flat(results.get("config", {"file": str(path)}))  # results of `evaluate` stand alone
            if "learning rate" in results.get("chosen_by", {}):
                settings["finetune.learning_rate"] = "auto"
            for of_one_run in ("finetune.seed", "data.folds"):
                settings.pop(of_one_run, None)
        if value is not None:  # else it is not defined on these images
            groups.setdefault(json.dumps(settings, sort_keys=True), []).append((path, value))
    if len(kinds) > 1:
        raise InputError(f"these are of {listed(sorted(kinds))}: compare results of one task over the same images")
    every = list(map(json.loads, groups))
    rows = []
    for own, members in zip(every, groups.values(), strict=True):
        differing = [name for name in own if any(other.get(name, own[name]) != own[name] for other in every)]
        how = ", ".join(f"{name.rpartition('.')[2]} {own[name]}" for name in differing)
        own_paths, scores = zip(*members, strict=True)
        mean = statistics.mean(scores)
        spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        rows.append((mean, f"{mean:.4f}{spread}", f"{len(members)} of {own_paths[0]}; {how}"))
    return [(score, what) for _, score, what in sorted(rows, reverse=True)]


def read_results(path: Path) -> dict[str, Any]:
    results = files.read_json(path)
    if str(results.get("task")) not in tasks.TASKS:
        raise InputError(f"{path} is no results.json of a run, nor of evaluate --output")
    return results
