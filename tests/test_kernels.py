"""The forms of lora/ that a GPU takes, computed on a CPU: against the dense computation, outputs and gradients.

`branches_of_a_gpu` sends tensors on a CPU where those on a GPU go, so that no line waits for a GPU to be tested.
"""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck

from benchmarks.operators import branches_of_a_gpu
from finetune_lora import add_lora_to_model
from lora import backends, functional, fusion, vit_block
from lora.adapted import is_adapted
from lora.fusion import scale_and_shift, set_gradient_checkpointing
from lora.nf4 import NF4Weight, bitsandbytes_functional
from tests.dense import (
    BF16,
    FP32,
    adapters,
    assert_close,
    assert_equals_dense,
    compare_with_dense,
    dense_twin,
    expected_gradients,
    frozen,
    images,
    randomize_adapters,
    relative_error,
    resnet,
    vit,
)


@pytest.fixture(autouse=True)
def as_on_a_gpu():
    torch.manual_seed(0)
    with branches_of_a_gpu():
        yield


MODELS = {
    "vit": lambda: (vit(), images(16)),
    "bottlenecks": lambda: (resnet(Bottleneck).to(memory_format=torch.channels_last), images()),
    "basic blocks": lambda: (resnet(), images()),  # channels first: no convolution is a product
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_the_dense_one(name):
    stock, x = MODELS[name]()
    assert_equals_dense(stock.double(), frozen(copy.deepcopy(stock).double()), x.double(), 1e-9)
    stock = stock.float()
    assert_equals_dense(stock, frozen(copy.deepcopy(stock)), x.float(), 1e-4)


LAYERS = {
    "linear": (lambda: nn.Linear(24, 20), (6, 5, 24)),
    "no bias": (lambda: nn.Linear(24, 20, bias=False), (6, 5, 24)),
    "attention": (lambda: nn.MultiheadAttention(16, 2, batch_first=True), (3, 5, 16)),
    "pointwise": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 6, 6)),
    "3x3": (lambda: nn.Conv2d(8, 12, 3, padding=1), (2, 8, 6, 6)),
    "stride": (lambda: nn.Conv2d(8, 12, 1, stride=2), (2, 8, 6, 6)),
    "groups": (lambda: nn.Conv2d(8, 12, 3, groups=2), (2, 8, 6, 6)),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_dense_one(name, autocast):
    make, shape = LAYERS[name]
    model = nn.Sequential(make()) if name != "attention" else nn.ModuleDict({"attention": make()})
    adapted = randomize_adapters(add_lora_to_model(copy.deepcopy(model), r=2))
    adapted.requires_grad_(False)
    for key, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in key)
    x = torch.randn(shape)
    x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    call = (lambda m, x: m["attention"](x, x, x, need_weights=False)[0]) if name == "attention" else (lambda m, x: m(x))
    compare_with_dense(model, adapted, [x], 5 * BF16 if autocast else FP32, call, autocast)


def low_precision_step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output in bf16, after backward of its sum of squares."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    return y


@pytest.mark.parametrize("four_bits", [False, True], ids=["float", "4 bits"])
@pytest.mark.parametrize("name", ["vit", "bottlenecks"])
def test_a_step_in_16_bits_is_as_near_the_dense_one_as_on_a_cpu(monkeypatch, name, four_bits):
    stock, x = MODELS[name]()
    model = frozen(copy.deepcopy(stock), use_qlora=four_bits).train()
    for path, layer in model.named_modules() if four_bits else ():
        for weight, *_ in adapters(layer):
            with torch.no_grad():
                stock.get_submodule(path).get_parameter(weight).copy_(layer.base(weight).dequantize(torch.float32))
    twin = dense_twin(stock, model).eval()
    expected = twin(x.double())
    expected.square().sum().backward()
    errors = []
    for on_gpu in (True, False):
        monkeypatch.setattr(backends, "counts_kernels", lambda x, on_gpu=on_gpu: on_gpu)
        assert_close(low_precision_step(model, x), expected, 5 * BF16)
        pairs = [(gradient, wanted) for _, gradient, wanted in expected_gradients(twin, model)]
        assert all(gradient.dtype == torch.float32 for gradient, _ in pairs)
        errors.append(sum(relative_error(*pair) for pair in pairs) / len(pairs))
    assert errors[0] < 2 * errors[1] < 0.3  # a ReLU or two change their mind in 16 bits


def test_factors_rounded_together_are_those_that_each_layer_would_round(monkeypatch):
    for model, x in ((vit(num_layers=3), images(16)), (resnet(), images())):
        model = frozen(model).train()
        steps = []
        for _ in range(2):
            y = low_precision_step(model, x)
            steps.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
            monkeypatch.setattr(fusion, "rounded_together", lambda *_: contextlib.nullcontext())
        monkeypatch.undo()
        assert all(torch.equal(one, other) for one, other in zip(*steps, strict=True))


def count_folded(monkeypatch) -> list:
    """A list that gets longer with every convolution that computes with a kernel folded beforehand."""
    calls, apply = [], functional._FoldedConv2d.apply
    monkeypatch.setattr(functional._FoldedConv2d, "apply", lambda *inputs: calls.append(1) or apply(*inputs))
    return calls


@pytest.mark.parametrize("four_bits", [False, True], ids=["float", "4 bits"])
@pytest.mark.parametrize("name", ["bottlenecks", "basic blocks"])
def test_kernels_folded_together_are_those_that_each_layer_would_fold(monkeypatch, name, four_bits):
    stock, x = MODELS[name]()
    model, calls, steps = frozen(stock, use_qlora=four_bits).train(), count_folded(monkeypatch), []
    for _ in range(2):
        y = low_precision_step(model, x)
        steps.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
        monkeypatch.setattr(fusion, "folded", lambda conv, norm: None)
    assert len(calls) == sum(is_adapted(m) for m in model.modules() if isinstance(m, nn.Conv2d))
    for one, other in zip(*steps, strict=True):
        assert_close(one, other, BF16)


