"""Layouts of MoCo's authors and of others who pretrain with it: each loads bit for bit, under its own name.

The files are built here, with random numbers, from the names that these projects give to tensors.
"""

import contextlib
import itertools
import re
import sys
import types
import warnings
from unittest import mock

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
from toolkit.models.backbones import build_backbone
from toolkit.models.checkpoints import load_backbone, load_contrast

pytestmark = pytest.mark.usefixtures("small_backbones")


def mlp(*names):
    return {f"{name}.{part}": torch.randn(4, 4) for name in names for part in ("0.weight", "2.weight")}


def lightning(tensors, **hyper_parameters):
    extra = {"hyper_parameters": hyper_parameters} if hyper_parameters else {}
    return {"epoch": 9, "global_step": 600, "pytorch-lightning_version": "2.5.0", "state_dict": tensors, **extra}


def queue(prefix=""):
    return {f"{prefix}queue": torch.randn(4, 8), f"{prefix}queue_ptr": torch.zeros(1, dtype=torch.long)}


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


def learned(vit):
    """The same with a position embedding that has trained."""
    return vit | {"pos_embed": vit["pos_embed"] + 1}


def twice(first, second, tensors):
    """An encoder and its momentum encoder, each under its prefix; of the latter nobody should look at the tensors."""
    return under(first, tensors) | under(second, dict.fromkeys(tensors, torch.zeros(1)))


def moco(tensors):
    """The first two versions of MoCo."""
    state = under("module.", twice("encoder_q.", "encoder_k.", tensors) | queue())
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {"param_groups": [{"lr": 0.03}]}}


def moco_v3(tensors, head="fc", arch="resnet18"):
    """Its third version; in a ViT the projector is called head."""
    parts = twice("base_encoder.", "momentum_encoder.", tensors | mlp(head)) | mlp("predictor")
    state = under("module.", parts)
    return {"epoch": 300, "arch": arch, "state_dict": state, "optimizer": {}, "scaler": {"scale": 65536.0}}


def linear_probe(tensors, arch="resnet18"):
    state = under("module.", tensors | {"fc.weight": torch.randn(9, 512), "fc.bias": torch.randn(9)})
    return {"epoch": 100, "arch": arch, "state_dict": state, "best_acc1": np.float64(67.5)}


def own(r):
    parts = twice("encoder_q.", "encoder_k.", r | mlp("fc")) | mlp("predictor")
    return {"model": parts, "epoch": 100, "arch": "resnet18", "config": {"image_size": 32}}


def lightly(r):
    state = twice("backbone.", "backbone_momentum.", r) | {"criterion.memory_bank.bank": torch.randn(4, 8)}
    return {"epoch": 9, "state_dict": state | mlp("projection_head.layers", "projection_head_momentum.layers")}


def torchgeo(r):
    memory = {"criterion.memory_bank.bank": torch.randn(4, 8)}
    heads = mlp("projection_head.layers", "projection_head_momentum.layers", "prediction_head.layers")
    return lightning(twice("backbone.", "backbone_momentum.", r) | heads | memory, model="resnet18", in_channels=3)


def torchgeos_classifier(r):
    extra = {"model.fc.weight": torch.randn(5, 512), "criterion.weight": torch.ones(5)}
    return lightning(under("model.", r) | extra, model="resnet18")


def seco(r):
    heads = mlp("heads_q.0", "heads_q.1", "heads_k.0", "heads_k.1")
    return lightning(twice("encoder_q.", "encoder_k.", sequential(r)) | heads | queue(), base_encoder="resnet18")


def solo_learn(r):
    heads = mlp("projector", "momentum_projector", "classifier", "momentum_classifier")
    return lightning(twice("backbone.", "momentum_backbone.", r) | heads | queue())


def solo_learns_first(r):
    return lightning(twice("encoder.", "momentum_encoder.", r) | mlp("projector", "classifier") | queue())


