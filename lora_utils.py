"""Adapter files: save, load and merge what LoRA trained, and nothing else.

    python lora_utils.py info checkpoints/lora/lora.pth                        # what is in the file
    python lora_utils.py merge checkpoints/lora/lora.pth --output merged.pth   # one state_dict for plain torchvision

An adapter file holds the adapters, the classifier head, whatever else trained, and what is needed to put them back:
rank, scaling and kind of every adapted layer, and a hash of the base weights that they belong to. It is a `.pth`, read
with `weights_only=True`, or a `.safetensors` where the name ends so.

The manager works on any model whose layers offer what `finetune_lora.LoRALayer` offers; it does not import them.
"""

import argparse
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from moco import InputError, listed, printable
from moco.backbones import head_name, unwrapped
from moco.checkpoints import open_atomically, read_checkpoint, save_atomically, what_starts_so
from moco.training import run_script, unknown_words

FORMAT_VERSION = 1
_FIELDS = {"format_version": int, "tensors": dict, "layers": dict, "base_hash": str, "metadata": dict}
_LAYER_FIELDS = ("kind", "r", "lora_alpha", "lora_dropout", "use_rslora", "scaling")


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values, in whatever memory format and on whatever device they lie."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def base_digests(model: nn.Module) -> dict[str, str]:
    """Digest of every parameter and buffer that belongs to the base: all but the adapters and the classifier head."""
    return {name: known or tensor_digest(tensor) for name, tensor, known in _stock_tensors(model)}


def _stock_tensors(model: nn.Module, of_head: bool = False) -> Iterator[tuple[str, Tensor, str | None]]:
    """What is not of the adapters, in the classifier head or in all but the head: name, tensor and, of a weight in
    4 bits, the digest that it had before. A merged layer still has its base.
    """
    head = head_name(model)
    for prefix, module in model.named_modules():
        if of_head != (head is not None and f"{prefix}.".startswith(f"{head}.")):
            continue
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in tensors:
            if _is_adapter(module, name) or name in module._non_persistent_buffers_set:
                continue
            known = getattr(module, "float_digests", {}).get(name)
            tensor = module.base(name) if known is None and _is_lora(module) and module.merged else tensor
            yield f"{prefix}.{name}".lstrip("."), tensor, known


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora_enabled")


def _is_adapter(module: nn.Module, name: str) -> bool:
    return _is_lora(module) and name.startswith("lora_")


