"""Predictions as files: a table of images, whole or in parts, a mask of each image, or a map of a scene."""

import json
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from toolkit import InputError, faults_named, files, listed, printable
from toolkit.answers.parts import Task
from toolkit.images import data, folders, maps, scenes
from toolkit.models.dense import answers_by_rows, window_starts

LIST_SUFFIXES = (".csv", ".tsv", ".txt")  # of images to answer for
MANIFEST = "_parts.json"  # in a folder of answers: what they depend on
MAP_ENDINGS = (".tif", ".png", ".npy")  # of what `Maps.write` writes


def begin_folder(folder: Path, about: dict, places: Sequence, endings: Sequence[str], resume: bool) -> dict[Path, list]:
    """Begin a folder of answers, or go on with it; return the finished files of each place, with one of the `endings`.

    Raises InputError if there are answers by other settings than `about`, or any without `resume`, or files of a user.
    """
    path = folder / MANIFEST
    is_begun = os.path.lexists(path)
    if is_begun and not resume:
        raise InputError(f"{folder} has answers already: go on with --resume, or name another folder")
    earlier = files.read_json(path)
    if differing := [name for name, value in about.items() if is_begun and earlier.get(name) != value]:
        raise InputError(f"{folder}: its answers were made with other {listed(differing)}; name another folder")
    found = {}
    for place in places:
        answers = [place.with_name(place.name + ending) for ending in endings]
        found[place] = list(filter(os.path.lexists, answers))
        if found[place] and not is_begun:
            raise InputError(f"--output {folder}: what is written would replace {found[place][0]}; name another folder")
    for inside in {place.parent for place in places}:
        with faults_named(inside):
            inside.mkdir(parents=True, exist_ok=True)
        for half in inside.glob(".*.[0-9]*.half"):  # what a killed command left, or one that runs still has
            name = half.name[1:].rsplit(".", 2)[0]
            if not found.keys().isdisjoint(map(inside.joinpath, map(name.removesuffix, endings))):
                half.unlink()
    files.write_text(json.dumps(about, indent=2), path)
    return found


def write_table(task: Task, outputs: Tensor, images: data.LabelledImages, path: Path) -> list[dict]:
    """Write a row for each image, of outputs (N, K), and return the rows."""
    columns, answers = task.table(outputs)
    columns.insert(0, "image_path" if "path" in columns else "path")
    rows = [dict(zip(columns, (images.name(i), *cells), strict=True)) for i, cells in enumerate(answers)]
    files.write_cells(map(dict.values, rows), columns, path)
    return rows


def places_of_images(images: data.LabelledImages, given: Sequence[Path], output: Path) -> list[Path]:
    """Where what is made of each image goes, without its ending: below `output` as the image below what is `given`.

    Raises InputError where two images have one place, where a link leads out of the folder, and where it lies among
    the images: the next command would answer for what this one has made.
    """
    given_folders = [path.parent if path.suffix.lower() in LIST_SUFFIXES else path for path in given]
    places = []
    around = set()
    for i in range(len(images)):
        name = Path(images.name(i))
        around.add(os.path.abspath(name.parent))
        inside = Path(name.name)
        for folder in given_folders:
            if folder in name.parents:
                inside = name.relative_to(folder)
        parts = [part for part in inside.parts if part != ".."]  # anybody may have named images in a list or archive
        places.append(output.joinpath(*parts[:-1], folders.without_suffix(parts[-1])))
    if twice := [place for place, count in Counter(places).items() if count > 1]:
        raise InputError(f"--output {output}: several images would be written to {listed(twice)}; name them apart")
    for folder in dict.fromkeys(place.parent for place in places):
        if os.path.abspath(folder) in around:
            raise InputError(f"--output {output} is among the images in {printable(folder)}: name a folder outside")
        try:
            target = folder.resolve(strict=folder.is_symlink())  # else Python 3.13 overlooks a link to itself
            leads_outside = not target.is_relative_to(output.resolve())
        except (OSError, RuntimeError, ValueError) as error:  # a link to itself, or a name that no file can have
            raise InputError(f"--output {output}: cannot write to {printable(folder)}: {printable(error)}") from None
        if leads_outside:
            raise InputError(f"--output {output}: {folder} is a link to a place outside; name another folder")
    return places


