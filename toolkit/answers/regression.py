"""Numbers: the squared error of what is left when the training images' mean and spread are taken out."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from toolkit import InputError, printable
from toolkit.answers import measures, parts, probe
from toolkit.answers.answer_reports import ColumnReport, Headline, shortened
from toolkit.answers.report_page import BLUE, ORANGE, drawn, html_picture, html_table, new_figure, save_figure
from toolkit.images import data, lists

MEASURES = {"r2": measures.r2, "mae": measures.mae, "rmse": measures.rmse, "spearman": measures.spearman}
WITH_INTERVALS = ("r2", "mae")  # also of each number
NOTHING_DIFFERS = "nothing differs between the evaluation images"
PANELS = 6  # numbers that are drawn
FAR = 1e4  # standard deviations from zero, where float32 begins to blur what differs


class NumberAnswers(parts.ColumnAnswers):
    """Answers that are numbers in their own units; the loss is of standardised ones."""

    MEASURED = tuple(MEASURES)

    def weighted(self, weights: Tensor) -> dict[str, Tensor]:
        return {name: figures[:, 0] for name, figures in self.by_number(weights).items()}

    def by_number(self, weights: Tensor) -> dict[str, Tensor]:
        """The means over the numbers, and behind each those numbers, (n, 1 + K), by weights of the images (n, N)."""
        found = {}
        for name, measure in MEASURES.items():
            each = [measure(values, truth, weights[:, images]) for values, truth, images in self.known()]
            found[name] = torch.stack([torch.stack(each).nanmean(0), *each], 1)
        return found


def number_text(number: float, spread: float, digits: int = 6) -> str:
    """A number with this many significant digits, and as many more as it is larger than what numbers differ by."""
    if spread > 0 and abs(number) > spread:
        digits += math.floor(math.log10(abs(number) / spread))
    return f"{number:.{min(digits, 17)}g}"  # float64 has no more


class InUnits(nn.Module):
    """Standardised outputs (N, K) -> numbers in their own units, in float32 if that can tell them from each other."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        if not (mean.abs() > FAR * std).any():
            mean = mean.float()
            std = std.float()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, outputs: Tensor) -> Tensor:
        return outputs * self.std + self.mean


class NumberReport(ColumnReport):
    picture = "scatter.png"
    worst_title = "The largest errors"
    suffix = lists.ANSWER
    HEADLINES: Mapping[str, Headline] = {
        "r2": Headline("R2", NOTHING_DIFFERS, measures.BELOW_1, ".4g", ".4g"),
        "mae": Headline("mean absolute error", NOTHING_DIFFERS, measures.POSITIVE, ".4g", ".4g"),
        "rmse": Headline("RMS error", NOTHING_DIFFERS, measures.POSITIVE, ".4g", ".4g"),
        "spearman": Headline("rank correlation", NOTHING_DIFFERS, measures.CORRELATION, ".4g", ".4g"),
    }

    @functools.cached_property
    def by(self) -> dict[str, list[float]]:
        by = {"images": (~self.answers.targets.isnan()).sum(0).tolist()}
        for name in MEASURES:
            by[name] = [figure.value for figure in self.found[name][1:]]
        return by

    def measure(self, weights: Tensor) -> dict[str, Tensor]:
        return self.answers.by_number(weights)

    def intervals(self, i: int) -> dict[str, measures.Interval]:
        return {name: self.found[name][1 + i].interval for name in WITH_INTERVALS}

    def rows(self) -> Iterator[tuple[str, str]]:
        for name, (title, text) in zip(MEASURES, super().rows(), strict=True):
            if len(self.names) > 1:
                undefined = sum(map(math.isnan, self.by[name]))
                some = f"{len(self.names) - undefined} of " if undefined else ""
                text += f", the mean of {some}{len(self.names)} numbers"
            yield title, text

    def by_number(self) -> Iterator[tuple]:
        """(number, images, R2, MAE, RMSE, Spearman)."""
        for i, (name, images) in enumerate(zip(self.names, self.by["images"], strict=True)):
            yield name, images, *self.cells(i, MEASURES, ".4g").values()

    def printed(self) -> Iterator[tuple[str, str]]:
        rows = []
        for name, _, of_r2, mae, *_ in self.by_number():
            rows.append((name, f"R2 {of_r2 or 'not defined'}, mean absolute error {mae or 'not defined'}"))
        if len(rows) > 1:
            yield from shortened("by number", "in their own units, with 95% intervals:", rows)

    def sections(self, picture: Path) -> list[str]:
        titles = ("number", "images", "R2", "mean absolute error", "root mean squared error", "rank correlation")
        table = html_table(self.by_number(), titles)
        shown = html_picture(picture.read_bytes(), "the answer for each image by what is true")
        return ["<h2>Answers and truth</h2>", "<p>In brackets 95% intervals.</p>", table, shown]

    def draw(self, path: Path) -> None:
        shown = self.names[:PANELS]
        across = min(3, len(shown))  # panels in a row
        down = math.ceil(len(shown) / across)
        figure = new_figure(4.2 * across, 4 * down)
        columns = zip(shown, self.answers.known(), self.by["r2"], strict=False)
        for number, (name, (values, truth, _), of_r2) in enumerate(columns, 1):
            place = figure.add_subplot(down, across, number)
            place.plot(truth, values, ".", color=BLUE, alpha=0.5)
            if len(truth):
                ends = [truth.min().item(), truth.max().item()]
                place.plot(ends, ends, "--", color=ORANGE)
            title = f"{printable(name, 24)}: R2 {Regression.reported(of_r2)}"
            place.set(xlabel="true", ylabel="answer", title=drawn(title))
            place.grid(alpha=0.3)
        save_figure(figure, path)

    def mistakes(self) -> Iterator[tuple[int, str]]:
        answers = self.answers
        spreads = self.task.std
        for image, number in self.worst((answers.values - answers.targets).abs() / spreads):
            pair = (answers.targets[image, number], answers.values[image, number])
            true, said = (number_text(value.item(), spreads[number].item(), 4) for value in pair)
            yield image, f"{self.names[number]} {true}, answered {said}"


