"""What the options say of the numbers in image files."""

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
