"""Write the measured parts of README.md and of the lessons' headers from the full run's files."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from advlab import evaluation, files, paper
from advlab.checkpoints import is_adversarial, read_metadata
from advlab.tools.measure import cells

TABLES = {"cnn": "table1_cnn.csv", "cnn-lstm": "table2_cnn_lstm.csv"}
NOT_TIMED = "not timed yet"
_TIME = re.compile(r"\*\*Time on two cores:\*\*[^.]*?\(profile lesson\), [^.]*?(?:\.\d+[^.]*?)*\.")


def _read_times(figures: Path) -> dict[str, Any]:
    return json.loads((figures / "times.json").read_text())


def markdown(rows: Iterable[Sequence[str]], columns: Sequence[str]) -> str:
    """Return a Markdown table of texts, which are printed as they are."""
    table = pd.DataFrame(rows, columns=columns)
    return table.to_markdown(index=False, disable_numparse=True)


def paper_table(rows: pd.DataFrame, arch: str) -> str:
    """Return our accuracies as a Markdown table, the paper's in brackets."""
    lines = []
    for train_eps, part in rows.groupby("train_eps"):
        ours = 100 * part.sort_values("test_eps")["accuracy"]
        pairs = zip(ours, paper.TABLES[arch][train_eps], strict=True)
        lines.append([paper.eps_label(train_eps), *(f"{a:.1f} ({b:.1f})" for a, b in pairs)])
    return markdown(lines, ["trained with", *(f"eps {eps:g}" for eps in paper.TEST_EPS)])


def results_block(home: Path) -> str:
    """Return Tables 1 and 2 beside the paper's, with what they were measured on."""
    parts, every = [], []
    for number, (arch, name) in enumerate(TABLES.items(), 1):
        rows = pd.read_csv(home / "figures" / name)
        every.append(rows)
        first = rows.iloc[0]
        parts.append(
            f"**Table {number}, {arch}**: accuracy in %, ours and in brackets the paper's. "
            f"{first['n']:,} {first['data']} test images, FGSM crafted on the {first['source']} "
            f"with per-image statistics (the paper's attack), recipe `{first['recipe']}`, seed "
            f"{first['seed']}.\n\n{paper_table(rows, arch)}"
        )
    gap = paper.compare(pd.concat(every))["difference"].abs()
    parts.append(
        f"Over the {len(gap)} cells the mean absolute difference is {gap.mean():.2f} points, the "
        f"largest {gap.max():.2f}."
    )
    return "\n\n".join(parts)


def speed_block(home: Path) -> str:
    """Return how long everything took, from the training logs and the timed runs."""
    times = _read_times(home / "figures")
    shipped = sorted((home / "data/checkpoints").glob("*.safetensors"))
    logs = [read_metadata(path) for path in shipped]
    first, hours = logs[0], sum(log["seconds"] for log in logs) / 3600
    lines = [
        (
            f"training all {len(logs)} models, {first['threads']} thread(s) a process, one process "
            "per core",
            f"{hours:.2f} process hours ({hours / times['processes']:.2f} h on "
            f"{times['processes']} cores)",
        )
    ]
    lines += _rates([log for log in logs if not is_adversarial(log)])
    lines += [
        (
            f"adversarial training of {log['arch']}, recipe `{log['recipe']['name']}`, "
            f"{len(log['history'])} epochs",
            f"{log['seconds'] / 60:.0f} min, {log['images_per_second']:,.0f} images/s",
        )
        for log in filter(is_adversarial, logs)
    ]
    for profile in ("lesson", "quick"):
        total = sum(times["profiles"][profile].values()) / 60
        lines.append((f"all lessons, profile `{profile}`, CIFAR-10", f"{total:.1f} min"))
    size = sum(path.stat().st_size for path in shipped)
    lines.append(("shipped models", f"{len(logs)} files, {size / 1e6:.1f} MB"))
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    return (
        f"Machine: {times['machine']}; {versions}; training in {first['precision']}, evaluation in "
        f"float32.\n\n{markdown(lines, ['what', 'measured'])}"
    )


