"""--task segmentation: losses, figures and intervals against plain computations, and whole runs on small masks."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, jaccard_score

import finetune_lora
from finetune_lora import FineTuning, load_finetuned, prepare, read_options
from lora_utils import LoRAManager, base_digests
from toolkit import InputError
from toolkit.answers.evaluation import NO_LABEL
from toolkit.answers.segmentation import Segmentation, pixel_figures, rare_class_weights
from toolkit.devices import seed_everything
from toolkit.models.backbones import build_backbone, record_of
from toolkit.models.dense import DenseModel, answers_for

CPU = torch.device("cpu")
NAMES = ["sky", "wall", "tree"]


def masks(shape: tuple[int, ...], classes: int = 3, seed: int = 0) -> torch.Tensor:
    """Random classes, a tenth of them unknown."""
    draws = torch.Generator().manual_seed(seed)
    found = torch.randint(0, classes, shape, generator=draws)
    return found.where(torch.rand(shape, generator=draws) > 0.1, NO_LABEL)


class Fixed(torch.nn.Module):
    """Answers with given logits, whatever it is shown: one image after the other."""

    window = 8

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits
        self.taken = 0

    def forward(self, images):
        self.taken += len(images)
        return self.logits[self.taken - len(images) : self.taken]


def answered(logits: torch.Tensor, truth: torch.Tensor, task: Segmentation):
    batches = [(torch.zeros(4, 3, 8, 8), truth[:4]), (torch.zeros(2, 3, 8, 8), truth[4:])]
    return task.evaluate(Fixed(logits), batches, CPU)


def test_figures_and_reliability_are_over_all_known_pixels():
    torch.manual_seed(0)
    logits, truth = torch.randn(6, 3, 8, 8), masks((6, 8, 8))
    found = answered(logits, truth, Segmentation(NAMES))
    known = truth != NO_LABEL
    true, answer = truth[known].numpy(), logits.argmax(1)[known].numpy()
    measured = found.measured()
    assert measured["miou"] == pytest.approx(jaccard_score(true, answer, average="macro"))
    assert measured["macro_dice"] == pytest.approx(f1_score(true, answer, average="macro"))
    assert measured["pixel_accuracy"] == pytest.approx((true == answer).mean())
    figures = Segmentation(NAMES).report(found).figures()
    expected = jaccard_score(true, answer, average=None)
    assert list(figures["iou_per_class"].values()) == pytest.approx(expected.tolist())
    low, high = figures["miou_interval"]
    assert low < measured["miou"] < high
    losses = [F.cross_entropy(logits[i : i + 1], truth[i : i + 1], ignore_index=NO_LABEL).item() for i in range(6)]
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    confidences = logits.softmax(1).amax(1)[known].double()
    bins = found.reliability()
    assert bins[:, 2].sum() == known.sum()
    assert bins[:, 0].sum() == pytest.approx(confidences.sum().item(), rel=1e-5)


def test_its_base_is_what_the_checkpoint_holds(tmp_path):
    """An interpolated position embedding rounds differently on other CPUs; random weights are no base."""
    torch.save(build_backbone("vit_mini", 2, image_size=32).state_dict(), tmp_path / "base.pth")
    digests = {}
    for path, size in ((tmp_path / "base.pth", 32), (tmp_path / "base.pth", 64), ("none", 32)):
        model, _ = finetune_lora.load_base(path, None, 2, "vit_mini", size, per_pixel=True)
        finetune_lora.add_lora_to_model(model, r=2)
        digests[path, size] = record_of(model).base_digests
        assert path == "none" or base_digests(model) == digests[path, size]
    assert digests["none", 32] == {} and digests.pop((tmp_path / "base.pth", 64)) == digests[tmp_path / "base.pth", 32]


def test_a_class_that_is_nowhere_counts_in_no_mean_and_a_rare_one_by_the_root_of_its_frequency():
    matrices = torch.tensor([[[3.0, 1.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]]])
    figures = pixel_figures(matrices)
    assert figures["miou"].item() == pytest.approx((3 / 4 + 4 / 5) / 2) and figures["iou"][0, 2].isnan()
    pixels = torch.tensor([[900.0, 90.0], [0.0, 10.0]])
    weights = rare_class_weights(pixels)
    assert weights[1] / weights[0] == pytest.approx(3.0)
    assert (weights * pixels.sum(0)).sum() / pixels.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 1.0])])
def test_the_loss_is_the_mean_over_an_images_known_pixels(weights):
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    truth = masks((4, 5, 5))
    truth[3] = NO_LABEL  # an image of which nothing is known
    dtype_weights = None if weights is None else weights.double()
    loss = Segmentation(NAMES, dtype_weights).loss(logits, truth)
    expected = 0.0
    for image, mask in zip(logits, truth, strict=True):
        known = mask != NO_LABEL
        if known.any():
            losses = F.cross_entropy(image[:, known].T, mask[known], dtype_weights, reduction="none")
            expected = expected + losses.sum() / known.sum()
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(of, logits, retain_graph=True)[0] for of in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert not ours[3].any()


def test_an_image_of_which_nothing_is_known_is_the_last_of_the_worst():
    torch.manual_seed(0)
    logits, truth = torch.randn(6, 3, 8, 8), masks((6, 8, 8))
    truth[2] = NO_LABEL
    task = Segmentation(NAMES)
    found = answered(logits, truth, task)
    shares = (found.confusion.diagonal(dim1=1, dim2=2).sum(1) / found.confusion.sum((1, 2))).nan_to_num(1.0)
    assert list(found.maps) == shares.argsort(stable=True).tolist() and list(found.maps)[-1] == 2
    [mistakes] = task.report(found).mistakes().values()
    assert "nan" not in str(mistakes)


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def segment(base, pairs, tmp_path):
    """segment("--epochs 1", "out") trains on the pairs; its results, with the folder as `folder`."""

    def run(options: str = "", output: str = "out", **more) -> dict:
        argv = f"--task segmentation --checkpoint {base} --data-dir {pairs} --output-dir {tmp_path / output}"
        argv += " --device cpu --workers 0 --batch-size 4 --epochs 2 --learning-rate 1e-3"
        return finetune_lora.main([*argv.split(), *options.split()], **more) | {"folder": tmp_path / output}

    return run


def test_a_run_leaves_its_figures_and_an_adapter_that_answers_for_every_pixel(segment, pairs):
    results = segment("--epochs 1 --lora-rank 2 --wise-ft 1")
    named = {"val_miou", "probe_miou_before", "val_miou_interval", "iou_per_class", "dice_per_class", "pixel_accuracy"}
    assert named <= results.keys()
    assert results["task"] == "segmentation" and list(results["iou_per_class"]) == ["class 0", "class 1"]
    assert json.loads((results["folder"] / "results.json").read_text())["val_miou"] == results["val_miou"]
    model, info = load_finetuned(results["folder"] / "lora.pth")
    assert isinstance(model, DenseModel) and info["task"]["kind"] == "segmentation"
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "head"}

    image = torch.randn(3, 20, 28)
    with torch.no_grad():
        adapted = answers_for(image, model.window, model)
        LoRAManager(model).merge_lora_weights()
        merged = answers_for(image, model.window, model)
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert adapted.shape == (2, 20, 28)


def test_a_run_starts_as_the_probe_of_pixels(base, pairs, tmp_path):
    argv = f"--task segmentation --checkpoint {base} --data-dir {pairs} --output-dir {tmp_path} --device cpu"
    args, _ = read_options([*argv.split(), "--workers", "0", "--batch-size", "4"])
    seed_everything(0)
    splits, model, report, plan = prepare(args, CPU)
    run = FineTuning(args, plan, model, report, splits, [])
    run.start()
    assert run.evaluate(run.loaders.val).score == pytest.approx(run.baseline["probe_miou"], abs=1e-5)
    assert run.baseline["knn_miou"] is None and run.baseline["probe_miou"] > 0.3


@pytest.mark.parametrize(
    "options",
    [
        "--use-qlora --lora-rank 2 --adapt-last 1 --class-weights balanced --keep-best miou --activation-precision 16",
        "--lora-rank 0 --no-freeze-backbone --wise-ft 0.5 --augmentation none --gradient-checkpointing full"
        " --classes dark bright --unknown-value 255 7",
    ],
)
def test_what_other_tasks_can_do_masks_can_too(segment, options):
    assert 0 <= segment(f"{options} --epochs 1")["val_miou"] <= 1


def test_what_is_not_possible_with_masks_is_refused_by_name(pairs):
    options = "--augmentation trivial --cache-features disk --adapt-last 1 --labels-per-class 3"
    with pytest.raises(InputError) as raised:
        read_options(f"--task segmentation --data-dir {pairs} {options} --keep-best accuracy".split())
    for named in ("--augmentation trivial", "--cache-features", "--labels-per-class"):
        assert f"{named} with --task segmentation" in str(raised.value)
    assert "--keep-best accuracy with --task segmentation: use miou or dice or pixels" in str(raised.value)


def test_masks_are_asked_for_and_their_options_refused_elsewhere():
    with pytest.raises(InputError, match="--dataset digits has no masks; give --data-dir with the folders images/"):
        read_options(["--task", "segmentation"])
    with pytest.raises(InputError, match="--unknown-value with --task classification: only masks have it"):
        read_options(["--unknown-value", "0"])
