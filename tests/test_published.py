"""Checkpoints by the names of published ones: downloaded once, from a server of this test, and checked."""

import hashlib
import re
import sys
import threading
import types
from argparse import ArgumentTypeError
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import finetune_lora
from toolkit import InputError
from toolkit.models import published
from toolkit.models.checkpoints import checkpoint_path


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server of the files in tmp_path/web; torch.hub's folder is tmp_path/hub."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "web").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "web")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_named_checkpoint_is_downloaded_once_and_trained(server, base, finetune, tmp_path, monkeypatch, capsys):
    content = base.read_bytes()
    (tmp_path / "web" / "base.pth").write_bytes(content)
    digest = hashlib.md5(content).hexdigest()[:8]
    monkeypatch.setitem(published.PUBLISHED, "moco-v9", (f"{server}/base.pth", digest))
    finetune("--checkpoint moco-v9 --epochs 1")
    assert (
        f"downloading {server}/base.pth to {tmp_path}/hub/checkpoints/base.pth; see the licence"
        in capsys.readouterr().out
    )
    (tmp_path / "web" / "base.pth").unlink()
    assert checkpoint_path("moco-v9").read_bytes() == content
    assert "downloading" not in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["another file", "nothing there", "torn"])
def test_what_cannot_be_had_is_one_line_and_leaves_nothing(server, tmp_path, monkeypatch, fault):
    monkeypatch.setitem(published.PUBLISHED, "moco-v9", (f"{server}/base.pth", "0123abcd"))
    message = (
        f"cannot download {server}/base.pth (HTTP Error 404: File not found): fetch it elsewhere and give its path"
    )
    if fault == "another file":
        (tmp_path / "web" / "base.pth").write_bytes(b"other")
        message = f"{server}/base.pth did not arrive as it is published (0123abcd): try again later"
    if fault == "torn":  # of a file whose digest is not known
        monkeypatch.setitem(published.PUBLISHED, "moco-v9", (f"{server}/base.pth", ""))
        (tmp_path / "web" / "base.pth").write_bytes(b"other")
        real = torch.hub.download_url_to_file
        monkeypatch.setattr(
            torch.hub, "download_url_to_file", lambda url, path: (real(url, path), open(path, "w").close())
        )
        message = f"{server}/base.pth did not arrive as it is published (5): try again later"
    with pytest.raises(ArgumentTypeError, match=re.escape(message)):
        checkpoint_path("moco-v9")
    with pytest.raises(InputError, match=re.escape(message)):
        finetune_lora.read_options(["--checkpoint", "moco-v9"])
    assert not list((tmp_path / "hub").rglob("*.p*"))


def test_files_of_the_hub(tmp_path, monkeypatch):
    hub = types.SimpleNamespace(hf_hub_download=lambda repository, file: f"{tmp_path}/{repository}/{file}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert checkpoint_path("hf:owner/name/folder/a.pth") == tmp_path / "owner/name/folder/a.pth"
    with pytest.raises(ArgumentTypeError, match="hf: is to be followed by owner/name/file"):
        checkpoint_path("hf:owner/name")

    def refuse(*_):
        raise OSError("404: no such repository\nand much more")

    hub.hf_hub_download = refuse
    with pytest.raises(ArgumentTypeError, match=r"hf:owner/name/a\.pth cannot be downloaded: 404: no such repository$"):
        checkpoint_path("hf:owner/name/a.pth")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ArgumentTypeError, match="hf:owner/name needs huggingface_hub: pip install huggingface_hub"):
        checkpoint_path("hf:owner/name/a.pth")


def test_the_names_of_torchgeos_files_end_in_their_digests():
    for name, (url, digest) in published.PUBLISHED.items():
        assert url.startswith("https://") and re.fullmatch("[0-9a-f]{8}|", digest), name
        assert "torchgeo" not in url or url.endswith(f"-{digest}.pth"), name


def test_a_name_that_is_nearly_one_of_them(images):
    with pytest.raises(InputError, match=r"moco-v2-800: file not found; .* checkpoint; did you mean moco-v2-800ep"):
        finetune_lora.read_options(f"--checkpoint moco-v2-800 --data-dir {images}".split())
