"""The benchmark as a picture."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure


def ratios(table: pd.DataFrame) -> Figure:
    """Draw how many times faster advlab is, for every row of the benchmark that has a target.

    Args:
        table: As from `bench.run.run`: among others machine, part, what, way, against, ratio and
            target.
    """
    rows = table.dropna(subset=["ratio", "target"]).iloc[::-1]
    names = [
        f"{row.part}: {row.what}\n{row.way} against {row.against}" for row in rows.itertuples()
    ]
    figure, axis = plt.subplots(figsize=(9, 0.8 + 0.42 * len(rows)))
    blue, orange = sns.color_palette("colorblind")[:2]
    axis.barh(names, rows["ratio"] - 1, left=1, color=blue, height=0.6, label="measured")
    axis.plot(rows["target"], names, "D", color=orange, markersize=6, label="target")
    for place, (ratio, target) in enumerate(zip(rows["ratio"], rows["target"], strict=True)):
        axis.text(max(ratio, target, 1), place, f"  {ratio:.3g} x", va="center", fontsize=8)
    axis.axvline(1, color="0.2", linewidth=1)
    axis.set(xscale="log", xlabel="times as fast (log scale; 1 = equally fast)")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", labelsize=7)
    axis.set_xlim(0.8 * min(1, rows["ratio"].min()), 2.2 * rows["ratio"].max())
    axis.legend(loc="lower right", fontsize="small")
    machines = " and ".join(rows["machine"].iloc[::-1].unique())
    figure.supxlabel(f"advlab bench, medians, on {machines}", size=6, color="0.4")
    return figure
