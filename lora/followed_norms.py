"""BatchNorms whose statistics follow the adapters: training through them at almost no cost.

LoRA over a frozen BatchNorm lacks what a BatchNorm in training has: a gradient through the statistics, which keeps the
activations in range. Taken from the batch, these cost passes over the convolution's output, and the BatchNorm cannot be
folded. But for given inputs they are a function of the kernel K alone:

    mean = K m        var = diag(K C K^T)        (m and C: mean and covariance of the patches that K is applied to)

With the inputs that the base network has on some training images, K = W + s B A changes the base's statistics to

    mean' = mean + s B A m        var' = var v(W + s B A) / v(W),        v(K) = diag(K C K^T)

C is held by its few principal components, so that this costs products of A with k rows. The gradient through it is that
of BatchNorm (Ioffe and Szegedy, arXiv 1502.03167) for fixed inputs, over many images in place of the batch. Every step
folds gamma / sqrt(var' + eps) into the kernel as for a frozen BatchNorm. What is saved is an ordinary BatchNorm with
the statistics of the trained adapters.
"""

import contextlib
import math
from collections.abc import Container, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from lora.fusion import convs_and_norms, folds, scale_and_shift
from lora.nf4 import dense_weight
from toolkit import InputError
from toolkit.answers.evaluation import eval_mode

PATCHES = 512  # how many patches C is estimated from
COMPONENTS = 64  # how many principal components of C are kept
STEADY = 0.01  # this share of var is added to v, which is near 0 in a channel that is dead on the images


