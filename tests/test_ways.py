"""Every way to fine-tune: what trains, what the file holds, and what merging makes of it."""

import argparse
import itertools
from unittest import mock

import pytest
import torch
import yaml
from torch import nn

import deploy_lora
import finetune_lora
from finetune_lora import load_finetuned
from lora.followed_norms import followers
from tests.checkpoint_files import narrow_resnet
from tests.dense import trained
from tests.run_folders import tensors, train_on
from toolkit.answers import evaluation
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
    argv = f"--checkpoint {saved(narrow)} --data-dir {images} --image-size 32 --precision fp32 --batch-size 7"
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
    for number, batch in enumerate(x.split(7), 1):  # the mean of three batches
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
