"""toolkit/answers/measures.py: against the formulas written out, and at the ends of each range."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest, entropy, norm, spearmanr
from scipy.stats import t as student
from sklearn import metrics

from toolkit.answers import answer_reports, measures, multilabel, tasks

RANKINGS = {"average_precision": metrics.average_precision_score, "auroc": metrics.roc_auc_score}


def test_effective_rank_counts_directions():
    features = torch.randn(40, 6)
    values = torch.linalg.svdvals(features - features.mean(0))
    assert measures.effective_rank(features) == pytest.approx(math.exp(entropy(values)), rel=1e-4)
    axes = torch.cat([torch.eye(4), -torch.eye(4)])
    assert measures.effective_rank(axes[:, :3] + 7) == pytest.approx(3)  # wherever they lie
    assert measures.effective_rank(torch.ones(5, 3)) == 1


@pytest.mark.parametrize(("hits", "images"), [(0, 1), (0, 10), (12, 24), (54, 60), (352, 359), (9, 9), (399, 399)])
def test_the_interval_of_a_share_is_wilsons(hits, images):
    found = measures.share_interval(torch.arange(images) < hits)
    assert found == pytest.approx(tuple(binomtest(hits, images).proportion_ci(method="wilson")), abs=1e-9)
    assert hits > 0 or found[0] == 0  # exactly
    assert hits < images or found[1] == 1
    share = hits / images
    low, high = measures.mean_interval(torch.tensor([share, share], dtype=torch.float64), images)
    halves = (share - found[0]) / 2**0.5, (found[1] - share) / 2**0.5  # of the mean of two that are as sure
    assert (share - low, high - share) == pytest.approx(halves)


def ranked(scores: torch.Tensor, positive: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """AP and AUROC of images by their scores (N,), (n, 2) for weights (n, N)."""
    return measures.ranking(scores, positive, torch.arange(len(scores)), weights)


def scored_labels(seed: int, images: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores (N,) below 1 with many ties, who has the label, 0 or 1 (N,), and how often each image counts (N,)."""
    random = np.random.RandomState(seed)
    positive = torch.from_numpy((random.rand(images) < 0.3).astype(float))
    scores = torch.from_numpy(random.randint(0, 8, images) / 16 + positive.numpy() / 8)
    return scores, positive, torch.from_numpy(random.randint(0, 4, images))


@pytest.mark.parametrize(("seed", "at_once"), [(0, 59), (1, 150), (2, 1000)])  # rows: 1, 2 and all
def test_rankings_are_scikit_learns_ties_and_repeated_images_too(monkeypatch, seed, at_once):
    monkeypatch.setattr(measures, "NUMBERS_AT_ONCE", at_once)
    scores, positive, times = scored_labels(seed)
    for way in (scores, -scores):
        found = ranked(way, positive, torch.stack([torch.ones(60), times, 2 * times]))
        for column, theirs in zip(found.T.tolist(), RANKINGS.values(), strict=True):
            repeated = theirs(positive, way, sample_weight=times)
            assert column == pytest.approx([theirs(positive, way), repeated, repeated], abs=1e-12)


def test_what_is_the_same_everywhere_has_no_figure():
    """scikit-learn says 0 or NaN, and warns; a mean over labels has to leave both out."""
    scores = torch.rand(9)
    ones = torch.ones(9)
    assert ranked(scores, 0 * ones, torch.ones(1, 9)).isnan().all()
    [[precision, area]] = ranked(scores, ones, torch.ones(1, 9))
    assert precision == metrics.average_precision_score(ones, scores) == 1 and area.isnan()
    assert ranked(scores[:0], ones[:0], torch.ones(3, 0)).isnan().tolist() == [[True, True]] * 3  # nothing is known
    assert math.isnan(measures.threshold_for(scores, 0 * ones, "f1"))
    assert math.isnan(measures.threshold_for(scores, ones, "specificity=0.9"))
    assert measures.spearman(torch.rand(5), torch.ones(5), torch.ones(1, 5)).isnan()


