"""Fused blocks, and what is kept for backward: BatchNorms folded into the convolutions before them, the pooled stem;
LayerNorm and GELU recomputed, gradient checkpointing, a model's two halves."""

import contextlib
import copy
from functools import partial

import dense
import pytest
import torch
from dense import BF16, DEVICES, EXACT, FP32, assert_close, compare_with_dense, dense_twin, frozen, images, resnet, vit
from torch import nn
from torchvision.models.googlenet import BasicConv2d
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import ConvStemConfig, EncoderBlock

from finetune_lora import add_lora_to_model, freeze_backbone_params, set_gradient_checkpointing
from lora import fusion, split
from tests.run_folders import assert_same
from toolkit import InputError
from toolkit.models import norms
from toolkit.models.backbones import build_backbone, head_name

bottleneck = partial(resnet, Bottleneck)


class PreActivation(BasicBlock):
    """conv1 is followed by bn2, and conv2 by nothing."""

    def forward(self, x):
        return x + self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))


class BatchNormAct(nn.BatchNorm2d):
    """BatchNorm and activation in one, as in timm."""

    def forward(self, x):
        return super().forward(x).relu()


class FusedBasicConv2d(norms.Extended):
    """A block of GoogLeNet, of which the toolkit knows nothing: a convolution, a BatchNorm and a ReLU."""

    def forward(self, x):
        return fusion.conv_bn_relu(self.conv, self.bn, nn.ReLU(), x)


def models() -> dict[str, tuple[nn.Module, int]]:
    """Which layers stand in which order, and how many of the BatchNorms cannot be folded."""
    conv = nn.Conv2d(3, 3, 3, padding=1)
    norm = nn.BatchNorm2d(3)
    relu = nn.ReLU()
    stem = [ConvStemConfig(8, 3, 2), ConvStemConfig(16, 3, 2)]
    batch_alone = nn.BatchNorm2d(3, track_running_stats=False)
    return {
        "basic blocks": (resnet(), 0),
        "bottlenecks": (bottleneck(), 0),
        "MoCo v3's convolutional stem": (vit(conv_stem_configs=stem, patch_size=4), 0),
        "no scale": (nn.Sequential(conv, nn.BatchNorm2d(3, affine=False)), 0),
        "no statistics": (nn.Sequential(nn.Conv2d(3, 3, 3, bias=False), batch_alone), 1),
        "something between that is used before": (nn.Sequential(relu, conv, relu, norm), 1),
        "a shared BatchNorm": (nn.Sequential(conv, norm, nn.Conv2d(3, 3, 3), norm), 0),
        "a shared convolution": (nn.Sequential(conv, norm, conv), 0),
        "a BatchNorm before": (nn.Sequential(norm, conv), 1),
        "an activation in the BatchNorm": (nn.Sequential(conv, BatchNormAct(3)), 1),
        "two BatchNorms": (nn.Sequential(conv, norm, nn.BatchNorm2d(3)), 1),
        "a linear layer before": (nn.Sequential(nn.Linear(16, 16), norm), 1),
        "a forward of its own": (PreActivation(3, 3), 2),
        "another block in the table": (nn.Sequential(BasicConv2d(3, 4, kernel_size=3)), 0),
    }


@pytest.mark.filterwarnings("ignore:the last layer")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("case", models())
def test_a_batch_norm_is_folded_if_it_follows_a_convolution(case, memory_format, monkeypatch):
    """What is computed is what the stock model computes, also where the convolution's bias trains."""
    monkeypatch.setitem(fusion.FUSED, BasicConv2d, FusedBasicConv2d)
    stock, unfolded = models()[case]
    stock = dense.seen(stock).double().eval()
    x = images(16, dtype=torch.float64).to(memory_format=memory_format)
    options = {"target_modules": ["conv_proj", "mlp"]} if hasattr(stock, "conv_proj") else {}
    model = frozen(copy.deepcopy(stock).to(memory_format=memory_format), **options)
    assert dense.count_operations(lambda: model(x), "batch_norm") == unfolded
    assert [k for k in model.state_dict() if "lora_" not in k] == list(stock.state_dict())
    for training in (True, False):
        compare_with_dense(stock, model.train(training), [x], EXACT)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.requires_grad_()
    compare_with_dense(stock, model, [x], EXACT)


