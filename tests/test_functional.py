"""lora/functional.py and below: every gradient by finite differences, every path against dense stock operations."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from dense import BF16, DEVICES, EXACT, FP32, Operations, assert_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora import attention, backends, functional
from lora.attention import append_keys, attend, attention_mask, once_each, to_batch_first
from lora.functional import (
    PLAIN,
    Geometry,
    effective_kernel,
    effective_weight,
    lora_conv2d,
    lora_linear,
    max_pool2d_relu,
    merged_weight,
    pad_for_conv2d,
)
from lora.nf4 import NF4Weight, bitsandbytes_functional

SCALING = 1.7


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["merged", "side path"])
def path(request, monkeypatch):
    """Both ways to y and gx, whatever the sizes."""
    monkeypatch.setattr(functional, "_merge_pays", lambda *sizes: request.param == "merged")


def random(*shape: int, **kwargs) -> torch.Tensor:
    return torch.randn(*shape, **kwargs)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def gradcheck(function, *tensors) -> bool:
    """Finite differences against backward, in random directions; every direction is a thousand times slower."""
    return torch.autograd.gradcheck(function, tensors, fast_mode=True)


# -------------------------------------------------------------------------------------------------------------- linear


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4)], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_linear_gradients(path, shape, groups):
    W = torch.randn(6, 4, dtype=torch.float64)

    def function(x, A, B, bias):
        return lora_linear(x, W, A, B, bias, SCALING, groups)

    assert gradcheck(function, double(*shape), double(2 * groups, 4), double(6, 2), double(6))


@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_linear_gradients_with_dropout(groups, shape):
    """x after dropout is an input of its own: the adapter's share of the gradient goes there."""
    W = torch.randn(6, 4, dtype=torch.float64)

    def function(x, dropped, A, B):
        return lora_linear(x, W, A, B, None, SCALING, groups, adapter_x=dropped)

    assert gradcheck(function, double(*shape), double(*shape), double(2 * groups, 4), double(6, 2))
    x, dropped, A, B = double(*shape), double(*shape), double(2 * groups, 4), double(6, 2)
    delta = torch.cat([b @ a for b, a in zip(B.chunk(groups), A.chunk(groups), strict=True)])
    assert_close(function(x, dropped, A, B), x @ W.T + SCALING * dropped @ delta.T, EXACT)


def row_operations(width: int):
    affine = nn.LayerNorm(width).double().requires_grad_(False)
    nn.init.normal_(affine.weight), nn.init.normal_(affine.bias)
    plain = nn.LayerNorm(width, eps=0.1, elementwise_affine=False)
    return {"gelu": nn.GELU(), "tanh": nn.GELU("tanh"), "layer norm": affine, "plain": plain}.items()


