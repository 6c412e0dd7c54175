"""toolkit/run/runs.py: how a run begins, stops and fails."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from toolkit import InputError
from toolkit.run import runs
from toolkit.run.run_state import changed_settings

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_log_has_every_line_in_its_place_and_the_error_last(tmp_path):
    """In a newcomer's environment Python buffers what it prints into a file. A name may have bytes that are no text."""
    code = r"""
import sys
from toolkit import InputError
from toolkit.run import runs
def main():
    print("epoch 1")
    print("a warning", file=sys.stderr)
    print("caf\udce9.jpg")
    raise InputError("disk full")
runs.run_script(main)
"""
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    environment["PYTHONIOENCODING"] = "utf-8"
    with open(tmp_path / "run.log", "wb") as log:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, env=environment)
    assert done.returncode == 2
    assert (tmp_path / "run.log").read_text().splitlines() == [
        *("epoch 1", "a warning", r"caf\udce9.jpg", "error: disk full"),
    ]


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its memory is another's")
def test_freed_memory_is_kept_for_the_next_tensor():
    """A run of a script gets its pages once, not with each tensor; settings of the user's own stay."""
    code = """
import resource, torch
from toolkit.run import runs
def main():
    for _ in range(11):
        torch.ones(2**24)  # 64 MB
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
faults = []
runs.run_script(main)
print((faults[-1] - faults[0]) // 10)
"""
    run = [sys.executable, "-c", code]
    own, users = (
        int(subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **more}).stdout)
        for more in ({}, {"MALLOC_MMAP_THRESHOLD_": str(2**20)})
    )
    assert own < 20 < users  # 16,384 pages of 4 kB, or 32 of 2 MB


@pytest.mark.slow
def test_a_reader_that_stops_early_ends_the_script_without_a_traceback():
    """As in `deploy_lora.py info lora.pth | head`."""
    code = "from toolkit.run import runs\nruns.run_script(lambda: [print(i) for i in range(100_000)])"
    script = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert script.stdout.readline() == b"0\n"
    script.stdout.close()
    assert script.wait(60) == 141 and script.stderr.read() == b""


@pytest.mark.parametrize(
    ("told", "remedy"),
    [
        ("CUDA error: out of memory", "out of memory on meta: lower it"),
        ("Expected to have finished reduction in the prior iteration", "--target-modules"),
    ],
)
def test_what_libraries_say_becomes_a_line_with_a_remedy(told, remedy):
    with pytest.raises(InputError, match=remedy), runs.faults_explained(torch.device("meta"), "lower it"):
        raise RuntimeError(told)


def test_settings_that_differ_are_named_but_for_free_ones():
    then = {"finetune": {"epochs": 3, "seed": 0}}
    now = {"finetune": {"epochs": 4, "seed": 0, "compile": True}}
    assert changed_settings(then, now, free=()) == ["finetune.epochs was 3, is 4", "finetune.compile was None, is True"]
    assert changed_settings(then, now, free=("finetune.compile", "finetune.epochs")) == []
