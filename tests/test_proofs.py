"""Randomised smoothing and interval bounds: exact where the answer is known, sound everywhere."""

import copy
import math
from statistics import NormalDist

import pytest
import torch
from conftest import assert_same_state, balance, make_batch, make_small_cnn, randomise_batch_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advlab import models, proofs
from advlab.attacks import fgsm, pgd
from advlab.evaluation import holds
from advlab.proofs import (
    ABSTAIN,
    Certificates,
    certify,
    clopper_pearson,
    interval_bounds,
    worst_margins,
)

SHAPE = (3, 8, 8)


def half_plane(seed=0, shape=SHAPE):
    """Return a linear model of two classes, and the distance of an image from its border."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, math.prod(shape), generator=generator))
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)  # grey lies on the border
    normal = (model[1].weight[1] - model[1].weight[0]).detach()
    offset = (model[1].bias[1] - model[1].bias[0]).detach()

    def distances(images):
        return ((images.flatten(1) @ normal + offset).abs() / normal.norm()).double()

    return model, distances


class Always(nn.Module):
    """Names class 1 whatever it is shown."""

    def forward(self, x):
        return torch.stack([0 * x.flatten(1).sum(1), 1 + 0 * x.flatten(1).sum(1)], 1)


# --- a bound of a probability


def test_bound_is_known_where_all_or_one_or_none_succeed():
    for n, alpha in ((1, 0.05), (9, 0.001), (100, 0.001), (1_000, 0.5)):
        assert clopper_pearson(n, n, alpha) == pytest.approx(alpha ** (1 / n), rel=1e-9)
        assert clopper_pearson(1, n, alpha) == pytest.approx(1 - (1 - alpha) ** (1 / n), rel=1e-9)
        assert clopper_pearson(0, n, alpha) == 0


def test_bound_agrees_with_scipy():
    beta = pytest.importorskip("scipy.stats", reason="scipy comes with the extra [bench]").beta
    for n in (10, 1_000, 100_000):
        for successes in (1, n // 3, n // 2, n - 1):
            expected = beta.ppf(0.001, successes, n - successes + 1)
            assert clopper_pearson(successes, n, 0.001) == pytest.approx(expected, rel=1e-7)


@given(n=st.integers(1, 40), p=st.floats(0.01, 0.99), alpha=st.floats(0.001, 0.4))
@settings(max_examples=60)
def test_bound_is_too_high_with_probability_alpha_at_most(n, p, alpha):
    chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    bounds = [clopper_pearson(k, n, alpha) for k in range(n + 1)]
    assert bounds == sorted(bounds)
    wrong = sum(c for c, bound in zip(chances, bounds, strict=True) if bound > p)
    assert wrong <= alpha * (1 + 1e-9)


@pytest.mark.parametrize(
    ("successes", "n", "alpha", "told"),
    [
        (11, 10, 0.1, "successes is 11, of n = 10 trials"),
        (-1, 10, 0.1, "successes is -1"),
        (2.5, 10, 0.1, "successes is 2.5"),
        (0, 0, 0.1, "n is 0"),
        (5, 10, 0, "alpha is 0; it is the probability that a proof is wrong"),
        (5, 10, 1, "alpha is 1;"),
        (5, 10, math.nan, "alpha is nan;"),
        (5, 10, "0.1", "alpha is '0.1';"),
    ],
)
def test_bound_refuses_what_is_none(successes, n, alpha, told):
    with pytest.raises((ValueError, TypeError), match=told):
        clopper_pearson(successes, n, alpha)


# --- smoothing


def test_radius_of_a_linear_model_is_its_distance_from_the_border_and_never_more():
    model, distances = half_plane()
    images = make_batch(30, shape=SHAPE)[0]
    found = certify(model, images, 0.2, n=4_000, alpha=1e-4)
    exact, proved = distances(images), found.answers != ABSTAIN
    with torch.no_grad():
        assert torch.equal(found.answers[proved], model(images).argmax(1)[proved])
    assert bool((found.radii <= exact).all())
    ceiling = 0.2 * NormalDist().inv_cdf(1e-4 ** (1 / 4_000))
    measured = proved & (exact > 0.06) & (exact < 0.6 * ceiling)
    assert int(measured.sum()) >= 8
    assert bool((found.radii > 0.6 * exact)[measured].all())
    assert not bool(proved[exact < 0.002].any())


def test_n_sets_a_ceiling():
    images = make_batch(2, shape=SHAPE)[0]
    found = certify(Always(), images, 0.25)
    assert found.answers.tolist() == [1, 1]
    assert found.counts.tolist() == [1_000, 1_000]
    assert found.radii.tolist() == pytest.approx([0.616, 0.616], abs=5e-4)
    most = certify(Always(), images, 0.25, n=2_500).radii[0]  # more than are asked at once
    assert float(most) == pytest.approx(0.25 * NormalDist().inv_cdf(0.001 ** (1 / 2_500)))


def test_few_copies_prove_nothing():
    images = make_batch(2, shape=SHAPE)[0]
    nine, ten = (certify(Always(), images, 0.25, n=n) for n in (9, 10))
    assert nine.answers.tolist() == [ABSTAIN, ABSTAIN]
    assert nine.radii.tolist() == [0, 0]
    assert ten.answers.tolist() == [1, 1]
    assert 0 < float(ten.radii[0]) < 0.001


def test_copies_that_choose_the_class_are_not_counted():
    calls = []

    def turncoat(x):
        named = torch.full((len(x),), 3 if sum(calls) < 20 else 5)
        calls.append(len(x))
        return torch.nn.functional.one_hot(named, 6).float()

    found = certify(turncoat, make_batch(1, shape=SHAPE)[0], 0.25, n0=20, n=50)
    assert sum(calls) == 70
    assert (found.answers.item(), found.radii.item(), found.counts.item()) == (ABSTAIN, 0, 0)


def test_noise_has_the_asked_size_and_is_not_clipped():
    seen = []

    def watching(x):
        seen.append(x.clone())
        return Always()(x)

    image = torch.full((1, *SHAPE), 0.5)
    certify(watching, image, 0.7, n0=1, n=400)
    noise = torch.cat(seen) - 0.5
    assert float(noise.std()) == pytest.approx(0.7, rel=0.01)
    assert abs(float(noise.mean())) < 0.01
    assert float(noise.max()) > 2


def test_noise_depends_on_the_seed_and_the_place_alone():
    model, images = make_small_cnn(0, SHAPE), make_batch(6, shape=SHAPE)[0]
    balance(model, images)
    options = {"n0": 20, "n": 100}
    first = certify(model, images, 0.3, **options)
    again = certify(model, images, 0.3, **options)
    fewer = certify(model, images[:4], 0.3, **options)
    other = certify(model, images, 0.3, seed=1, **options)
    assert torch.equal(first.counts, again.counts)
    assert torch.equal(first.counts[:4], fewer.counts)
    assert not torch.equal(first.counts, other.counts)


def test_certificates_hold_below_their_radius_alone():
    found = Certificates(
        torch.tensor([2, 2, ABSTAIN, 1]),
        torch.tensor([0.5, 0.3, 0.0, 0.9], dtype=torch.float64),
        torch.tensor([99, 90, 40, 100]),
    )
    labels = torch.tensor([2, 2, 2, 2])
    assert found.hold(labels).tolist() == [True, True, False, False]
    assert found.hold(labels, 0.3).tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match=r"labels have shape \(3,\) for 4 images"):
        found.hold(labels[:3])
    for radius in (-0.1, math.nan):
        with pytest.raises(ValueError, match=f"radius is {radius}"):
            found.hold(labels, radius)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sigma": 0}, "sigma is 0; it must be a number above 0, in units of the pixel range"),
        ({"sigma": -0.1}, "sigma is -0.1"),
        ({"sigma": math.inf}, "sigma is inf"),
        ({"sigma": math.nan}, "sigma is nan"),
        ({"sigma": True}, "sigma is True"),
        ({"sigma": "0.25"}, "sigma is '0.25'"),
        ({"n": 0}, "n is 0"),
        ({"n": 10.5}, "n is 10.5"),
        ({"n0": 0}, "n0 is 0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": 1.0}, r"alpha is 1\.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_certify_refuses_numbers_out_of_range(options, told):
    with pytest.raises((ValueError, TypeError), match=told):
        certify(Always(), make_batch(1, shape=SHAPE)[0], **{"sigma": 0.25, **options})


def test_a_model_in_training_mode_is_asked_in_eval_mode_and_left_as_it_was():
    model, images = make_small_cnn(0, SHAPE), make_batch(3, shape=SHAPE)[0]
    labels = balance(model, images)
    before = copy.deepcopy(model.state_dict())
    expected = certify(model, images, 0.1, n=50).counts, worst_margins(model, images, labels, 0.01)
    model.train()
    assert torch.equal(certify(model, images, 0.1, n=50).counts, expected[0])
    assert torch.equal(worst_margins(model, images, labels, 0.01), expected[1])
    assert all(module.training for module in model.modules())
    assert_same_state(model, before)
    with pytest.raises(ValueError, match="that is in training mode; call its eval"):
        certify(lambda x: model(x), images, 0.1)


# --- interval bounds


def corners(images, eps, seed):
    """Return an image within `eps` of each image and in [0, 1]: corners of the box, and points."""
    generator = torch.Generator().manual_seed(seed)
    moves = 2 * torch.rand(images.shape, generator=generator) - 1
    at_corner = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    moves = torch.where(at_corner, moves.sign(), moves)
    return (images + eps * moves).clamp(0, 1)


def test_bounds_of_a_linear_model_are_exact():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), 2))
    images = make_batch(8, shape=SHAPE)[0]  # also near 0 and 1, where the box is cut
    with torch.no_grad():
        labels = model(images).argmax(1)
        low, high = interval_bounds(model, images, 0.1)
        attacked = fgsm(model, images, labels, 0.1)  # the worst image of a linear model
        logits = model(attacked)
        for k in range(2):
            worst = (images - 0.1 * model[1].weight[k].sign().view(SHAPE)).clamp(0, 1)
            torch.testing.assert_close(low[:, k], model(worst)[:, k], atol=1e-5, rtol=0)
            best = (images + 0.1 * model[1].weight[k].sign().view(SHAPE)).clamp(0, 1)
            torch.testing.assert_close(high[:, k], model(best)[:, k], atol=1e-5, rtol=0)
    margins = logits.gather(1, labels[:, None]) - logits.gather(1, 1 - labels[:, None])
    found = worst_margins(model, images, labels, 0.1)
    torch.testing.assert_close(found, margins[:, 0], atol=1e-5, rtol=0)
    apart = (low.gather(1, labels[:, None]) - high.gather(1, 1 - labels[:, None]))[:, 0]
    assert bool((apart < found - 0.01).all())  # bounds of the two logits apart prove less


def some_network(seed):
    """Return a small network with each of the layers that have a rule."""
    torch.manual_seed(seed)
    pool = nn.MaxPool2d(2) if seed % 2 else nn.AvgPool2d(2)
    stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=1 + seed % 2, padding=1), nn.ReLU())
    side = 8 // (1 + seed % 2) // 2
    network = nn.Sequential(
        *(stem, nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding="same", groups=2), pool),
        *(nn.Flatten(), nn.Linear(4 * side * side, 9), nn.ReLU(), nn.Linear(9, 5)),
    )
    with torch.no_grad():  # a channel whose sign is turned around
        randomise_batch_norm(network)[1].weight[0] *= -1
    return network.eval()


@given(seed=st.integers(0, 200), eps=st.floats(0, 0.3))
@settings(max_examples=40)
def test_no_point_leaves_the_bounds(seed, eps):
    model, images = some_network(seed), make_batch(4, 5, seed, SHAPE)[0]
    low, high = interval_bounds(model, images, eps)
    with torch.no_grad():
        labels = model(images).argmax(1)
        margins = worst_margins(model, images, labels, eps)
        points = [corners(images, eps, k) for k in range(8)]
        if eps > 0:
            points.append(pgd(model, images, labels, eps, alpha=eps / 3, steps=5, loss="margin"))
        for logits in map(model, points):
            assert bool((logits >= low - 1e-4).all())
            assert bool((logits <= high + 1e-4).all())
            rivals = logits.scatter(1, labels[:, None], -math.inf).amax(1)
            leads = logits.gather(1, labels[:, None])[:, 0] - rivals
            assert bool((leads >= margins - 1e-4).all())


def test_what_is_certified_is_never_broken():
    model, images = make_small_cnn(0, SHAPE), make_batch(60, shape=SHAPE)[0]
    labels = balance(model, images)
    for eps in (0.0005, 0.002, 0.004):
        proved = worst_margins(model, images, labels, eps) > 0
        assert 0 < int(proved.sum()) < 60
        for loss in ("ce", "margin"):
            attacked = pgd(model, images, labels, eps, alpha=eps / 4, steps=20, loss=loss)
            kept = holds(model, attacked, labels)
            assert bool(kept[proved].all())
    assert not bool(kept.all())


def test_bounds_grow_with_eps_and_begin_at_the_logits():
    model, images = some_network(3), make_batch(5, shape=SHAPE)[0]
    with torch.no_grad():
        logits = model(images)
    for bound in interval_bounds(model, images, 0):
        torch.testing.assert_close(bound, logits, atol=1e-5, rtol=0)
    before = None
    for eps in (0.01, 0.02, 0.5, 1):
        low, high = interval_bounds(model, images, eps)
        if before:
            assert bool((low < before[0]).all())
            assert bool((high > before[1]).all())
        before = low, high
    # At eps = 1 every image is within reach of every other.
    torch.testing.assert_close(low[0].expand_as(low), low)


def test_batch_norm_is_bounded_as_the_convolution_it_can_be_folded_into():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten()
    model, images = nn.Sequential(*layers), make_batch(3, shape=SHAPE)[0]
    with torch.no_grad():
        randomise_batch_norm(model)[1].weight[1] *= -1
    folded = nn.utils.fusion.fuse_conv_bn_eval(layers[0].eval(), layers[1].eval())
    expected = interval_bounds(nn.Sequential(folded, nn.Flatten()), images, 0.05)
    for found, bound in zip(interval_bounds(model, images, 0.05), expected, strict=True):
        torch.testing.assert_close(found, bound, atol=1e-5, rtol=1e-5)


def test_the_papers_cnn_is_its_layers_and_every_part_is_bounded():
    torch.manual_seed(0)
    model, images = randomise_batch_norm(models.build("cnn")).eval(), make_batch(130)[0]
    labels = balance(model, images)
    found = worst_margins(model, images, labels, 1e-5)
    torch.testing.assert_close(found, worst_margins(model.network, images, labels, 1e-5))
    last = worst_margins(model, images[120:], labels[120:], 1e-5)
    torch.testing.assert_close(found[120:], last, atol=1e-4, rtol=1e-4)


def test_a_network_that_does_not_end_in_a_linear_layer_is_bounded():
    model, images = nn.Sequential(some_network(1), nn.ReLU()), make_batch(6, shape=SHAPE)[0]
    labels = balance(model, images)
    low, high = interval_bounds(model, images, 0.01)
    others = high.scatter(1, labels[:, None], -math.inf).amax(1)
    expected = low.gather(1, labels[:, None])[:, 0] - others
    torch.testing.assert_close(worst_margins(model, images, labels, 0.01), expected)


class Bent(nn.ReLU):
    """A layer derived from one with a rule, which computes something else."""

    def forward(self, x):
        return -x


def without_statistics():
    return nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten())


def hooked():
    layer = nn.Flatten()
    layer.register_forward_hook(lambda module, inputs, output: -output)
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (models.build("cnn-lstm"), "no interval bounds are known for CNNLSTM; known are AvgPool2d"),
        (nn.Sequential(nn.Flatten(), Bent()), "no interval bounds are known for Bent"),
        (nn.Sequential(nn.Sequential(nn.GELU())), "no interval bounds are known for GELU"),
        (nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")), "'circular'"),
        (without_statistics(), "keeps no running statistics"),
        (hooked(), "a Flatten has hooks"),
        (lambda x: x.flatten(1), "layers of a function cannot be seen; give the nn.Module"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), "one logit an image"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), r"label \d has no logit"),
    ],
    ids=["lstm", "derived", "gelu", "padding", "statistics", "hook", "function", "one", "label"],
)
def test_what_has_no_bounds_is_refused(model, told):
    images, labels = make_batch(4, shape=SHAPE)
    labels = labels * 0 if "one logit" in told else labels
    with pytest.raises(ValueError, match=told):
        worst_margins(model, images, labels, 0.01)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda x: x.flatten(1) / 0, "NaN or infinity for 1 of 1 images"),
        (lambda x: x, r"returned \(1, 3, 8, 8\) for 1 images"),
        (make_small_cnn(0, SHAPE).to("meta"), "model is on meta, the images on cpu"),
    ],
    ids=["nan", "rank", "device"],
)
def test_certify_refuses_bad_answers(model, told):
    with pytest.raises(ValueError, match=told):
        certify(model, make_batch(1, shape=SHAPE)[0], 0.25, n0=1, n=4)


def test_other_dtypes_are_measured_as_float32_is():
    model, images = make_small_cnn(0, SHAPE), make_batch(6, shape=SHAPE)[0]
    labels = balance(model, images)
    expected = worst_margins(model, images, labels, 0.01)
    for one in (images.double(), images.half().double()):
        found = worst_margins(model, one, labels, 0.01)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=0.01, rtol=0.01)
    counts = certify(model, images, 0.2, n=50).counts
    assert torch.equal(certify(model, images.double(), 0.2, n=50).counts, counts)
    double = worst_margins(copy.deepcopy(model).double(), images, labels, 0.01)
    torch.testing.assert_close(double.float(), expected, atol=1e-4, rtol=1e-4)
    for coarse in (torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match=f"the weights are {coarse}.*give model.float"):
            worst_margins(copy.deepcopy(model).to(coarse), images, labels, 0.01)


def test_bounds_of_a_network_elsewhere_are_refused():
    images, labels = make_batch(2, shape=SHAPE)
    model = make_small_cnn(0, SHAPE).to("meta")
    for bound in (lambda: interval_bounds(model, images, 0.1),
                  lambda: worst_margins(model, images, labels, 0.1)):  # fmt: skip
        with pytest.raises(ValueError, match="model is on meta, the images on cpu"):
            bound()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_prove_nothing(bad):
    model, (images, labels) = make_small_cnn(0, SHAPE), make_batch(4, shape=SHAPE)
    with torch.no_grad():
        model[-1].weight[0, 0] = bad
    with pytest.raises(ValueError, match="a bound is NaN or infinite"):
        worst_margins(model, images, labels, 0.01)
    with pytest.raises(ValueError, match="a bound is NaN or infinite"):
        interval_bounds(model, images, 0.01)


@pytest.mark.parametrize("eps", [-0.1, 1.5, math.nan, "8/255"])
def test_eps_out_of_range_is_refused(eps):
    images, labels = make_batch(2, shape=SHAPE)
    with pytest.raises(ValueError, match=r"eps is .*; it must be a number from 0 to 1"):
        worst_margins(make_small_cnn(0, SHAPE), images, labels, eps)


def test_no_rule_is_without_a_test():
    tried = {type(layer) for seed in (0, 1) for layer in some_network(seed).modules()}
    assert set(proofs.RULES) <= tried
