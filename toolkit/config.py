"""Reads options: argparse is their schema; defaults < a YAML file < the command line give the values.

An argument group titled `model`, `data`, `moco` or `finetune` is the YAML section of that name, with each `dest` a key.
"""

import argparse
import copy
import dataclasses
import gc
import math
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from toolkit import SHIPPED, VERSION, InputError, check_file, did_you_mean, found_path, printable, stored_path

SECTIONS = ("model", "data", "moco", "finetune")
SETTLED = "settled"  # in the config.yaml of a run: what it made of its options, which is not asked of another run
OF_SHIPPED = "shipped"  # there, true: the run took the rest from the file of the shipped backbone

# --------------------------------------------------------- option values: types for flags and YAML values alike

LARGEST = {int: 2**31 - 1, float: 1_000_000}  # what generators take, and what is finite in float32 if multiplied


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


def threshold_goal(text: str) -> str:
    """What `toolkit.answers.measures.threshold_for` takes."""
    kind, _, share = text.partition("=")
    if text != "f1" and (kind not in ("sensitivity", "specificity") or not 0 < positive_share(share) < 1):
        raise argparse.ArgumentTypeError("expected f1, or a share as in sensitivity=0.95 or specificity=0.9")
    return text


def or_auto(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """A converter that accepts `auto` as well, and leaves it as it is."""
    return lambda text: text if text == "auto" else convert(text)


worker_count = or_auto(_number(int, lambda x: 0 <= x <= 256, "a whole number from 0 to 256, or auto"))


def folds(text: str) -> str:
    """'5', a number of parts, or '2/5', the second of them."""
    match = re.fullmatch(r"(?:([1-9]\d{0,5})/)?(\d{1,6})", text)
    if not match or int(match[2]) < 2 or int(match[1] or 1) > int(match[2]):
        raise argparse.ArgumentTypeError(f"expected a number of parts, as 5, or one, as 2/5, got '{printable(text)}'")
    return text


# ------------------------------------------------------------------------------------- options as fields of dataclasses


def option(default: Any, meaning: str | None = None, *, flags: tuple[str, ...] = (), **how: Any) -> Any:
    """A field that is an option with this help; `flags` are further names of it, `how` goes to `add_argument`."""
    if isinstance(default, bool):
        how["action"] = argparse.BooleanOptionalAction
    return dataclasses.field(default=default, metadata={"flags": flags, "help": meaning, **how})


def several(meaning: str, **how: Any) -> Any:
    """A field that is an option with one or more values, or None. Given twice, the values add up."""
    return option(None, meaning, nargs="+", action="extend", **how)


def make_parser(sections: Mapping[str, type], **how: Any) -> argparse.ArgumentParser:
    """A parser with the fields of each dataclass as a group of options, which is that section of the YAML file too."""
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=HelpFormatter, **how)
    for title, section in sections.items():
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(section):
            add_option(group, field)
    return parser


def add_option(parser: Any, field: dataclasses.Field) -> None:
    """Add a field of a dataclass, an `option`, to a parser or to a group of its options."""
    described = dict(field.metadata)
    parser.add_argument(flag(field.name), *described.pop("flags"), default=field.default, **described)


def frozen(kind: type, values: argparse.Namespace) -> Any:
    """The options as an object of a dataclass, which nobody changes. A list becomes a tuple."""
    lists = {name: tuple(value) for name, value in vars(values).items() if isinstance(value, list)}
    return kind(**vars(values) | lists)


# ------------------------------------------------------------------------------ options: defaults < YAML < command line


