"""benchmarks/compare_peers.py: what it measures is what it says, on a tiny run. Nothing here checks a clock."""

import contextlib
import json

import pytest
import torch

from benchmarks import compare_peers, growth
from benchmarks.compare_peers import Training, parse_arguments, random_batch
from toolkit import InputError

TINY = ["--model", "resnet18", "--image-size", "32", "--batch-size", "2", "--steps", "2"]


def memory(name, command, device):
    return {"build_bytes": 10**8, "memory_bytes": 10**9, "resident_bytes": 2 * 10**9}


def test_a_run_prints_a_table_and_writes_json_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_peers, "measure_memory_apart", memory)
    compare_peers.main([*TINY, "--variants", "full,lora", "--output-dir", str(tmp_path)])
    result = json.loads((tmp_path / "resnet18_b2_cpu_fp32.json").read_text())
    assert {"command", "commit", "machine", "versions"} <= result.keys() and set(result["variants"]) == {"full", "lora"}
    lora, full = result["variants"]["lora"], result["variants"]["full"]
    assert len(lora["seconds"]) == len(full["seconds"]) == 2
    ratios = [f / own for f, own in zip(full["seconds"], lora["seconds"], strict=True)]
    assert lora["speedup_over_full"][1] == pytest.approx(sum(ratios) / 2)  # of each round, not of the medians
    assert lora["memory_share"] == 1 and lora["trainable_share"] < 0.1 < full["trainable_share"]
    assert 0 < lora["file_bytes"] < full["file_bytes"] / 10
    output = capsys.readouterr().out
    assert "| LoRA here |" in output and "| 0 operations, 0 numbers |" in output  # full fine-tuning has none
    assert full["denormals"] == {"operations": {}, "numbers": 0}
    assert (tmp_path / "resnet18_b2_cpu_fp32.png").stat().st_size > 10_000


def test_a_variant_that_fails_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    def memory_of_lora_alone(name, command, device):
        if name != "lora":
            raise RuntimeError("Traceback:\n  ...\nOutOfMemoryError: no room")
        return memory(name, command, device)

    monkeypatch.setattr(compare_peers, "measure_memory_apart", memory_of_lora_alone)
    result = compare_peers.main([*TINY, "--variants", "full,lora", "--output-dir", str(tmp_path)])
    assert set(result["variants"]) == {"lora"} and result["left_out"] == {"full": "OutOfMemoryError: no room"}
    assert "OutOfMemoryError: no room" in capsys.readouterr().out


def test_a_variant_without_room_beside_the_others_is_left_out(tmp_path, monkeypatch):
    class OneAtMost(Training):
        def step(self, *batch):
            if self.name == "lora":
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
            return super().step(*batch)

    monkeypatch.setattr(compare_peers, "measure_memory_apart", memory)
    monkeypatch.setattr(compare_peers, "Training", OneAtMost)
    result = compare_peers.main([*TINY, "--variants", "lora,full", "--output-dir", str(tmp_path)])
    assert set(result["variants"]) == {"full"} and result["left_out"] == {"lora": "CUDA out of memory."}
    with pytest.raises(RuntimeError, match="no variant could be measured"):
        compare_peers.main([*TINY, "--variants", "lora", "--output-dir", str(tmp_path)])


def test_speed_is_against_the_peers_with_the_same_products():
    names = {"full": 4.0, "full_onednn": 2.0, "peft": 3.0, "lora": 1.0}
    variants = {
        name: {"seconds": [s], "trainable_parameters": 1, "memory_bytes": 1, "resident_bytes": 1}
        for name, s in names.items()
    }
    compare_peers.summarise({"model": "resnet18", "variants": variants})
    assert variants["lora"]["speedup_over_full"][1] == 2 and variants["lora"]["speedup_over_peft"][1] == 3


def test_a_gpu_has_compiled_variants_and_none_of_onednn():
    args = parse_arguments(["--model", "vit_b_16", "--precision", "bf16"])
    args.device = torch.device("cuda")
    names = compare_peers.choose_variants(args)
    assert {"full", "full_compiled", "lora", "lora_compiled", "qlora"} <= set(names) and "full_onednn" not in names


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own():
    measured = compare_peers.measure_memory_apart("lora", TINY, torch.device("cpu"))
    weights = 4 * 11.2e6
    assert weights < measured["memory_bytes"] < 20 * weights  # the weights are there, the imports are not
    assert measured["resident_bytes"] > weights


@pytest.mark.parametrize("name", ["full", "probe", "lora", "qlora"])
def test_every_variant_trains_what_it_should_and_nothing_else(name):
    args = parse_arguments(TINY)
    training, generator = Training(name, args), torch.Generator().manual_seed(0)
    for _ in range(2):
        training.step(*random_batch(args, generator))
    training.check()
    training.model.fc.weight.grad = None
    with pytest.raises(RuntimeError, match="no gradient"):
        training.check()


@pytest.mark.skipif(not compare_peers.reads_flags(), reason="reads the flags of x86 on Linux")
def test_denormals_of_a_step_are_those_of_its_numbers():
    """LoRA's rectified activations have none, as they had with a smaller leak."""
    args = parse_arguments(TINY)
    batch = random_batch(args, torch.Generator().manual_seed(0))
    convolutions = {}
    for name in ("full", "lora", "lora_tiny_leak"):
        training = Training(name, args)
        for _ in range(2):
            training.step(*batch)
        seen = compare_peers.denormals_of_a_step(training, batch)["operations"]
        convolutions[name] = sum(count for operation, count in seen.items() if "convolution" in operation)
    assert convolutions["full"] == convolutions["lora"] == 0 < convolutions["lora_tiny_leak"]


