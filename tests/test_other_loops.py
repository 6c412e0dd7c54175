"""What other people's code does with a model: modules are replaced, hooked, copied and saved, networks put in inference
mode, exported and compiled. docs/python.md's snippets are run in `test_readme.py`."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from functools import partial

import dense
import pytest
import torch
from dense import BF16, EXACT, FP32, assert_close, dense_twin, frozen, images, resnet, trained, vit
from torch import nn
from torch.utils._pytree import tree_map_only
from torchvision.models.resnet import Bottleneck

from finetune_lora import set_gradient_checkpointing
from lora_utils import LoRAManager

RESNET = partial(resnet, layers=(1, 1, 0, 0))  # a block as such, and one that halves its maps
in_both = pytest.mark.parametrize("build", [RESNET, vit], ids=["resnet", "vit"])
in_both_modes = pytest.mark.parametrize("mode", ["none", "full"])

IN_A_RESNET = {
    "a stem": {"conv1": nn.Conv2d(3, 16, 7, 2, 3, bias=False)},
    "an activation of the stem": {"relu": nn.ELU()},
    "no pooling, as for small images": {"maxpool": nn.Identity()},
    "pooling that rounds up": {"maxpool": nn.MaxPool2d(3, 2, 1, ceil_mode=True)},
    "no norm": {"bn1": nn.Identity()},
    "another norm": {"layer1.0.conv2": nn.Identity(), "layer1.0.bn1": nn.GroupNorm(4, 16)},
    "an activation": {"layer1.0.relu": nn.ELU()},
    "norms over processes": nn.SyncBatchNorm.convert_sync_batchnorm,
}
# In the last block, which computes the class token alone unless something mixes it with others.
IN_A_VIT = {
    "no LayerNorm": {"ln_1": nn.Identity(), "ln_2": nn.Identity()},
    "a LayerNorm of a sequence": {"ln_1": nn.LayerNorm((5, 16), elementwise_affine=False)},
    "a LayerNorm of a sequence before the MLP": {"ln_2": nn.LayerNorm((5, 16))},
    "an MLP that mixes tokens": {"mlp": nn.Sequential(nn.Conv1d(5, 5, 1, bias=False))},
    "an activation": {"mlp.1": nn.Tanh()},
    "stock layers": {"self_attention": nn.MultiheadAttention(16, 2, batch_first=True), "mlp.0": nn.Linear(16, 32)},
    "an MLP": {"mlp": nn.Sequential(nn.Linear(16, 7), nn.GELU(), nn.Linear(7, 16))},
    "some of its layers": lambda block: setattr(block, "mlp", nn.Sequential(block.mlp[0], nn.Tanh(), block.mlp[3])),
    "no dropout": lambda block: [block.mlp.pop(place) for place in (4, 2)],
    "a dropout": {"mlp.2": nn.Hardtanh(-0.1, 0.1)},
}


@pytest.mark.parametrize("build, change", [*((RESNET, c) for c in IN_A_RESNET), *((vit, c) for c in IN_A_VIT)])
@in_both_modes
def test_a_block_looks_its_children_up_at_each_call(build, change, mode):
    stock = build().double().eval()
    x = images(16, dtype=torch.float64)
    model = frozen(copy.deepcopy(stock)).eval()
    set_gradient_checkpointing(model, mode)
    for network in (stock, model):
        children = IN_A_VIT[change] if build is vit else IN_A_RESNET[change]
        block = network.encoder.layers[1] if build is vit else network
        if callable(children):
            children(block)
            continue
        for name, child in children.items():
            block.set_submodule(name, copy.deepcopy(child))
    dense.compare_with_dense(stock, model.double().eval(), [x], EXACT)


@in_both
@in_both_modes
def test_a_hook_sees_what_it_sees_in_the_stock_model(build, mode):
    """On any module, alone or on all at once: both the input and the output."""
    stock = build().double().eval()
    x = images(16, dtype=torch.float64)
    model = frozen(copy.deepcopy(stock)).eval()
    set_gradient_checkpointing(model, mode)
    twin = dense_twin(stock, model)
    seen = []

    def record(module, inputs, output):  # copies: what follows may work in place
        output = output[0] if isinstance(output, tuple) else output
        seen.append((inputs[0].detach().clone(), output.detach().clone()))

    # The stock attention never calls its projection.
    names = [name for name, _ in twin.named_modules() if "out_proj" not in name]
    for chosen in (*([name] for name in names), names):
        seen.clear()
        for network in (twin, model):
            handles = [network.get_submodule(name).register_forward_hook(record) for name in chosen]
            network(x)
            for handle in handles:
                handle.remove()
        half = len(seen) // 2
        assert half >= len(chosen)
        assert_close(seen[half:], seen[:half], EXACT, str(chosen))


def doubled(forward: Callable) -> Callable:
    return lambda *inputs, **options: tree_map_only(torch.Tensor, lambda y: 2 * y, forward(*inputs, **options))


@in_both
@pytest.mark.parametrize("options", [{}, {"target_modules": r".*(conv1|mlp\.0)"}], ids=["all adapted", "some adapted"])
def test_a_forward_that_replaces_a_module_s_own_is_called(build, options):
    """As recipes for attention maps or prompts have."""
    stock = build().double().eval()
    x = images(16, dtype=torch.float64)
    for name, _ in stock.named_modules():
        if name and "out_proj" not in name:  # which the stock attention never calls
            model = frozen(copy.deepcopy(stock), **options).eval()
            twin = dense_twin(stock, model)
            for network in (twin, model):
                module = network.get_submodule(name)
                module.forward = doubled(module.forward)
            assert_close(model(x), twin(x), EXACT, name)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_every_kind_are_called_in_a_vit(kind):
    """Of one module, and those for all modules."""
    names = ["ln_1", "ln_2", "mlp", "mlp.1", "mlp.2"]
    for chosen in (*([name] for name in names), names):
        model = frozen(vit())
        modules = {model.encoder.layers[1].get_submodule(name) for name in chosen}
        register = getattr(torch.nn.modules.module, f"register_module_{kind}_hook")
        if len(modules) == 1:
            register = getattr(*modules, f"register_{kind}_hook")
        seen = set()
        with register(lambda module, *_, seen=seen: seen.add(module)):
            model(images(16)).sum().backward()
        assert modules <= seen


@in_both
@in_both_modes
def test_a_copied_layer_is_a_layer_and_a_deleted_model_is_gone(build, mode):
    """Neither the model around it can be reached from it, nor a float copy of a weight in 4 bits. And at once, without
    the garbage collector: on a GPU the next model needs the memory."""
    model = frozen(build(), use_qlora=True)
    set_gradient_checkpointing(model, mode)
    model(images(16)).sum().backward()
    remembered = []
    for module in model.modules():
        remembered.append(weakref.ref(module))
        if not list(module.children()):
            file = io.BytesIO()
            torch.save(module, file)
            held = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
            assert file.tell() < held + 10_000
    gc.disable()
    try:
        del model, module
        assert {reference() for reference in remembered} == {None}
    finally:
        gc.enable()


@pytest.mark.parametrize("made_inside", [True, False], ids=["made inside", "made outside"])
@pytest.mark.parametrize("build", [partial(RESNET, Bottleneck), vit], ids=["resnet", "vit"])
@in_both_modes
def test_networks_in_inference_mode(build, mode, made_inside):
    """One that was made outside of it then trains there; both merge inside, where BatchNorms are folded as well."""
    with torch.inference_mode(made_inside):
        stock = build().double().eval()
        x = images(16, dtype=torch.float64)
        model = frozen(copy.deepcopy(stock)).train(not made_inside)
        set_gradient_checkpointing(model, mode)
        twin = dense_twin(stock, model)
    with torch.inference_mode():
        assert_close(model(x), twin(x), EXACT)
    if not made_inside:
        dense.compare_with_dense(stock, model, [x], EXACT)
    with torch.inference_mode():
        LoRAManager(model).merge_lora_weights()
        assert_close(model(x), twin(x), EXACT)
        assert dense.count_operations(lambda: model(x), "batch_norm") == 0
        LoRAManager(model).unmerge_lora_weights()
        assert_close(model(x), twin(x), EXACT)


@pytest.mark.parametrize("build, side, four_bits", [(vit, 16, True), (resnet, 32, False)], ids=["merged", "unloaded"])
def test_jit_refuses_adapters_and_traces_what_is_merged(build, side, four_bits):
    model = frozen(build(), use_qlora=four_bits).eval()
    x = images(side)
    file = io.BytesIO()
    answer = model(x)
    with pytest.raises(RuntimeError, match=r"use torch\.export, or LoRAManager"):
        torch.jit.trace(model, x)
    if four_bits:
        LoRAManager(model).merge_lora_weights()
    else:
        LoRAManager(model).unload(merge=True)
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    assert_close(torch.jit.load(file)(torch.cat([x, x])), torch.cat([answer] * 2), FP32)


LAYERS = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 8), nn.GELU(), nn.Linear(8, 4))
WHOLE = [(vit, 16, False, False), (vit, 16, True, True), (partial(RESNET, Bottleneck), 32, False, False)]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in [*WHOLE, (RESNET, 32, True, False)]]


@pytest.mark.parametrize("build, side, four_bits, low", [(partial(nn.Sequential, *LAYERS), 8, False, False), *SLOW])
def test_a_model_is_one_graph_and_computes_the_same(build, side, four_bits, low):
    """The compiled step comes first: what an eager one keeps for the next is not there yet."""
    model = frozen(build(), use_qlora=four_bits).train()
    x = images(side)
    steps = []
    for network in (torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False), model):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = network(x)
        y.float().square().sum().backward()
        steps.append([y.detach(), *(p.grad for p in trained(model).values())])
    assert_close(*steps, 5 * BF16 if low else 10 * FP32)
    torch._dynamo.reset()
