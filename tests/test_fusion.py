"""lora/fusion.py: blocks whose neighbours are computed together, against the stock blocks, layer by layer."""

import copy
import gc
import io
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from dense import (
    BF16,
    DEVICES,
    EXACT,
    FP32,
    Operations,
    adapters,
    assert_close,
    assert_equals_dense,
    compare_with_dense,
    dense_twin,
    expected_gradients,
    frozen,
    images,
    randomize_adapters,
    relative_error,
    resnet,
    vit,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import ConvStemConfig, EncoderBlock

from finetune_lora import (
    add_lora_to_model,
    freeze_backbone_params,
    set_gradient_checkpointing,
)
from lora import attention, backends, fusion, vit_block
from lora.activations import SavedIn16Bits
from lora.frozen_norms import NORMS
from lora.split import split_model
from lora_utils import LoRAManager
from toolkit import InputError
from toolkit.models.backbones import head_name


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch_norms_computed(model: nn.Module, x: torch.Tensor) -> int:
    with Operations() as operations:
        model(x)
    return operations.count("batch_norm")


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


# ---------------------------------------------------------------------------------------------- folded BatchNorm


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
    stock = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)).eval()
    stock[1].running_var.uniform_(0.1, 10), stock[1].running_mean.normal_()
    x = torch.randn(2, 8, 9, 9)
    model = frozen(copy.deepcopy(stock))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(model(x), dense_twin(stock, model)(x.double()), 1e-2)
    stock.bfloat16()
    model = frozen(copy.deepcopy(stock))
    assert_close(model(x.bfloat16()), dense_twin(stock, model)(x.bfloat16().double()), 1e-2)


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
def test_a_batch_norm_folds_into_a_kernel_that_trains(channels_last):
    """The BatchNorm is constant, whether the weight in front of it trains or not."""
    stock, x = resnet(Bottleneck).double().eval(), images(dtype=torch.float64)
    model = frozen(copy.deepcopy(stock))
    if channels_last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("conv2.weight"))
    assert batch_norms_computed(model, x) == 0
    compare_with_dense(stock, model, [x], EXACT)


def test_a_convolutional_stem_as_moco_v3_s_is_folded():
    stem = [ConvStemConfig(8, 3, 2), ConvStemConfig(16, 3, 2)]
    stock = vit(conv_stem_configs=stem, patch_size=4).double().eval()
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
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


@pytest.mark.parametrize("build, side", [(resnet, 32), (vit, 16)], ids=["resnet", "vit"])
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


def test_a_subclass_of_batch_norm_is_not_folded():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    stock = nn.Sequential(nn.Conv2d(3, 4, 3), Doubled(4)).double().eval()
    compare_with_dense(stock, frozen(copy.deepcopy(stock)).eval(), [images(8, dtype=torch.float64)], EXACT)


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
    stock, x = copy.deepcopy(case[1]).eval(), torch.randn(2, 4, 9, 9)
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    model = frozen(copy.deepcopy(stock))
    assert batch_norms_computed(model, x) == case[2]
    assert_equals_dense(stock, model, x, FP32)


def test_a_batch_norm_behind_a_convolution_without_adapter_is_not_folded():
    stock = resnet().double().eval()
    model = frozen(copy.deepcopy(stock), target_modules="conv2")
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert batch_norms_computed(model, images(dtype=torch.float64)) == norms - 4  # one of each layer's is folded
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


# ------------------------------------------------------------------------------------- recomputed LayerNorm and GELU


def loss_and_gradients(model: nn.Module, x: torch.Tensor, seed: int = 7):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = F.cross_entropy(model(x), torch.arange(len(x), device=x.device) % 5)
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


def test_a_vit_equals_the_stock_model():
    stock, x = vit().double(), images(16, dtype=torch.float64)
    assert_equals_dense(stock, frozen(copy.deepcopy(stock)), x, EXACT)


@pytest.mark.parametrize("targets, norms", [(None, 2), ("self_attention", 1), ("mlp.0", 1), ("mlp.3", 0)], ids=str)
def test_a_layer_norm_s_output_is_not_saved(targets, norms):
    """In front of adapted layers. A hook brings it back."""
    model, x = frozen(vit(), target_modules=targets), images(16, 8)
    without = saved_bytes(model, x)
    blocks = [m for m in model.modules() if isinstance(m, EncoderBlock)]
    for block in blocks:
        block.ln_1.register_forward_hook(lambda *_: None)
        block.ln_2.register_forward_hook(lambda *_: None)
    output = 8 * 5 * 16 * 4  # (N, L, E) floats
    # With its output, LayerNorm saves a mean and a reciprocal deviation for each row.
    assert saved_bytes(model, x) - without >= (2 * norms - 1) * output


