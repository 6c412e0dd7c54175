"""Measure a class for every pixel: the probe, LoRA, QLoRA and full fine-tuning beside U-Net and FPN on one backbone.

    python -m benchmarks.segmentation --data-dir membrane --checkpoint timm:tf_efficientnet_lite0.in1k
    python -m benchmarks.segmentation ... --methods lora full unet --seeds 1 --epochs 3
    python -m benchmarks.segmentation --step resnet50 vit_b_16     # time and memory of a step alone, at random weights

All of them see the same crops, windows, epochs and weights of classes, and are judged by the same code: U-Net and FPN
(segmentation_models_pytorch, `pip install segmentation-models-pytorch`) take the place of the toolkit's linear head
within `finetune_lora.py`. Each method's learning rate is chosen on a validation part of the training images, with a
seed that is not used again. Then each seed is trained with it and judged on the evaluation images after the last epoch.
Every run is a process of its own, whose memory is measured, and a line in `runs.jsonl`; the same command goes on where
it stopped. Options that are not this script's go to `finetune_lora.py`.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import finetune_lora
from benchmarks import MEASURED, finished_runs
from toolkit import homed
from toolkit.answers.segmentation import Segmentation
from toolkit.config import positive_int
from toolkit.devices import peak_memory_bytes
from toolkit.models.backbones import build_backbone
from toolkit.models.dense import DenseModel
from toolkit.run.runs import run_script

HEAD = ["--lora-rank", "0"]
FULL = [*HEAD, "--no-freeze-backbone"]
RANDOM = ["--head-init", "random"]
# title, flags, decoder, the learning rates that are tried
METHODS = {
    "head": ("linear head, trained on", HEAD, None, (1e-4, 1e-3)),
    "lora": ("LoRA r=8", ["--lora-rank", "8"], None, (1e-4, 3e-4, 1e-3)),
    "qlora": ("QLoRA r=8", ["--lora-rank", "8", "--use-qlora"], None, (1e-4, 3e-4, 1e-3)),
    "full": ("full fine-tuning, linear head", FULL, None, (3e-4, 1e-3, 3e-3)),
    "fpn_frozen": ("FPN, backbone frozen", [*HEAD, *RANDOM], "FPN", (1e-3, 3e-3)),
    "fpn": ("FPN, all fine-tuned", [*FULL, *RANDOM], "FPN", (1e-3, 3e-3)),
    "unet_frozen": ("U-Net, backbone frozen", [*HEAD, *RANDOM], "Unet", (1e-3, 3e-3)),
    "unet": ("U-Net, all fine-tuned", [*FULL, *RANDOM], "Unet", (1e-3, 3e-3, 1e-2)),
}
TUNING_SEED = 1000


class Decoder(nn.Module):
    """A decoder of segmentation_models_pytorch over all maps of a timm backbone, in the place of `DenseModel`.

    Args:
        name: `Unet` or `FPN`.
        backbone, classes, image_size, channels: those of `toolkit.models.dense.DenseModel`.
    """

    def __init__(self, name: str, backbone: nn.Module, classes: int, image_size: int, channels: int = 3):
        super().__init__()
        import segmentation_models_pytorch as smp

        self.window = image_size
        self.widths = [info["num_chs"] for info in backbone.feature_info]
        backbone.prune_intermediate_layers(list(range(len(self.widths))), prune_norm=False, prune_head=True)
        self.backbone = backbone
        # Only its decoder is used: the stages' widths are those of the encoder that is given here.
        whole = getattr(smp, name)(f"tu-{backbone.default_cfg['architecture']}", encoder_weights=None, classes=classes)
        self.head = nn.ModuleDict({"decoder": whole.decoder, "answers": whole.segmentation_head})

    def forward(self, images: Tensor) -> Tensor:
        indices = list(range(len(self.widths)))
        maps = self.backbone.forward_intermediates(images, indices=indices, norm=False, intermediates_only=True)
        return self.head["answers"](self.head["decoder"]([images, *maps])).float()


def run_one(job: tuple[str, float, int, str], options: list[str], answers: Any) -> None:
    """One run, in a process of its own; its figures go into a queue."""
    method, rate, seed, split = job
    _, flags, decoder, _ = METHODS[method]
    if decoder is not None:
        finetune_lora.DenseModel = lambda *args: Decoder(decoder, *args)
        # A decoder has no linear layer that a temperature could divide.
        Segmentation.soften = lambda self, model, temperature: None
        finetune_lora.FineTuning.calibrate = lambda run: False
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        typed = ["--learning-rate", str(rate), "--seed", str(seed), "--eval-split", split]
        results = finetune_lora.main([*options, *flags, *typed, "--output-dir", folder, "--workers", "0"])
    answers.put(
        {
            "run": [method, rate, seed, split],
            "options": options,
            "probe": results["probe_miou_before"],
            "miou": results["val_miou"],
            "interval": results["val_miou_interval"],
            "dice": results["macro_dice"],
            "pixel_accuracy": results["pixel_accuracy"],
            "retreats": len(results["retreats"]),
            "trained": results["trainable_parameters"],
            "file_bytes": results["adapter_bytes"],
            "peak_memory_bytes": results["peak_memory_bytes"],
            "cpu_seconds": time.process_time() - started,
            "epoch_seconds": results["seconds"],
        }
    )


class Log:
    """The finished runs, a JSON object a line."""

    def __init__(self, path: Path, options: list[str]):
        self.path = path
        self.options = options
        self.runs = finished_runs(path, options)

    def find(self, job: tuple[str, float, int, str]) -> dict[str, Any]:
        """The figures of a run, which is made if it has not been yet."""
        for run in self.runs:
            if run["run"] == list(job):
                return run
        context = multiprocessing.get_context("spawn")
        answers = context.SimpleQueue()
        process = context.Process(target=run_one, args=(job, self.options, answers))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{job} has failed")
        run = answers.get()
        self.runs.append(run)
        with self.path.open("a") as file:
            print(json.dumps(run), file=file)
        print(f"{job}: {run['miou']:.2%} (probe {run['probe'] or 0:.2%}), {run['cpu_seconds']:.0f} s", flush=True)
        return run


# --------------------------------------------------------------------------------------------------------- steps alone

CLASSES = 11
ROUNDS = 7


def step_of(arch: str, method: str) -> Callable[[], None]:
    """A training step of a dense model over 8 images of 224 pixels."""
    model = DenseModel(build_backbone(arch, CLASSES), CLASSES, 224)
    if method == "lora":
        finetune_lora.add_lora_to_model(model, r=8, lora_alpha=16)
        finetune_lora.freeze_backbone_params(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    images = torch.randn(8, 3, 224, 224)
    masks = torch.randint(CLASSES, (8, 224, 224))
    task = Segmentation([str(number) for number in range(CLASSES)])

    def step() -> None:
        task.loss(model(images), masks).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_of(arch: str, method: str, answers: Any) -> None:
    """The peak of resident memory that three steps add, in bytes: in a process of its own."""
    before = peak_memory_bytes(torch.device("cpu"))
    step = step_of(arch, method)
    for _ in range(3):
        step()
    answers.put(peak_memory_bytes(torch.device("cpu")) - before)


def compare_steps(arch: str) -> None:
    """Print LoRA's time and memory beside full fine-tuning's; times are interleaved."""
    steps = {method: step_of(arch, method) for method in ("full", "lora")}
    ratios = []
    for number in range(ROUNDS):
        seconds = {}
        for method, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[method] = time.perf_counter() - started
        if number:  # the first one warms up
            ratios.append(seconds["full"] / seconds["lora"])
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for method in steps:
        answers = context.SimpleQueue()
        process = context.Process(target=peak_of, args=(arch, method, answers))
        process.start()
        peaks[method] = answers.get()
        process.join()
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(
        f"{arch}: LoRA {statistics.median(ratios):.2f}x full fine-tuning's speed ({spread}), "
        f"{peaks['lora'] / peaks['full']:.2f} of its memory "
        f"({peaks['lora'] / 1e6:,.0f} of {peaks['full'] / 1e6:,.0f} MB)"
    )


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run what is missing of the table, and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=positive_int, default=3)
    parser.add_argument("--step", nargs="+", default=[], metavar="ARCH", help="the step alone, of these backbones")
    parser.add_argument("--output-dir", type=homed, default=MEASURED / "segmentation")
    args, options = parser.parse_known_args(argv)
    for arch in args.step:
        compare_steps(arch)
    if args.step:
        return []
    options = ["--task", "segmentation", *options]
    finetune_lora.read_options(options)  # what is wrong with them shows now, not in an hour
    args.output_dir.mkdir(parents=True, exist_ok=True)
    log = Log(args.output_dir / "runs.jsonl", options)
    rows = []
    for method in args.methods:
        trials = {rate: log.find((method, rate, TUNING_SEED, "validation"))["miou"] for rate in METHODS[method][3]}
        rate = max(trials, key=trials.__getitem__)
        runs = [log.find((method, rate, seed, "held-out")) for seed in range(args.seeds)]
        rows.append({"method": method, "rate": rate, "runs": runs})
    print(table(rows))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | rate | mean IoU | over the probe | pixel accuracy | trained | file | memory | CPU time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        runs = row["runs"]
        scores = [run["miou"] for run in runs]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        gains = [run["miou"] - run["probe"] for run in runs if run["probe"]]
        cells = [
            METHODS[row["method"]][0],
            f"{row['rate']:g}",
            f"{statistics.mean(scores):.1%} ± {spread:.1%}",
            f"{100 * statistics.mean(gains):+.1f}" if gains else "",
            f"{statistics.mean(run['pixel_accuracy'] for run in runs):.1%}",
            f"{runs[0]['trained']:,}",
            f"{runs[0]['file_bytes'] / 1e6:.1f} MB",
            f"{statistics.mean(run['peak_memory_bytes'] for run in runs) / 1e6:,.0f} MB",
            f"{statistics.mean(run['cpu_seconds'] for run in runs):.0f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
