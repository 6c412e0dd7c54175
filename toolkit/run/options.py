"""The options of both scripts: flag and YAML key, type and default of each, and what goes together.

A class is a section of the YAML file and a field is an option. Options are read before PyTorch is loaded, completed,
checked together, and then frozen: what a run settles is in its `Plan`.
"""

import argparse
import contextlib
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from inspect import get_annotations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit import SHIPPED, TOOLKIT, InputError, attributes, choices, config, found_path, homed, same_file
from toolkit.choices import ARITHMETICS, AUGMENTATIONS, DATASETS, DEFAULT_TASK, KEEP_BEST, PRECISIONS, UNLABELLED_SET
from toolkit.config import any_float, flag, option, or_auto, positive_float, positive_int, several
from toolkit.images import remote
from toolkit.images.families import FAMILIES, Scaling, option_problems, split_names
from toolkit.models import published
from toolkit.models.names import ARCHS, TIMM, checkpoint_path, fetched, is_none, model_problems
from toolkit.run import output_folder

if TYPE_CHECKING:
    import torch

    from toolkit.images.bands import Bands

DEFAULT_CONFIG = TOOLKIT / "configs/stage1.yaml"
NORM_MODES = ("auto", "frozen", "follow", "train")
ARCH_NAMES = f"{{{','.join((*ARCHS, f'{TIMM}NAME'))}}}"  # as help shows them; `model_problems` checks --arch
BEST_BY = sum(map(tuple, KEEP_BEST.values()), ())

# The options of fine-tuning that people need: `--help` and README show them, in this order.
NEEDED = (
    *("data_dir", "task", "checkpoint", "arch", "image_size", "output_dir"),
    *("epochs", "learning_rate", "lora_rank", "lora_alpha", "batch_size", "use_qlora"),
    *("precision", "augmentation", "class_weights", "norms", "adapt_last", "resume"),
)

SAVES_MEMORY = "lower --batch-size and raise --accumulation-steps by as much, or use --use-qlora, --precision bf16 or, "
SAVES_MEMORY += "which is slow, --gradient-checkpointing full"

