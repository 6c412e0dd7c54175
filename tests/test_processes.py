"""Two real processes compute what one does: the same adapters to rounding, every image once, and faults stop both."""

import copy
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from children import ROOT, Child, together
from conftest import CLASSES
from PIL import Image
from torch import nn

import deploy_lora
import finetune_lora
from finetune_lora import LoRALinear
from lora.initialization import start_at_gradient
from moco import builder, pretrain
from tests.run_folders import assert_same_tensors, column, metrics, names_in, rows_of, tensors
from tests.test_unlabelled import teacher_of
from toolkit import InputError, devices, distributed, files
from toolkit.answers import evaluation, predictions, probe, segmentation, tasks
from toolkit.devices import faster_dtype  # before runs get another
from toolkit.images import cache, data
from toolkit.images.sources import load_splits
from toolkit.images.transforms import eval_transform
from toolkit.models.norms import Freezable, SharedStatistics, freeze_statistics, share_statistics, unextended
from toolkit.run import optim, output_folder, run_state, runs, teacher, training

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def features_here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# 21 images in batches of 5: the last has one, so that a process is without; steps of 2 and, at the end, of 1 batch.
TUNING = "--epochs 2 --batch-size 5 --accumulation-steps 2 --learning-rate 1e-4 --lora-rank 2 --clip-grad-norm 1"
RESNET = "--checkpoint {resnet} --image-size 32 --epochs 1 --batch-size 10 --accumulation-steps 1 --clip-grad-norm 1000"
WAYS = {
    "lora": "--label-smoothing 0.1",
    # At random: the last directions of the gradient of so small a model are rounding, which processes add up otherwise.
    "unlabelled": "--labels-per-class 5 --unlabelled {images} --epochs 1",
    "features": "--adapt-last 1 --cache-features disk --use-qlora --lora-init random --gradient-checkpointing full",
    "masks": "--data-dir {pairs} --task segmentation --epochs 1",
    # Of 21 images in batches of 10 one is left over, which BatchNorm cannot normalise.
    "norms that train": f"{RESNET} --norms train",
    "norms that follow": f"{RESNET} --lora-init random",  # from the images' own statistics on
}
PRETRAINING = "--image-size 8 --batch-size 6 --epochs 2 --dim 8 --queue-size 16 --two-crops digits --moco-version 2"
PRETRAINING += " --optimizer sgd --learning-rate 0.03"  # AdamW would blow up the rounding of gradients that are zero


@pytest.fixture
def options(base, images, pairs, saved, narrow, tmp_path):
    """options("lora") are those of a run with its files in `out`; options("pretrain", "alone") in `alone`."""
    places = {"images": images, "pairs": pairs, "resnet": saved(narrow, "resnet.pth")}

    def options(way: str, output: str = "out") -> str:
        common = f"--data-dir {images} --output-dir {tmp_path / output} --device cpu"
        if way == "pretrain":
            return f"{common} {PRETRAINING}"
        return f"{common} --checkpoint {base} {TUNING} {WAYS[way].format(**places)}"

    return options


def assert_same_rows(ours: Path, theirs: Path, relative: float = 1e-3, absolute: float = 5e-5) -> None:
    """Two runs have the same metrics but for their times, to rounding; a loss may be near 0."""
    for row, other in zip(metrics(ours), metrics(theirs), strict=True):
        assert row | {"seconds": 0} == pytest.approx(other | {"seconds": 0}, rel=relative, abs=absolute)


