"""Backbones are plain torchvision models with a head that can be named and bypassed."""

import pytest
import torch
import torchvision
from torch import nn

from toolkit.models.backbones import build_backbone, head_name, headless
from toolkit.models.names import ARCHS, default_image_size


@pytest.mark.parametrize(
    ("arch", "width"), [*zip(ARCHS, (512, 512, 2048, 2048, 192, 384, 768, 1024, 384, 768), strict=True)]
)
def test_maps_images_of_the_default_size_to_logits_and_features(arch, width):
    with torch.device("meta"):
        model = build_backbone(arch, num_classes=7)
        if hasattr(torchvision.models, arch):
            model.load_state_dict(getattr(torchvision.models, arch)(num_classes=7).state_dict())  # the same shapes
        images = torch.empty(2, 3, default_image_size(arch), default_image_size(arch))
        assert model(images).shape == (2, 7)
        assert headless(model)(images).shape == (2, width)


def test_features_leave_the_head_alone_and_carry_gradients():
    model = build_backbone("resnet18", 10)
    model.fc = nn.Sequential(nn.Linear(512, 64), nn.BatchNorm1d(64))  # a projector in training mode
    projector = model.fc
    headless(model)(torch.randn(2, 3, 32, 32)).sum().backward()
    assert model.fc is projector and projector[1].num_batches_tracked == 0
    assert model.conv1.weight.grad is not None and projector[0].weight.grad is None
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))  # without a head they are the output
    images = torch.randn(2, 3, 2, 2)
    assert head_name(model) is None and torch.equal(headless(model)(images), model(images))