@pytest.mark.parametrize("prologue", [pytest.param(operation, id=name) for name, operation in row_operations(4)])
@pytest.mark.parametrize("part", [1, functional.PART_NUMEL], ids=["row by row", "at once"])
def test_linear_gradients_through_a_recomputed_operation(path, prologue, part, monkeypatch):
    monkeypatch.setattr(functional, "PART_NUMEL", part)
    W = torch.randn(6, 4, dtype=torch.float64)

    def function(x, A, B):
        return lora_linear(x, W, A, B, None, SCALING, prologue=prologue)

    assert gradcheck(function, double(2, 3, 4), double(2, 4), double(6, 2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name, prologue", row_operations(64))
@pytest.mark.parametrize("dtype, autocast", [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize("x_dtype", [None, torch.bfloat16], ids=["", "low x"])
def test_a_recomputed_operation_equals_the_dense_computation(device, name, prologue, dtype, autocast, x_dtype):
    """In every precision, with x in a lower one than the LayerNorm's weight as well, and evaluated once in backward."""
    prologue = copy.deepcopy(prologue).to(device, dtype)
    x = (random(7, 5, 64, device=device) + 1).to(x_dtype or dtype).requires_grad_()
    W = random(6, 64, device=device, dtype=dtype)
    A, B = (random(*shape, device=device, requires_grad=True) for shape in ((2, 64), (6, 2)))
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        y = lora_linear(x.to(dtype) if not autocast else x, W, A, B, None, SCALING, prologue=prologue)
    upstream = torch.randn_like(y)
    with Operations() as evaluations:
        y.backward(upstream)
    assert evaluations.count("aten.gelu.", "aten.native_layer_norm.") == 1
    theirs = [t.detach().double().requires_grad_() for t in (x, A, B)]
    prologue.double()
    expected = F.linear(prologue(theirs[0]), W.double() + SCALING * theirs[2] @ theirs[1])
    expected.backward(upstream.double())
    tolerance = FP32 if y.dtype == x.dtype == torch.float32 else BF16
    assert_close(y, expected, tolerance, "output")
    for letter, ours, wanted in zip("xAB", (x, A, B), theirs, strict=True):
        assert_close(ours.grad, wanted.grad, tolerance, letter)
        assert ours.grad.dtype == ours.dtype


def test_a_layer_norm_in_fewer_bits_than_its_input():
    """As under autocast in a model that is in bfloat16."""
    norm = nn.LayerNorm(64).bfloat16().requires_grad_(False)
    x, W = random(7, 64, requires_grad=True), random(6, 64).bfloat16()
    A, B = random(2, 64, requires_grad=True), random(6, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, W, A, B, None, SCALING, prologue=norm)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    theirs = [t.detach().double().requires_grad_() for t in (x, A, B)]
    expected = F.linear(norm.double()(theirs[0]), W.double() + SCALING * theirs[2] @ theirs[1])
    expected.backward(upstream.double())
    assert_close(y, expected, BF16)
    for ours, wanted in zip((x, A, B), theirs, strict=True):
        assert_close(ours.grad, wanted.grad, BF16)
        assert ours.grad.dtype == torch.float32


def test_dropout_and_a_recomputed_operation_exclude_each_other():
    x = random(3, 4)
    with pytest.raises(ValueError, match="exclude each other"):
        lora_linear(x, random(6, 4), random(2, 4), random(6, 2), adapter_x=x, prologue=nn.GELU())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype, autocast", [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_linear_equals_the_dense_computation(device, rows, groups, dtype, autocast):
    """5 rows are fewer than 24 features, 300 are more: `_merge_pays` answers differently."""
    fan_in, fan_out, r = 24, 36, 4
    x = random(rows, fan_in, device=device, dtype=dtype, requires_grad=True)
    W, bias = random(fan_out, fan_in, device=device, dtype=dtype), random(fan_out, device=device, dtype=dtype)
    A = random(groups * r, fan_in, device=device, requires_grad=True)
    B = random(fan_out, r, device=device, requires_grad=True)
    bias.requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        y = lora_linear(x, W, A, B, bias, SCALING, groups)
    assert y.dtype == (torch.bfloat16 if autocast else dtype)
    upstream = random(rows, fan_out, device=device).to(y.dtype)
    y.backward(upstream)

    ours = (x, A, B, bias)
    theirs = tuple(t.detach().double().requires_grad_() for t in ours)
    x64, A64, B64, bias64 = theirs
    deltas = [b @ a for b, a in zip(B64.chunk(groups), A64.chunk(groups), strict=True)]
    expected = F.linear(x64, W.double() + SCALING * torch.cat(deltas), bias64)
    expected.backward(upstream.double())
    tolerance = FP32 if y.dtype == torch.float32 else BF16
    assert_close(y, expected, tolerance, "output")
    for name, actual, wanted in zip(("x", "A", "B", "bias"), ours, theirs, strict=True):
        assert_close(actual.grad, wanted.grad, tolerance, name)
        assert actual.grad.dtype == actual.dtype  # the masters' gradients are float32


def test_the_sizes_above_lie_on_both_sides():
    W = random(36, 24)
    assert functional._merge_pays(W, 300 * 36) and not functional._merge_pays(W, 5 * 36)
    assert not functional._merge_pays(W.bfloat16(), 300 * 36)  # see the next test


def test_a_small_update_survives_low_precision():
    """1 + 1/1000 is no bfloat16. The update shows in the output all the same, where it is not hidden by W x."""
    W = torch.tensor([[1.0, -1.0]]).repeat(3, 1).bfloat16()
    A, B = torch.tensor([[1.0, 0.0]]), torch.full((3, 1), 1e-3)
    y = lora_linear(torch.ones(500, 2).bfloat16(), W, A, B)
    assert_close(y, torch.full((500, 3), 1e-3), BF16)


def test_autocast_leaves_float64_alone():
    """As PyTorch's own layers do."""
    x, W, A, B = double(2, 4, 3, 3), torch.randn(6, 4, dtype=torch.float64), double(2, 4), double(6, 2)
    with torch.autocast("cpu", torch.bfloat16):
        linear = lora_linear(x.mT, W[:, :3], A[:, :3], B, None, SCALING)
        convolution = lora_conv2d(x, W[:, :, None, None], A, B, None, SCALING)
    effective = W + SCALING * B @ A
    assert_close(linear, x.mT @ (W[:, :3] + SCALING * B @ A[:, :3]).T, EXACT)
    assert_close(convolution, torch.einsum("oi,nihw->nohw", effective, x), EXACT)
    assert linear.dtype == convolution.dtype == torch.float64


def test_gradients_that_come_expanded_and_inputs_that_come_permuted(path):
    """The gradient of a sum has stride 0, attention's inputs are transposed: neither is a plain buffer."""
    x, W, A, B = random(5, 7, 4).transpose(0, 1).requires_grad_(), random(6, 4), random(2, 4), random(6, 2)
    lora_linear(x, W, A, B, None, SCALING).sum().backward()
    assert_close(x.grad, (W + SCALING * B @ A).sum(0).expand(7, 5, 4), FP32)


def test_the_weight_s_gradient_is_dense_where_it_trains(path):
    """Two-stage and full fine-tuning."""
    for dropped in (False, True):
        x, W, A, B = random(5, 4), random(6, 4), random(6, 4), random(6, 2)
        for t in (x, W, A, B):
            t.requires_grad_()
        low = F.dropout(x, 0.5) if dropped else x
        delta = torch.cat([b @ a for b, a in zip(B.chunk(3), A.chunk(3), strict=True)])
        upstream = random(5, 6)
        y = lora_linear(x, W, A, B, None, SCALING, groups=3, adapter_x=low if dropped else None)
        expected = x @ W.T + SCALING * low @ delta.T
        assert_close(y, expected, FP32)
        actual = torch.autograd.grad(y, (x, W, A, B), upstream, retain_graph=True)
        for gradient, wanted in zip(actual, torch.autograd.grad(expected, (x, W, A, B), upstream), strict=True):
            assert_close(gradient, wanted, FP32)


def saved_bytes(function) -> dict[tuple, int]:
    """What a forward keeps for backward: bytes by storage, so that views and one tensor saved twice count once."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return saved


def test_only_the_input_and_what_is_thin_is_saved(path):
    x, W, A, B = random(50, 24, requires_grad=True), random(36, 24), random(4, 24), random(36, 4)
    A.requires_grad_(), B.requires_grad_()
    saved = saved_bytes(lambda: lora_linear(x, W, A, B, None, SCALING))
    assert set(saved) >= {t.untyped_storage().data_ptr() for t in (x, A, B)}
    thin = 50 * 4  # h = x A^T, which the side path keeps
    assert sum(saved.values()) - (x.numel() + A.numel() + B.numel()) * 4 in (0, thin * 4)
    with torch.autocast("cpu", torch.bfloat16):  # at half the size under autocast
        saved = saved_bytes(lambda: lora_linear(x, W, A, B, None, SCALING))
    assert sum(saved.values()) - (x.numel() + A.numel() + B.numel()) * 2 in (0, thin * 2)


def test_a_recomputed_operation_saves_its_input_not_its_output():
    x, W, A, B = random(50, 24, requires_grad=True), random(36, 24), random(4, 24), random(36, 4)
    A.requires_grad_(), B.requires_grad_()
    for autocast in (False, True):  # x as it is, on which the operation is exact, in either case
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            saved = saved_bytes(lambda: lora_linear(x, W, A, B, None, SCALING, prologue=nn.GELU()))
        assert x.untyped_storage().data_ptr() in saved
        assert sum(saved.values()) < 1.5 * x.numel() * 4


def flops(function) -> int:
    # The counter does not know oneDNN's product.
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_backward_forms_no_dense_weight_gradient(path):
    """Low-rank products alone, and one full product more where x needs a gradient. None where it does not."""
    n, fan_in, fan_out, r = 64, 96, 80, 2
    dense = 2 * n * fan_in * fan_out
    for needs_grad in (False, True):
        x = random(n, fan_in, requires_grad=needs_grad)
        W, A, B = random(fan_out, fan_in), random(r, fan_in, requires_grad=True), random(fan_out, r, requires_grad=True)
        y = lora_linear(x, W, A, B, None, SCALING)
        work = flops(lambda y=y: y.sum().backward())
        assert needs_grad * dense <= work < (needs_grad + 0.25) * dense


# --------------------------------------------------------------------------------------------------------- convolution

GEOMETRIES = {
    "1x1": ((6, 4, 1, 1), Geometry()),
    "1x1 stride 2": ((6, 4, 1, 1), Geometry((2, 2))),
    "1x1 padding": ((6, 4, 1, 1), Geometry((1, 1), (1, 1))),
    "3x3 same": ((6, 4, 3, 3), Geometry((1, 1), (1, 1))),
    "3x2 stride dilation": ((6, 4, 3, 2), Geometry((2, 1), (1, 0), (1, 2))),
    "groups": ((6, 2, 3, 3), Geometry((2, 2), (1, 1), (1, 1), 2)),
    "depthwise": ((4, 1, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 4)),
}


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
def memory_format(request):
    return request.param


@pytest.mark.parametrize("scaled", [False, True], ids=["", "folded BatchNorm"])
@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution_gradients(geometry, dropped, scaled, memory_format):
    shape, geometry = GEOMETRIES[geometry]
    W = torch.randn(*shape, dtype=torch.float64).contiguous(memory_format=memory_format)
    row_scale = torch.randn(shape[0], dtype=torch.float64) if scaled else None
    fan_in = W[0].numel()
    x, low = (torch.randn(2, 4, 5, 5, dtype=torch.float64).contiguous(memory_format=memory_format) for _ in range(2))

    def function(x, A, B, bias, low=None):
        return lora_conv2d(x, W, A, B, bias, SCALING, geometry, row_scale, low)

    inputs = [x.requires_grad_(), double(2, fan_in), double(shape[0], 2), double(shape[0])]
    assert gradcheck(function, *inputs, *([low.requires_grad_()] if dropped else []))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_folded_scale_multiplies_kernel_and_update(geometry, memory_format):
    shape, geometry = GEOMETRIES[geometry]
    W, x = (t.contiguous(memory_format=memory_format) for t in (random(*shape), random(2, 4, 5, 5)))
    A, B, bias, scale = random(2, W[0].numel()), random(shape[0], 2), random(shape[0]), random(shape[0])
    dense = W + SCALING * (B @ A).view(shape)
    expected = F.conv2d(x, dense, None, *geometry) * scale[:, None, None] + bias[:, None, None]
    assert_close(lora_conv2d(x, W, A, B, bias, SCALING, geometry, scale), expected, FP32)
    y = lora_conv2d(x.bfloat16(), W.bfloat16(), A, B, bias.bfloat16(), SCALING, geometry, scale)
    assert_close(y, expected, BF16)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_trained_kernel_gets_its_dense_gradient(geometry):
    shape, geometry = GEOMETRIES[geometry]
    tensors = random(2, 4, 5, 5), random(*shape), random(2, random(*shape)[0].numel()), random(shape[0], 2)
    x, W, A, B = (t.requires_grad_() for t in tensors)
    for dropped in (None, F.dropout(x, 0.5)):
        y = lora_conv2d(x, W, A, B, None, SCALING, geometry, None, dropped)
        delta = SCALING * (B @ A).view(shape)
        low = x if dropped is None else dropped
        expected = F.conv2d(x, W, None, *geometry) + F.conv2d(low, delta, None, *geometry)
        assert_close(y, expected, FP32)
        upstream = torch.randn_like(y)
        actual = torch.autograd.grad(y, tensors, upstream, retain_graph=True)
        for gradient, wanted in zip(actual, torch.autograd.grad(expected, tensors, upstream, True), strict=True):
            assert_close(gradient, wanted, FP32)


def test_channels_last_stays_channels_last():
    """Forward, the gradient and the kernel: one permuted copy costs more than the adapter."""
    x, W = (t.contiguous(memory_format=torch.channels_last) for t in (random(2, 4, 5, 5), random(6, 4, 3, 3)))
    A, B = random(2, 36, requires_grad=True), random(6, 2, requires_grad=True)
    assert effective_kernel(W, A, B, SCALING).is_contiguous(memory_format=torch.channels_last)
    y = lora_conv2d(x.requires_grad_(), W, A, B)
    y.square().sum().backward()
    for t in (y, x.grad):
        assert t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def test_convolution_backward_forms_no_dense_kernel_gradient():
    A, B = random(2, 16 * 9, requires_grad=True), random(32, 2, requires_grad=True)
    geometry = Geometry((1, 1), (1, 1))
    dense = 2 * 4 * 8 * 8 * 32 * 16 * 9
    for needs_grad in (False, True):
        x = random(4, 16, 8, 8, requires_grad=needs_grad)
        y = lora_conv2d(x, random(32, 16, 3, 3), A, B, None, SCALING, geometry)
        work = flops(lambda y=y: y.sum().backward())
        assert needs_grad * dense <= work < (needs_grad + 0.3) * dense


@pytest.mark.parametrize("four_bits", [False, True], ids=["float", "4 bits"])
def test_a_folded_scale_is_rounded_with_the_kernel_once(four_bits):
    """In bfloat16. Pixels of one channel each show the kernel in the output."""
    W, scale = random(32, 8, 1, 1), random(32)
    W = NF4Weight.quantize(W) if four_bits else W.bfloat16()
    dense = W.dequantize(torch.float32) if four_bits else W.float()
    x = torch.eye(8).bfloat16()[:, :, None, None].requires_grad_()
    y = lora_conv2d(x, W, random(2, 8), torch.zeros(32, 2), None, SCALING, row_scale=scale)
    kernel = (dense.flatten(1) * scale[:, None]).bfloat16()
    assert torch.equal(y.flatten(1), kernel.T)
    upstream = torch.eye(32).bfloat16()[:8, :, None, None]
    assert torch.equal(torch.autograd.grad(y, x, upstream)[0].flatten(1), kernel[:8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folded_scale_beside_a_trained_kernel(dtype):
    W, A, B, scale = random(6, 4, 3, 3), random(2, 36), random(6, 2), random(6)
    tensors = [t.requires_grad_() for t in (random(2, 4, 5, 5).to(dtype), W.to(dtype), A, B)]
    theirs = [t.detach().double().requires_grad_() for t in tensors]
    for dropped in (False, True):
        x = theirs[0]
        y = lora_conv2d(*tensors, None, SCALING, PLAIN, scale, tensors[0] * 2 if dropped else None)
        delta = SCALING * (theirs[3] @ theirs[2]).view(W.shape)
        expected = F.conv2d(x, theirs[1]) + F.conv2d(x * 2 if dropped else x, delta)
        expected = expected * scale.double()[:, None, None]
        assert_close(y, expected, FP32 if dtype == torch.float32 else BF16)
        upstream = random(*y.shape)
        actual = torch.autograd.grad(y, tensors, upstream.to(dtype))
        wanted = torch.autograd.grad(expected, theirs, upstream.to(dtype).double())
        for gradient, want in zip(actual, wanted, strict=True):
            assert_close(gradient, want, FP32 if dtype == torch.float32 else 2 * BF16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype, autocast", [(torch.float64, False), (torch.float32, False), (torch.float32, True)])
@pytest.mark.parametrize("added, relu", [(True, True), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("four_bits", [False, True], ids=["float", "4 bits"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_addition_and_relu_behind_a_convolution(
    device, channels_last, dtype, autocast, added, relu, dropped, four_bits, kernel
):
    """Inside oneDNN where that is there, and in every other way."""
    if four_bits and dtype == torch.float64:
        pytest.skip("float64 has no 4-bit form")
    layout = {"memory_format": torch.channels_last if channels_last else torch.contiguous_format}
    x, residual = (random(2, width, 6, 6, device=device, dtype=dtype).contiguous(**layout) for width in (4, 8))
    W, scale = random(8, 4, kernel, kernel, device=device, dtype=dtype), random(8, device=device, dtype=dtype) + 2
    A, B, bias = (random(*shape, device=device, dtype=dtype) for shape in ((2, 4 * kernel**2), (8, 2), (8, 2)))
    bias = bias[:, 0]  # not contiguous
    tensors = [t.requires_grad_() for t in (x, A, B, bias, residual)]
    stored = NF4Weight.quantize(W) if four_bits else W
    dense = stored.dequantize(torch.float32).double() if four_bits else W.double()
    geometry = Geometry((1, 1), (kernel // 2,) * 2)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        low, other = x * 2 if dropped else None, residual if added else None
        other = other.bfloat16() if autocast and added else other
        y = lora_conv2d(x, stored, A, B, bias, SCALING, geometry, scale, low, other, relu)
    theirs = x64, A64, B64, bias64, residual64 = [t.detach().double().requires_grad_() for t in tensors]
    delta = SCALING * (B64 @ A64).view(W.shape) * scale.double().view(-1, 1, 1, 1)
    expected = F.conv2d(x64, dense * scale.double().view(-1, 1, 1, 1), bias64, padding=kernel // 2)
    expected = expected + F.conv2d(x64 * 2 if dropped else x64, delta, padding=kernel // 2)
    expected = expected + residual64 if added else expected
    tolerance = {"float64": 1e-9}.get(str(dtype)[6:], 2e-2 if autocast else FP32)
    assert_close(y, expected.relu() if relu else expected, tolerance)
    upstream = random(*y.shape, device=device, dtype=y.dtype) if dtype != torch.float64 else torch.randn_like(y)
    y.backward(upstream)
    # Where an output is near zero, rounding decides whether it is positive: the same outputs are rectified here.
    expected.backward(upstream.double() * (y > 0) if relu else upstream.double())
    for name, ours, wanted in zip(("x", "A", "B", "bias", "residual"), tensors, theirs, strict=True):
        assert_close(ours.grad, wanted.grad, tolerance, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("added", [False, True])
def test_a_number_that_is_none_stays_so_through_the_relu(dtype, added):
    """Else a run that diverges would look sound."""
    x = torch.randn(1, 16, 4, 4)
    x[0, 0, 0, 0], x[0, 0, 1, 1] = math.nan, -1e30
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    W, A, B = random(16, 16, 1, 1), random(2, 16), random(16, 2)
    y = lora_conv2d(x, W, A, B, row_scale=random(16), residual=x if added else None, relu=True)
    assert y[0, :, 0, 0].isnan().all() and not y[0, :, 1:].isnan().any()
    assert (y[0, :, 2:] > -1e-15).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_leak_rectifies_exactly_what_a_relu_does(dtype):
    """The gradient passes at every positive number, however small, and nowhere else; the leak adds to nothing."""
    leak = backends.LEAK
    values = torch.tensor([-3.0, -1e-25, -leak, 0.0, leak, 1e-25, 3.0, -1.0]).to(dtype)
    x = values.view(1, 1, 8, 1).expand(1, 16, 8, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    W, A, B = torch.eye(16)[:, :, None, None], random(2, 16), torch.zeros(16, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = lora_conv2d(x, W, A, B, relu=True)
        y.sum().backward()
    assert torch.equal(x.grad, (x > 0).to(x.grad.dtype))
    assert torch.equal(y + 1e-7, x.detach().relu() + 1e-7)


def test_rectified_activations_have_normal_products_with_small_gradients():
    """Denormal numbers would be a third of a ResNet-18's step on Intel's processors."""
    assert torch.tensor(backends.LEAK) * 1e-16 > torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("autocast", [False, True])
def test_small_updates_of_a_rounded_kernel_survive_on_average(autocast):
    """In bfloat16 an update of a thousandth is below the rounding of most weights, and shows in sums over many.

    It is built beside the scale of a BatchNorm or over float32 weights. A weight on the grid of bfloat16 would swallow
    it; so it is added to the output there.
    """
    n = 4096
    W = 1 + random(1, n, 1, 1).abs()
    x = torch.ones(1, n, 1, 1).bfloat16()
    A, B = torch.full((1, n), 1e-3), torch.ones(1, 1)
    for weight, scale in (
        (W, None),
        (W, torch.tensor([1.1])),
        (W.bfloat16(), torch.tensor([1.1])),
        (W.bfloat16(), None),
    ):
        assert functional._kernel_merges(weight, scale, torch.bfloat16) is not (scale is None and weight is not W)
        outputs = []
        for update in (A, 0 * A):
            if functional._kernel_merges(weight, scale, torch.bfloat16):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    row_B = B * functional._row_factors(1.0, scale)
                    kernel = functional._folded_kernel(weight, update, row_B, scale, torch.bfloat16)
                outputs.append(kernel.double().sum().item())
            else:  # the output is so large that its own rounding would hide the update: look at the update alone
                zero = torch.zeros_like(weight)
                outputs.append(lora_conv2d(x, zero, update, B).item())
        expected = n * 1e-3 * (1.0 if scale is None else scale.item())
        assert abs(outputs[0] - outputs[1] - expected) < 0.1 * expected
    on_the_grid = (W.bfloat16().float() + (B @ A).view(W.shape)).bfloat16().double().sum() - W.bfloat16().double().sum()
    assert on_the_grid < 0.1 * n * 1e-3  # what merging there would leave of it


class LargeTensors(TorchDispatchMode):
    """Remembers the results of a size that operations compute within the `with` block."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel, self.results = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.numel:
            self.results.append(result)
        return result


def test_a_folded_kernel_is_the_only_temporary_of_its_size():
    with LargeTensors(6 * 4 * 3 * 3) as large:
        effective_kernel(random(6, 4, 3, 3), random(2, 36), random(6, 2), SCALING, random(6))
    # The weight and the temporary.
    assert len({t.untyped_storage().data_ptr() for t in large.results}) == 2


def test_4_bit_weights_become_low_precision_without_a_float_copy():
    stored = NF4Weight.quantize(random(64, 24))
    with LargeTensors(64 * 24) as large:
        stored.dequantize(torch.bfloat16)
    assert large.results and all(t.dtype == torch.bfloat16 for t in large.results)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("padding", [(1, 2), (0, 0), "valid", "same"], ids=str)
@pytest.mark.parametrize("kernel", [(3, 5), (4, 3), (2, 2)], ids=str)
def test_padding_in_numbers(mode, padding, kernel):
    """What is padded here and what is left to `conv2d` make the padding of `nn.Conv2d`."""
    conv, x = torch.nn.Conv2d(3, 4, kernel, padding=padding, padding_mode=mode), random(2, 3, 8, 9)
    padded, rest = pad_for_conv2d(x, conv)
    assert_close(F.conv2d(padded, conv.weight, conv.bias, 1, rest), conv(x), FP32)
    if mode == "zeros" and (padding != "same" or kernel == (3, 5)):
        assert padded is x  # no copy


def test_no_image_through_a_pointwise_convolution():
    x = torch.zeros(0, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    A, B = random(2, 3).requires_grad_(), random(6, 2).requires_grad_()
    y = lora_conv2d(x, random(6, 3, 1, 1), A, B)
    y.sum().backward()
    assert y.shape == (0, 6, 4, 4) and x.grad.shape == x.shape and not A.grad.any() and not B.grad.any()


def test_merging_rounds_once():
    """In bfloat16 1 + 1/300 is 1: only in the adapter's precision do three such updates become visible."""
    A, B = torch.ones(3, 8), torch.full((16, 3), 1 / 300)
    W = torch.ones(16, 8).bfloat16()
    expected = (W.float() + B @ A).bfloat16()
    assert expected[0, 0] > 1
    assert torch.equal(merged_weight(W, A, B, 1.0), expected)
    assert torch.equal(merged_weight(W[..., None, None], A, B, 1.0).flatten(1), expected)
    stored = NF4Weight.quantize(random(16, 8))  # 4 bits merge into float
    assert_close(merged_weight(stored, A, B, 2.0), stored.dequantize(torch.float32) + 2 * B @ A, FP32)
    assert W.eq(1).all()


# ----------------------------------------------------------------------------------------------------------- attention

N, H, L, S, E = 2, 3, 4, 5, 12


def test_both_masks_become_one_to_add():
    q, k = random(N, L, E), random(N, S, E)
    assert attention_mask(q, k, H) is None
    blocked, padded = random(L, S) > 0.5, random(N, S) > 0.5
    mask = attention_mask(q.bfloat16(), k, H, blocked, padded)
    assert mask.dtype == torch.bfloat16
    mask = mask.expand(N, H, L, S)
    assert torch.equal(mask == -math.inf, (blocked | padded[:, None]).unsqueeze(1).expand(N, H, L, S))
    assert set(mask.unique().tolist()) == {-math.inf, 0}
    per_head, added = random(N * H, L, S), random(N, S)
    mask = attention_mask(q, k, H, per_head, added)
    assert torch.equal(mask, per_head.view(N, H, L, S) + added[:, None, None])


@pytest.mark.parametrize("shape", [(L, S + 1), (1, S), (H, L, S), (S,)], ids=str)
def test_masks_of_another_shape_are_refused(shape):
    with pytest.raises(RuntimeError, match=r"attn_mask has shape .* must be \(4, 5\) or \(6, 4, 5\)"):
        attention_mask(random(N, L, E), random(N, S, E), H, torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, S), (N, L), (S,)], ids=str)
def test_padding_masks_of_another_shape_are_refused(shape):
    with pytest.raises(RuntimeError, match=r"key_padding_mask has shape .* must be \(2, 5\)"):
        attention_mask(random(N, L, E), random(N, S, E), H, None, torch.zeros(shape))


def test_appended_keys_are_visible_to_all():
    k, v, mask = random(N, S, E), random(N, S, E), random(L, S)
    bias_k, bias_v = random(1, 1, E), random(1, 1, E)
    unchanged = append_keys(k, v, None, None, None, False)
    assert unchanged[0] is k and unchanged[1] is v and unchanged[2] is None
    keys, values, longer = append_keys(k.bfloat16(), v.bfloat16(), mask, bias_k, bias_v, True)
    assert keys.dtype == values.dtype == torch.bfloat16
    assert torch.equal(keys[:, :S], k.bfloat16()) and torch.equal(values[:, :S], v.bfloat16())
    assert torch.equal(keys[:, S], bias_k.bfloat16()[0].expand(N, E)) and not keys[:, S + 1].any()
    assert torch.equal(values[:, S], bias_v.bfloat16()[0].expand(N, E)) and not values[:, S + 1].any()
    assert torch.equal(longer, torch.cat([mask, torch.zeros(L, 2)], 1))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_attention_head_by_head(need_weights, masked):
    q, k, v, mask = random(N, L, E), random(N, S, E), random(N, S, E), random(L, S) if masked else None
    attended, weights = attend(q, k, v, H, mask, 0.0, need_weights)
    heads = [[t[..., h * E // H : (h + 1) * E // H] for t in (q, k, v)] for h in range(H)]
    expected = []
    for h, (q_h, k_h, v_h) in enumerate(heads):
        scores = q_h @ k_h.mT / (E // H) ** 0.5 + (mask if masked else 0)
        expected.append(scores.softmax(-1) @ v_h)
        if need_weights:
            assert_close(weights[:, h], scores.softmax(-1), FP32)
    assert (weights is None) == (not need_weights)
    assert_close(attended, torch.cat(expected, -1), FP32)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropped_attention_weights(need_weights):
    q = random(N, 50, E)
    without, _ = attend(q, q, torch.ones_like(q), H, None, 0.0, need_weights)
    attended, _ = attend(q, q, torch.ones_like(q), H, None, 0.5, need_weights)
    assert_close(without, torch.ones_like(q), FP32)
    assert (attended - 1).abs().max() > 0.1 and abs(attended.mean() - 1) < 0.1  # those that stay are doubled


@pytest.mark.parametrize("at_a_time", [3 * H * L * S, H * L * S, L * S], ids=["images", "image", "head"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("keep", [False, True], ids=["", "weights kept"])
def test_batched_attention_is_as_near_to_float64_as_pytorchs_kernel(monkeypatch, at_a_time, autocast, keep):
    """Attention in bfloat16 by products over all heads, in parts: outputs and gradients, peaked attention too."""
    monkeypatch.setattr(attention, "SCORES_AT_A_TIME", at_a_time)
    errors = {}
    for batched in (False, True):
        monkeypatch.setattr(attention, "PREFERS_BATCHED_ATTENTION", batched)
        torch.manual_seed(0)
        precise = [2 * torch.randn(50, 5, H * 8, dtype=torch.float64) for _ in range(3)]
        precise[0] = precise[0][:, :3]  # fewer queries than keys
        gradient = torch.randn(50, 3, H * 8, dtype=torch.float64)
        results = []
        for dtype in (torch.float64, torch.bfloat16):
            qkv = [t.to(dtype, copy=True).requires_grad_() for t in precise]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
                attended, _ = attend(*qkv, H, keep_weights=keep)
            assert ("_Attention" in _function_names(attended)) == (batched and dtype == torch.bfloat16)
            attended.backward(gradient.to(dtype))
            results.append([attended.detach(), *(t.grad for t in qkv)])
            assert all(t.dtype == dtype for t in results[-1])
        errors[batched] = [((low - high).norm() / high.norm()).item() for high, low in zip(*results, strict=True)]
    for ours, theirs in zip(errors[True], errors[False], strict=True):
        assert 0 < ours < 1.15 * theirs < 0.02


def test_dropped_attention_weights_in_bfloat16(monkeypatch):
    """The products over all heads know no dropout."""
    monkeypatch.setattr(attention, "PREFERS_BATCHED_ATTENTION", True)
    q = random(N, 50, E).bfloat16()
    attended, _ = attend(q, q, torch.ones_like(q), H, None, 0.5)
    assert (attended.float() - 1).abs().max() > 0.1 and abs(attended.float().mean() - 1) < 0.1


def test_what_the_values_have_in_common_is_not_rounded():
    """It changes no score's gradient, but is large beside what does."""
    torch.manual_seed(0)
    q, k, v, gradient = (torch.randn(4, 2, 50, 8, dtype=torch.float64) for _ in range(4))
    v = (v + 8).bfloat16().double()
    errors = []
    for function in (attention._Attention.apply, F.scaled_dot_product_attention):
        low, high = (q.bfloat16().requires_grad_(), q.bfloat16().double().requires_grad_())
        keys = k.bfloat16()
        function(low, keys, v.bfloat16()).backward(gradient.bfloat16())
        F.scaled_dot_product_attention(high, keys.double(), v).backward(gradient.bfloat16().double())
        errors.append(((low.grad - high.grad).norm() / high.grad.norm()).item())
    assert errors[0] < 0.5 * errors[1]


def _function_names(tensor: torch.Tensor) -> str:
    names, nodes = [], [tensor.grad_fn]
    while nodes:
        names.append(nodes[-1].name())
        nodes = [*nodes[:-1], *(node for node, _ in nodes.pop().next_functions if node is not None)]
    return " ".join(names)


@pytest.mark.parametrize("number", [0, 1])
def test_batched_attention_of_no_and_of_one_image(monkeypatch, number):
    monkeypatch.setattr(attention, "PREFERS_BATCHED_ATTENTION", True)
    q, v = torch.randn(number, 4, 8).bfloat16(), torch.randn(number, 4, 8).bfloat16()
    attended, _ = attend(q, q, v, 2)
    expected, _ = attend(q.float(), q.float(), v.float(), 2)
    torch.testing.assert_close(attended.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("keys, keep, kept_sizes", [(5, False, []), (5, True, [2 * 2 * 5 * 5]), (17, True, [])])
def test_batched_attention_keeps_q_k_v_and_weights_that_are_small(monkeypatch, keys, keep, kept_sizes):
    """Heads of 4 numbers: the weights of 16 keys would be four times q."""
    monkeypatch.setattr(attention, "PREFERS_BATCHED_ATTENTION", True)
    kept, qkv = [], torch.randn(2, keys, 24, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attend(*qkv.chunk(3, -1), 2, keep_weights=keep)
    beside = [t for t in kept if t.untyped_storage().data_ptr() != qkv.data_ptr()]
    assert len(kept) == 3 + len(beside) and [t.numel() for t in beside] == kept_sizes


@pytest.mark.parametrize("grad", [False, True])
def test_scores_are_computed_again_only_where_weights_are_not_kept(monkeypatch, grad):
    monkeypatch.setattr(attention, "PREFERS_BATCHED_ATTENTION", True)
    calls, weights = [], attention._attention_weights
    monkeypatch.setattr(attention, "_attention_weights", lambda *a: calls.append(1) or weights(*a))
    kept, apply = [], attention._Attention.apply
    monkeypatch.setattr(attention._Attention, "apply", lambda *a: kept.append(a[3]) or apply(*a))
    gradients = []
    for keep in (False, True):
        torch.manual_seed(0)
        qkv = torch.randn(2, 5, 24, dtype=torch.bfloat16, requires_grad=True)
        with torch.set_grad_enabled(grad):
            attended, _ = attend(*qkv.chunk(3, -1), 2, keep_weights=keep)
        if grad:
            attended.float().square().sum().backward()
            gradients.append(qkv.grad)
    assert len(calls) == (3 if grad else 2) and kept == [False, grad]  # without a gradient none is kept
    assert not grad or torch.equal(*gradients)  # bit for bit


def test_one_tensor_stays_one():
    x, y, calls = random(L, N, E), random(L, N, E), []
    a, b, c = once_each(lambda t: calls.append(t) or t + 1, x, y, x)
    assert a is c and torch.equal(b, y + 1) and len(calls) == 2
    assert to_batch_first(True, False)(x).shape == (N, L, E)
    assert to_batch_first(True, True)(x) is x
    assert to_batch_first(False, False)(x[:, 0]).shape == (1, L, E)


# -------------------------------------------------------------------------------------------------------------- 4 bits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(64, 64), (10, 7), (6, 4, 3, 3), (1, 1)], ids=str)
def test_nf4_rounds_every_value_to_its_block_s_grid(device, shape):
    """The 16 levels of NF4 (QLoRA, appendix E) times the largest magnitude of 64 neighbours, itself in 8 bits."""
    levels = "-1 -.6961928 -.5250731 -.3949175 -.2844414 -.1847734 -.09105 0 "
    levels += ".0795803 .1609302 .2461123 .3379152 .4407098 .562617 .7229568 1"
    levels = torch.tensor([float(level) for level in levels.split()])
    W = random(*shape, device=device)
    stored = NF4Weight.quantize(W)
    dense = stored.dequantize(torch.float32).cpu()
    assert stored.shape == W.shape and dense.shape == W.shape and dense.dtype == torch.float32
    for values, rounded in zip(W.cpu().flatten().split(64), dense.flatten().split(64), strict=True):
        expected = levels[(values[:, None] / values.abs().max() - levels).abs().argmin(1)] * values.abs().max()
        # The scale's own rounding moves it by a few per cent, and a value on the border to the next level.
        assert_close(rounded, expected, 0.08)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nf4_in_low_precision_is_the_float_value_rounded_once(device, dtype):
    stored = NF4Weight.quantize(random(33, 40, device=device))
    precise = stored.dequantize(torch.float32)
    assert torch.equal(stored.dequantize(dtype), precise.to(dtype))
    assert torch.equal(stored.dequantize(torch.float32), precise)  # no trace of it is left


def test_the_flat_scales_of_4_bits_are_those_of_the_nested_ones():
    functional = bitsandbytes_functional()
    weight = NF4Weight.quantize(random(48, 80))
    for _ in range(2):  # the second time from the scales that are kept
        dense = weight.dequantize(torch.float32)
        assert torch.equal(dense, functional.dequantize_4bit(weight.packed, weight.state).flatten().view(48, 80))
    assert torch.equal(weight[8:16].dequantize(torch.bfloat16), dense[8:16].bfloat16())


def test_nf4_takes_little_more_than_4_bits_a_value():
    stored = NF4Weight.quantize(random(256, 256))
    constants = stored.state.as_dict(packed=True)
    held = [stored.packed, *(constants[key] for key in ("absmax", "nested_absmax"))]
    assert sum(t.numel() * t.element_size() for t in held) * 8 / 256**2 == pytest.approx(4.127, abs=1e-3)


def test_rows_of_a_4_bit_weight_are_views_of_one_storage():
    stored = NF4Weight.quantize(random(9, 7))
    part = stored[3:6]
    assert part.shape == (3, 7) and part.packed is stored.packed
    assert torch.equal(part.dequantize(torch.float32), stored.dequantize(torch.float32)[3:6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_4_bit_weight_is_its_dequantised_self(dtype):
    tolerance = FP32 if dtype == torch.float32 else BF16
    stored = NF4Weight.quantize(random(36, 24))
    W = stored.dequantize(torch.float64)
    x = random(50, 24).to(dtype).requires_grad_()
    A, B = random(4, 24, requires_grad=True), random(36, 4, requires_grad=True)
    y = lora_linear(x, stored, A, B, None, SCALING)
    theirs = [t.detach().double().requires_grad_() for t in (x, A, B)]
    expected = theirs[0] @ (W + SCALING * theirs[2] @ theirs[1]).T
    assert_close(y, expected, tolerance)
    upstream = torch.randn_like(y)
    actual = torch.autograd.grad(y, (x, A, B), upstream)
    for gradient, wanted in zip(actual, torch.autograd.grad(expected, theirs, upstream.double()), strict=True):
        assert_close(gradient, wanted, tolerance)


def test_effective_weight_by_hand():
    """Two layers of one row each, packed."""
    W, A, B = torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0], [100.0]])
    assert effective_weight(W, A, B, 0.5, groups=2).tolist() == [[5.0, 10.0], [150.0, 200.0]]


# ------------------------------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "options", [(3, 2, 1), (2, 2), ((3, 2), (1, 2), (1, 0)), (3, 2, 1, 2), (2, 2, 0, 1, True)], ids=str
)
def test_pooling_and_rectifying_commute_to_the_bit(device, dtype, memory_format, options):
    x = torch.randn(2, 3, 17, 14, dtype=dtype, device=device).to(memory_format=memory_format)
    x[0, 0] = -1.0  # nothing positive in any window
    x[0, 1] = 1.0  # nothing but ties
    x[1, 2, 5, 5] = float("nan")
    ours, stock = (x.clone().requires_grad_() for _ in range(2))
    y, expected = max_pool2d_relu(ours, *options), F.max_pool2d(F.relu(stock), *options)
    gradient = torch.randn_like(y)
    y.backward(gradient), expected.backward(gradient)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours.grad, stock.grad, rtol=0, atol=0, equal_nan=True)
    assert ours.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("shape", [(2, 40_000), (300, 200)], ids=str)
def test_pooling_knows_positions_in_large_maps(shape):
    """More positions than 16 bits count, as in maps above 181 x 181 (stems on images above 362 pixels)."""
    ours, stock = (torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    for x, pool in ((ours.requires_grad_(), max_pool2d_relu), (stock.requires_grad_(), F.max_pool2d)):
        pool(x, 2, 2).relu().sum().backward()
    assert torch.equal(ours.grad, stock.grad)


def test_pooling_keeps_nothing_of_the_input_s_size():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        max_pool2d_relu(torch.randn(1, 4, 16, 16, requires_grad=True), 2, 2)
    assert kept and all(tensor.numel() == 4 * 8 * 8 for tensor in kept)


@pytest.mark.parametrize("shape", [(6, 8), (6, 2, 2, 2)])
def test_autocast_does_not_round_what_is_merged(shape):
    weight, A, B = random(6, 8), random(2, 8), random(6, 2)
    expected = (weight.double() + 0.5 * B.double() @ A.double()).view(shape)
    weight = weight.view(shape)
    before = weight.clone()
    with torch.autocast("cpu", torch.bfloat16):
        merged = merged_weight(weight, A, B, 0.5)
    assert merged.dtype == torch.float32 and torch.equal(weight, before)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("by_onednn", [False, True], ids=["MKL", "oneDNN"])
@pytest.mark.parametrize("bias", [None, 1, 2], ids=["no bias", "bias", "every second number as bias"])
def test_a_frozen_linear_layer_is_the_stock_one(monkeypatch, device, by_onednn, bias):
    """Whichever product it takes: with and without a gradient of the input, under autocast, and for no input at all."""
    monkeypatch.setattr(backends, "PREFERS_ONEDNN_LINEAR", by_onednn)
    layer = nn.Linear(6, 5, bias=bias is not None, device=device).requires_grad_(False)
    if bias is not None:
        layer.bias.data = torch.randn(5 * bias, device=device)[::bias]
    for shape in ((3, 6), (2, 4, 6), (0, 4, 6)):
        x = torch.randn(shape, device=device)
        y = functional.frozen_linear(x, layer.weight, layer.bias)
        assert y.shape == (*shape[:-1], 5)
        torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-6)
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(functional.frozen_linear(x, layer.weight, layer.bias), layer(x))
    ours, theirs = (torch.ones(2, 3, 6, device=device, requires_grad=True) for _ in range(2))
    functional.frozen_linear(ours, layer.weight, layer.bias).square().sum().backward()
    layer(theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_linear_layer_of_an_input_in_bfloat16_is_the_stock_one(device, dtype, bias_dtype):
    """What is not in bfloat16 yet, autocast rounds, as it does for the stock layer."""
    layer = nn.Linear(6, 5, bias=bias_dtype is not None, device=device, dtype=dtype).requires_grad_(False)
    if bias_dtype is not None:
        layer.bias.data = torch.randn(10, device=device, dtype=bias_dtype)[::2]
    x = torch.randn(3, 6, device=device, dtype=torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        assert_close(functional.frozen_linear(x, layer.weight, layer.bias), layer(x), BF16)


# -------------------------------------------------------------------------------------------------- second derivatives

ONCE = {
    "linear": lambda x: lora_linear(x, random(6, 4), random(2, 4), random(6, 2)),
    "convolution": lambda x: lora_conv2d(x, random(6, 3, 2, 2), random(2, 12), random(6, 2)),
    "pooling": lambda x: max_pool2d_relu(x, 2, 2),
    "attention": lambda x: attention._Attention.apply(*[x.bfloat16()] * 3),
}


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("function", ONCE.values(), ids=ONCE)
def test_a_graph_of_the_gradient_is_refused(function):
    """Also where the output's gradient is a constant, as that of a sum, and by whichever call the graph is wanted."""
    x = random(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="leave out create_graph=True"):
        torch.autograd.grad(function(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="leave out create_graph=True"):
        function(x).square().sum().backward(create_graph=True)
    for reentrant in (False, True):  # gradients are enabled while it computes once more, and no graph is wanted
        checkpoint(function, x, use_reentrant=reentrant).sum().backward()
