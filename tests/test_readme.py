"""README and docs/ are executed: Python blocks as they stand, commands on less data, tables against the code."""

import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed.run
import torchvision
from conftest import CLASSES, fill_in, of_few_images
from PIL import Image
from sklearn.datasets import load_digits

import deploy_lora
import example_lora_usage as examples
import finetune_lora
from moco import pretrain
from tests.checkpoint_files import narrow_resnet
from tests.pages import blocks, commands, preparation, save_moco_v2
from toolkit.answers import parts

pytestmark = pytest.mark.usefixtures("whole_vit_mini")
ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
README = PAGES["README.md"]
WITH_LINKS = [*PAGES, "benchmarks/RESULTS.md", "CONTRIBUTING.md", "checkpoints/moco_stage1/README.md"]
SMALL = ["--labels-per-class", "2", "--epochs", "1", "--batch-size", "10"]
# A newcomer lacks them.
EXTRAS = ("peft", "onnx", "onnxscript", "onnxruntime", "accelerate", "pytorch_lightning")


def commands_of(*starts: str) -> list[str]:
    """The commands of all pages that start so, each once."""
    return [command for command in dict.fromkeys(commands("\n".join(PAGES.values()))) if command.startswith(starts)]


def extras_of(block: str) -> list[str]:
    return [package for package in EXTRAS if re.search(rf"^(import|from) {package}\b", block, re.MULTILINE)]


def section(page: str, title: str) -> str:
    return PAGES[page].split(f"\n## {title}\n")[1].split("\n## ")[0]


TO_A_SERVER = section("docs/deploy.md", "A server with torchvision alone")
AFTER_TRAINING = section("docs/deploy.md", "Every command")
AFTER_TRAINING += section("docs/deploy.md", "ONNX and torch.export") + section("docs/deploy.md", "PEFT")
FEW_LABELS = PAGES["docs/few-labels.md"]  # from top to bottom, below
OF_PIXELS = section("docs/deploy.md", "A class for every pixel")  # run by tests/test_maps.py
PYTHON_BLOCKS = blocks("python", "\n".join(PAGES.values()))
ALONE = [block for block in PYTHON_BLOCKS if block not in TO_A_SERVER + OF_PIXELS + AFTER_TRAINING]


@pytest.fixture(scope="module")
def newcomer(whole_vit_mini, small_backbones, images, tmp_path_factory):
    """A folder, where the reader of the README is, of the checkout's files, images and a MoCo v2 checkpoint."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "checkpoints").mkdir()
    for name in ("checkpoints/moco_stage1", "configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my_images").symlink_to(images)
    paths = ["my_images" / path.relative_to(images) for path in sorted((images / "train").glob("*/*.png"))]
    labels = [f"{path},{('big', 'dog')[i % 2]}\n" for i, path in enumerate(paths)]
    labels[0] = f'{paths[0]},"cat,big"\n'
    (folder / "labels.csv").write_text("".join(labels))
    (folder / "numbers.csv").write_text("".join(f"{path},{i}.5\n" for i, path in enumerate(paths)))
    Image.new("L", (8, 8), 200).save(folder / "image.png")
    shutil.copy(save_moco_v2(folder), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder))
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def first_run(newcomer):
    """What the first command and the README's merge leave behind, on less data, and what the command printed."""
    with of_few_images(), contextlib.redirect_stdout(io.StringIO()) as printed:
        finetune_lora.main([*SMALL[2:], "--output-dir", "checkpoints/lora"])
    (newcomer / "printed.txt").write_text(printed.getvalue())
    others = {*commands_of("python deploy_lora.py")} - {*commands(AFTER_TRAINING), *commands(FEW_LABELS)}
    merges = [command for command in others if "compare" not in command]
    for command in merges:
        deploy_lora.main(shlex.split(command)[2:])
    assert merges and (newcomer / "merged.pth").exists()
    return newcomer / "checkpoints/lora"


def continue_stage_1() -> None:
    """Run the command of docs/pretrain.md in this folder, on less data."""
    command = next(c for c in commands_of("python -m moco.pretrain") if "--checkpoint" in c)
    small = "--data-dir my_images/train --dataset unlabelled --epochs 1 --batch-size 4 --queue-size 8"
    pretrain.main([*shlex.split(command)[3:], *small.split()])


