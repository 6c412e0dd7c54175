"""toolkit/images/folders.py: which files are found, in which order, and what is said where there are none."""

import os
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from toolkit import InputError
from toolkit.images import folders
from toolkit.images.shards import read_shards


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_an_eps_that_is_called_a_photograph_does_not_start_ghostscript(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as archive:
        archive.add(tmp_path / "a.jpg", "a.jpg")
    archived, _ = read_shards(tmp_path / "shards")
    for files in (folders.ImageFiles(tmp_path, ["a.jpg"], [0]), archived):
        with pytest.raises(InputError, match=r"a\.jpg: not a readable image \(cannot identify"):
            files[0]


def test_images_are_found_in_nested_folders_and_through_links(tmp_path):
    touch(tmp_path / "cat", "b.png", "a.JPG", "deep/er/c.webp", "deep/d.TIFF", "z.jpeg")
    touch(tmp_path / "elsewhere", "e.png", "linked/f.bmp")
    touch(tmp_path / "cat", "notes.txt", ".hidden.png", ".cache/g.png", "png", "deep/._c.webp")
    (tmp_path / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "cat" / "h.png").symlink_to(tmp_path / "elsewhere" / "e.png")
    (tmp_path / "cat" / "deep" / "back").symlink_to(tmp_path / "cat")  # is not followed for ever
    found = ["a.JPG", "b.png", "h.png", "z.jpeg", "deep/d.TIFF", "deep/er/c.webp", "more/e.png", "more/linked/f.bmp"]
    assert folders.image_names(tmp_path, "cat") == [f"cat/{name}" for name in found]
    assert folders.image_names(tmp_path / "cat")[:2] == ["a.JPG", "b.png"]


def test_a_folder_without_rights_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "cat/a.png", "cat/secret/b.png")
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "secret":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    with pytest.raises(InputError, match=r"cat/secret: cannot be listed: Permission denied"):
        folders.image_names(tmp_path, "cat")
    with pytest.raises(InputError, match=r"secret: cannot be listed: Permission denied"):
        folders.class_folders(tmp_path / "cat" / "secret")


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_a_name_that_is_no_utf8_is_opened(tmp_path):
    path = os.path.join(tmp_path, os.fsdecode(b"\xff.png"))
    Image.new("RGB", (2, 2)).save(path)
    files = folders.ImageFiles(tmp_path, folders.image_names(tmp_path), [3])
    image, label = files[0]
    assert image.size == (2, 2) and label == 3 and files.path(0) == path


def test_an_unlabelled_class_is_an_error_only_where_all_are_needed(tmp_path):
    touch(tmp_path, "cat/a.png", "dog/notes.txt")
    assert folders.labelled_files(tmp_path, ["cat", "dog", "eel"], every=False).labels == [0]
    with pytest.raises(InputError, match=r"no images in dog, eel \(looked for \.jpg"):
        folders.labelled_files(tmp_path, ["cat", "dog", "eel"])
    with pytest.raises(InputError, match="no images in dog"):
        folders.labelled_files(tmp_path, ["dog"], every=False)


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems know one spelling alone")
def test_two_spellings_of_a_class_are_one_class(tmp_path):
    """The letter and its accent as one character, or as two, as a Mac may write them."""
    touch(tmp_path, "caf\u00e9/a.png", "cafe\u0301/b.png", "dog/c.png")
    names = folders.class_folders(tmp_path)
    assert names == ["caf\u00e9", "dog"]
    files = folders.labelled_files(tmp_path, names)
    assert list(files.names) == ["cafe\u0301/b.png", "caf\u00e9/a.png", "dog/c.png"] and files.labels == [0, 0, 1]
    (tmp_path / "dog").rename(tmp_path / ".dog")
    with pytest.raises(InputError, match="found only caf\u00e9"):
        folders.class_folders(tmp_path)


def test_what_is_not_read_is_counted_by_suffix(tmp_path, capsys):
    """Not what systems leave among images, nor thumbnails of them."""
    touch(tmp_path / "cat", "a.png", "b.HEIC", "c.heic", "deep/d.heic", "e.avif", "README", ".f.heic", "@eaDir/b.jpg")
    touch(tmp_path, "@eaDir/b.jpg", "__MACOSX/b.jpg", "#recycle/b.jpg", "dog/b.gif")
    assert folders.class_folders(tmp_path) == ["cat", "dog"]
    files = folders.labelled_files(tmp_path, ["cat", "dog"])
    assert list(files.names) == ["cat/a.png", "dog/b.gif"]
    place, kinds = capsys.readouterr().out.strip().split(": files that are not read as images: ")
    assert place == str(tmp_path) and kinds.startswith("3 .heic, ")
    assert sorted(kinds.split(", ")) == ["1 .avif", "1 without suffix", "3 .heic"]


def test_copies_are_found_by_content_and_only_equal_sizes_are_read(tmp_path, monkeypatch):
    for name, content in {"a": "one", "b": "two", "c": "longer", "d": "one", "e": "six", "f": "longest"}.items():
        (tmp_path / name).write_text(content)
    files = folders.ImageFiles(tmp_path, "abcdefg", [0] * 7)  # g is not there
    read, content = [], files.content
    monkeypatch.setattr(files, "content", lambda i: read.append(files.names[i]) or content(i))
    assert folders.copies(files, [0, 1, 6], files, [2, 3, 4, 5, 6]) == [(files.path(0), files.path(3))]
    assert sorted(read) == ["a", "b", "d", "e"]
