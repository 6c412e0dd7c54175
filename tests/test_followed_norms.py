"""BatchNorms that follow the adapters, against PyTorch's own operations and automatic differentiation in float64."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from dense import EXACT, assert_close, frozen, images, loss_and_gradients, randomize_adapters, resnet
from torch import nn
from torchvision.models.resnet import Bottleneck

from finetune_lora import add_lora_to_model, freeze_backbone_params
from lora import followed_norms
from lora.followed_norms import FollowedNorm, follow_statistics, followers, patches_of, principal_components
from lora.fusion import conv_bn, conv_bn_relu
from lora_utils import LoRAManager, read_adapter_file
from toolkit import InputError

KINDS = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1, "bias": False},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
}
X = images(count=8, generator=torch.Generator().manual_seed(3))


def layers(kind: dict, dtype=torch.float64) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv, norm = model = nn.Sequential(nn.Conv2d(4, 6, **kind), nn.BatchNorm2d(6, eps=0.1)).to(dtype)
    nn.init.uniform_(norm.weight, -1, 1)  # a scale may be negative
    nn.init.normal_(norm.bias)
    norm.weight.data[0] = 0  # as the last BatchNorm of a block begins
    for _ in range(50):
        model(inputs(dtype))
    frozen(model, std=0.0, lora_alpha=6, target_modules="0")
    return conv, norm


def inputs(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(8, 4, 9, 7, dtype=dtype) + 0.5


@pytest.fixture(params=KINDS)
def pair(request):
    conv, norm = layers(KINDS[request.param])
    conv.followed = FollowedNorm(conv, norm, torch.cat([patches_of(conv, inputs(), 256) for _ in range(2)]))
    return randomize_adapters(conv), norm


def dense(conv, norm, x, residual=None):
    """What convolution, BatchNorm and ReLU are to compute, one after the other, by the formulas of the module."""
    followed = conv.followed
    W = conv.base().tensor.flatten(1)
    C = followed.inputs.T @ followed.inputs
    K = W + conv.scaling * conv.lora_B @ conv.lora_A
    v = [(kernel @ C @ kernel.T).diagonal() + 0.01 * norm.running_var for kernel in (W, K)]
    mean = norm.running_mean + (K - W) @ followed.centre
    variance = norm.running_var * v[1] / v[0]
    z = nn.Conv2d._conv_forward(conv, x, K.view_as(conv.weight), conv.bias)
    scale = norm.weight / (variance + norm.eps).sqrt()
    y = (z - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
    return F.relu(y if residual is None else y + residual)


def assert_same_gradients(y: torch.Tensor, wanted: torch.Tensor, of: list[torch.Tensor]) -> None:
    """And the same outputs."""
    torch.testing.assert_close(y, wanted)
    gy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, of, gy), torch.autograd.grad(wanted, of, gy))


@pytest.mark.parametrize("size", [(3, 4, 9, 7), (1, 4, 2, 2)], ids=["larger", "smaller"])  # than the kernel
@pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])
def test_outputs_and_gradients_are_those_of_automatic_differentiation(pair, has_residual, size):
    conv, norm = pair
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    of = [x, conv.lora_A, conv.lora_B]
    residual = None
    if has_residual:
        residual = torch.randn_like(conv(x)).requires_grad_()
        of.append(residual)
    for conv.weight.requires_grad in (True, False):
        wanted = dense(conv, norm, x, residual)
        assert_same_gradients(conv_bn_relu(conv, norm, nn.ReLU(), x, residual), wanted, of)
    with torch.no_grad():
        torch.testing.assert_close(conv_bn_relu(conv, norm, nn.ReLU(), x, residual), wanted)
    if not has_residual:  # without a ReLU too, as in a shortcut
        torch.testing.assert_close(F.relu(conv_bn(conv, norm, x)), wanted)


def test_a_convolution_that_cannot_fold_its_norm_gives_it_the_same_statistics(pair):
    """One that is hooked, or whose scale trains: the BatchNorm itself computes."""
    conv, norm = pair
    x = torch.randn(3, 4, 9, 7, dtype=torch.float64)
    wanted = dense(conv, norm, x)
    seen = []
    hook = norm.register_forward_hook(lambda *call: seen.append(call[-1]))
    torch.testing.assert_close(conv_bn_relu(conv, norm, nn.ReLU(), x), wanted)
    assert len(seen) == 1
    conv.lora_enabled = False
    base = norm(conv(x)).relu()  # by the BatchNorm's own statistics, which are the base's
    torch.testing.assert_close(conv_bn_relu(conv, norm, nn.ReLU(), x), base)
    conv.lora_enabled = True
    hook.remove()
    norm.weight.requires_grad_()
    assert_same_gradients(conv_bn_relu(conv, norm, nn.ReLU(), x), wanted, [conv.lora_A, conv.lora_B])
    assert torch.equal(norm.running_mean, conv.followed.base_mean)
    norm.frozen = False
    norm.train()(torch.randn(4, 6, 3, 3, dtype=torch.float64))
    conv_bn(conv, norm, x)  # from now on its statistics are its own
    assert conv.followed is None


def test_statistics_move_with_the_model():
    conv, norm = layers(KINDS["3x3"], torch.float32)
    x = inputs(torch.float32)
    conv.followed = FollowedNorm(conv, norm, patches_of(conv, x, 256))
    nn.Sequential(randomize_adapters(conv), norm).double()
    torch.testing.assert_close(conv_bn_relu(conv, norm, nn.ReLU(), x.double()), dense(conv, norm, x.double()))
    conv.float(), norm.float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert conv_bn(conv, norm, x).dtype == torch.bfloat16


def test_a_variance_stays_positive_in_spite_of_rounding_and_of_channels_that_are_always_zero():
    conv, norm = layers(KINDS["3x3"])
    conv.weight.data[0] = norm.running_var[0] = 0
    conv.followed = FollowedNorm(conv, norm, torch.randn(64, 36, dtype=torch.float64))
    _, variance = conv.followed.statistics(randomize_adapters(conv))
    assert variance.isfinite().all() and (variance[1:] > 0).all()
    conv.followed.spread /= 1e3  # as if v(W) had been rounded down
    conv.lora_B.data *= -0.01
    _, variance = conv.followed.statistics(conv)
    assert (variance[1:] > 0).all()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("later", [{}, {"padding": (2, 3)}], ids=["as built", "padding changed"])
def test_patches_are_what_the_kernel_is_applied_to(kind, later):
    """Products with them are numbers of the convolution's output."""
    conv = nn.Conv2d(4, 6, **kind | {"bias": False}).double()
    vars(conv).update(later)
    x = inputs()
    outputs = conv(x).permute(0, 2, 3, 1).flatten(0, 2)
    patches = patches_of(conv, x, 20)
    assert torch.cdist(patches @ conv.weight.flatten(1).T, outputs).amin(1).max() < 1e-6
    assert torch.equal(patches_of(conv, x, 20), patches)


