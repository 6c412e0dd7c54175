"""The options of both scripts: flag and YAML key, type and default of each, and what goes together."""

import argparse
import contextlib
import os
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit import InputError
from toolkit.answers.tasks import TASKS
from toolkit.config import (
    any_float,
    by_layer,
    flag,
    folds,
    fraction,
    non_negative_float,
    non_negative_int,
    or_auto,
    positive_float,
    positive_int,
    positive_share,
    read_pattern,
    worker_count,
)
from toolkit.devices import ARITHMETICS, PRECISIONS
from toolkit.files import found_path, read_checkpoint
from toolkit.images import bands, splitting
from toolkit.images.cache import CACHES
from toolkit.images.data import DATASETS, EVAL_SPLITS, UNLABELLED_SET
from toolkit.images.families import FAMILIES, take_known_values
from toolkit.images.lists import UNKNOWN
from toolkit.images.transforms import AUGMENTATIONS, CROP_MIN
from toolkit.models.backbones import ARCHS, TIMM
from toolkit.models.checkpoints import (
    CHANNEL_FITS,
    OFFICIAL_CHECKPOINTS,
    checkpoint_path,
    find_images,
    is_none,
    option_problems,
)
from toolkit.run.optim import SCHEDULES

# ----------------------------------------------------------------------------------------------------------------------
# The options that both scripts have, and those of fine-tuning

# The options of fine-tuning that people need: `--help` and README show them, in this order.
NEEDED = ("data_dir", "checkpoint", "output_dir", "epochs", "learning_rate", "lora_rank", "lora_alpha", "batch_size")
NEEDED += ("use_qlora", "precision", "augmentation", "class_weights", "norms", "adapt_last", "resume")


def add_run_options(parser: argparse.ArgumentParser, output_dir: Path) -> argparse._ArgumentGroup:
    """Add the group `run`, which is for the command line only."""
    run = parser.add_argument_group("run")
    run.add_argument("--config", type=Path, help="YAML file with values for the options below")
    run.add_argument("--output-dir", type=Path, default=output_dir, help="folder for all results")
    run.add_argument(
        "--resume",
        type=Path,
        nargs="?",
        const=Path(),
        help="go on with the stopped run in --output-dir, or with the one whose last.pth is given",
    )
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    run.add_argument("--tensorboard", action="store_true", help="log each epoch for TensorBoard as well")
    return run


def add_data_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the group and YAML section `data`."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset", choices=DATASETS, help="default: imagefolder if you name images of your own, else digits"
    )
    group.add_argument(
        "--data-dir", type=Path, help="folder with train/ and val/, or a folder per class; default: digits"
    )
    group.add_argument("--val-dir", type=Path, help="evaluation images, if not in --data-dir: one folder per class")
    group.add_argument(
        "--data-list",
        type=Path,
        nargs="+",
        action="extend",
        help="list of `path,label` lines, or two: for training and for evaluation",
    )
    group.add_argument(
        "--eval-split",
        choices=EVAL_SPLITS,
        default="held-out",
        help="where the evaluation images come from; validation: a part of the training images, to choose settings",
    )
    group.add_argument(
        "--skip-unreadable",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave out, and list, images that cannot be read",
    )
    group.add_argument("--workers", type=worker_count, default="auto", help="processes that load images")
    _add_band_options(group)
    return group


