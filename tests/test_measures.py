"""toolkit/answers/measures.py: against the formulas written out, and at the ends of each range."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest, norm, spearmanr
from scipy.stats import t as student
from sklearn import metrics

from toolkit.answers import answer_reports, measures, multilabel, regression, tasks


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def test_effective_rank_counts_directions(features):
    square = torch.eye(4).repeat(5, 1)
    assert measures.effective_rank(torch.cat([square, -square])) == pytest.approx(4)
    assert measures.effective_rank(torch.cat([square, -square])[:, :3] + 7) == pytest.approx(3)  # wherever they lie
    assert measures.effective_rank(features[:, :1] @ torch.randn(1, 6)) == pytest.approx(1, abs=1e-4)
    assert measures.effective_rank(torch.ones(5, 3)) == 1
    values = torch.linalg.svdvals(features - features.mean(0))
    shares = [float(value / values.sum()) for value in values]
    assert measures.effective_rank(features) == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)), rel=1e-4)


def interval_of(hits: int, images: int) -> tuple[float, float]:
    """That of so many right answers."""
    return measures.share_interval(torch.arange(images) < hits)


@pytest.mark.parametrize(("share", "images"), [(0.5, 24), (0.9, 60), (0.98, 359)])
def test_the_wilson_interval(share, images):
    draws = np.random.RandomState(0).binomial(images, share, size=500)
    intervals = [interval_of(hits, images) for hits in draws]
    covered = np.mean([low <= share <= high for low, high in intervals])
    assert 0.92 < covered < 0.98
    assert interval_of(0, 10) == (0, pytest.approx(0.2775, abs=1e-4))
    assert all(interval_of(n, n)[1] == 1 and interval_of(0, n)[0] == 0 for n in range(1, 400))
    assert interval_of(10, 10) == (pytest.approx(0.7225, abs=1e-4), 1)


# Scores with many ties, some labels rare; each as scores (N,), 0 or 1 (N,), and how often each image counts (N,).


def scored_labels(seed: int, images: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = np.random.RandomState(seed)
    positive = torch.from_numpy((random.rand(images) < 0.3).astype(float))
    scores = torch.from_numpy(random.randint(0, 8, images) / 8 + positive.numpy() * 0.25)
    return scores, positive, torch.from_numpy(random.randint(0, 4, images))


RANKINGS = {"average_precision": metrics.average_precision_score, "auroc": metrics.roc_auc_score}


def ranked(name: str, scores: torch.Tensor, positive: torch.Tensor, weights: torch.Tensor | None = None):
    """AP or AUROC of one label."""
    return measures.Ranking(scores, positive).figures(weights)[..., list(RANKINGS).index(name)]


average_precision = functools.partial(ranked, "average_precision")
auroc = functools.partial(ranked, "auroc")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", RANKINGS)
def test_rankings_are_scikit_learns_ties_and_repeated_images_too(name, seed):
    scores, positive, times = scored_labels(seed)
    ours, theirs = functools.partial(ranked, name), RANKINGS[name]
    assert ours(scores, positive).item() == pytest.approx(theirs(positive, scores), abs=1e-12)
    assert ours(-scores, positive).item() == pytest.approx(theirs(positive, -scores), abs=1e-12)
    repeated = theirs(positive, scores, sample_weight=times.numpy())
    assert ours(scores, positive, torch.stack([times, 2 * times])).tolist() == pytest.approx([repeated] * 2, abs=1e-12)


def test_what_is_the_same_everywhere_has_no_figure():
    """scikit-learn says 0 or NaN, and warns; a mean over labels has to leave both out."""
    scores, ones = torch.rand(9), torch.ones(9)
    assert average_precision(scores, 0 * ones).isnan() and auroc(scores, 0 * ones).isnan()
    assert average_precision(scores, ones) == metrics.average_precision_score(ones, scores) == 1
    assert auroc(scores, ones).isnan()
    assert math.isnan(measures.threshold_for(scores, 0 * ones, "f1"))
    assert measures.r2(torch.rand(5), torch.full((5,), 3e8)).isnan()
    assert measures.spearman(torch.rand(5), torch.ones(5)).isnan()


@pytest.mark.parametrize("seed", range(5))
def test_f1_is_scikit_learns_and_the_threshold_is_the_best(seed):
    scores, positive, times = scored_labels(seed)
    scores = scores / 2
    threshold = measures.threshold_for(scores, positive, "f1")
    answers = multilabel.LabelAnswers(0.0, scores[:, None], positive[:, None])
    reached = answers.rates(torch.tensor([threshold]))["f1"].item()
    assert reached == pytest.approx(metrics.f1_score(positive, scores > threshold), abs=1e-12)
    others = [metrics.f1_score(positive, scores > other) for other in np.linspace(0, 0.999, 200)]
    assert reached == pytest.approx(max(others))
    weighted = metrics.f1_score(positive, scores > threshold, sample_weight=times.numpy())
    assert answers.rates(torch.tensor([threshold]), times[None])["f1"].item() == pytest.approx(weighted)


def test_thresholds_of_saturated_scores_are_below_them():
    """Between 1 and its neighbour in float32 there is no middle."""
    scores = torch.tensor([1.0] * 19 + [0.2] + [0.99999994] * 5)
    positive = torch.tensor([1.0] * 20 + [0.0] * 5)
    threshold = torch.tensor(measures.threshold_for(scores, positive, "sensitivity=0.95"))
    assert ((scores > threshold) == (scores == 1)).all()
    assert ((scores > torch.tensor(measures.threshold_for(scores, positive, "f1"))) == (scores == 1)).all()


@pytest.mark.parametrize("share", [0.3, 0.8, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_thresholds_reach_their_goal_and_no_more_than_that(seed, share):
    """Of all thresholds that reach the goal it is the one at which the other figure is best."""
    scores, positive, _ = scored_labels(seed)
    scores = scores / 2
    others = np.concatenate([[0.0], (scores.unique()[1:] + scores.unique()[:-1]).numpy() / 2, [1.0]])

    def figures(threshold: float) -> dict[str, float]:
        above = scores > threshold
        hits, rejections = (above & (positive == 1)).sum(), (~above & (positive == 0)).sum()
        return {
            "sensitivity": (hits / (positive == 1).sum()).item(),
            "specificity": (rejections / (positive == 0).sum()).item(),
        }

    for kind, other in (("sensitivity", "specificity"), ("specificity", "sensitivity")):
        found = figures(measures.threshold_for(scores, positive, f"{kind}={share}"))
        assert found[kind] >= share - 1e-6
        best = max(figures(t)[other] for t in others if figures(t)[kind] >= share - 1e-6)
        assert found[other] == pytest.approx(best)
    assert 0 <= measures.threshold_for(scores, positive, "sensitivity=1e-12") <= 1
    assert math.isnan(measures.threshold_for(scores, torch.zeros_like(positive), f"sensitivity={share}"))


@pytest.mark.parametrize("seed", range(3))
def test_figures_of_numbers_are_scikit_learns_and_scipys(seed):
    random = np.random.RandomState(seed)
    truth = torch.from_numpy(random.randint(0, 9, 50) * 3.5 + 1000)
    answers, times = truth + torch.from_numpy(random.randint(-3, 4, 50)), torch.from_numpy(random.randint(0, 3, 50))
    pairs = {
        measures.mean_absolute_error: metrics.mean_absolute_error,
        measures.root_mean_squared_error: metrics.root_mean_squared_error,
        measures.r2: metrics.r2_score,
        measures.spearman: lambda t, a: spearmanr(t, a).statistic,
    }
    repeated = torch.arange(50).repeat_interleave(times)
    for ours, theirs in pairs.items():
        assert ours(answers, truth).item() == pytest.approx(theirs(truth, answers), abs=1e-9)
        of_repeated = theirs(truth[repeated], answers[repeated])
        assert ours(answers, truth, times[None]).item() == pytest.approx(of_repeated, abs=1e-9)


def chance(measure, images: int, clusters=None, bounds=measures.UNBOUNDED) -> tuple[tuple[float, float], float]:
    """The interval of a measure of weights (..., N), and its p."""
    found = measures.jackknife(lambda weights: measure(weights)[:, None], images, clusters, [bounds])
    return found.intervals[0], found.p[0]


def measured_mean(values: torch.Tensor, clusters=None, bounds=measures.UNBOUNDED) -> tuple[tuple[float, float], float]:
    def mean(weights: torch.Tensor) -> torch.Tensor:
        return (weights * values).sum(-1) / weights.sum(-1)

    return chance(mean, len(values), clusters, bounds)


def test_the_interval_of_a_mean_and_its_chance_are_students():
    """With as many parts as images the jackknife of a mean is exact, far from all bounds."""
    values = torch.from_numpy(1e3 + np.random.RandomState(0).randn(40))
    half = student.ppf(0.975, 39) * values.std().item() / 40**0.5
    expected = (values.mean().item() - half, values.mean().item() + half)
    assert measured_mean(values, bounds=measures.POSITIVE)[0] == pytest.approx(expected, abs=1e-3)
    values = values - 1e3 + 0.3
    expected = student.sf(values.mean().item() / values.std().item() * 40**0.5, 39) * 2
    assert measured_mean(values)[1] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("bounds", "middle", "half", "expected"),
    [
        (measures.SHARE, 0.9, 0.1, (0.7477, 0.9647)),  # logit(0.9) -+ 0.1 / (0.9 x 0.1)
        (measures.POSITIVE, 2.0, 0.1, (1.9025, 2.1025)),  # log(2) -+ 0.1 / 2
        (measures.BELOW_1, 0.5, 0.1, (0.3893, 0.5906)),  # log(1 - 0.5) -+ 0.1 / 0.5
        (measures.CORRELATION, 0.0, 0.1, (-0.0997, 0.0997)),  # artanh(0) -+ 0.1
        (measures.UNBOUNDED, 0.5, 0.1, (0.4, 0.6)),
    ],
)
def test_an_interval_ends_before_what_cannot_be(bounds, middle, half, expected):
    low, high = measures._between(middle, middle, half, bounds)
    assert (low, high) == pytest.approx(expected, abs=1e-4)
    low, high = measures._between(middle, 2.0 * middle + 1.0, 10.0, bounds)  # a correction out of all bounds
    assert bounds[0] <= low < high <= bounds[1]


@pytest.mark.parametrize(("bounds", "middle"), [(measures.BELOW_1, 0.8755), (measures.POSITIVE, 3.0)])
def test_an_interval_that_leaves_all_open_is_none(bounds, middle):
    """As of two groups: by Student's 12.7 errors on each side, R2 would lie between minus six million and 1."""
    distance = abs(middle - (1.0 if bounds == measures.BELOW_1 else 0.0))
    width = distance * math.log(100)
    low, high = measures._between(middle, middle, 0.99 * width, bounds)
    assert bounds[0] < low < middle < high < bounds[1]
    assert measures._between(middle, middle, 1.01 * width, bounds) == bounds
    assert answer_reports.interval_text(*bounds) == "no interval: too few images or groups to tell"
    assert answer_reports.finite_interval(bounds) is None and answer_reports.finite_interval((low, high)) == [low, high]
    low, high = measures._between(0.9, 0.9, 1.0, measures.SHARE)  # a wide one that is bounded says so by itself
    assert 0 < low < 0.01 and 0.99 < high < 1


