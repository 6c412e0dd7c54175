"""Converts adapters to the format of PEFT (`adapter_config.json`, `adapter_model.safetensors`), and from it.

Both libraries compute ``W + s B A``, so an adapter's values stay as they are; only the shapes differ.

- **Linear**: the same.
- **Conv2d**: A, here (r, in * kh * kw), is a kernel (r, in, kh, kw) in PEFT, and B, here (out, r), is (out, r, 1, 1).
- **Attention**: here q, k and v have a pair each; PEFT has one pair for their packed weight. A pair of three times the
  rank holds ours: ``A = [A_q; A_k; A_v]`` and ``B = diag(B_q, B_k, B_v)``. In PEFT the output projection has the same
  rank, so its factors are padded with zeros. PEFT up to 0.21 adds the projection's update twice (its pull request
  3774): `_times_projected` tests the installed release, and the factors are made for that one.

An adapter that PEFT would compute differently is refused, with the reason: see `obstacles`. `deploy_lora.py convert`
loads the models, and compares their answers after each conversion.
"""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapted import AdaptedLayer, LoRASettings, is_adapted, outermost_layers
from toolkit import InputError, listed, printable
from toolkit.files import read_safetensors
from toolkit.images.bands import from_metadata
from toolkit.models.backbones import head_names, in_head

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # precedes the base's names inside a PeftModel
IMAGES = "images"  # this key and the next have this toolkit's metadata in the file's header
TASK = "task"
ADAPTER = "default"  # PEFT's name for an adapter without one


def import_peft():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and its warnings do not matter here
    try:
        import peft
    except ImportError as error:
        raise InputError(f"PEFT's format needs PEFT ({error}): pip install peft") from None
    return peft


# ------------------------------------------------------------------------------------------------------------ to PEFT


