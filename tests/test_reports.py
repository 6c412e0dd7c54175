"""What a run leaves for people: numbers against scikit-learn, and pictures of every kind of result."""

import argparse
import csv

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score

from moco import pretrain
from toolkit import InputError
from toolkit.answers import answer_reports, report_page
from toolkit.answers.evaluation import Evaluation
from toolkit.answers.measures import wilson_interval
from toolkit.answers.tasks import Classification
from toolkit.images.data import LabelledImages
from toolkit.run import reports

pytestmark = pytest.mark.usefixtures("pictures")
TASK = Classification(["cat", "dog"])


def evaluation(labels: list[int], predictions: list[int], confidences: list[float] | None = None) -> Evaluation:
    labels, predictions = torch.tensor(labels), torch.tensor(predictions)
    confidences = torch.tensor(confidences or [0.5] * len(labels))
    return Evaluation(0.3, (labels == predictions).float().mean().item(), predictions, labels, confidences)


def test_macro_f1_and_balanced_accuracy_are_scikit_learns():
    labels, predictions = [0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 0, 2]
    result = evaluation(labels, predictions)
    assert result.macro_f1 == pytest.approx(f1_score(labels, predictions, average="macro"))
    assert result.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, predictions))
    per_class = answer_reports.accuracy_per_class(result, ["a", "b", "c", "absent"])
    assert per_class["absent"] is None
    present = [share for share in per_class.values() if share is not None]
    assert sum(present) / 3 == pytest.approx(balanced_accuracy_score(labels, predictions))


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
    answer_reports.plot_mistakes(result, images, ["cat", "a dog with a very long name"], tmp_path / "some.png")
    assert drawn == [*range(0, 20, 2), 19, 17, 15, 13, 11, 9]
    perfect = evaluation([i % 2 for i in range(20)], [i % 2 for i in range(20)], confidences)
    answer_reports.plot_mistakes(perfect, images, ["cat", "dog"], tmp_path / "none.png")
    assert size(tmp_path / "none.png")[1] < size(tmp_path / "some.png")[1]


def test_names_are_drawn_as_they_are(tmp_path):
    """Dollars begin no formula, and a folder's bytes that are no character are shown as a question mark."""
    assert report_page.drawn("under$10%, caf\udce9") == r"under\$10%, caf?"
    result = evaluation([0, 1], [1, 0])
    images = LabelledImages([(Image.new("RGB", (4, 4)), label) for label in (0, 1)], [0, 1])
    names = ["under$10%", "over$10% caf\udce9"]
    answer_reports.plot_mistakes(result, images, names, tmp_path / "mistakes.png")
    answer_reports.plot_confusion_matrix(result, names, tmp_path / "matrix.png")


def test_mistakes_are_drawn_from_small_pictures(tmp_path, monkeypatch):
    """matplotlib would draw a large photograph from its every pixel, in floats."""
    drawn, real = [], Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda axes, image: drawn.append(image.size) or real(axes, image))
    images = LabelledImages([(Image.new("RGB", (900, 600)), 0), (Image.new("RGB", (20, 10)), 1)], [0, 1])
    answer_reports.plot_mistakes(evaluation([0, 1], [1, 1]), images, ["cat", "dog"], tmp_path / "mistakes.png")
    assert drawn == [(384, 256), (20, 10)]


@pytest.mark.parametrize("classes", [2, 30, 1500])
def test_a_confusion_matrix_of_few_and_of_many_classes(tmp_path, classes):
    labels = list(range(classes)) * 2
    answer_reports.plot_confusion_matrix(
        evaluation(labels, labels), [f"class {i}" for i in range(classes)], tmp_path / "a.png"
    )
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
    report = answer_reports.ClassReport(TASK, evaluation([0] * 100, [0] * 80 + [1] * 20))
    results = dict.fromkeys(("trainable_parameters", "total_parameters", "seconds", "kept_share"), 1)
    results |= dict.fromkeys(("peak_memory_bytes", "adapter_bytes", "backbone_bytes"), 1000)
    results |= {"task": "classification", "device": "cpu", "learning_rate": rate}
    results |= {"val_accuracy_interval": wilson_interval(80, 100), "probe_accuracy_before": probe}
    results |= {"knn_accuracy_before": 0.8, "chosen_by": {}}
    summary = str(reports.summary(results, report, tmp_path))
    assert told in summary if told else "the linear probe" not in summary


