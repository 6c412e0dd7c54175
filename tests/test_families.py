"""What a checkpoint's images were is taken from its file or its name, and said; what is typed counts more."""

import pytest
import torch

from lora.adapter_file import write_adapter_file
from tests.checkpoint_files import under, without_head
from toolkit import InputError
from toolkit.images.bands import Bands, Scaling
from toolkit.images.families import FAMILIES, known_scaling
from toolkit.models.backbones import build_backbone
from toolkit.models.checkpoints import find_images
from toolkit.run.options import FineTuneOptions, known_image_values


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_name_of_a_published_file_tells_its_family(name, capsys):
    channels, family = PUBLISHED[name]
    known = FAMILIES[family]
    found = known_scaling(Scaling(), channels, {}, f"downloads/{name}")
    assert values(found) == (known.scale, list(known.mean), list(known.std), None)
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and f"of {family} (" in told and f"which the name of {name} says" in told


SENTINEL_2 = "resnet50_sentinel2_all_moco-df8b932e.pth"
RGB = {"arch": "vit_mini", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALF = RGB | {"mean": [0.5] * 3}
TWO = {"arch": "vit_mini", "channels": 2, "mean": [1.0, 2.0], "std": [3.0, 4.0], "scale": 5.0, "bands": ["4", "2"]}
TWO |= {"show_bands": [1]}  # which files of earlier versions have


@pytest.mark.parametrize(
    ("typed", "channels", "told", "name", "expected", "printed"),
    [
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
    ],
)
def test_what_counts_is_typed_or_told_by_the_file(typed, channels, told, name, expected, printed, capsys):
    found = known_scaling(Scaling(**typed), channels, told, name)
    if expected is None:
        assert found == Scaling(**typed)
    else:
        assert (*values(found), found.normalise) == (*expected, None)
    said = capsys.readouterr().out
    assert printed in said and bool(said) == bool(printed)


def test_cem500k_says_its_own_mean_and_std(tmp_path, capsys):
    path = tmp_path / "any.pth.tar"
    state = under("module.encoder_q.", without_head(build_backbone("resnet18", 2, channels=1).state_dict()))
    torch.save({"arch": "resnet18", "epoch": 200, "norms": [0.583, 0.0997], "state_dict": state}, path)
    channels, told = find_images(path)
    found = known_scaling(Scaling(), channels, told, path)
    assert (channels, *values(found)) == (1, 255, [0.583], [0.0997], None)
    assert "as in the pretraining, which any.pth.tar says" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_stage1_adapter_says_how_its_images_were_scaled(suffix, tmp_path):
    metadata = {"arch": "vit_mini", "channels": 3, "mean": [0.1, 0.2, 0.3], "std": [1.0] * 3, "bands": [], "scale": 1e4}
    content = {"format_version": 1, "tensors": {}, "layers": {}, "base_hash": "", "metadata": metadata}
    path = tmp_path / f"moco_lora{suffix}"
    write_adapter_file(content, path)
    known, read = known_image_values(FineTuneOptions(stage1_adapter=path), None)
    assert (known.mean, read) == ([0.1, 0.2, 0.3], Bands(3, (), 10000.0))


@pytest.mark.parametrize("damage", [{"std": [0.0, 1.0]}, {"mean": "x"}, {"channels": -1}, {"bands": 3}, {"scale": -1}])
def test_a_file_that_is_damaged_there_is_one_line(damage):
    with pytest.raises(InputError, match=r"^stage1\.pth: "):
        known_scaling(Scaling(), 2, TWO | damage, "stage1.pth")
