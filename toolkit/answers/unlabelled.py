"""Say by images without labels where the classifier head starts: at the linear probe, or at a head that is better.

`k_means` sees where images lie close together, which a probe of a few labelled ones cannot. Where classes are no
clusters it harms. So it has to be better than the probe in cross-validation over the labelled images.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.answers import measures, probe
from toolkit.answers.probe import Probe

TURNS = 2  # of the cross-validation, each over other parts
# Measured: see benchmarks/RESULTS.md
DIRECTIONS = 128  # of the features, of the largest variance, in which k-means works
SHARPNESS = 15.0  # of k-means' answers
ROUNDS = 10
DISTILLED = 0.1  # C of the distilled head
OTHERS = 3.0  # how much all images without labels count in it, in labelled ones
MARGIN = 2.0  # standard errors by which the log loss of what is held out has to fall
MOST_FOREIGN = 0.4  # of the images without labels: if more of them look foreign, those do not train


class Start(NamedTuple):
    probe: Probe  # the head: the plain probe, bit for bit, or one distilled from k-means
    name: str  # 'k-means' or 'probe'
    answers: Tensor  # (M, K), for the images without labels: how probable each class is
    gain_loss: float  # what k-means gained over the probe in cross-validation: log loss, positive is better
    gain_accuracy: float  # and accuracy
    foreign: Tensor  # (M,) of bool: which of the images without labels resemble no labelled one

    def of_their_kind(self) -> Tensor:
        """The places of the images without labels that may train: all, or those not foreign if many are."""
        if self.foreign.float().mean() > MOST_FOREIGN:
            return (~self.foreign).nonzero()[:, 0]
        return torch.arange(len(self.foreign))


class Images(NamedTuple):
    """Features of all images: rows (R, D) as they are, and as points in another space, whatever their labels."""

    rows: Tensor
    whitened: Tensor  # (R, DIRECTIONS): of one length, and about the same spread in each direction


def placed(rows: Tensor) -> Images:
    standard = probe.SCALINGS["deviation"](rows).rows
    variances, directions = torch.linalg.eigh((standard.T @ standard / len(rows)).double())
    spread = variances[-DIRECTIONS:].clamp_min(1e-12).sqrt()
    whitening = directions[:, -DIRECTIONS:] / (spread + 0.3 * spread.mean())  # directions of noise stay small
    return Images(rows, F.normalize(standard @ whitening.float(), dim=1))


class Labelled(NamedTuple):
    places: Tensor  # (n,), their rows
    targets: Tensor  # (n, K), one of them 1
    counts: Tensor  # (n, 1), how much each counts


class Judged(NamedTuple):
    """Answers for labelled images that were held out, at the temperature that fits them, by image: (N,) each."""

    temperature: float
    losses: Tensor
    hits: Tensor


def seen(
    features: Tensor, labels: Tensor, unlabelled: Tensor, classes: int, views=1, class_weights: Tensor | None = None
) -> tuple[Images, Labelled]:
    """All images, those with labels first, the others with features (M, D), and what is known of these."""
    known = Labelled(torch.arange(len(labels)), *probe.one_hot(labels.cpu(), classes, views, class_weights))
    return placed(torch.cat([features, unlabelled]).detach().cpu().float()), known


def start(images: Images, known: Labelled, plain: Probe, views: int = 1, clusters: Tensor | None = None) -> Start:
    """The head to start from: by k-means if that gains over the `plain` probe in cross-validation, else that.

    It is taken if the log loss of what is held out, each at the temperature that fits it, is below the probe's by more
    than MARGIN standard errors, over images or clusters, and the accuracy is no worse. With one label a class nothing
    is held out, and the probe is kept. Views and clusters are as for `fit_linear_probe`.
    """
    labels = known.targets.argmax(1)
    answers = held_out_answers(images, known, plain, views, clusters)
    judging = min(views, 2) * len(labels) // views  # images and one view of each: answers are for images as they are
    of_probe = judge(answers["probe"][:, :judging], labels[:judging], min(views, 2))
    of_k_means = judge(answers["k-means"][:, :judging], labels[:judging], min(views, 2))
    gains = of_probe.losses - of_k_means.losses
    gained = gains.nanmean().item(), (of_k_means.hits - of_probe.hits).nanmean().item()
    others = images.rows[len(labels) :]
    deviations = (gains - gains.nanmean()).nan_to_num()
    if clusters is not None:  # they are independent, and not the images
        deviations = clusters.cpu().bincount(deviations)
    error = (deviations.square().sum().sqrt() / gains.isfinite().sum()).item()  # of the mean gain
    if gained[0] > MARGIN * error and gained[1] >= 0:
        name = "k-means"
        temperature = of_k_means.temperature
        weight, bias = distilled(images, known, (k_means(images, known) / temperature).softmax(1))
        head = Probe(weight, bias, DISTILLED, answers[name][0] / temperature)
        outputs = others @ weight.T + bias
    else:
        name = "probe"
        gained = 0.0, 0.0
        head = plain
        outputs = (others @ plain.weight.T + plain.bias) / of_probe.temperature
    return Start(head, name, outputs.softmax(1), *gained, foreign(images, len(labels), views, clusters))


def last_head(images: Images, known: Labelled) -> Probe:
    """The head for features that images without labels have trained: what k-means answers, distilled."""
    # Training draws the images of a class together, so that at its end clusters tell more than the head that trained.
    # Nothing can be held out, for all labels have trained.
    return Probe(*distilled(images, known, k_means(images, known).softmax(1)), DISTILLED)


def held_out_answers(images: Images, known: Labelled, plain: Probe, views: int, clusters) -> dict[str, Tensor]:
    """What probe and k-means answer for labelled images whose labels they do not know: (TURNS, n, K) each, or NaN."""
    classes = known.targets[: len(known.places) // views].argmax(1).numpy()
    how = (plain.scaling, plain.strength, probe.softmax_loss)
    found = {name: torch.full((TURNS, *known.targets.shape), torch.nan) for name in ("probe", "k-means")}
    for turn in range(TURNS):
        for rest, part in probe.parts(probe.class_folds(classes, clusters, turn), views, classes):
            some = Labelled(known.places[rest], known.targets[rest], known.counts[rest])
            weight, bias = probe.fitted_at(images.rows[rest], some.targets, some.counts, *how)
            found["probe"][turn, part] = images.rows[part] @ weight.T + bias
            found["k-means"][turn, part] = k_means(images, some)[part]
    return found


def judge(logits: Tensor, labels: Tensor, views: int) -> Judged:
    """Answers (TURNS, views * N, K) for labels (views * N,): means over turns and views of what is answered."""
    is_known = logits.isfinite().all(2)
    labels = labels.expand(len(logits), -1)
    targets = labels[is_known]
    temperature = measures.fit_temperature(logits[is_known], lambda logits: F.cross_entropy(logits, targets))
    losses = F.cross_entropy((logits / temperature).transpose(1, 2), labels, reduction="none")
    hits = torch.where(is_known, (logits.argmax(2) == labels).float(), torch.nan)
    by_image = [of.unflatten(1, (views, -1)).flatten(0, 1).nanmean(0) for of in (losses, hits)]
    return Judged(temperature, *by_image)


def distilled(images: Images, known: Labelled, answers: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a linear head that learns the labels, and answers (R, K) for the other images."""
    soft = answers[len(known.places) :].double()
    sure = (1 - torch.special.entr(soft).sum(1, keepdim=True) / math.log(soft.shape[1])).clamp_min(1e-9)
    counts = torch.cat([known.counts, sure * (OTHERS * known.counts.sum() / sure.sum())])
    targets = torch.cat([known.targets, soft])
    return probe.fitted_at(images.rows, targets, counts, "deviation", DISTILLED, probe.softmax_loss)


