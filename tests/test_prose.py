"""What the lessons say of CIFAR-10 in words and numbers, held against the committed tables.

A number with "%" or "points" in the text is printed by a cell before it, or its sentence is here.
"""

import math
import re
from collections.abc import Callable

import nbformat
import pandas as pd
import pytest

from advlab import files, paper

ROOT = files.repository()
HELD = ("01", "02", "03", "04", "05", "06", "07", "08")
NUMBER = re.compile(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?) ?(?:%|points?\b|in \d+\b)")


def table(name: str) -> pd.DataFrame:
    """Return a committed table."""
    return pd.read_csv(ROOT / "figures" / f"{name}.csv")


def percent(name: str, **where: object) -> float:
    """Return the accuracy, in percent, of the one row of a table that has these values."""
    rows = table(name)
    for column, value in where.items():
        rows = rows[rows[column] == value]
    (accuracy,) = rows["accuracy"]
    return 100 * accuracy


def loss_curve() -> pd.Series:
    return table("l01_live_loss")["loss"]


def epochs() -> pd.DataFrame:
    return table("l01_learning_curves").set_index("epoch")


def classes() -> list[str]:
    return table("l01_classes_accuracy").sort_values("accuracy")["class"].tolist()


def mistakes() -> list[tuple[str, str]]:
    """Return (true class, answer) of the clean mistakes, the most frequent ones first."""
    counts = table("l01_confusion").set_index("true").stack()
    wrong = counts[[true != answer for true, answer in counts.index]]
    return wrong.sort_values(ascending=False).index.tolist()


def attacked(true: str) -> str:
    """Return the most frequent wrong answer to a class under FGSM."""
    rows = table("l02_confusion").query("images == 'attacked'").set_index("true")
    return rows.drop(columns=["images", true]).loc[true].astype(float).idxmax()


def white_box(eps: float) -> float:
    return percent("l02_noise", kind="FGSM, white box", test_eps=eps)


def noise(eps: float) -> float:
    return percent("l02_noise", kind="random signs", test_eps=eps)


def papers_way(eps: float) -> float:
    return percent("l02_statistics", kind="per-image statistics (the paper's)", test_eps=eps)


def expansion() -> pd.DataFrame:
    found = table("l02_first_order")
    return found.set_index((255 * found["eps"]).round(2))


def flip_order(direction: str) -> float:
    rows = table("l03_flip_order").set_index("direction")["accuracy"]
    return rows[[name for name in rows.index if name.startswith(direction)]].iloc[0]


def seeds_range() -> pd.Series:
    """Return highest minus lowest accuracy over seeds, in points, by training and test eps."""
    rows = table("l04_seeds").groupby(["architecture", "train_eps", "test_eps"])["accuracy"]
    return 100 * (rows.max() - rows.min()).groupby(["train_eps", "test_eps"]).max()


def other_seeds(arch: str, eps: float) -> pd.Series:
    """Return what undefended networks of other seeds keep, in percent."""
    rows = table("seeds").query("source.str.contains('seed')")
    chosen = (rows["architecture"] == arch) & (rows["test_eps"] == eps)
    return 100 * rows.loc[chosen, "accuracy"]


def cell(arch: str, train_eps: float, test_eps: float) -> float:
    """Return an entry of Table 1 or 2."""
    name = {"cnn": "table1_cnn", "cnn-lstm": "table2_cnn_lstm"}[arch]
    return percent(name, train_eps=train_eps, test_eps=test_eps)


def share_of_gain(eps: float, arch: str = "cnn") -> float:
    """Return which share of the gain of eps = 0.005 an undefended network of another seed has."""
    attacked = cell(arch, 0.0, eps)
    return (other_seeds(arch, eps).mean() - attacked) / (cell(arch, 0.005, eps) - attacked)


def sweep_change(train_eps: float) -> float:
    first, last = (percent("l04_sweep", train_eps=train_eps, test_eps=e) for e in (0.0, 0.1))
    return last - first


def paired(trained: str) -> pd.DataFrame:
    return table("l05_paired").query("`trained with` == @trained")


