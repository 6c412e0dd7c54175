"""Files and folders by their address, in fsspec's memory and on a server of this test; and hostile ones: what comes in
through the door is a file, has an end, comes soon, and stays small.
"""

import contextlib
import hashlib
import importlib
import io
import lzma
import os
import re
import shutil
import struct
import sys
import threading
import time
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import deploy_lora
import finetune_lora
from moco import pretrain
from tests.image_files import bytes_of, geotags, labelled_tar, little_memory, png_of, tar_of, write
from toolkit import InputError
from toolkit.images import bands, folders, lists, remote, scenes, shards
from toolkit.images.masks import MaskReader
from toolkit.images.sources import load_splits
from toolkit.models import published
from toolkit.models.names import fetched
from toolkit.run import options

fsspec = pytest.importorskip("fsspec")
memory = pytest.importorskip("fsspec.implementations.memory")
LARGE = "more than its bytes can hold"


@contextlib.contextmanager
def serving(handler):
    """The address of a server on this machine, whose requests this handler answers."""
    quiet = mock.patch.object(BaseHTTPRequestHandler, "log_message")
    with quiet, ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Ranges(SimpleHTTPRequestHandler):
    """Serves files, and parts of files."""

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


@pytest.fixture(scope="module")
def here(images, pairs, tmp_path_factory) -> Path:
    """A folder of images in class folders, with masks, in a list and in two archives."""
    folder = tmp_path_factory.mktemp("web")
    shutil.copytree(images, folder / "photos")
    for part in ("train", "val"):
        (folder / "photos" / part / "dark").rename(folder / "photos" / part / "hot dog")
    shutil.copytree(pairs, folder / "pairs")
    masks = [f"train/images/{i}.png,train/masks/{i}.png" for i in range(8)]
    (folder / "pairs/list.csv").write_text("\n".join(masks))
    paths = sorted((folder / "photos/train").rglob("*.png"))
    rows = [f"{path.relative_to(folder)},{path.parent.name}" for path in paths]
    (folder / "list.csv").write_text("\n".join(["path,label", *rows]))
    write(folder / "shards/a.tar", labelled_tar(paths[::2]))
    write(folder / "shards/b.tar", labelled_tar(paths[1::2]))
    return folder


@pytest.fixture(scope="module", params=["memory", "http"])
def place(request, here) -> str:
    if request.param == "memory":
        system = fsspec.filesystem("memory")
        system.put(f"{here}/", "/place/", recursive=True)
        yield "memory://place"
        system.rm("/place", recursive=True)
        return
    pytest.importorskip("aiohttp")
    with serving(partial(Ranges, directory=here)) as url:
        yield url


def argv(base: Path, folder: Path, options: str) -> list[str]:
    return f"--checkpoint {base} --epochs 1 --device cpu --workers 0 --output-dir {folder} {options}".split()


@pytest.mark.parametrize("place", ["http"], indirect=True)
def test_runs_read_folders_as_they_read_those_of_this_machine(place, here, base, tmp_path):
    shape = "--arch vit_mini --image-size 16 --batch-size 4 --dim 8 --mlp-dim 8 --epochs 1 --device cpu --workers 0"
    told = f"--data-dir {place}/photos/train/bright {shape} --output-dir {tmp_path}/pretrained"
    assert pretrain.main(told.split())["checkpoint"].exists()
    results = finetune_lora.main(argv(base, tmp_path / "out", f"--data-dir {place}/photos"))
    assert (results["train_images"], results["val_images"]) == (21, 15) and "hot dog" in results["accuracy_per_class"]
    adapter = str(tmp_path / "out" / "lora.pth")
    for images in (f"{place}/photos", f"{place}/photos/val", f"{here}/photos/val"):
        assert deploy_lora.main(["evaluate", adapter, images])["loss"] == pytest.approx(results["val_loss"])


