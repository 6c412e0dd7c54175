"""Heat maps of what decided: equal to Grad-CAM written out over stock PyTorch, for each kind of backbone."""

import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from dense import randomize_adapters
from PIL import Image

import deploy_lora
from finetune_lora import add_lora_to_model
from lora_utils import LoRAManager
from tests.conftest import CLASSES
from tests.image_files import save_image
from toolkit import InputError
from toolkit.answers import heat_maps
from toolkit.answers.heat_maps import Explainer, grad_cam
from toolkit.models.backbones import build_backbone
from toolkit.models.dense import DenseModel

pytestmark = pytest.mark.usefixtures("small_backbones")


def enlarged(maps: torch.Tensor, size: int) -> torch.Tensor:
    heat = F.interpolate(maps[:, None], size=(size, size), mode="bilinear")[:, 0]
    heat = heat - heat.amin((1, 2), keepdim=True)
    return heat / heat.amax((1, 2), keepdim=True)


def adapted(arch: str, size: int, plain: bool = False) -> torch.nn.Module:
    """A model with trained adapters; or the stock model into which they are merged."""
    torch.manual_seed(0)
    model = build_backbone(arch, 3, size)
    torch.nn.init.normal_(list(model.modules())[-1].weight)
    randomize_adapters(add_lora_to_model(model, r=2))
    return LoRAManager(model).unload(merge=True).eval() if plain else model.eval()


def assert_decided(model: torch.nn.Module, images: torch.Tensor, features: torch.Tensor, logits: torch.Tensor) -> None:
    """By equations 1 and 2 of the paper, for features (N, D, h, h) of which the plain model makes these logits."""
    heat, outputs = grad_cam(model, images)
    torch.testing.assert_close(outputs, logits.detach(), rtol=1e-4, atol=1e-4)
    [gradient] = torch.autograd.grad(logits.amax(1).sum(), features)
    maps = F.relu((gradient.mean((2, 3), keepdim=True) * features).sum(1)).detach()
    torch.testing.assert_close(heat, enlarged(maps, images.shape[-1]), rtol=1e-3, atol=1e-3)


def test_of_a_resnet_it_is_that_of_its_last_stage():
    images = torch.randn(3, 3, 96, 96)
    net = adapted("resnet18", 96, plain=True)
    x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    features = net.layer4(net.layer3(net.layer2(net.layer1(x)))).requires_grad_()
    model = adapted("resnet18", 96)
    assert_decided(model, images, features, net.fc(net.avgpool(features).flatten(1)))
    assert not any(module._forward_hooks for module in model.modules())


def test_of_a_vit_it_is_that_of_the_patches_which_the_last_block_receives():
    images = torch.randn(2, 3, 16, 16)
    net = adapted("vit_mini", 16, plain=True)
    x = net._process_input(images)
    x = torch.cat([net.class_token.expand(len(x), -1, -1), x], 1) + net.encoder.pos_embedding
    *earlier, last = net.encoder.layers
    for block in earlier:
        x = block(x)
    side = 16 // net.patch_size
    features = x[:, 1:].movedim(1, 2).reshape(2, -1, side, side).detach().requires_grad_()
    tokens = torch.cat([x[:, :1], features.flatten(2).movedim(2, 1)], 1)
    assert_decided(adapted("vit_mini", 16), images, features, net.heads(net.encoder.ln(last(tokens))[:, 0]))


@pytest.mark.parametrize("answered", [True, False])
def test_of_masks_the_pixels_count_that_the_class_answers_or_all(answered):
    """Of a ViT: in a ResNet's last stage, in which the head is linear, it makes no difference which pixels count."""
    torch.manual_seed(6)
    model = DenseModel(build_backbone("vit_mini", 3, 16), 3, 16).eval()
    images = torch.randn(1, 3, 16, 16)
    if not answered:
        with torch.no_grad():
            model.head.linear.bias[1] -= 1e3
    given = []
    last = model.backbone.encoder.layers[-1]
    with last.register_forward_hook(lambda _block, inputs, _output: given.append(inputs[0])):
        logits = model(images)
    pixels = logits[0].argmax(0) == 1
    assert (0 < pixels.float().mean() < 1) == answered
    [gradient] = torch.autograd.grad(logits[0, 1][pixels if answered else ~pixels].sum(), given)
    side = 16 // model.backbone.patch_size
    maps = F.relu(given[0][0, 1:].detach() @ gradient[0, 1:].mean(0)).reshape(1, side, side)
    torch.testing.assert_close(grad_cam(model, images, of=1)[0], enlarged(maps, 16), rtol=1e-3, atol=1e-3)


def test_maps_with_their_channels_at_the_end_are_maps_as_well_and_without_blocks_there_are_none():
    maps = torch.randn(2, 5, 4, 4)
    assert torch.equal(heat_maps._in_places(maps.movedim(1, 3)), maps)
    with pytest.raises(InputError, match="a Linear has no blocks whose features could be looked at"):
        grad_cam(torch.nn.Linear(3, 2), torch.zeros(1, 3))


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
    assert f"wrote {tmp_path / 'out'}: what decided, of 2 images\n" in printed
    (mine / "list.csv").write_text("p1/1.png\np2/1.png\n")
    with pytest.raises(InputError, match=r"what is written would replace .*p1/1\.png"):
        explain(shutil.copytree(mine, tmp_path / "theirs"), mine / "list.csv")
    with pytest.raises(InputError, match="not a readable image"):
        explain("none", mine / "broken.jpg")
    assert explain("out", mine, "--resume") == written and not (tmp_path / "none").exists()

    titles = []
    monkeypatch.setattr(deploy_lora, "save_figure", lambda figure, _: titles.append(figure.get_suptitle()))
    explain_one = spy(Explainer, "explain")
    name = "a-name-that-is-as-long-as-names-of-images-with-their-date-and-place-sometimes-are.png"
    image = save_image(tmp_path / name, Image.new("RGB", (20, 20)))
    explain("one", image)
    explain("three", image, "--label", "dark")
    for title in titles:
        assert title.replace("\n", "").startswith(f"{name}:")
        assert len(re.findall(r"probability(_\d)? [01]\.\d{4}", title.replace("\n", " "))) == 3
    assert "dark:" in titles[1]
    assert [of for (*_, of), _ in explain_one.call_args_list] == [None, CLASSES.index("dark")]
    with pytest.raises(InputError, match=r"--label drak: no such class, label or number: did you mean.*dark"):
        explain("none", image, "--label", "drak")


@pytest.mark.slow
def test_the_page_of_a_run_shows_it_beside_each_mistake(finetune, images, pictures, spy, tmp_path):
    """If the model has blocks. One image lies in the folder of another class."""
    own = shutil.copytree(images, tmp_path / "own")
    shutil.move(next((own / "val/dark").iterdir()), own / "val/bright/dark.png")
    explain = spy(Explainer, "explain")
    finetune(f"--epochs 1 --data-dir {own}", "vit")
    assert explain.call_count == 1
    pytest.importorskip("timm")
    options = "--checkpoint none --no-freeze-backbone --lora-rank 0 --head-init random --arch timm:regnety_002"
    assert (finetune(f"{options} --image-size 32 --epochs 1", "regnet")["folder"] / "report.html").exists()
