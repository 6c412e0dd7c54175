"""Runs that are stopped and go on, how they begin and fail, and what they write where."""

import argparse
import errno
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from children import ROOT, Child

import deploy_lora
import finetune_lora
from lora_utils import read_adapter_file
from moco import pretrain
from tests.run_folders import assert_same_tensors, contents, metrics, names_in, stop
from toolkit import InputError, devices
from toolkit.files import open_atomically, read_checkpoint, write_text
from toolkit.run import optim, output_folder, reports, run_state, runs

WAYS = {
    "4 bits": "--use-qlora --label-smoothing 0.1",
    "masks": "--task segmentation --data-dir {pairs} --batch-size 4",
    "labels": "--task multilabel --data-dir {hospital} --data-list {hospital}/labels.csv --label-columns sick well"
    " --adapt-last 1",
    "features of views": "--adapt-last 1 --augmentation crop --cache-features disk",
    "norms that follow": "--checkpoint {resnet} --image-size 32 --labels-per-class 2 --norms follow --lora-init random",
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_goes_on_bit_for_bit(finetune, hospital, pairs, saved, narrow, way, tmp_path, monkeypatch):
    """It stopped at the first step of its second epoch, and has other workers from then on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = WAYS[way].format(hospital=hospital, pairs=pairs, resnet=saved(narrow))
    whole = finetune(options, output="whole")
    with pytest.raises(runs.Stopped):
        finetune(options, output="stopped", after_epoch=lambda run: run.stop._note(2, None))
    resumed = finetune(f"{options} --workers 1 --resume", output="stopped")
    assert resumed["epochs"] == 2 and resumed["val_loss"] == whole["val_loss"]
    paths = [of["folder"] / "lora.pth" for of in (resumed, whole)]
    ours, theirs = (read_adapter_file(path)["metadata"].get("task") for path in paths)
    assert ours == theirs
    assert_same_tensors(*paths)


def test_an_automatic_precision_is_recorded_and_kept(finetune, once, monkeypatch):
    """Measured once: by a resumed run no more, whatever the processor."""
    assert read_adapter_file(once / "lora.pth")["metadata"]["config"]["finetune"]["precision"] == "fp32"
    monkeypatch.setattr(devices, "faster_dtype", lambda *_: torch.bfloat16)
    assert finetune("--epochs 1 --resume")["precision"] == "float32"


def test_a_run_is_not_resumed_with_other_images_classes_weights_or_norms(finetune, once, base, images, tmp_path):
    """An added image moves none of the others, but training would go on with what the run has not begun with."""
    shutil.copytree(images, tmp_path / "moved")
    shutil.copy(base, tmp_path / "moved.pth")
    moved = f"--epochs 1 --data-dir {tmp_path / 'moved'} --checkpoint {tmp_path / 'moved.pth'} --resume"
    with pytest.raises(InputError, match="norms was frozen, is train"):
        finetune(f"{moved} --norms train")  # its LayerNorms would train from here on
    write(once, "config.yaml", "labels_to_check.csv")  # edited: they stay
    # Norms that are frozen, as those of a ResNet on a GPU, are no other setting, nor is another place
    with mock.patch.object(finetune_lora, "settled_norms", lambda *_: "frozen"):
        assert finetune(moved)["images"] == json.loads((once / "results.json").read_text())["images"]
    for name in ("config.yaml", "labels_to_check.csv"):
        assert (once / name).read_text() == name
    content = torch.load(base)
    content["state_dict"] = {name: 1.01 * tensor for name, tensor in content["state_dict"].items()}
    torch.save(content, tmp_path / "moved.pth")
    with pytest.raises(InputError, match=r"was trained over another base than .*moved\.pth: give its --checkpoint"):
        finetune(moved)
    shutil.copy(images / "train/dark/0.png", tmp_path / "moved/train/dark/new.png")
    with pytest.raises(InputError, match=r"trained on other images than .*moved holds now: .*drop --resume"):
        finetune(moved)
    torch.save(read_checkpoint(once / "last.pth") | {"class_names": ["a", "b", "c"]}, once / "other.pth")
    with pytest.raises(InputError, match=r"belongs to a run with other settings \(other classes\)"):
        finetune(f"--epochs 1 --resume {once / 'other.pth'}")


def test_a_run_goes_on_with_the_images_without_labels_that_it_had_wherever_they_lie(saved):
    def resumed(was, now, images: str) -> dict:
        state = {"config": {"data": {"unlabelled": was}}, "images": "a digest", "base": {}}
        own = state | {"config": {"data": {"unlabelled": now}}, "images": images}
        of_run = argparse.Namespace(data_dir="mine"), saved(state), state.keys()
        return run_state.state_of_same_run(*of_run, own, {"data.unlabelled"})

    assert resumed("pool", "moved", "a digest")
    for was, now, told in (
        (None, "pool", "--unlabelled was not given in the run of .*, and is pool now: resume with the same images"),
        ("pool", "other", "--unlabelled was pool in the run of .*, and is other now"),
        ("pool", "pool", "other images than mine or pool holds now"),
    ):
        with pytest.raises(InputError, match=told):
            resumed(was, now, "another")


def test_a_run_goes_on_elsewhere_with_its_rates_times_and_files(finetune, finished_once, once, spy, monkeypatch):
    """Rates are the optimizer's, whatever this version would choose; the head's temperature depends on them."""
    monkeypatch.setattr(finetune_lora.initialization, "ADAPTER_LR_FACTOR", 2.0)
    monkeypatch.setattr(optim, "run_divisor", lambda *_: 5.0)
    train = spy(finetune_lora, "train")
    resume = f"--epochs 1 --resume {once / 'last.pth'}"
    again = finetune(resume, "elsewhere", after_epoch=lambda run: pytest.fail("nothing was left to do"))
    assert names_in(again["folder"]) == names_in(once)
    resumed, *_ = train.call_args.args
    assert (resumed.adapter_lr_factor, resumed.rate) == (24, 1e-3)
    for name in ("seconds", "images_per_second", "waiting_share"):
        assert again[name] == finished_once[name] > 0, name
    state = read_checkpoint(once / "last.pth")  # as of a run that was begun before there was calibration
    torch.save(state | {"head_temperature": state["head_temperature"][:2]}, once / "old.pth")
    results = finetune(f"--epochs 1 --resume {once / 'old.pth'}")
    assert "temperature" not in results and "temperature" not in read_adapter_file(once / "lora.pth")["metadata"]


def test_the_best_epoch_is_not_looked_for_in_another_folder_nor_made_of_the_last(finetune, once, tmp_path):
    shutil.copytree(once, tmp_path / "elsewhere")
    shutil.copy(once / "last.pth", once / "copy.pth")  # which need not be of the run whose lora.pth that is
    for folder, state in (("elsewhere", "last.pth"), ("out", "copy.pth"), ("out", "last.pth")):
        if state == "last.pth" and folder == "out":
            (once / "lora.pth").unlink()
        with pytest.raises(InputError, match=r"\.pth is to be last\.pth in --output-dir, with the best adapter"):
            finetune(f"--epochs 1 --keep-best accuracy --resume {once / state}", output=folder)


def test_a_run_that_is_stopped_again_and_again_ends_as_if_it_never_was(finetune, monkeypatch, tmp_path):
    """Bit for bit, also by a link to its folder. What it has judged or calibrated it does not twice."""
    options = "--labels-per-class 2 --keep-best accuracy"
    whole = finetune(options, "whole")
    with monkeypatch.context() as patch, pytest.raises(runs.Stopped):
        patch.setattr(runs.StopRequests, "checked", stop)  # while it is evaluated
        finetune(options, "stopped")
    state = read_checkpoint(tmp_path / "stopped/last.pth")
    assert state["history"] == [] and len(state["guard"]["scores"]) == 1
    of_start = read_adapter_file(tmp_path / "stopped/lora.pth")["metadata"]
    assert (of_start["epoch"], of_start["val_accuracy"]) == (0, state["baseline"]["probe"])

    def stop_after_the_last_step(run) -> None:
        if len(run.history) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(runs.Stopped, match="2 of 2 epochs are saved"):  # else a cross-validation began its next part
        finetune(f"{options} --resume", "stopped", after_epoch=stop_after_the_last_step)
    assert not isinstance(getattr(signal.getsignal(signal.SIGINT), "__self__", None), runs.StopRequests)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reports, "write_finetuning", mock.Mock(side_effect=KeyboardInterrupt))
        finetune(f"{options} --resume", "stopped")  # its lora.pth is calibrated, and its results are not written
    (tmp_path / "link").symlink_to(tmp_path / "stopped")
    resumed = finetune(f"{options} --resume {tmp_path / 'stopped/last.pth'}", "link")
    assert_same_tensors(resumed["folder"] / "lora.pth", whole["folder"] / "lora.pth")
    assert names_in(resumed["folder"]) == names_in(whole["folder"]) and len(metrics(resumed["folder"])) == 2
    ours, theirs = (read_checkpoint(of["folder"] / "last.pth")["guard"]["scores"] for of in (resumed, whole))
    assert ours == theirs
    for name in ("temperature", "calibration_error", "val_loss"):
        assert resumed[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-6), name


# -------------------------------------------------------------------------------------------------- toolkit/run/runs.py


def end_a_script() -> None:
    """In a child: what stands in for a run prints a name whose bytes are no text, and ends as it is told."""

    def main(argv):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print("epoch 1")
        print("a warning", file=sys.stderr)
        print("caf\udce9.jpg")
        steps = range(3)
        if "bar" in argv:
            steps = runs.progress_bar(steps, "epoch", mininterval=0)
        for _ in steps:
            if "stop" in argv:
                raise runs.Stopped(signal.SIGTERM, "Stopped")
            if "ctrl-c" in argv:
                os.kill(os.getpid(), signal.SIGINT)
            raise InputError("disk full")

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as it is while packages load
    finetune_lora.main = main


def test_a_log_has_every_line_in_its_place_and_the_error_last(tmp_path):
    """In a newcomer's environment Python buffers what it prints into a file. The end is not behind a bar."""
    full = "error: disk full"
    for argv, code, end in (
        ("", 2, full),
        ("bar", 2, full),
        ("bar stop", 143, "Stopped"),
        ("ctrl-c", 130, "interrupted"),
    ):
        child = Child("finetune_lora", argv, tmp_path / f"log {argv}", before=end_a_script)
        assert child.wait() == code, child.output
        lines = child.log.read_bytes().decode().split("\n")  # as text, a bar's returns would be lines
        assert lines[:3] == ["epoch 1", "a warning", r"caf\udce9.jpg"]
        assert lines[-2:] == [end, ""] and ("epoch:" in "".join(lines)) == ("bar" in argv)


def count_faults() -> None:
    """In a child: what stands in for a run prints how many pages each tensor of 64 MB gets from the system."""

    def main(argv):
        faults = []
        for _ in range(11):
            torch.ones(2**24)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        print((faults[-1] - faults[0]) // 10)

    finetune_lora.main = main


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its memory is another's")
def test_freed_memory_is_kept_for_the_next_tensor(tmp_path):
    """A run of a script gets its pages once, not with each tensor; settings of the user's own stay."""
    faults = {}
    for name, environment in {"own": {}, "users": {"MALLOC_MMAP_THRESHOLD_": str(2**20)}}.items():
        child = Child("finetune_lora", "", tmp_path / name, count_faults, environment)
        assert child.wait() == 0, child.output
        faults[name] = int(child.output)
    assert faults["own"] < 20 < faults["users"]  # 16,384 pages of 4 kB, or 32 of 2 MB


def test_freed_memory_is_kept_by_runs_in_a_notebook_too(monkeypatch):
    monkeypatch.setattr(runs, "keep_freed_memory", mock.Mock(side_effect=InterruptedError))
    monkeypatch.setattr(devices, "select_device", mock.Mock(side_effect=ValueError))  # no run is to begin
    for main in (finetune_lora.main, pretrain.main):
        with pytest.raises(InterruptedError):
            main([])


def print_much() -> None:
    sys.stdout = open(1, "w", closefd=False)  # pytest's may seek  # noqa: SIM115
    finetune_lora.main = lambda argv: print(*range(100_000), sep="\n")


def test_a_reader_that_stops_early_ends_the_script_without_a_traceback(tmp_path):
    """As in `deploy_lora.py info lora.pth | head`. With a traceback the exit code would be 1 or 120."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    child = Child("finetune_lora", "", pipe, print_much)
    with open(pipe) as reader:
        assert reader.readline() == "0\n"
    child.process.join(60)
    assert child.process.exitcode == 141


def test_what_the_system_lacks_becomes_a_line_with_a_remedy():
    for error, told in (
        (RuntimeError("CUDA error: out of memory"), "out of memory on meta: lower it"),
        (RuntimeError("CUDNN_STATUS_ALLOC_FAILED in conv"), "out of memory on meta: lower it"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory on meta: lower it"),
        (MemoryError(), "out of memory on cpu: lower it"),
        (OSError(24, "Too many open files"), "ulimit -n.* use fewer --workers"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n.* use fewer --workers"),
        (RuntimeError("unable to write to </torch_1_2_3>: No space left on device (28)"), "/dev/shm.* use fewer --wo"),
        (OSError(28, "No space left on device"), "/dev/shm.* use fewer --wo"),  # of a lock, which a process needs
        (RuntimeError("DataLoader worker (pid 1) is killed: Bus error. ... shared memory ..."), "/dev/shm.* use fewer"),
    ):
        with pytest.raises(InputError, match=told), runs.faults_explained(torch.device("meta"), "lower it"):
            raise error
    with pytest.raises(OSError, match="Input/output error"), runs.faults_explained(None, ""):
        raise OSError(5, "Input/output error")  # another stays what it is


@pytest.mark.parametrize(("handler", "code", "told"), [("default_int_handler", 130, ""), ("SIG_IGN", 0, "went on\n")])
def test_ctrl_c_ends_without_a_word_while_packages_load(handler, code, told):
    """Unless it is ignored, as of a command that nohup has started."""
    script = f"import os, signal\nfrom toolkit import config\nsignal.signal(signal.SIGINT, signal.{handler})\n"
    script += "config.check_command_line(lambda *_: None, '')\nos.kill(os.getpid(), signal.SIGINT)\nprint('went on')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (code, told, "")


# --------------------- toolkit/run/output_folder.py: what a run may write where, and how nothing of another run is lost


def write(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(name)


def problems(output_dir: Path, written: tuple[str, ...] = (), **images: Path) -> list[str]:
    places = {"dataset": "imagefolder", "data_dir": None, "data_list": None, "val_dir": None} | images
    return list(output_folder.problems(argparse.Namespace(output_dir=output_dir, **places), written))


@pytest.mark.parametrize("option", ["data_dir", "knn_dir", "unlabelled"])
@pytest.mark.parametrize("parts", [("cat", "dog"), ("train", "val"), ("train", "validation", "test")])
def test_results_may_not_lie_among_the_images(tmp_path, parts, option):
    """They would be a class of their own in the next run, which removes them."""
    for part in parts:
        (tmp_path / part).mkdir(parents=True)
    refused = {"../out": False, "out": "cat" in parts} | dict.fromkeys((f"{part}/deep/out" for part in parts), True)
    for output, is_among in refused.items():
        found = problems(tmp_path / output, **{option: tmp_path})
        assert len(found) == is_among and all("is among the images in" in problem for problem in found)
    assert len(problems(tmp_path / "out", val_dir=tmp_path)) == 1


def test_images_may_lie_in_a_users_own_folds_and_not_among_the_parts_of_a_run(tmp_path, monkeypatch):
    (tmp_path / "folds/1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "folds/1")
    assert problems(tmp_path, ("folds",), data_dir=Path()) == []
    Path("last.pth").touch()
    assert "--data-dir . would be overwritten" in problems(tmp_path, ("folds",), data_dir=Path())[0]


def test_files_of_these_names_are_a_users_unless_a_run_wrote_one_of_them(finished_once, tmp_path):
    """And an earlier run's if it did: the others may have gone."""
    for of_a_run in ("config.yaml", "last.pth", "lora.pth", "results.json", "folds", ".moving"):
        users = tmp_path / of_a_run
        write(users, "metrics.csv")
        (users / "config.yaml").write_text("# settled:\nfinetune: {lora_rank: 4}\n")
        [problem] = problems(users, output_folder.FINE_TUNING_FILES)
        assert problem.startswith(f"{users}/config.yaml, {users}/metrics.csv: not known to be of an earlier run: move")
        if of_a_run in ("folds", ".moving"):
            write(users / of_a_run / "1", "last.pth")
        else:
            shutil.copy(finished_once["folder"] / of_a_run, users)
        assert problems(users, output_folder.FINE_TUNING_FILES) == []


def test_an_earlier_runs_files_and_nothing_else_are_moved_aside(tmp_path, capsys):
    folder = tmp_path / "lora"
    files = {"lora.pth", "last.pth"}
    for resumed, more, left, told in (
        (folder / "last.pth", [], files, ""),
        (None, ["results.json"], set(), f"the earlier run in {folder} is now in {folder}-1\n"),
        (tmp_path / "other" / "last.pth", [], set(), f"is now in {folder}-2, unfinished (--resume"),
        (folder / "copy.pth", [], set(), f"is now in {folder}-3, unfinished (--resume"),
    ):
        write(folder, *files, "notes.txt", *more)
        output_folder.begin_folder(folder, (*files, "results.json"), resumed)
        assert names_in(folder) == {"notes.txt", *left}
        printed = capsys.readouterr().out
        assert told in printed and bool(told) == bool(printed) == printed.endswith("of that run: notes.txt\n")
    output_folder.begin_folder(folder, ("lora.pth",))  # there is nothing to move
    moved = {path.name: names_in(path) for path in tmp_path.iterdir() if path != folder}
    assert moved == {"lora-1": {*files, "results.json"}, "lora-2": files, "lora-3": files}
    assert contents(tmp_path / "lora-1")["last.pth"] == b"last.pth"


@pytest.mark.parametrize("moves", range(5))
def test_a_run_that_is_killed_while_it_moves_another_aside_leaves_that_whole(tmp_path, monkeypatch, capsys, moves):
    """Between two files, or before the folder gets its name: the next run moves the rest to the same place."""
    names = ("config.yaml", "lora.pth", "last.pth", "results.json")
    folder = tmp_path / "lora"
    write(folder, *names)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        done = [mock.DEFAULT] * moves
        patch.setattr(os, "rename", mock.Mock(wraps=os.rename, side_effect=[*done, KeyboardInterrupt]))
        output_folder.begin_folder(folder, names)
    assert moves == 0 or not (folder / "last.pth").exists()  # no run resumes what is torn
    output_folder.begin_folder(folder, names)
    assert capsys.readouterr().out == f"the earlier run in {folder} is now in {folder}-1\n"
    assert list(folder.iterdir()) == [] and names_in(tmp_path) == {"lora", "lora-1"}
    assert contents(tmp_path / "lora-1") == {name: name.encode() for name in names}
    write(folder, "lora.pth")
    write(folder / output_folder.MOVING, "lora.pth")
    with pytest.raises(InputError, match=r"lora\.pth is there already; name another"):
        output_folder.begin_folder(folder, names)


def test_an_earlier_run_that_cannot_be_moved_aside_stays_as_it_is(tmp_path, monkeypatch):
    folder = tmp_path / "lora"
    write(folder, "lora.pth", "last.pth")
    steps = [mock.DEFAULT, mock.DEFAULT, OSError(errno.EXDEV, "Invalid cross-device link"), mock.DEFAULT, mock.DEFAULT]
    with monkeypatch.context() as patch, pytest.raises(InputError, match="Invalid cross-device link; name another"):
        patch.setattr(os, "rename", mock.Mock(wraps=os.rename, side_effect=steps))
        output_folder.begin_folder(folder, output_folder.FINE_TUNING_FILES)
    assert contents(folder) == {"lora.pth": b"lora.pth", "last.pth": b"last.pth"}


def test_what_comes_to_be_there_while_a_file_is_written_stays(tmp_path):
    with (
        pytest.raises(InputError, match=r"map\.tif came there meanwhile and stays: the result is in \S+map\.tif-2$"),
        output_folder.left_alone(lambda path: not path.exists()),
        open_atomically(tmp_path / "map.tif") as file,
    ):
        write(tmp_path, "map.tif", "map.tif-1")
        file.write(b"answers")
    assert contents(tmp_path) == {"map.tif": b"map.tif", "map.tif-1": b"map.tif-1", "map.tif-2": b"answers"}


@pytest.mark.parametrize("resumed, stays", [(None, {"lora.pth", "notes.txt"}), ("last.pth", {"notes.txt"})])
def test_a_run_replaces_what_it_wrote_what_it_resumes_and_files_elsewhere(tmp_path, resumed, stays):
    folder = tmp_path / "out"
    with pytest.raises(InputError) as raised, output_folder.held(folder, ["lora.pth"], resumed and folder / resumed):
        write(folder, "lora.pth", "notes.txt")
        write(tmp_path, "lora.pth")
        for path in [folder / "new", tmp_path / "lora.pth", folder / "lora.pth", folder / "notes.txt"] * 2:
            write_text("run", path)
    assert str(raised.value).partition(" came")[0] == ", ".join(str(folder / name) for name in sorted(stays))
    written = {"lora.pth", "new", "notes.txt"} - stays | {f"{name}-1" for name in stays}
    assert contents(folder) == {name: name.encode() for name in stays} | dict.fromkeys(written, b"run")
    assert (tmp_path / "lora.pth").read_text() == "run" and names_in(tmp_path) == {"lora.pth", "out"}


def test_what_was_made_of_an_earlier_runs_adapter_goes_with_it(once):
    """And a README.md, or folder `folds`, of the user's own stays."""
    deploy_lora.main(["card", str(once / "lora.pth"), "--output", str(once / "README.md")])
    card = (once / "README.md").read_bytes()
    write(once, "notes.txt", "lora_evaluation.html")
    output_folder.begin_folder(once, output_folder.FINE_TUNING_FILES)
    assert names_in(once) == {"notes.txt"}
    aside = contents(once.with_name("out-1"))
    assert {"lora.pth", "lora_evaluation.html"} < aside.keys() and aside["README.md"] == card
    (once / "README.md").write_text("# My experiments\n\n## Settings\n")
    write(once / "folds/1", "list.csv")
    for left in ({"folds"}, set()):
        write(once, "lora.pth")
        output_folder.begin_folder(once, output_folder.FINE_TUNING_FILES)
        assert names_in(once) == {"notes.txt", "README.md", *left}
        write(once / "folds/1", "last.pth")


def test_stage_1_moves_a_fine_tuning_aside_as_a_whole(once):
    args = argparse.Namespace(output_dir=once, epochs=3)
    there = names_in(once)
    with output_folder.held(once, pretrain.written(args)) as begin:
        begin()
    assert contents(once) == {} and names_in(once.with_name("out-1")) == there
    write(once, "config.yaml", "results.json")  # the first is a user's, where there is no adapter
    output_folder.begin_folder(once, pretrain.written(args))
    assert names_in(once) == {"config.yaml"}


def test_the_folder_may_be_the_one_that_the_run_was_started_in_or_a_link(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link").symlink_to(tmp_path / "real")
    for number, folder in enumerate((Path(), tmp_path / "elsewhere/link"), 1):
        write(tmp_path / "real", "lora.pth")
        monkeypatch.chdir(tmp_path / "real")
        output_folder.begin_folder(folder, ("lora.pth",))
        assert names_in(tmp_path / f"real-{number}") == {"lora.pth"} and not names_in(tmp_path / "real")


def test_a_folder_is_locked_while_it_is_used_and_has_then_what_is_whole(tmp_path):
    """Nothing remains of a new one into which nothing was written, and nothing of what a killed run left halfway."""
    folder = tmp_path / "new" / "deeper"
    with pytest.raises(InputError, match="bad image"), output_folder.held(folder):
        assert (folder / output_folder.LOCK).exists()
        raise InputError("bad image")
    assert list(tmp_path.iterdir()) == []
    others = {"last.pth", ".running", ".notes.4711.tmp", ".map.tif.12.half"}  # of other programs, or of a command
    write(folder, ".lora.pth.4711.half", *others)
    with open_atomically(folder / "lora.pth"):
        assert len(list(folder.glob(output_folder.HALVES.format("lora.pth")))) == 2
    (folder / "lora.pth").unlink()
    with output_folder.held(folder, ["lora.pth"]):
        assert names_in(folder) == others | {output_folder.LOCK}
    assert contents(folder) == {name: name.encode() for name in others}


def test_a_system_without_locks_goes_on_without_one(tmp_path, monkeypatch):
    error = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(pytest.importorskip("fcntl"), "lockf", mock.Mock(side_effect=error))
    for _ in range(2):
        with output_folder.held(tmp_path):
            assert names_in(tmp_path) == {output_folder.LOCK}
        assert not names_in(tmp_path)
        monkeypatch.setattr(output_folder, "fcntl", None)  # as on Windows


def test_on_a_full_disk_a_run_says_what_it_cannot_write_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(InputError, match="cannot write config"), output_folder.held(tmp_path / "new"):
        raise InputError("cannot write config.yaml")
    assert not names_in(tmp_path)


def test_a_lock_that_its_run_removes_in_this_moment_is_made_anew(tmp_path, monkeypatch):
    """Else two later runs would hold a file each: one without a name, and one with."""
    fcntl = pytest.importorskip("fcntl")
    lockf = fcntl.lockf
    removed = []

    def slow(*given):
        if not removed:
            removed.append((tmp_path / output_folder.LOCK).unlink())
            (tmp_path / output_folder.LOCK).touch()  # by a later run
        return lockf(*given)

    monkeypatch.setattr(fcntl, "lockf", slow)
    with output_folder.held(tmp_path):
        assert (tmp_path / output_folder.LOCK).read_text().startswith("process ")
