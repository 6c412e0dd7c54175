"""Single steps of fine-tuning, and what a run starts from."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
import yaml

import deploy_lora
import finetune_lora
from finetune_lora import FineTuning, LoRALayer, load_finetuned
from lora import initialization
from lora.initialization import adapter_pairs, start_at_gradient
from lora_utils import read_adapter_file
from tests.run_folders import assert_same_tensors, stop, tensors, train_on
from toolkit import InputError
from toolkit.answers.classification import ClassObjective
from toolkit.answers.evaluation import evaluate
from toolkit.files import read_checkpoint
from toolkit.images.data import Transformed, build_loader
from toolkit.images.sources import load_splits
from toolkit.models.backbones import build_backbone
from toolkit.run import runs
from toolkit.run.training import MicroBatches

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------ one step


def test_a_step_trains_on_its_images_and_reports_the_loss_without_weights_and_smoothing(start, monkeypatch):
    run, plain = start("--label-smoothing 0.1 --class-weights balanced"), start()
    images = torch.stack([run.loaders.train.dataset[i][0] for i in range(6)])
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    seen, real = [], run.task.loss
    monkeypatch.setattr(run.task, "loss", lambda logits, y: seen.append((logits.detach(), y)) or real(logits, y))
    loss, right = train_on(run, MicroBatches(iter([(images, labels)]), 1, 6, True))
    [(logits, _)] = seen
    torch.testing.assert_close(logits, plain.model(images), rtol=1e-4, atol=1e-4)
    assert loss == pytest.approx(F.cross_entropy(logits, labels, reduction="sum").item(), rel=1e-4)
    assert right == (logits.argmax(1) == labels).sum()


def gradients(run: FineTuning, sizes: list[int]) -> tuple[tuple[float, int], dict[str, torch.Tensor]]:
    """Loss, right answers and gradients of a step on the first training images, in batches of these sizes."""
    batches, position = [], 0
    for size in sizes:
        samples = [run.loaders.train.dataset[i * 5 % 21] for i in range(position, position + size)]
        batches.append((torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])))
        position += size
    figures = train_on(run, MicroBatches(iter(batches), len(batches), sum(sizes), True))
    return figures, {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", ["", "--label-smoothing 0.2 --clip-grad-norm 0.01", "--use-qlora"])
def test_accumulated_batches_are_one_big_batch(start, options):
    # Of unequal sizes too: the last batch of an epoch is smaller, and its images count like any others.
    runs = [start(options), start(options)]
    for run in runs:  # else B is zero and A gets no gradient
        gradients(run, [5])
    (loss, right), whole = gradients(runs[0], [12])
    (loss_parts, right_parts), parts = gradients(runs[1], [5, 5, 2])
    assert right == right_parts
    assert loss == pytest.approx(loss_parts, rel=1e-5)
    assert whole.keys() == parts.keys() and any("lora_A" in name for name in whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_step_is_adamw_on_the_dense_gradient_of_the_smoothed_loss(start):
    run = start("--lora-rank 0 --label-smoothing 0.3 --weight-decay 0.1 --warmup-epochs 0")
    images = torch.stack([run.loaders.train.dataset[i][0] for i in range(6)])
    labels = torch.tensor([run.loaders.train.dataset[i][1] for i in range(6)])
    head = run.model.heads.head
    weight, bias = (p.detach().clone().requires_grad_() for p in (head.weight, head.bias))
    with torch.no_grad():
        features = run.model.eval()._process_input(images)
        features = torch.cat([run.model.class_token.expand(6, -1, -1), features], dim=1)
        features = run.model.encoder(features)[:, 0]
    run.model.train()
    log_p = F.log_softmax(features @ weight.T + bias, dim=1)
    expected = -(0.7 * log_p.gather(1, labels[:, None]).mean() + 0.3 * log_p.mean())
    optimizer = torch.optim.AdamW([weight, bias], lr=1e-2, weight_decay=0.1)
    expected.backward()
    optimizer.step()
    loss, _ = train_on(run, MicroBatches(iter([(images, labels)]), 1, 6, True))
    assert loss == pytest.approx(F.nll_loss(log_p, labels, reduction="sum").item(), rel=1e-5)
    for ours, theirs in zip((head.weight, head.bias), (weight, bias), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_clipping_bounds_the_norm_of_the_whole_step(start):
    _, free = gradients(start(), [8])
    _, clipped = gradients(start("--clip-grad-norm 0.01"), [8])
    norm = math.sqrt(sum(g.square().sum().item() for g in free.values()))
    assert norm > 0.02
    for name, gradient in free.items():
        torch.testing.assert_close(clipped[name], gradient * (0.01 / norm), rtol=1e-3, atol=1e-9)


def test_clipping_is_of_gradients_whose_scale_is_taken_out(start):
    """Else float16's scale, here 1,024, would make each step as much smaller."""
    run = start("--clip-grad-norm 0.01")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    norms = []

    def note(*_):
        gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())

    run.optimizer.register_step_pre_hook(note)
    train_on(run, next(run.loaders.steps(1)))
    assert norms == [pytest.approx(0.01, rel=1e-3)]


