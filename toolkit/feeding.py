"""What a fine-tuning run reads: its images, what augments them, what of them is cached, and their loaders."""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from toolkit import collapse, data, distributed, runs, training
from toolkit.cache import CachedFeatures, cache_features, cache_images, drawn_view, plain_view
from toolkit.data import LabelledImages, LoadingMeter, Splits, Transformed, build_loader
from toolkit.transforms import eval_transform, train_transform

STATISTICS_IMAGES = 512  # at most so many training images give BatchNorm its statistics
THRESHOLD_IMAGES = 5_000  # at most so many training images choose the thresholds of labels
KNN_IMAGES = 10_000  # at most so many training images vote on the accuracy before training, and make the probe


class Feed:
    """The images of a run, and the loaders by which it reads them.

    Args:
        args: the options.
        splits: the training and the evaluation images.
        image_size: pixels.
        device: where the batches go.
        loaders: a list to which it adds its own.
        meter: watches the loading of training images.
        cached: `images` of another run on the same splits, with all that it has cached.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        splits: Splits,
        image_size: int,
        device: torch.device,
        loaders: list[DataLoader],
        meter: LoadingMeter,
        cached: Splits | None = None,
    ):
        self.args, self.device, self.loaders, self.meter = args, device, loaders, meter
        self.eval_transform = eval_transform(image_size, **args.normalization)
        self.augmentation = train_transform(image_size, args.augmentation, crop_min=args.crop_min, **args.normalization)
        self.images = cached or splits._replace(train=cache_images(splits.train, args.cache_images, image_size))

    def cache_features(self, lower: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        """`--cache-features`: compute what the blocks below those that train make of each image and view, once.

        Args:
            lower: those blocks, in eval mode.
        """

        def features(loader: DataLoader) -> Iterator[Tensor]:
            bar = runs.progress_bar(loader, "blocks below")
            yield from training.map_batches(lower, (batch for batch, _ in bar), self.device, dtype)

        def kept(images: LabelledImages, views: int = 0) -> CachedFeatures:
            if isinstance(images, CachedFeatures):
                return images
            loaders = [self.add_loader(images, self.eval_transform, keep_workers=False)]
            # Each pass over a loader has other views than the one before.
            loaders += [self.add_loader(images, self.augmentation, seed=self.args.seed, keep_workers=False)] * views
            size, where = loaders[0].batch_sampler.batch_size, self.args.cache_features
            return cache_features(images, [features(loader) for loader in loaders], size, where)

        train = kept(self.images.train, self.args.cached_views or 0)
        self.images = self.images._replace(train=train, val=kept(self.images.val))
        self.eval_transform, self.augmentation = plain_view, drawn_view

    def add_loaders(self, norms_train: bool) -> None:
        """Make the loaders: for training, for evaluation, for the collapse guard, and for statistics of BatchNorm.

        Args:
            norms_train: some BatchNorm takes statistics of its batch, so that each process needs an image of it, and
                one image alone cannot be normalised.
        """
        self.val_loader = self.add_loader(self.images.val, self.eval_transform)
        drops_last = norms_train and self.has_small_rest(self.images.train, self.args.batch_size)
        shuffling = {"shuffle": True, "seed": self.args.seed, "drop_last": drops_last}
        self.train_loader = self.add_loader(self.images.train, self.augmentation, **shuffling)
        self.watched = collapse.watched_images(self.images.train)
        if norms_train:
            self.watched = self.without_small_rest(self.watched)
        seeded = {"seed": self.args.seed, "keep_workers": False}
        self.watched_loader = self.add_loader(self.watched, self.augmentation, **seeded)
        self.statistics_loader = None
        if norms_train:
            some = self.without_small_rest(self.images.train.at_most(STATISTICS_IMAGES))
            self.statistics_loader = self.add_loader(some, self.eval_transform, keep_workers=False)

    def has_small_rest(self, images: LabelledImages, batch_size: int) -> bool:
        """Do batches leave over images that BatchNorm cannot normalise: one, or fewer than there are processes?"""
        return len(images) > batch_size and 0 < len(images) % batch_size < max(2, distributed.world_size())

    def without_small_rest(self, images: LabelledImages) -> LabelledImages:
        batch_size = data.fixed_order_batch(self.args.batch_size)
        if not self.has_small_rest(images, batch_size):
            return images
        return images.subset(range(len(images) // batch_size * batch_size))

    def add_loader(self, images: LabelledImages, transform: Callable, **loading: Any) -> DataLoader:
        # Copying what is kept pays in other processes only beside a GPU, and only forked ones share it.
        idle = isinstance(images, CachedFeatures) and not (self.device.type == "cuda" and sys.platform == "linux")
        workers = 0 if idle else self.args.workers
        loading |= {"batch_size": self.args.batch_size, "workers": workers, "device": self.device}
        self.loaders.append(build_loader(Transformed(images, transform), **loading))
        return self.loaders[-1]

    def steps(self, epoch: int, start: int = 0) -> Iterator[training.MicroBatches]:
        """The batches of each optimizer step of an epoch (1 is the first), from step `start` on."""
        return training.micro_batches(self.train_loader, self.meter, epoch, start, self.args.accumulation_steps)

    def first_steps(self, images: int) -> Iterator[training.MicroBatches]:
        """The first steps of the first epoch, with at least so many images, if there are as many."""
        number = math.ceil(images / (self.args.batch_size * self.args.accumulation_steps))
        return itertools.islice(self.steps(epoch=1), number)

    def watched_views(self) -> DataLoader:
        """The augmented views of training images that the collapse guard sees: the same ones each time."""
        self.watched_loader.batch_sampler.epoch = 0
        return self.watched_loader

    def threshold_views(self) -> DataLoader:
        """Augmented views of training images, by which thresholds of labels are chosen."""
        some = self.images.train.at_most(THRESHOLD_IMAGES)
        return self.add_loader(some, self.augmentation, seed=self.args.seed, keep_workers=False)

    def features(self, network: nn.Module, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Features (N, D) and labels (N,) of training and evaluation images; for a probe, of training views as well."""
        train, views = self.images.train.at_most(KNN_IMAGES), [self.eval_transform]
        views += [self.augmentation] if self.args.head_init == "probe" else []
        bank, *augmented = [self.add_loader(train, view, keep_workers=False) for view in views]
        bars = (runs.progress_bar(loader, "features") for loader in (bank, self.val_loader, *augmented))
        return [training.extract_features(network, bar, self.device, dtype) for bar in bars]
