"""Measures of features without labels, of scores for labels and of numbers; and their confidence intervals."""

import math
import warnings
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Names in the metrics, and titles. The first is `toolkit.answers.evaluation.knn_accuracy`, which needs labels.
TITLES = {"knn_accuracy": "k-NN", "effective_rank": "effective rank"}
Interval = tuple[float, float]
NO_INTERVAL = (math.nan, math.nan)
NORMAL = NormalDist().inv_cdf(0.975)  # standard errors on each side of a 95% interval


def share_interval(right: Tensor, clusters: Tensor | None = None) -> Interval:
    """The 95% interval of the true accuracy (0 to 1), from answers (N,) that are right or wrong.

    With `clusters`, (N,) the number of an image's cluster, such as a patient, it is that interval of independent images
    with the same variance, and wider where clusters are few (Korn and Graubard, Survey Methodology 24, 1998).
    """
    images = len(right)
    if not images:
        return NO_INTERVAL
    share = right.double().sum().item() / images
    effective = images
    if clusters is not None:
        from scipy.special import stdtrit

        sums = clusters.bincount(right.double() - share)
        number = len(sums)
        if number < 2:
            return 0.0, 1.0
        variance = number / (number - 1) * sums.square().sum().item() / images**2
        effective = share * (1 - share) / variance if variance > 0 else number
        effective = min(images, effective) * (NORMAL / stdtrit(number - 1, 0.975)) ** 2
    return mean_interval(torch.tensor([share], dtype=torch.float64), effective)


def mean_interval(shares: Tensor, images: Tensor | float) -> Interval:
    """The 95% interval of the mean of independent shares (K,), of this many images each: for few, and all right too."""
    # Each share has Wilson's (JASA 22, 1927), of which Zou and Donner make the mean's (Statistics in Medicine 27, 2008)
    unsure = NORMAL**2 / images
    middle = (shares + unsure / 2) / (1 + unsure)
    half = (unsure * (shares * (1 - shares) + unsure / 4)).sqrt() / (1 + unsure)
    # Exact at the ends, whatever is rounded
    below = (shares - middle + half).where(shares > 0, 0.0).norm().item() / len(shares)
    above = (middle + half - shares).where(shares < 1, 0.0).norm().item() / len(shares)
    return shares.mean().item() - below, shares.mean().item() + above


def effective_rank(features: Tensor) -> float:
    """How many directions features (N, D) fill, 1 to min(N, D): "effective rank" (Roy and Vetterli, EUSIPCO 2007)."""
    values = torch.linalg.svdvals(features.double() - features.double().mean(0))
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)  # of features that are all alike: zeros
    return torch.special.entr(shares).sum().exp().item()


# `weights`, (n, images), say in whole numbers how often each image counts: a row for each set of images.
# Several labels an image: `positive` is 1 where an image has the label and 0 where not.

NUMBERS_AT_ONCE = 1_000_000  # of an intermediate result of a measure: 4 to 8 MB, which a cache may hold


