"""Measure what fine-tuning keeps: linear probe, LoRA, QLoRA, full fine-tuning and from scratch, over seeds and labels.

    python -m benchmarks.quality                                            # shipped backbone, embedded digits; hours
    python -m benchmarks.quality --seeds 2 --labels 10 --methods probe lora_8 full
    python -m benchmarks.quality --data-dir my_images --checkpoint moco_v2_800ep_pretrain.pth.tar --config my.yaml
    python -m benchmarks.quality --jobs 2                                   # two runs at a time, a thread each
    python -m benchmarks.quality --rates --methods probe lora_8 full peft   # accuracy over the learning rates
    python -m benchmarks.quality --defaults --labels 5 25 50 all            # what README says may be expected

Every number comes from `finetune_lora.main`, so from the command line that a user has. For each method and number of
labels the learning rate is chosen first, on a validation part of the training split and with a seed that is not used
again: from where a method's search begins it goes on until the best rate has a worse one on either side. Then each seed
is trained with that rate and evaluated on the held-out split after the last epoch: no epoch is picked by its held-out
accuracy. Every finished run is a line in `runs.jsonl`; the same command goes on where it stopped.

With `--rates` nothing is chosen: each method is trained at every rate from 1e-5 to 1e-2 and evaluated on the held-out
split. That shows how wide the range is in which it works, and what somebody gets who types another rate than the best.

With `--defaults` nothing is chosen either: each seed draws other labels, and a run has no options but those passed on.
Its linear probe is compared with what it ends at, on the same held-out images for all numbers of labels.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import finetune_lora
from benchmarks import MEASURED
from lora.adapted import choose_layers
from toolkit import InputError, homed
from toolkit.config import positive_int
from toolkit.models.backbones import head_name
from toolkit.run.guard import Collapsed
from toolkit.run.runs import run_script

PROBE = ["--lora-rank", "0"]
FULL = ["--lora-rank", "0", "--no-freeze-backbone"]
DEFAULT = "default"  # the method of --defaults
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
SWEPT = RATES[:7]  # with --rates


def adapters(r: int) -> list[str]:
    """With alpha / r = 2 at every rank, so that the ranks differ in their size alone."""
    return ["--lora-rank", str(r), "--lora-alpha", str(2 * r)]


# title, flags, the learning rate where the search begins
METHODS = {
    "probe": ("linear probe", PROBE, 1e-3),  # trains on from the probe that every run begins with
    **{f"lora_{r}": (f"LoRA r={r}", adapters(r), 1e-4) for r in (4, 8, 16, 32)},
    **{f"qlora_{r}": (f"QLoRA r={r}", ["--use-qlora", *adapters(r)], 1e-4) for r in (4, 8, 16)},
    "lora_8_random": ("LoRA r=8, random start", [*adapters(8), "--lora-init", "random"], 3e-3),
    "lora_8_norms": ("LoRA r=8, norms", [*adapters(8), "--norms", "train"], 1e-4),
    "lora_8_frozen": ("LoRA r=8, norms frozen", [*adapters(8), "--norms", "frozen"], 1e-4),
    "full": ("full fine-tuning", FULL, 3e-4),
    "scratch": ("from scratch", [*FULL, "--checkpoint", "none", "--arch", "vit_mini"], 1e-3),
    "peft": ("PEFT r=8", [*adapters(8), "--head-init", "random"], 3e-3),  # see `_peft_layers`
    DEFAULT: ("the default", [], None),  # at the rate that a run has where none is given
}
TUNING_SEED = 1000


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what is missing of the table or of the sweep, then print it and write it as json and as a picture."""
    args, passed_on = parse(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    log = Log(args.output_dir / "runs.jsonl", passed_on)
    budgets = [None if labels == "all" else int(labels) for labels in args.labels]
    cells = [(method, budget) for budget in budgets for method in args.methods]
    measure, draw, write = WAYS[args.way]
    rows = measure(cells, log, args)
    result = {"options": passed_on, "torch": torch.__version__, "rows": rows}
    (args.output_dir / f"{args.way}.json").write_text(json.dumps(result, indent=2))
    draw(rows, args.output_dir / f"{args.way}.png")
    print(write(rows))
    return result


def compare(cells: list[tuple[str, int | None]], log: "Log", args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each method with its best rate: a row for each cell, a method and a number of labels per class."""
    # Until the best rate of every method has a worse one on either side, so that none is held back by its grid.
    while runs := [run for cell in cells for run in log.rates_to_try(*cell)]:
        run_missing(runs, log, args.jobs)
    rates = {cell: log.best_rate(*cell) for cell in cells}
    final = [(m, b, rates[m, b], seed, "held-out") for m, b in cells for seed in range(args.seeds)]
    run_missing(final, log, args.jobs)

    rows = [log.row(method, budget, rates[method, budget], args.seeds) for method, budget in cells]
    add_shares(rows)
    return rows


def sweep(cells: list[tuple[str, int | None]], log: "Log", args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each method at every rate: a row for each cell and rate."""
    points = [(*cell, rate) for cell in cells for rate in SWEPT]
    run_missing([(*point, seed, "held-out") for point in points for seed in range(args.seeds)], log, args.jobs)
    return [log.row(*point, args.seeds) for point in points]


def expected(cells: list[tuple[str, int | None]], log: "Log", args: argparse.Namespace) -> list[dict[str, Any]]:
    """The default at each number of labels: a row for each."""
    points = [(DEFAULT, budget, None) for budget in dict.fromkeys(budget for _, budget in cells)]
    run_missing([(*point, seed, "held-out") for point in points for seed in range(args.seeds)], log, args.jobs)
    return [log.row(*point, args.seeds) for point in points]


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This script's options, and those that go on to `finetune_lora.py` as they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    chosen = [method for method in METHODS if method != DEFAULT]
    parser.add_argument("--methods", nargs="+", choices=chosen, default=chosen)
    parser.add_argument("--labels", nargs="+", default=["10", "50", "all"], help="labels per class")
    parser.add_argument("--seeds", type=positive_int, default=5)
    ways = parser.add_mutually_exclusive_group()
    one = {"action": "store_const", "dest": "way", "default": "quality"}
    ways.add_argument("--rates", const="rates", help="every method at every learning rate, none chosen", **one)
    ways.add_argument("--defaults", const="defaults", help="runs without any option of training", **one)
    parser.add_argument("--jobs", type=positive_int, default=1, help="runs at a time")
    parser.add_argument("--output-dir", type=homed, default=MEASURED / "quality")
    args, passed_on = parser.parse_known_args(argv)
    wrong = [labels for labels in args.labels if labels != "all" and not (labels.isdigit() and int(labels) > 0)]
    if wrong:
        raise InputError(f"--labels {wrong[0]}: expected a number above 0, or all")
    finetune_lora.read_options(passed_on)  # what is wrong with them shows now, not in an hour
    return args, passed_on


# --------------------------------------------------------------------------------------------------------------- runs

Run = tuple[str, int | None, float | None, int, str]  # method, labels per class, learning rate, seed, split


class Log:
    """The finished runs, a JSON object a line."""

    def __init__(self, path: Path, options: list[str]):
        self.path, self.options = path, options
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a line that was being written when everything stopped has no end
        if whole != text:
            path.write_text(whole)
        runs = [json.loads(line) for line in whole.splitlines()]
        # A method may have had other flags when it ran.
        self.runs = [run for run in runs if run["flags"] == METHODS[run["run"][0]][1]]
        other = [run for run in self.runs if run["options"] != options]
        if other:
            raise InputError(f"{path} has runs with other options ({other[0]['options']}): give another --output-dir")

    def add(self, record: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({**record, "options": self.options}) + "\n")
        self.runs.append(record)

    def find(self, run: Run) -> dict[str, Any] | None:
        return next((record for record in self.runs if tuple(record["run"]) == run), None)

    def tuning_run(self, method: str, budget: int | None, rate: float) -> Run:
        return method, budget, rate, TUNING_SEED, "validation"

    def best_rate(self, method: str, budget: int | None) -> float:
        tried = [(self.find(self.tuning_run(method, budget, rate)), rate) for rate in RATES]
        # Accuracies tie on a few hundred images; the loss then decides.
        return max((r["accuracy"], -r["loss"], rate) for r, rate in tried if r)[2]

    def rates_to_try(self, method: str, budget: int | None) -> list[Run]:
        """The neighbours of the best rate so far that have not been tried; empty when the search is over."""
        start = METHODS[method][2]
        found = self.find(self.tuning_run(method, budget, start))
        best = RATES.index(self.best_rate(method, budget) if found else start)
        runs = [self.tuning_run(method, budget, rate) for rate in RATES[max(0, best - 1) : best + 2]]
        return [run for run in runs if self.find(run) is None]

    def row(self, method: str, budget: int | None, rate: float | None, seeds: int) -> dict[str, Any]:
        records = [self.find((method, budget, rate, seed, "held-out")) for seed in range(seeds)]
        accuracies = [record["accuracy"] for record in records]
        first = records[0]
        return {
            "method": method,
            "title": METHODS[method][0],
            "labels_per_class": budget,
            "learning_rate": rate,
            "accuracies": accuracies,
            "mean": statistics.mean(accuracies),
            "spread": statistics.stdev(accuracies) if seeds > 1 else 0.0,
            "above_probe": [record["accuracy"] - record["probe"] for record in records if record["probe"] is not None],
            "retreats": sum(record["retreats"] for record in records),  # how often a rate was lowered
            **{key: statistics.median(record[key] for record in records) for key in ("seconds", "cpu_seconds")},
            **{key: first[key] for key in ("trainable_share", "peak_memory_bytes", "adapter_bytes")},
        }


def run_missing(runs: list[Run], log: Log, at_a_time: int) -> None:
    jobs = [(run, log.options, max(1, torch.get_num_threads() // at_a_time)) for run in runs if log.find(run) is None]
    with ThreadPool(at_a_time) as threads:
        for record in tqdm(threads.imap_unordered(apart, jobs), total=len(jobs), desc="runs", disable=not jobs):
            log.add(record)


def apart(job: tuple[Run, list[str], int]) -> dict[str, Any]:
    """`train` in a process for this run alone: its peak memory is then its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(train, job, theirs), daemon=True)
    process.start()
    theirs.close()  # else its end would not be seen
    try:
        result = ours.recv()
    except EOFError:
        method, budget, rate, seed, _ = job[0]
        raise InputError(
            f"the run {method}, {budget or 'all'} labels, learning rate {rate}, seed {seed} was killed, perhaps for "
            "want of memory: fewer --jobs need less; the same command goes on where it stopped"
        ) from None
    finally:
        process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _send_result(function: Callable, argument: Any, pipe: Connection) -> None:
    try:
        pipe.send(function(argument))
    except Exception as error:
        pipe.send(error)


def train(job: tuple[Run, list[str], int]) -> dict[str, Any]:
    """One run of `finetune_lora.py`: its accuracy after the last epoch, and its costs."""
    (method, budget, rate, seed, split), options, threads = job
    torch.set_num_threads(threads)
    layers = _peft_layers() if method == "peft" else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, quiet(), layers:
        flags = [*options, *METHODS[method][1], "--seed", str(seed)]
        flags += [] if rate is None else ["--learning-rate", str(rate)]
        flags += ["--eval-split", split, "--output-dir", folder, "--workers", "0"]  # a daemon may start no process
        flags += [] if budget is None else ["--labels-per-class", str(budget)]
        started = time.process_time()
        try:
            results = finetune_lora.main(flags)
        except Collapsed as stopped:  # at every rate that it went down to: what it leaves is the last good adapter
            results = stopped.results
        cpu_seconds = time.process_time() - started
    return {
        "run": job[0],
        "flags": METHODS[method][1],
        "accuracy": results["val_accuracy"],
        "loss": results["val_loss"],
        "probe": results["probe_accuracy_before"],
        "retreats": len(results["retreats"]),
        "seconds": results["seconds"],
        "cpu_seconds": cpu_seconds,
        "trainable_share": results["trainable_parameters"] / results["total_parameters"],
        "peak_memory_bytes": results["peak_memory_bytes"],
        "adapter_bytes": results["adapter_bytes"],
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _peft_layers() -> Iterator[None]:
    """Within the block `finetune_lora.py` trains PEFT's layers in place of its own, and its head, as PEFT's users do.

    PEFT leaves BatchNorm in training mode.
    """
    import peft

    def add(model, r: int, lora_alpha: float, **_):
        config = peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=list(choose_layers(model)))
        return peft.inject_adapter_in_model(config, model)

    def freeze(model, **_):
        getattr(model, head_name(model)).requires_grad_(True)  # PEFT has frozen all but its own

    ours = finetune_lora.add_lora_to_model, finetune_lora.freeze_backbone_params
    finetune_lora.add_lora_to_model, finetune_lora.freeze_backbone_params = add, freeze
    try:
        yield
    finally:
        finetune_lora.add_lora_to_model, finetune_lora.freeze_backbone_params = ours


# ------------------------------------------------------------------------------------------------------------- report


def add_shares(rows: list[dict[str, Any]]) -> None:
    """Each method's share of full fine-tuning's mean accuracy with as many labels."""
    full = {row["labels_per_class"]: row["mean"] for row in rows if row["method"] == "full"}
    for row in rows:
        reference = full.get(row["labels_per_class"])
        row["share_of_full"] = row["mean"] / reference if reference else None


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| labels per class | method | accuracy | over its start | of full | learning rate | trained | file | memory | "
        "time | CPU |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = "-" if row["share_of_full"] is None else f"{row['share_of_full']:.1%}"
        cells = [
            str(row["labels_per_class"] or "all"),
            row["title"],
            f"{row['mean']:.2%} ± {row['spread']:.2%}",
            f"{100 * statistics.mean(above):+.1f}" if (above := row["above_probe"]) else "",  # points
            share,
            f"{row['learning_rate']:g}",
            f"{row['trainable_share']:.2%}",
            f"{row['adapter_bytes'] / 1e6:.2f} MB",
            f"{row['peak_memory_bytes'] / 1e6:,.0f} MB",
            f"{row['seconds']:.0f} s",
            f"{row['cpu_seconds']:.0f} s",  # of the whole run; what a busy machine does not change
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_rates(rows: list[dict[str, Any]]) -> str:
    """A row for each method and number of labels, a column for each rate, and the probe that the runs began with."""
    lines = [
        f"| labels per class | method | {' | '.join(f'{r:g}' for r in SWEPT)} | least over probe | rates lowered |",
        "|---" * (len(SWEPT) + 4) + "|",
    ]
    for start in range(0, len(rows), len(SWEPT)):
        mine = rows[start : start + len(SWEPT)]
        lowest = [min(row["above_probe"]) for row in mine if row["above_probe"]]
        cells = [str(mine[0]["labels_per_class"] or "all"), mine[0]["title"]]
        cells += [f"{row['mean']:.1%}" for row in mine]
        cells += [f"{100 * min(lowest):+.1f}" if lowest else "", str(sum(row["retreats"] for row in mine) or "")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_defaults(rows: list[dict[str, Any]]) -> str:
    """A row for each number of labels: linear probe, end of the run, and what it gained with its standard error."""
    lines = ["| labels per class | linear probe | after the run | gained, points | CPU |", "|---" * 5 + "|"]
    for row in rows:
        gains = [100 * gain for gain in row["above_probe"]]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        gained = statistics.mean(gains)
        probe = row["mean"] - gained / 100
        cells = [str(row["labels_per_class"] or "all"), f"{probe:.1%}", f"{row['mean']:.1%}"]
        cells += [f"{gained:+.1f} ± {error:.1f}", f"{row['cpu_seconds']:.0f} s"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")  # Okabe and Ito
MARKERS = "osD^v"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy of every method, mean and standard deviation over seeds, a colour and a marker per number of labels."""
    methods = list(dict.fromkeys(row["title"] for row in rows))
    budgets = list(dict.fromkeys(row["labels_per_class"] for row in rows))
    figure = Figure(figsize=(8, 1.6 + 0.4 * len(methods)), layout="constrained")
    axes = figure.subplots()
    for i, budget in enumerate(budgets):
        mine = [row for row in rows if row["labels_per_class"] == budget]
        axes.errorbar(
            [100 * row["mean"] for row in mine],
            [methods.index(row["title"]) + 0.12 * (i - (len(budgets) - 1) / 2) for row in mine],
            xerr=[100 * row["spread"] for row in mine],
            fmt=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            capsize=3,
            label=f"{budget} labels per class" if budget else "all labels",
        )
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xlabel("held-out accuracy (%), mean and standard deviation over seeds")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(budgets))
    figure.savefig(path, dpi=150)


def plot_rates(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over the learning rate, mean and standard deviation over seeds: a panel per number of labels."""
    budgets = list(dict.fromkeys(row["labels_per_class"] for row in rows))
    figure = Figure(figsize=(1 + 4.5 * len(budgets), 4), layout="constrained")
    for axes, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
        for i, title in enumerate(dict.fromkeys(row["title"] for row in rows)):
            mine = [row for row in rows if row["labels_per_class"] == budget and row["title"] == title]
            axes.errorbar(
                [row["learning_rate"] for row in mine],
                [100 * row["mean"] for row in mine],
                yerr=[100 * row["spread"] for row in mine],
                marker=MARKERS[i % len(MARKERS)],
                color=COLOURS[i % len(COLOURS)],
                capsize=3,
                label=title,
            )
        axes.set(xscale="log", xlabel="learning rate", title=f"{budget} labels per class" if budget else "all labels")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out accuracy (%)")
    figure.axes[0].legend()
    figure.savefig(path, dpi=150)


# How to measure, to draw and to write a table, by --rates, --defaults or neither.
WAYS = {
    "quality": (compare, plot, table),
    "rates": (sweep, plot_rates, table_of_rates),
    "defaults": (expected, plot, table_of_defaults),
}

if __name__ == "__main__":
    # Through the module's own name, so that the processes started for the runs find `train`.
    from benchmarks.quality import main as module_main

    sys.exit(run_script(module_main))
