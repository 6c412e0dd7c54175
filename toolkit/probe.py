"""Start a classifier head as a linear probe: a regularised logistic regression on the frozen backbone's features.

Probing first and fine-tuning then keeps what the backbone knows; a random head's gradients distort it before the head
has learnt anything (Kumar et al., arXiv 2202.10054).
"""

import argparse
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit import distributed
from toolkit.backbones import head_name
from toolkit.training import knn_accuracy

STRENGTHS = 10.0 ** np.arange(-4, 2)  # of scikit-learn's C: from strong regularisation to weak
FOLDS = 3
TEMPERATURES = [2 ** (i / 2) for i in range(9)]  # 1 to 16
# Measured, see benchmarks/RESULTS.md: how far weights that move by the learning rate in each of so many steps may
# change logits of standard deviation 1. A shorter run needs the same: where the probe is sure of its training images
# there is nothing but noise in their gradient, and Adam makes full steps of that.
LOGIT_DRIFT, DRIFT_STEPS = 0.3, 500


class HeadTemperature(NamedTuple):
    """What to divide a head's logits by before training, so that it keeps what the probe knows."""

    least: float = 1.0
    per_rate: float = 0.0

    def at(self, rate: float) -> float:
        """The temperature for adapters that train at a learning rate."""
        return max(self.least, self.per_rate * rate)


def start_head(
    model: nn.Module, features: list[tuple[Tensor, Tensor]], args: argparse.Namespace
) -> tuple[dict[str, float | None], HeadTemperature]:
    """Measure what the backbone knows before training, and make the head of `model` its linear probe (--head-init).

    Args:
        features: of training images, of evaluation images and, for a probe, of augmented training images, with their
            labels: (N, D) and (N,) each.

    Returns:
        `knn_accuracy` and `probe_accuracy` (0 to 1; None without a probe), and what to divide the head's logits by.
    """
    bank, queries, *augmented = features
    baseline = {"knn_accuracy": knn_accuracy(*bank, *queries), "probe_accuracy": None}
    if args.head_init != "probe":
        return baseline, HeadTemperature()
    both = [torch.cat(views) for views in zip(bank, *augmented, strict=True)]
    init_head_from_probe(model, *both, views=2, class_weights=args.class_weights)
    baseline["probe_accuracy"] = head_accuracy(model, *queries)
    # A head that trains alone cannot harm the features.
    features_train = args.lora_rank > 0 or args.train_norms or not args.freeze_backbone
    return baseline, choose_temperature(model, *augmented[0], features_train, args.label_smoothing)


def init_head_from_probe(
    model: nn.Module, features: Tensor, labels: Tensor, views: int = 1, class_weights: str = "none"
) -> None:
    """Set the head of `model` to the linear probe of its features.

    Args:
        model: its head is a linear layer from D features to K classes.
        features: (views * N, D), as `toolkit.training.extract_features` returns them: the same N images once for each
            view, such as once as they are and once augmented.
        labels: (views * N,), from 0 to K - 1.
        class_weights: 'none', or 'balanced': every class counts alike, however many images it has.
    """
    head = _linear_head(model)
    weight, bias, _ = fit_linear_probe(features, labels, head.out_features, views, class_weights)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    distributed.broadcast([head.weight, head.bias])  # on other machines the last bits may differ


@torch.no_grad()
def choose_temperature(
    model: nn.Module, features: Tensor, labels: Tensor, features_train: bool, label_smoothing: float = 0.0
) -> HeadTemperature:
    """The temperature for the head of `model`, which is the probe:
    - `least` has the smallest loss (Guo et al., arXiv 1706.04599), so that training does not begin by taking back the
      confidence that the probe has in images without augmentation, or that label smoothing forbids. At least 1.
    - `per_rate` is DRIFT_STEPS * (standard deviation of the logits) / LOGIT_DRIFT: Adam moves every weight of the
      adapters by about the learning rate in each step, whatever the gradient, and the larger the head's weights, the
      more that does to the loss. It is 0 if the features do not train.

    Args:
        features, labels: (N, D) and (N,), of training images with their augmentation.
    """
    logits = _linear_head(model)(features)
    losses = [F.cross_entropy(logits / t, labels, label_smoothing=label_smoothing).item() for t in TEMPERATURES]
    per_rate = DRIFT_STEPS * logits.std().item() / LOGIT_DRIFT if features_train else 0.0
    return HeadTemperature(TEMPERATURES[losses.index(min(losses))], per_rate)


