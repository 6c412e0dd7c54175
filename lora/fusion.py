"""Blocks in which an adapted layer and its neighbour are one computation, and what is recomputed in backward.

docs/how-it-works.md says what, and why. The block that holds both decides, at each call: if a child was replaced,
trains, has a hook, or is of a subclass, the block computes what the stock block computes. `fuse` gives blocks their
fused classes, as `torch.nn.utils.parametrize` does: the objects, their children and their keys stay as they are.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vision_transformer import Encoder, EncoderBlock, MLPBlock, VisionTransformer
from torchvision.ops.misc import Conv2dNormActivation

from lora.adapted import is_adapted, is_plain_attention
from lora.attention import attend
from lora.functional import RecomputedNorm, frozen_linear, max_pool2d_relu
from lora.weights import Weight
from toolkit import InputError, devices, temporarily
from toolkit.models.norms import FOLDING, Extended, Freezable, FreezableBatchNorm2d, extended, is_hooked, unextended


def _trains(module: nn.Module) -> bool:
    for parameter in module._parameters.values():  # as `parameters()`, in a fifth of the time
        if parameter is not None and parameter.requires_grad:
            return True
    return any(child is not None and _trains(child) for child in module._modules.values())


def folds(conv: nn.Module, norm: nn.Module) -> bool:
    """Is ``norm(conv(x))`` one convolution? Yes if the convolution is adapted and the BatchNorm constant."""
    return type(norm) in (nn.BatchNorm2d, FreezableBatchNorm2d) and _is_constant_behind(norm, conv)


def _is_constant_behind(norm: nn.BatchNorm2d, conv: nn.Module) -> bool:
    if not isinstance(conv, nn.Conv2d) or not is_adapted(conv) or norm.training or norm.running_mean is None:
        return False
    return not is_hooked(conv, norm) and not _trains(norm)


def conv_bn(conv: nn.Module, norm: nn.Module, x: Tensor, changes: bool = False) -> Tensor:
    """``norm(conv(x))``, as one convolution if possible. changes: may what comes next change the output in place?"""
    if folds(conv, norm):
        y = conv(x, batch_norm=norm)
        if changes and conv.followed is not None and y.requires_grad:  # backward reads the output
            y = y.clone()
        return y
    z = conv(x)
    if is_adapted(conv) and conv._is_active and conv.followed is not None and conv.followed.norm is norm:
        return conv.followed.normalize(conv, z)
    return norm(z)


def conv_bn_relu(conv: nn.Module, norm: nn.Module, relu: nn.Module, x: Tensor, input=None, downsample=None) -> Tensor:
    """``relu(norm(conv(x)))``, or with ``downsample(input)`` added before the ReLU, as one convolution if possible."""
    if folds(conv, norm) and type(relu) is nn.ReLU and not is_hooked(relu):
        residual = input if downsample is None else downsample(input)
        return conv(x, batch_norm=norm, residual=residual, relu=True)
    out = conv_bn(conv, norm, x, changes=True)
    residual = input if downsample is None else downsample(input)  # in this order a hook sees them
    if residual is not None:
        out += residual
    return relu(out)


def recomputes(operation: nn.Module, layer: nn.Module) -> bool:
    """Is ``layer(operation(x))`` to be ``layer(x, prologue=operation)``, which does not save the operation's output?"""
    if type(operation) is not nn.GELU and not _normalises_rows(operation):
        return False
    return is_adapted(layer) and not _trains(operation) and not is_hooked(operation, layer)


def _normalises_rows(module: nn.Module) -> bool:
    return type(module) is nn.LayerNorm and len(module.normalized_shape) == 1


def is_frozen_attention(attention: nn.Module) -> bool:
    """Is this a stock attention as ViTs have it, batch first, which does not train?"""
    plain = type(attention) is nn.MultiheadAttention and attention.batch_first and is_plain_attention(attention)
    return plain and not _trains(attention)


def frozen_attention(attention: nn.MultiheadAttention, x: Tensor, tokens: int | None = None) -> Tensor:
    """``attention(x, x, x)`` of a frozen attention: (N, L, E), or its first ``tokens`` tokens. x: (N, L, E)."""
    # The stock forward makes L products, in bf16 on a CPU each with a copy of the weight: 20 times as slow in ViT-B/16.
    q, k, v = frozen_linear(x, Weight(attention.in_proj_weight), attention.in_proj_bias).chunk(3, -1)
    attended, _ = attend(q[:, :tokens], k, v, attention)
    return frozen_linear(attended, Weight(attention.out_proj.weight), attention.out_proj.bias)


