"""ViTs: LayerNorm and GELU recomputed, the last block's class token, frozen attention, PyTorch's fast paths."""

import copy

import pytest
import torch
from dense import (
    BF16,
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
    saved_bytes,
    vit,
    watch,
)
from torch import nn
from torchvision.models.vision_transformer import EncoderBlock

from finetune_lora import add_lora_to_model, freeze_backbone_params, set_gradient_checkpointing
from lora import attention, fusion
from lora_utils import LoRAManager


def test_a_vit_equals_the_stock_model():
    stock, x = vit().double(), images(16, dtype=torch.float64)
    assert_equals_dense(stock, frozen(copy.deepcopy(stock)), x, EXACT)


@pytest.mark.parametrize(
    "names", [("ln_1.weight",), ("ln_2.bias",), ("in_proj_weight", "mlp.0.weight", "mlp.3.weight")], ids=str
)
def test_what_trains_beside_the_adapters_gets_its_gradients(names):
    """A LayerNorm, or weights behind one that does not train."""
    stock, x = vit().double(), images(16, dtype=torch.float64)
    model = frozen(copy.deepcopy(stock))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith(names))
    compare_with_dense(stock, model, [x], EXACT)


def test_a_sequence_without_batch_dimension_is_refused():
    """As torchvision's block does, which attention alone would not."""
    for block in (vit().encoder.layers[0], frozen(vit()).encoder.layers[0]):
        with pytest.raises(AssertionError, match=r"Expected .batch_size, seq_length, hidden_dim. got"):
            block(torch.randn(5, 16))


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


TARGETS = (None, "self_attention", "mlp.3", "encoder_layer_1")


@pytest.mark.parametrize("targets, autocast", [(None, True), *((t, False) for t in TARGETS)], ids=str)
@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_class_token_s_block_equals_the_stock_model(targets, mode, autocast, device):
    dtype, tolerance = (torch.float32, 5e-2) if autocast else (torch.float64, EXACT)
    stock, x = vit(hidden_dim=32, mlp_dim=64).to(device, dtype), images(16, 8, dtype=dtype).to(device)
    model = frozen(copy.deepcopy(stock), target_modules=targets)
    set_gradient_checkpointing(model, mode)
    compare_with_dense(stock, model, [x], tolerance, autocast=autocast)
    model.heads.requires_grad_(False)
    compare_with_dense(stock, model.eval(), [x], tolerance, autocast=autocast)


def test_the_encoder_alone_and_what_is_in_the_place_of_the_first_dropout_have_every_token():
    stock, x = vit().double(), images(16, dtype=torch.float64)
    tokens, model = torch.randn(2, 5, 16, dtype=torch.float64), frozen(copy.deepcopy(stock))
    compare_with_dense(stock, model, [tokens], EXACT, lambda network, x: network.encoder(x))
    stock.encoder.dropout = nn.Hardtanh(-0.5, 0.5)
    assert_equals_dense(stock, frozen(copy.deepcopy(stock)), x, EXACT)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batched", [False, True], ids=["PyTorch's attention", "attention by products"])
def test_a_vit_in_low_precision(monkeypatch, device, batched):
    """Of the shapes that the kernels of GPUs are made for: 64 channels a head, 64 patches beside the class token."""
    monkeypatch.setattr(attention, "PREFERS_BATCHED_ATTENTION", batched)
    stock, x = vit(hidden_dim=128, mlp_dim=256, image_size=64).to(device), images(64, 4).to(device)
    model = frozen(copy.deepcopy(stock))
    compare_with_dense(stock, model, [x], 5e-2, autocast=True)


@pytest.mark.parametrize("name, child", [("mlp", nn.Sequential(nn.Conv1d(5, 5, 1))), ("ln_2", nn.LayerNorm((5, 16)))])
def test_a_last_block_that_mixes_tokens_gets_all_of_them(name, child):
    stock, x = vit().double(), images(16, dtype=torch.float64)
    model = frozen(copy.deepcopy(stock))
    twin = dense_twin(stock, model)
    for network in (twin, model):
        setattr(network.encoder.layers[1], name, copy.deepcopy(child).double())
    assert_close(model(x), twin(x), EXACT)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("base_dtype", [None, torch.float16], ids=["float base", "base in 16 bits"])
@pytest.mark.parametrize("mode", ["none", "full"])
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


@pytest.mark.parametrize("way", FROZEN_ATTENTION)
def test_a_hook_on_frozen_attention_or_on_a_layer_of_a_frozen_mlp_sees_the_stock_call(way):
    model, x, seen = vit(), images(16), []
    FROZEN_ATTENTION[way](model)
    expected, block, recorded = model(x), model.encoder.layers[0], []
    block.self_attention.register_forward_hook(lambda module, arguments, output: seen.append(len(arguments)))
    watch(block.mlp[0], recorded)
    assert_close(model(x), expected, FP32)
    assert seen == [3]  # query, key and value
    assert [tuple(output.shape) for _, output in recorded] == [(2, 5, 32)]


def test_attention_that_trains_again_is_the_stock_one():
    model = vit()
    freeze_backbone_params(model)
    assert type(model.encoder.layers[0]) is fusion.FusedEncoderBlock
    freeze_backbone_params(model, freeze=False)
    assert type(model.encoder.layers[0]) is EncoderBlock
    freeze_backbone_params(add_lora_to_model(model))
    LoRAManager(model).unload()
    assert type(model.encoder.layers[0]) is EncoderBlock