def test_the_readme_is_short_and_begins_with_what_a_newcomer_does():
    gate = (ROOT / ".ci/run").read_text()
    typed = commands(section("README.md", "A first run and the tests"))
    assert typed[:2] == ["pip install -r requirements.txt", "python finetune_lora.py"]
    for command in typed[2:]:
        assert command.replace("pip install", "pip install --quiet --no-compile") in gate or command in gate
    assert len(README.splitlines()) <= 199  # it is read in five minutes
    first = README.split("\n## ")[0]
    assert "<img" in first and "](finetune_lora_notebook.ipynb)" in first
    notebook = (ROOT / "finetune_lora_notebook.ipynb").read_text()
    assert "](README.md)" in notebook and "](docs/" in notebook
    # Every command runs below, and every file is there.
    known = ("pip install", "python finetune_lora.py", "python deploy_lora.py", "python -m moco.pretrain")
    assert set(commands_of("")) == set(commands_of(*known, "python -m pytest", "torchrun", "pdoc"))
    [layout] = [block for block in blocks("text", PAGES["docs/how-it-works.md"]) if "toolkit/ " in block]
    for name in re.findall(r"^\S+", layout, re.MULTILINE):
        assert (ROOT / name).exists(), name


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands_of("python finetune_lora.py") if c not in FEW_LABELS])
def test_every_fine_tuning_command_runs(command, first_run, monkeypatch, tmp_path, request):
    argv = shlex.split(command)[2:]
    if "--stage1-adapter" in argv:
        continue_stage_1()
    if "timm:" in command:
        timm = pytest.importorskip("timm")
        monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=2))
        state = timm.create_model("vit_small_patch14_dinov2").state_dict()
        torch.save(state, "dinov2_small.pth")
        monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *_, **__: state)
    if not {"auto", "--task"} & {*argv}:  # auto needs an image of each class to train on, and one to choose by
        request.getfixturevalue("few_images")
    small = SMALL[2:] if {"--task", "--resume"} & {*argv} else SMALL
    folder = first_run if "--resume" in argv else tmp_path
    results = finetune_lora.main([*argv, *small, "--output-dir", str(folder)])
    assert [part["epochs"] for part in results.get("folds", [results])] == [1] * (5 if "--folds" in argv else 1)


@pytest.mark.usefixtures("newcomer")  # in whose folder the published file lies
@pytest.mark.parametrize("command", commands_of("python -m moco.pretrain", "torchrun"))
def test_every_command_of_stage_1_and_of_torchrun_is_understood(command, monkeypatch):
    """By torchrun and by the script that it starts; tests/test_processes.py runs two processes."""
    monkeypatch.chdir(ROOT)
    _, _, script, *argv = shlex.split(command)
    if command.startswith("torchrun"):
        launch = torch.distributed.run.get_args_parser().parse_args(shlex.split(command)[1:])
        script = launch.training_script
        argv = launch.training_script_args
        assert int(launch.nproc_per_node) > 1 and launch.module == (script == "moco.pretrain")
    if script == "finetune_lora.py":
        finetune_lora.read_options(argv)
    elif script == "deploy_lora.py":
        assert not list(deploy_lora.check(deploy_lora.make_parser()[0].parse_args(argv)))
    else:
        ignored = pretrain.options.OF_FINE_TUNING  # in a file that both scripts read
        args, _ = pretrain.config.parse_args(pretrain.make_parser(), argv, ignored=ignored)
        assert script == "moco.pretrain" and args.arch


@pytest.mark.parametrize("block", [pytest.param(b, marks=[pytest.mark.slow] * bool(extras_of(b))) for b in ALONE])
def test_every_python_block_runs_as_it_stands(block, first_run, few_images, monkeypatch):
    for package in extras_of(block):
        pytest.importorskip(package)
    monkeypatch.setattr(parts.SoftmaxObjective, "loss", parts.SoftmaxObjective.loss)  # to be put back
    with mock.patch.dict(finetune_lora.ADAPTED):
        exec(compile(block, "a page", "exec"), {})


@pytest.mark.slow
def test_what_comes_after_training_works_in_this_order(newcomer, first_run, tmp_path, monkeypatch):
    """docs/deploy.md from top to bottom; commands and blocks whose packages are missing are passed over."""
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoints", "configs", "image.png"):
        (tmp_path / name).symlink_to(newcomer / name)
    for i, image in enumerate(load_digits().images[:20].astype(np.uint8) * 15):
        for path in (tmp_path / "my_labelled_images" / str(i % 10), tmp_path / "new_images"):
            path.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path / f"{i}.png")
    with of_few_images():
        finetune_lora.main([*SMALL[2:], "--lora-rank=0", "--no-freeze-backbone", "--output-dir=checkpoints/full"])
    for command in commands(AFTER_TRAINING):
        needed = {".onnx": ("onnx", "onnxscript"), "--to peft": ("peft",)}
        if all(word not in command or all_installed(*packages) for word, packages in needed.items()):
            deploy_lora.main(shlex.split(command)[2:])
            for name in re.findall(r"--output (\S+)", command):
                assert (tmp_path / name).exists(), command
    monkeypatch.setitem(sys.modules, "prepare", preparation())
    for block in blocks("python", AFTER_TRAINING):
        if all_installed(*extras_of(block)) and ("onnx" not in block or all_installed("onnx")):
            exec(compile(block, "a page", "exec"), {})


def all_installed(*packages: str) -> bool:
    return None not in map(importlib.util.find_spec, packages)


