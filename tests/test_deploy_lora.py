"""The commands that come after training: what they print, what they write and how they end.

What they are given by mistake is in `test_bad_input.py`.
"""

import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from dense import randomize_adapters

import deploy_lora
from finetune_lora import add_lora_to_model, load_finetuned
from lora_utils import LoRAManager
from moco.backbones import build_backbone
from moco.checkpoints import load_backbone
from moco.runs import run_script

FIELDS = {"format_version": 1, "tensors": {}, "layers": {}, "base_hash": "", "metadata": {}}


@pytest.fixture(params=[".pth", ".safetensors"])
def adapter(request, base, tmp_path) -> Path:
    """An adapter file for three classes, of 4,419 numbers, beside its base.pth."""
    torch.manual_seed(0)
    base = shutil.copy(base, tmp_path / "base.pth")
    model, report = load_backbone(base, 3)
    randomize_adapters(add_lora_to_model(model, r=2, target_modules=["encoder_layer_1.mlp"]), std=0.1)
    path = tmp_path / f"lora{request.param}"
    about = {"arch": report["arch"], "class_names": ["a", "b", "ß"], "image_size": 16, "checkpoint": str(base)}
    LoRAManager(model).save_lora_checkpoint(path, about | {"config": {"finetune": {"learning_rate": 1e-4}}})
    return path


def test_info_tells_what_is_in_the_file(adapter, capsys):
    content = deploy_lora.main(["info", str(adapter)])
    size = adapter.stat().st_size / 1e6
    assert capsys.readouterr().out.splitlines() == [
        f"{adapter}: 2 adapted layers, 4,419 parameters, {size:.2f} MB",
        "  arch: 'vit_mini'",
        "  class_names: ['a', 'b', 'ß']",
        "  image_size: 16",
        f"  checkpoint: {content['metadata']['checkpoint']!r}",
        "  config: {'finetune': {'learning_rate': 0.0001}}",
        "  encoder.layers.encoder_layer_1.mlp.0: LoRALinear, r=2, scaling=8",
        "  encoder.layers.encoder_layer_1.mlp.3: LoRALinear, r=2, scaling=8",
    ]
    assert sum(tensor.numel() for tensor in content["tensors"].values()) == 4419


def test_info_does_not_unfold_what_a_stranger_has_folded(base, tmp_path, capsys):
    """A list that holds the same list twice, 60 times over, is short in the file and endless in print."""
    content = ["lol"]
    for _ in range(60):
        content = [content, content]
    torch.save({**FIELDS, "metadata": {"note": content, "text": "x" * 10_000}}, tmp_path / "lora.pth")
    deploy_lora.main(["info", str(tmp_path / "lora.pth")])
    assert len(capsys.readouterr().out) < 1000


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_merged_file_serves_without_this_toolkit(adapter, suffix, tmp_path, capsys):
    output = tmp_path / f"merged{suffix}"
    metadata = deploy_lora.main(["merge", str(adapter), "--output", str(output)])
    assert metadata["class_names"] == ["a", "b", "ß"]
    assert capsys.readouterr().out == f"wrote {output}: a state_dict for torchvision's vit_mini with 3 classes\n"
    state = torch.load(output) if suffix == ".pth" else safetensors.torch.load_file(output)
    plain = build_backbone("vit_mini", 3, 16)
    plain.load_state_dict(state)
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(plain.eval()(images), load_finetuned(adapter)[0](images), rtol=1e-4, atol=1e-5)


def test_merge_finds_a_base_that_has_moved(adapter, tmp_path):
    merged, moved = tmp_path / "merged.pth", tmp_path / "moved.pth"
    deploy_lora.main(["merge", str(adapter), "--output", str(merged)])
    before = torch.load(merged)
    (tmp_path / "base.pth").rename(moved)
    deploy_lora.main(["merge", str(adapter), "--output", str(merged), "--checkpoint", str(moved)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in torch.load(merged).items())


@pytest.mark.parametrize(
    "command, code, told",
    [
        ("info lora.pth", 0, ""),
        ("merge lora.pth --output merged.pth", 0, ""),
        ("merge lora.pth", 2, "error: --output: expected a value, the file to write\n"),
        ("info gone.pth", 2, "error: cannot read gone.pth: file not found; give the path of an existing file\n"),
    ],
)
@pytest.mark.parametrize("adapter", [".pth"], indirect=True)
def test_exit_codes(command, code, told, adapter, monkeypatch, capsys):
    monkeypatch.chdir(adapter.parent)
    monkeypatch.setattr(sys, "argv", ["deploy_lora.py", *command.split()])
    try:
        run_script(deploy_lora.main)
        ended = 0
    except SystemExit as error:
        ended = error.code
    assert ended == code
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("command", [[], *([name] for name in deploy_lora.COMMANDS)])
def test_help_says_what_each_command_does(command, capsys):
    with pytest.raises(SystemExit) as ended:
        deploy_lora.main([*command, "--help"])
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, (*_, text) in deploy_lora.COMMANDS.items():
        assert command or f"{name} {text}" in printed
