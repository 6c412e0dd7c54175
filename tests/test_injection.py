"""Which layers get adapters, how they are removed, what trains and what is counted, on whole models; their settings."""

import copy
import math
from collections import OrderedDict
from functools import partial

import dense
import pytest
import torch
import torch.nn.functional as F
from dense import FEWER_BITS, FP32, assert_close, compare_with_dense, dense_twin, frozen, images, known, resnet, vit
from torch import nn
from torch.nn.utils import prune
from torchvision.models.swin_transformer import SwinTransformer

from finetune_lora import LoRALinear, QLoRALinear, adapt_layers, add_lora_to_model, freeze_backbone_params
from lora.adapted import LoRASettings, adapted_layers, choose_layers, recorded_settings
from lora.fusion import set_gradient_checkpointing
from lora_utils import LoRAManager, count_parameters, unused_adapters
from toolkit import InputError
from toolkit.models.backbones import block_names, record_of

BLOCK = "encoder.layers.encoder_layer_0.self_attention"
STORAGE = {"float": {}, "4 bits": FEWER_BITS[4], "bfloat16": FEWER_BITS[16]}
in_float_and_4_bits = pytest.mark.parametrize("four_bits", [False, True], ids=["float", "4 bits"])


def adapted_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if any(dense.adapters(module))}


class ReadsItsWeightsDtype(nn.Sequential):
    """As ViT, DeiT, DINOv2, CLIP and SigLIP of transformers do."""

    def forward(self, pixels):
        return super().forward(pixels.to(self.patch_embeddings.projection.weight.dtype))


def test_a_patch_embedding_whose_dtype_the_model_reads_stays_a_float():
    """Pixels that are converted to the dtype of a weight in 4 bits would be bytes."""
    patches = nn.Sequential(OrderedDict(projection=nn.Conv2d(3, 8, 4, 4), flat=nn.Flatten()))
    rest = OrderedDict(patch_embeddings=patches, body=nn.Linear(8 * 16, 8), classifier=nn.Linear(8, 3))
    stock = ReadsItsWeightsDtype(rest)
    x = images(16)
    model = add_lora_to_model(copy.deepcopy(stock), r=2, use_qlora=True)
    assert adapted_names(model) == {"body"}
    compare_with_dense(stock, model, [x], FP32)
    with pytest.raises(InputError, match=r"not torch\.uint8: scale images; a model that reads"):
        add_lora_to_model(stock, r=2, use_qlora=True, target_modules=["projection", "body"])(x)


def test_a_model_without_a_head_is_adapted_altogether():
    model = frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 5)))
    assert dense.trained(model).keys() == {"0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"}
    assert dense.trained(frozen(nn.Linear(4, 5))).keys() == {"lora_A", "lora_B"}
    add_lora_to_model(nn.Conv2d(2, 17, 3), r=17)  # the full rank of a kernel, which is 17 x (2 * 3 * 3)


TARGETS = {
    "a name": ("layer1.0.conv1", {"layer1.0.conv1"}),
    "a suffix": ("conv2", {f"layer{i}.0.conv2" for i in (1, 2, 3, 4)}),
    "what contains it": ("layer2", {"layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"}),
    "a pattern": (r"layer[34]\.0\.conv\d", {f"layer{i}.0.conv{j}" for i in (3, 4) for j in (1, 2)}),
    "the head, if asked for": (["fc", "layer1.0.conv1"], {"fc", "layer1.0.conv1"}),
    "all but those": (r"(?!layer[1-3]).*conv\d", {"conv1", "layer4.0.conv1", "layer4.0.conv2"}),
}


@pytest.mark.parametrize("targets, expected", TARGETS.values(), ids=TARGETS)
def test_targets(targets, expected):
    assert adapted_names(add_lora_to_model(resnet(), target_modules=targets)) == expected


def test_an_adapted_head_is_merged_but_no_part_of_the_base_and_not_rounded():
    model = frozen(vit(), target_modules=["mlp", "heads"], base_dtype=torch.bfloat16)
    head = model.heads.head
    assert isinstance(head, LoRALinear) and head.weight.dtype == torch.float32 and head.weight.requires_grad
    assert model.encoder.layers[0].mlp[0].weight.dtype == torch.bfloat16
    LoRAManager(model).merge_into_base()
    assert not adapted_names(model) and not any(name.startswith("heads") for name in record_of(model).base_digests)


