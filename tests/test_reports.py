"""What a run leaves for people: numbers against scikit-learn, and pictures of every kind of result."""

import argparse
import math

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score

from toolkit.answers import answer_reports, multilabel, report_page
from toolkit.answers.evaluation import Evaluation
from toolkit.answers.measures import wilson_interval
from toolkit.answers.tasks import Classification, MultiLabel
from toolkit.images.data import LabelledImages
from toolkit.run import reports, training

pytestmark = pytest.mark.usefixtures("pictures")
TASK = Classification(["cat", "dog"])


def evaluation(labels: list[int], predictions: list[int], confidences: list[float] | None = None) -> Evaluation:
    labels, predictions = torch.tensor(labels), torch.tensor(predictions)
    confidences = torch.tensor(confidences or [0.5] * len(labels))
    return Evaluation(0.3, (labels == predictions).float().mean().item(), predictions, labels, confidences)


def test_macro_f1_and_balanced_accuracy_are_scikit_learns():
    labels, predictions = [0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 0, 2]
    result = evaluation(labels, predictions)
    assert result.measured()["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))
    balanced = balanced_accuracy_score(labels, predictions)
    assert result.measured()["balanced_accuracy"] == pytest.approx(balanced)
    per_class = Classification(["a", "b", "c", "absent"]).report(result).figures()["accuracy_per_class"]
    assert per_class["absent"] is None
    present = [share for share in per_class.values() if share is not None]
    assert sum(present) / 3 == pytest.approx(balanced)


def size(path) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.load()
        return picture.size


def test_mistakes_are_drawn_most_confident_first(tmp_path, monkeypatch):
    """Wrong answers by confidence, then the least certain right ones; as often as there are any."""
    source = [(Image.new("RGB", (20, 10), (10 * i, 0, 0)), i % 2) for i in range(20)]
    images, drawn = LabelledImages(source, [label for _, label in source]), []
    real = LabelledImages.undecoded
    monkeypatch.setattr(LabelledImages, "undecoded", lambda self, i: drawn.append(i) or real(self, i))
    confidences = [0.9 - 0.01 * i for i in range(20)]
    result = evaluation([i % 2 for i in range(20)], [1] * 20, confidences)
    report = Classification(["cat", "a dog with a very long name"]).report(result)
    report.draw_mistakes(images, tmp_path / "some.png")
    assert drawn == [*range(0, 20, 2), 19, 17, 15, 13, 11, 9]
    perfect = evaluation([i % 2 for i in range(20)], [i % 2 for i in range(20)], confidences)
    TASK.report(perfect).draw_mistakes(images, tmp_path / "none.png")
    assert size(tmp_path / "none.png")[1] < size(tmp_path / "some.png")[1]


def test_names_are_drawn_as_they_are(tmp_path):
    """Dollars begin no formula, and a folder's bytes that are no character are shown as a question mark."""
    assert report_page.drawn("under$10%, caf\udce9") == r"under\$10%, caf?"
    result = evaluation([0, 1], [1, 0])
    images = LabelledImages([(Image.new("RGB", (4, 4)), label) for label in (0, 1)], [0, 1])
    names = ["under$10%", "over$10% caf\udce9"]
    report = Classification(names).report(result)
    report.draw_mistakes(images, tmp_path / "mistakes.png")
    report.draw(tmp_path / "matrix.png")


def test_mistakes_are_drawn_from_small_pictures(tmp_path, monkeypatch):
    """matplotlib would draw a large photograph from its every pixel, in floats."""
    drawn, real = [], Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda axes, image: drawn.append(image.size) or real(axes, image))
    images = LabelledImages([(Image.new("RGB", (900, 600)), 0), (Image.new("RGB", (20, 10)), 1)], [0, 1])
    TASK.report(evaluation([0, 1], [1, 1])).draw_mistakes(images, tmp_path / "mistakes.png")
    assert drawn == [(384, 256), (20, 10)]


@pytest.mark.parametrize("classes", [2, 30, 1500])
def test_a_confusion_matrix_of_few_and_of_many_classes(tmp_path, classes):
    labels = list(range(classes)) * 2
    task = Classification([f"class {i}" for i in range(classes)])
    task.report(evaluation(labels, labels)).draw(tmp_path / "a.png")
    assert min(size(tmp_path / "a.png")) > 300


@pytest.mark.parametrize("probe", [0.8, None])
def test_curves_of_one_epoch_with_and_without_a_probe(tmp_path, probe):
    history = [{"epoch": 1, "train_loss": 0.5, "val_loss": 0.4, "val_accuracy": 0.9}]
    reports.plot_finetuning(history, {"knn_accuracy": 0.7, "probe_accuracy": probe}, tmp_path / "curves.png")
    assert size(tmp_path / "curves.png")[0] > 1000


def test_a_search_with_rates_that_collapse_can_be_drawn(tmp_path):
    reports.plot_learning_rates([1e-4, 1e-2], [0.5, 0.0], TASK, tmp_path / "rates.png")
    assert size(tmp_path / "rates.png")[0] > 500


