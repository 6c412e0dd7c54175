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
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def listed(names: Iterable[Any], shown: int = 4) -> str:
    """The first few names, printable, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (", ".join(map(printable, names[:shown])) or "none") + more


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
    return f"did you mean {best}?" if best and rank(best)[0] >= 0.6 else ""  # difflib's own cutoff


def _likeness(name: str, full: str) -> float:
    """The likeness of two names, 0 to 1: 1 for a beginning, else as a whole, or of their words in any order."""
    if full.startswith(name):
        return 1.0
    ours = re.findall("[^-_ ]+", name)
    theirs = re.findall("[^-_ ]+", full)
    likeness = [max(map(_alike, itertools.repeat(word), theirs), default=0) for word in ours]
    shared = sum(filter(lambda value: value > 0.75, likeness))
    return max(_alike(name.strip("-"), full.strip("-")), 2 * shared / max(1, len(ours) + len(theirs)))


def _alike(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
