"""toolkit/images/sources.py and data.py: data sets, splits, loaders."""

import itertools
import shutil
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tests.image_files import save_image, write
from tests.run_folders import assert_identical
from toolkit import InputError
from toolkit.images import data, folders, sources, transforms


def write_images(folder, names="abc", colour=(200, 100, 50)) -> None:
    for name in names:
        save_image(folder / f"{name}.png", Image.new("RGB", (6, 5), colour))


def names_in(images) -> set[str]:
    """Of files, their paths within their folder."""
    return set(images.relative_names())


def test_the_digits_are_scikit_learns_and_a_fifth_of_each_is_held_out_whatever_the_seed(monkeypatch):
    """A validation part is a fifth of those that train, and the seed chooses so many of each class."""
    expected = load_digits()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # which takes a second to import
    splits = sources.load_splits("digits", eval_split="held-out")
    assert splits.class_names == list("0123456789")
    for part in splits[:2]:
        for (image, label), index in zip(part, part.indices, strict=True):
            assert np.array_equal(np.asarray(image)[..., 0], np.round(expected.images[index] * 255 / 16))
            assert label == expected.target[index]
    chosen = sources.load_splits("digits", eval_split="validation")
    for whole, (rest, part, *_) in ((range(1797), splits), (splits.train.indices, chosen)):
        assert sorted([*rest.indices, *part.indices]) == sorted(whole)
        held_out = np.bincount(part.labels)
        assert held_out / (held_out + np.bincount(rest.labels)) == pytest.approx(0.2, abs=0.01)
    first, again, other = (sources.load_splits("digits", labels_per_class=3, seed=seed) for seed in (0, 0, 1))
    assert names_in(first.val) == names_in(other.val) == names_in(splits.val)
    assert names_in(first.train) == names_in(again.train) != names_in(other.train)
    assert np.bincount(first.train.labels).tolist() == [3] * 10
    assert names_in(other.train) <= names_in(splits.train)


def test_one_set_of_class_folders_is_split_the_same_each_time_and_an_added_image_moves_no_other(tmp_path):
    for label in ("cat", "dog"):
        write_images(tmp_path / label, range(50))
    first, second = (sources.load_splits("imagefolder", tmp_path, seed=seed) for seed in (0, 1))
    assert first.digest() == second.digest()
    assert len(names_in(first.train) | names_in(first.val)) == len(first.train) + len(first.val) == 100
    write_images(tmp_path / "cat", ["0a", "more", "zz"])
    write_images(tmp_path / "ant", "abcdef")  # the other classes have other numbers now
    after = sources.load_splits("imagefolder", tmp_path)
    assert names_in(first.train) <= names_in(after.train) and names_in(first.val) <= names_in(after.val)


def test_the_digest_knows_files_labels_and_parts_but_not_the_place(tmp_path):
    def digest(**files) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, letters in files.items():
            write_images(folder / name.replace("_", "/"), letters)
        return sources.load_splits("imagefolder", folder).digest()

    one = {"train_cat": "ab", "train_dog": "cd", "val_cat": "ef"}
    assert digest(**one) == digest(**one)
    changes = [{"train_cat": "abx"}, {"train_cat": "a"}, {"train_cat": "ax"}, {"val_dog": "f"}, {"train_cow": "x"}]
    changes += [{}, {"train_cat": "ef", "val_cat": "ab"}]
    assert len({digest(**(one | change)) for change in changes}) == len(changes)
    two = ["image", "image"]  # which are in no files
    sets = [([0, 0], [0]), ([0, 0], [1]), ([1, 0], [0]), ([0, 0], [0, 1]), ([0, 0], [1, 0])]
    assert len({data.LabelledImages(two, labels).subset(indices).digest for labels, indices in sets}) == len(sets)


def two_classes(folder, *parts: str, names="abc") -> None:
    """Class folders cat and dog in each part; the images of a class and a part differ from all others."""
    for part in parts:
        for number, label in enumerate(("cat", "dog")):
            write_images(folder / part / label, names, colour=(len(part), 100 * number, sum(part.encode()) % 256))


