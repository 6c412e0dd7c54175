"""toolkit/answers/comparison.py: two results over the same images, and those that cannot be compared."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deploy_lora
from toolkit import InputError
from toolkit.answers import answer_reports, comparison, measures, multilabel, regression, segmentation, tasks
from toolkit.answers.evaluation import Evaluation
from toolkit.images.data import LabelledImages


def images(count: int, groups=None) -> LabelledImages:
    found = LabelledImages([(Image.new("RGB", (2, 2)), 0)] * count, [0] * count)
    found.groups = None if groups is None else np.array([f"p{group}" for group in groups])
    return found


def write(report: answer_reports.Report, path, count: int, groups=None):
    comparison.write_answers(report.answer_columns(), images(count, groups), path)
    return path


@pytest.fixture
def classes(tmp_path):
    """Results of two runs over 300 images of two classes, of which the second has more right."""
    random, paths = np.random.RandomState(0), []
    labels = torch.from_numpy(random.randint(0, 2, 300))
    wrong = [torch.from_numpy(random.rand(300) < share) for share in (0.3, 0.15)]
    for name, flipped in zip("ab", wrong, strict=True):
        result = Evaluation(0.1, 0.0, labels ^ flipped, labels, torch.full((300,), 0.5))
        report = tasks.Classification(["cat", "dog"]).report(result)
        paths.append(write(report, tmp_path / name / "results.json", 300))
    return paths, wrong


def test_masks_are_compared_image_by_image(tmp_path, capsys):
    """The second run has more pixels right of each of 40 images, of which some are much harder than others."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(3, (40, 100), generator=generator)
    draws = torch.rand(40, 100, generator=generator)
    hardness = torch.rand(40, 1, generator=generator)
    reports = []
    for name, share in zip("ab", (0.8, 0.7), strict=True):
        answered = torch.where(draws < share * hardness, (truth + 1) % 3, truth)
        pairs = torch.nn.functional.one_hot(truth)[:, :, :, None] * torch.nn.functional.one_hot(answered)[:, :, None]
        answers = segmentation.PixelAnswers(0.1, pairs.sum(1), torch.ones(10, 3))
        reports.append(segmentation.Segmentation(["sea", "land", "sky: pixels"]).report(answers))
        write(reports[-1], tmp_path / name / "results.json", 40)
    found = deploy_lora.main(["compare", str(tmp_path / "a/results.json"), str(tmp_path / "b/results.json")])
    before, after = (report.figures() for report in reports)
    for difference, name in zip(found, ("val_miou", "macro_dice", "pixel_accuracy"), strict=True):
        name = name.removeprefix("val_")
        assert (difference.first, difference.second) == pytest.approx((before[name], after[name]))
        assert 0 < difference.low < after[name] - before[name] < difference.high and difference.p < 0.01
    assert before["miou_interval"][1] > after["miou_interval"][0]  # unpaired, chance might have made it
    assert "mean IoU" in capsys.readouterr().out


