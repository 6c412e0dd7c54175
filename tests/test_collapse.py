"""What a run does when training harms the network, and which epoch it keeps."""

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import deploy_lora
from finetune_lora import FineTuning, train
from lora_utils import read_adapter_file, trained_state
from tests.run_folders import assert_identical, assert_same_tensors, column, metrics, train_on, writes_nothing
from toolkit.answers import evaluation, measures, probe, tasks
from toolkit.answers.evaluation import Evaluation, all_outputs
from toolkit.images.data import LabelledImages, Transformed
from toolkit.run import guard, loaders
from toolkit.run.guard import Collapsed, GoBack, Guard

COLLAPSED = "training collapsed"
NO_GAIN = "training gains nothing"
OF_LABELS = "--task multilabel --data-dir {0} --data-list {0}/labels.csv --group-by Patient"  # of the hospital


def test_the_last_adapter_is_kept_whatever_the_evaluation_images_say(finetune, monkeypatch, capsys):
    """The best epoch would be chosen on the very images that measure it: told, but no number to publish."""
    options = "--epochs 3 --labels-per-class 2"
    other = finetune(options, "other")
    scripted = iter([0.85, 0.9, 0.82])
    with_evaluations(monkeypatch, lambda _, real: real._replace(accuracy=next(scripted, 0.82)))
    results = finetune(options)
    assert (results["val_accuracy"], results["best_epoch"], results["best_val_accuracy"]) == (0.82, 2, 0.9)
    assert "accuracy after        12 of 15 images, 82.00% (95% interval" in capsys.readouterr().out
    assert read_adapter_file(results["folder"] / "lora.pth")["metadata"]["epoch"] == 3 and not results["retreats"]
    assert_same_tensors(results["folder"] / "lora.pth", other["folder"] / "lora.pth")


def with_evaluations(monkeypatch, changed: Callable[[torch.nn.Module, Evaluation], Evaluation]) -> None:
    """Runs get other results on the evaluation images: what `changed` makes of the network and the real ones."""
    for name in ("kept_answers", "evaluate"):
        real = getattr(FineTuning, name)
        monkeypatch.setattr(FineTuning, name, lambda run, *given, real=real: changed(run.model, real(run, *given)))


def answers(score: float, loss: float) -> Evaluation:
    return Evaluation(loss, score, *[None] * 3)


def guard_of(images: int, scores: list[float], classes: int = 10, has_start: bool = False, epochs: int = 1) -> Guard:
    """One that watches so many images, of classes that are equally frequent, and has seen these accuracies."""
    watched = LabelledImages([None] * images, np.arange(images) % classes)
    judge = Guard(tasks.Classification(list(map(str, range(classes)))), watched, watched, has_start, epochs)
    judge.scores = scores
    return judge


def guard_with_a_start() -> Guard:
    """One of a run that began with an accuracy of 0.8 and a loss of 1, which was 3 in the worst and the first batch."""
    judge = guard_of(100, [], has_start=True)
    judge.note_start(3.0, answers(0.8, loss=1.0))
    judge.note_step(3.0)
    return judge


WORSE = answers(0.78, 1.1)


def told(ask: Callable, *given: Evaluation | bool | None) -> bool | str | None:
    """What the guard answers, or why the run is to go back."""
    try:
        return ask(*given)
    except GoBack as verdict:
        return str(verdict)


@pytest.mark.parametrize(
    ("trained", "still_sure", "does_harm"),
    [
        (answers(0.9, 0.5), None, False),
        (answers(0.8, 3.5), None, False),  # a higher loss alone is no harm, nor a collapse
        (answers(0.5, 0.9), None, COLLAPSED),
        (answers(0.9, math.nan), None, COLLAPSED),
        (answers(0.795, 1.1), None, False),  # half a point may be one view
        (WORSE, None, True),
        # Where images without labels train they watch too; the start answers more of the labelled ones than of others
        (answers(0.75, 0.9), None, True),
        (answers(0.75, 0.9), True, False),
        (answers(0.75, 1.0), True, True),
        (answers(0.9, 0.9), False, True),
    ],
)
def test_what_becomes_of_an_epoch(trained, still_sure, does_harm):
    """By the start, not by the best since. Asked once or twice, the guard answers the same and is the same."""
    judge = guard_with_a_start()
    judge.scores.append(0.9)
    before = copy.deepcopy(judge.state_dict())
    assert [told(judge.after_epoch, trained, still_sure) for _ in range(2)] == [does_harm] * 2
    assert judge.state_dict() == before


