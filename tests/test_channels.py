"""Images that are no RGB photographs: channels of checkpoints, bands of files, and what each command makes of them."""

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deploy_lora
from finetune_lora import load_finetuned
from lora.adapter_file import write_adapter_file
from moco import pretrain
from tests.checkpoint_files import under, without_head
from tests.image_files import bytes_of, labelled_tar, png_of, save_image, write
from toolkit import InputError
from toolkit.images import data, folders, remote, sources, transforms
from toolkit.images.bands import Bands, Scaling, _check_values, decoded, known_scaling, settle
from toolkit.images.families import FAMILIES
from toolkit.models import backbones, checkpoints
from toolkit.run.options import FineTuneOptions, known_image_values

tifffile = pytest.importorskip("tifffile")

ON_CPU = ("--device", "cpu", "--workers", "0")


@pytest.fixture(scope="module")
def tiffs(tmp_path_factory) -> Path:
    """train/ and val/ with three classes, told by bands 2 to 4 of 13: 5 and 3 TIFFs each, of ten thousandths."""
    folder, rng = tmp_path_factory.mktemp("bands"), np.random.RandomState(0)
    for number, i in itertools.product(range(3), range(8)):
        place = folder / ("train" if i < 5 else "val") / str(number) / f"{i}.tif"
        image = rng.randint(0, 2000, (16, 16, 13))
        image[..., 1:4] += 400 * rng.randint(0, 6 * number + 5, (16, 16, 1))
        save_image(place, image.astype(np.uint16), planarconfig="contig", photometric="minisblack")
    return folder


def test_a_folder_of_13_band_tiffs_goes_through_stage_1_and_every_command(base, tiffs, finetune, tmp_path, capsys):
    """A stage-1 adapter knows the channels that its base was fitted to, and what the numbers mean."""
    argv = f"--checkpoint {base} --channels 13 --scale 10000 --lora-rank 2 --data-dir {tiffs} --epochs 1 --batch-size 8"
    stage1 = pretrain.main([*argv.split(), f"--output-dir={tmp_path}/stage1", "--dim=8", "--mlp-dim=8", *ON_CPU])
    assert "loaded, the first layer fitted from 3 channels, in their order" in capsys.readouterr().out
    told = f"--data-dir {tiffs} --workers 0 --epochs 1 --lora-rank 2 --stage1-adapter {stage1['checkpoint']}"
    with pytest.raises(InputError, match=r"moco_lora.pth is for images of 13 channels, not 5: leave out --channels"):
        finetune(f"{told} --channels 5", "other")
    results = finetune(told)
    adapter = tmp_path / "out/lora.pth"
    model, about = load_finetuned(adapter)
    assert backbones.input_channels(model) == about["channels"] == results["normalization"]["channels"] == 13
    assert (about["scale"], about["mean"], about["std"]) == (10000, [0] * 13, [1] * 13)
    image = tiffs / "val" / "1" / "5.tif"
    expected = torch.from_numpy(tifffile.imread(image).astype(np.float32) / 10000).permute(2, 0, 1)
    assert torch.allclose(about["transform"](image), expected, atol=1e-7)

    def command(name: str, of: Path, options: str = ""):
        return deploy_lora.main([name, str(adapter), str(of), *options.split(), *ON_CPU])

    assert command("evaluate", tiffs / "val")["accuracy"] == results["val_accuracy"]
    assert len(command("predict", image.parent, f"--output {tmp_path}/p.csv")) == 3
    assert command("embed", image.parent, f"--output {tmp_path}/f.npy").shape == (3, 192)
    assert len(command("choose", image.parent, f"--count 2 --output {tmp_path}/chosen")) == 2
    assert (tmp_path / "chosen/to_label.html").read_text().count("data:image/jpeg") == 2


