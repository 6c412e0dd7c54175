"""Answers of a model over a loader, features, k-NN, and BatchNorm statistics for both."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit import NO_LABEL, devices, distributed, temporarily
from toolkit.answers import measures
from toolkit.models import backbones, norms

Loss = Callable[[Tensor, Tensor], Tensor]  # of outputs and targets, summed over images
NEIGHBOURS = 20
NEIGHBOUR_TEMPERATURE = 0.07  # as in 1805.01978
QUERIES_AT_ONCE = 1_024


def training_norms(model: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm that takes statistics of the batch in training."""
    return [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and not norms.is_frozen(norm)]


def computed(function: Callable[[Tensor], Any], images: Tensor, device: torch.device, dtype: torch.dtype) -> Any:
    with devices.autocast(device, dtype):
        return function(devices.to_device(images, device))


def no_labels(like: Tensor) -> Tensor:
    """Labels or targets that no loss counts, for images that stand in for missing ones."""
    return torch.full_like(like, torch.nan if like.is_floating_point() else NO_LABEL)


def eval_mode(model: nn.Module) -> contextlib.AbstractContextManager:
    """Within this block the model is in eval mode. Afterwards each module is in its mode of before."""
    return temporarily(model.modules(), training=False)


@torch.no_grad()
def estimate_statistics(model: nn.Module, loader: Iterable, device: torch.device, dtype: torch.dtype) -> None:
    """Set the statistics of each BatchNorm that trains to the mean over a loader (arXiv 2105.07576, section 3)."""
    norms = training_norms(model)
    with eval_mode(model), temporarily(norms, momentum=None):  # the mean over all batches
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        for images, _ in loader:
            computed(model, images, device, dtype)


@torch.no_grad()
def worst_batch_loss(model: nn.Module, loader: Iterable, device: torch.device, dtype: torch.dtype, loss: Loss) -> float:
    """The highest mean loss of a loader's batches, each normalised by its own statistics, noisy as they are."""
    losses = []
    model.train()
    for images, labels in loader:
        total = loss(computed(model, images, device, dtype).float(), devices.to_device(labels, device)).item()
        total, number = distributed.all_sum(total, len(labels))
        losses.append(total / number)
    return max(losses)


@torch.no_grad()
def over_loader(model: nn.Module, loader: Iterable, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The outputs of a model for a loader, of all processes, in float32, and the targets, both on `device`."""
    outputs = []
    targets = []
    with eval_mode(model):
        for images, its_targets in loader:
            outputs.append(computed(model, images, device, dtype).float())
            targets.append(devices.to_device(its_targets, device))
    return distributed.interleave(torch.cat(outputs)), distributed.interleave(torch.cat(targets))


def overlaid(loader: Iterable) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader with each image mixed half and half with another of its batch (arXiv 1710.09412)."""
    for images, targets in loader:
        yield (images + images.flip(0)) / 2, targets


def extract_features(
    model: nn.Module, loader: Iterable, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The features that the head of `model` receives, float32 (N, D), and labels (N,), both on `device`."""
    return over_loader(backbones.headless(model), loader, device, dtype)


def all_outputs(model: nn.Module, loader: Iterable, device: torch.device, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """The outputs of a model, float32 (N, K), and the targets, both on the CPU."""
    outputs, targets = over_loader(model, loader, device, dtype)
    return outputs.cpu(), targets.cpu()


def knn_accuracy(train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor) -> float:
    """The accuracy (0 to 1) of a vote of nearest neighbours, by features (N, D) and labels (N,) (1805.01978, 3.4)."""
    train = F.normalize(train_features.float(), dim=1)
    classes = int(train_labels.max()) + 1
    answers = []
    for queries in features.float().split(QUERIES_AT_ONCE):
        similarity = F.normalize(queries, dim=1) @ train.T  # (B, N)
        similarity, neighbours = similarity.topk(min(NEIGHBOURS, len(train)), dim=1)  # (B, k)
        votes = similarity.new_zeros(len(queries), classes)
        votes.scatter_add_(1, train_labels[neighbours], (similarity / NEIGHBOUR_TEMPERATURE).exp())
        answers.append(votes.argmax(1))
    return int((torch.cat(answers) == labels).sum()) / len(labels)


class Evaluation(NamedTuple):
    """The result of `evaluate`."""

    loss: float  # mean cross-entropy
    accuracy: float  # 0 to 1
    predictions: Tensor  # (N,), class indices
    labels: Tensor  # (N,)
    confidences: Tensor  # (N,), probability of the predicted class

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "Evaluation":
        """Of logits (N, K) and labels (N,), on the CPU."""
        confidences, predictions = logits.softmax(1).max(1)
        accuracy = (predictions == labels).float().mean().item()
        return cls(F.cross_entropy(logits, labels).item(), accuracy, predictions, labels, confidences)

    def reliability(self) -> Tensor:
        return measures.calibration(self.confidences, self.predictions == self.labels)

    @property
    def score(self) -> float:
        return self.accuracy

    @property
    def targets(self) -> Tensor:
        return self.labels

    def measured(self) -> dict[str, float]:
        means = self.weighted(torch.ones(1, len(self.labels)))
        return {"accuracy": self.accuracy} | {name: mean.item() for name, mean in means.items()}

    def weighted(self, weights: Tensor) -> dict[str, Tensor]:
        """The means over classes, (n,), by weights of images (n, N): there is a better interval of the accuracy."""
        classes = int(torch.cat([self.labels, self.predictions]).max()) + 1
        hits = self.labels.where(self.labels == self.predictions, classes)  # a class more, which is left out
        sums = torch.zeros(len(weights), classes + 1, dtype=torch.float64)
        counts = [sums.index_add(1, of, weights.double()) for of in (hits, self.labels, self.predictions)]
        right, images, answers = torch.stack(counts)[..., :-1]
        f1 = 2 * right / (images + answers)
        return {"balanced_accuracy": (right / images).nanmean(1), "macro_f1": f1.nanmean(1)}


def evaluate(model: nn.Module, loader: Iterable, device: torch.device, dtype=torch.float32) -> Evaluation:
    """Loss, accuracy and predictions of a classifier over a loader."""
    return Evaluation.of(*all_outputs(model, loader, device, dtype))
