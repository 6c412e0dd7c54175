"""`report.html`: complete, without a network, with every confusion in it, and safe with any class name."""

import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from toolkit.answers.evaluation import Evaluation
from toolkit.answers.report_page import write_page
from toolkit.answers.tasks import Classification

pytestmark = pytest.mark.usefixtures("pictures")


class Reader(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def evaluation(labels: list[int], predictions: list[int]) -> Evaluation:
    labels, predictions = torch.tensor(labels), torch.tensor(predictions)
    accuracy = (labels == predictions).float().mean().item()
    return Evaluation(0.3, accuracy, predictions, labels, torch.full((len(labels),), 0.5))


def test_the_page_is_complete_and_runs_nothing(tmp_path):
    for name in ("training_curves.png", "mistakes.png"):
        Image.new("RGB", (3, 2)).save(tmp_path / name)
    names = ["<script>alert(1)</script>", 'quo"te', "absent caf\udce9"]  # of bytes that are not UTF-8
    report = Classification(names).report(evaluation([0, 0, 1], [0, 1, 1]))
    report.draw(tmp_path / report.picture)
    sections = report.sections(tmp_path / report.picture)
    about = sections, tmp_path / "lora.pth", tmp_path / "mistakes.png"
    config = {"finetune": {"note": "</pre><script>"}}
    rows = [("accuracy after", "66.67%")]
    title, curves = "66.67% of 3 images right", tmp_path / "training_curves.png"
    write_page(tmp_path / "report.html", title, rows, *about, curves=curves, config=config)
    text = (tmp_path / "report.html").read_text()
    page = Reader(text)
    assert "script" not in page.tags and page.tags.count("img") == 4 and "http" not in text
    assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name in ("src", "href"))
    for told in (
        "66.67% of 3 images right",
        "accuracy after",
        "no images",
        f"predict {tmp_path}/lora.pth",
        *names[:2],
        "absent caf?",
    ):
        assert told in page.text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_without_a_network_shows_all_of_it(tmp_path):
    """A picture of the page: as high as its text, with the pictures in it."""
    Image.new("RGB", (300, 200), (200, 0, 200)).save(tmp_path / "training_curves.png")
    Image.new("RGB", (300, 200), (0, 200, 0)).save(tmp_path / "mistakes.png")
    Image.new("RGB", (300, 200), (0, 0, 200)).save(tmp_path / "matrix.png")
    report = Classification(["cat", "dog", "owl"]).report(evaluation([0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 0]))
    about = report.sections(tmp_path / "matrix.png"), tmp_path / "lora.pth", tmp_path / "mistakes.png"
    rows, curves = [("accuracy after", "50.00%")], tmp_path / "training_curves.png"
    write_page(tmp_path / "report.html", "half right", rows, *about, curves=curves)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,3200", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--screenshot={tmp_path / 'page.png'}", f"file://{tmp_path / 'report.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    with Image.open(tmp_path / "page.png") as picture:
        colours = {colour: n for n, colour in picture.convert("RGB").getcolors(maxcolors=100_000)}
    assert colours[200, 0, 200] == colours[0, 200, 0] == colours[0, 0, 200] == 300 * 200