def _add_band_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that say what the values of images mean that are not RGB photographs: see `images.bands`."""
    several = {"nargs": "+", "action": "extend"}
    group.add_argument("--bands", **several, help="bands to read from a file, as 4,3,2; 0: zeros (default: all)")
    group.add_argument("--scale", type=positive_float, help="divisor of the files' values, as 10000")
    group.add_argument(
        "--mean",
        type=any_float,
        **several,
        help="mean of each channel, or one for all, after --scale; default: the backbone's",
    )
    group.add_argument("--std", type=any_float, **several, help="standard deviations, given like --mean")
    known = ("data", *FAMILIES)
    group.add_argument(
        "--normalise", choices=known, help="data: mean and std measured on training images; or a known family's"
    )


def add_training_data_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of the group `data` that only fine-tuning has."""
    group.add_argument(
        "--task",
        choices=tuple(TASKS),
        default="classification",
        help="one class an image; multilabel: several labels; regression: numbers; the last two in --data-list",
    )
    group.add_argument(
        "--unknown", choices=UNKNOWN, default="ignore", help="what an unknown label counts as, with --task multilabel"
    )
    group.add_argument(
        "--group-by", help="a list's column, or a folder's level, that names the patient or field: none is on two sides"
    )
    group.add_argument(
        "--folds", type=folds, help="cross-validate over so many parts, a run for each; 2/5: that of the second of five"
    )
    group.add_argument("--labels-per-class", type=positive_int, help="train on only so many images of each class")
    group.add_argument(
        "--augmentation", choices=AUGMENTATIONS, default="crop", help="crop, trivial: photographs; affine: digits; none"
    )
    group.add_argument("--crop-min", type=fraction, default=CROP_MIN, help="smallest share of an image in a crop")
    group.add_argument(
        "--cache-features",
        choices=CACHES,
        default="none",
        help="run the frozen blocks below --adapt-last only once per image and view",
    )


def add_model_options(parser: argparse.ArgumentParser, checkpoint: Path) -> argparse._ArgumentGroup:
    """Add the group and YAML section `model`; `checkpoint` is the default of that option."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        type=checkpoint_path,
        default=checkpoint,
        help="file of MoCo, torchvision or timm; shipped: for digits; none: random weights",
    )
    archs = ",".join((*ARCHS, f"{TIMM}NAME"))  # `option_problems` checks it
    group.add_argument("--arch", metavar=f"{{{archs}}}", help="architecture, or timm:NAME; default: the checkpoint's")
    add_shape_options(group)
    group.add_argument("--image-size", type=positive_int, help="pixels; default: what the backbone was made for")
    group.add_argument("--stage1-adapter", type=Path, help="moco_lora.pth of moco.pretrain, merged into the checkpoint")
    group.add_argument(
        "--from-scratch",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="random weights in the checkpoint's architecture",
    )
    return group


def add_shape_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that describe a backbone beside its arch."""
    group.add_argument("--heads", type=positive_int, help="attention heads of a ViT; default: as its layout implies")
    group.add_argument(
        "--channels", type=positive_int, help="channels of the images; default: the checkpoint's, else 3"
    )
    group.add_argument("--channel-fit", choices=CHANNEL_FITS, help="fit the first layer to other --channels")


def backbone_shape(args: argparse.Namespace) -> tuple:
    """The arguments of `load_backbone` from `arch` on. Random weights fit any number of channels."""
    fit = "timm" if getattr(args, "from_scratch", False) else args.channel_fit
    return args.arch, args.image_size, args.heads, args.channels, fit


def complete_data_options(args: argparse.Namespace, sources: dict[str, str]) -> list[str]:
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
        args.dataset = "imagefolder" if args.data_dir or args.data_list or args.val_dir else "digits"
    args.bands = bands.split_names(args.bands)
    problems = bands.option_problems(args)
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


def unlabelled_problems(args: argparse.Namespace) -> list[str]:
    """The options that images without labels have no use for, one line each."""
    needless = {"--val-dir": args.val_dir, "a second --data-list": args.data_list and len(args.data_list) > 1}
    return [
        f"{name} with images without labels: they are not evaluated on; drop it" for name in needless if needless[name]
    ]


PATHS = ("data_dir", "val_dir", "data_list", "knn_dir", "checkpoint", "stage1_adapter")  # of what a run reads

# These may differ when a run is resumed: the digest of the images catches a changed data set.
PLACES_OF_IMAGES = ("data_dir", "val_dir", "data_list", "skip_unreadable")
# These options of fine-tuning, as `section.key`, may differ too: they do not change what is computed.
FREE_TO_CHANGE = (
    *("model.checkpoint", "model.stage1_adapter", "data.workers"),
    *(f"data.{name}" for name in PLACES_OF_IMAGES),
)


