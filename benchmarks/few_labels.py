"""Measure where a classifier head starts with few labels a class: the linear probe, and what unlabelled images add.

    python -m benchmarks.few_labels --data-dir photos/train --val-dir photos/validation \\
        --checkpoint timm:tf_efficientnet_lite0.in1k --image-size 96
    python -m benchmarks.few_labels                                          # shipped backbone, embedded digits
    python -m benchmarks.few_labels ... --labels 5 10 --draws 3 --rows before probe
    python -m benchmarks.few_labels ... --pool 5000 --held-out 2000          # of a large set
    python -m benchmarks.few_labels ... --rows before trained --train "--epochs 10"

The training images of --data-dir are the pool. Each draw takes so many of each class with their labels, and the rest
without. The held-out images judge, and choose nothing. Rows: the probe as it was until November 2026 (features divided
by their deviations, decades of C), the probe of today, the same with one augmented view of each image, the start that
`toolkit.answers.unlabelled` finds, and, if asked for, whole runs of `finetune_lora.py` on the same labels. Features and
finished measurements are kept in --output-dir; the same command goes on where it stopped. Options that are not this
script's go to `finetune_lora.py`.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import finetune_lora
from benchmarks import MEASURED, compare_peers, finished_runs
from toolkit import InputError, homed
from toolkit.answers import tasks, unlabelled
from toolkit.answers.probe import Probe, fit_linear_probe
from toolkit.config import positive_int
from toolkit.images.data import LoadingMeter
from toolkit.images.splitting import some_of_each
from toolkit.run.loaders import MOST_VIEWS, Loaders, probed_views
from toolkit.run.runs import run_script

TITLES = {
    "before": "probe before",
    "one_view": "probe of one augmented view",
    "probe": "probe",
    "unlabelled": "start with unlabelled images",
    "trained": "after training",
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure what is missing of the table, then print it and write it."""
    args, passed_on = parse(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    features = cached_features(args, passed_on)
    path = args.output_dir / "runs.jsonl"
    wanted = list(itertools.product(args.labels, range(args.draws), args.rows))
    asked = [*passed_on, *args.train]
    done = {key_of(run): run for run in finished_runs(path, asked)}
    made_with = {"options": asked, "commit": compare_peers.current_commit(), "torch": torch.__version__}
    made_with["machine"] = compare_peers.describe_machine(argparse.Namespace(device=torch.device("cpu")))["device"]
    for labels, draw, row in wanted:
        if (labels, draw, row) in done:
            continue
        started = (time.perf_counter(), time.process_time())
        measured = ROWS[row](features, drawn(features, labels, draw), labels, draw, args, passed_on)
        taken = {"seconds": time.perf_counter() - started[0], "cpu_seconds": time.process_time() - started[1]}
        run = {"labels": labels, "draw": draw, "row": row, **measured, **taken, **made_with}
        done[labels, draw, row] = run
        with path.open("a") as file:
            file.write(json.dumps(run) + "\n")
    found = [done[key] for key in wanted]
    text = table(found, args.rows)
    (args.output_dir / "few_labels.md").write_text(text + "\n")
    print(text)
    return found


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This script's options, and those that go on to `finetune_lora.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--labels", type=positive_int, nargs="+", default=[1, 3, 5, 10, 25, 50], help="a class")
    parser.add_argument("--draws", type=positive_int, default=5)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["before", "probe", "unlabelled"])
    parser.add_argument("--pool", type=positive_int, help="the most training images; all if not given")
    parser.add_argument("--held-out", type=positive_int, help="the most held-out images; all if not given")
    parser.add_argument("--train", type=shlex.split, default=[], help="options of the row `trained` alone")
    parser.add_argument("--output-dir", type=homed, default=MEASURED / "few_labels")
    args, passed_on = parser.parse_known_args(argv)
    if "trained" in args.rows and args.pool is not None:
        raise InputError("--pool with the row `trained`: a run draws its labels from the whole set")
    finetune_lora.read_options([*passed_on, *args.train])  # what is wrong with them shows now
    return args, passed_on


def key_of(run: dict[str, Any]) -> tuple[int, int, str]:
    return run["labels"], run["draw"], run["row"]


# ----------------------------------------------------------------------------------------------------------- features


def cached_features(args: argparse.Namespace, passed_on: list[str]) -> dict[str, Any]:
    """Features of the pool, of its augmented views (views, N, D) and of the held-out images, as a run computes them."""
    path = args.output_dir / "features.pt"
    made_with = [*passed_on, str(args.pool), str(args.held_out)]
    if path.exists():
        kept = torch.load(path)
        if kept["made_with"] == made_with:
            return kept
    options, _ = finetune_lora.read_options([*passed_on, "--eval-split", "held-out"])
    device = torch.device("cpu")
    splits, model, report, plan = finetune_lora.prepare(options, device)
    train = splits.train.at_most(args.pool or len(splits.train))
    splits = splits._replace(train=train, val=splits.val.at_most(args.held_out or len(splits.val)))
    loaders = Loaders(options, plan, splits, report["image_size"], LoadingMeter())
    loaders.open(norms_train=False)
    task = tasks.task_of_run(options, splits, device)
    loaders.augmented = loaders.add_same_views(train.subset([*range(len(train))] * MOST_VIEWS), loaders.augmentation)
    (plain, labels), (held_out, held_out_labels), (views, _), _ = loaders.features(model, task, plan.dtype)
    found = {"plain": plain, "labels": labels, "held_out": held_out, "held_out_labels": held_out_labels}
    found["views"] = views.view(MOST_VIEWS, *plain.shape)
    found |= {"classes": list(splits.class_names), "made_with": made_with}
    torch.save(found, path)
    return found


