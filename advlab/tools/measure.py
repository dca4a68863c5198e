"""Measuring: ways of doing the same thing, side by side, and what the machine could do at best."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Measurement, TaskSpec

from advlab.attacks import eval_mode
from advlab.models import CONVOLUTIONS, convolutions
from advlab.training import has_fast_bf16
from advlab.upkeep.processes import PeakMemory

PRECISIONS = ("float32", "bfloat16") if has_fast_bf16(torch.device("cpu")) else ("float32",)


@dataclass(frozen=True)
class Row:
    """One line of the benchmark.

    Args:
        part: Section of the benchmark.
        what: The task.
        way: How it was done.
        value: Median.
        low, high: Quartiles over the rounds; the value itself where it was measured once.
        unit: Of `value`.
        against: The way that `ratio` compares with; "" for none.
        ratio: How many times better than `against`.
        of_ceiling: Fraction of the convolution rate that the machine was measured to reach.
        target: What is aimed at.
        target_of: What the target is for: "ratio" or "at least" or "at most" (the value).
        note: What a reader must know beside the number.
    """

    part: str
    what: str
    way: str
    value: float
    low: float
    high: float
    unit: str
    against: str = ""
    ratio: float | None = None
    of_ceiling: float | None = None
    target: float | None = None
    target_of: str = "ratio"
    note: str = ""


def to_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Return rows as a tidy table."""
    return pd.DataFrame([asdict(row) for row in rows])


def cells(row: Any) -> list[str]:
    """Return the texts of one row: task, way, median, spread, ratio, of ceiling, target."""
    return [
        row.what,
        row.way,
        f"{number(row.value)} {row.unit}",
        "" if row.low == row.high else f"± {50 * (row.high - row.low) / row.value:.0f} %",
        "" if pd.isna(row.ratio) else f"{number(row.ratio)} x",
        "" if pd.isna(row.of_ceiling) else f"{100 * row.of_ceiling:.0f} %",
        target_text(row),
    ]


def target_text(row: Any) -> str:
    """Return the target of a row, and "missed" where it is; "" without a target."""
    if pd.isna(row.target):
        return ""
    if row.target_of == "ratio":
        met, text = pd.isna(row.ratio) or row.ratio >= row.target, f"{row.target:g} x"
    else:
        at_least = row.target_of == "at least"
        met = row.value >= row.target if at_least else row.value <= row.target
        text = f"{row.target_of} {row.target:,g}"
    return text if met else f"{text}: missed"


def number(value: float) -> str:
    """Return `value` with three digits or more: 0.0123, 1.23, 123, 12,345."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def side_by_side(ways: dict[str, Callable[[], Any]], rounds: int = 5) -> dict[str, Measurement]:
    """Time each of `ways` once per round, in turn, after one warm-up each.

    In turn (A B A B), so that a slow minute of the machine hits all of them.

    Returns:
        Seconds, as torch's `Measurement` (median, iqr, times), by name.
    """
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    # Not torch's Timer: it warms up before every call, so the ways would not take turns.
    task = TaskSpec("way()", "", num_threads=torch.get_num_threads())
    return {name: Measurement(1, times, task) for name, times in seconds.items()}


def quartiles(seconds: Measurement, amount: float) -> tuple[float, float, float]:
    """Return median, lower and upper quartile of the rate at which `amount` was done."""
    rates = torch.tensor([amount / time for time in seconds.times], dtype=torch.float64)
    low, median, high = rates.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return float(median), float(low), float(high)


def rate_rows(
    part: str,
    what: str,
    seconds: dict[str, Measurement],
    amounts: dict[str, float],
    unit: str,
    *,
    against: str = "",
    ceilings: dict[str, float] | None = None,
    targets: dict[str, float] | None = None,
    notes: dict[str, str] | None = None,
) -> list[Row]:
    """Turn timings into rows.

    Args:
        part, what, unit: As in `Row`.
        seconds: From `side_by_side`.
        amounts: What each way did in one call (images, say).
        against: The way that the others are compared with; its own ratio is left out.
        ceilings: The rate that the machine could reach at best, for the ways that have one.
        targets, notes: By way.
    """
    rates = {name: quartiles(time, amounts[name]) for name, time in seconds.items()}
    rows = []
    for name, (median, low, high) in rates.items():
        compared = against in rates and name != against
        ceiling = (ceilings or {}).get(name)
        rows.append(
            Row(
                part,
                what,
                name,
                median,
                low,
                high,
                unit,
                against if compared else "",
                median / rates[against][0] if compared else None,
                median / ceiling if ceiling else None,
                (targets or {}).get(name),
                note=(notes or {}).get(name, ""),
            )
        )
    return rows


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


def multiply_adds(model: nn.Module) -> int:
    """Count the multiply-adds of one image's forward pass: convolutions, linear layers, LSTMs."""
    total = 0

    def count(layer: nn.Module, _: Any, output: Any) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += output.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            total += output.numel() * layer.in_features
        elif isinstance(layer, nn.LSTM):
            weights = sum(p.numel() for name, p in layer.named_parameters() if "weight" in name)
            total += output[0].shape[1] * weights  # once per step

    hooks = [layer.register_forward_hook(count) for layer in model.modules()]
    try:
        with torch.no_grad(), eval_mode(model):
            model(torch.zeros(1, 3, 32, 32))
    finally:
        for hook in hooks:
            hook.remove()
    return total


