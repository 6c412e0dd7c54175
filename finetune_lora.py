"""Fine-tune a MoCo-pretrained backbone with LoRA or QLoRA.

    python finetune_lora.py                                          # shipped backbone, embedded digits, CPU, a minute
    python finetune_lora.py --use-qlora                              # the frozen weights in 4 bits
    python finetune_lora.py --checkpoint moco_v2_800ep_pretrain.pth.tar --data-dir my_images --epochs 20
    python finetune_lora.py --lora-rank 0 --no-freeze-backbone --learning-rate 3e-4    # full, for comparison
    torchrun --nproc-per-node=2 finetune_lora.py                     # the same result from two processes, a GPU each

The file reads from top to bottom: the adapted layers, how they get into a model, what trains and what does not, and
the training loop with its command line. The tensor arithmetic under the layers is in `lora_functional.py`, adapter
files are in `lora_utils.py`, and what comes after training in `deploy_lora.py`.
"""

import argparse
import contextlib
import itertools
import json
import math
import numbers
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.swin_transformer import ShiftedWindowAttention
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
    max_pool2d_relu,
)
from lora_utils import LoRAManager, base_digests, check_metadata, read_adapter_file, trained_state
from moco import InputError, data, distributed, listed, options, reports, runs
from moco.backbones import ARCHS, build_backbone, head_name, unwrapped
from moco.cache import keep_images
from moco.checkpoints import load_backbone, tensor_digest
from moco.data import Splits, Transformed, build_loader, eval_transform, load_splits, train_transform
from moco.files import TOOLKIT, found_path, open_atomically, read_checkpoint, save_atomically, stored_path, write_csv
from moco.options import fraction, non_negative_float, non_negative_int, positive_float, positive_int
from moco.training import (
    PRECISIONS,
    SCHEDULES,
    Evaluation,
    autocast,
    evaluate,
    extract_features,
    knn_accuracy,
    lr_schedule,
    peak_memory_bytes,
    seed_everything,
    select_device,
    select_precision,
    to_device,
)

DEFAULT_CHECKPOINT = TOOLKIT / "checkpoints/moco_stage1/moco_stage1_epoch_100.pth"
DEFAULT_CONFIG = TOOLKIT / "configs/stage1.yaml"
KNN_IMAGES = 10_000  # at most so many training images vote on the accuracy before training

SAVES_MEMORY = (
    "lower --batch-size and raise --accumulation-steps by as much, or use --gradient-checkpointing full, "
    "--precision bf16 or --use-qlora"
)

PATCH_EMBEDDINGS = ("conv_proj", "patch_embed")  # MoCo v3 keeps a ViT's patch embedding frozen (2104.02057, section 4)

# ------------------------------------------------------------------------------------------------------- the layers


def checked_settings(r, lora_alpha, lora_dropout, use_rslora) -> tuple[int, float, float, bool]:
    """The settings of an adapter as plain numbers, of whatever kind they come. Raises InputError for bad ones."""
    problems = []
    if not isinstance(r, numbers.Integral) or isinstance(r, bool) or r < 1:
        problems.append(f"r is {r!r}; give a rank of 1 or more")
    if not isinstance(lora_alpha, numbers.Real) or not 0 < lora_alpha < math.inf:
        problems.append(f"lora_alpha is {lora_alpha!r}; give a number above 0")
    if not isinstance(lora_dropout, numbers.Real) or not 0 <= lora_dropout < 1:
        problems.append(f"lora_dropout is {lora_dropout!r}; give a number from 0 to below 1")
    if problems:
        raise InputError("; ".join(problems))
    return int(r), float(lora_alpha), float(lora_dropout), bool(use_rslora)


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

    # What an adapted layer has and a stock layer has not. `stock_class` is that of a layer built as an adapted one.
    _STATE = (
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "scaling", "lora_enabled"),
        *("_base_data", "_neighbours", "weight_names", "stock_class"),
    )

    def __init__(self, *args, r=8, lora_alpha=16, lora_dropout=0.0, use_rslora=False, **kwargs):
        super().__init__(*args, **kwargs)
        self._start(r, lora_alpha, lora_dropout, use_rslora)

    @classmethod
    def adapt(cls, layer: nn.Module, r=8, lora_alpha=16, lora_dropout=0.0, use_rslora=False) -> "LoRALayer":
        """Turn a stock layer into its adapted kind, in place: same object, same parameters, same place in the tree."""
        checked_settings(r, lora_alpha, lora_dropout, use_rslora)  # before anything changes
        if isinstance(layer, LoRALayer):
            layer._stand_alone()
        if type(layer) is not cls:
            layer.stock_class = type(layer)
            layer.__class__ = cls
        layer._start(r, lora_alpha, lora_dropout, use_rslora)
        return layer

    def _start(self, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool) -> None:
        settings = checked_settings(r, lora_alpha, lora_dropout, use_rslora)
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = settings
        self.scaling = self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
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

    def _stand_alone(self) -> None:
        """The base weights in their place, and no neighbour's work taken over."""
        self.unmerge()
        for neighbour in self._neighbours:
            neighbour.release()
        self._neighbours = ()

    def remove_lora(self) -> None:
        """Back to the stock layer, its weights as they were."""
        self._stand_alone()
        for name in [name for name in self._parameters if name.startswith("lora_")]:
            delattr(self, name)
        stock_class = self.stock_class
        for name in self._STATE:
            self.__dict__.pop(name, None)
        self.__class__ = stock_class

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
            and neighbour.is_in_place()
            and neighbour.can_be_absorbed(by_dropout=self.training and self.lora_dropout > 0)
        )

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._base_data = {name: fn(weight) for name, weight in self._base_data.items()}
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        if self.merged:  # the base that is kept would not know of what is loaded
            name = prefix + self.weight_names[0]
            errors.append(f"{name} is merged: call unmerge_lora_weights() before load_state_dict()")
        else:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _replicate_for_data_parallel(self):
        raise InputError("nn.DataParallel cannot copy adapted layers: start a process per GPU with torchrun")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # a merged layer has exactly the keys of the layer it adapts
            for name in [name for name in self._parameters if name.startswith("lora_")]:
                destination.pop(prefix + name)


