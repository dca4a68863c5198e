"""DeepFool, Carlini and Wagner, JSMA: oracles, bounds, invariances, nothing left behind."""

import copy
import math
from functools import partial
from itertools import combinations

import pytest
import torch
from conftest import assert_same_state, balance, make_batch, make_small_cnn
from torch import nn

from advlab import forward, minimal
from advlab.minimal import carlini_wagner, deepfool, distortion, jsma

SHAPE = (3, 16, 16)  # small: the table of pairs grows with the fourth power of the side
SIZE = 3 * 16 * 16
ATTACKS = {
    "deepfool": deepfool,
    "c&w": partial(carlini_wagner, steps=25, searches=3, constant=0.1, rate=0.004),
    "jsma": partial(jsma, pairs=False),
    "jsma pairs": jsma,
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def answers(model, images):
    with torch.no_grad():
        return model(images).argmax(1)


def likeliest_others(model, images):
    """Return the class of the second highest logit."""
    with torch.no_grad():
        return model(images).topk(2).indices[:, 1]


@pytest.fixture
def undecided():
    """A model with 12 images that it gets right, with small margins and large ones."""
    model, (images, _) = make_small_cnn(0, SHAPE), make_batch(12, shape=SHAPE)
    return model, images, balance(model, images)


@pytest.fixture
def planes():
    """A linear model of ten classes, grey images that it gets right, and how far each border is.

    The distances, (10, 10), are to the planes on which another class is as likely; inf to its own.
    """
    torch.manual_seed(1)  # not that of the images: the weights would be made of the same numbers
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIZE, 10))
    with torch.no_grad():  # so that the smallest gap is not always the nearest border
        model[1].weight *= torch.linspace(0.5, 2, 10)[:, None]
    images = make_batch(10, shape=SHAPE)[0] * 0.4 + 0.3  # so that nothing is clamped
    labels = balance(model, images)
    weight = model[1].weight.detach()
    with torch.no_grad():
        logits = model(images)
    gaps = logits.gather(1, labels[:, None]) - logits
    lengths = (weight[labels][:, None] - weight).norm(dim=2)
    distances = (gaps / lengths).scatter(1, labels[:, None], math.inf)
    return model, images, labels, distances


class Flat(nn.Module):
    """Always of the same opinion: there is a gradient, and it is 0."""

    def forward(self, x):
        first = 1 + 0 * x.flatten(1).sum(1)
        return torch.stack([first, 0 * first, -first], 1)


# --- linear models know the answer


def test_deepfool_of_a_linear_model_is_the_shortest_way_and_the_overshoot(planes):
    model, images, labels, distances = planes
    made = deepfool(model, images, labels, steps=1)
    found = distortion(model, images, labels, made)["l2"]
    torch.testing.assert_close(found, 1.02 * distances.amin(1), rtol=1e-3, atol=0)
    assert torch.equal(answers(model, made), distances.argmin(1))
    weight = model[1].weight.detach()
    normals = weight[distances.argmin(1)] - weight[labels]
    alike = torch.cosine_similarity((made - images).flatten(1), normals)
    assert float(alike.min()) > 0.9999


def test_deepfool_looks_at_the_most_likely_classes_alone(planes):
    model, images, labels, distances = planes
    expected = distances.gather(1, likeliest_others(model, images)[:, None])[:, 0]
    made = deepfool(model, images, labels, classes=2, overshoot=0.1)
    found = distortion(model, images, labels, made)["l2"]
    torch.testing.assert_close(found, 1.1 * expected, rtol=1e-3, atol=0)
    assert bool((expected > 1.001 * distances.amin(1)).any())  # another class was nearer


@pytest.mark.parametrize("constant", [1e-3, 3.0])
def test_carlini_wagner_of_a_linear_model_is_nearly_the_shortest_way(planes, constant):
    model, images, labels, distances = planes
    options = {"steps": 60, "searches": 8, "constant": constant, "rate": 0.001}
    made = carlini_wagner(model, images, labels, **options)
    found = distortion(model, images, labels, made)["l2"]
    assert bool((found > 0.999 * distances.amin(1)).all())  # nothing is shorter than the shortest
    # Its margin is to the likeliest other class, whose border need not be the nearest.
    runner_up = likeliest_others(model, images)
    aimed_at = distances.gather(1, runner_up[:, None])[:, 0]
    assert bool((found < 1.1 * aimed_at + 0.004).all())
    nearest = runner_up == distances.argmin(1)
    assert int(nearest.sum()) >= 5
    assert float((found / aimed_at)[nearest].median()) < 1.05


