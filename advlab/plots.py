"""Figures from tables and images. Every function takes data and returns a figure; none computes.

Colours are safe for the colour-blind: seaborn's "colorblind" for kinds, matplotlib's "viridis" and
"plasma" for amounts, with a marker per line so that a figure reads in grey as well.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from advlab import paper

MARKERS = "osD^vPX*h<>"
DODGE = 0.0009  # of test eps, between neighbouring bars over seeds


# One attack has one look in all lessons, by its name in the catalogue.
ATTACKS = {
    "clean": ("black", "o"),  # no attack at all
    "fgsm-per-image": ("#0173B2", "o"),  # the paper's
    "fgsm": ("#DE8F05", "s"),
    "pgd-20": ("#029E73", "D"),
    "pgd-10": ("#029E73", "D"),
    "autoattack": ("#D55E00", "^"),
    "noise": ("#949494", "v"),
}

# One model has one look in all lessons: its training gives colour and marker, its architecture the
# line. Those that were trained with an eps go from purple to yellow as it grows.
TRAININGS = {
    "baseline": ("black", "o"),
    "fgsm": ("#D55E00", "d"),
    "rs-fgsm-eps2": ("#56B4E9", "<"),
    "rs-fgsm-eps4": ("#0072B2", ">"),
    "rs-fgsm": ("#CC79A7", "p"),
    "robust": ("#009E73", "8"),
    "robust-soft": ("#999933", "H"),
    "noise": ("#882255", "*"),
    "other seeds": ("0.5", "x"),  # undefended, and shown the images of the first seed's baseline
}
LINES = {"cnn": "-", "cnn-lstm": "--", "cnn-lstm-positions": "-."}

# What an attack does about a defence: label, marker and colour.
ATTACKERS = {
    "clean": ("no attack", "o", "0.6"),
    "blind": ("attack that is blind or stops", "s", "#CC3311"),
    "goes on": ("attack that goes on", "D", "#DDAA33"),
    "adapts": ("attack that adapts", "X", "#004488"),
}
SIGMAS = ("#88CCEE", "#882255", "#DDCC77")  # sizes of noise, from small to large


def attack_look(name: str) -> dict[str, Any]:
    """Return color and marker of an attack, by its name ("pgd-20"); nothing for an unknown one."""
    return dict(zip(("color", "marker"), ATTACKS.get(name, ()), strict=False))


def model_look(name: str) -> dict[str, Any]:
    """Return color, marker and linestyle of a model, by its name ("cnn eps=0.2").

    The markers of networks that read positions are hollow. Nothing is returned for a name that none
    of our models has.
    """
    arch, _, training = name.partition(" ")
    how, _, size = training.partition("=")
    colour: Any
    if training in TRAININGS:
        colour, marker = TRAININGS[training]
    elif how == "eps" and arch in LINES:
        eps, known = float(size), paper.SWEEP_TRAIN_EPS
        # By rank: most of the paper's are small, and would all be purple.
        place = np.interp(np.log(eps), np.log(known[1:]), np.linspace(0.0, 0.9, len(known) - 1))
        colour = plt.get_cmap("plasma")(float(place))
        marker = MARKERS[known.index(eps)] if eps in known else "."
    else:
        return {}
    look = {"color": colour, "marker": marker, "linestyle": LINES.get(arch, "-")}
    return look | ({"fillstyle": "none"} if arch == "cnn-lstm-positions" else {})


def use_style() -> None:
    """Set the look of all figures: white grid, colour-blind palette, modest resolution.

    What the user's own matplotlibrc says is taken back, such as text by LaTeX. In a notebook,
    figures are shown below their cell, whatever MPLBACKEND says.
    """
    plt.rcdefaults()
    shell = get_ipython()
    if shell is not None and hasattr(shell, "kernel"):
        shell.enable_matplotlib("inline")
    sns.set_theme(style="whitegrid", palette="colorblind", context="notebook", font_scale=0.85)
    plt.rcParams.update(
        {"figure.dpi": 80, "figure.constrained_layout.use": True, "image.cmap": "viridis"}
    )


def as_picture(image: Tensor) -> NDArray[Any]:
    """Return an image (3, H, W) or (1, H, W), float in [0, 1] or uint8, as (H, W, 3) to draw.

    Raises:
        ValueError: for another number of channels.
    """
    if image.ndim != 3 or len(image) not in (1, 3):
        raise ValueError(f"an image is {tuple(image.shape)}; only 1 or 3 channels can be drawn")
    return image.detach().cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()


def show_image(axes: Axes, image: Tensor, title: str = "") -> None:
    """Draw one image (see `as_picture`) without axes."""
    axes.imshow(as_picture(image), interpolation="nearest")
    axes.set_title(title, fontsize="small")
    axes.set_axis_off()


def image_grid(
    images: Tensor,
    titles: Sequence[str] | None = None,
    *,
    columns: int = 10,
    row_labels: Sequence[str] | None = None,
    size: float = 0.85,
) -> Figure:
    """Draw images (N, C, H, W) in rows of `columns`.

    Args:
        images: Float in [0, 1] or uint8.
        titles: One per image; None for none.
        columns: Images per row.
        row_labels: One per row, at its left.
        size: Inches per image.
    """
    rows = -(-len(images) // columns)
    extra = 0.32 if titles else 0.0
    margin = 1.1 if row_labels else 0.0
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * size + margin, rows * (size + extra) + 0.2), squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for i, image in enumerate(images):
        show_image(axes.flat[i], image, titles[i] if titles else "")
    for row, label in enumerate(row_labels or []):
        axis = axes[row, 0]
        axis.text(-0.15, 0.5, label, transform=axis.transAxes, ha="right", va="center")
    return figure


def fgsm_equation(
    image: Tensor, direction: Tensor, attacked: Tensor, eps: float, captions: Sequence[str]
) -> Figure:
    """Draw the paper's Figure 1: image + eps x sign = attacked image.

    Args:
        image, attacked: (C, H, W) float in [0, 1].
        direction: (C, H, W) signs, drawn with -1 black, +1 white per channel.
        eps: Size of the step.
        captions: Above the three pictures.
    """
    figure, axes = plt.subplots(1, 5, figsize=(9.6, 3.4), width_ratios=[4, 1, 4, 0.4, 4])
    pictures = (image, (direction.float() + 1) / 2, attacked)
    for axis, picture, caption in zip(axes[::2], pictures, captions, strict=True):
        show_image(axis, picture)
        axis.set_title(caption, fontsize="medium")
    for axis, sign in zip(axes[1::2], (f"+ {eps:g} ×", "="), strict=True):
        axis.text(0.5, 0.5, sign, ha="center", va="center", fontsize=15)
        axis.set_axis_off()
    return figure


def learning_curves(histories: dict[str, pd.DataFrame]) -> Figure:
    """Draw loss and accuracy per epoch: tables as from `training.fit`, by the names of the models.

    A model has the colour of its look (see `model_look`), another name one of the palette.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    colours = sns.color_palette("colorblind", len(histories))
    for (name, history), other in zip(histories.items(), colours, strict=True):
        colour = model_look(name).get("color", other)
        for axis, kind, scale in zip(axes, ("loss", "accuracy"), (1, 100), strict=True):
            for split, style in (("train", "--o"), ("test", "-s")):
                if f"{split}_{kind}" in history:
                    shown = {"color": colour, "markersize": 4, "label": f"{name}, {split}"}
                    axis.plot(history["epoch"], scale * history[f"{split}_{kind}"], style, **shown)
    for axis, unit in zip(axes, ("cross entropy", "accuracy (%)"), strict=True):
        axis.set(xlabel="epoch", ylabel=unit)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].legend(fontsize="small")
    return figure


