"""Images in folders, in tar archives and in lists: found, read, split, shuffled and resumed."""

import functools
import gzip
import math
import os
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.image_files import bytes_of, tar_of, touch, write
from toolkit import InputError
from toolkit.answers import predictions
from toolkit.images import data, folders, lists, shards, sources
from toolkit.images.bands import Bands


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
    touch(tmp_path / "arrays", "a.npy", "b.npz")  # which count where bands are read
    assert folders.image_names(tmp_path / "arrays", bands=Bands(1)) == ["a.npy", "b.npz"]
    assert not folders.image_names(tmp_path / "arrays")


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
    assert data.copies(images.subset([0, 1, 6]), images.subset([2, 3, 4, 5, 6])) == {files.path(0): files.path(3)}
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


# ---------------------------------------------------------------------------------------------- toolkit/images/lists.py


NAN = math.nan
LABELS = "labels"
NUMBERS = "numbers"


@pytest.fixture
def listed(tmp_path):
    """listed("a.png,cat", label_columns=["x"]) is a list of this text, read with these options."""
    plain = ("a.png", "b.png", "c.png", "a.dcm", "disc/IM0001", "\udce9.png")
    touch(tmp_path, *plain, "b c.png", "b,c.png", "two\nlines.png")

    def read(text: str, **options) -> lists.ImageList:
        (tmp_path / "list.csv").write_bytes(text.encode(errors="surrogateescape"))
        return lists.ImageList(tmp_path / "list.csv", **options)

    return read


def test_lists(listed):
    for text, expected in (
        ("a.png,cat\nb c.png,dog\n", (["a.png", "b c.png"], ["cat", "dog"])),
        ("\ufeffPath,Label\r\na.png , cat\r\n\r\n", (["a.png"], ["cat"])),
        ("\ufeffa.png,cat\n", (["a.png"], ["cat"])),
        ("a.png\tcat; black\n", (["a.png"], ["cat; black"])),
        ('"a.png", "cat"\n"b c.png","cat"\n', (["a.png", "b c.png"], ["cat", "cat"])),  # a space is no part of a name
        ("./a.png,caf\u00e9\n.//b c.png,cafe\u0301\n", (["a.png", "b c.png"], ["caf\u00e9", "caf\u00e9"])),
        ('"b,c.png",dog\n"two\nlines.png",cat', (["b,c.png", "two\nlines.png"], ["dog", "cat"])),
        ('"Path";label\na.png;cat\n"Path";label\nb c.png;dog\n', (["a.png", "b c.png"], ["cat", "dog"])),
        ("a.png,v1.0 5\nb c.png,cat 3\n", (["a.png", "b c.png"], ["v1.0 5", "cat 3"])),
        ("\udce9.png,cat\nb.png,dog\n", (["\udce9.png", "b.png"], ["cat", "dog"])),  # no UTF-8, but there
        ("a.dcm,cat\nb.png,dog\n", (["a.dcm", "b.png"], ["cat", "dog"])),
        ("disc/IM0001,cat\nb.png,dog\n", (["disc/IM0001", "b.png"], ["cat", "dog"])),  # DICOM too, and no title
        ("a.png,cat\na.png,cat\n", (["a.png", "a.png"], ["cat", "cat"])),  # twice as often in training, if so wished
    ):
        assert listed(text).labels() == expected
        assert listed(text).has_labels()


def test_lists_of_several_labels_and_of_numbers(listed):
    """In single precision the last ones would be one number, and infinity."""
    for task, text, names, values in (
        (LABELS, 'a.png,"cat,dog"\nb.png,\nc.png, dog\n', ["cat", "dog"], [[1, 1], [0, 0], [0, 1]]),
        (LABELS, "path\tlabels\na.png\t10, 9\nb.png\t\nc.png\t10,\n", ["9", "10"], [[1, 1], [0, 0], [0, 1]]),
        (LABELS, "path,cat,dog\na.png,1,0\nb.png,-1,1\nc.png,,1\n", ["cat", "dog"], [[1, 0], [NAN, 1], [NAN, 1]]),
        (LABELS, "Path,dog\na.png,1.0\nb.png,-1.0\nc.png,0.0\n", ["dog"], [[1], [NAN], [0]]),
        (LABELS, "path,labels\na.png,1\nb.png,0\nc.png,1\n", ["0", "1"], [[0, 1], [1, 0], [0, 1]]),  # no answers
        (LABELS, "image_name,cat\na.png,1\nb.png,0\nc.png,0\n", ["cat"], [[1], [0], [0]]),  # names no image
        (LABELS, "ID,cat\na.png,1\nb.png,0\nc.png,0\n", ["cat"], [[1], [0], [0]]),
        (NUMBERS, "a.png,3\nb.png,-1.5e3\nc.png,\n", ["number"], [[3], [-1500], [NAN]]),
        (NUMBERS, "path,age,kg\na.png,3,1\nb.png,4,\nc.png,5,2\n", ["age", "kg"], [[3, 1], [4, NAN], [5, 2]]),
        (NUMBERS, "a.png,3,1\nb.png,4,1\nc.png,5,2\n", ["number 1", "number 2"], [[3, 1], [4, 1], [5, 2]]),
        (NUMBERS, "a.png,1700000003\nb.png,1700000006\nc.png,1e39", ["number"], [[1700000003], [1700000006], [1e39]]),
    ):
        targets = listed(text).targets(task)
        assert (targets.paths, targets.names) == (["a.png", "b.png", "c.png"], names)
        expected = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(targets.values.double(), expected, equal_nan=True, rtol=0, atol=0)