@pytest.mark.slow
def test_from_images_without_labels_to_an_answer(own_folder, images):
    """docs/few-labels.md from top to bottom; the lists are filled in by the folders of the images."""
    (own_folder / "my_images").symlink_to(images)
    continue_stage_1()
    for command in commands(FEW_LABELS):
        argv = shlex.split(command)[2:]
        if "choose" in argv:
            count = 12 if "--labelled" in argv else 24  # of 36, so that each class has some
            assert len(deploy_lora.main([*argv, "--count", str(count)])) == count
            fill_in(own_folder / argv[-1] / "to_label.csv")
        else:
            assert finetune_lora.main([*argv, *SMALL[2:], "--image-size", "64"])["epochs"] == 1
    assert (own_folder / "checkpoints/first/labels_to_check.csv").exists()


def test_from_an_official_checkpoint_to_a_file_that_serves(own_folder, newcomer, monkeypatch, capsys):
    """The section from top to bottom: the newcomer's images, and plain torchvision in the end."""
    for name in ("my_images", "image.png"):
        (own_folder / name).symlink_to(newcomer / name)
    tune, merge = commands(TO_A_SERVER)
    finetune_lora.main([*shlex.split(tune)[2:], "--labels-per-class", "1", "--epochs", "1"])
    assert "BatchNorms follow the adapters (--norms follow)" in capsys.readouterr().out
    deploy_lora.main(shlex.split(merge)[2:])
    _, block = blocks("python", TO_A_SERVER)
    monkeypatch.setitem(sys.modules, "prepare", preparation())
    monkeypatch.setattr(torchvision.models, "resnet50", narrow_resnet)
    capsys.readouterr()
    exec(compile(block, "a page", "exec"), served := {})
    assert capsys.readouterr().out.split()[0] in CLASSES
    model, info = finetune_lora.load_finetuned("checkpoints/lora/lora.pth")
    with Image.open("image.png") as image:
        torch.testing.assert_close(served["logits"], model(info["transform"](image)[None]), rtol=1e-3, atol=1e-3)


def test_the_options_page_and_the_readme_have_the_options(tmp_path):
    """Every flag with its default, and nothing else; `python docs/write_options.py` writes the page."""
    assert PAGES["docs/options.md"] == runpy.run_path(str(ROOT / "docs/write_options.py"))["page"]()

    def rows(text: str) -> dict[str, str]:
        found = re.findall(r"^\| `(--[a-z0-9-]+)`[^|]* \| ([^|]*) \| [^|]+ \|$", text, re.MULTILINE)
        return {flag: default.strip() for flag, default in found}

    needed = rows(section("README.md", "The 18 options that people need"))
    assert [flag.removeprefix("--").replace("-", "_") for flag in needed] == list(finetune_lora.options.NEEDED)
    assert len(needed) == 18 and needed.pop("--lora-alpha") == "twice the rank"  # which follows from another option
    assert needed.items() <= rows(PAGES["docs/options.md"].split("\n## Pretraining")[0]).items()
    (block,) = blocks("yaml", PAGES["docs/options.md"])
    (tmp_path / "my.yaml").write_text(block)
    args, sources = finetune_lora.read_options(["--config", str(tmp_path / "my.yaml")])
    assert args.lora_rank == 16 and sources["augmentation"] == "config"


def test_each_line_that_the_first_command_prints_is_explained(newcomer, first_run):
    explained = section("docs/results.md", "What a run prints")
    printed = (newcomer / "printed.txt").read_text()
    assert "\naccuracy after" in printed and "\nlinear probe before" in printed
    for line in printed.splitlines():
        [word, *_] = re.split(r":|  |\d", line)
        assert not word.strip() or line.startswith(" ") or f"`{word}" in explained, line


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", WITH_LINKS)
def test_every_link_and_picture_leads_to_a_file_and_a_heading(page):
    targets = re.findall(r"(?:\]\(|src=\")([^)\"\s]+)", without_code(ROOT / page))
    inside = [target for target in targets if "://" not in target]
    assert inside
    for target in inside:
        name, _, heading = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if heading:  # as GitHub makes it: in lower case, without punctuation, a hyphen for each space
            titles = re.findall(r"^#+ (.+)$", without_code(path).lower(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_each_page_opens_with_the_question_that_the_readme_gives_it(page):
    question = PAGES[page].splitlines()[0].removeprefix("# ")
    assert question.endswith("?")
    assert re.search(rf"^\| .*\[[^]]+\]\({page}\).* \| .*{re.escape(question)}.* \|$", README, re.MULTILINE)
    assert "](../README.md" in PAGES[page]


def test_set_up_replaces_adapters_and_counts_them(capsys):
    examples.example_1_setup()
    counts = re.findall(r"r=\d+ +([\d,]+) of", capsys.readouterr().out)
    adapters = [int(count.replace(",", "")) - (192 * 10 + 10) for count in counts]  # beside the head
    assert adapters == [adapters[0], 2 * adapters[0], 4 * adapters[0]]
