"""The parts that runs of both stages share: images, models and checkpoints, training, options, files and reports."""

import difflib
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
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def listed(names: Iterable[Any], shown: int = 4) -> str:
    """The first few names, printable, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (", ".join(map(printable, names[:shown])) or "none") + more


def dotted(prefix: str, name: str) -> str:
    """The full name of something inside the module `prefix`; "" is the model itself."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def did_you_mean(name: Any, known: Collection[str]) -> str:
    """`did you mean X?` with the known name that is most like this one; empty if none is like it."""
    name = printable(name)
    likeness = {full: 1.0 if full.startswith(name) else _likeness(name, full) for full in known}
    if max(likeness.values(), default=0) < 0.6:  # difflib's own cutoff
        return ""
    # A longer common beginning decides between equally like names: resnet51 is resnet50 and not resnet18.
    common = {full: len(os.path.commonprefix([name, full])) for full in known}  # noqa: RUF071 - by characters
    match = max(likeness, key=lambda full: (likeness[full], common[full]))
    return f"did you mean {match}?"


def _likeness(name: str, full: str) -> float:
    """The likeness of two names, 0 to 1: as a whole, or of their words in any order."""

    def alike(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one, other).ratio()

    def words(text: str) -> list[str]:
        return [word for word in re.split("[-_ ]", text) if word]

    name, full = name.strip("-"), full.strip("-")
    ours, theirs = words(name), words(full)
    shared = 0.0
    for word in ours:
        likeness = max((alike(word, other) for other in theirs), default=0)
        if likeness > 0.75:
            shared += likeness
    return max(alike(name, full), 2 * shared / max(1, len(ours) + len(theirs)))
