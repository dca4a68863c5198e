"""Run the lessons in order with papermill, and set the results beside the paper's."""

import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Event, Lock, Semaphore
from typing import Any

import nbformat
import pandas as pd
import papermill
import torch
from filelock import FileLock, Timeout
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from traitlets.config import Config

from advlab import datasets, files, paper
from advlab.catalogue import LESSONS
from advlab.machine import cores
from advlab.recipes import Model, profile_for
from advlab.store import code_hash
from advlab.upkeep import readme
from advlab.upkeep.cluster import Scheduler, connect
from advlab.upkeep.graph import (
    Trainings,
    missing,
    processes_for,
    run_bar,
    stopping_at_once,
    told,
    training,
)
from advlab.upkeep.kernels import OwnKernel, short_folder
from advlab.upkeep.processes import KEEP_MEMORY, PeakMemory, environment
from advlab.upkeep.tasks import Job, Options


class BatchError(RuntimeError):
    """A batch run that cannot start or go on; the message says why and what to do."""


# --- which lessons, and what they need


def lesson_files() -> dict[str, Path]:
    """Return the lessons in order, by name ("01_baseline").

    Raises:
        BatchError: if neither a clone of the repository nor the installed package holds them.
    """
    found = readme.lesson_paths(files.shipped())
    if not found:
        raise BatchError(
            f"no lessons in {files.shipped() / 'notebooks'}, nor in the installed package; run "
            "this in a clone of the repository, or install its whole wheel"
        )
    return {path.stem: path for path in found}


def solution_files() -> dict[str, Path]:
    """Return the solutions of the lessons' exercises, by name ("solutions/01_baseline")."""
    found = sorted((files.shipped() / "notebooks" / "solutions").glob("[0-9][0-9]_*.ipynb"))
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


def check_parameters(lessons: Mapping[str, Path], parameters: Mapping[str, Any]) -> None:
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


def needed_models(lessons: Mapping[str, Path], options: Options) -> list[Model]:
    """Return the models that the lessons need, baselines first, slow ones before quick ones.

    A notebook that is not in the catalogue trains what it needs itself.
    """
    settings = profile_for(options.profile, papers=datasets.are_papers(options.dataset))
    entries = [LESSONS[path.stem] for path in lessons.values() if path.stem in LESSONS]
    needed = {model for lesson in entries for model in lesson.needs(settings)}
    everything = settings.paper_models() + settings.adversarial_models()
    everything.append(("cnn", settings.noise))
    return [model for model in everything if model in needed]


# --- the record of a run, and going on from it


def machine() -> str:
    """Return what a reader wants to know of this machine beside a time."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            line
            for line in info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        name = models[0].partition(": ")[2] if models else name
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def notebook_hash(path: Path) -> str:
    """Return a hash of what a notebook says: of its cells, without their outputs."""
    cells = nbformat.read(path, as_version=4).cells
    said = [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in cells]
    return sha256(json.dumps(said).encode()).hexdigest()[:16]


def _new_record(options: Options, parameters: Mapping[str, Any]) -> dict[str, Any]:
    asked = {name: getattr(options, name) for name in ("profile", "dataset", "seed", "device")}
    code = {"torch": torch.__version__, "code of advlab": code_hash()}
    record = {
        "settings": {**asked, **parameters, **code},  # what must be the same for a run to go on
        "machine": machine(),
        "processes": cores(),
        "notebooks": {},  # what each finished lesson said
        "seconds": {},  # of each finished part
    }
    return json.loads(json.dumps(record, default=str))  # as it comes back from the file


def open_record(path: Path, fresh: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Return the record of an earlier run to go on with, or else `fresh`, written to `path`.

    Raises:
        BatchError: if the earlier run was made with other settings, code or torch, or its record is
            damaged.
    """
    if not (resume and path.is_file()):
        _write_record(fresh, path)
        return fresh
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        then, now = dict(record["settings"]), fresh["settings"]
        dict(record["notebooks"]), dict(record["seconds"])
    except (ValueError, KeyError, TypeError) as error:
        raise BatchError(
            f"--resume: {path} is damaged, or of another version of advlab ({error!r}). Delete it "
            "and start again without --resume"
        ) from error
    changed = [
        f"{name} {then.get(name, 'none')}, now {now.get(name, 'none')}"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    ]
    if changed:
        raise BatchError(
            f"--resume: the run in {path.parent} was made with {'; '.join(changed)}. Go back to "
            "that, or leave --resume out"
        )
    return record


def _write_record(record: Mapping[str, Any], path: Path) -> None:
    files.write_bytes(path, json.dumps(record, indent=2).encode())


# --- running


