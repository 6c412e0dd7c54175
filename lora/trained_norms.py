"""BatchNorm in training at the memory of one width: what follows it is computed again in backward, not saved.

`set_gradient_checkpointing(model, "selective")` chooses this for the BatchNorms that train. It costs some time.

The convolution's output z is saved once, as BatchNorm's backward needs it. ``relu(bn(z) + residual)``, the next
layer's input, is made of it again by one scale and one shift per channel: an adapted convolution, which needs its input
for the adapter's gradients alone, saves what it is made of instead. The residual stream is a sum of such outputs, so it
is made again too, from the first block of a stage on, each block once. (In-Place ABN, arXiv 1712.02616, and Gist,
ISCA 2018, show the room that there is.)

    y  = relu(a z + b + residual),    a = weight / deviation,    b = bias - a mean
    gz = a (g - mean(g) - n mean(g n)),    n = (z - mean) / deviation,    g = gy where y > 0

An output knows what it is made of by its attribute `made`. Whoever changes it, or passes another tensor on, is given
the plain gradient: the layer behind then saves its input as it always does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import backends
from lora.activations import saves_in_16_bits


def scale_shift_relu(z: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """``relu(scale z + shift + residual)`` of z and residual (N, C, H, W); scale and shift (C,) in float32 or more.

    As a convolution of each channel with one number: on a CPU oneDNN's takes half the time of any other way, as it
    rectifies on the way. In 16 bits scale and shift are rounded as the weights of the layers are.
    """
    kernel = scale.to(z.dtype)[:, None, None, None]
    geometry = (1, 1), (0, 0), (1, 1), z.shape[1]
    return backends.conv2d(z, kernel, shift.to(z.dtype), geometry, residual, relu)


class Made:
    """How ``relu(scale z + shift + residual)`` is made again from its `parts`, which others save for backward.

    The parts are z (N, C, H, W), scale (C,), shift (C,) and those of the residual, or the residual itself.
    """

    def __init__(self, relu: bool, has_residual: bool, residual: "Made | None"):
        self.relu = relu
        self.has_residual = has_residual
        self.residual = residual
        self.depth = 0 if residual is None else residual.depth + 1
        self.output: Tensor | None = None  # in backward, from its first use to its own ReLU

    def again(self, *parts: Tensor, keep: bool = True) -> Tensor:
        """The output. Of those on the way to it every fourth is kept as well: few are made often, and few are there."""
        if self.output is not None:
            return self.output
        z, scale, shift, *rest = parts
        residual = rest[0] if self.has_residual else None
        if self.residual is not None:
            residual = self.residual.again(*rest, keep=self.residual.depth % 4 == 1)
        output = scale_shift_relu(z, scale, shift, residual, self.relu)
        if keep and self.relu:
            self.output = output
        return output


def made_of(x: Tensor) -> tuple[Made | None, tuple[Tensor, ...]]:
    """How x is made again, and of what; None: it is not, or it was changed since."""
    if backends.is_traced():
        return None, ()
    made, parts, version = vars(x).get("made", (None, (), None))
    return (made, parts) if version == x._version else (None, ())


def forget(x: Tensor) -> Tensor:
    """Let no one save what x is made of: a block that is computed again as a whole saves nothing."""
    vars(x).pop("made", None)
    return x


def normalizes_by_batch(norm: nn.BatchNorm2d, z: Tensor) -> bool:
    """Does `normalize` compute ``norm(z)`` of a BatchNorm of PyTorch's own class?"""
    precise = torch.promote_types(z.dtype, torch.float32)
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    alike = all(t is None or t.dtype == precise for t in tensors)
    # A ReLU would open on a rounded z where it was closed.
    as_it_is = not (backends.is_traced() or saves_in_16_bits())
    return norm.training and alike and as_it_is and z.dim() == 4 and z.numel() > z.shape[1]


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, weight, bias, residual, settings):
        ctx.made, parts, mean, deviation, ctx.eps = settings
        ctx.save_for_backward(weight, mean, deviation, *parts)
        return scale_shift_relu(z, *parts[1:3], residual, ctx.made.relu)

    @staticmethod
    @backends.first_derivative
    def backward(ctx, gy):
        weight, mean, deviation, *parts = ctx.saved_tensors
        made, z = ctx.made, parts[0]
        gy = gy.to(z.dtype)
        if made.relu:
            output, made.output = made.again(*parts), None
            gy = backends.relu_gradient(gy, output, out=output)
        gz, g_weight, g_bias = backends.batch_norm_gradient(gy, z, weight, mean, deviation, ctx.eps)
        return gz, g_weight, g_bias, gy if made.has_residual else None, None


def _count_batch(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """The running statistics after this batch, as `nn.BatchNorm2d` has them."""
    if not norm.track_running_stats or norm.running_mean is None:
        return
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        momentum = 1 / float(norm.num_batches_tracked) if momentum is None else momentum
    momentum = 0.0 if momentum is None else momentum
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(variance * (count / (count - 1)), momentum)


def normalize(
    z: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None = None, relu: bool = False, z_scale: float = 1.0
) -> Tensor:
    """``relu(norm(z / z_scale) + residual)`` of a BatchNorm in training, which what follows makes again in backward.

    Args:
        z: (N, C, H, W).
        residual: (N, C, H, W), added to the output.
        relu: rectify the output, after the addition.
        z_scale: of what z is a multiple. BatchNorm takes it out again, if its eps follows.
    """
    fits = residual is None or (residual.shape == z.shape and residual.dtype == z.dtype)
    if not fits or not normalizes_by_batch(norm, z):
        y = norm(z if z_scale == 1 else z / z_scale)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y
    eps = norm.eps * z_scale**2
    with torch.no_grad():
        mean, variance = backends.batch_statistics(z)
        _count_batch(norm, mean / z_scale, variance / z_scale**2, z.numel() // z.shape[1])
        deviation = (variance + eps).rsqrt()  # the reciprocal
        scale = deviation if norm.weight is None else deviation * norm.weight
        shift = -mean * scale if norm.bias is None else torch.addcmul(norm.bias, mean, scale, value=-1)
    of_residual, rest = (None, ()) if residual is None else made_of(residual)
    if residual is not None and of_residual is None:
        rest = (residual.detach(),)
    made, parts = Made(relu, residual is not None, of_residual), (z.detach(), scale, shift, *rest)
    y = _Normalized.apply(z, norm.weight, norm.bias, residual, (made, parts, mean, deviation, eps))
    if y.requires_grad:
        y.made = made, parts, y._version
    return y
