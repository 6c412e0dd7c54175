"""Measure how the cost of a training step grows with batch, rank and size of a ViT, and what fits into a memory.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.growth                                       # an hour on two cores
    python -m benchmarks.growth --device cuda --precision bf16 --batches 16 32 64 128 --fits-into 24
    python -m benchmarks.growth --answers 10000x20 100000x20    # what a run ends with: figures and page, minutes
    python -m benchmarks.growth --pairs 1000 10000 100000       # images and masks: listed, and all masks checked
    python -m benchmarks.growth --scenes 2000 5000 20000        # a map of a scene, so many pixels wide and 500 high
    python -m benchmarks.growth --predict 10000 100000 1000000  # answers for so many small images, in parts, an hour

One thing varies at a time, from a ViT-B/16 with the second of --batches and the second of --ranks: 8 and 8. Each point
is a run of `benchmarks.compare_peers`, with all variants side by side; see there for what is measured. A finished point
is kept in --output-dir, and the same command goes on where it stopped. A variant that finds no room at a point is left
out there. The largest batch that fits is read from the line through the peaks of the batches measured; on a GPU 0.45 GB
are left to CUDA itself, which is assumed.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import shlex
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tifffile
import torch
from PIL import Image
from tqdm import tqdm

import deploy_lora
from benchmarks import MEASURED, compare_peers
from benchmarks.compare_peers import VARIANTS
from finetune_lora import add_lora_to_model, load_base
from lora.backends import PREFERS_ONEDNN_LINEAR
from lora_utils import LoRAManager
from toolkit import homed
from toolkit.answers.evaluation import Evaluation
from toolkit.answers.multilabel import LabelAnswers
from toolkit.answers.regression import NumberAnswers
from toolkit.answers.report_page import write_page
from toolkit.answers.tasks import TASKS
from toolkit.config import positive_float, positive_int
from toolkit.devices import CUDA_CONTEXT_BYTES, peak_memory_bytes
from toolkit.images.masks import Classes, MaskReader, pairs_in
from toolkit.models.backbones import build_backbone
from toolkit.run.runs import run_script

MODELS = ("vit_small", "vit_b_16", "vit_l_16")
PEERS = ("full", "peft")
OURS = ("lora", "qlora")
COLOURS = ("#000000", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7")  # Okabe and Ito
MARKERS = "osD^vP"
OF_ANSWERS = ("classification", "multilabel", "regression")
Point = tuple[str, int, int]  # model, batch size, rank


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure what is missing, then write `growth.json` and `growth.png` and print the tables."""
    args = parse(argv)
    if args.answers:
        return measure_answers(args.answers, args.tasks)
    for what in (list_pairs, map_scene, predict_images):
        if sizes := getattr(args, OF_DATA[what][0]):
            return measure_data(what, sizes)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    middle = "vit_b_16", args.batches[:2][-1], args.ranks[:2][-1]
    sweeps = {
        "batch size": {batch: (middle[0], batch, middle[2]) for batch in args.batches},
        "rank": {rank: (*middle[:2], rank) for rank in args.ranks},
        "model": {model: (model, *middle[1:]) for model in args.models},
    }
    points = dict.fromkeys(point for sweep in sweeps.values() for point in sweep.values())
    measured = {point: measure(point, args) for point in tqdm(points, desc="points")}
    result = {
        "machine": measured[middle]["machine"],
        "versions": measured[middle]["versions"],
        "commit": measured[middle]["commit"],
        "sweeps": {name: rows(sweep, measured, args.variants) for name, sweep in sweeps.items()},
    }
    taken = CUDA_CONTEXT_BYTES / 1e9 if torch.device(args.device).type == "cuda" else 0.0
    sweep, room = result["sweeps"]["batch size"], args.fits_into - taken
    result["fits"] = {variant: largest_batch(sweep, variant, room) for variant in args.variants}
    (args.output_dir / "growth.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, args)
    print(tables(result, args))
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--batches", type=positive_int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--ranks", type=positive_int, nargs="+", default=[4, 8, 16, 64])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: peers by the same products, and LoRA")
    parser.add_argument("--answers", nargs="+", metavar="IMAGESxOUTPUTS", help="measure the reports on these instead")
    parser.add_argument("--tasks", nargs="+", choices=OF_ANSWERS, default=OF_ANSWERS, help="of --answers")
    for option, text in OF_DATA.values():
        parser.add_argument(f"--{option}", type=positive_int, nargs="+", metavar="COUNT", help=f"{text} instead")
    parser.add_argument("--steps", type=positive_int, default=3, help="rounds that are timed")
    parser.add_argument("--fits-into", type=positive_float, default=8.0, help="GB, for the largest batch")
    parser.add_argument("--image-size", type=positive_int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--output-dir", type=homed, default=MEASURED / "growth")
    args = parser.parse_args(argv)
    by_onednn = PREFERS_ONEDNN_LINEAR and args.precision == "fp32" and torch.device(args.device).type == "cpu"
    args.variants = args.variants or [*(f"{peer}_onednn" if by_onednn else peer for peer in PEERS), *OURS]
    return args


def measure(point: Point, args: argparse.Namespace) -> dict[str, Any]:
    """What `benchmarks.compare_peers` says of a point, measured now unless it was before."""
    model, batch, rank = point
    folder = args.output_dir / f"{model}_b{batch}_r{rank}"
    for path in folder.glob(f"*_{torch.device(args.device).type}_{args.precision}.json"):
        found = json.loads(path.read_text())
        told_of = {*found["variants"], *found["left_out"]}
        if found["image_size"] == args.image_size and {*args.variants} <= told_of:
            return found
    command = f"--model {model} --batch-size {batch} --rank {rank} --steps {args.steps} --image-size {args.image_size}"
    command += f" --device {args.device} --precision {args.precision} --variants {','.join(args.variants)}"
    return compare_peers.main([*shlex.split(command), "--output-dir", str(folder)])


def rows(sweep: dict[Any, Point], measured: dict[Point, dict], variants: list[str]) -> dict[str, dict[str, list]]:
    """For each variant its seconds and bytes along a sweep; nan where it was left out."""
    results = [measured[point]["variants"] for point in sweep.values()]
    keys = ("step_seconds", "memory_bytes", "resident_bytes")
    nothing = dict.fromkeys(keys, math.nan)
    columns = {v: {key: [result.get(v, nothing)[key] for result in results] for key in keys} for v in variants}
    return {"at": list(sweep), **columns}


def largest_batch(sweep: dict[str, Any], variant: str, gigabytes: float) -> int:
    """The largest batch whose tensors fit into this memory, by the line through the peaks measured; 0 if none does."""
    pairs = zip(sweep["at"], sweep[variant]["memory_bytes"], strict=True)
    measured = [(batch, size) for batch, size in pairs if not math.isnan(size)]
    if len(measured) < 2:
        return 0
    slope, start = np.polyfit(*zip(*measured, strict=True), 1)
    return max(0, int((gigabytes * 1e9 - start) / slope))


def measure_answers(sizes: list[str], kinds: list[str]) -> dict[str, Any]:
    """Seconds and memory of the reports on answers of each task and size, each in a process of its own."""
    result = {}
    print("| images x outputs | task | figures, s | page, s | memory beside the answers, MB | page, MB |")
    print("|---|---|---|---|---|---|")
    for size in sizes:
        images, outputs = map(int, size.split("x"))
        for kind in kinds:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(report_on_answers, (kind, images, outputs))
            result[f"{kind} {size}"] = found
            costs = f"{found['seconds']:.1f} | {found['page_seconds']:.1f} | {found['memory_bytes'] / 1e6:,.0f}"
            print(f"| {size} | {kind} | {costs} | {found['page_bytes'] / 1e6:.2f} |", flush=True)
    return result


def report_on_answers(kind: str, images: int, outputs: int) -> dict[str, float]:
    """What the figures of a report take, with intervals, and its pictures and page: the answers are random."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    names = [str(i) for i in range(outputs)]
    if kind == "classification":
        labels = torch.randint(outputs, (images,), generator=generator)
        said = labels.where(torch.rand(images, generator=generator) < 0.7, labels.flip(0))
        answers = Evaluation(0.5, (said == labels).float().mean().item(), said, labels, torch.rand(images))
        task = TASKS[kind](names)
    else:
        truth = torch.randn(images, outputs, generator=generator)
        scores = truth + torch.randn(images, outputs, generator=generator)
        if kind == "multilabel":
            task = TASKS[kind](names)
            answers = LabelAnswers(0.5, scores.sigmoid(), (truth > 1).float())
        else:
            task = TASKS[kind](names, truth)
            answers = NumberAnswers(0.5, scores, truth)
    before = peak_memory_bytes(torch.device("cpu"))
    started = time.perf_counter()
    report = task.report(answers)
    report.figures()
    report.printed()
    figured = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, report.picture)
        report.draw(picture)
        write_page(Path(folder, "page.html"), report.title(), [], report.sections(picture), Path("l"), picture, [])
        size = Path(folder, "page.html").stat().st_size
    return {
        "seconds": figured - started,
        "page_seconds": time.perf_counter() - figured,
        "memory_bytes": peak_memory_bytes(torch.device("cpu")) - before,
        "page_bytes": size,
    }


def measure_data(what: Callable[[int, Path], float], sizes: list[int]) -> dict[str, Any]:
    """Seconds and memory of one of OF_DATA at each size, each in a process of its own."""
    result = {}
    print(f"| {OF_DATA[what][1]} | seconds | peak memory of the process, MB |\n|---|---|---|")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, memory = pool.apply(measured, (what, size, Path(folder)))
        result[str(size)] = {"seconds": seconds, "memory_bytes": memory}
        print(f"| {size:,} | {seconds:.1f} | {memory / 1e6:,.0f} |", flush=True)
    return result


def measured(what: Callable[[int, Path], float], size: int, folder: Path) -> tuple[float, int]:
    with contextlib.redirect_stdout(io.StringIO()):
        seconds = what(size, folder)
    return seconds, peak_memory_bytes(torch.device("cpu"))


def list_pairs(count: int, folder: Path) -> float:
    """The seconds to find so many images and masks of 16 x 16 pixels, and to check all masks."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / "train" / kind).mkdir(parents=True)
    for i in range(count):
        levels = rng.integers(0, 3, (16, 16), np.uint8)
        for kind in ("images", "masks"):
            Image.fromarray(levels).save(folder / "train" / kind / f"{i}.png")
    started = time.perf_counter()
    found = pairs_in(folder / "train", None, MaskReader(Classes(NAMES)))
    assert len(found) == count
    return time.perf_counter() - started


def map_scene(side: int, folder: Path) -> float:
    """The seconds to write the map of a scene of three bands, 500 pixels high, in windows of 224 pixels."""
    adapter = small_adapter(folder, per_pixel=True)
    levels = tifffile.memmap(folder / "scene.tif", shape=(500, side, 3), dtype=np.uint8, photometric="rgb")
    levels[:] = np.arange(side)[:, None] % 250
    levels.flush()
    started = time.perf_counter()
    deploy_lora.main(["predict", str(adapter), str(folder / "scene.tif"), "--output", str(folder / "map.tif")])
    return time.perf_counter() - started


def predict_images(count: int, folder: Path) -> float:
    """The seconds to answer for so many images of 8 x 8 pixels, which are links to a thousand, in parts."""
    adapter = small_adapter(folder, per_pixel=False)
    (folder / "images").mkdir()
    for i in range(count):
        if i < 1000:
            Image.new("RGB", (8, 8), (i % 256, i // 4, 9)).save(folder / "images" / f"{i:07d}.png")
        else:
            os.link(folder / "images" / f"{i % 1000:07d}.png", folder / "images" / f"{i:07d}.png")
    started = time.perf_counter()
    argv = f"predict {adapter} {folder}/images --output {folder}/answers --batch-size 256 --workers 0"
    deploy_lora.main(argv.split())
    return time.perf_counter() - started


def small_adapter(folder: Path, per_pixel: bool) -> Path:
    """An adapter on a random backbone: a ResNet-18 of 224 pixels for masks, else vit_mini of 8."""
    arch, size = ("resnet18", 224) if per_pixel else ("vit_mini", 8)
    torch.save(build_backbone(arch, 2, image_size=size).state_dict(), folder / "base.pth")
    model, _ = load_base(folder / "base.pth", None, len(NAMES), arch=arch, image_size=size, per_pixel=per_pixel)
    about = {"arch": arch, "class_names": list(NAMES), "image_size": size, "checkpoint": str(folder / "base.pth")}
    if per_pixel:
        about["task"] = TASKS["segmentation"](NAMES, masks=MaskReader(Classes(NAMES))).record()
    LoRAManager(add_lora_to_model(model, r=2)).save_lora_checkpoint(folder / "lora.pth", about)
    return folder / "lora.pth"


NAMES = ("water", "wood", "field")
OF_DATA = {
    list_pairs: ("pairs", "images with masks"),
    map_scene: ("scenes", "pixels along the width of a scene"),
    predict_images: ("predict", "images to answer for"),
}


# ------------------------------------------------------------------------------------------------------------- report


def tables(result: dict[str, Any], args: argparse.Namespace) -> str:
    """A table for each sweep, seconds and MB, and one of what fits."""
    parts = []
    for name, sweep in result["sweeps"].items():
        parts.append(f"\n| {name} | {' | '.join(map(str, sweep['at']))} |\n" + "|---" * (len(sweep["at"]) + 1) + "|")
        for variant in args.variants:
            pairs = zip(sweep[variant]["step_seconds"], sweep[variant]["memory_bytes"], strict=True)
            cells = " | ".join(f"{seconds:.3g} s, {size / 1e6:,.0f} MB" for seconds, size in pairs)
            parts.append(f"| {VARIANTS[variant].title} | {cells} |")
    parts.append(f"\n| | largest batch in {args.fits_into:g} GB |\n|---|---|")
    parts += [f"| {VARIANTS[variant].title} | {batch} |" for variant, batch in result["fits"].items()]
    return "\n".join(parts)


def plot(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Time above, memory below, a column for each sweep."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 7), sharex="col", layout="constrained")
    for column, (name, sweep) in enumerate(result["sweeps"].items()):
        positions = range(len(sweep["at"]))
        for variant, colour, marker in zip(args.variants, COLOURS, MARKERS, strict=False):
            style = {"color": colour, "marker": marker, "label": VARIANTS[variant].title}
            axes[0, column].plot(positions, sweep[variant]["step_seconds"], **style)
            axes[1, column].plot(positions, [size / 1e9 for size in sweep[variant]["memory_bytes"]], **style)
        axes[1, column].set_xticks(positions, map(str, sweep["at"]))
        axes[1, column].set_xlabel(name)
        for panel in axes[:, column]:
            panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel("seconds per step")
    axes[1, 0].set_ylabel("peak memory of the tensors, GB")
    axes[1, 0].axhline(args.fits_into, color="grey", linestyle=":")
    fits = ", ".join(map(str, result["fits"].values()))
    axes[1, 0].set_title(f"largest batch in {args.fits_into:g} GB, in the order above: {fits}", fontsize=8)
    for panel in axes.flat:
        panel.set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=8)
    machine = result["machine"]
    figure.suptitle(
        f"ViT-B/16 and its neighbours, {args.precision}; {machine['device']}, threads: {machine['threads']}"
    )
    figure.savefig(args.output_dir / "growth.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run_script(main)
