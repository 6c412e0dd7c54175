"""Figures of a step are read while the next is under way, and all of them before anything is saved."""

import signal

import pytest
import torch

from toolkit import distributed
from toolkit.run import late
from toolkit.run.late import Figures, one_step_late
from toolkit.run.runs import Stopped, StopRequests


class Told:
    """Stands in for `Figures`, and notes when it is read."""

    def __init__(self, log: list, number: int, asked: bool = False):
        self.log, self.number, self.asked = log, number, asked

    def read(self) -> list[float]:
        self.log.append(f"read {self.number}")
        return [self.number]

    def asked_to_stop(self) -> bool:
        return self.asked


def run(
    log: list, stop: StopRequests, steps: int = 3, asked_at: int | None = None, signal_at: int | None = None
) -> list:
    """The figures that a loop sees; `log` tells in which order steps were taken and figures read."""

    def take(number: int) -> Told:
        log.append(f"step {number}")
        stop.signum = signal.SIGINT if number == signal_at else stop.signum
        return Told(log, number, number == asked_at)

    return [figures for _, figures in one_step_late(range(steps), take, stop)]


def test_a_step_is_read_when_the_next_has_been_taken_and_none_is_left_out():
    log, stop = [], StopRequests()
    assert run(log, stop) == [[0], [1], [2]]
    assert log == ["step 0", "step 1", "read 0", "step 2", "read 1", "read 2"]
    assert run([], stop, steps=0) == []
    stop.check()


def test_after_a_stop_request_every_step_taken_is_read_and_no_more_is_taken():
    log, stop = [], StopRequests()
    assert run(log, stop, signal_at=1) == [[0], [1]]
    assert log == ["step 0", "step 1", "read 0", "read 1"]
    with pytest.raises(Stopped):
        stop.check()


def test_processes_stop_at_the_step_by_which_all_know_of_it(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    log, stop = [], StopRequests()
    assert run(log, stop, steps=9, signal_at=1) == [[n] for n in range(9)]  # the others have not heard of it
    stop.check()
    assert run(log, stop, steps=9, asked_at=4) == [[n] for n in range(6)]  # read when step 5 is taken
    with pytest.raises(Stopped):
        stop.check()


def test_figures_are_summed_over_batches_and_processes_in_one_exchange(monkeypatch):
    batches = [torch.tensor([1.5, 2.0]), torch.tensor([0.25, 1.0])]
    assert Figures(batches).read() == [1.75, 3.0] and not Figures(batches).asked_to_stop()
    exchanged = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "sum_in_place", lambda figures: exchanged.append(figures.mul_(2)))
    figures = Figures(batches, stop=True)
    assert figures.read() == [3.5, 6.0] and figures.asked_to_stop() and len(exchanged) == 1


def test_on_a_gpu_figures_wait_for_their_own_step_alone(monkeypatch):
    """The copy is asynchronous, and what is waited for is an event right behind it."""
    log = []

    class Event:
        record = staticmethod(lambda: log.append("recorded"))
        synchronize = staticmethod(lambda: log.append("waited"))

    class OnGPU:
        is_cuda = True

        def to(self, device, non_blocking):
            log.append(("copied", device, non_blocking))
            return torch.tensor([[2.0]])

    monkeypatch.setattr(late.torch, "stack", lambda batches: OnGPU())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    figures = Figures([torch.tensor([2.0])])
    assert log == [("copied", "cpu", True), "recorded"]
    assert figures.read() == [2.0] and log[-1] == "waited"
