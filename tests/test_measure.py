"""Measuring: turns, ratios, targets, equal images, multiply-adds and memory."""

import math
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from torch import nn

from advlab import models
from advlab.bench import ceiling, measure
from advlab.bench.measure import Row, Way, once
from advlab.upkeep.processes import share_of_memory

# --- timing and rows


def test_ways_are_called_in_turn_after_one_warm_up_each(monkeypatch):
    calls, now = [], [0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call(name, seconds):
        calls.append(name)
        now[0] += seconds

    ways = {"A": Way(lambda: call("A", 1)), "B": Way(lambda: call("B", 50), times=2)}
    found = measure.side_by_side(ways, rounds=3)
    assert "".join(calls) == "AB" + "ABBABBABB"
    assert found == {"A": [1, 1, 1], "B": [50, 50, 50]}  # of one call


def test_rows_compare_with_one_way_and_with_the_ceiling():
    ways = {
        "plain": Way(print, 20.0, note="one by one"),
        "fast": Way(print, 100.0, ceiling=200.0, target=6.0),
    }
    seconds = {"plain": [2, 4, 8], "fast": [1, 2, 4]}
    plain, fast = measure.to_rows("part", "what", ways, seconds, against="plain")
    # 20 images in 2, 4 or 8 s; 100 in 1, 2 or 4 s: quartiles lie half-way between.
    assert (plain.value, plain.low, plain.high, plain.note) == (5, 3.75, 7.5, "one by one")
    assert (plain.against, math.isnan(plain.ratio), math.isnan(plain.of_ceiling)) == ("", 1, 1)
    assert fast == Row(
        "part", "what", "fast", 50, 37.5, 75, "images/s", "plain", 10, 0.25, target=6.0
    )
    ways = {"plain": Way(print), "fast": Way(print, 2.0)}  # of seconds, fewer are better
    _, fast = measure.to_rows("p", "w", ways, {"plain": [8], "fast": [4]}, "s", against="plain")
    assert (fast.value, fast.ratio) == (2, 4)


@pytest.mark.parametrize(
    ("kind", "figure", "text"),
    [
        ("ratio", 6.0, "6 x"),
        ("ratio", 5.4, "6 x: missed by 10 %"),
        # FGSM is to be as fast as the fastest library; without any there is nothing to miss.
        ("ratio", math.nan, "6 x"),
        ("at least", 3.0, "at least 6: missed by 50 %"),
        ("at most", 6.0, "at most 6"),
        ("at most", 6.012, "at most 6: missed by 0.2 %"),
        ("at most", 18.0, "at most 6: missed by 200 %"),
    ],
)
def test_missed_target_says_so(kind, figure, text):
    value, ratio = (1.0, figure) if kind == "ratio" else (figure, math.nan)
    row = once("p", "w", "a", value, "u", ratio=ratio, target=6, target_of=kind)
    assert measure.cells(row)[-1] == text
    assert measure.cells(next(pd.DataFrame([row]).itertuples())) == measure.cells(row)


# --- equal images


def test_other_images_are_refused_but_for_rounding_and_one_turned_relu():
    ours = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    theirs = ours + 5e-7
    theirs[0, 0, 0, :30] += 0.1  # 1 % of one image
    measure.check_equal("torchattacks", theirs, ours)
    theirs[1, 0, 0, :30] += 0.1
    with pytest.raises(RuntimeError, match=r"torchattacks differs from advlab in 0\.49% of all pi"):
        measure.check_equal("torchattacks", theirs, ours)


# --- multiply-adds and the ceiling

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
# Each of 16 steps: four gates of 64 units, on the layer's input (128, then 64) and its state.
STEP = 4 * 64 * (128 + 64) + 2 * (4 * 64 * (64 + 64))


@pytest.mark.parametrize(
    ("arch", "more"),
    [
        ("cnn", 2048 * 64),
        ("cnn-lstm", 16 * STEP + 64 * 10),
        ("cnn-lstm-positions", 16 * STEP + 64 * 10),
    ],
)
def test_multiply_adds_of_the_papers_models(arch, more):
    assert ceiling.multiply_adds(nn.Sequential(*models.convolutions())) == STACK
    assert ceiling.multiply_adds(models.build(arch)) == STACK + more


def test_multiply_adds_follow_the_shape_of_the_images():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.LayerNorm((13, 13)))
    assert ceiling.multiply_adds(model, (1, 28, 28)) == 4 * 13**2 * 9
    assert ceiling.multiply_adds(model[:2], (1, 32, 30)) == 4 * 15 * 14 * 9


class Unknown(nn.Module):
    """A layer whose multiplications no operator that is counted does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10, 10))

    def forward(self, x):
        return (x[:, None] * self.weight).sum(2)


def test_layer_whose_multiply_adds_are_not_known_is_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), Unknown())
    with pytest.raises(ValueError, match=r"Sequential\.2 \(Unknown\) .*register_flop_formula"):
        ceiling.multiply_adds(model)


@pytest.mark.parametrize("precision", ceiling.PRECISIONS)
def test_ceiling_adds_up_the_passes_that_are_needed(monkeypatch, precision):
    asked = []

    def side_by_side(ways, rounds):
        results = [way.call() for way in ways.values()]
        asked.append([gradient is not None for gradient in results[-1]])
        return dict(zip(ways, ([9.0, 8.0], [16.0, 17.0], [40.0, 32.0]), strict=True))

    monkeypatch.setattr(ceiling, "side_by_side", side_by_side)
    monkeypatch.setattr(ceiling, "convolutions", lambda: models.convolutions()[:9])
    # Of three layers each takes at best 1, 2 and 4 seconds per image: forward, to its input, and
    # all that training asks for.
    found = ceiling.convolution_seconds.__wrapped__(8, precision)
    assert found == {"predict": 3, "craft": 3 * (1 + 2), "train": 3 * (1 + 4)}
    # In training the first one passes nothing to the images.
    assert asked == [[False, True, False], [True, True, False], [True, True, False]]
    monkeypatch.setattr(ceiling, "convolution_seconds", lambda *_: found)
    rate = ceiling.highest_rate(nn.Sequential(*models.convolutions()[:9]), (3, 32, 32), "predict")
    assert rate == pytest.approx(1 / 3)
    assert (
        ceiling.highest_rate(models.build("cnn"), (3, 32, 32), "predict") < rate / 1.5
    )  # more work


# --- memory


def hold_memory(path: str) -> None:
    """Note the memory of this process, and let a child hold 300 MB; other processes can call it."""
    Path(path).write_text(str(share_of_memory(psutil.Process()) / 1e6))
    code = "import time; block = b'x' * 300_000_000; time.sleep(0.5)"  # ten looks
    subprocess.run([sys.executable, "-c", code], check=True)


def test_peak_megabytes_are_those_of_another_process_and_its_children(tmp_path):
    path = tmp_path / "alone"
    peak = measure.peak_megabytes(hold_memory, str(path))
    alone = float(path.read_text())
    assert alone + 250 < peak < alone + 600
