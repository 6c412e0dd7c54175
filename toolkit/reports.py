"""What a run leaves for people to open: pictures of its curves and confusions, and the table printed at its end."""

import argparse
import json
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from toolkit import distributed
from toolkit.bands import Bands, recorded
from toolkit.collapse import Recovery
from toolkit.data import LabelledImages, LoadingMeter, Splits
from toolkit.files import open_atomically, write_text
from toolkit.measures import TITLES, wilson_interval
from toolkit.report_page import BLUE, ORANGE, drawn, write_page
from toolkit.training import Evaluation, WeightAverage, best_epoch, own_rates, peak_memory_bytes
from toolkit.transforms import ShrinkTo, View

# matplotlib and scikit-learn are imported where they draw: that takes a second, which no loading process shall wait.

LOW_RATE = 1e-4  # the default; below it adapters mostly gain from more

# ----------------------------------------------------------------------------------------------------------------------
# Words that several lines share


def right_of(accuracy: float, images: int) -> str:
    """An accuracy as counted images, per cent, and how far chance reaches."""
    low, high = wilson_interval(accuracy * images, images)
    digits = 0 if images < 200 else 1  # more would be chance's own
    interval = f"95% interval {low:.{digits}%} to {high:.{digits}%}"
    return f"{round(accuracy * images):,} of {images:,} images, {accuracy:.2%} ({interval})"


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 100:
        return f"{seconds:.{1 if seconds < 9.95 else 0}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def short_rate(rate: float) -> str:
    """A learning rate as people type it: 1e-4, 2.4e-3."""
    digits, _, power = f"{rate:.2e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


# ----------------------------------------------------------------------------------------------------------------------
# While it runs


def describe_data(args: argparse.Namespace, splits: Splits) -> str:
    """Which images train and which are evaluated on, in a line."""
    where = " (a part of the training images: --eval-split validation)" if args.eval_split == "validation" else ""
    numbers = f"{len(splits.train):,} training images, {len(splits.val):,} evaluation images{where}"
    return f"data: {numbers}, {len(splits.class_names)} classes"


def describe_baseline(baseline: dict[str, float | None], images: int) -> str:
    """What the backbone knows before training, in a line; and another if these evaluation images can show no gain."""
    names = {"knn_accuracy": "k-NN", "probe_accuracy": "linear probe"}
    known = [f"{name} {baseline[key]:.2%}" for key, name in names.items() if baseline[key] is not None]
    told = f"before training: {', '.join(known)}"
    if baseline["probe_accuracy"] == 1:
        told += f"\nthe linear probe gets all {images} evaluation images right: no training can do better on them"
    return told


def describe_rates(args: argparse.Namespace, rate: float, adapter_lr_factor: float) -> str:
    """What learns at which rate, in a line.

    Args:
        rate: --learning-rate, or less in a short run.
        adapter_lr_factor: how many times as fast the adapters learn.
    """
    head, adapters = own_rates(args, rate, adapter_lr_factor)
    told = [f"head {short_rate(head)}"]
    if adapters is not None:
        why = f" ({adapter_lr_factor:g}x: they start at the gradient)" if adapter_lr_factor > 1 else ""
        told.append(f"adapters {short_rate(adapters)}{why}")
    if args.train_norms or not args.freeze_backbone:
        told.append(f"{'norms' if args.freeze_backbone else 'backbone'} {short_rate(rate)}")
    lowered = f"; 1/{args.learning_rate / rate:.0f} of what was asked for" if rate < args.learning_rate else ""
    why = ", since few steps cannot correct what a high rate does" if lowered else ""
    return f"learning rate: {', '.join(told)}{lowered}{why}"


def describe_epoch(history: Sequence[dict[str, float]], epochs: int) -> str:
    """The last finished epoch, and what is left of the whole run, in a line."""
    row = history[-1]
    losses = f"training loss {row['train_loss']:.3f}, evaluation {row['val_loss']:.3f}"
    left = sum(row["seconds"] for row in history) / len(history) * (epochs - row["epoch"])
    ending = f", {duration(left)} left" if left else ""
    return f"epoch {row['epoch']}: {losses}, accuracy {row['val_accuracy']:.2%}; {duration(row['seconds'])}{ending}"


