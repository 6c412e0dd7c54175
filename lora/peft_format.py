"""The state of adapters in the format of PEFT (`adapter_config.json`, `adapter_model.safetensors`), and from it.

Both libraries compute ``W + s B A``, so an adapter is carried over as it is; only the shapes differ.

- **Linear**: the same.
- **Conv2d**: A, here (r, in * kh * kw), is a kernel (r, in, kh, kw) in PEFT, and B, here (out, r), is (out, r, 1, 1).
- **Attention**: PEFT has one pair for the packed weight of q, k and v, where here each of the three has its own.
  A pair of three times the rank holds ours: ``A = [A_q; A_k; A_v]`` and ``B = diag(B_q, B_k, B_v)``. In PEFT the output
  projection has the same rank, so its factors are filled up with zeros. PEFT up to 0.21 adds the projection's update
  twice (its pull request 3774): `_times_projected` asks the installed release, and the factors are made for that one.

What PEFT cannot compute as this toolkit does is refused by name: see `obstacles`. `deploy_lora.py convert` loads the
models, and compares their answers after each conversion.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapted import AdaptedLayer, LoRASettings, is_adapted
from lora.targets import outermost_layers
from toolkit import InputError, listed, printable
from toolkit.backbones import head_name
from toolkit.bands import from_metadata
from toolkit.files import read_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the base's names inside a PeftModel
IMAGES, TASK = "images", "task"  # in the file's header
ADAPTER = "default"  # PEFT's name for an adapter that was given none


def import_peft():
    """The module `peft`. Raises InputError if it is missing."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it warns of what nobody needs here
    try:
        import peft
    except ImportError as error:
        raise InputError(f"PEFT's format needs PEFT ({error}): pip install peft") from None
    return peft


# ------------------------------------------------------------------------------------------------------------ to PEFT


