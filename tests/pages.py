"""What the pages in docs/ have in their blocks, for tests that run them, and a checkpoint for their commands."""

import re
from pathlib import Path
from types import ModuleType

import torch

from tests.checkpoint_files import under, without_head
from toolkit.models.backbones import build_backbone

DOCS = Path(__file__).resolve().parent.parent / "docs"
OFFICIAL = "moco_v2_800ep_pretrain.pth.tar"


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str, language: str = "bash") -> list[str]:
    """Each command of the shell blocks on a line of its own; comments are left out."""
    found = []
    for line in re.sub(r"\\\n *", "", "".join(blocks(language, text))).splitlines():
        if not line.startswith("#"):
            found += [part.strip() for part in line.split("&&") if part.strip()]
    return found


def preparation() -> ModuleType:
    """The prepare.py of docs/deploy.md."""
    [code] = [block for block in blocks("python", (DOCS / "deploy.md").read_text()) if block.startswith("# prepare.py")]
    module = ModuleType("prepare")
    exec(code, vars(module))
    return module


def save_moco_v2(hub: Path, arch: str = "resnet18") -> Path:
    """A random backbone in the layout of the official file, under its name, as if downloaded to this TORCH_HOME."""
    backbone = without_head(build_backbone(arch, 10).state_dict())
    keys = under("module.encoder_q.", backbone)
    width = backbone["layer4.1.bn2.weight"].numel()
    for layer, rows in ((0, width), (2, 128)):
        keys[f"module.encoder_q.fc.{layer}.weight"] = torch.zeros(rows, width)
        keys[f"module.encoder_q.fc.{layer}.bias"] = torch.zeros(rows)
    path = hub / "hub/checkpoints" / OFFICIAL
    path.parent.mkdir(parents=True)
    torch.save({"epoch": 800, "arch": arch, "state_dict": keys}, path)
    return path
