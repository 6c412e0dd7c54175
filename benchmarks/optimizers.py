"""Compare AdamW on an adapter's two factors with optimizers that move W more as Adam on W would.

    python -m benchmarks.optimizers --data-dir photos/train --val-dir photos/validation --checkpoint resnet18.pth \\
        --image-size 64 --labels-per-class 50
    python -m benchmarks.optimizers ... --methods factors tangent --ranks 4 8 64 --rates 1e-3 3e-3 --seeds 3

Each run is `finetune_lora.py` with another optimizer of its adapters, and the head as ever. Choose rates on a
validation part first: without --val-dir a part of the training images judges. Options that are not this script's go to
`finetune_lora.py`; finished runs are kept in --output-dir, and the same command goes on where it stopped.

In what follows W changes by ``D = s B A`` with A (r, in), B (out, r), and G is the gradient of the loss by W. A layer
with groups has a D of each group: all matrices here are (groups, rows, columns).
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import statistics
import tempfile
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import finetune_lora
from benchmarks import MEASURED, compare_peers, finished_runs
from lora.adapted import adapted_layers
from toolkit import homed, temporarily
from toolkit.config import positive_float, positive_int
from toolkit.run import optim
from toolkit.run.runs import run_script

BETA1, BETA2 = 0.9, 0.999  # AdamW's
SMALL = 1e-8
REGULAR = 1e-6  # is added to what is inverted, as a share of its mean diagonal element


class Pair(NamedTuple):
    """An adapter's factors, and the size of the weight that they change."""

    A: nn.Parameter  # (groups r, in)
    B: nn.Parameter  # (out, r)
    scaling: float
    norm: float  # of W, Frobenius's

    def matrices(self, of_A: Tensor, of_B: Tensor) -> tuple[Tensor, Tensor]:
        """(groups, r, in) and (groups, out / groups, r) of the factors, or of what has their shapes."""
        groups = len(self.A) // self.B.shape[1]
        return of_A.unflatten(0, (groups, -1)), of_B.unflatten(0, (groups, -1))


class FactorOptimizer(torch.optim.AdamW):
    """AdamW, but a group with a pair of factors takes the steps of a subclass."""

    def __init__(self, pairs: list[Pair], others: list[dict[str, Any]], rate: float):
        groups = [{"params": [pair.A, pair.B], "lr": rate, "weight_decay": 0.0} for pair in pairs]
        super().__init__(groups + others)
        self.pairs = pairs

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """A step of each pair at the rate of its group, then AdamW's of all else."""
        for pair, group in zip(self.pairs, self.param_groups, strict=False):
            if pair.A.grad is not None:
                self.step_pair(pair, group["lr"])
        super().step(closure)

    def step_pair(self, pair: Pair, rate: float) -> None:
        """Change the gradients for AdamW, or the factors themselves: then their gradients become None."""
        raise NotImplementedError

    def adam(self, parameter: Tensor, name: str, gradient: Tensor) -> Tensor:
        """Adam's direction by moments of these gradients, which are kept as this parameter's."""
        state = self.state[parameter]
        first = state.setdefault(f"{name}_first", torch.zeros_like(gradient))
        second = state.setdefault(f"{name}_second", torch.zeros_like(gradient))
        first.lerp_(gradient, 1 - BETA1)
        second.lerp_(gradient.square(), 1 - BETA2)
        count = self.counted(parameter)
        return first / (1 - BETA1**count) / ((second / (1 - BETA2**count)).sqrt() + SMALL)

    def counted(self, parameter: Tensor) -> int:
        """The number of this step, 1 or more; call it once a step and parameter."""
        state = self.state[parameter]
        state["step"] = state.get("step", torch.zeros(())) + 1
        return int(state["step"])


class Factors(FactorOptimizer):
    """AdamW on A and B: what the toolkit does."""

    def step_pair(self, pair: Pair, rate: float) -> None:
        pass


class Scaled(FactorOptimizer):
    """AdamW by gradients that are preconditioned with the other factor (2402.02347, equation 4)."""

    def step_pair(self, pair: Pair, rate: float) -> None:
        A, B = pair.matrices(pair.A, pair.B)
        gradient_A, gradient_B = pair.matrices(pair.A.grad, pair.B.grad)
        pair.A.grad = (inverse(B.mT @ B) @ gradient_A).view_as(pair.A)
        pair.B.grad = (gradient_B @ inverse(A @ A.mT)).view_as(pair.B)


