"""The parts that both training loops share: seeds, device, precision, optimizer, weight average, evaluation."""

import argparse
import contextlib
import importlib.util
import itertools
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.models.resnet import ResNet
from torchvision.transforms import v2

from toolkit import InputError, distributed, measures
from toolkit.backbones import forward_features, in_head
from toolkit.checkpoints import is_none
from toolkit.data import LoadingMeter
from toolkit.transforms import Levels

# ----------------------------------------------------------------------------------------------------------------------
# Randomness


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (every device)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of every generator, as tensors, tuples and numbers: `torch.load(weights_only=True)` reads these."""
    _, keys, position, has_gauss, cached_gaussian = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached_gaussian),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Undo everything drawn since `rng_state()` returned this. CUDA states are left where the device count differs."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    keys, position, has_gauss, cached_gaussian = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached_gaussian))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


# ----------------------------------------------------------------------------------------------------------------------
# Device and precision


def select_device(name: str) -> torch.device:
    """'auto' is the first of cuda, mps and cpu that exists. Each of several processes gets its own GPU, or the CPU.

    Raises InputError for a device that does not exist here.
    """
    several = distributed.launched()
    if name == "auto":
        mps = torch.backends.mps.is_available() and not several
        name = "mps" if mps else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    if several and name.startswith("cuda:"):
        raise InputError(f"--device {name} would be the GPU of every process; use --device cuda, and each gets its own")
    if several and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):  # such as meta, on which nothing is computed
            raise NotImplementedError
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:  # else pinning memory would take room on GPU 0
            torch.cuda.set_device(device)
        # The shapes of a run hardly change: cuDNN tries its convolutions once and keeps the fastest.
        torch.backends.cudnn.benchmark = device.type == "cuda"
        # The gradients of A and B are sums over thousands of rows: partial sums in 16 bits would lose them.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise InputError(f"--device {name!r} is not available here{reason}; use another, or --device cpu") from None
    return device


CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("auto", *DTYPES)
ARITHMETICS = ("float", "int8")
INT8_CAPABILITY = (7, 5)  # Turing's, the first with tensor cores for integers


def select_precision(name: str, device: torch.device, option: str = "--precision") -> torch.dtype:
    """'auto', 'fp32', 'bf16' or 'fp16' -> the dtype to autocast to.

    'auto' is bf16 on CUDA devices that compute in it, fp16 on other CUDA devices, fp32 elsewhere.
    Raises InputError, which names the option, for fp16 on the CPU, where it is slow: 16 bits are bf16 there.
    """
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if name == "fp16" and device.type == "cpu":
        raise InputError(f"{option} fp16 needs a GPU; on the CPU use {option} bf16 or fp32")
    return DTYPES[name]


WORTH_TELLING = 1.2  # beside other programs' work two equal times may differ by less than this


def describe_device(device: torch.device, dtype: torch.dtype) -> str:
    """Device and precision for the log, and a second line if bf16 is slower than float32 on this CPU.

    That is measured: a processor's name does not tell how fast its products in 16 bits are.
    """
    told = f"device: {device}, precision: {dtype}"
    if device.type != "cpu" or dtype == torch.float32:
        return told
    times = product_seconds(dtype) / product_seconds(torch.float32)
    if times <= WORTH_TELLING:
        return told
    return (
        f"{told}\nbf16 products take {times:.1f} times as long as float32's on this processor: "
        "--precision fp32 is faster"
    )


def product_seconds(dtype: torch.dtype) -> float:
    """The CPU's shortest time for 512 tokens in the first linear layer of a ViT-B/16's MLP; draws no random numbers."""
    tokens, weight = torch.ones(512, 768, dtype=dtype), torch.ones(3072, 768, dtype=dtype)
    return shortest_seconds(lambda: F.linear(tokens, weight))


def shortest_seconds(work: Callable[[], Any], device: torch.device = CPU) -> float:
    """The shortest of some runs of work on the device; on a CPU in CPU time, which other programs do not lengthen."""
    clock, runs = (time.process_time, 3) if device.type == "cpu" else (time.perf_counter, 20)
    seconds = []
    for _ in range(runs):  # the first prepares its code too
        _wait_for(device)
        start = clock()
        work()
        _wait_for(device)
        seconds.append(clock() - start)
    return min(seconds)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_arithmetic(name: str, device: torch.device) -> None:
    """Raise InputError for 8 bits on a device that does not multiply in them."""
    if name != "int8" or device.type == "cpu":
        return
    if device.type != "cuda":
        raise InputError(f"--arithmetic int8 is for CPUs and CUDA, not {device.type}: add --device cpu, or drop it")
    if torch.cuda.get_device_capability(device) < INT8_CAPABILITY:
        raise InputError("--arithmetic int8 needs a GPU with tensor cores for integers (Turing or newer): drop it")


def base_dtype(args) -> torch.dtype | None:
    """The dtype in which a run stores its frozen weights; None: that of the checkpoint.

    Random weights stay as they are, since an adapter file has to hold all of them.
    Raises InputError for fp16 on a CPU.
    """
    if not args.freeze_backbone or args.lora_rank == 0 or is_none(args.checkpoint):
        return None
    if args.arithmetic == "int8":
        return torch.int8
    option = "precision" if args.base_dtype == "auto" else "base_dtype"
    return select_precision(vars(args)[option], select_device(args.device), f"--{option.replace('_', '-')}")


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision in `dtype`, or none if that is float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


COMPILER = "inductor"


def compiled(network: nn.Module, device: torch.device, accumulation_steps: int = 1) -> nn.Module:
    """The network as one graph, forward and backward: `--compile`. It shares all tensors with the network.

    On CUDA the graph becomes CUDA graphs, so that a step does not wait for Python; not if gradients accumulate, since
    the next batch would overwrite them there. A batch of another size is compiled again.

    Raises:
        InputError: what the compiler needs is not here.
    """
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--compile knows CPUs and CUDA, not {device.type}: leave it out")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise InputError("--compile on a GPU needs Triton (pip install triton), which is not here: leave it out")
    if device.type == "cpu" and COMPILER == "inductor" and not cpp_compiler():
        raise InputError(
            "--compile on a CPU needs a C++ compiler (apt install g++), which is not here; or leave it out"
        )
    mode = "reduce-overhead" if device.type == "cuda" and accumulation_steps == 1 else "default"
    return torch.compile(network, backend=COMPILER, mode=mode, fullgraph=True, dynamic=False)


def cpp_compiler() -> str | None:
    """The C++ compiler that `torch.compile` would call, if there is one."""
    names = (os.environ.get("CXX"), "g++", "clang++", "cl")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to the device, in place, and a ResNet into the memory format of the images from `to_device`."""
    is_resnet = isinstance(model, ResNet) and device.type != "mps"
    return model.to(device, memory_format=torch.channels_last if is_resnet else torch.preserve_format)