def free_to_change(model: nn.Module) -> tuple[str, ...]:
    """The settings in which a run of this model may go on otherwise: without a BatchNorm what becomes of them too."""
    has_norms = any(isinstance(module, _BatchNorm) for module in model.modules())
    return FREE_TO_CHANGE if has_norms else (*FREE_TO_CHANGE, "finetune.norms")


def image_sources(args: argparse.Namespace, read: bands.Bands | None = None) -> dict[str, Any]:
    """The keyword arguments of `data.load_splits`: where a user's images are, and what is read of them."""
    names = (
        "val_dir",
        "data_list",
        "skip_unreadable",
        "task",
        "unknown",
        "group_by",
        "folds",
    )  # pretraining lacks four
    return {name: value for name, value in vars(args).items() if name in names} | {"bands": read}


def all_folds(args: argparse.Namespace) -> bool:
    """Are all parts of a cross-validation asked for, and not one?"""
    return args.folds is not None and splitting.read_folds(args.folds)[0] is None


def bands_read(args: argparse.Namespace) -> bands.Bands | None:
    """The bands that are read from a user's images: as many as the first layer takes. None: they are RGB photographs.

    Fills in scale, mean and std of the pretraining if they are known: see `take_known_values`.
    """
    channels = 3
    metadata: dict[str, Any] = {}
    file = args.checkpoint
    with contextlib.suppress(InputError):  # reported when the backbone is built
        if args.checkpoint is not None:
            channels, metadata = find_images(args.checkpoint, args.arch)
        if (adapter := getattr(args, "stage1_adapter", None)) is not None:
            content = read_checkpoint(adapter)
            about = content.get("metadata") if isinstance(content, dict) else None
            if isinstance(about, dict) and "mean" in about:
                metadata, file = about, adapter
    channels = args.channels or channels
    take_known_values(args, channels, metadata, file)
    return bands.bands_of(args, channels)


def add_adapter_options(group: argparse._ArgumentGroup, rank: int) -> None:
    """Add the options of the adapters. Both scripts have them, each in its own group and with its own default rank."""
    switch = argparse.BooleanOptionalAction
    group.add_argument(
        "--lora-rank", "--rank", type=non_negative_int, default=rank, help="width of adapters, r; 0: none"
    )
    group.add_argument(
        "--lora-alpha",
        "--alpha",
        type=positive_float,
        help="the update is scaled by alpha / r; default: 2 r",
    )
    group.add_argument("--lora-dropout", type=fraction, default=0.0, help="dropout probability on the adapters' input")
    group.add_argument("--use-rslora", action=switch, default=False, help="scale by alpha / sqrt(r)")
    group.add_argument("--use-qlora", "--qlora", action=switch, default=False, help="frozen weights in 4 bits")
    group.add_argument(
        "--rank-pattern", type=by_layer(positive_int), nargs="+", action="extend", help="other ranks, as layer4=16"
    )
    group.add_argument(
        "--target-modules", nargs="+", action="extend", help="layers to adapt: names, suffixes or regular expressions"
    )
    group.add_argument("--exclude-modules", nargs="+", action="extend", help="layers to leave alone")
    group.add_argument(
        "--adapt-last", type=positive_int, help="only so many last blocks (ViT) or stages (ResNet); default: all"
    )


def complete_adapter_options(args: argparse.Namespace) -> None:
    """Fill in alpha, by default twice the rank; without adapters, that of the usual rank, 8."""
    if args.lora_alpha is None:
        args.lora_alpha = 2.0 * (args.lora_rank or 8)


