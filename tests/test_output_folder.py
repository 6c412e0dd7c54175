"""toolkit/run/output_folder.py: what a run may write where, and how nothing of another run is lost by it."""

import argparse
import errno
from pathlib import Path

import pytest

from toolkit import InputError
from toolkit.run import output_folder


def hold(folder: Path) -> None:
    with output_folder.held(folder):
        assert (folder / output_folder.LOCK).exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def problems(**given) -> list[str]:
    usual = {"dataset": "imagefolder", "data_dir": None, "data_list": None, "val_dir": None, "output_dir": Path("out")}
    return list(output_folder.problems(argparse.Namespace(**usual | given)))


@pytest.mark.parametrize("parts", [("cat", "dog"), ("train", "val"), ("train", "validation", "test")])
def test_results_may_not_lie_among_the_images(tmp_path, parts):
    """They would be a class of their own in the next run, which removes them."""
    for part in parts:
        (tmp_path / "images" / part).mkdir(parents=True)

    def refused(output: str) -> bool:
        found = problems(data_dir=tmp_path / "images", output_dir=tmp_path / "images" / output)
        assert all("is among the images in" in problem for problem in found) and len(found) < 2
        return bool(found)

    assert refused("out") == ("cat" in parts)
    assert all(refused(f"{part}/deep/out") for part in parts)
    assert not refused("../out")


def test_an_earlier_runs_files_and_nothing_else_are_moved_aside(tmp_path, capsys):
    folder = tmp_path / "lora"

    def left(resumed: Path | None, *more: str) -> set[str]:
        for name in ("lora.pth", "last.pth", "notes.txt", *more):
            (folder / name).write_text(name)
        output_folder.begin_folder(folder, ("lora.pth", "last.pth", "results.json"), resumed)
        return {path.name for path in folder.iterdir()}

    folder.mkdir()
    assert left(folder / "last.pth") == {"lora.pth", "last.pth", "notes.txt"} and capsys.readouterr().out == ""
    assert left(None, "results.json") == {"notes.txt"}
    assert capsys.readouterr().out == f"the earlier run in {folder} is now in {folder}-1\n"
    assert left(tmp_path / "other" / "last.pth") == {"notes.txt"}
    assert f"is now in {folder}-2, unfinished (--resume" in capsys.readouterr().out
    output_folder.begin_folder(folder, ("lora.pth",))  # there is nothing to move
    moved = {path.name: set(contents(path)) for path in tmp_path.iterdir() if path != folder}
    assert moved == {"lora-1": {"lora.pth", "last.pth", "results.json"}, "lora-2": {"lora.pth", "last.pth"}}
    assert contents(tmp_path / "lora-1")["last.pth"] == b"last.pth"


def test_the_folder_may_be_the_one_that_the_run_was_started_in_or_a_link(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    for number, folder in enumerate((Path(), tmp_path / "elsewhere/link"), 1):
        (tmp_path / "real/lora.pth").touch()
        output_folder.begin_folder(folder, ("lora.pth",))
        assert (tmp_path / f"real-{number}/lora.pth").exists() and not (tmp_path / "real/lora.pth").exists()


def test_nothing_remains_of_a_folder_into_which_nothing_was_written(tmp_path):
    folder = tmp_path / "new" / "deeper"
    with pytest.raises(InputError, match="bad image"), output_folder.held(folder):
        assert (folder / output_folder.LOCK).exists()
        raise InputError("bad image")
    assert list(tmp_path.iterdir()) == []
    with output_folder.held(folder):
        (folder / "last.pth").touch()
    assert [path.name for path in folder.iterdir()] == ["last.pth"]


def test_a_system_without_locks_goes_on_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder, "fcntl", None)
    hold(tmp_path)
    assert list(tmp_path.iterdir()) == []

    monkeypatch.undo()

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with output_folder.held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_its_run_removes_in_this_moment_is_made_anew(tmp_path, monkeypatch):
    """Else two later runs would hold a file each: one without a name, and one with."""
    fcntl = pytest.importorskip("fcntl")
    lockf, removed = fcntl.lockf, []

    def slow(*given):
        if not removed:
            removed.append((tmp_path / output_folder.LOCK).unlink())
        return lockf(*given)

    monkeypatch.setattr(fcntl, "lockf", slow)
    with output_folder.held(tmp_path):
        assert (tmp_path / output_folder.LOCK).read_text().startswith("process ")


def test_what_a_killed_run_left_halfway_goes(tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "last.pth").write_bytes(b"state")
    (folder / ".lora.pth.4711.tmp").write_bytes(b"half of it")
    with output_folder.held(folder):
        assert not list(folder.glob(".*.tmp"))
    assert contents(folder) == {"last.pth": b"state"}
