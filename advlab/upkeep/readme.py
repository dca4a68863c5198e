"""Write the measured parts of the clone's pages, and of the lessons' headers, from the full run.

After a merge, `python -m advlab.upkeep.readme` writes the pages anew; it does not touch a notebook.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from advlab import evaluation, files, paper
from advlab.bench.measure import cells
from advlab.catalogue import LESSONS
from advlab.checkpoints import is_adversarial, read_metadata
from advlab.upkeep import sweep

TABLES = {"cnn": "table1_cnn.csv", "cnn-lstm": "table2_cnn_lstm.csv"}
NOT_TIMED = "not timed yet"
_TIME = re.compile(r"\*\*Time on two cores:\*\*[^.]*?\(profile lesson\), [^.]*?(?:\.\d+[^.]*?)*\.")


def lesson_paths(home: Path) -> list[Path]:
    """Return the notebooks of the lessons in order."""
    return sorted((home / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def _read_times(figures: Path) -> dict[str, Any]:
    return json.loads((figures / "times.json").read_text(encoding="utf-8"))


def markdown(table: pd.DataFrame) -> str:
    """Return a table of texts as Markdown, without its index."""
    return table.to_markdown(index=False, disable_numparse=True)


def paper_table(rows: pd.DataFrame, arch: str, beside: bool = True) -> pd.DataFrame:
    """Return our accuracies in %, and the paper's in brackets if they are to be `beside`.

    Returns:
        Texts, a row per training eps and a column per test eps.
    """
    ours = 100 * rows.pivot(index="train_eps", columns="test_eps", values="accuracy")
    texts = ours.map("{:.1f}".format)
    if beside:
        published = pd.DataFrame(paper.TABLES[arch], index=ours.columns).T
        texts += published.map(" ({:.1f})".format)
    return texts.rename(columns="eps {:g}".format)


def caption(rows: pd.DataFrame, arch: str, beside: bool = True) -> str:
    """Return what a `paper_table` is of, in a sentence or two."""
    first, number = rows.iloc[0], 1 + list(TABLES).index(arch)
    whose = ", ours and in brackets the paper's" if beside else ""
    return (
        f"Table {number}, {arch}: accuracy in %{whose}. {first['n']:,} {first['data']} test "
        f"images, FGSM crafted on the {first['source']} with per-image statistics (the paper's "
        f"attack), recipe `{first['recipe']}`, seed {first['seed']}."
    )


def mean_difference(rows: pd.DataFrame) -> str:
    """Return in a sentence how far our accuracies are from the paper's."""
    gap = paper.compare(rows)["difference"].abs()
    return (
        f"Over the {len(gap)} entries the mean absolute difference is {gap.mean():.2f} points, the "
        f"largest {gap.max():.2f}."
    )


def board_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracies of `evaluation.board` in %: texts, with the number of images.

    The last column has each accuracy's 95 % interval, too.

    Raises:
        ValueError: if an attack saw other numbers of images for one model than for another.
    """
    board, counts = evaluation.board(rows), rows.groupby("attack")["n"].agg(["min", "max"])
    heads = {}
    for attack in board:
        low, high = counts.loc[attack]
        if low < high:
            raise ValueError(
                f"{attack} was measured on {low:,} images of one model and {high:,} of another; a "
                "column compares them, so measure both on the same: advlab audit"
            )
        heads[attack] = f"{attack} (n = {low:,})"
    texts = (100 * board).map("{:.1f}".format)
    last = board.columns[-1]
    at_eps = rows[(rows["attack"] == last) & (rows["test_eps"] == rows["test_eps"].max())]
    bounds = 100 * at_eps.set_index("model")[["low", "high"]]
    texts[last] += bounds.apply(" ({low:.1f} to {high:.1f})".format_map, axis=1)
    return texts.rename(columns=heads)


def pairs_text(pairs: pd.DataFrame) -> str:
    """Return which models of the trial are ahead of the next ones, by `trial.compare`'s table."""
    ranked = list(dict.fromkeys([*pairs["model"], *pairs["other"]]))
    found = pairs.set_index(["model", "other"])
    parts = []
    for model, other in pairwise(ranked):
        row = found.loc[(model, other)]
        verdict = "is ahead of" if row["p_corrected"] < 0.05 else "cannot be told from"
        parts.append(
            f"`{model}` {verdict} `{other}` ({row['model_only']:.0f} images against "
            f"{row['other_only']:.0f}, p = {row['p_corrected']:.2g})"
        )
    corrected = f", corrected for {len(pairs)} pairs after Holm" if len(pairs) > 1 else ""
    return (
        f"Under AutoAttack on the same {pairs['n'].max():,} images (McNemar's exact test"
        f"{corrected}): {'; '.join(parts)}."
    )


