"""What users get wrong, as a table: each case ends in one message and exit code 2, and nothing is written.

The cases are in tests/files/mistakes.yaml, and some, whose files take code to write, here. At the end are the files and
images that are odd and must work, and files of strangers that would do harm.
"""

import gc
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

import deploy_lora
import finetune_lora
from moco import pretrain
from tests import image_files
from tests.checkpoint_files import torch_file
from toolkit import InputError, choices
from toolkit.config import check_command_line
from toolkit.files import SHIPPED, TOOLKIT
from toolkit.run import commands, runs
from toolkit.run.options import CLASHES, TASK_CLASHES, read_options

# Each command and what it is given unless the case says otherwise: the last of two equal flags counts.
OUT = "--output-dir out --device cpu --epochs 1"
OF_IMAGES = f"--data-dir images {OUT} --batch-size 8"
COMMANDS = {
    "finetune": (finetune_lora.main, f"--checkpoint base.pth {OF_IMAGES}"),
    "plain-finetune": (finetune_lora.main, f"--checkpoint shipped {OUT}"),
    "bare-finetune": (finetune_lora.main, OUT),
    "pretrain": (pretrain.main, f"{OF_IMAGES} --image-size 16 --dim 8 --mlp-dim 8"),
}  # and without the name of its script, deploy_lora.py, any other


