"""Which layers get adapters, what trains, which BatchNorm folds, and what is recomputed: on whole models."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from dense import (
    FP32,
    adapters,
    assert_close,
    compare_with_dense,
    dense_twin,
    expected_gradients,
    randomize_adapters,
)
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

import finetune_lora
from finetune_lora import (
    LoRAConv2d,
    LoRALinear,
    LoRAMultiheadAttention,
    QLoRALinear,
    add_lora_to_model,
    count_parameters,
    freeze_backbone_params,
    set_gradient_checkpointing,
)
from lora_utils import LoRAManager
from moco import InputError

EXACT = 1e-9  # in float64, where a ReLU does not change its mind for a rounding error


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def resnet(block=BasicBlock, layers=(1, 1, 1, 1)) -> ResNet:
    """A ResNet as torchvision has it, of few layers, whose BatchNorms have seen something."""
    model = ResNet(block, list(layers), num_classes=5, width_per_group=64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias)
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    return model


def vit(**options) -> VisionTransformer:
    model = VisionTransformer(**{"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16,
                                 "mlp_dim": 32, "num_classes": 5, **options})  # fmt: skip
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it as zero, and nothing below would get a gradient
    return model


def images(side: int = 32, count: int = 2, **kwargs) -> torch.Tensor:
    return torch.randn(count, 3, side, side, **kwargs)


def bare(model: nn.Module, name: str):
    return type(model.get_submodule(name))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(before: dict[str, torch.Tensor], model: nn.Module, names=None) -> None:
    now = model.state_dict()
    for name in before if names is None else names:
        assert torch.equal(before[name], now[name]), f"{name} has changed"


def adapted_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if any(adapters(module))}


# -------------------------------------------------------------------------------------------------- which layers


def test_a_resnet_is_adapted_but_for_its_head():
    model = resnet(Bottleneck)
    convolutions = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert add_lora_to_model(model) is model
    assert adapted_names(model) == convolutions
    assert type(model.fc) is nn.Linear


def test_a_vit_is_adapted_but_for_its_head_and_patch_embedding():
    model = vit()
    add_lora_to_model(model)
    layers = [f"encoder.layers.encoder_layer_{i}." for i in range(2)]
    parts = ("self_attention", "self_attention.out_proj", "mlp.0", "mlp.3")
    assert adapted_names(model) == {layer + part for layer in layers for part in parts}
    assert type(model.conv_proj) is nn.Conv2d and type(model.heads.head) is nn.Linear


def test_a_model_without_a_head_is_adapted_altogether():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 5))
    add_lora_to_model(model, r=2)
    assert adapted_names(model) == {"0", "2"}
    freeze_backbone_params(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{i}.lora_{m}" for i in (0, 2) for m in "AB"
    }


def test_a_single_layer_is_a_model_too():
    model = add_lora_to_model(nn.Linear(4, 5), r=2)
    assert isinstance(model, LoRALinear)
    freeze_backbone_params(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


@pytest.mark.parametrize(
    "targets, excluded, expected",
    [
        ("layer1.0.conv1", None, {"layer1.0.conv1"}),  # a name
        ("conv2", None, {f"layer{i}.0.conv2" for i in (1, 2, 3, 4)}),  # a suffix
        ("layer2", None, {"layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"}),  # what contains it
        (r"layer[34]\.0\.conv\d", None, {f"layer{i}.0.conv{j}" for i in (3, 4) for j in (1, 2)}),  # a pattern
        (["fc", "layer1.0.conv1"], None, {"fc", "layer1.0.conv1"}),  # the head, if asked for
        (["conv1", "conv2"], ["layer1", "layer2", r"layer3\..*"], {"conv1", "layer4.0.conv1", "layer4.0.conv2"}),
        ("layer2", "downsample", {"layer2.0.conv1", "layer2.0.conv2"}),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value),  # the order in a set is another in every process
)
def test_targets(targets, excluded, expected):
    model = add_lora_to_model(resnet(), target_modules=targets, exclude_modules=excluded)
    assert adapted_names(model) == expected


def test_a_name_is_not_matched_by_its_beginning():
    """encoder_layer_1 is not encoder_layer_11."""
    model = nn.ModuleDict({"block_1": nn.Linear(2, 2), "block_11": nn.Linear(2, 2)})
    assert adapted_names(add_lora_to_model(model, r=2, target_modules="block_1")) == {"block_1"}


@pytest.mark.parametrize(
    "target", ["out_proj", r".*out_proj", "encoder.layers.encoder_layer_0.self_attention.out_proj"]
)
def test_attention_s_out_proj_is_never_adapted_alone(target):
    """PyTorch does not call it: such an adapter would do nothing, and get no gradient."""
    for model in (vit(), add_lora_to_model(vit())):
        before, kinds = snapshot(model), [type(m) for m in model.modules()]
        with pytest.raises(InputError, match="no layer matches"):
            add_lora_to_model(model, target_modules=target)
        assert [type(m) for m in model.modules()] == kinds
        assert_unchanged(before, model)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"target_modules": "q_proj"},
            r"no layer matches q_proj; there are: conv_proj, encoder\.layers\.encoder_layer_0",
        ),
        ({"target_modules": ["mlp", "nowhere", "elsewhere"]}, "no layer matches nowhere, elsewhere;"),
        ({"target_modules": "*mlp"}, "neither a layer nor a regular expression"),
        ({"exclude_modules": "encoder"}, "no layer is left to adapt"),
        ({"r": 0, "lora_alpha": -1, "lora_dropout": 1.0}, "r is 0.*lora_alpha is -1.*lora_dropout is 1.0"),
        ({"r": 2.5}, "r is 2.5"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": "16", "lora_dropout": None}, "lora_alpha is '16'.*lora_dropout is None"),
        ({"use_qlora": True, "target_modules": "heads"}, "head heads.head trains, so it cannot be in 4 bits"),
    ],
    ids=str,
)
def test_bad_input_is_refused_and_leaves_the_model_as_it_was(options, message):
    for model in (vit(), add_lora_to_model(vit(), r=3)):
        before, kinds = snapshot(model), [type(m) for m in model.modules()]
        with pytest.raises(InputError, match=message):
            add_lora_to_model(model, **options)
        assert [type(m) for m in model.modules()] == kinds
        assert list(before) == list(model.state_dict())
        assert_unchanged(before, model)


def test_subclasses_that_may_compute_something_else_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Own(nn.MultiheadAttention):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Scaled(4, 4), nn.ModuleDict({"own": Own(4, 2)}))
    add_lora_to_model(model, r=2)
    assert adapted_names(model) == {"0"}
    with pytest.raises(InputError, match="no layer matches 1; there are: 0"):
        add_lora_to_model(model, r=2, target_modules="1")


def test_layers_whose_weight_is_computed_are_left_alone():
    """Pruning and weight_norm keep another parameter, and set `weight` before every call."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    prune.l1_unstructured(model[2].out_proj, "weight", amount=0.5)
    add_lora_to_model(model, r=2)
    assert adapted_names(model) == {"0"}


