"""Measure training steps side by side: full fine-tuning, linear probe, PEFT, loralib, and LoRA and QLoRA from here.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.compare_peers --model resnet50 --batch-size 16
    python -m benchmarks.compare_peers --model vit_b_16 --batch-size 8 --steps 20
    python -m benchmarks.compare_peers --model vit_b_16 --batch-size 8 --precision bf16
    python -m benchmarks.compare_peers --model vit_b_16 --batch-size 64 --device cuda --precision bf16
    python -m benchmarks.compare_peers --model resnet18 --batch-size 32 --variants full,peft,lora
    python -m benchmarks.compare_peers --model timm:tf_efficientnet_lite0 --batch-size 8 --variants full,peft,lora

Time: all variants live in one process and take one step each per round, in an order drawn anew for every round, so that
a machine that slows down slows all of them down. What counts is the median of the ratios within a round.
Memory: each variant takes a few steps in a fresh process of its own, above its imports. On CUDA that is the peak of the
tensors' memory. On a CPU it is told twice: "tensors" is the peak of the process when every large tensor is a mapping of
its own, which ends with it; "resident" is the peak with glibc's defaults, which counts the holes in its heap as well.
The layers here multiply by oneDNN in float32 on AMD's CPUs with AVX-512, where PyTorch itself calls MKL. The variants
named oneDNN do the same, and where they are measured all speeds are against them. A variant that fails, for want of
memory say, is left out, and the last line of its error is told.
Denormal numbers, those below the normal range of their dtype, are slow on Intel's processors, and no clock elsewhere
shows them. On a CPU one more step, which is not timed, counts the operations on whose way there was one (x86 alone; in
the first thread's share of the work), and how many were written into tensors.
The variants named `lora_...` that are not in the table by default undo one thing each, such as `lora_unfolded`.
Every variant has the same precision, memory format, optimizer (AdamW) and images (random, never zeros), and is checked
to train: a finite loss, a gradient for everything that should have one and for nothing else.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import MEASURED
from finetune_lora import add_lora_to_model, freeze_backbone_params
from lora import backends, functional, fusion
from lora.adapted import choose_layers
from lora.followed_norms import follow_statistics
from lora.fusion import set_gradient_checkpointing
from lora.weights import bitsandbytes_functional
from lora_utils import LoRAManager
from toolkit import InputError, homed
from toolkit.answers.probe import linear_head
from toolkit.config import positive_int
from toolkit.devices import autocast, peak_memory_bytes, select_device, select_precision
from toolkit.models.backbones import block_names, build_backbone, head_name
from toolkit.models.names import default_image_size
from toolkit.models.norms import FreezableBatchNorm2d, constants_kept
from toolkit.run.runs import run_script

MODELS = ("resnet18", "resnet50", "vit_small", "vit_b_16", "vit_l_16", "timm:resnet50", "timm:tf_efficientnet_lite0")
NUM_CLASSES = 100
MEMORY_STEPS = 3  # AdamW's state exists from the second step on
WARMUP_STEPS = 2  # B is zero at first, so A has a gradient from the second step on

# ------------------------------------------------------------------------------------------------------- the variants


def full_fine_tuning(model: nn.Module, args) -> nn.Module:
    return model


def linear_probe(model: nn.Module, args) -> nn.Module:
    freeze_backbone_params(model)
    return model


def lora(model: nn.Module, args, checkpointing: str = "none", **options) -> nn.Module:
    base_dtype = select_precision(args.precision, args.device)
    add_lora_to_model(model, r=args.rank, lora_alpha=2 * args.rank, base_dtype=base_dtype, **options)
    freeze_backbone_params(model)
    set_gradient_checkpointing(model, checkpointing)
    return model


def lora_float_base(model: nn.Module, args, base_dtype: torch.dtype | None = None) -> nn.Module:
    add_lora_to_model(model, r=args.rank, lora_alpha=2 * args.rank, base_dtype=base_dtype)
    freeze_backbone_params(model)
    return model


def lora_int8(model: nn.Module, args) -> nn.Module:
    return lora_float_base(model, args, torch.int8)


def lora_last_half(model: nn.Module, args, **options) -> nn.Module:
    return lora(model, args, adapt_last=half_of_the_blocks(model), **options)


def qlora_last_half(model: nn.Module, args) -> nn.Module:
    return lora_last_half(model, args, use_qlora=True)


def half_of_the_blocks(model: nn.Module) -> int:
    return len(block_names(model)) // 2


def lora_and_norms(model: nn.Module, args) -> nn.Module:
    lora(model, args)
    freeze_backbone_params(model, train_norms=True)
    return model


def lora_following_norms(model: nn.Module, args) -> nn.Module:
    """The statistics of BatchNorm follow the adapters; on random images, which cost what others do."""
    lora(model, args)
    follow_statistics(model, [torch.randn(16, 3, args.image_size, args.image_size)])
    return model


def qlora(model: nn.Module, args) -> nn.Module:
    return lora(model, args, use_qlora=True)


def qlora_checkpointed(model: nn.Module, args) -> nn.Module:
    return lora(model, args, "full", use_qlora=True)


def peft_lora(model: nn.Module, args) -> nn.Module:
    """PEFT on exactly the layers that are adapted here, the head trained through `modules_to_save`.

    PEFT adapts attention as a whole too: one adapter on the packed q, k, v and one on the output projection. In every
    forward it puts W + s B A in the weight's place, through which automatic differentiation then forms the dense
    gradient.
    """
    import peft

    names = list(choose_layers(model))
    config = peft.LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=names, modules_to_save=[head_name(model)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config)
    adapted = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    adapted = {name for name in adapted if not name.endswith("self_attention.base_layer.out_proj")}
    if adapted != set(names):
        raise RuntimeError(f"PEFT adapts other layers: {sorted(adapted ^ set(names))[:4]}")
    return model


def peft_frozen_norms(model: nn.Module, args) -> nn.Module:
    """PEFT with the BatchNorms put into eval mode by hand, as they always are here; PEFT leaves them training."""
    model = peft_lora(model, args)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__, module.frozen = FreezableBatchNorm2d, True
    return model


def peft_8_bits(model: nn.Module, args) -> nn.Module:
    """PEFT over bitsandbytes' layers in 8 bits, which transformers' `load_in_8bit` puts in: a ViT's MLPs.

    Attention's packed weight is no linear layer, and stays float. Backward makes a dense weight of the 8 bits.
    """
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # that float32 becomes float16 is told at each product
    for name, layer in choose_layers(model).items():
        if isinstance(layer, nn.Linear):
            new = Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
            new.weight, new.bias = Int8Params(layer.weight.data, requires_grad=False), layer.bias
            model.set_submodule(name, new)
    model.is_loaded_in_8bit = True
    return peft_lora(model.to(args.device), args)


def loralib_lora(model: nn.Module, args) -> nn.Module:
    """loralib's layers put in by hand, as its README has it.

    Its limits: a kxk convolution gets rank r k instead of r; `nn.MultiheadAttention` has no counterpart, so that in a
    ViT only the two linear layers of each MLP are adapted.
    """
    import loralib

    options = {"r": args.rank, "lora_alpha": 2 * args.rank, "merge_weights": False}
    for name, layer in choose_layers(model).items():
        if isinstance(layer, nn.Conv2d):
            options_here = {"stride": layer.stride, "padding": layer.padding, "bias": layer.bias is not None}
            new = loralib.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size[0], **options, **options_here)
            new.conv.load_state_dict(layer.state_dict())
        elif isinstance(layer, nn.Linear):
            new = loralib.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, **options)
            new.load_state_dict(layer.state_dict(), strict=False)
        else:
            continue
        model.set_submodule(name, new)
    loralib.mark_only_lora_as_trainable(model)
    getattr(model, head_name(model)).requires_grad_(True)
    return model


def onednn_linear(x, W, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """`F.linear` whose three products are oneDNN's, as those of the layers here are on AMD's CPUs with AVX-512."""

    @staticmethod
    def forward(ctx, x, W, bias):
        ctx.save_for_backward(x, W)
        return onednn_linear(x.flatten(0, -2), W, bias).view(*x.shape[:-1], len(W))

    @staticmethod
    def backward(ctx, gy):
        (x, W), (need_x, need_W, need_bias) = ctx.saved_tensors, ctx.needs_input_grad
        gy = gy.flatten(0, -2)
        gx = onednn_linear(gy, W.T).view(x.shape) if need_x else None
        gW = onednn_linear(gy.T, x.flatten(0, -2).T) if need_W else None
        return gx, gW, gy.sum(0) if need_bias else None


@contextlib.contextmanager
def onednn_products():
    """In this block float32 linear layers of whatever origin compute with oneDNN, in backward too."""
    stock = F.linear

    def linear(x, W, bias=None):
        by_onednn = x.dtype == W.dtype == torch.float32 and x.dim() > 1 and not torch.is_autocast_enabled("cpu")
        return OneDNNLinear.apply(x, W, bias) if by_onednn else stock(x, W, bias)

    F.linear = linear
    try:
        yield
    finally:
        F.linear = stock


def save_state_dict(model: nn.Module, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "model.pth")


def save_trained(model: nn.Module, folder: Path) -> None:
    torch.save({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, folder / "trained.pth")


def save_here(model: nn.Module, folder: Path) -> None:
    LoRAManager(model).save_lora_checkpoint(folder / "lora.pth")


def save_peft(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)


@dataclasses.dataclass(frozen=True)
class Variant:
    title: str
    build: Callable  # (stock model, args) -> what trains
    save: Callable  # (model, empty folder): writes what one would keep
    package: str | None = None  # a peer that need not be installed
    models: str = ""  # how the names of the models that it is for begin
    around: Callable = contextlib.nullcontext  # what the forward runs in
    device: str = ""  # on which type of device it is run unless asked for
    without: tuple[types.ModuleType, str, Any] | None = None  # a name in a module here, and what stands in its place
    by_default: bool = True
    precision: str = ""  # the only one in which it is another computation


VARIANTS = {
    "full": Variant("full fine-tuning", full_fine_tuning, save_state_dict),
    "full_onednn": Variant(
        "full fine-tuning, oneDNN",
        full_fine_tuning,
        save_state_dict,
        models="vit",
        around=onednn_products,
        device="cpu",
    ),
    "probe": Variant("linear probe", linear_probe, save_trained),
    "peft": Variant("PEFT", peft_lora, save_peft, "peft"),
    "peft_onednn": Variant("PEFT, oneDNN", peft_lora, save_peft, "peft", "vit", onednn_products, "cpu"),
    "peft_frozen_norms": Variant("PEFT, BatchNorm frozen", peft_frozen_norms, save_peft, "peft", "resnet"),
    "peft_8bit": Variant("PEFT, 8 bits", peft_8_bits, save_peft, "peft", "vit", device="cpu", by_default=False),
    "loralib": Variant("loralib", loralib_lora, save_trained, "loralib"),
    "lora": Variant("LoRA here", lora, save_here),
    "lora_int8": Variant("LoRA here, arithmetic in 8 bits", lora_int8, save_here, models="vit", device="cpu"),
    "lora_last_half": Variant("LoRA here, last half of the blocks", lora_last_half, save_here),
    "lora_norms": Variant("LoRA here, norms trained", lora_and_norms, save_here),
    "lora_follow": Variant("LoRA here, norms follow", lora_following_norms, save_here, models="resnet"),
    "qlora": Variant("QLoRA here", qlora, save_here, "bitsandbytes"),
    "qlora_last_half": Variant("QLoRA here, last half of the blocks", qlora_last_half, save_here, "bitsandbytes"),
    "qlora_full": Variant("QLoRA here, full checkpointing", qlora_checkpointed, save_here, "bitsandbytes", "vit"),
}


def _never(*_) -> bool:
    return False


def _always(*_) -> bool:
    return True


# LoRA here, with one thing undone each: what it is worth. Only if asked for.
for name, title, models, precision, *undone in (
    ("all_tokens", "all tokens in the last block", "vit", "", fusion, "reads_class_token_alone", _never),
    ("saved", "LayerNorm and GELU saved", "vit", "", fusion, "recomputes", _never),
    ("side_path", "W + s B A never built", "vit", "fp32", functional, "_merge_pays", _never),
    ("merged", "W + s B A always built", "vit", "bf16", functional, "_merge_pays", _always),
    ("mkl", "MKL's products", "vit", "fp32", backends, "PREFERS_ONEDNN_LINEAR", False),
    ("tiny_leak", "rectified activations at 1e-30", "resnet", "fp32", backends, "LEAK", 1e-30),
    ("unfolded", "BatchNorm not folded", "resnet", "", fusion, "folds", _never),
    ("kernel_side_path", "kernels never merged", "resnet", "", functional, "_kernel_merges", _never),
):
    VARIANTS[f"lora_{name}"] = Variant(
        f"LoRA here, {title}", lora, save_here, None, models, without=undone, by_default=False, precision=precision
    )
VARIANTS["lora_float_base"] = Variant(
    "LoRA here, base in float32", lora_float_base, save_here, by_default=False, precision="bf16"
)


def build_variant(name: str, args) -> nn.Module:
    """The variant's model in train mode on args.device, from the same random weights as all others."""
    torch.manual_seed(args.seed)
    model = build_backbone(args.model, NUM_CLASSES, args.image_size)
    nn.init.normal_(linear_head(model).weight, 0, 0.01)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.ones_(norm.weight)  # timm's random networks have zeros in some, through which no gradient passes
    model = VARIANTS[name].build(model, args).to(args.device)
    # BatchNorm2d of random weights stays near mean 0 and variance 1, so eval mode computes on sensible numbers too.
    return model.to(memory_format=torch.channels_last if is_convolutional(args) else torch.preserve_format).train()


