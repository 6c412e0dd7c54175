"""toolkit/run/training.py and optim.py: single steps, what a run starts from, its learning rates and their search."""

import copy
import math
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import finetune_lora
from finetune_lora import FineTuning, LoRALinear, build_model
from lora import initialization
from lora.initialization import adapter_pairs, start_at_gradient
from tests.conftest import LEAST_STEPS
from tests.dense import assert_unchanged, resnet, snapshot, vit
from tests.run_folders import assert_same_tensors, column, names_in, rows_of, train_on
from toolkit import InputError, devices
from toolkit.answers import evaluation, tasks
from toolkit.answers.classification import Classification
from toolkit.answers.evaluation import worst_batch_loss
from toolkit.answers.probe import HeadTemperature
from toolkit.answers.tasks import Regression
from toolkit.devices import CPU, faster_dtype
from toolkit.images.data import LabelledImages, Transformed, build_loader
from toolkit.models.backbones import headless
from toolkit.models.norms import freeze_statistics
from toolkit.run import loaders, optim, output_folder, reports, search, training
from toolkit.run.guard import Guard
from toolkit.run.options import FineTuneOptions, read_options
from toolkit.run.search import RATES, Trial, choose
from toolkit.run.training import MicroBatches


def gradients(run: FineTuning, sizes: list[int]) -> tuple[tuple[float, int], dict[str, torch.Tensor]]:
    """Loss, right answers and gradients of a step on the first training images, in batches of these sizes."""
    images, labels = default_collate([run.loaders.train.dataset[i * 5 % 21] for i in range(sum(sizes))])
    batches = zip(images.split(sizes), labels.split(sizes), strict=True)
    figures = train_on(run, MicroBatches(batches, len(sizes), sum(sizes), True))
    return figures, {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", ["", "--label-smoothing 0.2 --clip-grad-norm 0.01"])
def test_accumulated_batches_are_one_big_batch(start, options):
    # Of unequal sizes too: the last batch of an epoch is smaller, and its images count like any others.
    runs = [start(options), start(options)]
    for run in runs:  # else B is zero and A gets no gradient
        gradients(run, [5])
    (loss, right), whole = gradients(runs[0], [12])
    (loss_parts, right_parts), parts = gradients(runs[1], [5, 5, 2])
    assert right == right_parts
    assert loss == pytest.approx(loss_parts, rel=1e-5)
    assert any("lora_A" in name for name in whole)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)


