"""Measure what stage 1 on your own unlabelled images is worth when labels are few.

    python -m benchmarks.domain --checkpoint resnet18.pth --data-dir photos --stage1 "--epochs 20 --batch-size 128"
    python -m benchmarks.domain ... --labels 10 --seeds 2 --rows none adapters          # a part of the table
    python -m benchmarks.domain ... --probes-only                                       # linear probes alone: minutes
    python -m benchmarks.domain ... --finetune "--epochs 20"                            # options of fine-tuning alone

The training images of --data-dir are the domain. Stage 1 sees them without labels, except for their validation part, on
which the k-NN accuracy chooses the learning rate of each row. Then each backbone gets a linear probe on a few labels,
over 20 draws of them, and `benchmarks.quality` fine-tunes it with LoRA, with a learning rate chosen for each, over
--seeds draws. Both are evaluated on the held-out images, by which nothing was chosen. Options that are not this
script's go to both stages. What is finished is kept in --output-dir; the same command goes on where it stopped.
"""

import argparse
import gc
import itertools
import json
import math
import multiprocessing
import os
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import finetune_lora
from benchmarks import MEASURED, quality
from benchmarks.compare_peers import current_commit, forget_peak
from finetune_lora import load_base
from moco import pretrain
from toolkit import InputError, devices, homed
from toolkit.answers import evaluation
from toolkit.answers.probe import fit_linear_probe, head_outputs, set_head
from toolkit.config import positive_int
from toolkit.images.data import Transformed, build_loader
from toolkit.images.sources import load_splits
from toolkit.images.transforms import eval_transform
from toolkit.run import options
from toolkit.run.runs import run_script

ADAPTERS = ["--lora-rank", "8"]
# title, flags of stage 1 (None: no stage 1), the learning rates that it tries
ROWS = {
    "none": ("no adaptation", None, ()),
    "adapters": ("stage 1 continued in adapters", ADAPTERS, ("1e-3", "3e-3", "1e-2")),
    "full": ("stage 1 continued in full", [], ("1e-4", "3e-4")),
    "scratch": ("stage 1 from scratch on the domain", [], ("1e-3",)),
}
DRAWS = 20  # of labels, for linear probes
STEPS, MEMORY_STEPS = 9, 3  # timed side by side; before the peak of memory is read


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what is missing of the table, then print it and write `domain.json`."""
    args, passed_on = parse(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    refuse_others(args.output_dir / "stage1.json", ["--checkpoint", str(args.checkpoint), *passed_on, *args.stage1])
    rows = []
    for name in args.rows:
        stage1 = adapt(name, args, passed_on)
        flags = [*passed_on, *args.finetune, *backbone_flags(name, stage1, args.checkpoint)]
        probed = probes(flags, args.labels)
        tuned = {} if args.probes_only else few_labels(name, flags, args)
        common = {"row": name, "title": ROWS[name][0], "stage1": stage1}
        rows += [{**common, "labels_per_class": n, "probes": probed[n], "lora": tuned.get(n)} for n in args.labels]
    command = shlex.join(["python", "-m", "benchmarks.domain", *(sys.argv[1:] if argv is None else argv)])
    result = {"command": command, "commit": current_commit(), "torch": torch.__version__, "rows": rows}
    if {"adapters", "full"} <= set(args.rows):
        result["costs"] = costs(args, passed_on)
    (args.output_dir / "domain.json").write_text(json.dumps(result, indent=2, default=str))
    print(table(result))
    return result


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This script's options, and those that both stages share."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", type=homed, required=True, help="the backbone of stage 1, on other images")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--stage1", type=shlex.split, default=[], help="options of moco.pretrain")
    parser.add_argument("--finetune", type=shlex.split, default=[], help="options of finetune_lora.py")
    parser.add_argument("--probes-only", action="store_true", help="leave out fine-tuning")
    parser.add_argument("--labels", type=positive_int, nargs="+", default=[5, 10, 50], help="labels per class")
    parser.add_argument("--seeds", type=positive_int, default=5, help="draws of labels")
    parser.add_argument("--output-dir", type=homed, default=MEASURED / "domain")
    args, passed_on = parser.parse_known_args(argv)
    read_stage1(args, passed_on, [])  # what is wrong with the options shows now, not in an hour
    quality.parse([*quality_flags("none", args), *passed_on, *args.finetune, "--checkpoint", str(args.checkpoint)])
    return args, passed_on


# ---------------------------------------------------------------------------------------------------------- stage 1


def refuse_others(path: Path, asked: list[str]) -> None:
    """Note the options of stage 1, whose results are kept. Raises InputError if those that are there had others."""
    if path.exists() and json.loads(path.read_text()) != asked:
        raise InputError(f"{path.parent} has a stage 1 with other options: give another --output-dir")
    path.write_text(json.dumps(asked))


def stage1_flags(args: argparse.Namespace, passed_on: list[str], own: list[str]) -> list[str]:
    return ["--eval-split", "validation", *passed_on, *args.stage1, *own]


def read_stage1(args: argparse.Namespace, passed_on: list[str], own: list[str]) -> pretrain.PretrainOptions:
    flags = stage1_flags(args, passed_on, ["--checkpoint", str(args.checkpoint), *own])
    return pretrain.read_options(flags)[0]


def adapt(name: str, args: argparse.Namespace, passed_on: list[str]) -> dict[str, Any] | None:
    """The results of a row's stage 1 with its best learning rate, by the k-NN accuracy on the validation part."""
    _, own, rates = ROWS[name]
    if own is None:
        return None
    start = ["--checkpoint", str(args.checkpoint)]
    if name == "scratch":  # the same, from random weights
        read = read_stage1(args, passed_on, [])
        _, like, _ = pretrain.build_model(read, torch.device("cpu"))  # with what follows from the checkpoint
        names = ("arch", "image_size", "moco_version", "dim", "mlp_dim")
        start = [f"--{name.replace('_', '-')}={getattr(like, name)}" for name in names]
    tried = []
    for rate in rates:
        folder = args.output_dir / name / rate
        if not (folder / "results.json").exists():
            flags = stage1_flags(args, passed_on, [*start, *own, "--learning-rate", rate, "--output-dir", str(folder)])
            apart(pretrain.main, [*flags, *(["--resume"] if (folder / "last.pth").exists() else [])])
        tried.append(json.loads((folder / "results.json").read_text()))
    return max(tried, key=lambda results: results["knn_accuracy"])


