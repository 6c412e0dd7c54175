"""The code for CUDA on GPUs that are made of the CPU: see tests/cuda_on_cpu.

The cases for a GPU, which other files have too, run in processes of their own: those of this process are to find none.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import cuda_on_cpu

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [f"tests/test_{name}.py" for name in ("blocks", "functional", "layers")]
IN_PLACE = ["-p", "tests.cuda_on_cpu.in_place_of_cpu", "-m", "slow or not slow"]  # tests that were written for CPUs
PROCESSES = "fine_tune_as_one and lora or answers_of_one or maps_of_one or pretraining_in_two"


@pytest.fixture(scope="module", autouse=True)
def emulated_gpus():
    """Where they cannot be built these tests are skipped, in one line.

    The gate, which asks for them, fails then, unless `pip` brought a PyTorch for CUDA, as on a machine with a GPU."""
    if reason := cuda_on_cpu.why_not():
        assert "EMULATED_GPUS" not in os.environ or torch.version.cuda, reason
        pytest.skip(reason)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["tests/test_gpu.py"], id="steps wait for nothing and runs compute as here"),
        pytest.param(["-k", "cuda", *LAYERS], id="layers, blocks and products", marks=pytest.mark.slow),
        pytest.param(["-m", "slow", "tests/test_gpu.py"], id="more runs", marks=pytest.mark.slow),
        pytest.param([*IN_PLACE, "-k", PROCESSES, "tests/test_processes.py"], id="two GPUs", marks=pytest.mark.slow),
    ],
)
def test_on_emulated_gpus_these_tests_pass(options):
    command = [sys.executable, "-m", "tests.cuda_on_cpu", "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-2_000:]


def test_a_pytorch_for_which_they_cannot_be_built_is_named_in_one_line(monkeypatch, tmp_path):
    source = tmp_path / "other.cpp"
    source.write_text("#error no such header\n#error nor this one\n")
    monkeypatch.setattr(cuda_on_cpu, "HERE", tmp_path)
    monkeypatch.setattr(cuda_on_cpu, "SOURCE", source)
    reason = cuda_on_cpu.why_not.__wrapped__()
    assert re.fullmatch(r"g\+\+ cannot build emulated GPUs for PyTorch [^\n]*no such header", reason)
