"""Adapters that start at the gradient: against the dense gradient's singular vectors, and as training has them."""

import copy

import pytest
import torch
from dense import adapters, changed, dense_twin, frozen, randomize_adapters, snapshot
from torch import nn

from finetune_lora import LoRALinear, add_lora_to_model
from lora.initialization import adapter_lr_factor, adapter_pairs, start_at_gradient

R = 4
X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Layers(nn.Module):
    """One of each kind that can be adapted."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.linear = nn.Linear(16, 24)
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        x = self.grouped(self.conv(x).relu()).flatten(2).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.fc(self.linear(x).mean(1).relu())


def adapted(stock: nn.Module, **options) -> nn.Module:
    return frozen(copy.deepcopy(stock), std=0.0, r=R, **options).eval()


def backward(model: nn.Module, dtype: torch.dtype = torch.float32):
    return lambda: torch.nn.functional.cross_entropy(model(X.to(dtype)).float(), torch.arange(6) % 5).backward()


def share_held(A: torch.Tensor, G: torch.Tensor) -> float:
    """The share of G's energy in the space of A's rows."""
    Q = torch.linalg.qr(A.T.double())[0]
    return ((G @ Q).square().sum() / G.square().sum()).item()


@pytest.mark.parametrize("use_qlora", [False, True], ids=["float", "4 bits"])
def test_a_starts_at_the_main_directions_of_the_dense_gradient(use_qlora):
    """A sketch of r rows holds nearly as much as the best r directions, and much more than random ones."""
    stock = Layers()
    model = adapted(stock, use_qlora=use_qlora)
    twin = dense_twin(stock, model)
    backward(twin, torch.float64)()
    random = copy.deepcopy(model)
    start_at_gradient(model, backward(model))
    assert len(list(adapter_pairs(model))) == 7
    for name, layer in model.named_modules():
        for own, other in zip(adapters(layer), adapters(random.get_submodule(name)), strict=True):
            weight, rows, A, _ = own
            G = getattr(twin.get_submodule(name), weight).grad[rows].flatten(1)
            singular = torch.linalg.svdvals(G).square()
            best = (singular[:R].sum() / singular.sum()).item()
            assert share_held(A, G) > max(0.8 * best, 1.2 * share_held(other[2], G)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("before", [False, True], ids=["", "gradients before"])
def test_the_model_answers_as_before_rows_are_orthogonal_and_gradients_are_what_they_were(before, dtype):
    """Also if it had been trained; and after an error the model is what it was."""
    model = adapted(Layers()).to(dtype)
    answer = model(X.to(dtype))
    if before:
        randomize_adapters(model)
        backward(model, dtype)()
    state = snapshot(model)
    gradients = [copy.deepcopy(p.grad) for p in model.parameters()]

    def fail():
        backward(model, dtype)()
        raise MemoryError

    with pytest.raises(MemoryError):
        start_at_gradient(model, fail)
    assert not changed(state, model)
    drawn = torch.get_rng_state()
    found = []
    for seed in (0, 1, 0):
        start_at_gradient(model, backward(model, dtype), seed)
        found.append(model.linear.lora_A.clone())
    assert torch.equal(torch.get_rng_state(), drawn)  # it draws from its own seed alone
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert torch.equal(model(X.to(dtype)), answer)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients, rtol=0, atol=0)
    for A, B in adapter_pairs(model):
        torch.testing.assert_close(3 * A.float() @ A.float().T, torch.eye(R), atol=2e-2, rtol=0)
        assert not B.any()


def started(model: nn.Module, compute=None) -> set[str]:
    """The names of the factors that this start changes."""
    before = snapshot(model)
    start_at_gradient(model, compute or backward(model))
    return changed(before, model)


def test_adapters_without_a_gradient_that_is_finite_and_not_zero_stay_random():
    """A merged one has none, and zero it is below a head of zeros, or in a block whose last scale is zero."""
    model = adapted(Layers())
    model.linear.merge()
    assert started(model) == {name for name in snapshot(model) if "lora_A" in name}
    assert not started(model, lambda: (model(X).sum() * float("nan")).backward())
    model = adapted(Layers())
    nn.init.zeros_(model.linear.weight)  # nothing comes back through it
    assert started(model) == {"linear.lora_A"}


@pytest.mark.filterwarnings("ignore:the last layer")
def test_a_rank_above_the_layer_s_inputs():
    """The rows beyond stay random."""
    stock = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Flatten(), nn.Linear(64 * 64, 9))
    model = add_lora_to_model(stock, r=8, target_modules="0")
    start_at_gradient(model, backward(model))
    A = model[0].lora_A.detach()
    torch.testing.assert_close(3 * A[:3] @ A[:3].T, torch.eye(3))
    assert A[3:].any(1).all()


def test_a_random_start_is_that_of_a_linear_layers_weight():
    """Uniform up to 1 / sqrt(fan_in), as PyTorch starts it."""
    layer = LoRALinear(400, 5, r=8)
    assert 0.99 / 20 < layer.lora_A.abs().max() <= 1 / 20
    assert layer.lora_A.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.05)


def test_adapters_learn_more_slowly_from_rank_8_on():
    """So that the first step of Adam moves a weight as far at every rank, with alpha twice the rank."""
    assert adapter_lr_factor(4) == adapter_lr_factor(8) == 24
    assert adapter_lr_factor(8, most=3) == 3 and adapter_lr_factor(32, most=3) == 1.5
