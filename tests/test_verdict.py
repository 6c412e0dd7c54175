"""What a finished run says of itself: what was gained, what limits it, and one next step."""

import pytest

from toolkit.answers.tasks import Classification, Regression
from toolkit.run.verdict import judge

RISING = (0.70, 0.74, 0.78, 0.82)


def judged(probe=0.7, scores=(0.81, 0.82, 0.82, 0.82), losses=(0.5, 0.6), lowered=1.0, per_class=100, **more):
    results = {
        "task": "classification",
        "val_accuracy": scores[-1],
        "val_accuracy_interval": (0.77, 0.86),
        "probe_accuracy_before": probe,
        "learning_rate": 1e-3,
        "head_learning_rate": 1e-3 / lowered,
        "val_images": 300,
        "epochs": len(scores),
    }
    train_loss, val_loss = losses
    history = [{"val_accuracy": score, "train_loss": train_loss, "val_loss": val_loss} for score in scores]
    return judge(results | more, history, Classification, per_class)


@pytest.mark.parametrize(
    ("probe", "gained"),
    [
        (0.70, "+12 points against the linear probe, more than chance explains"),
        (0.80, "+2 points against the linear probe, which may be chance with 300 evaluation images"),
        (0.90, "-8 points against the linear probe: it is below it, beyond chance"),
        (None, "there is no linear probe to compare it with"),
    ],
)
def test_the_gain_is_over_the_linear_probe(probe, gained):
    assert judged(probe).gained == gained


def test_points_are_of_scores_in_per_cent():
    results = {"val_r2": 0.5, "probe_r2_before": 0.25, "val_r2_interval": (0.4, 0.6), "task": "regression"}
    results |= {"learning_rate": 1, "head_learning_rate": 1, "val_images": 9, "epochs": 0}
    assert judge(results, [], Regression, 30).gained == "+0.25 against the linear probe, more than chance explains"


def test_a_good_run_has_no_limits_and_goes_on_to_predict():
    assert judged() == ("+12 points against the linear probe, more than chance explains", [], judged().next_step)
    assert judged().next_step.startswith("python deploy_lora.py predict lora.pth")


@pytest.mark.parametrize(
    ("run", "limit", "next_step"),
    [
        ({"scores": RISING}, "few epochs: the score still rose at the end", "the same command with --epochs 8"),
        ({"losses": (0.1, 0.6)}, "overfitting: the evaluation's loss is far above", "--augmentation trivial"),
        ({"lowered": 30, "probe": 0.8}, "a learning rate that was lowered 30-fold", "--epochs 8"),
        ({"per_class": 5, "probe": 0.8}, "few images, 5 of each class", "more labelled images"),
    ],
)
def test_what_limits_a_run_comes_with_one_next_step(run, limit, next_step):
    found = judged(**run)
    assert len(found.limits) == 1 and found.limits[0].startswith(limit)
    assert next_step in found.next_step


def test_below_the_probe_the_rate_is_searched():
    assert judged(probe=0.9).next_step == "the same command with --learning-rate auto"


def test_masks_are_not_sent_to_an_augmentation_that_they_lack():
    assert "augmentation" not in judged(losses=(0.1, 0.6), task="segmentation").next_step
