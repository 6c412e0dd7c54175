"""What makes runs shorter, the loop of the script over chosen steps, and what tests read in the folder of a run."""

import contextlib
import csv
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import torch
from torch.utils._pytree import tree_flatten

import finetune_lora
from lora_utils import read_adapter_file
from toolkit import devices
from toolkit.answers import probe, segmentation
from toolkit.run import guard, loaders, runs, search, training
from toolkit.run.training import column  # noqa: F401 - for tests

# A run looks at each of the 21 training images once after an epoch, tries three strengths of nine for its probe, draws
# fewer pixels, has no more steps than the images fill, not twelve, searches among two rates, and does not measure
# whether bf16 is faster here. Of a run that failed no loading process is waited for: Python's collector would give each
# five seconds.
SHORTER = (
    (guard, "WATCHED_VIEWS", 21),
    (probe, "STRENGTHS", probe.STRENGTHS[::3]),
    (segmentation, "PROBE_ROWS", 1000),
    (loaders, "LEAST_STEPS", 1),
    (search, "RATES", (1e-4, 1e-3)),
    (devices, "faster_dtype", lambda *_, **__: torch.float32),
    (torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1),
)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(path) -> dict[str, torch.Tensor]:
    return read_adapter_file(path)["tensors"]


def assert_same_tensors(first, second) -> None:
    """Two adapter files hold the same, bit for bit."""
    assert tensors(first).keys() == tensors(second).keys()
    assert_same(tensors(first), tensors(second))


def assert_same(some: Mapping[str, torch.Tensor], among: Mapping[str, torch.Tensor]) -> None:
    """Tensors by name are among others, bit for bit."""
    assert [name for name, tensor in some.items() if not torch.equal(tensor, among[name])] == []


def assert_identical(ours, theirs) -> None:
    """Two states are the same in every tensor and every number, bit for bit."""
    found, structure = tree_flatten(ours)
    expected, other = tree_flatten(theirs)
    assert structure == other
    for own, wanted in zip(found, expected, strict=True):
        assert type(own) is type(wanted)
        assert torch.equal(own, wanted) if torch.is_tensor(own) else own == wanted


def rows_of(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def metrics(folder: Path) -> list[dict[str, float]]:
    return [{key: float(value) for key, value in row.items() if value} for row in rows_of(folder / "metrics.csv")]


def stop(*_):
    """Stands in for what a run calls: it stops as on Ctrl-C."""
    raise runs.Stopped(2)


def writes_nothing(run: finetune_lora.FineTuning) -> None:
    run.save = run.save_state = lambda: None


def train_on(run: finetune_lora.FineTuning, *steps: training.MicroBatches) -> tuple[float, int]:
    """Run the script's own loop over these steps of an epoch, or over all epochs, and write nothing.

    Returns:
        The loss without label smoothing and the right answers, summed over the images.
    """
    writes_nothing(run)
    if not steps:
        finetune_lora.train(run)
        return 0.0, 0
    run.progress = None
    with (
        mock.patch.object(run.loaders, "steps", lambda epoch, first: iter(steps)),
        mock.patch.object(run.stop, "check", stop),
        contextlib.suppress(runs.Stopped),
    ):
        finetune_lora.train(run)
    return run.progress.loss_sum, run.progress.correct
