"""toolkit/images/lists.py: what is read of a line, and what is said of one that cannot be read."""

import functools
import math
from pathlib import Path

import pytest
import torch

from tests.image_files import touch
from toolkit import InputError
from toolkit.images import lists

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
        ("classes", "a.png,\n", "the line 'a.png,' is not a path and a label"),
        ("classes", "a.png\nb.png\n", "its images have no labels; write `path,label` lines"),
        ("classes", "a.png,cat\ngone.png,dog\nx/gone.png,dog\n", "2 of its files are not in .*: gone.png, x/gone.png"),
        ("pairs", "a.png,gone.png\n", "1 of its files are not in .*: gone.png; write `image,mask` lines"),
        ("pairs", "a.png\n", "its images have no masks; write `image,mask` lines"),
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