def test_layers_that_a_block_reads_without_calling_them_are_left_alone():
    """Swin's attention gives the weights of qkv and proj to a function; an adapter there would never learn."""
    model = SwinTransformer([4, 4], 24, [2], [2], [4, 4], num_classes=5)
    freeze_backbone_params(add_lora_to_model(model, r=2))
    randomize_adapters(model)
    model(images()).sum().backward()
    assert not any("attn" in name for name in adapted_names(model))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_weight_that_layers_share_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(InputError, match="0 shares its weight with another layer"):
        add_lora_to_model(model, r=2)
    assert not adapted_names(model)


def test_a_bias_that_layers_share_is_none_of_ours():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    assert adapted_names(add_lora_to_model(model, r=2)) == {"0", "1"}


def test_adapters_come_before_distributed_data_parallel(tmp_path):
    """It exchanges the gradients that it knew of when it was made; new adapters would drift apart without a word."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(vit())
        for change in (add_lora_to_model, freeze_backbone_params):
            with pytest.raises(InputError, match="add adapters and freeze before it wraps"):
                change(model)
    finally:
        torch.distributed.destroy_process_group()


def test_float64_has_no_4_bit_form():
    model = vit().double()
    with pytest.raises(InputError, match="is in float64, which has no 4-bit form"):
        add_lora_to_model(model, use_qlora=True)
    assert not adapted_names(model)


def test_merged_weights_do_not_train():
    """unmerge_lora_weights() puts the base back; what they had learned would be gone."""
    model = add_lora_to_model(vit())
    manager = LoRAManager(model)
    manager.merge_lora_weights()
    with pytest.raises(InputError, match="call unmerge_lora_weights"):
        freeze_backbone_params(model, freeze=False)
    manager.unmerge_lora_weights()
    freeze_backbone_params(model, freeze=False)


def test_data_parallel_names_what_to_use_instead():
    layer = LoRALinear(4, 4)
    with pytest.raises(InputError, match="torchrun"):
        layer._replicate_for_data_parallel()


def test_a_layer_used_twice_is_adapted_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    stock = copy.deepcopy(model)
    randomize_adapters(add_lora_to_model(model, r=2))
    assert count_parameters(model)["lora"] == 2 * (4 + 4)
    compare_with_dense(stock, model, [torch.randn(3, 4)], FP32)


# ------------------------------------------------------------------------------------------------- again, and removed


def test_adapters_are_replaced_never_nested():
    model = vit()
    before, keys = snapshot(model), list(model.state_dict())
    for rank in (4, 8, 16):
        add_lora_to_model(model, r=rank, lora_alpha=2 * rank)
        randomize_adapters(model)
        for layer in (m for m in model.modules() if any(adapters(m))):
            assert layer.r == rank and layer.scaling == 2
            assert all(A.shape[0] == B.shape[1] == rank for _, _, A, B in adapters(layer))
        assert [key for key in model.state_dict() if "lora_" not in key] == keys
        assert_unchanged(before, model, keys)


def test_new_adapters_start_as_the_base_model():
    model, x = vit().eval(), images(16)
    expected = model(x)
    randomize_adapters(add_lora_to_model(model))
    LoRAManager(model).merge_lora_weights()  # even then
    assert not torch.allclose(model(x), expected, atol=1e-2)
    add_lora_to_model(model, r=2)
    assert_close(model(x), expected, FP32)


def test_layers_that_are_no_longer_targets_are_stock_layers_again():
    for build, x in ((resnet, images()), (vit, images(16))):
        model = build().eval()
        stock = copy.deepcopy(model)
        freeze_backbone_params(randomize_adapters(add_lora_to_model(model)))
        name = max(name for name in adapted_names(model) if "out_proj" not in name)
        randomize_adapters(add_lora_to_model(model, target_modules=name))
        target = model.get_submodule(name)
        touched = {*target.modules(), *target._neighbours}
        for ours, theirs in zip(model.modules(), stock.modules(), strict=True):
            if ours not in touched and not isinstance(ours, nn.BatchNorm2d):
                assert type(ours) is type(theirs)
                assert set(vars(ours)) - set(vars(theirs)) <= {"base_digests"}
        assert_close(model(x), dense_twin(stock, model)(x.double()), FP32)
        info = LoRAManager(model).get_lora_info()
        assert set(info["layers"]) == adapted_names(model)
        LoRAManager(model).merge_lora_weights()


def test_a_layer_built_as_an_adapted_one_is_adapted_again():
    model = nn.Sequential(LoRALinear(4, 5, r=2), LoRAConv2d(4, 5, 3), nn.ModuleList([LoRAMultiheadAttention(4, 2)]))
    add_lora_to_model(model, r=3)
    assert [model[0].r, model[1].r, model[2][0].r, model[2][0].out_proj.r] == [3] * 4


@pytest.mark.parametrize("build, side", [(resnet, 32), (vit, 16)], ids=["resnet", "vit"])
def test_4_bit_layers_get_new_adapters_on_the_same_bytes(build, side):
    model, x = build().eval(), images(side)
    add_lora_to_model(model, use_qlora=True)
    freeze_backbone_params(model)
    expected, packed = model(x), {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    for merged in (False, True):
        randomize_adapters(model)
        if merged:
            LoRAManager(model).merge_lora_weights()
        add_lora_to_model(model, r=3, use_qlora=True)
        freeze_backbone_params(model)
        assert all(torch.equal(model.get_parameter(n), p) for n, p in packed.items())
        assert_close(model(x), expected, FP32)


def test_4_bit_layers_do_not_become_float():
    model = add_lora_to_model(vit(), use_qlora=True)
    kinds = [type(m) for m in model.modules()]
    for options in ({}, {"use_qlora": True, "target_modules": "mlp"}):
        with pytest.raises(InputError, match="in 4 bits, its float weight is gone"):
            add_lora_to_model(model, **options)
        assert [type(m) for m in model.modules()] == kinds


def test_float_adapters_become_4_bit_ones():
    model = add_lora_to_model(vit())
    add_lora_to_model(model, use_qlora=True)
    assert bare(model, "encoder.layers.encoder_layer_0.mlp.0") is QLoRALinear


# --------------------------------------------------------------------------------------------------- what trains


def test_freezing_leaves_adapters_and_head_to_train():
    for model in (resnet(), vit()):
        freeze_backbone_params(add_lora_to_model(model))
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trains == {n for n, _ in model.named_parameters() if "lora_" in n or n.startswith(("fc.", "heads."))}
        freeze_backbone_params(model, freeze=False)
        assert all(p.requires_grad for p in model.parameters())


def test_freezing_a_4_bit_model_and_back():
    model = add_lora_to_model(vit(), use_qlora=True)
    for freeze in (True, False):
        freeze_backbone_params(model, freeze)
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.uint8:
                assert not parameter.requires_grad, name
    assert model.class_token.requires_grad


def test_counts_are_of_elements():
    """However few bits hold each."""
    model = vit()
    total = sum(p.numel() for p in model.parameters())
    lora = 2 * 8 * (3 * (16 + 16) + (16 + 16) + 2 * (16 + 32))
    head = 16 * 5 + 5
    assert count_parameters(model) == {"total": total, "trainable": total, "frozen": 0, "lora": 0}
    for four_bits in (False, True):
        freeze_backbone_params(add_lora_to_model(model, use_qlora=four_bits))
        assert count_parameters(model) == {
            "total": total + lora, "trainable": lora + head, "frozen": total - head, "lora": lora
        }  # fmt: skip


@pytest.mark.parametrize("build, side", [(resnet, 32), (vit, 16)], ids=["resnet", "vit"])
@pytest.mark.parametrize("four_bits", [False, True], ids=["float", "4 bits"])
@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.1), partial(torch.optim.AdamW, lr=1e-2)])
def test_training_moves_every_adapter_and_nothing_frozen(build, side, four_bits, optimizer):
    model = add_lora_to_model(build(), r=2, use_qlora=four_bits, lora_dropout=0.1)
    freeze_backbone_params(model)
    before, trains = snapshot(model), {name for name, p in model.named_parameters() if p.requires_grad}
    step = optimizer([p for p in model.parameters() if p.requires_grad])
    model.train()
    for _ in range(3):
        step.zero_grad()
        F.cross_entropy(model(images(side, 4)), torch.arange(4)).backward()
        step.step()
    assert_unchanged(before, model, set(before) - trains)
    for name in trains:
        assert not torch.equal(before[name], model.get_parameter(name)), f"{name} has not moved"
        assert model.get_parameter(name).isfinite().all()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("build, side", [(resnet, 32), (vit, 16)], ids=["resnet", "vit"])
def test_after_one_backward_every_adapter_has_a_gradient(build, side):
    """On B from the start; on A as soon as B is not zero."""
    model = add_lora_to_model(build())
    freeze_backbone_params(model)
    for expected in ("lora_B", "lora_"):
        model.zero_grad()
        model(images(side, 4)).square().sum().backward()
        for name, parameter in model.named_parameters():
            if expected in name:
                assert parameter.grad.any(), f"{name} gets no gradient"
        randomize_adapters(model)


def test_statistics_of_a_frozen_batch_norm_stay():
    """Whatever train() says (peft issue 1732); until it is unfrozen."""
    model = add_lora_to_model(
        nn.Sequential(resnet(), nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(5, 4), nn.BatchNorm1d(4))
    )
    freeze_backbone_params(model)
    before = snapshot(model)
    model.eval().train()
    model(images(count=4))
    assert_unchanged(before, model)
    freeze_backbone_params(model, freeze=False)
    model(images(count=4))
    counted = [name for name in before if name.endswith("num_batches_tracked")]
    assert counted and all(model.state_dict()[name] == 1 for name in counted)


def test_a_batch_norm_in_the_head_trains():
    model = nn.Module()
    model.backbone, model.head = nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    freeze_backbone_params(add_lora_to_model(model, r=2))
    assert model.train().head[0].training and model.head[0].weight.requires_grad


# ---------------------------------------------------------------------------------------------- folded BatchNorm


def assert_equals_dense(stock: nn.Module, model: nn.Module, x: torch.Tensor, tolerance: float) -> None:
    """In training and in evaluation mode; the stock model's BatchNorms are frozen by hand."""
    twin = dense_twin(stock, model).eval()
    expected = twin(x.double())
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    for training in (True, False):
        model.train(training).zero_grad()
        y = model(x)
        y.backward(upstream.to(y.dtype))
        assert_close(y, expected, tolerance)
        for name, gradient, wanted in expected_gradients(twin, model):
            assert_close(gradient, wanted, tolerance, name)
        with torch.no_grad():
            assert_close(model(x), expected, tolerance)


