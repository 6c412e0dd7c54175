"""Images without labels: which are read, how they train, and where the head starts by them."""

import copy
import itertools
import json
import math
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from finetune_lora import FineTuning
from lora.adapter_file import read_adapter_file
from tests.conftest import CLASSES, LEAST_STEPS
from tests.dense import trained
from tests.image_files import tar_of, write
from tests.run_folders import assert_identical, assert_same_tensors, contents, train_on
from toolkit import InputError, distributed
from toolkit.answers import classification, evaluation, probe, unlabelled
from toolkit.answers.evaluation import NO_LABEL
from toolkit.devices import CPU
from toolkit.images import sources
from toolkit.images.data import LabelledImages, Transformed, build_loader
from toolkit.run import loaders, reports, runs, teacher
from toolkit.run.guard import Guard
from toolkit.run.optim import weights_replaced
from toolkit.run.teacher import Teacher
from toolkit.run.training import MicroBatches


@pytest.fixture
def others(tmp_path, images):
    """A folder of images: three of nobody's, one with a label, and two that are evaluated on, under other names."""
    folder = tmp_path / "others"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number}.png")
    for known, name in (("train/dark/0", "labelled"), ("val/dark/0", "evaluated"), ("val/bright/1", "evaluated too")):
        shutil.copy(images / f"{known}.png", folder / f"{name}.png")
    return folder


def read(images, unlabelled, **options):
    """The names of the images without labels, as they lie in their folder."""
    splits = sources.load_splits("imagefolder", images, unlabelled=unlabelled, **options)
    found = splits.unlabelled
    assert found.labels == [*range(len(found))] and splits.digest() != splits._replace(unlabelled=splits.val).digest()
    return [name.rpartition("/")[2] for name in found.relative_names()]


def test_images_that_are_evaluated_on_or_have_a_label_are_left_out(images, others, tmp_path, capsys):
    """Of folders, archives and lists. Each process needs one of the others."""
    assert read(images, others) == ["0.png", "1.png", "2.png"]
    assert "unlabelled: 3 images, without 2 evaluation images and 1 that have a label" in capsys.readouterr().out
    with mock.patch.object(distributed, "world_size", lambda: 4), pytest.raises(InputError, match="3 are left with"):
        read(images, others)
    write(tmp_path / "archives/a.tar", tar_of(dict(sorted(contents(others).items()))))
    assert read(images, tmp_path / "archives") == ["0.png", "1.png", "2.png"]
    (others / "list.csv").write_text("0.png\n2.png\nevaluated.png\n")
    assert read(images, others / "list.csv") == ["0.png", "2.png"]
    (others / "broken.png").write_bytes(b"no image")
    assert read(images, others, skip_unreadable=True) == ["0.png", "1.png", "2.png"]
    assert len(read(images, images, labels_per_class=5)) == 2 * len(CLASSES)  # the others of the labelled ones' folder
    assert "without 0 evaluation images and 15 that have a label" in capsys.readouterr().out


def test_of_many_a_random_choice_is_read_which_is_said(images, others, capsys):
    """As many as there are classes, three, times a number, within bounds."""
    for least, of_class, most, number in ((4, 1, 9, 4), (2, 1, 9, 3), (2, 2, 5, 5), (6, 3, 4, 4)):
        with mock.patch.multiple(sources, LEAST_UNLABELLED=least, UNLABELLED_OF_CLASS=of_class, MOST_UNLABELLED=most):
            chosen = read(images, others)
            assert read(images, others) == chosen
        assert capsys.readouterr().out.count(f"of a random {number} of 6") == 2


def test_an_epoch_has_so_many_batches_and_the_next_goes_on_where_it_ended():
    images = LabelledImages([None] * 5, range(5))
    sampler = build_loader(Transformed(images, None), batch_size=3, shuffle=True, batches=4).batch_sampler
    draws = []
    for _ in range(5):  # epochs of 4 batches of 3
        draws += itertools.chain(*sampler)
    assert len(draws) == 60 and len(sampler) == 4 and sampler.drawn == 12
    for start in range(0, 60, 5):  # each pass has every image once,
        assert sorted(i for i, _ in draws[start : start + 5]) == list(range(5))
    assert len({seed for _, seed in draws}) == 60  # in a view of its own


