"""Measuring: ways of doing the same thing, timed side by side, as the rows of one table."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
from torch import Tensor

from advlab.upkeep.processes import PeakMemory

PAPERS = "paper's way"
# Seconds before each measurement: torch's threads wait for more work for some milliseconds after
# the last, on the cores that the next way needs.
PAUSE = 0.05


@dataclass(frozen=True)
class Row:
    """One line of the benchmark; a figure that there is not is NaN."""

    part: str
    what: str  # the task
    way: str  # how it was done
    value: float  # the median
    low: float  # quartiles over the rounds; the value itself where it was measured once
    high: float
    unit: str  # of the value
    against: str = ""  # the way that the ratio compares with
    ratio: float = math.nan  # how many times better than that
    of_ceiling: float = math.nan  # fraction of the rate that the machine's convolutions allow
    target: float = math.nan  # what is aimed at
    target_of: str = "ratio"  # what the target is for; "at least" and "at most": for the value
    note: str = ""  # what a reader must know beside the number


@dataclass(frozen=True)
class Way:
    """One way of doing a task."""

    call: Callable[[], Any]
    amount: float = 1.0  # how much one call does (images, say)
    ceiling: float = math.nan  # the highest rate that the machine could reach
    times: int = 1  # calls of one round: a short one is measured well only with others
    target: float = math.nan  # this and the following as in `Row`
    target_of: str = "ratio"
    note: str = ""


def once(part: str, what: str, way: str, value: float, unit: str, **more: Any) -> Row:
    """Return the row of a figure that was measured once; `more` as in `Row`."""
    return Row(part, what, way, value, value, value, unit, **more)


def side_by_side(ways: Mapping[str, Way], rounds: int) -> dict[str, list[float]]:
    """Time each of `ways` once per round, in turn, after one warm-up each.

    In turn (A B A B), so that a slow minute of the machine hits all of them. Not by torch's Timer:
    it warms up before every call, so the ways would not take turns.

    Returns:
        Seconds of a call in each round, by name.
    """
    for way in ways.values():
        way.call()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            for _ in range(way.times):
                way.call()
            seconds[name].append((time.perf_counter() - start) / way.times)
    return seconds


def to_rows(
    part: str,
    what: str,
    ways: Mapping[str, Way],
    seconds: Mapping[str, Sequence[float]],
    unit: str = "images/s",
    against: str = "",
) -> list[Row]:
    """Turn timings into rows.

    Args:
        part, what: As in `Row`.
        ways: By name.
        seconds: From `side_by_side`.
        unit: "s": a row holds the seconds for an amount of 1; any other: the amount per second.
        against: The way that the others are compared with; its own ratio is left out.
    """
    power = -1 if unit == "s" else 1
    figures = {
        name: np.quantile((way.amount / np.array(seconds[name])) ** power, (0.25, 0.5, 0.75))
        for name, way in ways.items()
    }
    rows = []
    for name, way in ways.items():
        low, value, high = figures[name].tolist()
        base = against if name != against and against in ways else ""
        ratio = float(value / figures[base][1]) ** power if base else math.nan
        extra: dict[str, Any] = {"target": way.target, "target_of": way.target_of, "note": way.note}
        rows.append(
            Row(part, what, name, value, low, high, unit, base, ratio, value / way.ceiling, **extra)
        )
    return rows


def compare(
    part: str, what: str, ways: Mapping[str, Way], rounds: int, unit: str = "images/s", **more: Any
) -> list[Row]:
    """Time `ways` side by side and return their rows; `more` as in `to_rows`."""
    return to_rows(part, what, ways, side_by_side(ways, rounds), unit, **more)


def cells(row: Any) -> list[str]:
    """Return the texts of one row: task, way, median, spread, ratio, of ceiling, target."""
    target = f"{row.target:g} x" if row.target_of == "ratio" else f"{row.target_of} {row.target:,g}"
    if by := missed_by(row):
        target += f": missed by {number(by)} %"
    return [
        row.what,
        row.way,
        f"{number(row.value)} {row.unit}",
        "" if row.low == row.high else f"± {50 * (row.high - row.low) / row.value:.0f} %",
        "" if math.isnan(row.ratio) else f"{number(row.ratio)} x",
        "" if math.isnan(row.of_ceiling) else f"{100 * row.of_ceiling:.0f} %",
        "" if math.isnan(row.target) else target,
    ]


def missed_by(row: Any) -> float:
    """Return by how many percent of its target a row misses it; 0 if it does not.

    A ratio that was not measured (no other library is installed) misses nothing.
    """
    figure = row.ratio if row.target_of == "ratio" else row.value
    beyond = 100 * (figure / row.target - 1) * (1 if row.target_of == "at most" else -1)
    return max(0.0, beyond) if math.isfinite(beyond) else 0.0


def number(value: float) -> str:
    """Return `value` with three digits or more: 0.0123, 1.23, 123, 12,345."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def check_equal(name: str, theirs: Tensor, ours: Tensor) -> None:
    """Raise RuntimeError if two batches of attacked images differ by more than rounding.

    Rounding decides the sign of a gradient that is all but 0, here and there, and now and then it
    turns a ReLU, which changes an image in about one pixel of a hundred: one image in 50 may.
    """
    share = ((theirs - ours).abs() > 1e-6).float().flatten(1).mean(1)
    several = int((share > 1e-3).sum()) > max(1, len(ours) // 50)
    if several or float(share.max()) > 0.03:
        raise RuntimeError(
            f"{name} differs from advlab in {float(share.mean()):.2%} of all pixels; not timed"
        )


def peak_megabytes(task: Callable[..., Any], *arguments: Any) -> float:
    """Run ``task(*arguments)`` in a fresh process; return the most memory it held at a time, MB.

    The whole process counts: interpreter, libraries, data. Both must be picklable.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak, task, *arguments).result()


def _peak(task: Callable[..., Any], *arguments: Any) -> float:
    with PeakMemory(interval=0.05) as memory:
        task(*arguments)
    return memory.megabytes
