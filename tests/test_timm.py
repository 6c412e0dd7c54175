"""timm's models by name: their own keys, heads, sizes and normalisation, from the command line to plain timm."""

import copy
import dataclasses
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import dense
import pytest
import safetensors.torch
import torch
from dense import EXACT, FP32, assert_close, frozen, images, randomize_adapters, saved_storages
from torch import nn

import deploy_lora
from finetune_lora import add_lora_to_model, count_parameters, freeze_backbone_params, load_finetuned
from lora.fusion import fuse, set_gradient_checkpointing, unfuse
from lora_utils import LoRAManager, base_digests, read_adapter_file, unused_adapters
from tests.checkpoint_files import under
from tests.test_heat_maps import written_out
from toolkit import InputError
from toolkit.answers.heat_maps import grad_cam
from toolkit.answers.probe import fit_linear_probe, set_head
from toolkit.models import backbones, names
from toolkit.models.backbones import build_backbone, head_name, headless, normalization, record_of
from toolkit.models.checkpoints import describe_base, load_backbone
from toolkit.models.names import default_image_size, model_problems
from toolkit.models.norms import freeze_statistics

timm = pytest.importorskip("timm")
BLOCKS = timm.models._efficientnet_blocks

# Models so small that timm tests itself with them: name -> classifier.
HEADS = {"test_vit": "head", "test_vit3": "head", "test_resnet": "fc", "test_efficientnet": "classifier"}
HEADS |= {"test_convnext": "head.fc", "test_maxvit": "head.fc"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint("test_vit"): a file of timm's own state_dict with random numbers."""
    folder = tmp_path_factory.mktemp("timm")

    def write(name: str, wrap=dict, suffix: str = "pth", **options):
        path = folder / f"{name}.{suffix}"
        torch.manual_seed(1)
        model = timm.create_model(name, **{"num_classes": 7, **options})
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        content = wrap(model.state_dict())
        torch.save(content, path) if suffix == "pth" else safetensors.torch.save_file(content, path)
        return path, model.eval()

    return write


@pytest.fixture
def hub(monkeypatch, checkpoint):
    """hub(name): timm finds `checkpoint(name)` where it looks for files of the Hub. Returns the file's path."""

    def publish(name: str):
        path, _ = checkpoint(name, num_classes=timm.get_pretrained_cfg(name).num_classes)
        monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *_, **__: torch.load(path))
        return path

    return publish


@pytest.mark.parametrize("name", HEADS)
def test_a_model_is_timm_s_with_its_own_head_size_and_normalisation_is_explained_and_trains_its_classifier(name):
    model = build_backbone(f"timm:{name}", 5)
    config = model.pretrained_cfg
    assert model.state_dict().keys() == timm.create_model(name, num_classes=5).state_dict().keys()
    assert head_name(model) == HEADS[name] and model.get_submodule(HEADS[name]).out_features == 5
    assert default_image_size(f"timm:{name}") == config["input_size"][-1] == 160
    assert normalization(f"timm:{name}") == {"mean": config["mean"], "std": config["std"]}
    x = images(160)
    head = model.eval().get_submodule(HEADS[name])
    features = headless(model)(x)
    assert features.shape == (2, head.in_features)
    assert_close(head(features), model(x), FP32)
    heat, _ = grad_cam(model, x)
    set_gradient_checkpointing(model, "full")  # by which timm passes blocks by, and what is to look at them
    assert_close(grad_cam(model, x)[0], heat, FP32)
    frozen(model)
    trains = {key for key in dense.trained(model) if "lora_" not in key}
    assert trains == {f"{HEADS[name]}.weight", f"{HEADS[name]}.bias"} and not hasattr(head, "lora_A")
    assert count_parameters(model)["lora"] > 0
    set_head(model, fit_linear_probe(torch.randn(20, head.in_features), torch.arange(20) % 5, 5))


def test_a_tag_chooses_the_normalisation_and_a_model_without_a_head_is_all_features():
    for tag, mean in (("mae", (0.485, 0.456, 0.406)), ("augreg_in21k", (0.5, 0.5, 0.5))):
        assert normalization(f"timm:vit_base_patch16_224.{tag}")["mean"] == mean
    assert headless(timm.create_model("test_vit", num_classes=0))(images(160)).shape == (2, 64)


