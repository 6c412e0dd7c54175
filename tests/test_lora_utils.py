"""Adapter files: what they hold, that they come back, and that nothing else gets in."""

import copy
import functools
import hashlib
import json
import math
from pathlib import Path

import pytest
import safetensors
import torch
from conftest import save_adapter
from dense import assert_unchanged, frozen, images, known, resnet, snapshot, trained, vit
from torch import nn

from finetune_lora import QLoRALinear, adapt_layers, add_lora_to_model, freeze_backbone_params, load_finetuned
from lora.adapted import adapted_layers
from lora_utils import LoRAManager, read_adapter_file, trained_state, write_adapter_file
from tests.run_folders import assert_same
from toolkit import InputError
from toolkit.models import backbones, checkpoints, norms

FILES = Path(__file__).parent / "files"
SUFFIXES = (".pth", ".safetensors")
LAYER = "encoder.layers.encoder_layer_0.mlp.0"
HEAD = "heads.head.bias"
IMPOSSIBLE = f"damaged: {LAYER} is missing, of the wrong type or impossible"
METADATA = {"class_names": ["a", "ß"], "nested": {"lr": 1e-4, "none": None}, "size": [3, 4], "7": "seven"}


@pytest.fixture(params=SUFFIXES)
def either(request, tmp_path):
    return tmp_path / f"adapter{request.param}"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


plain = functools.partial(known, vit)
adapted = functools.partial(frozen, std=0.1)


def merged(model: nn.Module) -> nn.Module:
    LoRAManager(model).merge_lora_weights()
    return model


def moved(model: nn.Module, by: float) -> nn.Module:
    model.encoder.ln.bias.data[0] += by
    return model


@pytest.mark.parametrize("four_bits", [False, True], ids=["float", "4 bits"])
def test_a_file_brings_adapters_and_head_into_a_fresh_model_and_describes_itself(either, four_bits):
    options = {"lora_alpha": 6, "use_rslora": True, "lora_dropout": 0.1, "use_qlora": four_bits}
    model = adapted(plain(), **options)
    x = images(16)
    LoRAManager(model).save_lora_checkpoint(either, METADATA | {"size": (3, 4), 7: "seven"})
    fresh = adapted(plain(), r=2, use_qlora=four_bits)
    assert not torch.allclose(fresh(x), model(x), atol=0.1)
    assert LoRAManager(fresh).load_lora_checkpoint(either) == METADATA
    assert torch.equal(fresh(x), model(x))
    record = {"lora_alpha": 6, "lora_dropout": 0.1, "use_rslora": True, "scaling": 6 / 2**0.5, "r": 2}
    assert record.items() <= vars(fresh.get_submodule(LAYER)).items()  # from the file, not from the call

    if either.suffix == ".pth":  # plain data, read without running any code, and by others than this toolkit
        assert torch.load(either, weights_only=True)["metadata"] == METADATA
    else:
        with safetensors.safe_open(either, framework="pt") as file:
            assert json.loads(file.metadata()["adapter"])["metadata"] == METADATA
    content = read_adapter_file(either)
    assert content["format_version"] == 1 and content["metadata"] == METADATA and len(content["base_hash"]) == 64
    assert content["tensors"].keys() == trained(model).keys()  # adapters and head: nothing else, nothing less
    assert_same(trained(model), content["tensors"])
    record["kind"] = "QLoRALinear" if four_bits else "LoRALinear"
    assert content["layers"][LAYER] == record
    info = LoRAManager(model).get_lora_info()
    count = sum(p.numel() for name, p in trained(model).items() if "lora_" in name)
    assert info["num_layers"] == len(info["layers"]) == 2 * 4
    assert info["lora_parameters"] == sum(layer["parameters"] for layer in info["layers"].values()) == count
    assert info["layers"][LAYER] == record | {"parameters": 2 * (16 + 32)} and not info["merged"]
    assert LoRAManager(merged(model)).get_lora_info()["merged"]


def saved_and_loaded(model: nn.Module, path, fresh: nn.Module) -> nn.Module:
    LoRAManager(model).save_lora_checkpoint(path)
    LoRAManager(fresh).load_lora_checkpoint(path)
    return fresh