def tell_epoch(history: Sequence[dict[str, float]], args: argparse.Namespace, average: WeightAverage) -> None:
    """Print the last finished epoch, and log it for TensorBoard if that was asked for."""
    print(describe_epoch(history, args.epochs))
    if average.share < average.wise_ft_alpha:
        kept = f"  {average.share:.0%} of the change is kept so far"
        print(f"{kept}: with more, training images are answered worse than by the probe")
    if args.tensorboard:
        log_tensorboard(history[-1], args.output_dir)


# ----------------------------------------------------------------------------------------------------------------------
# What it leaves


class FineTuned(Protocol):
    """What is reported of a run: see `finetune_lora.FineTuning`."""

    args: argparse.Namespace
    device: torch.device
    dtype: torch.dtype
    splits: Splits
    report: dict[str, Any]  # of `load_backbone`
    identity: dict[str, Any]  # with `class_names`, `images` and `config`
    history: list[dict[str, float]]
    baseline: dict[str, float | None]
    meter: LoadingMeter
    average: WeightAverage
    recovery: Recovery
    adapter_lr_factor: float

    def path(self, name: str) -> Path: ...


def write_finetuning(run: FineTuned, result: Evaluation, kept_epoch: int, counts: dict[str, int]) -> dict[str, Any]:
    """Write and print the results of a fine-tuning; returns what `results.json` has.

    Args:
        result: of the model as it was saved after `kept_epoch`, on the evaluation images.
        counts: its parameters, as `count_parameters` gives them.
    """
    names, config, normalization = run.splits.class_names, run.identity["config"], run.args.normalization
    results = {
        **_accuracies(run, result, kept_epoch),
        **_rates(run),
        "kept_share": run.average.share,
        "retreats": run.recovery.guard.retreats,
        "epochs": len(run.history),
        "seconds": sum(row["seconds"] for row in run.history) + run.recovery.guard.lost_seconds,
        **run.meter.results(),
        "trainable_parameters": counts["trainable"],
        "total_parameters": counts["total"],
        "lora_parameters": counts["lora"],
        "peak_memory_bytes": peak_memory_bytes(run.device),
        "adapter_bytes": run.path("lora.pth").stat().st_size,
        "backbone_bytes": 4 * (counts["total"] - counts["lora"]),
        "device": str(run.device),
        "precision": str(run.dtype).removeprefix("torch."),
        "images": run.identity["images"],
        "normalization": recorded(normalization, run.report),
        "config": config,
    }
    write_text(json.dumps(results, indent=2), run.path("results.json"))
    plot_finetuning(run.history, run.baseline, run.path("training_curves.png"))
    plot_confusion_matrix(result, names, run.path("confusion_matrix.png"))
    plot_mistakes(result, run.splits.val, names, run.path("mistakes.png"), normalization["bands"])
    rows = summary(results, run.args.output_dir)
    pictures = {"mistakes": run.path("mistakes.png"), "curves": run.path("training_curves.png")}
    write_page(run.path("report.html"), rows, result, names, run.path("lora.pth"), **pictures, config=config)
    print(f"\n{table(rows)}")
    return results


def _accuracies(run: FineTuned, result: Evaluation, kept_epoch: int) -> dict[str, Any]:
    """How good the saved adapter is, and what was known before training."""
    images = len(result.labels)
    best = {"epoch": 0, "val_accuracy": run.baseline["probe_accuracy"]}  # where no epoch did well
    if run.history:
        best = best_epoch(run.history, run.args.keep_best or "accuracy")
    return {
        "val_accuracy": result.accuracy,
        "val_loss": result.loss,
        "val_images": images,
        "val_accuracy_interval": list(wilson_interval(result.accuracy * images, images)),
        "eval_split": run.args.eval_split,
        "kept_epoch": kept_epoch,  # of which `lora.pth` and these accuracies are
        # Chosen on the very images that it was measured on: no number to publish.
        "best_epoch": best["epoch"],
        "best_val_accuracy": best["val_accuracy"],
        "knn_accuracy_before": run.baseline["knn_accuracy"],
        "probe_accuracy_before": run.baseline["probe_accuracy"],
        "accuracy_per_class": accuracy_per_class(result, run.splits.class_names),
        "balanced_accuracy": result.balanced_accuracy,
        "macro_f1": result.macro_f1,
    }


