"""The commands that come after training: what they print, what they write and how they end."""

import errno
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import CLASSES, fill_in, save_adapter
from dense import FP32, assert_close, randomize_adapters
from PIL import Image

import deploy_lora
import toolkit
from finetune_lora import add_lora_to_model, load_finetuned
from lora import functional
from tests.image_files import bytes_of, labelled_tar, save_image, tar_of, write
from tests.pages import preparation
from tests.run_folders import column, contents, rows_of
from toolkit import InputError, files
from toolkit.answers import choosing, measures, predictions, report_page
from toolkit.images import data, folders, sources
from toolkit.images.data import LabelledImages
from toolkit.images.folders import ImageFiles
from toolkit.models.backbones import build_backbone, headless
from toolkit.models.checkpoints import load_backbone
from toolkit.run import commands, runs, verdict
from toolkit.run.commands import files_written, read_options, writing


def run(command: str, *words):
    """What a command returns, which computes with merged weights."""
    with mock.patch.object(functional, "lora_linear", side_effect=AssertionError("not merged")):
        return deploy_lora.main([*command.split(), *map(str, words)])


def adapter_file(path: Path, base: Path, target: object = "encoder_layer_1", **about) -> Path:
    """The file of a run with adapters for three classes, which says this of itself."""
    shape = {"image_size": about.get("image_size", 16), "channels": about.get("channels", 3)}
    model, _ = load_backbone(base, 3, channel_fit="timm", **shape)
    torch.nn.init.normal_(model.heads.head.weight, std=0.1)
    randomize_adapters(add_lora_to_model(model, r=2, target_modules=target), std=0.1)
    return save_adapter(model, path, base, **about)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_tells_its_content_and_is_merged_into_one_that_serves_by_itself(base, tmp_path, capsys, suffix):
    """No control codes are printed, and the base may have moved."""
    about = {"class_names": ["a", "b", "ß"], "\x1b": 1, "config": {"finetune": {"learning_rate": 1e-4}}}
    adapter = tmp_path / f"lora{suffix}"
    adapter_file(adapter, base, ["encoder_layer_1.mlp"], checkpoint="/gone/base.pth", **about)
    run("info", adapter)
    assert capsys.readouterr().out.splitlines() == [
        f"{adapter}: 2 adapted layers, 4,419 parameters, {adapter.stat().st_size / 1e6:.2f} MB",
        "  arch: 'vit_mini'",
        "  class_names: ['a', 'b', 'ß']",
        "  image_size: 16",
        "  checkpoint: '/gone/base.pth'",
        r"  \x1b: 1",
        "  finetune: {'learning_rate': 0.0001}",
        "  encoder.layers.encoder_layer_1.mlp.0: LoRALinear, r=2, scaling=8",
        "  encoder.layers.encoder_layer_1.mlp.3: LoRALinear, r=2, scaling=8",
    ]
    output = tmp_path / f"merged{suffix}"
    assert run("merge", adapter, "--output", output, "--checkpoint", base)["class_names"] == ["a", "b", "ß"]
    assert capsys.readouterr().out == f"wrote {output}: a state_dict for torchvision's vit_mini with 3 classes\n"
    plain = build_backbone("vit_mini", 3, 16)
    plain.load_state_dict(torch.load(output) if suffix == ".pth" else safetensors.torch.load_file(output))
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(plain.eval()(images), load_finetuned(adapter, base)[0](images), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return adapter_file(tmp_path_factory.mktemp("trained") / "lora.pth", base)


def test_answers_features_and_figures_are_those_of_the_model(adapter, images, tmp_path, capsys):
    """A folder of class folders is evaluated whole; of one with a val/ that is meant."""
    single = images / "train/dark/0.png"
    output = tmp_path / "predictions.csv"
    rows = run("predict --batch-size 4 --device cpu", adapter, images / "val", single, single, "--output", output)
    assert rows == rows_of(output)
    assert f"wrote {output}: 16 images" in capsys.readouterr().out
    paths = [*map(str, sorted((images / "val").glob("*/*.png"))), str(single)]  # which is there once
    assert column(rows, "path") == paths
    model, info = load_finetuned(adapter)
    inputs = torch.stack([info["transform"](Image.open(path)) for path in paths])
    with torch.no_grad():
        features = headless(model)(inputs)
        logits = torch.cat(list(map(model, inputs.split(1))))
    for row, probabilities in zip(rows, logits.softmax(1), strict=True):
        assert list(row) == ["path", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
        assert list(row.values())[1::2] == [CLASSES[i] for i in probabilities.argsort(descending=True).tolist()]
        assert float(row["probability"]) == pytest.approx(probabilities.max().item(), abs=1e-4)

    found = run("embed --batch-size 4 --device cpu", adapter, images / "val", single, "--output", tmp_path / "f.npy")
    written = torch.from_numpy(np.load(tmp_path / "f.npy"))
    assert torch.equal(written, found) and written.dtype == torch.float32
    assert_close(written, features, FP32)
    assert column(rows_of(tmp_path / "f_paths.csv"), "path") == paths

    capsys.readouterr()
    results = run("evaluate --device cpu", adapter, images, "--output", tmp_path / "r.json")
    told = capsys.readouterr().out
    assert results == run("evaluate --device cpu", adapter, images / "val")
    assert json.loads((tmp_path / "r.json").read_text()) == results
    hits = logits[:15].argmax(1) == torch.arange(15) // 5
    assert results["images"] == 15 and results["accuracy"] == pytest.approx(hits.float().mean().item())
    assert [*results["accuracy_per_class"].values()] == pytest.approx(hits.view(3, 5).double().mean(1).tolist())
    assert results["accuracy_interval"] == pytest.approx(measures.share_interval(hits))
    assert f" of 15 images, {results['accuracy']:.2%} (95% interval" in told
    assert f"{'images':<22}15 in {images}/val\n" in told
    for page in (tmp_path / "r.html", adapter.with_name("lora_evaluation.html")):
        text = page.read_text()
        assert f"accuracy {results['accuracy']:.2%} on 15 images" in text and "By class" in text
        assert "Mistakes" in text and "Settings" not in text and "By epoch" not in text


@pytest.mark.parametrize("command", ["predict", "embed"])
def test_answers_in_parts_go_on_where_they_were_stopped(adapter, images, tmp_path, monkeypatch, command):
    """15 images in parts of 4: a stopped command and its sequel write, bit for bit, what one that runs through does."""
    monkeypatch.setattr(deploy_lora, "PART_IMAGES", 7)  # which becomes a multiple of a batch
    start = f"{command} --batch-size 4 --device cpu"

    def write(folder: str, *more: str, part: str = "val") -> list[Path]:
        return run(start, adapter, images / part, "--output", tmp_path / folder, *more)

    paths = write("whole")
    assert [path.stem for path in paths] == ["part-00000", "part-00001", "part-00002", "part-00003"]
    single = tmp_path / f"one{paths[0].suffix}"
    run(start, adapter, images / "val", "--output", single)
    read = {"predict": lambda path: column(rows_of(path), "probability"), "embed": np.load}[command]
    found = np.concatenate(list(map(read, paths))).astype(float)
    np.testing.assert_allclose(found, np.float64(read(single)), rtol=1e-5, atol=1e-6)

    written_by = {"predict": (predictions, "write_table"), "embed": (deploy_lora, "_write_features")}[command]
    stopping = mock.Mock(wraps=getattr(*written_by), side_effect=[mock.DEFAULT, mock.DEFAULT, KeyboardInterrupt])
    with mock.patch.object(*written_by, stopping), pytest.raises(KeyboardInterrupt):
        write("stopped")
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped").glob(f"part-?????{paths[0].suffix}")}
    for folder in ("stopped", "whole"):  # it was killed between both files of a part; for predict it is any file
        (tmp_path / folder / "part-00002_paths.csv").touch()
    write("stopped", "--resume")
    assert len(finished) == 2 and {path: path.stat().st_mtime_ns for path in finished} == finished  # nothing twice
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    with pytest.raises(InputError, match="whole: its answers were made with other images; name another folder"):
        write("whole", "--resume", part="train")
    with pytest.raises(InputError, match="whole: its answers were made with other --precision; name another folder"):
        write("whole", "--resume", "--precision", "bf16")
    write("whole", "--resume", "--precision", "fp32")  # which is what a CPU computes in


@pytest.fixture
def plain(images, tmp_path) -> Path:
    """A list of the 15 evaluation images."""
    rows = [f"{path},{path.parent.name}" for path in sorted((images / "val").glob("*/*.png"))]
    return write(tmp_path / "plain.csv", "\n".join(rows))


def test_lists_and_archives_are_answered_and_evaluated_as_folders_are(adapter_for_images, images, plain, tmp_path):
    """Lists relative to the run's images too; archives themselves, and in the val/ beside a train/; and of classes that
    the adapter lacks they are refused."""
    trained = with_settings(adapter_for_images, {"dataset": "imagefolder", "data_dir": str(images)})
    paths = sorted((images / "val").glob("*/*.png"))
    rows = [f"{path.relative_to(images)},{path.parent.name}" for path in paths]
    relative = write(tmp_path / "list.csv", "\n".join(rows))
    mine = tmp_path / "mine"
    for name, of in (("val/0.tar", paths[:8]), ("val/1.tar", paths[8:]), ("train/0.tar", paths[:8])):
        write(mine / name, labelled_tar(of))
    found = []
    for source, labelled in ((images / "val", images), (plain, plain), (relative, relative), (mine / "val", mine)):
        rows = run("predict --device cpu", trained, source, "--output", tmp_path / "p.csv")
        results = run("evaluate --device cpu", trained, labelled)
        found.append((column(rows, "probability"), results["accuracy"], results["images"]))
        assert rows[8]["path"] == (f"{mine}/val/1.tar/0.png" if labelled == mine else str(paths[8]))
    assert found[0] == found[1] == found[2] == found[3] and found[0][2] == 15
    (mine / "val/1.tar").write_bytes(tar_of({"a.png": b"", "a.cls": b"eel"}))
    with pytest.raises(InputError, match=r"mine/val has classes that the adapter lacks: eel"):
        run("evaluate --device cpu", trained, mine / "val")


def test_a_list_is_evaluated_over_the_groups_of_the_run(adapter_for_images, images, plain, tmp_path, capsys):
    rows = [f"{row},patient {i % 5}" for i, row in enumerate(plain.read_text().splitlines())]
    table = write(tmp_path / "test.csv", "\n".join(["path,label,who", *rows]))
    expected = run("evaluate --device cpu", adapter_for_images, images / "val")
    in_groups = "in {} groups; intervals are over groups".format
    # Levels of the folder of a run are none of absolute paths, as `choose` writes them: all would be one group.
    for of_run, path, groups in (
        ({"data_list": [str(table)], "group_by": "who"}, table, in_groups(5)),
        ({"data_list": [str(table)], "group_by": "who"}, plain, "without groups by who"),
        ({"data_dir": str(images), "group_by": "1"}, plain, "without groups by 1"),
        ({"data_list": [str(plain)], "group_by": "1"}, plain, in_groups(1)),
        ({"group_by": "9" * 5000}, images / "val", f"without groups by {'9' * 120}"),  # which nothing can count
    ):
        found = run("evaluate --device cpu", with_settings(adapter_for_images, of_run), path)
        assert f" 15 in {path}, {groups}\n" in capsys.readouterr().out
        assert (found["accuracy_interval"] == expected["accuracy_interval"]) == groups.startswith("without")


def with_settings(adapter: Path, data: object) -> Path:
    """A copy of the file in which the run's settings have this section `data`."""
    content = torch.load(adapter)
    content["metadata"]["config"] = {"data": data}
    path = adapter.with_name("theirs.pth")
    torch.save(content, path)
    return path


def test_the_columns_of_a_run_are_its_labels_whatever_range_named_them():
    for task, names in (({"kind": "multilabel", "thresholds": [0.5, 0.5]}, ["up", "left"]), (None, ["up..left"])):
        about = {"config": {"data": {"label_columns": ["up..left"]}}, "task": task, "class_names": ["up", "left"]}
        assert deploy_lora._data_of_run(about) == {"label_columns": names}
    for damaged in (None, {"data_dir": 3}, {"label_columns": "a"}, {"label_columns": [3]}):  # no run has written it
        assert deploy_lora._data_of_run({"config": {"data": damaged}}) == {}


SCALED = {"bands": [], "scale": 1e4, "channel_fit": "timm"}
LABELS = {"kind": "multilabel", "thresholds": [0.2, 0.5, 0.7]}
NUMBERS = {"kind": "regression", "mean": [3.0, 0.0, -9.0], "std": [2.0, 1.0, 0.1]}
OF_KIND = {
    "8-bit RGB": {},
    "16-bit grey": {"image_size": 80, "task": LABELS},  # of a larger one the centre is taken
    "13 bands": SCALED | {"channels": 13, "show_bands": [1], "mean": [0.4] * 13, "std": [0.2] * 13},
    "one band": SCALED | {"channels": 1, "scale": 65535.0, "mean": [0.4], "std": [0.2], "task": NUMBERS},
    "chosen bands": SCALED | {"channels": 4, "bands": ["4", "0", "1", "3"], "mean": [0.4] * 4, "std": [0.2] * 4},
}


@pytest.fixture(params=OF_KIND)
def served(request, base, tmp_path) -> tuple[Path, Path]:
    """An adapter file for images and answers of each kind, and an image."""
    kind = request.param
    about = OF_KIND[kind]
    random = np.random.RandomState(0)
    name = "image.png"
    if "bands" in kind:
        name = "image.npy"
        levels = random.randint(0, 9000, (20, 30, about["channels"])).astype(np.float32)
        levels[3, 4] = np.nan  # no data
    elif kind == "8-bit RGB":
        levels = random.randint(0, 256, (90, 120, 3)).astype(np.uint8)
    else:
        levels = random.randint(0, 65536, (90, 120)).astype(np.uint16)
    return adapter_file(tmp_path / "lora.pth", base, **about), save_image(tmp_path / name, levels)


def answers_of(outputs: torch.Tensor, about: dict) -> torch.Tensor:
    """What the page says of the outputs."""
    if about["activation"] == "none":
        return outputs * torch.tensor(about.get("output_std", 1.0)) + torch.tensor(about.get("output_mean", 0.0))
    return outputs.softmax(1) if about["activation"] == "softmax" else outputs.sigmoid()


def predicted(adapter: Path, image: Path) -> tuple[torch.Tensor, dict[str, str]]:
    """A probability for each class or label, or the numbers, (1, 3); and the row of the table that says so."""
    [row] = run("predict --device cpu", adapter, image, "--output", adapter.with_name("predictions.csv"))
    found = {row.get(f"class{place}"): row.get(f"probability{place}") for place in ("", "_2", "_3")}
    found |= {title.removesuffix(" probability"): cell for title, cell in row.items()}
    assert len({found[name] for name in CLASSES}) == 3
    return torch.tensor([[float(found[name]) for name in CLASSES]]), row


@torch.no_grad()
def test_a_server_answers_as_predict(served, tmp_path):
    adapter, image = served
    run("merge", adapter, "--output", tmp_path / "merged.pth")
    about = json.loads((tmp_path / "merged.json").read_text())
    model = build_backbone(about["arch"], len(about["class_names"]), about["image_size"], channels=about["channels"])
    model.load_state_dict(torch.load(tmp_path / "merged.pth"))
    found = answers_of(model.eval()(preparation().prepared(image, about)), about)
    expected, row = predicted(adapter, image)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if about["activation"] == "sigmoid":
        above = found[0] > torch.tensor(about["thresholds"])
        assert row["labels"] == ",".join(itertools.compress(about["class_names"], above))


@pytest.mark.parametrize(
    ("served", "outputs", "normalise"),
    [("13 bands", "logits", ["--normalise"]), pytest.param("one band", "numbers", [], marks=pytest.mark.slow)],
    indirect=["served"],
)
def test_a_graph_and_its_preparation_answer_as_predict(served, outputs, normalise, tmp_path):
    """For one image and for several. What is said of this file is not said of another one beside it."""
    adapter, image = served
    run("export", adapter, "--output", tmp_path / "model.pt2", *normalise)
    about = json.loads((tmp_path / "model.json").read_text())
    with pytest.raises(InputError, match=r"model\.json is there, not known to be of an earlier merge"):
        run("merge", adapter, "--output", tmp_path / "model.pth")  # whose images would be normalised twice
    notes = {"class_names": ""}
    graph = torch.export.load(tmp_path / "model.pt2", extra_files=notes).module()
    assert json.loads(notes["class_names"]) == list(CLASSES) and about["outputs"] == outputs
    expected, _ = predicted(adapter, image)
    for count in (1, 4):
        found = answers_of(graph(preparation().prepared(image, about).repeat(count, 1, 1, 1)), about)
        torch.testing.assert_close(found, expected.repeat(count, 1), atol=1e-4, rtol=1e-4)


def test_a_missing_package_is_named_at_once(adapter_for_images, tmp_path, monkeypatch):
    monkeypatch.setattr(deploy_lora, "load_finetuned", None)
    for missing in ("onnxscript", "gradio"):
        monkeypatch.setitem(sys.modules, missing, None)
    for words, told in (
        (f"export {adapter_for_images} --output {tmp_path}/model.onnx", "pip install onnx onnxscript"),
        (f"demo {adapter_for_images}", "demo needs gradio .*: pip install gradio"),
    ):
        with pytest.raises(InputError, match=told):
            run(words)


@pytest.mark.parametrize(
    ("words", "belonging"),
    [
        ("evaluate {adapter} {images} --output r.json", "r_answers.csv"),
        ("predict {adapter} {images}/val --output p.csv", "p.csv"),
        ("embed {adapter} {images}/val --output f.npy", "f_paths.csv"),
        ("merge {adapter} --output m.pth", "m.json"),
        pytest.param("export {adapter} --output g.pt2", "g.json", marks=pytest.mark.slow),
        ("card {adapter} --output c.md", "c.md"),
    ],
)
def test_a_command_writes_all_it_says_or_nothing(adapter_for_images, images, tmp_path, monkeypatch, words, belonging):
    """Where a part finds no room nothing; all of it again, but not over what was changed."""
    write = files.open_atomically

    def write_on_a_full_disk(path):
        if path.name == belonging:
            raise InputError("no room")
        return write(path)

    monkeypatch.chdir(tmp_path)
    words = words.format(adapter=adapter_for_images, images=images)
    said = sorted(map(str, files_written(read_options(words.split()))))
    with mock.patch.object(files, "open_atomically", write_on_a_full_disk), pytest.raises(InputError, match="no room"):
        run(words)
    assert os.listdir() == []
    for _ in range(2):
        run(words)
        assert sorted(os.listdir()) == said
    for name in said:
        content = Path(name).read_bytes()
        Path(name).write_bytes(content[:-1] + b"x")
        with pytest.raises(InputError, match=f"^{name} is there, not known to be of an earlier .*--output$"):
            read_options(words.split())
        Path(name).write_bytes(content)
    toolkit.WRITTEN.write_bytes(toolkit.WRITTEN.read_bytes() + b"\xff\n")  # it is damaged
    read_options(words.split())
    monkeypatch.setattr(toolkit, "WRITTEN", tmp_path / "gone")
    with pytest.raises(InputError, match=r"--output; \S+/gone would tell, .*: set XDG_CACHE_HOME to a folder"):
        read_options(words.split())


def test_what_no_earlier_call_wrote_is_not_replaced(tmp_path, monkeypatch):
    """Nor is a link, or a pipe, which is not waited for."""
    monkeypatch.chdir(tmp_path)
    for words, name, put in (
        ("evaluate lora.pth images", "lora_evaluation.html", os.mkfifo),
        ("threshold lora.pth list.csv --output new.pth", "new.pth", lambda path: path.symlink_to("nothing")),
        ("predict lora.pth images --output map.tif", "map.tif", Path.touch),
        ("predict lora.pth . --output p.csv", "p.csv", Path.touch),  # a table among the images is no image
        ("convert lora.pth --output .", "adapter_config.json", Path.touch),
        ("choose lora.pth images --output .", "to_label.csv", Path.touch),
    ):
        read_options(words.split())
        put(Path(name))
        with pytest.raises(InputError, match=f"^{name} is there, not known to be of an earlier {words.split()[0]}"):
            read_options(words.split())


def test_what_comes_to_be_there_while_a_command_computes_stays(adapter_for_images, images, tmp_path, monkeypatch):
    def meanwhile(*given, **options):
        Path(taken).mkdir()
        return progress_bar(*given, **options)

    monkeypatch.chdir(tmp_path)
    progress_bar = runs.progress_bar
    monkeypatch.setattr(runs, "progress_bar", meanwhile)
    for command, output, taken in (("embed", "f.npy", "f.npy"), ("explain", "out", "out/0.png")):
        with pytest.raises(InputError, match=f"^{taken} came there meanwhile and stays: the result is in {taken}-1$"):
            run(command, adapter_for_images, images / "val/dark", "--output", output)
        assert Path(taken).is_dir() and Path(f"{taken}-1").stat().st_size > 100


def test_of_two_commands_with_one_output_the_second_is_refused_and_what_a_killed_one_left_is_removed(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    args = read_options(["merge", "lora.pth", "--output", str(tmp_path / "[m].pth")])
    for name in (".[m].pth.12.half", ".[m].json.12.half", ".m.pth.12.half"):
        (tmp_path / name).touch()
    with writing(args):
        assert set(os.listdir(tmp_path)) == {".m.pth.12.half", ".moco-lora-runs-[m]"}  # the last may be another's
        with (
            mock.patch.object(fcntl, "lockf", side_effect=BlockingIOError),
            pytest.raises(InputError, match="another run or command"),
            writing(args),
        ):
            pass
        for path in files_written(args):
            path.write_text("by this command")
    with writing(args):
        pass
    with pytest.raises(InputError, match=r"\[m\]\.json is there, not known"):  # it tells of the other file
        read_options(["merge", "lora.pth", "--output", str(tmp_path / "[m].safetensors")])
    (tmp_path / "[m].pth").rename(tmp_path / "best.pth")  # of which [m].json tells
    with pytest.raises(InputError, match=r"\[m\]\.json is there, not known to be of an earlier merge that is still"):
        read_options(["merge", "lora.pth", "--output", str(tmp_path / "[m].pth")])


def test_where_features_find_no_room_the_earlier_ones_keep_their_paths(tmp_path, monkeypatch):
    def write(name: str) -> None:
        deploy_lora._write_features(torch.ones(1, 2), LabelledImages(ImageFiles("", [name])), tmp_path / "f.npy")

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
    assert column(rows_of(tmp_path / "f_paths.csv"), "path") == ["a.png"]


# ------------------------------------------------------ choose: which images to label next, and which labels to look at


def blob(axis: int, *spread: float) -> torch.Tensor:
    """Features of an image for each number, which says how far it is from the middle of its kind."""
    features = torch.zeros(len(spread), 8)
    features[:, axis] = 10
    features[:, axis + 4] = torch.tensor(spread)
    return features


# Three kinds of images, at 0 to 4, 5 to 7, and 8. The middle ones are 2, 6 and 8.
KINDS = torch.cat([blob(0, -2, -1, 0, 1, 2), blob(1, -1, 0, 1), blob(2, 0)])


def test_the_most_typical_image_of_each_kind_comes_first_and_a_kind_with_a_label_has_its_turn_later(monkeypatch):
    assert choosing.most_typical(KINDS, 3, torch.zeros(0, 8)) == [2, 6, 8]  # the largest kind before the others
    both_ways = 9 + torch.tensor([1.0, 1, 9, -1, -1, -9])[:, None] * torch.tensor([1.0, 0])  # from the mean, 9
    assert sorted(choosing.most_typical(both_ways, 2, torch.zeros(0, 2))) == [0, 3]
    assert choosing.most_typical(KINDS, 2, KINDS[:1]) == [6, 8]
    alike = torch.cat([blob(0, *[0.0] * 5), blob(1, 0, 0, 0), blob(2, 0, 0)])
    assert choosing.most_typical(alike, 3, alike[:1]) == [5, 8, 0]  # then the largest one's again
    drawn = torch.randn(40, 8)
    assert choosing.most_typical(drawn, 6, drawn[:0]) == choosing.most_typical(drawn, 6, drawn[:0])
    # Or the one of each kind that is least sure: of three classes.
    leads = torch.tensor([0.5, 0.4, 0.1, 0.3, 0.9, 0.8, 0.05, 0.2, 0.0])
    third = torch.where(leads == 0.2, 0.26, 0.05)  # of two in three an answer is as likely, and surer
    logits = torch.stack([third, (1 - third + leads) / 2, (1 - third - leads) / 2], 1).log()
    monkeypatch.setattr(choosing, "CANDIDATES", 3)  # all of them
    assert choosing.least_sure(KINDS, 3, logits) == [8, 6, 2]
    monkeypatch.setattr(choosing, "CANDIDATES", 1)
    assert choosing.least_sure(KINDS, 2, logits) == [8, 6]


def test_fifty_pictures_are_less_than_a_megabyte_whatever_is_on_them():
    noise = np.random.RandomState(0).randint(0, 256, (300, 3000, 3), np.uint8)
    images = data.LabelledImages([Image.fromarray(picture) for picture in (noise[:, :500], noise[:60])] * 25)
    page = report_page.html_pictures(images, [(i, f"<{i}>") for i in range(50)])
    assert page.count("<img ") == 50 and "&lt;49&gt;</figcaption>" in page
    assert len(page) < 1e6


def test_an_address_stays_one_in_the_list_to_label(tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "html_pictures", lambda *_: "")
    choosing.write_chosen(data.LabelledImages(folders.ImageFiles("https://host", ["a.png"])), tmp_path)
    assert (tmp_path / "to_label.csv").read_text().splitlines() == ["path,label", "https://host/a.png,"]


def choose(model: Path, *words: str | Path) -> list[str]:
    return deploy_lora.main(["choose", str(model), *map(str, words)])


def test_a_backbone_chooses_an_image_of_each_class_and_the_list_trains(base, images, tmp_path, capsys, monkeypatch):
    """The names of the folders, those of the classes, are not looked at."""
    shutil.copytree(images / "train", tmp_path / "pool")
    monkeypatch.chdir(tmp_path)  # relative paths are of another folder than the list's
    chosen = choose(base, "pool", "--count", "3", "--output", "first")
    assert chosen == choose(base, "pool", "--count", "3", "--output", "again")
    assert sorted(Path(name).parent.name for name in chosen) == sorted(CLASSES)
    assert "wrote first: 3 images to label, the most typical first\n" in capsys.readouterr().out
    captions = re.findall(r"<figcaption>(\d\. \S+)</figcaption>", Path("first/to_label.html").read_text())
    assert captions == [f"{i}. {Path(name).name}" for i, name in enumerate(chosen, 1)]
    lists = [Path("first/to_label.csv"), Path("second/to_label.csv")]
    fill_in(lists[0])
    more = choose(base, "pool", "--labelled", lists[0], "--count", "6", "--output", "second")
    assert len({*chosen, *more}) == 9
    fill_in(lists[1])
    splits = sources.load_splits("imagefolder", data_list=lists)
    assert splits.class_names == sorted(CLASSES)
    assert list(map(splits.train.name, range(3))) == [str(tmp_path / name) for name in chosen]


def test_a_checkpoint_chooses_among_images_of_any_numbers(base, adapter_for_images, tmp_path, monkeypatch):
    """The options say as in a run which bands are read, what their numbers mean, and how many heads a ViT has."""
    rng = np.random.RandomState(0)
    for i in range(3):
        pixels = rng.rand(16, 16, 5).astype(np.float32) * 3000
        picked = (pixels[..., [4, 0, 1]] / 1000 - [1, 2, 3]) / [0.5, 1, 2]
        write(tmp_path / f"raw/{i}.npy", bytes_of(np.save, pixels))
        write(tmp_path / f"ready/{i}.npy", bytes_of(np.save, picked.astype(np.float32)))
    looked_at = mock.Mock(return_value=np.arange(3))
    monkeypatch.setattr(choosing, "most_typical", looked_at)
    for number, words in enumerate((
        "raw --bands 5,1,2 --scale 1000 --mean 1 2 3 --std 0.5 1 2",
        "ready --scale 1 --mean 0 --std 1",
        "ready --scale 1 --mean 0 --std 1 --heads 6",
        "raw --channels 5 --normalise data",
    )):  # fmt: skip
        folder, *options = words.split()
        choose(base, tmp_path / folder, *options, "--output", tmp_path / str(number))
    raw, ready, other, _ = (call.args[0] for call in looked_at.call_args_list)
    assert torch.allclose(raw, ready, atol=1e-5) and not torch.allclose(raw, other, atol=1e-2)
    with pytest.raises(InputError, match="--bands x: give numbers from 1"):
        choose(base, tmp_path / "raw", "--bands", "x", "--output", tmp_path / "none")
    refused = f"^--heads, --bands: for a checkpoint, and {adapter_for_images} has its own; drop it"
    with pytest.raises(InputError, match=refused):
        choose(adapter_for_images, tmp_path / "raw", "--heads=3", "--bands=1", "--output", tmp_path / "none")


def test_an_adapter_chooses_what_it_is_least_sure_of(adapter_for_images, images, tmp_path, monkeypatch, capsys):
    """With few labels the most typical: it does not know then what it is unsure of."""
    monkeypatch.setattr(choosing, "CANDIDATES", 1)
    chosen = choose(adapter_for_images, images / "train", "--count", "4", "--output", tmp_path / "out")
    assert "4 images to label, the adapter is least sure of them" in capsys.readouterr().out
    model, about = load_finetuned(adapter_for_images)
    leads = {}
    for path in (images / "train").rglob("*.png"):
        with torch.no_grad(), Image.open(path) as image:
            first, second = model(about["transform"](image)[None]).softmax(1).topk(2).values[0].tolist()
        leads[str(path)] = first - second
    assert chosen == sorted(leads, key=leads.get)[:4]
    known = tmp_path / "known"
    for labelled, how in ((4, "the most typical"), (5, "the adapter is least sure")):
        for name, i in itertools.product(CLASSES, range(labelled)):
            write(known / name / f"other{i}.png", (images / "train" / name / f"{i}.png").read_bytes())
        output = tmp_path / how
        rest = choose(adapter_for_images, images / "train", "--labelled", known, "--count=6", "--output", output)
        assert f"6 images to label, {how}" in capsys.readouterr().out
        assert all(int(Path(name).stem) >= labelled for name in rest)  # a copy is known by its content
    tars = [write(tmp_path / f"{name}/0.tar", labelled_tar([*(known / name).iterdir()])).parent for name in CLASSES]
    left = choose(adapter_for_images, images / "train", "--labelled", *tars, "--output", tmp_path / "left")
    assert sorted(left) == sorted(rest)


def test_only_choose_does_not_offer_to_read_archives():
    _, parsers = commands.make_parser()
    assert [name for name in commands.ANSWERING if "archives" not in parsers[name].format_help()] == ["choose"]


def test_of_many_images_some_are_looked_at(base, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choosing, "MOST_IMAGES", 7)
    assert len(choose(base, images / "train", "--count", "2", "--output", tmp_path / "some")) == 2
    assert "21 images: 7 of them, drawn at random, are looked at" in capsys.readouterr().out
    labelled = [images / "train" / name for name in CLASSES[1:]]  # 7 and 7
    with mock.patch.object(deploy_lora, "_answered", wraps=deploy_lora._answered) as read:
        choose(base, images / "train", "--labelled", *labelled, "--output", tmp_path / "one")
    assert [len(call.args[1]) for call in read.call_args_list] == [7, 3, 3]
    (tmp_path / "broken.png").write_bytes(b"no image")
    pool = images / "train", tmp_path / "broken.png"
    assert len(choose(base, *pool, "--output", tmp_path / "all")) == 21  # that can be read


def test_the_next_command_of_a_run_chooses_what_has_no_label_again_and_again(finetune, images, tmp_path, monkeypatch):
    """Beside the images that train: some of these, and others. A list that was filled in stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verdict, "_compared", lambda *_: ("", False, True))
    mine = shutil.copytree(images, tmp_path / "mine")
    beside = shutil.copytree(images, mine / "unlabelled")
    others = [beside / "train" / name / "0.png" for name in CLASSES]
    for place in others:
        (mine / place.relative_to(beside)).unlink()
    for extra, pool in (("", beside), ("--resume", beside), (f"--unlabelled {beside}/train", beside / "train")):
        next_step = finetune(f"--data-dir {mine} --epochs 1 {extra}")["verdict"]["next_step"]
        [words] = map(str.split, re.findall(r"deploy_lora\.py (choose [^;]*)", next_step))
        assert sorted(map(Path, deploy_lora.main([*words, "--count=3"]))) == sorted(others)
        assert words[2:4] == [str(pool), "--output"]
        fill_in(Path(words[4], "to_label.csv"))
    tars = write(tmp_path / "tars/0.tar", labelled_tar(others)).parent  # of which it does not choose
    assert " new_images " in finetune(f"--data-dir {mine} --epochs 1 --unlabelled {tars}")["verdict"]["next_step"]


def test_a_run_lists_the_training_images_whose_label_seems_wrong_worst_first(finetune, images, tmp_path, capsys):
    """One of the dark images lies among the bright ones; a resumed run knows of it as well."""
    mixed = shutil.copytree(images, tmp_path / "mixed")
    shutil.copy(images / "val/dark/0.png", mixed / "train/bright/wrong.png")
    options = f"--data-dir {mixed} --epochs 1"
    folder = finetune(options)["folder"]
    rows = rows_of(folder / "labels_to_check.csv")
    told = f"labels_to_check.csv ({len(rows)} training images that the probe answers otherwise),"
    assert told in capsys.readouterr().out
    assert rows[0] == rows[0] | {"path": str(mixed / "train/bright/wrong.png"), "label": "bright", "answer": "dark"}
    times = [float(row["times"]) for row in rows]
    assert times == sorted(times, reverse=True) and times[-1] > 1
    page = (folder / "report.html").read_text()
    assert "Labels to look at" in page and "bright, and not dark?" in page
    (folder / "labels_to_check.csv").unlink()
    finetune(f"{options} --resume")
    assert rows_of(folder / "labels_to_check.csv") == rows
    # Of one image of each class none is held out: an empty list would say that all labels are right.
    folder = finetune(f"{options} --labels-per-class 1", "other")["folder"]
    assert not (folder / "labels_to_check.csv").exists()
    assert "Labels to look at" not in (folder / "report.html").read_text()
    # Two views of five images: one is right, one a little wrong, one very, one not held out, and the last a draw.
    view = torch.tensor([[5.0, 1, 0], [2, 1, 0], [0, 1, 5], [torch.nan] * 3, [1, 1, 0]])
    other = view + torch.tensor([0, 0, 2.0]) * (torch.arange(5) == 2)[:, None]
    found = choosing.contradicted(torch.cat([view, other]), torch.tensor([0, 1, 1, 0, 0]))
    assert found == [(2, 2, pytest.approx(np.exp(5))), (1, 0, pytest.approx(np.exp(1)))]