class LoRALinear(LoRALayer, nn.Linear):
    """A linear layer with an adapter. x: (..., in_features) -> (..., out_features)."""

    stock_class = nn.Linear
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

    stock_class = nn.Conv2d
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

    stock_class = nn.MultiheadAttention
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
        arranged = {id(x): arrange(x) for x in (query, key, value)}  # what was one tensor stays one
        q, k, v = self._project(*(arranged[id(x)] for x in (query, key, value)))
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
        L, S = q.shape[1], k.shape[1]
        _check_shape("attn_mask", attn_mask, (L, S), (N * self.num_heads, L, S))
        _check_shape("key_padding_mask", key_padding_mask, (N, S))
        if attn_mask is not None:
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


def _check_shape(name: str, mask: Tensor | None, *allowed: tuple[int, ...]) -> None:
    if mask is not None and tuple(mask.shape) not in allowed:  # it might broadcast, and mask something else
        raise RuntimeError(f"{name} has shape {tuple(mask.shape)}, it must be {' or '.join(map(str, allowed))}")


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
        if self.merged:  # refused
            return
        for name, (state, shape) in list(self._nf4_state.items()):
            start = f"{prefix}{name}."
            known = [start + key for key in state.as_dict(packed=True)]
            constants = {key.removeprefix(start): state_dict[key] for key in known if key in state_dict}
            if len(constants) == len(known):
                device = self._parameters[name].device
                self._nf4_state[name] = type(state).from_dict(constants, device), shape
            elif strict:
                missing += [key for key in known if key not in state_dict]
            unexpected[:] = [key for key in unexpected if key not in known]


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
    def attach(cls, module: nn.Module, layer: LoRALayer, parent: nn.Module, *paths: str) -> None:
        module.stock_class = FREEZABLE.get(type(module), type(module))  # one that is frozen now stays so
        module.__class__ = cls
        module._absorber = (layer,)  # a tuple, so it stays out of the tree
        module._places = parent, dict(zip(paths, (module, layer), strict=True))
        layer._neighbours = (module,)

    def release(self) -> None:
        self.__class__ = self.stock_class
        del self.stock_class, self._absorber, self._places

    def is_in_place(self) -> bool:
        """Are both still where they were paired? Somebody may have put another module in the place of one."""
        parent, places = self._places
        return all(_descendant(parent, path) is module for path, module in places.items())

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


def _descendant(module: nn.Module | None, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


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
        pairs = []
        if _runs_as(parent, ResNet, BasicBlock, Bottleneck):
            pairs = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3)]
        elif _runs_as(parent, nn.Sequential):
            pairs = itertools.pairwise(parent._modules)  # not its named_children, which name a module once
        for paths in pairs:
            conv, norm = (parent._modules.get(path) for path in paths)
            is_pair = isinstance(conv, LoRAConv2d) and type(norm) in (nn.BatchNorm2d, FreezableBatchNorm2d)
            # One that is used twice stands behind two convolutions, or behind none for the second time.
            if is_pair and uses[id(conv)] == uses[id(norm)] == 1:
                FoldedBatchNorm2d.attach(norm, conv, parent, *reversed(paths))


class PooledStemResNet(ResNet):
    """torchvision's ResNet, its stem pooled first and rectified after.

    The values are the same to the bit, and the largest activation of the network is not kept for backward. The ReLU and
    the pooling that stay in the tree run where somebody listens to them with a hook, or where they are of other kinds.
    """

    def _forward_impl(self, x: Tensor) -> Tensor:
        pool = self.maxpool
        if not (_is_stock(self.relu, nn.ReLU) and _is_stock(pool, nn.MaxPool2d) and not pool.return_indices):
            return super()._forward_impl(x)
        x = self.bn1(self.conv1(x))
        x = max_pool2d_relu(x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _is_stock(module: nn.Module, kind: type[nn.Module]) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks)


def _pool_stems(model: nn.Module) -> None:
    """Where the stem is adapted; otherwise nothing of it is kept for backward."""
    for module in model.modules():
        if type(module) in (ResNet, PooledStemResNet):
            module.__class__ = PooledStemResNet if isinstance(module.conv1, LoRALayer) else ResNet