@pytest.mark.parametrize("kind, verdict", [(tasks.Segmentation, NO_GAIN), (tasks.Classification, True)])
def test_with_masks_a_run_that_would_end_with_its_start_goes_back(kind, verdict):
    """Not before its last epoch: later ones may mend what the first ones harm. Of whole images a start is a result."""
    watched = LabelledImages([None] * 400, [0] * 400, targets=torch.ones(400, 2))
    worse = answers(0.75, 0.5)  # by a lower loss
    judge = Guard(kind(["ground", "ink"]), watched, watched, has_start=True, epochs=3)
    judge.note_start(None, answers(0.8, loss=1.0))
    judge.note_step(1.0)
    for _ in range(2):
        assert judge.after_epoch(worse)
        judge.note_epoch(worse, does_harm=True)
    assert told(judge.after_epoch, worse) == verdict


def test_what_a_guard_has_noted_comes_back_with_its_state():
    """Nothing of it is as in a new guard: a retreat, a loss that rose since, an epoch that did harm."""
    judge = guard_with_a_start()
    judge.note_retreat(2, 1e-3, good_epochs=0, seconds=5.0)
    judge.note_step(5.0)
    judge.note_epoch(answers(0.7, 1.2), does_harm=True)
    other = guard_of(100, [], has_start=True)
    other.load_state_dict(copy.deepcopy(judge.state_dict()))
    noted = {"first_loss": 3.0, "recent_loss": pytest.approx(0.8 * 3.0 + 0.2 * 5.0), "scores": [0.8, 0.7]}
    noted |= {"start_loss": 1.0, "barren_epochs": 1, "lost_seconds": 5.0}
    noted |= {"retreats": [{"epoch": 2, "learning_rate": 1e-3}], "task": other.task}
    assert vars(other) == vars(guard_of(100, [], has_start=True)) | noted


@pytest.mark.parametrize("losses", [[1.0, 50.0], [1.0, math.nan], [math.nan]])
def test_a_retreat_forgets_the_losses_that_it_undoes(losses):
    """Else one bad step, were it the first, would be seen in the epochs after it, and use up all retreats."""
    judge = guard_of(100, [0.8])
    for loss in losses:
        judge.note_step(loss)
    assert told(judge.after_step) == COLLAPSED
    judge.note_retreat(1, 1e-3, good_epochs=0, seconds=5.0)
    judge.note_step(1.0)
    assert told(judge.after_step) is None and judge.recent_loss == judge.first_loss == 1.0


def test_an_epoch_that_did_harm_is_no_state_to_go_back_to_unless_there_is_no_start_to_keep(start):
    judge = guard_with_a_start()
    judge.note_epoch(answers(0.8, 1.2), does_harm=True)
    assert not judge.is_recoverable
    judge.note_epoch(answers(0.8, 0.9), does_harm=False)
    assert judge.is_recoverable
    run = start()
    assert run.guard.has_start and run.kept.may_be_start
    for options in ("--head-init random", "--lora-rank 0 --no-freeze-backbone"):
        run = start(options)
        assert not run.guard.has_start and not run.kept.may_be_start
    assert not guard_of(100, [0.8]).after_epoch(WORSE)