def drawn(features: dict[str, Any], count: int, draw: int) -> Tensor:
    """The positions of `count` random images of each class, as `--labels-per-class` draws them."""
    return torch.tensor(some_of_each(features["labels"].tolist(), count, features["classes"], draw))


# --------------------------------------------------------------------------------------------------------------- rows


def with_views(features: dict[str, Any], chosen: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """The features ((1 + views) N, D) and the labels that a probe is fitted to: plain, and so many augmented views."""
    rows = torch.cat([features["plain"][chosen], *features["views"][:views, chosen]])
    return rows, features["labels"][chosen].repeat(1 + views)


def accuracy(features: dict[str, Any], probe: Probe) -> float:
    answers = (features["held_out"] @ probe.weight.T + probe.bias).argmax(1)
    return (answers == features["held_out_labels"]).float().mean().item()


def probe_before(features: dict[str, Any], chosen: Tensor, *_: Any) -> dict[str, Any]:
    """A probe on features that are divided by their deviations, with the best decade of C and one augmented view."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows, labels = (part.numpy() for part in with_views(features, chosen, 1))
    one_view = labels[: len(chosen)]
    folds = min(3, np.bincount(one_view).min())
    parts = []
    if folds > 1:
        parts = list(StratifiedKFold(folds, shuffle=True, random_state=0).split(one_view, one_view))
    views = np.array([[0], [len(chosen)]])

    def fitted(strength: float, places: np.ndarray):
        regression = LogisticRegression(C=strength, max_iter=200)
        return make_pipeline(StandardScaler(), regression).fit(rows[places], labels[places])

    best = (math.inf, 1.0)
    for strength in 10.0 ** np.arange(-4, 2) if parts else ():
        losses = []
        for rest, part in parts:
            places = (part + views).ravel()
            answers = fitted(strength, (rest + views).ravel()).predict_proba(rows[places])
            losses.append(log_loss(labels[places], answers, labels=np.unique(labels)))
        if np.mean(losses) >= best[0]:
            break
        best = (np.mean(losses), strength)
    answers = fitted(best[1], np.arange(len(labels))).predict(features["held_out"].numpy())
    return {"accuracy": float((answers == features["held_out_labels"].numpy()).mean())}


def probe_now(features: dict[str, Any], chosen: Tensor, *_: Any) -> dict[str, Any]:
    return probe_of(features, chosen, probed_views(len(chosen)))


def probe_of_one_view(features: dict[str, Any], chosen: Tensor, *_: Any) -> dict[str, Any]:
    return probe_of(features, chosen, 1)


def probe_of(features: dict[str, Any], chosen: Tensor, views: int) -> dict[str, Any]:
    probe = fit_linear_probe(*with_views(features, chosen, views), len(features["classes"]), views=1 + views)
    return {"accuracy": accuracy(features, probe), "scaling": probe.scaling, "strength": probe.strength}


def start(features: dict[str, Any], chosen: Tensor, *_: Any) -> dict[str, Any]:
    views = probed_views(len(chosen))
    rows, labels = with_views(features, chosen, views)
    classes = len(features["classes"])
    is_labelled = torch.zeros(len(features["plain"]), dtype=torch.bool)
    is_labelled[chosen] = True
    probe = fit_linear_probe(rows, labels, classes, views=1 + views)
    seen = unlabelled.seen(rows, labels, features["plain"][~is_labelled], classes, 1 + views)
    found = unlabelled.start(*seen, probe, views=1 + views)
    told = {name: getattr(found, name) for name in ("name", "gain_loss", "gain_accuracy")}
    right = (found.answers.argmax(1) == features["labels"][~is_labelled]).float().mean().item()
    return {
        "accuracy": accuracy(features, found.probe),
        "unlabelled_accuracy": right,
        "foreign": found.foreign.float().mean().item(),
        **told,
    }


def trained(
    features: dict[str, Any], chosen: Tensor, labels: int, draw: int, args: argparse.Namespace, passed_on: list[str]
) -> dict[str, Any]:
    """A whole run, which draws the same images."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*passed_on, *args.train, "--labels-per-class", str(labels), "--seed", str(draw)]
        with contextlib.redirect_stdout(io.StringIO()):
            results = finetune_lora.main([*flags, "--output-dir", folder])
    return {"accuracy": results["val_accuracy"], "probe": results["probe_accuracy_before"]}


ROWS: dict[str, Callable] = {
    "before": probe_before,
    "one_view": probe_of_one_view,
    "probe": probe_now,
    "unlabelled": start,
    "trained": trained,
}


# ------------------------------------------------------------------------------------------------------------- report


def table(runs: list[dict[str, Any]], rows: list[str]) -> str:
    """Means over the draws; in brackets the mean change against the first row, and its standard error."""
    lines = [f"| labels a class | {' | '.join(TITLES[row] for row in rows)} |", "|---" * (len(rows) + 1) + "|"]
    for labels in dict.fromkeys(run["labels"] for run in runs):
        own = {row: [run["accuracy"] for run in runs if (run["labels"], run["row"]) == (labels, row)] for row in rows}
        cells = [f"{statistics.mean(own[rows[0]]):.1%}"]
        for row in rows[1:]:
            cells.append(f"{statistics.mean(own[row]):.1%} ({gain(own[row], own[rows[0]])})")
        lines.append(f"| {labels} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gain(own: list[float], others: list[float]) -> str:
    """The mean difference of pairs in points, and its standard error."""
    differences = [100 * (a - b) for a, b in zip(own, others, strict=True)]
    if len(differences) == 1:
        return f"{differences[0]:+.1f}"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.mean(differences):+.1f} ± {error:.1f}"


if __name__ == "__main__":
    run_script(main)
