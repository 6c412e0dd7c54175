"""Predict what a training step costs on GPUs that are not there. Every figure is predicted, none is measured.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.roofline --model vit_b_16 --batch-size 64
    python -m benchmarks.roofline --model vit_b_16 --batch-size 64 --variants full,peft,lora,qlora
    python -m benchmarks.roofline --model resnet50 --batch-size 8

A step of each variant of `benchmarks.compare_peers` runs on fake CUDA tensors, which have shapes and no numbers,
through the code that runs on CUDA. Each operator is charged max(operations / peak, bytes / bandwidth,
kernels * LAUNCH), and the sum is the GPU's work. Peak memory is that of the tensors that live at once, in blocks as
PyTorch allocates them.

Left out are caches, which make small tensors cheaper, the workspaces of cuDNN and cuBLAS, and the time that Python
needs to issue the kernels. Which share of a datasheet's figures a kernel reaches is assumed (SHARES), the same on all
cards. Trust ratios between variants more than milliseconds, and neither before a measurement.

A PyTorch without CUDA is made to believe in a GPU by `tests/cuda_on_cpu`, for which g++ and Linux are needed.
"""

import argparse
import collections
import json
import os
import shlex
import subprocess
import sys
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.compare_peers import (
    VARIANTS,
    add_step_options,
    choose_variants,
    current_commit,
    describe_versions,
)
from benchmarks.operators import Operator, Recording, record
from lora.backends import LOW_PRECISION
from tests import cuda_on_cpu
from toolkit import InputError
from toolkit.config import positive_int
from toolkit.models.names import default_image_size
from toolkit.run.runs import run_script


class Card(NamedTuple):
    """A GPU as its datasheet has it: dense operations a second in int8, 16 bits and float32, bytes a second."""

    in_8_bits: float
    in_16_bits: float
    in_32_bits: float
    bandwidth: float
    source: str


CARDS = {
    "H100": Card(
        *(1979e12, 989e12, 67e12, 3.35e12),
        "NVIDIA H100 SXM5 80 GB datasheet: INT8 and BF16 tensor cores, dense; FP32; HBM3",
    ),
    "RTX 4090": Card(
        *(660.6e12, 165.2e12, 82.6e12, 1.008e12),
        "NVIDIA Ada GPU architecture whitepaper, RTX 4090: INT8 tensor cores; BF16 tensor cores accumulating in "
        "FP32, dense; FP32; GDDR6X",
    ),
    "T4": Card(
        *(130e12, 65e12, 8.1e12, 0.32e12),
        "NVIDIA T4 datasheet: INT8 tensor cores; FP16 tensor cores, which it has in place of BF16; FP32; GDDR6",
    ),
}
# Which share of it kernels reach: assumed, until a GPU can be asked.
SHARES = {"product": 0.7, "convolution": 0.5, "attention": 0.45, "other": 1.0, "bandwidth": 0.85}
LAUNCH = 2.2e-6  # seconds: no kernel and the gap behind it take less
DEFAULT = ("full", "peft", "lora", "lora_follow", "qlora", "lora_last_half")
COSTLIEST = 10
FILE = "predicted_{model}_b{batch_size}_{precision}.json"


def seconds(operator: Operator, card: Card) -> float:
    """Predicted."""
    peak = {8: card.in_8_bits, 16: card.in_16_bits, 32: card.in_32_bits}[operator.bits]
    computing = operator.flops / (peak * SHARES[operator.kind])
    moving = operator.bytes / (card.bandwidth * SHARES["bandwidth"])
    return max(computing, moving, operator.kernels * LAUNCH)


def predict(recording: Recording) -> dict:
    """Kernels, bytes, operations and memory of a step, and for each card its milliseconds and where they go."""
    operators = recording.operators
    return {
        "kernels": recording.kernels,
        "bytes": sum(operator.bytes for operator in operators),
        "flops": sum(operator.flops for operator in operators),
        "peak_bytes": recording.peak_bytes,
        "kept_bytes": recording.kept_bytes,
        "milliseconds": {name: 1e3 * sum(seconds(o, card) for o in operators) for name, card in CARDS.items()},
        "costliest": {name: costliest(operators, card) for name, card in CARDS.items()},
    }


def compare(variants: dict[str, dict]) -> None:
    """Add the speed and the memory of each variant against full fine-tuning, if that is among them."""
    if "full" not in variants:
        return
    full = variants["full"]
    for variant in variants.values():
        own = variant["milliseconds"]
        variant["speedup_over_full"] = {card: full["milliseconds"][card] / own[card] for card in CARDS}
        variant["memory_share"] = variant["peak_bytes"] / full["peak_bytes"]


def costliest(operators: list[Operator], card: Card) -> list[dict]:
    """The operators, each with what it works on, that take most of the time together."""
    total, count = collections.Counter(), collections.Counter()
    for operator in operators:
        total[operator.name, operator.operands] += 1e3 * seconds(operator, card)
        count[operator.name, operator.operands] += 1
    return [
        {"operator": name, "operands": operands, "times": count[name, operands], "milliseconds": milliseconds}
        for (name, operands), milliseconds in total.most_common(COSTLIEST)
    ]


