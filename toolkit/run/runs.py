"""How a run of either script begins, stops and fails: signals, faults and exit codes."""

import contextlib
import ctypes
import gc
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from tqdm import tqdm

from toolkit import InputError, distributed, printable
from toolkit.images import data, folders

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from malloc.h


def progress_bar(batches: Iterable | None = None, title: str = "", **options) -> tqdm:
    """A progress bar that the first process draws; in a log, where each drawing stays, at most every ten seconds."""
    redrawn = sys.stderr.isatty() or "ipykernel" in sys.modules  # by a terminal or a notebook
    interval = float(os.environ.get("TQDM_MININTERVAL", 0.1 if redrawn else 10))
    options = {"mininterval": interval, "leave": False, **options}
    if not distributed.is_main():
        options["disable"] = True  # else TQDM_DISABLE counts
    return tqdm(batches, title, **options)


class Stopped(KeyboardInterrupt):
    """A run was asked to stop and did, in an orderly way. `signum` is the signal."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.signum = signum


class StopRequests(contextlib.ExitStack):
    """Within its `with` block a first Ctrl-C or SIGTERM is only noted, for `check`. A second one stops at once."""

    signum = 0
    others_asked = False  # was any process asked, as all of them know by now?

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():  # only there can signals be caught
            for signum in (signal.SIGINT, signal.SIGTERM):
                self.callback(signal.signal, signum, signal.signal(signum, self._note))
        return self

    def _note(self, signum: int, _: Any) -> None:
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum

    def check(self) -> None:
        """Raise Stopped if this process was asked to stop; of several, if any was and all know: at the same step."""
        is_due = self.others_asked if distributed.world_size() > 1 else self.signum > 0
        if is_due:
            raise Stopped(self.signum or signal.SIGTERM)

    def checked(self, batches: Iterable) -> Iterable:
        """Yield the batches, and check for a stop request before each."""
        for batch in batches:
            if distributed.world_size() == 1:  # several may have different numbers of batches
                self.check()
            yield batch


# What CUDA, cuBLAS and cuDNN say in a RuntimeError, for which they have no type of their own.
NO_MEMORY_ON_GPU = "CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
# What an OSError says, or PyTorch in the place of one, where the system lacks something; "ancdata" are open files.
LACKS = {
    "Too many open files|ancdata": "too many files are open: raise their limit (ulimit -n 4096)",
    "</torch_|shared memory|No space left": "/dev/shm, which hands over loaded images, or the disk is full: make room",
}


@contextlib.contextmanager
def faults_explained(device: torch.device, saves_memory: str) -> Iterator[None]:
    """Turn a lack of memory, a killed worker and a lost process into an InputError; all workers end with the block."""
    try:
        yield
    except folders.UnreadableImage as error:
        # A DataLoader worker's error arrives with the worker's traceback as text before the message.
        raise InputError(str(error).rpartition("UnreadableImage: ")[2].strip()) from None
    except (MemoryError, RuntimeError, OSError, EOFError) as error:
        for said, remedy in LACKS.items():
            if re.search(said, str(error)):
                raise InputError(f"{remedy}, or use fewer --workers") from None
        on_device = isinstance(error, torch.OutOfMemoryError) or re.search(NO_MEMORY_ON_GPU, str(error))
        if on_device or isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise InputError(f"out of memory on {device if on_device else 'cpu'}: {saves_memory}") from None
        if isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error):
            cause = printable(str(error).strip().rpartition("\n")[2])  # NCCL's own faults look like a lost process
            remedy = f"look for its message, or whether it was killed ({cause})"
            raise InputError(f"another process of this run has ended: {remedy}") from None
        named = "DataLoader worker" in str(error) or "Pin memory thread" in str(error)
        # A worker that is killed while it hands over a batch breaks the connection.
        broken = any(each.num_workers for each in data.OPEN_LOADERS) and isinstance(error, ConnectionError | EOFError)
        if not named and not broken:
            raise
        reason = (str(error).splitlines() or ["connection lost"])[0].rstrip(". ")
        killed = f"a process that loads images was killed ({reason})"
        raise InputError(f"{killed}: memory may have run out; use fewer --workers, or --workers 0") from None
    finally:
        data.end_workers()


def keep_freed_memory() -> None:
    """Let glibc's allocator keep freed memory for later tensors: new pages took a fifth of a ResNet-50's LoRA step."""
    settings = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
    is_free = platform.system() == "Linux" and not settings & os.environ.keys()
    if is_free and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):  # musl has none
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def run_script(main: Callable[[], Any]) -> None:
    """Run main and exit with 0, with 2 for an InputError, or with 128 + signal if stopped. The error comes last."""
    if hasattr(sys.stdout, "reconfigure"):  # names of files may have bytes that are no characters
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    keep_freed_memory()
    gc.freeze()  # what packages have made stays
    gc.enable()
    begin = "" if sys.stderr.isatty() else "\n"  # a bar may be at the end of a log's last line
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except InputError as error:
        sys.stdout.flush()
        if distributed.claim_report():
            # A DataLoader worker's error arrives with the worker's traceback as text before the message.
            print(f"{begin}error: {str(error).rpartition('InputError: ')[2].strip()}", file=sys.stderr)
        sys.unraisablehook = lambda _: None  # a loader that could not start cannot be taken down either
        if hasattr(signal, "SIGCHLD"):  # if a loading process was killed, PyTorch's handler would raise on the way out
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        sys.stdout.flush()
        if distributed.is_main():
            print(begin + (f"{stop}" or "interrupted"), file=sys.stderr, flush=True)
        # An ordinary exit would wait for loading processes, however long they read.
        os._exit(128 + getattr(stop, "signum", signal.SIGINT))
    except BrokenPipeError:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            raise  # the broken pipe is not the output's
        # Whoever read the output, such as `head`, has stopped. Python flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE, as other programs end then
    except Exception:
        if distributed.claim_report():
            raise
        sys.exit(2)
