"""Folders of answers: what is finished in them, and that nothing is replaced but what an earlier call wrote."""

import os
from pathlib import Path

import pytest

from toolkit import InputError
from toolkit.answers.predictions import MANIFEST, begin_folder


def begin(folder: Path, adapter: str = "one", command: str = "predict", resume: bool = False) -> dict[str, list[str]]:
    """The finished files of each of two places, by their names."""
    places = [folder / "a/0", folder / "a/1"]
    about = {"command": command, "adapter": adapter}
    found = begin_folder(folder, about, places, [".png", ".npy"], resume)
    return {place.name: [path.name for path in paths] for place, paths in found.items()}


def test_a_file_that_is_there_is_finished_and_answers_of_something_else_are_not_gone_on_with(tmp_path):
    begin(tmp_path)
    (tmp_path / "a/0.png").write_text("mask")
    (tmp_path / "a/.1.png.12.half").touch()  # it was killed
    assert begin(tmp_path, resume=True) == {"0": ["0.png"], "1": []}
    assert os.listdir(tmp_path / "a") == ["0.png"]
    with pytest.raises(InputError, match=f"{tmp_path}: its answers were made with other adapter; name another folder"):
        begin(tmp_path, adapter="two", resume=True)
    with pytest.raises(InputError, match="its answers were made with other command"):
        begin(tmp_path, command="embed", resume=True)
    with pytest.raises(InputError, match="has answers already: go on with --resume, or name another folder"):
        begin(tmp_path)
    (tmp_path / "a/0.png").unlink()
    assert begin(tmp_path, resume=True) == {"0": [], "1": []}


@pytest.mark.parametrize("resume", [False, True])
def test_what_no_command_wrote_is_not_replaced(tmp_path, resume):
    """Nor a link to nothing. Other files in the folder are nobody's business."""
    (tmp_path / "a").mkdir()
    (tmp_path / "other.txt").touch()
    (tmp_path / "a/1.npy").symlink_to("later.npy")
    with pytest.raises(InputError, match=r"what is written would replace .*a/1\.npy; name another folder"):
        begin(tmp_path, resume=resume)
    assert not (tmp_path / MANIFEST).exists()
    (tmp_path / "a/1.npy").unlink()
    assert begin(tmp_path, resume=resume) == {"0": [], "1": []}


@pytest.mark.parametrize("content", [b"", b"\xff\n", b"{\n", b"[1]\n", b"7\n", b"[" * 100_000, None])
def test_a_damaged_manifest_is_one_line(tmp_path, content):
    """Or one that is no file."""
    if content is None:
        os.mkfifo(tmp_path / MANIFEST)
    else:
        (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(InputError, match=rf"{tmp_path}/_parts\.json is damaged: name another folder"):
        begin(tmp_path, resume=True)
