"""Measure how soon a whole command is how accurate: this toolkit, full fine-tuning in a plain loop, and PEFT in one.

    python -m benchmarks.time_to_accuracy                                    # shipped backbone, embedded digits
    python -m benchmarks.time_to_accuracy --data-dir photographs --checkpoint resnet18_v2.pth --image-size 64
    python -m benchmarks.time_to_accuracy ... --methods default bf16 plain peft --seeds 2
    python -m benchmarks.time_to_accuracy ... --stages          # where the CPU seconds of the default command go

Every run is a command of its own, timed from its start to its finished files, imports included. After each epoch it
notes the seconds since then and the accuracy on the evaluation images. The toolkit's runs have its default rate, as
somebody gets them who types nothing. The plain loops are what people write: a linear head that starts at random, AdamW,
a cosine after a warm-up of one epoch. Their rates are chosen on a validation part of the training images, with a seed
that is not used again. All see the same views of the same images from the same loaders. Methods take turns, seed by
seed, so that a machine that slows down slows all of them down. Options that are not this script's go to all runs.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from benchmarks import MEASURED, finished_runs
from toolkit import homed
from toolkit.config import positive_int

TUNING_SEED = 1000
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # that are tried for the plain loops


class Method(NamedTuple):
    title: str
    flags: list[str]  # of finetune_lora.py
    is_plain: bool = False  # a plain loop, which shares the images and the backbone


METHODS = {
    "default": Method("this toolkit, all by default", []),
    "fp32": Method("the same in float32", ["--precision", "fp32"]),
    "bf16": Method("the same in bf16", ["--precision", "bf16"]),
    "int8": Method("the same, products in 8 bits", ["--arithmetic", "int8"]),
    "last": Method("adapters in the last five blocks", ["--adapt-last", "5"]),  # of EfficientNet-Lite0's seven
    "qlora": Method("QLoRA", ["--use-qlora"]),
    "plain": Method("full fine-tuning, plain loop", ["--precision", "fp32"], is_plain=True),
    "plain_bf16": Method("full fine-tuning, plain loop in bf16", ["--precision", "bf16"], is_plain=True),
    "peft": Method("PEFT r=8, plain loop", ["--precision", "fp32"], is_plain=True),
    "peft_bf16": Method("PEFT r=8, plain loop in bf16", ["--precision", "bf16"], is_plain=True),
}


# ------------------------------------------------------------------------------------------------------------ one run


def run_ours(flags: list[str], note: Callable[[float], None]) -> None:
    """`finetune_lora.py` with these flags."""
    import finetune_lora

    finetune_lora.main(flags, after_epoch=lambda run: note(run.history[-1]["val_accuracy"]))


def run_plain(method: str, flags: list[str], note: Callable[[float], None]) -> None:
    """A plain training loop over the whole backbone, or over PEFT's adapters and the head."""
    import finetune_lora
    from lora.adapted import choose_layers
    from toolkit.images import bands
    from toolkit.images.data import Transformed, build_loader
    from toolkit.images.transforms import eval_transform, train_transform
    from toolkit.models.backbones import head_name
    from toolkit.models.checkpoints import load_backbone
    from toolkit.run.loaders import load_images
    from toolkit.run.options import known_image_values

    args, _ = finetune_lora.read_options(flags)
    torch.manual_seed(args.seed)
    values, read = known_image_values(args, args.checkpoint)
    splits = load_images(args, read)
    model, report = load_backbone(args.checkpoint, len(splits.class_names), args.arch, args.image_size)
    normalization = bands.settle(values, report["arch"], report["channels"], splits.train)
    if method.startswith("peft"):
        import peft

        head = getattr(model, head_name(model))
        # PEFT takes no convolution of more groups than the rank.
        names = [name for name, layer in choose_layers(model).items() if getattr(layer, "groups", 1) == 1]
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=names)
        model = peft.inject_adapter_in_model(config, model)
        head.requires_grad_(True)  # PEFT has frozen all but its own
    views = train_transform(report["image_size"], args.augmentation, **normalization)
    loading = {"batch_size": args.batch_size, "workers": args.workers}
    train = build_loader(Transformed(splits.train, views), shuffle=True, seed=args.seed, **loading)
    val = build_loader(Transformed(splits.val, eval_transform(report["image_size"], **normalization)), **loading)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay)
    warmup = len(train)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, warmup * (args.epochs - 1))),
        ],
        [warmup],
    )
    in_bf16 = torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16")
    for epoch in range(args.epochs):
        train.batch_sampler.epoch = epoch
        model.train()
        for images, labels in train:
            with in_bf16:
                loss = F.cross_entropy(model(images).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        note(accuracy(model, val, in_bf16))
    torch.save(model.state_dict(), args.output_dir / "model.pth")


@torch.no_grad()
def accuracy(model: nn.Module, loader: Any, precision: contextlib.AbstractContextManager) -> float:
    model.eval()
    right = 0
    for images, labels in loader:
        with precision:
            right += (model(images).argmax(1) == labels).sum().item()
    return right / len(loader.dataset)


def run_one(method: str, flags: list[str], started: float, output: Path) -> None:
    """A run in this process, which began at `started`; what it notes is written to `output`."""
    points: list[tuple[float, float]] = []

    def note(score: float) -> None:
        points.append((time.time() - started, score))

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if METHODS[method].is_plain:
            run_plain(method, flags, note)
        else:
            run_ours(flags, note)
    output.write_text(json.dumps(points))


# ------------------------------------------------------------------------------------------- the stages of one command


def stages(options: list[str], output: Path) -> dict[str, Any]:
    """Print where the CPU seconds of the toolkit's command go, and write it as `stages.json`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.stages", str(output / "stages.json"), *options]
        subprocess.run([*command, "--output-dir", folder], check=True, stdout=subprocess.DEVNULL)
    found = json.loads((output / "stages.json").read_text())
    print("| stage | CPU seconds | of the command |\n|---|---|---|")
    for stage, seconds in found["seconds"].items():
        print(f"| {stage} | {seconds:.1f} | {seconds / found['seconds']['whole command']:.0%} |")
    return found


# ----------------------------------------------------------------------------------------------------------- all runs


class Log:
    """The finished runs, a JSON object a line; the same command goes on where it stopped."""

    def __init__(self, path: Path, options: list[str]):
        self.path = path
        self.options = options
        self.runs = finished_runs(path, options)

    def find(self, method: str, rate: float | None, seed: int, split: str) -> dict[str, Any]:
        """The figures of a run, which is made if it has not been yet."""
        about = {"method": method, "rate": rate, "seed": seed, "split": split, "options": self.options}
        for run in self.runs:
            if about.items() <= run.items():
                return run
        with tempfile.TemporaryDirectory() as folder:
            points = Path(folder) / "points.json"
            flags = [*self.options, *METHODS[method].flags, "--seed", str(seed), "--eval-split", split]
            flags += [] if rate is None else ["--learning-rate", str(rate)]
            started = time.time()
            what = json.dumps([method, [*flags, "--output-dir", folder], started, str(points)])
            subprocess.run([sys.executable, "-m", "benchmarks.time_to_accuracy", "--one", what], check=True)
            run = {**about, "points": json.loads(points.read_text()), "seconds": time.time() - started}
        self.runs.append(run)
        with self.path.open("a") as file:
            print(json.dumps(run), file=file)
        print(f"{method} seed {seed} {rate or ''}: {run['points'][-1][1]:.2%}, {run['seconds']:.0f} s", flush=True)
        return run


def best_rate(log: Log, method: str) -> float | None:
    """The rate of a plain loop that is best on a validation part; None: the toolkit's default."""
    if not METHODS[method].is_plain:
        return None
    return max(RATES, key=lambda rate: log.find(method, rate, TUNING_SEED, "validation")["points"][-1][1])


def rows_of(runs: dict[str, list[dict[str, Any]]], rates: dict[str, float | None]) -> Iterator[dict[str, Any]]:
    """A row for each method: its accuracy, its time, and when its mean first reaches that of full fine-tuning."""
    full = next((method for method in runs if method.startswith("plain")), None)
    goal = statistics.mean(run["points"][-1][1] for run in runs[full]) if full else None
    for method, records in runs.items():
        curve = mean_curve(records)
        finals = [run["points"][-1][1] for run in records]
        yield {
            "method": method,
            "title": METHODS[method].title,
            "rate": rates[method],
            "accuracy": statistics.mean(finals),
            "spread": statistics.stdev(finals) if len(finals) > 1 else 0.0,
            "seconds": statistics.mean(run["seconds"] for run in records),
            "outside_epochs": statistics.mean(outside_epochs(run) for run in records),
            "reached_full_after": next((seconds for seconds, score in curve if goal and score >= goal), None),
            "curve": curve,
        }


def mean_curve(records: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Mean seconds and mean accuracy over the seeds after each epoch."""
    epochs = zip(*(run["points"] for run in records), strict=True)
    return [tuple(statistics.mean(values) for values in zip(*points, strict=True)) for points in epochs]


def outside_epochs(run: dict[str, Any]) -> float:
    """The seconds of a run that are not its epochs; an epoch is what lies between two notes."""
    seconds = [seconds for seconds, _ in run["points"]]
    an_epoch = (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1)
    return run["seconds"] - an_epoch * len(seconds)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | rate | accuracy | whole command | outside epochs | as good as full fine-tuning after |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        reached = "" if row["reached_full_after"] is None else f"{row['reached_full_after']:.0f} s"
        cells = [
            row["title"],
            "default" if row["rate"] is None else f"{row['rate']:g}",
            f"{row['accuracy']:.1%} ± {row['spread']:.1%}",
            f"{row['seconds']:.0f} s",
            f"{row['outside_epochs']:.0f} s",
            reached,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over the seconds since the command was typed; a cross where its files were finished."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(rows):
        seconds, scores = zip(*row["curve"], strict=True)
        style = "--" if METHODS[row["method"]].is_plain else "-"
        scores = [100 * score for score in scores]
        (line,) = axes.plot(seconds, scores, style, marker="osD^v<>ph*"[number], markersize=4, label=row["title"])
        axes.plot(row["seconds"], scores[-1], "x", color=line.get_color(), markersize=9)
    axes.set(xlabel="seconds since the command was typed (cross: all files are written)", ylabel="accuracy (%)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run what is missing, then print the table, and write it as json and as a picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["default", "plain", "peft"])
    parser.add_argument("--seeds", type=positive_int, default=3)
    parser.add_argument("--output-dir", type=homed, default=MEASURED / "time_to_accuracy")
    parser.add_argument("--stages", action="store_true", help="time the stages of one default command instead")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args, options = parser.parse_known_args(argv)
    if args.one is not None:
        method, flags, started, output = json.loads(args.one)
        run_one(method, flags, started, Path(output))
        return []
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.stages:
        stages(options, args.output_dir)
        return []
    log = Log(args.output_dir / "runs.jsonl", options)
    rates = {method: best_rate(log, method) for method in args.methods}
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in args.methods}
    for seed in range(args.seeds):
        for method in args.methods:
            runs[method].append(log.find(method, rates[method], seed, "held-out"))
    rows = list(rows_of(runs, rates))
    (args.output_dir / "time_to_accuracy.json").write_text(json.dumps(rows, indent=2))
    plot(rows, args.output_dir / "time_to_accuracy.png")
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
