"""Measures of features without labels, of scores for labels and of numbers; and their confidence intervals."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Names in the metrics, and titles. The first is `toolkit.answers.evaluation.knn_accuracy`, which needs labels.
TITLES = {"knn_accuracy": "k-NN", "alignment": "alignment", "uniformity": "uniformity"}
TITLES |= {"effective_rank": "effective rank"}


def wilson_interval(hits: float, images: int, level: float = 0.95) -> tuple[float, float]:
    """The 95% interval of the true accuracy (0 to 1), if `hits` of `images` answers are right.

    Wilson's score interval (JASA 22, 1927), which is good for few images too, and for all or none right.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, unsure = hits / images, z * z / images
    middle = (share + unsure / 2) / (1 + unsure)
    half = (unsure * (share * (1 - share) + unsure / 4)) ** 0.5 / (1 + unsure)
    low, high = middle - half, middle + half
    return (low if hits > 0 else 0.0), (high if hits < images else 1.0)  # exactly, whatever is rounded above


def share_interval(right: Tensor, clusters: Tensor | None = None) -> tuple[float, float]:
    """`wilson_interval` of answers (N,) that are right or wrong, where images of one cluster may be alike.

    It is that of as many independent images as would have the same variance, at most N, and wider where there are few
    clusters (as Korn and Graubard, Survey Methodology 24, 1998, do for Clopper and Pearson's).

    Args:
        clusters: (N,), the number of each image's cluster, such as a patient; None: each image is for itself.
    """
    hits, images = right.double().sum().item(), len(right)
    if clusters is None:
        return wilson_interval(hits, images)
    from scipy.stats import t

    share, number = hits / images, _number(clusters)
    if number < 2:
        return 0.0, 1.0
    sums = torch.zeros(number, dtype=torch.float64).index_add_(0, clusters, right.double() - share)
    variance = number / (number - 1) * sums.square().sum().item() / images**2
    effective = share * (1 - share) / variance if variance > 0 else number
    effective = min(images, effective) * (NormalDist().inv_cdf(0.975) / t.ppf(0.975, number - 1)) ** 2
    return wilson_interval(share * effective, effective)


def alignment(first: Tensor, second: Tensor) -> float:
    """The mean squared distance on the unit sphere of two views' features (N, D), image by image: 0 to 4.

    2005.10242, equation of L_align with alpha = 2. Small is good, unless the uniformity is near 0.
    """
    return (_on_sphere(first) - _on_sphere(second)).square().sum(1).mean().item()


def uniformity(features: Tensor) -> float:
    """The logarithm of the mean Gaussian potential exp(-t d^2) over all pairs of features (N, D), N > 1: -8 to 0.

    2005.10242, equation of L_uniform with t = 2. The lower, the more evenly the images lie on the
    unit sphere; 0: on one point.
    """
    return F.pdist(_on_sphere(features)).square().mul(-2).exp().mean().log().item()


def effective_rank(features: Tensor) -> float:
    """How many directions the features (N, D) fill: the exponential of the entropy of their shares; 1 to min(N, D).

    The shares are the singular values of the centred features over their sum (Roy and Vetterli, "The effective rank",
    EUSIPCO 2007). Features that have collapsed to a point or a line have about 1.
    """
    values = torch.linalg.svdvals(features.double() - features.double().mean(0))
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item() if values.sum() > 0 else 1.0


