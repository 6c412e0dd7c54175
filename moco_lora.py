"""The commands that `pip install -e .` makes, and what each script looks at first: does Python find its packages?

moco-lora-finetune --data-dir my_images --checkpoint moco-v2-800ep    # python finetune_lora.py, from any folder
moco-lora-deploy predict checkpoints/lora/lora.pth new_images --output predictions.csv
moco-lora-pretrain --config configs/stage1.yaml
"""

import importlib.util
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = {"finetune": "finetune_lora", "deploy": "deploy_lora", "pretrain": "moco.pretrain"}


def start() -> None:
    """Run the script of the installed command that was typed."""
    runpy.run_module(SCRIPTS[Path(sys.argv[0]).stem.removeprefix("moco-lora-")], run_name="__main__")


for name in ("toolkit", "lora", "moco"):
    spec = importlib.util.find_spec(name)
    found = list(spec.submodule_search_locations or [spec.origin])
    if HERE / name not in (Path(place).resolve() for place in found):
        remedy = "rename it, or work in another folder"
        raise ImportError(f"{found[0]} is in the way of {HERE / name}, which the toolkit imports: {remedy}")
