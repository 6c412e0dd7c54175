"""A class for every pixel: cross-entropy over known pixels, judged by the mean intersection over union.

Every figure and every interval follows from the confusion matrix of each image, (N, K, K). Targets in a batch are
masks (N, H, W) of classes from 0 on, NO_LABEL where unknown. Of a set of images they are the numbers of known pixels of
each class, (N, K).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit import distributed
from toolkit.answers import evaluation, measures, probe
from toolkit.answers.answer_reports import (
    Report,
    calibration_figures,
    calibration_rows,
    finite,
    finite_interval,
    interval_text,
    reliability_section,
)
from toolkit.answers.evaluation import NO_LABEL
from toolkit.answers.parts import Head, Objective, Task
from toolkit.answers.report_page import drawn, html_picture, html_table
from toolkit.devices import autocast, to_device
from toolkit.files import open_atomically
from toolkit.images.bands import Bands
from toolkit.images.data import LabelledImages
from toolkit.images.masks import coloured
from toolkit.models.dense import answers_for, feature_maps, features_at

PROBE_ROWS = 8_000  # pixels, at the most, that the head's start is fitted to, over all images and views
LEAST_PIXELS = 8  # of each image among them
BINS = 15  # of probabilities
WORST_SHOWN = 6  # images in mistakes.png


@dataclass
class PixelAnswers:
    """Answers for the pixels of N images."""

    loss: float  # cross-entropy, the mean over an image's known pixels and over images
    confusion: Tensor  # (N, K, K), of truth (rows) and answers: numbers of known pixels
    bins: Tensor  # (BINS, 3): sums of probabilities and of right answers, and numbers of pixels
    before: Tensor | None = None  # there is no calibration
    maps: Mapping[int, Tensor] = field(default_factory=dict)  # the answers (H, W) of the worst images, by their number

    @property
    def targets(self) -> Tensor:
        return self.confusion

    @property
    def score(self) -> float:
        return self.measured()["miou"]

    def reliability(self, before: bool = False) -> Tensor:
        """`toolkit.answers.measures.calibration` of the pixels; there is none before calibration."""
        counts = self.bins[:, 2]
        return torch.stack([self.bins[:, 0] / counts, self.bins[:, 1] / counts, counts], 1).nan_to_num()

    def measured(self) -> dict[str, float]:
        figures = pixel_figures(self.confusion.double().sum(0)[None])
        return {name: figures[name].nanmean().item() for name in ("miou", "macro_dice", "pixel_accuracy")}


def pixel_figures(matrices: Tensor) -> dict[str, Tensor]:
    """The figures of confusion matrices (n, K, K), by name: (n,), and of each class (n, K).

    A class that is neither there nor answered has NaN, and counts in no mean.
    """
    right = matrices.diagonal(dim1=1, dim2=2)
    truths = matrices.sum(2)
    answers = matrices.sum(1)
    iou = right / (truths + answers - right)
    dice = 2 * right / (truths + answers)
    return {
        "miou": iou.nanmean(1),
        "macro_dice": dice.nanmean(1),
        "pixel_accuracy": right.sum(1) / truths.sum(1),
        "iou": iou,
        "dice": dice,
    }


class PixelObjective(Objective):
    """Cross-entropy of logits (N, K, H, W) and masks (N, H, W): the mean over an image's known pixels.

    Args:
        class_weights: (K,), how much each class's pixels count; None: 1.
        label_smoothing: what share of each target is spread over all classes.
    """

    def __init__(self, class_weights: Tensor | None = None, label_smoothing: float = 0.0):
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing

    def to(self, device: torch.device) -> None:
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._loss(outputs, targets, self.class_weights, self.label_smoothing)

    def plain_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._loss(outputs, targets)

    @staticmethod
    def _loss(outputs: Tensor, targets: Tensor, weights: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
        losses = F.cross_entropy(
            outputs, targets, weights, ignore_index=NO_LABEL, reduction="none", label_smoothing=smoothing
        )
        known = (targets != NO_LABEL).flatten(1).sum(1).clamp_min(1)
        return (losses.flatten(1).sum(1) / known).sum()

    def counts(self, images: LabelledImages) -> dict[int, int]:
        return dict(enumerate((images.targets > 0).sum(0).tolist()))

    def constant_loss(self, images: LabelledImages) -> float:
        shares = (images.targets / images.targets.sum(1, keepdim=True)).nanmean(0)
        return -torch.special.xlogy(shares, shares).sum().item()


class PixelHead(Head):
    """Logits of K classes for every pixel, linear in the features of the pixel.

    Args:
        pixel_weights: (K,), by which pixels are drawn that the head's start is fitted to: those of the objective.
    """

    output_name = "probabilities"

    def __init__(self, names: Sequence[str], pixel_weights: Tensor | None = None):
        super().__init__(names)
        self.pixel_weights = pixel_weights

    def output_layer(self) -> nn.Module:
        return nn.Softmax(1)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, loader: Iterable, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> PixelAnswers:
        """Answers for images of any size, in overlapping windows of the model's own."""
        found = _Collected(len(self.names))
        with evaluation.eval_mode(model):
            for images, masks in loader:
                for logits, mask in self._answered(model, images, masks, device, dtype):
                    found.add(logits, mask)
        return found.answers()

    @staticmethod
    def _answered(
        model: nn.Module, images: Sequence[Tensor], masks: Sequence[Tensor], device: torch.device, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The logits (K, H, W) and the mask (H, W) of each image of a batch, on the CPU."""

        def answer(windows: Tensor) -> Tensor:
            with autocast(device, dtype):
                return model(to_device(windows, device)).float().cpu()

        if torch.is_tensor(images) and set(images.shape[2:]) == {model.window}:
            yield from zip(answer(images), masks, strict=True)
            return
        for image, mask in zip(images, masks, strict=True):
            yield answers_for(image, model.window, answer), mask

    def score(self, model: nn.Module, features: Tensor, targets: Tensor) -> None:
        """None: the start is judged by whole masks, as training is."""

    def knn_score(self, train_features, train_targets, features, targets) -> None:
        """None: neighbours of single pixels say nothing of masks."""

    def constant_score(self, images: LabelledImages) -> float:
        pixels = images.targets.sum(0)
        return (pixels.max() / pixels.sum() / (pixels > 0).sum()).item()

    def variance(self, score: float, images: int) -> float:
        return score * (1 - score) / images

    @torch.no_grad()
    def features(
        self, model: nn.Module, loader: Iterable, device: torch.device, dtype: torch.dtype, images: int
    ) -> tuple[Tensor, Tensor]:
        """Features (N P, D) and classes (N P,) of P pixels of each image of a loader, P for each image in turn.

        With several processes, each computes its share and all of them return the whole.
        """
        pixels = max(LEAST_PIXELS, PROBE_ROWS // (2 * images))
        rows = []
        classes = []
        with evaluation.eval_mode(model):
            for batch, masks in loader:
                for image, mask in zip(batch, masks, strict=True):
                    with autocast(device, dtype):
                        maps = feature_maps(model.backbone, to_device(image[None], device))
                    places = self._drawn(mask, pixels, len(rows))
                    height, width = mask.shape
                    points = torch.stack([(places % width + 0.5) / width, (places // width + 0.5) / height], 1)
                    rows.append(features_at(maps, points.to(device)))
                    classes.append(mask.flatten()[places].to(device))
        features = distributed.interleave(torch.stack(rows))
        return features.flatten(0, 1), distributed.interleave(torch.stack(classes)).flatten()

    def _drawn(self, mask: Tensor, pixels: int, number: int) -> Tensor:
        """The places of so many random known pixels of a mask (H, W); of one without any, unknown ones.

        Args:
            number: of the image among those of this process. The draws depend on its number among all.
        """
        draws = torch.Generator().manual_seed(number * distributed.world_size() + distributed.rank())
        flat = mask.flatten().cpu()
        known = flat != NO_LABEL
        weights = known.float()
        if self.pixel_weights is not None:
            weights = weights * self.pixel_weights.cpu()[flat.clamp_min(0)]
        if not known.any():
            weights = torch.ones(len(flat))
        return torch.multinomial(weights, pixels, replacement=True, generator=draws)

    def start(self, model, features, targets, views=1, clusters=None) -> probe.Probe:
        """The probe without its held-out answers: what a probe of few pixels gets wrong in others says little of a
        head that trains on all of them, and a temperature by it made probabilities worse."""
        per_image = len(targets) // views // len(clusters)
        of_rows = clusters.cpu().repeat_interleave(per_image)
        known = (targets.view(views, -1) != NO_LABEL).all(0).cpu()
        kept = known.repeat(views)
        found = probe.init_head_from_probe(model, features[kept], targets[kept], views, "none", of_rows[known])
        return found._replace(held_out=None)

    def first_temperature(self, model, features, targets, features_train) -> probe.HeadTemperature:
        def loss(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits, targets, ignore_index=NO_LABEL)

        return probe.choose_temperature(model, features, loss, features_train)


class _Collected:
    """What `PixelAnswers` is made of, image by image."""

    def __init__(self, classes: int):
        self.classes = classes
        self.losses: list[float] = []
        self.confusion: list[Tensor] = []
        self.bins = torch.zeros(BINS, 3, dtype=torch.float64)
        self.worst: dict[int, tuple[float, Tensor]] = {}  # share of right pixels, and the answers

    def add(self, logits: Tensor, mask: Tensor) -> None:
        """Count the logits (K, H, W) and the mask (H, W) of an image."""
        mask = mask.cpu()
        known = mask != NO_LABEL
        truth = mask[known]
        outputs = logits[:, known].T  # (pixels, K)
        answers = outputs.argmax(1)
        pairs = truth * self.classes + answers
        self.confusion.append(torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes))
        self.losses.append(F.cross_entropy(outputs, truth).item() if len(truth) else 0.0)
        right = answers == truth
        probabilities = outputs.softmax(1).amax(1)
        places = (probabilities * BINS).long().clamp_max(BINS - 1)
        figures = torch.stack([probabilities, right, torch.ones_like(probabilities)], 1)
        self.bins.index_add_(0, places, figures.double())
        self._note(len(self.losses) - 1, right.double().mean().item(), logits)

    def _note(self, number: int, share: float, logits: Tensor) -> None:
        image = number * distributed.world_size() + distributed.rank()
        self.worst[image] = share, logits.argmax(0).to(torch.uint8)
        if len(self.worst) > WORST_SHOWN:
            del self.worst[max(self.worst, key=lambda one: self.worst[one][0])]

    def answers(self) -> PixelAnswers:
        """The answers for the images of all processes."""
        confusion = distributed.interleave(torch.stack(self.confusion))
        loss, images, *bins = distributed.all_sum(sum(self.losses), len(self.losses), *self.bins.flatten().tolist())
        worst: dict[int, tuple[float, Tensor]] = {}
        for found in distributed.gather(self.worst):
            worst |= found
        chosen = sorted(worst, key=lambda one: worst[one][0])[:WORST_SHOWN]
        return PixelAnswers(
            loss=loss / images,
            confusion=confusion[: int(images)],
            bins=torch.tensor(bins).view(BINS, 3),
            maps={image: worst[image][1] for image in chosen},
        )


class PixelReport(Report):
    """The report on `PixelAnswers`."""

    picture = "confusion_matrix.png"

    def __init__(self, head: PixelHead, answers: PixelAnswers, clusters: Tensor | None = None):
        super().__init__(head, answers, clusters)
        self.values = pixel_figures(answers.confusion.double().sum(0)[None])
        matrices = answers.confusion.double()
        classes = len(self.names)

        def columns(weights: Tensor) -> Tensor:
            summed = (weights.double() @ matrices.flatten(1)).view(-1, classes, classes)
            figures = pixel_figures(summed)
            means = torch.stack([figures["miou"], figures["macro_dice"], figures["pixel_accuracy"]], 1)
            return torch.cat([means, figures["iou"], figures["dice"]], 1)

        found = measures.jackknife(columns, len(matrices), clusters).intervals
        self.intervals = dict(zip(("miou", "macro_dice", "pixel_accuracy"), found, strict=False))
        self.iou_intervals = found[3 : 3 + classes]
        self.dice_intervals = found[3 + classes :]

    def figures(self) -> dict[str, Any]:
        by_class = {}
        for name, intervals in (("iou", self.iou_intervals), ("dice", self.dice_intervals)):
            values = self.values[name][0].tolist()
            by_class[f"{name}_per_class"] = {n: finite(v) for n, v in zip(self.names, values, strict=True)}
            by_class[f"{name}_per_class_interval"] = {
                n: finite_interval(v) for n, v in zip(self.names, intervals, strict=True)
            }
        figures: dict[str, Any] = {}
        for name, interval in self.intervals.items():
            figures[name] = finite(self.values[name].item())
            figures[f"{name}_interval"] = finite_interval(interval)
        return figures | by_class | calibration_figures(self.head.temperature, self.answers)

    def title(self) -> str:
        return f"mean IoU {self.values['miou'].item():.1%} over {len(self.answers.confusion)} images"

    def rows(self) -> list[tuple[str, str]]:
        shown = []
        titles = {"miou": "mean IoU", "macro_dice": "mean Dice", "pixel_accuracy": "pixel accuracy"}
        for name, title in titles.items():
            shown.append((title, f"{self.values[name].item():.2%} ({interval_text(*self.intervals[name])})"))
        return [*shown, *calibration_rows(self.head.temperature, self.answers)]

    def by_class(self) -> list[tuple[str, str, str, str]]:
        """(class, share of the pixels, IoU, Dice), the worst first; classes that are nowhere last."""
        pixels = self.answers.confusion.sum((0, 2)).double()
        iou = self.values["iou"][0]
        dice = self.values["dice"][0]
        rows = []
        for i in iou.nan_to_num(2.0).argsort(stable=True).tolist():
            if iou[i].isnan():
                rows.append((self.names[i], "0.0%", "nowhere", "nowhere"))
                continue
            chance = interval_text(*self.iou_intervals[i])
            rows.append(
                (self.names[i], f"{pixels[i] / pixels.sum():.1%}", f"{iou[i]:.1%} ({chance})", f"{dice[i]:.1%}")
            )
        return rows

    def printed(self) -> list[tuple[str, str]]:
        rows = [(name, f"IoU {iou}, {share} of the pixels") for name, share, iou, _ in self.by_class()]
        return self.shortened("by class", "the worst first:", rows)

    def sections(self, picture: Path) -> list[str]:
        return [
            "<h2>By class</h2>",
            html_table(self.by_class(), ("class", "of the pixels", "IoU", "Dice")),
            "<h2>What is taken for what</h2>",
            html_picture(picture.read_bytes(), "shares of each class's pixels by answer"),
            *reliability_section(self.answers),
        ]

    def draw(self, path: Path) -> None:
        plot_shares(self.answers.confusion.sum(0), self.names, path)

    def mistakes(self) -> dict[str, list[tuple[int, str]]]:
        described = []
        for image in self.answers.maps:
            matrix = self.answers.confusion[image]
            share = matrix.diagonal().sum() / matrix.sum()
            described.append((image, f"{share:.0%} of the pixels right"))
        return {"Fewest right pixels first": described}

    def draw_mistakes(self, images: LabelledImages, path: Path, bands: Bands | None = None) -> None:
        """The worst images; beside each its mask and the answers, in the colours of the classes."""
        plot_masks(self.mistakes(), self.answers.maps, images, self.names, path, bands)

    def answer_columns(self) -> dict[str, Sequence[Any]]:
        """For each class the pixels that are of it, that were answered as it, and that are both."""
        matrices = self.answers.confusion
        columns: dict[str, Sequence[Any]] = {}
        for i, name in enumerate(self.names):
            columns[f"{name}: pixels"] = matrices[:, i].sum(1).tolist()
            columns[f"{name}: answered"] = matrices[:, :, i].sum(1).tolist()
            columns[f"{name}: right"] = matrices[:, i, i].tolist()
        return columns


def plot_shares(matrix: Tensor, names: Sequence[str], path: Path) -> None:
    """A confusion matrix (K, K) of pixels: the share of each class's pixels by answer."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    shares = (matrix.double() / matrix.sum(1, keepdim=True)).nan_to_num()
    side = min(12, 3 + 0.5 * len(names))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    display = ConfusionMatrixDisplay(shares.numpy(), display_labels=[drawn(name) for name in names])
    how = {"cmap": "Blues", "xticks_rotation": 45, "values_format": ".0%", "include_values": len(names) <= 20}
    display.plot(ax=figure.subplots(), **how)
    with open_atomically(path) as file:
        figure.savefig(file, dpi=120)


def plot_masks(
    groups: Mapping[str, Sequence[tuple[int, str]]],
    maps: Mapping[int, Tensor],
    images: LabelledImages,
    names: Sequence[str],
    path: Path,
    bands: Bands | None,
) -> None:
    """A row for each image: the image, its mask and the answers, each over the image; and the colours' meaning."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    chosen = [one for group in groups.values() for one in group]
    figure = Figure(figsize=(11, 0.8 + 3.0 * max(1, len(chosen))), layout="constrained")
    rows = figure.subplots(max(1, len(chosen)), 3, squeeze=False)
    for axes in rows.ravel():
        axes.axis("off")
    for (image, text), row in zip(chosen, rows, strict=False):
        picture = images.picture(image, bands)  # (H, W, 3), from 0 to 1
        truth = images.mask(image)
        layers = {drawn(text): None, "truth": truth, "answer": maps[image].long().where(truth != NO_LABEL, NO_LABEL)}
        for (title, classes), axes in zip(layers.items(), row, strict=True):
            axes.imshow(picture if classes is None else 0.4 * picture + 0.6 * coloured(classes, images.palette))
            axes.set_title(title, fontsize=9)
    patches = [Patch(color=images.palette[i], label=drawn(name)) for i, name in enumerate(names)]
    figure.legend(handles=patches[:40], loc="outside lower center", ncols=6, fontsize=8)
    with open_atomically(path) as file:
        figure.savefig(file, dpi=110)


class Segmentation(Task):
    """A class for every pixel.

    Args:
        names: of the K classes.
        class_weights: (K,), how much a pixel of each counts, in the loss and for the head's start; None: 1.
        masks: how masks are read: `MaskReader.record`, which an adapter file has.
    """

    kind = "segmentation"
    score = "miou"
    score_title = "mean IoU"
    loss_title = "cross-entropy of a pixel"
    outputs_are = ("class", "classes")
    measured = ("miou", "macro_dice", "pixel_accuracy")
    best_by: Mapping[str, str] = {"miou": "val_miou", "dice": "val_macro_dice", "pixels": "val_pixel_accuracy"}
    Report = PixelReport

    def __init__(
        self,
        names: Sequence[str],
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
        masks: Mapping[str, Any] | None = None,
    ):
        super().__init__(PixelObjective(class_weights, label_smoothing), PixelHead(names, class_weights))
        self.masks = dict(masks or {})

    def record(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.masks}


def rare_class_weights(pixels: Tensor) -> Tensor:
    """How much a pixel of each class counts, (K,), from the numbers of pixels (N, K): one by the root of its frequency.

    Their mean over the pixels is 1. By the frequency itself a class of a few pixels would outweigh all others.
    """
    totals = pixels.sum(0).double()
    weights = totals.clamp_min(1).rsqrt()
    return (weights * totals.sum() / (weights * totals).sum()).float()