def test_what_cannot_be_built():
    for arch, options, message in (
        ("timm:test_vitt", {}, r"timm has no model 'test_vitt': did you mean timm:test_vit"),
        ("timm:", {}, "timm has no model ''"),
        ("timm:test_vit.nothing", {}, "nothing"),
        ("timm:test_vit", {"image_size": 65}, "not a multiple of timm:test_vit's patch of 16; 64 would fit"),
        ("timm:levit_128s", {}, "no single linear classifier"),
        ("timm:dla34", {}, "no single linear classifier"),
        ("timm:test_vit", {"num_classes": 0}, "num_classes is 0"),
    ):
        with pytest.raises(InputError, match=message), torch.device("meta"):
            build_backbone(arch, **{"num_classes": 5, **options})


@pytest.mark.parametrize(
    ("name", "wrap", "suffix", "size"),
    [
        ("test_convnext", dict, "safetensors", {}),
        ("test_convnext", lambda state: {"model": state, "epoch": 3}, "pth", {}),
        ("test_vit", lambda state: {"state_dict": under("module.", state)}, "pth", {"img_size": 64}),
    ],
)
def test_a_checkpoint_in_the_model_s_own_keys(name, wrap, suffix, size, checkpoint):
    path, theirs = checkpoint(name, wrap, suffix, **size)
    model, report = load_backbone(path, 5, f"timm:{name}")
    side = size.get("img_size", 160)  # its position embedding says it
    assert (report["family"], report["arch"], report["image_size"]) == ("timm", f"timm:{name}", side)
    assert {key.split(".")[-2] for key in report["dropped"]} == {HEADS[name].split(".")[-1]}  # the classifier alone
    x = images(side)
    assert torch.equal(headless(model.eval())(x), headless(theirs)(x))
    assert base_digests(model) == record_of(model).base_digests == base_digests(theirs)


def test_a_file_without_its_arch_is_told_what_it_could_be(checkpoint, tmp_path, monkeypatch):
    path, _ = checkpoint("test_convnext")
    named = path.rename(tmp_path / "test_convnext-0123abcd.pth")  # as timm names files
    told = "could be of timm:test_convnext: say which, as --arch timm:test_convnext$"
    with pytest.raises(InputError, match=f"none of its .*{told}"):
        load_backbone(named, 5)
    with pytest.raises(InputError, match=r"timm's models by --arch timm:NAME$"):  # another's name is no proof
        load_backbone(named.rename(tmp_path / "test_vit.pth"), 5)

    for name, patch in (("vit_small_patch14_reg4_dinov2", 14), ("vit_small_patch16_dinov3", 16)):  # by tensors alone
        assert name in names.timm_candidates("weights.pth", {"patch_embed.proj.weight": (384, 3, patch, patch)})
    torch.save(timm.create_model("tf_mobilenetv3_small_075").state_dict(), path)
    monkeypatch.setattr(names, "timm_candidates", lambda *_: ["mobilenetv3_small_075", "test_vit"])
    twins = "timm:mobilenetv3_small_075, timm:tf_mobilenetv3_small_075"  # of which TensorFlow's pads otherwise
    with pytest.raises(InputError, match=f"could be of {twins}: say which"):
        load_backbone(path, 5)


def test_a_name_as_checkpoint_stands_for_what_timm_publishes_and_finds_it_again(hub, finetune, images, tmp_path):
    path = hub("test_vit")
    random = torch.get_rng_state()
    by_file, expected = load_backbone(path, 5, "timm:test_vit")
    after = torch.get_rng_state()
    torch.set_rng_state(random)
    by_name, report = load_backbone("timm:test_vit", 5)
    assert torch.equal(torch.get_rng_state(), after)  # a run from either draws the same numbers
    assert base_digests(by_name) == base_digests(by_file)
    assert report == expected | {"licence": "apache-2.0"} and expected["licence"] is None
    assert "timm:test_vit for 160 pixels from a timm checkpoint, licence apache-2.0;" in describe_base(report)
    assert not list(model_problems("timm:test_vit", None, None))
    [problem] = model_problems("timm:vit_giant_patch14_224", None, None)  # before anything is read
    assert problem.startswith("--checkpoint timm:vit_giant_patch14_224: timm has no weights of it")

    results = finetune("--checkpoint timm:test_vit --image-size 32 --epochs 1 --labels-per-class 2")
    adapter = results["folder"] / "lora.pth"
    metadata = read_adapter_file(adapter)["metadata"]
    assert (metadata["checkpoint"], metadata["arch"]) == ("timm:test_vit", "timm:test_vit")
    assert metadata["mean"] == [0.5, 0.5, 0.5]
    evaluated = deploy_lora.main(["evaluate", str(adapter), str(images / "val"), "--device", "cpu"])
    assert evaluated["accuracy"] == results["val_accuracy"]
    command = f"choose timm:test_vit {images / 'train'} --count 2 --image-size 32 --output {tmp_path / 'chosen'}"
    assert len(deploy_lora.main([*command.split(), "--device", "cpu"])) == 2