def kernel_config(folder: str) -> Config:
    """Let a kernel be spoken to through files in `folder`, where the system has such sockets.

    Elsewhere (Windows) it is the loopback network, which is jupyter's default everywhere. The
    folder must be the run's own: kernels that share one would hear each other.
    """
    transport = "ipc" if os.name == "posix" else "tcp"
    file = Path(folder, "kernel.json")
    return Config(KernelManager={"transport": transport, "connection_file": str(file)})


def _count_cells(notebook: Path) -> int:
    cells = nbformat.read(notebook, as_version=4).cells
    return sum(cell.cell_type == "code" for cell in cells)


def _execute(
    name: str,
    source: Path,
    target: Path,
    parameters: Mapping[str, Any],
    on_cell: Callable[..., None],
) -> None:
    own = {k: v for k, v in parameters.items() if k in papermill.inspect_notebook(str(source))}
    partial_path = target.with_suffix(".partial.ipynb")
    try:
        with (
            files.writing(partial_path),
            tempfile.TemporaryDirectory(prefix="advlab-", dir=short_folder()) as folder,
        ):
            papermill.execute_notebook(
                source,
                partial_path,
                own,
                kernel_name="python3",  # `OwnKernel` does not look it up
                kernel_manager_class=OwnKernel,
                config=kernel_config(folder),
                progress_bar=False,
                on_cell_complete=on_cell,
            )
    except PapermillExecutionError as error:
        raise BatchError(
            f"lesson {name} failed in cell {error.exec_count}:\n{error}\n"
            f"The partly executed notebook: {partial_path}"
        ) from error
    partial_path.replace(target)


def run(
    names: Iterable[str] = (),
    options: Options | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    resume: bool = False,
    alone: bool = False,
    scheduler: Scheduler | None = None,
    console: Console | None = None,
) -> Path:
    """Train what is missing, run each lesson as soon as its models are there, print the summary.

    Args:
        names: As in `choose_lessons`.
        options: Profile, data, folders, seed and device.
        parameters: More parameters of the lessons.
        resume: Go on with the folder's earlier run: a lesson that it finished is kept, unless its
            notebook was edited since.
        alone: Run the lessons after the training, one at a time: what they time is published.
        scheduler: Which cluster trains; see `cluster.connect`.

    Returns:
        The output folder: notebooks/, figures/ and run.json.

    Raises:
        BatchError: for an unknown lesson or parameter, a folder in use, or a resume with other
            settings or code; if models or lessons failed, after the others are done.
        ClusterError: as `cluster.connect`.
    """
    console, parameters = console or Console(), parameters or {}
    lessons = choose_lessons(names)
    check_parameters(lessons, parameters)
    options = (options or Options()).resolved()
    output = Path(options.output_dir)
    for name in lessons:
        files.make_folder((output / "notebooks" / name).parent)
    if not datasets.are_papers(options.dataset):
        _announce(options.dataset, console)
    path = output / "run.json"
    try:
        with FileLock(output / ".lock", timeout=0):
            record = open_record(path, _new_record(options, parameters), resume)
            with PeakMemory() as memory, environment(**KEEP_MEMORY, **options.variables()):
                # Nothing is injected for the default: a plain run leaves the lessons as written.
                given = {**parameters, **({"seed": options.seed} if options.seed else {})}
                _Batch(lessons, options, given, record, path, console).run(scheduler, alone)
            record["peak_mb"] = max(round(memory.megabytes), record.get("peak_mb", 0))
            _write_record(record, path)
    except Timeout as error:
        raise BatchError(
            f"another run is writing to {output}; wait for it, or choose another --output-dir"
        ) from error
    print_summary(output, console)
    return output


def _announce(dataset: str, console: Console) -> None:
    """Say which data stand in for the paper's."""
    console.rule(f"[bold]Not {paper.DATA}: nothing compares with the paper")
    console.print(f"The lessons run on {dataset}.", markup=False, soft_wrap=True)
    if dataset == "shapes10":
        console.print(
            f"{paper.DATA} is neither here nor to be downloaded (or Shapes-10 was asked for). "
            f"data/README.md says\nhow to point at {paper.DATA}."
        )