@pytest.mark.parametrize("targets", [None, ["fc", "conv1"]], ids=["", "an adapted head"])
def test_a_merged_model_s_adapters_base_and_statistics_travel_in_any_memory_format(either, targets):
    """Not the merged weights: loaded again, the update would count twice. Channels that lie last make no other base."""
    model = adapted(known(resnet), target_modules=targets)
    freeze_backbone_params(model, freeze=False)
    model.train()(images(count=4))
    model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(1.5)
    freeze_backbone_params(model)
    before = snapshot(model)
    assert_unchanged(before, saved_and_loaded(merged(model), either, adapted(known(resnet), target_modules=targets)))
    assert ("fc.lora_A" in read_adapter_file(either)["tensors"]) == bool(targets)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_is_the_model_inside(path, wrap):
    """Wrappers prefix every name; the head must be found all the same."""
    model = plain()
    x = images(16)
    wrapped = wrap(model)
    assert add_lora_to_model(wrapped, r=2) is wrapped
    freeze_backbone_params(wrapped)
    assert model.heads.head.weight.requires_grad and not hasattr(model.heads.head, "lora_A")
    assert torch.equal(saved_and_loaded(wrapped, path, adapted(plain()))(x), model(x))


def test_a_model_whose_start_is_unknown_saves_everything(path):
    """No checkpoint and no adapters have recorded it. But nothing that each model computes anew, and no packed weights:
    without the constants beside them they mean nothing."""
    model = plain(seed=1)
    model.register_buffer("computed", torch.ones(2), persistent=False)
    assert_unchanged(snapshot(model), saved_and_loaded(model, path, plain(seed=2)))
    assert LoRAManager(model).get_lora_info() == {"num_layers": 0, "lora_parameters": 0, "merged": False, "layers": {}}
    LoRAManager(nn.Sequential(QLoRALinear(64, 32, r=2))).save_lora_checkpoint(path)
    assert read_adapter_file(path)["tensors"].keys() == {"0.lora_A", "0.lora_B", "0.bias"}


def test_what_is_merged_into_the_base_is_the_base_of_what_trains_next(path):
    """No part of its file; and over another sum it is refused."""
    models = [adapted(plain()) for _ in range(2)]  # with other numbers in B
    models.append(copy.deepcopy(models[0]))
    for layer in adapted_layers(models[2]).values():
        layer.scaling *= 2
    models.append(adapted(plain(), use_qlora=True))
    models[3].load_state_dict(trained(models[0]), strict=False)
    for model in models:
        LoRAManager(model).merge_into_base()
        adapted(model)
    LoRAManager(models[0]).save_lora_checkpoint(path)
    assert read_adapter_file(path)["tensors"].keys() == set(trained(models[0]))
    for other in models[1:]:
        with pytest.raises(InputError, match="trained over another base"):
            LoRAManager(other).load_lora_checkpoint(path)


def test_what_has_trained_of_the_base_is_in_the_file_and_nothing_else_is(path, base):
    """A file without adapters, loaded, unfrozen and trained: what has moved away from the checkpoint."""
    model, _ = checkpoints.load_backbone(base, 3)
    save_adapter(model, path, base)
    assert set(read_adapter_file(path)["tensors"]) == {"heads.head.weight", "heads.head.bias"}
    model, _ = load_finetuned(path)
    freeze_backbone_params(model, freeze=False)
    with torch.no_grad():
        model.encoder.layers[1].mlp[0].weight.mul_(1.5)
        model.encoder.ln.bias.add_(1)
    again = model
    for _ in range(2):  # and on from there
        save_adapter(again, path, base)
        moved = read_adapter_file(path)["tensors"].keys() - {"heads.head.weight", "heads.head.bias"}
        assert moved == {"encoder.layers.encoder_layer_1.mlp.0.weight", "encoder.ln.bias"}
        again, _ = load_finetuned(path)
        assert_unchanged(snapshot(model), again)