def test_a_run_says_what_images_without_labels_did_and_goes_on_bit_for_bit(finetune, images, monkeypatch, capsys):
    monkeypatch.setattr(loaders, "LEAST_STEPS", 4)
    monkeypatch.setattr(unlabelled, "foreign", lambda *_: torch.arange(6) < 4)
    options = f"--labels-per-class 5 --unlabelled {images} --augmentation crop"
    of_start = []
    results = finetune(options, output="whole", after_epoch=lambda run: of_start.append(run.teacher.first_answers))
    assert [len(answers) for answers in of_start] == [2, 2]
    printed = capsys.readouterr().out
    found = results["unlabelled"]
    assert "67% resemble no labelled image and do not train\n" in printed
    assert "unlabelled: the head starts at the probe: no other is better for labelled images held out" in printed
    assert f"they are taken for bright {found['shares']['bright']:.0%}" in printed
    assert (found["images"], found["left_out"], found["trained"]) == (6, 4, True)
    assert json.loads((results["folder"] / "results.json").read_text())["unlabelled"] == found
    with pytest.raises(runs.Stopped):
        finetune(options, output="stopped", after_epoch=lambda run: run.stop._note(2, None))
    with pytest.raises(InputError, match=f"--unlabelled was {images} in the run of .*, and is not given now: resume"):
        finetune("--labels-per-class 5 --augmentation crop --resume", output="stopped")
    resumed = finetune(f"{options} --resume", output="stopped")
    assert_same_tensors(resumed["folder"] / "lora.pth", results["folder"] / "lora.pth")
    assert resumed["unlabelled"] == found


def test_a_run_whose_start_knows_too_little_trains_on_its_labels_alone(finetune, images, monkeypatch, capsys):
    """As does one to which all other images are foreign."""
    monkeypatch.setattr(unlabelled, "foreign", lambda *_: torch.arange(6) < 4)
    options = "--labels-per-class 5 --epochs 1"
    alone = finetune(options, output="alone")
    assert alone["unlabelled"] is None
    for owner, name, answer, why in (
        (Teacher, "knows_enough", False, "of which the start knows too little"),
        (unlabelled, "foreign", torch.ones(6) > 0, "all of which are of another kind than the labelled ones"),
    ):
        with mock.patch.object(owner, name, return_value=answer):
            of_run = finetune(f"{options} --unlabelled {images}", output=name)
            resumed = finetune(f"{options} --unlabelled {images} --resume", output=name)
        assert f"images without labels, {why}, do not train" in capsys.readouterr().out
        assert resumed["unlabelled"] == of_run["unlabelled"] and not of_run["unlabelled"]["trained"]
        assert_same_tensors(of_run["folder"] / "lora.pth", alone["folder"] / "lora.pth")


def test_the_first_process_says_for_all_what_images_without_labels_show(start, images, monkeypatch):
    run = start(f"--labels-per-class 5 --unlabelled {images}")
    monkeypatch.setattr(unlabelled, "foreign", lambda *_: torch.zeros(6) > 0)
    run.start()
    assert reports.describe_unlabelled(run).endswith("; 0% resemble no labelled image")
    run = start(f"--labels-per-class 5 --unlabelled {images}")
    said = {"foreign": torch.arange(6) < 3, "answers": torch.arange(18.0).reshape(6, 3)}
    monkeypatch.setattr(distributed, "gather", lambda own: [own._replace(**said)])
    run.start()
    assert torch.equal(run.teacher.first_answers, said["answers"][3:])
    taken = run.loaders.images.unlabelled  # they train, are watched and tell the last head
    assert [*taken.indices] == [*run.splits.unlabelled.indices[3:]]
    assert (run.by_unlabelled["foreign"], run.by_unlabelled["left_out"]) == (0.5, 3)
    assert run.by_unlabelled["shares"] == dict(zip(CLASSES, (7.5, 8.5, 9.5), strict=True))


def test_below_five_labels_a_class_they_do_not_train(start, images, monkeypatch):
    for labels, of_start in ((4, "no other is better for labelled images held out"), (1, "with one label of a class")):
        monkeypatch.setattr(unlabelled, "foreign", lambda *_, others=21 - 3 * labels: torch.arange(others) < 6)
        run = start(f"--labels-per-class {labels} --unlabelled {images}")
        run.start()
        assert run.teacher is None
        told = reports.describe_unlabelled(run)
        assert f"starts at the probe: {of_start}" in told and told.endswith("no labelled image")
        assert "; images without labels, below 5 labels a class, do not train" in told


def teacher_of(certainty=0.8, shares=(0.5, 0.25, 0.25)) -> Teacher:
    """A teacher of a linear network of two inputs and three classes, for four images."""
    found = Teacher(nn.Linear(2, 3), 4, 3, CPU, torch.float32)
    found.first_answers = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.4, 0.3, 0.3]])
    found.begin()
    found.certainty = torch.tensor(certainty)
    found.shares = torch.tensor(shares)
    return found


