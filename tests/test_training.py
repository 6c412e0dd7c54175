"""toolkit/run/training.py: randomness, device, precision, schedule, features, k-NN accuracy, evaluation."""

import copy
import math
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune_lora import LoRALinear
from moco import pretrain
from toolkit import InputError, devices
from toolkit.answers import evaluation, tasks
from toolkit.answers.tasks import Classification
from toolkit.models.backbones import build_backbone
from toolkit.run import optim, training
from toolkit.run.options import TuneOptions
from toolkit.run.runs import Stopped, StopRequests


def draw() -> tuple:
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_seeding_repeats_every_generator():
    devices.seed_everything(3)
    first = draw()
    devices.seed_everything(3)
    assert draw() == first


def test_rng_state_survives_a_file_read_with_weights_only(tmp_path):
    devices.seed_everything(0)
    draw()  # leaves a cached Gaussian in both random and NumPy
    torch.save(devices.rng_state(), tmp_path / "rng.pth")
    expected = draw()
    devices.restore_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True))
    assert draw() == expected


@pytest.mark.parametrize(("train", "val"), [(2, 9), (9, 2)])
def test_each_process_needs_an_image(monkeypatch, train, val):
    model = nn.Linear(2, 2)
    training.check_batches(model, train, val, batch_size=4)
    monkeypatch.setattr(training.distributed, "world_size", lambda: 3)
    training.check_batches(model, 3, 3, batch_size=4)
    with pytest.raises(InputError, match="3 processes are more than there are images to train or evaluate on"):
        training.check_batches(model, train, val, batch_size=4)


def test_device_and_precision():
    cpu = devices.select_device("cpu")
    assert devices.select_device("auto").type in ("cpu", "cuda", "mps")
    assert devices.select_precision("auto", cpu) == devices.select_precision("fp32", cpu) == torch.float32
    assert devices.select_precision("bf16", cpu) == torch.bfloat16
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        devices.select_precision("fp16", cpu)
    with pytest.raises(InputError, match="'abacus' is not available"):
        devices.select_device("abacus")


@pytest.mark.parametrize("bf16, told", [(2.04, "take 2.0 times as long"), (1.19, ""), (0.1, "")])
def test_a_cpu_that_is_slower_in_16_bits_is_told(monkeypatch, bf16, told):
    monkeypatch.setattr(devices, "product_seconds", {torch.float32: 1.0, torch.bfloat16: bf16}.get)
    first, *more = devices.describe_device(torch.device("cpu"), torch.bfloat16).splitlines()
    assert first == "device: cpu, precision: torch.bfloat16" and len(more) == bool(told)
    assert not told or (told in more[0] and "--precision fp32 is faster" in more[0])


@pytest.mark.parametrize("device, dtype", [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_products_are_not_measured_where_nothing_depends_on_them(monkeypatch, device, dtype):
    monkeypatch.delattr(devices, "product_seconds")
    told = devices.describe_device(torch.device(device), dtype)
    assert told == f"device: {device}, precision: {dtype}"


def test_measuring_products_draws_no_random_numbers():
    devices.seed_everything(0)
    assert devices.product_seconds(torch.bfloat16) > 0
    drawn = draw()
    devices.seed_everything(0)
    assert draw() == drawn


def test_cudnn_looks_for_its_fastest_convolutions_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # put back at the end
    devices.select_device("cpu")
    assert not torch.backends.cudnn.benchmark
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)  # as if a GPU were there
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    devices.select_device("cuda:0")
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("device", "fused"), [("cpu", None), ("cuda", True)])
@pytest.mark.parametrize("script", ["finetune_lora.py", "moco.pretrain"])
def test_adamw_is_fused_on_a_gpu_alone(device, fused, script):
    model = nn.Sequential(nn.Linear(2, 2))
    with FakeTensorMode():  # tensors of a GPU that need none
        model._apply(lambda tensor: torch.empty(tensor.shape, device=device))
        if script == "moco.pretrain":
            optimizer = pretrain.build_optimizer(model, pretrain.PretrainOptions())
        else:
            optimizer = optim.build_optimizer(model, rate=1e-3)
    assert optimizer.defaults["fused"] is fused


def test_adapters_have_a_rate_of_their_own_and_biases_no_decay():
    model = nn.Sequential(LoRALinear(3, 2, r=1))
    model[0].weight.requires_grad_(False)
    groups = optim.build_optimizer(model, 0.1, adapter_lr_factor=24.0, weight_decay=0.5).param_groups
    found = {(group["lr"], group["weight_decay"], *(tuple(p.shape) for p in group["params"])) for group in groups}
    assert found == {(0.1 * 24.0, 0.5, (1, 3), (2, 1)), (0.1, 0.0, (2,))}


