"""benchmarks/loading.py: what it measures is what it says, on a tiny run. Nothing here checks a clock."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import loading
from toolkit import InputError


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(loading, "PHOTOGRAPHS", {"small": ((130, 90), 4)})


def test_each_loader_makes_the_same_views_of_each_file(small, tmp_path, capsys):
    result = loading.main(["--only", "views", "--images", "3", "--output-dir", str(tmp_path)])
    rows = result["views"]
    assert {(row["view"], row["pixels"]) for row in rows} == {(v, p) for v in loading.VIEWS for p in (224, 32)}
    for row in rows:
        assert row["milliseconds"].keys() >= {"here", "torchvision"} and min(row["milliseconds"].values()) > 0
        low, middle, high = row["faster_than"]["torchvision"]
        assert 0 < low <= middle <= high
    assert capsys.readouterr().out.count("| moco_v2 |") == 2
    assert json.loads((tmp_path / "loading_views.json").read_text())["views"] == rows


@pytest.mark.parametrize("view", loading.VIEWS)
def test_loaders_agree_on_what_a_view_is(tmp_path, view):
    loading.make_photographs(tmp_path, (130, 90), 4, 2)
    here, there = (loading.READERS[name](tmp_path, view, 32) for name in ("here", "torchvision"))
    assert len(here) == len(there) == 2
    ours, theirs = here[0][0], there[0][0]
    if view.startswith("moco"):
        assert [x.shape for x in ours] == [x.shape for x in theirs] == [(3, 32, 32)] * 2
    else:
        assert ours.shape == theirs.shape == (3, 32, 32)


def test_the_photographs_are_what_they_are_said_to_be(tmp_path):
    loading.make_photographs(tmp_path, (130, 90), 4, 3)
    paths = sorted(tmp_path.rglob("*.jpg"))
    assert [Image.open(path).size for path in paths] == [(130, 90)] * 3
    assert loading.bytes_of(tmp_path) == pytest.approx(sum(path.stat().st_size for path in paths) / 3)


def test_tiles_of_13_bands_are_measured_beside_tifffiles_own_reading(tmp_path, monkeypatch, capsys):
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.setattr(loading, "PIXELS", 32)
    rows = loading.main(["--only", "bands", "--images", "3", "--output-dir", str(tmp_path)])["bands"]
    assert [(row["pixels"], row["compression"]) for row in rows] == [(n, c) for n in (64, 120) for c in (None, "zlib")]
    assert all(min(row["milliseconds"].values()) > 0 for row in rows)
    assert all(row["milliseconds"].keys() == {"here", "tifffile", "view"} for row in rows)
    assert capsys.readouterr().out.count("| 64 x 64") == 2
    [tile] = loading.make_tiles(tmp_path / "tiles", 64, 1, "zlib")
    assert np.array_equal(loading.Bands(13).read_path(tile), tifffile.imread(tile).astype(np.float32))


@pytest.mark.slow
def test_the_start_is_measured_in_a_process_of_its_own(tmp_path, capsys):
    result = loading.main(["--only", "start", "--files", "3000", "--output-dir", str(tmp_path)])["start"]
    assert result["files"] == 3000 and all(value >= 0 for value in result.values())
    assert "start with 3,000 files" in capsys.readouterr().out


def test_training_rows(images, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "PIXELS", 32)
    argv = ["--only", "training", "--batches", "1", "--data-dir", str(images), "--output-dir", str(tmp_path)]
    rows = loading.main(argv)["training"]
    assert [row["workers"] for row in rows] == [0, 1, 2, "auto"]
    assert all(row["images_per_second"] > 0 and 0 <= row["waiting_share"] <= 1 for row in rows)
    with pytest.raises(InputError, match="need photographs: give --data-dir"):
        loading.main(["--only", "training"])
