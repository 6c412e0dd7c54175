"""Several adapters on one base: what each adapter owns in the model, and how the model switches between them.

The model is always as it would be with the adapter in use alone: a layer that this one does not adapt is a stock layer.
Switching gives each layer another class, other attributes and other parameter objects; no number is copied.
`LoRAManager` has the public functions. Layers are used through the Protocol `AdaptedLayer` of `lora/adapted.py`.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora.adapted import ADAPTED, adapted_layers, base_bits, is_adapted, kind_named, recorded_settings, stock_class
from lora.fusion import fuse
from toolkit import InputError
from toolkit.models.backbones import head_name, in_head

DEFAULT = "default"  # the name that an adapter without a name gets


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
        return base_bits(self.attributes)

    def without_adapter(self) -> "LayerState":
        parameters = {name: p for name, p in self.parameters.items() if not name.startswith("lora_")}
        if self.base_bits < 32:  # the float weight is gone, so the layer stays adapted and is switched off
            return LayerState(self.kind, {**self.attributes, "lora_enabled": False}, parameters)
        return LayerState(self.attributes.get("stock_class", stock_class(self.kind)), {}, parameters)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return module.adapted_state() if is_adapted(module) else {}


@dataclass
class Adapter:
    """Everything one adapter owns. For the base: the original of everything an adapter replaces."""

    metadata: dict[str, Any] = field(default_factory=dict)
    head: nn.Module | None = None
    layers: dict[str, LayerState] = field(default_factory=dict)  # outside the head
    tensors: dict[str, Tensor] = field(default_factory=dict)  # tensors of the base that training changed

    def snapshot(self, model: nn.Module) -> None:
        """Take everything that the adapter owns from the model as it is now: the objects themselves, not copies."""
        head = head_name(model)
        self.head = None if head is None else model.get_submodule(head)
        layers = adapted_layers(model)
        self.layers = {path: LayerState.of(layer) for path, layer in layers.items() if not in_head(model, path)}
        for path in self.tensors:
            owner, leaf = _owner(model, path)
            self.tensors[path] = owner[leaf]

    def install(self, model: nn.Module, above: "Adapter | None" = None) -> None:
        """Put everything into the model, except what `above` replaces with something of its own."""
        above = above or Adapter()
        name = head_name(model)
        head = above.head or self.head
        if name is not None and head is not None:
            _replace_head(model, name, head)
        modules = dict(model.named_modules())
        for path, state in (self.layers | above.layers).items():
            state.apply_to(modules[path])
        for path, tensor in (self.tensors | above.tensors).items():
            module, _, leaf = path.rpartition(".")
            if leaf in getattr(modules[module], "float_digests", ()):
                continue  # the installed state stores this weight in fewer bits
            owner, leaf = _owner(model, path)
            if (tensor.device, tensor.dtype) != (owner[leaf].device, owner[leaf].dtype):
                tensor.data = tensor.data.to(owner[leaf])
            owner[leaf] = tensor


class AdapterSet:
    """The adapters that share a model; it is `model.adapter_set`."""

    def __init__(self, model: nn.Module):
        name = head_name(model)
        self.base = Adapter(head=None if name is None else _stock_head(model.get_submodule(name)))
        self.named: dict[str, Adapter] = {}
        self.in_use: str | None = None

    def adopt(self, layers: Mapping[str, nn.Module], model: nn.Module) -> None:
        """Name the adapter in these layers `default` if it has no name. Raises InputError if there is a default."""
        if layers and self.in_use is None:
            if DEFAULT in self.named:
                raise InputError(
                    "the model has adapters without a name: save and unload() them, then load them with one"
                )
            self._remember(layers, model)
            self.named[DEFAULT] = Adapter(vars(model).pop("adapter_metadata", {}))
            self.in_use = DEFAULT

    def use(self, name: str | None, model: nn.Module) -> None:
        """Switch to another adapter of `named`, or with None to the base."""
        if name == self.in_use:
            return
        if self.in_use is not None:
            self._remember(adapted_layers(model), model)  # more layers may have been adapted since
            self.named[self.in_use].snapshot(model)
        self.base.install(model, None if name is None else self.named[name])
        self.in_use = name
        fuse(model)

    def build(self, adapter: Adapter, content: Mapping[str, Any], model: nn.Module) -> list[str]:
        """Build the layers and tensors that an adapter file names, uninitialised. The base must be in use.

        The caller then reads the file's numbers and calls `adapter.snapshot`; in any case it calls `base.install`.
        Returns what does not fit, one line each.
        """
        if not ADAPTED:
            raise InputError("the layers that adapter files name are in finetune_lora: import it first")
        records = content["layers"]
        tensors = content["tensors"]
        head = head_name(model)
        modules = dict(model.named_modules())
        attached = {path.removesuffix(".out_proj") for path in modules if path.endswith(".out_proj")}
        touched = [*records, *(f"{path}.out_proj" for path in records if path in attached)]
        self._remember({path: modules[path] for path in touched if path in modules}, model)
        if head is not None:
            _replace_head(model, head, _resized_head(self.base.head, f"{head}.", tensors))
        stock = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        changed = [path for path in tensors if path in stock and not in_head(model, path)]
        for path in changed:
            self.base.tensors.setdefault(path, stock[path])
            owner, leaf = _owner(model, path)
            adapter.tensors[path] = owner[leaf] = _copy(stock[path])
        self._share_4_bits(records, modules)
        problems = [f"{path} is adapted in the file but not here" for path in records if path not in modules]
        for path in modules:  # in the model's order: attention comes before its output projection
            if path in records:
                problems += _adapt(model.get_submodule(path), path, records[path], tensors)
        absent = {path: state for path, state in self.base.layers.items() if path not in records}
        rounded = {path: state for path, state in absent.items() if state.base_bits < 32}
        # Files do not record that a rank-0 layer is stored in 16 bits.
        lacking = [path for path, state in rounded.items() if state.attributes["r"] > 0 or state.base_bits == 4]
        return problems + [f"{path} is stored in fewer bits here but is not in the file" for path in lacking]

    def _remember(self, layers: Mapping[str, nn.Module], model: nn.Module) -> None:
        """Note the state of these layers without an adapter, unless it is known already."""
        for path, layer in layers.items():
            if not in_head(model, path):
                self.base.layers.setdefault(path, LayerState.of(layer).without_adapter())

    def _share_4_bits(self, records: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
        """Give these layers the 4-bit weights that an earlier 4-bit adapter made from the float base."""
        for path, record in records.items():
            states = (other.layers[path] for other in self.named.values() if path in other.layers)
            shared = next((s for s in states if s.base_bits < 32 and s.kind.__name__ == record["kind"]), None)
            if shared is not None:
                state = shared.without_adapter()
                stored = state.attributes.get("weight_names", state.kind.weight_names)
                # The biases stay this file's: they may be among the tensors that training moved.
                own = {name: p for name, p in modules[path]._parameters.items() if name not in stored}
                state._replace(parameters=state.parameters | own).apply_to(modules[path])


def _adapt(layer: nn.Module, path: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Adapt one layer as its record in a file says. Returns what does not fit, one line each."""
    kind = kind_named(record["kind"])
    if kind is None or type(layer) not in (kind, stock_class(kind)):
        return [f"{path} has kind {record['kind']} in the file, {type(layer).__name__} here"]
    ranks = {tensor.shape[:1] for name, tensor in tensors.items() if name.startswith(f"{path}.lora_A")}
    if ranks != {(record["r"],)}:  # checked before memory is allocated for this rank
        return [f"{path} has r {record['r']} in the file, and tensors of another rank"]
    try:
        kind.adapt(layer, recorded_settings(record))
    except ImportError as error:  # bitsandbytes
        raise InputError(str(error)) from None
    return []


