"""A task that test_contributing.py adds to a copy of the toolkit: one of ordered classes, and the mean of them."""

from collections.abc import Sequence

import torch

from toolkit.answers.classification import Classification
from toolkit.answers.parts import Task


class Ordinal(Classification):
    kind = "ordinal"
    outputs_are = ("step", "steps")
    pipeline = "tabular-classification"  # another than the other tasks have
    recorded = ("ranks",)
    counts_images = False
    output_name = "probabilities"

    def __init__(self, names: Sequence[str], ranks: torch.Tensor):
        super().__init__(names)
        self.ranks = ranks

    @classmethod
    def of_run(cls, names, train, args):
        return cls(names, 2.0 * torch.arange(len(names), dtype=torch.float64))

    def record(self):
        return Task.record(self)

    def columns(self, outputs: torch.Tensor) -> dict[str, list[str]]:
        expected = outputs.double().softmax(1) @ self.ranks
        names = [self.names[number] for number in outputs.argmax(1).tolist()]
        return {"class": names, "rank": [f"{rank:.4f}" for rank in expected.tolist()]}

    def output_layer(self) -> torch.nn.Module:
        return torch.nn.Softmax(1)