def foreign(images: Images, labelled: int, views: int = 1, clusters: Tensor | None = None) -> Tensor:
    """Which images without labels, (M,), are less like any labelled one than 9 in 10 of these are like another.

    How alike two are is the cosine of their features, each divided by its deviation. The `labelled` rows come first, in
    so many views. One of its own cluster (N,), such as a patient's, is no other.
    """
    standard = F.normalize(probe.SCALINGS["deviation"](images.rows).rows, dim=1)
    own = standard[: labelled // views]  # (N, D), as they are
    if clusters is None:
        clusters = torch.arange(len(own))
    clusters = clusters.cpu()
    alike = (own @ own.T).masked_fill(clusters[:, None] == clusters, -1)
    return (standard[labelled:] @ own.T).amax(1) < alike.amax(1).quantile(0.1)


def k_means(images: Images, known: Labelled) -> Tensor:
    """Soft spherical k-means from the means of the labelled images of each class."""
    X = images.whitened
    of_classes = (known.targets * known.counts).float()  # (n, K)
    means = of_classes.T @ X[known.places]  # (K, DIRECTIONS), but for a factor
    centres = F.normalize(means, dim=1)
    shares = torch.full((len(means),), 1 / len(means))
    for _ in range(ROUNDS):
        logits = SHARPNESS * X @ centres.T + 0.5 * shares.log()
        answers = logits.softmax(1)
        shares = (answers.sum(0) + of_classes.sum(0)) / (len(answers) + of_classes.sum())
        centres = F.normalize(means + answers.T @ X, dim=1)
    return logits