def _runs_as(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Does it compute what one of these does? A subclass with a forward of its own may do anything in between."""
    methods = ("forward", "_forward_impl")  # a ResNet's two
    return any(
        isinstance(module, kind)
        and (
            isinstance(module, _Checkpointed | PooledStemResNet)
            or all(getattr(type(module), name, None) is getattr(kind, name, None) for name in methods)
        )
        for kind in kinds
    )


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
        InputError: a bad value, a target that matches nothing, a weight that two layers share, or 4-bit layers asked
            to become float again. The model is then as it was.
    """
    settings = checked_settings(r, lora_alpha, lora_dropout, use_rslora)
    wrapped, model = model, _to_change(model)
    chosen = _choose_layers(model, target_modules, exclude_modules)
    _check_shared_weights(model, chosen)
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
        kinds[use_qlora].adapt(layer, *settings)
    _fold_batch_norms(model)
    _pool_stems(model)
    _absorb(model, AbsorbedLayerNorm)
    _close_fast_paths(model)
    return wrapped


def _to_change(model: nn.Module) -> nn.Module:
    """The model inside a wrapper. Raises InputError where it is too late to change what trains."""
    if isinstance(model, DistributedDataParallel):
        raise InputError("DistributedDataParallel has fixed what it exchanges: add adapters and freeze before it wraps")
    return unwrapped(model)


def check_rank(model: nn.Module, r: int) -> None:
    """Raises InputError for a rank above that of every weight: it adds nothing but memory, and may ask for any."""
    highest = max(min(len(p), p[0].numel()) for p in model.parameters() if p.dim() > 1)
    if r > highest:
        raise InputError(f"rank {r} is above {highest}, the full rank of this model's largest layer; lower --lora-rank")


def _outermost(model: nn.Module, kind) -> Iterator[tuple[str, nn.Module]]:
    """Named modules of a kind; what lies inside attention belongs to it."""
    inside = set()
    for name, module in model.named_modules():
        if id(module) not in inside and isinstance(module, kind):
            yield name, module
        # Swin's attention reads the weights of its layers and never calls them.
        if isinstance(module, nn.MultiheadAttention | ShiftedWindowAttention):
            inside.update(id(m) for m in module.modules())


def _choose_layers(model: nn.Module, targets, excluded) -> dict[str, nn.Module]:
    layers = _outermost(model, (*ADAPTED, LoRALayer))
    candidates = {name: m for name, m in layers if _has_adapted_kind(m) or isinstance(m, LoRALayer)}
    targets, excluded = ([x] if isinstance(x, str) else x for x in (targets, excluded))
    if targets is None:
        chosen = {n: m for n, m in candidates.items() if not _in_head(model, n) and not _in_patch_embedding(n)}
    else:
        matches = {target: [name for name in candidates if _matches(name, target)] for target in targets}
        unmatched = [target for target in targets if not matches[target]]
        if unmatched:
            raise InputError(f"no layer matches {', '.join(unmatched)}; there are: {listed(candidates, 12)}")
        chosen = {n: candidates[n] for n in candidates if any(n in names for names in matches.values())}
    chosen = {n: layer for n, layer in chosen.items() if not any(_matches(n, target) for target in excluded or ())}
    if not chosen:
        raise InputError(f"no layer is left to adapt; there are: {listed(candidates, 12)}")
    return chosen


def _has_adapted_kind(layer: nn.Module) -> bool:
    """Of exactly a type that has an adapted kind, and with its weights, which pruning and weight_norm take away."""
    if type(layer) is nn.MultiheadAttention:
        names = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
        return names <= layer._parameters.keys() and "weight" in layer.out_proj._parameters
    return type(layer) in ADAPTED and "weight" in layer._parameters


def _in_head(model: nn.Module, name: str) -> bool:
    head = head_name(model)
    return head is not None and f"{name}.".startswith(f"{head}.")


def _in_patch_embedding(name: str) -> bool:
    return any(part in PATCH_EMBEDDINGS for part in name.split("."))


def _matches(name: str, target: str) -> bool:
    """Is the target the layer's name, a part of it between dots (a suffix, a containing module), or a pattern of it?"""
    try:
        return f".{target}." in f".{name}." or re.fullmatch(target, name) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"target {target!r} is neither a layer nor a regular expression: {error}") from None


