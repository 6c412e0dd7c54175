"""Which images a person should look at next: those whose label teaches most, and those whose label seems wrong."""

import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit import choices, files
from toolkit.answers.report_page import html_pictures, write_html
from toolkit.images import data, remote

# Measured, see benchmarks/RESULTS.md.
FEW = 5  # labels a class: a model that has fewer does not know what it is unsure of
MOST_IMAGES = 10_000  # images that are looked at
USUAL = 50  # that are chosen, where nothing else is asked for
CANDIDATES = 10  # the least sure images, for each that is chosen


def most_typical(features: Tensor, count: int, labelled: Tensor) -> list[int]:
    """The positions of `count` images, of features (N, D), nearest to k-means' centres; (M, D) are of labelled ones."""
    from sklearn.cluster import KMeans

    everything = torch.cat([features, labelled]).float()
    directions = F.normalize(everything - everything.mean(0), dim=1).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer images that differ than parts
        fitted = KMeans(count + len(labelled), n_init=1, random_state=0).fit(directions)
    parts = fitted.labels_
    distances = np.linalg.norm(directions - fitted.cluster_centers_[parts], axis=1)
    distances[len(features) :] = -1.0
    order = np.lexsort((distances, parts))  # part by part: what is labelled, then the nearest first
    # A part whose centre has a labelled image has its turn last; else the largest comes first.
    turns = np.empty(len(order), int)
    turns[order] = np.arange(len(order)) - np.searchsorted(parts[order], parts[order])
    by_turn = np.lexsort((-np.bincount(parts)[parts], turns))
    return by_turn[by_turn < len(features)][:count].tolist()


def least_sure(features: Tensor, count: int, logits: Tensor) -> list[int]:
    """The positions of `count` images that differ and are least sure, by features (N, D), logits (N, K): 1901.05954."""
    first, second = logits.softmax(1).topk(2, 1).values.T
    candidates = (first - second).argsort(stable=True)[: CANDIDATES * count]
    return candidates[sorted(most_typical(features[candidates], count, features[:0]))].tolist()


def write_chosen(images: data.LabelledImages, folder: Path) -> None:
    """Write a list to add labels to, and a page with the pictures; not what a model says, which people would follow."""
    names = list(map(images.name, range(len(images))))
    shown = [(i, f"{i + 1}. {Path(name).name}") for i, name in enumerate(names)]
    rows = [(name if remote.is_remote(name) else os.path.abspath(name), "") for name in names]
    table, page = map(folder.joinpath, choices.TO_LABEL)
    todo = f"<p>Write the label of each into {table.name}, and delete the lines without one.</p>"
    write_html(page, f"{len(images)} images to label", [todo, html_pictures(images, shown)])
    files.write_cells(rows, ["path", "label"], table)


def contradicted(held_out: Tensor, labels: Tensor) -> list[tuple[int, int, float]]:
    """The images for which a probe that has not seen them answers otherwise: (image, answer, times), the worst first.

    `times` is how many times as probable as its label (N,) the answer is, by the mean of `held_out`, (views * N, K).
    """
    logits = held_out.double().unflatten(0, (-1, len(labels))).mean(0)  # (N, K)
    own = labels[:, None]
    others, answers = logits.scatter(1, own, -torch.inf).max(1)
    leads = (others - logits.gather(1, own)[:, 0]).nan_to_num(-1.0)
    wrong = leads.argsort(descending=True, stable=True)[: int((leads > 0).sum())]
    return list(zip(wrong.tolist(), answers[wrong].tolist(), leads[wrong].exp().tolist(), strict=True))