@pytest.mark.parametrize("seed", range(3))
def test_rates_are_scikit_learns_and_the_threshold_for_f1_is_the_best(seed):
    scores, positive, times = scored_labels(seed)
    threshold = measures.threshold_for(scores, positive, "f1")
    answers = multilabel.LabelAnswers(0.0, scores[:, None], positive[:, None])
    said = scores > threshold
    rates = answers.rates(torch.tensor([threshold]), times[None])
    for name, theirs in {"sensitivity": metrics.recall_score, "ppv": metrics.precision_score}.items():
        assert rates[name].item() == pytest.approx(theirs(positive, said, sample_weight=times))
    for name, theirs in {"specificity": metrics.recall_score, "npv": metrics.precision_score}.items():
        assert rates[name].item() == pytest.approx(theirs(1 - positive, ~said, sample_weight=times))
    assert rates["f1"].item() == pytest.approx(metrics.f1_score(positive, said, sample_weight=times))
    others = [metrics.f1_score(positive, scores > other) for other in (-1, *scores.unique()[:-1])]
    assert metrics.f1_score(positive, said) == pytest.approx(max(others))


def test_the_threshold_of_scores_at_equal_distances():
    """The first is the highest, of n / (n + 1)."""
    for positive, goal, threshold in (
        ([1, 0, 0, 1], "f1", 0.7),  # the higher one: below all scores it is as good
        ([0, 1, 1, 0], "specificity=1", 0.9),  # above all scores
        ([0, 1, 0, 1, 0], "specificity=0.6", 3.5 / 6),  # the lowest above two of three negatives
        ([0, 1, 0, 1, 0], "sensitivity=0.6", 1.5 / 6),  # the highest below two of two positives
        ([0, 1, 1, 0], "sensitivity=1e-12", 0.5),  # of one positive at least
        ([1] * 25, "sensitivity=0.28", 18.5 / 26),  # of 7 positives, though 0.28 x 25 is a little more,
    ):
        scores = torch.arange(len(positive), 0, -1) / (len(positive) + 1)
        assert measures.threshold_for(scores, torch.tensor(positive), goal) == pytest.approx(threshold)
    scores = torch.tensor([1.0] * 19 + [0.2] + [0.99999994] * 5)  # between the first and the last there is no middle
    positive = torch.tensor([1.0] * 20 + [0.0] * 5)
    for goal in ("sensitivity=0.95", "f1"):
        threshold = torch.tensor(measures.threshold_for(scores, positive, goal))
        assert ((scores > threshold) == (scores == 1)).all()


@pytest.mark.parametrize("seed", range(3))
def test_figures_of_numbers_are_scikit_learns_and_scipys(seed):
    random = np.random.RandomState(seed)
    truth = torch.from_numpy(random.randint(0, 9, 50) * 3.5 + 1000)
    answers = truth + torch.from_numpy(random.randint(-3, 4, 50))
    times = torch.from_numpy(random.randint(0, 3, 50))
    pairs = {
        measures.mae: metrics.mean_absolute_error,
        measures.rmse: metrics.root_mean_squared_error,
        measures.r2: metrics.r2_score,
        measures.spearman: lambda t, a: spearmanr(t, a).statistic,
    }
    repeated = torch.arange(50).repeat_interleave(times)
    for ours, theirs in pairs.items():
        for way in (answers, -answers):
            assert ours(way, truth, torch.ones(1, 50)).item() == pytest.approx(theirs(truth, way), abs=1e-9)
        of_repeated = theirs(truth[repeated], answers[repeated])
        assert ours(answers, truth, times[None]).item() == pytest.approx(of_repeated, abs=1e-9)


def chance(measure, clusters: torch.Tensor, bounds=measures.UNBOUNDED) -> tuple[tuple[float, float], float]:
    """The interval of a measure of weights (n, N), and its p."""
    [figure] = measures.jackknife(lambda weights: {"it": measure(weights)}, clusters, {"it": bounds})["it"]
    return figure.interval, figure.p


def mean_of(values: torch.Tensor):
    return functools.partial(measures.weighted_mean, values)


@pytest.mark.parametrize("patients", [2, 4, 7, 40])
def test_the_interval_of_a_mean_over_patients_and_its_chance_are_students(patients):
    """Each patient has as many images. With as many parts as patients the jackknife of a mean is exact."""
    by_patient = torch.from_numpy(np.random.RandomState(1).randn(patients))
    clusters = torch.arange(patients).repeat_interleave(3)
    interval, p = chance(mean_of(by_patient[clusters]), clusters)
    mean = by_patient.mean().item()
    error = by_patient.std().item() / patients**0.5
    half = student.ppf(0.975, patients - 1) * error
    assert interval == pytest.approx((mean - half, mean + half))
    assert p == pytest.approx(2 * student.sf(abs(mean) / error, patients - 1))


def test_images_that_lie_by_class_are_left_out_at_random():
    """A hundred at a time: were these neighbours, all of one class, the interval would be ten times as wide."""
    (low, high), _ = chance(mean_of(torch.arange(5000) < 2500), torch.arange(5000))
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / 5000**0.5, rel=0.3)