def test_a_layer_norm_that_trains_gets_its_gradients():
    stock, x = vit().double(), images(16, dtype=torch.float64)
    for name in ("ln_1.weight", "ln_2.bias"):
        model = frozen(copy.deepcopy(stock))
        for full_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or full_name.endswith(name))
        compare_with_dense(stock, model, [x], EXACT)


@pytest.mark.parametrize("mode", ["never", "none", "selective"])
def test_weights_that_train_behind_a_layer_norm_that_does_not(mode):
    stock, x = vit().double(), images(16, dtype=torch.float64)
    model = frozen(copy.deepcopy(stock))
    set_gradient_checkpointing(model, mode)
    for name, parameter in model.named_parameters():
        is_weight = name.endswith(("in_proj_weight", "mlp.0.weight", "mlp.3.weight"))
        parameter.requires_grad_(parameter.requires_grad or is_weight)
    compare_with_dense(stock, model, [x], EXACT)


def test_a_sequence_without_batch_dimension_is_refused():
    """As torchvision's block does, which attention alone would not."""
    for block in (vit().encoder.layers[0], frozen(vit()).encoder.layers[0]):
        with pytest.raises(AssertionError, match=r"Expected .batch_size, seq_length, hidden_dim. got"):
            block(torch.randn(5, 16))


class NormUsedTwice(EncoderBlock):
    def forward(self, input):
        x = self.ln_1(input)
        return x + self.self_attention(x, x, x, need_weights=False)[0]


def test_encoder_blocks_with_a_forward_of_their_own_are_left_alone():
    stock = nn.Sequential(NormUsedTwice(2, 16, 32, 0.0, 0.0))
    model = frozen(copy.deepcopy(stock), target_modules="self_attention")
    assert type(model[0]) is NormUsedTwice
    compare_with_dense(stock, model, [torch.randn(2, 5, 16)], FP32)


# ------------------------------------------------------------------------------------ the class token of the last block


def test_the_last_block_keeps_the_class_token_alone():
    """Behind keys and values. Who listens to the encoder gets every token."""
    model, x = frozen(vit()), images(16, 8)
    without = saved_bytes(model, x)
    handle = model.encoder.register_forward_hook(lambda *_: None)
    patches, width = 4, 16
    # Left out: the query, the attention's output, the residual's middle, the input of the last LayerNorm; and what the
    # MLP keeps, the input of GELU, which has two of the hidden size here.
    assert saved_bytes(model, x) - without >= 8 * patches * (4 * width + 2 * width) * 4
    handle.remove()
    assert saved_bytes(model, x) == without


@pytest.mark.parametrize("targets", [None, "self_attention", "mlp.3", "encoder_layer_1"], ids=str)
@pytest.mark.parametrize("mode", ["never", "none", "selective", "full"])
@pytest.mark.parametrize("dtype, autocast, tolerance", [(torch.float64, False, EXACT), (torch.float32, True, 5e-2)])
@pytest.mark.parametrize("device", DEVICES)
def test_the_class_token_s_block_equals_the_stock_model(targets, mode, dtype, autocast, tolerance, device):
    stock, x = vit(hidden_dim=32, mlp_dim=64).to(device, dtype), images(16, 8, dtype=dtype).to(device)
    model = frozen(copy.deepcopy(stock), target_modules=targets)
    if not (mode == "selective" and targets == "mlp.3"):
        set_gradient_checkpointing(model, mode)
    compare_with_dense(stock, model, [x], tolerance, autocast=autocast)
    model.heads.requires_grad_(False)
    compare_with_dense(stock, model.eval(), [x], tolerance, autocast=autocast)


def test_what_is_in_the_place_of_the_first_dropout_acts_on_all_tokens():
    stock, x = vit().double(), images(16, dtype=torch.float64)
    stock.encoder.dropout = nn.Hardtanh(-0.5, 0.5)
    assert_equals_dense(stock, frozen(copy.deepcopy(stock)), x, EXACT)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["never", "none", "selective"])
