"""The page on which an image is dropped: it says what `predict` and `explain` say, without gradio and by it."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import deploy_lora
from finetune_lora import load_base
from tests.conftest import CLASSES, save_adapter
from tests.image_files import save_image, write
from toolkit import SHIPPED, InputError
from toolkit.answers import demo, report_page
from toolkit.images.masks import palette

pytestmark = pytest.mark.usefixtures("whole_vit_mini")
TASKS = {
    "classes": {},
    "labels": {"task": {"kind": "multilabel", "thresholds": [0.2, 0.5, 0.7]}},
    "numbers": {"task": {"kind": "regression", "mean": [3.0, 0.0, -9.0], "std": [2.0, 1.0, 0.1]}},
    "masks": {"task": {"kind": "segmentation", "values": [0, 1, 2]}},
}


@pytest.fixture(params=TASKS)
def adapter(request, tmp_path) -> Path:
    """An adapter file of each task, which has a head alone."""
    is_masks = request.param == "masks"
    model, _ = load_base(SHIPPED, None, len(CLASSES), per_pixel=is_masks)
    head = model.head.linear if is_masks else model.heads.head
    torch.nn.init.normal_(head.weight, std=0.5)
    return save_adapter(model, tmp_path / "lora.pth", SHIPPED, image_size=32, **TASKS[request.param])


@pytest.fixture
def image(tmp_path) -> Path:
    levels = np.random.RandomState(0).randint(0, 256, (60, 80, 3)).astype(np.uint8)
    levels[:, 40:] //= 4
    return save_image(tmp_path / "dropped.png", levels)


@pytest.fixture
def gradio() -> mock.MagicMock:
    """Stands in for it, with what the page is made of."""
    gradio = mock.MagicMock(spec=["Interface", "File", "Dropdown", "HTML", "Gallery", "Error"], Error=RuntimeError)
    gradio.Interface.return_value.launch.return_value = None, "http://127.0.0.1:7860/", None
    return gradio


@pytest.fixture
def drop(adapter, gradio, monkeypatch):
    """drop((path, of), ...) drops files on the page of the adapter; what it answers, and its pictures."""

    def drop(*files: tuple) -> list:
        monkeypatch.setitem(sys.modules, "gradio", gradio)
        deploy_lora.main(["demo", str(adapter), "--device", "cpu", "--batch-size", "2"])
        answer, _, _ = gradio.Interface.call_args.args
        answers = []
        for given in files:
            said, pictures = answer(*given)
            answers.append([said, *pictures])
        return answers

    return drop


@pytest.mark.parametrize("adapter", ["classes", "labels", "numbers"], indirect=True)
def test_the_page_says_what_predict_says_and_shows_what_explain_shows(adapter, image, drop, tmp_path):
    [said, (picture, _), (heat, _)], [_, _, (of_dark, _)] = drop((str(image), None), (str(image), 1))
    argv = ["predict", str(adapter), str(image), "--device", "cpu", "--output", str(tmp_path / "answers.csv")]
    options = deploy_lora.read_options(argv)
    [row] = deploy_lora.main(argv)
    _, *rows = row.items()
    if "class" in row:
        rows = zip(list(row.values())[1::2], list(row.values())[2::2], strict=True)
    assert said == report_page.html_table(list(rows))
    assert picture.shape == heat.shape == (32, 32, 3) and picture.dtype == heat.dtype == np.uint8
    assert picture[:, :14].mean() > 2 * picture[:, 18:].mean()  # the left half is the bright one
    with deploy_lora._deployed(options) as deployed:
        _, expected, _ = deployed.explainer().explain(Image.open(image), 1)
    assert abs(of_dark - 255 * expected).max() <= 0.5 and (of_dark != heat).any()


@pytest.mark.parametrize("adapter", ["masks"], indirect=True)
def test_a_mask_lies_over_the_whole_image(adapter, image, drop, tmp_path):
    """Of a large one over some of its pixels."""
    high = save_image(tmp_path / "high.png", Image.new("RGB", (32, 2001)))
    dropped = [(str(image), of) for of in (None, 0, 1, 2)]
    [said, (picture, _), (heat, _)], *others, [_, (some, _), _] = drop(*dropped, (str(high), None))
    assert some.shape == (667, 11, 3)
    deploy_lora.main(["predict", str(adapter), str(image), "--device", "cpu", "--output", str(tmp_path / "masks")])
    mask = np.asarray(Image.open(tmp_path / "masks/dropped.png"))
    over = 0.4 * np.asarray(Image.open(image)) + 0.6 * 255 * palette(3)[mask]
    assert picture.shape == (60, 80, 3) and abs(picture - over).max() <= 0.5
    shares = np.bincount(mask.flatten(), minlength=3) / mask.size
    for name, colour, share in zip(CLASSES, np.round(255 * palette(3)).astype(int).tolist(), shares, strict=True):
        row = f'<td style="border-left: 1em solid rgb{tuple(colour)}">{name}</td><td>{share:.1%} of the pixels</td>'
        assert row in said
    heats = [of_class for _, _, (of_class, _) in others]
    assert heat.shape == (32, 32, 3) and (heats[0] != heats[1]).any()
    assert (heat == heats[np.argmax(shares)]).all()


@pytest.mark.parametrize("adapter", ["classes"], indirect=True)
def test_the_page_is_on_this_machine_alone_and_keeps_nothing(drop, gradio, monkeypatch, capsys):
    monkeypatch.setenv("GRADIO_SHARE", "true")
    drop()
    settings = gradio.Interface.call_args.kwargs
    launch = gradio.Interface.return_value.launch
    assert launch.call_args.kwargs["server_name"] == "127.0.0.1" and launch.call_args.kwargs["share"] is False
    assert settings["delete_cache"] and settings["analytics_enabled"] is False
    assert "drop an image on http://127.0.0.1:7860/ in your browser; Ctrl-C stops" in capsys.readouterr().out
    monkeypatch.setenv("SPACE_ID", "owner/name")
    drop()
    assert launch.call_args.kwargs.keys() == {"quiet", "prevent_thread_lock"}


@pytest.mark.parametrize("adapter", ["classes", "masks"], indirect=True)
def test_what_is_no_image_is_one_line_without_the_server_s_folders(image, drop, tmp_path):
    """A list is not read: it could name any file of the server."""
    (tmp_path / "list.csv").write_text("dropped.png\n")
    assert drop((None, None)) == [[""]]
    with pytest.raises(RuntimeError, match=r"^list\.csv: not a readable image"):
        drop((str(tmp_path / "list.csv"), None))


@pytest.fixture
def space(adapter, tmp_path, monkeypatch, capsys) -> Path:
    """A Space of the adapter, which lies elsewhere by now; nothing was started."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    deploy_lora.main(["demo", str(adapter), "--write", str(tmp_path / "space"), "--precision", "bf16"])
    assert f"hf upload OWNER/NAME {tmp_path}/space --repo-type space" in capsys.readouterr().out
    return shutil.move(tmp_path / "space", tmp_path / "elsewhere")


