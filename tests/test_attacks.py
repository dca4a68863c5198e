"""FGSM, PGD and MI-FGSM: oracles, bounds, invariances, nothing left behind."""

import copy
import math
from functools import partial
from itertools import pairwise

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    OTHER_KINDS,
    assert_same_state,
    balance,
    make_batch,
    make_small_cnn,
    randomise_batch_norm,
    share_of_moved_pixels,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advlab import attacks, forward, models
from advlab.attacks import (
    attack_loss,
    bim,
    fgsm,
    fgsm_direction,
    input_gradient,
    mifgsm,
    perturb,
    pgd,
    rfgsm,
)
from advlab.catalogue import ATTACKS, attack_named
from advlab.forward import evaluate

SIGN_SHARE = 1e-4  # of signs that rounding may turn where batches are cut differently
# Where two points of a path have the same loss but for rounding, either may be kept.
PATH_SHARE = 0.01
UNDECIDED_EPS = 0.002  # breaks about half of the images of `undecided`


def short_pgd(model, images, labels, eps):
    """Three steps of PGD from a random start."""
    return pgd(model, images, labels, eps, alpha=eps / 2, steps=3)


short_mifgsm = partial(mifgsm, steps=3)
each_attack = pytest.mark.parametrize(
    "attack", [fgsm, short_pgd, short_mifgsm], ids=["fgsm", "pgd", "mi-fgsm"]
)


@pytest.fixture
def undecided(small_cnn):
    """A model with 60 images that it gets right, with small margins and large ones."""
    images, _ = make_batch(60)
    return small_cnn, images, balance(small_cnn, images)


def share_of_different_signs(one, other):
    return float((one != other).float().mean())


def is_right(model, images, labels):
    """Return for each image whether `model` gets it right."""
    with torch.no_grad():
        return model(images).argmax(1) == labels


def assert_within(attacked, images, eps, norm="linf"):
    """Assert that shape, dtype and range are kept, and the ball but for the dtype's rounding."""
    assert (attacked.shape, attacked.dtype) == (images.shape, images.dtype)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    change = (attacked.double() - images.double()).flatten(1)
    # Whatever the dtype, the attacks work in float32.
    rounding = max(torch.finfo(images.dtype).eps, torch.finfo(torch.float32).eps)
    if norm == "linf":
        assert float(change.abs().max()) <= eps + rounding
    else:
        assert float(change.norm(dim=1).max()) <= eps + 1e-5


# --- every attack of the catalogue, on any images


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(("shape", "classes"), [((3, 32, 32), 10), *OTHER_KINDS])
def test_catalogue_attacks_any_images_within_eps(name, shape, classes):
    attack, model = ATTACKS[name], make_small_cnn(0, shape, classes)
    images, _ = make_batch(8, shape=shape)
    labels = balance(model, images)
    for dtype in (torch.float32, torch.bfloat16):
        given = images.detach().to(dtype).requires_grad_()
        before = given.detach().clone()
        for eps in (0.0, 0.03, 1.0):
            attacked = attack(model, given, labels, eps, seed=3)
            assert_within(attacked, before, eps)
            assert not attacked.requires_grad
            assert torch.equal(attacked, before) is (eps == 0)
        assert torch.equal(given, before)
        assert given.requires_grad
        assert given.grad is None


@pytest.mark.parametrize("name", ATTACKS)
def test_catalogue_says_what_an_attack_depends_on(name, undecided):
    model, images, labels = undecided
    attack = attack_named(name)
    assert "\n" not in attack.about
    other_model = make_small_cnn(1)
    made = attack(model, images, labels, 0.01, seed=3)
    assert torch.equal(attack(model, images, labels, 0.01, seed=3), made)
    assert torch.equal(attack(model, images, labels, 0.01, seed=4), made) is not attack.random
    assert (
        torch.equal(attack(other_model, images, labels, 0.01, seed=3), made) is not attack.gradient
    )
    if attack.one_direction:
        signs = attack.direction(model, images, labels, seed=3)
        assert signs.dtype == torch.int8
        assert torch.equal(perturb(images, signs, 0.01), made)
    else:
        with pytest.raises(ValueError, match=f"{name} has another direction for every eps"):
            attack.direction(model, images, labels)
    for bad in (255 * images, images.numpy()):
        with pytest.raises((TypeError, ValueError), match="images"):
            attack(model, bad, labels, 0)


