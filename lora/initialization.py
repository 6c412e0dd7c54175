"""Starts adapters with A in the main directions of the loss's gradient, instead of random ones.

B is zero at the start, so the first steps change W by ``s dB A``: A determines in which r directions of its input a
layer can change. Random directions contain a share of about r / fan_in of the gradient G (fan_out, fan_in). The best r
directions are G's first right singular vectors (LoRA-GA, arXiv 2407.05000, theorem 3.1; here B starts at zero, and W is
unchanged).

G is never formed. If A is zero and B is any matrix Q, the model computes what its base computes, and the gradient of A
is ``s Q^T G``. For a random Q this is a sketch of G's rows (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm
4.1). It takes the time and memory of a few training steps with adapters, for every kind of layer and base.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lora.adapted import adapter_parameters
from toolkit import distributed

# Adapters with this start learn at this many times the rate of everything else. The usual rates of full fine-tuning
# then suit them: benchmarks/RESULTS.md has the measurements. (LoRA Without Regret, 2025, finds a factor of ten.)
ADAPTER_LR_FACTOR = 24.0  # up to rank 8
GRADIENT_IMAGES = 256  # enough for a good gradient


def adapter_lr_factor(r: int) -> float:
    """How many times faster than everything else adapters of rank r learn; alpha is taken to be twice the rank.

    A's rows are orthogonal and equally long at every rank, and Adam moves each number of B by the rate. At one rate a
    step would change W by an amount that grows with sqrt(r) (rank-stabilised scaling, arXiv 2312.03732).
    """
    return ADAPTER_LR_FACTOR * min(1.0, math.sqrt(8 / r))


@torch.no_grad()
def start_at_gradient(model: nn.Module, backward: Callable[[], None], seed: int = 0) -> None:
    """Start the adapters of `model` at its gradient, in place, without changing the model's output.

    B becomes zero. A's rows become orthogonal, and as long as those of a random start, 1 / sqrt(3).

        def backward():
            for images, labels in first_batches:
                F.cross_entropy(model(images), labels).backward()

        start_at_gradient(model, backward)

    Call it after the head has its starting values (`toolkit.answers.probe`), and in eval mode to leave dropout out. An
    adapter is left unchanged if its gradient is zero, not finite, or missing (as a merged one's); all are if `backward`
    raises. The parameters' `.grad` are restored in any case. `backward` adds the gradients of some batches to them: a
    few hundred images are enough. `seed` is that of the random Q.
    """
    pairs = [pair for pair in adapter_pairs(model) if pair[0].requires_grad]
    if not pairs:
        return
    before = [(A.clone(), B.clone()) for A, B in pairs]
    former_gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    generator = torch.Generator().manual_seed(seed)
    for A, B in pairs:
        A.zero_()
        B.copy_(torch.randn(B.shape, generator=generator) / math.sqrt(len(B)))
    model.zero_grad()
    try:
        # Some steps in eval mode are not worth compiling.
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            backward()
        sketches = [A.grad for A, _ in pairs]
    finally:
        for parameter, gradient in former_gradients:
            parameter.grad = gradient
        for (A, B), (former_A, former_B) in zip(pairs, before, strict=True):
            A.copy_(former_A)
            B.copy_(former_B)
    for (A, B), sketch in zip(pairs, sketches, strict=True):
        if sketch is not None and sketch.isfinite().all() and sketch.any():  # zeros have no main directions
            precise = sketch.to(torch.promote_types(sketch.dtype, torch.float32))  # SVD knows no 16 bits
            rows = torch.linalg.svd(precise, full_matrices=False).Vh  # (at most r, fan_in)
            A[: len(rows)] = rows / math.sqrt(3)
            B.zero_()
        distributed.broadcast([A])  # the last bits, or signs, may differ between machines


def adapter_pairs(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Each adapter's A (r, fan_in) and B (fan_out, r)."""
    for layer in model.modules():
        factors = adapter_parameters(layer)
        for name in filter(lambda name: name.startswith("lora_A"), factors):
            yield factors[name], factors[name.replace("lora_A", "lora_B")]
