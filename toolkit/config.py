"""Reads options: argparse is their schema; defaults, a YAML file and the command line give the values.

An argument group titled `model`, `data`, `moco` or `finetune` is the YAML section of that name; its options' names
(`dest`) are the keys. Precedence: defaults < YAML < command line. All problems are reported in one message.
"""

import argparse
import copy
import dataclasses
import math
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from toolkit import InputError, did_you_mean, printable
from toolkit.files import SHIPPED, stored_path

SECTIONS = ("model", "data", "moco", "finetune")

# Options of earlier versions, with the value at which each did nothing: an old configuration may have it at that.
REMOVED = {
    "patch_dropout": (0, 0.0),
    "merge_into": (None,),
    "sort_into": (None,),
    "rotation": (None,),
    "shift": (None,),
    "noise": (None,),
    "cache_images": ("none",),
    "cached_views": (None, 4),
    "show_bands": (None,),
    "channel_fit": (None, "timm"),
    "from_scratch": (False,),
    "crop_min": (0.75,),
    "alpha_pattern": (None,),
    "use_rslora": (False,),
    "head_learning_rate": (None,),
    "schedule": ("cosine",),
    "cutmix": (0, 0.0),
    "ema": (0, 0.0),
    "base_dtype": ("auto",),
    "tensorboard": (False,),
    "train_norms": (False,),
    "follow_norms": (False,),
    "unknown": ("ignore",),
}
# What does what an option of earlier versions did.
REPLACED = {
    "train_norms": "write --norms train",
    "follow_norms": "write --norms follow",
    "from_scratch": "write --checkpoint none, with an --arch",
    "use_rslora": "write --lora-alpha with as much times the square root of the rank",
    "eval_only": "use deploy_lora.py evaluate",
    "unknown": "write 0 or 1 in the list in place of -1 where an unknown label means no or yes",
}

# ----------------------------------------------------------------------------------------------------------------------
# Option values: argparse `type=` functions, used for flags and YAML values alike


# The largest values accepted. Tensors, loaders and generators can take such an int; the product of a few such floats is
# finite in float32.
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
    """A converter that accepts 'auto' as well, and leaves it as it is."""
    return lambda text: text if text == "auto" else convert(text)


def by_layer(convert: Callable[[str], Any]) -> Callable[[str], str]:
    """A converter that only checks `LAYER=VALUE`, with a value for `convert`; `read_pattern` splits the text."""

    def check(text: str) -> str:
        layer, equals, value = text.rpartition("=")
        if not layer or not equals:
            raise argparse.ArgumentTypeError(f"expected LAYER=VALUE, as layer4=16, got '{printable(text)}'")
        convert(value)
        return text

    return check


def read_pattern(entries: list[str] | None) -> dict[str, float]:
    """Values by layer, from entries LAYER=VALUE; whole numbers as ints."""
    values = {}
    for entry in entries or []:
        layer, _, text = entry.rpartition("=")
        value = float(text)
        values[layer] = int(value) if value.is_integer() else value
    return values


worker_count = or_auto(_number(int, lambda x: 0 <= x <= 256, "a whole number from 0 to 256, or auto"))


def folds(text: str) -> str:
    """'5', a number of parts, or '2/5', the second of them."""
    match = re.fullmatch(r"(?:([1-9]\d{0,5})/)?(\d{1,6})", text)
    if not match or int(match[2]) < 2 or int(match[1] or 1) > int(match[2]):
        raise argparse.ArgumentTypeError(f"expected a number of parts, as 5, or one, as 2/5, got '{printable(text)}'")
    return text


