"""Lists, archives and images by their address: in fsspec's memory, and on a server of this test."""

import io
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

import deploy_lora
import finetune_lora
from moco import pretrain
from toolkit import InputError
from toolkit.images import remote

fsspec = pytest.importorskip("fsspec")


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (level, 255 - level, 100)).save(file, "png")
    return file.getvalue()


def tree() -> dict[str, bytes]:
    """Twelve images of two classes as files with a list, and the same in two archives."""
    found = {f"images/{i}.png": png(10 * i + 100 * (i % 2)) for i in range(12)}
    rows = [f"images/{i}.png,{'odd' if i % 2 else 'even'}" for i in range(12)]
    found["list.csv"] = "\n".join(["path,label", *rows]).encode()
    for number in range(2):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as archive:
            for i in range(6 * number, 6 * number + 6):
                label = b"odd" if i % 2 else b"even"
                for name, data in ((f"{i}.png", found[f"images/{i}.png"]), (f"{i}.cls", label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        found[f"shards/part-{number}.tar"] = content.getvalue()
    return found


class Ranges(SimpleHTTPRequestHandler):
    """Serves files, and parts of files."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        wanted = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            return super().do_GET()
        start, end = wanted.removeprefix("bytes=").split("-")
        content = path.read_bytes()
        part = content[int(start) : int(end or len(content)) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture(params=["memory", "http"])
def place(request, tmp_path) -> str:
    """The address of `tree`."""
    if request.param == "memory":
        system = fsspec.filesystem("memory")
        for name, content in tree().items():
            system.pipe(f"/place/{name}", content)
        yield "memory://place"
        system.rm("/place", recursive=True)
        return
    pytest.importorskip("aiohttp")
    for name, content in tree().items():
        path = tmp_path / "web" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=tmp_path / "web")) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def argv(base: Path, folder: Path, options: str) -> list[str]:
    return f"--checkpoint {base} --epochs 1 --device cpu --workers 0 --output-dir {folder} {options}".split()


def test_a_run_reads_a_list_or_archives_and_its_adapter_finds_them_again(place, base, tmp_path, capsys):
    of_list = finetune_lora.main(argv(base, tmp_path / "list", f"--data-list {place}/list.csv"))
    of_shards = finetune_lora.main(argv(base, tmp_path / "shards", f"--data-dir {place}/shards"))
    assert of_list["val_images"] > 0 < of_shards["val_images"]
    again = deploy_lora.main(["evaluate", str(tmp_path / "list" / "lora.pth")])
    assert again["accuracy"] == pytest.approx(of_list["val_accuracy"])


def test_local_lists_may_have_addresses(place, base, tmp_path):
    rows = [f"{place}/images/{i}.png,{'odd' if i % 2 else 'even'}" for i in range(12)]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    results = finetune_lora.main(argv(base, tmp_path / "out", f"--data-list {tmp_path}/list.csv"))
    assert results["val_images"] > 0


def test_pretraining_reads_archives(place, tmp_path):
    options = f"--data-dir {place}/shards --arch vit_mini --image-size 16 --batch-size 4 --queue-size 8 --epochs 1"
    pretrain.main([*options.split(), "--device", "cpu", "--workers", "0", "--output-dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "moco_stage1_epoch_1.pth").exists()


@pytest.mark.parametrize("what", ["list.csv", "shards", "images/3.png"])
def test_answers_are_given_for_addresses(place, adapter_for_images, tmp_path, what):
    output = tmp_path / "answers.csv"
    rows = deploy_lora.main(["predict", str(adapter_for_images), f"{place}/{what}", "--output", str(output)])
    assert len(rows) == (1 if what == "images/3.png" else 12)
    assert rows[-1]["path"].endswith(".png")


def test_bytes_of_a_server_without_ranges_are_cut_out_here(monkeypatch):
    class Whole:
        def cat_file(self, place, start=None, end=None):
            return b"0123456789"

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (Whole(), url))
    assert remote.read("https:/somewhere/a.tar", 2, 5) == b"234"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("memory://place/none.csv", "none.csv: cannot read it: "),
        ("https://me:secret@somewhere/list.csv", "somewhere/list.csv: a password or signature in its address would be"),
        (
            "https://somewhere/list.csv?key=secret",
            "somewhere/list.csv: a password or signature in its address would be",
        ),
        ("nosuch://place/list.csv", "nosuch://place/list.csv cannot be read: Protocol not known"),
    ],
)
def test_what_cannot_be_had_is_one_line_without_secrets(path, message, base, tmp_path):
    with pytest.raises(InputError) as error:
        finetune_lora.main(argv(base, tmp_path / "out", f"--data-list {path}"))
    assert message in str(error.value)
    assert "secret" not in str(error.value)


def test_a_missing_image_is_named(base, tmp_path):
    fsspec.filesystem("memory").pipe("/place/list.csv", b"a.png,x\nb.png,y\nc.png,x\nd.png,y\n")
    with pytest.raises(InputError, match=r"place/.*png: not a readable image"):
        finetune_lora.main(argv(base, tmp_path / "out", "--data-list memory://place/list.csv"))


def test_a_remote_folder_without_archives_asks_for_a_list(base, tmp_path):
    fsspec.filesystem("memory").pipe("/bare/cat/1.png", b"")
    with pytest.raises(InputError, match=r"bare: no .tar archives; for images of their own give a list of addresses"):
        finetune_lora.main(argv(base, tmp_path / "out", "--data-dir memory://bare"))


def test_without_fsspec_it_is_named(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InputError, match="addresses need fsspec: pip install fsspec"):
        finetune_lora.main(argv(base, tmp_path / "out", "--data-list s3://bucket/list.csv"))


def test_drives_of_windows_are_no_addresses():
    assert all(map(remote.is_remote, ("s3:\\bucket\\a.csv", "S3://bucket/a.csv")))
    assert not any(map(remote.is_remote, ("C:/images/a.png", "c:\\images", "/home/me", "a:b.png")))


def test_results_are_written_on_this_machine(base):
    with pytest.raises(InputError, match="--output-dir s3:/bucket/out: results are written on this machine"):
        finetune_lora.main(argv(base, "s3://bucket/out", ""))


def test_a_server_that_fails_is_one_line(base, tmp_path, monkeypatch):
    def fail(url):
        raise RuntimeError("500, message='Internal Server Error'")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    with pytest.raises(InputError, match=r"https://somewhere/list.csv cannot be read: 500"):
        finetune_lora.main(argv(base, tmp_path / "out", "--data-list https://somewhere/list.csv"))
