"""Where images come from: folders, lists, archives and scikit-learn's digits; and which of them train."""

import hashlib
import importlib.util
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from toolkit import InputError, distributed, listed, printable
from toolkit.choices import DATASETS, DEFAULT_TASK, EVALUATION_NAMES, TRUTHS, UNLABELLED_SET  # noqa: F401
from toolkit.images import folders, remote, shards, splitting, transforms
from toolkit.images.bands import Bands
from toolkit.images.data import LabelledImages, among, copies, look_at_each
from toolkit.images.folders import ImageFiles, UnreadableImage
from toolkit.images.lists import ImageList, in_order, like, look_like_numbers
from toolkit.images.masks import MaskReader, load_pairs, pair_folders, pair_places

HELD_OUT_FRACTION = 0.2  # of sets that come in one part, and of the training split for eval_split="validation"
NUMBER_STRATA = 5
# Images without labels that are read: for each class, and at least and at most. A run of ten epochs draws as many.
UNLABELLED_OF_CLASS = 200
LEAST_UNLABELLED = 2_000
MOST_UNLABELLED = 10_000
Named = tuple[LabelledImages, list[str]]  # images, and the names of their classes, or of their labels or numbers
MOST_COMPARED = 20_000  # files; to read more of equal size would take seconds to minutes at each start


class Splits(NamedTuple):
    train: LabelledImages
    val: LabelledImages
    class_names: list[str]  # or the names of labels or numbers, of which an image has several
    unlabelled: LabelledImages | None = None  # other images, whose labels are their positions

    def counts(self) -> dict[str, int]:
        """How many images train and evaluate, and, where there are any, groups such as patients."""
        counted = {"train_images": len(self.train), "val_images": len(self.val)}
        if self.train.groups is not None:
            counted["train_groups"] = len(np.unique(self.train.groups))
            counted["val_groups"] = len(np.unique(self.val.groups))
        return counted

    def digest(self) -> str:
        """Equal for splits of the same files with the same labels into the same parts."""
        digests = [self.train.digest, self.val.digest]
        if self.unlabelled is not None:
            digests.append(self.unlabelled.digest)
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()


@dataclass
class Source:
    """Where images are, and how they are read. What is not said here is as the option of the same name."""

    dataset: str = "digits"
    data_dir: str | Path | None = None  # also what relative paths in lists are relative to; None: the list's folder
    val_dir: str | Path | None = None
    data_list: Sequence[str | Path] | None = None
    label_columns: Sequence[str] | None = None
    group_by: str | None = None
    task: str = DEFAULT_TASK
    skip_unreadable: bool = False
    bands: Bands | None = None  # what is read of files that are no RGB photographs
    masks: MaskReader | None = None  # how masks are read, where they are the truth. All of them are, once

    def __post_init__(self) -> None:
        self.truth = TRUTHS[self.task]
        given = self.data_list or ()
        if len(given) > 2:
            raise InputError(f"--data-list: expected a list for training and one for evaluation, got {len(given)}")
        folder = _existing("--data-dir", self.data_dir) if given and self.data_dir else None
        self.lists = [ImageList(Path(path), folder, self.group_by, self.label_columns) for path in given]


