"""The model card of an adapter, and a push to a Hub that is a server of this test."""

import base64
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch
import yaml

import deploy_lora
from finetune_lora import load_finetuned
from lora.adapter_file import read_adapter_file, write_adapter_file
from lora_utils import LoRAManager
from toolkit import InputError
from toolkit.answers.model_card import write_card

hub = pytest.importorskip("huggingface_hub")


def test_a_card_has_the_figures_of_the_run_and_what_the_hub_reads(finished_once, once, tmp_path, capsys):
    deploy_lora.main(["card", str(once / "lora.pth"), "--output", str(tmp_path / "README.md")])
    assert capsys.readouterr().out == f"wrote {tmp_path}/README.md\n"
    text = (tmp_path / "README.md").read_text()
    low, high = finished_once["val_accuracy_interval"]
    assert f"| accuracy | {finished_once['val_accuracy']:.4g} | {low:.4g} to {high:.4g} |" in text
    assert "lora_rank: 8" in text
    assert str(once.parent) not in text  # no path of this machine
    card = hub.ModelCard(text)
    assert (card.data.license, card.data.pipeline_tag) == ("unknown", "image-classification")
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["accuracy"] == pytest.approx(finished_once["val_accuracy"])


def test_a_card_names_a_published_base_and_its_licence():
    about = {"checkpoint": "/somewhere/moco_v2_800ep_pretrain.pth.tar", "arch": "resnet50", "image_size": 224}
    text = write_card(about | {"class_names": ["a", "b"], "config": 3}, {}, "flowers", "lora.pth")
    assert yaml.safe_load(text.split("---")[1])["license"] == "cc-by-nc-4.0"
    assert "trained over `moco-v2-800ep`" in text
    assert "Not measured." in text
    about["checkpoint"] = "/mine/moco-v2-of-my-own.pth"
    text = write_card(about | {"class_names": ["a", "b"]}, {}, "flowers", "lora.pth")
    assert yaml.safe_load(text.split("---")[1])["license"] == "unknown"


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"eval_split": "validation"}, ", set aside of the training images to choose settings by:"),
        ({"chosen_by": {"epoch": "they"}}, ", which chose the epoch: on others the figures are lower:"),
        ({"eval_split": "held-out", "chosen_by": {"learning rate": "trials"}}, ":"),
    ],
)
def test_a_card_says_what_its_images_have_chosen(chosen, told):
    about = {"checkpoint": "base.pth", "arch": "vit_mini", "image_size": 16, "class_names": ["a", "b"]}
    results = {"val_images": 90, "val_accuracy": 0.5, "val_accuracy_interval": [0.4, 0.6], **chosen}
    assert f"\nOn 90 evaluation images{told}\n" in write_card(about, results, "flowers", "lora.pth")


@pytest.mark.parametrize("way", ["an adapter of an own loop", "trained on", "results of evaluate"])
def test_figures_of_another_adapter_are_refused(once, tmp_path, way):
    """Of one whose file says nothing of a run, or still says what it was loaded with; and of no run."""
    model, info = load_finetuned(once / "lora.pth")
    if way == "results of evaluate":
        deploy_lora.main(["evaluate", str(once / "lora.pth"), "--output", str(tmp_path / "results.json")])
        shutil.copy(tmp_path / "results.json", once)
    if way != "results of evaluate":  # the file stays as large
        next(value for name, value in model.named_parameters() if "lora_B" in name).data += 1
    kept = {key: value for key, value in info.items() if key not in ("transform", "config")}
    LoRAManager(model).save_lora_checkpoint(once / "other.pth", kept if way == "an adapter of an own loop" else None)
    with pytest.raises(InputError, match="is of another file than"):
        deploy_lora.main(["card", str(once / "other.pth"), "--output", str(tmp_path / "README.md")])


def test_the_figures_are_of_the_same_adapter_in_another_format_too(once, finished_once):
    write_adapter_file(read_adapter_file(once / "lora.pth"), once / "lora.safetensors")
    text = deploy_lora.main(["card", str(once / "lora.safetensors"), "--output", str(once / "README.md")])
    assert f"| accuracy | {finished_once['val_accuracy']:.4g} |" in text


