"""A new task by the places that CONTRIBUTING names, and by no others, goes through every command."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torchvision import transforms

import deploy_lora
from lora_utils import read_adapter_file
from tests.run_folders import rows_of
from tests.test_layout import ROOT
from toolkit import InputError

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


@pytest.fixture(scope="module")
def ordinal(base, images, tmp_path_factory):
    """The folder of a run and of what every command made of it, by a copy of the toolkit that has a fifth task."""
    copy = tmp_path_factory.mktemp("ordinal") / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "benchmarks", "checkpoints", "docs"))
    shutil.copy(ROOT / "tests/ordinal.py", copy / "toolkit/answers")
    tasks = copy / "toolkit/answers/tasks.py"
    text = tasks.read_text().replace("Regression, Segmentation)", "Regression, Segmentation, Ordinal)")
    tasks.write_text(text.replace("\nTASKS", "\nfrom toolkit.answers.ordinal import Ordinal\nTASKS"))
    with open(copy / "toolkit/choices.py", "a") as file:
        file.write('TRUTHS["ordinal"] = "class"\nKEEP_BEST["ordinal"] = {"right": "val_accuracy"}\n')
    out = copy.with_name("out")
    subprocess.run([sys.executable, "-c", RUN, base, images, out], cwd=copy, check=True)
    return out


def test_every_command_is_of_the_new_task_and_predicts_what_the_exported_graph_does(ordinal):
    results = json.loads((ordinal / "results.json").read_text())
    again = json.loads((ordinal / "again.json").read_text())
    assert results["task"] == again["task"] == "ordinal"
    assert results["val_accuracy"] == again["accuracy"]
    assert results["chosen_by"] == {"epoch": "the evaluation images"}
    metadata = read_adapter_file(ordinal / "lora.pth")["metadata"]
    assert metadata["task"] == {"kind": "ordinal", "ranks": [0.0, 2.0, 4.0]}
    assert json.loads((ordinal / "merged.json").read_text())["activation"] == "softmax"
    assert len(torch.load(ordinal / "merged.pth")["heads.head.bias"]) == 3
    card = (ordinal / "card.md").read_text()
    assert "pipeline_tag: tabular-classification" in card and "ordinal of images" in card

    usage = json.loads((ordinal / "model.json").read_text())
    graph = torch.export.load(ordinal / "model.pt2").module()
    assert usage["activation"] == "none"  # the graph ends with the head's own
    scaling = transforms.Normalize(usage["mean"], usage["std"])
    for row in rows_of(ordinal / "answers.csv"):
        [shares] = graph(scaling(transforms.functional.to_tensor(Image.open(row["path"])))[None])
        assert row["class"] == usage["class_names"][shares.argmax()]
        assert float(row["rank"]) == pytest.approx((shares @ torch.tensor([0.0, 2.0, 4.0])).item(), abs=1e-3)


@pytest.mark.parametrize("command", ["evaluate {}", "merge --output {}/merged.pth", "card --output {}/card.md"])
def test_a_toolkit_without_the_task_refuses_its_files(ordinal, tmp_path, command):
    adapter = shutil.copy(ordinal / "lora.pth", tmp_path)
    name, *options = command.format(tmp_path).split()
    with pytest.raises(InputError, match="of another version"):
        deploy_lora.main([name, adapter, *options])
    assert len(list(tmp_path.iterdir())) == 1