@dataclass
class Maps:
    task: Task
    answer: Callable[[Tensor], Tensor]  # images (n, C, S, S) -> outputs of float32, (n, K, S, S) or (n, K)
    transform: Callable[[Any], Tensor]  # an image or part of one, as `transforms` takes it -> (C, H, W), normalised
    window: int  # S for answers of pixels; else the pixels along each side of what becomes one pixel of the map
    probabilities: bool = False  # of all classes, instead of the likeliest one
    abstain: float | None = None  # a likeliest class that is less probable than this is no answer
    writes: bool = True  # False: in a process whose answers another one writes

    def __post_init__(self) -> None:
        self.are_classes = self.task.activation == "softmax"
        self.has_classes = self.are_classes and not self.probabilities
        if self.has_classes and len(self.task.names) > maps.NO_CLASS:
            raise InputError(f"a map of classes has at most {maps.NO_CLASS} of them: use --probabilities")
        if self.probabilities and self.task.activation == "none":
            raise InputError("--probabilities: numbers have none; drop it")
        if self.abstain is not None and not self.has_classes:
            raise InputError("--abstain is for maps of classes: drop it, or --probabilities")

    def write(self, scene: scenes.Scene, path: Path, bar: Callable[..., Iterable]) -> Path:
        """Write the map of a scene at `path` and a suffix: .tif if either is a TIFF, else .png of classes, or .npy."""
        step = self.window
        total = math.ceil(scene.height / step)
        if self.task.per_pixel:
            step = 1
            total = len(window_starts(scene.height, self.window))
        parts = bar(self.parts(scene), total=total)
        colours = self.task.palette() if self.has_classes else None
        is_tiff = path.suffix in (".tif", ".tiff")
        if not self.writes:
            deque(parts, maxlen=0)
            return path
        if is_tiff or scene.like is not None:
            path = path if is_tiff else path.with_name(f"{path.name}.tif")
            size = math.ceil(scene.height / step), math.ceil(scene.width / step)
            maps.write_map(path, parts, *size, scene.like, colours, self.task.names, step)
        elif self.has_classes:
            path = path.with_name(f"{path.name}.png")
            maps.write_mask(path, np.concatenate(list(parts)), colours)
        else:
            path = path.with_name(f"{path.name}.npy")
            with files.open_atomically(path) as file:
                np.save(file, np.concatenate(list(parts)))
        return path

    def parts(self, scene: scenes.Scene) -> Iterator[np.ndarray]:
        """A scene's map from above, some rows at a time. Windows of answers lie side by side, the last filled up."""

        def seen(rows: np.ndarray) -> Tensor:
            return self.transform(Image.fromarray(np.ascontiguousarray(rows)) if scene.bands is None else rows)

        if self.task.per_pixel:
            size = scene.height, scene.width, self.window
            for logits in answers_by_rows(lambda first, last: seen(scene.rows(first, last)), *size, self.answer):
                yield self._values(logits.movedim(0, 2))
            return
        for top in range(0, scene.height, self.window):
            rows = scene.rows(top, min(top + self.window, scene.height))
            rows = np.pad(rows, ((0, -len(rows) % self.window), (0, -scene.width % self.window), (0, 0)), "edge")
            windows = [seen(rows[:, left : left + self.window]) for left in range(0, scene.width, self.window)]
            yield self._values(self.answer(torch.stack(windows))[None])

    def _values(self, outputs: Tensor) -> np.ndarray:
        """What a map has in the place of outputs (rows, W, K): classes (rows, W), or (rows, W, K) of floats."""
        if self.has_classes:
            classes = outputs.argmax(2).numpy().astype(np.uint8)
            if self.abstain is not None:
                classes[(outputs.softmax(2).amax(2) < self.abstain).numpy()] = maps.NO_CLASS
            return classes
        if self.are_classes:
            return outputs.softmax(2).numpy()
        numbers = self.task.output_layer()(outputs).numpy()  # float64 where float32 could not tell them apart
        return numbers[..., 0] if numbers.shape[2] == 1 else numbers
