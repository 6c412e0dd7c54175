"""The judge of every adapted layer: the stock PyTorch model with ``W + s B A`` as an ordinary weight, in float64."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vision_transformer import VisionTransformer

from finetune_lora import add_lora_to_model, freeze_backbone_params

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]  # for the parameter `device`
FP32, BF16 = 1e-5, 1e-2  # the relative errors that are promised
# With TF32 CUDA's float32 convolutions and products are off by 1e-3; NVIDIA's containers turn it on for both.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
EXACT = 1e-9  # in float64, where a ReLU does not change its mind for a rounding error
FEWER_BITS = {16: {"base_dtype": torch.bfloat16}, 8: {"base_dtype": torch.int8}, 4: {"use_qlora": True}}


def count_operations(function: Callable[[], object], *parts: str) -> int:
    """How many operations PyTorch runs there whose names have one of these parts."""
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            names.append(str(operation))
            return operation(*args, **(kwargs or {}))

    with Names():
        function()
    return sum(part in name for name in names for part in parts)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual = actual.detach().double().cpu()
    expected = expected.detach().double().cpu()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-12)).item()


def assert_close(actual, expected, tolerance: float, name: str = "tensor") -> None:
    """Of tensors, or None, or structures of these: the relative error of each tensor."""
    found, structure = tree_flatten(actual)
    wanted, of_wanted = tree_flatten(expected)
    assert structure == of_wanted, f"{name}: {structure} is not {of_wanted}"
    for number, (own, other) in enumerate(zip(found, wanted, strict=True)):
        assert (own is None) == (other is None), f"{name}, {number}: one of the two is None"
        if own is not None:
            error = relative_error(own, other)
            assert error < tolerance, f"{name}, {number}: relative error {error:.1e}, {tolerance:.0e} is allowed"


def randomize_adapters(model: nn.Module, std: float = 0.3) -> nn.Module:
    """B starts as zero, with which nothing could be told apart."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
    return model


def adapters(layer: nn.Module) -> Iterator[tuple[str, slice, nn.Parameter, nn.Parameter]]:
    """(weight, its rows, A, B) of every adapter that the layer itself owns."""
    own = dict(layer.named_parameters(recurse=False)) if getattr(layer, "r", 0) else {}
    if "lora_A" in own:
        yield "weight", slice(None), own["lora_A"], own["lora_B"]
    for i, p in enumerate("qkv"):
        if f"lora_A_{p}" in own:
            rows = slice(i * layer.embed_dim, (i + 1) * layer.embed_dim)
            yield "in_proj_weight", rows, own[f"lora_A_{p}"], own[f"lora_B_{p}"]


def rounded(stock: nn.Module, adapted: nn.Module) -> nn.Module:
    """The stock model with the weights that a base in fewer bits stands for."""
    stock = copy.deepcopy(stock)
    for name, layer in adapted.named_modules():
        for weight in getattr(layer, "float_digests", ()):
            getattr(stock.get_submodule(name), weight).data = layer.base().dense(torch.float32)
    return stock


def dense_twin(stock: nn.Module, adapted: nn.Module) -> nn.Module:
    """The stock model in float64, every adapted weight replaced by ``W + s B A``, all of it trainable."""
    twin = rounded(stock, adapted).double().requires_grad_(True)
    with torch.no_grad():
        for name, layer in adapted.named_modules():
            for weight, rows, A, B in adapters(layer):
                W = getattr(twin.get_submodule(name), weight)
                W[rows] += (layer.scaling * B.double() @ A.double()).view_as(W[rows])
    return twin


