"""What other people's loops do with a model: copies, averages, whole files, exporters.

docs/python.md's snippets, for accelerate and Lightning too, are run in `test_readme.py`.
"""

import copy
import io

import pytest
import torch
from dense import FP32, assert_close, frozen, images, resnet, vit
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from lora_utils import LoRAManager, base_digests

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
def test_a_copy_is_a_model_of_its_own(build, side, four_bits):
    """It answers the same, and training it leaves the original as it was."""
    model, x = frozen(build(), use_qlora=four_bits).eval(), images(side)
    twin, answer, before = copy.deepcopy(model), model(x), lora_of(model)
    assert torch.equal(twin(x), answer)
    train_a_step(twin, x)
    assert not torch.equal(twin.eval()(x), answer) and torch.equal(model.eval()(x), answer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora_of(model).items())
    assert all(not torch.equal(tensor, before[name]) for name, tensor in lora_of(twin).items() if "lora_B" in name)


@MODELS
@STORED
def test_a_whole_model_can_be_saved(build, side, four_bits):
    """`torch.save(model)` keeps adapters, merged weights' bases, frozen statistics and 4-bit constants."""
    model, x, file = frozen(build(), use_qlora=four_bits), images(side), io.BytesIO()
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
    assert all(torch.equal(tensor, lora_of(model)[name]) for name, tensor in lora_of(loaded).items())


def moving_average(average: torch.Tensor, weight: torch.Tensor, steps: int) -> torch.Tensor:
    """As in docs/python.md: weights in 4 bits are bytes, of which there is no average."""
    return average.lerp(weight, 0.25) if weight.is_floating_point() else weight


@MODELS
@pytest.mark.parametrize(
    "four_bits, options",
    [
        (False, {"multi_avg_fn": get_ema_multi_avg_fn(0.75)}),
        (False, {"avg_fn": moving_average}),
        (True, {"avg_fn": moving_average}),
    ],
    ids=["PyTorch's", "float", "4 bits"],
)
def test_an_average_is_of_what_trains_alone(build, side, four_bits, options, tmp_path):
    """The base stays bit for bit, so the average is an adapter file like any other."""
    model, x = frozen(build(), use_qlora=four_bits), images(side)
    average = AveragedModel(model, **options)
    expected, base = None, base_digests(model)
    for _ in range(3):
        train_a_step(model, x)
        average.update_parameters(model)
        now = lora_of(model)  # the first is copied
        expected = now if expected is None else {n: 0.75 * t + 0.25 * now[n] for n, t in expected.items()}
    for name, tensor in lora_of(average.module).items():
        assert_close(tensor, expected[name], FP32, name)
    assert base_digests(average.module) == base
    LoRAManager(average.module).save_lora_checkpoint(tmp_path / "average.pth")
    answer = average.eval()(x)
    LoRAManager(model).load_lora_checkpoint(tmp_path / "average.pth")
    assert torch.equal(model.eval()(x), answer)


def test_what_sets_the_statistics_of_an_average_leaves_frozen_ones_alone():
    """`update_bn` resets those of every BatchNorm first; those of the head alone count the batches then."""
    model = resnet()
    model.fc = nn.Sequential(nn.Linear(model.fc.in_features, 5), nn.BatchNorm1d(5))
    average, x = AveragedModel(frozen(model)), images(count=8)
    base, answer = base_digests(average.module), average.eval()(x)
    update_bn([x, x], average)
    assert base_digests(average.module) == base
    features = average.module.fc[0].register_forward_hook(lambda _, inputs, output: seen.append(output))
    seen = []
    assert not torch.equal(average.eval()(x), answer)
    features.remove()
    torch.testing.assert_close(average.module.fc[1].running_mean, seen[0].mean(0))


def merge(model: nn.Module) -> None:
    LoRAManager(model).merge_lora_weights()


def unload(model: nn.Module) -> None:
    LoRAManager(model).unload(merge=True)


STATES = pytest.mark.parametrize(
    "build, side, four_bits, change",
    [(resnet, 32, True, None), (vit, 16, False, None), (vit, 16, True, merge), (resnet, 32, False, unload)],
    ids=["adapted resnet in 4 bits", "adapted vit", "merged vit in 4 bits", "unloaded resnet"],
)


@pytest.mark.slow
@STATES
def test_a_model_can_be_exported(build, side, four_bits, change):
    """For batches of any size."""
    model, x = frozen(build(), use_qlora=four_bits).eval(), images(side)
    answer = model(x)
    if change:
        change(model)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    assert_close(program(x), answer, FP32)
    assert_close(program(torch.cat([x] * 20)), torch.cat([answer] * 20), FP32)


def test_a_layer_can_be_exported():
    """The same of one convolution, in less time."""
    test_a_model_can_be_exported(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 8, False, None)


@STATES
def test_jit_traces_what_is_merged_and_refuses_adapters(build, side, four_bits, change):
    model, x = frozen(build(), use_qlora=four_bits).eval(), images(side)
    answer = model(x)
    if change:
        change(model)
    if any("lora_" in name for name in model.state_dict()):  # those of merged layers are not in it
        with pytest.raises(RuntimeError, match=r"use torch\.export, or LoRAManager"):
            torch.jit.trace(model, x)
        return
    program, file = torch.jit.trace(model, x), io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    assert_close(torch.jit.load(file)(torch.cat([x, x])), torch.cat([answer] * 2), FP32)
