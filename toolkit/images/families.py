"""The scale, mean and std with which published checkpoints were pretrained, by their names."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from toolkit import InputError, printable
from toolkit.images.scaling import Scaling


class Family(NamedTuple):
    """Values of `--scale`, `--mean` and `--std` for a family of checkpoints."""

    channels: tuple[int, ...]  # the numbers of channels that its networks have
    scale: float | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    file: str  # a regular expression for the names of its published files; empty if the names do not tell
    source: str  # where the values are published


_GEO = "torchgeo, models/resnet.py"
FAMILIES = {
    "ssl4eo-s12": Family((3, 13), 10000.0, (0.0,), (1.0,), r"sentinel2_(all|rgb)_moco|^B(13|3)_(rn|vit)\w+_moco", _GEO),
    "ssl4eo-s12-radar": Family(
        (2,), 1.0, (-12.59, -20.26), (5.26, 5.91), r"sentinel1_(all|grd)_moco|^B2_(rn|vit)\w+_moco", _GEO
    ),
    "ssl4eo-l": Family((6, 7, 9, 11), 255.0, (0.0,), (1.0,), r"landsat_\w+_moco", _GEO),
    "cem500k": Family((1,), 255.0, (0.57287007,), (0.12740536,), r"cem500k", "cem-dataset, mocov2_config.yaml"),
    "moco-cxr": Family((3,), None, (0.502,), (0.085585,), "", "MoCo-CXR, by its aug_setting"),
    # Their 2% quantiles of bytes of B4, B3, B2, then ImageNet's mean and std. What is beyond the quantiles is not cut.
    "seco": Family(
        (3,),
        10000.0,
        (0.245353, 0.188455, 0.147098),
        (0.115847, 0.088722, 0.075),
        r"sentinel2_rgb_seco-|^seco_resnet\d+_1(00k|m)|^resnet\d+_(moco|seco|teco|caco)_geo_",
        "torchgeo, models/resnet.py; SeCo's and CACo's seco_dataset.py",
    ),
}


def known_scaling(given: Scaling, channels: int, metadata: Mapping[str, Any], file: str | Path | None) -> Scaling:
    """The values of the checkpoint's pretraining, which are printed, where the options give none; else `given`.

    `metadata` are the file's, as `bands.recorded` writes them, and its `arch`. InputError if they are damaged, or if
    the family that `given.normalise` names is for other `channels`.
    """
    if given.normalise in FAMILIES:
        expected = FAMILIES[given.normalise].channels
        if channels not in expected:
            takes = f"is for {', '.join(map(str, expected))} channels, and the network takes {channels}"
            raise InputError(f"--normalise {given.normalise} {takes}: give --scale, --mean and --std instead")
        return _of_family(given.normalise, given.bands, "")
    if file is None or any((given.mean, given.std, given.normalise)):
        return given
    if metadata:  # its mean and std hold after any scale that brings files to the same units
        return _as_recorded(given, channels, metadata, file)
    if given.scale is not None:
        return given
    file_name = Path(file).name
    for name, family in FAMILIES.items():
        if family.file and channels in family.channels and re.search(family.file, file_name):
            return _of_family(name, given.bands, f", which the name of {printable(file_name)} says: else give --scale")
    return given


def _of_family(name: str, bands: Sequence[str] | None, reason: str) -> Scaling:
    family = FAMILIES[name]
    # Wrong units are this field's commonest silent error: whatever is taken is printed.
    print(f"images: the scale, mean and std of {name} ({family.source}){reason}")
    return Scaling(family.scale, list(family.mean), list(family.std), bands)


def _as_recorded(given: Scaling, channels: int, metadata: Mapping[str, Any], file: str | Path) -> Scaling:
    from toolkit.images.bands import from_metadata  # here: they load PyTorch, and FAMILIES are names of an option
    from toolkit.models.backbones import normalization

    try:
        values = from_metadata(dict(metadata))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    bands = values.pop("bands")
    if channels != len(values["mean"]) or (bands is None and values == normalization(metadata["arch"])):
        return given
    found = given._replace(mean=list(values["mean"]), std=list(values["std"]))
    if bands is not None:
        found = found._replace(scale=given.scale or bands.scale, bands=given.bands or list(bands.chosen) or None)
    taken = "mean, std and bands" if given.scale else "scale, mean, std and bands"
    print(f"images: {taken} as in the pretraining, which {printable(Path(file).name)} says")
    return found
