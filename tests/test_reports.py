"""What a run leaves for people: numbers against scikit-learn, pictures of every kind of result, its verdict."""

import argparse
import html
import json
import math
import re
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from toolkit import TOOLKIT, VERSION
from toolkit.answers import answer_reports, classification, multilabel, regression, report_page
from toolkit.answers.evaluation import Evaluation
from toolkit.answers.measures import jackknife, mcnemar, mean_interval, share_interval
from toolkit.answers.tasks import Classification, MultiLabel, Regression, Segmentation
from toolkit.images.data import LabelledImages
from toolkit.run import reports, verdict

pytestmark = pytest.mark.usefixtures("pictures")
TASK = Classification(["cat", "dog"])
NAMES = ["cat", "eel", "a $dog$"]


def evaluation(labels: list[int], predictions: list[int], confidences: list[float] | None = None) -> Evaluation:
    labels = torch.tensor(labels)
    predictions = torch.tensor(predictions)
    confidences = torch.tensor(confidences or [0.5] * len(labels))
    return Evaluation(0.3, (labels == predictions).float().mean().item(), predictions, labels, confidences)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_means_over_classes_are_scikit_learns_with_the_intervals_of_the_jackknife():
    labels = [0, 2, 3] * 30
    predictions = [0, 2, 3, 0, 2, 0, 2, 4, 0, 0, 3, 0, 2, 3, 0] * 6  # one that no image is of, too
    answers = evaluation(labels, predictions)
    expected = {"accuracy": accuracy_score(labels, predictions)}
    expected["balanced_accuracy"] = balanced_accuracy_score(labels, predictions)
    expected["macro_f1"] = f1_score(labels, predictions, average="macro")
    assert answers.measured() == pytest.approx(expected)
    figures = Classification(["cat", "owl", "eel", "dog", "ant"]).report(answers).figures()
    assert figures["accuracy_per_class"]["owl"] is None and json.dumps(figures, allow_nan=False)
    for name, [figure] in jackknife(answers.weighted, torch.arange(90), {}).items():
        assert figures[name] == pytest.approx(figure.value)
        assert figures[f"{name}_interval"] == pytest.approx(figure.interval)


