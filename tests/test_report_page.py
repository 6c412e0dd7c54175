"""`report.html`: complete, without a network, with every confusion in it, and safe with any class name."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from toolkit.answers.evaluation import Evaluation
from toolkit.answers.report_page import BLUE, ORANGE, class_sections, confusion_counts, confusion_svg, write_page

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
    sections = class_sections(evaluation([0, 0, 1], [0, 1, 1]), names)
    about = sections, tmp_path / "lora.pth", tmp_path / "mistakes.png"
    config = {"finetune": {"note": "</pre><script>"}}
    rows = [("accuracy after", "66.67%")]
    title, curves = "66.67% of 3 images right", tmp_path / "training_curves.png"
    write_page(tmp_path / "report.html", title, rows, *about, curves=curves, config=config)
    text = (tmp_path / "report.html").read_text()
    page = Reader(text)
    assert "script" not in page.tags and page.tags.count("img") == 2 and "http" not in text
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


@pytest.mark.parametrize("classes", [3, 30, 200])
def test_every_confusion_is_drawn_and_told(classes):
    torch.manual_seed(0)
    labels, predictions = torch.randint(classes, (2, 500)).tolist()
    names = [f"class {i}" for i in range(classes)]
    counts = confusion_counts(evaluation(labels, predictions), classes)
    told = re.findall(r"<title>(.+?): (\d+) of (\d+) taken for (.+?)</title>", confusion_svg(counts, names))
    found = {(names.index(row), names.index(column)): int(count) for row, count, _, column in told}
    expected = dict.fromkeys(zip(labels, predictions, strict=True), 0)
    for pair in zip(labels, predictions, strict=True):
        expected[pair] += 1
    assert found == expected
    assert all(int(total) == labels.count(names.index(row)) for row, _, total, _ in told)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_without_a_network_shows_all_of_it(tmp_path):
    """A picture of the page: as high as its text, with the pictures and every field of the confusion matrix in it."""
    Image.new("RGB", (300, 200), (200, 0, 200)).save(tmp_path / "training_curves.png")
    Image.new("RGB", (300, 200), (0, 200, 0)).save(tmp_path / "mistakes.png")
    answers = evaluation([0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 0])
    about = class_sections(answers, ["cat", "dog", "owl"]), tmp_path / "lora.pth", tmp_path / "mistakes.png"
    rows, curves = [("accuracy after", "50.00%")], tmp_path / "training_curves.png"
    write_page(tmp_path / "report.html", "half right", rows, *about, curves=curves)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,2600", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--screenshot={tmp_path / 'page.png'}", f"file://{tmp_path / 'report.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    with Image.open(tmp_path / "page.png") as picture:
        colours = {colour: n for n, colour in picture.convert("RGB").getcolors(maxcolors=100_000)}
    assert colours[200, 0, 200] == colours[0, 200, 0] == 300 * 200
    # Half of each class right and half taken for another: blue and orange at an opacity of 0.15 + 0.85 / 2 on white.
    for colour in (BLUE, ORANGE):
        red, green, blue = (round(255 - (0.15 + 0.85 / 2) * (255 - int(colour[i : i + 2], 16))) for i in (1, 3, 5))
        near = sum(n for (r, g, b), n in colours.items() if max(abs(r - red), abs(g - green), abs(b - blue)) <= 2)
        assert near > 3 * 34**2 / 2  # the rest of a field is its number