@pytest.fixture
def workplace(base, images, finished_once, small_backbones, tmp_path, monkeypatch) -> Path:
    """The working folder: a checkpoint base.pth, a folder images, and an adapter lora.pth with its run's last.pth."""
    for name, target in (("base.pth", base), ("images", images)):
        (tmp_path / name).symlink_to(target)
    for name in ("lora.pth", "last.pth"):
        (tmp_path / name).symlink_to(finished_once["folder"] / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --------------------------------------------------------------------------------------------------- files of the cases


def picture(mode: str = "RGB", size: tuple[int, int] = (8, 8), suffix: str = "png", **options) -> bytes:
    levels = np.random.RandomState(0).randint(0, 256, (*size[::-1], 3)).astype(np.uint8)
    image = Image.fromarray(levels).convert(mode)
    return image_files.bytes_of(image.save, {"jpg": "JPEG"}.get(suffix, suffix), **options)


PNG = picture()


def changed(file: str, change):
    """What `file` holds, changed in place, as a torch file; done when the working folder is there."""

    def build() -> bytes:
        content = torch.load(file, weights_only=True)
        change(content)
        return torch_file(content)

    return build


def described(**metadata):
    return changed("lora.pth", lambda content: content["metadata"].update(metadata))


def enlarged(content: dict) -> None:
    """A head of one number each, for as many classes of a letter: a small file of ten megabytes."""
    content["metadata"]["class_names"] = ["a"] * 20_000
    content["tensors"]["heads.head.weight"] = torch.zeros(1).expand(20_000, 192)
    content["tensors"]["heads.head.bias"] = torch.zeros(1).expand(20_000)


def copy_of(file: str):
    return lambda: Path(file).read_bytes()


def write(folder: Path, files: dict) -> None:
    """Files by name: text, bytes, or a function that makes the bytes; a name that ends in / is an empty folder."""
    for name, content in files.items():
        if name.endswith("/"):
            (folder / name).mkdir(parents=True)
        else:
            image_files.write(folder / name, content() if callable(content) else content)


def pictures_in(*folders: str, count: int = 2) -> dict[str, bytes]:
    return {f"{folder}/{i}.png": PNG for folder in folders for i in range(count)}


# ------------------------------------------------------------------------------------------------------------ the table

CONTENTS = {
    "a picture": PNG,
    "half a picture": picture(size=(64, 64), suffix="jpg")[:-400],
    "a huge picture": image_files.png_of(40_000, 40_000, 8, 2, bytes(9)),
    "an archive": image_files.tar_of({"a.png": PNG}),
    "as base.pth": copy_of("base.pth"),
    "as lora.pth": copy_of("lora.pth"),
}
TENSORS = {"w": torch.zeros(2)}
BOMB = ["lol"]  # a list of a list twice, of a list twice, ...: 2**60 words from a few hundred bytes
for _ in range(60):
    BOMB = [BOMB, BOMB]


def case(mistake: str, typed: str, *told: str, pictures=(), files: dict | None = None, metadata: dict | None = None):
    named = pictures_in(*pictures)
    for name, content in (files or {}).items():
        if isinstance(content, str):
            content = CONTENTS.get(content, content.replace("{many f}", 9000 * "f"))
        named[name] = content
    if metadata is not None:
        named["theirs.pth"] = described(**metadata)
    return pytest.param(typed, told, named, id=mistake)


def adapter(mistake: str, content, *told: str):
    return case(mistake, "evaluate theirs.pth images", *told, files={"theirs.pth": content})


def add_a_layer(content: dict) -> None:
    content["layers"]["(a+)+$"] = next(iter(content["layers"].values()))


TABLE = []
for row in yaml.safe_load((Path(__file__).parent / "files/mistakes.yaml").read_text()):
    TABLE.append(case(row.pop("mistake"), row.pop("typed"), *row.pop("told"), **row))
OTHER_BANDS = dict.fromkeys(pictures_in("mine/cat", "mine/dog"), picture("RGBA")) | {"other/x.png": PNG}
DEEP = safetensors.torch.save(TENSORS, {"adapter": 100_000 * "[" + 100_000 * "]"})
TABLE += [  # what takes code to write
    case("deep nesting", "finetune --config my.yaml", "my.yaml: cannot be read as YAML: RecursionError",
         files={"my.yaml": 1000 * "[" + 1000 * "]"}),
    case("images without labels of other channels", "finetune --data-dir mine --channels 4 --scale 255"
         " --unlabelled other", "x.png: it has 3 bands, and", files=OTHER_BANDS),
    case("lists that unfold to more than fits", "finetune --checkpoint a.pth", "state_dict hold no tensors",
         files={"a.pth": torch_file({"state_dict": BOMB})}),
    adapter("a surplus layer", changed("lora.pth", add_a_layer), "no layer to adapt is named (a+)+$"),
    adapter("a small file of a large head", changed("lora.pth", enlarged), "its tensors are larger than the file"),
    adapter("no metadata", changed("lora.pth", lambda c: c.update(metadata={})), "does not say its arch, class_names"),
    case("info of other tensors", "info a.safetensors", "is not an adapter file",
         files={"a.safetensors": safetensors.torch.save(TENSORS)}),
    case("info of JSON nested too deeply", "info a.safetensors", "its description is no JSON",
         files={"a.safetensors": DEEP}),
    case("an output folder of a long name", f"finetune --output-dir {'n' * 300}", "File name too long; name another"),
    case("a run among what is shipped", f"finetune --output-dir {SHIPPED.parent}", "not known to be of an earlier run"),
]  # fmt: skip


class RunsCode:
    """A pickle of this makes the folder `ran` when it is loaded."""

    def __reduce__(self):
        return os.system, ("mkdir ran",)


for hostile, content in {
    "finetune --checkpoint a.pth": {"state_dict": {"w": torch.zeros(1)}, "x": RunsCode()},
    "evaluate a.pth mine": {"layers": {}, "tensors": {}, "metadata": RunsCode()},
    "finetune --resume a.pth": {"model": {}, "rng": RunsCode()},
}.items():
    told = ("it needs posix.system", "may run code", "save a state_dict")
    TABLE.append(case(f"code: {hostile}", hostile, *told, files={"a.pth": torch_file(content)}))


def everything_in(folder: Path) -> dict[Path, int | None]:
    """When each file was written last; folders alone may be written to, by locks that come and go."""
    return {path: None if path.is_dir() else path.stat().st_mtime_ns for path in folder.rglob("*")}


def main_and_argv(command: str) -> tuple[Callable, list[str]]:
    script, *words = shlex.split(command)
    if script not in COMMANDS:
        return deploy_lora.main, [script, *words]
    main, given = COMMANDS[script]
    return main, [*given.split(), *words]


def printed_by(command: str, capsys) -> str:
    main, argv = main_and_argv(command)
    with pytest.raises(SystemExit, match="2"):
        runs.run_script(lambda: main(argv))
    printed = capsys.readouterr().err
    assert "error: " in printed and "Traceback" not in printed
    return printed


@pytest.mark.parametrize(("command", "names", "files"), TABLE)
def test_a_mistake_is_one_message_and_nothing_is_written(command, names, files, workplace, capsys):
    write(workplace, files)
    before = everything_in(workplace)
    printed = printed_by(command, capsys)
    message = printed.rpartition("error: ")[2]
    assert [part for part in names if part not in printed] == [], message
    assert all(line.isprintable() and len(line) < 1000 for line in message.splitlines())
    main, argv = main_and_argv(command)
    if main is deploy_lora.main:  # which has few of training's options to advise
        _, parsers = commands.make_parser()
        options = set(argv).union(*(parsers[word]._option_string_actions for word in argv if word in parsers))
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", message)) <= options
    assert everything_in(workplace) == before


OF_TRUTHS = {f"--task {task}": TASK_CLASHES[truth] for task, truth in choices.TRUTHS.items()}
EXCLUSIVE = [(other, words) for other, clashing in (CLASHES | OF_TRUTHS).items() for words in clashing]
NEEDED = {  # values for options that stand for any value
    "--cache-features": "disk", "--gradient-checkpointing": "full", "--stage1-adapter": "lora.pth", "--folds": "5",
    "--unlabelled": "images", "--labels-per-class": "3", "--label-smoothing": "0.1",
}  # fmt: skip


@pytest.mark.parametrize(("other", "words"), EXCLUSIVE)
def test_options_that_exclude_each_other(other, words, workplace):
    typed = [f"{option} {NEEDED.get(option, '')}" for option in (other, words)]
    with pytest.raises(InputError, match=f"{words} with {other}: .*; drop one of the two"):
        read_options([*COMMANDS["finetune"][1].split(), *" ".join(typed).split()])


def test_pretraining_reads_images_as_it_goes(workplace, capsys):
    """A broken one shows in the first epoch, when there is a last.pth already."""
    write(workplace, pictures_in("mine/cat", "mine/dog", count=3) | {"mine/dog/z.jpg": CONTENTS["half a picture"]})
    assert "z.jpg: not a readable image" in printed_by("pretrain --data-dir mine --batch-size 2", capsys)
    assert [path.name for path in (workplace / "out").iterdir()] == ["last.pth"]


# -------------------------------------------------------------------------------------------- as a user's shell sees it


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("finetune_lora.py --help", ["python finetune_lora.py --use-qlora", "--lora-rank", "--help-all shows"]),
        # All in one message: a value by itself, two options together, a checkpoint, an architecture and a folder
        ("finetune_lora.py --epochz --lr x --use-qlora --no-freeze-backbone --checkpoint a.pth --arch b --data-dir c",
         ["error: --epochz: no such option (did you mean --epochs?)", "--learning-rate: ", "--use-qlora with",
          "a.pth: file not found", "unknown arch 'b'", "no such folder"]),
        ("finetune_lora.py --config my.yaml", ["my.yaml: cannot be read as YAML", "the tag", "os.mkdir"]),
        ("-m moco.pretrain --help", ["python -m moco.pretrain --config", "--moco-version"]),
        ("-m moco.pretrain --optimizer adam --knn-dir b", ["did you mean adamw?", "--knn-dir b: no such folder"]),
        ("deploy_lora.py predict --help", ["--window"]),
        ("deploy_lora.py predict a.pth b --ouput c", ["error: --ouput: no such option", "--output: expected"]),
        ("deploy_lora.py chose a.pth b --output c", ["error: chose: no such command (did you mean choose?)"]),
    ],
)  # fmt: skip
def test_help_and_mistakes_do_not_wait_for_pytorch(command, names, tmp_path):
    """PyTorch takes seconds to load. In its place Python finds a file that fails."""
    for package in ("torch", "torchvision", "numpy"):
        (tmp_path / f"{package}.py").write_text("raise RuntimeError('loaded')")
    (tmp_path / "my.yaml").write_text("finetune: !!python/object/apply:os.mkdir [ran]")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{TOOLKIT}"}  # it looks for packages there first
    typed = [str(TOOLKIT / word) if word.endswith("_lora.py") else word for word in command.split()]
    done = subprocess.run([sys.executable, *typed], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == (0 if "--help" in command else 2), done.stderr
    assert "Traceback" not in done.stderr and all(name in done.stdout + done.stderr for name in names), done
    assert not (tmp_path / "ran").exists()


def test_of_several_processes_one_reports_a_mistake_and_main_what_the_others_find(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune_lora.py", "--epochz"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_command_line(read_options, "")
    assert not capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit, match="2"):
        check_command_line(read_options, "")
    assert capsys.readouterr().err.startswith("error: ")
    assert not gc.isenabled()  # until packages are loaded
    runs.run_script(lambda: None)
    assert gc.isenabled()


# --------------------------------------------------------------------------------------------- odd input that must work

ODD_IMAGES = {
    "L.png": picture("L", (1, 1)),
    "LA.png": picture("LA", (1, 9)),
    "CAPITALS.PNG": PNG,
    "wide.jpg": picture("RGB", (300, 2), "jpg"),
    "sub/folder/a b ü.webp": picture("RGB", (7, 7), "webp"),
    "camera.JFIF": picture("RGB", (7, 7), "jpg"),
    "P.gif": picture("P", (5, 5), "gif"),
    "animated.gif": picture("P", (6, 6), "gif", save_all=True, append_images=[Image.new("P", (6, 6))]),
    "animated.webp": picture("RGB", (6, 6), "webp", save_all=True, append_images=[Image.new("RGB", (6, 6))]),
}
NO_IMAGES = ["readme.txt", "labels.csv", "@eaDir/L.png", ".thumbnails/L.png", ".ipynb_checkpoints/L-checkpoint.png"]
NO_IMAGES += ["Thumbs.db", ".DS_Store", "._L.png"]  # the last as macOS leaves them on other file systems


@pytest.mark.parametrize("script", ["finetune --workers 1", "pretrain --batch-size 4"])
def test_odd_images_beside_other_files(script, workplace, capsys):
    """Down to one pixel, in folders with what computers leave there; tests/test_transforms.py has all modes."""
    for name in ("cat", "dög"):
        write(workplace / "mine" / name, ODD_IMAGES | dict.fromkeys(NO_IMAGES, ""))
    write(workplace / "mine", {".hidden/x.txt": "", "notes.txt": "", "@eaDir/x/L.png": ""})
    main, argv = main_and_argv(f"{script} --data-dir mine")
    results = main(argv)
    assert results["epochs"] == 1
    assert capsys.readouterr().out.count("mine: files that are not read as images: 2 .csv, 2 .db, 2 .txt") == 1
    if main is finetune_lora.main:
        assert list(results["accuracy_per_class"]) == ["cat", "dög"]


def test_configs_that_are_odd_and_good(workplace):
    """The last one has a key of an older version."""
    one = ("\ufefffinetune: {epochs: 1}", "finetune: {epochs: 1}\r\n")
    for text in (*one, "", "# nothing\n", "finetune:\n", "moco: {epochs: 9}", "finetune: {rank_pattern: null}"):
        write(workplace, {"my.yaml": text})
        args, _ = read_options(["--config=my.yaml", "--checkpoint=base.pth"])
        assert args.epochs == (1 if text in one else 10)


# --------------------------------------------------------------------------------------------------- files that do harm


@pytest.fixture
def little_room():
    """The process may take 100 MB more than it has."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_what_files_declare_takes_no_memory(workplace, little_room):
    """As a header of 2**40 numbers, with no number behind it."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for name, content in {
        "a.safetensors": len(header).to_bytes(8, "little") + header,
        "header.safetensors": (2**40).to_bytes(8, "little") + b"{}",
        "rank.pth": changed("lora.pth", lambda content: next(iter(content["layers"].values())).update(r=2**31)),
        "classes.pth": described(class_names=["a"] * 150_000),
        "size.pth": described(image_size=2**20),
    }.items():
        write(workplace, {name: content})
        with pytest.raises(InputError):
            finetune_lora.load_finetuned(name)
