"""Files and folders by their address: in fsspec's memory, and on a server of this test."""

import io
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import deploy_lora
import finetune_lora
from moco import pretrain
from tests.image_files import bytes_of, tar_of
from toolkit import InputError
from toolkit.images import remote, shards
from toolkit.images.masks import MaskReader
from toolkit.images.sources import Splits, load_splits

fsspec = pytest.importorskip("fsspec")


def as_png(levels: np.ndarray) -> bytes:
    return bytes_of(Image.fromarray(levels).save, "png")


def png(level: int) -> bytes:
    return as_png(np.full((16, 16, 3), (level, 255 - level, 100), np.uint8))


def tree() -> dict[str, bytes]:
    """Twelve images of two classes as files with a list, in class folders, with masks, and in two archives."""
    found = {f"images/{i}.png": png(10 * i + 100 * (i % 2)) for i in range(12)}
    for i in range(12):
        part = "val" if i > 7 else "train"
        found[f"photos/{part}/{'hot dog' if i % 2 else 'even'}/{i}.png"] = found[f"images/{i}.png"]
        found[f"pairs/{part}/images/{i}.png"] = found[f"images/{i}.png"]
        found[f"pairs/{part}/masks/{i}.png"] = as_png(np.eye(16, dtype=np.uint8) * (1 + i % 2))
    found["pairs/list.csv"] = "\n".join(f"train/images/{i}.png,train/masks/{i}.png" for i in range(8)).encode()
    rows = [f"images/{i}.png,{'odd' if i % 2 else 'even'}" for i in range(12)]
    found["list.csv"] = "\n".join(["path,label", *rows]).encode()
    for number in range(2):
        samples = {}
        for i in range(6 * number, 6 * number + 6):
            samples |= {f"{i}.png": found[f"images/{i}.png"], f"{i}.cls": b"odd" if i % 2 else b"even"}
        found[f"shards/part-{number}.tar"] = tar_of(samples)
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


@pytest.fixture
def here(tmp_path) -> Path:
    """The folder of `tree`."""
    for name, content in tree().items():
        path = tmp_path / "web" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "web"


@pytest.fixture(params=["memory", "http"])
def place(request, here, tmp_path) -> str:
    """The address of `tree`."""
    if request.param == "memory":
        system = fsspec.filesystem("memory")
        system.put(f"{here}/", "/place/", recursive=True)
        yield "memory://place"
        system.rm("/place", recursive=True)
        return
    pytest.importorskip("aiohttp")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=tmp_path / "web")) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def argv(base: Path, folder: Path, options: str) -> list[str]:
    return f"--checkpoint {base} --epochs 1 --device cpu --workers 0 --output-dir {folder} {options}".split()


def test_pretraining_reads_folders(place, tmp_path):
    shape = "--arch vit_mini --image-size 16 --batch-size 4 --dim 8 --mlp-dim 8 --epochs 1 --device cpu --workers 0"
    results = pretrain.main(f"--data-dir {place}/images {shape} --output-dir {tmp_path}/out".split())
    assert results["checkpoint"].exists()


def load(where: str, **options) -> Splits:
    if where.endswith(".csv"):
        return load_splits("imagefolder", data_list=[where], **options)
    return load_splits("imagefolder", Path(where), **options)


@pytest.mark.parametrize("place", ["http"], indirect=True)
def test_a_run_reads_folders_as_it_reads_those_of_this_machine(place, here, base, tmp_path):
    at_place = finetune_lora.main(argv(base, tmp_path / "out", f"--data-dir {place}/photos"))
    alone = finetune_lora.main(argv(base, tmp_path / "alone", f"--data-dir {here}/photos"))
    assert at_place["val_loss"] == alone["val_loss"] and set(at_place["accuracy_per_class"]) == {"even", "hot dog"}
    adapter = str(tmp_path / "out" / "lora.pth")
    for images in ([f"{place}/photos"], [f"{place}/photos/val"]):
        assert deploy_lora.main(["evaluate", adapter, *images])["loss"] == pytest.approx(alone["val_loss"])


