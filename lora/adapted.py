"""Adapted layers as the rest of the toolkit sees them: their settings, their Protocol, the table of their kinds.

`finetune_lora.py` defines the layers. The rest of this package, `lora_utils.py` and the scripts use them through the
Protocol `AdaptedLayer` and the table `ADAPTED`, so that no import runs upwards.
"""

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

from torch import Tensor, nn

from lora.int8 import Int8Weight
from lora.nf4 import NF4Weight
from toolkit import InputError

# The table of kinds: stock class -> the class that adapts it over a float base, and the one over a 4-bit base. Types
# are exact: a subclass may compute something else. `finetune_lora.py` fills the table below its classes: a reader finds
# both in one file, and nothing in this package has to import that file.
ADAPTED: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module]]] = {}


# ------------------------------------------------------------------------------------------------------- the settings


@dataclass(frozen=True)
class LoRASettings:
    """How a layer is adapted. Numbers of any kind, NumPy's too, are stored as plain ones.

    Args:
        r: rank, at least 1.
        lora_alpha: the update is scaled by alpha / r.
        lora_dropout: 0 <= p < 1, on the adapter's input.
        use_rslora: scale by alpha / sqrt(r) instead (arXiv 2312.03732).

    Raises:
        InputError: values out of these ranges, all of them in one message.
    """

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False

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
        for name, kind in (("r", int), ("lora_alpha", float), ("lora_dropout", float), ("use_rslora", bool)):
            object.__setattr__(self, name, kind(getattr(self, name)))

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


# Settings of a rank-0 layer: no adapter, but its weight is stored in 4, 8 or 16 bits.
NO_ADAPTER = {"r": 0, "lora_alpha": 0.0, "lora_dropout": 0.0, "use_rslora": False, "scaling": 0.0}


def recorded_settings(record: Mapping[str, Any]) -> LoRASettings | None:
    """The settings in a layer's record of an adapter file. None: the layer had no adapter, but was in 4 bits."""
    if record["r"] == 0:
        return None
    return LoRASettings(*(record[name] for name in ("r", "lora_alpha", "lora_dropout", "use_rslora")))


# ---------------------------------------------------------------------------------------------------------- the layers


class AdaptedLayer(Protocol):
    """A layer with an adapter, or a rank-0 layer: no adapter, but its weight is stored in fewer bits.

    Its `forward` takes more arguments than the stock layer's:

    - linear layers and attention take `prologue`, an operation that they first apply to each row of the input;
    - convolutions take `batch_norm`, a BatchNorm, constant or in training, that they apply to the output, `residual`,
      which they then add, and `relu`.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    scaling: float
    lora_enabled: bool  # False: compute as without an adapter, merged or not
    weight_names: tuple[str, ...]  # the parameters that the adapter updates
    float_digests: Mapping[str, str]  # of each weight stored in fewer bits: SHA-256 before it was rounded

    @property
    def merged(self) -> bool: ...

    @property
    def base_bits(self) -> int: ...  # see the function

    def base(self, name: str = "weight") -> Tensor | NF4Weight | Int8Weight: ...

    def merge(self) -> None: ...

    def unmerge(self) -> None: ...

    def effective_weights(self) -> dict[str, Tensor]: ...

    def adapted_state(self) -> dict[str, Any]: ...

    def remove_lora(self, merge: bool = False) -> None: ...


class AdaptedAttention(AdaptedLayer, Protocol):
    """Attention also offers its packed q, k and v, so that backward can recompute what follows from them."""

    def project_packed(self, x: Tensor, prologue: Callable[[Tensor], Tensor]) -> Tensor | None: ...


def is_adapted(module: nn.Module) -> TypeGuard[AdaptedLayer]:
    """Does the module follow the Protocol `AdaptedLayer`?"""
    # This takes a tenth of the time of isinstance with a runtime Protocol, and forward asks for every layer.
    return hasattr(type(module), "adapted_state")


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The layers that have the parameters of an adapter now, by name; those of a rank-0 layer are empty."""
    layers = {name: module for name, module in model.named_modules() if is_adapted(module)}
    return {name: layer for name, layer in layers.items() if any(p.startswith("lora_") for p in layer._parameters)}


def base_bits(state: Mapping[str, Any]) -> int:
    """The bits in which a layer with this `adapted_state` stores its base weight.

    4, 8 or 16: the layer has rounded the weight, and the float one is gone. 32: the weight is unchanged, in any dtype.
    """
    if not state.get("float_digests"):
        return 32
    if "_nf4_state" in state:
        return 4
    return 8 if "_int8_shapes" in state else 16


def recorded_in_4_bits(record: Mapping[str, Any]) -> bool:
    """Was the layer of this record in an adapter file over 4-bit weights? The name of its kind says so."""
    return record["kind"].startswith("QLoRA")


def kind_named(name: str) -> type[nn.Module] | None:
    """The class of adapted layers that adapter files name so; None: there is no such class."""
    return next((kind for kinds in ADAPTED.values() for kind in kinds if kind.__name__ == name), None)


def stock_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The stock class that a class of adapted layers adapts; any other class itself."""
    return next((stock for stock, kinds in ADAPTED.items() if issubclass(kind, kinds)), kind)