@pytest.mark.parametrize("batch, pixels, at_once", [(5, 16, 128), (5, 128, 32), (200, 16, 200)])
def test_small_images_are_answered_in_larger_batches_unless_norms_depend_on_them(start, batch, pixels, at_once):
    run = start(f"--batch-size {batch} --image-size {pixels} --workers 1")
    for norms_train, expected in ((False, at_once), (True, batch)):
        run.loaders.open(norms_train)
        opened = [run.loaders.train, run.loaders.val.loader, run.loaders.watched.loader, run.loaders.augmented.loader]
        assert [loader.batch_sampler.batch_size for loader in opened] == [batch, expected, expected, expected]
        assert [loader.persistent_workers for loader in opened] == [True, True, False, False]  # of a single pass


@pytest.mark.parametrize("options", ["", OF_LABELS])
def test_an_epoch_is_judged_at_a_believable_temperature_that_training_does_not_see(start, hospital, options):
    run = start(options.format(hospital))
    run.start()
    assert (run.head_temperature.spread is None) == bool(options)  # of overlaid images: of a probe of classes alone
    run.head_temperature = run.head_temperature._replace(optimism=3.0)
    run.evaluate_watched()
    head = probe.linear_head(run.model)
    before = head.weight.detach().clone()
    result = run.evaluate_kept(run.loaders.val)
    assert torch.equal(head.weight, before)
    with run.kept_weights():
        as_trained = run.evaluate(run.loaders.val)
        run.task.soften(run.model, run.task.believable_temperature(*run.watched_outputs, 3.0))
        assert result.loss == pytest.approx(run.evaluate(run.loaders.val).loss, rel=1e-5)
    assert result.loss != pytest.approx(as_trained.loss, rel=1e-2)


@pytest.mark.parametrize(("options", "more"), [("", 0), ("--keep-best accuracy", 1), ("--precision bf16", 1)])
def test_the_last_epochs_answers_are_the_results_unless_another_epoch_may_be_kept(finetune, images, spy, options, more):
    """Else the evaluation images are passed once more. In 16 bits figures would differ in rounding from the file's."""
    evaluations = spy(FineTuning, "evaluate")
    results = finetune(f"--epochs 1 --labels-per-class 2 {options}")
    assert evaluations.call_count == more
    assert_figures_of_file(results, images)


def assert_figures_of_file(results: dict, images: Path) -> None:
    found = deploy_lora.main(f"evaluate {results['folder']}/lora.pth {images} --device cpu".split())
    assert found["accuracy"] == results["val_accuracy"]
    assert found["loss"] == pytest.approx(results["val_loss"], rel=1e-2 if results["precision"] == "bfloat16" else 1e-4)


@pytest.mark.parametrize(("most", "started", "loaded"), [(21, 8 * 21, 0), (9, 21, 8 * 9)])
def test_views_of_the_start_calibrate_unless_that_takes_fewer(start, spy, monkeypatch, most, started, loaded):
    monkeypatch.setattr(loaders, "CALIBRATION_IMAGES", most)
    run = start("--augmentation crop")
    features, _ = run.start().augmented_views
    assert len(features) == started
    load = spy(Transformed, "__getitem__")
    assert run.calibrate() and load.call_count == loaded


def test_overlaid_images_are_answered_as_surely_as_by_the_probe(start, monkeypatch):
    """Logits a hundred times as large are a hundred times too sure; of many images it is their views that say so."""
    run = start()
    run.start()
    head = probe.linear_head(run.model)
    run.task.soften(run.model, 1 / run.temperature)
    assert measures.spread(run.overlaid_outputs()) == pytest.approx(run.head_temperature.spread)
    head.weight.data.mul_(100)
    head.bias.data.mul_(100)
    views = evaluation.all_outputs(run.network, run.loaders.augmented, run.device)
    fitted = run.task.believable_temperature(*views, 1.0)
    softness = run.head_temperature._replace(optimism=3.0)
    for spread in (None, 0.0):  # where the probe says nothing of them the views alone do
        run.head_temperature = softness._replace(spread=spread)
        assert run.calibrate() and run.task.temperature == pytest.approx(3 * fitted, rel=1e-3)
        run.task.soften(run.model, 1 / run.task.temperature)
    run.head_temperature = softness
    monkeypatch.setattr(tasks, "SURE_IMAGES", 2 * len(run.splits.train))  # a third of the say is the views'
    assert run.calibrate()
    assert run.task.temperature == pytest.approx((3 * fitted) ** (1 / 3) * 100 ** (2 / 3), rel=1e-3)
    run.task.soften(run.model, 1 / run.task.temperature)
    run.head_temperature = softness._replace(optimism=None)  # of a probe of one image a class
    assert run.calibrate() and run.task.temperature == pytest.approx(100, rel=1e-3)
    run.head_temperature = softness
    head.weight.data.zero_()  # a constant answer says nothing of how sure it may be
    head.bias.data.zero_()
    run.calibrate()
    assert run.task.temperature == 3
    run = start("--head-init random")  # by no probe
    run.start()
    assert run.head_temperature.spread is None


