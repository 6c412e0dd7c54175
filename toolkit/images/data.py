"""Labelled images, their splits, augmentations and loaders, for pretraining and for fine-tuning."""

import functools
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from toolkit import InputError, distributed, listed, printable
from toolkit.images import splitting
from toolkit.images.bands import Bands
from toolkit.images.folders import (
    EVALUATION_NAMES,
    ImageFiles,
    UnreadableImage,
    class_folders,
    copies,
    evaluation_folder,
    has_class_folders,
    image_names,
    labelled_files,
    looked_for,
    tell_others,
)
from toolkit.images.lists import (
    in_order,
    like,
    list_has_labels,
    look_like_numbers,
    read_groups,
    read_list,
    read_paths,
    read_targets,
)
from toolkit.images.shards import ShardedImages, read_shards, shard_names
from toolkit.images.transforms import TwoCrops, View, to_rgb

UNLABELLED_SET = "unlabelled"  # all images of a folder, for pretraining alone
DATASETS = ("digits", "imagefolder", UNLABELLED_SET)
EVAL_SPLITS = ("held-out", "validation")
HELD_OUT_FRACTION = 0.2  # of sets that come in one part, and of the training split for eval_split="validation"


class LabelledImages(Dataset):
    """(PIL RGB image, int label) pairs, or (array (H, W, C), int label) where the source has `bands`.

    `labels` holds all labels without reading an image.

    Args:
        source: has (image, label) at each index.
        labels: the label of each.
        indices: those of the source that are meant, in order; None: all.
        targets: (N, K) of all images, where each has more to it than a class: then a row of them takes the label's
            place, and `labels` only say which images are alike (see `strata`).
    """

    def __init__(
        self,
        source: Sequence[tuple[Any, int]],
        labels: Sequence[int],
        indices: Sequence[int] | None = None,
        targets: torch.Tensor | None = None,
    ):
        self.source = source
        if indices is None:
            indices = range(len(labels))
        self.indices = np.array(indices, dtype=int)
        self.labels = [int(labels[i]) for i in self.indices]
        self.targets = targets
        if targets is not None:
            self.targets = targets[self.indices]
        self.groups: np.ndarray | None = None  # (N,): the name of each image's group, such as a patient
        self.times_split = 0  # how often `validation_part` or the like has made this set smaller

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Image.Image, int | torch.Tensor]:
        image, label = self.undecoded(i)
        if not isinstance(image, np.ndarray):
            image = to_rgb(image)
        return image, label

    def undecoded(self, i: int) -> tuple[Image.Image | np.ndarray, int | torch.Tensor]:
        """(image, label) as the source has them: in any mode, and an image file opened but not decoded."""
        image = self.source[int(self.indices[i])][0]
        if self.targets is not None:
            return image, self.targets[i]
        return image, self.labels[i]

    def subset(self, positions: Sequence[int]) -> "LabelledImages":
        """The images at these positions, in this order."""
        positions = np.array(positions, dtype=int)
        images = type(self)(self.source, [])
        images.indices = self.indices[positions]
        images.labels = [self.labels[i] for i in positions]
        if self.targets is not None:
            images.targets = self.targets[positions]
        if self.groups is not None:
            images.groups = self.groups[positions]
        images.times_split = self.times_split
        return images

    def at_most(self, count: int) -> "LabelledImages":
        """At most `count` images: all, or a fixed random choice, with one or more of each class if that fits."""
        if len(self) <= count:
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0)).numpy()
        _, first = np.unique(np.asarray(self.labels)[order], return_index=True)  # of each class
        others = np.setdiff1d(np.arange(len(self)), first)
        return self.subset(order[np.sort(np.concatenate([first, others])[:count])])

    def clusters(self) -> torch.Tensor | None:
        """The number of each image's group, (N,), counted from 0; None where images have none."""
        if self.groups is None:
            return None
        return torch.from_numpy(np.unique(self.groups, return_inverse=True)[1])

    def name(self, i: int) -> str:
        """What to call an image in a message: its file, if it is one."""
        position = self.indices[i]
        if isinstance(self.source, ImageFiles):
            return self.source.path(position)
        return f"image {position}"

    def relative_names(self) -> Iterator[str]:
        """What tells each image from the others wherever the set lies: a path within its folder, or an index."""
        if isinstance(self.source, ImageFiles):
            return map(self.source.names.__getitem__, self.indices)
        return map(str, self.indices)

    @functools.cached_property
    def digest(self) -> str:
        """Equal for sets of the same files with the same labels, or targets, in the same order."""
        hashed = hashlib.sha256()
        for label, key in zip(self.labels, self.relative_names(), strict=True):
            hashed.update(os.fsencode(f"{label} {key}\n"))
        if self.targets is not None:
            hashed.update(self.targets.numpy().tobytes())
        return hashed.hexdigest()


