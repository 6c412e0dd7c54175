"""The parts that runs of both stages share: images, models and checkpoints, training, options, files and reports."""

import contextlib
import difflib
import hashlib
import importlib
import os
import re
import shlex
import stat
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

VERSION = "1.0"  # also in adapter files, results.json and report.html
MADE_BY = f"moco-lora {VERSION}"  # in pages and maps
TOOLKIT = Path(__file__).resolve().parents[1]
WRITTEN = Path("/", os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "moco-lora-written")
SHIPPED = TOOLKIT / "checkpoints/moco_stage1/moco_stage1_epoch_100.pth"  # the backbone of the first run
NO_LABEL = -100  # of an image, or a pixel of a mask, that no loss counts: what cross_entropy ignores
_ADDRESS = re.compile(r"\b(?!file:)([a-z][a-z0-9+.-]+:/)(?=[^/\s])", re.IGNORECASE)  # that was a path, with // as /
place_of: Callable[[Path], Path] = Path  # where what belongs at a path is written: see `output_folder.left_alone`


class InputError(ValueError):
    """The user's input is wrong. The message names the thing and the remedy; scripts print it and exit with 2."""

    def __str__(self) -> str:
        return _ADDRESS.sub(r"\1/", "".join(self.args))

    @property
    def problem(self) -> str:
        """The message without a second argument, which is advice by options that training alone has."""
        return self.args[0]


def printable(text: Any, longest: int = 120) -> str:
    """Untrusted text in a form fit for a message: one line, not too long, without a terminal's control codes."""
    try:
        shown = str(text)[:longest]
    except ValueError:
        return "a number too long to write out"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def listed(names: Iterable[Any], shown: int = 4, by: str = ", ") -> str:
    """The first few names, printable, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (by.join(map(printable, names[:shown])) or "none") + more


def dotted(prefix: str, name: str) -> str:
    """The full name of something inside the module `prefix`; "" is the model itself."""
    return ".".join(filter(None, (prefix, name)))


def did_you_mean(name: Any, known: Collection[str]) -> str:
    """`did you mean X?` with the known name that begins so or is most like this one; empty if none is like it."""
    name = printable(name)
    likely = [full for full in known if name and full.startswith(name)] or difflib.get_close_matches(name, known, 1)
    return f"did you mean {likely[0]}?" if likely else ""


def attributes(thing: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(thing, name) for name in names}


@contextlib.contextmanager
def temporarily(things: Iterable[Any], **values: Any) -> Iterator[None]:
    """Within this block these attributes of each thing have these values; afterwards they have those of before."""
    with contextlib.ExitStack() as stack:
        for thing in things:
            for name, value in values.items():
                stack.callback(setattr, thing, name, getattr(thing, name))
                setattr(thing, name, value)
        yield


def optional_package(name: str, who: str, install: str | None = None) -> ModuleType:
    """A package that only some users have. Raises InputError, which says who needs it, where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{who} needs {name} ({error}): pip install {install or name}") from None


def typed(script: str) -> str:
    """How `finetune`, `deploy` or `pretrain` is started where this process was: installed, or by its path."""
    if Path(sys.argv[0]).name.startswith("moco-lora-"):
        return f"moco-lora-{script}"
    if script == "pretrain":
        return "python -m moco.pretrain"
    path = TOOLKIT / f"{script}_lora.py"
    return f"python {path.name if Path.cwd() == TOOLKIT else shlex.quote(str(path))}"


def homed(text: str) -> Path:
    """The path that is typed, or in a YAML file, with the home in place of ~: no shell puts it there behind a =."""
    return Path(os.path.expanduser(text))


def stored_path(path: str | os.PathLike) -> Path:
    """The path to write into a file: relative to the toolkit if it is inside it, and else as it is."""
    normal = Path(os.path.normpath(path))  # resolves toolkit/../x, which is not inside
    return normal.relative_to(TOOLKIT) if normal.is_relative_to(TOOLKIT) else Path(path)


def found_path(path: str | os.PathLike) -> Path:
    """Where a path read from a file leads: inside the toolkit, if it exists only there, and else as it is."""
    inside = TOOLKIT / path
    return inside if not os.path.exists(path) and os.path.exists(inside) else Path(path)


def same_file(first: str | os.PathLike | None, second: str | os.PathLike | None) -> bool:
    """Do both paths lead to one existing file?"""
    exist = None not in (first, second) and os.path.exists(first) and os.path.exists(second)
    return exist and os.path.samefile(first, second)


def says(path: Path, pattern: bytes) -> bool:
    """Is this regular expression found in the first megabytes of a file? Not where there is none that can be read."""
    if not (os.path.isfile(path) and os.access(path, os.R_OK)):  # a pipe has no end
        return False
    with open(path, "rb") as file:
        return re.search(pattern, file.read(2**24)) is not None


@contextlib.contextmanager
def faults_named(folder: Path) -> Iterator[None]:
    """Turn what goes wrong with a folder within this block into an InputError that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write to the folder {folder}: {error.strerror or error}; name another") from None


def note_written(paths: Iterable[Path], by: str) -> None:
    """Note the digests of files that were just written, so that what writes `by` this name may replace them."""
    with contextlib.suppress(OSError):  # what is not noted is not replaced
        WRITTEN.parent.mkdir(parents=True, exist_ok=True)
        with open(WRITTEN, "a") as file:
            file.write("".join(f"{_digest(path, by)}\n" for path in paths))


def is_free(path: Path, by: str) -> bool:
    """Is there nothing at this place, or what was written `by` this name and has not been changed since?"""
    with contextlib.suppress(OSError):
        if os.path.isfile(path):  # a pipe has no end
            return _digest(path, by) in WRITTEN.read_text(errors="replace").split()
    return not os.path.lexists(path)


def unnoted() -> str:
    """What to do, for a message, where nothing was noted or can be; else nothing."""
    if os.access(WRITTEN, os.W_OK):
        return ""
    return f"; {WRITTEN} would tell, but cannot be written or is gone: set XDG_CACHE_HOME to a folder that lasts"


def _digest(path: Path, by: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    digest.update(os.fsencode(by))
    return digest.hexdigest()


def check_file(path: Path) -> None:
    """Raise InputError for a path that leads to no file."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return
        problem = "not a file"
    except FileNotFoundError:
        problem = "file not found"
    except OSError as error:  # such as a name that is too long
        problem = error.strerror
    raise InputError(f"cannot read {printable(path, 1000)}: {problem}; give the path of an existing file")
