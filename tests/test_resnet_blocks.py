"""ResNets: BatchNorms folded into the convolutions before them, and the pooled stem."""

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from dense import (
    DEVICES,
    EXACT,
    FP32,
    Operations,
    assert_close,
    assert_equals_dense,
    compare_with_dense,
    dense_twin,
    frozen,
    images,
    randomize_adapters,
    relative_error,
    resnet,
    saved_bytes,
    vit,
)
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import ConvStemConfig

from finetune_lora import add_lora_to_model, freeze_backbone_params
from lora_utils import LoRAManager
from toolkit.models.norms import NORMS


def batch_norms_computed(model: nn.Module, x: torch.Tensor) -> int:
    with Operations() as operations:
        model(x)
    return operations.count("batch_norm")


def seen(model: nn.Module, least: float = 0.5, most: float = 2) -> nn.Module:
    """Its BatchNorms have statistics as if they had seen something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(), module.running_var.uniform_(least, most)
    return model


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
def test_a_resnet_with_folded_batch_norms_equals_the_stock_model(block, channels_last):
    stock, x = resnet(block).double(), images(dtype=torch.float64)
    model = copy.deepcopy(stock)
    if channels_last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    frozen(model)
    assert batch_norms_computed(model, x) == 0
    assert [k for k in model.state_dict() if "lora_" not in k] == list(stock.state_dict())
    assert_equals_dense(stock, model, x, EXACT)


def test_folding_in_low_precision():
    """A BatchNorm's scale is no bfloat16."""
    stock = seen(nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)).eval(), 0.1, 10)
    x = torch.randn(2, 8, 9, 9)
    model = frozen(copy.deepcopy(stock))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(model(x), dense_twin(stock, model)(x.double()), 1e-2)
    stock.bfloat16()
    model = frozen(copy.deepcopy(stock))
    assert_close(model(x.bfloat16()), dense_twin(stock, model)(x.bfloat16().double()), 1e-2)


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("names, folds", [("conv2.weight", True), (("bn1.weight", "bn1.bias"), False)], ids=str)
def test_what_trains_beside_the_adapters_gets_its_gradients_in_evaluation_mode(names, folds, channels_last):
    """A BatchNorm is constant then, and folds into a kernel that trains, but not where its own scale does."""
    stock, x = resnet(Bottleneck).double().eval(), images(dtype=torch.float64)
    model = frozen(copy.deepcopy(stock)).eval()
    if channels_last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith(names))
    assert (batch_norms_computed(model, x) == 0) == folds
    compare_with_dense(stock, model, [x], EXACT)


def test_a_convolutional_stem_as_moco_v3_s_is_folded():
    stem = [ConvStemConfig(8, 3, 2), ConvStemConfig(16, 3, 2)]
    stock = seen(vit(conv_stem_configs=stem, patch_size=4).double().eval())
    model = frozen(copy.deepcopy(stock), target_modules=["conv_proj", "mlp"])
    assert batch_norms_computed(model, images(16, dtype=torch.float64)) == 0
    assert_equals_dense(stock, model, images(16, dtype=torch.float64), EXACT)


def test_a_folded_batch_norm_unfolds_when_it_trains():
    """Unfrozen, it normalises by the batch and counts it, as in the stock model; frozen again, it is folded again."""
    stock, x = resnet().double(), images(count=4, dtype=torch.float64)
    model = frozen(copy.deepcopy(stock))
    assert_equals_dense(stock, model, x, EXACT)
    freeze_backbone_params(model, freeze=False)
    twin = dense_twin(stock, model).train()
    compare_with_dense(stock.train(), model.train(), [x], EXACT)
    twin(x)
    for name, buffer in twin.named_buffers():
        assert_close(model.get_buffer(name), buffer, EXACT, name)
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    freeze_backbone_params(model)
    assert_equals_dense(stock, model, x, EXACT)


def test_a_batch_norm_that_normalises_by_the_batch_is_not_folded():
    """Without parameters to train, only the mode tells it from a frozen one."""
    # A bias before it would have no gradient but rounding, which no tolerance suits.
    stock = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)).double()
    model = randomize_adapters(add_lora_to_model(copy.deepcopy(stock), r=2))
    compare_with_dense(stock, model, [images(8, dtype=torch.float64)], EXACT)
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize(
    "build, side", [(resnet, 32), (partial(resnet, Bottleneck), 32), (vit, 16)], ids=["resnet", "bottleneck", "vit"]
)
def test_norms_that_train_beside_the_adapters(build, side):
    """Scales and shifts get their gradients, and a BatchNorm normalises by the batch and counts it."""
    stock, x = build().double(), images(side, 8, dtype=torch.float64)
    model = randomize_adapters(add_lora_to_model(copy.deepcopy(stock), r=2))
    freeze_backbone_params(model, train_norms=True)
    compare_with_dense(stock.train(), model.train(), [x], EXACT)
    norms = [m for m in model.modules() if isinstance(m, NORMS)]
    assert norms and all(norm.weight.grad.any() and norm.bias.grad.any() for norm in norms)
    assert all(getattr(norm, "num_batches_tracked", 1) == 1 for norm in norms)
    freeze_backbone_params(model)
    assert not any(norm.weight.requires_grad for norm in norms) and (build is vit or not model.bn1.training)


def test_a_convolution_s_bias_trains_through_a_folded_batch_norm():
    stock = seen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    model = frozen(copy.deepcopy(stock))
    model[0].bias.requires_grad_()
    compare_with_dense(stock, model, [images(8)], FP32)


