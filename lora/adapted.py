"""Adapted layers, defined in `finetune_lora.py`, as the rest of the toolkit sees them, and which ones a model has."""

import math
import numbers
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

from lora import backends, weights
from toolkit import InputError, listed
from toolkit.models.backbones import PATCH_EMBEDDINGS, block_names, in_head, unwrapped

# Stock class (no subclass: it may differ) -> what adapts it over a float base and a 4-bit one: see `finetune_lora`.
ADAPTED: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module]]] = {}


@dataclass(frozen=True)
class LoRASettings:
    """How a layer is adapted, in plain numbers, whatever they were. InputError names all that are out of range."""

    r: int = 8  # rank, at least 1
    lora_alpha: float = 16.0  # the update is scaled by alpha / r
    lora_dropout: float = 0.0  # 0 <= p < 1, on the adapter's input
    use_rslora: bool = False  # scale by alpha / sqrt(r) instead (arXiv 2312.03732)

    def __post_init__(self):
        problems = []
        if not isinstance(self.r, numbers.Integral) or isinstance(self.r, bool) or self.r < 1:
            problems.append(f"r is {self.r!r}; give a rank of 1 or more")
        if not isinstance(self.lora_alpha, numbers.Real) or not 0 < self.lora_alpha < math.inf:
            problems.append(f"lora_alpha is {self.lora_alpha!r}; give a number above 0")
        if not isinstance(self.lora_dropout, numbers.Real) or not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout is {self.lora_dropout!r}; give a number from 0 to below 1")
        if problems:
            raise InputError("; ".join(problems))
        for name, kind in LoRASettings.__annotations__.items():
            object.__setattr__(self, name, kind(getattr(self, name)))

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


# Of a rank-0 layer: no adapter, but its weight is stored in 4, 8 or 16 bits.
NO_ADAPTER = {name: kind() for name, kind in LoRASettings.__annotations__.items()} | {"scaling": 0.0}


def recorded_settings(record: Mapping[str, Any]) -> LoRASettings | None:
    """The settings in a layer's record of an adapter file. None: the layer had no adapter, but was in 4 bits."""
    if record["r"] == 0:
        return None
    return LoRASettings(*map(record.get, LoRASettings.__annotations__))


def is_adapted(module: nn.Module) -> bool:
    """Is this a layer of `finetune_lora.py`: with an adapter, or of rank 0, whose weight is stored in fewer bits?"""
    return hasattr(type(module), "adapted_state")


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have the parameters of an adapter now, by name; a rank-0 layer has empty ones."""
    return {name: module for name, module in model.named_modules() if adapter_parameters(module)}


def adapter_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The factors of a layer's adapter by their names in the layer; none if it is not adapted."""
    return {n: factor for n, factor in layer._parameters.items() if n.startswith("lora_") and is_adapted(layer)}


def recorded_in_4_bits(record: Mapping[str, Any]) -> bool:
    """Was the layer of this record in an adapter file over 4-bit weights? The name of its kind says so."""
    return record["kind"].startswith("QLoRA")


def kind_for(kind: type[nn.Module], in_4_bits: bool) -> type[nn.Module]:
    """The class that adapts layers of this one; that of an adapted layer, which it is in fewer bits, stays."""
    over_floats, over_4_bits = ADAPTED.get(kind, (kind, kind))
    return over_4_bits if in_4_bits else over_floats


def matches_layer(name: str, target: str) -> bool:
    """Is the target this layer's name, a part of it between dots (a suffix, a containing module), or a regex for it?"""
    try:
        return f".{target}." in f".{name}." or re.fullmatch(target, name) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"target {target!r} is neither a layer nor a regular expression: {error}") from None


def unwrap_for_editing(model: nn.Module) -> nn.Module:
    """The model inside a wrapper. Raises InputError if the wrapper no longer allows changing what trains."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise InputError("DistributedDataParallel has fixed what it exchanges: add adapters and freeze before it wraps")
    return unwrapped(model)


def outermost_layers(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for the modules wanted, except those inside attention, which belong to it."""
    inside = set()
    for name, module in model.named_modules():
        if id(module) not in inside and wanted(module):
            yield name, module
        # Swin's attention reads its layers' weights and never calls the layers.
        if isinstance(module, nn.MultiheadAttention | ShiftedWindowAttention):
            inside.update(map(id, module.modules()))


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be adapted or are adapted already, by name."""
    return dict(outermost_layers(model, lambda module: is_adapted(module) or _has_adaptable_kind(module)))


def _has_adaptable_kind(layer: nn.Module) -> bool:
    """Is the layer's type in `ADAPTED`, and are its weights parameters? Pruning and weight_norm replace them."""
    if type(layer) is nn.MultiheadAttention:
        return is_plain_attention(layer) and "weight" in layer.out_proj._parameters
    return type(layer) in ADAPTED and "weight" in layer._parameters


