"""Write the measured parts of README.md and of the lessons' headers from the full run's files."""

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from advlab import evaluation, files, paper
from advlab.bench.measure import cells
from advlab.checkpoints import is_adversarial, read_metadata

TABLES = {"cnn": "table1_cnn.csv", "cnn-lstm": "table2_cnn_lstm.csv"}
_TIME = re.compile(r"\*\*Time on two cores:\*\*[^.]*?\(profile lesson\), [^.]*?(?:\.\d+[^.]*?)*\.")


def _read_times(figures: Path) -> dict[str, Any]:
    return json.loads((figures / "times.json").read_text())


def paper_table(rows: pd.DataFrame, arch: str) -> str:
    """Return our accuracies as a Markdown table, the paper's in brackets."""
    head = "| trained with | " + " | ".join(f"eps {eps:g}" for eps in paper.TEST_EPS) + " |"
    lines = [head, "|---" * (1 + len(paper.TEST_EPS)) + "|"]
    for train_eps, part in rows.groupby("train_eps"):
        ours = 100 * part.sort_values("test_eps")["accuracy"]
        cells = [
            f"{mine:.1f} ({published:.1f})"
            for mine, published in zip(ours, paper.TABLES[arch][train_eps], strict=True)
        ]
        lines.append(f"| {paper.eps_label(train_eps)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    logs = [read_metadata(p) for p in sorted((home / "data/checkpoints").glob("*.safetensors"))]
    fixed = [log for log in logs if not is_adversarial(log)]
    by_arch = {
        arch: [log["images_per_second"] for log in fixed if log["arch"] == arch]
        for arch in dict.fromkeys(log["arch"] for log in fixed)
    }
    size = sum(p.stat().st_size for p in (home / "data/checkpoints").glob("*.safetensors"))
    hours = sum(log["seconds"] for log in logs) / 3600
    first = logs[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    lines = [
        f"Machine: {times['machine']}; {versions}; training in {first['precision']}, evaluation in "
        "float32.",
        "",
        "| what | measured |",
        "|---|---|",
        f"| training all {len(logs)} models, {first['threads']} thread(s) a process, one process "
        f"per core | {hours:.2f} process hours ({hours / times['processes']:.2f} h on "
        f"{times['processes']} cores) |",
    ]
    for arch, rates in by_arch.items():
        lines.append(
            f"| training {arch}, images per second and process, median (range) | "
            f"{sorted(rates)[len(rates) // 2]:,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) |"
        )
    for log in filter(is_adversarial, logs):
        lines.append(
            f"| adversarial training of {log['arch']}, recipe `{log['recipe']['name']}`, "
            f"{len(log['history'])} epochs | {log['seconds'] / 60:.0f} min, "
            f"{log['images_per_second']:,.0f} images/s |"
        )
    for profile in ("lesson", "quick"):
        total = sum(times["profiles"][profile].values()) / 60
        lines.append(f"| all lessons, profile `{profile}`, CIFAR-10 | {total:.1f} min |")
    lines.append(f"| shipped models | {len(logs)} files, {size / 1e6:.1f} MB |")
    return "\n".join(lines)


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
    lines = ["| model | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for model, row in board.iterrows():
        lines.append(f"| {model} | " + " | ".join(f"{100 * v:.1f}" for v in row) + " |")
    title = (
        "Accuracy in % on CIFAR-10, seed 0, L-inf, eps 8/255, every model attacked with its own "
        "gradient; pgd-50x3 is 50 steps from three random starts on cross entropy and margin."
    )
    return "\n".join([title, "", *lines])


def lessons_block(home: Path) -> str:
    """Return the list of lessons with their times."""
    times = _read_times(home / "figures")["profiles"]
    lines = ["| lesson | about | profile `lesson` | `quick` |", "|---|---|---|---|"]
    for path in sorted((home / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        text = nbformat.read(path, as_version=4).cells[0].source
        title = text.splitlines()[0].lstrip("# ")
        number, _, about = title.partition(" · ")
        lesson, quick = (times[profile][path.stem] for profile in ("lesson", "quick"))
        lines.append(
            f"| [{number}](notebooks/{path.name}) | {about} | {lesson:.0f} s | {quick:.0f} s |"
        )
    return "\n".join(lines)


def bench_block(home: Path) -> str:
    """Return the lines of the benchmark that have a target, and where they were measured."""
    rows = pd.read_csv(home / "figures" / "bench.csv")
    first = rows.iloc[0]
    lines = [
        f"Machine: {first['machine']}; torch {first['torch']}. Each comparison in turn on the same "
        "images, medians.",
        "",
        "| task | way | measured | ratio | target |",
        "|---|---|---|---|---|",
    ]
    for row in rows.dropna(subset="target").itertuples():
        what, way, value, _, ratio, _, target = cells(row)
        against = f"{ratio} {row.against}" if ratio else ""
        lines.append(f"| {row.part}: {what} | {way} | {value} | {against} | {target} |")
    return "\n".join(lines)


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
    profiles = _read_times(home / "figures")["profiles"]
    for path in sorted((home / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        line = time_line(profiles["lesson"][path.stem], profiles["quick"][path.stem])
        source, count = _TIME.subn(line, notebook.cells[0].source)
        if count != 1:
            raise ValueError(
                f"{path.name}: its first cell needs one line **Time on two cores:** ..."
            )
        notebook.cells[0].source = source
        files.write_bytes(path, (nbformat.writes(notebook) + "\n").encode())
    readme = home / "README.md"
    files.write_bytes(readme, refreshed(readme.read_text(encoding="utf-8"), home).encode())
