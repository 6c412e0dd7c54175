"""The adapted layers against the layers that they adapt, with the update in the weight."""

import copy

import dense
import pytest
import torch
import torch.nn.functional as F
from dense import BF16, DEVICES, EXACT, FP32, assert_close, compare_with_dense, frozen, randomize_adapters, rounded
from torch import nn
from torch.func import functional_call

from lora.adapted import ADAPTED, LoRASettings
from lora_utils import LoRAManager, base_digests
from toolkit import InputError


def adapted(stock: nn.Module, four_bits: bool = False, base_dtype: torch.dtype | None = None, **options) -> nn.Module:
    """The layer with a random update; what is not an adapter is frozen, but for biases, which show their gradients."""
    settings = LoRASettings(**{"r": 4, "lora_alpha": 6, **options})
    layer = ADAPTED[type(stock)][four_bits].adapt(copy.deepcopy(stock), settings, base_dtype)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("lora_" in name or "bias" in name)
    return randomize_adapters(layer)


LINEAR = {"no rows": (0, 22), "one row": (22,), "few rows": (3, 22), "many rows": (2, 50, 22), "no bias": (50, 22)}
CONVOLUTIONS = {
    "1x1": {},
    "1x1, no image": {},  # as a process gets a batch that has no share of the last one
    "1x1, stride 2": {"stride": 2},
    "1x1, padding": {"padding": 1},
    "3x3, stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "larger than its input": {"kernel_size": 3, "padding": 1, "out_channels": 20},
    "lopsided everything": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 3)},
    "same, even kernel": {"kernel_size": 4, "padding": "same"},
    "same, even kernel, reflect": {"kernel_size": (4, 3), "padding": "same", "padding_mode": "reflect"},
    "groups, stride 2": {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
    "wide groups, circular": {"kernel_size": 5, "padding": 4, "dilation": 2, "groups": 2, "padding_mode": "circular"},
    "depthwise, circular": {"kernel_size": 3, "padding": "same", "padding_mode": "circular", "groups": 8},
    "depthwise, stride 2": {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 8},
    "wide depthwise": {"kernel_size": 5, "padding": 2, "groups": 8},
    "wide depthwise, no image": {"kernel_size": 5, "padding": 2, "groups": 8},
    "lopsided depthwise": {"kernel_size": (4, 5), "stride": (1, 2), "padding": (1, 2), "dilation": (2, 1), "groups": 8},
    "made dilated": {"kernel_size": 3, "stride": 2, "padding": 1},
}
INPUTS = ("self", "key is value", "all different")  # of attention
IN_8_BITS = 2.5e-2  # of linear layers: inputs and gradients are rounded by rows, too
# The options of `adapted`, the model's dtype, autocast's, and the relative error that is promised.
STORAGES = {
    "float32": ({}, torch.float32, None, FP32),
    "autocast": ({}, torch.float32, torch.bfloat16, BF16),
    "float64, autocast": ({}, torch.float64, torch.bfloat16, EXACT),  # which leaves float64 alone
    "bf16": ({}, torch.bfloat16, None, BF16),
    "bf16 base": ({"base_dtype": torch.bfloat16}, torch.float32, None, FP32),
    "8 bits": ({"base_dtype": torch.int8}, torch.float32, None, IN_8_BITS),
    "8 bits, autocast": ({"base_dtype": torch.int8}, torch.float32, torch.bfloat16, IN_8_BITS),
    "4 bits": ({"four_bits": True}, torch.float32, None, FP32),
    "4 bits, autocast": ({"four_bits": True}, torch.float32, torch.bfloat16, BF16),
}


def stock_and_inputs(case: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, list[torch.Tensor]]:
    if case in INPUTS:
        stock = attention().to(device, dtype)
        return stock, attention_inputs(stock, case)
    if case in LINEAR:
        stock = nn.Linear(22, 41, bias=case != "no bias")
        shape = LINEAR[case]
    else:
        options = CONVOLUTIONS["3x3, stride 2" if case == "one image" else case]
        stock = nn.Conv2d(8, **{"out_channels": 8 if "depthwise" in case else 12, "kernel_size": 1, **options})
        stock.bias.data = torch.randn(stock.out_channels, 2)[:, 0]  # not contiguous
        shape = (0 if "no image" in case else 2, 8, 9, 8)[case == "one image" :]
    if case == "made dilated":  # as segmentation libraries do with the finished layers of an encoder
        stock.stride, stock.padding, stock.dilation = (1, 1), (2, 2), (2, 2)
    return stock.to(device, dtype), [torch.randn(shape, device=device, dtype=dtype)]


