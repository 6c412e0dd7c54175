"""What others read of an adapter: PEFT its format, the Hub a card; and `convert --rank`, against truncated weights."""

import copy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import save_adapter
from dense import FP32, assert_close, assert_unchanged, images, randomize_adapters, snapshot
from torch import Tensor, nn

import deploy_lora
from finetune_lora import adapt_layers, add_lora_to_model, freeze_backbone_params, load_finetuned
from lora import followed_norms, initialization
from lora.adapted import adapted_layers, recorded_settings
from lora.adapter_file import write_adapter_file
from lora.peft_format import CONFIG, WEIGHTS, obstacles
from lora_utils import LoRAManager, read_adapter_file
from tests.run_folders import names_in
from toolkit import InputError
from toolkit.answers.model_card import write_card
from toolkit.models.backbones import headless
from toolkit.models.checkpoints import load_backbone


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def convert(adapter: Path, folder: Path) -> None:
    deploy_lora.main(["convert", str(adapter), "--to", "peft", "--output", str(folder)])


@pytest.fixture(scope="module")
def bases(base, narrow, tmp_path_factory) -> dict[str, Path]:
    """Checkpoints for images of 16 pixels."""
    path = tmp_path_factory.mktemp("resnet") / "base.pth"
    torch.save(narrow, path)
    return {"vit": base, "resnet": path}


def saved(base: Path, folder: Path, others: dict[str, dict] | None = None, **options) -> Path:
    """An adapter file with these options of `add_lora_to_model`, and others of layers by a part of their names."""
    model, report = load_backbone(base, 3, image_size=16)
    nn.init.normal_(list(model.parameters())[-2], std=0.1)  # the head's weight
    add_lora_to_model(model, **options)
    if others is not None:
        settings = {name: recorded_settings(vars(layer)) for name, layer in adapted_layers(model).items()}
        for part, change in others.items():
            settings |= {name: replace(own, **change) for name, own in settings.items() if part in name}
        adapt_layers(model, settings)
    randomize_adapters(model, std=0.05)
    return save_adapter(model, folder / "lora.pth", base, arch=report["arch"])


def stock(base: Path) -> nn.Module:
    """What a user of PEFT has: the base with a head that is not trained."""
    return load_backbone(base, 3, image_size=16)[0].eval()


@torch.no_grad()
def assert_same_answers(one: nn.Module, other: nn.Module) -> None:
    x = images(16, 4)
    assert_close(one(x), other(x), FP32)


WRITTEN = {
    "ViT": ("vit", {"r": 2, "lora_alpha": 5}),
    "ranks of a ViT": ("vit", {"r": 4, "use_rslora": True, "others": {"self_attention": {"r": 2}, "mlp.3": {"r": 8}}}),
    # PEFT has one scaling for the whole attention.
    "scalings of an attention": ("vit", {"r": 2, "others": {"out_proj": {"lora_alpha": 5.0}}}),
    "ranks of a ResNet": ("resnet", {"r": 2, "others": {".conv1": {"r": 5}}}),
    "a name in which others end": ("resnet", {"r": 2, "target_modules": r"conv[1]"}),
}


@pytest.mark.parametrize("kind, options", WRITTEN.values(), ids=WRITTEN)
def test_peft_answers_the_same(peft, kind, options, bases, tmp_path, capsys):
    adapter = saved(bases[kind], tmp_path, **options)
    convert(adapter, tmp_path / "peft")
    assert names_in(tmp_path / "peft") == {CONFIG, WEIGHTS}
    deploy_lora.read_options(["convert", str(adapter), "--output", str(tmp_path / "peft")])  # may replace what it wrote
    assert "4-bit" not in capsys.readouterr().out
    theirs = peft.PeftModel.from_pretrained(stock(bases[kind]), tmp_path / "peft").eval()
    ours, _ = load_finetuned(adapter)
    assert_same_answers(theirs, ours)
    assert sum(hasattr(module, "lora_A") for module in theirs.modules()) == len(read_adapter_file(adapter)["layers"])
    assert_same_answers(theirs.merge_and_unload(), ours)


