"""Converts adapters to the format of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

Both libraries compute ``W + s B A``, so an adapter's values stay as they are; only the shapes differ.

- **Linear**: the same.
- **Conv2d**: A, here (r, in * kh * kw), is a kernel (r, in, kh, kw) in PEFT, and B, here (out, r), is (out, r, 1, 1).
- **Attention**: here q, k and v have a pair each; PEFT has one pair for their packed weight. A pair of three times the
  rank holds ours: ``A = [A_q; A_k; A_v]`` and ``B = diag(B_q, B_k, B_v)``. In PEFT the output projection has the same
  rank, so its factors are padded with zeros. PEFT up to 0.21 adds the projection's update twice (its pull request
  3774): the factors are made for the installed release.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapted import is_adapted, outermost_layers
from toolkit import listed, optional_package
from toolkit.models.backbones import head_names, in_head

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # precedes the base's names inside a PeftModel


def import_peft():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and its warnings do not matter here
    return optional_package("peft", "PEFT's format")


def obstacles(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[str]:
    """Yield what PEFT's format cannot hold of a model and the tensors of its adapter file, each with the reason."""
    layers = _adapted_layers(model)
    if not layers:
        yield "it has no adapters"
        return
    for name, layer in layers.items():
        if in_head(model, name):
            yield f"{name} (an adapter on the head, which PEFT saves whole)"
        elif isinstance(layer, nn.Conv2d) and layer.groups > 1:
            yield f"{name} (a convolution in groups)"
        elif isinstance(layer, nn.Conv2d) and (layer.dilation != (1, 1) or layer.padding_mode != "zeros"):
            yield f"{name} (a convolution with dilation or padding other than zeros, which PEFT's adapter lacks)"
    of_base = [name for name in tensors if ".lora_" not in name and not in_head(model, name)]
    if trained := [name for name in of_base if ".running_" not in name]:
        yield f"weights of the base that have trained ({listed(trained)})"
    elif of_base:
        yield "statistics of BatchNorms that followed it (--norms frozen keeps the base's)"


def _adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    return dict(outermost_layers(model, lambda module: is_adapted(module) and module.r > 0))


def write_peft(model: nn.Module, folder: Path) -> None:
    """Write the adapters of a model without `obstacles`, and its head, as `PeftModel.save_pretrained` would."""
    layers = _adapted_layers(model)
    times = _times_projected()
    ranks = {}
    alphas = {}
    tensors = {}
    for name, layer in layers.items():
        factors = _packed_factors(layer, times)
        pattern = f"^{re.escape(name)}"
        ranks[pattern] = len(factors["lora_A.weight"])
        alphas[pattern] = layer.scaling * ranks[pattern]
        for key, factor in factors.items():
            tensors[f"{name}.{key}"] = factor
    adapters = {"r": max(ranks.values()), "lora_alpha": max(alphas.values())}  # the patterns have each layer's
    adapters |= {"rank_pattern": ranks, "alpha_pattern": alphas, "modules_to_save": list(head_names(model))}
    adapters["target_modules"] = "|".join(map(re.escape, layers))  # a list would match the ends of names
    dropout = max(layer.lora_dropout for layer in layers.values())
    config = import_peft().LoraConfig(**adapters, lora_dropout=dropout, inference_mode=True)
    for head in head_names(model):
        tensors |= model.get_submodule(head).state_dict(prefix=f"{head}.")
    tensors = {PREFIX + name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    config.save_pretrained(folder)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _packed_factors(layer: nn.Module, times_projected: int) -> dict[str, Tensor]:
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
    # Filled up with zeros to this rank.
    factors = {"lora_A.weight": F.pad(A, (0, 0, 0, rank - len(A))), "lora_B.weight": F.pad(B, (0, rank - len(A)))}
    factors["base_layer.out_proj.lora_A.weight"] = F.pad(projection.lora_A, (0, 0, 0, rank - projection.r))
    return factors | {"base_layer.out_proj.lora_B.weight": F.pad(projected, (0, rank - projection.r))}


@torch.no_grad()
def _times_projected() -> int:
    """How often the installed PEFT adds the update of attention's output projection: 1 each time if all else is 0."""
    peft = import_peft()
    with torch.random.fork_rng(devices=[]):
        config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(nn.MultiheadAttention(1, 1, bias=False)), config).eval()
    for name, parameter in model.named_parameters():
        parameter.fill_(float(name.endswith("in_proj_weight") or ".out_proj.lora_" in name))
    return round(model.base_model.model[0](*[torch.ones(1, 1, 1)] * 3)[0].item())
