"""What the tests of the training scripts share: a tiny backbone, tiny images, and the script run on them."""

import contextlib
import csv
import gc
import os
import shutil
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; the processes that tests start inherit it
gc.disable()  # until everything is imported
# ruff: noqa: E402

import numpy as np
import pytest
import torch
from PIL import Image

import finetune_lora
import toolkit
from lora_utils import LoRAManager
from tests.checkpoint_files import narrow_resnet, save_base, shorten_vit_mini, without_head
from tests.image_files import save_image
from tests.pages import save_moco_v2
from tests.run_folders import SHORTER
from toolkit.answers.tasks import TASKS
from toolkit.devices import seed_everything
from toolkit.images import data, sources
from toolkit.images.sources import load_splits
from toolkit.models import backbones, checkpoints, names
from toolkit.run import loaders, optim, reports

CLASSES = ("bright", "dark", "striped")
LEAST_STEPS = loaders.LEAST_STEPS  # of an epoch, in use: see `SHORTER`
shorten_vit_mini()


def pytest_collection_finish():
    """What the imports made stays: looking through it again and again took a sixth of the time of all tests."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def spy(monkeypatch):
    """spy(owner, "name") is a mock in the place of a function, or method, which does what that did."""

    def spy(owner, name: str):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, mock.create_autospec(real, side_effect=real))
        return getattr(owner, name)

    return spy


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A vit_mini for images of 16 pixels in MoCo's layout, random but the same in every session."""
    return save_base(tmp_path_factory.mktemp("base") / "base.pth")


def save_adapter(model: torch.nn.Module, path: Path, base: Path, **about) -> Path:
    """Save the head of a vit_mini, and its adapters, with what a run says of them."""
    known = {"arch": "vit_mini", "class_names": list(CLASSES), "image_size": 16, "checkpoint": str(base)}
    LoRAManager(model).save_lora_checkpoint(path, known | about)
    return path


@pytest.fixture(scope="session")
def adapter_for_images(base, tmp_path_factory) -> Path:
    """An adapter file that has a head alone, which is enough to sort images."""
    model, _ = checkpoints.load_backbone(base, len(CLASSES))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.nn.init.normal_(model.heads.head.weight, std=0.5)
    return save_adapter(model, tmp_path_factory.mktemp("head") / "lora.pth", base)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """train/ and val/ with three classes that can be told apart, 7 and 5 noisy images of each."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.RandomState(0)
    for part, count in (("train", 7), ("val", 5)):
        for name in CLASSES:
            for i in range(count):
                pixels = rng.randint(0, 60, (16, 16, 3))
                pixels[:: 1 if name == "bright" else 2] += 0 if name == "dark" else 180
                save_image(folder / part / name / f"{i}.png", pixels.astype(np.uint8))
    return folder


def fill_in(table: Path) -> None:
    """Write what a person adds to a list of `deploy_lora.py choose`: of each image the name of its folder."""
    with open(table, newline="") as file:
        titles, *rows = csv.reader(file)
    assert titles == ["path", "label"] and {label for _, label in rows} == {""}
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([titles, *((path, Path(path).parent.name) for path, _ in rows)])


@pytest.fixture(scope="session")
def hospital(tmp_path_factory) -> Path:
    """scans/CLASS/PATIENT/NUMBER.png, and lists of them: patients have 1 to 6 images, half of them of both classes."""
    folder = tmp_path_factory.mktemp("hospital")
    rng = np.random.RandomState(0)
    lists = {"all": "path,label,Patient\n", "labels": "path,Patient,sick,well\n", "numbers": "path,age,Patient\n"}
    for patient in range(20):
        for number in range(1 + patient % 6):
            name = "sick" if (patient + number * (patient % 2)) % 3 == 0 else "well"
            listed = f"scans/{name}/p{patient}/{number}.png"
            pixels = rng.randint(0, 256, (16, 16, 3), dtype=np.uint8)
            save_image(folder / listed, pixels // (2 if name == "well" else 1))
            lists["all"] += f"{listed},{name},p{patient}\n"
            lists["labels"] += f"{listed},p{patient},{int(name == 'sick')},1\n"
            lists["numbers"] += f"{listed},{float(patient)},p{patient}\n"
    for name, text in lists.items():
        (folder / f"{name}.csv").write_text(text)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """Twelve images of 20 x 28 pixels to train on, six to evaluate: the mask is where they are bright."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.RandomState(0)
    for part, count in (("train", 12), ("val", 6)):
        for number in range(count):
            mask = np.zeros((20, 28), np.uint8)
            left, top = rng.randint(2, 16), rng.randint(2, 10)
            mask[top : top + 8, left : left + 10] = 1
            mask[rng.randint(0, 19), :] = 255
            image = rng.randint(0, 120, (20, 28, 3)) + 130 * (mask == 1)[..., None]
            save_image(folder / part / "images" / f"{number}.png", image.astype(np.uint8))
            save_image(folder / part / "masks" / f"{number}.png", mask)
    return folder


@pytest.fixture(scope="module")
def whole_vit_mini():
    """Six blocks, as the shipped checkpoint has."""
    with mock.patch.dict(names.VITS, vit_mini=names.VITS["vit_mini"] | {"num_layers": 6}):
        checkpoints._meta_model.cache_clear()
        yield
    checkpoints._meta_model.cache_clear()


