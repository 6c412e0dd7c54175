"""Bands in files beside each other, pages of a stack, and where on Earth an image is."""

import itertools
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deploy_lora
import finetune_lora
from finetune_lora import load_finetuned
from moco import pretrain
from tests.run_folders import rows_of
from toolkit import InputError
from toolkit.images.bands import Bands
from toolkit.images.folders import image_names
from toolkit.images.sources import load_splits
from toolkit.models.backbones import build_backbone

tifffile = pytest.importorskip("tifffile")

NAMES = ("B02", "B03", "B04", "B8A")


def write_bands(place: Path, prefix: str, bands: dict[str, np.ndarray]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name, band in bands.items():
        tifffile.imwrite(place / f"{prefix}{name}.tif", band, photometric="minisblack")


@pytest.fixture(scope="module")
def band_files(tmp_path_factory) -> Path:
    """Two classes of eight images: of one a folder each with B02.tif and so on, of the other P_B02.tif side by side.

    B8A has half as many pixels along each side, and B01 is chosen by no test.
    """
    folder, rng = tmp_path_factory.mktemp("band_files"), np.random.RandomState(0)
    for label in ("sea", "wood"):
        for i in range(8):
            bands = {name: rng.randint(0, 2000, (16, 16)).astype(np.uint16) for name in ("B01", *NAMES[:3])}
            bands["B02"] += 4000 * (label == "wood")
            bands["B8A"] = bands["B02"][::2, ::2]
            place, prefix = (folder / label / f"tile{i}", "") if label == "sea" else (folder / label, f"P{i}_")
            write_bands(place, prefix, bands)
    return folder


def test_an_image_is_its_band_files_in_the_order_chosen(band_files, capsys):
    bands = Bands(4, ("B04", "0", "B02", "B8A"))
    train, val, class_names, _ = load_splits("imagefolder", band_files, bands=bands)
    assert class_names == ["sea", "wood"]
    assert len(train) + len(val) == 16
    assert "not read as images: 32 of other bands" in capsys.readouterr().out  # B01 and B03
    for images in (train, val):
        for i in range(len(images)):
            image, _ = images[i]
            first = images.name(i)
            assert first.endswith("B04.tif")
            other = {name: tifffile.imread(first.replace("B04", name)) for name in ("B02", "B8A")}
            assert np.array_equal(image[..., 0], tifffile.imread(first))
            assert not image[..., 1].any()
            assert np.array_equal(image[..., 2], other["B02"])
            enlarged = Image.fromarray(other["B8A"].astype(np.float32)).resize((16, 16), Image.Resampling.BILINEAR)
            assert np.array_equal(image[..., 3], np.asarray(enlarged))


def test_a_band_may_have_its_resolution_in_its_name(tmp_path):
    """As in a Sentinel-2 product of level 2A, of whose bands some come in several resolutions, as JPEG 2000."""
    rng = np.random.RandomState(0)
    names = ("T32_B02_10m", "T32_B02_20m", "T32_B05_20m", "T32_B05_60m", "T32_B09_60m")
    for name in names:
        size = {"10m": 24, "20m": 12, "60m": 4}[name[-3:]]
        levels = rng.randint(0, 4000, (size, size)).astype(np.uint16)
        Image.fromarray(levels).save(tmp_path / f"{name}.jp2", irreversible=False)
    bands = Bands(3, ("B05", "B09", "B02"))
    assert bands.one_for_each_image([f"{name}.jp2" for name in names]) == (["T32_B05_20m.jp2"], 0)
    assert image_names(tmp_path, bands=bands) == ["T32_B05_20m.jp2"]
    image = bands.read_path(tmp_path / "T32_B05_20m.jp2")
    assert np.array_equal(image[..., 2], np.asarray(Image.open(tmp_path / "T32_B02_10m.jp2")))
    assert image.shape == (24, 24, 3) and image[..., 0].std() > 100
    assert bands.files("T32_B05_20m.jp2")["B09"] == "T32_B09_20m.jp2"  # which is then said to lack
    assert Bands(1, ("B02_20m",)).read_path(tmp_path / "T32_B02_20m.jp2").shape == (12, 12, 1)


def test_band_files_are_told_from_images_of_several_bands(tmp_path):
    assert Bands(2, ("2", "1")).one_for_each_image(["tile_1.tif", "tile_2.tif"]) == (["tile_1.tif", "tile_2.tif"], 0)
    np.savez(tmp_path / "tile.npz", B03=np.ones((8, 8)), B02=np.zeros((8, 8)))
    assert Bands(2, ("B02", "B03")).one_for_each_image(["tile.npz"]) == (["tile.npz"], 0)
    assert Bands(2, ("B02", "B03")).read_path(tmp_path / "tile.npz")[0, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tile: (tile / "B03.tif").unlink(), r"B02\.tif: not a readable .*B03\.tif: .*No such file"),
        (lambda tile: (tile / "B02.tif").unlink(), r"B03\.tif: not a readable .*B02\.tif: .*No such file"),
        (
            lambda tile: write_bands(tile, "", {"B03": np.zeros((12, 16))}),
            "B03 is 16x12 and another 16x16, which is no",
        ),
        (lambda tile: write_bands(tile, "", {"B03": np.zeros((8, 16))}), "B03 is 16x8 and another 16x16, which is no"),
        (lambda tile: write_bands(tile, "", {"B03": np.zeros((2, 16, 16))}), "B03.tif is to be one band, and it has 2"),
        (lambda tile: (tile / "B03.tif").write_bytes(b"no image"), r"B03\.tif: cannot identify image"),
    ],
)
def test_what_is_wrong_with_one_band_is_one_line(change, reason, band_files, tmp_path, capsys):
    shutil.copytree(band_files, tmp_path / "images")
    change(tmp_path / "images" / "sea" / "tile3")
    bands = Bands(2, ("B02", "B03"))
    splits = load_splits("imagefolder", tmp_path / "images", bands=bands)
    with pytest.raises(InputError, match=reason):
        list(itertools.chain(splits.train, splits.val))
    splits = load_splits("imagefolder", tmp_path / "images", bands=bands, skip_unreadable=True)
    assert len(splits.train) + len(splits.val) == 15
    assert "tile3" in capsys.readouterr().out


