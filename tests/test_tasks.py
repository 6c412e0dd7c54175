"""toolkit/answers/tasks.py: each task against the dense stock computation, with gradients; what unknown targets do."""

import math
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from toolkit import InputError, choices, devices
from toolkit.answers import evaluation, measures, multilabel, parts, probe, regression, tasks
from toolkit.images.data import LabelledImages

NAMES = ["cat", "dog", "eel"]


def drawn(images: int = 40, unknown: float = 0.3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs (N, 3) that train, and 0, 1 or NaN (N, 3)."""
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.rand(images, 3, generator=generator) < torch.tensor([0.5, 0.3, 0.2])).float()
    outputs = torch.randn(images, 3, generator=generator) + 2 * targets
    targets[torch.rand(images, 3, generator=generator) < unknown] = torch.nan
    return outputs.requires_grad_(), targets


def images_of(targets: torch.Tensor) -> LabelledImages:
    return LabelledImages([None] * len(targets), [0] * len(targets), targets=targets)


def network() -> nn.Module:
    return nn.Sequential(OrderedDict(fc=nn.Linear(6, 3)))


def test_a_label_that_is_unknown_is_as_if_it_were_not_there():
    outputs, targets = drawn()
    known = ~targets.isnan()
    loss = tasks.MultiLabel(NAMES, targets).loss(outputs, targets)
    [gradient] = torch.autograd.grad(loss, outputs)
    stock = F.binary_cross_entropy_with_logits(outputs[known], targets[known], reduction="sum") / 3
    [expected] = torch.autograd.grad(stock, outputs)
    torch.testing.assert_close(loss, stock)
    torch.testing.assert_close(gradient, expected)
    assert gradient[~known].eq(0).all()
    assert tasks.MultiLabel(NAMES, targets).loss(outputs, evaluation.no_labels(targets)) == 0


def test_balanced_weights_are_positive_weights_and_leave_a_label_its_weight():
    outputs, targets = drawn(images=200)
    args = SimpleNamespace(class_weights="balanced", threshold="sensitivity=0.9")
    task = tasks.MultiLabel.of_run(NAMES, images_of(targets), args)
    assert task.goal == "sensitivity=0.9"
    known = ~targets.isnan()
    positive = targets == 1
    ratio = (known.sum(0) - positive.sum(0)) / positive.sum(0)
    torch.testing.assert_close(task.weights[1] / task.weights[0], ratio)  # PyTorch's pos_weight
    assert task.constant_logits.abs().max() < 1e-6  # where all count alike no answer is likelier
    weights = torch.where(positive, task.weights[1], task.weights[0]) * known
    torch.testing.assert_close(weights.sum(0), known.sum(0).float())
    stock = F.binary_cross_entropy_with_logits(outputs, targets.nan_to_num(), weights, reduction="sum") / 3
    torch.testing.assert_close(task.loss(outputs, targets), stock)
    torch.testing.assert_close(task.plain_loss(outputs, targets), tasks.MultiLabel(NAMES).loss(outputs, targets))
    only = tasks.MultiLabel(["all", "none"], torch.tensor([[1.0, 0.0]] * 4), balanced=True)
    assert only.weights.eq(1).all() and only.constant_logits.isfinite().all()


def test_figures_are_scikit_learns_over_the_images_of_which_a_label_is_known():
    outputs, targets = drawn(images=80)
    values = outputs.detach().sigmoid()
    answers = multilabel.LabelAnswers(0.0, values, targets)
    known = ~targets.isnan()
    pairs = [(targets[known[:, k], k], values[known[:, k], k]) for k in range(3)]
    precisions = [metrics.average_precision_score(*pair) for pair in pairs]
    assert answers.weighted(torch.ones(1, 80))["average_precision"][0].tolist() == pytest.approx(precisions, abs=1e-12)
    assert answers.score == answers.measured()["macro_ap"] == pytest.approx(np.mean(precisions), abs=1e-12)
    areas = [metrics.roc_auc_score(*pair) for pair in pairs]
    assert answers.measured()["macro_auroc"] == pytest.approx(np.mean(areas), abs=1e-12)
    sums = torch.stack([values, targets, torch.ones(80, 3)])[:, known].sum(1)
    assert answers.reliability().sum(0).tolist() == pytest.approx(sums.tolist())
    weights = torch.stack([torch.ones(80), torch.arange(80) % 4])  # each answer weighs as its image
    each = weights[:, :, None].expand(2, 80, 3)[:, known]
    expected = [metrics.average_precision_score(targets[known], values[known], sample_weight=of) for of in each]
    assert answers.weighted(weights)["micro_ap"].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_constant_answer_has_the_entropy_for_its_loss_and_the_shares_for_its_score():
    _, targets = drawn(images=200)
    task = tasks.MultiLabel(NAMES, targets)
    images = images_of(targets)
    shares = targets.nanmean(0)
    assert task.constant_score(images) == pytest.approx(shares.mean().item())
    constant = shares.logit().expand(200, 3)
    assert task.constant_loss(images) == pytest.approx(task.plain_loss(constant, targets).item() / 200)
    torch.testing.assert_close(task.constant_logits, shares.logit(), atol=0.1, rtol=0)
    assert task.counts(images) == dict(enumerate((targets == 1).sum(0).tolist()))
    classes = LabelledImages([None] * 4, [0, 2, 2, 2])
    assert tasks.Classification(NAMES).constant_score(classes) == 3 / 4
    assert tasks.Classification(NAMES).constant_loss(classes) == pytest.approx(math.log(4) - 0.75 * math.log(3))
    pixels = images_of(torch.tensor([[8.0, 0, 1], [4, 0, 3]]))  # of which one class is nowhere: its IoU is in no mean
    masks = tasks.TASKS["segmentation"](NAMES)
    assert masks.constant_score(pixels) == pytest.approx(12 / 16 / 2)
    assert masks.counts(pixels) == {0: 2, 1: 0, 2: 2}
    # An image of ten known pixels says as much as one of a hundred, and one without any says nothing.
    pixels = images_of(torch.tensor([[9.0, 1, 0], [10, 90, 0], [0, 0, 0]]))
    assert masks.constant_loss(pixels) == pytest.approx(math.log(2))


def test_the_variance_of_a_score_in_closed_form():
    """Labels of 5 and 2 positives in 10 images; and Olkin and Finn's variance of R2, 4 R2 (1 - R2)^2 / n."""
    targets = torch.zeros(10, 3)
    targets[:5, 0] = 1
    targets[:2, 1] = 1  # the third has no positive, and no part
    labels = tasks.MultiLabel(NAMES, targets)
    assert labels.variance(0.8, 50) == pytest.approx(0.8 * 0.2 * (1 / 25 + 1 / 10) / 2 / 2)
    assert labels.variance(0.8, 2) == pytest.approx(0.8 * 0.2 / 2)  # of one positive each at least
    assert tasks.MultiLabel(NAMES).variance(0.8, 50) == math.inf
    numbers = tasks.Regression(["age"], torch.tensor([[0.0], [1.0]]))
    assert numbers.variance(0.9, 100) == pytest.approx(4 * 0.9 * 0.1**2 / 100)
    assert numbers.variance(-3.0, 100) == numbers.variance(0.01, 100)  # of one near 0 that of 1 / images
    assert numbers.variance(0.01, 100) == pytest.approx(4 * 0.01 * 0.99**2 / 100)


def test_a_head_of_labels_that_gives_the_constant_answer_is_as_soft_as_it_can_be():
    """What counts for its temperature is how far its logits are from that answer, which of rare labels is not 0."""
    targets = (torch.arange(20)[:, None] < torch.tensor([2, 8, 10])).float()
    head = tasks.MultiLabel(NAMES, targets)
    model = network()
    probe.set_head(model, probe.Probe(torch.zeros(3, 6), head.constant_logits, 1.0))
    assert model.fc.bias[0] < -1.5 and -1 < model.fc.bias[1] < 0
    least, per_rate, *_ = head.first_temperature(model, torch.randn(20, 6), targets, True)
    assert (least, per_rate) == (1.0, pytest.approx(0, abs=1e-3))
    head.soften(model, 5.0)
    torch.testing.assert_close(model.fc.bias, head.constant_logits)
    probe.set_head(model, probe.Probe(torch.zeros(3, 6), torch.tensor([-4.0, 0.0, 0.0]), 1.0))
    balanced = tasks.MultiLabel(NAMES, targets, balanced=True)  # where no is the answer for all, as many are wrong
    assert balanced.first_temperature(model, torch.randn(20, 6), targets, True).least == max(probe.TEMPERATURES)


@pytest.mark.parametrize("kind", ["labels", "classes"])
def test_a_believable_temperature_is_that_of_the_views_times_the_optimism(kind):
    outputs, targets = drawn(200, unknown=0.0)
    task = tasks.MultiLabel(NAMES, targets)
    if kind == "classes":
        task = tasks.Classification(NAMES)
        targets = (outputs.argmax(1) + (torch.arange(200) % 5 == 0)) % 3
    outputs = outputs.detach()
    constant = task.constant_logits

    def loss(shown: torch.Tensor) -> torch.Tensor:
        if kind == "labels":
            smoothed = targets * (1 - parts.VIEW_SMOOTHING) + parts.VIEW_SMOOTHING / 2
            return F.binary_cross_entropy_with_logits(shown + constant, smoothed.double())
        return F.cross_entropy(shown, targets, label_smoothing=parts.VIEW_SMOOTHING)

    views = measures.fit_temperature(outputs - constant, loss)
    assert task.believable_temperature(outputs, targets, 2.0) == pytest.approx(2 * views, rel=1e-3)
    task.calibrate(outputs, targets, task.believable_temperature(outputs, targets, None))  # the head was no probe
    assert task.temperature == 1 and (kind == "classes" or task.thresholds.ne(0.5).any())


def test_thresholds_reach_their_goal_with_the_head_as_it_is_kept():
    """Its logits were divided by the temperature: thresholds of other probabilities reach less or more."""
    outputs, targets = drawn(400, unknown=0.0)
    outputs = 8 * outputs.detach()
    targets[:, 2] = 0.0  # a label that nothing has keeps its threshold
    task = tasks.MultiLabel(NAMES, targets, goal="sensitivity=0.95")
    task.calibrate(outputs, targets, 6.0)
    constant = task.constant_logits
    kept = ((outputs - constant) / task.temperature + constant).sigmoid()
    assert task.thresholds[2] == 0.5
    reached = task.answers(kept.logit(), targets).rates(task.thresholds, torch.ones(1, 400))["sensitivity"][0, :2]
    positives = targets.sum(0)[:2]
    assert (reached >= 0.95).all() and (reached < 0.95 + 1.01 / positives).all()


def test_the_loss_of_numbers_is_the_squared_error_in_standard_deviations():
    outputs, unknown = drawn(images=30)
    targets = 50 * torch.randn(30, 3) + 1000 + 0 * unknown
    task = tasks.Regression(NAMES, targets)
    known = ~targets.isnan()
    centred = targets - targets.nanmean(0)
    wanted = centred / centred.square().nanmean(0).sqrt()
    stock = F.mse_loss(outputs[known], wanted[known], reduction="sum") / 3
    loss = task.loss(outputs, targets)
    torch.testing.assert_close(loss, stock, rtol=1e-3, atol=1e-3)
    gradients = [torch.autograd.grad(value, outputs)[0] for value in (loss, stock)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    assert gradients[0][~known].eq(0).all()
    assert task.constant_loss(images_of(targets + 70)) == pytest.approx(known.sum().item() / 90, rel=1e-3)
    assert task.constant_score(images_of(targets)) == 0
    torch.testing.assert_close(task.in_units(task.standardised(targets)).float(), targets, equal_nan=True)
    for column in ([3.0, 3.0, 3.0], [1.0, math.nan, math.nan], [math.nan] * 3):
        with pytest.raises(InputError, match="the number age is the same in all training images"):
            tasks.Regression(["age"], torch.tensor(column)[:, None])


@pytest.mark.parametrize("first", [1.7e9, -1.7e9])
def test_numbers_far_from_zero_are_told_from_each_other(first):
    """Seconds since 1970, some minutes apart: float32 knows two minutes, and six digits ten days."""
    minutes = 5 * torch.arange(20, dtype=torch.float64)
    truth = torch.stack([first + 60 * minutes, minutes], 1)
    task = tasks.Regression(["time", "minutes"], truth)
    outputs = task.standardised(truth).float()
    assert task.loss(outputs, truth) < 1e-9
    assert devices.to_device(truth, torch.device("mps")) is truth  # which has no float64, and gets what is standardised
    answers = regression.NumberAnswers(0.0, task.in_units(outputs), truth)
    assert answers.score == pytest.approx(1)
    _, rows = task.table(outputs)
    assert [float(row[0]) for row in rows] == pytest.approx(truth[:, 0].tolist(), abs=0.1)
    assert task.output_layer()(outputs).double() == pytest.approx(truth, abs=0.1)
    again = tasks.from_record(task.record(), task.names, "lora.pth")
    assert torch.equal(again.in_units(outputs), task.in_units(outputs))
    assert list(map(float, task.report(answers).answer_columns()["time"])) == truth[:, 0].tolist()
    assert regression.number_text(first / 3, spread=600) == f"{first / 3:.11g}"  # a million times the spread, nearly


def test_numbers_are_measured_in_their_own_units():
    """The mean is of the numbers that have a figure: the last one never varies here."""
    truth = torch.tensor([[10.0, 1, 7], [20, math.nan, 7], [40, 3, 7], [30, 5, 7]])
    answers = regression.NumberAnswers(0.0, torch.tensor([[12.0, 2, 8], [18, 9, 6], [40, 3, 7], [30, 4, 7]]), truth)
    assert answers.measured()["mae"] == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    assert answers.score == pytest.approx((1 - 8 / 500 + 1 - 2 / 8) / 2)
    assert answers.measured()["spearman"] == pytest.approx(1)


def features_for(kind: str) -> tuple[torch.Tensor, torch.Tensor, tasks.Task]:
    """Features (N, 6) in which the answers are, the targets, and the task."""
    outputs, targets = drawn(images=300, unknown=0.1)
    features = torch.cat([outputs.detach(), torch.randn(300, 3, generator=torch.Generator().manual_seed(3))], 1)
    if kind == "classification":
        return features, outputs.detach().argmax(1), tasks.Classification(NAMES)
    if kind == "multilabel":
        return features, targets, tasks.MultiLabel(NAMES, targets)
    numbers = features[:, :3] * 7 + 100 + 0 * targets
    return features, numbers, tasks.Regression(NAMES, numbers)


@pytest.mark.parametrize("kind", ["classification", "multilabel", "regression"])
def test_the_head_starts_as_a_probe_whose_score_is_that_of_its_evaluation(kind):
    features, targets, task = features_for(kind)
    model = network()
    random = task.probe_score(model, features, targets)
    task.start(model, features, targets)
    score = task.probe_score(model, features, targets)
    assert score > max(0.75, random + 0.2)
    result = task.evaluate(model, DataLoader(TensorDataset(features, targets), batch_size=64), torch.device("cpu"))
    assert result.measured()[task.score] == pytest.approx(score, abs=1e-6)
    loss, right = task.progress(model(features).detach(), targets)
    assert loss.item() == pytest.approx(result.loss * len(features), rel=1e-4)
    assert right == {"classification": round(score * len(features))}.get(kind, 0)
    if kind == "classification":
        torch.testing.assert_close(result.confidences, model(features).softmax(1).amax(1))
    task.soften(model, task.first_temperature(model, features, targets, features_train=True).at(1e-3))
    assert task.probe_score(model, features, targets) == pytest.approx(score, abs=0.02)


@pytest.mark.parametrize(("asked", "expected"), [("none", [0.8, 0.1, 0.1]), ("balanced", [1 / 3] * 3)])
def test_the_head_starts_at_a_probe_that_weighs_classes_as_the_loss_does(asked, expected):
    """Of 30 images 24 are cats, and nothing in the features tells: so balanced answers differ."""
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0] * 24 + [1] * 3 + [2] * 3)
    args = SimpleNamespace(class_weights=asked, label_smoothing=0.0)
    task = tasks.Classification.of_run(NAMES, SimpleNamespace(labels=labels.tolist()), args)
    model = network()
    task.start(model, features.repeat(2, 1), labels.repeat(2), views=2)
    assert model.fc(features).softmax(1).mean(0).tolist() == pytest.approx(expected, abs=0.05)
    assert {image for image, *_ in task.contradicted} <= set(range(30))  # each once, whatever its views