@pytest.fixture(scope="module")
def small_backbones():
    """A ResNet-18 is narrow here, and a ViT-S has two blocks: more would show no more of names and shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones.models, "resnet18", narrow_resnet)
        for arch in ("vit_small", "vit_conv_small"):
            patch.setitem(names.VITS, arch, names.VITS[arch] | {"num_layers": 2})
        checkpoints._meta_model.cache_clear()
        yield
    checkpoints._meta_model.cache_clear()


@pytest.fixture
def own_folder(small_backbones, tmp_path, monkeypatch) -> Path:
    """The working folder, with the official file as if downloaded: a narrow ResNet-18 for its ResNet-50."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    save_moco_v2(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def narrow(small_backbones) -> dict[str, torch.Tensor]:
    """The state_dict of such a ResNet-18 without its head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return without_head(narrow_resnet().state_dict())


@pytest.fixture
def saved(tmp_path):
    def save(content, name="checkpoint.pth", **options):
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.fixture(scope="session")
def finetune_into(base, images):
    """finetune_into(folder, "--epochs 1") runs the script on these images, with what else `main` takes; its results,
    with the folder as `folder`. The runs, short as they are, train at the rate that they are given."""

    def run(folder: Path, options: str = "", **more) -> dict:
        argv = f"--checkpoint {base} --data-dir {images} --output-dir {folder} --device cpu"
        argv += " --augmentation none --batch-size 8 --epochs 2 --learning-rate 1e-3"
        with mock.patch.object(optim, "STEPS_TO_TRAIN", 1):
            return finetune_lora.main([*argv.split(), *options.split()], **more) | {"folder": folder}

    return run


@pytest.fixture
def finetune(finetune_into, tmp_path, monkeypatch):
    """finetune("--epochs 1", "out") is `finetune_into` a folder of that name."""
    monkeypatch.setattr(optim, "STEPS_TO_TRAIN", 1)
    return lambda options="", output="out", **more: finetune_into(tmp_path / output, options, **more)


@pytest.fixture(scope="session")
def finished_once(finetune_into, tmp_path_factory) -> dict:
    """The results of a run of one epoch."""
    return finetune_into(tmp_path_factory.mktemp("once") / "out", "--epochs 1")


@pytest.fixture
def once(finished_once, tmp_path) -> Path:
    """A copy of its folder, in which finetune("--epochs 1 --resume") goes on."""
    return shutil.copytree(finished_once["folder"], tmp_path / "out")


@pytest.fixture
def start(base, images, tmp_path, monkeypatch):
    """A run that has not begun yet, for a look at single steps."""
    monkeypatch.setattr(optim, "STEPS_TO_TRAIN", 1)

    def start(options: str = "") -> finetune_lora.FineTuning:
        argv = f"--checkpoint {base} --data-dir {images} --output-dir {tmp_path} --device cpu --augmentation none"
        args, _ = finetune_lora.read_options([*argv.split(), "--learning-rate", "1e-2", *options.split()])
        seed_everything(args.seed)
        splits, model, report, plan = finetune_lora.prepare(args, torch.device("cpu"))
        return finetune_lora.FineTuning(args, plan, model.train(), report, splits)

    return start


PICTURES = {(reports, name): getattr(reports, name) for name in dir(reports) if name.startswith("plot_")}
PICTURES |= {
    (task.Report, name): getattr(task.Report, name) for task in TASKS.values() for name in ("draw", "draw_mistakes")
}


@contextlib.contextmanager
def plotting(functions):
    with pytest.MonkeyPatch.context() as patch:
        for module, name in PICTURES:
            patch.setattr(module, name, functions[module, name])
        yield


@pytest.fixture(scope="session", autouse=True)
def in_tests(tmp_path_factory):
    """Runs are shorter, and draw nothing, which takes a third of a short one: a test that looks at pictures asks for
    `pictures`. What commands write is not noted where those of this machine's user note it."""

    def blank(*given) -> list:
        for path in given:
            if isinstance(path, Path):
                Image.new("L", (1, 1)).save(path, "png")
        return []

    with plotting(dict.fromkeys(PICTURES, blank)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolkit, "WRITTEN", tmp_path_factory.mktemp("own") / "list")
        for module, name, value in SHORTER:
            patch.setattr(module, name, value)
        yield


@pytest.fixture
def pictures():
    """Runs draw their pictures, as they do within `with plotting(PICTURES):`."""
    with plotting(PICTURES):
        yield


@contextlib.contextmanager
def of_few_images():
    """A run finds one image of each class in each split: for commands that only have to run."""

    def few(part: data.LabelledImages) -> data.LabelledImages:
        return part.subset([part.labels.index(label) for label in sorted(set(part.labels))])

    def load_few(*args, **sources):
        splits = load_splits(*args, **sources)
        return splits._replace(train=few(splits.train), val=few(splits.val))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders, "load_splits", load_few)
        patch.setattr(sources, "load_splits", load_few)
        yield


@pytest.fixture
def few_images():
    with of_few_images():
        yield