def test_it_begins_with_the_start_and_its_weights_are_a_moving_average_of_those_that_train():
    """With which, and with what else it has noted, a resumed run goes on."""
    found = teacher_of()
    found.seen += 1  # as where the adapters' first gradient asked for labels
    found.begin()
    assert not found.seen.any()
    assert_identical(found.average, found.weights)
    assert found.certainty.item() == pytest.approx((0.6 + 0.8 + 0.6 + 0.4) / 4)
    assert found.shares.tolist() == pytest.approx([1.3 / 4, 1.6 / 4, 1.1 / 4])
    first = found.model.weight.detach().clone()
    found.model.weight.data += 1
    for _ in range(7):
        found.seen += 1
        found.after_step()
    torch.testing.assert_close(found.average["weight"], first + 1 - 0.95**7)
    with weights_replaced(found.weights, found.average.items()):
        assert torch.equal(found.model.weight, found.average["weight"])
    torch.testing.assert_close(found.model.weight, first + 1)
    resumed = Teacher(found.model, 4, 3, CPU, torch.float32)
    resumed.load_state_dict(found.state_dict())
    assert_identical(resumed.state_dict(), found.state_dict())


def test_how_sure_answers_are_moves_with_those_of_each_step():
    found = teacher_of()
    answers = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]])
    for rows in (answers[:2], answers[2:]):  # in two batches of one step, now as at the start
        found.sure_labels(rows.log(), rows)
    found.after_step()
    torch.testing.assert_close(found.certainty, 0.95 * torch.tensor(0.8) + 0.05 * answers.amax(1).mean())
    torch.testing.assert_close(found.shares, 0.95 * torch.tensor([0.5, 0.25, 0.25]) + 0.05 * answers.mean(0))
    assert not found.seen.any()