def test_an_accuracy_is_told_as_counted_images_with_its_interval():
    assert answer_reports.right_of(0.5, 24) == "12 of 24 images, 50.00% (95% interval 31% to 69%)"
    assert answer_reports.right_of(356 / 359, 359) == "356 of 359 images, 99.16% (95% interval 97.6% to 99.7%)"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (99, "99 s"), (150, "2 min"), (5400, "90 min"), (9000, "2.5 h")],
)
def test_times_are_told_as_people_say_them(seconds, told):
    assert reports.duration(seconds) == told


def test_the_line_of_an_epoch_says_what_is_left_of_the_run():
    losses = {"train_loss": 0.84321, "val_loss": 0.22549, "val_accuracy": 0.93593}
    history = [losses | {"epoch": epoch, "seconds": seconds} for epoch, seconds in ((1, 8.0), (2, 10.0))]
    told = "training loss 0.843, evaluation 0.225, accuracy 93.59%; 10 s"
    assert reports.describe_epoch(TASK, history, 4) == f"epoch 2: {told}, 18 s left"
    assert reports.describe_epoch(TASK, history, 2) == f"epoch 2: {told}"


@pytest.mark.parametrize(
    ("given", "faster", "told"),
    [
        ({}, 24.0, "head 1e-4, adapters 2.4e-3 (24x: they start at the gradient)"),
        ({"head_learning_rate": 3e-3}, 1.0, "head 3e-3, adapters 1e-4"),
        ({"learning_rate": 1.25e-5, "lora_rank": 0}, 1.0, "head 1.25e-5"),
        ({"lora_rank": 0, "freeze_backbone": False}, 1.0, "head 1e-4, backbone 1e-4"),
        ({"norms": "train"}, 1.0, "head 1e-4, adapters 1e-4, norms 1e-4"),
    ],
)
def test_each_learning_rate_is_told(given, faster, told):
    usual = {"learning_rate": 1e-4, "head_learning_rate": None, "lora_rank": 8}
    args = argparse.Namespace(**usual | {"norms": "auto", "freeze_backbone": True} | given)
    assert reports.describe_rates(args, args.learning_rate, faster) == f"learning rate: {told}"
    lowered = reports.describe_rates(args, args.learning_rate / 20, faster)
    assert "; 1/20 of what was asked for, since few images or steps cannot correct what a" in lowered


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder: (step, value) by title."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_each_epoch_once_as_it_was_last(tmp_path):
    pytest.importorskip("tensorboard")
    for epoch, loss in ((1, 0.5), (2, 0.4), (3, 9.0), (2, 0.3)):  # after epoch 3 the run went back
        reports.log_tensorboard({"epoch": epoch, "loss": loss, "knn_accuracy": None}, tmp_path)
    assert scalars(tmp_path) == {"loss": [(1, 0.5), (2, pytest.approx(0.3))]}


@pytest.mark.slow
def test_both_scripts_log_their_table_for_tensorboard(finetune, images, tmp_path):
    pytest.importorskip("tensorboard")
    folder = finetune("--tensorboard")["folder"]
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    shown = scalars(folder)
    assert len(rows) == 2 and shown.keys() == rows[0].keys() - {"epoch"}
    for name, values in shown.items():
        assert values == [(i, pytest.approx(float(row[name]), rel=1e-6)) for i, row in enumerate(rows, 1)]
    finetune()
    assert not (folder / "tensorboard").exists()  # nothing of the run before
    argv = (
        f"--data-dir {images} --output-dir {tmp_path / 'stage1'} --device cpu --epochs 1 --batch-size 8 --tensorboard"
    )
    pretrain.main([*argv.split(), "--image-size", "16", "--dim", "8", "--mlp-dim", "8", "--arch", "vit_mini"])
    assert {"loss", "knn_accuracy"} <= scalars(tmp_path / "stage1").keys()


def test_a_log_without_its_package_is_refused_before_anything_begins(finetune, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--tensorboard needs the package tensorboard: pip install tensorboard"):
        finetune("--tensorboard")
    assert not (tmp_path / "out").exists()