class Splits(NamedTuple):
    train: LabelledImages
    val: LabelledImages
    class_names: list[str]  # or those of the labels, or numbers, of which an image has several

    def groups_told(self) -> str:
        """How many groups each side has, as '40 + 10'."""
        return " + ".join(f"{len(np.unique(part.groups)):,}" for part in (self.train, self.val))

    def digest(self) -> str:
        """Equal for splits of the same files with the same labels into the same parts."""
        return hashlib.sha256(f"{self.train.digest} {self.val.digest}".encode()).hexdigest()


def load_splits(
    dataset: str = "digits",
    data_dir: str | Path | None = None,
    eval_split: str = "held-out",
    labels_per_class: int | None = None,
    seed: int = 0,
    *,
    val_dir: str | Path | None = None,
    data_list: Sequence[str | Path] | None = None,
    skip_unreadable: bool = False,
    for_training_only: bool = False,
    bands: Bands | None = None,
    task: str = "classification",
    unknown: str = "ignore",
    group_by: str | None = None,
    folds: str | None = None,
    label_columns: Sequence[str] | None = None,
) -> Splits:
    """The training and evaluation images of a data set, without any transform.

    Args:
        dataset: one of DATASETS.
        data_dir: `imagefolder`: the folder with train/ and val/ (or valid/, validation/, else test/), or with the class
            folders of one set, which is split.
        eval_split: what `val` is: 'held-out', or 'validation', the `validation_part` of the training split, for
            choosing hyperparameters without a look at the held-out images.
        labels_per_class: keep only so many random training images of each class.
        seed: draws those; the splits themselves never depend on it.
        val_dir: `imagefolder`: the evaluation images, a folder per class.
        data_list: `imagefolder`: lists of `path,label` lines instead of class folders, one to be split, or two of
            which the second is for evaluation. Relative paths are relative to `data_dir`, else to the list's folder.
        skip_unreadable: read all images once and leave out those that cannot be read.
        for_training_only: the evaluation images are not needed, and `val` may be empty.
        bands: `imagefolder`: what is read of files that are no RGB photographs.
        task: 'multilabel' or 'regression': lists say several labels, or numbers, for each image.
        unknown: what unknown labels mean, as `read_label_list` takes it.
        group_by: a column of the lists, or the level of a folder as a number, that says which images are of one
            patient, field or video: no such group is on two sides of a split.
        folds: '2/5': evaluate on the second of five parts of the training images.
        label_columns: the columns of lists that are labels or numbers, `A..B` for all from A to B; None: all.

    Raises:
        InputError: a missing, empty or unreadable folder, fewer than two classes, or too few images; a group that is
            among the training and the evaluation images.
    """
    needs_val = eval_split == "held-out" and not for_training_only and folds is None
    if task != "classification":
        train, val, class_names = _target_lists(data_list, data_dir, bands, task, unknown, group_by, label_columns)
    else:
        train, val, class_names = _images_of(
            dataset, data_dir, val_dir, data_list, needs_val, bands, group_by, label_columns
        )
    if group_by is not None:
        _group(train, val, data_list, group_by, needs_val)
    if folds is not None:
        train, val = fold_part(train, *splitting.read_folds(folds))
    elif val is None:
        train, val = validation_part(train)
    if skip_unreadable:
        labels = set(train.labels)
        train = readable(train)
        val = readable(val)
        if task == "classification":
            _check_each_is_left(labels, train, class_names)
    if eval_split == "validation" or folds is not None:
        left_alone = val_dir or (data_list or [])[1:]
        if left_alone and not for_training_only:
            print(f"evaluating on a part of the training images; {printable(left_alone)} is left alone")
    if eval_split == "validation":
        train, val = validation_part(train)
    if group_by is not None and task == "classification":
        _tell_untrained(train, val, class_names)
    if not for_training_only:
        _tell_copies(train, val)
    if labels_per_class is not None:
        train = train.subset(splitting.some_of_each(train.labels, labels_per_class, class_names, seed))
    return Splits(train, val, class_names)


