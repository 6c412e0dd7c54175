"""moco/pretrain.py as a user runs it: main(argv), then the files."""

import contextlib
import importlib.util
import io
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from torch import nn

import deploy_lora
from finetune_lora import add_lora_to_model, load_base, load_finetuned
from lora_utils import LoRAManager, read_adapter_file
from moco import pretrain
from tests.checkpoint_files import under, without_head
from tests.dense import changed
from tests.run_folders import assert_identical, assert_same, assert_same_tensors, metrics, names_in, rows_of, stop
from toolkit import InputError, config, files, says
from toolkit.answers.measures import share_interval
from toolkit.images import data
from toolkit.models.backbones import headless
from toolkit.models.checkpoints import load_backbone
from toolkit.run import output_folder, runs, training

IN_ADAPTERS = "--checkpoint {} --lora-rank 2 --image-size 16 --learning-rate 1e-2"


def arguments(images: Path, output: Path, options: str = "") -> list[str]:
    """Of two steps an epoch."""
    argv = f"--data-dir {images}/train --image-size 8 --batch-size 8 --epochs 2 --knn-every 2"
    argv += f" --dim 8 --mlp-dim 16 --queue-size 16 --two-crops digits --device cpu --output-dir {output}"
    return [*argv.split(), *options.split()]


def stopped(images: Path, output: Path, options: str = "") -> Path:
    """The last.pth of a run that is stopped after its first epoch."""
    with mock.patch.object(pretrain.Pretraining, "save_metrics", stop), pytest.raises(runs.Stopped):
        pretrain.main(arguments(images, output, options))
    return output / "last.pth"


@pytest.fixture(scope="module")
def half(images, tmp_path_factory) -> Path:
    return stopped(images, tmp_path_factory.mktemp("half"))