def test_without_a_connection_one_line_says_what_to_fetch(monkeypatch):
    known = timm.get_pretrained_cfg("test_vit")
    monkeypatch.setattr(timm, "create_model", mock.Mock(side_effect=OSError("no connection\nand much more")))
    for config, place in (
        ({}, "https://huggingface.co/timm/test_vit.r160_in1k/resolve/main/model.safetensors"),
        ({"hf_hub_filename": "a.bin"}, "https://huggingface.co/timm/test_vit.r160_in1k/resolve/main/a.bin"),
        ({"hf_hub_id": None, "url": "http://127.0.0.1:9/a.pth"}, "http://127.0.0.1:9/a.pth"),
    ):
        monkeypatch.setattr(timm, "get_pretrained_cfg", mock.Mock(return_value=dataclasses.replace(known, **config)))
        remedy = f"fetch {place} elsewhere and give its path as --checkpoint, and .* --arch timm:test_vit"
        with pytest.raises(InputError, match=rf"^timm:test_vit cannot be loaded \(no connection\): {remedy}$"):
            load_backbone("timm:test_vit", 5)


# The real architectures of DINOv2 and DINOv3, narrow and of few blocks. The giant one has SwiGLU.
NARROW = {"depth": 2, "embed_dim": 48, "num_heads": 3}
DINO = {f"vit_{name}_dinov2": NARROW for name in ("small_patch14", "small_patch14_reg4", "giant_patch14_reg4")}
DINO |= {"vit_small_patch16_dinov3": NARROW, "vit_small_plus_patch16_dinov3": NARROW}
DINO["convnext_tiny"] = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}


@pytest.fixture(params=DINO)
def dino(request, hub, monkeypatch):
    """Its name, a narrow model from published weights with random adapters, the same without, of timm alone, images."""
    name = request.param
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, **DINO[name]))
    hub(name)
    side = 56 if "patch14" in name else 64
    model, _ = load_backbone(f"timm:{name}", 5, image_size=side)
    for key, parameter in model.named_parameters():
        if "gamma" in key:  # LayerScale, which begins so small that nothing could be told apart
            nn.init.uniform_(parameter, 0.5, 1)
    nn.init.normal_(model.get_submodule(head_name(model)).weight)
    stock = timm.create_model(name, num_classes=5, **({} if name == "convnext_tiny" else {"img_size": side}))
    stock.load_state_dict(model.state_dict())
    return name, randomize_adapters(add_lora_to_model(model, r=2)).eval(), stock.eval(), images(side)


def test_a_dino_is_adapted_and_explained(dino):
    name, model, stock, x = dino
    freeze_backbone_params(model)
    x = x.double()
    dense.compare_with_dense(stock, model.double(), [x], EXACT)
    assert unused_adapters(model) == []

    twin = dense.dense_twin(stock, model)
    [*_, last] = twin.stages if name == "convnext_tiny" else twin.blocks
    heat, _ = written_out(twin, x, last, getattr(twin, "num_prefix_tokens", 0))
    found, _ = grad_cam(model, x)
    assert_close(found, heat, FP32)


@pytest.mark.slow
def test_a_dino_is_exported(dino, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    name, model, _, x = dino
    about = {"arch": f"timm:{name}", "class_names": list("abcde"), "image_size": x.shape[-1]}
    LoRAManager(model).save_lora_checkpoint(tmp_path / "lora.pth", about | {"checkpoint": f"timm:{name}"})
    deploy_lora.main(f"export {tmp_path}/lora.pth --output {tmp_path}/model.onnx".split())
    [answers] = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"images": x.numpy()})
    loaded, _ = load_finetuned(tmp_path / "lora.pth")
    assert_close(torch.tensor(answers), loaded(x), FP32)


@pytest.mark.parametrize("name, channels", [("test_vit", 1), ("test_vit", 7), ("test_resnet", 2)])
def test_a_first_layer_is_fitted_as_timm_does(name, channels, checkpoint):
    path, theirs = checkpoint(name)
    model, report = load_backbone(path, 5, f"timm:{name}", channels=channels, channel_fit="timm")
    first = f"{backbones.first_convolution(model)}.weight"
    assert torch.equal(model.state_dict()[first], timm.models.adapt_input_conv(channels, theirs.state_dict()[first]))
    assert (report["channels"], report["channel_fit"]) == (channels, "timm")
    with pytest.raises(InputError, match=rf"for images of 3 channels, not {channels}.*channel_fit=.timm"):
        load_backbone(path, 5, f"timm:{name}", channels=channels)
    path, _ = checkpoint(name, in_chans=channels)
    assert load_backbone(path, 5, f"timm:{name}")[1]["channels"] == channels


