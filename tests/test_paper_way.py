"""The paper's way, image by image, gives what the fast code gives."""

import copy

import pytest
import torch
from conftest import assert_same_state, balance, make_small_cnn, randomise_batch_norm

from advlab import models
from advlab.attacks import fgsm, fgsm_direction
from advlab.bench.paper_way import Attacked, Pictures, count_correct, fgsm_one, train_steps
from advlab.data import Split
from advlab.evaluation import evaluate, predict
from advlab.recipes import Recipe
from advlab.training import AugmentedSet, fit

EPS = 0.03


def attack_all(model, split, eps):
    """Return the attacked images of `split`, made one at a time, and their labels."""
    pairs = list(Attacked(Pictures(split), model, eps))
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


# --- training


@pytest.mark.parametrize("arch", ["cnn", "cnn-lstm"])
def test_training_step_by_step_gives_the_same_model(arch, shapes):
    # Few and small steps: Adam divides each gradient by its size, so that where a gradient is
    # rounding alone, the two ways take steps of full size in directions of their own.
    split, lr, seed = shapes.train.first(64), 1e-4, 3
    ours = models.build(arch, 1)
    recipe = Recipe("one epoch", epochs=1, batch_size=16, lr=lr, flip=False)
    fit(ours, split, recipe, seed=seed, precision="float32")

    def step_by_step(lr):
        model = models.build(arch, 1)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1000 * seed))
        train_steps(model, [split.batch(index) for index in order.split(16)], lr)
        return model

    images, _ = shapes.test.batch(slice(0, 50))
    logits = predict(ours, images)

    def gap(model):
        return float((predict(model, images) - logits).abs().max())

    tenth_more = gap(step_by_step(1.1 * lr))
    assert gap(step_by_step(lr)) < 0.1 * tenth_more
    assert tenth_more < 0.1 * gap(models.build(arch, 1))  # all four steps


# --- crafting


@pytest.fixture(params=["small", "cnn", "cnn-lstm"])
def model(request):
    if request.param == "small":
        return make_small_cnn()
    torch.manual_seed(0)
    return randomise_batch_norm(models.build(request.param)).eval()


def share_of_moved_pixels(one, other):
    """Return for each image the share of pixels that differ by more than rounding."""
    return ((one - other).abs() > 1e-6).float().mean((1, 2, 3))


def assert_same_images(theirs, ours):
    # Rounding may switch a ReLU whose input is 0 to 7 digits: one image then differs by about 1 %.
    shares = share_of_moved_pixels(theirs, ours)
    assert float(shares.max()) < 0.03
    assert int((shares > 1e-3).sum()) <= 2, "of 20"


def test_crafting_one_by_one_gives_the_same_images(model, shapes):
    split = shapes.train.first(20)
    batch = split.batch(slice(None))
    ours = fgsm(model, *batch, EPS, per_image_statistics=True)
    running = fgsm(model, *batch, EPS)
    theirs, labels = attack_all(model, split, EPS)
    assert torch.equal(labels, batch[1])
    assert_same_images(theirs, ours)
    # So does the set that models are trained on.
    directions = fgsm_direction(model, *batch, per_image_statistics=True)
    augmented, _ = AugmentedSet(split, directions, EPS).batch(torch.arange(20, 40))
    assert_same_images(theirs, augmented)
    assert float(share_of_moved_pixels(theirs, running).min()) > 0.03


def test_attack_changes_the_running_statistics_and_nothing_else(small_cnn, shapes):
    before = copy.deepcopy(small_cnn.state_dict())
    image, label = Pictures(shapes.train)[0]
    kept = image.clone()
    fgsm_one(small_cnn, image, label, EPS)
    changed = {k for k, v in small_cnn.state_dict().items() if not torch.equal(v, before[k])}
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    assert {name.split(".")[-1] for name in changed} == statistics
    assert torch.equal(image, kept)


# --- evaluation


@pytest.fixture
def undecided(small_cnn, shapes):
    """A model, and 130 test images of which it gets four in five right, some by a hair."""
    images, _ = shapes.test.batch(slice(None))
    labels = balance(small_cnn, images)
    labels[::5] = (labels[::5] + 1) % 10
    return small_cnn, Split(shapes.test.images, labels)


def test_counting_attacked_images_equals_evaluation(undecided):
    target, split = undecided
    assert count_correct(target.train(), Pictures(split)) == 104
    target.eval()
    source, batch = make_small_cnn(1), split.batch(slice(None))
    attacked = fgsm(source, *batch, EPS, per_image_statistics=True)
    expected, _ = evaluate(target, attacked, batch[1])
    assert expected < 90, "the attack does something"
    found = count_correct(target, Attacked(Pictures(split), source, EPS))
    assert abs(found - expected) <= 1  # a sign that rounding turns


def test_counting_is_in_eval_mode_though_the_attack_trains_the_same_model(undecided):
    model, split = undecided
    split = split.first(60)  # one batch: crafted whole, then counted
    crafted_with = copy.deepcopy(model)
    attacked, labels = attack_all(crafted_with, split, 0.002)
    found = count_correct(model, Attacked(Pictures(split), model, 0.002))
    # Crafting has changed the running statistics, with which the images are then counted.
    assert_same_state(model, crafted_with.state_dict())
    assert found == evaluate(crafted_with, attacked, labels)[0]
    with torch.no_grad():
        in_training_mode = int((crafted_with.train()(attacked).argmax(1) == labels).sum())
    assert found != in_training_mode
