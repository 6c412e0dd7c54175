"""Fine-tune a MoCo-pretrained backbone with LoRA or QLoRA.

    python finetune_lora.py                                          # shipped backbone, embedded digits, CPU, a minute
    python finetune_lora.py --use-qlora --lora-rank 4                # the frozen weights in 4 bits
    python finetune_lora.py --checkpoint moco_v2_800ep.pth.tar --data-dir my_images --epochs 20
    python finetune_lora.py --lora-rank 0 --no-freeze-backbone       # full fine-tuning, for comparison

The file reads from top to bottom: the adapted layers, how they get into a model, what trains and what does not, and
the training loop with its command line. The tensor arithmetic under the layers is in `lora_functional.py`, adapter
files in `lora_utils.py`.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vision_transformer import EncoderBlock

from lora_functional import (
    Geometry,
    NF4Weight,
    bitsandbytes_functional,
    dense_weight,
    effective_kernel,
    effective_weight,
    lora_conv2d,
    lora_linear,
)
from lora_utils import base_digests, tensor_digest
from moco import InputError
from moco.backbones import head_name

PATCH_EMBEDDINGS = ("conv_proj", "patch_embed")  # MoCo v3 keeps a ViT's patch embedding frozen (2104.02057, section 4)

# ------------------------------------------------------------------------------------------------------- the layers


class LoRALayer:
    """What every adapted layer shares: a frozen weight plus a trained low-rank update (LoRA, arXiv 2106.09685, eq. 3),

        W_eff = W + (alpha / r) B A,     A: (r, fan_in) random,  B: (fan_out, r) zero at the start,

    or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732). Each adapted layer *is* the layer it adapts: it keeps
    `weight` and `bias` under their names, so a base model's keys never change. A and B are float32 masters in any model
    of lower precision. Dropout acts on what A sees: ``y = W x + s B A dropout(x)``.

    Args (beyond those of the layer adapted):
        r: rank, at least 1.
        lora_alpha: the update is scaled by alpha / r.
        lora_dropout: 0 <= p < 1.
        use_rslora: scale by alpha / sqrt(r) instead.
    """

    def __init__(self, *args, r=8, lora_alpha=16, lora_dropout=0.0, use_rslora=False, **kwargs):
        super().__init__(*args, **kwargs)
        self._start(r, lora_alpha, lora_dropout, use_rslora)

    @classmethod
    def adapt(cls, layer: nn.Module, r=8, lora_alpha=16, lora_dropout=0.0, use_rslora=False) -> "LoRALayer":
        """Turn a stock layer into its adapted kind, in place: same object, same parameters, same place in the tree."""
        if type(layer) is not cls:
            layer.stock_class = type(layer)
            layer.__class__ = cls
        layer._start(r, lora_alpha, lora_dropout, use_rslora)
        return layer

    def _start(self, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool) -> None:
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_enabled = True
        self._base_data: dict[str, Tensor] = {}  # while merged: the weights as they were
        self._neighbours: tuple[nn.Module, ...] = ()  # operations taken in; a tuple, so they stay out of the tree
        self._create_adapters()
        self.reset_lora_parameters()

    def _add_adapter(self, weight_name: str, suffix: str = "", fan_out: int | None = None) -> None:
        base = self.base(weight_name)
        dtype = torch.float64 if getattr(base, "dtype", None) == torch.float64 else torch.float32
        shapes = {"lora_A": (self.r, math.prod(base.shape[1:])), "lora_B": (fan_out or base.shape[0], self.r)}
        for name, shape in shapes.items():
            tensor = torch.empty(shape, dtype=dtype, device=self._parameters[weight_name].device)
            self.register_parameter(name + suffix, nn.Parameter(tensor))

    def reset_lora_parameters(self) -> None:
        """A as `nn.Linear` starts its weight, B zero: the adapted layer begins as the base layer exactly."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("lora_A"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            elif name.startswith("lora_B"):
                nn.init.zeros_(parameter)

    def remove_lora(self) -> None:
        """Back to the stock layer, its weights as they were."""
        self.unmerge()
        for name in [name for name in self._parameters if name.startswith("lora_")]:
            delattr(self, name)
        for neighbour in self._neighbours:
            neighbour.release()
        self._neighbours = ()
        self.__class__ = self.stock_class

    # A kind of layer says which weights it adapts (`weight_names`), with what (`_create_adapters`) and what they become
    # (`effective_weights`).

    def base(self, name: str = "weight") -> Tensor | NF4Weight:
        """The weight without the adapter, merged or not."""
        return self._base_data.get(name, self._parameters[name])

    @property
    def merged(self) -> bool:
        return bool(self._base_data)

    @torch.no_grad()
    def merge(self) -> None:
        """Put W_eff in the weight's place. Merging twice is merging once."""
        if not self.merged:
            base_data = {name: getattr(self, name).data for name in self.weight_names}
            for name, weight in self.effective_weights().items():
                getattr(self, name).data = weight
            self._base_data = base_data

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit: it was kept, not subtracted."""
        for name, weight in self._base_data.items():
            getattr(self, name).data = weight
        self._base_data = {}

    @property
    def _is_active(self) -> bool:
        return self.lora_enabled and not self.merged

    def _plain(self, name: str, dtype: torch.dtype) -> Tensor:
        """The dense weight of a layer whose adapter is merged or switched off."""
        weight = self._parameters[name] if self.lora_enabled else self.base(name)
        return weight if isinstance(weight, Tensor) else dense_weight(weight, dtype)

    def _dropped(self, x: Tensor) -> Tensor | None:
        return F.dropout(x, self.lora_dropout) if self.training and self.lora_dropout > 0 else None

    def absorbs(self, neighbour: "Absorbable") -> bool:
        """Is the operation next to this layer computed inside it? Both modules ask, so that it happens exactly once."""
        return (
            self._is_active
            and not any(getattr(self, name).requires_grad for name in self.weight_names)
            and neighbour.can_be_absorbed(by_dropout=self.training and self.lora_dropout > 0)
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # a merged layer has exactly the keys of the layer it adapts
            for name in [name for name in self._parameters if name.startswith("lora_")]:
                destination.pop(prefix + name)


class LoRALinear(LoRALayer, nn.Linear):
    """A linear layer with an adapter. x: (..., in_features) -> (..., out_features)."""

    weight_names = ("weight",)

    def _create_adapters(self) -> None:
        self._add_adapter("weight")

    def effective_weights(self) -> dict[str, Tensor]:
        """The dense weights that a merge puts in place, in the base's dtype."""
        return {"weight": _merged_rows(self.base(), self.lora_A, self.lora_B, self.scaling)}

    def forward(self, x: Tensor) -> Tensor:
        before = _absorbed_before(self)
        if not self._is_active:
            return F.linear(x, self._plain("weight", x.dtype), self.bias)
        return lora_linear(
            x, self.base(), self.lora_A, self.lora_B, self.bias, self.scaling, dropped=self._dropped(x), before=before
        )