def unknown_dataset(name: str) -> str:
    """What to say of a data set that there is not."""
    return (
        f"'{printable(name)}' is none of {', '.join(DATASETS)}; no set is downloaded: get a public one yourself, and "
        "name its folder with --data-dir"
    )


def _check_each_is_left(labels: set[int], train: LabelledImages, class_names: Sequence[str]) -> None:
    """Raise InputError if one of the classes has no training image that can be read."""
    gone = sorted(labels - set(train.labels))
    if gone:
        names = listed(class_names[label] for label in gone)
        raise InputError(f"no training image of {names} can be read: repair some, or remove the class")


# Training images, evaluation images (None: they are a part of the training images yet) and the names of the classes.
Undivided = tuple[LabelledImages, LabelledImages | None, list[str]]


def _images_of(
    dataset: str,
    data_dir: str | Path | None,
    val_dir: str | Path | None,
    data_list: Sequence[str | Path] | None,
    needs_val: bool,
    bands: Bands | None,
    group_by: str | None,
    label_columns: Sequence[str] | None,
) -> Undivided:
    """All images of a data set with one class an image. The arguments are `load_splits`'s."""
    if dataset == "digits":
        return _digits(data_dir)
    if dataset == "imagefolder":
        if data_list:
            return _image_lists(data_list, data_dir, bands, group_by, label_columns)
        return _image_folder(data_dir, val_dir, needs_val, bands)
    if dataset == UNLABELLED_SET:
        raise InputError(
            f"--dataset {UNLABELLED_SET} is for pretraining; here each image needs a label: use imagefolder"
        )
    raise InputError(unknown_dataset(dataset))


UNLABELLED = -1  # the label of an image without one


def load_unlabelled(
    data_dir: str | Path | None = None,
    data_list: Sequence[str | Path] | None = None,
    skip_unreadable: bool = False,
    bands: Bands | None = None,
) -> LabelledImages:
    """All images below a folder, or in a list, for pretraining. Of a folder with a train/ only those in there.

    Raises:
        InputError: no such folder or list, or no images.
    """
    if data_list:
        path = Path(data_list[0])
        folder = _folder_of_list(path, data_dir)
        source = ImageFiles(folder, read_paths(path, folder), (), bands)
    else:
        folder = _train_folder(_folder_of_images(data_dir, UNLABELLED_SET))
        if shard_names(folder):
            source, _ = read_shards(folder, bands)
        else:
            source = _all_images(folder, bands)
    source.labels = [UNLABELLED] * len(source)
    images = LabelledImages(source, source.labels)
    if skip_unreadable:
        return readable(images)
    return images


def _all_images(folder: Path, bands: Bands | None) -> ImageFiles:
    """Those below a folder, without labels; says which other files are there. Raises InputError if there are none."""
    others = Counter()
    names = image_names(folder, others=others, bands=bands)
    if not names:
        raise InputError(f"{folder}: no images {looked_for(others, bands)}")
    tell_others(folder, others)
    return ImageFiles(folder, names, (), bands)


def has_labels(data_dir: str | Path | None, data_list: Sequence[str | Path] | None = None) -> bool:
    """Does the folder have class folders, or archives with labels, or the list labels?"""
    if data_list:
        return list_has_labels(Path(data_list[0]))
    folder = _train_folder(_folder_of_images(data_dir))
    if shard_names(folder):
        return bool(read_shards(folder)[1])
    return has_class_folders(folder)


def _train_folder(root: Path) -> Path:
    """The train/ in a folder, or else the folder."""
    if os.path.isdir(root / "train"):
        return root / "train"
    return root


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong with the images

MOST_COMPARED = 20_000  # files; to read more, those of equal size, would take seconds to minutes at each start