def test_the_guard_watches_several_views_of_few_images_and_these_laid_one_over_another(start, monkeypatch):
    """Norms follow adapters by the images as they are."""
    monkeypatch.setattr(guard, "WATCHED_VIEWS", 128)
    run = start("--augmentation crop --batch-size 21")
    run.start()
    assert len(run.splits.train) == 21 and run.guard.images == len(run.loaders.watched_images) == 126
    assert run.evaluate_watched().loss == run.evaluate_watched().loss  # the same views
    [(images, _)] = run.loaders.watched
    halves = (images[0] + images[-1]) / 2
    [(overlaid, _)] = evaluation.overlaid(run.loaders.watched)
    torch.testing.assert_close(overlaid[[0, -1]], torch.stack([halves, halves]))
    torch.testing.assert_close(run.overlaid_outputs()[-1:], run.model.eval()(halves[None]))
    [followed] = run.loaders.followed_batches()
    plain = Transformed(run.splits.train, run.loaders.eval_transform)
    torch.testing.assert_close(followed, torch.stack([image for image, _ in plain]))
    views, _ = next(iter(run.loaders.augmented))  # which calibrate
    each = [followed, images[:21], images[21:42], views[:21], views[21:42]]  # of all training images
    assert not any(itertools.starmap(torch.equal, itertools.combinations(each, 2)))


@pytest.mark.parametrize(("epochs", "share", "loss"), [(3, 1 / 4, 1.0), (4, 1, 2.18)])
def test_how_much_may_be_lost(epochs, share, loss):
    """In the second epoch, of 30 points above a constant answer, on so many images that chance hardly counts. In the
    first half of a run all of them, and the loss nine tenths of its lead: from 1 to a constant answer's 2.30."""
    judge = guard_of(100_000, [0.35, 0.4], epochs=epochs)
    judge.start_loss = 1.0
    assert judge.has_collapsed(0.4 - 0.3 * share - 0.01, loss)
    assert not judge.has_collapsed(0.4 - 0.3 * share + 0.01, loss)
    assert judge.has_collapsed(0.05, loss=2.16) == (epochs == 3)


def test_what_chance_may_lose_is_no_collapse_and_four_images_tell_a_constant_answer_by_its_loss():
    """On few images a collapse must be clear. A state to go back to must be as good as the best one."""
    judge = guard_of(100, [0.3])
    assert judge.has_collapsed(0.175, loss=1.0) and not judge.has_collapsed(0.185, loss=1.0)
    assert judge.is_recoverable  # the start always is
    assert not guard_of(1000, [0.3, 0.274]).is_recoverable and guard_of(1000, [0.3, 0.276]).is_recoverable
    assert guard_of(100, [1.0], classes=1).is_recoverable  # a constant answer is as good, and nothing is lost
    judge = guard_of(4, [0.5, 1.0], classes=2)
    assert judge.has_collapsed(0.5, loss=0.70) and not judge.has_collapsed(0.5, loss=0.68)
    judge.first_loss = 0.9
    assert judge.has_collapsed(0.5, loss=0.91) and not judge.has_collapsed(0.5, loss=0.89)