def to_device(batch: Tensor | Levels, device: torch.device) -> Tensor:
    """Move a batch to the device. Images (N, 3, H, W) get channels_last, in which a ResNet is up to twice as fast.

    `Levels` are normalised there.

    On MPS asynchronous copies of pageable memory may be corrupt, and channels_last crashes BatchNorm's backward.
    """
    asynchronous = device.type == "cuda"
    if isinstance(batch, Levels):
        return Levels(*(part.to(device, non_blocking=asynchronous) for part in batch)).normalized()
    images = batch.dim() == 4 and device.type != "mps"
    layout = torch.channels_last if images else torch.preserve_format
    return batch.to(device, non_blocking=asynchronous, memory_format=layout)


# What CUDA itself takes on a GPU beside the tensors: its context and the code of the kernels. Assumed, not measured:
# others report 300 to 500 MB, by card and driver.
CUDA_CONTEXT_BYTES = 450_000_000


def peak_memory_bytes(device: torch.device) -> int | None:
    """The peak so far in bytes: of a CUDA device's tensors and CUDA_CONTEXT_BYTES, or of the process's resident memory.

    None where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) + CUDA_CONTEXT_BYTES
    status = Path("/proc/self/status")
    if status.exists():  # Linux; ru_maxrss would start at the peak of the process that started this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


# ----------------------------------------------------------------------------------------------------------------------
# Batches, and how far an epoch is in them


def batch_norm_trains(model: nn.Module) -> bool:
    """Does any BatchNorm take statistics of the batch in training?"""
    return any(isinstance(module, _BatchNorm) and norm_trains(module) for module in model.modules())


def norm_trains(norm: _BatchNorm) -> bool:
    return not getattr(norm, "frozen", False)


def check_processes(*images: int) -> None:
    """Raises InputError if one of the image sets, given by their sizes, has fewer images than there are processes."""
    if distributed.world_size() > min(images):
        raise InputError(
            f"{distributed.world_size()} processes are more than there are images to train or evaluate on; start fewer"
        )


def check_batches(model: nn.Module, train_images: int, val_images: int, batch_size: int) -> None:
    """Raises InputError if a batch leaves too few images for each process or for BatchNorm."""
    check_processes(train_images, val_images)
    needed = max(2, distributed.world_size())
    if batch_norm_trains(model) and min(batch_size, train_images) < needed:
        raise InputError(
            f"BatchNorm that trains needs {needed} images or more, and one in each process: raise --batch-size, or use "
            "--freeze-backbone without --norms train"
        )


def balanced_weights(images: Mapping[int, int], num_classes: int) -> Tensor:
    """A weight for each class, (num_classes,), with which all classes count alike. Their mean over the images is 1.

    Args:
        images: how many each class has, by its index.
    """
    shares = [len(images) * images[label] / sum(images.values()) or 1.0 for label in range(num_classes)]
    return 1 / torch.tensor(shares)


NO_LABEL = -100  # the label of an image that stands in for a missing one: cross_entropy ignores it


def no_labels(like: Tensor) -> Tensor:
    """Labels or targets that no loss counts, for images that stand in for missing ones."""
    return torch.full_like(like, torch.nan if like.is_floating_point() else NO_LABEL)


class BatchMixing:
    """torchvision's mixup (arXiv 1710.09412), CutMix (1905.04899), or for each batch one of the two.

    Takes images (N, 3, S, S) and labels (N,), and returns mixed images and the shares of the classes, (N, classes).
    Without either of the two, and for images without labels, it returns what it gets.

    Args:
        mixup, cutmix: alpha of the Beta distribution that the shares are drawn from; 0: without it.
    """

    def __init__(self, mixup: float, cutmix: float, classes: int):
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        chosen = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha > 0]
        self.mix = v2.RandomChoice(chosen) if chosen else None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (images, labels) if self.mix is None or NO_LABEL in labels else self.mix(images, labels)


def count_right(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of right answers of logits (N, classes). A mixed image has the label of its largest share."""
    likeliest = labels if labels.dim() == 1 else labels.argmax(1)
    return (logits.argmax(1) == likeliest).sum()


