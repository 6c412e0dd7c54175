"""Fine-tune a MoCo-pretrained backbone with LoRA or QLoRA.

    python finetune_lora.py                  # shipped backbone, embedded digits
    python finetune_lora.py --use-qlora      # the frozen weights in 4 bits
    python finetune_lora.py --data-dir my_images --checkpoint moco_v2.pth.tar
    python finetune_lora.py --lora-rank 0 --no-freeze-backbone --lr 1e-3  # full
    torchrun --nproc-per-node=2 finetune_lora.py    # two processes, a GPU each

From top to bottom: the adapted layers, how they get into a model, what trains and what does not, the training loop and
its command line. The arithmetic under the layers is in `lora/functional.py`, adapter files are in `lora_utils.py`.
"""

import contextlib
import copy
import io
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import moco_lora  # noqa: F401 - it says if a folder is in the way of those that follow
from toolkit.config import check_command_line
from toolkit.run.options import DEFAULT_CONFIG, FineTuneOptions, Plan, make_parser, read_options  # noqa: F401

if __name__ == "__main__":  # before PyTorch is loaded, which takes seconds: help and mistakes need not wait for it
    check_command_line(read_options, __doc__)

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import lora_utils
from lora import adapted, adapter_file, adapter_set, attention, backends, functional, initialization, int8, split
from lora.adapted import ADAPTED, NO_ADAPTER, LoRASettings, is_adapted, recorded_in_4_bits, recorded_settings
from lora.followed_norms import AdapterStatistics, folded_norm, follow_statistics, followers, own_statistics, settle
from lora.fusion import fuse, set_gradient_checkpointing
from lora.weights import NF4Weight, Weight
from lora_utils import LoRAManager, base_digests, count_parameters, full_rank, read_adapter_file, trained_state
from toolkit import SHIPPED as DEFAULT_CHECKPOINT  # noqa: F401
from toolkit import InputError, attributes, choices, config, devices, distributed, dotted, listed, printable, same_file
from toolkit.answers import evaluation, measures, probe, tasks
from toolkit.files import read_checkpoint, save_atomically, write_cells
from toolkit.images import bands, data, transforms
from toolkit.images.sources import Splits
from toolkit.models.backbones import block_names, headless, in_head, name_head, record_of
from toolkit.models.checkpoints import describe_base, load_backbone, tensor_digest, value_at
from toolkit.models.dense import DenseModel
from toolkit.models.names import RESNETS
from toolkit.models.norms import FOLDING, NORMS, constants_kept, freeze_statistics, share_statistics
from toolkit.run import folds, guard, optim, options, output_folder, reports, run_state, runs, search, teacher, training
from toolkit.run.guard import Collapsed, GoBack, Guard
from toolkit.run.loaders import NORMS_IMAGES, Loaders, load_images, steps_of_epoch
from toolkit.run.run_state import RunState, StateEntry, copy_to_cpu

# ------------------------------------------------------------------------------------------------------- the layers