@dataclass(frozen=True)
class _Batch:
    """Lessons that are run into notebooks/ beside the record's `path`."""

    lessons: Mapping[str, Path]
    options: Options
    parameters: Mapping[str, Any]
    record: dict[str, Any]
    path: Path
    console: Console
    _writing: Lock = field(default_factory=Lock)

    def run(self, scheduler: Scheduler | None, alone: bool) -> None:
        """Train models and run lessons; see `run`."""
        logging.getLogger("papermill").setLevel(logging.ERROR)
        todo = {name: path for name, path in self.lessons.items() if not self._is_done(name, path)}
        start, before = time.perf_counter(), self.record.get("wall_seconds", 0)
        jobs = missing(self._jobs(self.lessons))
        turn = Semaphore(1)
        cells = sum(map(_count_cells, todo.values()))
        with ExitStack() as stack:
            trained = None
            if jobs:
                cluster = stack.enter_context(connect(scheduler, processes_for(jobs)))
                trained = stack.enter_context(training(cluster, jobs))
            bar = stack.enter_context(run_bar("lessons", cells, "cell"))
            pool = stack.enter_context(ThreadPoolExecutor(1 + len(todo)))
            begun: list[Future] = []
            stopped = stack.enter_context(stopping_at_once(trained, begun))
            models = pool.submit(self._wait_for_models, trained, jobs, start)
            if alone:
                wait([models])
            elif cores() > 1:  # beside the training one lesson at a time, for the sake of memory
                models.add_done_callback(lambda _: turn.release(cores() - 1))
            lesson = partial(self._run_lesson, trained=trained, turn=turn, stopped=stopped, bar=bar)
            begun += [pool.submit(lesson, name, path) for name, path in todo.items()]
            wait(begun)
            failed = models.result()
        self._note(wall_seconds=round(before + time.perf_counter() - start, 1))
        errors = [told(failed)] if failed else []
        errors += [str(error) for one in begun if (error := one.exception())]
        if errors:
            raise BatchError("\n".join([*errors, "What is done is kept; go on with --resume"]))

    def _jobs(self, lessons: Mapping[str, Path]) -> list[Job]:
        return [Job(self.options, *model) for model in needed_models(lessons, self.options)]

    def _is_done(self, name: str, source: Path) -> bool:
        says, said = notebook_hash(source), self.record["notebooks"].get(name)
        if says == said and (self.path.parent / "notebooks" / f"{name}.ipynb").is_file():
            self.console.print(f"{name:<28} done before", markup=False)
            return True
        if said not in (None, says):
            self.console.print(f"{name:<28} was edited since, and runs again", markup=False)
        return False

    def _wait_for_models(
        self, trained: Trainings | None, jobs: list[Job], start: float
    ) -> dict[str, BaseException]:
        if trained is None:
            return {}
        failed = trained.failed(jobs)
        trained.cluster.release()
        earlier = self.record["seconds"].get("training", 0)
        self._note("seconds", training=round(earlier + time.perf_counter() - start, 1))
        return failed

    def _run_lesson(
        self,
        name: str,
        source: Path,
        trained: Trainings | None,
        turn: Semaphore,
        stopped: Event,
        bar: tqdm,
    ) -> None:
        failed = trained.failed(self._jobs({name: source})) if trained else {}
        if failed:
            raise BatchError(f"lesson {name} was not run: there is no {', '.join(failed)}")
        with turn:
            if stopped.is_set():
                raise BatchError(f"lesson {name} was not run: the run was stopped")
            start = time.perf_counter()
            target = self.path.parent / "notebooks" / f"{name}.ipynb"
            _execute(name, source, target, self.parameters, lambda **_: bar.update())
        seconds = time.perf_counter() - start
        self._note("notebooks", **{name: notebook_hash(source)})
        self._note("seconds", **{name: round(seconds, 1)})
        bar.write(f"  {name:<36} {seconds:.0f} s")

    def _note(self, part: str = "", **values: Any) -> None:
        with self._writing:
            (self.record[part] if part else self.record).update(values)
            _write_record(self.record, self.path)


# --- the summary


def print_summary(output: Path, console: Console) -> None:
    """Print Tables 1 and 2, if lesson 04 wrote them, and where everything lies.

    The paper's numbers stand beside them where that is fair.
    """
    paths = [output / "figures" / name for name in readme.TABLES.values()]
    if all(path.is_file() for path in paths):
        rows = pd.concat(map(pd.read_csv, paths), ignore_index=True)
        fair = set(rows["data"]) == {paper.DATA} and set(rows["recipe"]) <= {"paper", "fast"}
        for arch, own in rows.groupby("architecture"):
            table = readme.paper_table(own, arch, beside=fair)
            table = table.rename(index=lambda eps: f"{eps:g}" if eps else "baseline")
            title = readme.caption(own, arch, beside=fair)
            print_table(f"\n{title}", table.rename_axis("trained"), console)
        if fair:
            console.print(readme.mean_difference(rows))
        else:
            what = f"{rows['data'].iloc[0]}, recipe {rows['recipe'].iloc[0]}"
            console.print(f"These are numbers of {what}; they compare with nothing in the paper.")
    for folder, what in (("notebooks", "executed notebooks"), ("figures", "figures and tables")):
        console.print(f"{what:<20} {output / folder}", soft_wrap=True, markup=False)


def print_table(title: str, table: pd.DataFrame, console: Console) -> None:
    """Print a table of texts, so narrow that Tables 1 and 2 take no more than 80 columns."""
    shown = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column(table.index.name, no_wrap=True)
    for name in table:
        shown.add_column(name, justify="right", no_wrap=True)
    for name, texts in table.iterrows():
        shown.add_row(name, *texts)
    console.print(shown)