def test_it_labels_what_both_answers_together_are_sure_of():
    """A class that is rare in the answers needs less certainty."""
    found = teacher_of(certainty=0.7, shares=(0.4, 0.4, 0.2))
    first = torch.tensor([[0.9, 0.05, 0.05], [0.9, 0.05, 0.05], [0.3, 0.3, 0.4]])
    now = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.3, 0.3, 0.4]])
    # sqrt of the products: 0.9 for the first; no more than 0.45 for the second, of two minds; 0.4 for the third
    labels, counts = found.sure_labels(now.log(), first)
    assert labels.tolist() == [0, NO_LABEL, 2]
    assert counts.tolist() == pytest.approx([0.85, 0.171, 0.1], abs=1e-3)  # 0.9 is 0.85 of the way from 1/3
    found.certainty = torch.tensor(0.91)
    assert found.sure_labels(now.log(), first)[0].tolist() == [NO_LABEL] * 3  # class 2 from 0.455 on
    # 1e-4 takes the place of 0, which is no proof, and now the second is as likely as the first was: 1, 1 and 1e-2
    _, counts = found.sure_labels(torch.tensor([[0.0, 5.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    assert counts.item() == pytest.approx((1 / 2.01 - 1 / 3) * 3 / 2)


def test_all_in_all_it_is_as_sure_as_the_start():
    """Its own labels make it ever surer, whether they are right or not."""
    first = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]])  # a variance of 2 in each row
    now = torch.tensor([[0.0, 0.0, 18.0], [0.0, 6.0, 0.0]])  # of 72 and 8, in the mean 40: that of 2 by sqrt(20)
    answers = ((now / 20**0.5 + first) / 2).softmax(1)
    for factor in (0.01, 1, 100):
        _, counts = teacher_of().sure_labels(factor * now, first.softmax(1))
        torch.testing.assert_close(counts, (answers.amax(1) - 1 / 3) * 3 / 2)
    _, counts = teacher_of().sure_labels(torch.zeros(2, 3), first.softmax(1))  # that of a dead network is the start's
    torch.testing.assert_close(counts, ((first / 2).softmax(1).amax(1) - 1 / 3) * 3 / 2)


def test_it_answers_by_its_own_weights():
    found = teacher_of()
    found.average["weight"].copy_(9 * torch.eye(3, 2))
    found.model.weight.data.zero_()
    places = torch.tensor([3, 0])
    found.sure_labels = mock.Mock(return_value=(torch.tensor([0, NO_LABEL]), torch.tensor([0.5, 0.25])))
    modes = []
    found.model.register_forward_hook(lambda model, *_: modes.append(model.training))
    labels, counts = found.extend(torch.tensor([1]), torch.eye(2), places)
    assert labels.tolist() == [1, 0, NO_LABEL] and modes == [False]
    assert counts.tolist() == [1, 0.5, 0.25]
    [logits, first] = found.sure_labels.call_args.args
    torch.testing.assert_close(logits, 9 * torch.eye(2, 3) + found.model.bias.detach())
    assert torch.equal(first, found.first_answers[places])


def test_where_the_start_is_no_surer_than_chance_nothing_is_learnt_from_it():
    found = teacher_of()
    for certainty, is_enough in ((0.39, False), (0.41, True)):  # 0.4 is a tenth of the way from 1/3 to 1
        found.first_answers = torch.tensor([[certainty + 0.01, 0.59 - certainty, 0.4], [0.3, certainty - 0.01, 0.3]])
        assert found.knows_enough() == is_enough


def test_what_was_answered_surely_stays_so_but_for_what_must_have_been_wrong():
    """Of four answers as sure as 0.7 three quarters of 2.8 have to stay, of 0.66 three quarters of 2.64."""
    found = teacher_of()
    assert found.surest().tolist() == [0, 3, 1, 2]  # by class, and in each the surest first
    with mock.patch.object(teacher, "SUREST", 2):  # and one of each class at least
        assert found.surest().tolist() == [0, 1, 2]
    for certainty, changed, still_sure in ((0.99, 1, True), (0.7, 2, False), (0.66, 2, True)):
        found.first_answers = torch.full((4, 3), (1 - certainty) / 2).fill_diagonal_(certainty)
        found.first_answers[3, 0] = certainty
        logits = found.first_answers[found.surest()].log()
        logits[:changed] = torch.tensor([0.0, 9.0, 0.0])
        assert found.still_sure(logits) is still_sure


@pytest.fixture
def taught(start, images, monkeypatch):
    """A run that has begun, of 15 images with labels and 6 without, in batches of 4 and 4."""
    monkeypatch.setattr(loaders, "LEAST_STEPS", LEAST_STEPS)
    run = start(f"--labels-per-class 5 --unlabelled {images} --batch-size 8")
    run.start()
    return run


def test_a_run_begins_with_the_adapters_start_and_has_many_steps_of_which_half_the_images_have_labels(taught):
    assert_identical(taught.teacher.average, taught.teacher.weights)
    assert not taught.teacher.seen.any()  # what the first gradient asked for is forgotten
    assert taught.steps_per_epoch == 12
    for epoch in (1, 2):
        steps = list(taught.loaders.steps(epoch))
        assert len(steps) == 12 and steps[-1].is_last
        for step in steps:
            [(images, labels, weak, places)] = step.batches
            assert (len(images), len(labels), len(weak), len(places), step.images) == (8, 4, 4, 4, 4)
            assert labels.tolist() != [NO_LABEL] * 4 and max(places.tolist()) < 6
            torch.testing.assert_close(images[4:], weak)  # without an augmentation both views are plain


def test_more_labels_make_an_epoch_longer_as_ever_and_strong_views_have_one_more_change(start, images, monkeypatch):
    monkeypatch.setattr(loaders, "LEAST_STEPS", 2)
    options = "--batch-size 2 --accumulation-steps 2 --augmentation crop"
    run = start(f"--labels-per-class 5 --unlabelled {images} {options}")
    assert run.steps_per_epoch == len(list(run.loaders.steps(1))) == 4  # 15 images by 4
    strong, weak = run.loaders.unlabelled.dataset.transform.views
    assert "TrivialAugmentWide" in str(strong.steps) and "TrivialAugmentWide" not in str(weak.steps)


def test_a_step_is_the_dense_gradient_of_both_losses(taught):
    """The mean over images with a label, and the weighted sum over sure ones divided by all without."""
    [(views, labels, weak, places)] = next(iter(taught.loaders.steps(1))).batches
    taught.teacher.certainty = torch.tensor(0.0)  # sure of all but the first
    sure, _ = taught.teacher.extend(labels, weak, places)
    sure[4] = NO_LABEL
    counts = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.9, 0.1, 0.5, 0.7])
    model = copy.deepcopy(taught.model)
    model.zero_grad()
    logits = model(views)
    of_sure = counts[5:] @ F.cross_entropy(logits[5:], sure[5:], reduction="none")
    (F.cross_entropy(logits[:4], labels) + of_sure / 4).backward()
    with mock.patch.object(taught.teacher, "extend", lambda *_: (sure, counts)):
        loss, _ = train_on(taught, MicroBatches(iter([(views, labels, weak, places)]), 1, 4, True))
    assert loss == pytest.approx(F.cross_entropy(logits[:4], labels, reduction="sum").item(), rel=1e-4)
    found, expected = [{name: p.grad for name, p in trained(each).items()} for each in (taught.model, model)]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_at_the_end_the_head_is_estimated_by_what_the_trained_network_sees(taught, spy, monkeypatch):
    """By plain and changed views of images with labels, and by those without; no evaluation image is looked at."""
    constant = unlabelled.Probe(torch.full((3, 192), 2.0), torch.ones(3), 0.1)
    asked = spy(classification, "seen")
    monkeypatch.setattr(classification, "last_head", lambda *_: constant)
    monkeypatch.setattr(taught.loaders, "val", None)
    taught.task.class_weights = torch.ones(3)
    assert taught.estimate_head()
    head = probe.linear_head(taught.model)
    assert (head.weight == 2).all() and (head.bias == 1).all()
    [features, labels, others, classes, views, weights] = asked.call_args.args
    assert (len(features), len(others), classes, views) == (30, 6, 3, 2) and weights is taught.task.class_weights
    assert labels.tolist() == 2 * taught.loaders.images.train.labels
    views = taught.loaders.unlabelled_views(torch.arange(6))
    expected, _ = evaluation.all_outputs(taught.model, views, CPU, torch.float32)
    torch.testing.assert_close(others @ torch.full((3, 192), 2.0).T + 1, expected)
    # Not of what trained at a lowered rate, of what did harm, without images without labels, and without adapters.
    untold = ((taught, "rate", taught.rate / 2), (taught.kept, "at_start", True), (taught, "teacher", None))
    untold = (*untold, (taught, "args", mock.Mock(lora_rank=0, learning_rate=taught.rate)))
    for owner, name, value in untold:
        with mock.patch.object(owner, name, value):
            assert not taught.estimate_head()