def apart(function: Callable, argument: Any) -> Any:
    """The function's value, from a process for this call alone: its peak memory is then its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, argument).result()


# --------------------------------------------------------------------------------------------------------- few labels


def backbone_flags(name: str, stage1: dict[str, Any] | None, checkpoint: Path) -> list[str]:
    """What `finetune_lora.py` is given for a row's backbone."""
    if name == "adapters":
        return ["--checkpoint", str(checkpoint), "--stage1-adapter", str(stage1["checkpoint"])]
    return ["--checkpoint", str(stage1["checkpoint"] if stage1 else checkpoint)]


def probes(flags: list[str], budgets: list[int]) -> dict[int, list[float]]:
    """The held-out accuracies of linear probes on the frozen features, by labels per class, one for each draw."""
    args, _ = finetune_lora.read_options(flags)
    splits = load_splits(**options.image_sources(args) | {"eval_split": "held-out"})
    shape = {"arch": args.arch, "image_size": args.image_size, "heads": args.heads}
    model, report = load_base(args.checkpoint, args.stage1_adapter, len(splits.class_names), **shape)
    device = devices.select_device(args.device)
    model.to(device)
    images = [Transformed(part, eval_transform(report["image_size"])) for part in splits[:2]]
    loaders = [build_loader(part, args.batch_size, workers=args.workers, device=device) for part in images]
    found = [evaluation.extract_features(model, loader, device) for loader in loaders]
    (features, labels), (others, truth) = found
    accuracies: dict[int, list[float]] = {budget: [] for budget in budgets}
    for budget, seed in itertools.product(budgets, range(DRAWS)):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(device)
        drawn = torch.cat([order[labels[order] == label][:budget] for label in range(len(splits.class_names))])
        set_head(model, fit_linear_probe(features[drawn], labels[drawn], len(splits.class_names)))
        hits = head_outputs(model, others).argmax(1) == truth
        accuracies[budget].append(hits.float().mean().item())
    return accuracies


