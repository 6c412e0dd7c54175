"""toolkit/comparison.py: two results over the same images, and those that cannot be compared."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import deploy_lora
from toolkit import InputError, answer_reports, comparison, measures, tasks
from toolkit.data import LabelledImages
from toolkit.training import Evaluation


def images(count: int) -> LabelledImages:
    return LabelledImages([(Image.new("RGB", (2, 2)), 0)] * count, [0] * count)


def write(report: answer_reports.Report, path, count: int):
    comparison.write_answers(report.answer_columns(), images(count), path)
    return path


@pytest.fixture
def classes(tmp_path):
    """Results of two runs over 300 images of two classes, of which the second has more right."""
    random, paths = np.random.RandomState(0), []
    labels = torch.from_numpy(random.randint(0, 2, 300))
    wrong = [torch.from_numpy(random.rand(300) < share) for share in (0.3, 0.15)]
    for name, flipped in zip("ab", wrong, strict=True):
        result = Evaluation(0.1, 0.0, labels ^ flipped, labels, torch.full((300,), 0.5))
        report = answer_reports.ClassReport(tasks.Classification(["cat", "dog"]), result)
        paths.append(write(report, tmp_path / name / "results.json", 300))
    return paths, wrong


@pytest.fixture(autouse=True)
def folders(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()


def test_accuracies_are_compared_by_the_exact_test(classes, capsys):
    paths, wrong = classes
    [difference] = deploy_lora.main(["compare", *map(str, paths)])
    accuracies = [1 - of.double().mean().item() for of in wrong]
    assert (difference.first, difference.second) == pytest.approx(accuracies)
    assert difference.p == measures.mcnemar(~wrong[0], ~wrong[1]) < 0.01
    assert 0 < difference.low < accuracies[1] - accuracies[0] < difference.high
    shown = f"{accuracies[0]:.2%}, {accuracies[1]:.2%}: {accuracies[1] - accuracies[0]:+.2%}"
    assert shown in (told := capsys.readouterr().out) and f"p = {difference.p:.2g}" in told
    [same] = comparison.compare(paths[0], paths[0])
    assert (same.low, same.high, same.p) == (0, 0, 1)


def test_the_order_of_the_images_does_not_matter(classes, tmp_path):
    paths, _ = classes
    before = comparison.compare(*paths)
    path = comparison.answers_path(paths[1])
    title, *rows = path.read_text().splitlines()
    path.write_text("\n".join([title, *reversed(rows)]) + "\n")
    assert comparison.compare(*paths)[0][:3] == before[0][:3]


@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_labels_and_numbers_are_compared_by_their_scores(tmp_path, kind):
    generator = torch.Generator().manual_seed(0)
    truth = (torch.rand(200, 2, generator=generator) < 0.4).float()
    truth[0, 0] = math.nan
    noise = torch.randn(2, 200, 2, generator=generator)
    paths = []
    for name, strength, of in zip("ab", (2.0, 0.7), noise, strict=True):
        answers = truth.nan_to_num() + strength * of
        if kind == "multilabel":
            report = answer_reports.LabelReport(
                tasks.MultiLabel(["cat", "dog"], truth), tasks.LabelAnswers(0.1, answers.sigmoid(), truth)
            )
        else:
            task = tasks.Regression(["cat", "dog"], truth)
            report = answer_reports.NumberReport(task, tasks.NumberAnswers(0.1, answers, truth))
        paths.append(write(report, tmp_path / name / "results.json", 200))
        if name == "b":
            best = report.figures()
    found = {difference.measure: difference for difference in comparison.compare(*paths)}
    measure, figure = ("macro AP", "macro_ap") if kind == "multilabel" else ("R2", "r2")
    assert found[measure].second == pytest.approx(best[figure], abs=1e-4)
    assert found[measure].low > 0 and found[measure].p < 0.01


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: None, "No such file or directory; the answers for each image lie there if a run"),
        (lambda text: text.replace("299,", "300,"), "are over other images, such as 299"),
        (lambda text: text.replace(",cat,cat,", ",dog,cat,"), "do not agree on what is true: look at the column class"),
        (lambda text: text.replace("answer", "reply"), "is of other classes, labels or numbers than"),
        (lambda text: text.replace("image", "name"), "is not a table of answers, or damaged"),
        (lambda text: text + "7\n", "is not a table of answers, or damaged"),
        (lambda text: "", "is not a table of answers, or damaged"),
    ],
)
def test_results_that_cannot_be_compared(classes, change, problem):
    paths, _ = classes
    path = comparison.answers_path(paths[1])
    changed = change(path.read_text())
    path.unlink() if changed is None else path.write_text(changed)
    with pytest.raises(InputError) as raised:
        comparison.compare(*paths)
    assert problem in str(raised.value)
