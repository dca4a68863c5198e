"""Attacks that adapt: a gradient straight through, and answers that are drawn."""

import numpy as np
import pytest
import torch
from conftest import make_batch, make_small_cnn
from torch import nn

from advlab.adaptive import StraightThrough, has_gradient, share_held
from advlab.attacks import input_gradient, pgd
from advlab.forward import holds, predict


def four_bits(x):
    return (15 * x).round() / 15


def in_numpy(x):
    return torch.from_numpy(np.round(15 * x.numpy()) / 15)


@pytest.mark.parametrize("step", [four_bits, in_numpy])
def test_forward_is_the_step_and_backward_the_identity(step):
    network, (images, labels) = make_small_cnn(), make_batch(20)
    defended = nn.Sequential(StraightThrough(step), network)
    assert torch.equal(predict(defended, images), predict(network, four_bits(images)))
    # The gradient is that of the network alone, at the image that it is shown.
    expected = input_gradient(network, four_bits(images), labels)
    assert torch.allclose(input_gradient(defended, images, labels), expected, atol=1e-6)
    assert expected.abs().sum() > 0


def test_rounding_hides_a_weak_network_until_the_gradient_passes(learned):
    model, test = learned
    images, labels = test.first(60).batch(slice(None))
    defended = nn.Sequential(StraightThrough(four_bits), model)
    left = {}
    for name, attacked in (("zeros", lambda x: model(four_bits(x))), ("through", defended)):
        made = pgd(attacked, images, labels, 0.03, alpha=0.004, steps=10)
        left[name] = float(holds(defended, made, labels).float().mean())
    assert left["zeros"] > 0.8
    assert left["through"] < 0.3


@pytest.mark.parametrize(
    ("step", "error", "told"),
    [
        (lambda x: x[:, :, ::2], ValueError, r"the step made \(5, 3, 16, 32\) of \(5, 3, 32, 32\)"),
        (lambda x: x.numpy(), TypeError, "the step returned a ndarray; it must return a tensor"),
    ],
)
def test_a_step_that_returns_no_images_of_that_shape_is_refused(step, error, told):
    with pytest.raises(error, match=told):
        StraightThrough(step)(make_batch(5)[0])


def test_the_dtype_of_the_images_stays():
    images = make_batch(3)[0].half()
    through = StraightThrough(lambda x: four_bits(x.double()))(images)
    assert through.dtype == torch.float16


def without(x):
    with torch.no_grad():
        return x * 2


NETWORK = make_small_cnn()
WAYS = {
    "network": (NETWORK, True),
    "function": (lambda x: NETWORK(x), True),
    "zeros": (lambda x: NETWORK(four_bits(x)), True),
    "straight through": (nn.Sequential(StraightThrough(in_numpy), NETWORK), True),
    "detached": (lambda x: NETWORK(x.detach()), False),
    "no_grad": (lambda x: NETWORK(without(x)), False),
    "numpy": (lambda x: NETWORK(in_numpy(x)), False),
    "weights alone": (lambda x: NETWORK(x.detach() + next(NETWORK.parameters()).sum()), False),
    "one-hot": (lambda x: nn.functional.one_hot(NETWORK(x).argmax(1), 10), False),
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_way_back_to_the_pixels_is_found_where_there_is_one(name, grad):
    model, expected = WAYS[name]
    with torch.set_grad_enabled(grad):
        assert has_gradient(model, make_batch(4)[0]) is expected


def test_a_model_that_fails_anyway_is_not_taken_for_one_without_a_gradient():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        has_gradient(nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), make_batch(4)[0])


class Every(nn.Module):
    """Names class 0, but class 1 at every third call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        wrong = float(self.calls % 3 == 0)
        return torch.tensor([1 - wrong, wrong]).expand(len(x), 2)


def test_an_answer_that_is_drawn_counts_as_often_as_it_is_given():
    images = make_batch(4)[0]
    labels = torch.tensor([0, 1, 0, 1])
    assert share_held(Every(), images, labels, 6).tolist() == pytest.approx([2 / 3, 1 / 3] * 2)
    assert share_held(Every(), images, labels, 1).tolist() == [1, 0, 1, 0]
    for asks in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"asks is {asks}; it must be an integer from 1"):
            share_held(Every(), images, labels, asks)


def test_of_a_model_that_answers_the_same_nothing_changes():
    images, labels = make_batch(30)
    held = holds(NETWORK, images, labels)
    assert torch.equal(share_held(NETWORK, images, labels, 3), held.float())