UNFOLDED = {
    "a hook": lambda conv, norm: conv.register_forward_hook(lambda *_: None),
    "a BatchNorm that trains": lambda conv, norm: norm.weight.requires_grad_(),
    "an adapter that is off": lambda conv, norm: setattr(conv, "lora_enabled", False),
    "another BatchNorm": lambda conv, norm: setattr(norm, "frozen", False) or norm.train(),
}


@pytest.mark.parametrize("change", UNFOLDED)
def test_a_convolution_is_folded_only_while_it_is_what_it_was(monkeypatch, change):
    model, x = frozen(resnet()).train(), images()
    low_precision_step(model, x)
    calls = count_folded(monkeypatch)
    low_precision_step(model, x)
    everywhere = len(calls)
    UNFOLDED[change](model.layer2[0].conv1, model.layer2[0].bn1)
    low_precision_step(model, x)
    assert len(calls) == 2 * everywhere - 1


def test_folded_kernels_follow_their_batch_norms(monkeypatch):
    model, x = frozen(resnet()).train(), images()
    low_precision_step(model, x)
    with torch.no_grad():
        model.layer1[0].bn2.weight.mul_(2)
    changed = low_precision_step(model, x)
    monkeypatch.setattr(fusion, "folded", lambda conv, norm: None)
    assert_close(changed, low_precision_step(model, x), BF16)


def test_a_layer_that_took_no_part_gets_no_gradient():
    model, x = frozen(vit()).train(), images(16)
    model.encoder.layers[1].mlp[0].lora_enabled = False
    low_precision_step(model, x)
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == {f"encoder.layers.encoder_layer_1.mlp.0.lora_{factor}" for factor in "AB"}


@pytest.mark.parametrize("four_bits", [False, True], ids=["float", "4 bits"])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_block_in_two_operations_is_what_its_layers_compute_one_by_one(monkeypatch, on_gpu, four_bits):
    monkeypatch.setattr(backends, "counts_kernels", lambda x: on_gpu)
    model, x = frozen(vit(num_layers=3), use_qlora=four_bits).train(), images(16)
    calls, apply = [], vit_block._RestOfBlock.apply
    monkeypatch.setattr(vit_block._RestOfBlock, "apply", lambda *inputs: calls.append(1) or apply(*inputs))
    steps = []
    for _ in range(2):
        y = low_precision_step(model, x)
        steps.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
        monkeypatch.setattr(fusion.FusedEncoderBlock, "is_two_operations", lambda block: False)
    assert len(calls) == 3  # the last block, of the class token alone, as well
    for one, other in zip(*steps, strict=True):
        assert_close(one, other, 2 * BF16)


def test_the_two_operations_of_a_block_let_their_graph_be_kept():
    model, x = frozen(vit()).train(), images(16)
    loss, trained = model(x).square().sum(), [p for p in model.parameters() if p.requires_grad]
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in trained]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * gradient) for p, gradient in zip(trained, once, strict=True))


@pytest.mark.parametrize(
    "name, mode", [("vit", "selective"), ("vit", "full"), ("bottlenecks", "full"), ("basic blocks", "full")]
)
def test_checkpointing_computes_the_same(name, mode):
    stock, x = MODELS[name]()
    model = frozen(stock).train()
    expected = low_precision_step(model, x)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    set_gradient_checkpointing(model, mode)
    assert_close(low_precision_step(model, x), expected, BF16)
    for name, gradient in gradients.items():
        assert_close(model.get_parameter(name).grad, gradient, BF16, name)


CHANGES = {
    "another scale": lambda norm: nn.init.constant_(norm.weight, 3.0),
    "statistics in training": lambda norm: norm.train()(torch.randn(4, 3, 5, 5)),
    "a state that is loaded": lambda norm: norm.load_state_dict({**norm.state_dict(), "running_var": torch.ones(3)}),
    "another dtype and back": lambda norm: norm.half().float(),
    "another epsilon": lambda norm: setattr(norm, "eps", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_scale_and_shift_follow_what_they_are_made_of(change):
    norm = nn.BatchNorm2d(3).requires_grad_(False).eval()
    norm.running_var.uniform_(0.5, 2), norm.running_mean.normal_(), nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 4, 4)

    def computed():
        scale, shift = (t[:, None, None] for t in scale_and_shift(norm, None))
        return x * scale + shift

    known = scale_and_shift(norm, None)
    assert scale_and_shift(norm, None) is known  # as long as nothing changes
    assert_close(computed(), norm(x), FP32)
    with torch.no_grad():
        CHANGES[change](norm)
    norm.eval()
    assert scale_and_shift(norm, None) is not known
    assert_close(computed(), norm(x), FP32)
    with torch.inference_mode():
        scale_and_shift(norm, torch.ones(3))
    assert not any(t.is_inference() for t in scale_and_shift(norm, None))


def test_the_flat_scales_of_4_bits_are_those_of_the_nested_ones():
    functional = bitsandbytes_functional()
    weight = NF4Weight.quantize(torch.randn(48, 80))
    for _ in range(2):  # the second time from the scales that are kept
        dense = weight.dequantize(torch.float32)
        assert torch.equal(dense, functional.dequantize_4bit(weight.packed, weight.state).flatten().view(48, 80))
    assert torch.equal(weight[8:16].dequantize(torch.bfloat16), dense[8:16].bfloat16())
