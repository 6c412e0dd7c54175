"""The code for CUDA on GPUs that are made of the CPU: see tests/cuda_on_cpu.

The cases for a GPU, which other files have too, run in processes of their own: those of this process are to find none.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import cuda_on_cpu

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(cuda_on_cpu.why_not() is not None, reason=f"{cuda_on_cpu.why_not()}")


def run_tests(*options: str) -> None:
    """Run tests on emulated GPUs; they have to pass."""
    command = [sys.executable, "-m", "tests.cuda_on_cpu", "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-2_000:]


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
