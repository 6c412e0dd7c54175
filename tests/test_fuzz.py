"""Mutated, truncated and invented files: the toolkit's own error or success, and a model that is whole or untouched.

The few examples of a normal run are always the same. A longer search with new ones:

    FUZZ_EXAMPLES=3000 python -m pytest -n 0 tests/test_fuzz.py
"""

import argparse
import contextlib
import copy
import io
import itertools
import math
import os
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from finetune_lora import add_lora_to_model, make_parser, read_options
from lora_utils import LoRAManager
from moco import pretrain
from tests.checkpoint_files import rezipped, torch_file
from tests.image_files import bytes_of, geotags, write
from toolkit import InputError, config
from toolkit.files import read_checkpoint
from toolkit.images import bands
from toolkit.images.folders import ImageFiles
from toolkit.models import backbones, checkpoints

LONG = int(os.environ.get("FUZZ_EXAMPLES", 0))

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*torch.jit")


def fuzz(examples: int, **strategies):
    """So many examples; more, and new ones each time, where FUZZ_EXAMPLES asks for them. A hang fails the deadline."""
    how = {"derandomize": not LONG, "database": None, "deadline": 20_000, "suppress_health_check": list(HealthCheck)}
    return lambda test: settings(max_examples=LONG or examples, **how)(given(**strategies)(test))


@contextlib.contextmanager
def only_our_error():
    """Lets an InputError of one printable line pass; anything else is a failure of the test."""
    try:
        yield
    except InputError as error:
        assert str(error) and str(error).isprintable(), error


# --------------------------------------------------------------------------------------- the bytes, and what reads them


def mutate(data: bytes, edits: list[tuple[float, bytes, int]], kept: float) -> bytes:
    """Overwrites, inserts or deletes a few bytes, then cuts the end off."""
    data = bytearray(data)
    for place, new, replaced in edits:
        start = int(place * len(data))
        data[start : start + replaced] = new
    return bytes(data[: math.ceil(kept * len(data))])


PLACES = st.floats(0, 1, exclude_max=True)
EDITS = st.lists(st.tuples(PLACES, st.binary(max_size=6), st.integers(0, 6)), max_size=3)
KEPT = st.one_of(st.just(1.0), st.floats(0, 1))


def mutate_pickle(zipped: bytes, edits, kept: float) -> bytes:
    """A pickle in a sound zip is changed behind its checksums, as by an attacker."""
    return rezipped(zipped, lambda name, data: mutate(data, edits, kept) if name.endswith("data.pkl") else data)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    parts = {"body": nn.Linear(4, 5), "norm": nn.BatchNorm1d(5), "fc": nn.Linear(5, 3)}
    return add_lora_to_model(nn.Sequential(OrderedDict(parts)), r=2, target_modules=["body"])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """Files of a few kB by name: checkpoints of both formats with every kind of content that is read, adapters of
    `small_model`, and images of three bands, with geotags where there is a place for them."""
    tifffile = pytest.importorskip("tifffile")
    content = {"args": argparse.Namespace(schedule=[120, 160], lr=0.03), "best_acc1": np.float64(1.5), "epoch": 3}
    content["model"] = OrderedDict({"encoder_q.conv1.weight": torch.randn(4, 3), "queue": torch.randn(2, 2)})
    folder = tmp_path_factory.mktemp("files")
    for suffix in ("pth", "safetensors"):
        about = {"class_names": ["a", "b", "c"], "nested": {"lr": 1e-4}}
        LoRAManager(small_model()).save_lora_checkpoint(folder / f"adapter.{suffix}", about)
    levels = np.arange(3 * 64, dtype=np.uint16).reshape(8, 8, 3)
    how = {"photometric": "minisblack", "planarconfig": "contig", "extratags": geotags()}
    return {
        "checkpoint.pth": torch_file(content),
        "legacy checkpoint.pth": torch_file(content, zipped=False),
        **{path.name: path.read_bytes() for path in folder.iterdir()},
        "image.tif": bytes_of(tifffile.imwrite, levels, **how),
        "image.npy": bytes_of(np.save, levels),
        "image.npz": bytes_of(np.savez, levels),
    }


def read_as_checkpoint(path: Path) -> None:
    with only_our_error():
        read_checkpoint(path)
    with pytest.raises(InputError) as raised:  # no mutation makes a whole backbone of it
        checkpoints.load_backbone(path, num_classes=2)
    assert str(raised.value).isprintable()


def read_as_image(path: Path) -> None:
    with only_our_error():
        image = ImageFiles(path.parent, [path.name], bands.Bands(3))[0]
        assert image.shape[2] == 3 and np.isfinite(image).all()


def whole_state(model: nn.Module):
    """Every bit of a model, and what it is made of."""
    bits = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    kinds = [(name, type(module), module.training) for name, module in model.named_modules()]
    return bits, kinds, repr(model), LoRAManager(model).get_lora_info()


