"""`pip install -e .`: code in another folder imports the scripts and the packages."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ELSEWHERE = """
import pkgutil, site, sys
site.addsitedir(sys.argv[1])
import deploy_lora, example_lora_usage, finetune_lora, lora, lora_utils, moco, toolkit
for package in (lora, moco, toolkit):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        __import__(module.name)
from toolkit.models.checkpoints import load_backbone
model, report = load_backbone(finetune_lora.DEFAULT_CHECKPOINT, num_classes=2)
print(finetune_lora.DEFAULT_CHECKPOINT, report["arch"])
"""


def test_every_package_is_named():
    """What lies in a package that is not named would be missing in an installation."""
    tomllib = pytest.importorskip("tomllib")
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = [
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("lora", "moco", "toolkit")
        for path in (ROOT / top).rglob("__init__.py")
    ]
    assert sorted(named["packages"]) == sorted(packages)
    assert sorted(named["py-modules"]) == sorted(path.stem for path in ROOT.glob("*.py"))


@pytest.mark.slow
def test_code_in_another_folder_imports_everything(tmp_path):
    pytest.importorskip("setuptools", minversion="70.1")  # earlier ones build nothing without the package wheel
    checkout = tmp_path / "checkout"  # of its own: setuptools leaves its notes in the source folder
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "benchmarks", "tests", "*.ipynb"))
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*install, "--target", packages, "-e", checkout], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, packages], cwd=elsewhere, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(checkout / "checkpoints/moco_stage1/moco_stage1_epoch_100.pth"), "vit_mini"]