def frozen(model: nn.Module, **options) -> nn.Module:
    freeze_backbone_params(randomize_adapters(add_lora_to_model(model, r=2, **options), std=0.05))
    return model


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
def test_a_resnet_with_folded_batch_norms_equals_the_stock_model(block, channels_last):
    stock, x = resnet(block).double(), images(dtype=torch.float64)
    model = copy.deepcopy(stock)
    if channels_last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    frozen(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(type(m) is finetune_lora.FoldedBatchNorm2d for m in norms)
    assert [k for k in model.state_dict() if "lora_" not in k] == list(stock.state_dict())
    assert_equals_dense(stock, model, x, EXACT)


def test_a_hook_on_the_stem_s_activation_sees_what_it_always_saw():
    """Pooled first and rectified after, the stem is faster; who listens to one of the two gets the usual order."""
    stock = resnet(Bottleneck).eval()
    model = add_lora_to_model(copy.deepcopy(stock))
    x, seen = images(), {}
    for key, network in (("stock", stock), ("adapted", model)):
        for module in (network.relu, network.maxpool):
            module.register_forward_hook(lambda m, x, y, key=key: seen.setdefault(key, []).append(y))
        network(x)
    assert len(seen["stock"]) == 2
    for ours, expected in zip(seen["adapted"], seen["stock"], strict=True):
        assert_close(ours, expected, FP32)


def grey_stem(model: nn.Module) -> None:
    model.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)