def assert_close(ours: dict, theirs: dict, tolerance: float = 1e-3) -> None:
    """Tensors by name, to the rounding of sums in another order, as a share of each tensor's largest element."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        size = theirs[name].abs().max().item() if tensor.numel() else 0.0  # of rank 0
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=tolerance * (size + 1e-3), msg=f"{name} differs")


def completed(*started, codes: int = 0, **options) -> list[Child]:
    children = together(*started, **options)
    assert [child.wait(120) for child in children] == [codes] * 2, [child.output for child in children]
    return children


def with_sgd() -> None:
    """AdamW would blow up the rounding of gradients that are nearly zero, and hide a gradient of the wrong size."""
    optim.build_optimizer = lambda model, rate, *_: torch.optim.SGD(model.parameters(), lr=300 * rate, momentum=0.9)
    finetune_lora.CLEAR_GAIN = {"0": -9.0, "1": 9.0}[os.environ.get("RANK", "0")]  # own statistics, says the first


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way != "lora")) for way in WAYS])
def test_two_processes_fine_tune_as_one(options, tmp_path, monkeypatch, way):
    children = completed("finetune_lora", options(way), tmp_path / "log", before=with_sgd)
    assert "epoch" not in children[1].output  # one of the two speaks
    assert "epoch 1: training loss" in children[0].output  # twice if the run goes back
    assert ("they begin with the images' own statistics" in children[0].output) == (way == "norms that follow")
    for owner, name in ((optim, "build_optimizer"), (finetune_lora, "CLEAR_GAIN")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # to be put back
    with_sgd()
    alone = finetune_lora.main(options(way, "alone").split())
    ours, theirs = (tensors(tmp_path / name / "lora.pth") for name in ("out", "alone"))
    assert any("lora_B" in name and tensor.any() for name, tensor in theirs.items())
    # Norms over few numbers enlarge rounding, by how much the processor says; another weight of an image is 5% or more.
    assert_close(ours, theirs, 1e-2 if way.startswith("norms") else 1e-3)
    assert not list((tmp_path / "out").glob(".*"))
    assert_same_rows(tmp_path / "out", tmp_path / "alone")
    results = json.loads((tmp_path / "out/results.json").read_text())
    for name, value in alone.items():
        if isinstance(value, float) and name.startswith(("val_", "best_", "knn_", "probe_", "calibration")):
            assert results[name] == pytest.approx(value, abs=1e-3), name


def in_parts_of_three() -> None:
    deploy_lora.PART_IMAGES = 3


def test_two_processes_write_the_answers_of_one(adapter_for_images, images, tmp_path, monkeypatch):
    """Of 7 images in parts of 3 one is broken; with two in a batch, the last batch and the last part are of one."""
    folder = shutil.copytree(images / "val" / CLASSES[0], tmp_path / "mine")
    (folder / "2.png").write_bytes(b"no image")
    for name in ("a", "b"):
        shutil.copyfile(images / "val" / CLASSES[1] / "0.png", folder / f"{name}.png")
    argv = f"predict {adapter_for_images} {folder} --batch-size 2 --device cpu --workers 0 --output {tmp_path}"
    children = completed("deploy_lora", f"{argv}/out", tmp_path / "log", before=in_parts_of_three)
    broken = f"1 of 2 images cannot be read and are left out:\n  {folder}/2.png: not a readable image"
    assert broken in children[0].output
    assert "wrote" not in children[1].output  # one of the two speaks
    monkeypatch.setattr(deploy_lora, "PART_IMAGES", 3)
    deploy_lora.main(f"{argv}/alone".split())
    names = names_in(tmp_path / "alone")
    assert names == names_in(tmp_path / "out") and len(names) == 5
    for name in names - {"_parts.json"}:
        for ours, theirs in zip(rows_of(tmp_path / "out" / name), rows_of(tmp_path / "alone" / name), strict=True):
            assert ours["path"] == theirs["path"]
            assert float(ours["probability"]) == pytest.approx(float(theirs["probability"]), abs=1e-4)
    merge = f"merge {adapter_for_images} --output {tmp_path}/out.safetensors"  # which shares no images: one does it
    children = completed("deploy_lora", merge, tmp_path / "merge")
    assert children[0].output.count("wrote") == 1 and children[1].output == ""


def write_texts_late() -> None:
    """As on a slow drive: the other process must not look for what the first one is about to write."""
    real = predictions.files.write_text
    predictions.files.write_text = lambda *what: time.sleep(1) or real(*what)


@pytest.mark.slow
def test_two_processes_write_the_maps_of_one(base, pairs, tmp_path):
    """Six masks, of which each process writes three, and a map whose windows they share."""
    argv = f"--task segmentation --data-dir {pairs} --checkpoint {base} {TUNING} --device cpu"
    finetune_lora.main(f"{argv} --epochs 1 --output-dir {tmp_path}/run".split())
    images = pairs / "val" / "images"
    for words in (f"{images} --output {tmp_path}/maps --resume", f"{images}/0.png --output {tmp_path}/map.tif"):
        argv = f"predict {tmp_path}/run/lora.pth --device cpu {words}"
        completed("deploy_lora", argv, tmp_path / "log", before=write_texts_late)
        deploy_lora.main(argv.replace(f"{tmp_path}/map", f"{tmp_path}/alone").split())
    shared = sorted((tmp_path / "maps").rglob("*.png"))
    assert len(shared) == 6
    for path in [*shared, tmp_path / "map.tif"]:
        alone = str(path).replace(f"{tmp_path}/map", f"{tmp_path}/alone")
        assert np.mean(np.array(Image.open(path)) != np.array(Image.open(alone))) < 0.01


@pytest.mark.slow
def test_torchrun_starts_them(options, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    few = "--epochs 1 --checkpoint shipped --labels-per-class 2 --lora-rank 0 --precision fp32"
    command = [*torchrun, "finetune_lora.py", *options("lora").split(), *few.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1: training loss") == 1 and len(metrics(tmp_path / "out")) == 1


def keep_every_queue() -> None:
    real = pretrain.Pretraining.results

    def results(self):
        torch.save(self.model.queue.cpu(), self.path(f"queue_{os.environ['RANK']}.pth"))
        return real(self)

    pretrain.Pretraining.results = results


def compute_in_float64() -> None:
    """Over six images, one BatchNorm behind the other: on some processors float32's rounding grows to a hundredth."""
    torch.set_default_dtype(torch.float64)


