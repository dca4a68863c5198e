"""`advlab bench`: measures every part in one go and writes a table, a CSV and a figure.

Each comparison takes turns on the same images. Ratios carry over to other machines, seconds do not.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from advlab import datasets, files, paper, plots
from advlab.bench import busy, footprint, parts, picture, rivals
from advlab.bench.measure import Row, cells
from advlab.bench.precision import precision_part
from advlab.bench.scale import scale_part
from advlab.bench.strongest import strongest_part
from advlab.bench.whole_paper import whole_part
from advlab.upkeep import readme, runs
from advlab.upkeep.processes import KEEP_MEMORY, environment, kill_children

COLUMNS = [field.name for field in fields(Row)]


def measure_apart(*asked: Any) -> tuple[list[Row], dict[str, str]]:
    """Return `measure` of a process that keeps freed memory, as workers and lessons do."""
    with environment(**KEEP_MEMORY), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(measure, *asked).result()
        except BaseException:  # stopped: the pool would wait for all that is left to measure
            kill_children()
            raise


def measure(
    dataset: str, root: Path | None, rounds: int, only: Sequence[str], known: Sequence[Row]
) -> tuple[list[Row], dict[str, str]]:
    """Measure part by part; one that fails does not end the others.

    Args:
        dataset, root: The data.
        rounds: Measurements of each way.
        only: Beginnings of the names of parts; all parts for none.
        known: Rows of an earlier benchmark of this machine, from which "whole paper" is projected
            if the others are not measured now.

    Returns:
        What was measured, and the error of each part that failed.

    Raises:
        ValueError: if no part is called so.
    """
    lesson = footprint.open_lesson(dataset, root)
    images, zoo = lesson.data, lesson.zoo
    archs, recipe = ("cnn", "cnn-lstm"), lesson.settings.adversarial["robust"]

    # Asked for by the parts that need them: where nothing is shipped, they are trained then.
    def plain(arch: str) -> nn.Module:
        return zoo.get(arch).model

    def robust(arch: str) -> nn.Module:
        return zoo.get(arch, recipe).model

    def networks() -> dict[str, tuple[nn.Module, float]]:
        hard = {f"robust {arch}": (robust(arch), 1.5) for arch in archs}
        return {"standard CNN": (plain("cnn"), 4.0), **hard}

    rows: list[Row] = []
    jobs: dict[str, Callable[[], list[Row]]] = {
        "what the machine can do": partial(parts.machine_part, rounds),
        "training": partial(parts.training_part, images, rounds),
        "training, by operator": partial(parts.profile_part, images),
        "crafting, cnn": lambda: parts.crafting_part(images, zoo.get("cnn"), rounds),
        "crafting, cnn-lstm": lambda: parts.crafting_part(images, zoo.get("cnn-lstm"), rounds),
        "evaluation": lambda: parts.evaluation_part(images, [*map(zoo.get, archs)], rounds),
        "attacks": lambda: parts.attacks_part(images, plain("cnn"), rounds),
        "FGSM": lambda: rivals.fgsm_part(images, plain("cnn"), rounds),
        "PGD": lambda: rivals.pgd_part(images, networks(), rounds),
        "a busy machine": lambda: busy.busy_part(images, robust("cnn"), dataset, root, rounds),
        "memory": partial(footprint.memory_part, dataset, root),
        "start": partial(footprint.start_part, rounds),
        "first run": footprint.first_run_part,
        "explorer": lambda: footprint.explorer_part({a: plain(a) for a in archs}, images),
        "workers": lambda: scale_part(images, robust("cnn")),
    }
    if images.papers:
        ten = list(product(paper.TABLES, paper.TABLE_TRAIN_EPS))
        jobs["AutoAttack"] = lambda: strongest_part(
            images, robust("cnn"), {f"{a} eps={eps:g}": zoo.get(a, eps).model for a, eps in ten}
        )
        jobs["precision"] = lambda: precision_part(images, zoo)
        jobs["whole paper"] = lambda: whole_part([*known, *rows], files.shipped())
    names = ", ".join(jobs)
    jobs = {name: job for name, job in jobs.items() if not only or name.startswith(tuple(only))}
    if not jobs:
        raise ValueError(f"no part of the benchmark is called {', '.join(only)}; choose of {names}")
    console = Console()
    failed: dict[str, str] = {}
    for number, (name, job) in enumerate(jobs.items(), 1):
        start = time.perf_counter()
        try:  # minutes of work before it are not to be lost
            rows += job()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
        told = failed.get(name, f"{time.perf_counter() - start:.0f} s")
        console.print(f"[{number}/{len(jobs)}] {name}: {told}", markup=False)
    return rows, failed


def show(table: pd.DataFrame, console: Console) -> None:
    """Print the benchmark's table, a block for each part, with its notes below."""
    for part, rows in table.groupby("part", sort=False):
        title = f"\n[bold]{part}"
        look: dict[str, Any] = {"title_justify": "left", "box": None, "padding": (0, 1, 0, 0)}
        shown = Table("task", "way", title=title, **look)
        for name in ("median", "", "ratio", "ceiling", "target"):
            shown.add_column(name, justify="right")
        for row in rows.itertuples():
            shown.add_row(*cells(row))
        console.print(shown)
        for row in rows[rows["note"] != ""].drop_duplicates("note").itertuples():
            console.print(f"{row.way}: {row.note}", style="dim", markup=False)