def obstacles(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[str]:
    """Yields what has no place in PEFT's format, each with the reason.

    `tensors` are those of the adapter file that the model was loaded from.
    """
    layers, head = _adapted_layers(model), f"{head_name(model)}."
    if not layers:
        yield "it has no adapters"
        return
    for name, layer in layers.items():
        reason = "an adapter on the head, which PEFT saves whole" if f"{name}.".startswith(head) else _obstacle(layer)
        if reason:
            yield f"{name} ({reason})"
    trained = [n for n in tensors if not n.startswith(head) and not n.rpartition(".")[2].startswith("lora_")]
    if trained:
        yield f"weights of the base that have trained ({listed(trained)})"


def _obstacle(layer: nn.Module) -> str | None:
    """Why PEFT computes another function with this layer's adapter, or cannot adapt it; None if it can."""
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1:
            return "a convolution in groups"
        if layer.dilation != (1, 1) or layer.padding_mode != "zeros":
            return "a convolution with dilation or padding other than zeros, which PEFT's adapter lacks"
    if isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is None:
        return "attention with a weight each for q, k and v"
    return None


def _adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    return {name: layer for name, layer in outermost_layers(model, is_adapted) if layer.r}


def write_peft(model: nn.Module, folder: Path, about: dict[str, Any], task: dict[str, Any] | None = None) -> None:
    """Write the adapters of a model and its head into a folder, as `PeftModel.save_pretrained` would.

    What the images are (`about`, of `toolkit.bands.recorded`) is put into the file's header, for the way back, and what
    the outputs mean (`task`, of `toolkit.tasks.Task.record`).
    `obstacles` must have found none.
    """
    layers, head = _adapted_layers(model), head_name(model)
    packed = {name: _packed_factors(layer, _times_projected()) for name, layer in layers.items()}
    ranks = {name: len(factors["lora_A.weight"]) for name, factors in packed.items()}
    config = import_peft().LoraConfig(
        **_by_layer("r", "rank_pattern", ranks),
        **_by_layer("lora_alpha", "alpha_pattern", {name: layers[name].scaling * r for name, r in ranks.items()}),
        target_modules="|".join(map(re.escape, layers)),  # a list would match the ends of names
        modules_to_save=[head],
        lora_dropout=max(layer.lora_dropout for layer in layers.values()),
        inference_mode=True,
    )
    tensors = {f"{name}.{key}": tensor for name, factors in packed.items() for key, tensor in factors.items()}
    tensors |= model.get_submodule(head).state_dict(prefix=f"{head}.")
    tensors = {PREFIX + name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    config.save_pretrained(folder)
    header = {"format": "pt", IMAGES: json.dumps(about)} | ({} if task is None else {TASK: json.dumps(task)})
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata=header)


def _packed_factors(layer: AdaptedLayer, times_projected: int) -> dict[str, Tensor]:
    """A layer's factors as PEFT has them, by their names within the layer."""
    if isinstance(layer, nn.Conv2d):
        shape = layer.in_channels, *layer.kernel_size
        A, B = layer.lora_A.unflatten(1, shape), layer.lora_B[:, :, None, None]  # (r, in, kh, kw), (out, r, 1, 1)
        return {"lora_A.weight": A, "lora_B.weight": B}
    if not isinstance(layer, nn.MultiheadAttention):
        return {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}
    projection = layer.out_proj
    rank = max(3 * layer.r, projection.r)
    A = torch.cat([layer.lora_A_q, layer.lora_A_k, layer.lora_A_v])  # (3 r, E)
    B = torch.block_diag(layer.lora_B_q, layer.lora_B_k, layer.lora_B_v)  # (3 E, 3 r)
    projected = projection.lora_B * (projection.scaling / layer.scaling / times_projected)
    return {
        "lora_A.weight": _filled_up(A, rank, 0),
        "lora_B.weight": _filled_up(B, rank, 1),
        "base_layer.out_proj.lora_A.weight": _filled_up(projection.lora_A, rank, 0),
        "base_layer.out_proj.lora_B.weight": _filled_up(projected, rank, 1),
    }


def _filled_up(factor: Tensor, rank: int, dim: int) -> Tensor:
    """The factor with zeros after its own ranks."""
    more = rank - factor.shape[dim]
    return F.pad(factor, (0, more) if dim == 1 else (0, 0, 0, more))


def _by_layer(field: str, pattern: str, values: dict[str, float]) -> dict[str, Any]:
    """A setting of PEFT's: the most frequent value for all layers, and a pattern for those that differ."""
    usual, _ = Counter(values.values()).most_common(1)[0]
    return {field: usual, pattern: {f"^{re.escape(n)}": value for n, value in values.items() if value != usual}}


# ---------------------------------------------------------------------------------------------------------- from PEFT


def values_of(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """What `write_peft` says of the images; of a folder of PEFT's own what the backbone's images are likely to be."""
    told = read_safetensors(folder / WEIGHTS)[1].get(IMAGES)
    try:
        about = json.loads(told) if told is not None else {"channels": report["channels"]}
        if told is None and report["channels"] != 3:
            zeros, ones = ([number] * report["channels"] for number in (0.0, 1.0))
            about |= {"mean": zeros, "std": ones, "bands": [], "scale": 1.0, "show_bands": [1]}
        return from_metadata({**about, "arch": report["arch"]})
    except (ValueError, TypeError) as error:  # an InputError is a ValueError
        raise InputError(f"{folder / WEIGHTS} is damaged: {printable(error)}") from None


def task_of(folder: Path) -> Any:
    """What `write_peft` says of the task: what `toolkit.tasks.from_record` reads."""
    try:
        return json.loads(read_safetensors(folder / WEIGHTS)[1].get(TASK, "null"))
    except ValueError as error:  # an InputError is one too
        raise InputError(f"{folder / WEIGHTS} is damaged: {printable(error)}") from None


def read_peft(folder: Path) -> dict[str, Tensor]:
    """The tensors in a folder of PEFT's. Raises InputError unless it holds plain LoRA, which this toolkit has too."""
    peft = import_peft()
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():  # PEFT would look for it on the internet
        raise InputError(f"{folder} is no adapter of PEFT's: it must be a folder with {CONFIG} and {WEIGHTS}")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise InputError(f"{folder / CONFIG} is damaged: {printable(error)}") from None
    if config.peft_type != peft.PeftType.LORA:
        raise InputError(f"{folder} holds {printable(config.peft_type)}; only LoRA can be converted")
    more = [name for name in ("use_dora", "lora_bias", "fan_in_fan_out", "target_parameters") if getattr(config, name)]
    more += [f"bias={config.bias}"] if config.bias != "none" else []
    # Others change the base's weights before they begin.
    plain = config.init_lora_weights in (True, False, "gaussian", "orthogonal", "eva")
    more += [] if plain else [f"init_lora_weights={config.init_lora_weights}"]
    if more:
        raise InputError(f"{folder} has {printable(', '.join(more))}, which adapters here have not")
    return read_safetensors(folder / WEIGHTS)[0]


@torch.no_grad()
def adapters_in(
    theirs: nn.Module, tensors: dict[str, Tensor], folder: Path
) -> tuple[dict[str, LoRASettings], dict[str, Tensor]]:
    """The adapters of a PeftModel as this toolkit has them: the settings of each layer, and all factors by name.

    Args:
        theirs: `PeftModel.from_pretrained` of the folder.
        tensors: what `read_peft` returned for it.
        folder: for messages.

    Raises:
        InputError: the tensors do not fit the folder's configuration, or a layer is of a kind that is not adapted here.
    """
    layers = {n: m for n, m in theirs.get_base_model().named_modules() if hasattr(m, "lora_A")}
    needed = {f"{PREFIX}{name}.lora_{factor}.weight" for name in layers for factor in "AB"}
    torn = needed ^ {name for name in tensors if ".lora_" in name}
    if torn:
        raise InputError(f"{folder} does not fit its own {CONFIG} or this base: {listed(sorted(torn))}")
    kinds = {name: type(layer).__name__ for name, layer in layers.items()}
    reasons = {
        name: _obstacle(layer.get_base_layer()) if kinds[name] in _KINDS else f"PEFT's {kinds[name]}"
        for name, layer in layers.items()
    }
    refused = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
    if refused:
        raise InputError(f"{folder} cannot be read: {listed(refused)}")
    settings, factors = {}, {}
    for inner, layer in layers.items():
        A, B = (pair[ADAPTER].weight.flatten(1) for pair in (layer.lora_A, layer.lora_B))  # (r, fan_in), (out, r)
        own = {"lora_A": A, "lora_B": B}
        if kinds[inner] == "MultiheadAttention":
            own = _unpacked(A, B)
        elif inner.endswith(".base_layer.out_proj"):
            own = _without_zeros(A, B * _times_projected())
        name = inner.replace(".base_layer.", ".")
        rank = len(next(iter(own.values())))
        dropout = getattr(layer.lora_dropout[ADAPTER], "p", 0.0)
        settings[name] = LoRASettings(rank, layer.scaling[ADAPTER] * rank, dropout)
        factors |= {f"{name}.{key}": factor for key, factor in own.items()}
    return settings, factors


_KINDS = ("Linear", "Conv2d", "MultiheadAttention")  # of PEFT's layers that have a counterpart here


def _unpacked(A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The adapters of q, k and v in the packed one, A (R, E) and B (3 E, R): blocks, if that is how it is built.

    B before training, all zeros, tells nothing: each of the three then has the whole rank.
    """
    blocks = B.unflatten(0, (3, -1)).unbind()  # 3 of (E, R)
    pairs = [(A, block) for block in blocks]
    if len(A) % 3 == 0 and B.any():
        own = [(a, block.chunk(3, 1)[i]) for i, (a, block) in enumerate(zip(A.chunk(3), blocks, strict=True))]
        if torch.equal(torch.block_diag(*(b for _, b in own)), B):
            pairs = own
    named = zip("qkv", pairs, strict=True)
    return {f"lora_{factor}_{p}": tensor for p, pair in named for factor, tensor in zip("AB", pair, strict=True)}


def _without_zeros(A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The factors without the ranks in which both are zero."""
    used = (A != 0).any(1) | (B != 0).any(0)
    used[0] = True  # a rank of 1 at least
    return {"lora_A": A[used], "lora_B": B[:, used]}


# --------------------------------------------------------------------------------------------------------------- both


@torch.no_grad()
def _times_projected() -> int:
    """How often the installed PEFT adds the update of attention's output projection.

    The answer of an attention in which that update, of size 1, is all there is.
    """
    peft = import_peft()
    with torch.random.fork_rng(devices=[]):
        config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(nn.MultiheadAttention(1, 1, bias=False)), config).eval()
    for name, parameter in model.named_parameters():
        parameter.fill_(float(name.endswith("in_proj_weight") or ".out_proj.lora_" in name))
    return round(model.base_model.model[0](*[torch.ones(1, 1, 1)] * 3)[0].item())
