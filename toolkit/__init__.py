"""What every run shares, of either stage: images, models and checkpoints, training, options, files and reports."""

from collections.abc import Iterable
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