def test_two_groups_do_not_say_how_far_numbers_are_off():
    truth = torch.arange(20.0, dtype=torch.float64)
    groups = torch.arange(20) % 2
    answers = regression.NumberAnswers(0.0, (truth + 4 * groups)[:, None], truth[:, None])
    task = regression.Regression(["age"], truth[:, None])
    told = dict(task.report(answers, groups).rows())
    assert told["R2"] == "0.7594 (no interval: too few images or groups to tell)"  # 1 - mean of 0 and 16 / variance
    assert task.report(answers, groups).figures()["r2_interval"] is None
    assert "95% interval" in dict(task.report(answers).rows())["R2"]


def test_answers_that_are_all_right_have_no_interval():
    """Nothing changes when some are left out, so they do not say how far chance reaches."""
    scores, positive = torch.linspace(0, 1, 30), (torch.arange(30) > 20).double()
    one = (torch.arange(30) == 7).double()
    for measure, of in ((average_precision, positive), (auroc, positive), (average_precision, one)):
        assert all(map(math.isnan, chance(functools.partial(measure, scores, of), 30)[0]))


def several_labels(random: np.random.RandomState, images: int, share: float, labels: int = 5):
    """Answers for images that have each label with this probability, and higher scores then."""
    positive = (random.rand(images, labels) < share).astype(float)
    scores = torch.from_numpy(random.randn(images, labels) + 1.5 * positive)
    return multilabel.LabelAnswers(0.0, scores.sigmoid(), torch.from_numpy(positive))