@pytest.mark.parametrize("where", ["pairs", "pairs/list.csv"])
def test_masks_are_read_too(place, here, where):
    at_place, alone = (load(f"{at}/{where}", task="segmentation", masks=MaskReader(None)) for at in (place, here))
    assert at_place.digest() == alone.digest() and len(at_place.train) > 4
    for ours, theirs in ((at_place.train, alone.train), (at_place.val, alone.val)):
        for i in range(len(theirs)):
            assert torch.equal(ours.mask(i), theirs.mask(i))
            assert np.array_equal(np.asarray(ours[i][0]), np.asarray(theirs[i][0]))


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_scene_is_mapped_as_one_of_this_machine(place, here, adapter_for_images, tmp_path, compression):
    levels = np.random.RandomState(0).randint(0, 255, (40, 64, 3), dtype=np.uint8)
    tags = [(33550, "d", 3, (10.0, 10.0, 0.0), True)]
    tifffile.imwrite(here / "scene.tif", levels, photometric="rgb", compression=compression, extratags=tags)
    if place.startswith("memory"):
        fsspec.filesystem("memory").put(str(here / "scene.tif"), "/place/scene.tif")
    maps = [tmp_path / "map.tif", tmp_path / "alone.tif"]
    for folder, output in zip((place, here), maps, strict=True):
        deploy_lora.main(["predict", str(adapter_for_images), f"{folder}/scene.tif", "--output", str(output)])
    assert maps[0].read_bytes() == maps[1].read_bytes()


@pytest.mark.parametrize("what", ["list.csv", "shards", "images", "images/3.png"])
def test_answers_are_given_for_addresses(place, adapter_for_images, tmp_path, what):
    output = tmp_path / "answers.csv"
    rows = deploy_lora.main(["predict", str(adapter_for_images), f"{place}/{what}", "--output", str(output)])
    assert len(rows) == (1 if what == "images/3.png" else 12)
    assert all(row["path"].startswith(f"{place}/") and row["path"].endswith(".png") for row in rows)


def test_an_archive_is_indexed_in_few_reads(monkeypatch):
    """Files of some systems have no buffer: each of a header's few bytes would be a request."""
    reads = []

    class Bare(io.BytesIO):
        def readinto(self, buffer):
            reads.append(len(buffer))
            return super().readinto(buffer)

        def read(self, size=-1):
            reads.append(size)
            return super().read(size)

    system = SimpleNamespace(open=lambda place, mode, block_size: Bare(tree()["shards/part-0.tar"]))
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **_: (system, url))
    monkeypatch.setattr(shards, "visible_names", lambda folder: ([], ["part-0.tar"]))
    monkeypatch.setattr(shards, "image_names", lambda folder: [])
    images, labels = shards.read_shards(Path("gs://place/shards"))
    assert len(images) == len(labels) == 6 and len(reads) <= 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("memory://place/none.csv", "none.csv: cannot read it: "),
        ("https://somewhere/list.csv?key=secret", "https://somewhere/list.csv: a password, signature or further"),
        ("nosuch://place/list.csv", "nosuch://place/list.csv cannot be read: Protocol not known"),
    ],
)
def test_what_cannot_be_had_is_one_line_without_secrets(path, message, base, tmp_path):
    with pytest.raises(InputError) as error:
        finetune_lora.main(argv(base, tmp_path / "out", f"--data-list {path}"))
    assert message in str(error.value)
    assert "secret" not in str(error.value)


def test_a_missing_image_is_named_once(place, base, tmp_path):
    (tmp_path / "list.csv").write_text("".join(f"{place}/{name}.png,{name in 'ac'}\n" for name in "abcd"))
    with pytest.raises(InputError, match=rf"^{place}/.\.png: not a readable image \(nothing is there\); repair"):
        finetune_lora.main(argv(base, tmp_path / "out", f"--data-list {tmp_path}/list.csv"))


@pytest.mark.parametrize("what", ["none", "images/3.png"])
def test_what_is_no_folder_asks_for_a_list(place, base, tmp_path, what):
    with pytest.raises(InputError, match=rf"{what}: no folder that can be listed, or no answer; name"):
        finetune_lora.main(argv(base, tmp_path / "out", f"--data-dir {place}/{what}"))


def test_drives_of_windows_are_no_addresses():
    assert all(map(remote.is_remote, ("s3:\\bucket\\a.csv", "S3://bucket/a.csv")))
    assert not any(map(remote.is_remote, ("C:/images/a.png", "c:\\images", "/home/me", "a:b.png")))
