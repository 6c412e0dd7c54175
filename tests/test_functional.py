"""lora/functional.py and below, where a comparison with the dense layer in tests/test_layers.py shows too little."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from dense import BF16, DEVICES, FP32, assert_close, compare_with_dense, count_operations, frozen, saved_storages
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from finetune_lora import LoRAConv2d, LoRALinear
from lora import backends, functional
from lora.functional import effective_weight, lora_conv2d, lora_linear, max_pool2d_relu
from lora.weights import NF4Weight, Weight, bitsandbytes_functional

SCALING = 1.7
random = torch.randn
OF_ROWS = [nn.GELU(), nn.GELU("tanh"), nn.LayerNorm(64), nn.LayerNorm(64, eps=0.1, elementwise_affine=False)]


@pytest.mark.filterwarnings("ignore:the last layer")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operation", OF_ROWS, ids=str)
@pytest.mark.parametrize(
    "dtype, autocast, x_dtype",
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),  # x in fewer bits than the LayerNorm's weight, and in more
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
)
def test_a_recomputed_operation_equals_the_dense_one(device, operation, dtype, autocast, x_dtype, monkeypatch):
    """Evaluated once in backward, whose gradient passes a LayerNorm a few rows at a time; x itself is what is kept.
    Inputs come permuted, as attention's do."""
    monkeypatch.setattr(functional, "PART_NUMEL", 1)
    stock = nn.Sequential(copy.deepcopy(operation), nn.Linear(64, 6)).to(device, dtype)
    for parameter in stock.parameters():
        nn.init.normal_(parameter)
    model = frozen(copy.deepcopy(stock), 0.3)
    x = (random(5, 7, 64, device=device) + 1).to(x_dtype)

    def compute(network: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        operation, linear = network
        if network is not model:
            return network(x.transpose(0, 1))
        return linear(x.transpose(0, 1), prologue=operation)

    compare_with_dense(stock, model, [x], FP32 if dtype == torch.float32 and not autocast else BF16, compute, autocast)
    x.requires_grad_()
    outputs = []
    with torch.autocast(device, torch.bfloat16, enabled=autocast is not None):
        saved = saved_storages(lambda: outputs.append(compute(model, x)))
    assert x.untyped_storage().data_ptr() in saved and sum(saved.values()) < 3 * x.nbytes
    assert count_operations(lambda: outputs[0].sum().backward(), "aten.gelu.", "aten.native_layer_norm.") == 1


LAYERS = {
    "side path": (LoRALinear(96, 80, r=2), (64, 96)),
    "merged": (LoRALinear(96, 80, r=2), (128, 96)),
    "convolution": (LoRAConv2d(16, 32, 3, padding=1, r=2), (4, 16, 8, 8)),
}


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("layer, size", LAYERS.values(), ids=LAYERS)
def test_backward_forms_no_dense_weight_gradient(layer, size, needs_grad):
    """Low-rank products alone, and one full product more where x needs a gradient. None where it does not."""
    layer.weight.requires_grad_(False)
    y = layer(random(*size, requires_grad=needs_grad))
    # The counter does not know oneDNN's product.
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        y.sum().backward()
    dense = 2 * y.numel() * layer.weight[0].numel()
    assert needs_grad * dense <= counter.get_total_flops() < (needs_grad + 0.3) * dense


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("by_onednn", [False, True], ids=["MKL", "oneDNN"])
@pytest.mark.parametrize("bias", [None, 1, 2], ids=["no bias", "bias", "every second number as bias"])
@pytest.mark.parametrize("shape", [(3, 6), (2, 4, 6), (0, 4, 6)])
def test_a_frozen_linear_layer_is_the_stock_one(monkeypatch, device, by_onednn, bias, shape):
    """Whichever product it takes: with and without a gradient of the input, under autocast, and for no input at all."""
    monkeypatch.setattr(backends, "PREFERS_ONEDNN_LINEAR", by_onednn)
    stock = nn.Linear(6, 5, bias=bias is not None, device=device)
    if bias is not None:
        stock.bias.data = torch.randn(5 * bias, device=device)[::bias]
    layer = copy.deepcopy(stock).requires_grad_(False)
    x = torch.randn(shape, device=device)

    def compute(network: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return functional.frozen_linear(x, Weight(layer.weight), layer.bias) if network is layer else network(x)

    compare_with_dense(stock, layer, [x], FP32, compute)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(compute(layer, x), layer(x))
        for low in (x, x.bfloat16()):  # what is not in bfloat16 yet, autocast rounds
            for weight in (layer.weight, layer.weight.bfloat16()):
                assert_close(functional.frozen_linear(low, Weight(weight), layer.bias), layer(low), BF16)


def test_channels_last_stays_channels_last():
    """Forward, the gradient and the kernel: one permuted copy costs more than the adapter."""
    x = random(2, 4, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    W = random(6, 4, 3, 3).to(memory_format=torch.channels_last)
    A, B = random(2, 36, requires_grad=True), random(6, 2, requires_grad=True)
    y = lora_conv2d(x, Weight(W), A, B)
    y.square().sum().backward()
    for t in (y, x.grad, effective_weight(W, A, B, SCALING)):
        assert t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


@pytest.mark.parametrize("four_bits", [False, True], ids=["float", "4 bits"])
def test_a_folded_scale_is_rounded_with_the_kernel_once(four_bits):
    """In bfloat16. Pixels of one channel each show the kernel in the output."""
    W, scale = random(32, 8, 1, 1), random(32)
    W = NF4Weight.quantize(W) if four_bits else Weight(W.bfloat16())
    dense = W.dense(torch.float32)
    x = torch.eye(8).bfloat16()[:, :, None, None].repeat(4, 1, 1, 1).requires_grad_()  # no less than the kernel
    y = lora_conv2d(x, W, random(2, 8), torch.zeros(32, 2), None, SCALING, row_scale=scale)[:8]
    kernel = (dense.flatten(1) * scale[:, None]).bfloat16()
    assert torch.equal(y.flatten(1), kernel.T)
    upstream = torch.eye(32).bfloat16()[:8, :, None, None]
    assert torch.equal(torch.autograd.grad(y, x, upstream)[0][:8].flatten(1), kernel[:8])


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_leak_rectifies_exactly_what_a_relu_does_but_for_nan_which_stays(dtype, added):
    """The gradient passes at every positive number, however small, and nowhere else; the leak adds to nothing. Without
    NaN a run that diverges would look sound."""
    leak = backends.LEAK
    values = torch.tensor([math.nan, -1e30, -3.0, -1e-25, -leak, 0.0, leak, 1e-25, 3.0, -1.0]).to(dtype)
    x = values.view(1, 1, 10, 1).expand(1, 16, 10, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    W, A, B = Weight(torch.eye(16)[:, :, None, None]), random(2, 16), torch.zeros(16, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = lora_conv2d(x, W, A, B, row_scale=torch.ones(16), residual=0 * x if added else None, relu=True)
        y.sum().backward()
    assert y[:, :, 0].isnan().all() and not y[:, :, 1:].isnan().any()
    assert torch.equal(x.grad[:, :, 1:], (x > 0)[:, :, 1:].to(x.grad.dtype))
    assert torch.equal(y[:, :, 2:] + 1e-7, x.detach()[:, :, 2:].relu() + 1e-7) and (y[:, :, 2:] > -1e-15).all()
    # Denormal numbers, as products with small gradients, would be a third of a ResNet-18's step on Intel's processors.
    assert torch.tensor(leak) * 1e-16 > torch.finfo(torch.float32).tiny


def test_small_updates_survive_rounding_on_average():
    """In bfloat16 an update of a thousandth is below the rounding of most weights, and shows in sums over many. It
    is built beside the scale of a BatchNorm or over float32 weights. A weight on the grid of bfloat16 would swallow it;
    so it is added to the output there. Pixels of 1 and -1 take the weight itself out of the output."""
    signs = torch.tensor([1.0, -1.0]).repeat(2048).view(1, -1, 1, 1)
    W = (1 + random(1, 2048, 1, 1).abs()).repeat_interleave(2, 1)
    A, B = 1e-3 * signs.flatten(1), torch.ones(1, 1)
    for weight in (W, W.bfloat16()):
        for scale in (None, torch.tensor([1.1])):
            y = lora_conv2d(signs.bfloat16(), Weight(weight), A, B, row_scale=scale)
            assert y.item() == pytest.approx(4.096 * (1 if scale is None else 1.1), rel=0.2)
    y = lora_linear(torch.ones(500, 2).bfloat16(), Weight(torch.tensor([[1.0, -1.0]]).bfloat16()), A[:, :2].abs(), B)
    assert_close(y, torch.full((500, 1), 2e-3), BF16)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layer", [LoRALinear(8, 16, r=3), LoRAConv2d(8, 16, 1, r=3)], ids=str)
def test_merging_rounds_once(layer, autocast):
    """In bfloat16 1 + 1/300 is 1: only in the adapter's precision do three such updates become visible."""
    layer.weight.data = torch.ones_like(layer.weight).bfloat16()
    nn.init.ones_(layer.lora_A)
    nn.init.constant_(layer.lora_B, 1 / 300 / layer.scaling)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(layer.effective_weight(), torch.full_like(layer.weight, 1.01))
        layer.weight.data = layer.weight.float()
        assert_close(layer.effective_weight(), torch.full_like(layer.weight, 1.01), 1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_4_bits_are_nf4_in_blocks_of_64_whose_numbers_in_16_bits_are_rounded_once(device):
    """By the flat scales, which are those of the nested ones, the second time from what is kept; no copy in between."""
    stored = NF4Weight.quantize(random(33, 40, device=device))  # the last block is not full
    assert (stored.state.quant_type, stored.state.blocksize, stored.state.nested) == ("nf4", 64, True)
    expected = bitsandbytes_functional().dequantize_4bit(stored.packed, stored.state).flatten()[: 33 * 40].view(33, 40)
    for _ in range(2):
        assert torch.equal(stored.dense(torch.float32), expected)
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(stored.dense(dtype), expected.to(dtype))
            assert count_operations(lambda dtype=dtype: stored.dense(dtype), "_to_copy") == 0
    assert stored[8:16].shape == (8, 40)
    assert torch.equal(stored[8:16].dense(torch.bfloat16), expected[8:16].bfloat16())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("options", [((3, 2), (1, 2), (1, 0)), (3, 2, 1, 2), (2, 2, 0, 1, True)], ids=str)
@pytest.mark.parametrize("shape", [(17, 14), (6, 14_000)], ids=str)
def test_pooling_and_rectifying_commute_to_the_bit(device, dtype, memory_format, options, shape):
    """Also in maps of more positions than 16 bits count, as in stems on images above 362 pixels."""
    x = torch.randn(2, 3, *shape, dtype=dtype, device=device).to(memory_format=memory_format)
    x[0, 0] = -1.0  # nothing positive in any window
    x[0, 1] = 1.0  # nothing but ties
    x[1, 2, 5, 5] = float("nan")
    ours, stock = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = max_pool2d_relu(ours, *options)
    expected = F.max_pool2d(F.relu(stock), *options)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    expected.backward(gradient)
    for own, wanted in ((y, expected), (ours.grad, stock.grad)):
        torch.testing.assert_close(own, wanted, rtol=0, atol=0, equal_nan=True)
        assert own.is_contiguous(memory_format=memory_format)


ONCE = [
    lambda x: lora_linear(x, Weight(random(6, 4)), random(2, 4), random(6, 2)),
    lambda x: lora_conv2d(x, Weight(random(6, 3, 2, 2)), random(2, 12), random(6, 2)),
    lambda x: max_pool2d_relu(x, 2, 2),
]


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("function", ONCE, ids=["linear", "convolution", "pooling"])
def test_a_graph_of_the_gradient_is_refused(function):
    """Also where the output's gradient is a constant, as that of a sum, and by whichever call the graph is wanted."""
    x = random(2, 3, 4, 4, requires_grad=True)
    for y in (function(x), function(x).square()):
        with pytest.raises(RuntimeError, match="leave out create_graph=True"):
            y.sum().backward(create_graph=True)
    for reentrant in (False, True):  # gradients are enabled while it computes once more, and no graph is wanted
        checkpoint(function, x, use_reentrant=reentrant).sum().backward()
