"""Make everything anew and put it where the repository keeps it: models, notebooks, figures.

Neither command reads a cache of the user's: what was measured before must not be found again.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
from rich.console import Console

from advlab import datasets, files, lab
from advlab.checkpoints import read_metadata
from advlab.machine import cores
from advlab.upkeep import readme, sweep
from advlab.upkeep.cluster import Scheduler
from advlab.upkeep.processes import environment
from advlab.upkeep.runs import BatchError, lesson_files, machine, run, solution_files
from advlab.upkeep.tasks import Options

PAPER_LESSONS = ("01", "02", "03", "04", "05")  # those that rebuild the paper


def clean_notebook(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return an executed notebook as it is committed: outputs, but no traces of the run.

    Papermill's own records and time stamps go, and so do the overwritten states of progress bars.
    A widget's state dies with its kernel; its picture stays.
    """
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution", "collapsed"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if "outputs" in cell:
            cell.outputs = _settled(cell.outputs)
    return notebook


def _settled(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Join the pieces of each text stream and keep what a terminal would show at the end."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == "stream" == last.output_type and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    for output in joined:
        if output.output_type == "stream":
            lines = output.text.split("\n")
            output.text = "\n".join(line.rpartition("\r")[2] for line in lines)
        elif "data" in output:
            output.data.pop("application/vnd.jupyter.widget-view+json", None)
    return [output for output in joined if output.get("text", "x").strip()]


def retrain(
    *,
    resume: bool = False,
    scheduler: Scheduler | None = None,
    console: Console | None = None,
) -> None:
    """Train everything from nothing by the paper's recipe and refresh the repository in place.

    Models, tables and figures are made in outputs/paper-cifar10, with a cache there, and moved into
    data/checkpoints, notebooks and figures only when all of them are there.

    Args:
        resume: Keep the models and lessons that an interrupted retraining finished.
        scheduler: Which cluster trains; see `cluster.connect`.

    Raises:
        BatchError: as `runs.run`.
        FileNotFoundError: outside a clone of the repository.
        DataError: if there is no CIFAR-10: nothing computed on other data belongs in those folders.
    """
    console = console or Console()
    files.clone()
    datasets.resolve("cifar10")  # before anything is removed
    output = lab.default_output("paper", "cifar10")
    if not resume and output.exists():
        shutil.rmtree(output)
    everything = lesson_files() | solution_files()
    options = Options("paper", "cifar10", output_dir=str(output))
    with environment(ADVLAB_CACHE=str(output / "cache")):
        run(everything, options, resume=resume, alone=True, scheduler=scheduler, console=console)
    _copy((output / "checkpoints").glob("*-seed0.safetensors"), files.shipped_checkpoints())
    _copy((output / "figures").iterdir(), files.home() / "figures")
    for name in everything:
        executed = nbformat.read(output / "notebooks" / f"{name}.ipynb", as_version=4)
        text = nbformat.writes(clean_notebook(executed)) + "\n"
        files.write_bytes(files.home() / "notebooks" / f"{name}.ipynb", text.encode())
    _time_lessons({"machine": machine(), "processes": cores()}, console)
    console.print("Refreshed data/checkpoints, notebooks, figures and the pages that show them.")


def time_lessons(*, console: Console | None = None) -> None:
    """Run all lessons in the profiles `lesson` and `quick`, and write how long they took.

    The times go into figures/times.json, the headers of the lessons and the pages that show them.

    Raises:
        BatchError: as `runs.run`.
        FileNotFoundError: outside a clone of the repository.
        DataError: if there is no CIFAR-10.
    """
    files.clone()
    datasets.resolve("cifar10")
    known = (files.home() / "figures" / "times.json").read_text(encoding="utf-8")
    _time_lessons(json.loads(known), console or Console())


def _time_lessons(about: dict[str, Any], console: Console) -> None:
    """Time the lessons; `about`: where the models were trained, as times.json has it."""
    times = about | {"timed_on": machine(), "profiles": {}}
    for profile in ("lesson", "quick"):
        console.print(f"Timing profile {profile}")
        # With an empty cache: what was measured before must not be found again.
        with tempfile.TemporaryDirectory() as cache, environment(ADVLAB_CACHE=cache):
            folder = run(options=Options(profile, "cifar10"), alone=True, console=console)
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        times["profiles"][profile] = found["seconds"]
    text = json.dumps(times, indent=2) + "\n"
    files.write_bytes(files.home() / "figures" / "times.json", text.encode())
    readme.refresh_headers(files.home())
    readme.refresh(files.home())


def _copy(paths: Iterable[Path], folder: Path) -> None:
    for path in paths:
        files.write_bytes(folder / path.name, path.read_bytes())


def reproduce(
    seeds: int = 1,
    *,
    dataset: str = "auto",
    data_dir: str = "auto",
    resume: bool = False,
    publish: bool = False,
    scheduler: Scheduler | None = None,
    console: Console | None = None,
) -> Path:
    """Rebuild the whole paper from nothing by the recipe `FAST`: models, tables, figures.

    Args:
        seeds: Trainings of the ten models of Tables 1 and 2, with seeds 0, 1 ...; from 2 on their
            tables go to figures/fast_seeds.csv as well.
        dataset, data_dir: As in `lab.start`.
        resume: Keep what an interrupted run finished.
        publish: Copy the table of seeds and the run's clock, with the seconds of each model's
            training, into the repository's figures/.
        scheduler: Which cluster trains; see `cluster.connect`.

    Returns:
        The output folder, outputs/fast-DATASET.

    Raises:
        BatchError: as `runs.run`, and if other data than CIFAR-10 were to be published.
        FileNotFoundError: if it was to be published outside a clone.
        ValueError: if `seeds` is below 1.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; train with one seed at least")
    if publish:
        files.clone()
    name, root = datasets.resolve(dataset, data_dir)
    if publish and not datasets.are_papers(name):
        raise BatchError("--publish: there is no CIFAR-10, and figures/ holds nothing else")
    output = lab.default_output("fast", name)
    if not resume and output.exists():
        shutil.rmtree(output)
    options = Options("fast", name, str(root or "auto"), str(output))
    with environment(ADVLAB_CACHE=str(output / "cache")):
        run(PAPER_LESSONS, options, resume=resume, scheduler=scheduler, console=console)
        if seeds > 1:
            asked = sweep.Sweep(("fast",), tuple(range(seeds)), attacks=())
            table = sweep.run(asked, options, scheduler=scheduler, console=console)
            files.write_bytes(output / "figures" / "fast_seeds.csv", table.read_bytes())
    if publish:
        record = json.loads((output / "run.json").read_text(encoding="utf-8"))
        models = sorted((output / "checkpoints").glob("*-seed0.safetensors"))
        record["models"] = {path.stem: round(read_metadata(path)["seconds"], 1) for path in models}
        clock = files.home() / "figures" / "reproduce.json"
        files.write_bytes(clock, json.dumps(record, indent=2).encode())
        if seeds > 1:
            _copy([output / "figures" / "fast_seeds.csv"], files.home() / "figures")
    return output