def lora_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `add_lora_to_model`, which adapter files record. Empty without adapters."""
    if args.lora_rank == 0:
        return {}
    names = ("lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_qlora", "use_rslora", "adapt_last")
    settings = {name: getattr(args, name) for name in names}
    return {"r": args.lora_rank, **settings, "rank_pattern": read_pattern(args.rank_pattern)}


def adapter_problems(args: argparse.Namespace, typed: Container[str]) -> list[str]:
    """What is wrong with the options of the adapters together, one line each. `typed`: see `typed_options`."""
    if args.lora_rank > 0:
        return []
    needless = [name for name in ("use_qlora", "adapt_last", "rank_pattern") if getattr(args, name)]
    needless += [name for name in _OF_ADAPTERS if name in typed]
    return [f"{flag(name)} with --lora-rank 0: there are no adapters; raise the rank" for name in needless]


# A configuration may have these for its runs with adapters, so they are refused only if they are typed.
_OF_ADAPTERS = ("lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "lora_init")
_OF_ADAPTERS += ("base_dtype",)


NORMS = ("auto", "frozen", "follow", "train")


def add_finetune_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the group and YAML section `finetune`."""
    switch = argparse.BooleanOptionalAction
    tune = parser.add_argument_group("finetune")
    add_adapter_options(tune, rank=8)
    tune.add_argument("--freeze-backbone", action=switch, default=True, help="train adapters and head alone")
    tune.add_argument(
        "--norms",
        choices=NORMS,
        default="auto",
        help="follow: a ResNet's statistics follow the adapters; train: slow on ResNets; auto: follow, on a GPU frozen",
    )
    tune.add_argument(
        "--learning-rate",
        "--lr",
        type=or_auto(positive_float),
        default=1e-4,
        help="AdamW's peak rate; adapters that start at the gradient use 24 times it; auto: search",
    )
    tune.add_argument(
        "--head-init", choices=("probe", "random"), default="probe", help="how the classifier head starts"
    )
    tune.add_argument(
        "--lora-init",
        choices=("gradient", "random"),
        help="how A starts (default: at the loss's gradient; at random if the head does)",
    )
    tune.add_argument("--head-learning-rate", type=positive_float, help="default: --learning-rate")
    tune.add_argument(
        "--class-weights", choices=("none", "balanced"), default="none", help="balanced: rare classes count more"
    )
    tune.add_argument("--epochs", type=positive_int, default=10, help="passes over the training images")
    tune.add_argument("--batch-size", type=positive_int, default=32, help="images per batch, over all processes")
    tune.add_argument("--accumulation-steps", type=positive_int, default=1, help="batches per optimizer step")
    tune.add_argument("--weight-decay", type=non_negative_float, default=0.01, help="weight decay of AdamW")
    tune.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="cosine, step or constant")
    tune.add_argument("--warmup-epochs", type=non_negative_float, default=0.0, help="epochs of linear warm-up")
    tune.add_argument("--label-smoothing", type=fraction, default=0.0, help="label smoothing factor")
    tune.add_argument("--mixup", type=non_negative_float, default=0.0, help="alpha of mixup, as 0.2; 0: none")
    tune.add_argument("--cutmix", type=non_negative_float, default=0.0, help="alpha of CutMix, as 1; 0: none")
    tune.add_argument("--ema", type=fraction, default=0.0, help="decay of an average of the weights, as 0.999; 0: none")
    tune.add_argument(
        "--wise-ft",
        type=or_auto(positive_share),
        default="auto",
        help="share of the trained change that is saved; auto: grows with the images per class",
    )
    best_by = dict.fromkeys(by for task in TASKS.values() for by in task.best_by)
    tune.add_argument("--keep-best", choices=best_by, help="lora.pth is the best epoch by this, not the last")
    tune.add_argument("--clip-grad-norm", type=positive_float, help="clip the gradient's norm to this")
    _add_speed_options(tune)
    tune.add_argument("--seed", type=non_negative_int, default=0, help="seed of all random numbers")
    return tune


def _add_speed_options(tune: argparse._ArgumentGroup) -> None:
    """What a step computes in how many bits, keeps and compiles."""
    tune.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto: bf16 or fp16 on CUDA, else fp32")
    tune.add_argument(
        "--base-dtype",
        choices=PRECISIONS,
        default="auto",
        help="dtype of frozen weights, adapted or below --adapt-last; auto: --precision",
    )
    tune.add_argument(
        "--arithmetic",
        choices=ARITHMETICS,
        default="float",
        help="int8: multiply by frozen weights of linear layers and attention in 8 bits; for a ViT in fp32 on a CPU",
    )
    tune.add_argument(
        "--gradient-checkpointing",
        choices=("never", "none", "selective", "full"),
        default="none",
        help="what backward computes again. never (a ViT): nothing; none: LayerNorm, GELU; selective: attention, and "
        "BatchNorms that train; full: blocks",
    )
    tune.add_argument(
        "--activation-precision",
        type=int,
        choices=(32, 16),
        default=32,
        help="bits of the activations saved for backward; 16: half the bytes, rounded gradients",
    )
    tune.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile the training step's forward and backward: on CUDA into CUDA graphs; not yet run on a GPU",
    )


