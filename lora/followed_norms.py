"""BatchNorms whose statistics follow the adapters: training through them at almost no cost.

LoRA over a frozen BatchNorm lacks a gradient through the statistics, which keeps the activations in range. But for
given inputs they are a function of the kernel K:

    mean = K m        var = diag(K C K^T)        (m and C: mean and covariance of the patches that K is applied to)

With the inputs that the base network has on some training images, K = W + s B A changes the base's statistics to

    mean' = mean + s B A m        var' = var v(W + s B A) / v(W),        v(K) = diag(K C K^T)

C is held by its few principal components, so that this costs products of A with k rows. The gradient through it is that
of BatchNorm (Ioffe and Szegedy, arXiv 1502.03167) for fixed inputs, over many images in place of the batch. The
statistics belong to the adapter: its convolution's `followed` has them, and the BatchNorm only while it is merged.
"""

import contextlib
import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models.resnet import BasicBlock, Bottleneck

from lora import adapted, functional, fusion
from toolkit import InputError, dotted, temporarily
from toolkit.answers.evaluation import estimate_statistics, eval_mode
from toolkit.models.norms import FreezableBatchNorm2d, constant_scale_and_shift, unextended

PATCHES = 512  # how many patches C is estimated from
COMPONENTS = 64  # how many principal components of C are kept
SHARE_ADDED = 0.01  # of var, to v, which is near 0 in a channel that is dead on the images
LEAST_RATIO = 1e-4  # of var' to var: above 0 in spite of rounding
LEAST_SPREAD = 1e-20  # v(W) of a channel that is always 0, by which v(W + s B A) is divided
STATISTICS = ("running_mean", "running_var")  # their names in a BatchNorm


