"""What tests read in the folder of a run."""

import csv
from pathlib import Path

import torch

from lora_utils import read_adapter_file


def tensors(path) -> dict[str, torch.Tensor]:
    return read_adapter_file(path)["tensors"]


def metrics(folder: Path) -> list[dict[str, float]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