def settle_norms(args: argparse.Namespace, device: torch.device) -> None:
    """Let `auto` mean frozen on a GPU: none has run norms that follow, and they are predicted to be slow there.

    The settings of the run say so, so that it does not go on otherwise on another device.
    """
    if args.norms == "auto" and args.freeze_backbone and device.type != "cpu":
        args.norms = "frozen"


SAVES_MEMORY = (
    "lower --batch-size and raise --accumulation-steps by as much, or use --gradient-checkpointing selective (a ViT, "
    "or --norms train), --use-qlora, --precision bf16 or, which is slow, --gradient-checkpointing full"
)


def complete_finetune_options(args: argparse.Namespace, sources: dict[str, str]) -> list[str]:
    """Fill in the options that follow from others; return the problems with the data options, one line each."""
    problems = complete_data_options(args, sources)
    if sources["checkpoint"] == "default" and args.dataset != "digits" and not args.eval_only:
        images = next((flag(name) for name in ("data_dir", "data_list") if getattr(args, name)), "--dataset")
        problems.append(
            f"{images} without --checkpoint: the backbone that comes with the toolkit has seen handwritten digits "
            f"alone; {OFFICIAL_CHECKPOINTS}; or, if that backbone is meant, --checkpoint shipped"
        )
    complete_adapter_options(args)
    if args.from_scratch or is_none(args.checkpoint):
        args.head_init = "random"  # there is nothing yet that a probe could find
    if args.lora_init is None:  # over a random head the gradient is random too
        args.lora_init = "gradient" if args.head_init == "probe" else "random"
    for option, name in (("resume", "last.pth"), ("eval_only", "lora.pth")):
        path = getattr(args, option)
        if path == Path():  # the flag alone
            setattr(args, option, args.output_dir / name)
        elif path is not None and path.name == str(path) and not os.path.exists(path):
            setattr(args, option, args.output_dir / path)
    return problems


def _cache_problems(args: argparse.Namespace) -> list[str]:
    """The options that make cached features invalid, one line each."""
    if args.cache_features == "none":
        return []
    reasons = {
        "--adapt-last, or --lora-rank 0": args.lora_rank > 0 and args.adapt_last is None,
        "--freeze-backbone": not args.freeze_backbone,
        "--norms frozen": args.norms == "train",
        "--mixup 0": args.mixup > 0,
        "--cutmix 0": args.cutmix > 0,
    }
    return [
        f"--cache-features needs {remedy}: cached features must be the same in every epoch"
        for remedy, applies in reasons.items()
        if applies
    ]


def _without_effect(args: argparse.Namespace, typed: Container[str]) -> list[str]:
    """The typed options that change nothing, one line each."""
    problems = []
    if "crop_min" in typed and args.augmentation not in ("crop", "trivial"):
        problems.append(f"--crop-min with --augmentation {args.augmentation}, which crops nothing: drop one of the two")
    if "base_dtype" in typed and args.lora_rank > 0 and not args.freeze_backbone:
        problems.append("--base-dtype with --no-freeze-backbone: nothing is frozen; drop one of the two")
    if "arithmetic" in typed and args.arithmetic == "int8" and not (args.freeze_backbone or args.eval_only):
        problems.append("--arithmetic int8 with --no-freeze-backbone: nothing is frozen; drop one of the two")
    return problems


