"""`report.html`: complete, without a network, with every confusion in it, and safe with any class name."""

import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from moco.report_page import confusion_counts, confusion_svg, write_page
from moco.training import Evaluation


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
    return Evaluation(0.3, 0.5, predictions, labels, torch.full((len(labels),), 0.5))


def test_the_page_is_complete_and_runs_nothing(tmp_path):
    for name in ("training_curves.png", "mistakes.png"):
        Image.new("RGB", (3, 2)).save(tmp_path / name)
    names = ["<script>alert(1)</script>", 'quo"te', "absent"]
    results = {"val_accuracy": 2 / 3, "val_images": 3, "config": {"finetune": {"note": "</pre><script>"}}}
    write_page([("accuracy after", "66.67%")], results, evaluation([0, 0, 1], [0, 1, 1]), names, tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Reader(text)
    assert "script" not in page.tags and page.tags.count("img") == 2 and "http" not in text
    assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name in ("src", "href"))
    for told in ("66.67% of 3 images right", "accuracy after", "no images", f"predict {tmp_path}/lora.pth", *names):
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