def _on_sphere(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# Several labels an image. `positive` is 1 where an image has the label and 0 where not; each function takes one label.
# `weights`, (N,) or (draws, N), say how often each image counts: a row for each draw of a bootstrap.


OWN_SHARE = 0.5


def average_precision(scores: Tensor, positive: Tensor, weights: Tensor | None = None, own: float = 1.0) -> Tensor:
    """The mean precision over the positives, ranked by scores (N,): scikit-learn's `average_precision_score`.

    Images of equal scores are ranked together. NaN without a positive.

    Args:
        own: how much a positive counts among the right answers at its own rank. That it counts at all flatters a label
            with few positives: by OWN_SHARE, which is for `intervals`, about half as much.
    """
    less = 1 - own
    order, ends = _ranked(scores, descending=True)
    counts = _counts(weights, positive)[..., order]
    hits = (counts * positive[order]).cumsum(-1)[..., ends]
    answers = counts.cumsum(-1)[..., ends]
    found = hits.diff(dim=-1, prepend=torch.zeros_like(hits[..., :1]))
    return (found * (hits - less) / (answers.clamp_min(1) - less)).sum(-1) / hits[..., -1]


def auroc(scores: Tensor, positive: Tensor, weights: Tensor | None = None) -> Tensor:
    """The area under the ROC curve: how often a positive scores higher than a negative, ties counting half.

    NaN where all images are alike.
    """
    order, ends = _ranked(scores)
    counts = _counts(weights, positive)[..., order]
    hits = (counts * positive[order]).cumsum(-1)[..., ends]
    misses = counts.cumsum(-1)[..., ends] - hits
    found, tied = (sums.diff(dim=-1, prepend=torch.zeros_like(sums[..., :1])) for sums in (hits, misses))
    return (found * (misses - tied / 2)).sum(-1) / (hits[..., -1] * misses[..., -1])


def f1(answers: Tensor, positive: Tensor, weights: Tensor | None = None) -> Tensor:
    """The harmonic mean of precision and recall of answers (N,), 0 or 1. It is 0 without any true positive."""
    counts = _counts(weights, positive)
    answers = answers.double()
    both = counts @ (answers + positive)
    return 2 * (counts @ (answers * positive)) / both.clamp_min(1)


def best_threshold(scores: Tensor, positive: Tensor) -> float:
    """The threshold with the highest F1 of scores (N,), 0 to 1, halfway between two neighbouring scores.

    0.5 without a positive. Of equally good ones the highest.
    """
    if not positive.any():
        return 0.5
    order, ends = _ranked(scores, descending=True)
    hits, ranked = positive[order].double().cumsum(0)[ends], scores[order][ends].double()
    quality = 2 * hits / (ends + 1 + positive.sum())
    below = torch.cat([ranked[1:], ranked.new_zeros(1)])
    best = int(quality.argmax())
    return ((ranked + below) / 2)[best].item()


def _ranked(scores: Tensor, descending: bool = False) -> tuple[Tensor, Tensor]:
    """The order of the scores, and the places in it where a run of equal ones ends."""
    order = scores.argsort(descending=descending, stable=True)
    ranked = scores[order]
    last = torch.ones_like(ranked, dtype=torch.bool)
    last[:-1] = ranked[1:] != ranked[:-1]
    return order, last.nonzero().flatten()


def _counts(weights: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones(len(like), dtype=torch.float64) if weights is None else weights.double()


# ----------------------------------------------------------------------------------------------------------------------
# Numbers. Answers and truth are (N,); weights as above.


def mean_absolute_error(answers: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
    return _weighted_mean((answers.double() - truth).abs(), _counts(weights, truth))


def root_mean_squared_error(answers: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
    return _weighted_mean((answers.double() - truth).square(), _counts(weights, truth)).sqrt()


def r2(answers: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
    """The share of the variance that the answers explain: 1 at best, 0 for the mean, below for worse answers.

    NaN where the truth is one number.
    """
    counts, truth = _counts(weights, truth), truth.double()
    left = _weighted_mean((answers.double() - truth).square(), counts)
    variance = _weighted_mean(truth.square(), counts) - _weighted_mean(truth, counts).square()
    scale = truth.square().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(variance > 1e-12 * scale, 1 - left / variance, torch.nan)


def spearman(answers: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
    """The correlation of the ranks, -1 to 1; equal numbers share their mean rank. NaN where all are equal."""
    counts = _counts(weights, truth)
    first, second = _mean_ranks(answers, counts), _mean_ranks(truth, counts)
    first = first - _weighted_mean(first, counts)[..., None]
    second = second - _weighted_mean(second, counts)[..., None]
    products = (_weighted_mean(a * b, counts) for a, b in ((first, second), (first, first), (second, second)))
    together, one, other = products
    return together / (one * other).sqrt()


def _mean_ranks(values: Tensor, counts: Tensor) -> Tensor:
    """Each image's rank, weighted by `counts`; equal values share their mean rank."""
    order, ends = _ranked(values)
    until = counts[..., order].cumsum(-1)[..., ends]
    of_run = until.diff(dim=-1, prepend=torch.zeros_like(until[..., :1]))
    run = torch.searchsorted(ends, torch.arange(len(values)))
    ranks = torch.empty(counts.shape, dtype=torch.float64)
    ranks[..., order] = (until - of_run / 2)[..., run]
    return ranks


def _weighted_mean(values: Tensor, counts: Tensor) -> Tensor:
    return (values * counts).sum(-1) / counts.sum(-1)


# ----------------------------------------------------------------------------------------------------------------------
# How far chance reaches

DRAWS = 1_000
NUMBERS_AT_ONCE = 2_000_000  # weights of a bootstrap that are in memory at a time


def bootstrap(
    measure: Callable[[Tensor], Tensor],
    images: int,
    draws: int = DRAWS,
    seed: int = 0,
    labels: int = 1,
    clusters: Tensor | None = None,
) -> Tensor:
    """A measure's values for sets of as many images drawn anew from these, (draws, ...): Efron, Ann. Stat. 7, 1979.

    Args:
        measure: takes weights (n, images), how often each image was drawn, and returns (n, ...).
        labels: how many numbers the measure looks at for each image; it says how many draws are made at once.
        clusters: as for `share_interval`: the images of one cluster are drawn together.
    """
    random, parts = np.random.RandomState(seed), []
    things = images if clusters is None else _number(clusters)
    at_once = max(1, NUMBERS_AT_ONCE // (images * labels))
    for start in range(0, draws, at_once):
        drawn = random.multinomial(things, np.full(things, 1 / things), size=min(at_once, draws - start))
        weights = torch.from_numpy(drawn)
        parts.append(measure(weights if clusters is None else weights[:, clusters]))
    return torch.cat(parts)


def percentile_interval(drawn: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The range of the middle 95% of a bootstrap's draws (draws,); NaN if none is a number."""
    drawn = drawn[drawn.isfinite()].double()
    if not len(drawn):
        return math.nan, math.nan
    low, high = drawn.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def draws_level(clusters: Tensor | None) -> float:
    """The level of a percentile interval that covers 95%: more for draws of few clusters, whose spread is too small.

    (The expanded percentile interval of Hesterberg, The American Statistician 69, 2015.)
    """
    if clusters is None:
        return 0.95
    from scipy.stats import t

    number = _number(clusters)
    return 1 - 2 * NormalDist().cdf(t.ppf(0.025, number - 1) * (number / (number - 1)) ** 0.5)


def draws_chance(share: float, clusters: Tensor | None) -> float:
    """How likely chance alone is beyond a value, 0 to 0.5, beyond which so many draws are: more, if of few clusters."""
    if clusters is None:
        return share
    from scipy.stats import t

    number = _number(clusters)
    return float(t.cdf(NormalDist().inv_cdf(share) * ((number - 1) / number) ** 0.5, number - 1))


def _number(clusters: Tensor) -> int:
    return int(clusters.max()) + 1


PARTS = 50  # of the images, of which each is left out once
SHARE, BELOW_1, POSITIVE, CORRELATION = (0.0, 1.0), (-math.inf, 1.0), (0.0, math.inf), (-1.0, 1.0)  # what can be


def intervals(
    measure: Callable[[Tensor], Tensor],
    images: int,
    clusters: Tensor | None = None,
    bounds: Sequence[tuple[float, float]] | None = None,
    steady: Callable[[Tensor], Tensor] | None = None,
) -> list[tuple[float, float]]:
    """95% intervals of a measure's columns by what changes when parts of the images are left out.

    This is the delete-a-group jackknife (Kott, Journal of Official Statistics 17, 2001), on a scale without ends such
    as the logit of a share. It moves the middle where a measure flatters (Quenouille, Biometrika 43, 1956): a mean of
    average precisions does, over labels with few positives.

    Args:
        measure: takes weights (n, images), each 0 or 1, and returns (n, columns).
        clusters: as for `share_interval`: the images of one cluster are left out together.
        bounds: the lowest and the highest value of each column, never reached; None: 0 and 1.
        steady: the same measure, but what leaves a mean, as a label whose only positive is left out, stays in it here.
            By this the middle is moved: which labels are in a mean is chance, no bias. None: nothing leaves.

    Returns:
        (low, high) of each column. NaN where nothing changes, as where all answers are right, or where a part has all
        that is measured.
    """
    from scipy.stats import t

    here = measure(torch.ones(1, images))[0].double()
    things = images if clusters is None else _number(clusters)
    parts = min(PARTS, things)
    if parts < 2:
        return [(math.nan, math.nan)] * len(here)
    part = torch.randperm(things, generator=torch.Generator().manual_seed(0)) % parts
    part = part if clusters is None else part[clusters]
    weights = (part != torch.arange(parts)[:, None]).split(max(1, NUMBERS_AT_ONCE // (10 * images)))
    without = torch.cat([measure(some.double()) for some in weights]).double()
    moved = without if steady is None else torch.cat([steady(some.double()) for some in weights]).double()
    middle = parts * here - (parts - 1) * moved.mean(0)
    error = without.std(0, correction=0) * (parts - 1) ** 0.5
    half = error * t.ppf(0.975, parts - 1)
    columns = zip(here.tolist(), middle.tolist(), half.tolist(), bounds or [SHARE] * len(here), strict=True)
    return [_between(*column) for column in columns]


def _between(value: float, middle: float, half: float, bounds: tuple[float, float]) -> tuple[float, float]:
    """The interval of so much on both sides of the middle, on a scale on which the bounds are infinitely far away."""
    low, high = bounds
    if not half > 1e-12 or not low < value < high:
        return math.nan, math.nan
    middle = min(max(middle, (value + low) / 2), (value + high) / 2)  # a correction ends half way to a bound
    below, above = middle - low, high - middle
    factor = math.exp(min(half / below + half / above, 500.0))  # of the odds below / above
    if math.isinf(above):
        return low + below / factor, low + below * factor
    if math.isinf(below):
        return high - above * factor, high - above / factor
    ends = [odds / (1 + odds) for odds in (below / above / factor, below / above * factor)]
    return low + (high - low) * ends[0], low + (high - low) * ends[1]


def paired_difference(
    first: Callable[[Tensor], Tensor],
    second: Callable[[Tensor], Tensor],
    images: int,
    labels: int = 1,
    seed: int = 0,
    clusters: Tensor | None = None,
) -> tuple[float, float, float, float]:
    """How much better the second of two runs is over the same images: (difference, low, high, p).

    Both are measured on the same draws of a bootstrap, so what makes a draw easy for both does not blur the difference.
    The interval is of 95%, or NaN if all images are in one cluster; p is twice the share of draws in which the order is
    not that of the difference, at most 1, and never less than one draw can tell.

    Args:
        first, second: measures as `bootstrap` takes them, that return (n,).
        clusters: as for `bootstrap`.
    """

    def difference(weights: Tensor) -> Tensor:
        return second(weights) - first(weights)

    measured = difference(torch.ones(1, images)).item()
    if clusters is not None and _number(clusters) < 2:
        return measured, math.nan, math.nan, 1.0
    drawn = bootstrap(difference, images, labels=labels, seed=seed, clusters=clusters)
    drawn = drawn[drawn.isfinite()]
    sides = min((drawn <= 0).sum().item(), (drawn >= 0).sum().item())
    p = 2 * draws_chance(min(0.5, (sides + 1) / (len(drawn) + 1)), clusters)
    return measured, *percentile_interval(drawn, draws_level(clusters)), p


def mcnemar(first: Tensor, second: Tensor, clusters: Tensor | None = None) -> float:
    """The two-sided p of two runs whose answers (N,) are right or wrong: how likely equally good ones differ as much.

    Only images that one of the two gets right tell: each is as likely for either (Psychometrika 12, 1947; exact).
    With clusters, as for `share_interval`, what one of the two gains in a cluster is as likely for either (Fisher's
    permutation test of paired differences, The Design of Experiments, 1935; exact).
    """
    if clusters is not None:
        gains = second.double() - first.double()
        return _sign_flips(torch.zeros(_number(clusters), dtype=torch.float64).index_add_(0, clusters, gains))
    wins, losses = int((second & ~first).sum()), int((first & ~second).sum())
    number, fewer = wins + losses, min(wins, losses)
    of_all = math.lgamma(number + 1) - number * math.log(2)
    chances = (of_all - math.lgamma(k + 1) - math.lgamma(number - k + 1) for k in range(fewer + 1))
    return min(1.0, 2 * sum(map(math.exp, chances)))


def _sign_flips(gains: Tensor) -> float:
    """How often the sum of whole numbers is as far from 0 as this if each had its sign by chance."""
    sizes = gains.abs().long()
    chances = np.zeros(int(sizes.sum()) + 1)  # of each sum of those that are positive
    chances[0] = 1.0
    for size in sizes[sizes > 0].tolist():
        chances[size:] = (chances[size:] + chances[:-size]) / 2
        chances[:size] /= 2
    sums = 2 * np.arange(len(chances)) - len(chances) + 1
    return min(1.0, float(chances[np.abs(sums) >= abs(gains.sum().item())].sum()))


# ----------------------------------------------------------------------------------------------------------------------
# Calibration

BINS = 15


def calibration(confidences: Tensor, right: Tensor, bins: int = BINS) -> Tensor:
    """Mean confidence, share of right answers and images in each of some bins of confidences (N,), 0 to 1: (bins, 3).

    Empty bins have zeros. (Guo et al., arXiv 1706.04599, section 2.)
    """
    place = (confidences.double() * bins).ceil().long().sub(1).clamp(0, bins - 1)  # (0, 1/bins], ...
    sums = torch.zeros(bins, 3, dtype=torch.float64)
    sums.index_add_(0, place, torch.stack([confidences.double(), right.double(), torch.ones(len(right))], 1).double())
    sums[:, :2] /= sums[:, 2:].clamp_min(1)
    return sums


def calibration_error(bins: Tensor) -> float:
    """The expected calibration error of what `calibration` gives: the mean distance of confidence and share right."""
    confidence, share, images = bins.T
    return ((confidence - share).abs() * images / images.sum()).sum().item()


def fit_temperature(logits: Tensor, loss: Callable[[Tensor], Tensor]) -> float:
    """The temperature by which logits are divided for the smallest loss (arXiv 1706.04599, section 4.2).

    It is sought between 1/100 and 100 of their standard deviation; 1 for logits that are all the same.

    Args:
        logits: of images that did not train what gives them.
        loss: of logits, such as the cross-entropy with their labels.
    """
    from scipy.optimize import minimize_scalar

    logits = logits.double()  # rounding of the loss would blur its smallest value
    spread = logits.std().item()
    if not spread > 0:
        return 1.0
    bounds = (math.log(spread / 100), math.log(spread * 100))
    found = minimize_scalar(lambda log: loss(logits / math.exp(log)).item(), bounds=bounds, method="bounded")
    return math.exp(found.x)