class AdapterStatistics:
    """The mean and variance, (out,) each, that a BatchNorm has with the adapter of the convolution before it."""

    def __init__(self, norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor):
        self.norm = norm
        self.base_mean = norm.running_mean.clone()
        self.base_variance = norm.running_var.clone()
        self.mean = mean
        self.variance = variance

    def statistics(self, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
        """Mean and variance (out,) of the convolution's output with its adapter."""
        return self.mean, self.variance

    def normalize(self, conv: nn.Conv2d, z: Tensor) -> Tensor:
        """``norm(z)`` of the convolution's output z (N, out, H, W), where it is not folded."""
        if self.norm.training:  # it goes on from these statistics, and is the adapter's no more
            settle(conv)
            return self.norm(z)
        mean, variance = self.statistics(conv)
        if mean.requires_grad:  # zeros, added to the BatchNorm's input, take the gradient of its statistics
            log_scale = -0.5 * (variance + self.norm.eps).log()
            centred = z.detach() - mean.detach()[:, None, None]
            carrier = centred * log_scale[:, None, None] - mean[:, None, None]
            z = z + (carrier - carrier.detach())
        return functional_call(self.norm, {"running_mean": mean.detach(), "running_var": variance.detach()}, z)

    @torch.no_grad()
    def merge(self, conv: nn.Conv2d) -> None:
        """Give the BatchNorm itself the adapter's statistics."""
        mean, variance = self.statistics(conv)
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(variance)

    def unmerge(self) -> None:
        """Give the BatchNorm the base's statistics back, bit for bit."""
        self.norm.running_mean.copy_(self.base_mean)
        self.norm.running_var.copy_(self.base_variance)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """As `nn.Module._apply`: this is no module, which would be moved with its model."""
        vars(self).update({name: fn(value) for name, value in vars(self).items() if isinstance(value, Tensor)})


class FollowedNorm(AdapterStatistics):
    """Mean and variance as a function of the adapter, which still does nothing. patches: (P, fan_in), its input."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, patches: Tensor):
        # They start at the adapter's own, if it has such.
        own = conv.followed or AdapterStatistics(norm, norm.running_mean.clone(), norm.running_var.clone())
        super().__init__(norm, own.mean, own.variance)
        self.centre = patches.mean(0)
        self.inputs = principal_components(patches - self.centre, COMPONENTS)  # (k, fan_in): C = inputs^T inputs
        outputs = self.inputs @ conv.base().dense(patches.dtype).flatten(1).T  # (k, out)
        self.doubled = 2 * outputs
        self.spread = (outputs.square().sum(0) + SHARE_ADDED * self.variance).clamp_min(LEAST_SPREAD)  # v(W), (out,)

    def statistics(self, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
        A = conv.lora_A  # (r, fan_in)
        with torch.autocast(A.device.type, enabled=False):
            sB = conv.scaling * conv.lora_B  # (out, r)
            h = self.inputs @ A.T  # (k, r)
            change = (sB * (self.doubled.T @ h + sB @ (h.T @ h))).sum(1)  # of v, (out,)
            shift = sB @ (A @ self.centre)  # of the mean, (out,)
            return self.mean + shift, self.variance * (1 + change / self.spread).clamp_min(LEAST_RATIO)


def principal_components(rows: Tensor, number: int) -> Tensor:
    """The directions of largest variance of centred rows (P, D), each as long as its standard deviation: (k, D)."""
    # LAPACK may not converge on zeros: of inputs that never vary, such as padding, and of patches that are the mean.
    varies = rows.abs().amax(0) > 0
    own = rows[rows.abs().amax(1) > 0][:, varies].double()
    number = min(number, *rows.shape)
    if len(own) < own.shape[1]:  # of both products the smaller is decomposed
        _, turned = torch.linalg.eigh(own @ own.T)  # in ascending order
        found = turned.T[-number:] @ own
    else:
        squares, directions = torch.linalg.eigh(own.T @ own)
        found = (directions * squares.clamp_min(0).sqrt()).T[-number:]
    components = rows.new_zeros(number, rows.shape[1])
    components[: len(found), varies] = (found / math.sqrt(len(rows))).to(rows.dtype)
    return components


def patches_of(conv: nn.Conv2d, x: Tensor, number: int) -> Tensor:
    """Some patches of x (N, in, H, W) that the kernel is applied to: (number, in * kh * kw), always the same."""
    x, (vertical, horizontal) = functional.pad_for_conv2d(x, conv)
    windows = F.pad(x, (horizontal, horizontal, vertical, vertical))
    for dim in (0, 1):
        windows = windows.unfold(2 + dim, conv.dilation[dim] * (conv.kernel_size[dim] - 1) + 1, conv.stride[dim])
    windows = windows[..., :: conv.dilation[0], :: conv.dilation[1]]  # a view (N, in, H', W', kh, kw)
    N, _, height, width = windows.shape[:4]
    drawn = torch.randint(N * height * width, (number,), generator=torch.Generator().manual_seed(0)).to(x.device)
    image, row, column = torch.unravel_index(drawn, (N, height, width))
    return windows[image, :, row, column].flatten(1)  # (number, in, kh, kw) before


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """The convolutions and BatchNorms in the blocks of torchvision's ResNets: others may change an output in place."""
    for block in model.modules():  # a ResNet's first pair is in none: its output, the largest, would have to be saved
        if unextended(block) in (BasicBlock, Bottleneck):
            layers = block._modules
            found = [(layers[f"conv{n}"], layers[f"bn{n}"]) for n in "123" if f"conv{n}" in layers]
            if isinstance(block.downsample, nn.Sequential):
                found += itertools.pairwise(block.downsample)
            for conv, norm in found:
                known = type(norm) in (nn.BatchNorm2d, FreezableBatchNorm2d) and norm.running_mean is not None
                if known and isinstance(conv, nn.Conv2d) and conv.groups == 1:
                    yield conv, norm


def _adapted_pairs(model: nn.Module) -> dict[nn.Conv2d, nn.BatchNorm2d]:
    return {conv: norm for conv, norm in _pairs(model) if fusion.folds(conv, norm) and conv.r > 0}


@torch.no_grad()
def own_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Give adapters that still do nothing the statistics of the BatchNorms behind them on these images: their mean over
    batches (N, C, H, W) of two images or more. The BatchNorms keep their own (AdaBN, arXiv 1603.04779)."""
    pairs = _adapted_pairs(model)
    norms = list(pairs.values())
    stored = copy.deepcopy([norm.state_dict() for norm in norms])
    some = ((batch, None) for batch in batches if len(batch) > 1)  # one image has no variance in an output of one pixel
    with temporarily(norms, frozen=False):  # these alone, since all others are frozen
        estimate_statistics(model, some, next(model.parameters()).device, torch.float32)
    for (conv, norm), of_base in zip(pairs.items(), stored, strict=True):
        own = (norm.running_mean.clone(), norm.running_var.clone())
        norm.load_state_dict(of_base)
        conv.followed = AdapterStatistics(norm, *own)


@torch.no_grad()
def follow_statistics(model: nn.Module, batches: Iterable[Tensor], required: bool = False) -> None:
    """Let the frozen BatchNorms folded into adapted convolutions follow the adapters, which still do nothing."""
    norm_of = _adapted_pairs(model)
    if not norm_of and required:
        raise InputError("--norms follow: no adapted convolution of a ResNet has a frozen BatchNorm behind it; drop it")
    batches = list(batches) if norm_of else []
    patches = defaultdict(list)

    def keep_some(conv: nn.Conv2d, inputs: tuple[Tensor]) -> None:
        patches[conv].append(patches_of(conv, inputs[0].to(conv.lora_A.dtype), math.ceil(PATCHES / len(batches))))

    with contextlib.ExitStack() as hooks, eval_mode(model):
        for conv in norm_of:
            hooks.enter_context(conv.register_forward_pre_hook(keep_some))
        for batch in batches:
            model(batch)
    for conv, own in patches.items():
        conv.followed = FollowedNorm(conv, norm_of[conv], torch.cat(own))


def followers(model: nn.Module) -> list[nn.Conv2d]:
    """The convolutions whose adapters have statistics of their own."""
    return [module for module in model.modules() if adapted.is_adapted(module) and module.followed is not None]


def settle(conv: nn.Conv2d) -> None:
    """Give the BatchNorm itself, which is to train, the adapter's statistics: it follows no more."""
    if not conv.merged:
        conv.followed.merge(conv)
    conv.followed = None


def folded_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``g = gamma / sqrt(var + eps)``, ``log |g|`` but for a constant, ``beta + (bias - mean) g``: (out,) each."""
    if norm is None:
        return None, None, conv.bias
    mean = norm.running_mean
    variance = norm.running_var
    if conv._is_active and conv.followed is not None and conv.followed.norm is norm:  # merged, the norm itself has them
        mean, variance = conv.followed.statistics(conv)
    scale, shift = constant_scale_and_shift(norm, mean, variance, conv.bias)
    if not variance.requires_grad:
        return scale, None, shift
    return scale.detach(), -0.5 * (variance + norm.eps).log(), shift  # the logarithm takes the gradient of g


def base_statistics(model: nn.Module) -> dict[Tensor, Tensor]:
    """The statistics of the base, by the buffers in which a merged adapter has put its own."""
    statistics = {}
    for conv in followers(model):
        if conv.merged:
            statistics[conv.followed.norm.running_mean] = conv.followed.base_mean
            statistics[conv.followed.norm.running_var] = conv.followed.base_variance
    return statistics


@torch.no_grad()
def named_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The statistics that belong to the adapters, by the names that they have in adapter files."""
    names = {module: name for name, module in model.named_modules()}
    tensors = {}
    for conv in followers(model):
        own = [dotted(names[conv.followed.norm], leaf) for leaf in STATISTICS]
        tensors |= zip(own, conv.followed.statistics(conv), strict=True)
    return tensors


def statistics_in_file(model: nn.Module, content: dict) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d, str, str]]:
    """Yield (convolution, BatchNorm, names of mean and variance) if a file has the adapter's statistics for them."""
    names = {module: name for name, module in model.named_modules()}
    in_file = content["tensors"].keys()
    for conv, norm in _pairs(model):
        has_adapter = content["layers"].get(names[conv], {"r": 0})["r"] > 0
        leaves = (*STATISTICS, "weight", "bias", "num_batches_tracked")
        mean, variance, *trained = (dotted(names[norm], leaf) for leaf in leaves)
        # A BatchNorm that trained has one of the others in the file too, and is the base's.
        if has_adapter and in_file & {mean, variance} and in_file.isdisjoint(trained):
            yield conv, norm, mean, variance


def read_statistics(model: nn.Module, content: Mapping[str, Any]) -> set[str]:
    """Give the adapters in use the statistics that a file has of them. Returns the names of these tensors."""
    for conv in followers(model):
        conv.followed = None
    read = set()
    tensors = content["tensors"]
    for conv, norm, mean_name, variance_name in statistics_in_file(model, content):
        read |= {mean_name, variance_name}
        mean = tensors.get(mean_name, norm.running_mean).to(norm.running_mean, copy=True)
        variance = tensors.get(variance_name, norm.running_var).to(norm.running_var, copy=True)
        conv.followed = AdapterStatistics(norm, mean, variance)
    return read
