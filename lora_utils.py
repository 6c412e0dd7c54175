"""LoRAManager and the adapter file: save, load, merge, switch and remove what LoRA trained.

An adapter file, `.pth` or `.safetensors`, holds the adapters, the classifier head, whatever else trained, how every
layer is adapted, and a hash of the base weights that they belong to. `deploy_lora.py` has the command line.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora.adapted import adapted_layers, adapter_parameters, is_adapted
from lora.adapter_file import LAYER_FIELDS, find_base, model_shape, read_adapter_file, unmeasured, write_adapter_file  # noqa: F401
from lora.adapter_set import Adapter, AdapterSet
from lora.followed_norms import base_statistics, followers, named_statistics, read_statistics
from lora.fusion import fuse, unfuse
from toolkit import InputError, attributes, did_you_mean, dotted, found_path, listed, same_file, temporarily
from toolkit.models.backbones import ModelRecord, in_head, name_head, other_heads, record_of, unwrapped
from toolkit.models.checkpoints import state_digest, tensor_digest
from toolkit.models.norms import is_frozen

DEFAULT = "default"  # the name that an adapter without a name gets


def base_digests(model: nn.Module) -> dict[str, str]:
    """Name -> SHA-256 of every parameter and buffer except adapters and classifier head, and a ViT's `other_heads`."""
    # The same on every machine: of values before rounding, and of a position embedding's in the checkpoint.
    digests = {name: known or tensor_digest(tensor) for name, tensor, known in _stock_tensors(model)}
    record = record_of(model)
    for name, resized in record.resized_digests.items():
        if digests[name] == resized:
            digests[name] = record.base_digests[name]
    return digests | other_heads(model)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes, by name in the model: trainable parameters, and unfrozen buffers."""
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    for prefix, module in model.named_modules():
        if not is_frozen(module):
            names |= dict(module.named_buffers(prefix, recurse=False)).keys()
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def unused_adapters(model: nn.Module) -> list[str]:
    """The names of adapted layers that train, and that the first backward pass, just over, gave no gradient."""
    unused = []
    for name, layer in adapted_layers(unwrapped(model)).items():
        trains = [factor for factor in adapter_parameters(layer).values() if factor.requires_grad]
        if trains and all(factor.grad is None for factor in trains):
            unused.append(name)
    return unused


def _stock_tensors(model: nn.Module, of_head: bool = False) -> Iterator[tuple[str, Tensor, str | None]]:
    """Yield (name, tensor as before merging, digest before rounding or None) of the head's tensors, or the base's."""
    statistics = base_statistics(model)
    for prefix, module in model.named_modules():
        if of_head != in_head(model, prefix):
            continue
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name in adapter_parameters(module) or name in module._non_persistent_buffers_set:
                continue
            known = None
            if is_adapted(module):
                known = module.float_digests.get(name)
                if known is None and module.merged and name == module.weight_name:
                    tensor = module.base().tensor
            yield dotted(prefix, name), statistics.get(tensor, tensor), known


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count a model's parameters by elements, not by bytes: {'total', 'trainable', 'frozen', 'lora'}."""
    counts = dict.fromkeys(("total", "trainable", "frozen", "lora"), 0)
    for module, name, parameter, shape in _with_stock_shapes(model):
        numel = math.prod(shape)
        counts["total"] += numel
        counts["trainable" if parameter.requires_grad else "frozen"] += numel
        if name in adapter_parameters(module):
            counts["lora"] += numel
    return counts


def _with_stock_shapes(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter, torch.Size]]:
    """Yield (module, name in it, parameter, shape) once for each; the shape of a weight in 4 bits is the float's."""
    for full_name, parameter in model.named_parameters():
        path, _, name = full_name.rpartition(".")
        module = model.get_submodule(path)
        is_rounded = is_adapted(module) and name in module.float_digests
        yield module, name, parameter, module.base().shape if is_rounded else parameter.shape