@pytest.mark.parametrize("batched", [False, True], ids=["PyTorch's attention", "attention by products"])
def test_a_vit_in_low_precision(monkeypatch, device, mode, batched):
    """Of the shapes that the kernels of GPUs are made for: 64 channels a head, 64 patches beside the class token."""
    monkeypatch.setattr(attention, "PREFERS_BATCHED_ATTENTION", batched)
    stock, x = vit(hidden_dim=128, mlp_dim=256, image_size=64).to(device), images(64, 4).to(device)
    model = frozen(copy.deepcopy(stock))
    set_gradient_checkpointing(model, mode)
    compare_with_dense(stock, model, [x], 5e-2, autocast=True)


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


def test_the_encoder_alone_still_gives_every_token():
    stock, x = vit().double(), torch.randn(2, 5, 16, dtype=torch.float64)
    model = frozen(copy.deepcopy(stock))
    compare_with_dense(stock, model, [x], EXACT, lambda network, x: network.encoder(x))


def mixing_mlp(block: EncoderBlock) -> None:
    block.mlp = nn.Sequential(nn.Conv1d(5, 5, 1))  # of the five tokens


def norm_of_five(block: EncoderBlock) -> None:
    block.ln_2 = nn.LayerNorm((5, 16))


@pytest.mark.parametrize("change", [mixing_mlp, norm_of_five])
def test_a_last_block_that_mixes_tokens_gets_all_of_them(change):
    stock, x = vit().double(), images(16, dtype=torch.float64)
    model = frozen(copy.deepcopy(stock))
    twin = dense_twin(stock, model)
    for network in (twin, model):
        torch.manual_seed(5)
        change(network.encoder.layers[1])
        network.double()
    assert_close(model(x), twin(x), EXACT)


# ---------------------------------------------------------------------------------------------------- the pooled stem


def test_the_largest_activation_of_a_resnet_is_not_saved():
    """Pooled first and rectified after. Who listens to one of the two gets the usual order."""
    model, x = frozen(resnet(Bottleneck)), images()
    without = saved_bytes(model, x)
    model.relu.register_forward_hook(lambda *_: None)
    assert saved_bytes(model, x) > without + 2 * 64 * 16 * 16 * 4  # (N, 64, H / 2, W / 2) floats


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