def gain(arch: str, eps: float) -> float:
    rows = table("fig3_gains").set_index(["architecture", "test_eps"])["gain"]
    return rows[arch, eps]


def positions_ahead() -> list[float]:
    """Return by how much the baseline that reads positions is ahead, by test eps."""
    rows = table("l05_positions").query("train_eps == 0")
    wide = 100 * rows.pivot(index="test_eps", columns="architecture", values="accuracy")
    return (wide["cnn-lstm-positions"] - wide["cnn-lstm"]).tolist()


def way(arch: str, train_eps: float, name: str) -> float:
    where = {"architecture": arch, "train_eps": train_eps, "way": name}
    return percent("l06_transfer_and_white_box", **where)


def trade_off(model: str, steps: int) -> float:
    rows = table("l07_trade_off")
    near = (rows["test_eps"] - steps / 255).abs() < 1e-6
    return 100 * rows.loc[near & (rows["model"] == f"cnn {model}"), "accuracy"].iloc[0]


WHITE = "white box"
PAPERS = "transfer, per-image statistics (the paper's)"
RUNNING = "transfer, running statistics"
DEFENDED = (0.005, 0.01, 0.015, 0.2)
ARCHS = ("cnn", "cnn-lstm")
ATTACKED = (0.02, 0.04, 0.06, 0.08, 0.1)


def always() -> bool:
    """Hold what is a definition, or a number that a question makes up."""
    return True


