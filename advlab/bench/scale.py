"""More workers: what two do against one, and a whole sweep on as many as nobody has here.

What two do is measured for a training, an audit and a class, each with the cluster's start.

The second is simulated: a real scheduler, its workers in this process, and tasks that sleep as long
as theirs take, all divided by one number. It shows where the critical path lies, and what the
scheduler costs.
"""

import io
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dask
import torch
from distributed import Client, LocalCluster, wait
from rich.console import Console
from torch import Tensor, nn

from advlab import files, paper
from advlab.autoattack import auto_attack
from advlab.bench.measure import Row, Way, compare, once
from advlab.checkpoints import read_metadata
from advlab.classroom import course
from advlab.data import ImageData
from advlab.recipes import file_stem
from advlab.upkeep import graph
from advlab.upkeep.cluster import LOCAL, connect
from advlab.upkeep.processes import environment
from advlab.upkeep.tasks import Job, Options

SEEDS = 5
FASTER = 200  # how many times the simulated tasks are shorter than those that they stand for
CRAFTING, MEASURING = 30.0, 60.0  # seconds of 50,000 directions, and of a table of five models
WORKERS = (16, 256)
ATTACKED, PARTS = 40, ("apgd-ce", "apgd-t")  # images, and the parts of AutoAttack


def scale_part(images: ImageData, model: nn.Module, rounds: int = 1) -> list[Row]:
    """Measure one and two workers, and simulate a sweep of the paper's recipe.

    Args:
        images: Whose first test images are attacked.
        model: That AutoAttack takes long with.
        rounds: As in `measure.side_by_side`.
    """
    tasks: dict[str, tuple[Callable[[int], Any], int, str]] = {
        "four small models": (_train_four, 4, "models/s"),
        f"{' and '.join(PARTS)}, {ATTACKED} images": (
            partial(_audit, images, model),
            ATTACKED,
            "images/s",
        ),
    }
    rows = []
    with TemporaryDirectory() as folder:
        if shutil.which("bwrap") and find_spec("nbgrader"):  # else nothing can be graded here
            tasks["grading four notebooks"] = partial(_grade, Path(folder)), 4, "notebooks/s"
        for what, (call, amount, unit) in tasks.items():
            numbers = {"1 worker": 1, "2 workers": 2}
            ways = {name: Way(partial(call, n), amount) for name, n in numbers.items()}
            rows += compare("workers", what, ways, rounds, unit, against="1 worker")
    return [*rows, *_simulated()]


def _train_four(workers: int) -> None:
    with TemporaryDirectory() as folder, environment(ADVLAB_CACHE=folder):
        options = Options("quick", "shapes10", output_dir=folder, device="cpu").resolved()
        jobs = [Job(Options(**{**vars(options), "seed": seed}), "cnn", 0.0) for seed in range(4)]
        with connect(jobs=workers) as cluster, graph.training(cluster, jobs) as trained:
            graph.raise_failed(trained.failed(jobs), len(jobs), "trainings")


def _audit(images: ImageData, model: nn.Module, workers: int) -> None:
    """Attack `ATTACKED` images in four parts, which an audit makes larger."""
    parts = zip(*(t.chunk(4) for t in images.test.batch(slice(ATTACKED))), strict=True)
    with connect(jobs=workers) as cluster:
        list(cluster.map(_attack, [(model, x.clone(), y.clone()) for x, y in parts]))


def _attack(part: tuple[nn.Module, Tensor, Tensor]) -> int:
    torch.set_num_threads(1)
    return int(auto_attack(*part, attacks=PARTS).sum())


def _grade(folder: Path, workers: int) -> None:
    """Grade the reference solution of an assignment, handed in by four students."""
    source = course.sources()["a2"]
    for student in "abcd":
        files.write_bytes(folder / "class" / f"{student}_a2.ipynb", source.read_bytes())
    with TemporaryDirectory() as output:
        quiet = Console(file=io.StringIO())
        course.grade(folder / "class", Path(output), jobs=workers, console=quiet)


def _sleep(seconds: float, *_: Any) -> None:
    time.sleep(seconds / FASTER)


def durations(folder: Path) -> dict[str, float]:
    """Return how long the shipped models of Tables 1 and 2 took to train, by file name."""
    names = [file_stem(arch, eps, 0) for arch in paper.TABLES for eps in paper.TABLE_TRAIN_EPS]
    return {name: read_metadata(folder / f"{name}.safetensors")["seconds"] for name in names}


def _send(client: Client, seconds: dict[str, float]) -> list[Any]:
    """Send the graph of a sweep over `SEEDS`, as `upkeep.sweep` would."""
    sent, do = [], partial(client.submit, _sleep, pure=False)
    for _ in range(SEEDS):
        for arch in paper.TABLES:
            baseline = do(seconds[file_stem(arch, 0.0, 0)])
            signs = do(CRAFTING, baseline)
            models = [
                do(seconds[file_stem(arch, eps, 0)], baseline, signs)
                for eps in paper.TABLE_TRAIN_EPS
                if eps
            ]
            sent += [*models, do(MEASURING, baseline, *models)]
    return sent


@contextmanager
def _workers(number: int) -> Iterator[Client]:
    quiet: dict[str, Any] = {"distributed.scheduler.http.routes": []}
    with (
        dask.config.set(LOCAL | quiet),
        LocalCluster(
            n_workers=number,
            threads_per_worker=1,
            processes=False,
            dashboard_address="127.0.0.1:0",
            memory_limit=None,
            silence_logs=logging.CRITICAL,
        ) as started,
        Client(started) as client,
    ):
        yield client


def _simulated() -> list[Row]:
    seconds = durations(files.shipped_checkpoints())
    path = max(
        seconds[file_stem(arch, 0.0, 0)]
        + CRAFTING
        + max(seconds[file_stem(arch, eps, 0)] for eps in paper.TABLE_TRAIN_EPS if eps)
        + MEASURING
        for arch in paper.TABLES
    )
    work = SEEDS * (sum(seconds.values()) + len(paper.TABLES) * (CRAFTING + MEASURING))
    what, rows = f"sweep of {SEEDS} seeds, recipe paper, simulated", []
    for number in WORKERS:
        with _workers(number) as client:
            start = time.perf_counter()
            wait(_send(client, seconds))
            took = FASTER * (time.perf_counter() - start)
            least = max(path, work / number)
            note = f"work {work / 3600:.1f} h; critical path (baseline, directions, augmented "
            note += f"model, table) {path / 3600:.2f} h"
            rows.append(
                once(
                    "workers", what, f"{number} workers", took / 3600, "h",
                    of_ceiling=least / took, note=note,
                )
            )  # fmt: skip
            if number == WORKERS[-1]:
                start, many = time.perf_counter(), 2_000
                wait(client.map(int, range(many), pure=False))
                each = 1_000 * (time.perf_counter() - start) / many
                rows.append(once("workers", "an empty task", f"{number} workers", each, "ms"))
    return rows