def no_norm(model: nn.Module) -> None:
    model.bn1 = nn.Identity()


def other_norm(model: nn.Module) -> None:
    model.layer1[0].conv2 = nn.Identity()
    model.layer1[0].bn1 = nn.GroupNorm(4, 64)


@pytest.mark.parametrize("change", [grey_stem, no_norm, other_norm, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_modules_may_be_replaced_beside_those_folded_into_them(change):
    """An operation is taken in only for as long as both stand where they were paired."""
    stock, x = resnet().double().eval(), images(dtype=torch.float64)
    model = frozen(copy.deepcopy(stock)).eval()
    for network in (stock, model):
        torch.manual_seed(5)
        change(network)
        network.double()
    assert_close(model(x), dense_twin(stock, model)(x), EXACT)


def test_modules_may_be_removed_beside_those_folded_into_them():
    stock = nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    stock[2].running_mean.normal_()
    model = frozen(copy.deepcopy(stock))
    for network in (stock, model):
        del network[0]
    x = images()
    assert_close(model(x), dense_twin(stock, model)(x.double()), FP32)


def test_a_stem_without_pooling_stays_as_it_is():
    stock = resnet(Bottleneck).eval()
    stock.maxpool = nn.Identity()  # as for images of 32 pixels
    x = images()
    assert_close(add_lora_to_model(copy.deepcopy(stock))(x), stock(x), FP32)


def test_folding_in_low_precision():
    """A BatchNorm's scale is no bfloat16."""
    stock = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)).eval()
    stock[1].running_var.uniform_(0.1, 10), stock[1].running_mean.normal_()
    x = torch.randn(2, 8, 9, 9)
    model = frozen(copy.deepcopy(stock))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(model(x), dense_twin(stock, model)(x.double()), 1e-2)
    stock.bfloat16()
    model = frozen(copy.deepcopy(stock))
    assert_close(model(x.bfloat16()), dense_twin(stock, model)(x.bfloat16().double()), 1e-2)


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