def test_what_cannot_be_converted_leaves_both_files_as_they_were(peft, base, tmp_path, monkeypatch):
    written = tmp_path / "peft"
    convert(saved(base, tmp_path, r=2), written)
    before = (written / CONFIG).read_bytes()
    adapter = saved(base, tmp_path, r=3)
    with monkeypatch.context() as missing, pytest.raises(InputError, match="pip install peft"):
        missing.setitem(sys.modules, "peft", None)
        convert(adapter, written)
    differ = pytest.raises(InputError, match=r"PEFT's logits with this adapter differ by \d")
    with monkeypatch.context() as other, differ:
        other.setattr(deploy_lora, "ROUNDING", -1.0)
        convert(adapter, written)
    (written / WEIGHTS).unlink()
    (written / WEIGHTS).mkdir()
    monkeypatch.setattr("toolkit.run.commands.is_free", lambda *_: True)  # as if it had come meanwhile
    with pytest.raises(InputError, match=f"cannot write .*{WEIGHTS}"):
        convert(adapter, written)
    assert (written / CONFIG).read_bytes() == before


def test_a_4_bit_adapter_is_put_on_a_float_base(peft, base, tmp_path, capsys):
    """PEFT's answers are those of a float model with these adapters; what was in 4 bits below them is no adapter."""
    adapter = saved(base, tmp_path, r=2, use_qlora=True, adapt_last=1)
    convert(adapter, tmp_path / "peft")
    assert "trained over 4-bit weights" in capsys.readouterr().out
    theirs = peft.PeftModel.from_pretrained(stock(base), tmp_path / "peft").eval()
    ours = add_lora_to_model(stock(base), r=2, adapt_last=1).eval()
    tensors = {name: t for name, t in read_adapter_file(adapter)["tensors"].items() if t.numel()}
    assert ours.load_state_dict(tensors, strict=False).unexpected_keys == []
    assert_same_answers(theirs, ours)