def load_splits(
    dataset: str = "digits",
    data_dir: str | Path | None = None,
    eval_split: str = "held-out",
    labels_per_class: int | None = None,
    seed: int = 0,
    *,
    folds: str | None = None,
    unlabelled: str | Path | None = None,
    for_training_only: bool = False,
    **others: Any,
) -> Splits:
    """The training and evaluation images of a data set, without any transform. `others`: what else `Source` has.

    Arguments are as the options of the same names (docs/options.md; with examples: docs/data.md). Besides, `seed` draws
    the images of `labels_per_class` alone, and `for_training_only` says that no evaluation images are needed.
    Raises InputError for what is missing, empty, unreadable or too little, and for a group on both sides.
    """
    source = Source(dataset, data_dir, **others)
    needs_val = eval_split == "held-out" and not for_training_only and folds is None
    parts, class_names = _parts(source, needs_val)
    if source.group_by is not None:
        _group(parts, source)
    if source.skip_unreadable:
        known_labels = set(parts[0].labels)
        parts = list(map(readable, parts))
        if source.truth == "class" and (gone := known_labels - set(parts[0].labels)):
            raise InputError(f"no training image of {_names(gone, class_names)} can be read: repair or drop the class")
    splits = Splits(*_divide(parts, eval_split, folds, source.group_by), class_names)
    _tell(splits, source, needs_val, for_training_only)
    if labels_per_class is not None:
        drawn = splitting.some_of_each(splits.train.labels, labels_per_class, class_names, seed)
        splits = splits._replace(train=splits.train.subset(drawn))
    if unlabelled is not None:
        splits = splits._replace(unlabelled=_unlabelled(Path(unlabelled), splits, source))
    return splits


def _parts(source: Source, needs_val: bool) -> tuple[list[LabelledImages], list[str]]:
    """The one part or two of a source, the second empty if it need not be read, and the names as of `Splits`."""
    if source.truth == "mask":
        places = source.lists or pair_places(source.data_dir, source.val_dir, needs_val)
        return load_pairs(places, 1 + needs_val, source.bands, source.masks or MaskReader(None), source.skip_unreadable)
    if source.lists:
        return _labelled_parts(source.lists, source)
    if source.truth != "class":
        needs = f"--task {source.task} needs --data-list"
        raise InputError(f"{needs}: a folder or an archive says one class for each image")
    if source.dataset == "digits":
        return _digits(source.data_dir)
    if source.dataset == "imagefolder":
        return _labelled_parts(_folders(source.data_dir, source.val_dir, needs_val), source)
    raise InputError(f"--dataset {source.dataset} is for pretraining; here each image needs a label: use imagefolder")


def _labelled_parts(places: Sequence, source: Source) -> tuple[list[LabelledImages], list[str]]:
    """The images of lists or folders, none of None, and the names of their classes: those of the first."""
    parts = []
    class_names: list[str] = []
    for place in filter(None, places):
        part, class_names = labelled(place, source.bands, source.truth, class_names, places[0])
        parts.append(part)
    if len(parts) < len(places):
        parts.append(parts[0].subset([]))
    return parts, class_names


def _group(parts: Sequence[LabelledImages], source: Source) -> None:
    """Say of each image which group it belongs to."""
    by = source.group_by
    for number, images in enumerate(parts):
        if not images.in_files:
            raise InputError(f"--group-by {printable(by)}: these images are in no folder or list of yours; drop it")
        if source.lists and not by.isdecimal():
            images.groups = source.lists[number].groups()[images.indices]
        else:
            images.groups = splitting.folder_level(images.relative_names(), by)
    if by == "1" and source.truth == "class" and not source.lists:
        raise InputError("--group-by 1: this is the folder of the class; groups are in those below, from 2 on")


def _divide(parts: Sequence, eval_split: str, folds: str | None, group_by: str | None) -> tuple[LabelledImages, ...]:
    """The training and the evaluation images of one part or of two. Raises InputError for a group in both."""
    train, val = parts[0], parts[-1]
    if folds is not None:
        number, count = map(int, folds.split("/"))
        keys = train.groups if train.groups is not None else train.relative_names()
        train, val = train.split(splitting.folds(_alike(train), keys, count, train.times_split) == number - 1)
    elif len(parts) == 1:
        train, val = validation_part(train)
    elif group_by is not None and eval_split != "validation":
        shared = np.intersect1d(train.groups, val.groups)
        if len(shared):
            count = np.isin(val.groups, shared).sum()
            both = f"{listed(shared)} on both sides, with {count} of {len(val)} evaluation images"
            raise InputError(f"--group-by {printable(group_by)}: {both}; move each to one side, or give all as one set")
    if eval_split == "validation":
        train, val = validation_part(train)
    return train, val