def _seeds(home: Path, arch: str) -> pd.DataFrame:
    """Return what the sweep measured of an architecture under the paper's attack."""
    rows = pd.read_csv(home / "figures" / "seeds.csv")
    return rows[(rows["architecture"] == arch) & (rows["attack"] == sweep.TRANSFER)]


def seeds_table(home: Path, arch: str) -> str:
    """Return Table 1 or 2 over all seeds: mean, lowest and highest; folded, as Markdown."""
    rows = _seeds(home, arch).query("source_seed == seed")
    found = 100 * rows.groupby(["train_eps", "test_eps"])["accuracy"].agg(["mean", "min", "max"])
    texts = found.apply("{mean:.1f} ({min:.1f} to {max:.1f})".format_map, axis=1).unstack()
    table = texts.rename(index=paper.eps_label, columns="eps {:g}".format)
    seeds = sorted(set(rows["seed"]))
    head = f"The same with seeds {seeds[0]} to {seeds[-1]}: mean (lowest to highest)"
    text = markdown(table.reset_index(names="trained with"))
    return f"<details><summary>{head}</summary>\n\n{text}\n\n</details>"


def control_row(home: Path, arch: str) -> tuple[str, list[str]]:
    """Return what undefended baselines of other seeds keep under the same attack: head, texts."""
    rows = _seeds(home, arch).query("source_seed != seed")
    seeds = sorted(set(rows["seed"]))
    means = 100 * rows.groupby("test_eps")["accuracy"].mean()
    return f"no defence, seeds {seeds[0]} to {seeds[-1]}", list(means.map("{:.1f}".format))


def results_block(home: Path) -> str:
    """Return Tables 1 and 2 beside the paper's, with what they were measured on."""
    parts, every = [], []
    for arch, name in TABLES.items():
        rows = pd.read_csv(home / "figures" / name)
        every.append(rows)
        table = paper_table(rows, arch).rename(index=paper.eps_label)
        name, texts = control_row(home, arch)
        table.loc[name] = texts
        head, _, rest = caption(rows, arch).partition(":")
        parts.append(f"**{head}**:{rest}\n\n{markdown(table.reset_index(names='trained with'))}")
        parts.append(seeds_table(home, arch))
    return "\n\n".join([*parts, mean_difference(pd.concat(every))])


def speed_block(home: Path) -> str:
    """Return how long everything took, from the training logs and the timed runs."""
    times = _read_times(home / "figures")
    shipped = sorted((home / "data/checkpoints").glob("*.safetensors"))
    logs = [read_metadata(path) for path in shipped]
    first, hours = logs[0], sum(log["seconds"] for log in logs) / 3600
    lines = {
        f"training all {len(logs)} models, {first['threads']} thread(s) a process, one process per "
        f"core": f"{hours:.2f} process hours ({hours / times['processes']:.2f} h on "
        f"{times['processes']} cores)"
    }
    fixed = pd.DataFrame([log for log in logs if not is_adversarial(log)])
    for arch, rates in fixed.groupby("arch", sort=False)["images_per_second"]:
        median = rates.quantile(interpolation="higher")
        lines[f"training {arch}, images per second and process, median (range)"] = (
            f"{median:,.0f} ({rates.min():,.0f} to {rates.max():,.0f})"
        )
    for log in filter(is_adversarial, logs):
        name, epochs = log["recipe"]["name"], len(log["history"])
        how = "training on noise" if log["recipe"].get("sigma") else "adversarial training"
        lines[f"{how} of {log['arch']}, recipe `{name}`, {epochs} epochs"] = (
            f"{log['seconds'] / 60:.0f} min, {log['images_per_second']:,.0f} images/s"
        )
    for profile in ("lesson", "quick"):
        total = sum(times["profiles"][profile].values()) / 60
        lines[f"all lessons, profile `{profile}`, CIFAR-10"] = f"{total:.1f} min"
    size = sum(path.stat().st_size for path in shipped)
    lines["shipped models"] = f"{len(logs)} files, {size / 1e6:.1f} MB"
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    where = f"Machine: {times['machine']}; {versions}"
    if times["timed_on"] != times["machine"]:
        where += f"; lessons timed on {times['timed_on']}"
    return (
        f"{where}; training in {first['precision']}, evaluation in float32.\n\n"
        f"{markdown(pd.DataFrame(lines.items(), columns=['what', 'measured']))}"
    )