def test_a_file_at_another_size_fits_wherever_it_is_interpolated_but_not_what_learned_there(path, base, monkeypatch):
    """Older files hash it as it was interpolated then. Another CPU rounds it to other numbers."""
    model, _ = checkpoints.load_backbone(base, 3, image_size=32)
    digests = {n: checkpoints.tensor_digest(t) for n, t in model.state_dict().items() if not n.startswith("heads")}
    save_adapter(adapted(model), path, base, image_size=32)
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    older = read_adapter_file(path) | {"base_hash": hashlib.sha256(lines.encode()).hexdigest()}
    write_adapter_file(older, path.with_name("older.pth"))
    positions = model.encoder.pos_embedding
    moved = positions.detach().nextafter(torch.tensor(9.0))
    with monkeypatch.context() as elsewhere:
        loaded, _ = load_finetuned(path.with_name("older.pth"))
        assert torch.equal(loaded.heads.head.weight, model.heads.head.weight)
        elsewhere.setattr(checkpoints, "interpolate_embeddings", lambda *_: {"encoder.pos_embedding": moved})
        loaded, _ = load_finetuned(path)
    assert not torch.equal(loaded.encoder.pos_embedding, positions)
    assert torch.equal(loaded.heads.head.weight, model.heads.head.weight)
    positions.data.add_(0.01)
    save_adapter(model, path, base, image_size=32)
    loaded, _ = load_finetuned(path)
    assert torch.equal(loaded.encoder.pos_embedding, positions)
    content = read_adapter_file(path)
    del content["tensors"]["encoder.pos_embedding"]
    write_adapter_file(content, path)
    with pytest.raises(InputError, match="another base"):
        load_finetuned(path)


def ramp(shape, start: int, step: float = 1 / 4096) -> torch.Tensor:
    """Numbers that are the same on every machine."""
    return ((torch.arange(math.prod(shape)) + start) % 257 - 128).reshape(shape) * step


@pytest.mark.usefixtures("whole_vit_mini")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_version_1_come_back_bit_for_bit(suffix, tmp_path):
    """As this toolkit wrote them in November 2026; the .safetensors over a base in 4 bits.

    Every tensor of base and adapters was a `ramp`, with rank 1, alpha 3 and dropout 0.25 on two layers.
    """
    stock = backbones.build_backbone("vit_mini", 2, 16).state_dict()
    state = {name: ramp(t.shape, i) for i, (name, t) in enumerate(stock.items()) if not name.startswith("heads")}
    torch.save(state, tmp_path / "base.pth")
    model, info = load_finetuned(FILES / f"version_1{suffix}", tmp_path / "base.pth")
    del info["transform"]
    about = {"arch": "vit_mini", "class_names": ["a", "ß"], "image_size": 16, "checkpoint": "base.pth"}
    assert info == about | {"note": [1, 2]}
    layer = "encoder.layers.encoder_layer"
    records = LoRAManager(model).get_lora_info()["layers"]
    assert records.keys() == {f"{layer}_1.mlp.0", f"{layer}_2.self_attention", f"{layer}_2.self_attention.out_proj"}
    for record in records.values():
        assert (record["r"], record["lora_alpha"], record["lora_dropout"], record["scaling"]) == (1, 3, 0.25, 3)
        assert record["kind"].startswith("QLoRA" if suffix == ".safetensors" else "LoRA")
    freeze_backbone_params(model)
    for i, (_, parameter) in enumerate(sorted(trained(model).items())):
        assert torch.equal(parameter, ramp(parameter.shape, 7 * i))


