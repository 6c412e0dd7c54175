"""Start a classifier head as a linear probe: a regularised logistic regression on the frozen backbone's features.

A random head's gradients would distort features before the head has learnt anything (Kumar et al., arXiv 2202.10054).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

from toolkit import distributed
from toolkit.images.splitting import folds, strata
from toolkit.models.backbones import head_name

# Of scikit-learn's C, from strong regularisation to weak. By stronger ones a weak backbone's few images get chance.
STRENGTHS = 10.0 ** np.arange(-3, 1.5, 0.5)
RIDGES = 10.0 ** torch.arange(-2, 7, dtype=torch.float64)  # penalties
FOLDS = 3
STEPS = 200  # of a fit, at the most
ROUGH_STEPS = 12  # of one that compares strengths, each of which goes on from the last one
TEMPERATURES = (2 ** np.arange(0, 4.5, 0.5)).tolist()  # 1 to 16
# Measured, see benchmarks/RESULTS.md: how far weights that move by the learning rate in each of DRIFT_STEPS steps may
# change logits of standard deviation 1. A shorter run needs the same: where the probe is sure of its training images
# there is nothing but noise in their gradient, and Adam makes full steps of that.
LOGIT_DRIFT = 0.3
DRIFT_STEPS = 500


class Probe(NamedTuple):
    """A head that was fitted to features: for classes, for several labels, or for numbers."""

    weight: Tensor  # (K, D)
    bias: Tensor  # (K,)
    strength: float  # of the regularisation, chosen by cross-validation
    # (views * N, K): what probes fitted to the other parts answer for each part; NaN where these lack the image's class
    held_out: Tensor | None = None
    scaling: str = "deviation"  # of SCALINGS
    loss: float = np.inf  # mean, in cross-validation, where there was one


class HeadTemperature(NamedTuple):
    """The temperature by which a head's logits are divided before training, so that it keeps what the probe knows."""

    least: float = 1.0  # at any rate
    per_rate: float = 0.0  # 0 if the features do not train
    # The temperature that fits images which the probe has not seen, over that of training images; None: not known.
    optimism: float | None = None
    # Of the probe's logits for training images laid one over another, as `measures.spread`; None: not known.
    spread: float | None = None

    def at(self, rate: float) -> float:
        """The temperature for adapters that train at a learning rate."""
        return max(self.least, self.per_rate * rate)


@torch.no_grad()
def set_head(model: nn.Module, probe: Probe) -> Probe:
    """Set the head of `model`, a linear layer, to a probe, which is returned."""
    head = linear_head(model)
    head.weight.copy_(probe.weight)
    head.bias.copy_(probe.bias)
    distributed.broadcast([head.weight, head.bias])  # on other machines the last bits may differ
    return probe


def choose_temperature(
    model: nn.Module, features: Tensor, loss: Callable[[Tensor], Tensor], features_train: bool, towards: Tensor | float
) -> HeadTemperature:
    """The temperature for the head of `model`, which is the probe, by the loss of logits (N, K) for features (N, D)."""
    # On augmented training images (arXiv 1706.04599): training is not to begin by taking back the probe's confidence.
    logits = head_outputs(model, features) - towards
    least = min(TEMPERATURES, key=lambda t: loss(logits / t + towards).item())
    # Adam moves each weight by about the rate in a step: the larger the weights, the more that does to the loss.
    # Logits are divided as far as they are from `towards`.
    per_rate = DRIFT_STEPS * logits.std().item() / LOGIT_DRIFT if features_train else 0.0
    return HeadTemperature(least, per_rate)


def linear_head(model: nn.Module) -> nn.Linear:
    [head] = (m for m in model.get_submodule(head_name(model)).modules() if isinstance(m, nn.Linear))
    return head


@torch.no_grad()
def head_outputs(model: nn.Module, features: Tensor) -> Tensor:
    """The outputs (N, K) of the head of `model` for features (N, D)."""
    return linear_head(model)(features)


class Scaled(NamedTuple):
    """Features as they are fitted, and the scaling of a linear head: (x - mean) / scale."""

    rows: Tensor  # (N, D)
    mean: Tensor  # (D,)
    scale: Tensor  # (D,), or one number
    intercept: bool  # is fitted, too


