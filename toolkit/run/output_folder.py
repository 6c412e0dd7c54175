"""The folder of a run's results: it is outside the images, and is used by one run at a time."""

import contextlib
import functools
import itertools
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import toolkit
from toolkit import InputError, choices, faults_named, listed, printable, same_file, says, temporarily
from toolkit.images.remote import is_remote

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".moco-lora-runs"  # a file in the folder while a run writes there
HALVES = ".{}.[0-9]*.half"  # what a killed one left in `open_atomically`
OF_A_RUN = rb'\nsettled:|["\0]lora_rank'  # in its config.yaml; in its results.json, and where torch has saved
MOVING = ".moving"  # a folder in it while an earlier run is moved aside
FINE_TUNING_FILES = (
    *("lora.pth", "last.pth", "config.yaml", "folds", "report.html", "lora_evaluation.html", "README.md"),
    *("metrics.csv", "results.json", "learning_rates.csv", "results_answers.csv", "labels_to_check.csv"),
    *("training_curves.png", "mistakes.png", "confusion_matrix.png", "precision_recall.png", "scatter.png"),
)


def problems(args: Any, written: Iterable[str] = ()) -> Iterator[str]:
    """What is wrong with --output-dir, one line each; `written` names the files that the run writes there."""
    folder = args.output_dir
    if is_remote(folder):
        yield f"--output-dir {folder}: results are written on this machine; name a folder"
        return
    places = list(filter(_is_in_the_way, map(folder.joinpath, (*written, MOVING))))
    read = [("--data-list", path) for path in args.data_list or ()]
    for option in ("data_dir", "val_dir", "checkpoint", "stage1_adapter", "unlabelled"):
        if option in args:  # stage 1 has not all of them
            read.append((f"--{option.replace('_', '-')}", getattr(args, option)))
    for option, path in read:
        if path and any(same_file(place, above) for place in places for above in (path, *path.absolute().parents)):
            yield f"{option} {path} would be overwritten: give another --output-dir"
    if places and not any(place.name in (MOVING, "folds") or says(place, OF_A_RUN) for place in places):
        yield f"{listed(places)}: not known to be of an earlier run: move that, or give another --output-dir"
    if inside := [place for place in _places_of_images(args) if folder.resolve().is_relative_to(place.resolve())]:
        yield f"--output-dir {folder} is among the images in {inside[0]}: name a folder outside"


def _places_of_images(args: Any) -> Iterator[Path]:
    """The folders in which a new folder would be taken for a class, or its pictures for images."""
    reads_folder = args.dataset in ("imagefolder", choices.UNLABELLED_SET) and args.data_list is None
    others = [getattr(args, name) for name in ("knn_dir", "unlabelled") if name in args]
    for root in filter(None, (*others, args.data_dir if reads_folder else None)):
        parts = list(map(root.joinpath, ("train", *choices.EVALUATION_NAMES, "test")))
        yield from parts if os.path.isdir(parts[0]) else [root]
    if args.val_dir is not None:
        yield args.val_dir


@contextlib.contextmanager
def held(folder: Path, files: Iterable[str] = (), resumed: Path | None = None) -> Iterator[Callable]:
    """Lock the folder, or raise InputError in every process; yield its `begin_folder`, to be called before writing."""
    from toolkit import distributed  # here: it loads PyTorch

    # A resumed run's own are the files of its names, but for one that was left alone: the run's lies beside that.
    own = {path for path in map(folder.joinpath, files) if resumed and not os.path.lexists(f"{path}-1")}

    def may_replace(path: Path) -> bool:
        if path.parent != folder or not os.path.lexists(path):  # a free place is the run's from its first writing on
            own.add(path)
        return path in own

    with contextlib.ExitStack() as stack:
        distributed.first_does(lambda: stack.enter_context(locked(folder, names=files)))
        if files:  # a folder of answers knows which are its own: see `predictions.begin_folder`
            stack.enter_context(left_alone(may_replace))
        yield functools.cache(functools.partial(begin_folder, folder, files, resumed))


