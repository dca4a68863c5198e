"""FGSM and PGD of other libraries agree with ours on the same model and images."""

import pytest
import torch
from conftest import balance, make_batch, make_small_cnn, randomise_batch_norm

from advlab import models
from advlab.attacks import fgsm, pgd
from advlab.tools import rivals

MODULES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "ART": "art"}
STEPS = 10
PGD_EPS = 0.002  # breaks about half of the images


@pytest.fixture(params=["small", "cnn", "cnn-lstm"])
def case(request):
    """A model with images that it gets right, and their labels."""
    if request.param == "small":
        model = make_small_cnn()
    else:
        torch.manual_seed(0)
        model = randomise_batch_norm(models.build(request.param)).eval()
    images, _ = make_batch(16)
    return model, images, balance(model, images)


@pytest.fixture(params=MODULES)
def set_up(request):
    """Sets up a library for a model and a size of step, as the benchmark does."""
    reason = f"{request.param} is not installed; it is in the extra [bench]"
    pytest.importorskip(MODULES[request.param], reason=reason)

    def make(model, alpha):
        found = {library.name: library for library in rivals.libraries(model, alpha, STEPS)}
        return found[request.param]

    return make


def test_fgsm_agrees(case, set_up):
    model, images, labels = case
    theirs = set_up(model, rivals.EPS / 4).fgsm(images, labels)
    ours = fgsm(model, images, labels, rivals.EPS)
    assert theirs.shape == ours.shape
    # To 1e-6, but for signs of gradients that rounding cannot tell from 0.
    assert float(((theirs - ours).abs() > 1e-6).float().mean()) <= 1e-4


def test_pgd_breaks_every_image_that_a_library_breaks(case, set_up, monkeypatch):
    model, images, labels = case
    monkeypatch.setattr(rivals, "EPS", PGD_EPS)
    alpha = PGD_EPS / 4
    theirs = set_up(model, alpha).pgd(images, labels)
    ours = pgd(model, images, labels, PGD_EPS, alpha=alpha, steps=STEPS, random_start=False)
    with torch.no_grad():
        broken_by_them = model(theirs).argmax(1) != labels
        broken_by_us = model(ours).argmax(1) != labels
    assert float((theirs - images).abs().max()) <= PGD_EPS + 1e-6
    assert 2 < int(broken_by_them.sum()) < 14
    assert bool(broken_by_us[broken_by_them].all())