def _rates(run: FineTuned) -> dict[str, float | None]:
    of_head, of_adapters = own_rates(run.args, run.recovery.rate, run.adapter_lr_factor)
    asked = run.args.learning_rate
    return {"learning_rate": asked, "head_learning_rate": of_head, "adapter_learning_rate": of_adapters}


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Rows of (name, value) as they are printed."""
    return "\n".join(f"{name:<22}{value}" for name, value in rows)


def balanced(result: Evaluation) -> str:
    """How good the answers are where each class counts alike."""
    return f"{result.balanced_accuracy:.2%}, macro F1 {result.macro_f1:.2%}"


def log_tensorboard(row: dict[str, Any], folder: Path) -> None:
    """Add a row of `metrics.csv` to the log in `folder` for TensorBoard; an epoch's row replaces earlier ones of it."""
    from torch.utils.tensorboard import SummaryWriter

    if distributed.is_main():
        with SummaryWriter(str(folder / "tensorboard"), purge_step=row["epoch"]) as writer:
            for name, value in row.items():
                if name != "epoch" and value is not None:
                    writer.add_scalar(name, value, row["epoch"])


def plot_finetuning(history: list[dict[str, float]], baseline: dict[str, float | None], path: Path) -> None:
    """Losses and accuracy by epoch, both losses without label smoothing.

    Args:
        baseline: `knn_accuracy` and `probe_accuracy` before training, None where not measured.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    losses.plot(epochs, [row["train_loss"] for row in history], "o-", color=BLUE, label="training")
    losses.plot(epochs, [row["val_loss"] for row in history], "s--", color=ORANGE, label="evaluation")
    losses.set(xlabel="epoch", ylabel="cross-entropy", title="Loss")
    accuracies.plot(epochs, [100 * row["val_accuracy"] for row in history], "s--", color=ORANGE, label="evaluation")
    for name, label, style in (("knn_accuracy", "k-NN", ":"), ("probe_accuracy", "linear probe", "-.")):
        if baseline[name] is not None:
            accuracies.axhline(100 * baseline[name], color="0.4", linestyle=style, label=f"{label} before training")
    accuracies.set(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy")
    for axes in (losses, accuracies):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    with open_atomically(path) as file:
        figure.savefig(file, dpi=150)


def plot_learning_rates(rates: Sequence[float], accuracies: Sequence[float], path: Path) -> None:
    """Validation accuracies (0 to 1) by learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, [100 * accuracy for accuracy in accuracies], "o-", color=BLUE)
    axes.set(xscale="log", xlabel="learning rate", ylabel="accuracy on the validation part (%)")
    axes.grid(alpha=0.3)
    with open_atomically(path) as file:
        figure.savefig(file, dpi=120)


def plot_pretraining(history: list[dict[str, Any]], path: Path) -> None:
    """By epoch, a panel each: the contrastive loss, and what was measured of the features."""
    from matplotlib.figure import Figure

    panels = {"loss": "contrastive loss", **TITLES}
    measured = {name: [row for row in history if row[name] is not None] for name in panels}
    measured = {name: rows for name, rows in measured.items() if rows}
    figure = Figure(figsize=(3.6 * len(measured), 3.2), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured.items(), strict=True):
        style, color = ("-", BLUE) if name == "loss" else ("o-", ORANGE)
        axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], style, color=color)
        axes.set(xlabel="epoch", title=panels[name])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    with open_atomically(path) as file:
        figure.savefig(file, dpi=120)


