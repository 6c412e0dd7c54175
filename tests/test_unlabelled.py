"""Where the head starts by images without labels: hand-made clusters, and numbers in closed form."""

import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from toolkit.answers import probe, unlabelled

CLASSES = 3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(images: int, seed: int, apart: float = 0.6) -> tuple[Tensor, Tensor]:
    """Images (N, 30) around a centre for each class, far from 0, with noise that hides the centres from a few."""
    labels = torch.arange(images) % CLASSES
    return 10 + apart * normal(CLASSES, 30, seed=0)[labels] + normal(images, 30, seed=seed), labels


def contradicting(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 30) in three clusters, in each of which are all three classes."""
    labels = torch.arange(images) % CLASSES
    clusters = torch.randint(3, (images,), generator=torch.Generator().manual_seed(seed))
    return 10 + 2 * normal(3, 30, seed=0)[clusters] + normal(images, 30, seed=seed), labels


class Drawn:
    """Labelled images of a drawn kind, in two views, 300 images without labels, and the probe of the labelled ones."""

    def __init__(self, draw, per_class: int, patients: Tensor | None = None):
        features, labels = draw(CLASSES * per_class, seed=1)
        self.features = torch.cat([features, features + 0.1 * normal(*features.shape, seed=2)])
        self.labels = labels.repeat(2)
        self.others, self.truth = draw(300, seed=3)
        self.plain = probe.fit_linear_probe(self.features, self.labels, CLASSES, views=2, clusters=patients)
        self.images, self.known = unlabelled.seen(self.features, self.labels, self.others, CLASSES)

    def start(self) -> unlabelled.Start:
        return unlabelled.start(self.images, self.known, self.plain, views=2)

    def held_out(self) -> dict[str, Tensor]:
        return unlabelled.held_out_answers(self.images, self.known, self.plain, 2, None)


def placed(labelled: int, others: int = 300) -> tuple[unlabelled.Images, unlabelled.Labelled, Tensor]:
    """Images, of which so many have labels; what is known of these, and the classes of the others."""
    features, labels = clustered(labelled, seed=1)
    more, truth = clustered(others, seed=3)
    return *unlabelled.seen(features, labels, more, CLASSES), truth


def accuracy(head: probe.Probe) -> float:
    features, labels = clustered(600, seed=4)
    return ((features @ head.weight.T + head.bias).argmax(1) == labels).float().mean().item()


def test_clusters_of_images_without_labels_move_the_head():
    """With a head at the temperature that fits what is held out, from which that of a run's end follows."""
    drawn = Drawn(clustered, 5)
    found = drawn.start()
    assert found.name == "k-means" and found.gain_loss > 0 and found.gain_accuracy >= 0
    assert accuracy(found.probe) > accuracy(drawn.plain) + 0.02
    assert (found.answers.argmax(1) == drawn.truth).float().mean() > 0.9
    torch.testing.assert_close(found.answers.sum(1), torch.ones(300))
    answers = drawn.held_out()["k-means"]
    temperature = unlabelled.judge(answers, drawn.labels, 2).temperature
    assert answers.isfinite().all() and not 0.9 < temperature < 1.1
    torch.testing.assert_close(found.probe.held_out, answers[0] / temperature)
    soft = (unlabelled.k_means(drawn.images, drawn.known) / temperature).softmax(1)
    torch.testing.assert_close(found.probe.weight, unlabelled.distilled(drawn.images, drawn.known, soft)[0])


def test_clusters_that_are_no_classes_leave_the_probe_as_it_is():
    """As does one image a class, of which nothing can be checked."""
    alone = Drawn(clustered, 1)
    drawn = Drawn(contradicting, 10)
    for of in (alone, drawn):
        found = of.start()
        assert found.probe is of.plain and (found.name, found.gain_loss, found.gain_accuracy) == ("probe", 0, 0)
    held_out = drawn.held_out()
    torch.testing.assert_close(held_out["probe"][0], drawn.plain.held_out, atol=0.1, rtol=0)  # by rough steps
    temperature = unlabelled.judge(held_out["probe"], drawn.labels, 2).temperature
    assert abs(math.log(temperature)) > 0.1  # as unsure as what is held out shows
    logits = drawn.others @ drawn.plain.weight.T + drawn.plain.bias
    torch.testing.assert_close(found.answers, (logits / temperature).softmax(1))


