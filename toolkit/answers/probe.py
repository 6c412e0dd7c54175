"""Start a classifier head as a linear probe: a regularised logistic regression on the frozen backbone's features.

Probing first and fine-tuning then keeps what the backbone knows; a random head's gradients distort it before the head
has learnt anything (Kumar et al., arXiv 2202.10054).
"""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit import distributed
from toolkit.images.splitting import folds, strata
from toolkit.models.backbones import head_name

STRENGTHS = 10.0 ** np.arange(-4, 2)  # of scikit-learn's C: from strong regularisation to weak
FOLDS = 3
TEMPERATURES = [2 ** (i / 2) for i in range(9)]  # 1 to 16
# Measured, see benchmarks/RESULTS.md: how far weights that move by the learning rate in each of so many steps may
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


class HeadTemperature(NamedTuple):
    """The temperature by which a head's logits are divided before training, so that it keeps what the probe knows."""

    least: float = 1.0
    per_rate: float = 0.0
    # By what factor the temperature that fits images which the probe has not seen is above the one that fits its
    # training images; None: not known.
    optimism: float | None = None

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


@torch.no_grad()
def choose_temperature(
    model: nn.Module,
    features: Tensor,
    loss: Callable[[Tensor], Tensor],
    features_train: bool,
    towards: Tensor | float = 0.0,
) -> HeadTemperature:
    """The temperature for the head of `model`, which is the probe:
    - `least` has the smallest loss (Guo et al., arXiv 1706.04599), so that training does not begin by taking back the
      confidence that the probe has in images without augmentation, or that label smoothing forbids. At least 1.
    - `per_rate` is DRIFT_STEPS * (standard deviation of the logits) / LOGIT_DRIFT: Adam moves every weight of the
      adapters by about the learning rate in each step, whatever the gradient, and the larger the head's weights, the
      more that does to the loss. It is 0 if the features do not train.

    The loss is of logits (N, K) for features (N, D) of training images with their augmentation; `towards` is as
    `soften_head` takes it.
    """
    logits = linear_head(model)(features) - towards
    losses = [loss(logits / t + towards).item() for t in TEMPERATURES]
    per_rate = DRIFT_STEPS * logits.std().item() / LOGIT_DRIFT if features_train else 0.0
    return HeadTemperature(TEMPERATURES[losses.index(min(losses))], per_rate)


@torch.no_grad()
def soften_head(model: nn.Module, temperature: float, towards: Tensor | float = 0.0) -> None:
    """Divide the head's weight and bias by a temperature: its answers stay, its confidence falls.

    `towards` (K,) are the logits that are left at an infinite temperature, if not 0: those of a constant answer.
    """
    head = linear_head(model)
    head.weight.div_(temperature)
    head.bias.sub_(towards).div_(temperature).add_(towards)
    distributed.broadcast([head.weight, head.bias])


def linear_head(model: nn.Module) -> nn.Linear:
    [head] = (m for m in model.get_submodule(head_name(model)).modules() if isinstance(m, nn.Linear))
    return head


@torch.no_grad()
def head_outputs(model: nn.Module, features: Tensor) -> Tensor:
    """The outputs (N, K) of the head of `model` for features (N, D)."""
    return linear_head(model)(features)


def head_accuracy(model: nn.Module, features: Tensor, labels: Tensor) -> float:
    """The accuracy (0 to 1) of the head of `model` on features (N, D) with labels (N,)."""
    return (head_outputs(model, features).argmax(1) == labels).float().mean().item()


