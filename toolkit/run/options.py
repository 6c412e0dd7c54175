"""The options of both scripts: flag and YAML key, type and default of each, and what goes together.

A class is a section of the YAML file and a field is an option; `toolkit.config` makes the parser from them. Options are
read once, completed, checked together, and then frozen: what a run settles later is in its `Plan`.
"""

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import InputError
from toolkit.answers.tasks import TASKS
from toolkit.config import (
    any_float,
    any_int,
    flag,
    folds,
    fraction,
    non_negative_float,
    non_negative_int,
    option,
    or_word,
    positive_float,
    positive_int,
    positive_share,
    rank_of_layer,
    read_pattern,
    several,
    worker_count,
)
from toolkit.devices import ARITHMETICS, PRECISIONS
from toolkit.files import SHIPPED, found_path, read_checkpoint
from toolkit.images import bands, splitting
from toolkit.images.cache import CACHES
from toolkit.images.families import FAMILIES, known_scaling
from toolkit.images.lists import UNKNOWN
from toolkit.images.sources import DATASETS, EVAL_SPLITS, UNLABELLED_SET, unknown_dataset
from toolkit.images.transforms import AUGMENTATIONS
from toolkit.models.backbones import ARCHS, TIMM
from toolkit.models.checkpoints import (
    OFFICIAL_CHECKPOINTS,
    checkpoint_path,
    find_images,
    is_none,
    option_problems,
)

NORMS = ("auto", "frozen", "follow", "train")
CHECKPOINTING = ("never", "none", "selective", "full")
BEST_BY = tuple(dict.fromkeys(by for task in TASKS.values() for by in task.best_by))

# The options of fine-tuning that people need: `--help` and README show them, in this order.
NEEDED = (
    "data_dir",
    "checkpoint",
    "output_dir",
    "epochs",
    "learning_rate",
    "lora_rank",
    "lora_alpha",
    "batch_size",
    "use_qlora",
    "precision",
    "augmentation",
    "class_weights",
    "norms",
    "adapt_last",
    "resume",
)

SAVES_MEMORY = (
    "lower --batch-size and raise --accumulation-steps by as much, or use --gradient-checkpointing selective (a ViT), "
    "--use-qlora, --precision bf16 or, which is slow, --gradient-checkpointing full"
)

# ----------------------------------------------------------------------------------------------------------------------
# The options, by section


