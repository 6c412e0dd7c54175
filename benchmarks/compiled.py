"""The kernels of a compiled training step, as Inductor plans them for a GPU that is not there.

`record_compiled` compiles a step of full size with `torch.compile`'s own compiler, Inductor, up to the point where it
would write code, and notes every kernel that it has planned. Inductor finds fake CUDA tensors and the properties of an
H100, and takes the decisions that it takes for a GPU. Two of its passes need numbers and are left out: the one that
recognizes attention in products, which no model here has, and the folding of constants.
"""

import contextlib
import importlib.util
import math
import types
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.utils import ValueWithLineMap
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from benchmarks.compare_peers import NUM_CLASSES, Training
from benchmarks.operators import KERNELS, KINDS, Operator, Recorder, Recording, bits, fake_step

# In place of code: what stops the step where its first graph would run.
STOP = "from benchmarks.compiled import Planned\n\n\ndef call(args):\n    raise Planned\n"


class Planned(Exception):
    """Both graphs are planned, and there is nothing to run."""


# What Inductor asks of a GPU: NVIDIA's H100 SXM5, compute capability 9.0.
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 * 2**20,
    total_memory=80 * 10**9,
    gcnArchName="",
)
FOUND = {  # in torch.cuda
    "is_available": True,
    "is_initialized": True,
    "device_count": 1,
    "current_device": 0,
    "_exchange_device": 0,
    "_maybe_exchange_device": 0,
    "get_device_properties": PROPERTIES,
    "_get_device_properties": PROPERTIES,
    "get_device_capability": (9, 0),
    "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": None,
}


@contextlib.contextmanager
def _inductor_finds_a_gpu() -> Iterator[None]:
    find_spec = importlib.util.find_spec

    def with_triton(name: str, *args):
        return name if name == "triton" else find_spec(name, *args)

    with contextlib.ExitStack() as stack:
        for name, value in FOUND.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, mock.Mock(return_value=value), create=True))
        for context in (
            mock.patch.object(torch.version, "cuda", "12.8"),
            mock.patch.object(torch._C, "_cuda_cudaCachingAllocator_is_enabled", lambda: True, create=True),
            mock.patch("importlib.util.find_spec", with_triton),
            mock.patch.object(FakeTensorMode, "avoid_device_init", True),  # what it would ask is not there
            mock.patch("torch._inductor.scheduler.has_triton", lambda *args: True),
            mock.patch("torch._inductor.fx_passes.fuse_attention._sfdp_init", lambda *args: None),
            inductor_config.patch(fx_graph_cache=False, joint_graph_constant_folding=False),
            functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
        ):
            stack.enter_context(context)
        yield


def record_compiled(name: str, args) -> Recording:
    """A step of a compiled variant of `benchmarks.compare_peers` at its full size, as Inductor plans it for a GPU.

    To be called in a process that believes in a GPU. The loss and the optimizer, which are not compiled, are recorded
    as in `benchmarks.operators`. The peak of its memory is not known.

    Args:
        name: the variant.
        args: model, batch_size, image_size, rank, precision, seed, and the device that the tensors pretend to be on.
    """
    operators: list[Operator] = []

    def plan(graph: GraphLowering) -> tuple[ValueWithLineMap, ValueWithLineMap]:
        graph.init_wrapper_code()
        graph._update_scheduler()
        operators.extend(operator for node in graph.scheduler.nodes for operator in _operators(node))
        return ValueWithLineMap(STOP, []), ValueWithLineMap("", [])

    with _inductor_finds_a_gpu(), mock.patch.object(GraphLowering, "codegen", plan), fake_step(name, args) as step:
        training, images, labels = step
        with contextlib.suppress(Planned):
            training.work(training.inputs(images), labels)
        if not operators:
            raise RuntimeError(f"{name}: Inductor of PyTorch {torch.__version__} has planned no graph")
        return Recording(operators + _around_the_graphs(training, labels), 0, 0)


def _around_the_graphs(training: Training, labels: torch.Tensor) -> list[Operator]:
    """The loss and the optimizer's second step."""
    for parameter in training.trained.values():
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step()
    logits = labels.new_zeros(len(labels), NUM_CLASSES, dtype=training.dtype).requires_grad_()
    with Recorder(labels.device) as recorder:
        F.cross_entropy(logits.float(), labels).backward()
        training.optimizer.step()
    return recorder.operators


def _operators(node: BaseSchedulerNode) -> list[Operator]:
    """The kernels of a node that is planned; none where there is nothing to launch."""
    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
        return []
    moved = node.get_read_write_buffers_sizes()
    if not isinstance(node, ExternKernelSchedulerNode):
        return [Operator("fused", node.get_name(), "other", 1, 0.0, moved, 32)]
    call, operands = node.node, [t for t in node.node.inputs if isinstance(t, ir.IRNode)]
    name = str(call.op_overload or call.python_kernel_name).split(".")[1]
    if name == "view":  # of other numbers than the graph's, such as the scales behind codes of 8 bits
        return []
    described = ", ".join(f"{str(t.get_dtype())[6:]}{[int(n) for n in t.get_size()]}" for t in operands[:4])
    kind = next((kind for part, kind in KINDS.items() if part in name), "other")
    multiplied = bits(name, operands[0].get_dtype())  # the last one of attention is the state of its dropout
    found = [Operator(name, described, kind, KERNELS.get(name, 1), _flops(call), moved, multiplied)]
    if name in ("addmm", "baddbmm") and call.kwargs.get("beta", 1) and _is_full(operands[0]):
        # Copied into the output first, which is then added to.
        found.append(Operator("copy", described, "other", 1, 0.0, 2 * _nbytes(operands[0]), 32))
    return found


def _flops(call: ir.ExternKernel) -> float:
    """Of a call whose operator has a formula; whatever else there is costs its bytes."""
    own = call.get_origin_node() or next((node for node in call.origins if node.target is call.op_overload), None)
    formula = None if own is None else flop_registry.get(getattr(own.target, "overloadpacket", None))
    if formula is None:
        return 0.0
    args, kwargs = fx.map_arg((own.args, own.kwargs), lambda operand: operand.meta["val"])
    return float(formula(*args, **kwargs, out_val=own.meta["val"]))


def _is_full(summand: ir.IRNode) -> bool:
    """Is this a matrix rather than a row that is added to all rows?"""
    return len(summand.get_size()) > 1 and 0 not in summand.get_stride()


def _nbytes(tensor: ir.IRNode) -> int:
    return tensor.get_dtype().itemsize * math.prod(int(n) for n in tensor.get_size())
