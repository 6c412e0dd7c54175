"""--compile: what is compiled is one graph, and a run with it is the run without it, to rounding."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck

from tests.dense import BF16, FP32, assert_close, frozen, images, resnet, vit
from tests.run_folders import assert_same_tensors, stop, tensors
from toolkit import InputError, devices
from toolkit.run import runs

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


SLOW = [("vit", False), ("vit", True), ("vit in 4 bits", True), ("resnet", False), ("resnet in 4 bits", False)]
MODELS = {
    "layers": lambda: (frozen(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))), torch.randn(6, 8)),
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
    "name, low", [("layers", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_model_is_one_graph_and_computes_the_same(monkeypatch, name, low):
    """The compiled step comes first: what an eager one keeps for the next is not there yet."""
    monkeypatch.setattr(devices, "COMPILER", "aot_eager")  # the graphs of both directions as they were traced
    model, x = MODELS[name]()
    compiled = step(devices.compiled(model.train(), CPU), model, x, low)
    for own, wanted in zip(compiled, step(model, model, x, low), strict=True):
        assert_close(own, wanted, 5 * BF16 if low else 10 * FP32)


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_one_and_can_be_resumed(monkeypatch, finetune):
    """The last batch of an epoch is smaller, and adapters start at the gradient, in eager mode."""
    monkeypatch.setattr(devices, "COMPILER", "eager")
    networks, compiled = [], devices.compiled
    monkeypatch.setattr(devices, "compiled", lambda *a: networks.append(compiled(*a)) or networks[-1])
    eager = finetune(output="eager")
    assert not networks
    whole = finetune("--compile", "whole")
    assert len(networks) == 1 and isinstance(networks[0], torch._dynamo.OptimizedModule)
    ours, theirs = (tensors(results["folder"] / "lora.pth") for results in (whole, eager))
    for name, tensor in ours.items():
        assert_close(tensor, theirs[name], 0.01, name)

    with pytest.raises(runs.Stopped):
        finetune("--compile", "parts", after_epoch=stop)
    resumed = finetune("--compile --resume", "parts")
    assert_same_tensors(resumed["folder"] / "lora.pth", whole["folder"] / "lora.pth")


def test_without_a_compiler_one_line_says_what_is_missing(monkeypatch, finetune, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(InputError, match=r"--compile on a CPU needs a C\+\+ compiler"):
        finetune("--compile")
    assert not list((tmp_path / "out").glob("*.pth"))
    with pytest.raises(InputError, match="not mps"):
        devices.compiled(torch.nn.Linear(2, 2), torch.device("mps"))


@pytest.mark.parametrize("accumulation, mode", [(1, "reduce-overhead"), (2, "default")])
def test_cuda_graphs_are_captured_where_no_gradient_is_overwritten(monkeypatch, accumulation, mode):
    asked = {}
    monkeypatch.setattr(torch, "compile", lambda network, **options: asked.update(options) or network)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: name)
    devices.compiled(torch.nn.Linear(2, 2), torch.device("cuda"), accumulation)
    assert asked["mode"] == mode and asked["fullgraph"]
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs Triton"):
        devices.compiled(torch.nn.Linear(2, 2), torch.device("cuda"))