@pytest.mark.parametrize("start, score, collapsed", [(0.005, -0.004, False), (-0.01, -0.02, False), (0.1, -0.2, True)])
def test_numbers_that_the_probe_knows_nothing_of_do_not_collapse_by_chance(start, score, collapsed):
    targets = torch.linspace(-1, 1, 128, dtype=torch.float64)[:, None]
    watched = LabelledImages([None] * 128, [0] * 128, targets=targets)
    judge = Guard(tasks.Regression(["age"], targets), watched, watched)
    judge.scores = [start]
    assert judge.has_collapsed(score, loss=1 - score) == collapsed


@pytest.mark.parametrize(
    ("worst", "losses", "last"),
    [
        (None, [2.0, 15.0], None),  # 0.8 x 2 + 0.2 x 15 is below twice the loss of a constant answer, log(10)
        (None, [2.0, 15.1], COLLAPSED),
        (None, [math.nan], COLLAPSED),
        (9.0, [8.0, 54.7], None),  # the start was worse than a constant answer
        (9.0, [8.0, 54.9], COLLAPSED),
    ],
)
def test_a_loss_that_explodes_is_seen_within_the_epoch(worst, losses, last):
    judge = guard_of(100, [])
    judge.note_start(worst, answers(0.1, loss=1.0))
    verdicts = []
    for loss in losses:
        judge.note_step(loss)
        before = repr(judge.state_dict())  # NaN is not equal to itself
        verdicts.append(told(judge.after_step))
        assert verdicts[-1] == told(judge.after_step) and repr(judge.state_dict()) == before
    assert verdicts == [None] * (len(losses) - 1) + [last]


def test_losses_are_held_against_all_training_images_and_scores_against_the_watched_ones():
    """Whose classes may be as frequent otherwise: here one of two, and one of three."""
    train = LabelledImages([None] * 4, [0, 0, 1, 1])
    judge = Guard(tasks.Classification(["cat", "dog"]), train, train.subset([0, 1, 2]))
    assert (judge.constant_loss, judge.constant_score) == (pytest.approx(math.log(2)), 2 / 3)


def test_training_that_harms_the_probe_keeps_the_probe(start, monkeypatch):
    run = start("--epochs 1")
    writes_nothing(run)
    run.start()

    head = run.model.heads.head
    monkeypatch.setattr(torch.amp.GradScaler, "step", lambda *_: head.weight.data.neg_())  # every answer is wrong
    monkeypatch.setattr(Guard, "has_collapsed", lambda *_: False)
    train(run)
    assert run.kept.at_start and run.history[0]["val_accuracy"] == run.baseline["probe"]
    assert run.guard.barren_epochs == 1
    with run.kept_weights():
        expected, _ = all_outputs(run.network, run.loaders.watched, run.device, run.dtype)
    torch.testing.assert_close(run.watched_outputs[0], expected)  # by which the temperature is chosen
    assert run.evaluate_watched(at_start=True).score == run.guard.scores[0]
    assert run.evaluate_watched().score == run.guard.scores[1] < run.guard.scores[0]


def verdict_on(judge: Guard, epoch: Evaluation) -> bool | str:
    """It stays if it may."""
    verdict = told(judge.after_epoch, epoch)
    if verdict != NO_GAIN:
        judge.note_epoch(epoch, verdict)
    return verdict


# The second of three does no harm, or has a lower loss; and the first half of a run later epochs may mend.
@pytest.mark.parametrize("epochs, second", [(1, answers(0.8, 1.1)), (1, answers(0.78, 0.9)), (7, WORSE)])
def test_the_second_epoch_in_a_row_without_a_gain_is_undone(epochs, second):
    judge = guard_with_a_start()
    judge.epochs = epochs
    for epoch in (WORSE, second, WORSE):
        assert verdict_on(judge, epoch) != NO_GAIN
    assert verdict_on(judge, WORSE) == NO_GAIN


