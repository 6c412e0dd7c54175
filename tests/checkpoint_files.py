"""What checkpoint files are made of in the tests: tensors under the names that torchvision and timm give them."""

import io
import zipfile
from pathlib import Path

import torch

from tests.dense import resnet
from tests.image_files import bytes_of
from toolkit.models import backbones, names


def shorten_vit_mini() -> None:
    """Two blocks of its six show as much, in half the time."""
    names.VITS["vit_mini"] |= {"num_layers": 2}


def narrow_resnet(weights=None, num_classes: int = 5) -> torch.nn.Module:
    """Has a ResNet-18's names."""
    return resnet(layers=(2, 2, 2, 2), classes=num_classes)


def save_base(path: Path, arch: str = "vit_mini", size: int = 16, channels: int = 3) -> Path:
    """Save a backbone in MoCo's layout, random but the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = without_head(backbones.build_backbone(arch, 3, size, channels=channels).state_dict())
    torch.save({"state_dict": under("module.base_encoder.", state), "arch": arch, "epoch": 7}, path)
    return path


def torch_file(content, zipped: bool = True) -> bytes:
    return bytes_of(lambda file: torch.save(content, file, _use_new_zipfile_serialization=zipped))


def rezipped(content: bytes, change=lambda name, data: data, compression=zipfile.ZIP_STORED) -> bytes:
    """A zip file with what `change` makes of each of its records."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return file.getvalue()


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without_head(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(("fc.", "head.", "heads."))}


def sequential(tensors):
    """A ResNet as an nn.Sequential of its children names them."""
    places = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    return {".".join([places[first], *rest]): v for k, v in tensors.items() for first, *rest in [k.split(".")]}


def timm_vit(stem, depth=2):
    """A ViT-S backbone under timm's names."""
    shapes = {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384), "norm.weight": (384,), "norm.bias": (384,)}
    layers = {"attn.qkv": (1152, 384), "attn.proj": (384, 384), "mlp.fc1": (1536, 384), "mlp.fc2": (384, 1536)}
    for i in range(depth):
        for layer, shape in (layers | {"norm1": (384,), "norm2": (384,)}).items():
            shapes |= {f"blocks.{i}.{layer}.weight": shape, f"blocks.{i}.{layer}.bias": shape[:1]}
    shapes |= stem
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in shapes.items():
        tensors[key] = 0.05 * torch.randn(shape, generator=generator) + (len(shape) == 1)
    tensors["pos_embed"][:, 0] = 0  # MoCo v3 gives the class token no position
    return tensors