def test_the_names_that_people_use(tmp_path, capsys):
    for parts, told in (
        ("val", ""),
        ("valid", ""),
        ("validation test", "evaluating on {0}/validation; {0}/test is left alone"),
        ("test", "evaluating on {0}/test\n  to leave that for the last number, add a val/, or --eval-split validation"),
    ):
        folder = tmp_path / parts
        taken, *others = parts.split()
        two_classes(folder, "train", taken, *others)
        splits = sources.load_splits("imagefolder", folder)
        assert splits.val.name(0) == f"{folder}/{taken}/cat/a.png" and len(splits.val) == len(splits.train) == 6
        assert capsys.readouterr().out.strip() == told.format(folder)


def test_a_validation_part_needs_no_evaluation_folder_which_may_lie_elsewhere(tmp_path, capsys):
    two_classes(tmp_path, "train")
    with pytest.raises(InputError, match="but no val/, valid/, validation/ or test/: add one"):
        sources.load_splits("imagefolder", tmp_path)
    with pytest.raises(InputError, match="--task multilabel needs --data-list: a folder or an archive says one class"):
        sources.load_splits("imagefolder", tmp_path, task="multilabel")
    assert len(sources.load_splits("imagefolder", tmp_path, eval_split="validation").val) == 2
    assert len(sources.load_splits("imagefolder", tmp_path, folds="1/3").val) == 2
    splits = sources.load_splits("imagefolder", tmp_path, for_training_only=True)
    assert (len(splits.train), len(splits.val)) == (6, 0)
    write_images(tmp_path / "val" / "eel")  # which is nobody's business then
    assert len(sources.load_splits("imagefolder", tmp_path, eval_split="validation").train) == 4
    two_classes(tmp_path, "train", "elsewhere")
    sources.load_splits("imagefolder", tmp_path, "validation", val_dir=tmp_path / "elsewhere")
    told = f"evaluating on a part of the training images; {tmp_path / 'elsewhere'} is left alone"
    assert told in capsys.readouterr().out
    for folder in (tmp_path, tmp_path / "train"):
        splits = sources.load_splits("imagefolder", folder, val_dir=tmp_path / "elsewhere")
        assert splits.train.name(0) == str(tmp_path / "train/cat/a.png")
        assert splits.val.name(0) == str(tmp_path / "elsewhere/cat/a.png")
    shutil.copy(tmp_path / "train/cat/a.png", tmp_path / "elsewhere/cat")
    sources.load_splits("imagefolder", tmp_path, val_dir=tmp_path / "elsewhere", for_training_only=True)
    assert capsys.readouterr().out == ""  # of what is evaluated by nobody


def test_one_list_is_split_and_two_are_not(tmp_path):
    two_classes(tmp_path, "shoot one", names=range(20))
    lines = [f"shoot one/cat/{i}.png,10\nshoot one/dog/{i}.png,9" for i in range(20)]
    (tmp_path / "all.csv").write_text("\n".join(["path,label", *lines]))
    splits = sources.load_splits("imagefolder", data_list=[tmp_path / "all.csv"])
    assert splits.class_names == ["9", "10"]  # by value
    assert len(names_in(splits.train) | names_in(splits.val)) == len(splits.train) + len(splits.val) == 40
    assert splits.train.name(0) == str(tmp_path / "shoot one/cat/0.png") and splits.train.labels[0] == 1
    assert splits.train[0][0].size == (6, 5)
    (tmp_path / "a.txt").write_text("shoot one/cat/1.png\tcat\nshoot one/dog/1.png\tdog\n")
    (tmp_path / "b.txt").write_text("shoot one/dog/2.png\tdog\n")
    splits = sources.load_splits("imagefolder", data_list=[tmp_path / "a.txt", tmp_path / "b.txt"])
    assert (splits.class_names, splits.train.labels, splits.val.labels) == (["cat", "dog"], [0, 1], [1])
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "a.txt").rename(tmp_path / "elsewhere" / "a.txt")
    assert len(sources.load_splits("imagefolder", tmp_path, data_list=[moved, tmp_path / "b.txt"]).train) == 2