def is_convolutional(args) -> bool:
    return not args.model.startswith("vit")


# ------------------------------------------------------------------------------------------------------------- a step


class Training:
    """One variant and its optimizer."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, name: str, args, model: nn.Module | None = None):
        self.name, self.args = name, args
        self.model = build_variant(name, args) if model is None else model
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-4, fused=True)
        self.dtype = select_precision(args.precision, args.device)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """A training step; returns its seconds."""
        synchronize(self.args.device)
        start = self.clock()
        self.work(images, labels)
        synchronize(self.args.device)
        return self.clock() - start

    def work(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """The step itself."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.undone():
            with autocast(self.args.device, self.dtype), VARIANTS[self.name].around():
                logits = self.model(images)
            self.loss = F.cross_entropy(logits.float(), labels)
            self.loss.backward()
        self.optimizer.step()

    def undone(self) -> contextlib.AbstractContextManager:
        """What the variant leaves out is left out within this block."""
        without = VARIANTS[self.name].without
        return mock.patch.object(*without) if without else contextlib.nullcontext()

    def check(self) -> None:
        """After two steps or more: does everything train that should, and nothing else?"""
        if not torch.isfinite(self.loss):
            raise RuntimeError(f"{self.name}: the loss is {self.loss.item()}")
        wrong = [n for n, p in self.trained.items() if p.grad is None or not 0 < p.grad.abs().sum() < float("inf")]
        if wrong:
            raise RuntimeError(f"{self.name}: no gradient, or none that is finite and not zero, for {wrong[:4]}")
        frozen = {n: p for n, p in self.model.named_parameters() if n not in self.trained}
        surplus = [n for n, p in frozen.items() if p.grad is not None]
        if surplus:
            raise RuntimeError(f"{self.name}: a gradient for the frozen {surplus[:4]}")

    def file_bytes(self) -> int:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            VARIANTS[self.name].save(self.model, Path(folder))
            return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_batch(args, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, generator=generator)
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), generator=generator)
    if is_convolutional(args):
        images = images.contiguous(memory_format=torch.channels_last)
    return images.to(args.device), labels.to(args.device)


