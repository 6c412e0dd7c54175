"""What every run shares, of either stage: images, models and checkpoints, training, options, files and reports."""

import difflib
import os
import re
from collections.abc import Collection, Iterable
from typing import Any


class InputError(ValueError):
    """What the user gave is wrong. The message names the thing and the remedy; scripts print it and exit with 2."""


def printable(text: Any, longest: int = 120) -> str:
    """Text of a stranger for a message: in one line, not too long and without a terminal's control codes."""
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
    """The name of something within the module of that name; "" is the model itself."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def did_you_mean(name: Any, known: Collection[str]) -> str:
    """`did you mean X?` with the known name that is most like this one; nothing where none is."""
    name = printable(name)
    likeness = {full: 1.0 if full.startswith(name) else _likeness(name, full) for full in known}
    if max(likeness.values(), default=0) < 0.6:  # difflib's own cutoff
        return ""
    # Of names that are equally like it, the one that begins alike for longer: resnet51 is resnet50 and not resnet18.
    alike = {full: len(os.path.commonprefix([name, full])) for full in known}  # noqa: RUF071 - by characters
    match = max(likeness, key=lambda full: (likeness[full], alike[full]))
    return f"did you mean {match}?"


def _likeness(name: str, full: str) -> float:
    """How alike two names are, as a whole or word by word between their dashes, in any order: 0 to 1."""

    def alike(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one, other).ratio()

    name, full = name.strip("-"), full.strip("-")
    ours, theirs = ([word for word in re.split("[-_ ]", text) if word] for text in (name, full))
    best = [max((alike(word, other) for other in theirs), default=0) for word in ours]
    shared = sum(likeness for likeness in best if likeness > 0.75)
    return max(alike(name, full), 2 * shared / max(1, len(ours) + len(theirs)))
