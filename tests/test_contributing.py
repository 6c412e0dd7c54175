"""What CONTRIBUTING says of where something new belongs: it is put there, and nowhere else, and works.

A task is in tests/test_new_task.py, a layer in docs/python.md, which tests/test_readme.py runs.
"""

import copy
import json
import shutil
from collections import OrderedDict

import dense
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import nn

import deploy_lora
from finetune_lora import ADAPTED, LoRALinear, load_finetuned
from lora import fusion
from lora.nf4 import dense_weight
from lora_utils import LoRAManager
from tests.checkpoint_files import under
from tests.run_folders import assert_same, metrics, run_in_copy, tensors
from toolkit.answers.parts import SoftmaxObjective
from toolkit.files import read_checkpoint
from toolkit.images import masks
from toolkit.models import checkpoints
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
    results = finetune(f"--epochs 1 {options}")
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


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).tanh()


class FusedNormed(Extended):
    def forward(self, x):
        return fusion.conv_bn(self.conv, self.norm, x).tanh()


def test_a_block_is_fused_as_long_as_it_has_adapters(monkeypatch):
    monkeypatch.setitem(fusion.FUSED, Normed, FusedNormed)
    parts = {"block": Normed(), "flat": nn.Flatten(), "head": nn.Linear(4 * 36, 2)}
    stock = dense.seen(nn.Sequential(OrderedDict(parts)).eval())
    model = dense.frozen(copy.deepcopy(stock)).eval()
    x = dense.images(8)
    dense.compare_with_dense(stock, model, [x], dense.FP32)
    assert dense.count_operations(lambda: model(x), "batch_norm") == 0
    assert dense.classes(LoRAManager(model).unload()) == dense.classes(stock)


@pytest.mark.usefixtures("small_backbones")
def test_a_layout_of_checkpoints_is_an_entry(narrow, saved, monkeypatch):
    layout = checkpoints._Layout("ours", "student.", entry="laboratory")
    monkeypatch.setattr(checkpoints, "_LAYOUTS", (layout, *checkpoints._LAYOUTS))
    path = saved({"laboratory": "ours", "state_dict": under("student.", narrow) | under("teacher.", narrow)})
    model, report = checkpoints.load_backbone(path, 2)
    assert report["family"] == "ours" and len(report["dropped"]) == len(narrow)
    assert_same(narrow, model.state_dict())


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


def test_another_loss_is_what_trains(start, monkeypatch):
    run = start()
    real = SoftmaxObjective.loss
    gradients = []
    for factor in (1, 3):
        monkeypatch.setattr(SoftmaxObjective, "loss", lambda *given, factor=factor: factor * real(*given))
        run.optimizer.zero_grad()
        run.add_gradients(next(run.loaders.steps(1)), 1.0)
        gradients.append(run.model.heads.head.weight.grad / factor)
    torch.testing.assert_close(*gradients)


# ------------------------------------------------------------------------------------------- in a copy of the toolkit

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
import toolkit
base, images, out = sys.argv[1:]
options = f"--checkpoint {base} --data-dir {images} --output-dir {out} --device cpu --enough 100 --batch-size 8"
options += " --epochs 3 --augmentation square --workers 0 --warmup-epochs 0 --lr 1e-3"
first = finetune_lora.main(options.split(), lambda run: print("augmentation:", run.loaders.augmentation.steps))
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
    assert "augmentation: Compose(\n    ToTensor()" in printed and "resumed: True" in printed
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
