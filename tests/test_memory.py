"""What is kept for backward: gradient checkpointing, a model's two halves."""

import copy

import dense
import pytest
import torch
from dense import EXACT, FP32, assert_close, classes, frozen, images, resnet, saved_bytes, vit
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

from finetune_lora import freeze_backbone_params, set_gradient_checkpointing
from lora.split import split_model
from toolkit import InputError
from toolkit.models import norms
from toolkit.models.backbones import head_name


def all_trains() -> nn.Module:
    model = frozen(resnet())
    freeze_backbone_params(model, freeze=False)
    return model


def dropping(elsewhere: float = 0.2, **options) -> nn.Module:
    """Of tokens, and of attention and the adapters' inputs. It keeps LayerNorm's and GELU's output in every mode."""
    return frozen(vit(dropout=0.2, attention_dropout=elsewhere), 0.3, lora_dropout=elsewhere, **options)


def sharing() -> nn.Module:
    model = resnet().train()
    norms.share_statistics(model)
    return model


# How a model is made, and what it keeps for backward then, as a share of what it kept before.
WAYS = {
    "adapters in a vit": (lambda: frozen(vit(), 0.3), 0.6),
    "adapters in a resnet": (lambda: frozen(resnet()), 0.9),
    "all of a resnet trains": (all_trains, 0.8),
    "a stock resnet": (resnet, 0.8),
    "a resnet with the statistics of all processes": (sharing, 0.8),
    "a stock vit": (vit, 0.8),
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
    x = images(32 if "resnet" in way else 16, 8)
    stock = copy.deepcopy(model)
    plain = copy.deepcopy(model)
    expected, wanted = dense.loss_and_gradients(plain, x)
    before = saved_bytes(copy.deepcopy(model), x)
    set_gradient_checkpointing(model, "full")
    assert list(model.state_dict()) == list(stock.state_dict())
    loss, gradients = dense.loss_and_gradients(model, x)
    assert torch.equal(loss, expected) and gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, wanted[name], FP32, name)
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    assert saved_bytes(model, x) <= share * before
    set_gradient_checkpointing(model, "none")
    assert saved_bytes(model, x) == before
    assert torch.equal(dense.loss_and_gradients(model, x)[0], expected)
    assert classes(model) == classes(stock)
    for ours, theirs in zip(model.modules(), stock.modules(), strict=True):
        assert set(vars(ours)) == set(vars(theirs))


def test_layer_norm_and_gelu_are_computed_again():
    """Each of two blocks: its GELU twice, and its two LayerNorms as often as the layers behind them need it."""
    model = frozen(vit()).train()
    with torch.autocast("cpu", torch.bfloat16), dense.Operations() as seen:
        model(images(16, 8)).float().square().sum().backward()
    assert (seen.count("native_layer_norm.default"), seen.count("gelu.default")) == (11, 4)


def test_checkpointing_is_refused_where_it_does_nothing():
    refused = [
        (nn.Linear(2, 2), "full", "full finds nothing to recompute"),
        (resnet(), "selective", "choose none or full"),
    ]
    for model, mode, message in refused:
        with pytest.raises(InputError, match=message):
            set_gradient_checkpointing(model, mode)


def kept_by_a_block() -> int:
    """Bytes, of a block that is not the last one, for 8 images of 5 tokens."""
    two, three = (saved_bytes(frozen(vit(num_layers=layers)).train(), images(16, 8)) for layers in (2, 3))
    return three - two


def test_what_a_block_keeps():
    """The output of neither LayerNorm nor GELU."""
    width, mlp, heads, packed = 16, 32, 2, 3 * 2 * 16 * 2  # packed: the A and B of q, k and v, one below the other
    kept = 3 * width + width + heads + mlp  # q, k, v, what the heads answer with its log-sum-exps, the input of GELU
    assert kept_by_a_block() == 4 * (8 * 5 * (2 * width + kept) + packed)  # and the residual before and in the middle
    with torch.autocast("cpu", torch.bfloat16):  # the sum in the middle is of float32, and attention's share is kept
        low = 2 * (width + kept - heads + 6 * 2)  # and what the six adapters make of their inputs
        factors = packed + 2 * (width + width) + 2 * 2 * (width + mlp)  # rounded once, for both directions
        assert kept_by_a_block() == 8 * 5 * (4 * width + low + 4 * heads) + 2 * factors  # log-sum-exps in float32


# ------------------------------------------------------------------------------------------------- a model's two halves


@pytest.mark.parametrize("last", [None, 1, 2])
@pytest.mark.parametrize("build, side", [(resnet, 32), (vit, 16)], ids=["resnet", "vit"])
def test_the_halves_of_a_model_are_the_model(build, side, last):
    """Outputs and gradients, whether its blocks are adapted or stock; the halves share its layers."""
    stock = build().double().eval()
    x = images(side, dtype=torch.float64)
    for model in (stock, frozen(copy.deepcopy(stock), adapt_last=last).eval()):
        lower, upper = split_model(model, last)
        assert {id(p) for p in upper.parameters()} == {id(p) for p in model.parameters()}
        with torch.no_grad():
            features = lower(x)
        above = list(model.get_submodule(head_name(model)).parameters())
        if last is not None and model is not stock:
            above = list(dense.trained(model).values())
        results = []
        for output in (model(x), upper(features)):
            results.append((output, *torch.autograd.grad(output.square().sum(), above)))
        for ours, theirs in zip(*results, strict=True):
            assert_close(ours, theirs, EXACT)


def test_another_model_has_no_halves():
    model = SwinTransformer([4, 4], 24, [2], [2], [4, 4], num_classes=5)
    with pytest.raises(InputError, match="not SwinTransformer"):
        split_model(model, 1)
    assert split_model(model, None)[1](torch.ones(2, 24)).shape == (2, 5)
