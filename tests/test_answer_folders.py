"""Folders of answers: the manifest of what is finished, and that nothing is replaced but what an earlier call wrote."""

import os
from pathlib import Path

import pytest

from toolkit import InputError
from toolkit.answers import predictions
from toolkit.answers.predictions import MANIFEST, Manifest, read_manifest


def begin(folder: Path, adapter: str = "one", command: str = "predict", resume: bool = False) -> Manifest:
    manifest = Manifest(folder, {"command": command, "adapter": adapter})
    places = [folder / "a/0", folder / "a/1"]
    manifest.found = predictions.begin_folder(manifest, places, [".png", ".npy"], resume)
    return manifest


def write(manifest: Manifest, name: str, content: str) -> Path:
    place = manifest.folder / name
    manifest.note(place)
    path = place.with_name(f"{place.name}.png")
    path.write_text(content)
    manifest.note(place, path)
    return path


@pytest.fixture
def stopped(tmp_path) -> Path:
    """A folder in which the first of two files is finished."""
    write(begin(tmp_path / "out"), "a/0", "mask")
    return tmp_path / "out"


def test_what_is_finished_is_there_as_it_was_written_whatever_the_clock_says(stopped):
    path = stopped / "a/0.png"
    os.utime(path, (0, 0))
    manifest = begin(stopped, resume=True)
    assert manifest.finished(stopped / "a/0") == [path] and manifest.finished(stopped / "a/1") == []
    path.write_text("cut")
    assert begin(stopped, resume=True).finished(stopped / "a/0") == []
    path.unlink()
    assert begin(stopped, resume=True).finished(stopped / "a/0") == []


def test_answers_of_something_else_are_not_gone_on_with(stopped):
    with pytest.raises(InputError, match=f"{stopped}: its answers were made with other adapter; name another folder"):
        begin(stopped, adapter="two", resume=True)
    with pytest.raises(InputError, match="its answers were made with other command"):
        begin(stopped, command="explain", resume=True)
    with pytest.raises(InputError, match="has answers already: go on with --resume, or name another folder"):
        begin(stopped)


@pytest.mark.parametrize("name", ["a/1.png", "a/1.npy", "a/0.npy"])
def test_what_was_put_there_by_hand_stays(stopped, name):
    """A link that leads nowhere too."""
    refused = f"what is written would replace {stopped}/{name}; name another folder"
    (stopped / name).write_text("by hand")
    with pytest.raises(InputError, match=refused):
        begin(stopped, resume=True)
    assert (stopped / name).read_text() == "by hand"
    (stopped / name).unlink()
    (stopped / name).symlink_to("later.png")
    with pytest.raises(InputError, match=refused):
        begin(stopped, resume=True)


def test_what_a_killed_command_had_just_written_is_made_again(stopped):
    """It was killed between the file and its note, or within a note: a torn last line is none."""
    read_manifest(stopped).note(stopped / "a/1")
    (stopped / "a/1.png").write_text("a whole one")
    with open(stopped / MANIFEST, "a") as file:
        file.write('{"a/1": {".pn')
    manifest = begin(stopped, resume=True)
    assert manifest.finished(stopped / "a/1") == []
    assert manifest.finished(stopped / "a/0") == [stopped / "a/0.png"]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\n", b"{\n", b"[]\n", b'{}\n{"a/0": 812}\n', b"{}\n7\n", b"[" * 100_000 + b"\n", None]
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_damaged_manifest_is_one_line(tmp_path, content, resume):
    if content is None:
        os.mkfifo(tmp_path / MANIFEST)
    else:
        (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(InputError, match=rf"{tmp_path}/_parts\.json is damaged: name another folder"):
        begin(tmp_path, resume=resume)


def test_processes_append_to_one_manifest_and_the_next_command_has_a_line_for_each_place(stopped):
    one, other = begin(stopped, resume=True), read_manifest(stopped)
    one.note(stopped / "a/0")
    write(other, "a/1", "another")
    write(one, "a/0", "mask")
    begin(stopped, resume=True)
    assert (stopped / MANIFEST).read_text().splitlines() == [
        '{"command": "predict", "adapter": "one"}',
        '{"a/0": {".png": 4}}',
        '{"a/1": {".png": 7}}',
    ]