def test_a_file_that_does_not_fit_or_is_damaged_is_refused(path):
    model = adapted(plain())
    for place, name, value, message in (  # what is put where in the file, None: nothing any more
        ("tensors", f"{LAYER}.lora_A", None, rf"tensor {LAYER}\.lora_A is missing"),
        ("tensors", HEAD, None, r"tensor heads\.head\.bias is missing"),
        ("tensors", "surplus", torch.zeros(1), "tensor surplus is unknown here"),
        ("tensors", "conv_proj.lora_A", torch.zeros(1), r"conv_proj\.lora_A is unknown"),
        ("tensors", f"{LAYER}.lora_B", torch.zeros(32, 3), r"lora_B is \(32, 3\) in the file, \(32, 2\) here"),
        ("tensors", f"{LAYER}.lora_B", torch.zeros(32, 2).byte(), r"lora_B is torch\.uint8 in the file"),
        ("tensors", HEAD, torch.full((5,), math.nan), r"NaN or infinite .* in heads\.head\.bias; use an earlier epoch"),
        ("layers", LAYER, None, f"{LAYER} is adapted here but not in the file"),
        ("layers", "mlp", {"r": 2}, "damaged: mlp"),
        ("", "format_version", 3, "has format version 3, this toolkit reads 2"),
        ("", "format_version", "1", "damaged: format_version"),
        ("", "base_hash", None, "damaged: base_hash"),
        ("", "metadata", [], "damaged: metadata"),
        *(("layers", "r", value, IMPOSSIBLE) for value in (0, 2.0, True)),
        *(("layers", "lora_alpha", value, IMPOSSIBLE) for value in (0, math.nan)),
        *(("layers", "lora_dropout", value, IMPOSSIBLE) for value in (1, -0.1)),
        *(("layers", "scaling", value, IMPOSSIBLE) for value in (math.inf, "2")),
        ("layers", "use_rslora", 1, IMPOSSIBLE),
        ("layers", "kind", None, IMPOSSIBLE),
    ):
        LoRAManager(model).save_lora_checkpoint(path)
        content = read_adapter_file(path)
        changed = content[place] if place else content
        if message == IMPOSSIBLE:
            changed = changed[LAYER]
        changed[name] = value
        if value is None and message != IMPOSSIBLE:
            del changed[name]
        write_adapter_file(content, path)
        assert_refused(model, path, message)


def assert_refused(model: nn.Module, path, message: str) -> None:
    """One error that names the file and the reason; not a bit of the model has changed."""
    before = snapshot(model)
    settings = LoRAManager(model).get_lora_info()
    with pytest.raises(InputError, match=message) as error:
        LoRAManager(model).load_lora_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert_unchanged(before, model)
    assert LoRAManager(model).get_lora_info() == settings


def test_another_model_is_refused(path):
    LoRAManager(adapted(plain())).save_lora_checkpoint(path)
    for model, message in (
        (adapted(plain(), r=3), r"has r 2 in the file, 3 here; .*and \d+ more"),
        (adapted(plain(), use_qlora=True), "has kind LoRALinear in the file, QLoRALinear here"),
        (adapted(plain(), target_modules="mlp"), r"\.out_proj is adapted in the file but not here$"),
        (adapted(plain(), target_modules=["encoder", "conv_proj"]), "conv_proj is adapted here but not"),
        (adapt_layers(plain(), {"conv_proj": None}, True), "conv_proj is frozen in 4 bits here"),
        (adapted(plain(seed=2)), "trained over another base"),
        (moved(adapted(plain()), 1e-3), "trained over another base"),
        (adapted(plain(classes=7)), r"heads\.head\.weight is \(5, 16\) in the file, \(7, 16\) here"),
        (merged(adapted(plain())), r"merged: call unmerge_lora_weights\(\) first"),
        (plain(), r"no adapter is in use here: load the file with a name and call use\(name\), or adapt"),
    ):
        assert_refused(model, path, message)
    LoRAManager(adapted(plain(), use_qlora=True)).save_lora_checkpoint(path)  # whose base is known by its floats
    assert_refused(adapted(plain(seed=2), use_qlora=True), path, "trained over another base")


def test_metadata_that_could_not_be_read_back_is_refused_and_a_base_keeps_its_place(path):
    for metadata in ({"value": torch.zeros(1)}, {"value": {1, 2}}, ["value"]):
        with pytest.raises(InputError, match="metadata takes numbers, strings, lists and dicts alone"):
            LoRAManager(plain()).save_lora_checkpoint(path, metadata)
        assert not path.exists()
    path.write_bytes(b"the base")
    path.with_name("link").symlink_to(path)
    for key in ("checkpoint", "stage1_adapter"):
        with pytest.raises(InputError, match="is the base of the adapter, as its metadata say: name another file"):
            LoRAManager(plain()).save_lora_checkpoint(path, {key: str(path.with_name("link"))})
        assert path.read_bytes() == b"the base"


def test_what_training_changes_is_what_trains_and_the_statistics_that_are_not_frozen():
    """By every name that it has in the model."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2).requires_grad_(False), nn.Linear(2, 2))
    norms.freeze_statistics(model[2], freeze=True, training=True)
    model[0].bias.requires_grad_(False)
    model[3].weight = model[0].weight
    norm = {f"1.{name}" for name in model[1].state_dict()}
    assert trained_state(model).keys() == norm | {"0.weight", "3.weight", "3.bias"}
