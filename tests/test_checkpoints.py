"""Checkpoints of MoCo's authors and of others who pretrain with it load bit for bit; all else is one clear error.

Most files are built here, with random numbers, from the names that these projects give to tensors.
"""

import argparse
import itertools
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import deploy_lora
from finetune_lora import add_lora_to_model, load_finetuned
from lora_utils import LoRAManager, read_adapter_file
from tests.checkpoint_files import sequential, timm_vit, under, without_head
from tests.run_folders import assert_same
from toolkit import InputError
from toolkit.files import ForeignObject, read_checkpoint
from toolkit.models import checkpoints
from toolkit.models.backbones import build_backbone, record_of
from toolkit.models.checkpoints import load_backbone, load_contrast, tensor_digest

pytestmark = pytest.mark.usefixtures("small_backbones")


@pytest.fixture(autouse=True)
def no_candidates(monkeypatch):
    """Which models of timm a file could be of takes seconds, and is told in tests/test_timm.py."""
    monkeypatch.setattr(checkpoints, "MOST_CANDIDATES", 0)


def of_mmpretrain(tensors):
    """A ViT of timm's under mmpretrain's names."""
    places = [(r"^norm\.", "ln1."), (r"\.norm", ".ln"), ("^blocks", "layers"), ("embed.proj", "embed.projection")]
    for pattern, replacement in (*places, ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1")):
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    return tensors


@pytest.fixture(scope="module")
def vit():
    """The state_dict of a ViT-S under timm's names, with MoCo v3's fixed position embedding: nothing at the class."""
    return timm_vit({"patch_embed.proj.weight": (384, 3, 16, 16), "patch_embed.proj.bias": (384,)})


class Layout(NamedTuple):
    """What a project's file has where. Of a momentum encoder nobody should look at the tensors."""

    family: str
    encoder: str = ""  # the prefix of its tensors
    momentum: str = ""
    heads: str = ""  # names of MLPs
    others: Mapping | tuple = ()  # other tensors
    names: Callable = dict  # renames those of the encoder
    wrapper: str = ""  # before every name
    place: str = "state_dict"
    around: Mapping | tuple = ()

    def file(self, tensors):
        state = under(self.encoder, self.names(tensors)) | dict(self.others)
        for head in self.heads.split():
            state |= {f"{head}.0.weight": torch.randn(4, 4), f"{head}.2.weight": torch.randn(4, 4)}
        if self.momentum:
            state |= under(self.momentum, dict.fromkeys(self.names(tensors), torch.zeros(1)))
        content = under(self.wrapper, state)
        for key in reversed(self.place.split("/")):
            content = {key: content} if key else content
        return content | dict(self.around)


QUEUE = {"queue": torch.zeros(4, 8), "queue_ptr": torch.zeros(1, dtype=torch.long)}
BANK = {"criterion.memory_bank.bank": torch.zeros(4, 8)}
FC = {"fc.weight": torch.full((2, 40), 7.0), "fc.bias": torch.ones(2)}
V2 = ("encoder_q.", "encoder_k.")
V3 = ("base_encoder.", "momentum_encoder.")
MOCO = {"wrapper": "module.", "around": {"epoch": 200, "arch": "resnet18", "optimizer": {"state": {}}}}
OWN = "encoder_q.fc encoder_k.fc predictor"
LIGHTNING = {"epoch": 9, "global_step": 600, "pytorch-lightning_version": "2.5.0"}
LIGHTLY = ("lightly", "backbone.", "backbone_momentum.", "projection_head.layers projection_head_momentum.layers", BANK)
TORCHGEO = LIGHTNING | {"hyper_parameters": {"model": "resnet18", "in_channels": 3}}
SOLO_LEARN = ("backbone.", "momentum_backbone.", "projector momentum_projector classifier momentum_classifier")
STEPS = {"encoder_k.steps": torch.tensor(3), "data_preprocessor.mean": torch.zeros(3, 1, 1)}

RESNETS = {
    "MoCo v1": Layout("moco_v1", *V2, others=under("encoder_q.", FC) | QUEUE, **MOCO),
    "MoCo v2": Layout("moco_v2", *V2, "encoder_q.fc encoder_k.fc", QUEUE, **MOCO),
    "MoCo v3": Layout("moco_v3", *V3, "base_encoder.fc momentum_encoder.fc predictor", **MOCO),
    "MoCo's linear probe": Layout("linear_probe", others=FC, wrapper="module.", around={"best_acc1": np.float64(67.5)}),
    "this toolkit's own": Layout("moco_stage1", *V2, OWN, place="model", around={"config": {"image_size": 32}}),
    "torchvision": Layout("torchvision", others=FC, place=""),
    "lightly": Layout(*LIGHTLY, around={"epoch": 9}),
    "lightly, a ResNet as an nn.Sequential": Layout(*LIGHTLY, names=sequential, around={"epoch": 9}),
    "torchgeo's MoCo": Layout("torchgeo", *LIGHTLY[1:], around=TORCHGEO),
    "torchgeo's classifier": Layout("torchgeo", "model.", others=under("model.", FC), around=TORCHGEO),
    "another Lightning module": Layout("lightning", "model.", around=LIGHTNING),
    "SeCo": Layout("seco", *V2, "heads_q.0 heads_q.1 heads_k.0 heads_k.1", QUEUE, names=sequential, around=LIGHTNING),
    "solo-learn, MoCo v2+": Layout("solo_learn", *SOLO_LEARN, QUEUE, around=LIGHTNING),
    "solo-learn, its linear probe": Layout("solo_learn", "backbone.", heads="classifier", around=LIGHTNING),
    "solo-learn, its first releases": Layout("solo_learn", "encoder.", "momentum_encoder.", "projector", QUEUE),
    "mmpretrain, MoCo v2": Layout("mmpretrain", "backbone.", "encoder_k.module.0.", "neck.mlp", STEPS | QUEUE),
    "mmpretrain, its published backbone": Layout("mmpretrain", "backbone.", around={"meta": {}}),
    "VISSL": Layout("vissl", "_feature_blocks.", place="classy_state_dict/base_model/model/trunk"),
    "VISSL, extracted": Layout("vissl", "_feature_blocks.", place=""),
}
VERSIONS = {"MoCo v1": 2, "MoCo v2": 2, "MoCo v3": 3, "this toolkit's own": 3}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", RESNETS)
def test_a_resnet_comes_out_bit_for_bit_with_its_channels_and_only_from_moco_with_a_projector(case, narrow, saved):
    layout = RESNETS[case]
    tensors = narrow | {"conv1.weight": torch.randn(16, 13, 7, 7)}
    content = layout.file(tensors)
    path = saved(content)
    model, report = load_backbone(path, num_classes=2)
    assert (report["family"], report["arch"], report["heads"]) == (layout.family, "resnet18", None)
    assert (report["channels"], report["channel_fit"], report["epoch"]) == (13, None, content.get("epoch"))
    assert report["image_size"] == (32 if case == "this toolkit's own" else 224)
    in_file, _ = checkpoints._find_state_dict(path)
    assert set(report["loaded"]) == set(narrow)
    assert set(report["dropped"]) < set(in_file) and len(report["dropped"]) == len(in_file) - len(narrow)
    assert type(model) is torchvision.models.ResNet
    assert_same(tensors, model.state_dict())
    assert not (model.fc.weight == 7).any()  # fresh, though the file's would fit
    assert model(torch.randn(2, 13, 32, 32)).shape == (2, 2)

    version, parts = load_contrast(path)
    assert version == VERSIONS.get(case) and ("0.weight" in parts["predictor"]) == (version == 3)
    projector = {}
    for key, tensor in in_file.items():
        if version and (name := re.search(r"(encoder_q|base_encoder)\.fc\.(.*)", key)):
            projector[name[2]] = tensor
    assert bool(projector) == bool(version) and parts["projector"].keys() == projector.keys()
    assert_same(projector, parts["projector"])


OF_VIT = MOCO | {"around": {"epoch": 300, "arch": "vit_small", "scaler": {"scale": 65536.0}}}
MOCO_V3 = Layout("moco_v3", *V3, "base_encoder.head momentum_encoder.head predictor", **OF_VIT)
OF_TORCHGEO = LIGHTNING | {"hyper_parameters": {"model": "vit_small_patch16_224"}}
MOMENTUM = ("backbone.", "momentum_encoder.module.0.", "neck momentum_encoder.module.1 head.predictor")
MMPRETRAIN_V3 = Layout("mmpretrain", *MOMENTUM, names=of_mmpretrain, around={"meta": {}})
# Layout -> how its file is made, and its heads with a fixed and with a learned position embedding. Some are a guess.
VITS = {
    "torchgeo's MoCo": (Layout("torchgeo", *LIGHTLY[1:], around=OF_TORCHGEO), 6, 6),
    "solo-learn": (Layout("solo_learn", "backbone.", "momentum_backbone.", "projector predictor"), 12, 6),
    "mmpretrain": (MMPRETRAIN_V3, 12, 6),
    "mmpretrain, its backbone": (Layout("mmpretrain", "backbone.", names=of_mmpretrain), 12, 6),
    "mmpretrain, extracted": (Layout("mmpretrain", names=of_mmpretrain, place=""), 12, 6),
    "MoCo v3, SSL4EO-S12": (MOCO_V3, 12, 12),
    "timm's names, as torchgeo's weights": (Layout("deit", place=""), 12, 6),
    "DeiT-converted": (Layout("deit", place="model"), 12, 6),
    "another Lightning module": (Layout("lightning", "model.", around=LIGHTNING), 12, 12),
}
GUESSED = ("moco_v3", "deit", "lightning")
DEIT = Layout("deit", place="model")
COMPUTED = [(MOCO_V3, "vit_small", 12), (MOCO_V3, "vit_conv_small", 6), (DEIT, "vit_small", 6)]


@pytest.mark.parametrize("case", VITS)
def test_a_vit_comes_out_bit_for_bit_with_its_heads_and_guesses_are_told(case, vit, saved):
    layout, *expected = VITS[case]
    reference, _ = load_backbone(saved(vit, "timm.pth"), num_classes=2, heads=12)
    for tensors, heads in zip((vit, vit | {"pos_embed": vit["pos_embed"] + 1}), expected, strict=True):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model, report = load_backbone(saved(layout.file(tensors)), num_classes=2)
        assert (report["family"], report["arch"], report["heads"]) == (layout.family, "vit_small", heads)
        assert model.encoder.layers[0].self_attention.num_heads == heads
        assert torch.equal(model.state_dict().pop("encoder.pos_embedding"), tensors["pos_embed"])
        same = {n: t for n, t in model.state_dict().items() if not n.startswith(("heads.", "encoder.pos"))}
        assert_same(same, reference.state_dict())
        guesses = [f"{heads} is a guess"] if layout.family in GUESSED else []
        assert [re.search(r"\d+ is a guess", str(warning.message))[0] for warning in told] == guesses
        assert all("--heads" in str(warning.message) and "\n" not in str(warning.message) for warning in told)


def conv_stem():
    """MoCo v3's."""
    layers = []
    for narrow, wide in itertools.pairwise((3, 48, 96, 192, 384)):
        layers += [nn.Conv2d(narrow, wide, 3, 2, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(384, 384, 1))


@pytest.mark.parametrize("layout, arch, heads", [*COMPUTED, (RESNETS["MoCo's linear probe"], "vit_conv_small", 12)])
@pytest.mark.filterwarnings("error")  # nothing is guessed
def test_a_vit_computes_what_it_does_under_timm_s_names(layout, arch, heads, vit, saved):
    timm = pytest.importorskip("timm")
    tensors = vit
    if arch == "vit_conv_small":
        shapes = {f"patch_embed.proj.{name}": tensor.shape for name, tensor in conv_stem().state_dict().items()}
        tensors = timm_vit(shapes)
    model, report = load_backbone(saved(layout.file(tensors) | {"arch": arch}), num_classes=384, heads=heads)
    assert [report[key] for key in ("family", "arch", "image_size", "heads")] == [layout.family, arch, 224, heads]
    nn.init.eye_(model.heads.head.weight)  # the head hands on its input
    images = torch.randn(1, 3, 224, 224)
    found = [model.eval()(images)]
    for number in (heads, 18 - heads):
        plain = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=number, depth=2)
        if arch == "vit_conv_small":
            plain.patch_embed.proj = conv_stem()
        plain.load_state_dict(tensors)
        found.append(plain.eval()(images))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert (found[0] - found[2]).abs().max() > 0.02  # the comparison would see the other number of heads


@pytest.mark.filterwarnings("error")
def test_the_number_of_heads_is_what_a_file_or_its_name_says(vit, saved):
    stage1 = under("encoder_q.", build_backbone("vit_mini", 2, heads=6).state_dict())  # as this toolkit's states it
    _, report = load_backbone(saved({"model": stage1, "config": {"heads": 6}}), num_classes=2)
    assert (report["arch"], report["heads"]) == ("vit_mini", 6)
    # torchgeo's ViT-S has MoCo v3's positions, whose own has 12 heads, and a name of timm's, with 6.
    _, report = load_backbone(saved(vit, "vit_small_patch16_224_sentinel2_all_moco-67c9032d.pth"), num_classes=2)
    assert report["heads"] == 6
    with pytest.warns(UserWarning, match="12 is a guess"):  # whatever the name of a file in MoCo v3's own layout
        _, report = load_backbone(saved(MOCO_V3.file(vit), "moco_v3_vit_small_patch16.pth"), num_classes=2)
    assert report["heads"] == 12
    pytest.importorskip("timm")
    vit = without_head(build_backbone("timm:test_vit", 2).state_dict())
    model, report = load_backbone(saved(MMPRETRAIN_V3.file(vit)), num_classes=2, arch="timm:test_vit")
    assert report["heads"] is None
    assert_same(vit, model.state_dict())


@pytest.mark.usefixtures("few_images")
def test_the_adapter_file_keeps_the_heads_and_every_reader_builds_them(base, finetune, capsys):
    results = finetune(f"--checkpoint {base} --lora-rank 2 --target-modules mlp.0 --epochs 1 --heads 6")
    path = results["folder"] / "lora.pth"
    assert read_adapter_file(path)["metadata"]["heads"] == 6
    model, info = load_finetuned(path)
    assert model.encoder.layers[0].num_heads == info["heads"] == 6
    deploy_lora.main(["merge", str(path), "--output", str(path.with_name("merged.pth"))])
    assert "vit_mini with 6 heads and 3 classes" in capsys.readouterr().out
    plain = build_backbone("vit_mini", 3, 16, heads=6).eval()  # torchvision's own
    plain.load_state_dict(torch.load(path.with_name("merged.pth"), weights_only=True))
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
    other = add_lora_to_model(load_backbone(base, 3, heads=3)[0], r=2, target_modules="mlp.0")
    with pytest.raises(InputError, match=r"another base.*with as many heads"):
        LoRAManager(other).load_lora_checkpoint(path)


@pytest.mark.filterwarnings("error")
def test_adapter_files_of_a_vit_small_that_do_not_say_their_heads_have_12_in_silence(vit, saved):
    """As when they were trained: there was no other number then."""
    base = saved(vit | {"pos_embed": vit["pos_embed"] + 1}, "base.pth")  # of which one would now guess 6
    path = base.with_name("lora.pth")
    model, _ = load_backbone(base, 2, heads=12)
    manager = LoRAManager(add_lora_to_model(model, r=1, target_modules=["encoder_layer_1.mlp.0"]))
    about = {"arch": "vit_small", "class_names": ["a", "b"], "image_size": 224, "checkpoint": str(base)}
    for told in ({}, {"heads": None}, {"heads": 12}):
        manager.save_lora_checkpoint(path, about | told)
        assert load_finetuned(path)[0].encoder.layers[0].num_heads == 12
    for damaged in ("6", 0, -6, 7, True):
        manager.save_lora_checkpoint(path, about | {"heads": damaged})
        with pytest.raises(InputError, match="heads"):
            load_finetuned(path)


def test_moco_cxrs_densenet_needs_no_arch_and_without_timm_or_a_name_says_what_to_do(saved, monkeypatch):
    """Where timm is, tests/test_timm.py has what the message names."""
    pytest.importorskip("timm")
    tensors = torchvision.models.densenet121(num_classes=128).state_dict()
    content = {"epoch": 20, "state_dict": under("module.encoder_q.", tensors) | under("module.", QUEUE)}
    unnamed = saved(content, "unnamed.pth")
    named = saved(content | {"arch": "densenet121"})
    model, report = load_backbone(named, num_classes=128)
    assert (report["family"], report["arch"]) == ("moco_v1", "timm:densenet121")
    assert_same({name: tensors[name] for name in report["loaded"]}, model.state_dict())
    assert report["loaded"] == list(tensors)[:-2]  # all but the classifier's
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"none of its 725 tensors .*--arch timm:NAME"):
        load_backbone(unnamed, num_classes=2)
    with pytest.raises(InputError, match=r"densenet121 needs timm.*pip install timm"):
        load_backbone(named, num_classes=2)


