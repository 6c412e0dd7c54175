"""AdamW, its rates and their schedule, and the average of the weights."""

import argparse
import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from toolkit.models.backbones import in_head


def build_optimizer(
    model: nn.Module, args: argparse.Namespace, adapter_lr_factor: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW over everything that trains: biases and norms without weight decay, the head at a rate of its own.

    Args:
        adapter_lr_factor: what the learning rate of adapters is multiplied by.
    """
    of_head, of_adapters = own_rates(args, args.learning_rate, adapter_lr_factor)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}  # by rate and decay
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = of_head if in_head(model, name) else args.learning_rate
            rate = of_adapters if name.rpartition(".")[2].startswith("lora_") else rate
            decay = args.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()],
        fused=fused(model),
    )


def own_rates(args: argparse.Namespace, rate: float, adapter_lr_factor: float) -> tuple[float, float | None]:
    """The learning rates of the head and of the adapters, if everything else learns at `rate`.

    That of adapters is None where there are none.
    """
    of_head = (args.head_learning_rate or args.learning_rate) * (rate / args.learning_rate)
    return of_head, rate * adapter_lr_factor if args.lora_rank > 0 else None


def fused(model: nn.Module) -> bool | None:
    """Options of `torch.optim.AdamW`: on a GPU one launch for many tensors; elsewhere PyTorch's choice."""
    return True if next(model.parameters()).device.type == "cuda" else None


def stepped(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """Take a step with the gradients of a scaled loss. False if float16 could not hold them: nothing has changed."""
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= scale


# At this many images per class, half of the trained change is saved. Measured, see benchmarks/RESULTS.md.
IMAGES_WORTH_THE_START = 5.0


def wise_ft_alpha(args: argparse.Namespace, images: Mapping[int, int]) -> float:
    """The share of the trained change that is evaluated and saved, above 0 and at most 1: `--wise-ft`.

    With few images, much of the change fits these images alone. `auto` is m / (m + 5) with m images per class. It is 1
    where the head did not start as a linear probe, and where the whole backbone trains, of which it would keep a copy.

    Args:
        images: the number of training images of each class.
    """
    if args.wise_ft != "auto":
        return args.wise_ft
    per_class = sum(images.values()) / len(images)
    starts_well = args.head_init == "probe" and args.freeze_backbone
    return per_class / (per_class + IMAGES_WORTH_THE_START) if starts_well else 1.0


class WeightAverage:
    """The weights that are evaluated and saved: an average of the trained ones, interpolated with their start.

    The average over time is an exponential moving one: in step n it keeps ``min(decay, (1 + n) / (10 + n))`` of itself,
    so that it soon forgets where a short run began. (The average of the iterates: Polyak and Juditsky, 1992.) PyTorch's
    `AveragedModel` would copy the frozen base too. What is then taken is ``start + share (average - start)`` (WiSE-FT,
    arXiv 2109.01903). Of an adapter this is B, which starts at zero, so that the update shrinks by the share; A stays.

    Args:
        tensors: the model's own, which training changes in place.
        decay: 0: no average over time; the weights themselves.
        wise_ft_alpha: the share to begin with, above 0 and at most 1; 1: nothing of the start.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float, wise_ft_alpha: float = 1.0):
        self.tensors = tensors
        self.decay = decay
        self.steps = 0
        self.wise_ft_alpha = self.share = wise_ft_alpha  # the share may be lowered for an epoch
        self.averages: dict[str, Tensor] = {}  # none before the first step: the head is yet to be started
        self.start: dict[str, Tensor] = {}

    @classmethod
    def of(cls, model: nn.Module, args: argparse.Namespace, images: Mapping[int, int]) -> "WeightAverage":
        """The average that the options ask for, over everything that trains; `images`: the number of each class."""
        # BatchNorm's statistics are left out: they are estimated anew for the weights that are evaluated.
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        return cls(trained, args.ema, wise_ft_alpha(args, images))

    def begin(self) -> None:
        """Remember the present weights as the start of training."""
        if self.share < 1:
            floats = ((n, t) for n, t in self._floats(self.tensors) if not n.rpartition(".")[2].startswith("lora_A"))
            self.start = {name: tensor.detach().clone() for name, tensor in floats}

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after an optimizer step to the average."""
        if not self.decay:
            return
        self.steps += 1
        if not self.averages:
            self.averages = {name: tensor.clone() for name, tensor in self.tensors.items()}
        floats = [(average, self.tensors[name]) for name, average in self._floats(self.averages)]
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(*map(list, zip(*floats, strict=True)), None)

    @staticmethod
    def _floats(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point())

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this block the model has the averages in place of its weights."""
        trained = {name: self.tensors[name].detach().clone() for name in (self.averages or self.start)}
        try:
            with torch.no_grad():
                for name in trained:
                    self.tensors[name].copy_(self.averages.get(name, trained[name]))
                for name, start in self.start.items():
                    self.tensors[name].copy_(torch.lerp(start, self.tensors[name], self.share))
            yield
        finally:
            with torch.no_grad():
                for name, tensor in trained.items():
                    self.tensors[name].copy_(tensor)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "share": self.share, "averages": self.averages, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo everything since `state_dict()` returned this."""
        self.steps, self.share = state["steps"], state["share"]
        for kind in ("averages", "start"):
            setattr(self, kind, {name: tensor.clone().to(self.tensors[name]) for name, tensor in state[kind].items()})


SCHEDULES = ("cosine", "step", "constant")


# A run of this many steps trains at the given learning rate, a shorter one at a lower rate, hardly above SAFE_RATE.
# Measured, see benchmarks/RESULTS.md.
STEPS_TO_TRAIN, SAFE_RATE = 200, 1e-4


COUNTED_EPOCHS = 5  # for each step of an epoch, at most: more passes over few images learn what fits these alone


LEAST_WARMUP_STEPS = 20


def rate_divisor(rate: float, steps: int) -> float:
    """The divisor of the learning rate of a run that begins as a linear probe: above 1 if it has few steps.

    Adam's first steps move every weight by the whole rate and harm what the probe knows. Later steps correct that, if
    there are any. The power is measured: benchmarks/RESULTS.md, "Few images, whatever the rate".
    """
    share = (steps / STEPS_TO_TRAIN) ** 1.5
    return max(1 / share, rate * (1 - share) / (SAFE_RATE * share)) if share < 1 else 1.0


def warmup_steps(epochs: float, steps_per_epoch: int, total_steps: int) -> int:
    """The number of steps of a warm-up of some epochs, at least a few unless there is none."""
    if epochs == 0:
        return 0
    return max(round(steps_per_epoch * epochs), min(LEAST_WARMUP_STEPS, total_steps // 2))


def plan_rates(args: argparse.Namespace, steps_per_epoch: int) -> tuple[int, float]:
    """The number of warm-up steps of a run, and the divisor of its learning rates."""
    counted = steps_per_epoch * min(args.epochs, COUNTED_EPOCHS * steps_per_epoch)
    divisor = rate_divisor(args.learning_rate, counted) if args.head_init == "probe" else 1.0
    return warmup_steps(args.warmup_epochs, steps_per_epoch, steps_per_epoch * args.epochs), divisor


def lr_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int = 0, schedule: str = "cosine"
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate's course over `total_steps` optimizer steps, the first `warmup_steps` a linear warm-up.

    Args:
        schedule: 'cosine' falls to 0; 'step' falls to a tenth after 60% and again after 80% of the steps, as MoCo v1's
            does (1911.05722, section 4); 'constant'.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
        if schedule == "step":
            return 0.1 ** sum(step >= share * total_steps for share in (0.6, 0.8))
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def lower_rates(schedule: torch.optim.lr_scheduler.LambdaLR, divisor: float) -> None:
    """Divide the learning rates of every parameter group by this, now and for the rest of the schedule."""
    schedule.base_lrs = [rate / divisor for rate in schedule.base_lrs]
    for group in schedule.optimizer.param_groups:
        group["lr"] /= divisor
