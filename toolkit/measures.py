"""What is measured of features, without a label, and how far an accuracy may be off."""

from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

# Names in the metrics, and titles. The first is `toolkit.training.knn_accuracy`, which needs labels.
TITLES = {"knn_accuracy": "k-NN", "alignment": "alignment", "uniformity": "uniformity"}
TITLES |= {"effective_rank": "effective rank"}


def wilson_interval(hits: float, images: int, level: float = 0.95) -> tuple[float, float]:
    """Between which shares (0 to 1) the true accuracy lies, where `hits` of `images` answers are right.

    Wilson's score interval (JASA 22, 1927), which is good for few images too, and for all or none right.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, unsure = hits / images, z * z / images
    middle = (share + unsure / 2) / (1 + unsure)
    half = (unsure * (share * (1 - share) + unsure / 4)) ** 0.5 / (1 + unsure)
    low, high = middle - half, middle + half
    return (low if hits > 0 else 0.0), (high if hits < images else 1.0)  # exactly, whatever is rounded above


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