def test_a_trained_batch_norm_in_evaluation_mode_gets_its_gradients():
    stock, x = resnet().double().eval(), images(dtype=torch.float64)
    model = frozen(copy.deepcopy(stock)).eval()
    for name, parameter in model.named_parameters():
        if "bn1" in name:
            parameter.requires_grad_()
    compare_with_dense(stock, model, [x], EXACT)


def test_a_convolution_s_bias_trains_through_a_folded_batch_norm():
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    stock[1].running_mean.normal_(), stock[1].running_var.uniform_(0.5, 2)
    model = frozen(copy.deepcopy(stock))
    model[0].bias.requires_grad_()
    compare_with_dense(stock, model, [images(8)], FP32)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"eps": 0.1, "momentum": None}])
def test_batch_norms_of_every_kind_stay_exact(options):
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options)).eval()
    if stock[1].running_mean is not None:
        stock[1].running_mean.normal_(), stock[1].running_var.uniform_(0.5, 2)
    assert_equals_dense(stock, frozen(copy.deepcopy(stock)), images(8), FP32)


class PreActivation(BasicBlock):
    """conv1 is followed by bn2, and conv2 by nothing."""

    def forward(self, x):
        return x + self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))


def unfoldable():
    relu, norm, conv = nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
    yield "something between", nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    yield "something between that is used before", nn.Sequential(relu, nn.Conv2d(4, 4, 3), relu, nn.BatchNorm2d(4))
    yield "a shared BatchNorm", nn.Sequential(nn.Conv2d(4, 4, 3), norm, nn.Conv2d(4, 4, 3), norm)
    yield "a shared convolution", nn.Sequential(conv, nn.BatchNorm2d(4), conv)
    yield "a BatchNorm before", nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    yield "a forward of its own", PreActivation(4, 4)