def _tell_copies(train: LabelledImages, val: LabelledImages) -> None:
    """Say how many evaluation images are training images too: the accuracy on them shows memory, not learning.

    Where there are too many to compare, say that.
    """
    own = isinstance(train.source, ImageFiles) and isinstance(val.source, ImageFiles)
    if not own or not distributed.is_main():
        return
    if len(train) + len(val) > MOST_COMPARED:
        print(f"evaluation images may be copies of training images: more than {MOST_COMPARED:,} are not compared")
        return
    found = copies(val.source, val.indices.tolist(), train.source, train.indices.tolist())
    if found:
        first, other = found[0]
        print(
            f"{len(found)} of {len(val)} evaluation images are copies of training images, "
            f"such as {printable(first)} of {printable(other)}"
        )


def _tell_untrained(train: LabelledImages, val: LabelledImages, class_names: Sequence[str]) -> None:
    gone = sorted(set(val.labels) - set(train.labels))
    if gone:
        names = listed(class_names[label] for label in gone)
        print(f"no training image of {names} is left: all are in groups that are evaluated on")


def readable(images: LabelledImages) -> LabelledImages:
    """The images that can be read; says which others it leaves out. All are read, JPEGs at an eighth of their size."""
    broken = unreadable_among(images)
    if not broken:
        return images
    if len(broken) == len(images):
        raise InputError(f"none of the {len(images)} images can be read, such as {_without_remedy(broken[0])}")
    print(f"{len(broken)} of {len(images)} images cannot be read and are left out:")
    for error in broken.values():
        print(f"  {_without_remedy(error)}")
    return images.subset([i for i in range(len(images)) if i not in broken])


def _without_remedy(error: UnreadableImage) -> str:
    """Its remedy is to skip such images, which is being done."""
    return str(error).partition("; repair")[0]


def unreadable_among(images: LabelledImages) -> dict[int, UnreadableImage]:
    """The error of each image that cannot be read, by position."""

    def problem(i: int) -> UnreadableImage | None:
        try:
            image, _ = images.undecoded(i)
            if not isinstance(image, np.ndarray):
                image.draft(None, (1, 1))
                to_rgb(image)
        except UnreadableImage as error:
            return error
        return None

    with ThreadPool(usable_cores()) as pool:  # Pillow decodes without the interpreter's lock
        problems = enumerate(pool.imap(problem, range(len(images)), chunksize=16))
        return {i: error for i, error in problems if error is not None}


# ----------------------------------------------------------------------------------------------------------------------
# Sources


def _digits(data_dir: str | Path | None) -> Undivided:
    """1,797 handwritten digits of 8x8 pixels and 17 grey levels (UCI optdigits test set) that scikit-learn contains."""
    if data_dir is not None:
        raise InputError(f"the digits need no --data-dir; for the images in {data_dir} use --dataset imagefolder")
    from sklearn.datasets import load_digits  # here, because it takes a second to import

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = [(Image.fromarray(image), int(label)) for image, label in zip(pixels, digits.target, strict=True)]
    return LabelledImages(images, digits.target), None, [str(name) for name in digits.target_names]


def _image_folder(
    data_dir: str | Path | None, val_dir: str | Path | None, needs_val: bool, bands: Bands | None
) -> Undivided:
    """Folders with a folder of images per class, or with archives: train/ and an evaluation folder, or one set."""
    root = _folder_of_images(data_dir)
    train = _train_folder(root)
    held_out = None
    if val_dir is not None:
        held_out = _existing("--val-dir", val_dir)
    elif needs_val and train != root:
        held_out = evaluation_folder(root)
        if held_out is not None and held_out.name == "test":
            print("  to leave that for the last number, add a val/, or --eval-split validation")
    if held_out is None and needs_val and train != root:
        raise InputError(
            f"{root} has train/ but no {'/, '.join(EVALUATION_NAMES)}/ or test/: add one, name it with --val-dir, or "
            "put the class folders straight into --data-dir"
        )
    if shard_names(train):
        folders = [train]
        if held_out is not None:
            folders.append(held_out)
        images, val, class_names = _by_label(folders, [_labelled_shards(folder, bands) for folder in folders])
        if val is None and train != root:
            val = images.subset([])
        return images, val, class_names
    class_names = class_folders(train)
    if held_out is None and train == root:
        return _folder_images(root, class_names, bands), None, class_names
    images = _folder_images(train, class_names, bands)
    if held_out is None:
        return images, images.subset([]), class_names
    _check_classes(held_out, class_folders(held_out, at_least=1), train, class_names)
    return images, _folder_images(held_out, class_names, bands, every=False), class_names


