"""Several adapters on one base: each computes what it would alone, and leaves nothing behind."""

import copy
import functools
import gc
import shutil
import weakref
from pathlib import Path

import dense
import pytest
import torch
from dense import FP32, assert_close, classes, frozen, known, loss_and_gradients, resnet, snapshot, vit
from torch import nn
from torchvision.models import VisionTransformer

from finetune_lora import add_lora_to_model, count_parameters, freeze_backbone_params
from lora.followed_norms import follow_statistics, followers
from lora_utils import LoRAManager, base_digests, read_adapter_file, trained_state
from tests.run_folders import assert_identical
from toolkit import InputError
from toolkit.models.backbones import record_of

X = dense.images(16, 3, generator=torch.Generator().manual_seed(0))
# Adapters over one base that differ in all that may differ: name -> options, number of classes.
OPTIONS = {
    "pets": ({"r": 2}, 5),
    "cars": ({"r": 3, "lora_alpha": 5, "target_modules": [r".*mlp.*|layer2.*"], "use_rslora": True}, 4),
    "food": ({"r": 1, "target_modules": [r".*self_attention|.*conv1"]}, 7),
    "head": ({"r": 2, "target_modules": [r"heads.*|fc|layer1.*|.*encoder_layer_0.*"]}, 3),
}


def base(arch: str, classes: int = 2) -> nn.Module:
    return known(vit if arch == "vit" else functools.partial(resnet, layers=(1, 1, 0, 0)), classes)


def trained(arch: str, name: str, four_bits: bool = False) -> nn.Module:
    """The base with one adapter of OPTIONS alone. A ResNet's BatchNorms follow it, but for head."""
    options, classes = OPTIONS[name]
    with torch.random.fork_rng():
        torch.manual_seed(len(name) + classes)
        model = frozen(base(arch, classes), 0.1, use_qlora=four_bits, **options)
        if name != "head":
            follow_statistics(model, [X])
        return model


def saved(model: nn.Module, name: str, folder: Path) -> Path:
    path = folder / f"{name}.pth"
    LoRAManager(model).save_lora_checkpoint(path, {"class_names": [f"{name} {i}" for i in range(OPTIONS[name][1])]})
    return path


@pytest.fixture(scope="module", params=["resnet", "vit"])
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def originals(arch, tmp_path_factory) -> tuple[Path, dict[str, nn.Module], nn.Module]:
    """A folder with the files of OPTIONS, name -> a model with that adapter alone, and one frozen base with all."""
    folder = tmp_path_factory.mktemp(arch)
    models = {}
    model = base(arch)
    freeze_backbone_params(model)
    for name, (options, number) in OPTIONS.items():
        path = saved(trained(arch, name), name, folder)
        models[name] = frozen(base(arch, number), **options)
        LoRAManager(models[name]).load_lora_checkpoint(path)
        LoRAManager(model).load_lora_checkpoint(path, name=name)
    return folder, models, model


@pytest.fixture
def alone(originals, tmp_path):
    """name -> a model with that adapter alone; their files are in tmp_path."""
    shutil.copytree(originals[0], tmp_path, dirs_exist_ok=True)
    return copy.deepcopy(originals[1])


@pytest.fixture
def manager(alone, originals):
    """One base, frozen, with all adapters of OPTIONS."""
    return LoRAManager(copy.deepcopy(originals[2]))


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    """Bit for bit: keys, numbers, outputs and gradients in both modes, what trains, classes of all modules."""
    assert_identical(model.state_dict(), expected.state_dict())
    assert classes(model) == classes(expected)
    assert count_parameters(model) == count_parameters(expected)
    assert base_digests(model) == base_digests(expected)
    assert trained_state(model).keys() == trained_state(expected).keys()
    for mode in (True, False):
        with torch.no_grad():
            assert torch.equal(model.train(mode)(X), expected.train(mode)(X))
        assert_identical(*(loss_and_gradients(network, X)[1] for network in (model, expected)))