def boolean(text: str) -> bool:
    """`true` or `false`, as YAML writes them."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


# ----------------------------------------------------------------------------------------------------------------------
# Options as fields of dataclasses


def option(default: Any, meaning: str | None = None, *, flags: tuple[str, ...] = (), **how: Any) -> Any:
    """A field that is an option.

    Args:
        default: its value when neither file nor command line gives one.
        meaning: what the help says.
        flags: names beside `--the-field`.
        how: what `add_argument` takes beside these, such as `type` and `choices`.
    """
    if isinstance(default, bool):
        how["action"] = argparse.BooleanOptionalAction
    return dataclasses.field(default=default, metadata={"flags": flags, "help": meaning, **how})


def several(default: Any, meaning: str | None = None, **how: Any) -> Any:
    """A field that is an option with one or more values. Given twice, the values add up."""
    return option(default, meaning, nargs="+", action="extend", **how)


def add_section(parser: argparse.ArgumentParser, title: str, section: type) -> argparse._ArgumentGroup:
    """Add the fields of a dataclass as a group of options, which is that section of the YAML file too."""
    group = parser.add_argument_group(title)
    for field in dataclasses.fields(section):
        how = dict(field.metadata)
        flags = how.pop("flags")
        group.add_argument(flag(field.name), *flags, default=field.default, **how)
    return group


def frozen(kind: type, values: argparse.Namespace) -> Any:
    """The options as an object of a dataclass, which nobody changes. A list becomes a tuple."""
    fields = {}
    for field in dataclasses.fields(kind):
        value = getattr(values, field.name)
        fields[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**fields)


# ----------------------------------------------------------------------------------------------------------------------
# Options: defaults < YAML < command line


def parse_args(
    parser: argparse.ArgumentParser,
    argv: list[str] | None = None,
    default_config: Path | None = None,
    default_config_applies: Callable[[dict[str, Any]], bool] | None = None,
    check: Callable[[argparse.Namespace, dict[str, str]], Iterable[str]] | None = None,
    ignored: Mapping[str, Collection[str]] | None = None,
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Options from defaults, then a YAML file, then the command line; the parser is the schema of all three.

    Options outside the groups of the YAML sections are for the command line only.

    Args:
        parser: has `--config`.
        argv: the command line, `sys.argv[1:]` when None.
        default_config: the YAML file used when the command line names none.
        default_config_applies: receives the command line's values (unconverted, by `dest`) and returns whether to use
            `default_config`. None: always.
        check: receives what this function returns, may complete it, and returns what is wrong with the options
            together. An option whose own value is wrong has its default there.
        ignored: by section, the keys of the file that are options of the other script alone.

    Returns:
        The options (`config` is the path of the file used, or None), and the source of every option's value:
        'default', 'config' or 'command line'.

    Raises:
        InputError: one message with every problem of both the command line and the file, one per line.
    """
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    typed, problems = _read_command_line(parser, argv)
    values = {dest: action.default for dest, action in actions.items()}
    sources = dict.fromkeys(actions, "default")

    def take(dest: str, value: Any, source: str, name: str) -> None:
        try:
            values[dest] = _convert(actions[dest], value)
        except (argparse.ArgumentTypeError, ValueError) as error:
            problems.append(f"{name}: {error}")
        else:
            sources[dest] = source

    if "config" in typed:
        take("config", typed.pop("config"), "command line", "--config")
    elif default_config and (not default_config_applies or default_config_applies(typed)):
        values["config"] = default_config
    if values["config"] is not None:
        for section, dest, value in _read_config(parser, Path(values["config"]), problems, ignored or {}):
            take(dest, value, "config", f"{section}.{dest}")
    for dest, value in typed.items():
        take(dest, value, "command line", actions[dest].option_strings[0])
    args = argparse.Namespace(**values)
    if check is not None:
        problems += check(args, sources)
    if problems:
        raise InputError("\n".join(problems))
    return args, sources


def typed_options(parser: argparse.ArgumentParser, args: argparse.Namespace, sources: dict[str, str]) -> set[str]:
    """The options to which the command line gives another value than their default. Call it before completing them."""
    return {
        name
        for name, source in sources.items()
        if source == "command line" and getattr(args, name) != parser.get_default(name)
    }


