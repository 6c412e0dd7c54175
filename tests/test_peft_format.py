"""Adapters to PEFT's format and back: PEFT itself loads what is written, and writes what is read.

Its answers are compared with the model's. Everything here needs PEFT, apart from the message that says so.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from dense import FP32, assert_close, randomize_adapters
from torch import nn

import deploy_lora
from deploy_lora import from_peft, to_peft
from finetune_lora import adapt_layers, add_lora_to_model, load_finetuned
from lora.adapted import adapted_layers, recorded_settings
from lora.peft_format import CONFIG, WEIGHTS, _obstacle
from lora_utils import LoRAManager, read_adapter_file
from toolkit import InputError
from toolkit.models.checkpoints import load_backbone

NAMES = ["a", "b", "c"]
BLOCK = "encoder.layers.encoder_layer_1."


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def bases(base, narrow, tmp_path_factory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("resnet") / "base.pth"
    torch.save(narrow, path)
    return {"vit": base, "resnet": path}


SIZES = {"vit": 16, "resnet": 32}


def saved(base: Path, size: int, folder: Path, ranks: dict[str, int] | None = None, **options) -> Path:
    """An adapter file with these options of `add_lora_to_model`, and other ranks of layers by a part of their names."""
    torch.manual_seed(0)
    model, report = load_backbone(base, len(NAMES), image_size=size)
    head = model.fc if report["arch"] == "resnet18" else model.heads.head
    nn.init.normal_(head.weight, std=0.1)
    add_lora_to_model(model, **options)
    if ranks is not None:
        settings = {name: recorded_settings(vars(layer)) for name, layer in adapted_layers(model).items()}
        for part, rank in ranks.items():
            settings |= {name: replace(own, r=rank) for name, own in settings.items() if part in name}
        adapt_layers(model, settings)
    randomize_adapters(model, std=0.05)
    about = {"arch": report["arch"], "class_names": NAMES, "image_size": size, "checkpoint": str(base)}
    LoRAManager(model).save_lora_checkpoint(folder / "lora.pth", about)
    return folder / "lora.pth"


def stock(base: Path, size: int) -> nn.Module:
    """What a user of PEFT has: the base with a head that is not trained."""
    return load_backbone(base, len(NAMES), image_size=size)[0].eval()


@torch.no_grad()
def assert_same_answers(one: nn.Module, other: nn.Module, size: int) -> None:
    images = torch.randn(4, 3, size, size)
    assert_close(one(images), other(images), FP32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, options",
    [
        ("vit", {"target_modules": "mlp", "r": 3}),
        ("vit", {"r": 2, "lora_alpha": 5}),  # attention too
        ("vit", {"r": 4, "use_rslora": True, "ranks": {"self_attention": 2, "mlp.3": 8}}),
        ("resnet", {"r": 2, "lora_dropout": 0.1}),
        ("resnet", {"r": 2, "ranks": {".conv1": 5}}),
        ("resnet", {"r": 2, "target_modules": r"conv[1]"}),  # others end in this name
    ],
    ids=["linear", "attention", "ranks of a ViT", "convolutions", "ranks of a ResNet", "one name"],
)
def test_peft_answers_the_same(peft, kind, options, bases, tmp_path, capsys):
    adapter = saved(bases[kind], SIZES[kind], tmp_path, **options)
    deploy_lora.main(["convert", str(adapter), "--to", "peft", "--output", str(tmp_path / "peft")])
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {CONFIG, WEIGHTS}
    assert "4-bit" not in capsys.readouterr().out
    theirs = peft.PeftModel.from_pretrained(stock(bases[kind], SIZES[kind]), tmp_path / "peft").eval()
    assert_same_answers(theirs, load_finetuned(adapter)[0], SIZES[kind])
    adapted = [module for module in theirs.modules() if hasattr(module, "lora_A")]
    assert len(adapted) == len(read_adapter_file(adapter)["layers"])
    assert_same_answers(theirs.merge_and_unload(), load_finetuned(adapter)[0], SIZES[kind])


def test_a_4_bit_adapter_is_put_on_a_float_base(peft, base, tmp_path, capsys):
    """PEFT's answers are those of a float model with these adapters; what was in 4 bits below them is no adapter."""
    last = 1
    adapter = saved(base, 16, tmp_path, r=2, use_qlora=True, adapt_last=last)
    to_peft(adapter, tmp_path / "peft")
    assert "trained over 4-bit weights" in capsys.readouterr().out
    theirs = peft.PeftModel.from_pretrained(stock(base, 16), tmp_path / "peft").eval()
    ours = add_lora_to_model(stock(base, 16), r=2, adapt_last=last).eval()
    tensors = {name: t for name, t in read_adapter_file(adapter)["tensors"].items() if t.numel()}
    assert ours.load_state_dict(tensors, strict=False).unexpected_keys == []
    assert_same_answers(theirs, ours, 16)


