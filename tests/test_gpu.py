"""Runs on a GPU: their figures are the CPU's, and Python waits for the GPU only where figures are read.

Without a GPU tests/test_cuda_on_cpu.py runs these tests on an emulated one.
"""

import numpy as np
import pytest
import torch
from torch import nn

import deploy_lora
from moco import pretrain
from tests import cuda_on_cpu, dense
from tests.run_folders import metrics, stop
from toolkit import devices, distributed
from toolkit.models.norms import constants_kept
from toolkit.run import optim, runs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, or tests/test_cuda_on_cpu.py")
counts_waits = pytest.mark.skipif(not cuda_on_cpu.is_loaded(), reason="only emulated GPUs count")

CLASSES = {
    "lora": "",
    "qlora": "--use-qlora",
    "full": "--lora-rank 0 --no-freeze-backbone",
    "upper half": "--adapt-last 1",
    "fp16": "--precision fp16",
    "bf16": "--precision bf16 --clip-grad-norm 1",
}
IN_FLOAT32 = [name for name in CLASSES if name not in ("fp16", "bf16")]
NORMS = ("--norms follow", "--norms train")  # of a ResNet
QUICK = ("qlora", "fp16", "segmentation")
OTHERS = {
    "multilabel": "--task multilabel --data-list {hospital}/labels.csv",
    "regression": "--task regression --data-list {hospital}/numbers.csv",
    "segmentation": "--task segmentation --data-dir {pairs} --augmentation crop",
}
STAGE_1 = "--arch vit_mini --image-size 16 --batch-size 4 --epochs 1 --warmup-epochs 0 --queue-size 8 --workers 0"
STAGE_1 += " --mlp-dim 32 --two-crops digits"


@pytest.fixture
def options(hospital, pairs, narrow, tmp_path):
    """options("multilabel"): what a run of this name is told."""
    torch.save(narrow, tmp_path / "resnet.pth")

    def options(name: str) -> str:
        if name in NORMS:
            of_resnet = f"--checkpoint {tmp_path}/resnet.pth --image-size 32 --lora-rank 2 --learning-rate 1e-5"
            return f"{of_resnet} {name} --workers 0"
        told = (CLASSES | OTHERS)[name].format(hospital=hospital, pairs=pairs)
        if "--data-list" in told:
            told += f" --data-dir {hospital} --group-by Patient"
        return f"{told} --workers 0"

    return options


def of_a_step(taken: list) -> dict[str, int]:
    """What one step of several took, but for its kernels."""
    step = taken[2] - taken[1]
    return {what: times for what, times in step.items() if not what.startswith("kernel")}


@pytest.fixture
def taken(monkeypatch) -> list:
    """What the GPU had been asked for after each step of the optimizer."""
    counted = []
    take_step = optim.take_step

    def noted(*arguments) -> None:
        take_step(*arguments)
        counted.append(cuda_on_cpu.counts())

    monkeypatch.setattr(optim, "take_step", noted)
    return counted


@counts_waits
@pytest.mark.parametrize(
    "name",
    [
        *QUICK,
        *(pytest.param(name, marks=pytest.mark.slow) for name in (*CLASSES, *NORMS, *OTHERS) if name not in QUICK),
    ],
)
def test_a_step_copies_images_and_answers_and_waits_for_nothing(finetune, options, taken, name):
    finetune(f"{options(name)} --batch-size 4 --epochs 1 --device cuda")
    assert of_a_step(taken) == {"copy to the GPU": 2}


