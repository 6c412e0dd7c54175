"""The examples run, and what they print is what they found."""

import re

import pytest

import example_lora_usage as examples


@pytest.fixture(scope="module")
def trained():
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
    examples.example_6_serving(trained)
    right, of = map(
        int, re.search(r"(\d+) of (\d+) answers right for digits and parity", capsys.readouterr().out).groups()
    )
    assert of == 40 and right >= 34


def test_an_example_that_finds_something_wrong_raises():
    untrained = examples.example_1_setup()
    with pytest.raises(RuntimeError, match="no difference"):
        examples.example_4_inference(untrained)


@pytest.mark.slow
def test_the_sizes_are_those_of_files(capsys):
    examples.main(["--only", "5"])
    for line in capsys.readouterr().out.splitlines():
        if line.strip().startswith(("resnet50", "vit_b_16")):
            full, lora, qlora, merged, in_memory, four_bit = map(float, line.split()[1:])
            assert lora == pytest.approx(qlora, abs=0.02) and lora < full / 20
            assert merged == pytest.approx(full, rel=0.01) and four_bit < in_memory / 4


@pytest.mark.slow
def test_several_labels_are_found_and_answered(capsys):
    examples.main(["--only", "7"])
    printed = capsys.readouterr().out
    figures = re.findall(
        r"(disc|frame|stripes) +AP ([\d.]+)%, AUROC ([\d.]+)%; an answer above probability 0\.\d+", printed
    )
    assert [name for name, *_ in figures] == ["disc", "frame", "stripes"]
    assert all(float(ap) > 80 and float(roc) > 90 for _, ap, roc in figures)
    answers = re.findall(r"answered ([a-z,]+); true: disc (\w+), frame (\w+), stripes (\w+)", printed)
    assert len(answers) == 3 and "unknown" in str(answers)
    known = [
        (true == "yes") == (name in said.split(","))
        for said, *truth in answers
        for name, true in zip(("disc", "frame", "stripes"), truth, strict=True)
        if true != "unknown"
    ]
    assert sum(known) >= len(known) - 1


def test_an_unknown_number_is_refused():
    with pytest.raises(SystemExit) as stopped:
        examples.main(["--only", "8"])
    assert stopped.value.code == 2