@pytest.mark.parametrize("case", list(unfoldable()), ids=lambda case: case[0])
def test_a_batch_norm_that_does_not_follow_one_convolution_is_not_folded(case):
    stock = copy.deepcopy(case[1]).eval()
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    assert_equals_dense(stock, frozen(copy.deepcopy(stock)), torch.randn(2, 4, 9, 9), FP32)


def test_a_batch_norm_behind_a_convolution_without_adapter_is_not_folded():
    stock = resnet().double().eval()
    model = frozen(copy.deepcopy(stock), target_modules="conv2")
    folded = {n for n, m in model.named_modules() if isinstance(m, finetune_lora.FoldedBatchNorm2d)}
    assert folded == {f"layer{i}.0.bn2" for i in (1, 2, 3, 4)}
    assert_equals_dense(stock, model, images(dtype=torch.float64), EXACT)


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


def test_folding_with_dropout_keeps_its_meaning():
    """The BatchNorm is linear in eval mode: g (W x + s B A dropout(x)) + shift."""
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    stock[1].running_mean.normal_(), stock[1].running_var.uniform_(0.5, 2)
    x = images(8)
    model = frozen(copy.deepcopy(stock), lora_dropout=0.4).train()
    torch.manual_seed(7)
    y = model(x)
    torch.manual_seed(7)
    _, _, A, B = next(adapters(model[0]))
    delta = model[0].scaling * (B @ A).view_as(stock[0].weight)
    assert_close(y, stock[1](stock[0](x) + F.conv2d(F.dropout(x, 0.4), delta)), FP32)