def _check_classes(val: Path, val_names: Iterable[str], train: Path, class_names: Sequence[str]) -> None:
    unknown = set(val_names) - set(class_names)
    if unknown:
        raise InputError(f"{val} has classes that {train} lacks: {', '.join(sorted(unknown))}")


def _folder_of_images(data_dir: str | Path | None, dataset: str = "imagefolder") -> Path:
    if data_dir is None:
        raise InputError(f"dataset {dataset} needs --data-dir, a folder with train/ and val/ or with class folders")
    return _existing("--data-dir", data_dir)


def _existing(option: str, folder: str | Path) -> Path:
    if os.path.isdir(folder):  # Path.is_dir raises an error for a name too long for the file system
        return Path(folder)
    if os.path.exists(folder):
        raise InputError(f"{option} {folder}: a file; give the folder with the images")
    raise InputError(f"{option} {folder}: no such folder")


def _folder_images(folder: Path, class_names: list[str], bands: Bands | None, every: bool = True) -> LabelledImages:
    files = labelled_files(folder, class_names, every, bands)
    return LabelledImages(files, files.labels)


def _image_lists(
    lists: Sequence[str | Path],
    data_dir: str | Path | None,
    bands: Bands | None,
    group_by: str | None,
    label_columns: Sequence[str] | None,
) -> Undivided:
    """The images of one list or of two."""
    paths, contents = [], []
    for path, folder in _places_of_lists(lists, data_dir):
        paths.append(path)
        names, labels = read_list(path, folder, group_by, label_columns)
        if not labels:
            raise InputError(f"--data-list {path}: its images have no labels; write `path,label` lines")
        if look_like_numbers(labels):
            raise InputError(
                f"--data-list {path}: the labels are numbers, as {printable(labels[0])}, and not classes that images "
                "share; use --task regression"
            )
        contents.append((ImageFiles(folder, names, [UNLABELLED] * len(names), bands), labels))
    return _by_label(paths, contents)


def _places_of_lists(lists: Sequence[str | Path], data_dir: str | Path | None) -> Iterator[tuple[Path, Path]]:
    """Each list, and the folder in which its images are."""
    if len(lists) > 2:
        raise InputError(
            f"--data-list: expected one list, or one for training and one for evaluation, got {len(lists)}"
        )
    for path in map(Path, lists):
        yield path, _folder_of_list(path, data_dir)


def _folder_of_list(path: Path, data_dir: str | Path | None) -> Path:
    """The folder that the paths in a list are relative to."""
    if data_dir:
        return _existing("--data-dir", data_dir)
    return path.parent


def _target_lists(
    lists: Sequence[str | Path] | None,
    data_dir: str | Path | None,
    bands: Bands | None,
    task: str,
    unknown: str,
    group_by: str | None,
    label_columns: Sequence[str] | None,
) -> Undivided:
    """The images of one list or of two, with several labels or with numbers."""
    if not lists:
        forms = {"multilabel": 'several labels, as `path,"a,b"`', "regression": "numbers, as `path,3.5`"}
        raise InputError(
            f"--task {task} needs --data-list: a folder or an archive says one class for each image, a list says "
            f"{forms[task]}"
        )
    found = []
    for path, folder in _places_of_lists(lists, data_dir):
        targets = read_targets(path, folder, task, unknown, group_by, label_columns)
        if found:
            targets = like(targets, found[0][1].names, path, Path(lists[0]), unknown)
        found.append((folder, targets))
    parts = []
    for folder, targets in found:
        labels = [0] * len(targets.paths)
        if task == "multilabel":
            labels = strata(targets.values).tolist()
        files = ImageFiles(folder, targets.paths, labels, bands)
        parts.append(LabelledImages(files, labels, targets=targets.values))
    train, val = [*parts, None][:2]
    return train, val, found[0][1].names


