"""Masks and maps from adapter files: whole runs on tiny pairs, and what is made of their adapters; scenes in rows."""

import json
import shutil
import sys
import tracemalloc
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from conftest import save_adapter
from PIL import Image

import deploy_lora
from finetune_lora import load_base, load_finetuned
from tests.checkpoint_files import save_base
from tests.dense import resnet
from tests.image_files import UTM, geotags, little_memory, oriented, save_image
from tests.pages import DOCS, blocks, preparation
from toolkit import InputError
from toolkit.answers.predictions import Maps
from toolkit.answers.tasks import Classification, Regression
from toolkit.images import maps, masks, scenes
from toolkit.images.bands import Bands, open_image
from toolkit.images.transforms import to_rgb
from toolkit.models import dense

tifffile = pytest.importorskip("tifffile")
CODES = (33550, 33922, 34264, 34735, 34736, 34737)
COLOURS = np.array([[0, 0, 0], [1, 0.5, 0], [0, 0, 1]])
AN_EPOCH = "--task segmentation --lora-rank 2 --augmentation crop --workers 0 --batch-size 4 --epochs 1"


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
    return save_image(path, array, extratags=extratags or geotags(), **how)


def shallow_resnet(weights=None, num_classes: int = 5) -> torch.nn.Module:
    return resnet(classes=num_classes)


@pytest.fixture(scope="module", autouse=True)
def shallow(small_backbones):
    """A ResNet-18 has one block in each stage: it is exported in half the time."""
    with mock.patch.object(torchvision.models, "resnet18", shallow_resnet):
        yield


@pytest.fixture(scope="module")
def tiffs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiffs")
    mask = np.zeros((72, 80), np.uint8)
    mask[18:36, 20:40] = 7
    for number in range(6):
        write_tiff(folder / f"images/{number}.tif", 72, 80, number)
        save_image(folder / f"masks/{number}.png", mask)
    (folder / "classes.txt").write_text("ground 0\nroof 7\n")
    return folder


@pytest.fixture(scope="module")
def of_pairs(finetune_into, pairs, tmp_path_factory) -> Path:
    """The adapter of a ViT for windows of 16 pixels, with a base in 4 bits, and adapters in one block."""
    argv = f"{AN_EPOCH} --data-dir {pairs} --classes dark bright --use-qlora --adapt-last 1 --class-weights balanced"
    return finetune_into(tmp_path_factory.mktemp("run"), f"{argv} --keep-best miou")["folder"] / "lora.pth"


@pytest.fixture(scope="module")
def of_tiffs(finetune_into, tiffs, tmp_path_factory) -> Path:
    """The adapter of a ResNet-18 for windows of 64 pixels of four channels."""
    base = save_base(tmp_path_factory.mktemp("resnet") / "base.pth", "resnet18", 64, 4)
    argv = f"{AN_EPOCH} --checkpoint {base} --data-dir {tiffs} --classes {tiffs}/classes.txt --channels 4 --scale 10000"
    argv += " --normalise data --image-size 64"
    return finetune_into(tmp_path_factory.mktemp("run"), argv)["folder"] / "lora.pth"


def logits_of(adapter: Path, image) -> torch.Tensor:
    model, info = load_finetuned(adapter)
    with torch.no_grad():
        return dense.answers_for(info["transform"](image), model.window, model)


def deploy(command: str, *argv) -> object:
    more = ["--device", "cpu", "--workers", "0"] if command in deploy_lora.ON_IMAGES else []
    return deploy_lora.main([command, *map(str, argv), *more])