@dataclass(frozen=True)
class ConvolutionCeiling:
    """Multiply-adds per second of the model's six convolutions alone, at their own sizes.

    Args:
        forward, to_input, to_weight: Seconds per image of the three passes, all layers together;
            the first layer passes no gradient to its input in training.
        first_to_input: Seconds per image of that one, which crafting needs.
    """

    forward: float
    to_input: float
    to_weight: float
    first_to_input: float

    def images_per_second(self, passes: str) -> float:
        """Return how many images a second the convolutions alone allow.

        Args:
            passes: "train" (forward, gradients of weights and inner inputs), "craft" (forward,
                gradients of all inputs) or "predict" (forward).
        """
        inner = self.forward + self.to_input
        seconds = {
            "train": inner + self.to_weight,
            "craft": inner + self.first_to_input,
            "predict": self.forward,
        }
        return 1 / seconds[passes]


def convolution_ceiling(batch: int, precision: str, rounds: int = 5) -> ConvolutionCeiling:
    """Measure the six 3x3 convolutions of both models, and nothing else (channels_last).

    Args:
        batch: Images at a time.
        precision: "float32" or "bfloat16".
        rounds: As in `side_by_side`.
    """
    size, totals, first = 32, [0.0, 0.0, 0.0], 0.0
    repeats = max(1, 512 // batch)
    for inputs, outputs, stride in CONVOLUTIONS:
        x = _random(batch, inputs, size, size, precision=precision)
        weight = _random(outputs, inputs, 3, 3, precision=precision)
        options = {"stride": [stride, stride], "padding": [1, 1], "dilation": [1, 1]}
        y = F.conv2d(x, weight, stride=stride, padding=1)

        def backward(
            *wanted: bool, y: Tensor = y, x: Tensor = x, w: Tensor = weight, o: dict = options
        ) -> None:
            torch.ops.aten.convolution_backward(
                y, x, w, None, **o, transposed=False, output_padding=[0, 0], groups=1,
                output_mask=[*wanted, False],
            )  # fmt: skip

        times = side_by_side(
            {
                "forward": lambda x=x, w=weight, s=stride: [
                    F.conv2d(x, w, stride=s, padding=1) for _ in range(repeats)
                ],
                "to input": lambda b=backward: [b(True, False) for _ in range(repeats)],
                "to weight": lambda b=backward: [b(False, True) for _ in range(repeats)],
            },
            rounds,
        )
        seconds = [time.median / repeats / batch for time in times.values()]
        if inputs == 3:
            first, seconds[1] = seconds[1], 0.0
        totals = [total + one for total, one in zip(totals, seconds, strict=True)]
        size //= stride
    return ConvolutionCeiling(*totals, first_to_input=first)


class Ceilings:
    """The rates that convolutions alone allow on this machine, each measured once."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self._found: dict[tuple[int, str], Any] = {}

    def images_per_second(self, model: nn.Module, passes: str, batch: int, precision: str) -> float:
        """Return the rate of `model` if all its multiply-adds ran like the convolutions.

        Args:
            model: Its other layers count by their multiply-adds.
            passes: As in `measure.ConvolutionCeiling.images_per_second`.
            batch: Images at a time.
            precision: "float32" or "bfloat16".
        """
        key = batch, precision
        if key not in self._found:
            self._found[key] = convolution_ceiling(batch, precision, self.rounds)
        share = multiply_adds(nn.Sequential(*convolutions())) / multiply_adds(model)
        return self._found[key].images_per_second(passes) * share


def _random(*shape: int, precision: str) -> Tensor:
    tensor = torch.randn(shape).to(getattr(torch, precision))
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


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