def obstacles(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[str]:
    """Yield what PEFT's format cannot hold, each with the reason.

    `tensors` are those of the adapter file from which the model was loaded.
    """
    layers = _adapted_layers(model)
    if not layers:
        yield "it has no adapters"
        return
    for name, layer in layers.items():
        reason = "an adapter on the head, which PEFT saves whole" if in_head(model, name) else _obstacle(layer)
        if reason:
            yield f"{name} ({reason})"
    of_base = [name for name in tensors if ".lora_" not in name and not in_head(model, name)]
    trained = [name for name in of_base if ".running_" not in name]
    if trained:
        yield f"weights of the base that have trained ({listed(trained)})"
    elif of_base:
        yield "statistics of BatchNorms that followed it (--norms frozen keeps the base's)"


def _obstacle(layer: nn.Module) -> str | None:
    """Why PEFT computes something else with this layer's adapter, or cannot adapt the layer; None if it can."""
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1:
            return "a convolution in groups"
        if layer.dilation != (1, 1) or layer.padding_mode != "zeros":
            return "a convolution with dilation or padding other than zeros, which PEFT's adapter lacks"
    return None


def _adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    return dict(outermost_layers(model, lambda module: is_adapted(module) and module.r > 0))


def write_peft(model: nn.Module, folder: Path, about: dict[str, Any], task: dict[str, Any] | None = None) -> None:
    """Write the adapters of a model and its head into a folder, as `PeftModel.save_pretrained` would.

    The metadata about images (`about`, from `bands.recorded`) and the meaning of the outputs (`task`) are
    written into the file's header, for a conversion back. `obstacles` must have found none.
    """
    layers = _adapted_layers(model)
    times_projected = _times_projected()
    ranks = {}
    alphas = {}
    tensors = {}
    for name, layer in layers.items():
        factors = _packed_factors(layer, times_projected)
        pattern = f"^{re.escape(name)}"
        ranks[pattern] = len(factors["lora_A.weight"])
        alphas[pattern] = layer.scaling * ranks[pattern]
        for key, factor in factors.items():
            tensors[f"{name}.{key}"] = factor
    config = import_peft().LoraConfig(
        r=max(ranks.values()),  # the patterns have that of each layer
        lora_alpha=max(alphas.values()),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules="|".join(map(re.escape, layers)),  # a list would match the ends of names
        modules_to_save=list(head_names(model)),
        lora_dropout=max(layer.lora_dropout for layer in layers.values()),
        inference_mode=True,
    )
    for head in head_names(model):
        tensors |= model.get_submodule(head).state_dict(prefix=f"{head}.")
    tensors = {PREFIX + name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    config.save_pretrained(folder)
    header = {"format": "pt", IMAGES: json.dumps(about)}
    if task is not None:
        header[TASK] = json.dumps(task)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata=header)


def _packed_factors(layer: AdaptedLayer, times_projected: int) -> dict[str, Tensor]:
    """A layer's factors in PEFT's shapes, by their names within the layer."""
    if isinstance(layer, nn.Conv2d):
        A = layer.lora_A.unflatten(1, (layer.in_channels, *layer.kernel_size))  # (r, in, kh, kw)
        B = layer.lora_B[:, :, None, None]  # (out, r, 1, 1)
        return {"lora_A.weight": A, "lora_B.weight": B}
    if not isinstance(layer, nn.MultiheadAttention):
        return {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}
    projection = layer.out_proj
    rank = max(3 * layer.r, projection.r)
    A = torch.cat([layer.lora_A_q, layer.lora_A_k, layer.lora_A_v])  # (3 r, E)
    B = torch.block_diag(layer.lora_B_q, layer.lora_B_k, layer.lora_B_v)  # (3 E, 3 r)
    projected = projection.lora_B * (projection.scaling / layer.scaling / times_projected)
    return {  # filled up with zeros to this rank
        "lora_A.weight": F.pad(A, (0, 0, 0, rank - len(A))),
        "lora_B.weight": F.pad(B, (0, rank - len(A))),
        "base_layer.out_proj.lora_A.weight": F.pad(projection.lora_A, (0, 0, 0, rank - projection.r)),
        "base_layer.out_proj.lora_B.weight": F.pad(projected, (0, rank - projection.r)),
    }


# ---------------------------------------------------------------------------------------------------------- from PEFT


def recorded_in(header: dict[str, str], folder: Path, report: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The normalisation and the task, for `toolkit.answers.tasks.from_record`, that `write_peft` recorded.

    For a folder that PEFT itself wrote the first is that of the backbone, and the second is None.
    """
    channels = report["channels"]
    try:
        about = {"channels": channels}
        if IMAGES in header:
            about = json.loads(header[IMAGES])
        elif channels != 3:
            about |= {"mean": [0.0] * channels, "std": [1.0] * channels, "scale": 1.0, "bands": []}
        return from_metadata({**about, "arch": report["arch"]}), json.loads(header.get(TASK, "null"))
    except (ValueError, TypeError) as error:  # an InputError is a ValueError
        raise InputError(f"{folder / WEIGHTS} is damaged: {printable(error)}") from None


def read_peft(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in a folder of PEFT, and the file's header.

    Raises InputError unless it holds plain LoRA, as this toolkit computes it.
    """
    peft = import_peft()
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():  # PEFT would look for it on the internet
        raise InputError(f"{folder} is no adapter of PEFT: it must be a folder with {CONFIG} and {WEIGHTS}")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise InputError(f"{folder / CONFIG} is damaged: {printable(error)}") from None
    if config.peft_type != peft.PeftType.LORA:
        raise InputError(f"{folder} holds {printable(config.peft_type)}; only LoRA can be converted")
    more = [n for n in ("use_dora", "lora_bias", "fan_in_fan_out", "target_parameters") if getattr(config, n)]
    if config.bias != "none":
        more.append(f"bias={config.bias}")
    # Other initialisations change the base's weights at the start.
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):
        more.append(f"init_lora_weights={config.init_lora_weights}")
    if more:
        raise InputError(f"{folder} has {printable(', '.join(more))}, which adapters here have not")
    return read_safetensors(folder / WEIGHTS)


@torch.no_grad()
def adapters_in(
    theirs: nn.Module, tensors: dict[str, Tensor], folder: Path
) -> tuple[dict[str, LoRASettings], dict[str, Tensor]]:
    """Convert the adapters of a folder's PeftModel with `read_peft`'s tensors: settings of layers, factors by name.

    Raises InputError if the tensors do not fit the folder's configuration, or a kind of layer is not adapted here.
    """
    layers = {n: m for n, m in theirs.get_base_model().named_modules() if hasattr(m, "lora_A")}
    needed = {f"{PREFIX}{name}.lora_{factor}.weight" for name in layers for factor in "AB"}
    torn = needed ^ set(filter(re.compile(r"\.lora_").search, tensors))
    if torn:
        raise InputError(f"{folder} does not fit its own {CONFIG} or this base: {listed(sorted(torn))}")
    reasons = []
    for name, layer in layers.items():
        kind = type(layer).__name__
        reason = _obstacle(layer.get_base_layer()) if kind in _KINDS else f"PEFT's {kind}"
        if reason:
            reasons.append(f"{name} ({reason})")
    if reasons:
        raise InputError(f"{folder} cannot be read: {listed(reasons)}")
    settings = {}
    factors = {}
    for inner, layer in layers.items():
        A = layer.lora_A[ADAPTER].weight.flatten(1)  # (r, fan_in)
        B = layer.lora_B[ADAPTER].weight.flatten(1)  # (out, r)
        if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
            own = _unpacked(A, B)
        elif inner.endswith(".base_layer.out_proj"):
            used = (A != 0).any(1) | (B != 0).any(0)  # ranks that are zero in both fill up
            used[0] = True  # leaves a rank of at least 1
            own = {"lora_A": A[used], "lora_B": B[:, used] * _times_projected()}
        else:
            own = {"lora_A": A, "lora_B": B}
        name = inner.replace(".base_layer.", ".")
        rank = len(next(iter(own.values())))
        dropout = getattr(layer.lora_dropout[ADAPTER], "p", 0.0)
        settings[name] = LoRASettings(rank, layer.scaling[ADAPTER] * rank, dropout)
        for key, factor in own.items():
            factors[f"{name}.{key}"] = factor
    return settings, factors


_KINDS = ("Linear", "Conv2d", "MultiheadAttention")  # the layers of PEFT that have a counterpart here


def _unpacked(A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Unpack an adapter A (R, E), B (3 E, R) into those of q, k and v: of a third of the rank if B is block-diagonal.

    Otherwise each of the three has the whole rank, also before training: a B of zeros does not show how it is built.
    """
    As = [A] * 3
    Bs = B.unflatten(0, (3, -1)).unbind()  # 3 of (E, R)
    if len(A) % 3 == 0 and B.any():
        blocks = [rows.chunk(3, dim=1)[i] for i, rows in enumerate(Bs)]  # 3 of (E, R / 3), on the diagonal
        if torch.equal(torch.block_diag(*blocks), B):
            As = A.chunk(3)
            Bs = blocks
    names = ("lora_A_q", "lora_A_k", "lora_A_v", "lora_B_q", "lora_B_k", "lora_B_v")
    return dict(zip(names, [*As, *Bs], strict=True))


@torch.no_grad()
def _times_projected() -> int:
    """How often the installed PEFT adds the update of attention's output projection.

    This is the output of an attention in which all else is zero, and the update of its projection adds 1 each time.
    """
    peft = import_peft()
    with torch.random.fork_rng(devices=[]):
        config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(nn.MultiheadAttention(1, 1, bias=False)), config).eval()
    for name, parameter in model.named_parameters():
        parameter.fill_(float(name.endswith("in_proj_weight") or ".out_proj.lora_" in name))
    return round(model.base_model.model[0](*[torch.ones(1, 1, 1)] * 3)[0].item())
