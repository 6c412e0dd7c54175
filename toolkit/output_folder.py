"""The folder of a run's results: apart from the images, of one script, and held by one run at a time.

A run moves what an earlier one left in its folder to a new folder beside it (`begin_folder`): nothing is written over.
What would be in the way is refused before: a folder among images, a checkpoint that the run is to read, results of the
other script, a run that is still going on.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from toolkit import InputError, distributed, printable
from toolkit.data import UNLABELLED_SET
from toolkit.files import read_checkpoint, same_file
from toolkit.folders import EVALUATION_NAMES

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".running"  # in the folder for as long as a run writes there
FINE_TUNING_FILES = (
    *("lora.pth", "last.pth", "metrics.csv", "results.json", "config.yaml", "report.html", "tensorboard"),
    *("learning_rates.csv", "learning_rates.png", "training_curves.png", "mistakes.png", "results_answers.csv"),
    *("confusion_matrix.png", "precision_recall.png", "scatter.png"),
)
# Both scripts write files of these names: the keys and columns that one alone of the two has there.
SHARED_FILES = ("last.pth", "results.json", "metrics.csv")
MARKS = {
    "finetune_lora.py": {"class_names", "trials", "val_accuracy"},
    "moco.pretrain": {"global_steps", "loss"},
}


def problems(args: argparse.Namespace, written: Iterable[str] = ()) -> Iterator[str]:
    """What is wrong with --output-dir, a line each; `written` names the files that the run writes there.

    --eval-only writes nothing.
    """
    folder, training = args.output_dir, vars(args).get("eval_only") is None
    places = [folder / name for name in written] if training else []
    for option in ("checkpoint", "stage1_adapter"):
        path = vars(args).get(option)
        if any(same_file(place, path) for place in places):
            yield f"--{option.replace('_', '-')} {path} would be overwritten: give another --output-dir"
    inside = [place for place in _places_of_images(args) if folder.resolve().is_relative_to(place.resolve())]
    if inside and training:
        yield f"--output-dir {folder} is among the images in {inside[0]}: name a folder outside"
    # os.path and not Path: that raises an error for a name too long for the file system.
    existing = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    if not os.path.isdir(existing):
        yield f"--output-dir {folder}: {existing} is a file; name a folder"
    elif not os.access(existing, os.W_OK):
        yield f"--output-dir {folder}: no permission to write to {existing}; name another folder"


def _places_of_images(args: argparse.Namespace) -> Iterator[Path]:
    """The folders in which a new folder would be taken for a class, and its pictures for images of it."""
    given = vars(args)
    own = args.dataset in ("imagefolder", UNLABELLED_SET) and given.get("data_list") is None
    for root in (args.data_dir if own else None, given.get("knn_dir")):
        if root is not None:
            parts = [root / name for name in ("train", *EVALUATION_NAMES, "test")]
            yield from parts if os.path.isdir(parts[0]) else [root]
    if given.get("val_dir") is not None:
        yield args.val_dir


@contextlib.contextmanager
def held(
    folder: Path, script: str, files: Iterable[str] = (), resumed: Path | None = None
) -> Iterator[Callable[[], None]]:
    """Within this block the folder of --output-dir is there, and no other run writes to it.

    If the block writes nothing into a new folder, nothing remains of it. Of several processes the first holds it.

    Args:
        folder: is made if it is not there.
        script: a key of MARKS.
        files, resumed: see `begin_folder`.

    Yields:
        `begin_folder` of this folder, to be called before the first file is written; further calls do nothing.

    Raises:
        InputError: in every process: another run is going on in the folder, the other script's results are in it, or
            it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        problem = None
        if distributed.is_main():
            try:
                stack.enter_context(_locked(folder))
                _check_owner(folder, script)
            except InputError as error:
                problem = str(error)
        problem, *_ = distributed.gather(problem)
        if problem is not None:
            raise InputError(problem)
        yield functools.cache(functools.partial(begin_folder, folder, files, resumed))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    new = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _lock(folder / LOCK)
    except OSError as error:
        raise _unusable(folder, error) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may have been moved
            os.unlink(folder / LOCK)  # while it is locked, so that it is ours
        os.close(handle)
        for place in new:
            with contextlib.suppress(OSError):  # it has files in it
                place.rmdir()


def _lock(path: Path) -> int:
    """The descriptor of a new file that is this process's alone until the process ends, however it ends.

    Locks of `fcntl.lockf` are no other process's: those that load images, which are forked, do not hold them any longer
    than the run. Raises InputError if another process has the file, and OSError if it cannot be made.
    """
    if fcntl is None:
        try:  # Windows removes a temporary file together with its process
            return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_TEMPORARY", 0))
        except FileExistsError:
            raise _busy(path, "") from None
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.read(handle, 200).decode(errors="replace")
            os.close(handle)
            raise _busy(path, owner) from None
        except OSError:  # a file system without locks, as some networks have: then nothing is held
            pass
        if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return handle
        os.close(handle)  # a run that ended in this moment has removed it


def _busy(path: Path, owner: str) -> InputError:
    who = f" ({printable(owner)})" if owner else ""
    return InputError(f"--output-dir {path.parent}: another run{who} is going on in it; let it end, or name another")


def _unusable(folder: Path, error: OSError) -> InputError:
    reason = error.strerror or error
    return InputError(
        f"--output-dir {folder}: cannot make it, or move out what is in it: {reason}; name another folder"
    )


def _check_owner(folder: Path, script: str) -> None:
    """Raises InputError if the other script's files would be replaced."""
    for name in SHARED_FILES:
        found = _keys(folder / name)
        other = next((other for other, marks in MARKS.items() if other != script and marks & found), None)
        if other is not None:
            raise InputError(
                f"--output-dir {folder} has the {name} of a run of {other}, which would be lost: name another folder"
            )


def _keys(path: Path) -> set[str]:
    """The keys or columns of a file; none if it is not there or cannot be read."""
    try:
        if path.suffix == ".pth":
            content = read_checkpoint(path)
        elif path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
        else:
            with open(path, encoding="utf-8") as file:
                content = dict.fromkeys(file.readline().strip().split(","))
    except (InputError, OSError, ValueError, RecursionError):
        return set()
    return set(content) if isinstance(content, dict) else set()


def begin_folder(folder: Path, files: Iterable[str] = (), resumed: Path | None = None) -> None:
    """Make the folder of --output-dir this run's own: the `files` that an earlier run left there are moved aside.

    They stay if this run goes on from a file in it, `resumed`. Raises InputError if it cannot be made or they stay.
    """
    if not distributed.is_main():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if resumed is None or resumed.resolve().parent != folder.resolve():
            _move_aside(folder, [name for name in files if os.path.lexists(folder / name)])
    except OSError as error:
        raise _unusable(folder, error) from None


def _move_aside(folder: Path, names: list[str]) -> None:
    """Move these files to the first of `lora-1`, `lora-2`, ... beside the folder `lora` that is free, and say so."""
    if not names:
        return
    named = folder.name not in ("", "..") and not folder.is_symlink()
    place = folder if named else folder.resolve()  # on the same disk, whatever `folder` is called
    for number in itertools.count(1):
        aside = place.with_name(f"{place.name}-{number}")
        with contextlib.suppress(FileExistsError):
            aside.mkdir()
            break
    for name in names:
        os.rename(folder / name, aside / name)
    unfinished = "" if "results.json" in names else ", unfinished (--resume with this --output-dir goes on with it)"
    print(f"the earlier run in {folder} is now in {aside}{unfinished}")