def _task_problems(args: argparse.Namespace, typed: Container[str]) -> list[str]:
    """The options that do not go together with --task, one line each."""
    task = TASKS[args.task]
    problems = []
    if args.keep_best is not None and args.keep_best not in task.best_by:
        problems.append(f"--keep-best {args.keep_best} with --task {args.task}: use {' or '.join(task.best_by)}")
    if "unknown" in typed and args.task != "multilabel":
        problems.append(f"--unknown with --task {args.task}: only labels of --task multilabel may be unknown; drop it")
    if args.task == "classification":
        return problems
    if not args.data_list:
        form = '`path,"a,b"` lines, or a column for each label' if args.task == "multilabel" else "`path,3.5` lines"
        problems.append(f"--task {args.task} needs --data-list with {form}: folders say one class for each image")
    one_class = {
        "--labels-per-class": args.labels_per_class is not None,
        "--cutmix": args.cutmix > 0,
        "--label-smoothing": args.label_smoothing > 0,
        "--class-weights balanced": args.class_weights == "balanced" and args.task == "regression",
    }
    wrong = [name for name, given in one_class.items() if given]
    return problems + [f"{name} with --task {args.task}: it is for images of one class; drop it" for name in wrong]


def finetune_problems(args: argparse.Namespace, typed: Container[str]) -> list[str]:
    """What is wrong with the options of fine-tuning together, one line each. `typed`: see `typed_options`."""
    fewer_bits = None
    if args.use_qlora:
        fewer_bits = "--use-qlora"
    elif args.arithmetic == "int8" and args.freeze_backbone:
        fewer_bits = "--arithmetic int8"
    elif args.base_dtype in ("bf16", "fp16") and args.freeze_backbone and args.lora_rank > 0:
        fewer_bits = f"--base-dtype {args.base_dtype}"
    problems = [] if args.eval_only else option_problems(args.checkpoint, args.arch, args.heads, fewer_bits)
    if args.stage1_adapter is not None and not args.eval_only and not os.path.exists(args.stage1_adapter):
        problems.append(
            f"--stage1-adapter {args.stage1_adapter}: file not found; give the path of an existing adapter file"
        )
    if args.use_qlora and not args.freeze_backbone:
        problems.append("--use-qlora with --no-freeze-backbone: weights in 4 bits cannot train; drop one of the two")
    if args.arithmetic == "int8" and not args.eval_only and (args.use_qlora or args.base_dtype != "auto"):
        other = "--use-qlora" if args.use_qlora else "--base-dtype"
        problems.append(f"--arithmetic int8 with {other}: the weights are stored in 8 bits; drop one of the two")
    problems += adapter_problems(args, typed) + _cache_problems(args) + _without_effect(args, typed)
    problems += [] if args.eval_only else _task_problems(args, typed)
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
    if args.norms == "train" and not args.freeze_backbone:
        problems.append("--norms train with --no-freeze-backbone: everything trains anyway; drop one of the two")
    if args.norms == "frozen" and not args.freeze_backbone:
        problems.append("--norms frozen with --no-freeze-backbone: everything trains; drop one of the two")
    if args.activation_precision == 16 and args.gradient_checkpointing == "full":
        problems.append("--activation-precision 16 with --gradient-checkpointing full has nothing to round: drop one")
    for given, set_to in (("activation_precision", 32), ("gradient_checkpointing", "none")):
        if args.compile and vars(args)[given] != set_to:
            problems.append(f"--compile with {flag(given)}: the compiler decides what is saved for backward; drop one")
    if args.from_scratch and args.freeze_backbone:
        problems.append("--from-scratch with a frozen backbone trains nothing useful; add --no-freeze-backbone")
    if args.from_scratch and args.stage1_adapter:
        problems.append("--from-scratch with --stage1-adapter: there is no base for it to be merged into; drop one")
    if args.folds is not None and args.eval_split == "validation":
        problems.append("--folds with --eval-split validation: both say what to evaluate on; drop one of the two")
    if all_folds(args) and args.eval_only:
        problems.append(f"--folds {args.folds} with --eval-only: say which part, as --folds 1/{args.folds}")
    if all_folds(args) and args.resume and args.resume != args.output_dir / "last.pth":
        problems.append(f"--folds {args.folds} with --resume {args.resume}: give --resume alone, and --output-dir")
    if args.resume and args.eval_only:
        problems.append("--resume with --eval-only: the one trains and the other does not; drop one of the two")
    if args.warmup_epochs > args.epochs:
        problems.append(
            f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}: the learning rate "
            "would never get to its peak; lower it"
        )
    return problems
