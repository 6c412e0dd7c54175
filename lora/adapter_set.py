"""Several adapters on one base: what each owns in the model, which is always as with the adapter in use alone.

Switching gives each layer another class, other attributes and other parameter objects; no number is copied.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora.adapted import ADAPTED, adapted_layers, is_adapted, kind_for, recorded_in_4_bits, recorded_settings
from lora.followed_norms import statistics_in_file
from toolkit import InputError
from toolkit.models.backbones import head_names, in_head


class LayerState(NamedTuple):
    """The class, attributes and parameters of a layer under one adapter, or under the base."""

    kind: type[nn.Module]
    attributes: dict[str, Any]  # those that the stock layer lacks
    parameters: dict[str, nn.Parameter | None]

    @classmethod
    def of(cls, module: nn.Module) -> "LayerState":
        return cls(type(module), _attributes(module), dict(module._parameters))

    def apply_to(self, module: nn.Module) -> None:
        device = next((p.device for p in module._parameters.values() if p is not None), None)
        for name in _attributes(module):
            delattr(module, name)
        module.__class__ = self.kind
        vars(module).update(self.attributes)
        module._parameters.clear()
        module._parameters.update(self.parameters)
        if any(p is not None and p.device != device for p in self.parameters.values()):
            module.to(device)  # the model was moved meanwhile

    @property
    def base_bits(self) -> int:
        return self.attributes.get("base_bits", 32)

    def without_adapter(self) -> "LayerState":
        parameters = {name: p for name, p in self.parameters.items() if not name.startswith("lora_")}
        if self.base_bits < 32:  # the float weight is gone, so the layer stays adapted and is switched off
            attributes = {**self.attributes, "lora_enabled": False}
            attributes.pop("followed", None)  # the statistics of a BatchNorm go with the adapter
            return LayerState(self.kind, attributes, parameters)
        return LayerState(self.attributes.get("stock_class", self.kind), {}, parameters)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return module.adapted_state() if is_adapted(module) else {}


@dataclass
class Adapter:
    """Everything one adapter owns. For the base: the original of everything an adapter replaces."""

    metadata: dict[str, Any] = field(default_factory=dict)
    digest: str = ""  # of its file's tensors
    heads: dict[str, nn.Module] = field(default_factory=dict)
    layers: dict[str, LayerState] = field(default_factory=dict)  # outside the heads
    tensors: dict[str, Tensor] = field(default_factory=dict)  # tensors of the base that training changed

    def snapshot(self, model: nn.Module) -> None:
        """Take everything that the adapter owns from the model as it is now: the objects themselves, not copies."""
        self.heads = {name: model.get_submodule(name) for name in head_names(model)}
        layers = adapted_layers(model).items()
        self.layers = {path: LayerState.of(layer) for path, layer in layers if not in_head(model, path)}
        for path in self.tensors:
            owner, leaf = _owner(model, path)
            self.tensors[path] = owner[leaf]

    def install(self, model: nn.Module, above: "Adapter | None" = None) -> None:
        """Put everything into the model, except what `above` replaces with something of its own."""
        above = above or Adapter()
        for name, head in (self.heads | above.heads).items():
            _replace_head(model, name, head)
        for path, state in (self.layers | above.layers).items():
            layer = model.get_submodule(path)
            if is_adapted(layer) or path in above.layers:
                state.apply_to(layer)
        for path, tensor in (self.tensors | above.tensors).items():
            owner, leaf = _owner(model, path)
            layer = model.get_submodule(path.rpartition(".")[0])
            if is_adapted(layer) and leaf in layer.float_digests:
                continue  # the installed state stores this weight in fewer bits
            tensor.data = tensor.data.to(owner[leaf])  # itself, unless the model was moved meanwhile
            owner[leaf] = tensor


@dataclass
class AdapterSet:
    """The adapters that share a model: `adapters` of its record."""

    base: Adapter = field(default_factory=Adapter)
    has_begun: bool = False  # is the base known?
    named: dict[str, Adapter] = field(default_factory=dict)
    in_use: str | None = None

    def begin(self, model: nn.Module) -> None:
        """Note the base: the head, and the layers that may be adapted, as they are without an adapter."""
        self.has_begun = True
        for name in head_names(model):
            head = model.get_submodule(name)
            if adapted_layers(head):  # the base's has none
                head = copy.deepcopy(head)
                for layer in adapted_layers(head).values():
                    layer.remove_lora()
            self.base.heads[name] = head
        for path, layer in model.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.MultiheadAttention) and not in_head(model, path):
                self.base.layers[path] = LayerState.of(layer).without_adapter()

    def build(self, adapter: Adapter, content: Mapping[str, Any], model: nn.Module) -> list[str]:
        """Build the layers and tensors that an adapter file names over the base. Returns what does not fit."""
        if not ADAPTED:
            raise InputError("the layers that adapter files name are in finetune_lora: import it first")
        records = content["layers"]
        tensors = content["tensors"]
        for name, head in self.base.heads.items():
            _replace_head(model, name, _resized_head(head, name, tensors))
        modules = dict(model.named_modules())
        stock = dict(model.named_parameters()) | dict(model.named_buffers())
        followed = {name for _, _, *own in statistics_in_file(model, content) for name in own}
        for path in tensors:  # the tensors of the base that the file has become the adapter's own
            if path in stock and path not in followed and not in_head(model, path):
                self.base.tensors.setdefault(path, stock[path])
                owner, leaf = _owner(model, path)
                adapter.tensors[path] = owner[leaf] = copy.deepcopy(stock[path])
        for other in self.named.values():  # an earlier adapter may have made 4-bit weights from the float base
            for path, shared in other.layers.items():
                if path in records and shared.base_bits < 32 and shared.kind.__name__ == records[path]["kind"]:
                    state = shared.without_adapter()
                    # The biases stay this file's: they may be among the tensors that training moved.
                    own = {n: p for n, p in modules[path]._parameters.items() if n != state.kind.weight_name}
                    state._replace(parameters=state.parameters | own).apply_to(modules[path])
        problems = [f"{path} is adapted in the file but not here" for path in records if path not in modules]
        for path, layer in modules.items():  # in the model's order: attention comes before its output projection
            if path not in records:
                continue
            record = records[path]
            kind = kind_for(type(layer), recorded_in_4_bits(record))
            ranks = {tensor.shape[:1] for name, tensor in tensors.items() if name.startswith(f"{path}.lora_A")}
            if kind.__name__ != record["kind"] or not hasattr(kind, "adapt"):
                problems.append(f"{path} has kind {record['kind']} in the file, {type(layer).__name__} here")
            elif ranks != {(record["r"],)}:  # checked before memory is allocated for this rank
                problems.append(f"{path} has r {record['r']} in the file, and tensors of another rank")
            else:
                kind.adapt(layer, recorded_settings(record))
        for path, state in self.base.layers.items():
            # Files do not record that a rank-0 layer is stored in 16 bits.
            needs_record = state.base_bits == 4 or (state.base_bits < 32 and state.attributes["r"] > 0)
            if path not in records and needs_record:
                problems.append(f"{path} is stored in fewer bits here but is not in the file")
        return problems


def _owner(model: nn.Module, path: str) -> tuple[dict[str, Tensor], str]:
    module, _, leaf = path.rpartition(".")
    owner = model.get_submodule(module)
    if leaf in owner._parameters:
        return owner._parameters, leaf
    return owner._buffers, leaf


def _replace_head(model: nn.Module, name: str, head: nn.Module) -> None:
    """Put another head into the model, with the mode, device and dtype of the present one."""
    former = model.get_submodule(name)
    model.set_submodule(name, head)
    head.train(former.training)
    places = {(parameter.device, parameter.dtype) for parameter in former.parameters()}
    if len(places) == 1:
        head.to(*places.pop())


def _resized_head(head: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a head whose layers have as many outputs as the file's tensors."""
    head = copy.deepcopy(head)
    layers = [(path, m) for path, m in head.named_modules(prefix=prefix) if isinstance(m, nn.Linear | nn.Conv2d)]
    for path, layer in layers:
        for name, parameter in list(layer.named_parameters(recurse=False)):
            found = tensors.get(f"{path}.{name}")
            if found is not None and found.shape[1:] == parameter.shape[1:]:
                setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(found))
                layer._parameters[name] = nn.Parameter(parameter.new_empty(found.shape), parameter.requires_grad)
    return head
