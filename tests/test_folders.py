"""Images in folders and in tar archives: found, read, split, shuffled and resumed."""

import gzip
import os
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from tests.image_files import bytes_of, tar_of, touch, write
from toolkit import InputError
from toolkit.answers import predictions
from toolkit.images import data, folders, shards, sources


def jpeg(level: int, suffix: str = "jpeg") -> bytes:
    return bytes_of(Image.new("L", (12, 9), level).save, suffix)


def write_set(folder, number: int) -> None:
    """Grey images, each of its own level, of three classes that take turns; six in an archive."""
    for first in range(0, number, 6):
        samples = {}
        for i in range(first, min(first + 6, number)):
            samples |= {f"{i:04}.jpg": jpeg(i), f"{i:04}.cls": b"%d" % (8 + i % 3)}
        write(folder / f"shard-{first // 6:03}.tar", tar_of(samples))


def level(image) -> int:
    return round(sum(image.resize((1, 1)).getpixel((0, 0))) / 3)


def test_masks_beside_images_are_no_images_nor_is_what_systems_leave_there(tmp_path, capsys):
    """As in BUSI's class folders: to a classifier, or to pretraining, they would be images of the class."""
    kept = ["sick/a.png", "well/b.jpg", "well/c_mask.png"]  # the last one is beside no image
    touch(tmp_path, *kept, "sick/a_mask.png", "sick/a_mask_1.png", "well/b_mask.png")
    touch(tmp_path, "sick/@eaDir/b.jpg", "@eaDir/b.jpg", "__MACOSX/b.jpg", "#recycle/b.jpg", "beside.png", "notes.txt")
    assert folders.labelled_files(tmp_path)[0].names == kept
    assert "images: 3 masks, 1 next to the class folders\n" in capsys.readouterr().out
    assert sources.load_unlabelled(tmp_path).source.names == ["beside.png", *kept]
    assert len(folders.image_names(tmp_path)) == 7  # for pairs of images and masks in one folder


def test_names_of_an_archive(tmp_path):
    """In folders, of any format; what macOS adds is passed over; two spellings of a label are one class."""
    samples = {"a/x.PNG": jpeg(3, "png"), "a/x.cls": b"cat\n", "b/x.webp": jpeg(200, "webp"), "b/x.json": b"{}"}
    samples |= {"b/x.cls": "caf\u00e9".encode(), "c/x.jpg": jpeg(7), "c/x.cls": "cafe\u0301".encode()}
    # By webdataset's key, the name up to its first dot, these would share the last one's label.
    samples |= {"scan_0.1.jpg": jpeg(3), "scan_0.1.cls": b"cat", "scan_0.2.jpg": jpeg(3), "scan_0.2.cls": b"dog"}
    samples |= {"x.jpg": jpeg(3), "x.left.jpg": jpeg(4), "x.cls": b"cow"}
    others = {name.replace("/", "/._"): b"\xff\x00" for name in samples}
    write(tmp_path / "one.tar", tar_of(others | samples))
    images, labels = shards.read_shards(tmp_path)
    names = "scan_0.1.jpg scan_0.2.jpg x.jpg x.left.jpg a/x.PNG b/x.webp c/x.jpg"
    assert list(images.names) == [f"one.tar/{name}" for name in names.split()]
    assert labels == ["cat", "dog", "cow", "cow", "cat", "caf\u00e9", "caf\u00e9"]
    assert level(images[5].convert("RGB")) == 200


def test_archives_of_training_and_evaluation_lie_in_folders_of_their_own(tmp_path, capsys):
    write_set(tmp_path / "train", 12)
    write_set(tmp_path / "validation", 3)
    splits = sources.load_splits("imagefolder", tmp_path)
    assert (len(splits.train), len(splits.val)) == (12, 3)
    example = f"{tmp_path}/validation/shard-000.tar/0000.jpg of {tmp_path}/train/shard-000.tar/0000.jpg"
    assert f"3 of 3 evaluation images are copies of training images, such as {example}" in capsys.readouterr().out
    assert len(sources.load_splits("imagefolder", tmp_path, for_training_only=True).train) == 12