WAY_OUT = "C&W"  # the attack of lesson 09 that finds the shortest ways in L2
MEASURED_AS = {"baseline": "cnn baseline", "eps = 0.2": "cnn eps=0.2", "robust": "cnn robust"}
VOTER, SIGMA = "cnn noise", 0.25  # whose vote lesson 11 certifies, under the noise of its training


def minimal_lengths(home: Path) -> tuple[pd.Series, int]:
    """Return by model the median L2 of lesson 09's `WAY_OUT`, and the number of images."""
    rows = pd.read_csv(home / "figures" / "l09_distortions.csv").query("attack == @WAY_OUT")
    (n,) = set(rows["images"])
    return rows.set_index(rows["network"].map(MEASURED_AS))["l2"], n


def certified_lengths(home: Path) -> tuple[pd.Series, int]:
    """Return by model the radius within which lesson 11 proves half of the images, and their n.

    Of the radii that the lesson tried, the largest; 0 where it proves fewer than half at any.
    """
    rows = pd.read_csv(home / "figures" / "l11_certified.csv").query("sigma == @SIGMA")
    (n,) = set(rows["n"])
    half = rows.loc[rows["certified"] >= 0.5, "radius"]
    return pd.Series({VOTER: half.max() if len(half) else 0.0}), n


def with_lengths(board: pd.DataFrame, home: Path) -> tuple[pd.DataFrame, str]:
    """Return a `board_table` with what lessons 09 and 11 measured in L2, and what that is.

    Args:
        board: Index model.
        home: The clone.

    Returns:
        The board with a column for each lesson that measured one of its models, "-" for the
        others; and a sentence or more for each column.
    """
    proof = (
        f"*certified L2*: the radius within which the vote of a model under noise of {SIGMA:g} is "
        "proved to be right for half of the images (lesson 11); it is a promise of the vote, not "
        "of the model."
    )
    way_out = (
        f"*minimal L2*: the median length of the shortest change that {WAY_OUT} found, among "
        "images that the models with this figure get right (lesson 09); a better attack may find "
        "a shorter one."
    )
    measured = {
        "minimal L2": (minimal_lengths(home), way_out),
        "certified L2": (certified_lengths(home), proof),
    }
    wider, told = board.copy(), []
    for head, ((lengths, n), about) in measured.items():
        if lengths.index.isin(board.index).any():
            texts = lengths.map("{:.3g}".format).reindex(board.index, fill_value="-")
            wider[f"{head} (n = {n:,})"] = texts
            told.append(about)
    return wider, " ".join(told)


def trial_block(home: Path) -> str:
    """Return the models of Tables 1 and 2 and the adversarially trained ones, white box."""
    rows = pd.read_csv(home / "figures" / "audit.csv")
    known = rows["train_eps"].isin(paper.TABLE_TRAIN_EPS) | (rows["recipe"] != "paper")
    rows = rows[rows["architecture"].isin(TABLES) & known]
    board, told = with_lengths(board_table(rows), home)
    return (
        "Accuracy in % on CIFAR-10, seed 0, L-inf, eps 8/255, every model attacked with its own "
        "gradient; pgd-50x3 is 50 steps from three random starts on cross entropy and margin. "
        f"In brackets: the 95 % interval. {told}".rstrip()
        + f"\n\n{markdown(board.reset_index())}"
        f"\n\n{pairs_text(pd.read_csv(home / 'figures' / 'audit_pairs.csv'))} {best_text(home)}"
        f"\n\n{_devices(rows)}"
    )


def best_text(home: Path) -> str:
    """Tell how two models did under AutoAttack on more images: audit_best.csv."""
    first, second = pd.read_csv(home / "figures" / "audit_best.csv").itertuples()
    kept = []
    for row in (first, second):
        interval = f"{100 * row.low:.1f} to {100 * row.high:.1f}"
        kept.append(f"`{row.model}` keeps {_percent(row.accuracy)} ({interval})")
    return f"On {first.n:,} images {kept[0]} and {kept[1]}; p = {first.p:.2g}."