@pytest.mark.parametrize("place", ["memory"], indirect=True)
@pytest.mark.parametrize("listed", [False, True])
def test_masks_are_read_too(place, here, listed):
    def splits(at):
        source = {"data_list": [f"{at}/pairs/list.csv"]} if listed else {"data_dir": f"{at}/pairs"}
        return load_splits("imagefolder", **source, task="segmentation", masks=MaskReader(None))

    assert splits(place).digest() == splits(here).digest()
    for ours, theirs in zip(splits(place)[:2], splits(here)[:2], strict=True):
        assert len(ours) == len(theirs) > 0
        for i in range(len(theirs)):
            assert torch.equal(ours.mask(i), theirs.mask(i))
            assert np.array_equal(np.asarray(ours[i][0]), np.asarray(theirs[i][0]))


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_scene_is_mapped_as_one_of_this_machine(place, here, adapter_for_images, tmp_path, compression):
    levels = np.random.RandomState(0).randint(0, 255, (40, 64, 3), dtype=np.uint8)
    tifffile.imwrite(here / "scene.tif", levels, photometric="rgb", compression=compression, extratags=geotags())
    if place.startswith("memory"):
        fsspec.filesystem("memory").put(str(here / "scene.tif"), "/place/scene.tif")
    for folder, name in ((place, "map"), (here, "alone")):
        told = f"predict {adapter_for_images} {folder}/scene.tif --output {tmp_path}/{name}.tif"
        deploy_lora.main(told.split())
    assert (tmp_path / "map.tif").read_bytes() == (tmp_path / "alone.tif").read_bytes()


def test_answers_are_given_for_addresses(place, adapter_for_images, tmp_path):
    told = ["predict", str(adapter_for_images), "--output", str(tmp_path / "answers.csv")]
    for what, count in (("list.csv", 21), ("shards", 21), ("photos/val/bright", 5), ("photos/val/bright/3.png", 1)):
        rows = deploy_lora.main([*told, f"{place}/{what}"])
        assert len(rows) == count
        assert all(row["path"].startswith(f"{place}/") and row["path"].endswith(".png") for row in rows)


def test_an_archive_is_indexed_in_few_reads(here, monkeypatch):
    """Files of some systems have no buffer: each of a header's few bytes would be a request."""
    fsspec.filesystem("memory").pipe("/few/a.tar", (here / "shards/a.tar").read_bytes())
    reads = []
    for name in ("read", "readinto"):
        real = getattr(io.BytesIO, name)
        monkeypatch.setattr(memory.MemoryFile, name, lambda *given, real=real: reads.append(given) or real(*given))
    images, labels = shards.read_shards(Path("memory://few"))
    assert len(images) == len(labels) == 11 and len(reads) <= 2


def test_what_cannot_be_had_is_one_line_without_secrets(place, base, tmp_path, capsys):
    (tmp_path / "list.csv").write_text("".join(f"{place}/{name}.png,{name in 'ac'}\n" for name in "abcd"))
    for told, message in (
        (f"--data-list {place}/none.csv", "none.csv: cannot read it: "),
        ("--data-list https://some/list.csv?key=secret", "https://some/list.csv: a password, signature or further"),
        ("--data-list nosuch://place/list.csv", "nosuch://place/list.csv cannot be read: Protocol not known"),
        (f"--data-list {tmp_path}/list.csv", rf"^{place}/.\.png: not a readable image \(nothing is there\); repair"),
        (f"--data-list {place}/list.csv --group-by who", f"no such column in {place}/list.csv, which has label"),
        (f"--data-dir {place}/none", "none: no folder that can be listed, or no answer; name"),
        (f"--data-dir {place}/list.csv", "list.csv: no folder that can be listed, or no answer; name"),
    ):
        with pytest.raises(InputError, match=message) as error:
            finetune_lora.main(argv(base, tmp_path / "out", told))
        assert "secret" not in str(error.value)
    assert str(InputError("file:/a, s3:/b")) == "file:/a, s3://b"
    folders.report_others(Path(place), folders.Counter(["a.txt"]))
    assert capsys.readouterr().out.endswith(f"\n{place}: files that are not read as images: 1 a.txt\n")


def test_what_is_read_is_a_file_and_no_device_or_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    (tmp_path / "list.csv").write_text("file:///dev/zero,cat\n")
    for place in ("file:///dev/zero", "file:///dev/null"):
        for read in (remote.read, lambda place: lists.ImageList(Path(place)).paths()):
            with pytest.raises(InputError, match=f"{place} cannot be read: not a file"):
                read(place)
        with pytest.raises(InputError, match="not a file"), remote.opened(place):
            pass
    with pytest.raises(InputError, match="file:///dev/zero cannot be read: not a file"):
        folders.ImageFiles(tmp_path, lists.ImageList(tmp_path / "list.csv").paths())[0]
    with pytest.raises(InputError, match=r"a\.tar: not a tar archive that can be read \(not a file\)"):
        shards.read_shards(tmp_path)
    refused = pytest.raises(InputError, match=r"a\.tar: not a readable image \(not a file\)")
    with refused, scenes.open_scene(tmp_path / "a.tar", None):
        pass


