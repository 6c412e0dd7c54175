"""toolkit/answers/answer_reports.py: the figures, tables and pictures of several labels an image, and of numbers."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from toolkit.answers import multilabel, regression, tasks
from toolkit.answers.evaluation import Evaluation
from toolkit.images.data import LabelledImages

pytestmark = pytest.mark.usefixtures("pictures")
NAMES = ["cat", "a $dog$", "eel"]


@pytest.fixture
def labels() -> multilabel.LabelReport:
    """The third label is on no image; one is unknown of the first."""
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(30, 3, generator=generator) < torch.tensor([0.5, 0.3, 0.0])).float()
    probabilities = (0.6 * targets + 0.4 * torch.rand(30, 3, generator=generator)).clamp(0, 1)
    targets[0, 0] = math.nan
    probabilities[3], targets[3] = torch.tensor([0.99, 0.1, 0.1]), torch.tensor([0.0, 0.0, 0.0])
    task = tasks.MultiLabel(NAMES, targets, thresholds=torch.tensor([0.5, 0.4, 0.5]))
    return task.report(multilabel.LabelAnswers(0.1, probabilities, targets))


@pytest.fixture
def numbers() -> regression.NumberReport:
    truth = torch.arange(40.0).reshape(20, 2).clone()
    answers = truth + torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    truth[0, 0], answers[5, 1] = math.nan, 100.0
    task = tasks.Regression(["age", "weight"], truth)
    return task.report(regression.NumberAnswers(0.1, answers, truth))


def test_the_page_shows_how_far_probabilities_can_be_believed(labels, tmp_path):
    """Answers that are right as often as they say; before, they said half as much."""
    shares = torch.linspace(0.05, 0.95, 400)
    right = torch.rand(400, generator=torch.Generator().manual_seed(0)) < shares
    result = Evaluation(0.5, 0.5, right.long(), torch.ones(400).long(), shares, before=shares / 2)
    task = tasks.Classification(["a", "b"])
    task.head.temperature = 0.5
    report = task.report(result)
    figures = report.figures()
    assert figures["calibration_error"] < 0.07 < 0.2 < figures["calibration_error_before"]
    assert figures["temperature"] == 0.5
    report.answers = result._replace(confidences=shares / 2, before=shares)
    was = f"before calibration {figures['calibration_error']:.1%}"
    assert was in dict(report.rows())["probabilities off by"]
    assert "temperature" not in labels.figures() and "before" not in dict(labels.rows())["probabilities off by"]
    report.draw(tmp_path / "matrix.png")
    for sections in (report.sections(tmp_path / "matrix.png"), labels.reliability_section()):
        page = "".join(sections)
        assert "Can the probabilities be believed?" in page and "data:image/png;base64,iVBOR" in page


def images(count: int) -> LabelledImages:
    return LabelledImages([(Image.new("RGB", (8, 8), (i, 0, 0)), 0) for i in range(count)], [0] * count)


def test_each_headline_has_an_interval_around_it(labels, numbers):
    for report in (labels, numbers):
        figures = report.figures()
        for name in report.HEADLINES:
            low, high = figures[f"{name}_interval"]
            assert low <= figures[name] <= high and low < high
        assert json.loads(json.dumps(figures, allow_nan=False)) == figures
        rows = [text for title, text in report.rows() if title and title != "probabilities off by"]
        assert len(rows) >= 4 and all("95% interval" in text for text in rows)


def test_means_over_classes_have_intervals_around_them():
    """As scikit-learn measures them, of drawn images too; a class without images has no share."""
    random = np.random.RandomState(0)
    labels = torch.from_numpy(random.choice(3, 200, p=[0.6, 0.3, 0.1]))
    said = torch.where(torch.from_numpy(random.rand(200) < 0.7), labels, torch.from_numpy(random.randint(0, 3, 200)))
    result = Evaluation(0.1, 0.0, said, labels, torch.full((200,), 0.5))
    figures = tasks.Classification([*NAMES, "owl"]).report(result).figures()
    for name in ("balanced_accuracy", "macro_f1"):
        low, high = figures[f"{name}_interval"]
        assert low < figures[name] < high < low + 0.3
    draws = [random.randint(0, 200, 200) for _ in range(300)]
    drawn = [balanced_accuracy_score(labels[draw], said[draw]) for draw in draws]
    assert figures["balanced_accuracy_interval"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)


def test_a_label_that_no_image_has_is_left_out_and_said(labels):
    figures = labels.figures()
    assert figures["labels"]["eel"]["average_precision"] is None and figures["labels"]["eel"]["positives"] == 0
    both = [figures["labels"][name]["average_precision"] for name in NAMES[:2]]
    assert figures["macro_ap"] == pytest.approx(sum(both) / 2)
    assert ("", "no evaluation image has eel: left out of the means") in labels.rows()
    assert labels.by_label()[-1][0] == "eel" and figures["labels"]["cat"]["unknown"] == 1


def test_the_most_confidently_wrong_label_is_shown_first(labels):
    [mistakes] = labels.mistakes().values()
    assert mistakes[0] == (3, "cat is not there: 99%")


def test_the_largest_error_is_shown_first(numbers):
    [mistakes] = numbers.mistakes().values()
    image, told = mistakes[0]
    assert image == 5 and told == "weight 11, answered 100"
    assert all(math.isfinite(numbers.answers.targets[i, 0]) for i, told in mistakes if "age" in told)


def test_the_answers_of_each_image_are_columns(labels, numbers):
    columns = labels.answer_columns()
    assert list(columns) == [key for name in NAMES for key in (name, f"{name} probability")]
    assert columns["cat"][0] == "" and set(columns["cat"][1:]) == {"0", "1"}
    assert float(columns["cat probability"][3]) == pytest.approx(0.99)
    assert numbers.answer_columns()["weight answer"][5] == "100" and numbers.answer_columns()["age"][0] == ""


def test_pages_have_a_row_for_each_label_and_number(labels, numbers, tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (3, 2)).save(picture)
    page = "".join(labels.sections(picture))
    assert all(f"<td>{name}</td>" in page for name in NAMES) and "threshold" in page
    assert "<td>weight</td>" in "".join(numbers.sections(picture))
    assert labels.printed()[1][0] in NAMES and numbers.printed()[1][0] == "age"


def test_pictures_are_drawn_where_nothing_is_wrong_too(labels, numbers, tmp_path):
    for report, count in ((labels, 30), (numbers, 20)):
        report.draw(tmp_path / report.picture)
        report.draw_mistakes(images(count), tmp_path / "mistakes.png")
        report.mistakes = lambda: {"Wrong": []}
        report.draw_mistakes(images(count), tmp_path / "none.png")
        for name in (report.picture, "mistakes.png", "none.png"):
            assert Image.open(tmp_path / name).width > 300


def test_numbers_that_are_all_the_same_have_no_r2_and_are_told_nonetheless(numbers):
    """As of a few evaluation images."""
    truth = torch.tensor([[2.0, 3.0]] * 4)
    report = regression.NumberReport(numbers.head, regression.NumberAnswers(0.1, truth + 1, truth))
    figures = report.figures()
    assert figures["r2"] is None and figures["r2_interval"] is None and figures["mae"] == pytest.approx(1)
    json.dumps(figures, allow_nan=False)
    assert report.rows() and report.by_number()