SENTENCES: list[tuple[str, str, Callable[[], bool]]] = [
    # 01
    ("01", "The loss starts a little above $\\ln 64$",
     lambda: 0 < loss_curve()[0] - math.log(64) < 0.3),
    ("01", "falls below $\\ln 10$ within the first few steps",
     lambda: (loss_curve()[:8] < math.log(10)).any()),
    ("01", "Training loss (dashed) falls to the end",
     lambda: epochs()["train_loss"].is_monotonic_decreasing),
    ("01", "test loss (solid) is nearly flat after the first half",
     lambda: epochs().loc[5:, "test_loss"].max() - epochs().loc[5:, "test_loss"].min() < 0.05),
    ("01", "most of the gain was made in the first half of them",
     lambda: epochs()["test_accuracy"].pipe(lambda a: (a[5] - a[1]) / (a[10] - a[1])) > 0.7),
    ("01", "exact counts, n, and a 95 % interval", always),
    ("01", "A **95 % confidence interval**", always),
    ("01", "catches the true accuracy 95 times in 100", always),
    ("01", "A classifier is right on 80 % of the test images", always),
    ("01", "you cannot tell apart two models that differ by two points", always),
    ("01", "The paper reports 80.374 % for its CNN", always),
    ("01", "with a 95 % interval for each class", always),
    ("01", "Cats called dogs are the brightest square off the diagonal",
     lambda: mistakes()[0] == ("cat", "dog")),
    ("01", "birds and planes have sky behind them", lambda: ("bird", "airplane") in mistakes()[:4]),
    ("01", "Cat is last, then bird and deer", lambda: classes()[:3] == ["cat", "bird", "deer"]),
    ("01", "Vehicles and frogs lead",
     lambda: set(classes()[-4:]) == {"truck", "automobile", "ship", "frog"}),
    ("01", "Correct predictions pile up near 100 %",
     lambda: table("l01_confidence")["% above 90"][0] > 70),
    ("01", "about one mistake in five is made with more than 90 % confidence",
     lambda: 18 < table("l01_confidence")["% above 90"][1] < 22),
    # 02
    ("02", "Clean accuracy is about 80 %", lambda: 78 < white_box(0) < 82),
    ("02", "At eps = 0.005 more than half of the correct answers are gone",
     lambda: percent("l02_accuracy", test_eps=0.005) < white_box(0) / 2),
    ("02", "at 0.02 almost all", lambda: white_box(0.02) < 5),
    ("02", "would be right in 10 % of the images", always),
    ("02", "Accuracy is lowest between 0.04 and 0.08 and rises a little after that",
     lambda: min(paper_eps(), key=white_box) == 0.06 and white_box(0.1) > white_box(0.06) + 0.5),
    ("02", "adds the 95 % interval (the band)", always),
    ("02", "there the measured loss is already well above the promise",
     lambda: expansion().loc[1.0, "measured"] > 1.3 * expansion().loc[1.0, "first order"]),
    ("02", "Noise of 5 steps hardly costs anything", lambda: white_box(0) - noise(0.02) < 2),
    ("02", "leaves many times what FGSM leaves", lambda: noise(0.1) > 5 * white_box(0.1)),
    ("02", "Cats become dogs and dogs become cats",
     lambda: (attacked("cat"), attacked("dog")) == ("dog", "cat")),
    ("02", "trucks become automobiles", lambda: attacked("truck") == "automobile"),
    ("02", "The difference is tens of points",
     lambda: papers_way(0.02) - white_box(0.02) > 20),
    ("02", "leaves about four images in ten at eps = 0.02", lambda: 36 < papers_way(0.02) < 44),
    ("02", "to get down to the 10 % of guessing", lambda: 8 < papers_way(0.1) < 12),
    ("02", "Attack only the 5 % of the pixels", always),
    # 03
    ("03", "The baseline is right on nine of ten of its own training images",
     lambda: 88 < 100 * table("l03_hardness")["accuracy"][0] < 92),
    ("03", "at 0.2 the baseline does about as well as somebody who guesses",
     lambda: table("l03_hardness")["accuracy"].iloc[-1] < 0.12),
    ("03", "Both directions that were crafted before the flip are far weaker",
     lambda: min(flip_order("d(x)"), flip_order("f(d(x))")) > flip_order("d(f(x))") + 20),
    # 04
    ("04", "It is a large loss for the small training eps",
     lambda: all(sweep_change(eps) < -25 for eps in (0.005, 0.007, 0.01, 0.015))),
    ("04", "a gain at 0.1 and 0.2, next to nothing at 0.3, and a loss again at 0.5",
     lambda: min(sweep_change(0.1), sweep_change(0.2)) > 4 and abs(sweep_change(0.3)) < 1.5
     and sweep_change(0.5) < -4),
    ("04", "Clean accuracies hardly depend on the seed, and neither do the rows trained with eps",
     lambda: max(seeds_range().xs(0.0, level=1).max(), seeds_range()[0.2].max()) < 2),
    ("04", "gives networks that lie up to twelve points apart",
     lambda: round(seeds_range().max()) == 12),
    ("04", "keeps about 10 %, and the CNN trained with eps = 0.005 about a third",
     lambda: 8 < cell("cnn", 0.0, 0.1) < 12 and 30 < cell("cnn", 0.005, 0.1) < 37),
    ("04", "It lies far above the attacked baseline",
     lambda: all(other_seeds(a, e).min() > cell(a, 0.0, e) + 5 for a in ARCHS for e in ATTACKED)),
    ("04", "half or more of what looks like a defence",
     lambda: all(share_of_gain(e, a) > 0.5 for a in ARCHS for e in ATTACKED)),
    ("04", "more than nine tenths at test eps 0.02 and about three fifths at 0.1 for the CNN",
     lambda: share_of_gain(0.02) > 0.9 and 0.55 < share_of_gain(0.1) < 0.65),
    ("04", "The rows trained with 0.015 and 0.2 lie clearly above the band",
     lambda: all(cell(a, t, e) > other_seeds(a, e).max() + 3
                 for a in ARCHS for t in (0.015, 0.2) for e in ATTACKED)),
    ("04", "compute the paper's \"absolute increase of 64.142 %\"", always),
    # 05
    ("05", "chance in the choice of test images is an unlikely reason for each of the six",
     lambda: paired("baseline")["p, corrected"].max() < 0.01),
    ("05", "On clean images and at eps 0.02 the CNN is ahead, from 0.04 on the CNN-LSTM",
     lambda: [p > 0 for p in paired("baseline")["points"]] == 2 * [False] + 4 * [True]),
    ("05", "after the correction chance may explain all of that",
     lambda: paired("eps = 0.2")["p, corrected"].min() > 0.05),
    ("05", "From eps = 0.04 on the CNN gains a few points more than the CNN-LSTM",
     lambda: all(2 < gain("cnn", e) - gain("cnn-lstm", e) < 6 for e in ATTACKED[1:])),
    ("05", "It keeps a few points more, most of them at the smallest attack",
     lambda: max(positions_ahead()) == positions_ahead()[1] > 5 and min(positions_ahead()[1:]) > 1),
    ("05", "The abstract's \"64.142 %\" for the CNN at eps = 0.1 is a slip: it is the gain at 0.08",
     lambda: round(74.940 - 10.798, 3) == 64.142),
    ("05", "75.488 - 9.375 = 66.113 points", lambda: round(75.488 - 9.375, 3) == 66.113),
    # 06
    ("06", "achieved a validation accuracy of 75.488% for", always),
    ("06", "In the white box no defended model is clearly better than its undefended baseline",
     lambda: all(way(a, t, WHITE) < way(a, 0.0, WHITE) + 1 for a in ARCHS for t in DEFENDED)),
    ("06", "and the one that looked best is the worst",
     lambda: all(min((0.0, *DEFENDED), key=lambda t: way(a, t, WHITE)) == 0.2
                 and max((0.0, *DEFENDED), key=lambda t: way(a, t, PAPERS)) == 0.2
                 for a in ARCHS)),
    ("06", "Other statistics alone hardly change it",
     lambda: abs(way("cnn", 0.2, PAPERS) - way("cnn", 0.2, RUNNING)) < 4),
    ("06", "Not one image of 1,000 survives, in any of the ten",
     lambda: table("audit").query(
         "recipe == 'paper' and attack == 'autoattack' and train_eps in [0, .005, .01, .015, .2] "
         "and architecture in ['cnn', 'cnn-lstm'] and test_eps > 0.03")["correct"].max() == 0),
    # 07
    ("07", "keeps 78.91 % of clean images and 34.95 % under AutoAttack (RobustBench", always),
    ("07", "The paper's gap under attack (75.5 to 74.1 %)",
     lambda: (paper.TABLES["cnn"][0.2][-1], paper.TABLES["cnn-lstm"][0.2][-1]) == (75.5, 74.1)),
    ("07", "the one trained at 8/255 is last, by more than ten points",
     lambda: trade_off("rs-fgsm-eps2", 0) - trade_off("rs-fgsm", 0) > 10),
    ("07", "From 6/255 on the order is reversed",
     lambda: all(trade_off("rs-fgsm", k) > trade_off("rs-fgsm-eps4", k)
                 > trade_off("rs-fgsm-eps2", k)
                 for k in (6, 8, 12, 16))),
]  # fmt: skip