@pytest.mark.parametrize("adapter", ["numbers"], indirect=True)
def test_a_space_has_what_the_hub_reads(space, tmp_path):
    _, head, text = (space / "README.md").read_text().split("---\n")
    head = yaml.safe_load(head)
    assert (head["sdk"], head["app_file"], head["title"]) == ("gradio", "app.py", tmp_path.name)
    assert "`lora.pth` answers: bright, dark, striped." in text
    requirements = (space / "requirements.txt").read_text().split()
    assert "gradio>=6" in requirements and "torch>=2.6" in requirements and "timm>=1.0" not in requirements
    assert {"lora.pth", SHIPPED.name, "app.py", "LICENSE"} < {path.name for path in space.iterdir()}
    words = "'--batch-size', '32', '--device', 'auto', '--precision', 'bf16', '--arithmetic', 'float', "
    assert words in (space / "app.py").read_text()
    assert not list(space.rglob("__pycache__"))


def test_a_space_brings_the_stage_1_adapter_and_downloads_what_timm_has(tmp_path, monkeypatch):
    """Of a base that is called as its adapter one would replace the other. A full disk is one line."""
    adapter, stage1, base = (tmp_path / name for name in ("lora.pth", "moco_lora.pth", "theirs/lora.pth"))
    for path in (adapter, stage1, base):
        write(path, path.name)
    space = tmp_path / "space"
    about = {"arch": "timm:tf_efficientnet_lite0", "class_names": list(CLASSES)}
    with pytest.raises(InputError, match=rf"{adapter}, {base}: in a Space two of them would have one name; rename one"):
        demo.write_space(space, adapter, base, None, about, [])
    assert not space.exists()
    demo.write_space(space, adapter, Path("timm:tf_efficientnet_lite0.in1k"), stage1, about, ["--device", "cpu"])
    assert (space / "moco_lora.pth").read_text() == "moco_lora.pth"
    assert "timm>=1.0" in (space / "requirements.txt").read_text().split()
    assert "deploy_lora.main(['demo', 'lora.pth', '--device', 'cpu'])" in (space / "app.py").read_text()
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(demo.shutil, "copyfileobj", mock.Mock(side_effect=full))
    with pytest.raises(InputError, match=r"cannot write .*: No space left on device; check the folder and its free"):
        demo.write_space(tmp_path / "full", adapter, SHIPPED, None, about, [])


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["classes", "masks"], indirect=True)
def test_a_space_answers_with_nothing_but_its_own_files(image, drop, space):
    """By gradio, which `pip install gradio` brings."""
    client = pytest.importorskip("gradio_client")
    environment = {"PATH": os.environ["PATH"], "HOME": str(space)}
    command = [sys.executable, "-u", "app.py"]
    with subprocess.Popen(command, cwd=space, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            page = client.Client(re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())[0], verbose=False)
            shown, pictures = page.predict(client.handle_file(image), None, fn_index=0)
        finally:
            server.terminate()
    [[said, *_]] = drop((str(image), None))
    assert shown == said and len(pictures) == 2
