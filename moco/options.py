"""The options of stage 1 that fine-tuning has not. They are read before PyTorch is loaded."""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import choices, config, homed, typed
from toolkit.config import fraction, non_negative_float, non_negative_int, option, positive_float, positive_int
from toolkit.images import remote
from toolkit.models.names import ARCHS, NO_CHECKPOINT, checkpoint_path, fetched, model_problems
from toolkit.run import options, output_folder


@dataclass(frozen=True, kw_only=True)
class BackboneOptions(options.ShapeOptions):
    arch: str = option("vit_mini", choices=ARCHS)


@dataclass(frozen=True, kw_only=True)
class MoCoOptions(options.AdapterOptions):
    checkpoint: Path | None = option(None, "go on with this backbone, projector and predictor", type=checkpoint_path)
    lora_rank: int = option(0, "width of adapters, r; 0: none", type=non_negative_int, flags=("--rank",))
    moco_version: int | None = option(None, "default: the checkpoint's, else 3", type=int, choices=(2, 3))
    epochs: int = option(100, type=positive_int)
    batch_size: int = option(256, "of all processes together", type=positive_int)
    optimizer: str = option("adamw", choices=("adamw", "sgd"))
    learning_rate: float = option(1e-3, type=positive_float, flags=("--lr",))
    weight_decay: float = option(0.1, type=non_negative_float)
    warmup_epochs: int = option(0, type=non_negative_int)
    precision: str = option("auto", choices=choices.PRECISIONS)
    momentum: float = option(0.99, "m; v3 raises it to 1 along a cosine", type=fraction)
    temperature: float = option(0.2, "T", type=positive_float)
    dim: int | None = option(None, "width of queries and keys; default: the checkpoint's, else 256", type=positive_int)
    mlp_dim: int | None = option(None, "v3: hidden width of the MLPs; the checkpoint's, else 4096", type=positive_int)
    queue_size: int = option(65536, "v2: K", type=positive_int)
    two_crops: str = option("moco_v3", "how the views are made", choices=choices.TWO_CROPS)
    crop_min: float = option(0.2, "smallest share of the area in a crop", type=fraction)
    seed: int = option(0, type=non_negative_int)
    knn_every: int = option(10, "epochs between k-NN accuracies", type=positive_int)
    knn_dir: Path | None = option(None, "class folders to measure it on, if the images have no labels", type=homed)


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(options.RunOptions, BackboneOptions, options.ImageOptions, MoCoOptions):
    """All options of stage 1."""


SECTIONS = {"run": options.RunOptions, "model": BackboneOptions, "data": options.ImageOptions, "moco": MoCoOptions}


def make_parser(description: str = "") -> argparse.ArgumentParser:
    """The command line, whose groups are the sections of the configuration file."""
    parser = config.make_parser(SECTIONS, prog=typed("pretrain"), description=description)
    parser.set_defaults(output_dir=Path("checkpoints/pretrain"))
    return parser


def read_options(argv: Sequence[str] | None = None, description: str = "") -> tuple[PretrainOptions, dict[str, str]]:
    """Options and where each came from: defaults < YAML < command line. Raises InputError with every problem found."""
    args, sources = config.parse_args(make_parser(description), argv, check=complete, ignored=options.OF_FINE_TUNING)
    args.checkpoint = fetched(args.checkpoint)
    return config.frozen(PretrainOptions, args), sources


def complete(args: argparse.Namespace, sources: dict[str, str], typed: set[str]) -> Iterator[str]:
    """Fill in the options that follow from others; yield what is wrong with them together, one line each."""
    yield from options.complete_shared(args, sources, typed)
    yield from options.environment_problems(args, written(args))
    if args.knn_dir and not remote.is_folder(args.knn_dir):
        yield f"--knn-dir {args.knn_dir}: no such folder"
    if "crop_min" in typed and args.two_crops == "digits":
        yield "--crop-min with --two-crops digits, which crops nothing: drop one of the two"
    if args.checkpoint is None and args.lora_rank > 0:
        yield f"--lora-rank {args.lora_rank} without --checkpoint: give the pretrained weights to adapt"
    if args.checkpoint is not None and sources["arch"] == "default":
        args.arch = None  # what the checkpoint says
    yield from model_problems(args.checkpoint or NO_CHECKPOINT, args.arch, args.heads)


def written(args: Any) -> list[str]:
    """The names of the files that a run writes to --output-dir, and of a whole fine-tuning if its adapter is there."""
    own = [checkpoint_name(args), "moco_lora.pth", "last.pth", "metrics.csv", "results.json", "pretraining_curves.png"]
    others = output_folder.FINE_TUNING_FILES if os.path.lexists(args.output_dir / "lora.pth") else ()
    return list(dict.fromkeys([*own, *others]))


def checkpoint_name(args: Any) -> str:
    return f"moco_stage1_epoch_{args.epochs}.pth"
