"""What a training step asks of a GPU, without one and without a clock: budgets, and what benchmarks/roofline.py and
benchmarks/host.py make of recorded operators."""

import argparse
import copy
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import host, roofline
from benchmarks.compare_peers import NUM_CLASSES, VARIANTS, random_batch
from benchmarks.compiled import replayed
from benchmarks.operators import SECTOR, AsOnGPU, Operator, Recorder, Recording, record_narrow
from benchmarks.roofline import CARDS, LAUNCH, SHARES
from tests.dense import assert_close, vit
from toolkit import InputError, devices

CPU = torch.device("cpu")


def settings(model: str, **changes) -> argparse.Namespace:
    """Of a step small enough for a test, in bf16."""
    own = {"model": model, "batch_size": 32, "image_size": 32, "rank": 2, "precision": "bf16", "seed": 0, "device": CPU}
    return argparse.Namespace(**own | changes)


# Kernels of a step in bf16, and its peak memory as a share of full fine-tuning's, of narrow models as deep as their
# names have it. The kernels are those of the full size, or nearly so; the memory is not. A change that needs more says
# why; one that needs less lowers the number here.
BUDGETS = {
    "vit_b_16": {
        "full": (921, 1.0),
        "lora": (1363, 0.633),
        "lora_never": (1303, 0.866),
        "lora_selective": (1440, 0.551),
        "qlora": (1460, 0.655),
        "lora_last_half": (796, 0.369),
    },
    "resnet50": {
        "full": (686, 1.0),
        "lora": (1371, 0.786),
        "qlora": (1443, 0.792),
        "lora_last_half": (831, 0.520),
        "lora_follow": (4471, 0.926),
    },
}


@pytest.mark.parametrize("model", BUDGETS)
def test_a_step_stays_within_its_budget_of_kernels_and_memory(model):
    steps = {name: record_narrow(name, settings(model)) for name in BUDGETS[model]}
    kernels = {name: step.kernels for name, step in steps.items()}
    memory = {name: step.peak_bytes / steps["full"].peak_bytes for name, step in steps.items()}
    too_many = {name: n for name, n in kernels.items() if n > BUDGETS[model][name][0]}
    too_much = {name: share for name, share in memory.items() if share > BUDGETS[model][name][1]}
    assert not too_many and not too_much


# -------------------------------------------------------------------------------------------------- what is recorded


def recorded(function, *inputs: torch.Tensor) -> list[Operator]:
    with Recorder(CPU) as recorder:
        function(*inputs)
    return recorder.operators


def test_a_product_counts_its_operations_and_every_operand_once():
    x, W, y = torch.randn(4, 8), torch.randn(16, 8), torch.zeros(4, 16)
    (product,) = recorded(F.linear, x, W)
    assert (product.kind, product.kernels, product.flops) == ("product", 1, 2 * 4 * 8 * 16)
    assert product.bytes == 4 * (4 * 8 + 8 * 16 + 4 * 16) and product.bits == 32
    (in_place,) = recorded(lambda: y.addmm_(x, W.T))
    assert in_place.flops == product.flops and in_place.bytes == product.bytes + 4 * y.numel()  # y is read as well


def test_a_product_of_integers_is_one_in_8_bits():
    a, b = torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8)
    (product,) = recorded(torch._int_mm, a, b)
    assert (product.kind, product.bits, product.flops) == ("product", 8, 2 * 32 * 16 * 8)
    assert product.bytes == 32 * 16 + 16 * 8 + 4 * 32 * 8


def test_what_lies_between_numbers_is_read_with_them():
    (lowest_bytes,) = recorded(torch.clone, torch.zeros(4, 8).view(torch.int8)[:, ::4])
    assert lowest_bytes.bytes == 4 * 32 + 32
    (column,) = recorded(torch.clone, torch.zeros(8, 100)[:, 0])
    assert column.bytes == 8 * SECTOR + 4 * 8


def test_views_and_empty_tensors_cost_nothing_and_copies_do_not_read_their_target():
    x = torch.randn(4, 8)
    assert not recorded(lambda: (x.view(8, 4).T[1:].detach().expand(2, 3, 8), torch.empty_like(x)))
    (copy,) = recorded(lambda: torch.empty(4, 8).copy_(x))
    assert copy.bytes == 4 * (32 + 32)
    (of_a_row,) = recorded(lambda: x[:1].expand(4, 8).exp())
    assert of_a_row.bytes == 4 * (8 + 32)  # an expanded tensor is read once