# ---------------------------------------------------------------------------------------------- the options, by section


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What is for the command line only."""

    config: Path | None = option(None, "YAML file with values for the options below", type=homed)
    output_dir: Path = option(Path("checkpoints/lora"), "folder for all results", type=homed)
    resume: Path | None = option(None, "go on in --output-dir, or from a last.pth", type=homed, nargs="?", const=Path())
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """What describes a backbone besides its arch."""

    heads: int | None = option(None, "attention heads of a ViT; default: as its layout implies", type=positive_int)
    channels: int | None = option(None, "channels of the images; default: the checkpoint's", type=positive_int)
    image_size: int | None = option(None, "pixels; default: what the backbone was made for", type=positive_int)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ShapeOptions):
    checkpoint: Path = option(SHIPPED, "a file, moco-v2-800ep, timm:NAME, shipped; none: random", type=checkpoint_path)
    arch: str | None = option(None, "architecture, or timm:NAME; default: the checkpoint's", metavar=ARCH_NAMES)
    stage1_adapter: Path | None = option(None, "moco_lora.pth of moco.pretrain, merged into the checkpoint", type=homed)


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """The part of section `data` that both scripts read: where images are, and what their numbers mean."""

    dataset: str | None = option(None, "default: imagefolder with images of your own, else digits", choices=DATASETS)
    data_dir: Path | None = option(None, "folder with train/ and val/, or one per class; default: digits", type=homed)
    val_dir: Path | None = option(None, "evaluation images, if not in --data-dir: one folder per class", type=homed)
    data_list: tuple[Path, ...] | None = several("list of `path,label` lines; 2nd: for evaluation", type=homed)
    eval_split: str = option("held-out", "validation: of the training images", choices=("held-out", "validation"))
    skip_unreadable: bool = option(False, "leave out, and list, images that cannot be read")
    workers: int | str = option("auto", "processes that load images", type=config.worker_count)
    bands: tuple[str, ...] | None = several("bands to read from a file, like 4,3,2; 0: zeros (default: all)")
    scale: float | None = option(None, "divisor of the files' values, like 10000", type=positive_float)
    mean: tuple[float, ...] | None = several("per channel, or one, after --scale; default: backbone's", type=any_float)
    std: tuple[float, ...] | None = several("standard deviations, given like --mean", type=any_float)
    normalise: str | None = option(None, "data: mean, std of training images; a family's", choices=("data", *FAMILIES))


@dataclass(frozen=True, kw_only=True)
class DataOptions(ImageOptions):
    task: str = option(DEFAULT_TASK, "multilabel, regression: of a --data-list; segmentation: masks", choices=KEEP_BEST)
    label_columns: tuple[str, ...] | None = several("labels or numbers of a list, as A,B or A..B; default: all others")
    group_by: str | None = option(None, "column or folder level that names patients or fields; each stays on one side")
    folds: str | None = option(None, "cross-validate over this many parts; 2/5: the second of five", type=config.folds)
    classes: tuple[str, ...] | None = several("classes in masks: names, or a file with values or colours")
    unknown_value: tuple[float, ...] | None = several("unknown pixels in masks; 255 if no class", type=any_float)
    labels_per_class: int | None = option(None, "train on only this many images of each class", type=positive_int)
    unlabelled: Path | None = option(None, "folder or list of images without labels, which help few labels", type=homed)
    augmentation: str = option("crop", "crop, trivial: photographs; affine: digits; none", choices=AUGMENTATIONS)
    cache_features: str = option("none", "disk: run blocks below --adapt-last once per view", choices=("none", "disk"))


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What both scripts ask of adapters, each in its own section and with its own default rank."""

    lora_rank: int = option(8, "width of adapters, r; 0: none", type=config.non_negative_int, flags=("--rank",))
    lora_alpha: float | None = option(
        None, "the update is scaled by alpha / r; default: 2 r", type=positive_float, flags=("--alpha",)
    )
    lora_dropout: float = option(0.0, "dropout probability on the adapters' input", type=config.fraction)
    use_qlora: bool = option(False, "frozen weights in 4 bits", flags=("--qlora",))
    target_modules: tuple[str, ...] | None = several("layers to adapt: names, suffixes or regular expressions")
    adapt_last: int | None = option(None, "only this many last blocks or stages; default: all", type=positive_int)


@dataclass(frozen=True, kw_only=True)
class TuneOptions(AdapterOptions):
    freeze_backbone: bool = option(True, "train adapters and head alone")
    norms: str = option("auto", "of ResNets; auto: follow adapters, on a GPU frozen; train: slow", choices=NORM_MODES)
    learning_rate: float | str = option(
        1e-4, "peak; adapters use 24 times it, ResNets' 48; auto: search", type=or_auto(positive_float), flags=("--lr",)
    )
    head_init: str = option("probe", "start of the classifier head", choices=("probe", "random"))
    lora_init: str | None = option(None, "start of A; default: random if the head is", choices=("gradient", "random"))
    class_weights: str = option("none", "balanced: rare ones count more; masks' default", choices=("none", "balanced"))
    threshold: str = option("f1", "of labels: f1, sensitivity=0.95 or specificity=0.9", type=config.threshold_goal)
    epochs: int = option(10, "passes over the training images, each of at least 12 steps", type=positive_int)
    batch_size: int = option(32, "images per batch, over all processes", type=positive_int)
    accumulation_steps: int = option(1, "batches per optimizer step", type=positive_int)
    weight_decay: float = option(0.01, "weight decay of AdamW", type=config.non_negative_float)
    warmup_epochs: float = option(1.0, "epochs of linear warm-up", type=config.non_negative_float)
    label_smoothing: float = option(0.0, "label smoothing factor", type=config.fraction)
    keep_best: str | None = option(None, "lora.pth is the best epoch by this, not the last", choices=BEST_BY)
    clip_grad_norm: float | None = option(None, "clip the gradient's norm to this", type=positive_float)
    precision: str = option("auto", "of products; auto: 16 bits on CUDA, and on a CPU if faster", choices=PRECISIONS)
    arithmetic: str = option("float", "int8: frozen layers in 8 bits; for a ViT in fp32 on a CPU", choices=ARITHMETICS)
    gradient_checkpointing: str = option("none", "full: backward recomputes whole blocks", choices=("none", "full"))
    seed: int = option(0, "seed of all random numbers", type=config.non_negative_int)


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions(RunOptions, ModelOptions, DataOptions, TuneOptions):
    """All options of a fine-tuning run."""


