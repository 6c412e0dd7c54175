"""The commands that come after training: what they print, what they write and how they end.

What they are given by mistake is in `test_bad_input.py`, PEFT's format in `test_peft_format.py`.
"""

import errno
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import CLASSES
from dense import FP32, assert_close, randomize_adapters
from PIL import Image
from torch import nn

import deploy_lora
from finetune_lora import add_lora_to_model, load_finetuned
from lora import functional
from lora_utils import LoRAManager
from tests.image_files import tar_of
from tests.pages import preparation
from tests.run_folders import column, rows_of
from toolkit import InputError, files
from toolkit.answers import measures, predictions
from toolkit.images.data import LabelledImages
from toolkit.images.folders import ImageFiles
from toolkit.models.backbones import build_backbone, headless
from toolkit.models.checkpoints import load_backbone
from toolkit.run.commands import files_written, read_options


@pytest.fixture(params=[".pth", ".safetensors"])
def adapter(request, base, tmp_path) -> Path:
    """An adapter file for three classes, of 4,419 numbers, beside its base.pth."""
    torch.manual_seed(0)
    base = shutil.copy(base, tmp_path / "base.pth")
    model, report = load_backbone(base, 3)
    randomize_adapters(add_lora_to_model(model, r=2, target_modules=["encoder_layer_1.mlp"]), std=0.1)
    path = tmp_path / f"lora{request.param}"
    about = {"arch": report["arch"], "class_names": ["a", "b", "ß"], "image_size": 16, "checkpoint": str(base)}
    LoRAManager(model).save_lora_checkpoint(path, about | {"\x1b": 1, "config": {"finetune": {"learning_rate": 1e-4}}})
    return path


