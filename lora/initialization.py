"""How adapters start: A at the main directions of the loss's gradient, instead of at random ones.

B is zero at the start, so the first steps change W by ``s dB A``: A decides in which r directions of its input a layer
can move. Random directions hold a share of about r / fan_in of the gradient G (fan_out, fan_in). The best r directions
are G's first right singular vectors (LoRA-GA, arXiv 2407.05000, theorem 3.1; here B stays zero, and W as it is).

G is never formed. With A zero and any Q in B's place the model computes what its base computes, and the gradient of A
is ``s Q^T G``: with a random Q a sketch of G's rows (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.1), for
the time and memory of training steps with adapters, whatever the kind of layer and the bits of its base.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lora.adapted import is_adapted
from toolkit import distributed

# Adapters with this start learn at this many times the rate of everything else. The usual rates of full fine-tuning
# then suit them: benchmarks/RESULTS.md has the measurements. (LoRA Without Regret, 2025, finds a factor of ten.)
ADAPTER_LR_FACTOR = 24.0
GRADIENT_IMAGES = 256  # whose gradient is enough


def lr_factor(lora_init: str, rank: int) -> float:
    """What the learning rate of adapters with this start (--lora-init) is multiplied by."""
    return ADAPTER_LR_FACTOR if lora_init == "gradient" and rank > 0 else 1.0


def start_at_gradient(model: nn.Module, backward: Callable[[], None], seed: int = 0) -> None:
    """Start the adapters of `model` at its gradient, in place: A's rows orthogonal, B zero. The model's output stays.

    A's rows are as long as those of a random start, 1 / sqrt(3).

        def backward():
            for images, labels in first_batches:
                F.cross_entropy(model(images), labels).backward()

        start_at_gradient(model, backward)

    Call it once the head is as training will have it (`init_head_from_probe`), with the model in eval mode if nothing
    random is to have a part in it. An adapter stays as it is if its gradient is zero, not finite or missing, as that of
    a merged one is; all of them do if `backward` raises. The parameters' `.grad` are put back in any case.

    Args:
        backward: adds the gradients of some batches to the parameters' `.grad`; a few hundred images are enough.
        seed: of the random Q.
    """
    pairs = [pair for pair in adapter_pairs(model) if pair[0].requires_grad]
    if not pairs:
        return
    before = [(A.detach().clone(), B.detach().clone()) for A, B in pairs]
    former_gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for A, B in pairs:
            A.zero_()
            B.copy_(torch.randn(B.shape, generator=generator) / math.sqrt(len(B)))
    model.zero_grad()
    try:
        backward()
        sketches = [A.grad for A, _ in pairs]
    finally:
        for parameter, gradient in former_gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for (A, B), (former_A, former_B) in zip(pairs, before, strict=True):
                A.copy_(former_A)
                B.copy_(former_B)
    with torch.no_grad():
        for (A, B), sketch in zip(pairs, sketches, strict=True):
            if sketch is not None and sketch.isfinite().all() and sketch.any():  # of zeros any direction is a main one
                precise = sketch.to(torch.promote_types(sketch.dtype, torch.float32))  # SVD knows no 16 bits
                rows = torch.linalg.svd(precise, full_matrices=False).Vh  # (at most r, fan_in)
                A[: len(rows)] = rows / math.sqrt(3)
                B.zero_()
        distributed.broadcast(A for A, _ in pairs)  # on other machines the last bits, or signs, may differ


def adapter_pairs(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Each adapter's A (r, fan_in) and B (fan_out, r)."""
    for module in model.modules():
        if is_adapted(module):
            for name, parameter in module.named_parameters(recurse=False):
                if name.startswith("lora_A"):
                    yield parameter, getattr(module, name.replace("lora_A", "lora_B"))