def test_a_rare_class_of_which_all_images_are_right_is_not_sure():
    """Leaving out some of them changes nothing: the interval is at least that of the mean of both classes' shares."""
    labels = [0] * 95 + [1] * 5
    answers = evaluation(labels, labels)
    _, (low, high), _ = TASK.report(answers).headlines()[1]
    assert (low, high) == pytest.approx(mean_interval(torch.ones(2), torch.tensor([95, 5])))
    _, by_patient, _ = TASK.report(answers, torch.arange(100) // 5).headlines()[1]
    assert by_patient[0] == pytest.approx(mean_interval(torch.ones(2), torch.tensor([19, 1]))[0])


def test_mistakes_are_drawn_most_confident_first_with_their_names_as_they_are(tmp_path, spy):
    """Dollars begin no formula, and a folder's bytes that are no character are shown as a question mark."""
    assert report_page.drawn("under$10%, caf\udce9") == r"under\$10%, caf?"
    read = spy(LabelledImages, "undecoded")
    result = evaluation([0, 1] * 10, [1] * 20, [0.5 + 0.01 * i for i in range(20)])
    report = Classification(["under$10%", "over$10% caf\udce9"]).report(result)
    report.draw_mistakes(images(20), tmp_path / "some.png")
    assert [image for (_, image), _ in read.call_args_list] == [*range(18, -1, -2)]
    report.draw(tmp_path / "matrix.png")


def test_a_confusion_matrix_counts_the_answers_for_each_true_class(monkeypatch, tmp_path):
    """Of four classes each; or two at a time, where there is no room for all."""
    drawn = []
    monkeypatch.setattr(answer_reports, "plot_confusion", lambda matrix, *about: drawn.append(matrix.tolist()))
    report = Classification(list("abcd")).report(evaluation([0, 0, 1, 2], [0, 1, 1, 0]))
    report.draw(tmp_path / "all.png")
    monkeypatch.setattr(classification, "MOST_ROWS", 2)
    report.draw(tmp_path / "pairs.png")
    assert drawn == [[[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], [[3, 0], [1, 0]]]
    assert list(report.most_confused()) == [("a", "b", 1, "50.0%"), ("c", "a", 1, "100.0%")]


def summary(task, report, baseline: dict, folder, **results) -> list[tuple[str, str]]:
    """Of a run of which any other number is 1."""
    options = argparse.Namespace(output_dir=folder, keep_best="macro-ap", group_by="patient")
    run = argparse.Namespace(task=task, args=options, baseline=baseline, by_unlabelled=None)
    return list(reports.summary(run, defaultdict(lambda: 1, {"device": "cpu", "chosen_by": {}} | results), report))


def test_the_summary_says_which_scores_are_not_defined_what_images_chose_and_groups(tmp_path):
    """Of labels of which no evaluation image is known, or numbers that do not differ."""
    task = MultiLabel(["cat", "dog"])
    report = task.report(multilabel.LabelAnswers(0.1, torch.rand(9, 2), torch.full((9, 2), torch.nan)))
    baseline = {"knn": math.nan, "probe": math.nan}
    rows = summary(task, report, baseline, tmp_path, keeps_start=True)
    told = dict(rows)
    assert "nan" not in str(rows) and told["linear probe before"] == "not defined"
    assert told["macro AP after"] == "not defined: no evaluation image has a label"
    assert "those of the linear probe" in told["saved weights"]
    assert "the last epoch is kept: what --keep-best chooses by is not defined" in str(rows)
    report.draw(tmp_path / "curves.png")
    run = argparse.Namespace(task=task, baseline=baseline, by_unlabelled=None)
    assert "nan" not in reports.describe_start(run)
    of_run = TASK, TASK.report(evaluation([0, 1], [1, 0])), {"knn": None, "probe": None}, tmp_path
    groups = ("", "35 images in 18 groups (patient); intervals are over groups")
    assert groups not in summary(*of_run, val_images=35)
    chosen = {"learning rate": "trials", "epoch": "the evaluation images"}
    numbers = {"val_images": 35, "val_groups": 18, "kept_epoch": 2, "epochs": 3, "learning_rate": 1e-3}
    rows = summary(*of_run, chosen_by=chosen, **numbers)
    told = {("", "learning rate 1e-3 chosen by trials"), ("", "epoch 2 of 3 chosen by the evaluation images")}
    assert {groups, *told} <= {*rows}


def test_accuracies_and_times_are_told_as_people_say_them():
    for right, of, share, ends in ((12, 24, "50.00%", "31% to 69%"), (356, 359, "99.16%", "97.6% to 99.7%")):
        result = evaluation([1] * of, [1] * right + [0] * (of - right))
        told = f"{right} of {of} images, {share} (95% interval {ends})"
        assert next(TASK.report(result).rows()) == ("accuracy", told)
    told = {0.04: "0.0 s", 9.94: "9.9 s", 9.96: "10 s", 99: "99 s", 150: "2 min", 5400: "90 min", 9000: "2.5 h"}
    assert list(map(reports.duration, told)) == list(told.values())


def test_the_line_of_an_epoch_says_what_is_left_of_the_run():
    losses = {"train_loss": 0.84321, "val_loss": 0.22549, "val_accuracy": 0.93593}
    history = [losses | {"epoch": 1, "seconds": 8.0}, losses | {"epoch": 2, "seconds": 10.0}]
    shown = "training loss 0.843, evaluation 0.225, accuracy 93.59%; 10 s"
    run = mock.Mock(task=TASK, history=history, **{"args.epochs": 4, "kept.at_start": False})
    assert reports.describe_epoch(run) == f"epoch 2: {shown}, 18 s left"
    run.args.epochs = 2
    assert reports.describe_epoch(run) == f"epoch 2: {shown}"
    run.kept.at_start = True
    for probe, by_unlabelled, start in (
        (0.9, None, "linear probe"),
        (None, None, "start"),  # of a random head
        (0.9, {"name": "mix"}, "start"),  # it is better than the probe, whose accuracy stands above
    ):
        run.baseline = {"probe": probe}
        run.by_unlabelled = by_unlabelled
        worse = f"\n  the {start} still answers training images better than this epoch does: it is saved and evaluated"
        assert reports.describe_epoch(run).endswith(worse)


def test_each_learning_rate_is_reported():
    for adapters, faster, norms, frozen, shown in (
        (2.4e-3, 24.0, "auto", True, "head 1e-4, adapters 2.4e-3 (24x: they start at the gradient)"),
        (None, 1.0, "auto", False, "head 1e-4, backbone 1e-4"),
        (1e-4, 1.0, "train", True, "head 1e-4, adapters 1e-4, norms 1e-4"),
    ):
        about = {"args.freeze_backbone": frozen, "args.learning_rate": 1e-4, "plan.norms": norms, "guard.retreats": []}
        run = mock.Mock(rate=1e-4, adapter_rate=adapters, adapter_lr_factor=faster, **about)
        assert reports.describe_rates(run) == f"learning rate: {shown}"
        run.args.learning_rate = 20 * run.rate
        assert "; 5% of 2e-3: so few steps cannot correct what a high rate does" in reports.describe_rates(run)
        run.guard.retreats.append({"epoch": 1, "learning_rate": 2e-3})
        assert "; 5% of 2e-3: lowered where training collapsed" in reports.describe_rates(run)


def test_curves_have_ticks_at_whole_epochs(spy, tmp_path):
    save = spy(reports, "save_figure")
    for epochs in (1, 10):
        history = [{"epoch": 1 + i, "loss": 6.5, "knn_accuracy": 0.425, "effective_rank": None} for i in range(epochs)]
        reports.plot_pretraining(history, tmp_path / "curves.png")
        for axes in save.call_args.args[0].axes:
            assert len(axes.get_xticks()) > 0 and np.mod(axes.get_xticks(), 1).max() == 0
            assert axes.lines[0].get_marker() != "None"  # a line of one epoch would not be seen
    assert axes.yaxis.get_major_formatter()(0.425) == "42.5%"  # the rank was not measured


@pytest.fixture
def labels() -> multilabel.LabelReport:
    targets = (torch.rand(30, 3) < torch.tensor([0.5, 0.0, 0.3])).float()
    probabilities = 0.6 * targets + 0.4 * torch.rand(30, 3)
    targets[0, 0] = math.nan
    probabilities[3] = torch.tensor([0.99, 0.1, 0.1])
    targets[3] = 0.0
    task = MultiLabel(NAMES, targets, thresholds=torch.tensor([0.5, 0.4, 0.5]))
    return task.report(multilabel.LabelAnswers(0.1, probabilities, targets))


@pytest.fixture
def numbers() -> regression.NumberReport:
    truth = torch.arange(40.0).reshape(20, 2).clone()
    answers = truth + torch.randn(20, 2)
    truth[0, 0] = math.nan
    answers[5, 1] = 100.0
    return Regression(["age", "weight"], truth).report(regression.NumberAnswers(0.1, answers, truth))


def test_it_is_said_how_far_probabilities_can_be_believed(labels):
    """Answers that are right as often as they say, and such that say half as much."""
    shares = torch.linspace(0.05, 0.95, 400)
    result = Evaluation(0.5, 0.5, (torch.rand(400) < shares).long(), torch.ones(400).long(), shares)
    task = Classification(["a", "b"])
    task.temperature = 0.5
    report = task.report(result)
    figures = report.figures()
    assert figures["calibration_error"] < 0.07 and figures["temperature"] == 0.5
    report.answers = result._replace(confidences=shares / 2)
    error = report.figures()["calibration_error"]
    assert error > 0.2 and dict(report.rows())["probabilities off by"] == f"{error:.1%} on average"
    assert "temperature" not in labels.figures() and "on average" in dict(labels.rows())["probabilities off by"]
    for images, told in ((10, []), (1000, [("probabilities off by", "10.0% on average")])):  # of ten it may be chance
        right = torch.arange(images) < 0.9 * images
        report.answers = Evaluation(0.1, 0.9, right.long(), torch.ones(images).long(), torch.full((images,), 0.8))
        assert list(report.calibration_rows()) == told


def images(count: int) -> LabelledImages:
    return LabelledImages([Image.new("RGB", (8, 8))] * count, [0] * count)


def test_a_label_that_no_image_has_is_left_out_and_said(labels, tmp_path):
    figures = labels.figures()
    of_cat, of_eel, of_dog = figures["labels"].values()
    assert (of_eel["average_precision"], of_eel["positives"], of_eel["sensitivity_interval"]) == (None, 0, None)
    assert figures["macro_ap"] == pytest.approx((of_cat["average_precision"] + of_dog["average_precision"]) / 2)
    assert of_cat["unknown"] == 1
    assert list(labels.rows())[1] == ("", "no evaluation image has eel: left out of the means")
    *others, last = labels.by_label()
    assert last[:5] == ["eel", 0, 0, "", ""] and {row[2] for row in others} == {0, 1}
    Image.new("RGB", (3, 2)).save(tmp_path / "picture.png")
    page = "".join(labels.sections(tmp_path / "picture.png"))
    assert all(f"<td>{name}</td>" in page for name in NAMES) and "threshold" in page
    assert {name for name, text in list(labels.printed())[1:4] if "positives" in text} == {*NAMES}


def test_the_worst_answer_is_shown_first_and_all_are_columns(labels, numbers):
    assert next(labels.mistakes()) == (3, "cat is not there: 99%")
    [worst, *_] = mistakes = list(numbers.mistakes())
    assert worst == (5, "weight 11, answered 100")
    assert all(math.isfinite(numbers.answers.targets[i, 0]) for i, told in mistakes if "age" in told)
    columns = labels.answer_columns()
    assert list(columns) == [key for name in NAMES for key in (name, f"{name} probability")]
    assert columns["cat"][0] == "" and set(columns["cat"][1:]) == {"0", "1"}
    assert float(columns["cat probability"][3]) == pytest.approx(0.99)
    assert numbers.answer_columns()["weight answer"][5] == "100" and numbers.answer_columns()["age"][0] == ""
    # A mistake is on the wrong side of its threshold, or far by its spread.
    targets = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    task = MultiLabel(["rare"], targets, thresholds=torch.tensor([0.1]))
    answers = multilabel.LabelAnswers(0.1, torch.tensor([[0.15], [0.3], [0.05], [0.08]]), targets)
    assert list(task.report(answers).mistakes()) == [(2, "rare is there: 5%"), (1, "rare is not there: 30%")]
    truth = torch.tensor([[0.0, 0.0], [2.0, 200.0]])  # of the deviations 1 and 100
    answers = regression.NumberAnswers(0.1, truth + torch.tensor([[0.0, 50.0], [0.6, 0.0]]), truth)
    assert [image for image, _ in Regression(["age", "weight"], truth).report(answers).mistakes()] == [1, 0]


def test_pictures_are_drawn_where_nothing_is_wrong_too(labels, numbers, tmp_path, spy):
    many = Classification(list(map(str, range(100)))).report(evaluation(list(range(100)), list(range(100))))
    assert list(many.printed())[-1] == ("", "and 85 more")
    save = spy(answer_reports, "save_figure")
    numbers.draw_mistakes(images(20), tmp_path / "mistakes.png")
    numbers.mistakes = list
    numbers.draw_mistakes(images(20), tmp_path / "none.png")
    titles = [figure.texts[0].get_text() for (figure, _), _ in save.call_args_list]
    assert titles == ["The largest errors", "The largest errors: none"]
    drawn = spy(regression, "save_figure")
    for report in (labels, numbers, many):
        report.draw(tmp_path / report.picture)
    sizes = {path.stem: Image.open(path).size for path in tmp_path.iterdir()}
    assert sizes.pop("none")[1] < sizes["mistakes"][1] and min(sizes.values())[0] > 300
    points, line = drawn.call_args.args[0].axes[1].lines  # answers over the truth
    answers = numbers.answers
    assert points.get_xydata().tolist() == torch.stack([answers.targets[:, 1], answers.values[:, 1]], 1).tolist()
    assert list(line.get_xdata()) == list(line.get_ydata()) == [1, 39]


@pytest.mark.parametrize("patients", [None, torch.arange(20) // 5])
def test_each_number_has_intervals_that_come_of_its_own_errors(numbers, patients, tmp_path):
    targets = numbers.answers.targets[:, :1]
    of_age = regression.NumberAnswers(0.1, numbers.answers.values[:, :1], targets)
    alone = Regression(["age"], targets).report(of_age, patients).figures()
    report = numbers.task.report(numbers.answers, patients)
    age = report.figures()["numbers"]["age"]
    for name in ("r2", "mae"):
        assert age[f"{name}_interval"] == pytest.approx(alone[f"{name}_interval"])
    assert (report.intervals(0) == numbers.intervals(0)) == (patients is None)
    low, high = age["mae_interval"]
    told = dict(report.printed())
    assert told["by number"] == "in their own units, with 95% intervals:"
    assert f"mean absolute error {age['mae']:.4g} ({low:.4g} to {high:.4g})" in told["age"]
    Image.new("RGB", (3, 2)).save(tmp_path / "picture.png")
    assert "<td>weight</td>" in "".join(report.sections(tmp_path / "picture.png"))
    assert all("95% interval" in text for _, text in numbers.rows())


def test_a_mean_says_of_how_many_numbers_it_is():
    """A number that is the same in these images has an error, and no R2."""
    truth = torch.tensor([[1.0, 3.0, 1.0], [2.0, 3.0, 0.0], [4.0, 3.0, 0.0], [5.0, 3.0, 0.0]])
    task = Regression(["age", "weight", "size"], torch.eye(3))
    report = task.report(regression.NumberAnswers(0.1, truth + 1, truth))
    rows = dict(report.rows())
    assert rows["R2"].endswith("), the mean of 2 of 3 numbers")
    assert rows["mean absolute error"].endswith("), the mean of 3 numbers")
    weight = report.figures()["numbers"]["weight"]
    _, of_weight, _ = report.by_number()
    assert (weight["r2"], weight["r2_interval"]) == (None, None) and of_weight[:4] == ("weight", 4, "", "1")
    alone = Regression(["age"], truth[:, :1]).report(regression.NumberAnswers(0.1, truth[:, :1], truth[:, :1]))
    assert "mean of" not in str(list(alone.rows()))


def test_the_page_is_complete_and_runs_nothing(tmp_path):
    for name in ("training_curves.png", "mistakes.png"):
        Image.new("RGB", (3, 2)).save(tmp_path / name)
    names = ["<script>alert(1)</script>", 'quo"te', "absent caf\udce9"]  # of bytes that are not UTF-8
    report = Classification(names).report(evaluation([0, 0, 1], [0, 1, 1]))
    mistakes = tmp_path / "mistakes.png"
    rows = [("accuracy after", "66.67%")]
    named = [("<script>.png", "a, taken for b")]
    of_run = mistakes, named, tmp_path / "training_curves.png", {"finetune": {"note": "</pre><script>"}}
    report_page.write_page(tmp_path / "report.html", "2 of 3 images right", rows, report.sections(mistakes), *of_run)
    text = (tmp_path / "report.html").read_text()
    tags = re.findall(r"<([a-z0-9]+)", text)
    assert "script" not in tags and tags.count("img") == 3 and "http" not in text
    for source in re.findall(r"(?:src|href)=[\"']?([^\"'> ]*)", text):
        assert source.startswith("data:image/png;base64,")
    shown = html.unescape(re.sub("<[^>]*>", "", text))
    told = ["2 of 3 images right", "accuracy after", "no images", "<script>.png", *names[:2], "absent caf?"]
    assert [words for words in told if words not in shown] == []


def test_commands_that_are_printed_exist_where_the_run_was_started(monkeypatch):
    for started, folder, shown in (
        ("finetune_lora.py", TOOLKIT, "python deploy_lora.py"),
        ("finetune_lora.py", Path("/"), f"python {shlex.quote(str(TOOLKIT / 'deploy_lora.py'))}"),
        ("/usr/bin/moco-lora-finetune", Path("/"), "moco-lora-deploy"),
        ("C:/Scripts/moco-lora-pretrain.exe", TOOLKIT, "moco-lora-deploy"),
        ("ipykernel_launcher.py", TOOLKIT, "python deploy_lora.py"),
    ):
        monkeypatch.setattr(sys, "argv", [started, "--data-dir", "my images"])
        monkeypatch.chdir(folder)
        assert judged().next_step == f"{shown} predict lora.pth new_images --output answers.csv"
        made = dict(reports._made())
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d by version {VERSION}", made.pop("made"))
        if "finetune" in started:
            assert made.pop("command") == f"{shown.replace('deploy', 'finetune')} --data-dir 'my images'"
        assert made == {}


def judged(probe=0.7, scores=(0.81, 0.82, 0.82, 0.82), losses=(0.5, 0.6), lowered=1.0, per_class=100, **more):
    task = more.pop("task", Classification)
    places = {"adapter": "lora.pth", "labelled": "", "unlabelled": ""} | more.pop("places", {})
    results = {f"val_{task.score}": scores[-1], f"val_{task.score}_interval": (0.77, 0.86)}
    results |= {f"probe_{task.score}_before": probe, "unlabelled": None, "val_images": 300, "epochs": len(scores)}
    results |= {"learning_rate": 1e-3, "head_learning_rate": 1e-3 / lowered}
    train_loss, val_loss = losses
    history = [{f"val_{task.score}": score, "train_loss": 1.0, "val_loss": 1.0} for score in scores]
    history[-1] |= {"train_loss": train_loss, "val_loss": val_loss}
    return verdict.judge(results | more, history, task, per_class, places)


CHOSEN = {"epoch": "the evaluation images"}
OF_LABELS = {"task": MultiLabel, "val_macro_ap_interval": (0.70, 0.80)}  # moved by the bias of the figure, 0.82
NARROW = {"task": MultiLabel, "val_macro_ap_interval": (0.745, 0.755)}


def test_the_gain_is_over_the_linear_probe():
    for run, gained, judgement in (
        ({"probe": 0.77}, "+5 points", ", which may be chance with 300 evaluation images"),
        ({"val_accuracy_interval": None}, "+12 points", "; there is no interval to judge it by"),
        # --keep-best: the best of several epochs is above the others by chance, too
        ({"chosen_by": CHOSEN}, "+12 points", ", flattered: the evaluation images chose the epoch"),
        ({"chosen_by": CHOSEN, "probe": 0.9}, "-8 points", ": worse, beyond chance"),
        ({"task": Regression, "probe": 0.5}, "+0.32", ", more than chance explains"),
        # The probe's AP of few positives is as much too high as the run's
        (OF_LABELS | {"probe": 0.89}, "-7 points", ": worse, beyond chance"),
        (NARROW | {"probe": 0.81}, "+1 points", ", more than chance explains"),
    ):
        assert judged(**run).gained == f"{gained} against the linear probe{judgement}"
    told = judged(0.8, (math.nan,), (1.0, 3.0), task=Regression, val_r2=None)  # as of a single image
    assert told.limits[0].startswith("overfitting")
    assert judged(None).gained == told.gained == "there are no scores of the run and of a linear probe to compare"


@pytest.mark.parametrize(("scores", "chosen"), [((math.nan, 0.5), CHOSEN), ((math.nan, math.nan), {})])
def test_an_epoch_was_chosen_where_one_of_them_has_the_figure(scores, chosen):
    run = mock.Mock(task=Regression(["age"], torch.eye(2)[:, :1]), history=[{"val_spearman": each} for each in scores])
    run.configure_mock(**{"args.keep_best": "spearman", "plan.rate_searched": False})
    run.path.return_value.exists.return_value = False
    assert reports._chosen_by(run) == chosen


@pytest.mark.parametrize(("wrong", "is_chance"), [(5, True), (6, False)])
def test_a_few_images_less_than_a_perfect_probe_may_be_chance(wrong, is_chance):
    """No interval of an accuracy below 1 has 1 in it, but by McNemar's test five images differ by chance."""
    score = 1 - wrong / 24
    found = judged(1.0, (score,), val_images=24, val_accuracy_interval=share_interval(torch.arange(24) >= wrong))
    p = mcnemar(torch.ones(24), torch.arange(24) >= wrong, torch.arange(24))
    assert ("may be chance" in found.gained) == is_chance == (p > 0.05)


OVERFITTED = {"losses": (0.1, 0.6)}
PERFECT = {"probe": 0.9, "scores": (0.97,), "val_accuracy_interval": (0.97, 1.0)}
FEW_LABELS = {"per_class": 25, "probe": 0.8}
SOME_OF_EACH = {"unlabelled": {}, "config": {"data": {"labels_per_class": 25}}}
FROM_LIST = {"unlabelled": {}, "places": {"labelled": "list.csv val.csv"}}
BESIDE = {"places": {"unlabelled": "'my pool'"}}
BOTH_WAYS = "'my pool' --output to_label-1; or images without labels: the same command with --unlabelled 'my pool'"


def test_what_limits_a_run_comes_with_one_next_step():
    """Of each limit words that it has, and how the step ends."""
    for run, limits, next_step in (
        ({}, [], "predict lora.pth new_images --output answers.csv"),
        # A tenth of the gain over the probe is 0.012
        ({"scores": (0.7, 0.809, 0.74, 0.82)}, [], "answers.csv"),
        ({"scores": (0.7, 0.76, 0.82)}, [], "answers.csv"),  # three epochs have no last quarter
        ({"scores": (*[0.7] * 5, 0.807, 0.815, 0.82)}, ["few epochs: the score still rose"], "with --epochs 16"),
        ({"lowered": 1.6, "probe": 0.9}, ["few training steps: the learning rate was lowered to 62%"], "--epochs 8"),
        # Below the probe the rate is searched, or, where it was or cannot be, a third of it
        ({"probe": 0.9, "learning_rate": 3e-4, "head_learning_rate": 2.1e-4}, [], "--learning-rate auto"),
        ({"probe": 0.9, "chosen_by": {"learning rate": "trials"}}, [], "--learning-rate 3e-04"),
        ({"probe": 0.9, "unlabelled": {}}, [], "--learning-rate 3e-04"),
        ({"probe": 0.9, "lowered": 8, "retreats": [{}]}, ["collapsed, or gained nothing"], "--learning-rate auto"),
        # With few labels what helps there; both ways are for one class an image
        (FEW_LABELS, ["25 of each class"], "or images without labels: the same command with --unlabelled FOLDER"),
        (FEW_LABELS | {"unlabelled": {"images": 900}}, ["25 of each class"], "new_images --output to_label-1"),
        (FEW_LABELS | FROM_LIST, ["25 of each class"], "--output to_label-1 --labelled list.csv val.csv"),
        (FEW_LABELS | SOME_OF_EACH, ["25 of each class"], "are there: the same command without --labels-per-class"),
        (FEW_LABELS | BESIDE, ["25 of each class"], BOTH_WAYS),
        (FEW_LABELS | {"probe": 0.9}, ["25 of each class"], "the same command with --unlabelled FOLDER"),
        (FEW_LABELS | {"probe": 0.9, "task": MultiLabel}, ["25 of each label"], "--learning-rate auto"),
        (OVERFITTED | {"per_class": 5, "task": MultiLabel}, ["5 of each label", "overfitting"], "more labelled images"),
        ({"per_class": 25}, ["few images"], "answers.csv"),  # which gained much all the same
        (FEW_LABELS | {"val_accuracy_interval": None}, ["few images"], "answers.csv"),  # chance is not told
        (FEW_LABELS | {"per_class": 26}, [], "--epochs 8"),
        (FEW_LABELS | {"task": MultiLabel}, ["25 of each label"], "more labelled images"),
        ({"probe": 1.0, "val_images": 20}, [], "answers.csv"),  # nothing is left to gain
        # Photographs that are overfitted are varied more; masks and bands have no such augmentation
        (OVERFITTED | {"probe": 0.8}, ["overfitting"], "--augmentation trivial"),
        (OVERFITTED | {"task": Segmentation}, ["overfitting"], "--output maps"),
        (OVERFITTED | {"normalization": {"scale": 1e4}}, ["overfitting"], "answers.csv"),
        (OVERFITTED | {"config": {"data": {"augmentation": "trivial"}}}, ["overfitting"], "answers.csv"),
        (OVERFITTED | {"config": {"data": {"augmentation": "affine"}}}, ["overfitting"], "answers.csv"),
        # Not where answers are nearly perfect, and losses so small that their ratio says nothing, or below twice
        (PERFECT | {"scores": (0.99,), "losses": (0.001, 0.02)}, [], "answers.csv"),
        (PERFECT | {"losses": (0.0099, 0.02)}, ["(loss 0.02 against 0.0099)"], "--augmentation trivial"),
        (PERFECT | {"losses": (0.0101, 0.02)}, [], "answers.csv"),
    ):
        found = judged(**run)
        assert found.next_step.endswith(next_step) and len(found.limits) == len(limits), run
        assert all(map(str.__contains__, found.limits, limits)), run
