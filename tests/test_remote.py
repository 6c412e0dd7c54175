"""Files and folders by their address: in fsspec's memory, and on a server of this test."""

import io
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch

import deploy_lora
import finetune_lora
from moco import pretrain
from tests.image_files import tar_of
from tests.servers import serving
from toolkit import InputError
from toolkit.images import remote, shards
from toolkit.images.masks import MaskReader
from toolkit.images.sources import load_splits

fsspec = pytest.importorskip("fsspec")


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
    rows = ["path,label"]
    archives = ({}, {})
    for number, path in enumerate(sorted((folder / "photos/train").rglob("*.png"))):
        rows.append(f"{path.relative_to(folder)},{path.parent.name}")
        sample = {f"{number}.png": path.read_bytes(), f"{number}.cls": path.parent.name.encode()}
        archives[number % 2].update(sample)
    (folder / "list.csv").write_text("\n".join(rows))
    (folder / "shards").mkdir()
    for name, files in zip("ab", archives, strict=True):
        (folder / "shards" / f"{name}.tar").write_bytes(tar_of(files))
    return folder


@pytest.fixture(scope="module", params=["memory", "http"])
def place(request, here) -> str:
    """The address of that folder."""
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
    at_place = finetune_lora.main(argv(base, tmp_path / "out", f"--data-dir {place}/photos"))
    alone = finetune_lora.main(argv(base, tmp_path / "alone", f"--data-dir {here}/photos"))
    assert at_place["val_loss"] == alone["val_loss"] and "hot dog" in at_place["accuracy_per_class"]
    adapter = str(tmp_path / "out" / "lora.pth")
    for images in ([f"{place}/photos"], [f"{place}/photos/val"]):
        assert deploy_lora.main(["evaluate", adapter, *images])["loss"] == pytest.approx(alone["val_loss"])


@pytest.mark.parametrize("listed", [False, True])
def test_masks_are_read_too(place, here, listed):
    found = []
    for at in (place, here):
        source = {"data_list": [f"{at}/pairs/list.csv"]} if listed else {"data_dir": f"{at}/pairs"}
        found.append(load_splits("imagefolder", **source, task="segmentation", masks=MaskReader(None)))
    at_place, alone = found
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


def test_answers_are_given_for_addresses(place, adapter_for_images, tmp_path):
    told = ["predict", str(adapter_for_images), "--output", str(tmp_path / "answers.csv")]
    for what, count in (("list.csv", 21), ("shards", 21), ("photos/val/bright", 5), ("photos/val/bright/3.png", 1)):
        rows = deploy_lora.main([*told, f"{place}/{what}"])
        assert len(rows) == count
        assert all(row["path"].startswith(f"{place}/") and row["path"].endswith(".png") for row in rows)


def test_an_archive_is_indexed_in_few_reads(here, monkeypatch):
    """Files of some systems have no buffer: each of a header's few bytes would be a request."""
    reads = []

    class Bare(io.BytesIO):
        def readinto(self, buffer):
            reads.append(len(buffer))
            return super().readinto(buffer)

        def read(self, size=-1):
            reads.append(size)
            return super().read(size)

    system = SimpleNamespace(open=lambda place, mode, block_size: Bare((here / "shards/a.tar").read_bytes()))
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **_: (system, url))
    monkeypatch.setattr(shards, "visible_names", lambda folder: ([], ["a.tar"]))
    monkeypatch.setattr(shards, "image_names", lambda folder: [])
    images, labels = shards.read_shards(Path("gs://place/shards"))
    assert len(images) == len(labels) == 11 and len(reads) <= 2


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("--data-list {place}/none.csv", "none.csv: cannot read it: "),
        ("--data-list https://some/list.csv?key=secret", "https://some/list.csv: a password, signature or further"),
        ("--data-list nosuch://place/list.csv", "nosuch://place/list.csv cannot be read: Protocol not known"),
        ("--data-list {folder}/list.csv", r"^{place}/.\.png: not a readable image \(nothing is there\); repair"),
        ("--data-dir {place}/none", "none: no folder that can be listed, or no answer; name"),
        ("--data-dir {place}/list.csv", "list.csv: no folder that can be listed, or no answer; name"),
    ],
)
def test_what_cannot_be_had_is_one_line_without_secrets(place, told, message, base, tmp_path):
    (tmp_path / "list.csv").write_text("".join(f"{place}/{name}.png,{name in 'ac'}\n" for name in "abcd"))
    with pytest.raises(InputError, match=message.format(place=place)) as error:
        finetune_lora.main(argv(base, tmp_path / "out", told.format(place=place, folder=tmp_path)))
    assert "secret" not in str(error.value)


def test_drives_of_windows_are_no_addresses():
    assert all(map(remote.is_remote, ("s3:\\bucket\\a.csv", "S3://bucket/a.csv")))
    assert not any(map(remote.is_remote, ("C:/images/a.png", "c:\\images", "/home/me", "a:b.png")))
