"""What a run leaves for people to open: pictures of its curves and confusions, and the table printed at its end."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moco.files import open_atomically
from moco.training import Evaluation

# matplotlib and scikit-learn are imported where they draw: that takes a second, which no loading process shall wait.

BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart with every kind of colour vision (Okabe and Ito)


def plot_finetuning(history: list[dict[str, float]], accuracy_before: float, eval_split: str, path: Path) -> None:
    """Losses and accuracy by epoch, both losses without label smoothing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    losses.plot(epochs, [row["train_loss"] for row in history], "o-", color=BLUE, label="training")
    losses.plot(epochs, [row["val_loss"] for row in history], "s--", color=ORANGE, label=eval_split)
    losses.set(xlabel="epoch", ylabel="cross-entropy", title="Loss")
    accuracies.plot(epochs, [100 * row["val_accuracy"] for row in history], "s--", color=ORANGE, label=eval_split)
    if math.isfinite(accuracy_before):
        accuracies.axhline(100 * accuracy_before, color="0.4", linestyle=":", label="k-NN before training")
    accuracies.set(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy")
    for axes in (losses, accuracies):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    with open_atomically(path) as file:
        figure.savefig(file, dpi=150)


def plot_pretraining(history: list[dict[str, Any]], path: Path) -> None:
    """Contrastive loss and k-NN accuracy by epoch, on an axis each; without labels the effective rank of features."""
    from matplotlib.figure import Figure

    labelled = any(row["knn_accuracy"] is not None for row in history)
    name, title = ("knn_accuracy", "k-NN accuracy") if labelled else ("effective_rank", "effective rank of features")

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot([row["epoch"] for row in history], [row["loss"] for row in history], color=BLUE)
    axes.set(xlabel="epoch", ylabel="contrastive loss")
    measured = [row for row in history if row[name] is not None]
    right = axes.twinx()
    right.plot([row["epoch"] for row in measured], [row[name] for row in measured], "o-", color=ORANGE)
    right.set_ylabel(title)
    figure.legend(["loss", title], loc="outside upper center", ncols=2)
    with open_atomically(path) as file:
        figure.savefig(file, dpi=120, bbox_inches="tight")


def plot_confusion_matrix(result: Evaluation, class_names: Sequence[str], path: Path) -> None:
    """Rows are true classes, columns predictions; the counts are written out for up to 20 classes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    matrix = confusion_matrix(result.labels, result.predictions, labels=range(len(class_names)))
    few = len(class_names) <= 20
    side = min(12, 3 + 0.4 * len(class_names))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(matrix, display_labels=class_names if few else None)
    rotation = 45 if few and max(map(len, class_names)) > 3 else "horizontal"
    display.plot(ax=axes, include_values=few, cmap="Blues", xticks_rotation=rotation)
    if not few:
        axes.xaxis.set_major_locator(MaxNLocator(20, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(20, integer=True))
    axes.set_title(f"{result.accuracy:.1%} of {len(result.labels)} images right")
    with open_atomically(path) as file:
        figure.savefig(file, dpi=150)


def accuracy_per_class(result: Evaluation, class_names: Sequence[str]) -> dict[str, float | None]:
    """The share of each class's images that are right; None for a class without any (NaN would not be JSON)."""
    hits = [(result.predictions[result.labels == i] == i).float() for i in range(len(class_names))]
    return dict(zip(class_names, [hit.mean().item() if len(hit) else None for hit in hits], strict=True))


def summary(results: dict[str, Any], folder: Path) -> str:
    """The table printed at the end of a fine-tuning run."""
    trained, total = results["trainable_parameters"], results["total_parameters"]
    whole = "" if results["device"].startswith("cuda") else ", the whole process"  # with Python and PyTorch
    memory = results["peak_memory_bytes"]
    memory = f"{memory / 1e6:,.0f} MB ({results['device']}{whole})" if memory else "not known on this system"
    sizes = f"{results['adapter_bytes'] / 1e6:.2f} MB (backbone {results['backbone_bytes'] / 1e6:.1f} MB)"
    rows = [
        ("k-NN accuracy before", f"{results['knn_accuracy_before']:.2%}"),
        ("accuracy after", f"{results['val_accuracy']:.2%} of {results['val_images']} {results['eval_split']} images"),
        ("trained parameters", f"{trained:,} of {total:,} ({trained / total:.2%})"),
        ("adapter file", sizes),
        ("training time", f"{results['seconds']:.1f} s"),
        ("peak memory", memory),
        ("results in", f"{folder}/: lora.pth, last.pth, metrics.csv, results.json, config.yaml,"),
        ("", "training_curves.png, confusion_matrix.png"),
        ("merge it", f"python deploy_lora.py merge {folder / 'lora.pth'} --output merged.pth"),
        ("evaluate it", f"python finetune_lora.py --config {folder / 'config.yaml'} --eval-only {folder / 'lora.pth'}"),
    ]
    return "\n" + "\n".join(f"{name:<22}{value}" for name, value in rows)
