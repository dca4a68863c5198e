"""The search behind the adversarial recipes: one change at a time, judged on held-out images.

Each step trains the CNN by a recipe that differs from the first in what the step names. None of the
images by which they are compared was trained on, and none is a test image.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from torch import Tensor, tensor

from advlab import datasets, evaluation, files, lab
from advlab.comparison import holm, mcnemar
from advlab.recipes import ROBUST, Recipe
from advlab.store import Store
from advlab.upkeep import tasks
from advlab.upkeep.cluster import Scheduler, connect
from advlab.upkeep.graph import Kept, file, measure, missing, processes_for, raise_failed, training
from advlab.upkeep.runs import print_table
from advlab.upkeep.sweep import cost
from advlab.upkeep.tasks import Job, Options

ARCH = "cnn"
EIGHT = {"eps": 8 / 255, "alpha": 6 / 255}
DECAY = {"weight_decay": 2e-3}
STEPS: Mapping[str, dict[str, Any]] = {
    "as robust": {},
    "crops of 4 pixels": {"crop": 4},
    "8/255 in training": EIGHT,
    "half soft labels": {"soft": 0.5},
    "weight decay 0.002": DECAY,
    "soft labels and weight decay": DECAY | {"soft": 0.5},
    "all three": DECAY | EIGHT | {"soft": 0.5},
    "TRADES": {"adversary": "trades", "beta": 6.0},
}


def recipe_of(step: str, epochs: int) -> Recipe:
    """Return the recipe of a step: `recipes.ROBUST`, so many epochs long, with its change.

    The last weights are the result: which epoch is best would be chosen by the images that judge.
    """
    name = "search-" + "-".join(step.replace("/255", "").split())
    options: dict[str, Any] = {"name": name, "epochs": epochs, "early_stopping": False}
    return replace(ROBUST, **options, **STEPS[step])


def run(
    *,
    epochs: int = 24,
    dataset: str = "auto",
    data_dir: str = "auto",
    output_dir: str = "auto",
    seed: int = 0,
    device: str = "auto",
    publish: bool = False,
    scheduler: Scheduler | None = None,
    console: Console | None = None,
) -> pd.DataFrame:
    """Train by every step, measure on the held-out images, print and write search.csv.

    Args:
        epochs: Of each training.
        dataset, data_dir, seed, device: As in `lab.start`.
        output_dir: Folder of models and table; "auto": outputs/search-DATASET.
        publish: Write the table into the repository's figures, too.
        scheduler: Which cluster; see `cluster.connect`.

    Returns:
        A row a step: step, epochs, seed, n; accuracies clean, under PGD-20 on the cross entropy
        (ce), on the margin, and under both (worst case an image), with low and high of that; and
        compared with the first step, better and worse (images that hold under both for only one of
        the two) and p, corrected for all steps (McNemar, Holm).

    Raises:
        TaskError: if trainings or measurements failed; what the others made is kept.
        ClusterError: as `cluster.connect`.
        FileNotFoundError: if it was to be published outside a clone.
        ValueError: if other data than CIFAR-10 were to be published.
    """
    console = console or Console()
    if publish:
        files.clone()
    name, _ = datasets.resolve(dataset, data_dir)
    if publish and not datasets.are_papers(name):
        raise ValueError(f"--publish writes what was measured on CIFAR-10; the data are {name}")
    folder = files.setting(output_dir) or str(lab.default_output("search", name))
    options = Options("paper", name, data_dir, folder, seed, device).resolved()
    jobs = {step: Job(options, ARCH, recipe_of(step, epochs)) for step in STEPS}
    todo = missing(jobs.values())
    console.print(f"{len(jobs)} models; {cost(todo, None)}.", markup=False, soft_wrap=True)
    store = options.open().store
    try:
        held = {step: _held(job, Kept(store.folder)) for step, job in jobs.items()}
    except LookupError:
        _make(jobs, todo, options, scheduler)
        held = {step: _held(job, Kept(store.folder)) for step, job in jobs.items()}
    table = _table(held).assign(epochs=epochs, seed=seed)
    path = Path(options.output_dir) / "search.csv"
    files.write_table(path, table)
    if publish:
        files.write_table(files.home() / "figures" / "search.csv", table)
    shown = 100 * table.set_index("step")[["clean", "ce", "margin", "both"]]
    title = f"accuracy %, {ARCH}, {epochs} epochs, {table['n'][0]:,} held-out images, PGD-20"
    print_table(title, shown.map("{:.1f}".format), console)
    console.print(f"Written: {path}", soft_wrap=True, markup=False)
    return table


def _make(
    jobs: Mapping[str, Job], todo: list[Job], options: Options, scheduler: Scheduler | None
) -> None:
    """Train `todo`, and measure all of `jobs`."""
    with connect(scheduler, processes_for(todo or [*jobs.values()])) as cluster:
        if todo:
            with training(cluster, todo) as trained:
                raise_failed(trained.failed(todo), len(todo), "trainings")
        place = cluster.place(options)
        asked = {
            s: (tasks.judge, (place, job, file(cluster, None, job))) for s, job in jobs.items()
        }
        measure(cluster, options.open().store, asked, "measurements")


def _held(job: Job, store: Store) -> dict[str, Tensor]:
    """Return which held-out images a model holds, by what was done to them: from a store.

    Raises:
        LookupError: if the model is not trained, or not measured.
    """
    opened = job.options.open()
    if missing([job]):
        raise LookupError(f"{job.name} is not trained yet")
    found = tasks.on_held_out(opened, opened.zoo.get(job.arch, job.training), store)
    held = {name: tensor(right) for name, right in found.items()}
    return held | {"both": held["ce"] & held["margin"]}


def _table(held: Mapping[str, Mapping[str, Tensor]]) -> pd.DataFrame:
    """Return the rows of `run`."""
    first, rows = next(iter(held.values()))["both"], []
    for step, found in held.items():
        accuracies = {name: float(right.float().mean()) for name, right in found.items()}
        low, high = evaluation.wilson(int(found["both"].sum()), len(first))
        better, worse, p = mcnemar(found["both"], first)
        row = {"step": step, **accuracies, "low": low, "high": high, "n": len(first)}
        rows.append(row | {"better": better, "worse": worse, "p": p})
    table = pd.DataFrame(rows)
    table.loc[1:, "p"] = holm(table["p"].tolist()[1:])
    return table