@pytest.fixture
def server(monkeypatch):
    """A Hub that takes commits into `files`, or answers 401 while `refuses`."""

    class Hub(BaseHTTPRequestHandler):
        files: ClassVar[dict[str, bytes]] = {}
        made: ClassVar[list[dict]] = []
        refuses = False

        def log_message(self, *_):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answer = {}
            if self.path.endswith("/repos/create"):
                self.made.append(json.loads(body))
                answer = {"url": f"{self.server.address}/me/flowers"}
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                answer = {"commitUrl": f"{self.server.address}/me/flowers/commit/1", "commitOid": "1", "success": True}
            self.send_response(401 if self.refuses else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        running.address = f"http://127.0.0.1:{running.server_port}"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(hub.HfApi, "__init__", api_at(running.address, hub.HfApi.__init__))
        yield Hub
        running.shutdown()


def api_at(address, init):
    return lambda self, **given: init(self, **({"token": "secret"} | given | {"endpoint": address}))


def test_push_sends_adapter_card_and_page(server, once, capsys):
    address = deploy_lora.main(["push", str(once / "lora.pth"), "me/flowers", "--private"])
    assert server.files.keys() == {"lora.pth", "README.md", "report.html"}
    assert server.files["lora.pth"] == (once / "lora.pth").read_bytes()
    assert server.files["README.md"].decode().split("---")[2].strip().startswith("# flowers")
    assert server.made[0]["name"] == "flowers"
    assert server.made[0].get("private") or server.made[0].get("visibility") == "private"
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"sent lora.pth, README.md, report.html to {address}"
    assert "secret" not in out


def test_push_sends_no_figures_of_other_thresholds(server, once):
    content = read_adapter_file(once / "lora.pth")
    content["metadata"]["thresholds chosen"] = "for f1, in list.csv"
    write_adapter_file(content, once / "other.pth")
    deploy_lora.main(["push", str(once / "other.pth"), "me/flowers"])
    assert server.files.keys() == {"other.pth", "README.md"}


def test_push_sends_the_stage_1_adapter_and_the_card_says_where_it_has_to_lie(server, once):
    """Else nobody could load the adapter: `load_finetuned` looks for it beside the file."""
    content = read_adapter_file(once / "lora.pth")
    content["metadata"]["stage1_adapter"] = str(once / "moco_lora.pth")
    (once / "moco_lora.pth").write_bytes(b"adapters of stage 1")
    (once / "results.json").unlink()
    write_adapter_file(content, once / "lora.pth")
    deploy_lora.main(["push", str(once / "lora.pth"), "me/flowers"])
    assert server.files["moco_lora.pth"] == b"adapters of stage 1"
    card = server.files["README.md"].decode()
    assert "`moco_lora.pth`, which is merged into it, has to lie beside `lora.pth`" in card
    (once / "moco_lora.pth").unlink()
    with pytest.raises(InputError, match=r"its stage-1 adapter, .*moco_lora.pth, is not there"):
        deploy_lora.main(["push", str(once / "lora.pth"), "me/flowers"])


def test_a_refused_push_is_one_line(server, once):
    server.refuses = True
    with pytest.raises(InputError, match=r"^me/flowers: .*401.*`hf auth login`[?]$"):
        deploy_lora.main(["push", str(once / "lora.pth"), "me/flowers"])


def test_push_without_huggingface_hub_names_it(once, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"^push needs huggingface_hub .*: pip install huggingface_hub$"):
        deploy_lora.main(["push", str(once / "lora.pth"), "me/flowers"])


def test_an_adapter_of_an_own_model_has_no_card(tmp_path):
    torch.save({"format_version": 1, "tensors": {}, "layers": {}, "base_hash": "", "metadata": {}}, tmp_path / "l.pth")
    with pytest.raises(InputError, match="does not say its arch"):
        deploy_lora.main(["card", str(tmp_path / "l.pth"), "--output", str(tmp_path / "README.md")])