def mmpretrain(r):
    parts = twice("backbone.", "encoder_k.module.0.", r) | mlp("neck.mlp", "encoder_k.module.1") | queue()
    parts |= {"encoder_k.steps": torch.tensor(3), "data_preprocessor.mean": torch.zeros(3, 1, 1)}
    return {"meta": {"epoch": 200}, "state_dict": parts}


def vissl(r):
    model = {"trunk": under("_feature_blocks.", r), "heads": mlp("0.clf")}
    return {"phase_idx": 199, "classy_state_dict": {"base_model": {"model": model, "meta": {}}}}


RESNETS = {
    "MoCo v1": ("moco_v1", lambda r: moco(r | {"fc.weight": torch.randn(128, 512), "fc.bias": torch.randn(128)})),
    "MoCo v2": ("moco_v2", lambda r: moco(r | mlp("fc"))),
    "MoCo v3": ("moco_v3", moco_v3),
    "MoCo's linear probe": ("linear_probe", linear_probe),
    "this toolkit's own": ("moco_stage1", own),
    "torchvision": ("torchvision", lambda r: r | {"fc.weight": torch.full((2, 40), 7.0), "fc.bias": torch.ones(2)}),
    "lightly": ("lightly", lightly),
    "lightly, a ResNet as an nn.Sequential": ("lightly", lambda r: lightly(sequential(r))),
    "torchgeo's MoCo": ("torchgeo", torchgeo),
    "torchgeo's classifier": ("torchgeo", torchgeos_classifier),
    "another Lightning module": ("lightning", lambda r: lightning(under("model.", r))),
    "SeCo": ("seco", seco),
    "solo-learn, MoCo v2+": ("solo_learn", solo_learn),
    "solo-learn, its linear probe": ("solo_learn", lambda r: lightning(under("backbone.", r) | mlp("classifier"))),
    "solo-learn, its first releases": ("solo_learn", solo_learns_first),
    "mmpretrain, MoCo v2": ("mmpretrain", mmpretrain),
    "mmpretrain, its published backbone": ("mmpretrain", lambda r: {"meta": {}, "state_dict": under("backbone.", r)}),
    "VISSL": ("vissl", vissl),
    "VISSL, extracted": ("vissl", lambda r: under("_feature_blocks.", r)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", RESNETS)
def test_a_resnet_comes_out_bit_for_bit_with_the_channels_of_its_images(case, narrow, saved):
    family, build = RESNETS[case]
    tensors = narrow | {"conv1.weight": torch.randn(16, 13, 7, 7)}
    content = build(tensors)
    path = saved(content)
    model, report = load_backbone(path, num_classes=2)
    assert (report["family"], report["arch"], report["heads"]) == (family, "resnet18", None)
    assert (report["channels"], report["channel_fit"], report["epoch"]) == (13, None, content.get("epoch"))
    assert report["image_size"] == (32 if case == "this toolkit's own" else 224)
    in_file, _ = checkpoints._find_state_dict(path)
    assert set(report["loaded"]) == set(narrow)
    assert set(report["dropped"]) < set(in_file) and len(report["dropped"]) == len(in_file) - len(narrow)
    assert type(model) is torchvision.models.ResNet
    assert_same(tensors, model.state_dict())
    assert not (model.fc.weight == 7).any()  # fresh, though the file's would fit
    assert model(torch.randn(2, 13, 32, 32)).shape == (2, 2)


VERSIONS = {"MoCo v1": 2, "MoCo v2": 2, "MoCo v3": 3, "this toolkit's own": 3}


@pytest.mark.parametrize("case", RESNETS)
def test_a_pretraining_goes_on_with_the_projector_of_every_version_of_moco_and_of_nobody_else(case, narrow, saved):
    path = saved(RESNETS[case][1](narrow))
    version, parts = load_contrast(path)
    assert version == VERSIONS.get(case) and ("0.weight" in parts["predictor"]) == (version == 3)
    projector = {}
    for key, tensor in checkpoints._find_state_dict(path)[0].items():
        if version and (name := re.search(r"(encoder_q|base_encoder)\.fc\.(.*)", key)):
            projector[name[2]] = tensor
    assert bool(projector) == bool(version) and parts["projector"].keys() == projector.keys()
    assert_same(projector, parts["projector"])


def solo_learn_v3(v):
    return lightning(twice("backbone.", "momentum_backbone.", v) | mlp("projector", "momentum_projector", "predictor"))


def mmpretrain_v3(v):
    parts = twice("backbone.", "momentum_encoder.module.0.", of_mmpretrain(v))
    return {"meta": {}, "state_dict": parts | mlp("neck", "momentum_encoder.module.1", "head.predictor")}


def moco_v3_of_vit(v, arch="vit_small"):
    return moco_v3(v, "head", arch)


def torchgeo_v3(v):
    parts = twice("backbone.", "backbone_momentum.", v) | mlp("projection_head.layers")
    return lightning(parts, model="vit_small_patch16_224")


# Layout -> family, how its file is made, and its heads with a fixed and with a learned position embedding.
CERTAIN = {
    "torchgeo's MoCo": ("torchgeo", torchgeo_v3, (6, 6)),
    "solo-learn": ("solo_learn", solo_learn_v3, (12, 6)),
    "mmpretrain": ("mmpretrain", mmpretrain_v3, (12, 6)),
    "mmpretrain, its backbone": ("mmpretrain", lambda v: {"state_dict": under("backbone.", of_mmpretrain(v))}, (12, 6)),
    "mmpretrain, extracted": ("mmpretrain", of_mmpretrain, (12, 6)),
}
GUESSED = {
    "MoCo v3, SSL4EO-S12": ("moco_v3", moco_v3_of_vit, (12, 12)),
    "timm's names, as torchgeo's weights": ("deit", lambda v: v, (12, 6)),
    "DeiT-converted": ("deit", lambda v: {"model": v}, (12, 6)),
    "another Lightning module": ("lightning", lambda v: lightning(under("model.", v)), (12, 12)),
}


@pytest.mark.parametrize("case", [*CERTAIN, *GUESSED])
def test_a_vit_comes_out_bit_for_bit_with_its_heads_and_guesses_are_told(case, vit, saved):
    family, build, expected = (CERTAIN | GUESSED)[case]
    reference, _ = load_backbone(saved(vit, "timm.pth"), num_classes=2, heads=12)
    for tensors, heads in zip((vit, learned(vit)), expected, strict=True):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model, report = load_backbone(saved(build(tensors)), num_classes=2)
        assert (report["family"], report["arch"], report["heads"]) == (family, "vit_small", heads)
        assert model.encoder.layers[0].self_attention.num_heads == heads
        positions = model.state_dict().pop("encoder.pos_embedding")
        assert torch.equal(positions, tensors["pos_embed"])
        same = {n: t for n, t in model.state_dict().items() if not n.startswith(("heads.", "encoder.pos"))}
        assert_same(same, reference.state_dict())
        guesses = [f"{heads} is a guess"] if case in GUESSED else []
        assert [re.search(r"\d+ is a guess", str(warning.message))[0] for warning in told] == guesses
        assert all("--heads" in str(warning.message) and "\n" not in str(warning.message) for warning in told)


STEM = (3, 48, 96, 192, 384)  # the channels of MoCo v3's convolutional stem


def conv_stem():
    shapes = {}
    for layer, (narrow, wide) in enumerate(itertools.pairwise(STEM)):
        shapes[f"patch_embed.proj.{3 * layer}.weight"] = (wide, narrow, 3, 3)
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"patch_embed.proj.{3 * layer + 1}.{key}"] = (wide,)
    return shapes | {"patch_embed.proj.12.weight": (384, 384, 1, 1), "patch_embed.proj.12.bias": (384,)}


@pytest.fixture(scope="module")
def vit_conv():
    counters = {f"patch_embed.proj.{3 * i + 1}.num_batches_tracked": torch.tensor(5) for i in range(4)}
    return timm_vit(conv_stem()) | counters


def plain_vit(tensors, heads):
    """timm's own, with MoCo v3's convolutional stem if that is there."""
    model = pytest.importorskip("timm").create_model("vit_small_patch16_224", num_classes=0, num_heads=heads, depth=2)
    if "patch_embed.proj.0.weight" in tensors:
        layers = []
        for narrow, wide in itertools.pairwise(STEM):
            layers += [nn.Conv2d(narrow, wide, 3, 2, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        model.patch_embed.proj = nn.Sequential(*layers, nn.Conv2d(384, 384, 1))
    model.load_state_dict(tensors)
    return model.eval()


@pytest.mark.parametrize(
    "family, build, arch, heads",
    [
        ("moco_v3", moco_v3_of_vit, "vit_small", 12),
        ("moco_v3", moco_v3_of_vit, "vit_conv_small", 6),
        ("deit", lambda tensors, arch: {"model": tensors}, "vit_small", 6),
        ("linear_probe", linear_probe, "vit_conv_small", 12),
    ],
)
@pytest.mark.filterwarnings("error")  # nothing is guessed
def test_a_vit_computes_what_it_does_under_timm_s_names(family, build, arch, heads, vit, vit_conv, saved):
    tensors = vit_conv if arch == "vit_conv_small" else vit
    model, report = load_backbone(saved(build(tensors, arch)), num_classes=384, heads=heads)
    assert [report[key] for key in ("family", "arch", "image_size", "heads")] == [family, arch, 224, heads]
    with torch.no_grad():
        model.heads.head.weight.copy_(torch.eye(384))  # the head hands on its input
        images = torch.randn(1, 3, 224, 224)
        features, expected = model.eval()(images), plain_vit(tensors, heads)(images)
        others = plain_vit(tensors, 18 - heads)(images)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert (expected - others).abs().max() > 0.05  # the comparison would see the other number of heads


@pytest.mark.filterwarnings("error")
def test_torchgeos_file_of_a_vit_small_is_named_as_timms_with_6_heads(vit, saved):
    """Its positions are MoCo v3's, whose own ViT-S has 12, whatever the name of a file in MoCo v3's own layout."""
    _, report = load_backbone(saved(vit, "vit_small_patch16_224_sentinel2_all_moco-67c9032d.pth"), num_classes=2)
    assert report["heads"] == 6
    with pytest.warns(UserWarning, match="12 is a guess"):
        _, report = load_backbone(saved(moco_v3_of_vit(vit), "moco_v3_vit_small_patch16.pth"), num_classes=2)
    assert report["heads"] == 12


@pytest.mark.filterwarnings("error")
def test_a_name_of_timms_says_how_many_heads(saved):
    pytest.importorskip("timm")
    vit = without_head(build_backbone("timm:test_vit", 2).state_dict())
    model, report = load_backbone(saved(mmpretrain_v3(vit)), num_classes=2, arch="timm:test_vit")
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
def test_files_of_a_vit_small_that_do_not_say_their_heads_have_12_in_silence(vit, saved):
    """As when they were trained: there was no other number then."""
    base = saved(learned(vit), "base.pth")  # of which one would now guess 6
    model, _ = load_backbone(base, 2, heads=12)
    manager = LoRAManager(add_lora_to_model(model, r=1, target_modules=["encoder_layer_1.mlp.0"]))
    about = {"arch": "vit_small", "class_names": ["a", "b"], "image_size": 224, "checkpoint": str(base)}
    manager.save_lora_checkpoint(base.with_name("lora.pth"), about)
    assert load_finetuned(base.with_name("lora.pth"))[0].encoder.layers[0].num_heads == 12


def test_heads_that_are_none_or_damaged_in_a_file(base, tmp_path):
    about = {"arch": "vit_mini", "class_names": list("abc"), "image_size": 16, "checkpoint": str(base)}
    model, _ = load_backbone(base, 3)
    manager = LoRAManager(add_lora_to_model(model, r=2))
    for heads in ("6", 0, -6, 7, True):
        manager.save_lora_checkpoint(tmp_path / "lora.pth", about | {"heads": heads})
        with pytest.raises(InputError, match="heads"):
            load_finetuned(tmp_path / "lora.pth")
    for same in (about, about | {"heads": None}, about | {"heads": 3}):
        manager.save_lora_checkpoint(tmp_path / "lora.pth", same)
        assert load_finetuned(tmp_path / "lora.pth")[0].encoder.layers[0].num_heads == 3


def test_moco_cxrs_densenet_needs_no_arch_and_without_timm_or_a_name_says_what_to_do(saved, monkeypatch):
    """Where timm is, tests/test_timm.py has what the message names."""
    pytest.importorskip("timm")
    densenet = torchvision.models.densenet121(num_classes=128).eval()
    content = {"epoch": 20, "state_dict": under("module.encoder_q.", densenet.state_dict()) | queue("module.")}
    unnamed = saved(content, "unnamed.pth")
    named = saved({**content, "arch": "densenet121"})
    model, report = load_backbone(named, num_classes=128)
    assert (report["family"], report["arch"]) == ("moco_v1", "timm:densenet121")
    model.classifier = densenet.classifier
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), densenet(x), rtol=1e-4, atol=1e-5)
    assert_same(densenet.state_dict(), model.state_dict())
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"none of its 725 tensors .*--arch timm:NAME"):
        load_backbone(unnamed, num_classes=2)
    with pytest.raises(InputError, match=r"densenet121 needs timm.*pip install timm"):
        load_backbone(named, num_classes=2)


