"""Backbones that are published, by name: `--checkpoint moco-v2-800ep` downloads one, once, into torch.hub's folder."""

import hashlib
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock
from tqdm import tqdm

from toolkit import InputError, optional_package

TIME_OUT = 60.0  # seconds in which nothing arrives
LARGEST = 2**32  # bytes; a server may never end

_MOCO = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints"
_MOCO_V3 = "https://dl.fbaipublicfiles.com/moco-v3"
_LANDSAT = "https://hf.co/torchgeo/ssl4eo_landsat/resolve/1c88bb51b6e17a21dde5230738fa38b74bd74f76"


def _geo(arch: str, satellite: int, commit: str, digest: str) -> tuple[str, str]:
    name = f"{arch}_sentinel{satellite}_all_moco"
    return f"https://hf.co/torchgeo/{name}/resolve/{commit}/{name}-{digest}.pth", digest


# The address, and how the file's MD5 (MoCo's) or SHA-256 begins; "" where the publisher does not say.
PUBLISHED = {
    "moco-v1-200ep": (f"{_MOCO}/moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar", "b251726a"),
    "moco-v2-200ep": (f"{_MOCO}/moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar", "59fd9945"),
    "moco-v2-800ep": (f"{_MOCO}/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar", "a04e12f8"),
    "moco-v3-resnet50": (f"{_MOCO_V3}/r-50-1000ep/r-50-1000ep.pth.tar", ""),
    "moco-v3-vit-small": (f"{_MOCO_V3}/vit-s-300ep/vit-s-300ep.pth.tar", ""),
    "moco-v3-vit-base": (f"{_MOCO_V3}/vit-b-300ep/vit-b-300ep.pth.tar", ""),
    "sentinel1-resnet50": _geo("resnet50", 1, "e79862c667853c10a709bdd77ea8ffbad0e0f1cf", "906e4356"),
    "sentinel2-resnet18": _geo("resnet18", 2, "5b8cddc9a14f3844350b7f40b85bcd32aed75918", "59bfdff9"),
    "sentinel2-resnet50": _geo("resnet50", 2, "da4f3c9dbe09272eb902f3b37f46635fa4726879", "df8b932e"),
    "sentinel2-vit-small": _geo("vit_small_patch16_224", 2, "1cb683f6c14739634cdfaaceb076529adf898c74", "67c9032d"),
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


def described(checkpoint: str | Path, licence: str | None = None) -> dict[str, str | None]:
    """The name of a checkpoint, without its folder, its address if it is published, and its licence, else timm's."""
    name = Path(str(checkpoint)).name
    for known, (url, _) in PUBLISHED.items():
        if Path(url).name == name:
            if url.startswith((_MOCO, _MOCO_V3)):
                licence = "cc-by-nc-4.0"  # of the files of MoCo's authors, as the Hub writes it
            return {"name": known, "source": url, "licence": licence}
    return {"name": name, "source": None, "licence": licence}


NAMES: dict[Path, str] = {}  # of what was fetched, by its place on this machine: another one fetches it by its name


def fetched(checkpoint: Path | None) -> Path | None:
    """The path of a checkpoint, which is downloaded, once, if it is the name of a published one. Raises InputError."""
    if checkpoint is None or not is_published(checkpoint.as_posix()):
        return checkpoint
    name = checkpoint.as_posix()
    if name.startswith("hf:"):
        path = _from_hub(*name.removeprefix("hf:").split("/", 2))
    else:
        path = _from_publisher(*PUBLISHED[name])
    NAMES[path] = name
    return path


def _from_publisher(url: str, digest: str) -> Path:
    import torch  # here: it takes seconds, and the names above are looked up in every command line

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
    part = path.with_name(f"{path.name}.part")
    licence = " (CC-BY-NC 4.0)" if url.startswith((_MOCO, _MOCO_V3)) else ""
    print(f"downloading {url} to {path}; see the licence on the publisher's page{licence}")
    request = Request(url, headers={"User-Agent": "torch.hub"})
    with urlopen(request, timeout=TIME_OUT) as answer, open(part, "wb") as file:
        length = int(answer.headers["Content-Length"] or 0)  # 0 where the server does not say
        with tqdm(total=length or None, unit="B", unit_scale=True) as bar:
            while file.tell() < LARGEST and (block := answer.read1(2**17)):
                file.write(block)
                bar.update(len(block))
    content = part.read_bytes()
    begins = any(hashlib.new(kind, content).hexdigest().startswith(digest) for kind in ("md5", "sha256"))
    if not begins or length not in (0, len(content)):
        part.unlink()
        raise InputError(f"{url} did not arrive as it is published ({digest or length}): try again later")
    part.replace(path)


def _from_hub(owner: str = "", repository: str = "", file: str = "") -> Path:
    if not file:
        raise InputError("hf: is to be followed by owner/name/file, the file's place on the Hugging Face Hub")
    hub = optional_package("huggingface_hub", f"hf:{owner}/{repository}")
    try:
        return Path(hub.hf_hub_download(f"{owner}/{repository}", file))
    except Exception as error:  # of a library for HTTP, which is another in each of its releases
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"hf:{owner}/{repository}/{file} cannot be downloaded: {why}") from None