class Buffer:
    """Like mmengine's HistoryBuffer: an array, and methods by name."""

    def __init__(self):
        self.history, self.methods = torch.arange(3.0).numpy(), {"mean": self.mean}

    def mean(self):
        raise AssertionError("code of the file has run")

    __setstate__ = mean


class Config(dict):
    """Like a hyper_parameters object of a class that is filled item by item, which is more than is read."""


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_beside_the_tensors_are_left_aside_and_run_nothing(legacy, narrow, saved):
    content = RESNETS["mmpretrain, MoCo v2"].file(narrow)
    content["message_hub"] = {"log_scalars": {"loss": Buffer()}, "runtime_info": {}}
    content["args"] = argparse.Namespace(lr=0.1)
    path = saved(content, _use_new_zipfile_serialization=not legacy)
    model, report = load_backbone(path, num_classes=2)
    assert report["family"] == "mmpretrain"
    assert_same(narrow, model.state_dict())
    assert read_checkpoint(path, objects=True)["args"].lr == 0.1  # plain data is read beside them
    read = read_checkpoint(path, objects=True)["message_hub"]["log_scalars"]["loss"]
    assert isinstance(read, ForeignObject) and vars(read) == {}
    with pytest.raises(InputError, match=rf"needs {__name__}\.Buffer.*weights_only=False"):
        read_checkpoint(path)  # as adapter files and runs are read