CHEXPERT = """Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Edema,Fracture
a.png,Female,68,Frontal,AP,1.0,,
b.png,Male,87,Lateral,,,-1.0,1.0
"""


def test_a_list_with_other_columns_says_which_are_labels_or_numbers(listed):
    for columns, names, values in (
        (["No Finding..Fracture"], ["No Finding", "Edema", "Fracture"], [[1, NAN, NAN], [NAN, NAN, 1]]),
        (["Fracture", "No Finding"], ["Fracture", "No Finding"], [[NAN, 1], [1, NAN]]),
        (["No Finding", "Fracture..Edema"], ["No Finding", "Edema", "Fracture"], [[1, NAN, NAN], [NAN, NAN, 1]]),
        (["Fracture"], ["Fracture"], [[NAN], [1]]),
    ):
        targets = listed(CHEXPERT, group_by="Sex", label_columns=columns).targets("labels")
        assert targets.names == names
        torch.testing.assert_close(targets.values, torch.tensor(values).float(), equal_nan=True)
    assert listed(CHEXPERT, label_columns=["Sex"]).labels()[1] == ["Female", "Male"]
    assert listed(CHEXPERT, label_columns=["Age"]).targets("numbers").values.tolist() == [[68], [87]]
    assert listed(CHEXPERT, label_columns=["Sex..Age"], group_by="Sex").targets("numbers").names == ["Age"]
    with pytest.raises(InputError, match=r"--label-columns Edma: no such column in .*, which has Sex, Age"):
        listed(CHEXPERT, label_columns=["Edma"]).targets("labels")


def test_pretraining_takes_the_paths_of_any_list_and_labels_that_tell_how_much_are_no_classes(listed):
    for text in ("a.png,1,0\n", "b.png\n", "path,age\na.png,3\nb.png,4\nb.png,4\n", 'a.png,"x,dog"\n'):
        assert set(listed(text).paths()) <= {"a.png", "b.png"}
        assert listed(text).has_labels() == text.startswith("path")  # ages that repeat may be classes
    for labels in ("0.5 0.5 1", "3 1 2", "1 1 "):
        assert lists.look_like_numbers(labels.split(" "))
    for labels in ("1 2 1", "1. 2.0 1", "cat 2 1", "3 1"):
        assert not lists.look_like_numbers(labels.split(" "))


