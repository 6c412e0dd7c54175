"""What a fine-tuning run settles before it trains. config.yaml, adapter files and results.json are written from it."""

from dataclasses import dataclass
from typing import Any

import torch

from toolkit import config
from toolkit.run.options import FINE_TUNING_SECTIONS, FineTuneOptions

YAML_SECTIONS = {title: section for title, section in FINE_TUNING_SECTIONS.items() if title in config.SECTIONS}


@dataclass(frozen=True)
class Plan:
    """What options leave open, settled by the machine, the checkpoint and the images."""

    device: torch.device
    dtype: torch.dtype  # of products, by autocast
    precision: str  # by which this dtype was chosen; auto on a GPU
    image_values: dict[str, Any]  # by name of the option: bands, scale, mean, std, normalise
    normalization: dict[str, Any]  # of each channel, as transforms take it: see `bands.settle`
    learning_rate: float
    arithmetic: str  # of products with frozen weights: float, or int8 where that is faster
    norms: str  # frozen, follow, train; auto where no BatchNorm can follow

    def settings(self, args: FineTuneOptions) -> dict[str, dict[str, Any]]:
        """The options, with what is settled, in the sections of a YAML file that repeats the run."""
        settings = config.stored_sections(YAML_SECTIONS, args)
        settings["data"] |= {name: config.stored(value) for name, value in self.image_values.items()}
        settled = ("learning_rate", "precision", "arithmetic", "norms")
        settings["finetune"] |= {name: getattr(self, name) for name in settled}
        return settings
