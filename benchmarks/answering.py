"""Measure how many images a second `deploy_lora.py predict` answers for, beside its parts and a plain loop.

    python -m benchmarks.answering --data-dir photos --arch resnet50 vit_b_16 --images 300
    python -m benchmarks.answering --data-dir photos --arch vit_b_16 --arithmetic int8
    python -m benchmarks.answering --data-dir photos --arch resnet50 --precision bf16

Of the same files, in interleaved rounds: reading and decoding alone; the adapted network alone, on batches in memory;
both, by `predict`, which overlap, of files and of tar archives; and what one would write without the toolkit, with as
many loading processes: torchvision's plain network over its own transforms, and timm's network of this name over
timm's loader, as timm's inference.py has them. The first round warms up. Weights are random.
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import deploy_lora
from finetune_lora import add_lora_to_model, load_finetuned, multiply_in_8_bits
from lora_utils import LoRAManager
from toolkit import choices, devices, homed
from toolkit.config import positive_int
from toolkit.images.data import Transformed, build_loader
from toolkit.images.folders import image_names
from toolkit.images.transforms import eval_transform
from toolkit.models.backbones import build_backbone
from toolkit.models.checkpoints import load_backbone
from toolkit.run.runs import run_script

SIZE = 224
PLAIN = v2.Compose(
    [
        v2.Resize(256),
        v2.CenterCrop(SIZE),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)


class Files(Dataset):
    """The images of some files as a plain loop would read them."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        return PLAIN(torchvision.datasets.folder.default_loader(self.paths[i]))


def ways_of(arch: str, paths: list[str], folder: Path, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """What is timed, by name: each goes over all images once."""
    torch.save(build_backbone(arch, 2).state_dict(), folder / f"{arch}.pth")
    model, _ = load_backbone(folder / f"{arch}.pth", 10)
    add_lora_to_model(model, r=8)
    adapter = folder / f"{arch}_lora.pth"
    about = {"arch": arch, "class_names": list("0123456789"), "image_size": SIZE}
    LoRAManager(model).save_lora_checkpoint(adapter, about | {"checkpoint": str(folder / f"{arch}.pth")})
    adapted, _ = load_finetuned(adapter)
    plain = getattr(torchvision.models, arch)().eval()
    device = torch.device("cpu")
    dtype = devices.select_precision(args.precision, device)
    if args.arithmetic == "int8":
        multiply_in_8_bits(adapted)
    archives = folder / "archives"
    archives.mkdir(exist_ok=True)
    with tarfile.open(archives / f"{arch}.tar", "w") as archive:
        for number, path in enumerate(paths):
            archive.add(path, f"{number}{Path(path).suffix}")
    images = deploy_lora._images([Path(path) for path in paths], {"transform": eval_transform(SIZE)})
    loading = {"batch_size": args.batch_size, "workers": args.workers}
    loader = build_loader(Transformed(images, eval_transform(SIZE)), **loading)
    devices.place(adapted, device)
    counts = map(len, torch.arange(len(paths)).split(args.batch_size))
    batches = [devices.to_device(torch.randn(n, 3, SIZE, SIZE), device) for n in counts]
    argv = f"--output {folder}/answers.csv --batch-size {args.batch_size} --workers {args.workers} --device cpu"
    argv += f" --arithmetic {args.arithmetic} --precision {args.precision}"

    def decode() -> None:
        for _ in loader:
            pass

    @torch.inference_mode()
    def compute() -> None:
        for batch in batches:
            with devices.autocast(device, dtype):
                adapted(batch)

    def predict(*images: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            deploy_lora.main(["predict", str(adapter), *images, *argv.split()])

    @torch.inference_mode()
    def plain_loop(network: nn.Module, batches: Iterable[torch.Tensor]) -> None:
        for batch in batches:
            with devices.autocast(device, dtype):
                network(batch)

    def torchvision_loop() -> None:
        plain_loop(plain, DataLoader(Files(paths), args.batch_size, num_workers=args.workers))

    ways = {
        "decoding alone": decode,
        "network alone": compute,
        "predict": functools.partial(predict, *paths),
        "of archives": functools.partial(predict, str(archives)),
        "torchvision": torchvision_loop,
    }
    if importlib.util.find_spec("timm") is not None:
        ways["timm"] = timm_loop(arch, paths, folder, args, plain_loop)
    return ways


def timm_loop(arch: str, paths: list[str], folder: Path, args: argparse.Namespace, plain_loop: Callable) -> Callable:
    """timm's network over its loader."""
    import timm
    from timm.data import create_dataset, create_loader, resolve_data_config

    links = folder / "links"
    links.mkdir(exist_ok=True)
    for number, path in enumerate(paths):
        link = links / f"{number:06d}{Path(path).suffix}"
        if not link.exists():
            link.symlink_to(Path(path).resolve())
    network = timm.create_model({"vit_b_16": "vit_base_patch16_224"}.get(arch, arch), num_classes=10).eval()
    config = resolve_data_config({"input_size": (3, SIZE, SIZE)}, model=network)
    loading = {"batch_size": args.batch_size, "num_workers": args.workers, "use_prefetcher": False}

    def run() -> None:
        dataset = create_dataset("", str(links), class_map="")
        loader = create_loader(dataset, **config, **loading, device=torch.device("cpu"))
        plain_loop(network, (batch for batch, _ in loader))

    return run


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Print images a second of each way, the medians of the rounds, and return them by architecture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=homed, required=True)
    parser.add_argument("--arch", nargs="+", default=["resnet50", "vit_b_16"])
    parser.add_argument("--images", type=positive_int, default=300)
    parser.add_argument("--batch-size", type=positive_int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--arithmetic", choices=choices.ARITHMETICS, default="float")
    parser.add_argument("--precision", choices=choices.PRECISIONS, default="fp32")
    args = parser.parse_args(argv)
    paths = [f"{args.data_dir}/{name}" for name in image_names(args.data_dir)[: args.images]]
    result = {}
    print("| network | decoding alone | network alone | predict | of the slower | of archives | torchvision | timm |")
    print("|---|---|---|---|---|---|---|---|")
    for arch in args.arch:
        with tempfile.TemporaryDirectory() as folder:
            ways = ways_of(arch, paths, Path(folder), args)
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(args.rounds + 1):
                for name, run in ways.items():
                    started = time.perf_counter()
                    run()
                    seconds[name].append(time.perf_counter() - started)
        rates = {name: len(paths) / statistics.median(found[1:]) for name, found in seconds.items()}
        slower = min(rates["decoding alone"], rates["network alone"])
        shown = [f"{rates[name]:.1f}" for name in ("decoding alone", "network alone", "predict")]
        shown += [f"{rates['predict'] / slower:.2f}", f"{rates['of archives']:.1f}", f"{rates['torchvision']:.1f}"]
        shown.append(f"{rates['timm']:.1f}" if "timm" in rates else "not installed")
        print(f"| {arch} | {' | '.join(shown)} |", flush=True)
        result[arch] = rates
    return result


if __name__ == "__main__":
    run_script(main)