def test_kappa_is_the_margin_that_is_left(linear_model):
    images = make_batch(4)[0] * 0.4 + 0.3
    labels = answers(linear_model, images)
    lengths = {}
    for kappa in (0.0, 0.5):
        options = {"kappa": kappa, "steps": 60, "searches": 7, "constant": 0.5, "rate": 0.005}
        made = carlini_wagner(linear_model, images, labels, **options)
        lengths[kappa] = distortion(linear_model, images, labels, made)["l2"]
        with torch.no_grad():
            logits = linear_model(made)
        margin = (logits[:, 0] - logits[:, 1]).abs()
        assert bool((margin >= kappa).all())
        assert bool((logits.argmax(1) != labels).all())
    difference = linear_model[1].weight.detach()
    further = 0.5 / float((difference[0] - difference[1]).norm())
    torch.testing.assert_close(
        lengths[0.5] - lengths[0.0], torch.full((4,), further), rtol=0.15, atol=0
    )


# --- JSMA on slopes that are planted


def planted(gains, losses, gap=0.3):
    """Return a model of 12 values and two classes; the second one lags behind by `gap` at 0.25."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        for row, slopes in enumerate((losses, gains)):
            for place, slope in slopes.items():
                model[1].weight[row, place] = slope
        model[1].bias.zero_()
        first, second = model(torch.full((1, 1, 3, 4), 0.25))[0]
        model[1].bias[0] = gap + second - first
    return model


def changed(model, image, **options):
    made = jsma(model, image, torch.zeros(1, dtype=torch.int64), gamma=1.0, **options)
    return [int(place) for place in (made != image).flatten().nonzero()]


GAINS, LOSSES = {2: 10.0, 5: 1.0, 7: 2.0}, {2: 0.5, 5: -1.0, 7: -0.4}


def test_jsma_takes_the_value_that_helps_the_target_and_hurts_the_rest():
    image, model = torch.full((1, 1, 3, 4), 0.25), planted(GAINS, LOSSES)
    assert changed(model, image, pairs=False) == [5]  # value 2 has the larger gain: it helps both
    image[0, 0, 1, 1] = 1.0  # value 5 cannot be raised any more
    assert changed(planted(GAINS, LOSSES, gap=1.8), image, pairs=False) == [7]


def test_jsma_lets_one_value_of_a_pair_make_up_for_the_other():
    image, model = torch.full((1, 1, 3, 4), 0.25), planted(GAINS, LOSSES)
    assert changed(model, image, pairs=True) == [2, 5]  # 11 x 0.5; 5 and 7 have 3 x 1.4


@pytest.mark.parametrize("pairs", [False, True])
def test_jsma_lowers_values_where_theta_is_negative(pairs):
    image = torch.full((1, 1, 3, 4), 0.75)
    turned = [{place: -slope for place, slope in one.items()} for one in (GAINS, LOSSES)]
    model = planted(*turned)
    with torch.no_grad():  # at 0.75, not at 0.25, the second class lags a little
        model[1].bias[0] += 0.3 + float(model(image)[0] @ torch.tensor([-1.0, 1.0]))
    assert changed(model, image, pairs=pairs, theta=-1.0) == ([2, 5] if pairs else [5])


def test_jsma_goes_in_steps_of_theta_and_may_take_a_value_again():
    image, model = torch.full((1, 1, 3, 4), 0.25), planted({5: 1.0}, {5: -1.0}, gap=0.5)
    made = jsma(model, image, torch.zeros(1, dtype=torch.int64), theta=0.1, gamma=1.0, pairs=False)
    assert float(made[0, 0, 1, 1]) == pytest.approx(0.55)  # 0.5 / 2, in whole steps


def test_saliencies_are_those_of_trying_all():
    generator = torch.Generator().manual_seed(0)
    gains, losses = torch.randn(2, 60, 9, generator=generator)
    free = torch.rand(60, 9, generator=generator) < 0.6
    losses[:5] = losses[:5].abs()  # none has a saliency here
    for best, size in ((minimal._best_value, 1), (minimal._best_pair, 2)):
        places, there = best(gains, losses, free)
        for row in range(60):
            open_ = free[row].nonzero()[:, 0].tolist()
            table = {}
            for chosen in combinations(open_, size):
                gain, loss = (float(one[row, list(chosen)].sum()) for one in (gains, losses))
                if gain > 0 > loss:
                    table[chosen] = -gain * loss
            assert bool(there[row]) is bool(table)
            if table:
                assert tuple(sorted(places[row].tolist())) == max(table, key=table.get)
    assert not there[:5].any()


def test_table_of_pairs_of_large_images_is_refused():
    images = torch.full((1, 3, 224, 224), 0.5)
    told = r"pairs of 150,528 values are a table of 84\.4 GiB an image; give pairs=False"
    with pytest.raises(ValueError, match=told):
        jsma(Flat(), images, torch.zeros(1, dtype=torch.int64))


def test_jsma_changes_no_more_than_gamma(undecided):
    model, images, labels = undecided
    for gamma, allowed in ((0.0, 0), (5.5 / SIZE, 5)):
        for pairs in (False, True):
            made = jsma(model, images, labels, gamma=gamma, pairs=pairs)
            count = (made != images).flatten(1).sum(1)
            assert int(count.max()) <= allowed
            assert bool((answers(model, made) != labels)[count > 0].all())


# --- what comes out


@each_attack
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_image_is_fooled_or_comes_back_as_it_is(attack, dtype, undecided):
    model, images, labels = undecided
    labels[:2] = (labels[:2] + 1) % 10  # wrong as they are
    given = images.to(dtype).requires_grad_()
    before = given.detach().clone()
    made = attack(model, given, labels)
    assert (made.shape, made.dtype, made.requires_grad) == (images.shape, dtype, False)
    assert torch.equal(given.detach(), before)
    assert 0 <= float(made.min()) <= float(made.max()) <= 1
    assert torch.equal(made[:2], before[:2])
    moved = (made != before).flatten(1).any(1)
    fooled = answers(model, made.float()) != labels
    assert torch.equal(fooled[2:], moved[2:])
    assert int(fooled.sum()) >= 10


@each_attack
def test_images_of_16_bits_are_refused(attack, undecided):
    model, images, labels = undecided
    with pytest.raises(TypeError, match=r"bfloat16, whose steps .* give images.float\(\)"):
        attack(model, images.bfloat16(), labels)


@pytest.mark.parametrize("name", ["c&w", "jsma", "jsma pairs"])
def test_target_is_reached_or_the_image_comes_back_as_it_is(name, undecided):
    model, images, labels = undecided
    aim = (labels + 1) % 10
    made = ATTACKS[name](model, images, labels, targeted=aim)
    moved = (made != images).flatten(1).any(1)
    assert torch.equal(answers(model, made) == aim, moved)
    assert int(moved.sum()) >= 8


@each_attack
@pytest.mark.parametrize(("shape", "classes"), [((1, 28, 28), 2), ((4, 8, 8), 101)])
def test_any_images_are_attacked(attack, shape, classes):
    model = make_small_cnn(0, shape, classes)
    images, _ = make_batch(6, shape=shape)
    labels = balance(model, images)
    made = attack(model, images, labels)
    assert made.shape == images.shape
    assert bool((answers(model, made) != labels).any())


def test_each_is_best_in_its_own_norm(undecided):
    patient = {"steps": 60, "searches": 5, "constant": 0.1, "rate": 0.003}
    attacks = ATTACKS | {"c&w": partial(carlini_wagner, **patient)}
    found = {name: distortion(*undecided, attack(*undecided)) for name, attack in attacks.items()}
    middle = {name: {k: float(v.median()) for k, v in one.items()} for name, one in found.items()}
    assert middle["c&w"]["l2"] < 1.1 * middle["deepfool"]["l2"]
    for name in ("jsma", "jsma pairs"):
        assert middle[name]["l0"] < 50 < middle["deepfool"]["l0"]
        assert middle[name]["l2"] > middle["deepfool"]["l2"]
        assert middle[name]["linf"] > middle["deepfool"]["linf"]


@pytest.mark.parametrize("constant", [1e-3, 10.0])
def test_more_searches_are_never_worse(undecided, constant):
    model, images, labels = undecided
    found = [
        distortion(
            model, images, labels,
            carlini_wagner(model, images, labels, steps=20, searches=k, constant=constant),
        )["l2"]
        for k in (1, 3, 6)
    ]  # fmt: skip
    assert bool((found[1] <= found[0]).all() and (found[2] <= found[1]).all())
    assert bool((found[2] < found[0]).any())
    assert bool(found[2].isfinite().all())


# --- null cases


@each_attack
def test_image_that_is_wrong_already_is_asked_for_once(attack, undecided):
    network, images, labels = undecided
    seen = []

    def model(x):
        seen.append(len(x))
        return network(x)

    assert torch.equal(attack(model, images, (labels + 1) % 10), images)
    assert seen == [12]


@each_attack
def test_model_that_cannot_be_fooled_leaves_everything_as_it_is(attack):
    images, labels = make_batch(4, shape=SHAPE)[0], torch.zeros(4, dtype=torch.int64)
    made = attack(Flat(), images, labels)
    assert torch.equal(made, images)
    for sizes in distortion(Flat(), images, labels, made).values():
        assert bool(sizes.isinf().all())


def test_search_is_left_where_nothing_changes_any_more():
    seen, flat = [], Flat()

    def model(x):
        seen.append(len(x))
        return flat(x)

    images, labels = make_batch(4)[0], torch.zeros(4, dtype=torch.int64)
    carlini_wagner(model, images, labels, steps=100, searches=3)
    assert seen == [4] * (1 + 3 * 11)  # looked after at steps 1 and 11


@each_attack
def test_model_of_one_logit_is_refused(attack):
    images, labels = make_batch(3, shape=SHAPE)[0], torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="one logit an image; there is no other class"):
        attack(lambda x: x.flatten(1).sum(1, keepdim=True), images, labels)


# --- invariances


@each_attack
def test_result_does_not_depend_on_order_or_on_how_it_is_cut(attack, undecided, monkeypatch):
    model, images, labels = undecided
    expected = distortion(*undecided, attack(*undecided))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = torch.empty_like(images)
    shuffled[order] = attack(model, images[order], labels[order])
    monkeypatch.setattr(forward, "CHUNK", 5)
    for made in (shuffled, attack(*undecided)):
        found = distortion(*undecided, made)
        # Rounding may end a walk a step earlier; most must not notice.
        near = (found["l2"] - expected["l2"]).abs() <= 0.02 * expected["l2"]
        assert int(near.sum()) >= 11
        assert torch.equal(found["l2"].isfinite(), expected["l2"].isfinite())


AROUND = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
}


@each_attack
@pytest.mark.parametrize("around", AROUND)
def test_nothing_around_the_attack_changes_it(attack, around, undecided):
    model, images, labels = undecided
    expected = attack(model, images, labels)
    with AROUND[around]():
        made = attack(model, images.clone(), labels.clone())
        assert torch.is_grad_enabled() is (around == "autocast")
    assert torch.equal(made, expected)
    assert torch.is_grad_enabled()


# --- nothing is left behind


class FailingLayer(nn.Module):
    """Passes its input on, and fails when it is called for the third time."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("broken on purpose")
        return x


