"""The scripts in processes of their own, which tests can signal, kill, starve, and let work together.

They are forked from a server that has imported the scripts already: a run begins at once and is real in all else.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
ON_GPUS = "tests.cuda_on_cpu.in_place_of_cpu"
SERVER = multiprocessing.get_context("forkserver")
STORES: list[dist.TCPStore] = []
PRELOADED = ["finetune_lora", "moco.pretrain"]
if ON_GPUS in sys.modules:  # they come before PyTorch
    PRELOADED.insert(0, ON_GPUS)
SERVER.set_forkserver_preload(PRELOADED)


class Child:
    """A run of `finetune_lora` or `moco.pretrain`, leader of its own process group, with its output in a file.

    `before` is called in it first: a function of a test module.
    """

    def __init__(self, module: str, options: str, log: Path, before: Callable | None = None, environment=None):
        self.log = log
        self.process = SERVER.Process(target=_run, args=(module, options.split(), log, before, environment or {}))
        # For the server, which starts with the first child, and all children: they are to compute on the CPU alone.
        with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}):
            self.process.start()

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, seconds: float = 120) -> int:
        """Its exit code, minus the signal's number if one killed it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.send(signal.SIGKILL)
            raise TimeoutError(f"still running after {seconds} s:\n{self.output}")
        return self.process.exitcode

    def wait_for(self, condition: Callable[[], object], seconds: float = 100) -> None:
        """Return when the condition holds; it must do so before the child ends."""
        until = time.monotonic() + seconds
        while not condition():
            if self.process.exitcode is not None or time.monotonic() > until:
                raise TimeoutError(f"it never happened (exit code {self.process.exitcode}):\n{self.output}")
            time.sleep(0.005)

    def send(self, signum: int) -> None:
        """A signal to its whole process group, as a terminal sends Ctrl-C."""
        os.killpg(self.process.pid, signum)


def _run(module: str, argv: list[str], log: Path, before: Callable | None, environment: dict[str, str]) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of its own workers: Linux's default, not the server's
    os.environ.update({"TQDM_MININTERVAL": "0"} | environment)  # bars draw each step, which tests wait for
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # a pipe is no file that `open` appends to
    os.dup2(output, 1)
    os.dup2(output, 2)
    from tests.checkpoint_files import narrow_resnet, shorten_vit_mini
    from tests.run_folders import SHORTER
    from toolkit.models import backbones
    from toolkit.run.runs import run_script

    __import__(module)
    shorten_vit_mini()
    backbones.models.resnet18 = narrow_resnet
    for changed, name, value in SHORTER:
        setattr(changed, name, value)
    if before:
        before()
    run_script(lambda: sys.modules[module].main(argv))


def together(module: str, options: str, log: Path, before: Callable | None = None, environment=None) -> list[Child]:
    """Two processes of one run, with the environment that torchrun gives them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # it outlives a process that fails
    STORES.append(store)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True", **(environment or {})}
    return [
        Child(module, options, log.with_suffix(f".{k}.log"), before, shared | {"RANK": str(k), "LOCAL_RANK": str(k)})
        for k in range(2)
    ]