def test_an_address_is_read_up_to_a_limit(monkeypatch):
    place = "memory://doors/a.npy"
    with fsspec.open(place, "wb") as file:
        file.write(bytes(range(100)))
    monkeypatch.setattr(remote, "LARGEST_AT_ADDRESS", 100)
    assert remote.read(place) == bytes(range(100))
    monkeypatch.setattr(remote, "LARGEST_AT_ADDRESS", 99)
    assert remote.read(place, 10, 20) == bytes(range(10, 20))
    for end in (None, 2**60):  # as an archive may say of a member
        with pytest.raises(InputError, match=r"a\.npy cannot be read: more than 99 bytes are not read"):
            remote.read(place, 0, end)


class Endless(BaseHTTPRequestHandler):
    """Serves `/endless`, `/stalls`, whose rest never comes, `/mute`, which says nothing at all, and `/whole`."""

    sent = 0

    def do_GET(self):
        if self.path != "/mute":
            self.send_response(200)
            if self.path == "/stalls":
                self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(bytes(range(50)))
        with contextlib.suppress(ConnectionError):
            while self.path == "/endless":
                self.wfile.write(bytes(1000))
                Endless.sent += 1000
        if self.path in ("/mute", "/stalls"):
            time.sleep(1)


def test_a_body_without_end_is_refused_and_a_server_that_stalls_is_not_waited_for(monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote, "LARGEST_AT_ADDRESS", 10**5)
    with serving(Endless) as url:
        assert remote.read(f"{url}/whole") == bytes(range(50))
        for end in (None, 2**40):
            with pytest.raises(InputError, match=r"/endless cannot be read: more than 100,000 bytes are not read"):
                remote.read(f"{url}/endless", 0, end)
        assert remote.read(f"{url}/endless", 10, 20) == bytes(range(10, 20))  # though the server knows no ranges
        assert Endless.sent < 6 * 10**7  # what lies in buffers has been sent too
        monkeypatch.setattr(remote, "TIME_OUT", 0.2)
        for name in ("stalls", "mute"):
            with pytest.raises(InputError, match=rf"/{name} cannot be read: nothing has arrived for 0\.2 seconds"):
                remote.read(f"{url}/{name}")


def test_an_address_within_another_is_refused_without_its_password_and_a_drive_of_windows_is_none():
    for place in ("simplecache::https://me:secret@host/a.csv", "zip://a::https://me:secret@host/b"):
        for read in (remote.read, remote.exists, lambda place: lists.ImageList(Path(place)).paths()):
            with pytest.raises(InputError, match=r"https:/+host/.*: a password, signature or further addr") as error:
                read(place)
            assert "secret" not in str(error.value)
    assert all(map(remote.is_remote, ("s3:\\bucket\\a.csv", "S3://bucket/a.csv")))
    assert not any(map(remote.is_remote, ("C:/images/a.png", "c:\\images", "/home/me", "a:b.png")))