def is_plain_attention(layer: nn.MultiheadAttention) -> bool:
    """Has the attention one weight for q, k and v, and no positions but the input's? ViTs have such attention."""
    return layer._parameters.get("in_proj_weight") is not None and layer.bias_k is None and not layer.add_zero_attn


def choose_layers(model: nn.Module, target_modules=None, adapt_last: int | None = None) -> dict[str, nn.Module]:
    """The layers to adapt, by name; see `add_lora_to_model` for what the arguments select, and what is refused."""
    model = unwrap_for_editing(model)
    candidates = adaptable_layers(model)
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules or ())
    if unmatched := [t for t in targets if not any(matches_layer(name, t) for name in candidates)]:
        raise InputError(f"no layer matches {', '.join(unmatched)}; there are: {listed(candidates, 12)}")
    chosen = {}
    for name, layer in candidates.items():
        wanted = any(matches_layer(name, target) for target in targets)
        if target_modules is None:
            wanted = not in_head(model, name) and set(name.split(".")).isdisjoint(PATCH_EMBEDDINGS)
        if wanted and (adapt_last is None or in_last_blocks(model, name, adapt_last)):
            chosen[name] = layer
    if not chosen:
        raise InputError(f"no layer is left to adapt; there are: {listed(candidates, 12)}")
    return chosen


def in_last_blocks(model: nn.Module, name: str, number: int) -> bool:
    blocks = block_names(model)
    if not 1 <= number <= len(blocks):
        raise InputError(f"adapt_last is {number}; give a number from 1 to {len(blocks)}, the model's blocks")
    return any(matches_layer(name, block) for block in blocks[-number:])


def check_shared_weights(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Raise InputError if a chosen layer shares its weight with another, which the adapter would then change too."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for name, layer in chosen.items():
        if any(owners[id(p)] > 1 for p in layer.parameters() if p.dim() > 1):
            raise InputError(f"{name} shares its weight with another layer: leave it out by target_modules")


def rounds(layer: nn.Module | None, dtype: torch.dtype | None) -> bool:
    """Do layers of this kind store their weights rounded to this `base_dtype`? In 8 bits linear ones and attention."""
    if dtype == torch.int8:
        return isinstance(layer, nn.Linear | nn.MultiheadAttention)
    return dtype in backends.LOW_PRECISION


def check_stored_bits(model: nn.Module, chosen: Mapping, use_qlora: bool, base_dtype: torch.dtype | None) -> None:
    """Raise InputError if a layer cannot be stored in the bits asked for, or would have to change those that it has."""
    if use_qlora:
        for name, layer in chosen.items():
            if in_head(model, name):
                raise InputError(f"the classifier head {name} trains, so it cannot be in 4 bits: leave it out")
            if any(p.dtype == torch.float64 for p in layer.parameters()):
                raise InputError(f"{name} is in float64, which has no 4-bit form: call model.float() first")
        weights.bitsandbytes_functional()
    in_8_bits = {n: layer for n, layer in chosen.items() if base_dtype == torch.int8 and rounds(layer, base_dtype)}
    if base_dtype == torch.int8 and not in_8_bits:
        raise InputError("8 bits are for linear layers and attention; none is to be adapted: use --arithmetic float")
    for name, layer in in_8_bits.items():
        others = {p.dtype for p in layer.parameters()} - {torch.float32}
        if others and not (is_adapted(layer) and layer.base_bits < 32):
            raise InputError(f"{name} is in {others.pop()}, 8 bits are made of float32: call model.float()")
    for name, layer in outermost_layers(model, is_adapted):
        bits = layer.base_bits
        if bits < 32 and (name not in chosen or (bits == 4) != use_qlora):
            raise InputError(f"{name} is in {bits} bits, its float weight is gone: load the checkpoint again")
