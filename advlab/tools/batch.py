"""Run the lessons in order with papermill, and set the results beside the paper's."""

import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import papermill
from filelock import FileLock, Timeout
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.table import Table
from traitlets.config import Config

from advlab import evaluation, files, paper, session
from advlab.checkpoints import read_metadata
from advlab.tools import readme
from advlab.tools.memory import PeakMemory
from advlab.tools.train import KEEP_MEMORY, cores, environment, open_zoo, train_models

# The lessons that rebuild the paper; the others go beyond it and need the robust models.
PAPER_LESSONS = ("01", "02", "03", "04", "05")


class BatchError(RuntimeError):
    """A batch run that cannot start or go on; the message says why and what to do."""


def lesson_files() -> dict[str, Path]:
    """Return the lessons in order, by name ("01_baseline").

    Raises:
        BatchError: outside a clone of the repository, which holds the notebooks.
    """
    folder = files.home() / "notebooks"
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise BatchError(f"no lessons in {folder}; run this in a clone of the repository")
    return {path.stem: path for path in found}


def solution_files() -> dict[str, Path]:
    """Return the solutions of the lessons' exercises, by name ("solutions/01_baseline")."""
    found = sorted((files.home() / "notebooks" / "solutions").glob("[0-9][0-9]_*.ipynb"))
    return {f"solutions/{path.stem}": path for path in found}


def choose_lessons(names: Iterable[str]) -> dict[str, Path]:
    """Return the notebooks called `names`; all lessons for none.

    Args:
        names: Lessons ("02_fgsm", "02" or "fgsm"), or "solutions" for those of the exercises.

    Raises:
        BatchError: for an unknown name.
    """
    lessons, solutions = lesson_files(), solution_files()
    chosen = set()
    for name in names:
        short = name.removesuffix(".ipynb")
        matches = [stem for stem in lessons if short in (stem, stem[:2], stem[3:])]
        matches += [stem for stem in solutions if short in (stem, "solutions")]
        if not matches:
            known = ", ".join([*lessons, "solutions"])
            raise BatchError(f"unknown lesson {name!r}; there are {known}")
        chosen.update(matches)
    chosen = chosen or set(lessons)
    return {name: path for name, path in (lessons | solutions).items() if name in chosen}


def check_parameters(lessons: dict[str, Path], parameters: dict[str, Any]) -> None:
    """Refuse parameters that no chosen lesson has (papermill itself would only warn).

    Raises:
        BatchError: names the parameter and those that exist.
    """
    known = {name for path in lessons.values() for name in papermill.inspect_notebook(str(path))}
    for name in parameters:
        if name not in known:
            raise BatchError(
                f"unknown parameter {name!r}; the lessons have {', '.join(sorted(known))}"
            )


def kernel_config(folder: str) -> Config:
    """Let a kernel be spoken to through files in `folder`, where the system has such sockets.

    Elsewhere (Windows) it is the loopback network, which is jupyter's default everywhere. The
    folder must be the run's own: kernels that share one would hear each other.
    """
    if os.name != "posix":
        return Config()
    return Config(KernelManager={"transport": "ipc", "connection_file": f"{folder}/kernel.json"})


def _execute(name: str, source: Path, target: Path, parameters: dict[str, Any], label: str) -> None:
    own = {k: v for k, v in parameters.items() if k in papermill.inspect_notebook(str(source))}
    partial_path = target.with_suffix(".partial.ipynb")
    try:
        with tempfile.TemporaryDirectory(prefix="advlab-") as folder:
            papermill.execute_notebook(
                source,
                partial_path,
                own,
                config=kernel_config(folder),
                progress_bar={
                    "desc": label,
                    "bar_format": "{desc} |{bar:24}| {n_fmt}/{total_fmt} cells, {elapsed}",
                },
            )
    except PapermillExecutionError as error:
        raise BatchError(
            f"lesson {name} failed in cell {error.exec_count}:\n{error}\n"
            f"The partly executed notebook: {partial_path}\n"
            "After mending, go on from there with --resume"
        ) from error
    partial_path.replace(target)