def test_each_adapter_computes_what_it_computes_alone_and_switching_copies_no_weight(manager, alone, arch):
    """And what is left without them is the base."""
    assert manager.names == list(OPTIONS) and manager.in_use is None
    assert isinstance(manager.model, VisionTransformer) or followers(alone["pets"])
    before = {}
    for name in ("cars", "pets", "head", "food", "cars", "head", "pets"):
        manager.model.train()
        info = manager.use(name)
        assert manager.in_use == name and info["class_names"][0] == f"{name} 0"
        assert [*manager.model.modules()][-1].training  # its head too, which was in eval mode
        assert_same(manager.model, alone[name])
        storages = {key: tensor.data_ptr() for key, tensor in manager.model.state_dict(keep_vars=True).items()}
        assert before.setdefault(name, storages) == storages
    layer = next(key for key in storages if "layer" in key and key.endswith("weight"))
    manager.use(None)
    assert {own[layer] for own in before.values()} == {manager.model.get_parameter(layer).data_ptr()}
    manager.use("cars")
    state = manager.unload().state_dict()
    assert manager.names == [] and manager.in_use is None
    stock = base(arch).state_dict()
    assert state.keys() == stock.keys()
    for name, tensor in stock.items():  # the head of the base is another one each time
        assert state[name].shape == tensor.shape
        assert name.startswith(("fc", "heads")) or torch.equal(state[name], tensor)


def test_merging_acts_on_the_one_in_use_and_holds_it(manager, alone, arch, tmp_path):
    manager.use("cars")
    head = "fc" if arch == "resnet" else "heads"
    stock = base(arch)
    setattr(stock, head, getattr(manager.model, head))
    for change in (lambda: None, manager.merge_lora_weights):
        change()
        assert base_digests(manager.model) == base_digests(base(arch))
        for enabled in (True, False):
            with manager.disable_lora(), torch.set_grad_enabled(enabled):
                assert_close(manager.model(X), stock(X), FP32)
    LoRAManager(alone["cars"]).merge_lora_weights()
    assert_identical(manager.model.state_dict(), alone["cars"].state_dict())
    load = functools.partial(manager.load_lora_checkpoint, tmp_path / "pets.pth")
    for switch, name in ((manager.use, "pets"), (manager.remove, "pets"), (load, "more")):
        with pytest.raises(InputError, match=r"merged: call unmerge_lora_weights\(\) first"):
            switch(name)
    assert manager.in_use == "cars" and manager.names == list(OPTIONS)
    manager.unmerge_lora_weights()
    with manager.disable_lora(), pytest.raises(InputError, match="switched off"):
        manager.use("pets")
    manager.use("pets")
    assert_same(manager.model, alone["pets"])
    LoRAManager(alone["pets"]).merge_into_base()  # statistics that followed it too
    assert base_digests(alone["pets"]) == record_of(alone["pets"]).base_digests
    manager.use(None)
    for merge in (manager.merge_lora_weights, lambda: manager.unload(merge=True)):
        with pytest.raises(InputError, match=r"no adapter is in use: call use\(name\) first; there are: .*cars"):
            merge()
    assert manager.names


@pytest.mark.parametrize("in_use", ["pets", "cars"])
def test_a_removed_adapter_is_freed(manager, alone, in_use):
    """If it is the one in use, the base is in use then."""
    manager.use("cars")
    layer = next(iter(manager._layers_in_file().values()))
    references = [weakref.ref(p) for n, p in layer.named_parameters(recurse=False) if n.startswith("lora_")]
    references.append(weakref.ref(manager.model.get_submodule("fc" if hasattr(manager.model, "fc") else "heads")))
    del layer
    manager.use(in_use)
    assert all(reference() is not None for reference in references)
    manager.remove("cars")
    gc.collect()
    assert all(reference() is None for reference in references)
    assert manager.names == ["pets", "food", "head"]
    assert manager.in_use == (None if in_use == "cars" else "pets")
    manager.use("pets")
    assert_same(manager.model, alone["pets"])


def test_adapters_over_a_4_bit_base(arch, tmp_path):
    """The first is loaded alone, as ever; others, of other ranks and classes, come beside it and share its bytes."""
    alone = {}
    for name, rank in (("pets", 2), ("cars", 5)):
        alone[name] = frozen(base(arch, OPTIONS[name][1]), 0.1, r=rank, use_qlora=True)
        saved(alone[name], name, tmp_path)
    model = copy.deepcopy(alone["pets"])
    manager = LoRAManager(model)
    packed = bytes_in_use(model)
    refused = {True: "stored in fewer bits here but is not in the file", False: "has kind LoRA.* in the file, QLoRA"}
    for four_bits, message in refused.items():  # what was trained over other weights
        with pytest.raises(InputError, match=message):
            manager.load_lora_checkpoint(saved(trained(arch, "food", four_bits), "food", tmp_path), name="food")
        assert_same(model, alone["pets"])
    manager.load_lora_checkpoint(tmp_path / "cars.pth", name="cars")
    assert manager.names == ["default", "cars"] and manager.in_use == "default"
    for name in ("cars", "default", "cars"):
        manager.use(name)
        assert_same(model, alone["pets" if name == "default" else name])
        assert bytes_in_use(model) == packed

    with LoRAManager(alone["pets"]).disable_lora():
        expected = alone["pets"](X)
    manager.use(None)
    assert torch.equal(model.eval()(X), expected) and not any("lora_" in n for n in model.state_dict())
    assert count_parameters(model)["lora"] == 0 and manager.get_lora_info()["num_layers"] == 0
    with pytest.raises(InputError, match="4 bits"):
        manager.unload(merge=True)
    manager.use("cars")
    manager.unload(merge=True)
    LoRAManager(alone["cars"]).unload(merge=True)
    assert_same(model, alone["cars"])