def test_random_weights_are_for_any_number_of_channels_and_what_is_measured_is_kept(tiffs, finetune, tmp_path, capsys):
    options = f"--data-dir {tiffs} --channels 2 --bands 4,2 --lora-rank 0 --no-freeze-backbone --normalise data"
    told = finetune(f"{options} --checkpoint none --arch vit_mini --image-size 16 --epochs 1")["normalization"]
    assert "measured on 15 training images" in capsys.readouterr().out
    model, about = load_finetuned(tmp_path / "out/lora.pth")
    assert (backbones.input_channels(model), about["bands"]) == (2, ["4", "2"])
    stacked = np.stack([tifffile.imread(path) for path in (tiffs / "train").rglob("*.tif")])[..., [3, 1]].astype(float)
    for name, measure in (("mean", np.mean), ("std", np.std)):
        assert about[name] == told[name] == pytest.approx(measure(stacked, (0, 1, 2)))


@pytest.mark.parametrize(("kind", "scale", "white"), [("float32", 0.01, 0.01), ("uint8", None, 255)])
def test_what_is_measured_is_divided_by_the_scale(kind, scale, white):
    levels = np.random.RandomState(0).randint(0, 256, (6, 8, 3)).astype(kind)
    image = Image.fromarray(levels) if kind == "uint8" else levels
    found = settle(Scaling(scale=scale, normalise="data"), "resnet18", 3, data.LabelledImages([image]))
    assert found["mean"] == pytest.approx(levels.mean((0, 1)) / white)
    assert found["std"] == pytest.approx(levels.std((0, 1)) / white, rel=1e-5)


@pytest.mark.parametrize("bands", [1, 3, 11, 13])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.float32])
def test_every_form_of_a_file_has_the_same_numbers(kind, bands):
    """An array with as many rows as bands has its bands last."""
    array = np.random.RandomState(0).uniform(0, 200, (13, 24, bands)).astype(kind)
    planes = np.ascontiguousarray(array.transpose(2, 0, 1))
    grey = {"photometric": "minisblack"}
    files = {
        "pages": bytes_of(tifffile.imwrite, planes, **grey, metadata=None),
        "compressed": bytes_of(tifffile.imwrite, planes, **grey, compression="zlib"),
        "BigTIFF": bytes_of(tifffile.imwrite, planes, **grey, bigtiff=True),
        "npy, bands last": bytes_of(np.save, array),
        "npz": bytes_of(np.savez, image=array),
    }
    if bands > 1:
        files["samples side by side"] = bytes_of(tifffile.imwrite, array, **grey, planarconfig="contig")
        files["planes"] = bytes_of(tifffile.imwrite, planes, **grey, planarconfig="separate")
    if bands < 13:
        files["npy, bands first"] = bytes_of(np.save, planes)
    for name, content in files.items():
        np.testing.assert_array_equal(decoded(content), array.astype(np.float32), name, strict=True)


def test_a_preview_is_no_band_and_pngs_of_16_bits_keep_them(tmp_path):
    for side in (16, 4):
        save_image(tmp_path / "a.tif", np.zeros((side, side)), photometric="minisblack", metadata=None, append=True)
    assert Bands(1).array(tmp_path / "a.tif").shape == (16, 16, 1)
    levels = np.random.RandomState(0).randint(0, 2**16, (5, 4, 3)).astype(">u2")
    grey = bytes_of(Image.fromarray(levels[..., 0].astype(np.uint16)).save, "PNG")
    rgb = png_of(4, 5, 16, 2, b"".join(b"\0" + row.tobytes() for row in levels))  # which Pillow does not write
    assert np.array_equal(decoded(rgb), levels) and np.array_equal(decoded(grey)[..., 0], levels[..., 0])


def test_numbers_that_mark_pixels_without_data_are_read_as_0():
    """GDAL's tag names one; ArcGIS takes the lowest of floats. Without the tag a number is a number."""
    levels = np.array([[-9999, 5], [6, 7]], np.int16)
    lowest = np.array([[-3.4028235e38, np.nan], [np.inf, 7]], np.float32)
    for content, expected in (
        (bytes_of(tifffile.imwrite, levels, extratags=[(42113, "s", 0, "-9999", True)]), [[0, 5], [6, 7]]),
        (bytes_of(tifffile.imwrite, levels), [[-9999, 5], [6, 7]]),
        (bytes_of(tifffile.imwrite, lowest), [[0, 0], [0, 7]]),
        (bytes_of(np.save, np.array([[np.nan, np.inf], [1, -np.inf]])), [[0, 0], [1, 0]]),
    ):
        assert decoded(content)[..., 0].tolist() == expected