@torch.no_grad()
def soften_head(model: nn.Module, temperature: float) -> None:
    """Divide the head's weight and bias by a temperature: its answers stay, its confidence falls."""
    head = _linear_head(model)
    for parameter in (head.weight, head.bias):
        parameter.div_(temperature)
    distributed.broadcast([head.weight, head.bias])


def _linear_head(model: nn.Module) -> nn.Linear:
    [head] = (m for m in model.get_submodule(head_name(model)).modules() if isinstance(m, nn.Linear))
    return head


@torch.no_grad()
def head_accuracy(model: nn.Module, features: Tensor, labels: Tensor) -> float:
    """The accuracy (0 to 1) of the head of `model` on features (N, D) with labels (N,)."""
    return (model.get_submodule(head_name(model))(features).argmax(1) == labels).float().mean().item()


def fit_linear_probe(
    features: Tensor, labels: Tensor, num_classes: int, views: int = 1, class_weights: str = "none"
) -> tuple[Tensor, Tensor, float]:
    """A multinomial logistic regression on standardised features, as weight (K, D), bias (K,) and its C.

    C has the smallest cross-validated log loss, for which all views of an image are held out together; larger ones than
    the first that is worse are not tried. A class with a single image leaves nothing to validate on: C is then 1. A
    class without any gets zeros.

    The time grows with N * D * K: 24 s on a core, and 0.4 GB, for 20,000 rows of 2,048 features and 100
    classes.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from threadpoolctl import threadpool_limits  # scikit-learn's own

    weights = None if class_weights == "none" else class_weights
    X, y = features.detach().cpu().float().numpy(), labels.cpu().numpy()
    count = len(y) // views
    folds, best = min(FOLDS, np.bincount(y[:count])[np.unique(y)].min()), 1.0
    # One thread for the products: with few classes those of several wait for each other, up to 16 times as long.
    with warnings.catch_warnings(), threadpool_limits(1, "blas"):
        warnings.simplefilter("ignore")  # a fit that has not converged is a fair start all the same
        if folds > 1:
            parts = StratifiedKFold(folds, shuffle=True, random_state=0).split(X[:count], y[:count])
            offsets = count * np.arange(views)[:, None]
            splits = [tuple((part + offsets).ravel() for part in pair) for pair in parts]
            smallest = np.inf
            for strength in STRENGTHS:
                loss = -cross_val_score(_regression(strength, weights), X, y, cv=splits, scoring="neg_log_loss").mean()
                if loss >= smallest:
                    break
                smallest, best = loss, float(strength)
        scaler, regression = (step for _, step in _regression(best, weights).fit(X, y).steps)
    # w (x - mean) / std + b  =  (w / std) x + (b - (w / std) mean)
    rows = regression.coef_ / scaler.scale_
    shifts = regression.intercept_ - rows @ scaler.mean_
    if len(rows) == 1:  # of two classes scikit-learn gives the difference
        rows, shifts = np.concatenate([-rows, rows]) / 2, np.concatenate([-shifts, shifts]) / 2
    weight, bias = torch.zeros(num_classes, X.shape[1]), torch.zeros(num_classes)
    weight[regression.classes_], bias[regression.classes_] = torch.tensor(rows).float(), torch.tensor(shifts).float()
    return weight, bias, best


def _regression(strength: float, class_weight: str | None):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, class_weight=class_weight, max_iter=200))
