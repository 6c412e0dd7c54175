"""Networks drawn at random, in `torch.inference_mode()` and with hooks, against the dense stock computation."""

import copy
import random

import pytest
import torch
from dense import EXACT, assert_close, dense_twin, expected_gradients, frozen, watch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import EncoderBlock

from lora.fusion import set_gradient_checkpointing
from lora_utils import LoRAManager

EXAMPLES = 12  # of each kind of network


class Attention(nn.Module):
    """Attention to the input or, if it `crosses`, to another one."""

    def __init__(self, crosses: bool, need_weights: bool, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)
        self.crosses = crosses
        self.need_weights = need_weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = x.roll(1, 0) if self.crosses else x
        return self.attention(x, key, key, need_weights=self.need_weights)[0]


def attention(draw: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    options = {"batch_first": draw.random() < 0.3, "bias": draw.random() < 0.7}
    model = Attention(draw.random() < 0.3, draw.random() < 0.3, **options)
    return model, draw.choice([(3, 8), (3, 2, 8)])


def resnet_block(draw: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    kind = draw.choice([BasicBlock, Bottleneck])
    width = 4 * kind.expansion
    stride = draw.choice([1, 2])
    downsample = None
    if stride == 2 or draw.random() < 0.5:
        downsample = nn.Sequential(nn.Conv2d(width, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    return kind(width, 4, stride, downsample), (2, width, 7, 6)


def vit_block(draw: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    return EncoderBlock(2, 8, 12, 0.0, 0.0), (2, 5, 8)


NETWORKS = [attention, resnet_block, vit_block]


def draw_model(network, draw: random.Random) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A stock network in float64, the same network with adapters, and an input."""
    block, shape = network(draw)
    stock = nn.Sequential(block).double()
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model = frozen(copy.deepcopy(stock), target_modules=".*")
    if network is vit_block:
        set_gradient_checkpointing(model, draw.choice(["none", "full"]))
    return stock, model.train(draw.random() < 0.5), torch.randn(shape, dtype=torch.float64)


def hook_some(models: list[nn.Module], draw: random.Random) -> list[list]:
    """Watch the same modules of each model, any that the stock network calls. Returns what each model's hooks see."""
    names = [name for name, module in models[0].named_modules() if not name.endswith("out_proj")]
    chosen = [name for name in names if draw.random() < 0.3]
    seen = [[] for _ in models]
    for model, records in zip(models, seen, strict=True):
        for name in chosen:
            watch(model.get_submodule(name), records)
    return seen


def assert_same(model: nn.Module, twin: nn.Module, x: torch.Tensor, seen: list[list]) -> None:
    assert_close(model(x.clone()), twin(x.clone()), EXACT)
    ours, theirs = seen
    assert len(ours) == len(theirs)
    for mine, wanted in zip(ours, theirs, strict=True):
        for name, y, z in zip(("input", "output"), mine, wanted, strict=True):
            assert_close(y, z, EXACT, name)
    ours.clear()
    theirs.clear()


@pytest.mark.parametrize("example", range(EXAMPLES))
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_in_inference_mode(network, example):
    """Made inside or outside of it, with hooks on some modules; outside it then trains, and merges inside."""
    torch.manual_seed(example)
    draw = random.Random(example)
    made_inside = example % 2 == 0
    with torch.inference_mode(made_inside):
        stock, model, x = draw_model(network, draw)
        twin = dense_twin(stock, model).eval()
        seen = hook_some([model, twin], draw)
    with torch.inference_mode():
        assert_same(model, twin, x, seen)
    if not made_inside:
        assert_same(model, twin, x, seen)
        upstream = torch.randn_like(twin(x))
        for each in (model, twin):
            each.zero_grad()
            each(x.clone()).backward(upstream)
        for name, gradient, wanted in expected_gradients(twin, model):
            assert_close(gradient, wanted, EXACT, name)
    for records in seen:
        records.clear()
    with torch.inference_mode():
        LoRAManager(model).merge_lora_weights()
        assert_same(model, twin, x, seen)
        LoRAManager(model).unmerge_lora_weights()
        assert_same(model, twin, x, seen)
