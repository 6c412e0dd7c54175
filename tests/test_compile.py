"""Adapted models under `torch.compile`, as in other people's loops: one graph, which computes the same."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck

from tests.dense import BF16, FP32, assert_close, frozen, images, resnet, vit

SLOW = [("vit", False), ("vit in 4 bits", True), ("resnet", False), ("resnet in 4 bits", False)]
LAYERS = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 8), nn.GELU(), nn.Linear(8, 4))
MODELS = {
    "layers": lambda: (frozen(nn.Sequential(*LAYERS)), images(8)),
    "vit": lambda: (frozen(vit()), images(16)),
    "vit in 4 bits": lambda: (frozen(vit(), use_qlora=True), images(16)),
    "resnet": lambda: (frozen(resnet(Bottleneck)), images()),
    "resnet in 4 bits": lambda: (frozen(resnet(), use_qlora=True), images()),
}


def step(network, model, x, low: bool) -> list[torch.Tensor]:
    """The output, and the gradients of what trains."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        y = network(x)
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(
    ("name", "low"), [("layers", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_model_is_one_graph_and_computes_the_same(name, low):
    """The compiled step comes first: what an eager one keeps for the next is not there yet."""
    model, x = MODELS[name]()
    network = torch.compile(model.train(), backend="aot_eager", fullgraph=True, dynamic=False)
    compiled = step(network, model, x, low)
    for own, wanted in zip(compiled, step(model, model, x, low), strict=True):
        assert_close(own, wanted, 5 * BF16 if low else 10 * FP32)
    torch._dynamo.reset()