class Regression(parts.Task):
    """The squared error of numbers standardised by the mean and std, (K,), of targets (N, K), each of which varies."""

    kind = "regression"
    loss_title = "squared error (standardised)"
    axis = (1.0, "")
    score_format = ".3f"
    outputs_are = ("number", "numbers")
    recorded = ("mean", "std")
    Report = NumberReport
    activation = "none"
    output_name = "numbers"
    served: Mapping[str, str] = {"mean": "output_mean", "std": "output_std"}

    def __init__(self, names: Sequence[str], targets: Tensor | None = None, mean=None, std=None):
        if targets is not None:
            columns = [column[~column.isnan()] for column in targets.double().T]
            for name, known in zip(names, columns, strict=True):
                if len(known) < 2 or known.min() == known.max():
                    raise InputError(f"the number {name} is the same in all training images: there is nothing to learn")
            mean, std = torch.tensor([[of.mean(), of.std(correction=0)] for of in columns], dtype=torch.float64).T
        super().__init__(names)
        self.mean = mean.double()
        self.std = std.double()
        self.in_loss = torch.stack([self.mean, self.std])  # where the loss is computed: no batch waits for copies

    @classmethod
    def of_run(cls, names, train, args):
        return cls(names, train.targets)

    def to(self, device: torch.device) -> None:
        if device.type != "mps":  # which has no float64
            self.in_loss = self.in_loss.to(device)

    def standardised(self, targets: Tensor) -> Tensor:
        """In the targets' own precision: large numbers that differ by little need float64."""
        mean, std = self.in_loss.to(targets)
        return (targets - mean) / std

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over all K numbers of an image, where unknown ones count 0; summed over images."""
        wanted = self.standardised(targets).to(outputs.dtype).to(outputs.device)  # MPS has no float64
        return (outputs - wanted.nan_to_num()).square().masked_fill(wanted.isnan(), 0).sum() / outputs.shape[1]

    plain_loss = loss

    def counts(self, images: data.LabelledImages) -> Mapping[int, int]:
        return dict(enumerate((~images.targets.isnan()).sum(0).tolist()))

    def constant_loss(self, images: data.LabelledImages) -> float:
        targets = self.standardised(images.targets)
        return self.loss(targets.nanmean(0).expand_as(targets), images.targets).item() / len(images)

    def in_units(self, outputs: Tensor) -> Tensor:
        """Outputs (N, K) as numbers in their own units, float64 on the CPU."""
        return outputs.cpu().double() * self.std + self.mean

    def answers(self, outputs: Tensor, targets: Tensor) -> NumberAnswers:
        return NumberAnswers(self.loss(outputs, targets).item() / len(targets), self.in_units(outputs), targets)

    def constant_score(self, images: data.LabelledImages) -> float:
        return 0.0

    def variance(self, score: float, images: int) -> float:
        """Of R2 (Olkin and Finn, Psychological Bulletin 118, 1995, table 1); of one near 0 as of 1 / images."""
        share = max(1 / images, score)
        return 4 * share * (1 - share) ** 2 / images

    def start(self, model, features, targets, views=1, clusters=None) -> probe.Probe:
        return probe.set_head(model, probe.fit_ridge(features, self.standardised(targets), views, clusters))

    def first_temperature(self, model, features, targets, features_train) -> probe.HeadTemperature:
        return probe.HeadTemperature()  # a softer head would answer other numbers

    def columns(self, outputs: Tensor) -> dict[str, list[str]]:
        columns = zip(self.names, self.in_units(outputs).T.tolist(), self.std.tolist(), strict=True)
        return {name: [number_text(number, spread) for number in numbers] for name, numbers, spread in columns}

    def output_layer(self) -> nn.Module:
        return InUnits(self.mean, self.std)
