"""The pages of photographs, medicine and microscopy run from top to bottom, on made-up files and a random backbone."""

import re
import shlex
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

import deploy_lora
import finetune_lora
from tests.pages import DOCS, blocks, save_moco_v2

pytestmark = pytest.mark.slow
SMALL = "--image-size 32 --epochs 1 --batch-size 4 --device cpu --workers 0 --lora-rank 2"
RUN = {"finetune_lora.py": finetune_lora.main, "deploy_lora.py": deploy_lora.main}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder with a ResNet-18 in the place of the ResNet-50, as if it had been downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    save_moco_v2(tmp_path)
    matplotlib.use("agg")
    return tmp_path


def run_page(name: str) -> None:
    """Every command of the page, fewer epochs of small images, and every block of Python, in their order."""
    for block in blocks("text", (DOCS / name).read_text()):
        if block.startswith(("import", "from")):
            exec(compile(block, name, "exec"), {})
            continue
        for line in re.sub(r"\\\n *", "", block).splitlines():
            if line.startswith("python "):
                _, script, *argv = shlex.split(line)
                if script == "finetune_lora.py":
                    small = SMALL.replace("--lora-rank 2", "") if "--lora-rank" in argv else SMALL
                    argv += small.split()
                RUN[script](argv)


def save_photograph(path: Path, colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(colour).randint(0, 100, (40, 40, 3)) + colour
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def test_photographs(folder):
    for part in ("train", "val", "test"):
        for number in range(6):
            save_photograph(folder / f"photos/{part}/oak/{number}.png", 10 + number)
            save_photograph(folder / f"photos/{part}/ash/{number}.png", 120 + number)
    save_photograph(folder / "new_photos/a.png", 15)
    run_page("photographs.md")
    assert (folder / "figure.pdf").stat().st_size > 1000
    assert (folder / "predictions.csv").exists() and (folder / "explained/a.png").exists()


def test_medicine(folder):
    for name, first in (("train", 0), ("thresholds", 20), ("test", 40)):
        rows = ["path,patient,Edema,Effusion"]
        for patient in range(first, first + 20):
            path = f"scans/p{patient:02}/1.png"
            edema = patient % 2
            save_photograph(folder / path, 20 + 100 * edema)
            rows.append(f"{path},p{patient:02},{edema},{patient // 2 % 3 - 1}")
        (folder / f"{name}.csv").write_text("\n".join(rows))
    run_page("medicine.md")
    assert (folder / "roc.pdf").stat().st_size > 1000
    assert (folder / "explained/1.png").exists()


def test_microscopy(folder):
    tifffile = pytest.importorskip("tifffile")
    random = np.random.RandomState(0)
    for place in ("cells/train", "cells/val", "cells/test", "new_slides"):
        for number in range(4):
            mask = np.zeros((40, 48), np.uint8)
            mask[8:20, 8:24] = 1
            mask[24:36, 20:40] = 2
            levels = random.randint(0, 9000, mask.shape) + 20_000 * mask.astype(int)
            images = folder / place
            if place != "new_slides":
                (images / "masks").mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(images / f"masks/{number}.png")
                images = images / "images"
            images.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(images / f"{number}.tif", levels.astype(np.uint16))
    run_page("microscopy.md")
    assert (folder / "areas.pdf").stat().st_size > 1000
    assert len(list((folder / "masks").rglob("*.tif"))) == 4
    assert len(list((folder / "explained").rglob("*.png"))) == 4