def test_info_tells_what_is_in_the_file_without_control_codes(adapter, capsys):
    content = deploy_lora.main(["info", str(adapter)])
    size = adapter.stat().st_size / 1e6
    assert capsys.readouterr().out.splitlines() == [
        f"{adapter}: 2 adapted layers, 4,419 parameters, {size:.2f} MB",
        "  arch: 'vit_mini'",
        "  class_names: ['a', 'b', 'ß']",
        "  image_size: 16",
        f"  checkpoint: {content['metadata']['checkpoint']!r}",
        r"  \x1b: 1",
        "  finetune: {'learning_rate': 0.0001}",
        "  encoder.layers.encoder_layer_1.mlp.0: LoRALinear, r=2, scaling=8",
        "  encoder.layers.encoder_layer_1.mlp.3: LoRALinear, r=2, scaling=8",
    ]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_merged_file_serves_without_this_toolkit(adapter, suffix, tmp_path, capsys):
    """Though its base has moved."""
    output, moved = tmp_path / f"merged{suffix}", tmp_path / "moved.pth"
    expected = load_finetuned(adapter)[0]
    (tmp_path / "base.pth").rename(moved)
    metadata = deploy_lora.main(["merge", str(adapter), "--output", str(output), "--checkpoint", str(moved)])
    assert metadata["class_names"] == ["a", "b", "ß"]
    assert capsys.readouterr().out == f"wrote {output}: a state_dict for torchvision's vit_mini with 3 classes\n"
    state = torch.load(output) if suffix == ".pth" else safetensors.torch.load_file(output)
    plain = build_backbone("vit_mini", 3, 16)
    plain.load_state_dict(state)
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(plain.eval()(images), expected(images), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ answers for images


@pytest.fixture(scope="module", params=["lora", "qlora", "full"])
def trained(request, base, tmp_path_factory) -> Path:
    """The file of a run of each kind, for the classes of the `images`."""
    path = tmp_path_factory.mktemp("trained") / "lora.pth"
    torch.manual_seed(0)
    model, report = load_backbone(base, len(CLASSES))
    nn.init.normal_(model.heads.head.weight, std=0.1)
    if request.param == "full":
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    else:
        add_lora_to_model(model, r=2, target_modules="encoder_layer_1", use_qlora=request.param == "qlora")
        randomize_adapters(model, std=0.1)
    about = {"arch": report["arch"], "class_names": list(CLASSES), "image_size": 16, "checkpoint": str(base)}
    LoRAManager(model).save_lora_checkpoint(path, about)
    return path


@torch.no_grad()
def logits_of(adapter: Path, paths: list[Path | str]) -> torch.Tensor:
    """Image by image, as the README predicts."""
    model, info = load_finetuned(adapter)
    return torch.cat([model(info["transform"](Image.open(path))[None]) for path in paths])


def run(command: str, *words):
    return deploy_lora.main([*command.split(), *map(str, words)])


def test_predictions_are_those_of_the_model(trained, images, tmp_path, capsys):
    single = images / "train/dark/0.png"
    output = tmp_path / "predictions.csv"
    rows = run("predict --batch-size 4 --device cpu", trained, images / "val", single, single, "--output", output)
    assert rows == rows_of(output)
    paths = list(map(str, sorted((images / "val").glob("*/*.png"))))
    assert column(rows, "path") == [*paths, str(single)]  # which is there once
    for row, probabilities in zip(rows, logits_of(trained, [*paths, single]).softmax(1), strict=True):
        ranked = probabilities.argsort(descending=True).tolist()
        assert list(row) == ["path", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
        assert [row[key] for key in ("class", "class_2", "class_3")] == [CLASSES[i] for i in ranked]
        assert float(row["probability"]) == pytest.approx(probabilities.max().item(), abs=1e-4)
    assert f"wrote {output}: 16 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    "trained, command",
    [("lora", "predict"), ("lora", "embed"), ("lora", "evaluate"), ("qlora", "predict")],
    indirect=["trained"],
)
def test_answers_are_computed_with_merged_weights(trained, images, tmp_path, monkeypatch, command):
    monkeypatch.setattr(functional, "lora_linear", mock.Mock(side_effect=AssertionError("not merged")))
    output = {"predict": "p.csv", "embed": "f.npy", "evaluate": "results.json"}[command]
    run(f"{command} --device cpu", trained, images / "val", "--output", tmp_path / output)
    assert (tmp_path / output).exists()


def test_images_that_cannot_be_read_are_listed_and_left_out(adapter_for_images, tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "broken.jpg").write_bytes(b"no image")
    Image.new("LA", (9, 7)).save(folder / "grey, with a comma.png")
    run("predict --device cpu", adapter_for_images, folder, "--output", tmp_path / "p.csv")
    printed = capsys.readouterr().out
    assert "1 of 2 images cannot be read and are left out:" in printed and "broken.jpg: not a readable image" in printed
    assert column(rows_of(tmp_path / "p.csv"), "path") == [f"{folder}/grey, with a comma.png"]
    with pytest.raises(InputError, match=r"none of the 1 images can be read, such as .*broken\.jpg: not a") as found:
        run("predict --device cpu", adapter_for_images, folder / "broken.jpg", "--output", tmp_path / "p.csv")
    assert "--" not in str(found.value)  # the options of training


def parts_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


@pytest.mark.parametrize("command", ["predict", "embed"])
@pytest.mark.parametrize("trained", ["lora"], indirect=True)
def test_answers_in_parts_go_on_where_they_were_stopped(trained, images, tmp_path, monkeypatch, command):
    """15 images in parts of 4: a stopped command and its sequel write, bit for bit, what one that runs through does.

    What else may lie in the folder is in test_answer_folders.py.
    """
    monkeypatch.setattr(deploy_lora, "PART_IMAGES", 7)  # which becomes a multiple of a batch

    def write(folder: str, *more: str, part: str = "val") -> list[Path]:
        argv = f"{command} --batch-size 4 --device cpu", trained, images / part, "--output", tmp_path / folder
        return run(*argv, *more)

    paths = write("whole")
    assert [path.stem for path in paths] == [f"part-{i:05d}" for i in range(4)]
    single = run(f"{command} --device cpu", trained, images / "val", "--output", tmp_path / f"one{paths[0].suffix}")
    if command == "predict":
        rows = list(itertools.chain(*map(rows_of, paths)))
        assert column(rows, "path") == column(single, "path")
        found, expected = (np.float64(column(of, "probability")) for of in (rows, single))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    else:
        assert_close(torch.from_numpy(np.concatenate(list(map(np.load, paths)))), single, FP32)

    written_by = {"predict": (predictions, "write_table"), "embed": (deploy_lora, "_write_features")}[command]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        two_parts = [mock.DEFAULT, mock.DEFAULT, KeyboardInterrupt]
        patch.setattr(*written_by, mock.Mock(wraps=getattr(*written_by), side_effect=two_parts))
        write("stopped")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped").glob("part-*")}
    write("stopped", "--resume")
    assert before and all(path.stat().st_mtime_ns == written for path, written in before.items())  # nothing twice
    whole = parts_in(tmp_path / "whole")
    assert parts_in(tmp_path / "stopped") == whole
    for more, what in (({"part": "train"}, "images"), ({}, "--precision")):
        words = ["--precision", "bf16"] if what == "--precision" else []
        with pytest.raises(InputError, match=f"whole: its answers were made with other {what}; name another folder"):
            write("whole", "--resume", *words, **more)
    write("whole", "--resume", "--precision", "fp32")  # which is what a CPU computes in


@pytest.mark.parametrize("trained", ["qlora"], indirect=True)
def test_features_are_what_the_head_receives(trained, images, tmp_path):
    returned = run("embed --batch-size 4 --device cpu", trained, images / "val", "--output", tmp_path / "f.npy")
    written = np.load(tmp_path / "f.npy")
    paths = column(rows_of(tmp_path / "f_paths.csv"), "path")
    model, info = load_finetuned(trained)
    with torch.no_grad():
        expected = headless(model)(torch.stack([info["transform"](Image.open(path)) for path in paths]))
    assert written.dtype == np.float32 and written.shape == (15, 192)
    assert_close(torch.from_numpy(written), expected, FP32)
    assert torch.equal(torch.from_numpy(written), returned)


@pytest.mark.parametrize("trained", ["full"], indirect=True)
def test_evaluation_counts_all_images_of_a_folder(trained, images, tmp_path, capsys):
    """A folder of class folders counts whole; of one with a val/ that is meant."""
    results = run("evaluate --device cpu", trained, images, "--output", tmp_path / "r.json")
    told = capsys.readouterr().out
    assert results == run("evaluate --device cpu", trained, images / "val")
    paths = list(map(str, sorted((images / "val").glob("*/*.png"))))
    hits = logits_of(trained, paths).argmax(1) == torch.arange(3).repeat_interleave(5)
    assert results["images"] == 15 and results["accuracy"] == pytest.approx(hits.float().mean().item())
    shares = hits.view(3, 5).double().mean(1).tolist()
    assert list(results["accuracy_per_class"].values()) == pytest.approx(shares)
    assert json.loads((tmp_path / "r.json").read_text()) == results
    assert results["accuracy_interval"] == pytest.approx(measures.share_interval(hits))
    assert f" of 15 images, {results['accuracy']:.2%} (95% interval" in told
    assert f"{'images':<22}15 in {images}/val\n" in told
    for page in (tmp_path / "r.html", trained.with_name("lora_evaluation.html")):
        text = page.read_text()
        assert f"accuracy {results['accuracy']:.2%} on 15 images" in text and "By class" in text
        assert "Mistakes" in text and "Settings" not in text and "By epoch" not in text


def archived(paths: list[Path], path: Path) -> None:
    """Images as an archive that has the class of each beside it."""
    files = {}
    for number, image in enumerate(paths):
        files[f"{number}.png"] = image.read_bytes()
        files[f"{number}.cls"] = image.parent.name.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(files))


