"""Heat maps of what decided: equal to Grad-CAM written out over stock PyTorch, for each kind of backbone."""

import copy
import re
import shutil

import pytest
import torch
from dense import randomize_adapters
from PIL import Image
from torch import Tensor, nn

import deploy_lora
from finetune_lora import add_lora_to_model
from lora_utils import LoRAManager
from tests.conftest import CLASSES
from tests.image_files import save_image
from toolkit import InputError
from toolkit.answers import heat_maps
from toolkit.models.backbones import build_backbone
from toolkit.models.dense import DenseModel

pytestmark = pytest.mark.usefixtures("small_backbones")


def written_out(model: nn.Module, images: Tensor, block: nn.Module, others=1, score=None) -> tuple[Tensor, Tensor]:
    """Heat by equations 1 and 2 of the paper, and the answers of this stock model.

    Of the maps that the block makes, or of the patches that it receives behind so many other tokens.
    """
    kept = []
    with block.register_forward_hook(lambda _, inputs, output: kept.extend([inputs[0], output])):
        answers = model(images)
    tokens, maps = kept
    features = maps if maps.dim() == 4 else tokens
    decided = answers.amax(1) if score is None else score(answers)
    [gradient] = torch.autograd.grad(decided.sum(), features)
    if features.dim() == 3:
        side = round((features.shape[1] - others) ** 0.5)
        features, gradient = (t[:, others:].transpose(1, 2).unflatten(2, (side, side)) for t in (features, gradient))
    heat = (features * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu().detach()
    heat = torch.nn.functional.interpolate(heat, size=images.shape[2:], mode="bilinear")[:, 0]
    heat = heat - heat.amin((1, 2), keepdim=True)
    return heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-12), answers.detach()


@pytest.mark.parametrize("arch, size", [("resnet18", 96), ("vit_mini", 16)])
def test_it_is_of_a_resnets_last_stage_and_of_the_patches_that_a_vits_last_block_receives(arch, size):
    """As over the stock model into which the adapters are merged."""
    model = build_backbone(arch, 3, size).eval()
    nn.init.normal_(list(model.modules())[-1].weight)
    randomize_adapters(add_lora_to_model(model, r=2))
    plain = LoRAManager(copy.deepcopy(model)).unload(merge=True)
    last = plain.layer4 if arch == "resnet18" else plain.encoder.layers[-1]
    images = torch.randn(3, 3, size, size)
    expected = written_out(plain, images, last)
    torch.testing.assert_close(heat_maps.grad_cam(model, images), expected, rtol=1e-3, atol=1e-3)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("answered", [True, False])
def test_of_masks_the_pixels_count_that_the_class_answers_or_all(answered):
    """Of a ViT: in a ResNet's last stage, in which the head is linear, it makes no difference which pixels count."""
    torch.manual_seed(6)
    model = DenseModel(build_backbone("vit_mini", 3, 16), 3, 16).eval()
    images = torch.randn(1, 3, 16, 16)
    if not answered:
        with torch.no_grad():
            model.head.linear.bias[1] -= 1e3
    pixels = model(images).argmax(1) == 1
    assert (0 < pixels.float().mean() < 1) == answered
    last = model.backbone.encoder.layers[-1]
    expected, _ = written_out(model, images, last, score=lambda logits: logits[:, 1][pixels == answered])
    torch.testing.assert_close(heat_maps.grad_cam(model, images, of=1)[0], expected, rtol=1e-3, atol=1e-3)


def test_maps_with_their_channels_at_the_end_are_maps_as_well_and_without_blocks_there_are_none():
    maps = torch.randn(2, 5, 4, 4)
    assert torch.equal(heat_maps._in_places(maps.movedim(1, 3)), maps)
    with pytest.raises(InputError, match="a Linear has no blocks whose features could be looked at"):
        heat_maps.grad_cam(nn.Linear(3, 2), torch.zeros(1, 3))


def test_explain_draws_each_image_in_its_folder_under_its_name_and_answer(once, tmp_path, monkeypatch, capsys, spy):
    """What is no image is left out; what is there is not replaced."""

    def explain(output, *words):
        return deploy_lora.main(["explain", f"{once}/lora.pth", "--output", *map(str, (tmp_path / output, *words))])

    mine = tmp_path / "mine"
    for place in ("p1/1.png", "p2/1.png"):
        save_image(mine / place, Image.new("RGB", (30, 20)))
    (mine / "broken.jpg").write_bytes(b"no image")
    written = explain("out", mine)
    assert written == [tmp_path / "out/p1/1.png", tmp_path / "out/p2/1.png"]
    assert Image.open(written[0]).size == (720, 408)
    printed = capsys.readouterr().out
    assert f"left out: {mine}/broken.jpg: not a readable image" in printed
    assert f"wrote {tmp_path / 'out'}: pictures of what decided, 2 in all\n" in printed
    (mine / "list.csv").write_text("p1/1.png\np2/1.png\n")
    with pytest.raises(InputError, match=r"what is written would replace .*p1/1\.png"):
        explain(shutil.copytree(mine, tmp_path / "theirs"), mine / "list.csv")
    with pytest.raises(InputError, match="not a readable image"):
        explain("none", mine / "broken.jpg")
    assert explain("out", mine, "--resume") == written and not (tmp_path / "none").exists()

    titles = []
    monkeypatch.setattr(deploy_lora, "save_figure", lambda figure, _: titles.append(figure.get_suptitle()))
    explain_one = spy(heat_maps.Explainer, "explain")
    name = "a-name-that-is-as-long-as-names-of-images-with-their-date-and-place-sometimes-are.png"
    image = save_image(tmp_path / name, Image.new("RGB", (20, 20)))
    explain("one", image)
    explain("three", image, "--label", "dark")
    for title in titles:
        assert title.replace("\n", "").startswith(f"{name}:")
        assert len(re.findall(r"probability(_\d)? [01]\.\d{4}", title.replace("\n", " "))) == 3
    assert "dark:" in titles[1]
    assert [of for (*_, of), _ in explain_one.call_args_list] == [None, CLASSES.index("dark")]


@pytest.mark.slow
def test_the_page_of_a_run_shows_it_beside_each_mistake(finetune, images, pictures, spy, tmp_path):
    """If the model has blocks. One image lies in the folder of another class."""
    own = shutil.copytree(images, tmp_path / "own")
    shutil.move(next((own / "val/dark").iterdir()), own / "val/bright/dark.png")
    explain = spy(heat_maps.Explainer, "explain")
    finetune(f"--epochs 1 --data-dir {own}", "vit")
    assert explain.call_count == 1
    pytest.importorskip("timm")
    options = "--checkpoint none --no-freeze-backbone --lora-rank 0 --head-init random --arch timm:regnety_002"
    assert (finetune(f"{options} --image-size 32 --epochs 1", "regnet")["folder"] / "report.html").exists()