@contextlib.contextmanager
def locked(folder: Path, stem: str = "", names: Iterable[str] = ()) -> Iterator[None]:
    """Make the folder, lock it, or its files of this stem, and remove what killed processes left of these names."""
    lock = folder / f"{LOCK}{stem}"
    # os.path and not Path: that raises an error for a name too long for the file system.
    new = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    with faults_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = _lock(lock)
        for path in itertools.chain(*map(folder.glob, map(HALVES.format, names))):
            path.unlink()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may have been moved
            os.unlink(lock)  # before the lock is released: the file is still this run's
        os.close(handle)
        for place in new:
            with contextlib.suppress(OSError):  # it is not empty
                place.rmdir()


def _lock(path: Path) -> int:
    """Create a file that this process alone holds until it ends, however it ends; its descriptor, or InputError."""
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            if fcntl is not None:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked loading processes do not inherit it
        except (BlockingIOError, PermissionError):
            owner = printable(os.read(handle, 200).decode(errors="replace"))
            os.close(handle)
            problem = f"another run or command ({owner}) is writing in it; let it end, or name another"
            raise InputError(f"{path.parent}: {problem}") from None
        except OSError:  # some network file systems have no locks: then the run goes on without one
            pass
        if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
            with contextlib.suppress(OSError):  # on a full disk: what the run writes first will say so
                os.truncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return handle
        os.close(handle)  # a run that ended at this moment has removed the file


def begin_folder(folder: Path, files: Iterable[str] = (), resumed: Path | None = None) -> Path | None:
    """Make the folder this run's own: move an earlier run's `files` aside, and return where, unless it is resumed."""
    from toolkit import distributed

    goes_on = resumed is not None and resumed.name == "last.pth" and same_file(resumed.parent, folder)
    if not goes_on and distributed.is_main():
        with faults_named(folder):
            names = [name for name in files if _is_in_the_way(folder / name)]
            if names or os.path.lexists(folder / MOVING):
                return _move_aside(folder, names)
    return None


def _is_in_the_way(path: Path) -> bool:
    """Is this there? A README.md that is no model card may stay, and `folds` without the runs of a cross-validation."""
    if path.name == "README.md":
        return says(path, b"\n## Settings, of version ")
    if path.name == "folds":
        return os.path.isdir(path) and any(path.glob("*/last.pth"))
    return os.path.lexists(path)


def free_beside(place: Path) -> Path:
    """The first of `lora-1`, `lora-2`, ... next to the folder, or file, `lora` that is free."""
    numbered = (place.with_name(f"{place.name}-{number}") for number in itertools.count(1))
    return next(itertools.filterfalse(os.path.lexists, numbered))


@contextlib.contextmanager
def left_alone(may_replace: Callable[[Path], bool]) -> Iterator[None]:
    """Within this block no other file is replaced. What belongs there is put beside it; then InputError at the end."""
    aside: dict[Path, Path] = {}

    def place_of(path: Path) -> Path:
        return path if may_replace(path) else aside.setdefault(path, free_beside(path))

    with temporarily([toolkit], place_of=place_of):
        yield
    if aside:
        raise InputError(f"{listed(aside)} came there meanwhile and stays: the result is in {listed(aside.values())}")


def put_back(aside: Path, folder: Path) -> None:
    """Undo what `begin_folder` did."""
    for name in os.listdir(aside):
        os.rename(aside / name, folder / name)
    aside.rmdir()


def _move_aside(folder: Path, names: list[str]) -> Path:
    """Move these files to a free place beside the folder, say so, and return it."""
    place = folder
    if folder.name in ("", "..") or folder.is_symlink():
        place = folder.resolve()  # on the same disk
    aside = free_beside(place)
    moving = folder / MOVING  # gets its name at the end: if this is killed, the next run adds the rest
    moving.mkdir(exist_ok=True)
    for name in sorted(names, key=lambda name: name != "last.pth"):
        if os.path.lexists(moving / name):
            raise FileExistsError(f"{moving / name} is there already")
        os.rename(folder / name, moving / name)
    is_unfinished = {"results.json", "folds"}.isdisjoint(os.listdir(moving))
    try:
        os.rename(moving, aside)
    except OSError:  # the folder is a disk of its own, or nothing may be written next to it: the run stays what it was
        put_back(moving, folder)
        raise
    unfinished = ", unfinished (--resume with this --output-dir goes on with it)" if is_unfinished else ""
    print(f"the earlier run in {folder} is now in {aside}{unfinished}")
    if stays := sorted(name for name in os.listdir(folder) if not name.startswith(".")):
        print(f"  what else is there stays, even if it was made of that run: {listed(stays)}")
    return aside
