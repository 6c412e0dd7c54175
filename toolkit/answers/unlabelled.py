"""Say by images without labels where the classifier head starts: at the linear probe, or at a head that is better."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.answers import measures
from toolkit.answers.probe import Probe

MOST_IMAGES = 10_000  # without labels that are read: more add seconds and no accuracy


class Start(NamedTuple):
    """Where the head starts."""

    probe: Probe  # the head: the plain probe, bit for bit, or one distilled from a candidate
    name: str  # of the candidate that was taken; 'probe': none
    answers: Tensor  # (M, K), for the images without labels: how probable each class is
    gain_loss: float  # what the candidate gained over the probe in cross-validation: log loss, positive is better
    gain_accuracy: float  # and accuracy
    shares: Tensor  # (K,), of the classes in `answers`
    foreign: float  # the share of the images without labels that resemble no class


def sample(images: int) -> Tensor:
    """The positions of the images without labels that are read, in ascending order: all, or MOST_IMAGES at random."""
    draws = torch.randperm(images, generator=torch.Generator().manual_seed(0))
    return draws[:MOST_IMAGES].sort().values


def start(
    features: Tensor,
    labels: Tensor,
    unlabelled: Tensor,
    num_classes: int,
    probe: Probe,
    views: int = 1,
    class_weights: str | None = None,
    clusters: Tensor | None = None,
) -> Start:
    """The head to start from.

    Args:
        features, labels, num_classes, views, class_weights, clusters: as for `fit_linear_probe`.
        unlabelled: features (M, D) of images without labels, as they are.
        probe: what `fit_linear_probe` returned for these.
    """
    outputs = unlabelled.detach().cpu().float() @ probe.weight.T + probe.bias
    answers = (outputs / held_out_temperature(probe, labels)).softmax(1)
    return Start(probe, "probe", answers, 0.0, 0.0, answers.mean(0), 0.0)


def held_out_temperature(probe: Probe, labels: Tensor) -> float:
    """The temperature that fits the held-out answers of a probe; 1 where nothing was held out."""
    if probe.held_out is None:
        return 1.0
    known = probe.held_out.isfinite().all(1)
    targets = labels.cpu()[known]
    return measures.fit_temperature(probe.held_out[known], lambda logits: F.cross_entropy(logits, targets))