def test_an_interval_ends_before_what_cannot_be():
    for bounds, middle, half, expected in (
        (measures.SHARE, 0.9, 0.1, (0.7477, 0.9647)),  # logit(0.9) -+ 0.1 / (0.9 x 0.1)
        (measures.POSITIVE, 2.0, 0.1, (1.9025, 2.1025)),  # log(2) -+ 0.1 / 2
        (measures.BELOW_1, 0.5, 0.1, (0.3893, 0.5906)),  # log(1 - 0.5) -+ 0.1 / 0.5
        (measures.CORRELATION, 0.0, 0.1, (-0.0997, 0.0997)),  # artanh(0) -+ 0.1
        (measures.UNBOUNDED, 0.5, 0.1, (0.4, 0.6)),
    ):
        low, high = measures._between(middle, middle, half, bounds)
        assert (low, high) == pytest.approx(expected, abs=1e-4)
        for corrected in (2.0 * middle + 1.0, -2.0 * middle - 1.0):  # out of all bounds
            low, high = measures._between(middle, corrected, 1e3, bounds)
            assert bounds[0] <= low < high <= bounds[1]
        assert np.isnan(measures._between(bounds[1], middle, half, bounds)).all()  # no interval of a figure at its end


@pytest.mark.parametrize(("bounds", "middle"), [(measures.BELOW_1, 0.8755), (measures.POSITIVE, 3.0)])
def test_an_interval_that_leaves_all_open_is_none(bounds, middle):
    """As of two groups: by Student's 12.7 errors on each side, R2 would lie between minus six million and 1."""
    width = min(abs(middle - bound) for bound in bounds) * math.log(100)
    low, high = measures._between(middle, middle, 0.99 * width, bounds)
    assert bounds[0] < low < middle < high < bounds[1]
    assert measures._between(middle, middle, 1.01 * width, bounds) == bounds
    assert answer_reports.interval_text(*bounds) == "no interval: too few images or groups to tell"
    assert answer_reports.finite_interval(bounds) is None and answer_reports.finite_interval((low, high)) == [low, high]
    low, high = measures._between(0.9, 0.9, 1.0, measures.SHARE)  # a wide one that is bounded says so by itself
    assert 0 < low < 0.01 and 0.99 < high < 1


def test_answers_that_are_all_right_have_no_interval():
    """Nothing changes when some are left out, so they do not say how far chance reaches."""
    scores = torch.linspace(0, 1, 30)
    for of in (torch.arange(30) > 20, torch.arange(30) == 7):
        found = measures.jackknife(lambda weights, of=of: {"it": ranked(scores, of, weights)}, torch.arange(30), {})
        assert np.isnan([figure.interval for figure in found["it"]]).all()
    assert chance(mean_of(torch.zeros(20)), torch.arange(20))[1] == 1
    interval, p = chance(mean_of(torch.arange(20)), torch.zeros(20, dtype=torch.long))
    assert np.isnan(interval).all() and p == 1


def several_labels(images: int = 60, labels: int = 5) -> multilabel.LabelAnswers:
    """Answers for images that have each label with a probability of 0.3, and higher scores then."""
    random = np.random.RandomState(0)
    positive = torch.from_numpy(random.rand(images, labels) < 0.3).double()
    scores = torch.from_numpy(random.randn(images, labels)) + 1.5 * positive
    return multilabel.LabelAnswers(0.0, scores.sigmoid(), positive)


def test_the_intervals_of_a_label_are_of_its_own_answers():
    answers = several_labels()
    report = tasks.MultiLabel(list("abcde")).report(answers)
    for i in range(5):
        alone = multilabel.LabelAnswers(0.0, answers.values[:, i : i + 1], answers.targets[:, i : i + 1])
        found = measures.jackknife(alone.weighted, torch.arange(60), {})
        expected = [found[name][0].interval for name in ("macro_ap", "macro_auroc")]
        assert [report.intervals(i)[name] for name in RANKINGS] == list(map(pytest.approx, expected))


