"""What the field compares frozen backbones by: k-NN, a linear probe, and probes on a few labels, over features."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.answers.evaluation import knn_answers
from toolkit.answers.measures import share_interval
from toolkit.answers.probe import fit_linear_probe
from toolkit.images.splitting import some_of_each

KNN_SIZES = (5, 200)  # of torchgeo-bench; of instance discrimination (arXiv 1805.01978), MoCo's relatives and DINO
SHOTS = (1, 5, 10)  # labels per class
LABEL_DRAWS = 5  # of them


class Measured(NamedTuple):
    """The accuracy by a protocol, 0 to 1: of one fit between the ends of its 95% interval, or the mean of draws."""

    protocol: str
    training_images: int
    accuracy: float
    low: float | None = None
    high: float | None = None
    draws: int = 1
    spread: float | None = None  # their standard deviation

    def reported(self) -> str:
        """For people."""
        if self.spread is None:
            return f"{self.accuracy:.2%} (95% interval {self.low:.1%} to {self.high:.1%})"
        return f"{self.accuracy:.2%} \u00b1 {self.spread:.2%} over {self.draws} draws of the labels"


def measure(
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    class_names: Sequence[str],
    done: Callable[[Measured], None] = lambda measured: None,
    clusters: tuple[Tensor | None, Tensor | None] = (None, None),
) -> list[Measured]:
    """Measure features by each protocol that has enough training images.

    - k-NN votes by cosine similarity, weighted as `toolkit.answers.evaluation.knn_answers` does.
    - The linear probe is `probe.fit_linear_probe`, a logistic regression by L-BFGS on standardised features,
      with the C that cross-validation over the training images takes.
    - With few labels it is fitted to so many random images of each class, the same ones in every run.

    Args:
        train, held_out: features (N, D) and labels (N,).
        class_names: of the labels from 0 on.
        done: called with each figure when it is there.
        clusters: of the training and of the held-out images, as for `fit_linear_probe`. Intervals are then over these.
    """
    features, labels = train
    of_train, of_held_out = clusters
    found: list[Measured] = []

    def add(measured: Measured) -> None:
        found.append(measured)
        done(measured)

    def of_one_fit(protocol: str, right: Tensor) -> Measured:
        return Measured(protocol, len(labels), _share(right), *share_interval(right, of_held_out))

    for k in KNN_SIZES:
        if k <= len(labels):
            add(of_one_fit(f"k-NN, k = {k}", knn_answers(features, labels, held_out[0], k) == held_out[1]))
    add(of_one_fit("linear probe", _right_by_probe(train, held_out, len(class_names), of_train)))
    fewest = int(torch.bincount(labels, minlength=len(class_names)).min())
    for count in SHOTS:
        if count > fewest:
            continue
        accuracies = []
        for seed in range(LABEL_DRAWS):
            chosen = some_of_each(labels.tolist(), count, class_names, seed)
            own = None if of_train is None else of_train[chosen]
            right = _right_by_probe((features[chosen], labels[chosen]), held_out, len(class_names), own)
            accuracies.append(_share(right))
        title = f"{count} label{'s' * (count > 1)} per class"
        mean = statistics.mean(accuracies)
        spread = statistics.stdev(accuracies)
        add(Measured(title, count * len(class_names), mean, draws=LABEL_DRAWS, spread=spread))
    return found


def _right_by_probe(
    train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], classes: int, clusters: Tensor | None
) -> Tensor:
    """Which of the held-out images a probe answers right, (N,)."""
    weight, bias, *_ = fit_linear_probe(*train, classes, clusters=clusters)
    features, labels = held_out
    return (features @ weight.T + bias).argmax(1) == labels


def _share(right: Tensor) -> float:
    return right.double().mean().item()