def paper_eps() -> list[float]:
    return sorted(set(table("l02_noise")["test_eps"]))


def cells_of(lesson: str) -> list[nbformat.NotebookNode]:
    (path,) = (ROOT / "notebooks").glob(f"{lesson}_*.ipynb")
    return nbformat.read(path, as_version=4).cells


def words(text: str) -> str:
    return " ".join(text.replace("\n>", "\n").split())


@pytest.mark.parametrize(
    ("lesson", "sentence", "holds"),
    SENTENCES,
    ids=[f"{own}-{said[:40]}" for own, said, _ in SENTENCES],
)
def test_sentence_is_in_its_lesson_and_holds(lesson, sentence, holds):
    prose = words("\n".join(c.source for c in cells_of(lesson) if c.cell_type == "markdown"))
    assert sentence in prose
    assert holds()


@pytest.mark.parametrize("lesson", HELD)
def test_every_number_is_printed_before_it_or_held_here(lesson):
    printed, loose = "", []
    for cell in cells_of(lesson):
        if cell.cell_type == "code":
            printed += "".join(str(o.get("text", "")) for o in cell.outputs)
            continue
        prose = words(cell.source)
        for own, sentence, _ in SENTENCES:
            prose = prose.replace(sentence, "") if own == lesson else prose
        loose += [m[0] for m in NUMBER.finditer(prose) if m[1] not in printed]
    assert loose == []