def test_a_step_whose_gradients_overflow_is_none():
    for scaler in torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu", enabled=False):
        layer = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        scaler.scale(layer(torch.ones(1, 2)).sum()).backward()
        assert optim.stepped(scaler, optimizer)
        before = layer.weight.detach().clone()
        layer.weight.grad.fill_(math.inf)
        if scaler.is_enabled():
            assert not optim.stepped(scaler, optimizer) and torch.equal(layer.weight, before)


def test_autocast_computes_in_its_dtype():
    cpu, layer, x = torch.device("cpu"), nn.Linear(2, 2), torch.ones(1, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with devices.autocast(cpu, dtype):
            assert layer(x).dtype == dtype


def test_mixed_images_are_mixed_as_their_labels_are():
    """Image i is all i: what is mixed of it and the one before shows in its mean."""
    torch.manual_seed(0)
    task = tasks.Classification(list("abcd"), mixup=0.5)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 32, 32)
    for _ in range(5):
        mixed, shares = task.mix(images.clone(), torch.arange(4))
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), shares @ torch.arange(4.0), rtol=1e-4, atol=1e-4)


def test_nothing_is_mixed_without_mixup_or_labels():
    images, labels, missing = torch.randn(2, 3, 4, 4), torch.tensor([1, 0]), torch.full((2,), evaluation.NO_LABEL)
    assert tasks.Classification(list("ab")).mix(images, labels) == (images, labels)
    assert tasks.Classification(list("ab"), mixup=0.5).mix(images, missing) == (images, missing)


