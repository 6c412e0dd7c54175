"""Selects the layers of a model that get adapters, and their settings."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.swin_transformer import ShiftedWindowAttention

from lora.adapted import ADAPTED, LoRASettings, is_adapted
from lora.backends import LOW_PRECISION
from lora.nf4 import bitsandbytes_functional
from toolkit import InputError, listed
from toolkit.models.backbones import PATCH_EMBEDDINGS, block_names, in_head, unwrapped


def matches_layer(name: str, target: str) -> bool:
    """Is the target this layer's name, a part of it between dots (a suffix, a containing module), or a regex for it?"""
    try:
        return f".{target}." in f".{name}." or re.fullmatch(target, name) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"target {target!r} is neither a layer nor a regular expression: {error}") from None


def settings_by_layer(
    layers: Iterable[str],
    settings: LoRASettings,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> dict[str, LoRASettings]:
    """The settings of each layer by name: those given, with the rank or alpha of a pattern that matches the layer.

    Args:
        rank_pattern, alpha_pattern: targets (see `matches_layer`) -> values. The first target that matches counts.

    Raises:
        InputError: a target that matches no layer, or a value out of its range.
    """
    layers = list(layers)
    patterns = {"r": rank_pattern or {}, "lora_alpha": alpha_pattern or {}}
    for target in [*patterns["r"], *patterns["lora_alpha"]]:
        if not any(matches_layer(name, target) for name in layers):
            raise InputError(f"no adapted layer matches {target!r}; there are: {listed(layers, 12)}")
    chosen = {}
    for name in layers:
        changes = {}
        for field, pattern in patterns.items():
            values = [value for target, value in pattern.items() if matches_layer(name, target)]
            if values:
                changes[field] = values[0]
        chosen[name] = replace(settings, **changes)
    return chosen


# --------------------------------------------------------------------------------------------------------- the layers


def unwrap_for_editing(model: nn.Module) -> nn.Module:
    """The model inside a wrapper. Raises InputError if the wrapper no longer allows changing what trains."""
    if isinstance(model, DistributedDataParallel):
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
            inside.update(id(m) for m in module.modules())


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be adapted or are adapted already, by name."""
    return dict(outermost_layers(model, lambda module: is_adapted(module) or _has_adaptable_kind(module)))


def choose_layers(
    model: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    adapt_last: int | None = None,
) -> dict[str, nn.Module]:
    """The layers to adapt, by name; see `add_lora_to_model` for what the arguments select.

    Raises:
        InputError: a target or exclusion is no regular expression or matches nothing, the model has fewer blocks, or no
            layer is left.
    """
    model = unwrap_for_editing(model)
    candidates = adaptable_layers(model)
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    excluded = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []

    def is_matched(name: str, patterns: Iterable[str]) -> bool:
        return any(matches_layer(name, pattern) for pattern in patterns)

    def matches_nothing(pattern: str) -> bool:
        return not any(matches_layer(name, pattern) for name in candidates)

    unmatched = [pattern for pattern in [*(targets or []), *excluded] if matches_nothing(pattern)]
    if unmatched:
        raise InputError(f"no layer matches {', '.join(unmatched)}; there are: {listed(candidates, 12)}")
    if targets is None:
        left_out = {n for n in candidates if in_head(model, n) or set(n.split(".")) & set(PATCH_EMBEDDINGS)}
        chosen = {n: layer for n, layer in candidates.items() if n not in left_out}
    else:
        chosen = {n: layer for n, layer in candidates.items() if is_matched(n, targets)}
    chosen = {n: layer for n, layer in chosen.items() if not is_matched(n, excluded)}
    if adapt_last is not None:
        chosen = {name: layer for name, layer in chosen.items() if _in_last_blocks(model, name, adapt_last)}
    if not chosen:
        raise InputError(f"no layer is left to adapt; there are: {listed(candidates, 12)}")
    return chosen


def _in_last_blocks(model: nn.Module, name: str, number: int) -> bool:
    blocks = block_names(model)
    if not 1 <= number <= len(blocks):
        raise InputError(f"adapt_last is {number}; give a number from 1 to {len(blocks)}, the model's blocks")
    return any(matches_layer(name, block) for block in blocks[-number:])


def layers_below(model: nn.Module, exclude_modules: str | Sequence[str] | None, adapt_last: int) -> list[str]:
    """The names of the layers below the last blocks that can be adapted, without those excluded."""
    model = unwrap_for_editing(model)
    names = choose_layers(model, None, exclude_modules)
    return list(itertools.takewhile(lambda name: not _in_last_blocks(model, name, adapt_last), names))


def _has_adaptable_kind(layer: nn.Module) -> bool:
    """Is the layer's type in `ADAPTED`, and are its weights parameters? Pruning and weight_norm replace them."""
    if type(layer) is nn.MultiheadAttention:
        names = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
        return names <= layer._parameters.keys() and "weight" in layer.out_proj._parameters
    return type(layer) in ADAPTED and "weight" in layer._parameters


def check_shared_weights(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Raise InputError if a chosen layer shares its weight with another, which the adapter would then change too."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for name, layer in chosen.items():
        if any(owners[id(p)] > 1 for p in layer.parameters() if p.dim() > 1):
            raise InputError(f"{name} shares its weight with another layer: leave it out with exclude_modules")


def check_ranks(settings: Mapping[str, LoRASettings | None], highest: int) -> None:
    """Raise InputError for a rank above the highest that any layer of the model can use."""
    for name, own in settings.items():
        if own is not None and own.r > highest:
            raise InputError(f"rank {own.r} of {name} is above {highest}, the largest full rank; lower r (--lora-rank)")


def rounds(layer: nn.Module | None, dtype: torch.dtype | None) -> bool:
    """Do layers of this kind store their weights rounded to this `base_dtype`? In 8 bits linear ones and attention."""
    if dtype == torch.int8:
        return isinstance(layer, nn.Linear | nn.MultiheadAttention)
    return dtype in LOW_PRECISION


def check_stored_bits(
    model: nn.Module, chosen: Mapping[str, nn.Module], use_qlora: bool, base_dtype: torch.dtype | None = None
) -> None:
    """Raise InputError if a layer in 4, 8 or 16 bits would have to change its bits: its float weight is gone.

    Or if 8 bits are asked for, and no layer can be stored in them.
    """
    if base_dtype == torch.int8 and not any(rounds(layer, base_dtype) for layer in chosen.values()):
        raise InputError(
            "8 bits are for linear layers and attention, and none is to be adapted: use --arithmetic float"
        )
    for name, layer in outermost_layers(model, is_adapted):
        bits = layer.base_bits
        if bits < 32 and (name not in chosen or (bits == 4) != use_qlora):
            raise InputError(f"{name} is in {bits} bits, its float weight is gone: load the checkpoint again")


def check_four_bits(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Raise InputError if the chosen layers cannot be stored in 4 bits."""
    of_head = [name for name in chosen if in_head(model, name)]
    if of_head:
        raise InputError(f"the classifier head {of_head[0]} trains, so it cannot be in 4 bits: leave it out")
    for name, layer in chosen.items():
        if any(p.dtype == torch.float64 for p in layer.parameters()):
            raise InputError(f"{name} is in float64, which has no 4-bit form: call model.float() first")
    try:
        bitsandbytes_functional()
    except ImportError as error:
        raise InputError(str(error)) from None
