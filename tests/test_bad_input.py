"""What users get wrong, as a table: each case ends in one message and exit code 2, and nothing is written.

A case is a title, a command, what its message must name, and the files that lie in the working folder beside those of
`workplace`. At the end are the files and images that are odd and must work, and files of strangers that would do harm.
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


def classes(*names: str, folder: str = "mine", count: int = 2) -> dict[str, bytes]:
    return {f"{folder}/{name}/{i}.png": PNG for name in names for i in range(count)}


def split(train: tuple[str, ...], val: tuple[str, ...]) -> dict[str, bytes]:
    return classes(*train, folder="mine/train") | classes(*val, folder="mine/val")


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# ------------------------------------------------------------------------------------------------------------ the table


def case(title: str, command: str, *names: str, files: dict | None = None):
    return pytest.param(command, names, files or {}, id=title)


def config(title: str, text, *names: str, script: str = "finetune"):
    """A case whose mistake is in the configuration my.yaml."""
    return case(title, f"{script} --config my.yaml", *names, files={"my.yaml": text})


def images(title: str, files: dict, *names: str, options: str = ""):
    """A case whose mistake is in the folder of images, mine."""
    return case(title, f"finetune --data-dir mine {options}", *names, files=files)


def listed(title: str, lines: str, *names: str, options: str = ""):
    """A case whose mistake is in the list l.csv of images of a cat and a dog."""
    files = classes("cat", "dog") | {"l.csv": lines}
    return case(title, f"plain-finetune --data-list l.csv {options}", *names, files=files)


def adapter(title: str, content, *names: str, command: str = "evaluate theirs.pth images"):
    return case(title, command, *names, files={"theirs.pth": content})


BASE = copy_of("base.pth")
TAR = image_files.tar_of({"a.png": PNG})
TENSORS = safetensors.torch.save({"w": torch.zeros(2)})
TWO = classes("cat", "dog")
LABELS = described(task={"kind": "multilabel", "thresholds": [0.5] * 3})
HUGE = image_files.png_of(40_000, 40_000, 8, 2, bytes(9))
TRUNCATED = picture(size=(64, 64), suffix="jpg")[:-400]
TWO_IMAGES = "mine/cat/0.png,cat\nmine/dog/0.png,dog\n"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HUGE_IN_16 = 9000 * "f"
BOMB = ["lol"]  # a list of a list twice, of a list twice, ...: 2**60 words from a few hundred bytes
for _ in range(60):
    BOMB = [BOMB, BOMB]

TABLE = [
    # Options
    case("a switch with a value", "finetune --use-qlora=yes", "--use-qlora", "ignored explicit argument"),
    case("whole numbers out of range", "finetune --epochs ten --batch-size 0 --accumulation-steps 2.5 --adapt-last auto"
         " --lora-rank -1 --workers 100000", "--epochs: expected a whole number above 0, got 'ten'",
         *(f"above 0, got '{value}'" for value in (0, 2.5, "auto")),
         "--lora-rank: expected a whole number, 0 or more, got '-1'", "a whole number from 0 to 256, or auto"),
    case("numbers out of range", "finetune --lora-alpha 0 --learning-rate 0,01 --clip-grad-norm nan --lora-dropout 1"
         " --weight-decay -1 --warmup-epochs inf",
         *(f"--{x}: expected a number above 0" for x in ("lora-alpha", "learning-rate", "clip-grad-norm")),
         "--lora-dropout: expected a number from 0 to below 1",
         *(f"--{name}: expected a number, 0 or more" for name in ("weight-decay", "warmup-epochs"))),
    case("a word, choices and a missing value", "finetune digits --dataset digit --precision float16 --epochs",
         "digits: unexpected argument", "'digit' is none of digits, imagefolder",
         "'float16' is none of auto, fp32, bf16, fp16", "--epochs: expected a value, got none"),
    case("numbers too large", f"finetune --epochs {10**30} --learning-rate 1e38",
         "too large; the largest is 2147483647", "--learning-rate: 1e38 is too large"),
    case("options that do not go together", "finetune --warmup-epochs 50 --adapt-last 2 --use-qlora --norms train"
         " --precision fp16 --arch timm:resnet1 --label-columns a --unlabelled images --keep-best f",
         "--warmup-epochs 50 is more than --epochs", "--norms train with --adapt-last", "fp16 needs a GPU",
         "--precision bf16 or fp32", "--arch timm:resnet1: timm has no", "only a --data-list of classes, labels or"),
    case("too many upper blocks", "finetune --adapt-last 7", "adapt_last is 7; give a number from 1 to 2"),
    case("settings of no adapters", "finetune --lora-rank 0 --use-qlora --adapt-last 2 --lora-alpha 8"
         " --lora-dropout 0.1 --target-modules mlp --lora-init random",
         *(f"--{name} with --lora-rank 0: there are no adapters" for name in ("use-qlora", "adapt-last", "lora-alpha",
           "lora-dropout", "target-modules", "lora-init"))),
    case("random weights of no architecture", "finetune --checkpoint none --cache-features disk --device meta",
         "--cache-features needs --adapt-last, or --lora", "with --arch", "--no-freeze-backbone", "'meta' is not"),
    case("an image size between patches", "finetune --image-size 17", "17 is not a multiple of vit_mini's patch", "16"),
    case("an image size for no memory", "finetune --image-size 100000", "image size is 100000", "at most 4096"),
    case("all at once", "finetune --epochs 0 --qlra --use-qlora --no-freeze-backbone --device gpu --data-dir absent"
         " --checkpoint gone.pth --stage1-adapter no.pth", "--epochs", "--qlra: no such", "4 bits cannot train",
         "'gpu' is not available", "--device cpu", "absent: no such", "gone.pth: file not found", "no.pth: file"),
    case("a bad checkpoint is told before images", "finetune --data-dir mine --checkpoint theirs.pth",
         "not a PyTorch checkpoint", files=classes("one") | {"theirs.pth": "text"}),
    # Configurations
    config("a list", "- epochs", "expected the sections model, data"),
    config("tabs", "finetune:\n\tepochs: 3", "my.yaml: cannot be read as YAML", "line 2"),
    config("deep nesting", nested(1000), "my.yaml: cannot be read as YAML: RecursionError"),
    config("everything wrong", "finetune: &f {epochs: null, lora_rank: -2, seed: [1], batch_size: yes, use_qlora: 1,"
           f" target_modules: mlp, rank: 3, lora-rank: 3, rank_pattern: 4, lora_alpha: 0x{HUGE_IN_16},"
           f" ? 0x{HUGE_IN_16} : 1, clip_grad_norm: [*f]}}\n"
           'model: {epochs: 3, arch: "a\\0b"}\nepochs: 3\nmodle:\ndata: 3',
           "finetune.epochs: expected a value, got none", "finetune.lora_rank: expected a whole number, 0 or more",
           "finetune.seed: expected a value, got [1]", "finetune.batch_size: expected a value, got True",
           "finetune.use_qlora: expected true or false, got 1", "target_modules: expected a list",
           "finetune.rank: no such", "finetune.lora-rank: no such key in my.yaml (did you mean lora_rank?)",
           "rank_pattern: no such key in my.yaml; delete the line", "finetune.lora_alpha: invalid value",
           "finetune.a number too long", "clip_grad_norm: expected a value",
           "model.epochs: no such key in my.yaml (it belongs in the section finetune)", "text without a NUL character",
           "epochs: no such section in my.yaml (it belongs in the section finetune)", "modle: no such section",
           "data: expected a section"),
    config("pretraining's file has errors too", "moco: {epochs: 0, optimiser: sgd}", "moco.epochs: expected",
           "moco.optimiser: no such key", "did you mean optimizer?", script="pretrain"),
    case("a device for a config", "finetune --config /dev/zero", "/dev/zero: not a file"),
    # Images
    case("your own images without a checkpoint", "bare-finetune --data-dir images", "--data-dir without --checkpoint",
         "handwritten digits alone", "moco-v2-800ep", "--checkpoint shipped"),
    case("an evaluation folder alone", "bare-finetune --val-dir images/val", "--val-dir without --data-dir"),
    case("no folder", "plain-finetune --dataset imagefolder", "--data-dir is missing: give a folder"),
    case("a folder for the digits", "finetune --dataset digits", "the digits need no --data-dir", "imagefolder"),
    images("a folder of images without classes", {"mine/a.png": PNG, "mine/b.png": PNG}, "mine", "found none"),
    images("masks among the classes", classes("images", "masks"), "and is no class", "--data-dir mine/images"),
    case("masks to pretrain on", "pretrain --dataset unlabelled --data-dir mine", "mine/train: labels/ has the masks",
         "--data-dir mine/train/images", files=classes("images", "labels", folder="mine/train")),
    images("val without train", classes("cat", "dog", folder="mine/val"), "val are parts, not classes"),
    images("parts in capitals", classes("a", folder="mine/Train") | classes("a", folder="mine/Test"), "lower case"),
    images("a test part among the classes", TWO | classes("cat", folder="mine/test"), "test are parts", "into train"),
    images("an empty val", split(("cat", "dog"), ()) | {"mine/val/": None}, "val", "found none"),
    images("a class only in val", split(("cat", "dog"), ("cat", "eel")), "val has classes that", "train lacks: eel"),
    images("a truncated image, with workers", TWO | {"mine/dog/z.jpg": TRUNCATED}, "use --skip", options="--workers 1"),
    images("no image in val", split(("cat", "dog"), ()) | {"mine/val/cat/": None}, "mine/val: no images"),
    case("a list and an evaluation folder", "finetune --data-list l.csv --val-dir images/val", "as a second list"),
    images("an image that unfolds to gigabytes", TWO | {"mine/dog/0.png": HUGE}, "bomb"),
    images("two evaluation folders", split("ab", "a") | classes("a", folder="mine/valid"), "mine has val and valid"),
    case("a file for an evaluation folder", "finetune --val-dir base.pth", "--val-dir base.pth: a file"),
    case("no such folder of images without labels", "finetune --unlabelled gone", "--unlabelled gone: no such"),
    case("an archive of images without labels", "finetune --unlabelled pool.zip", "pool.zip is an archive: name the f",
         "what is no plain .tar, unpack there", files={"pool.zip": TAR}),
    case("an archive for its folder", "finetune --data-dir all.tar", "name the folder that holds the images, or arch",
         "plain .tar; unpack others", files={"all.tar": TAR}),
    case("no images but the labelled ones", "finetune --unlabelled images/train", "without 0 evaluation images and 21"),
    images("images without labels of other channels", dict.fromkeys(TWO, picture("RGBA")) | {"other/x.png": PNG},
           "x.png: it has 3 bands, and", options="--channels 4 --scale 255 --unlabelled other"),
    case("a folder and a data set", "finetune --dataset digits --val-dir images/val --data-dir images", "has its own"),
    case("three lists", "finetune --data-list a b c", "--data-list: expected a list for training and one", "got 3"),
    listed("a list of one class", "mine/cat/0.png,cat\n", "at least two classes, found only cat"),
    listed("a column that is not there", "path,label,patient\nmine/cat/0.png,cat,1\nmine/dog/0.png,dog,2\n",
           "no such column in l.csv", "which has label, patient", options="--group-by pateint"),
    listed("columns without names", TWO_IMAGES, "first line of l.csv names no", options="--group-by patient"),
    listed("an image of no group", "path,label,who\nmine/cat/0.png,cat,1\nmine/dog/0.png,dog,\n",
           "column who for mine/dog/0.png", options="--group-by who"),
    listed("a single group", TWO_IMAGES, "all images are in one group", options="--group-by 1"),
    case("a column of folders", "finetune --group-by patient", "no column of a --data-list", "1 is bright"),
    case("the folder of the class", "finetune --group-by 1", "this is the folder of the class"),
    case("groups of digits", "plain-finetune --group-by 1", "--group-by 1: these images are in no folder or list"),
    case("one part", "plain-finetune --folds 1", "--folds: expected a number of parts, as 5, or one, as 2/5, got '1'"),
    case("a part that is not there, and an empty list", "plain-finetune --folds 6/5 --data-list",
         "or one, as 2/5, got '6/5'", "--data-list: expected at least one value"),
    case("more parts than images", "finetune --folds 30", "21 images or groups are too few for 30 parts"),
    case("parts from elsewhere", "finetune --folds 5 --resume last.pth", "give --resume alone, and"),
    listed("labels that are numbers", "mine/cat/0.png,3.5\nmine/cat/1.png,2\nmine/dog/0.png,7\nmine/dog/1.png,1\n",
           "l.csv: the labels are numbers, as 3.5", "use --task regression"),
    listed("a column for each label", "path,cat,dog\nmine/cat/0.png,1,0\nmine/dog/0.png,0,1\n", "multilabel or regr"),
    case("several labels in folders", "finetune --task multilabel --keep-best f1", "needs --data-list with", "f1 with"),
    images("files of other kinds alone", classes("dog") | {"mine/cat/0.HEIC": b"", "mine/cat/1.heic": b"",
           "mine/cat/notes": b""}, "no images in cat", "found 2 .heic, 1 without suffix"),
    images("an archive beside class folders", TWO | {"mine/all.tar": TAR}, "both archives, as all.tar", "move those"),
    images("an archive per class", split((), ("cat", "dog")) | {"mine/train/cat.tar": TAR, "mine/train/dog.tar": TAR},
           "mine/train: the images in its archives have no labels", "if each archive is a class", "unpack each"),
    case("no labels for fine-tuning", "finetune --dataset unlabelled", "unlabelled is for pretraining", "imagefolder"),
    case("unlabelled images to evaluate on", "pretrain --dataset unlabelled --val-dir images/val --data-list a b",
         "--val-dir with images without labels", "a second --data-list with images without labels"),
    case("a folder without classes for the accuracy", "pretrain --knn-dir images/train/dark", "classes, found none"),
    case("nothing to normalise", "pretrain --moco-version 3 --batch-size 1", "need two images", "raise --batch-size"),
    case("a pixel to normalise", "pretrain --moco-version 2 --arch resnet18 --batch-size 1", "raise --batch-size to 2"),
    case("pretraining on too few images", "pretrain --batch-size 90", "--batch-size 90", "only 21 training images"),
    # Checkpoints and adapters
    case("a pointer of git-lfs", "finetune --checkpoint a.pth", "git-lfs", "git lfs pull", files={"a.pth": LFS}),
    case("heads that do not divide", "finetune --heads 7", "7 heads do not divide the 192 features of vit_mini"),
    case("lists that unfold to more than fits", "finetune --checkpoint a.pth", "state_dict hold no tensors",
         files={"a.pth": torch_file({"state_dict": BOMB})}),
    case("an adapter for a checkpoint", "finetune --checkpoint lora.pth", "lora.pth", "no state_dict"),
    case("a checkpoint for an adapter", "evaluate base.pth images", "base.pth is not an adapter file"),
    case("no run to resume yet", "finetune --resume", "--resume out/last.pth: no such file", "start without it"),
    case("an adapter to resume", "finetune --resume lora.pth", "lora.pth is not a last.pth of this version"),
    case("another run to resume", "finetune --resume last.pth", "other settings", "augmentation was none, is crop"),
    case("pretraining resumes nothing", "pretrain --resume gone.pth", "--resume out/gone.pth: no such file"),
    adapter("an adapter whose base is gone", described(checkpoint="gone.pth"), "theirs.pth: its base", "gone.pth"),
    adapter("an adapter whose base is published", described(checkpoint="/gone/moco_v2_800ep_pretrain.pth.tar"),
            "its base, /gone/moco_v2_800ep_pretrain.pth.tar, is not there; give moco-v2-800ep as the checkpoint"),
    adapter("a surplus layer", changed("lora.pth", lambda c: c["layers"].update({"(a+)+$": next(iter(
        c["layers"].values()))})), "no layer to adapt is named (a+)+$"),
    adapter("a class too many", described(class_names=list("abcd")), "for its 4 classes heads.head.weight is (3, 192)"),
    adapter("a small file of a large head", changed("lora.pth", enlarged), "its tensors are larger than the file"),
    adapter("an unknown arch", described(arch="resnet51"), "unknown arch 'resnet51'", "did you mean resnet50?"),
    adapter("metadata of wrong types", described(arch=3, image_size="16", checkpoint=None), "arch, image_size, check"),
    adapter("another arch", described(arch="resnet18", heads=None), "for its 3 classes fc.weight is missing"),
    adapter("no metadata", changed("lora.pth", lambda c: c.update(metadata={})), "does not say its arch, class_names"),
    case("info of other tensors", "info a.safetensors", "is not an adapter file", files={"a.safetensors": TENSORS}),
    case("info of JSON nested too deeply", "info a.safetensors", "its description is no JSON",
         files={"a.safetensors": safetensors.torch.save({"w": torch.zeros(2)}, {"adapter": nested(100_000)})}),
    case("merge into a description", "merge lora.pth --output m.json", "must end in .pth or .pt or .bin"),
    case("merge onto the adapter itself", "merge lora.pth --output ./lora.pth", "lora.pth is there,"),
    case("merge onto the base", "merge lora.pth --checkpoint base.pth --output base.pth", "base.pth is there,"),
    case("merge into a folder that is not there", "merge lora.pth --output no/m.pth", "there is no folder"),
    case("predictions for an empty folder", "predict lora.pth mine --output p.csv", "no images", files={"mine/": None}),
    case("predictions for no image", "predict lora.pth mine --output p.csv",
         "none of the 1 images can be read, such as mine/a.jpg: not a readable image", files={"mine/a.jpg": "text"}),
    case("predictions in place of an image", "predict lora.pth a.csv --output a.csv", "another", files={"a.csv": PNG}),
    case("a certainty above 1", "predict lora.pth images --output p.tif --abstain 60", "at most 1, got '60'"),
    case("features that are no array", "embed lora.pth images --output f.pt", "must end in .npy"),
    case("PEFT's file in place of itself", "convert p/adapter_model.safetensors --output p",
         "p/adapter_model.safetensors is there, not known to be", files={"p/adapter_model.safetensors": ""}),
    case("answers in one file that go on", "predict lora.pth images --output p.csv --resume", "is for answers in a f"),
    case("a choice of more than there are", "choose base.pth images/val --count 16 --output o", "16: 15 images"),
    case("a choice from archives", "choose base.pth tars --output o", "are in archives", files={"tars/0.tar": TAR}),
    case("a map of archives", "predict lora.pth tars --output p.tif", "are in archives", files={"tars/0.tar": TAR}),
    case("a choice by labels", "choose several.pth images --output o", "its check", files={"several.pth": LABELS}),
    case("a folder for several labels", "evaluate several.pth images", "cannot read it", files={"several.pth": LABELS}),
    case("an adapter of another arch", "choose lora.pth images --arch resnet18 --output o", "lora.pth has its own"),
    case("thresholds of classes", "threshold lora.pth l.csv --output t.pth", "lora.pth has no thresholds: only"),
    case("a misspelt class", "explain lora.pth images/val --output o --label drak", "did you mean dark?"),
    case("a graph of an unknown kind", "export lora.pth --output m.pth", "must end in .onnx or .pt2"),
    case("a rank in the format of PEFT", "convert lora.pth --to peft --rank 2 --output x.pth", "drop --to"),
    case("images for PEFT", "convert lora.pth --to peft --images images --output x", "--images is for a lower --rank"),
    case("an output without a name", "predict lora.pth images --output ''", "an argument is empty: leave it out, or"),
    case("an output of an empty variable", "merge lora.pth --output=", "an argument is empty: leave it out, or see"),
    case("a Space that is there", "demo lora.pth --write images", "to the folder images: File exists; name another"),
    # Where results go, stage 1, and channels
    case("an output folder that is a file", "finetune --output-dir base.pth", "base.pth", "File exists; name another"),
    case("an output folder that cannot be made", "finetune --output-dir /proc/out", "/proc/out"),
    case("an output folder of a long name", f"finetune --output-dir {'n' * 300}", "File name too long; name another"),
    case("an output folder elsewhere", "finetune --output-dir s3://bucket/out", "results are written on this machine"),
    case("results among evaluation images", "finetune --output-dir images/val/out", "among the images in images/val:"),
    case("pictures among images", "explain lora.pth images/val --output images/val/seen", "name a place outside"),
    case("features among images", "embed lora.pth images --output images/val/f.npy", "is among the images in images:"),
    case("a list among labelled images", "choose lora.pth gone --labelled images --output images/next", "in images:"),
    case("lists that their run would replace",
         "finetune --data-list list.csv out/labels_to_check.csv --unlabelled out/labels_to_check.csv",
         "--data-list out/labels_to_check.csv would be", "--unlabelled out/labels_to_check.csv would be",
         files={"list.csv": "", "out/labels_to_check.csv": ""}),
    case("a run among what is shipped", f"finetune --output-dir {SHIPPED.parent}", "not known to be of an earlier run"),
    case("a checkpoint in the way", "finetune --checkpoint out/last.pth", "overwritten", files={"out/last.pth": BASE}),
    case("a base that pretraining's last epoch would replace", "pretrain --checkpoint out/moco_stage1_epoch_1.pth",
         "_epoch_1.pth would be", files={"out/moco_stage1_epoch_1.pth": BASE}),
    case("a stage-1 adapter that its run would replace", "finetune --stage1-adapter out/lora.pth",
         "--stage1-adapter out/lora.pth would be", files={"out/lora.pth": copy_of("lora.pth")}),
    case("pretraining with bad values", "pretrain --momentum 1 --temperature 0 --moco-version 4 --device gpu"
         " --lora-alpha 8 --two-crops digits --crop-min 0.5 --arch resnet18 --heads 6",
         "--momentum: expected a number", "--temperature: expected", "4' is none of 2, 3", "'gpu'",
         "--lora-alpha with --lora-rank 0", "--two-crops digits", "--arch resnet18: 6 heads are not for"),
    case("adapters of stage 1 over nothing", "pretrain --lora-rank 4", "--lora-rank 4 without --checkpoint"),
    case("a misspelt name in stage 1", "pretrain --checkpoint moco-v2-800", "not found", "did you mean moco-v2-800ep?"),
    case("a fine-tuned adapter as stage-1 adapter", "finetune --stage1-adapter lora.pth", "lora.pth does not fit"),
    case("means of other channels", "finetune --mean 0 0 --std 1", "--mean: 2 numbers; give one, or one for each of 3"),
    case("an unknown family", "finetune --normalise ssl4eo", "'ssl4eo' is none of data, ssl4eo-s12", "did you mean"),
    case("a family of other channels", "finetune --normalise ssl4eo-l", "is for 6, 7, 9, 11 channels"),
    case("too few bands", "finetune --bands 1,2", "--bands names 2 bands, and the network takes 3"),
    case("options of channels that contradict each other", "finetune --normalise data --mean 1 --channels 5000"
         " --bands red", "what is measured is not given; drop one", "--mean and --std belong together",
         "5000 channels; give a whole number from 1 to 1024", "--bands red: give numbers from 1"),
    case("numbers of no images", "finetune --mean 0 --std 0 --scale 100000000 --normalise ssl4eo-s12",
         "--std: a stand", "is too large", "brings its own --scale"),
    case("colours where there are bands", "finetune --scale 255 --augmentation trivial", "trivial is for RGB photogr"),
    case("other channels than the checkpoint's", "finetune --channels 5", "it has 3 bands, and the network takes 5"),
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
    write(workplace, classes("cat", "dog", count=3) | {"mine/dog/z.jpg": TRUNCATED})
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
