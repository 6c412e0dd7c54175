"""Several labels an image: a sigmoid and a binary cross-entropy for each, judged by macro AP."""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit import listed, printable
from toolkit.answers import measures, parts, probe
from toolkit.answers.answer_reports import ColumnReport, Headline, shortened, worst_first
from toolkit.answers.report_page import drawn, html_picture, html_table, new_figure, save_figure
from toolkit.images import data, lists

NO_POSITIVE = "no evaluation image has a label"
THRESHOLD = 0.5  # above which probability a label is an answer, where no better one is known
CURVES = 10  # labels in the pictures of precision by recall and of ROC
RANKINGS = ("average_precision", "auroc")
AT_THRESHOLD = {"f1": "F1", "sensitivity": "sensitivity", "specificity": "specificity", "ppv": "PPV", "npv": "NPV"}
SHARES = {"average_precision": "AP", "auroc": "AUROC", **AT_THRESHOLD}  # figures of a label, and their titles
FEWEST_POSITIVES = 5  # images or clusters, and negatives, of a label whose figures have intervals: these cover


class LabelAnswers(parts.ColumnAnswers):
    """Answers of yes and no: the values are probabilities, the targets 1, 0, or NaN where unknown."""

    MEASURED = ("macro_ap", "micro_ap", "macro_auroc")

    def weighted(self, weights: Tensor) -> dict[str, Tensor]:
        """Means over the labels that have one, (n,), and the AP and the AUROC of each label, (n, K)."""
        known = ~self.targets.isnan()
        micro = measures.ranking(self.values[known], self.targets[known], known.nonzero()[:, 0], weights)
        ap, auroc = torch.stack([measures.ranking(*column, weights) for column in self.known()], -1).unbind(1)
        means = {"macro_ap": ap.nanmean(1), "micro_ap": micro[:, 0], "macro_auroc": auroc.nanmean(1)}
        return means | {"average_precision": ap, "auroc": auroc}

    def reliability(self) -> Tensor:
        known = ~self.targets.isnan()
        return measures.calibration(self.values[known], self.targets[known])

    def rates(self, thresholds: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """F1, sensitivity, specificity, PPV and NPV above the thresholds, (n, K); NaN without such images."""
        positive = self.targets == 1
        negative = self.targets == 0
        above = self.values > thresholds
        both = (positive, negative, above & positive, ~above & negative)
        positives, negatives, hits, rejections = measures.weighted_sum(torch.cat(both, 1), weights).chunk(4, 1)
        answers = hits + negatives - rejections
        return {
            "f1": (2 * hits / (answers + positives)).where(positives > 0, torch.nan),
            "sensitivity": hits / positives,
            "specificity": rejections / negatives,
            "ppv": hits / answers,
            "npv": rejections / (rejections + positives - hits),
        }

    def thresholds_for(self, goal: str) -> Tensor:
        """The threshold of each label that reaches a goal here, (K,), or NaN: see `measures.threshold_for`."""
        return torch.tensor([measures.threshold_for(values, targets, goal) for values, targets, _ in self.known()])


class LabelReport(ColumnReport):
    picture = "precision_recall.png"
    in_summary = True
    suffix = lists.PROBABILITY
    TITLES = ("label", "positives", "unknown", *SHARES.values(), "threshold")
    HEADLINES: Mapping[str, Headline] = {
        "macro_ap": Headline("macro AP", NO_POSITIVE),
        "micro_ap": Headline("micro AP", NO_POSITIVE),
        "macro_auroc": Headline("macro AUROC", "no label has evaluation images with it and without"),
        "macro_f1": Headline("macro F1", NO_POSITIVE, note=", at the stored thresholds"),
    }

    @functools.cached_property
    def by(self) -> dict[str, list[float]]:
        return {
            "positives": self.answers.targets.nansum(0).long().tolist(),
            "unknown": self.answers.targets.isnan().sum(0).tolist(),
            **{name: [figure.value for figure in self.found[name]] for name in SHARES},
            "threshold": self.task.thresholds.tolist(),
        }

    def measure(self, weights: Tensor) -> dict[str, Tensor]:
        rates = self.answers.rates(self.task.thresholds, weights)
        return self.answers.weighted(weights) | rates | {"macro_f1": rates["f1"].nanmean(1)}

    def intervals(self, i: int) -> dict[str, measures.Interval]:
        """The intervals of a label's figures; of rankings NaN where few images, or clusters, have it or lack it."""
        found = {name: self.found[name][i].interval for name in RANKINGS}
        is_answer = self.answers.values[:, i] > self.task.thresholds[i]
        for rate, value in {"sensitivity": 1, "specificity": 0}.items():
            some = self.answers.targets[:, i] == value
            right = is_answer[some] == bool(value)
            groups, clusters = self.clusters[some].unique(return_inverse=True)
            found[rate] = measures.share_interval(right, clusters if len(groups) < len(right) else None)
            if len(groups) < FEWEST_POSITIVES:
                found |= dict.fromkeys(RANKINGS, measures.NO_INTERVAL)
        return found

    def rows(self) -> Iterator[tuple[str, str]]:
        score, *rows = super().rows()
        yield score
        if missing := [name for name, count in zip(self.names, self.by["positives"], strict=True) if not count]:
            yield "", f"no evaluation image has {listed(missing, 4)}: left out of the means"
        yield from rows

    def by_label(self) -> Iterator[list[Any]]:
        """Rows of TITLES, the lowest AP first; labels without positives last."""
        for i in worst_first(self.by["average_precision"]):
            counts = self.by["positives"][i], self.by["unknown"][i]
            threshold = f"{self.by['threshold'][i]:.2f}"
            yield [self.names[i], *counts, *self.cells(i, SHARES, ".1%").values(), threshold]

    def printed(self) -> Iterator[tuple[str, str]]:
        rows = []
        at_thresholds = []
        for name, positives, _, ap, auroc, _, sensitivity, specificity, *_, threshold in self.by_label():
            without = "" if "(" in ap else ", no interval"
            text = f"AP {ap}, AUROC {auroc or 'not defined'}; positives: {positives}{without}"
            rows.append((name, text if positives else "no positives"))
            reached = f"{threshold}: sensitivity {sensitivity or 'not defined'}"
            at_thresholds.append((name, f"{reached}, specificity {specificity or 'not defined'}"))
        yield from shortened("by label", "the worst first, with 95% intervals:", rows)
        yield from shortened("at the threshold", "what it reaches, with 95% intervals:", at_thresholds)

    def sections(self, picture: Path) -> list[str]:
        shown = html_picture(picture.read_bytes(), "precision by recall, and ROC, of the labels with the lowest AP")
        explained = "<p>In brackets 95% intervals; F1 and what follows it are at the threshold: a point on the ROC.</p>"
        return ["<h2>By label</h2>", explained, html_table(self.by_label(), self.TITLES), shown]

    def draw(self, path: Path) -> None:
        from sklearn.metrics import precision_recall_curve, roc_curve

        figure = new_figure(11, 4.5)
        precisions, rocs = figure.subplots(1, 2)
        rocs.plot([0, 1], [0, 1], "-", color="0.6", linewidth=1)
        columns = list(self.answers.known())
        for i in worst_first(self.by["average_precision"])[:CURVES]:
            scores, targets, _ = columns[i]
            name = drawn(printable(self.names[i], 24))
            if targets.any():
                precision, recall, _ = precision_recall_curve(targets, scores)
                precisions.plot(recall, precision, label=name, drawstyle="steps-post")
            if targets.any() and not targets.all():
                alarms, hits, _ = roc_curve(targets, scores)
                [line] = rocs.plot(alarms, hits, label=f"{name} {self.by['auroc'][i]:.1%}")
                rocs.plot(1 - self.by["specificity"][i], self.by["sensitivity"][i], "o", color=line.get_color())
        precisions.set(xlabel="recall", ylabel="precision", title=self.title())
        rocs.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC, AUROC, and the thresholds")
        for axes in (precisions, rocs):
            axes.set(xlim=(0, 1), ylim=(0, 1.02))
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
        save_figure(figure, path)

    def mistakes(self) -> Iterator[tuple[int, str]]:
        values = self.answers.values
        targets = self.answers.targets
        is_wrong = (values > self.task.thresholds) != (targets == 1)
        for image, label in self.worst((values - targets).abs() * is_wrong):
            is_there = "is there" if targets[image, label] == 1 else "is not there"
            yield image, f"{self.names[label]} {is_there}: {values[image, label]:.0%}"


class MultiLabel(parts.Task):
    """Several labels an image, by the targets of training images, (N, K): 1, 0, or NaN, with none, where unknown."""

    kind = "multilabel"
    loss_title = "binary cross-entropy"
    outputs_are = ("label", "labels")
    pipeline = "image-classification"
    recorded = ("thresholds",)
    Report = LabelReport
    activation = "sigmoid"
    output_name = "probabilities"
    served: Mapping[str, str] = {"thresholds": "thresholds"}
    probed_in_views = True
    always_calibrates = True

    def __init__(self, names: Sequence[str], targets: Tensor | None = None, balanced=False, thresholds=None, goal="f1"):
        super().__init__(names)
        if targets is None:
            targets = torch.full((1, len(names)), math.nan)
        known = (~targets.isnan()).sum(0)
        self.positives = targets.nansum(0)  # (K,)
        self.shares = self.positives / known.clamp_min(1)
        both = torch.stack([known - self.positives, self.positives])
        self.weights = torch.ones(2, len(names))
        if balanced:  # a label's positives count as much as its negatives
            self.weights = (known / (2 * both)).where(both.amin(0) > 0, 1.0)
        odds = self.weights * both + 0.5
        self.constant_logits = (odds[1] / odds[0]).log()
        self.goal = goal
        self.thresholds = torch.full((len(names),), THRESHOLD) if thresholds is None else thresholds.float()

    @classmethod
    def of_run(cls, names, train, args):
        return cls(names, train.targets, args.class_weights == "balanced", goal=args.threshold)

    def to(self, device: torch.device) -> None:
        self.weights = self.weights.to(device)
        self.constant_logits = self.constant_logits.to(device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over all K labels of an image, where unknown ones count 0; summed over images."""
        return self.plain_loss(outputs, targets, self.weights[1].where(targets == 1, self.weights[0]))

    def plain_loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(outputs, targets.nan_to_num(), weights, reduction="none")
        return losses.masked_fill(targets.isnan(), 0).sum() / outputs.shape[1]

    def counts(self, images: data.LabelledImages) -> Mapping[int, int]:
        return dict(enumerate(images.targets.nansum(0).long().tolist()))

    def constant_loss(self, images: data.LabelledImages) -> float:
        share = images.targets.nanmean(0)
        entropies = torch.special.entr(share) + torch.special.entr(1 - share)
        return entropies.expand_as(images.targets).masked_fill(images.targets.isnan(), 0).mean().item()

    def answers(self, outputs: Tensor, targets: Tensor) -> LabelAnswers:
        return LabelAnswers(self.plain_loss(outputs, targets).item() / len(targets), outputs.sigmoid(), targets)

    def constant_score(self, images: data.LabelledImages) -> float:
        return LabelAnswers(0.0, torch.zeros_like(images.targets), images.targets).score

    def variance(self, score: float, images: int) -> float:
        """Each label's AP is about as sure as a share of its positives, and the labels' are independent."""
        seen = self.shares[self.positives > 0]
        if not len(seen):
            return math.inf
        return score * (1 - score) * (1 / (images * seen).clamp_min(1)).mean().item() / len(seen)

    def start(self, model, features, targets, views=1, clusters=None) -> probe.Probe:
        return probe.set_head(model, probe.fit_one_vs_rest(features, targets, views, self.weights, clusters))

    def first_temperature(self, model, features, targets, features_train) -> probe.HeadTemperature:
        loss = functools.partial(self.loss, targets=targets)
        return probe.choose_temperature(model, features, loss, features_train, self.constant_logits)

    def fitted_temperature(self, outputs, targets, smoothing=0.0) -> float:
        constant = self.constant_logits.to(outputs.device)
        smoothed = torch.lerp(targets, torch.full_like(targets, 0.5), smoothing).double()
        return measures.fit_temperature(outputs - constant, lambda logits: self.plain_loss(logits + constant, smoothed))

    def calibrate(self, outputs, targets, temperature) -> None:
        """The thresholds are those that reach the goal on these views."""
        super().calibrate(outputs, targets, temperature)
        answers = LabelAnswers(0.0, self.softened(outputs, self.temperature).sigmoid(), targets)
        self.thresholds = answers.thresholds_for(self.goal).nan_to_num(THRESHOLD)

    def columns(self, outputs: Tensor) -> dict[str, list[str]]:
        probabilities = outputs.sigmoid()
        said = (probabilities > self.thresholds).tolist()
        columns = {"labels": [",".join(itertools.compress(self.names, row)) for row in said]}
        for name, shares in zip(self.names, probabilities.T.tolist(), strict=True):
            columns[f"{name} probability"] = list(map("{:.4f}".format, shares))
        return columns
