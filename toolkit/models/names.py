"""Models by their names: what `--arch` and `--checkpoint` may say. PyTorch is loaded only where a name needs it.

A model of timm is named as `timm:vit_small_patch14_dinov2`, by its name in `timm.list_models()` and, if any, its tag.
What MoCo's authors and users have published is downloaded once, into the folder of `torch.hub`, if its name was typed.
"""

import argparse
import hashlib
import os
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock

from toolkit import SHIPPED, InputError, did_you_mean, optional_package, printable

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")

# MoCo v3 (arXiv 2104.02057, section 4.4): vit_small has 12 heads where timm and DeiT have 6.
VITS = {
    "vit_mini": {"patch_size": 8, "num_layers": 6, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768},
    "vit_small": {"patch_size": 16, "num_layers": 12, "num_heads": 12, "hidden_dim": 384, "mlp_dim": 1536},
    "vit_b_16": {"patch_size": 16, "num_layers": 12, "num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072},
    "vit_l_16": {"patch_size": 16, "num_layers": 24, "num_heads": 16, "hidden_dim": 1024, "mlp_dim": 4096},
    # The convolutional stem takes the place of one transformer block.
    "vit_conv_small": {"patch_size": 16, "num_layers": 11, "num_heads": 12, "hidden_dim": 384, "mlp_dim": 1536},
    "vit_conv_base": {"patch_size": 16, "num_layers": 11, "num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072},
}

TIMM = "timm:"
ARCHS = (*RESNETS, *VITS)  # of torchvision


def default_image_size(arch: str) -> int:
    """Side in pixels of the square images that `arch` was designed for; raises InputError for an unknown name."""
    if arch.startswith(TIMM):
        return timm_config(arch).input_size[-1]
    if arch not in ARCHS:
        hint = f"{did_you_mean(arch, ARCHS)} choose one of {', '.join(ARCHS)}, {TIMM}NAME"
        raise InputError(f"unknown arch {arch!r}: {hint.lstrip()}")
    return 32 if arch == "vit_mini" else 224


def default_heads(arch: str) -> int | None:
    """The number of attention heads of a torchvision ViT; None for ResNets, and for timm, whose names imply it."""
    return VITS.get(arch, {}).get("num_heads")


def check_heads(arch: str, heads: int | None) -> None:
    """Raise InputError if `arch` cannot have so many attention heads. None stands for its own, which always fit."""
    if heads is None:
        return
    if arch not in VITS:
        raise InputError(f"{heads} heads are not for {arch}: only torchvision's ViTs take a number; drop --heads")
    width = VITS[arch]["hidden_dim"]
    if type(heads) is not int or heads < 1 or width % heads:
        own = default_heads(arch)
        raise InputError(f"{printable(heads)} heads do not divide the {width} features of {arch}; {own} do")


MOST_CHANNELS = 1024  # enough for hyperspectral images; without a limit a damaged file could ask for terabytes


def check_channels(channels: int) -> None:
    """Raise InputError for a number of channels that no image has."""
    if type(channels) is not int or not 1 <= channels <= MOST_CHANNELS:
        raise InputError(f"{printable(channels)} channels; give a whole number from 1 to {MOST_CHANNELS}")


def timm_config(arch: str):
    """timm's `PretrainedCfg` of a model. Raises InputError if timm lacks the name or the images are not square."""
    name = arch.removeprefix(TIMM)
    timm = optional_package("timm", arch)
    if not timm.is_model(name):
        hint = did_you_mean(arch.split(".")[0], [f"{TIMM}{known}" for known in timm.list_models()])
        raise InputError(f"timm has no model {name!r}: {hint or 'timm.list_models() has their names'}")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag
        raise InputError(f"{arch}: {error}") from None
    _, height, width = config.input_size
    if height != width:
        raise InputError(f"{arch} takes images of {height} x {width} pixels; those of this toolkit are square")
    return config


NO_CHECKPOINT = "none"
NO_ARCH = "random weights have no architecture of their own"

_MOCO = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints"
_MOCO_V3 = "https://dl.fbaipublicfiles.com/moco-v3"
_LANDSAT = "https://hf.co/torchgeo/ssl4eo_landsat/resolve/1c88bb51b6e17a21dde5230738fa38b74bd74f76"


def _geo(name: str, commit: str, digest: str) -> tuple[str, str]:
    return f"https://hf.co/torchgeo/{name}/resolve/{commit}/{name}-{digest}.pth", digest


# The address, and how the file's MD5 (MoCo's) or SHA-256 begins; "" where the publisher does not say.
PUBLISHED = {
    "moco-v1-200ep": (f"{_MOCO}/moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar", "b251726a"),
    "moco-v2-200ep": (f"{_MOCO}/moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar", "59fd9945"),
    "moco-v2-800ep": (f"{_MOCO}/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar", "a04e12f8"),
    "moco-v3-resnet50": (f"{_MOCO_V3}/r-50-1000ep/r-50-1000ep.pth.tar", ""),
    "moco-v3-vit-small": (f"{_MOCO_V3}/vit-s-300ep/vit-s-300ep.pth.tar", ""),
    "moco-v3-vit-base": (f"{_MOCO_V3}/vit-b-300ep/vit-b-300ep.pth.tar", ""),
    "sentinel1-resnet50": _geo("resnet50_sentinel1_all_moco", "e79862c667853c10a709bdd77ea8ffbad0e0f1cf", "906e4356"),
    "sentinel2-resnet18": _geo("resnet18_sentinel2_all_moco", "5b8cddc9a14f3844350b7f40b85bcd32aed75918", "59bfdff9"),
    "sentinel2-resnet50": _geo("resnet50_sentinel2_all_moco", "da4f3c9dbe09272eb902f3b37f46635fa4726879", "df8b932e"),
    "sentinel2-vit-small": _geo(
        "vit_small_patch16_224_sentinel2_all_moco", "1cb683f6c14739634cdfaaceb076529adf898c74", "67c9032d"
    ),
    "landsat-tm-toa-resnet18": (f"{_LANDSAT}/resnet18_landsat_tm_toa_moco-1c691b4f.pth", "1c691b4f"),
    "landsat-tm-toa-resnet50": (f"{_LANDSAT}/resnet50_landsat_tm_toa_moco-ba1ce753.pth", "ba1ce753"),
    "landsat-etm-toa-resnet18": (f"{_LANDSAT}/resnet18_landsat_etm_toa_moco-bb88689c.pth", "bb88689c"),
    "landsat-etm-toa-resnet50": (f"{_LANDSAT}/resnet50_landsat_etm_toa_moco-e9a84d5a.pth", "e9a84d5a"),
    "landsat-etm-sr-resnet18": (f"{_LANDSAT}/resnet18_landsat_etm_sr_moco-4f078acd.pth", "4f078acd"),
    "landsat-etm-sr-resnet50": (f"{_LANDSAT}/resnet50_landsat_etm_sr_moco-1266cde3.pth", "1266cde3"),
    "landsat-oli-tirs-toa-resnet18": (f"{_LANDSAT}/resnet18_landsat_oli_tirs_toa_moco-a3002f51.pth", "a3002f51"),
    "landsat-oli-tirs-toa-resnet50": (f"{_LANDSAT}/resnet50_landsat_oli_tirs_toa_moco-de7f5e0f.pth", "de7f5e0f"),
    "landsat-oli-sr-resnet18": (f"{_LANDSAT}/resnet18_landsat_oli_sr_moco-660e82ed.pth", "660e82ed"),
    "landsat-oli-sr-resnet50": (f"{_LANDSAT}/resnet50_landsat_oli_sr_moco-ff580dad.pth", "ff580dad"),
}


def is_published(text: str) -> bool:
    """Is this the name of a published checkpoint: one of PUBLISHED, or `hf:owner/name/file` of the Hugging Face Hub?"""
    return text in PUBLISHED or text.startswith("hf:")


def fetch(name: str) -> Path:
    """The file of a published checkpoint, which is downloaded unless it was before.

    Raises InputError if it cannot be reached or is damaged, or for a file of the Hub without huggingface_hub.
    """
    if name.startswith("hf:"):
        return _from_hub(*name.removeprefix("hf:").split("/", 2))
    import torch

    url, digest = PUBLISHED[name]
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):  # of several processes one downloads, and the others wait
                if not path.exists():
                    _download(url, digest, path)
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            raise InputError(f"cannot download {url} ({error}): fetch it elsewhere and give its path") from None
    return path


def _download(url: str, digest: str, path: Path) -> None:
    import torch  # here: it takes seconds, and the names above are looked up in every command line

    part = path.with_name(f"{path.name}.part")
    print(f"downloading {url} to {path}; see the licence on the publisher's page (MoCo's own: CC-BY-NC 4.0)")
    torch.hub.download_url_to_file(url, str(part))
    with urlopen(Request(url, method="HEAD")) as answer:
        length = answer.headers["Content-Length"]  # None where the server does not say
    content = part.read_bytes()
    begins = any(hashlib.new(kind, content).hexdigest().startswith(digest) for kind in ("md5", "sha256"))
    if not begins or length not in (None, str(len(content))):
        part.unlink()
        raise InputError(f"{url} did not arrive as it is published ({digest or length}): try again later")
    part.replace(path)


def _from_hub(owner: str = "", repository: str = "", file: str = "") -> Path:
    if not file:
        raise InputError("hf: is to be followed by owner/name/file, the file's place on the Hugging Face Hub")
    hub = optional_package("huggingface_hub", f"hf:{owner}/{repository}")
    try:
        return Path(hub.hf_hub_download(f"{owner}/{repository}", file))
    except (OSError, ValueError) as error:
        raise InputError(f"hf:{owner}/{repository}/{file} cannot be downloaded: {str(error).splitlines()[0]}") from None


def checkpoint_path(text: str) -> Path:
    """The file that `--checkpoint` names: 'shipped', a published one, which is fetched, or a path.

    Raises ArgumentTypeError, as a converter of argparse, for a file that cannot be fetched.
    """
    if is_published(text):
        try:
            return fetch(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return SHIPPED if text == "shipped" else Path(text)


def is_none(path: str | os.PathLike) -> bool:
    """Is this 'none', which stands for random weights instead of a checkpoint?"""
    return str(path) == NO_CHECKPOINT


def model_problems(path: str | os.PathLike, arch: str | None, heads: int | None) -> list[str]:
    """What is wrong with `--checkpoint`, `--arch` and `--heads`, as far as it shows without reading files."""
    problems = []
    if is_none(path) and arch is None:
        problems.append(f"--checkpoint none: {NO_ARCH}; say which with --arch")
    if not is_none(path) and not os.path.exists(path):
        problem = f"--checkpoint {path}: file not found; give the path of an existing checkpoint"
        problems.append("; ".join(filter(None, [problem, did_you_mean(str(path), PUBLISHED)])))
    if arch is not None:
        try:
            default_image_size(arch)
            check_heads(arch, heads)
        except InputError as error:
            problems.append(f"--arch {arch}: {error}")
    return problems