V3 = "--moco-version 3 --mlp-dim 16 --learning-rate 1e-3 --epochs 1"
STAGE_1 = {
    "v2": ("", keep_every_queue, "moco_stage1_epoch_2.pth", 1e-3),
    "v3": (V3, compute_in_float64, "moco_stage1_epoch_1.pth", 1e-9),
    "adapters": ("--checkpoint {base} --lora-rank 2 --image-size 16", None, "moco_lora.pth", 1e-3),
}


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way != "v2")) for way in STAGE_1])
def test_pretraining_in_two_processes_is_that_in_one(options, base, tmp_path, way):
    more, before, name, tolerance = STAGE_1[way]
    completed("moco.pretrain", f"{options('pretrain')} {more.format(base=base)}", tmp_path / "log", before=before)
    try:
        if before is compute_in_float64:
            before()
        pretrain.main(f"{options('pretrain', 'alone')} {more.format(base=base)}".split())
    finally:
        torch.set_default_dtype(torch.float32)
    read = tensors if name == "moco_lora.pth" else lambda path: files.read_checkpoint(path)["model"]
    ours, theirs = (read(tmp_path / of / name) for of in ("out", "alone"))
    assert_close(ours, theirs, tolerance)
    losses = column(metrics(tmp_path / "out"), "loss")
    assert losses == pytest.approx(column(metrics(tmp_path / "alone"), "loss"), rel=1e-3)
    if before is keep_every_queue:
        # A ViT has no BatchNorm: the queue, its order included, is that of one process, and so is what is measured.
        queues = [torch.load(tmp_path / "out" / f"queue_{rank}.pth") for rank in (0, 1)]
        assert torch.equal(*queues) and torch.equal(queues[0], ours["queue"])
        assert_same_rows(tmp_path / "out", tmp_path / "alone")


def test_what_is_wrong_stops_both_with_one_line(options, images, tmp_path):
    own = shutil.copytree(images, tmp_path / "own")
    (own / "train/dark/3.png").write_bytes(b"\x89PNG")  # for one of them
    wrong = (
        ("finetune_lora", f"{options('lora')} --data-dir {own}", f"{own}/train/dark/3.png: not a readable image"),
        ("finetune_lora", f"{options('lora')} --output-dir {own}", "another run or command (process"),
        ("moco.pretrain", f"{options('pretrain')} --batch-size 5", "--batch-size 5: not a multiple of the 2 processes"),
        ("deploy_lora", "demo lora.pth", "torchrun starts several: start it with python"),  # they would wait for ever
    )
    for number, (module, argv, told) in enumerate(wrong):
        with output_folder.held(own):
            children = completed(module, argv, tmp_path / f"log {number}", codes=2)
            assert names_in(own) == {"train", "val", output_folder.LOCK}
        [line] = [line for child in children for line in child.output.splitlines() if line.startswith("error: ")]
        assert told in line and not any("Traceback" in child.output for child in children)


