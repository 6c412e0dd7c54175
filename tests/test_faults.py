"""Runs that are killed, interrupted, starved: real processes, real signals, a real full disk."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from children import Child
from torch.utils.data import get_worker_info

import finetune_lora
from lora_utils import read_adapter_file
from moco import pretrain
from tests.run_folders import assert_identical, contents, rows_of
from toolkit import InputError
from toolkit.files import read_checkpoint
from toolkit.images import folders

TUNING = "finetune_lora --checkpoint {base} --lr 1e-2 --lora-rank 2 --lora-dropout 0.1 --accumulation-steps 2"
PRETRAINING = "moco.pretrain --image-size 8 --dim 8 --two-crops digits --moco-version 2 --queue-size 16 --knn-every 1"


@pytest.fixture
def start(base, images, tmp_path):
    """start("lora", "--epochs 1", "out") begins a run of one of the ways; a Child with its output folder."""

    def start(way: str = "lora", options: str = "", output: str = "out", log: str = "", before=None) -> Child:
        typed = PRETRAINING if way == "pretrain" else TUNING.format(base=base)
        module, own = typed.split(maxsplit=1)
        common = f"{own} --data-dir {images} --output-dir {tmp_path / output} --device cpu --epochs 2 --batch-size 3"
        child = Child(module, f"{common} {options}", tmp_path / f"{log or output}.log", before)
        child.folder = tmp_path / output
        return child

    return start


def outcome(folder: Path) -> dict:
    """All that a run leaves behind but times: every tensor and every number."""
    found = {"metrics": [row | {"seconds": 0} for row in rows_of(folder / "metrics.csv")]}
    results = json.loads((folder / "results.json").read_text())
    free = ("seconds", "images_per_second", "waiting_share", "peak_memory_bytes", "config", "adapter_bytes")
    free += ("checkpoint", "metrics")  # of pretraining: paths
    found["results"] = {key: value for key, value in results.items() if key not in free}
    found["results"].get("verdict", {}).pop("next_step", None)  # a command with the folder's name
    if (folder / "lora.pth").exists():
        found["adapter"] = read_adapter_file(folder / "lora.pth")["tensors"]
        state = read_checkpoint(folder / "last.pth")
        return found | {"optimizer": state["optimizer"]["state"], "rng": state["rng"]}
    return found | {"model": read_checkpoint(folder / "moco_stage1_epoch_2.pth")["model"]}


@pytest.mark.slow
@pytest.mark.parametrize(("way", "signum", "workers"), [("lora", signal.SIGTERM, 1), ("pretrain", signal.SIGINT, 0)])
def test_a_run_that_is_interrupted_and_killed_goes_on_and_ends_in_the_same_bits(start, way, signum, workers):
    whole = start(way, output="whole")
    stopped = start(way, f"--workers {workers}")
    stopped.wait_for(lambda: stopped.output.count("loss=") >= 3)
    stopped.send(signum)  # to its workers too
    assert stopped.wait() == 128 + signum, stopped.output
    message = stopped.output.strip().splitlines()[-1]
    assert message.startswith("Stopped; 0 of 2 epochs") and str(stopped.folder / "last.pth") in message
    assert message.endswith("To go on: the same command with --resume") and "Traceback" not in stopped.output
    assert read_checkpoint(stopped.folder / "last.pth")["progress"]["loss_sum"] > 0  # within the first epoch
    when = random.Random(way)
    for number in range(2):
        resumed = start(way, "--resume", log=f"resumed {number}")
        steps = when.randrange(1, 4)
        resumed.wait_for(lambda child=resumed, steps=steps: child.output.count("loss=") >= steps)
        time.sleep(when.uniform(0, 0.05))
        resumed.send(signal.SIGKILL)
        assert resumed.wait() == -signal.SIGKILL
    children = [start(way, "--resume", log="resumed"), whole]
    assert [child.wait() for child in children] == [0, 0], [child.output for child in children]
    assert_identical(*(outcome(child.folder) for child in children))


def never_ending_step():
    step = torch.optim.AdamW.step
    torch.optim.AdamW.step = lambda *args, **kwargs: (time.sleep(60), step(*args, **kwargs))


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(start):
    child = start(before=never_ending_step)
    child.wait_for(lambda: "epoch 1/2" in child.output)
    before = read_checkpoint(child.folder / "last.pth")
    time.sleep(0.5)
    child.send(signal.SIGINT)
    time.sleep(0.5)
    assert child.process.exitcode is None  # it finishes its step
    child.send(signal.SIGINT)
    assert child.wait(5) == 130
    assert child.output.strip().splitlines()[-1] == "interrupted"
    assert_identical(read_checkpoint(child.folder / "last.pth"), before)
    assert not list(child.folder.glob(".*"))


@pytest.mark.slow
def test_a_folder_in_which_a_run_is_going_on_is_left_alone(start):
    """Until that run is killed, though its loading processes live a little longer: then it goes on at once."""
    first = start(options="--workers 1", before=never_ending_step)
    first.wait_for(lambda: "epoch 1/2" in first.output)
    before = contents(first.folder)
    for way, more in (("lora", "--resume"), ("pretrain", "")):
        second = start(way, more, log=f"second {way}")
        assert_one_line(second, f"{first.folder}: another run or command (process {first.process.pid} on ", "let it")
    assert contents(first.folder) == before
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.join()
    resumed = start(options="--resume", log="resumed")
    assert resumed.wait() == 0, resumed.output
    with contextlib.suppress(ProcessLookupError):
        first.send(signal.SIGKILL)  # its workers
    assert not list(first.folder.glob(".*"))


def test_what_comes_into_a_run_s_folder_while_it_trains_stays(finetune, tmp_path):
    """A page of the user's; the run's own, which a later epoch writes again, is replaced."""
    page = tmp_path / "out/report.html"
    with pytest.raises(InputError, match=r"report\.html came there meanwhile and stays: the result is in .*html-1$"):
        finetune("--epochs 2", after_epoch=lambda run: page.write_text("mine"))
    assert page.read_text() == "mine" and "<h1>" in page.with_name("report.html-1").read_text()
    assert len(outcome(page.parent)["metrics"]) == 2 and len(list(page.parent.glob("*-1"))) == 1
    with pytest.raises(InputError, match=r"report\.html came there .* is in .*html-2$"):
        finetune("--resume")
    assert page.read_text() == "mine"


@contextlib.contextmanager
def file_system(folder: Path, size: str):
    """A file system of its own at `folder`, of so many bytes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a file system takes root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def assert_one_line(child: Child, *parts: str) -> None:
    assert child.wait() == 2, child.output
    message = child.output.strip().splitlines()[-1]
    assert message.startswith("error: ") and all(part in message for part in parts), message
    assert "Traceback" not in child.output