def _tell(splits: Splits, source: Source, needs_val: bool, for_training_only: bool) -> None:
    """Print which images are not needed, which classes nothing trains, and which evaluation images train as well."""
    train, val, names, _ = splits
    left_alone = source.val_dir or ", ".join(map(str, source.lists[1:]))
    if left_alone and not needs_val and not for_training_only:
        print(f"evaluating on a part of the training images; {printable(left_alone)} is left alone")
    if source.truth == "class" and (gone := set(val.labels) - set(train.labels)):
        print(f"no training image of {_names(gone, names)} is left: all are evaluated on")
    if source.truth == "mask" and (gone := set((train.targets.sum(0) == 0).nonzero().flatten().tolist())):
        print(f"no training mask has pixels of {_names(gone, names)}")
    if for_training_only or not train.in_files or not distributed.is_main():
        return
    if len(train) + len(val) > MOST_COMPARED:
        print(f"evaluation images may be copies of training images: more than {MOST_COMPARED:,} are not compared")
    elif found := copies(val, train):  # accuracy on them shows memory, not learning
        first, other = map(printable, next(iter(found.items())))
        print(f"{len(found)} of {len(val)} evaluation images are copies of training images, such as {first} of {other}")


def _names(labels: Iterable[int], class_names: Sequence[str]) -> str:
    return listed(map(class_names.__getitem__, sorted(labels)))


def load_unlabelled(data_dir=None, data_list: Sequence = (), skip_unreadable=False, bands=None) -> LabelledImages:
    """All images below a folder, of one with a train/ those in there, or in a list. Raises InputError for none."""
    if data_list:
        first = Source(data_dir=data_dir, data_list=data_list).lists[0]
        source = ImageFiles(first.folder, first.paths(), bands)
    else:
        source = all_images(_train_folder(_existing("--data-dir", data_dir)), bands)
    images = LabelledImages(source)
    return readable(images) if skip_unreadable else images


def _unlabelled(place: Path, splits: Splits, source: Source) -> LabelledImages:
    """Some images of a folder or list, without those that are evaluated on or train with a label."""
    if remote.is_folder(place):
        found = load_unlabelled(place, None, source.skip_unreadable, source.bands)
    elif remote.exists(place):
        found = load_unlabelled(None, [place], source.skip_unreadable, source.bands)
    else:
        raise InputError(f"--unlabelled {remote.address(place)}: no such folder or list of images")
    wanted = max(LEAST_UNLABELLED, UNLABELLED_OF_CLASS * len(splits.class_names))
    some = found.at_most(min(wanted, MOST_UNLABELLED))
    evaluated = among(some, splits.val)
    labelled = among(some, splits.train) & ~evaluated
    images = some.subset(np.flatnonzero(~evaluated & ~labelled))
    images.labels = list(range(len(images)))
    of_all = "" if len(some) == len(found) else f", of a random {len(some):,} of {len(found):,}"
    without = f"without {evaluated.sum():,} evaluation images and {labelled.sum():,} that have a label"
    if len(images) < distributed.world_size():  # each process needs one
        raise InputError(f"--unlabelled {remote.address(place)}: {len(images)} are left{of_all} {without}; name others")
    print(f"unlabelled: {len(images):,} images{of_all}, {without}")
    return images


def all_images(folder: Path, bands: Bands | None) -> ImageFiles:
    """All images below a folder, or else in its archives; says which other files are there. Raises InputError."""
    others = Counter()
    if archived := shards.read_shards(folder, bands):
        return archived[0]
    names = folders.image_names(folder, "", others, bands)
    if not names:
        raise InputError(f"{folder}: no images {folders.looked_for(others, bands)}")
    folders.report_others(folder, others)
    return ImageFiles(folder, names, bands)