def test_lists_of_several_labels_are_split_by_their_rarest(tmp_path):
    write_images(tmp_path, range(80))
    labels = {}
    for i in range(80):
        labels[f"{i}.png"] = ["tall"] * (i % 2) + ["rare"] * (i % 10 == 0)
    (tmp_path / "all.csv").write_text("".join(f'{row},"{",".join(own)}"\n' for row, own in labels.items()))
    splits = sources.load_splits("imagefolder", data_list=[tmp_path / "all.csv"], task="multilabel")
    assert splits.class_names == ["rare", "tall"]
    for part in (splits.train, splits.val):
        assert part.targets[:, 0].sum() > 0 and len(part.targets) == len(part)
        for i, name in enumerate(part.relative_names()):
            expected = [float("rare" in labels[name]), float("tall" in labels[name])]
            assert part[i][1].tolist() == part.targets[i].tolist() == expected
    assert sources._alike(splits.train) == splits.train.labels  # not by the first label, as numbers are
    assert set(map(tuple, splits.train.at_most(3).targets.tolist())) == {(0, 0), (0, 1), (1, 0)}


def test_images_without_labels(tmp_path):
    write_images(tmp_path / "flat", ["a", "b", "c", "deeper/still/d"])
    two_classes(tmp_path, "parted/train", "parted/test")
    write_images(tmp_path / "unpaired/images")
    write(tmp_path / "unpaired/annotations/instances.json", "{}")  # which are no masks
    assert len(sources.load_unlabelled(tmp_path / "unpaired")) == 3
    (tmp_path / "list.txt").write_text("flat/a.png\nflat/b.png\n")
    flat = sources.load_unlabelled(tmp_path / "flat")
    assert list(flat.relative_names()) == ["a.png", "b.png", "c.png", "deeper/still/d.png"]
    assert set(flat.labels) == {data.UNLABELLED}
    parted = sources.load_unlabelled(tmp_path / "parted")
    assert parted.name(0) == str(tmp_path / "parted/train/cat/a.png") and len(parted) == 6  # none of test/
    listed = sources.load_unlabelled(data_list=[tmp_path / "list.txt"])
    assert list(listed.relative_names()) == ["flat/a.png", "flat/b.png"]
    assert list(map(sources.has_labels, [tmp_path / "flat", tmp_path / "parted", tmp_path])) == [False, True, True]
    assert not sources.has_labels(None, [tmp_path / "list.txt"])
    (tmp_path / "list.txt").write_text("flat/a.png,cat\nflat/b.png,dog\n")
    assert sources.has_labels(None, [tmp_path / "list.txt"])


def test_copies_of_training_images_are_told_and_so_is_that_none_are_looked_for(tmp_path, monkeypatch, capsys):
    def told() -> str:
        sources.load_splits("imagefolder", tmp_path)
        return capsys.readouterr().out

    two_classes(tmp_path, "train", "val")
    assert told() == ""
    (tmp_path / "val/cat/b.png").write_bytes((tmp_path / "train/dog/c.png").read_bytes())
    example = f"such as {tmp_path}/val/cat/b.png of"
    assert told().startswith(f"1 of 6 evaluation images are copies of training images, {example}")
    (tmp_path / "val/cat/b.png").rename(tmp_path / "val/cat/\x1b[31mb.png")
    assert told().strip().isprintable()
    monkeypatch.setattr(sources, "MOST_COMPARED", 11)
    assert "may be copies of training images: more than 11 are not compared" in told()


def test_a_class_or_a_part_of_which_nothing_can_be_read_is_an_error(tmp_path):
    for part, problem in (
        ("train/dog", "no training image of dog can be read"),
        ("val", r"none of the 6 images can be read, such as .*a\.png: not a readable"),
    ):
        two_classes(tmp_path, "train", "val")
        for path in (tmp_path / "train/cat/a.png", tmp_path / "val/dog/c.png"):
            path.write_bytes(path.read_bytes()[:-30])
        splits = sources.load_splits("imagefolder", tmp_path, skip_unreadable=True)
        assert len(list(splits.train)) == len(list(splits.val)) == 5
        for path in (tmp_path / part).rglob("*.png"):
            path.write_bytes(b"")
        with pytest.raises(InputError, match=problem):
            sources.load_splits("imagefolder", tmp_path, skip_unreadable=True)


