"""The code for CUDA on GPUs that are made of the CPU: see tests/cuda_on_cpu.

The cases for a GPU, which other files have too, run in processes of their own: those of this process are to find none.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import cuda_on_cpu

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [f"tests/test_{name}.py" for name in ("blocks", "functional", "layers", "memory")]


@pytest.fixture(scope="module", autouse=True)
def emulated_gpus():
    """Where they cannot be built these tests are skipped, in one line; the gate, which asks for them, fails."""
    if reason := cuda_on_cpu.why_not():
        assert "EMULATED_GPUS" not in os.environ, reason
        pytest.skip(reason)


def run_tests(*options: str) -> None:
    """Run tests on emulated GPUs; they have to pass."""
    command = [sys.executable, "-m", "tests.cuda_on_cpu", "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-2_000:]


def test_steps_on_a_gpu_wait_for_nothing_and_whole_runs_compute_there_as_here():
    run_tests("tests/test_gpu.py")


@pytest.mark.slow
def test_layers_blocks_and_products_on_a_gpu():
    run_tests("-k", "cuda", *LAYERS)


@pytest.mark.slow
def test_runs_on_a_gpu():
    run_tests("-m", "slow", "tests/test_gpu.py")


@pytest.mark.slow
def test_two_processes_train_and_answer_on_gpus():
    """Tests that were written for CPUs, with a GPU in place of each."""
    chosen = "fine_tune_as_one and lora or answers_of_one or maps_of_one or pretraining_in_two"
    on_gpus = "tests.cuda_on_cpu.in_place_of_cpu"
    run_tests("-p", on_gpus, "-m", "slow or not slow", "-k", chosen, "tests/test_processes.py")


def test_a_pytorch_for_which_they_cannot_be_built_is_named_in_one_line(monkeypatch, tmp_path):
    source = tmp_path / "other.cpp"
    source.write_text("#error no such header\n#error nor this one\n")
    monkeypatch.setattr(cuda_on_cpu, "HERE", tmp_path)
    monkeypatch.setattr(cuda_on_cpu, "SOURCE", source)
    reason = cuda_on_cpu.why_not.__wrapped__()
    assert re.fullmatch(r"g\+\+ cannot build emulated GPUs for PyTorch [^\n]*no such header", reason)