class LoRALayer:
    """What every adapted layer shares: a frozen weight plus a trained low-rank update (LoRA, arXiv 2106.09685, eq. 3),

        W_eff = W + (alpha / r) B A,     A: (r, fan_in) random,  B: (fan_out, r) zero at the start,

    or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732). Each adapted layer *is* the layer it adapts: it keeps
    `weight` and `bias` under their names, so a base model's keys never change. A and B are float32 masters in any model
    of lower precision. Dropout acts on what A sees: ``y = W x + s B A dropout(x)``. The constructor takes the stock
    layer's arguments and the fields of `LoRASettings`.
    """

    weight_name = "weight"
    parts = ("",)  # of the weight, one below the other, that have an A and a B each: how the names of these end
    in_4_bits = False  # True in classes named QLoRA...: their `weight` holds the packed bytes of NF4 (arXiv 2305.14314)
    base_bits = 32  # that the base weight is stored in: 16, 8 or 4 if it was rounded
    float_digests: Mapping[str, str] = {}  # SHA-256 of the weight before rounding, by its name: files identify it so
    _base_data: Tensor | None = None  # while merged: the weight as it was
    followed: AdapterStatistics | None = None  # what a BatchNorm behind it has with this adapter; None: the base's
    _STORAGE = ("base_bits", "float_digests", "_packed_shape", "_nf4_state", "_base_data")
    _STATE = (*NO_ADAPTER, *_STORAGE, "lora_enabled", "stock_class", "followed")

    def __init__(self, *args, r=8, lora_alpha=16, lora_dropout=0.0, use_rslora=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.stock_class = next(kind for kind in type(self).__mro__ if not issubclass(kind, LoRALayer))
        self._init_adapters(LoRASettings(r, lora_alpha, lora_dropout, use_rslora))

    @classmethod
    def adapt(cls, layer: nn.Module, settings: LoRASettings | None, base_dtype: torch.dtype | None = None) -> nn.Module:
        """Turn a stock layer into its adapted kind, in place: same object and parameters. No settings: rank 0."""
        if isinstance(layer, LoRALayer):
            layer.unmerge()
        if type(layer) is not cls:
            layer.stock_class = type(layer)  # which it becomes again without its adapter
            layer.__class__ = cls
        layer._init_adapters(settings, base_dtype)
        return layer

    def _init_adapters(self, settings: LoRASettings | None, base_dtype: torch.dtype | None = None) -> None:
        vars(self).update(NO_ADAPTER)
        if settings is not None:
            vars(self).update(vars(settings), scaling=settings.scaling)
        self.lora_enabled = True  # False: compute as without an adapter, merged or not
        self.followed = None
        self._create_adapters()
        self._store_base(base_dtype)

    def _store_base(self, dtype: torch.dtype | None) -> None:
        weight = self._parameters[self.weight_name]
        rounds = adapted.rounds(self, dtype) and weight.dtype == torch.float32
        if self.in_4_bits:
            rounds = self.base_bits == 32
        if not rounds:
            return
        self.float_digests = {self.weight_name: tensor_digest(weight)}
        self._packed_shape = weight.shape
        if self.in_4_bits:
            self.base_bits = 4
            nf4 = NF4Weight.quantize(weight)
            self._nf4_state = nf4.state
            self._parameters[self.weight_name] = nn.Parameter(nf4.packed, requires_grad=False)
        elif dtype == torch.int8:
            self.base_bits = 8
            weight.requires_grad_(False)  # integers have no gradient
            weight.data = int8.Int8Weight.quantize(weight).packed()
        else:
            self.base_bits = 16
            weight.data = weight.data.to(dtype)

    def _create_adapters(self) -> None:
        """A as `nn.Linear` starts its weight, B zero: the adapted layer begins as the base layer exactly."""
        stored = self._parameters[self.weight_name]
        dtype = torch.promote_types(stored.dtype, torch.float32)
        fan_out, *fan_in = self.base().shape
        for part in self.parts:
            A = torch.empty(self.r, math.prod(fan_in), dtype=dtype, device=stored.device)
            B = torch.zeros(fan_out // len(self.parts), self.r, dtype=dtype, device=stored.device)
            if self.r > 0:  # PyTorch warns of an empty A
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            for name, factor in (("lora_A", A), ("lora_B", B)):
                self.register_parameter(name + part, nn.Parameter(factor, requires_grad=self.r > 0))

    def remove_lora(self, merge: bool = False) -> None:
        """Turn it back into the stock layer, with its base weights or, if `merge`, with W_eff."""
        if self.base_bits < 32 and not merge:
            raise InputError("a layer stored in fewer bits cannot become float again: load the checkpoint once more")
        if merge:
            self.merge()
            self.base_bits = 32  # once merged, its weight is a float's
        else:
            self.unmerge()
        adapter_set.LayerState.of(self).without_adapter().apply_to(self)

    def adapted_state(self) -> dict[str, Any]:
        """The attributes, without parameters, that the layer it adapts does not have."""
        return {name: vars(self)[name] for name in self._STATE if name in vars(self)}

    def base(self) -> Weight:
        """The weight without the adapter, merged or not."""
        stored = self._base_data if self.merged else self._parameters[self.weight_name]
        if self.base_bits == 4:
            return NF4Weight(stored, self._nf4_state, self._packed_shape)
        if self.base_bits == 8:
            return int8.Int8Weight.unpacked(stored, self._packed_shape)
        return Weight(stored)

    def _factors(self, letter: str, parts: slice = slice(None)) -> Tensor:
        """A or B of some parts of the weight, one below the other."""
        return functional.stacked([self._parameters[f"lora_{letter}{part}"] for part in self.parts[parts]])

    def effective_weight(self) -> Tensor:
        """The dense weight that a merge puts in place: in the base's dtype, or float32 if that has fewer bits."""
        base = self.base()
        dtype = base.dtype if self.base_bits == 32 else torch.float32
        if self.r == 0:
            return base.dense(dtype)
        B = self._factors("B")
        dense = base.dense(B.dtype, copy=True)  # a small update would vanish if it were added in bfloat16
        return functional.effective_weight(dense, self._factors("A"), B, self.scaling, len(self.parts)).to(dtype)

    @property
    def merged(self) -> bool:
        """Does the weight hold W_eff now?"""
        return self._base_data is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Put W_eff in the weight's place, and the adapter's statistics in its BatchNorm; done already: do nothing."""
        if self.merged:
            return
        if self.followed is not None:
            self.followed.merge(self)
        merged = self.effective_weight()
        self._base_data = self._parameters[self.weight_name].data
        self._parameters[self.weight_name].data = merged

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit: it was stored, nothing is subtracted."""
        if not self.merged:
            return
        if self.followed is not None:
            self.followed.unmerge()
        self._parameters[self.weight_name].data = self._base_data
        self._base_data = None

    @property
    def _is_active(self) -> bool:
        return self.lora_enabled and not self.merged and self.r > 0

    def _weight_without_adapter(self, x: Tensor) -> Weight:
        """The weight, for a product with x, of a layer whose adapter is merged, switched off or of rank 0."""
        weight = self.base()
        if self.merged and self.lora_enabled:
            weight = Weight(self._parameters[self.weight_name])
        if self.base_bits < 32 and weight.multiplies_dense:
            weight = Weight(weight.dense(functional.compute_dtype(x)))
        return weight

    @property
    def _drops(self) -> bool:
        return self.training and self.lora_dropout > 0

    def _adapter_input(self, x: Tensor) -> Tensor | None:
        """What the adapter sees in place of x, if it is not x."""
        return F.dropout(x, self.lora_dropout) if self._drops else None

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.merged:
            self._base_data = fn(self._base_data)
        if self.base_bits == 4:
            self._nf4_state.to(self._parameters[self.weight_name].device)
        if self.followed is not None:
            self.followed.apply(fn)
        return self

    def _replicate_for_data_parallel(self):
        raise InputError("nn.DataParallel cannot copy adapted layers: start a process per GPU with torchrun")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # a merged layer has exactly the keys of the layer it adapts
            for name in adapted.adapter_parameters(self):
                destination.pop(prefix + name)
        elif self.base_bits == 4:  # the constants of the bytes, under the names that bitsandbytes gives them
            for key, value in self._nf4_state.as_dict(packed=True).items():
                destination[f"{prefix}{self.weight_name}.{key}"] = value

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        name = prefix + self.weight_name
        if self.merged:  # unmerging would discard the loaded weight and put the stored base back
            errors.append(f"{name} is merged: call unmerge_lora_weights() before load_state_dict()")
            return
        rounded = self.base_bits < 32 and name in state_dict
        before = self.base().dense(torch.float32) if rounded else None
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if self.base_bits == 4:
            self._load_nf4_state(state_dict, name, strict, missing, unexpected)
        # Digests and constants change in place, since adapters that share the base share them.
        if rounded and not torch.equal(self.base().dense(torch.float32), before):  # it is no longer its former base
            loaded = state_dict[name]
            if not loaded.is_floating_point():  # in 4 bits its bytes alone do not determine the values
                loaded = self.base().dense(torch.float32)
            self.float_digests[self.weight_name] = tensor_digest(loaded)

    def _load_nf4_state(self, state_dict, name, strict, missing, unexpected) -> None:
        state = self._nf4_state
        keys = {f"{name}.{key}": key for key in state.as_dict(packed=True)}
        absent = keys.keys() - state_dict.keys()
        if not absent:
            constants = {key: state_dict[full] for full, key in keys.items()}
            state.__dict__ = type(state).from_dict(constants, self._parameters[self.weight_name].device).__dict__
        elif strict:
            missing += sorted(absent)
        unexpected[:] = [key for key in unexpected if key not in keys]


class LoRALinear(LoRALayer, nn.Linear):
    """A linear layer with an adapter. x: (..., in_features) -> (..., out_features)."""

    def forward(self, x: Tensor, prologue: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """``x (W + s B A)^T + b`` or ``x W^T + b + s (x A^T) B^T``, whichever is faster, of ``prologue(x)``."""
        if prologue is not None and (self._drops or not self._is_active):  # dropout needs the output of `prologue`
            x = prologue(x)
            prologue = None
        if not self._is_active:
            return functional.frozen_linear(x, self._weight_without_adapter(x), self.bias)
        how = (self.scaling, 1, self._adapter_input(x), prologue)
        return functional.lora_linear(x, self.base(), self.lora_A, self.lora_B, self.bias, *how)


class LoRAConv2d(LoRALayer, nn.Conv2d):
    """A convolution of any geometry with an adapter, ``B A`` as its kernel: fan_in = in / groups * kh * kw."""

    def forward(self, x: Tensor, batch_norm: nn.BatchNorm2d | None = None, residual=None, relu=False) -> Tensor:
        """``relu(batch_norm(conv2d(x, W + s B A, b)) + residual)``, see `folded_norm`.

        x: ([N,] in, H, W); residual, as what is returned: ([N,] out, H', W').
        """
        folding = {} if devices.is_traced() else FOLDING.get({})
        if self in folding and (self._is_active or not torch.is_grad_enabled()):
            norm = folding.pop(self)
            folding[norm] = self.forward(x, norm)
            return folding[norm]
        if x.dim() == 3:
            return self.forward(x[None], batch_norm, None if residual is None else residual[None], relu)[0]
        if not self._is_active and (batch_norm is None or torch.is_grad_enabled()):
            y = self._conv_forward(x, self._weight_without_adapter(x).tensor, self.bias)
            if batch_norm is not None:
                y = batch_norm(y)
            return backends.added_and_rectified(y, residual, relu)
        padded, padding = functional.pad_for_conv2d(x, self)
        geometry = functional.Geometry(self.stride, padding, self.dilation, self.groups)
        row_scale, log_scale, bias = folded_norm(self, batch_norm)
        if not self._is_active:
            dtype = functional.compute_dtype(x)
            kernel = functional.scaled_kernel(self._weight_without_adapter(x), row_scale, dtype)
            return backends.conv2d(padded.to(dtype), kernel, bias.to(dtype), geometry, residual, relu)
        adapter_x = self._adapter_input(x)
        if adapter_x is not None:
            adapter_x, _ = functional.pad_for_conv2d(adapter_x, self)
        after = (geometry, row_scale, adapter_x, residual, relu, log_scale)
        return functional.lora_conv2d(padded, self.base(), self.lora_A, self.lora_B, bias, self.scaling, *after)


class LoRAMultiheadAttention(LoRALayer, nn.MultiheadAttention):
    """Attention with an adapter each for q, k and v (`lora_A_q`, `lora_B_q`, ...), and one of the output projection."""

    weight_name = "in_proj_weight"
    parts = ("_q", "_k", "_v")

    def _init_adapters(self, settings: LoRASettings, base_dtype: torch.dtype | None = None) -> None:
        adapted.kind_for(nn.Linear, self.in_4_bits).adapt(self.out_proj, settings, base_dtype)
        super()._init_adapters(settings, base_dtype)

    def remove_lora(self, merge: bool = False) -> None:
        self.out_proj.remove_lora(merge)
        super().remove_lora(merge)

    def _project(self, query: Tensor, key: Tensor, value: Tensor, prologue: Callable | None) -> list[Tensor]:
        """q (N, L, embed_dim), k and v (N, S, embed_dim), not split into heads."""
        products = [(0, 1), (1, 2), (2, 3)]  # which of q, k and v: from, to
        if key is value:
            products = [(0, 3)] if query is key else [(0, 1), (1, 3)]
        if prologue is not None and (self._drops or not self._is_active or len(products) == 3):
            query, key, value = attention.once_each(prologue, query, key, value)
            prologue = None
        inputs = (query, key, value)
        adapter_inputs = attention.once_each(self._adapter_input, *inputs)  # one dropout mask for each distinct input
        projected = []
        for i, end in products:
            x = inputs[i]
            rows = slice(i * self.embed_dim, end * self.embed_dim)
            bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
            if self._is_active:
                W = self.base()[rows]
                A = self._factors("A", slice(i, end))
                B = self._factors("B", slice(i, end))
                y = functional.lora_linear(x, W, A, B, bias, self.scaling, end - i, adapter_inputs[i], prologue)
            else:
                y = functional.frozen_linear(x, self._weight_without_adapter(x)[rows], bias)
            projected += y.split(self.embed_dim, -1)
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
        prologue: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`, of `prologue` of query, key and value; see `lora_linear`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: give the mask as well")
        if query.is_nested:
            raise RuntimeError("LoRAMultiheadAttention takes padded tensors: call to_padded_tensor on a nested one")
        is_batched = query.dim() == 3
        inputs = [query, key, value]
        if not is_batched:  # (L, E) -> (1, L, E)
            inputs = attention.once_each(lambda x: x[None], *inputs)
        elif not self.batch_first:  # (L, N, E) -> (N, L, E)
            inputs = attention.once_each(lambda x: x.transpose(0, 1), *inputs)
        q, k, v = self._project(*inputs, prologue)
        if key_padding_mask is not None and not is_batched:
            key_padding_mask = key_padding_mask[None]
        mask = attention.attention_mask(q, k, self.num_heads, attn_mask, key_padding_mask)
        attended, weights = attention.attend(q, k, v, self, mask, need_weights)
        output = self.out_proj(attended)  # (N, L, E)
        if need_weights and average_attn_weights:
            weights = weights.mean(1)  # (N, H, L, S) -> (N, L, S)
        if not is_batched:
            return output[0], None if weights is None else weights[0]
        if not self.batch_first:
            output = output.transpose(0, 1)
        return output, weights


class QLoRALinear(LoRALinear):
    in_4_bits = True


class QLoRAConv2d(LoRAConv2d):
    in_4_bits = True


class QLoRAMultiheadAttention(LoRAMultiheadAttention):
    in_4_bits = True


ADAPTED[nn.Linear] = LoRALinear, QLoRALinear
ADAPTED[nn.Conv2d] = LoRAConv2d, QLoRAConv2d
ADAPTED[nn.MultiheadAttention] = LoRAMultiheadAttention, QLoRAMultiheadAttention

# -------------------------------------------------------------------------------------------------- into a model


def add_lora_to_model(
    model: nn.Module,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] | None = None,
    use_qlora: bool = False,
    use_rslora: bool = False,
    base_dtype: torch.dtype | None = None,
    adapt_last: int | None = None,
    head: str | Sequence[str] | None = None,
) -> nn.Module:
    """Put adapters on a model's layers, in place, and return it: nothing is frozen yet, see `freeze_backbone_params`.

    Args:
        model: any module with Linear, Conv2d or MultiheadAttention layers. Adapters that it has are replaced.
        r, lora_alpha, lora_dropout, use_rslora: see `LoRASettings`.
        target_modules: names, suffixes, containing modules or regular expressions of the layers to adapt. None: every
            layer except the classifier head and a ViT's patch embedding. Attention is adapted as a whole.
        use_qlora: store the adapted weights in 4 bits, and the weights below `adapt_last`.
        base_dtype: torch.bfloat16 or float16: store the same float32 weights in it. torch.int8: store linear layers'
            and attention's in 8 bits, and on CPUs multiply in 8 bits (`lora.int8`). None: all as they are.
        adapt_last: adapt this many last blocks of a ViT, or stages of a ResNet, only. Below there is no backward.
        head: the names of the modules that no checkpoint has, such as a classifier: they train and are saved whole.
            None: the module called fc, heads, head or classifier, see `toolkit.models.backbones.head_name`.

    Raises InputError, and leaves the model as it was: a bad value, a rank above the full rank of its largest layer, a
    target that matches nothing, a weight that two layers share, or layers in fewer bits that would become float.
    """
    settings = LoRASettings(r, lora_alpha, lora_dropout, use_rslora)
    inner = adapted.unwrap_for_editing(model)
    name_head(inner, head)
    chosen = adapted.choose_layers(model, target_modules, adapt_last)
    last, layer = list(adapted.adaptable_layers(inner).items())[-1]
    is_meant = head is not None or in_head(inner, last) or (target_modules is not None and last in chosen)
    is_meant |= any(last.startswith(f"{block}.") for block in block_names(inner))
    if last and isinstance(layer, nn.Linear) and not is_meant:
        what = f"the last layer, {last}, is in no classifier head, so it is frozen with the backbone"
        warnings.warn(f"{what}: if it is new, give head={last!r}", stacklevel=2)
    by_layer = dict.fromkeys(chosen, settings)
    if adapt_last is not None:  # those below are without an adapter, but are stored as the others are
        names = adapted.choose_layers(model)
        below = itertools.takewhile(lambda name: not adapted.in_last_blocks(inner, name, adapt_last), names)
        by_layer = dict.fromkeys(below) | by_layer
    return adapt_layers(model, by_layer, use_qlora, base_dtype)


def adapt_layers(model: nn.Module, settings: Mapping, use_qlora: bool = False, base_dtype=None) -> nn.Module:
    """Put adapters on exactly the layers named, in place, and return the model. No other layer is adapted afterwards.

    The names are as `choose_layers` returns them. An attention's output projection is adapted with the attention, with
    the same settings unless its own name is among these. Settings of None: only stored as the others are, see
    `add_lora_to_model`. It raises InputError as that does, or for a name that is no layer to adapt.
    """
    wrapped = model
    model = adapted.unwrap_for_editing(model)
    candidates = adapted.adaptable_layers(model)
    chosen = {}
    projections = {}  # of those that are attention
    for name, layer in candidates.items():
        if name in settings and (settings[name] is not None or use_qlora or adapted.rounds(layer, base_dtype)):
            chosen[name] = layer
            if isinstance(layer, nn.MultiheadAttention):
                projections[dotted(name, "out_proj")] = name
    unknown = settings.keys() - candidates.keys() - projections.keys()
    if unknown:
        raise InputError(f"no layer to adapt is named {listed(sorted(unknown))}; there are: {listed(candidates, 12)}")
    highest = full_rank(model)
    for name, own in settings.items():
        if own is not None and own.r > highest:
            raise InputError(f"rank {own.r} of {name} is above {highest}, the largest full rank; lower r (--lora-rank)")
    adapted.check_shared_weights(model, chosen)
    adapted.check_stored_bits(model, chosen, use_qlora, base_dtype)
    if record_of(model).base_digests is None:
        record_of(model).base_digests = base_digests(model)
    for _, layer in adapted.outermost_layers(model, is_adapted):
        if layer.base_bits == 32:
            layer.remove_lora()
    for name, layer in chosen.items():
        kind = adapted.kind_for(type(layer), use_qlora)
        kind.adapt(layer, settings[name], None if in_head(model, name) else base_dtype)
    for projection, name in projections.items():
        if settings.get(projection, settings[name]) != settings[name]:
            layer = chosen[name].out_proj
            type(layer).adapt(layer, settings[projection], base_dtype)
    fuse(model)
    return wrapped


def multiply_in_8_bits(model: nn.Module) -> nn.Module:
    """Merge the adapters and store the weights, but the head's, in 8 bits. Raises InputError as `check_8_bits`."""
    check_8_bits(model)
    model = LoRAManager(model).unload(merge=True)
    return adapt_layers(model, dict.fromkeys(adapted.choose_layers(model)), base_dtype=torch.int8)


def check_8_bits(model: nn.Module) -> None:
    """Raise InputError for a model whose head is its only linear layer, as a ResNet, and for a CPU that would err."""
    layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not in_head(model, name)]
    if not layers:
        raise InputError("8 bits are for linear layers and attention, and the model has none: use --arithmetic float")
    widest = max(layers, key=lambda layer: layer.weight.numel())
    if not int8.multiplies_exactly("cpu", *widest.weight.shape):
        raise InputError("8 bits overflow on this CPU, which has neither VNNI nor AMX: use --arithmetic float")


# ---------------------------------------------------------------------------------------------------- what trains


def freeze_backbone_params(
    model: nn.Module, freeze: bool = True, train_norms: bool = False, head: str | Sequence[str] | None = None
) -> None:
    """Freeze all but the adapters and the classifier head, or let everything train again.

    The BatchNorms of a frozen backbone stay in eval mode: their statistics belong to the base. With `train_norms` the
    normalisation layers train too, and BatchNorm's statistics; those that followed the adapters follow no more. Weights
    stored in 4 or 16 bits never train. `head`: see `add_lora_to_model`. Raises InputError if all is to train but the
    adapters are merged, or if the base is to train and several adapters share it.
    """
    model = adapted.unwrap_for_editing(model)
    name_head(model, head)
    if (train_norms or not freeze) and LoRAManager(model).names:
        raise InputError("several adapters share this base, so it cannot train: load one alone, with load_finetuned")
    if not freeze and any(isinstance(module, LoRALayer) and module.merged for module in model.modules()):
        raise InputError("the adapters are merged: call unmerge_lora_weights() before everything trains")
    if train_norms or not freeze:
        for conv in followers(model):
            settle(conv)
    for name, module in model.named_modules():
        whole = not freeze or in_head(model, name) or (train_norms and isinstance(module, NORMS))
        is_layer = isinstance(module, LoRALayer)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            trains = whole or (is_layer and parameter_name.startswith("lora_"))
            is_rounded = is_layer and parameter_name in module.float_digests
            possible = parameter.is_floating_point() and parameter.numel() > 0 and not is_rounded
            parameter.requires_grad_(trains and possible)
        freeze_statistics(module, not whole, model.training)
    fuse(model)


# --------------------------------------------------------------------------------------------------------- predicting


def load_finetuned(
    adapter_path: str | Path, checkpoint: str | Path | None = None, stage1_adapter: str | Path | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """A fine-tuned model, in eval mode, ready to predict:

        model, info = load_finetuned("checkpoints/lora/lora.pth")
        logits = model(info["transform"](Image.open("image.png"))[None])
        print(info["class_names"][logits.argmax()])

    `checkpoint` and `stage1_adapter` are the base, and what is merged into it, if they are not where they were at
    training. Returns the model and the file's metadata, with `transform` from a PIL image (see `eval_transform`) to
    (C, H, W). A model with a class for every pixel answers for an image by `toolkit.models.dense.answers_for`. Raises
    InputError for a file that is not what it should be, or another base than the one trained on.
    """
    content = read_adapter_file(adapter_path)
    metadata = content["metadata"]
    adapter_file.check_metadata(adapter_path, metadata, content["tensors"])
    base, stage1 = adapter_file.find_base(adapter_path, metadata, checkpoint, stage1_adapter)
    per_pixel = tasks.from_record(metadata.get("task"), metadata["class_names"], adapter_path).per_pixel
    model, _ = load_base(base, stage1, **adapter_file.model_shape(metadata), per_pixel=per_pixel)
    load_adapters(model, adapter_path, base)
    size = None if per_pixel else metadata["image_size"]
    return model.eval(), {**metadata, "transform": transforms.eval_transform(size, **bands.from_metadata(metadata))}


def load_base(
    checkpoint: str | Path, stage1_adapter: Path | None, num_classes: int, *, per_pixel: bool = False, **shape: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """`load_backbone`, with the stage-1 adapter of `moco.pretrain`, if any, merged; that knows its heads and channels.

    With `per_pixel` it is a `DenseModel`. `shape` and what is returned are as of `load_backbone`. Raises InputError for
    a file that cannot be read, or an adapter of another base or other channels.
    """
    if stage1_adapter is not None:
        about = read_adapter_file(stage1_adapter)["metadata"]
        trained_on = about.get("channels") or 3
        asked = shape.get("channels")
        if asked not in (None, trained_on):
            is_for = f"is for images of {printable(trained_on)} channels, not {asked}"
            raise InputError(f"{stage1_adapter} {is_for}: leave out --channels")
        if shape.get("heads") is None:
            shape["heads"] = adapter_file.heads_of(about)
        shape |= {"channels": trained_on, "channel_fit": about.get("channel_fit")}
    model, report = load_backbone(checkpoint, num_classes, **shape)
    if stage1_adapter is not None:
        load_adapters(headless(model), stage1_adapter, checkpoint)
        LoRAManager(model).merge_into_base()
    if per_pixel:
        of_backbone = record_of(model)
        model = DenseModel(model, num_classes, report["image_size"], report["channels"])
        for kind in ("base_digests", "resized_digests"):
            digests = {f"backbone.{name}": digest for name, digest in getattr(of_backbone, kind).items()}
            setattr(record_of(model), kind, digests)
    return model, report


def load_adapters(model: nn.Module, path: str | Path, base: str | Path) -> None:
    """Put the adapters of a file on the model of its base. Raises InputError where they do not fit."""
    layers = read_adapter_file(path)["layers"]
    settings = {name: recorded_settings(record) for name, record in layers.items()}
    try:
        adapt_layers(model, settings, any(map(recorded_in_4_bits, layers.values())))
    except InputError as error:
        raise InputError(f"{path} does not fit {base}: {error}") from None
    LoRAManager(model).load_lora_checkpoint(path)


# --------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None, after_epoch: Callable[["FineTuning"], None] | None = None) -> dict[str, Any]:
    """Fine-tune as the options say. Raises InputError for anything wrong with the options, the data or the files.

    `argv` is the command line, None: `sys.argv[1:]`. `after_epoch` is called with the run after each of its epochs, in
    every process: to log, or to draw its `history`. Returns the content of `results.json`, such as `val_accuracy` (0 to
    1); with --folds see `cross_validate`.
    """
    args, sources = read_options(argv, __doc__)
    runs.keep_freed_memory()  # in a notebook too
    device = devices.select_device(args.device)
    distributed.join(device)
    asked = options.stored_sections(args, sources)
    if options.all_folds(args):
        return folds.cross_validate(main, after_epoch, args, asked)
    held = output_folder.held(args.output_dir, output_folder.FINE_TUNING_FILES, args.resume)
    with runs.faults_explained(device, options.SAVES_MEMORY), held as begin:
        read = config.stored(args.config) or "defaults"
        print(f"settings: {read} and what was typed; all go into {args.output_dir / 'config.yaml'}")
        splits, model, report, plan = prepare(args, device)
        print(reports.describe_data(args, splits), describe_base(report), sep="\n")
        print(f"device: {device}, precision: {plan.dtype}")
        plan = with_norms_chosen(args, plan, devices.place(model, device), report, splits)
        if args.learning_rate == "auto":
            args = with_rate_found(args, plan, model, splits, begin)
        run = begun_run(args, plan, model, report, splits)
        print(reports.describe_rates(run))
        if settled_norms(args, device) != "frozen" and (following := len(followers(model))):
            print(f"norms: {following} BatchNorms follow the adapters (--norms follow)")
        if not args.resume:
            print(reports.describe_start(run))
        begin()  # once everything has been read
        if not run.path("config.yaml").exists():  # a resumed run's may have been edited for the next
            run_state.write_config(run.path("config.yaml"), asked, run.identity["config"])
        train(run, after_epoch)
        return finish(run)


def finetune(after_epoch: Callable[["FineTuning"], None] | None = None, **asked: Any) -> dict[str, Any]:
    """`main` by keywords, as ``finetune(data_dir="my_images", checkpoint="moco-v2-800ep", epochs=20)``.

    Options are named as in a YAML file: `learning_rate`, not `--lr`. A list has several values. An option that is None,
    or is False and has no value by default, is left out. Raises InputError as `main` does.
    """
    return main(list(config.as_typed(FineTuneOptions, asked)), after_epoch)


def prepare(args: FineTuneOptions, device: torch.device) -> tuple[Splits, nn.Module, dict[str, Any], Plan]:
    """Load the images, build the model for their classes, and settle what the options leave open."""
    devices.seed_everything(args.seed)
    # What a run has measured at its start counts for all of it. None: it is to be measured.
    precision = run_state.recorded_setting(args.resume, "precision") if args.precision == "auto" else args.precision
    if precision is None and (device.type != "cpu" or args.arithmetic == "int8"):
        precision = "auto"
    dtype = None if precision is None else devices.select_precision(precision, device)
    known, read = options.known_image_values(args, args.checkpoint)
    splits = load_images(args, read)
    model, report = build_model(args, dtype, len(splits.class_names))
    dtype = report["dtype"]
    names = {known: name for name, known in devices.DTYPES.items()}
    training.check_batches(model, len(splits.train), len(splits.val), args.batch_size)
    normalization = bands.settle(known, report["arch"], report["channels"], splits.train)
    settled = (precision or names[dtype], known._asdict(), normalization, settled_norms(args, device))
    return splits, model, report, Plan(device, dtype, *settled)


def settled_norms(args: FineTuneOptions, device: torch.device) -> str:
    """`--norms`, with `auto` as frozen on a GPU: no GPU has run norms that follow, which are predicted to be slow."""
    return "frozen" if args.norms == "auto" and args.freeze_backbone and device.type != "cpu" else args.norms


def build_model(args: FineTuneOptions, dtype: torch.dtype | None, num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone of a checkpoint with adapters and a fresh head, frozen as the options say; and its report.

    `dtype` is the products' and, unless in 8 bits, the frozen weights'. None: bf16 where a CPU is faster in it.
    """
    shape = options.backbone_shape(args) | {"per_pixel": args.task in choices.PER_PIXEL}
    model, report = load_base(args.checkpoint, args.stage1_adapter, num_classes, **shape)
    if dtype is None:
        shape = report["channels"], report["image_size"]
        dtype = devices.faster_dtype(lambda dtype: adapt_as_asked(copy.deepcopy(model), args, dtype), *shape)
    frozen_dtype = dtype
    if args.arithmetic == "int8":
        check_8_bits(model)
        frozen_dtype = torch.int8
    adapt_as_asked(model, args, frozen_dtype)
    return model, report | {"dtype": dtype}


def adapt_as_asked(model: nn.Module, args: FineTuneOptions, frozen_dtype: torch.dtype) -> nn.Module:
    """Put adapters on a model in place as the options say, freeze the rest, and store it in this dtype."""
    if not args.freeze_backbone:  # what trains is stored as it is, random weights too
        frozen_dtype = None
    if args.lora_rank > 0:
        add_lora_to_model(model, **options.lora_options(args), base_dtype=frozen_dtype)
    elif frozen_dtype == torch.int8:
        multiply_in_8_bits(model)
    if args.freeze_backbone:
        freeze_backbone_params(model, train_norms=args.norms == "train")
    share_statistics(model)
    set_gradient_checkpointing(model, args.gradient_checkpointing)
    return model


CLEAR_GAIN = 0.01  # of a probe's loss: what is less may be chance (benchmarks/RESULTS.md)


def with_norms_chosen(args: FineTuneOptions, plan: Plan, model: nn.Module, report: dict, splits: Splits) -> Plan:
    """`--norms auto`: begin with the training images' BatchNorm statistics if a linear probe loses less with these."""
    # Those in the file are of the images, and of the size, that the ResNet was pretrained on (AdaBN, arXiv 1603.04779).
    if args.norms == "auto" and args.resume:
        began_so = run_state.recorded_setting(args.resume, "norms") == "own"
        return plan._replace(norms="own") if began_so else plan
    if report["arch"] not in RESNETS or not options.may_have_own_norms(args):
        return plan
    loaders = Loaders(args, plan, splits, report["image_size"], data.LoadingMeter())
    images = splits.train.at_most(NORMS_IMAGES)
    batches = loaders.add_same_views(images, loaders.plain_view)
    task = tasks.task_of_run(args, splits, plan.device)

    def probe_loss() -> float:
        features = task.features(model, batches, plan.device, plan.dtype, len(images))
        return task.start(model, *features, clusters=images.clusters()).loss

    stored = probe_loss()
    own_statistics(model, loaders.followed_batches())
    own = probe_loss()
    for conv in followers(model):
        conv.followed = None
    serves = own < (1 - CLEAR_GAIN) * stored
    if not distributed.gather(serves)[0]:  # elsewhere the last bits may differ
        return plan
    print(f"norms: they begin with the images' own statistics: with these a probe loses {own:.3g}, else {stored:.3g}")
    return plan._replace(norms="own")


def with_rate_found(args: FineTuneOptions, plan: Plan, model: nn.Module, splits: Splits, begin) -> FineTuneOptions:
    """`--learning-rate auto`: the options with the best rate of trials, or with that of the run to go on with."""
    rate = run_state.recorded_setting(args.resume, "learning_rate")
    if rate not in (None, "auto"):
        return replace(args, learning_rate=rate)
    settings = {"config": plan.settings(args), "images": splits.digest(), "base": record_of(model).base_digests or {}}
    trials: list[search.Trial] = []
    if args.resume:
        state = run_state.state_of_same_run(args, args.resume, {"trials", *settings}, settings, options.FREE_TO_CHANGE)
        trials += map(search.Trial._make, state["trials"])
    parts = search.parts_of(splits)
    random_state = devices.rng_state()
    task = tasks.task_of_run(args, splits, plan.device)
    epochs = min(args.epochs, search.MOST_TRIAL_EPOCHS)
    own = replace(args, epochs=epochs, keep_best=None)
    steps = steps_of_epoch(args, parts)
    rates = search.rates_that_differ(lambda rate: rate / optim.run_divisor(own, rate, steps * epochs))
    images = f"{len(parts.train):,} training images, judged by {len(parts.val):,} others of them"
    print(f"searching for a learning rate: {len(rates)} runs of {epochs} epochs on {images}")
    features = None  # of the first trial, for all of them
    for rate in rates[len(trials) :]:
        trial, features = try_rate(replace(own, learning_rate=rate), plan, parts, features)
        trials.append(trial)
        score = task.reported(trial.val_score)
        print(f"  learning rate {rate:.0e}: {task.score_title} {score}, loss {trial.val_loss:.4f}")
        begin()
        if distributed.is_main():
            save_atomically({"trials": list(map(tuple, trials)), **settings}, args.output_dir / "last.pth")
    rate = search.choose(trials, lambda score: task.variance(score, len(parts.val)), search.usual_rate(args))
    begin()
    if distributed.is_main():
        write_cells(trials, ("learning_rate", f"val_{task.score}", "val_loss"), args.output_dir / "learning_rates.csv")
    devices.restore_rng_state(random_state)  # so that a run given the rate found is this one
    return replace(args, learning_rate=rate, resume=None)


def try_rate(args: FineTuneOptions, plan: Plan, parts: Splits, features) -> tuple[search.Trial, tasks.Features]:
    """How a run ends on the parts of a search. Takes and returns `Loaders.features`."""
    devices.seed_everything(args.seed)
    model, report = build_model(args, plan.dtype, len(parts.class_names))
    training.check_batches(model, len(parts.train), len(parts.val), args.batch_size)
    run = TrialRun(args, plan, devices.place(model, plan.device), report, parts)
    features = run.start(features)
    score, loss = 0.0, math.inf
    with contextlib.suppress(Collapsed), contextlib.redirect_stdout(io.StringIO()):
        train(run)
        last = run.history[-1]
        score, loss = last[f"val_{run.task.score}"], last["val_loss"]
    data.end_workers()
    return search.Trial(args.learning_rate, score, loss), features


def begun_run(args: FineTuneOptions, *of_run: Any) -> "FineTuning":
    """The run of the arguments of `FineTuning` that `--resume` goes on with, or a new one with its starting values."""
    if path := args.resume:
        has_best = same_file(args.output_dir / "lora.pth", path.with_name("lora.pth")) and path.name == "last.pth"
        if args.keep_best and not has_best:
            raise InputError(f"--keep-best: {path} is to be last.pth in --output-dir, with the best adapter, lora.pth")
        run = FineTuning(args, *of_run, teaches=value_at(read_checkpoint(path), "teacher") is not None)
        run.resume(path, options.FREE_TO_CHANGE)
        run.plan = run.plan._replace(rate_searched=path.with_name("learning_rates.csv").exists())
        return run
    run = FineTuning(args, *of_run)
    features = run.start()
    if run.teacher is not None and not run.teacher.knows_enough():
        data.end_workers()
        run = FineTuning(args, *of_run, teaches=False)
        run.start(features)
    return run


# ----------------------------------------------------------------------------------------------------------- training


def train(run: "FineTuning", after_epoch: Callable[["FineTuning"], None] | None = None) -> None:
    """Train the remaining epochs of a run; after each, write its files and call `after_epoch`.

    Raises Collapsed after more than `guard.RETREATS` collapses, and Stopped after Ctrl-C or SIGTERM once all is saved.
    """
    args = run.args
    run.save()  # what makes the run resumable, however soon it is killed
    with run.saved_when_stopped(), constants_kept():
        while len(run.history) < args.epochs:
            epoch = len(run.history) + 1
            progress = run.begin_epoch()
            unread = []  # the images of each step, and its sums: see `training.read_figures`
            run.model.train()
            title = f"epoch {epoch}/{args.epochs}"
            total = run.loaders.train.batch_sampler.drawn
            bar = runs.progress_bar(title=title, total=total, initial=progress.images, unit="img")
            try:
                with progress.timed(), bar:
                    for step in run.loaders.steps(epoch, progress.steps):
                        run.optimizer.zero_grad(set_to_none=True)
                        # Gradients are averaged over processes; it is their sum that belongs to all the images.
                        sums = run.add_gradients(step, distributed.world_size() / step.images)
                        if args.clip_grad_norm is not None:
                            run.scaler.unscale_(run.optimizer)
                            nn.utils.clip_grad_norm_(run.model.parameters(), args.clip_grad_norm)
                        run.scaler.step(run.optimizer)
                        run.scaler.update()
                        run.schedule.step()
                        if run.teacher is not None:
                            run.teacher.after_step()

                        unread.append((step.images, sums))
                        if len(unread) == run.steps_read_together or step.is_last:
                            run.note_steps(unread, bar)
                            run.stop.check()

                    trained = run.evaluate_watched()
                    if run.guard.after_epoch(trained, run.still_sure):
                        run.evaluate_watched(at_start=True)
                    result = run.evaluate_kept(run.stop.checked(run.loaders.val))
            except GoBack as verdict:
                run.go_back(str(verdict))
            else:
                run.end_epoch(trained, result)
                if after_epoch is not None:
                    after_epoch(run)


def finish(run: "FineTuning") -> dict[str, Any]:
    """Calibrate the adapter that is kept, and write and print the results of its answers for the evaluation images."""
    manager = LoRAManager(run.model)
    path = run.path("lora.pth")
    kept = {"epoch": len(run.history), "keeps_start": run.kept.at_start}
    if run.args.keep_best:
        run.kept.at_start = True  # of what the last epoch has changed, the file may have nothing
    with run.kept_weights():
        if run.args.keep_best:
            kept |= manager.load_lora_checkpoint(path)
            run.kept_outputs = None
        if "temperature" in kept:  # a run that was killed behind this had calibrated it
            run.task.take_chosen(kept)
        elif (run.estimate_head() | run.calibrate()) and distributed.is_main():
            manager.save_lora_checkpoint(path, read_adapter_file(path)["metadata"] | run.task.chosen())
        # In 16 bits the head's products are rounded otherwise at another temperature.
        known = run.kept_outputs is not None and run.dtype == torch.float32
        result = run.kept_answers(run.task.temperature) if known else run.evaluate(run.loaders.val)
        if not distributed.is_main():
            return {}
        return reports.write_finetuning(run, result, kept, count_parameters(run.model))


class FineTuning(RunState):
    """A run: the model, its optimizer, its data, and how far it has come. `train` is its loop.

    `model`, on its device, and `report` are what `build_model` returns. `teaches`: may images without labels train?
    """

    def __init__(self, args: FineTuneOptions, plan: Plan, model: nn.Module, report: dict, splits: Splits, teaches=True):
        super().__init__(args, plan.device, plan.dtype)
        self.model = model
        self.network = model  # what computes on what the loaders have: images, or features that are cached of them
        self.report = report
        self.splits = splits
        self.loaders = Loaders(args, plan, splits, report["image_size"], self.meter)
        if args.cache_features != "none":
            with evaluation.eval_mode(model):
                lower, self.network = split.split_model(model, args.adapt_last)
                self.loaders.cache_features(lower, plan.dtype)
        self.loaders.open(bool(evaluation.training_norms(model)), teaches)
        if plan.norms == "own":
            own_statistics(self.network, self.loaders.followed_batches())
        if args.freeze_backbone and settled_norms(args, plan.device) in ("auto", "follow"):
            follow_statistics(self.network, self.loaders.followed_batches(), required=plan.norms == "follow")
        if args.freeze_backbone and plan.norms == "auto":
            plan = plan._replace(norms="follow" if followers(model) else "frozen")  # files say what was done
        self.plan = plan
        self.task = tasks.task_of_run(args, splits, plan.device)
        self.adapter_lr_factor = 1.0
        self.resnet_lr_factor = 1.0  # part of the former; the head is no softer for that
        if args.lora_init == "gradient" and args.lora_rank > 0:
            most = optim.MOST_WITH_MASKS / args.learning_rate if self.task.per_pixel else math.inf
            if report["arch"] in RESNETS and not self.task.per_pixel:
                self.resnet_lr_factor = initialization.RESNET_LR_FACTOR
            self.adapter_lr_factor = self.resnet_lr_factor * initialization.adapter_lr_factor(args.lora_rank, most)
        self.head_temperature = probe.HeadTemperature()
        self.by_unlabelled: dict[str, Any] | None = None  # what images without labels say of the start
        self.teacher: teacher.Teacher | None = None
        self.sure_images: data.Remembered | None = None  # without labels, that the start answers most surely
        self.still_sure: bool | None = None  # were they when the guard's images were last evaluated?
        self.kept_outputs: tuple[Tensor, Tensor] | None = None  # for the evaluation images, and their targets
        if self.loaders.unlabelled is not None:
            shape = (len(splits.unlabelled), len(splits.class_names))
            self.teacher = teacher.Teacher(model, *shape, plan.device, plan.dtype)
        has_start = args.head_init == "probe" and args.freeze_backbone  # worth a copy of all that trains
        self.kept = optim.KeptWeights(model, has_start)
        self.guard = Guard(self.task, splits.train, self.loaders.watched_images, has_start, args.epochs)
        self.last_good: dict[str, Any] | None = None  # None: the present state is good, or no epoch has begun
        self._begin_training()

    def _begin_training(self) -> None:
        """Set up the optimizer and its rates. Name what training changes, and what else is this run's."""
        args = self.args
        model = self.model
        asked = args.learning_rate
        steps = math.ceil(len(self.loaders.train) / args.accumulation_steps)
        divisor = optim.run_divisor(args, asked, steps * args.epochs)
        self.rate = asked / divisor  # the peak learning rate, which each collapse lowers
        optimizer = optim.build_optimizer(model, asked, self.adapter_lr_factor, args.weight_decay)
        self.begin_training(optimizer, steps, optim.warmup_steps(args.warmup_epochs, steps, steps * args.epochs))
        optim.lower_rates(self.schedule, divisor)
        self.trained_entries |= {
            "model": StateEntry(lambda: trained_state(model), lambda state: model.load_state_dict(state, strict=False)),
            "kept": self.kept,
        }
        if self.teacher is not None:
            self.trained_entries["teacher"] = self.teacher
            self.other_entries["taken"] = StateEntry(lambda: self.loaders.taken, self.loaders.take_unlabelled)
        self.other_entries |= {"guard": self.guard, "good": StateEntry.attribute(self, "last_good")}
        head = StateEntry.attribute(self, "head_temperature", tuple, lambda state: probe.HeadTemperature(*state))
        self.other_entries["head_temperature"] = head
        self.other_entries["contradicted"] = StateEntry.attribute(self.task, "contradicted")
        for name in ("rate", "adapter_lr_factor", "by_unlabelled"):
            self.other_entries[name] = StateEntry.attribute(self, name)
        self.identity |= {"config": self.plan.settings(args), "images": self.splits.digest()}
        self.identity |= {"class_names": list(self.splits.class_names), "base": record_of(model).base_digests or {}}

    def start(self, features: tasks.Features | None = None) -> tasks.Features:
        """Start the head from what the backbone knows, then the adapters. Takes and returns `Loaders.features`."""
        if features is None:
            features = self.loaders.features(self.network, self.task, self.dtype)
        clusters = self.loaders.probe_images.clusters()
        if clusters is None and self.task.per_pixel:  # the pixels of an image belong together
            clusters = torch.arange(len(self.loaders.probe_images))
        started = tasks.start_head(self.task, self.model, features, self.args, clusters)
        self.baseline, self.head_temperature, found = started
        if found is not None:
            found = distributed.gather(found)[0]  # elsewhere the last bits may differ, and with them what is decided
            answers = found.answers
            places = found.of_their_kind()
            about = attributes(found, "name", "gain_loss", "gain_accuracy")
            about["shares"] = dict(zip(self.task.names, answers.mean(0).tolist(), strict=True))
            about["foreign"] = found.foreign.float().mean().item()
            about |= {"images": len(answers), "left_out": len(answers) - len(places)}
            about |= {"trained": self.teacher is not None, "certainty": answers.amax(1).mean().item()}
            self.by_unlabelled = about
            if self.teacher is not None and len(places) >= distributed.world_size():
                self.teacher.first_answers = answers[places]
                self.loaders.take_unlabelled(places.tolist())
        if self.estimate_statistics():  # the head is to fit what BatchNorm gives it in training
            trained_on = self.loaders.features(self.network, self.task, self.dtype)
            _, self.head_temperature, _ = tasks.start_head(self.task, self.model, trained_on, self.args, clusters)
        if self.baseline["probe"] is None and self.args.head_init == "probe":
            self.baseline["probe"] = self.evaluate(self.loaders.val).score
        if self.args.head_init == "probe" and self.task.counts_images:  # of several labels it gained nothing
            spread = measures.spread(self.overlaid_outputs())
            self.head_temperature = self.head_temperature._replace(spread=spread)
        self.task.soften(self.model, self.temperature)
        self.start_adapters()
        return features

    def overlaid_outputs(self) -> Tensor:
        """Outputs (N, K) for the guard's images, laid one over another: what training has not seen."""
        pairs = evaluation.overlaid(self.loaders.watched)
        return evaluation.all_outputs(self.network, pairs, self.device, self.dtype)[0]

    def start_adapters(self) -> None:
        """Start the adapters at the gradient of the first images, and remember this start."""
        self.begin_averages()  # by which the first images without labels are answered
        if self.args.lora_init == "gradient":
            with evaluation.eval_mode(self.model):  # no dropout; BatchNorm's statistics stay
                initialization.start_at_gradient(self.model, self._first_backward, self.args.seed)
        self.begin_averages()
        worst_loss = None  # of the guard's batches, where BatchNorm makes losses depend on the batch
        if self.loaders.statistics is not None:  # first: what it leaves of a BatchNorm's statistics is not the start's
            of_run = (self.device, self.dtype, self.task.plain_loss)
            worst_loss = evaluation.worst_batch_loss(self.network, self.loaders.watched, *of_run)
        self.guard.note_start(worst_loss, self.evaluate_watched())

    def begin_averages(self) -> None:
        """Begin all averages of weights with the present ones."""
        self.kept.begin()
        if self.teacher is not None:
            self.teacher.begin()

    def _first_backward(self) -> None:
        """Add up the gradients of the loss, summed over the images of the first steps."""
        images_at_once = initialization.GRADIENT_IMAGES
        factor = 1 / images_at_once  # lest float16 overflow; a power of two, which changes no digit
        steps = math.ceil(images_at_once / (self.args.batch_size * self.args.accumulation_steps))
        for step in itertools.islice(self.loaders.steps(epoch=1), steps):
            self.add_gradients(step, factor)

    def add_gradients(self, step: training.MicroBatches, factor: float) -> list[Tensor]:
        """Add up the gradients of a step's loss, times a factor, and return the sums that `read_figures` takes."""
        sums = []  # of loss, loss without label smoothing, and right answers, over the images of each batch
        for number, (images, labels, *unlabelled) in enumerate(step.batches, 1):
            images = devices.to_device(images, self.device)
            known = devices.to_device(labels, self.device)
            labels = (known,) if self.teacher is None else self.teacher.extend(known, *unlabelled)
            with distributed.exchanging(self.parallel, is_last=number == step.number):
                with devices.autocast(self.device, self.dtype):
                    logits = self.parallel(images)  # (N, outputs)
                loss = self.task.loss(logits.float(), *labels)
                self.scaler.scale(loss * factor).backward()
            figures = self.task.progress(logits[: len(known)].detach().float(), known)
            sums.append(torch.stack([loss.detach(), *figures]))
        return sums

    @property
    def adapter_rate(self) -> float | None:
        """The adapters' peak learning rate; None without adapters."""
        return self.rate * self.adapter_lr_factor if self.args.lora_rank > 0 else None

    @property
    def temperature(self) -> float:
        """What the head's logits are divided by at the start, at the present learning rate."""
        return self.head_temperature.at(self.rate * self.adapter_lr_factor / self.resnet_lr_factor)

    def begin_epoch(self) -> training.Progress:
        """The progress of the epoch that begins or goes on. Remembers the present state if it is good."""
        if self.progress is None:
            self.progress = training.Progress(self.rate * self.schedule.lr_lambdas[0](self.schedule.last_epoch))
            if self.guard.is_recoverable:
                path = self.path("lora.pth")  # with --keep-best: an epoch that is undone later may replace it
                best = None
                if self.args.keep_best and path.exists() and distributed.is_main():
                    best = read_checkpoint(path)
                self.last_good = copy_to_cpu({"epochs": len(self.history), "state": self.trained(), "best": best})
        return self.progress

    def note_steps(self, unread: list[tuple[int, list[Tensor]]], bar: tqdm) -> None:
        """Count steps, show them, and ask the guard about each, which may raise GoBack."""
        for images, (loss, plain, correct) in training.read_figures(unread, self.stop):
            self.progress.add(images, int(correct), plain)
            bar.set_postfix(self.progress.shown() | self.meter.shown(), refresh=False)
            bar.update(images)
            if not self.history and self.progress.steps == 1 and (unused := lora_utils.unused_adapters(self.model)):
                tqdm.write(f"no gradient reaches the adapters of {listed(unused)}: leave them out by --target-modules")
            self.guard.note_step(plain / images if math.isfinite(loss) else loss)
            self.guard.after_step()

    def end_epoch(self, trained: tasks.Answers, result: tasks.Answers) -> None:
        """Note an epoch that stays, by the guard's images with the trained weights; print it, and write its files."""
        self.guard.note_epoch(trained, self.kept.at_start)
        if self.guard.is_recoverable:
            self.last_good = None
        now = self.progress
        adapter_rate = self.adapter_rate and now.learning_rate * self.adapter_lr_factor
        row = {"epoch": len(self.history) + 1, "train_loss": now.loss, "val_loss": result.loss}
        row |= {f"val_{name}": value for name, value in result.measured().items()}
        row |= {"learning_rate": now.learning_rate, "adapter_learning_rate": adapter_rate, "seconds": now.seconds}
        self.history.append(row)
        self.progress = None
        print(reports.describe_epoch(self))
        self.save()

    def go_back(self, why: str) -> None:
        """Go back to the last good state and lower the learning rate. Raises Collapsed after RETREATS times."""
        epoch = len(self.history) + 1
        temperature = self.temperature
        good, self.last_good = self.last_good, None
        self.kept_outputs = None
        if good["best"] is not None and distributed.is_main():
            save_atomically(good["best"], self.path("lora.pth"))
        undone = sum(training.column(self.history[good["epochs"] :], "seconds")) + self.progress.seconds
        self.guard.note_retreat(epoch, self.rate, good["epochs"], undone)
        self.restore(good["state"])
        self.history = self.history[: good["epochs"]]
        self.progress = None
        if len(self.guard.retreats) > guard.RETREATS:
            self.save()
            raise Collapsed(epoch, self.rate, len(self.history), self.path("lora.pth"), finish(self)) from None
        self.rate /= guard.RETREAT_FACTOR
        optim.lower_rates(self.schedule, guard.RETREAT_FACTOR)
        if not self.history:  # the head need not be so soft, and then its gradient is another
            self.task.soften(self.model, self.temperature / temperature)
            self.start_adapters()
        self.save()
        print(f"epoch {epoch}: {why}; back to epoch {len(self.history)}, learning rate {self.rate:.1e}")

    def save(self) -> None:
        """Write the files of a finished epoch, or a part's state; with --keep-best `lora.pth` stays a better one's."""
        path = self.path("lora.pth")
        is_best = training.last_is_best(self.history, self.task.best_by.get(self.args.keep_best)) or not path.exists()
        if is_best and self.progress is None and distributed.is_main():
            with self.kept.in_place():
                LoRAManager(self.model).save_lora_checkpoint(path, reports.adapter_metadata(self))
        self.save_state()  # after lora.pth: a run killed between them repeats the epoch and writes the same one again
        self.save_metrics()

    @contextlib.contextmanager
    def kept_weights(self) -> Iterator[None]:
        """Within this block the model has the weights that are saved, and BatchNorm statistics for them."""
        with self.kept.in_place():
            self.estimate_statistics()
            yield

    def estimate_statistics(self) -> bool:
        """Give BatchNorms that train the statistics for the present weights. Does any train?"""
        if self.loaders.statistics is None:
            return False
        evaluation.estimate_statistics(self.network, self.loaders.statistics, self.device, self.dtype)
        return True

    def evaluate(self, batches: Iterable) -> tasks.Answers:
        """Evaluate batches with the weights that the model has now."""
        return self.task.evaluate(self.network, batches, self.device, self.dtype)

    def evaluate_watched(self, at_start=False) -> tasks.Answers:
        """Evaluate the guard's images, always in the same views. From then on these weights are kept."""
        self.kept.at_start = at_start
        with self.kept_weights():
            if self.teacher is not None:
                if self.sure_images is None:
                    self.sure_images = self.loaders.unlabelled_views(self.teacher.surest())
                logits, _ = evaluation.all_outputs(self.network, self.sure_images, self.device, self.dtype)
                self.still_sure = self.teacher.still_sure(logits)
            if self.task.per_pixel:
                return self.evaluate(self.loaders.watched)
            self.watched_outputs = evaluation.all_outputs(self.network, self.loaders.watched, self.device, self.dtype)
            return self.task.answers(*self.watched_outputs)

    def evaluate_kept(self, batches: Iterable) -> tasks.Answers:
        """Evaluate batches with the kept weights, at the temperature that the guard's images alone would choose."""
        with self.kept_weights():
            if self.task.per_pixel:
                return self.evaluate(batches)
            self.kept_outputs = evaluation.all_outputs(self.network, batches, self.device, self.dtype)
        optimism = self.head_temperature.optimism
        return self.kept_answers(self.task.believable_temperature(*self.watched_outputs, optimism))

    def kept_answers(self, temperature: float) -> tasks.Answers:
        """The answers of the last `evaluate_kept` at another temperature of the head."""
        outputs, targets = self.kept_outputs
        return self.task.answers(self.task.softened(outputs, temperature), targets)

    def estimate_head(self) -> bool:
        """Set the head anew, as images without labels show it, if these trained adapters, fully and without harm."""
        taught = self.teacher is not None and self.args.lora_rank > 0  # else the features, and what they show, are old
        if not taught or self.kept.at_start or self.rate != self.args.learning_rate:
            return False
        features = self.loaders.features(self.network, self.task, self.dtype, False)
        rows, targets, views = features.for_probe()
        self.task.end_by_unlabelled(self.model, rows, targets, features.images_without_labels[0], views)
        self.kept_outputs = None
        print("unlabelled: the head is estimated once more, so that the result is not the last epoch's")
        return True

    def calibrate(self) -> bool:
        """Make the probabilities believable, by training images: a temperature and, for several labels, thresholds."""
        optimism = self.head_temperature.optimism
        before = self.head_temperature.spread
        if optimism is None and before is None and not self.task.always_calibrates:  # numbers, or a head of no probe
            return False
        if self.task.per_pixel:
            how = (self.device, self.dtype, len(self.loaders.watched_images))
            outputs, targets = self.task.pixel_outputs(self.model, self.loaders.watched, *how)
        else:
            outputs, targets = evaluation.all_outputs(self.network, self.loaders.augmented, self.device, self.dtype)
        temperature = self.task.believable_temperature(outputs, targets, optimism)
        # Few images are known by heart, in all their views: what is new is to be answered as surely as by the probe.
        if before and (spread := measures.spread(self.overlaid_outputs())) > 0:
            images = 0 if optimism is None else len(self.splits.train)
            share = images / (images + tasks.SURE_IMAGES)
            temperature = temperature**share * (spread / before) ** (1 - share)
        self.task.calibrate(outputs, targets, temperature)
        self.task.soften(self.model, self.task.temperature)
        return True


class TrialRun(FineTuning):
    """A run of a search, which asks only how good it becomes: it writes nothing and never goes back."""

    def save(self) -> None:
        """Nothing goes on from it."""

    def saved_when_stopped(self) -> contextlib.AbstractContextManager:
        """As long as no run goes on, a stop request ends the command at once."""
        return contextlib.nullcontext()

    def go_back(self, why: str) -> None:
        raise Collapsed(len(self.history) + 1, self.rate, 0, self.path("lora.pth"), {}) from None


if __name__ == "__main__":
    runs.run_script(main)