@each_attack
@pytest.mark.parametrize("broken", [False, True])
def test_model_is_left_as_it_was(undecided, attack, broken):
    small_cnn, images, labels = undecided
    last = FailingLayer() if broken else nn.Identity()
    model = nn.Sequential(small_cnn, nn.Dropout(0.5), last).train()
    small_cnn[2].eval()  # a batch norm frozen by its owner
    small_cnn[0].weight.requires_grad_(False)
    small_cnn[3].weight.grad = torch.full_like(small_cnn[3].weight, 2.0)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.random.get_rng_state()
    if broken:
        with pytest.raises(RuntimeError, match="on purpose"):
            attack(model, images, labels)
    else:
        attack(model, images, labels)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert_same_state(model, state)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(grads) == ["0.3.weight"]
    assert bool((grads["0.3.weight"] == 2).all())


# --- distortion


def test_distortion_counts_what_changed(linear_model):
    images = make_batch(4)[0] * 0.4 + 0.3
    labels = answers(linear_model, images)
    labels[3] = 1 - labels[3]  # wrong as it is
    weight = linear_model[1].weight.detach()
    towards = (weight[1 - labels] - weight[labels]).sign().reshape(images.shape)
    attacked = images.clone()
    attacked[0] += 0.3 * towards[0]  # fooled
    attacked[1, 0, 0, :2] += 0.01  # not fooled by so little
    attacked[1, 1, 5, 5] += 1e-8  # rounding is no change
    attacked[3] = 0.5
    found = distortion(linear_model, images, labels, attacked)
    assert list(found) == ["l0", "l2", "linf"]
    expected = {"l0": 3072.0, "l2": 0.3 * math.sqrt(3072), "linf": 0.3}
    for norm, sizes in found.items():
        assert float(sizes[0]) == pytest.approx(expected[norm], rel=1e-4)
        assert sizes[1:].tolist() == [math.inf, math.inf, 0.0]