def test_bands_are_picked_put_in_order_and_made_of_zeros():
    array = np.arange(16 * 20 * 12, dtype=np.float32).reshape(16, 20, 12)
    # BigEarthNet lacks B10; EuroSAT has B8A last, where SSL4EO-S12 has it after B08.
    read = Bands(13, ("1", "2", "3", "4", "5", "6", "7", "8", "12", "9", "0", "10", "11")).picked(array)
    assert np.array_equal(read[..., 8], array[..., 11])
    assert np.array_equal(read[..., 9], array[..., 8])
    assert not read[..., 10].any()
    _check_values(np.array([[1.0, 0, 0]] * 4), Bands(3, ("1", "0", "0")), [1.0] * 3)  # zeros need not vary


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, monkeypatch):
    """In a run, and where a transform is given its path."""
    monkeypatch.setattr(remote, "LARGE_IMAGE", 2**20)
    path = tmp_path / "broken.npy"
    transform = transforms.eval_transform(8, bands=Bands(13))
    pages = [struct.pack("<HHHIII", 1, 256, 99, 1, 1, 8 + 18 * number) for number in range(1, 5000)]
    many_pages = b"II*\0\x08\0\0\0" + b"".join(pages) + struct.pack("<HHHIII", 1, 256, 99, 1, 1, 0)
    for content, reason in (
        (bytes_of(np.save, np.zeros((8, 8, 13)))[:200], ""),
        (bytes_of(np.save, np.zeros((8, 8, 13), complex)), "complex128"),
        (bytes_of(np.save, np.zeros((2, 8, 8, 13))), r"\(2, 8, 8, 13\)"),
        (bytes_of(np.save, np.array([{}], object)), "allow_pickle"),
        (bytes_of(tifffile.imwrite, np.zeros((8, 8, 13), np.uint16))[:150], ""),
        (bytes_of(tifffile.imwrite, np.zeros((8, 8, 13)), compression="zlib").replace(b"\x78\x9c", b"\0\0"), "Error"),
        (b"II*\0 and nothing more", ""),
        (bytes_of(np.savez_compressed, np.zeros((2**10 + 1, 2**10), np.uint8)), "more than its bytes can hold"),
        (many_pages, "it has 5000 pages"),
        # Pillow shifts those of 15 bits to fill 16, which would double the reflectances of Sentinel-2's products.
        (bytes_of(Image.fromarray(np.zeros((32, 32), np.uint16)).save, "JPEG2000", irreversible=False), "write a TIFF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n", "cannot identify"),
    ):
        path.write_bytes(content)
        for read in (lambda: folders.ImageFiles(tmp_path, [path.name], Bands(13))[0], lambda: transform(path)):
            with pytest.raises(InputError, match=rf"broken\.npy: not a readable image .*{reason}"):
                read()


def test_a_file_with_other_bands_is_not_called_unreadable(tmp_path):
    for bands, shape, reason in (
        (Bands(13), (8, 8, 4), r"it has 4 bands, and the network takes 13 \(training chooses by --bands\)"),
        (Bands(3), (8, 8), r"it has 1 band, and the network takes 3 \(training chooses by --bands 1,1,1\)"),
        (Bands(2, ("1", "7")), (8, 8, 2), "it has no band 7, but 1 to 2"),
    ):
        np.save(tmp_path / "image.npy", np.zeros(shape))
        with pytest.raises(InputError, match=rf"image\.npy: {reason}$"):
            folders.ImageFiles(tmp_path, ["image.npy"], bands)[0]


def test_images_in_archives_have_bands_too(tiffs, tmp_path):
    paths = sorted((tiffs / "val").rglob("*.tif"))
    write(tmp_path / "train/0.tar", labelled_tar(paths))
    splits = sources.load_splits("imagefolder", tmp_path, for_training_only=True, bands=Bands(13))
    for archived in (splits.train, sources.load_unlabelled(tmp_path, bands=Bands(13))):
        for (image, _), path in zip(archived, paths, strict=True):
            assert np.array_equal(image, decoded(path.read_bytes()))


