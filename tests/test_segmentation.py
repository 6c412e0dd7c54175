"""Segmentation: losses, figures, maps and windows against plain computations, and whole runs on small masks."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score
from torch.utils.data import DataLoader

from finetune_lora import add_lora_to_model, load_base
from lora_utils import base_digests
from tests.dense import resnet, vit
from tests.image_files import save_image
from toolkit import InputError
from toolkit.answers import probe, segmentation
from toolkit.answers.evaluation import NO_LABEL
from toolkit.answers.segmentation import PixelAnswers, Segmentation, rare_class_weights
from toolkit.images.masks import Classes, MaskedImages, MaskReader, pairs_in
from toolkit.models import backbones, dense

CPU = torch.device("cpu")
NAMES = ["sky", "wall", "tree"]


def vit_mini(classes: int) -> dense.DenseModel:
    return dense.DenseModel(backbones.build_backbone("vit_mini", 2, 16), classes, 16)


def masks(*shape: int) -> torch.Tensor:
    """Random classes, a tenth of them unknown."""
    return torch.randint(0, 3, shape).where(torch.rand(shape) > 0.1, NO_LABEL)


@pytest.mark.parametrize("height", [8, 20])
def test_figures_and_reliability_are_over_all_known_pixels(height, monkeypatch):
    """Also where they are counted by windows. An image of which nothing is known is the last of the worst."""
    logits = torch.randn(6, 3, height, 8)
    truth = masks(6, height, 8)
    truth[2] = NO_LABEL
    task = Segmentation(NAMES)
    network = torch.nn.Identity()  # its images are its outputs
    network.window = 8
    batches = [(logits[:4], truth[:4]), (logits[4:], truth[4:])]
    found = task.evaluate(network, batches, CPU)
    known = truth != NO_LABEL
    true = truth[known].numpy()
    answer = logits.argmax(1)[known].numpy()
    confusion = confusion_matrix(true, answer)
    assert found.confusion.sum(0).tolist() == confusion.tolist()
    of_classes = jaccard_score(true, answer, average=None).tolist()
    dice = f1_score(true, answer, average=None).tolist()
    expected = {"miou": np.mean(of_classes), "macro_dice": np.mean(dice), "pixel_accuracy": (true == answer).mean()}
    assert found.measured() == pytest.approx(expected) and found.score == found.measured()["miou"]
    report = task.report(found)
    figures = report.figures()
    assert list(figures["iou_per_class"].values()) == pytest.approx(of_classes)
    assert list(figures["dice_per_class"].values()) == pytest.approx(dice)
    low, high = figures["miou_interval"]
    assert low < expected["miou"] < high
    losses = torch.stack(list(map(task.plain_loss, logits.split(1), truth.split(1))))
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    sums = [logits.softmax(1).amax(1)[known].sum().item(), confusion.trace(), known.sum().item()]
    assert found.reliability().sum(0).tolist() == pytest.approx(sums, rel=1e-5)

    shares = (found.confusion.diagonal(dim1=1, dim2=2).sum(1) / found.confusion.sum((1, 2))).nan_to_num(1.0)
    worst = shares.argsort(stable=True).tolist()
    assert list(found.maps) == worst and worst[-1] == 2
    assert torch.equal(found.maps[0].long(), logits[0].argmax(0))
    told = [text for _, text in report.mistakes()]
    assert told == [f"{share:.0%} of the pixels right" for share in shares.sort().values.tolist()]
    monkeypatch.setattr(segmentation, "WORST_SHOWN", 2)
    assert list(task.evaluate(network, batches, CPU).maps) == worst[:2]


def test_a_class_that_is_nowhere_counts_in_no_mean_and_a_rare_one_by_the_root_of_its_frequency(spy, pictures, tmp_path):
    matrices = torch.tensor([[[3.0, 1.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]]])
    figures = segmentation.pixel_figures(segmentation.counted(matrices))
    assert figures["miou"].item() == pytest.approx((3 / 4 + 4 / 5) / 2) and figures["iou"][0, 2].isnan()
    plot = spy(segmentation.answer_reports, "plot_confusion")
    report = Segmentation(NAMES).report(PixelAnswers(0.0, matrices, torch.ones(15, 3)))
    sky, wall, tree = report.by_class()
    assert (sky[:2], sky[3]) == (("sky", "50.0%"), "85.7%")  # Dice: 2 x 3 of 4 + 3
    assert (wall[:2], wall[3]) == (("wall", "50.0%"), "88.9%")
    assert tree == ("tree", "0.0%", "nowhere", "nowhere")
    report.draw(tmp_path / "matrix.png")
    assert plot.call_args.args[0].tolist() == [[0.75, 0.25, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    weights = rare_class_weights(torch.tensor([[900.0, 90.0], [0.0, 10.0]]))
    assert weights.tolist() == pytest.approx([1000 / 1200, 3000 / 1200])  # the mean over the pixels is 1


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)])
def test_the_loss_is_the_mean_over_an_images_known_pixels(weights):
    logits = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    truth = masks(4, 5, 5)
    truth[3] = NO_LABEL  # an image of which nothing is known
    loss = Segmentation(NAMES, weights).loss(logits, truth)
    losses = F.cross_entropy(logits, truth, weights, reduction="none")  # 0 where unknown
    expected = (losses.sum((1, 2))[:3] / (truth[:3] != NO_LABEL).sum((1, 2))).sum()
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, logits))
    assert not ours[0][3].any()


def test_smoothing_never_makes_a_rare_class_the_best_answer():
    """What is spread is weighed by the true class: by the rare ones' own weights they would be the answer for all."""
    pixels = torch.tensor([[400_000.0, 600_000.0, 0.0]])  # a class of which no pixel trains
    train = SimpleNamespace(targets=pixels, source=SimpleNamespace(read=None))
    task = Segmentation.of_run(NAMES, train, SimpleNamespace(class_weights="balanced", label_smoothing=0.1))
    weights = rare_class_weights(pixels)
    truth = torch.tensor([0, 1, NO_LABEL]).view(1, 1, 3)
    best = torch.eye(3)[[0, 1, 0]].lerp(torch.full((3, 3), 1 / 3), 0.1)  # the smoothed truth, (pixels, K)
    logits = best.log().T[None, :, None].requires_grad_()
    loss = task.loss(logits, truth)
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-6
    entropy = -(best * best.log()).sum(1)[:2]
    assert loss.item() == pytest.approx((entropy * weights[:2]).mean().item())