def _heat_map(axis: Axes, table: pd.DataFrame, label: str, title: str, **options: Any) -> None:
    """Draw a table in colours, those of percentages unless told otherwise, with its numbers."""
    percentages = {"annot": True, "cmap": "viridis", "vmin": 0, "vmax": 100}
    sns.heatmap(table, cbar_kws={"label": label}, ax=axis, **percentages | options)
    axis.set_title(title)
    axis.tick_params(axis="y", rotation=0)


def confusion_matrix(counts: pd.DataFrame, title: str = "") -> Figure:
    """Draw counts (true class down, predicted class across) as percent of each true class.

    The numbers are left out where they would be too small to read: above 20 classes.
    """
    percent = 100 * counts.div(counts.sum(axis=1), axis=0)
    figure, axis = plt.subplots(figsize=(6.6, 5.2))
    numbers = {"annot": len(counts) <= 20, "fmt": ".0f", "annot_kws": {"size": 8}}
    _heat_map(axis, percent, "% of the true class", title, **numbers)
    return figure


def _reach(at: pd.Series, low: pd.Series, high: pd.Series) -> np.ndarray:
    """Return how far an interval reaches below and above `at`, (2, N), for bars of errors.

    Rounded: where all of a class is right, a formula's upper bound may lie 2e-16 below 1, and a bar
    of a negative length is refused.
    """
    return np.array([at - low, high - at]).round(9)