def test_denormals_are_counted_once_each():
    x = torch.tensor([1e-30, -1e-30, 1.0, 0.0])
    with compare_peers.Denormals() as seen:
        (x * 1e-10).view(2, 2).t()
        x.bfloat16() * 1e-9
        torch.arange(3) * 2
    assert seen.numbers == 4
    assert not seen.operations or set(seen.operations) == {"mul"}
    with compare_peers.Denormals() as seen:
        x * 2
    assert seen.numbers == 0 and not seen.operations


def test_all_variants_start_from_the_same_weights():
    args = parse_arguments(TINY)
    full, lora = (compare_peers.build_variant(name, args).state_dict() for name in ("full", "lora"))
    assert all(torch.equal(full[name], lora[name]) for name in full)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--steps 0", "expected a whole number above 0"),
        ("--variants lora,typo", "no variant 'typo'"),
        ("--model resnet18 --variants lora_selective", "not for resnet18"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises((SystemExit, InputError)) as stopped:
        compare_peers.main(options.split())
    assert message in f"{stopped.value}{capsys.readouterr().err}"


def test_products_by_onednn_are_the_same_products():
    """Forward and gradients, in a linear layer and in attention."""
    torch.manual_seed(0)
    layers = torch.nn.MultiheadAttention(16, 2, batch_first=True), torch.nn.Linear(16, 8)
    results = []
    for around in (contextlib.nullcontext, compare_peers.onednn_products):
        x = torch.linspace(-1, 1, 3 * 5 * 16).view(3, 5, 16).requires_grad_()
        with around():
            y = layers[1](layers[0](x, x, x)[0])
        results.append(
            [y, *torch.autograd.grad(y.square().sum(), [x, *layers[0].parameters(), *layers[1].parameters()])]
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert "OneDNNLinear" in type(results[1][0].grad_fn).__name__


@pytest.mark.parametrize(
    "name", ["full_onednn", "lora_selective_16bit", "qlora_selective_16bit", "lora_last_half", "peft_8bit"]
)
def test_variants_of_a_vit_train(name):
    args = parse_arguments(["--model", "vit_b_16", "--image-size", "32", "--batch-size", "2", "--rank", "2"])
    args.model = "vit_mini"
    training, generator = Training(name, args), torch.Generator().manual_seed(0)
    for _ in range(2):
        training.step(*random_batch(args, generator))
    training.check()


def test_peers_have_the_same_products_as_lora_where_cost_grows(monkeypatch):
    monkeypatch.setattr(growth, "PREFERS_ONEDNN_LINEAR", True)
    assert growth.parse([]).variants[:3] == ["full_onednn", "peft_onednn", "lora"]
    assert growth.parse(["--device", "cuda"]).variants[:3] == ["full", "peft", "lora"]
    monkeypatch.setattr(growth, "PREFERS_ONEDNN_LINEAR", False)
    assert growth.parse([]).variants[:2] == ["full", "peft"]


def test_how_cost_grows(tmp_path, monkeypatch, capsys):
    """A point is measured once, also by the next run. Memory is 1 GB and 0.1 GB an image: 70 images fit into 8 GB."""
    measured = []

    def main(argv: list[str]) -> dict:
        args = parse_arguments(argv)
        measured.append((args.model, args.batch_size, args.rank))
        size = 10**9 + args.batch_size * 10**8
        variants = {
            name: {"step_seconds": 1.0, "memory_bytes": size, "resident_bytes": size} for name in ("full", "lora")
        }
        result = {"machine": {"device": "a CPU", "threads": 2}, "versions": {}, "commit": "abc", "variants": variants}
        result |= {"image_size": args.image_size, "left_out": {}}
        if args.batch_size == 16:  # no room for all weights' gradients
            result["left_out"]["full"] = variants.pop("full") and "no room"
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / f"point_cpu_{args.precision}.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(compare_peers, "main", main)
    command = [
        "--batches",
        "4",
        "8",
        "16",
        "--ranks",
        "4",
        "8",
        "--variants",
        "full",
        "lora",
        "--output-dir",
        str(tmp_path),
    ]
    for _ in range(2):
        result = growth.main(command)
    middle = [("vit_b_16", batch, 8) for batch in (4, 8, 16)]
    assert measured == [*middle, ("vit_b_16", 8, 4), ("vit_small", 8, 8), ("vit_l_16", 8, 8)]
    assert result["fits"] == {"full": 70, "lora": 70}
    output = capsys.readouterr().out
    assert "| LoRA here | 1 s, 1,400 MB | 1 s, 1,800 MB | 1 s, 2,600 MB |" in output
    assert "| full fine-tuning | 1 s, 1,400 MB | 1 s, 1,800 MB | nan s, nan MB |" in output
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    growth.main([*command, "--precision", "bf16"])  # what was measured in float32 is of no use
    growth.main([*command, "--image-size", "192"])
    assert len(measured) == 3 * 6
    monkeypatch.setattr(compare_peers, "select_device", torch.device)
    on_gpu = growth.main([*command, "--device", "cuda", "--output-dir", str(tmp_path / "gpu")])
    assert on_gpu["fits"] == {"full": 65, "lora": 65}  # beside what CUDA itself takes