class Relative(FactorOptimizer):
    """Adam's direction on A and B; a step changes W by a share of W's Frobenius norm, the rate."""

    def step_pair(self, pair: Pair, rate: float) -> None:
        direction_A = self.adam(pair.A, "A", pair.A.grad)
        direction_B = self.adam(pair.B, "B", pair.B.grad)
        A, B = pair.matrices(pair.A, pair.B)
        dA, dB = pair.matrices(direction_A, direction_B)
        length = pair.scaling * (B @ dA + dB @ A).norm()
        share = rate * pair.norm / (length + SMALL)
        pair.A.sub_(share * direction_A)
        pair.B.sub_(share * direction_B)
        pair.A.grad = pair.B.grad = None


class Rite(FactorOptimizer):
    """LoRA-RITE: r x r moments in the basis of the other factor; how D is split is of no account (2410.20625)."""

    def step_pair(self, pair: Pair, rate: float) -> None:
        A, B = pair.matrices(pair.A, pair.B)
        gradient_A, gradient_B = pair.matrices(pair.A.grad, pair.B.grad)
        step_A = self.step_in_basis(pair.A, B, gradient_A)
        step_B = self.step_in_basis(pair.B, A.mT, gradient_B.mT).mT
        A.sub_(rate * step_A)
        B.sub_(rate * step_B)
        pair.A.grad = pair.B.grad = None

    def step_in_basis(self, parameter: Tensor, other: Tensor, gradient: Tensor) -> Tensor:
        """The change (groups, r, n) of a factor, whose gradient this is, beside the other (groups, m, r) = Q R."""
        Q, R = torch.linalg.qr(other)
        back = R.mT @ inverse(R @ R.mT)  # R's inverse, where there is one
        own = back.mT @ gradient  # s Q^T G: what the other's size has no part in
        state = self.state[parameter]
        turn = Q.mT @ state.get("basis", Q)
        second = turn @ state.get("second", torch.zeros_like(turn)) @ turn.mT
        second = BETA2 * second + (1 - BETA2) * own @ own.mT / own.shape[-1]
        count = self.counted(parameter)
        values, vectors = torch.linalg.eigh(second / (1 - BETA2**count))
        root = vectors @ ((values.clamp_min(0).sqrt() + SMALL).reciprocal().unsqueeze(-1) * vectors.mT)
        first = turn @ state.get("first", torch.zeros_like(own))
        first = BETA1 * first + (1 - BETA1) * (root @ own)
        state.update(basis=Q, second=second, first=first)
        return back @ first / (1 - BETA1**count)


class Tangent(FactorOptimizer):
    """Adam's moments of W, dense, of the gradient that the factors know; the step is cut to rank r.

    What LoFT (2505.21289) approaches with moments of the factors' size.
    """

    def step_pair(self, pair: Pair, rate: float) -> None:
        A, B = pair.matrices(pair.A, pair.B)
        gradient_A, gradient_B = pair.matrices(pair.A.grad, pair.B.grad)
        of_B = B @ inverse(B.mT @ B)  # (out, r): of_B B^T projects on B's columns
        of_A = inverse(A @ A.mT) @ A
        by_columns = of_B @ gradient_A / pair.scaling
        by_rows = gradient_B @ of_A / pair.scaling
        known = by_columns + by_rows - by_columns @ A.mT @ of_A
        step = self.adam(pair.A, "W", known)
        in_columns = of_B @ (B.mT @ step)
        step = in_columns + (step - in_columns) @ A.mT @ of_A
        changed = pair.scaling * B @ A - rate * step
        U, S, Vh = leading(changed, A.shape[1])
        A.copy_(S.sqrt().unsqueeze(-1) * Vh)
        B.copy_(U * S.sqrt().unsqueeze(-2) / pair.scaling)
        pair.A.grad = pair.B.grad = None


METHODS = {"factors": Factors, "scaled": Scaled, "rite": Rite, "tangent": Tangent, "relative": Relative}


def inverse(gram: Tensor) -> Tensor:
    """The inverse of Gram matrices (groups, r, r), regular even where a factor is zero."""
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    shift = (REGULAR * size + SMALL**2).unsqueeze(-1).unsqueeze(-1)
    return torch.linalg.inv((gram + shift * torch.eye(gram.shape[-1])).double()).to(gram)