def test_directions_without_variance_do_no_harm():
    """Such as those of channels that are dead, and of a kernel's places that see padding alone."""
    dead = torch.zeros(512, 288)
    dead[:, torch.randperm(288)[:70]] = torch.randn(512, 70).relu()
    like_the_mean = torch.zeros(256, 512)
    like_the_mean[torch.randperm(256)[:30]] = torch.randn(30, 512)
    for rows in (dead - dead.mean(0), like_the_mean):
        components = principal_components(rows, 100)
        torch.testing.assert_close(components.T @ components, rows.T @ rows / len(rows), atol=1e-5, rtol=1e-4)
    assert not principal_components(torch.zeros(8, 4), 3).any()


@functools.cache
@torch.no_grad()
def base_resnet() -> nn.Module:
    """A ResNet with a block in each stage, and statistics as after training."""
    torch.manual_seed(0)
    model = resnet(classes=3)
    model.apply(lambda module: isinstance(module, nn.BatchNorm2d) and module.reset_parameters())
    for _ in range(3):
        model(torch.randn(16, 3, 32, 32))
    return model


def adapted_resnet() -> nn.Module:
    model = copy.deepcopy(base_resnet())
    torch.manual_seed(0)
    freeze_backbone_params(add_lora_to_model(model, r=2))
    return model


def test_patches_are_of_all_batches(monkeypatch):
    """As many of each of three: 512 / 3, rounded up."""
    seen = []
    monkeypatch.setattr(followed_norms, "FollowedNorm", lambda conv, norm, patches: seen.append(len(patches)))
    follow_statistics(adapted_resnet(), torch.randn(3, 2, 3, 32, 32))
    assert set(seen) == {3 * 171}


def test_outputs_that_follow_may_be_changed_in_place():
    """Behind a shortcut, and by another activation than ReLU."""
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    found = []
    for in_place in (False, True):
        model = adapted_resnet().double()
        model.layer2[0].downsample.append(nn.ReLU(inplace=in_place))
        model.layer3[0].relu = nn.Hardswish(inplace=in_place)
        follow_statistics(model, [x])
        randomize_adapters(model, std=0.02)
        found.append(loss_and_gradients(model.train(), x))
    assert_close(*found, EXACT)


