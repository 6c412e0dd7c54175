"""What the options, or the names of published checkpoints, say of the numbers in image files."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from toolkit import InputError, listed
from toolkit.models.names import check_channels


class Scaling(NamedTuple):
    """What the options, or a checkpoint, say of the numbers in image files; None where they say nothing."""

    scale: float | None = None  # by which all values are divided
    mean: Sequence[float] | None = None  # of each channel after that, or one number for all; as std
    std: Sequence[float] | None = None
    bands: Sequence[str] | None = None  # that become the channels, as for `Bands`
    normalise: str | None = None  # 'data' to measure mean and std, or the name of a family of checkpoints


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


def split_names(entries: Iterable[str] | None) -> list[str] | None:
    """The names of bands typed as `4,3,2` or `4 3 2`."""
    return entries and list(filter(None, ",".join(entries).split(",")))


def option_problems(scaling: Scaling, channels: int | None) -> Iterator[str]:
    """The contradictions among the options of the channels, one line each."""
    if scaling.normalise == "data" and (scaling.mean or scaling.std):
        yield "--normalise data with --mean or --std: what is measured is not given; drop one of them"
    elif scaling.normalise not in (None, "data") and (scaling.mean or scaling.std or scaling.scale):
        yield f"--normalise {scaling.normalise} brings its own --scale, --mean and --std: drop one of them"
    if bool(scaling.mean) != bool(scaling.std):
        yield "--mean and --std belong together: give both, one number or one for each channel"
    if names := [band for band in scaling.bands or () if not band.isdecimal()]:
        yield f"--bands {listed(names)}: give numbers from 1, or 0 for zeros; a file has all bands, stacked"
    if min(scaling.std or (1.0,)) <= 0:
        yield "--std: a standard deviation is above 0"
    if channels is not None:
        try:
            check_channels(channels)
        except InputError as error:
            yield f"--channels: {error}"
