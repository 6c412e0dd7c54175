"""toolkit/run/training.py: randomness, device, precision, schedule, features, k-NN accuracy, evaluation."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from finetune_lora import LoRALinear, build_model
from tests.dense import assert_unchanged, resnet, snapshot, vit
from toolkit import InputError, devices
from toolkit.answers import evaluation
from toolkit.answers.classification import Classification
from toolkit.devices import CPU, faster_dtype
from toolkit.images.data import LabelledImages
from toolkit.models.norms import freeze_statistics
from toolkit.run import optim, training
from toolkit.run.options import read_options


def test_each_process_needs_an_image(monkeypatch):
    monkeypatch.setattr(training.distributed, "world_size", lambda: 3)
    training.check_batches(nn.Linear(2, 2), 3, 3, batch_size=4)
    for train, val in ((2, 9), (9, 2)):
        with pytest.raises(InputError, match="3 processes are more than there are images to train or evaluate on"):
            training.check_batches(nn.Linear(2, 2), train, val, batch_size=4)


@pytest.mark.parametrize(
    ("size", "images", "in_float32", "in_bf16", "dtype"),
    [
        (64, 16, 0.1, 0.05, torch.bfloat16),
        (64, 16, 0.1, 0.08, torch.float32),
        (32, 64, 0.1, 0.2, torch.float32),
        (224, 2, 0.1, 0.2, torch.float32),
        (64, 16, 0.07, None, torch.float32),  # a step in less than 0.08 seconds stays in float32, unmeasured in bf16
    ],
)
def test_an_automatic_precision_is_what_pays(monkeypatch, spy, capsys, size, images, in_float32, in_bf16, dtype):
    """Measured on as many images as train like a batch. No random number is drawn."""
    seconds = iter((in_float32, in_bf16))
    monkeypatch.setattr(devices, "shortest_seconds", lambda work: work() or next(seconds))
    forward = spy(nn.Conv2d, "forward")
    random_state = torch.get_rng_state()
    assert faster_dtype(lambda dtype: nn.Conv2d(3, 1, 1), channels=3, size=size) == dtype
    assert torch.get_rng_state().equal(random_state)
    assert ("trains 2.0 times as fast" in capsys.readouterr().out) is (dtype == torch.bfloat16)
    assert forward.call_args.args[1].shape == (images, 3, size, size)


def test_what_is_measured_for_an_automatic_precision_is_a_copy(base, monkeypatch):
    """Of a model that trains: without one a CPU computes in float32 unless asked."""
    assert devices.select_precision("auto", CPU) == torch.float32
    assert devices.select_precision("bf16", CPU) == torch.bfloat16

    def faster(build, channels, size):
        assert (channels, size) == (3, 16)
        assert build(torch.bfloat16).encoder.layers[0].mlp[0].base_bits == 16
        return torch.float32

    monkeypatch.setattr(devices, "faster_dtype", faster)
    model, report = build_model(read_options(["--checkpoint", str(base)])[0], None, num_classes=3)
    assert model.encoder.layers[0].mlp[0].base_bits == 32 and report["dtype"] == torch.float32


def test_statistics_and_features_are_those_of_the_loaders_images():
    """Of these alone and alike, whatever the momentum; a frozen BatchNorm, dropout and the modes stay as they are."""
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.01), nn.Dropout(0.5), nn.BatchNorm1d(3, affine=False).eval())
    model(torch.randn(8, 3) * 4 - 7)
    freeze_statistics(model[2], freeze=True, training=False)
    frozen = snapshot(model[2])
    batches = torch.randn(4, 8, 3) * 5 + 2
    loader = DataLoader(TensorDataset(batches.flatten(0, 1), torch.arange(32)), batch_size=8)
    evaluation.estimate_statistics(model, loader, CPU, torch.float32)
    mean, variance = batches.mean((0, 1)), batches.var(1).mean(0)
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, variance)
    features, labels = evaluation.extract_features(model, loader, CPU, torch.float32)
    expected = (batches - mean) / (variance + 1e-5).sqrt() / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(features, expected.flatten(0, 1))
    assert labels.tolist() == [*range(32)]
    with pytest.raises(RuntimeError, match="should contain 7 elements"):
        evaluation.estimate_statistics(model, [(torch.zeros(2, 7), None)], CPU, torch.float32)
    assert_unchanged(frozen, model[2])
    assert [layer.training for layer in model] == [True, True, False] and model[0].momentum == 0.01


def test_the_worst_batch_is_normalised_by_itself():
    """As sums of the distances from its mean, in deviations."""
    batches = [(torch.tensor(rows)[:, None], torch.zeros(len(rows))) for rows in ([10.0, 12.0], [0.0, 0.0, 0.0, 4.0])]
    norm = nn.BatchNorm1d(1, eps=1e-12).eval()
    found = evaluation.worst_batch_loss(norm, batches, CPU, torch.float32, lambda outputs, _: outputs.abs().sum())
    assert found == pytest.approx(1.0)  # of the second batch it is (3 / 3^0.5 + 3^0.5) / 4


def test_the_start_takes_the_place_of_what_trains_and_comes_back_with_its_state():
    model = LoRALinear(2, 2, r=1)
    model.weight.requires_grad_(False)
    nn.init.constant_(model.lora_B, 2.0)
    kept = optim.KeptWeights(model, may_be_start=True)
    kept.begin()
    nn.init.constant_(model.lora_A, 4.0)
    nn.init.constant_(model.lora_B, 4.0)
    with kept.in_place():
        assert (model.lora_B == 4).all()
    kept.at_start = True
    with pytest.raises(KeyError), kept.in_place():
        assert (model.lora_A == 4).all() and (model.lora_B == 2).all()
        raise KeyError
    assert (model.lora_A == 4).all() and (model.lora_B == 4).all()
    resumed = optim.KeptWeights(model, may_be_start=True)
    resumed.load_state_dict(kept.state_dict())
    with resumed.in_place():
        assert (model.lora_B == 2).all()
    whole = optim.KeptWeights(nn.BatchNorm1d(2), may_be_start=False)
    whole.begin()
    assert whole.weights.keys() == {"weight", "bias"} and not whole.start  # no statistics, and no copy


def test_knn_accuracy_is_scikit_learns_of_votes_by_similarity(monkeypatch):
    bank = torch.randn(40, 5)
    labels = torch.arange(40) % 4
    queries = torch.randn(30, 5) * 10.0 ** torch.linspace(-2, 2, 30)[:, None]  # of any length
    targets = torch.arange(30) % 3  # of fewer classes than the bank has
    monkeypatch.setattr(evaluation, "NEIGHBOUR_TEMPERATURE", 0.1)
    monkeypatch.setattr(evaluation, "QUERIES_AT_ONCE", 8)
    for neighbours, there_are in ((7, 7), (1000, 40)):
        monkeypatch.setattr(evaluation, "NEIGHBOURS", neighbours)
        how = {"metric": "cosine", "weights": lambda distances: np.exp((1 - distances) / 0.1)}
        votes = KNeighborsClassifier(there_are, **how)
        expected = votes.fit(bank, labels).score(queries, targets)
        assert evaluation.knn_accuracy(bank, labels, queries, targets) == pytest.approx(expected)


def test_the_best_epoch_is_the_first_of_the_lowest_loss_among_equal_scores():
    rows = [(0.5, 1.0), (0.9, 0.7), (0.9, 0.4), (0.9, 0.6), (math.nan, 0.1)]
    history = [{"val_accuracy": score, "val_loss": loss} for score, loss in rows]
    assert training.best_epoch(history, "val_accuracy") is history[2]
    assert training.last_is_best(history[:3], "val_accuracy") and not training.last_is_best(history[:4], "val_accuracy")
    assert training.last_is_best([history[4], dict(history[4])], "val_accuracy")


def test_balanced_weights_are_scikit_learns():
    labels = [0] * 6 + [1] * 3 + [3]
    args = SimpleNamespace(class_weights="balanced", label_smoothing=0.0)
    weights = Classification.of_run("abcde", LabelledImages([None] * 10, labels), args).class_weights
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    assert weights[[0, 1, 3]].tolist() == pytest.approx(expected.tolist()) and weights[[2, 4]].isfinite().all()
    assert weights[labels].mean().item() == pytest.approx(1)


def test_a_rate_rises_in_the_warm_up_and_falls_in_a_cosine_and_once_lowered_stays_low():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = optim.lr_schedule(optimizer, total_steps=6, warmup_steps=2)
    rates = []
    for step in range(7):
        if step == 3:
            optim.lower_rates(schedule, 10)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.005 + 0.005 / 2**0.5, 0.005, 0.005 - 0.005 / 2**0.5, 0])


def test_a_resnet_is_placed_in_the_memory_format_of_its_images_and_a_vit_as_it_is():
    model = devices.place(resnet(), CPU)
    x = devices.to_device(torch.rand(2, 3, 32, 32), CPU)
    for tensor in (x, model.layer1[0].conv1.weight, model.layer1(model.conv1(x))):
        assert tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    assert all(parameter.is_contiguous() for parameter in devices.place(vit(), CPU).parameters())
