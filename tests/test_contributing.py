"""What CONTRIBUTING says of where something new belongs: it is put there, and nowhere else, and works.

A layer, a loss and DoRA are in docs/python.md, which test_readme.py runs, a layout in each row of test_checkpoints.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import dense
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torchvision import transforms

import deploy_lora
from finetune_lora import ADAPTED, load_finetuned
from lora_utils import read_adapter_file
from tests.pages import DOCS, blocks
from tests.run_folders import assert_same, metrics, names_in, rows_of, tensors
from toolkit.files import read_checkpoint


@pytest.mark.parametrize("options", ["", "--use-qlora"])
def test_another_method_trains_and_its_file_answers_alike_merged_or_not(options, finetune, images):
    """DoRA, as in docs/python.md."""
    [block] = [block for block in blocks("python", (DOCS / "python.md").read_text()) if "DoRALinear" in block]
    with mock.patch.dict(ADAPTED):
        exec(block, {})
        kind = ADAPTED[nn.Linear][bool(options)]
        results = finetune(f"--epochs 1 --target-modules mlp {options}")
        path = results["folder"] / "lora.pth"
        model, _ = load_finetuned(path)
        merged = deploy_lora.main(["evaluate", str(path), str(images)])
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is kind}
    assert len(layers) == 4
    found = tensors(path)
    for name, layer in layers.items():
        W = layer.base().dense(torch.float32)
        V = W + layer.scaling * found[f"{name}.lora_B"] @ found[f"{name}.lora_A"]
        m = found[f"{name}.lora_magnitude"]
        assert not torch.allclose(m, W.norm(dim=1), rtol=1e-6)  # it has trained
        x = torch.randn(3, layer.in_features)
        dense.assert_close(layer(x), x @ (m * V.T / V.norm(dim=1)) + layer.bias, dense.FP32)
    assert merged["loss"] == pytest.approx(results["val_loss"], abs=1e-4)


# ------------------------------------------------------------------------------------------- in a copy of the toolkit

ROOT = Path(__file__).resolve().parents[1]
A_TASK = ROOT / "tests/files/changes/task.diff"
OF_A_RUN = sorted({*A_TASK.parent.iterdir()} - {A_TASK})
BEFORE_A_RUN = """
import sys
import deploy_lora, finetune_lora
from tests.checkpoint_files import shorten_vit_mini
from tests.run_folders import SHORTER
shorten_vit_mini()
for module, name, value in SHORTER:
    setattr(module, name, value)
"""


def change(place: Path, diff: Path) -> None:
    """Make the change of a unified diff, as `git apply` does, but wherever the lines of a hunk stand."""
    for part in diff.read_text().split("--- ")[1:]:
        names, *hunks = re.split(r"^@@.*\n", part, flags=re.MULTILINE)
        path = place / names.split("+++ b/")[1].strip()
        text = path.read_text() if path.exists() else ""
        for hunk in hunks:
            before = "".join(re.findall(r"^[ -](.*\n)", hunk, re.MULTILINE))
            after = "".join(re.findall(r"^[ +](.*\n)", hunk, re.MULTILINE))
            assert text.count(before) == 1, f"{diff.name} does not fit {path.name}:\n{hunk}"
            text = text.replace(before, after)
        path.write_text(text)


def run_in_copy(place: Path, changes: Iterable[Path], script: str, *argv: Path) -> str:
    """What a script prints in a copy of the toolkit with these changes."""
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".*", "benchmarks", "checkpoints"))
    for diff in changes:
        change(place, diff)
        assert f"changes/{diff.name})" in (ROOT / "CONTRIBUTING.md").read_text()
    command = [sys.executable, "-c", BEFORE_A_RUN + script, *argv]
    environment = os.environ | {"XDG_CACHE_HOME": str(place)}  # where commands note what they write
    return subprocess.run(command, cwd=place, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


SCRIPT = """
import runpy
import numpy, toolkit, torch
from lora_utils import read_adapter_file
from toolkit.images import masks
base, images, out = sys.argv[1:]
options = f"--checkpoint {base} --data-dir {images} --output-dir {out} --device cpu --enough 100 --batch-size 8"
options += " --epochs 3 --augmentation square --workers 0 --warmup-epochs 0 --lr 1e-3"

def look(run):
    print("augmentation:", run.loaders.augmentation.steps)
    saved = read_adapter_file(run.path("lora.pth"))["tensors"]
    print("saved:", all(torch.equal(saved[name], run.kept.average[name]) for name in saved if "lora_B" in name))


first = finetune_lora.main(options.split(), look)
again = finetune_lora.main([*options.split(), "--resume"])
print("resumed:", first["val_loss"] == again["val_loss"])
finetune_lora.main(options.split())
deploy_lora.main(["count", f"{out}/lora.pth", "--more", "4", "--output", f"{out}/count.txt"])
numpy.savez("mask.npz", mask=[[0, 1]])
print("mask:", masks.MaskReader(None)("mask.npz").tolist())
print(runpy.run_path("docs/write_options.py")["page"]())
try:
    finetune_lora.main([*options.split(), "--keep-best", "f1"])
except toolkit.InputError as error:
    print(error)
"""


def test_each_takes_the_lines_that_are_named(base, images, tmp_path):
    """A run with another option, a rule to stop by it, an average that is kept, another optimizer, schedule and
    augmentation, a report, a setting of adapters and a family of checkpoints; then a command and a format of masks."""
    out = tmp_path / "out"
    printed = run_in_copy(tmp_path / "copy", OF_A_RUN, SCRIPT, base, images, out)
    assert (
        "--keep-best with --enough: the last is kept; drop one" in printed and "| `--enough` |  | the loss" in printed
    )
    assert "mask: [[0, 1]]" in printed
    assert yaml.safe_load((out / "config.yaml").read_text())["finetune"]["enough"] == 100
    assert (
        "augmentation: Compose(\n    ToTensor()" in printed and "saved: True" in printed and "resumed: True" in printed
    )
    results = json.loads((out / "results.json").read_text())
    [epoch] = metrics(out)
    assert results["epochs"] == 1 and epoch["learning_rate"] == 0.5 * results["head_learning_rate"]
    assert (tmp_path / "out-1/loss.txt").exists()  # went with the earlier run
    assert float((out / "loss.txt").read_text()) == results["val_loss"]
    assert (out / "count.txt").read_text() == "7"

    content = read_checkpoint(out / "lora.pth")
    assert {record["lora_extra"] for record in content["layers"].values()} == {3.0}
    assert content["metadata"]["mean"] == [0.25] * 3
    state = read_checkpoint(out / "last.pth")
    assert "momentum" in state["optimizer"]["param_groups"][0]
    average = {name: tensor for name, tensor in state["kept"]["average"].items() if "lora_B" in name}
    assert_same(average, content["tensors"])
    assert not any(torch.equal(tensor, state["model"][name]) for name, tensor in average.items())


# ---------------------------------------------------------------------------------------------------------- a task

RUN_TASK = """
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


def test_every_command_is_of_the_new_task_and_predicts_what_the_exported_graph_does(base, images, tmp_path):
    """By a copy of the toolkit that has a fifth task."""
    out = tmp_path / "out"
    printed = run_in_copy(tmp_path / "copy", [A_TASK], RUN_TASK, base, images, out)
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