def merged(earlier: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """Return all lines; of those about the same task done in the same way, the last."""
    lines = pd.concat([earlier, measured], ignore_index=True)
    order = {part: number for number, part in enumerate(lines["part"].unique())}
    lines = lines.drop_duplicates(["part", "what", "way"], keep="last")
    return lines.sort_values("part", key=lambda part: part.map(order), kind="stable")


def run(
    dataset: str = "auto",
    data_dir: str = "auto",
    output_dir: str = "auto",
    rounds: int = 5,
    publish: bool = False,
    only: Sequence[str] = (),
    console: Console | None = None,
) -> pd.DataFrame:
    """Measure everything, or some parts; print it, and write bench.csv and bench.png.

    Args:
        dataset, data_dir: As in `lab.start`.
        output_dir: Where to write; "auto": outputs/bench in the repository.
        rounds: Measurements of each way.
        publish: Write into the repository's figures/ and refresh the pages that show it.
        only: Beginnings of the names of the parts to measure; the other lines of bench.csv stay.

    Raises:
        ValueError: if `rounds` is below 1, there is no such part, or other data than CIFAR-10 are
            to be published.
        FileNotFoundError: if it was to be published outside a clone.
        RuntimeError: if a part failed, at the end: the others are written, and its earlier lines
            stay. It fails, too, where another way gives other results than ours.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; measure at least once")
    console = console or Console()
    name, root = datasets.resolve(dataset, data_dir)
    if publish and not datasets.are_papers(name):
        raise ValueError("--publish: there is no CIFAR-10, and figures/ holds nothing else")
    chosen = files.setting(output_dir) or files.home() / "outputs" / "bench"
    output = files.clone() / "figures" if publish else files.results_folder(chosen)
    earlier = pd.DataFrame()
    if (output / "bench.csv").is_file():
        texts = {"against": "", "note": ""}
        earlier = pd.read_csv(output / "bench.csv", dtype=dict.fromkeys(texts, object))
        earlier = earlier.fillna(texts)
    # Rates of this machine alone may stand beside what is measured now.
    lines = earlier.reindex(columns=[*COLUMNS, "machine"])
    ours = lines[lines["machine"] == runs.machine()][COLUMNS]
    known = [Row(**dict(line)) for _, line in ours.iterrows()] if only else []
    rows, failed = measure_apart(name, root, rounds, only, known)
    errors = "\n".join(f"{part} failed: {why}" for part, why in failed.items())
    if not rows:
        raise RuntimeError(errors)
    measured = pd.DataFrame(rows, columns=COLUMNS).assign(
        machine=runs.machine(), torch=torch.__version__, data=name
    )
    show(measured, console)
    table = merged(earlier, measured) if only or failed else measured
    files.write_table(output / "bench.csv", table)
    plots.use_style()
    with files.atomic_write(output / "bench.png") as temporary:
        picture.ratios(table).savefig(temporary, format="png", dpi=110)
    if publish:
        readme.refresh(files.home())
    console.print(f"Written: {output / 'bench.csv'} and bench.png", soft_wrap=True, markup=False)
    if errors:
        raise RuntimeError(errors)
    return table
