"""The linear probe as a start of the head, against scikit-learn on standardised features."""

import functools
import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_class_weight
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn

from toolkit.answers import probe
from toolkit.images import splitting

STRENGTHS = probe.STRENGTHS  # of which other tests' probes try three


@pytest.fixture(autouse=True)
def every_strength(monkeypatch):
    monkeypatch.setattr(probe, "STRENGTHS", STRENGTHS)


def clusters(classes: int, images: int = 30, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) of very different scales around a centre per class, and labels (N,)."""
    labels = torch.arange(classes * images) % classes
    centres = torch.randn(classes, 8)
    noise = spread * torch.randn(len(labels), 8)
    return (centres[labels] + noise) * 10.0 ** torch.arange(-2, 6) + 5, labels


def answers(found: probe.Probe, features: torch.Tensor) -> torch.Tensor:
    return features.double() @ found.weight.double().T + found.bias


@pytest.mark.parametrize(
    ("classes", "weights", "grouped"),
    [(2, None, True), (2, "balanced", False), (3, "balanced", True), (4, None, False)],
)
def test_the_probe_is_scikit_learns_regression_on_standardised_features(monkeypatch, classes, weights, grouped):
    """As are the probes of the rest, by which what is held out is answered; patients are held out whole."""
    monkeypatch.setattr(probe, "SCALINGS", {"deviation": probe.SCALINGS["deviation"]})
    monkeypatch.setattr(probe, "ROUGH_STEPS", 500)
    features, labels = clusters(classes, spread=4.0)
    labels[:30] = 1  # so that classes are not as frequent
    patients = torch.arange(len(labels)) // 6 if grouped else None
    of_classes = compute_class_weight(weights, classes=np.arange(classes), y=labels.numpy())
    of_loss = None if weights is None else torch.from_numpy(of_classes)
    found = probe.fit_linear_probe(features, labels, classes, class_weights=of_loss, clusters=patients)
    strength = found.strength * (2 if classes == 2 else 1)  # of two weights it fits the difference, of twice the square
    reference = LogisticRegression(C=strength, class_weight=dict(enumerate(of_classes)), max_iter=500)
    X = StandardScaler().fit_transform(features.numpy())
    expected = reference.fit(X, labels).predict_proba(X)
    np.testing.assert_allclose(answers(found, features).softmax(1).numpy(), expected, atol=1e-3)
    parts = StratifiedKFold(3, shuffle=True, random_state=0).split(features, labels)
    if grouped:
        fold = splitting.folds(labels.tolist(), patients.tolist(), 3)
        parts = [(fold != number, fold == number) for number in range(3)]
        assert not any(np.intersect1d(patients[rest], patients[part]).size for rest, part in parts)
    for rest, part in parts:
        expected = reference.fit(X[rest], labels[rest]).predict_proba(X[part])
        np.testing.assert_allclose(found.held_out[part].softmax(1).numpy(), expected, atol=1e-3)


def test_images_that_tell_nothing_are_told_apart_all_the_same():
    """By C of 0.001: below, what is held out loses even less, and a weak backbone's few images are taken by chance."""
    features = torch.randn(60, 100, generator=torch.Generator().manual_seed(4))
    assert probe.fit_linear_probe(features, torch.arange(60) % 3, 3).strength == pytest.approx(1e-3)


def test_the_views_of_an_image_are_held_out_together(monkeypatch):
    """Ten rows are five images in two views; `parts` are of images."""
    seen = []
    monkeypatch.setattr(probe, "parts", lambda fold, views, *_: seen.append((len(fold), views)) or [])
    features = torch.randn(10, 3)
    labels = torch.tensor([0, 1, 0, 1, 0]).repeat(2)
    probe.fit_linear_probe(features, labels, 2, views=2)
    for fit in (probe.fit_one_vs_rest, probe.fit_ridge):
        fit(features, labels[:, None].float(), views=2)
    assert seen == [(5, 2)] * 3