def data_set(name: str) -> str:
    """A converter for the name of a data set."""
    if name not in DATASETS:
        raise argparse.ArgumentTypeError(unknown_dataset(name))
    return name


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What is for the command line only."""

    config: Path | None = option(None, "YAML file with values for the options below", type=Path)
    output_dir: Path = option(Path("checkpoints/lora"), "folder for all results", type=Path)
    resume: Path | None = option(
        None,
        "go on with the stopped run in --output-dir, or with the one whose last.pth is given",
        type=Path,
        nargs="?",
        const=Path(),
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """What describes a backbone beside its arch."""

    heads: int | None = option(None, "attention heads of a ViT; default: as its layout implies", type=positive_int)
    channels: int | None = option(
        None,
        "channels of the images; default: the checkpoint's, else 3. Its first layer is fitted to others",
        type=positive_int,
    )
    image_size: int | None = option(None, "pixels; default: what the backbone was made for", type=positive_int)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ShapeOptions):
    """Section `model`."""

    checkpoint: Path = option(
        SHIPPED,
        "file of MoCo, torchvision or timm; shipped: for digits; none: random weights",
        type=checkpoint_path,
    )
    arch: str | None = option(
        None,
        "architecture, or timm:NAME; default: the checkpoint's",
        metavar=f"{{{','.join((*ARCHS, f'{TIMM}NAME'))}}}",  # `option_problems` checks it
    )
    stage1_adapter: Path | None = option(None, "moco_lora.pth of moco.pretrain, merged into the checkpoint", type=Path)


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """The part of section `data` that both scripts read: where images are, and what their numbers mean."""

    dataset: str | None = option(
        None, "default: imagefolder if you name images of your own, else digits", type=data_set, choices=DATASETS
    )
    data_dir: Path | None = option(
        None, "folder with train/ and val/, or a folder per class; default: digits", type=Path
    )
    val_dir: Path | None = option(None, "evaluation images, if not in --data-dir: one folder per class", type=Path)
    data_list: tuple[Path, ...] | None = several(
        None, "list of `path,label` lines, or two: for training and for evaluation", type=Path
    )
    eval_split: str = option(
        "held-out",
        "where the evaluation images come from; validation: a part of the training images, to choose settings",
        choices=EVAL_SPLITS,
    )
    skip_unreadable: bool = option(False, "leave out, and list, images that cannot be read")
    workers: int | str = option("auto", "processes that load images", type=worker_count)
    bands: tuple[str, ...] | None = several(None, "bands to read from a file, as 4,3,2; 0: zeros (default: all)")
    scale: float | None = option(None, "divisor of the files' values, as 10000", type=positive_float)
    mean: tuple[float, ...] | None = several(
        None, "mean of each channel, or one for all, after --scale; default: the backbone's", type=any_float
    )
    std: tuple[float, ...] | None = several(None, "standard deviations, given like --mean", type=any_float)
    normalise: str | None = option(
        None,
        "data: mean and std measured on training images; or a known family's",
        choices=("data", *FAMILIES),
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions(ImageOptions):
    """Section `data`."""

    task: str = option(
        "classification",
        "one class an image; multilabel: several labels; regression: numbers, both in --data-list; segmentation: masks",
        choices=tuple(TASKS),
    )
    unknown: str = option("ignore", "what an unknown label counts as, with --task multilabel", choices=UNKNOWN)
    label_columns: tuple[str, ...] | None = several(
        None, "columns of a list that are labels or numbers, as A,B,C or A..B; default: all but paths and groups"
    )
    group_by: str | None = option(
        None, "a list's column, or a folder's level, that names the patient or field: none is on two sides"
    )
    folds: str | None = option(
        None, "cross-validate over so many parts, a run for each; 2/5: that of the second of five", type=folds
    )
    classes: tuple[str, ...] | None = several(
        None, "names of the classes in masks, or a file of names and values or colours; with --task segmentation"
    )
    unknown_value: tuple[int | str, ...] = several(
        (255,), "values of pixels in masks that are unknown; none: all are known", type=or_word("none", any_int)
    )
    labels_per_class: int | None = option(None, "train on only so many images of each class", type=positive_int)
    augmentation: str = option("crop", "crop, trivial: photographs; affine: digits; none", choices=AUGMENTATIONS)
    cache_features: str = option(
        "none", "run the frozen blocks below --adapt-last only once per image and view", choices=CACHES
    )


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What both scripts ask of adapters, each in its own section and with its own default rank."""

    lora_rank: int = option(8, "width of adapters, r; 0: none", type=non_negative_int, flags=("--rank",))
    lora_alpha: float | None = option(
        None, "the update is scaled by alpha / r; default: 2 r", type=positive_float, flags=("--alpha",)
    )
    lora_dropout: float = option(0.0, "dropout probability on the adapters' input", type=fraction)
    use_qlora: bool = option(False, "frozen weights in 4 bits", flags=("--qlora",))
    rank_pattern: tuple[str, ...] | None = several(None, "other ranks, as layer4=16", type=rank_of_layer)
    target_modules: tuple[str, ...] | None = several(None, "layers to adapt: names, suffixes or regular expressions")
    exclude_modules: tuple[str, ...] | None = several(None, "layers to leave alone")
    adapt_last: int | None = option(
        None, "only so many last blocks (ViT) or stages (ResNet); default: all", type=positive_int
    )


