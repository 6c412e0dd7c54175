"""Run a script, or a module (behind -m), on emulated GPUs."""

import os
import runpy
import sys

from tests import cuda_on_cpu

if __name__ == "__main__":
    cuda_on_cpu.load()
    if sys.argv[1] == "-m":  # the module's own name stands where the interpreter would put its path
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = sys.argv[1:]
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
        runpy.run_path(sys.argv[0], run_name="__main__")
