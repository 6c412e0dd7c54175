"""Checkpoints: tensors are matched exactly, whoever made the file, and everything else is one clear error.

tests/test_layouts.py has the layouts of the projects that write such files.
"""

import math

import pytest
import torch
from torch import nn

from tests.checkpoint_files import under, without_head
from tests.run_folders import assert_same
from toolkit import InputError
from toolkit.models import checkpoints
from toolkit.models.backbones import build_backbone, record_of
from toolkit.models.checkpoints import load_backbone, tensor_digest

pytestmark = pytest.mark.usefixtures("small_backbones")


@pytest.fixture(autouse=True)
def no_candidates(monkeypatch):
    """Which models of timm a file could be of takes seconds, and is told in tests/test_timm.py."""
    monkeypatch.setattr(checkpoints, "MOST_CANDIDATES", 0)


def test_the_heads_that_this_toolkit_s_pretraining_states_are_the_model_s(saved):
    tensors = under("encoder_q.", build_backbone("vit_mini", 2, heads=6).state_dict())
    _, report = load_backbone(saved({"model": tensors, "config": {"heads": 6}}), num_classes=2)
    assert (report["arch"], report["heads"]) == ("vit_mini", 6)


@pytest.mark.parametrize("arch", ["resnet50", "vit_mini", "vit_conv_small"])
def test_arch_is_found_by_shapes_alone(arch, saved):
    _, report = load_backbone(saved(build_backbone(arch, 2).state_dict()), num_classes=2)
    assert report["arch"] == arch


FORMS = {
    "PyTorch's first format, of the official v1 and v2": (lambda r: r, {"_use_new_zipfile_serialization": False}),
    "no counters, of old PyTorch": (lambda r: {k: v for k, v in r.items() if "num_batches" not in k}, {}),
    "half precision, counters too": (lambda r: {k: v.half() for k, v in r.items()}, {}),
    "a BatchNorm that never trained": (lambda r: r | {"bn1.weight": torch.ones(1).expand(16)}, {}),
    "other things beside the weights": (lambda r: {"state_dict": r, "dtype": torch.float16}, {}),
    "words that make no sense": (lambda r: {"state_dict": r, "arch": "unheard of", "epoch": "last"}, {}),
    "lists in the place of words": (lambda r: {"state_dict": r, "arch": ["resnet18"], "epoch": [3]}, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_the_same_tensors(form, narrow, saved):
    build, options = FORMS[form]
    content = build(narrow)
    model, report = load_backbone(saved(content, **options), num_classes=2)
    assert (report["arch"], report["epoch"]) == ("resnet18", None)
    loaded = model.state_dict()
    for name, tensor in narrow.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], content.get(name, tensor).to(tensor.dtype)), name


def test_torchvisions_own_vits_under_their_first_names(saved):
    """Those of the files that torchvision publishes, which it maps itself when it loads them."""
    state = build_backbone("vit_mini", 10).state_dict()
    first = {}
    for key, value in state.items():
        first[key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2.")] = value
    assert len(first.keys() - state.keys()) == 4 * 2
    model, report = load_backbone(saved(first), num_classes=2)
    assert (report["arch"], report["family"]) == ("vit_mini", "torchvision")
    assert_same(without_head(state), model.state_dict())


def test_a_digest_tells_dtype_shape_and_values_and_not_how_they_lie():
    image = torch.arange(24.0).reshape(1, 2, 3, 4)
    expected = tensor_digest(image)
    assert tensor_digest(nn.Parameter(image.contiguous(memory_format=torch.channels_last))) == expected
    assert tensor_digest(torch.arange(9)[::2]) == tensor_digest(torch.tensor([0, 2, 4, 6, 8]))
    others = (image.double(), image.reshape(1, 2, 4, 3), image + 1, image.int().view(torch.float32))
    assert len({expected, *map(tensor_digest, others)}) == 5


def test_a_position_embedding_is_interpolated_for_another_size_and_its_digest_stays_the_file_s(saved):
    """Interpolation rounds differently on other CPUs."""
    state = without_head(build_backbone("vit_mini", 2).state_dict())
    ramp = torch.linspace(0, 1, 4)[:, None, None].expand(4, 4, 192).reshape(16, 192)  # from top to bottom
    state["encoder.pos_embedding"] = torch.cat([torch.full((1, 192), 5.0), ramp])[None]
    path = saved(state)
    for size in (32, 64):
        model, report = load_backbone(path, num_classes=2, image_size=size)
        assert record_of(model).base_digests == {name: tensor_digest(value) for name, value in state.items()}
    positions = model.encoder.pos_embedding
    assert report["image_size"] == model.image_size == 64
    assert (positions[:, 0] == 5).all()  # the class token's
    column = positions[0, 1:].reshape(8, 8, 192)[:, 3, 7]
    torch.testing.assert_close(column, torch.linspace(0, 1, 8), rtol=0, atol=0.1)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2)