def fit_linear_probe(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    views: int = 1,
    class_weights: str | None = None,
    clusters: Tensor | None = None,
) -> Probe:
    """A multinomial logistic regression on standardised features; its strength is scikit-learn's C.

    Args:
        features: (views * N, D): the same N images once for each view, such as once as they are and once augmented.
        labels: (views * N,), from 0 to K - 1.
        class_weights: 'balanced': every class counts alike, however many images it has; None: every image.
        clusters: (N,), the number of each image's cluster, such as a patient; None: each image is for itself.

    C has the smallest cross-validated log loss, for which all views of an image, and all images of a cluster, are held
    out together; larger ones than the first that is worse are not tried. A class with a single image leaves nothing to
    validate on: C is then 1. So does a single cluster; a class in one cluster alone is left out of the loss. A class
    without any images gets zeros.

    The time grows with N * D * K: 24 s on a core, and 0.4 GB, for 20,000 rows of 2,048 features and 100 classes.
    """
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold
    from threadpoolctl import threadpool_limits  # scikit-learn's own

    X = features.detach().cpu().float().numpy()
    y = labels.cpu().numpy()
    classes = y[: len(y) // views]
    number = min(FOLDS, np.bincount(classes)[np.unique(classes)].min())  # of parts that have all classes
    fold = np.zeros(len(classes), int)
    if clusters is not None:
        fold = _folds(classes, clusters)
    elif number > 1:
        for i, (_, part) in enumerate(StratifiedKFold(number, shuffle=True, random_state=0).split(classes, classes)):
            fold[part] = i
    splits = _parts(fold, views, classes)

    def tried(strength: float) -> tuple[float, Tensor]:
        losses = []
        held_out = torch.full((len(y), num_classes), torch.nan)
        for rest, part in splits:
            fitted = _regression(strength, class_weights).fit(X[rest], y[rest])
            losses.append(log_loss(y[part], fitted.predict_proba(X[part]), labels=fitted.classes_))
            weight, bias = _as_linear(fitted, num_classes)
            answers = torch.from_numpy(X[part]) @ weight.T + bias
            lacking = np.setdiff1d(y, fitted.classes_)  # a class that the whole set has is the last to be answered
            answers[:, lacking] = answers[:, fitted.classes_].amin(1, keepdim=True)
            held_out[part] = answers
        return np.mean(losses), held_out

    # With few classes several threads wait for each other, up to 16 times as long: one computes the products.
    with warnings.catch_warnings(), threadpool_limits(1, "blas"):
        warnings.simplefilter("ignore")  # a fit that has not converged is still a fair start
        strength, held_out = _strongest(tried, splits)
        weight, bias = _as_linear(_regression(strength, class_weights).fit(X, y), num_classes)
    return Probe(weight, bias, strength, held_out)


def _strongest(tried: Callable[[float], tuple[float, Tensor]], parts: Sequence) -> tuple[float, Tensor | None]:
    """The last of STRENGTHS before the loss of the parts held out rises, and the answers for them; without parts 1."""
    smallest = np.inf
    best = (1.0, None)
    for strength in STRENGTHS if len(parts) else ():
        loss, held_out = tried(strength)
        if loss >= smallest:
            break
        smallest = loss
        best = (float(strength), held_out)
    return best


def _parts(fold: np.ndarray, views: int, classes: np.ndarray | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """The rows (rest, part) of each part of a cross-validation, from the number of the part of each image, (N,).

    All views of an image are in one part. No part has one of the classes (N,) that the rest lacks, which knows two.
    """
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


def _folds(alike: Sequence[int], clusters: Tensor | None) -> np.ndarray:
    """The number of the part that each image belongs to, (N,).

    Clusters are dealt so that each part has its share of the images that are `alike`; images without any, at random.
    """
    if clusters is None:
        draws = torch.randperm(len(alike), generator=torch.Generator().manual_seed(0))
        return (draws % min(FOLDS, len(alike))).numpy()
    names = clusters.tolist()
    return folds(alike, names, min(FOLDS, len(set(names))))


def _as_linear(fitted, num_classes: int) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) on features that are not standardised."""
    (_, scaler), (_, regression) = fitted.steps
    # w (x - mean) / std + b  =  (w / std) x + (b - (w / std) mean)
    rows = regression.coef_ / scaler.scale_
    shifts = regression.intercept_ - rows @ scaler.mean_
    if len(rows) == 1:  # for two classes scikit-learn gives the difference
        rows = np.concatenate([-rows, rows]) / 2
        shifts = np.concatenate([-shifts, shifts]) / 2
    weight = torch.zeros(num_classes, rows.shape[1])
    bias = torch.zeros(num_classes)
    weight[regression.classes_] = torch.tensor(rows).float()
    bias[regression.classes_] = torch.tensor(shifts).float()
    return weight, bias


def _regression(strength: float, class_weight: str | None):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, class_weight=class_weight, max_iter=200))


# ----------------------------------------------------------------------------------------------------------------------
# Several labels an image, and numbers: targets are (views * N, K), NaN where nothing is known


def fit_one_vs_rest(
    features: Tensor, targets: Tensor, views: int = 1, weights: Tensor | None = None, clusters: Tensor | None = None
) -> Probe:
    """A logistic regression for each of K labels on standardised features; their strength is scikit-learn's C.

    All are fitted together, in the time that one softmax takes, and share the C with the smallest loss in
    cross-validation, as `fit_linear_probe` chooses its own. An unknown label leaves its image out of that label's fit.

    Args:
        features: (views * N, D), as for `fit_linear_probe`.
        targets: 0 or 1.
        weights: (2, K): how much a negative and a positive of each label count; None: 1.
        clusters: as for `fit_linear_probe`.
    """
    X, mean, scale = _standardised(features)
    Y = targets.detach().cpu().double()
    counts = torch.ones_like(Y)
    if weights is not None:
        counts = torch.where(Y > 0.5, weights[1].cpu(), weights[0].cpu()).double()
    counts.masked_fill_(Y.isnan(), 0)
    parts = _parts(_folds(strata(Y[: len(Y) // views]).tolist(), clusters), views)
    Y = Y.nan_to_num()
    starts = [None] * len(parts)

    def tried(strength: float) -> tuple[float, Tensor]:
        loss = 0.0
        held_out = torch.zeros(Y.shape)
        for i, (rest, part) in enumerate(parts):
            starts[i] = _logistic(X[rest], Y[rest], counts[rest], strength, starts[i])
            logits = _logits(X[part], starts[i])
            loss += (counts[part] * (F.softplus(logits) - Y[part] * logits)).sum().item()
            held_out[part] = logits.float()
        return loss, held_out

    strength, held_out = _strongest(tried, parts)
    fitted = _logistic(X, Y, counts, strength)
    return Probe(*_unstandardised(fitted[:, :-1], fitted[:, -1], mean, scale), strength, held_out)


RIDGES = 10.0 ** np.arange(-2, 7)


def fit_ridge(features: Tensor, targets: Tensor, views: int = 1, clusters: Tensor | None = None) -> Probe:
    """A ridge regression of K numbers on standardised features; its strength is the penalty.

    The penalty has the smallest squared error in cross-validation, of all numbers together, which should be of about
    the same spread. An unknown number leaves its image out of that number's fit. `clusters` are as for
    `fit_linear_probe`.
    """
    X, mean, scale = _standardised(features)
    X = X.double()
    Y = targets.detach().cpu().double()
    errors = torch.zeros(len(RIDGES), dtype=torch.float64)
    for rest, part in _parts(_folds([0] * (len(Y) // views), clusters), views):
        for i, (weight, bias) in enumerate(_ridges(X[rest], Y[rest], RIDGES)):
            errors[i] += (X[part] @ weight.T + bias - Y[part]).square().nansum()
    best = float(RIDGES[int(errors.argmin())]) if errors.any() else 1.0
    [found] = _ridges(X, Y, [best])
    return Probe(*_unstandardised(*found, mean, scale), best)


def _standardised(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    X = features.detach().cpu().float()
    mean = X.mean(0)
    scale = X.std(0, correction=0)
    scale[scale <= 1e-6 * mean.abs()] = 1.0  # constant but for rounding, or 0
    return (X - mean) / scale, mean, scale


def _unstandardised(weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.double() / scale
    return weight.float(), (bias - weight @ mean.double()).float()


def _logistic(X: Tensor, Y: Tensor, counts: Tensor, strength: float, start: Tensor | None = None) -> Tensor:
    """Weights and, in the last column, biases (K, D + 1) with the smallest penalised loss."""
    from scipy.optimize import minimize

    shape = (Y.shape[1], X.shape[1] + 1)
    penalty = 1 / (strength * len(X))

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).view(shape)
        logits = _logits(X, weights)
        errors = counts * (logits.sigmoid() - Y) / len(X)
        gradient = torch.cat([(errors.float().T @ X).double() + penalty * weights[:, :-1], errors.sum(0)[:, None]], 1)
        value = (counts * (F.softplus(logits) - Y * logits)).sum() / len(X)
        value += penalty / 2 * weights[:, :-1].square().sum()
        return value.item(), gradient.numpy().ravel()

    begin = np.zeros(shape) if start is None else start.numpy()
    found = minimize(loss, begin.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 200, "gtol": 1e-4})
    return torch.from_numpy(found.x).view(shape)


def _logits(X: Tensor, weights: Tensor) -> Tensor:
    return (X @ weights[:, :-1].float().T).double() + weights[:, -1]


def _ridges(X: Tensor, Y: Tensor, penalties) -> list[tuple[Tensor, Tensor]]:
    """Weight (K, D) and bias (K,) for each penalty. Columns known for the same images are fitted together."""
    found = [(X.new_zeros(Y.shape[1], X.shape[1]), X.new_zeros(Y.shape[1])) for _ in penalties]
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
        wide = rows.shape[1] > rows.shape[0]  # then the smaller problem is that of the images
        values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
        turned = vectors.T @ (truth if wide else rows.T @ truth)
        for (weight, bias), penalty in zip(found, penalties, strict=True):
            solved = vectors @ (turned / (values.clamp_min(0) + penalty)[:, None])
            weight[columns] = (rows.T @ solved if wide else solved).T
            bias[columns] = mean - weight[columns] @ centre
    return found
