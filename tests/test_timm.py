"""timm's models by name: their own keys, heads, sizes and normalisation, from the command line to plain timm."""

import copy

import pytest
import safetensors.torch
import torch
from dense import FP32, assert_close, randomize_adapters, saved_bytes
from torch import nn

import deploy_lora
from finetune_lora import add_lora_to_model, count_parameters, freeze_backbone_params, load_finetuned
from lora.fusion import set_gradient_checkpointing
from lora_utils import LoRAManager, base_digests
from toolkit import InputError
from toolkit.answers.probe import fit_linear_probe, set_head
from toolkit.models.backbones import (
    build_backbone,
    first_convolution,
    forward_features,
    head_name,
    in_head,
    normalization,
    record_of,
)
from toolkit.models.checkpoints import load_backbone
from toolkit.models.names import default_image_size
from toolkit.models.norms import freeze_statistics

timm = pytest.importorskip("timm")

# Models so small that timm tests itself with them: name -> classifier.
HEADS = {
    "test_vit": "head",
    "test_vit3": "head",
    "test_resnet": "fc",
    "test_efficientnet": "classifier",
    "test_convnext": "head.fc",
    "test_maxvit": "head.fc",
}


def images(side: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, side, side)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint("test_vit"): a file of timm's own state_dict with random numbers."""
    folder = tmp_path_factory.mktemp("timm")

    def write(name: str, wrap=lambda state: state, suffix: str = "pth", **options):
        path = folder / f"{name}.{suffix}"
        torch.manual_seed(1)
        model = timm.create_model(name, num_classes=7, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        content = wrap(model.state_dict())
        torch.save(content, path) if suffix == "pth" else safetensors.torch.save_file(content, path)
        return path, model.eval()

    return write


@pytest.mark.parametrize("name", HEADS)
def test_a_model_is_timm_s_with_its_own_head_size_and_normalisation(name):
    model = build_backbone(f"timm:{name}", 5)
    config = model.pretrained_cfg
    assert model.state_dict().keys() == timm.create_model(name, num_classes=5).state_dict().keys()
    assert head_name(model) == HEADS[name] and model.get_submodule(HEADS[name]).out_features == 5
    assert default_image_size(f"timm:{name}") == config["input_size"][-1] == 160
    assert normalization(f"timm:{name}") == {"mean": config["mean"], "std": config["std"]}
    x = images(160)
    head = model.eval().get_submodule(HEADS[name])
    features = forward_features(model, x)
    assert features.shape == (2, head.in_features)
    assert_close(head(features), model(x), FP32)
    tagged = "timm:vit_base_patch16_224."  # the tag chooses
    assert normalization(f"{tagged}mae")["mean"] == (0.485, 0.456, 0.406)
    assert normalization(f"{tagged}augreg_in21k")["mean"] == (0.5, 0.5, 0.5)


def test_only_the_classifier_trains():
    model = build_backbone("timm:test_convnext", 5)
    freeze_backbone_params(add_lora_to_model(model, r=2))
    trains = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trains == {"head.fc.weight", "head.fc.bias"} and not in_head(model, "head.norm")
    assert count_parameters(model)["lora"] > 0
    set_head(model, fit_linear_probe(torch.randn(20, 64), torch.arange(20) % 5, 5))
    assert not hasattr(model.head.fc, "lora_A")
    assert forward_features(timm.create_model("test_vit", num_classes=0), images(160)).shape == (2, 64)  # it has none


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("timm:test_vitt", {}, r"timm has no model 'test_vitt': did you mean timm:test_vit"),
        ("timm:", {}, "timm has no model ''"),
        ("timm:test_vit.nothing", {}, "nothing"),
        ("timm:test_vit", {"image_size": 65}, "not a multiple of timm:test_vit's patch of 16; 64 would fit"),
        ("timm:levit_128s", {}, "no single linear classifier"),
        ("timm:dla34", {}, "no single linear classifier"),
        ("timm:test_vit", {"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_what_cannot_be_built(arch, options, message):
    with pytest.raises(InputError, match=message), torch.device("meta"):
        build_backbone(arch, **{"num_classes": 5, **options})


@pytest.mark.parametrize(
    ("name", "wrap", "suffix"),
    [
        ("test_vit", lambda state: state, "pth"),
        ("test_convnext", lambda state: state, "safetensors"),
        ("test_vit", lambda state: {"state_dict": {f"module.{name}": t for name, t in state.items()}}, "pth"),
        ("test_convnext", lambda state: {"model": state, "epoch": 3}, "pth"),
    ],
)
def test_a_checkpoint_in_the_model_s_own_keys(name, wrap, suffix, checkpoint):
    path, theirs = checkpoint(name, wrap, suffix)
    model, report = load_backbone(path, 5, f"timm:{name}")
    assert report["family"] == "timm" and report["arch"] == f"timm:{name}" and report["image_size"] == 160
    assert {key.split(".")[-2] for key in report["dropped"]} == {HEADS[name].split(".")[-1]}  # the classifier alone
    x = images(160)
    assert torch.equal(forward_features(model.eval(), x), forward_features(theirs, x))
    assert base_digests(model) == record_of(model).base_digests == base_digests(theirs)


def test_another_model_s_checkpoint_is_refused(checkpoint):
    path, _ = checkpoint("test_vit")
    with pytest.raises(InputError, match=r"does not hold a timm:test_vit3: .* match; .* missing"):
        load_backbone(path, 5, "timm:test_vit3")
    with pytest.raises(InputError, match="timm's models by --arch timm:NAME"):
        load_backbone(checkpoint("test_convnext")[0], 5)


@pytest.mark.parametrize("name, channels", [("test_vit", 13), ("test_resnet", 1)])
def test_a_checkpoint_says_how_many_channels_its_images_have(name, channels, checkpoint):
    path, theirs = checkpoint(name, in_chans=channels)
    model, report = load_backbone(path, 5, f"timm:{name}")
    images = torch.randn(2, channels, report["image_size"], report["image_size"])
    assert report["channels"] == channels
    assert torch.equal(model.eval().forward_features(images), theirs.eval().forward_features(images))


@pytest.mark.parametrize("name, channels", [("test_vit", 1), ("test_vit", 7), ("test_resnet", 2)])
def test_a_first_layer_is_fitted_as_timm_does(name, channels, checkpoint):
    from timm.models import adapt_input_conv

    path, theirs = checkpoint(name)
    model, report = load_backbone(path, 5, f"timm:{name}", channels=channels, channel_fit="timm")
    first = f"{first_convolution(model)}.weight"
    assert torch.equal(model.state_dict()[first], adapt_input_conv(channels, theirs.state_dict()[first]))
    assert (report["channels"], report["channel_fit"]) == (channels, "timm")
    with pytest.raises(InputError, match=rf"for images of 3 channels, not {channels}.*channel_fit=.timm"):
        load_backbone(path, 5, f"timm:{name}", channels=channels)


def test_a_position_embedding_says_its_image_size_and_is_interpolated_to_another(checkpoint):
    path, theirs = checkpoint("test_vit", img_size=64)
    model, report = load_backbone(path, 5, "timm:test_vit")
    assert report["image_size"] == 64
    x = images(64)
    assert torch.equal(forward_features(model.eval(), x), forward_features(theirs, x))

    larger, report = load_backbone(path, 5, "timm:test_vit", 96)
    resampled = timm.layers.resample_abs_pos_embed(theirs.pos_embed, [6, 6], num_prefix_tokens=1)
    assert report["image_size"] == 96 and torch.equal(larger.pos_embed, resampled)
    digests = base_digests(larger)  # as the file has it: interpolation rounds differently on other machines
    assert digests["pos_embed"] == base_digests(theirs)["pos_embed"] == record_of(larger).base_digests["pos_embed"]


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_from_an_adapter_file_to_one_for_plain_timm(name, checkpoint, tmp_path, capsys):
    path, _ = checkpoint(name)
    adapter = tmp_path / "lora.pth"
    model, report = load_backbone(path, 3, f"timm:{name}", 32)
    randomize_adapters(add_lora_to_model(model, r=2), std=0.05)
    about = {"arch": report["arch"], "class_names": list("abc"), "image_size": 32, "checkpoint": str(path)}
    LoRAManager(model).save_lora_checkpoint(adapter, about | {"mean": [0.5] * 3, "std": [0.5] * 3})
    deploy_lora.main(["merge", str(adapter), "--output", str(tmp_path / "merged.pth")])
    assert f"a state_dict for timm's {name} with 3 classes" in capsys.readouterr().out
    plain = timm.create_model(name, num_classes=3, **({"img_size": 32} if "vit" in name else {}))
    plain.load_state_dict(torch.load(tmp_path / "merged.pth", weights_only=True))
    again, info = load_finetuned(adapter)
    assert list(info["transform"].steps.transforms[-1].mean) == [0.5] * 3
    x = images()
    assert_close(again(x), plain.eval()(x), FP32)
    assert_close(again(x), model.eval()(x), FP32)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_gradient_checkpointing_recomputes_timm_s_own_blocks(name):
    model = build_backbone(f"timm:{name}", 3)
    freeze_backbone_params(randomize_adapters(add_lora_to_model(model, r=2)))
    x = images()
    trained = [p for p in model.parameters() if p.requires_grad]
    block = model.blocks[0] if name == "test_vit" else model.layer1[0]
    calls = []
    block.register_forward_pre_hook(lambda *_: calls.append(1))  # recomputing stops before the block ends

    def gradients(mode: str) -> tuple[list[torch.Tensor], int]:
        calls.clear()
        set_gradient_checkpointing(model, mode)
        return list(torch.autograd.grad(model(x).square().sum(), trained)), len(calls)

    expected, once = gradients("none")
    recomputed, twice = gradients("full")
    assert (once, twice, gradients("none")[1]) == (1, 2, 1)
    for gradient, wanted in zip(recomputed, expected, strict=True):
        assert_close(gradient, wanted, FP32)


ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "none": nn.Identity}


def frozen_norm(activation: str | None, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A stock BatchNorm, or timm's with an activation, in eval mode; and its frozen twin."""
    torch.manual_seed(2)
    stock = nn.BatchNorm2d(5)
    if activation is not None:
        stock = timm.layers.BatchNormAct2d(5, act_layer=ACTIVATIONS[activation])
    for tensor in (stock.weight.data, stock.bias.data, stock.running_mean, stock.running_var):
        tensor.uniform_(0.5, 2)
    stock.to(dtype).eval().requires_grad_(False)
    twin = copy.deepcopy(stock)
    freeze_statistics(twin, freeze=True, training=True)
    return stock, twin


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_a_frozen_batch_norm_is_the_stock_one(activation, layout, dtype):
    stock, twin = frozen_norm(activation, dtype)
    x = (3 * torch.randn(2, 5, 4, 3, dtype=dtype)).to(memory_format=layout).requires_grad_()
    gy = torch.randn(2, 5, 4, 3, dtype=dtype)
    expected = stock(x)
    assert torch.equal(twin(x), expected)
    (gradient,) = torch.autograd.grad(twin(x), x, gy)
    (expected_gradient,) = torch.autograd.grad(expected, x, gy)
    assert_close(gradient, expected_gradient, 1e-12 if dtype == torch.float64 else 1e-2)
    if dtype == torch.float64:
        assert torch.autograd.gradgradcheck(twin, x)


def test_a_frozen_batch_norm_keeps_at_most_its_output():
    x = torch.randn(8, 5, 16, 16, dtype=torch.float64, requires_grad=True)
    once = x.numel() * 8
    kept = {}
    for activation in (None, *ACTIVATIONS):
        kept[activation] = round(saved_bytes(frozen_norm(activation)[1], x) / once)
    assert kept == {None: 0, "none": 0, "relu": 1, "relu6": 1, "silu": 1}


def test_a_batch_norm_that_trains_or_is_watched_computes_as_the_stock_one():
    stock, twin = frozen_norm("relu")
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    seen = []
    twin.act.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert torch.equal(twin(x), stock(x))
    assert torch.equal(seen[0], stock(x))
    twin.weight.requires_grad_()
    twin(x).sum().backward()
    stock.weight.requires_grad_()
    stock(x).sum().backward()
    assert torch.equal(twin.weight.grad, stock.weight.grad)