def true_figures(share: float, threshold: float) -> tuple[float, float, float]:
    """AP, AUROC and F1 at a threshold of images without end."""
    scores = np.linspace(-9, 11, 100_001)
    found, wrong = norm.sf(scores - 1.5), norm.sf(scores)
    precision = share * found / (share * found + (1 - share) * wrong)
    found_there, wrong_there = norm.sf(threshold - 1.5), norm.sf(threshold)
    of_both = share + share * found_there + (1 - share) * wrong_there
    return -np.trapezoid(precision, found), norm.cdf(1.5 / 2**0.5), 2 * share * found_there / of_both


def covered(images: int, share: float, draws: int) -> dict[str, float]:
    """How many of the intervals of the headlines, of so many drawn sets, have what is true of images without end."""
    random, threshold = np.random.RandomState(0), 1.0
    task = tasks.MultiLabel(list("abcde"), thresholds=torch.full((5,), threshold).sigmoid())
    ap, roc, f1 = true_figures(share, threshold)
    truth = dict(zip(multilabel.LabelReport.HEADLINES, (ap, ap, roc, f1), strict=True))
    hits = dict.fromkeys(truth, 0)
    for _ in range(draws):
        report = task.report(several_labels(random, images, share))
        for (name, true), (low, high) in zip(truth.items(), report.intervals, strict=False):
            hits[name] += low <= true <= high
    return {name: count / draws for name, count in hits.items()}


