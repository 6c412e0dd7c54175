"""The settings of an adapter. Which layers are chosen is tested on whole models, in test_injection.py."""

import dataclasses
import math

import numpy as np
import pytest

from lora.targets import LoRASettings
from toolkit import InputError


def test_scaling():
    """alpha / r, or alpha / sqrt(r) (rank-stabilised, arXiv 2312.03732)."""
    assert LoRASettings() == LoRASettings(8, 16, 0, False)
    assert LoRASettings(4, 16).scaling == 4
    assert LoRASettings(4, 16, use_rslora=True).scaling == 8


def test_settings_of_any_kind_of_number():
    """They come from NumPy as well; what is kept is what an adapter file can hold."""
    kept = vars(LoRASettings(np.int64(4), np.float32(6), 0, 1))
    assert [type(value) for value in kept.values()] == [int, float, float, bool]
    assert list(kept.values()) == [4, 6, 0, True]


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("r", [0, -1, True, 2.0, "8", None]),
        ("lora_alpha", [0, -16, "16", math.inf, math.nan, None]),
        ("lora_dropout", [-0.1, 1, 1.5, math.nan, "0", None]),
    ],
)
def test_impossible_settings(name, wrong):
    for value in wrong:
        with pytest.raises(InputError, match=f"^{name} is {value!r}; give"):
            LoRASettings(**{name: value})
    with pytest.raises(InputError, match=r"r is 0.*; lora_alpha is 0.*; lora_dropout is 1"):
        LoRASettings(0, 0, 1)


def test_settings_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoRASettings().r = 4
