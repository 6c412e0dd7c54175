"""A class for every pixel: cross-entropy over known pixels, judged by the mean intersection over union.

All figures follow from each image's confusion matrix, (N, K, K). Targets in a batch are masks (N, H, W) of classes,
NO_LABEL where unknown; of a set of images they are the numbers of known pixels of each class, (N, K).
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit import NO_LABEL, InputError, distributed
from toolkit.answers import answer_reports, evaluation, measures, probe
from toolkit.answers.answer_reports import Headline, Report, finite, finite_interval, worst_first
from toolkit.answers.parts import Answers, SoftmaxObjective
from toolkit.answers.report_page import PICTURE_ALONE, drawn, html_picture, html_table, new_figure, save_figure
from toolkit.devices import to_device
from toolkit.images.data import LabelledImages
from toolkit.images.masks import MaskReader, coloured
from toolkit.models.dense import answers_by_rows, feature_maps, features_at

PROBE_ROWS = 8_000  # pixels, at the most, that the head's start is fitted to, over all images and views
WORST_SHOWN = 6  # images in mistakes.png
NO_PIXEL = "no pixel of the evaluation images is known"
COUNTED = (": pixels", ": answered", ": right")  # of each image, by class: how the columns of its answers end


@dataclass
class PixelAnswers(Answers):
    MEASURED = ("miou", "macro_dice", "pixel_accuracy")

    confusion: Tensor  # (N, K, K), of truth (rows) and answers: numbers of known pixels
    bins: Tensor  # (BINS, 3): `toolkit.answers.measures.calibration` of the pixels
    maps: Mapping[int, Tensor] = field(default_factory=dict)  # the answers (H, W) of the worst images, by their number

    @property
    def targets(self) -> Tensor:
        return self.confusion

    def reliability(self) -> Tensor:
        return self.bins

    def weighted(self, weights: Tensor) -> dict[str, Tensor]:
        summed = measures.weighted_sum(counted(self.confusion).flatten(1), weights)
        return pixel_figures(summed.unflatten(1, (3, -1)))


def counted(matrices: Tensor) -> Tensor:
    """Of confusion matrices (n, K, K) how many pixels are of each class, answered as it, and both: (n, 3, K)."""
    return torch.stack([matrices.sum(2), matrices.sum(1), matrices.diagonal(dim1=1, dim2=2)], 1)


def pixel_figures(counts: Tensor) -> dict[str, Tensor]:
    """The figures of pixels that are `counted`, (..., 3, K), by name: (...,), and of each class (..., K)."""
    truths, answers, right = counts.unbind(-2)
    iou = right / (truths + answers - right)  # NaN, and in no mean, for a class that is neither there nor answered
    dice = 2 * right / (truths + answers)
    means = {"miou": iou.nanmean(-1), "macro_dice": dice.nanmean(-1), "pixel_accuracy": right.sum(-1) / truths.sum(-1)}
    return means | {"iou": iou, "dice": dice}


def _by_parts(images: Iterable[Tensor], window: int, answer: Callable[[Tensor], Tensor]) -> Iterator[Iterable[Tensor]]:
    """Of each image its logits (K, rows, W) from above. Those of one window each are answered at once."""
    if torch.is_tensor(images) and set(images.shape[2:]) == {window}:
        for logits in answer(images):
            yield [logits]
        return
    for image in images:
        yield answers_by_rows(lambda first, last, of=image: of[:, first:last], *image.shape[1:], window, answer)


def _counted(parts: Iterable[Tensor], mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Confusion matrix, loss, `PixelAnswers.bins` and answers (H, W) of an image, by parts of logits (K, rows, W)."""
    columns = []
    for logits in parts:
        rows, mask = mask.tensor_split((logits.shape[1],))
        truth = rows.flatten()
        known = truth != NO_LABEL  # a GPU would have to say how many these are, were the others left out
        outputs = logits.flatten(1).T  # (pixels, K)
        answers = outputs.argmax(1)
        pairs = truth.clamp_min(0) * len(logits) + answers
        confusion = pairs.new_zeros(len(logits) ** 2).index_add_(0, pairs, known.long()).view(2 * [len(logits)])
        loss = F.cross_entropy(outputs, truth, reduction="sum", ignore_index=NO_LABEL).double()
        bins = measures.calibration(outputs.softmax(1).amax(1), answers == truth, known)
        columns.append((confusion, loss, bins, answers.view_as(rows).to(torch.uint8)))
    *figures, answers = zip(*columns, strict=True)
    confusion, loss, bins = map(sum, figures)
    return confusion, (loss / confusion.sum()).nan_to_num(), bins, torch.cat(answers)