def test_few_positives_or_negatives_have_no_interval_however_many_images_of_a_patient():
    """`size` images of each patient. With fewer than five, intervals would cover in two of three draws."""
    told = {(4, 1): False, (5, 1): True, (55, 1): True, (56, 1): False, (16, 3): True, (16, 5): False}
    for (positives, size), has_one in told.items():
        answers = multilabel.LabelAnswers(0.0, torch.rand(60, 1), (torch.arange(60)[:, None] < positives).double())
        intervals = tasks.MultiLabel(["rare"]).report(answers, torch.arange(60) // size).intervals(0)
        assert all(np.isfinite(intervals[name]).all() == has_one for name in RANKINGS)


def test_what_a_threshold_reaches_is_told_with_wilsons_intervals():
    """Eight of ten positives and fifteen of twenty negatives are on its right side: in closed form."""
    positive = (torch.arange(30)[:, None] < 10).double()
    is_answer = torch.cat([torch.arange(10) < 8, torch.arange(20) < 5])
    answers = multilabel.LabelAnswers(0.0, torch.where(is_answer, 0.45, 0.3)[:, None], positive)
    task = tasks.MultiLabel(["rare"], thresholds=torch.tensor([0.3]))  # above which is an answer
    report = task.report(answers)
    by_name = report.figures()["labels"]["rare"]
    assert by_name["sensitivity_interval"] == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert by_name["specificity_interval"] == pytest.approx([0.5313, 0.8881], abs=1e-4)
    told = "0.30: sensitivity 80.0% (49.0% to 94.3%), specificity 75.0% (53.1% to 88.8%)"
    assert list(report.printed())[-1] == ("rare", told)
    patients = torch.arange(30) // 5  # two have the label, whose images are alike
    found = task.report(answers, patients).intervals(0)["sensitivity"]
    assert found == measures.share_interval(is_answer[:10], patients[:10])


def test_the_roc_has_the_chosen_point_the_diagonal_and_the_auroc(tmp_path, monkeypatch, pictures):
    drawn = []
    monkeypatch.setattr(multilabel, "save_figure", lambda figure, _: drawn.append(figure.axes[1]))
    answers = several_labels(labels=1)
    report = tasks.MultiLabel(["rare"], thresholds=torch.tensor([0.6])).report(answers)
    report.draw(tmp_path / "picture.png")
    diagonal, curve, point = drawn[0].lines
    assert list(zip(*diagonal.get_data(), strict=True)) == [(0, 0), (1, 1)]
    assert curve.get_label() == f"rare {report.by['auroc'][0]:.1%}"
    rates = answers.rates(torch.tensor([0.6]), torch.ones(1, 60))
    assert point.get_data() == ([1 - rates["specificity"].item()], [rates["sensitivity"].item()])


def test_a_label_whose_only_positive_is_left_out_is_not_in_the_mean_f1():
    positive = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 0]])
    answers = multilabel.LabelAnswers(0.0, torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.1, 0.1], [0.9, 0.1]]), positive)
    report = tasks.MultiLabel(["once", "twice"]).report(answers)
    weights = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert report.measure(weights)["macro_f1"].tolist() == pytest.approx([(1 + 2 / 3) / 2, 2 / 3])


def test_numbers_of_any_size_are_measured():
    """Seconds since 1970: their squares leave nothing of what differs."""
    truth = torch.rand(100, dtype=torch.float64) * 300
    answers = truth + torch.randn(100)
    expected = measures.r2(answers, truth, torch.ones(1, 100)).item()
    assert measures.r2(answers + 1.7e9, truth + 1.7e9, torch.ones(1, 100)).item() == pytest.approx(expected, abs=1e-6)
    assert measures.r2(answers, torch.full((100,), 1.7e9, dtype=torch.float64), torch.ones(1, 100)).isnan()
    alike = torch.tensor([0.3, 0.3, 0.3, 7.0], dtype=torch.float64)  # but for rounding, where the last is left out
    assert measures.r2(alike + 1, alike, torch.tensor([[1, 1, 1, 0]])).isnan()
    far = torch.tensor([0.0, 1.0, 1000.0])  # left out once, and the others differ by little
    assert measures.r2(far + 0.25, far, torch.tensor([[1, 1, 0]])).item() == pytest.approx(1 - 0.0625 / 0.25)
    errors = 1e-20 * (1 + torch.rand(60, dtype=torch.float64))
    (low, high), _ = chance(mean_of(errors), torch.arange(60), measures.POSITIVE)
    assert 1.3e-20 < low < errors.mean() < high < 1.7e-20


def test_the_bias_of_a_figure_is_taken_from_the_middle_of_its_interval():
    """The square of a mean is too high by the variance of the mean; the mean of the pseudo-values is exactly not."""
    values = torch.randn(12, dtype=torch.float64) + 0.5
    (low, high), _ = chance(lambda weights: mean_of(values)(weights).square(), torch.arange(12))
    assert (low + high) / 2 == pytest.approx((values.mean().square() - values.var() / 12).item())
    pseudo = 12 * values.mean().square() - 11 * ((values.sum() - values) / 11).square()
    assert (high - low) / 2 == pytest.approx(student.ppf(0.975, 11) * pseudo.std().item() / 12**0.5)


