"""Whether products in 8 bits are faster on this CPU than those in floats: measured once, and printed."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit import devices, distributed

MEASURED_TOKENS = 512  # as many as keep a processor busy
WORTH_ROUNDING = 1.5  # times as fast: less is lost in the rest of a step


@functools.cache
def speedups(
    out: int, width: int, multiply: Callable[[Tensor], Callable[[Tensor], Tensor]]
) -> dict[torch.dtype, float]:
    """How many times as fast as in floats a CPU multiplies by a weight (out, width) in 8 bits, by the floats' dtype.

    Measured once, and printed. Several processes get one answer. `multiply` turns a float weight into the product with
    it in 8 bits, (N, width) -> (N, out).
    """
    weight = torch.ones(out, width)
    tokens = torch.ones(MEASURED_TOKENS, width)
    ways = (
        functools.partial(multiply(weight), tokens),
        functools.partial(F.linear, tokens, weight),
        functools.partial(F.linear, tokens.bfloat16(), weight.bfloat16()),
    )
    in_8_bits, in_float32, in_bf16 = distributed.all_sum(*map(devices.shortest_seconds, ways))
    times = {torch.float32: in_float32 / in_8_bits, torch.bfloat16: in_bf16 / in_8_bits}
    print(
        f"products in 8 bits ({width} to {out}): {times[torch.float32]:.1f} times the speed of fp32, "
        f"{times[torch.bfloat16]:.1f} times the speed of bf16; used from {WORTH_ROUNDING} times on, else "
        "--arithmetic float"
    )
    return times