def changed_in_place(layer: nn.Module, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """What follows a layer may work in place, as nn.ReLU(inplace=True) in VGG's classifier and MoCo's projectors."""
    y = layer(*inputs)
    if isinstance(y, torch.Tensor):
        y.mul_(2)
    return y


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("case", [*LINEAR, *CONVOLUTIONS, "one image", *INPUTS])
def test_a_layer_is_the_stock_one_with_the_update_in_its_weight(case, storage, device):
    """Over a base in fewer bits, with the weight that those stand for."""
    how, dtype, autocast, tolerance = STORAGES[storage]
    stock, inputs = stock_and_inputs(case, device, dtype)
    if case in INPUTS:  # four products, each rounded: the stock layer's own gradients in bf16 are up to 3 % off
        tolerance *= {BF16: 4, IN_8_BITS: 2}.get(tolerance, 1)
    layer = adapted(stock, **how)
    assert all(A.dtype == torch.promote_types(dtype, torch.float32) for _, _, A, _ in dense.adapters(layer))
    # A block in float32 may be inside an autocast region, or backward() be enclosed as well.
    around = torch.bfloat16 if storage == "float32" and case not in INPUTS else None
    compare_with_dense(stock, layer, inputs, tolerance, changed_in_place, autocast, around)
    if not how:  # two-stage and full fine-tuning: the base trains beside its adapter
        compare_with_dense(stock, layer.eval().requires_grad_(True), inputs, tolerance, changed_in_place, autocast)


# A dropped input of the adapter, a BatchNorm, an addition and a ReLU.
INSIDE = [(False, False, True, False), (True, False, False, True), (False, True, True, True), (True, True, True, True)]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("drops, normed, added, relu", INSIDE)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("storage", ["float32", "autocast", "bf16", "4 bits"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_takes_along_what_follows(name, storage, memory_format, drops, normed, added, relu, device):
    """With an input of its own for the adapter; inside oneDNN where that is there."""
    how, dtype, autocast, tolerance = STORAGES[storage]
    conv, [x] = stock_and_inputs(name, device, dtype)
    norm = dense.seen(nn.BatchNorm2d(conv.out_channels))
    stock = nn.ModuleList([conv, norm]).eval().to(device, dtype, memory_format=memory_format)
    model = copy.deepcopy(stock).requires_grad_(False)
    model[0] = adapted(conv, **how)
    stock = rounded(stock, model)
    base = copy.deepcopy(stock[0]).double()
    with torch.autocast(device, torch.bfloat16, enabled=autocast is not None):
        y = model[0](x)
    outputs = []

    def compute(network: nn.ModuleList, x: torch.Tensor, dropped: torch.Tensor, residual: torch.Tensor):
        conv, norm = network
        if network is model:
            conv._adapter_input = lambda x: dropped if drops else None
            outputs.append(conv(x, norm if normed else None, residual if added else None, relu))
            return outputs[-1]
        y = conv(dropped) + base(x) - base(dropped) if drops else conv(x)  # W x + s B A dropped
        if normed:
            y = norm(y)
        if added:
            y = y + residual
        if not relu:
            return y
        assert_close(outputs[0], y.relu(), 2 * tolerance)
        return y * (outputs[0] > 0)  # where an output is near zero, rounding decides whether it is positive

    inputs = [t.contiguous(memory_format=memory_format) for t in (x, torch.randn_like(x), torch.randn_like(y))]
    compare_with_dense(stock, model, inputs, 2 * tolerance, compute, autocast)
    if not how and not drops:
        outputs.clear()
        model[0].requires_grad_(True)
        compare_with_dense(stock, model, inputs, 2 * tolerance, compute, autocast)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("stock", [nn.Linear(8, 12), nn.Conv2d(8, 12, 3, 2, padding_mode="reflect")], ids=str)
def test_dropout_acts_on_what_the_adapter_sees(stock, trains):
    """y = W z + s B A dropout(z), with the mask that the seed gives, of z = gelu(x), which may be recomputed."""
    layer = adapted(stock, lora_dropout=0.4)
    layer.weight.requires_grad_(trains)
    x = torch.randn(2, 8, 9, 8, requires_grad=True)
    torch.manual_seed(7)
    y = layer(x, prologue=F.gelu) if isinstance(layer, nn.Linear) else layer(F.gelu(x))
    torch.manual_seed(7)
    z = F.gelu(x)
    update = layer.scaling * (layer.lora_B @ layer.lora_A).view_as(stock.weight)
    expected = functional_call(stock, {"weight": layer.weight, "bias": layer.bias}, z)
    expected = expected + functional_call(stock, {"weight": update, "bias": torch.zeros(12)}, F.dropout(z, 0.4))
    upstream = torch.randn_like(y)
    found = [(t, *torch.autograd.grad(t, [x, *dense.trained(layer).values()], upstream)) for t in (y, expected)]
    assert_close(*found, FP32)
    compare_with_dense(stock, layer.eval(), [x.detach()], FP32)  # evaluation drops nothing


# ----------------------------------------------------------------------------------------------------------- attention

E, H, L, S, N = 16, 4, 5, 7, 3


def padding(length: int) -> torch.Tensor:
    """The last positions of the second and third sequence are padding."""
    return torch.arange(length) >= torch.tensor([length, length - 1, length - 3])[:, None]


def attention_calls(n: int, L: int, S: int) -> list[dict]:
    """What is given, for n sequences; for one of them without a dimension of its own."""
    blocked = torch.rand(n * H, L, S) < 0.4
    blocked.diagonal(dim1=-2, dim2=-1).fill_(False)  # no query is left without a key
    floats = torch.randn(n * H, L, S, dtype=torch.float64)
    padded = padding(S)[-n:].squeeze(0)
    return [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"attn_mask": blocked[0], "need_weights": False},
        {"attn_mask": floats, "need_weights": False},
        {"attn_mask": floats[0], "key_padding_mask": torch.randn(n, S, dtype=torch.float64).squeeze(0)},
        {"attn_mask": torch.ones(L, S).triu(1).bool(), "is_causal": True},
        {"attn_mask": blocked & ~padding(S).any(0), "key_padding_mask": padded, "need_weights": False},
    ]


def attention(**options) -> nn.MultiheadAttention:
    stock = nn.MultiheadAttention(E, H, **{"batch_first": True, **options})
    for name, parameter in stock.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)  # PyTorch starts them as zero
    return stock


def attention_inputs(stock: nn.MultiheadAttention, inputs: str, batched: bool = True) -> list[torch.Tensor]:
    def sequence(length: int) -> torch.Tensor:
        x = torch.randn(N, length, E).to(stock.out_proj.weight)
        if not batched:
            return x[0]
        return x if stock.batch_first else x.transpose(0, 1)

    query = sequence(L)
    key = sequence(S)
    return {"self": [query] * 3, "key is value": [query, key, key], "all different": [query, key, sequence(S)]}[inputs]


@pytest.mark.parametrize("count", [N, 1], ids=["a batch", "one sequence"])
@pytest.mark.parametrize("kind", [{}, {"batch_first": False}, {"bias": False}, {"dropout": 0.5}], ids=str)
@pytest.mark.parametrize("inputs", INPUTS)
def test_attention(kind, inputs, count):
    """Dropout is of the attention's weights."""
    for options in attention_calls(count, L, L if inputs == "self" else S):
        stock = attention(**kind).double()
        x = attention_inputs(stock, inputs, batched=count > 1)

        def attend(model: nn.Module, *x: torch.Tensor, options=options):
            torch.manual_seed(7)  # with which both drop the same weights
            return model(*x, **options)

        for training in (True, False):
            compare_with_dense(stock.train(training), adapted(stock).train(training), x, EXACT, attend)


WRONG_CALLS = [("attn_mask", shape) for shape in ((L + 1, S), (1, S), (H, L, S), (S,))]
WRONG_CALLS += [("key_padding_mask", shape) for shape in ((N, S + 1), (1, S))]


@pytest.mark.parametrize("name, shape", WRONG_CALLS)
def test_wrong_calls_are_refused(name, shape):
    """As the stock layer does; some masks of a wrong shape would broadcast into a wrong result."""
    layer = adapted(attention())
    x = attention_inputs(layer, "key is value")
    with pytest.raises(RuntimeError, match=rf"{name} has shape .* must be \("):
        layer(*x, **{name: torch.zeros(shape)})
    with pytest.raises(RuntimeError, match="is_causal is a hint about attn_mask"):  # which is not there
        layer(*x, is_causal=True)


@pytest.mark.parametrize("inputs", INPUTS)
def test_attention_dropout_draws_one_mask_per_distinct_input(inputs):
    stock = attention()
    layer = adapted(stock, lora_dropout=0.4)
    x = attention_inputs(stock, inputs)
    torch.manual_seed(7)
    y, _ = layer(*x, need_weights=False)
    torch.manual_seed(7)
    dropped = {key: F.dropout(t, 0.4) for key, t in {id(t): t for t in x}.items()}
    projected = []
    for t, (_, rows, A, B) in zip(x, dense.adapters(layer), strict=True):
        projection = F.linear(t, stock.in_proj_weight[rows], stock.in_proj_bias[rows])
        projection = projection + layer.scaling * dropped[id(t)] @ A.T @ B.T
        projected.append(projection.unflatten(-1, (H, E // H)).transpose(1, 2))
    attended = F.scaled_dot_product_attention(*projected).transpose(1, 2).flatten(-2)
    out = layer.out_proj
    expected = stock.out_proj(attended) + out.scaling * F.dropout(attended, 0.4) @ out.lora_A.T @ out.lora_B.T
    assert_close(y, expected, FP32)


@pytest.mark.parametrize("targets", [None, "linear1", "self_attn"], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "key padding"])
@pytest.mark.parametrize("layers", [0, 2], ids=["layer", "encoder"])
def test_the_fast_path_of_encoders_does_not_bypass_the_adapters(layers, padded, targets):
    """In eval mode without gradients PyTorch hands the raw weights to one fused kernel; again without adapters."""
    stock = nn.TransformerEncoderLayer(E, H, 24, 0.0, "gelu", batch_first=True).eval()
    if layers > 0:
        stock = nn.TransformerEncoder(stock, layers).eval()
        targets = targets and rf"layers\.\d\.{targets}"
    model = frozen(copy.deepcopy(stock), 0.3, target_modules=targets)
    x = torch.randn(N, L, E)

    def visible(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return network(x, src_key_padding_mask=padding(L))[~padding(L)] if padded else network(x)

    for training in (True, False):
        compare_with_dense(stock, model.train(training), [x], FP32, visible)
    expected = visible(model, x)
    LoRAManager(model).merge_lora_weights()
    with torch.no_grad():
        assert_close(visible(model, x), expected, FP32)
    LoRAManager(model).unload(merge=True)
    for ours, theirs in zip(model.modules(), stock.modules(), strict=True):
        for flag in ("use_nested_tensor", "activation_relu_or_gelu", "stock_fast_path"):
            assert getattr(ours, flag, 0) == getattr(theirs, flag, 0)


@pytest.mark.parametrize("storage", ["float32", "bf16", "bf16 base", "8 bits", "4 bits"])
@pytest.mark.parametrize("case", ["many rows", "3x3, stride 2", "wide depthwise", *INPUTS])
def test_merging(case, storage):
    """Equals W + s B A by hand, twice is once, and then the base is back bit for bit; fewer bits merge into float.
    Merged or not, a layer whose adapter is switched off is the stock layer. Merged it drops nothing in training, and
    its adapter gets no gradient."""
    how, dtype, _, tolerance = STORAGES[storage]
    if tolerance > FP32:
        tolerance *= 2
    stock, inputs = stock_and_inputs(case, "cpu", dtype)
    layer = adapted(stock, **how, lora_dropout=0.5).eval()
    stock = rounded(stock, layer)
    twin = dense.dense_twin(stock, layer)
    manager = LoRAManager(layer)

    def answer(network: nn.Module, inputs=inputs) -> torch.Tensor:
        y = network(*inputs)
        return y[0] if isinstance(y, tuple) else y

    expected = answer(layer)
    before = dense.snapshot(layer)
    with manager.disable_lora():
        with manager.disable_lora():
            pass
        assert_close(answer(layer), answer(stock), tolerance)  # what was off before stays off
    manager.merge_lora_weights()
    merged = dense.snapshot(layer)
    assert list(merged) == list(stock.state_dict())
    for name, tensor in twin.state_dict().items():
        assert merged[name].dtype == dtype
        # In low precision: W + s B A rounded once, so to half a unit of the last place.
        assert_close(merged[name], tensor, 1e-6 if dtype == torch.float32 else 2.0**-8, name)
    manager.merge_lora_weights()
    dense.assert_unchanged(merged, layer)
    y = answer(layer.train())
    assert_close(y, answer(twin, [x.double() for x in inputs]), tolerance)
    y.sum().backward()
    assert all(p.grad is None for name, p in layer.named_parameters() if "lora_" in name)
    with pytest.raises(ZeroDivisionError), manager.disable_lora():
        assert_close(answer(layer.eval()), answer(stock), tolerance)
        1 / 0  # noqa: B018
    manager.unmerge_lora_weights()
    dense.assert_unchanged(before, layer)
    assert torch.equal(answer(layer), expected)


@pytest.mark.parametrize("storage", ["float32", "bf16 base", "8 bits", "4 bits"])
def test_a_layer_is_copied_saved_loaded_and_cast_like_any_other(storage, tmp_path):
    """Bytes and constants are both in the file. A merged layer takes no state: its base, kept aside, would not know."""
    layer = adapted(nn.Linear(64, 40), **STORAGES[storage][0])
    other = adapted(nn.Linear(64, 40), **STORAGES[storage][0])
    x = torch.randn(50, 64)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    torch.save(layer.state_dict(), tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    other.merge()
    with pytest.raises(RuntimeError, match="weight is merged: call unmerge_lora_weights"):
        other.load_state_dict(state)
    other.unmerge()
    other.load_state_dict(state)
    nn.init.zeros_(layer.lora_B)
    layer.weight.data.zero_()
    assert torch.equal(twin(x), expected) and torch.equal(other(x), expected)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_surplus"):
        other.load_state_dict({**state, "weight_surplus": torch.zeros(1)})
    base = twin.weight.clone()
    twin.merge()
    twin.to(torch.bfloat16)
    twin.unmerge()
    assert torch.equal(twin.weight, base.bfloat16() if storage == "float32" else base)
    assert twin.lora_A.dtype == torch.bfloat16
    assert_close(twin(x.bfloat16()), expected, BF16)
    if storage == "float32":
        return
    with pytest.raises(InputError, match="fewer bits cannot become float"):
        twin.remove_lora()
    if storage != "bf16 base":
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            other.load_state_dict(nn.Linear(64, 40).state_dict(), strict=False)
    if storage == "4 bits":
        del state["weight.absmax"]
        with pytest.raises(RuntimeError, match=r'Missing key.*"weight\.absmax"'):
            other.load_state_dict(state)


@pytest.mark.parametrize("bits", dense.FEWER_BITS)
def test_a_base_in_fewer_bits_is_known_by_its_floats_until_another_takes_its_place(bits, tmp_path):
    """So the adapter file is as of a float base, which from 8 bits on may read it as well; and it must not name a base
    that its adapters never had. The same bytes with other constants are another base, too."""
    stock, other = dense.vit(hidden_dim=64).eval(), dense.vit(hidden_dim=64)
    x = dense.images(16, 4)
    model = frozen(copy.deepcopy(stock), **dense.FEWER_BITS[bits])
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)  # the same numbers are the same base
    known = base_digests(model)
    assert known == base_digests(stock)
    path = tmp_path / "lora.pth"
    LoRAManager(model).save_lora_checkpoint(path)
    readers = [dense.FEWER_BITS[bits]] if bits == 4 else [{}, dense.FEWER_BITS[bits]]
    for options in readers:
        again = frozen(copy.deepcopy(stock), **options)
        LoRAManager(again).load_lora_checkpoint(path)
        assert_close(again(x), model(x), FP32 if options else 2 * IN_8_BITS)

    stored = [name for name, p in model.named_parameters() if p.dtype != torch.float32]
    for name in stored:
        state[f"{name}.nested_absmax" if bits == 4 else name][:1] += 1
    model.load_state_dict(other.state_dict() if bits == 16 else state, strict=False)
    found = base_digests(model)
    assert len(stored) == 8 and not {name for name in stored if found[name] == known[name]}
    assert bits < 16 or found == base_digests(other)
    LoRAManager(model).save_lora_checkpoint(path)
    LoRAManager(copy.deepcopy(model)).load_lora_checkpoint(path)
    with pytest.raises(InputError, match="another base"):
        LoRAManager(again).load_lora_checkpoint(path)