YAML_SECTIONS = {"model": ModelOptions, "data": DataOptions, "finetune": TuneOptions}


def stored_sections(args: FineTuneOptions, sources: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The options in the sections of a YAML file; with `sources` those that were typed, or are in one, alone."""
    args = replace(args, checkpoint=Path(published.NAMES.get(args.checkpoint, args.checkpoint)))
    found: dict[str, Any] = {}
    for title, section in YAML_SECTIONS.items():
        found[title] = {}
        for field in fields(section):
            if sources is None or sources[field.name] in ("config", "command line"):
                found[title][field.name] = config.stored(getattr(args, field.name))
    if sources is not None and config.OF_SHIPPED in sources.values():
        found[config.OF_SHIPPED] = True
    return found


class Plan(NamedTuple):
    """What options leave open, settled by the machine, the checkpoint and the images."""

    device: "torch.device"
    dtype: "torch.dtype"  # of products, by autocast
    precision: str  # by which this dtype was chosen; auto on a GPU
    image_values: dict[str, Any]  # by name of the option: bands, scale, mean, std, normalise
    normalization: dict[str, Any]  # of each channel, as transforms take it: see `bands.settle`
    norms: str  # frozen, follow, train; auto until it is known whether any can follow, and where everything trains
    rate_searched: bool = False  # by the run that is resumed

    def settings(self, args: FineTuneOptions) -> dict[str, dict[str, Any]]:
        """The options, with what is settled, in the sections of a YAML file: a resumed run has to have the same."""
        settings = stored_sections(args)
        settings["data"] |= {name: config.stored(value) for name, value in self.image_values.items()}
        settings["finetune"] |= {"precision": self.precision, "norms": self.norms}
        return settings


# Keys of sections that both scripts read, but which are fine-tuning's alone: pretraining ignores them.
OF_FINE_TUNING = {"model": get_annotations(ModelOptions).keys() - {"arch"}, "data": get_annotations(DataOptions).keys()}

PATHS = ("data_dir", "val_dir", "data_list", "unlabelled", "knn_dir", "checkpoint", "stage1_adapter")

# These may differ when a run is resumed: the digest of the images catches a changed data set.
PLACES_OF_IMAGES = ("data_dir", "val_dir", "data_list", "unlabelled", "skip_unreadable")
# These options of fine-tuning, as `section.key`, may differ too: they do not change what is computed.
FREE_TO_CHANGE = ("model.checkpoint", "model.stage1_adapter", "data.workers", *map("data.{}".format, PLACES_OF_IMAGES))


def make_parser(description: str = "") -> argparse.ArgumentParser:
    """The command line. Groups `model`, `data` and `finetune` are the sections of the YAML file as well."""
    parser = config.make_parser({"run": RunOptions, **YAML_SECTIONS}, description=description, add_help=False)
    config.add_help(parser, NEEDED)
    return parser


def read_options(argv: Sequence[str] | None = None, description: str = "") -> tuple[FineTuneOptions, dict[str, str]]:
    """Options and where each came from: defaults < YAML < command line. Raises InputError with every problem found."""
    args, sources = config.parse_args(make_parser(description), argv, DEFAULT_CONFIG, complete_fine_tuning)
    args.checkpoint = fetched(args.checkpoint)
    return config.frozen(FineTuneOptions, args), sources


# -------------------------------------------------------------------- what follows from options, before they are frozen


def complete_shared(args: argparse.Namespace, origins: dict[str, str], typed: Container[str]) -> Iterator[str]:
    """Fill in what follows from options that both scripts have; yield what is wrong with them, one line each."""
    if args.lora_alpha is None:  # without adapters the usual rank's
        args.lora_alpha = 2.0 * (args.lora_rank or 8)
    if args.resume == Path():  # the flag alone
        args.resume = args.output_dir / "last.pth"
    elif args.resume is not None and args.resume.name == str(args.resume) and not os.path.exists(args.resume):
        args.resume = args.output_dir / args.resume
    for name in PATHS:
        if origins.get(name) == "config" and (value := getattr(args, name)):  # stage 1 has not all of them
            setattr(args, name, list(map(found_path, value)) if isinstance(value, list) else found_path(value))
    if args.dataset is None:
        args.dataset = "imagefolder" if args.data_dir or args.data_list or args.val_dir else "digits"
    args.bands = split_names(args.bands)
    yield from option_problems(scaling_of(args), args.channels)
    if args.val_dir and args.data_list:
        yield "--val-dir with --data-list: give the evaluation images as a second list instead"
    elif args.val_dir and not args.data_dir:
        yield "--val-dir without --data-dir: give the folder of the training images as well"
    if args.dataset == UNLABELLED_SET:
        yield from unlabelled_problems(args)
    elif args.dataset != "imagefolder" and (args.val_dir or args.data_list):
        yield f"--dataset {args.dataset} has its own images: drop it, or --val-dir and --data-list"
    if args.lora_rank == 0:
        always = ("use_qlora", "adapt_last")
        # A configuration may have the others for its runs with adapters, so they are refused only if they are typed.
        for name in (*always, "lora_alpha", "lora_dropout", "target_modules", "lora_init"):
            if name in typed or (name in always and getattr(args, name)):
                yield f"{flag(name)} with --lora-rank 0: there are no adapters; raise the rank"
    if args.warmup_epochs > args.epochs:
        warmup = f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}"
        yield f"{warmup}: no step would have the peak rate; lower it"
    if args.resume is not None and not os.path.exists(args.resume) and not ("folds" in args and all_folds(args)):
        yield f"--resume {args.resume}: no such file, so there is nothing to go on with; start without it"


def unlabelled_problems(args: Any) -> Iterator[str]:
    """The options that images without labels have no use for, one line each."""
    for name, given in (("--val-dir", args.val_dir), ("a second --data-list", (args.data_list or [])[1:])):
        if given:
            yield f"{name} with images without labels: they are not evaluated on; drop it"


def complete_fine_tuning(args: argparse.Namespace, origins: dict[str, str], typed: set[str]) -> Iterator[str]:
    """Fill in the options that follow from others; yield what is wrong with them together, one line each."""
    args.label_columns = split_names(args.label_columns)
    yield from complete_shared(args, origins, typed)
    if origins["checkpoint"] == "default" and args.dataset != "digits":
        images = next((flag(name) for name in ("data_dir", "data_list") if getattr(args, name)), "--dataset")
        seen = "the backbone that comes with the toolkit has seen handwritten digits alone"
        remedy = "for photographs give --checkpoint moco-v2-800ep; or, if it is meant, --checkpoint shipped"
        yield f"{images} without --checkpoint: {seen}; {remedy}"
    per_pixel = args.task in choices.PER_PIXEL
    if per_pixel and origins["class_weights"] == "default":
        args.class_weights = "balanced"  # its score is a mean over classes
    is_for_digits = same_file(args.config, DEFAULT_CONFIG) and origins["augmentation"] == "config"
    if per_pixel and (is_for_digits or origins["augmentation"] == config.OF_SHIPPED):
        args.augmentation = "crop"  # the shipped backbone's file has the one for digits
    if is_none(args.checkpoint) and origins["head_init"] == "default":
        args.head_init = "random"  # there is nothing yet that a probe could find
    if args.lora_init is None:  # over a random head the gradient is random too
        args.lora_init = "gradient" if args.head_init == "probe" else "random"
    yield from environment_problems(args, output_folder.FINE_TUNING_FILES, args.arithmetic)
    yield from model_problems(args.checkpoint, args.arch, args.heads)
    for other, clashing in (CLASHES | {f"--task {args.task}": TASK_CLASHES[choices.TRUTHS[args.task]]}).items():
        for words, reason in clashing.items():
            if _is_given(args, other) and _is_given(args, words):
                yield f"{words} with {other}: {reason}; drop one of the two"
    yield from _own_problems(args, typed)


# --------------------------------------------------------------------------------------------------- what goes together

_ONE_CLASS = "it is for images of one class"
_NO_MASK = ("--augmentation trivial", "--augmentation affine", "--cache-features", "--labels-per-class", "--unlabelled")
_CHANGES = "cached features must be the same in every epoch"
_FROM_A_PROBE = "images without labels help adapters that start at a probe"
_NO_FILE = "an adapter over weights in fewer bits needs their file, and random weights are in none"
# Options that exclude each other, as they are typed, and why. One without its value means any value but off.
CLASHES = {
    "--no-freeze-backbone": {
        "--use-qlora": "weights in 4 bits cannot train",
        "--arithmetic int8": "nothing is frozen",
        **dict.fromkeys(("--norms train", "--norms frozen"), "everything trains"),
        "--norms follow": "only frozen BatchNorms follow adapters",
        "--cache-features": _CHANGES,
    },
    "--lora-rank 0": {"--norms follow": "there are no adapters to follow"},
    "--use-qlora": {"--arithmetic int8": "the weights are stored in 8 bits"},
    "--cache-features": {"--norms train": _CHANGES},
    "--checkpoint none": {"--use-qlora": _NO_FILE, "--arithmetic int8": _NO_FILE},
    "--stage1-adapter": {"--checkpoint none": "there is no base for it to be merged into"},
    "--eval-split validation": {"--folds": "both say what to evaluate on"},
    "--unlabelled": {
        **dict.fromkeys(("--head-init random", "--no-freeze-backbone", "--norms train"), _FROM_A_PROBE),
        "--learning-rate auto": "few labels cannot tell rates apart",
        "--cache-features": "images without labels come in new views each time",
    },
}
_NOT_OF_ONE = {"--labels-per-class": _ONE_CLASS, "--label-smoothing": _ONE_CLASS, "--unlabelled": _ONE_CLASS}
TASK_CLASHES = {  # the same of --task, by what the task reads
    "class": {},
    "labels": _NOT_OF_ONE,
    "numbers": _NOT_OF_ONE | {"--class-weights balanced": _ONE_CLASS},
    "mask": dict.fromkeys(_NO_MASK, "it is not possible with masks"),
}


def may_have_own_norms(args: FineTuneOptions) -> bool:
    """Is there a probe that says whether BatchNorms begin with the images' own statistics, and an adapter for these?"""
    is_auto = args.norms == "auto" and args.freeze_backbone and args.lora_rank > 0
    return is_auto and args.head_init == "probe" and args.batch_size > 1 and args.task not in choices.PER_PIXEL


def _is_given(args: Any, words: str) -> bool:
    """Do the options have what these words say: `--norms train`, `--no-freeze-backbone`, or `--heads` of any value?"""
    name, _, value = words.removeprefix("--").partition(" ")
    name = name.replace("-", "_")
    if name.startswith("no_"):
        return not getattr(args, name.removeprefix("no_"))
    now = getattr(args, name)
    return str(now) == value if value else now not in (None, False, "none")


def _own_problems(args: Any, typed: Container[str]) -> Iterator[str]:
    """What --task lacks, and what is wrong with how a run would train besides CLASHES, one line each."""
    best_by = KEEP_BEST[args.task]
    truth = choices.TRUTHS[args.task]
    per_pixel = args.task in choices.PER_PIXEL
    if args.keep_best is not None and args.keep_best not in best_by:
        yield f"--keep-best {args.keep_best} with --task {args.task}: use {' or '.join(best_by)}"
    if args.label_columns and (not args.data_list or per_pixel):
        yield "--label-columns: only a --data-list of classes, labels or numbers has such columns; drop it"
    for name in ("classes", "unknown_value"):
        if name in typed and not per_pixel:
            yield f"{flag(name)} with --task {args.task}: only masks have it; use --task segmentation"
    if "threshold" in typed and truth != "labels":
        yield f"--threshold with --task {args.task}: only labels have it; use --task multilabel"
    if per_pixel and args.dataset != "imagefolder":
        remedy = "give --data-dir with the folders images/ and masks/, or --data-list with `image,mask` lines"
        yield f"--task {args.task}: --dataset {args.dataset} has no masks; {remedy}"
    form = {"numbers": "`path,3.5` lines", "labels": '`path,"a,b"` lines, or a column for each label'}
    if truth in form and not args.data_list:
        yield f"--task {args.task} needs --data-list with {form[truth]}: folders say one class for each image"
    if args.stage1_adapter is not None and not os.path.exists(args.stage1_adapter):
        yield f"--stage1-adapter {args.stage1_adapter}: file not found; give the path of an existing adapter file"
    if is_none(args.checkpoint) and args.freeze_backbone:
        yield "--checkpoint none with a frozen backbone trains nothing useful; add --no-freeze-backbone"
    if args.cache_features != "none" and args.lora_rank > 0 and args.adapt_last is None:
        yield f"--cache-features needs --adapt-last, or --lora-rank 0: {_CHANGES}"
    if args.norms == "train" and args.adapt_last and args.use_qlora:
        yield "--norms train with --adapt-last and --use-qlora: backward would hold 4-bit weights as floats; drop one"
    if all_folds(args) and args.resume and args.resume != args.output_dir / "last.pth":
        yield f"--folds {args.folds} with --resume {args.resume}: give --resume alone, and --output-dir"


def environment_problems(args: Any, written: Iterable[str], arithmetic: str = "float") -> Iterator[str]:
    """What is wrong with device, precision and folders, one line each; the run writes the files `written`."""
    if args.device not in ("auto", "cpu") or args.precision == "fp16" or arithmetic == "int8":  # the rest is everywhere
        from toolkit import devices  # here: it loads PyTorch

        try:
            device = devices.select_device(args.device)
            devices.select_precision(args.precision, device)
            devices.check_arithmetic(arithmetic, device)
        except InputError as error:
            yield str(error)
    if args.data_dir is not None and not remote.is_remote(args.data_dir) and not os.path.exists(args.data_dir):
        yield f"--data-dir {args.data_dir}: no such folder"
    yield from output_folder.problems(args, written)


def all_folds(args: Any) -> bool:
    """Are all parts of a cross-validation asked for, and not one?"""
    return args.folds is not None and "/" not in args.folds


def lora_options(args: AdapterOptions) -> dict[str, Any]:
    """The arguments of `add_lora_to_model`, which adapter files record. Empty without adapters."""
    if args.lora_rank == 0:
        return {}
    known = attributes(args, "lora_alpha", "lora_dropout", "use_qlora", "adapt_last")
    return known | {"r": args.lora_rank, "target_modules": list(args.target_modules or ()) or None}


def backbone_shape(args: ShapeOptions) -> dict[str, Any]:
    """The arguments of `load_backbone` that describe the network. The first layer is fitted to other channels."""
    return attributes(args, "arch", "image_size", "heads", "channels") | {"channel_fit": "timm"}


def image_sources(args: ImageOptions, read: "Bands | None" = None) -> dict[str, Any]:
    """The keyword arguments of `load_splits`: where a user's images are, and what is read of them."""
    names = ["dataset", "data_dir", "eval_split", "val_dir", "data_list", "skip_unreadable"]
    if isinstance(args, DataOptions):
        names += ["task", "label_columns", "group_by", "folds", "unlabelled"]
    return attributes(args, *names) | {"bands": read}


def scaling_of(args: Any) -> Scaling:
    return Scaling(args.scale, args.mean, args.std, args.bands, args.normalise)


def known_image_values(args: Any, checkpoint: Path | None) -> tuple[Scaling, "Bands | None"]:
    """The scaling that the options give or else the checkpoint's pretraining, and the bands; None: RGB photographs."""
    from toolkit.files import read_described  # here: they load PyTorch
    from toolkit.images.bands import bands_of, known_scaling
    from toolkit.models import checkpoints

    channels = 3
    metadata: dict[str, Any] = {}
    file = checkpoint
    if checkpoint is not None:
        channels, metadata = checkpoints.find_images(checkpoint, args.arch)
    with contextlib.suppress(InputError):  # reported when it is put on the backbone
        if isinstance(args, ModelOptions) and args.stage1_adapter is not None:
            content = read_described(args.stage1_adapter)
            if checkpoints.value_at(content, "metadata/mean") is not None:
                metadata = content["metadata"]
                file = args.stage1_adapter
                channels = metadata.get("channels") or 3
    channels = args.channels or channels
    known = known_scaling(scaling_of(args), channels, metadata, file)
    return known, bands_of(known, channels)
