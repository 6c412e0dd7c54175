"""Every way to fine-tune, and runs of several labels an image and of numbers: what trains, the file, and every door."""

import argparse
import itertools
import json
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import deploy_lora
import finetune_lora
from finetune_lora import load_finetuned
from lora.followed_norms import followers
from lora_utils import read_adapter_file
from tests.checkpoint_files import narrow_resnet
from tests.dense import trained
from tests.image_files import save_image, write
from tests.run_folders import assert_same, column, rows_of, tensors, train_on
from toolkit import InputError
from toolkit.answers import comparison, evaluation, tasks
from toolkit.answers.classification import Classification
from toolkit.answers.probe import fit_linear_probe
from toolkit.files import read_checkpoint
from toolkit.images.data import Transformed
from toolkit.images.transforms import eval_transform
from toolkit.models.backbones import build_backbone
from toolkit.models.checkpoints import load_backbone
from toolkit.run.options import FineTuneOptions, may_have_own_norms

WAYS = {
    "lora and norms": "--lora-rank 2 --lora-dropout 0.1 --norms train --learning-rate 1e-4",
    "qlora": "--lora-rank 2 --use-qlora --learning-rate 1e-4",
    "linear probe": "--lora-rank 0",
    "full fine-tuning": "--lora-rank 0 --no-freeze-backbone --learning-rate 1e-4",
    "from scratch": "--checkpoint none --arch vit_mini --image-size 16 --seed 1 --lora-rank 0 --no-freeze-backbone",
}


@pytest.fixture(scope="module")
def ways(finetune_into, tmp_path_factory) -> dict[str, dict]:
    """An epoch of each way to fine-tune, with what trains before it as `start` and after it as `end`."""
    results = {}
    notes = {}
    real_train = finetune_lora.train

    def train(run, after_epoch):
        notes["start"] = {name: p.detach().clone() for name, p in trained(run.model).items()}
        real_train(run, after_epoch)
        notes["end"] = {name: p.detach().clone() for name, p in trained(run.model).items()}

    with mock.patch.object(finetune_lora, "train", train):
        for name, options in WAYS.items():
            argv = f"--augmentation crop --epochs 1 --batch-size 4 --labels-per-class 2 {options}"
            results[name] = finetune_into(tmp_path_factory.mktemp("way"), argv) | notes
    return results


def test_each_way_trains_what_it_should(ways, base):
    saved = {way: tensors(results["folder"] / "lora.pth") for way, results in ways.items()}
    results = ways["linear probe"]
    assert results["trainable_parameters"] == 3 * 192 + 3 and results["lora_parameters"] == 0
    assert saved["linear probe"].keys() == {"heads.head.weight", "heads.head.bias"}
    results = ways["full fine-tuning"]
    # A ViT's stored positions are a parameter like the others here; MoCo froze them, full fine-tuning does not.
    assert results["trainable_parameters"] == results["total_parameters"] and results["lora_parameters"] == 0
    start = load_backbone(base, 3)[0].state_dict()
    assert saved["full fine-tuning"].keys() == saved["from scratch"].keys() == start.keys()
    name = "encoder.layers.encoder_layer_0.mlp.0.weight"
    # An epoch alone moves it by less than a tenth of that.
    assert (saved["from scratch"][name] - start[name]).abs().mean() > 0.01
    norms = {name for name in saved["lora and norms"] if "lora_" not in name and "head" not in name}
    assert {name.split(".")[-2] for name in norms} == {"ln_1", "ln_2", "ln"} and len(norms) == 2 * (2 * 2 + 1)


