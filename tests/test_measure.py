"""Measuring: counts, ratios and memory, on timings that are made up."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_measurement, make_small_cnn
from torch import nn

from advlab import models
from advlab.tools import measure
from advlab.tools.measure import Ceilings, ConvolutionCeiling, Row
from advlab.upkeep.processes import PeakMemory

# --- timing


def test_ways_are_called_in_turn_after_one_warm_up_each():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "AB"}
    found = measure.side_by_side(ways, rounds=3)
    assert "".join(calls) == "AB" + "ABABAB"
    assert {name: len(times.times) for name, times in found.items()} == {"A": 3, "B": 3}


def test_each_way_has_its_own_seconds(monkeypatch):
    now = [0]

    def passes(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    found = measure.side_by_side({"short": lambda: passes(1), "long": lambda: passes(50)}, rounds=2)
    assert found["short"].times == [1, 1]
    assert found["long"].times == [50, 50]


def test_failing_way_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        measure.side_by_side({"bad": lambda: 1 / 0})


def test_quartiles_are_of_the_rates():
    seconds = make_measurement(1, 2, 4, 5, 10)
    assert measure.quartiles(seconds, 100) == pytest.approx((25, 20, 50))


# --- rows


def test_rows_compare_with_one_way_and_with_the_ceiling():
    seconds = {"plain": make_measurement(2, 4, 8), "fast": make_measurement(1, 2, 4)}
    rows = measure.rate_rows(
        "part",
        "what",
        seconds,
        {"plain": 20.0, "fast": 100.0},
        "images/s",
        against="plain",
        ceilings={"fast": 200.0},
        targets={"fast": 6.0},
        notes={"plain": "one by one"},
    )
    # 20 images in 2, 4 or 8 s; 100 in 1, 2 or 4 s: quartiles lie half-way between.
    assert rows == [
        Row("part", "what", "plain", 5, 3.75, 7.5, "images/s", note="one by one"),
        Row("part", "what", "fast", 50, 37.5, 75, "images/s", "plain", 10, 0.25, target=6.0),
    ]


def test_rows_without_the_way_to_compare_with_have_no_ratio():
    (row,) = measure.rate_rows(
        "p", "w", {"only": make_measurement(1.0)}, {"only": 3.0}, "s", against="not there"
    )
    assert (row.value, row.low, row.high) == (3, 3, 3)
    assert (row.ratio, row.against, row.of_ceiling, row.target) == (None, "", None, None)


def test_table_has_a_column_for_each_field():
    table = measure.to_table([Row("p", "w", "a", 2, 1, 3, "s"), Row("p", "w", "b", 4, 4, 4, "s")])
    assert list(table.columns) == list(Row.__dataclass_fields__)
    assert table["value"].tolist() == [2, 4]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (1.234, "1.23"), (99.96, "100"), (123.4, "123"), (12345.6, "12,346")],
)
def test_numbers_have_three_digits_or_more(value, text):
    assert measure.number(value) == text


def texts_of(row):
    """Return the cells of `row`, which must be the same from the row and from a table."""
    found = measure.cells(row)
    # Beside a row with numbers, what is missing is NaN and not None.
    other = Row("p", "w", "other", 1, 1, 1, "s", "x", 1.0, 1.0, target=1.0)
    table = measure.to_table([row, other])
    assert measure.cells(next(table.itertuples())) == found
    return found


def test_cells_of_a_compared_row():
    row = Row("p", "task", "way", 1234.8, 0.5, 2000, "images/s", "plain", 12.34, 0.256, target=6)
    assert texts_of(row) == [
        "task",
        "way",
        "1,235 images/s",
        "± 81 %",
        "12.3 x",
        "26 %",
        "6 x",
    ]


def test_cells_of_a_row_that_was_measured_once():
    row = Row("p", "task", "way", 3.0, 3.0, 3.0, "s")
    assert texts_of(row) == ["task", "way", "3 s", "", "", "", ""]


@pytest.mark.parametrize(
    ("kind", "figure", "text"),
    [
        ("ratio", 6.0, "6 x"),
        ("ratio", 5.99, "6 x: missed"),
        ("at least", 6.0, "at least 6"),
        ("at least", 5.99, "at least 6: missed"),
        ("at most", 6.0, "at most 6"),
        ("at most", 6.01, "at most 6: missed"),
    ],
)
def test_missed_target_says_so(kind, figure, text):
    value, ratio = (1.0, figure) if kind == "ratio" else (figure, None)
    row = Row("p", "w", "a", value, value, value, "u", ratio=ratio, target=6, target_of=kind)
    assert texts_of(row)[6] == text


def test_target_of_a_ratio_that_was_not_measured_is_not_missed():
    # FGSM is to be as fast as the fastest library; without any there is nothing to miss.
    row = Row("p", "w", "advlab", 1, 1, 1, "images/s", target=1.0)
    assert "missed" not in texts_of(row)[6]


# --- equal images


def test_other_images_are_refused_with_the_name_of_their_maker():
    ours = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    theirs = ours.clone()
    theirs[0, 0, :4] += 0.1  # 128 of 12,288 pixels
    with pytest.raises(RuntimeError, match=r"foolbox differs from advlab in 1.04% of all pixels"):
        measure.check_equal("foolbox", theirs, ours)


def test_rounding_and_one_turned_relu_are_let_pass():
    ours = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    theirs = ours + 5e-7
    theirs[0, 0, 0, :30] += 0.1  # 1 % of one image
    measure.check_equal("torchattacks", theirs, ours)
    theirs[1, 0, 0, :30] += 0.1
    with pytest.raises(RuntimeError, match="torchattacks"):
        measure.check_equal("torchattacks", theirs, ours)


# --- multiply-adds

# A 3x3 convolution does outputs x height x width x inputs x 9 of them; its own output is counted,
# so that a stride of 2 quarters the work: 32 x 32 pixels, then 16, 16, 8, 8 and 4.
STACK = (
    32 * 32**2 * 3 * 9
    + 32 * 16**2 * 32 * 9
    + 64 * 16**2 * 32 * 9
    + 64 * 8**2 * 64 * 9
    + 64 * 8**2 * 64 * 9
    + 128 * 4**2 * 64 * 9
)


def test_multiply_adds_of_the_cnn():
    assert measure.multiply_adds(nn.Sequential(*models.convolutions())) == STACK == 13_860_864
    assert measure.multiply_adds(models.build("cnn")) == STACK + 2048 * 64 == 13_991_936


@pytest.mark.parametrize("arch", ["cnn-lstm", "cnn-lstm-positions"])
def test_multiply_adds_of_the_hybrid(arch):
    # Each of 16 steps: four gates of 64 units, on the layer's input (128, then 64) and its state.
    step = 4 * 64 * (128 + 64) + 2 * (4 * 64 * (64 + 64))
    assert measure.multiply_adds(models.build(arch)) == STACK + 16 * step + 64 * 10


def test_counting_leaves_the_model_as_it_was():
    model = make_small_cnn().train()
    model[2].eval()  # a batch norm frozen by its owner
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure.multiply_adds(model)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[k]) for k, tensor in model.state_dict().items())


# --- the ceiling


def test_ceiling_adds_the_passes_that_are_needed():
    ceiling = ConvolutionCeiling(forward=1.0, to_input=2.0, to_weight=5.0, first_to_input=0.5)
    assert ceiling.images_per_second("train") == pytest.approx(1 / 8)
    assert ceiling.images_per_second("craft") == pytest.approx(1 / 3.5)
    assert ceiling.images_per_second("predict") == pytest.approx(1)


@pytest.mark.parametrize("precision", measure.PRECISIONS)
def test_ceiling_adds_up_layers_and_has_the_first_ones_input_apart(monkeypatch, precision):
    asked = []

    def side_by_side(ways, rounds):
        for way in ways.values():
            way()
        asked.append(rounds)
        return dict(zip(ways, map(make_measurement, (512.0, 1024.0, 2048.0)), strict=True))

    monkeypatch.setattr(measure, "side_by_side", side_by_side)
    monkeypatch.setattr(measure, "CONVOLUTIONS", ((3, 4, 1), (4, 8, 2), (8, 4, 1)))
    found = measure.convolution_ceiling(8, precision, rounds=4)
    # Each way goes through 512 images, so that a layer takes 1, 2 and 4 seconds per image.
    assert (found.forward, found.to_weight) == pytest.approx((3 * 1, 3 * 4))
    assert (found.to_input, found.first_to_input) == pytest.approx((2 * 2, 2))
    assert asked == [4] * 3


def test_ceilings_are_measured_once_and_shared_by_work(monkeypatch):
    asked = Counter()

    def convolution_ceiling(batch, precision, rounds):
        asked[batch, precision, rounds] += 1
        return ConvolutionCeiling(0.5, 0.25, 0.25, 0.25)

    monkeypatch.setattr(measure, "convolution_ceiling", convolution_ceiling)
    ceilings = Ceilings(rounds=7)
    stack, cnn = nn.Sequential(*models.convolutions()), models.build("cnn")
    assert ceilings.images_per_second(stack, "train", 64, "float32") == pytest.approx(1)
    assert ceilings.images_per_second(cnn, "train", 64, "float32") == pytest.approx(
        13_860_864 / 13_991_936
    )
    assert ceilings.images_per_second(stack, "predict", 256, "bfloat16") == pytest.approx(2)
    assert asked == {(64, "float32", 7): 1, (256, "bfloat16", 7): 1}


# --- memory


def wait_until(condition):
    """Wait for `condition`; fail after half a minute."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def watched():
    """A watch that has had its first look, and what it saw."""
    with PeakMemory(interval=0.01) as memory:
        wait_until(lambda: memory.megabytes > 0)
        yield memory, memory.megabytes


def test_peak_memory_sees_an_allocation_and_keeps_it(watched):
    memory, before = watched
    block = np.ones(300_000_000, dtype=np.uint8)
    wait_until(lambda: memory.megabytes > before + 290)
    assert memory.megabytes < before + 600
    del block
    time.sleep(0.1)
    assert memory.megabytes > before + 290


def test_peak_memory_counts_children(watched):
    memory, before = watched
    code = "block = b'x' * 300_000_000; input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        wait_until(lambda: memory.megabytes > before + 290)
    finally:
        process.communicate(b"\n")


def hold_memory(path: str) -> None:
    """Note the process and hold 300 MB; at module level, so that another process can call it."""
    Path(path).write_text(str(os.getpid()))
    block = np.ones(300_000_000, dtype=np.uint8)
    time.sleep(0.5)  # ten looks
    del block


def test_peak_megabytes_are_those_of_another_process(tmp_path):
    path = tmp_path / "process"
    peak = measure.peak_megabytes(hold_memory, str(path))
    assert int(path.read_text()) != os.getpid()
    assert 350 < peak < 2_000  # an interpreter with torch, and the block
