"""What is kept for backward: gradient checkpointing, second derivatives."""

import copy

import pytest
import torch
from dense import (
    EXACT,
    FP32,
    Operations,
    assert_close,
    classes,
    dense_twin,
    frozen,
    images,
    loss_and_gradients,
    randomize_adapters,
    resnet,
    saved_bytes,
    vit,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetune_lora import add_lora_to_model, freeze_backbone_params, set_gradient_checkpointing
from lora_utils import LoRAManager
from toolkit import InputError


@pytest.mark.parametrize(
    "dropout, elsewhere, four_bits",
    [(0.0, 0.0, False), (0.2, 0.2, False), (0.2, 0.0, False), (0.2, 0.2, True)],
    ids=["", "dropout", "dropout of tokens alone", "4 bits"],
)
def test_checkpointing_a_vit_changes_memory_and_nothing_else(four_bits, dropout, elsewhere):
    """With dropout the same values are dropped the second time; attention's and the adapters' own included."""
    model = vit(dropout=dropout, attention_dropout=elsewhere)
    frozen(model, 0.3, use_qlora=four_bits, lora_dropout=elsewhere).train()
    x = images(16, 8)
    keys = list(model.state_dict())
    expected = loss_and_gradients(model, x)
    before = saved_bytes(model, x)
    set_gradient_checkpointing(model, "full")
    loss, gradients = loss_and_gradients(model, x)
    assert list(model.state_dict()) == keys
    assert torch.equal(loss, expected[0])
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[1][name], FP32, name)
    if not dropout:  # which keeps the LayerNorm's and GELU's output in every mode
        assert saved_bytes(model, x) < 0.6 * before
    set_gradient_checkpointing(model, "none")
    assert saved_bytes(model, x) == before
    assert torch.equal(loss_and_gradients(model, x)[0], expected[0])


def test_layer_norm_and_gelu_are_computed_again():
    """Each of two blocks: its GELU twice, and its two LayerNorms as often as the layers behind them need it."""
    model = frozen(vit()).train()
    with torch.autocast("cpu", torch.bfloat16), Operations() as seen:
        model(images(16, 8)).float().square().sum().backward()
    assert (seen.count("native_layer_norm.default"), seen.count("gelu.default")) == (11, 4)


def test_checkpointing_where_there_is_nothing_to_recompute():
    adapted = frozen(resnet())
    for model, mode, message in (
        (nn.Linear(2, 2), "full", "full finds nothing to recompute"),
        (adapted, "selective", "'selective' is unknown: choose none or full"),
    ):
        with pytest.raises(InputError, match=message):
            set_gradient_checkpointing(model, mode)


def adapted_resnet(freeze: bool) -> nn.Module:
    model = randomize_adapters(add_lora_to_model(resnet(), r=2), std=0.05)
    freeze_backbone_params(model, freeze)
    return model


WAYS = {
    "adapters": lambda: adapted_resnet(freeze=True),
    "all trains": lambda: adapted_resnet(freeze=False),
    "a stock resnet": resnet,
    "a stock vit": vit,
}


@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_other_networks(way):
    """A BatchNorm that trains counts a batch once, though it is computed twice. Afterwards all is as it was."""
    model = WAYS[way]().train()
    x = images(16 if way == "a stock vit" else 32, 8)
    stock = copy.deepcopy(model)
    plain = copy.deepcopy(model)
    (expected, wanted) = loss_and_gradients(plain, x)
    before = saved_bytes(copy.deepcopy(model), x)
    set_gradient_checkpointing(model, "full")
    loss, gradients = loss_and_gradients(model, x)
    assert torch.equal(loss, expected)
    for name, gradient in gradients.items():
        assert_close(gradient, wanted[name], 1e-5, name)
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    assert saved_bytes(model, x) < (0.9 if way == "adapters" else 0.8) * before
    set_gradient_checkpointing(model, "none")
    assert classes(model) == classes(stock)
    for ours, theirs in zip(model.modules(), stock.modules(), strict=True):
        assert set(vars(ours)) == set(vars(theirs))


def kept_by_a_block(**options) -> int:
    """Bytes, of a block that is not the last one, for 8 images of 5 tokens."""
    both = []
    for num_layers in (2, 3):
        model = frozen(vit(num_layers=num_layers, **options)).train()
        both.append(saved_bytes(model, images(16, 8)))
    return both[1] - both[0]


def test_what_a_block_keeps():
    """The output of neither LayerNorm nor GELU."""
    width, mlp, heads, packed = 16, 32, 2, 3 * 2 * 16 * 2  # packed: the A and B of q, k and v, one below the other
    kept = 3 * width + width + heads + mlp  # q, k, v, what the heads answer with its log-sum-exps, the input of GELU
    assert kept_by_a_block() == 4 * (8 * 5 * (2 * width + kept) + packed)  # and the residual before and in the middle
    with torch.autocast("cpu", torch.bfloat16):  # the sum in the middle is of float32, and attention's share is kept
        low = 2 * (width + kept - heads + 6 * 2)  # and what the six adapters make of their inputs
        factors = packed + 2 * (width + width) + 2 * 2 * (width + mlp)  # rounded once, for both directions
        assert kept_by_a_block() == 8 * 5 * (4 * width + low + 4 * heads) + 2 * factors  # log-sum-exps in float32


# ------------------------------------------------------------------------------------------------ second derivatives


def hessian_vector_product(x: torch.Tensor, y: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return torch.autograd.grad(gradient, x, vector)[0]


@pytest.mark.parametrize("build, side", [(resnet, 32), (vit, 16)], ids=["resnet", "vit"])
def test_second_derivatives_are_refused_or_those_of_the_dense_model(build, side):
    """Never wrong in silence; what the message names as the remedy works."""
    stock = build().double().eval()
    model = frozen(copy.deepcopy(stock)).eval()
    x = images(side, dtype=torch.float64)
    set_gradient_checkpointing(model, "full")
    x, vector = x.requires_grad_(), torch.randn_like(x)
    with pytest.raises(RuntimeError, match=r"leave out create_graph=True.*unload\(merge=True\)"):
        hessian_vector_product(x, model(x), vector)
    twin = dense_twin(stock, model).eval()
    LoRAManager(model).unload(merge=True)
    with sdpa_kernel(SDPBackend.MATH):  # on a CPU PyTorch's own kernel refuses them as well
        assert_close(hessian_vector_product(x, model(x), vector), hessian_vector_product(x, twin(x), vector), EXACT)
