"""Measure how long the host takes to issue a training step in eager mode, and predict the step on GPUs from it.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.roofline --model vit_b_16 --batch-size 64     # the GPU's work, predicted
    python -m benchmarks.host --model vit_b_16                         # the host's, measured; then both together

A GPU works while Python and PyTorch's dispatcher prepare the next kernels: a step takes max(GPU, host).

The host's time depends on how many operators there are, and not on their sizes. It is **measured** on a model of the
same depth, whose widths are so small that the CPU's arithmetic does not count, by the branches that a GPU takes, on one
thread, in CPU seconds. Variants take turns, and what counts is the median of the ratios within a round.
A CPU's kernels stand in for the launches; the operators of bitsandbytes for CPUs cost more than those for GPUs.
Compiled variants are given what CUDA graphs leave to the host (`benchmarks.compiled.replayed`), or with
`--compiler inductor` every kernel by a call of its own, as where gradients accumulate.
The GPU's work is **predicted** by `benchmarks.roofline`, whose files in --output-dir are read, and so is the step: no
GPU has been asked.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from unittest import mock

import torch

from benchmarks import roofline
from benchmarks.compare_peers import (
    VARIANTS,
    WARMUP_STEPS,
    add_step_options,
    current_commit,
    describe_machine,
    describe_versions,
    quartiles,
    random_batch,
    time_in_turn,
)
from benchmarks.compiled import replayed
from benchmarks.operators import AsOnGPU, narrow, stock_kernels
from toolkit import devices
from toolkit.config import positive_int
from toolkit.run.output_folder import begin_folder
from toolkit.run.runs import run_script

BATCH, SIZE, RANK, WIDTH = 2, 8, 2, 8


class OnHost(AsOnGPU):
    """A step of which only the host's time is of interest."""

    clock = staticmethod(time.process_time)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """The second of two: the first finds the caches full of other variants."""
        self.work(images, labels)
        return super().step(images, labels)

    def check(self) -> None:
        """Of a compiled variant nothing: the gradients of a replayed graph are an earlier step's."""
        if not VARIANTS[self.name].compiled:
            super().check()


def measure(names: list[str], args) -> dict[str, dict]:
    """Of every variant the CPU seconds of each step, their median, and the quartiles of their ratios to full
    fine-tuning's."""
    tiny = argparse.Namespace(**{**vars(args), "batch_size": BATCH, "image_size": SIZE, "rank": RANK})
    generator, trainings = torch.Generator().manual_seed(args.seed), {}
    torch.manual_seed(args.seed)
    compiler = replayed if args.compiler == "replayed" else args.compiler
    with stock_kernels(), mock.patch.object(devices, "COMPILER", compiler):
        for name in names:
            trainings[name] = OnHost(name, tiny, VARIANTS[name].build(narrow(args.model, SIZE, WIDTH), tiny).train())
            for _ in range(WARMUP_STEPS):
                trainings[name].step(*random_batch(tiny, generator))
        seconds = time_in_turn(trainings, tiny, generator)
    return {name: summary(own, seconds.get("full")) for name, own in seconds.items()}


def summary(own: list[float], full: list[float] | None) -> dict:
    ratios = full and [mine / other for mine, other in zip(own, full, strict=True)]
    return {
        "host_seconds": own,
        "host_milliseconds": 1e3 * statistics.median(own),
        "host_over_full": ratios and quartiles(ratios),
    }


def predictions(args) -> dict[int, dict]:
    """What `benchmarks.roofline` has written for the model, by batch size."""
    pattern = roofline.FILE.format(model=args.model, batch_size="*", precision=args.precision)
    found = [json.loads(path.read_text()) for path in args.output_dir.glob(pattern)]
    return {result["batch_size"]: result for result in sorted(found, key=lambda result: result["batch_size"])}


def predict_steps(hosts: dict[str, dict], predicted: dict[str, dict]) -> dict[str, dict]:
    """For each variant that both know and each card: milliseconds of the GPU's work, and of the step."""
    return {
        name: {
            card: {"gpu": gpu, "step": max(gpu, hosts[name]["host_milliseconds"])}
            for card, gpu in predicted[name]["milliseconds"].items()
        }
        for name in hosts
        if name in predicted
    }


# ------------------------------------------------------------------------------------------------------------- report


def host_table(hosts: dict[str, dict]) -> str:
    lines = ["| variant | host, ms a step, measured | against full fine-tuning, measured |", "|---|---|---|"]
    for name, about in hosts.items():
        ratio = "-"
        if about["host_over_full"]:
            ratio = "{1:.2f} ({0:.2f} to {2:.2f})".format(*about["host_over_full"])
        lines.append(f"| {VARIANTS[name].title} | {about['host_milliseconds']:.1f} | {ratio} |")
    return "\n".join(lines)


def step_table(steps: dict[str, dict], batch: int) -> str:
    """Milliseconds; what the step waits for; how many times as fast as full fine-tuning."""
    heads = [f"predicted ms a step, {card}" for card in roofline.CARDS]
    lines = [f"| batch {batch} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, cards in steps.items():
        cells = []
        for card, about in cards.items():
            waits_for = "GPU" if about["gpu"] == about["step"] else "host"
            speed = f", {steps['full'][card]['step'] / about['step']:.2f}x" if "full" in steps else ""
            cells.append(f"{about['step']:.1f} ({waits_for}{speed})")
        lines.append(f"| {VARIANTS[name].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- command line


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_options(parser)
    parser.add_argument("--compiler", choices=["replayed", "inductor"], default="replayed", help="of compiled variants")
    parser.add_argument("--steps", type=positive_int, default=30, help="rounds that are timed")
    parser.set_defaults(precision="bf16", device=torch.device("cpu"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    command = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    names = roofline.choose(args)
    torch.set_num_threads(1)
    begin_folder(args.output_dir)
    predicted = predictions(args)
    if not predicted:
        print(f"no prediction of a GPU's work in {args.output_dir}: first run benchmarks.roofline", file=sys.stderr)
    result = {
        "what": "the host's time is measured; a step is predicted: max(GPU, predicted; host, measured)",
        "command": shlex.join(["python", "-m", "benchmarks.host", *command]),
        "commit": current_commit(),
        **{key: getattr(args, key) for key in ("model", "steps", "precision", "compiler")},
        "machine": describe_machine(args),
        "versions": describe_versions(),
        "variants": measure(names, args),
    }
    hosts = result["variants"]
    result["predicted_commits"] = {batch: about["commit"] for batch, about in predicted.items()}
    result["predicted_steps"] = {b: predict_steps(hosts, about["variants"]) for b, about in predicted.items()}
    path = args.output_dir / f"host_{args.model}_{args.precision}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for key in ("what", "command", "commit", "predicted_commits", "machine", "versions"):
        print(f"{key}: {result[key]}")
    print(host_table(hosts))
    for batch, steps in result["predicted_steps"].items():
        print(f"\n{step_table(steps, batch)}")
    return result


if __name__ == "__main__":
    run_script(main)