@pytest.fixture(autouse=True)
def folders(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()


def test_accuracies_are_compared_by_the_exact_test_in_any_order(classes, capsys, tmp_path):
    paths, wrong = classes
    [difference] = deploy_lora.main(["compare", *map(str, paths)])
    accuracies = [1 - of.double().mean().item() for of in wrong]
    assert (difference.first, difference.second) == pytest.approx(accuracies)
    assert difference.p == measures.mcnemar(~wrong[0], ~wrong[1]) < 0.01
    assert 0 < difference.low < accuracies[1] - accuracies[0] < difference.high
    shown = f"{accuracies[0]:.2%}, {accuracies[1]:.2%}: {accuracies[1] - accuracies[0]:+.2%}"
    assert shown in (told := capsys.readouterr().out) and f"p = {difference.p:.2g}" in told
    [same] = comparison.compare(paths[0], paths[0])
    assert math.isnan(same.low) and same.p == 1
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
            found = multilabel.LabelAnswers(0.1, answers.sigmoid(), truth)
            report = tasks.MultiLabel(["cat", "dog"], truth).report(found)
        else:
            task = tasks.Regression(["cat", "dog"], truth)
            report = task.report(regression.NumberAnswers(0.1, answers, truth))
        paths.append(write(report, tmp_path / name / "results.json", 200))
        if name == "b":
            best = report.figures()
    found = {difference.measure: difference for difference in comparison.compare(*paths)}
    measure, figure = ("macro AP", "macro_ap") if kind == "multilabel" else ("R2", "r2")
    assert found[measure].second == pytest.approx(best[figure], abs=1e-4)
    assert found[measure].low > 0 and found[measure].p < 0.01


def test_probabilities_are_compared_as_they_were(tmp_path):
    """Of a label that is hardly probable anywhere, six decimals would make one rank of all images."""
    generator = torch.Generator().manual_seed(0)
    truth = (torch.rand(200, 1, generator=generator) < 0.3).float()
    shares = 1e-8 * (truth + torch.rand(200, 1, generator=generator) + 1)
    report = tasks.MultiLabel(["rare"], truth).report(multilabel.LabelAnswers(0.1, shares, truth))
    path = write(report, tmp_path / "a" / "results.json", 200)
    found = {difference.measure: difference.first for difference in comparison.compare(path, path)}
    figures = report.figures()
    assert found["macro AUROC"] == figures["macro_auroc"] > 0.9 and found["macro AP"] == figures["macro_ap"]


def class_report(right: torch.Tensor) -> answer_reports.Report:
    labels = torch.zeros(len(right), dtype=torch.long)
    result = Evaluation(0.1, 0.0, (~right).long(), labels, torch.full((len(right),), 0.5))
    return tasks.Classification(["cat", "dog"]).report(result)


def test_copies_of_a_patients_image_are_no_more_evidence(tmp_path):
    """Ten patients, of whom the second run gets four more right: copies of their images leave p where it was."""
    first, second = torch.arange(10) >= 5, torch.arange(10) >= 1
    reports = [class_report(right) for right in (first, second)]
    once = comparison.compare(*(write(of, tmp_path / n / "one.json", 10) for n, of in zip("ab", reports, strict=True)))
    reports = [class_report(right.repeat(30)) for right in (first, second)]
    patients = list(range(10)) * 30
    grouped = [write(of, tmp_path / n / "g.json", 300, patients) for n, of in zip("ab", reports, strict=True)]
    alone = [write(of, tmp_path / n / "i.json", 300) for n, of in zip("ab", reports, strict=True)]
    assert comparison.answers_path(grouped[0]).read_text().startswith("image,group,class,")
    [of_patients], [of_images] = comparison.compare(*grouped), comparison.compare(*alone)
    assert of_patients.p == once[0].p == 0.125 and of_images.p < 1e-30
    assert of_patients.high - of_patients.low > 4 * (of_images.high - of_images.low)
    [either] = comparison.compare(grouped[0], alone[1])  # one file that knows the groups is enough
    assert either == of_patients


@pytest.mark.parametrize("names", [["cat", "dog"], ["group", "image"]])
def test_labels_are_compared_over_patients_whatever_they_are_called(tmp_path, names):
    generator = torch.Generator().manual_seed(0)
    patients = torch.arange(40).repeat(6)
    truth = (torch.rand(40, 2, generator=generator) < 0.4).float().repeat(6, 1)
    paths = {None: [], "patients": []}
    for name, strength in zip("ab", (1.2, 1.0), strict=True):
        answers = (truth[:40] + strength * torch.randn(40, 2, generator=generator)).sigmoid().repeat(6, 1)
        report = tasks.MultiLabel(names, truth).report(multilabel.LabelAnswers(0.1, answers, truth))
        for of in paths:
            groups = None if of is None else patients.tolist()
            paths[of].append(write(report, tmp_path / name / f"{of}.json", 240, groups))
    [of_images, *_], [of_patients, *_] = (comparison.compare(*of) for of in paths.values())
    assert of_patients[:3] == of_images[:3]
    assert of_patients.high - of_patients.low > 1.8 * (of_images.high - of_images.low)
    assert of_patients.p > of_images.p


@pytest.mark.parametrize("names", [["rain", "rain probability"], ["sunny answer", "rain probability"]])
def test_numbers_may_be_called_as_columns_of_answers_end(tmp_path, names):
    truth = torch.tensor([[0.0, 1.0], [1.0, 3.0], [2.0, 5.0]])
    task = tasks.Regression(names, truth)
    for name, error in zip("ab", (0.5, 0.1), strict=True):
        report = task.report(regression.NumberAnswers(0.1, truth + error, truth))
        write(report, tmp_path / name / "results.json", 3)
    found = comparison.compare(tmp_path / "a/results.json", tmp_path / "b/results.json")
    assert [difference.measure for difference in found] == ["R2", "mean absolute error"]
    assert (found[1].first, found[1].second) == pytest.approx((0.5, 0.1))


def test_groups_that_differ_or_of_which_there_is_one(tmp_path, capsys):
    right = torch.arange(6) < 3
    paths = [
        write(class_report(right), tmp_path / name / "results.json", 6, groups)
        for name, groups in (("a", [0, 0, 1, 1, 2, 2]), ("b", [0, 0, 0, 1, 1, 1]))
    ]
    with pytest.raises(InputError, match="have the images in other groups: evaluate both with one --group-by"):
        comparison.compare(*paths)
    right = torch.arange(6) < 3
    path = write(class_report(right), tmp_path / "a" / "results.json", 6, [0] * 6)
    other = write(class_report(~right | right), tmp_path / "b" / "results.json", 6, [0] * 6)
    [difference] = deploy_lora.main(["compare", str(path), str(other)])
    assert difference.p == 1 and math.isnan(difference.low)
    assert "+50.00% (no interval), p = 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: None, "No such file or directory; a run, or evaluate --output, writes answers there"),
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


def runs_of(folder: Path, **scores: float) -> list[Path]:
    """A `results.json` for each run called `rank_seed`."""
    paths = []
    for name, score in scores.items():
        _, rank, seed = name.split("_")
        settings = {"model": {"arch": "vit_mini"}, "finetune": {"lora_rank": int(rank), "seed": int(seed)}}
        results = {"task": "classification", "val_accuracy": score, "probe_accuracy_before": 0.5, "config": settings}
        results["val_images"] = 30
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(results))
    return paths


