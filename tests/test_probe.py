"""The linear probe as a start of the head, against scikit-learn on standardised features."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from toolkit.probe import (
    DRIFT_STEPS,
    LOGIT_DRIFT,
    STRENGTHS,
    choose_temperature,
    fit_linear_probe,
    head_accuracy,
    init_head_from_probe,
    soften_head,
)


def clusters(
    classes: int, images: int = 30, features: int = 8, spread: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) of very different scales around a centre per class, and labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes * images) % classes
    centres = torch.randn(classes, features, generator=generator)
    noise = spread * torch.randn(len(labels), features, generator=generator)
    return (centres[labels] + noise) * 10.0 ** torch.arange(-2, features - 2) + 5, labels


class Net(nn.Module):
    def __init__(self, features: int, classes: int):
        super().__init__()
        self.fc = nn.Linear(features, classes)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_probe_is_scikit_learns_regression_on_standardised_features(classes):
    features, labels = clusters(classes)
    weight, bias, strength = fit_linear_probe(features, labels, classes)
    X = StandardScaler().fit_transform(features.numpy())
    reference = LogisticRegression(C=strength, max_iter=200).fit(X, labels.numpy())
    logits = features.double() @ weight.double().T + bias.double()
    np.testing.assert_allclose(logits.softmax(1).numpy(), reference.predict_proba(X), atol=1e-3)


def test_the_strength_with_the_smallest_loss_in_cross_validation_is_taken():
    easy, hard = (fit_linear_probe(*clusters(3, spread=spread), 3)[2] for spread in (0.1, 4.0))
    assert hard < easy and {easy, hard} <= set(STRENGTHS.tolist())


def test_the_views_of_an_image_are_held_out_together():
    """Noise that an image has in both its views is no help with others: the regularisation must be as strong."""
    features, labels = clusters(3, spread=4.0)
    strength = fit_linear_probe(features, labels, 3)[2]
    twice = features.repeat(2, 1), labels.repeat(2), 3
    assert fit_linear_probe(*twice, views=2)[2] <= strength < fit_linear_probe(*twice)[2]


def test_a_class_with_one_image_leaves_nothing_to_validate_on():
    features, labels = clusters(3, images=1)
    weight, bias, strength = fit_linear_probe(features, labels, 3)
    assert strength == 1 and torch.equal((features @ weight.T + bias).argmax(1), labels)


def test_a_class_without_images_gets_zeros():
    features, labels = clusters(3)
    weight, bias, _ = fit_linear_probe(features, 2 * labels, 6)
    assert not weight[1::2].any() and not bias[1::2].any() and weight[::2].any(1).all()


def test_balanced_weights_find_the_rare_class():
    features, labels = clusters(2, images=200, spread=3.0)
    keep = (labels == 0) | (torch.arange(len(labels)) < 24)  # 12 of the second class
    recalls = {}
    for weights in ("none", "balanced"):
        model = Net(8, 2)
        init_head_from_probe(model, features[keep], labels[keep], class_weights=weights)
        recalls[weights] = head_accuracy(model, features[labels == 1], labels[labels == 1])
    assert recalls["balanced"] > recalls["none"] + 0.1


def test_a_softened_head_answers_the_same():
    features, labels = clusters(4, spread=2.0)
    model = Net(8, 4)
    init_head_from_probe(model, features, labels)
    before = model.fc(features)
    soften_head(model, 3.0)
    torch.testing.assert_close(model.fc(features) * 3, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.fc(features).argmax(1), before.argmax(1))


def test_the_temperature_grows_with_the_rate_if_features_train():
    features, labels = clusters(4, spread=2.0)
    model = Net(8, 4)
    init_head_from_probe(model, features, labels)
    spread = model.fc(features).std().item()
    per_rate = choose_temperature(model, features, labels, features_train=True).per_rate
    assert per_rate == pytest.approx(DRIFT_STEPS * spread / LOGIT_DRIFT)
    assert choose_temperature(model, features, labels, features_train=False).per_rate == 0


def test_at_a_low_rate_the_head_keeps_its_calibrated_confidence():
    """With label smoothing the best confidence is lower, and no other temperature has a smaller loss."""
    features, labels = clusters(4, spread=0.1)
    model = Net(8, 4)
    init_head_from_probe(model, features, labels)
    assert choose_temperature(model, features, labels, True).least == 1
    least = choose_temperature(model, features, labels, True, label_smoothing=0.1).least
    soften_head(model, least)
    losses = [
        F.cross_entropy(model.fc(features) * scale, labels, label_smoothing=0.1).item() for scale in (0.7, 1.0, 1.4)
    ]
    assert least > 1 and losses[1] == min(losses)