# ------------------------------------------------------------------------------------------ gradient checkpointing


def loss_and_gradients(model: nn.Module, x: torch.Tensor, seed: int = 7):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = F.cross_entropy(model(x), torch.arange(len(x)) % 5)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """What a forward keeps for backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("four_bits", [False, True], ids=["float", "4 bits"])
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["", "dropout"])
def test_checkpointing_a_vit_changes_memory_and_nothing_else(mode, four_bits, dropout):
    """With dropout the same values are dropped the second time; attention's and the MLP's own included."""
    model = vit(dropout=dropout, attention_dropout=dropout)
    add_lora_to_model(model, r=2, use_qlora=four_bits, lora_dropout=dropout)
    freeze_backbone_params(randomize_adapters(model))
    model.train()
    x, keys = images(16, 8), list(model.state_dict())
    expected, before = loss_and_gradients(model, x), saved_bytes(model, x)
    set_gradient_checkpointing(model, mode)
    loss, gradients = loss_and_gradients(model, x)
    assert list(model.state_dict()) == keys
    assert torch.equal(loss, expected[0])
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[1][name], 1e-6, name)
    if not dropout:  # which keeps the LayerNorm's and GELU's output; without, LayerNorm's is kept in no mode
        assert saved_bytes(model, x) < {"selective": 0.85, "full": 0.5}[mode] * before
    set_gradient_checkpointing(model, "none")
    assert saved_bytes(model, x) == before
    assert torch.equal(loss_and_gradients(model, x)[0], expected[0])


def test_selective_checkpointing_equals_the_dense_stock_model():
    stock, x = vit().double(), images(16, dtype=torch.float64)
    model = frozen(copy.deepcopy(stock))
    set_gradient_checkpointing(model, "selective")
    assert_equals_dense(stock, model, x, EXACT)
    freeze_backbone_params(model, freeze=False)  # a LayerNorm that trains gets its gradients
    compare_with_dense(stock, model.train(), [x], EXACT)
    manager, expected = LoRAManager(model), dense_twin(stock, model)(x)
    freeze_backbone_params(model)
    with manager.disable_lora():
        assert_close(model(x), stock(x), EXACT)
    manager.merge_lora_weights()
    assert_close(model(x), expected, EXACT)


def test_selective_checkpointing_under_autocast():
    model, x = frozen(vit()), images(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, x)
        set_gradient_checkpointing(model, "selective")
        again, others = loss_and_gradients(model, x)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, 1e-6, name)


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "all trains"])
def test_checkpointing_a_resnet(freeze):
    """A BatchNorm that trains counts a batch once, though it is computed twice."""
    stock = add_lora_to_model(resnet(), r=2)
    randomize_adapters(stock, std=0.05)
    results, x = [], images(count=4)
    for mode in ("none", "full"):
        model = copy.deepcopy(stock)
        freeze_backbone_params(model, freeze)
        set_gradient_checkpointing(model.train(), mode)
        results.append((*loss_and_gradients(model, x), dict(model.named_buffers())))
    (loss, gradients, buffers), (again, others, counted) = results
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, 1e-5, name)
    for name, buffer in buffers.items():
        assert torch.equal(buffer, counted[name]), name


def test_checkpointing_pytorch_s_encoder_layer():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    freeze_backbone_params(randomize_adapters(add_lora_to_model(model)))
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def run():
        torch.manual_seed(7)
        return model(x, src_key_padding_mask=mask)

    expected = torch.autograd.grad(run().square().sum(), [p for p in model.parameters() if p.requires_grad])
    set_gradient_checkpointing(model, "full")
    actual = torch.autograd.grad(run().square().sum(), [p for p in model.parameters() if p.requires_grad])
    for gradient, wanted in zip(actual, expected, strict=True):
        assert_close(gradient, wanted, 1e-6)


def test_checkpointing_where_there_is_nothing_to_recompute():
    with pytest.raises(InputError, match="selective finds nothing to recompute"):
        set_gradient_checkpointing(add_lora_to_model(resnet()), "selective")
    with pytest.raises(InputError, match="full finds nothing to recompute"):
        set_gradient_checkpointing(nn.Linear(2, 2), "full")
    with pytest.raises(InputError, match="'some' is unknown"):
        set_gradient_checkpointing(vit(), "some")


def test_new_adapters_in_a_checkpointed_model_stay_exact():
    for mode in ("selective", "full"):
        for four_bits in (False, True):
            model, x = frozen(vit(), use_qlora=four_bits), images(16)
            set_gradient_checkpointing(model, mode)
            frozen(model, use_qlora=four_bits)
            expected = loss_and_gradients(model, x)[1]
            set_gradient_checkpointing(model, "none")
            for name, gradient in loss_and_gradients(model, x)[1].items():
                assert_close(expected[name], gradient, 1e-6, name)


# ------------------------------------------------------------------------------- what nobody needs is not computed


class Gradients(TorchDispatchMode):
    """Which gradients the convolutions compute: (shape of the input, of the input?, of the kernel?)."""

    def __init__(self):
        super().__init__()
        self.computed = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.computed.append((tuple(args[1].shape), *args[10][:2], tuple(args[2].shape)))
        return function(*args, **(kwargs or {}))


def test_no_input_gradient_below_the_first_adapter():
    """The images' own; and where the first adapter is higher up, that of everything below it."""
    for targets, first in ((None, (2, 3, 32, 32)), ("layer3", (2, 128, 4, 4))):
        model = frozen(resnet(), target_modules=targets)
        loss = model(images()).sum()
        with Gradients() as gradients:
            loss.backward()
        assert gradients.computed
        assert not any(of_input for shape, of_input, *_ in gradients.computed if shape == first)
        sizes = [shape[2] for shape, *_ in gradients.computed]
        assert max(sizes) == first[2] or max(sizes) == 16  # h of r channels has the output's size


def test_no_dense_kernel_gradient_is_formed():
    model = frozen(resnet())
    loss = model(images()).sum()
    with Gradients() as gradients:
        loss.backward()
    kernels = [kernel for _, _, of_kernel, kernel in gradients.computed if of_kernel]
    assert kernels and all(min(kernel[:2]) == 2 for kernel in kernels)  # r channels on one side


def test_nothing_below_the_encoder_of_a_vit_is_differentiated():
    model = frozen(vit())
    inputs = []
    model.encoder.layers[0].self_attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(images(16))
    assert not inputs[0].requires_grad


def test_encoder_blocks_with_a_forward_of_their_own_are_left_alone():
    """One may use the LayerNorm's output twice."""

    class Own(EncoderBlock):
        def forward(self, input):
            x = self.ln_1(input)
            return x + self.self_attention(x, x, x, need_weights=False)[0]

    model = frozen(nn.Sequential(Own(2, 16, 32, 0.0, 0.0)))
    with pytest.raises(InputError, match="finds nothing to recompute"):
        set_gradient_checkpointing(model, "selective")