def test_a_position_embedding_is_interpolated_as_timm_does(checkpoint):
    path, theirs = checkpoint("test_vit", img_size=64)
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


# Of an activation: how many tensors a frozen BatchNorm with it keeps for backward, and whether that is its output,
# which the next layer keeps anyway.
ACTIVATIONS = {None: (0, False), nn.Identity: (0, False), nn.ReLU: (1, True), nn.ReLU6: (1, True), nn.SiLU: (1, False)}
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def frozen_norm(activation: type | None, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A stock BatchNorm, or timm's with an activation, in eval mode; and its frozen twin, as it comes from a file."""
    torch.manual_seed(2)
    stock = timm.layers.BatchNormAct2d(5, act_layer=activation) if activation else nn.BatchNorm2d(5)
    dense.seen(stock).to(dtype).eval().requires_grad_(False)
    twin = copy.deepcopy(stock)
    freeze_statistics(twin, freeze=True, training=True)
    return stock, pickle.loads(pickle.dumps(twin))


@pytest.mark.parametrize(("norm_dtype", "dtype"), [(F64, F64), (BF16, BF16), (F32, BF16)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_frozen_batch_norm_is_the_stock_one_and_keeps_at_most_its_output(activation, layout, norm_dtype, dtype):
    stock, twin = frozen_norm(activation, norm_dtype)
    x = (3 * torch.randn(2, 5, 4, 3, dtype=dtype)).to(memory_format=layout).requires_grad_()
    gy = torch.randn(2, 5, 4, 3, dtype=dtype)
    outputs = [stock(x)]
    kept = saved_storages(lambda: outputs.append(twin(x)))
    expected, found = outputs
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found, x, gy)
    (expected_gradient,) = torch.autograd.grad(expected, x, gy)
    assert_close(gradient, expected_gradient, 1e-12 if dtype == F64 else 1e-2)
    if dtype == F64:
        assert torch.autograd.gradgradcheck(twin, x)
        tensors, is_output = ACTIVATIONS[activation]
        assert round(sum(kept.values()) / x.nbytes) == tensors
        assert (found.untyped_storage().data_ptr() in kept) == is_output


def test_a_relu6_is_called_where_it_is_watched_or_a_layer_comes_before_it():
    stock, twin = frozen_norm(nn.ReLU6)
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    watched = []
    for layer in (twin.act, twin.drop):
        with layer.register_forward_hook(lambda module, inputs, output: watched.append(output)):
            assert torch.equal(twin(x), stock(x))
    assert torch.equal(watched[0], stock(x)) and len(watched) == 2
    stock.drop = twin.drop = nn.Softplus()
    assert torch.equal(twin(x), stock(x))


def timm_blocks() -> dict[str, tuple[nn.Module, int]]:
    """Blocks of timm's with activations of each kind, and how many of their BatchNorms no convolution takes in."""
    with_gate = {"se_layer": BLOCKS.SqueezeExcite, "act_layer": nn.SiLU}
    replaced = timm.layers.ConvNormAct(3, 4, act_layer=nn.ReLU6)
    replaced.bn = nn.BatchNorm2d(4)
    return {
        "inverted": (BLOCKS.InvertedResidual(3, 3, exp_ratio=2.0, act_layer=nn.ReLU6), 0),
        "inverted, with a gate": (BLOCKS.InvertedResidual(3, 4, stride=2, exp_ratio=2.0, **with_gate), 0),
        "inverted, TensorFlow's padding": (BLOCKS.InvertedResidual(3, 4, stride=2, pad_type="same"), 1),
        "separable": (BLOCKS.DepthwiseSeparableConv(3, 3, act_layer=nn.Hardswish), 0),
        "separable, from space to depth": (BLOCKS.DepthwiseSeparableConv(3, 4, s2d=1), 2),
        "edge": (BLOCKS.EdgeResidual(3, 3, exp_ratio=2.0, act_layer=nn.ReLU6), 0),
        "one convolution": (BLOCKS.ConvBnAct(3, 3, 3, skip=True), 0),
        "layers": (timm.layers.ConvNormAct(3, 4, 3, act_layer=nn.ReLU6, bias=True), 0),
        "a norm of another kind": (timm.layers.ConvNormAct(3, 4, norm_layer=timm.layers.LayerNorm2d), 0),
        "a norm without activation": (replaced, 1),
    }


@pytest.mark.parametrize("name", timm_blocks())
def test_a_block_of_timm_s_folds_its_batch_norms(name):
    """It computes what the stock block does, also where adapters are merged or a norm trains, and in bf16."""
    stock, unfolded = timm_blocks()[name]
    stock = dense.seen(stock).double().eval()
    x = images(16, dtype=torch.float64)
    model = randomize_adapters(add_lora_to_model(copy.deepcopy(stock).requires_grad_(False), r=2), 0.3)
    dense.compare_with_dense(stock, model, [x], EXACT)  # its BatchNorms are timm's still
    freeze_backbone_params(model)
    for network in (model, pickle.loads(pickle.dumps(model)).train()):
        assert dense.count_operations(lambda network=network: network(x), "batch_norm") == unfolded
        dense.compare_with_dense(stock, network, [x], EXACT)
    expected = model(x)
    manager = LoRAManager(model)
    manager.merge_lora_weights()
    assert_close(model(x), expected, EXACT)
    with torch.no_grad():
        assert_close(model(x), expected, EXACT)
    manager.unmerge_lora_weights()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(copy.deepcopy(model).float()(x.float()), expected, 3e-2)
    for norm in filter(lambda module: isinstance(module, nn.BatchNorm2d), model.modules()):
        norm.weight.requires_grad_()
    dense.compare_with_dense(stock, model, [x], EXACT)
    assert dense.classes(manager.unload(merge=True)) == dense.classes(stock)


@pytest.mark.parametrize(("groups", "stride", "widened"), [(6, 2, True), (6, 1, False), (2, 2, False)])
def test_a_strided_depthwise_convolution_of_timm_s_trains_in_float32(groups, stride, widened):
    """In bf16 its gradient takes a CPU 16 times as long or more. Answers, and other convolutions, are in bf16."""
    torch.manual_seed(0)
    stock = nn.Sequential(timm.layers.Conv2dSame(6, 6, 3, stride=stride, groups=groups))
    model = copy.deepcopy(stock)
    fuse(model)
    x = torch.randn(2, 6, 9, 9, requires_grad=True)
    gy = torch.randn_like(stock(x)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = stock(x)
        trains = model(x)
        with torch.no_grad():
            assert torch.equal(model(x), rounded)
    assert trains.dtype == torch.bfloat16
    assert torch.equal(trains, stock(x).bfloat16() if widened else rounded)
    [gx] = torch.autograd.grad(trains, x, gy, retain_graph=True)
    [expected] = torch.autograd.grad(stock(x) if widened else rounded, x, gy.float() if widened else gy)
    assert torch.equal(gx, expected)
    unfuse(model)
    assert dense.classes(model) == dense.classes(stock)


class InvertedResidual(BLOCKS.InvertedResidual):
    """It calls a convolution twice, the second time for its own output."""

    __module__ = "timm.irregular"

    def forward(self, x):
        x = self.bn1(self.conv_pw(x))
        x = self.bn2(self.conv_dw(x)) + self.conv_dw(x)
        return self.bn3(self.conv_pwl(self.bn2(x)))


def test_a_convolution_of_timm_s_is_its_own_where_no_batch_norm_follows():
    """Called from elsewhere, a second time, by another thread, or where a hook sees it."""
    stock = dense.seen(InvertedResidual(3, 3, exp_ratio=2.0, act_layer=nn.SiLU)).double().eval()
    model = frozen(copy.deepcopy(stock), 0.3)
    assert type(model) is not InvertedResidual
    x = images(16, dtype=torch.float64)
    dense.compare_with_dense(stock, model, [x], EXACT)
    assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x), EXACT)  # where nothing is folded
    with pytest.raises(RuntimeError):
        model(x[:, :2])  # it fails before the second convolution
    twin = dense.dense_twin(stock, model)
    hidden = twin.conv_pw(x).detach()
    found = [model.conv_pw(x), model.conv_dw(hidden)]
    for layer in (model.conv_pw, model.bn1):
        with layer.register_forward_hook(lambda module, inputs, output: found.append(output)):
            model(x)

    thread = ThreadPoolExecutor(1)
    with model.bn1.act.register_forward_hook(lambda *_: found.append(thread.submit(model.conv_dw, hidden).result())):
        model(x)
    depthwise = twin.conv_dw(hidden)
    assert_close(found, [hidden, depthwise, hidden, twin.bn1(hidden), depthwise], EXACT)
