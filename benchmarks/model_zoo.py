"""Adapters on other people's models: are they exact, and is every one of them used? And how long does a switch take?

    python -m benchmarks.model_zoo                      # all of MODELS: a table, and results/model_zoo.json
    python -m benchmarks.model_zoo --only timm:beit_base_patch16_224 torchvision:swin_t
    python -m benchmarks.model_zoo --switching          # among 20 adapters on a ViT-B/16

Each model has random weights, so nothing is downloaded, and computes in float64. It is compared with itself under dense
weights ``W + s B A``, through which PyTorch differentiates: the output, the gradients of all A and B, and the output of
a plain model that has loaded the merged state_dict. timm and transformers come with `benchmarks/requirements.txt`.
"""

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import MEASURED
from benchmarks.compare_peers import current_commit, describe_versions
from finetune_lora import add_lora_to_model, freeze_backbone_params
from lora.adapted import adapted_layers
from lora_utils import LoRAManager, unused_adapters
from toolkit import InputError, homed
from toolkit.models.backbones import build_backbone
from toolkit.run.runs import run_script

EXACT = 1e-9  # relative, in float64
CLASSES = 5

# Image sizes at which the models are tried: as small as their strides and windows allow.
TIMM = {
    **dict.fromkeys(("vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_relpos_small_patch16_224"), 64),
    **dict.fromkeys(("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"), 56),
    **dict.fromkeys(("vit_small_patch16_dinov3", "beit_base_patch16_224", "beitv2_base_patch16_224"), 64),
    **dict.fromkeys(("eva02_tiny_patch14_224", "eva02_small_patch14_224"), 56),
    **dict.fromkeys(("cait_xxs24_224", "xcit_nano_12_p16_224", "crossvit_tiny_240", "convit_tiny"), 240),
    **dict.fromkeys(("swin_tiny_patch4_window7_224", "twins_pcpvt_small", "pit_ti_224", "levit_128s"), 224),
    **dict.fromkeys(("swinv2_tiny_window8_256", "maxvit_tiny_tf_224", "coatnet_0_rw_224", "gcvit_xxtiny"), 224),
    **dict.fromkeys(("resnet18", "resnet50", "resnet50d", "resnext50_32x4d", "seresnet50", "ecaresnet26t"), 64),
    **dict.fromkeys(("wide_resnet50_2", "res2net50_26w_4s", "resnest14d", "skresnet18", "regnety_002"), 64),
    **dict.fromkeys(("regnetx_002", "efficientnet_b0", "tf_efficientnetv2_b0", "mobilenetv2_050"), 64),
    **dict.fromkeys(("mobilenetv3_small_050", "mobilenetv4_conv_small_050", "mobilevit_xxs", "mobilevitv2_050"), 64),
    **dict.fromkeys(("convnext_atto", "convnextv2_atto", "densenet121", "vgg11_bn", "edgenext_xx_small"), 64),
    **dict.fromkeys(("poolformer_s12", "ghostnet_050", "dla34", "fastvit_t8", "mixer_s32_224", "resmlp_12_224"), 224),
}
TORCHVISION = {
    **dict.fromkeys(("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "regnet_y_400mf"), 64),
    **dict.fromkeys(("efficientnet_b0", "efficientnet_v2_s", "mobilenet_v2", "mobilenet_v3_small"), 64),
    **dict.fromkeys(("mnasnet0_5", "shufflenet_v2_x0_5", "densenet121", "squeezenet1_1", "convnext_tiny"), 64),
    **dict.fromkeys(("alexnet", "vgg11", "googlenet", "swin_t", "swin_v2_t", "maxvit_t", "vit_b_16"), 224),
}
# Configurations of transformers, made small: class, and what differs from its defaults.
_TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TRANSFORMERS = {
    "ViT": {**_TRANSFORMER, "image_size": 64},
    "DeiT": {**_TRANSFORMER, "image_size": 64},
    "Beit": {**_TRANSFORMER, "image_size": 64, "use_relative_position_bias": True},
    "Data2VecVision": {**_TRANSFORMER, "image_size": 64},
    "Dinov2": {**_TRANSFORMER, "image_size": 64, "patch_size": 16},
    "Dinov2WithRegisters": {**_TRANSFORMER, "image_size": 64, "patch_size": 16},
    "ViTMSN": {**_TRANSFORMER, "image_size": 64},
    "Swin": {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
    "Swinv2": {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
    "ConvNext": {"image_size": 64, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1]},
    "ResNet": {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]},
    "Segformer": {"hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 2, 2, 4], "depths": [1, 1, 1, 1]},
    "PoolFormer": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
    "MobileNetV2": {},
}
MODELS = [f"timm:{name}" for name in TIMM]
MODELS += [f"torchvision:{name}" for name in TORCHVISION] + [f"transformers:{name}" for name in TRANSFORMERS]

# ------------------------------------------------------------------------------------------------------------ models


def build(name: str) -> tuple[nn.Module, int]:
    """A model of MODELS with random weights in float64, in eval mode, and the side of its images in pixels."""
    library, _, name = name.partition(":")
    size = {"timm": TIMM, "torchvision": TORCHVISION}.get(library, {}).get(name, 64)
    model = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}[library](name, size)
    with torch.no_grad():  # layers that start as zero or as good as that would hide what is before them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.double().eval(), size


def _timm(name: str, size: int) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, num_classes=CLASSES, img_size=size)
    except TypeError:  # a network of convolutions takes any size
        return timm.create_model(name, num_classes=CLASSES)


def _torchvision(name: str, size: int) -> nn.Module:
    from torchvision.models import get_model

    options = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    return get_model(name, weights=None, num_classes=CLASSES, **options)


class _Logits(nn.Module):
    """A model of transformers, called as torchvision's are."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def _transformers(name: str, size: int) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**TRANSFORMERS[name], num_labels=CLASSES)
    return _Logits(getattr(transformers, f"{name}ForImageClassification")(config))


# ------------------------------------------------------------------------------------------------------------- checks


def check(name: str) -> dict:
    """How far the adapted model is from the dense one: relative errors, and the numbers of layers."""
    torch.manual_seed(0)
    started = time.perf_counter()
    model, size = build(name)
    stock = copy.deepcopy(model).requires_grad_(False)
    add_lora_to_model(model, r=4, lora_alpha=8)
    freeze_backbone_params(model)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.02)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    factors, weights = dense_weights(model, stock)
    expected = functional_call(stock, weights, (images,))
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    actual = model(images)
    actual.backward(upstream)
    own = dict(model.named_parameters())
    largest = max(factor.grad.norm().item() for factor in factors.values() if factor.grad is not None)
    gradients = [relative_error(own[key].grad, factor.grad, 1e-6 * largest) for key, factor in factors.items()]
    result = {
        "layers": len(adapted_layers(model)),
        "of": sum(isinstance(m, nn.Linear | nn.Conv2d | nn.MultiheadAttention) for m in stock.modules()),
        "unused": unused_adapters(model),
        "output": relative_error(actual, expected),
        "gradients": max(gradients),
    }
    with torch.no_grad():
        LoRAManager(model).merge_lora_weights()
        stock.load_state_dict(model.state_dict())
        result["merged"] = relative_error(stock(images), expected)
    return {**result, "seconds": round(time.perf_counter() - started, 1)}


def dense_weights(model: nn.Module, stock: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of all A and B, and of each adapted weight what it is with them: W + s B A, differentiable in A and B."""
    factors, weights = {}, {}
    for path, layer in adapted_layers(model).items():
        copies = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters() if n.startswith("lora_")}
        factors |= {f"{path}.{key}": factor for key, factor in copies.items()}
        suffixes = [key.removeprefix("lora_A") for key in copies if key.startswith("lora_A")]
        updates = [layer.scaling * copies[f"lora_B{suffix}"] @ copies[f"lora_A{suffix}"] for suffix in suffixes]
        base = stock.get_parameter(f"{path}.{layer.weight_name}")
        weights[f"{path}.{layer.weight_name}"] = base + torch.cat(updates).view_as(base)  # q, k and v are packed
    return factors, weights


