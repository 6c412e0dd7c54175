"""benchmarks/model_zoo.py on its smallest models: adapters are exact, and a layer that is not used is told."""

import functools
import importlib.util
import json
from pathlib import Path

import pytest
from torch import nn

from benchmarks import model_zoo
from toolkit import InputError

FAST = [
    *("timm:vit_tiny_patch16_224", "timm:eva02_tiny_patch14_224", "timm:resnet18", "timm:mobilenetv3_small_050"),
    *("timm:convnext_atto", "torchvision:resnet18", "torchvision:mobilenet_v3_small", "torchvision:squeezenet1_1"),
    *("transformers:ViT", "transformers:Beit", "transformers:Swin", "transformers:Swinv2", "transformers:ConvNext"),
    "transformers:Segformer",
]


@pytest.mark.parametrize("name", FAST)
def test_adapters_are_exact(name):
    library = name.split(":")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    result = model_zoo.check(name)
    assert model_zoo.is_exact(result) and result["layers"] > 10


def test_an_adapter_that_does_nothing_is_no_exact_model(monkeypatch):
    class ReadsWeight(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.called = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            return self.called(x.mean(2).flatten(1) @ self.read.weight)

    monkeypatch.setattr(model_zoo, "build", lambda name: (ReadsWeight().double().eval(), 8))
    result = model_zoo.check("some")
    assert result["unused"] == ["read"] and result["output"] > 1e-3 and result["gradients"] >= 1
    assert not model_zoo.is_exact(result)
    with pytest.raises(RuntimeError, match="1 of 1 models are not exact: torchvision:resnet18"):
        model_zoo.main(["--only", "torchvision:resnet18"])


def test_the_table_has_as_many_models_as_it_says(capsys):
    libraries = [name.split(":")[0] for name in model_zoo.MODELS]
    assert libraries.count("timm") >= 40
    assert libraries.count("torchvision") >= 15
    assert libraries.count("transformers") >= 8
    model_zoo.main(["--only", "torchvision:squeezenet1_1"])
    assert "| torchvision:squeezenet1_1 | 25 of 26 |" in capsys.readouterr().out
    with pytest.raises(InputError, match="timm:nothing is none of the models"):
        model_zoo.main(["--only", "timm:nothing"])


def test_the_committed_table_is_that_of_all_models_and_exact():
    results = json.loads((Path(model_zoo.__file__).parent / "results/model_zoo.json").read_text())["models"]
    assert list(results) == model_zoo.MODELS and all(map(model_zoo.is_exact, results.values()))


def test_switching_is_timed_for_both_kinds_of_base(tmp_path, monkeypatch, capsys):
    small = functools.partial(model_zoo.switching, "vit_mini", count=2, rounds=4)
    monkeypatch.setattr(model_zoo, "switching", small)
    result = model_zoo.main(["--switching", "--output-dir", str(tmp_path)])
    assert result == json.loads((tmp_path / "switching.json").read_text()) and set(result["switching"]) == {
        "float", "4 bits"
    }  # fmt: skip
    assert "2 adapters of" in capsys.readouterr().out