def _devices(rows: pd.DataFrame) -> str:
    """Return on which device the trial's rows were measured."""
    most = rows["device"].mode()[0]
    others = rows[rows["device"] != most]
    told = [f"Measured in float32 on the device {most}"]
    for (device, attack), here in others.groupby(["device", "attack"]):
        told.append(f"{attack} of {', '.join(here['model'])} on {device}")
    return "; ".join(told) + "."


def search_block(home: Path) -> str:
    """Return what each change behind the recipe robust-soft does alone: `advlab search`."""
    rows = pd.read_csv(home / "figures" / "search.csv")
    first, shown = rows.iloc[0], ["clean", "ce", "margin", "both"]
    table = (100 * rows[shown]).map("{:.1f}".format).assign(step=rows["step"])
    pairs = rows[["better", "worse", "p"]].apply(
        "{better:.0f} / {worse:.0f}, {p:.2g}".format_map, 1
    )
    last = "only this / only the first, p"
    table[last] = pairs.where(rows.index > 0, "")
    return (
        f"Accuracy in % of the CNN, {first['epochs']} epochs each, seed {first['seed']}, on "
        f"{first['n']:,} CIFAR-10 training images that none was trained on: clean, under PGD-20 at "
        "8/255 on the cross entropy (ce), on the margin, and under both (the worse for each image)."
        f"\n\n{markdown(table[['step', *shown, last]])}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def findings_block(home: Path) -> str:
    """Return the three results that matter, a sentence or two each.

    Raises:
        ValueError: if the files no longer bear out what the sentences say.
    """
    rebuilt = pd.concat(pd.read_csv(home / "figures" / name) for name in TABLES.values())
    rows = pd.read_csv(home / "figures" / "audit.csv")
    rows = rows[rows["test_eps"].isin([0, rows["test_eps"].max()])]
    transfer = rebuilt.pivot(index="model", columns="test_eps", values="accuracy")
    largest, own = max(transfer), rows.pivot(index="model", columns="attack", values="accuracy")
    best, ahead = transfer[largest].idxmax(), own["autoattack"].idxmax()
    strong = rows[rows["attack"] == "autoattack"].set_index("model")
    broken, holds = strong.loc[best], strong.loc[ahead]
    gains = transfer.loc[best, largest] > transfer.loc[best, 0]
    if not (gains and broken["high"] < 0.1 and holds["low"] > broken["high"]):
        raise ValueError(
            f"README.md says that {best} gains under the paper's test and falls under AutoAttack, "
            f"and that {ahead} holds; figures/ do not show that any more. Write the sentences of "
            "findings_block anew"
        )
    at = f"AutoAttack, eps {255 * holds['test_eps']:.0f}/255, {holds['n']:,} images"
    interval = f"{100 * holds['low']:.1f} to {_percent(holds['high'])}"
    return (
        f"- **The paper's tables can be rebuilt.** {mean_difference(rebuilt)}\n"
        f"- **The paper's defence does not hold.** Its best model, `{best}`, is right on "
        f"{_percent(transfer.loc[best, largest])} of the images that were attacked through another "
        f"network (the paper's test, eps {largest:g}), and on {_percent(transfer.loc[best, 0])} of "
        f"the clean ones. Attacked with its own gradient ({at}), it is right on "
        f"{_percent(broken['accuracy'])}.\n"
        f"- **Adversarial training does.** Under the same attack `{ahead}` is right on "
        f"{_percent(holds['accuracy'])} (95 % interval: {interval}), and on "
        f"{_percent(own.loc[ahead, 'clean'])} of the clean images."
    )


def _map(folder: str = "") -> list[dict[str, str]]:
    """Return a line for each lesson: a link to `folder`, title, minutes, what comes first."""
    return [
        {
            "lesson": f"[{lesson.number}]({folder}{lesson.name}.ipynb)",
            "about": lesson.title,
            "to study": f"{lesson.minutes} min",
            "after": ", ".join(lesson.after),
        }
        for lesson in LESSONS.values()
    ]


def lessons_block(home: Path) -> str:
    """Return the list of lessons, as README.md has it."""
    return markdown(pd.DataFrame(_map("notebooks/")))


def times_block(home: Path) -> str:
    """Return the list of lessons with their times; a new one has none until `advlab time`."""
    times = _read_times(home / "figures")["profiles"]
    lines = []
    for lesson, line in zip(LESSONS.values(), _map(), strict=True):
        for profile, head in (("lesson", "profile `lesson`"), ("quick", "`quick`")):
            seconds = times[profile].get(lesson.name)
            line[head] = NOT_TIMED if seconds is None else f"{seconds:.0f} s"
        lines.append(line)
    return markdown(pd.DataFrame(lines))


# Parts of the benchmark without targets.
TOLD = ("a training step's time", "first run", "workers", "precision")


def bench_block(home: Path) -> str:
    """Return the benchmark's lines with a target, those of `TOLD`, and where it was run."""
    rows, lines = pd.read_csv(home / "figures" / "bench.csv"), []
    shown = rows["target"].notna() | rows["part"].isin(TOLD) | rows["what"].str.contains("share of")
    for row in rows[shown].itertuples():
        what, way, value, _, ratio, _, target = cells(row)
        line = {"task": f"{row.part}: {what}", "way": way, "measured": value}
        lines.append(line | {"ratio": f"{ratio} {row.against}" if ratio else "", "target": target})
    where = "Machine: " + rows["machine"] + "; torch " + rows["torch"] + "."
    told = [where.iloc[0], "Each comparison in turn on the same images, medians."]
    split = where.groupby(rows["part"]).transform("nunique") > 1
    name = rows["part"].where(~split, rows["part"] + ": " + rows["what"])
    for other, those in name[where != where.iloc[0]].groupby(where):
        told.append(f"*{', '.join(those.unique())}*: measured at another time. {other}")
    if "precision" in rows["part"].tolist():
        told.append("*precision* is accuracies, measured once.")
    return f"{' '.join(told)}\n\n{markdown(pd.DataFrame(lines))}"


def grading_block(home: Path) -> str:
    """Return how long each assignment takes to grade."""
    found = pd.read_csv(home / "figures" / "grading.csv")
    hand = found["by_hand"].map("{:g}".format).where(found["by_hand"] > 0, "")
    shown = {
        "assignment": found["assignment"],
        "points": found["points"].map("{:g}".format),
        "of these by hand": hand,
        "graded in": found["seconds"].map("{:.1f} s".format),
    }
    return markdown(pd.DataFrame(shown))


Block = Callable[[Path], str]
GUIDE = "notebooks/assignments/README.md"
# The pages that have measured parts, and what makes each of them.
PAGES: dict[str, dict[str, Block]] = {
    "README.md": {"findings": findings_block, "lessons": lessons_block},
    "figures/README.md": {
        "trial": trial_block,
        "search": search_block,
        "results": results_block,
        "bench": bench_block,
    },
    "notebooks/README.md": {"times": times_block, "speed": speed_block},
    GUIDE: {"grading": grading_block},
}


def refreshed(text: str, home: Path, blocks: Mapping[str, Block]) -> str:
    """Return the `text` of a page with each of `blocks` made anew between its marks.

    Raises:
        ValueError: if the marks of a block are not there.
    """
    for name, make in blocks.items():
        start, end = f"<!-- {name}: generated -->", f"<!-- end of {name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"the page needs one pair of marks {start} ... {end}")
        before, rest = text.split(start)
        text = f"{before}{start}\n{make(home)}\n{end}{rest.split(end)[1]}"
    return text


def time_line(lesson: float, quick: float) -> str:
    """Return the line of a lesson's header that says how long it takes; arguments in seconds."""
    return (
        f"**Time on two cores:** about {lesson:.0f} s with the shipped models (profile lesson), "
        f"{quick:.0f} s in profile quick."
    )


def refresh(home: Path, pages: Iterable[str] = PAGES) -> None:
    """Write the measured numbers into the pages; no notebook is touched."""
    for name in pages:
        made = refreshed((home / name).read_text(encoding="utf-8"), home, PAGES[name])
        files.write_bytes(home / name, made.encode())


def refresh_headers(home: Path) -> None:
    """Write the times of the lessons into their headers.

    Raises:
        ValueError: if a header has no line of times.
    """
    profiles = _read_times(home / "figures")["profiles"]
    for path in lesson_paths(home):
        times = [profiles[profile].get(path.stem) for profile in ("lesson", "quick")]
        if None in times:  # a new lesson: its header stays as it was written
            continue
        notebook, line = nbformat.read(path, as_version=4), time_line(*times)
        source, count = _TIME.subn(line, notebook.cells[0].source)
        if count != 1:
            raise ValueError(
                f"{path.name}: its first cell needs one line **Time on two cores:** ..."
            )
        notebook.cells[0].source = source
        files.write_bytes(path, (nbformat.writes(notebook) + "\n").encode())


if __name__ == "__main__":
    refresh(files.home())
