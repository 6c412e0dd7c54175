"""A new task by the places that CONTRIBUTING names, and by no others, goes through every command."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torchvision import transforms

from lora_utils import read_adapter_file
from tests.run_folders import rows_of
from tests.test_layout import ROOT

RUN = """
import sys
import deploy_lora, finetune_lora
from tests.checkpoint_files import shorten_vit_mini
from tests.run_folders import SHORTER
shorten_vit_mini()
for module, name, value in SHORTER:
    setattr(module, name, value)
base, images, out = sys.argv[1:]
options = f"--task ordinal --checkpoint {base} --data-dir {images} --output-dir {out} --device cpu --epochs 1"
finetune_lora.main([*options.split(), "--batch-size=8", "--augmentation=none", "--workers=0", "--keep-best=right"])
adapter = f"{out}/lora.pth"
deploy_lora.main(["evaluate", adapter, images, "--output", f"{out}/again.json"])
deploy_lora.main(["predict", adapter, images, "--output", f"{out}/answers.csv"])
for command, file in {"merge": "merged.pth", "export": "model.pt2", "card": "card.md"}.items():
    deploy_lora.main([command, adapter, "--output", f"{out}/{file}"])
"""


def test_every_command_is_of_the_new_task_and_predicts_what_the_exported_graph_does(base, images, tmp_path):
    """By a copy of the toolkit that has a fifth task."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "benchmarks", "checkpoints", "docs"))
    shutil.copy(ROOT / "tests/ordinal.py", copy / "toolkit/answers")
    tasks = copy / "toolkit/answers/tasks.py"
    text = tasks.read_text().replace("Regression, Segmentation)", "Regression, Segmentation, Ordinal)")
    tasks.write_text(text.replace("\nTASKS", "\nfrom toolkit.answers.ordinal import Ordinal\nTASKS"))
    with open(copy / "toolkit/choices.py", "a") as file:
        file.write('TRUTHS["ordinal"] = "class"\nKEEP_BEST["ordinal"] = {"right": "val_accuracy"}\n')
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", RUN, base, images, out], cwd=copy, check=True)

    results = json.loads((out / "results.json").read_text())
    again = json.loads((out / "again.json").read_text())
    assert results["task"] == again["task"] == "ordinal"
    assert results["val_accuracy"] == again["accuracy"]
    assert results["chosen_by"] == {"epoch": "the evaluation images"}
    metadata = read_adapter_file(out / "lora.pth")["metadata"]
    assert metadata["task"] == {"kind": "ordinal", "ranks": [0.0, 2.0, 4.0]}
    assert json.loads((out / "merged.json").read_text())["activation"] == "softmax"
    assert len(torch.load(out / "merged.pth")["heads.head.bias"]) == 3
    card = (out / "card.md").read_text()
    assert "pipeline_tag: tabular-classification" in card and "ordinal of images" in card

    usage = json.loads((out / "model.json").read_text())
    graph = torch.export.load(out / "model.pt2").module()
    assert usage["activation"] == "none"  # the graph ends with the head's own
    scaling = transforms.Normalize(usage["mean"], usage["std"])
    for row in rows_of(out / "answers.csv"):
        [shares] = graph(scaling(transforms.functional.to_tensor(Image.open(row["path"])))[None])
        assert row["class"] == usage["class_names"][shares.argmax()]
        assert float(row["rank"]) == pytest.approx((shares @ torch.tensor([0.0, 2.0, 4.0])).item(), abs=1e-3)