def test_the_images_of_a_patient_are_held_out_together(monkeypatch):
    """k-means knows the labels of whole patients, in both views, and answers for the others."""
    patients = torch.arange(30) // 2
    shown = []

    def k_means(images: unlabelled.Images, known: unlabelled.Labelled) -> Tensor:
        shown.append(known.places)
        assert torch.equal(known.counts[:, 0], 1.0 + known.places)  # each with its own weight
        return torch.zeros(len(images.rows), CLASSES)

    monkeypatch.setattr(unlabelled, "k_means", k_means)
    monkeypatch.setattr(unlabelled, "foreign", lambda _, rows, views, of: rows + views + of.max())
    drawn = Drawn(clustered, 10, patients)
    known = drawn.known._replace(counts=1.0 + torch.arange(60)[:, None])
    found = unlabelled.start(drawn.images, known, drawn.plain, views=2, clusters=patients)
    assert found.foreign == 60 + 2 + 14
    assert len(shown) == 2 * probe.FOLDS
    of = torch.cat([patients, patients])
    for places in shown:
        left = np.setdiff1d(np.arange(60), places.numpy())
        assert not np.intersect1d(of[places], of[left]).size
    assert not torch.equal(shown[0], shown[probe.FOLDS])  # another turn deals anew


@pytest.mark.parametrize(
    ("patients", "views", "expected"),
    # Labelled images are 10 degrees from another or, of other patients, 20, 10 and 10: 9 in 10 are at most 18.4.
    [(None, 1, [0, 1, 1, 1]), (None, 2, [0, 1, 1, 1]), ([0, 0, 1], 1, [0, 0, 1, 1]), ([0, 0, 0], 1, [0, 0, 0, 0])],
)
def test_images_that_are_like_no_labelled_one_are_foreign(monkeypatch, patients, views, expected):
    """Less alike than 9 in 10 labelled ones are to another, which is no view of it and no image of its patient."""
    monkeypatch.setitem(probe.SCALINGS, "deviation", lambda rows: SimpleNamespace(rows=rows))  # it is set aside
    degrees = torch.tensor([*[0, 10, 20, 1, 11, 90][: 3 * views], -5, 38, 39, 190]).deg2rad()  # 5, 18, 19 and 170
    rows = torch.stack([degrees.cos(), degrees.sin()], 1) * torch.arange(1.0, len(degrees) + 1)[:, None]
    clusters = patients and torch.tensor(patients)
    found = unlabelled.foreign(unlabelled.Images(rows, torch.zeros(0)), 3 * views, views, clusters)
    assert found.tolist() == expected


def test_foreign_images_do_not_train_where_they_are_more_than_chance_explains():
    for foreign, expected in (([1, 0, 0, 1, 0], [0, 1, 2, 3, 4]), ([1, 0, 1, 1, 0], [1, 4])):
        found = unlabelled.Start(None, "probe", None, 0, 0, torch.tensor(foreign) > 0)
        assert found.of_their_kind().tolist() == expected


def test_held_out_answers_are_judged_at_the_temperature_that_fits():
    """Three of four right by a logit of 6 are as sure as they should be at a temperature of 6 / log 3."""
    labels = torch.tensor([0, 0, 0, 1] * 2)
    logits = torch.tensor([6.0, 0.0]).repeat(2, 8, 1)
    judged = unlabelled.judge(logits, labels, views=2)
    assert judged.temperature == pytest.approx(6 / math.log(3), rel=1e-3)
    torch.testing.assert_close(judged.losses, -torch.tensor([0.75, 0.75, 0.75, 0.25]).log(), atol=1e-3, rtol=0)
    assert judged.hits.tolist() == [1, 1, 1, 0]
    logits[0, 3] = logits[0, 7] = logits[:, 1] = logits[:, 5] = torch.nan  # answered once, and never: so four of five
    judged = unlabelled.judge(logits, labels, views=2)
    assert judged.temperature == pytest.approx(6 / math.log(4), rel=1e-3)
    assert judged.hits[[0, 2, 3]].tolist() == [1, 1, 0] and judged.hits[1].isnan() and judged.losses[1].isnan()