def test_of_a_scene_fewer_pixels_are_drawn(pictures, monkeypatch, tmp_path):
    """A picture of all of them, beside its mask and the answers for it, six times, would fill the memory."""
    levels = np.eye(6, 2500, dtype=np.uint8)
    levels[0, 0] = 255  # unknown
    for kind in ("images", "masks"):
        save_image(tmp_path / kind / "0.png", levels)
    images = pairs_in(tmp_path, None, MaskReader(None, [255]))
    reader = MaskReader(Classes(("even", "odd"), colours=((0, 0, 255), (0, 255, 0))))
    drawn = []
    monkeypatch.setattr(segmentation, "save_figure", lambda figure, _: drawn.extend(figure.axes))
    answers = PixelAnswers(0.0, torch.ones(1, 2, 2), torch.ones(15, 3), {0: torch.zeros(6, 2500).byte()})
    Segmentation(["even", "odd"], masks=reader).report(answers).draw_mistakes(images, tmp_path / "mistakes.png")
    picture, truth, answer = (axes.images[0].get_array() for axes in drawn)
    assert picture.shape == truth.shape == answer.shape == (2, 834, 3)
    assert np.array_equal(truth[0, 0], answer[0, 0])  # where nothing is known both are grey
    for shown, colour in ((truth, [0, 1, 0]), (answer, [0, 0, 1])):
        assert np.allclose(shown[1, 1], 0.4 * picture[1, 1] + 0.6 * np.array(colour))