NO_SQUARE = {name: torch.zeros(shape) for name, shape in checkpoints._shapes("vit_mini")}
NO_SQUARE["encoder.pos_embedding"] = torch.zeros(1, 16, 192)
BAD_CONTENTS = {
    "zero match: a prefix nobody knows": (lambda r: under("model.encoder.", r), "belongs to a known backbone"),
    "only the key encoder": (lambda r: under("module.encoder_k.", r), "belongs to a known backbone"),
    "only a head beside the encoder": (lambda r: {"encoder_q.fc.weight": torch.zeros(2)}, "known backbone"),
    "module prefix on a part only": (lambda r: r | {"module.bn1.weight": r["bn1.weight"]}, "not expected: module.bn1"),
    "the same tensor twice": (lambda r: r | {"0.weight": r["conv1.weight"]}, "twice"),
    "diverged": (lambda r: r | {"bn1.bias": torch.full((16,), math.nan)}, "NaN.*bn1.bias; use an earlier epoch"),
    "integers for weights": (lambda r: r | {"bn1.bias": torch.zeros(16, dtype=torch.long)}, "not real.*bn1.bias"),
    "8-bit floats": (lambda r: r | {"bn1.bias": torch.zeros(16).to(torch.float8_e5m2)}, "bn1.bias.*float8_e5m2"),
    "sparse weights": (lambda r: r | {"bn1.bias": torch.zeros(16).to_sparse()}, "bn1.bias.*sparse_coo"),
    "weights without numbers": (lambda r: r | {"bn1.bias": torch.zeros(16, device="meta")}, "bn1.bias.*meta"),
    "a tensor": (lambda r: torch.zeros(3), "holds a Tensor"),
    "nothing": (lambda r: {}, "no state_dict"),
    "only settings": (lambda r: {"epoch": 3, "arch": "resnet18"}, "epoch, arch hold no tensors"),
    "keys that are not names": (lambda r: {1: torch.zeros(3)}, "1 hold no tensors"),
    "a name with control codes": (lambda r: r | {"a\n\x1b[2J": torch.zeros(1)}, r"a\\n\\x1b"),
    "no kernel to be fitted to other channels": (lambda r: r | {"conv1.weight": torch.zeros(16)}, r"\(16, 5, 7, 7\)"),
    "positions of no square": (lambda _: NO_SQUARE, r"pos_embedding \(1, 16, 192\) instead of"),
    "positions of no square for another size": (lambda _: NO_SQUARE, r"pos_embedding \(1, 16, 192\) instead of"),
    "another arch": (lambda r: r, "not hold a resnet50.*like resnet18: give the --checkpoint of a resnet50"),
    "another kind of arch": (lambda r: r, "does not hold a vit_mini: 0 of its.*looks like resnet18"),
    "a wrong word": (lambda r: {"arch": "resnet34", "state_dict": r}, "not hold a resnet34.*looks like resnet18"),
}
OPTIONS = {
    "positions of no square for another size": {"image_size": 64},
    "no kernel to be fitted to other channels": {"channels": 5, "channel_fit": "timm"},
    "another arch": {"arch": "resnet50"},
    "another kind of arch": {"arch": "vit_mini"},
}


@pytest.mark.parametrize("case", BAD_CONTENTS)
def test_a_content_that_is_no_backbone_is_one_clear_line(case, narrow, saved):
    build, complaint = BAD_CONTENTS[case]
    with pytest.raises(InputError, match=complaint) as raised:
        load_backbone(saved(build(narrow)), num_classes=2, **OPTIONS.get(case, {}))
    assert "checkpoint.pth" in str(raised.value)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 900


def test_missing_surplus_and_misshapen_tensors_are_all_named(narrow, saved):
    content = narrow | {"extra.weight": torch.zeros(1), "bn1.bias": torch.zeros(3)}
    del content["layer4.1.conv2.weight"]
    known = r"118 of its 120 backbone tensors match; 1 missing: layer4\.1\.conv2\.weight; 1 not expected: extra\.weight"
    with pytest.raises(InputError, match=rf"{known}; 1 of another shape: bn1\.bias \(3,\) instead of \(16,\)$"):
        load_backbone(saved(content), num_classes=2)
