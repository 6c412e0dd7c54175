"""A new task by the places that CONTRIBUTING names, and by no others, goes through every command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from lora_utils import read_adapter_file
from tests.run_folders import ROOT, names_in, rows_of, run_in_copy

RUN = """
from toolkit import InputError
base, images, out = sys.argv[1:]
options = f"--task ordinal --checkpoint {base} --data-dir {images} --output-dir {out} --device cpu --epochs 1"
finetune_lora.main([*options.split(), "--batch-size=8", "--augmentation=none", "--workers=0", "--keep-best=right"])
adapter = f"{out}/lora.pth"
deploy_lora.main(["info", adapter])
deploy_lora.main(["evaluate", adapter, images, "--output", f"{out}/again.json"])
deploy_lora.main(["compare", f"{out}/results.json", f"{out}/again.json"])
deploy_lora.main(["predict", adapter, images, "--output", f"{out}/answers.csv"])
for command, name in {"embed": "features.npy", "explain": "explained"}.items():
    deploy_lora.main([command, adapter, f"{images}/val/dark", "--output", f"{out}/{name}"])
for command, name in {"merge": "merged.pth", "export": "model.pt2", "card": "card.md"}.items():
    deploy_lora.main([command, adapter, "--output", f"{out}/{name}"])
deploy_lora.main(["convert", adapter, "--rank", "2", "--output", f"{out}/lower.pth"])
deploy_lora.main(["demo", adapter, "--write", f"{out}/space"])
for command, name in {"threshold": "other.pth", "choose": "next"}.items():
    try:
        deploy_lora.main([command, adapter, images, "--output", f"{out}/{name}"])
    except InputError as error:
        print(error)
"""
ADDED = {
    "toolkit/choices.py": 'TRUTHS["ordinal"] = "class"\nKEEP_BEST["ordinal"] = {"right": "val_accuracy"}\n',
    "toolkit/answers/ordinal.py": (ROOT / "tests/ordinal.py").read_text(),
}
CHANGED = [
    ("toolkit/answers/tasks.py", "Regression, Segmentation)", "Regression, Segmentation, Ordinal)"),
    ("toolkit/answers/tasks.py", "\nTASKS", "\nfrom toolkit.answers.ordinal import Ordinal\nTASKS"),
]


def test_every_command_is_of_the_new_task_and_predicts_what_the_exported_graph_does(base, images, tmp_path):
    """By a copy of the toolkit that has a fifth task."""
    out = tmp_path / "out"
    printed = run_in_copy(tmp_path / "copy", ADDED, CHANGED, RUN, base, images, out)
    assert "\n  task: {'kind': 'ordinal', 'ranks': [0.0, 2.0, 4.0]}\n" in printed  # by info
    assert "100.00%, 100.00%: +0.00% (no interval), p = 1\n" in printed  # by compare
    for refused in ("has no thresholds", "does not answer with one class for each image: choose by its checkpoint"):
        assert f"{out}/lora.pth {refused}" in printed and not names_in(out) & {"other.pth", "next"}
    results = json.loads((out / "results.json").read_text())
    again = json.loads((out / "again.json").read_text())
    assert results["task"] == again["task"] == "ordinal"
    assert results["val_accuracy"] == again["accuracy"]
    assert results["chosen_by"] == {"epoch": "the evaluation images"}
    metadata = read_adapter_file(out / "lora.pth")["metadata"]
    assert metadata["task"] == {"kind": "ordinal", "ranks": [0.0, 2.0, 4.0]}
    assert json.loads((out / "merged.json").read_text())["activation"] == "softmax"
    assert len(torch.load(out / "merged.pth")["heads.head.bias"]) == 3
    assert np.load(out / "features.npy").shape == (5, 192)
    assert names_in(out / "explained") >= {f"{number}.png" for number in range(5)}
    lower = read_adapter_file(out / "lower.pth")
    assert lower["metadata"]["task"] == metadata["task"]
    assert {record["r"] for record in lower["layers"].values()} == {2}
    assert "Ordinal" in (out / "space/toolkit/answers/ordinal.py").read_text()
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