@pytest.mark.parametrize(("shape", "classes"), OTHER_KINDS)
@pytest.mark.parametrize("norm", attacks.NORMS)
@pytest.mark.parametrize("loss", attacks.LOSSES)
def test_pgd_attacks_any_images_away_and_towards(shape, classes, norm, loss):
    model = make_small_cnn(0, shape, classes)
    images, _ = make_batch(8, shape=shape)
    labels = balance(model, images)
    eps = 0.03 if norm == "linf" else 1.0
    options = {"alpha": eps / 4, "steps": 4, "restarts": 2, "norm": norm, "loss": loss}
    for aim in (None, (labels + 1) % classes):
        attack = partial(pgd, model, images, labels, eps, targeted=aim, **options)
        if loss == "dlr" and classes < 4:
            needed = 3 if aim is None else 4
            told = f'"dlr" needs {needed} logits or more, there are 2'
            with pytest.raises(ValueError, match=told):
                attack()
        else:
            assert_within(attack(), images, eps, norm)
            assert not torch.equal(attack(), images)


# --- the linear model knows the answer


def test_fgsm_and_gradient_of_a_linear_model_are_known(linear_model):
    images, labels = make_batch(20, classes=2)
    images = images * 0.5 + 0.25  # so that no pixel is clamped
    weight = linear_model[1].weight.detach()
    difference = weight[1 - labels] - weight[labels]
    with torch.no_grad():
        other = linear_model(images).softmax(1)[torch.arange(20), 1 - labels]
    expected = (other[:, None] * difference).reshape(images.shape)
    gradient = input_gradient(linear_model, images, labels)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)
    signs = difference.sign().reshape(images.shape)
    assert torch.equal(fgsm_direction(linear_model, images, labels).float(), signs)
    attacked = fgsm(linear_model, images, labels, 0.1)
    torch.testing.assert_close(attacked, images + 0.1 * signs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_mifgsm_of_a_linear_model_is_its_formula(steps, decay):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).double()
    images, labels = make_batch(20)
    weight, eps = model[1].weight.detach(), 0.05
    first = images.double()
    x, momentum = first, torch.zeros(20, 3072)
    for _ in range(steps):  # the gradient of the cross entropy is known: (softmax - one-hot) W
        with torch.no_grad():
            gradient = (model(x).softmax(1) - F.one_hot(labels, 10)) @ weight
        momentum = decay * momentum + gradient / gradient.abs().sum(1, keepdim=True)
        x = x + eps / steps * momentum.sign().reshape(images.shape)
        x = torch.minimum(torch.maximum(x, first - eps), first + eps).clamp(0, 1)
    found = mifgsm(model.float(), images, labels, eps, steps=steps, decay=decay)
    assert share_of_moved_pixels(found, x) <= PATH_SHARE


# --- bounds and formulas