def test_errors_of_any_unit_are_told_with_their_digits(tmp_path):
    difference = comparison.Difference("mean absolute error", 2.5e-6, 2.1e-6, -5e-7, -3e-7, 0.01)
    assert "2.5e-06, 2.1e-06: -4e-07" in comparison.table([difference], tmp_path, tmp_path)[-1][1]


def test_runs_that_differ_by_their_seed_share_a_row_of_the_table(tmp_path, capsys):
    paths = runs_of(tmp_path, r_8_0=0.7, r_8_1=0.8, r_4_0=0.6)
    evaluated = tmp_path / "evaluated.json"
    evaluated.write_text(json.dumps({"task": "classification", "accuracy": 0.9, "images": 30}))
    rows = deploy_lora.main(["compare", *map(str, [*paths, evaluated])])
    assert rows == [
        ("0.9000", f"1 of {evaluated}; "),
        ("0.7500 ± 0.0707", f"2 of {paths[0]}; lora_rank 8"),
        ("0.6000", f"1 of {paths[2]}; lora_rank 4"),
    ]
    assert "0.7500 ± 0.0707" in capsys.readouterr().out
    assert comparison.table_of_runs([paths[0], paths[0]]) == [("0.7000", f"1 of {paths[0]}; ")]  # one run, named twice
    nothing = tmp_path / "nothing.json"
    nothing.write_text(json.dumps({"task": "classification", "val_accuracy": None, "val_images": 30}))
    assert len(comparison.table_of_runs([nothing, *paths])) == 2
    evaluated.write_text(json.dumps({"task": "classification", "accuracy": 0.9, "images": 31}))
    with pytest.raises(InputError, match="classification of 30 images, classification of 31 images: compare those"):
        comparison.table_of_runs([evaluated, *paths])
    (tmp_path / "runs.csv").touch()
    with pytest.raises(InputError, match=r"runs\.csv is no results\.json"):
        comparison.table_of_runs([tmp_path / "runs.csv", *paths])