def _owner(model: nn.Module, path: str) -> tuple[dict[str, Tensor], str]:
    """The dictionary that holds a parameter or buffer, and its key there."""
    module, _, leaf = path.rpartition(".")
    owner = model.get_submodule(module)
    return (owner._parameters if leaf in owner._parameters else owner._buffers), leaf


def _copy(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _replace_head(model: nn.Module, name: str, head: nn.Module) -> None:
    """Put another head into the model, with the mode, device and dtype of the present one."""
    former = model.get_submodule(name)
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = head
    head.train(former.training)
    places = {(p.device, p.dtype) for p in former.parameters()}
    if len(places) == 1 and places != {(p.device, p.dtype) for p in head.parameters()}:
        head.to(*places.pop())


def _stock_head(head: nn.Module) -> nn.Module:
    """The head without adapters: a copy, or the head itself if it has none."""
    if not adapted_layers(head):
        return head
    head = copy.deepcopy(head)
    for layer in adapted_layers(head).values():
        layer.remove_lora()
    return head


def _resized_head(head: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a head whose layers have as many outputs as the file's tensors."""
    head = copy.deepcopy(head)
    for path, module in head.named_modules(prefix=prefix.rstrip(".")):
        for name, parameter in list(module.named_parameters(recurse=False)):
            found = tensors.get(f"{path}.{name}")
            if found is None or found.shape[1:] != parameter.shape[1:]:
                continue
            if isinstance(module, nn.Linear | nn.Conv2d):
                outputs = "out_features" if isinstance(module, nn.Linear) else "out_channels"
                setattr(module, outputs, len(found))
                module._parameters[name] = nn.Parameter(parameter.new_empty(found.shape), parameter.requires_grad)
    return head