def plot_confusion_matrix(result: Evaluation, class_names: Sequence[str], path: Path) -> None:
    """Rows are true classes, columns predictions; the counts are written out for up to 20 classes.

    Of more than 1,000 classes, neighbours are counted as one: the picture would have no room for all.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    size = -(-len(class_names) // 1000)
    groups = range(-(-len(class_names) // size))
    matrix = confusion_matrix(result.labels // size, result.predictions // size, labels=groups)
    few = len(class_names) <= 20
    side = min(12, 3 + 0.4 * len(class_names))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(matrix, display_labels=[drawn(name) for name in class_names] if few else None)
    rotation = 45 if few and max(map(len, class_names)) > 3 else "horizontal"
    display.plot(ax=axes, include_values=few, cmap="Blues", xticks_rotation=rotation)
    if not few:
        axes.xaxis.set_major_locator(MaxNLocator(20, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(20, integer=True))
    counted = f", {size} classes per row" if size > 1 else ""
    axes.set_title(f"{result.accuracy:.1%} of {len(result.labels)} images right{counted}")
    with open_atomically(path) as file:
        figure.savefig(file, dpi=150)


def plot_mistakes(
    result: Evaluation, images: LabelledImages, class_names: Sequence[str], path: Path, bands: Bands | None = None
) -> None:
    """Pictures: the wrong answers that were given with most confidence, and the right ones with least.

    Of images that are no RGB photographs they show the three `bands` that are meant for it.
    """
    from matplotlib.figure import Figure

    columns, wrong, shrink = 6, result.predictions != result.labels, View(ShrinkTo(256))
    ranked = result.confidences.argsort(descending=True, stable=True)
    shown = {
        "Wrong, most confident first": ranked[wrong[ranked]][: 2 * columns],
        "Right, least confident first": ranked[~wrong[ranked]].flip(0)[:columns],
    }
    rows = [max(1, -(-len(chosen) // columns)) for chosen in shown.values()]
    figure = Figure(figsize=(1.7 * columns, 2.2 * sum(rows)), layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=rows)
    for part, (title, chosen), height in zip(parts, shown.items(), rows, strict=True):
        part.suptitle(title if len(chosen) else f"{title}: none")
        axes = part.subplots(height, columns, squeeze=False).ravel()
        for place in axes:
            place.axis("off")
        for i, place in zip(chosen.tolist(), axes, strict=False):
            said, true = (class_names[labels[i]] for labels in (result.predictions, result.labels))
            told = true if said == true else f"{true}, taken for {said}"
            shrunk = shrink(images.undecoded(i)[0])
            place.imshow(bands.picture(shrunk) if torch.is_tensor(shrunk) else shrunk)
            place.set_title(drawn("\n".join([*textwrap.wrap(told, 18), f"{result.confidences[i]:.0%}"])), fontsize=8)
    with open_atomically(path) as file:
        figure.savefig(file, dpi=120)


def accuracy_per_class(result: Evaluation, class_names: Sequence[str]) -> dict[str, float | None]:
    """The share of each class's images that are right; None for a class without any (NaN would not be JSON)."""
    hits = [(result.predictions[result.labels == i] == i).float() for i in range(len(class_names))]
    return dict(zip(class_names, [hit.mean().item() if len(hit) else None for hit in hits], strict=True))


def against_the_probe(results: dict[str, Any]) -> str:
    """What to try where a run hardly moved from the linear probe that it began with; else nothing."""
    probe, (low, high) = results["probe_accuracy_before"], results["val_accuracy_interval"]
    if probe is None:
        return ""
    if probe > high:
        return "below the linear probe that it began with: try --learning-rate auto"
    if results["learning_rate"] < LOW_RATE and probe >= low:
        return "no better than the linear probe, as far as these images tell: try a higher --learning-rate"
    return ""


def summary(results: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """The table printed at the end of a fine-tuning run: (name, value) of each row."""
    probe, told = results["probe_accuracy_before"], against_the_probe(results)
    trained, total = results["trainable_parameters"], results["total_parameters"]
    share, start = results["kept_share"], "start" if probe is None else "probe"
    kept = f"{share:.0%} of the way from the {start} to the trained model (--wise-ft 1: all)"
    whole = "" if results["device"].startswith("cuda") else ", the whole process"  # with Python and PyTorch
    memory = results["peak_memory_bytes"]
    memory = f"{memory / 1e6:,.0f} MB ({results['device']}{whole})" if memory else "not known on this system"
    notes = [told] if told else []
    if results["config"]["finetune"]["keep_best"]:
        notes.append(f"chosen on these images: epoch {results['kept_epoch']} of {results['epochs']}")
    sizes = f"{results['adapter_bytes'] / 1e6:.2f} MB (backbone {results['backbone_bytes'] / 1e6:.1f} MB)"
    return [
        ("k-NN accuracy before", f"{results['knn_accuracy_before']:.2%}"),
        *([("linear probe before", f"{probe:.2%}")] if probe is not None else []),
        ("accuracy after", right_of(results["val_accuracy"], results["val_images"])),
        *(("", note) for note in notes),
        ("balanced over classes", f"{results['balanced_accuracy']:.2%}, macro F1 {results['macro_f1']:.2%}"),
        ("trained parameters", f"{trained:,} of {total:,} ({trained / total:.2%})"),
        *([("saved weights", kept)] if share < 1 else []),
        ("adapter file", sizes),
        ("training time", duration(results["seconds"])),
        ("peak memory", memory),
        ("results in", f"{folder}/: lora.pth, last.pth, metrics.csv, results.json, config.yaml,"),
        ("", "training_curves.png, confusion_matrix.png, mistakes.png; report.html shows them all"),
        ("merge it", f"python deploy_lora.py merge {shlex.quote(str(folder / 'lora.pth'))} --output merged.pth"),
    ]
