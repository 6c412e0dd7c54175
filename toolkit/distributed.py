"""One run in several processes, as `torchrun` starts them: of W, process k has the images k, k + W, k + 2 W, ..."""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from toolkit import InputError

_store: dist.Store | None = None  # torchrun's, in which processes leave each other messages


def launched() -> bool:
    """Did torchrun start this process, and others with it?"""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def join(device: torch.device) -> None:
    """Connect to the other processes, if torchrun started any; from here on only rank 0 prints. Raises InputError."""
    global _store
    if not launched() or dist.is_initialized():
        return
    try:
        _store, rank, world_size = next(dist.rendezvous("env://"))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store, rank=rank, world_size=world_size)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"cannot reach the other processes of torchrun: {' '.join(str(error).split())}") from None
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends


def claim_report() -> bool:
    """Is this the first process to fail, whose error is the one to print? The others fail for lack of an answer."""
    if not launched():
        return True
    if _store is None:  # before `join` all processes find the same fault
        return os.environ["LOCAL_RANK"] == "0"
    try:
        return _store.add("faults", 1) == 1
    except RuntimeError:  # the store is gone, with the first process: it may have been killed without a word
        return rank() == 1


def rank() -> int:
    """This process's number, 0 to world_size() - 1. Rank 0 prints and writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Is this the process that prints and writes the files? It is known before `join`, too."""
    if launched() and not dist.is_initialized():
        return os.environ["RANK"] == "0"
    return rank() == 0


def all_sum(*values: float) -> list[float]:
    """The sum of each value over the processes, in float64."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=_exchanging_device())
    dist.all_reduce(sums)
    return sums.tolist()


def _exchanging_device() -> str:
    """Where tensors have to be that the processes exchange: NCCL takes no others."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank: plain ones or CPU tensors."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def first_does(what: Callable[[], Any]) -> Any:
    """Do this in the first process alone; all return its plain result, or raise the InputError that it raises."""
    result = problem = None
    if is_main():
        try:
            result = what()
        except InputError as error:
            problem = str(error)
    result, problem = gather((result, problem))[0]
    if problem is not None:
        raise InputError(problem)
    return result


@torch.no_grad()
def interleave(share: Tensor) -> Tensor:
    """Put the shares of all processes back in order: (n_k, ...) in process k -> (sum of n_k, ...) in each."""
    if world_size() == 1:
        return share
    total = int(all_sum(len(share))[0])
    padded = torch.cat([share, share.new_zeros(-(-total // world_size()) - len(share), *share.shape[1:])])
    padded = padded.contiguous().to(_exchanging_device())
    shares = padded.new_empty(world_size(), *padded.shape)
    dist.all_gather(list(shares), padded)
    return shares.transpose(0, 1).flatten(0, 1)[:total].to(share.device)  # without the padding, which comes last


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Copy the values that the tensors have in rank 0 to every process."""
    if world_size() > 1:
        for tensor in tensors:
            values = tensor.contiguous()
            dist.broadcast(values, 0)
            tensor.copy_(values)


def parallel(model: nn.Module) -> nn.Module:
    """The model to call in training: it averages the gradients over the processes."""
    if world_size() == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.13 renames broadcast_buffers, which older ones need
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def exchanging(model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager:
    """Within this block of the last batch of a step, backward averages the gradients of what `parallel` returned."""
    adds_only = isinstance(model, DistributedDataParallel) and not is_last
    return model.no_sync() if adds_only else contextlib.nullcontext()