@pytest.mark.parametrize(("labels", "views"), [(5, 6), (3, 8)])
def test_the_fewer_images_have_labels_the_more_views_of_each_start_the_head(start, images, monkeypatch, labels, views):
    """Up to PROBED_VIEWS in all and MOST_VIEWS of each, of which the guard watches none: it would be sure of them."""
    monkeypatch.setattr(loaders, "PROBED_VIEWS", 100)  # of 15 and of 9 images
    run = start(f"--labels-per-class {labels} --unlabelled {images} --augmentation crop")
    [(rows, _), _, (augmented, labels), _] = run.loaders.features(run.model, run.task, run.dtype)
    assert len(augmented) == views * len(rows) and labels.tolist() == views * run.loaders.images.train.labels
    assert len(augmented.unique(dim=0)) > 0.9 * len(augmented)
    [watched, *_], [seen, *_] = [next(iter(loader)) for loader in (run.loaders.watched, run.loaders.augmented)]
    assert not torch.equal(watched[0], seen[0])


def test_the_file_has_the_head_of_the_end_and_the_run_goes_on_with_its_own(finetune, images, monkeypatch, capsys):
    """Calibrated, as it is evaluated."""
    constant = unlabelled.Probe(torch.zeros(3, 192), torch.tensor([0.0, 3.0, 0.0]), 0.1)
    monkeypatch.setattr(classification, "last_head", lambda *_: constant)
    calibrate = mock.Mock(return_value=False)
    monkeypatch.setattr(FineTuning, "calibrate", calibrate)
    monkeypatch.setattr(Guard, "after_epoch", lambda *_: False)
    results = finetune(f"--labels-per-class 5 --unlabelled {images} --epochs 1")
    assert list(results["accuracy_per_class"].values()) == [0, 1, 0]
    file = read_adapter_file(results["folder"] / "lora.pth")
    [bias] = (tensor for name, tensor in file["tensors"].items() if name.endswith("bias"))
    assert bias.tolist() == [0, 3, 0] and calibrate.called
    assert "unlabelled: the head is estimated once more" in capsys.readouterr().out


def test_the_guard_is_told_whether_what_was_sure_stays_so(finetune, images, monkeypatch):
    asked = mock.Mock(return_value=True)
    told = mock.Mock(side_effect=[True, False, True])  # of the start, the epoch, and the start again, which is kept
    monkeypatch.setattr(Guard, "after_epoch", asked)
    monkeypatch.setattr(Teacher, "still_sure", told)
    finetune(f"--labels-per-class 5 --unlabelled {images} --epochs 1")
    asked.assert_called_once_with(mock.ANY, False)


def test_numbers_and_plain_views_start_a_head_by_one_view(start, hospital):
    """Of numbers all rows count alike, and without an augmentation all views are the same."""
    numbers = f"--task regression --data-dir {hospital} --data-list {hospital}/numbers.csv --group-by Patient"
    numbers += " --augmentation crop"
    for told in (numbers, "--labels-per-class 3 --augmentation none"):
        loaders = start(told).loaders
        assert len(loaders.augmented.loader.dataset) == len(loaders.images.train)


# ------------------------------------------------ where the head starts: hand-made clusters, and numbers in closed form


KINDS = 3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(images: int, seed: int, apart: float = 0.6) -> tuple[Tensor, Tensor]:
    """Images (N, 30) around a centre for each class, far from 0, with noise that hides the centres from a few."""
    labels = torch.arange(images) % KINDS
    return 10 + apart * normal(KINDS, 30, seed=0)[labels] + normal(images, 30, seed=seed), labels