def leading(matrices: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first r terms of the singular value decompositions of matrices of rank 2 r (groups, m, n)."""
    generator = torch.Generator().manual_seed(0)
    sketch = matrices @ torch.randn(matrices.shape[-1], 2 * r, generator=generator)
    Q = torch.linalg.qr(sketch).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ matrices, full_matrices=False)
    rank = min(r, S.shape[-1])
    found = Q @ U[..., :rank], S[..., :rank], Vh[..., :rank, :]
    if rank == r:
        return found
    missing = r - rank  # a matrix smaller than its adapter
    pad = nn.functional.pad
    return pad(found[0], (0, missing)), pad(found[1], (0, missing)), pad(found[2], (0, 0, 0, missing))


def build(method: str, rate: float, model: nn.Module, head_rate: float, _: float, decay: float) -> FactorOptimizer:
    """An optimizer of this method, with the adapters at this rate, in place of `optim.build_optimizer`."""
    pairs = []
    for layer in adapted_layers(model).values():
        weights = layer.base().tensor.chunk(len(layer.parts))
        for part, weight in zip(layer.parts, weights, strict=True):
            factors = layer.get_parameter(f"lora_A{part}"), layer.get_parameter(f"lora_B{part}")
            if factors[0].requires_grad:
                pairs.append(Pair(*factors, layer.scaling, weight.norm().item()))
    paired = {id(factor) for pair in pairs for factor in pair[:2]}
    others = [each for each in model.parameters() if each.requires_grad and id(each) not in paired]
    groups = [
        {"params": [each for each in others if each.dim() > 1], "lr": head_rate, "weight_decay": decay},
        {"params": [each for each in others if each.dim() <= 1], "lr": head_rate, "weight_decay": 0.0},
    ]
    return METHODS[method](pairs, groups, rate)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run what is missing of the table, then print it."""
    args, passed_on = parse(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "runs.jsonl"
    keys = ("method", "rank", "rate", "seed")
    done = {tuple(run[key] for key in keys): run for run in finished_runs(path, passed_on)}
    made_with = {"options": passed_on, "commit": compare_peers.current_commit(), "torch": torch.__version__}
    made_with["machine"] = compare_peers.describe_machine(argparse.Namespace(device=torch.device("cpu")))["device"]
    wanted = list(itertools.product(args.methods, args.ranks, args.rates, args.seeds))
    for key in wanted:
        if key not in done:
            begun = time.process_time()
            measured = trained(*key, passed_on)
            taken = {"cpu_seconds": time.process_time() - begun}
            done[key] = dict(zip(keys, key, strict=True)) | measured | taken | made_with
            with path.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
    found = [done[key] for key in wanted]
    print(table(found))
    return found


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This script's options, and those that go on to `finetune_lora.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ranks", type=positive_int, nargs="+", default=[8])
    parser.add_argument("--rates", type=positive_float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="of the adapters")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-dir", type=homed, default=MEASURED / "optimizers")
    args, passed_on = parser.parse_known_args(argv)
    finetune_lora.read_options(passed_on)  # what is wrong with them shows now
    return args, passed_on


def trained(method: str, rank: int, rate: float, seed: int, passed_on: list[str]) -> dict[str, Any]:
    """A whole run of `finetune_lora.py` with this optimizer of its adapters."""
    options = [*passed_on, "--lora-rank", str(rank), "--lora-alpha", str(2 * rank), "--seed", str(seed)]
    replaced = temporarily([optim], build_optimizer=functools.partial(build, method, rate))
    with tempfile.TemporaryDirectory() as folder, replaced, contextlib.redirect_stdout(io.StringIO()):
        result = finetune_lora.main([*options, "--output-dir", folder])
    name = "miou" if "val_miou" in result else "accuracy"
    return {"reached": result[f"val_{name}"], "probe": result[f"probe_{name}_before"]}


def table(runs: list[dict[str, Any]]) -> str:
    """What each method reaches by rank and rate, a mean over the seeds, and its standard error."""
    lines = ["| method | rank | rate | probe | reached |", "|---|---|---|---|---|"]
    for case, group in itertools.groupby(runs, key=lambda run: (run["method"], run["rank"], run["rate"])):
        method, rank, rate = case
        own = list(group)
        reached = [run["reached"] for run in own]
        error = f" ± {100 * statistics.stdev(reached) / math.sqrt(len(reached)):.1f}" if len(reached) > 1 else ""
        probe = statistics.mean(run["probe"] for run in own)
        lines.append(f"| {method} | {rank} | {rate:g} | {probe:.1%} | {statistics.mean(reached):.1%}{error} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
