"""Which images to label next, and which labels to look at: `deploy_lora.py choose`, and `labels_to_check.csv`."""

import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, fill_in
from PIL import Image

import deploy_lora
from finetune_lora import load_finetuned
from tests.run_folders import rows_of
from toolkit.answers import choosing, report_page
from toolkit.images import data, folders, sources
from toolkit.run import commands, verdict


def blob(axis: int, *spread: float) -> torch.Tensor:
    """Features of an image for each number, which says how far it is from the middle of its kind."""
    features = torch.zeros(len(spread), 8)
    features[:, axis] = 10
    features[:, axis + 4] = torch.tensor(spread)
    return features


# Three kinds of images, at 0 to 4, 5 to 7, and 8. The middle ones are 2, 6 and 8.
KINDS = torch.cat([blob(0, -2, -1, 0, 1, 2), blob(1, -1, 0, 1), blob(2, 0)])


def test_the_most_typical_image_of_each_kind_comes_first_and_a_kind_with_a_label_has_its_turn_later(monkeypatch):
    assert choosing.most_typical(KINDS, 3, torch.zeros(0, 8)) == [2, 6, 8]  # the largest kind before the others
    both_ways = 9 + torch.tensor([1.0, 1, 9, -1, -1, -9])[:, None] * torch.tensor([1.0, 0])  # from the mean, 9
    assert sorted(choosing.most_typical(both_ways, 2, torch.zeros(0, 2))) == [0, 3]
    assert choosing.most_typical(KINDS, 2, KINDS[:1]) == [6, 8]
    alike = torch.cat([blob(0, *[0.0] * 5), blob(1, 0, 0, 0), blob(2, 0, 0)])
    assert choosing.most_typical(alike, 3, alike[:1]) == [5, 8, 0]  # then the largest one's again
    drawn = torch.randn(40, 8)
    assert choosing.most_typical(drawn, 6, drawn[:0]) == choosing.most_typical(drawn, 6, drawn[:0])
    # Or the one of each kind that is least sure: of three classes.
    leads = torch.tensor([0.5, 0.4, 0.1, 0.3, 0.9, 0.8, 0.05, 0.2, 0.0])
    logits = torch.stack([torch.full((9,), 0.05), (0.95 + leads) / 2, (0.95 - leads) / 2], 1).log()
    monkeypatch.setattr(choosing, "CANDIDATES", 3)  # all of them
    assert choosing.least_sure(KINDS, 3, logits) == [8, 6, 2]
    monkeypatch.setattr(choosing, "CANDIDATES", 1)
    assert choosing.least_sure(KINDS, 2, logits) == [8, 6]


def test_fifty_pictures_are_less_than_a_megabyte_whatever_is_on_them():
    noise = np.random.RandomState(0).randint(0, 256, (300, 3000, 3), np.uint8)
    images = data.LabelledImages([Image.fromarray(picture) for picture in (noise[:, :500], noise[:60])] * 25)
    page = report_page.html_pictures(images, [(i, f"<{i}>") for i in range(50)])
    assert page.count("<img ") == 50 and "&lt;49&gt;</figcaption>" in page
    assert len(page) < 1e6


def test_an_address_stays_one_in_the_list_to_label(tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "html_pictures", lambda *_: "")
    choosing.write_chosen(data.LabelledImages(folders.ImageFiles("https://host", ["a.png"])), tmp_path)
    assert (tmp_path / "to_label.csv").read_text().splitlines() == ["path,label", "https://host/a.png,"]


def choose(model: Path, *words: str | Path) -> list[str]:
    return deploy_lora.main(["choose", str(model), *map(str, words)])


def test_a_backbone_chooses_an_image_of_each_class_and_the_list_trains(base, images, tmp_path, capsys, monkeypatch):
    """The names of the folders, those of the classes, are not looked at."""
    shutil.copytree(images / "train", tmp_path / "pool")
    monkeypatch.chdir(tmp_path)  # relative paths are of another folder than the list's
    chosen = choose(base, "pool", "--count", "3", "--output", "first")
    assert chosen == choose(base, "pool", "--count", "3", "--output", "again")
    assert sorted(Path(name).parent.name for name in chosen) == sorted(CLASSES)
    assert "wrote first: 3 images to label, the most typical first\n" in capsys.readouterr().out
    captions = re.findall(r"<figcaption>(\d\. \S+)</figcaption>", Path("first/to_label.html").read_text())
    assert captions == [f"{i}. {Path(name).name}" for i, name in enumerate(chosen, 1)]
    lists = [Path("first/to_label.csv"), Path("second/to_label.csv")]
    fill_in(lists[0])
    more = choose(base, "pool", "--labelled", lists[0], "--count", "6", "--output", "second")
    assert len({*chosen, *more}) == 9
    fill_in(lists[1])
    splits = sources.load_splits("imagefolder", data_list=lists)
    assert splits.class_names == sorted(CLASSES)
    assert list(map(splits.train.name, range(3))) == [str(tmp_path / name) for name in chosen]