def test_what_peft_cannot_hold_is_named(peft, base, tmp_path):
    model, _ = load_backbone(base, 3)
    with pytest.raises(InputError, match=r"full\.pth cannot be written for PEFT: it has no adapters; use merge"):
        convert(save_adapter(model, tmp_path / "full.pth", base), tmp_path / "peft")
    add_lora_to_model(model, target_modules=["heads", "mlp"])
    model.class_token.data += 1
    with pytest.raises(InputError, match=r"heads.head \(an adapter on the head.*base that have trained \(class_token"):
        convert(save_adapter(model, tmp_path / "lora.pth", base), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_layers_that_peft_computes_otherwise():
    for layer, expected in (
        (nn.Linear(4, 4), ""),
        (nn.Conv2d(4, 4, 3, padding="same", stride=1), ""),
        (nn.MultiheadAttention(4, 2), ""),
        (nn.Conv2d(4, 4, 3, groups=2), "in groups"),
        (nn.Conv2d(4, 4, 3, dilation=2), "dilation"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding other than zeros"),
    ):
        found = list(obstacles(add_lora_to_model(nn.Sequential(layer), r=1, target_modules="0"), {}))
        assert len(found) == bool(expected) and expected in "".join(found), layer


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_what_peft_has_trained_is_a_checkpoint_once_it_is_merged(peft, kind, bases, tmp_path):
    targets = {"vit": ["mlp.0", "self_attention"], "resnet": ["conv2"]}
    model = peft.get_peft_model(stock(bases[kind]), peft.LoraConfig(r=3, target_modules=targets[kind]))
    merged = randomize_adapters(model.eval(), std=0.1).merge_and_unload()
    torch.save(merged.state_dict(), tmp_path / "from_peft.pth")
    assert_same_answers(headless(stock(tmp_path / "from_peft.pth")), headless(merged))


# ------------------------------------------------------------------------------------------------------ to a lower rank


def truncated_weight(name: str, before: Tensor, after: Tensor, r: int) -> Tensor:
    """The nearest change of rank r, in float64; of attention's packed weight, of each of q, k and v."""
    changes = []
    for change in (after.double() - before.double()).chunk(3 if "in_proj" in name else 1):
        U, S, Vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
        changes.append(((U[:, :r] * S[:r]) @ Vh[:r]).view(change.shape))
    return before + torch.cat(changes)


def of_base(base: Path) -> nn.Module:
    return load_backbone(base, 3, image_size=16)[0]


@torch.no_grad()
def fully_trained(base: Path) -> nn.Module:
    """A base of which every parameter and statistic has moved a little, in all directions."""
    model = of_base(base)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.02 * torch.rand_like(tensor)
    return model


def adapted(base: Path) -> nn.Module:
    """Adapters of rank 6; of a ResNet, with BatchNorms that follow them."""
    model = add_lora_to_model(of_base(base), r=6, lora_alpha=3)
    freeze_backbone_params(model)
    followed_norms.follow_statistics(model, [torch.randn(4, 3, 16, 16)])
    return randomize_adapters(model, std=0.05)


@pytest.mark.parametrize("trained", [fully_trained, adapted])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
@torch.no_grad()
def test_each_layer_keeps_the_main_part_of_its_change(base, narrow, saved, kind, trained, tmp_path, capsys):
    about = {"val_accuracy": 0.9}
    if kind == "resnet":
        base = saved(narrow)
        about["arch"] = "resnet18"
    path = save_adapter(trained(base), tmp_path / "lora.pth", base, **about)
    (tmp_path / "results.json").write_text("{}")  # of the whole change
    deploy_lora.main(f"convert {path} --rank 2 --output {tmp_path}/lora2.pth".split())

    expected = of_base(base)
    before = copy.deepcopy(expected.state_dict())
    after = LoRAManager(load_finetuned(path)[0]).unload(merge=True).state_dict()
    energies = {}  # of each layer's change: what is kept, and all of it
    for name, tensor in after.items():
        is_weight = tensor.dim() > 1 and not name.startswith(("fc", "heads", "class_token", "encoder.pos"))
        if is_weight and not torch.equal(tensor, before[name]):
            expected.state_dict()[name].copy_(truncated_weight(name, before[name], tensor, 2))
            changes = torch.stack([expected.state_dict()[name], tensor]) - before[name]
            energies[name.rpartition(".")[0]] = changes.double().square().flatten(1).sum(1)
        else:
            expected.state_dict()[name].copy_(tensor)
    images = torch.randn(4, 3, 16, 16)
    found, about = load_finetuned(tmp_path / "lora2.pth")
    assert_close(found(images), expected.eval()(images), FP32)
    kept, total = sum(energies.values())
    assert about["cut to rank"] == f"2, {kept / total:.1%} of the change's energy kept" and kept < 0.9 * total
    shares = {name: part / whole for name, (part, whole) in energies.items()}
    worst = min(shares, key=shares.get)
    told = f"keep {kept / total:.1%} of the energy of their change, {worst} the least, {shares[worst]:.1%};"
    assert told in capsys.readouterr().out
    assert "val_accuracy" not in about and about["lora"]["r"] == 2  # what is said of the file holds for this one
    layers = read_adapter_file(tmp_path / "lora2.pth")["layers"]
    assert {(record["r"], record["lora_alpha"]) for record in layers.values()} == {(2, 4)}
    assert "Not measured" in deploy_lora.main(f"card {tmp_path}/lora2.pth --output {tmp_path}/card.md".split())
    with pytest.raises(InputError, match=r"lora2\.pth is the adapter that is read: name another file$"):
        deploy_lora.main(f"convert {tmp_path}/lora2.pth --rank 1 --output {tmp_path}/lora2.pth".split())


@pytest.mark.parametrize("trained", [fully_trained, adapted])
@torch.no_grad()
def test_changed_statistics_become_those_of_images_if_better(narrow, saved, images, trained, tmp_path, capsys):
    base = saved(narrow)
    place = images / "train"
    path = save_adapter(trained(base), tmp_path / "lora.pth", base, arch="resnet18")

    def cut(options: str = "") -> nn.Module:
        deploy_lora.main(f"convert {path} --rank 2 --output {tmp_path}/cut.pth {options}".split())
        return LoRAManager(load_finetuned(tmp_path / "cut.pth")[0]).unload(merge=True)

    def scores(name: str) -> dict:
        return deploy_lora.main(["evaluate", f"{tmp_path}/{name}.pth", str(place)])

    model = cut()
    of_file = snapshot(model)
    right = scores("cut")["accuracy_per_class"]
    answer = max(right, key=right.get)
    told = [f"{scores(name)['accuracy']:.2%}" for name in ("lora", "cut")]
    shutil.copytree(place / answer, tmp_path / "one" / answer)  # of which all are answered right: nothing is better
    assert_unchanged(of_file, cut(f"--images {tmp_path}/one"))
    with pytest.raises(InputError, match=r"^--images: one image has no variance"):
        cut(f"--images {place} --batch-size 1")
    capsys.readouterr()
    found = cut(f"--images {place}")
    printed = capsys.readouterr().out
    before, after, anew = *told, f"{scores('cut')['accuracy']:.2%}"
    assert f"accuracy on 21 in {place}: {before} before, {after} after with the file's" in printed
    assert f"statistics, {anew} with these images'" in printed
    start = snapshot(of_base(base))
    for name, norm in model.eval().named_modules():  # all images are a batch, by PyTorch's own BatchNorms
        if f"{name}.running_var" in start and not torch.equal(norm.running_var, start[f"{name}.running_var"]):
            norm.train().momentum = 1.0
    about = load_finetuned(path)[1]
    data, _ = deploy_lora._labelled_images(place, about)
    model(torch.stack([about["transform"](data[i][0]) for i in range(len(data))]))
    expected = model.state_dict() | {name: tensor for name, tensor in of_file.items() if "batches" in name}
    torch.testing.assert_close(found.state_dict(), expected)


def test_a_rank_above_a_layer_keeps_its_whole_change_and_nothing_of_what_was_there():
    model = add_lora_to_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), r=5, target_modules=["0", "1"])
    randomize_adapters(model)
    trained = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items() if "lora" not in name}
    energies = initialization.start_at_change(model, trained)
    assert energies["1"][0] == pytest.approx(energies["1"][1])
    assert_close(model[1].effective_weight(), trained["1.weight"], FP32)