def relative_error(actual: Tensor | None, expected: Tensor | None, smallest: float = 1e-300) -> float:
    """|actual - expected| / |expected|, which counts as `smallest` at least. Missing on one side alone: 1."""
    if actual is None or expected is None:
        return float((actual is None) != (expected is None))
    return ((actual - expected).norm() / expected.norm().clamp_min(smallest)).item()


def is_exact(result: dict) -> bool:
    return not result["unused"] and max(result["output"], result["gradients"], result["merged"]) < EXACT


# ---------------------------------------------------------------------------------------------------------- switching


def switching(arch: str = "vit_b_16", count: int = 20, rounds: int = 200) -> dict:
    """Milliseconds of `LoRAManager.use` among `count` adapters of rank 8, over a float and a 4-bit base."""
    result = {}
    for base in ("float", "4 bits"):
        model = build_backbone(arch, 10)
        freeze_backbone_params(model)
        adapted = add_lora_to_model(copy.deepcopy(model), r=8, use_qlora=base == "4 bits")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lora.safetensors"
            LoRAManager(adapted).save_lora_checkpoint(path)
            manager = LoRAManager(model if base == "float" else adapted)
            for number in range(count):
                manager.load_lora_checkpoint(path, name=str(number))
            size = path.stat().st_size / 1e6
        times = []
        for number in range(rounds):
            started = time.perf_counter()
            manager.use(str(number * 7 % count))
            times.append(1e3 * (time.perf_counter() - started))
        low, median, high = (round(x, 2) for x in statistics.quantiles(times, n=4))
        result[base] = {"milliseconds": [low, median, high], "file_megabytes": round(size, 2)}
        print(f"{arch}, {base}, {count} adapters of {size:.2f} MB each: {median} ms ({low} to {high})")
    return result


# --------------------------------------------------------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> dict:
    """Print the table, and write `model_zoo.json` if it is whole, or `switching.json`.

    Raises:
        RuntimeError: a model is not exact.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=MODELS, metavar="LIBRARY:MODEL", help="some of MODELS")
    parser.add_argument("--switching", action="store_true", help="time switching among adapters instead")
    parser.add_argument("--output-dir", type=homed, default=MEASURED)
    args = parser.parse_args(argv)
    if unknown := [name for name in args.only if name not in MODELS]:
        raise InputError(f"{unknown[0]} is none of the models of this script: see MODELS in it")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    common = {"commit": current_commit(), "machine": platform.machine(), "versions": describe_versions()}
    if args.switching:
        return _write({**common, "switching": switching()}, args.output_dir / "switching.json")
    results = {}
    print("| model | layers | output | gradients | merged |\n|---|---|---|---|---|")
    for name in args.only:
        results[name] = found = check(name)
        errors = " | ".join(f"{found[key]:.0e}" for key in ("output", "gradients", "merged"))
        note = "" if is_exact(found) else f" NOT EXACT, unused: {found['unused']}"
        print(f"| {name} | {found['layers']} of {found['of']} | {errors} |{note}", flush=True)
    if args.only == MODELS:
        _write({**common, "models": results}, args.output_dir / "model_zoo.json")
    wrong = [name for name, result in results.items() if not is_exact(result)]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(results)} models are not exact: {', '.join(wrong)}")
    return results


def _write(result: dict, path: Path) -> dict:
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    run_script(main)