def test_masks_of_a_folder_are_the_models_answers_and_are_resumed(of_pairs, pairs, tmp_path, of_tiffs, tiffs):
    argv = "predict", of_pairs, pairs / "val", "--output", tmp_path / "maps"
    written = deploy(*argv)
    of_images = [tmp_path / f"maps/images/{i}.png" for i in range(6)]
    assert sorted(written) == of_images + [tmp_path / f"maps/masks/{i}.png" for i in range(6)]
    with Image.open(of_images[1]) as mask, Image.open(pairs / "val/images/1.png") as image:
        assert mask.mode == "P" and mask.size == image.size
        assert np.array_equal(mask, logits_of(of_pairs, image).argmax(0))
    missing, *others = written
    content = missing.read_bytes()
    missing.unlink()
    times = [path.stat().st_mtime_ns for path in others]
    assert deploy(*argv, "--resume") == written and missing.read_bytes() == content
    assert [path.stat().st_mtime_ns for path in others] == times
    with pytest.raises(InputError, match="its answers were made with other --probabilities; name another folder"):
        deploy(*argv, "--resume", "--probabilities")
    first, *_ = deploy("predict", of_tiffs, tiffs / "images", "--output", tmp_path / "scenes")
    assert first == tmp_path / "scenes/0.tif" and read_tags(first) == read_tags(tiffs / "images/0.tif")
    image = pairs / "val/images/0.png"
    [path] = deploy("predict", of_pairs, image, "--output", tmp_path / "soft", "--probabilities")
    with Image.open(image) as opened:
        np.testing.assert_allclose(np.load(path), logits_of(of_pairs, opened).softmax(0).movedim(0, 2), atol=1e-6)


def test_a_scene_becomes_a_map_at_its_place(of_tiffs, tmp_path):
    scene = write_tiff(tmp_path / "scene.tif", 150, 100)
    predict = "predict", of_tiffs, scene, "--output"
    for _ in range(2):  # the second map replaces the first
        deploy(*predict, tmp_path / "map.tif")
    logits = logits_of(of_tiffs, scene)
    assert np.array_equal(tifffile.imread(tmp_path / "map.tif"), logits.argmax(0))
    assert read_tags(tmp_path / "map.tif") == read_tags(scene)
    deploy(*predict, tmp_path / "soft.tif", "--probabilities")
    soft = tifffile.imread(tmp_path / "soft.tif")
    assert soft.dtype == np.float32
    np.testing.assert_allclose(soft, logits.softmax(0).movedim(0, 2), atol=1e-5)
    share = float(np.median(soft.max(2)))
    deploy(*predict, tmp_path / "sure.tif", "--abstain", share)
    sure = tifffile.imread(tmp_path / "sure.tif")
    assert np.array_equal(sure == 255, soft.max(2) < share) and 0 < (sure == 255).mean() < 1