@pytest.mark.slow
@pytest.mark.parametrize(("way", "size"), [("lora", "8m"), ("pretrain", "80m")])
def test_a_full_disk(start, tmp_path, way, size):
    with file_system(tmp_path / "out", size):
        child = start(way)
        child.wait_for((child.folder / "last.pth").exists)
        with open(child.folder / "ballast", "wb") as ballast, pytest.raises(OSError):
            while True:
                ballast.write(bytes(2**20))
                ballast.flush()
        assert_one_line(child, f"cannot write {child.folder}", "No space left on device", "free space")
        assert not list(child.folder.glob(".*"))
        (child.folder / "ballast").unlink()
        read_checkpoint(child.folder / "last.pth")  # whole
        resumed = start(way, "--resume", log="resumed")
        assert resumed.wait() == 0, resumed.output
        assert len(outcome(child.folder)["metrics"]) == 2


def end_files_at_20_kb() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))


def test_a_graph_on_a_full_disk_is_one_line(adapter_for_images, tmp_path):
    """PyTorch's own writer of graphs would end the process with what C++ says."""
    options = f"export {adapter_for_images} --output {tmp_path}/model.pt2"
    assert_one_line(Child("deploy_lora", options, tmp_path / "log", end_files_at_20_kb), f"cannot write {tmp_path}")


def kill_a_worker_at_an_image() -> None:
    """As the kernel does where memory runs out."""
    real = folders.open_image

    def kills_its_process(path):
        if get_worker_info() is not None and str(path).endswith("dark/3.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path)

    folders.open_image = kills_its_process


@pytest.mark.parametrize("way", ["lora", pytest.param("pretrain", marks=pytest.mark.slow)])
def test_a_killed_worker_is_one_line(start, way):
    child = start(way, "--workers 1", before=kill_a_worker_at_an_image)
    assert_one_line(child, "a process that loads images was killed", "--workers 0")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["prepare", "FineTuning.__init__", "FineTuning.note_steps", "Pretraining.note_steps"])
def test_out_of_memory_says_what_saves_it(base, images, tmp_path, place):
    script, what, options = finetune_lora, "--gradient-checkpointing full", f"--checkpoint {base}"
    if place.startswith("Pretraining"):
        script, what, options = pretrain, "--precision bf16", "--image-size 8 --batch-size 8 --two-crops digits"
    told = f"^out of memory on cpu: lower --batch-size .* {what}"
    with pytest.raises(InputError, match=told), mock.patch(f"{script.__name__}.{place}", side_effect=MemoryError()):
        script.main(f"--data-dir {images} --output-dir {tmp_path} --device cpu {options}".split())
