"""The classroom: student versions of the assignments, and the grading of a folder of submissions.

The assignments are nbgrader notebooks (`notebooks/assignments`), so its own commands work on them.
`grade` is for a class whose notebooks nobody has read: each runs in a process of its own, its code
in a sandbox, with limits of time, memory and output, and no submission stops the others.
"""

import copy
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import file_digest, sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from rich.console import Console
from rich.progress import Progress

from advlab import files
from advlab.tools.sandbox import sandboxed
from advlab.tools.train import cores, environment

CELL_SECONDS, SECONDS, MEGABYTES = 60, 300, 8_000
HIDDEN_TESTS = re.compile("### BEGIN HIDDEN TESTS.*?### END HIDDEN TESTS", re.DOTALL)


class CourseError(RuntimeError):
    """The class cannot be graded as asked; the message says what to do."""


@dataclass(frozen=True)
class Submission:
    """A student's notebook for an assignment."""

    student: str
    assignment: str
    path: Path


def sources() -> dict[str, Path]:
    """Return the instructor's notebook of each assignment, by name.

    Raises:
        CourseError: outside a clone of the repository.
    """
    folder = files.home() / "notebooks" / "assignments"
    found = {path.stem: path for path in sorted(folder.glob("a*/a*.ipynb"))}
    if not found:
        raise CourseError(f"there are no assignments in {folder}; run this in a clone")
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
        CourseError: without nbgrader, or if it refuses an assignment.
    """
    _need_nbgrader()
    from nbgrader.apps import NbGraderAPI
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
    for name in names:
        with environment(PATH=path):
            result = api.generate_assignment(name, force=True)
        if not result["success"]:
            raise CourseError(f"{name}: {result.get('error') or result.get('log')}")
        released = output / "release" / name / f"{name}.ipynb"
        with (
            files.atomic_write(output / f"{name}.zip") as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            packed.write(released, f"{name}/{name}.ipynb")
        zips.append(output / f"{name}.zip")
    return zips


def collect(folder: Path) -> tuple[list[Submission], list[Path]]:
    """Return the submissions in `folder`, and the files that are none.

    Args:
        folder: nbgrader's layout STUDENT/NAME/NAME.ipynb, or flat: STUDENT_NAME.ipynb.

    Raises:
        CourseError: if the folder is missing, or holds no submission.
    """
    if not folder.is_dir():
        raise CourseError(f"there is no folder {folder}")
    names, found, others = sources(), [], []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() or p.is_symlink()):
        parts = path.relative_to(folder).parts
        flat = re.fullmatch(r"(.+)_(a\d+)\.ipynb", path.name)
        if path.is_symlink() or any(p.startswith(".") or not p.isprintable() for p in parts):
            others.append(path)  # could lead anywhere; or is a system's own, as "._anna_a2.ipynb"
        elif len(parts) == 3 and parts[1] in names and parts[2] == f"{parts[1]}.ipynb":
            found.append(Submission(parts[0], parts[1], path))
        elif len(parts) == 1 and flat and flat[2] in names:
            found.append(Submission(flat[1], flat[2], path))
        else:
            others.append(path)
    if not found:
        raise CourseError(
            f"{folder} holds no submission: neither STUDENT/a2/a2.ipynb nor STUDENT_a2.ipynb"
        )
    seen: set[tuple[str, str]] = set()
    for one in found:
        if (one.student, one.assignment) in seen:
            raise CourseError(f"{folder} holds {one.assignment} of {one.student} twice; remove one")
        seen.add((one.student, one.assignment))
    return found, others


def grade(
    folder: Path,
    output: Path,
    *,
    sandbox: bool = True,
    jobs: int | None = None,
    seconds: int = SECONDS,
    console: Console | None = None,
) -> pd.DataFrame:
    """Grade every submission in `folder`; what was graded before and did not change is kept.

    Args:
        folder: See `collect`.
        output: Gets grades.csv, and feedback/STUDENT.html with a page per student.
        sandbox: Run each kernel under bubblewrap: no network, nothing writable but its own folder.
        jobs: Submissions at a time; None for one a core.
        seconds: Limit for a whole submission.
        console: Where to print.

    Returns:
        A row per graded cell: student, assignment, cell, points, score (empty where a person
        must read the answer), reason.

    Raises:
        CourseError: without nbgrader; without a bubblewrap that works, unless `sandbox` is False;
            or if the folder is not as in `collect`.
    """
    _need_nbgrader()
    console = console or Console()
    if sandbox and not shutil.which("bwrap"):
        raise CourseError(
            "bubblewrap is not installed, and without it a submission could read and change this "
            "machine's files. Install it (Debian: apt install bubblewrap), or accept that with "
            "--no-sandbox"
        )
    found, others = collect(folder)
    for path in others:
        name = path.name if path.name.isprintable() else ascii(path.name)
        console.print(f"not a submission, left out: {name}", style="yellow", markup=False)
    names, parts, times = sources(), [], []
    files.make_folder(output)
    hide = None
    if sandbox:  # the clone holds the answers, in its history too
        hide = [path.absolute() for path in (files.home(), Path.home(), folder, output)]
        check_sandbox(hide)
    with (
        Progress(console=console) as progress,
        ThreadPoolExecutor(jobs or cores()) as pool,
        ExitStack() as stack,
    ):
        bar = progress.add_task("grading", total=len(found))
        tasks = {
            pool.submit(_grade_one, one, names[one.assignment], output, hide, seconds): one
            for one in found
        }
        stack.callback(pool.shutdown, cancel_futures=True)  # when it is interrupted
        for task in as_completed(tasks):
            one, scores = tasks[task], task.result()
            parts += [
                {"student": one.student, "assignment": one.assignment, "cell": cell} | result
                for cell, result in scores["cells"].items()
            ]
            times.append({"assignment": one.assignment, "seconds": scores["seconds"]})
            progress.advance(bar)
    table = pd.DataFrame(parts).sort_values(["student", "assignment"], kind="stable")
    with files.atomic_write(output / "grades.csv") as temporary:
        table.to_csv(temporary, index=False)
    for student in dict.fromkeys(table["student"]):
        _write_feedback(student, [one for one in found if one.student == student], output)
    console.print(f"{len(found)} submissions graded: {output / 'grades.csv'}", markup=False)
    seconds_of = pd.DataFrame(times).groupby("assignment")["seconds"]
    summary = seconds_of.agg(submissions="count", median_s="median", longest_s="max")
    console.print(summary.reset_index().to_string(index=False), markup=False)
    return table


def _kept(one: Submission, output: Path) -> Path:
    return output / "graded" / one.student / one.assignment


def check_sandbox(hide: Sequence[Path]) -> None:
    """Start Python under bubblewrap once.

    Raises:
        CourseError: if it cannot; with what it printed.
    """
    with _work_folder() as work:
        command = [*sandboxed(work, hide), sys.executable, "-c"]
        done = subprocess.run([*command, "import ipykernel, torch"], capture_output=True, text=True)
    if done.returncode:
        raise CourseError(f"the sandbox does not work on this machine: {done.stderr.strip()}")


@contextmanager
def _work_folder() -> Iterator[Path]:
    """Yield a folder that goes at the end, whatever was made of it meanwhile."""
    work = Path(tempfile.mkdtemp(prefix="g"))
    try:
        yield work
    finally:  # neither goes where a link leads, or minds how deep folders are nested
        subprocess.run(["chmod", "-R", "u+rwX", work], check=False, capture_output=True)
        subprocess.run(["rm", "-rf", work], check=False, capture_output=True)


def _grade_one(
    one: Submission, source: Path, output: Path, hide: Sequence[Path] | None, seconds: int
) -> dict[str, Any]:
    """Return the scores of one submission, from its folder if nothing changed since.

    `hide` are the folders that its sandbox covers; None for no sandbox.
    """
    kept = _kept(one, output)
    done = kept / "identity"
    try:
        identity = _identity(one, source, sandbox=hide is not None)
        if done.is_file() and done.read_text() == identity:
            return json.loads((kept / "scores.json").read_text())
        shutil.rmtree(kept, ignore_errors=True)
        files.make_folder(kept)
        start = time.perf_counter()
        reason = _run(one, source, kept, hide, seconds)
        took = time.perf_counter() - start
        if (kept / "scores.json").is_file():
            scores = json.loads((kept / "scores.json").read_text())
            scores["seconds"] = round(took, 1)
            files.write_bytes(kept / "scores.json", json.dumps(scores, indent=2).encode())
            files.write_bytes(done, identity.encode())
            return scores
    except OSError as error:  # cannot be read, or the disk is full: no reason to stop the others
        reason = str(error)
    # Not this submission's doing, maybe: it is tried again next time.
    done.unlink(missing_ok=True)
    blocks = [c.metadata.get("nbgrader") for c in nbformat.read(source, as_version=4).cells]
    empty = {
        block.grade_id: {"points": block.points, "score": 0, "reason": reason}
        for block in blocks
        if block and block.grade
    }
    scores = {"reason": reason, "cells": empty, "seconds": 0.0}
    files.write_bytes(kept / "scores.json", json.dumps(scores, indent=2).encode())
    return scores


def _identity(one: Submission, source: Path, *, sandbox: bool) -> str:
    """Return a hash of what a score depends on: the notebook, its source, the code that grades."""
    code = (Path(__file__), Path(__file__).with_name("run_submission.py"))
    digest = sha256(bytes([sandbox]))
    for path in (one.path, source, *code):
        with path.open("rb") as opened:
            digest.update(file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _run(
    one: Submission, source: Path, kept: Path, hide: Sequence[Path] | None, seconds: int
) -> str:
    """Run a submission; it writes its scores to the folder `kept`. Return why it could not."""
    with _work_folder() as work:
        command = [sys.executable, "-m", "advlab.tools.run_submission"]
        command += [str(p.absolute()) for p in (source, one.path, work, kept)]
        command += ["--cell-seconds", str(CELL_SECONDS), "--seconds", str(seconds)]
        command += ["--megabytes", str(MEGABYTES)]
        command += [word for path in hide or () for word in ("--hide", str(path))]
        command += [] if hide is None else ["--sandbox"]
        # It ends by itself in time, unless something is badly wrong.
        return _run_limited(command, kept / "log.txt", seconds + 120)


def _run_limited(command: Sequence[str], log: Path, seconds: int) -> str:
    """Run `command`, kill it and its children after `seconds`; return why it failed."""
    with log.open("wb") as written:
        process = subprocess.Popen(
            command, stdout=written, stderr=written, stdin=subprocess.DEVNULL, process_group=0
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"took longer than {seconds} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "" if process.returncode == 0 else "could not be run (see log.txt)"


def shown_to_student(notebook: NotebookNode) -> NotebookNode:
    """Return an executed notebook without the hidden tests, in its cells and in its tracebacks."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if HIDDEN_TESTS.search(cell.source):
            cell.source = HIDDEN_TESTS.sub("# hidden tests", cell.source)
            for output in cell.get("outputs", []):
                if output.output_type == "error":
                    output.traceback = [f"{output.ename}: {output.evalue}"]
    return notebook