def test_outputs_that_fit_no_masks_and_what_a_map_cannot_have_are_refused(of_pairs, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(deploy_lora.peft_format, "import_peft", lambda: None)
    for words, named in (
        ("predict val --output answers.csv", "the adapter answers for every pixel: name a folder, or map.tif"),
        ("predict val --output map.tif", "one map, and there are 12 images"),
        ("predict val/images/0.png --window 16 --output maps", "drop --window"),
        ("embed val --output a.npy", "embed is not for an adapter with a class for every pixel"),
        ("convert --output peft", "convert is not for an adapter with a class for every pixel"),
    ):
        command, *argv = words.replace("val", f"{pairs}/val").split()
        with pytest.raises(InputError, match=named):
            deploy(command, of_pairs, *argv)
    height = Regression(["height"], torch.tensor([[-1.0], [1.0]]))
    for task, words, asked in (
        (height, "numbers have none", {"probabilities": True}),
        (height, "--abstain is for maps of classes", {"abstain": 0.6}),
        (Classification(["sea", "land"]), "drop it, or --probabilities", {"probabilities": True, "abstain": 0.6}),
    ):
        with pytest.raises(InputError, match=words):
            Maps(task, None, None, 8, **asked)


def test_an_adapter_of_whole_images_answers_for_windows(tmp_path, adapter_for_images):
    array = levels(40, 70, 3, np.uint8)
    scene = save_image(tmp_path / "scene.tif", array, photometric="rgb", extratags=geotags())
    predict = "predict", adapter_for_images, scene, "--output"
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
    padded = np.pad(array, ((0, 8), (0, 10), (0, 0)), "edge")  # windows over the border are filled with the last pixels
    windows = padded.reshape(3, 16, 5, 16, 3).swapaxes(1, 2).reshape(15, 16, 16, 3)
    with torch.no_grad():
        expected = model(torch.stack([info["transform"](Image.fromarray(window)) for window in windows])).softmax(1)
    np.testing.assert_allclose(soft, expected.reshape(3, 5, 3), atol=1e-5)
    with pytest.raises(InputError, match="whole images: --probabilities, --window and --abstain are for a map"):
        deploy(*predict, tmp_path / "answers", "--window", 24)


@pytest.mark.parametrize(("mean", "dtype"), [(1_700_000_000.0, np.float64), (40.0, np.float32)])
@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_a_map_of_numbers_far_from_zero_has_those_of_the_table(tmp_path, mean, dtype, suffix):
    """As seconds since 1970: float32 has one number in 128 there."""
    task = Regression(["time"], mean=torch.tensor([mean], dtype=torch.float64), std=torch.tensor([30.0]).double())
    outputs = torch.tensor([[1.71420], [-0.25]])
    maps = Maps(task, lambda windows: outputs, lambda image: torch.zeros(3, 8, 8), window=8)
    scene = save_image(tmp_path / "scene.npy", np.zeros((8, 16, 1)))
    with scenes.open_scene(scene, Bands(1)) as scene:
        path = maps.write(scene, tmp_path / f"map{suffix.removesuffix('.npy')}", lambda parts, total: parts)
    found = np.load(path) if suffix == ".npy" else tifffile.imread(path)
    assert path.suffix == suffix and found.dtype == dtype
    assert [f"{number:.3f}" for number in found.ravel()] == [f"{mean + 51.426:.3f}", f"{mean - 7.5:.3f}"]
    assert [float(text) for [text] in task.table(outputs)[1]] == pytest.approx(found.ravel().tolist(), abs=1e-3)


def test_a_run_leaves_its_figures_which_an_evaluation_finds_again(of_pairs, pairs, tmp_path):
    run = json.loads((of_pairs.parent / "results.json").read_text())
    assert run["task"] == "segmentation" and list(run["iou_per_class"]) == ["dark", "bright"]
    assert {"probe_miou_before", "dice_per_class", "pixel_accuracy"} <= run.keys()
    model, info = load_finetuned(of_pairs)
    assert isinstance(model, dense.DenseModel) and info["task"]["kind"] == "segmentation"
    assert [block.mlp[0].base_bits for block in model.backbone.encoder.layers] == [4, 4]  # below the adapters too
    assert 0 < run["temperature"] == info["temperature"] != 1
    found = deploy("evaluate", of_pairs, pairs, "--output", tmp_path / "results.json")
    assert found["miou"] == pytest.approx(run["val_miou"], abs=1e-6)
    assert found["iou_per_class"] == pytest.approx(run["iou_per_class"], abs=1e-6)
    assert found["miou_interval"] == pytest.approx(run["val_miou_interval"], abs=1e-6)
    page = (tmp_path / "results.html").read_text()
    assert "mean IoU" in page and "data:image/png" in page


@pytest.mark.parametrize("side, at_once", [(16, 4), (20, 1)])
def test_an_evaluation_reads_images_of_one_window_in_batches(of_pairs, tmp_path, spy, side, at_once):
    """Larger ones one by one, however few of their pixels are known: a batch of scenes would fill the memory."""
    for i in range(6):
        mask = np.full((side, side - i % 2), 255, np.uint8)
        mask[:2, : i + 2] = [[0], [1]]
        save_image(tmp_path / f"images/{i}.png", levels(*mask.shape, 3, np.uint8, seed=i))
        save_image(tmp_path / f"masks/{i}.png", mask)
    build = spy(deploy_lora, "build_loader")
    results = deploy("evaluate", of_pairs, tmp_path, "--batch-size", "4", "--output", tmp_path / "results.json")
    assert build.call_args.kwargs["batch_size"] == at_once and results["images"] == 6


def test_an_evaluation_reads_masks_as_the_run_did(of_tiffs, tiffs, tmp_path):
    found = deploy("evaluate", of_tiffs, tiffs)
    assert list(found["iou_per_class"]) == ["ground", "roof"] and found["images"] == 6
    save_image(tmp_path / "1.png", np.full((72, 80), 1, np.uint8))
    (tmp_path / "list.csv").write_text(f"image,mask\n{tiffs}/images/1.tif,{tmp_path}/1.png\n")
    with pytest.raises(InputError, match="a pixel has the value 1, which is no class's"):
        deploy("evaluate", of_tiffs, tmp_path / "list.csv")
    images = masks.pairs_in(tiffs, Bands(4), masks.MaskReader(masks.read_classes([f"{tiffs}/classes.txt"])))
    assert images[1][0].shape == (72, 80, 4) and images.picture(1, 2).shape == (36, 40, 3)


def test_evaluate_leaves_out_the_pairs_that_cannot_be_used_and_lists_them(of_pairs, pairs, tmp_path, capsys):
    """Nothing is said of training's options, and the groups are those of the pairs that are left."""
    mine = shutil.copytree(pairs / "val", tmp_path / "mine")
    (mine / "images/1.png").write_text("nothing")
    save_image(mine / "masks/2.png", np.full((20, 28), 255, np.uint8))
    save_image(mine / "masks/3.png", np.full((20, 28), 7, np.uint8))
    shutil.copy(mine / "masks/0.png", mine / "masks/lone.png")
    assert deploy("evaluate", of_pairs, mine)["images"] == 3
    told = capsys.readouterr().out
    for named in ("masks/2.png: ", "masks/3.png: ", "images/1.png: not a readable", "lone.png: there is no image"):
        assert named in told
    assert "3 pairs of image and mask cannot be used" in told and "--" not in told
    lines = [f"images/{i}.png,masks/{i}.png,{'abc'[i // 2]}" for i in range(6)]
    (mine / "list.csv").write_text("\n".join(["image,mask,who", *lines]))
    _, about = load_finetuned(of_pairs)
    about["config"]["data"]["group_by"] = "who"
    images, _ = deploy_lora._labelled_images(mine / "list.csv", about)
    assert images.groups.tolist() == ["a", "c", "c"]
    for path in (mine / "images").iterdir():
        path.write_text("nothing")
    with pytest.raises(InputError, match=r"none of the pairs can be used, such as .*not a readable image") as raised:
        deploy("evaluate", of_pairs, mine)
    assert "--" not in str(raised.value)


def test_the_page_makes_the_mask(of_pairs, tmp_path, monkeypatch):
    """In ONNX by windows, which of a ViT cannot be larger: the model stands in for its graph. In plain PyTorch with a
    narrow network in the place of the ResNet-50, and an image of one window."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "prepare", preparation())
    model, info = load_finetuned(of_pairs)

    def run(_names, inputs):
        assert inputs["images"].dtype == np.float32
        with torch.no_grad():
            return [model(torch.from_numpy(inputs["images"])).softmax(1).numpy()]

    monkeypatch.setitem(sys.modules, "onnxruntime", mock.Mock(**{"InferenceSession.return_value.run": run}))
    Path("model.json").write_text(json.dumps(deploy_lora.usage(info)))
    base = save_base(tmp_path / "base.pth", "resnet18", 32)
    resnet, _ = load_base(base, None, 3, per_pixel=True, image_size=32)
    about = {"arch": "resnet18", "image_size": 32, "task": {"kind": "segmentation", "values": [0, 1, 2]}}
    of_resnet = save_adapter(resnet, tmp_path / "lora.pth", base, **about)
    deploy("merge", of_resnet, "--output", "merged.pth")
    monkeypatch.setattr(torchvision.models, "resnet50", shallow_resnet)
    whole, by_windows, *_ = blocks("python", (DOCS / "deploy.md").read_text().split("## A class for every pixel")[1])
    cases = [(by_windows, of_pairs, (16, 16)), (by_windows, of_pairs, (40, 27)), (whole, of_resnet, (32, 32))]
    for code, adapter, size in cases:
        path = save_image(Path("image.png"), levels(*size, 3, np.uint8))
        found = {}
        exec(code, found)
        with Image.open(path) as image:
            logits = logits_of(adapter, image)
        assert np.array_equal(found["mask"], logits.argmax(0))
    torch.testing.assert_close(found["F"].interpolate(found["logits"], size, mode="bilinear")[0], logits)


def test_a_merged_resnet_says_what_it_answers_and_an_exported_one_takes_files_of_any_size(of_tiffs, tmp_path, capsys):
    deploy("merge", of_tiffs, "--output", tmp_path / "merged.pth")
    about = json.loads((tmp_path / "merged.json").read_text())
    assert about["per_pixel"] and about["image_size"] == 64 and about["class_names"] == ["ground", "roof"]
    assert "resize" not in about and about["activation"] == "softmax"
    assert "2 classes of every pixel" in capsys.readouterr().out
    deploy("export", of_tiffs, "--output", tmp_path / "model.pt2", "--normalise")
    graph = torch.export.load(tmp_path / "model.pt2").module()
    model, info = load_finetuned(of_tiffs)
    for height, width in ((64, 64), (75, 130)):
        path = write_tiff(tmp_path / "a.tif", height, width)
        numbers = torch.from_numpy(Bands(4).array(path)).permute(2, 0, 1)[None]
        with torch.no_grad():
            expected = model(info["transform"](path)[None]).softmax(1)
        torch.testing.assert_close(graph(numbers), expected, atol=1e-4, rtol=1e-3)


def in_rows(path, bands, height=23):
    """The whole image by parts that overlap, as windows do."""
    with scenes.open_scene(path, bands) as scene:
        whole = scene.rows(0, 1)[:0]
        for first in range(0, scene.height, height - 9):
            whole = np.concatenate([whole[:first], scene.rows(first, min(first + height, scene.height))])
        assert whole.shape[:2] == (scene.height, scene.width)
        return whole


WRITTEN = {
    "strips": {"rowsperstrip": 16},
    "compressed strips": {"rowsperstrip": 7, "compression": "deflate"},
    "tiles": {"tile": (32, 48)},
    "compressed tiles": {"tile": (64, 32), "compression": "deflate", "predictor": True},
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
    path = save_image(tmp_path / "a.tif", array, photometric="minisblack", **config, **WRITTEN[how])
    for bands in (Bands(5), Bands(3, ("3", "0", "1"))):
        assert np.array_equal(in_rows(path, bands), bands.array(path))


# The bands in the file and those that are asked for, and how it is written.
OTHER_FILES = {
    "grey.png": (1, Bands(1), {}),
    "a.npy": (5, Bands(5), {}),
    "a.jpg": (3, None, {"exif": oriented(6)}),
    "a.png": (3, None, {"exif": oriented(6)}),
    "strips.tif": (3, None, {"rowsperstrip": 16, "compression": "deflate", "photometric": "rgb"}),
    "tiles.tif": (3, None, {"tile": (32, 32), "photometric": "rgb"}),
    "of four bands.tif": (4, None, {"extrasamples": ["assocalpha"], "photometric": "rgb"}),
    "tiles with transparency.tif": (4, None, {"extrasamples": ["unassalpha"], "tile": (32, 32), "photometric": "rgb"}),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_rows_of_other_files_are_those_of_the_whole(tmp_path, name, monkeypatch):
    """Of an orthophoto without Pillow, which would hold all of it, and refuses more than 179 million pixels."""
    count, bands, how = OTHER_FILES[name]
    path = save_image(tmp_path / name, levels(bands=count, dtype=np.uint8).squeeze(), **how)
    expected = bands.array(path) if bands else np.asarray(to_rgb(open_image(path)))
    if "tile" in how:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert np.array_equal(in_rows(path, bands), expected)


def test_a_compression_that_pillow_alone_knows(tmp_path, monkeypatch):
    unknown = mock.Mock(side_effect=ValueError("requires the 'imagecodecs' package"))
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", unknown)
    array = levels(bands=3, dtype=np.uint8)
    path = save_image(tmp_path / "a.tif", array, photometric="rgb", compression="deflate")
    assert np.array_equal(in_rows(path, None), array) and unknown.called


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_bands_of_16_bits_are_read_as_a_photograph_only_where_they_are_one(tmp_path, byteorder):
    """Pillow reads the bytes of planes without compression as if each were a level."""
    array = levels(bands=3) * 200
    how = {"photometric": "rgb", "byteorder": byteorder}
    apart = {"planarconfig": "separate", **how}
    a = save_image(tmp_path / "a.tif", array, **how)
    b = save_image(tmp_path / "b.tif", array.transpose(2, 0, 1), compression="zlib", **apart)
    for path in (a, b):
        assert np.array_equal(in_rows(path, None), array >> 8)
    with pytest.raises(InputError, match=r"c\.tif: .*16 bits whose bands lie apart: .* train with --scale 65535"):
        in_rows(save_image(tmp_path / "c.tif", array.transpose(2, 0, 1), **apart), None)
    d = save_image(tmp_path / "d.tif", array, photometric="minisblack", planarconfig="contig", byteorder=byteorder)
    with pytest.raises(InputError, match=r"d\.tif: .*training reads bands of more than 8 bits with --scale, as 65535"):
        in_rows(d, None)
    with pytest.raises(InputError, match=r"d\.tif: .*has 3 bands, and the network takes 4"):
        in_rows(d, Bands(4))
    assert np.array_equal(in_rows(d, Bands(3, scale=65535)), array)


def test_few_rows_of_scenes_and_maps_are_held(tmp_path):
    how = {"photometric": "minisblack", "planarconfig": "contig", **WRITTEN["compressed tiles"]}
    path = save_image(tmp_path / "a.tif", levels(1000, 1000), **how)  # 10 MB
    with little_memory(5_000_000), scenes.open_scene(path, Bands(5)) as scene:
        for first in range(0, 1000, 50):
            scene.rows(first, first + 50)
    held = []

    def parts():
        for _ in range(40):
            held.append(tracemalloc.get_traced_memory()[1])
            yield np.zeros((100, 300), np.float32)

    tracemalloc.start()
    maps.write_map(tmp_path / "map.tif", parts(), 4000, 300, None)
    tracemalloc.stop()
    assert held[-1] < held[10] + 100_000


def test_a_map_of_classes_has_the_georeference_of_its_scene_a_mask_a_palette_and_probabilities_bands(tmp_path):
    like = write_tiff(tmp_path / "scene.tif", 600, 530)
    classes = levels(600, 530, 1, np.uint8)[..., 0] % 3
    path = tmp_path / "map.tif"
    maps.write_map(path, np.array_split(classes, 9), 600, 530, str(like), COLOURS, ["sea", "<b> & c", "é"])
    assert np.array_equal(tifffile.imread(path), classes)
    assert read_tags(path) == read_tags(like) and len(read_tags(like)) == 5
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert (page.is_tiled, page.compression.name, page.photometric.name) == (True, "DEFLATE", "PALETTE")
        assert page.tags[42113].value == "255"
        assert page.colormap[:, :3].T.tolist() == [[0, 0, 0], [65535, 32768, 0], [0, 0, 65535]]
        assert "&lt;b&gt; &amp; c" in page.tags[42112].value
    classes = classes[:9, :7]
    classes[0, 0] = 255
    maps.write_mask(tmp_path / "mask.png", classes, COLOURS)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P" and np.array_equal(image, classes)
        assert image.getpalette()[3:6] == [255, 128, 0]
    values = np.random.default_rng(0).random((300, 270, 3), np.float32)
    maps.write_map(path, np.array_split(values, 9), 300, 270, None, names=["a", "b", "c"])
    assert np.array_equal(tifffile.imread(path), values) and not read_tags(path)


@pytest.mark.parametrize("point", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_pixels_of_a_coarser_map_lie_where_their_windows_do(tmp_path, point, turned):
    keys = tuple(2 if point and i == 11 else value for i, value in enumerate(UTM))
    matrix = (0.0, 10.0, 0.0, 500000.0, -10.0, 0.0, 0.0, 5400000.0, *[0.0] * 7, 1.0) if turned else None
    like = write_tiff(tmp_path / "scene.tif", 640, 512, extratags=geotags(keys, matrix))
    maps.write_map(tmp_path / "map.tif", [levels(10, 8, 1, np.uint8)[..., 0]], 10, 8, str(like), COLOURS, step=64)
    coarse = read_tags(tmp_path / "map.tif")
    assert coarse[34735] == read_tags(like)[34735]
    x = 500000.0
    y = 5400000.0
    if point:  # by 19-008r4 the place is that of a pixel's centre, which moves by 31.5 pixels of 10 m
        x += 315.0
        y -= 315.0
    if turned:
        assert coarse[34264][:8] == (0.0, 640.0, 0.0, x, -640.0, 0.0, 0.0, y)
    else:
        i, j, _, *at, _ = coarse[33922]
        assert coarse[33550] == (640.0, 640.0, 0.0) and [at[0] - 640.0 * i, at[1] + 640.0 * j] == [x, y]
