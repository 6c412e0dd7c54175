"""AdamW, its rates and their schedule, and the weights that are kept: those that train, or the start's."""

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from toolkit import attributes, choices
from toolkit.run.options import FineTuneOptions


def build_optimizer(model: nn.Module, rate: float, adapter_lr_factor=1.0, weight_decay=0.0) -> torch.optim.Optimizer:
    """AdamW over everything that trains, biases and norms without weight decay; adapters learn at rate times factor."""
    groups: dict[tuple[bool, float], dict[str, Any]] = {}  # by whether they are adapters', and by decay
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_adapter = name.rpartition(".")[2].startswith("lora_")
            own = rate * adapter_lr_factor if is_adapter else rate
            decay = weight_decay if parameter.dim() > 1 else 0.0
            group = groups.setdefault((is_adapter, decay), {"params": [], "lr": own, "weight_decay": decay})
            group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), fused=True)  # all tensors in one kernel, or on a CPU in one loop


@contextlib.contextmanager
@torch.no_grad()
def weights_replaced(weights: Mapping[str, Tensor], others: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
    """Within this block some of a model's weights, by name, have other values."""
    with contextlib.ExitStack() as stack:
        for name, other in others:
            stack.callback(weights[name].copy_, weights[name].clone())
            weights[name].copy_(other)
        yield


class KeptWeights:
    """The weights that are evaluated and saved: those that train, or those of the start where training does harm."""

    # Nothing between them: half of the change can be worse than none and than all of it (benchmarks/RESULTS.md).

    def __init__(self, model: nn.Module, may_be_start: bool):
        self.weights: dict[str, Tensor] = {}  # the model's own, which training changes in place
        # An adapter's A stays; its B starts at zero. BatchNorm's statistics are estimated anew.
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.rpartition(".")[2].startswith("lora_A"):
                self.weights[name] = parameter.detach()
        self.may_be_start = may_be_start
        self.at_start = False
        self.start: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Remember the present weights as the start of training."""
        if self.may_be_start:
            self.start = {name: weight.clone() for name, weight in self.weights.items()}

    def in_place(self) -> contextlib.AbstractContextManager:
        """Within this block the model has the weights that are kept in place of those that train."""
        if not self.at_start:
            return contextlib.nullcontext()
        return weights_replaced(self.weights, self.start.items())

    def state_dict(self) -> dict[str, Any]:
        return attributes(self, "at_start", "start")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at_start = state["at_start"]
        self.start = {name: start.clone().to(self.weights[name]) for name, start in state["start"].items()}


STEPS_TO_TRAIN = 80  # of a run at the given learning rate; a shorter one has a lower rate: see benchmarks/RESULTS.md
SAFE_RATE = 1e-4  # the most that up to 60 steps have
LEAST_WARMUP_STEPS = 20
MOST_WITH_MASKS = 3e-3  # of adapters that begin at the gradient: at 24 times what a head of pixels wants they collapse


def run_divisor(args: FineTuneOptions, rate: float, steps: int) -> float:
    """The divisor of a run's learning rate: above 1 for adapters that begin at the gradient, if it has few steps."""
    # All others train at what is typed: masks too, where an image has thousands of labels to mend harm by.
    if not args.freeze_backbone or "random" in (args.head_init, args.lora_init) or args.task in choices.PER_PIXEL:
        return 1.0
    # Adam's first steps harm what the probe knows, later ones mend that. The power is measured: benchmarks/RESULTS.md.
    share = min(1.0, (steps / STEPS_TO_TRAIN) ** 2.5)
    return max(1.0, rate * (1 - share) / SAFE_RATE) / share


def warmup_steps(epochs: float, steps_per_epoch: int, total_steps: int) -> int:
    """The number of steps of a warm-up of some epochs: at least a few unless there is none. A whole run is halved."""
    if epochs == 0:
        return 0
    steps = max(round(steps_per_epoch * epochs), min(LEAST_WARMUP_STEPS, total_steps // 2))
    return steps if steps < total_steps else total_steps // 2


def lr_schedule(optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int = 0) -> LambdaLR:
    """The learning rate's course: a linear warm-up, then a cosine that falls to 0."""
    # A `GradScaler` leaves out steps whose gradients float16 cannot hold, and the first may be one.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return LambdaLR(optimizer, factor)


def lower_rates(schedule: LambdaLR, divisor: float) -> None:
    """Divide the learning rates, now and for the rest of the schedule."""
    for number, group in enumerate(schedule.optimizer.param_groups):
        group["lr"] /= divisor
        schedule.base_lrs[number] /= divisor