def apply_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; a frozen linear layer takes the fastest product."""
    if type(layer) is nn.Linear and not _trains(layer) and not is_hooked(layer):
        return frozen_linear(x, Weight(layer.weight), layer.bias)
    return layer(x)


def by_rows(*modules: nn.Module) -> bool:
    """Does each of these compute every row of its input, as (N, L, E), from that row alone?"""
    kinds = (nn.Linear, nn.GELU, nn.Dropout, nn.Identity, MLPBlock)
    return all(
        unextended(m) in kinds or _normalises_rows(m) or (isinstance(m, nn.Linear) and is_adapted(m))
        for module in modules
        for m in module.modules()
    )


def reads_class_token_alone(encoder: nn.Module) -> bool:
    """May the last block of this encoder leave out the patches? Not if a hook would see outputs without them."""
    if type(encoder) is not Encoder or type(encoder.layers) is not nn.Sequential or not encoder.layers:
        return False
    last = encoder.layers[-1]
    if not isinstance(last, FusedEncoderBlock) or is_hooked(encoder, encoder.layers, encoder.ln, *last.modules()):
        return False
    attention = last.self_attention
    known = type(attention) is nn.MultiheadAttention or is_adapted(attention)
    return known and attention.batch_first and by_rows(last.dropout, last.ln_2, last.mlp, encoder.ln)


def recomputable(forward: Callable) -> Callable:
    """Make a block's forward save only its input and run again in backward, if `set_gradient_checkpointing` says so."""

    @functools.wraps(forward)
    def run(self, *args, **kwargs):
        if "checkpointing" not in vars(self):
            return forward(self, *args, **kwargs)
        norms = [m for m in self.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
        if norms:  # they normalise by the batch again, in the second run, and do not count it twice
            alone = {"momentum": 0.0, "num_batches_tracked": None}
            kwargs["context_fn"] = lambda: (contextlib.nullcontext(), temporarily(norms, **alone))
        # The reentrant kind gives no gradients if the block's input needs none, as in the first block.
        return checkpoint(forward, self, *args, use_reentrant=False, **kwargs)

    return run


class FusedBlock(Extended):
    """The block of ResNet-18 and 34, or of ResNet-50 and larger, with its BatchNorms folded."""

    @recomputable
    def forward(self, x: Tensor) -> Tensor:
        out = conv_bn_relu(self.conv1, self.bn1, self.relu, x)
        conv, norm = self.conv2, self.bn2
        if isinstance(self, Bottleneck):
            out = conv_bn_relu(conv, norm, self.relu, out)
            conv, norm = self.conv3, self.bn3
        return conv_bn_relu(conv, norm, self.relu, out, x, self.downsample)


class FusedSequential(Extended):
    """`nn.Sequential`, as in MoCo v3's convolutional stem, each BatchNorm folded into the convolution before it."""

    def forward(self, input: Tensor) -> Tensor:
        modules = list(self)
        while modules:
            module = modules.pop(0)
            if isinstance(module, nn.Conv2d) and modules and isinstance(modules[0], nn.BatchNorm2d):
                input = conv_bn(module, modules.pop(0), input, changes=bool(modules) or is_hooked(self))
            else:
                input = module(input)
        return input


class FusedResNet(Extended):
    """torchvision's ResNet with the stem's BatchNorm folded, and the stem pooled before its ReLU."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        return resnet_from_stage(self, self.stem(x))

    def first_layer(self, x: Tensor) -> Tensor:
        return conv_bn(self.conv1, self.bn1, x)

    def stem(self, x: Tensor) -> Tensor:
        relu, pool = self.relu, self.maxpool
        x = self.first_layer(x)
        if type(relu) is nn.ReLU and type(pool) is nn.MaxPool2d and not is_hooked(relu, pool):
            return max_pool2d_relu(x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
        return pool(relu(x))


def resnet_from_stage(model: ResNet, x: Tensor, first: int = 0) -> Tensor:
    """The model's output from the input of one of its stages; 0 is the first."""
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4)[first:]:
        x = stage(x)
    return model.fc(torch.flatten(model.avgpool(x), 1))