@dataclass(frozen=True, kw_only=True)
class TuneOptions(AdapterOptions):
    """Section `finetune`."""

    freeze_backbone: bool = option(True, "train adapters and head alone")
    norms: str = option(
        "auto",
        "follow: a ResNet's statistics follow the adapters; train: slow on ResNets; auto: follow, on a GPU frozen",
        choices=NORMS,
    )
    learning_rate: float | str = option(
        1e-4,
        "AdamW's peak rate; adapters that start at the gradient use 24 times it; auto: search",
        type=or_word("auto", positive_float),
        flags=("--lr",),
    )
    head_init: str = option("probe", "how the classifier head starts", choices=("probe", "random"))
    lora_init: str | None = option(
        None,
        "how A starts (default: at the loss's gradient; at random if the head does)",
        choices=("gradient", "random"),
    )
    class_weights: str = option(
        "none", "balanced: rare classes count more; default of segmentation", choices=("none", "balanced")
    )
    epochs: int = option(10, "passes over the training images", type=positive_int)
    batch_size: int = option(32, "images per batch, over all processes", type=positive_int)
    accumulation_steps: int = option(1, "batches per optimizer step", type=positive_int)
    weight_decay: float = option(0.01, "weight decay of AdamW", type=non_negative_float)
    warmup_epochs: float = option(0.0, "epochs of linear warm-up", type=non_negative_float)
    label_smoothing: float = option(0.0, "label smoothing factor", type=fraction)
    mixup: float = option(0.0, "alpha of mixup, as 0.2; 0: none", type=non_negative_float)
    wise_ft: float | str = option(
        "auto",
        "share of the trained change that is saved; auto: grows with the images per class",
        type=or_word("auto", positive_share),
    )
    keep_best: str | None = option(None, "lora.pth is the best epoch by this, not the last", choices=BEST_BY)
    clip_grad_norm: float | None = option(None, "clip the gradient's norm to this", type=positive_float)
    precision: str = option(
        "auto",
        "of products and of frozen weights; auto: bf16 or fp16 on CUDA, else fp32",
        choices=PRECISIONS,
    )
    arithmetic: str = option(
        "float",
        "int8: multiply by frozen weights of linear layers and attention in 8 bits; for a ViT in fp32 on a CPU",
        choices=ARITHMETICS,
    )
    gradient_checkpointing: str = option(
        "none",
        "what backward computes again. never (a ViT): nothing; none: LayerNorm, GELU; selective (a ViT): attention "
        "too; full: blocks",
        choices=CHECKPOINTING,
    )
    activation_precision: int = option(
        32,
        "bits of the activations saved for backward; 16: half the bytes, rounded gradients",
        type=int,
        choices=(32, 16),
    )
    compile: bool = option(False, "torch.compile the training step: on CUDA into CUDA graphs; not yet run on a GPU")
    seed: int = option(0, "seed of all random numbers", type=non_negative_int)


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions(RunOptions, ModelOptions, DataOptions, TuneOptions):
    """All options of a fine-tuning run."""


FINE_TUNING_SECTIONS = {"run": RunOptions, "model": ModelOptions, "data": DataOptions, "finetune": TuneOptions}


def own_fields(kind: type, shared: type) -> frozenset[str]:
    """The options of a section that are not those of the class which it extends."""
    return frozenset(field.name for field in dataclasses.fields(kind)) - {
        field.name for field in dataclasses.fields(shared)
    }


# Keys of sections that both scripts read, but which are fine-tuning's alone: pretraining ignores them.
OF_FINE_TUNING = {
    "model": own_fields(ModelOptions, ShapeOptions) - {"arch"},
    "data": own_fields(DataOptions, ImageOptions),
}

PATHS = ("data_dir", "val_dir", "data_list", "knn_dir", "checkpoint", "stage1_adapter")  # of what a run reads

# These may differ when a run is resumed: the digest of the images catches a changed data set.
PLACES_OF_IMAGES = ("data_dir", "val_dir", "data_list", "skip_unreadable")
# These options of fine-tuning, as `section.key`, may differ too: they do not change what is computed.
FREE_TO_CHANGE = (
    "model.checkpoint",
    "model.stage1_adapter",
    "data.workers",
    "data.data_dir",
    "data.val_dir",
    "data.data_list",
    "data.skip_unreadable",
)

# ----------------------------------------------------------------------------------------------------------------------
# What follows from options, before they are frozen. These functions fill in what argparse has read.


def complete_data(args: argparse.Namespace, sources: dict[str, str]) -> list[str]:
    """Fill in the default data set, and resolve the paths of a configuration.

    Returns what is wrong with the options of the images together, one line each.
    """
    for name in PATHS:
        value = getattr(args, name, None)
        if not value or sources.get(name) != "config":
            continue
        found = [found_path(path) for path in value] if isinstance(value, list) else found_path(value)
        setattr(args, name, found)
    if args.dataset is None:
        names_images = args.data_dir or args.data_list or args.val_dir
        args.dataset = "imagefolder" if names_images else "digits"
    args.bands = bands.split_names(args.bands)
    return data_problems(args)