def test_an_epoch_takes_a_few_archives_at_a_time_and_every_image_once(tmp_path):
    write_set(tmp_path, 120)
    images = data.Transformed(sources.load_unlabelled(tmp_path), level)
    assert sources.has_labels(tmp_path) and set(images.dataset.labels) == {data.UNLABELLED}  # none is told
    in_order = data.build_loader(images, 60, workers=1)
    assert [read for levels, _ in in_order for read in levels.tolist()] == list(range(120))
    batches = data.build_loader(images, 8, shuffle=True, seed=1).batch_sampler
    batches.epoch = 3
    order = [i for batch in batches for i, _ in batch]
    assert sorted(order) == list(range(120)) and order != sorted(order)
    archives = [i // 6 for i in order]
    first = set(archives[:48])  # 8 archives of 6
    second = set(archives[48:96])
    assert len(first) == len(second) == 8 and not first & second
    assert len(set(archives[:6])) > 1  # mixed
    batches.epoch = 3
    batches.start = 5
    assert [i for batch in batches for i, _ in batch] == order[40:]  # where it was interrupted
    assert batches.shuffled(3).tolist() == order != batches.shuffled(4).tolist()


def test_what_is_wrong_with_an_archive_is_told(tmp_path):
    path = tmp_path / "a.tar"

    def refused(problem: str) -> None:
        with pytest.raises(InputError, match=problem):
            shards.read_shards(tmp_path)

    write(path, tar_of({"0.jpg": jpeg(0), "1.jpg": jpeg(1), "1.cls": b"1"}))
    refused(r"1 images in its archives have no label next to them: a\.tar/0\.jpg")
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("0.cls")
        link.type = tarfile.SYMTYPE
        link.linkname = "0.cls"  # itself
        archive.addfile(link)
    refused(r"a\.tar: not a tar archive that can be read")
    write(path, tar_of({"readme.txt": b"nothing"}))
    refused("no images in its 1 archives")
    whole = path.read_bytes()
    damaged = whole.replace(b"readme.txt", b"readme.tyt")  # in a header: its checksum no longer fits
    for content in (b"no archive at all", whole[:700], damaged):
        path.write_bytes(content)
        refused(r"a\.tar: not a tar archive that can be read")
    path.write_bytes(gzip.compress(whole))
    refused("compressed ones must be unpacked")
    # What is cut is found out when it is decoded.
    write(path, tar_of({"0.jpg": jpeg(9)[:40], "1.jpg": b"nothing", "2.jpg": jpeg(9)[:-4], "3.jpg": jpeg(7)}))
    assert not sources.has_labels(tmp_path)
    images = sources.load_unlabelled(tmp_path)
    for i in (0, 1, 2):
        with pytest.raises(InputError, match=rf"a\.tar/{i}\.jpg: not a readable image"):
            images[i]
    assert len(sources.readable(images)) == len(sources.load_unlabelled(tmp_path, skip_unreadable=True)) == 1


def test_an_eps_that_is_called_a_photograph_does_not_start_ghostscript(tmp_path):
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"
    (tmp_path / "a.jpg").write_bytes(content)
    write(tmp_path / "shards/0.tar", tar_of({"a.jpg": content}))
    for files in (folders.ImageFiles(tmp_path, ["a.jpg"]), shards.read_shards(tmp_path / "shards")[0]):
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


def places_of(output: Path, *names: str) -> list[Path]:
    images = data.LabelledImages(folders.ImageFiles("/given", names))
    return predictions.places_of_images(images, [Path("/given")], output)


def test_what_is_made_of_an_image_has_a_place_of_its_own_below_its_folder(tmp_path):
    for name, place in (
        ("a/b.jpg", "a/b"),
        ("../pics/b.JPG", "pics/b"),  # of a list
        ("0.tar/../../victim/notes.png", "0.tar/victim/notes"),  # of an archive
        ("/etc/b.npy", "b"),
        ("1.2.840.100", "1.2.840.100"),  # DICOM files are called so
        ("1.2.840.100.dcm", "1.2.840.100"),
        ("b.2024.tif", "b.2024"),
    ):
        assert places_of(tmp_path, name) == [tmp_path / place]
    out = tmp_path / "out"
    out.mkdir()
    for name, target in (("link", ".."), ("loop", "loop"), ("inner", "."), ("gone", "not there")):
        (out / name).symlink_to(out / target)
    for names, problem in (
        (["a/b.png", "../a/b.jpg", "c.png"], "several images would be written to"),
        (["link/deep/b.png"], "out/link/deep is a link to a place outside"),
        (["loop/b.png"], "cannot write to"),
        (["gone/b.png"], "cannot write to"),
        (["a\0b/b.png"], "cannot write to"),
    ):
        with pytest.raises(InputError, match=problem):
            places_of(out, *names)
    assert len(places_of(out, "inner/b.png")) == 1
    with pytest.raises(InputError, match="--output /given is among the images in /given: name a folder outside"):
        places_of(Path("/given"), "b.jpg")


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems know one spelling alone")
def test_two_spellings_of_a_class_are_one_class(tmp_path):
    """The letter and its accent as one character, or as two, as a Mac may write them. A class may be called test."""
    touch(tmp_path, "caf\u00e9/a.png", "cafe\u0301/b.png", "test/c.png", "test/p1/d.png")
    files, labels, names = folders.labelled_files(tmp_path)
    assert names == ["caf\u00e9", "test"]
    assert list(files.names)[:3] == ["cafe\u0301/b.png", "caf\u00e9/a.png", "test/c.png"]
    assert labels == [names[0], names[0], names[1], names[1]]
    (tmp_path / "test").rename(tmp_path / ".test")
    with pytest.raises(InputError, match="found only caf\u00e9"):
        folders.labelled_files(tmp_path)


def test_copies_are_found_by_content_and_only_equal_sizes_are_read(tmp_path, monkeypatch):
    for name, content in {"a": "one", "b": "two", "c": "longer", "d": "one", "e": "six", "f": "longest"}.items():
        (tmp_path / name).write_text(content)
    files = folders.ImageFiles(tmp_path, "abcdefg")  # g is not there
    read, content = [], files.content
    monkeypatch.setattr(files, "content", lambda i: read.append(files.names[i]) or content(i))
    images = data.LabelledImages(files)
    found = data.copies(images.subset([0, 1, 6]), images.subset([2, 3, 4, 5, 6]))
    assert found == {files.path(0): files.path(3)}
    assert sorted(read) == ["a", "b", "d", "e"]
    assert data.among(images.subset([5, 6]), images.subset([2, 6])).tolist() == [False, True]  # by its name alone


# ---------- toolkit/answers/predictions.py: what is finished in a folder of answers, and nothing else is replaced


def begin(folder: Path, adapter: str = "one", resume: bool = False) -> dict[str, list[str]]:
    """The finished files of each of two places, by their names."""
    places = [folder / "a/0", folder / "a/1"]
    found = predictions.begin_folder(folder, {"adapter": adapter}, places, [".png", ".npy"], resume)
    return {place.name: [path.name for path in paths] for place, paths in found.items()}


def test_a_file_that_is_there_is_finished_and_answers_of_something_else_are_not_gone_on_with(tmp_path):
    begin(tmp_path)
    (tmp_path / "a/0.png").write_text("mask")
    for half in (".1.png.12.half", ".map.png.12.half"):  # it was killed, and another command writes a file there
        (tmp_path / "a" / half).touch()
    assert begin(tmp_path, resume=True) == {"0": ["0.png"], "1": []}
    assert sorted(os.listdir(tmp_path / "a")) == [".map.png.12.half", "0.png"]
    with pytest.raises(InputError, match=f"{tmp_path}: its answers were made with other adapter; name another folder"):
        begin(tmp_path, adapter="two", resume=True)
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
    assert not (tmp_path / predictions.MANIFEST).exists()
    (tmp_path / "a/1.npy").unlink()
    assert begin(tmp_path, resume=resume) == {"0": [], "1": []}


@pytest.mark.parametrize("content", [b"", b"\xff\n", b"{\n", b"[1]\n", b"7\n", b"[" * 100_000, None])
def test_a_damaged_manifest_or_one_that_is_no_file_is_one_line(tmp_path, content):
    if content is None:
        os.mkfifo(tmp_path / predictions.MANIFEST)
    else:
        (tmp_path / predictions.MANIFEST).write_bytes(content)
    with pytest.raises(InputError, match=f"{tmp_path}: its answers were made with other "):
        begin(tmp_path, resume=True)
