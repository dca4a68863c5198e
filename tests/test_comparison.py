"""The paired test and its correction, by hand and against what is known."""

import math

import pytest
import torch

from advlab.comparison import holm, mcnemar


def held(*parts: tuple[int, bool]) -> torch.Tensor:
    return torch.tensor([value for count, value in parts for _ in range(count)])


def test_only_the_images_on_which_two_networks_differ_count():
    first = held((50, True), (8, True), (2, False), (40, False))
    second = held((50, True), (8, False), (2, True), (40, False))
    exact = 2 * sum(math.comb(10, i) for i in range(3)) / 2**10
    assert mcnemar(first, second) == (8, 2, pytest.approx(exact))
    assert mcnemar(second, first) == (2, 8, pytest.approx(exact))


def test_networks_that_never_differ_are_the_same():
    same = held((5, True), (5, False))
    assert mcnemar(same, same) == (0, 0, 1.0)
    first, second = held((3, True), (3, False)), held((3, False), (3, True))
    assert mcnemar(first, second) == (3, 3, 1.0)  # not above 1


def test_thousands_of_images_are_no_trouble():
    first, second = held((5_200, True), (4_800, False)), held((5_200, False), (4_800, True))
    *_, p = mcnemar(first, second)
    assert p == pytest.approx(math.erfc(399 / math.sqrt(2 * 10_000)), rel=1e-2)


def test_images_must_be_the_same():
    with pytest.raises(ValueError, match="3 images and 2; a paired test needs the same"):
        mcnemar(held((3, True)), held((2, True)))


def test_p_values_are_corrected_for_their_number():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_by_chance_the_smallest_of_many_is_below_the_limit_as_often_as_promised():
    torch.manual_seed(0)
    families = torch.rand(4_000, 20).tolist()
    assert sum(min(holm(values)) < 0.05 for values in families) / 4_000 < 0.06
    assert sum(min(values) < 0.05 for values in families) / 4_000 > 0.5