def strata(values: torch.Tensor) -> torch.Tensor:
    """For each image the rarest label that it has, (N,), or K: a split or a choice that has its share of each of these
    has its share of rare labels.

    Args:
        values: (N, K), 1 where an image has the label.
    """
    has, labels = values == 1, values.shape[1]
    rarest_first = has.sum(0).argsort(stable=True)
    place = torch.where(has[:, rarest_first], torch.arange(labels), labels).amin(1)
    return torch.cat([rarest_first, torch.tensor([labels])])[place]


def _group(
    train: LabelledImages,
    val: LabelledImages | None,
    lists: Sequence[str | Path] | None,
    by: str,
    val_is_used: bool,
) -> None:
    """Say of each image which group it belongs to: see `load_splits`."""
    for number, images in enumerate((train, val)):
        if images is None:
            continue
        if not isinstance(images.source, ImageFiles):
            raise InputError(f"--group-by {printable(by)}: these images are in no folder or list of yours; drop it")
        if lists and not by.isdecimal():
            images.groups = read_groups(Path(lists[number]), by)
        else:
            images.groups = splitting.folder_level(images.relative_names(), by)
    if not lists and by == "1":
        raise InputError("--group-by 1: this is the folder of the class; groups are in folders below, from level 2 on")
    if val is not None and val_is_used:
        splitting.check_apart(train.groups, val.groups, by)


def _labelled_shards(folder: Path, bands: Bands | None) -> tuple[ShardedImages, list[str]]:
    if not shard_names(folder):
        raise InputError(f"{folder}: no .tar archives; the training images are in some, so these have to be as well")
    images, labels = read_shards(folder, bands)
    if not labels:
        raise InputError(
            f"{folder}: the images in its archives have no labels, a .cls beside each .jpg; only pretraining needs "
            "none. If each archive is a class, as ImageNet comes, unpack each into a folder of its name: "
            "for t in *.tar; do mkdir ${t%.tar} && tar -xf $t -C ${t%.tar}; done"
        )
    return images, labels


def _by_label(places: Sequence[Path], contents: Sequence[tuple[ImageFiles, list[str]]]) -> Undivided:
    """Images whose labels are text, of one place or of two."""
    class_names = in_order(set(contents[0][1]))
    if len(class_names) < 2:
        raise InputError(f"{places[0]}: expected at least two classes, found only {printable(*class_names)}")
    _check_classes(places[-1], contents[-1][1], places[0], class_names)
    numbers = {name: number for number, name in enumerate(class_names)}
    parts = []
    for files, labels in contents:
        files.labels = [numbers[label] for label in labels]
        parts.append(LabelledImages(files, files.labels))
    train, val = [*parts, None][:2]
    return train, val, class_names


# ----------------------------------------------------------------------------------------------------------------------
# Splits


def validation_part(images: LabelledImages, share: float = HELD_OUT_FRACTION) -> tuple[LabelledImages, LabelledImages]:
    """Split a part off: (rest, part). `part` has about this share of each class, always the same images.

    Of files, the paths within their folder decide, so that an added file changes the place of no other. (The exception
    is a class of a few images that all fall to one side: one of them goes to the other side until an added one does.)

    Where images are in groups, no group is on both sides; an added file may then change others' places.

    Raises:
        InputError: every class has only one image, which stays in `rest`, or all images are in one group.
    """
    if images.groups is not None:
        rest, part = splitting.by_groups(_alike(images), images.groups, share, images.times_split)
    elif isinstance(images.source, ImageFiles):
        rest, part = splitting.by_hash(images.relative_names(), images.labels, share, images.times_split)
    else:
        rest, part = splitting.at_random(images.labels, share)
    if not len(part):
        raise InputError("too few images to hold some out: every class has only one")
    return _apart(images, rest, part)


def fold_part(images: LabelledImages, number: int, count: int) -> tuple[LabelledImages, LabelledImages]:
    """(rest, part) for one of the `count` parts of a cross-validation, `number` from 1: see `splitting.folds`.

    Raises:
        InputError: there are fewer images, or groups, than parts.
    """
    keys = images.groups
    if keys is None:
        keys = images.relative_names()
    in_part = splitting.folds(_alike(images), keys, count, images.times_split) == number - 1
    return _apart(images, np.flatnonzero(~in_part), np.flatnonzero(in_part))


NUMBER_STRATA = 5