class FusedMLPBlock(Extended):
    """The MLP of a ViT: linear layer, GELU, dropout, linear layer, dropout. GELU is recomputed in backward."""

    def forward(self, input: Tensor, prologue: nn.Module | None = None) -> Tensor:
        """``mlp(prologue(input))``. The first layer recomputes the prologue, if `recomputes` allows that."""
        linear, *rest = self
        x = apply_layer(linear, input) if prologue is None else linear(input, prologue=prologue)
        if len(rest) > 2:
            gelu, dropout, linear, *after = rest
            if type(dropout) is nn.Dropout and dropout.p == 0 and not is_hooked(dropout) and recomputes(gelu, linear):
                x = linear(x, prologue=gelu)
                rest = after
        for module in rest:
            x = apply_layer(module, x)
        return x


class FusedEncoderBlock(Extended):
    """The block of a ViT. Each LayerNorm is recomputed in backward by the adapted layer behind it."""

    @recomputable
    def forward(self, input: Tensor, tokens: int | None = None) -> Tensor:
        """The block's output (N, L, E), or only its first ``tokens`` tokens, if `by_rows` allows that."""
        torch._assert(input.dim() == 3, f"Expected (batch_size, seq_length, hidden_dim) got {input.shape}")
        attention = self.self_attention
        mlp = self.mlp
        residual = input if tokens is None else input[:, :tokens]
        if recomputes(self.ln_1, attention):
            x, _ = attention(residual, input, input, need_weights=False, prologue=self.ln_1)
        elif is_frozen_attention(attention) and not is_hooked(attention, attention.out_proj):
            x = frozen_attention(attention, self.ln_1(input), tokens)
        else:
            x = self.ln_1(input)
            x, _ = attention(x if tokens is None else x[:, :tokens], x, x, need_weights=False)
        attended = self.dropout(x)
        x = attended + residual
        if not isinstance(mlp, FusedMLPBlock) or is_hooked(mlp) or not recomputes(self.ln_2, mlp[0]):
            return x + mlp(self.ln_2(x))
        prologue = self.ln_2
        if attended.dtype != x.dtype:
            prologue = RecomputedNorm(self.ln_2, (attended, residual))  # half as wide as the sum, and saved anyway
        return x + mlp(x, prologue=prologue)


class FusedVisionTransformer(Extended):
    """torchvision's ViT. Its last block computes the class token alone, since nothing else of its output is read."""

    def forward(self, x: Tensor) -> Tensor:
        x = self._process_input(x)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)  # (N, 1 + patches, hidden_dim)
        encoder = self.encoder
        if not reads_class_token_alone(encoder):
            return self.heads(encoder(x)[:, 0])
        return vit_from_block(self, encoder.dropout(x + encoder.pos_embedding))


def vit_from_block(model: VisionTransformer, x: Tensor, first: int = 0) -> Tensor:
    """The model's output from the input of one of its blocks, (N, 1 + patches, E); 0 is the first."""
    *blocks, last = list(model.encoder.layers)[first:]
    for block in blocks:
        x = block(x)
    x = last(x, tokens=1) if reads_class_token_alone(model.encoder) else last(x)
    return model.heads(model.encoder.ln(x)[:, 0])


class FusedTimmBlock(Extended):
    """A block of timm's with its BatchNorms folded: each is computed right behind the convolution registered before it.

    timm's own forward runs: the convolution folds the BatchNorm in, which then finds its work done, see `FOLDING`.
    """

    def forward(self, *args, **kwargs):
        if devices.is_traced():
            return super().forward(*args, **kwargs)
        norms = {}
        for conv, norm in itertools.pairwise(self.children()):
            if isinstance(norm, Freezable) and norm.has_activation and _is_constant_behind(norm, conv):
                norms[conv] = norm
        before = FOLDING.set(norms)
        try:
            return super().forward(*args, **kwargs)
        finally:
            FOLDING.reset(before)