def test_statistics_are_those_of_the_loaders_images():
    """Of all batches alike, whatever the momentum; a frozen BatchNorm, dropout and the mode stay as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.01), nn.Dropout(0.5), nn.BatchNorm1d(3))
    model[2].frozen = True
    frozen = {name: tensor.clone() for name, tensor in model[2].state_dict().items()}
    batches = [torch.randn(8, 3) * 5 + 2 for _ in range(4)]
    evaluation.estimate_statistics(model, [(x, None) for x in batches], torch.device("cpu"), torch.float32)
    torch.testing.assert_close(model[0].running_mean, torch.cat(batches).mean(0))
    expected = torch.stack([batch.var(0) for batch in batches]).mean(0)
    torch.testing.assert_close(model[0].running_var, expected)
    assert model.training and model[0].training and model[0].momentum == 0.01
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model[2].state_dict().items())


def test_a_share_of_the_change_is_kept():
    """Weights lie on the line from where training began to where it is. Statistics are not interpolated."""
    model = nn.BatchNorm1d(2)
    wise_ft = optim.WiseFT(model, alpha=0.25)
    with torch.no_grad():
        model.weight.fill_(3.0)
    wise_ft.begin()
    with wise_ft.in_place():
        assert torch.equal(model.weight, torch.full((2,), 3.0))
    with torch.no_grad():
        model.weight.fill_(5.0)
    model(torch.rand(4, 2))
    trained = copy.deepcopy(model.state_dict())
    with wise_ft.in_place():
        torch.testing.assert_close(model.weight, torch.full((2,), 3.5))
        torch.testing.assert_close(model.running_mean, trained["running_mean"])
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    wise_ft.share = 0.0
    with wise_ft.in_place():
        assert torch.equal(model.weight, torch.full((2,), 3.0))
    wise_ft.share = 0.125
    resumed = optim.WiseFT(model, alpha=0.25)
    resumed.load_state_dict(copy.deepcopy(wise_ft.state_dict()))
    with resumed.in_place():
        torch.testing.assert_close(model.weight, torch.full((2,), 3.25))
    assert resumed.alpha == 0.25


def test_weights_come_back_after_a_failure_and_a_as_it_trains():
    model = LoRALinear(2, 2, r=1)
    model.weight.requires_grad_(False)
    wise_ft = optim.WiseFT(model, alpha=0.5)
    wise_ft.begin()
    with torch.no_grad():
        model.lora_A.fill_(4.0)
        model.lora_B.fill_(4.0)
    with pytest.raises(KeyError), wise_ft.in_place():
        assert (model.lora_A == 4).all() and (model.lora_B == 2).all()
        raise KeyError
    assert (model.lora_A == 4).all() and (model.lora_B == 4).all()


def test_nothing_is_remembered_of_the_start_where_all_of_the_change_is_kept():
    model = nn.Linear(2, 2)
    wise_ft = optim.WiseFT(model, alpha=1.0)
    wise_ft.begin()
    assert wise_ft.start == {} and wise_ft.state_dict() == {"share": 1.0, "start": {}}


def step_figures(number: int) -> training.StepFigures:
    """Of a step of two batches."""
    batches = [torch.tensor([1.5, 2.0, 1.0]) + number, torch.tensor([0.25, 1.0, 0.0])]
    return training.StepFigures(images=10 + number, sums=batches)


@pytest.mark.parametrize("processes", [1, 2])
def test_figures_that_are_read_together_are_those_of_each_step(monkeypatch, processes):
    """Summed over batches and processes, in one exchange; none is read twice."""
    exchanges = []

    def all_sum(*figures: float) -> list[float]:
        exchanges.append(figures)
        return [processes * figure for figure in figures]

    monkeypatch.setattr(training.distributed, "world_size", lambda: processes)
    monkeypatch.setattr(training.distributed, "all_sum", all_sum)
    stop = StopRequests()
    alone = []
    for number in range(3):
        alone += training.read_figures([step_figures(number)], stop)
    exchanges.clear()
    steps = [step_figures(number) for number in range(3)]
    assert training.read_figures(steps, stop) == alone and steps == []
    assert len(exchanges) == processes - 1
    factor = float(processes)
    assert alone[0] == (10, [1.75 * factor, 3.0 * factor, 1.0 * factor])
    assert [images for images, _ in alone] == [10, 11, 12]
    assert not stop.is_due


def test_processes_stop_at_the_steps_by_which_all_know_of_it(monkeypatch):
    """That one was asked to stop travels with the figures of a step."""
    others = [0.0]
    monkeypatch.setattr(training.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(training.distributed, "all_sum", lambda *figures: [*figures[:-1], figures[-1] + others[0]])
    stop = StopRequests()
    training.read_figures([step_figures(0)], stop)
    assert not stop.is_due
    stop.signum = signal.SIGINT
    assert not stop.is_due  # the others have not heard of it
    training.read_figures([step_figures(1)], stop)
    assert stop.is_due
    other = StopRequests()
    others[0] = 1.0
    training.read_figures([step_figures(1)], other)
    assert other.is_due and other.signum == 0
    with pytest.raises(Stopped):
        other.check()


@pytest.mark.parametrize(
    "options, share",
    [
        ({}, 0.5),  # of five images per class
        ({"wise_ft": 0.3}, 0.3),
        ({"head_init": "random"}, 1.0),
        ({"freeze_backbone": False}, 1.0),
        ({"freeze_backbone": False, "wise_ft": 0.3}, 0.3),
    ],
    ids=str,
)
def test_how_much_of_the_change_is_kept(options, share):
    assert optim.wise_ft_alpha(TuneOptions(**options), {0: 2, 1: 8}) == share


def test_the_best_epoch_by_each_measure():
    names = ("epoch", "val_loss", *Classification.best_by.values())
    rows = [(1, 0.3, 0.9, 0.5, 0.5), (2, 0.2, 0.9, 0.6, 0.4), (3, 0.1, 0.8, 0.6, 0.6)]
    history = [dict(zip(names, row, strict=True)) for row in rows]
    best = {by: training.best_epoch(history, column)["epoch"] for by, column in Classification.best_by.items()}
    assert best == {"accuracy": 2, "balanced": 3, "f1": 3}  # of equal ones that with the lower loss


def learning_rates(**options) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = optim.lr_schedule(optimizer, 10, **options)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_schedules():
    cosine = learning_rates(warmup_steps=2)
    assert cosine[:3] == [1.0, 2.0, 2.0]
    assert cosine[6] == pytest.approx(1.0)  # halfway between warm-up and end
    assert cosine[2:] == sorted(cosine[2:], reverse=True) and cosine[-1] > 0
    assert learning_rates(schedule="constant") == [2.0] * 10
    assert learning_rates(schedule="step") == pytest.approx([2.0] * 6 + [0.2] * 2 + [0.02] * 2)


@pytest.mark.slow
def test_peak_memory_grows_with_what_is_allocated():
    before = devices.peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(before // 4 + 64 * 2**20 // 4)  # more than the process ever held
    assert devices.peak_memory_bytes(torch.device("cpu")) >= before + 32 * 2**20
    del block


def test_extract_features_runs_in_eval_mode_and_restores_every_modules_mode():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9))
    model[0].eval()  # a frozen layer within a training model
    images = torch.randn(5, 3)
    batches = [(images[:3], torch.tensor([0, 1, 2])), (images[3:], torch.tensor([3, 4]))]
    features, labels = evaluation.extract_features(model, batches, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(features, images / (1 + 1e-5) ** 0.5)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert model.training and model[1].training and not model[0].training


def test_knn_accuracy_agrees_with_a_vote_counted_by_hand():
    generator = torch.Generator().manual_seed(0)
    bank, labels = torch.randn(40, 5, generator=generator), torch.arange(40) % 4
    queries, targets = torch.randn(30, 5, generator=generator), torch.arange(30) % 4
    correct = 0
    for query, target in zip(queries, targets, strict=True):
        similarity = F.cosine_similarity(bank, query[None])
        votes = [0.0] * 4
        for i in similarity.argsort(descending=True)[:7]:
            votes[labels[i]] += float(torch.exp(similarity[i] / 0.1))
        correct += votes.index(max(votes)) == target
    assert evaluation.knn_accuracy(bank, labels, queries, targets, k=7, temperature=0.1) == correct / 30
    assert evaluation.knn_accuracy(bank, labels, bank * 3, labels, k=1) == 1.0
    assert 0 <= evaluation.knn_accuracy(bank, labels, queries, targets, k=1000) <= 1


def test_evaluation_is_exact_over_uneven_batches_and_leaves_the_mode(images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(12, 4))
    data = [(torch.randn(3, 2, 2), i % 4) for i in range(11)]
    inputs, labels = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
    logits = inputs.flatten(1) @ model[2].weight.T + model[2].bias
    result = evaluation.evaluate(model, torch.utils.data.DataLoader(data, batch_size=4), torch.device("cpu"))
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert torch.equal(result.predictions, logits.argmax(1)) and torch.equal(result.labels, labels)
    assert result.accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert model.training and model[1].training and model[2].weight.grad is None


def test_images_travel_as_each_device_wants_them(monkeypatch):
    images, labels = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    moved = devices.to_device(images, torch.device("cpu"))
    assert torch.equal(moved, images) and moved.is_contiguous(memory_format=torch.channels_last)
    assert devices.to_device(labels, torch.device("cpu")) is labels
    calls = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **how: calls.append((device.type, how)) or self)
    for device in ("cuda", "mps"):
        devices.to_device(images, torch.device(device))
    plain = {"non_blocking": False, "memory_format": torch.preserve_format}
    assert calls == [("cuda", {"non_blocking": True, "memory_format": torch.channels_last}), ("mps", plain)]


def test_what_cuda_itself_takes_is_counted_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    assert devices.peak_memory_bytes(torch.device("cuda")) == 7 + devices.CUDA_CONTEXT_BYTES
    assert 3e8 <= devices.CUDA_CONTEXT_BYTES <= 5e8


def test_peak_memory_is_unknown_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda self: False)
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows: its import fails
    assert devices.peak_memory_bytes(torch.device("cpu")) is None


def test_balanced_weights_are_scikit_learns():
    labels = [0] * 6 + [1] * 3 + [3]
    weights = evaluation.balanced_weights(Counter(labels), 4)
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    assert weights[[0, 1, 3]].tolist() == pytest.approx(expected.tolist())
    assert weights[labels].mean().item() == pytest.approx(1)


def test_lowered_rates_stay_low_for_the_rest_of_the_schedule():
    """Of every group, and after a resume."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1.0, 0.1)]
    optimizer = torch.optim.AdamW(groups)
    schedule = optim.lr_schedule(optimizer, 10, 2)
    for _ in range(5):
        optimizer.step(), schedule.step()
    before = [group["lr"] for group in optimizer.param_groups]
    optim.lower_rates(schedule, 4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate / 4 for rate in before])
    again = optim.lr_schedule(torch.optim.AdamW([{**g, "params": g["params"]} for g in groups]), 10, 2)
    again.load_state_dict(schedule.state_dict())
    optimizer.step(), schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.25 * 0.5 * (1 + math.cos(math.pi * 4 / 8)) * r for r in (1, 0.1)])
    assert again.base_lrs == [0.25, 0.025]


def test_a_resnet_is_placed_in_the_memory_format_of_its_images_and_a_vit_as_it_is():
    device = torch.device("cpu")
    resnet = devices.place(build_backbone("resnet18", 2), device)
    images = devices.to_device(torch.rand(2, 3, 32, 32), device)
    for tensor in (images, resnet.layer1[0].conv1.weight, resnet.layer1(resnet.conv1(images))):
        assert tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    vit = devices.place(build_backbone("vit_mini", 2, 16), device)
    assert all(parameter.is_contiguous() for parameter in vit.parameters())