def set_of(in_files: bool = True, **classes: int) -> data.LabelledImages:
    """So many images of each class, in files that need not be there or without names."""
    names = []
    labels = []
    for label, (name, count) in enumerate(classes.items()):
        names += [f"{name}/{i}.png" for i in range(count)]
        labels += [label] * count
    return data.LabelledImages(folders.ImageFiles("", names) if in_files else labels, labels)


@pytest.mark.parametrize("in_files", [True, False])
def test_a_validation_part_has_some_of_each_class_and_never_all_and_so_has_what_is_drawn(in_files):
    images = set_of(in_files, many=1000, few=4, two=2, one=1)
    for share in (1e-9, 0.2, 0.7, 1 - 1e-9):
        rest, part = sources.validation_part(images, share)
        assert sorted([*rest.indices, *part.indices]) == list(range(1007))
        counts = np.bincount(part.labels, minlength=4)
        assert counts[0] == pytest.approx(1000 * share, abs=40) and 0 < counts[0] < 1000
        assert 0 < counts[1] < 4 and counts[2] == 1 and counts[3] == 0
        assert np.take(images.labels, part.indices).tolist() == part.labels
    rest = set_of(in_files, many=1000)
    for fifth in (200, 160, 128):  # each draws anew
        rest, part = sources.validation_part(rest)
        assert len(part) == pytest.approx(fifth, rel=0.2) and names_in(part).isdisjoint(names_in(rest))
    with pytest.raises(InputError, match="every class has only one"):
        sources.validation_part(set_of(in_files, cat=1, dog=1))
    numbers = data.LabelledImages([0] * 10, [0] * 10, targets=torch.tensor([[9, 1, 7, 3, 5, 8, 0, 6, 2, 4.0]]).T)
    assert sources._alike(numbers) == [4, 0, 3, 1, 2, 4, 0, 3, 1, 2]  # fifths by size
    few = images.at_most(10)
    assert len(few) == 10 and {*few.labels} == {0, 1, 2, 3}
    drawn = set_of(in_files, many=501).at_most(10)  # where nothing is missing, as randperm says
    assert drawn.indices.tolist() == torch.randperm(501, generator=torch.Generator().manual_seed(0))[:10].tolist()


def draws(epochs: int = 1, start: int = 0, **options) -> list[list]:
    """Per batch, for each of its items, its number and what its transform drew."""
    numbered = data.Transformed(list(enumerate(range(10))), lambda i: (i, torch.rand(()), torch.randn(())))
    loader = data.build_loader(numbered, 4, **options)
    loader.batch_sampler.start = start
    batches = []
    for _ in range(epochs):
        for columns, _ in loader:
            batches.append(list(zip(*map(torch.Tensor.tolist, columns), strict=True)))
    return batches


def test_what_is_drawn_for_an_image_depends_on_seed_and_epoch_alone():
    whole = draws(epochs=2, shuffle=True)
    expected = torch.rand(5)
    torch.manual_seed(0)  # the state of the global generator has no part in it, and is left alone
    assert draws(epochs=2, shuffle=True, workers=2) == whole and torch.equal(torch.rand(5), expected)
    assert draws(epochs=2, shuffle=True) == whole
    assert draws(epochs=2, start=2, shuffle=True) == whole[2:]
    numbers, *drawn = zip(*itertools.chain(*whole), strict=True)
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    for column in drawn:  # no two images, nor one image in two epochs, get the same
        assert len(set(column)) == 20
    assert list(map(len, draws(shuffle=True, drop_last=True))) == [4, 4]
    # Another seed: another order and other views, each for itself, or two runs were less independent than seeds say.
    others, drawn_there, _ = zip(*itertools.chain(*draws(epochs=2, shuffle=True, seed=1)), strict=True)
    assert numbers != others and set(drawn[0]).isdisjoint(drawn_there)