def parse_args(
    parser: argparse.ArgumentParser, argv=None, default_config=None, check=lambda *_: (), ignored=None
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Options from defaults, then a YAML file, then the command line; the parser is the schema of all three.

    Args:
        default_config: the file of the shipped backbone, with values for what is left where that is the checkpoint. It
            is read unless the command line names a file; or a run's, which had read it.
        check: what is wrong with the options together. It gets what this function returns, which it may complete, and
            the names of the options that the command line changes. One that is wrong by itself has its default.
        ignored: by section, the keys of the file that are options of the other script alone.

    Returns the options, and the source of each: 'default', OF_SHIPPED, 'config' (the file is `config`) or 'command
    line'. Raises InputError with every problem of both the command line and the file, one per line.
    """
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    typed, problems = _read_command_line(parser, argv)
    args = argparse.Namespace(**{dest: action.default for dest, action in actions.items()})
    sources = dict.fromkeys(actions, "default")

    def take(dest: str, value: Any, source: str, name: str) -> None:
        if value is not None:  # `key: null` asks for nothing
            sources[dest] = source
        try:
            setattr(args, dest, _convert(actions[dest], value))
        except (argparse.ArgumentTypeError, ValueError) as error:
            problems.append(f"{name}: {error}")

    content = {OF_SHIPPED: True}
    if "config" in typed:
        take("config", typed.pop("config"), "command line", "--config")
        content = _read_config(args.config, problems) if args.config else {}
    over_shipped = content.pop(OF_SHIPPED, False)
    for section, dest, value in _entries(parser, args.config, content, problems, ignored):
        take(dest, value, "config", f"{section}.{dest}")
    for dest, value in typed.items():
        take(dest, value, "command line", flag(dest))
    if over_shipped and default_config and found_path(args.checkpoint).resolve() == SHIPPED.resolve():
        args.config = args.config or default_config
        content = _read_config(default_config, problems)
        for section, dest, value in _entries(parser, default_config, content, problems, ignored):
            if sources[dest] == "default":
                take(dest, value, OF_SHIPPED, f"{section}.{dest}")
    problems += check(args, sources, {dest for dest in typed if getattr(args, dest) != actions[dest].default})
    if problems:
        raise InputError("\n".join(problems))
    return args, sources


def check_command_line(read_options: Callable[[Sequence[str] | None, str], Any], description: str) -> None:
    """Read the options of a script that is about to load PyTorch: for help, and for mistakes, it ends here."""
    gc.disable()  # it would look through what packages make again and again, for a sixth of the time: see `run_script`
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored
        # While packages load, an exception would be theirs, in any place. `run_script` has it raised again.
        signal.signal(signal.SIGINT, lambda signum, _: os._exit(128 + signum))
    try:
        read_options(None, description)
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return  # `main` finds it again: of several processes one reports it
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _read_command_line(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[dict[str, Any], list[str]]:
    """The typed values, unconverted, and problems with their names. argparse alone would stop at the first problem."""

    def error(message: str) -> None:
        raise InputError(message)

    lenient = copy.deepcopy(parser)
    lenient.print_help = parser.print_help
    lenient.error = error
    lenient._negative_number_matcher = re.compile(r"-[\d.]")  # argparse's own takes -1e-3 for an option
    for action in lenient._actions:
        action.default = argparse.SUPPRESS
        action.type = action.choices = None
        if action.nargs is None:
            action.nargs = "?"
            action.const = ""  # for `--epochs` without a value, which _convert_one refuses
        elif action.nargs == "+":
            action.nargs = "*"
    typed, rest = lenient.parse_known_args(argv)
    return vars(typed), list(unknown_words(parser, rest))


def unknown_words(parser: argparse.ArgumentParser, rest: list[str]) -> Iterator[str]:
    """What is wrong with the words that `parse_known_args` left over."""
    known = list(parser._option_string_actions)
    see = "--help-all" if "--help-all" in known else "--help"
    for before, word in zip(["", *rest], rest, strict=False):
        if word.startswith("-"):
            yield f"{printable(word)}: no such option{_hint(word.split('=')[0], known)}; see {see}"
        elif not before.startswith("-"):  # a word after an unknown option is most likely its value
            yield f"{printable(word)}: unexpected argument; see {see}"


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    """The content of a YAML file with sections; an empty one, and one problem more, if it is none."""
    try:
        check_file(path)
        content = yaml.safe_load(path.read_bytes())
        if isinstance(content, dict | None):
            return content or {}
        problems.append(f"--config {path}: expected the sections {', '.join(SECTIONS)}")
    except InputError as error:
        problems.append(str(error))
    except Exception as error:  # PyYAML stumbles over odd values in many ways, such as a date in month 13
        reason = f"{type(error).__name__}: {printable(' '.join(str(error).split()), 500)}"
        problems.append(f"--config {path}: cannot be read as YAML: {reason}")
    return {}


def _entries(parser, path: Path, content: dict[str, Any], problems: list[str], ignored: Mapping | None) -> Iterator:
    """Yields (section, key, value) for every key of the file that is an option of this parser; adds to the problems."""
    section_of: dict[str, str] = {}
    for group in parser._action_groups:
        if group.title in SECTIONS:
            section_of |= {action.dest: group.title for action in group._group_actions}
    for section, entries in content.items():
        if section not in (*SECTIONS, SETTLED):
            problems.append(f"{printable(section)}: no such section in {path}{_hint(section, SECTIONS, section_of)}")
        elif not isinstance(entries, dict | None):
            problems.append(f"{section}: expected a section with `key: value` lines in {path}")
        elif section in section_of.values():
            for key, value in (entries or {}).items():
                if section_of.get(key) == section:
                    yield section, key, value
                elif key not in (ignored or {}).get(section, ()) and value is not None:  # what is gone
                    hint = _hint(key, section_of, section_of) or "; delete the line"
                    problems.append(f"{section}.{printable(key)}: no such key in {path}{hint}")


def _hint(name: Any, known: Collection[str], section_of: Mapping[str, str] | None = None) -> str:
    if section_of and name in section_of:
        return f" (it belongs in the section {section_of[name]})"
    meant = did_you_mean(name, known)
    return f" ({meant})" if meant else ""


def _convert(action: argparse.Action, value: Any) -> Any:
    """Convert and check a flag's words or a YAML value, both alike."""
    if value is None and action.default is None:  # `key: null`
        return None
    if action.nargs == 0:  # a switch such as --freeze-backbone
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {printable(repr(value))}")
        return value
    if action.nargs in (None, "?"):
        return _convert_one(action, value)
    if not value:
        raise ValueError("expected at least one value")
    if not isinstance(value, list):
        raise ValueError(f"expected a list, got {printable(repr(value))}")
    return [_convert_one(action, item) for item in value]


def _convert_one(action: argparse.Action, value: Any) -> Any:
    if value is None or value == "":
        raise ValueError("expected a value, got none")
    if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
        raise ValueError(f"expected a value, got {printable(value)}")
    # Through text, because PyYAML reads 1e-3 as a string and the converters read text.
    try:
        text = str(value)
        converted = (action.type or str)(text)
    except ValueError:
        raise ValueError(f"invalid value {printable(value)}") from None
    if "\0" in text:
        raise ValueError("expected text without a NUL character")
    if action.choices is not None and converted not in action.choices:
        names = list(map(str, action.choices))
        raise ValueError(f"{printable(repr(value))} is none of {', '.join(names)}{_hint(text, names)}")
    return converted


# ------------------------------------------------------------------ help: the options that people need, and all of them


def add_help(parser: argparse.ArgumentParser, needed: Iterable[str]) -> None:
    """Add `--help`, which shows the options in `needed` (by `dest`) with their defaults, and `--help-all`."""
    actions = {action.dest: action for action in parser._actions}
    width = shutil.get_terminal_size().columns - 2
    lines = ["\n\n".join(parser.description.split("\n\n")[:2]), ""]
    for dest in needed:
        names = ", ".join(name for name in actions[dest].option_strings if not name.startswith("--no-"))
        meaning = HelpFormatter._get_help_string(None, actions[dest])
        lines += textwrap.wrap(meaning, width, initial_indent=f"  {names}".ljust(26), subsequent_indent=" " * 26)
    lines += ["", "--help-all shows the other options. docs/choosing.md says what to take."]
    show = {"action": "version", "version": "\n".join(lines)}  # argparse's action that prints a text
    parser.add_argument("-h", "--help", dest="help", help="the options that people need", **show)
    parser.add_argument("--help-all", dest="help", action="help", help="all options")
    parser.add_argument("--version", dest="help", action="version", version=VERSION, help="the version")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Formats a help that shows the default of each option that has one."""

    def _get_help_string(self, action):
        default = shown_default(action.default)
        meaning = action.help or ", ".join(map(str, action.choices or []))
        return f"{meaning} (default: {default})" if default else meaning


def shown_default(default: Any) -> str:
    """A default as the help shows it; nothing if there is none."""
    if default is None or default == argparse.SUPPRESS:
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, float):
        return f"{default:g}"
    return "shipped" if default == SHIPPED else str(stored(default))


def stored(value: Any) -> Any:
    """An option's value as a file can hold it."""
    if isinstance(value, list | tuple):
        return list(map(stored, value))
    return str(stored_path(value)) if isinstance(value, Path) else value


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a configuration with sections, as `section.key`; one without sections stays as it is."""
    settings = {}
    for name, value in config.items():
        settings |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return settings


def as_typed(kind: type, asked: Mapping[str, Any]) -> Iterator[str]:
    """Options of a dataclass by their names and values as a command line has them: no word for what is off anyway."""
    for name, value in asked.items():
        default = getattr(kind, name, value)
        if isinstance(value, list | tuple):
            yield from (flag(name), *map(str, value))
        elif not isinstance(value, bool | None):
            yield f"{flag(name)}={value}"
        elif value is False and isinstance(default, bool):
            yield flag(f"no_{name}")
        elif value or (value is False and default is not None):
            yield flag(name)  # an option that needs a value refuses this by its name


def flag(name: str) -> str:
    """How an option is typed."""
    return f"--{name.replace('_', '-')}"