def test_what_peft_cannot_hold_is_named(peft, base, tmp_path):
    about = {"arch": "vit_mini", "class_names": NAMES, "image_size": 16, "checkpoint": str(base)}
    model, _ = load_backbone(base, 3)
    LoRAManager(model).save_lora_checkpoint(tmp_path / "full.pth", about)
    with pytest.raises(InputError, match=r"full\.pth cannot be written for PEFT: it has no adapters; use merge"):
        to_peft(tmp_path / "full.pth", tmp_path / "peft")
    add_lora_to_model(model, target_modules=["heads", "mlp"])
    model.class_token.data += 1
    LoRAManager(model).save_lora_checkpoint(tmp_path / "lora.pth", about)
    with pytest.raises(InputError, match=r"heads.head \(an adapter on the head.*base that have trained \(class_token"):
        to_peft(tmp_path / "lora.pth", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    "layer, expected",
    [
        (nn.Linear(4, 4), None),
        (nn.Conv2d(4, 4, 3, padding="same", stride=1), None),
        (nn.MultiheadAttention(4, 2), None),
        (nn.Conv2d(4, 4, 3, groups=2), "in groups"),
        (nn.Conv2d(4, 4, 3, dilation=2), "dilation"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding other than zeros"),
    ],
    ids=str,
)
def test_layers_that_peft_computes_otherwise(layer, expected):
    assert (_obstacle(layer) or "None").find(expected or "None") >= 0


def test_the_package_is_named_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    for convert, *given in ((to_peft,), (from_peft, tmp_path / "base.pth")):
        with pytest.raises(InputError, match="pip install peft"):
            convert(tmp_path / "lora.pth", tmp_path, *given)


def written_by_peft(peft, base: Path, size: int, folder: Path, **config) -> nn.Module:
    """A PeftModel whose adapters and head are not as at the start; saved into `folder`."""
    torch.manual_seed(0)
    model = stock(base, size)
    config = {"r": 3, "lora_alpha": 5, "modules_to_save": [list(dict(model.named_children()))[-1]], **config}
    model = peft.get_peft_model(model, peft.LoraConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "kind, config",
    [
        ("vit", {"target_modules": ["mlp.0", "self_attention"], "rank_pattern": {"mlp.0": 2}}),
        ("vit", {"target_modules": r".*encoder_layer_[01]\..*mlp\.3", "use_rslora": True}),
        ("resnet", {"target_modules": ["conv2"], "alpha_pattern": {"layer1.0.conv2": 30}, "lora_dropout": 0.1}),
    ],
    ids=["attention", "rank-stabilised", "convolutions"],
)
def test_what_peft_has_trained_is_read(peft, kind, config, bases, tmp_path):
    theirs = written_by_peft(peft, bases[kind], SIZES[kind], tmp_path / "peft", **config)
    words = f"convert {tmp_path}/peft --from peft --output {tmp_path}/lora.pth --checkpoint {bases[kind]}".split()
    deploy_lora.main([*words, "--image-size", str(SIZES[kind]), "--class-names", *NAMES])
    ours, info = load_finetuned(tmp_path / "lora.pth")
    assert_same_answers(theirs, ours, SIZES[kind])
    assert info["class_names"] == NAMES


@pytest.mark.slow
def test_there_and_back_is_the_same_file(peft, base, tmp_path):
    """Attention's blocks and ranks come back as they were, and so do the settings."""
    adapter = saved(base, 16, tmp_path, r=2, lora_alpha=6, lora_dropout=0.1, ranks={"encoder_layer_0": 4})
    to_peft(adapter, tmp_path / "peft")
    from_peft(tmp_path / "peft", tmp_path / "back.pth", base, NAMES)
    here, back = read_adapter_file(adapter), read_adapter_file(tmp_path / "back.pth")
    assert here["tensors"].keys() == back["tensors"].keys() and here["base_hash"] == back["base_hash"]
    assert all(torch.equal(tensor, back["tensors"][name]) for name, tensor in here["tensors"].items())
    assert here["layers"] == back["layers"]


def test_attention_that_has_not_trained_keeps_its_rank_and_outputs_have_a_name_each_or_their_numbers(
    peft, base, tmp_path
):
    """Its B of zeros looks like one of three blocks."""
    config = peft.LoraConfig(r=3, target_modules=["self_attention"], modules_to_save=["heads"])
    model = peft.get_peft_model(stock(base, 16), config).eval()
    model.save_pretrained(tmp_path / "peft")
    from_peft(tmp_path / "peft", tmp_path / "lora.pth", base)
    assert {record["r"] for record in read_adapter_file(tmp_path / "lora.pth")["layers"].values()} == {3}
    ours, info = load_finetuned(tmp_path / "lora.pth")
    assert_same_answers(model, ours, 16)
    assert info["class_names"] == ["0", "1", "2"]
    with pytest.raises(InputError, match="2 names for the 3 outputs"):
        from_peft(tmp_path / "peft", tmp_path / "other.pth", base, ["a", "b"])


def with_tensors(keep):
    def change(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        safetensors.torch.save_file({name: t for name, t in tensors.items() if keep(name)}, folder / WEIGHTS)

    return change


@pytest.fixture(scope="module")
def written(base, tmp_path_factory) -> Path:
    """A folder that PEFT has written."""
    folder = tmp_path_factory.mktemp("peft")
    written_by_peft(pytest.importorskip("peft"), base, 16, folder, target_modules=["mlp.0"])
    return folder


WITHOUT_HEAD = with_tensors(lambda name: "lora_" in name)
WITHOUT_A_LAYER = with_tensors(lambda name: f"{BLOCK}mlp.0.lora_A" not in name)


def with_settings(**settings):
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | settings))

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: (folder / CONFIG).unlink(), "no adapter of PEFT: it must be a folder with adapter_config.js"),
        (lambda folder: (folder / CONFIG).write_text("{"), "adapter_config.json is damaged"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "no readable safetensors file"),
        (WITHOUT_HEAD, "no classifier head"),
        (WITHOUT_A_LAYER, r"does not fit its own adapter_config.json or this base: .*mlp\.0\.lora_A\.weight"),
        (with_settings(use_dora=True), "has use_dora, which adapters here have not"),
        (with_settings(bias="all"), "has bias=all"),
        (with_settings(init_lora_weights="pissa"), "has init_lora_weights=pissa"),
        (with_settings(peft_type="IA3"), "only LoRA can be converted"),
        (with_settings(target_modules=["q_proj"]), "PEFT cannot put .*: No modules were targeted"),
        (with_settings(r=7), "PEFT cannot put .*size mismatch"),
    ],
    ids=["no config", "no JSON", "no tensors", "no head", "a layer missing", "DoRA", "biases", "PiSSA", "IA3",
         "other layers", "another rank"],
)  # fmt: skip
def test_folders_that_cannot_be_read(written, change, message, base, tmp_path):
    shutil.copytree(written, tmp_path / "peft")
    change(tmp_path / "peft")
    with pytest.raises(InputError, match=message):
        from_peft(tmp_path / "peft", tmp_path / "lora.pth", base, NAMES)
    assert not (tmp_path / "lora.pth").exists()
