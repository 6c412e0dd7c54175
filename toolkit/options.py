"""Options of both scripts: argparse is the schema, a YAML file and the command line give the values.

An argument group titled `model`, `data`, `moco` or `finetune` is the YAML section of that name; its options' names
(`dest`) are the keys. Precedence: defaults < YAML < command line. All problems are reported in one message.
"""

import argparse
import contextlib
import copy
import difflib
import math
import os
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from toolkit import InputError, bands, printable
from toolkit.backbones import ARCHS, TIMM
from toolkit.cache import CACHES
from toolkit.checkpoints import (
    CHANNEL_FITS,
    OFFICIAL_CHECKPOINTS,
    SHIPPED,
    checkpoint_path,
    find_channels,
    is_none,
    option_problems,
)
from toolkit.data import DATASETS, EVAL_SPLITS, UNLABELLED_SET
from toolkit.files import found_path, stored_path
from toolkit.training import BEST_BY, PRECISIONS, SCHEDULES
from toolkit.transforms import AUGMENTATIONS, CROP_MIN

# One file configures both scripts. Each passes over the section that only the other has. These keys of the sections
# that both read belong to fine-tuning alone: pretraining passes over them.
SECTIONS = {
    "model": ("checkpoint", "from_scratch", "stage1_adapter"),
    "data": ("labels_per_class", "augmentation", "crop_min", "cache_features", "cached_views", "show_bands"),
    "moco": (),
    "finetune": (),
}

# Options of earlier versions, which configurations may still have.
REMOVED = {"patch_dropout", "merge_into", "sort_into", "rotation", "shift", "noise"}

# ----------------------------------------------------------------------------------------------------------------------
# Option values: argparse `type=` functions, used for flags and YAML values alike


# What tensors, loaders and generators can take, and what stays finite when float32 multiplies a few of them.
LARGEST = {int: 2**31 - 1, float: 1_000_000}


def _number(kind: type, accepts: Callable[[float], bool], expected: str) -> Callable[[str], Any]:
    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (abs(value) < math.inf and accepts(value)):  # refuses nan too
            raise argparse.ArgumentTypeError(f"expected {expected}, got '{printable(text)}'")
        if value > LARGEST[kind]:
            raise argparse.ArgumentTypeError(f"{printable(text)} is too large; the largest is {LARGEST[kind]}")
        return value

    return convert


positive_int = _number(int, lambda x: x > 0, "a whole number above 0")
non_negative_int = _number(int, lambda x: x >= 0, "a whole number, 0 or more")
positive_float = _number(float, lambda x: x > 0, "a number above 0")
non_negative_float = _number(float, lambda x: x >= 0, "a number, 0 or more")
fraction = _number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
any_float = _number(float, lambda x: True, "a number")
positive_share = _number(float, lambda x: 0 < x <= 1, "a number above 0, at most 1")


