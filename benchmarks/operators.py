"""Record the operators of one training step: kernels, floating-point operations, bytes, memory.

Every operator that autograd and autocast let through is noted with what it would cost on a GPU. Models of full size are
recorded on fake tensors, which have shapes, dtypes and a device but no numbers: `benchmarks.roofline` makes times of
them.
"""

import argparse
import contextlib
import dataclasses
import math
import warnings
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.compare_peers import Training, build_variant, random_batch
from lora import backends
from toolkit.models.norms import constants_kept

BLOCK = 512  # bytes: PyTorch's allocator on CUDA hands out multiples of it
# How many tensors and blocks of numbers one launch of a `_foreach` operator takes (ATen's MultiTensorApply.cuh).
FOREACH_TENSORS, FOREACH_BLOCKS, FOREACH_BLOCK = {1: 110, 2: 64, 3: 48, 4: 36}, 320, 65536
# Operators that are more than one kernel. Backward of flash attention: row sums, gradients, conversion of q's.
KERNELS = {
    "slice_backward": 2,
    "select_backward": 2,
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
}
WITHOUT_KERNEL = ("empty", "new_empty", "_local_scalar_dense", "record_stream", "resize_", "set_")
KINDS = {"attention": "attention", "convolution": "convolution", "mm": "product"}  # by a part of the name
OVERWRITES = ("copy_", "fill_", "zero_")  # what they change they do not read
SECTOR = 32  # bytes: what a GPU reads at once
flop_registry[torch.ops.aten._int_mm] = flop_registry[torch.ops.aten.mm]


@dataclasses.dataclass(frozen=True)
class Operator:
    name: str
    operands: str  # dtypes and shapes
    kind: str  # product, convolution, attention, or other
    kernels: int
    flops: float
    bytes: float  # read and written
    bits: int  # of the numbers that it multiplies


@dataclasses.dataclass(frozen=True)
class Recording:
    """One training step."""

    operators: list[Operator]
    peak_bytes: int
    kept_bytes: int  # before the step begins: weights, the optimizer's state, a batch

    @property
    def kernels(self) -> int:
        return sum(operator.kernels for operator in self.operators)


class Recorder(TorchDispatchMode):
    """Within this `with` block operators on the device are noted, and the memory of what they return is followed."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.operators = device, []
        self.live_bytes = self.peak_bytes = 0
        self._alive: set[int] = set()

    def begin(self) -> None:
        """Forget what was noted; what lives goes on living."""
        self.operators, self.peak_bytes = [], self.live_bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.namespace != "prim":
            returned = list(self._here(result))
            for tensor in returned:
                self._follow(tensor)
            self._note(function, args, kwargs, result, returned)
        return result

    def _here(self, tree) -> Iterator[Tensor]:
        return (t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.device.type == self.device.type)

    def _follow(self, tensor: Tensor) -> None:
        """Count the tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, math.ceil(storage.nbytes() / BLOCK) * BLOCK
        if key not in self._alive:
            self._alive.add(key)
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.live_bytes -= size

    def _note(self, function, args, kwargs, result, returned: list[Tensor]) -> None:
        name = function._schema.name.split("::")[1]
        arguments = list(_bound(function, args, kwargs))
        read = [t for argument, value in arguments if not argument.is_out for t in self._here(value)]
        changed = [t for argument, value in arguments if _is_changed(argument) for t in self._here(value)]
        if not read and not returned and not changed:
            return
        if name.startswith(WITHOUT_KERNEL) or (not changed and _is_view(read, returned)):
            return
        if name in OVERWRITES:
            read = read[1:]
        written = changed + [t for t in returned if not any(t is c for c in changed)]
        kernels, moved = _cost(name, args, read, written)
        operands = ", ".join(f"{str(t.dtype)[6:]}{list(t.shape)}" for t in (read or written)[:4])
        kind = next((kind for part, kind in KINDS.items() if part in name), "other")
        flops = _flops(function, args, kwargs, result)
        self.operators.append(Operator(name, operands, kind, kernels, flops, moved, bits(name, written[0].dtype)))


def bits(name: str, dtype: torch.dtype) -> int:
    """Of the numbers that an operator with a result of this dtype multiplies."""
    if name == "_int_mm":  # whose result are their sums
        return 8
    return 16 if dtype in backends.LOW_PRECISION else 32