def test_a_run_starts_as_the_probe_of_pixels(start, pairs, saved, narrow, monkeypatch):
    run = start(f"--task segmentation --data-dir {pairs} --workers 0 --batch-size 4 --augmentation crop")
    run.start()
    assert run.evaluate(run.loaders.val).score == pytest.approx(run.baseline["probe"], abs=1e-5)
    # At 24 times the rate that a head of pixels wants adapters would collapse.
    assert (run.rate, run.adapter_rate) == (1e-2, pytest.approx(3e-3))
    resnet = start(f"--task segmentation --data-dir {pairs} --checkpoint {saved(narrow)} --image-size 32")
    assert resnet.adapter_rate == pytest.approx(3e-3)
    assert run.baseline["knn"] is None and run.baseline["probe"] > 0.3
    assert run.loaders.answered_at_once == 4 and isinstance(run.loaders.val, DataLoader)  # neither more, nor remembered
    assert run.loaders.train.collate_fn is MaskedImages.collate
    # Whole images that are larger than a window are evaluated one at a time: a batch of scenes would fill the memory.
    assert {len(images) for images, _ in run.loaders.val} == {1} and run.loaders.train.batch_sampler.batch_size == 4
    # BatchNorms follow adapters by crops that are the same in each process and each resumed run, whatever was drawn.
    first = torch.cat(list(run.loaders.followed_batches()))
    torch.rand(7)
    assert torch.equal(torch.cat(list(run.loaders.followed_batches())), first)
    # The probe is of so many pixels in all: with some of each of ten thousand images it would take hours.
    monkeypatch.setattr(MaskedImages, "most_probed", 5)
    assert len(run.loaders.probe_images) == 5


def test_an_interpolated_position_embedding_is_the_base_under_masks_too(base):
    model, _ = load_base(base, None, 2, per_pixel=True, image_size=32)
    assert base_digests(model) == backbones.record_of(model).base_digests


@pytest.mark.parametrize("build", [resnet, partial(vit, image_size=32, num_layers=4)])
def test_features_at_pixels_are_what_the_logits_are_linear_in(build):
    model = dense.DenseModel(build(), classes=5, image_size=32).double().eval()
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    rows = torch.tensor([0, 3, 31, 17])
    columns = torch.tensor([0, 30, 31, 8])
    points = (torch.stack([columns, rows], 1) + 0.5) / 32
    with torch.no_grad():
        features = dense.features_at(dense.feature_maps(model.backbone, image), points.float())
        logits = features @ model.head.linear.weight.float().T + model.head.linear.bias.float()
        expected = model(image)[0][:, rows, columns].T
    torch.testing.assert_close(logits, expected.float(), rtol=1e-4, atol=1e-4)


def test_every_stage_of_a_network_of_timm_is_read_and_four_blocks_of_a_vit():
    """A network's first stage, at half the image's size, is where thin things such as membranes are seen."""
    for arch, size, read, sides in (
        ("timm:test_efficientnet", 32, [0, 1, 2, 3, 4], [16, 8, 4, 2, 1]),
        ("timm:test_vit", 160, [2, 3, 4, 5], [10] * 4),  # of six blocks
    ):
        model = dense.DenseModel(backbones.build_backbone(arch, 5), classes=5, image_size=size).eval()
        maps = dense.feature_maps(model.backbone, torch.randn(1, 3, size, size))
        assert [features.shape[2] for features in maps] == sides
        assert model.head.widths == [features.shape[1] for features in maps] and model.head(maps).shape[-1] == sides[0]
        assert dense._read(model.backbone) == read


@pytest.mark.parametrize("adapted", [False, True])
def test_a_resnet_is_read_from_its_first_layer_on(adapted):
    """As torchvision computes it; with adapters, which change nothing yet, through folded BatchNorms."""
    plain = resnet().eval()
    model = copy.deepcopy(plain)
    if adapted:
        add_lora_to_model(model, r=2)
    images = torch.randn(2, 3, 64, 64)
    x = plain.relu(plain.bn1(plain.conv1(images)))
    expected = [x, plain.layer1(plain.maxpool(x))]
    for stage in (plain.layer2, plain.layer3, plain.layer4):
        expected.append(stage(expected[-1]))
    found = dense.feature_maps(model.eval(), images)
    assert [features.shape[2] for features in found] == [32, 16, 8, 4, 2]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(70, 50), (32, 32), (32, 100), (20, 33), (9, 7)])
def test_windows_cover_an_image_of_any_size(height, width):
    """Answers that depend on the pixel alone are the same in windows, and each row comes once, from the top."""
    image = torch.randn(2, height, width)

    def answer(windows):
        return torch.cat([windows, windows.sum(1, keepdim=True)], 1)

    torch.testing.assert_close(dense.answers_for(image, 32, answer), answer(image[None])[0], rtol=1e-5, atol=1e-5)
    read = []

    def rows(first, last):
        read.append((first, last))
        return image[:, first:last]

    parts = list(dense.answers_by_rows(rows, height, width, 32, answer))
    assert sum(part.shape[1] for part in parts) == read[-1][1] == height
    assert max(last - first for first, last in read) <= 32
    assert dense.window_starts(100, 32) == [0, 23, 45, 68]
    assert dense.window_starts(32, 32) == dense.window_starts(10, 32) == [0]


