"""Predictions: what the reader commits to, and what is drawn and told of it."""

import matplotlib.pyplot as plt
import pytest

from advlab.predictions import Prediction


@pytest.fixture
def prediction():
    return Prediction("accuracy at eps = 0.02", 0, 100)


@pytest.fixture
def axis():
    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


def commit(prediction: Prediction, low: float, high: float) -> None:
    """Do what a reader does."""
    prediction.range.value = (low, high)
    prediction.button.click()


def test_nothing_is_drawn_or_judged_before_it_is_committed(prediction, axis):
    prediction.range.value = (10, 20)  # moved, but not committed
    prediction.draw(axis)
    assert not axis.has_data()
    assert prediction.answer is None
    assert prediction.against(4.43) == "accuracy at eps = 0.02: 4.4 %"


def test_what_is_committed_is_judged_and_cannot_be_changed(prediction):
    commit(prediction, 10, 20)
    assert prediction.answer == (10, 20)
    assert prediction.range.disabled
    assert prediction.button.disabled
    told = "accuracy at eps = 0.02: {} %. You said 10.0 to 20.0: {}."
    for value, shown, verdict in ((4.43, "4.4", "outside"), (20, "20.0", "inside")):
        assert prediction.against(value) == told.format(shown, verdict)


@pytest.mark.parametrize("x", [None, 0.02])
def test_range_is_drawn_beside_what_is_measured(prediction, axis, x):
    commit(prediction, 30, 60)
    prediction.draw(axis, x)
    axis.figure.canvas.draw()
    [drawn] = axis.lines or axis.patches
    low, high = drawn.get_window_extent().transformed(axis.transData.inverted()).intervaly
    assert low == pytest.approx(30, abs=3)
    assert high == pytest.approx(60, abs=3)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["your prediction"]


def test_without_a_browser_it_is_a_question(prediction):
    told = prediction._repr_mimebundle_()["text/plain"]
    assert told == "accuracy at eps = 0.02: from ... to ... %, because ..."


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match="low is 5 and high 5"):
        Prediction("what", 5, 5)