def test_float16s_scale_comes_back_with_the_state(start):
    run = start()
    run.dtype = torch.float16
    run.begin_training(run.model, run.optimizer, 3, 0)
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 32.0, "_growth_tracker": 7})
    state = run.trained()
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 8.0, "_growth_tracker": 1})
    run.restore(state)
    assert (run.scaler.state_dict()["scale"], run.scaler.state_dict()["_growth_tracker"]) == (32.0, 7)


def test_an_epoch_trains_in_training_mode(start, monkeypatch):
    run = start("--epochs 1")
    run.start()
    run.model.eval()
    modes = []
    real = run.task.loss
    monkeypatch.setattr(run.task, "loss", lambda *batch: modes.append(run.model.training) or real(*batch))
    train_on(run)
    assert modes and all(modes)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_first_gradient_is_of_the_same_images_however_they_are_batched(start, monkeypatch, accumulated):
    monkeypatch.setattr(initialization, "GRADIENT_IMAGES", 8)
    run = start(f"--batch-size 4 --accumulation-steps {accumulated}")
    images = []
    real = run.task.loss
    monkeypatch.setattr(run.task, "loss", lambda outputs, labels: images.append(len(labels)) or real(outputs, labels))
    run._first_backward()
    assert sum(images) == 8


@pytest.mark.slow
def test_bf16_computes_in_it_and_keeps_the_adapters_in_float32(start, finetune):
    runs = [start(), start("--precision bf16")]
    for run in runs:  # the head is zero before
        gradients(run, [8])
    ((exact, *_), _), ((loss, *_), found) = (gradients(run, [8]) for run in runs)
    assert loss != exact and loss == pytest.approx(exact, rel=0.02)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    results = finetune("--precision bf16 --epochs 1")
    assert results["precision"] == "bfloat16"
    assert {tensor.dtype for tensor in tensors(results["folder"] / "lora.pth").values()} == {torch.float32}


def test_an_epoch_sees_every_image_once_in_a_new_order(start, monkeypatch):
    run, seen = start("--batch-size 8 --accumulation-steps 2 --learning-rate 1e-5 --epochs 2 --wise-ft 1"), []
    real_steps = run.loaders.steps

    def steps(epoch: int, first: int):
        for step in real_steps(epoch, first):
            batches = list(step.batches)
            seen.append([labels for _, labels in batches])
            assert (step.number, step.images) == (len(batches), sum(len(labels) for _, labels in batches))
            yield step._replace(batches=iter(batches))

    monkeypatch.setattr(run.loaders, "steps", steps)
    train_on(run)
    sizes = [[len(labels) for labels in step] for step in seen]
    assert sizes == [[8, 8], [5], [8, 8], [5]] and run.schedule.last_epoch == 4
    orders = [torch.cat([labels for step in seen[i : i + 2] for labels in step]) for i in (0, 2)]
    assert torch.equal(orders[0].bincount(), torch.tensor([7, 7, 7])) and not torch.equal(*orders)


def test_accumulated_batches_are_read_one_at_a_time(start, monkeypatch):
    run, events = start("--batch-size 3 --accumulation-steps 7 --epochs 1 --wise-ft 1"), []
    run.model.register_forward_hook(lambda *_: events.append("forward"))
    read = Transformed.__getitem__
    monkeypatch.setattr(Transformed, "__getitem__", lambda self, i: events.append("read") or read(self, i))
    train_on(run)
    assert events[:8] == ["read", "read", "read", "forward"] * 2