def test_a_window_repeats_the_border_of_a_smaller_image():
    seen = []
    dense.answers_for(torch.tensor([[[1.0, 2.0]]]), 3, lambda windows: seen.append(windows) or windows)
    assert seen[0].tolist() == [[3 * [[1, 2, 2]]]]


def test_probabilities_are_made_believable_by_training_pixels():
    """Logits of 2 x log(9) of which nine in ten are right are twice as large as they should be."""
    logits = torch.tensor([[2 * math.log(9), 0.0]]).expand(10, 2)
    targets = (torch.arange(10) == 3).long()
    head = Segmentation(["a", "b"])
    assert head.believable_temperature(logits, targets, optimism=None) == pytest.approx(2, rel=1e-3)


def test_a_probe_starts_where_one_view_of_an_image_alone_shows_a_class_and_needs_two(spy):
    """Views are of other pixels. A class of one image is in no part that is held out."""
    model = vit_mini(classes=3)
    features = torch.randn(80, model.head.linear.in_features)
    targets = torch.arange(80) % 2
    targets[75:] = 2  # of the last of four images, in the second view
    targets[30:35] = NO_LABEL  # and in the first one these are not known
    features[torch.arange(80), targets.clamp_min(0)] += 6
    fit = spy(probe, "fit_linear_probe")
    Segmentation(NAMES).start(model, features, targets, views=2, clusters=torch.arange(4))
    known = targets != NO_LABEL
    assert torch.equal(fit.call_args.kwargs["clusters"], torch.arange(4).repeat_interleave(10).repeat(2)[known])
    assert (model.head.linear(features).argmax(1) == targets)[known].float().mean() > 0.9
    # As where the crops of a few large images show nothing of a rare class.
    for shown in ([0], [NO_LABEL], [0, NO_LABEL]):
        targets = torch.tensor(shown).repeat(80 // len(shown))
        with pytest.raises(InputError, match="fewer than two classes: use --head-init random or a larger --image-size"):
            Segmentation(NAMES).start(model, features, targets, views=2, clusters=torch.arange(4))


def test_pixels_are_drawn_as_often_as_they_are_or_as_they_weigh():
    """A quarter of the pixels is ink, by weight two thirds; of one image nothing is known."""
    ink = (torch.arange(16) < 4).long().expand(16, 16)
    batches = [(torch.randn(2, 3, 16, 16), torch.stack([ink, torch.full_like(ink, NO_LABEL)]))]
    task = Segmentation(["ground", "ink"], class_weights=torch.tensor([0.5, 3.0]))
    arguments = vit_mini(classes=2).eval(), batches, CPU, torch.float32, 2
    outputs, plain = task.pixel_outputs(*arguments)
    _, weighted = task.features(*arguments)
    assert outputs.shape == (segmentation.PROBE_ROWS // 4, 2)
    shares = [((classes == 1).sum() / (classes >= 0).sum()).item() for classes in (plain, weighted)]
    assert shares == pytest.approx([1 / 4, 2 / 3], abs=0.1)


def test_the_features_of_a_pixel_are_at_its_column_and_row(monkeypatch):
    """The map has each pixel's column and row, and its class is told by the column. Images draw other known pixels."""
    monkeypatch.setattr(segmentation, "feature_maps", lambda backbone, images: [backbone(images)])
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(20), indexing="ij")
    image = torch.stack([columns, rows]).float()
    mask = (columns >= 13).long().where(rows >= 3, NO_LABEL)
    passes_through = torch.nn.ModuleDict({"backbone": torch.nn.Identity()})
    batches = [(image.expand(3, -1, -1, -1), mask.expand(3, -1, -1))]
    features, classes = Segmentation(["left", "right"]).features(passes_through, batches, CPU, None, 3)
    torch.testing.assert_close(features, features.round(), atol=1e-3, rtol=0)
    column, row = features.round().long().T
    assert (column.max(), row.min(), row.max()) == (19, 3, 11)
    assert torch.equal(classes, (column >= 13).long())
    first, second, third = features.split(segmentation.PROBE_ROWS // 6)
    assert not torch.equal(first, second) and not torch.equal(second, third)
