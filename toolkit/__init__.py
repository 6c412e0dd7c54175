"""The parts that runs of both stages share: images, models and checkpoints, training, options, files and reports."""

import difflib
import itertools
import os
import re
from collections.abc import Collection, Iterable
from typing import Any


class InputError(ValueError):
    """The user's input is wrong. The message names the thing and the remedy; scripts print it and exit with 2."""


def printable(text: Any, longest: int = 120) -> str:
    """Untrusted text in a form fit for a message: one line, not too long, without a terminal's control codes."""
    try:
        shown = str(text)[:longest]
    except ValueError:
        return "a number too long to write out"
    return re.sub(r"\W", _escaped, shown)


def _escaped(match: re.Match) -> str:
    character = match[0]
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


def listed(names: Iterable[Any], shown: int = 4) -> str:
    """The first few names, printable, and how many more there are."""
    names = list(names)
    text = ", ".join(map(printable, names[:shown])) or "none"
    if len(names) > shown:
        text += f" and {len(names) - shown} more"
    return text


def dotted(prefix: str, name: str) -> str:
    """The full name of something inside the module `prefix`; "" is the model itself."""
    return ".".join(filter(None, (prefix, name)))


def did_you_mean(name: Any, known: Collection[str]) -> str:
    """`did you mean X?` with the known name that is most like this one; empty if none is like it."""
    name = printable(name)

    def rank(full: str) -> tuple[float, int]:
        # A longer common beginning decides between equally like names: resnet51 is resnet50 and not resnet18.
        return _likeness(name, full), len(os.path.commonprefix([name, full]))  # noqa: RUF071 - by characters

    best = max(known, key=rank, default="")
    if not best or rank(best)[0] < 0.6:  # difflib's own cutoff
        return ""
    return f"did you mean {best}?"


def _likeness(name: str, full: str) -> float:
    """The likeness of two names, 0 to 1: 1 for a beginning, else as a whole, or of their words in any order."""
    if full.startswith(name):
        return 1.0
    ours = re.findall("[^-_ ]+", name)
    theirs = re.findall("[^-_ ]+", full)
    shared = 0.0
    for word in ours:
        likeness = max(map(_alike, itertools.repeat(word), theirs), default=0)
        if likeness > 0.75:
            shared += likeness
    return max(_alike(name.strip("-"), full.strip("-")), 2 * shared / max(1, len(ours) + len(theirs)))


def _alike(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