def test_what_cannot_be_cut_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quantised = add_lora_to_model(of_base(base), use_qlora=True)
    fresh, _ = load_backbone("none", 3, "vit_mini", 16)
    for rank, model, checkpoint, message in (
        (6, adapted(base), base, "--rank 6: lora.pth has rank 6; give a lower one"),
        (192, fully_trained(base), base, "--rank 192: lora.pth has rank 192; give a lower one"),
        (2, of_base(base), base, "lora.pth: only its head has trained"),
        (2, quantised, base, "lora.pth was trained over 4-bit wei"),
        (2, fresh, "none", "lora.pth began at random weights"),
    ):
        save_adapter(model, Path("lora.pth"), checkpoint)
        with pytest.raises(InputError, match=f"^{message}"):
            deploy_lora.main(f"convert lora.pth --rank {rank} --output cut.pth".split())
        assert not Path("cut.pth").exists()


# ------------------------------------------------------------------------------------------------------- the model card


ABOUT = {"checkpoint": "base.pth", "arch": "vit_mini", "image_size": 16, "class_names": ["a", "b"]}


def card_of(**about) -> str:
    """The card of an adapter that no run has measured."""
    return write_card(ABOUT | about, {}, "flowers", "lora.pth")


def test_a_card_has_the_figures_of_the_run_and_what_the_hub_reads(finished_once, once, tmp_path, capsys):
    deploy_lora.main(["card", str(once / "lora.pth"), "--output", str(tmp_path / "README.md")])
    assert capsys.readouterr().out == f"wrote {tmp_path}/README.md\n"
    text = (tmp_path / "README.md").read_text()
    low, high = finished_once["val_accuracy_interval"]
    accuracy = f"| accuracy | {finished_once['val_accuracy']:.4g} | {low:.4g} to {high:.4g} |"
    of_dark = f"| dark | {finished_once['accuracy_per_class']['dark']:.4g} |"
    about = ("lora_rank: 8", "look it up on its publisher's page.", "On 15 evaluation images, after training on 21:")
    assert [words for words in (accuracy, of_dark, *about) if words not in text] == []
    assert str(once.parent) not in text  # no path of this machine
    write_adapter_file(read_adapter_file(once / "lora.pth"), once / "lora.safetensors")
    (once / "below").mkdir()
    other = deploy_lora.main(["card", f"{once}/below/../lora.safetensors", "--output", str(once / "README.md")])
    assert "\n# out\n" in other and accuracy in other  # as its folder is called
    card = pytest.importorskip("huggingface_hub").ModelCard(text)
    assert (card.data.license, card.data.pipeline_tag) == ("unknown", "image-classification")
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["accuracy"] == pytest.approx(finished_once["val_accuracy"])


def test_a_card_of_labels_has_the_figures_of_each_and_its_groups():
    about = ABOUT | {"task": {"kind": "multilabel", "thresholds": [0.5, 0.5]}}
    by_label = {"a": {"auroc": 0.9, "auroc_interval": [0.8, 1.0], "threshold": 0.25}, "b": {"threshold": 1.0}}
    results = {"val_images": 35, "val_groups": 18, "train_images": 70, "macro_f1": 0.5, "macro_f1_interval": [0.4, 0.6]}
    results |= {"val_macro_ap": 1.0, "val_macro_ap_interval": None}
    text = write_card(about, results | {"labels": by_label}, "flowers", "lora.pth")
    assert "On 35 evaluation images in 18 groups, over which the intervals are, after training on 70:" in text
    assert "| macro_f1 | 0.5 | 0.4 to 0.6 |\n| macro_ap | 1 | none |" in text
    assert "| label | auroc | threshold |\n|---|---|---|\n| a | 0.9 | 0.25 |\n| b |  | 1 |" in text