def or_auto(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """What `convert` makes of a text, or 'auto'."""
    return lambda text: text if text == "auto" else convert(text)


def by_layer(convert: Callable[[str], Any]) -> Callable[[str], str]:
    """`LAYER=VALUE`, whose value `convert` takes, as it is; `read_pattern` takes it apart."""

    def check(text: str) -> str:
        layer, equals, value = text.rpartition("=")
        if not layer or not equals:
            raise argparse.ArgumentTypeError(f"expected LAYER=VALUE, as layer4=16, got '{printable(text)}'")
        convert(value)
        return text

    return check


def read_pattern(entries: list[str] | None) -> dict[str, float]:
    """Values by layer, from entries LAYER=VALUE; whole numbers as such."""
    pairs = [(layer, float(value)) for layer, _, value in (entry.rpartition("=") for entry in entries or [])]
    return {layer: int(value) if value.is_integer() else value for layer, value in pairs}


worker_count = or_auto(_number(int, lambda x: 0 <= x <= 256, "a whole number from 0 to 256, or auto"))


def boolean(text: str) -> bool:
    """`true` or `false`, as YAML writes them."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


# ----------------------------------------------------------------------------------------------------------------------
# Options: defaults < YAML < command line


def parse_args(
    parser: argparse.ArgumentParser,
    argv: list[str] | None = None,
    default_config: Path | None = None,
    default_config_applies: Callable[[dict[str, Any]], bool] | None = None,
    check: Callable[[argparse.Namespace, dict[str, str]], Iterable[str]] | None = None,
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Options from defaults, then a YAML file, then the command line; the parser is the schema of all three.

    Options outside the groups of the YAML sections are for the command line only.

    Args:
        parser: has `--config`.
        argv: the command line, `sys.argv[1:]` when None.
        default_config: the YAML file used when the command line names none.
        default_config_applies: is given what the command line says (unconverted, by `dest`) and answers whether
            `default_config` suits it. None: always.
        check: is given what is returned and may complete it; answers what is wrong with the options together. An option
            whose own value is wrong has its default there.

    Returns:
        The options (`config` is the path of the file used, or None) and, for every option, where its value came
        from: 'default', 'config' or 'command line'.

    Raises:
        InputError: one message with every problem of both the command line and the file, one per line.
    """
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    typed, problems = _read_command_line(parser, argv)
    values, sources = {}, dict.fromkeys(actions, "default")
    for dest, action in actions.items():
        default = action.default
        values[dest] = action.type(default) if isinstance(default, str) and action.type else default

    def take(dest: str, value: Any, source: str, name: str) -> None:
        try:
            values[dest], sources[dest] = _convert(actions[dest], value), source
        except (argparse.ArgumentTypeError, ValueError) as error:
            problems.append(f"{name}: {error}")

    if "config" in typed:
        take("config", typed.pop("config"), "command line", "--config")
    elif default_config and (not default_config_applies or default_config_applies(typed)):
        values["config"] = default_config
    if values["config"] is not None:
        for section, dest, value in _read_config(parser, Path(values["config"]), problems):
            take(dest, value, "config", f"{section}.{dest}")
    for dest, value in typed.items():
        take(dest, value, "command line", actions[dest].option_strings[0])
    args = argparse.Namespace(**values)
    problems += check(args, sources) if check else []
    if problems:
        raise InputError("\n".join(problems))
    return args, sources


def typed_options(parser: argparse.ArgumentParser, args: argparse.Namespace, sources: dict[str, str]) -> set[str]:
    """The options to which the command line gives another value than their default. To be asked before completion."""
    typed = (name for name, source in sources.items() if source == "command line")
    return {name for name in typed if getattr(args, name) != parser.get_default(name)}


def _read_command_line(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[dict[str, Any], list[str]]:
    """What was typed, unconverted, and what is wrong with its names. argparse alone would stop at the first problem."""
    lenient = copy.deepcopy(parser)
    lenient.allow_abbrev = False
    lenient.print_help = parser.print_help
    lenient.error = _raise_input_error
    lenient._negative_number_matcher = re.compile(r"-[\d.]")  # argparse's own takes -1e-3 for an option
    for action in lenient._actions:
        action.default, action.type, action.choices = argparse.SUPPRESS, None, None
        if action.nargs is None:
            action.nargs, action.const = "?", ""  # `--epochs` without its value, which _convert_one refuses
        elif action.nargs == "+":
            action.nargs = "*"
    words = list(sys.argv[1:] if argv is None else argv)
    switches = [flag for action in parser._actions if action.nargs == 0 for flag in action.option_strings]
    valued = [word for word in words if "=" in word and word.split("=")[0] in switches]
    typed, rest = lenient.parse_known_args([word for word in words if word not in valued])
    problems = [f"{printable(word)}: write {word.split('=')[0]} alone; it takes no value" for word in valued]
    return vars(typed), problems + unknown_words(parser, rest)


def unknown_words(parser: argparse.ArgumentParser, rest: list[str]) -> list[str]:
    """What is wrong with the words that `parse_known_args` left over."""
    problems, known = [], [flag for action in parser._actions for flag in action.option_strings]
    see = "--help-all" if "--help-all" in known else "--help"
    for before, word in zip(["", *rest], rest, strict=False):
        if word.split("=")[0].removeprefix("--").replace("-", "_") in REMOVED:
            problems.append(f"{printable(word)}: the option was removed; leave it out")
        elif word.startswith("-"):
            problems.append(f"{printable(word)}: no such option{_nearest(word.split('=')[0], known)}; see {see}")
        elif not before.startswith("-"):  # a word after an unknown option is most likely its value
            problems.append(f"{printable(word)}: unexpected argument; see {see}")
    return problems


def _raise_input_error(message: str) -> None:
    raise InputError(message)


LONGEST_CONFIG = 100_000  # characters; PyYAML takes a second for them


class _ConfigLoader(yaml.SafeLoader):
    """YAML of plain values in which no key stands twice: the first would be lost without a word."""

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice = next((key for key, count in keys.items() if count > 1), "one of them")
            raise yaml.MarkedYAMLError(problem=f"the key {twice} is there twice", problem_mark=node.start_mark)
        return mapping


def _load_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises InputError, in one line, for a file that is none or is too long for one."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST_CONFIG + 1)
    except OSError as error:
        raise InputError(f"--config {path}: cannot read it: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"--config {path}: not a text file in UTF-8; give a YAML file") from None
    if len(text) > LONGEST_CONFIG:
        raise InputError(f"--config {path}: longer than {LONGEST_CONFIG:,} characters; give a YAML file of options")
    try:
        return yaml.load(text, _ConfigLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
    except Exception as error:  # PyYAML stumbles over odd values in many ways, such as a date in month 13
        reason = f"{type(error).__name__}: {printable(error)}"
    raise InputError(f"--config {path}: not valid YAML: {reason}")


def _read_config(parser: argparse.ArgumentParser, path: Path, problems: list[str]) -> Iterator[tuple[str, str, Any]]:
    """(section, key, value) of every key of the file that is this parser's; the others are added to problems."""
    try:
        content = _load_yaml(path)
    except InputError as error:
        problems.append(str(error))
        return
    if not isinstance(content, dict | None):
        problems.append(f"--config {path}: expected the sections {', '.join(SECTIONS)}")
        return
    own = {group.title: [a.dest for a in group._group_actions] for group in parser._action_groups}
    own = {section: own[section] for section in SECTIONS if section in own}
    for section, entries in (content or {}).items():
        if section not in SECTIONS:
            hint = _nearest(section, SECTIONS) or _right_section(section, own)
            problems.append(f"{printable(section)}: no such section in {path}{hint}")
        elif not isinstance(entries, dict | None):
            problems.append(f"{section}: expected a section with `key: value` lines in {path}")
        elif section in own:
            for key, value in (entries or {}).items():
                if key in own[section]:
                    yield section, key, value
                elif key in REMOVED:
                    problems.append(f"{section}.{key} was removed; delete the line")
                elif key not in SECTIONS[section]:
                    hint = _right_section(key, own) or _nearest(key, own[section])
                    problems.append(f"{section}.{printable(key)}: no such key in {path}{hint}")


def _right_section(key: Any, own: dict[str, list[str]]) -> str:
    section = next((section for section, keys in own.items() if key in keys), None)
    return f" (it belongs into the section {section})" if section else ""


def _nearest(name: Any, known: Iterable[str]) -> str:
    name = printable(name)
    likeness = {full: 1.0 if full.startswith(name) else _likeness(name, full) for full in known}
    match = max(likeness, key=likeness.get)
    return f" (did you mean {match}?)" if likeness[match] >= 0.6 else ""  # difflib's own cutoff


def _likeness(name: str, full: str) -> float:
    """How alike two names are, as a whole or word by word between their dashes, in any order: 0 to 1."""

    def alike(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one, other).ratio()

    name, full = name.strip("-"), full.strip("-")
    ours, theirs = ([word for word in re.split("[-_ ]", text) if word] for text in (name, full))
    best = [max((alike(word, other) for other in theirs), default=0) for word in ours]
    shared = sum(likeness for likeness in best if likeness > 0.75)
    return max(alike(name, full), 2 * shared / max(1, len(ours) + len(theirs)))


def _convert(action: argparse.Action, value: Any) -> Any:
    """A flag's words or a YAML value -> the option's value, checked alike."""
    if value is None and action.default is None:  # `key: null`
        return None
    if action.nargs == 0:  # a switch such as --freeze-backbone
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {printable(repr(value))}")
        return value
    if action.nargs is None or action.nargs == "?":
        return _convert_one(action, value)
    if not isinstance(value, list) or (action.nargs == "+" and not value):
        raise ValueError(f"expected a list, got {printable(repr(value))}" if value else "expected at least one value")
    return [_convert_one(action, item) for item in value]


def _convert_one(action: argparse.Action, value: Any) -> Any:
    kind = action.type or str
    if value is None or value == "" or not isinstance(value, str | int | float | Path):
        raise ValueError(f"expected a value, got {'none' if value in (None, '') else printable(value)}")
    if isinstance(value, bool) and kind is not boolean:
        raise ValueError(f"expected a value, got {str(value).lower()}")
    # Through text, because PyYAML reads 1e-3 as a string and the converters read text.
    try:
        text = str(value)
        converted = kind(text)
    except ValueError:
        raise ValueError(f"invalid value {printable(value)}") from None
    if "\0" in text:
        raise ValueError("expected text without a NUL character")
    if action.choices is not None and converted not in action.choices:
        names = [str(choice) for choice in action.choices]
        raise ValueError(f"{printable(repr(value))} is none of {', '.join(names)}{_nearest(text, names)}")
    return converted


# ----------------------------------------------------------------------------------------------------------------------
# Help: the options that people need, and all of them


def add_help(parser: argparse.ArgumentParser, needed: Iterable[str]) -> None:
    """`--help`, which shows the options in `needed` (by `dest`), each with its default, and `--help-all`.

    The parser is one made with `add_help=False`.
    """
    show = {"action": _PrintText, "const": lambda: short_help(parser, needed)}
    parser.add_argument("-h", "--help", dest="help", help="the options that people need", **show)
    parser.add_argument("--help-all", dest="help", action="help", help="all options")


class _PrintText(argparse.Action):
    """Prints what `const` returns, and exits."""

    def __init__(self, option_strings, dest, const, help):
        super().__init__(option_strings, dest, nargs=0, const=const, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, *_):
        print(self.const())
        parser.exit()


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A help with the default of each option that has one."""

    def _get_help_string(self, action):
        default = shown_default(action.default) if action.option_strings and action.default != argparse.SUPPRESS else ""
        meaning = action.help or ", ".join(map(str, action.choices or []))
        return f"{meaning} (default: {default})" if default else meaning


def short_help(parser: argparse.ArgumentParser, needed: Iterable[str]) -> str:
    """The first paragraphs of the description, and the options in `needed` with their defaults."""
    actions = {action.dest: action for action in parser._actions}
    flags = {dest: ", ".join(f for f in actions[dest].option_strings if not f.startswith("--no-")) for dest in needed}
    column, width = max(map(len, flags.values())) + 4, shutil.get_terminal_size().columns - 2
    lines = ["\n\n".join(parser.description.split("\n\n")[:2]), ""]
    for dest, names in flags.items():
        indents = {"initial_indent": f"  {names}".ljust(column), "subsequent_indent": " " * column}
        lines += textwrap.wrap(HelpFormatter._get_help_string(None, actions[dest]), width, **indents)
    return "\n".join([*lines, "", "--help-all shows the other options. docs/choosing.md says what to take."])


def shown_default(default: Any) -> str:
    """A default as people read it; nothing for None."""
    if default is None:
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    if default == SHIPPED:
        return "shipped"
    return f"{default:g}" if isinstance(default, int | float) else str(stored_path(default))


# ----------------------------------------------------------------------------------------------------------------------
# The options that both scripts have, and those of fine-tuning

# Of fine-tuning's, those that people need: `--help` and README show them, in this order.
NEEDED = ("data_dir", "checkpoint", "output_dir", "epochs", "learning_rate", "lora_rank", "lora_alpha", "batch_size")
NEEDED += ("use_qlora", "precision", "augmentation", "class_weights", "train_norms", "adapt_last", "resume")


def add_run_options(parser: argparse.ArgumentParser, output_dir: Path) -> argparse._ArgumentGroup:
    """The group `run`, which is for the command line only."""
    run = parser.add_argument_group("run")
    run.add_argument("--config", type=Path, help="YAML file with values for the options below")
    run.add_argument("--output-dir", type=Path, default=output_dir, help="folder for all results")
    run.add_argument(
        "--resume",
        type=Path,
        nargs="?",
        const=Path(),
        help="go on where a run stopped; alone, or with the path of its last.pth",
    )
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    run.add_argument("--tensorboard", action="store_true", help="log each epoch for TensorBoard as well")
    return run


def add_data_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The group and YAML section `data`."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, help="default: imagefolder for your own images, else digits")
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
    group.add_argument(
        "--cache-images",
        choices=CACHES,
        default="none",
        help="keep training images decoded, at most twice --image-size",
    )
    _add_band_options(group)
    return group


def _add_band_options(group: argparse._ArgumentGroup) -> None:
    """What the numbers of images mean that are no RGB photographs: `toolkit.bands`."""
    several = {"nargs": "+", "action": "extend"}
    group.add_argument("--bands", **several, help="which bands of a file, in order, as 4,3,2; 0: zeros (default: all)")
    group.add_argument("--scale", type=positive_float, help="what the files' numbers are divided by, as 10000")
    group.add_argument("--mean", type=any_float, **several, help="of each channel, or of all; default: the backbone's")
    group.add_argument("--std", type=any_float, **several, help="the same; both are of what --scale leaves")
    group.add_argument("--normalise", choices=("data",), help="data: measure mean and std on the training images")


def add_training_data_options(group: argparse._ArgumentGroup) -> None:
    """What fine-tuning adds to the group `data`."""
    group.add_argument("--labels-per-class", type=positive_int, help="train on only so many images of each class")
    group.add_argument(
        "--augmentation", choices=AUGMENTATIONS, default="crop", help="crop, trivial: photographs; affine: digits; none"
    )
    group.add_argument("--crop-min", type=fraction, default=CROP_MIN, help="smallest share of an image in a crop")
    group.add_argument(
        "--cache-features",
        choices=CACHES,
        default="none",
        help="run the frozen blocks below --adapt-last only once per image and kept view",
    )
    group.add_argument(
        "--cached-views",
        type=positive_int,
        help="augmented views of each training image that are kept then (default: 4)",
    )
    group.add_argument(
        "--show-bands", type=positive_int, nargs="+", help="three channels that pictures show as red, green and blue"
    )


def add_model_options(parser: argparse.ArgumentParser, checkpoint: Path) -> argparse._ArgumentGroup:
    """The group and YAML section `model`; `checkpoint` is the default one."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        type=checkpoint_path,
        default=checkpoint,
        help="file of MoCo, torchvision or timm; shipped: for digits; none: random weights",
    )
    archs = ",".join((*ARCHS, f"{TIMM}NAME"))  # `option_problems` checks it
    group.add_argument("--arch", metavar=f"{{{archs}}}", help="default: what the checkpoint says; or timm:NAME")
    add_shape_options(group)
    group.add_argument("--image-size", type=positive_int, help="pixels; default: what the backbone was made for")
    group.add_argument("--stage1-adapter", type=Path, help="moco_lora.pth of moco.pretrain, merged into the checkpoint")
    group.add_argument(
        "--from-scratch",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="the same architecture, random weights",
    )
    return group


def add_shape_options(group: argparse._ArgumentGroup) -> None:
    """What a backbone is like beside its arch."""
    group.add_argument("--heads", type=positive_int, help="attention heads of a ViT; default: as its layout implies")
    group.add_argument("--channels", type=positive_int, help="of the images; default: the checkpoint's, else 3")
    group.add_argument("--channel-fit", choices=CHANNEL_FITS, help="fit the first layer to other --channels")


def backbone_shape(args: argparse.Namespace) -> tuple:
    """Arguments of `load_backbone`, from `arch` on. Random weights have any number of channels."""
    fit = "timm" if getattr(args, "from_scratch", False) else args.channel_fit
    return args.arch, args.image_size, args.heads, args.channels, fit


def complete_data_options(args: argparse.Namespace, sources: dict[str, str]) -> list[str]:
    """Fill in the default data set, and where a configuration's paths lead.

    Returns what is wrong with the options of the images together, a line each.
    """
    for name in (name for name in PATHS if sources.get(name) == "config" and getattr(args, name)):
        value = getattr(args, name)
        setattr(args, name, [found_path(path) for path in value] if isinstance(value, list) else found_path(value))
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
    """Which options images without labels have no use for, a line each."""
    needless = {"--val-dir": args.val_dir, "a second --data-list": args.data_list and len(args.data_list) > 1}
    return [
        f"{name} with images without labels: they are not evaluated on; drop it" for name in needless if needless[name]
    ]


PATHS = ("data_dir", "val_dir", "data_list", "knn_dir", "checkpoint", "stage1_adapter")  # that are read

# Where the images are and which are left out may change between a run and its resumption: a digest tells other images.
PLACES_OF_IMAGES = ("data_dir", "val_dir", "data_list", "skip_unreadable")


def image_sources(args: argparse.Namespace, read: bands.Bands | None = None) -> dict[str, Any]:
    """The keyword arguments of `toolkit.data.load_splits` that say where a user's own images are, and what is read."""
    return {name: getattr(args, name) for name in ("val_dir", "data_list", "skip_unreadable")} | {"bands": read}


def bands_read(args: argparse.Namespace) -> bands.Bands | None:
    """What is read of a user's own images: as many bands as the first layer takes. None: they are RGB photographs."""
    channels = args.channels or 3
    if args.channels is None and args.checkpoint is not None and args.dataset in ("imagefolder", UNLABELLED_SET):
        with contextlib.suppress(InputError):  # which is told when the backbone is built
            channels = find_channels(args.checkpoint, args.arch)
    return bands.bands_of(args, channels)


def add_adapter_options(group: argparse._ArgumentGroup, rank: int) -> None:
    """How layers are adapted; both scripts have these, each in its own group and with its own default rank."""
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
        "--alpha-pattern", type=by_layer(positive_float), nargs="+", action="extend", help="other alphas, as layer4=32"
    )
    group.add_argument(
        "--target-modules", nargs="+", action="extend", help="layers to adapt: names, suffixes or regular expressions"
    )
    group.add_argument("--exclude-modules", nargs="+", action="extend", help="layers to leave alone")
    group.add_argument(
        "--adapt-last", type=positive_int, help="only so many last blocks (ViT) or stages (ResNet); default: all"
    )


def complete_adapter_options(args: argparse.Namespace) -> None:
    """Alpha follows the rank; without adapters it is that of the usual rank, 8."""
    if args.lora_alpha is None:
        args.lora_alpha = 2.0 * (args.lora_rank or 8)


def lora_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `add_lora_to_model`; the adapter file keeps them. Empty without adapters."""
    if args.lora_rank == 0:
        return {}
    names = ("lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_qlora", "use_rslora", "adapt_last")
    patterns = {name: read_pattern(getattr(args, name)) for name in ("rank_pattern", "alpha_pattern")}
    return {"r": args.lora_rank, **{name: getattr(args, name) for name in names}, **patterns}


def adapter_problems(args: argparse.Namespace, typed: Container[str]) -> list[str]:
    """What is wrong with the options of the adapters together, a line each. `typed` is what `typed_options` says."""
    if args.lora_rank > 0:
        return []
    needless = [name for name in ("use_qlora", "adapt_last", "rank_pattern", "alpha_pattern") if getattr(args, name)]
    needless += [name for name in _OF_ADAPTERS if name in typed]
    return [f"{_flag(name)} with --lora-rank 0: there are no adapters; raise the rank" for name in needless]


# A configuration may have these for runs with adapters, so that only who types them is told.
_OF_ADAPTERS = ("lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "lora_init")
_OF_ADAPTERS += ("base_dtype",)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_finetune_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The group and YAML section `finetune`."""
    switch = argparse.BooleanOptionalAction
    tune = parser.add_argument_group("finetune")
    add_adapter_options(tune, rank=8)
    tune.add_argument("--freeze-backbone", action=switch, default=True, help="train adapters and head alone")
    tune.add_argument(
        "--train-norms", action=switch, default=False, help="train normalisation layers too: better on ResNets, slower"
    )
    tune.add_argument(
        "--learning-rate",
        "--lr",
        type=or_auto(positive_float),
        default=1e-4,
        help="of AdamW at its peak, of adapters that start at the gradient 24 times it; auto: search",
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
    tune.add_argument("--weight-decay", type=non_negative_float, default=0.01, help="of AdamW")
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
        help="share of what training changes to keep; auto: more, the more images per class",
    )
    tune.add_argument("--keep-best", choices=BEST_BY, help="lora.pth is the best epoch by this, not the last")
    tune.add_argument("--clip-grad-norm", type=positive_float, help="clip the gradient's norm to this")
    tune.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto: bf16 or fp16 on CUDA, else fp32")
    tune.add_argument(
        "--base-dtype",
        choices=PRECISIONS,
        default="auto",
        help="of frozen weights, adapted or below --adapt-last; auto: --precision",
    )
    tune.add_argument(
        "--gradient-checkpointing",
        choices=("none", "selective", "full"),
        default="none",
        help="none, selective (attention) or full (blocks)",
    )
    tune.add_argument(
        "--activation-precision",
        type=int,
        choices=(32, 16),
        default=32,
        help="bits of what is kept for backward; 16: half its bytes, gradients rounded",
    )
    tune.add_argument("--seed", type=non_negative_int, default=0, help="of all random numbers")
    return tune


SAVES_MEMORY = (
    "lower --batch-size and raise --accumulation-steps by as much, or use --gradient-checkpointing selective (a ViT), "
    "--use-qlora, --precision bf16 or, which is slow, --gradient-checkpointing full"
)


CACHED_VIEWS = 4  # with as many a run of ten epochs was as accurate as with new ones in each: benchmarks/RESULTS.md


def complete_finetune_options(args: argparse.Namespace, sources: dict[str, str]) -> list[str]:
    """Fill in the options that follow from others; returns the problems with the data options, a line each."""
    problems = complete_data_options(args, sources)
    if sources["checkpoint"] == "default" and args.dataset != "digits" and not args.eval_only:
        images = next((_flag(name) for name in ("data_dir", "data_list") if getattr(args, name)), "--dataset")
        problems.append(
            f"{images} without --checkpoint: the backbone that comes with the toolkit has seen handwritten digits "
            f"alone; {OFFICIAL_CHECKPOINTS}; or, if that backbone is meant, --checkpoint shipped"
        )
    complete_adapter_options(args)
    if args.from_scratch or is_none(args.checkpoint):
        args.head_init = "random"  # there is nothing yet that a probe could find
    if args.lora_init is None:  # what the gradient of a random head says is random
        args.lora_init = "gradient" if args.head_init == "probe" else "random"
    differ = args.cache_features != "none" and args.augmentation != "none"
    args.cached_views = (args.cached_views or CACHED_VIEWS) if differ else None
    for option, name in (("resume", "last.pth"), ("eval_only", "lora.pth")):
        path = getattr(args, option)
        if path == Path():  # the flag alone
            setattr(args, option, args.output_dir / name)
        elif path is not None and path.name == str(path) and not os.path.exists(path):
            setattr(args, option, args.output_dir / path)
    return problems


def _cache_problems(args: argparse.Namespace) -> list[str]:
    """Why what is below the blocks that train is not the same in each epoch, a line each."""
    if args.cache_features == "none":
        return []
    reasons = {
        "--adapt-last, or --lora-rank 0": args.lora_rank > 0 and args.adapt_last is None,
        "--freeze-backbone": not args.freeze_backbone,
        "--no-train-norms": args.train_norms,
        "--mixup 0": args.mixup > 0,
        "--cutmix 0": args.cutmix > 0,
    }
    return [
        f"--cache-features needs {remedy}: what is kept must be the same in every epoch"
        for remedy, applies in reasons.items()
        if applies
    ]


def _without_effect(args: argparse.Namespace, typed: Container[str]) -> list[str]:
    """The options that were typed where they change nothing, a line each."""
    problems = []
    if "crop_min" in typed and args.augmentation not in ("crop", "trivial"):
        problems.append(f"--crop-min with --augmentation {args.augmentation}, which crops nothing: drop one of the two")
    if "cached_views" in typed and args.cache_features == "none":
        problems.append("--cached-views needs --cache-features ram or disk")
    elif "cached_views" in typed and args.augmentation == "none":
        problems.append("--cached-views with --augmentation none: all views are the same; drop one of the two")
    if "base_dtype" in typed and args.lora_rank > 0 and not args.freeze_backbone:
        problems.append("--base-dtype with --no-freeze-backbone: nothing is frozen; drop one of the two")
    return problems


def finetune_problems(args: argparse.Namespace, typed: Container[str]) -> list[str]:
    """What is wrong with the options of fine-tuning together, a line each. `typed` is what `typed_options` says."""
    rounds = args.base_dtype in ("bf16", "fp16") and args.freeze_backbone and args.lora_rank > 0
    in_16_bits = f"--base-dtype {args.base_dtype}" if rounds else None
    fewer_bits = "--use-qlora" if args.use_qlora else in_16_bits
    problems = [] if args.eval_only else option_problems(args.checkpoint, args.arch, args.heads, fewer_bits)
    if args.stage1_adapter is not None and not args.eval_only and not os.path.exists(args.stage1_adapter):
        problems.append(
            f"--stage1-adapter {args.stage1_adapter}: file not found; give the path of an existing adapter file"
        )
    if args.use_qlora and not args.freeze_backbone:
        problems.append("--use-qlora with --no-freeze-backbone: weights in 4 bits cannot train; drop one of the two")
    problems += adapter_problems(args, typed) + _cache_problems(args) + _without_effect(args, typed)
    if args.train_norms and args.adapt_last and args.use_qlora:
        problems.append(
            "--train-norms with --adapt-last and --use-qlora: the norms below would train through weights in 4 bits, "
            "which backward would keep as floats; drop one of the three"
        )
    if args.train_norms and not args.freeze_backbone:
        problems.append("--train-norms with --no-freeze-backbone: everything trains anyway; drop one of the two")
    if args.activation_precision == 16 and args.gradient_checkpointing == "full":
        problems.append("--activation-precision 16 with --gradient-checkpointing full has nothing to round: drop one")
    if args.from_scratch and args.freeze_backbone:
        problems.append("--from-scratch with a frozen backbone trains nothing useful; add --no-freeze-backbone")
    if args.from_scratch and args.stage1_adapter:
        problems.append("--from-scratch with --stage1-adapter: there is no base for it to be merged into; drop one")
    if args.resume and args.eval_only:
        problems.append("--resume with --eval-only: the one trains and the other does not; drop one of the two")
    if args.warmup_epochs > args.epochs:
        problems.append(
            f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}: the learning rate "
            "would never get to its peak; lower it"
        )
    return problems


# ----------------------------------------------------------------------------------------------------------------------
# What a run used


def describe_options(parser: argparse.ArgumentParser, args: argparse.Namespace, sources: dict[str, str]) -> str:
    """What was typed, what the YAML file changes, and where all settings will be."""

    def changed(source: str) -> list[str]:
        names = [name for name, origin in sources.items() if origin == source]
        return [name for name in names if source != "config" or getattr(args, name) != parser.get_default(name)]

    typed = [_as_typed(name, getattr(args, name)) for name in changed("command line")]
    told = {
        "command line": " ".join(typed),
        f"{_stored(args.config)} changes": ", ".join(f"{n} {_as_text(getattr(args, n))}" for n in changed("config")),
        "all settings": str(args.output_dir / "config.yaml"),
    }
    whole = {"subsequent_indent": "    ", "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(f"{title}: {values}", 80, **whole) for title, values in told.items() if values)


def _as_typed(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return _flag(name if value else f"no_{name}")
    return f"{_flag(name)} {_as_text(value)}"


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_as_text, value))
    return f"{value:g}" if isinstance(value, float) else str(_stored(value))


def resolved_config(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The options in the sections of a YAML file that repeats the run."""
    sections = {}
    for group in parser._action_groups:
        if group.title in SECTIONS:
            sections[group.title] = {a.dest: _stored(getattr(args, a.dest)) for a in group._group_actions}
    return sections


def _stored(value: Any) -> Any:
    if isinstance(value, list):
        return [_stored(item) for item in value]
    return str(stored_path(value)) if isinstance(value, Path) else value