def contradicting(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 30) in three clusters, in each of which are all three classes."""
    labels = torch.arange(images) % KINDS
    clusters = torch.randint(3, (images,), generator=torch.Generator().manual_seed(seed))
    return 10 + 2 * normal(3, 30, seed=0)[clusters] + normal(images, 30, seed=seed), labels


class Drawn:
    """Labelled images of a drawn kind, in two views, 300 images without labels, and the probe of the labelled ones."""

    def __init__(self, draw, per_class: int, patients: Tensor | None = None):
        features, labels = draw(KINDS * per_class, seed=1)
        self.features = torch.cat([features, features + 0.1 * normal(*features.shape, seed=2)])
        self.labels = labels.repeat(2)
        self.others, self.truth = draw(300, seed=3)
        self.plain = probe.fit_linear_probe(self.features, self.labels, KINDS, views=2, clusters=patients)
        self.images, self.known = unlabelled.seen(self.features, self.labels, self.others, KINDS)

    def start(self) -> unlabelled.Start:
        return unlabelled.start(self.images, self.known, self.plain, views=2)

    def held_out(self) -> dict[str, Tensor]:
        return unlabelled.held_out_answers(self.images, self.known, self.plain, 2, None)


def placed(labelled: int, others: int = 300) -> tuple[unlabelled.Images, unlabelled.Labelled, Tensor]:
    """Images, of which so many have labels; what is known of these, and the classes of the others."""
    features, labels = clustered(labelled, seed=1)
    more, truth = clustered(others, seed=3)
    return *unlabelled.seen(features, labels, more, KINDS), truth


def test_clusters_of_images_without_labels_move_the_head():
    """With a head at the temperature that fits what is held out, from which that of a run's end follows."""
    drawn = Drawn(clustered, 5)
    found = drawn.start()
    assert found.name == "k-means" and found.gain_loss > 0 and found.gain_accuracy >= 0
    assert (found.answers.argmax(1) == drawn.truth).float().mean() > 0.9
    torch.testing.assert_close(found.answers.sum(1), torch.ones(300))
    answers = drawn.held_out()["k-means"]
    temperature = unlabelled.judge(answers, drawn.labels, 2).temperature
    assert answers.isfinite().all() and not 0.9 < temperature < 1.1
    torch.testing.assert_close(found.probe.held_out, answers[0] / temperature)
    soft = (unlabelled.k_means(drawn.images, drawn.known) / temperature).softmax(1)
    torch.testing.assert_close(found.probe.weight, unlabelled.distilled(drawn.images, drawn.known, soft)[0])


def test_clusters_that_are_no_classes_leave_the_probe_as_it_is():
    """As does one image a class, of which nothing can be checked."""
    alone = Drawn(clustered, 1)
    drawn = Drawn(contradicting, 10)
    for of in (alone, drawn):
        found = of.start()
        assert found.probe is of.plain and (found.name, found.gain_loss, found.gain_accuracy) == ("probe", 0, 0)
    held_out = drawn.held_out()
    torch.testing.assert_close(held_out["probe"][0], drawn.plain.held_out, atol=0.1, rtol=0)  # by rough steps
    temperature = unlabelled.judge(held_out["probe"], drawn.labels, 2).temperature
    assert abs(math.log(temperature)) > 0.1  # as unsure as what is held out shows
    logits = drawn.others @ drawn.plain.weight.T + drawn.plain.bias
    torch.testing.assert_close(found.answers, (logits / temperature).softmax(1))


def test_the_images_of_a_patient_are_held_out_together(monkeypatch):
    """k-means knows the labels of whole patients, in both views, and answers for the others."""
    patients = torch.arange(30) // 2
    shown = []

    def k_means(images: unlabelled.Images, known: unlabelled.Labelled) -> Tensor:
        shown.append(known.places)
        assert torch.equal(known.counts[:, 0], 1.0 + known.places)  # each with its own weight
        return torch.zeros(len(images.rows), KINDS)

    monkeypatch.setattr(unlabelled, "k_means", k_means)
    monkeypatch.setattr(unlabelled, "foreign", lambda _, rows, views, of: rows + views + of.max())
    drawn = Drawn(clustered, 10, patients)
    known = drawn.known._replace(counts=1.0 + torch.arange(60)[:, None])
    found = unlabelled.start(drawn.images, known, drawn.plain, views=2, clusters=patients)
    assert found.foreign == 60 + 2 + 14
    assert len(shown) == 2 * probe.FOLDS
    of = torch.cat([patients, patients])
    for places in shown:
        left = np.setdiff1d(np.arange(60), places.numpy())
        assert not np.intersect1d(of[places], of[left]).size
    assert not torch.equal(shown[0], shown[probe.FOLDS])  # another turn deals anew