def test_answers_that_are_not_sure_teach_the_head_nothing():
    """Others count by how sure they are, here of a class or of (0.8, 0.1, 0.1), all together thrice as labels do."""
    images, known, truth = placed(30, others=90)
    known = known._replace(counts=torch.full((30, 1), 2.0).double())
    answers = torch.full((120, CLASSES), 1 / CLASSES)
    answers[30:60] = torch.eye(CLASSES)[truth[:30]]
    answers[45:60] = 0.1 + 0.7 * answers[45:60]
    sure = torch.ones(30, 1)
    sure[15:] = 1 + (0.8 * math.log(0.8) + 0.2 * math.log(0.1)) / math.log(3)
    weight, bias = unlabelled.distilled(images, known, answers)
    targets = torch.cat([known.targets, answers[30:60].double()])
    rows = probe.SCALINGS["deviation"](images.rows).rows
    counts = torch.cat([known.counts, 3.0 * 60 * sure / sure.sum()])
    fitted = probe.logistic(rows[:60], targets, counts, unlabelled.DISTILLED, probe.softmax_loss, intercept=True)
    expected = rows @ fitted[:, :-1].float().T + fitted[:, -1].float()
    torch.testing.assert_close(images.rows @ weight.T + bias, expected, atol=0.02, rtol=0)


def test_k_means_begins_at_the_means_of_the_classes_and_ends_at_the_clusters(monkeypatch):
    images, known, _ = placed(6)
    centres = torch.nn.functional.normalize(images.whitened[:3] + images.whitened[3:6], dim=1)
    monkeypatch.setattr(unlabelled, "ROUNDS", 1)
    logits = unlabelled.SHARPNESS * images.whitened @ centres.T + 0.5 * math.log(1 / CLASSES)
    torch.testing.assert_close(unlabelled.k_means(images, known), logits)
    monkeypatch.setattr(unlabelled, "ROUNDS", 2)  # of an image of each class, the first of weight 3, and one between
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5**0.5, 0.5**0.5]])
    labelled = unlabelled.Labelled(torch.arange(2), torch.eye(2).double(), torch.tensor([[3.0], [1.0]]).double())
    centre = torch.nn.functional.normalize(torch.tensor([4 + 0.5 * 0.5**0.5, 0.5 * 0.5**0.5]), dim=0)
    expected = 15 * centre[0] + 0.5 * math.log(4.5 / 7)
    torch.testing.assert_close(unlabelled.k_means(unlabelled.Images(points, points), labelled)[0, 0], expected)