# Only its mode tells this BatchNorm from a frozen one; a bias before it would have no gradient.
no_scale = partial(nn.Sequential, nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False))
ALL_NORMS = ()
TRAINED = [  # which model, what trains beside its adapters, and whether its BatchNorms are folded
    (bottleneck, ("conv2.weight",), True),  # a constant BatchNorm folds into a kernel that trains
    (bottleneck, ("bn1.weight", "bn1.bias"), False),  # but not where its own scale does
    (vit, ("ln_1.weight", "ln_2.bias"), True),
    (vit, ("in_proj_weight", "mlp.0.weight", "mlp.3.weight"), True),  # behind a LayerNorm that does not train
    *((build, ALL_NORMS, build is vit) for build in (resnet, bottleneck, vit, no_scale)),
]


@pytest.mark.filterwarnings("ignore:the last layer")
@pytest.mark.parametrize("build, names, folded", TRAINED)
def test_what_trains_beside_the_adapters_gets_its_gradients(build, names, folded):
    """And a BatchNorm that trains normalises by the batch and counts it."""
    stock = build().double().train(names == ALL_NORMS)
    x = images(16 if build is vit else 32, 8, dtype=torch.float64)
    model = frozen(copy.deepcopy(stock), std=0.3).train()
    if names == ALL_NORMS:
        freeze_backbone_params(model, train_norms=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith(names))
    assert (dense.count_operations(lambda: copy.deepcopy(model)(x), "batch_norm") == 0) == folded
    compare_with_dense(stock, model, [x], EXACT)