def test_intervals_of_labels_cover_in_a_few_draws():
    """Each label has five positives. The percentiles of a bootstrap, moved by the bias, had the macro AP 51 times."""
    assert min(covered(100, 0.05, draws=60).values()) >= 0.9


def test_intervals_of_each_label_cover_and_few_positives_have_none():
    """Of a label with fewer than five positives they cover in two of three draws, and so none is told."""
    random = np.random.RandomState(0)
    task = tasks.MultiLabel(list("abcde"))
    truth = true_figures(0.1, 1.0)[:2]
    hits = []
    for _ in range(30):
        report = task.report(several_labels(random, 100, 0.1))
        for i, positives in enumerate(report.by["positives"]):
            intervals = report.label_intervals(i)
            assert np.isnan(intervals).all() == (positives < multilabel.FEWEST_POSITIVES)
            if positives >= multilabel.FEWEST_POSITIVES:
                hits += [low <= true <= high for true, (low, high) in zip(truth, intervals, strict=True)]
    assert np.mean(hits) >= 0.9


def test_positives_of_a_few_patients_have_no_interval_however_many_images_they_have():
    positive = torch.arange(60)[:, None] < 16  # of four patients of twelve
    answers = multilabel.LabelAnswers(0.0, torch.rand(60, 1), positive.double())
    for clusters, has_none in ((torch.arange(60) // 5, True), (torch.arange(60) // 3, False), (None, False)):
        assert np.isnan(tasks.MultiLabel(["rare"]).report(answers, clusters).label_intervals(0)).all() == has_none


def test_intervals_of_the_macro_f1_cover_where_labels_have_one_positive():
    """A label whose positive is left out has no F1, and is not in the mean."""
    random, share, found, wrong = np.random.RandomState(0), 0.005, 0.75, 0.01
    true = 2 * share * found / (share + share * found + (1 - share) * wrong)
    task = tasks.MultiLabel([str(i) for i in range(20)])
    hits = 0
    for _ in range(40):
        positive = random.rand(200, 20) < share
        answered = random.rand(200, 20) < np.where(positive, found, wrong)
        answers = multilabel.LabelAnswers(0.0, torch.from_numpy(answered * 0.8 + 0.1), torch.from_numpy(positive * 1.0))
        low, high = task.report(answers).intervals[3]
        hits += low <= true <= high
    assert hits >= 0.9 * 40


def test_numbers_of_any_size_are_measured():
    """Seconds since 1970: their squares leave nothing of what differs."""
    random = np.random.RandomState(0)
    truth = torch.from_numpy(random.rand(100) * 300)
    answers = truth + torch.from_numpy(random.randn(100))
    expected = measures.r2(answers, truth).item()
    assert measures.r2(answers + 1.7e9, truth + 1.7e9).item() == pytest.approx(expected, abs=1e-6)
    assert measures.r2(answers, torch.full((100,), 1.7e9, dtype=torch.float64)).isnan()
    errors = torch.from_numpy(1e-20 * (1 + np.random.RandomState(0).rand(60)))
    measure = functools.partial(measures.mean_absolute_error, errors, torch.zeros(60))
    (low, high), _ = chance(measure, 60, bounds=measures.POSITIVE)
    assert 1.3e-20 < low < errors.mean() < high < 1.7e-20


def test_a_label_of_which_nothing_is_known_has_no_figure():
    nothing = torch.empty(0)
    for measure in (average_precision, auroc):
        assert measure(nothing, nothing).isnan()
        assert measure(nothing, nothing, torch.ones(3, 0)).isnan().tolist() == [True] * 3
    task = tasks.MultiLabel(["known", "unknown"])
    answers = several_labels(np.random.RandomState(0), 60, 0.3, labels=2)
    answers.targets[:, 1] = math.nan
    report = task.report(answers)
    figures = report.figures()
    assert figures["labels"]["unknown"]["average_precision"] is None
    assert figures["macro_ap"] == figures["labels"]["known"]["average_precision"] == answers.measured()["macro_ap"]
    assert report.rows() and report.printed() and report.by_label()[-1][0] == "unknown"


def test_intervals_of_labels_count_patients_and_not_the_copies_of_their_images():
    random, patients = np.random.RandomState(0), torch.arange(50).repeat_interleave(4)
    task = tasks.MultiLabel(list("abcde"), thresholds=torch.full((5,), 1.0).sigmoid())
    truth, hits = true_figures(0.2, 1.0), {"patients": 0, "images": 0}
    for _ in range(60):
        once = several_labels(random, 50, 0.2)
        copies = multilabel.LabelAnswers(0.0, once.values[patients], once.targets[patients])
        for of, clusters in zip(hits, (patients, None), strict=True):
            low, high = task.report(copies, clusters).intervals[2]  # AUROC
            hits[of] += low <= truth[1] <= high
    assert hits["patients"] >= 0.9 * 60 and hits["images"] < 0.75 * 60


@pytest.mark.slow
@pytest.mark.parametrize(("images", "share"), [(100, 0.2), (400, 0.05)])
def test_intervals_of_labels_cover_as_often_as_they_say(images, share):
    assert covered(images, share, draws=500) == pytest.approx(dict.fromkeys(covered(images, share, 1), 0.95), abs=0.025)


@pytest.mark.slow
@pytest.mark.parametrize("images", [60, 400])
def test_intervals_of_numbers_cover_as_often_as_they_say(images):
    """Answers with R2 0.64, and so a correlation of 0.8."""
    random, task = np.random.RandomState(0), tasks.Regression(["age"], torch.tensor([[0.0], [1.0]]))
    rank = 6 / math.pi * math.asin(0.8 / 2)  # of a normal pair
    truth = {"r2": 0.64, "mae": 0.6 * (2 / math.pi) ** 0.5, "rmse": 0.6, "spearman": rank}
    hits = dict.fromkeys(truth, 0)
    for _ in range(500):
        answers = torch.from_numpy(0.8 * random.randn(images, 1))
        found = regression.NumberAnswers(0.0, answers, answers + torch.from_numpy(0.6 * random.randn(images, 1)))
        report = task.report(found)
        for (name, true), (low, high) in zip(truth.items(), report.intervals, strict=False):
            hits[name] += low <= true <= high
    assert {name: count / 500 for name, count in hits.items()} == pytest.approx(dict.fromkeys(truth, 0.95), abs=0.03)


def test_the_bias_of_a_figure_is_taken_from_the_middle_of_its_interval():
    """The square of a mean is too high by the variance of the mean; the mean of the pseudo-values is exactly not."""
    values = torch.from_numpy(np.random.RandomState(0).randn(12)) + 0.5

    def square(weights: torch.Tensor) -> torch.Tensor:
        return ((weights * values).sum(-1) / weights.sum(-1)).square()

    (low, high), _ = chance(square, 12)
    assert (low + high) / 2 == pytest.approx((values.mean().square() - values.var() / 12).item())


@pytest.mark.parametrize("patients", [2, 4, 7])
def test_intervals_over_few_patients_are_students(patients):
    """Each patient has the same number of images, so a mean over images is one of patients."""
    by_patient = torch.from_numpy(np.random.RandomState(1).randn(patients))
    clusters = torch.arange(patients).repeat_interleave(3)
    (low, high), _ = measured_mean(by_patient[clusters], clusters)
    half = student.ppf(0.975, patients - 1) * by_patient.std().item() / patients**0.5
    assert (low, high) == pytest.approx((by_patient.mean().item() - half, by_patient.mean().item() + half))


def test_a_share_over_few_patients_counts_as_few_images():
    """Four patients of ten images each, 9, 8, 6 and 3 of them right: Korn and Graubard's number of images."""
    hits = torch.tensor([9, 8, 6, 3])
    right = (torch.arange(10) < hits[:, None]).flatten()
    share = 26 / 40
    between = 4 / 3 * ((hits - 10 * share) ** 2).sum().item() / 40**2
    effective = share * (1 - share) / between * (norm.ppf(0.975) / student.ppf(0.975, 3)) ** 2
    expected = measures.mean_interval(torch.tensor([share], dtype=torch.float64), effective)
    assert measures.share_interval(right, torch.arange(4).repeat_interleave(10)) == pytest.approx(expected)


def test_patients_who_are_more_alike_than_chance_are_not_more_images_than_there_are():
    """Each has five or six of ten right: their shares differ less than chance lets those of single images differ."""
    hits = torch.tensor([5, 6, 5, 6, 5, 6])
    right = (torch.arange(10) < hits[:, None]).flatten()
    of_patients = measures.share_interval(right, torch.arange(6).repeat_interleave(10))
    effective = 60 * (norm.ppf(0.975) / student.ppf(0.975, 5)) ** 2
    expected = measures.mean_interval(torch.tensor([33 / 60], dtype=torch.float64), effective)
    assert of_patients == pytest.approx(expected)


def test_the_interval_of_a_flattering_mean_is_moved():
    """Of ten labels that are hardly found the mean AP of 300 images is too high, and the interval has the truth."""
    random = np.random.RandomState(0)

    def drawn_set(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        positive = (random.rand(count, 10) < 0.2).astype(float)
        return torch.from_numpy(random.randn(count, 10) + 0.4 * positive), torch.from_numpy(positive)

    def mean_ap(scores, positive, weights=None) -> torch.Tensor:
        pairs = zip(scores.T, positive.T, strict=True)
        return torch.stack([average_precision(*pair, weights) for pair in pairs], -1).mean(-1)

    true, hits, by_draws = mean_ap(*drawn_set(200_000)).item(), 0, 0
    for _ in range(20):
        of_set = functools.partial(mean_ap, *drawn_set(300))
        (low, high), _ = chance(of_set, 300)
        hits += low <= true <= high
        drawn = of_set(torch.from_numpy(np.random.RandomState(0).multinomial(300, [1 / 300] * 300, 200)))
        low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype))  # percentiles of a bootstrap
        by_draws += low <= true <= high
    assert hits >= 17 > by_draws + 3


def test_the_exact_test_of_two_runs_is_a_binomial_one_and_by_patients_one_of_signs():
    random = np.random.RandomState(0)
    first, second = torch.from_numpy(random.rand(300) < 0.7), torch.from_numpy(random.rand(300) < 0.8)
    wins, losses = int((second & ~first).sum()), int((first & ~second).sum())
    assert measures.mcnemar(first, second) == pytest.approx(binomtest(wins, wins + losses).pvalue)
    assert measures.mcnemar(first, first) == 1
    first, second = (torch.from_numpy(random.rand(60) < share) for share in (0.5, 0.75))
    alone = measures.mcnemar(first, second, torch.arange(60))
    assert alone == pytest.approx(measures.mcnemar(first, second), rel=1e-9)
    patients = torch.arange(60) // 5
    gains = (second.int() - first.int()).view(12, 5).sum(1)
    signs = torch.tensor(list(itertools.product([-1, 1], repeat=12)))
    as_far = (signs * gains).sum(1).abs() >= abs(gains.sum())
    assert measures.mcnemar(first, second, patients) == pytest.approx(as_far.double().mean().item())
    assert measures.mcnemar(first, first, patients) == 1


def test_the_difference_of_two_runs_is_tested_on_the_same_images():
    """Both runs find the same images hard: alone their intervals overlap, and yet the second is better."""
    random = np.random.RandomState(0)
    hard = torch.from_numpy(random.randn(200))
    better = hard + 0.1 + 0.05 * torch.from_numpy(random.randn(200))
    (low, high), p = measured_mean(better - hard)
    assert low < 0.1 < high and low > 0.08 and p < 1e-6
    assert measured_mean(hard)[0][1] > measured_mean(better)[0][0]
    assert measured_mean(hard - hard)[1] == 1


def test_what_chance_allows_of_a_calibration_error_in_closed_form():
    """100 images in one bin: the distance is half-normal, with the deviation 4 of a binomial number."""
    bins = torch.zeros(15, 3, dtype=torch.float64)
    bins[11] = torch.tensor([80.0, 78.0, 100.0])
    mean = 4 * math.sqrt(2 / math.pi)
    deviation = 4 * math.sqrt(1 - 2 / math.pi)
    assert measures.calibration_error_by_chance(bins) == pytest.approx((mean + norm.ppf(0.95) * deviation) / 100, 1e-4)


def test_exact_probabilities_are_off_by_less_than_chance_allows_in_19_of_20_samples():
    generator = torch.Generator().manual_seed(0)
    for images in (15, 400):
        below = 0
        for _ in range(300):
            confidences = 0.5 + 0.5 * torch.rand(images, generator=generator)
            bins = measures.calibration(confidences, torch.rand(images, generator=generator) < confidences)
            below += measures.calibration_error(bins) < measures.calibration_error_by_chance(bins)
        assert 0.92 < below / 300 < 0.99


def test_calibration_error_is_the_gap_between_confidence_and_share_right():
    confidences = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    right = torch.tensor([True, True, True, False, True, False])
    bins = measures.calibration(confidences, right)
    assert measures.calibration_error(bins) == pytest.approx((4 * 0.2 + 2 * 0.05) / 6, abs=1e-6)
    assert bins.shape == (15, 3) and bins[:, 2].sum() == 6 and bins[14].tolist() == pytest.approx([3.8, 3, 4])
    bins = measures.calibration(torch.tensor([0.0, 1.0]), torch.tensor([False, True]))
    assert measures.calibration_error(bins) == 0


@pytest.mark.parametrize("temperature", [0.001, 0.5, 1.0, 4.0])
def test_the_temperature_makes_logits_mean_what_they_say(temperature):
    """Labels are drawn from the probabilities of logits, which are then shown at another temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(5000, 3, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    found = measures.fit_temperature(temperature * logits, lambda shown: F.cross_entropy(shown, labels))
    assert found == pytest.approx(temperature, rel=0.06)
    assert measures.fit_temperature(torch.zeros(5, 3), lambda shown: F.cross_entropy(shown, labels[:5])) == 1
    confidences = {t: (temperature * logits / t).softmax(1).max(1) for t in (1.0, found)}
    errors = [
        measures.calibration_error(measures.calibration(c.values, c.indices == labels)) for c in confidences.values()
    ]
    assert temperature == 1 or errors[1] < errors[0] / 2


def clustered(draw: int, number: int = 30, size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers for so many patients of so many images, right for 0.7 of them, and those of one patient alike."""
    rng = np.random.RandomState(draw)
    easy = rng.beta(0.7, 0.3, number)
    right = rng.rand(number, size) < easy[:, None]
    return torch.from_numpy(right.ravel()), torch.arange(number).repeat_interleave(size)


def test_intervals_of_patients_cover_where_those_of_images_do_not():
    draws = [clustered(draw) for draw in range(500)]
    of_patients = [measures.share_interval(*drawn) for drawn in draws]
    of_images = [measures.share_interval(right) for right, _ in draws]
    covered = [np.mean([low <= 0.7 <= high for low, high in found]) for found in (of_patients, of_images)]
    assert 0.93 <= covered[0] <= 0.97 and covered[1] < 0.85


def test_intervals_of_clusters_of_one_image_are_those_of_images():
    right = torch.arange(400) % 4 > 0
    alone = measures.share_interval(right, torch.arange(400))
    assert alone == pytest.approx(measures.share_interval(right), abs=2e-3)
    assert measures.share_interval(right) == interval_of(300, 400)
    low, high = measures.share_interval(torch.ones(50, dtype=torch.bool), torch.arange(50) // 10)
    assert low < interval_of(5, 5)[0] + 0.01 and high == 1  # five patients, whatever the images
    assert measures.share_interval(right, torch.zeros(400, dtype=torch.long)) == (0, 1)


@pytest.mark.slow
def test_two_runs_are_compared_by_patients_where_images_say_too_much():
    """The second run gains 0.2 on average, more on some patients than on others, of whom each has four copies."""
    random, patients = np.random.RandomState(0), 12
    clusters, covered, significant = torch.arange(patients).repeat_interleave(4), [], []

    for _ in range(150):
        gains = torch.from_numpy(random.randn(patients)).repeat_interleave(4)
        for of, gain in ((covered, 0.2), (significant, 0.0)):
            found = [measured_mean(gains + gain, c) for c in (clusters, None)]
            of.append([low <= gain <= high if gain else p < 0.05 for (low, high), p in found])
    by_patient, by_image = np.mean(covered, axis=0)
    assert 0.91 <= by_patient <= 0.98 and by_image < 0.8
    by_patient, by_image = np.mean(significant, axis=0)
    assert by_patient <= 0.08 and by_image > 0.2


def test_clusters_are_left_out_whole_and_one_has_no_interval():
    clusters, seen = torch.tensor([0, 0, 1, 2, 2, 2]), []
    measures.jackknife(lambda weights: seen.append(weights) or weights[:, :1].double(), 6, clusters)
    assert len(seen[0]) == 4 and seen[0][0].all()
    assert (seen[0][:, 0] == seen[0][:, 1]).all() and (seen[0][:, 3:] == seen[0][:, 3:4]).all()
    assert (seen[0][1:, [0, 2, 3]].sum(1) == 2).all()
    right, of = clustered(0)
    ((low, high), _), ((inner_low, inner_high), _) = (measured_mean(right, c) for c in (of, None))
    assert high - low > 1.5 * (inner_high - inner_low)
    assert (low, high) == pytest.approx(measures.share_interval(right, of), abs=0.03)
    interval, p = measured_mean(torch.arange(20), torch.zeros(20, dtype=torch.long))
    assert all(map(math.isnan, interval)) and p == 1