def _alike(images: LabelledImages) -> Sequence[int]:
    """Which images are alike: their labels, or, of numbers, which fifth of them the first number is among, by size."""
    if images.targets is None or len(set(images.labels)) > 1:
        return images.labels
    rank = images.targets[:, 0].argsort(stable=True).argsort()
    return (rank * NUMBER_STRATA // len(rank)).tolist()


def _apart(images: LabelledImages, *positions: Sequence[int]) -> tuple[LabelledImages, ...]:
    parts = tuple(images.subset(chosen) for chosen in positions)
    for part in parts:
        part.times_split += 1
    return parts


# ----------------------------------------------------------------------------------------------------------------------
# Loaders


class Transformed(Dataset):
    """(transform(image), label) of a data set of (image, label).

    An index may come with a seed, as (i, seed): what the transform draws from PyTorch then depends on that alone, and
    nobody else's draws depend on the transform's.
    """

    def __init__(self, dataset: Dataset, transform: Callable[[Image.Image], Any]):
        self.dataset = dataset
        self.transform = transform
        # Views decode files themselves, at the size that they need.
        undecoded = isinstance(dataset, LabelledImages) and isinstance(transform, View | TwoCrops)
        self.read = dataset.__getitem__
        if undecoded:
            self.read = dataset.undecoded

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Any, int]:
        if not isinstance(index, tuple):
            image, label = self.read(index)
            return self.transform(image), label
        i, seed = index
        image, label = self.read(i)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds GPUs as well
            return self.transform(image), label


class Batches(Sampler):
    """This process's share of the positions of each batch, in an order that depends on (seed, epoch) alone.

    Positions come with a seed each, as `Transformed` takes them, that depends
    on (seed, epoch, position): neither the number of workers or processes nor where a run was interrupted changes what
    an epoch consists of. Every pass is the next epoch. Set `epoch` and `start` to choose: `start` batches are left out.

    Of images in archives (`toolkit.images.shards`) a shuffled order takes a few archives at a time.

    Process k of W gets the positions k, k + W, ... of each batch. If a batch has fewer than W images, a process without
    one skips the batch in fixed order, and gets its first image as a stand-in in shuffled order: see `has_share`.
    """

    ARCHIVES_AT_A_TIME = 8

    def __init__(
        self,
        count: int,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        archives: np.ndarray | None = None,
    ):
        self.count = count
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.archives = archives  # the number of each image's archive, if the images are in archives
        self.epoch = 0
        self.start = 0
        self.number = count // batch_size
        if not drop_last and count % batch_size:
            self.number += 1

    def __len__(self) -> int:
        return self.number

    def has_share(self, number: int) -> bool:
        """Does this process get a share of this batch (0 is the first)?"""
        return min(self.batch_size, self.count - number * self.batch_size) > distributed.rank()

    def __iter__(self) -> Iterator[list[int] | list[tuple[int, int]]]:
        epoch = self.epoch
        start = self.start
        self.epoch += 1
        self.start = 0
        order = torch.arange(self.count)
        if self.shuffle:
            order = self.shuffled(epoch)
        for number in range(start, self.number):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size].tolist()
            share = batch[distributed.rank() :: distributed.world_size()]
            if self.shuffle:
                share = share or batch[:1]
            if share:
                yield [(i, _derive_seed(self.seed, epoch, i)) for i in share]

    def shuffled(self, epoch: int) -> torch.Tensor:
        """The order of an epoch, (count,)."""
        generator = torch.Generator().manual_seed(_derive_seed(self.seed, epoch))
        order = torch.randperm(self.count, generator=generator)
        if self.archives is None:
            return order
        turns = torch.randperm(int(self.archives.max()) + 1, generator=generator) // self.ARCHIVES_AT_A_TIME
        return order[turns[self.archives[order]].argsort(stable=True)]