def test_a_step_is_adamw_on_the_dense_gradient_of_the_smoothed_loss(start):
    run = start("--lora-rank 0 --label-smoothing 0.3 --weight-decay 0.1 --warmup-epochs 0")
    images, labels = default_collate([run.loaders.train.dataset[i] for i in range(6)])
    head = run.model.heads.head
    torch.nn.init.normal_(head.weight)
    torch.nn.init.normal_(head.bias)
    other = copy.deepcopy(head)
    log_p = F.log_softmax(other(headless(run.model)(images).detach()), dim=1)
    expected = -(0.7 * log_p.gather(1, labels[:, None]).mean() + 0.3 * log_p.mean())
    groups = [{"params": other.weight, "weight_decay": 0.1}, {"params": other.bias, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    expected.backward()
    optimizer.step()
    loss, right = train_on(run, MicroBatches(iter([(images, labels)]), 1, 6, True))
    assert loss == pytest.approx(F.nll_loss(log_p, labels, reduction="sum").item(), rel=1e-5)
    assert right == (log_p.argmax(1) == labels).sum()
    for ours, theirs in zip(head.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(ours, theirs)


def test_clipping_is_of_gradients_whose_scale_is_taken_out(start):
    """Else float16's scale, here 1,024, would make each step as much smaller."""
    run = start("--clip-grad-norm 0.01")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)
    before = torch.nn.utils.parameters_to_vector(run.model.parameters())
    train_on(run, next(run.loaders.steps(1)))
    change = torch.nn.utils.parameters_to_vector(run.model.parameters()) - before
    assert change.norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.filterwarnings("error")  # as PyTorch's, that the schedule went on without a step
def test_a_step_that_float16_cannot_hold_changes_no_weight_and_its_scale_comes_back_with_the_state(start):
    """To ask whether it was one would make the processor wait for a GPU: so the schedule goes on."""
    run = start()
    run.dtype = torch.float16
    run.begin_training(run.optimizer, 3, 0)
    run.dtype = torch.float32
    before = snapshot(run.model)
    state = run.trained()
    overflow = run.optimizer.param_groups[0]["params"][0].register_hook(lambda gradient: gradient * math.inf)
    train_on(run, next(run.loaders.steps(1)))
    assert_unchanged(before, run.model)
    assert run.scaler.get_scale() == 2.0**15  # half of the first
    overflow.remove()
    train_on(run, next(run.loaders.steps(1)))
    assert not torch.equal(run.model.heads.head.weight, before["heads.head.weight"])
    run.restore(state)
    assert run.scaler.get_scale() == 2.0**16


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_first_gradient_is_of_the_same_images_however_they_are_batched(start, spy, monkeypatch, accumulated):
    monkeypatch.setattr(initialization, "GRADIENT_IMAGES", 8)
    run = start(f"--batch-size 4 --accumulation-steps {accumulated}")
    loss = spy(run.task, "loss")
    run._first_backward()
    assert sum(len(labels) for (_, labels), _ in loss.call_args_list) == 8


def test_an_epoch_sees_every_image_once_in_a_new_order_in_training_mode(start, monkeypatch):
    run = start("--batch-size 8 --accumulation-steps 2 --learning-rate 1e-5 --epochs 2 --head-init random")
    run.model.eval()
    seen = []
    real_steps = run.loaders.steps

    def steps(epoch: int, first: int):
        assert run.model.training
        for step in real_steps(epoch, first):
            batches = list(step.batches)
            _, labels = zip(*batches, strict=True)
            sizes = list(map(len, labels))
            assert (step.number, step.images) == (len(batches), sum(sizes))
            seen.append((sizes, torch.cat(labels)))
            yield step._replace(batches=iter(batches))

    monkeypatch.setattr(run.loaders, "steps", steps)
    train_on(run)
    sizes, labels = zip(*seen, strict=True)
    assert sizes == ([8, 8], [5], [8, 8], [5])
    assert run.schedule.last_epoch == 4 and run.schedule.get_last_lr() == [0, 0, 0]  # the end of the cosine
    first = torch.cat(labels[:2])
    assert first.bincount().tolist() == [7, 7, 7] and not torch.equal(first, torch.cat(labels[2:]))


def test_accumulated_batches_are_read_one_at_a_time(start, monkeypatch):
    run = start("--batch-size 3 --accumulation-steps 7 --epochs 1 --head-init random")
    events = []
    run.model.register_forward_hook(lambda *_: events.append("forward"))
    read = Transformed.__getitem__
    monkeypatch.setattr(Transformed, "__getitem__", lambda self, i: events.append("read") or read(self, i))
    train_on(run)
    assert events[:8] == ["read", "read", "read", "forward"] * 2


@pytest.mark.parametrize("labels, batch, parts, steps", [(5, 8, 1, 12), (5, 2, 2, 12), (5, 1, 1, 15), (1, 8, 1, 12)])
def test_an_epoch_of_few_images_has_twelve_steps(start, monkeypatch, labels, batch, parts, steps):
    monkeypatch.setattr(loaders, "LEAST_STEPS", LEAST_STEPS)
    run = start(f"--labels-per-class {labels} --batch-size {batch} --accumulation-steps {parts}")
    assert run.steps_per_epoch == len(list(run.loaders.steps(1))) == steps
    assert loaders.steps_of_epoch(run.args, run.splits) == steps


def test_a_last_batch_of_one_image_is_left_to_another_epoch_where_batch_norm_trains(start, saved, narrow):
    """A ResNet at 32 pixels ends in maps of 1x1."""
    options = f"--checkpoint {saved(narrow)} --image-size 32 --lora-rank 0 --no-freeze-backbone"
    run = start(f"{options} --labels-per-class 3 --batch-size 4")
    assert [step.images for step in run.loaders.steps(1)] == [4, 4]  # of nine
    with pytest.raises(InputError, match=r"BatchNorm that trains needs 2 images or more.*raise --batch-size"):
        start(f"{options} --batch-size 1")


def test_a_head_starts_on_the_statistics_that_training_will_see(start, saved, narrow, spy):
    """With a file's own it would not fit what BatchNorm gives it in training; k-NN before is as the file has them."""
    resnet = f"--checkpoint {saved(narrow)} --image-size 32 --lora-rank 0 --batch-size 7"
    trains = start(f"{resnet} --norms train")
    patients = torch.arange(21) // 2
    trains.loaders.probe_images.clusters = lambda: patients
    start_head = spy(tasks, "start_head")
    trains.start()
    assert [call.args[4] is patients for call in start_head.call_args_list] == [True, True]
    pixels, _ = default_collate(list(trains.loaders.train.dataset))
    maps = trains.model.conv1(pixels).detach()
    torch.testing.assert_close(trains.model.bn1.running_mean, maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    frozen = start(resnet)
    frozen.start()
    assert torch.equal(frozen.model.bn1.running_mean, narrow["bn1.running_mean"])
    assert trains.baseline["knn"] == frozen.baseline["knn"]
    how = (CPU, torch.float32, trains.task.plain_loss)
    assert trains.guard.first_loss == worst_batch_loss(trains.network, trains.loaders.watched, *how)
    assert frozen.guard.first_loss is None  # the first step tells it


def test_the_rates_of_each_group(start):
    optimizer = start("--warmup-epochs 0 --norms train").optimizer
    groups = []
    for group in optimizer.param_groups:
        groups.append((group["lr"], group["weight_decay"], {parameter.dim() for parameter in group["params"]}))
    # Biases and norms, the head's weight, adapters
    assert sorted(groups) == [(0.01, 0.0, {1}), (0.01, 0.01, {2}), (0.24, 0.01, {2})]
    assert optimizer.defaults["fused"]
    assert start("--lora-init random --warmup-epochs 0").optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("options", ["", "--use-qlora", "--lora-dropout 0.5 --norms train"])
def test_adapters_start_at_the_gradient_that_the_first_images_have(start, options):
    """With the head as it then is, and without dropout. What is still in `.grad` would be added to the first step's."""
    run = start(options)
    reference = start(options)
    run.start()
    head = {name: p for name, p in run.model.state_dict().items() if "lora_" not in name}
    reference.model.load_state_dict(head, strict=False)

    def backward():
        for images, labels in build_loader(run.loaders.train.dataset, batch_size=32):  # all 21, in another order
            F.cross_entropy(reference.model(images), labels, reduction="sum").backward()

    reference.model.eval()
    start_at_gradient(reference.model, backward)
    for (A, B), (expected, _) in zip(adapter_pairs(run.model), adapter_pairs(reference.model), strict=True):
        cosines = torch.linalg.svdvals(A.detach() @ expected.detach().T) * 3  # of the two spaces
        assert cosines[0] > 0.999 and cosines.mean() > 0.9
        assert not B.any() and A.grad is None
    assert run.model.training


@pytest.mark.parametrize(("options", "probe"), [("--lora-init random", 1.0), ("--head-init random", None)])
def test_adapters_start_at_random_where_there_is_no_gradient_to_go_by(start, options, probe):
    run = start(options)
    before = snapshot(run.model)
    run.start()
    assert run.baseline == {"probe": probe, "knn": 1.0}
    assert_unchanged(before, run.model, [name for name in before if "lora_" in name])


# ------------------------------------------------------------------- toolkit/run/training.py, and what it computes with


def test_each_process_needs_an_image_and_of_norms_that_train_one_of_each_batch(monkeypatch):
    """Of three processes, which answer six at a time if asked for five: a rest of one or two is left out."""
    monkeypatch.setattr(training.distributed, "world_size", lambda: 3)
    run = SimpleNamespace(args=SimpleNamespace(batch_size=5))
    run.has_small_rest = partial(loaders.Loaders.has_small_rest, run)
    sets = [LabelledImages([None] * images) for images in (12, 13, 14, 15)]
    assert [len(loaders.Loaders.without_small_rest(run, images)) for images in sets] == [12, 12, 12, 15]
    with pytest.raises(InputError, match="BatchNorm that trains needs 3 images or more, and one in each process"):
        training.check_batches(nn.BatchNorm1d(2), 3, 3, batch_size=2)
    training.check_batches(nn.Linear(2, 2), 3, 3, batch_size=4)
    for train, val in ((2, 9), (9, 2)):
        with pytest.raises(InputError, match="3 processes are more than there are images to train or evaluate on"):
            training.check_batches(nn.Linear(2, 2), train, val, batch_size=4)


@pytest.mark.parametrize(
    ("size", "images", "in_float32", "in_bf16", "dtype"),
    [
        (96, 32, 0.2, 0.1, torch.bfloat16),
        (96, 32, 0.2, 0.19, torch.float32),
        (32, 32, 0.2, 0.4, torch.float32),
        (224, 5, 0.2, 0.4, torch.float32),
        (512, 2, 0.2, 0.4, torch.float32),
        (96, 32, 0.15, None, torch.float32),  # a step in less than 0.16 seconds stays in float32, unmeasured in bf16
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
        expected = KNeighborsClassifier(there_are, **how).fit(bank, labels).score(queries, targets)
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


# ---------------------------------------------------- learning rates: the default, the schedule, and the search for one


USUAL = 1e-4
VARIANCE = Classification(["cat", "dog"]).variance


def test_a_short_run_trains_at_a_lower_rate():
    """From 80 steps on it is the one that was typed; below it grows with the steps, and hardly with what was typed."""
    divisor = partial(optim.run_divisor, FineTuneOptions())
    assert divisor(1e-2, 80) == divisor(1e-4, 1000) == 1
    assert divisor(1e-4, 20) == 32 and divisor(1e-4, 5) == 1024
    rates = [rate / divisor(rate, 5) for rate in (1e-4, 1e-3, 1e-2)]
    assert rates == pytest.approx([9.77e-8, 9.77e-8, 9.77e-8], rel=1e-2)
    steps = [1e-2 / divisor(1e-2, steps) for steps in (10, 40, 70, 78)]
    assert steps == sorted(steps) and steps[-1] == pytest.approx(1.54e-3, rel=1e-2)
    for epochs, an_epoch, in_all, steps in ((1, 50, 500, 50), (1, 1, 30, 15), (1, 3, 300, 20), (1, 50, 50, 25)):
        assert optim.warmup_steps(epochs, an_epoch, in_all) == steps
    assert FineTuneOptions().warmup_epochs == 1  # any other number is as typed
    assert optim.warmup_steps(8, 50, 500) == 400 and optim.warmup_steps(0, 1, 10) == 0
    # Of adapters of whole images that start at the gradient alone.
    others = {"head_init": "random", "lora_init": "random", "freeze_backbone": False, "task": "segmentation"}
    for name, value in others.items():
        assert optim.run_divisor(FineTuneOptions(**{name: value}), rate=1e-2, steps=2) == 1


@pytest.mark.parametrize(("options", "remedy"), [("", "--lora-init random"), ("--lora-rank 0", "--head-init random")])
def test_the_way_to_a_rate_as_it_is_typed_goes_with_the_other_options(start, monkeypatch, options, remedy):
    """Without adapters there is nothing that --lora-init could start: it is refused."""
    monkeypatch.setattr(optim, "STEPS_TO_TRAIN", 80)
    run = start(f"{options} --epochs 5")
    assert run.rate == pytest.approx(1e-2 / optim.run_divisor(FineTuneOptions(), 1e-2, 5 * run.steps_per_epoch))
    told = reports.describe_rates(run)
    assert f"so few steps cannot correct what a high rate does (with {remedy} it stays as typed)" in told
    assert start(f"{options} {remedy}").rate == 1e-2


@pytest.mark.parametrize("norms", ["follow", "frozen"])
def test_adapters_of_a_resnet_learn_twice_as_fast_from_a_head_as_soft(norms, start, saved, narrow):
    runs = [start(f"--checkpoint {saved(narrow)} --image-size 32 --norms {norms} --labels-per-class 2"), start()]
    assert [run.adapter_lr_factor for run in runs] == [48, 24]
    for run in runs:
        run.head_temperature = HeadTemperature(per_rate=100.0)
        assert run.temperature == pytest.approx(100 * run.rate * 24)


def test_of_rates_that_chance_may_have_ordered_the_nearest_to_the_usual_one_is_taken():
    accuracies = [0.5, 0.88, 0.85, 0.88, 0.9, 0.89, 0.0]
    trials = [Trial(rate, accuracy, 0.0) for rate, accuracy in zip(RATES, accuracies, strict=True)]
    for images, expected in ((20, 1e-4), (100, 3e-4), (10_000, 1e-3)):
        assert choose(trials, partial(VARIANCE, images=images), USUAL) == expected
    alike = [Trial(rate, 1.0, 0.0) for rate in RATES]
    for options, expected in (("", 1e-4), ("--lora-rank 0 --no-freeze-backbone", 1e-3), ("--lora-rank 0", 1e-4)):
        usual = search.usual_rate(read_options(options.split())[0])
        assert choose(alike, partial(VARIANCE, images=5), usual) == expected


def test_a_rate_at_which_training_collapses_is_not_taken_for_numbers_that_no_rate_learns():
    """Their R2 is below 0, which is what a collapsed trial is given."""
    variance = partial(Regression(["age"], mean=torch.zeros(1), std=torch.ones(1)).variance, images=100)
    trials = [Trial(rate, -0.1, 1.1) if rate < 1e-4 else Trial(rate, 0.0, math.inf) for rate in RATES]
    assert choose(trials, variance, USUAL) == 3e-5
    assert choose([Trial(rate, 0.0, math.inf) for rate in RATES], variance, USUAL) == 1e-4


def test_where_no_trial_has_a_score_the_lowest_loss_chooses(capsys):
    """As of numbers that do not differ on the validation part; the trials are paid for."""
    trials = [Trial(rate, math.nan, abs(math.log(rate / 1e-3))) for rate in RATES]
    assert choose(trials, partial(VARIANCE, images=100), USUAL) == 1e-3
    assert "the score is not defined on the validation part" in capsys.readouterr().out
    trials[0] = Trial(RATES[0], 0.5, 9.0)
    assert choose(trials, partial(VARIANCE, images=100), USUAL) == RATES[0]


def test_a_short_run_searches_among_the_rates_that_it_can_train_at(monkeypatch):
    """Four steps lower all the others to nearly the same."""
    monkeypatch.setattr(search, "RATES", RATES)
    peaks = [rate / optim.run_divisor(FineTuneOptions(), rate, steps=4) for rate in RATES]
    assert search.rates_that_differ(dict(zip(RATES, peaks, strict=True)).get) == [1e-5, 3e-5, 1e-4]
    assert search.rates_that_differ(lambda rate: rate**0.4) == list(RATES)  # at least 3^0.4 = 1.55 apart
    assert search.rates_that_differ(lambda rate: rate**0.35) == list(RATES[::2])  # 3^0.35 = 1.47


def test_a_stopped_search_goes_on_and_its_run_is_that_of_what_it_finds(finetune, spy, monkeypatch, tmp_path):
    def highest(trials, variance, usual):
        assert usual == USUAL and variance(0.5) == pytest.approx(0.25 / 4)  # of the four images that judge
        return max(trial.learning_rate for trial in trials)

    monkeypatch.setattr(search, "choose", highest)
    common = "--epochs 1 --labels-per-class 4 --lora-dropout 0.2 --lr"
    save_once = mock.Mock(wraps=finetune_lora.save_atomically, side_effect=[mock.DEFAULT, KeyboardInterrupt])
    with mock.patch.object(finetune_lora, "save_atomically", save_once), pytest.raises(KeyboardInterrupt):
        finetune(f"{common} auto", "stopped")
    with pytest.raises(InputError, match=r"belongs to a run with other settings \(finetune\.batch_size was 8, is 4\)"):
        finetune(f"{common} auto --batch-size 4 --resume", "stopped")
    with pytest.raises(
        InputError, match=r"last\.pth is of a search for a learning rate: resume with --learning-rate a"
    ):
        finetune(f"{common} 1e-3 --resume", "stopped")
    trials = spy(finetune_lora.TrialRun, "start")
    resumed = finetune(f"{common} auto --resume", "stopped")
    assert trials.call_count == 1
    assert yaml.safe_load((resumed["folder"] / "config.yaml").read_text())["finetune"]["learning_rate"] == "auto"
    assert names_in(resumed["folder"]) < {*output_folder.FINE_TUNING_FILES}
    assert column(rows_of(resumed["folder"] / "learning_rates.csv"), "learning_rate") == ["0.0001", "0.001"]
    typed = finetune(f"{common} 1e-3", "typed")
    assert_same_tensors(resumed["folder"] / "lora.pth", typed["folder"] / "lora.pth")
    (tmp_path / "stopped/last.pth").rename(tmp_path / "stopped/copy.pth")
    copied = finetune(f"{common} auto --resume copy.pth", "stopped")  # whose trials are moved aside
    for results in (resumed, typed, copied):
        assert results["learning_rate"] == results["config"]["finetune"]["learning_rate"] == 1e-3
    assert list(copied["chosen_by"]) == ["learning rate"]
    # A rate that was typed was not searched, however its run goes on; what is no run's file is refused.
    assert finetune(f"{common} auto --resume", "typed")["chosen_by"] == {}
    torch.save({"trials": []}, tmp_path / "other.pth")
    for rate in ("auto", "1e-3"):  # the second is no search, which could go on with this
        with pytest.raises(InputError, match=r"other\.pth is not a last\.pth of this version"):
            finetune(f"{common} {rate} --resume {tmp_path / 'other.pth'}")


def test_trials_are_short_and_leave_no_file(finetune, spy, monkeypatch, capsys):
    """They train on fewer images. One that collapses has a score of 0."""
    made = []
    train = finetune_lora.train

    def note(run, *given):
        made.append(run)
        if len(made) == 1:
            run.go_back("as if it had collapsed")
        if len(made) == 2:
            assert not run.path("lora.pth").exists() and run.path("last.pth").exists()
        train(run, *given)
        if len(made) == 2:
            run.history.append(run.history[0] | {"val_accuracy": 0.25, "val_loss": 7.0})

    monkeypatch.setattr(finetune_lora, "train", note)
    monkeypatch.setattr(Guard, "after_epoch", lambda *_: False)
    counted = spy(finetune_lora, "steps_of_epoch")  # which knows of epochs that have more than one pass
    features = spy(finetune_lora.Loaders, "features")
    divisor = spy(optim, "run_divisor")
    finetune("--learning-rate auto --labels-per-class 4 --batch-size 4 --accumulation-steps 2")
    assert features.call_count == 2  # the trials share theirs
    assert divisor.call_args_list[0].args[2] == 2  # steps of two epochs on 8 images, by which rates to try are chosen
    assert counted.call_count == 1 and len(counted.call_args.args[1].train) == 8
    trial, second, run = ((len(run.splits.train), run.args.epochs) for run in made)
    assert trial == second == (8, 2) and run == (12, 2)
    told = capsys.readouterr().out
    assert "searching for a learning rate: 2 runs of 2 epochs on 8 training images, judged by 4 others of them" in told
    assert "learning rate 1e-04: accuracy 0.00%, loss inf" in told and told.count("epoch 1: training loss") == 1
    assert "learning rate 1e-03: accuracy 25.00%, loss 7.0000" in told  # of its last epoch
    assert "learning rate 1e-3 chosen by trials on a part of the training images" in told
