"""The examples run, and what they print is what they found."""

import re

import pytest

import example_lora_usage as examples

pytestmark = pytest.mark.usefixtures("whole_vit_mini")


@pytest.fixture(scope="module")
def trained(whole_vit_mini):
    return examples.example_2_training(epochs=2)


def test_set_up_replaces_adapters_and_counts_them(capsys):
    examples.main(["--only", "1"])
    printed = capsys.readouterr().out
    trained = [int(count.replace(",", "")) for count in re.findall(r"r=\d+ +([\d,]+) of", printed)]
    head = 192 * 10 + 10
    assert len(trained) == 3
    assert [count - head for count in trained] == [trained[0] - head, 2 * (trained[0] - head), 4 * (trained[0] - head)]


@pytest.mark.slow
def test_checkpoints_and_inference_agree_with_what_was_trained(trained, capsys):
    examples.example_3_checkpoints(trained)
    examples.example_4_inference(trained)
    printed = capsys.readouterr().out
    adapted, bare = map(float, re.search(r"([\d.]+)% right, ([\d.]+)% without adapters", printed).groups())
    assert adapted > 90 and adapted > bare


@pytest.mark.slow
def test_serving_answers_for_each_task(trained, capsys):
    examples.example_5_serving(trained)
    found = re.search(r"(\d+) of 40 answers right for digits and parity", capsys.readouterr().out)
    assert int(found[1]) >= 34


@pytest.mark.slow
def test_several_labels_are_found_and_answered(capsys):
    examples.main(["--only", "6"])
    printed = capsys.readouterr().out
    pattern = r"(even|round|large) +AP ([\d.]+)%, AUROC ([\d.]+)%; an answer above probability 0\.\d+"
    figures = re.findall(pattern, printed)
    assert [name for name, *_ in figures] == ["even", "round", "large"]
    assert all(float(ap) > 80 and float(roc) > 90 for _, ap, roc in figures)
    answers = re.findall(r"(\d) is ([a-z,]+)", printed)
    assert len(answers) == 3
    labels = examples.LABELS.items()
    right = [(int(digit) in which) == (name in said.split(",")) for digit, said in answers for name, which in labels]
    assert sum(right) >= 8


@pytest.mark.slow
def test_the_ink_of_digits_is_found_pixel_by_pixel(capsys):
    examples.main(["--only", "7"])
    mean, ground = re.search(r"mean IoU ([\d.]+)%; of the ground ([\d.]+)%", capsys.readouterr().out).groups()
    assert float(mean) > 30 and float(ground) > 80