def bytes_in_use(model: nn.Module) -> set[int]:
    """Where the weights in 4 bits are."""
    return {p.data_ptr() for p in model.parameters() if p.dtype == torch.uint8}


@pytest.mark.parametrize("name", ["cars", "head"])
def test_adapters_without_a_name_are_the_default(alone, tmp_path, name):
    model = copy.deepcopy(alone[name])
    record_of(model).base_digests = {}  # as of random weights, which no checkpoint has
    second = LoRAManager(model)
    second.load_lora_checkpoint(tmp_path / "pets.pth", name="pets")
    assert second.names == ["default", "pets"] and LoRAManager(model).in_use == "default"
    assert_same(model, alone[name])
    second.use("pets")
    assert_same(model, alone["pets"])
    LoRAManager(model).use("default")  # any manager of the model knows them
    assert_same(model, alone[name])
    second.use(None)
    add_lora_to_model(model, r=1)
    with pytest.raises(InputError, match="adapters without a name"):
        second.use("pets")


def test_files_of_every_kind_share_a_float_base(arch, tmp_path):
    """An adapter; two in 4 bits, which have one copy of the bytes, one with trained biases; and a whole backbone."""
    alone = {name: trained(arch, name, four_bits=name in ("pets", "food")) for name in ("cars", "pets", "food")}
    alone["head"] = base(arch, OPTIONS["head"][1])
    record_of(alone["head"]).base_digests = base_digests(alone["head"])
    freeze_backbone_params(alone["food"], freeze=False)
    with torch.no_grad():
        for model in (alone["food"], alone["head"]):
            for name, tensor in model.state_dict(keep_vars=True).items():
                if "running" in name or (tensor.requires_grad and "lora_" not in name):
                    tensor += 0.05 * torch.rand_like(tensor)
    manager = LoRAManager(base(arch))
    freeze_backbone_params(manager.model)
    before = snapshot(manager.model)
    for name, model in alone.items():
        manager.load_lora_checkpoint(saved(model, name, tmp_path), name=name)
    packed = {}
    for name in (*alone, *reversed(alone)):
        manager.use(name)
        assert_identical(manager.model.state_dict(), alone[name].state_dict())
        assert_close(manager.model.eval()(X), alone[name].eval()(X), FP32, name)  # what trains is unfused
        packed[name] = bytes_in_use(manager.model)
    assert packed["food"] and packed["food"] < packed["pets"] and not packed["cars"]
    manager.use(None)
    dense.assert_unchanged(before, manager.model)


def test_a_base_that_trained_with_its_adapter_is_not_shared_and_its_file_is_not_read_into_fewer_bits(arch, tmp_path):
    """Its weights would be rounded, and missing in the next file."""
    saved(trained(arch, "cars"), "cars", tmp_path)
    model = trained(arch, "pets")
    manager = LoRAManager(model)
    layer = model.layer1[0].conv1 if arch == "resnet" else model.encoder.layers[0].mlp[0]
    layer.weight.data.add_(1)
    with pytest.raises(InputError, match="the base has trained with the adapter in use"):
        manager.load_lora_checkpoint(tmp_path / "cars.pth", name="cars")
    assert manager.names == []
    path = saved(model, "pets", tmp_path)
    stored = add_lora_to_model(base(arch, 5), **OPTIONS["pets"][0], base_dtype=torch.bfloat16)
    with pytest.raises(InputError, match="has trained in the file, but is in fewer bits here"):
        LoRAManager(stored).load_lora_checkpoint(path)