def test_a_folded_batch_norm_stays_exact_when_adapters_are_merged_or_off():
    stock, x = resnet().double().eval(), images(dtype=torch.float64)
    model = frozen(copy.deepcopy(stock)).train()
    manager, expected = LoRAManager(model), dense_twin(stock, model)(x)
    with manager.disable_lora():
        assert_close(model(x), stock(x), EXACT)
    manager.merge_lora_weights()
    assert_close(model(x), expected, EXACT)
    with manager.disable_lora():
        assert_close(model(x), stock(x), EXACT)
    manager.unmerge_lora_weights()
    assert_close(model(x), expected, EXACT)
    assert_close(copy.deepcopy(model)(x), expected, EXACT)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"eps": 0.1, "momentum": None}])
def test_batch_norms_of_every_kind_stay_exact(options):
    stock = seen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options)).eval())
    assert_equals_dense(stock, frozen(copy.deepcopy(stock)), images(8), FP32)


class PreActivation(BasicBlock):
    """conv1 is followed by bn2, and conv2 by nothing."""

    def forward(self, x):
        return x + self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))


def chains() -> Iterator[tuple[str, nn.Module, int]]:
    """What stands in which order, and how many BatchNorms of it cannot be folded."""
    relu, norm, conv = nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
    yield "a pair", nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), 0
    yield "something between", nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), 1
    yield "something between that is used before", nn.Sequential(relu, nn.Conv2d(4, 4, 3), relu, nn.BatchNorm2d(4)), 1
    yield "a shared BatchNorm", nn.Sequential(nn.Conv2d(4, 4, 3), norm, nn.Conv2d(4, 4, 3), norm), 0
    yield "a shared convolution", nn.Sequential(conv, nn.BatchNorm2d(4), conv), 0
    yield "a BatchNorm before", nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)), 1
    yield "two BatchNorms", nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), 1
    yield "a linear layer before", nn.Sequential(nn.Linear(9, 9), nn.BatchNorm2d(4)), 1
    yield "a forward of its own", PreActivation(4, 4), 2


@pytest.mark.parametrize("case", list(chains()), ids=lambda case: case[0])
def test_a_batch_norm_is_folded_if_it_follows_a_convolution(case):
    stock, x = seen(copy.deepcopy(case[1]).eval()), torch.randn(2, 4, 9, 9)
    model = frozen(copy.deepcopy(stock))
    assert batch_norms_computed(model, x) == case[2]
    assert_equals_dense(stock, model, x, FP32)


def test_a_batch_norm_behind_a_convolution_without_adapter_is_not_folded():
    stock = resnet().double().eval()
    model = frozen(copy.deepcopy(stock), target_modules="conv2")
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert batch_norms_computed(model, images(dtype=torch.float64)) == norms - 4  # one of each layer's is folded
    assert_equals_dense(stock, model, images(dtype=torch.float64), EXACT)


@pytest.mark.parametrize("device", DEVICES)
def test_a_resnet_in_low_precision(device):
    """Rounding lets ReLUs of random weights change their minds: the stock model's own gradients are off by a sixth."""
    stock, x = (t.to(device, memory_format=torch.channels_last) for t in (resnet().eval(), images(64, 4)))
    model = frozen(copy.deepcopy(stock))
    twin = dense_twin(stock, model)
    results = []
    for network, low in ((model, True), (copy.deepcopy(twin).float(), True), (twin, False)):
        t = (x if low else x.double()).clone().requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=low):
            y = network(t)
        results.append((y, *torch.autograd.grad(y.double().square().sum(), t)))
    for ours, dense, exact in zip(*results, strict=True):
        assert relative_error(ours, exact) < 1.5 * relative_error(dense, exact) + 1e-3


def test_the_largest_activation_of_a_resnet_is_not_saved():
    """Pooled first and rectified after. Who listens to one of the two gets the usual order."""
    model, x = frozen(resnet(Bottleneck)), images()
    without = saved_bytes(model, x)
    model.relu.register_forward_hook(lambda *_: None)
    assert saved_bytes(model, x) > without + 2 * 16 * 16 * 16 * 4  # (N, 16, H / 2, W / 2) floats


OTHER_STEMS = {
    "ELU": ("relu", nn.ELU()),
    "unpooled": ("maxpool", nn.Identity()),  # as for images of 32 pixels
    "rounded up": ("maxpool", nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
}


@pytest.mark.parametrize("name, module", OTHER_STEMS.values(), ids=OTHER_STEMS)
def test_other_stems_stay_as_they_are(name, module):
    stock = resnet(Bottleneck).double().eval()
    setattr(stock, name, module)
    assert_equals_dense(stock, frozen(copy.deepcopy(stock)), images(dtype=torch.float64), EXACT)


CHANGES = {
    "another scale": lambda norm: nn.init.constant_(norm.weight, 3.0),
    "statistics in training": lambda norm: norm.train()(torch.randn(4, 4, 5, 5)),
    "a state that is loaded": lambda norm: norm.load_state_dict({**norm.state_dict(), "running_var": torch.ones(4)}),
    "statistics behind autograd's back": lambda norm: norm.running_mean.data.copy_(torch.ones(4)),
    "another epsilon": lambda norm: setattr(norm, "eps", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_folded_batch_norm_is_what_it_is_at_each_call(change, mode):
    stock = seen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    nn.init.normal_(stock[1].bias)
    model = frozen(copy.deepcopy(stock)).eval()
    x = images(8)
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