@pytest.mark.parametrize("hits", [[9, 8, 6, 3], [9, 6], [5, 6, 5, 6, 5, 6]], ids=["unlike", "two", "alike"])
def test_a_share_over_few_patients_counts_as_few_images_and_as_no_more_than_there_are(hits):
    """Of ten images of each patient so many are right: Korn and Graubard's number of images, of two patients too."""
    patients = len(hits)
    right = (torch.arange(10) < torch.tensor(hits)[:, None]).flatten()
    share = np.mean(hits) / 10
    effective = min(10 * patients, share * (1 - share) / (np.var(hits, ddof=1) / 100 / patients))
    effective *= (norm.ppf(0.975) / student.ppf(0.975, patients - 1)) ** 2
    expected = measures.mean_interval(torch.tensor([share], dtype=torch.float64), effective)
    assert measures.share_interval(right, torch.arange(patients).repeat_interleave(10)) == pytest.approx(expected)
    low, high = measures.share_interval(torch.ones(50), torch.arange(50) // 10)  # all are right: five patients count
    assert low < measures.share_interval(torch.ones(5))[0] + 0.01 and high == 1
    assert measures.share_interval(torch.arange(9) > 3, torch.zeros(9, dtype=torch.long)) == (0, 1)  # one tells nothing


def test_the_exact_test_of_two_runs_is_a_binomial_one_and_by_patients_one_of_signs():
    first, second = (torch.rand(60) < share for share in (0.5, 0.75))
    images = torch.arange(60)
    gains = second.int() - first.int()
    found = measures.mcnemar(first, second, images)
    assert found == measures.mcnemar(second, first, images)
    assert found == pytest.approx(binomtest(int((gains > 0).sum()), int(gains.count_nonzero())).pvalue)
    patients = images // 5
    signs = torch.tensor(list(itertools.product([-1, 1], repeat=12)))
    as_far = (signs * gains.view(12, 5).sum(1)).sum(1).abs() >= abs(gains.sum())
    assert measures.mcnemar(first, second, patients) == pytest.approx(as_far.double().mean().item())
    assert measures.mcnemar(first, first, images) == measures.mcnemar(first, first, patients) == 1


def test_calibration_error_is_the_gap_between_confidence_and_share_right():
    bins = measures.calibration(torch.tensor([0.95] * 4 + [0.55] * 2), torch.tensor([1, 1, 1, 0, 1, 0]))
    assert measures.calibration_error(bins) == pytest.approx((4 * 0.2 + 2 * 0.05) / 6, abs=1e-6)
    assert bins.shape == (15, 3) and bins[:, 2].sum() == 6 and bins[14].tolist() == pytest.approx([3.8, 3, 4])
    assert measures.calibration_error(measures.calibration(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]))) == 0
    # By chance, 100 images in each of two bins: half-normal distances, the deviations 4 and 3 of binomial numbers.
    bins = torch.zeros(15, 3, dtype=torch.float64)
    bins[11] = torch.tensor([80.0, 78.0, 100.0])
    bins[14] = torch.tensor([90.0, 70.0, 100.0])
    mean = (4 + 3) * math.sqrt(2 / math.pi)
    deviation = 5 * math.sqrt(1 - 2 / math.pi)
    assert measures.calibration_error_by_chance(bins) == pytest.approx((mean + norm.ppf(0.95) * deviation) / 200, 1e-4)


@pytest.mark.parametrize(("right", "of"), [(9, 10), (51, 100), (999, 1000)])
@pytest.mark.parametrize("gap", [0.001, 1.0, 40.0])
def test_the_temperature_makes_logits_mean_what_they_say(right, of, gap):
    """Logits of log(9) against 0 say that nine of ten answers are right."""
    logits = torch.tensor([[gap, 0.0]]).expand(of, 2)
    labels = (torch.arange(of) >= right).long()
    found = measures.fit_temperature(logits, lambda shown: F.cross_entropy(shown, labels))
    assert found == pytest.approx(gap / math.log(right / (of - right)), rel=1e-3)
    assert measures.fit_temperature(torch.zeros(of, 2), lambda shown: F.cross_entropy(shown, labels)) == 1


def test_logits_spread_about_the_mean_of_each_image():
    logits = torch.tensor([[7.0, 1.0, 1.0], [5.0, 5.0, 5.0]])
    assert measures.spread(logits) == pytest.approx(2)  # (16 + 4 + 4 + 0 + 0 + 0) / 6 is its square
