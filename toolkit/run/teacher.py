"""A teacher labels images that have none: a moving average of the weights that train.

The network learns its answers on changed views where it is sure of plain ones (FixMatch, arXiv 2001.07685). The average
is that of Mean Teacher (1703.01780), and how sure is sure enough follows FreeMatch (2205.07246, section 4.1). A label
counts by how far its answer is from chance: what a weak backbone answers is often wrong. All in all a teacher is as
sure as the start was, which held-out labels have checked: its own labels would make it ever surer, right or wrong.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from toolkit import NO_LABEL, attributes, distributed
from toolkit.answers import evaluation
from toolkit.images.sources import Splits
from toolkit.run.optim import weights_replaced

LEAST_LABELS = 5  # a class: with fewer, images without labels may harm
LEAST_KNOWN = 0.1  # of the way from chance to certainty: how far the answers at the start have to be
SUREST = 120  # images that were answered most surely at the start
MENDED = 0.25  # the most of their answers that training may change, beside those expected to be wrong
KEPT = 0.95  # of the averages, in each step
LEAST_PROBABILITY = 1e-4  # of a class in the answers at the start, which are a prior and no proof
LEAST_SPREAD = 1e-12  # by which logits are divided: those of a dead network do not vary


def above_chance(certainty: Tensor, classes: int) -> Tensor:
    """How far answers of this certainty are from chance, 0, to certainty, 1."""
    return (certainty - 1 / classes) / (1 - 1 / classes)


def as_sure(logits: Tensor, first: Tensor) -> Tensor:
    """Scale logits (N, K) so that those of an image vary as much as in `first`: its mean over images and processes."""
    spread = torch.stack([first.var(1).sum(), logits.var(1).sum()])
    if distributed.world_size() > 1:
        dist.all_reduce(spread)
    wanted, present = spread
    return logits * (wanted / present.clamp_min(LEAST_SPREAD)).sqrt()


def enough_labels(splits: Splits) -> bool:
    """Has a class LEAST_LABELS images on average? With fewer, images without labels may harm, and do not train."""
    return len(splits.train) >= LEAST_LABELS * len(splits.class_names)


class Teacher:
    """Labels for M `images` that have none, of K `classes`, by a model whose trained weights it averages."""

    def __init__(self, model: nn.Module, images: int, classes: int, device: torch.device, dtype):
        self.model = model
        self.device = device
        self.dtype = dtype
        self.weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
        self.first_answers = torch.full((images, classes), 1 / classes)  # (M, K): the probabilities at the start
        self.begin()

    def begin(self) -> None:
        """Begin with the present weights, by which the images have the `first_answers`."""
        self.average = {name: weight.clone() for name, weight in self.weights.items()}
        self.certainty = self.first_answers.amax(1).mean().to(self.device)  # of the mean answer, lately
        self.shares = self.first_answers.mean(0).to(self.device)  # of the classes in the answers, lately
        self.seen = self.shares.new_zeros(len(self.shares) + 2)  # sums over the answers of a step: see `after_step`

    def knows_enough(self) -> bool:
        """Are the answers at the start, which are as sure as held-out labels allow, better than chance?"""
        return above_chance(self.first_answers.amax(1).mean(), self.first_answers.shape[1]).item() >= LEAST_KNOWN

    @torch.no_grad()
    def extend(self, labels: Tensor, views: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """The labels, then the `sure_labels` of images (N, C, H, W) at these places; and how much each counts."""
        with weights_replaced(self.weights, self.average.items()), evaluation.eval_mode(self.model):
            logits = evaluation.computed(self.model, views, self.device, self.dtype).float()
        found, counts = self.sure_labels(logits, self.first_answers[places])
        return torch.cat([labels, found]), torch.cat([counts.new_ones(len(labels)), counts])

    def sure_labels(self, logits: Tensor, first_answers: Tensor) -> tuple[Tensor, Tensor]:
        """The classes by the geometric mean of answers now and at first, (N, K) each, or NO_LABEL; and their counts."""
        first = first_answers.to(self.device).clamp_min(LEAST_PROBABILITY).log()
        answers = ((as_sure(logits, first) + first) / 2).softmax(1)
        certainty, classes = answers.max(1)
        self.seen += torch.cat([answers.sum(0), certainty.sum()[None], certainty.new_tensor([len(answers)])])
        # As sure as the mean answer, and for a class that is rare in the answers less.
        thresholds = self.certainty * self.shares / self.shares.max()  # (K,)
        is_sure = certainty >= thresholds[classes]
        return classes.where(is_sure, NO_LABEL), above_chance(certainty, answers.shape[1])

    def surest(self) -> Tensor:
        """The places of the images that were answered most surely at the start, (n,): as many of each class."""
        certainty, classes = self.first_answers.max(1)
        in_order = certainty.argsort(descending=True, stable=True)
        number = self.first_answers.shape[1]
        return torch.cat([in_order[classes[in_order] == label][: max(1, SUREST // number)] for label in range(number)])

    def still_sure(self, logits: Tensor) -> bool:
        """Are the surest images, with these logits (n, K), answered as at the start, but for what training mends?"""
        certainty, classes = self.first_answers[self.surest()].max(1)
        return bool((logits.argmax(1) == classes).float().mean() >= (1 - MENDED) * certainty.mean())

    @torch.no_grad()
    def after_step(self) -> None:
        """Go on with the averages after an optimizer step: of the weights, and of the answers of all processes."""
        for name, weight in self.weights.items():
            self.average[name].lerp_(weight, 1 - KEPT)
        if distributed.world_size() > 1:
            dist.all_reduce(self.seen)
        *shares, certainty, images = self.seen
        self.shares.lerp_(torch.stack(shares) / images, 1 - KEPT)
        self.certainty.lerp_(certainty / images, 1 - KEPT)
        self.seen.zero_()

    def state_dict(self) -> dict[str, Any]:
        return attributes(self, "average", "first_answers", "certainty", "shares")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first_answers = state["first_answers"]
        self.average = {name: value.clone().to(self.weights[name]) for name, value in state["average"].items()}
        self.certainty = state["certainty"].clone().to(self.device)
        self.shares = state["shares"].clone().to(self.device)
