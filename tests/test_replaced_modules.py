"""Fused blocks whose children are replaced, hooked, copied, saved or compiled."""

import copy
import gc
import io
import weakref

import pytest
import torch
from dense import EXACT, FP32, assert_close, classes, dense_twin, frozen, images, resnet, vit, watch
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.vision_transformer import EncoderBlock

from finetune_lora import add_lora_to_model, set_gradient_checkpointing


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ----------------------------------------------------------------------- children that are replaced, hooked or copied


def grey_stem(model: nn.Module) -> None:
    model.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)


def no_norm(model: nn.Module) -> None:
    model.bn1 = nn.Identity()


def other_norm(model: nn.Module) -> None:
    model.layer1[0].conv2 = nn.Identity()
    model.layer1[0].bn1 = nn.GroupNorm(4, 64)


def other_relu(model: nn.Module) -> None:
    model.layer1[0].relu = nn.ELU()


@pytest.mark.parametrize(
    "change", [grey_stem, no_norm, other_norm, other_relu, nn.SyncBatchNorm.convert_sync_batchnorm]
)
def test_replaced_modules_in_a_resnet(change):
    """A block looks its children up at each call."""
    stock, x = resnet().double().eval(), images(dtype=torch.float64)
    model = frozen(copy.deepcopy(stock)).eval()
    twin = dense_twin(stock, model)
    for network in (twin, model):
        torch.manual_seed(5)
        change(network)
        network.double()
    assert_close(model(x), twin(x), EXACT)


def no_layer_norm(block: EncoderBlock) -> None:
    block.ln_1 = block.ln_2 = nn.Identity()


def norm_of_a_sequence(block: EncoderBlock) -> None:
    block.ln_1 = nn.LayerNorm((5, 16), elementwise_affine=False)


def other_activation(block: EncoderBlock) -> None:
    block.mlp[1] = nn.Tanh()


def stock_layers(block: EncoderBlock) -> None:
    block.self_attention = nn.MultiheadAttention(16, 2, batch_first=True)
    block.mlp[0] = nn.Linear(16, 32)


def other_mlp(block: EncoderBlock) -> None:
    block.mlp = nn.Sequential(nn.Linear(16, 7), nn.GELU(), nn.Linear(7, 16))


def rebuilt_mlp(block: EncoderBlock) -> None:
    block.mlp = nn.Sequential(block.mlp[0], nn.Tanh(), block.mlp[3])


def mlp_without_dropout(block: EncoderBlock) -> None:
    del block.mlp[4], block.mlp[2]


def other_dropout(block: EncoderBlock) -> None:
    block.mlp[2] = nn.Hardtanh(-0.1, 0.1)


@pytest.mark.parametrize(
    "change",
    [
        *(no_layer_norm, norm_of_a_sequence, other_activation, stock_layers),
        *(other_mlp, rebuilt_mlp, mlp_without_dropout, other_dropout),
    ],
)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_replaced_modules_in_a_vit(change, mode):
    stock, x = vit().double(), images(16, dtype=torch.float64)
    model = frozen(copy.deepcopy(stock))
    set_gradient_checkpointing(model, mode)
    twin = dense_twin(stock, model)
    for network in (twin, model):
        torch.manual_seed(5)
        change(network.encoder.layers[1])
        network.double()
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    y, z = model(ours), twin(theirs)
    assert_close(y, z, EXACT)
    y.square().sum().backward(), z.square().sum().backward()
    assert_close(ours.grad, theirs.grad, EXACT)


def test_modules_may_be_removed_from_a_sequence():
    stock = nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    stock[2].running_mean.normal_()
    model = frozen(copy.deepcopy(stock))
    for network in (stock, model):
        del network[0]
    x = images()
    assert_close(model(x), dense_twin(stock, model)(x.double()), FP32)


@pytest.mark.parametrize("build, side", [(resnet, 32), (vit, 16)], ids=["resnet", "vit"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_hook_sees_what_it_sees_in_the_stock_model(build, side, mode):
    """On any module, alone or on all at once: both the input and the output."""
    stock, x = build().double().eval(), images(side, dtype=torch.float64)
    model = frozen(copy.deepcopy(stock)).eval()
    if not (mode == "selective" and build is resnet):
        set_gradient_checkpointing(model, mode)
    twin = dense_twin(stock, model)
    inside = {f"{name}." for name, m in twin.named_modules() if isinstance(m, nn.MultiheadAttention)}
    names = [name for name, _ in twin.named_modules() if not any(name.startswith(prefix) for prefix in inside)]
    for chosen in (*([name] for name in names), names):
        seen = []
        for network in (twin, model):
            recorded = []
            handles = [watch(network.get_submodule(name), recorded) for name in chosen]
            network(x)
            [handle.remove() for handle in handles]
            seen.append(recorded)
        assert len(seen[0]) == len(seen[1]) >= len(chosen)
        for ours, theirs in zip(seen[1], seen[0], strict=True):
            for actual, expected in zip(ours, theirs, strict=True):
                assert_close(actual, expected, EXACT, str(chosen))


def listeners():
    yield "forward", lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1))
    yield "forward_pre", lambda m, seen: m.register_forward_pre_hook(lambda *_: seen.append(1))
    yield "backward", lambda m, seen: m.register_full_backward_hook(lambda *_: seen.append(1))
    yield "backward_pre", lambda m, seen: m.register_full_backward_pre_hook(lambda *_: seen.append(1))