def _standardised(X: Tensor) -> Scaled:
    mean = X.mean(0)
    scale = X.std(0, correction=0)
    scale[scale <= 1e-6 * mean.abs()] = 1.0  # constant but for rounding, or 0
    return Scaled((X - mean) / scale, mean, scale, True)


def _of_one_length(X: Tensor) -> Scaled:
    """Centred features, each divided by its norm: a few images say little of the deviation of a thousand features."""
    mean = X.mean(0)
    length = X.shape[1] ** 0.5
    norms = (X - mean).norm(dim=1, keepdim=True).clamp_min(1e-6 * mean.norm() + 1e-30)  # not of rounding
    # A linear head divides by the mean of the norms, which without an intercept never changes an answer.
    return Scaled((X - mean) * (length / norms), mean, norms.mean() / length, False)


SCALINGS = {"deviation": _standardised, "length": _of_one_length}


# Both losses: of logits and targets, (N, K) each, and of how much each counts, (N, 1 or K); summed.
sigmoid_loss = functools.partial(F.binary_cross_entropy_with_logits, reduction="sum")


def softmax_loss(logits: Tensor, Y: Tensor, counts: Tensor) -> Tensor:
    return (counts[:, 0] * F.cross_entropy(logits, Y, reduction="none")).sum()


