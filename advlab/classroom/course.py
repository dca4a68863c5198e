"""The classroom: student versions of the assignments, and the grading of a folder of submissions.

The assignments are nbgrader notebooks (`notebooks/assignments`), so its own commands work on them.
`grade` is for a class whose notebooks nobody has read: each runs in a process of its own, its code
in a sandbox, with limits of time, memory and output, and no submission stops the others.
"""

import os
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from rich.console import Console
from rich.progress import track

from advlab import files
from advlab.classroom import feedback, grading
from advlab.classroom.submissions import CourseError, Submission, collect, give_marks, read_marks
from advlab.machine import cores
from advlab.upkeep.processes import environment


def sources() -> dict[str, Path]:
    """Return the instructor's notebook of each assignment, by name.

    Raises:
        CourseError: outside a clone of the repository, or if a notebook is not named aN/aN.ipynb.
    """
    folder = files.home() / "notebooks" / "assignments"
    found = {path.stem: path for path in sorted(folder.glob("*/*.ipynb"))}
    if not found:
        raise CourseError(f"there are no assignments in {folder}; run this in a clone")
    for name, path in found.items():
        if not re.fullmatch(r"a\d+", name) or path.parent.name != name:
            raise CourseError(f"{path}: an assignment is named a7/a7.ipynb, with a number")
    return found


def _need_nbgrader() -> None:
    if find_spec("nbgrader") is None:
        raise CourseError('assignments need nbgrader; install it with: pip install -e ".[course]"')


def build(output: Path) -> list[Path]:
    """Write the student version of each assignment, and a zip of each.

    Args:
        output: Gets release/NAME/NAME.ipynb, NAME.zip and gradebook.db (nbgrader's).

    Returns:
        The zips.

    Raises:
        CourseError: without nbgrader; if it refuses an assignment; or for a cell that `grade` does
            not know.
    """
    _need_nbgrader()
    from nbgrader.apps import NbGraderAPI
    from nbgrader.utils import is_task
    from traitlets.config import Config

    files.make_folder(output)
    names, config = sources(), Config()
    config.CourseDirectory.course_id = "advlab"
    config.CourseDirectory.root = str(output.absolute())
    config.CourseDirectory.source_directory = str(files.home() / "notebooks" / "assignments")
    api = NbGraderAPI(config=config)
    zips = []
    # nbgrader starts `alembic`, which is beside this Python and may not be on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for name, source in names.items():
        if any(is_task(cell) for cell in nbformat.read(source, as_version=4).cells):
            raise CourseError(f"{name}: no task cells; use a manually graded answer")
        with environment(PATH=path):
            result = api.generate_assignment(name, force=True)
        if not result["success"]:
            told = "\n".join(filter(None, (result.get("error"), result.get("log"))))
            raise CourseError(f"{name}: {told}")
        released = output / "release" / name / f"{name}.ipynb"
        with (
            files.atomic_write(output / f"{name}.zip") as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            packed.write(released, f"{name}/{name}.ipynb")
        zips.append(output / f"{name}.zip")
    return zips


def grade(
    folder: Path,
    output: Path,
    *,
    sandbox: bool = True,
    jobs: int | None = None,
    marks: Path | None = None,
    console: Console | None = None,
) -> pd.DataFrame:
    """Grade every submission in `folder`; what was graded before and did not change is kept.

    Args:
        folder: See `collect`.
        output: Gets grades.csv, and feedback/STUDENT.html with a page per student.
        sandbox: Run each kernel under bubblewrap: no network, nothing writable but its own folder.
        jobs: Submissions at a time; None for one a core.
        marks: CSV with marks given by hand (see `read_marks`); they replace the scores.

    Returns:
        A row per graded cell: student, assignment, cell, points, score (empty where a person
        must read the answer), reason.

    Raises:
        CourseError: without nbgrader; without a bubblewrap that works, unless `sandbox` is False;
            if the folder is not as in `collect`; or a mark has no place.
    """
    _need_nbgrader()
    console = console or Console()
    found, others = collect(folder, sources())
    given = None if marks is None else read_marks(marks)
    hide = None
    if sandbox:  # the clone holds the answers, in its history too
        folders = filter(None, (files.home(), files.user_home(), folder, output))
        hide = [path.absolute() for path in folders]
        secrets = [*sources().values(), *(one.path for one in found)]
        grading.check_sandbox(hide, [path.absolute() for path in secrets])
    for path in others:
        name = str(path.relative_to(folder))
        name = name if name.isprintable() else ascii(name)
        console.print(f"not a submission, left out: {name}", style="yellow", markup=False)
    files.make_folder(output)
    graded = _grade_all(found, output, hide, jobs or cores(), console)
    if given is not None:
        give_marks(graded, given)
    table = _table(graded)
    with files.atomic_write(output / "grades.csv") as temporary:
        table.to_csv(temporary, index=False, encoding="utf-8-sig")  # Excel takes it for Latin else
    for student in dict.fromkeys(table["student"]):
        own = {one: scores for one, scores in graded.items() if one.student == student}
        feedback.write(student, own, output)
    _report(graded, len(others), output / "grades.csv", console)
    return table


def _grade_all(
    found: Sequence[Submission],
    output: Path,
    hide: Sequence[Path] | None,
    jobs: int,
    console: Console,
) -> dict[Submission, dict[str, Any]]:
    """Return the scores of all submissions (see `grading.grade_one`), in the order of `found`."""
    names = sources()
    graded: dict[Submission, dict[str, Any]] = {one: {} for one in found}
    with ThreadPoolExecutor(jobs) as pool, ExitStack() as stack:
        tasks = {
            pool.submit(grading.grade_one, one, names[one.assignment], output, hide): one
            for one in found
        }
        # When it is interrupted: begin no more, and do not wait for those that run.
        stack.callback(grading.kill_running)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for task in track(as_completed(tasks), "grading", len(tasks), console=console):
            graded[tasks[task]] = task.result()
    return graded


def _table(graded: Mapping[Submission, dict[str, Any]]) -> pd.DataFrame:
    """Return a row per graded cell."""
    rows = [
        {"student": one.student, "assignment": one.assignment, "cell": cell} | result
        for one, scores in graded.items()
        for cell, result in scores["cells"].items()
    ]
    return pd.DataFrame(rows).sort_values(["student", "assignment"], kind="stable")


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
        line = "left out (above); a submission is STUDENT_a2.ipynb or STUDENT/a2/a2.ipynb"
        console.print(f"{left_out} {line}", style="yellow", markup=False)
    times = pd.DataFrame(
        {"assignment": one.assignment, "seconds": scores["seconds"]}
        for one, scores in graded.items()
    )
    seconds_of = times.groupby("assignment")["seconds"]
    summary = seconds_of.agg(submissions="count", median_s="median", longest_s="max")
    console.print(summary.reset_index().to_string(index=False), markup=False)
