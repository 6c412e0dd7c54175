"""Experiment trackers: `--tracker NAME` sends each row of metrics.csv to one of them as well.

Where a tracker keeps its runs, and as whom it logs in, is its own business: its environment variables say so.
"""

import contextlib
import functools
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from toolkit import InputError, printable
from toolkit.config import flat

PROJECT = "moco-lora"
Log = Callable[[dict[str, float], int], None]  # takes numbers by name, and the epoch


@contextlib.contextmanager
def _tensorboard(folder: Path, settings: dict[str, Any]) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder / "tensorboard") as writer:

        def log(numbers: dict[str, float], epoch: int) -> None:
            for name, number in numbers.items():
                writer.add_scalar(name, number, epoch)

        yield log


@contextlib.contextmanager
def _wandb(folder: Path, settings: dict[str, Any], package: str = "wandb", **where: Any) -> Iterator[Log]:
    run = importlib.import_module(package).init(project=PROJECT, name=folder.name, config=settings, **where)
    try:
        yield lambda numbers, _: run.log(numbers)  # by its own count: an epoch may be done again
    finally:
        run.finish()


@contextlib.contextmanager
def _mlflow(folder: Path, settings: dict[str, Any]) -> Iterator[Log]:
    import mlflow

    mlflow.set_experiment(PROJECT)
    with mlflow.start_run(run_name=folder.name):
        mlflow.log_params(flat(settings))
        yield lambda numbers, epoch: mlflow.log_metrics(numbers, step=epoch)


LOGGERS = {
    "tensorboard": _tensorboard,
    "wandb": lambda folder, settings: _wandb(folder, settings, dir=folder),
    "mlflow": _mlflow,
    "trackio": functools.partial(_wandb, package="trackio"),  # it has wandb's interface
}


@contextlib.contextmanager
def opened(name: str | None, folder: Path, settings: dict[str, Any]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield what logs a row of metrics.csv. Without a name it does nothing."""
    if name is None:
        yield lambda row: None
        return
    with contextlib.ExitStack() as stack:
        try:
            log = stack.enter_context(LOGGERS[name](folder, settings))
        except Exception as error:  # of a missing key, or a server
            raise InputError(f"--tracker {name} cannot begin: {printable(error, 300)}") from None

        def log_row(row: Mapping[str, Any]) -> None:
            numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float)}
            log({key: number for key, number in numbers.items() if math.isfinite(number)}, row["epoch"])

        yield log_row