@settings(max_examples=60)
@given(
    norm=st.sampled_from(attacks.NORMS),
    share=st.floats(0, 1),
    alpha=st.floats(1e-3, 1),
    steps=st.integers(0, 4),
    n=st.integers(1, 4),
    seed=st.integers(0, 1000),
    random_start=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_ball_range_shape_and_dtype_are_kept(
    norm, share, alpha, steps, n, seed, random_start, dtype
):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    images, labels = make_batch(n, seed=seed)
    images = images.to(dtype)
    before = images.clone()
    if steps == 0:
        assert_within(fgsm(model, images, labels, share), images, share)
        assert_within(mifgsm(model, images, labels, share, steps=4), images, share)
    else:
        eps, options = share, {"random_start": random_start, "seed": seed, "norm": norm}
        if norm == "l2":
            eps, alpha, images = 20 * share, 20 * alpha, before.float()
        attacked = pgd(model, images, labels, eps, alpha=alpha, steps=steps, **options)
        assert_within(attacked, images, eps, norm)
    assert torch.equal(images, before.to(images.dtype))


@settings(max_examples=40)
@given(eps=st.floats(0, 1), seed=st.integers(0, 1000))
def test_perturb_is_the_formula(eps, seed):
    images, _ = make_batch(2, seed=seed)
    signs = torch.randint(
        -1, 2, images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8
    )
    expected = (images + eps * signs.float()).clamp(0, 1)
    torch.testing.assert_close(perturb(images, signs, eps), expected, rtol=0, atol=1e-7)


def test_direction_is_int8_signs_and_zero_where_nothing_counts(batch):
    linear = nn.Linear(3072, 10)
    linear.weight.data[:, :1024] = 0  # the red channel
    directions = fgsm_direction(nn.Sequential(nn.Flatten(), linear), *batch)
    assert directions.dtype == torch.int8
    assert set(directions.unique().tolist()) == {-1, 0, 1}
    assert directions[:, 0].count_nonzero() == 0
    assert directions[:, 1:].count_nonzero() > 0.99 * directions[:, 1:].numel()


# --- invariances


@pytest.mark.parametrize(("n", "size", "per_image"), [(130, 7, False), (20, 1, True)])
def test_direction_does_not_depend_on_batch_size_or_order(small_cnn, n, size, per_image):
    direction = partial(fgsm_direction, small_cnn, per_image_statistics=per_image)
    images, labels = make_batch(n)  # 130: more than one chunk of 100
    whole = direction(images, labels)
    pieces = [direction(x, y) for x, y in zip(images.split(size), labels.split(size), strict=True)]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    shuffled = torch.empty_like(whole)
    shuffled[order] = direction(images[order], labels[order])
    assert share_of_different_signs(whole, torch.cat(pieces)) <= SIGN_SHARE
    assert share_of_different_signs(whole, shuffled) <= SIGN_SHARE


@each_attack
@pytest.mark.parametrize("arch", ["cnn", "cnn-lstm"])
def test_layout_that_a_model_asks_for_changes_nothing(attack, arch):
    torch.manual_seed(0)
    model = randomise_batch_norm(models.build(arch)).eval()
    images, _ = make_batch(10)
    labels = balance(model, images)
    attacked = attack(model, images, labels, UNDECIDED_EPS)
    assert attacked.is_contiguous()
    other = attack(lambda x: model(x.contiguous()), images, labels, UNDECIDED_EPS)
    assert share_of_moved_pixels(attacked, other) <= PATH_SHARE


# --- nothing is left behind


class _FailingLayer(nn.Module):
    """Passes its input on, and fails when it is called for the `at`-th time."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("broken on purpose")
        return x


@pytest.mark.parametrize(
    ("attack", "last_call"),
    [(fgsm, 1), (partial(fgsm, per_image_statistics=True), 1), (short_pgd, 3), (short_mifgsm, 3)],
    ids=["fgsm", "per image", "pgd", "mi-fgsm"],
)
@pytest.mark.parametrize("broken", [False, True])
def test_model_is_left_as_it_was(undecided, attack, last_call, broken):
    small_cnn, images, labels = undecided
    last = _FailingLayer(last_call) if broken else nn.Identity()
    model = nn.Sequential(small_cnn, nn.Dropout(0.5), last)
    model.train()
    small_cnn[2].eval()  # a batch norm frozen by its owner
    small_cnn[0].weight.requires_grad_(False)
    small_cnn[3].weight.grad = torch.full_like(small_cnn[3].weight, 2.0)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    random = torch.random.get_rng_state()

    if broken:
        with pytest.raises(RuntimeError, match="on purpose"):
            attack(model, images, labels, UNDECIDED_EPS)
    else:
        attack(model, images, labels, UNDECIDED_EPS)

    assert torch.equal(torch.random.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert True in modes
    assert False in modes
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert_same_state(model, state)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(grads) == ["0.3.weight"]
    assert bool((grads["0.3.weight"] == 2).all())


AROUND = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
}


@each_attack
@pytest.mark.parametrize("around", AROUND)
def test_nothing_around_the_attack_changes_it(attack, around, undecided):
    model, images, labels = undecided
    expected, gradient = attack(*undecided, UNDECIDED_EPS), input_gradient(*undecided)
    with AROUND[around]():
        made_inside = images.clone(), labels.clone()  # in inference mode, autograd refuses such
        assert torch.equal(attack(model, *made_inside, UNDECIDED_EPS), expected)
        found = input_gradient(model, *made_inside)
        assert torch.is_grad_enabled() is (around == "autocast")
    assert found.dtype == torch.float32
    assert torch.equal(found, gradient)
    assert torch.is_grad_enabled()


@each_attack
def test_mode_flags_and_kind_of_the_model_change_nothing(attack, undecided):
    model, images, labels = undecided
    model.add_module("dropout", nn.Dropout(0.9))
    expected = attack(model.eval(), images, labels, UNDECIDED_EPS)
    changed = [model.train(), lambda x: model.eval()(x)]
    changed.append(copy.deepcopy(model).requires_grad_(False))
    for other in changed:
        assert torch.equal(attack(other, images, labels, UNDECIDED_EPS), expected)


@each_attack
def test_gradient_that_is_an_expanded_view_is_not_written_to(attack):
    images = torch.full((4, 3, 32, 32), 0.5)
    labels = torch.zeros(4, dtype=torch.int64)

    def model(x):  # the gradient of a sum is one number, expanded
        return torch.stack([0.001 * x.sum((1, 2, 3)), torch.zeros(len(x))], 1)

    attacked = attack(model, images, labels, 0.1)
    assert bool((attacked >= 0.4 - 1e-6).all())
    assert bool((attacked <= 0.45 + 1e-6).all())  # three steps of half the way, from anywhere


# --- per-image statistics


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("arch", ["small", "cnn", "cnn-lstm"])
def test_per_image_statistics_are_training_mode_one_at_a_time(arch, n, memory_format):
    torch.manual_seed(0)
    model = make_small_cnn() if arch == "small" else randomise_batch_norm(models.build(arch))
    model.to(memory_format=memory_format)
    images, labels = make_batch(n)
    images = images.contiguous(memory_format=memory_format)
    found = input_gradient(model, images, labels, per_image_statistics=True)
    errors = []
    for i in range(n):
        clone = copy.deepcopy(model).train()  # training mode changes the running statistics
        clone.to(memory_format=torch.contiguous_format)
        x = images[i : i + 1].contiguous().clone().requires_grad_()
        loss = F.cross_entropy(clone(x), labels[i : i + 1])
        (expected,) = torch.autograd.grad(loss, x)
        errors.append(float((found[i] - expected[0]).norm() / expected.norm()))
    # Rounding may switch a ReLU whose input is 0 to 7 digits: one image then differs by about 1 %.
    assert max(errors) < 0.03
    assert sum(error > 1e-4 for error in errors) <= 1


def test_per_image_statistics_need_batch_norm(linear_model, batch):
    with pytest.raises(ValueError, match=r"Sequential has none.*Leave it False"):
        fgsm(linear_model, *make_batch(2, classes=2), 0.1, per_image_statistics=True)
    with pytest.raises(ValueError, match="function has none"):
        fgsm(lambda x: linear_model(x), *make_batch(2, 2), 0.1, per_image_statistics=True)


def test_per_image_statistics_of_one_pixel_are_refused():
    # Of one number the spread is 0: no gradient would come through, and nothing be attacked.
    model, batch = models.build("cnn", 0, (4, 8, 8)), make_batch(3, shape=(4, 8, 8))
    with pytest.raises(
        ValueError, match=r"is given \(3, 128, 1, 1\).*Take larger images, or leave"
    ):
        fgsm(model, *batch, 0.1, per_image_statistics=True)


# --- bad input


def test_direction_of_other_images_is_refused(batch):
    with pytest.raises(ValueError, match=r"\(12, 3, 32, 32\).*\(4, 3, 32, 32\).*same shape"):
        perturb(batch[0], torch.zeros(4, 3, 32, 32, dtype=torch.int8), 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.01}, "alpha is -0.01; it must be a number from 0 to 1"),
        ({"alpha": 1.01}, "alpha is 1.01; it must be a number from 0 to 1"),
        ({"alpha": math.nan}, "alpha is nan; it must be a number from 0 to 1"),
        ({"alpha": 0}, "alpha is 0; a step must have a size above 0"),
        (
            {"restarts": 2, "random_start": False},
            "restarts is 2 .*; give 1: without",
        ),
        ({"eot": 0}, "eot is 0; it must be an integer from 1"),
        ({"norm": "l1"}, "unknown norm 'l1'; choose one of linf, l2"),
        ({"loss": "mse"}, "unknown loss 'mse'; choose one of ce, dlr, margin"),
        ({"norm": "l2", "eps": 128}, "eps is 128; as an L2 length .* 0 to 55.4.* divided by 255"),
        ({"norm": "l2", "eps": -0.5}, "eps is -0.5; as an L2 length"),
        ({"norm": "l2", "eps": math.nan}, "eps is nan; as an L2 length"),
        ({"decay": -0.1}, "decay is -0.1; it must be a number from 0 on"),
        ({"decay": math.nan}, "decay is nan; it must be"),
        ({"decay": math.inf}, "decay is inf; it must be"),
        ({"decay": "1"}, "decay is '1'; it must be"),
    ],
)
def test_bad_options_are_refused(small_cnn, batch, options, message):
    attack = mifgsm if "decay" in options else partial(pgd, alpha=0.1)
    with pytest.raises(ValueError, match=message):
        attack(small_cnn, *batch, **{"eps": 0.1, "steps": 1} | options)


@pytest.mark.parametrize("attack", [fgsm, partial(pgd, alpha=0.1, steps=1)], ids=["fgsm", "pgd"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda labels: labels, ValueError, "12 of 12 targets are the image's own class"),
        (lambda labels: labels[1:], ValueError, r"targets have shape \(11,\) for 12 images"),
        (lambda labels: -1 - labels, ValueError, r"targets hold -\d+; classes count from 0"),
        (lambda labels: labels + 10, ValueError, r"label 1\d has no logit: .* returned 10 of them"),
        (lambda labels: labels.float(), TypeError, "targets are torch.float32; give an int64"),
        (lambda labels: labels.to("meta"), ValueError, "images are on cpu, targets on meta; move"),
        (lambda labels: 3, TypeError, "targets are int; give an int64 tensor"),
    ],
)
def test_bad_targets_are_refused(small_cnn, batch, attack, change, error, message):
    images, labels = batch
    with pytest.raises(error, match=message):
        attack(small_cnn, images, labels, 0.1, targeted=change(labels))


# --- the losses


def test_losses_are_their_formulas():
    logits = torch.tensor([[3.0, 1.0, 0.5, 0.0], [0.0, 2.0, 4.0, 1.0]])
    labels = torch.tensor([0, 1])
    margin = torch.tensor([1.0 - 3.0, 4.0 - 2.0])
    torch.testing.assert_close(attack_loss(logits, labels, "margin"), margin)
    torch.testing.assert_close(
        attack_loss(logits, labels, "dlr"), margin / torch.tensor([3.0 - 0.5, 4.0 - 1.0])
    )
    torch.testing.assert_close(
        attack_loss(logits, labels), -torch.log_softmax(logits, 1)[[0, 1], labels]
    )
    three = attack_loss(logits[:, :3], labels, "dlr")  # it compares no fourth
    torch.testing.assert_close(three, margin / torch.tensor([3.0 - 0.5, 4.0 - 0.0]))
    aim = torch.tensor([2, 3])
    torch.testing.assert_close(
        attack_loss(logits, labels, "margin", aim), torch.tensor([0.5 - 3.0, 1.0 - 4.0])
    )
    torch.testing.assert_close(
        attack_loss(logits, labels, "dlr", aim),
        torch.tensor([(0.5 - 3.0) / (3.0 - 0.25), (1.0 - 2.0) / (4.0 - 0.5)]),
    )
    torch.testing.assert_close(
        attack_loss(logits, labels, "ce", aim), torch.log_softmax(logits, 1)[[0, 1], aim]
    )


# --- PGD


def plain_pgd(model, images, labels, eps, alpha, steps):
    """Return each image's point of highest loss, and whether it was ever broken; none leaves."""
    x, highest = images, torch.full((len(images),), -math.inf)
    worst, broken = images.clone(), torch.zeros(len(images), dtype=torch.bool)
    for _ in range(steps + 1):
        x = x.detach().requires_grad_()
        logits = model(x)
        losses = F.cross_entropy(logits, labels, reduction="none")
        broken |= logits.argmax(1) != labels
        higher = losses.detach() > highest
        worst[higher], highest[higher] = x.detach()[higher], losses.detach()[higher]
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        x = images + (x.detach() + alpha * gradient.sign() - images).clamp(-eps, eps)
        x = x.clamp(0, 1)
    return worst, broken


@settings(max_examples=40, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@given(
    eps=st.floats(1e-3, 0.03),
    parts=st.integers(1, 6),
    random_start=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_pgd_with_enough_steps_is_fgsm_on_a_linear_model(
    linear_model, eps, parts, random_start, seed
):
    # There FGSM is the strongest attack, and every path of small steps ends in the same corner.
    images, _ = make_batch(20, seed=seed)
    labels = linear_model(images).argmax(1)
    best = fgsm(linear_model, images, labels, eps)
    steps = (2 if random_start else 1) * parts + 1  # from the other side of the ball, if need be
    attacked = pgd(
        linear_model,
        images,
        labels,
        eps,
        alpha=eps / parts,
        steps=steps,
        random_start=random_start,
        seed=seed,
    )
    standing = is_right(linear_model, attacked, labels)
    assert torch.equal(standing, is_right(linear_model, best, labels))
    torch.testing.assert_close(attacked[standing], best[standing], rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 10])
def test_leaving_early_changes_nothing_for_the_others(undecided, steps):
    model, images, labels = undecided
    alpha = UNDECIDED_EPS / 4
    expected, broken = plain_pgd(model, images, labels, UNDECIDED_EPS, alpha, steps)
    attacked = pgd(
        model, images, labels, UNDECIDED_EPS, alpha=alpha, steps=steps, random_start=False
    )
    assert 5 < int(broken.sum()) < 55
    assert torch.equal(is_right(model, attacked, labels), ~broken)
    assert share_of_moved_pixels(attacked[~broken], expected[~broken]) <= PATH_SHARE


@pytest.mark.parametrize(("alpha", "steps", "best"), [(0.1, 1, 0.5), (0.04, 2, 0.54)])
def test_image_that_stands_keeps_its_point_of_highest_loss(alpha, steps, best):
    images, labels = torch.full((2, 3, 32, 32), 0.5), torch.zeros(2, dtype=torch.int64)

    def model(x):  # its loss is highest at 0.53, which the steps jump over
        return torch.stack([5 + 100 * (x.mean((1, 2, 3)) - 0.53) ** 2, torch.zeros(len(x))], 1)

    attacked = pgd(model, images, labels, 0.2, alpha=alpha, steps=steps, random_start=False)
    assert torch.allclose(attacked, torch.full_like(images, best), rtol=0, atol=1e-6)


class Alternating:
    """A model of two classes that answers by two rules in turn; true class 0 in one rule alone."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        first, second = x[:, 0].mean((1, 2)), x[:, 1].mean((1, 2))
        # Channel 0 pulls one way in every second answer, three times as strongly in the others.
        other = 3 * first + second - 1 if self.calls % 2 else second - first
        return torch.stack([torch.zeros(len(x)), other], 1)


def test_gradients_of_several_answers_are_averaged():
    images, labels = torch.full((2, 3, 8, 8), 0.2), torch.zeros(2, dtype=torch.int64)
    options = {"alpha": 0.1, "steps": 1, "random_start": False, "loss": "margin"}
    model = Alternating()
    model.calls = 1  # the first answer is the weak one, which pulls channel 0 the wrong way
    assert torch.equal(pgd(model, images, labels, 0.1, **options), images)
    model = Alternating()
    several = pgd(model, images, labels, 0.1, eot=4, **options)
    assert torch.allclose(several[:, :2], torch.tensor(0.3), atol=1e-6)
    assert model.calls == 8  # four answers at the start, four after the only step


def test_an_image_that_was_wrong_by_chance_stays_in_the_batch():
    images, labels = torch.full((2, 3, 8, 8), 0.45), torch.zeros(2, dtype=torch.int64)
    options = {"alpha": 0.01, "steps": 5, "random_start": False, "loss": "margin"}
    # Its first answer is wrong: 3 * 0.45 + 0.45 - 1 is above 0.
    assert torch.equal(pgd(Alternating(), images, labels, 0.1, **options), images)
    moved = pgd(Alternating(), images, labels, 0.1, eot=2, **options)
    assert torch.allclose(moved[:, :2], torch.tensor(0.5), atol=1e-6)


def test_asking_more_often_changes_nothing_for_a_model_that_answers_the_same(undecided):
    model, images, labels = undecided
    options = {"alpha": UNDECIDED_EPS / 8, "steps": 2, "random_start": False}
    once = pgd(model, images, labels, UNDECIDED_EPS, **options)
    twice = pgd(model, images, labels, UNDECIDED_EPS, eot=2, **options)
    standing = is_right(model, once, labels)
    assert 10 < standing.sum() < len(images)
    assert torch.equal(once[standing], twice[standing])


def test_broken_image_leaves_at_its_first_wrong_point(undecided):
    model, images, labels = undecided
    options = {"alpha": UNDECIDED_EPS / 4, "random_start": False}
    paths = [
        pgd(model, images, labels, UNDECIDED_EPS, steps=steps, **options) for steps in range(1, 9)
    ]
    fell = 0
    for before, after in pairwise(paths):
        standing = is_right(model, before, labels)
        assert torch.equal(after[~standing], before[~standing])
        fell += int((standing & ~is_right(model, after, labels)).sum())
    assert fell > 5  # later than in the first step


@pytest.mark.parametrize("random_start", [False, True])
def test_image_that_is_wrong_from_the_start_comes_back_as_its_start(small_cnn, random_start):
    images, _ = make_batch(30)
    labels = small_cnn(images).argmin(1)  # wrong anywhere near
    seen = []

    def model(x):
        seen.append(len(x))
        return small_cnn(x)

    starts = [
        pgd(model, images, labels, 0.01, alpha=0.01, steps=steps, random_start=random_start)
        for steps in (1, 7)
    ]
    assert torch.equal(*starts)
    assert torch.equal(starts[0], images) is not random_start
    assert sum(seen) == 2 * 30  # each image was looked at once a call


@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_does_not_depend_on_order_or_on_how_it_is_cut(undecided, monkeypatch, random_start):
    model, images, labels = undecided
    options = {"alpha": UNDECIDED_EPS / 4, "steps": 6, "random_start": random_start}
    expected = pgd(model, images, labels, UNDECIDED_EPS, **options)
    if not random_start:  # an image's start depends on its place
        order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
        shuffled = torch.empty_like(images)
        shuffled[order] = pgd(model, images[order], labels[order], UNDECIDED_EPS, **options)
        assert share_of_moved_pixels(shuffled, expected) <= PATH_SHARE
    monkeypatch.setattr(forward, "CHUNK", 7)
    cut = pgd(model, images, labels, UNDECIDED_EPS, **options)
    assert share_of_moved_pixels(cut, expected) <= PATH_SHARE


@pytest.mark.parametrize("norm", attacks.NORMS)
def test_random_start_fills_the_ball(norm):
    images = torch.full((50, 3, 32, 32), 0.5)
    labels = torch.zeros(50, dtype=torch.int64)

    def model(x):  # wrong everywhere, so that the start comes back
        return torch.stack([-x.mean((1, 2, 3)), torch.zeros(len(x))], 1)

    moved = (pgd(model, images, labels, 0.4, alpha=0.1, steps=3, norm=norm) - 0.5) / 0.4
    if norm == "linf":
        assert float(moved.mean()) == pytest.approx(0, abs=0.02)
        assert float(moved.std()) == pytest.approx(1 / math.sqrt(3), abs=0.02)  # of a uniform one
        assert float(moved.abs().max()) == pytest.approx(1, abs=0.01)
    else:  # of a ball in 3,072 dimensions nearly all is next to its surface
        lengths = moved.flatten(1).norm(dim=1)
        assert 0.995 < float(lengths.median()) < 1
        assert float(lengths.max()) <= 1 + 1e-5


# --- PGD: restarts, targets, L2


@pytest.mark.parametrize("loss", attacks.LOSSES)
@pytest.mark.parametrize("norm", attacks.NORMS)
def test_restarts_never_hurt(undecided, norm, loss):
    model, images, labels = undecided
    eps = UNDECIDED_EPS if norm == "linf" else 0.06
    # Steps so short that the start decides.
    options = {"alpha": eps / 10, "steps": 2, "norm": norm, "loss": loss}
    held = [
        is_right(model, pgd(model, images, labels, eps, restarts=restarts, **options), labels)
        for restarts in (1, 2, 20)
    ]
    assert not (held[1] & ~held[0]).any()  # what is broken stays broken
    assert not (held[2] & ~held[1]).any()
    if norm == "linf":  # in an L2 ball random directions are nearly worthless
        assert held[2].sum() < held[0].sum()


def test_restarts_keep_the_point_of_highest_loss(undecided):
    model, images, labels = undecided
    options = {"alpha": UNDECIDED_EPS / 3, "steps": 2}

    def losses(restarts):
        attacked = pgd(model, images, labels, UNDECIDED_EPS, restarts=restarts, **options)
        standing = is_right(model, attacked, labels)
        with torch.no_grad():
            return F.cross_entropy(model(attacked), labels, reduction="none"), standing

    (one, _), (five, standing) = losses(1), losses(5)
    assert (five[standing] >= one[standing] - 1e-6).all()
    assert (five[standing] > one[standing] + 1e-6).any()


@pytest.mark.parametrize("norm", attacks.NORMS)
def test_targeted_attack_reaches_its_target(undecided, norm):
    model, images, labels = undecided
    aim = (labels + 3) % 10
    eps = 0.1 if norm == "linf" else 3.0
    attacked = pgd(model, images, labels, eps, alpha=eps / 8, steps=30, targeted=aim, norm=norm)
    assert float(is_right(model, attacked, aim).float().mean()) > 0.95


def test_targeted_fgsm_moves_towards_the_target_as_far_as_away_from_it(undecided):
    model, images, labels = undecided
    aim = (labels + 3) % 10
    away = fgsm(model, images, aim, 0.01)
    towards = fgsm(model, images, labels, 0.01, targeted=aim)
    inside = (images > 0.01) & (images < 0.99)
    torch.testing.assert_close((towards - images)[inside], -(away - images)[inside])


def test_l2_attack_of_a_linear_model_is_known(linear_model):
    # One long step along the gradient, cut to the ball: eps times the difference of the weights.
    images, labels = make_batch(20, classes=2)
    images = images * 0.2 + 0.4  # so that no pixel is clamped
    weight = linear_model[1].weight.detach()
    towards = weight[1 - labels] - weight[labels]
    expected = images + 0.5 * (towards / towards.norm(dim=1, keepdim=True)).reshape(images.shape)
    right = is_right(linear_model, images, labels)
    options = {"alpha": 2.0, "steps": 1, "norm": "l2", "random_start": False}
    attacked = pgd(linear_model, images, labels, 0.5, **options)
    torch.testing.assert_close(attacked[right], expected[right], rtol=0, atol=1e-5)


def test_bim_and_rfgsm_are_cases_of_pgd(undecided):
    model, images, labels = undecided
    options = {"alpha": UNDECIDED_EPS / 4, "steps": 4}
    assert torch.equal(
        bim(model, images, labels, UNDECIDED_EPS, **options),
        pgd(model, images, labels, UNDECIDED_EPS, random_start=False, **options),
    )
    assert torch.equal(
        rfgsm(model, images, labels, 0.01, alpha=0.0125, seed=3),
        pgd(model, images, labels, 0.01, alpha=0.0125, steps=1, seed=3),
    )


def test_planted_example_is_found():
    # Right everywhere but in a thin slab next to the images: a single step over it misses.
    images, labels = torch.full((5, 3, 32, 32), 0.5), torch.zeros(5, dtype=torch.int64)

    def model(x):
        mean = x.mean((1, 2, 3))
        wrong = (mean > 0.515) & (mean < 0.525)
        logits = torch.stack([torch.ones(len(x)), mean - 0.4], 1)
        return logits + torch.stack([-2 * wrong, 2 * wrong], 1)

    assert is_right(model, fgsm(model, images, labels, 0.06), labels).all()
    attacked = pgd(model, images, labels, 0.06, alpha=0.01, steps=10, random_start=False)
    assert not is_right(model, attacked, labels).any()


# --- on a model that has learned something


def test_pgd_is_worse_than_fgsm_than_noise_than_clean(learned):
    model, test = learned
    images, labels = test.first(100).batch(slice(None))
    for eps in (0.02, 0.1):
        made = {"clean": images} | {
            name: ATTACKS[name](model, images, labels, eps) for name in ("noise", "fgsm", "pgd-20")
        }
        right = {name: evaluate(model, shown, labels)[0] for name, shown in made.items()}
        assert right["pgd-20"] <= right["fgsm"] < right["noise"]
        assert right["noise"] <= right["clean"] + 2  # it may help a few
    assert right["pgd-20"] == 0


def masked(model):
    """Return a model with the same predictions whose loss mostly saturates at 0 in float32."""
    return lambda x: 1000 * model(x)


def test_scale_free_losses_break_a_masked_model(learned):
    model, test = learned
    images, labels = test.first(60).batch(slice(None))
    options = {"alpha": 0.01, "steps": 15}
    held = {}
    for loss in attacks.LOSSES:
        attacked = pgd(masked(model), images, labels, 0.05, loss=loss, **options)
        held[loss] = int(is_right(model, attacked, labels).sum())
    assert held["dlr"] < 0.5 * held["ce"]
    assert held["margin"] < 0.5 * held["ce"]