def _rates(logs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return a line for each architecture: how many images a second its trainings did."""
    lines = []
    for arch, rates in pd.DataFrame(logs).groupby("arch", sort=False)["images_per_second"]:
        median = rates.quantile(interpolation="higher")
        lines.append(
            (
                f"training {arch}, images per second and process, median (range)",
                f"{median:,.0f} ({rates.min():,.0f} to {rates.max():,.0f})",
            )
        )
    return lines


def trial_block(home: Path) -> str:
    """Return the models of Tables 1 and 2 and the adversarially trained ones, white box."""
    rows = pd.read_csv(home / "figures" / "audit.csv")
    known = rows["train_eps"].isin(paper.TABLE_TRAIN_EPS) | (rows["recipe"] != "paper")
    rows = rows[rows["architecture"].isin(TABLES) & known]
    board, counts = evaluation.board(rows), rows.groupby("attack")["n"].agg(["min", "max"])
    heads = []
    for attack in board:
        low, high = counts.loc[attack]
        heads.append(f"{attack} (n = {low:,}{f' to {high:,}' if high > low else ''})")
    lines = [[model, *(f"{100 * v:.1f}" for v in row)] for model, row in board.iterrows()]
    return (
        "Accuracy in % on CIFAR-10, seed 0, L-inf, eps 8/255, every model attacked with its own "
        "gradient; pgd-50x3 is 50 steps from three random starts on cross entropy and margin."
        f"\n\n{markdown(lines, ['model', *heads])}"
    )


def lessons_block(home: Path) -> str:
    """Return the list of lessons with their times; a new one has none until `retrain` timed it."""
    times = _read_times(home / "figures")["profiles"]
    lines = []
    for path in sorted((home / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        number, about = _title(path)
        seconds = [times[profile].get(path.stem) for profile in ("lesson", "quick")]
        shown = [NOT_TIMED if s is None else f"{s:.0f} s" for s in seconds]
        lines.append([f"[{number}](notebooks/{path.name})", about, *shown])
    return markdown(lines, ["lesson", "about", "profile `lesson`", "`quick`"])


def _title(path: Path) -> tuple[str, str]:
    """Return number and title of a lesson, which its first line gives as "# 01 · Title"."""
    first = nbformat.read(path, as_version=4).cells[0].source.partition("\n")[0]
    number, _, title = first.lstrip("# ").partition(" · ")
    return number, title


def bench_block(home: Path) -> str:
    """Return the lines of the benchmark that have a target, and where they were measured."""
    rows = pd.read_csv(home / "figures" / "bench.csv")
    first, lines = rows.iloc[0], []
    for row in rows.dropna(subset="target").itertuples():
        what, way, value, _, ratio, _, target = cells(row)
        against = f"{ratio} {row.against}" if ratio else ""
        lines.append([f"{row.part}: {what}", way, value, against, target])
    return (
        f"Machine: {first['machine']}; torch {first['torch']}. Each comparison in turn on the same "
        "images, medians.\n\n" + markdown(lines, ["task", "way", "measured", "ratio", "target"])
    )


BLOCKS = {
    "results": results_block,
    "speed": speed_block,
    "lessons": lessons_block,
    "bench": bench_block,
    "trial": trial_block,
}


def refreshed(text: str, home: Path) -> str:
    """Return the README's `text` with each block between its marks made anew.

    Raises:
        ValueError: if the marks of a block are not there.
    """
    for name, make in BLOCKS.items():
        start, end = f"<!-- {name}: generated -->", f"<!-- end of {name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md needs one pair of marks {start} ... {end}")
        before, rest = text.split(start)
        text = f"{before}{start}\n{make(home)}\n{end}{rest.split(end)[1]}"
    return text


def time_line(lesson: float, quick: float) -> str:
    """Return the line of a lesson's header that says how long it takes; arguments in seconds."""
    return (
        f"**Time on two cores:** about {lesson:.0f} s with the shipped models (profile lesson), "
        f"{quick:.0f} s in profile quick."
    )


def refresh(home: Path) -> None:
    """Write the measured numbers into README.md and the times into the lessons' headers."""
    refresh_headers(home)
    readme = home / "README.md"
    files.write_bytes(readme, refreshed(readme.read_text(encoding="utf-8"), home).encode())


def refresh_headers(home: Path) -> None:
    """Write the times of the lessons into their headers.

    Raises:
        ValueError: if a header has no line of times.
    """
    profiles = _read_times(home / "figures")["profiles"]
    for path in sorted((home / "notebooks").glob("[0-9][0-9]_*.ipynb")):
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