def test_lists_and_archives_are_answered_and_evaluated_as_folders_are(adapter_for_images, images, tmp_path):
    """Archives themselves, and in the val/ beside a train/; of classes that the adapter lacks they are refused."""
    paths = sorted((images / "val").glob("*/*.png"))
    table = tmp_path / "test.csv"
    table.write_text("\n".join(["path,label", *(f"{path},{path.parent.name}" for path in paths)]))
    archived(paths[:8], tmp_path / "mine/val/0.tar")
    archived(paths[8:], tmp_path / "mine/val/1.tar")
    archived(sorted((images / "train").glob("*/*.png")), tmp_path / "mine/train/0.tar")
    found = []
    for source, labelled in ((images / "val", images), (table, table), (tmp_path / "mine/val", tmp_path / "mine")):
        rows = run("predict --device cpu", adapter_for_images, source, "--output", tmp_path / "p.csv")
        results = run("evaluate --device cpu", adapter_for_images, labelled)
        found.append((column(rows, "probability"), results["accuracy"], results["images"]))
    assert rows[8]["path"] == f"{tmp_path}/mine/val/1.tar/0.png"
    assert found[0] == found[1] == found[2] and found[0][2] == 15
    (tmp_path / "mine/val/1.tar").write_bytes(tar_of({"a.png": b"", "a.cls": b"eel"}))
    with pytest.raises(InputError, match=r"mine/val has classes that the adapter lacks: eel"):
        run("evaluate --device cpu", adapter_for_images, tmp_path / "mine/val")


