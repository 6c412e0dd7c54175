"""Measure transfer as others do: VTAB-1k (arXiv 1910.04867), 19 data sets of 1,000 training images each.

    python -m benchmarks.vtab --root vtab-1k --checkpoint linear-vit-b-300ep.pth.tar                # days on a GPU
    python -m benchmarks.vtab --root vtab-1k --checkpoint ... --methods lora_8 --data cifar dtd     # a part of it
    python -m benchmarks.vtab --root vtab-1k --checkpoint ... --epochs 50 --precision bf16          # other options

--root has a folder for each data set, with the lists `train800.txt`, `val200.txt`, `train800val200.txt` and `test.txt`
(`images/test/0.jpg 7`) and their images, as the processed VTAB-1k that NOAH and others share. The published figures
start from linear-vit-b-300ep.pth.tar, MoCo v3's own.

For each method and data set the learning rate is chosen first: trained on 800 images, judged on 200, going on until the
best rate has a worse one on either side. Then the method trains on all 1,000 with that rate, and `deploy_lora.py
evaluate` measures it on the test images, once. Training never reads those. Images are resized to a square, whole and
without augmentation, and normalised as the backbone's were. Every finished run is a line in `runs.jsonl`; the same
command goes on where it stopped. Options that are not this script's go to `finetune_lora.py`.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import deploy_lora
import finetune_lora
from benchmarks import MEASURED
from benchmarks.quality import METHODS, Log, Run, quiet
from toolkit import InputError, listed
from toolkit.images import transforms
from toolkit.images.lists import read_list
from toolkit.run.guard import Collapsed
from toolkit.run.runs import run_script

GROUPS = {
    "natural": ("cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397"),
    "specialized": ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"),
    "structured": (
        *("clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc", "dsprites_ori"),
        *("smallnorb_azi", "smallnorb_ele"),
    ),
}
DATA_SETS = tuple(name for names in GROUPS.values() for name in names)
LISTS = ("train800.txt", "val200.txt", "train800val200.txt", "test.txt")
OWN_METHODS = ("probe", "lora_8", "qlora_8", "full")
DEFAULTS = ("--augmentation", "none", "--epochs", "100", "--batch-size", "64")
# Mean of the three groups in per cent, MoCo v3 ViT-B: SNELL (NeurIPS 2024), table 2.
PUBLISHED = {"full fine-tuning": 69.6, "linear": 59.6, "bias": 69.2, "LoRA-8": 44.3, "SPT-LoRA": 75.3}
SEED = 0


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what is missing, then print the tables and write them as `vtab.json`."""
    args, passed_on = parse(argv)
    found = [name for name in args.data if all((args.root / name / file).is_file() for file in LISTS)]
    if not found:
        raise InputError(f"--root {args.root}: none of {listed(args.data)} has {', '.join(LISTS)}")
    missing = [name for name in args.data if name not in found]
    if missing:
        print(f"not in {args.root}, or without one of its lists: {listed(missing, len(missing))}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    log = Log(args.output_dir / "runs.jsonl", passed_on)
    cells = [(method, name) for name in found for method in args.methods]
    with whole_images(), tqdm(cells, desc="data sets and methods") as bar:
        for method, name in bar:
            bar.set_postfix_str(f"{name}, {METHODS[method][0]}")
            measure(method, name, log, args)
    rows = [row(method, log, found) for method in args.methods]
    result = {"options": passed_on, "missing": sorted(set(DATA_SETS) - set(found)), "rows": rows}
    result["published"] = PUBLISHED
    (args.output_dir / "vtab.json").write_text(json.dumps(result, indent=2))
    print(f"{table(rows, found)}\n\n{table_of_data_sets(rows, found)}")
    return result


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This script's options, and those that go on to `finetune_lora.py`, after DEFAULTS."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--root", type=Path, required=True, help="folder with a folder for each data set")
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(OWN_METHODS), metavar="METHOD")
    parser.add_argument("--output-dir", type=Path, default=MEASURED / "vtab")
    args, passed_on = parser.parse_known_args(argv)
    passed_on = [*DEFAULTS, *passed_on]
    args.device = finetune_lora.read_options([*passed_on, "--data-list", LISTS[0]])[0].device  # problems show now
    return args, passed_on


@contextlib.contextmanager
def whole_images() -> Iterator[None]:
    """Within the block evaluation images, and training images without augmentation, are not cut to their middle.

    What KITTI and dSprites ask for may stand at the border.
    """
    before, transforms.SEEN_WHOLE = transforms.SEEN_WHOLE, sys.maxsize
    try:
        yield
    finally:
        transforms.SEEN_WHOLE = before


# --------------------------------------------------------------------------------------------------------------- runs


