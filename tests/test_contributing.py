"""What CONTRIBUTING says of where something new belongs: it is put there, and nowhere else, and works.

A layer and a loss are in docs/python.md, which tests/test_readme.py runs, a layout in each row of test_checkpoints.py.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import dense
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.models.googlenet import BasicConv2d

import deploy_lora
from finetune_lora import ADAPTED, LoRALinear, load_finetuned
from lora import fusion
from lora.nf4 import dense_weight
from lora_utils import LoRAManager, read_adapter_file
from tests.run_folders import assert_same, metrics, names_in, rows_of, tensors
from toolkit.files import read_checkpoint
from toolkit.images import masks
from toolkit.models.norms import Extended

# ------------------------------------------------------------------------------------------------ another PEFT method


class DoRALinear(LoRALinear):
    """``m (W + s B A) / ||W + s B A||``, by rows, with m = ||W|| at the start (DoRA, arXiv 2402.09353, equation 5)."""

    def _create_adapters(self):
        super()._create_adapters()
        self.lora_magnitude = nn.Parameter(dense_weight(self.base(), torch.float32).norm(dim=1))

    def effective_weight(self):
        V = super().effective_weight()
        return self.lora_magnitude[:, None] * F.normalize(V, dim=1)

    def forward(self, x, prologue=None):
        if not self._is_active:
            return super().forward(x, prologue)
        return F.linear(x if prologue is None else prologue(x), self.effective_weight(), self.bias)


class QLoRAWithMagnitude(DoRALinear):
    in_4_bits = True


@pytest.mark.parametrize("options", ["", "--use-qlora"])
def test_another_method_trains_and_its_file_answers_alike_merged_or_not(options, finetune, images, monkeypatch):
    monkeypatch.setitem(ADAPTED, nn.Linear, (DoRALinear, QLoRAWithMagnitude))
    results = finetune(f"--epochs 1 --target-modules mlp {options}")
    path = results["folder"] / "lora.pth"
    model, _ = load_finetuned(path)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, DoRALinear)}
    assert layers and {type(layer) for layer in layers.values()} == {QLoRAWithMagnitude if options else DoRALinear}
    found = tensors(path)
    for name, layer in layers.items():
        W = dense_weight(layer.base(), torch.float32)
        V = W + layer.scaling * found[f"{name}.lora_B"] @ found[f"{name}.lora_A"]
        m = found[f"{name}.lora_magnitude"]
        assert not torch.allclose(m, W.norm(dim=1), rtol=1e-6)  # it has trained
        x = torch.randn(3, layer.in_features)
        dense.assert_close(layer(x), x @ (m * V.T / V.norm(dim=1)) + layer.bias, dense.FP32)
    merged = deploy_lora.main(["evaluate", str(path), str(images)])
    assert merged["loss"] == pytest.approx(results["val_loss"], abs=1e-4)


# --------------------------------------------------------------------------------- a table, or a function, of another


class FusedBasicConv2d(Extended):
    """A block of GoogLeNet, of which the toolkit knows nothing: a convolution, a BatchNorm and a ReLU."""

    def forward(self, x):
        return fusion.conv_bn_relu(self.conv, self.bn, nn.ReLU(), x)


@pytest.mark.filterwarnings("ignore:the last layer")
def test_a_block_is_fused_as_long_as_it_has_adapters(monkeypatch):
    monkeypatch.setitem(fusion.FUSED, BasicConv2d, FusedBasicConv2d)
    stock = dense.seen(nn.Sequential(BasicConv2d(3, 4, kernel_size=3), nn.Flatten(), nn.Linear(4 * 36, 2)).eval())
    model = dense.frozen(copy.deepcopy(stock), target_modules="0")
    x = dense.images(8)
    dense.compare_with_dense(stock, model, [x], dense.FP32)
    assert dense.count_operations(lambda: model(x), "batch_norm") == 0
    assert dense.classes(LoRAManager(model).unload()) == dense.classes(stock)


def test_a_format_of_masks_is_a_decoder(pairs, tmp_path, monkeypatch):
    real = masks._decoded

    def decoded(path: str, in_colours: bool) -> np.ndarray:
        return np.load(path)["mask"] if path.endswith(".npz") else real(path, in_colours)

    monkeypatch.setattr(masks, "_decoded", decoded)
    expected = masks.pairs_in(pairs, None, masks.MaskReader(None))
    place = shutil.copytree(pairs / "val", tmp_path / "pairs")
    for path in list((place / "masks").iterdir()):
        np.savez(path.with_suffix(".npz"), mask=np.asarray(Image.open(path)))
        path.unlink()
    found = masks.pairs_in(place, None, masks.MaskReader(None))
    assert len(found) == len(expected) == 6
    for number in range(6):
        assert torch.equal(found.mask(number), expected.mask(number))


# ------------------------------------------------------------------------------------------- in a copy of the toolkit

ROOT = Path(__file__).resolve().parents[1]
BEFORE_A_RUN = """
import sys
import deploy_lora, finetune_lora
from tests.checkpoint_files import shorten_vit_mini
from tests.run_folders import SHORTER
shorten_vit_mini()
for module, name, value in SHORTER:
    setattr(module, name, value)