def finished(images: Path, output: Path, options: str = "") -> tuple[dict, Path, str]:
    """The results of a run, its folder, and what it has printed."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        results = pretrain.main(arguments(images, output, options))
    return results, output, told.getvalue()


@pytest.fixture(scope="module")
def done(images, tmp_path_factory) -> tuple[dict, Path, str]:
    return finished(images, tmp_path_factory.mktemp("done"))


@pytest.fixture(scope="module")
def adapted(images, base, tmp_path_factory) -> tuple[dict, Path, str]:
    return finished(images, tmp_path_factory.mktemp("adapted"), IN_ADAPTERS.format(base))


@pytest.fixture
def run(images, tmp_path):
    return lambda options="", output="out": pretrain.main(arguments(images, tmp_path / output, options))


@pytest.fixture
def begun(run, monkeypatch, capsys):
    """What a run prints that stops where it would begin to train."""

    def begin(options: str = "") -> str:
        with monkeypatch.context() as patch, pytest.raises(runs.Stopped):
            patch.setattr(pretrain, "train", stop)
            run(options)
        return capsys.readouterr().out

    return begin


def test_the_files_of_a_run_what_it_says_and_the_next_command(done, half):
    results, output, told = done
    assert names_in(output) == {"metrics.csv", "moco_stage1_epoch_2.pth", "pretraining_curves.png", "results.json"}
    of_a_run = [output / "results.json", output / "moco_stage1_epoch_2.pth", half]
    assert all(says(path, output_folder.OF_A_RUN) for path in of_a_run)
    first, second = rows_of(results["metrics"])
    assert (first["epoch"], second["epoch"], first["knn_accuracy"]) == ("1", "2", "")
    for name in ("loss", "knn_accuracy", "effective_rank"):
        assert float(second[name]) == results[name]
    assert float(second["learning_rate"]) == pytest.approx(5e-4)
    written = json.loads((output / "results.json").read_text())
    assert written.keys() == results.keys() and written["loss"] == results["loss"]
    assert 0 < written["waiting_share"] < 1
    assert written["images_per_second"] == pytest.approx(32 / written["seconds"], rel=0.5)  # 2 epochs of 16 images

    assert "data: 16 images\nmodel: vit_mini, MoCo v3\n" in told
    assert "--queue-size has no effect: it is for MoCo v2\n" in told and "--mlp-dim" not in told
    measured = f"k-NN {results['knn_accuracy']:.1%}, effective rank {results['effective_rank']:.2f}"
    assert f"epoch 2: loss {results['loss']:.3f}, {measured}; " in told
    last = told.partition("\nk-NN after")[2]
    low, high = results["knn_interval"]
    of_images = f"{results['knn_accuracy']:.1%} of 3 images (95% interval {low:.1%} to {high:.1%})"
    assert of_images in last and "k-NN before" not in told  # from random weights
    assert (low, high) == pytest.approx(share_interval(torch.arange(3) < round(3 * results["knn_accuracy"])))
    assert f"{output}/: moco_stage1_epoch_2.pth, metrics.csv" in last
    assert last.endswith(f"finetune_lora.py --data-dir my_images --checkpoint {results['checkpoint']}\n")


def test_images_without_labels_are_measured_by_their_rank_or_by_labelled_ones(run, images, tmp_path, capsys):
    flat = f"--data-dir {images}/train/dark --batch-size 3"
    results = run(f"{flat} --knn-every 1")
    assert results["knn_accuracy"] is None and 1 < results["effective_rank"] < 8
    told = capsys.readouterr().out
    assert "data: 7 images without labels" in told  # all: there is nothing to hold out
    assert told.count(", effective rank ") == 2 and "k-NN" not in told
    first, second = rows_of(results["metrics"])
    assert first["knn_accuracy"] == second["knn_accuracy"] == ""
    assert float(second["effective_rank"]) == results["effective_rank"] != float(first["effective_rank"])

    labelled = shutil.copytree(images / "train", tmp_path / "labelled")
    next(labelled.rglob("*.png")).write_bytes(b"")  # it cannot be read
    results = run(f"{flat} --knn-dir {labelled} --skip-unreadable --epochs 1", "labelled-out")
    assert results["knn_accuracy"] > 0.5 and results["effective_rank"] > 1


def test_features_that_have_collapsed_show_and_the_images_that_measure_them_are_bounded(run, spy, monkeypatch, capsys):
    rank = mock.Mock(return_value=1.1)
    monkeypatch.setattr(pretrain.measures, "effective_rank", rank)
    monkeypatch.setattr(pretrain, "MEASURED_IMAGES", 4)
    monkeypatch.setattr(pretrain, "KNN_BANK", 6)
    monkeypatch.setattr(pretrain, "KNN_QUERIES", 2)
    measure = spy(pretrain.evaluation, "knn_accuracy")
    run("--epochs 1")
    assert "the features have collapsed: lower --learning-rate" in capsys.readouterr().out
    assert list(map(len, (*measure.call_args.args, *rank.call_args.args))) == [6, 6, 2, 2, 3]  # of the bank every other


def test_the_checkpoint_is_what_fine_tuning_reads(done, half, images):
    results = done[0]
    checkpoint = files.read_checkpoint(results["checkpoint"])
    assert (checkpoint["epoch"], checkpoint["global_steps"], checkpoint["arch"]) == (2, 4, "vit_mini")
    assert checkpoint["config"]["image_size"] == 8 and checkpoint["config"]["data_dir"] == str(images / "train")
    assert checkpoint["optimizer"] == {}
    model, report = load_backbone(results["checkpoint"], num_classes=3)
    assert report["arch"] == "vit_mini" and report["epoch"] == 2
    assert_same(under("encoder_q.", without_head(model.state_dict())), checkpoint["model"])
    _, report = load_backbone(half, num_classes=3)  # so is a state before the last
    assert (report["family"], report["epoch"]) == ("moco_stage1", 1)


def test_what_a_list_has_and_what_has_no_effect_or_no_sense_is_told(begun, images, tmp_path):
    paths = sorted(images.rglob("*.png"))
    (tmp_path / "paths.csv").write_text("\n".join(map(str, paths)))
    assert "36 images without labels" in begun(f"--data-list {tmp_path}/paths.csv")
    (tmp_path / "labels.csv").write_text("\n".join(f"{path},{path.parent.name}" for path in paths))
    assert "without labels" not in begun(f"--data-list {tmp_path}/labels.csv")
    for size in (16, 17):
        told = begun(f"--moco-version 2 --queue-size {size}")
        assert "--mlp-dim has no effect: it is for MoCo v3\n" in told and "--queue-size has" not in told
        assert ("is more than there are images" in told) == (size > 16)


def test_a_loss_that_is_not_finite_stops_the_run(run, monkeypatch):
    """It names the rate of the step that had it, also where a GPU is asked only after later ones."""
    monkeypatch.setattr(pretrain.MoCoV3, "contrast", lambda self, q, k: q.sum() * float("nan"))
    for read_together in (1, 8):
        monkeypatch.setitem(training.STEPS_READ_TOGETHER, "cpu", read_together)
        message = r"the loss is nan at epoch 1, step 0, learning rate 1\.00e-03: lower --learning-rate"
        with pytest.raises(InputError, match=message):
            run()


def test_a_run_of_other_settings_is_not_resumed(run, half):
    with pytest.raises(InputError, match=r"belongs to a run with other settings .epochs was 2, is 3, seed was 0, is 5"):
        run(f"--epochs 3 --seed 5 --resume {half}")


def test_the_folder_is_read_once_and_the_held_out_images_have_no_part(begun, images, spy):
    load = spy(pretrain, "load_splits")
    build = spy(data, "build_loader")
    begun()
    begun("--eval-split validation --batch-size 4")
    assert load.call_count == 2
    training = set(load("imagefolder", images / "train").train.relative_names())
    loaders = [call.args[0].dataset for call in build.call_args_list]
    for parts in (loaders[:3], loaders[3:]):
        train, bank, queries = (set(part.relative_names()) for part in parts)
        assert bank.isdisjoint(queries) and bank | queries == training
        assert train in (bank, training)
    assert train == bank  # a run to choose settings does not train on what it chooses by


def test_shipped_configurations_are_valid():
    for path in (Path(__file__).parents[1] / "configs").glob("*.yaml"):
        args, sources = pretrain.read_options(["--config", str(path)])
        assert sources["moco_version"] == "config"
        if path.stem != "stage1":
            assert f"v{args.moco_version}" in path.stem and args.dataset == "imagefolder"
        assert yaml.safe_load(path.read_text()).keys() <= set(config.SECTIONS)


def built(options: str) -> tuple:
    return pretrain.build_model(pretrain.read_options(options.split())[0], torch.device("cpu"))


def test_without_adapters_it_goes_on_in_all_weights(run, base):
    model, args, _ = built(f"--checkpoint {base}")
    start = without_head(model.encoder_q.state_dict())
    assert (args.arch, args.image_size, args.moco_version) == ("vit_mini", 16, 3)
    assert_same(start, load_backbone(base, 1)[0].state_dict())
    end = torch.load(run(f"--checkpoint {base} --image-size 16 --epochs 1")["checkpoint"])["model"]
    fixed = {"encoder.pos_embedding", "conv_proj.weight", "conv_proj.bias"}  # as MoCo v3 keeps them
    assert {name for name in start if torch.equal(start[name], end[f"encoder_q.{name}"])} == fixed


@pytest.mark.usefixtures("small_backbones")
@pytest.mark.parametrize(("version", "arch"), [(2, "resnet18"), (3, "resnet18"), (3, "vit_mini")])
def test_projector_and_predictor_start_from_an_official_file(saved, version, arch):
    theirs, _, _ = built(f"--moco-version {version} --arch {arch} --image-size 32 --dim 6 --mlp-dim 10 --queue-size 9")
    sides = {"encoder_q": "base_encoder", "encoder_k": "momentum_encoder"} if version == 3 else {}
    state = {}
    for name, tensor in theirs.state_dict().items():
        side, _, rest = name.partition(".")
        if arch != "resnet18" or not name.startswith("predictor.4."):  # a ResNet's ends without a BatchNorm
            state[f"module.{sides.get(side, side)}.{rest.replace('heads.', 'head.')}"] = tensor
    path = saved({"state_dict": state, "arch": arch, "epoch": 3}, "official.pth.tar")
    ours, args, report = built(f"--checkpoint {path} --lora-rank 2 --queue-size 9")
    assert (args.moco_version, args.dim, args.arch) == (version, 6, arch)
    for name, tensor in ours.state_dict().items():
        if "fc." in name or "heads." in name or name.startswith("predictor."):
            source = name.replace("encoder_k.", "encoder_q.")  # both start from the queries' own
            assert torch.equal(tensor, theirs.state_dict()[source]), name
    assert "projector taken over" in report["origin"]
    assert ("predictor taken over" in report["origin"]) == (version == 3)


@pytest.fixture
def adapt(run, base):
    return lambda options="", output="out": run(f"{IN_ADAPTERS.format(base)} {options}", output)


def test_a_stage_1_adapter_knows_the_heads_and_the_channels_of_its_vit(base, tmp_path):
    backbone, report = load_backbone(base, 1, heads=1, channels=5, channel_fit="timm")
    LoRAManager(add_lora_to_model(headless(backbone), r=1)).save_lora_checkpoint(tmp_path / "moco_lora.pth", report)
    model, _ = load_base(base, tmp_path / "moco_lora.pth", 4)
    assert (model.encoder.layers[0].self_attention.num_heads, model.conv_proj.in_channels) == (1, 5)
    with pytest.raises(InputError, match="with as many heads"):
        load_base(base, tmp_path / "moco_lora.pth", 4, heads=3)
    for typed, noted in ("--heads 1", 1), ("", None):  # for its file, if they are not the arch's own
        assert built(f"--checkpoint {base} {typed}")[1].heads == noted


def test_adapters_alone_are_the_result(adapted, base):
    results, output, told = adapted
    assert "projector fresh; predictor fresh" in told  # none is in the file
    last = told.partition("\nk-NN before")[2]
    assert last.splitlines()[1].startswith("k-NN after") and f"{results['before']['knn_accuracy']:.1%} of 3" in last
    command = f"--checkpoint {base} --stage1-adapter {output}/moco_lora.pth\n"
    assert last.endswith(f"finetune_lora.py --data-dir my_images {command}")
    assert names_in(output) == {"metrics.csv", "moco_lora.pth", "pretraining_curves.png", "results.json"}
    content = read_adapter_file(results["checkpoint"])
    assert content["tensors"] and all(".lora_" in name for name in content["tensors"])
    assert all(tensor.any() for tensor in content["tensors"].values())
    assert content["metadata"]["moco_version"] == 3 and content["metadata"]["lora"]["r"] == 2
    merged = load_base(base, output / "moco_lora.pth", 4)[0]
    before = without_head(load_backbone(base, 4)[0].state_dict())
    weights = {nn.MultiheadAttention: "in_proj_weight"}
    adapted = {f"{name}.{weights.get(type(merged.get_submodule(name)), 'weight')}" for name in content["layers"]}
    assert changed(before, merged) == adapted
    with pytest.raises(InputError, match=r"is of stage 1 and has no classifier: .* --stage1-adapter"):
        load_finetuned(results["checkpoint"])


def test_adapters_resume_to_the_same_bits_over_the_same_base_alone(adapt, base, images, tmp_path):
    options = "--moco-version 2 --use-qlora --lora-dropout 0.2"
    half = stopped(images, tmp_path / "resumed", f"{IN_ADAPTERS.format(base)} {options}")
    state = torch.load(half)["model"]
    assert not any(".weight" in name and ".fc." not in name and ".heads." not in name for name in state)  # of the base
    content = torch.load(base)
    content["state_dict"]["module.base_encoder.class_token"] += 1
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"last\.pth was trained over another base than .*other\.pth"):
        adapt(f"{options} --checkpoint {tmp_path / 'other.pth'} --resume {half}", "elsewhere")
    straight = adapt(options, "straight")
    resumed = adapt(f"{options} --resume", "resumed")
    assert_same_tensors(straight["checkpoint"], resumed["checkpoint"])
    assert straight["loss"] == resumed["loss"] and straight["before"] == resumed["before"]


@pytest.mark.slow
def test_fine_tuning_and_deployment_are_over_base_and_stage_1_adapter(adapt, finetune, images, tmp_path, capsys):
    stage1 = adapt("--use-qlora")["checkpoint"]
    finetune("--epochs 1 --use-qlora", "without")
    results = finetune(f"--stage1-adapter {stage1} --epochs 1 --use-qlora", "tuned")
    assert results["verdict"]["gained_by_stage_1"].endswith(f", against {tmp_path / 'without'}")
    adapter = results["folder"] / "lora.pth"
    assert read_adapter_file(adapter)["metadata"]["stage1_adapter"] == str(stage1)
    model, _ = load_finetuned(adapter)
    x = torch.randn(4, 3, 16, 16)
    evaluated = deploy_lora.main(["evaluate", str(adapter), str(images / "val"), "--device", "cpu"])
    assert evaluated["accuracy"] == results["val_accuracy"]
    if importlib.util.find_spec("peft"):
        deploy_lora.main(["convert", str(adapter), "--to", "peft", "--output", str(tmp_path / "peft")])
        assert "load_base(checkpoint, stage1_adapter, num_classes)" in capsys.readouterr().out

    elsewhere = shutil.move(stage1, tmp_path / "elsewhere.pth")
    assert torch.equal(load_finetuned(adapter, stage1_adapter=elsewhere)[0](x), model(x))
    beside = adapter.with_name("moco_lora.pth")
    shutil.move(elsewhere, beside)  # where it is found
    assert torch.equal(load_finetuned(adapter)[0](x), model(x))
    other = adapt("--use-qlora --seed 1", "other")["checkpoint"]
    shutil.copy(other, beside)
    with pytest.raises(InputError, match="trained over another base"):
        load_finetuned(adapter)
    with pytest.raises(InputError, match="trained over another base"):
        finetune(f"--stage1-adapter {other} --epochs 1 --resume --use-qlora", "tuned")
    beside.unlink()
    with pytest.raises(InputError, match=r"its stage-1 adapter, .*moco_lora\.pth, is not there; put it next to"):
        load_finetuned(adapter)


def test_a_run_that_was_killed_while_it_measured_ends_in_the_same_bits(run, done, tmp_path, spy, monkeypatch):
    """Each epoch is saved before: of ImageNet the features may take more memory than there is."""
    with monkeypatch.context() as patch, pytest.raises(InputError, match="out of memory"):
        patch.setattr(pretrain.evaluation, "extract_features", mock.Mock(side_effect=MemoryError))
        run("--knn-every 1")
    assert files.read_checkpoint(tmp_path / "out/last.pth")["epoch"] == 1
    left = []  # until all is written
    monkeypatch.setattr(pretrain.reports, "plot_pretraining", lambda _, path: left.append(names_in(path.parent)))
    meter = spy(data.LoadingMeter, "results")
    run("--knn-every 1 --resume")
    assert meter.call_args.args[0].images == 32  # of the whole run: two epochs of 16
    assert "last.pth" in left[0] and "last.pth" not in names_in(tmp_path / "out")
    first, second = metrics(tmp_path / "out")
    assert "knn_accuracy" in first and second["knn_accuracy"] == done[0]["knn_accuracy"]
    ours, straight = (torch.load(folder / "moco_stage1_epoch_2.pth") for folder in (tmp_path / "out", done[1]))
    assert_identical(ours["model"], straight["model"])
    assert [row["loss"] for row in ours["history"]] == [row["loss"] for row in straight["history"]]