@pytest.mark.parametrize(
    ("probe", "rate", "told"),
    [
        (0.9, 1e-3, "below the linear probe"),
        (0.84, 1e-3, None),  # 80 of 100 images may be a share from 0.71 to 0.87
        (0.79, 3e-5, "no better than the linear probe, as far as these images tell"),
        (0.79, 1e-2, None),
        (0.7, 3e-5, None),
        (None, 3e-5, None),
    ],
)
def test_a_run_that_gains_nothing_on_its_probe_says_so(tmp_path, probe, rate, told):
    report = TASK.report(evaluation([0] * 100, [0] * 80 + [1] * 20))
    results = dict.fromkeys(("trainable_parameters", "total_parameters", "seconds", "kept_share"), 1)
    results |= dict.fromkeys(("peak_memory_bytes", "adapter_bytes", "backbone_bytes"), 1000)
    results |= {"task": "classification", "device": "cpu", "learning_rate": rate}
    results |= {"val_accuracy_interval": wilson_interval(80, 100), "probe_accuracy_before": probe}
    results |= {"knn_accuracy_before": 0.8, "chosen_by": {}}
    baseline = {"knn_accuracy": 0.8, "probe_accuracy": probe}
    options = argparse.Namespace(output_dir=tmp_path, keep_best=None)
    summary = str(reports.summary(argparse.Namespace(task=TASK, args=options, baseline=baseline), results, report))
    assert told in summary if told else "the linear probe" not in summary


def test_scores_that_are_not_defined_are_said_to_be_that(tmp_path):
    """Of labels of which no evaluation image is known, or numbers that do not differ."""
    task = MultiLabel(["cat", "dog"])
    targets = torch.full((9, 2), torch.nan)
    report = task.report(multilabel.LabelAnswers(0.1, torch.rand(9, 2), targets))
    results = dict.fromkeys(("trainable_parameters", "total_parameters", "seconds"), 1)
    results |= dict.fromkeys(("peak_memory_bytes", "adapter_bytes", "backbone_bytes"), 1000) | {"kept_share": 0.5}
    results |= {"task": "multilabel", "device": "cpu", "learning_rate": 1e-4, "chosen_by": {}}
    results |= {"val_macro_ap_interval": None, "probe_macro_ap_before": None}
    options = argparse.Namespace(output_dir=tmp_path, keep_best="macro-ap")
    baseline = {"knn_macro_ap": math.nan, "probe_macro_ap": math.nan}
    run = argparse.Namespace(task=task, args=options, baseline=baseline)
    rows = reports.summary(run, results, report)
    shown = "\n".join(map("".join, rows))
    assert "nan" not in shown and dict(rows)["linear probe before"] == "not defined"
    assert dict(rows)["macro AP after"] == "not defined: no evaluation image has a label"
    assert "from the probe" in dict(rows)["saved weights"]
    assert "the last epoch is kept: what --keep-best chooses by is not defined" in shown
    report.draw(tmp_path / "curves.png")
    assert "nan" not in reports.describe_baseline(task, baseline, 9)


def test_of_one_output_the_singular_is_said():
    assert reports.counted(1, MultiLabel.outputs_are) == "1 label"
    assert reports.counted(2, Classification.outputs_are) == "2 classes"


def test_the_best_epoch_has_a_figure_and_else_is_the_last():
    history = [
        {"epoch": i, "val_r2": score, "val_loss": 0.1} for i, score in enumerate((math.nan, 0.4, 0.3, math.nan), 1)
    ]
    assert training.best_epoch(history, "val_r2")["epoch"] == 2
    assert training.last_is_best(history[:2], "val_r2") and not training.last_is_best(history, "val_r2")
    assert training.last_is_best(history[3:] * 2, "val_r2")


def test_an_accuracy_is_told_as_counted_images_with_its_interval():
    assert (
        answer_reports.right_of(0.5, 24, wilson_interval(12, 24)) == "12 of 24 images, 50.00% (95% interval 31% to 69%)"
    )
    assert (
        answer_reports.right_of(356 / 359, 359, wilson_interval(356, 359))
        == "356 of 359 images, 99.16% (95% interval 97.6% to 99.7%)"
    )


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (99, "99 s"), (150, "2 min"), (5400, "90 min"), (9000, "2.5 h")],
)
def test_times_are_told_as_people_say_them(seconds, told):
    assert reports.duration(seconds) == told


def test_the_line_of_an_epoch_says_what_is_left_of_the_run():
    losses = {"train_loss": 0.84321, "val_loss": 0.22549, "val_accuracy": 0.93593}
    history = [losses | {"epoch": epoch, "seconds": seconds} for epoch, seconds in ((1, 8.0), (2, 10.0))]
    shown = "training loss 0.843, evaluation 0.225, accuracy 93.59%; 10 s"
    run = argparse.Namespace(task=TASK, history=history, args=argparse.Namespace(epochs=4))
    run.wise_ft = argparse.Namespace(share=0.5, alpha=0.5)
    assert reports.describe_epoch(run) == f"epoch 2: {shown}, 18 s left"
    run.args.epochs = 2
    assert reports.describe_epoch(run) == f"epoch 2: {shown}"
    run.wise_ft.share = 0.25
    assert "\n  25% of the change is kept so far" in reports.describe_epoch(run)


@pytest.mark.parametrize(
    ("adapters", "faster", "norms", "frozen", "shown"),
    [
        (2.4e-3, 24.0, "auto", True, "head 1e-4, adapters 2.4e-3 (24x: they start at the gradient)"),
        (1e-4, 1.0, "auto", True, "head 1e-4, adapters 1e-4"),
        (None, 1.0, "auto", True, "head 1e-4"),
        (None, 1.0, "auto", False, "head 1e-4, backbone 1e-4"),
        (1e-4, 1.0, "train", True, "head 1e-4, adapters 1e-4, norms 1e-4"),
    ],
)
def test_each_learning_rate_is_reported(adapters, faster, norms, frozen, shown):
    plan = argparse.Namespace(norms=norms, learning_rate=1e-4)
    run = argparse.Namespace(rate=1e-4, adapter_rate=adapters, adapter_lr_factor=faster, plan=plan)
    run.args = argparse.Namespace(freeze_backbone=frozen)
    assert reports.describe_rates(run) == f"learning rate: {shown}"
    plan.learning_rate = 20 * run.rate
    assert "; 1/20 of what was asked for, since few images or steps cannot correct what a" in reports.describe_rates(
        run
    )
