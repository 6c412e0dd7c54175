"""Tiles of Sentinel-2: their bands, and the page that leads from them to a map."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import deploy_lora
import finetune_lora
from finetune_lora import load_finetuned
from moco import pretrain
from tests.pages import DOCS, blocks, commands
from tests.run_folders import rows_of
from toolkit.images.bands import Bands
from toolkit.models.backbones import build_backbone

tifffile = pytest.importorskip("tifffile")


def test_a_preview_is_no_band(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for side in (16, 4):
            writer.write(np.zeros((side, side)), photometric="minisblack", metadata=None)
    assert Bands(1).array(tmp_path / "a.tif").shape == (16, 16, 1)


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
    page = (DOCS / "sentinel-2.md").read_text()
    code = blocks("text", page)
    run = {"finetune_lora.py": finetune_lora.main, "deploy_lora.py": deploy_lora.main, "moco.pretrain": pretrain.main}
    told = {}
    for command in (line.replace("-m ", "") for line in commands(page, "text") if line.startswith("python ")):
        _, script, *argv = shlex.split(command)
        run[script]([*argv, *SMALL.get(script, "").split()])
        told[command] = capsys.readouterr().out
    assert len(told) == 6
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