def test_layers_in_16_bits_without_an_adapter_merge_under_any_adapter(tmp_path):
    """Below `adapt_last` they are stored only: the adapter that comes into use leaves them no factors at all."""
    model = frozen(base("vit"), adapt_last=1, base_dtype=torch.bfloat16)
    manager = LoRAManager(model)
    manager.save_lora_checkpoint(tmp_path / "lora.pth")
    manager.load_lora_checkpoint(tmp_path / "lora.pth", name="again")
    manager.use("again")
    expected = model(X)
    manager.merge_lora_weights()
    assert model.encoder.layers[0].mlp[0].weight.dtype == torch.float32
    assert_close(model(X), expected, FP32)


def test_metadata_are_those_of_the_file_that_was_read_last_or_of_the_adapter_in_use(alone, tmp_path):
    def stored() -> dict:
        manager.save_lora_checkpoint(tmp_path / "again.pth")
        return read_adapter_file(tmp_path / "again.pth")["metadata"]

    of_file = {"class_names": ["others"], "val_macro_f1": 0.9, "cut to rank": 2, "keeps_start": False}
    LoRAManager(alone["pets"]).save_lora_checkpoint(tmp_path / "other.pth", of_file)
    manager = LoRAManager(alone["pets"])
    manager.load_lora_checkpoint(tmp_path / "other.pth")
    assert stored() == of_file
    manager.load_lora_checkpoint(tmp_path / "cars.pth", name="cars")
    assert manager.use("cars") == stored() == {"class_names": [f"cars {i}" for i in range(4)]}
    manager.load_lora_checkpoint(tmp_path / "other.pth", name="other")
    for name in ("other", "default"):
        assert manager.use(name) == stored() == of_file
    next(tensor for name, tensor in manager.model.named_parameters() if "lora_B" in name).data += 1
    assert stored() == {"class_names": ["others"]}  # it is another now, of which nothing was measured
    for leave in (lambda: manager.use(None), manager.unload):
        leave()
        assert stored() == {}


def test_what_does_not_fit_or_cannot_be_leaves_everything_as_it_was(manager, arch, tmp_path):
    manager.use("cars")
    expected = copy.deepcopy(manager.model)
    another = base(arch)
    next(another.parameters()).data.add_(1)
    others = {"another base": another, "adapted in the file but not here": nn.Sequential(nn.Linear(3, 3))}
    for message, model in others.items():
        LoRAManager(add_lora_to_model(model, r=1)).save_lora_checkpoint(tmp_path / "other.pth")
        with pytest.raises(InputError, match=message):
            manager.load_lora_checkpoint(tmp_path / "other.pth", name="other")
    tensors = read_adapter_file(tmp_path / "food.pth")["tensors"]
    head = next(name for name in tensors if name.endswith("bias"))
    name, A = next((name, tensor) for name, tensor in tensors.items() if "lora_A" in name)
    rows = [(head, None, "is missing in the file"), (name, A[:, :1], "in the file"), (name, A.repeat(9, 1), "rank")]
    for name, tensor, message in rows:
        broken = read_adapter_file(tmp_path / "food.pth")
        del broken["tensors"][name]
        if tensor is not None:
            broken["tensors"][name] = tensor
        torch.save(broken, tmp_path / "broken.pth")
        with pytest.raises(InputError, match=message):
            manager.load_lora_checkpoint(tmp_path / "broken.pth", name="broken")
    for name in ("pets", "", 3):
        with pytest.raises(InputError, match="cannot be named"):
            manager.load_lora_checkpoint(tmp_path / "pets.pth", name=name)
    for call in (manager.use, manager.remove):
        with pytest.raises(InputError, match=r"no adapter is named 'pet': did you mean pets.* pets, cars, food, head"):
            call("pet")
    for options in ({"freeze": False}, {"train_norms": True}):
        with pytest.raises(InputError, match="several adapters share this base"):
            freeze_backbone_params(manager.model, **options)
    assert manager.in_use == "cars" and manager.names == list(OPTIONS)
    assert_same(manager.model, expected)


@pytest.mark.parametrize("change", ["meta", torch.bfloat16], ids=str)
def test_adapters_follow_where_the_model_goes_when_they_come_into_use(manager, change):
    """`meta` stands for another device: no number can be there, but every tensor has to."""
    manager.use("cars")
    manager.model.to(change)
    for name in ("pets", None, "head", "cars"):
        manager.use(name)
        if change == "meta":
            assert {tensor.device.type for tensor in manager.model.state_dict().values()} == {"meta"}
        else:
            assert manager.model(X.bfloat16()).dtype == torch.bfloat16