def fit_linear_probe(
    features: Tensor, labels: Tensor, num_classes: int, views=1, class_weights=None, clusters: Tensor | None = None
) -> Probe:
    """A multinomial logistic regression on scaled features; its strength is scikit-learn's C.

    Args:
        features: (views * N, D): N images as they are, and behind them the same images once for each augmented view.
        labels: (views * N,), from 0 to K - 1.
        class_weights: (K,), how much an image of each class counts; None: all alike.
        clusters: (N,), the number of each image's cluster, such as a patient, which is held out as one, as views are.

    The scaling and C have the smallest cross-validated log loss. Where there is nothing to validate on, as with a
    single image of a class, C is 1, and features without negative numbers, as ReLU gives them, are of one length.
    """
    y = labels.cpu()
    classes = y[: len(y) // views].numpy()
    held_out = parts(class_folds(classes, clusters), views, classes)
    return _fitted(features, *one_hot(y, num_classes, views, class_weights), held_out, softmax_loss)


def one_hot(labels: Tensor, num_classes: int, views: int, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Targets (views * N, K) of labels (views * N,), and how much each row counts, (views * N, 1)."""
    counts = shares_of_views(len(labels), views)
    if class_weights is not None:
        counts[:, 0] *= class_weights.cpu()[labels]
    return F.one_hot(labels, num_classes).double(), counts


def shares_of_views(rows: int, views: int) -> Tensor:
    """How much each row counts, (views * N, 1): an image as it is 1, and its augmented views, behind all images, 1."""
    counts = torch.ones(rows, 1, dtype=torch.float64)
    counts[rows // views :] /= max(1, views - 1)
    return counts


def class_folds(classes: np.ndarray, clusters: Tensor | None, turn: int = 0) -> np.ndarray:
    """The number of the part of each image, (N,): FOLDS, or fewer if a class has fewer images; each turn deals anew."""
    if clusters is not None:
        return _folds(classes, clusters, turn)
    fold = np.zeros(len(classes), int)
    _, first, members = np.unique(classes, return_index=True, return_inverse=True)
    images = np.bincount(members)
    number = min(FOLDS, images.min())
    random = np.random.RandomState(turn)
    dealt = 0
    for label in first.argsort():  # as scikit-learn's StratifiedKFold, which takes a second to import
        cards = np.sort(np.arange(dealt, dealt + images[label]) % number)
        random.shuffle(cards)
        fold[members == label] = cards
        dealt += images[label]
    return fold


def _fitted(features: Tensor, Y: Tensor, counts: Tensor, parts: Sequence, loss: Callable) -> Probe:
    """The probe for targets (N, K) whose scaling and strength have the smallest loss of the `parts` held out."""
    X = features.detach().cpu().float()
    searches = {name: _search(X, scale(X), Y, counts, parts, loss) for name, scale in SCALINGS.items()}
    name = min(searches, key=lambda name: searches[name][0])
    if not parts and X.min() >= 0:
        name = "length"
    total, strength, held_out = searches[name]
    weight, bias = fitted_at(X, Y, counts, name, strength, loss)
    return Probe(weight, bias, strength, held_out, name, total / counts.sum().item())


def _search(X: Tensor, scaled: Scaled, Y: Tensor, counts: Tensor, parts: Sequence, loss: Callable) -> tuple:
    """The smallest loss in cross-validation, with which strength, and the answers for what was held out, or None."""
    # Two strengths in a row that are worse than one before are the last. Each starts from the last one's weights.
    seen = (X - scaled.mean) / scaled.scale  # by a linear head
    starts = [None] * len(parts)
    best = np.inf, 1.0, None
    worse = 0
    for strength in STRENGTHS if parts else ():
        total = 0.0
        held_out = torch.full(Y.shape, torch.nan)
        how = (strength, loss, scaled.intercept)
        for i, (rest, part) in enumerate(parts):
            starts[i] = logistic(scaled.rows[rest], Y[rest], counts[rest], *how, starts[i], ROUGH_STEPS)
            logits = _logits(seen[part], starts[i])
            total += loss(logits, Y[part], counts[part]).item()
            held_out[part] = logits.float()
        worse += 1
        if total < best[0]:
            best = total, float(strength), held_out
            worse = 0
        if worse == 2:
            break
    return best


def fitted_at(X: Tensor, Y: Tensor, counts: Tensor, scaling: str, strength: float, loss) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) of a linear head on features (N, D) as they are, for targets (N, K)."""
    scaled = SCALINGS[scaling](X)
    weights = logistic(scaled.rows, Y, counts, strength, loss, scaled.intercept)
    return _unscaled(weights[:, :-1], weights[:, -1], scaled)


def _unscaled(weight: Tensor, bias: Tensor, scaled: Scaled) -> tuple[Tensor, Tensor]:
    """Weight and bias on features as they are: w (x - mean) / scale + b = (w / scale) x + (b - (w / scale) mean)."""
    weight = weight.double() / scaled.scale
    return weight.float(), (bias - weight @ scaled.mean.double()).float()


@torch.enable_grad()
def logistic(
    X: Tensor, Y: Tensor, counts: Tensor, strength: float, loss: Callable, intercept: bool, start=None, steps=STEPS
) -> Tensor:
    """Weights and, in the last column, biases (K, D + 1) with the smallest penalised loss; 0 without an intercept."""
    from scipy.optimize import minimize

    shape = (Y.shape[1], X.shape[1] + 1)
    penalty = 1 / (strength * len(X))

    def cost(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).view(shape).requires_grad_()
        total = loss(_logits(X, weights), Y, counts) / len(X) + penalty / 2 * weights[:, :-1].square().sum()
        [gradient] = torch.autograd.grad(total, weights)
        if not intercept:
            gradient[:, -1] = 0
        return total.item(), gradient.numpy().ravel()

    begin = np.zeros(shape) if start is None else start.numpy()
    # SciPy's threads and PyTorch's wait for each other: eight times as long.
    with _libraries().limit(limits=1, user_api="blas"):
        found = minimize(cost, begin.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": steps, "gtol": 1e-4})
    return torch.from_numpy(found.x).view(shape)


# The thread pools of the libraries that SciPy has loaded by then: finding them takes as long as a small fit.
_libraries = functools.cache(ThreadpoolController)


def _logits(X: Tensor, weights: Tensor) -> Tensor:
    return (X @ weights[:, :-1].float().T).double() + weights[:, -1]


def parts(fold: np.ndarray, views: int, classes: np.ndarray | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """The rows (rest, part) of each part of a cross-validation, from the number of the part of each image, (N,)."""
    # All views of an image are in one part. No part has one of the classes (N,) that the rest lacks, which knows two.
    offsets = len(fold) * np.arange(views)[:, None]
    found = []
    for number in range(fold.max() + 1):
        rest = np.flatnonzero(fold != number)
        part = np.flatnonzero(fold == number)
        if classes is not None:
            part = part[np.isin(classes[part], classes[rest])]
        if len(part) and len(rest) and (classes is None or len(np.unique(classes[rest])) > 1):
            found.append(((rest + offsets).ravel(), (part + offsets).ravel()))
    return found


def _folds(alike: Sequence[int], clusters: Tensor | None, turn: int = 0) -> np.ndarray:
    """The number of each image's part, (N,), by `turn`: clusters are dealt by the images that are `alike`."""
    if clusters is None:
        draws = torch.randperm(len(alike), generator=torch.Generator().manual_seed(turn))
        return (draws % min(FOLDS, len(alike))).numpy()
    names = clusters.tolist()
    return folds(alike, names, min(FOLDS, len(set(names))), turn)


# ------------------------- several labels an image, and numbers: targets are (views * N, K), NaN where nothing is known


def fit_one_vs_rest(features: Tensor, targets: Tensor, views=1, weights=None, clusters: Tensor | None = None) -> Probe:
    """A logistic regression for each of K labels, fitted together: with one scaling and C, as `fit_linear_probe`.

    Targets (views * N, K) are 0, 1, or NaN for unknown; `weights` (2, K) are of each label's negatives and positives.
    """
    Y = targets.detach().cpu().double()
    counts = shares_of_views(len(Y), views).repeat(1, Y.shape[1])
    if weights is not None:
        counts *= torch.where(Y > 0.5, weights[1].cpu(), weights[0].cpu())
    counts.masked_fill_(Y.isnan(), 0)
    held_out = parts(_folds(strata(Y[: len(Y) // views]).tolist(), clusters), views)
    return _fitted(features, Y.nan_to_num(), counts, held_out, sigmoid_loss)


def fit_ridge(features: Tensor, targets: Tensor, views: int = 1, clusters: Tensor | None = None) -> Probe:
    """A ridge regression of K numbers, or NaN, on standardised features, as `fit_linear_probe` takes them."""
    scaled = _standardised(features.detach().cpu().float())
    X = scaled.rows.double()
    Y = targets.detach().cpu().double()
    errors = torch.zeros(len(RIDGES), dtype=torch.float64)  # in cross-validation, of all numbers together
    for rest, part in parts(_folds([0] * (len(Y) // views), clusters), views):
        weights, biases = _ridges(X[rest], Y[rest], RIDGES)
        errors += (X[part] @ weights.mT + biases[:, None] - Y[part]).square().nansum((1, 2))
    best, loss = 1.0, np.inf
    if errors.any():
        best = float(RIDGES[int(errors.argmin())])
        loss = errors.min().item() / len(Y)
    [weight], [bias] = _ridges(X, Y, X.new_tensor([best]))
    return Probe(*_unscaled(weight, bias, scaled), best, loss=loss)


def _ridges(X: Tensor, Y: Tensor, penalties: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (P, K, D) and biases (P, K) by the P penalties. Columns known for the same images are fitted together."""
    weights = X.new_zeros(len(penalties), Y.shape[1], X.shape[1])
    biases = X.new_zeros(len(penalties), Y.shape[1])
    patterns, which = (~Y.isnan()).T.unique(dim=0, return_inverse=True)
    for number, known in enumerate(patterns):
        if not known.any():
            continue
        columns = (which == number).nonzero().flatten()
        centre = X[known].mean(0)
        rows = X[known] - centre
        truth = Y[known][:, columns]
        mean = truth.mean(0)
        truth = truth - mean
        wide = rows.shape[1] > rows.shape[0]  # then the images are the smaller problem
        values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
        turned = vectors.T @ (truth if wide else rows.T @ truth)
        solved = vectors @ (turned / (values + penalties[:, None])[..., None])  # (P, N or D, k)
        weights[:, columns] = (rows.T @ solved if wide else solved).mT
        biases[:, columns] = mean - weights[:, columns] @ centre
    return weights, biases