"""


def run_in_copy(place: Path, added: Mapping, changed: Iterable[tuple[str, str, str]], script: str, *argv: Path) -> str:
    """What a script prints in a copy of the toolkit, with text `added` to files, and in each (file, text, other)."""
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".*", "benchmarks", "checkpoints"))
    for file, text, other in changed:
        before = (place / file).read_text()
        assert before.count(text) == 1, (file, text)
        (place / file).write_text(before.replace(text, other))
    for file, text in added.items():
        with open(place / file, "a") as end:
            end.write(text)
    command = [sys.executable, "-c", BEFORE_A_RUN + script, *argv]
    environment = os.environ | {"XDG_CACHE_HOME": str(place)}  # where commands note what they write
    return subprocess.run(command, cwd=place, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


OF_RUNS = """

class Averaged(KeptWeights):
    def __init__(self, model, may_be_start):
        super().__init__(model, may_be_start)
        self.weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self.average = {}

    def begin(self):
        super().begin()
        self.average = {name: weight.clone() for name, weight in self.weights.items()}

    def after_step(self):
        for name, weight in self.weights.items():
            self.average[name].lerp_(weight, 0.5)

    def in_place(self):
        return super().in_place() if self.at_start else weights_replaced(self.weights, self.average.items())

    def state_dict(self):
        return super().state_dict() | {"average": self.average}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.average = {name: average.clone() for name, average in state["average"].items()}


def is_enough(history, loss):
    return loss is not None and len(history) > 0 and history[-1]["val_loss"] < loss
"""
COMMAND = """

def count(args):
    names = read_adapter_file(args.adapter)["metadata"]["class_names"]
    files.write_text(str(len(names) + args.more), args.output)
"""
REPORT = """

def write_loss(run, result):
    files.write_text(str(result.loss), run.path("loss.txt"))
"""
SQUARE = """    if augmentation == "square":
        return View(partial(whole, image_size), *_tensor(**normalization), bands=bands)
"""
ADDED = {  # at the end of each file
    "toolkit/run/options.py": 'CLASHES["--enough"] = {"--keep-best": "the last is kept"}\n',
    "toolkit/choices.py": 'AUGMENTATIONS += ("square",)\n',
    "toolkit/images/families.py": 'FAMILIES["ours"] = Family((3,), None, (0.25,), (0.5,), "^base[.]pth$", "a page")\n',
    "toolkit/run/optim.py": OF_RUNS,
    "toolkit/run/reports.py": REPORT,
    "toolkit/run/output_folder.py": 'FINE_TUNING_FILES += ("loss.txt",)\n',
    "toolkit/run/commands.py": 'COMMANDS["count"] = "how many classes"\n',
    "deploy_lora.py": COMMAND,
}
ENOUGH = '    enough: float | None = option(None, "the loss to stop below", type=positive_float)\n'
MORE = '    add(["count"], "--more", "how many more", type=positive_int)\n'
CHANGED = [  # in a file what stands there, and what takes its place
    ("toolkit/run/options.py", "    epochs: int", ENOUGH + "    epochs: int"),
    ("finetune_lora.py", "< args.epochs:", "< args.epochs and not optim.is_enough(run.history, args.enough):"),
    ("finetune_lora.py", "optim.KeptWeights(", "optim.Averaged("),
    ("finetune_lora.py", "run.schedule.step()", "run.schedule.step() or run.kept.after_step()"),
    ("toolkit/run/optim.py", "AdamW(list(groups.values()), fused=True)", "SGD(list(groups.values()))"),
    ("toolkit/run/optim.py", "return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))", "return 0.5"),
    ("toolkit/images/transforms.py", '    if augmentation == "none":\n', SQUARE + '    if augmentation == "none":\n'),
    ("toolkit/run/reports.py", "    curves = run", "    write_loss(run, result)\n    curves = run"),
    ("lora/adapted.py", "    def __post_init__", "    lora_extra: float = 3.0\n\n    def __post_init__"),
    ("toolkit/run/commands.py", "    parser.set_defaults(", MORE + "    parser.set_defaults("),
]
SCRIPT = """
import runpy
import toolkit, torch
from lora_utils import read_adapter_file
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
print(runpy.run_path("docs/write_options.py")["page"]())
try:
    finetune_lora.main([*options.split(), "--keep-best", "f1"])
except toolkit.InputError as error:
    print(error)
"""


def test_each_takes_the_lines_that_are_named(base, images, tmp_path):
    """A run with another option, a rule to stop by it, an average that is kept, another optimizer, schedule and
    augmentation, a report, a setting of adapters and a family of checkpoints; then a command."""
    out = tmp_path / "out"
    printed = run_in_copy(tmp_path / "copy", ADDED, CHANGED, SCRIPT, base, images, out)
    assert (
        "--keep-best with --enough: the last is kept; drop one" in printed and "| `--enough` |  | the loss" in printed
    )
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
ADDED_TASK = {
    "toolkit/choices.py": 'TRUTHS["ordinal"] = "class"\nKEEP_BEST["ordinal"] = {"right": "val_accuracy"}\n',
    "toolkit/answers/ordinal.py": (ROOT / "tests/ordinal.py").read_text(),
}
CHANGED_TASK = [
    ("toolkit/answers/tasks.py", "Regression, Segmentation)", "Regression, Segmentation, Ordinal)"),
    ("toolkit/answers/tasks.py", "\nTASKS", "\nfrom toolkit.answers.ordinal import Ordinal\nTASKS"),
]


def test_every_command_is_of_the_new_task_and_predicts_what_the_exported_graph_does(base, images, tmp_path):
    """By a copy of the toolkit that has a fifth task."""
    out = tmp_path / "out"
    printed = run_in_copy(tmp_path / "copy", ADDED_TASK, CHANGED_TASK, RUN_TASK, base, images, out)
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
