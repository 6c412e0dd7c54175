"""The commands that `pip install -e .` makes, and what each script looks at first: does Python find its packages?

moco-lora-finetune --data-dir my_images --checkpoint moco-v2-800ep    # python finetune_lora.py, from any folder
moco-lora-deploy predict checkpoints/lora/lora.pth new_images --output predictions.csv
moco-lora-pretrain --config configs/stage1.yaml
"""

import importlib.util
import runpy
from pathlib import Path

HERE = Path(__file__).resolve().parent


def check_packages() -> None:
    """Raise ImportError where Python finds another folder under the name of a package of the toolkit."""
    for name in ("toolkit", "lora", "moco"):
        spec = importlib.util.find_spec(name)
        found = list(spec.submodule_search_locations or [spec.origin]) if spec else ["no such folder"]
        if HERE / name not in (Path(place).resolve() for place in found):
            remedy = "rename it, or work in another folder"
            raise ImportError(f"{found[0]} is in the way of {HERE / name}, which the toolkit imports: {remedy}")


def finetune() -> None:
    """The command `moco-lora-finetune`."""
    runpy.run_module("finetune_lora", run_name="__main__")


def deploy() -> None:
    """The command `moco-lora-deploy`."""
    runpy.run_module("deploy_lora", run_name="__main__")


def pretrain() -> None:
    """The command `moco-lora-pretrain`."""
    runpy.run_module("moco.pretrain", run_name="__main__")


check_packages()
