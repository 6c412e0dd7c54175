"""Seeds, device, precision and memory: what a run computes on."""

import contextlib
import os
import random
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from toolkit import InputError, distributed


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (every device)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of PyTorch's generators: a run draws from no others."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def restore_rng_state(state: dict[str, Any]) -> None:
    """Undo everything drawn since `rng_state()` returned this. CUDA states are left where the device count differs."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(list(map(Tensor.cpu, state["cuda"])))


def select_device(name: str) -> torch.device:
    """'auto' is the first of cuda, mps and cpu that is there; several processes get a GPU each. InputError for none."""
    several = distributed.launched()
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available() and not several:
            name = "mps"
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
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0] or "no such device"
        raise InputError(f"--device {name!r} is not available here ({reason}); use another, or --device cpu") from None
    return device


CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype to autocast to; auto: on CUDA bf16, or fp16 on older ones, else fp32. InputError: fp16 on the CPU."""
    if name == "auto":
        name = "fp32"  # fine-tuning on a CPU measures first: see `faster_dtype`
        if device.type == "cuda":
            name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if name == "fp16" and device.type == "cpu":  # where it is slow
        raise InputError("--precision fp16 needs a GPU; on the CPU use --precision bf16 or fp32")
    return DTYPES[name]


def is_traced() -> bool:
    """Are operations being recorded, as by `torch.compile`? Then only PyTorch's own operators may run."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


WORTH_ROUNDING = 1.1  # times as fast
WORTH_MEASURING = 0.005  # CPU seconds for an image in float32: with smaller models a run is short in either precision
MEASURED_IMAGES = 32  # at most: with a few bf16 may lose what it gains with a batch
MEASURED_PIXELS = MEASURED_IMAGES * 96**2  # at most, in all of them


def faster_dtype(build: Callable[[torch.dtype], nn.Module], channels: int, size: int) -> torch.dtype:
    """bfloat16, which is printed, if a CPU trains enough faster in it; else float32. All processes get the same one."""
    count = max(2, min(MEASURED_IMAGES, MEASURED_PIXELS // size**2))
    images = to_device(torch.ones(count, channels, size, size), CPU)

    def seconds_in(dtype: torch.dtype) -> float:
        model = place(build(dtype), CPU).train()

        def step() -> None:
            with autocast(CPU, dtype):
                outputs = model(images)
            outputs.float().square().mean().backward()

        return distributed.all_sum(shortest_seconds(step))[0]

    with torch.random.fork_rng(devices=[]):
        in_float32 = seconds_in(torch.float32)
        if in_float32 < WORTH_MEASURING * len(images) * distributed.world_size():
            return torch.float32
        times = in_float32 / seconds_in(torch.bfloat16)
    if times < WORTH_ROUNDING:
        return torch.float32
    print(f"precision: bf16, in which this processor trains {times:.1f} times as fast (else --precision fp32)")
    return torch.bfloat16


def shortest_seconds(work: Callable[[], Any]) -> float:
    """The shortest of three runs of work on a CPU, in CPU time, which other programs do not lengthen."""
    return min(timeit.repeat(work, timer=time.process_time, number=1, repeat=3))  # the first prepares its code too


def check_arithmetic(name: str, device: torch.device) -> None:
    """Raise InputError for 8 bits on a device that does not multiply in them."""
    if name == "int8" and device.type != "cpu":
        raise InputError(f"--arithmetic int8 is for CPUs, not {device.type}: add --device cpu, or drop it")


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision in `dtype`, or none if that is float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to the device, in place, and its kernels into the memory format of the images from `to_device`."""
    model.to(device)
    # On a CPU that is measured to help ResNets; on a GPU each convolution would copy its kernel into that format.
    is_resnet = any(isinstance(module, ResNet) for module in model.modules())
    if device.type == "cuda" or (is_resnet and device.type == "cpu"):
        for module in model.modules():
            if isinstance(module, nn.Conv2d):  # other parameters of four dimensions stay as their code expects them
                module.to(memory_format=torch.channels_last)
    return model


def to_device(batch: Tensor, device: torch.device) -> Tensor:
    """Move a batch to the device. Images (N, 3, H, W) get channels_last, in which a ResNet is up to twice as fast."""
    if device.type == "mps" and batch.dtype == torch.float64:  # it has none: `regression` standardises on the CPU
        return batch
    # On MPS asynchronous copies of pageable memory may be corrupt, and channels_last crashes BatchNorm's backward.
    layout = torch.channels_last if batch.dim() == 4 and device.type != "mps" else torch.preserve_format
    return batch.to(device, non_blocking=device.type == "cuda", memory_format=layout)


CUDA_CONTEXT_BYTES = 450_000_000  # and the kernels' code; assumed: others report 300 to 500 MB, by card and driver


def peak_memory_bytes(device: torch.device) -> int | None:
    """The peak so far in bytes: a CUDA device's tensors and CUDA_CONTEXT_BYTES, or the process. None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) + CUDA_CONTEXT_BYTES
    status = Path("/proc/self/status")
    if status.exists():  # Linux; ru_maxrss would start at the peak of the process that started this one
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    try:
        import resource
    except ImportError:  # on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