@pytest.mark.parametrize("arch", ["resnet50", "vit_mini", "vit_conv_small"])
def test_arch_is_found_by_shapes_alone(arch, saved):
    with torch.device("meta"):
        state = build_backbone(arch, 2).state_dict()
    path = saved({name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in state.items()})
    assert load_backbone(path, num_classes=2)[1]["arch"] == arch


def test_other_forms_of_the_same_tensors(narrow, saved):
    for content in (
        narrow,  # in PyTorch's first format, of the official v1 and v2
        {name: tensor for name, tensor in narrow.items() if "num_batches" not in name},  # of old PyTorch
        {name: tensor.half() for name, tensor in narrow.items()},  # counters too
        narrow | {"bn1.weight": torch.ones(1).expand(16)},  # of a BatchNorm that never trained
        {"state_dict": narrow, "dtype": torch.float16},
        {"state_dict": narrow, "arch": "unheard of", "epoch": "last"},
        {"state_dict": narrow, "arch": ["resnet18"], "epoch": [3]},
    ):
        path = saved(content, _use_new_zipfile_serialization=content is not narrow)
        model, report = load_backbone(path, num_classes=2)
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


def test_a_content_that_is_no_backbone_is_one_clear_line(narrow, saved):
    no_square = {name: torch.zeros(shape) for name, shape in checkpoints._shapes("vit_mini")}
    no_square["encoder.pos_embedding"] = torch.zeros(1, 16, 192)
    others = {"extra.weight": torch.zeros(1), **dict([*narrow.items()][1:]), "bn1.bias": torch.zeros(3)}
    told = r"118 of its 120 backbone tensors match; 1 missing: conv1\.weight; 1 not expected: extra\.weight; "
    told += r"1 of another shape: bn1\.bias \(3,\) instead of \(16,\)$"
    for content, complaint, *options in (
        (under("model.encoder.", narrow), "belongs to a known backbone"),  # a prefix that nobody knows
        (under("module.encoder_k.", narrow), "belongs to a known backbone"),
        ({"encoder_q.fc.weight": torch.zeros(2)}, "known backbone"),  # only a head beside the encoder
        (narrow | {"module.bn1.weight": narrow["bn1.weight"]}, "not expected: module.bn1"),
        (narrow | {"0.weight": narrow["conv1.weight"]}, "twice"),
        (narrow | {"bn1.bias": torch.full((16,), math.nan)}, "NaN.*bn1.bias; use an earlier epoch"),
        (narrow | {"bn1.bias": torch.zeros(16, dtype=torch.long)}, "not real.*bn1.bias"),
        (narrow | {"bn1.bias": torch.zeros(16).to(torch.float8_e5m2)}, "bn1.bias.*float8_e5m2"),
        (narrow | {"bn1.bias": torch.zeros(16).to_sparse()}, "bn1.bias.*sparse_coo"),
        (narrow | {"bn1.bias": torch.zeros(16, device="meta")}, "bn1.bias.*meta"),
        (torch.zeros(3), "holds a Tensor"),
        ({}, "no state_dict"),
        ({"epoch": 3, "arch": "resnet18"}, "epoch, arch hold no tensors"),
        ({"model": nn.Linear(2, 2)}, r"model is a torch\.nn\..*\.Linear: save its state_dict"),
        (narrow | {"x": Config(a=1)}, rf"needs {__name__}\.Config.*torch\.save\(torch\.load\(FILE"),
        ({1: torch.zeros(3)}, "1 hold no tensors"),
        (others, told),
        (narrow | {"a\n\x1b[2J": torch.zeros(1)}, r"a\\n\\x1b"),
        (narrow | {"conv1.weight": torch.ones(1)}, r"\(16, 5, 7, 7\)", {"channels": 5, "channel_fit": "timm"}),
        (no_square, r"pos_embedding \(1, 16, 192\) instead of"),
        (no_square, r"pos_embedding \(1, 16, 192\) instead of", {"image_size": 64}),  # nothing to interpolate
        (narrow, "not hold a resnet50.*like resnet18: give the --checkpoint of a resnet50", {"arch": "resnet50"}),
        (narrow, "does not hold a vit_mini: 0 of its.*looks like resnet18", {"arch": "vit_mini"}),
        ({"arch": "resnet34", "state_dict": narrow}, "not hold a resnet34.*looks like resnet18"),
    ):
        with pytest.raises(InputError, match=complaint) as raised:
            load_backbone(saved(content), num_classes=2, **dict(*options))
        message = str(raised.value)
        assert "checkpoint.pth" in message and message.isprintable() and len(message) < 900