IMPOSSIBLE = {
    "r": (0, True, 2.0, "8", None),
    "lora_alpha": (0, "16", math.inf, math.nan, None),
    "lora_dropout": (-0.1, 1, math.nan, "0", None),
}
REFUSED = [
    *(({name: value}, f"^{name} is {value!r}; give") for name, wrong in IMPOSSIBLE.items() for value in wrong),
    ({"target_modules": "q_proj"}, r"no layer matches q_proj; there are: conv_proj, encoder\.layers"),
    ({"target_modules": ["mlp", "nowhere", "elsewhere"]}, "no layer matches nowhere, elsewhere;"),
    ({"target_modules": "encoder.layers.encoder_layer"}, "no layer matches encoder"),  # the beginning of a name
    ({"target_modules": "*mlp"}, "neither a layer nor a regular expression"),
    ({"r": 0, "lora_alpha": -1, "lora_dropout": 1.0}, "r is 0.*lora_alpha is -1.*lora_dropout is 1.0"),
    ({"use_qlora": True, "target_modules": "heads"}, "head heads.head trains, so it cannot be in 4 bits"),
    # It adds nothing but memory: 16 is the rank of a full matrix in this model's MLPs, in 4 bits too.
    ({"r": 17}, r"^rank 17 of encoder\S+ is above 16, the largest full rank; lower r \(--lora-rank\)"),
    # PyTorch does not call attention's out_proj: such an adapter would do nothing, and get no gradient.
    ({"target_modules": r".*out_proj"}, "no layer matches"),
    ({"settings": "mlp"}, "no layer to adapt is named mlp;"),  # names, not patterns
    ({"settings": "encoder.layers.encoder_layer_0.ln_1"}, r"no layer to adapt is named encoder\S+ln_1;"),
    ({"settings": f"{BLOCK}.out_proj"}, "no layer to adapt is named .*out_proj;"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=str)
def test_bad_input_is_refused_and_leaves_the_model_as_it_was(options, message):
    for model in (vit(), add_lora_to_model(vit(), r=3), add_lora_to_model(vit(), r=16, use_qlora=True)):
        before = dense.snapshot(model)
        kinds = dense.classes(model)
        with pytest.raises(InputError, match=message):
            if "settings" in options:
                adapt_layers(model, {"heads.head": LoRASettings(r=2), options["settings"]: LoRASettings()})
            add_lora_to_model(model, **options)
        assert dense.classes(model) == kinds
        dense.assert_unchanged(before, model)


def test_layers_that_compute_something_else_are_left_alone():
    """Subclasses, uncommon attention, and layers whose `weight` pruning or weight_norm sets before every call. Swin's
    attention gives the weights of qkv and proj to a function; an adapter there would never learn."""
    OwnLinear = type("OwnLinear", (nn.Linear,), {})
    Own = type("Own", (nn.MultiheadAttention,), {})
    model = nn.Sequential(nn.Linear(4, 4), OwnLinear(4, 4), Own(4, 2), nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    prune.l1_unstructured(model[3], "weight", amount=0.5)
    prune.l1_unstructured(model[4].out_proj, "weight", amount=0.5)
    for options in ({"kdim": 6}, {"add_bias_kv": True}, {"add_zero_attn": True}):
        model.append(nn.MultiheadAttention(4, 2, **options))
    add_lora_to_model(model, r=2)
    assert adapted_names(model) == {"0"}
    with pytest.raises(InputError, match="no layer matches 1; there are: 0"):
        add_lora_to_model(model, r=2, target_modules="1")
    model = frozen(SwinTransformer([4, 4], 24, [2], [2], [4, 4], num_classes=5))
    model(images()).sum().backward()
    mlps = {f"features.1.{i}.mlp.{j}" for i in (0, 1) for j in (0, 3)}
    assert adapted_names(model) == mlps | {"features.0.0"} and unused_adapters(model) == []


def test_adapters_come_before_distributed_data_parallel():
    """It exchanges the gradients that it knew of when it was made; new adapters would drift apart without a word."""
    wrapper = nn.Sequential(vit())
    wrapper.__class__ = nn.parallel.DistributedDataParallel  # one that needs no processes
    for change in (add_lora_to_model, freeze_backbone_params):
        with pytest.raises(InputError, match="add adapters and freeze before it wraps"):
            change(wrapper)
    with pytest.raises(InputError, match="torchrun"):  # nor is there a place for them in DataParallel
        LoRALinear(4, 4)._replicate_for_data_parallel()


def test_a_layer_used_twice_is_adapted_once_and_a_weight_that_layers_share_is_refused():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    stock = copy.deepcopy(model)
    dense.randomize_adapters(add_lora_to_model(model, r=2))
    assert count_parameters(model)["lora"] == 2 * (4 + 4)
    compare_with_dense(stock, model, [torch.randn(3, 4)], FP32)
    stock = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    stock[1].weight = stock[0].weight
    with pytest.raises(InputError, match="0 shares its weight with another layer"):
        add_lora_to_model(stock, r=2)
    assert not adapted_names(stock)


@in_float_and_4_bits
def test_each_layer_may_have_settings_of_its_own(four_bits):
    model = vit()
    settings = {
        "encoder.layers.encoder_layer_0.mlp.3": LoRASettings(r=2),
        BLOCK: LoRASettings(r=3, lora_alpha=6, lora_dropout=0.1),
        f"{BLOCK}.out_proj": LoRASettings(r=5, lora_alpha=1, use_rslora=True),
    }
    for _ in range(2):  # adapters that are there are replaced
        assert adapt_layers(model, settings, four_bits) is model
        assert adapted_names(model) == set(settings)
        for name, own in settings.items():
            layer = model.get_submodule(name)
            assert recorded_settings(vars(layer)) == own and layer.scaling == own.scaling
            assert layer.base_bits == (4 if four_bits else 32)
            assert all(A.shape[0] == B.shape[1] == own.r for _, _, A, B in dense.adapters(layer))
    del settings[f"{BLOCK}.out_proj"]  # then it follows its attention
    adapt_layers(model, settings, four_bits)
    assert model.get_submodule(f"{BLOCK}.out_proj").r == 3


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("build", [resnet, vit])
def test_new_adapters_take_the_place_of_others_merged_before_or_not(build, storage):
    """They start as the base model, and the record of the base stays: by it an adapter file knows what has trained."""
    model = frozen(build(), std=0.0, **STORAGE[storage]).eval()
    x = images(16)
    expected = model(x)
    base = {name: tensor for name, tensor in dense.snapshot(model).items() if "lora_" not in name}
    digests = dict(record_of(model).base_digests)
    for merged in (False, True):
        dense.randomize_adapters(model)
        if merged:
            LoRAManager(model).merge_lora_weights()
            with pytest.raises(InputError, match="call unmerge_lora_weights"):  # which would discard what is learned
                freeze_backbone_params(model, freeze=False)
        assert not torch.allclose(model(x), expected, atol=1e-2)
        frozen(model, std=0.0, r=3, **STORAGE[storage])
        assert record_of(model).base_digests == digests
        assert {A.shape[0] for layer in model.modules() for _, _, A, _ in dense.adapters(layer)} == {3}
        dense.assert_unchanged(base, model, base)
        assert_close(model(x), expected, FP32)


@pytest.mark.parametrize("bits, options", FEWER_BITS.items())
def test_float_layers_become_ones_in_fewer_bits_which_never_train_nor_become_other_ones(bits, options):
    model = add_lora_to_model(add_lora_to_model(vit()), **options)
    layer = model.encoder.layers[0].mlp[0]
    assert layer.base_bits == bits and isinstance(layer, QLoRALinear) == (bits == 4)
    freeze_backbone_params(model, freeze=False)
    assert not layer.weight.requires_grad and model.class_token.requires_grad
    for other in ({"use_qlora": bits != 4}, {**options, "target_modules": "self_attention"}):
        with pytest.raises(InputError, match=f"in {bits} bits, its float weight is gone"):
            add_lora_to_model(model, **other)
    add_lora_to_model(model, r=3, use_qlora=bits == 4)  # it stays as it is stored
    assert layer.base_bits == bits


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("build, last", [(resnet, None), (resnet, 2), (vit, None), (vit, 1)])
@pytest.mark.parametrize("merged_before", [False, True], ids=["", "merged before"])
def test_a_model_without_lora_is_a_stock_model(build, last, storage, merged_before):
    """Same classes, attributes and keys; with its base weights bit for bit, or with the merged ones."""
    stock = build().eval()
    x = images(16)
    model = frozen(copy.deepcopy(stock), lora_dropout=0.1, adapt_last=last, **STORAGE[storage])
    set_gradient_checkpointing(model, "full")
    twin = dense_twin(stock, model)
    trains = set(dense.trained(model))
    manager = LoRAManager(model)
    if merged_before:
        manager.merge_lora_weights()
        assert list(model.state_dict()) == list(stock.state_dict())
    if storage == "float":
        without = LoRAManager(copy.deepcopy(model)).unload()
        dense.assert_unchanged(dense.snapshot(stock), without)
    else:
        with pytest.raises(InputError, match=r"is in \d+ bits.*take the merged weights with merge=True"):
            manager.unload()
        without = model
    assert manager.unload(merge=True) is model
    for network in (model, without):
        for ours, theirs in zip(network.modules(), stock.modules(), strict=True):
            assert type(ours) is type(theirs)
            assert set(vars(ours)) - set(vars(theirs)) <= {"toolkit_record"}
        assert list(network.state_dict()) == list(stock.state_dict())
        assert set(dense.trained(network)) == {name for name in trains if "lora_" not in name}
    assert_close(model.eval()(x), twin(x.double()), FP32)
    assert all(module.training for module in model.train().modules())


def test_counts_are_of_elements():
    """However few bits hold each."""
    model = vit()
    total = sum(p.numel() for p in model.parameters())
    lora = 2 * 8 * (3 * (16 + 16) + (16 + 16) + 2 * (16 + 32))
    head = 16 * 5 + 5
    assert count_parameters(model) == {"total": total, "trainable": total, "frozen": 0, "lora": 0}
    for four_bits in (False, True):
        frozen(model, r=8, use_qlora=four_bits)
        counts = {"total": total + lora, "trainable": lora + head, "frozen": total - head, "lora": lora}
        assert count_parameters(model) == counts


def test_statistics_of_a_frozen_batch_norm_stay():
    """Whatever train() says (peft issue 1732); until it is unfrozen, and but for those of the head."""
    model = frozen(nn.Sequential(resnet(), nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(5, 4), nn.BatchNorm1d(4)))
    model.eval().train()
    model(images(count=4))
    freeze_backbone_params(model, freeze=False)
    model(images(count=4))
    for name, count in model.state_dict().items():
        assert not name.endswith("num_batches_tracked") or count == 1
    for training in (False, True):  # unfrozen, they are in the mode of their model
        freeze_backbone_params(model.train(training))
        freeze_backbone_params(model, freeze=False)
        assert {module.training for module in model.modules()} == {training}
    head = nn.BatchNorm1d(4)
    frozen(nn.Sequential(OrderedDict(backbone=nn.Linear(4, 4), head=head))).train()
    assert head.training and head.weight.requires_grad


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("build, last", [(resnet, 2), (vit, 1)])
def test_the_last_blocks_alone_are_adapted_and_what_is_below_is_stored_as_they_are(build, last, storage):
    """It is what the stock model computes with the rounded weights; nothing below is kept for backward."""
    stock = build().eval()
    x = images(16)
    model = frozen(copy.deepcopy(stock), adapt_last=last, **STORAGE[storage]).eval()
    blocks = block_names(stock)[-last:]
    stored = {name: m for name, m in model.named_modules() if getattr(m, "float_digests", {})}
    assert set(choose_layers(stock)) <= set(stored) or storage == "float"
    layers = adapted_layers(model)
    assert {name for name, layer in layers.items() if layer.r} == {n for n in layers if n.startswith(tuple(blocks))}
    compare_with_dense(stock, model, [x], FP32)
    given = []
    model.get_submodule(blocks[0]).register_forward_pre_hook(lambda module, inputs: given.append(*inputs))
    model(x).sum().backward()
    assert not given[0].requires_grad


@pytest.mark.filterwarnings("ignore:the last layer")
def test_adapters_that_no_gradient_reaches_are_named():
    """Of a layer whose weight is used without calling it, and of one that is left out."""
    model = frozen(nn.Sequential(OrderedDict(called=nn.Linear(4, 4), read=nn.Linear(4, 4), spare=nn.Linear(4, 4))))
    assert unused_adapters(model) == ["called", "read", "spare"]  # nothing was computed yet
    F.linear(model.called(torch.randn(2, 4)), model.read.weight).sum().backward()
    assert unused_adapters(model) == ["read", "spare"]
    model.spare.requires_grad_(False)  # does not want any
    assert unused_adapters(torch.compile(model, backend="eager")) == ["read"]


class SeparateBias(nn.Module):
    """As attention in timm's BEiT, EVA-02 and Swin v2, which has a bias for q and v alone."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 4, bias=False)
        self.bias = nn.Parameter(torch.ones(4))
        self.qkv_bias_separate = False

    def forward(self, x):
        if self.qkv_bias_separate:
            return self.qkv(x) + self.bias
        return F.linear(x, self.qkv.weight, self.bias)


@in_float_and_4_bits
def test_attention_that_reads_a_weight_to_add_a_bias_calls_the_layer_instead(four_bits):
    stock = SeparateBias()
    model = frozen(copy.deepcopy(stock), use_qlora=four_bits)
    x = torch.randn(2, 4)
    compare_with_dense(stock, model, [x], FP32)
    LoRAManager(model).unload(merge=True)
    assert not model.qkv_bias_separate and unused_adapters(model) == []
    assert_close(model(x), F.linear(x, model.qkv.weight, model.bias), FP32)


def two_layers() -> nn.Module:
    return nn.Sequential(OrderedDict(body=nn.Linear(6, 8), cls=nn.Linear(8, 3)))


with_own_head = partial(known, two_layers, classes=3)  # the same body each time


@pytest.mark.parametrize("head", ["cls", ["cls"]])
def test_a_head_of_any_name_trains_and_is_saved_whole(head, tmp_path):
    model = frozen(with_own_head(), head=head)
    x = torch.randn(4, 6)
    assert type(model.cls) is nn.Linear and model.cls.weight.requires_grad and not model.body.weight.requires_grad
    LoRAManager(model).save_lora_checkpoint(tmp_path / "a.pth")
    again = add_lora_to_model(with_own_head(), r=2, head=head)
    LoRAManager(again).load_lora_checkpoint(tmp_path / "a.pth")
    manager = LoRAManager(with_own_head(), head=head)
    manager.load_lora_checkpoint(tmp_path / "a.pth", name="a")
    manager.use("a")
    for loaded in (again, manager.model):
        torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.filterwarnings("error")
def test_a_last_layer_that_is_no_head_is_reported_unless_it_is_meant_to_be_frozen():
    for before, targets in (("body", None), ("fc", "fc")):  # whatever the name of the one before it
        model = nn.Sequential(OrderedDict({before: nn.Linear(6, 8), "cls": nn.Linear(8, 3)}))
        with pytest.warns(UserWarning, match="last layer, cls, .* with the backbone: if it is new, give head='cls'"):
            frozen(model, target_modules=targets)
        assert not model.cls.weight.requires_grad
    add_lora_to_model(two_layers(), r=2, target_modules=["cls"])  # it has an adapter because it was asked for
    add_lora_to_model(two_layers(), r=2, head="body")
    headless = vit()
    headless.heads = nn.Identity()
    add_lora_to_model(headless, r=2, target_modules="self_attention")  # the last layer is one of many alike
    inside = resnet()
    frozen(nn.Sequential(inside))  # its head is found in another module
    assert type(inside.fc) is nn.Linear and inside.fc.weight.requires_grad
    with pytest.raises(InputError, match=r"no module is named 'clss', so it cannot be the classifier head: did you"):
        add_lora_to_model(two_layers(), r=2, head="clss")