def test_a_model_that_follows_begins_as_its_base_and_has_batch_norms_own_statistics_later():
    """Of the first that follows, whose inputs stay: nearly those that BatchNorm measures on the sampled images."""
    model = adapted_resnet()
    x = F.interpolate(torch.randn(64, 3, 8, 8), 32, mode="bilinear")  # as smooth as photographs
    model.eval()
    before = model(x).detach()
    follow_statistics(model, [x])
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-4, atol=1e-4)
    conv, norm = model.layer1[0].conv1, model.layer1[0].bn1
    assert model.conv1.followed is None  # the stem stays frozen
    with torch.no_grad():
        x = model.stem(x)
        stock = torch.var_mean(conv(x), (0, 2, 3))
        conv.lora_B.normal_(std=0.05)
        changed = torch.var_mean(conv(x), (0, 2, 3))
    mean, variance = conv.followed.statistics(conv)
    shifts = mean - norm.running_mean, changed[1] - stock[1]
    ratios = variance / norm.running_var, changed[0] / stock[0]
    assert (ratios[1] - 1).abs().mean() > 0.25  # there is something to follow
    assert (ratios[0] / ratios[1] - 1).abs().mean() < 0.1
    assert (shifts[0] - shifts[1]).abs().mean() < 0.2 * shifts[1].abs().mean()


@torch.no_grad()
def answers(model: nn.Module) -> torch.Tensor:
    return model.eval()(X)


def statistics(tensors) -> set[str]:
    return {name for name in tensors if name.rpartition(".")[2] in ("running_mean", "running_var")}


def test_a_batch_norm_behind_a_layer_that_is_only_stored_in_fewer_bits_has_nothing_to_follow(tmp_path):
    """Its statistics are the base's, and no part of the file."""
    model = frozen(resnet(), std=0.0, adapt_last=1, use_qlora=True)
    follow_statistics(model, [X], required=True)
    LoRAManager(model).save_lora_checkpoint(tmp_path / "lora.pth")
    in_model = {name for name, module in model.named_modules() if module in followers(model)}
    for names in (in_model, statistics(read_adapter_file(tmp_path / "lora.pth")["tensors"])):
        assert names and all(name.startswith("layer4") for name in names)


def test_a_network_without_such_batch_norms_is_refused():
    """Outside torchvision's blocks, which call each layer by itself, statistics have no gradient; nor in groups."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    grouped = resnet(Bottleneck)
    grouped.layer1[0].conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=2)
    for model, adapted in ((plain, "0"), (grouped, r"layer1\.0\.conv2")):
        frozen(model, target_modules=adapted)
        follow_statistics(model, iter(()))
        assert followers(model) == []
        with pytest.raises(InputError, match="no adapted convolution of a ResNet has a frozen BatchNorm behind it"):
            follow_statistics(model, [torch.randn(2, 3, 32, 32)], required=True)


def trained() -> nn.Module:
    """As if it were: the base's statistics would not do."""
    model = adapted_resnet()
    follow_statistics(model, [X])
    randomize_adapters(model)
    assert (answers(model) - answers(base_resnet())).abs().mean() > 0.02
    return model


assert_alike = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)


def test_an_adapter_that_is_replaced_takes_its_statistics_along(tmp_path):
    """By another, by one of fewer layers, or by a file that has none."""
    wanted = answers(base_resnet())
    for options in ({}, {"target_modules": "layer1"}):
        model = add_lora_to_model(trained(), r=3, **options)
        assert_alike(answers(model), wanted)
    model.layer1[0].conv1.remove_lora()
    assert_alike(answers(model), wanted)
    LoRAManager(model).save_lora_checkpoint(tmp_path / "fewer.pth")
    assert statistics(read_adapter_file(tmp_path / "fewer.pth")["tensors"]) == set()
    other = randomize_adapters(adapted_resnet(), std=0.1)
    LoRAManager(other).save_lora_checkpoint(tmp_path / "other.pth")
    model = trained()
    LoRAManager(model).load_lora_checkpoint(tmp_path / "other.pth")
    assert_alike(answers(model), answers(other))


@pytest.mark.parametrize("options", [{"train_norms": True}, {"freeze": False}], ids=str)
def test_norms_that_train_after_they_followed_keep_what_they_learn(options, tmp_path):
    model = trained()
    wanted = answers(model)
    freeze_backbone_params(model, **options)
    assert_alike(answers(model), wanted)  # they start where the adapters have brought them
    for _ in range(3):
        model.train()(2 * X + 1)
    wanted = answers(model)
    LoRAManager(model).save_lora_checkpoint(tmp_path / "a.pth")
    loaded = adapted_resnet()
    LoRAManager(loaded).load_lora_checkpoint(tmp_path / "a.pth")
    assert_alike(answers(loaded), wanted)
    assert not followers(loaded)  # what they have learned is the base's
    LoRAManager(model).merge_lora_weights()
    assert_alike(answers(model), wanted)