def _read_command_line(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[dict[str, Any], list[str]]:
    """The typed values, unconverted, and problems with their names. argparse alone would stop at the first problem."""
    lenient = copy.deepcopy(parser)
    lenient.allow_abbrev = False
    lenient.print_help = parser.print_help
    lenient.error = _raise_input_error
    lenient._negative_number_matcher = re.compile(r"-[\d.]")  # argparse's own takes -1e-3 for an option
    for action in lenient._actions:
        action.default = argparse.SUPPRESS
        action.type = action.choices = None
        if action.nargs is None:
            action.nargs = "?"
            action.const = ""  # for `--epochs` without a value, which _convert_one refuses
        elif action.nargs == "+":
            action.nargs = "*"
    words = []
    problems = []
    for word in sys.argv[1:] if argv is None else argv:
        name, equals, _ = word.partition("=")
        action = parser._option_string_actions.get(name)
        if equals and action is not None and action.nargs == 0:
            problems.append(f"{printable(word)}: write {name} alone; it takes no value")
        else:
            words.append(word)
    typed, rest = lenient.parse_known_args(words)
    return vars(typed), problems + unknown_words(parser, rest)


def unknown_words(parser: argparse.ArgumentParser, rest: list[str]) -> list[str]:
    """What is wrong with the words that `parse_known_args` left over."""
    problems = []
    known = list(parser._option_string_actions)
    see = "--help-all" if "--help-all" in known else "--help"
    for before, word in zip(["", *rest], rest, strict=False):
        name = word.split("=")[0].removeprefix("--").replace("-", "_")
        if name in REPLACED:
            problems.append(f"{printable(word)}: replaced; {REPLACED[name]}")
        elif name.removeprefix("no_") in REMOVED:
            problems.append(f"{printable(word)}: the option was removed; leave it out")
        elif word.startswith("-"):
            problems.append(f"{printable(word)}: no such option{_hint(word.split('=')[0], known)}; see {see}")
        elif not before.startswith("-"):  # a word after an unknown option is most likely its value
            problems.append(f"{printable(word)}: unexpected argument; see {see}")
    return problems


def _raise_input_error(message: str) -> None:
    raise InputError(message)


LONGEST_CONFIG = 100_000  # characters, for which PyYAML takes a second


class _ConfigLoader(yaml.SafeLoader):
    """Loads YAML of plain values, and refuses a key that stands twice: the first value would be lost silently."""

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice = next((key for key, count in keys.items() if count > 1), "one of them")
            raise yaml.MarkedYAMLError(problem=f"the key {twice} is there twice", problem_mark=node.start_mark)
        return mapping


def _load_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises InputError, in one line, for a file that is no YAML or is too long."""
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


def _read_config(
    parser: argparse.ArgumentParser, path: Path, problems: list[str], ignored: Mapping[str, Collection[str]]
) -> Iterator[tuple[str, str, Any]]:
    """Yields (section, key, value) for every key of the file that is an option of this parser; adds to the problems."""
    try:
        content = _load_yaml(path)
    except InputError as error:
        problems.append(str(error))
        return
    if not isinstance(content, dict | None):
        problems.append(f"--config {path}: expected the sections {', '.join(SECTIONS)}")
        return
    own: dict[str, list[str]] = {}
    for group in parser._action_groups:
        if group.title in SECTIONS:
            own[group.title] = list(dict.fromkeys(action.dest for action in group._group_actions))
    for section, entries in (content or {}).items():
        if section not in SECTIONS:
            hint = _hint(section, SECTIONS) or _right_section(section, own)
            problems.append(f"{printable(section)}: no such section in {path}{hint}")
        elif not isinstance(entries, dict | None):
            problems.append(f"{section}: expected a section with `key: value` lines in {path}")
        elif section in own:
            for key, value in (entries or {}).items():
                if key in own[section]:
                    yield section, key, value
                elif key not in ignored.get(section, ()):
                    problems += _key_problems(section, key, value, own, path)


def _key_problems(section: str, key: Any, value: Any, own: dict[str, list[str]], path: Path) -> list[str]:
    """What is wrong with a key that is no option; nothing for a former option at a value that did nothing."""
    if key in REMOVED and value in REMOVED[key]:
        return []
    if key in REPLACED:
        return [f"{section}.{key}: replaced; delete the line, and {REPLACED[key]}"]
    if key in REMOVED:
        return [f"{section}.{key} was removed, and {printable(value)} cannot be had any more; delete the line"]
    hint = _right_section(key, own) or _hint(key, own[section])
    return [f"{section}.{printable(key)}: no such key in {path}{hint}"]


def _right_section(key: Any, own: dict[str, list[str]]) -> str:
    for section, keys in own.items():
        if key in keys:
            return f" (it belongs in the section {section})"
    return ""


def _hint(name: Any, known: Collection[str]) -> str:
    if meant := did_you_mean(name, known):
        return f" ({meant})"
    return ""


def _convert(action: argparse.Action, value: Any) -> Any:
    """Convert and check a flag's words or a YAML value, both alike."""
    if value is None and action.default is None:  # `key: null`
        return None
    if action.nargs == 0:  # a switch such as --freeze-backbone
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {printable(repr(value))}")
        return value
    if action.nargs is None or action.nargs == "?":
        return _convert_one(action, value)
    if not isinstance(value, list) or (action.nargs == "+" and not value):
        if not value:
            raise ValueError("expected at least one value")
        raise ValueError(f"expected a list, got {printable(repr(value))}")
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
        raise ValueError(f"{printable(repr(value))} is none of {', '.join(names)}{_hint(text, names)}")
    return converted


# ----------------------------------------------------------------------------------------------------------------------
# Help: the options that people need, and all of them


def add_help(parser: argparse.ArgumentParser, needed: Iterable[str]) -> None:
    """Add `--help`, which shows the options in `needed` (by `dest`) with their defaults, and `--help-all`.

    The parser must have been made with `add_help=False`.
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
    """Formats a help that shows the default of each option that has one."""

    def _get_help_string(self, action):
        default = ""
        if action.option_strings and action.default != argparse.SUPPRESS:
            default = shown_default(action.default)
        meaning = action.help or ", ".join(map(str, action.choices or []))
        return f"{meaning} (default: {default})" if default else meaning


def short_help(parser: argparse.ArgumentParser, needed: Iterable[str]) -> str:
    """The first paragraphs of the description, and the options in `needed` with their defaults."""
    actions = {action.dest: action for action in parser._actions}
    flags = {}
    for dest in needed:
        positive = [flag for flag in actions[dest].option_strings if not flag.startswith("--no-")]
        flags[dest] = ", ".join(positive)
    column = max(map(len, flags.values())) + 4
    width = shutil.get_terminal_size().columns - 2
    lines = ["\n\n".join(parser.description.split("\n\n")[:2]), ""]
    for dest, names in flags.items():
        indents = {"initial_indent": f"  {names}".ljust(column), "subsequent_indent": " " * column}
        lines += textwrap.wrap(HelpFormatter._get_help_string(None, actions[dest]), width, **indents)
    return "\n".join([*lines, "", "--help-all shows the other options. docs/choosing.md says what to take."])


def shown_default(default: Any) -> str:
    """A default as the help shows it; nothing for None."""
    if default is None:
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    if default == SHIPPED:
        return "shipped"
    return f"{default:g}" if isinstance(default, int | float) else str(stored_path(default))


# ----------------------------------------------------------------------------------------------------------------------
# The settings of a run


def describe_options(parser: argparse.ArgumentParser, args: Any, sources: dict[str, str]) -> str:
    """What was typed, what the YAML file changes, and where all settings will be written."""
    typed = []
    configured = []
    for name, source in sources.items():
        value = getattr(args, name)
        if source == "command line":
            typed.append(_as_typed(name, value))
        elif source == "config" and value != parser.get_default(name):
            configured.append(f"{name} {_as_text(value)}")
    entries = {
        "command line": " ".join(typed),
        f"{stored(args.config)} changes": ", ".join(configured),
        "all settings": str(args.output_dir / "config.yaml"),
    }
    whole = {"subsequent_indent": "    ", "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(f"{title}: {values}", 80, **whole) for title, values in entries.items() if values)


def _as_typed(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return f"{flag(name)} {_as_text(value)}"


def _as_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_as_text, value))
    return f"{value:g}" if isinstance(value, float) else str(stored(value))


def stored_sections(sections: Mapping[str, type], args: Any) -> dict[str, dict[str, Any]]:
    """The options in the sections of a YAML file, given by the dataclass of each."""
    content = {}
    for title, section in sections.items():
        content[title] = {field.name: stored(getattr(args, field.name)) for field in dataclasses.fields(section)}
    return content


def stored(value: Any) -> Any:
    """An option's value as a file can hold it."""
    if isinstance(value, list | tuple):
        return [stored(item) for item in value]
    return str(stored_path(value)) if isinstance(value, Path) else value


def flag(name: str) -> str:
    """How an option is typed."""
    return f"--{name.replace('_', '-')}"