@pytest.mark.parametrize(
    ("patients", "views", "expected"),
    # Labelled images are 10 degrees from another or, of other patients, 20, 10 and 10: 9 in 10 are at most 18.4.
    [(None, 1, [0, 1, 1, 1]), (None, 2, [0, 1, 1, 1]), ([0, 0, 1], 1, [0, 0, 1, 1]), ([0, 0, 0], 1, [0, 0, 0, 0])],
)
def test_images_that_are_like_no_labelled_one_are_foreign(monkeypatch, patients, views, expected):
    """Less alike than 9 in 10 labelled ones are to another, which is no view of it and no image of its patient."""
    monkeypatch.setitem(probe.SCALINGS, "deviation", lambda rows: SimpleNamespace(rows=rows))  # it is set aside
    degrees = torch.tensor([*[0, 10, 20, 1, 11, 90][: 3 * views], -5, 38, 39, 190]).deg2rad()  # 5, 18, 19 and 170
    rows = torch.stack([degrees.cos(), degrees.sin()], 1) * torch.arange(1.0, len(degrees) + 1)[:, None]
    clusters = patients and torch.tensor(patients)
    found = unlabelled.foreign(unlabelled.Images(rows, torch.zeros(0)), 3 * views, views, clusters)
    assert found.tolist() == expected


def test_foreign_images_do_not_train_where_they_are_more_than_chance_explains():
    for foreign, expected in (([1, 0, 0, 1, 0], [0, 1, 2, 3, 4]), ([1, 0, 1, 1, 0], [1, 4])):
        found = unlabelled.Start(None, "probe", None, 0, 0, torch.tensor(foreign) > 0)
        assert found.of_their_kind().tolist() == expected


def test_held_out_answers_are_judged_at_the_temperature_that_fits():
    """Three of four right by a logit of 6 are as sure as they should be at a temperature of 6 / log 3."""
    labels = torch.tensor([0, 0, 0, 1] * 2)
    logits = torch.tensor([6.0, 0.0]).repeat(2, 8, 1)
    judged = unlabelled.judge(logits, labels, views=2)
    assert judged.temperature == pytest.approx(6 / math.log(3), rel=1e-3)
    torch.testing.assert_close(judged.losses, -torch.tensor([0.75, 0.75, 0.75, 0.25]).log(), atol=1e-3, rtol=0)
    assert judged.hits.tolist() == [1, 1, 1, 0]
    logits[0, 3] = logits[0, 7] = logits[:, 1] = logits[:, 5] = torch.nan  # answered once, and never: so four of five
    judged = unlabelled.judge(logits, labels, views=2)
    assert judged.temperature == pytest.approx(6 / math.log(4), rel=1e-3)
    assert judged.hits[[0, 2, 3]].tolist() == [1, 1, 0] and judged.hits[1].isnan() and judged.losses[1].isnan()


def test_answers_that_are_not_sure_teach_the_head_nothing():
    """Others count by how sure they are, here of a class or of (0.8, 0.1, 0.1), all together thrice as labels do."""
    images, known, truth = placed(30, others=90)
    known = known._replace(counts=torch.full((30, 1), 2.0).double())
    answers = torch.full((120, KINDS), 1 / KINDS)
    answers[30:60] = torch.eye(KINDS)[truth[:30]]
    answers[45:60] = 0.1 + 0.7 * answers[45:60]
    sure = torch.ones(30, 1)
    sure[15:] = 1 + (0.8 * math.log(0.8) + 0.2 * math.log(0.1)) / math.log(3)
    weight, bias = unlabelled.distilled(images, known, answers)
    targets = torch.cat([known.targets, answers[30:60].double()])
    rows = probe.SCALINGS["deviation"](images.rows).rows
    counts = torch.cat([known.counts, 3.0 * 60 * sure / sure.sum()])
    fitted = probe.logistic(rows[:60], targets, counts, unlabelled.DISTILLED, probe.softmax_loss, intercept=True)
    expected = rows @ fitted[:, :-1].float().T + fitted[:, -1].float()
    torch.testing.assert_close(images.rows @ weight.T + bias, expected, atol=0.02, rtol=0)


def test_k_means_begins_at_the_means_of_the_classes_and_ends_at_the_clusters(monkeypatch):
    monkeypatch.setattr(unlabelled, "ROUNDS", 2)  # of an image of each class, the first of weight 3, and one between
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5**0.5, 0.5**0.5]])
    labelled = unlabelled.Labelled(torch.arange(2), torch.eye(2).double(), torch.tensor([[3.0], [1.0]]).double())
    centre = torch.nn.functional.normalize(torch.tensor([4 + 0.5 * 0.5**0.5, 0.5 * 0.5**0.5]), dim=0)
    expected = 15 * centre[0] + 0.5 * math.log(4.5 / 7)
    torch.testing.assert_close(unlabelled.k_means(unlabelled.Images(None, points), labelled)[0, 0], expected)


