"""Checkpoints by the names of published ones: downloaded once and last, from a server of this test, and checked."""

import hashlib
import re
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from unittest import mock

import pytest
import torch

import deploy_lora
import finetune_lora
from moco import pretrain
from tests.servers import serving
from toolkit import InputError
from toolkit.models import published
from toolkit.models.names import fetched
from toolkit.run import options

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
    place = publish(web, "endless.pth")
    place.with_name("endless.pth.part").write_bytes(b"of an older version" * 100)
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
