"""BatchNorms that train beside adapters, against the dense stock model."""

import copy

import pytest
import torch
from dense import (
    EXACT,
    FP32,
    assert_close,
    compare_with_dense,
    dense_twin,
    images,
    randomize_adapters,
    relative_error,
    resnet,
)
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from finetune_lora import add_lora_to_model, freeze_backbone_params, set_gradient_checkpointing


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def with_norms(stock: nn.Module, **options) -> nn.Module:
    """The model with adapters, and BatchNorms that train."""
    model = randomize_adapters(add_lora_to_model(copy.deepcopy(stock), r=2, **options), std=0.1)
    freeze_backbone_params(model, train_norms=True)
    return model.train()


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def shaken(model: nn.Module) -> nn.Module:
    """Scales, some below zero, shifts and running statistics that nobody would take for others."""
    for norm in norms(model):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    return model.train()


def downsample(inside: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, out, 1, stride=2, bias=False), nn.BatchNorm2d(out))


def stage(blocks: int) -> nn.Sequential:
    first = Bottleneck(4, 2, stride=2, downsample=downsample(4, 8))
    return nn.Sequential(first, *(Bottleneck(8, 2) for _ in range(blocks - 1)))


BLOCKS = {
    "basic": lambda: nn.Sequential(BasicBlock(4, 4)),
    "basic, downsample": lambda: nn.Sequential(BasicBlock(4, 8, stride=2, downsample=downsample(4, 8))),
    "bottleneck": lambda: nn.Sequential(Bottleneck(4, 2, downsample=nn.Conv2d(4, 8, 1))),
    "bottleneck, downsample": lambda: stage(1),
    "stage": lambda: stage(7),
}


def block_images(**options) -> torch.Tensor:
    return torch.randn(3, 4, 6, 6, **options)


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_the_stock_one(block, channels_last):
    stock, x = shaken(BLOCKS[block]()).double(), block_images(dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    compare_with_dense(stock, with_norms(stock), [x], EXACT)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_network_is_the_stock_one(block):
    stock, x = shaken(resnet(block, (2, 1, 1, 2))).double(), images(64, 4, dtype=torch.float64)
    compare_with_dense(stock, with_norms(stock), [x], EXACT)


def wide_stage() -> nn.Sequential:
    first = Bottleneck(16, 8, stride=2, downsample=downsample(16, 32))
    return nn.Sequential(first, Bottleneck(32, 8))


@pytest.mark.parametrize(
    "autocast, base_dtype",
    [(False, None), (True, None), (True, torch.bfloat16)],
    ids=["float32", "bfloat16", "bfloat16 base"],
)
def test_a_stage_is_as_near_to_float64_as_the_stock_one(autocast, base_dtype):
    """In float32, and under autocast, where the kernel of a base in 16 bits is scaled before it is rounded."""
    stock = shaken(wide_stage()).bfloat16().float()  # on the grid, for a base in 16 bits to be the same
    model = with_norms(stock, base_dtype=base_dtype)
    exact = dense_twin(stock, model)
    plain = copy.deepcopy(exact).float()
    x, upstream = torch.randn(16, 16, 16, 16), torch.randn(16, 32, 8, 8)
    outputs, gradients = [], []
    for network, rounds in ((exact, False), (plain, autocast), (model, autocast)):
        own = x.clone().to(norms(network)[0].weight.dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
            y = network(own)
        y.backward(upstream.to(y.dtype))
        outputs.append(y)
        trained = [own, *(norm.weight for norm in norms(network)), *(norm.bias for norm in norms(network))]
        gradients.append(torch.cat([t.grad.flatten().double() for t in trained]))
    for of_exact, of_plain, ours in (outputs, gradients):
        assert relative_error(ours, of_exact) < 2 * relative_error(of_plain, of_exact)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_statistics_run_as_the_stock_one_s(options):
    stock = nn.Sequential(BasicBlock(4, 4))
    stock[0].bn1, stock[0].bn2 = nn.BatchNorm2d(4, **options), nn.BatchNorm2d(4, **options)
    model = with_norms(stock)
    twin = dense_twin(stock, model).float().train()
    for _ in range(3):
        x = block_images()
        assert_close(model(x), twin(x), FP32)
    for ours, theirs in zip(norms(model), norms(twin), strict=True):
        assert_close(ours.running_mean, theirs.running_mean, FP32)
        assert_close(ours.running_var, theirs.running_var, FP32)
        assert ours.num_batches_tracked == theirs.num_batches_tracked


# ------------------------------------------------------------------------------- what else may happen to a block


def gradients(model: nn.Module, x: torch.Tensor, **options) -> list[torch.Tensor]:
    model.zero_grad()
    model(x).square().sum().backward(**options)
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_a_second_backward_pass_adds_the_same():
    model, x = with_norms(shaken(stage(3))), block_images()
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    loss.backward()
    for gradient, p in zip(once, (p for p in model.parameters() if p.requires_grad), strict=True):
        assert_close(p.grad, 2 * gradient, FP32)


def test_a_hook_sees_what_it_sees_in_the_stock_block():
    seen = []
    stock, x = shaken(stage(2)).double(), block_images(dtype=torch.float64)
    model = with_norms(stock)
    for module in (model[0].bn1, model[1].relu, model[1].conv2):
        module.register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    compare_with_dense(stock, model, [x], EXACT)
    assert len(seen) == 5  # a ReLU of a bottleneck is called three times


def test_a_batch_norm_of_another_class_is_called():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    stock = nn.Sequential(BasicBlock(4, 4))
    stock[0].bn1 = Doubled(4)
    stock = shaken(stock).double()
    compare_with_dense(stock, with_norms(stock), [block_images(dtype=torch.float64)], EXACT)


def test_blocks_that_are_computed_again_as_a_whole_have_the_same_gradients():
    model, x = with_norms(shaken(stage(3)).double()), block_images(dtype=torch.float64).requires_grad_()
    again = copy.deepcopy(model)
    set_gradient_checkpointing(again, "full")
    for ours, theirs in zip(gradients(again, x), gradients(model, x), strict=True):
        assert_close(ours, theirs, EXACT)
    for ours, theirs in zip(norms(again), norms(model), strict=True):
        assert_close(ours.running_mean, theirs.running_mean, EXACT)


def test_what_diverges_is_seen():
    model, x = with_norms(stage(2)), block_images()
    x[0, 0, 0, 0] = torch.nan
    assert model(x).isnan().any()