def read_as_adapter(path: Path) -> None:
    model = small_model()
    before = whole_state(model)
    try:
        LoRAManager(model).load_lora_checkpoint(path)
    except InputError as error:
        assert str(error).isprintable()
        assert whole_state(model) == before
    else:
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
        assert whole_state(model)[1] == before[1]


READ = {"checkpoint": read_as_checkpoint, "adapter": read_as_adapter, "image": read_as_image}
PICKLES = ("checkpoint.pth", "adapter.pth")
NAMES = (*PICKLES, "legacy checkpoint.pth", "adapter.safetensors", "image.tif", "image.npy", "image.npz")
MUTATED = [*itertools.product(NAMES, [mutate]), *itertools.product(PICKLES, [mutate_pickle])]


@pytest.mark.parametrize(("name", "mutate"), MUTATED)
@pytest.mark.filterwarnings("ignore")
@fuzz(30, edits=EDITS, kept=KEPT)
def test_bytes_of_a_file(files, tmp_path_factory, name, mutate, edits, kept):
    path = write(tmp_path_factory.getbasetemp() / name, mutate(files[name], edits, kept))
    READ[path.stem.split()[-1]](path)


# ------------------------------------------------------------------------------------------------------- what they hold

# What stands where something else was expected.
NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, -1, 2**31, 2**63]))
PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=4,
)
TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.lists(st.integers(0, 6), max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.half, torch.long, torch.uint8, torch.bool]),
    st.sampled_from([0.0, 1.0, 1e4, math.nan, math.inf]),
)


def edited(content: dict, changes) -> dict:
    """A copy with some entries replaced, renamed or removed. A change: where (0 to 1), what, the new value."""
    content = copy.deepcopy(content)
    for place, kind, value in changes:
        entries = []
        folders = [content]
        for folder in folders:  # which grows
            entries += [(folder, key) for key in folder]
            folders += [inner for inner in folder.values() if isinstance(inner, dict)]
        if not entries:
            break
        parent, key = entries[int(place * len(entries))]
        old = parent.pop(key)
        if kind == "replace":
            parent[key] = value
        elif kind == "rename":
            parent[value if isinstance(value, str | int | float | bool | None) else "renamed"] = old
    return content


KINDS = st.sampled_from(["replace", "rename", "remove"])
CHANGES = st.lists(st.tuples(PLACES, KINDS, st.one_of(PLAIN, TENSORS)), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def pretrained() -> dict:
    """What stage 1 writes."""
    state = backbones.build_backbone("vit_mini", 1, 16).state_dict()
    model = {f"encoder_q.{name}": tensor for name, tensor in state.items() if not name.startswith("heads")}
    images = {"mean": [0.0] * 3, "std": [1.0] * 3, "channels": 3, "bands": [], "scale": 2.0, "show_bands": [1]}
    about = {"epoch": 3, "config": {"image_size": 16, "seed": 0}, "normalization": images}
    return {"arch": "vit_mini", **about, "model": model}


@fuzz(8, changes=CHANGES)
def test_content_of_a_checkpoint(pretrained, tmp_path_factory, changes):
    path = write(tmp_path_factory.getbasetemp() / "edited.pth", torch_file(edited(pretrained, changes)))
    with warnings.catch_warnings(), only_our_error():
        warnings.simplefilter("ignore")
        model, _ = checkpoints.load_backbone(path, num_classes=2)
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
        bands.known_scaling(bands.Scaling(), *checkpoints.find_images(path), path)


@fuzz(40, changes=CHANGES)
def test_content_of_an_adapter(files, tmp_path_factory, changes):
    content = torch.load(io.BytesIO(files["adapter.pth"]), weights_only=True)
    path = write(tmp_path_factory.getbasetemp() / "edited.pth", torch_file(edited(content, changes)))
    read_as_adapter(path)


# ------------------------------------------------------------------------------------------------ configs and arguments


CONFIGS = [path.read_bytes() for path in sorted(Path(__file__).parents[1].glob("configs/*.yaml"))]
KEYS = [action.dest for parser in (make_parser(), pretrain.make_parser()) for action in parser._actions]
SECTIONS = st.dictionaries(
    st.one_of(st.sampled_from(["model", "data", "moco", "finetune"]), st.text(max_size=5)),
    st.one_of(PLAIN, st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=5)), PLAIN, max_size=4)),
    max_size=3,
)
CONFIG_FILES = st.one_of(
    st.builds(mutate, st.sampled_from(CONFIGS), EDITS, KEPT),
    st.binary(max_size=40),
    SECTIONS.map(lambda sections: yaml.safe_dump(sections, allow_unicode=True).encode(errors="replace")),
)


@fuzz(40, content=CONFIG_FILES)
def test_a_config_of_anything(tmp_path_factory, content):
    """Both scripts read it or name what is wrong, a line for each problem."""
    path = write(tmp_path_factory.getbasetemp() / "anything.yaml", content)
    for read in (read_options, lambda argv: config.parse_args(pretrain.make_parser(), argv)):
        try:
            read(["--config", str(path), "--device", "cpu"])
        except InputError as error:
            assert str(error) and all(line.isprintable() for line in str(error).split("\n")), error