def test_distortion_counts_values_not_pixels():
    image, model = torch.full((1, 3, 2, 2), 0.25), planted(GAINS, LOSSES)
    made = jsma(model, image, torch.zeros(1, dtype=torch.int64), gamma=1.0)
    found = distortion(model, image, torch.zeros(1, dtype=torch.int64), made)
    assert {norm: float(sizes) for norm, sizes in found.items()} == pytest.approx(
        {"l0": 2, "l2": 0.75 * math.sqrt(2), "linf": 0.75}
    )


def test_distortion_of_other_images_is_refused(undecided):
    model, images, labels = undecided
    with pytest.raises(ValueError, match=r"attacked is \(3, 3, 16, 16\), the images are \(12, 3"):
        distortion(model, images, labels, images[:3])
    with pytest.raises(ValueError, match="attacked is NoneType"):
        distortion(model, images, labels, None)


# --- bad input


@pytest.mark.parametrize(
    ("attack", "options", "message"),
    [
        (deepfool, {"overshoot": -0.1}, r"overshoot is -0.1; it must be a number from 0 to 1"),
        (deepfool, {"overshoot": math.nan}, "overshoot is nan; it must be a number"),
        (deepfool, {"steps": 0}, "steps is 0; it must be an integer from 1 on"),
        (deepfool, {"classes": 1}, "classes is 1; it must be an integer from 2 on"),
        (carlini_wagner, {"kappa": -1}, "kappa is -1; it must be a number from 0 on, usual is 0"),
        (carlini_wagner, {"kappa": math.inf}, "kappa is inf; it must be a number"),
        (carlini_wagner, {"rate": 0}, "rate is 0; it must be a number .*, usual is 0.01"),
        (carlini_wagner, {"constant": 0}, "constant is 0; it must be a number .* 0.001"),
        (carlini_wagner, {"constant": "1"}, "constant is '1'; it must be a number"),
        (carlini_wagner, {"steps": 1.5}, "steps is 1.5; it must be an integer"),
        (carlini_wagner, {"searches": 0}, "searches is 0; it must be an integer from 1 on"),
        (jsma, {"theta": 0}, "theta is 0, and no value would change"),
        (jsma, {"theta": 255}, "theta is 255; it must be a number from -1 to 1"),
        (jsma, {"gamma": 14.5}, "gamma is 14.5; it must be a number from 0 to 1"),
        (jsma, {"gamma": True}, "gamma is True; it must be a number"),
    ],
)
def test_bad_options_are_refused(undecided, attack, options, message):
    with pytest.raises(ValueError, match=message):
        attack(*undecided, **options)


@pytest.mark.parametrize("name", ["c&w", "jsma"])
def test_bad_targets_are_refused(undecided, name):
    model, images, labels = undecided
    for aim, told in (
        (labels, "12 of 12 targets are the image's own class"),
        (labels + 10, r"label 1\d has no logit"),
        (labels[1:], r"targets have shape \(11,\) for 12 images"),
    ):
        with pytest.raises(ValueError, match=told):
            ATTACKS[name](model, images, labels, targeted=aim)
