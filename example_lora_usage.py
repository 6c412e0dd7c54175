"""Four examples of LoRA and QLoRA, functions to copy from, in one minute on a CPU: python example_lora_usage.py"""

import functools
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune_lora import DEFAULT_CHECKPOINT, add_lora_to_model, freeze_backbone_params, load_finetuned
from lora_utils import LoRAManager, count_parameters
from toolkit.answers.evaluation import evaluate
from toolkit.devices import select_device
from toolkit.images.data import Transformed, build_loader
from toolkit.images.sources import load_splits
from toolkit.images.transforms import eval_transform, train_transform
from toolkit.models.backbones import build_backbone
from toolkit.models.checkpoints import load_backbone
from toolkit.run.runs import run_script

DEVICE = select_device("auto")
DIGITS = list("0123456789")  # the names of the classes


def example_1_setup() -> None:
    """Set-up: load a MoCo checkpoint, put adapters on it, freeze the rest, and count what trains."""
    model, report = load_backbone(DEFAULT_CHECKPOINT, num_classes=10)
    print(f"{report['family']} checkpoint: {report['arch']}, epoch {report['epoch']}, {report['image_size']} pixels")
    for rank in [4, 8, 16]:  # the same model again: adapters are replaced, never nested
        model = add_lora_to_model(model, r=rank, lora_alpha=rank * 2)  # use_qlora=True: over a backbone in 4 bits
        freeze_backbone_params(model)
        counts = count_parameters(model)
        print(f"  r={rank:<2}  {counts['trainable']:>7,} of {counts['total']:,} parameters train")


@functools.cache  # the examples after it take the same model
def example_2_training() -> nn.Module:
    """Training: adapters and classifier head, in a loop of your own, nothing but PyTorch around the adapted model."""
    splits = load_splits("digits")  # your own: load_splits("imagefolder", "my_images")
    model = adapted_model()
    batches = build_loader(Transformed(splits.train, train_transform(32, "affine")), 32, shuffle=True)  # photos: "crop"
    epochs = 5
    # Adapters that start at random, as these do, need about ten times full fine-tuning's rate: lora/initialization.py.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    model.train()
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images.to(DEVICE)), labels.to(DEVICE)).backward()
            optimizer.step()
            schedule.step()
    result = evaluate(model, build_loader(Transformed(splits.val, eval_transform(32)), 256), DEVICE)
    print(f"  evaluation accuracy {result.accuracy:.2%}, loss {result.loss:.3f}")
    return model.eval()


def example_3_checkpoints() -> None:
    """Checkpoints: save the adapters, load them into a fresh model, and merge them into a file for torchvision."""
    model = example_2_training()
    images, _ = some_digits(16)
    expected = model(images)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits_lora.pth"
        # With these four in its metadata, load_finetuned and `python deploy_lora.py merge` can rebuild the model.
        metadata = {"arch": "vit_mini", "image_size": 32, "class_names": DIGITS, "checkpoint": str(DEFAULT_CHECKPOINT)}
        LoRAManager(model).save_lora_checkpoint(path, metadata)
        print(f"  adapter file: {path.stat().st_size / 1e6:.2f} MB")
        rebuilt, _ = load_finetuned(path)
        compare("load_finetuned", rebuilt.to(DEVICE)(images), expected)

        fresh = adapted_model()  # the same for a model that you build yourself
        manager = LoRAManager(fresh.eval())
        manager.load_lora_checkpoint(path)
        manager.merge_lora_weights()
        torch.save(fresh.state_dict(), Path(folder) / "merged.pth")
        plain = build_backbone("vit_mini", num_classes=10).to(DEVICE).eval()  # torchvision's VisionTransformer
        plain.load_state_dict(torch.load(Path(folder) / "merged.pth", weights_only=True))
        compare("plain torchvision with the merged file", plain(images), expected)


def example_4_inference() -> None:
    """Inference: with the adapters, without them, and merged."""
    model = example_2_training()
    manager = LoRAManager(model)
    images, labels = some_digits(200)
    with torch.inference_mode():
        logits = model(images)
        with manager.disable_lora():
            bare_logits = model(images)
        manager.merge_lora_weights()  # serving takes the backbone's own time
        compare("merged", model(images), logits)
        manager.unmerge_lora_weights()
    adapted = (logits.argmax(1) == labels).float().mean()
    bare = (bare_logits.argmax(1) == labels).float().mean()
    print(f"  200 evaluation digits: {adapted:.1%} right, {bare:.1%} without adapters (the head learned with them)")


def adapted_model() -> nn.Module:
    torch.manual_seed(0)
    model, _ = load_backbone(DEFAULT_CHECKPOINT, num_classes=10)
    freeze_backbone_params(add_lora_to_model(model, r=8, lora_alpha=16))
    return model.to(DEVICE)


def some_digits(count: int) -> tuple[Tensor, Tensor]:
    images, labels = next(iter(build_loader(Transformed(load_splits("digits").val, eval_transform(32)), count)))
    return images.to(DEVICE), labels.to(DEVICE)


def compare(what: str, actual: Tensor, expected: Tensor) -> None:
    print(f"  {what}: largest difference {(actual - expected).abs().max():.1e}")
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)


def main() -> None:
    """Run the examples; the third and fourth take the model that the second trains."""
    examples = (example_1_setup, example_2_training, example_3_checkpoints, example_4_inference)
    for number, example in enumerate(examples, 1):
        print(f"\nExample {number}: {example.__doc__}")
        example()


if __name__ == "__main__":
    run_script(main)