def run(
    names: Iterable[str] = (),
    *,
    profile: str = "auto",
    dataset: str = "auto",
    data_dir: str = "auto",
    output_dir: str = "auto",
    seed: int = 0,
    parameters: dict[str, Any] | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> Path:
    """Train what is missing, run the lessons, print the summary.

    Args:
        names: As in `choose_lessons`.
        profile, dataset, data_dir, output_dir, seed: As in `session.start`.
        parameters: More parameters of the lessons.
        resume: Go on after the last lesson that the folder's earlier run finished.
        console: Where to print.

    Returns:
        The output folder: notebooks/, figures/ and run.json.

    Raises:
        BatchError: for an unknown lesson or parameter, a failed lesson, a folder in use, or a
            resume with other settings.
    """
    console = console or Console()
    parameters = parameters or {}
    lessons = choose_lessons(names)
    check_parameters(lessons, parameters)
    profile = session.setting(profile, "ADVLAB_PROFILE", "lesson")
    session.check_profile(profile)
    dataset, root = session.resolve_data(dataset, data_dir)
    chosen = session.setting(output_dir, "ADVLAB_OUTPUT", "")
    output = Path(chosen or session.default_output(profile, dataset)).expanduser().absolute()
    for name in lessons:
        files.make_folder((output / "notebooks" / name).parent)
    if dataset == "shapes10":
        console.rule("[bold]Shapes-10 stands in for CIFAR-10")
        console.print(
            "CIFAR-10 is neither here nor to be downloaded (or Shapes-10 was asked for). The "
            "lessons run on the\nbuilt-in Shapes-10; nothing compares with the paper. README.md, "
            "section Data, says how to point at CIFAR-10."
        )
    try:
        with (
            FileLock(output / ".lock", timeout=0),
            PeakMemory() as memory,
            environment(
                **KEEP_MEMORY,
                ADVLAB_PROFILE=profile,
                ADVLAB_DATASET=dataset,
                ADVLAB_OUTPUT=str(output),
                **({"ADVLAB_DATA": str(root.absolute())} if root else {}),
            ),
        ):
            settings = {"profile": profile, "dataset": dataset, "seed": seed, **parameters}
            record = _open_record(output, settings, resume)
            numbers = {path.stem[:2] for path in lessons.values()}
            _train(profile, dataset, seed, root, output, record, numbers)
            # Nothing is injected for the default: a plain run leaves the lessons as written.
            given = {**parameters, **({"seed": seed} if seed else {})}
            _run_lessons(lessons, output, given, record, console)
        record["peak_mb"] = max(round(memory.megabytes), record.get("peak_mb", 0))
        _write_record(record, output)
    except Timeout as error:
        raise BatchError(
            f"another run is writing to {output}; wait for it, or choose another --output-dir"
        ) from error
    print_summary(output, console)
    return output


def _open_record(output: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Return the run's record: its settings, and the seconds of each finished part."""
    path = output / "run.json"
    if resume and path.is_file():
        record = json.loads(path.read_text())
        if record["settings"] != settings:
            raise BatchError(
                f"--resume: the run in {output} had the settings {record['settings']}, not "
                f"{settings}; repeat those, or leave --resume out"
            )
        return record
    return {
        "settings": settings,
        "machine": machine(),
        "processes": cores(),
        "seconds": {},
    }


def _note(record: dict[str, Any], output: Path, part: str, seconds: float) -> None:
    record["seconds"][part] = round(seconds, 1)
    _write_record(record, output)


def _write_record(record: dict[str, Any], output: Path) -> None:
    files.write_bytes(output / "run.json", json.dumps(record, indent=2).encode())


def _train(
    profile: str,
    dataset: str,
    seed: int,
    root: Path | None,
    output: Path,
    record: dict[str, Any],
    numbers: set[str],
) -> None:
    start = time.perf_counter()
    make_zoo = partial(open_zoo, profile, dataset, seed, str(root or "auto"), str(output))
    settings = session.settings_of(profile, dataset)
    wanted = settings.models()
    if not numbers <= set(PAPER_LESSONS):
        wanted += settings.robust_models()
    if train_models(make_zoo, wanted):
        earlier = record["seconds"].get("training", 0)
        _note(record, output, "training", earlier + time.perf_counter() - start)


def _run_lessons(
    lessons: dict[str, Path],
    output: Path,
    parameters: dict[str, Any],
    record: dict[str, Any],
    console: Console,
) -> None:
    logging.getLogger("papermill").setLevel(logging.ERROR)
    for number, (name, source) in enumerate(lessons.items(), 1):
        target = output / "notebooks" / f"{name}.ipynb"
        label = f"[{number}/{len(lessons)}] {name:<28}"
        if name in record["seconds"] and target.is_file():
            console.print(f"{label} done before", markup=False)
            continue
        start = time.perf_counter()
        _execute(name, source, target, parameters, label)
        _note(record, output, name, time.perf_counter() - start)


def read_tables(output: Path) -> pd.DataFrame | None:
    """Return the rows of Tables 1 and 2 that lesson 04 wrote into `output`; None if it did not."""
    paths = [output / "figures" / name for name in readme.TABLES.values()]
    if not all(path.is_file() for path in paths):
        return None
    return pd.concat([pd.read_csv(path) for path in paths], ignore_index=True)


def print_summary(output: Path, console: Console) -> None:
    """Print Tables 1 and 2 (beside the paper's where that is fair) and where everything lies."""
    rows = read_tables(output)
    if rows is not None:
        fair = set(rows["data"]) == {"CIFAR-10"} and set(rows["recipe"]) <= {"paper", "fast"}
        for number, arch in enumerate(readme.TABLES, 1):
            console.print(_summary_table(rows[rows["architecture"] == arch], arch, number, fair))
        if fair:
            gap = paper.compare(rows)["difference"].abs()
            console.print(
                f"{len(gap)} cells: mean absolute difference {gap.mean():.2f} points, "
                f"largest {gap.max():.2f}."
            )
        else:
            what = f"{rows['data'].iloc[0]}, recipe {rows['recipe'].iloc[0]}"
            console.print(f"These are numbers of {what}; they compare with nothing in the paper.")
    for folder, what in (("notebooks", "executed notebooks"), ("figures", "figures and tables")):
        console.print(f"{what:<20} {output / folder}", soft_wrap=True, markup=False)


def _summary_table(rows: pd.DataFrame, arch: str, number: int, fair: bool) -> Table:
    first = rows.iloc[0]
    title = (
        f"Table {number}: {arch}, accuracy % on {first['n']:,} {first['data']} test images, FGSM "
        f"from the {first['source']}, per-image statistics, seed {first['seed']}"
        + (" (the paper's in brackets)" if fair else "")
    )
    # 80 columns, so that a row stays a line in any terminal.
    table = Table(
        title=f"\n{title}", title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("trained", no_wrap=True)
    for eps in paper.TEST_EPS:
        table.add_column(f"eps {eps:g}", justify="right", no_wrap=True)
    for train_eps, part in rows.groupby("train_eps"):
        published = paper.TABLES[arch].get(train_eps, ())
        cells = [f"{100 * value:.1f}" for value in part.sort_values("test_eps")["accuracy"]]
        if fair:
            cells = [f"{ours} ({p:.1f})" for ours, p in zip(cells, published, strict=True)]
        table.add_row(f"{train_eps:g}" if train_eps else "baseline", *cells)
    return table


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


def retrain(*, resume: bool = False, console: Console | None = None) -> None:
    """Train everything from nothing by the paper's recipe and refresh the repository in place.

    Models, tables and figures are made in outputs/paper-cifar10 and moved into data/checkpoints,
    notebooks and figures only when all of them are there.

    Args:
        resume: Keep the models and lessons that an interrupted retraining finished.
        console: Where to print.

    Raises:
        BatchError: as `run`.
        DataError: if there is no CIFAR-10: nothing computed on other data belongs in those folders.
    """
    console = console or Console()
    output = session.default_output("paper", "cifar10")
    if not resume and output.exists():
        shutil.rmtree(output)
    everything = [*lesson_files(), *solution_files()]
    place = {"profile": "paper", "dataset": "cifar10", "output_dir": str(output)}
    run(everything, resume=resume, console=console, **place)
    _publish(output, files.home())
    times: dict[str, Any] = {"machine": machine(), "processes": cores(), "profiles": {}}
    for profile in ("lesson", "quick"):
        console.print(f"Timing profile {profile}")
        # With a cache of its own: what the run above has measured must not be found again.
        with tempfile.TemporaryDirectory() as cache, environment(ADVLAB_CACHE=cache):
            folder = run(profile=profile, dataset="cifar10", console=console)
        times["profiles"][profile] = json.loads((folder / "run.json").read_text())["seconds"]
    files.write_bytes(files.home() / "figures" / "times.json", json.dumps(times, indent=2).encode())
    readme.refresh(files.home())
    console.print("Refreshed data/checkpoints, notebooks, figures and README.md.")


def reproduce(
    seeds: int = 1,
    *,
    dataset: str = "auto",
    data_dir: str = "auto",
    resume: bool = False,
    publish: bool = False,
    console: Console | None = None,
) -> Path:
    """Rebuild the whole paper from nothing by the recipe `FAST`: models, tables, figures.

    Args:
        seeds: Trainings of the ten models of Tables 1 and 2, with seeds 0, 1 ...; from 2 on their
            tables go to figures/l04_seeds.csv as well.
        dataset, data_dir: As in `session.start`.
        resume: Keep what an interrupted run finished.
        publish: Copy the table of seeds and the run's clock into the repository's figures/.
        console: Where to print.

    Returns:
        The output folder, outputs/fast-DATASET.

    Raises:
        BatchError: as `run`, and if other data than CIFAR-10 were to be published.
        ValueError: if `seeds` is below 1.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; train with one seed at least")
    console = console or Console()
    name, root = session.resolve_data(dataset, data_dir)
    if publish and name != "cifar10":
        raise BatchError("--publish: there is no CIFAR-10, and figures/ holds nothing else")
    output = session.default_output("fast", name)
    if not resume and output.exists():
        shutil.rmtree(output)
    place = {"dataset": name, "data_dir": str(root or "auto"), "output_dir": str(output)}
    # With a cache of its own: from nothing means that no measured cell is found again.
    with environment(ADVLAB_CACHE=str(output / "cache")):
        run(PAPER_LESSONS, profile="fast", resume=resume, console=console, **place)
        if seeds > 1:
            table = pd.concat([_tables_of_seed(seed, place) for seed in range(seeds)])
            with files.atomic_write(output / "figures" / "l04_seeds.csv") as temporary:
                table.to_csv(temporary, index=False, float_format="%.6g")
    if publish:
        _publish_clock(output, files.home() / "figures")
        if seeds > 1:
            table = (output / "figures" / "l04_seeds.csv").read_bytes()
            files.write_bytes(files.home() / "figures" / "l04_seeds.csv", table)
    return output


def _publish_clock(output: Path, figures: Path) -> None:
    """Write the record of a run and the seconds of its models' trainings to reproduce.json."""
    record = json.loads((output / "run.json").read_text())
    models = sorted((output / "checkpoints").glob("*-seed0.safetensors"))
    record["models"] = {path.stem: round(read_metadata(path)["seconds"], 1) for path in models}
    files.write_bytes(figures / "reproduce.json", json.dumps(record, indent=2).encode())


def _tables_of_seed(seed: int, place: dict[str, str]) -> pd.DataFrame:
    """Train the ten models of Tables 1 and 2 with `seed`; return the tables' rows."""
    make_zoo = partial(
        open_zoo, "fast", place["dataset"], seed, place["data_dir"], place["output_dir"]
    )
    archs = sorted(paper.TABLES, reverse=True)  # the slow one first, so that the cores end together
    train_models(make_zoo, [(arch, eps) for eps in paper.TABLE_TRAIN_EPS for arch in archs])
    zoo = make_zoo()
    return pd.concat(
        [
            evaluation.accuracy_table(
                [zoo.get(arch, eps) for eps in paper.TABLE_TRAIN_EPS],
                zoo.data,
                paper.TEST_EPS,
                attack="fgsm-per-image",
                source=zoo.get(arch),
                cells=files.cache_dir() / "cells",
                progress=f"tables of seed {seed}, {arch}",
            )
            for arch in paper.TABLES
        ]
    )


def machine() -> str:
    """Return what a reader wants to know of this machine beside a time."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(": ")[2] if models else name
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _publish(output: Path, home: Path) -> None:
    """Move the results of a full run to where the repository keeps them."""
    for path in sorted((output / "checkpoints").glob("*-seed0.safetensors")):
        files.write_bytes(home / "data" / "checkpoints" / path.name, path.read_bytes())
    for path in sorted((output / "figures").iterdir()):
        files.write_bytes(home / "figures" / path.name, path.read_bytes())
    for name in lesson_files() | solution_files():
        executed = nbformat.read(output / "notebooks" / f"{name}.ipynb", as_version=4)
        text = nbformat.writes(clean_notebook(executed)) + "\n"
        files.write_bytes(home / "notebooks" / f"{name}.ipynb", text.encode())
