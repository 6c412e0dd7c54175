"""Seven examples of LoRA and QLoRA with this toolkit, in two minutes on a CPU.

    python example_lora_usage.py              # all seven
    python example_lora_usage.py --only 2     # one of them

Each is a function to copy from, and prints what it found.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from finetune_lora import DEFAULT_CHECKPOINT, add_lora_to_model, freeze_backbone_params, load_finetuned
from lora_utils import LoRAManager, count_parameters
from toolkit.answers.evaluation import all_outputs, evaluate, extract_features
from toolkit.answers.segmentation import PixelObjective, pixel_figures
from toolkit.answers.tasks import MultiLabel
from toolkit.devices import select_device
from toolkit.images.data import LabelledImages, Transformed, build_loader
from toolkit.images.sources import load_splits
from toolkit.images.transforms import eval_transform, train_transform
from toolkit.models.backbones import build_backbone
from toolkit.models.checkpoints import load_backbone
from toolkit.models.dense import DenseModel
from toolkit.run.runs import run_script

DIGITS = list("0123456789")  # the names of the classes
LABELS = {"even": [0, 2, 4, 6, 8], "round": [0, 6, 8, 9], "large": [5, 6, 7, 8, 9]}


def example_1_setup() -> nn.Module:
    """Set-up: load a MoCo checkpoint, put adapters on it, freeze the rest, and count what trains."""
    model, report = load_backbone(DEFAULT_CHECKPOINT, num_classes=10)
    print(f"{report['family']} checkpoint: {report['arch']}, epoch {report['epoch']}, {report['image_size']} pixels")
    for rank in [4, 8, 16]:  # the same model again: adapters are replaced, never nested
        model = add_lora_to_model(model, r=rank, lora_alpha=rank * 2)  # use_qlora=True: over a backbone in 4 bits
        freeze_backbone_params(model)
        counts = count_parameters(model)
        share = counts["trainable"] / counts["total"]
        print(f"  r={rank:<2}  {counts['trainable']:>7,} of {counts['total']:,} parameters train ({share:.1%})")
    return model


def example_2_training(epochs: int = 5) -> nn.Module:
    """Training: a loop of your own, nothing but PyTorch around the adapted model."""
    torch.manual_seed(0)
    device = select_device("auto")
    splits = load_splits("digits")  # your own: load_splits("imagefolder", "my_images")
    model, report = load_backbone(DEFAULT_CHECKPOINT, num_classes=len(splits.class_names))
    size = report["image_size"]
    train = build_loader(Transformed(splits.train, train_transform(size, "affine")), 32, shuffle=True)  # photos: "crop"
    evaluation = build_loader(Transformed(splits.val, eval_transform(size)), 256)

    add_lora_to_model(model, r=8, lora_alpha=16)
    freeze_backbone_params(model)  # adapters and classifier head train, nothing else
    model.to(device).train()
    # Adapters that start at random, as these do, need about ten times full fine-tuning's rate: lora/initialization.py.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(train))
    for epoch in range(epochs):
        for images, labels in train:
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        result = evaluate(model, evaluation, device)
        print(f"  epoch {epoch + 1}: evaluation accuracy {result.accuracy:.2%}, loss {result.loss:.3f}")
    return model


@torch.no_grad()
def example_3_checkpoints(model: nn.Module) -> None:
    """Checkpoints: save the adapters, load them into a fresh model, and merge them into a file for torchvision."""
    device = next(model.eval().parameters()).device
    images, _ = _some_digits(16, device)
    expected = model(images)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits_lora.pth"
        # With these four in its metadata, load_finetuned and `python deploy_lora.py merge` can rebuild the model.
        metadata = {"arch": "vit_mini", "image_size": 32, "class_names": DIGITS, "checkpoint": str(DEFAULT_CHECKPOINT)}
        LoRAManager(model).save_lora_checkpoint(path, metadata)
        print(f"  adapter file: {path.stat().st_size / 1e6:.2f} MB")
        rebuilt, _ = load_finetuned(path)
        _compare("load_finetuned", rebuilt.to(device)(images), expected)

        # The same by hand, for a model that you build yourself:
        fresh, _ = load_backbone(DEFAULT_CHECKPOINT, num_classes=10)
        add_lora_to_model(fresh, r=8, lora_alpha=16)
        manager = LoRAManager(fresh.to(device).eval())
        manager.load_lora_checkpoint(path)
        _compare("a fresh model with the adapter file", fresh(images), expected)

        manager.merge_lora_weights()
        torch.save(fresh.state_dict(), Path(folder) / "merged.pth")
        plain = build_backbone("vit_mini", num_classes=10).to(device).eval()  # torchvision's VisionTransformer
        plain.load_state_dict(torch.load(Path(folder) / "merged.pth", weights_only=True, map_location=device))
        _compare("plain torchvision with the merged file", plain(images), expected)


@torch.inference_mode()
def example_4_inference(model: nn.Module) -> None:
    """Inference: single images, merged and not, and the backbone without its adapters."""
    manager = LoRAManager(model.eval())
    images, labels = _some_digits(200, next(model.parameters()).device)
    probabilities = model(images[:1]).softmax(-1)[0]
    best = probabilities.argmax().item()
    print(f"  true class {labels[0]}, predicted {best} with probability {probabilities[best]:.3f}")

    logits = model(images)
    adapted = (logits.argmax(1) == labels).float().mean().item()
    with manager.disable_lora():
        bare = (model(images).argmax(1) == labels).float().mean().item()
    print(f"  200 evaluation digits: {adapted:.1%} right, {bare:.1%} without adapters (the head learned with them)")
    manager.merge_lora_weights()  # serving takes the backbone's own time
    _compare("merged", model(images), logits)
    manager.unmerge_lora_weights()


def example_5_serving(model: nn.Module) -> None:
    """Serving: several adapters on one base, each with layers, rank and classes of its own."""
    torch.manual_seed(0)
    parity = _adapted_model(2, r=4, target_modules=["self_attention"])  # is a digit even or odd? a second task
    batches = _loader(load_splits("digits").train, 32, shuffle=True)
    _train(parity, batches, lambda logits, labels: F.cross_entropy(logits, labels % 2), rate=3e-3)

    names = {"digits": DIGITS, "parity": ["even", "odd"]}
    base, _ = load_backbone(DEFAULT_CHECKPOINT, num_classes=1)  # each file brings its own head
    manager = LoRAManager(base.eval())
    with tempfile.TemporaryDirectory() as folder:
        for task, trained in (("digits", model), ("parity", parity)):
            path = Path(folder) / f"{task}.pth"
            LoRAManager(trained).save_lora_checkpoint(path, {"class_names": names[task]})
            manager.load_lora_checkpoint(path, name=task)

    right = 0
    images, labels = _some_digits(20, torch.device("cpu"))
    with torch.inference_mode():
        for image, label in zip(images, labels.tolist(), strict=True):
            for task, truth in (("digits", str(label)), ("parity", names["parity"][label % 2])):
                info = manager.use(task)
                right += info["class_names"][base(image[None]).argmax()] == truth
    print(f"  {right} of 40 answers right for {' and '.join(manager.names)}")


def example_6_several_labels(epochs: int = 3) -> None:
    """Several labels an image, some of them unknown: a loop of your own, AP and AUROC, thresholds and answers."""
    torch.manual_seed(0)
    splits = load_splits("digits")  # your own: load_splits("imagefolder", data_list=["labels.csv"], task="multilabel")
    for digits in (splits.train, splits.val):  # give them three labels each, a fifth of which are unknown
        labels = torch.tensor(digits.labels)
        digits.targets = torch.stack([torch.isin(labels, torch.tensor(which)) for which in LABELS.values()], 1).float()
        digits.targets[torch.rand(digits.targets.shape) < 0.2] = torch.nan
    in_order = _loader(splits.train, 256)
    evaluation = _loader(splits.val, 256)
    model = _adapted_model(len(LABELS))
    device = next(model.parameters()).device
    task = MultiLabel(list(LABELS), splits.train.targets)
    task.head.start(model, *extract_features(model, in_order, device))  # a logistic regression of each label

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return task.loss(outputs, targets) / len(targets)  # of 1, 0, or NaN where unknown, which it leaves out

    _train(model, _loader(splits.train, 32, shuffle=True), loss, rate=1e-3, epochs=epochs)
    outputs, targets = all_outputs(model, in_order, device)
    task.head.calibrate(outputs, targets, optimism=None)  # thresholds: the best F1 on training images
    answers = task.evaluate(model, evaluation, device)
    average_precision, auroc = answers.by_label()
    for name, ap, roc, threshold in zip(task.names, average_precision, auroc, task.head.thresholds, strict=True):
        print(f"  {name:<8} AP {ap:.1%}, AUROC {roc:.1%}; an answer above probability {threshold:.2f}")
    outputs, _ = all_outputs(model, evaluation, device)
    _, rows = task.table(outputs[:3])
    for (labels, *_), digit in zip(rows, splits.val.labels[:3], strict=True):
        print(f"  {digit} is {labels or 'nothing'}")


def example_7_masks(epochs: int = 2) -> None:
    """A class for every pixel: a loop of your own over a dense model, and the IoU of each class."""
    torch.manual_seed(0)
    splits = load_splits("digits")  # your own: load_splits("imagefolder", "my_pairs", task="segmentation")
    backbone, _ = load_backbone(DEFAULT_CHECKPOINT, num_classes=10)
    model = DenseModel(backbone, classes=11, image_size=32)  # the ground, and the ink of each digit
    freeze_backbone_params(add_lora_to_model(model, r=8, lora_alpha=16))
    parts = []
    for images in (splits.train, splits.val):
        pixels, digits = next(iter(_loader(images, len(images))))
        masks = torch.where(pixels.mean(1) > 0, 1 + digits[:, None, None], 0)  # (N, 32, 32)
        parts.append(TensorDataset(pixels, masks))
    objective = PixelObjective()

    def loss(outputs: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        return objective.loss(outputs, masks) / len(masks)  # over pixels; those of class -100 do not count

    _train(model, DataLoader(parts[0], 32, shuffle=True), loss, rate=3e-3, epochs=epochs)
    pixels, masks = parts[1].tensors
    with torch.inference_mode():
        answers = model.eval()(pixels).argmax(1)
    matrix = torch.bincount((11 * masks + answers).flatten(), minlength=121).view(1, 11, 11)  # truth by answer
    figures = pixel_figures(matrix)
    print(f"  mean IoU {figures['miou'].item():.1%}; of the ground {figures['iou'][0, 0]:.1%}")


def _adapted_model(classes: int, **settings: Any) -> nn.Module:
    model, _ = load_backbone(DEFAULT_CHECKPOINT, num_classes=classes)
    freeze_backbone_params(add_lora_to_model(model, **settings))
    return model.to(select_device("auto"))


def _loader(images: LabelledImages, batch_size: int, shuffle: bool = False) -> DataLoader:
    return build_loader(Transformed(images, eval_transform(32)), batch_size, shuffle=shuffle)


def _train(model: nn.Module, batches: DataLoader, loss: Callable, rate: float, epochs: int = 1) -> None:
    """The loop of example 2, and no more."""
    device = next(model.train().parameters()).device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(epochs):
        for images, targets in batches:
            optimizer.zero_grad()
            loss(model(images.to(device)), targets.to(device)).backward()
            optimizer.step()


def _some_digits(count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    batch, labels = next(iter(_loader(load_splits("digits").val, count)))
    return batch.to(device), labels.to(device)


def _compare(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    print(f"  {what}: largest difference {(actual - expected).abs().max():.1e}")
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)


NEED_A_MODEL = (example_3_checkpoints, example_4_inference, example_5_serving)
EXAMPLES = (example_1_setup, example_2_training, *NEED_A_MODEL, example_6_several_labels, example_7_masks)


def main(argv: list[str] | None = None) -> None:
    """Run the examples; the third to fifth train first if the second has not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, choices=range(1, len(EXAMPLES) + 1), help="run one example")
    only = parser.parse_args(argv).only
    trained = None
    for number, example in enumerate(EXAMPLES, 1):
        if only not in (None, number):
            continue
        print(f"\nExample {number}: {example.__doc__}")
        if example in NEED_A_MODEL and trained is None:
            print("  first a short training, as in example 2")
            trained = example_2_training(epochs=2)
        found = example(trained) if example in NEED_A_MODEL else example()
        trained = found if number == 2 else trained


if __name__ == "__main__":
    run_script(main)