def test_points_have_one_length_and_directions_about_the_same_spread():
    """Whatever a feature is measured in; directions of noise stay small."""
    features, _ = clustered(200, seed=1)
    images = unlabelled.placed(features)
    torch.testing.assert_close(images.whitened.norm(dim=1), torch.ones(200))
    scaled = unlabelled.placed(features * 10.0 ** torch.linspace(-2, 2, 30) + 5)
    similar = images.whitened @ images.whitened.T
    torch.testing.assert_close(scaled.whitened @ scaled.whitened.T, similar, atol=1e-2, rtol=0)
    # Two directions, and 126 in which nothing varies; in closed form.
    spreads = torch.tensor([1.8, 0.2]).sqrt()
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    rows = torch.nn.functional.pad(torch.cat([signs, -signs]) * spreads @ signs / 2**0.5, (0, 138))
    first, second, *_ = unlabelled.placed(rows).whitened
    p, q = (spreads / (spreads + 0.3 * (spreads.sum() + 126e-6) / 128)).square()
    torch.testing.assert_close(first @ second, (p - q) / (p + q), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("gains", "right", "patients", "taken"),
    [
        ([0.1, 0.9, 0.1, 0.9, math.nan], 3, None, True),  # a mean of 0.5, whose standard error is 0.2
        ([0.1, 0.9, 0.1, 0.9, math.nan], 2, None, False),
        ([-0.1, 1.1, -0.1, 1.1, math.nan], 3, None, False),  # whose standard error is 0.3
        ([0.1, 0.9, 0.1, 0.9, math.nan], 3, torch.tensor([0, 1, 0, 1, 1]), False),  # over patients it is 0.28
    ],
)
def test_k_means_is_taken_if_its_loss_is_lower_by_two_errors(monkeypatch, gains, right, patients, taken):
    """And if no less is right: the probe has three of four right. Of a fifth image nothing was held out."""
    of_probe = unlabelled.Judged(1.0, torch.full((5,), 1.0), torch.tensor([1.0, 1.0, 1.0, 0.0, math.nan]))
    of_k_means = unlabelled.Judged(1.0, 1.0 - torch.tensor(gains), (torch.arange(5) < right).float())
    answers = dict.fromkeys(("probe", "k-means"), torch.zeros(2, 5, KINDS))
    monkeypatch.setattr(unlabelled, "held_out_answers", lambda *_: answers)
    monkeypatch.setattr(unlabelled, "judge", mock.Mock(side_effect=[of_probe, of_k_means]))
    features, labels = clustered(5, seed=1)
    plain = probe.fit_linear_probe(features, labels, KINDS)
    images, known, _ = placed(5, others=60)
    found = unlabelled.start(images, known, plain, clusters=patients)
    assert (found.probe is not plain) == taken and (found.name == "k-means") == taken


def test_what_is_held_out_is_judged_as_it_is_and_by_one_view(monkeypatch):
    """Seven more views, which nobody can tell, would make the answers for plain images look unsure."""
    drawn = Drawn(clustered, 6)
    expected = drawn.start()
    n = len(drawn.labels) // 2
    more = [torch.cat([of, *[of[n:]] * 7]) for of in (drawn.features, drawn.labels)]
    blurred = {name: torch.cat([of, torch.zeros(2, 7 * n, KINDS)], 1) for name, of in drawn.held_out().items()}
    monkeypatch.setattr(unlabelled, "held_out_answers", lambda *_: blurred)
    found = unlabelled.start(*unlabelled.seen(*more, drawn.others, KINDS, 9), drawn.plain, views=9)
    assert found.name == expected.name and found.gain_loss == pytest.approx(expected.gain_loss)
    assert 0 < found.foreign.float().mean() < 0.2  # else images would be alike to their own views


def test_the_last_head_is_k_means_distilled_and_asks_no_labels_that_were_held_out(monkeypatch):
    monkeypatch.setattr(unlabelled, "held_out_answers", None)
    drawn = Drawn(clustered, 3)
    found = unlabelled.last_head(drawn.images, drawn.known)
    soft = unlabelled.k_means(drawn.images, drawn.known).softmax(1)
    weight, bias = unlabelled.distilled(drawn.images, drawn.known, soft)
    assert torch.equal(found.weight, weight) and torch.equal(found.bias, bias)


def test_the_views_of_an_image_weigh_against_other_images_as_one():
    """However many views of three images there are, images without labels count for as much; and classes as asked."""
    rows = torch.randn(12, 4), torch.tensor([0, 1, 1] * 4), torch.randn(5, 4)
    images, known = unlabelled.seen(*rows, 2, 4, torch.tensor([1.5, 0.75]))
    assert known.counts[:, 0].tolist() == pytest.approx([1.5, 0.75, 0.75] + 3 * [0.5, 0.25, 0.25])
    assert len(images.rows) == 17