def test_the_optimism_is_how_much_surer_the_probe_is_of_images_that_trained_it():
    features, labels, task = features_for("classification")
    model = network()
    task.start(model, features, labels)
    found = tasks.optimism(task, model, features, labels)
    views = task.fitted_temperature(model(features).detach(), labels, smoothing=parts.VIEW_SMOOTHING)
    assert found * views == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "features_train"),
    [({}, False), ({"lora_rank": 1}, True), ({"norms": "train"}, True), ({"freeze_backbone": False}, True)],
)
def test_a_start_is_measured_as_a_probe_and_softened_as_the_head_that_it_becomes(options, features_train):
    """By views, and further where features train. Here images without labels make a random head of a good one."""
    features, labels, task = features_for("classification")
    model = network()
    views = features + 0.1 * torch.randn(features.shape), labels
    mixed = probe.Probe(torch.randn(3, 6), torch.zeros(3), 1.0, held_out=torch.randn(600, 3))
    task.start_by_unlabelled = lambda *_: SimpleNamespace(probe=probe.set_head(model, mixed))
    given = tasks.Features((features, labels), (features, labels), views, (features, labels))
    args = SimpleNamespace(**{"head_init": "probe", "lora_rank": 0, "norms": "auto", "freeze_backbone": True} | options)
    baseline, temperature, _ = tasks.start_head(task, model, given, args, None)
    assert baseline["probe"] > 0.75 > task.probe_score(model, *views)
    expected = task.first_temperature(model, *views, features_train)
    assert temperature == expected._replace(optimism=tasks.optimism(task, model, *views))
    assert (temperature.per_rate > 0) == features_train
    mixed = mixed._replace(held_out=None)  # as of one image a class
    assert tasks.start_head(task, model, given, args, None)[1].optimism is None