class WidenedConv2d(Extended):
    """A depthwise convolution with a stride, which trains in float32 where a CPU autocasts to bfloat16.

    In bfloat16 oneDNN takes 16 to 250 times as long for the gradient of the input. Adapted layers see to it themselves
    (`backends.conv2d_gradient`): these are of other classes, such as timm's `Conv2dSame`, and get no adapter.
    """

    def forward(self, x: Tensor) -> Tensor:
        narrows = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and not devices.is_traced()
        if not narrows or not torch.is_grad_enabled():
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(torch.get_autocast_dtype("cpu"))


# Each by its name, for timm may be missing: they become a `FusedTimmBlock`.
TIMM_BLOCKS = {"ConvBnAct", "ConvNormAct", "DepthwiseSeparableConv", "EdgeResidual", "InvertedResidual"}
FUSED = {ResNet: FusedResNet, BasicBlock: FusedBlock, Bottleneck: FusedBlock}
FUSED |= {EncoderBlock: FusedEncoderBlock, MLPBlock: FusedMLPBlock, VisionTransformer: FusedVisionTransformer}
FUSED |= dict.fromkeys((nn.Sequential, Conv2dNormActivation), FusedSequential)


def fuse(model: nn.Module) -> None:
    """Give each block the class, fused or stock, that what is adapted and frozen now asks for."""
    for block in reversed(list(model.modules())):  # children before their parents
        stock = unextended(block)
        if stock.__module__.startswith("timm.") and stock.__name__ in TIMM_BLOCKS:
            FUSED[stock] = FusedTimmBlock
        if isinstance(block, nn.Conv2d) and stock is not nn.Conv2d and not is_adapted(block):
            is_depthwise = block.groups == block.in_channels == block.out_channels
            if is_depthwise and max(block.stride) > 1:
                block.__class__ = extended(stock, WidenedConv2d)
        if stock in FUSED:
            inside = block.modules() if stock is VisionTransformer else block.children()
            gains = "checkpointing" in vars(block) or any(is_adapted(m) or isinstance(m, FusedMLPBlock) for m in inside)
            gains |= stock is MLPBlock and not _trains(block)
            gains |= stock is EncoderBlock and is_frozen_attention(block.self_attention)
            block.__class__ = extended(stock, FUSED[stock]) if gains else stock
    _set_fast_paths(model)


def unfuse(model: nn.Module) -> None:
    """Give every block and BatchNorm its stock class again, unfrozen and without gradient checkpointing."""
    for module in model.modules():
        if isinstance(module, Extended):
            module.__class__ = unextended(module)
            vars(module).pop("frozen", None)
            vars(module).pop("checkpointing", None)
    _set_fast_paths(model)


def _set_fast_paths(model: nn.Module) -> None:
    """Set the flags of modules that would read raw weights, past every adapter; without adapters, set them back."""
    # They are in PyTorch's encoders in eval mode, and in timm's BEiT, EVA-02 and Swin v2.
    without = {"activation_relu_or_gelu": False, "use_nested_tensor": False, "qkv_bias_separate": True}
    for module in model.modules():
        for flag in without.keys() & vars(module).keys():
            if any(map(is_adapted, module.modules())):
                vars(module).setdefault("stock_fast_path", getattr(module, flag))
                setattr(module, flag, without[flag])
            elif "stock_fast_path" in vars(module):
                setattr(module, flag, vars(module).pop("stock_fast_path"))


def set_gradient_checkpointing(model: nn.Module, mode: str = "none") -> None:
    """Trade time for memory: which activations are computed again in backward instead of saved.

    - 'none': the outputs of a ViT's LayerNorm and GELU, six of its sixteen activations, which costs no time.
    - 'full': all but the input of each block. Raises InputError in a model without anything to recompute.
    """
    if mode not in ("none", "full"):
        raise InputError(f"gradient checkpointing {mode!r} is unknown: choose none or full")
    full = mode == "full"
    blocks = [m for m in model.modules() if unextended(m) in (EncoderBlock, BasicBlock, Bottleneck)]
    by_itself = False
    if hasattr(model, "set_grad_checkpointing"):  # a model of timm
        with contextlib.suppress(AssertionError):  # which timm raises if this one cannot
            model.set_grad_checkpointing(full)
            by_itself = True
    if full and not by_itself and not blocks:
        raise InputError("gradient checkpointing full finds nothing to recompute in this model")
    for block in blocks:
        vars(block).pop("checkpointing", None)
        if full:
            block.checkpointing = True
    fuse(model)
