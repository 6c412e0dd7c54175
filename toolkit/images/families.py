"""The scale, mean and std with which published checkpoints were pretrained.

A checkpoint may state them itself, as those of this toolkit's stage 1 and CEM500K do. Otherwise the name of a published
file tells its family, or `--normalise` names the family. Wrong units are this field's commonest silent error, so
whatever values are taken are printed.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import InputError, printable
from toolkit.images.bands import from_metadata
from toolkit.models.backbones import normalization


@dataclass(frozen=True)
class Family:
    """Values of `--scale`, `--mean` and `--std` for a family of checkpoints.

    Args:
        channels: the numbers of channels that its networks have.
        file: a regular expression for the names of its published files; empty if the names do not tell.
        source: where the values are published.
    """

    channels: tuple[int, ...]
    scale: float | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    file: str
    source: str


_TORCHGEO = "torchgeo, models/resnet.py"
FAMILIES = {
    "ssl4eo-s12": Family(
        (3, 13), 10000.0, (0.0,), (1.0,), r"sentinel2_(all|rgb)_moco|^B(13|3)_(rn|vit)\w+_moco", _TORCHGEO
    ),
    "ssl4eo-s12-radar": Family(
        (2,), 1.0, (-12.59, -20.26), (5.26, 5.91), r"sentinel1_(all|grd)_moco|^B2_(rn|vit)\w+_moco", _TORCHGEO
    ),
    "ssl4eo-l": Family((6, 7, 9, 11), 255.0, (0.0,), (1.0,), r"landsat_\w+_moco", _TORCHGEO),
    "cem500k": Family((1,), 255.0, (0.57287007,), (0.12740536,), r"cem500k", "cem-dataset, mocov2_config.yaml"),
    "moco-cxr": Family((3,), None, (0.502,), (0.085585,), "", "MoCo-CXR, by its aug_setting"),
}
_GIVEN = ("scale", "mean", "std", "normalise")


def take_known_values(
    args: argparse.Namespace, channels: int, metadata: Mapping[str, Any], file: str | Path | None
) -> None:
    """Fill in the values of the checkpoint's pretraining where the options give none, and print them.

    Args:
        args: `scale`, `mean`, `std` and `bands` are filled in. They also replace a family's name in `normalise`.
        channels: the network's.
        metadata: the file's, as `toolkit.images.bands.recorded` writes them, and its `arch`; empty if it has none.
        file: the checkpoint or adapter file, whose name may tell its family.

    Raises:
        InputError: the family that `normalise` names is for other channels, or the metadata are damaged.
    """
    if args.normalise in FAMILIES:
        family = FAMILIES[args.normalise]
        if channels not in family.channels:
            counts = ", ".join(map(str, family.channels))
            raise InputError(
                f"--normalise {args.normalise} is for images of {counts} channels, and the network takes {channels}: "
                "give --scale, --mean and --std instead"
            )
        _take_family(args, args.normalise, "")
        args.normalise = None
        return
    if file is None or any(getattr(args, name) is not None for name in _GIVEN):
        return
    if metadata:
        _take_recorded(args, channels, metadata, file)
        return
    file_name = Path(file).name
    for name, family in FAMILIES.items():
        if family.file and channels in family.channels and re.search(family.file, file_name):
            _take_family(args, name, f", which the name of {printable(file_name)} says: else give --scale")
            return


def _take_family(args: argparse.Namespace, name: str, reason: str) -> None:
    family = FAMILIES[name]
    args.scale = family.scale
    args.mean = list(family.mean)
    args.std = list(family.std)
    print(f"images: the scale, mean and std of {name} ({family.source}){reason}")


def _take_recorded(args: argparse.Namespace, channels: int, metadata: Mapping[str, Any], file: str | Path) -> None:
    try:
        values = from_metadata(dict(metadata))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    bands = values["bands"]
    usual = normalization(metadata["arch"])
    are_usual = bands is None and (values["mean"], values["std"]) == (usual["mean"], usual["std"])
    recorded_channels = 3 if bands is None else bands.channels
    if are_usual or channels != recorded_channels:
        return
    args.mean = list(values["mean"])
    args.std = list(values["std"])
    if bands is not None:
        args.scale = bands.scale
        args.bands = args.bands or list(bands.chosen) or None
    print(f"images: scale, mean, std and bands as in the pretraining, which {printable(Path(file).name)} says")