def test_a_convolution_adds_its_bias_in_a_pass_and_pulls_back_in_two_products():
    x, layer = torch.randn(2, 3, 8, 8, requires_grad=True), nn.Conv2d(3, 4, 3, bias=False)
    bare, *_ = recorded(layer, x)
    with_bias, *_ = recorded(nn.Conv2d(3, 4, 3), x)
    assert (bare.kernels, with_bias.kernels, bare.kind) == (1, 2, "convolution")
    assert bare.flops == 2 * (2 * 4 * 6 * 6) * (3 * 3 * 3)
    backward = recorded(lambda: layer(x).sum().backward())
    (both,) = [o for o in backward if o.name == "convolution_backward"]
    assert (both.kernels, both.flops) == (2, 2 * bare.flops)


def test_a_launch_over_many_tensors_takes_as_many_as_fit():
    small, large = [torch.zeros(8) for _ in range(111)], [torch.zeros(321 * 65536)]
    assert [o.kernels for o in recorded(lambda: (torch._foreach_add_(small, 1), torch._foreach_add_(large, 1)))] == [
        2,
        2,
    ]


def test_memory_is_that_of_what_lives_at_once():
    with Recorder(CPU) as recorder:
        kept = torch.zeros(256)
        recorder.begin()
        for _ in range(3):
            torch.zeros(1024)[1:].add(1)  # two of nearly 4 KB, gone after each round
        assert recorder.live_bytes == 1024 and recorder.peak_bytes == 1024 + 2 * 4096
        del kept
        assert recorder.live_bytes == 0


def small_vit() -> nn.Module:
    return vit(num_layers=1, num_classes=NUM_CLASSES)


def test_what_stands_in_for_cuda_graphs_computes_at_first_and_then_repeats_itself(monkeypatch):
    args = settings("vit_b_16", batch_size=2, image_size=16, precision="fp32")
    monkeypatch.setattr(devices, "COMPILER", replayed)
    own = AsOnGPU("lora_compiled", args, VARIANTS["lora_compiled"].build(small_vit(), args).train())
    eager = AsOnGPU("lora", args, copy.deepcopy(own.model))
    for step in range(5):
        batch = random_batch(args, torch.Generator().manual_seed(step))
        own.work(*batch)
        eager.work(*batch)
        if step == 2:
            for name, parameter in eager.trained.items():
                assert_close(own.trained[name].grad, parameter.grad, 1e-3, name)
            settled = {name: parameter.grad.clone() for name, parameter in own.trained.items()}
    assert all(torch.equal(own.trained[name].grad, gradient) for name, gradient in settled.items())
    own.check()
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------------------- what is predicted


def test_an_operator_takes_what_takes_it_longest():
    card = CARDS["H100"]
    product = {"name": "mm", "operands": "", "kind": "product", "bits": 16, "kernels": 1}
    computing = Operator(**product, flops=1e12, bytes=1.0)
    assert roofline.seconds(computing, card) == pytest.approx(1e12 / (card.in_16_bits * SHARES["product"]))
    in_8_bits = Operator(**product | {"bits": 8}, flops=1e12, bytes=1.0)
    assert roofline.seconds(in_8_bits, card) == pytest.approx(1e12 / (card.in_8_bits * SHARES["product"]))
    moving = Operator(**product, flops=1.0, bytes=1e9)
    assert roofline.seconds(moving, card) == pytest.approx(1e9 / (card.bandwidth * SHARES["bandwidth"]))
    assert roofline.seconds(Operator(**product | {"kernels": 3}, flops=1.0, bytes=1.0), card) == 3 * LAUNCH
    predicted = roofline.predict(Recording([computing, moving, moving], peak_bytes=7, kept_bytes=5))
    assert predicted["kernels"] == 3 and predicted["peak_bytes"] == 7
    assert predicted["costliest"]["H100"][0]["times"] == 3  # alike in name and operands


def prediction(milliseconds: float) -> dict:
    row = {"operator": "mm", "operands": "bfloat16[2, 2]", "times": 1, "milliseconds": milliseconds}
    return {
        **{"kernels": 10, "bytes": 1e9, "flops": 1e12, "peak_bytes": 10**8, "kept_bytes": 10**7},
        "milliseconds": dict.fromkeys(CARDS, milliseconds),
        "costliest": {card: [row] for card in CARDS},
    }