def positive(images: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, 120), none negative, of which twenty say the class and the others hardly vary."""
    labels = torch.arange(3 * images) % 3
    telling = torch.rand(3, 20)[labels] + torch.rand(3 * images, 20)
    return torch.cat([telling, 0.02 * torch.rand(3 * images, 100)], 1), labels


def test_an_image_counts_as_much_as_all_its_augmented_views(monkeypatch):
    labels = torch.tensor([0, 1, 1]).repeat(5)
    _, counts = probe.one_hot(labels, 2, 5, None)
    assert counts[:, 0].tolist() == 3 * [1.0] + 12 * [0.25]
    _, balanced = probe.one_hot(labels, 3, 5, torch.tensor([1.5, 0.75, 9.0]))  # of the third there is none
    assert balanced[:6, 0].tolist() == [1.5, 0.75, 0.75, 0.375, 0.1875, 0.1875]
    monkeypatch.setattr(probe, "_fitted", lambda features, Y, counts, *_: counts)
    targets = torch.tensor([[0.0, 1], [1, 0], [1, math.nan]]).repeat(5, 1)
    counts = probe.fit_one_vs_rest(torch.randn(15, 2), targets, 5, torch.tensor([[3.0, 4], [5, 6]]))
    assert counts[:4].tolist() == [[3, 6], [5, 4], [5, 0], [0.75, 1.5]]


def test_features_of_one_length_are_scikit_learns_regression_without_intercept(monkeypatch):
    """The answers of the linear head for each image are the same, with the norms' mean in place of its own norm."""
    monkeypatch.setattr(probe, "SCALINGS", {"length": probe.SCALINGS["length"]})
    monkeypatch.setattr(probe, "ROUGH_STEPS", 500)
    features, labels = positive()
    found = probe.fit_linear_probe(features, labels, 3)
    centred = features - features.mean(0)
    norms = centred.norm(dim=1, keepdim=True)
    X = (centred / norms * 120**0.5).numpy()
    reference = LogisticRegression(C=found.strength, fit_intercept=False, max_iter=500, tol=1e-6)
    by_norm = (norms / norms.mean()).numpy()
    expected = reference.fit(X, labels).decision_function(X) * by_norm
    np.testing.assert_allclose(answers(found, features).numpy(), expected, atol=0.1)
    for rest, part in StratifiedKFold(3, shuffle=True, random_state=0).split(features, labels):
        expected = reference.fit(X[rest], labels[rest]).decision_function(X[part]) * by_norm[part]
        np.testing.assert_allclose(found.held_out[part].numpy(), expected, atol=0.3)


@pytest.mark.parametrize("turn", [0, 5])
def test_classes_are_dealt_into_parts_as_by_scikit_learn(turn):
    """Of three classes, of which the last comes first and the second has the fewest images."""
    classes = np.array([2] * 5 + [0, 1] * 2 + [0] * 7 + [2] * 2)
    found = probe.class_folds(classes, None, turn)
    for number, (_, part) in enumerate(StratifiedKFold(2, shuffle=True, random_state=turn).split(classes, classes)):
        assert np.flatnonzero(found == number).tolist() == part.tolist()


def test_the_scaling_has_the_smaller_loss_of_what_is_held_out(monkeypatch):
    monkeypatch.setattr(probe, "STRENGTHS", STRENGTHS[::3])
    for best, (features, labels) in {"deviation": clusters(3), "length": positive()}.items():
        losses = {}
        for name, scale in probe.SCALINGS.items():
            with monkeypatch.context() as only:
                only.setattr(probe, "SCALINGS", {name: scale})
                losses[name] = F.cross_entropy(probe.fit_linear_probe(features, labels, 3).held_out, labels).item()
        found = probe.fit_linear_probe(features, labels, 3)
        assert found.scaling == best == min(losses, key=losses.get)
        assert F.cross_entropy(found.held_out, labels).item() == pytest.approx(losses[best])