# ------------------------------------------------------------------------------------------- a GPU that is not there


def predict_apart(names: list[str], args) -> dict[str, dict]:
    """`predict` for each variant, in processes that believe in a GPU."""
    command = [sys.executable, *on_gpu(), "-m", "benchmarks.roofline"]
    command += ["--model", args.model, "--precision", args.precision]
    for option in ("batch_size", "image_size", "rank", "seed"):
        command += [f"--{option.replace('_', '-')}", str(vars(args)[option])]
    predicted = {}
    for name in names:
        print(f"recording {name}, batch {args.batch_size}", file=sys.stderr)
        done = subprocess.run([*command, "--record", name], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"recording {name}: {done.stderr}")
        predicted[name] = json.loads(done.stdout.splitlines()[-1])
    return predicted


def on_gpu() -> list[str]:
    """What starts a module with a GPU for PyTorch. Raises InputError where none is there, and none can be emulated."""
    if torch.cuda.is_available():
        return []
    if reason := cuda_on_cpu.why_not():
        raise InputError(f"predictions need a GPU that PyTorch can use, or one that is emulated: {reason}")
    return ["-m", "tests.cuda_on_cpu"]


def record_here(name: str, args) -> None:
    """In a process with a GPU: print the prediction, and exit at once: the threads of that GPU cannot be joined."""
    with mock.patch.object(F, "scaled_dot_product_attention", fused_attention):
        print(json.dumps(predict(record(name, args))), flush=True)
    os._exit(0)


def fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """`F.scaled_dot_product_attention` by the kernel that PyTorch chooses on a GPU, and not for fake tensors."""
    aten = torch.ops.aten
    if query.dtype in LOW_PRECISION and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


# ----------------------------------------------------------------------------------------------------------- report


def markdown_table(result: dict) -> str:
    heads = ["kernels", "GB moved", *(f"ms of work, {card}" for card in CARDS), "peak MB"]
    lines = [f"| variant | {' | '.join(f'predicted {head}' for head in heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, v in result["variants"].items():
        cells = [VARIANTS[name].title, f"{v['kernels']:,}", f"{v['bytes'] / 1e9:.1f}"]
        for card in CARDS:
            against = f" ({v['speedup_over_full'][card]:.2f}x)" if "speedup_over_full" in v else ""
            cells.append(f"{v['milliseconds'][card]:.1f}{against}")
        share = f" ({v['memory_share']:.2f})" if "memory_share" in v else ""
        memory = f"{v['peak_bytes'] / 1e6:,.0f}{share}"
        lines.append(f"| {' | '.join(cells)} | {memory} |")
    return "\n".join(lines)


def costliest_table(result: dict, name: str, card: str) -> str:
    lines = [
        f"{VARIANTS[name].title}, the {COSTLIEST} costliest operators on {card}, predicted:",
        "| predicted ms | predicted times | operator | operands |",
        "|---|---|---|---|",
    ]
    for row in result["variants"][name]["costliest"][card]:
        lines.append(f"| {row['milliseconds']:.2f} | {row['times']} | {row['operator']} | {row['operands']} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------- command line


def choose(args) -> list[str]:
    """The variants to predict."""
    if args.variants is None:
        args.variants = ",".join(name for name in DEFAULT if args.model.startswith(VARIANTS[name].models))
    return choose_variants(args)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_options(parser)
    parser.add_argument("--batch-size", type=positive_int, default=64)
    parser.add_argument("--image-size", type=positive_int, help="side in pixels (default: the model's own)")
    parser.add_argument("--record", metavar="VARIANT", help=argparse.SUPPRESS)
    parser.set_defaults(precision="bf16", device=torch.device("cuda"))
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_image_size(args.model)
    return args


def main(argv: list[str] | None = None) -> dict | None:
    command = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    if args.record:
        return record_here(args.record, args)
    names = choose(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    result = {
        "what": "predicted, not measured",
        "command": shlex.join(["python", "-m", "benchmarks.roofline", *command]),
        "commit": current_commit(),
        **{key: getattr(args, key) for key in ("model", "batch_size", "image_size", "rank", "precision")},
        "versions": describe_versions(),
        "assumed": {
            "cards": {name: card._asdict() for name, card in CARDS.items()},
            "shares": SHARES,
            "launch_seconds": LAUNCH,
        },
        "variants": predict_apart(names, args),
    }
    compare(result["variants"])
    path = args.output_dir / FILE.format(**vars(args))
    path.write_text(json.dumps(result, indent=1) + "\n")
    for key in ("what", "command", "commit", "versions", "assumed"):
        print(f"{key}: {result[key]}")
    print(markdown_table(result))
    for name in names:
        print(f"\n{costliest_table(result, name, 'H100')}")
    return result


if __name__ == "__main__":
    run_script(main)