@pytest.mark.slow
def test_a_killed_process_or_one_signal_stops_both_and_both_go_on(options, tmp_path):
    """The signal reaches one process alone, and both stop at the same step; with dropout, whose state each has."""
    argv = options("lora") + " --lora-dropout 0.2"
    first, second = together("finetune_lora", argv, tmp_path / "log")
    first.wait_for(lambda: "loss=" in first.output)
    second.send(signal.SIGKILL)
    assert first.wait(120) == 2
    assert "error: another process of this run has ended" in first.output and "Traceback" not in first.output
    first, second = together("finetune_lora", f"{argv} --resume", tmp_path / "again")
    first.wait_for(lambda: "loss=" in first.output)
    second.send(signal.SIGTERM)
    assert (first.wait(120), second.wait(120)) == (143, 143), first.output + second.output
    assert "To go on: the same command with --resume" in first.output and "Stopped" not in second.output
    resumed = together("finetune_lora", f"{argv} --resume", tmp_path / "resumed")
    whole = together("finetune_lora", f"{argv} --output-dir {tmp_path}/whole", tmp_path / "whole")
    assert [child.wait(120) for child in resumed + whole] == [0] * 4, resumed[0].output
    assert_same_tensors(tmp_path / "out/lora.pth", tmp_path / "whole/lora.pth")
    assert_same_rows(tmp_path / "out", tmp_path / "whole", 0, 0)


# ------------------------------- what two processes find together, with one start: in closed form, or as one finds it


def find_together() -> None:
    """In each of two processes: what it finds with the other one, into a file."""

    def main(argv):
        distributed.join(CPU)
        rank = distributed.rank()
        torch.save({find.__name__: find(rank) for find in TOGETHER}, Path(argv[0]) / f"{rank}.pth")

    pretrain.main = main


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of two processes found, by the name of the function."""
    folder = tmp_path_factory.mktemp("together")
    here = {"XDG_CACHE_HOME": str(folder)}
    completed("moco.pretrain", str(folder), folder / "log", before=find_together, environment=here)
    return [torch.load(folder / f"{rank}.pth", weights_only=False) for rank in (0, 1)]


def exchanged(rank: int) -> list:
    """Images in their order, the first process's tensor, sums, what each has, and what the first alone found wrong."""
    tensor = torch.full((2, 3), float(rank)).T  # not contiguous
    distributed.broadcast([tensor])
    with pytest.raises(InputError) as raised:
        distributed.first_does(mock.Mock(side_effect=InputError("the first cannot do it")))
    images = data.look_at_each(lambda i: 10 * i, 5, "image")
    sums = distributed.all_sum(1.0, 1e9 + rank)
    return [images, tensor.unique().tolist(), sums, distributed.gather({"rank": rank}), str(raised.value)]


def shuffled_keys(rank: int) -> tuple[list, list]:
    """Of eight images: their keys, ten times the image, and the images that this process encoded."""
    encoder = nn.Linear(1, 1, bias=False)
    nn.init.constant_(encoder.weight, 10.0)
    encoder.norm = nn.BatchNorm1d(1)  # which trains
    encoded = []
    encoder.register_forward_hook(lambda module, inputs, keys: encoded.extend(inputs[0].flatten().tolist()))
    torch.manual_seed(rank)  # as each draws by itself in a run
    keys = builder.shuffled(encoder, torch.arange(8.0)[rank::2, None])
    return keys.flatten().tolist(), encoded


def taught(rank: int) -> list[float]:
    """How sure a teacher's answers are, and their shares, after a step of which this process saw one or two images."""
    teacher = teacher_of(certainty=0.8)
    teacher.seen.copy_(torch.tensor([[0.9, 0.1, 0.0, 0.9, 1.0], [0.5, 1.5, 0.0, 1.2, 2.0]])[rank])
    teacher.after_step()
    return [teacher.certainty.item(), *teacher.shares.tolist()]


