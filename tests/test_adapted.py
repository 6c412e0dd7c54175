"""The settings of an adapter, and what each kind of adapted layer offers to the rest of the toolkit.

Which layers are chosen is tested on whole models, in test_injection.py.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from finetune_lora import LoRALinear, QLoRALinear, QLoRAMultiheadAttention
from lora.adapted import ADAPTED, LoRASettings, kind_named, stock_class
from lora.adapter_set import LayerState
from toolkit import InputError


def test_settings_of_any_kind_of_number():
    """They may come from NumPy; the layer stores what an adapter file can hold."""
    stored = vars(LoRASettings(np.int64(4), np.float32(6), 0, 1))
    assert [type(value) for value in stored.values()] == [int, float, float, bool]
    assert list(stored.values()) == [4, 6, 0, True]


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


STOCK = {
    "linear": lambda: nn.Linear(8, 6),
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "attention": lambda: nn.MultiheadAttention(8, 2),
}


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize(
    "four_bits, dtype, bits", [(False, None, 32), (False, torch.bfloat16, 16), (False, torch.int8, 8), (True, None, 4)]
)
def test_the_bits_of_the_base(kind, four_bits, dtype, bits):
    """Merged or not, with an adapter or without; a merged weight whose adapter is gone is a float's."""
    bits = 32 if (kind, bits) == ("conv", 8) else bits  # no convolution is stored in 8 bits
    for settings in (LoRASettings(), None):
        stock = STOCK[kind]()
        layer = ADAPTED[type(stock)][four_bits].adapt(stock, settings, dtype)
        state = LayerState.of(layer)
        assert layer.base_bits == state.base_bits == state.without_adapter().base_bits == bits
        layer.merge()
        assert layer.base_bits == bits
        layer.remove_lora(merge=True)
        assert LayerState.of(layer).base_bits == 32


def test_the_table_knows_kinds_by_name_and_what_they_adapt():
    class Mine(LoRALinear):
        """A user's own kind."""

    assert kind_named("QLoRALinear") is QLoRALinear and kind_named("Linear") is None
    assert stock_class(Mine) is stock_class(QLoRALinear) is nn.Linear
    assert stock_class(QLoRAMultiheadAttention) is nn.MultiheadAttention
    projection = type(nn.MultiheadAttention(8, 2).out_proj)  # a subclass of nn.Linear
    assert stock_class(projection) is projection is not nn.Linear