def expected_gradients(twin: nn.Module, adapted: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, the adapted model's gradient, the one that it must be), by the chain rule from the dense gradients:
    gA = s B^T dW and gB = s dW A^T."""
    dense = dict(twin.named_parameters())
    for name, layer in adapted.named_modules():
        for weight, rows, A, B in adapters(layer):
            dW = getattr(twin.get_submodule(name), weight).grad[rows].flatten(1)
            yield f"{name}.{weight}.A", A.grad, layer.scaling * B.double().T @ dW
            yield f"{name}.{weight}.B", B.grad, layer.scaling * dW @ A.double().T
    for name, parameter in adapted.named_parameters():
        if "lora_" not in name and parameter.requires_grad:
            yield name, parameter.grad, dense[name].grad


def compare_with_dense(stock, adapted, inputs, tolerance, call=nn.Module.__call__, autocast=None, around_backward=None):
    """One forward and backward of both: outputs, the gradients of inputs, adapters and whatever trains, and buffers
    must agree; and the outputs once more without gradients.

    `call` may return a tensor or a tuple of tensors and None. An input that occurs twice stays one tensor. `autocast`
    and `around_backward` are the dtypes of autocast in the adapted model's forward pass and around backward."""
    adapted.zero_grad()
    twin = dense_twin(stock, adapted)
    ours = {id(x): x.detach().clone().requires_grad_() for x in inputs}
    theirs = {id(x): x.detach().double().requires_grad_() for x in inputs}

    def outputs(model: nn.Module, tensors: dict[int, Tensor], low: torch.dtype | None = None) -> tuple:
        with torch.autocast(inputs[0].device.type, low, enabled=low is not None):
            found = call(model, *(tensors[id(x)] for x in inputs))
        return found if isinstance(found, tuple) else (found,)

    found = outputs(adapted, ours, autocast)
    expected = outputs(twin, theirs)
    losses = []
    assert_close(found, expected, tolerance, "outputs")
    for y, z in zip(found, expected, strict=True):
        if z is not None:
            upstream = torch.randn_like(y).double()  # the same number for both
            losses += [(y.double() * upstream).sum(), (z * upstream).sum()]
    with torch.autocast(inputs[0].device.type, around_backward, enabled=around_backward is not None):
        torch.autograd.backward(losses)
    for key in ours:
        assert_close(ours[key].grad, theirs[key].grad, tolerance, "gradient of an input")
    for name, gradient, wanted in expected_gradients(twin, adapted):
        assert_close(gradient, wanted, tolerance, f"gradient of {name}")
    for name, buffer in twin.named_buffers():
        assert_close(adapted.get_buffer(name), buffer, tolerance, name)
    with torch.no_grad():
        assert_close(outputs(adapted, ours, autocast), expected, tolerance, "outputs without gradients")


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module, names=None) -> set[str]:
    """Which of these tensors, or of all that there were, have changed by a bit."""
    now = model.state_dict()
    return {name for name in names or before if not torch.equal(before[name], now[name])}


def assert_unchanged(before: dict[str, Tensor], model: nn.Module, names=None) -> None:
    """Bit for bit, and with the same keys if no names are given."""
    assert names is not None or list(before) == list(model.state_dict())
    assert changed(before, model, names) == set()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def resnet(block=BasicBlock, layers=(1, 1, 1, 1), classes: int = 5) -> ResNet:
    """A ResNet as torchvision has it, of few layers and narrow, whose BatchNorms have seen something."""
    with torch.device("meta"):
        model = ResNet(block, [1, 1, 1, 1])
    model.inplanes = 16
    model.conv1, model.bn1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
    for number, (width, count) in enumerate(zip((16, 24, 32, 40), layers, strict=True), start=1):
        stage = model._make_layer(block, width, count, stride=1 + (number > 1)) if count else nn.Sequential()
        setattr(model, f"layer{number}", stage)
    model.fc = nn.Linear(model.inplanes, classes)
    return seen(model)


def seen(model: nn.Module) -> nn.Module:
    """Its BatchNorms have parameters and statistics as if they had seen something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def vit(**options) -> VisionTransformer:
    model = VisionTransformer(**{"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16,
                                 "mlp_dim": 32, "num_classes": 5, **options})  # fmt: skip
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it as zero, and nothing below would get a gradient
    return model


def known(build: Callable[[], nn.Module], classes: int = 5, seed: int = 1) -> nn.Module:
    """The same model for the same seed, as if it came from a checkpoint. Its head is another one each time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
    *_, (name, former) = model.named_modules()
    head = nn.Linear(former.in_features, classes)
    nn.init.normal_(head.weight)
    model.set_submodule(name, head)
    return model.eval()


def images(side: int = 32, count: int = 2, **kwargs) -> torch.Tensor:
    return torch.randn(count, 3, side, side, **kwargs)


def frozen(model: nn.Module, std: float = 0.05, **options) -> nn.Module:
    freeze_backbone_params(randomize_adapters(add_lora_to_model(model, **{"r": 2, **options}), std))
    return model


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def loss_and_gradients(model: nn.Module, x: torch.Tensor, seed: int = 7):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), torch.arange(len(x), device=x.device) % 5)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def saved_storages(function: Callable[[], object]) -> dict[int, int]:
    """What a forward keeps for backward: bytes by storage, so that views and one tensor saved twice count once."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """What a forward keeps for backward, parameters left out."""
    saved = saved_storages(lambda: model(x))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for pointer, size in saved.items() if pointer not in parameters)
