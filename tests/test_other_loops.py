"""What other people's loops do with a model: copies, whole files, exporters, `torch.compile`.

docs/python.md's snippets, for accelerate, Lightning and moving averages too, are run in `test_readme.py`.
"""

import copy
import io

import pytest
import torch
from dense import BF16, FP32, assert_close, changed, frozen, images, resnet, snapshot, trained, vit
from torch import nn
from torchvision.models.resnet import Bottleneck

from lora_utils import LoRAManager
from tests.run_folders import assert_same

STORED = pytest.mark.parametrize("four_bits", [False, True], ids=["float", "4 bits"])


@pytest.mark.parametrize("build, side", [(resnet, 32), (vit, 16)], ids=["resnet", "vit"])
@STORED
def test_a_whole_model_can_be_saved(build, side, four_bits):
    """`torch.save(model)` keeps adapters, merged weights' bases, frozen statistics and 4-bit constants."""
    model = frozen(build(), use_qlora=four_bits)
    x = images(side)
    file = io.BytesIO()
    merged = copy.deepcopy(model).eval()
    LoRAManager(merged).merge_lora_weights()
    torch.save((model, merged), file)
    file.seek(0)
    loaded, loaded_merged = torch.load(file, weights_only=False)
    assert torch.equal(loaded.eval()(x), model.eval()(x)) and torch.equal(loaded_merged(x), merged(x))
    LoRAManager(loaded_merged).unmerge_lora_weights()
    assert torch.equal(loaded_merged(x), model(x))
    before = snapshot(model)
    for one in (model, loaded):
        one.train()(x).square().mean().backward()
        torch.optim.SGD(trained(one).values(), lr=1e-3).step()
    assert_same(trained(loaded), trained(model))
    assert changed(before, model)


@STORED
def test_jit_refuses_adapters(four_bits):
    model = frozen(vit(), use_qlora=four_bits).eval()
    with pytest.raises(RuntimeError, match=r"use torch\.export, or LoRAManager"):
        torch.jit.trace(model, images(16))


@pytest.mark.parametrize("build, side, four_bits", [(vit, 16, True), (resnet, 32, False)], ids=["merged", "unloaded"])
def test_jit_traces_what_is_merged(build, side, four_bits):
    model = frozen(build(), use_qlora=four_bits).eval()
    x = images(side)
    file = io.BytesIO()
    answer = model(x)
    if four_bits:
        LoRAManager(model).merge_lora_weights()
    else:
        LoRAManager(model).unload(merge=True)
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    assert_close(torch.jit.load(file)(torch.cat([x, x])), torch.cat([answer] * 2), FP32)


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