def test_the_meter_tells_waiting_from_working(monkeypatch):
    clock = [100.0]  # for which time passes only when it is told
    monkeypatch.setattr(data.time, "perf_counter", lambda: clock[0])

    def loader():
        for size in (4, 4, 2):
            clock[0] += 0.5  # it takes the loader to bring a batch
            yield torch.zeros(size, 3), torch.zeros(size)
        clock[0] += 5.0  # nobody waits for the end

    meter = data.LoadingMeter()
    assert meter.results() == {"images_per_second": 0, "waiting_share": 0} and meter.shown() == {}
    for _ in range(2):  # two epochs
        for _ in meter.timed(loader()):
            clock[0] += 3.0  # it takes the loop to use it
        clock[0] += 50.0  # evaluation is not counted
    assert meter.results() == pytest.approx({"images_per_second": 20 / 21, "waiting_share": 3 / 21})
    assert meter.shown() == {"waiting for images": "14%"}
    assert data.LoadingMeter(20, waited=1, seconds=21).shown() == {}  # nothing to mend
    # The last batch counts though nobody asks for another, as a step takes the batches that it needs; and it counts for
    # both of two processes.
    monkeypatch.setattr(data.distributed, "world_size", lambda: 2)
    meter = data.LoadingMeter()
    batches = meter.timed(loader())
    next(batches)
    clock[0] += 1.5
    batches.close()
    assert meter.results() == {"images_per_second": 4, "waiting_share": 0.25}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_number_of_loading_processes_that_help(monkeypatch):
    for in_files, count, cores, device, processes, workers in (
        (False, 1999, 8, "cuda", 1, 0),
        (False, 2000, 8, "cuda", 1, 8),
        (True, 499, 8, "cuda", 1, 0),
        (True, 500, 1, "cuda", 1, 1),
        (True, 500, 64, "cuda", 1, 16),
        (True, 500, 4, None, 1, 1),
        (True, 500, 32, "cpu", 1, 8),
        (True, 500, 8, "cuda", 4, 2),  # processes of torchrun on this machine
        (True, 500, 8, "cpu", 4, 1),
    ):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        monkeypatch.setattr(data, "usable_cores", mock.Mock(return_value=cores))
        images = data.Transformed(set_of(in_files, cat=count), transforms.eval_transform(32))
        loader = data.build_loader(images, 8, workers="auto", device=device and torch.device(device))
        assert loader.num_workers == workers


@pytest.mark.parametrize(("count", "size"), [(11, 4), (9, 4), (8, 4), (3, 8), (7, 2)])
@pytest.mark.parametrize("processes", [2, 3])
def test_shares_of_all_processes_are_the_batches_of_one(monkeypatch, count, size, processes):
    """One that has no image of a batch gets a stand-in: all take as many steps."""
    batches = data.Batches(count, size, shuffle=True)
    alone = list(batches)
    monkeypatch.setattr(data.distributed, "world_size", lambda: processes)
    assert data.build_loader(data.Transformed(range(count), int), size).batch_sampler.batch_size % processes == 0
    for rank in range(processes):
        monkeypatch.setattr(data.distributed, "rank", mock.Mock(return_value=rank))
        batches.epoch = 0
        for n, (batch, share) in enumerate(zip(alone, batches, strict=True)):
            own = batch[rank::processes]
            assert batches.has_share(n) == bool(own) and share == (own or batch[:1])


def test_batches_are_loaded_once_if_they_need_little_memory(monkeypatch):
    """Else the same views are drawn again."""
    for most, draws in ((data.REMEMBERED_BYTES, 2 + 5), (10, 2 + 10)):
        monkeypatch.setattr(data, "REMEMBERED_BYTES", most)
        view = mock.Mock(spec=[], side_effect=lambda image: torch.rand(2))
        five = data.Transformed(list(enumerate(range(5))), view)
        batches = data.Remembered(data.build_loader(five, 2, shuffle=True))
        next(iter(batches))  # a pass that is broken off
        assert_identical(list(batches), list(batches))
        assert len(batches) == 3 and view.call_count == draws