def started(rank: int) -> list[list[float]]:
    """A head that is set to a probe and then softened, and an adapter that starts at a gradient: each finds others."""
    model = nn.Sequential(OrderedDict(body=LoRALinear(3, 2, r=1), fc=nn.Linear(2, 2)))
    torch.manual_seed(rank)
    probe.set_head(model, probe.Probe(torch.randn(2, 2), torch.randn(2), 1.0))
    heads = [model.fc.weight.flatten().tolist()]
    model.fc.weight.data += rank
    tasks.Classification(["cat", "dog"]).soften(model, 2.0)
    start_at_gradient(model, lambda: model(torch.randn(5, 3)).square().sum().backward())
    return [*heads, model.fc.weight.flatten().tolist(), model.body.lora_A.flatten().tolist()]


def own(images: torch.Tensor) -> torch.Tensor:
    """The share of this process; all of them if it is alone."""
    return images[distributed.rank() :: distributed.world_size()]


def contrasted(rank: int) -> list[float]:
    queries, keys = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    loss = builder.MoCoV3.contrast(SimpleNamespace(T=0.2), own(queries), own(keys))
    return [distributed.all_sum(loss.item())[0] / distributed.world_size()]


def scaled(rank: int) -> list[float]:
    """Logits that a teacher scales to be as sure as at the start, of three images."""
    logits, first = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    return distributed.interleave(teacher.as_sure(own(logits), own(first))).flatten().tolist()