def test_a_list_is_evaluated_over_the_groups_of_the_run(adapter_for_images, images, tmp_path, capsys):
    table = tmp_path / "test.csv"
    plain = tmp_path / "plain.csv"
    expected = run("evaluate --device cpu", adapter_for_images, images / "val")
    rows = [f"{path},{path.parent.name}" for path in sorted((images / "val").glob("*/*.png"))]
    table.write_text("\n".join(["path,label,who", *(f"{row},patient {i % 5}" for i, row in enumerate(rows))]))
    plain.write_text("\n".join(rows))

    def assert_told(of_run: dict, path: Path, groups: str) -> None:
        found = run("evaluate --device cpu", with_settings(adapter_for_images, of_run), path)
        assert f" 15 in {path}, {groups}\n" in capsys.readouterr().out
        assert (found["accuracy_interval"] == expected["accuracy_interval"]) == groups.startswith("without")

    of_list = {"data_list": [str(table)], "group_by": "who"}
    assert_told(of_list, table, "in 5 groups; intervals are over groups")
    assert_told(of_list, plain, "without groups by who")
    # Levels of the folder of a run are none of absolute paths, as `choose` writes them: all would be one group.
    of_folder = {"data_dir": str(images), "group_by": "1"}
    assert_told(of_folder, plain, "without groups by 1")
    assert_told(of_folder | {"data_list": [str(plain)]}, plain, "in 1 groups; intervals are over groups")
    assert_told({"group_by": "9" * 5000}, images / "val", f"without groups by {'9' * 120}")  # which nothing can count


def test_lists_relative_to_the_data_dir_of_training_can_be_used_after_it(adapter_for_images, images, tmp_path):
    """Where the list's own folder has an image of that name, it is that one."""
    table = tmp_path / "list.csv"
    names = sorted(path.relative_to(images) for path in (images / "val").glob("*/*.png"))
    table.write_text("".join(f"{name},{name.parent.name}\n" for name in names))
    trained = with_settings(adapter_for_images, {"dataset": "imagefolder", "data_dir": str(images)})
    assert run("evaluate --device cpu", trained, table)["images"] == 15
    answers = "--output", tmp_path / "answers.csv"
    rows = run("predict --device cpu", trained, table, *answers)
    assert column(rows, "path") == [str(images / name) for name in names]
    own = tmp_path / names[0]
    own.parent.mkdir(parents=True)
    shutil.copy(images / names[0], own)
    with pytest.raises(InputError, match="14 of its files are not in"):
        run("predict --device cpu", trained, table, *answers)
    own.unlink()
    elsewhere = with_settings(adapter_for_images, {"dataset": "imagefolder", "data_dir": "https://127.0.0.1:1/x"})
    with pytest.raises(InputError, match=f"15 of its files are not in {tmp_path}"):  # a stranger may have named that
        run("evaluate --device cpu", elsewhere, table)


def with_settings(adapter: Path, data: object) -> Path:
    """A copy of the file in which the run's settings have this section `data`."""
    content = torch.load(adapter)
    content["metadata"]["config"] = {"data": data}
    path = adapter.with_name("theirs.pth")
    torch.save(content, path)
    return path


@pytest.mark.parametrize("data", [None, {"data_dir": 3}, {"label_columns": "a"}, {"label_columns": [3]}])
def test_settings_that_no_run_can_have_written_are_left_out(data):
    assert deploy_lora._data_of_run({"config": {"data": data}}) == {}