@pytest.mark.slow
def test_a_last_batch_of_one_image_is_left_to_another_epoch_where_batch_norm_trains(finetune, saved, images, tmp_path):
    """Of 21 images in batches of 4 one is left over; a ResNet at 32 pixels ends in maps of 1x1."""
    resnet = saved(build_backbone("resnet18", 5).state_dict())
    options = f"--checkpoint {resnet} --image-size 32 --epochs 1 --lora-rank 0 --no-freeze-backbone"
    finetune(f"{options} --batch-size 4")
    assert read_checkpoint(tmp_path / "out/last.pth")["schedule"]["last_epoch"] == 5
    with pytest.raises(InputError, match=r"BatchNorm that trains needs 2 images or more.*raise --batch-size"):
        finetune(f"{options} --batch-size 1")
    # To evaluate, BatchNorm needs no other image.
    alone = f"evaluate {tmp_path / 'out/lora.pth'} {images} --batch-size 1 --device cpu"
    assert 0 <= deploy_lora.main(alone.split())["accuracy"] <= 1


@pytest.mark.slow
def test_a_head_starts_on_the_statistics_that_training_will_see(finetune, saved, images, monkeypatch, tmp_path):
    """Those of the training images: with a file's own the head would not fit what BatchNorm gives it in training.

    What the backbone knows before training is told as the file has it.
    """
    resnet = build_backbone("resnet18", 5)
    options = f"--checkpoint {saved(resnet.state_dict())} --image-size 32 --epochs 1 --lora-rank 0 --batch-size 7"
    monkeypatch.setattr(runs.StopRequests, "check", stop)
    with pytest.raises(runs.Stopped):  # at the first step: the file is the probe's
        finetune(f"{options} --norms train")
    model, info = load_finetuned(tmp_path / "out/lora.pth")
    pixels = torch.stack([info["transform"](image) for image, _ in load_splits("imagefolder", images).train])
    maps = resnet.conv1(pixels)
    torch.testing.assert_close(model.bn1.running_mean, maps.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert resnet.bn1.running_mean.abs().max() == 0  # what the file has
    with pytest.raises(runs.Stopped):
        finetune(options, "frozen")
    baselines = [read_checkpoint(tmp_path / name / "last.pth")["before"] for name in ("out", "frozen")]
    assert baselines[0] == baselines[1]


def test_the_gradient_chooses_the_blocks_and_the_run_is_that_of_their_number(finetune, monkeypatch, capsys):
    """Also where it is resumed: the choice stands in its files."""
    monkeypatch.setattr(initialization, "ENERGY_SHARE", 0.01)  # which the last block alone has
    chosen = finetune("--adapt-last auto --epochs 1 --labels-per-class 2", "auto")
    assert "adapters: the last 1 of 2 blocks, by the share of the gradient" in capsys.readouterr().out
    assert chosen["config"]["finetune"]["adapt_last"] == 1
    assert yaml.safe_load((chosen["folder"] / "config.yaml").read_text())["finetune"]["adapt_last"] == "auto"
    typed = finetune("--adapt-last 1 --epochs 1 --labels-per-class 2", "typed")
    assert_same_tensors(chosen["folder"] / "lora.pth", typed["folder"] / "lora.pth")
    monkeypatch.setattr(initialization, "blocks_with_most", None)  # is not asked again
    resumed = finetune("--adapt-last auto --epochs 1 --labels-per-class 2 --resume", "auto")
    assert resumed["config"]["finetune"]["adapt_last"] == 1


@pytest.mark.parametrize("flags", ["", "--use-qlora", pytest.param("--precision bf16", marks=pytest.mark.slow)])
def test_only_the_upper_blocks_are_adapted_and_differentiated(finetune, images, flags):
    """Also in what the file says, from which the model is built anew, with what was in 4 bits below."""
    seen, real_train = [], finetune_lora.train

    def train(run, after_epoch):
        for block in run.model.encoder.layers:
            block.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
        real_train(run, after_epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_lora, "train", train)
        results = finetune(f"--adapt-last 1 --epochs 1 --labels-per-class 2 {flags}")
    assert seen[:2] == [False, True]
    layers = read_adapter_file(results["folder"] / "lora.pth")["layers"]
    blocks = {int(re.match(r"encoder\.layers\.encoder_layer_(\d)\.", n)[1]): r["r"] > 0 for n, r in layers.items()}
    assert blocks == ({0: False, 1: True} if flags == "--use-qlora" else {1: True})
    model, _ = load_finetuned(results["folder"] / "lora.pth")
    assert {name for name, m in model.named_modules() if isinstance(m, LoRALayer)} == set(layers)
    again = deploy_lora.main(["evaluate", str(results["folder"] / "lora.pth"), str(images / "val"), "--device", "cpu"])
    assert again["loss"] == pytest.approx(results["val_loss"], rel=1e-2 if "bf16" in flags else 1e-4)


def test_a_run_begins_as_the_linear_probe_that_it_saves(finetune, images, monkeypatch, tmp_path):
    monkeypatch.setattr(FineTuning, "begin_epoch", stop)
    with pytest.raises(runs.Stopped):
        finetune("--augmentation crop --labels-per-class 2")
    model, info = load_finetuned(tmp_path / "out/lora.pth")
    loader = build_loader(Transformed(load_splits("imagefolder", images).val, info["transform"]), 8)
    assert evaluate(model, loader, CPU).accuracy == info["val_accuracy"] == 1.0 and info["epoch"] == 0


def test_a_random_head_and_the_rates_of_each_group(finetune, start):
    results = finetune("--head-init random --epochs 1 --labels-per-class 2")
    assert results["probe_accuracy_before"] is None and results["knn_accuracy_before"] == 1.0
    rates = [(group["lr"], group["weight_decay"]) for group in start("--warmup-epochs 0").optimizer.param_groups]
    assert sorted(rates) == [(0.01, 0.0), (0.01, 0.01), (0.24, 0.01)]  # the head's bias and weight, adapters
    assert start("--lora-init random --warmup-epochs 0").optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("options", ["", "--use-qlora", "--lora-dropout 0.5 --norms train"])
def test_adapters_start_at_the_gradient_that_the_first_images_have(start, options):
    """With the head as it then is, and without dropout. What is still in `.grad` would be added to the first step's."""
    run, reference = start(options), start(options)
    run.start()
    head = {name: p for name, p in run.model.state_dict().items() if "lora_" not in name}
    reference.model.load_state_dict(head, strict=False)

    def backward():
        for images, labels in build_loader(run.loaders.train.dataset, batch_size=32):  # all 21, in another order
            F.cross_entropy(reference.model(images), labels, reduction="sum").backward()

    reference.model.eval()
    start_at_gradient(reference.model, backward)
    for (_, A, B), (_, expected, _) in zip(adapter_pairs(run.model), adapter_pairs(reference.model), strict=True):
        cosines = torch.linalg.svdvals(A.detach() @ expected.detach().T) * 3  # of the two spaces
        assert cosines[0] > 0.999 and cosines.mean() > 0.9
        assert not B.any() and A.grad is None
    assert run.model.training


def test_adapters_start_alike_in_float16_where_the_gradient_is_small(start, monkeypatch):
    """Of a loss so small float16 would hold no gradient, were it not scaled."""
    monkeypatch.setattr(ClassObjective, "loss", lambda task, *batch: 1e-5 * F.cross_entropy(*batch, reduction="sum"))
    precise, low = start("--learning-rate 1e-4"), start("--learning-rate 1e-4")
    low.dtype, low.scaler = torch.float16, torch.amp.GradScaler("cpu")
    for run in (precise, low):
        run.start()
    for (_, A, _), (_, expected, _) in zip(adapter_pairs(low.model), adapter_pairs(precise.model), strict=True):
        assert torch.linalg.svdvals(A.detach() @ expected.detach().T)[0] * 3 > 0.99


@pytest.mark.parametrize("options", ["--lora-init random", "--head-init random", "--lora-rank 0"])
def test_adapters_start_at_random_where_there_is_no_gradient_to_go_by(start, options):
    run = start(options)
    before = {name: p.clone() for name, p in run.model.named_parameters() if "lora_" in name}
    run.start()
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters() if "lora_" in name)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_step_that_float16_cannot_hold_changes_no_weight(start):
    """To ask whether it was one would make the processor wait for a GPU: so the schedule goes on."""
    run = start()
    run.scaler = torch.amp.GradScaler("cpu")
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    overflow = next(iter(trained.values())).register_hook(lambda gradient: gradient * math.inf)
    train_on(run, next(run.loaders.steps(1)))
    assert all(torch.equal(p, before[name]) for name, p in trained.items())
    overflow.remove()
    train_on(run, next(run.loaders.steps(1)))
    assert not all(torch.equal(p, before[name]) for name, p in trained.items())
