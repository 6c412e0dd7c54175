"""Figures of training steps, each read while the next step is under way: a GPU never waits to be asked for a loss."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from toolkit import distributed
from toolkit.run.runs import StopRequests

T = TypeVar("T")


class Figures:
    """Sums over a step's batches and over the processes, on their way to the CPU.

    The processes exchange them once, along with whether one of them was asked to stop.

    Args:
        of_batches: the figures of each batch, (n,), on the device.
        stop: was this process asked to stop?
    """

    def __init__(self, of_batches: Sequence[Tensor], stop: bool = False):
        figures = torch.stack(list(of_batches))
        if distributed.world_size() > 1:
            sums = figures.double().sum(0, keepdim=True)
            figures = torch.cat([sums, sums.new_full((1, 1), stop)], 1)
            distributed.sum_in_place(figures)
        on_gpu = figures.is_cuda
        self._figures = figures.to("cpu", non_blocking=on_gpu)  # into pinned memory
        self._copied = torch.cuda.Event() if on_gpu else None
        if on_gpu:
            self._copied.record()

    def read(self) -> list[float]:
        """Wait for the step, for no later one, and return the sums."""
        return self._read()[0]

    def asked_to_stop(self) -> bool:
        """Was another process asked to stop?"""
        return self._read()[1]

    def _read(self) -> tuple[list[float], bool]:
        if self._copied is not None:
            self._copied.synchronize()
        figures = [sum(column) for column in zip(*self._figures.tolist(), strict=True)]
        return (figures[:-1], figures[-1] > 0) if distributed.world_size() > 1 else (figures, False)


def one_step_late(
    batches: Iterable[T], take: Callable[[T], Figures], stop: StopRequests
) -> Iterator[tuple[T, list[float]]]:
    """Take a training step with each of the batches, and yield them with its figures once the next step is under way.

    After a stop request no further step is taken. All that were taken are then yielded, so that whatever is saved has
    counted them; ask `stop.check` after the loop.
    """
    pending = None
    for batch in batches:
        taken = batch, take(batch)
        if pending is not None:
            yield _read(*pending, stop)
        pending = taken
        if stop.is_due:
            break
    if pending is not None:
        yield _read(*pending, stop)


def _read(batch: T, figures: Figures, stop: StopRequests) -> tuple[T, list[float]]:
    stop.others_asked |= figures.asked_to_stop()
    return batch, figures.read()
