"""The code for CUDA on GPUs that are made of the CPU: see tests/cuda_on_cpu.

The cases for a GPU, which other files have too, run in processes of their own: those of this process are to find none.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import cuda_on_cpu

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(cuda_on_cpu.why_not() is not None, reason=f"{cuda_on_cpu.why_not()}")


def on_gpu(*command: str, **environment: str) -> str:
    """What a command prints on emulated GPUs; it has to succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda_on_cpu", *command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-2_000:]
    return done.stdout


def run_tests(*options: str) -> None:
    on_gpu("-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *options)


@pytest.mark.slow
def test_layers_blocks_and_products_on_a_gpu():
    files = (f"tests/test_{name}.py" for name in ("blocks", "functional", "layers", "memory"))
    run_tests("-k", "cuda", *files)


def test_steps_on_a_gpu_wait_for_nothing():
    """And layers compute there what they compute here."""
    layers = "cuda and update_in_its_weight and float32"
    run_tests("-k", f"test_gpu or {layers}", "tests/test_gpu.py", "tests/test_layers.py")


@pytest.mark.slow
def test_runs_on_a_gpu():
    run_tests("-m", "slow", "tests/test_gpu.py", "tests/test_cache.py")


@pytest.mark.slow
def test_two_processes_train_and_answer_on_gpus():
    """Tests that were written for CPUs, with a GPU in place of each."""
    chosen = "fine_tune_as_one and lora and not qlora or answer_for_every_pixel or evaluate_and_embed"
    on_gpus = "tests.cuda_on_cpu.in_place_of_cpu"
    run_tests("-p", on_gpus, "-m", "slow or not slow", "-k", chosen, "tests/test_processes.py")


def test_operands_on_two_devices_and_what_is_not_written_yet_show():
    """What this would be worth nothing without."""
    printed = on_gpu("-c", FAULTS)
    assert printed.split() == ["nan", "refused", "refused", "refused", "waited"]


FAULTS = """
import torch
from tests import cuda_on_cpu

def refuses(function):
    try:
        function()
    except RuntimeError:
        print("refused")

x = torch.ones(2, device="cuda")
print(torch.empty(1, device="cuda:1").tolist()[0])
refuses(lambda: x + torch.ones(2))
refuses(lambda: x + torch.ones(2, device="cuda:1"))
refuses(lambda: x.uniform_(generator=torch.Generator()))
cuda_on_cpu.forget()
(x * 2 + 1).relu_()
assert not any(what.startswith(("wait", "copy")) for what in cuda_on_cpu.counts())
x.sum().item()
print("waited" if cuda_on_cpu.counts()["wait item"] == 1 else "did not count")
"""