@pytest.fixture
def no_recording(monkeypatch):
    """LoRA takes 1 ms of a GPU, full fine-tuning 10 seconds."""
    milliseconds = {"lora": 1.0, "full": 10_000.0}
    monkeypatch.setattr(roofline, "predict_apart", lambda names, args: {n: prediction(milliseconds[n]) for n in names})


def test_all_that_is_printed_of_a_gpu_says_predicted(tmp_path, no_recording, capsys):
    roofline.main(["--model", "vit_b_16", "--variants", "full,lora", "--output-dir", str(tmp_path)])
    result = json.loads((tmp_path / "predicted_vit_b_16_b64_bf16.json").read_text())
    assert {"command", "commit", "versions", "assumed", "variants"} <= result.keys()
    assert result["what"] == "predicted, not measured"
    output = capsys.readouterr().out
    heads = [line for line in output.splitlines() if line.startswith("| ") and "ms" in line]
    assert len(heads) == 3 and all("predicted" in line for line in heads)
    assert "| LoRA here | 10 | 1.0 | 1.0 (10000.00x) |" in output


@pytest.mark.slow
def test_a_step_waits_for_the_gpu_or_for_the_host(tmp_path, no_recording, capsys):
    options = ["--model", "resnet18", "--variants", "full,lora", "--output-dir", str(tmp_path)]
    host.main([*options, "--steps", "2"])
    assert "first run benchmarks.roofline" in capsys.readouterr().err
    for batch in ("64", "8"):
        roofline.main([*options, "--batch-size", batch])
    result = host.main([*options, "--steps", "2"])
    written = json.loads((tmp_path / "host_resnet18_bf16.json").read_text())
    assert {"command", "commit", "predicted_commits", "machine"} <= written.keys()
    lora = result["variants"]["lora"]
    assert len(lora["host_seconds"]) == 2 and lora["host_over_full"][1] > 0
    assert list(result["predicted_steps"]) == [8, 64]
    steps = result["predicted_steps"][64]
    assert steps["lora"]["T4"] == {"gpu": 1.0, "step": lora["host_milliseconds"]}
    assert steps["full"]["T4"]["step"] == 10_000
    output = capsys.readouterr().out
    assert "(GPU, 1.00x)" in output and "(host, " in output and "predicted ms a step, T4" in output


@pytest.mark.parametrize(
    "options, message",
    [
        ("--variants typo", "no variant 'typo'"),
        ("--batch-size 0", "expected a whole number above 0"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises((SystemExit, InputError)) as stopped:
        roofline.main(["--model", "vit_b_16", *options.split()])
    assert message in f"{stopped.value}{capsys.readouterr().err}"


def test_without_a_compiler_one_line_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InputError, match="need Linux and g\\+\\+"), roofline.fake_cuda():
        pass


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or torch.version.cuda is not None, reason="needs g++ and no CUDA")
def test_the_code_that_runs_on_cuda_needs_the_kernels_that_the_budgets_count():
    """At full size, on fake CUDA tensors, in processes that believe in a GPU."""
    args = settings("vit_small", batch_size=8, image_size=224, rank=8, device=torch.device("cuda"))
    on_cuda = roofline.predict_apart(["full", "lora", "qlora"], args)
    for name, about in on_cuda.items():
        assert about["kernels"] == pytest.approx(BUDGETS["vit_b_16"][name][0], rel=0.1)  # a CPU casts more
    assert on_cuda["lora"]["peak_bytes"] < 0.5 * on_cuda["full"]["peak_bytes"]
    assert 1 < on_cuda["full"]["milliseconds"]["H100"] < on_cuda["full"]["milliseconds"]["T4"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or torch.version.cuda is not None, reason="needs g++ and no CUDA")
def test_a_compiled_step_has_the_products_of_the_eager_one_and_fewer_small_kernels():
    """But for what is computed again in backward, which the compiler decides."""
    args = settings("vit_small", batch_size=8, image_size=224, rank=8, device=torch.device("cuda"))
    planned = roofline.predict_apart(["lora", "lora_compiled", "full_compiled"], args)
    assert planned["lora_compiled"]["flops"] == pytest.approx(planned["lora"]["flops"], rel=0.05)
    assert planned["lora_compiled"]["kernels"] <= 785 and planned["full_compiled"]["kernels"] <= 652
    assert planned["lora_compiled"]["bytes"] < planned["lora"]["bytes"]
    named = {row["operator"] for row in planned["full_compiled"]["costliest"]["H100"]}
    assert {"_fused_adamw_", "mm", "addmm"} <= named
