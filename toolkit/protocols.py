"""What the field compares frozen backbones by: k-NN, a linear probe, and probes on a few labels, over features."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.measures import wilson_interval
from toolkit.probe import fit_linear_probe
from toolkit.splitting import some_of_each
from toolkit.training import knn_accuracy

NEIGHBOURS = (
    5,
    200,
)  # torchgeo-bench's k; that of instance discrimination (arXiv 1805.01978), MoCo's relatives and DINO
SHOTS = (1, 5, 10)  # labels per class
DRAWS = 5  # of them


class Measured(NamedTuple):
    """The accuracy by a protocol, 0 to 1: of one fit between the ends of its 95% interval, or the mean of draws."""

    protocol: str
    training_images: int
    accuracy: float
    low: float | None = None
    high: float | None = None
    draws: int = 1
    spread: float | None = None  # their standard deviation

    def told(self) -> str:
        """For people."""
        if self.spread is None:
            return f"{self.accuracy:.2%} (95% interval {self.low:.1%} to {self.high:.1%})"
        return f"{self.accuracy:.2%} \u00b1 {self.spread:.2%} over {self.draws} draws of the labels"


def measure(
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    class_names: Sequence[str],
    done: Callable[[Measured], None] = lambda measured: None,
) -> list[Measured]:
    """Measure features by each protocol that has enough training images.

    - k-NN votes by cosine similarity, weighted as `toolkit.training.knn_accuracy` does.
    - The linear probe is `toolkit.probe.fit_linear_probe`, a logistic regression by L-BFGS on standardised features,
      with the C that cross-validation over the training images takes.
    - With few labels it is fitted to so many random images of each class, the same ones in every run.

    Args:
        train, held_out: features (N, D) and labels (N,).
        class_names: of the labels from 0 on.
        done: called with each figure when it is there.
    """
    features, labels = train
    found: list[Measured] = []

    def add(measured: Measured) -> None:
        found.append(measured)
        done(measured)

    def of_one_fit(protocol: str, accuracy: float) -> Measured:
        images = len(held_out[1])
        return Measured(protocol, len(labels), accuracy, *wilson_interval(accuracy * images, images))

    for k in NEIGHBOURS:
        if k <= len(labels):
            add(of_one_fit(f"k-NN, k = {k}", knn_accuracy(features, labels, *held_out, k=k)))
    add(of_one_fit("linear probe", _probe_accuracy(train, held_out, len(class_names))))
    fewest = int(torch.bincount(labels, minlength=len(class_names)).min())
    for count in SHOTS:
        if count > fewest:
            continue
        accuracies = []
        for seed in range(DRAWS):
            chosen = some_of_each(labels.tolist(), count, class_names, seed)
            accuracies.append(_probe_accuracy((features[chosen], labels[chosen]), held_out, len(class_names)))
        title = f"{count} label{'s' * (count > 1)} per class"
        mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
        add(Measured(title, count * len(class_names), mean, draws=DRAWS, spread=spread))
    return found


def _probe_accuracy(train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], classes: int) -> float:
    weight, bias, *_ = fit_linear_probe(*train, classes)
    features, labels = held_out
    return ((features @ weight.T + bias).argmax(1) == labels).float().mean().item()
