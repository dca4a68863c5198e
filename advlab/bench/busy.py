"""A busy machine: what a neighbour costs attacks and tables, and what kernels at once cost."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import nbformat
import psutil
from nbclient import NotebookClient
from torch import nn

from advlab.attacks import pgd
from advlab.bench.measure import Row, Way, once, side_by_side, to_rows
from advlab.data import ImageData
from advlab.evaluation import predict
from advlab.upkeep import runs
from advlab.upkeep.kernels import OwnKernel, short_folder
from advlab.upkeep.processes import environment

EPS = 8 / 255
PART = "a busy machine"
QUIET, BUSY = "quiet", "beside one busy process"
LESSON = "02_fgsm"


@contextmanager
def neighbour() -> Iterator[None]:
    """Let another process keep one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _beside_a_neighbour(task: Callable[[], Any]) -> None:
    with neighbour():
        task()


def neighbour_part(images: ImageData, model: nn.Module, rounds: int) -> list[Row]:
    """Measure attacks and answers on a quiet machine and beside one busy process, in turn.

    Args:
        images: Data; up to 400 test images are attacked, and all are answered.
        model: A robust CNN: all steps are taken.
        rounds: As in `side_by_side`.
    """
    tasks: dict[tuple[str, int], Callable[[], Any]] = {}
    for n in (size for size in (60, 400) if size <= len(images.test)):
        batch = images.test.first(n).batch(slice(None))
        tasks["PGD-20", n] = partial(pgd, model, *batch, EPS, alpha=EPS / 4, steps=20)
    every = images.test.batch(slice(None))[0]
    tasks["answers", len(every)] = partial(predict, model, every)
    rows = []
    for (name, n), task in tasks.items():
        ways = {QUIET: Way(task, n), BUSY: Way(partial(_beside_a_neighbour, task), n)}
        seconds = side_by_side(ways, rounds)
        what = f"{name}, robust CNN, {n:,} images"
        slower = median(seconds[BUSY]) / median(seconds[QUIET])
        rows += to_rows(PART, what, ways, seconds)
        goal: dict[str, Any] = {"target": 1.5, "target_of": "at most"}
        rows.append(once(PART, what, "the neighbour's cost", slower, "times the time", **goal))
    return rows


def run_lesson(name: str) -> None:
    """Run a lesson in a kernel of its own, as `advlab run` does."""
    notebook = nbformat.read(runs.choose_lessons([name])[name], as_version=4)
    with tempfile.TemporaryDirectory(prefix="advlab-", dir=short_folder()) as folder:
        config, own = runs.kernel_config(folder), OwnKernel
        NotebookClient(notebook, kernel_manager_class=own, config=config).execute()


def cpu_seconds(count: int, at_once: int) -> float:
    """Return the CPU seconds of `count` runs of `LESSON`, `at_once` at a time, kernels included."""
    before = _of_children()
    for _ in range(count // at_once):
        with ProcessPoolExecutor(at_once, get_context("spawn")) as pool:
            list(pool.map(run_lesson, [LESSON] * at_once))
    return _of_children() - before


def _of_children() -> float:
    """Return the CPU seconds of all processes that this one has started and that have ended."""
    times = psutil.Process().cpu_times()
    return times.children_user + times.children_system


def kernels_part(variables: Mapping[str, str], count: int = 16) -> list[Row]:
    """Measure the CPU seconds of `count` kernels of lesson 02 at once, and of as many in a row.

    Args:
        variables: The lesson's settings.
        count: A multiple of the cores, so that they are in each other's way.
    """
    with environment(**variables):
        run_lesson(LESSON)  # trains the small models that it needs
        row, at_once = cpu_seconds(count, 1), cpu_seconds(count, count)
    what = f"{count} kernels of lesson 02"
    goal: dict[str, Any] = {"target": 1.2, "target_of": "at most"}
    return [
        once(PART, what, "one after the other", row, "CPU seconds"),
        once(PART, what, "at once", at_once, "CPU seconds"),
        once(PART, what, "the cost of at once", at_once / row, "times the CPU seconds", **goal),
    ]


def busy_part(
    images: ImageData, model: nn.Module, dataset: str, root: Path | None, rounds: int
) -> list[Row]:
    """Measure both; arguments as in `neighbour_part`, and the data set as in `lab.start`."""
    variables = {"ADVLAB_PROFILE": "quick", "ADVLAB_DATASET": dataset}
    variables |= {"ADVLAB_DATA": str(root)} if root else {}
    return neighbour_part(images, model, rounds) + kernels_part(variables)