class FollowedNorm:
    """The statistics of a BatchNorm behind a convolution, as a function of the convolution's adapter.

    Args:
        conv: the convolution, whose adapter still does nothing.
        norm: the BatchNorm, with the statistics of the base.
        patches: (P, fan_in), what the kernel is applied to.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, patches: Tensor):
        self.norm = norm
        self.mean, self.variance = remember_base(norm)
        self.centre = patches.mean(0)
        self.inputs = principal_components(patches - self.centre, COMPONENTS)  # (k, fan_in): C = inputs^T inputs
        outputs = self.inputs @ dense_weight(conv.base(), patches.dtype).flatten(1).T  # (k, out)
        self.doubled = 2 * outputs
        self.spread = outputs.square().sum(0) + STEADY * self.variance  # v(W), (out,)

    def statistics(self, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Mean and variance (out,) of the convolution's output with an adapter, differentiable.

        Args:
            A: (r, fan_in).
            B: (out, r).
        """
        self.like(A)
        with torch.autocast(A.device.type, enabled=False):
            change, shift = _changes(self.inputs, self.doubled, self.centre, A, scaling * B)
            return self.mean + shift, self.variance * _ratio(change, self.spread)

    def scale_and_shift(
        self, A: Tensor, B: Tensor, scaling: float, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``g = gamma / sqrt(var' + eps)``, ``log |g|`` but for a constant, and ``beta + (bias - mean') g``.

        All are (out,). g is a number here: its logarithm takes the gradient.
        """
        statistics = self.statistics(A, B, scaling)
        return _scale_and_shift(*statistics, self.norm.eps, self.norm.weight, self.norm.bias, bias)

    @torch.no_grad()
    def write(self, conv: nn.Conv2d) -> None:
        """Give the BatchNorm itself the statistics for what the adapter is now."""
        _set_statistics(self.norm, self.statistics(conv.lora_A, conv.lora_B, conv.scaling))

    def like(self, like: Tensor) -> None:
        """Move to where a tensor is, and into its dtype: this is no module, which would be moved with its model."""
        if self.centre.device != like.device or self.centre.dtype != like.dtype:
            for name in ("mean", "variance", "centre", "inputs", "doubled", "spread"):
                setattr(self, name, getattr(self, name).to(like))


def _changes(inputs: Tensor, doubled: Tensor, centre: Tensor, A: Tensor, sB: Tensor) -> tuple[Tensor, Tensor]:
    """How far an adapter changes v and the mean, (out,) both.

    Args:
        inputs: (k, fan_in).
        doubled: (k, out), twice what W makes of the inputs.
        centre: (fan_in,).
        A: (r, fan_in).
        sB: (out, r).
    """
    h = inputs @ A.mT  # (k, r)
    change = sB * (doubled.mT @ h + sB @ (h.mT @ h))
    return change.sum(-1), (sB @ (A @ centre[..., None])).squeeze(-1)


def _ratio(change: Tensor, spread: Tensor) -> Tensor:
    return (1 + change / spread).clamp_min(1e-4)  # above 0 in spite of rounding


def _scale_and_shift(
    mean: Tensor,
    variance: Tensor,
    eps: float,
    weight: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    log_scale = -0.5 * (variance + eps).log()
    scale = log_scale.exp()
    scale = scale if weight is None else scale * weight
    shift = (-mean if bias is None else bias - mean) * scale
    return scale.detach(), log_scale, shift if beta is None else shift + beta


def principal_components(rows: Tensor, number: int) -> Tensor:
    """The directions of largest variance of centred rows (P, D), each as long as its standard deviation: (k, D)."""
    # LAPACK may not converge on zeros: of inputs that never vary, such as padding, and of patches that are the mean.
    varies = rows.abs().amax(0) > 0
    own = rows[rows.abs().amax(1) > 0][:, varies].double()
    if own.shape[1] <= len(own):
        variances, directions = torch.linalg.eigh(own.T @ own / len(rows))  # in ascending order
        found = (directions * variances.clamp_min(0).sqrt()).T[-number:]
    else:
        _, turned = torch.linalg.eigh(own @ own.T)
        found = turned.T[-number:] @ own / math.sqrt(len(rows))
    components = rows.new_zeros(min(number, *rows.shape), rows.shape[1])
    components[: len(found), varies] = found.to(rows.dtype)
    return components


def patches_of(conv: nn.Conv2d, x: Tensor, number: int) -> Tensor:
    """Some patches of x (N, in, H, W) that the kernel is applied to: (number, in * kh * kw), always the same."""
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, (left, right, top, bottom), mode=mode)
    extents = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    sizes = [(s - e) // t + 1 for s, e, t in zip(x.shape[2:], extents, conv.stride, strict=True)]
    drawn = torch.randint(len(x) * sizes[0] * sizes[1], (number,), generator=torch.Generator().manual_seed(0))
    drawn = drawn.to(x.device)
    image, place = drawn // (sizes[0] * sizes[1]), drawn % (sizes[0] * sizes[1])
    row, column = place // sizes[1] * conv.stride[0], place % sizes[1] * conv.stride[1]
    taps = [
        x[image, :, row + i * conv.dilation[0], column + j * conv.dilation[1]]
        for i in range(conv.kernel_size[0])
        for j in range(conv.kernel_size[1])
    ]
    return torch.stack(taps, -1).flatten(1)  # (number, in, kh * kw) in the kernel's order


@torch.no_grad()
def follow_statistics(model: nn.Module, batches: Iterable[Tensor], required: bool = False) -> None:
    """Let the frozen BatchNorms that are folded into adapted convolutions follow the adapters, which still do nothing.

    These are the ones in the blocks of torchvision's ResNets. The first of a ResNet stays as it is: the largest output
    would have to be saved. So do all in blocks of other libraries, which may change an output in place.

    Args:
        batches: images, or whatever the model takes: those from which the inputs' covariances are estimated. Without
            any, nothing follows.
        required: must there be a BatchNorm to follow?

    Raises:
        InputError: there is none, and it is required.
    """
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock | Bottleneck)]
    pairs = [pair for block in blocks for part in (block, block.downsample) for pair in convs_and_norms(part)]
    norm_of = {conv: norm for conv, norm in pairs if folds(conv, norm) and conv.groups == 1}
    if not norm_of and required:
        raise InputError("--norms follow: no adapted convolution of a ResNet has a frozen BatchNorm behind it; drop it")
    batches = list(batches) if norm_of else []
    if not batches:
        return
    number = -(-PATCHES // len(batches))
    patches = {conv: [] for conv in norm_of}

    def keep_some(conv: nn.Conv2d, inputs: tuple[Tensor]) -> None:
        patches[conv].append(patches_of(conv, inputs[0].to(conv.lora_A.dtype), number))

    hooks = [conv.register_forward_pre_hook(keep_some) for conv in norm_of]
    try:
        with eval_mode(model):
            for batch in batches:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for conv, norm in norm_of.items():
        if patches[conv]:
            conv.followed = FollowedNorm(conv, norm, torch.cat(patches[conv]))


def folded_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What makes a convolution compute its BatchNorm too: row scale, its logarithm if it has a gradient, and bias.

    Without gradients a BatchNorm that follows is as it was last written.
    """
    if norm is None:
        return None, None, conv.bias
    followed = vars(conv).get("followed")
    if followed is None or followed.norm is not norm or not torch.is_grad_enabled():
        scale, shift = scale_and_shift(norm, conv.bias)
        return scale, None, shift
    return followed.scale_and_shift(conv.lora_A, conv.lora_B, conv.scaling, conv.bias)


def followers(model: nn.Module) -> Iterator[nn.Conv2d]:
    """The convolutions whose BatchNorms follow."""
    return (module for module in model.modules() if "followed" in vars(module))


def write_statistics(model: nn.Module) -> None:
    """Give the BatchNorms that follow the statistics for what the adapters are now, to be evaluated or saved."""
    for conv in followers(model):
        conv.followed.write(conv)


def stop_following(model: nn.Module, merged: bool) -> None:
    """Leave the BatchNorms with their statistics for the adapters, if these are to be merged, or with the base's."""
    if merged:
        write_statistics(model)
    for module in model.modules():
        vars(module).pop("followed", None)
        of_base = vars(module).pop("of_base", None)
        if of_base is not None and not merged:
            _set_statistics(module, of_base)


def remember_base(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Note the statistics of the base, before an adapter's take their place; returns mean and variance, (out,) both."""
    if "of_base" not in vars(norm):
        norm.of_base = norm.running_mean.clone(), norm.running_var.clone()
    return norm.of_base


def remember_replaced(model: nn.Module, tensors: Container[str]) -> None:
    """`remember_base` of the BatchNorms of which an adapter file has the statistics and nothing else.

    One that trained has scales and shifts of its own, and is the base's no more.
    """
    for name, module in model.named_modules():
        if f"{name}.running_mean" in tensors and f"{name}.weight" not in tensors:
            remember_base(module)


@contextlib.contextmanager
def statistics_of_base(model: nn.Module) -> Iterator[None]:
    """Within this block BatchNorms whose statistics belong to an adapter have those of the base."""
    norms = [module for module in model.modules() if "of_base" in vars(module)]
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    try:
        for norm in norms:
            _set_statistics(norm, norm.of_base)
        yield
    finally:
        for norm, statistics in zip(norms, before, strict=True):
            _set_statistics(norm, statistics)


@torch.no_grad()
def _set_statistics(norm: nn.BatchNorm2d, statistics: tuple[Tensor, Tensor]) -> None:
    norm.running_mean.copy_(statistics[0])
    norm.running_var.copy_(statistics[1])