def test_points_have_one_length_and_directions_about_the_same_spread():
    """Whatever a feature is measured in; directions of noise stay small."""
    features, _ = clustered(200, seed=1)
    images = unlabelled.placed(features)
    torch.testing.assert_close(images.whitened.norm(dim=1), torch.ones(200))
    scaled = unlabelled.placed(features * 10.0 ** torch.linspace(-2, 2, 30) + 5)
    similar = images.whitened @ images.whitened.T
    torch.testing.assert_close(scaled.whitened @ scaled.whitened.T, similar, atol=1e-2, rtol=0)
    # Two directions, and 126 in which nothing varies; in closed form.
    spreads = torch.tensor([1.8, 0.2]).sqrt()
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    rows = torch.nn.functional.pad(torch.cat([signs, -signs]) * spreads @ signs / 2**0.5, (0, 138))
    first, second, *_ = unlabelled.placed(rows).whitened
    p, q = (spreads / (spreads + 0.3 * (spreads.sum() + 126e-6) / 128)).square()
    torch.testing.assert_close(first @ second, (p - q) / (p + q), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("gains", "right", "patients", "taken"),
    [
        ([0.1, 0.9, 0.1, 0.9, math.nan], 3, None, True),  # a mean of 0.5, whose standard error is 0.2
        ([0.1, 0.9, 0.1, 0.9, math.nan], 2, None, False),
        ([-0.1, 1.1, -0.1, 1.1, math.nan], 3, None, False),  # whose standard error is 0.3
        ([0.1, 0.9, 0.1, 0.9, math.nan], 3, torch.tensor([0, 1, 0, 1, 1]), False),  # over patients it is 0.28
    ],
)
def test_k_means_is_taken_if_its_loss_is_lower_by_two_errors(monkeypatch, gains, right, patients, taken):
    """And if no less is right: the probe has three of four right. Of a fifth image nothing was held out."""
    of_probe = unlabelled.Judged(1.0, torch.full((5,), 1.0), torch.tensor([1.0, 1.0, 1.0, 0.0, math.nan]))
    of_k_means = unlabelled.Judged(1.0, 1.0 - torch.tensor(gains), (torch.arange(5) < right).float())
    answers = dict.fromkeys(("probe", "k-means"), torch.zeros(2, 5, CLASSES))
    monkeypatch.setattr(unlabelled, "held_out_answers", lambda *_: answers)
    monkeypatch.setattr(unlabelled, "judge", mock.Mock(side_effect=[of_probe, of_k_means]))
    features, labels = clustered(5, seed=1)
    plain = probe.fit_linear_probe(features, labels, CLASSES)
    images, known, _ = placed(5, others=60)
    found = unlabelled.start(images, known, plain, clusters=patients)
    assert (found.probe is not plain) == taken and (found.name == "k-means") == taken


def test_what_is_held_out_is_judged_as_it_is_and_by_one_view(monkeypatch):
    """Seven more views, which nobody can tell, would make the answers for plain images look unsure."""
    drawn = Drawn(clustered, 6)
    expected = drawn.start()
    n = len(drawn.labels) // 2
    more = [torch.cat([of, *[of[n:]] * 7]) for of in (drawn.features, drawn.labels)]
    blurred = {name: torch.cat([of, torch.zeros(2, 7 * n, CLASSES)], 1) for name, of in drawn.held_out().items()}
    monkeypatch.setattr(unlabelled, "held_out_answers", lambda *_: blurred)
    found = unlabelled.start(*unlabelled.seen(*more, drawn.others, CLASSES, 9), drawn.plain, views=9)
    assert found.name == expected.name and found.gain_loss == pytest.approx(expected.gain_loss)
    assert 0 < found.foreign.float().mean() < 0.2  # else images would be alike to their own views


def test_the_last_head_is_k_means_distilled_and_asks_no_labels_that_were_held_out(monkeypatch):
    """Clusters far apart: a head by them is nearly perfect, where that of three labels is not."""
    monkeypatch.setattr(unlabelled, "held_out_answers", None)
    drawn = Drawn(clustered, 3)
    found = unlabelled.last_head(drawn.images, drawn.known)
    soft = unlabelled.k_means(drawn.images, drawn.known).softmax(1)
    weight, bias = unlabelled.distilled(drawn.images, drawn.known, soft)
    assert torch.equal(found.weight, weight) and torch.equal(found.bias, bias)
    assert accuracy(found) > accuracy(drawn.plain) + 0.02


def test_the_views_of_an_image_weigh_against_other_images_as_one():
    """However many views of three images there are, images without labels count for as much; and classes as asked."""
    rows = torch.randn(12, 4), torch.tensor([0, 1, 1] * 4), torch.randn(5, 4)
    images, known = unlabelled.seen(*rows, 2, 4, None)
    assert known.counts[:, 0].tolist() == pytest.approx([1.0] * 3 + [1 / 3] * 9) and len(images.rows) == 17
    _, known = unlabelled.seen(*rows, 2, 4, torch.tensor([1.5, 0.75]))
    assert known.counts[:6, 0].tolist() == pytest.approx([3 / 2, 3 / 4, 3 / 4, 1 / 2, 1 / 4, 1 / 4])
