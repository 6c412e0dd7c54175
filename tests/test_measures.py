"""toolkit/measures.py: against the formulas written out, and at the ends of each range."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from toolkit import measures


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def test_alignment_is_the_mean_squared_distance_of_the_views(features):
    other = features.flip(1)
    pairs = [F.normalize(x, dim=0) - F.normalize(y, dim=0) for x, y in zip(features, other, strict=True)]
    assert measures.alignment(features, other) == pytest.approx(sum(float(d @ d) for d in pairs) / 40, rel=1e-5)
    assert measures.alignment(features, 3 * features) == pytest.approx(0, abs=1e-6)
    assert measures.alignment(features, -features) == pytest.approx(4, rel=1e-5)


def test_uniformity_is_the_log_of_the_mean_potential(features):
    points = F.normalize(features, dim=1)
    potentials = [math.exp(-2 * float((points[i] - points[j]).square().sum())) for i in range(40) for j in range(i)]
    assert measures.uniformity(features) == pytest.approx(math.log(sum(potentials) / len(potentials)), rel=1e-4)
    assert measures.uniformity(5 * features) == pytest.approx(measures.uniformity(features), rel=1e-4)
    assert measures.uniformity(features[:1].repeat(4, 1)) == pytest.approx(0, abs=1e-5)
    assert measures.uniformity(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-8)


def test_effective_rank_counts_directions(features):
    square = torch.eye(4).repeat(5, 1)
    assert measures.effective_rank(torch.cat([square, -square])) == pytest.approx(4)
    assert measures.effective_rank(torch.cat([square, -square])[:, :3] + 7) == pytest.approx(3)  # wherever they lie
    assert measures.effective_rank(features[:, :1] @ torch.randn(1, 6)) == pytest.approx(1, abs=1e-4)
    assert measures.effective_rank(torch.ones(5, 3)) == 1
    values = torch.linalg.svdvals(features - features.mean(0))
    shares = [float(value / values.sum()) for value in values]
    assert measures.effective_rank(features) == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)), rel=1e-4)


@pytest.mark.parametrize(("share", "images"), [(0.5, 24), (0.9, 60), (0.98, 359)])
def test_the_interval_covers_the_true_accuracy_as_often_as_it_says(share, images):
    draws = np.random.RandomState(0).binomial(images, share, size=500)
    intervals = [measures.wilson_interval(hits, images) for hits in draws]
    covered = np.mean([low <= share <= high for low, high in intervals])
    assert 0.92 < covered < 0.98


def test_the_interval_of_none_and_of_all_right_stays_between_0_and_1():
    assert measures.wilson_interval(0, 10) == (0, pytest.approx(0.2775, abs=1e-4))
    assert all(measures.wilson_interval(n, n)[1] == 1 and measures.wilson_interval(0, n)[0] == 0 for n in range(1, 400))
    assert measures.wilson_interval(10, 10) == (pytest.approx(0.7225, abs=1e-4), 1)