def png_with_a_row(side: int, bits: int = 16, colours: int = 0) -> bytes:
    return png_of(side, side, bits, colours, bytes(1 + side * bits // 8))


def tiff_of(side: int, strip: bytes, compression: int = 8) -> bytes:
    """A TIFF of 8-bit greys (side, side), with one strip."""
    where = 8 + 2 + 12 * 8 + 4
    sizes = {256: side, 257: side, 258: 8, 278: side, 279: len(strip)}
    tags = sizes | {259: compression, 262: 1, 273: where if strip else 0}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + strip


def test_what_a_file_says_to_be_is_checked_before_it_is_decoded(tmp_path):
    for content, reason in (
        (png_with_a_row(30_000), LARGE),
        (png_with_a_row(10_000, colours=6), f"of 800,000,000 bytes, which is {LARGE}"),
        (png_with_a_row(10_000, colours=4), f"of 400,000,000 bytes, which is {LARGE}"),
        (png_with_a_row(9_000, 8), LARGE),
        (tiff_of(30_000, b""), LARGE),
        (bytes_of(np.savez, a=np.zeros((4, 4)), b=np.zeros((4, 4))), "it has 2 arrays"),
    ):
        (tmp_path / "a.png").write_bytes(content)
        with little_memory(), pytest.raises(InputError, match=reason):
            folders.ImageFiles(tmp_path, ["a.png"], bands.Bands(1))[0]


@pytest.mark.parametrize(("kind", "pack"), [(8, zlib.compress), (34925, lzma.compress)], ids=["zlib", "lzma"])
def test_a_strip_holds_what_its_image_has_and_no_more(kind, pack, tmp_path):
    codecs = importlib.import_module(bands.import_tifffile().__name__ + "._imagecodecs")
    # Versions of 2026 refuse the function of any other module.
    assert {codecs.zlib_decode.__module__, codecs.lzma_decode.__module__} == {codecs.__name__}
    if bands.import_tifffile().tifffile.imagecodecs.__name__ != "tifffile._imagecodecs":
        pytest.skip("imagecodecs has limits of its own")
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    (tmp_path / "a.tif").write_bytes(tiff_of(8, pack(levels.tobytes() + bytes(3 * 10**7)), kind))
    with little_memory():
        image = folders.ImageFiles(tmp_path, ["a.tif"], bands.Bands(1))[0]
        with scenes.open_scene(tmp_path / "a.tif", bands.Bands(1)) as scene:
            rows = scene.rows(0, 8)
    np.testing.assert_array_equal(image[..., 0], levels)
    np.testing.assert_array_equal(rows[..., 0], levels)


def test_of_a_member_that_is_there_several_times_the_last_is_read(tmp_path):
    red, blue = (tar_of({"a.png": bytes_of(Image.new("RGB", (8, 8), name).save, "png")}) for name in ("red", "blue"))
    (tmp_path / "one.tar").write_bytes(red[:1024] + blue)  # a header, and a block with the picture
    images, _ = shards.read_shards(tmp_path)
    assert len(images) == 1 and images[0].getpixel((0, 0)) == (0, 0, 255)


# ------------------------------------------ published checkpoints by their names: downloaded once and last, and checked


CONTENT = bytes(range(256)) * 4
DIGEST = hashlib.md5(CONTENT).hexdigest()[:8]
TORN = rf"did not arrive as it is published \({DIGEST}\): try again later$"
ELSEWHERE = r"cannot download http.*/{} \({}\): fetch it elsewhere and give its path$"


class Server(SimpleHTTPRequestHandler):
    """Stalls in stalls.pth, breaks off in breaks.pth, says no size of endless.pth."""

    def send_header(self, keyword, value):
        if keyword != "Content-Length" or self.path != "/endless.pth":
            super().send_header(keyword, value)

    def copyfile(self, source, outputfile):
        is_whole = self.path not in ("/stalls.pth", "/breaks.pth")
        outputfile.write(source.read(-1 if is_whole else 300))
        if self.path == "/stalls.pth":
            time.sleep(1)


@pytest.fixture
def web(tmp_path, monkeypatch):
    """The folder of a server's files, to which `publish` gives names. torch.hub's folder is tmp_path/hub."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    folder = tmp_path / "web"
    folder.mkdir()
    named = mock.patch.dict(published.PUBLISHED, {"moco-v9": ("", "")})
    with named, serving(partial(Server, directory=folder)) as url:
        yield types.SimpleNamespace(folder=folder, url=url)


def publish(web, name: str, content: bytes = CONTENT, digest: str = DIGEST) -> Path:
    """Put a file on the server as moco-v9; returns its place after the download."""
    (web.folder / name).write_bytes(content)
    published.PUBLISHED["moco-v9"] = (f"{web.url}/{name}", digest)
    return web.folder.parent / "hub" / "checkpoints" / name


def fetch() -> bytes:
    return fetched(Path("moco-v9")).read_bytes()


def test_a_named_checkpoint_is_downloaded_once(web, monkeypatch, capsys):
    place = publish(web, "base.pth")
    assert fetch() == CONTENT
    told = f"downloading {web.url}/base.pth to {place}; see the licence on the publisher's page"
    assert capsys.readouterr().out == f"{told}\n"
    (web.folder / "base.pth").unlink()
    assert fetch() == CONTENT and capsys.readouterr().out == ""
    publish(web, "another.pth")
    monkeypatch.setattr(published, "_MOCO", web.url)  # whose files alone have this licence
    fetch()
    assert "on the publisher's page (CC-BY-NC 4.0)\n" in capsys.readouterr().out


def test_of_two_that_need_a_file_one_downloads_it(web, monkeypatch):
    publish(web, "base.pth")
    download = published._download
    begun = []

    def slowly(*args):
        begun.append(args)
        time.sleep(0.2)
        download(*args)

    monkeypatch.setattr(published, "_download", slowly)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: fetch(), range(2))) == [CONTENT] * 2
    assert len(begun) == 1


def test_what_cannot_be_had_is_one_line_and_begun_anew(web, monkeypatch):
    monkeypatch.setattr(published, "TIME_OUT", 0.2)
    monkeypatch.setattr(published, "LARGEST", 10**5)
    large = bytes(10**6)
    for name, content, digest, told, left in (
        ("nothing.pth", None, DIGEST, ELSEWHERE.format("nothing.pth", "HTTP Error 404: File not found"), []),
        ("base.pth", b"other", DIGEST, TORN, []),
        ("breaks.pth", CONTENT, DIGEST, TORN, []),
        ("breaks.pth", CONTENT, "", TORN.replace(DIGEST, "1024"), []),
        ("endless.pth", large, hashlib.md5(large).hexdigest()[:8], "did not arrive as it is publ", []),
        ("stalls.pth", CONTENT, DIGEST, ELSEWHERE.format("stalls.pth", "timed out"), ["stalls.pth.part"]),
    ):
        place = publish(web, name, content or b"", digest)
        if content is None:
            (web.folder / name).unlink()
        for _ in range(2):
            with pytest.raises(InputError, match=told):
                finetune_lora.read_options(["--checkpoint", "moco-v9"])
            assert [path.name for path in place.parent.iterdir() if path.suffix != ".lock"] == left
    publish(web, "endless.pth").with_name("endless.pth.part").write_bytes(b"of an older version" * 100)
    assert fetch() == CONTENT


@pytest.mark.parametrize("script", [finetune_lora, pretrain, deploy_lora])
def test_each_script_gets_the_file_when_all_else_is_right(web, script):
    place = publish(web, "base.pth")
    command = "--checkpoint moco-v9"
    wrong = "--data-dir nowhere"
    if script is deploy_lora:
        command = "merge a.pth --output b.pth --checkpoint moco-v9"
        wrong = "--output nowhere/b.pth"
    with pytest.raises(InputError, match="nowhere") as error:
        script.read_options([*command.split(), *wrong.split()])
    assert "\n" not in str(error.value) and not place.parent.exists()
    found = script.read_options(command.split())
    if isinstance(found, tuple):
        found, _ = found
    assert found.checkpoint == place


def test_a_configuration_has_the_name_and_not_the_place_on_this_machine(web, tmp_path):
    publish(web, "base.pth")
    (tmp_path / "own.pth").touch()
    for typed in ("moco-v9", "none --arch resnet18 --no-freeze-backbone", f"{tmp_path}/own.pth"):
        found = options.stored_sections(*finetune_lora.read_options(["--checkpoint", *typed.split()]))
        assert found["model"]["checkpoint"] == typed.split()[0]


def test_files_of_the_hub(tmp_path, monkeypatch):
    hub = types.SimpleNamespace(hf_hub_download=lambda repository, file: f"{tmp_path}/{repository}/{file}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    wanted = Path("hf:owner/name/folder/a.pth")
    path = fetched(wanted)
    assert path == tmp_path / "owner/name/folder/a.pth" and published.NAMES[path] == str(wanted)
    with pytest.raises(InputError, match="hf: is to be followed by owner/name/file"):
        fetched(Path("hf:owner/name"))
    for error in (OSError, RuntimeError):  # the latter stands for those of libraries for HTTP
        hub.hf_hub_download = mock.Mock(side_effect=error("404: no such repository\nand much more"))
        with pytest.raises(InputError, match=rf"{wanted} cannot be downloaded: 404: no such repository$"):
            fetched(wanted)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"hf:owner/name needs huggingface_hub .*: pip install huggingface_hub"):
        fetched(wanted)


def test_the_names_of_torchgeos_files_end_in_their_digests():
    for name, (url, digest) in published.PUBLISHED.items():
        assert url.startswith("https://") and re.fullmatch("[0-9a-f]{8}|", digest), name
        assert "torchgeo" not in url or url.endswith(f"-{digest}.pth"), name