def full_rank(model: nn.Module) -> int:
    """The full rank of the largest layer. A higher rank only takes memory: a typing error could ask for terabytes."""
    highest = 0
    for *_, shape in _with_stock_shapes(model):
        if len(shape) > 1:
            highest = max(highest, min(shape[0], math.prod(shape[1:])))
    return highest


class LoRAManager:
    """Saves, loads, merges, disables, switches and removes the adapters of a model.

    Adapters of files loaded with a name stay in it side by side; `use` selects one. `head`: see `add_lora_to_model`.
    """

    def __init__(self, model: nn.Module, head: str | Sequence[str] | None = None):
        self.model = unwrapped(model)
        self.record = record_of(self.model)
        if self.record.adapters is None:
            self.record.adapters = AdapterSet()
        name_head(self.model, head)

    def _layers_in_file(self) -> dict[str, nn.Module]:
        """The layers that a file names: with an adapter, or in 4 bits; autocast would round to 16 bits the same way."""
        return {n: layer for n, layer in adapted_layers(self.model).items() if layer.r or layer.base_bits == 4}

    def _layers_to_merge(self) -> dict[str, nn.Module]:
        """The layers that merging turns into dense floats: those with adapters, and rounded ones of rank 0."""
        if layers := adapted_layers(self.model):
            layers |= {n: m for n, m in self.model.named_modules() if is_adapted(m) and m.base_bits < 32}
        return layers

    def _own_tensors(self) -> dict[str, Tensor]:
        """The tensors that every adapter file of this model holds, by name: adapters and classifier head."""
        tensors = {}
        for prefix, layer in self._layers_in_file().items():
            tensors |= {dotted(prefix, name): factor for name, factor in adapter_parameters(layer).items()}
        return tensors | {name: tensor for name, tensor, _ in _stock_tensors(self.model, of_head=True)}

    def _is_merged(self) -> bool:
        return any(layer.merged for layer in adapted_layers(self.model).values())

    def merge_lora_weights(self) -> None:
        """Replace every adapted weight by ``W + s B A``; `state_dict()` then has the base model's own keys."""
        self._check_in_use()
        for layer in self._layers_to_merge().values():
            layer.merge()

    def _check_in_use(self) -> None:
        if self.names and self.in_use is None:  # to merge would do nothing
            raise InputError(f"no adapter is in use: call use(name) first; there are: {listed(self.names, 12)}")

    def unmerge_lora_weights(self) -> None:
        """Undo `merge_lora_weights`; the base weights come back bit for bit."""
        for layer in self._layers_to_merge().values():
            layer.unmerge()

    @contextlib.contextmanager
    def disable_lora(self) -> Iterator[None]:
        """Within the `with` block the model computes as if it had no adapters, merged or not."""
        with contextlib.ExitStack() as stack:
            for conv in followers(self.model):
                if conv.merged:
                    stack.callback(conv.followed.merge, conv)
                    conv.followed.unmerge()
            with temporarily(adapted_layers(self.model).values(), lora_enabled=False):
                yield

    def unload(self, merge: bool = False) -> nn.Module:
        """Remove all adapters, in use or not, and return the model with its stock layers and blocks.

        Frozen parameters stay frozen, but BatchNorms follow `model.train()` again. With `merge` the weights are
        ``W + s B A``. Otherwise the base weights come back, bit for bit; InputError if their floats are gone.
        """
        layers = adapted_layers(self.model)
        how = "merge=True" if layers else "merge=True and an adapter in use"
        for name, layer in (layers | self.record.adapters.base.layers).items():
            if layer.base_bits < 32 and not (merge and layers):
                remedy = f"take the merged weights with {how}, or load the checkpoint again"
                raise InputError(f"{name} is in {layer.base_bits} bits, its float weight is gone: {remedy}")
        if merge:
            self._check_in_use()
        elif self.names:
            self.unmerge_lora_weights()
            self.use(None)
        self.record.adapters = AdapterSet()
        self.record.metadata = {}
        for layer in self._layers_to_merge().values():
            if is_adapted(layer):  # attention removes its output projection's adapter with its own
                layer.remove_lora(merge)
        unfuse(self.model)
        return self.model

    def merge_into_base(self) -> None:
        """Make ``W + s B A`` the new base and remove the adapters: what is trained next is trained over the sum."""
        # The digest of a merged weight is made from what it was computed from: machines round the sum differently.
        digests = base_digests(self.model)
        digests |= {name: tensor_digest(statistic) for name, statistic in named_statistics(self.model).items()}
        merged = []
        for name, layer in self._layers_to_merge().items():
            if not in_head(self.model, name):  # the head is no part of the base
                weight = dotted(name, layer.weight_name)
                sources = [digests[weight], f"{layer.scaling:.17g}", type(layer).__name__]
                sources += map(tensor_digest, adapter_parameters(layer).values())
                digests[weight] = hashlib.sha256(" ".join(sources).encode()).hexdigest()
                merged.append(weight)
        self.unload(merge=True)
        self.record.base_digests = digests
        for weight in merged:
            self.record.resized_digests[weight] = tensor_digest(self.model.get_parameter(weight))

    def get_lora_info(self) -> dict[str, Any]:
        """Totals, and of every layer rank (0: no adapter, but in 4 bits), scaling, kind and number of parameters."""
        info = {"num_layers": 0, "lora_parameters": 0, "merged": self._is_merged(), "layers": {}}
        for name, layer in self._layers_in_file().items():
            parameters = sum(map(Tensor.numel, adapter_parameters(layer).values()))
            info["num_layers"] += layer.r > 0
            info["lora_parameters"] += parameters
            info["layers"][name] = _layer_record(layer) | {"parameters": parameters}
        return info

    @property
    def names(self) -> list[str]:
        """The names that `use` accepts, in the order in which the adapters were added."""
        return list(self.record.adapters.named)

    @property
    def in_use(self) -> str | None:
        """The name of the adapter that computes. None: the base computes, or an adapter without a name."""
        return self.record.adapters.in_use

    def use(self, name: str | None) -> dict[str, Any]:
        """Switch to the adapter of this name, or with None to the base; returns the adapter's metadata.

        Each adapter has its own head and trainable parameters, and so needs an optimizer of its own. Threads that share
        a model must take turns. InputError if no adapter has this name, or the adapters are merged or switched off.
        """
        adapter_set = self._adapter_set()
        if name is not None and name not in adapter_set.named:
            hint = f"{did_you_mean(name, self.names)} there are: {listed(self.names, 12) or 'none'}"
            raise InputError(f"no adapter is named {name!r}: {hint.lstrip()}")
        if name != adapter_set.in_use:
            if adapter_set.in_use is not None:
                adapter_set.named[adapter_set.in_use].snapshot(self.model)
            adapter_set.base.install(self.model, adapter_set.named.get(name))
            adapter_set.in_use = name
            fuse(self.model)
        return {} if name is None else adapter_set.named[name].metadata

    def remove(self, name: str) -> None:
        """Remove an adapter and free its memory. If it is in use, switch to the base. Raises the errors of `use`."""
        before = self.in_use
        self.use(name)
        self.use(None if before == name else before)
        del self.record.adapters.named[name]

    def _adapter_set(self) -> AdapterSet:
        """The model's named adapters. One without a name becomes `default`; raises InputError where that cannot be."""
        layers = adapted_layers(self.model)
        if self._is_merged():
            raise InputError("the adapters are merged: call unmerge_lora_weights() first")
        if not all(layer.lora_enabled for layer in layers.values()):
            raise InputError("the adapters are switched off: leave the block of disable_lora() first")
        if not self.record.adapters.has_begun:
            now = base_digests(self.model)
            if self.record.base_digests is None:
                self.record.base_digests = now
            changed = dict(now.items() - (self.record.base_digests or now).items())
            if layers and changed:
                remedy = "save the adapter, load the checkpoint again, and then the saved file with a name"
                raise InputError(f"the base has trained with the adapter in use ({listed(sorted(changed))}): {remedy}")
            self.record.adapters.begin(self.model)
        adapter_set = self.record.adapters
        if layers and adapter_set.in_use is None:  # it has no name yet
            if DEFAULT in adapter_set.named:
                remedy = "save and unload() them, then load them with one"
                raise InputError(f"the model has adapters without a name: {remedy}")
            adapter_set.named[DEFAULT] = Adapter(self.record.metadata, self.record.digest)
            adapter_set.in_use = DEFAULT
            self.record.metadata = {}
        return adapter_set

    def save_lora_checkpoint(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Write the adapter file, `.pth` or `.safetensors`. InputError if that fails; an earlier file stays as it is.

        `metadata` are plain values that `load_lora_checkpoint` returns; by default those of the adapter in use, without
        its figures if it changed. `load_finetuned` needs `arch`, `class_names`, `image_size`, `checkpoint`, `heads`.
        """
        now = base_digests(self.model)
        # Two-stage and full fine-tuning change the base too. Without a record of the start all of it counts as changed.
        changed = dict(now.items() - (self.record.base_digests or {}).items())
        tensors = self._own_tensors()
        tensors |= {name: t for name, t, known in _stock_tensors(self.model) if name in changed and not known}
        tensors |= named_statistics(self.model)
        if metadata is None:
            loaded = self._in_use_or_unnamed()
            metadata = loaded.metadata
            if loaded.digest != state_digest(tensors):
                metadata = unmeasured(metadata)
        try:  # as files return them: with lists for tuples, and strings as keys
            metadata = json.loads(json.dumps({**metadata}))
        except (TypeError, ValueError) as error:
            raise InputError(f"metadata takes numbers, strings, lists and dicts alone: {error}") from None
        if any(same_file(path, found_path(str(metadata.get(key)))) for key in ("checkpoint", "stage1_adapter")):
            raise InputError(f"{path} is the base of the adapter, as its metadata say: name another file")
        content: dict[str, Any] = {"format_version": 2 if "task" in metadata else 1}
        content["tensors"] = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        content["layers"] = {name: _layer_record(layer) for name, layer in self._layers_in_file().items()}
        write_adapter_file(content | {"base_hash": _hash(now, tensors), "metadata": metadata}, path)

    def load_lora_checkpoint(self, path: str | Path, name: str | None = None) -> dict[str, Any]:
        """Read what `save_lora_checkpoint` wrote, strictly, and return its metadata.

        Without a name it is read into the adapter in use, which must have the same layers and ranks. Otherwise its
        adapter is added under this name, with layers, ranks and a head of its own; `use(name)` switches to it. Raises
        InputError, which says all that does not fit; the model is then bitwise unchanged.
        """
        content = read_adapter_file(path)
        digest = state_digest(content["tensors"])
        if name is None:
            self._read(content, path)
            vars(self._in_use_or_unnamed()).update(metadata=content["metadata"], digest=digest)
            return content["metadata"]
        adapter_set = self._adapter_set()
        if not isinstance(name, str) or not name or name in adapter_set.named:
            raise InputError(f"an adapter cannot be named {name!r}: give another name, or remove the one that has it")
        adapter = Adapter(content["metadata"], digest)
        before = adapter_set.in_use
        self.use(None)
        try:
            _refuse(path, adapter_set.build(adapter, content, self.model))
            self._read(content, path)
            adapter.snapshot(self.model)
        finally:
            adapter_set.base.install(self.model)
            fuse(self.model)
            self.use(before)
        adapter_set.named[name] = adapter
        return adapter.metadata

    def _in_use_or_unnamed(self) -> Adapter | ModelRecord:
        """What has the metadata of the adapter in use."""
        return self.record.adapters.named.get(self.in_use, self.record)

    def _read(self, content: dict[str, Any], path: str | Path) -> None:
        """Copy a file's tensors and settings into the layers that are adapted now. Raises InputError if they differ."""
        if self._is_merged():
            _refuse(path, ["its adapters are merged: call unmerge_lora_weights() first"])
        if content["layers"] and not self._layers_in_file():
            remedy = "load the file with a name and call use(name), or adapt the model first"
            _refuse(path, [f"no adapter is in use here: {remedy}"])
        _refuse(path, self._different_layers(content["layers"]))
        _refuse(path, self._different_tensors(content["tensors"]))
        now = base_digests(self.model)
        older = now | self.record.resized_digests  # of files that hash the interpolated embedding
        if content["base_hash"] not in (_hash(now, content["tensors"]), _hash(older, content["tensors"])):
            _refuse(path, ["it was trained over another base: load the checkpoint that it names, with as many heads"])
        if broken := [name for name, tensor in content["tensors"].items() if not tensor.isfinite().all()]:
            raise InputError(f"{path} has NaN or infinite numbers in {listed(broken)}; use an earlier epoch's")
        state = {**self.model.state_dict(keep_vars=True), **self._own_tensors()}
        with torch.no_grad():
            for name in content["tensors"].keys() - read_statistics(self.model, content):
                state[name].copy_(content["tensors"][name])
        for name, layer in self._layers_in_file().items():
            record = content["layers"][name]
            vars(layer).update({field: record[field] for field in LAYER_FIELDS[2:]})  # its kind and rank are the same

    def _different_layers(self, records: dict[str, dict[str, Any]]) -> Iterator[str]:
        layers = self._layers_in_file()
        for name in records.keys() | layers.keys():
            if name not in layers:
                yield f"{name} is adapted in the file but not here"
            elif name in records:
                here = _layer_record(layers[name])
                for field in ("kind", "r"):
                    if here[field] != records[name][field]:
                        yield f"{name} has {field} {records[name][field]} in the file, {here[field]} here"
            elif layers[name].r:
                yield f"{name} is adapted here but not in the file"
            else:
                yield f"{name} is frozen in 4 bits here but not in the file: use load_finetuned"

    def _different_tensors(self, tensors: dict[str, Tensor]) -> Iterator[str]:
        own = self._own_tensors()
        here = {**self.model.state_dict(keep_vars=True), **own}
        rounded = {name for name, _, known in _stock_tensors(self.model) if known}
        for name in tensors.keys() | own.keys():
            theirs = tensors.get(name)
            ours = here.get(name)
            if theirs is None:
                yield f"tensor {name} is missing in the file"
            elif ours is None:
                yield f"tensor {name} is unknown here"
            elif name in rounded:
                yield f"{name} has trained in the file, but is in fewer bits here"
            elif theirs.shape != ours.shape:
                yield f"{name} is {tuple(theirs.shape)} in the file, {tuple(ours.shape)} here"
            elif theirs.is_floating_point() != ours.is_floating_point():
                yield f"{name} is {theirs.dtype} in the file, {ours.dtype} here"


def _refuse(path: str | Path, problems: Iterable[str]) -> None:
    if found := sorted(problems):
        raise InputError(f"{path} does not fit this model: {listed(found, by='; ')}")


def _layer_record(layer: nn.Module) -> dict[str, Any]:
    return {"kind": type(layer).__name__} | attributes(layer, *LAYER_FIELDS[1:])


def _hash(digests: dict[str, str], without: Collection[str]) -> str:
    """The hash of a base: of the digests of all its tensors but those that the adapter file has itself."""
    lines = [f"{name} {digest}" for name, digest in sorted(digests.items()) if name not in without]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