def class_accuracies(table: pd.DataFrame, overall: float) -> Figure:
    """Draw a bar for each class, with its 95 % interval, and a line at the accuracy of them all.

    Args:
        table: Rows with class, accuracy, low and high (fractions).
        overall: Accuracy over all classes, a fraction.
    """
    figure, axis = plt.subplots(figsize=(max(8, len(table) / 5), 3.6))
    height, low, high = (100 * table[column] for column in ("accuracy", "low", "high"))
    axis.bar(table["class"], height, yerr=_reach(height, low, high), capsize=4, width=0.65)
    axis.axhline(100 * overall, color="black", linestyle="--", linewidth=1, label="all classes")
    axis.set(ylabel="clean accuracy (%)", ylim=(0, 105))
    axis.tick_params(axis="x", rotation=30)
    axis.grid(False, axis="x")
    axis.legend(loc="upper left", fontsize="small")
    return figure


def curves(
    table: pd.DataFrame,
    *,
    value: str = "accuracy",
    hue: str = "train_eps",
    beside: pd.DataFrame | None = None,
    seeds: pd.DataFrame | None = None,
    title: str = "",
    log_x: bool = False,
) -> Figure:
    """Draw accuracy or loss against test eps, a line per value of `hue` (Figures 2, 4 to 7).

    Args:
        table: Tidy rows; accuracies carry their 95 % interval (low, high) as a band.
        value: "accuracy" (drawn in percent) or "loss".
        hue: Column that tells the lines apart; "model" and "train_eps" get the look of the model,
            other lines that of their attack, if no two have the same.
        beside: The paper's rows, drawn dotted in the same colours.
        seeds: Rows of `advlab sweep`: a line that they have gets a bar at each test eps, from the
            lowest to the highest seed, and undefended networks of other seeds, under the same
            attack, get a line of their own.
        title: Of the figure.
        log_x: Spread small eps: a symmetric logarithmic axis.
    """
    scale = 100 if value == "accuracy" else 1
    by_model = hue in ("model", "train_eps")
    groups = list(table.groupby(hue, sort=hue == "train_eps"))
    attacks = [] if by_model else [str(rows["attack"].iloc[0]) for _, rows in groups]
    by_attack = len(set(attacks)) == len(groups)
    palette = sns.color_palette("colorblind", len(groups))
    own, others = _own_and_others(seeds, table)
    figure, axis = plt.subplots(figsize=(7.2, 4.0))
    for i, (key, rows) in enumerate(groups):
        label, name = str(key), str(key)
        if hue == "train_eps":
            label = paper.eps_label(key)
            name = f"{rows['architecture'].iloc[0]} {label.replace(' ', '')}"
        look: dict[str, Any] = {"color": palette[i], "marker": MARKERS[i % len(MARKERS)]}
        look |= model_look(name) if by_model else {}
        look |= attack_look(attacks[i]) if by_attack else {}
        x, colour = rows["test_eps"], look["color"]
        axis.plot(x, scale * rows[value], markersize=5, label=label, **look)
        if value == "accuracy":
            low, high = scale * rows["low"], scale * rows["high"]
            axis.fill_between(x, low, high, color=colour, alpha=0.2)
        alike = own[own[hue].eq(key) & own["architecture"].isin(rows["architecture"])]
        if len(alike):
            _bars_over_seeds(axis, alike, scale, value, colour, (i - len(groups) / 2) * DODGE)
        if beside is not None:
            theirs = beside[beside[hue] == key].dropna(subset=[value])
            axis.plot(theirs["test_eps"], scale * theirs[value], ":", color=colour, linewidth=2)
    for arch, rows in others.groupby("architecture"):
        look = model_look(f"{arch} other seeds")
        shift = len(groups) / 2 * DODGE
        means = _bars_over_seeds(axis, rows, scale, value, look["color"], shift)
        axis.plot(means, markersize=5, label=f"no defence, other seeds ({arch})", **look)
    if len(own):
        axis.vlines([], 0, 0, color="0.3", linewidth=3, alpha=0.5, label="lowest to highest seed")
    if value == "accuracy":
        axis.fill_between([], [], color="0.3", alpha=0.2, label="95 % interval")
    if beside is not None:
        axis.plot([], [], ":", color="0.3", linewidth=2, label="the paper's (dotted)")
    axis.set(xlabel="test eps (pixel range [0, 1])", ylabel="loss (cross entropy)", title=title)
    if value == "accuracy":
        axis.set(ylabel="accuracy (%)", ylim=(0, 100))
    if log_x:
        axis.set_xscale("symlog", linthresh=0.003, linscale=0.6)
        # What comes from a CSV is rounded, and would set a second tick on the first.
        ticks = sorted(set(table["test_eps"].round(5)))
        axis.set_xticks(ticks, [f"{t:.2g}" for t in ticks], rotation=60)
        axis.set_xlim(0, 1.1 * ticks[-1])
        axis.minorticks_off()
    legend_title = "trained with" if hue == "train_eps" else None
    axis.legend(title=legend_title, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize="small")
    return figure


