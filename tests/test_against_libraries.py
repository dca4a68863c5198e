"""FGSM of other libraries agrees with ours on the same model and images."""

import pytest
import torch
from conftest import make_batch, make_small_cnn, randomise_batch_norm

from advlab import models
from advlab.attacks import fgsm

REASON = "not installed; it is in the extra [bench]"
EPS = 8 / 255


@pytest.fixture(params=["small", "cnn", "cnn-lstm"])
def case(request):
    """A model with images, labels and our attack on them."""
    if request.param == "small":
        model = make_small_cnn()
    else:
        torch.manual_seed(0)
        model = randomise_batch_norm(models.build(request.param)).eval()
    images, labels = make_batch(16)
    return model, images, labels, fgsm(model, images, labels, EPS)


def assert_agrees(theirs, ours):
    """Assert agreement to 1e-6, but for signs of gradients that rounding cannot tell from 0."""
    assert theirs.shape == ours.shape
    different = ((theirs - ours).abs() > 1e-6).float().mean()
    assert float(different) <= 1e-4


def test_torchattacks_agrees(case):
    torchattacks = pytest.importorskip("torchattacks", reason=f"torchattacks {REASON}")
    model, images, labels, ours = case
    assert_agrees(torchattacks.FGSM(model, eps=EPS)(images, labels), ours)


def test_foolbox_agrees(case):
    foolbox = pytest.importorskip("foolbox", reason=f"foolbox {REASON}")
    model, images, labels, ours = case
    attack = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    assert_agrees(attack.run(wrapped, images, labels, epsilon=EPS), ours)


def test_art_agrees(case):
    evasion = pytest.importorskip("art.attacks.evasion", reason=f"ART {REASON}")
    from art.estimators.classification import PyTorchClassifier

    model, images, labels, ours = case
    classifier = PyTorchClassifier(
        model,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=(3, 32, 32),
        nb_classes=64 if isinstance(model, models.CNN) else 10,
        clip_values=(0, 1),
        device_type="cpu",
    )
    attack = evasion.FastGradientMethod(classifier, norm="inf", eps=EPS, batch_size=len(images))
    theirs = torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))
    assert_agrees(theirs, ours)