def has_labels(data_dir: str | Path | None, data_list: Sequence[str | Path] | None = None) -> bool:
    """Does the folder have class folders, or archives with labels, or the list labels?"""
    if data_list:
        return ImageList(Path(data_list[0])).has_labels()
    folder = _train_folder(_existing("--data-dir", data_dir))
    if archived := shards.read_shards(folder):
        return bool(archived[1])
    return len(folders.folders_by_class(folder)) > 1


# -------------------------------------------------------------------------------------------------------------- sources


def _digits(data_dir: str | Path | None) -> tuple[list[LabelledImages], list[str]]:
    """1,797 handwritten digits of 8x8 pixels and 17 grey levels (UCI optdigits test set) that scikit-learn contains."""
    if data_dir is not None:
        raise InputError(f"the digits need no --data-dir; for the images in {data_dir} use --dataset imagefolder")
    found = Path(importlib.util.find_spec("sklearn").origin)  # to import it takes a second
    rows = np.loadtxt(found.with_name("datasets") / "data/digits.csv.gz", delimiter=",")  # 64 pixels, and the digit
    pixels = np.round(rows[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return [LabelledImages(list(map(Image.fromarray, pixels)), rows[:, -1])], list("0123456789")


def _folders(data_dir: str | Path | None, val_dir: str | Path | None, needs_val: bool) -> list[Path | None]:
    """The folder to train on and, of a divided set, the one to evaluate on; None if that is not needed."""
    root = _existing("--data-dir", data_dir)
    train = _train_folder(root)
    if val_dir is not None:
        return [train, _existing("--val-dir", val_dir)]
    if train == root:
        return [train]
    if not needs_val:
        return [train, None]
    evaluated = folders.evaluation_folder(root)
    if evaluated.name == "test":
        print("  to leave that for the last number, add a val/, or --eval-split validation")
    return [train, evaluated]


def _train_folder(root: Path) -> Path:
    """The train/ in a folder, or else the folder. Raises InputError if one of the two has masks next to its images."""
    train = root / "train" if remote.is_folder(root / "train") else root
    for folder in (root, train):
        images, masks = pair_folders(folder)
        if masks != folder and folders.image_names(masks):
            remedy = f"use --task segmentation, or in moco.pretrain --data-dir {images}"
            raise InputError(f"{folder}: {masks.name}/ has the masks of {images.name}/, and is no class: {remedy}")
    return train


def _existing(option: str, folder: str | Path | None) -> Path:
    if folder is None:
        raise InputError(f"{option} is missing: give a folder of images, with train/ and val/ or with class folders")
    if remote.is_folder(folder):  # Path.is_dir raises an error for a name too long for the file system
        return Path(folder)
    problem = "no such folder"
    if remote.is_remote(folder):
        problem = "no folder that can be listed, or no answer; name its images in a list, --data-list"
    elif os.path.exists(folder):
        problem = "a file; name the folder that holds the images, or archives of them (plain .tar; unpack others)"
    raise InputError(f"{option} {remote.address(folder)}: {problem}")


def part_to_evaluate(folder: Path, class_names: Sequence[str]) -> Path:
    """The val/ or test/ in a folder that has such parts; else the folder itself, where a class may be called so."""
    inside = folders.folders_by_class(folder).keys()
    if inside & {*EVALUATION_NAMES, "test"} and not inside & set(class_names):
        return folders.evaluation_folder(folder)
    return folder


def labelled(place: Path | ImageList, bands: Bands | None, truth: str, known: Sequence[str], other: Any) -> Named:
    """The images of a place, and the names of their classes, labels or numbers: those `known` of `other`, or their own.

    A place is a list, or a folder of class folders or archives. `truth` is no mask. InputError for names not `known`.
    """
    if isinstance(place, ImageList):
        if truth != "class":
            return _of_several(place, bands, truth, known, other)
        names, labels = place.labels()
        if not known and look_like_numbers(labels):
            raise InputError(f"{place}: the labels are numbers, as {printable(labels[0])}", "; use --task regression")
        files = ImageFiles(place.folder, names, bands)
        own = in_order(set(labels))
    elif archived := shards.read_shards(place, bands):
        files, labels = archived
        if not labels:
            unlabelled = f"{place}: the images in its archives have no labels, a .cls next to each .jpg"
            raise InputError(f"{unlabelled}; if each archive is a class, as in ImageNet, unpack each into a folder")
        own = in_order(set(labels))
    else:
        files, labels, own = folders.labelled_files(place, known, bands)
    class_names = list(known) or own
    if len(class_names) < 2:
        raise InputError(f"{place}: expected at least two classes, found only {printable(*class_names)}")
    if unknown := set(own) - set(class_names):
        raise InputError(f"{place} has classes that {other} lacks: {listed(sorted(unknown))}")
    numbers = {name: number for number, name in enumerate(class_names)}
    return LabelledImages(files, list(map(numbers.get, labels))), class_names


def _of_several(images: ImageList, bands: Bands | None, truth: str, known: Sequence[str], other: Any) -> Named:
    """The same of a list with several labels of an image, or numbers."""
    targets = images.targets(truth)
    if known:
        targets = like(targets, known, images.path, other)
    labels = [0] * len(targets.paths)
    if truth == "labels":
        if not (targets.values == 0).any():  # every answer yes would be right
            raise InputError(f"{images}: no answer is 0 for no; -1 and nothing are unknown")
        labels = splitting.strata(targets.values).tolist()
    return LabelledImages(ImageFiles(images.folder, targets.paths, bands), labels, targets.values), targets.names


def validation_part(images: LabelledImages, share: float = HELD_OUT_FRACTION) -> tuple[LabelledImages, LabelledImages]:
    """Split a part off: (rest, part). `part` has about this share of each class, always the same images.

    Of files, the paths within their folder decide, so that an added file hardly changes the place of another. Groups
    stay whole. Raises InputError if every class has only one image, which stays in `rest`, or all are in one group.
    """
    if images.groups is not None:
        in_part = splitting.by_groups(_alike(images), images.groups, share, images.times_split)
    elif images.in_files:
        in_part = splitting.by_hash(images.relative_names(), images.labels, share, images.times_split)
    else:
        in_part = splitting.at_random(images.labels, share)
    if not in_part.any():
        raise InputError("too few images to hold some out: every class has only one; label more, or give others for it")
    return images.split(in_part)


def _alike(images: LabelledImages) -> Sequence[int]:
    """Which images are alike: their labels, or, of numbers, which fifth of them the first number is among, by size."""
    if images.targets is None or len(set(images.labels)) > 1:
        return images.labels
    rank = images.targets[:, 0].argsort(stable=True).argsort()
    return (rank * NUMBER_STRATA // len(rank)).tolist()


# ---------------------------------------------------------------------------------------- what is wrong with the images


def readable(images: LabelledImages) -> LabelledImages:
    """The images that can be read; says which others it leaves out. All are read, JPEGs at an eighth of their size."""

    def problem(i: int) -> str:
        try:
            image, _ = images.undecoded(i)
            if not isinstance(image, np.ndarray):
                image.draft(None, (1, 1))
                transforms.to_rgb(image)
        except UnreadableImage as error:
            return error.problem  # the remedy is to skip such images
        return ""

    return images.subset(without_problem(look_at_each(problem, len(images), "image")))


def without_problem(problems: Sequence[str], may_be_none: bool = False) -> list[int]:
    """The positions of images without a problem; says which are left out. InputError if all are, unless they may be."""
    broken = list(filter(None, problems))
    if broken and len(broken) == len(problems) and not may_be_none:
        raise InputError(f"none of the {len(problems)} images can be read, such as {broken[0]}")
    if broken:
        print("\n  ".join([f"{len(broken)} of {len(problems)} images cannot be read and are left out:", *broken]))
    return [i for i, problem in enumerate(problems) if not problem]
