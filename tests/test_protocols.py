"""toolkit/answers/protocols.py and its command: what is measured is what the names say."""

import csv

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import deploy_lora
from toolkit import InputError
from toolkit.answers.measures import wilson_interval
from toolkit.answers.probe import fit_linear_probe
from toolkit.answers.protocols import Measured, measure


def blobs(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (3 * count, 8) in three overlapping clouds."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat(count)
    centres = 1.2 * torch.eye(8)[:3]
    return centres[labels] + torch.randn(3 * count, 8, generator=generator), labels


def test_figures_are_those_of_the_methods_named():
    train, held_out = blobs(40, 0), blobs(30, 1)
    told = []
    rows = {row.protocol: row for row in measure(train, held_out, ["a", "b", "c"], told.append)}
    assert list(rows.values()) == told
    # k = 200 has too few images here.
    assert list(rows) == [
        "k-NN, k = 5",
        "linear probe",
        "1 label per class",
        "5 labels per class",
        "10 labels per class",
    ]

    similarity = F.normalize(held_out[0], dim=1) @ F.normalize(train[0], dim=1).T
    hits = 0
    for row, label in zip(similarity, held_out[1], strict=True):
        nearest = row.argsort(descending=True)[:5]
        votes = [(row[nearest] / 0.07).exp()[train[1][nearest] == name].sum() for name in range(3)]
        hits += int(torch.stack(votes).argmax() == label)
    assert rows["k-NN, k = 5"].accuracy == pytest.approx(hits / 90)
    assert (rows["k-NN, k = 5"].low, rows["k-NN, k = 5"].high) == pytest.approx(wilson_interval(hits, 90))

    strength, scaler = fit_linear_probe(*train, 3)[2], StandardScaler().fit(train[0])
    probe = LogisticRegression(C=strength, max_iter=200).fit(scaler.transform(train[0]), train[1])
    assert rows["linear probe"].accuracy == pytest.approx(probe.score(scaler.transform(held_out[0]), held_out[1]))

    few = rows["5 labels per class"]
    assert (few.training_images, few.draws, few.low) == (15, 5, None) and few.spread > 0
    assert rows["1 label per class"].accuracy < few.accuracy < rows["linear probe"].accuracy


def test_the_command_measures_a_backbone_on_images(base, images, tmp_path, capsys):
    command = ["protocols", "--checkpoint", str(base), "--data-dir", str(images), "--device", "cpu"]
    rows = deploy_lora.main([*command, "--output", str(tmp_path / "protocols.csv")])
    assert [row.protocol for row in rows] == ["k-NN, k = 5", "linear probe", "1 label per class", "5 labels per class"]
    printed = capsys.readouterr().out
    assert (
        "21 training images, 15 evaluation images" in printed
        and f"linear probe          {rows[1].reported()}" in printed
    )
    with open(tmp_path / "protocols.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in table] == [row.accuracy for row in rows]
    assert tuple(table[0]) == Measured._fields
    chosen = deploy_lora.main([*command, "--eval-split", "validation"])  # any option about images counts
    assert chosen[1].training_images < 21


def test_the_images_of_a_patient_are_one_piece_of_evidence():
    """Copies of the same images change no accuracy; the intervals are of patients and the probe as strong as of one."""
    train, held_out = blobs(40, 0), blobs(30, 1)
    patients = [torch.arange(len(labels)).repeat(4) for _, labels in (train, held_out)]
    copies = [(features.repeat(4, 1), labels.repeat(4)) for features, labels in (train, held_out)]
    by_patient = {row.protocol: row for row in measure(*copies, ["a", "b", "c"], clusters=patients)}
    by_image = {row.protocol: row for row in measure(*copies, ["a", "b", "c"])}
    once = {row.protocol: row for row in measure(train, held_out, ["a", "b", "c"])}
    for name in ("k-NN, k = 5", "linear probe"):
        row, narrow = by_patient[name], by_image[name]
        assert row.high - row.low > 1.8 * (narrow.high - narrow.low)
    assert by_patient["linear probe"][2:5] == pytest.approx(once["linear probe"][2:5], abs=0.03)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--epoch 3", "--epoch: no such option"),
        ("--task multilabel --data-list l.csv", "protocols are for images of one class"),
        ("--folds 5", "protocols are for images of one class each, and for one division"),
        ("--output table.txt", "--output table.txt: the name must end in .csv"),
        ("--data-dir gone", "--data-dir gone: no such folder"),
    ],
)
def test_mistakes(base, options, problem):
    with pytest.raises(InputError, match=problem):
        deploy_lora.main(["protocols", "--checkpoint", str(base), *options.split()])