def bars(table: pd.DataFrame, *, x: str, title: str = "") -> Figure:
    """Draw accuracies as bars with their numbers and 95 % intervals.

    Args:
        table: Tidy rows, in the order of the bars: accuracy, low and high (fractions), `x`, and
            "test", the name of an attack ("PGD-20"), whose colour the bar gets.
        x: Column of the groups of bars; what it holds in brackets goes on a line of its own.
        title: Of the figure.
    """
    groups, tests = list(dict.fromkeys(table[x])), list(table.groupby("test", sort=False))
    width = 0.8 / len(tests)
    figure, axis = plt.subplots(figsize=(9.6, 3.8))
    for i, (test, rows) in enumerate(tests):
        at = np.array([groups.index(name) for name in rows[x]]) + width * (i - (len(tests) - 1) / 2)
        height, low, high = (100 * rows[column] for column in ("accuracy", "low", "high"))
        style: dict[str, Any] = {
            "color": attack_look(str(test).lower()).get("color"),
            "label": test,
        }
        style |= {"yerr": _reach(height, low, high), "capsize": 2, "ecolor": "0.5"}
        drawn = axis.bar(at, height, 0.96 * width, **style)
        axis.bar_label(drawn, fmt="{:.0f}", fontsize="x-small", padding=1)
    axis.set_xticks(range(len(groups)), [str(name).replace(" (", "\n(") for name in groups])
    axis.set(ylabel="accuracy (%)", ylim=(0, 100), title=title)
    axis.grid(False, axis="x")
    axis.legend(fontsize="small")
    return figure


def gains(table: pd.DataFrame) -> Figure:
    """Draw gains in accuracy against test eps, a bar for each architecture (Figure 3).

    They have the colour of the eps = 0.2 networks, and an edge like those networks' lines.

    Args:
        table: Tidy rows with architecture, test_eps and gain (points). Drawn where they are there:
            "paper", hatched bars; "lowest" and "highest" of several seeds, a thin line;
            "undefended", a cross: what a network without a defence gains by being another one.
    """
    groups, with_paper = list(table.groupby("architecture")), "paper" in table
    places, width = np.arange(table["test_eps"].nunique()), 0.4 / (1 + with_paper)
    figure, axis = plt.subplots(figsize=(9.0, 3.8))
    for i, (arch, rows) in enumerate(groups):
        look, at = model_look(f"{arch} eps=0.2"), places + 0.4 * (i - 1) + width / 2
        style: dict[str, Any] = {"edgecolor": look["color"], "linestyle": look["linestyle"]}
        pale = (look["color"][:3], 0.3) if i else look["color"]
        axis.bar(at, rows["gain"], width, color=pale, label=arch, linewidth=1.5, **style)
        if "lowest" in table:
            axis.vlines(at, rows["lowest"], rows["highest"], color="black")
        if with_paper:
            style |= {"color": "white", "hatch": "////"}
            axis.bar(at + width, rows["paper"], width, label=f"{arch}, the paper's", **style)
        if "undefended" in table:
            axis.plot(at, rows["undefended"], "X", color="white", markeredgecolor="black")
    if "lowest" in table:
        axis.plot([], [], color="black", label="lowest to highest seed")
    if "undefended" in table:
        label = "no defence, other seeds"
        axis.plot([], [], "X", color="white", markeredgecolor="black", label=label)
    axis.axhline(0, color="0.3", linewidth=1)
    axis.set_xticks(places, [f"{eps:g}" for eps in sorted(set(table["test_eps"]))])
    axis.set(xlabel="test eps (pixel range [0, 1])", ylabel="gain (points)")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize="small")
    return figure