def by_rows(measure: Callable[[Tensor], Tensor], weights: Tensor, numbers: int) -> Tensor:
    """`measure(weights)` of weights (n, images), for some rows at a time: each needs this many numbers in between."""
    rows = max(1, NUMBERS_AT_ONCE // max(1, numbers))
    return torch.cat(list(map(measure, weights.split(rows))))


def ranking(scores: Tensor, positive: Tensor, images: Tensor, weights: Tensor) -> Tensor:
    """AP and AUROC of answers (M,) by score, (n, 2); the answers are on `images` (M,), which have the weights.

    AP is scikit-learn's `average_precision_score`, NaN without a positive. AUROC is how often a positive scores
    higher than a negative, ties counting half: NaN where all are alike.
    """
    order = scores.argsort(descending=True)
    images = images[order]
    positives = positive[order].nonzero().flatten()
    ends = F.pad(scores[order].unique_consecutive(return_counts=True)[1].cumsum(0), (1, 0))  # of ranks, of equal scores
    rank = torch.searchsorted(ends, positives, right=True)
    above = ends[rank - 1]  # how many answers are above each positive's rank,
    until = ends[rank]  # how many down to it,
    positives_until = torch.searchsorted(positives, until)  # and of the positives

    def figures(weights: Tensor) -> Tensor:
        each = weights[:, images]
        counts = each[:, positives].double()  # (n, P)
        answers = F.pad(each.cumsum(1, dtype=torch.int32), (1, 0))  # (n, 1 + M): how many are in front
        hits = F.pad(counts.cumsum(1), (1, 0))  # (n, 1 + P): and of the positives
        all_answers = answers[:, -1:]
        all_hits = hits[:, -1:]
        down_to = answers[:, until].double()
        precision = hits[:, positives_until] / down_to.clamp_min(1)
        below = all_answers - (answers[:, above] + down_to) / 2 - all_hits / 2  # half of equal scores and positives
        sums = torch.stack([(counts * precision).sum(1), (counts * below).sum(1)], 1)
        return sums / torch.cat([all_hits, all_hits * (all_answers - all_hits)], 1)

    return by_rows(figures, weights, len(images))


def threshold_for(scores: Tensor, positive: Tensor, goal: str) -> float:
    """The threshold of scores (N,), 0 to 1, that reaches a goal: "f1", "sensitivity=0.95" or "specificity=0.9".

    It is the one with the highest F1; or the highest with this share of the positives above it, or the lowest with this
    share of the negatives below. Halfway between two scores, the higher of equally good ones; NaN without such images.
    """
    kind, _, share = goal.partition("=")
    positive = positive.bool()
    images = int(positive.sum())
    if kind == "specificity":
        images = len(scores) - images
    if not images:
        return math.nan
    levels, level = scores.double().unique(return_inverse=True)
    # For a threshold below each level, and for one above all: how many positives are above it, and negatives below
    rejections = F.pad(level[~positive].bincount(minlength=len(levels)).cumsum(0), (1, 0))
    hits = positive.sum() - F.pad(level[positive].bincount(minlength=len(levels)).cumsum(0), (1, 0))
    if kind == "f1":
        half_f1 = hits / (hits + len(scores) - rejections).double()
        place = len(levels) - int(half_f1.flip(0).argmax())
    else:
        needed = max(1, math.ceil(float(share) * images - 1e-9))  # 7, of 0.28 x 25 too
        place = int((hits >= needed).sum()) - 1 if kind == "sensitivity" else int((rejections < needed).sum())
    edges = F.pad(levels, (1, 1))
    edges[-1] = 1.0
    low, high = edges[place : place + 2]
    middle = ((low + high) / 2).float()  # as thresholds are kept; where it would be the higher score itself, the lower
    return torch.where(middle < high.float(), middle, low).item()


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """The sums of values (N, ...) over the images by weights (n, N): (n, ...)."""
    values = values.double()
    return by_rows(lambda some: some.double() @ values, weights, len(values))


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return weighted_sum(values, weights) / weights.sum(1)


# ------------------------------------------------ numbers: answers and truth are (N,), weights (n, N), the figures (n,)


def mae(answers: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """The mean absolute error."""
    return weighted_mean((answers.double() - truth).abs(), weights)


def rmse(answers: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """The root of the mean squared error."""
    return weighted_mean((answers.double() - truth).square(), weights).sqrt()


def r2(answers: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """The share of the variance that the answers explain: 1 at best, 0 for the mean; NaN if the truth never varies."""
    truth = truth.double()
    centred = truth - truth.mean()  # first, lest the squares of large numbers leave nothing of the differences
    left = weighted_mean((answers.double() - truth).square(), weights)
    variance = weighted_mean(centred.square(), weights) - weighted_mean(centred, weights).square()
    return torch.where(variance > 1e-12 * centred.square().mean(), 1 - left / variance, torch.nan)  # else of rounding


def spearman(answers: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """The correlation of the ranks, -1 to 1; equal numbers share their mean rank. NaN where all are equal."""
    from scipy.stats import spearmanr

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where all are equal
        for times in weights.long():
            found.append(spearmanr(answers.repeat_interleave(times), truth.repeat_interleave(times)).statistic)
    return torch.tensor(found, dtype=torch.float64)


PARTS = 50  # of the images, of which each is left out once
SHARE = (0.0, 1.0)  # bounds of measures
BELOW_1 = (-math.inf, 1.0)
POSITIVE = (0.0, math.inf)
CORRELATION = (-1.0, 1.0)
UNBOUNDED = (-math.inf, math.inf)
WIDEST = 100  # times the distance to the one end of a scale: an interval that reaches farther leaves all open
LEAST_CHANGE = 1e-12  # by its size: a figure that changes less where images are left out changes by rounding alone


class Figure(NamedTuple):
    value: float
    interval: Interval  # of 95%; NaN is no interval
    p: float = 1.0  # two-sided, of a figure that is truly 0; 1 where there is no interval


def jackknife(measure: Callable, clusters: Tensor, bounds: Mapping[str, Interval]) -> dict[str, list[Figure]]:
    """Figures by name with 95% intervals by the delete-a-group jackknife; none where nothing changes.

    The middle is the mean of the pseudo-values (Quenouille, Biometrika 43, 1956), their spread the error (Kott, Journal
    of Official Statistics 17, 2001), on a scale on which the `bounds`, 0 and 1 where none are given, are infinitely
    far away. `measure` takes weights (n, images), each 0 or 1, and returns (n,), or (n, K), for each name. The images
    of a cluster, (images,), see `share_interval`, are left out together.
    """
    from scipy.special import stdtr, stdtrit  # Student's t, without the second that importing scipy.stats takes

    units = int(clusters.max()) + 1
    parts = min(PARTS, units)
    part = (torch.randperm(units, generator=torch.Generator().manual_seed(0)) % parts)[clusters]
    kept = part != torch.arange(-1, parts)[:, None]  # the first row: all images
    freedom = max(1, parts - 1)  # one part alone shows no error
    figures = {}
    for name, found in measure(kept).items():
        values, without = found.double().view(1 + parts, -1).tensor_split([1])
        middles = parts * values[0] - (parts - 1) * without.mean(0)
        errors = without.std(0, correction=0) * (parts - 1) ** 0.5
        varies = errors > LEAST_CHANGE * values[0].abs()
        chances = 2 * stdtr(freedom, -(middles / errors).abs().where(varies, 0.0).numpy())
        halves = errors * stdtrit(freedom, 0.975)
        ends = bounds.get(name, SHARE)
        columns = zip(values[0].tolist(), middles.tolist(), halves.tolist(), chances.tolist(), strict=True)
        figures[name] = [Figure(value, _between(value, middle, half, ends), p) for value, middle, half, p in columns]
    return figures


def _between(value: float, middle: float, half: float, bounds: Interval) -> Interval:
    """The interval of `half` on both sides of the middle, on a scale on which the bounds are infinitely far away."""
    low, high = bounds
    if not half > LEAST_CHANGE * abs(value) or not low < value < high:
        return NO_INTERVAL
    if bounds == UNBOUNDED:
        return middle - half, middle + half
    middle = min(max(middle, (value + low) / 2), (value + high) / 2)  # a correction ends half way to a bound
    below = middle - low
    above = high - middle
    reach = math.exp(min(half / below + half / above, 500.0))  # times the odds: below / above, below, or 1 / above
    if math.isinf(high - low) and reach > WIDEST:
        return bounds
    if math.isinf(high):
        return low + below / reach, low + below * reach
    if math.isinf(low):
        return high - above * reach, high - above / reach
    odds = below / above
    return high - (high - low) / (1 + odds / reach), high - (high - low) / (1 + odds * reach)


def mcnemar(first: Tensor, second: Tensor, clusters: Tensor) -> float:
    """The two-sided p of two runs whose answers (N,) are right or wrong: how likely equally good ones differ as much.

    Each image that one of the two gets right is as likely for either (Psychometrika 12, 1947; exact); in clusters, as
    for `share_interval`, what one gains in a cluster (Fisher's permutation test of paired differences, 1935; exact).
    """
    gains = clusters.bincount(second.double() - first.double()).long()
    sizes = gains.abs()
    chances = np.zeros(int(sizes.sum()) + 1)  # of each sum of those that are positive, where signs are by chance
    chances[0] = 1.0
    for size in sizes[sizes > 0].tolist():
        chances[size:] = (chances[size:] + chances[:-size]) / 2
        chances[:size] /= 2
    sums = 2 * np.arange(len(chances)) - len(chances) + 1
    return min(1.0, float(chances[np.abs(sums) >= abs(gains.sum().item())].sum()))


BINS = 15


def calibration(confidences: Tensor, right: Tensor, counts: Tensor | None = None) -> Tensor:
    """Sums over the `counts` of N: confidences, right answers and images, by bins: (BINS, 3) (arXiv 1706.04599)."""
    place = (confidences.double() * BINS).ceil().long().sub(1).clamp(0, BINS - 1)  # (0, 1/BINS], ...
    counted = torch.stack([confidences.double(), right.double(), torch.ones_like(right, dtype=torch.float64)], 1)
    if counts is not None:
        counted *= counts[:, None]
    return counted.new_zeros(BINS, 3).index_add_(0, place, counted)


def calibration_error(bins: Tensor) -> float:
    """The expected calibration error of what `calibration` gives: the mean distance of confidence and share right."""
    images = bins[:, 2]
    confidence, share = (bins[:, :2].T / images.clamp_min(1)).unbind()
    return ((confidence - share).abs() * images / images.sum()).sum().item()


def calibration_error_by_chance(bins: Tensor) -> float:
    """What `calibration_error` stays below in 19 of 20 samples like this one, were its probabilities exact."""
    images = bins[:, 2]
    share = bins[:, 0] / images.clamp_min(1)
    deviation = (images * share * (1 - share)).sqrt()
    mean = math.sqrt(2 / math.pi) * deviation.sum()  # of the distances, which are half-normal
    spread = ((1 - 2 / math.pi) * deviation.square().sum()).sqrt()
    return ((mean + 1.645 * spread) / images.sum()).item()


def spread(logits: Tensor) -> float:
    """How far logits (N, K) are from the mean of their row, as root mean square: a temperature divides it."""
    return logits.var(1, correction=0).mean().sqrt().item()


def fit_temperature(logits: Tensor, loss: Callable[[Tensor], Tensor]) -> float:
    """What divides logits for the smallest loss (arXiv 1706.04599, section 4.2); 1 if none differs."""
    from scipy.optimize import minimize_scalar

    logits = logits.double()  # rounding of the loss would blur its smallest value
    spread = logits.std().item() if logits.numel() else 0.0
    if not spread > 0:
        return 1.0
    bounds = (math.log(spread / 100), math.log(spread * 100))
    found = minimize_scalar(lambda log: loss(logits / math.exp(log)).item(), bounds=bounds, method="bounded")
    return math.exp(found.x)