def test_the_search_for_a_strength_ends_at_the_second_in_a_row_that_is_worse(monkeypatch):
    """Or as good as the best: then the stronger one stays. Each fit starts at the weights of the one before."""
    starts = []

    def logistic(*given) -> torch.Tensor:
        starts.append(given[6])
        return torch.full((2, 3), float(len(starts)))

    def loss(logits: torch.Tensor, Y: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        assert counts.flatten().tolist() == [3, 4]  # of what is held out
        return torch.tensor(next(losses))

    losses = iter([3.0, 4.0, 2.0, 5.0, 2.0, 0.1])
    monkeypatch.setattr(probe, "logistic", logistic)
    X, Y = torch.randn(4, 2), torch.eye(2).repeat(2, 1)
    parts = [(np.array([0, 1]), np.array([2, 3]))]
    found = probe._search(X, probe.SCALINGS["deviation"](X), Y, torch.arange(1, 5)[:, None], parts, loss)
    assert found[:2] == (2.0, probe.STRENGTHS[2])
    assert starts[0] is None and torch.stack(starts[1:])[:, 0, 0].tolist() == [1, 2, 3, 4]


def test_a_fit_goes_on_from_the_weights_of_the_strength_before():
    """A step from where the last one ended changes next to nothing; from zeros it is far from the end."""
    features, labels = clusters(3, spread=4.0)
    rows = probe.SCALINGS["deviation"](features).rows
    fit = functools.partial(probe.logistic, rows, *probe.one_hot(labels, 3, 1, None), 0.1, probe.softmax_loss, True)
    ended = fit()
    torch.testing.assert_close(fit(ended, steps=1), ended, atol=1e-3, rtol=0)
    assert (fit(steps=1) - ended).abs().max() > 0.05


def test_a_class_with_one_image_or_none_and_images_that_are_all_alike():
    features, labels = clusters(3, images=1)
    found = probe.fit_linear_probe(features, labels, 3)
    assert found.strength == 1 and torch.equal(answers(found, features).argmax(1), labels)
    assert found.scaling == "deviation"
    assert probe.fit_linear_probe(features.relu(), labels, 3).scaling == "length"  # as of ReLUs
    features, labels = clusters(3)
    found = probe.fit_linear_probe(features, 2 * labels, 6)
    assert answers(found, features).softmax(1)[:, 1::2].max() < 1e-3
    assert answers(probe.fit_linear_probe(torch.ones(6, 4), torch.arange(6) % 3, 3), torch.ones(1, 4)).isfinite().all()


@pytest.mark.parametrize("towards", [0.0, torch.tensor([1.5, -2.0, 0.0, 0.5])])
def test_the_temperature_grows_with_the_rate_if_features_train_and_at_a_low_one_keeps_the_confidence(towards):
    """Logits are divided as far as they are from a constant answer. With label smoothing they are to be less sure."""
    features, labels = clusters(4, spread=0.1)
    model = nn.ModuleDict({"fc": nn.Linear(8, 4)})
    probe.set_head(model, probe.fit_linear_probe(features, labels, 4))
    logits = model.fc(features) - towards
    loss = functools.partial(F.cross_entropy, target=labels)
    found = probe.choose_temperature(model, features, loss, True, towards)
    assert found.least == 1
    assert found.per_rate == pytest.approx(probe.DRIFT_STEPS * logits.std().item() / probe.LOGIT_DRIFT)
    smoothed = functools.partial(loss, label_smoothing=0.1)
    frozen = probe.choose_temperature(model, features, smoothed, False, towards)
    assert frozen.per_rate == 0
    assert frozen.least == min(probe.TEMPERATURES, key=lambda t: smoothed(logits / t + towards)) > 1
    asked = []
    probe.choose_temperature(model, features, lambda shown: asked.append(shown) or shown.sum(), True, towards)
    torch.testing.assert_close(asked[-1], logits / 16 + towards)


def several_labels(images: int = 120, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) and labels (N, 3) of 0, 1 and, where unknown, NaN; the last is rare."""
    targets = (torch.rand(images, 3) < torch.tensor([0.5, 0.3, 0.1])).float()
    features = targets @ torch.randn(3, 8) + spread * torch.randn(images, 8)
    targets[torch.rand(images, 3) < 0.2] = torch.nan
    return features * 10.0 ** torch.arange(-2, 6) + 5, targets


@pytest.mark.parametrize(("balanced", "grouped"), [(False, True), (True, False)])
def test_each_label_is_scikit_learns_regression_on_the_images_of_which_it_is_known(monkeypatch, balanced, grouped):
    """As are the probes of the rest, by which what is held out is answered; patients are held out whole."""
    monkeypatch.setattr(probe, "SCALINGS", {"deviation": probe.SCALINGS["deviation"]})
    monkeypatch.setattr(probe, "ROUGH_STEPS", 500)
    monkeypatch.setattr(probe, "strata", lambda targets: torch.zeros(len(targets)))
    features, targets = several_labels(spread=2.0)
    positives = targets.nansum(0)
    known = (~targets.isnan()).sum(0)
    weights = torch.stack([known / (2 * (known - positives)), known / (2 * positives)]) if balanced else None
    patients = torch.arange(120) // 6 if grouped else None
    fold = (torch.randperm(120, generator=torch.Generator().manual_seed(0)) % 3).numpy()
    if grouped:
        fold = splitting.folds([0] * 120, patients.tolist(), 3)
    found = probe.fit_one_vs_rest(features, targets, weights=weights, clusters=patients)
    X = StandardScaler().fit_transform(features.numpy())
    for k, known in enumerate(~targets.isnan().T.numpy()):
        by_class = dict(enumerate(weights[:, k].tolist())) if balanced else None
        reference = LogisticRegression(C=found.strength, class_weight=by_class, max_iter=500, tol=1e-6)
        for number in range(4):  # of three parts and none
            rest = known & (fold != number)
            part = fold == number if number < 3 else known
            logits = found.held_out if number < 3 else answers(found, features)
            expected = reference.fit(X[rest], targets[rest, k].numpy()).predict_proba(X[part])[:, 1]
            np.testing.assert_allclose(logits[part, k].sigmoid().numpy(), expected, atol=5e-3)


def test_labels_of_one_kind_are_fitted_as_far_as_they_go():
    """A label that no image has, one that all have and one that is known of none: no error, and nothing infinite."""
    features, _ = several_labels()
    targets = torch.tensor([0.0, 1.0, torch.nan]).repeat(120, 1)
    shares = answers(probe.fit_one_vs_rest(features, targets), features).sigmoid()
    assert shares[:, 0].max() < 0.05 and shares[:, 1].min() > 0.95 and shares[:, 2].eq(0.5).all()
    assert probe.fit_one_vs_rest(features[:1], targets[:1]).strength == 1


@pytest.mark.parametrize("images", [120, 6])
def test_the_ridge_is_scikit_learns_on_standardised_features(images):
    features, _ = several_labels()
    features = features[:images]
    noise = torch.randn(images, 2, generator=torch.Generator().manual_seed(1))
    numbers = noise + features[:, 3:4] / features[:, 3].std()
    numbers[::4, 1] = torch.nan
    found = probe.fit_ridge(features, numbers)
    X = StandardScaler().fit_transform(features.numpy())
    parts = probe.parts(probe._folds([0] * images, None), 1)
    errors = dict.fromkeys(probe.RIDGES.tolist(), 0.0)  # squared, of what is held out
    for truth, answered in zip(numbers.T.numpy(), answers(found, features).T.numpy(), strict=True):
        known = ~np.isnan(truth)
        reference = Ridge(alpha=found.strength).fit(X[known], truth[known])
        np.testing.assert_allclose(answered, reference.predict(X), rtol=1e-3, atol=1e-3)
        for penalty, (rest, part) in itertools.product(errors, parts):
            rest = rest[known[rest]]
            part = part[known[part]]
            reference = Ridge(alpha=penalty).fit(X[rest], truth[rest])
            errors[penalty] += np.square(reference.predict(X[part]) - truth[part]).sum()
    assert found.strength == min(errors, key=errors.get)


def test_a_class_of_one_patient_is_left_out_of_the_validation():
    """When that patient is held out nothing is known of it: its images have no answer, and all others have."""
    features, labels = clusters(3, spread=2.0)
    patients = torch.where(labels == 2, 30, torch.arange(90) // 3)
    found = probe.fit_linear_probe(features, labels, 3, clusters=patients)
    unknown = found.held_out.isnan().any(1)
    assert torch.equal(unknown, labels == 2) and found.strength in probe.STRENGTHS
    [(rest, part)] = probe.parts(np.array([0, 1, 0]), 2, np.array([0, 0, 1]))  # the other one's rest knows one class
    assert (rest.tolist(), part.tolist()) == ([0, 2, 3, 5], [1, 4])  # in both views
    of_others = found.held_out[~unknown]
    assert (of_others.argmax(1) == labels[~unknown]).float().mean() > 0.6
    # Of one patient, or one of each class, nothing is left to validate on.
    one = torch.zeros_like(labels)
    found = [probe.fit_linear_probe(features, labels, 3, clusters=patients) for patients in (one, labels)]
    first = (labels == 0).float()[:, None]
    found += [fit(features, first, clusters=one) for fit in (probe.fit_one_vs_rest, probe.fit_ridge)]
    assert all(head.strength == 1 and head.held_out is None for head in found)


def test_a_feature_that_is_constant_but_for_rounding_is_no_feature():
    """Divided by its spread it would be as large as any, and tell noise apart."""
    targets = (torch.arange(40) % 2).float()[:, None]
    useful = targets + 0.3 * torch.randn(40, 1)
    nearly = torch.where(targets > 0, torch.tensor(1000.0).nextafter(torch.tensor(2000.0)), torch.tensor(1000.0))
    for fit in (probe.fit_one_vs_rest, probe.fit_ridge):
        assert fit(torch.cat([useful, nearly], 1), targets).weight[0, 1].abs() < 0.1
    assert probe.SCALINGS["length"](nearly.expand(40, 9)).rows.abs().max() < 0.1  # nor are images alike but for that


def test_scipy_has_one_thread_while_pytorch_has_its_own(monkeypatch):
    """Else the threads of both wait for each other, and a fit takes eight times as long."""
    threads = []
    minimize = scipy.optimize.minimize

    def noted(*given, **options):
        threads.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return minimize(*given, **options)

    monkeypatch.setattr(scipy.optimize, "minimize", noted)
    with threadpool_limits(2, "blas"):
        probe.fit_linear_probe(torch.eye(4), torch.tensor([0, 0, 1, 1]), 2)
    assert threads and set(threads) == {1}


def test_the_loss_of_a_probe_is_the_mean_over_what_was_held_out():
    labels = torch.arange(30) % 3
    weights = torch.tensor([1.0, 2.0, 6.0])
    found = probe.fit_linear_probe(torch.randn(30, 4), labels, 3, class_weights=weights)
    assert found.loss == pytest.approx(F.cross_entropy(found.held_out, labels, weights).item())
    assert probe.fit_linear_probe(torch.randn(3, 4), torch.arange(3), 3).loss == math.inf  # nothing can be
    numbers = torch.tensor([[0.0], [1], [2], [3], [5], [9]])  # of which the features say nothing: the others' mean
    assert probe.fit_ridge(torch.zeros(6, 2), numbers).loss == pytest.approx(18.125)
    assert probe.fit_ridge(numbers, numbers).loss < 0.1