def _write_feedback(student: str, submissions: Sequence[Submission], output: Path) -> None:
    """Write feedback/STUDENT.html: the scores and reasons, and each notebook as it ran."""
    parts = [f"<h1>{html.escape(student)}</h1>"]
    for one in submissions:
        kept = _kept(one, output)
        scores = json.loads((kept / "scores.json").read_text())
        earned = sum(result["score"] or 0 for result in scores["cells"].values())
        points = sum(result["points"] for result in scores["cells"].values())
        parts.append(f"<h2>{one.assignment}: {earned:g} of {points:g} points</h2>")
        parts.append(f"<p>{html.escape(scores['reason'])}</p><table>")
        for cell, result in scores["cells"].items():
            got = "-" if result["score"] is None else f"{result['score']:g}"
            reason = html.escape(result["reason"])
            parts.append(
                f"<tr><td>{cell}</td><td>{got} of {result['points']:g}</td><td>{reason}</td></tr>"
            )
        parts.append("</table>")
        if (kept / "executed.ipynb").is_file():
            try:
                executed = nbformat.read(kept / "executed.ipynb", as_version=4)
                shown, _ = HTMLExporter().from_notebook_node(shown_to_student(executed))
            except Exception as error:  # an output that nbconvert cannot draw
                shown = f"The notebook cannot be shown: {type(error).__name__}"
            frame = html.escape(shown)
            parts.append(f'<iframe sandbox srcdoc="{frame}" style="width:100%;height:80vh">')
            parts.append("</iframe>")
    title = f"<title>{html.escape(student)}</title>"
    page = f"<!doctype html><meta charset=utf-8>{title}" + "\n".join(parts)
    files.write_bytes(output / "feedback" / f"{student}.html", page.encode(errors="replace"))