def test_copies_are_of_all_bands(band_files, tmp_path, capsys):
    """An image that shares one band with another, as clouds and water do, is none."""
    for part in ("train", "val"):
        shutil.copytree(band_files, tmp_path / part)
    bands = Bands(2, ("B02", "B03"))
    load_splits("imagefolder", tmp_path, bands=bands)
    assert "16 of 16 evaluation images are copies" in capsys.readouterr().out
    for path in (tmp_path / "val").rglob("*B03.tif"):
        tifffile.imwrite(path, np.zeros((16, 16), np.uint16), photometric="minisblack")
    load_splits("imagefolder", tmp_path, bands=bands)
    assert "images are copies" not in capsys.readouterr().out


def test_band_files_go_through_every_command(band_files, tmp_path, capsys):
    options = "--device cpu --workers 0 --batch-size 4 --epochs 1"
    bands = f"--data-dir {band_files} --bands B02,B03,B04,B8A --scale 10000"
    shape = "--arch vit_mini --image-size 16 --channels 4 --two-crops digits --dim 8 --mlp-dim 8"
    stage1 = pretrain.main(f"{bands} {options} {shape} --output-dir {tmp_path / 'stage1'}".split())
    capsys.readouterr()

    # The file says what its images were: nothing is typed again.
    argv = f"--checkpoint {stage1['checkpoint']} --data-dir {band_files} {options} --output-dir {tmp_path / 'tuned'}"
    results = finetune_lora.main([*argv.split(), "--lora-rank", "2", "--labels-per-class", "2"])
    told = capsys.readouterr().out
    assert "as in the pretraining, which moco_stage1_epoch_1.pth says" in told
    assert "images: 4 channels (B02,B03,B04,B8A of each file), divided by 10000" in told
    adapter = tmp_path / "tuned" / "lora.pth"
    _, about = load_finetuned(adapter)
    assert (about["bands"], about["scale"]) == (list(NAMES), 10000)
    assert about["transform"](band_files / "sea" / "tile0" / "B02.tif").shape == (4, 16, 16)
    evaluated = deploy_lora.main(f"evaluate {adapter} --device cpu --workers 0".split())
    assert evaluated["accuracy"] == results["val_accuracy"]