# --------------------------------------------------------------------------------------------------- denormal numbers

FE_UNDERFLOW = 16  # in fenv.h on x86: a result was below the normal range


class Denormals(TorchDispatchMode):
    """Within this block: the operations that meet denormal numbers, and how many are written into tensors.

    `operations` counts by name those after which the processor's flag is up. It is for the calling thread alone, and
    sees what no tensor shows: products on the way to a sum. Where the flag cannot be read it stays empty.
    """

    def __init__(self):
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.numbers = 0
        self._flags = ctypes.CDLL(None) if reads_flags() else None

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if self._flags:
            self._flags.feclearexcept(FE_UNDERFLOW)
        result = operation(*args, **(kwargs or {}))
        if self._flags and self._flags.fetestexcept(FE_UNDERFLOW):
            self.operations[operation.overloadpacket.__name__] += 1
        if not operation.is_view and "empty" not in operation.overloadpacket.__name__:
            self.numbers += sum(count_denormals(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


def reads_flags() -> bool:
    """Is this a system whose floating-point flags `Denormals` knows?"""
    return platform.system() == "Linux" and platform.machine() == "x86_64"


def count_denormals(tensor: torch.Tensor) -> int:
    if not tensor.is_floating_point():
        return 0
    return int(((tensor != 0) & (tensor.abs() < torch.finfo(tensor.dtype).tiny)).sum())


def denormals_of_a_step(training: Training, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any] | None:
    """As `Denormals` has them; None on GPUs, which are no slower for them."""
    if training.args.device.type != "cpu":
        return None
    with Denormals() as seen:
        training.step(*batch)
    return {"operations": dict(seen.operations), "numbers": seen.numbers}


# ------------------------------------------------------------------------------------------------------ measurements


@constants_kept()
def measure_time(names: list[str], args) -> tuple[dict[str, dict], dict[str, str]]:
    """Seconds of every step of every variant, with what there is to say about each without a clock; and of those for
    which there is no room beside the others, why not."""
    generator = torch.Generator().manual_seed(args.seed)
    trainings, about, left_out = {}, {}, {}
    for name in names:
        print(f"building {name}", file=sys.stderr)
        try:
            training = Training(name, args)
            for _ in range(WARMUP_STEPS):
                training.step(*random_batch(args, generator))
        except torch.OutOfMemoryError as error:
            left_out[name], training = str(error).splitlines()[0], None
            release(args.device)
            continue
        trainings[name] = training
        training.check()
        trained = sum(p.numel() for p in training.trained.values())
        about[name] = {
            "trainable_parameters": trained,
            "file_bytes": training.file_bytes(),
            "denormals": denormals_of_a_step(training, random_batch(args, generator)),
        }
    seconds = time_in_turn(trainings, args, generator)
    return {name: {**about[name], "seconds": seconds[name]} for name in trainings}, left_out


def time_in_turn(trainings: dict[str, Training], args, generator: torch.Generator) -> dict[str, list[float]]:
    """Seconds of args.steps steps of each, in rounds, in an order drawn anew for every round."""
    shuffle = random.Random(args.seed).sample
    seconds = {name: [] for name in trainings}
    for step in range(args.steps):
        batch = random_batch(args, generator)
        for name in shuffle(list(trainings), len(trainings)):
            gc.collect()  # never inside a step
            seconds[name].append(trainings[name].step(*batch))
        print(f"round {step + 1} of {args.steps}", *(f"{n} {s[-1]:.3f}s" for n, s in seconds.items()), file=sys.stderr)
    for training in trainings.values():
        training.check()
    return seconds


def release(device: torch.device) -> None:
    """Give back what nothing uses any more, for the next variant or process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@constants_kept()
def measure_memory(name: str, args) -> dict[str, int]:
    """Peak bytes of this process above its imports, while it builds the variant and over a few steps of it."""
    import matplotlib.pyplot  # noqa: F401 - all imports come first

    if VARIANTS[name].package == "bitsandbytes":
        bitsandbytes_functional()
    elif VARIANTS[name].package:
        __import__(VARIANTS[name].package)
    before = peak_memory_bytes(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    training = Training(name, args)
    gc.collect()
    built = peak_memory_bytes(args.device) - before
    forget_peak(args.device)
    for _ in range(MEMORY_STEPS):
        training.step(*random_batch(args, generator))
    training.check()
    return {"build_bytes": built, "memory_bytes": peak_memory_bytes(args.device) - before}


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes the present size


def measure_memory_apart(name: str, command: list[str], device: torch.device) -> dict[str, int]:
    """`measure_memory` in fresh processes: with one mapping per large tensor, and as a script here runs.

    A GPU's memory is another matter: there both are the same.
    """
    run = [sys.executable, "-m", "benchmarks.compare_peers", *command, "--only-memory", name]
    measured = []
    for setting in ({"MALLOC_MMAP_THRESHOLD_": str(2**20)}, {})[: 1 if device.type == "cuda" else 2]:
        done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, **setting})
        if done.returncode:
            raise RuntimeError(f"memory of {name}: {done.stderr}")
        measured.append(json.loads(done.stdout.splitlines()[-1]))
    return {**measured[0], "resident_bytes": measured[-1]["memory_bytes"]}


# ------------------------------------------------------------------------------------------------------------- report


def ratios(result: dict, name: str, against: str) -> list[float] | None:
    """How many times faster than the other variant, round by round."""
    if against not in result["variants"]:
        return None
    pairs = zip(result["variants"][against]["seconds"], result["variants"][name]["seconds"], strict=True)
    return [other / own for other, own in pairs]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else (values[0],) * 3


def summarise(result: dict) -> None:
    """Add to every variant what the table and the plot show.

    Speed is against full fine-tuning and PEFT with this toolkit's products, where these were measured as well.
    """
    total = sum(p.numel() for p in build_backbone(result["model"], NUM_CLASSES).parameters())
    for name, variant in result["variants"].items():
        for against in ("full", "peft"):
            alike = f"{against}_onednn"
            values = ratios(result, name, alike if alike in result["variants"] else against)
            variant[f"speedup_over_{against}"] = values and quartiles(values)
        variant["step_seconds"] = statistics.median(variant["seconds"])
        variant["trainable_share"] = variant["trainable_parameters"] / total
        full = result["variants"].get("full")
        for kind in ("memory", "resident"):
            variant[f"{kind}_share"] = variant[f"{kind}_bytes"] / full[f"{kind}_bytes"] if full else None


def markdown_table(result: dict) -> str:
    lines = [
        "| variant | against full fine-tuning | against PEFT | s per step | tensors | resident | trained | file "
        "| denormals |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, v in result["variants"].items():
        cells = [
            VARIANTS[name].title,
            _speedup(v["speedup_over_full"]),
            _speedup(v["speedup_over_peft"]),
            f"{v['step_seconds']:.3f}",
            _megabytes(v["memory_bytes"], v["memory_share"]),
            _megabytes(v["resident_bytes"], v["resident_share"]),
            f"{v['trainable_share']:.2%}",
            f"{v['file_bytes'] / 1e6:.2f} MB",
            _denormals(v["denormals"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _megabytes(count: int, share: float | None) -> str:
    return f"{count / 1e6:,.0f} MB" + ("" if share is None else f" ({share:.2f})")


def _denormals(seen: dict[str, Any] | None) -> str:
    return "-" if seen is None else f"{sum(seen['operations'].values())} operations, {seen['numbers']:,} numbers"


def _speedup(values) -> str:
    return "-" if values is None else f"{values[1]:.2f}x ({values[0]:.2f} to {values[2]:.2f})"


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    variants = list(reversed(result["variants"].items()))
    titles = [VARIANTS[name].title for name, _ in variants]
    # Okabe and Ito's blue and orange: told apart in every common kind of colour blindness, and in grey.
    colours = ["#0072B2" if "here" in title else "#E69F00" for title in titles]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.5 * len(titles) + 1.4), sharey=True)
    speed = [v["speedup_over_full"] for _, v in variants]
    middle = [values[1] for values in speed]
    spread = [[m - low for m, (low, _, _) in zip(middle, speed, strict=True)]]
    spread += [[high - m for m, (_, _, high) in zip(middle, speed, strict=True)]]
    left.barh(titles, middle, color=colours, xerr=spread, error_kw={"capsize": 3})
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xlabel("training steps per second, full fine-tuning = 1\n(median and quartiles of paired ratios)")
    right.barh(titles, [v["memory_bytes"] / 1e6 for _, v in variants], color=colours)
    right.set_xlabel("peak memory of the tensors in training, MB\n(imports not counted)")
    machine = result["machine"]
    figure.suptitle(
        f"{result['model']}, batch {result['batch_size']}, {result['image_size']} px, {result['precision']}, "
        f"rank {result['rank']}; {machine['device']}, {machine['threads']} threads",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def describe_machine(args) -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    capability = torch.backends.cpu.get_cpu_capability()
    is_cuda = args.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(args.device) if is_cuda else f"{cpu} ({capability})",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_versions() -> dict:
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "peft", "loralib", "bitsandbytes", "timm", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def current_commit() -> str:
    def git(*command):
        return subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ------------------------------------------------------------------------------------------------------- command line


def choose_variants(args) -> list[str]:
    """The variants to run: those that fit the model and whose packages are there, or exactly those asked for."""
    fitting = [name for name, variant in VARIANTS.items() if args.model.startswith(variant.models)]
    absent = [n for n in fitting if VARIANTS[n].package and not importlib.util.find_spec(VARIANTS[n].package)]
    if args.variants is None:
        if absent:
            print(f"left out, not installed: {', '.join(absent)}", file=sys.stderr)
        here = [name for name in fitting if VARIANTS[name].device in ("", args.device.type)]
        here = [name for name in here if VARIANTS[name].by_default]
        return [name for name in here if name not in absent]
    names = args.variants.split(",")
    for name in names:
        if name not in VARIANTS:
            raise InputError(f"no variant {name!r}: choose from {', '.join(VARIANTS)}")
        if name not in fitting:
            raise InputError(f"{name} is not for {args.model}")
        if VARIANTS[name].precision not in ("", args.precision):
            raise InputError(f"{name} is what lora is, unless with --precision {VARIANTS[name].precision}")
        if name in absent:
            remedy = "pip install -r benchmarks/requirements.txt"
            raise InputError(f"{name} needs {VARIANTS[name].package}: {remedy}")
    return names


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of a step has to know."""
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument("--rank", type=positive_int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    parser.add_argument("--variants", help=f"comma-separated, from {','.join(VARIANTS)} (default: all that apply)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=homed, default=MEASURED)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_options(parser)
    parser.add_argument("--batch-size", type=positive_int, default=16)
    parser.add_argument("--image-size", type=positive_int, help="side in pixels (default: the model's own)")
    parser.add_argument("--steps", type=positive_int, default=15, help="rounds that are timed")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("--only-memory", metavar="VARIANT", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_image_size(args.model)
    args.device = select_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def main(argv: list[str] | None = None) -> dict:
    command = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    if args.only_memory:
        memory = measure_memory(args.only_memory, args)
        print(json.dumps(memory))
        return memory
    names = choose_variants(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):  # an image size that does not fit shows now, not after the first measurement
        build_backbone(args.model, NUM_CLASSES, args.image_size)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.compare_peers", *command]),
        "commit": current_commit(),
        **{key: getattr(args, key) for key in ("model", "batch_size", "image_size", "rank", "steps", "precision")},
        "machine": describe_machine(args),
        "versions": describe_versions(),
    }
    memory, result["left_out"] = {}, {}
    for name in names:
        try:
            memory[name] = measure_memory_apart(name, command, args.device)
        except RuntimeError as error:  # the others are measured all the same
            result["left_out"][name] = str(error).strip().splitlines()[-1]
    timed, without_room = measure_time(list(memory), args)
    result["left_out"] |= without_room
    release(args.device)
    if not timed:
        raise RuntimeError(f"no variant could be measured: {result['left_out']}")
    result["variants"] = {name: {**about, **memory[name]} for name, about in timed.items()}
    summarise(result)

    path = args.output_dir / f"{args.model.replace(':', '_')}_b{args.batch_size}_{args.device.type}_{args.precision}"
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    if "full" in timed:
        plot(result, path.with_suffix(".png"))
    for key in ("command", "commit", "machine", "versions", "left_out"):
        print(f"{key}: {result[key]}")
    print(markdown_table(result))
    return result


if __name__ == "__main__":
    run_script(main)
