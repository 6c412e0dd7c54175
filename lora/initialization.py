"""Starts adapters with A in the main directions of the loss's gradient, instead of random ones.

B is zero at the start, so the first steps change W by ``s dB A``: A determines in which r directions of its input a
layer can change. Random directions contain a share of about r / fan_in of the gradient G (fan_out, fan_in). The best r
directions are G's first right singular vectors (LoRA-GA, arXiv 2407.05000, theorem 3.1).

G is never formed. If A is zero and B is any matrix Q, the model computes what its base computes, and the gradient of A
is ``s Q^T G``: for a random Q a sketch of G's rows (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.1).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from lora.adapted import adapted_layers
from toolkit import distributed, dotted, temporarily

ADAPTER_LR_FACTOR = 24.0  # how many times faster these adapters learn, up to rank 8: measured in benchmarks/RESULTS.md
RESNET_LR_FACTOR = 2.0  # further, in a ResNet: measured in benchmarks/RESULTS.md, why is not known
GRADIENT_IMAGES = 256  # enough for a good gradient


def adapter_lr_factor(r: int, most: float = math.inf) -> float:
    """How many times faster than everything else adapters of rank r learn; alpha is taken to be twice the rank."""
    # At one rate a step's change of W would grow with sqrt(r) (rank-stabilised scaling, arXiv 2312.03732).
    return min(ADAPTER_LR_FACTOR, most) * min(1.0, math.sqrt(8 / r))


@torch.no_grad()
def start_at_gradient(model: nn.Module, backward: Callable[[], None], seed: int = 0) -> None:
    """Start the adapters of `model` at its gradient, in place, without changing the model's output: B becomes zero.

    `backward` adds up the gradients of a few hundred images (docs/python.md). Call it when the head has its start, and
    in eval mode to leave dropout out. Adapters without a finite gradient stay unchanged; all do if `backward` raises.
    """
    trained = [(A, B) for A, B in adapter_pairs(model) if A.requires_grad]
    if not trained:
        return
    generator = torch.Generator().manual_seed(seed)
    with contextlib.ExitStack() as factors, temporarily(model.parameters(), grad=None), torch.enable_grad():
        for A, B in trained:
            Q = torch.randn(B.shape, generator=generator) / math.sqrt(len(B))
            factors.enter_context(temporarily([A], data=torch.zeros_like(A)))
            factors.enter_context(temporarily([B], data=Q.to(B)))
        backward()
        sketches = [A.grad for A, _ in trained]
    for (A, B), sketch in zip(trained, sketches, strict=True):
        if sketch is not None and sketch.isfinite().all() and sketch.any():  # zeros have no main directions
            precise = sketch.to(torch.promote_types(sketch.dtype, torch.float32))  # SVD knows no 16 bits
            rows = torch.linalg.svd(precise, full_matrices=False).Vh  # (at most r, fan_in)
            A[: len(rows)] = rows / math.sqrt(3)  # as long as a random start's
            B.zero_()
        distributed.broadcast([A])  # the last bits, or signs, may differ between machines


@torch.no_grad()
def start_at_change(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Start the adapters of `model` at the main part of the change from its weights to trained ones, by their names.

    The first r terms of a singular value decomposition are the matrix of rank r nearest to it (Eckart and Young, 1936).
    Returns the energy of each layer's change, ``||W' - W||^2``: the part that the adapter keeps, and all of it.
    """
    energies = {}
    for name, layer in adapted_layers(model).items():
        change = (trained[dotted(name, layer.weight_name)] - layer.base().tensor).flatten(1)  # (out, fan_in)
        kept = 0.0
        for part, own in zip(layer.parts, change.chunk(len(layer.parts)), strict=True):  # attention's q, k and v
            A = layer.get_parameter(f"lora_A{part}")
            B = layer.get_parameter(f"lora_B{part}")
            U, S, Vh = torch.linalg.svd(own, full_matrices=False)
            S = S[: len(A)]
            rank = len(S)  # below r in a layer as small as this
            B.zero_()
            A[:rank] = Vh[:rank]
            B[:, :rank] = U[:, :rank] * (S / layer.scaling)
            kept += S.square().sum().item()
        energies[name] = kept, change.square().sum().item()
    return energies


def adapter_pairs(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """The A (r, fan_in) and the B (fan_out, r) of each adapter."""
    for layer in adapted_layers(model).values():
        for part in layer.parts:
            yield layer.get_parameter(f"lora_A{part}"), layer.get_parameter(f"lora_B{part}")