def test_a_small_file_stays_small(adapter_for_images, tmp_path):
    """Names are two bytes each in a file; a head of as many rows, of one number each, would be a hundred megabytes."""
    content = torch.load(adapter_for_images)
    names = ["a"] * 200_000
    content["metadata"]["class_names"] = names
    content["tensors"]["heads.head.weight"] = torch.zeros(1).expand(len(names), 192)
    content["tensors"]["heads.head.bias"] = torch.zeros(1).expand(len(names))
    torch.save(content, tmp_path / "theirs.pth")
    assert (tmp_path / "theirs.pth").stat().st_size < 1_000_000
    with pytest.raises(InputError, match="its tensors are larger than the file"):
        load_finetuned(tmp_path / "theirs.pth")


# ------------------------------------------------------------------------------------ what serves without it


def an_image(kind: str, path: Path) -> Path:
    random = np.random.RandomState(0)
    if kind in ("13 bands", "chosen bands"):
        levels = random.randint(0, 9000, (20, 30, int(kind == "13 bands") * 9 + 4)).astype(np.float32)
        levels[3, 4] = np.nan  # no data
        np.save(path.with_suffix(".npy"), levels)
        return path.with_suffix(".npy")
    if kind in ("16-bit grey", "one band"):
        Image.fromarray(random.randint(0, 65536, (90, 120)).astype(np.uint16)).save(path)
    else:
        Image.fromarray(random.randint(0, 256, (90, 120, 3)).astype(np.uint8)).save(path)
    return path


OF_KIND = {
    "8-bit RGB": {},
    "16-bit grey": {},
    "larger": {},
    "13 bands": {"channels": 13, "bands": [], "scale": 1e4, "show_bands": [1], "mean": [0.4] * 13, "std": [0.2] * 13},
    "one band": {"channels": 1, "bands": [], "scale": 65535.0, "mean": [0.4], "std": [0.2]},
    "chosen bands": {"channels": 4, "bands": ["4", "0", "1", "3"], "scale": 1e4, "mean": [0.4] * 4, "std": [0.2] * 4},
    "labels": {"task": {"kind": "multilabel", "thresholds": [0.2, 0.5, 0.7]}},
    "numbers": {"task": {"kind": "regression", "mean": [3.0, 0.0, -9.0], "std": [2.0, 1.0, 0.1]}},
}


@pytest.fixture(params=OF_KIND)
def served(request, base, tmp_path) -> tuple[Path, Path]:
    """An adapter file for images and answers of each kind, and an image."""
    about = OF_KIND[request.param]
    metadata = {"class_names": list(CLASSES), "image_size": 16, "checkpoint": str(base), **about}
    if request.param == "larger":
        metadata["image_size"] = 80  # of larger ones the centre is taken
    channels = about.get("channels", 3)
    if channels != 3:
        metadata["channel_fit"] = "timm"
    size = metadata["image_size"]
    model, report = load_backbone(base, 3, image_size=size, channels=channels, channel_fit="timm")
    nn.init.normal_(model.heads.head.weight, std=0.1)
    randomize_adapters(add_lora_to_model(model, r=2, target_modules="encoder_layer_1"), std=0.1)
    LoRAManager(model).save_lora_checkpoint(tmp_path / "lora.pth", metadata | {"arch": report["arch"]})
    return tmp_path / "lora.pth", an_image(request.param, tmp_path / "image.png")


def answers_of(outputs: torch.Tensor, about: dict) -> list[float]:
    """What the page says of the outputs."""
    if about["activation"] == "softmax":
        return outputs.softmax(1)[0].tolist()
    if about["activation"] == "sigmoid":
        return outputs.sigmoid()[0].tolist()
    return (outputs * torch.tensor(about["output_std"]) + torch.tensor(about["output_mean"]))[0].tolist()


def test_a_server_answers_as_predict(served, tmp_path):
    adapter, image = served
    run("merge", adapter, "--output", tmp_path / "merged.pth")
    about = json.loads((tmp_path / "merged.json").read_text())
    model = build_backbone(about["arch"], len(about["class_names"]), about["image_size"], channels=about["channels"])
    model.load_state_dict(torch.load(tmp_path / "merged.pth"))
    with torch.no_grad():
        found = answers_of(model.eval()(preparation().prepared(image, about)), about)
    (row,) = run("predict --device cpu", adapter, image, "--output", tmp_path / "predictions.csv")
    columns = {name: name for name in about["class_names"]}
    if about["activation"] == "softmax":
        columns = {row[f"class{place}"]: f"probability{place}" for place in ("", "_2", "_3")}
    elif about["activation"] == "sigmoid":
        columns = {name: f"{name} probability" for name in about["class_names"]}
        above = torch.tensor(found) > torch.tensor(about["thresholds"])
        assert row["labels"] == ",".join(itertools.compress(about["class_names"], above))
    expected = [float(row[columns[name]]) for name in about["class_names"]]
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-4)
    assert len(set(expected)) == 3


