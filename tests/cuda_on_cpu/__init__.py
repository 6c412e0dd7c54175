"""GPUs made of the CPU, so that the code for CUDA runs where no GPU is.

    python -m tests.cuda_on_cpu finetune_lora.py --device cuda --epochs 1
    torchrun --nproc-per-node=2 --no-python python -m tests.cuda_on_cpu finetune_lora.py

A PyTorch without CUDA gets two devices of type `cuda`. Their tensors lie in the host's memory, and the CPU's kernels
compute with them; autocast, GradScaler, fused AdamW and DistributedDataParallel are PyTorch's own, and NCCL is gloo.
It refuses what a GPU refuses: operands on two devices, generators and exchanges of the wrong device. Memory that is
read before it is written is NaN. `counts` has the kernels, the copies, and how often Python waited for the GPU.

It cannot show speed, peaks of memory, asynchrony, the rounding of cuDNN and TF32, kernels that differ from one call to
the next, CUDA graphs, or what Inductor and Triton compile.

`cuda_on_cpu.cpp` is built with g++ once for each release of PyTorch, into `build/` beside it, and is loaded before
PyTorch is imported. `gpus.py` is what the Python part of PyTorch asks of a build with CUDA.
"""

import collections
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE / "cuda_on_cpu.cpp"


@functools.cache
def why_not() -> str | None:
    """What is missing for it, in a line, or None. It is built if it is not yet."""
    if _torch_version().cuda:
        return "this PyTorch is built for CUDA"
    if sys.platform != "linux" or shutil.which("g++") is None:
        return "emulated GPUs need Linux and g++"
    try:
        build()
    except RuntimeError as error:  # the C++ is written against one PyTorch's headers, and another one's may differ
        return str(error)
    return None


def _torch_version():
    """The module `torch.version`, without importing PyTorch."""
    spec = importlib.util.spec_from_file_location("torch_version", _torch_folder() / "version.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


def build() -> Path:
    """The library for this release of PyTorch, built if it is not there yet."""
    import fcntl  # which Windows lacks

    identity = hashlib.sha256(SOURCE.read_bytes() + _torch_version().__version__.encode())
    library = HERE / "build" / f"{identity.hexdigest()[:16]}.so"
    library.parent.mkdir(exist_ok=True)
    with open(library.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of pytest ask for it at once
        if not library.exists():
            _build(library)
    return library


def _build(library: Path) -> None:
    torch_folder = _torch_folder()
    unfinished = library.with_suffix(".unfinished")
    command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(unfinished)]
    command += [f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include"]
    command += [f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "")
        raise RuntimeError(f"g++ cannot build emulated GPUs for PyTorch {_torch_version().__version__}: {first}")
    unfinished.replace(library)


def load() -> None:
    """Give this process emulated GPUs. PyTorch must not be imported yet: it asks for GPUs once, when it is."""
    if "torch" in sys.modules:
        raise RuntimeError("emulated GPUs come before PyTorch is imported")
    libraries = _torch_folder() / "lib"
    for path in (libraries / "libc10.so", libraries / "libtorch_cpu.so", build()):  # the last finds the others loaded
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    from tests.cuda_on_cpu import gpus

    with contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401 - before it sees a GPU, for which it would look for kernels of CUDA

        gpus.emulated.adopt("bitsandbytes")
    gpus.install()


def is_loaded() -> bool:
    """Has this process emulated GPUs?"""
    return "tests.cuda_on_cpu.gpus" in sys.modules


def counts() -> collections.Counter:
    """Since `forget`: kernels, copies and waits, by "kernel NAME", "wait NAME", "copy to the GPU" and so on."""
    import torch

    return collections.Counter(torch.ops.cuda_on_cpu.counts())


def forget() -> None:
    """Count anew."""
    import torch

    torch.ops.cuda_on_cpu.forget()
