"""What is known of a compiled training step without a GPU: its kernels as Inductor groups them, and its host's time.

`record_compiled` compiles a step of full size with `torch.compile`'s own compiler, Inductor, up to the point where it
would write code, and notes every kernel that it has planned. **It plans for a CPU**, as it needs a GPU to plan for one:
the graph, what is computed again in backward, and which products are calls of a library are the same there, and
operations by element and reductions are fused by nearly the same rules.

`replayed` stands in for CUDA graphs, of which a step has two, forward and backward: what Python has to do around them
remains.
"""

import argparse
import contextlib
import math
from unittest import mock

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.utils import ValueWithLineMap
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.compare_peers import NUM_CLASSES, random_batch
from benchmarks.operators import KERNELS, KINDS, AsOnGPU, Operator, Recorder, Recording, bits, branches_of_a_gpu

aten = torch.ops.aten
# In place of code: what stops the step where its first graph would run.
STOP = "from benchmarks.compiled import Planned\n\n\ndef call(args):\n    raise Planned\n"
COMPUTED_STEPS = 3  # until everything has a gradient: a head of zeros passes none on, and neither does B


class Planned(Exception):
    """Both graphs are planned, and there is nothing to run."""


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
def _attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward_flops(gradient, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def record_compiled(name: str, args, model: nn.Module | None = None) -> Recording:
    """A step of a compiled variant of `benchmarks.compare_peers` at its full size, as Inductor plans it for a CPU.

    The loss and the optimizer, which are not compiled, are recorded as in `benchmarks.operators`. The peak of its
    memory is not known.

    Args:
        name: the variant.
        args: model, batch_size, image_size, rank, precision, seed.
        model: another than the one that args ask for.
    """
    args = argparse.Namespace(**{**vars(args), "device": torch.device("cpu")})
    operators: list[Operator] = []

    def plan(graph: GraphLowering) -> tuple[ValueWithLineMap, ValueWithLineMap]:
        graph.init_wrapper_code()
        graph._update_scheduler()
        operators.extend(operator for node in graph.scheduler.nodes if (operator := _operator(node)))
        return ValueWithLineMap(STOP, []), ValueWithLineMap("", [])

    with (
        branches_of_a_gpu(),
        mock.patch.object(GraphLowering, "codegen", plan),
        inductor_config.patch(fx_graph_cache=False),
        functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
    ):
        training = AsOnGPU(name, args, model)
        images, labels = random_batch(args, torch.Generator())
        with contextlib.suppress(Planned):
            training.work(images, labels)
    if not operators:
        raise RuntimeError(f"{name}: Inductor of PyTorch {torch.__version__} has planned no graph")
    return Recording(operators + _around_the_graphs(training, labels), 0, 0)


def _around_the_graphs(training: AsOnGPU, labels: torch.Tensor) -> list[Operator]:
    """The loss and the optimizer's second step."""
    for parameter in training.trained.values():
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step()
    logits = torch.zeros(len(labels), NUM_CLASSES, dtype=training.dtype, requires_grad=True)
    with Recorder(labels.device) as recorder:
        F.cross_entropy(logits.float(), labels).backward()
        training.optimizer.step()
    return recorder.operators


def _operator(node: BaseSchedulerNode) -> Operator | None:
    """A planned kernel; None where there is nothing to launch."""
    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
        return None
    moved = node.get_read_write_buffers_sizes()
    if not isinstance(node, ExternKernelSchedulerNode):
        return Operator("fused", node.get_name(), "other", 1, 0.0, moved, 32)
    call, operands = node.node, [t for t in node.node.inputs if isinstance(t, ir.IRNode)]
    name = str(call.op_overload or call.python_kernel_name).split(".")[1].replace("_for_cpu", "")
    if name == "view":  # of other numbers than the graph's, such as the scales behind codes of 8 bits
        return None
    kernels = KERNELS.get(name, 1)
    if name in ("addmm", "baddbmm") and call.kwargs.get("beta", 1) and _is_full(operands[0]):
        kernels, moved = 2, moved + 2 * _nbytes(operands[0])  # copied into the output first, which is then added to
    described = ", ".join(f"{str(t.get_dtype())[6:]}{[int(n) for n in t.get_size()]}" for t in operands[:4])
    kind = next((kind for part, kind in KINDS.items() if part in name), "other")
    flops = float(node.estimate_flops() or 0)
    return Operator(name, described, kind, kernels, flops, moved, bits(name, operands[-1].get_dtype()))


def _is_full(summand: ir.IRNode) -> bool:
    """Is this a matrix rather than a row that is added to all rows?"""
    return len(summand.get_size()) > 1 and 0 not in summand.get_stride()


def _nbytes(tensor: ir.IRNode) -> int:
    return tensor.get_dtype().itemsize * math.prod(int(n) for n in tensor.get_size())


def replayed(graph: fx.GraphModule, inputs: list[torch.Tensor]):
    """A backend of `torch.compile` whose graphs hand out the same results in every step, at no cost.

    So do CUDA graphs, but for the time to launch them and to look after their memory. What remains is measured by
    `benchmarks.host`: Dynamo's guards, autograd, the loss, the optimizer.
    """
    backend = aot_autograd(
        fw_compiler=_computed_at_first,
        bw_compiler=_computed_at_first,
        partition_fn=min_cut_rematerialization_partition,  # Inductor's
        keep_inference_input_mutations=True,
    )
    return backend(graph, inputs)


def _computed_at_first(graph: fx.GraphModule, inputs: list[torch.Tensor]):
    steps, results = 0, ()

    def run(*arguments):
        nonlocal steps, results
        if steps < COMPUTED_STEPS:
            steps, results = steps + 1, graph(*arguments)
        return [result.detach() if isinstance(result, torch.Tensor) else result for result in results]

    return make_boxed_func(run)