def segmented(rank: int) -> list[float]:
    """The confusion matrix of five images, the worst of them, and the answers for these."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 2, 4, 4, generator=generator)
    truth = torch.randint(2, (5, 4, 4), generator=generator)
    network = nn.Identity()  # its images are its outputs
    network.window = 4
    answers = segmentation.Segmentation(["ground", "ink"]).evaluate(network, [(own(logits), own(truth))], CPU)
    found = [answers.confusion, torch.tensor([*answers.maps]), *answers.maps.values()]
    return torch.cat([tensor.flatten() for tensor in found]).tolist()


def measured(rank: int) -> list[float]:
    """The effective rank of the features of six images, by statistics that each process has of its own."""
    encoder = nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(3), fc=nn.Linear(3, 2)))
    encoder.norm.running_var += 1e3 * rank * torch.arange(3)
    images = own(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    run = SimpleNamespace(model=SimpleNamespace(encoder_q=encoder), device=CPU, dtype=torch.float32)
    run.measuring_loaders = [[(images, torch.zeros(len(images)))]]
    return [pretrain.Pretraining.measure(run)["effective_rank"]]


def read(rank: int) -> tuple[list, bool]:
    """The figures of two steps, and whether one of the processes was asked to stop: the second was."""
    stop = runs.StopRequests()
    stop.signum = 15 * rank
    stop.check()  # it goes on until all know
    steps = [(4, [torch.tensor([1.0 + rank, 2.0, 3.0])]), (2, [torch.tensor([0.5, 1.0 * rank, 4.0])])]
    return training.read_figures(steps, stop), stop.others_asked


def worst(rank: int) -> float:
    """The loss of the worst of two batches, which the processes share."""
    batches = [[[1.0], [2.0]], [[0.0]]] if rank == 0 else [[[6.0]], [[8.0]]]
    loader = [(torch.tensor(batch), torch.zeros(len(batch))) for batch in batches]
    return evaluation.worst_batch_loss(nn.Identity(), loader, CPU, torch.float32, lambda outputs, _: outputs.sum())


def drawn(rank: int) -> tuple[float, float, float]:
    """What a run draws after it has begun, then, and once more when its state is restored."""
    run = run_state.RunState(SimpleNamespace(seed=0, epochs=1), CPU, torch.float32)
    run.model = run.network = nn.Linear(2, 2)
    torch.manual_seed(0)
    run.begin_training(torch.optim.SGD(run.model.parameters()), 1, 0)
    first = torch.rand(()).item()
    entry = run.trained_entries["rng"]
    state = entry.state_dict()
    then = torch.rand(()).item()
    entry.load_state_dict(state)
    return first, then, torch.rand(()).item()


def precision(rank: int) -> list[torch.dtype]:
    """Where the first process finds bf16 twice as fast, and the other half as fast; and where four images are fast."""
    seconds = iter([[2.0, 1.0, 0.015], [2.0, 4.0, 0.015]][rank])
    with mock.patch.object(devices, "shortest_seconds", lambda _: next(seconds)):
        return [faster_dtype(lambda _: nn.Linear(2, 2), channels=1, size=256) for _ in range(2)]


def cached(rank: int) -> list:
    """The features of six images in two views, of which each process computed its share of batches of four."""
    views = [torch.arange(6.0)[:, None], 10 * torch.arange(6.0)[:, None]]
    shares = [[view[start : start + 4][rank::2] for start in (0, 4)] for view in views]
    return cache.cache_features(data.LabelledImages([], [0] * 6), shares, 4).source.flatten(1).tolist()


def test_both_find_the_same_which_one_finds_by_all_images(found):
    moved = [0.95 * 0.8 + 0.05 * 2.1 / 3, 0.95 * 0.5 + 0.05 * 1.4 / 3, 0.95 * 0.25 + 0.05 * 1.6 / 3, 0.95 * 0.25]
    for find, expected in (
        (exchanged, [[0, 10, 20, 30, 40], [0], [2, 2e9 + 1], [{"rank": 0}, {"rank": 1}], "the first cannot do it"]),
        (taught, pytest.approx(moved)),
        (read, ([(4, [3.0, 4.0, 6.0]), (2, [1.0, 1.0, 8.0])], True)),
        (worst, 4.0),
        (precision, [torch.float32] * 2),
        (cached, [[0, 0], [1, 10], [2, 20], [3, 30], [4, 40], [5, 50]]),
        *((find, pytest.approx(find(0))) for find in (contrasted, scaled, segmented, measured)),
    ):
        assert column(found, find.__name__) == [expected] * 2
    first, second = column(found, "started")
    probed, softened, _ = first
    assert first == second and softened == pytest.approx([weight / 2 for weight in probed])


def test_keys_are_encoded_in_random_processes_and_each_draws_numbers_of_its_own_also_when_it_goes_on(found):
    (keys, first), (others, second) = column(found, "shuffled_keys")
    assert keys == others == [0, 10, 20, 30, 40, 50, 60, 70]  # in order again
    assert sorted(first + second) == list(range(8)) and set(first) != {0, 2, 4, 6}
    (first, then, again), (other_first, other_then, other_again) = column(found, "drawn")
    assert (then, other_then) == (again, other_again)
    assert first != other_first and then != other_then


def test_the_first_process_alone_writes_the_files_of_a_run_and_moves_others_aside(tmp_path, monkeypatch):
    (tmp_path / "lora.pth").touch()
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    run = SimpleNamespace(state=dict, history=[{}], path=tmp_path.joinpath)
    run_state.RunState.save_state(run)
    run_state.RunState.save_metrics(run)
    run_state.write_config(tmp_path / "config.yaml", {})
    assert output_folder.begin_folder(tmp_path, ["lora.pth"]) is None and names_in(tmp_path) == {"lora.pth"}


NORMS = {
    "2d": (lambda: nn.BatchNorm2d(4, eps=0.1), (7, 4, 3, 5)),
    "2d, mean over all batches": (lambda: nn.BatchNorm2d(4, momentum=None), (7, 4, 3, 5)),
    "1d without weight": (lambda: nn.BatchNorm1d(6, affine=False), (7, 6)),
    "3d": (lambda: nn.BatchNorm3d(2), (7, 2, 2, 3, 2)),
}


def normalised(rank: int) -> dict[tuple[str, torch.dtype], list[torch.Tensor]]:
    """Outputs, gradients and buffers of two passes over seven images, and outputs in eval mode; alone, in float64."""
    found = {}
    for dtype, (kind, (make, shape)) in itertools.product((torch.float64, torch.bfloat16), NORMS.items()):
        torch.manual_seed(0)
        norm = make().to(dtype)
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        x = own(3 * torch.randn(shape) + 7).to(dtype)  # far from standardised
        weights = own(torch.randn(shape)).to(dtype)  # of each output in the loss
        if distributed.world_size() == 1:
            norm, x, weights = (thing.double() for thing in (norm, x, weights))
        norm.to(torch.promote_types(x.dtype, torch.float32))  # as under autocast
        share_statistics(norm)
        x.requires_grad_()
        for _ in range(2):
            y = norm(x)
        (y * weights).sum().backward()
        whole = [distributed.interleave(each.double()) for each in (y, x.grad, norm.eval()(x))]
        gradients = [sum(distributed.gather(parameter.grad)) for parameter in norm.parameters()]
        found[kind, dtype] = [tensor.detach().double() for tensor in (*whole, *gradients, *norm.buffers())]
    return found


TOGETHER = (exchanged, shuffled_keys, contrasted, taught, scaled, started, segmented, measured)
TOGETHER += (read, worst, drawn, precision, cached, normalised)


def test_two_processes_normalise_as_one(found):
    for (kind, dtype), expected in normalised(0).items():
        tolerance = 1e-10 if dtype == torch.float64 else 0.02
        for each in found:
            ours = each["normalised"][kind, dtype]
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance, msg=f"{kind}, {dtype}")


def test_frozen_norms_and_a_single_process_are_left_alone_and_norms_that_compute_more_refused(monkeypatch):
    class NormAndReLU(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.LayerNorm(2))
    freeze_statistics(model[0], freeze=True, training=True)
    before = [type(module) for module in model]
    share_statistics(model)
    assert [type(module) for module in model] == before
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    share_statistics(model)
    assert [type(module) is kind for module, kind in zip(model, before, strict=True)] == [True, False, True]
    assert isinstance(model[1], nn.BatchNorm2d)
    with pytest.raises(InputError, match=r"NormAndReLU cannot take statistics.*train in one"):
        share_statistics(nn.Sequential(NormAndReLU(2)))


@pytest.mark.parametrize("freezable", [False, True])
def test_copies_and_files_of_a_model_share_too(monkeypatch, freezable, tmp_path):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    model = nn.Sequential(nn.BatchNorm2d(2))
    if freezable:
        freeze_statistics(model[0], freeze=False, training=True)
    share_statistics(model)
    torch.save(model, tmp_path / "model.pth")
    for again in (copy.deepcopy(model), torch.load(tmp_path / "model.pth", weights_only=False)):
        share_statistics(again)
        assert type(again[0]) is type(model[0]) and isinstance(again[0], SharedStatistics)
        assert isinstance(again[0], Freezable) == freezable
    assert unextended(model[0]) is nn.BatchNorm2d


# ---------- what processes of a loader work on can be sent to them, as Python 3.14 does on Linux and others do always


def test_what_loaders_of_a_run_hold_can_be_pickled(start, hospital, pairs, images):
    listed = f"--data-dir {hospital} --group-by Patient --data-list {hospital}"
    for options in (
        "--augmentation trivial",
        f"--labels-per-class 5 --unlabelled {images}/train",
        f"--task multilabel {listed}/labels.csv",
        f"--task regression {listed}/numbers.csv",
        f"--task segmentation --data-dir {pairs} --augmentation crop",
        "--adapt-last 1 --cache-features disk",
    ):
        data.OPEN_LOADERS.clear()  # of other runs
        loaders = start(options).loaders
        opened = list(data.OPEN_LOADERS)
        for loader in opened:
            pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn))
        assert loaders.train in opened and len(opened) >= 3


def test_processes_that_wait_for_the_next_pass_end():
    before = set(multiprocessing.active_children())
    loader = data.build_loader(data.Transformed(load_splits("digits").val.at_most(4), eval_transform(8)), 2, workers=1)
    assert len(list(loader)) == 2
    assert len(set(multiprocessing.active_children()) - before) == 1
    data.end_workers()
    assert set(multiprocessing.active_children()) <= before


@pytest.fixture
def forkserver():
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
def test_scripts_read_images_by_processes_that_are_not_forked(forkserver, finetune, images, tmp_path):
    results = finetune("--adapt-last 1 --cache-features disk --workers 1 --epochs 1")
    adapter = results["folder"] / "lora.pth"
    rows = deploy_lora.main(f"predict {adapter} {images}/val --workers 1 --output {tmp_path}/rows.csv".split())
    assert len(rows) == 15
    told = "--image-size 8 --batch-size 7 --epochs 1 --dim 8 --queue-size 14 --device cpu --workers 1"
    results = pretrain.main(f"--data-dir {images} --output-dir {tmp_path}/stage1 --moco-version 2 {told}".split())
    assert results["epochs"] == 1