def test_a_card_of_masks_says_by_what_it_was_trained_on_what_and_what_that_gained():
    config = {"data": {"data_list": ["/mine/a.csv", "/mine/b.csv"], "data_dir": "/mine/images"}}
    about = ABOUT | {"task": {"kind": "segmentation"}, "config": config, "version": "0.1"}
    results = {"val_images": 5, "val_miou": 0.6, "val_miou_interval": None, "probe_miou_before": 0.4}
    results |= {"iou_per_class": {"a": 0.25, "b": None}}
    results["backbone"] = {"name": "moco-v9", "licence": "mit", "source": "somewhere"}
    text = write_card(about, results, "streets", "lora.pth")
    assert "\nWeights for vit_mini, trained over `moco-v9` on a.csv, b.csv: segmentation" in text
    assert "what is made of it: mit (somewhere)." in text
    assert "| miou of the linear probe, before training | 0.4 | |" in text
    assert "| class | iou_per_class |\n|---|---|\n| a | 0.25 |\n| b |  |" in text
    assert "--output maps " in text and "Settings, of version 0.1 of" in text


def test_a_card_names_the_base_its_licence_and_what_made_the_adapter_another():
    text = card_of(checkpoint="/somewhere/moco_v2_800ep_pretrain.pth.tar", config=3)
    assert "\nlicense: cc-by-nc-4.0\n" in text and "trained over `moco-v2-800ep`" in text
    assert "what is made of it: cc-by-nc-4.0 (https://dl.fbaipublicfiles.com/moco/" in text
    assert "Not measured." in text and "model-index: []" in text
    data = {"data_dir": "/mine/tulips", "dataset": "imagefolder"}
    text = card_of(checkpoint="/mine/moco-v2-of-my-own.pth", config={"data": data})
    assert "\nlicense: unknown\n" in text and "` on tulips: " in text
    # `load_finetuned` looks for a stage-1 adapter beside the file.
    text = card_of(**{"thresholds chosen": "for f1, in /mine/list.csv", "stage1_adapter": "/mine/moco_lora.pth"})
    assert "Not measured since the thresholds were chosen anew, for f1: `threshold` below is the run's." in text
    assert "`moco_lora.pth`, which is merged into it, has to lie next to `lora.pth`" in text
    text = card_of(**{"cut to rank": "2, 90.0% of the change's energy kept"})
    assert "since it was cut to rank 2, 90.0% of the change's energy kept: `lora_rank` below is the run's" in text


def test_a_card_says_what_its_images_have_chosen():
    for chosen, told in (
        ({"eval_split": "validation"}, ", set aside of the training images to choose settings by:"),
        ({"chosen_by": {"epoch": "they"}}, ", which chose the epoch: on others the figures are lower:"),
        ({"eval_split": "held-out", "chosen_by": {"learning rate": "trials"}}, ":"),
    ):
        results = {"val_images": 90, "val_accuracy": 0.5, "val_accuracy_interval": [0.4, 0.6], **chosen}
        assert f"\nOn 90 evaluation images{told}\n" in write_card(ABOUT, results, "flowers", "lora.pth")


@pytest.mark.parametrize("way", ["an adapter of an own loop", "trained on", "results of evaluate"])
def test_figures_of_another_adapter_are_refused(once, images, tmp_path, way):
    """Of one whose file says nothing of a run, or still says what it was loaded with; and of no run."""
    model, info = load_finetuned(once / "lora.pth")
    if way == "results of evaluate":
        deploy_lora.main(f"evaluate {once}/lora.pth {images}/val --output {tmp_path}/results.json".split())
        shutil.copy(tmp_path / "results.json", once)
    else:  # the file stays as large
        next(value for name, value in model.named_parameters() if "lora_B" in name).data += 1
    kept = {key: value for key, value in info.items() if key not in ("transform", "config")}
    LoRAManager(model).save_lora_checkpoint(once / "other.pth", kept if way == "an adapter of an own loop" else None)
    with pytest.raises(InputError, match="is of another file than"):
        deploy_lora.main(["card", str(once / "other.pth"), "--output", str(tmp_path / "README.md")])
