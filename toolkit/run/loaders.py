"""The loaders of a fine-tuning run: which images it reads for what, and in which views."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from toolkit import choices, devices, distributed
from toolkit.answers import evaluation, tasks
from toolkit.images import bands, cache, data, masks
from toolkit.images.data import LabelledImages, Remembered, Transformed, build_loader
from toolkit.images.sources import Splits, load_splits
from toolkit.images.transforms import TwoCrops
from toolkit.run import guard, options, runs, teacher, training

LEAST_STEPS = 12  # of an epoch, which passes over few images until it has them
STATISTICS_IMAGES = 512  # the most training images from which BatchNorm's statistics are estimated
NORMS_IMAGES = 512  # the most training images of a probe that says whose statistics norms begin with
FOLLOWED_IMAGES = 256  # the most training images by which BatchNorms follow adapters
CALIBRATION_IMAGES = 5_000  # the most training images by which thresholds and the temperature are chosen
PROBED_VIEWS = 512  # of few training images together, at the most; and MOST_VIEWS of each
MOST_VIEWS = 8
ANSWERED_PIXELS = 128 * 64**2  # of a batch that is only answered: small images wait for the weights, not for memory


def load_images(args: options.FineTuneOptions, read: bands.Bands | None) -> Splits:
    """The training and the evaluation images, with their labels or masks."""
    reader = None
    if args.task in choices.PER_PIXEL:
        reader = masks.MaskReader(masks.read_classes(args.classes), args.unknown_value)
    where = options.image_sources(args, read)
    splits = load_splits(**where, labels_per_class=args.labels_per_class, seed=args.seed, masks=reader)
    data.keep_decoded(splits.train, splits.val, splits.unlabelled)
    return splits


def steps_of_epoch(args: options.FineTuneOptions, images: Splits) -> int:
    """The optimizer steps of an epoch: of one pass over the training images, or LEAST_STEPS."""
    steps = -(-len(images.train) // (args.batch_size * args.accumulation_steps))
    return max(steps, LEAST_STEPS)


def probed_views(images: int) -> int:
    """How many augmented views of each image a probe is fitted to: of few images one view is a matter of chance."""
    return min(MOST_VIEWS, max(1, PROBED_VIEWS // images))


class Loaders:
    """The images of a run, their views in images of `image_size` pixels, and what reads them."""

    def __init__(self, args: options.FineTuneOptions, plan: options.Plan, splits: Splits, image_size: int, meter):
        self.args = args
        self.device = plan.device
        self.meter = meter
        self.images = splits
        self.image_size = image_size
        views = splits.train.views(image_size, args.augmentation, **plan.normalization)
        self.augmentation, self.strong_view, self.plain_view, self.eval_transform = views
        self.answered_at_once = args.batch_size
        if not splits.train.of_any_size:
            self.answered_at_once = max(args.batch_size, min(128, ANSWERED_PIXELS // image_size**2))

    @torch.no_grad()
    def cache_features(self, lower: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        """`--cache-features`: run the frozen blocks, `lower` in eval mode, once on each image and view."""

        def features(loader: DataLoader) -> Iterator[Tensor]:
            for batch, _ in runs.progress_bar(loader, "blocks below"):
                yield evaluation.computed(lower, batch, self.device, dtype)

        def cached(images: LabelledImages, views: int) -> LabelledImages:
            plain = self.add_loader(images, self.plain_view)
            augmented = self.add_loader(images, self.augmentation, seed=self.args.seed)
            loaders = [plain, *[augmented] * views]  # each pass draws new views
            return cache.cache_features(images, list(map(features, loaders)), plain.batch_sampler.batch_size)

        views = 0 if self.args.augmentation == "none" else cache.CACHED_VIEWS
        self.images = self.images._replace(train=cached(self.images.train, views), val=cached(self.images.val, 0))
        self.eval_transform = self.plain_view = cache.plain_view
        self.augmentation = cache.drawn_view
        self.args = replace(self.args, workers=0)  # there is nothing to decode

    def open(self, norms_train: bool, teaches: bool = False) -> None:
        """Make the loaders. With `teaches` images without labels may train: each batch has as many as of others."""
        if norms_train:  # each process needs some images of a batch
            self.answered_at_once = self.args.batch_size
        self.val = self.add_loader(self.images.val, self.eval_transform, keep_workers=True)
        if not self.images.val.of_any_size:
            self.val = Remembered(self.val)
        loading = {"shuffle": True, "seed": self.args.seed, "batch_size": self.args.batch_size, "keep_workers": True}
        self.unlabelled: DataLoader | None = None
        steps = steps_of_epoch(self.args, self.images)
        before_last = (steps - 1) * self.args.batch_size * self.args.accumulation_steps
        teaches = teaches and self.images.unlabelled is not None and teacher.enough_labels(self.images)
        if teaches or before_last >= len(self.images.train):  # one pass over the images has fewer steps
            loading["batches"] = steps * self.args.accumulation_steps
        elif norms_train:
            loading["drop_last"] = self.has_small_rest(self.images.train, self.args.batch_size)
        if teaches:
            loading["batch_size"] = max(1, self.args.batch_size // 2)
            self.drawing = dict(loading)
            self.take_unlabelled([*range(len(self.images.unlabelled))])
        self.train = self.add_loader(self.images.train, self.augmentation, **loading)
        some = self.images.train.at_most(guard.WATCHED_VIEWS)
        self.watched_images = some.subset([*range(len(some))] * (guard.WATCHED_VIEWS // len(some)))
        self.statistics: Remembered | None = None
        if norms_train:
            self.watched_images = self.without_small_rest(self.watched_images)
            some = self.without_small_rest(self.images.train.at_most(STATISTICS_IMAGES))
            self.statistics = self.add_same_views(some, self.plain_view)
        self.watched = self.add_same_views(self.watched_images, self.augmentation)
        # They calibrate the head, and start it unless there are more training images.
        some = self.images.train.at_most(CALIBRATION_IMAGES)
        varies = self.args.augmentation != "none" and tasks.TASKS[self.args.task].probed_in_views
        views = probed_views(len(some)) if varies else 1
        seed = self.args.seed
        if views > 1:  # other views than the guard's: training would seem to harm a head that was fitted to these
            seed += 1
        repeated = some.subset([*range(len(some))] * views)
        self.augmented = Remembered(self.add_loader(repeated, self.augmentation, seed=seed))

    def take_unlabelled(self, places: list[int]) -> None:
        """Of the images without labels go on with those at these places alone."""
        self.taken = places
        images = self.images.unlabelled.subset(places)
        images.labels = list(range(len(images)))
        self.images = self.images._replace(unlabelled=images)
        self.unlabelled = self.add_loader(images, TwoCrops(self.strong_view, self.augmentation), **self.drawing)

    def unlabelled_views(self, places: Tensor) -> Remembered:
        """A loader of the images without labels at these places, as they are."""
        return self.add_same_views(self.images.unlabelled.subset(places.numpy()), self.plain_view)

    def has_small_rest(self, images: LabelledImages, batch_size: int) -> bool:
        """Would the last batch be too small for BatchNorm: of one image, or of fewer than there are processes?"""
        return len(images) > batch_size and 0 < len(images) % batch_size < max(2, distributed.world_size())

    def without_small_rest(self, images: LabelledImages) -> LabelledImages:
        batch_size = data.fixed_order_batch(self.args.batch_size)
        whole = len(images) // batch_size * batch_size
        return images.subset(range(whole)) if self.has_small_rest(images, batch_size) else images

    def add_loader(self, images: LabelledImages, transform: Callable, **loading: Any) -> DataLoader:
        """A loader that answers in large batches and is read once, unless `loading` says otherwise."""
        loading = {"batch_size": self.answered_at_once, "keep_workers": False} | loading
        loading |= {"workers": self.args.workers, "device": self.device, "collate": images.collate}
        if transform is self.eval_transform and images.of_any_size and images.source.largest > self.image_size**2:
            loading["batch_size"] = 1  # a whole image may have thousands of pixels along each side
        return build_loader(Transformed(images, transform), **loading)

    def add_same_views(self, images: LabelledImages, transform: Callable) -> Remembered:
        return Remembered(self.add_loader(images, transform, seed=self.args.seed))

    def steps(self, epoch: int, start: int = 0) -> Iterator[training.MicroBatches]:
        """The optimizer steps of an epoch (1 is the first), from `start` on; the last may have fewer batches."""
        together = self.args.accumulation_steps
        sampler = self.train.batch_sampler
        first_batch = start * together
        loaders = [self.train] if self.unlabelled is None else [self.train, self.unlabelled]
        for loader in loaders:
            loader.batch_sampler.epoch = epoch - 1
            loader.batch_sampler.start = first_batch
        batches = self.train if self.unlabelled is None else self.with_unlabelled()
        shares = (  # an image stands in for a missing share
            (images, labels if sampler.has_share(number) else evaluation.no_labels(labels), *unlabelled)
            for number, (images, labels, *unlabelled) in enumerate(self.meter.timed(batches), first_batch)
        )
        for first in range(first_batch, len(sampler), together):
            number = min(together, len(sampler) - first)
            images = min(number * sampler.batch_size, sampler.drawn - first * sampler.batch_size)
            is_last = first + number == len(sampler)
            yield training.MicroBatches(itertools.islice(shares, number), number, images, is_last)

    def with_unlabelled(self) -> Iterator[tuple[Tensor, ...]]:
        """Batches of images with strong views of others behind them; labels; weak views of the others, and places."""
        for (images, labels), ((strong, weak), places) in zip(self.train, self.unlabelled, strict=True):
            yield torch.cat([images, strong]), labels, weak, places

    def followed_batches(self) -> Iterator[Tensor]:
        """Batches of training images on the device, the same in each process, by which BatchNorms follow adapters."""
        some = self.images.train.at_most(FOLLOWED_IMAGES)
        seeded = list(enumerate(range(len(some))))  # views for `Transformed`: a resumed run's are to be the same
        views = Transformed(some, self.plain_view)
        loader = DataLoader(views, self.args.batch_size, sampler=seeded, generator=torch.Generator())
        return (devices.to_device(images, self.device).float() for images, _ in loader)  # cached in 16 bits, maybe

    @property
    def probe_images(self) -> LabelledImages:
        """The training images for k-NN and the linear probe."""
        return self.images.train.at_most(self.images.train.most_probed)

    def features(self, network: nn.Module, task: tasks.Task, dtype: torch.dtype, to_evaluate=True) -> tasks.Features:
        """Features of `probe_images`, and of what else there is; of evaluation images only if there is to evaluate."""
        train = self.probe_images
        loaders = {"training_images": self.add_loader(train, self.plain_view)}
        if to_evaluate and not train.of_any_size:  # whose scores are of whole images
            loaders["evaluation_images"] = self.val
        if self.args.head_init == "probe":
            loaders["augmented_views"] = self.augmented
            if train.of_any_size or len(train) > CALIBRATION_IMAGES:
                loaders["augmented_views"] = self.add_loader(train, self.augmentation)
        if (without := self.images.unlabelled) is not None:
            loaders["images_without_labels"] = self.add_loader(without, self.plain_view)
        found = {}
        for what, loader in loaders.items():
            bar = runs.progress_bar(loader, f"features: {what.replace('_', ' ')}")
            found[what] = task.features(network, bar, self.device, dtype, len(train))
        return tasks.Features(**found)