def _share_right(confusion: Tensor) -> Tensor:
    """The share of right pixels of an image; 1 for one of which nothing is known."""
    return (confusion.diagonal().sum() / confusion.sum()).nan_to_num(1.0)


class PixelReport(Report):
    picture = "confusion_matrix.png"
    HEADLINES: Mapping[str, Headline] = {
        "miou": Headline("mean IoU", NO_PIXEL),
        "macro_dice": Headline("mean Dice", NO_PIXEL),
        "pixel_accuracy": Headline("pixel accuracy", NO_PIXEL),
    }

    def figures(self) -> dict[str, Any]:
        by_class = {}
        for name in ("iou", "dice"):
            values, intervals, _ = zip(*self.found[name], strict=True)
            by_class[f"{name}_per_class"] = dict(zip(self.names, map(finite, values), strict=True))
            by_class[f"{name}_per_class_interval"] = dict(zip(self.names, map(finite_interval, intervals), strict=True))
        return super().figures() | by_class

    def by_class(self) -> Iterator[tuple[str, str, str, str]]:
        """(class, share of the pixels, IoU, Dice), the worst first; classes that are nowhere last."""
        pixels = self.answers.confusion.sum((0, 2)).double()
        shares = pixels / pixels.sum()
        for i in worst_first([figure.value for figure in self.found["iou"]]):
            iou, chance, _ = self.found["iou"][i]
            dice = self.found["dice"][i].value
            cells = (f"{shares[i]:.1%}", f"{iou:.1%} ({answer_reports.interval_text(*chance)})", f"{dice:.1%}")
            if math.isnan(iou):
                cells = ("0.0%", "nowhere", "nowhere")
            yield self.names[i], *cells

    def printed(self) -> Iterator[tuple[str, str]]:
        rows = [(name, f"IoU {iou}, {share} of the pixels") for name, share, iou, _ in self.by_class()]
        return answer_reports.shortened("by class", "the worst first:", rows)

    def sections(self, picture: Path) -> list[str]:
        by_class = html_table(self.by_class(), ("class", "of the pixels", "IoU", "Dice"))
        matrix = html_picture(picture.read_bytes(), "shares of each class's pixels by answer")
        return ["<h2>By class</h2>", by_class, "<h2>What is taken for what</h2>", matrix]

    def draw(self, path: Path) -> None:
        matrix = self.answers.confusion.sum(0).double()
        shares = (matrix / matrix.sum(1, keepdim=True)).nan_to_num()
        answer_reports.plot_confusion(shares.numpy(), self.names, self.title(), path, ".0%")

    def mistakes(self) -> Iterator[tuple[int, str]]:
        for i in self.answers.maps:
            yield i, f"{_share_right(self.answers.confusion[i]):.0%} of the pixels right"

    def draw_mistakes(self, images, path, explainer=None) -> answer_reports.Named:
        """A row for each of the worst images: it, and over it its mask and the answers; then the colours' meaning."""
        from matplotlib.patches import Patch

        chosen = list(self.mistakes())
        palette = self.task.palette()
        figure = new_figure(11, 0.8 + 3.0 * max(1, len(chosen)))
        rows = figure.subplots(max(1, len(chosen)), 3, squeeze=False, subplot_kw=PICTURE_ALONE)
        for (image, text), row in zip(chosen, rows, strict=False):
            truth = images.mask(image)
            step = 1 + max(truth.shape) // 1_000  # of a scene matplotlib would hold every pixel, in float64
            truth = truth[::step, ::step]
            picture = images.picture(image, step)  # (H, W, 3), from 0 to 1
            answer = self.answers.maps[image][::step, ::step].long().where(truth != NO_LABEL, NO_LABEL)
            file = drawn(Path(images.name(image)).name, 40)
            layers = {f"{file}: {drawn(text)}": None, "truth": truth, "answer": answer}
            for (title, classes), axes in zip(layers.items(), row, strict=True):
                axes.imshow(picture if classes is None else 0.4 * picture + 0.6 * coloured(classes, palette))
                axes.set_title(title, fontsize=9)
        patches = [Patch(color=palette[i], label=drawn(name)) for i, name in enumerate(self.names)]
        figure.legend(handles=patches[:40], loc="outside lower center", ncols=6, fontsize=8)
        save_figure(figure, path)
        return [(images.name(i), text) for i, text in chosen]

    def answer_columns(self) -> dict[str, Sequence[Any]]:
        """For each class the pixels that are of it, that were answered as it, and that are both."""
        titles = map("".join, itertools.product(self.names, COUNTED))
        return dict(zip(titles, counted(self.answers.confusion).mT.flatten(1).T.tolist(), strict=True))