def data_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the options of the images together, one line each."""
    problems = bands.option_problems(scaling_of(args), args.channels)
    if args.val_dir and args.data_list:
        problems.append("--val-dir with --data-list: give the evaluation images as a second list instead")
    elif args.val_dir and not args.data_dir:
        problems.append("--val-dir without --data-dir: give the folder of the training images as well")
    if args.data_list and len(args.data_list) > 2:
        problems.append(f"--data-list: expected a list for training and one for evaluation, got {len(args.data_list)}")
    if args.dataset == UNLABELLED_SET:
        problems += unlabelled_problems(args)
    elif args.dataset != "imagefolder" and (args.val_dir or args.data_list):
        problems.append(f"--dataset {args.dataset} has its own images: drop it, or --val-dir and --data-list")
    return problems


def unlabelled_problems(args: Any) -> list[str]:
    """The options that images without labels have no use for, one line each."""
    needless = []
    if args.val_dir:
        needless.append("--val-dir")
    if args.data_list and len(args.data_list) > 1:
        needless.append("a second --data-list")
    return [f"{name} with images without labels: they are not evaluated on; drop it" for name in needless]


def complete_adapters(args: argparse.Namespace) -> None:
    """Fill in alpha, by default twice the rank; without adapters, that of the usual rank, 8."""
    if args.lora_alpha is None:
        args.lora_alpha = 2.0 * (args.lora_rank or 8)


def complete_fine_tuning(args: argparse.Namespace, sources: dict[str, str]) -> list[str]:
    """Fill in the options that follow from others; return the problems with the data options, one line each."""
    args.label_columns = bands.split_names(args.label_columns)
    problems = complete_data(args, sources)
    if sources["checkpoint"] == "default" and args.dataset != "digits":
        images = next((flag(name) for name in ("data_dir", "data_list") if getattr(args, name)), "--dataset")
        problems.append(
            f"{images} without --checkpoint: the backbone that comes with the toolkit has seen handwritten digits "
            f"alone; {OFFICIAL_CHECKPOINTS}; or, if that backbone is meant, --checkpoint shipped"
        )
    complete_adapters(args)
    if args.task == "segmentation" and sources["class_weights"] == "default":
        args.class_weights = "balanced"  # its score is a mean over classes
    if args.task == "segmentation" and sources["augmentation"] == "config":
        args.augmentation = "crop"  # the shipped backbone's file has that of digits
    if is_none(args.checkpoint):
        args.head_init = "random"  # there is nothing yet that a probe could find
    if args.lora_init is None:  # over a random head the gradient is random too
        args.lora_init = "gradient" if args.head_init == "probe" else "random"
    complete_resume(args)
    return problems


def complete_resume(args: argparse.Namespace) -> None:
    """Fill in the file to resume: that of --output-dir, unless a path is given."""
    if args.resume == Path():  # the flag alone
        args.resume = args.output_dir / "last.pth"
    elif args.resume is not None and args.resume.name == str(args.resume) and not os.path.exists(args.resume):
        args.resume = args.output_dir / args.resume


# ----------------------------------------------------------------------------------------------------------------------
# What goes together


def adapter_problems(args: Any, typed: Container[str]) -> list[str]:
    """What is wrong with the options of the adapters together, one line each. `typed`: see `parse_args`."""
    if args.lora_rank > 0:
        return []
    needless = [name for name in ("use_qlora", "adapt_last", "rank_pattern") if getattr(args, name)]
    needless += [name for name in _OF_ADAPTERS if name in typed]
    return [f"{flag(name)} with --lora-rank 0: there are no adapters; raise the rank" for name in needless]


# A configuration may have these for its runs with adapters, so they are refused only if they are typed.
_OF_ADAPTERS = ("lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "lora_init")


def fine_tuning_problems(args: Any, typed: Container[str]) -> list[str]:
    """What is wrong with the options of fine-tuning together, one line each. `typed`: see `parse_args`."""
    problems = option_problems(args.checkpoint, args.arch, args.heads, _in_fewer_bits(args))
    if args.stage1_adapter is not None and not os.path.exists(args.stage1_adapter):
        problems.append(
            f"--stage1-adapter {args.stage1_adapter}: file not found; give the path of an existing adapter file"
        )
    problems += _random_weight_problems(args)
    problems += adapter_problems(args, typed)
    problems += _cache_problems(args)
    problems += _task_problems(args, typed)
    problems += _norm_problems(args)
    problems += _speed_problems(args)
    problems += _fold_problems(args)
    if not all_folds(args):
        problems += resume_problems(args)
    if args.warmup_epochs > args.epochs:
        problems.append(
            f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}: the learning rate "
            "would never get to its peak; lower it"
        )
    return problems


def resume_problems(args: Any) -> list[str]:
    """A line if there is nothing to resume."""
    if args.resume is None or os.path.exists(args.resume):
        return []
    return [f"--resume {args.resume}: no such file, so there is nothing to go on with; start without --resume"]


def _random_weight_problems(args: Any) -> list[str]:
    """What does not go together with --checkpoint none, one line each."""
    problems = []
    if is_none(args.checkpoint) and args.freeze_backbone:
        problems.append("--checkpoint none with a frozen backbone trains nothing useful; add --no-freeze-backbone")
    if is_none(args.checkpoint) and args.stage1_adapter is not None:
        problems.append("--checkpoint none with --stage1-adapter: there is no base for it to be merged into; drop one")
    return problems


def _in_fewer_bits(args: Any) -> str | None:
    """The option by which frozen weights are stored in 4 or 8 bits, if one is given."""
    if args.use_qlora:
        return "--use-qlora"
    if args.arithmetic == "int8" and args.freeze_backbone:
        return "--arithmetic int8"
    return None


def _cache_problems(args: Any) -> list[str]:
    """The options that make cached features invalid, one line each."""
    if args.cache_features == "none":
        return []
    reasons = {
        "--adapt-last, or --lora-rank 0": args.lora_rank > 0 and args.adapt_last is None,
        "--freeze-backbone": not args.freeze_backbone,
        "--norms frozen": args.norms == "train",
        "--mixup 0": args.mixup > 0,
    }
    return [
        f"--cache-features needs {remedy}: cached features must be the same in every epoch"
        for remedy, applies in reasons.items()
        if applies
    ]


def _task_problems(args: Any, typed: Container[str]) -> list[str]:
    """The options that do not go together with --task, one line each."""
    task = TASKS[args.task]
    problems = []
    if args.keep_best is not None and args.keep_best not in task.best_by:
        problems.append(f"--keep-best {args.keep_best} with --task {args.task}: use {' or '.join(task.best_by)}")
    if "unknown" in typed and args.task != "multilabel":
        problems.append(f"--unknown with --task {args.task}: only labels of --task multilabel may be unknown; drop it")
    if args.label_columns and (not args.data_list or args.task == "segmentation"):
        problems.append("--label-columns: only a --data-list of classes, labels or numbers has such columns; drop it")
    if args.task != "segmentation":
        for name in ("classes", "unknown_value"):
            if name in typed:
                problems.append(f"{flag(name)} with --task {args.task}: only masks have it; use --task segmentation")
    if args.task == "segmentation":
        return problems + _mask_problems(args)
    if args.task == "classification":
        return problems
    if not args.data_list:
        form = "`path,3.5` lines"
        if args.task == "multilabel":
            form = '`path,"a,b"` lines, or a column for each label'
        problems.append(f"--task {args.task} needs --data-list with {form}: folders say one class for each image")
    one_class = {
        "--labels-per-class": args.labels_per_class is not None,
        "--label-smoothing": args.label_smoothing > 0,
        "--class-weights balanced": args.class_weights == "balanced" and args.task == "regression",
    }
    for name, given in one_class.items():
        if given:
            problems.append(f"{name} with --task {args.task}: it is for images of one class; drop it")
    return problems


def _mask_problems(args: Any) -> list[str]:
    """What is not possible with masks, one line each."""
    refused = {
        f"--augmentation {args.augmentation}": args.augmentation not in ("crop", "none"),
        f"--mixup {args.mixup:g}": args.mixup > 0,
        f"--cache-features {args.cache_features}": args.cache_features != "none",
        "--labels-per-class": args.labels_per_class is not None,
    }
    problems = [
        f"{name} with --task segmentation: not possible with masks; drop it"
        for name, applies in refused.items()
        if applies
    ]
    if args.dataset != "imagefolder":
        problems.append(
            f"--task segmentation: --dataset {args.dataset} has no masks; give --data-dir with the folders images/ and "
            "masks/, or --data-list with `image,mask` lines"
        )
    return problems


def _norm_problems(args: Any) -> list[str]:
    """What does not go together with --norms, one line each."""
    problems = []
    if args.norms == "train" and args.adapt_last and args.use_qlora:
        problems.append(
            "--norms train with --adapt-last and --use-qlora: the norms below would train through weights in 4 bits, "
            "which backward would hold as floats; drop one of the three"
        )
    if args.norms == "follow" and (args.lora_rank == 0 or not args.freeze_backbone):
        problems.append(
            "--norms follow lets frozen BatchNorms follow adapters: not with --lora-rank 0 or --no-freeze-backbone; "
            "drop one of the two"
        )
    if args.norms in ("train", "frozen") and not args.freeze_backbone:
        problems.append(f"--norms {args.norms} with --no-freeze-backbone: everything trains; drop one of the two")
    return problems


def _speed_problems(args: Any) -> list[str]:
    """What does not go together of bits, memory and the compiler, one line each."""
    problems = []
    if args.use_qlora and not args.freeze_backbone:
        problems.append("--use-qlora with --no-freeze-backbone: weights in 4 bits cannot train; drop one of the two")
    if args.arithmetic == "int8" and args.use_qlora:
        problems.append("--arithmetic int8 with --use-qlora: the weights are stored in 8 bits; drop one of the two")
    if args.arithmetic == "int8" and not args.freeze_backbone:
        problems.append("--arithmetic int8 with --no-freeze-backbone: nothing is frozen; drop one of the two")
    if args.activation_precision == 16 and args.gradient_checkpointing == "full":
        problems.append("--activation-precision 16 with --gradient-checkpointing full has nothing to round: drop one")
    for given, usual in (("activation_precision", 32), ("gradient_checkpointing", "none")):
        if args.compile and getattr(args, given) != usual:
            problems.append(f"--compile with {flag(given)}: the compiler decides what is saved for backward; drop one")
    return problems


def _fold_problems(args: Any) -> list[str]:
    """What does not go together with --folds, one line each."""
    problems = []
    if args.folds is not None and args.eval_split == "validation":
        problems.append("--folds with --eval-split validation: both say what to evaluate on; drop one of the two")
    if all_folds(args) and args.resume and args.resume != args.output_dir / "last.pth":
        problems.append(f"--folds {args.folds} with --resume {args.resume}: give --resume alone, and --output-dir")
    return problems


# ----------------------------------------------------------------------------------------------------------------------
# What options mean to others


def all_folds(args: Any) -> bool:
    """Are all parts of a cross-validation asked for, and not one?"""
    return args.folds is not None and splitting.read_folds(args.folds)[0] is None


def lora_options(args: AdapterOptions) -> dict[str, Any]:
    """The arguments of `add_lora_to_model`, which adapter files record. Empty without adapters."""
    if args.lora_rank == 0:
        return {}
    return {
        "r": args.lora_rank,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": args.lora_dropout,
        "target_modules": _as_list(args.target_modules),
        "exclude_modules": _as_list(args.exclude_modules),
        "use_qlora": args.use_qlora,
        "adapt_last": args.adapt_last,
        "rank_pattern": read_pattern(args.rank_pattern),
    }


def _as_list(names: Iterable[str] | None) -> list[str] | None:
    return None if names is None else list(names)


def backbone_shape(args: ShapeOptions) -> dict[str, Any]:
    """The arguments of `load_backbone` that describe the network. The first layer is fitted to other channels."""
    return {
        "arch": args.arch,
        "image_size": args.image_size,
        "heads": args.heads,
        "channels": args.channels,
        "channel_fit": "timm",
    }


def image_sources(args: ImageOptions, read: bands.Bands | None = None) -> dict[str, Any]:
    """The keyword arguments of `load_splits`: where a user's images are, and what is read of them."""
    sources = {
        "val_dir": args.val_dir,
        "data_list": args.data_list,
        "skip_unreadable": args.skip_unreadable,
        "bands": read,
    }
    if isinstance(args, DataOptions):
        for name in ("task", "unknown", "label_columns", "group_by", "folds"):
            sources[name] = getattr(args, name)
    return sources


def scaling_of(args: Any) -> bands.Scaling:
    """What the options say of the numbers in image files."""
    return bands.Scaling(args.scale, args.mean, args.std, args.bands, args.normalise)


def known_image_values(args: Any, checkpoint: Path | None) -> tuple[bands.Scaling, bands.Bands | None]:
    """What the options say of the numbers in image files or else, where it is known, the checkpoint's pretraining.

    Args:
        args: `ImageOptions` and `ShapeOptions`.

    Returns:
        These values, and the bands that are read of a user's images, as many as the first layer takes; None: they are
        RGB photographs.
    """
    channels = 3
    metadata: dict[str, Any] = {}
    file = checkpoint
    with contextlib.suppress(InputError):  # reported when the backbone is built
        if checkpoint is not None:
            channels, metadata = find_images(checkpoint, args.arch)
        adapter = getattr(args, "stage1_adapter", None)
        if adapter is not None:
            content = read_checkpoint(adapter)
            about = content.get("metadata") if isinstance(content, dict) else None
            if isinstance(about, dict) and "mean" in about:
                metadata = about
                file = adapter
    channels = args.channels or channels
    known = known_scaling(scaling_of(args), channels, metadata, file)
    return known, bands.bands_of(known, channels)