def measure(method: str, name: str, log: Log, args: argparse.Namespace) -> None:
    """Choose the rate and measure on the test images, as far as the log does not have it yet."""
    while runs := log.rates_to_try(method, name):
        for run in runs:
            log.add(train(run, log.options, args))
    final = method, name, log.best_rate(method, name), SEED, "test"
    if log.find(final) is None:
        log.add(train(final, log.options, args))


def train(run: Run, options: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """A run of `finetune_lora.py`, and of `deploy_lora.py evaluate` on the test images: what the log keeps of it.

    Images of classes that no training image has are not asked for; they count as wrong.
    """
    method, name, rate, seed, split = run
    folder = args.root / name
    training, judged = ("train800.txt", "val200.txt") if split == "validation" else ("train800val200.txt", "test.txt")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, quiet():
        scratch = Path(scratch)
        known = set(read_list(folder / training, folder)[1])
        asked, images = write_known(folder / judged, known, scratch / judged)
        write_known(folder / "val200.txt", known, scratch / "val200.txt")  # what the 1,000 contain: nothing is held out
        flags = [*options, *METHODS[method][1], "--learning-rate", str(rate), "--seed", str(seed)]
        flags += ["--data-dir", str(folder), "--data-list", str(folder / training), str(scratch / "val200.txt")]
        try:
            results = finetune_lora.main([*flags, "--output-dir", str(scratch / "run")])
        except Collapsed as stopped:  # at every rate that it went down to: what it leaves is the last good adapter
            results = stopped.results
        measured = {"accuracy": results["val_accuracy"], "loss": results["val_loss"]}
        if split == "test":
            command = ["evaluate", str(scratch / "run/lora.pth"), str(scratch / judged), "--device", args.device]
            measured = deploy_lora.main(command)
    return {
        "run": run,
        "flags": METHODS[method][1],
        "accuracy": measured["accuracy"] * asked / images,
        "loss": measured["loss"],
        "images": images,
        "probe": results["probe_accuracy_before"],
        "seconds": time.perf_counter() - started,
    }


def write_known(path: Path, known: Collection[str], to: Path) -> tuple[int, int]:
    """Write the lines of a list whose labels are known, with absolute paths; returns how many are, and all."""
    paths, labels = read_list(path, path.parent)
    folder, rows = path.parent.absolute(), zip(paths, labels, strict=True)
    lines = [f"{folder / image}\t{label}\n" for image, label in rows if label in known]
    to.write_text("".join(lines))
    return len(lines), len(paths)


# ------------------------------------------------------------------------------------------------------------- report


def row(method: str, log: Log, found: Sequence[str]) -> dict[str, Any]:
    """The test accuracy of a method on each data set, and the means over those that were found, in per cent."""
    accuracy = {}
    for name in found:
        record = log.find((method, name, log.best_rate(method, name), SEED, "test"))
        accuracy[name] = 100 * record["accuracy"]
    groups = {}
    for group, names in GROUPS.items():
        values = [accuracy[name] for name in names if name in accuracy]
        if values:
            groups[group] = statistics.mean(values)
    return {
        "method": method,
        "title": METHODS[method][0],
        "accuracy": accuracy,
        "learning_rates": {name: log.best_rate(method, name) for name in found},
        "groups": groups,
        "mean_of_groups": statistics.mean(groups.values()),
        "mean": statistics.mean(accuracy.values()),
    }


def table(rows: Sequence[dict[str, Any]], found: Collection[str]) -> str:
    """The means of each method, and of what was published. Where data sets are missing, the title says how many."""

    def title(group: str, names: Sequence[str]) -> str:
        there = len(set(names) & set(found))
        return group if there == len(names) else f"{group} ({there} of {len(names)})"

    complete = len(found) == len(DATA_SETS)
    titles = ["method", "mean of groups" if complete else "mean of groups (incomplete)", title("mean", DATA_SETS)]
    titles += [title(group, names) for group, names in GROUPS.items()]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        groups = [f"{row['groups'][group]:.1f}" if group in row["groups"] else "-" for group in GROUPS]
        means = [f"{row[mean]:.1f}" for mean in ("mean_of_groups", "mean")]
        lines.append(f"| {' | '.join([row['title'], *means, *groups])} |")
    lines += [f"| published: {name} | {mean:.1f} |  |  |  |  |" for name, mean in PUBLISHED.items()]
    return "\n".join(lines)


def table_of_data_sets(rows: Sequence[dict[str, Any]], found: Sequence[str]) -> str:
    """A row for each data set, a column for each method, with the learning rate that was chosen."""
    lines = [f"| data set | {' | '.join(row['title'] for row in rows)} |", "|---" * (len(rows) + 1) + "|"]
    for name in found:
        cells = [f"{row['accuracy'][name]:.1f} ({row['learning_rates'][name]:g})" for row in rows]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
