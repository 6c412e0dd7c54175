"""What depends on PyTorch's release or on the processor: private operators, which no other file names, and kernels."""

import functools
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit import InputError
from toolkit.devices import is_traced

LOW_PRECISION = (torch.bfloat16, torch.float16)
# The gradients of A and B are sums over thousands of rows: on a GPU partial sums in 16 bits would lose them.
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

_CORES = Path("/proc/cpuinfo")  # Linux alone has it
_PROCESSOR = _CORES.read_text()[:4096] if _CORES.exists() else platform.processor()  # its maker among others
# What `torch.compile` calls on CPUs is the only way to oneDNN's float32 product. MKL's is slower on other processors.
_IS_AMD_WITH_AVX512 = "AuthenticAMD" in _PROCESSOR and "AVX512" in torch.backends.cpu.get_cpu_capability()
PREFERS_ONEDNN_LINEAR = _IS_AMD_WITH_AVX512 and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ONEDNN_DTYPES: tuple[torch.dtype, ...] = ()  # in which its convolutions take an addition or a ReLU along on this CPU
if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
    ONEDNN_DTYPES = (torch.float32,)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        ONEDNN_DTYPES += (torch.bfloat16,)
# The ReLU of oneDNN turns NaN into 0, which would hide that training diverges. With a leak, next to zero in float32,
# NaN stays. Subnormal numbers are slow: at 1e-30 products with gradients would be, at 1e-15 squares in Adam.
LEAK = 1e-20
WIDEST_FAST_KERNEL = 3  # of a wider depthwise one oneDNN's gradient takes ten times the output's time, in bf16 forty


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product of ``x`` runs in: autocast's if that is on, else x's own. It must be a float."""
    if not x.is_floating_point():  # such as what a model converts to the dtype of a weight in 4 bits
        hint = "scale images; a model that reads the dtype of a weight cannot have that in 4 bits"
        raise InputError(f"an adapted layer takes floats, not {x.dtype}: {hint}")
    device = x.device.type
    is_cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else x.dtype


def refuse_jit() -> None:
    if torch.jit.is_tracing():  # it does not see the operations of an autograd.Function
        raise RuntimeError("torch.jit traces no adapters: use torch.export, or LoRAManager(model).unload(merge=True)")


def first_derivative(backward):
    """Make a backward pass refuse `create_graph`, and compute in the dtype of its forward pass, even under autocast."""

    # By PyTorch's `once_differentiable` a penalty on gradients without a graph, as of a sum, would train nothing.
    @functools.wraps(backward)
    def run(ctx, *gradients):
        if torch.compiler.is_compiling():  # Dynamo would leave autocast off for all that it traces after this
            return backward(ctx, *gradients)
        if torch.is_grad_enabled():  # in a backward pass, by `create_graph` alone
            remedy = "leave out create_graph=True, or take the adapters out with LoRAManager(model).unload(merge=True)"
            raise RuntimeError(f"second derivatives through adapted layers are not defined: {remedy}")
        device = gradients[0].device.type
        if not torch.is_autocast_enabled(device):  # it rarely is, and entering the context takes longer
            return backward(ctx, *gradients)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *gradients)

    return run


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` as `F.linear`, without a gradient of its own. x: (N, in), W: (out, in)."""
    # In float32 PyTorch takes MKL's, but oneDNN's is up to 20% faster on an AMD processor with AVX-512. In bfloat16 all
    # are oneDNN's, but PyTorch copies the bias first.
    on_cpu = x.device.type == "cpu" and torch.backends.mkldnn.enabled and not is_traced()
    pays = x.dtype == torch.float32 and PREFERS_ONEDNN_LINEAR
    if x.dtype == torch.bfloat16:  # autocast may still have to round the others
        pays = bias is not None and bias.dtype == W.dtype == x.dtype and x.dtype in ONEDNN_DTYPES
    if not on_cpu or not pays or x.numel() == 0:
        return F.linear(x, W, bias)
    if bias is not None:
        bias = bias.contiguous()  # oneDNN does not look at its stride
    return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` by the product that `linear` chooses: where that is oneDNN's, up to three times as fast if thin."""
    # Columns of a wider matrix are left to PyTorch: oneDNN would read them number by number.
    return linear(a, b.T) if b.is_contiguous() or b.T.is_contiguous() else a @ b


def pixels(x: Tensor) -> Tensor | None:
    """A view of (N, C, H, W) as (N H W, C); None if the channels do not lie last in memory."""
    return x.permute(0, 2, 3, 1).flatten(0, 2) if x.is_contiguous(memory_format=torch.channels_last) else None


def conv2d(x: Tensor, kernel: Tensor, bias, geometry: tuple, residual: Tensor | None, relu: bool) -> Tensor:
    """``relu(conv2d(x, kernel, bias) + residual)``; both of the latter are optional. No gradient of its own."""
    # On a CPU oneDNN adds or rectifies while it writes the output.
    fuses = (relu or residual is not None) and x.device.type == "cpu" and torch.backends.mkldnn.enabled
    if fuses and x.numel() > 0 and x.dtype in ONEDNN_DTYPES and not is_traced():
        stride, padding, dilation, groups = geometry
        if bias is not None:
            bias = bias.contiguous()
        onednn = torch.ops.mkldnn._convolution_pointwise
        if residual is None:
            return onednn(x, kernel, bias, padding, stride, dilation, groups, "leaky_relu", [LEAK], "")
        if residual.dtype == x.dtype:  # what comes after an addition has no leak
            y = onednn.binary(x, residual, kernel, bias, padding, stride, dilation, groups, "add", 1.0, None, [], None)
            return added_and_rectified(y, None, relu)
    return added_and_rectified(F.conv2d(x, kernel, bias, *geometry), residual, relu)


def added_and_rectified(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """``relu(y + residual)``, or what of it is asked for, in the memory of y."""
    if residual is not None:
        y = y.add_(residual)
    return y.relu_() if relu else y


def conv2d_gradient(gy: Tensor, x: Tensor, kernel: Tensor, geometry: tuple, of_weight: bool) -> Tensor:
    """One of the two gradients of ``conv2d(x, kernel)``: the kernel's or the input's."""
    stride, padding, dilation, groups = geometry
    is_depthwise = groups == x.shape[1] == len(kernel)
    if is_depthwise and x.device.type == "cpu" and x.numel() > 0 and not is_traced():
        if of_weight and max(kernel.shape[2:]) > WIDEST_FAST_KERNEL:
            return _depthwise_kernel_gradient(gy, x, kernel.shape, geometry)
        if not of_weight and max(stride) > 1 and gy.dtype == torch.bfloat16:
            return conv2d_gradient(gy.float(), x.float(), kernel.float(), geometry, of_weight).bfloat16()
    how = (stride, padding, dilation, False, [0, 0], groups, [not of_weight, of_weight, False])
    of_input, of_kernel, _ = torch.ops.aten.convolution_backward(gy, x, kernel, None, *how)
    if of_weight:
        return of_kernel
    return of_input


def _depthwise_kernel_gradient(gy: Tensor, x: Tensor, shape: torch.Size, geometry: tuple) -> Tensor:
    """The kernel's gradient of a depthwise convolution: each channel of each image, convolved with its ``gy``."""
    stride, padding, dilation, _ = geometry
    channels = gy.shape[0] * gy.shape[1]
    images = x.reshape(1, channels, *x.shape[2:])
    gradients = F.conv2d(images, gy.reshape(channels, 1, *gy.shape[2:]), None, dilation, padding, stride, channels)
    gradients = gradients[:, :, : shape[2], : shape[3]]  # where the stride leaves rows out, there are more
    return gradients.view(len(x), *shape).sum(0)


def channel_sums(gy: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of ``gy y`` and of ``gy`` over all but the channels: (N, C, H, W) -> (C,), in float32 or more."""
    ones = y.new_ones(y.shape[1], dtype=torch.promote_types(y.dtype, torch.float32))
    _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(  # of a BatchNorm that changes nothing
        gy, y, ones, None, None, torch.zeros_like(ones), ones, True, 0.0, [False, True, True]
    )
    return of_weight, of_bias


# The input's gradient from the output's: (gy, y, 0); (gy, x, approximate, grad_input), of which the last is written
# into; (gy, x, shape, mean, 1 / deviation, weight, bias, which of three gradients), a tuple.
relu_gradient = torch.ops.aten.threshold_backward
gelu_gradient = torch.ops.aten.gelu_backward.grad_input
layer_norm_gradient = torch.ops.aten.native_layer_norm_backward
# (x, *options): what `F.max_pool2d` takes, and the positions of the maxima too. (gy, x, *options, indices): the input's
# gradient, for which x's shape and memory format are read.
max_pool2d = torch.ops.aten.max_pool2d_with_indices
max_pool2d_gradient = torch.ops.aten.max_pool2d_with_indices_backward
# (x, shape): `x.view(shape)` that autograd does not take for a view: it may be modified in place.
unsafe_view = torch.ops.aten._unsafe_view


def dequantize_nf4(packed: Tensor, scales: Tensor, block: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Decode NF4, two codes a byte and one float32 scale a block, faster than bitsandbytes, which must be imported."""
    return torch.ops.bitsandbytes.dequantize_4bit.default(packed, scales, block, "nf4", shape, dtype)
