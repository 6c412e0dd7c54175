"""toolkit/answers/comparison.py: two results over the same images, and those that cannot be compared."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deploy_lora
from tests.image_files import write
from toolkit import InputError
from toolkit.answers import answer_reports, comparison, evaluation, multilabel, regression, segmentation, tasks
from toolkit.images.data import LabelledImages
from toolkit.run import reports


def written(folder: Path, reports: list[answer_reports.Report], groups=None, name: str = "results.json") -> list[Path]:
    """The results of two runs, of which the answers are there: of the second run in reverse order."""
    paths = []
    count = len(reports[0].answers.targets)
    images = LabelledImages([Image.new("RGB", (2, 2))] * count, [0] * count)
    images.groups = None if groups is None else np.array([f"p{group}" for group in groups])
    for run, report in zip("ab", reports, strict=True):
        paths.append(folder / run / name)
        paths[-1].parent.mkdir(exist_ok=True)
        comparison.write_answers(report.answer_columns(), images, paths[-1])
    path = comparison.answers_path(paths[1])
    title, *rows = path.read_text().splitlines()
    path.write_text("\n".join([title, *reversed(rows)]) + "\n")
    return paths


def class_report(right: torch.Tensor) -> answer_reports.Report:
    labels = torch.zeros(len(right), dtype=torch.long)
    result = evaluation.Evaluation(0.1, 0.0, (~right).long(), labels, torch.full((len(right),), 0.5))
    return tasks.Classification(["cat", "dog"]).report(result)


def label_report(names: list[str], truth: torch.Tensor, logits: torch.Tensor) -> answer_reports.Report:
    return tasks.MultiLabel(names, truth).report(multilabel.LabelAnswers(0.1, logits.sigmoid(), truth))


def number_report(names: list[str], truth: torch.Tensor, answers: torch.Tensor) -> answer_reports.Report:
    return tasks.Regression(names, truth).report(regression.NumberAnswers(0.1, answers, truth))


@pytest.fixture
def classes(tmp_path) -> list[Path]:
    """Results of two runs over 300 images of two classes, of which the second has more right."""
    return written(tmp_path, [class_report(torch.rand(300) > 0.3), class_report(torch.rand(300) > 0.15)])


def test_what_stage_1_gained_is_said_by_the_run_without_it(classes, tmp_path):
    """That which differs in nothing else, among others that do, and lies beside it."""
    without, mine = classes
    [expected] = comparison.compare(without, mine)
    own = {"model": {"stage1_adapter": "moco_lora.pth"}, "finetune": {"epochs": 2}}

    def write_results(path: Path, **settings) -> None:
        config = {**own, "model": {"stage1_adapter": None}, **settings}
        write(path, json.dumps({"task": "classification", "config": config}))

    write_results(without, finetune={"epochs": 3})
    write_results(tmp_path / "0 other images/results.json")  # and no answers
    write_results(tmp_path / "1 stage 1 too/results.json", **own)
    write(tmp_path / "2 broken/results.json", "broken")
    assert reports.gained_by_stage_1(mine, own).endswith(f"compare RUN_WITHOUT_IT/results.json {mine}")
    write_results(without)
    found = reports.gained_by_stage_1(mine, own)
    assert f"accuracy {expected.first:.2%}, {expected.second:.2%}: +" in found
    assert found.endswith(f"p = {expected.p:.2g}, against {tmp_path / 'a'}")


def test_masks_are_compared_image_by_image(tmp_path, capsys):
    """The second run has more pixels right of each of 40 images, of which some are much harder than others."""
    truth = torch.randint(3, (40, 100))
    draws = torch.rand(40, 100) / torch.rand(40, 1)
    reports = []
    for share in (0.8, 0.7):
        pairs = 3 * truth + torch.where(draws < share, (truth + 1) % 3, truth)
        confusion = torch.nn.functional.one_hot(pairs, 9).sum(1).view(40, 3, 3)
        answers = segmentation.PixelAnswers(0.1, confusion, torch.ones(10, 3))
        reports.append(segmentation.Segmentation(["sea", "land", "sky: pixels"]).report(answers))
    found = deploy_lora.main(["compare", *map(str, written(tmp_path, reports))])
    before, after = (report.figures() for report in reports)
    for difference, name in zip(found, ("miou", "macro_dice", "pixel_accuracy"), strict=True):
        assert (difference.first, difference.second) == pytest.approx((before[name], after[name]))
        assert 0 < difference.low < after[name] - before[name] < difference.high and difference.p < 0.01
    assert before["miou_interval"][1] > after["miou_interval"][0]  # unpaired, chance might have made it
    assert "mean IoU" in capsys.readouterr().out


@pytest.mark.parametrize("report, measure, key", [(label_report, "macro AP", "macro_ap"), (number_report, "R2", "r2")])
def test_labels_and_numbers_are_compared_by_their_scores(tmp_path, report, measure, key):
    truth = (torch.rand(200, 2) < 0.4).float()
    truth[0, 0] = math.nan
    answers = truth.nan_to_num() + torch.tensor([2.0, 0.7])[:, None, None] * torch.randn(2, 200, 2)
    reports = [report(["cat", "dog"], truth, of_run) for of_run in answers]
    paths = written(tmp_path, reports)
    found, *_ = comparison.compare(*paths)
    assert found.measure == measure
    assert found.second == pytest.approx(reports[1].figures()[key], abs=1e-4)
    assert found.low > 0 and found.p < 0.01
    alike, *_ = comparison.compare(*written(tmp_path, reports[:1] * 2, name="alike.json"))
    assert (alike.second - alike.first, alike.p) == (0, 1)
    told = f"{found.first:.2%}" if measure == "macro AP" else f"{found.first:.4g}"
    assert comparison.table([found], *paths)[2][1].startswith(told)
    truth[1, 1] += 1.0
    _, other = written(tmp_path, [report(["cat", "dog"], truth, truth.nan_to_num())] * 2, name="other.json")
    with pytest.raises(InputError, match="do not agree on what is true: look at the column dog"):
        comparison.compare(paths[0], other)


def test_copies_of_a_patients_image_are_no_more_evidence(tmp_path):
    """Ten patients, of whom the second run gets four more right: copies of their images leave p where it was."""

    def paths(name: str, copies: int, groups=None) -> list[Path]:
        patients = torch.arange(10).repeat(copies)
        return written(tmp_path, [class_report(patients >= 5), class_report(patients >= 1)], groups, name)

    [once] = comparison.compare(*paths("once.json", 1))
    alone = paths("alone.json", 30)
    grouped = paths("grouped.json", 30, list(range(10)) * 30)
    assert comparison.answers_path(grouped[0]).read_text().startswith("image,group,class,")
    [of_images] = comparison.compare(*alone)
    [of_patients] = comparison.compare(*grouped)
    assert of_patients.p == once.p == 0.125 and of_images.p < 1e-30
    assert of_patients.high - of_patients.low > 4 * (of_images.high - of_images.low)
    [either] = comparison.compare(grouped[0], alone[1])  # one file that knows the groups is enough
    assert either == of_patients
    # Nor of labels, whatever they are called.
    truth = (torch.rand(40, 2) < 0.4).float()
    answers = truth + torch.tensor([1.2, 1.0])[:, None, None] * torch.randn(2, 40, 2)
    reports = [label_report(["group", "image"], truth.repeat(6, 1), of_run.repeat(6, 1)) for of_run in answers]
    of_images, *_ = comparison.compare(*written(tmp_path, reports))
    of_patients, *_ = comparison.compare(*written(tmp_path, reports, list(range(40)) * 6))
    assert of_patients[:3] == of_images[:3]
    assert of_patients.high - of_patients.low > 1.8 * (of_images.high - of_images.low)
    assert of_patients.p > of_images.p
    numbers = ["cat", "cat answer", "cat probability", "cat probability answer"]  # called as the answers of a label
    assert comparison._truth(numbers) == (["cat", "cat probability"], " answer")


def test_groups_that_differ_or_of_which_there_is_one(tmp_path, capsys):
    right = class_report(torch.arange(6) < 3)
    all_right = class_report(torch.ones(6, dtype=torch.bool))
    first, _ = written(tmp_path, [right, right], [0, 0, 1, 1, 2, 2], "first.json")
    _, other = written(tmp_path, [right, right], [0, 0, 0, 1, 1, 1], "other.json")
    with pytest.raises(InputError, match="have the images in other groups: evaluate both with one --group-by"):
        comparison.compare(first, other)
    paths = written(tmp_path, [right, all_right], [0] * 6)
    [difference] = deploy_lora.main(["compare", *map(str, paths)])
    assert difference.p == 1 and math.isnan(difference.low)
    assert "+50.00% (no interval), p = 1" in capsys.readouterr().out
    [*_, (_, told)] = comparison.table([difference._replace(second=math.nan)], *paths)
    assert told == "not defined on these images"
    bare, _ = written(tmp_path, [right, right], name="bare.json")
    for pair in ((bare, paths[1]), (paths[1], bare)):  # one of the two says the groups of both
        assert math.isnan(comparison.compare(*pair)[0].low)


def test_results_that_cannot_be_compared(classes):
    path = comparison.answers_path(classes[1])
    text = path.read_text()
    for changed, problem in (
        (text.replace("299,", "300,"), "are over other images, such as 299"),
        (text.replace(",cat,cat,", ",dog,cat,"), "do not agree on what is true: look at the column class"),
        (text.replace("answer", "reply"), "is of other classes, labels or numbers than"),
        (text.replace("image", "name"), "is not a table of answers, or damaged"),
        (f"{text}7\n", "is not a table of answers, or damaged"),
        (text.splitlines()[0], "is not a table of answers, or damaged"),
        ("", "is not a table of answers, or damaged"),
    ):
        path.write_text(changed)
        with pytest.raises(InputError, match=problem):
            comparison.compare(*classes)
    for results in classes:
        comparison.answers_path(results).write_text(text.replace("answer", "reply"))
    with pytest.raises(InputError, match="does not say what is true: evaluate again"):
        comparison.compare(*classes)
    path.unlink()
    with pytest.raises(InputError, match=r"No such file .*; a run, or evaluate --output, writes answers there"):
        comparison.compare(*classes)


def test_runs_that_differ_by_their_seed_share_a_row_of_the_table(tmp_path, capsys):
    """A searched rate is told from a typed one."""

    def result(name: str, score: float | None, chosen_by: dict | None = None, **settings) -> Path:
        found = {"task": "classification", "val_accuracy": score, "val_images": 30, "chosen_by": chosen_by or {}}
        found["config"] = {"model": {"arch": "vit_mini"}, "finetune": settings}
        return write(tmp_path / f"{name}.json", json.dumps(found))

    typed = result("typed", 0.7, seed=0, learning_rate=1e-3)
    searched = result("searched", 0.8, {"learning rate": "trials"}, seed=1, learning_rate=1e-3)
    told = [what.partition("; ")[2] for _, what in comparison.table_of_runs([typed, searched])]
    assert told == ["learning_rate auto", "learning_rate 0.001"]

    scores = {(8, 0): 0.7, (8, 1): 0.8, (4, 0): 0.6}
    paths = [result(f"{rank} {seed}", score, lora_rank=rank, seed=seed) for (rank, seed), score in scores.items()]
    evaluated = write(tmp_path / "evaluated.json", '{"task": "classification", "accuracy": 0.9, "images": 30}')
    assert deploy_lora.main(["compare", *map(str, [*paths, evaluated])]) == [
        ("0.9000", f"1 of {evaluated}; "),
        ("0.7500 ± 0.0707", f"2 of {paths[0]}; lora_rank 8"),
        ("0.6000", f"1 of {paths[2]}; lora_rank 4"),
    ]
    assert "0.7500 ± 0.0707" in capsys.readouterr().out
    assert comparison.table_of_runs([paths[0], paths[0]]) == [("0.7000", f"1 of {paths[0]}; ")]  # one run, named twice
    assert len(comparison.table_of_runs([result("not defined", None), *paths])) == 2
    evaluated.write_text('{"task": "classification", "accuracy": 0.9, "images": 31}')
    with pytest.raises(InputError, match="classification of 30 images, classification of 31 images: compare results"):
        comparison.table_of_runs([evaluated, *paths])
    (tmp_path / "runs.csv").touch()
    with pytest.raises(InputError, match=r"runs\.csv is no results\.json"):
        comparison.table_of_runs([tmp_path / "runs.csv", *paths])