def _own_and_others(
    seeds: pd.DataFrame | None, table: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of `seeds` under the attack of `table`, and those of the control."""
    if seeds is None:
        return table.head(0), table.head(0)
    for column in ("attack", "architecture"):
        seeds = seeds[seeds[column].isin(table[column])]
    return seeds.query("source_seed == seed"), seeds.query("source_seed != seed")


def _bars_over_seeds(
    axis: Axes, rows: pd.DataFrame, scale: float, value: str, colour: Any, shift: float
) -> "pd.Series[float]":
    """Draw a bar from the lowest to the highest seed, `shift` beside each test eps.

    Returns:
        The mean over seeds at each test eps.
    """
    found = scale * rows.groupby("test_eps")[value].agg(["mean", "min", "max"])
    look: dict[str, Any] = {"color": colour, "linewidth": 3, "alpha": 0.5}
    axis.vlines(found.index + shift, found["min"], found["max"], **look)
    return found["mean"]


def over_seeds(table: pd.DataFrame) -> Figure:
    """Draw the table of a sweep: means over seeds, and bands from the lowest to the highest.

    Args:
        table: Tidy rows; a panel for each attack and architecture, a line for each model.
    """
    made_on = table["source"].where(table["source"] == "white box", "from the baseline")
    made_on = made_on.where(table["source_seed"] == table["seed"], "from another seed's")
    shown = table.assign(
        percent=100 * table["accuracy"],
        attack=table["attack"] + ", " + made_on,
        trained=table["recipe"] + table["train_eps"].map(lambda eps: f", eps = {eps:.3g}"),
    )
    with plt.rc_context({"figure.constrained_layout.use": False}):  # seaborn makes room itself
        grid = sns.relplot(
            shown, x="test_eps", y="percent", hue="trained", style="trained", row="attack",
            col="architecture", kind="line", markers=True, dashes=False, errorbar=("pi", 100),
            height=2.6, aspect=1.6, facet_kws={"sharex": "row"},
        )  # fmt: skip
    grid.set_titles("{col_name}: {row_name}", size="small")
    grid.set_axis_labels("test eps (pixel range [0, 1])", "accuracy (%)").set(ylim=(0, 100))
    seeds, n = table["seed"].nunique(), table["n"].max()
    grid.legend.set_title(f"mean and range\nof {seeds} seeds,\n{table['data'].iloc[0]}, n = {n:,}")
    return grid.figure


def difference_map(comparison: pd.DataFrame, title: str = "") -> Figure:
    """Draw ours minus the paper's, in points, for every entry (`paper.compare`).

    Each entry has its number, so there is no scale of colours.
    """
    architectures = list(dict.fromkeys(comparison["architecture"]))
    figure, axes = plt.subplots(
        1, len(architectures), figsize=(4.6 * len(architectures), 3.0), squeeze=False, sharey=True
    )
    limit = max(2.0, float(np.ceil(comparison["difference"].abs().max())))
    for axis, arch in zip(axes[0], architectures, strict=True):
        entries = paper.wide(comparison[comparison["architecture"] == arch], "difference")
        scale = {"cmap": "PuOr_r", "center": 0, "vmin": -limit, "vmax": limit, "cbar": False}
        _heat_map(axis, entries, "", arch, fmt="+.1f", annot_kws={"size": 13}, **scale)
        axis.label_outer()
    figure.suptitle(title)
    return figure


def matrix(percent: pd.DataFrame, *, label: str, title: str = "") -> Figure:
    """Draw a small table of percentages as a heat map with its numbers (a transfer matrix)."""
    figure, axis = plt.subplots(figsize=(1.6 + 1.15 * percent.shape[1], 1.3 + 0.5 * len(percent)))
    _heat_map(axis, percent, label, title, fmt=".1f")
    axis.tick_params(axis="x", rotation=25)
    return figure


def by_defence(table: pd.DataFrame) -> Figure:
    """Draw what is left of each defence, a marker for each kind of attack, with 95 % intervals.

    Args:
        table: Tidy rows, in the order of the defences: defence; kind, of `ATTACKERS`; accuracy, low
            and high (fractions), from `n` images.
    """
    names = list(dict.fromkeys(table["defence"]))
    figure, axis = plt.subplots(figsize=(8.4, 5))
    for k, (kind, (label, marker, colour)) in enumerate(ATTACKERS.items()):
        rows = table[table["kind"] == kind]
        y = [len(names) - names.index(name) + 0.24 - 0.16 * k for name in rows["defence"]]
        at, low, high = (100 * rows[column] for column in ("accuracy", "low", "high"))
        reach = _reach(at, low, high).clip(0)  # over draws a mean may leave its interval
        style: dict[str, Any] = {"fmt": marker, "color": colour, "markersize": 6, "capsize": 2}
        axis.errorbar(at, y, xerr=reach, label=label, **style)
    sizes = table.groupby("defence")["n"].max()
    axis.set_yticks(range(len(names), 0, -1), [f"{name} (n = {sizes[name]})" for name in names])
    axis.set(xlabel="accuracy (%)", xlim=(-3, 103), ylabel="defence")
    handles = axis.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, fontsize=8)
    return figure


def certified(table: pd.DataFrame, title: str = "") -> Figure:
    """Draw certified accuracy against radius, a line for each sigma, with 95 % intervals.

    Args:
        table: Tidy rows: sigma, radius (L2), and certified, low and high (fractions).
        title: Of the figure.
    """
    figure, axis = plt.subplots(figsize=(7.6, 4.0))
    colours = sns.color_palette(SIGMAS, table["sigma"].nunique())
    for (sigma, rows), colour in zip(table.groupby("sigma"), colours, strict=True):
        axis.step(rows["radius"], 100 * rows["certified"], color=colour, label=f"sigma = {sigma:g}")
        low, high = 100 * rows["low"], 100 * rows["high"]
        band: dict[str, Any] = {"step": "pre", "where": rows["certified"] > 0, "linewidth": 0}
        axis.fill_between(rows["radius"], low, high, color=colour, alpha=0.15, **band)
    axis.set(xlabel="radius (L2)", ylabel="certified accuracy (%)", ylim=(0, 100), title=title)
    axis.legend()
    return figure


def both_ends(table: pd.DataFrame, title: str = "") -> Figure:
    """Draw what is proved and what an attack leaves; a bar for each network, the truth between.

    Args:
        table: Rows in the order of the bars: network; proved and left, numbers of images out of
            `n`; low, of the 95 % interval of what is proved, and high, of what is left, in percent.
        title: Of the figure.
    """
    figure, axis = plt.subplots(figsize=(8.4, 3.4))
    names = [str(name).replace(", ", "\n") for name in table["network"]]
    lower, upper = (100 * table[column] / table["n"] for column in ("proved", "left"))
    style: dict[str, Any] = {"height": 0.6, "edgecolor": "0.4"}
    axis.barh(names, lower, color="#117733", label="proved", **style)
    axis.barh(names, upper - lower, left=lower, color="w", hatch="///", label="open", **style)
    axis.barh(names, 100 - upper, left=upper, color="#CC6677", label="broken", **style)
    whisker: dict[str, Any] = {"fmt": "none", "color": "black", "capsize": 4}
    axis.errorbar(lower, names, xerr=_reach(lower, table["low"], lower), **whisker)
    axis.errorbar(upper, names, xerr=_reach(upper, upper, table["high"]), **whisker)
    axis.invert_yaxis()
    axis.set(xlim=(0, 100), xlabel="share of the images (%)", title=title)
    axis.legend(loc="lower left", bbox_to_anchor=(1.0, 0.3))
    return figure
