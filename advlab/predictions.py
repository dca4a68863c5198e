"""What a reader predicts before a cell runs: a range, drawn beside what is measured."""

from typing import Any

import ipywidgets as w
from matplotlib.axes import Axes

LABEL = "your prediction"
LOOK: dict[str, Any] = {"color": "#F0E442", "alpha": 0.7}  # yellow; no model has it


class Prediction:
    """A question with a range for an answer. Display it as the last line of a cell.

    Where no browser is attached (papermill, nbval, nbconvert) it is the question alone, nothing is
    committed, and `draw` draws nothing.

    Args:
        question: What is to be predicted: a number.
        low, high: Between these it will lie for certain.
        unit: Of the number.

    Attributes:
        answer: The range that the reader has committed to; None before.

    Raises:
        ValueError: if `low` is not below `high`.
    """

    def __init__(self, question: str, low: float, high: float, unit: str = "%") -> None:
        if not low < high:
            raise ValueError(f"low is {low} and high {high}; low must be below high")
        self.question, self.unit = question, unit
        self.answer: tuple[float, float] | None = None
        wide = w.Layout(width="460px")
        self.range = w.FloatRangeSlider(
            value=(low, high), min=low, max=high, step=(high - low) / 200, layout=wide,
            description=unit, readout_format=".3g",
        )  # fmt: skip
        self.why = w.Text(description="why", placeholder="one line, for yourself", layout=wide)
        self.button = w.Button(description="Commit")
        self.button.on_click(lambda _: self._commit())

    def _commit(self) -> None:
        low, high = self.range.value
        self.answer = (low, high)
        for control in (self.range, self.why, self.button):
            control.disabled = True
        self.button.description = "Committed"

    def panel(self) -> w.Widget:
        """Return the question and its controls as one widget."""
        return w.VBox([w.Label(self.question), self.range, self.why, self.button])

    def draw(self, axis: Axes, x: float | None = None) -> None:
        """Draw what was committed, if anything was.

        Args:
            axis: Its vertical axis shows the number that was asked for.
            x: Where on the horizontal axis; None for all of it.
        """
        if self.answer is None:
            return
        if x is None:
            axis.axhspan(*self.answer, label=LABEL, linewidth=0, **LOOK)
        else:
            axis.plot([x, x], self.answer, label=LABEL, linewidth=9, solid_capstyle="butt", **LOOK)
        axis.legend(fontsize="small")

    def against(self, measured: float, form: str = ".1f") -> str:
        """Return in a sentence what was measured, and whether it lies in the range committed to."""
        told = f"{self.question}: {measured:{form}} {self.unit}".strip()
        if self.answer is None:
            return told
        low, high = self.answer
        verdict = "inside" if low <= measured <= high else "outside"
        return f"{told}. You said {low:{form}} to {high:{form}}: {verdict}."

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        bundle = self.panel()._repr_mimebundle_(**options) or {}
        told = f"{self.question}: from ... to ... {self.unit}".strip() + ", because ..."
        return {**bundle, "text/plain": told}