class Segmentation(SoftmaxObjective):
    """A class for every pixel: logits (N, K, H, W), masks (N, H, W), and weights (K,) of classes in loss and start."""

    kind = "segmentation"
    loss_title = "cross-entropy of a pixel"
    predicted_into = "maps"
    pipeline = "image-segmentation"
    Report = PixelReport
    output_name = "probabilities"
    always_calibrates = True

    def __init__(self, names: Sequence[str], class_weights=None, label_smoothing=0.0, masks: MaskReader | None = None):
        super().__init__(names, class_weights, label_smoothing)
        self.masks = masks or MaskReader(None)

    @classmethod
    def of_run(cls, names, train, args):
        weights = rare_class_weights(train.targets) if args.class_weights == "balanced" else None
        return cls(names, weights, args.label_smoothing, train.source.read)

    @classmethod
    def from_record(cls, names, record):
        return cls(names, masks=MaskReader.from_record(record, names))

    def counts(self, images: LabelledImages) -> dict[int, int]:
        return dict(enumerate((images.targets > 0).sum(0).tolist()))

    def constant_loss(self, images: LabelledImages) -> float:
        shares = (images.targets / images.targets.sum(1, keepdim=True)).nanmean(0)
        return -torch.special.xlogy(shares, shares).sum().item()

    def record(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.masks.record}

    @torch.no_grad()
    def evaluate(self, model, loader, device, dtype=torch.float32) -> PixelAnswers:
        """Answers for images of any size, in overlapping windows of the model's own."""

        def answer(windows: Tensor) -> Tensor:
            return evaluation.computed(model, windows, device, dtype).float()

        counted: list[list[Tensor]] = []
        worst: list[tuple[float, int, Tensor]] = []  # the share of right pixels, the image, and the answers for it
        with evaluation.eval_mode(model):
            for images, masks in loader:
                parts = _by_parts(images, model.window, answer)
                found = [_counted(rows, to_device(mask, device)) for rows, mask in zip(parts, masks, strict=True)]
                shares = torch.stack([_share_right(confusion) for confusion, *_ in found]).tolist()
                for share, (*figures, answers) in zip(shares, found, strict=True):
                    image = len(counted) * distributed.world_size() + distributed.rank()
                    counted.append(figures)
                    worst.append((share, image, answers))
                worst = sorted(worst)[:WORST_SHOWN]  # no two have the same number
        columns = map(torch.stack, zip(*counted, strict=True))
        confusion, losses, bins = (distributed.interleave(column).cpu() for column in columns)
        worst = [(share, image, answers.cpu()) for share, image, answers in worst]
        worst = sorted(itertools.chain(*distributed.gather(worst)))[:WORST_SHOWN]
        return PixelAnswers(losses.mean().item(), confusion, bins.sum(0), {i: answers for _, i, answers in worst})

    def constant_score(self, images: LabelledImages) -> float:
        pixels = images.targets.sum(0)
        return (pixels.max() / pixels.sum() / (pixels > 0).sum()).item()

    def believable_temperature(self, outputs: Tensor, targets: Tensor, optimism: float | None) -> float:
        """The temperature that fits pixels of training images: they are enough to fit others as well."""
        return self.fitted_temperature(outputs, targets)

    def pixel_outputs(self, model, loader, device, dtype, images) -> tuple[Tensor, Tensor]:
        """Outputs (M, K) and classes (M,) of random known pixels of a loader's images, each class as often as it is."""
        features, targets = self.features(model, loader, device, dtype, images, balanced=False)
        known = targets != NO_LABEL
        return probe.head_outputs(model, features[known]).cpu(), targets[known].cpu()

    @torch.no_grad()
    def features(self, model, loader, device, dtype, images, balanced=True) -> tuple[Tensor, Tensor]:
        """Features (N P, D) and classes (N P,) of P pixels of each image, as the loss weighs it if `balanced`."""
        pixels = PROBE_ROWS // (2 * images)
        rows = []
        classes = []
        with evaluation.eval_mode(model):
            for batch, masks in loader:
                height, width = masks.shape[1:]
                maps = evaluation.computed(functools.partial(feature_maps, model.backbone), batch, device, dtype)
                drawn = [self._drawn(mask, pixels, len(rows) + i, balanced) for i, mask in enumerate(masks)]
                places = torch.stack(drawn)  # (N, P)
                points = torch.stack([(places % width + 0.5) / width, (places // width + 0.5) / height], 2)
                for i, of_image in enumerate(to_device(points, device)):
                    rows.append(features_at([of_batch[i : i + 1] for of_batch in maps], of_image))
                classes.append(to_device(masks.flatten(1).gather(1, places), device))
        features = distributed.interleave(torch.stack(rows))
        return features.flatten(0, 1), distributed.interleave(torch.cat(classes)).flatten()

    def _drawn(self, mask: Tensor, pixels: int, number: int, balanced: bool) -> Tensor:
        """The places of this many random known pixels of a mask (H, W); of one without any, unknown ones."""
        # `number` is of the image among this process's. The draws depend on its number among all.
        draws = torch.Generator().manual_seed(number * distributed.world_size() + distributed.rank())
        flat = mask.flatten().cpu()
        known = flat != NO_LABEL
        weights = known.float()
        if balanced and self.class_weights is not None:
            weights = weights * self.class_weights.cpu()[flat.clamp_min(0)]
        if not known.any():
            weights = torch.ones(len(flat))
        return torch.multinomial(weights, pixels, replacement=True, generator=draws)

    def start(self, model, features, targets, views=1, clusters=None) -> probe.Probe:
        """The probe without its held-out answers: of few pixels, they say little of a head that trains on all."""
        of_rows = clusters.cpu().repeat_interleave(len(targets) // views // len(clusters)).repeat(views)
        known = (targets != NO_LABEL).cpu()
        if len(targets[known].unique()) < 2:
            raise InputError("crops show fewer than two classes: use --head-init random or a larger --image-size")
        # Views are of other pixels, which belong together by their image as well.
        found = probe.fit_linear_probe(features[known], targets[known], len(self.names), clusters=of_rows[known])
        return probe.set_head(model, found._replace(held_out=None))


def rare_class_weights(pixels: Tensor) -> Tensor:
    """Weights (K,) by the root of each class's frequency in numbers of pixels (N, K); the mean over the pixels is 1."""
    totals = pixels.sum(0).double()
    weights = totals.clamp_min(1).rsqrt()
    return (weights * totals.sum() / (weights * totals).sum()).float()
