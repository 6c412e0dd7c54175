"""Measure how images come from files to tensors: beside torchvision's and timm's loaders, at the start, in training.

    python -m benchmarks.loading                                        # views, and the start with 200,000 files
    python -m benchmarks.loading --only views --images 40
    python -m benchmarks.loading --only bands --images 200              # TIFFs of 13 bands
    python -m benchmarks.loading --only training --data-dir photos      # who waits: a ResNet-18 at 224 pixels

Views: files that look like photographs, of 0.2 and of 12 megapixels, are made first. Each loader makes the same views
of each file, one after the other in an order drawn anew, in one process with one thread. What counts is the processor's
time, which other processes do not lengthen, and the median of the ratios file by file. torchvision's is its ImageFolder
with the transforms of its reference scripts and of MoCo's papers; timm's is its ImageDataset with its transforms for
the crops of fine-tuning, where it is installed.
Bands: TIFFs of 13 bands of 16 bits, as Sentinel-2's tiles come: read by tifffile alone, read here (as floats, all
checks done), and made a view of for training.
Start: a tree of hard links to a few images, read in a fresh process.
Training: LoRA fine-tuning, and how long it waits for images.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import datasets
from torchvision import transforms as T

import finetune_lora
from benchmarks import MEASURED
from benchmarks.compare_peers import current_commit
from toolkit import InputError, homed
from toolkit.config import positive_int
from toolkit.images import data, folders, sources, transforms
from toolkit.images.bands import Bands
from toolkit.models.backbones import build_backbone
from toolkit.run.runs import run_script

# Width, height and the noise's standard deviation in levels of 256. Noise is what takes bytes, and bytes are what takes
# time even where a JPEG is decoded at a reduced size.
PHOTOGRAPHS = {
    "0.2 MP": ((520, 390), 4),
    "12 MP, smooth": ((4000, 3000), 1),
    "12 MP, noisy": ((4000, 3000), 4),
}
TILES = (64, 120)  # pixels along each side: EuroSAT's and BigEarthNet's
VIEWS = ("fine-tuning", "evaluation", "moco_v2", "moco_v3")
PIXELS = 224  # of the training rows
IMAGENET = 1_281_167  # training images


def main(argv: list[str] | None = None) -> dict:
    """Measure, print tables and write each part's numbers into a file `loading_{part}.json`."""
    args = parse_arguments(argv)
    parts = {"views": measure_views, "bands": measure_bands, "start": measure_start, "training": measure_training}
    common = {"commit": current_commit(), "machine": f"{platform.machine()}, {data.usable_cores()} cores"}
    common["versions"] = {"torch": torch.__version__, "Pillow": Image.__version__, "python": platform.python_version()}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in args.only or [name for name in parts if name != "training" or args.data_dir]:
        results[name] = parts[name](args)
        content = json.dumps({**common, name: results[name]}, indent=1)
        (args.output_dir / f"loading_{name}.json").write_text(content + "\n")
    return results


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=("views", "bands", "start", "training"), help="default: all that can be done"
    )
    parser.add_argument("--images", type=positive_int, default=24, help="of each size")
    parser.add_argument("--files", type=positive_int, default=200_000, help="in the tree of the start")
    parser.add_argument(
        "--data-dir", type=homed, help="photographs for the training rows, as finetune_lora.py reads them"
    )
    parser.add_argument("--batches", type=positive_int, default=16, help="of 32 images, in each training row")
    parser.add_argument("--output-dir", type=homed, default=MEASURED)
    args = parser.parse_args(argv)
    if "training" in (args.only or []) and not args.data_dir:
        raise InputError("the training rows need photographs: give --data-dir")
    return args


# -------------------------------------------------------------------------------------------------------------- views