def test_lists_that_cannot_be_used(tmp_path, listed):
    for task, content, problem in (
        ("classes", "path,label\n", "lists no images"),
        ("classes", "\udcff\udcfe\0", r"line 1 is not in UTF-8, '.udcff.udcfe.x00': save"),
        ("classes", "a.png,cat\na.png,d\udce9g\n", "line 2 is not in UTF-8"),
        ("classes", 'a.png,cat\nb.png,"dog\na.png,cat\n', "line 2 is not .*; look at its quota.*: 'b.png,\"dog'"),
        ("classes", 'b.png,dog\na.png,"dog\nb.png,cat"\n', "line 2 is not .*a line break.*: 'a.png,\"dog'"),
        ("classes", 'a.png,"cat,dog"\n', "the label 'cat,dog' of a.png has a comma: write the name of its class"),
        ("classes", "a.png,cat\n./a.png,dog\n", "two labels for a.png; leave one of the lines out"),
        ("classes", "a.png,cat\n../{folder}/a.png,dog\n", r"two labels for \.\./.*/a\.png; leave one of the lines out"),
        ("classes", "a.png,cat,1\n", "the line 'a.png,cat,1' is not a path and a label"),
        ("classes", "a.png,cat\nb.png,\na.png\n", "2 of its 3 images have no label, as b.png: write `path,label`"),
        ("classes", "a.png,cat\ngone.png,dog\nx/gone.png,dog\n", "2 of its files are not in .*: gone.png, x/gone.png"),
        ("pairs", "a.png,gone.png\n", "1 of its files are not in .*: gone.png; write `image,mask` lines"),
        ("pairs", "a.png,b.png,7\n", "the line 'a.png,b.png,7' is not a path and a mask, one for each image$"),
        (LABELS, "a.png,cat,dog\n", "the line 'a.png,cat,dog' is not `path,\"a,b\"`; put labels"),
        (LABELS, "path,x\na.png,Mass|Edema\nb.png,Edema\n", "'a.png,Mass.Edema' is not `path,\"a,b\"`; put"),
        (LABELS, "a.png,Mass; Edema\n", "the line 'a.png,Mass; Edema' is not"),
        (LABELS, "path,cat\na.png,yes\n", "the column cat says yes: write 1 for yes and 0 for no"),
        (LABELS, "a.png,\n", "no image has a label"),
        (LABELS, "Path,Sex,Edema\na.png,Male,1\n", "'Male' in the column Sex is not 1, 0, or -1"),
        (LABELS, "path,cat,dog\na.png,1\n", "the line 'a.png,1' has 2 columns and not 3"),
        (LABELS, "path,cat,cat\na.png,1,1\n", "expected a column with a name of its own"),
        (LABELS, "path,cat,dog\na.png,1,0\na.png,1,\n", "two labels for a.png"),
        (NUMBERS, "a.png,three\n", "'three' in the column number is not a number, or nothing"),
        (NUMBERS, "a.png,nan\n", "'nan' in the column number is not a number"),
        (NUMBERS, "a.png\n", "expected a column with a name"),
        (NUMBERS, "a.png,1\n./a.png,2\n", "two labels for"),
        (LABELS, "path,x,x probability\na.png,1,0\n", "and not with probability behind it, for each"),
        (NUMBERS, "path,age answer,age\na.png,1,2\n", "name of its own, and not with answer behind it"),
    ):
        with pytest.raises(InputError, match=rf"list\.csv: .*{problem}"):
            found = listed(content.replace("{folder}", tmp_path.name))
            {"classes": found.labels, "pairs": found.pairs}.get(task, functools.partial(found.targets, task))()


def test_another_list_than_the_runs_may_have_images_in_the_runs_folder_and_lack_a_label(tmp_path, listed, capsys):
    disc = f"{tmp_path}/disc"
    touch(tmp_path, "disc/a.png")
    told = f"{tmp_path}/list.csv: no IM0001 is beside it: its images are in the run's {disc}\n"
    for name, data_dir, expected in (
        ("IM0001", disc, (tmp_path / "disc", told)),
        ("a.png", disc, (tmp_path, "")),  # which both folders have
        ("gone.png", disc, (tmp_path, "")),
        ("IM0001", f"file://{disc}", (tmp_path, "")),  # a stranger may have named an address
    ):
        path = listed(f"path,label\n{name},cat\n").path
        found = lists.ImageList.as_in_run(path, {"data_dir": data_dir})
        assert (found.folder, capsys.readouterr().out) == expected
    # A label that has no column in it is unknown, though the run was told which columns are labels of its own list.
    path = listed("path,Sex,Edema\na.png,F,1\n").path
    targets = lists.ImageList.as_in_run(path, {"label_columns": ["Effusion", "Edema"]}).targets("labels")
    assert targets.names == ["Edema"] and targets.in_columns


def test_a_second_list_follows_the_names_of_the_first():
    paths = Path("val.csv"), Path("train.csv")
    second = lists.Targets(["a.png"], ["dog", "cat"], torch.tensor([[1.0, NAN]]))
    names = ["cat", "dog", "eel"]
    found = lists.like(second, names, *paths).values
    torch.testing.assert_close(found, torch.tensor([[NAN, 1, NAN]]), equal_nan=True)  # a column lacks
    found = lists.like(second._replace(in_columns=False), names, *paths).values
    torch.testing.assert_close(found, torch.tensor([[NAN, 1, 0]]), equal_nan=True)
    with pytest.raises(InputError, match=r"val\.csv: it has no column eel, which train\.csv has; add it"):
        lists.like(second._replace(values=second.values.double()), names, *paths)
    with pytest.raises(InputError, match=r"val.csv: it has dog, which train.csv lacks"):
        lists.like(second, ["cat"], *paths)
