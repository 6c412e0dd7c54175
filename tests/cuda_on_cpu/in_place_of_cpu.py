"""Within a process that imports this, whatever asks for a CPU gets an emulated GPU, and computes in float32 there.

So tests of whole runs, which are written for CPUs, are run on GPUs: `pytest -p tests.cuda_on_cpu.in_place_of_cpu`.
"""

import os

from tests import cuda_on_cpu

os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # with which tests/children.py hides real ones
if not cuda_on_cpu.is_loaded():
    cuda_on_cpu.load()

from toolkit import devices

select_device, select_precision = devices.select_device, devices.select_precision


def gpu_for(name: str):
    return select_device("cuda" if name in ("cpu", "auto") else name)


def exact_for(name: str, device):
    return select_precision("fp32" if name == "auto" else name, device)


devices.select_device, devices.select_precision = gpu_for, exact_for