def few_labels(name: str, flags: list[str], args: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """The rows of `benchmarks.quality` for LoRA over a row's backbone, by labels per class."""
    return {row["labels_per_class"]: row for row in quality.main([*quality_flags(name, args), *flags])["rows"]}


def quality_flags(name: str, args: argparse.Namespace) -> list[str]:
    flags = ["--methods", "lora_8", "--labels", *map(str, args.labels), "--seeds", str(args.seeds)]
    return [*flags, "--output-dir", str(args.output_dir / name / "few")]


# ------------------------------------------------------------------------------------------------------------ costs


def costs(args: argparse.Namespace, passed_on: list[str]) -> dict[str, Any]:
    """What a step of stage 1 takes in adapters and in full: time in turns in a process, memory in a process each."""
    jobs = {name: [*ROWS[name][1], "--learning-rate", ROWS[name][2][0]] for name in ("adapters", "full")}
    both = {name: read_stage1(args, passed_on, own) for name, own in jobs.items()}
    seconds = apart(step_times, both)
    ratios = [full / adapters for full, adapters in zip(seconds["full"], seconds["adapters"], strict=True)]
    # As in compare_peers: with a mapping for each large tensor, the peak has no holes of the allocator's in it.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    memory = {name: apart(peak_of_steps, options) for name, options in both.items()}
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    return {"seconds": seconds, "memory_bytes": memory, "times_faster": statistics.median(ratios)}


class Steps:
    """Steps of stage 1 on random views."""

    def __init__(self, args: argparse.Namespace):
        self.device = devices.select_device(args.device)
        self.dtype = devices.select_precision(args.precision, self.device)
        model, self.args, _ = pretrain.build_model(args, self.device)
        self.model = model.train()
        self.optimizer = pretrain.build_optimizer(self.model, self.args)
        size = (args.batch_size, 3, self.args.image_size, self.args.image_size)
        self.views = [devices.to_device(torch.randn(size), self.device) for _ in range(2)]

    def step(self) -> float:
        """Seconds."""
        started = time.perf_counter()
        with devices.autocast(self.device, self.dtype):
            loss = self.model(*self.views, self.args.momentum)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if not math.isfinite(loss.item()):  # which waits for a GPU, too
            raise InputError(f"the loss of a step on random images is {loss.item()}: lower the learning rate")
        return time.perf_counter() - started


def step_times(both: dict[str, argparse.Namespace]) -> dict[str, list[float]]:
    steps = {name: Steps(args) for name, args in both.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(STEPS + 1):
        for name in random.Random(turn).sample(list(steps), len(steps)):
            gc.collect()  # never inside a step
            taken = steps[name].step()
            if turn > 0:  # the first step is a warm-up
                seconds[name].append(taken)
    return seconds


def peak_of_steps(args: argparse.Namespace) -> int:
    """Peak bytes of this process above its imports."""
    device = devices.select_device(args.device)
    forget_peak(device)
    before = devices.peak_memory_bytes(device)
    steps = Steps(args)
    for _ in range(MEMORY_STEPS):
        steps.step()
    return devices.peak_memory_bytes(device) - before


# ----------------------------------------------------------------------------------------------------------- report


def table(result: dict[str, Any]) -> str:
    lines = [
        "| labels per class | backbone | linear probe | LoRA | k-NN, all labels | learning rate of stage 1 |",
        "|---|---|---|---|---|---|",
    ]
    start = {row["labels_per_class"]: row for row in result["rows"] if row["row"] == "none"}
    before = next((row["stage1"]["before"] for row in result["rows"] if row["row"] in ("adapters", "full")), None)
    for row in sorted(result["rows"], key=lambda row: row["labels_per_class"]):
        of_none = start.get(row["labels_per_class"]) if row["row"] != "none" else None
        tuned, none_tuned = row["lora"], of_none and of_none["lora"]
        stage1 = row["stage1"]
        measured = before if row["row"] == "none" else stage1
        cells = [
            str(row["labels_per_class"]),
            row["title"],
            accuracy(row["probes"], of_none and of_none["probes"]),
            accuracy(tuned["accuracies"], none_tuned and none_tuned["accuracies"]) if tuned else "-",
            f"{measured['knn_accuracy']:.1%}" if measured else "-",
            f"{stage1['config']['learning_rate']:g}" if stage1 else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if "costs" in result:
        memory = result["costs"]["memory_bytes"]
        lines += [
            "",
            f"Stage 1 in adapters is {result['costs']['times_faster']:.2f} times as fast as in full, with "
            f"{memory['adapters'] / 1e6:,.0f} MB in place of {memory['full'] / 1e6:,.0f} MB.",
        ]
    return "\n".join(lines)


def accuracy(own: list[float], start: list[float] | None) -> str:
    """Mean and standard deviation; in brackets the mean gain over no adaptation and its standard error, with the same
    labels drawn for both."""
    text = f"{statistics.mean(own):.1%} ± {statistics.stdev(own) if len(own) > 1 else 0:.1%}"
    if not start:
        return text
    gains = [100 * (a - b) for a, b in zip(own, start, strict=True)]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return f"{text} ({statistics.mean(gains):+.1f} ± {error:.1f} points)"


if __name__ == "__main__":
    # Through the module's own name, so that the processes started for the runs find their functions.
    from benchmarks.domain import main as module_main

    run_script(module_main)
