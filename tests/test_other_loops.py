"""What other people's loops do with a model: copies, averages, whole files, compilers, accelerate, Lightning.

Those marked slow (minutes of compiling) run with `python -m pytest -m slow`. docs/python.md's snippets are run in
`test_readme.py`.
"""

import copy
import io
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from dense import EXACT, FP32, assert_close, frozen, images, resnet, vit
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lora_utils import LoRAManager, base_digests, read_adapter_file

ROOT = Path(__file__).parents[1]
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


STATES = pytest.mark.parametrize(
    "change",
    [lambda manager: None, LoRAManager.merge_lora_weights, lambda manager: manager.unload(merge=True)],
    ids=["adapted", "merged", "unloaded"],
)


@MODELS
@STORED
@STATES
def test_a_model_can_be_exported(build, side, four_bits, change):
    """For batches of any size."""
    model, x = frozen(build(), use_qlora=four_bits).eval(), images(side)
    answer = model(x)
    change(LoRAManager(model))
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    assert_close(program(x), answer, FP32)
    assert_close(program(torch.cat([x] * 20)), torch.cat([answer] * 20), FP32)


@MODELS
@STORED
@STATES
def test_jit_traces_what_is_merged_and_refuses_adapters(build, side, four_bits, change):
    model, x = frozen(build(), use_qlora=four_bits).eval(), images(side)
    answer = model(x)
    change(LoRAManager(model))
    if any("lora_" in name for name in model.state_dict()):  # those of merged layers are not in it
        with pytest.raises(RuntimeError, match=r"use torch\.export, or trace what"):
            torch.jit.trace(model, x)
        return
    program, file = torch.jit.trace(model, x), io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    assert_close(torch.jit.load(file)(torch.cat([x, x])), torch.cat([answer] * 2), FP32)


@pytest.mark.slow
@MODELS
@STORED
@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
def test_inductor_compiles_training_steps(build, side, four_bits, low):
    """The compiler that `torch.compile` takes by itself: the same answers and gradients, to the noise of bf16."""
    model, x = frozen(build(), use_qlora=four_bits).train(), images(side)

    def results(one, low):
        one = copy.deepcopy(one)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            answer = one(x).float()
        answer.square().sum().backward()
        return torch.cat([t.flatten() for t in (answer, *(p.grad for p in one.parameters() if p.grad is not None))])

    exact, own, theirs = results(model, False), results(model, low), results(torch.compile(model), low)
    if low:
        assert (theirs - exact).norm() < 2 * (own - exact).norm()
    else:
        assert_close(theirs, own, FP32)


def test_accelerate_prepares_and_unwraps():
    """Prepared, accumulated and unwrapped, two halves of a batch are one step on the whole."""
    accelerate = pytest.importorskip("accelerate")
    model, x = frozen(vit()), images(16, 4)
    plain = copy.deepcopy(model)
    train_a_step(plain, x)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    for half in x.chunk(2):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared.train()(half).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    ours = lora_of(accelerator.unwrap_model(prepared))
    for name, tensor in lora_of(plain).items():
        assert_close(ours[name], tensor, FP32, name)


@pytest.mark.slow
def test_accelerate_trains_in_two_processes(tmp_path):
    """docs/python.md's snippet: both processes end with the same adapters, and the first one has saved them."""
    pytest.importorskip("accelerate")
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.MULTILINE | re.DOTALL)
    told = "print('lora:', sum(p.double().sum().item() for n, p in model.named_parameters() if 'lora_' in n))"
    (tmp_path / "train.py").write_text(next(code for code in snippets if "accelerate" in code) + told)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    printed = re.findall(r"lora: (\S+)", run(launch, env=environment).stdout)
    assert len(printed) == 2 and printed[0] == printed[1] != "0.0"
    tensors = read_adapter_file(tmp_path / "lora.pth")["tensors"]
    saved = sum(tensor.double().sum().item() for name, tensor in tensors.items() if "lora_" in name)
    assert abs(saved - float(printed[0])) < EXACT * max(1, abs(saved))