def test_a_record_is_read_as_it_was_written_and_refused_where_it_is_of_something_else():
    two_images = torch.tensor([[1.0, 0, 0], [0, 2, 3]])
    for kind, named in tasks.TASKS.items():
        targets = [two_images] if kind in ("multilabel", "regression") else []
        task, other = (named(NAMES, *targets) for _ in range(2))
        if kind == "multilabel":
            task.thresholds = torch.tensor([0.25, 0.5, 0.75])
        task.temperature = 3.0
        again = tasks.from_record(task.record(), NAMES, "lora.pth")
        assert type(again) is type(task) and again.record() == task.record()
        other.take_chosen(task.chosen())
        assert other.chosen() == task.chosen()
        # What keeps the best epoch is a column of the metrics.
        assert {*choices.KEEP_BEST[kind].values()} <= {f"val_{figure}" for figure in named.Report.HEADLINES}
    for record in (
        "multilabel",
        {"kind": "detection"},
        {"kind": ["multilabel"]},
        {"kind": "multilabel"},
        {"kind": "multilabel", "thresholds": [0.5]},
        {"kind": "multilabel", "thresholds": [0.5, 0.5, math.nan]},
        {"kind": "regression", "mean": [0.0] * 3, "std": ["1"] * 3},
    ):
        with pytest.raises(InputError, match=r"lora\.pth is (of another version|damaged)"):
            tasks.from_record(record, NAMES, "lora.pth")