def test_a_scale_for_other_numbers_is_refused_and_the_likely_one_named():
    """Shares of 1, bytes, reflectances in ten thousandths, and 16 bits."""
    for highest, scale, likely in (
        (1.5, 255, 1),
        (250, 1, 255),
        (9000, 1, 10000),
        (9000, 1e6, 10000),
        (60000, 1, 65535),
    ):
        array = np.random.RandomState(0).uniform(0, highest, (8, 8, 2)).astype(np.float32)
        with pytest.raises(InputError, match="channel 1 has a standard deviation of ") as raised:
            settle(Scaling(scale=scale), "resnet18", 2, data.LabelledImages([array]))
        assert f"go from {array[..., 0].min():.4g} to {array[..., 0].max():.4g} (mean" in str(raised.value)
        assert f"and are divided by {scale:g}; --scale {likely} is likely" in str(raised.value)


def test_photographs_that_are_nearly_black_are_told(capsys):
    """As 12 bits of an X-ray in a PNG of 16, of which 8 bits keep 16 levels."""
    for most, is_told in ((4095, True), (10000, True), (65535, False)):
        image = transforms.to_rgb(Image.fromarray(np.linspace(0, most, 64).reshape(8, 8).astype(np.uint16)))
        settle(Scaling(), "resnet18", 3, data.LabelledImages([image]))
        told = capsys.readouterr().out
        assert ("say what is white, as --scale 4095 with --bands 1,1,1" in told) == is_told == (told != "")


def test_an_rgb_photograph_read_as_bands_is_the_photograph(images):
    """Resized, scaled and normalised alike; only the roundings to 8 bits in resizing are left out."""
    image = Image.open(images / "val" / "striped" / "0.png")
    as_bands = transforms.eval_transform(64, bands=Bands(3, scale=255.0))(image)
    assert (as_bands - transforms.eval_transform(64)(image)).abs().max() < 1.01 / 255 / 0.224


def values(scaling: Scaling) -> tuple:
    return scaling.scale, scaling.mean, scaling.std, scaling.bands


PUBLISHED = {  # names under which torchgeo and SSL4EO-S12 publish files
    "resnet50_sentinel2_all_moco-df8b932e.pth": (13, "ssl4eo-s12"),
    "resnet18_sentinel2_rgb_moco-e3a335e3.pth": (3, "ssl4eo-s12"),
    "B13_rn50_moco_0099_ckpt.pth": (13, "ssl4eo-s12"),
    "B13_vits16_moco_0099_ckpt.pth": (13, "ssl4eo-s12"),
    "resnet50_sentinel1_all_moco-906e4356.pth": (2, "ssl4eo-s12-radar"),
    "B2_rn50_moco_0099_ckpt.pth": (2, "ssl4eo-s12-radar"),
    "resnet18_landsat_tm_toa_moco-1c691b4f.pth": (7, "ssl4eo-l"),
    "resnet18_landsat_etm_sr_moco-4f078acd.pth": (6, "ssl4eo-l"),
    "resnet18_landsat_oli_tirs_toa_moco-a3002f51.pth": (11, "ssl4eo-l"),
    "cem500k_mocov2_resnet50_200ep.pth.tar": (1, "cem500k"),
    "resnet50_sentinel2_rgb_seco-018bf397.pth": (3, "seco"),
    "seco_resnet18_100k.ckpt": (3, "seco"),
    "resnet50_caco_geo_1m_200.pth": (3, "seco"),
}


def test_the_name_of_a_published_file_tells_its_family(capsys):
    for name, (channels, family) in PUBLISHED.items():
        known = FAMILIES[family]
        found = known_scaling(Scaling(), channels, {}, f"downloads/{name}")
        assert values(found) == (known.scale, list(known.mean), list(known.std), None), name
        told = capsys.readouterr().out
        assert told.count("\n") == 1 and f"of {family} (" in told and f"which the name of {name} says" in told


