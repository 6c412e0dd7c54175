"""Runs on a GPU: their figures are the CPU's, and Python waits for the GPU only where figures are read. Without
a GPU tests/test_cuda_on_cpu.py runs these tests on an emulated one."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deploy_lora
import finetune_lora
from moco import pretrain
from tests import cuda_on_cpu, dense
from tests.run_folders import metrics, stop, tensors
from toolkit import devices
from toolkit.models.norms import constants_kept
from toolkit.run import guard, optim, runs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, or tests/test_cuda_on_cpu.py")

PATIENTS = "--data-dir {hospital} --group-by Patient"
RESNET = "--checkpoint {resnet} --image-size 32 --lora-rank 2 --learning-rate 1e-5"
RUNS = {  # how many kernels a step of a run launches on a GPU, and what the run is told
    "lora": (241, ""),
    "qlora": (258, "--use-qlora"),
    "full": (169, "--lora-rank 0 --no-freeze-backbone"),
    "upper half": (151, "--adapt-last 1"),
    "cached features": (138, "--adapt-last 1 --cache-features disk"),
    "fp16": (354, "--precision fp16"),
    "bf16": (376, "--clip-grad-norm 1 --precision bf16"),
    "frozen norms": (463, RESNET + " --norms frozen"),
    "norms that follow": (1692, RESNET + " --norms follow"),
    "trained norms": (536, RESNET + " --norms train"),
    # At random: the probe has hardly any loss here, so that rounding shows in it.
    "multilabel": (255, "--task multilabel --head-init random --data-list {hospital}/labels.csv " + PATIENTS),
    "regression": (247, "--task regression --data-list {hospital}/numbers.csv " + PATIENTS),
    "segmentation": (236, "--task segmentation --data-dir {pairs} --augmentation crop"),
    "folds": (242, "--folds 2 --data-list {hospital}/all.csv " + PATIENTS),
    "search": (242, "--learning-rate auto"),
}
OFF = {"fp16": 0.3, "bf16": 0.1}  # by how much losses may differ from those of a CPU, which has no float16
QUICK = ("qlora", "fp16", "segmentation")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in RUNS if name not in QUICK]
STAGE_1 = "--arch vit_mini --image-size 16 --batch-size 4 --epochs 1 --warmup-epochs 0 --queue-size 8 --workers 0"
STAGE_1 += " --mlp-dim 32 --two-crops digits --precision fp32"


def losses(folder: Path) -> list[float]:
    """What a run and, with --folds, each of its parts has in metrics.csv."""
    found = []
    for path in sorted(folder.rglob("metrics.csv")):
        for row in metrics(path.parent):
            found += [row[column] for column in ("loss", "train_loss", "val_loss") if column in row]
    return found


@pytest.fixture
def check_a_step(monkeypatch):
    """A step copies the images and the answers, or two views, waits for nothing, and has no more kernels than these."""
    taken = []  # what the GPU had been asked for after each step of the optimizer
    update = torch.amp.GradScaler.update

    def noted(*arguments) -> None:
        update(*arguments)
        taken.append(cuda_on_cpu.counts())

    def check(kernels: int) -> None:
        step = taken[2] - taken[1]
        launched = [step.pop(what) for what in list(step) if what.startswith("kernel")]
        assert step == {"copy to the GPU": 2} and sum(launched) <= kernels

    if not cuda_on_cpu.is_loaded():  # a real one does not count
        return lambda kernels: None
    monkeypatch.setattr(torch.amp.GradScaler, "update", noted)
    return check


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_a_run_has_the_figures_of_one_on_a_cpu_and_steps_of_as_many_kernels(
    finetune, hospital, pairs, narrow, saved, tmp_path, monkeypatch, check_a_step, name
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    kernels, told = RUNS[name]
    told = "--precision fp32 " + told.format(hospital=hospital, pairs=pairs, resnet=saved(narrow))
    told += " --batch-size 4 --epochs 1 --workers 0 --device"
    found = losses(finetune(f"{told} cuda", "cuda")["folder"])
    check_a_step(kernels)
    expected = losses(finetune(f"{told} cpu".replace("fp16", "fp32"), "cpu")["folder"])
    assert found == pytest.approx(expected, rel=1e-2, abs=OFF.get(name))
    assert len(found) == (4 if name == "folds" else 2)


@pytest.mark.parametrize(
    ("told", "kernels"),
    [
        ("--moco-version 2", 253),
        pytest.param("--moco-version 3", 525, marks=pytest.mark.slow),
        pytest.param("--lora-rank 2 --checkpoint {base}", 721, marks=pytest.mark.slow),
    ],
)
def test_stage_1_has_the_figures_of_one_on_a_cpu(images, base, tmp_path, check_a_step, told, kernels):
    for device in ("cuda", "cpu"):
        argv = f"{STAGE_1} {told.format(base=base)} --data-dir {images} --output-dir {tmp_path}/{device}"
        pretrain.main(f"{argv} --device {device}".split())
    check_a_step(kernels)
    [found] = losses(tmp_path / "cuda")
    assert [found] == pytest.approx(losses(tmp_path / "cpu"), rel=1e-2)


@pytest.mark.parametrize("adapted_on", ["cpu", "cuda"])
@pytest.mark.parametrize("four_bits", [False, True], ids=["float", "4 bits"])
def test_a_model_of_another_loop_moves_to_a_gpu_and_back(adapted_on, four_bits):
    """What was computed once of its frozen norms follows."""
    x = dense.images(32)
    model = dense.frozen(dense.resnet().to(adapted_on), use_qlora=four_bits).eval()
    with constants_kept():
        model.cuda()(x.cuda()).sum().backward()
        gradients = [p.grad.cpu() for p in dense.trained(model).values()]
        model.zero_grad()
        model.cpu()(x).sum().backward()
    dense.assert_close(gradients, [p.grad for p in dense.trained(model).values()], 1e-4)


def test_what_is_faster_on_a_gpu_is_chosen_there():
    """The fused optimizer, whatever device its state is from, and kernels that lie in memory as images do."""
    conv = devices.place(torch.nn.Conv2d(3, 4, 3), torch.device("cuda"))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    on_gpu = optim.build_optimizer(conv, 1e-3)
    on_gpu.load_state_dict(optim.build_optimizer(torch.nn.Conv2d(3, 4, 3), 1e-3).state_dict())
    assert on_gpu.param_groups[0]["fused"]


@pytest.mark.skipif(not cuda_on_cpu.is_loaded(), reason="only emulated GPUs count")
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
def test_a_run_in_float16_goes_back_when_it_collapses(finetune, monkeypatch):
    after_step = guard.Guard.after_step

    def collapses_once(judge: guard.Guard) -> None:
        if not judge.retreats:
            raise guard.GoBack("training collapsed")
        after_step(judge)

    monkeypatch.setattr(guard.Guard, "after_step", collapses_once)
    results = finetune("--precision fp16 --epochs 1 --device cuda")
    assert len(results["retreats"]) == 1 and 0 < results["val_loss"] < 5


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_goes_on_on_another_device(finetune, first, then):
    whole = finetune("--precision fp32 --device cpu", "whole")
    with pytest.raises(runs.Stopped):
        finetune(f"--precision fp32 --device {first}", "moved", after_epoch=stop)
    moved = finetune(f"--precision fp32 --device {then} --resume", "moved")
    assert moved["epochs"] == 2 and moved["device"] == then
    assert moved["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-3)


ANSWERS = {  # what a command is told, and the numbers in what it returns
    "evaluate": ("{}.json --workers 0", lambda answer: [answer["loss"], answer["accuracy"]]),
    "predict": ("{}.csv --workers 0", lambda rows: [float(row["probability"]) for row in rows]),
    "embed": ("{}.npy --workers 0", lambda features: features.ravel().tolist()),
    "choose": ("{} --count 5 --workers 0", lambda paths: [Path(path).parent.name for path in paths]),  # some are alike
    "explain": ("{}", lambda paths: np.mean([Image.open(path) for path in paths], (1, 2)).ravel().tolist()),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", ANSWERS)
def test_answers_are_those_of_a_cpu(once, images, tmp_path, command):
    output, numbers = ANSWERS[command]

    def answer(device: str) -> list:
        told = f"{command} {once}/lora.pth {images}/val --output {output.format(tmp_path / device)}"
        return numbers(deploy_lora.main(f"{told} --precision fp32 --device {device}".split()))

    assert answer("cuda") == pytest.approx(answer("cpu"), abs=1e-2 if command == "explain" else 1e-4)


@pytest.mark.slow
def test_norms_begin_with_the_images_own_statistics_and_stay_there(finetune, narrow, saved, monkeypatch):
    """On a CPU they would follow the adapters, which hardly train here."""
    monkeypatch.setattr(finetune_lora, "CLEAR_GAIN", -math.inf)  # whatever a probe says
    told = f"--checkpoint {saved(narrow)} --image-size 32 --lora-rank 2 --learning-rate 1e-9 --precision fp32 --device"
    gpus, cpus = (tensors(finetune(f"{told} {device}", device)["folder"] / "lora.pth") for device in ("cuda", "cpu"))
    own = [name for name in gpus if "running" in name]
    assert len(own) == 2 * 19
    torch.testing.assert_close([gpus[name] for name in own], [cpus[name] for name in own], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_an_adapter_from_a_gpu_needs_none_and_gets_its_thresholds_there(finetune, hospital, tmp_path):
    told = f"{RUNS['multilabel'][1].format(hospital=hospital)} --epochs 1 --device cuda"
    adapter = finetune(told)["folder"] / "lora.pth"
    assert {tensor.device.type for tensor in tensors(adapter).values()} == {"cpu"}
    answered = f"threshold {adapter} {hospital}/labels.csv --device cuda --output {tmp_path}/answer.pth"
    assert len(deploy_lora.main(answered.split()).thresholds) == 2