@pytest.mark.parametrize("way", WAYS)
def test_what_trained_is_evaluated_and_saved_comes_back_and_merges_into_plain_torchvision(ways, way, images):
    results = ways[way]
    assert not results["keeps_start"] and not results["retreats"]
    adapter = results["folder"] / "lora.pth"
    saved = tensors(adapter)
    end = results["end"]
    assert any(not torch.equal(start, end[name]) for name, start in results["start"].items())
    for name, weight in end.items():
        if ".head." in name:
            weight = weight / results.get("temperature", 1.0)
        torch.testing.assert_close(saved[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    again = deploy_lora.main(["evaluate", str(adapter), str(images / "val"), "--device", "cpu"])
    assert again["accuracy"] == results["val_accuracy"]
    assert again["loss"] == pytest.approx(results["val_loss"], rel=1e-5, abs=1e-7)
    path = adapter.with_name("merged.pth")
    deploy_lora.main(["merge", str(adapter), "--output", str(path)])
    plain = build_backbone("vit_mini", 3, 16).eval()
    plain.load_state_dict(torch.load(path, weights_only=True))
    model, _ = load_finetuned(adapter)
    x = torch.randn(9, 3, 16, 16)
    found = plain(x)
    torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-4)
    assert found.std() > 1e-3


def test_norms_follow_on_a_cpu_unless_they_are_asked_to_elsewhere():
    settled = {("auto", "cpu"): "auto", ("auto", "cuda"): "frozen", ("follow", "cuda"): "follow"}
    settled["frozen", "cpu"] = "frozen"
    for (norms, device), of_adapters in settled.items():
        for freeze, expected in ((True, of_adapters), (False, norms)):
            args = argparse.Namespace(norms=norms, freeze_backbone=freeze)
            assert finetune_lora.settled_norms(args, torch.device(device)) == expected


def test_a_probe_of_the_training_images_says_whose_statistics_norms_begin_with(narrow, saved, images, monkeypatch):
    """The stored ones, or those that stock BatchNorms take of the images, but for the stem's; nothing else changes."""
    narrow = narrow | {name: torch.tensor(5) for name in narrow if name.endswith("num_batches_tracked")}
    argv = f"--checkpoint {saved(narrow)} --data-dir {images} --image-size 32 --precision fp32 --batch-size 5"
    args, _ = finetune_lora.read_options(argv.split())
    splits, model, report, plan = finetune_lora.prepare(args, torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "fc." not in name}
    losses = []
    start = Classification.start

    def noted(*given, **options):
        losses.append(start(*given, **options))
        return losses[-1]

    monkeypatch.setattr(Classification, "start", noted)
    drawn = torch.get_rng_state()
    chosen = finetune_lora.with_norms_chosen(args, plan, model, report, splits)
    assert torch.equal(torch.get_rng_state(), drawn)
    losses = [probe.loss for probe in losses]
    assert chosen.norms == ("own" if losses[1] < 0.99 * losses[0] else "auto")
    with mock.patch.object(finetune_lora.distributed, "gather", lambda serves: [not serves]):  # in the first process
        others = finetune_lora.with_norms_chosen(args, plan, model, report, splits)
    assert {chosen.norms, others.norms} == {"own", "auto"}
    losses = losses[:2]
    torch.testing.assert_close({name: model.state_dict()[name] for name in before}, before, rtol=0, atol=0)
    assert not followers(model) and not evaluation.training_norms(model)

    x = torch.stack([image for image, _ in Transformed(splits.train, eval_transform(32))])
    labels = torch.tensor(splits.train.labels)
    dense = narrow_resnet().eval()
    dense.load_state_dict(narrow, strict=False)
    dense.fc = nn.Identity()
    expected = [fit_linear_probe(dense(x), labels, 3).loss]
    norms = [module for name, module in dense.named_modules() if isinstance(module, nn.BatchNorm2d) and name != "bn1"]
    for number, batch in enumerate(x[:20].split(5), 1):  # the mean of four batches; the last image is alone
        for norm in norms:
            norm.momentum = 1 / number
            norm.train()
        dense(batch)
    expected.append(fit_linear_probe(dense.eval()(x), labels, 3).loss)
    assert losses == pytest.approx(expected, rel=1e-3) and losses[0] != pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("own", [0.989, 0.991])
def test_norms_begin_with_the_images_own_statistics_where_these_serve_better(finetune, narrow, saved, monkeypatch, own):
    """The file has them, and a resumed run, whatever a probe would say now."""
    losses = itertools.cycle([1.0, own])
    real = Classification.start
    monkeypatch.setattr(Classification, "start", lambda *a, **o: real(*a, **o)._replace(loss=next(losses)))
    resnet = f"--checkpoint {saved(narrow)} --image-size 32 --lora-rank 2 --epochs 1"
    found = finetune(resnet)["folder"]
    stored = tensors(finetune(f"{resnet} --norms follow", "stored")["folder"] / "lora.pth")
    name = "layer1.0.bn1.running_mean"
    assert torch.allclose(tensors(found / "lora.pth")[name], stored[name], atol=1e-3) == (own > 0.99)
    assert "norms" not in yaml.safe_load((found / "config.yaml").read_text()).get("finetune", {})
    monkeypatch.setattr(Classification, "start", real)
    results = finetune(f"{resnet} --resume")
    assert read_checkpoint(found / "last.pth")["config"]["finetune"]["norms"] == ("own" if own < 0.99 else "follow")
    _, metadata = load_finetuned(found / "lora.pth")
    assert metadata["val_accuracy"] == results["val_accuracy"]


def test_norms_begin_so_beside_nothing_that_excludes_it():
    assert may_have_own_norms(FineTuneOptions())
    excluded = {"norms": "follow", "head_init": "random", "lora_rank": 0, "freeze_backbone": False}
    for name, value in (excluded | {"batch_size": 1, "task": "segmentation"}).items():
        assert not may_have_own_norms(FineTuneOptions(**{name: value})), name


def test_adapters_that_do_nothing_are_named_once(start, capsys):
    run = start("--epochs 2 --labels-per-class 2 --batch-size 4 --learning-rate 1e-4")
    run.model.spare = finetune_lora.LoRALinear(4, 4)
    run.start()
    train_on(run)
    assert capsys.readouterr().out.count("no gradient reaches the adapters of spare: leave them out") == 1


# --------------------------------------------------------------------------------------------------- labels and numbers


def run(command: str):
    return deploy_lora.main(command.split())


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """Images whose upper and left halves are bright, or not, as columns among others; and how bright the halves are."""
    folder = tmp_path_factory.mktemp("labelled")
    random = np.random.RandomState(0)
    for part, count in (("train", 24), ("val", 16)):
        labels = ["path,Sex,patient,up,left"]
        numbers = ["path,upper light,left light"]
        for i in range(count):
            up, left = random.randint(0, 120, 2)
            pixels = random.randint(0, 60, (16, 16, 3))
            pixels[:8] += up
            pixels[:, :8] += left
            save_image(folder / f"{part}{i}.png", pixels.clip(0, 255).astype(np.uint8))
            is_unknown = part == "train" and i % 8 == 0
            labels.append(f"{part}{i}.png,Female,{part}{i // 2},{-1 if is_unknown else int(up > 60)},{int(left > 60)}")
            numbers.append(f"{part}{i}.png,{up},{left}")
        (folder / f"multilabel_{part}.csv").write_text("\n".join(labels) + "\n")
        (folder / f"regression_{part}.csv").write_text("\n".join(numbers) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained_on(finetune_into, lists, tmp_path_factory):
    results = {}
    for kind, columns in (("multilabel", "--group-by patient --label-columns up left"), ("regression", "")):
        argv = f"--task {kind} --data-list {lists}/{kind}_train.csv {lists}/{kind}_val.csv --data-dir {lists}"
        argv += f" --epochs 1 --learning-rate 1e-4 --workers 0 {columns}"
        results[kind] = finetune_into(tmp_path_factory.mktemp(kind) / "out", argv)
    return results


@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_a_run_leaves_its_files_and_every_door_tells_the_same(trained_on, lists, kind, tmp_path, capsys):
    results = trained_on[kind]
    folder = results["folder"]
    score = tasks.TASKS[kind].score
    assert results["task"] == kind
    assert json.loads((folder / "results.json").read_text()) | {"folder": folder} == results
    assert results[f"val_{score}"] > results[f"probe_{score}_before"] - 0.3
    assert f"val_{score}" in rows_of(folder / "metrics.csv")[0]
    content = read_adapter_file(folder / "lora.pth")
    assert content["format_version"] == 2 and content["metadata"]["task"]["kind"] == kind
    assert ("temperature" in content["metadata"]) == ("calibration_error" in results) == (kind == "multilabel")

    evaluated = run(f"evaluate {folder}/lora.pth {lists}/{kind}_val.csv --output {tmp_path}/again.json")
    assert evaluated[score] == pytest.approx(results[f"val_{score}"], abs=1e-4)
    assert f"{kind}_val.csv" in capsys.readouterr().out
    for figure in comparison.compare(folder / "results.json", tmp_path / "again.json"):
        assert figure.first == pytest.approx(figure.second, abs=1e-4)
    if kind == "multilabel":  # its columns are known for another list too
        labels = run(f"evaluate {folder}/lora.pth {lists}/{kind}_train.csv")["labels"]
        assert column(labels.values(), "unknown") == [3, 0]

    table = run(f"predict {folder}/lora.pth {lists} --output {tmp_path}/p.csv")
    by_name = {row["path"].rpartition("/")[2]: row for row in table}
    for row in rows_of(comparison.answers_path(folder / "results.json")):
        said = by_name[row["image"]]
        if kind == "regression":
            assert float(said["upper light"]) == pytest.approx(float(row["upper light answer"]), rel=1e-3)
            continue
        shares = {name: float(row[f"{name} probability"]) for name in ("up", "left")}
        assert float(said["up probability"]) == pytest.approx(shares["up"], abs=1e-3)
        thresholds = {name: label["threshold"] for name, label in results["labels"].items()}
        assert said["labels"] == ",".join(name for name in ("up", "left") if shares[name] > thresholds[name])


def test_thresholds_are_chosen_anew_without_training(trained_on, lists, tmp_path, capsys):
    """On the evaluation images each label then has the sensitivity that was asked for, and nothing else changes."""
    adapter = trained_on["multilabel"]["folder"] / "lora.pth"
    images = lists / "multilabel_val.csv"
    chosen = tmp_path / "lora90.pth"
    for _ in range(2):  # the second file replaces the first
        run(f"threshold {adapter} {images} --goal sensitivity=0.9 --output {chosen}")
    before = read_adapter_file(adapter)
    after = read_adapter_file(chosen)
    first = before["metadata"]["task"].pop("thresholds")
    thresholds = after["metadata"]["task"].pop("thresholds")
    assert thresholds != first
    assert after["metadata"].pop("thresholds chosen") == f"for sensitivity=0.9, in {images}"
    assert after["metadata"] == before["metadata"] and after["base_hash"] == before["base_hash"]
    assert_same(after["tensors"], before["tensors"])
    labels = run(f"evaluate {chosen} {images}")["labels"]
    assert column(labels.values(), "threshold") == pytest.approx(thresholds)
    assert min(column(labels.values(), "sensitivity")) >= 0.9
    # A label that no image shows, as where the list has no column for it, keeps its threshold.
    capsys.readouterr()
    rows = [f"{row['path']},{row['left']}" for row in rows_of(images)]
    left = write(lists / "left.csv", "\n".join(["path,left", *rows]))
    task = run(f"threshold {adapter} {left} --goal sensitivity=0.9 --output {tmp_path}/other.pth")
    after = read_adapter_file(tmp_path / "other.pth")["metadata"]["task"]["thresholds"]
    assert first[0] != 0.5 and after[0] == first[0] and after[1] != first[1]
    assert task.thresholds.tolist() == after
    told = capsys.readouterr().out
    assert f"{'kept as it was':<22}up\n" in told and f"{'kept as it was':<22}left" not in told
    # Labels of which none is no are no measure: as in CelebA's lists, where -1 is no, every figure would be perfect.
    (lists / "celeba.csv").write_text((lists / "multilabel_val.csv").read_text().replace(",0", ",-1"))
    with pytest.raises(InputError, match=r"celeba\.csv: no answer is 0 for no; -1 and nothing are unknown"):
        run(f"evaluate {adapter} {lists}/celeba.csv")
