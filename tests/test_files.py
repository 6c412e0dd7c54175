"""Files: read without running code or taking more memory than they hold, and written whole or not at all."""

import argparse
import contextlib
import functools
import io
import os
import pickle
import re
import resource
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from tests.checkpoint_files import rezipped, torch_file
from tests.image_files import bytes_of, little_memory
from tests.run_folders import names_in
from toolkit import InputError, files
from toolkit.models.checkpoints import load_backbone


def test_paths_in_files_hold_on_other_machines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = Path("checkpoints/moco_stage1/README.md")
    assert files.stored_path(files.TOOLKIT / inside) == inside
    assert files.found_path(inside) == files.TOOLKIT / inside
    assert files.stored_path(tmp_path / "base.pth") == tmp_path / "base.pth"
    assert files.stored_path(files.TOOLKIT / "../base.pth") == files.TOOLKIT / "../base.pth"  # which is outside
    assert files.stored_path("base.pth") == files.found_path("base.pth") == Path("base.pth")  # which is nowhere
    (tmp_path / "README.md").write_text("mine")
    assert files.found_path("README.md").read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_a_file_whose_name_is_not_utf_8_is_read(tmp_path):
    """PyTorch maps none such: a run with such a folder would fail when it is finished."""
    weights = {"weight": torch.ones(3)}
    files.save_atomically(weights, tmp_path / "caf\udce9.pth")
    files.write_safetensors(weights, tmp_path / "caf\udce9.safetensors", {"key": "value"})
    assert files.read_checkpoint(tmp_path / "caf\udce9.pth")["weight"].tolist() == [1, 1, 1]
    tensors, described = files.read_safetensors(tmp_path / "caf\udce9.safetensors")
    assert tensors["weight"].tolist() == [1, 1, 1] and described == {"key": "value"}


def test_plain_data_of_official_files_is_read(saved):
    content = {
        **{"tensor": torch.arange(6.0).reshape(2, 3).T, "bfloat16": torch.ones(2, dtype=torch.bfloat16)},
        **{"parameter": nn.Parameter(torch.ones(2)), "empty": torch.empty(0, 4), "scalar": torch.tensor(3)},
        **{"complex": torch.ones(2, dtype=torch.complex64), "expanded": torch.ones(1).expand(10_000)},
        **{"sparse": torch.eye(3).to_sparse(), "dtype": torch.float16, "device": torch.device("cuda", 1)},
        **{"best_acc1": np.float64(71.5), "rank": np.int64(3), "done": np.bool_(True), "loss": np.float32(0.5)},
        **{"label": np.uint8(200), "ordered": OrderedDict(a=1), "args": argparse.Namespace(lr=0.1, steps=[120, 160])},
        **{"deep": functools.reduce(lambda part, _: [part], range(40), 0)},  # lists have no hash
        "state": (1, None, True, 2**70, b"bytes", "text", {1, 2}, 1e-300, torch.Size([2, 3])),
        ("a", ("key", 2)): [1],
    }
    later = {"fp8": torch.ones(2).to(torch.float8_e4m3fn)}  # than the legacy format
    for given, zipped in ((content, False), (content | later, True)):
        read = files.read_checkpoint(saved(given, _use_new_zipfile_serialization=zipped))
        assert list(read) == list(given) and type(read["best_acc1"]) is float
        for key, value in given.items():
            if torch.is_tensor(value):
                assert read[key].dtype == value.dtype
                assert torch.equal(read[key].to_dense().to(torch.complex64), value.to_dense().to(torch.complex64))
            else:
                assert read[key] == value


def test_tensors_of_a_gpu_are_read_on_the_cpu(tmp_path):
    content = torch_file({"w": torch.ones(3)})
    of_gpu = rezipped(content, lambda _, data: data.replace(b"\x03\0\0\0cpu", b"\x04\0\0\0cuda"))
    (tmp_path / "a.pth").write_bytes(of_gpu)
    assert files.read_checkpoint(tmp_path / "a.pth")["w"].device.type == "cpu" and b"cuda" in of_gpu


def pickled(content: bytes, zipped: bool) -> bytes:
    if zipped:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("checkpoint/data.pkl", content)
            archive.writestr("checkpoint/version", "3")
        return file.getvalue()
    start = [pickle.dumps(value, protocol=2) for value in (torch.serialization.MAGIC_NUMBER, 1001, {})]
    return b"".join(start) + content + pickle.dumps([], protocol=2)