@contextlib.contextmanager
def class_of(module, kind):
    """A class that seems to come from an installed package, for as long as a file is written."""
    parents = [module.rsplit(".", depth)[0] for depth in range(module.count(".") + 1)]
    created = {name: types.ModuleType(name) for name in parents}
    kind.__module__ = module
    setattr(created[module], kind.__name__, kind)
    with mock.patch.dict(sys.modules, created):
        yield


class Buffer:
    """Like mmengine's HistoryBuffer: an array, and methods by name."""

    def __init__(self):
        self.history, self.methods = torch.arange(3.0).numpy(), {"mean": self.mean}

    def mean(self):
        raise AssertionError("code of the file has run")

    __setstate__ = mean


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_beside_the_tensors_are_left_aside_and_run_nothing(legacy, narrow, saved):
    content = RESNETS["mmpretrain, MoCo v2"][1](narrow)
    with class_of("openmmlab.logging.history_buffer", Buffer):
        content["message_hub"] = {"log_scalars": {"loss": Buffer()}, "runtime_info": {}}
        path = saved(content, _use_new_zipfile_serialization=not legacy)
    model, report = load_backbone(path, num_classes=2)
    assert report["family"] == "mmpretrain"
    assert_same(narrow, model.state_dict())
    read = read_checkpoint(path, objects=True)["message_hub"]["log_scalars"]["loss"]
    assert isinstance(read, ForeignObject) and vars(read) == {}
    with pytest.raises(InputError, match=r"needs openmmlab\.logging\.history_buffer\.Buffer.*weights_only=False"):
        read_checkpoint(path)  # as adapter files and runs are read


class Config(dict):
    """Like a hyper_parameters object of a class that is filled item by item, which is more than is read."""


def test_a_dictionary_of_another_class_is_refused_with_the_way_to_convert_it(narrow, saved):
    with class_of("theirs.config", Config):
        path = saved({"state_dict": narrow, "hyper_parameters": Config(model="resnet18")})
    with pytest.raises(InputError, match=r"needs theirs\.config\.Config.*torch\.save\(torch\.load\(FILE") as raised:
        load_backbone(path, num_classes=2)
    assert "\n" not in str(raised.value)


def test_a_whole_model_in_the_place_of_tensors_is_named(saved):
    path = saved({"model": nn.Linear(2, 2), "epoch": 3})
    with pytest.raises(InputError, match=r"model is a torch\.nn\.modules\.linear\.Linear: save its state_dict"):
        load_backbone(path, num_classes=2)