class MicroBatches(NamedTuple):
    """The batches of one optimizer step, read one at a time."""

    batches: Iterator[tuple[Tensor, Tensor]]  # images (N, 3, S, S) and labels (N,): this process's share
    number: int
    images: int  # of all processes together


def micro_batches(
    loader: DataLoader, meter: LoadingMeter, epoch: int, start: int = 0, accumulation_steps: int = 1
) -> Iterator[MicroBatches]:
    """The optimizer steps of an epoch (1 is the first) from `start` on; the last may have fewer batches than others.

    Args:
        loader: of `toolkit.data.build_loader`, shuffled.
        meter: watches the loading.
    """
    sampler, size = loader.batch_sampler, accumulation_steps
    sampler.epoch, sampler.start = epoch - 1, start * size
    shares = (
        (images, labels if sampler.has_share(number) else no_labels(labels))
        for number, (images, labels) in enumerate(meter.watched(loader), start * size)
    )
    for first in range(start * size, len(sampler), size):
        number = min(size, len(sampler) - first)
        images = min(number * sampler.batch_size, sampler.count - first * sampler.batch_size)
        yield MicroBatches(itertools.islice(shares, number), number, images)


BEST_BY = {"accuracy": "val_accuracy", "balanced": "val_balanced_accuracy", "f1": "val_macro_f1"}  # --keep-best


