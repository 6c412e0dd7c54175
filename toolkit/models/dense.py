"""A class for every pixel: the maps of a backbone, a linear head over all of them, and images that are read in windows.

The head is linear in the features of a pixel from several stages, each enlarged to the finest. A 1x1 product and
bilinear enlargement commute, so each stage's answers are enlarged and added, and no wide map is ever made.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet, VisionTransformer

from toolkit import InputError, temporarily
from toolkit.models.backbones import head_name

MAPS = 4  # that the head reads of a ViT's blocks; of a network with stages it reads all
OVERLAP = 0.25  # of a window with the next, as a share of its side
WINDOWS_AT_ONCE = 8


class DenseHead(nn.Module):
    """Maps (N, D_i, h_i, w_i) -> logits (N, K, h, w) of the finest map's size."""

    def __init__(self, widths: Sequence[int], classes: int):
        super().__init__()
        self.widths = list(widths)
        self.linear = nn.Linear(sum(widths), classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        logits = self.linear.bias[:, None, None]
        for features, weight in zip(maps, self.linear.weight.split(self.widths, 1), strict=True):
            logits = logits + enlarged(F.conv2d(features, weight[..., None, None]), finest(maps))
        return logits


class DenseModel(nn.Module):
    """A backbone, which loses its head, answers for every pixel: images (N, C, S, S) -> logits (N, K, S, S)."""

    def __init__(self, backbone: nn.Module, classes: int, image_size: int, channels: int = 3):
        super().__init__()
        backbone.set_submodule(head_name(backbone), nn.Identity())
        if hasattr(backbone, "prune_intermediate_layers"):  # timm's: what comes after the last map goes
            backbone.prune_intermediate_layers(_read(backbone), prune_norm=False, prune_head=True)
        self.backbone = backbone
        with torch.no_grad(), temporarily(backbone.modules(), training=False):
            maps = feature_maps(backbone, torch.zeros(1, channels, image_size, image_size))
        self.window = image_size
        self.head = DenseHead([features.shape[1] for features in maps], classes)

    def forward(self, images: Tensor) -> Tensor:
        return enlarged(self.head(feature_maps(self.backbone, images)).float(), images.shape[2:])


def finest(maps: Sequence[Tensor]) -> tuple[int, int]:
    """Height and width of the largest map."""
    return max(maps, key=lambda features: math.prod(features.shape[2:])).shape[2:]


def enlarged(features: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (N, D, h, w) at another size, bilinearly."""
    if not torch.compiler.is_compiling() and tuple(features.shape[2:]) == tuple(size):  # open sizes are not compared
        return features
    return F.interpolate(features, size=tuple(size), mode="bilinear")


def feature_maps(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """Images (N, C, H, W) -> maps (N, D, h, w): of a ResNet's first layer and stages, or of some blocks of a ViT."""
    maps = []
    if isinstance(backbone, ResNet):
        is_fused = hasattr(backbone, "first_layer")  # with adapters, in which BatchNorm is folded
        x = backbone.first_layer(images) if is_fused else backbone.bn1(backbone.conv1(images))
        maps.append(backbone.relu(x))
        x = backbone.maxpool(maps[0])
        for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
            x = stage(x)
            maps.append(x)
        return maps
    if isinstance(backbone, VisionTransformer):
        grid = (images.shape[2] // backbone.patch_size, images.shape[3] // backbone.patch_size)
        x = backbone._process_input(images)
        x = torch.cat([backbone.class_token.expand(x.shape[0], -1, -1), x], dim=1)  # (N, 1 + patches, D)
        encoder = backbone.encoder
        x = encoder.dropout(x + encoder.pos_embedding)
        read = _spread(len(encoder.layers))
        for number, block in enumerate(encoder.layers):
            x = block(x)
            if number in read:
                maps.append(encoder.ln(x)[:, 1:].transpose(1, 2).unflatten(2, grid))
        return maps
    if hasattr(backbone, "forward_intermediates"):  # timm's
        return backbone.forward_intermediates(images, indices=_read(backbone), norm=True, intermediates_only=True)
    remedy = "take a ResNet, a ViT, or one of timm's models that has forward_intermediates"
    raise InputError(f"a {type(backbone).__name__} has no maps for a class of every pixel: {remedy}")


def _read(backbone: nn.Module) -> list[int]:
    """Which of the maps of a model of timm are read: of all its stages, or of some of its many blocks."""
    number = len(backbone.feature_info)
    has_stages = len({info["reduction"] for info in backbone.feature_info}) > 1
    if number > 2 * MAPS:
        return _spread(number)
    return list(range(number)) if has_stages else list(range(number))[-MAPS:]


def _spread(blocks: int) -> list[int]:
    """The numbers of MAPS blocks, evenly spaced up to the last."""
    return [round(blocks * (i + 1) / MAPS) - 1 for i in range(MAPS)]


def features_at(maps: Sequence[Tensor], points: Tensor) -> Tensor:
    """The features (P, D) of pixels of an image with maps (1, D_i, h_i, w_i), by their centres (P, 2), x, y, 0 to 1."""
    grid = (2 * points - 1)[None, :, None]  # (1, P, 1, 2)
    taken = []
    for features in maps:  # one at a time: all of them, enlarged, would be the peak of memory
        whole = enlarged(features, finest(maps)).float()
        # The interpolation of `enlarged`: at the border the outermost cells count alone.
        taken.append(F.grid_sample(whole, grid, mode="bilinear", padding_mode="border", align_corners=False))
    return torch.cat(taken, 1)[0, :, :, 0].T


def window_starts(length: int, size: int) -> list[int]:
    """Where windows of a size begin that cover a side, evenly spaced; the last one ends where the side does."""
    if length <= size:
        return [0]
    number = math.ceil((length - size) / (size - round(OVERLAP * size))) + 1
    return [round(i * (length - size) / (number - 1)) for i in range(number)]


def answers_by_rows(read: Callable, height: int, width: int, size: int, answer: Callable) -> Iterator[Tensor]:
    """The logits (K, rows, width) for an image of any size, from its top downwards. Memory grows with its width alone.

    `read` gives rows of the normalised image, (C, last - first, width). `answer` maps windows (n, C, size, size) to
    logits (n, K, size, size), of which the weighted mean is taken where windows overlap, on their device.
    """
    tops = window_starts(height, size)
    lefts = window_starts(width, size)
    side = torch.sin(torch.pi * (torch.arange(size) + 0.5) / size)
    weights = side[:, None] * side  # how much a window counts at each of its pixels: less towards its borders
    sums = None
    for top, end in zip(tops, [*tops[1:], height], strict=True):
        band = read(top, min(top + size, height))
        missing = (0, max(0, size - width), 0, max(0, size - height))
        band = F.pad(band[None], missing, mode="replicate")[0]  # a small image's border is repeated
        for first in range(0, len(lefts), WINDOWS_AT_ONCE):
            some = lefts[first : first + WINDOWS_AT_ONCE]
            logits = answer(torch.stack([band[:, :, left : left + size] for left in some])).float()
            if sums is None:
                weights = weights.to(logits.device)
                sums = logits.new_zeros(logits.shape[1], size, band.shape[2])
                counts = logits.new_zeros(size, band.shape[2])
            for left, window in zip(some, logits, strict=True):
                sums[:, :, left : left + size] += window * weights
                counts[:, left : left + size] += weights
        done = end - top
        yield (sums[:, :done] / counts[:done])[:, :, :width]
        sums = F.pad(sums[:, done:], (0, 0, 0, done))
        counts = F.pad(counts[done:], (0, 0, 0, done))


def answers_for(image: Tensor, size: int, answer: Callable[[Tensor], Tensor]) -> Tensor:
    """The logits (K, H, W) for an image (C, H, W) of any size: see `answers_by_rows`."""
    return torch.cat(list(answers_by_rows(lambda first, last: image[:, first:last], *image.shape[1:], size, answer)), 1)
