"""Masks and maps from adapter files: whole runs on tiny pairs, and what is made of their adapters; scenes in rows."""

import json
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import deploy_lora
from finetune_lora import add_lora_to_model, load_base, load_finetuned
from lora_utils import LoRAManager
from tests.checkpoint_files import narrow_resnet, save_base
from tests.dense import randomize_adapters
from tests.pages import DOCS, blocks, preparation
from toolkit import InputError
from toolkit.answers.predictions import Maps
from toolkit.answers.tasks import Classification, Regression
from toolkit.images import maps, masks, scenes
from toolkit.images.bands import Bands, open_image
from toolkit.images.transforms import to_rgb
from toolkit.models import dense

tifffile = pytest.importorskip("tifffile")
pytestmark = pytest.mark.usefixtures("small_backbones")
UTM = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32632)
CODES = (33550, 33922, 34264, 34735, 34736, 34737)


def geotags(keys=UTM, matrix=None):
    tags = [(34735, "H", len(keys), keys, True), (34736, "d", 2, (6378137.0, 298.25), True)]
    tags.append((34737, "s", 0, "Réseau géodésique, UTM zone 32N|".encode(), True))
    if matrix is not None:
        return [*tags, (34264, "d", 16, matrix, True)]
    scale = (33550, "d", 3, (10.0, 10.0, 0.0), True)
    return [*tags, scale, (33922, "d", 6, (0.0, 0.0, 0.0, 500000.0, 5400000.0, 0.0), True)]


def read_tags(path):
    with tifffile.TiffFile(path) as file:
        tags = file.pages[0].tags
        return {code: tags[code].value for code in CODES if code in tags}