@pytest.mark.parametrize(
    "served, normalise",
    [("13 bands", ["--normalise"]), pytest.param("numbers", [], marks=pytest.mark.slow)],
    indirect=["served"],
)
def test_a_graph_and_its_preparation_answer_as_predict(served, normalise, tmp_path):
    """For one image and for several. What is said of this file is not said of another one beside it."""
    adapter, image = served
    run("export", adapter, "--output", tmp_path / "model.pt2", *normalise)
    about = json.loads((tmp_path / "model.json").read_text())
    with pytest.raises(InputError, match=r"model\.json is there, not known to be of an earlier merge"):
        run("merge", adapter, "--output", tmp_path / "model.pth")  # whose images would be normalised twice
    run("merge", adapter, "--output", tmp_path / "merged.pth")
    merged = json.loads((tmp_path / "merged.json").read_text())
    notes = {"class_names": ""}
    graph = torch.export.load(tmp_path / "model.pt2", extra_files=notes).module()
    assert json.loads(notes["class_names"]) == list(CLASSES)
    prepared = preparation().prepared
    one = prepared(image, about)
    found = torch.cat([graph(one), graph(one.repeat(4, 1, 1, 1))])
    assert about["outputs"] == {"softmax": "logits", "none": "numbers"}[about["activation"]]
    if about["activation"] == "softmax":
        found = found.softmax(1)
    with torch.no_grad():
        expected = answers_of(load_finetuned(adapter)[0](prepared(image, merged)), merged)
    assert len(found) == 5
    for answer in found.tolist():
        assert answer == pytest.approx(expected, abs=1e-5, rel=1e-4)