def _check_shared_weights(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    shared = [n for n, layer in chosen.items() if any(owners[id(p)] > 1 for p in layer.parameters() if p.dim() > 1)]
    if shared:
        raise InputError(
            f"{shared[0]} shares its weight with another layer, which an adapter would change too: leave it out with "
            "exclude_modules"
        )


def _check_four_bits(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    in_head = [name for name in chosen if _in_head(model, name)]
    if in_head:
        raise InputError(
            f"the classifier head {in_head[0]} trains, so it cannot be in 4 bits: leave it out of the targets"
        )
    double = [name for name, layer in chosen.items() if any(p.dtype == torch.float64 for p in layer.parameters())]
    if double:
        raise InputError(f"{double[0]} is in float64, which has no 4-bit form: call model.float() first")
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

    Raises:
        InputError: merged weights would train; the manager takes them out again, and what they learned would be lost.
    """
    model = _to_change(model)
    if not freeze and any(isinstance(module, LoRALayer) and module.merged for module in model.modules()):
        raise InputError("the adapters are merged: call unmerge_lora_weights() before everything trains")
    for name, module in model.named_modules():
        in_head = _in_head(model, name)
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
        norms = [m for m in self.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
        if norms:
            kwargs["context_fn"] = lambda: (contextlib.nullcontext(), _statistics_left_alone(norms))
        # The reentrant kind gives no gradients where the block's input needs none, as the first block's here.
        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)


@contextlib.contextmanager
def _statistics_left_alone(norms: list[_BatchNorm]) -> Iterator[None]:
    """For the second computation: BatchNorms that train normalise by the batch, and have counted it already."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


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
        mode: 'none'; 'selective': the outputs of GELU, which the adapted layer behind recomputes from their inputs;
            'full': whole blocks, of which only the input is kept. The outputs of LayerNorm are recomputed in every
            mode: that is an eighth of a block's activations for less than a hundredth of its time.

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
    norms = _absorb(model, AbsorbedLayerNorm)
    if mode == "full":
        for block in found:
            block.__class__ = CHECKPOINTED[type(block)]
    elif mode == "selective":
        found = norms + _absorb(model, AbsorbedGELU)
    if mode != "none" and not found:
        raise InputError(f"gradient checkpointing {mode} finds nothing to recompute in this model")


def _absorb(model: nn.Module, kind: type[Absorbable]) -> list[nn.Module]:
    """Let adapted layers take in the operations of one kind in front of them; those operations."""
    pairs = [pair for *pair, absorbed in _pointwise_pairs(model) if absorbed is kind]
    for operation, layer, block, paths in pairs:
        kind.attach(operation, layer, block, *paths)
    return [operation for operation, *_ in pairs]


def _pointwise_pairs(model: nn.Module):
    """(operation, the adapted layer that alone reads its output, its absorbed kind) in torchvision's encoder blocks."""
    for block in model.modules():
        if not _runs_as(block, EncoderBlock):
            continue
        pairs = [("ln_1", "self_attention"), ("ln_2", "mlp.0")]
        if block.mlp[2].p == 0:  # the dropout stands between the two
            pairs.append(("mlp.1", "mlp.3"))
        for paths in pairs:
            operation, layer = map(block.get_submodule, paths)
            kind = {nn.LayerNorm: AbsorbedLayerNorm, nn.GELU: AbsorbedGELU}.get(type(operation))
            if kind is not None and isinstance(layer, LoRALayer):
                yield operation, layer, block, paths, kind


# --------------------------------------------------------------------------------------------------------- predicting


def load_finetuned(adapter_path: str | Path, checkpoint: str | Path | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """A fine-tuned model, in eval mode, ready to predict:

        model, info = load_finetuned("checkpoints/lora/lora.pth")
        logits = model(info["transform"](Image.open("image.png"))[None])
        print(info["class_names"][logits.argmax()])

    Args:
        adapter_path: what `finetune_lora.py` or `LoRAManager.save_lora_checkpoint` wrote.
        checkpoint: the base, if it is not where it was at training.

    Returns:
        The model and the file's metadata, with `transform` from a PIL RGB image to the model's input, (3, H, W).

    Raises:
        InputError: a file that is not what it should be, or another base than the one trained on.
    """
    content = read_adapter_file(adapter_path)
    metadata, layers = content["metadata"], content["layers"]
    check_metadata(adapter_path, metadata, content["tensors"])
    base = found_path(metadata["checkpoint"]) if checkpoint is None else Path(checkpoint)
    if not os.path.exists(base):
        raise InputError(f"{adapter_path}: its base, {base}, is not there; give its place as the checkpoint")
    model, _ = load_backbone(base, len(metadata["class_names"]), metadata["arch"], metadata["image_size"])
    if layers:
        adapt_as_recorded(model, layers)
    LoRAManager(model).load_lora_checkpoint(adapter_path)
    return model.eval(), {**metadata, "transform": eval_transform(metadata["image_size"])}


def adapt_as_recorded(model: nn.Module, layers: dict[str, dict[str, Any]]) -> None:
    """Put adapters on the layers that an adapter file lists, with the rank that it gives.

    By their names and not by the patterns that once chose them: a stranger's pattern may take for ever to match.
    """
    candidates = {name for name, module in _outermost(model, tuple(ADAPTED)) if type(module) in ADAPTED}
    targets = [f"^{re.escape(name)}$" for name in candidates if name in layers]
    first = next(iter(layers.values()))
    options = {option: first[option] for option in ("r", "lora_alpha", "lora_dropout", "use_rslora")}
    if not targets:
        raise InputError(f"none of the adapted layers is in this model: {listed(layers)}")
    check_rank(model, first["r"])
    add_lora_to_model(model, **options, target_modules=targets, use_qlora=first["kind"].startswith("QLoRA"))


# ------------------------------------------------------------------------------------------------------------ options


def make_parser() -> argparse.ArgumentParser:
    """The command line. Groups `model`, `data` and `finetune` are the sections of the YAML file as well."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    switch = argparse.BooleanOptionalAction
    run = options.add_run_options(parser, output_dir=Path("checkpoints/lora"))
    run.add_argument("--eval-only", type=Path, nargs="?", const=Path(), help="only evaluate this adapter")
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="any MoCo or torchvision checkpoint")
    model.add_argument("--arch", choices=ARCHS, help="default: what the checkpoint says")
    model.add_argument("--image-size", type=positive_int, help="pixels; default: what the backbone was made for")
    model.add_argument("--from-scratch", action=switch, default=False, help="the same architecture, random weights")
    source = options.add_data_options(parser)
    source.add_argument("--labels-per-class", type=positive_int, help="train on only so many images of each class")
    source.add_argument(
        "--augmentation", choices=data.AUGMENTATIONS, default="crop", help="crop: photographs; affine: digits; none"
    )
    tune = parser.add_argument_group("finetune")
    tune.add_argument("--lora-rank", type=non_negative_int, default=8, help="r; 0: no adapters")
    tune.add_argument("--lora-alpha", type=positive_float, default=16.0, help="the update is scaled by alpha / r")
    tune.add_argument("--lora-dropout", type=fraction, default=0.0, help="dropout probability on the adapters' input")
    tune.add_argument("--use-rslora", action=switch, default=False, help="scale by alpha / sqrt(r)")
    tune.add_argument("--use-qlora", action=switch, default=False, help="frozen weights in 4 bits")
    tune.add_argument("--target-modules", nargs="+", help="layers to adapt: names, suffixes or regular expressions")
    tune.add_argument("--exclude-modules", nargs="+", help="layers to leave alone")
    tune.add_argument("--freeze-backbone", action=switch, default=True, help="train adapters and head alone")
    tune.add_argument("--learning-rate", type=positive_float, default=1e-4, help="of AdamW, at its peak")
    tune.add_argument("--epochs", type=positive_int, default=10, help="passes over the training images")
    tune.add_argument("--batch-size", type=positive_int, default=32, help="images per batch, over all processes")
    tune.add_argument("--accumulation-steps", type=positive_int, default=1, help="batches per optimizer step")
    tune.add_argument("--weight-decay", type=non_negative_float, default=0.01, help="of AdamW")
    tune.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="cosine, step or constant")
    tune.add_argument("--warmup-epochs", type=non_negative_float, default=0.0, help="epochs of linear warm-up")
    tune.add_argument("--label-smoothing", type=fraction, default=0.0, help="label smoothing factor")
    tune.add_argument("--clip-grad-norm", type=positive_float, help="clip the gradient's norm to this")
    tune.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto: bf16 or fp16 on CUDA, else fp32")
    tune.add_argument(
        "--gradient-checkpointing",
        choices=("none", "selective", "full"),
        default="none",
        help="none, selective (GELU) or full (blocks)",
    )
    tune.add_argument("--seed", type=non_negative_int, default=0, help="of all random numbers")
    return parser


def read_options(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict[str, str]]:
    """Options and where each came from: defaults < YAML < command line. Raises InputError with every problem found."""

    def shipped_config_applies(typed: dict[str, Any]) -> bool:
        # Its values suit the shipped backbone; another one gets the flags' defaults.
        return Path(typed.get("checkpoint", DEFAULT_CHECKPOINT)).resolve() == DEFAULT_CHECKPOINT.resolve()

    return options.parse_args(make_parser(), argv, DEFAULT_CONFIG, shipped_config_applies, _complete)


def _complete(args: argparse.Namespace, sources: dict[str, str]) -> list[str]:
    """Fill in what follows from other options; what is wrong with them together, a line each."""
    problems = options.complete_data_options(args)
    for option, name in (("resume", "last.pth"), ("eval_only", "lora.pth")):
        path = getattr(args, option)
        if path == Path():  # the flag alone
            setattr(args, option, args.output_dir / name)
        elif path is not None and path.name == str(path) and not os.path.exists(path):
            setattr(args, option, args.output_dir / path)
    if sources["checkpoint"] == "config":
        args.checkpoint = found_path(args.checkpoint)
    problems += runs.environment_problems(args)
    if args.eval_only is None and not os.path.exists(args.checkpoint):
        problems.append(f"--checkpoint {args.checkpoint}: file not found; give the path of an existing checkpoint")
    if args.use_qlora and not args.freeze_backbone:
        problems.append("--use-qlora with --no-freeze-backbone: weights in 4 bits cannot train; drop one of the two")
    if args.use_qlora and args.lora_rank == 0:
        problems.append(
            "--use-qlora with --lora-rank 0: there is no adapter to train over 4-bit weights; raise the rank"
        )
    if args.from_scratch and args.freeze_backbone:
        problems.append("--from-scratch with a frozen backbone trains nothing useful; add --no-freeze-backbone")
    if args.warmup_epochs > args.epochs:
        problems.append(
            f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}: the learning rate "
            "would never get to its peak; lower it"
        )
    if args.resume and args.eval_only:
        problems.append("--resume with --eval-only: the one trains and the other does not; drop one of the two")
    return problems


# ----------------------------------------------------------------------------------------------------------- training

NO_LABEL = -100  # of an image that only stands in for a missing one: cross_entropy passes over it


def main(
    argv: Sequence[str] | None = None, after_epoch: Callable[["FineTuning"], None] | None = None
) -> dict[str, Any]:
    """Fine-tune, or evaluate with --eval-only, as the options say.

    Args:
        argv: the command line, `sys.argv[1:]` when None.
        after_epoch: called with the run after each of its epochs, in every process: to log, or to draw its `history`.

    Returns:
        The content of `results.json`: `val_accuracy` (of the saved adapter, 0 to 1), `epochs`, `seconds`,
        `trainable_parameters`, `total_parameters`, `peak_memory_bytes`, `adapter_bytes` and more.

    Raises:
        InputError: anything wrong with the options, the data or the files.
    """
    args, sources = read_options(argv)
    device = select_device(args.device)
    dtype = select_precision(args.precision, device)
    distributed.join(device)
    with runs.faults_explained(device, "lower --batch-size" if args.eval_only else SAVES_MEMORY) as loaders:
        if args.eval_only:
            base = args.checkpoint if sources["checkpoint"] != "default" else None
            return evaluate_adapter(args, base, device, dtype, loaders)
        print(options.describe_options(args, sources))
        seed_everything(args.seed)
        splits, model, report = prepare(args)
        print(describe_base(report, args.from_scratch))
        print(f"device: {device}, precision: {dtype}")
        run = FineTuning(args, model.to(device), report, splits, device, dtype, loaders)
        if args.resume:
            run.resume(args.resume)
        else:
            run.measure_start()
        run.train(after_epoch)
        return run.finish()


def describe_base(report: dict[str, Any], from_scratch: bool) -> str:
    """What the backbone is and what was recognised in its checkpoint, in a line."""
    if from_scratch:
        return f"backbone: {report['arch']} for {report['image_size']} pixels with random weights"
    epoch = f", epoch {report['epoch']}" if report["epoch"] is not None else ""
    return (
        f"backbone: {report['arch']} for {report['image_size']} pixels from a {report['family']} checkpoint{epoch}; "
        f"{len(report['loaded'])} tensors loaded, {len(report['dropped'])} left out"
    )


def prepare(args: argparse.Namespace) -> tuple[Splits, nn.Module, dict[str, Any]]:
    """The images, the model for their classes and its report. Problems with both are told in one message."""
    try:
        sources = options.image_sources(args)
        splits = load_splits(args.dataset, args.data_dir, args.eval_split, args.labels_per_class, args.seed, **sources)
    except InputError as error:
        try:
            build_model(args, num_classes=2)
        except InputError as another:
            raise InputError(f"{error}\n{another}") from None
        raise
    return splits, *build_model(args, len(splits.class_names))


def build_model(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone of a checkpoint with adapters and a fresh head, frozen as the options say; and its report."""
    model, report = load_backbone(args.checkpoint, num_classes, args.arch, args.image_size)
    if args.from_scratch:  # the file told the architecture alone
        model = build_backbone(report["arch"], num_classes, report["image_size"])
    if isinstance(model, ResNet):
        model.to(memory_format=torch.channels_last)
    if args.lora_rank > 0:
        add_lora_to_model(model, **lora_options(args))
    if args.freeze_backbone:
        freeze_backbone_params(model)
    set_gradient_checkpointing(model, args.gradient_checkpointing)
    return model, report


def lora_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `add_lora_to_model`; the adapter file keeps them. Empty without adapters."""
    if args.lora_rank == 0:
        return {}
    names = ("lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_qlora", "use_rslora")
    return {"r": args.lora_rank, **{name: getattr(args, name) for name in names}}


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW over everything that trains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay)


class MicroBatches(NamedTuple):
    """The batches of one optimizer step, read one at a time."""

    batches: Iterator[tuple[Tensor, Tensor]]  # images (N, 3, S, S) and labels (N,): this process's share
    number: int
    images: int  # of all processes together


@dataclass
class Progress:
    """How far an epoch is: optimizer steps, images seen, right answers, the sum of their losses, and seconds taken."""

    learning_rate: float  # of its first step
    steps: int = 0
    images: int = 0
    correct: int = 0
    loss_sum: float = 0.0  # of plain cross-entropies, without label smoothing, as the evaluation's
    seconds: float = 0.0


class FineTuning:
    """One run: the model, its optimizer, its data, and how far it has come.

    A study changes the loss in `loss`, the optimizer in `build_optimizer` and the augmentation in
    `moco.data.train_transform`, and nothing else.
    """

    METRICS = ("epoch", "train_loss", "val_loss", "val_accuracy", "learning_rate", "seconds")
    FILES = ("lora.pth", "last.pth", "metrics.csv", "results.json", "training_curves.png", "confusion_matrix.png")
    # What may differ between a run and its continuation without changing what is computed.
    FREE_TO_CHANGE = (*(f"data.{name}" for name in options.PLACES_OF_IMAGES), "model.checkpoint", "data.workers")

    def __init__(self, args, model: nn.Module, report, splits: Splits, device, dtype, loaders: list[DataLoader]):
        self.args, self.model, self.report, self.device, self.dtype = args, model, report, device, dtype
        self.splits, self.class_names = splits, splits.class_names
        self.config = options.resolved_config(make_parser(), args)
        norms_train = batch_norm_trains(model)
        check_batches(splits, args, norms_train)
        size = report["image_size"]
        self.eval_transform, augmentation = eval_transform(size), train_transform(size, args.augmentation)
        self.loaders = loaders  # to which it adds its own
        self.val_loader = self.add_loader(splits.val, self.eval_transform)
        # BatchNorm cannot normalise a last batch of one image.
        lone = norms_train and len(splits.train) % args.batch_size == 1
        kept = keep_images(splits.train, args.cache_images, size)
        self.train_loader = self.add_loader(kept, augmentation, shuffle=True, seed=args.seed, drop_last=lone)
        self.meter = data.LoadingMeter()
        self.optimizer = build_optimizer(model, args)
        self.steps_per_epoch = math.ceil(len(self.train_loader) / args.accumulation_steps)
        total, warmup = self.steps_per_epoch * args.epochs, round(self.steps_per_epoch * args.warmup_epochs)
        self.schedule = lr_schedule(self.optimizer, total, warmup, args.schedule)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.parallel = distributed.parallel(model, device)
        # Until here all processes drew the same; from here on each draws its own dropout.
        if distributed.rank() > 0:
            seed_everything(args.seed + distributed.rank())
        self.stop = runs.StopRequests()
        self.progress: Progress | None = None  # of the epoch that has begun
        self.history: list[dict[str, float]] = []
        self.accuracy_before = math.nan

    def add_loader(self, images, transform, **loading) -> DataLoader:
        loading |= {"batch_size": self.args.batch_size, "workers": self.args.workers, "device": self.device}
        self.loaders.append(build_loader(Transformed(images, transform), **loading))
        return self.loaders[-1]

    def measure_start(self) -> None:
        """What the backbone knows before any training: the k-NN accuracy of its features."""
        bank = self.add_loader(self.splits.train.at_most(KNN_IMAGES), self.eval_transform, keep_workers=False)
        bank, queries = (
            extract_features(self.model, runs.progress_bar(loader, "features"), self.device, self.dtype)
            for loader in (bank, self.val_loader)
        )
        self.accuracy_before = knn_accuracy(*bank, *queries)

    def train(self, after_epoch: Callable[["FineTuning"], None] | None = None) -> None:
        """Train the remaining epochs; after each, write its files and call `after_epoch`.

        Raises:
            Stopped: after Ctrl-C or SIGTERM, when the step is done and `last.pth` is written.
        """
        self.begin_files()
        with runs.saved_when_stopped(self.stop, self.path("last.pth"), self.save_state, self.done):
            while len(self.history) < self.args.epochs:
                self.train_epoch()
                if after_epoch is not None:
                    after_epoch(self)

    def train_epoch(self) -> None:
        """What is left of the epoch, its evaluation, and its files."""
        epoch = len(self.history) + 1
        self.progress = now = self.progress or Progress(self.optimizer.param_groups[0]["lr"])
        started = time.perf_counter() - now.seconds
        self.model.train()
        counts = {"total": len(self.splits.train), "initial": now.images, "unit": "img"}
        with runs.progress_bar(title=f"epoch {epoch}/{self.args.epochs}", **counts) as bar:
            for micro_batches in self.steps(epoch, now.steps):
                loss_sum, correct = self.step(micro_batches)
                now.steps, now.images, now.correct = (
                    now.steps + 1,
                    now.images + micro_batches.images,
                    now.correct + correct,
                )
                now.loss_sum, now.seconds = now.loss_sum + loss_sum, time.perf_counter() - started
                means = {"loss": f"{now.loss_sum / now.images:.3f}", "acc": f"{now.correct / now.images:.3f}"}
                bar.set_postfix(means | {"waiting": self.meter.shown()["waiting"]}, refresh=False)
                bar.update(micro_batches.images)
                self.stop.check()
        result = evaluate(self.model, self.stop.watched(self.val_loader), self.device, self.dtype)
        seconds = time.perf_counter() - started
        row = (epoch, now.loss_sum / now.images, result.loss, result.accuracy, now.learning_rate, seconds)
        self.history.append(dict(zip(self.METRICS, row, strict=True)))
        self.progress = None
        print(f"epoch {epoch}: val loss {result.loss:.4f}, val accuracy {result.accuracy:.4f}")
        self.save()

    def steps(self, epoch: int, start: int) -> Iterator[MicroBatches]:
        """The optimizer steps of an epoch from `start` on; the last one may have fewer batches than the others."""
        sampler, size = self.train_loader.batch_sampler, self.args.accumulation_steps
        sampler.epoch, sampler.start = epoch - 1, start * size
        shares = (
            (images, labels if sampler.has_share(number) else torch.full_like(labels, NO_LABEL))
            for number, (images, labels) in enumerate(self.meter.watched(self.train_loader), start * size)
        )
        for first in range(start * size, len(sampler), size):
            number = min(size, len(sampler) - first)
            images = min(number * self.args.batch_size, len(self.splits.train) - first * self.args.batch_size)
            yield MicroBatches(itertools.islice(shares, number), number, images)

    def step(self, micro_batches: MicroBatches) -> tuple[float, int]:
        """One optimizer step, as if its batches were one: the sum of the images' losses, and the number of hits.

        With several processes, each computes its share; gradients and results are those of the whole.
        """
        measured = []
        self.optimizer.zero_grad(set_to_none=True)
        for number, (images, labels) in enumerate(micro_batches.batches, 1):
            images, labels = to_device(images, self.device), to_device(labels, self.device)
            is_last = number == micro_batches.number  # only then do the processes exchange gradients
            with contextlib.nullcontext() if is_last else distributed.not_yet_averaged(self.parallel):
                with autocast(self.device, self.dtype):
                    logits = self.parallel(images)
                loss = self.loss(logits.float(), labels) / micro_batches.images
                # The gradients are averaged over the processes; it is their sum that belongs to the whole.
                self.scaler.scale(loss * distributed.world_size()).backward()
            plain = F.cross_entropy(logits.detach().float(), labels, reduction="sum")
            measured.append(torch.stack([loss.detach(), plain, (logits.argmax(1) == labels).sum().float()]))
        sums = torch.stack(measured).tolist()  # read together: one wait for the GPU
        loss, plain, correct = distributed.all_sum(*map(sum, zip(*sums, strict=True)))
        if not math.isfinite(loss):
            self._stop_diverged(loss)
        if self.args.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return plain, int(correct)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What is minimised, summed over the images: cross-entropy of logits (N, classes) and labels (N,)."""
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.args.label_smoothing)

    def _stop_diverged(self, loss: float) -> None:
        step, rate = self.schedule.last_epoch + 1, self.optimizer.param_groups[0]["lr"]
        kept = f"; the adapter of epoch {len(self.history)} is in {self.path('lora.pth')}" if self.history else ""
        raise InputError(
            f"the loss is {loss} at step {step} with learning rate {rate:.2e}: try a lower --learning-rate, "
            f"--warmup-epochs 1, --clip-grad-norm 1 or --precision fp32{kept}"
        )

    # ----------------------------------------------------------------------------------------------- files of a run

    def path(self, name: str) -> Path:
        return self.args.output_dir / name

    def done(self) -> str:
        steps = f" and {self.progress.steps} of {self.steps_per_epoch} steps" if self.progress else ""
        return f"{len(self.history)} of {self.args.epochs} epochs{steps}"

    def begin_files(self) -> None:
        """Make the output folder this run's own, and the run one that can be resumed whenever it is killed."""
        if distributed.is_main():
            runs.begin_folder(self.args.output_dir, self.FILES, self.args.resume)
            with open_atomically(self.path("config.yaml")) as file:
                file.write(yaml.safe_dump(self.config, sort_keys=False).encode())
        if self.progress is None and self.history:
            self.save()  # perhaps into another folder than it was resumed from
        else:
            self.save_state()

    def save(self) -> None:
        """The files of a finished epoch."""
        if distributed.is_main():
            LoRAManager(self.model).save_lora_checkpoint(self.path("lora.pth"), self.metadata())
        # In this order: a run killed between the two files repeats the epoch and writes the same lora.pth again.
        self.save_state()
        if distributed.is_main():
            write_csv(self.history, self.METRICS, self.path("metrics.csv"))

    def save_state(self) -> None:
        state = self.state()  # to which every process contributes
        if distributed.is_main():
            save_atomically(state, self.path("last.pth"))

    def metadata(self) -> dict[str, Any]:
        """What `load_finetuned` needs, and what a reader of the file would ask."""
        return {
            "arch": self.report["arch"],
            "class_names": list(self.class_names),
            "image_size": self.report["image_size"],
            "mean": list(data.IMAGENET_MEAN),
            "std": list(data.IMAGENET_STD),
            "checkpoint": str(stored_path(Path(self.args.checkpoint).absolute())),
            "lora": lora_options(self.args),
            "epoch": self.history[-1]["epoch"],
            "val_accuracy": self.history[-1]["val_accuracy"],
            "config": self.config,
        }

    def state(self) -> dict[str, Any]:
        """Everything from which the run goes on bit for bit."""
        return {
            "model": trained_state(self.model),
            **runs.training_state(self.optimizer, self.schedule, self.scaler),
            "progress": vars(self.progress) if self.progress else None,
            "history": self.history,
            "accuracy_before": self.accuracy_before,
            "images": self.splits.digest(),
            "class_names": list(self.class_names),
            "base": getattr(self.model, "base_digests", {}),
            "config": self.config,
        }

    def resume(self, path: Path) -> None:
        """Go on where `last.pth` was written. Raises InputError where it belongs to another run."""
        state, now = read_checkpoint(path, mapped=False), self.state()
        if not isinstance(state, dict) or state.keys() != now.keys():
            raise InputError(f"{path} is not a last.pth of this version of the script; start without --resume")
        changed = runs.changed_settings(_flat(state["config"]), _flat(self.config), self.FREE_TO_CHANGE)
        if changed or state["class_names"] != now["class_names"]:
            what = ", ".join(changed) or "other classes"
            raise InputError(f"{path} belongs to a run with other settings ({what}); resume with the same ones")
        if state["images"] != now["images"]:
            raise InputError(
                f"{path} was trained on other images than {self.args.data_dir or 'the data set'} holds now: put back "
                "those that were there, or start without --resume"
            )
        if state["base"] != now["base"]:
            raise InputError(f"{path} was trained over another base than {self.args.checkpoint}; resume with the same")
        self.model.load_state_dict(state["model"], strict=False)
        runs.restore_training_state(state, self.optimizer, self.schedule, self.scaler)
        self.history, self.accuracy_before = state["history"], state["accuracy_before"]
        self.progress = Progress(**state["progress"]) if state["progress"] else None
        print(f"resuming {path} after {self.done()}")

    # ------------------------------------------------------------------------------------------------------ the end

    def finish(self) -> dict[str, Any]:
        """Evaluate the adapter once more, and write and print the results."""
        result = evaluate(self.model, self.val_loader, self.device, self.dtype)
        if not distributed.is_main():
            return {}
        results = self.results(result)
        with open_atomically(self.path("results.json")) as file:
            file.write(json.dumps(results, indent=2).encode())
        curves = self.path("training_curves.png")
        reports.plot_finetuning(self.history, self.accuracy_before, self.args.eval_split, curves)
        reports.plot_confusion_matrix(result, self.class_names, self.path("confusion_matrix.png"))
        print(reports.summary(results, self.args.output_dir))
        return results

    def results(self, result: Evaluation) -> dict[str, Any]:
        counts = count_parameters(self.model)
        best = max(self.history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
        return {
            "val_accuracy": result.accuracy,
            "val_loss": result.loss,
            "val_images": len(result.labels),
            "eval_split": self.args.eval_split,
            # Chosen on the very images that it was measured on: no number to publish.
            "best_epoch": best["epoch"],
            "best_val_accuracy": best["val_accuracy"],
            "knn_accuracy_before": self.accuracy_before,
            "accuracy_per_class": reports.accuracy_per_class(result, self.class_names),
            "epochs": len(self.history),
            "seconds": sum(row["seconds"] for row in self.history),
            **self.meter.results(),
            "trainable_parameters": counts["trainable"],
            "total_parameters": counts["total"],
            "lora_parameters": counts["lora"],
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "adapter_bytes": self.path("lora.pth").stat().st_size,
            "backbone_bytes": 4 * (counts["total"] - counts["lora"]),
            "device": str(self.device),
            "precision": str(self.dtype).removeprefix("torch."),
            "images": self.splits.digest(),
            "config": self.config,
        }


def _flat(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{'section.key': value} of the sections of a configuration."""
    return {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}


def batch_norm_trains(model: nn.Module) -> bool:
    """Does any BatchNorm take statistics of the batch in training?"""
    return any(isinstance(module, _BatchNorm) and module.training for module in model.train().modules())


def check_batches(splits: Splits, args: argparse.Namespace, norms_train: bool) -> None:
    """Raises InputError where the processes or BatchNorm cannot work with what they get of a batch."""
    processes = distributed.world_size()
    if processes > min(len(splits.train), len(splits.val)):
        raise InputError(f"{processes} processes are more than there are images to train or evaluate on; start fewer")
    if norms_train and processes > 1:
        raise InputError(
            "BatchNorm that trains knows the images of its own process alone: train this backbone in one process, or "
            "freeze it (--freeze-backbone)"
        )
    if norms_train and min(args.batch_size, len(splits.train)) == 1:
        raise InputError("BatchNorm that trains needs two images or more: raise --batch-size, or use --freeze-backbone")


def evaluate_adapter(
    args: argparse.Namespace, base: Path | None, device: torch.device, dtype: torch.dtype, loaders: list[DataLoader]
) -> dict[str, Any]:
    """`--eval-only`: the accuracy of an adapter file on the evaluation images. Writes nothing."""
    model, info = load_finetuned(args.eval_only, base)
    splits = load_splits(args.dataset, args.data_dir, args.eval_split, **options.image_sources(args))
    if splits.class_names != info["class_names"]:
        raise InputError(
            f"{args.eval_only} knows the classes {listed(info['class_names'], 12)}, the data has "
            f"{listed(splits.class_names, 12)}: give its --data-dir or --dataset, or its config.yaml as --config"
        )
    loading = {"batch_size": args.batch_size, "workers": args.workers, "device": device}
    loader = build_loader(Transformed(splits.val, info["transform"]), **loading)
    loaders.append(loader)
    result = evaluate(model.to(device), loader, device, dtype)
    print(f"{args.eval_only}: accuracy {result.accuracy:.4f}, loss {result.loss:.4f} on {len(result.labels)} images")
    return {"val_accuracy": result.accuracy, "val_loss": result.loss}


if __name__ == "__main__":
    # As `__main__` this file's classes would exist a second time beside those of the module `finetune_lora`, which
    # `lora_utils` and saved files mean; isinstance would then fail without a word.
    from finetune_lora import main as module_main

    runs.run_script(module_main)