def measure_views(args: argparse.Namespace) -> list[dict]:
    """A row for each kind of view, size of view and size of file: milliseconds of a core per image, by loader."""
    torch.set_num_threads(1)
    rows = []
    names = loaders_of("fine-tuning")
    print("| file | view | pixels | " + " | ".join(f"{name}, ms" for name in names) + " | faster than |")
    print("|---" * (4 + len(names)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for title, (size, noise) in PHOTOGRAPHS.items():
            files = Path(folder, title)
            make_photographs(files, size, noise, args.images)
            for pixels in (224, 32):
                for view in VIEWS:
                    row = {"file": title, "file_bytes": bytes_of(files), "view": view, "pixels": pixels}
                    rows.append(row | compare(files, view, pixels))
                    print_views(rows[-1])
    return rows


def make_photographs(folder: Path, size: tuple[int, int], noise: float, count: int) -> None:
    """JPEGs of quality 90 of smooth shapes, with as much noise."""
    for i in range(count):
        rng = np.random.RandomState(i)
        shapes = Image.fromarray(rng.randint(0, 256, (12, 16, 3)).astype(np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, noise, (size[1], size[0], 1)).astype(np.float32)
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8))
        image.save(folder / "ab"[i % 2] / f"{i}.jpg", quality=90)


def bytes_of(folder: Path) -> float:
    return statistics.mean(path.stat().st_size for path in folder.rglob("*.jpg"))


def loaders_of(view: str) -> list[str]:
    timm = view == "fine-tuning" and importlib.util.find_spec("timm") is not None
    return ["here", "torchvision", *(["timm"] if timm else [])]


def compare(folder: Path, view: str, pixels: int) -> dict:
    """Median milliseconds per image by loader, and how many times faster this one is than each other: quartiles."""
    return in_turn({name: READERS[name](folder, view, pixels) for name in loaders_of(view)})


def in_turn(sets: dict[str, Sequence]) -> dict:
    """The same of readers by name: what each does for each image, one after the other in an order drawn anew."""
    taken, order = {name: [] for name in sets}, list(sets)
    for i in [0, *range(len(sets["here"]))]:  # the first once more: what is done once only is not counted
        random.shuffle(order)
        for name in order:
            torch.manual_seed(i)  # the same crop
            started = time.process_time()
            sets[name][i]
            taken[name].append(time.process_time() - started)
    taken = {name: seconds[1:] for name, seconds in taken.items()}
    faster = {
        name: statistics.quantiles([other / own for own, other in zip(taken["here"], taken[name], strict=True)], n=4)
        for name in sets
        if name != "here"
    }
    return {"milliseconds": {name: 1000 * statistics.median(taken[name]) for name in sets}, "faster_than": faster}


def read_here(folder: Path, view: str, pixels: int) -> data.Transformed:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    images = data.LabelledImages(folders.ImageFiles(folder, names))
    if view == "evaluation":
        return data.Transformed(images, transforms.eval_transform(pixels))
    crops = transforms.train_transform(pixels) if view == "fine-tuning" else transforms.two_crops(pixels, view)
    return data.Transformed(images, crops)


def read_with_torchvision(folder: Path, view: str, pixels: int) -> datasets.ImageFolder:
    return datasets.ImageFolder(str(folder), reference_transform(view, pixels))


def read_with_timm(folder: Path, view: str, pixels: int):
    from timm.data import ImageDataset, create_transform

    crops = create_transform(pixels, is_training=True, color_jitter=None, interpolation="bilinear", hflip=0.5)
    return ImageDataset(str(folder), transform=crops)


READERS = {"here": read_here, "torchvision": read_with_torchvision, "timm": read_with_timm}


def reference_transform(view: str, pixels: int) -> Callable:
    """What torchvision's reference scripts and MoCo's papers describe, in torchvision's own transforms."""
    tensor = [T.ToTensor(), T.Normalize(transforms.IMAGENET_MEAN, transforms.IMAGENET_STD)]
    flip = T.RandomHorizontalFlip()
    if view == "evaluation":
        resize = (
            [T.Resize(round(pixels * 256 / 224)), T.CenterCrop(pixels)] if pixels > 64 else [T.Resize([pixels] * 2)]
        )
        return T.Compose([*resize, *tensor])
    if view == "fine-tuning":
        return T.Compose([T.RandomResizedCrop(pixels, scale=(transforms.CROP_MIN, 1.0)), flip, *tensor])
    crop, grey = T.RandomResizedCrop(pixels, scale=(0.2, 1.0)), T.RandomGrayscale(0.2)
    blur = T.Lambda(transforms.blurred)  # MoCo's own, which is Pillow's
    if view == "moco_v2":
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
        return Twice(T.Compose([crop, jitter, grey, T.RandomApply([blur], 0.5), flip, *tensor]))
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
    first = T.Compose([crop, jitter, grey, blur, flip, *tensor])
    rarely_blurred = [T.RandomApply([blur], 0.1), T.RandomSolarize(128, 0.2)]
    return Twice(first, T.Compose([crop, jitter, grey, *rarely_blurred, flip, *tensor]))


class Twice:
    """Two views of an image."""

    def __init__(self, first: Callable, second: Callable | None = None):
        self.views = first, second or first

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        return [view(image) for view in self.views]


def print_views(row: dict) -> None:
    timings = [row["milliseconds"].get(name) for name in loaders_of("fine-tuning")]
    shown = " | ".join("" if ms is None else f"{ms:.2f}" for ms in timings)
    quartiles = row["faster_than"].items()
    ratios = [f"{name} {middle:.2f}x ({low:.2f} to {high:.2f})" for name, (low, middle, high) in quartiles]
    file = f"{row['file']}, {row['file_bytes'] / 1e6:.2f} MB"
    print(f"| {file} | {row['view']} | {row['pixels']} | {shown} | {', '.join(ratios)} |", flush=True)


# -------------------------------------------------------------------------------------------------------------- bands


class Each:
    """What a function makes of each file."""

    def __init__(self, files: Sequence[Path], make: Callable[[Path], Any]):
        self.files, self.make = files, make

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Any:
        return self.make(self.files[i])


def measure_bands(args: argparse.Namespace) -> list[dict]:
    """A row for each size of tile, stored as it is and compressed: milliseconds of a core per image."""
    import tifffile

    torch.set_num_threads(1)
    bands, rows = Bands(13, scale=10000.0), []
    print("| tiles of 13 bands | tifffile, ms | read here, ms | a view of 224 pixels, ms |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for size in TILES:
            crops = transforms.train_transform(PIXELS, mean=[0.0] * 13, std=[1.0] * 13, bands=bands)
            for compression in (None, "zlib"):
                files = make_tiles(Path(folder, f"{size}_{compression}"), size, args.images, compression)
                readers = {"here": bands.array, "tifffile": tifffile.imread, "view": crops}
                row = {"pixels": size, "compression": compression}
                rows.append(row | in_turn({name: Each(files, make) for name, make in readers.items()}))
                shown = " | ".join(f"{rows[-1]['milliseconds'][name]:.2f}" for name in ("tifffile", "here", "view"))
                print(f"| {size} x {size}, {compression or 'not compressed'} | {shown} |", flush=True)
    return rows


def make_tiles(folder: Path, size: int, count: int, compression: str | None) -> list[Path]:
    """TIFFs of 13 bands of 16 bits, with numbers like reflectances in ten thousandths."""
    import tifffile

    folder.mkdir()
    for i in range(count):
        levels = np.random.RandomState(i).normal(1500, 500, (size, size, 13)).clip(0, 10000).astype(np.uint16)
        how = {"planarconfig": "contig", "photometric": "minisblack", "compression": compression}
        tifffile.imwrite(folder / f"{i}.tif", levels, **how)
    return sorted(folder.iterdir())


# -------------------------------------------------------------------------------------------------------------- start


def measure_start(args: argparse.Namespace) -> dict:
    """Seconds and memory to be ready for the first batch, and what an epoch takes beside the images."""
    with tempfile.TemporaryDirectory() as folder:
        make_tree(Path(folder), args.files)
        measured = subprocess.run(
            [sys.executable, "-c", f"from benchmarks.loading import start; start({folder!r})"],
            check=True,
            capture_output=True,
            text=True,
        )
    result = json.loads(measured.stdout.splitlines()[-1])
    factor = IMAGENET / args.files
    print(f"start with {args.files:,} files (ImageNet, in proportion):")
    for name, value in result.items():
        print(f"    {name}: {value:,.2f} ({value * factor:,.2f})")
    return {"files": args.files, **result}


def make_tree(folder: Path, count: int, classes: int = 1000) -> None:
    """So many files in class folders, hard links to a few images."""
    originals = folder.parent / f"{folder.name}-originals"
    originals.mkdir()
    try:
        for i in range(20):
            Image.new("RGB", (32, 32), (i, 2 * i, 3 * i)).save(originals / f"{i}.jpg")
        for i in range(count):
            inside = folder / f"class{i % classes:04d}"
            if i < classes:
                inside.mkdir()
            os.link(originals / f"{i % 20}.jpg", inside / f"image_{i:08d}.jpg")
    finally:
        for path in originals.iterdir():
            path.unlink()
        originals.rmdir()


def start(folder: str) -> None:
    """In a process of its own: print what it took."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    before, started = resident(), time.perf_counter()
    splits = sources.load_splits("imagefolder", folder)
    digest_of = time.perf_counter()
    splits.digest()
    ready, batches = time.perf_counter(), data.Batches(len(splits.train), 256, shuffle=True)
    for _ in batches:
        pass
    ended = time.perf_counter()
    print(
        json.dumps(
            {
                "seconds to find and split": digest_of - started,
                "seconds for the digest": ready - digest_of,
                "seconds an epoch for order and seeds": ended - ready,
                "MB more": resident() - before,
            }
        )
    )


# ----------------------------------------------------------------------------------------------------------- training


def measure_training(args: argparse.Namespace) -> list[dict]:
    """Rows of a ResNet-18 with adapters on these photographs at 224 pixels, by number of loading processes."""
    splits = sources.load_splits("imagefolder", args.data_dir)
    model = build_backbone("resnet18", len(splits.class_names), PIXELS)
    finetune_lora.add_lora_to_model(model, r=8, lora_alpha=16)
    finetune_lora.freeze_backbone_params(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows = []
    print("| loading processes | images/s | waiting |\n|---|---|---|")
    for workers in (0, 1, 2, "auto"):
        images = data.Transformed(splits.train, transforms.train_transform(PIXELS))
        loader = data.build_loader(images, 32, shuffle=True, workers=workers)
        meter = data.LoadingMeter()
        train(model, optimizer, limited(loader, 2))  # processes start, caches fill
        train(model, optimizer, meter.timed(limited(loader, args.batches)))
        rows.append({"workers": workers, "processes": loader.num_workers, **meter.results()})
        title = workers if workers != "auto" else f"auto: {loader.num_workers}"
        print(f"| {title} | {rows[-1]['images_per_second']:.1f} | {rows[-1]['waiting_share']:.1%} |", flush=True)
    return rows


def limited(loader, count: int) -> Iterator:
    for _, batch in zip(range(count), loader, strict=False):
        yield batch


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator) -> None:
    model.train()
    for images, labels in batches:
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    run_script(main)