def test_what_onnx_needs_is_named(adapter_for_images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match="pip install onnx onnxscript"):
        run("export", adapter_for_images, "--output", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


# ---------------------------------------- toolkit/run/commands.py: a command replaces what it wrote, and nothing else


@pytest.mark.parametrize(
    "words",
    [
        "evaluate {adapter} {images} --output r.json",
        "evaluate lora.pth {images}",
        "predict {adapter} {images}/val --output p.csv",
        "embed {adapter} {images}/val --output f.npy",
        "merge {adapter} --output m.pth",
        pytest.param("export {adapter} --output g.pt2", marks=pytest.mark.slow),
        "card {adapter} --output c.md",
    ],
)
def test_a_command_writes_the_files_that_it_says_twice(adapter_for_images, images, tmp_path, monkeypatch, words):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if "lora.pth" in words:
        shutil.copy(adapter_for_images, "lora.pth")
    words = words.format(adapter=adapter_for_images, images=images)
    said = sorted(map(str, files_written(read_options(words.split()))))
    for _ in range(2):
        run(words)
        assert sorted(set(os.listdir()) - {"lora.pth"}) == said


PAGE_OF_A_RUN = '<!doctype html>\n<meta content="moco-lora 1.0">\n<h1>run</h1>\n<table><tr><td>limited by</td>'
RESULTS_OF_A_RUN = '{\n  "task": "classification",\n  "val_accuracy": 0.9'


@pytest.mark.parametrize(
    ("words", "name", "content"),
    [
        ("evaluate lora.pth images --output r.json", "r.json", RESULTS_OF_A_RUN),
        ("evaluate lora.pth images --output r.json", "r_answers.csv", "image,class,answer\r\n"),
        ("evaluate lora.pth images --output r.json", "r.html", "mine"),
        ("evaluate lora.pth images", "lora_evaluation.html", "mine"),
        ("evaluate lora.pth images --output report.json", "report.html", PAGE_OF_A_RUN),
        ("threshold lora.pth list.csv --output new.pth", "new.pth", "weights"),
        ("predict lora.pth images --output p.csv", "p.csv", "path,label\r\n"),
        ("predict lora.pth images --output p.csv", "p.csv", "path,class\r\n"),
        ("predict lora.pth images --output p.csv", "p.csv", "path,labels\r\n"),
        ("predict lora.pth images --output p.csv", "p.csv", "path,class,probability,seen\r\n"),
        ("predict lora.pth images --output p.csv", "p.csv", "path,labels,cat probability,seen\r\n"),
        ("predict lora.pth images --output p.csv", "p.csv", "path,age\r\n"),
        ("predict lora.pth images --output map.tif", "map.tif", "II*"),
        ("embed lora.pth images --output f.npy", "f.npy", "numbers"),
        ("embed lora.pth images --output f.npy", "f_paths.csv", "path,label\r\n"),
        ("merge lora.pth --output areas.pth", "areas.json", '{"field": "areas.pth"}'),
        ("merge lora.pth --output new.pth", "new.pth", "weights"),
        ("export lora.pth --output g.pt2", "g.json", '{\n  "file": "g.onnx"'),
        ("card lora.pth --output README.md", "README.md", "# My project"),
        ("convert lora.pth --rank 2 --output mine.pth", "mine.pth", "weights"),
        ("convert lora.pth --output .", "adapter_config.json", '{\n  "peft_type": "LORA",\n  "rank_pattern": {}\n}'),
    ],
)
def test_what_no_earlier_call_wrote_is_not_replaced(tmp_path, monkeypatch, words, name, content):
    """Nor is a link, or a pipe, which is not waited for."""
    monkeypatch.chdir(tmp_path)
    read_options(words.split())
    for put in (
        lambda: Path(name).write_text(content, newline=""),
        lambda: Path(name).symlink_to("nothing"),
        lambda: os.mkfifo(name),
    ):
        put()
        with pytest.raises(InputError, match=f"^{name} is there, not known to be of an earlier {words.split()[0]}"):
            read_options(words.split())
        Path(name).unlink()


def test_where_features_find_no_room_the_earlier_ones_keep_their_paths(tmp_path, monkeypatch):
    def write(name: str) -> None:
        images = LabelledImages(ImageFiles("", [name]))
        deploy_lora._write_features(torch.ones(1, 2), images, tmp_path / "f.npy")

    calls = []
    replace = os.replace
    with monkeypatch.context() as noting:
        noting.setattr(os, "fsync", lambda _: calls.append("disk"))
        noting.setattr(os, "replace", lambda half, path: replace(half, path) or calls.append(path.name))
        write("a.png")
    assert calls == ["disk", "disk", "f_paths.csv", "disk", "f.npy"]  # nothing takes its time between both
    monkeypatch.setattr(np, "save", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(InputError, match="the previous file is intact"):
        write("b.png")
    assert [row["path"] for row in rows_of(tmp_path / "f_paths.csv")] == ["a.png"]


@pytest.mark.parametrize(
    ("words", "lacking"),
    [
        ("merge {adapter} --output m.pth", "m.json"),
        ("export {adapter} --output m.pt2", "m.json"),
        ("evaluate {adapter} {images}/val --device cpu --output r.json", "r_answers.csv"),
    ],
)
def test_no_file_takes_its_place_without_what_belongs_to_it(
    adapter_for_images, images, tmp_path, monkeypatch, words, lacking
):
    write = files.open_atomically

    def write_on_a_full_disk(path):
        if path.name == lacking:
            raise InputError("no room")
        return write(path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "open_atomically", write_on_a_full_disk)
    with pytest.raises(InputError, match="no room"):
        run(words.format(adapter=adapter_for_images, images=images))
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_labels_is_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.csv").write_text('path,labels,cat probability,"a,b probability"\r\n', newline="")
    assert read_options(["predict", "lora.pth", "images", "--output", "p.csv"]).output == Path("p.csv")


@pytest.mark.parametrize("command", ["predict", "embed", "explain"])
def test_a_folder_of_another_command_is_left_alone(adapter_for_images, images, tmp_path, monkeypatch, command):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "lockf", mock.Mock(side_effect=BlockingIOError))
    with pytest.raises(InputError, match=f"^{tmp_path}/out: another run .* is going on in it; let it end"):
        run(command, adapter_for_images, images / "val", "--device", "cpu", "--output", tmp_path / "out")
    assert not (tmp_path / "out" / "_parts.json").exists()
