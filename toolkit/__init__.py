"""The parts that runs of both stages share: images, models and checkpoints, training, options, files and reports."""

import difflib
from collections.abc import Collection, Iterable
from typing import Any

VERSION = "1.0"  # also in adapter files, results.json and report.html


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
    """`did you mean X?` with the known name that begins so or is most like this one; empty if none is like it."""
    name = printable(name)
    begun = [full for full in known if name and full.startswith(name)]
    likely = begun or difflib.get_close_matches(name, known, 1)
    return f"did you mean {likely[0]}?" if likely else ""