class LoRAConv2d(LoRALayer, nn.Conv2d):
    """A convolution with an adapter, for any geometry. x: (N, in, H, W) or (in, H, W).

    The update is ``(B A)`` reshaped to the kernel, with fan_in = in / groups * kh * kw. A frozen BatchNorm right behind
    is folded in: its scale g and shift become the kernel's and the bias's, and the normalisation pass, with the
    activation that it would save, disappears.
    """

    weight_names = ("weight",)

    def _create_adapters(self) -> None:
        self._add_adapter("weight")

    def effective_weights(self) -> dict[str, Tensor]:
        W = dense_weight(self.base(), self.lora_B.dtype)
        return {"weight": _as_base(effective_kernel(W, self.lora_A, self.lora_B, self.scaling), self.base())}

    def _numeric_padding(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input padded where `conv2d` cannot do it (circular, a lopsided 'same'), and the rest as numbers."""
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return x, self.padding
        left, right, top, bottom = self._reversed_padding_repeated_twice
        if self.padding_mode == "zeros" and left == right and top == bottom:
            return x, (top, left)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, (left, right, top, bottom), mode=mode), (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        if not self._is_active:
            return self._conv_forward(x, self._plain("weight", x.dtype), self.bias)
        if x.dim() == 3:
            return self.forward(x[None])[0]
        row_scale, bias = None, self.bias
        for batch_norm in self._neighbours:
            if self.absorbs(batch_norm):
                row_scale, bias = batch_norm.scale_and_shift(bias)
        dropped = self._dropped(x)
        x, padding = self._numeric_padding(x)
        if dropped is not None:
            dropped, _ = self._numeric_padding(dropped)
        geometry = Geometry(self.stride, padding, self.dilation, self.groups)
        return lora_conv2d(x, self.base(), self.lora_A, self.lora_B, bias, self.scaling, geometry, row_scale, dropped)


class LoRAMultiheadAttention(LoRALayer, nn.MultiheadAttention):
    """Attention with adapters on the q, k, v and output projections; called exactly as `nn.MultiheadAttention`.

    q, k and v have an adapter each (`lora_A_q`, `lora_B_q`, ...), the output projection is a `LoRALinear`. On
    self-attention the three are one product with the packed weight. Dropout draws one mask for each distinct input.
    """

    _linear_kind = LoRALinear

    def _create_adapters(self) -> None:
        packed = self.in_proj_weight is not None
        self.weight_names = ("in_proj_weight",) if packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        for i, projection in enumerate("qkv"):
            self._add_adapter(self.weight_names[0 if packed else i], f"_{projection}", self.embed_dim)
        self._linear_kind.adapt(self.out_proj, self.r, self.lora_alpha, self.lora_dropout, self.use_rslora)

    def remove_lora(self) -> None:
        self.out_proj.remove_lora()
        super().remove_lora()

    def _factors(self) -> tuple[list[Tensor], list[Tensor]]:
        return [getattr(self, f"lora_A_{p}") for p in "qkv"], [getattr(self, f"lora_B_{p}") for p in "qkv"]

    def effective_weights(self) -> dict[str, Tensor]:
        A, B = self._factors()
        if self.weight_names == ("in_proj_weight",):
            A, B = [torch.cat(A)], [torch.cat(B)]
        return {
            name: _merged_rows(self.base(name), a, b, self.scaling, groups=len(a) // self.r)
            for name, a, b in zip(self.weight_names, A, B, strict=True)
        }

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k, v before they are split into heads: (N, L, embed_dim) and (N, S, embed_dim) twice."""
        packed = self.weight_names == ("in_proj_weight",)
        before = _absorbed_before(self)
        if packed and self._is_active and query is key and key is value:
            A, B = (torch.cat(factors) for factors in self._factors())
            dropped = self._dropped(query)
            qkv = lora_linear(
                query, self.base("in_proj_weight"), A, B, self.in_proj_bias, self.scaling, 3, dropped, before
            )  # (N, L, E) -> (N, L, 3 E)
            return list(qkv.chunk(3, -1))
        inputs = {id(x): x if before is None else before(x) for x in (query, key, value)}
        dropped = {name: self._dropped(x) for name, x in inputs.items()}
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        projected = []
        for i, (x, A, B) in enumerate(zip((query, key, value), *self._factors(), strict=True)):
            name = "in_proj_weight" if packed else self.weight_names[i]
            rows = slice(i * self.embed_dim, (i + 1) * self.embed_dim) if packed else slice(0, self.embed_dim)
            if self._is_active:
                W = self.base(name)
                W = W.rows(rows.start, rows.stop) if isinstance(W, NF4Weight) else W[rows]
                y = lora_linear(inputs[id(x)], W, A, B, biases[i], self.scaling, dropped=dropped[id(x)])
            else:
                y = F.linear(inputs[id(x)], self._plain(name, x.dtype)[rows], biases[i])
            projected.append(y)
        return projected

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`: shapes, masks (True or -inf blocks) and what is returned are the same."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: give the mask as well")
        if query.is_nested:
            raise RuntimeError("LoRAMultiheadAttention takes padded tensors: call to_padded_tensor on a nested one")
        is_batched = query.dim() == 3
        arrange = _batch_first(self.batch_first, is_batched)
        same = query is key and key is value
        q = arrange(query)
        k, v = (q, q) if same else (arrange(key), arrange(value))
        q, k, v = self._project(q, k, v)
        if not is_batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        k, v, mask = self._extend_and_mask(q, k, v, attn_mask, key_padding_mask)
        attended, weights = self._attend(q, k, v, mask, need_weights)
        output = self.out_proj(attended)  # (N, L, E)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)  # (N, H, L, S) -> (N, L, S)
        if not is_batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def _extend_and_mask(self, q, k, v, attn_mask, key_padding_mask):
        """bias_k, bias_v and the zero position behind the sequence, and both masks as one additive mask or None."""
        N, masks = len(q), []
        if attn_mask is not None:  # (L, S) or (N * H, L, S)
            mask = _additive(attn_mask, q)
            masks.append(mask if mask.dim() == 2 else mask.unflatten(0, (N, self.num_heads)))
        if key_padding_mask is not None:
            masks.append(_additive(key_padding_mask, q)[:, None, None])  # (N, 1, 1, S)
        extra_k, extra_v = [], []
        if self.bias_k is not None:
            extra_k.append(self.bias_k.expand(N, -1, -1)), extra_v.append(self.bias_v.expand(N, -1, -1))
        if self.add_zero_attn:
            zero = k.new_zeros(N, 1, self.embed_dim)
            extra_k.append(zero), extra_v.append(zero)
        if extra_k:
            k, v = (torch.cat([t, *(e.to(t.dtype) for e in extra)], 1) for t, extra in ((k, extra_k), (v, extra_v)))
        mask = sum(masks[1:], masks[0]) if masks else None
        return k, v, None if mask is None else F.pad(mask, (0, len(extra_k)))  # what was added is visible to all

    def _attend(self, q, k, v, mask, need_weights):
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))  # (N, H, ., D)
        p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)  # (N, H, L, S)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), p)
            attended = weights.to(v.dtype) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, p)
        return attended.transpose(1, 2).flatten(-2), weights  # (N, L, E)


def _batch_first(already: bool, is_batched: bool):
    """What brings (L, E), (L, N, E) or (N, L, E) to (N, L, E)."""
    if not is_batched:
        return lambda x: x[None]
    return (lambda x: x) if already else (lambda x: x.transpose(0, 1))


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A boolean mask (True blocks) or an additive one, as an additive one of the scores' dtype."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


def _merged_rows(base: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float, groups: int = 1) -> Tensor:
    # In the adapters' precision: added on a bfloat16 grid, a small update would vanish before it is rounded once.
    return _as_base(effective_weight(dense_weight(base, B.dtype), A, B, scaling, groups), base)


def _as_base(weight: Tensor, base: Tensor | NF4Weight) -> Tensor:
    """A merged weight has the dtype of its base; 4 bits merge into float."""
    return weight.to(base.dtype) if isinstance(base, Tensor) else weight


def _absorbed_before(layer: LoRALayer):
    """The pointwise operation that this layer has taken over from the module in front of it, or None."""
    return next((neighbour.operation for neighbour in layer._neighbours if layer.absorbs(neighbour)), None)


class _FourBits:
    """The base in NF4 (QLoRA, arXiv 2305.14314): `weight` holds the packed bytes, no float copy of it is kept.

    The weight is dequantised for each product, forward and backward, and dropped. Merging gives a float weight.
    """

    _nf4_state: dict = {}  # noqa: RUF012 - never changed in place; what a layer that is not quantised yet has

    def _start(self, *lora) -> None:
        super()._start(*lora)
        if not self._nf4_state:
            # The adapter file identifies its base by the weights as they were before rounding.
            self.float_digests = {name: tensor_digest(self._parameters[name]) for name in self.weight_names}
            nf4 = {name: NF4Weight.quantize(self._parameters[name]) for name in self.weight_names}
            self._nf4_state = {name: (weight.state, weight.shape) for name, weight in nf4.items()}
            self._parameters.update({n: nn.Parameter(w.packed, requires_grad=False) for n, w in nf4.items()})

    def base(self, name: str = "weight") -> Tensor | NF4Weight:
        base = super().base(name)
        return NF4Weight(base, *self._nf4_state[name]) if name in self._nf4_state else base

    def remove_lora(self) -> None:
        raise InputError("a layer quantised to 4 bits cannot become float again: load the checkpoint once more")

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name, (state, _) in self._nf4_state.items():
            state.to(self._parameters[name].device)
        return self

    # The quantisation constants travel beside the bytes, under the names that bitsandbytes gives them.

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.merged:
            for name, (state, _) in self._nf4_state.items():
                for key, value in state.as_dict(packed=True).items():
                    destination[f"{prefix}{name}.{key}"] = value

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        for name, (state, shape) in list(self._nf4_state.items()):
            start = f"{prefix}{name}."
            constants = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
            if constants:
                device = self._parameters[name].device
                self._nf4_state[name] = type(state).from_dict(constants, device), shape
                unexpected[:] = [key for key in unexpected if not key.startswith(start)]
            elif strict:
                missing.append(start + "absmax")


class QLoRALinear(_FourBits, LoRALinear):
    """`LoRALinear` over a 4-bit base."""


class QLoRAConv2d(_FourBits, LoRAConv2d):
    """`LoRAConv2d` over a 4-bit base."""


class QLoRAMultiheadAttention(_FourBits, LoRAMultiheadAttention):
    """`LoRAMultiheadAttention` over a 4-bit base, the output projection's included."""

    _linear_kind = QLoRALinear


# Which layer becomes what: with float and with 4-bit base. Exact types: a subclass may compute something else.
ADAPTED = {
    nn.Linear: (LoRALinear, QLoRALinear),
    nn.Conv2d: (LoRAConv2d, QLoRAConv2d),
    nn.MultiheadAttention: (LoRAMultiheadAttention, QLoRAMultiheadAttention),
}

# ---------------------------------------------------------------------------------------------- the layers' neighbours


class Freezable:
    """A BatchNorm whose running statistics stay as they are while it is frozen, whatever `train()` says."""

    frozen = False

    def train(self, mode: bool = True):
        return super().train(mode and not self.frozen)


class Absorbable:
    """An operation next to an adapted layer, which computes it in its own stead where `LoRALayer.absorbs` says so.

    It stays in the tree with its keys, and passes its input on for as long as it is absorbed.
    """

    @classmethod
    def attach(cls, module: nn.Module, layer: LoRALayer) -> None:
        module.stock_class = FREEZABLE.get(type(module), type(module))  # one that is frozen now stays so
        module.__class__ = cls
        module._absorber = (layer,)  # a tuple, so it stays out of the tree
        layer._neighbours = (module,)

    def release(self) -> None:
        self.__class__ = self.stock_class

    def can_be_absorbed(self, by_dropout: bool) -> bool:
        # Dropout acts on what the adapter sees, which then has to exist.
        return not by_dropout and not any(parameter.requires_grad for parameter in self.parameters())

    def operation(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        return x if self._absorber[0].absorbs(self) else self.operation(x)


class FreezableBatchNorm1d(Freezable, nn.BatchNorm1d):
    pass


class FreezableBatchNorm2d(Freezable, nn.BatchNorm2d):
    pass


class FreezableBatchNorm3d(Freezable, nn.BatchNorm3d):
    pass


class FreezableSyncBatchNorm(Freezable, nn.SyncBatchNorm):
    pass


class FoldedBatchNorm2d(Absorbable, FreezableBatchNorm2d):
    """Behind an adapted convolution: in eval mode ``g x + (beta - mean g)``, where ``g = gamma / sqrt(var + eps)``."""

    def can_be_absorbed(self, by_dropout: bool) -> bool:
        constant = not self.training and self.running_mean is not None
        return constant and not any(parameter.requires_grad for parameter in self.parameters())

    def scale_and_shift(self, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """g and the bias of the convolution with this BatchNorm behind it, both (num_features,)."""
        scale = torch.rsqrt(self.running_var + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -self.running_mean if bias is None else bias - self.running_mean
        return scale, shift * scale if self.bias is None else torch.addcmul(self.bias, shift, scale)


class AbsorbedLayerNorm(Absorbable, nn.LayerNorm):
    pass


class AbsorbedGELU(Absorbable, nn.GELU):
    pass


FREEZABLE = {
    nn.BatchNorm1d: FreezableBatchNorm1d,
    nn.BatchNorm2d: FreezableBatchNorm2d,
    nn.BatchNorm3d: FreezableBatchNorm3d,
    nn.SyncBatchNorm: FreezableSyncBatchNorm,
}


def _fold_batch_norms(model: nn.Module) -> None:
    """Pair adapted convolutions with the BatchNorm right behind them: in torchvision's ResNets and in Sequentials."""
    uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    for parent in model.modules():
        children = dict(parent.named_children())
        pairs = []
        if isinstance(parent, ResNet | BasicBlock | Bottleneck):
            pairs = [(children.get(f"conv{i}"), children.get(f"bn{i}")) for i in (1, 2, 3)]
        elif isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward:
            pairs = itertools.pairwise(children.values())
        for conv, norm in pairs:
            is_pair = isinstance(conv, LoRAConv2d) and type(norm) in (nn.BatchNorm2d, FreezableBatchNorm2d)
            # One that is used twice stands behind two convolutions, or behind none for the second time.
            if is_pair and uses[id(conv)] == uses[id(norm)] == 1:
                FoldedBatchNorm2d.attach(norm, conv)


# -------------------------------------------------------------------------------------------------- into a model


def add_lora_to_model(
    model: nn.Module,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    use_qlora: bool = False,
    use_rslora: bool = False,
) -> nn.Module:
    """Put adapters on a model's layers, in place; a model that has some gets new ones in their stead.

    Args:
        model: any module with Linear, Conv2d or MultiheadAttention layers.
        r, lora_alpha, lora_dropout, use_rslora: see `LoRALayer`.
        target_modules: names, suffixes, containing modules or regular expressions of the layers to adapt. None: every
            one except the classifier head and a ViT's patch embedding. Attention is adapted as a whole.
        exclude_modules: the same, for layers to leave alone.
        use_qlora: store the adapted weights in 4 bits.

    Returns:
        The same model. Nothing is frozen yet: see `freeze_backbone_params`.

    Raises:
        InputError: a bad value, a target that matches nothing, or 4-bit layers asked to become float again. The model
            is then as it was.
    """
    problems = []
    if not isinstance(r, int) or r < 1:
        problems.append(f"r is {r}; give a rank of 1 or more")
    if not lora_alpha > 0:
        problems.append(f"lora_alpha is {lora_alpha}; give a number above 0")
    if not 0 <= lora_dropout < 1:
        problems.append(f"lora_dropout is {lora_dropout}; give a number from 0 to below 1")
    if problems:
        raise InputError("; ".join(problems))
    chosen = _choose_layers(model, target_modules, exclude_modules)
    if use_qlora:
        _check_four_bits(model, chosen)
    stuck = [name for name, layer in _outermost(model, _FourBits) if not use_qlora or name not in chosen]
    if stuck:
        raise InputError(
            f"{stuck[0]} is in 4 bits, its float weight is gone: load the checkpoint again to adapt it otherwise"
        )

    if not hasattr(model, "base_digests"):
        model.base_digests = base_digests(model)
    for _, layer in _outermost(model, LoRALayer):
        if not isinstance(layer, _FourBits):
            layer.remove_lora()
    for layer in chosen.values():
        kinds = ADAPTED.get(type(layer), (type(layer),) * 2)  # one that is in 4 bits keeps its kind
        kinds[use_qlora].adapt(layer, r, lora_alpha, lora_dropout, use_rslora)
    _fold_batch_norms(model)
    _close_fast_paths(model)
    return model


def _outermost(model: nn.Module, kind) -> Iterator[tuple[str, nn.Module]]:
    """Named modules of a kind; what lies inside attention belongs to it."""
    inside = set()
    for name, module in model.named_modules():
        if id(module) not in inside and isinstance(module, kind):
            yield name, module
        if isinstance(module, nn.MultiheadAttention):
            inside.update(id(m) for m in module.modules())


def _choose_layers(model: nn.Module, targets, excluded) -> dict[str, nn.Module]:
    layers = _outermost(model, (*ADAPTED, LoRALayer))
    candidates = {name: m for name, m in layers if type(m) in ADAPTED or isinstance(m, LoRALayer)}
    targets, excluded = ([x] if isinstance(x, str) else x for x in (targets, excluded))
    if targets is None:
        head = head_name(model)
        kept_out = [name for name in (head, *PATCH_EMBEDDINGS) if name]
        chosen = {n: layer for n, layer in candidates.items() if not any(f".{k}." in f".{n}." for k in kept_out)}
    else:
        matches = {target: [name for name in candidates if _matches(name, target)] for target in targets}
        unmatched = [target for target in targets if not matches[target]]
        if unmatched:
            raise InputError(f"no layer matches {', '.join(unmatched)}; there are: {_listed(candidates)}")
        chosen = {n: candidates[n] for n in candidates if any(n in names for names in matches.values())}
    chosen = {n: layer for n, layer in chosen.items() if not any(_matches(n, target) for target in excluded or ())}
    if not chosen:
        raise InputError(f"no layer is left to adapt; there are: {_listed(candidates)}")
    return chosen


def _matches(name: str, target: str) -> bool:
    """Is the target the layer's name, a part of it between dots (a suffix, a containing module), or a pattern of it?"""
    try:
        return f".{target}." in f".{name}." or re.fullmatch(target, name) is not None
    except re.error as error:
        raise InputError(f"target {target!r} is neither a layer nor a regular expression: {error}") from None


def _listed(names, shown: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "") or "none"


def _check_four_bits(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    head = head_name(model)
    if head is not None and any(f"{name}.".startswith(f"{head}.") for name in chosen):
        raise InputError(f"the classifier head {head} trains, so it cannot be in 4 bits: leave it out of the targets")
    try:
        bitsandbytes_functional()
    except ImportError as error:
        raise InputError(str(error)) from None


def _close_fast_paths(model: nn.Module) -> None:
    """In eval mode PyTorch's encoder layers read raw weights, past every adapter; these flags serve that alone."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


# ------------------------------------------------------------------------------------ what trains, and what is counted


def freeze_backbone_params(model: nn.Module, freeze: bool = True) -> None:
    """Freeze all but the adapters and the classifier head, or let everything train again.

    BatchNorm of a frozen backbone stays in eval mode whatever `model.train()` says: its statistics belong to the base.
    Weights in 4 bits do not train in either case.
    """
    head = head_name(model)
    for name, module in model.named_modules():
        in_head = head is not None and f"{name}.".startswith(f"{head}.")
        for parameter_name, parameter in module.named_parameters(recurse=False):
            trains = not freeze or in_head or (isinstance(module, LoRALayer) and parameter_name.startswith("lora_"))
            parameter.requires_grad_(trains and parameter.is_floating_point())
        if type(module) in FREEZABLE:
            module.__class__ = FREEZABLE[type(module)]
        if isinstance(module, Freezable):
            module.frozen = freeze and not in_head
            module.train(model.training)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of elements, however few bits hold each: {'total', 'trainable', 'frozen', 'lora'}."""
    counts = dict.fromkeys(("total", "trainable", "frozen", "lora"), 0)
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_lora = isinstance(module, LoRALayer) and name.startswith("lora_")
            packed = isinstance(module, _FourBits) and name in module.weight_names
            numel = math.prod(module.base(name).shape) if packed else parameter.numel()
            counts["total"] += numel
            counts["trainable" if parameter.requires_grad else "frozen"] += numel
            counts["lora"] += numel if is_lora else 0
    return counts


# --------------------------------------------------------------------------------------------- gradient checkpointing


class _Checkpointed:
    def forward(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        # The reentrant kind gives no gradients where the block's input needs none, as the first block's here.
        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)


class CheckpointedEncoderBlock(_Checkpointed, EncoderBlock):
    pass


class CheckpointedBasicBlock(_Checkpointed, BasicBlock):
    pass


class CheckpointedBottleneck(_Checkpointed, Bottleneck):
    pass


class CheckpointedEncoderLayer(_Checkpointed, nn.TransformerEncoderLayer):
    pass


CHECKPOINTED = {
    EncoderBlock: CheckpointedEncoderBlock,
    BasicBlock: CheckpointedBasicBlock,
    Bottleneck: CheckpointedBottleneck,
    nn.TransformerEncoderLayer: CheckpointedEncoderLayer,
}


def set_gradient_checkpointing(model: nn.Module, mode: str = "none") -> None:
    """Trade time for memory: which activations are computed again in backward instead of saved.

    Args:
        mode: 'none'; 'selective': the outputs of LayerNorm and GELU, which the adapted layer behind recomputes from
            their inputs; 'full': whole blocks, of which only the input is kept.

    Raises:
        InputError: a mode that does not exist, or a model without anything to recompute.
    """
    if mode not in ("none", "selective", "full"):
        raise InputError(f"gradient checkpointing {mode!r} is unknown: choose none, selective or full")
    for module in list(model.modules()):
        if isinstance(module, AbsorbedLayerNorm | AbsorbedGELU):
            module._absorber[0]._neighbours = ()
            module.release()
        if isinstance(module, _Checkpointed):
            module.__class__ = next(stock for stock, kind in CHECKPOINTED.items() if isinstance(module, kind))
    found = [module for module in model.modules() if type(module) in CHECKPOINTED]
    if mode == "full":
        for block in found:
            block.__class__ = CHECKPOINTED[type(block)]
    elif mode == "selective":
        found = [Absorbed.attach(op, layer) for op, layer, Absorbed in _pointwise_pairs(model)]
    if mode != "none" and not found:
        raise InputError(f"gradient checkpointing {mode} finds nothing to recompute in {type(model).__name__}")


def _pointwise_pairs(model: nn.Module):
    """(operation, the adapted layer that alone reads its output, its absorbed kind) in torchvision's encoder blocks."""
    for block in model.modules():
        if not isinstance(block, EncoderBlock):
            continue
        first, activation, dropout, second, *_ = block.mlp
        pairs = [(block.ln_1, block.self_attention), (block.ln_2, first)]
        if dropout.p == 0:  # it stands between the two
            pairs.append((activation, second))
        for operation, layer in pairs:
            kind = {nn.LayerNorm: AbsorbedLayerNorm, nn.GELU: AbsorbedGELU}.get(type(operation))
            if kind is not None and isinstance(layer, LoRALayer):
                yield operation, layer, kind
