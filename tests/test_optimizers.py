"""Optimizers that the book compares with AdamW on an adapter's factors: what their steps do to W, in closed form."""

import pytest
import torch
from torch import nn

from benchmarks import optimizers


def stepped(method: str, A: torch.Tensor, B: torch.Tensor, gradients: list[torch.Tensor], rate=0.01) -> optimizers.Pair:
    """A pair with s = 2 and ||W|| = 5 after a step at this rate by each of these gradients (out, in) of W."""
    pair = optimizers.Pair(nn.Parameter(A.clone()), nn.Parameter(B.clone()), 2.0, 5.0)
    optimizer = optimizers.METHODS[method]([pair], [], rate)
    for G in gradients:
        pair.A.grad = 2 * pair.B.detach().T @ G
        pair.B.grad = 2 * G @ pair.A.detach().T
        optimizer.step()
    return pair


def change(pair: optimizers.Pair) -> torch.Tensor:
    return 2 * (pair.B @ pair.A).detach()


def test_moments_of_w_are_adams_where_the_rank_is_full():
    gradients = [torch.randn(4, 3) for _ in range(5)]
    A, B = torch.randn(3, 3), torch.randn(4, 3)
    W = nn.Parameter(2 * B @ A)
    adam = torch.optim.AdamW([W], lr=0.01, weight_decay=0.0)
    for W.grad in gradients:
        adam.step()
    torch.testing.assert_close(change(stepped("tangent", A, B, gradients)), W.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["rite", "tangent"])
def test_how_the_change_is_split_into_factors_is_of_no_account(method):
    gradients = [torch.randn(6, 5) for _ in range(3)]
    A, B = torch.randn(2, 5), torch.randn(6, 2)
    own = change(stepped(method, A, B, gradients, rate=0.3))
    R = torch.tensor([[2.0, 1.0], [-1.0, 0.5]])
    other = stepped(method, R @ A, B @ R.inverse(), gradients, rate=0.3)
    torch.testing.assert_close(change(other), own, rtol=1e-3, atol=1e-3)


def test_a_step_is_a_share_of_w():
    moved = change(stepped("relative", torch.randn(2, 5), torch.zeros(6, 2), [torch.randn(6, 5)]))
    assert moved.norm().item() == pytest.approx(0.01 * 5, rel=0.05)


def test_gradients_are_preconditioned_with_the_other_factor():
    A, B, G = torch.randn(2, 5), torch.randn(6, 2), torch.randn(6, 5)
    pair = stepped("scaled", A, B, [G])
    torch.testing.assert_close(pair.A.grad, 2 * torch.linalg.lstsq(B, G).solution, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(pair.B.grad, 2 * torch.linalg.lstsq(A.T, G.T).solution.T, rtol=1e-3, atol=1e-4)