@dataclass
class Progress:
    """How far an epoch is: optimizer steps, images seen, right answers, the sum of their losses, and seconds taken."""

    learning_rate: float  # at its first step
    steps: int = 0
    images: int = 0
    correct: int = 0
    loss_sum: float = 0.0  # of cross-entropies without label smoothing, as in the evaluation
    seconds: float = 0.0

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Add the seconds of this block, however it ends."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def add(self, images: int, correct: int, loss_sum: float) -> None:
        """Count an optimizer step."""
        self.steps += 1
        self.images += images
        self.correct += correct
        self.loss_sum += loss_sum

    @property
    def loss(self) -> float:
        return self.loss_sum / self.images

    def shown(self) -> dict[str, str]:
        """For a progress bar."""
        loss = {"loss": f"{self.loss:.3f}"}
        return loss | {"accuracy": f"{self.correct / self.images:.1%}"} if self.correct else loss

    def row(self, epoch: int, result: "Evaluation", own_rates: Sequence[float | None]) -> dict[str, float | None]:
        """The finished epoch in `metrics.csv`; `own_rates` are the head's and the adapters'."""
        values = (epoch, self.loss, result.loss, *result.measured().values())
        values += (self.learning_rate, *own_rates, self.seconds)
        return dict(zip(metrics_columns(result.measured()), values, strict=True))


def metrics_columns(measured: Iterable[str]) -> tuple[str, ...]:
    """The columns of `metrics.csv`, where these are measured on the evaluation images."""
    rates = ("learning_rate", "head_learning_rate", "adapter_learning_rate")
    return ("epoch", "train_loss", "val_loss", *(f"val_{name}" for name in measured), *rates, "seconds")


def best_epoch(history: Sequence[dict[str, float]], column: str) -> dict[str, float]:
    """The row with the highest value in a column and, among equal ones, the lowest loss."""
    return max(history, key=lambda row: (row[column], -row["val_loss"]))


def last_is_best(history: Sequence[dict[str, float]], column: str | None) -> bool:
    """Is the last epoch, or the start before any, the one that --keep-best keeps? Without it the last one always is."""
    return column is None or not history or best_epoch(history, column) is history[-1]


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer, schedule, average of the weights


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


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within this block the model is in eval mode. Afterwards each module is in its mode of before."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


@torch.no_grad()
def estimate_statistics(model: nn.Module, loader: Iterable, device: torch.device, dtype: torch.dtype) -> None:
    """Set the running statistics of every BatchNorm that trains to the mean over a loader's batches.

    The moving averages that training leaves belong to earlier weights, and with a momentum of 0.01 to those of hundreds
    of steps ago (precise BatchNorm: Wu and Johnson, arXiv 2105.07576, section 3).
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and norm_trains(module)]
    momenta = [norm.momentum for norm in norms]
    with eval_mode(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        for images, _ in loader:
            with autocast(device, dtype):
                model(to_device(images, device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def worst_batch_loss(
    model: nn.Module,
    loader: Iterable,
    device: torch.device,
    dtype: torch.dtype,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """The highest mean loss of a loader's batches, each normalised by its own statistics as in training.

    Statistics of few images are so noisy that losses differ several times over although no weight has changed.

    Args:
        loss: of outputs and targets, summed over images.
    """
    losses = []
    model.train()
    for images, labels in loader:
        with autocast(device, dtype):
            outputs = model(to_device(images, device))
        total = loss(outputs.float(), to_device(labels, device)).item()
        total, number = distributed.all_sum(total, len(labels))
        losses.append(total / number)
    return max(losses)


@torch.no_grad()
def map_batches(
    function: Callable[[Tensor], Tensor], batches: Iterable[Tensor], device: torch.device, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Apply a function of images (N, 3, H, W) to each batch, on a device and in a precision."""
    for batch in batches:
        with autocast(device, dtype):
            result = function(to_device(batch, device))
        yield result