def watch(module: nn.Module, seen: list) -> torch.utils.hooks.RemovableHandle:
    """Keep copies of the first input and the output: what follows may work in place."""

    def record(module, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        seen.append((inputs[0].detach().clone(), output.detach().clone()))

    return module.register_forward_hook(record)


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("base_dtype", [None, torch.float16], ids=["float base", "base in 16 bits"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_vit_in_float16_is_near_float32(device, base_dtype, mode):
    """What `--precision auto` takes on GPUs without bfloat16."""
    model, x = frozen(vit(), base_dtype=base_dtype).to(device), images(16).to(device)
    set_gradient_checkpointing(model, mode)
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for low in (False, True):
        with torch.autocast(device, torch.float16, enabled=low):
            y = model(x).float()
        results.append(torch.cat([t.flatten() for t in (y, *torch.autograd.grad(y.square().mean(), trained))]))
    exact, half = results
    assert exact.dtype == half.dtype == torch.float32 and 0 < (half - exact).norm() < 1e-2 * exact.norm()


# ------------------------------------------------------------------------- the fast paths of PyTorch's encoders


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_fast_path_is_closed_around_adapters_only(activation):
    """And open again without them."""

    def encoder() -> nn.TransformerEncoder:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, activation, batch_first=True), 2)

    def flags(model: nn.Module) -> list:
        return [model.use_nested_tensor, *(layer.activation_relu_or_gelu for layer in model.layers)]

    model = encoder()
    before = flags(model)
    assert all(before)
    add_lora_to_model(model, target_modules="layers.1")
    add_lora_to_model(model, target_modules="layers.1")  # again
    assert flags(model) == [False, before[1], 0]
    for layer in (model.layers[1].self_attn, model.layers[1].linear1, model.layers[1].linear2):
        layer.remove_lora()
    fusion.unfuse(model)
    assert flags(model) == before and classes(model) == classes(encoder())
    assert set(vars(model.layers[1])) == set(vars(encoder().layers[1]))


# ------------------------------------------------------------------------------------------ gradient checkpointing


@pytest.mark.parametrize("mode", ["never", "selective", "full"])
@pytest.mark.parametrize("four_bits", [False, True], ids=["float", "4 bits"])
@pytest.mark.parametrize(
    "dropout, elsewhere", [(0.0, 0.0), (0.2, 0.2), (0.2, 0.0)], ids=["", "dropout", "dropout of tokens alone"]
)
def test_checkpointing_a_vit_changes_memory_and_nothing_else(mode, four_bits, dropout, elsewhere):
    """With dropout the same values are dropped the second time; attention's and the adapters' own included."""
    model = vit(dropout=dropout, attention_dropout=elsewhere)
    add_lora_to_model(model, r=2, use_qlora=four_bits, lora_dropout=elsewhere)
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
    if mode == "never" and not dropout:  # which keeps the LayerNorm's and GELU's output in every mode
        assert saved_bytes(model, x) > before
    elif not dropout:
        assert saved_bytes(model, x) < {"selective": 0.9, "full": 0.6}[mode] * before
    set_gradient_checkpointing(model, "none")
    assert saved_bytes(model, x) == before
    assert torch.equal(loss_and_gradients(model, x)[0], expected[0])


def test_without_recomputation_neither_layer_norm_nor_gelu_is_computed_again(monkeypatch):
    """In 16 bits 2 LayerNorms of the width and a GELU twice as wide are kept in a block, of which none is computed."""
    model, x = frozen(vit()).train(), images(16, 8)
    calls = []
    for module, name in ((backends, "layer_norm"), (vit_block, "_gelu")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, own=own, name=name: calls.append(name) or own(*args))
    saved = {}
    for mode, layer_norms, gelus in (("none", 8, 4), ("never", 4, 2)):
        set_gradient_checkpointing(model, mode)
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            saved[mode] = saved_bytes(model, x)
            calls.clear()
            model(x).float().square().sum().backward()
        assert (calls.count("layer_norm"), calls.count("_gelu")) == (layer_norms, gelus)
    tokens, width = 8 * 5, 16
    assert (
        saved["never"] - saved["none"] >= tokens * (3 * width + 2 * width) * 2
    )  # of the last block, the class token's MLP


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


def attends(model: nn.Module, x: torch.Tensor) -> int:
    """How often a training step computes attention."""
    with Operations() as operations:
        model(x).sum().backward()
    return sum("attention" in name and "backward" not in name for name in operations.names)


def test_selective_checkpointing_keeps_neither_what_the_heads_answer_nor_the_middle_of_a_block():
    """They are computed once more for both gradients. Where the last block attends from the class token alone, they
    are kept."""
    model, x = frozen(vit()), images(16, 8)
    once, before = attends(model, x), saved_bytes(model, x)
    set_gradient_checkpointing(model, "selective")
    assert attends(model, x) == once + 1
    tokens, width, heads = 5, 16, model.encoder.layers[0].self_attention.num_heads
    assert before - saved_bytes(model, x) == 8 * tokens * (2 * width + heads) * 4  # and log-sum-exps


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("four_bits", [False, True], ids=["", "4 bits"])
def test_how_often_attention_in_bf16_computes_its_weights(monkeypatch, four_bits, mode, dropout):
    """Adapted attention keeps them, in 4 bits it has less memory; and what is replayed for backward keeps them."""
    monkeypatch.setattr(attention, "PREFERS_BATCHED_ATTENTION", True)
    computed, weights = [], attention._attention_weights
    monkeypatch.setattr(attention, "_attention_weights", lambda *args: computed.append(1) or weights(*args))
    model = frozen(vit(), use_qlora=four_bits, lora_dropout=dropout)
    set_gradient_checkpointing(model, mode)
    blocks = len(model.encoder.layers)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images(16))
    assert len(computed) == blocks
    logits.sum().backward()
    replayed = blocks - 1 if mode == "selective" and not dropout else 0  # not the one of the class token alone
    assert len(computed) == blocks + (blocks if four_bits else replayed)


def test_attention_that_was_replayed_is_forgotten():
    """A second backward pass over the same graph computes it anew, and gives the same gradients."""
    model, x = frozen(vit()).double(), images(16, dtype=torch.float64)
    set_gradient_checkpointing(model, "selective")
    parameters, loss = [p for p in model.parameters() if p.requires_grad], model(x).square().sum()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    attentions = [each for each in gc.get_objects() if type(each) is attention.SelfAttention]
    assert attentions and all(each._replayed is None for each in attentions)
    for gradient, again in zip(first, torch.autograd.grad(loss, parameters), strict=True):
        assert torch.equal(gradient, again)


