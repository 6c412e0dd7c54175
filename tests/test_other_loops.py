"""What other people's loops do with a model: copies, whole files, exporters.

docs/python.md's snippets, for accelerate, Lightning and moving averages too, are run in `test_readme.py`.
"""

import copy
import io

import pytest
import torch
from dense import FP32, assert_close, changed, frozen, images, resnet, snapshot, trained, vit

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