HUGE = b"J" + struct.pack("<i", 2**31 - 1)
DECLARED_8 = {"storage": rb"K\x08(?=N?t)", "shape": rb"K\x08(?=\x85)"}  # pickled: the last in a tuple, the only one
NEEDS_LINEAR = r"needs.*torch\.nn\.modules\.linear\.Linear"
ZEROS = torch_file({"weight": torch.zeros(100)})
ONE_BIT_FLIPPED = ZEROS.replace(bytes(400), bytes(200) + b"@" + bytes(199))  # as bad storage or a bad copy would
UNREADABLE = {
    "empty": (b"", "it is empty"),
    "one byte": (b"P", "not a PyTorch checkpoint"),
    "a web page": (b"\n<html>404</html>" * 40, "a web page.*download the file itself"),
    "a plain pickle": (pickle.dumps({"a": 1}), "not a PyTorch checkpoint"),
    "an empty zip": (bytes_of(lambda file: zipfile.ZipFile(file, "w").close()), "not a PyTorch checkpoint"),
    "arrays": (bytes_of(lambda file: np.savez(file, 1)), "a zip archive, but not a PyTorch checkpoint"),
    "no pickle": (pickled(b"\x80\x02I1\n.", True), r"cut short \(\w+: [^;]{1,70}\); download"),
    "truncated": (ZEROS[:-50], "damaged or cut short"),
    "truncated, legacy": (torch_file({"weight": torch.zeros(100)}, False)[:-50], "cut short"),
    "one bit flipped": (ONE_BIT_FLIPPED, "does not match its checksum"),
    "a whole model": (torch_file(nn.Linear(2, 2)), NEEDS_LINEAR),
    "a whole model, legacy": (torch_file(nn.Linear(2, 2), False), NEEDS_LINEAR),
    "an array": (torch_file(np.zeros(3)), "needs numpy.*_reconstruct"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_unreadable_files_are_one_clear_line(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "TorchScript")
    (tmp_path / "a device").symlink_to("/dev/zero")
    for case, (content, _) in UNREADABLE.items():
        (tmp_path / case).write_bytes(content)
    others = {"TorchScript": (None, "as torch.save writes it"), "a device": (None, "not a file")}
    for case, (_, complaint) in (UNREADABLE | others).items():
        with pytest.raises(InputError, match=complaint) as raised:
            load_backbone(tmp_path / case, num_classes=2)
        assert f"{tmp_path / case}" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("read", [files.read_checkpoint, files.read_safetensors])
def test_a_path_that_leads_nowhere_is_one_clear_line(read, tmp_path):
    (tmp_path / "file").write_text("")
    problems = {"gone.pth": "file not found", "": "not a file", "file/model.pth": "Not a directory"}
    for name, problem in (problems | {"x" * 300: "File name too long"}).items():
        with pytest.raises(InputError, match=f"cannot read .*: {problem}; give the path of an existing file"):
            read(tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("places", [["storage"], ["shape"], ["storage", "shape"]], ids="+".join)
def test_a_huge_declared_tensor_takes_no_memory(zipped, places, tmp_path):
    """A legacy file's is allocated before it is read, but none of its pages is touched."""

    def enlarge(name, data):
        for place in places if name.endswith("data.pkl") else ():
            data, count = re.subn(DECLARED_8[place], lambda _: HUGE, data)
            assert count == 1
        return data

    content = torch_file({"w": torch.arange(8.0)}, zipped)
    path = tmp_path / "huge.pth"
    path.write_bytes(rezipped(content, enlarge) if zipped else enlarge("data.pkl", content))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(InputError):  # torch takes a storage as large as its record, whatever is declared
        assert len(files.read_checkpoint(path)["w"]) == 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 100_000  # kB


def test_a_zip_bomb_is_refused_before_it_unfolds(tmp_path):
    bomb = tmp_path / "bomb.pth"
    bomb.write_bytes(rezipped(torch_file({"w": torch.zeros(10_000_000)}), compression=zipfile.ZIP_DEFLATED))
    assert bomb.stat().st_size < 100_000
    with little_memory(5_000_000), pytest.raises(InputError, match="compressed"):
        files.read_checkpoint(bomb)


def test_a_key_whose_hash_ends_the_process_or_never_ends_is_refused(tmp_path):
    """What stands between a dictionary and its value: a tuple in a tuple in a tuple ..."""
    for key in (
        b"N" + b"\x85" * 200_000,
        b"N" * 200_001 + b"\x86" * 200_000,  # its parts first
        b"(" * 200_000 + b"t" * 200_000,  # in marks
        b"N" + b"q\x00h\x00h\x00\x86" * 100,  # twice the same, 100 times over
        b"N" + b"q\x00(" + b"h\x00" * 5_000 + b"tq\x00(" + b"h\x00" * 5_000 + b"t",  # many times the same
    ):
        for zipped in (True, False):
            (tmp_path / "a.pth").write_bytes(pickled(b"\x80\x02}" + key + b"K\x01s.", zipped))
            with pytest.raises(InputError, match="a tuple in it is nested too deeply, or holds the same values too of"):
                files.read_checkpoint(tmp_path / "a.pth")


def test_a_full_disk_or_an_interruption_leaves_the_previous_file(tmp_path):
    """No file of this process can grow beyond 1 MB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, write in {"last.pth": files.save_atomically, "lora.safetensors": files.write_safetensors}.items():
        path = tmp_path / name
        write({"w": torch.ones(1)}, path)
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        try:
            with pytest.raises(InputError, match=rf"^cannot write .*{name}.*the previous file is intact[^\n]*$"):
                write({"w": torch.zeros(1_000_000)}, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        for interruption in (KeyboardInterrupt, ValueError):
            with pytest.raises(interruption), files.open_atomically(path) as file:
                file.write(b"half")
                raise interruption
            assert path.read_bytes() == before and names_in(tmp_path) == {name}
        path.unlink()


def test_a_place_that_cannot_be_written_to_is_one_clear_line(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "a_pipe")
    (tmp_path / "a_file").write_text("")
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "read_only").mkdir(mode=0o500)
    reasons = dict.fromkeys(("a_folder", "", "a_pipe"), "it is a folder, a device or the like")
    reasons |= {"vanished/last.pth": "No such file or directory", "a_file/last.pth": "Not a directory"}
    reasons["x" * 300] = "File name too long"
    with mock.patch.object(Path, "read_text", side_effect=AssertionError):  # it would wait for ever
        assert files.read_json(tmp_path / "a_pipe") == {}
    if os.geteuid() != 0:
        reasons["read_only/last.pth"] = "denied"
    before = names_in(tmp_path)
    for path, reason in reasons.items():
        with pytest.raises(InputError, match=f"cannot write .*{reason}"):
            files.save_atomically({"epoch": 1}, tmp_path / path)
    assert names_in(tmp_path) == before
    # Whoever may write to its folder could replace a file that is to be read alone.
    (tmp_path / "lora.pth").write_bytes(b"kept")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(InputError, match=r"cannot write .*/lora\.pth: somebody has made it read-only"):
        files.save_atomically({}, tmp_path / "lora.pth")
    assert (tmp_path / "lora.pth").read_bytes() == b"kept"
    files.save_atomically({}, tmp_path / "new.pth")


def test_a_file_is_on_the_disk_as_a_whole_before_it_has_its_name(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda file: sizes.append((os.fstat(file).st_size, names_in(tmp_path))))
    files.write_text("whole", tmp_path / "a.txt")
    assert sizes == [(5, {f".a.txt.{os.getpid()}.half"})]


def test_cells_are_text_whatever_they_are_called(tmp_path):
    """They are found again as they are named; half a pair of UTF-16 cannot be written."""
    rows = [["-1.png", "-1.5", 2.5], ["@home", "+x", "caf\udce9"]]
    files.write_cells(rows, ["a", "b", "c"], tmp_path / "a.csv")
    text = (tmp_path / "a.csv").read_bytes().decode(errors="surrogateescape")
    assert text.splitlines() == ["a,b,c", "-1.png,-1.5,2.5", "@home,+x,caf\udce9"]
    files.write_cells([["half \ud800"]], ["name"], tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text().splitlines() == ["name", "half ?"]
