"""The examples run, and what they print is what they found."""

import re

import pytest

import example_lora_usage as examples

pytestmark = pytest.mark.usefixtures("whole_vit_mini")


def test_set_up_replaces_adapters_and_counts_them(capsys):
    examples.main(["--only", "1"])
    printed = capsys.readouterr().out
    trained = [int(count.replace(",", "")) for count in re.findall(r"r=\d+ +([\d,]+) of", printed)]
    head = 192 * 10 + 10
    assert len(trained) == 3
    assert [count - head for count in trained] == [trained[0] - head, 2 * (trained[0] - head), 4 * (trained[0] - head)]


@pytest.mark.slow
def test_checkpoints_and_inference_agree_with_what_was_trained(capsys):
    examples.example_3_checkpoints()
    examples.example_4_inference()
    printed = capsys.readouterr().out
    adapted, bare = map(float, re.search(r"([\d.]+)% right, ([\d.]+)% without adapters", printed).groups())
    assert adapted > 90 and adapted > bare


@pytest.mark.slow
def test_serving_answers_for_each_task(capsys):
    examples.example_5_serving()
    printed = capsys.readouterr().out
    found = re.findall(r"(digits|parity) \(.*\): (\d+) of 20 answers right", printed)
    assert [task for task, _ in found] == ["digits", "parity"]
    assert all(int(right) >= 16 for _, right in found)


@pytest.mark.slow
def test_several_labels_are_found(capsys):
    examples.main(["--only", "6"])
    printed = capsys.readouterr().out
    pattern = r"(even|round|large) +AP ([\d.]+)%, AUROC ([\d.]+)%; an answer above probability 0\.\d+"
    figures = re.findall(pattern, printed)
    assert [name for name, *_ in figures] == ["even", "round", "large"]
    assert all(float(ap) > 80 and float(roc) > 90 for _, ap, roc in figures)