SENTINEL_2 = "resnet50_sentinel2_all_moco-df8b932e.pth"
RGB = {"arch": "vit_mini", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALF = RGB | {"mean": [0.5] * 3}
TWO = {"arch": "vit_mini", "channels": 2, "mean": [1.0, 2.0], "std": [3.0, 4.0], "scale": 5.0, "bands": ["4", "2"]}
TWO |= {"show_bands": [1]}  # which files of earlier versions have


def test_what_counts_is_typed_or_told_by_the_file(capsys):
    for typed, channels, told, name, expected, printed in (
        # What is not known, or typed, stays.
        ({}, 13, {}, "base.pth", None, ""),
        ({}, 4, {}, SENTINEL_2, None, ""),  # fitted to other images
        ({"scale": 1.0}, 13, {}, SENTINEL_2, None, ""),
        ({"mean": [0.0], "std": [1.0]}, 13, {}, SENTINEL_2, None, ""),
        ({"normalise": "data"}, 13, {}, SENTINEL_2, None, ""),
        ({"scale": 1.0, "mean": [0.0], "std": [1.0]}, 2, TWO, "stage1.pth", None, ""),
        # A family goes by its name; config.yaml then holds the numbers.
        ({"normalise": "ssl4eo-s12"}, 13, {}, "mine.pth", (10000, [0], [1], None), "of ssl4eo-s12 (torchgeo"),
        # What the file says of its pretraining, unless photographs were normalised as ever.
        ({}, 3, RGB, "stage1.pth", None, ""),
        ({}, 3, HALF, "a.pth", (None, [0.5] * 3, RGB["std"], None), ": scale, mean, std and bands"),
        ({}, 2, TWO, "stage1.pth", (5, [1, 2], [3, 4], ["4", "2"]), "as in the pretraining, which stage1.pth says"),
        ({"bands": ["3", "1"]}, 2, TWO, "a.pth", (5, [1, 2], [3, 4], ["3", "1"]), "as in the pretraining"),
        # The mean and std are those of reflectances, say, whatever the numbers in the files.
        ({"scale": 1.0}, 2, TWO, "a.pth", (1, [1, 2], [3, 4], ["4", "2"]), "images: mean, std and bands as in"),
    ):
        found = known_scaling(Scaling(**typed), channels, told, name)
        if expected is None:
            assert found == Scaling(**typed)
        else:
            assert (*values(found), found.normalise) == (*expected, None)
        said = capsys.readouterr().out
        assert printed in said and bool(said) == bool(printed)


def test_a_file_of_cem500k_and_a_stage_1_adapter_say_how_their_images_were_scaled(tmp_path, capsys):
    path = tmp_path / "any.pth.tar"
    state = under("module.encoder_q.", without_head(backbones.build_backbone("resnet18", 2, channels=1).state_dict()))
    torch.save({"arch": "resnet18", "epoch": 200, "norms": [0.583, 0.0997], "state_dict": state}, path)
    channels, told = checkpoints.find_images(path)
    assert (channels, *values(known_scaling(Scaling(), channels, told, path))) == (1, 255, [0.583], [0.0997], None)
    assert "as in the pretraining, which any.pth.tar says" in capsys.readouterr().out

    metadata = {"arch": "vit_mini", "channels": 3, "mean": [0.1, 0.2, 0.3], "std": [1.0] * 3, "bands": [], "scale": 1e4}
    content = {"format_version": 1, "tensors": {}, "layers": {}, "base_hash": "", "metadata": metadata}
    for path in (tmp_path / "moco_lora.pth", tmp_path / "moco_lora.safetensors"):
        write_adapter_file(content, path)
        known, read = known_image_values(FineTuneOptions(stage1_adapter=path), None)
        assert (known.mean, read) == ([0.1, 0.2, 0.3], Bands(3, (), 10000.0))


@pytest.mark.parametrize("damage", [{"std": [0.0, 1.0]}, {"mean": "x"}, {"channels": -1}, {"bands": 3}, {"scale": -1}])
def test_a_file_that_is_damaged_there_is_one_line(damage):
    with pytest.raises(InputError, match=r"^stage1\.pth: "):
        known_scaling(Scaling(), 2, TWO | damage, "stage1.pth")