def test_a_run_that_may_not_go_back_again_goes_on_without_a_gain():
    judge = guard_with_a_start()
    for _ in range(3):
        assert verdict_on(judge, WORSE) is True
        assert verdict_on(judge, answers(0.78, 1.0)) == NO_GAIN  # by a loss that is no lower
        judge.note_retreat(2, 1e-3, good_epochs=0, seconds=1.0)
    assert judge.lost_seconds == 3.0
    assert [verdict_on(judge, WORSE) for _ in range(4)] == [True] * 4


def test_a_run_goes_back_to_an_eighth_of_the_rate_and_at_last_stops(finetune, images, monkeypatch, tmp_path, capsys):
    """And with the files and figures of its last good adapter. Resumed, it has collapsed at the same rate again."""
    # What the guard sees at the start, and after each epoch. With 0.87 one is neither good nor a collapse: the run goes
    # on, but it will not come back to there.
    accuracies = [1.0, 1.0, 0.0, 1.0, 0.87, 0.4, 0.3, 0.3, 0.3]
    real = FineTuning.evaluate_watched

    def evaluate_watched(run: FineTuning, at_start=False) -> Evaluation:
        if at_start:
            return real(run, at_start)
        accuracy = accuracies.pop(0)
        # The loss is above a constant answer's for half or less.
        return real(run)._replace(accuracy=accuracy, loss=2 - 2 * accuracy)

    monkeypatch.setattr(FineTuning, "evaluate_watched", evaluate_watched)
    options = "--epochs 4 --warmup-epochs 0 --labels-per-class 2"
    told = r"collapses in epoch 3 even at learning rate 2.0e-06: .*lower --learning-rate.*adapter of epoch 2"
    with pytest.raises(Collapsed, match=told) as ended:
        finetune(options)
    assert "epoch 2: training collapsed; back to epoch 1, learning rate 1.3e-04" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results == json.loads(json.dumps(ended.value.results))
    rates = [pytest.approx(1e-3 / 8**retreats) for retreats in range(4)]
    assert [tuple(retreat.values()) for retreat in results["retreats"]] == [*zip((2, 4, 3, 3), rates, strict=True)]
    assert results["epochs"] == read_adapter_file(tmp_path / "out/lora.pth")["metadata"]["epoch"] == 2
    rows = metrics(tmp_path / "out")
    schedule = (1.0, 0.5 + 0.5 * math.cos(math.pi / 4))
    assert np.divide(column(rows, "learning_rate"), schedule).tolist() == rates[:2]
    assert column(rows, "adapter_learning_rate") == pytest.approx(np.multiply(24, column(rows, "learning_rate")))
    assert results["head_learning_rate"] == results["adapter_learning_rate"] / 24 == rates[3]
    assert results["seconds"] > sum(column(rows, "seconds"))  # what is undone was spent
    assert_figures_of_file(results | {"folder": tmp_path / "out"}, images)
    assert (tmp_path / "out/report.html").exists() and (tmp_path / "out/training_curves.png").exists()
    accuracies.append(0.0)
    with pytest.raises(Collapsed) as resumed:
        finetune(f"{options} --resume")
    assert str(resumed.value) == str(ended.value)


def test_what_a_collapse_did_is_undone_and_the_run_when_stopped_goes_on_to_the_same_end(start, tmp_path):
    """Back at the start, the run is one that had the lower rate from the first, its softer head included."""
    options = "--lora-dropout 0.2 --learning-rate"
    run = start(f"{options} 8e-3")
    run.start()
    train_on(run, next(run.loaders.steps(1)))
    run.go_back("training collapsed")
    random_state = torch.get_rng_state()
    lower = start(f"{options} 1e-3")
    lower.start()
    assert torch.equal(random_state, torch.get_rng_state()) and not run.optimizer.state
    assert column(run.optimizer.param_groups, "lr") == pytest.approx(column(lower.optimizer.param_groups, "lr"))
    assert run.guard.scores == lower.guard.scores
    assert run.guard.start_loss == pytest.approx(lower.guard.start_loss, rel=1e-4)
    torch.testing.assert_close(trained_state(run.model), trained_state(lower.model), rtol=1e-4, atol=1e-6)
    train_on(run, next(run.loaders.steps(1)))
    FineTuning.save_state(run)
    resumed = start(f"{options} 8e-3")
    resumed.resume(tmp_path / "last.pth", ())
    for each in (run, resumed):
        each.go_back("training collapsed")  # to the state that is in last.pth
    assert len(resumed.guard.retreats) == 2 and resumed.guard.state_dict() == run.guard.state_dict()
    assert_identical(resumed.trained(), run.trained())


