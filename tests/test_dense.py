"""toolkit/models/dense.py: maps, the linear head over them, and windows, against plain computations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet18
from torchvision.models.vision_transformer import VisionTransformer

from finetune_lora import add_lora_to_model
from toolkit.models import dense
from toolkit.models.backbones import build_backbone
from toolkit.models.dense import DenseHead, DenseModel


def backbone(arch: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if arch == "resnet18":
        return resnet18(num_classes=4)
    return VisionTransformer(32, 8, num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=4)


@pytest.fixture(params=["resnet18", "vit"])
def model(request):
    return DenseModel(backbone(request.param), classes=5, image_size=32).double().eval()


def test_the_head_is_linear_in_the_features_of_all_maps():
    """The wide map that is never made gives the same logits."""
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4), torch.randn(2, 2, 2, 2)]
    head = DenseHead([3, 5, 2], 4)
    wide = torch.cat([F.interpolate(m, size=(8, 8), mode="bilinear") for m in maps], 1)
    expected = F.conv2d(wide, head.linear.weight[..., None, None], head.linear.bias)
    torch.testing.assert_close(head(maps), expected, rtol=1e-5, atol=1e-5)


def test_a_model_answers_for_every_pixel_and_keeps_the_backbones_keys(model):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert model(images).shape == (2, 5, 32, 32)
    kind = "resnet18" if "backbone.conv1.weight" in model.state_dict() else "vit"
    stock = {name for name in backbone(kind).state_dict() if not name.startswith(("fc.", "heads."))}
    assert {name.removeprefix("backbone.") for name in model.state_dict()} == stock | {
        "head.linear.weight",
        "head.linear.bias",
    }


def test_features_at_pixels_are_what_the_logits_are_linear_in(model):
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    rows, columns = torch.tensor([0, 3, 31, 17]), torch.tensor([0, 30, 31, 8])
    points = (torch.stack([columns, rows], 1) + 0.5) / 32
    with torch.no_grad():
        features = dense.features_at(dense.feature_maps(model.backbone, image), points.float())
        logits = features @ model.head.linear.weight.float().T + model.head.linear.bias.float()
        expected = model(image)[0][:, rows, columns].T
    torch.testing.assert_close(logits, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch, sides", [("timm:test_efficientnet", [16, 8, 4, 2, 1]), ("timm:test_vit", [10] * 4)])
def test_every_stage_of_a_network_of_timm_is_read_and_four_blocks_of_a_vit(arch, sides):
    """A network's first stage, at half the image's size, is where thin things such as membranes are seen."""
    size = 32 if len(sides) == 5 else 160
    model = DenseModel(build_backbone(arch, 5), classes=5, image_size=size).eval()
    maps = dense.feature_maps(model.backbone, torch.randn(1, 3, size, size))
    assert [features.shape[2] for features in maps] == sides
    assert model.head.widths == [features.shape[1] for features in maps]
    assert dense._read(model.backbone) == ([0, 1, 2, 3, 4] if len(sides) == 5 else [2, 3, 4, 5])  # of six blocks


@pytest.mark.parametrize("adapted", [False, True])
def test_a_resnet_is_read_from_its_first_layer_on(adapted):
    """As torchvision computes it; with adapters, which change nothing yet, through folded BatchNorms."""
    plain = backbone("resnet18").eval()
    model = copy.deepcopy(plain)
    if adapted:
        add_lora_to_model(model, r=2)
    images = torch.randn(2, 3, 64, 64)
    x = plain.relu(plain.bn1(plain.conv1(images)))
    expected = [x, plain.layer1(plain.maxpool(x))]
    for stage in (plain.layer2, plain.layer3, plain.layer4):
        expected.append(stage(expected[-1]))
    found = dense.feature_maps(model.eval(), images)
    assert [features.shape[2] for features in found] == [32, 16, 8, 4, 2]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_one_window_is_the_whole_image(model):
    image = torch.randn(3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        found = dense.answers_for(image, 32, model)
        torch.testing.assert_close(found, model(image[None])[0].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(70, 50), (32, 100), (20, 33), (9, 7)])
def test_windows_cover_an_image_of_any_size(height, width):
    """Answers that depend on the pixel alone are the same in windows, and each row comes once, from the top."""
    image = torch.randn(2, height, width)

    def answer(windows):
        return torch.cat([windows, windows.sum(1, keepdim=True)], 1)

    torch.testing.assert_close(dense.answers_for(image, 32, answer), answer(image[None])[0], rtol=1e-5, atol=1e-5)
    read = []

    def rows(first, last):
        read.append((first, last))
        return image[:, first:last]

    tops = [top for top, _ in dense.answers_by_rows(rows, height, width, 32, answer)]
    assert tops == sorted(set(tops)) and read[-1][1] == height and all(last - first <= 32 for first, last in read)


def test_windows_overlap_and_end_at_the_border():
    assert dense.window_starts(100, 32) == [0, 23, 45, 68]
    assert dense.window_starts(32, 32) == dense.window_starts(10, 32) == [0]