def _derive_seed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@dataclass
class LoadingMeter:
    """Watches a training loop take batches from a loader: how many images it gets, and how long it waits for them."""

    images: int = 0
    waited: float = 0.0
    seconds: float = 0.0

    def watched(self, loader: DataLoader) -> Iterator[Any]:
        """The loader's batches, (anything, labels) each."""
        started = asked = time.perf_counter()
        before = self.seconds
        for batch in loader:
            received = time.perf_counter()
            self.waited += received - asked
            self.seconds = before + received - started
            yield batch
            asked = time.perf_counter()
            self.images += len(batch[1]) * distributed.world_size()
            self.seconds = before + asked - started

    def results(self) -> dict[str, float]:
        """`images_per_second`, of all processes together, and `waiting_share` of the time, 0 to 1."""
        seconds = max(self.seconds, 1e-9)
        return {"images_per_second": self.images / seconds, "waiting_share": self.waited / seconds}

    def shown(self) -> dict[str, str]:
        """For a progress bar: the share of waiting, where it is worth more loading processes."""
        share = self.results()["waiting_share"]
        if share < WORTH_TELLING:
            return {}
        return {"waiting for images": f"{share:.0%}"}


WORTH_TELLING = 0.1  # of the time


# So many images in memory, or in files, are read before a loading process has started.
SMALL_DATASET_IMAGES = 2_000
SMALL_DATASET_FILES = 500
MOST_WORKERS = 16


def _helpful_workers(dataset: Transformed, device: torch.device | None) -> int:
    """A process per core for a GPU, which computes meanwhile; for a CPU, which is to compute, one for four cores."""
    smallest = SMALL_DATASET_IMAGES
    if isinstance(getattr(dataset.dataset, "source", None), ImageFiles):
        smallest = SMALL_DATASET_FILES
    if len(dataset) < smallest:
        return 0
    workers = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device is None or device.type == "cpu":
        workers //= 4
    return min(MOST_WORKERS, max(1, workers))


def usable_cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fixed_order_batch(batch_size: int) -> int:
    """The least multiple of the number of processes that is no less than a batch size."""
    return -(-batch_size // distributed.world_size()) * distributed.world_size()


def build_loader(
    dataset: Transformed,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    workers: int | str = 0,
    drop_last: bool = False,
    device: torch.device | None = None,
    keep_workers: bool = True,
    collate: Callable[[list], Any] | None = None,
) -> DataLoader:
    """A DataLoader over `Batches`, which is its `batch_sampler`: what it yields depends on `seed` and the epoch alone.

    Args:
        batch_size: images at a time, of all processes together. In fixed order it is rounded up to a multiple of their
            number, so that shares of batches are shares of the whole (`distributed.interleave` puts them in order).
        shuffle: a new order each epoch, and augmentations that can be repeated.
        workers: processes that load images; 'auto' for as many as are likely to help.
        device: what the batches are for: on the way to a GPU they wait in pinned memory.
        keep_workers: they wait for the next pass, instead of ending with each. They take seconds to start where
            processes do not fork (macOS, Windows).
        collate: makes a batch of its items; None: PyTorch's own way.
    """
    if not shuffle:
        batch_size = fixed_order_batch(batch_size)
    if workers == "auto":
        workers = _helpful_workers(dataset, device)
    images = dataset.dataset
    archives = None
    if shuffle and isinstance(images, LabelledImages) and isinstance(images.source, ShardedImages):
        archives = images.source.places[images.indices, 0]
    return DataLoader(
        dataset,
        batch_sampler=Batches(len(dataset), batch_size, shuffle, seed, drop_last, archives),
        num_workers=workers,
        persistent_workers=keep_workers and workers > 0,
        pin_memory=device is not None and device.type == "cuda",
        worker_init_fn=_leave_stopping_to_the_main_process,
        collate_fn=collate,
        generator=torch.Generator(),  # an iterator draws a number nobody needs: not from the global generator
    )


def end_workers(loaders: list[DataLoader]) -> None:
    """End the processes that wait for the next pass over these loaders, and empty the list.

    Python's collector of cycles would end them late and take five seconds for each: it closes their queues first.
    """
    for loader in loaders:
        loader._iterator = None  # PyTorch has no public name for it
    loaders.clear()


def _leave_stopping_to_the_main_process(worker: int) -> None:
    # A terminal sends Ctrl-C, and some schedulers SIGTERM, to every process. The main process then finishes its step,
    # in which the sudden end of a worker would be an error; so a worker ends on its main process's SIGTERM alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_told_by, args=(multiprocessing.parent_process().pid,), daemon=True).start()


def _end_when_told_by(process: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != process:
        pass
    os._exit(0)