def test_of_an_epoch_that_is_undone_the_seconds_count_and_nothing_else_even_if_it_was_the_best(start, tmp_path):
    run = start("--keep-best accuracy")
    run.start()
    row = dict.fromkeys(("train_loss", "val_loss", "learning_rate", "adapter_learning_rate", "seconds"), 0.5)
    kept = []
    for epoch, accuracy in enumerate((0.9, 0.8, 1.0), 1):
        progress = run.begin_epoch()
        run.history.append(row | {"epoch": epoch, "val_accuracy": accuracy})
        run.progress = None
        run.save()
        kept.append(read_adapter_file(tmp_path / "lora.pth")["metadata"]["epoch"])
    run.progress = progress
    progress.seconds = 2.0  # of what followed
    (tmp_path / "lora.pth").unlink()
    run.save()
    assert not (tmp_path / "lora.pth").exists()  # within an epoch it is the state alone
    run.kept_outputs = (torch.zeros(15, 3), torch.zeros(15))
    run.go_back("training collapsed")
    assert kept == [1, 1, 3] and len(run.history) == 2 and run.guard.lost_seconds == 2.5 and run.kept_outputs is None
    assert read_adapter_file(tmp_path / "lora.pth")["metadata"]["epoch"] == 1
    (tmp_path / "lora.pth").unlink()
    run.save()  # the second epoch, since there is no better one any more
    assert read_adapter_file(tmp_path / "lora.pth")["metadata"]["epoch"] == 2


def test_a_loss_that_is_not_finite_is_a_collapse(start, monkeypatch):
    real = tasks.Classification.loss
    factors = iter([*(3 + 1) * [1], math.nan, *(3 + 3) * [1]])  # before each start, three batches give the gradient
    monkeypatch.setattr(tasks.Classification, "loss", lambda *given: real(*given) * next(factors))
    run = start("--epochs 1 --labels-per-class 2 --batch-size 2 --learning-rate 1e-3")
    writes_nothing(run)
    run.start()
    train(run)
    assert len(run.guard.retreats) == 1 and math.isfinite(run.history[0]["train_loss"])
    assert next(factors, None) is None


@pytest.mark.parametrize(("harmful", "options"), [(1, "--norms train"), (2, "")])
def test_figures_are_those_of_the_epoch_that_is_kept_be_it_the_start(finetune, images, monkeypatch, harmful, options):
    """The first epoch is the best, whether nothing of it is kept or of the second; so it is where the run goes on."""
    labels = torch.tensor([0, 0, 0, 0, 1, 2])
    scripted = [torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 0, 0, 0, 1, 1])]  # the second is oftener right

    def evaluation(_, real: Evaluation) -> Evaluation:
        if not scripted:
            return real
        answer = scripted.pop(0)
        return real._replace(accuracy=(answer == labels).float().mean().item(), predictions=answer, labels=labels)

    with_evaluations(monkeypatch, evaluation)
    real_evaluate = FineTuning.evaluate_watched

    def evaluate_watched(run, at_start=False):
        is_harmful = run.progress and len(run.history) == harmful - 1
        return real_evaluate(run, at_start)._replace(accuracy=0.9 if is_harmful else 1.0)

    monkeypatch.setattr(FineTuning, "evaluate_watched", evaluate_watched)
    for again in ("", "--resume"):
        results = finetune(f"--keep-best balanced {options} {again}")
        assert results["kept_epoch"] == results["best_epoch"] == 1
        assert results["chosen_by"] == {"epoch": "the evaluation images"}
        assert results["keeps_start"] == (harmful == 1)
        assert_figures_of_file(results, images)