class LoRAManager:
    """Saves, loads, merges and switches the adapters of a model (see `finetune_lora.add_lora_to_model`)."""

    def __init__(self, model: nn.Module):
        self.model = unwrapped(model)

    def _layers(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.model.named_modules() if _is_lora(module)}

    def _own_tensors(self) -> dict[str, Tensor]:
        """What every adapter file of this model holds: adapters and classifier head, by their names in the model."""
        tensors = {
            f"{prefix}.{name}".lstrip("."): parameter
            for prefix, module in self._layers().items()
            for name, parameter in module.named_parameters(recurse=False)
            if _is_adapter(module, name)
        }
        return tensors | {name: tensor for name, tensor, _ in _stock_tensors(self.model, of_head=True)}

    # ------------------------------------------------------------------------------------------------- merge, switch

    def merge_lora_weights(self) -> None:
        """Put ``W + s B A`` in the place of every adapted weight: `state_dict()` then has the base model's own keys."""
        for layer in self._layers().values():
            layer.merge()

    def unmerge_lora_weights(self) -> None:
        """Take the adapters out again; the base weights come back bit for bit."""
        for layer in self._layers().values():
            layer.unmerge()

    @contextlib.contextmanager
    def disable_lora(self) -> Iterator[None]:
        """Within the `with` block the model computes as if it had no adapters, merged or not."""
        before = {layer: layer.lora_enabled for layer in self._layers().values()}
        try:
            for layer in before:
                layer.lora_enabled = False
            yield
        finally:
            for layer, enabled in before.items():
                layer.lora_enabled = enabled

    def get_lora_info(self) -> dict[str, Any]:
        """What is adapted and how: totals, and for every layer its rank, scaling, kind and number of parameters."""
        layers = {}
        for name, layer in self._layers().items():
            own = {n: p for n, p in layer.named_parameters(recurse=False) if _is_adapter(layer, n)}
            layers[name] = {**_layer_record(layer), "parameters": sum(p.numel() for p in own.values())}
        return {
            "num_layers": len(layers),
            "lora_parameters": sum(record["parameters"] for record in layers.values()),
            "merged": any(layer.merged for layer in self._layers().values()),
            "layers": layers,
        }

    # ---------------------------------------------------------------------------------------------------- save, load

    def save_lora_checkpoint(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Write the adapter file: whole or not at all.

        Args:
            path: `.pth`, or `.safetensors`.
            metadata: plain values (numbers, strings, lists, dicts) that `load_lora_checkpoint` gives back. What
                `finetune_lora.load_finetuned` needs of it: `arch`, `class_names`, `image_size`, `checkpoint`.

        Raises:
            InputError: the place cannot be written, or the metadata; a file that was there is still as it was.
        """
        now = base_digests(self.model)
        start = getattr(self.model, "base_digests", now)
        tensors = self._own_tensors()
        # Two-stage and full fine-tuning move the base itself: what moved belongs to the result.
        tensors |= {name: tensor for name, tensor, _ in _stock_tensors(self.model) if now[name] != start.get(name)}
        content = {
            "format_version": FORMAT_VERSION,
            "tensors": {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()},
            "layers": {name: _layer_record(layer) for name, layer in self._layers().items()},
            "base_hash": _hash(now, without=tensors),
            "metadata": _plain_values(metadata or {}),
        }
        write_adapter_file(content, path)

    def load_lora_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Read an adapter file into this model, strictly, and return its metadata.

        Raises:
            InputError: anything that does not fit, by name: tensors missing, surplus or of another shape, another
                rank, kind or set of adapted layers, another base. The model is then bitwise as it was.
        """
        content = read_adapter_file(path)
        problems = [printable(problem) for problem in self._differences(content)]
        if problems:
            raise InputError(f"{path} does not fit this model: {'; '.join(problems)}")
        state = {**self.model.state_dict(keep_vars=True), **self._own_tensors()}
        with torch.no_grad():
            for name, tensor in content["tensors"].items():
                state[name].copy_(tensor)
        for name, layer in self._layers().items():
            record = content["layers"][name]
            for field in ("lora_alpha", "lora_dropout", "use_rslora", "scaling"):
                setattr(layer, field, record[field])
        return content["metadata"]

    def _differences(self, content: dict[str, Any]) -> list[str]:
        layers, records = self._layers(), content["layers"]
        if any(layer.merged for layer in layers.values()):
            return ["its adapters are merged: call unmerge_lora_weights() first"]
        problems = [f"{name} is adapted in the file but not here" for name in records if name not in layers]
        problems += [f"{name} is adapted here but not in the file" for name in layers if name not in records]
        for name in layers.keys() & records.keys():
            here = _layer_record(layers[name])
            for field in ("kind", "r"):
                if here[field] != records[name][field]:
                    problems.append(f"{name} has {field} {records[name][field]} in the file, {here[field]} here")
        if problems:
            return _abbreviated(problems)

        tensors, own = content["tensors"], self._own_tensors()
        trained = {name: tensor for name, tensor in self.model.state_dict(keep_vars=True).items() if name in tensors}
        here = {**trained, **own}
        problems += [f"tensor {name} is missing in the file" for name in own if name not in tensors]
        problems += [f"tensor {name} is unknown here" for name in tensors if name not in here]
        for name in tensors.keys() & here.keys():
            theirs, ours = tensors[name], here[name]
            if theirs.shape != ours.shape:
                problems.append(f"{name} is {tuple(theirs.shape)} in the file, {tuple(ours.shape)} here")
            elif theirs.is_floating_point() != ours.is_floating_point():
                problems.append(f"{name} is {theirs.dtype} in the file, {ours.dtype} here")
        if not problems and content["base_hash"] != _hash(base_digests(self.model), without=tensors):
            problems.append("it was trained over another base: load the checkpoint that it names")
        return _abbreviated(problems)


def _abbreviated(problems: list[str], shown: int = 4) -> list[str]:
    problems = sorted(problems)
    return problems[:shown] + ([f"and {len(problems) - shown} more"] if len(problems) > shown else [])


def _layer_record(layer: nn.Module) -> dict[str, Any]:
    return {"kind": type(layer).__name__, **{field: getattr(layer, field) for field in _LAYER_FIELDS[1:]}}


def _hash(digests: dict[str, str], without) -> str:
    lines = [f"{name} {digest}" for name, digest in sorted(digests.items()) if name not in without]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _plain_values(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata as any adapter file gives it back: with lists for tuples, and strings for keys."""
    try:
        return json.loads(json.dumps(metadata))
    except (TypeError, ValueError) as error:
        raise InputError(f"metadata takes numbers, strings, lists and dicts alone: {error}") from None


def write_adapter_file(content: dict[str, Any], path: str | Path) -> None:
    """Write what `read_adapter_file` returns, as `.safetensors` if the name ends so, else as `.pth`."""
    if Path(path).suffix != ".safetensors":
        save_atomically(content, path)
        return
    described = json.dumps({key: value for key, value in content.items() if key != "tensors"})
    with open_atomically(path) as file:
        file.write(safetensors.torch.save(content["tensors"], metadata={"adapter": described}))


def read_adapter_file(path: str | Path) -> dict[str, Any]:
    """The content of an adapter file: `format_version`, `tensors`, `layers`, `base_hash`, `metadata`.

    Raises:
        InputError: no such file, not an adapter file, or one of a later version.
    """
    path = Path(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)
    if not isinstance(content, dict) or "layers" not in content or "tensors" not in content:
        raise InputError(f"{path} is not an adapter file of this toolkit")
    wrong = [key for key, kind in _FIELDS.items() if type(content.get(key)) is not kind]
    if not wrong:
        wrong = [name for name, tensor in content["tensors"].items() if not _is_named_tensor(name, tensor)]
        wrong += [name for name, record in content["layers"].items() if not _is_layer_record(name, record)]
    if wrong:
        raise InputError(f"{path} is damaged: {listed(wrong)} is missing, of the wrong type or impossible")
    if content["format_version"] > FORMAT_VERSION:
        version = printable(content["format_version"])
        raise InputError(f"{path} has format version {version}, this toolkit reads {FORMAT_VERSION}")
    broken = [name for name, tensor in content["tensors"].items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(f"{path} has NaN or infinite numbers in {listed(broken)}; use that of an earlier epoch")
    return content


# What copies into a parameter; safetensors knows stranger ones.
_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_DTYPES |= {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}


def _is_named_tensor(name: Any, tensor: Any) -> bool:
    return isinstance(name, str) and isinstance(tensor, Tensor) and tensor.dtype in _DTYPES


def _is_layer_record(name: Any, record: Any) -> bool:
    if not isinstance(name, str) or not isinstance(record, dict) or set(record) != set(_LAYER_FIELDS):
        return False
    if type(record["kind"]) is not str or type(record["use_rslora"]) is not bool or type(record["r"]) is not int:
        return False
    numbers = [record[field] for field in ("r", "lora_alpha", "lora_dropout", "scaling")]
    if not all(type(x) in (int, float) and abs(x) < 1e300 for x in numbers):  # no NaN either
        return False
    return record["r"] >= 1 and record["lora_alpha"] > 0 and 0 <= record["lora_dropout"] < 1


def _read_safetensors(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} is not a file: give the path of an adapter file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get("adapter", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # beside its own errors: no JSON, JSON nested too deeply, a type unknown to PyTorch
        with open(path, "rb") as file:
            start = what_starts_so(file.read(12))
        reason = f"{printable(error)}; {start}"
        raise InputError(f"{path} is no readable safetensors file: {reason}; download or copy it again") from None
    return {**described, "tensors": tensors} if isinstance(described, dict) else {}


# ------------------------------------------------------------------------------------------------------ command line


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """The command line: `info FILE`, or `merge FILE --output FILE`."""
    parser = argparse.ArgumentParser(description="Look into an adapter file, or merge it into one state_dict.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="what is in the file", allow_abbrev=False)
    merge = commands.add_parser(
        "merge", help="base and adapter as one state_dict that plain torchvision loads", allow_abbrev=False
    )
    for command in (info, merge):
        command.add_argument("adapter", type=Path, help="adapter file, .pth or .safetensors")
    merge.add_argument("--output", type=Path, help="file to write")
    merge.add_argument("--checkpoint", type=Path, help="the base, if it is not where it was at training")
    args, rest = parser.parse_known_args(argv)
    problems = unknown_words(merge if args.command == "merge" else info, rest)
    if args.command == "merge":
        problems += _output_problems(args.output, args.adapter, args.checkpoint)
    if problems:
        raise InputError("\n".join(problems))
    return _info(args.adapter) if args.command == "info" else _merge(args.adapter, args.output, args.checkpoint)


def _output_problems(output: Path | None, *inputs: Path | None) -> list[str]:
    if output is None:
        return ["--output: expected a value, the file to write"]
    problems = [
        f"--output {output} is what is to be merged; name another file"
        for path in inputs
        if path is not None and os.path.exists(output) and os.path.exists(path) and os.path.samefile(output, path)
    ]
    if output.suffix == ".safetensors":
        problems.append(f"--output {output}: a merged file is written by torch.save; let its name end in .pth")
    return problems


def _info(path: Path) -> dict[str, Any]:
    content = read_adapter_file(path)
    numel = sum(tensor.numel() for tensor in content["tensors"].values())
    print(f"{path}: {len(content['layers'])} adapted layers, {numel:,} parameters, {path.stat().st_size / 1e6:.2f} MB")
    for key, value in content["metadata"].items():
        print(f"  {printable(key)}: {printable(value, 1000)}")
    for name, record in content["layers"].items():
        print(f"  {printable(name)}: {printable(record['kind'])}, r={record['r']}, scaling={record['scaling']:g}")
    return content


def _merge(adapter: Path, output: Path, checkpoint: Path | None) -> dict[str, Any]:
    from finetune_lora import load_finetuned  # here, because it imports this file

    model, info = load_finetuned(adapter, checkpoint)
    LoRAManager(model).merge_lora_weights()
    save_atomically(model.state_dict(), output)
    print(f"wrote {output}: a state_dict for torchvision's {info['arch']} with {len(info['class_names'])} classes")
    return info


if __name__ == "__main__":
    run_script(main)