@pytest.mark.parametrize("register", list(listeners()), ids=lambda case: case[0])
@pytest.mark.parametrize("name", ["bn1", "maxpool", "layer1.0.conv2", "layer2.0.downsample.1"])
def test_hooks_of_every_kind_are_called(register, name):
    model, seen = frozen(resnet()), []
    register[1](model.get_submodule(name), seen)
    model(images()).sum().backward()
    assert seen


@pytest.mark.parametrize("register", list(listeners()), ids=lambda case: case[0])
@pytest.mark.parametrize("name", ["ln_1", "ln_2", "mlp", "mlp.1", "mlp.2"])
def test_hooks_of_every_kind_are_called_in_a_vit(register, name):
    model, seen = frozen(vit()), []
    set_gradient_checkpointing(model, "selective")
    register[1](model.encoder.layers[1].get_submodule(name), seen)
    model(images(16)).sum().backward()
    assert seen


def test_a_hook_on_every_module_of_the_process_is_called():
    model, seen = frozen(resnet()), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(images())
    finally:
        handle.remove()
    assert {m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.ReLU)} <= set(seen)


@pytest.mark.parametrize("build", [resnet, vit])
def test_a_copied_layer_is_a_layer(build):
    """And not the model around it: nothing of the model can be reached from one of its layers."""
    model = frozen(build())
    for layer in model.modules():
        if not list(layer.children()):
            file = io.BytesIO()
            torch.save(layer, file)
            held = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
            assert file.tell() < held + 10_000


@pytest.mark.parametrize("build, side", [(resnet, 32), (vit, 16)], ids=["resnet", "vit"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_deleted_model_is_gone(build, side, mode):
    """At once, without the garbage collector: on a GPU the next model needs the memory."""
    model = frozen(build(), use_qlora=True)
    if not (mode == "selective" and build is resnet):
        set_gradient_checkpointing(model, mode)
    model(images(side)).sum().backward()
    remembered = [weakref.ref(module) for module in model.modules()]
    gc.disable()
    try:
        del model
        assert not any(reference() for reference in remembered)
    finally:
        gc.enable()


def test_only_blocks_around_adapted_layers_are_fused():
    model, stock = resnet(), resnet()
    add_lora_to_model(model, target_modules="layer2")
    changed = {n for n, m in model.named_modules() if type(m) is not type(stock.get_submodule(n))}
    layers = {"layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"}
    assert changed == layers | {"layer2.0", "layer2.0.downsample"}
    add_lora_to_model(model, target_modules="layer3.0.conv1")
    changed = {n for n, m in model.named_modules() if type(m) is not type(stock.get_submodule(n))}
    assert changed == {"layer3.0.conv1", "layer3.0"}


def test_fused_blocks_can_be_saved_whole(tmp_path):
    model, x = frozen(resnet()), images()
    torch.save(model, tmp_path / "model.pth")
    again = torch.load(tmp_path / "model.pth", weights_only=False)
    assert classes(again) == classes(model) and torch.equal(again(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "block, shape",
    [(BasicBlock(4, 4), (2, 4, 8, 8)), (EncoderBlock(2, 16, 32, 0.0, 0.0), (2, 5, 16))],
    ids=["resnet", "vit"],
)
def test_a_compiled_block_is_one_graph_and_computes_the_same(block, shape):
    model, x = frozen(copy.deepcopy(block)), torch.randn(shape)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(f(x).square().sum(), trained) for f in (model, compiled)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(theirs, ours, FP32)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("low, base_dtype", [(False, None), (True, torch.bfloat16)], ids=["fp32", "bf16"])
def test_a_compiled_vit_is_one_graph_and_computes_the_same(low, base_dtype):
    """In low precision no further from the answers and gradients of float32 than the model itself."""
    model, x = frozen(vit(), base_dtype=base_dtype), images(16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    trained = [p for p in model.parameters() if p.requires_grad]

    def results(f, low):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = f(x).float()
        return torch.cat([t.flatten() for t in (y, *torch.autograd.grad(y.square().sum(), trained))])

    exact, own, theirs = results(model, False), results(model, low), results(compiled, low)
    if low:
        assert (theirs - exact).norm() < 2 * (own - exact).norm() < 0.1 * exact.norm()
    else:
        assert_close(theirs, own, FP32)
    torch._dynamo.reset()
