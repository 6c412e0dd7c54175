"""Experiment trackers: `--tracker NAME` sends each row of metrics.csv to one of them as well.

Where a tracker keeps its runs, and as whom it logs in, is its own business: its environment variables say so.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from toolkit import InputError, printable

PROJECT = "moco-lora"


def _tensorboard(folder: Path, settings: dict[str, Any]) -> tuple[Callable, Callable]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard")

    def log(numbers: dict[str, float], epoch: int) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, epoch)

    return log, writer.close


def _wandb(folder: Path, settings: dict[str, Any]) -> tuple[Callable, Callable]:
    import wandb

    run = wandb.init(project=PROJECT, name=folder.name, config=settings, dir=folder)
    return lambda numbers, _: run.log(numbers), run.finish  # by its own count: an epoch may be done again


LOGGERS = {"tensorboard": _tensorboard, "wandb": _wandb}  # each returns what logs numbers of an epoch, and what ends it


@contextlib.contextmanager
def opened(name: str | None, folder: Path, settings: dict[str, Any]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield what logs a row of metrics.csv. Without a name it does nothing."""
    if name is None:
        yield lambda row: None
        return
    try:
        log, end = LOGGERS[name](folder, settings)
    except Exception as error:  # of a missing key, or a server
        raise InputError(f"--tracker {name} cannot begin: {printable(error, 300)}") from None

    def log_row(row: Mapping[str, Any]) -> None:
        numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float)}
        log({key: number for key, number in numbers.items() if math.isfinite(number)}, row["epoch"])

    try:
        yield log_row
    finally:
        end()