# --- pages -----------------------------------------------------------------------------------------------------------


# --- the worked page -------------------------------------------------------------------------------------------------


def geotiff(path: Path, levels: np.ndarray) -> None:
    """A TIFF of these levels, of 10 m in a UTM zone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = [(34735, "H", 8, [1, 1, 0, 1, 3072, 0, 1, 32632], True), (33550, "d", 3, [10.0, 10.0, 0.0], True)]
    keys.append((33922, "d", 6, [0.0, 0.0, 0.0, 5e5, 5.3e6, 0.0], True))
    tifffile.imwrite(path, levels, photometric="minisblack", planarconfig="contig", extratags=keys)


@pytest.fixture
def eurosat(tmp_path, monkeypatch) -> Path:
    """A folder with what docs/sentinel-2.md downloads, in small, and new tiles with geotags; torchgeo's layout."""
    monkeypatch.chdir(tmp_path)
    backbone = build_backbone("resnet18", 2, channels=13).state_dict()
    tensors = {name: tensor for name, tensor in backbone.items() if not name.startswith("fc.")}
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    checkpoint = tmp_path / "torch/hub/checkpoints/resnet18_sentinel2_all_moco-59bfdff9.pth"
    checkpoint.parent.mkdir(parents=True)
    torch.save(tensors, checkpoint)  # as if downloaded before
    rng = np.random.RandomState(0)
    for place, count in (("EuroSAT_MS/Forest", 5), ("EuroSAT_MS/River", 5), ("new_tiles", 4)):
        for i in range(count):
            levels = rng.randint(0, 3000, (32, 32, 13)).astype(np.uint16)
            levels[..., 9] //= 300  # B10, which stands before B11, B12 and B8A here
            geotiff(tmp_path / place / f"{i}.tif", levels)
    shutil.copy("new_tiles/0.tif", "new_tiles/tile.tif")
    return tmp_path


FEWER = "--image-size 32 --epochs 1 --batch-size 4 --device cpu --workers 0"
SMALL = {"finetune_lora.py": f"{FEWER} --lora-rank 2", "moco.pretrain": f"{FEWER} --moco-version 2 --queue-size 8"}


@pytest.mark.slow
def test_the_page_on_sentinel_2_runs_from_top_to_bottom(eurosat, capsys):
    pytest.importorskip("onnxscript")
    page = (Path(finetune_lora.__file__).parent / "docs" / "sentinel-2.md").read_text()
    code = re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    commands = [line for block in code for line in re.sub(r"\\\n *", "", block).splitlines()]
    run = {"finetune_lora.py": finetune_lora.main, "deploy_lora.py": deploy_lora.main, "moco.pretrain": pretrain.main}
    told = {}
    for command in (command.replace("-m ", "") for command in commands if command.startswith("python ")):
        _, script, *argv = shlex.split(command)
        run[script]([*argv, *SMALL.get(script, "").split()])
        told[command] = capsys.readouterr().out
    assert len(told) == 7
    first, *_, last = told.values()
    promised = [line for block in code for line in block.splitlines() if line.startswith("images: ")]
    for part in [part for line in promised for part in line.split(" ... ")]:
        assert part in first
    assert "channel 11 hardly varies" in first
    assert "which moco_lora.pth says" in last
    assert promised[1] in last  # the bands too, which were not typed again

    assert [Path(row["path"]).stem for row in rows_of("predictions.csv")] == ["0", "1", "2", "3", "tile"]
    [snippet] = [block for block in code if "load_finetuned" in block]
    exec(snippet, names := {"load_finetuned": load_finetuned})
    assert names["logits"].shape == (1, 2)
