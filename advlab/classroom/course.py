"""The classroom: student versions of the assignments, and the grading of a folder of submissions.

The assignments are nbgrader notebooks (`notebooks/assignments`), so its own commands work on them.
`grade` is for a class whose notebooks nobody has read: workers run each in a process of its own,
its code in a sandbox, with limits of time, memory and output; no submission stops the others.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import nbformat
import pandas as pd
from distributed import Future, as_completed
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import track

from advlab import files
from advlab.classroom import (
    RefusedError,
    feedback,
    gradebooks,
    grading,
    lateness,
    merging,
    selfcheck,
    statistics,
)
from advlab.classroom.grading import Hidden
from advlab.classroom.marks import give_marks, read_marks
from advlab.classroom.submissions import CourseError, Submission, best, collect
from advlab.machine import cores
from advlab.upkeep import readme
from advlab.upkeep.cluster import Cluster, ClusterError, Scheduler, connect
from advlab.upkeep.processes import environment

P = ParamSpec("P")
LONGEST_TABLE = 40  # rows of changes that are printed


def sources() -> dict[str, Path]:
    """Return the instructor's notebook of each assignment, by name.

    Raises:
        CourseError: if neither a clone of the repository nor the installed package holds them, or
            if a notebook is not named aN/aN.ipynb.
    """
    folder = files.shipped() / "notebooks" / "assignments"
    found = {path.stem: path for path in sorted(folder.glob("*/*.ipynb"))}
    if not found:
        raise CourseError(
            f"there are no assignments in {folder}, nor in the installed package; run this in a "
            "clone of the repository, or install its whole wheel"
        )
    for name, path in found.items():
        if not re.fullmatch(r"a\d+", name) or path.parent.name != name:
            raise CourseError(f"{path}: an assignment is named a7/a7.ipynb, with a number")
    return found


def build(output: Path) -> list[Path]:
    """Write the student version of each assignment, a zip of each, and one of each solution.

    Args:
        output: Gets what `release` writes; NAME.zip, with advlab's wheel in it; and
            solutions/NAME_solution.zip.

    Returns:
        The zips.

    Raises:
        CourseError: as `release`; or if advlab cannot be packed.
    """
    released, zips, wheel = release(output), [], _wheel(output)
    for name, source in sources().items():
        zips.append(output / f"{name}.zip")
        notebook = released[name].read_bytes()
        own = {f"{name}/{name}.ipynb": notebook, f"{name}/{wheel.name}": wheel.read_bytes()}
        _pack(own, zips[-1])
        zips.append(output / "solutions" / f"{name}_solution.zip")
        # A name of its own: unpacked beside a student's work, it replaces nothing.
        _pack({f"{name}/{name}_solution.ipynb": _solution(source).encode()}, zips[-1])
    return zips


def release(output: Path) -> dict[str, Path]:
    """Write the student version of each assignment.

    Args:
        output: Gets release/NAME/NAME.ipynb and gradebook.db (nbgrader's).

    Returns:
        The notebooks, by name of the assignment.

    Raises:
        CourseError: without nbgrader; if it refuses an assignment; or for a cell that `grade` does
            not know.
    """
    grading.need_nbgrader()
    from nbgrader.apps import NbGraderAPI
    from nbgrader.utils import is_task
    from traitlets.config import Config

    files.make_folder(output)
    names, config = sources(), Config()
    for name, source in names.items():
        if any(is_task(cell) for cell in nbformat.read(source, as_version=4).cells):
            raise CourseError(f"{name}: no task cells; use a manually graded answer")
    config.CourseDirectory.course_id = "advlab"
    config.CourseDirectory.root = str(output.absolute())
    config.CourseDirectory.source_directory = str(files.shipped() / "notebooks" / "assignments")
    api = NbGraderAPI(config=config)
    released = {name: output / "release" / name / f"{name}.ipynb" for name in names}
    # nbgrader starts `alembic`, which is beside this Python and may not be on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for name, made in released.items():
        with environment(PATH=path):
            result = api.generate_assignment(name, force=True)
        if not result["success"]:
            told = "\n".join(filter(None, (result.get("error"), result.get("log"))))
            raise CourseError(f"{name}: {told}")
        notebook = nbformat.read(made, as_version=4)
        selfcheck.hand_out(notebook)
        files.write_bytes(made, nbformat.writes(notebook).encode())
    return released


def _package() -> Path:
    """Return the folder of the package's code: the clone's, or the installed one."""
    return files.PACKAGE if files.repository() is None else files.home() / "advlab"


def _pack(contents: Mapping[str, bytes], path: Path) -> None:
    """Write a zip of files, by their names in it."""
    with (
        files.atomic_write(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name, content in contents.items():
            packed.writestr(name, content)


def _solution(source: Path) -> str:
    """Return an assignment with its answers and outputs, as students may see it afterwards."""
    notebook = nbformat.read(source, as_version=4)
    merging.hide_tests(notebook)
    for cell in notebook.cells:
        cell.source = merging.without_markers(cell.source)
    return nbformat.writes(notebook)


def _wheel(output: Path) -> Path:
    """Write the package to `output` as students install it: without notebooks and models.

    The answers are among the notebooks. Without setup.py, which adds them, the wheel has none.
    """
    pack = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    with tempfile.TemporaryDirectory() as folder:  # setuptools leaves files where it works
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(files.shipped() / name, folder)
        left_out = shutil.ignore_patterns("__pycache__", files.PACKED)
        shutil.copytree(_package(), Path(folder, "advlab"), ignore=left_out)
        command = [sys.executable, "-c", pack, str(output.absolute())]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise CourseError(f"advlab cannot be packed for the students: {done.stderr.strip()}")
    return output / done.stdout.split()[-1]


def _alone(
    grade: Callable[Concatenate[Path, Path, P], pd.DataFrame],
) -> Callable[Concatenate[Path, Path, P], pd.DataFrame]:
    """Let `grade` run only where no other process grades into the same folder."""

    @wraps(grade)
    def guarded(folder: Path, output: Path, *args: P.args, **kwargs: P.kwargs) -> pd.DataFrame:
        files.make_folder(output)
        lock = FileLock(output / ".lock", timeout=0)  # it goes with its process
        try:
            held = lock.acquire()
        except Timeout as error:
            raise CourseError(
                f"another run is grading into {output}; wait for it, or choose another --output"
            ) from error
        with held:
            return grade(folder, output, *args, **kwargs)

    return guarded


@_alone
def grade(
    folder: Path,
    output: Path,
    *,
    sandbox: bool = True,
    jobs: int | None = None,
    marks: Sequence[Path] = (),
    seed: int | None = None,
    due: Path | None = None,
    exported: Sequence[Path] = (),
    keep: str = "last",
    scheduler: Scheduler | None = None,
    console: Console | None = None,
) -> pd.DataFrame:
    """Grade every submission in `folder`; what was graded before and did not change is kept.

    Args:
        folder: See `collect`.
        output: Gets grades.csv; totals.csv (see `gradebooks.totals`), and what of `exported` was
            filled in; feedback/STUDENT.html with a page per student; reading/NAME-CELL.html with a
            page per answer that a person reads (see `reading`); statistics.csv, changes.csv (see
            `statistics`) and similar.csv (see `similarity`).
        sandbox: Run each kernel under bubblewrap: no network, nothing writable but its own folder.
        jobs: Submissions at a time, on this machine's own cluster; None for one a core.
        marks: CSVs with marks given by hand (see `read_marks`); they replace the scores, and
            later ones those of earlier files.
        seed: Of what the tests draw, to repeat an earlier run; None draws one for each submission.
        due: What late work loses, see `lateness.Policy`; None for nothing.
        exported: Gradebooks of Canvas's or Moodle's to fill in, see `gradebooks.read`.
        keep: "last" or "best", of what a student handed in more than once (see `collect`).
        scheduler: See `cluster.connect`.

    Returns:
        A row per graded cell: student, assignment, cell, points, score (empty where a person
        must read the answer), reason, seed (of what the tests drew).

    Raises:
        CourseError: without nbgrader; if a worker cannot grade (see `grading.check_worker`); if
            the folder is not as in `collect`; a mark has no place; `due` or `exported` cannot be
            used; another process grades into `output`; or, when all else is written, some could
            not be graded.
        ClusterError: see `cluster.connect`.
    """
    grading.need_nbgrader()
    console, names = console or Console(), sources()
    policy = None if due is None else lateness.read(due, names)
    books = gradebooks.read(exported, _points()) if exported else []
    people = gradebooks.people(books)
    handed = collect(folder, names, people, newest=keep == "last")
    found = handed.submissions
    given = [read_marks(path) for path in marks]
    hidden = _hidden(folder, output, found) if sandbox else None
    told = [f"not a submission, left out: {line}" for line in handed.left_out]
    for line in (*told, *handed.notes, *(lateness.strangers(found, policy) if policy else ())):
        console.print(line, style="yellow", markup=False)
    graded = {
        one: grading.earlier(one, names[one.assignment], output, sandboxed=sandbox, seed=seed) or {}
        for one in found
    }
    if missing := [one for one, scores in graded.items() if not scores]:
        with connect(scheduler, min(jobs or cores(), len(missing))) as cluster:
            _check_workers(cluster, hidden)
            results = _results(cluster, missing, output, hidden, seed)
            graded |= track(results, "grading", len(missing), console=console)
    graded = best(graded)
    for one in given:
        give_marks(graded, one)
    late = lateness.judge(graded, policy, gradebooks.times(books)) if policy else {}
    table = _table(graded)
    _tell_changes(table, output, console)
    statistics.write(table, output / "grades.csv")
    for student in dict.fromkeys(table["student"]):
        own = {one: scores for one, scores in graded.items() if one.student == student}
        feedback.write(student, own, late, output)
    _tell_class(graded, table, output, console)
    gradebooks.write(books, graded, late, output, console)
    _report(graded, len(handed.left_out), output / "grades.csv", console)
    if again := [f"{one.assignment} of {one.student}" for one in graded if graded[one]["again"]]:
        raise CourseError(
            f"{len(again)} of {len(graded)} could not be graded, for no fault of their own: "
            f"{', '.join(again)}. Their scores are empty; run this again when the cause above is "
            "gone"
        )
    return table


def rehearse(
    output: Path,
    *,
    publish: bool = False,
    scheduler: Scheduler | None = None,
    console: Console | None = None,
) -> pd.DataFrame:
    """Grade the assignments' own solutions, as a class's notebooks, and tell how long each takes.

    Args:
        output: Emptied, and then what `grade` writes.
        publish: Write figures/grading.csv of the repository, and the instructor's guide, too.
        scheduler: See `cluster.connect`.

    Returns:
        A row for each assignment: assignment, points, by_hand (of these, what a person gives),
        seconds.

    Raises:
        CourseError, ClusterError: see `grade`; or if a solution does not get all its points.
        FileNotFoundError: if it was to be published outside a clone.
    """
    if publish:
        files.clone()
    shutil.rmtree(output, ignore_errors=True)
    names = sources()
    with tempfile.TemporaryDirectory() as made:
        for name, source in names.items():
            copy = Path(made, "solutions", name, source.name)
            copy.parent.mkdir(parents=True)
            shutil.copy(source, copy)
        table = grade(Path(made), output, scheduler=scheduler, console=console)
        one = {name: Submission("solutions", name, Path(made)).kept(output) for name in names}
    if (lost := table[table["score"] < table["points"]]).size:
        told = ", ".join(
            f"{row.cell} of {row.assignment} ({row.reason})" for row in lost.itertuples()
        )
        raise CourseError(f"a solution loses points: {told}. Mend the assignment before you use it")
    cells = table.assign(by_hand=table["points"].where(table["score"].isna(), 0))
    found = cells.groupby("assignment")[["points", "by_hand"]].sum().reset_index()
    took = {
        name: json.loads((kept / "scores.json").read_text(encoding="utf-8"))
        for name, kept in one.items()
    }
    found["seconds"] = [took[name]["seconds"] for name in found["assignment"]]
    if publish:
        files.write_table(files.home() / "figures" / "grading.csv", found)
        readme.refresh(files.home(), [readme.GUIDE])
    return found


def _points() -> dict[str, float]:
    """Return the points of each assignment."""
    read = {name: nbformat.read(path, as_version=4) for name, path in sources().items()}
    return {
        name: sum(result["points"] for result in merging.no_points(notebook, "").values())
        for name, notebook in read.items()
    }


def _hidden(folder: Path, output: Path, found: Sequence[Submission]) -> Hidden:
    """Return what no submission may see: the class, its grades, and all that is the user's."""
    # The clone holds the answers, in its history too.
    folders = filter(None, (files.home(), files.user_home(), folder, output))
    secrets = (*sources().values(), *(one.path for one in found))
    absolute = [tuple(path.absolute() for path in paths) for paths in (folders, secrets)]
    return Hidden(*absolute)


def _check_workers(cluster: Cluster, hidden: Hidden | None) -> None:
    for where, error in cluster.ask_all(grading.check, hidden).items():
        if error:
            raise CourseError(f"{error}" if cluster.shared else f"worker {where}: {error}")


def _results(
    cluster: Cluster,
    missing: Sequence[Submission],
    output: Path,
    hidden: Hidden | None,
    seed: int | None,
) -> Iterator[tuple[Submission, dict[str, Any]]]:
    """Yield each submission with its scores (see `grading.land`), as they come back."""
    client, names, waiting = cluster.client, sources(), iter(missing)
    sent: dict[Future, tuple[Submission, str]] = {}
    running = as_completed(loop=client.loop)
    # A whole class may be more than memory holds: no more is sent than keeps the workers busy.
    busy = 2 * sum(client.nthreads().values())
    while True:
        while len(sent) < busy and (one := next(waiting, None)):
            try:
                work = grading.pack(one, names[one.assignment], seed)
            except (OSError, RefusedError) as error:
                yield one, grading.not_graded(names[one.assignment], error)
                continue
            future = client.submit(grading.run, work, hidden, pure=False)
            sent[future] = one, work.identity(sandboxed=hidden is not None)
            running.add(future)
        if not sent:
            return
        future = next(running)
        one, identity = sent.pop(future)
        try:
            scores = grading.land(one, output, identity, cluster.result(future))
        except ClusterError:
            raise
        except Exception as error:  # no reason to stop the others
            scores = grading.not_graded(names[one.assignment], error)
        yield one, scores


def _table(graded: Mapping[Submission, dict[str, Any]]) -> pd.DataFrame:
    """Return a row per graded cell."""
    rows = [
        {
            "student": one.student,
            "assignment": one.assignment,
            "cell": cell,
            **{name: result[name] for name in ("points", "score", "reason")},
            "seed": scores.get("seed"),
        }
        for one, scores in graded.items()
        for cell, result in scores["cells"].items()
    ]
    return pd.DataFrame(rows).sort_values(["student", "assignment"], kind="stable")


def _tell_changes(table: pd.DataFrame, output: Path, console: Console) -> None:
    """Print the scores that are not those of the grades.csv that is there, and keep them."""
    try:
        found = statistics.changes(output / "grades.csv", table)
    except (OSError, ValueError) as error:
        told = f"whose score changed cannot be told: {error}"
        console.print(told, style="yellow", markup=False)
        return
    if found.empty:
        return
    when = datetime.now().astimezone().isoformat(timespec="seconds")
    statistics.keep_changes(found, output / "changes.csv", when)
    told = f"other scores than in the last run: {len(found)}, in {output / 'changes.csv'}"
    console.print(told, markup=False)
    shown = found.to_string(index=False, na_rep="-", max_rows=LONGEST_TABLE, max_colwidth=60)
    console.print(shown, markup=False)


def _tell_class(
    graded: Mapping[Submission, dict[str, Any]], table: pd.DataFrame, output: Path, console: Console
) -> None:
    """Write what is told of the whole class: its questions, what to read, what is alike."""
    from advlab.classroom import reading, similarity  # need latex2mathml

    questions = statistics.of_questions(table)
    statistics.write(questions, output / "statistics.csv")
    shown = questions.drop(columns="reason").round({"mean": 2})
    console.print(shown.to_string(index=False, na_rep="-"), markup=False)
    for path in reading.write(graded, sources(), output):
        console.print(f"to be read by a person: {path}", markup=False)
    alike = similarity.pairs(graded, sources(), output)
    statistics.write(alike, output / "similar.csv")
    if len(alike):
        told = f"pairs of answers that are much alike: {len(alike)}, in {output / 'similar.csv'}. "
        told += "That is a hint to read both, and no verdict: some things have one good answer"
        console.print(told, markup=False)


def _report(
    graded: Mapping[Submission, dict[str, Any]], left_out: int, written: Path, console: Console
) -> None:
    """Print what went wrong with whole notebooks, and how long each assignment's took."""
    for one, scores in graded.items():
        if scores["reason"]:
            line = f"{one.assignment} of {one.student}: {scores['reason']}"
            console.print(line, style="yellow", markup=False)
    console.print(f"{len(graded)} submissions graded: {written}", markup=False)
    if left_out:
        line = (
            "left out (above); a submission is STUDENT_a2.ipynb, STUDENT/a2/a2.ipynb or a download"
        )
        console.print(f"{left_out} {line}", style="yellow", markup=False)
    times = pd.DataFrame(
        {"assignment": one.assignment, "seconds": scores["seconds"]}
        for one, scores in graded.items()
    )
    seconds_of = times.groupby("assignment")["seconds"]
    summary = seconds_of.agg(submissions="count", median_s="median", longest_s="max")
    console.print(summary.reset_index().to_string(index=False), markup=False)