@torch.no_grad()
def extract_features(
    model: nn.Module, loader: Iterable, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The features that the head of `model` receives, over a loader, in eval mode. The model's mode is then restored.

    With several processes, each computes its share and all of them return the features of the full set.

    Returns:
        float32 features (N, D) and labels (N,), both on `device`.
    """
    features, labels = [], []
    with eval_mode(model):
        for images, targets in loader:
            with autocast(device, dtype):
                features.append(forward_features(model, to_device(images, device)).float())
            labels.append(to_device(targets, device))
    return distributed.interleave(torch.cat(features)), distributed.interleave(torch.cat(labels))


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy (0 to 1) of `knn_answers` for features (N, D) whose labels are (N,)."""
    answers = knn_answers(train_features, train_labels, features, k, temperature)
    return int((answers == labels).sum()) / len(labels)


def knn_answers(
    train_features: Tensor, train_labels: Tensor, features: Tensor, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """The classes (N,) by the weighted k-nearest-neighbour vote by cosine similarity (1805.01978, section 3.4).

    Each of the k nearest training images votes for its class with weight exp(similarity / temperature).
    """
    bank = F.normalize(train_features.float(), dim=1)
    classes = int(train_labels.max()) + 1
    k = min(k, len(bank))
    answers = []
    for queries in features.float().split(1024):
        similarity, neighbour = (F.normalize(queries, dim=1) @ bank.T).topk(k, dim=1)  # (B, N) -> (B, k)
        votes = torch.zeros(len(queries), classes, device=bank.device)
        votes.scatter_add_(1, train_labels[neighbour], (similarity / temperature).exp())
        answers.append(votes.argmax(1))
    return torch.cat(answers)


@torch.no_grad()
def all_outputs(
    model: nn.Module, loader: Iterable, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The outputs of a model over a loader in eval mode, float32 (N, K), and the targets, both on the CPU.

    With several processes, each computes its share and all of them return the whole. The mode is as before afterwards.
    """
    outputs, targets = [], []
    with eval_mode(model):
        for images, wanted in loader:
            with autocast(device, dtype):
                outputs.append(model(to_device(images, device)).float())
            targets.append(to_device(wanted, device))
    return tuple(distributed.interleave(torch.cat(parts)).cpu() for parts in (outputs, targets))


class Evaluation(NamedTuple):
    """The result of `evaluate`."""

    loss: float  # mean cross-entropy
    accuracy: float  # 0 to 1
    predictions: Tensor  # (N,), class indices
    labels: Tensor  # (N,)
    confidences: Tensor  # (N,), probability of the predicted class
    before: Tensor | None = None  # (N,), the confidences before calibration, if there was one

    def reliability(self, before: bool = False) -> Tensor:
        """`toolkit.measures.calibration` of the answers, after calibration or before."""
        confidences = self.before if before else self.confidences
        return measures.calibration(confidences, self.predictions == self.labels)

    @property
    def score(self) -> float:
        return self.accuracy

    @property
    def targets(self) -> Tensor:
        return self.labels

    def measured(self) -> dict[str, float]:
        figures = self.accuracy, self.balanced_accuracy, self.macro_f1
        return dict(zip(("accuracy", "balanced_accuracy", "macro_f1"), figures, strict=True))

    @property
    def balanced_accuracy(self) -> float:
        """The mean accuracy of the classes that have images."""
        right, images, _ = self._counts()
        return (right / images)[images > 0].mean().item()

    @property
    def macro_f1(self) -> float:
        """The mean over the classes of the harmonic mean of precision and recall."""
        right, images, answers = self._counts()
        both = images + answers
        return (2 * right / both)[both > 0].mean().item()

    def _counts(self) -> list[Tensor]:
        """The numbers of right answers, of images and of answers of each class."""
        classes = int(torch.cat([self.labels, self.predictions]).max()) + 1
        right = self.labels[self.labels == self.predictions]
        return [torch.bincount(t, minlength=classes).double() for t in (right, self.labels, self.predictions)]


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Iterable, device: torch.device, dtype=torch.float32, temperature: float = 1.0
) -> Evaluation:
    """Loss, accuracy and predictions of a classifier over a loader, in eval mode. The mode is as before afterwards.

    With several processes, each evaluates its share and all of them return the result over the full set.

    Args:
        temperature: what the logits were divided by; if not 1, the confidences before that are measured too.
    """
    losses = []
    labels = []
    confidences = []
    predictions = []
    before = []
    with eval_mode(model):
        for images, targets in loader:
            images, targets = to_device(images, device), to_device(targets, device)
            with autocast(device, dtype):
                logits = model(images)
            losses.append(F.cross_entropy(logits.float(), targets, reduction="sum"))
            labels.append(targets)
            most_probable = logits.float().softmax(1).max(1)
            confidences.append(most_probable.values)
            predictions.append(most_probable.indices)
            if temperature != 1:
                before.append((temperature * logits.float()).softmax(1).amax(1))
    loss = sum(torch.stack(losses).tolist())  # read together: one wait for the GPU
    shares = (torch.cat(share) for share in (predictions, labels, confidences))
    predictions, labels, confidences = (distributed.interleave(share).cpu() for share in shares)
    accuracy = (predictions == labels).float().mean().item()
    raw = distributed.interleave(torch.cat(before)).cpu() if before else None
    return Evaluation(distributed.all_sum(loss)[0] / len(labels), accuracy, predictions, labels, confidences, raw)
