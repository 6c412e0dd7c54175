"""The pages of photographs, medicine, microscopy and satellites run from top to bottom, on made-up files."""

import re
import shlex
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

import deploy_lora
import finetune_lora
from moco import pretrain
from tests.checkpoint_files import without_head
from tests.image_files import geotags, save_image
from tests.pages import DOCS, blocks
from tests.run_folders import rows_of
from toolkit.models.backbones import build_backbone

pytestmark = pytest.mark.slow
SMALL = "--image-size 32 --epochs 1 --batch-size 4 --device cpu --workers 0"
RUN = {"finetune_lora.py": finetune_lora.main, "deploy_lora.py": deploy_lora.main, "moco.pretrain": pretrain.main}


def run_page(name: str) -> dict:
    """Run the commands of a page, with one epoch of small images, and its Python, in their order; the names it sets."""
    matplotlib.use("agg")
    names = {"load_finetuned": finetune_lora.load_finetuned}
    for block in blocks("text", (DOCS / name).read_text()):
        if block.startswith(("import", "from", "model, info")):
            exec(compile(block, name, "exec"), names)
            continue
        for line in re.sub(r"\\\n *", "", block).replace("-m ", "").splitlines():
            if not line.startswith("python "):
                continue
            _, script, *argv = shlex.split(line)
            if script != "deploy_lora.py":
                argv += SMALL.split()
            if script == "moco.pretrain":
                argv += ["--moco-version", "2", "--queue-size", "8"]
            elif script == "finetune_lora.py" and "--lora-rank" not in argv:
                argv += ["--lora-rank", "2"]
            RUN[script](argv)
    return names


def save_photograph(path: Path, colour: int) -> None:
    save_image(path, (np.random.RandomState(colour).randint(0, 100, (40, 40, 3)) + colour).astype(np.uint8))


def test_photographs(own_folder):
    for part in ("train", "val", "test"):
        for number in range(6):
            save_photograph(own_folder / f"photos/{part}/oak/{number}.png", 10 + number)
            save_photograph(own_folder / f"photos/{part}/ash/{number}.png", 120 + number)
    save_photograph(own_folder / "new_photos/a.png", 15)
    run_page("photographs.md")
    assert (own_folder / "figure.pdf").stat().st_size > 1000
    assert (own_folder / "predictions.csv").exists() and (own_folder / "explained/a.png").exists()


def test_medicine(own_folder):
    for name, first in (("train", 0), ("thresholds", 20), ("test", 40)):
        rows = ["path,patient,Edema,Effusion"]
        for patient in range(first, first + 20):
            path = f"scans/p{patient:02}/1.png"
            edema = patient % 2
            save_photograph(own_folder / path, 20 + 100 * edema)
            rows.append(f"{path},p{patient:02},{edema},{patient // 2 % 3 - 1}")
        (own_folder / f"{name}.csv").write_text("\n".join(rows))
    run_page("medicine.md")
    assert (own_folder / "roc.pdf").stat().st_size > 1000
    assert (own_folder / "explained/1.png").exists()


def test_microscopy(own_folder):
    pytest.importorskip("tifffile")
    random = np.random.RandomState(0)
    mask = np.zeros((40, 48), np.uint8)
    mask[8:20, 8:24] = 1
    mask[24:36, 20:40] = 2
    for place in ("cells/train/images", "cells/val/images", "cells/test/images", "new_slides"):
        for number in range(4):
            levels = random.randint(0, 9000, mask.shape) + 20_000 * mask.astype(int)
            path = save_image(own_folder / place / f"{number}.tif", levels.astype(np.uint16))
            if place != "new_slides":
                save_image(path.parents[1] / f"masks/{number}.png", mask)
    run_page("microscopy.md")
    assert (own_folder / "areas.pdf").stat().st_size > 1000
    assert len(list((own_folder / "masks").rglob("*.tif"))) == 4
    assert len(list((own_folder / "explained").rglob("*.png"))) == 4


def test_satellites(own_folder, capsys):
    """EuroSAT in small, and new tiles with geotags; the checkpoint has torchgeo's layout."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("tifffile")
    how = {"photometric": "minisblack", "planarconfig": "contig", "extratags": geotags()}
    backbone = build_backbone("resnet18", 2, channels=13).state_dict()
    torch.save(without_head(backbone), own_folder / "hub/checkpoints/resnet18_sentinel2_all_moco-59bfdff9.pth")
    rng = np.random.RandomState(0)
    for place, count in (("EuroSAT_MS/Forest", 5), ("EuroSAT_MS/River", 5), ("new_tiles", 4)):
        for i in range(count):
            levels = rng.randint(0, 3000, (32, 32, 13)).astype(np.uint16)
            levels[..., 9] //= 300  # B10, which stands before B11, B12 and B8A here
            save_image(own_folder / place / f"{i}.tif", levels, **how)
    shutil.copy("new_tiles/0.tif", "new_tiles/tile.tif")
    names = run_page("sentinel-2.md")
    printed = capsys.readouterr().out
    known, read = re.findall("^images: .*", (DOCS / "sentinel-2.md").read_text(), re.MULTILINE)
    assert all(part in printed for part in known.split(" ... "))
    assert "channel 11 hardly varies" in printed
    assert "which moco_lora.pth says" in printed
    assert printed.count(read) == 3  # the second fine-tuning too, where the bands were not typed again
    assert [Path(row["path"]).stem for row in rows_of("predictions.csv")] == ["0", "1", "2", "3", "tile"]
    assert names["logits"].shape == (1, 2)