LOW = [  # autocast's dtype, what the base is stored in, and the relative error
    (torch.bfloat16, None, 5e-2),
    (torch.float16, None, 1e-2),
    (torch.float16, torch.float16, 1e-2),
    (None, torch.int8, 6e-2),
    (torch.bfloat16, torch.int8, 1e-1),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("autocast, base_dtype, tolerance", LOW)
def test_a_vit_in_low_precision(autocast, base_dtype, tolerance, mode, device):
    """Of the shapes that the kernels of GPUs are made for: 64 channels a head, 64 patches beside the class token. On
    GPUs without bfloat16 `--precision auto` takes float16."""
    stock = vit(hidden_dim=128, mlp_dim=256, image_size=64).to(device)
    model = frozen(copy.deepcopy(stock), base_dtype=base_dtype)
    set_gradient_checkpointing(model, mode)
    compare_with_dense(stock, model, [images(64, 4).to(device)], tolerance, autocast=autocast)


CHANGES = {
    "another scale": lambda norm: nn.init.constant_(norm.weight, 3.0),
    "statistics in training": lambda norm: norm.train()(torch.randn(4, 4, 5, 5)),
    "a state that is loaded": lambda norm: norm.load_state_dict({**norm.state_dict(), "running_var": torch.ones(4)}),
    "behind autograd's back": lambda norm: norm.running_mean.data.copy_(torch.ones(4)),
    "other data": lambda norm: setattr(norm.bias, "data", torch.ones(4)),
    "a buffer beside others in one storage": lambda norm: setattr(norm, "running_mean", torch.arange(8.0)[4:]),
    "another epsilon": lambda norm: setattr(norm, "eps", 0.5),
    "the weight alone trains": lambda norm: norm.weight.requires_grad_(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("around", [contextlib.nullcontext, norms.constants_kept])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_folded_batch_norm_is_what_it_is_at_each_call(change, mode, around):
    """But for changes behind autograd's back where constants are kept."""
    if "autograd" in change:
        around = contextlib.nullcontext
    stock = dense.seen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model = frozen(copy.deepcopy(stock)).eval()
    x = images(8)
    with around():
        with mode():
            model(x)
        with torch.no_grad():
            CHANGES[change](model[1])
        model.eval()
        twin = dense_twin(stock, model).eval()
        twin[1].load_state_dict(model[1].state_dict())
        twin[1].eps = model[1].eps
        with mode():
            assert_close(model(x), twin(x.double()), FP32)


def test_a_norm_s_constants_are_computed_once_in_training_and_where_nothing_trains(monkeypatch):
    model = frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = images(8)
    with norms.constants_kept():
        with torch.inference_mode():
            model(x)
        assert dense.count_operations(lambda: model(x).sum().backward(), "rsqrt") == 0  # of what no gradients computed
        assert dense.count_operations(lambda: model.double()(x.double()), "rsqrt") == 1
        with torch.inference_mode():  # whose tensors do not count what is written to them
            built = frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
            before = built(x)
            built[1].running_mean += 1
            assert dense.relative_error(before, built(x)) > 0.1
    for around in (contextlib.nullcontext, norms.constants_kept):
        # A graph would hold what is kept as it is now.
        monkeypatch.setattr(norms.devices, "is_traced", lambda around=around: around is norms.constants_kept)
        with around():
            assert [dense.count_operations(lambda: model(x.double()), "rsqrt") for _ in range(2)] == [1, 1]


def test_a_norm_s_constants_are_of_the_rows_that_are_given_and_of_what_trains_now():
    norm = nn.BatchNorm2d(4).requires_grad_(False)
    means = torch.stack([torch.zeros(4), torch.ones(4)])  # two rows of one tensor
    variance = torch.ones(4)
    expected = 1 / (1 + norm.eps) ** 0.5
    with norms.constants_kept():
        for row in (0, 1):
            _, shift = norms.constant_scale_and_shift(norm, means[row], variance, None)
            assert shift.tolist() == pytest.approx([-row * expected] * 4)
        norm.weight.requires_grad_(True)
        for step in (1, 2):
            scale, _ = norms.constant_scale_and_shift(norm, means[1], variance, None)
            scale.sum().backward()
            assert norm.weight.grad.tolist() == pytest.approx([step * expected] * 4)


# Bytes of numbers that are left out. A ResNet pools first and rectifies after: a whole map is not saved. The last block
# of a ViT has keys and values of every token, but of four patches no query, attention's output, residual's middle and
# input of the last LayerNorm, 16 numbers each, nor what the MLP keeps, the input of GELU, which is twice as wide.
LEFT_OUT = {"relu": (bottleneck, 32, 2 * 16 * 16 * 16 * 4)}
LEFT_OUT |= dict.fromkeys(("encoder", "encoder.ln"), (vit, 16, 2 * 4 * (4 + 2) * 16 * 4))


@pytest.mark.parametrize("listener", LEFT_OUT)
def test_the_stem_s_map_and_the_last_block_s_patches_are_not_saved(listener):
    """But who listens gets the usual order, and every token."""
    build, side, left_out = LEFT_OUT[listener]
    model = frozen(build())
    without = dense.saved_bytes(model, images(side))
    handle = model.get_submodule(listener).register_forward_hook(lambda *_: None)
    assert dense.saved_bytes(model, images(side)) >= without + left_out
    handle.remove()
    assert dense.saved_bytes(model, images(side)) == without


@pytest.mark.parametrize("adapters", [None, {"adapt_last": 1}, {"target_modules": "mlp"}], ids=str)
@pytest.mark.parametrize("autocast, tolerance", [(None, FP32), (torch.bfloat16, 3 * BF16)])
def test_frozen_attention_is_the_stock_one_batch_first(adapters, autocast, tolerance):
    """And no product is made for each token; it drops its weights in training alone, and a hook sees the stock call."""
    stock = vit()
    x = images(16)
    for block in stock.encoder.layers:  # PyTorch starts the biases as zero
        nn.init.normal_(block.self_attention.in_proj_bias)
        nn.init.normal_(block.self_attention.out_proj.bias)
    model = copy.deepcopy(stock).train()
    if adapters is not None:
        dense.randomize_adapters(add_lora_to_model(model, **adapters))
    freeze_backbone_params(model)
    assert dense.count_operations(lambda: model(x).sum().backward(), "bmm") == 0
    compare_with_dense(stock, model, [x], tolerance, autocast=autocast)
    block = model.encoder.layers[0]
    assert isinstance(block, fusion.FusedEncoderBlock)
    expected = model.eval()(x)
    block.self_attention.dropout = 0.5
    assert dense.relative_error(model.train()(x), expected) > 1e-2
    assert_close(model.eval()(x), expected, FP32)
    given = []
    block.self_attention.register_forward_hook(lambda module, arguments, output: given.append(len(arguments)))
    block.mlp[0].register_forward_hook(lambda module, arguments, output: given.append(tuple(output.shape)))
    assert_close(model(x), expected, FP32)
    assert given == [3, (2, 5, 32)]  # query, key and value; and of a frozen MLP's layer
    freeze_backbone_params(model, freeze=False)  # what trains is torchvision's
    assert type(model.encoder.layers[0]) is EncoderBlock or adapters is not None


def dropping(elsewhere: float = 0.2, **options) -> nn.Module:
    """Of tokens, and of attention and the adapters' inputs. It keeps LayerNorm's and GELU's output in every mode."""
    return frozen(vit(dropout=0.2, attention_dropout=elsewhere), 0.3, lora_dropout=elsewhere, **options)


def of_timm(name: str, *size: int) -> nn.Module:
    pytest.importorskip("timm")
    return frozen(build_backbone(f"timm:{name}", 5, *size), 0.3)


# How a model is made, and what it keeps for backward then, as a share of what it kept before.
WAYS = {
    "adapters in a vit": (lambda: frozen(vit(), 0.3), 0.6),
    "adapters in a resnet": (lambda: frozen(resnet()), 0.9),
    "all of a resnet trains": (lambda: dense.randomize_adapters(add_lora_to_model(resnet(), r=2)), 0.8),
    "a stock resnet": (resnet, 0.8),
    "a resnet with the statistics of all processes": (resnet, 0.8),
    "a stock vit": (vit, 0.8),
    "a vit of timm's": (lambda: of_timm("test_vit", 16), 0.1),
    "a resnet of timm's": (lambda: of_timm("test_resnet"), 0.9),
    "an EfficientNet": (lambda: of_timm("test_efficientnet"), 0.5),
    "dropout": (dropping, 1.0),
    "dropout of tokens alone": (lambda: dropping(0.0), 1.0),
    "dropout over 4 bits": (lambda: dropping(use_qlora=True), 1.0),
}


@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_changes_memory_and_nothing_else(way, monkeypatch):
    """The same values are dropped the second time, and a BatchNorm that trains counts a batch once. It is undone."""
    monkeypatch.setattr(norms.distributed, "world_size", lambda: 2)  # whose sums are this one's
    monkeypatch.setattr(norms.dist, "all_reduce", lambda sums: None)
    build, share = WAYS[way]
    model = build().train()
    if "all processes" in way:
        norms.share_statistics(model)
    x = images(32 if "resnet" in way else 16, 8)
    plain = copy.deepcopy(model)
    expected, wanted = dense.loss_and_gradients(plain, x)
    before = dense.saved_bytes(copy.deepcopy(model), x)
    set_gradient_checkpointing(model, "full")
    assert list(model.state_dict()) == list(plain.state_dict())
    loss, gradients = dense.loss_and_gradients(model, x)
    assert torch.equal(loss, expected)
    assert_close(gradients, wanted, FP32)
    assert_same(dict(plain.named_buffers()), dict(model.named_buffers()))
    assert dense.saved_bytes(model, x) <= share * before
    set_gradient_checkpointing(model, "none")
    assert dense.saved_bytes(model, x) == before
    assert torch.equal(dense.loss_and_gradients(model, x)[0], expected)
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert type(ours) is type(theirs) and vars(ours).keys() == vars(theirs).keys()


@pytest.mark.parametrize("autocast", [False, True])
def test_what_a_block_keeps(autocast):
    """In bytes, of a block before the last, for 8 images of 5 tokens: the output of neither LayerNorm nor GELU."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        two, three = (dense.saved_bytes(frozen(vit(num_layers=layers)).train(), images(16, 8)) for layers in (2, 3))
    width, mlp, heads, packed = 16, 32, 2, 3 * 2 * 16 * 2  # packed: the A and B of q, k and v, one below the other
    kept = 3 * width + width + heads + mlp  # q, k, v, what the heads answer with its log-sum-exps, the input of GELU
    expected = 4 * (8 * 5 * (2 * width + kept) + packed)  # and the residual before and in the middle
    if autocast:  # the sum in the middle is of float32, as are log-sum-exps, and attention's share is kept
        low = 2 * (width + kept - heads + 6 * 2)  # and what the six adapters make of their inputs
        factors = packed + 2 * (width + width) + 2 * 2 * (width + mlp)  # rounded once, for both directions
        expected = 8 * 5 * (4 * width + low + 4 * heads) + 2 * factors
    assert three - two == expected


@pytest.mark.parametrize("last", [None, 1, 2])
@pytest.mark.parametrize("build, side", [(resnet, 32), (vit, 16)], ids=["resnet", "vit"])
def test_the_halves_of_a_model_are_the_model(build, side, last):
    """Outputs and gradients, whether its blocks are adapted or stock; the halves share its layers."""
    stock = build().double().eval()
    x = images(side, dtype=torch.float64)
    for model in (stock, frozen(copy.deepcopy(stock), adapt_last=last).eval()):
        lower, upper = split.split_model(model, last)
        assert {id(p) for p in upper.parameters()} == {id(p) for p in model.parameters()}
        features = lower(x).detach()
        above = list(model.get_submodule(head_name(model)).parameters())
        if last is not None and model is not stock:
            above = list(dense.trained(model).values())
        results = []
        for output in (model(x), upper(features)):
            results.append((output, *torch.autograd.grad(output.square().sum(), above)))
        assert_close(*results, EXACT)


def test_another_model_has_no_halves_and_nothing_to_recompute():
    model = SwinTransformer([4, 4], 24, [2], [2], [4, 4], num_classes=5)
    for mode, message in (("full", "full finds nothing to recompute"), ("selective", "choose none or full")):
        with pytest.raises(InputError, match=message):
            set_gradient_checkpointing(model, mode)
    with pytest.raises(InputError, match="not SwinTransformer"):
        split.split_model(model, 1)
    assert split.split_model(model, None)[1](torch.ones(2, 24)).shape == (2, 5)
