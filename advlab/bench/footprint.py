"""What else a reader waits for or must have: memory, the time to start, a move in the explorer."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import nbformat
import torch
from nbclient import NotebookClient
from torch import nn

from advlab import evaluation, lab
from advlab.attacks import fgsm_direction
from advlab.bench import paper_way
from advlab.bench.measure import PAPERS, Row, Way, compare, once, peak_megabytes, to_rows
from advlab.bench.parts import new_model
from advlab.data import ImageData
from advlab.lab import Lab
from advlab.recipes import Recipe
from advlab.training import AugmentedSet, fit
from advlab.upkeep import runs
from advlab.upkeep.processes import environment
from advlab.widgets import AttackExplorer


def open_lesson(dataset: str, root: Path | None) -> Lab:
    """Open the data and the shipped models as a lesson does, on the CPU."""
    return lab.start("lesson", dataset, data_dir=str(root or "auto"), device="cpu", progress=False)


def _train_papers_way(lesson: Lab) -> None:
    batches = islice(paper_way.shuffled(lesson.data.train), 50)
    paper_way.train_steps(new_model("cnn", lesson.data), batches, lr=1e-3)


def _train(lesson: Lab) -> None:
    images = lesson.data.train
    signs = torch.randint(-1, 2, images.images.shape, dtype=torch.int8)
    some = AugmentedSet(images.first(1_600), signs[:1_600], 0.2)
    fit(new_model("cnn", lesson.data), some, Recipe("bench", 1, flip=False))


def _craft(lesson: Lab) -> None:
    some = lesson.data.train.batch(slice(0, 5_000))
    fgsm_direction(new_model("cnn", lesson.data), *some, per_image_statistics=True)


def _evaluate(lesson: Lab) -> None:
    evaluation.accuracy_table([lesson.zoo.get("cnn")], lesson.data, (0.0, 0.02))


TASKS = {
    ("training", PAPERS): _train_papers_way,
    ("training", "advlab, augmented set"): _train,
    ("crafting 5,000 images", "advlab"): _craft,
    ("evaluating a model at two eps", "advlab"): _evaluate,
}


def _do(task: tuple[str, str], dataset: str, root: Path | None) -> None:
    TASKS[task](open_lesson(dataset, root))


def memory_part(dataset: str, root: Path | None) -> list[Row]:
    """Measure the peak memory of whole processes, each with the whole data set loaded."""
    return [
        once("memory", *task, peak_megabytes(_do, task, dataset, root), "MB of one process")
        for task in TASKS
    ]


def seconds_to_first_figure(lesson: str) -> float:
    """Return the seconds from starting a kernel to the first figure of `lesson`."""
    notebook = nbformat.read(runs.choose_lessons([lesson])[lesson], as_version=4)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="advlab-") as folder:
        client = NotebookClient(notebook, config=runs.kernel_config(folder))
        with client.setup_kernel():
            for number, cell in enumerate(notebook.cells):
                client.execute_cell(cell, number)
                if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
                    return time.perf_counter() - start
    raise RuntimeError(f"lesson {lesson} shows no figure")


def start_part(rounds: int) -> list[Row]:
    """Measure how long imports take, and a reader's wait for the first figure of lesson 02."""
    codes = {"python alone": "pass"}
    codes |= {code: code for code in ("import advlab", "import torch", "import advlab.lab")}
    ways = {
        name: Way(partial(subprocess.run, [sys.executable, "-c", code], check=True))
        for name, code in codes.items()
    }
    rows = compare("start", "a process", ways, rounds, "s")
    # Timed by itself: what the kernel does after the figure is not the reader's wait.
    waits = {"to the first figure": [seconds_to_first_figure("02_fgsm") for _ in range(3)]}
    way = Way(lambda: None, target=10.0, target_of="at most")
    return rows + to_rows("start", "lesson 02, fresh kernel", dict.fromkeys(waits, way), waits, "s")


FIRST_RUN = (sys.executable, "-m", "advlab", "run", "--dataset", "shapes10", "--output-dir")


def first_run_part(command: Sequence[str] = FIRST_RUN) -> list[Row]:
    """Measure what `make run` takes after the installation, on a machine without CIFAR-10.

    Args:
        command: Runs the lessons into the folder that follows; they appear there one by one.

    Raises:
        CalledProcessError: if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, start = Path(folder) / "run", time.time()
        with environment(ADVLAB_CACHE=str(Path(folder) / "cache")):
            subprocess.run([*command, str(output)], stdout=subprocess.DEVNULL, check=True)
        took = time.time() - start
        finished = [path.stat().st_mtime for path in output.glob("notebooks/*.ipynb")]
    what = f"all {len(finished)} lessons on Shapes-10"
    waits = {"to the first finished lesson": min(finished) - start, "all": took}
    return [once("first run", what, way, seconds, "s") for way, seconds in waits.items()]


def explorer_part(networks: dict[str, nn.Module], images: ImageData) -> list[Row]:
    """Measure what the attack explorer computes for one move of its slider, under FGSM.

    That is the attack, the answers of two networks and three pictures; the browser's part is not.
    """
    explorer, sizes = AttackExplorer(networks, images, eps=0), iter(range(1, 31))

    def move() -> None:
        explorer.eps.value = next(sizes)

    ways = {"one move of the slider": Way(move, target=0.15, target_of="at most")}
    return compare("explorer", "FGSM, two networks", ways, 29, "s")
