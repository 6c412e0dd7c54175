"""Adapters in PEFT's format: PEFT itself loads what is written, and answers as the model does."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import save_adapter
from dense import FP32, assert_close, images, randomize_adapters
from torch import nn

import deploy_lora
from finetune_lora import adapt_layers, add_lora_to_model, load_finetuned
from lora.adapted import adapted_layers, recorded_settings
from lora.peft_format import CONFIG, WEIGHTS, obstacles
from lora_utils import read_adapter_file
from tests.run_folders import names_in
from toolkit import InputError
from toolkit.models.backbones import headless
from toolkit.models.checkpoints import load_backbone


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def convert(adapter: Path, folder: Path) -> None:
    deploy_lora.main(["convert", str(adapter), "--to", "peft", "--output", str(folder)])


@pytest.fixture(scope="module")
def bases(base, narrow, tmp_path_factory) -> dict[str, Path]:
    """Checkpoints for images of 16 pixels."""
    path = tmp_path_factory.mktemp("resnet") / "base.pth"
    torch.save(narrow, path)
    return {"vit": base, "resnet": path}


def saved(base: Path, folder: Path, others: dict[str, dict] | None = None, **options) -> Path:
    """An adapter file with these options of `add_lora_to_model`, and others of layers by a part of their names."""
    model, report = load_backbone(base, 3, image_size=16)
    nn.init.normal_(list(model.parameters())[-2], std=0.1)  # the head's weight
    add_lora_to_model(model, **options)
    if others is not None:
        settings = {name: recorded_settings(vars(layer)) for name, layer in adapted_layers(model).items()}
        for part, change in others.items():
            settings |= {name: replace(own, **change) for name, own in settings.items() if part in name}
        adapt_layers(model, settings)
    randomize_adapters(model, std=0.05)
    return save_adapter(model, folder / "lora.pth", base, arch=report["arch"])


def stock(base: Path) -> nn.Module:
    """What a user of PEFT has: the base with a head that is not trained."""
    return load_backbone(base, 3, image_size=16)[0].eval()


@torch.no_grad()
def assert_same_answers(one: nn.Module, other: nn.Module) -> None:
    x = images(16, 4)
    assert_close(one(x), other(x), FP32)


WRITTEN = {
    "ViT": ("vit", {"r": 2, "lora_alpha": 5}),
    "ranks of a ViT": ("vit", {"r": 4, "use_rslora": True, "others": {"self_attention": {"r": 2}, "mlp.3": {"r": 8}}}),
    # PEFT has one scaling for the whole attention.
    "scalings of an attention": ("vit", {"r": 2, "others": {"out_proj": {"lora_alpha": 5.0}}}),
    "ranks of a ResNet": ("resnet", {"r": 2, "others": {".conv1": {"r": 5}}}),
    "a name in which others end": ("resnet", {"r": 2, "target_modules": r"conv[1]"}),
}


@pytest.mark.parametrize("kind, options", WRITTEN.values(), ids=WRITTEN)
def test_peft_answers_the_same(peft, kind, options, bases, tmp_path, capsys):
    adapter = saved(bases[kind], tmp_path, **options)
    convert(adapter, tmp_path / "peft")
    assert names_in(tmp_path / "peft") == {CONFIG, WEIGHTS}
    deploy_lora.read_options(["convert", str(adapter), "--output", str(tmp_path / "peft")])  # may replace what it wrote
    assert "4-bit" not in capsys.readouterr().out
    theirs = peft.PeftModel.from_pretrained(stock(bases[kind]), tmp_path / "peft").eval()
    ours, _ = load_finetuned(adapter)
    assert_same_answers(theirs, ours)
    assert sum(hasattr(module, "lora_A") for module in theirs.modules()) == len(read_adapter_file(adapter)["layers"])
    assert_same_answers(theirs.merge_and_unload(), ours)


def test_what_cannot_be_converted_leaves_both_files_as_they_were(peft, base, tmp_path, monkeypatch):
    written = tmp_path / "peft"
    convert(saved(base, tmp_path, r=2), written)
    before = (written / CONFIG).read_bytes()
    adapter = saved(base, tmp_path, r=3)
    with monkeypatch.context() as missing, pytest.raises(InputError, match="pip install peft"):
        missing.setitem(sys.modules, "peft", None)
        convert(adapter, written)
    differ = pytest.raises(InputError, match=r"PEFT's logits with this adapter differ by \d")
    with monkeypatch.context() as other, differ:
        other.setattr(deploy_lora, "ROUNDING", -1.0)
        convert(adapter, written)
    (written / WEIGHTS).unlink()
    (written / WEIGHTS).mkdir()
    monkeypatch.setattr("toolkit.run.commands.is_free", lambda *_: True)  # as if it had come meanwhile
    with pytest.raises(InputError, match=f"cannot write .*{WEIGHTS}"):
        convert(adapter, written)
    assert (written / CONFIG).read_bytes() == before


def test_a_4_bit_adapter_is_put_on_a_float_base(peft, base, tmp_path, capsys):
    """PEFT's answers are those of a float model with these adapters; what was in 4 bits below them is no adapter."""
    adapter = saved(base, tmp_path, r=2, use_qlora=True, adapt_last=1)
    convert(adapter, tmp_path / "peft")
    assert "trained over 4-bit weights" in capsys.readouterr().out
    theirs = peft.PeftModel.from_pretrained(stock(base), tmp_path / "peft").eval()
    ours = add_lora_to_model(stock(base), r=2, adapt_last=1).eval()
    tensors = {name: t for name, t in read_adapter_file(adapter)["tensors"].items() if t.numel()}
    assert ours.load_state_dict(tensors, strict=False).unexpected_keys == []
    assert_same_answers(theirs, ours)


def test_what_peft_cannot_hold_is_named(peft, base, tmp_path):
    model, _ = load_backbone(base, 3)
    with pytest.raises(InputError, match=r"full\.pth cannot be written for PEFT: it has no adapters; use merge"):
        convert(save_adapter(model, tmp_path / "full.pth", base), tmp_path / "peft")
    add_lora_to_model(model, target_modules=["heads", "mlp"])
    model.class_token.data += 1
    with pytest.raises(InputError, match=r"heads.head \(an adapter on the head.*base that have trained \(class_token"):
        convert(save_adapter(model, tmp_path / "lora.pth", base), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_layers_that_peft_computes_otherwise():
    for layer, expected in (
        (nn.Linear(4, 4), ""),
        (nn.Conv2d(4, 4, 3, padding="same", stride=1), ""),
        (nn.MultiheadAttention(4, 2), ""),
        (nn.Conv2d(4, 4, 3, groups=2), "in groups"),
        (nn.Conv2d(4, 4, 3, dilation=2), "dilation"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding other than zeros"),
    ):
        found = list(obstacles(add_lora_to_model(nn.Sequential(layer), r=1, target_modules="0"), {}))
        assert len(found) == bool(expected) and expected in "".join(found), layer


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_what_peft_has_trained_is_a_checkpoint_once_it_is_merged(peft, kind, bases, tmp_path):
    targets = {"vit": ["mlp.0", "self_attention"], "resnet": ["conv2"]}
    model = peft.get_peft_model(stock(bases[kind]), peft.LoraConfig(r=3, target_modules=targets[kind]))
    merged = randomize_adapters(model.eval(), std=0.1).merge_and_unload()
    torch.save(merged.state_dict(), tmp_path / "from_peft.pth")
    assert_same_answers(headless(stock(tmp_path / "from_peft.pth")), headless(merged))