def _bound(function, args, kwargs):
    """The schema's arguments and what was given for them."""
    for argument, value in zip(function._schema.arguments, args, strict=False):
        yield argument, value
    for argument in function._schema.arguments[len(args) :]:
        if argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _is_changed(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _is_view(read: list[Tensor], returned: list[Tensor]) -> bool:
    storages = {t.untyped_storage()._cdata for t in read}
    return all(t.untyped_storage()._cdata in storages for t in returned)


def _cost(name: str, args, read: list[Tensor], written: list[Tensor]) -> tuple[int, float]:
    """Kernels, and bytes read and written. What is not told apart here reads every operand once, and is one kernel."""
    moved = _nbytes(*{id(t): t for t in read}.values()) + _nbytes(*written)
    if name == "convolution":  # cuDNN's, then a pass that adds the bias
        return (1, moved) if args[2] is None else (2, moved + 2 * _nbytes(*written))
    if name == "convolution_backward":
        of_input, of_weight, of_bias = args[10]
        products = of_input + of_weight
        return products + of_bias, products * _nbytes(*args[:3]) + of_bias * _nbytes(args[0])
    if name in ("native_batch_norm", "native_batch_norm_backward"):
        operands, trains = (args[:2], args[7]) if name.endswith("backward") else (args[:1], args[5])
        if name.endswith("backward") and not args[9][0]:  # the sums alone
            return 1, moved
        return (2, moved + _nbytes(*operands)) if trains else (1, moved)  # sums first, then what is made of them
    if name == "native_layer_norm_backward" and any(args[-1][1:]):
        return 3, moved + _nbytes(*args[:2])  # one pass to the input; one to the weights, in two stages
    if name.startswith("_fused_adam"):
        return _launches(args[0], 4), moved - _nbytes(*args[1])  # the schema has it that gradients change
    if name.startswith("_foreach"):
        lists = 1 + sum(isinstance(a, list | tuple) and isinstance(a[0], Tensor) for a in args[1:])
        return _launches(args[0], lists + (not name.endswith("_"))), moved
    return KERNELS.get(name, 1), moved


def _launches(tensors: list[Tensor], lists: int) -> int:
    blocks = sum(math.ceil(t.numel() / FOREACH_BLOCK) for t in tensors)
    return max(math.ceil(len(tensors) / FOREACH_TENSORS.get(lists, 30)), math.ceil(blocks / FOREACH_BLOCKS))


def _flops(function, args, kwargs, result) -> float:
    """Of products, convolutions and attention; whatever else there is costs its bytes."""
    packet = function._overloadpacket
    if packet not in flop_registry:  # such as addmm_
        packet = getattr(torch.ops.aten, packet.__name__.rstrip("_"), None)
    return float(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0.0


def _nbytes(*tensors: Tensor) -> int:
    """What is there to read: of an expanded tensor, its numbers once; with numbers apart, what lies between them."""
    return sum(_step(t) * math.prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s) for t in tensors)


def _step(tensor: Tensor) -> int:
    """How many bytes are read for each number."""
    gap = min((s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and s), default=1)
    return max(tensor.element_size(), min(gap * tensor.element_size(), SECTOR))


@contextlib.contextmanager
def stock_kernels() -> Iterator[None]:
    """Within this block tensors on a CPU are multiplied by PyTorch's stock operators, as those on a GPU are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration")  # of other GPUs, when oneDNN is switched
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@constants_kept()
def record(name: str, args) -> Recording:
    """The second step of a variant of `benchmarks.compare_peers` at its full size, on fake tensors.

    Args:
        args: model, batch_size, image_size, rank, precision, seed, and the device that the tensors pretend to be on.
    """

    def without_numbers(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=args.device)

    real = argparse.Namespace(**{**vars(args), "device": torch.device("cpu")})
    model = build_variant(name, real)
    batch = random_batch(real, torch.Generator())
    with stock_kernels(), FakeTensorMode(allow_non_fake_inputs=True), Recorder(args.device) as recorder:
        training = Training(name, args, model._apply(without_numbers))
        images, labels = map(without_numbers, batch)
        training.work(images, labels)  # AdamW has its state from here on
        recorder.begin()
        kept = recorder.live_bytes
        training.work(images, labels)
        return Recording(recorder.operators, recorder.peak_bytes, kept)