def levels(height=150, width=117, bands=5, dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(0, 250, (height, width, bands)).astype(dtype)


def write_tiff(path: Path, height: int, width: int, seed: int = 0, extratags=None) -> Path:
    """Four bands of 16 bits, bright in the middle."""
    array = 12 * levels(height, width, 4, seed=seed)
    array[height // 4 : height // 2, width // 4 : width // 2] += 5000
    how = {"tile": (32, 32), "compression": "deflate", "photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(path, array, extratags=extratags or geotags(), **how)
    return path


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
        return dense.answers_for(info["transform"](image), model.window, model)


def deploy(command: str, *argv) -> object:
    more = ["--device", "cpu", "--workers", "0"] if command in deploy_lora.ON_IMAGES else []
    return deploy_lora.main([command, *map(str, argv), *more])


# ------------------------------------------------------------------------------------------------------- masks and maps


def test_masks_of_a_folder_are_the_models_answers(of_pairs, pairs, tmp_path, of_tiffs, tiffs):
    written = deploy("predict", of_pairs, pairs / "val", "--output", tmp_path / "maps")
    of_images = [tmp_path / f"maps/images/{i}.png" for i in range(6)]
    assert sorted(written) == of_images + [tmp_path / f"maps/masks/{i}.png" for i in range(6)]
    with Image.open(of_images[1]) as mask, Image.open(pairs / "val/images/1.png") as image:
        assert mask.mode == "P" and mask.size == image.size
        assert np.array_equal(np.asarray(mask), logits_of(of_pairs, image).argmax(0))
    first, *_ = deploy("predict", of_tiffs, tiffs / "images", "--output", tmp_path / "scenes")
    assert first == tmp_path / "scenes/0.tif" and read_tags(first) == read_tags(tiffs / "images/0.tif")
    image = pairs / "val/images/0.png"
    [path] = deploy("predict", of_pairs, image, "--output", tmp_path / "soft", "--probabilities")
    with Image.open(image) as opened:
        np.testing.assert_allclose(np.load(path), logits_of(of_pairs, opened).softmax(0).movedim(0, 2), atol=1e-6)


def test_a_scene_becomes_a_map_at_its_place(of_tiffs, tmp_path):
    write_tiff(tmp_path / "scene.tif", 150, 100)
    predict = "predict", of_tiffs, tmp_path / "scene.tif", "--output"
    for _ in range(2):  # the second map replaces the first
        deploy(*predict, tmp_path / "map.tif")
    logits = logits_of(of_tiffs, tmp_path / "scene.tif")
    assert np.array_equal(tifffile.imread(tmp_path / "map.tif"), logits.argmax(0))
    assert read_tags(tmp_path / "map.tif") == read_tags(tmp_path / "scene.tif")
    deploy(*predict, tmp_path / "soft.tif", "--probabilities")
    soft = tifffile.imread(tmp_path / "soft.tif")
    assert soft.dtype == np.float32
    np.testing.assert_allclose(soft, logits.softmax(0).movedim(0, 2), atol=1e-5)
    share = float(np.median(soft.max(2)))
    deploy(*predict, tmp_path / "sure.tif", "--abstain", share)
    sure = tifffile.imread(tmp_path / "sure.tif")
    assert np.array_equal(sure == 255, soft.max(2) < share) and 0 < (sure == 255).mean() < 1


def test_masks_are_resumed_for_the_same_adapter_alone(of_pairs, pairs, tmp_path):
    argv = "predict", of_pairs, pairs / "val" / "images", "--output", tmp_path / "maps"
    missing, *others = deploy(*argv)
    content = missing.read_bytes()
    missing.unlink()
    times = [path.stat().st_mtime_ns for path in others]
    assert deploy(*argv, "--resume") == [missing, *others]
    assert missing.read_bytes() == content
    assert [path.stat().st_mtime_ns for path in others] == times
    with pytest.raises(InputError, match="its answers were made with other --probabilities; name another folder"):
        deploy(*argv, "--resume", "--probabilities")


@pytest.mark.parametrize(
    ("command", "given", "output", "named"),
    [
        ("predict", "val", "answers.csv", "the adapter answers for every pixel: name a folder, or map.tif"),
        ("predict", "val", "map.tif", "one map, and there are 12 images"),
        ("predict", "val/images/0.png --window 16", "maps", "drop --window"),
        ("predict", "val", "maps.json", "must end in .csv or .tif or .tiff, or be a folder's"),
        ("embed", "val", "a.npy", "embed is not for an adapter with a class for every pixel"),
        ("convert", None, "peft", "convert is not for an adapter with a class for every pixel"),
    ],
)
def test_outputs_that_fit_no_masks_are_refused(of_pairs, pairs, tmp_path, monkeypatch, command, given, output, named):
    monkeypatch.setattr(deploy_lora.peft_format, "import_peft", lambda: None)
    images = f"{pairs}/{given}".split() if given else []
    with pytest.raises(InputError, match=named):
        deploy(command, of_pairs, *images, "--output", tmp_path / output)


def test_an_adapter_of_whole_images_answers_for_windows(tmp_path, adapter_for_images):
    array = levels(40, 70, 3, np.uint8)
    tifffile.imwrite(tmp_path / "scene.tif", array, photometric="rgb", extratags=geotags())
    predict = "predict", adapter_for_images, tmp_path / "scene.tif", "--output"
    deploy(*predict, tmp_path / "map.tif", "--window", 24)
    found = tifffile.imread(tmp_path / "map.tif")
    assert found.shape == (2, 3)
    assert read_tags(tmp_path / "map.tif")[33550] == (240.0, 240.0, 0.0)
    model, info = load_finetuned(adapter_for_images)
    with torch.no_grad():
        window = Image.fromarray(array[:24, 24:48])
        assert found[0, 1] == model(info["transform"](window)[None]).argmax()
    deploy(*predict, tmp_path / "soft.tif", "--probabilities")
    soft = tifffile.imread(tmp_path / "soft.tif")
    assert soft.shape == (3, 5, 3)
    np.testing.assert_allclose(soft.sum(2), 1, atol=1e-5)
    with pytest.raises(InputError, match="whole images: --probabilities, --window and --abstain are for a map"):
        deploy(*predict, tmp_path / "answers", "--window", 24)


HEIGHT = Regression(["height"], torch.tensor([[-1.0], [1.0]]))


def written(maps: Maps, levels: np.ndarray, path: Path) -> Path:
    """The map of a scene of these levels (H, W)."""
    np.save(path.with_name("scene.npy"), levels[..., None])
    with scenes.open_scene(path.with_name("scene.npy"), Bands(1)) as scene:
        return maps.write(scene, path, lambda parts, total: parts)


def test_windows_over_the_border_are_filled_with_the_last_pixels(tmp_path):
    """The mean of each 4 x 4 window of a scene of 5 x 6 pixels."""
    levels = np.random.default_rng(0).random((5, 6)).astype(np.float32)
    maps = Maps(HEIGHT, lambda windows: windows.mean((2, 3)), lambda rows: torch.from_numpy(rows).permute(2, 0, 1), 4)
    expected = np.pad(levels, ((0, 3), (0, 2)), "edge").reshape(2, 4, 2, 4).mean((1, 3))
    np.testing.assert_allclose(np.load(written(maps, levels, tmp_path / "map")), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("task", "asked", "named"),
    [
        (HEIGHT, {"probabilities": True}, "numbers have none"),
        (HEIGHT, {"abstain": 0.6}, "--abstain is for maps of classes"),
        (Classification(["sea", "land"]), {"probabilities": True, "abstain": 0.6}, "drop it, or --probabilities"),
    ],
)
def test_what_a_map_cannot_have_is_refused(task, asked, named):
    with pytest.raises(InputError, match=named):
        Maps(task, lambda windows: windows, None, 8, **asked)


@pytest.mark.parametrize(("mean", "dtype"), [(1_700_000_000.0, np.float64), (40.0, np.float32)])
@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_a_map_of_numbers_far_from_zero_has_those_of_the_table(tmp_path, mean, dtype, suffix):
    """As seconds since 1970: float32 has one number in 128 there."""
    task = Regression(["time"], mean=torch.tensor([mean], dtype=torch.float64), std=torch.tensor([30.0]).double())
    outputs = torch.tensor([[1.71420], [-0.25]])
    maps = Maps(task, lambda windows: outputs, lambda image: torch.zeros(3, 8, 8), window=8)
    path = written(maps, np.zeros((8, 16)), tmp_path / f"map{suffix.removesuffix('.npy')}")
    found = np.load(path) if suffix == ".npy" else tifffile.imread(path)
    assert path.suffix == suffix and found.dtype == dtype
    shown = [f"{number:.3f}" for number in found.ravel()]
    assert shown == [f"{mean + 51.426:.3f}", f"{mean - 7.5:.3f}"]
    assert [float(text) for [text] in task.table(outputs)[1]] == pytest.approx(found.ravel().tolist(), abs=1e-3)


# -------------------------------------------------------------------------------------------------------------- figures


def test_an_evaluation_has_the_runs_figures(of_pairs, pairs, tmp_path):
    found = deploy("evaluate", of_pairs, pairs, "--output", tmp_path / "results.json")
    run = json.loads((of_pairs.parent / "results.json").read_text())
    assert found["miou"] == pytest.approx(run["val_miou"], abs=1e-6)
    assert found["iou_per_class"] == pytest.approx(run["iou_per_class"], abs=1e-6)
    assert found["miou_interval"] == pytest.approx(run["val_miou_interval"], abs=1e-6)
    page = (tmp_path / "results.html").read_text()
    assert "mean IoU" in page and "data:image/png" in page


@pytest.mark.parametrize("side, sizes", [(16, [4, 2]), (20, [1] * 6)])
def test_an_evaluation_reads_images_of_one_window_in_batches(of_pairs, tmp_path, spy, side, sizes):
    """Larger ones one by one, however few of their pixels are known: a batch of scenes would fill the memory."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for i in range(6):
        Image.fromarray(levels(side, side, 3, np.uint8, seed=i)).save(tmp_path / f"images/{i}.png")
        mask = np.full((side, side), 255, np.uint8)
        mask[:2, : i + 2] = [[0], [1]]
        Image.fromarray(mask).save(tmp_path / f"masks/{i}.png")
    collate = spy(masks, "collate_pairs")
    results = deploy("evaluate", of_pairs, tmp_path, "--batch-size", "4", "--output", tmp_path / "results.json")
    assert [len(call.args[0]) for call in collate.call_args_list] == sizes and results["images"] == 6


def test_an_evaluation_reads_masks_as_the_run_did(of_tiffs, tiffs, tmp_path):
    """The class roof has the value 7."""
    found = deploy("evaluate", of_tiffs, tiffs, "--output", tmp_path / "results.json")
    assert list(found["iou_per_class"]) == ["ground", "roof"] and found["images"] == 6
    Image.fromarray(np.full((72, 80), 1, np.uint8)).save(tmp_path / "1.png")
    (tmp_path / "list.csv").write_text(f"image,mask\n{tiffs}/images/1.tif,{tmp_path}/1.png\n")
    with pytest.raises(InputError, match="a pixel has the value 1, which is no class's"):
        deploy("evaluate", of_tiffs, tmp_path / "list.csv")


# -------------------------------------------------------------------------------- files that serve without this toolkit


def test_a_merged_file_says_that_it_answers_for_every_pixel(of_tiffs, tmp_path, capsys):
    deploy("merge", of_tiffs, "--output", tmp_path / "merged.pth")
    about = json.loads((tmp_path / "merged.json").read_text())
    assert about["per_pixel"] and about["image_size"] == 64 and about["class_names"] == ["ground", "roof"]
    assert "resize" not in about and about["activation"] == "softmax"
    assert "2 classes of every pixel" in capsys.readouterr().out


@pytest.fixture
def run_of_page(tmp_path, monkeypatch):
    """run_of_page("def mask_of", (16, 16)) runs this block of docs/deploy.md on an image of this size."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "prepare", preparation())

    def run(words: str, size: tuple[int, int]) -> dict:
        Image.fromarray(levels(*size, 3, np.uint8)).save("image.png")
        [code] = [block for block in blocks("python", (DOCS / "deploy.md").read_text()) if words in block]
        variables = {}
        exec(code, variables)
        return variables

    return run


def test_the_page_makes_the_mask_with_plain_pytorch(tmp_path, monkeypatch, run_of_page):
    """With a narrow network in the place of the ResNet-50; the image is one window."""
    base = save_base(tmp_path / "base.pth", "resnet18", 32)
    model, report = load_base(base, None, 2, image_size=32, per_pixel=True)
    randomize_adapters(add_lora_to_model(model, r=2), std=0.05)
    torch.nn.init.normal_(model.head.linear.weight, std=0.1)
    about = {"arch": report["arch"], "class_names": ["dark", "bright"], "image_size": 32, "checkpoint": str(base)}
    adapter = tmp_path / "lora.pth"
    LoRAManager(model).save_lora_checkpoint(adapter, about | {"task": {"kind": "segmentation", "values": [0, 1]}})
    deploy("merge", adapter, "--output", "merged.pth")
    monkeypatch.setattr(torchvision.models, "resnet50", narrow_resnet)
    found = run_of_page("head.linear.weight", (32, 32))
    with Image.open("image.png") as image:
        logits = logits_of(adapter, image)
    torch.testing.assert_close(found["F"].interpolate(found["logits"], (32, 32), mode="bilinear")[0], logits)
    assert torch.equal(found["mask"], logits.argmax(0))


@pytest.mark.parametrize("size", [(16, 16), (40, 27)])
def test_the_page_makes_the_mask_of_a_graph_in_onnx_by_windows(of_pairs, monkeypatch, run_of_page, size):
    """For a ViT, whose windows cannot be larger; the model stands in for its graph."""
    model, info = load_finetuned(of_pairs)

    def run(_names, inputs):
        assert inputs["images"].dtype == np.float32
        with torch.no_grad():
            return [model(torch.from_numpy(inputs["images"])).softmax(1).numpy()]

    session = types.SimpleNamespace(run=run)
    monkeypatch.setitem(sys.modules, "onnxruntime", types.SimpleNamespace(InferenceSession=lambda _path: session))
    Path("model.json").write_text(json.dumps(deploy_lora.usage(info)))
    found = run_of_page("def mask_of", size)
    with Image.open("image.png") as image:
        assert np.array_equal(found["mask"], logits_of(of_pairs, image).argmax(0))


def test_an_exported_resnet_takes_numbers_of_files_of_any_size(of_tiffs, tmp_path):
    deploy("export", of_tiffs, "--output", tmp_path / "model.pt2", "--normalise")
    graph = torch.export.load(tmp_path / "model.pt2").module()
    model, info = load_finetuned(of_tiffs)
    for height, width in ((64, 64), (75, 130)):
        write_tiff(tmp_path / "a.tif", height, width)
        numbers = torch.from_numpy(Bands(4).array(tmp_path / "a.tif")).permute(2, 0, 1)[None]
        with torch.no_grad():
            expected = model(info["transform"](tmp_path / "a.tif")[None]).softmax(1)
        torch.testing.assert_close(graph(numbers), expected, atol=1e-4, rtol=1e-3)


# ------------------------------ scenes in rows are what whole images are, and maps have the georeference of their scene


def in_rows(path, bands, height=23):
    """The whole image by parts that overlap, as windows do."""
    with scenes.open_scene(path, bands) as scene:
        whole = scene.rows(0, 1)[:0]
        for first in range(0, scene.height, height - 9):
            part = scene.rows(first, min(first + height, scene.height))
            whole = np.concatenate([whole[:first], part])
        assert whole.shape[:2] == (scene.height, scene.width)
        return whole


WRITTEN = {
    "strips": {"rowsperstrip": 16},
    "compressed strips": {"rowsperstrip": 7, "compression": "deflate"},
    "tiles": {"tile": (32, 48)},
    "compressed tiles": {"tile": (64, 32), "compression": "deflate", "predictor": True},
    "big-endian": {"byteorder": ">", "tile": (32, 32)},
    "big-endian strips": {"byteorder": ">", "rowsperstrip": 16},
    "pixels without data": {"extratags": [(42113, "s", 0, "7", True)]},
    "compressed, without data": {"extratags": [(42113, "s", 0, "7", True)], "compression": "deflate"},
}


@pytest.mark.parametrize("planar", ["contig", "separate", "pages"])
@pytest.mark.parametrize("how", WRITTEN)
def test_rows_of_a_tiff_are_those_of_the_whole(tmp_path, how, planar):
    array = levels(dtype=np.float32 if how == "tiles" else np.uint16)
    if how == "tiles":
        array[3, 4, 0] = np.nan
    if planar != "contig":
        array = array.transpose(2, 0, 1)
    config = {"planarconfig": planar} if planar != "pages" else {"metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", **config, **WRITTEN[how])
    for chosen in ((), ("3", "0", "1")):
        bands = Bands(len(chosen) or 5, chosen)
        assert np.array_equal(in_rows(tmp_path / "a.tif", bands), bands.array(tmp_path / "a.tif"))


def test_rows_of_other_files_are_those_of_the_whole(tmp_path):
    Image.fromarray(levels(bands=1)[..., 0]).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", levels())
    for name, bands in (("a.png", Bands(1)), ("a.npy", Bands(5))):
        assert np.array_equal(in_rows(tmp_path / name, bands), bands.array(tmp_path / name))


@pytest.mark.parametrize(
    "name, how",
    [
        ("a.jpg", {}),
        ("a.png", {}),
        ("a.tif", {"rowsperstrip": 16, "compression": "deflate"}),
        ("b.tif", {"tile": (32, 32)}),
        ("of four bands.tif", {"extrasamples": ["assocalpha"]}),
    ],
)
def test_rows_of_photographs_are_those_of_the_whole(tmp_path, name, how):
    array = levels(bands=3 + ("four" in name), dtype=np.uint8)
    if name.endswith(".tif"):
        tifffile.imwrite(tmp_path / name, array, photometric="rgb", **how)
    else:
        image = Image.fromarray(array)
        exif = image.getexif()
        exif[274] = 6
        image.save(tmp_path / name, exif=exif)
    expected = np.asarray(to_rgb(open_image(tmp_path / name)))
    assert np.array_equal(in_rows(tmp_path / name, None), expected)


def test_an_orthophoto_with_transparency_is_read_in_rows(tmp_path, monkeypatch):
    """As one of three bands: Pillow would hold all of it, and refuses more than 179 million pixels."""
    array = levels(bands=4, dtype=np.uint8)
    how = {"photometric": "rgb", "extrasamples": ["unassalpha"]}
    tifffile.imwrite(tmp_path / "a.tif", array, tile=(32, 32), **how)
    tifffile.imwrite(tmp_path / "b.tif", array.transpose(2, 0, 1), planarconfig="separate", **how)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for name in ("a.tif", "b.tif"):
        assert np.array_equal(in_rows(tmp_path / name, None), array[..., :3])


def test_three_bands_of_16_bits_that_are_no_photograph_need_a_scale(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", levels(bands=3), photometric="minisblack", planarconfig="contig")
    with pytest.raises(InputError, match=r"a\.tif: .*training reads bands of more than 8 bits with --scale, as 65535"):
        in_rows(tmp_path / "a.tif", None)
    with pytest.raises(InputError, match=r"a\.tif: .*has 3 bands, and the network takes 4"):
        in_rows(tmp_path / "a.tif", Bands(4))
    assert np.array_equal(in_rows(tmp_path / "a.tif", Bands(3, scale=65535)), levels(bands=3))


def test_a_compression_that_pillow_alone_knows(tmp_path, monkeypatch):
    def unknown(*_, **__):
        raise ValueError("requires the 'imagecodecs' package")

    tifffile.imwrite(tmp_path / "a.tif", levels(bands=3, dtype=np.uint8), photometric="rgb", compression="deflate")
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", unknown)
    assert np.array_equal(in_rows(tmp_path / "a.tif", None), np.asarray(to_rgb(open_image(tmp_path / "a.tif"))))


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_a_photograph_of_16_bits_is_read_as_it_is_or_refused(tmp_path, byteorder):
    """Pillow reads the bytes of planes without compression as if each were a level."""
    array = levels(bands=3) * 200
    how = {"photometric": "rgb", "byteorder": byteorder}
    tifffile.imwrite(tmp_path / "a.tif", array, **how)
    tifffile.imwrite(tmp_path / "b.tif", array.transpose(2, 0, 1), planarconfig="separate", compression="zlib", **how)
    for name in ("a.tif", "b.tif"):
        assert np.array_equal(in_rows(tmp_path / name, None), array >> 8)
    tifffile.imwrite(tmp_path / "c.tif", array.transpose(2, 0, 1), planarconfig="separate", **how)
    with pytest.raises(InputError, match=r"c\.tif: .*16 bits whose bands lie apart: .* train with --scale 65535"):
        in_rows(tmp_path / "c.tif", None)


def test_few_rows_of_scenes_and_maps_are_held(tmp_path):
    array = levels(2000, 1000)  # 20 MB
    how = {"planarconfig": "contig", **WRITTEN["compressed tiles"]}
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", **how)
    tracemalloc.start()
    with scenes.open_scene(tmp_path / "a.tif", Bands(5)) as scene:
        for first in range(0, 2000, 50):
            scene.rows(first, first + 50)
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()
    held = []

    def parts():
        for _ in range(40):
            held.append(tracemalloc.get_traced_memory()[1])
            yield np.zeros((100, 300), np.float32)

    tracemalloc.start()
    maps.write_map(tmp_path / "map.tif", parts(), 4000, 300, None)
    tracemalloc.stop()
    assert held[-1] < held[10] + 100_000


# ----------------------------------------------------------------------------------------------------------------- maps

COLOURS = np.array([[0, 0, 0], [1, 0.5, 0], [0, 0, 1]])


def cut(array, rows=70):
    return (array[first : first + rows] for first in range(0, len(array), rows))


def test_a_map_of_classes_has_the_georeference_of_its_scene(tmp_path):
    like = write_tiff(tmp_path / "scene.tif", 600, 530)
    classes = levels(600, 530, 1, np.uint8)[..., 0] % 3
    maps.write_map(tmp_path / "map.tif", cut(classes), 600, 530, str(like), COLOURS, ["sea", "<b> & c", "é"])
    assert np.array_equal(tifffile.imread(tmp_path / "map.tif"), classes)
    assert read_tags(tmp_path / "map.tif") == read_tags(like)
    assert len(read_tags(like)) == 5
    with tifffile.TiffFile(tmp_path / "map.tif") as file:
        page = file.pages[0]
        assert (page.is_tiled, page.compression.name, page.photometric.name) == (True, "DEFLATE", "PALETTE")
        assert page.tags[42113].value == "255"
        assert page.colormap[:, :3].T.tolist() == [[0, 0, 0], [65535, 32768, 0], [0, 0, 65535]]
        assert "&lt;b&gt; &amp; c" in page.tags[42112].value
    with Image.open(tmp_path / "map.tif") as image:
        assert np.array_equal(np.asarray(image), classes)


def test_a_map_of_probabilities_has_a_band_for_each_class_and_a_mask_a_palette(tmp_path):
    values = np.random.default_rng(0).random((300, 270, 3), np.float32)
    maps.write_map(tmp_path / "map.tif", cut(values), 300, 270, None, names=["a", "b", "c"])
    assert np.array_equal(tifffile.imread(tmp_path / "map.tif"), values)
    assert not read_tags(tmp_path / "map.tif")
    classes = levels(9, 7, 1, np.uint8)[..., 0] % 3
    classes[0, 0] = 255
    maps.write_mask(tmp_path / "mask.png", classes, COLOURS)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), classes)
        assert image.getpalette()[3:6] == [255, 128, 0]


@pytest.mark.parametrize("point", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_pixels_of_a_coarser_map_lie_where_their_windows_do(tmp_path, point, turned):
    keys = tuple(2 if point and i == 11 else value for i, value in enumerate(UTM))
    matrix = (0.0, 10.0, 0.0, 500000.0, -10.0, 0.0, 0.0, 5400000.0, *[0.0] * 7, 1.0) if turned else None
    like = write_tiff(tmp_path / "scene.tif", 640, 512, extratags=geotags(keys, matrix))
    maps.write_map(tmp_path / "map.tif", cut(levels(10, 8, 1, np.uint8)[..., 0]), 10, 8, str(like), COLOURS, step=64)
    place = read_tags(like)
    coarse = read_tags(tmp_path / "map.tif")
    assert coarse[34735] == place[34735]

    def at(tags, column, row):  # by 19-008r4, of positions in pixels; those of a point count from its centre
        if turned:
            a = tags[34264]
            return a[0] * column + a[1] * row + a[3], a[4] * column + a[5] * row + a[7]
        i, j, _, x, y, _ = tags[33922]
        return x + (column - i) * tags[33550][0], y - (row - j) * tags[33550][1]

    half = 0.5 if point else 0.0
    for column, row in ((0, 0), (8, 10), (3, 7)):  # corners of pixels
        expected = at(place, 64 * column - half, 64 * row - half)
        assert at(coarse, column - half, row - half) == pytest.approx(expected, abs=1e-6)
