"""How a set is divided: at which positions its training, evaluation and validation images stand.

A run's seed changes none. Groups, such as patients, stay on one side; each side has its share of each of `labels` (N,).
"""

import hashlib
import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from toolkit import InputError, listed, printable
from toolkit.images.folders import one_spelling


def by_hash(keys: Iterable[str], labels: Sequence[int], share: float, turn: int) -> np.ndarray:
    """Is each image in the part, (N,)? It is if the number in [0, 1) drawn by its key and turn is below `share`."""
    # An image that is listed twice has one number, and stays on one side.
    drawn, place, same = np.unique(_drawn(keys, turn), return_index=True, return_inverse=True)
    labels = np.asarray(labels)[place]
    in_part = drawn < share
    order = np.lexsort((drawn, labels))  # by class, and in each by the number drawn
    last = np.append(np.flatnonzero(np.diff(labels[order])), len(order) - 1)
    first = np.append(0, last[:-1] + 1)
    in_part[order[first]] = True  # at least one of each class,
    in_part[order[last]] = False  # never all of it, and not the only one
    return in_part[same]


def _drawn(keys: Iterable[str], turn: int) -> np.ndarray:
    """A number in [0, 1) for each key."""
    digests = (hashlib.blake2b(os.fsencode(f"{turn} {key}"), digest_size=8).digest() for key in keys)
    return np.frombuffer(b"".join(digests), ">u8") / 2.0**64


def at_random(labels: Sequence[int], share: float) -> np.ndarray:
    """Is each image of a set that never changes in the part, (N,), which has this share of each class, and not all?"""
    rng = np.random.RandomState(0)
    labels = np.asarray(labels)
    in_part = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        positions = rng.permutation(np.flatnonzero(labels == label))
        in_part[positions[: min(max(1, round(share * len(positions))), len(positions) - 1)]] = True
    return in_part


def some_of_each(labels: Sequence[int], count: int, class_names: Sequence[str], seed: int) -> list[int]:
    """Positions of `count` random images of each class. Raises InputError for a class with fewer."""
    rng = np.random.RandomState(seed)
    labels = np.asarray(labels)
    chosen = []
    for label, name in enumerate(class_names):
        positions = rng.permutation(np.flatnonzero(labels == label))
        if len(positions) < count:
            raise InputError(f"--labels-per-class {count}: class {name} has only {len(positions)} training images")
        chosen += positions[:count].tolist()
    return sorted(chosen)


def strata(values: torch.Tensor) -> torch.Tensor:
    """For each image the rarest label that it has, (N,), or K. `values` (N, K) are 1 where an image has the label."""
    has = values == 1
    labels = values.shape[1]
    rarest_first = has.sum(0).argsort(stable=True)
    place = torch.where(has[:, rarest_first], torch.arange(labels), labels).amin(1)
    return torch.cat([rarest_first, torch.tensor([labels])])[place]


def by_groups(labels: Sequence[int], groups: np.ndarray, share: float, turn: int) -> np.ndarray:
    """Is each image in the part, (N,): of 1 / share parts of whole groups the one that costs the fewest classes?"""
    labels = np.asarray(labels)
    count = min(round(1 / share), len(np.unique(groups)))
    if count < 2:
        raise InputError("--group-by: all images are in one group, so none can be held out")
    number = folds(labels, groups, count, turn)
    return number == max(range(count), key=lambda part: len(np.unique(labels[number != part])))


def folds(labels: Sequence[int], keys: Iterable[str], count: int, turn: int = 0) -> np.ndarray:
    """The number of the part, from 0 to count - 1, that each image belongs to: equal keys share one, (N,)."""
    names, group = np.unique(np.asarray(list(keys)), return_inverse=True)
    if len(names) < count:
        raise InputError(f"{len(names)} images or groups are too few for {count} parts: {listed(names)}")
    _, label = np.unique(labels, return_inverse=True)
    drawn = _drawn(names, turn)
    if len(names) == len(label):  # each image for itself: they are dealt like cards, class by class
        number = np.empty(len(label), dtype=int)
        number[np.lexsort((drawn[group], label))] = np.arange(len(label)) % count
        return number
    images = np.bincount(label)
    members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
    held = np.zeros((count, len(images)))
    part_of = np.empty(len(names), dtype=int)
    for place in np.lexsort((drawn, -np.bincount(group, 1 / images[label]).round(9))):  # the largest groups first
        brings = np.bincount(label[members[place]], minlength=len(images)) / images  # its share of each label
        part = np.lexsort((held.sum(1).round(9), (held @ brings).round(9)))[0]  # rounded: alike on all machines
        held[part] += brings
        part_of[place] = part
    return part_of[group]


def folder_level(paths: Iterable[str], by: str) -> np.ndarray:
    """The name of the folder at a level of each path, (N,); '1' is the outermost. Raises InputError for none."""
    found = []
    for path in paths:
        folders = {str(level): name for level, name in enumerate(filter(None, path.split("/")[:-1]), 1)}
        if by not in folders:
            levels = listed(f"{level} is {name}" for level, name in folders.items())
            problem = f"no column of a --data-list, and no level of the folders of {printable(path)}: {levels}"
            raise InputError(f"--group-by {printable(by)}: {problem}")
        found.append(one_spelling(folders[by]))
    return np.array(found)
