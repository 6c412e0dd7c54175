"""Seven examples of LoRA and QLoRA with this toolkit, in two minutes on a CPU.

    python example_lora_usage.py              # all seven
    python example_lora_usage.py --only 2     # one of them

    1  set-up: a MoCo backbone, adapters, what trains
    2  training: a loop of your own
    3  checkpoints: save, load into a fresh model, merge into plain torchvision
    4  inference: single images, with and without the adapters
    5  sizes: what lies on disk for a ResNet-50 and a ViT-B/16
    6  serving: one base, many tasks
    7  several labels: some of them unknown, AP and AUROC of each, thresholds

Each example is a function to copy from; it prints what it found and raises where something is not as it should be.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from finetune_lora import (
    DEFAULT_CHECKPOINT,
    add_lora_to_model,
    count_parameters,
    freeze_backbone_params,
    load_finetuned,
)
from lora_utils import LoRAManager
from toolkit.answers.evaluation import all_outputs, evaluate, extract_features
from toolkit.answers.tasks import MultiLabel
from toolkit.devices import select_device
from toolkit.images.data import Transformed, build_loader, load_splits
from toolkit.images.transforms import eval_transform, train_transform
from toolkit.models.backbones import build_backbone
from toolkit.models.checkpoints import load_backbone
from toolkit.run.runs import run_script


def example_1_setup() -> nn.Module:
    """Load a MoCo checkpoint, put adapters on it, freeze the rest, and count."""
    model, report = load_backbone(DEFAULT_CHECKPOINT, num_classes=10)
    print(f"{report['family']} checkpoint: {report['arch']}, epoch {report['epoch']}, {report['image_size']} pixels")

    for rank in [4, 8, 16]:  # the same model again: adapters are replaced, never nested
        model = add_lora_to_model(model, r=rank, lora_alpha=rank * 2)
        freeze_backbone_params(model)
        counts = count_parameters(model)
        share = counts["trainable"] / counts["total"]
        print(f"  r={rank:<2}  {counts['trainable']:>7,} of {counts['total']:,} parameters train ({share:.1%})")

    # Only the attention, and with a rank-stabilised scaling:
    add_lora_to_model(model, r=8, target_modules=["self_attention"], use_rslora=True)
    info = LoRAManager(model).get_lora_info()
    print(f"  attention only: {info['num_layers']} adapted layers, {info['lora_parameters']:,} parameters")
    return model


def example_2_training(epochs: int = 5) -> nn.Module:
    """A training loop of your own: nothing but PyTorch around the adapted model."""
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
        for images, labels in tqdm(train, desc=f"epoch {epoch + 1}/{epochs}", leave=False):
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        result = evaluate(model, evaluation, device)
        print(f"  epoch {epoch + 1}: evaluation accuracy {result.accuracy:.2%}, loss {result.loss:.3f}")
    if result.accuracy < 0.9:
        raise RuntimeError(f"the adapters learned too little: {result.accuracy:.2%}")
    return model


def example_3_checkpoints(model: nn.Module) -> None:
    """Save the adapters, load them into a fresh model, and merge them into a file for plain torchvision."""
    device = next(model.eval().parameters()).device
    images = torch.stack([eval_transform(32)(image) for image, _ in _some_digits(16)]).to(device)
    with torch.no_grad():
        expected = model(images)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits_lora.pth"
        # With these four in its metadata, load_finetuned and `python deploy_lora.py merge` can rebuild the model.
        metadata = {"arch": "vit_mini", "image_size": 32, "class_names": [str(digit) for digit in range(10)]}
        metadata["checkpoint"] = str(DEFAULT_CHECKPOINT)
        LoRAManager(model).save_lora_checkpoint(path, metadata)
        full = Path(folder) / "full.pth"
        torch.save(model.state_dict(), full)
        print(f"  adapter file {_megabytes(path):.2f} MB, full state_dict {_megabytes(full):.2f} MB")

        rebuilt, _ = load_finetuned(path)
        with torch.no_grad():
            _check_equal("load_finetuned", rebuilt.to(device)(images), expected)

        # The same by hand, for a model that you build yourself:
        fresh, _ = load_backbone(DEFAULT_CHECKPOINT, num_classes=10)
        add_lora_to_model(fresh, r=8, lora_alpha=16)
        manager = LoRAManager(fresh.to(device).eval())
        manager.load_lora_checkpoint(path)
        with torch.no_grad():
            _check_equal("a fresh model with the adapter file", fresh(images), expected)

        manager.merge_lora_weights()
        merged = Path(folder) / "merged.pth"
        torch.save(fresh.state_dict(), merged)

        plain = build_backbone("vit_mini", num_classes=10).to(device).eval()  # torchvision's VisionTransformer
        plain.load_state_dict(torch.load(merged, weights_only=True, map_location=device))
        with torch.no_grad():
            _check_equal("plain torchvision with the merged file", plain(images), expected)


def example_4_inference(model: nn.Module) -> None:
    """Predict single images, and compare with the backbone without its adapters."""
    device = next(model.eval().parameters()).device
    manager, transform = LoRAManager(model), eval_transform(32)
    with torch.inference_mode():
        for image, label in _some_digits(3):
            probabilities = model(transform(image)[None].to(device)).softmax(-1)[0]
            best = probabilities.argmax().item()
            print(f"  true class {label}, predicted {best} with probability {probabilities[best]:.3f}")

        images, labels = zip(*[(transform(image), label) for image, label in _some_digits(200)], strict=True)
        images, labels = torch.stack(images).to(device), torch.tensor(labels, device=device)
        adapted = (model(images).argmax(1) == labels).float().mean().item()
        with manager.disable_lora():
            bare = (model(images).argmax(1) == labels).float().mean().item()

        unmerged = _seconds(model, images)
        manager.merge_lora_weights()
        merged = _seconds(model, images)
        manager.unmerge_lora_weights()
    print(f"  200 evaluation digits: {adapted:.1%} right, {bare:.1%} without adapters (the head learned with them)")
    print(f"  {1e3 * unmerged:.0f} ms as adapters, {1e3 * merged:.0f} ms merged")
    if adapted <= bare:
        raise RuntimeError("the adapters make no difference")


def example_5_sizes() -> None:
    """Files really written and measured: full checkpoint, LoRA, QLoRA, merged; and the weights in memory."""
    print("  MB                    full   LoRA   QLoRA   merged   weights in memory: float   4-bit")
    for arch in ("resnet50", "vit_b_16"):
        with tempfile.TemporaryDirectory() as folder:
            model = build_backbone(arch, num_classes=100)
            torch.save(model.state_dict(), path := Path(folder) / "full.pth")
            full, in_memory = _megabytes(path), _weights_in_memory(model)
            lora = _adapter_size(model, Path(folder) / "lora.pth", use_qlora=False)
            LoRAManager(model).merge_lora_weights()
            torch.save(model.state_dict(), path := Path(folder) / "merged.pth")
            merged = _megabytes(path)
            LoRAManager(model).unmerge_lora_weights()
            qlora = _adapter_size(model, Path(folder) / "qlora.pth", use_qlora=True)
            four_bit = _weights_in_memory(model)
        print(f"  {arch:<18}{full:>8.1f}{lora:>7.2f}{qlora:>8.2f}{merged:>9.1f}{in_memory:>27.1f}{four_bit:>8.1f}")
        if not (lora < full / 20 and qlora < full / 20 and four_bit < in_memory / 4):
            raise RuntimeError(f"{arch}: the adapters or the 4-bit weights are larger than they should be")


def example_6_serving(model: nn.Module) -> None:
    """Several adapters on one base, each with layers, rank and classes of its own; a loop answers for all of them."""
    with tempfile.TemporaryDirectory() as folder:
        digits, parity = Path(folder) / "digits.pth", Path(folder) / "parity.pth"
        LoRAManager(model).save_lora_checkpoint(digits, {"class_names": [str(digit) for digit in range(10)]})
        LoRAManager(_parity_model()).save_lora_checkpoint(parity, {"class_names": ["even", "odd"]})

        base, report = load_backbone(DEFAULT_CHECKPOINT, num_classes=1)  # each file brings its own head
        manager, transform = LoRAManager(base.eval()), eval_transform(report["image_size"])
        manager.load_lora_checkpoint(digits, name="digits")
        manager.load_lora_checkpoint(parity, name="parity")

    right, requests = 0, [(task, image, label) for image, label in _some_digits(20) for task in manager.names]
    started = time.perf_counter()
    with torch.inference_mode():
        for task, image, label in requests:
            info = manager.use(task)
            answer = info["class_names"][base(transform(image)[None]).argmax()]
            right += answer == (str(label) if task == "digits" else ("even", "odd")[label % 2])
    each = 1e3 * (time.perf_counter() - started) / len(requests)
    print(f"  {right} of {len(requests)} answers right for {' and '.join(manager.names)}, {each:.0f} ms each")
    if right < 0.8 * len(requests):
        raise RuntimeError("an adapter answers for another's task")


def example_7_several_labels(epochs: int = 3) -> None:
    """Images that have several labels, some of them unknown: a loop of your own, AP and AUROC, and answers."""
    torch.manual_seed(0)
    device = select_device("auto")
    with tempfile.TemporaryDirectory() as folder:
        splits = load_splits("imagefolder", data_list=[_list_of_shapes(Path(folder))], task="multilabel")
        model, report = load_backbone(DEFAULT_CHECKPOINT, num_classes=len(splits.class_names))
        train, evaluation = (Transformed(images, eval_transform(report["image_size"])) for images in splits[:2])
        plain, evaluation = build_loader(train, 128), build_loader(evaluation, 128)

        add_lora_to_model(model, r=8, lora_alpha=16)
        freeze_backbone_params(model)
        task = MultiLabel(splits.class_names, splits.train.targets)
        task.start_head(
            model, *extract_features(model.to(device), plain, device)
        )  # a logistic regression of each label
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        batches = build_loader(train, 32, shuffle=True)
        for _ in range(epochs):
            for images, targets in batches:  # 1, 0, or NaN where unknown, of which the loss has nothing
                loss = task.loss(model.train()(images.to(device)), targets.to(device)) / len(images)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        task.calibrate(*all_outputs(model, plain, device), optimism=None)  # thresholds: the best F1 on training images
        answers = task.evaluate(model, evaluation, device)
        outputs, truth = all_outputs(model, evaluation, device)
    figures = [*answers.by_label(), task.thresholds]
    for name, ap, roc, threshold in zip(task.names, *figures, strict=True):
        print(f"  {name:<8} AP {ap:.1%}, AUROC {roc:.1%}; an answer above probability {threshold:.2f}")
    columns, rows = task.table(outputs[:3])
    for cells, known in zip(rows, truth[:3].tolist(), strict=True):
        said = {1.0: "yes", 0.0: "no"}
        told = ", ".join(f"{name} {said.get(value, 'unknown')}" for name, value in zip(task.names, known, strict=True))
        print(f"  answered {dict(zip(columns, cells, strict=True))['labels'] or 'none'}; true: {told}")
    if answers.score < 0.9:
        raise RuntimeError(f"the labels are not found: macro AP {answers.score:.2%}")


def _list_of_shapes(folder: Path, count: int = 300) -> Path:
    """Noise with a disc, a frame, stripes or several of these, and the list of what is where; a fifth is unknown."""
    random, (y, x) = np.random.RandomState(0), np.mgrid[:32, :32]
    rows = ["path,disc,frame,stripes"]
    for i in range(count):
        has, told = random.rand(3) < 0.5, random.rand(3) < 0.8
        row, column = random.randint(8, 24, 2)
        shapes = [(y - row) ** 2 + (x - column) ** 2 < 30, (y % 29 < 2) | (x % 29 < 2), (x + y) % 8 < 2]
        pixels = random.randint(0, 190, (32, 32))
        for shape in itertools.compress(shapes, has):
            pixels[shape] += 65
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        answers = (str(int(yes)) if known else "" for yes, known in zip(has, told, strict=True))
        rows.append(",".join([f"{i}.png", *answers]))
    path = folder / "labels.csv"
    path.write_text("\n".join(rows))
    return path


def _parity_model() -> nn.Module:
    """Is a digit even or odd? A second task on the same backbone: attention alone, rank 4, two classes."""
    torch.manual_seed(0)
    model, report = load_backbone(DEFAULT_CHECKPOINT, num_classes=2)
    add_lora_to_model(model, r=4, target_modules=["self_attention"])
    freeze_backbone_params(model)
    train = build_loader(
        Transformed(load_splits("digits").train, eval_transform(report["image_size"])), 32, shuffle=True
    )
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=3e-3)
    for images, labels in train:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels % 2).backward()
        optimizer.step()
    return model.eval()


def _adapter_size(model: nn.Module, path: Path, use_qlora: bool) -> float:
    add_lora_to_model(model, r=8, lora_alpha=16, use_qlora=use_qlora)
    freeze_backbone_params(model)
    LoRAManager(model).save_lora_checkpoint(path)
    return _megabytes(path)


def _weights_in_memory(model: nn.Module) -> float:
    """MB of all parameters and buffers, 4-bit weights with their quantisation constants."""
    tensors = model.state_dict().values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def _some_digits(count: int) -> list:
    images = load_splits("digits").val
    return [images[i] for i in range(count)]


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6


def _seconds(model: nn.Module, images: torch.Tensor) -> float:
    """The time of the fastest of three passes; on a GPU, `.cpu()` waits for the answer."""
    durations = []
    for _ in range(3):
        started = time.perf_counter()
        model(images).cpu()
        durations.append(time.perf_counter() - started)
    return min(durations)


def _check_equal(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (actual - expected).abs().max().item()
    print(f"  {what}: largest difference {difference:.1e}")
    if difference > 1e-3:
        raise RuntimeError(f"{what} gives other answers: {difference:.1e}")


def main(argv: list[str] | None = None) -> None:
    """Run the examples; the third, fourth and sixth train first if the second has not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, choices=range(1, 8), help="run one example")
    only = parser.parse_args(argv).only
    titles = ("set-up", "a training loop of your own", "checkpoints", "inference", "sizes on disk", "serving")
    titles += ("several labels",)
    trained = None
    for number in range(1, 8) if only is None else (only,):
        started = time.perf_counter()
        print(f"\nExample {number}: {titles[number - 1]}")
        if number in (3, 4, 6) and trained is None:
            print("  first a short training, as in example 2")
            trained = example_2_training(epochs=2)
        if number == 1:
            example_1_setup()
        elif number == 2:
            trained = example_2_training()
        elif number == 3:
            example_3_checkpoints(trained)
        elif number == 4:
            example_4_inference(trained)
        elif number == 5:
            example_5_sizes()
        elif number == 6:
            example_6_serving(trained)
        else:
            example_7_several_labels()
        print(f"  done in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    run_script(main)