def test_an_adapter_chooses_what_it_is_least_sure_of(adapter_for_images, images, tmp_path, monkeypatch, capsys):
    """With few labels the most typical: it does not know then what it is unsure of."""
    monkeypatch.setattr(choosing, "CANDIDATES", 1)
    chosen = choose(adapter_for_images, images / "train", "--count", "4", "--output", tmp_path / "out")
    assert "4 images to label, the adapter is least sure of them" in capsys.readouterr().out
    model, about = load_finetuned(adapter_for_images)
    leads = {}
    for path in (images / "train").rglob("*.png"):
        with torch.no_grad(), Image.open(path) as image:
            first, second = model(about["transform"](image)[None]).softmax(1).topk(2).values[0].tolist()
        leads[str(path)] = first - second
    assert chosen == sorted(leads, key=leads.get)[:4]
    known = tmp_path / "known"
    for labelled, how in ((4, "the most typical"), (5, "the adapter is least sure")):
        for name, i in itertools.product(CLASSES, range(labelled)):
            (known / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(images / "train" / name / f"{i}.png", known / name / f"other{i}.png")
        output = tmp_path / how
        rest = choose(adapter_for_images, images / "train", "--labelled", known, "--count=6", "--output", output)
        assert how in capsys.readouterr().out
        assert all(int(Path(name).stem) >= labelled for name in rest)  # a copy is known by its content


def test_only_choose_does_not_offer_to_read_archives():
    _, parsers = commands.make_parser()
    assert [name for name in commands.ANSWERING if "archives" not in parsers[name].format_help()] == ["choose"]


def test_of_many_images_some_are_looked_at(base, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choosing, "MOST_IMAGES", 7)
    assert len(choose(base, images / "train", "--count", "2", "--output", tmp_path / "some")) == 2
    assert "21 images: 7 of them, drawn at random, are looked at" in capsys.readouterr().out
    (tmp_path / "broken.png").write_bytes(b"no image")
    pool = images / "train", tmp_path / "broken.png"
    assert len(choose(base, *pool, "--count", "22", "--output", tmp_path / "more")) == 21  # that can be read


def test_the_next_command_of_a_run_chooses_what_has_no_label_again_and_again(finetune, images, tmp_path, monkeypatch):
    """Beside the images that train: some of these, and others. A list that was filled in stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verdict, "_compared", lambda *_: ("", False, True))
    mine = shutil.copytree(images, tmp_path / "mine")
    beside = shutil.copytree(images, mine / "unlabelled")
    others = [beside / "train" / name / "0.png" for name in CLASSES]
    for place in others:
        (mine / place.relative_to(beside)).unlink()
    for extra, pool in (("", beside), ("--resume", beside), (f"--unlabelled {beside}/train", beside / "train")):
        next_step = finetune(f"--data-dir {mine} --epochs 1 {extra}")["verdict"]["next_step"]
        [words] = map(str.split, re.findall(r"deploy_lora\.py (choose [^;]*)", next_step))
        assert sorted(map(Path, deploy_lora.main([*words, "--count=3"]))) == sorted(others)
        assert words[2:4] == [str(pool), "--output"]
        fill_in(Path(words[4], "to_label.csv"))


def test_a_run_lists_the_training_images_whose_label_seems_wrong_worst_first(finetune, images, tmp_path, capsys):
    """One of the dark images lies among the bright ones; a resumed run knows of it as well."""
    mixed = shutil.copytree(images, tmp_path / "mixed")
    shutil.copy(images / "val/dark/0.png", mixed / "train/bright/wrong.png")
    options = f"--data-dir {mixed} --epochs 1"
    folder = finetune(options)["folder"]
    rows = rows_of(folder / "labels_to_check.csv")
    assert f"labels_to_check.csv ({len(rows)} training images whose label may be wrong)," in capsys.readouterr().out
    assert rows[0] == rows[0] | {"path": str(mixed / "train/bright/wrong.png"), "label": "bright", "answer": "dark"}
    times = [float(row["times"]) for row in rows]
    assert times == sorted(times, reverse=True) and times[-1] > 1
    page = (folder / "report.html").read_text()
    assert "Labels to look at" in page and "bright, and not dark?" in page
    (folder / "labels_to_check.csv").unlink()
    finetune(f"{options} --resume")
    assert rows_of(folder / "labels_to_check.csv") == rows
    # Of one image of each class none is held out: an empty list would say that all labels are right.
    folder = finetune(f"{options} --labels-per-class 1", "other")["folder"]
    assert not (folder / "labels_to_check.csv").exists()
    assert "Labels to look at" not in (folder / "report.html").read_text()
    # Two views of five images: one is right, one a little wrong, one very, one not held out, and the last a draw.
    view = torch.tensor([[5.0, 1, 0], [2, 1, 0], [0, 1, 5], [torch.nan] * 3, [1, 1, 0]])
    other = view + torch.tensor([0, 0, 2.0]) * (torch.arange(5) == 2)[:, None]
    found = choosing.contradicted(torch.cat([view, other]), torch.tensor([0, 1, 1, 0, 0]))
    assert found == [(2, 2, pytest.approx(np.exp(5))), (1, 0, pytest.approx(np.exp(1)))]