@counts_waits
@pytest.mark.parametrize("version", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_step_of_stage_1_copies_two_views_and_waits_for_nothing(images, tmp_path, taken, version):
    argv = f"{STAGE_1} --moco-version {version} --data-dir {images} --output-dir {tmp_path} --device cuda"
    pretrain.main(argv.split())
    assert of_a_step(taken) == {"copy to the GPU": 2}


@pytest.mark.parametrize("adapted_on", ["cpu", "cuda"])
@pytest.mark.parametrize("four_bits", [False, True], ids=["float", "4 bits"])
def test_a_model_of_another_loop_moves_to_a_gpu_and_back(adapted_on, four_bits):
    """What was computed once of its frozen norms follows."""
    x = dense.images(32)
    model = dense.frozen(dense.resnet().to(adapted_on), use_qlora=four_bits).eval()
    with constants_kept():
        model.cuda()(x.cuda()).sum().backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model.cpu()(x).sum().backward()
    assert len(gradients) > 10
    for name, gradient in gradients.items():
        dense.assert_close(gradient, model.get_parameter(name).grad, 1e-4, name)


def test_an_optimizer_is_fused_on_a_gpu_whatever_device_its_state_is_from():
    on_gpu = optim.build_optimizer(nn.Linear(2, 2).to("cuda"), 1e-3)
    on_gpu.load_state_dict(optim.build_optimizer(nn.Linear(2, 2), 1e-3).state_dict())
    assert on_gpu.param_groups[0]["fused"]


def test_what_processes_have_on_the_cpu_travels_through_the_gpu(monkeypatch):
    """NCCL takes nothing else."""

    def all_gather(shares: list[torch.Tensor], own: torch.Tensor) -> None:
        assert own.device.type == "cuda"
        for share in shares:
            share.copy_(own)

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_sum", lambda *values: [2 * value for value in values])
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(distributed.dist, "all_gather", all_gather)
    whole = distributed.interleave(torch.tensor([1.0, 2.0]))
    assert whole.device.type == "cpu" and whole.tolist() == [1, 1, 2, 2]


def test_kernels_lie_in_memory_as_images_do():
    conv = devices.place(nn.Conv2d(3, 4, 3), torch.device("cuda"))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


@counts_waits
def test_operands_on_two_devices_and_what_is_not_written_yet_show():
    """What emulated GPUs would be worth nothing without."""
    x = torch.ones(2, device="cuda")
    assert torch.empty(1, device="cuda:1").isnan().all()
    for other in (torch.ones(2), torch.ones(2, device="cuda:1")):
        with pytest.raises(RuntimeError):
            x + other
    with pytest.raises(RuntimeError):
        x.uniform_(generator=torch.Generator())
    cuda_on_cpu.forget()
    y = (x * 2 + 1).relu_().sum()
    assert not any(what.startswith(("wait", "copy")) for what in cuda_on_cpu.counts())
    assert y.item() == 6 and cuda_on_cpu.counts()["wait item"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [*IN_FLOAT32, "--norms follow", *OTHERS])
def test_a_run_has_the_figures_of_one_on_a_cpu(finetune, options, name):
    told = f"{options(name)} --epochs 1 --precision fp32"
    [expected] = metrics(finetune(f"{told} --device cpu", "cpu")["folder"])
    [found] = metrics(finetune(f"{told} --device cuda", "cuda")["folder"])
    for column in ("train_loss", "val_loss"):
        assert found[column] == pytest.approx(expected[column], rel=1e-2), column


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_goes_on_on_another_device(finetune, first, then):
    whole = finetune("--precision fp32 --device cpu", "whole")
    with pytest.raises(runs.Stopped):
        finetune(f"--precision fp32 --device {first}", "moved", after_epoch=stop)
    moved = finetune(f"--precision fp32 --device {then} --resume", "moved")
    assert moved["epochs"] == 2 and moved["device"] == then
    assert moved["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-3)


def numbers_of(command: str, answer) -> list[float]:
    """What a command of `deploy_lora.py` returned, as numbers to compare."""
    if command == "evaluate":
        return [answer["loss"], answer["accuracy"]]
    if command == "predict":
        return [float(row["probability"]) for row in answer]
    return np.ravel(answer).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "predict", "embed"])
def test_answers_are_those_of_a_cpu(once, images, tmp_path, command):
    def answer(device: str) -> list[float]:
        ending = {"evaluate": "json", "predict": "csv", "embed": "npy"}[command]
        argv = f"{command} {once}/lora.pth {images}/val --output {tmp_path}/{device}.{ending} --workers 0"
        return numbers_of(command, deploy_lora.main(f"{argv} --precision fp32 --device {device}".split()))

    assert answer("cuda") == pytest.approx(answer("cpu"), abs=1e-4)
