"""Masks and maps from adapter files: whole runs on tiny pairs, and what is made of their adapters."""

import json
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import deploy_lora
from finetune_lora import load_finetuned
from tests.checkpoint_files import narrow_resnet, save_base
from toolkit import InputError
from toolkit.images.bands import Bands
from toolkit.models.backbones import build_backbone
from toolkit.models.dense import answers_for

tifffile = pytest.importorskip("tifffile")
pytestmark = pytest.mark.usefixtures("small_backbones")
GEO = (
    (33550, "d", 3, (10.0, 10.0, 0.0), True),
    (33922, "d", 6, (0.0, 0.0, 0.0, 500000.0, 5400000.0, 0.0), True),
    (34735, "H", 8, (1, 1, 0, 1, 3072, 0, 1, 32632), True),
)


def write_tiff(path: Path, height: int, width: int, seed: int = 0) -> None:
    """Four bands of 16 bits, bright in the middle."""
    levels = np.random.default_rng(seed).integers(0, 3000, (height, width, 4)).astype(np.uint16)
    levels[height // 4 : height // 2, width // 4 : width // 2] += 5000
    how = {"tile": (32, 32), "compression": "deflate", "photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(path, levels, extratags=GEO, **how)


@pytest.fixture(scope="module")
def tiffs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiffs")
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for number in range(6):
        write_tiff(folder / "images" / f"{number}.tif", 72, 80, number)
        mask = np.zeros((72, 80), np.uint8)
        mask[18:36, 20:40] = 7
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    (folder / "classes.txt").write_text("ground 0\nroof 7\n")
    return folder


@pytest.fixture(scope="module")
def trained(finetune_into, tmp_path_factory):
    """trained("--classes dark bright") trains for an epoch; the adapter."""
    argv = "--task segmentation --lora-rank 2 --wise-ft 1 --augmentation crop --workers 0 --batch-size 4 --epochs 1"
    return lambda options: finetune_into(tmp_path_factory.mktemp("run"), f"{argv} {options}")["folder"] / "lora.pth"


@pytest.fixture(scope="module")
def of_pairs(trained, pairs) -> Path:
    """The adapter of a ViT for windows of 16 pixels."""
    return trained(f"--data-dir {pairs} --classes dark bright")


@pytest.fixture(scope="module")
def of_tiffs(small_backbones, trained, tiffs, tmp_path_factory) -> Path:
    """The adapter of a ResNet-18 for windows of 64 pixels of four channels."""
    base = save_base(tmp_path_factory.mktemp("resnet") / "base.pth", "resnet18", 64, 4)
    argv = f"--checkpoint {base} --data-dir {tiffs} --classes {tiffs}/classes.txt --channels 4 --scale 10000"
    return trained(f"{argv} --normalise data --image-size 64")


def logits_of(adapter: Path, image) -> torch.Tensor:
    model, info = load_finetuned(adapter)
    with torch.no_grad():
        return answers_for(info["transform"](image), model.window, model)


def deploy(command: str, *argv) -> object:
    more = ["--device", "cpu", "--workers", "0"] if command in deploy_lora.ON_IMAGES else []
    return deploy_lora.main([command, *map(str, argv), *more])


def tags(path: Path) -> dict[int, object]:
    with tifffile.TiffFile(path) as file:
        return {code: file.pages[0].tags[code].value for code, *_ in GEO}


# ----------------------------------------------------------------------------------------------------------------------
# Masks and maps


def test_masks_of_a_folder_are_the_models_answers(of_pairs, pairs, tmp_path, of_tiffs, tiffs):
    written = deploy("predict", of_pairs, pairs / "val", "--output", tmp_path / "maps")
    assert sorted(map(str, written)) == [f"{tmp_path}/maps/images/{i}.png" for i in range(6)] + [
        f"{tmp_path}/maps/masks/{i}.png" for i in range(6)
    ]
    with Image.open(tmp_path / "maps/images/1.png") as mask, Image.open(pairs / "val/images/1.png") as image:
        assert mask.mode == "P" and mask.size == image.size
        assert np.array_equal(np.asarray(mask), logits_of(of_pairs, image).argmax(0))
    [*written] = deploy("predict", of_tiffs, tiffs / "images", "--output", tmp_path / "maps")
    assert written[0] == tmp_path / "maps/0.tif" and tags(written[0]) == tags(tiffs / "images/0.tif")
    image = pairs / "val/images/0.png"
    [path] = deploy("predict", of_pairs, image, "--output", tmp_path / "soft", "--probabilities")
    with Image.open(image) as opened:
        np.testing.assert_allclose(np.load(path), logits_of(of_pairs, opened).softmax(0).movedim(0, 2), atol=1e-6)


def test_a_scene_becomes_a_map_at_its_place(of_tiffs, tmp_path):
    write_tiff(tmp_path / "scene.tif", 150, 100)
    deploy("predict", of_tiffs, tmp_path / "scene.tif", "--output", tmp_path / "map.tif")
    logits = logits_of(of_tiffs, tmp_path / "scene.tif")
    assert np.array_equal(tifffile.imread(tmp_path / "map.tif"), logits.argmax(0))
    assert tags(tmp_path / "map.tif") == tags(tmp_path / "scene.tif")
    deploy("predict", of_tiffs, tmp_path / "scene.tif", "--output", tmp_path / "soft.tif", "--probabilities")
    soft = tifffile.imread(tmp_path / "soft.tif")
    assert soft.dtype == np.float32
    np.testing.assert_allclose(soft, logits.softmax(0).movedim(0, 2), atol=1e-5)
    share = float(np.median(soft.max(2)))
    deploy("predict", of_tiffs, tmp_path / "scene.tif", "--output", tmp_path / "sure.tif", "--abstain", share)
    sure = tifffile.imread(tmp_path / "sure.tif")
    assert np.array_equal(sure == 255, soft.max(2) < share) and 0 < (sure == 255).mean() < 1


def test_images_that_cannot_be_read_are_left_out(of_pairs, pairs, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.png").write_bytes((pairs / "val/images/0.png").read_bytes())
    (tmp_path / "images/1.png").write_bytes((pairs / "val/images/0.png").read_bytes()[:200])
    assert deploy("predict", of_pairs, tmp_path / "images", "--output", tmp_path / "maps") == [tmp_path / "maps/0.png"]
    assert f"left out: {tmp_path}/images/1.png: not a readable image" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "maps")) == ["0.png", "parts.json"]


def test_masks_are_resumed_for_the_same_adapter_alone(of_pairs, pairs, tmp_path):
    """What was there before the folder was begun is written anew; what was made since stays."""
    argv = "predict", of_pairs, pairs / "val" / "images", "--output", tmp_path / "maps"
    paths = deploy(*argv)
    contents = {path: path.read_bytes() for path in paths}
    os.utime(paths[0], (0, 0))  # as of an earlier command
    paths[0].write_bytes(b"torn")
    os.utime(paths[0], (0, 0))
    times = {path: path.stat().st_mtime_ns for path in paths[1:]}
    assert sorted(deploy(*argv, "--resume")) == sorted(paths)
    assert {path: path.read_bytes() for path in paths} == contents
    assert {path: path.stat().st_mtime_ns for path in paths[1:]} == times
    with pytest.raises(InputError, match="its answers were made with other --probabilities; name another folder"):
        deploy(*argv, "--resume", "--probabilities")


@pytest.mark.parametrize(
    ("given", "output", "named"),
    [
        ("val", "answers.csv", "the adapter answers for every pixel: name a folder, or map.tif"),
        ("val", "map.tif", "one map, and there are 12 images"),
        ("val/images/0.png --window 16", "maps", "without --window"),
        ("val", "maps.json", "must end in .csv or .tif or .tiff, or be a folder's"),
    ],
)
def test_outputs_that_fit_no_masks_are_refused(of_pairs, pairs, tmp_path, given, output, named):
    with pytest.raises(InputError, match=named):
        deploy("predict", of_pairs, *f"{pairs}/{given}".split(), "--output", tmp_path / output)


def test_an_adapter_of_whole_images_answers_for_windows(tmp_path, adapter_for_images):
    adapter = adapter_for_images
    levels = np.random.default_rng(0).integers(0, 250, (40, 70, 3)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "scene.tif", levels, photometric="rgb", extratags=GEO)
    deploy("predict", adapter, tmp_path / "scene.tif", "--output", tmp_path / "map.tif", "--window", 24)
    found = tifffile.imread(tmp_path / "map.tif")
    assert found.shape == (2, 3)
    assert tags(tmp_path / "map.tif")[33550] == (240.0, 240.0, 0.0)
    model, info = load_finetuned(adapter)
    with torch.no_grad():
        window = Image.fromarray(levels[:24, 24:48])
        assert found[0, 1] == model(info["transform"](window)[None]).argmax()
    deploy("predict", adapter, tmp_path / "scene.tif", "--output", tmp_path / "soft.tif", "--probabilities")
    soft = tifffile.imread(tmp_path / "soft.tif")
    assert soft.shape == (3, 5, 3)
    np.testing.assert_allclose(soft.sum(2), 1, atol=1e-5)
    with pytest.raises(InputError, match="whole images: --probabilities, --window and --abstain are for the map"):
        deploy("predict", adapter, tmp_path / "scene.tif", "--output", tmp_path / "answers", "--window", 24)


# ----------------------------------------------------------------------------------------------------------------------
# Figures


@pytest.mark.parametrize("place", [None, "val", "list.csv"])
def test_an_evaluation_has_the_runs_figures(of_pairs, pairs, tmp_path, place):
    given = []
    if place == "val":
        given = [pairs / "val"]
    elif place is not None:
        lines = [f"{pairs}/val/images/{i}.png,{pairs}/val/masks/{i}.png" for i in range(6)]
        (tmp_path / "list.csv").write_text("image,mask\n" + "\n".join(lines))
        given = [tmp_path / "list.csv"]
    found = deploy("evaluate", of_pairs, *given, "--output", tmp_path / "results.json")
    run = json.loads((of_pairs.parent / "results.json").read_text())
    assert found["miou"] == pytest.approx(run["val_miou"], abs=1e-6)
    assert found["iou_per_class"] == pytest.approx(run["iou_per_class"], abs=1e-6)
    assert found["miou_interval"] == pytest.approx(run["val_miou_interval"], abs=1e-6)
    page = (tmp_path / "results.html").read_text()
    assert "mean IoU" in page and "data:image/png" in page


def test_an_evaluation_reads_masks_as_the_run_did(of_tiffs, tiffs, tmp_path):
    """The class roof has the value 7."""
    found = deploy("evaluate", of_tiffs, tiffs, "--output", tmp_path / "results.json")
    assert list(found["iou_per_class"]) == ["ground", "roof"] and found["images"] == 6
    Image.fromarray(np.full((72, 80), 1, np.uint8)).save(tmp_path / "1.png")
    (tmp_path / "list.csv").write_text(f"image,mask\n{tiffs}/images/1.tif,{tmp_path}/1.png\n")
    with pytest.raises(InputError, match="a pixel has the value 1, which is no class's"):
        deploy("evaluate", of_tiffs, tmp_path / "list.csv")


# ----------------------------------------------------------------------------------------------------------------------
# Files that serve without this toolkit


def test_merged_files_hold_the_plain_backbone_and_the_head(of_tiffs, tmp_path, capsys):
    deploy("merge", of_tiffs, "--output", tmp_path / "merged.pth")
    state = torch.load(tmp_path / "merged.pth", weights_only=True)
    plain = build_backbone("resnet18", 2, channels=4)
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"]
    assert sorted(unexpected) == ["head.linear.bias", "head.linear.weight"]
    about = json.loads((tmp_path / "merged.json").read_text())
    assert about["per_pixel"] and about["image_size"] == 64 and about["class_names"] == ["ground", "roof"]
    assert "resize" not in about and about["activation"] == "softmax"
    assert "2 classes of every pixel" in capsys.readouterr().out


def test_the_page_makes_the_mask_with_plain_pytorch(trained, pairs, tmp_path, monkeypatch):
    """docs/deploy.md, with a narrow network in the place of the ResNet-50; the image is one window."""
    base = save_base(tmp_path / "base.pth", "resnet18", 32)
    adapter = trained(f"--checkpoint {base} --data-dir {pairs} --image-size 32")
    page = (Path(deploy_lora.__file__).parent / "docs/deploy.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (prepare,) = (block for block in blocks if block.startswith("# prepare.py"))
    (code,) = (block for block in blocks if "head.linear.weight" in block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "prepare", types.ModuleType("prepare"))
    exec(prepare, vars(sys.modules["prepare"]))
    deploy("merge", adapter, "--output", "merged.pth")
    Image.fromarray(np.random.default_rng(0).integers(0, 250, (32, 32, 3)).astype(np.uint8)).save("image.png")
    found: dict = {}
    monkeypatch.setattr(torchvision.models, "resnet50", narrow_resnet)
    exec(code, found)
    with Image.open("image.png") as image:
        logits = logits_of(adapter, image)
    torch.testing.assert_close(found["F"].interpolate(found["logits"], (32, 32), mode="bilinear")[0], logits)
    assert torch.equal(found["mask"], logits.argmax(0))


@pytest.mark.parametrize("name", ["model.pt2", pytest.param("model.onnx", marks=pytest.mark.slow)])
def test_an_exported_resnet_takes_numbers_of_files_of_any_size(of_tiffs, tmp_path, name):
    if name.endswith("onnx"):
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    deploy("export", of_tiffs, "--output", tmp_path / name, "--normalise")
    model, info = load_finetuned(of_tiffs)
    for height, width in ((64, 64), (75, 130)):
        write_tiff(tmp_path / "a.tif", height, width)
        numbers = torch.from_numpy(Bands(4).array(tmp_path / "a.tif")).permute(2, 0, 1)[None]
        if name.endswith("onnx"):
            session = onnxruntime.InferenceSession(tmp_path / name)
            found = torch.from_numpy(session.run(["probabilities"], {"images": numbers.numpy()})[0])
        else:
            found = torch.export.load(tmp_path / name).module()(numbers)
        with torch.no_grad():
            expected = model(info["transform"](tmp_path / "a.tif")[None]).softmax(1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_an_exported_vit_takes_windows(of_pairs, tmp_path):
    deploy("export", of_pairs, "--output", tmp_path / "model.pt2")
    graph = torch.export.load(tmp_path / "model.pt2").module()
    model, _ = load_finetuned(of_pairs)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(graph(images), model(images).softmax(1), atol=1e-5, rtol=1e-4)


def test_what_has_no_meaning_for_pixels_is_refused(of_pairs, pairs, tmp_path, of_tiffs, tiffs, monkeypatch):
    with pytest.raises(InputError, match="embed is not for an adapter with a class for every pixel"):
        deploy("embed", of_pairs, pairs / "val", "--output", tmp_path / "a.npy")
    with pytest.raises(InputError, match="the mask would replace"):
        deploy("predict", of_tiffs, tiffs / "images/0.tif", "--output", tiffs / "images")
    for name in ("a.tif", "a.tiff"):
        write_tiff(tmp_path / name, 64, 64)
    with pytest.raises(InputError, match=r"several images would have the mask .*/a; predict them apart"):
        deploy("predict", of_tiffs, tmp_path / "a.tif", tmp_path / "a.tiff", "--output", tmp_path / "maps")
    monkeypatch.setattr(deploy_lora.peft_format, "import_peft", lambda: None)
    with pytest.raises(InputError, match="convert is not for an adapter with a class for every pixel"):
        deploy("convert", of_pairs, "--to", "peft", "--output", tmp_path / "peft")
