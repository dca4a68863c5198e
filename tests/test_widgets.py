"""The attack explorer: what it computes, and what its controls do."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from conftest import OTHER_KINDS, encoded, make_batch, make_small_cnn, upload
from PIL import Image

from advlab.attacks import fgsm
from advlab.catalogue import ATTACKS
from advlab.data import DataSpec, ImageData, Split
from advlab.datasets import Shapes10
from advlab.widgets import CHOICES, AttackExplorer, CancelledError, attack_one


@pytest.fixture(scope="module")
def shapes():
    return Shapes10(100, 60)


@pytest.fixture
def models():
    return {"one": make_small_cnn(0), "two": make_small_cnn(1)}


@pytest.fixture
def image(shapes):
    return shapes.test.batch(slice(0, 1))[0][0]


@pytest.fixture
def explorer(models, shapes):
    return AttackExplorer(models, shapes)


def picture(size):
    return encoded(Image.new("RGB", size, (255, 0, 0)))


def test_every_attack_of_the_catalogue_can_be_chosen():
    assert set(ATTACKS) <= set(CHOICES)


@pytest.mark.parametrize("attack", CHOICES)
def test_outcome_says_what_was_done(attack, models, shapes):
    images, labels = shapes.test.batch(slice(0, 1))
    target = (int(labels[0]) + 1) % 10
    found = attack_one(models, "one", images[0], int(labels[0]), attack, 0.03, target=target)
    change = found.attacked - images[0]
    assert found.linf == pytest.approx(255 * float(change.abs().max()))
    assert 0 < found.linf <= 255 * 0.03 + 1e-3
    assert found.l2 == pytest.approx(float(change.norm()))
    if attack == "fgsm":
        assert torch.equal(found.attacked, fgsm(models["one"], images, labels, 0.03)[0])
    for answers in (found.before, found.after):
        assert list(answers) == ["one", "two"]
        assert all(float(p.sum()) == pytest.approx(1) for p in answers.values())


def test_nothing_is_moved_at_eps_0(models, shapes):
    images, labels = shapes.test.batch(slice(0, 1))
    found = attack_one(models, "one", images[0], int(labels[0]), "pgd", 0.0)
    assert torch.equal(found.attacked, images[0])
    assert found.survives


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"source": "three"}, "unknown .*'three'; choose one of"),
        ({"attack": "magic"}, "unknown .*'magic'; choose one of"),
        ({"steps": 0}, "^steps is 0;"),
        ({"eps": 1.5}, "^eps is 1.5;"),
    ],
)
def test_unknown_names_and_numbers_out_of_range_are_refused(wrong, told, models, image):
    asked = {"source": "one", "image": image, "label": 0, "attack": "pgd", "eps": 0.1} | wrong
    with pytest.raises(ValueError, match=told):
        attack_one(models, **asked)


def test_one_large_step_is_a_step_across_the_image(models, image):
    assert attack_one(models, "one", image, 0, "pgd", 0.9, steps=1).linf > 100


def test_an_attack_can_be_stopped(models, image):
    passes = []

    def report():
        passes.append(1)
        if len(passes) == 3:
            raise CancelledError

    label = int(models["one"](image[None]).argmax())
    with pytest.raises(CancelledError):
        attack_one(models, "one", image, label, "pgd", 1e-4, steps=50, report=report)


def pictures_of(explorer):
    """Return the three pictures that the panel shows."""
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', explorer.shown.value)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


def test_slider_changes_what_is_shown(explorer, shapes):
    before = explorer.shown.value
    assert np.array_equal(pictures_of(explorer)[0], shapes.test.images[0].permute(1, 2, 0))
    explorer.eps.value = 40
    assert "L-inf 40.0/255" in explorer.shown.value
    assert explorer.shown.value != before
    assert explorer.shown.value.count("<tr>") == 11
    original, _, attacked = (picture.astype(int) for picture in pictures_of(explorer))
    assert abs(attacked - original).max() == 40


def test_bad_choice_is_told_in_the_panel(explorer):
    _, label = explorer.image()
    explorer.target.value = label
    explorer.attack.value = "fgsm towards a class"
    assert "cannot be attacked" in explorer.message.value
    with pytest.raises(ValueError, match="1 of 1 targets are the image's own class"):
        explorer.figure()
    explorer.target.value = (label + 1) % 10
    assert explorer.message.value == ""


@pytest.mark.parametrize("attack", ["pgd", "pgd-50x3", "mi-fgsm"])
def test_slow_attack_runs_beside_and_is_finished_for_the_figure(attack, explorer):
    explorer.attack.value = attack
    assert explorer._worker is not None
    figure = explorer.figure()
    assert explorer.cancel.disabled
    assert explorer.progress.value == 0  # as before it began
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[2:] == ["attacked, eps 8/255", "one", "two"]
    assert explorer.steps.disabled is (attack != "pgd")
    explorer.attack.value = "noise"
    assert explorer._worker is None


@pytest.mark.parametrize(("shape", "classes"), OTHER_KINDS[:4])
def test_any_images_and_classes_are_shown(shape, classes):
    images, labels = make_batch(8, classes, shape=shape)
    names = tuple(f"class {k}" for k in range(classes))
    split = Split((255 * images).byte(), labels)
    networks = {str(k): make_small_cnn(k, shape, classes) for k in range(2)}
    explorer = AttackExplorer(networks, ImageData(DataSpec("x", "X", shape, names), split, split))
    assert f"class {int(labels[0])} (true)" in re.sub("</?b>", "", explorer.shown.value)
    assert explorer.shown.value.count("<tr>") == 1 + min(classes, 10)
    assert [found.shape for found in pictures_of(explorer)] == [(*shape[1:], 3)] * 3
    shown = [len(axis.patches) for axis in explorer.figure().axes]
    assert shown[3:] == 2 * [2 * min(classes, 10)]
    upload(explorer, picture((50, 40)))
    assert explorer.outcome.original.shape == shape
    for attack in ATTACKS:
        explorer.attack.value = attack
        explorer.figure()
        assert "cannot be attacked" not in explorer.message.value


def test_images_that_cannot_be_drawn_are_refused():
    images, labels = make_batch(8, shape=(4, 8, 8))
    split = Split((255 * images).byte(), labels)
    data = ImageData(DataSpec("x", "X", (4, 8, 8), tuple("0123456789")), split, split)
    with pytest.raises(ValueError, match=r"\(4, 8, 8\); only 1 or 3 channels can be drawn"):
        AttackExplorer({"one": make_small_cnn(0, (4, 8, 8))}, data)


def test_random_image_is_of_the_wanted_class(explorer, shapes):
    assert explorer.kind.label == "any"
    explorer.kind.value = 4
    assert explorer.image()[1] == 4
    seen = set()
    for _ in range(40):  # six images of this class: one of forty draws is another one
        explorer.random.click()
        assert explorer.image()[1] == 4
        seen.add(explorer.index.value)
    assert len(seen) > 1


def test_panel_says_where_the_attack_goes(explorer, shapes):
    _, label = explorer.image()
    assert f"The attack moves away from {shapes.classes[label]}." in explorer.shown.value
    explorer.target.value = other = (label + 1) % 10
    explorer.attack.value = "fgsm towards a class"
    assert f"The attack moves towards {shapes.classes[other]}." in explorer.shown.value
    explorer.attack.value = "noise"
    assert "The attack moves in random directions." in explorer.shown.value


def test_own_picture_is_attacked_too(explorer, models, shapes):
    assert "<figcaption>original</figcaption>" in explorer.shown.value
    upload(explorer, picture((50, 50)))
    assert "<figcaption>your picture</figcaption>" in explorer.shown.value
    answer = int(models["one"](explorer.own[None]).argmax())
    assert f"moves away from {shapes.classes[answer]}." in explorer.shown.value
    assert explorer.image()[1] is None
    assert float(explorer.outcome.original[0].min()) > 0.98
    explorer.index.value = 5
    assert explorer.image()[1] is not None
    upload(explorer, picture((50, 50)))  # the same once more
    assert explorer.image()[1] is None


@pytest.mark.parametrize(
    ("content", "told"), [(b"x", "this is no PNG, JPEG, "), (b" " * 11_000_000, "has 11 MB")]
)
def test_upload_that_fails_is_told_in_the_panel(explorer, content, told):
    upload(explorer, content)
    assert told in explorer.message.value
    assert explorer.own is None


def test_a_batch_run_shows_a_figure(explorer):
    bundle = explorer._repr_mimebundle_()
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert "here is its picture" in bundle["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in bundle


class Broken(torch.nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("out of cheese"), IndexError("out of cheese")])
@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_explorer_whose_attack_fails_shows_why(shapes, error, attack):
    explorer = AttackExplorer({"one": Broken(error)}, shapes)
    explorer.attack.value = attack
    bundle = explorer._repr_mimebundle_()
    assert re.fullmatch("This cannot be attacked: .*out of cheese.*", bundle["text/plain"])
    assert "image/png" not in bundle
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "out of cheese" in explorer.message.value


def test_no_model_is_refused(shapes):
    with pytest.raises(ValueError, match="no model was given"):
        AttackExplorer({}, shapes)


@pytest.mark.parametrize(
    "wrong", [{"eps": 8 / 255}, {"eps": 65}, {"eps": True}, {"index": -1}, {"index": 60}]
)
def test_what_the_controls_cannot_show_is_refused(wrong, models, shapes):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be a whole number from 0 to"):
        AttackExplorer(models, shapes, **wrong)
