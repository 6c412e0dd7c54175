"""What other people's loops do with a model: copies, whole files, exporters.

docs/python.md's snippets, for accelerate, Lightning and moving averages too, are run in `test_readme.py`.
"""

import copy
import io

import pytest
import torch
from dense import FP32, assert_close, frozen, images, resnet, vit
from torch import nn

from lora_utils import LoRAManager
from tests.run_folders import assert_same

MODELS = pytest.mark.parametrize("build, side", [(resnet, 32), (vit, 16)], ids=["resnet", "vit"])
STORED = pytest.mark.parametrize("four_bits", [False, True], ids=["float", "4 bits"])


def train_a_step(model: nn.Module, x: torch.Tensor, rate: float = 1e-3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def lora_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if "lora_" in name}


@MODELS
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
    for one in (model, loaded):
        train_a_step(one, x)
    assert_same(lora_of(loaded), lora_of(model))


def merge(model: nn.Module) -> None:
    LoRAManager(model).merge_lora_weights()


def unload(model: nn.Module) -> None:
    LoRAManager(model).unload(merge=True)


@STORED
def test_jit_refuses_adapters(four_bits):
    model = frozen(vit(), use_qlora=four_bits).eval()
    with pytest.raises(RuntimeError, match=r"use torch\.export, or LoRAManager"):
        torch.jit.trace(model, images(16))


@pytest.mark.parametrize(
    "build, side, four_bits, change", [(vit, 16, True, merge), (resnet, 32, False, unload)], ids=["merged", "unloaded"]
)
def test_jit_traces_what_is_merged(build, side, four_bits, change):
    model = frozen(build(), use_qlora=four_bits).eval()
    x = images(side)
    file = io.BytesIO()
    answer = model(x)
    change(model)
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    assert_close(torch.jit.load(file)(torch.cat([x, x])), torch.cat([answer] * 2), FP32)