@pytest.mark.parametrize("change", ["mask", "weights", "a hook", "adapter dropout", "keys from elsewhere"])
def test_attention_that_cannot_be_computed_once_more_is_the_stock_one(change):
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(16, 4, batch_first=True).double()
    model = frozen(copy.deepcopy(stock), lora_dropout=0.5 if change == "adapter dropout" else 0.0)
    set_gradient_checkpointing(model, "selective")
    if change == "adapter dropout":
        model.eval()
    elif change == "a hook":
        model.out_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    x, seen = torch.randn(2, 5, 16, dtype=torch.float64), []
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if change == "mask" else None

    def answer(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
        key = x.flip(1) if change == "keys from elsewhere" else x
        return network(x, key, key, attn_mask=mask, need_weights=change == "weights")[0]

    compare_with_dense(stock.train(model.training), model, [x], EXACT, answer)
    assert all(shape == x.shape for shape in seen) and (change == "a hook") == bool(seen)


@pytest.mark.parametrize("layout", ["batch first", "tokens first", "one sequence"])
def test_attention_computed_once_more_in_every_layout(layout):
    stock = nn.MultiheadAttention(16, 4, batch_first=layout == "batch first").double()
    model = frozen(copy.deepcopy(stock))
    set_gradient_checkpointing(model, "selective")
    x = torch.randn(*((5, 16) if layout == "one sequence" else (5, 3, 16)), dtype=torch.float64)
    compare_with_dense(stock, model, [x], EXACT, lambda network, x: network(x, x, x, need_weights=False)[0])


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
        set_gradient_checkpointing(frozen(resnet()), "selective")
    with pytest.raises(InputError, match="never finds nothing to save"):
        set_gradient_checkpointing(frozen(resnet()), "never")
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


@pytest.mark.parametrize("build", [resnet, vit])
def test_checkpointing_without_adapters(build):
    """Full fine-tuning. Afterwards the model is a stock model again."""
    model, x = build(), images(32 if build is resnet else 16, 8)
    stock = copy.deepcopy(model)
    expected, before = loss_and_gradients(copy.deepcopy(model), x), saved_bytes(copy.deepcopy(model), x)
    set_gradient_checkpointing(model, "full")
    loss, gradients = loss_and_gradients(model, x)
    assert torch.equal(loss, expected[0])
    for name, gradient in gradients.items():
        assert_close(gradient, expected[1][name], 1e-5, name)
    assert saved_bytes(model, x) < 0.7 * before
    with pytest.raises(InputError, match="selective finds nothing"):
        set_gradient_checkpointing(model, "selective")
    set_gradient_checkpointing(model, "none")
    assert classes(model) == classes(stock)
    for ours, theirs in zip(model.modules(), stock.modules(), strict=True):
        assert set(vars(ours)) == set(vars(theirs))


def test_evaluation_recomputes_nothing():
    model, x = frozen(vit()), images(16)
    set_gradient_checkpointing(model, "full")
    calls = []
    model.encoder.layers[1].dropout.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(x)
    assert len(calls) == 1
    model(x).sum().backward()
    assert len(calls) == 3


def kept_by_a_block(mode: str = "none", **options) -> int:
    """Bytes, of a block that is not the last one, for 8 images of 5 tokens."""
    both = []
    for num_layers in (2, 3):
        model = frozen(vit(num_layers=num_layers, **options)).train()
        set_gradient_checkpointing(model, mode)
        both.append(saved_bytes(model, images(16, 8)))
    return both[1] - both[0]


def test_what_a_block_keeps():
    """The output of neither LayerNorm nor GELU."""
    width, mlp, heads, packed = 16, 32, 2, 3 * 2 * 16 * 2  # packed: the A and B of q, k and v, one below the other
    kept = 3 * width + width + heads + mlp  # q, k, v, what the heads answer with its log-sum-exps, the input of GELU
    assert kept_by_a_block() == 4 * (8 * 5 * (2 * width + kept) + packed)  # and the residual before and in the middle
    assert kept_by_a_block("selective") == 4 * (8 * 5 * (kept - heads) + packed)  # only the one residual, and no answer
    with torch.autocast("cpu", torch.bfloat16):  # the sum in the middle is of float32, and attention's share is kept
        low = 2 * (width + kept - heads + 6 * 2)  # and what the six adapters make of their inputs
        factors = packed + 2 * (width + width) + 2 * 2 * (width + mlp)  # rounded once, for both directions
        beside = (2 * 5 * heads, 4 * heads)  # attention's weights where it is made of products, or log-sum-exps
        assert kept_by_a_block() in [8 * 5 * (4 * width + low + more) + 2 * factors for more in beside]


def test_dropout_between_gelu_and_its_layer_keeps_the_gelu():
    """It acts on the GELU's output, which then has to exist."""
    more = kept_by_a_block(dropout=0.3) - kept_by_a_block()
    assert more == 4 * 8 * 5 * (32 + 32 + 2 * 16)  # after dropout, and three masks


# ------------------------------------------------------------------------------------------------- frozen attention


FROZEN_ATTENTION = {
    "a linear probe": lambda model: freeze_backbone_params(model),
    "adapters above": lambda model: freeze_backbone_params(add_lora_to_model(model, adapt_last=1)),
    "adapters beside": lambda model: freeze_backbone_params(add_lora_to_model(model, target_modules="mlp")),
}


@pytest.mark.parametrize("way", FROZEN_ATTENTION)
@pytest.mark.parametrize("dtype, batched", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_frozen_attention_is_the_stock_one_batch_first(monkeypatch, way, dtype, batched):
    """Outputs and gradients; and no product is made for each token."""
    monkeypatch.setattr(attention, "PREFERS_BATCHED_ATTENTION", batched)
    model, x = vit(), images(16)
    FROZEN_ATTENTION[way](model)
    randomize_adapters(model)
    trained = [p for p in model.parameters() if p.requires_grad]

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model.train()(x)
        return logits, torch.autograd.grad(logits.float().square().sum(), trained)

    with Operations() as operations:
        logits, gradients = run()
    assert batched or operations.count("bmm") == 0
    blocks = [m for m in model.modules() if type(m) is fusion.FusedEncoderBlock]
    assert any(fusion.is_frozen_attention(block.self_attention) for block in blocks)
    for module in model.modules():  # from here on the blocks are torchvision's
        module.__class__ = fusion.STOCK.get(type(module), type(module))
    expected, wanted = run()
    limit = FP32 if dtype == torch.float32 else BF16 * (3 if batched else 1)  # batched, they round differently
    assert_close(logits, expected, limit)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert_close(gradient, other, limit)


@pytest.mark.parametrize("way", FROZEN_ATTENTION)
def test_frozen_attention_drops_its_weights_in_training_alone(way):
    stock, x = vit(attention_dropout=0.5).eval(), images(16)
    model = copy.deepcopy(stock)
    FROZEN_ATTENTION[way](model)
    assert_close(model.eval()(x), stock(x), FP32)
    assert relative_error(model.train()(x), stock(x)) > 1e-2


def test_a_hook_on_a_frozen_layer_of_a_frozen_mlp_sees_the_stock_call():
    model, x, seen = vit(), images(16), []
    freeze_backbone_params(model)
    expected = model(x)
    assert type(model.encoder.layers[0].mlp) is fusion.FusedMLPBlock
    watch(model.encoder.layers[0].mlp[0], seen)
    assert_close(model(x), expected, FP32)
    assert [tuple(output.shape) for _, output in seen] == [(2, 5, 32)]


@pytest.mark.parametrize("way", FROZEN_ATTENTION)
def test_a_hook_on_frozen_attention_sees_the_stock_call(way):
    model, x, seen = vit(), images(16), []
    FROZEN_ATTENTION[way](model)
    expected = model(x)
    attention = model.encoder.layers[0].self_attention
    attention.register_forward_hook(lambda module, arguments, output: seen.append(len(arguments)))
    assert_close(model(x), expected, FP32)
    assert seen == [3]  # query, key and value


def test_attention_that_trains_again_is_the_stock_one():
    model = vit()
    freeze_backbone_params(model)
    assert type(model.encoder.layers[0]) is fusion.FusedEncoderBlock
    freeze_backbone_params(model, freeze=False)
    assert type(model.encoder.layers[0]) is EncoderBlock
    freeze_backbone_params(add_lora_to_model(model))
    LoRAManager(model).unload()
    assert type(model.encoder.layers[0]) is EncoderBlock


# ------------------------------------------------------------------------------------------- activations in 16 bits


@pytest.fixture
def kept(monkeypatch) -> dict[int, int]:
    """Bytes by storage of what is saved within `SavedIn16Bits`."""
    kept, pack = {}, SavedIn16Bits._pack

    def note(self, tensor, least_dim):
        packed = pack(self, tensor, least_dim)
        storage = (packed[0] if isinstance(packed, tuple) else packed).untyped_storage()
        if not isinstance(tensor, nn.Parameter):
            kept[storage.data_ptr()] = storage.nbytes()
        return packed

    monkeypatch.setattr(SavedIn16Bits, "_pack", note)
    return kept


@pytest.mark.parametrize("build, side", [(resnet, 32), (vit, 16)], ids=["resnet", "vit"])
@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("four_bits", [False, True], ids=["float", "4 bits"])
@pytest.mark.parametrize("device", DEVICES)
def test_activations_in_16_bits(build, side, mode, four_bits, kept, device):
    """The output stays exact, gradients are near, and what is saved is half as large."""
    model = build(hidden_dim=64, mlp_dim=128) if build is vit else build()
    model, x = frozen(model.to(device), use_qlora=four_bits), images(side, 8).to(device)
    if build is vit:
        set_gradient_checkpointing(model, mode)
    expected, before = loss_and_gradients(model, x), saved_bytes(model, x)
    model.zero_grad()
    with SavedIn16Bits():
        loss = F.cross_entropy(model(x), torch.arange(len(x), device=device) % 5)
    loss.backward()
    assert torch.equal(loss, expected[0])
    for name, gradient in expected[1].items():
        assert_close(model.get_parameter(name).grad, gradient, 2e-2, name)
    small = sum(size for size in kept.values() if size < 8 * 5 * 16 * 2)
    limit = 0.55 if build is vit else 0.65  # the stem's pooling keeps positions as well
    assert sum(kept.values()) < limit * before + small
    assert saved_bytes(model, x) == before  # outside the block nothing is rounded


@pytest.mark.parametrize("build, side", [(resnet, 32), (vit, 16)], ids=["resnet", "vit"])
def test_blocks_that_are_computed_again_as_a_whole_save_nothing_to_round(build, side):
    model, x = frozen(build()), images(side)
    set_gradient_checkpointing(model, "full")
    with SavedIn16Bits():
        with pytest.raises(InputError, match="has nothing to round: drop one"):
            model(x)
        with torch.no_grad():
            model(x)
    model(x).sum().backward()


def test_an_activation_that_two_operations_save_is_kept_once(kept):
    """A ReLU's output is the next convolution's input; attention's output is that of its projection."""
    x = torch.randn(2, 5, 16, requires_grad=True)
    with SavedIn16Bits():
        y = x.sin()
        (y.exp() * y.transpose(0, 1).transpose(0, 1).cos()).sum().backward()
    assert sum(kept.values()) == 4 * x.numel() * 2  # x, y, exp(y) and cos(y)


def test_a_part_of_a_tensor_and_one_number_repeated_are_rounded_as_they_are():
    """What they are views of is not kept in their place."""
    whole = torch.arange(1.0, 241).view(3, 5, 16)  # bfloat16 holds these numbers
    for view in (whole[1:], whole[:, 1:3], whole[:, 1:2].expand(3, 5, 16)):
        a = torch.ones_like(view, requires_grad=True)
        with SavedIn16Bits():
            y = (a * view).sum()
        y.backward()
        assert torch.equal(a.grad, view)


def test_parameters_are_kept_as_they_are():
    """A kernel that trains has four dimensions too; rounded, it would be a copy, and the input's gradient not exact."""
    convolution, x = nn.Conv2d(3, 4, 3), images(9, requires_grad=True)
    expected = torch.autograd.grad(convolution(x).sum(), x)[0]
    with SavedIn16Bits():
        y = convolution(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_a_loop_within_the_block_keeps_nothing_of_past_steps():
    saving, a = SavedIn16Bits(), torch.ones(2, 5, 16, requires_grad=True)
    with saving:
        for _ in range(2):
            (a * torch.ones(2, 5, 16)).sum().backward()
            assert not saving._known


def test_a_buffer_that_is_filled_anew_is_saved_anew():
    """Also while the first batch is still needed, as with accumulated gradients."""
    buffer, a = torch.zeros(2, 5, 16), torch.ones(2, 5, 16, requires_grad=True)
    with SavedIn16Bits():
        losses = [(a * buffer.fill_(step)).sum() for step in range(2)]
        gradients = [torch.autograd.grad(loss, a)[0] for loss in losses]
    assert [gradient.unique().tolist() for gradient in gradients] == [[0], [1]]


def test_statistics_are_kept_as_they_are(monkeypatch):
    """A rounded log-sum-exp would make attention's weights wrong by its size."""
    exact, pack = [], SavedIn16Bits._pack

    def note(self, tensor, least_dim):
        packed = pack(self, tensor, least_dim)
        exact.extend([tuple(tensor.shape)] if packed is tensor else [])
        return packed

    monkeypatch.setattr(SavedIn16Bits, "_pack", note)
    q = torch.randn(2, 7, 16, requires_grad=True)
    with SavedIn16Bits():
        attended, _ = attention.attend(q, q, q, 2)
        nn.LayerNorm(16, elementwise_affine=False)(attended)
        nn.MultiheadAttention(16, 4, batch_first=True)(q, q, q, need_weights=False)  # PyTorch's own call
        assert (2, 4, 7) in exact
        mask = torch.zeros(2, 1, 7, 7)
        attention.attend(q, q, q, 2, mask)
    assert (2, 2, 7) in exact and exact.count((2, 7, 1)) == 2
    assert tuple(mask.shape) in exact or (2, 2, 7, 7) in exact  # CUDA's kernels want it back as it was
    assert F.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"


# -------------------------------------------------------------------------------------------------- second derivatives


def gradient_penalty(x: torch.Tensor, y: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]


def hessian_vector_product(x: torch.Tensor, y: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return torch.autograd.grad(gradient, x, vector)[0]


@pytest.mark.parametrize("build, side", [(resnet, 32), (vit, 16)], ids=["resnet", "vit"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("second", [gradient_penalty, hessian_vector_product])
def test_second_derivatives_are_refused_or_those_of_the_dense_model(build, side, mode, second):
    """Never wrong in silence; what the message names as the remedy works."""
    if mode == "selective" and build is resnet:
        pytest.skip("for ViTs alone")
    stock = build().double().eval()
    model, x = frozen(copy.deepcopy(stock)).eval(), images(side, dtype=torch.float64)
    set_gradient_checkpointing(model, mode)
    x, vector = x.requires_grad_(), torch.randn_like(x)
    with pytest.raises(RuntimeError, match=r"leave out create_graph=True.*unload\(merge=True\)"):
        second(x, model(x), vector)
    twin = dense_twin(stock, model).eval()
    LoRAManager(model).unload(merge=True)
    with sdpa_kernel(SDPBackend.MATH):  # on a CPU PyTorch's own kernel refuses them as well
        assert_close(second(x, model(x), vector), second(x, twin(x), vector), EXACT)


def test_second_derivatives_of_the_head_pass_no_adapter():
    """Its weight's gradient, differentiated with respect to the adapters, takes their first derivative alone."""
    stock = vit().double()
    model, x = frozen(copy.deepcopy(stock)).train(), images(16, dtype=torch.float64)
    twin = dense_twin(stock, model)
    for network in (model, twin):
        network.zero_grad()
        (gradient,) = torch.autograd.grad(network(x).square().sum(), network.heads.head.weight, create_graph=True)
        gradient.square().sum().backward()
    for name, gradient, wanted in expected_gradients(twin, model):
        assert_close(gradient, wanted, EXACT, name)


# ------------------------------------------------------------------------------------------------------ the upper part


@pytest.mark.parametrize("last", [None, 1, 2])
@pytest.mark.parametrize("build, side", [(resnet, 32), (vit, 16)], ids=["resnet", "vit"])
def test_the_halves_of_a_model_are_the_model(build, side, last):
    """Outputs and gradients, whether its blocks are adapted or stock; the halves share its layers."""
    stock, x = build().double().eval(), images(side, dtype=torch.float64)
    adapted = frozen(copy.deepcopy(stock), adapt_last=last).eval()
    for model in (stock, adapted):
        lower, upper = split_model(model, last)
        assert {id(p) for p in upper.parameters()} == {id(p) for p in model.parameters()}
        expected = model(x)
        wanted = torch.autograd.grad(expected.square().sum(), list(upper.get_submodule(head_name(model)).parameters()))
        with torch.no_grad():
            features = lower(x)
        actual = upper(features)
        found = torch.autograd.grad(actual.square().sum(), list(model.get_submodule(head_name(model)).parameters()))
        for ours, theirs in zip((actual, *found), (expected, *wanted), strict=True):
            assert_close(ours, theirs, EXACT)
    if last is not None:
        model.zero_grad()
        model(x).square().sum().backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        upper(features).square().sum().backward()
        for name, gradient in expected.items():
            assert_close(model.get_parameter(name).grad, gradient, EXACT, name)


def test_another_model_has_no_halves():
    model = torchvision.models.swin_t(weights=None)
    with pytest.raises(InputError, match="not SwinTransformer"):
        split_model(model, 1)
    assert split_model(model, None)[1](torch.ones(2, 768)).shape == (2, 1000)
