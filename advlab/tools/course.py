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
import unicodedata
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from advlab.machine import cores
from advlab.tools.sandbox import sandboxed
from advlab.upkeep.processes import environment

CELL_SECONDS, SECONDS, MEGABYTES = 60, 300, 8_000
FLAT = re.compile(r"(.+)_(a\d+)\.ipynb", re.IGNORECASE)
ALONE = re.compile(r"(?:.+_)?(a\d+)\.ipynb", re.IGNORECASE)
MOODLE = re.compile(r"_\d+_assignsubmission_file(_.*)?$")  # what Moodle adds to a student's name
LONGEST = 200  # bytes of a student's name; of a file's, systems take 255
MARKS = ["student", "assignment", "cell", "score"]
# Modules that a score depends on.
GRADER = ("tools/course", "tools/run_submission", "tools/sandbox", "upkeep/processes")
HIDDEN_TESTS = re.compile("### BEGIN HIDDEN TESTS.*?### END HIDDEN TESTS", re.DOTALL)
_running: set[int] = set()  # process groups of submissions


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


def _submission(parts: Sequence[str], path: Path, names: Collection[str]) -> Submission | None:
    """Return whose notebook lies at `path`, with the names `parts` below the class's folder."""
    student = assignment = ""
    if len(parts) == 1 and (found := FLAT.fullmatch(parts[0])):
        student, assignment = found[1], found[2]
    elif len(parts) == 2 and MOODLE.search(parts[0]) and (found := ALONE.fullmatch(parts[1])):
        student, assignment = parts[0], found[1]
    elif len(parts) == 3 and parts[2].lower() == f"{parts[1].lower()}.ipynb":
        student, assignment = parts[0], parts[1]
    # Systems write one name in two ways: "ö", or "o" and two dots.
    student = unicodedata.normalize("NFC", MOODLE.sub("", student))
    # A spreadsheet would compute what begins as a formula.
    if not student or student[0] in "=+-@" or len(student.encode()) > LONGEST:
        return None
    if assignment.lower() not in names:
        return None
    return Submission(student, assignment.lower(), path)


def collect(folder: Path) -> tuple[list[Submission], list[Path]]:
    """Return the submissions in `folder`, and the files that are none.

    Args:
        folder: nbgrader's layout STUDENT/NAME/NAME.ipynb, or flat: STUDENT_NAME.ipynb; or what
            Moodle's "download all submissions" makes of either. Case does not matter for NAME.

    Raises:
        CourseError: if the folder is missing, or holds no submission, or one twice.
    """
    if not folder.is_dir():
        raise CourseError(f"there is no folder {folder}")
    names, found, others = sources(), [], []
    for path in _files_below(folder, others):
        parts = path.relative_to(folder).parts
        # A link could lead anywhere; hidden files are a system's own, as "._anna_a2.ipynb".
        if path.is_symlink() or any(p.startswith(".") or not p.isprintable() for p in parts):
            others.append(path)
        elif one := _submission(parts, path, names):
            found.append(one)
        else:
            others.append(path)
    if not found:
        raise CourseError(
            f"{folder} holds no submission: neither STUDENT/a2/a2.ipynb nor STUDENT_a2.ipynb"
        )
    seen: dict[tuple[str, str], Path] = {}
    for one in found:
        first = seen.setdefault((one.student, one.assignment), one.path)
        if first != one.path:
            raise CourseError(
                f"{one.assignment} of {one.student} is there twice: {first} and {one.path}; remove "
                "one, or give it another name if they are two students"
            )
    return found, others


def _files_below(folder: Path, unreadable: list[Path]) -> list[Path]:
    """Return all files and links below `folder`; add the folders that cannot be read."""

    def note(error: OSError) -> None:
        unreadable.append(Path(error.filename))

    found = []
    for root, folders, names in os.walk(folder, onerror=note):
        below = [Path(root, name) for name in (*names, *folders)]
        found += [path for path in below if path.is_symlink() or not path.is_dir()]
    return sorted(found)


def read_marks(path: Path) -> pd.DataFrame:
    """Return the marks that a person gave: a row for a cell, with the columns `MARKS`.

    Raises:
        CourseError: if it cannot be read, or has other columns or a score that is no number.
    """
    try:
        # A student may be called None.
        marks = pd.read_csv(
            path, dtype={"student": str}, keep_default_na=False, na_values={"score": ""}
        )[MARKS]
        marks["score"] = marks["score"].astype(float)
    except (OSError, ValueError, KeyError) as error:
        raise CourseError(
            f"cannot read {path}: {error}; it needs the columns {', '.join(MARKS)}"
        ) from error
    return marks


def _mark(graded: Mapping[Submission, dict[str, Any]], marks: pd.DataFrame) -> None:
    """Put `marks` into the scores, in place."""
    cells = {(one.student, one.assignment): scores["cells"] for one, scores in graded.items()}
    for row in marks.itertuples(index=False):
        result = cells.get((row.student, row.assignment), {}).get(row.cell)
        told = f"the mark {row.score:g} for {row.cell} of {row.assignment} of {row.student}"
        if result is None:
            raise CourseError(f"{told}: there is no such cell in this folder")
        if not 0 <= row.score <= result["points"]:
            raise CourseError(f"{told}: the cell has 0 to {result['points']:g} points")
        result.update(score=row.score, reason="marked by hand")


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
        console: Where to print.

    Returns:
        A row per graded cell: student, assignment, cell, points, score (empty where a person
        must read the answer), reason.

    Raises:
        CourseError: without nbgrader; without a bubblewrap that works, unless `sandbox` is False;
            if the folder is not as in `collect`; or a mark has no place.
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
    given = None if marks is None else read_marks(marks)
    for path in others:
        name = str(path.relative_to(folder))
        name = name if name.isprintable() else ascii(name)
        console.print(f"not a submission, left out: {name}", style="yellow", markup=False)
    files.make_folder(output)
    hide = None
    if sandbox:  # the clone holds the answers, in its history too
        hide = [path.absolute() for path in (files.home(), Path.home(), folder, output)]
        check_sandbox(hide)
    names, graded = sources(), {one: {} for one in found}
    with (
        Progress(console=console) as progress,
        ThreadPoolExecutor(jobs or cores()) as pool,
        ExitStack() as stack,
    ):
        bar = progress.add_task("grading", total=len(found))
        tasks = {
            pool.submit(_grade_one, one, names[one.assignment], output, hide): one for one in found
        }
        # When it is interrupted: begin no more, and do not wait for those that run.
        stack.callback(_kill_running)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for task in as_completed(tasks):
            graded[tasks[task]] = task.result()
            progress.advance(bar)
    if given is not None:
        _mark(graded, given)
    table = pd.DataFrame(
        {"student": one.student, "assignment": one.assignment, "cell": cell} | result
        for one, scores in graded.items()
        for cell, result in scores["cells"].items()
    ).sort_values(["student", "assignment"], kind="stable")
    with files.atomic_write(output / "grades.csv") as temporary:
        table.to_csv(temporary, index=False, encoding="utf-8-sig")  # Excel takes it for Latin else
    for student in dict.fromkeys(table["student"]):
        own = {one: scores for one, scores in graded.items() if one.student == student}
        _write_feedback(student, own, output)
    _report(graded, len(others), output / "grades.csv", console)
    return table


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
    one: Submission, source: Path, output: Path, hide: Sequence[Path] | None
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
        reason = _run(one, source, kept, hide)
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
    return {"reason": reason, "cells": empty, "seconds": 0.0}


def _identity(one: Submission, source: Path, *, sandbox: bool) -> str:
    """Return a hash of what a score depends on: the notebook, its source, the code that grades."""
    code = [Path(__file__).parents[1] / f"{name}.py" for name in GRADER]
    digest = sha256(bytes([sandbox]))
    for path in (one.path, source, *code):
        with path.open("rb") as opened:
            digest.update(file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _run(one: Submission, source: Path, kept: Path, hide: Sequence[Path] | None) -> str:
    """Run a submission; it writes its scores to the folder `kept`. Return why it could not."""
    with _work_folder() as work:
        command = [sys.executable, "-m", "advlab.tools.run_submission"]
        command += [str(p.absolute()) for p in (source, one.path, work, kept)]
        command += ["--cell-seconds", str(CELL_SECONDS), "--seconds", str(SECONDS)]
        command += ["--megabytes", str(MEGABYTES)]
        command += [word for path in hide or () for word in ("--hide", str(path))]
        command += [] if hide is None else ["--sandbox"]
        # It ends by itself in time, unless something is badly wrong.
        return _run_limited(command, kept / "log.txt", SECONDS + 120)


def _run_limited(command: Sequence[str], log: Path, seconds: int) -> str:
    """Run `command`, kill it and its children after `seconds`; return why it failed."""
    with log.open("wb") as written:
        process = subprocess.Popen(
            command, stdout=written, stderr=written, stdin=subprocess.DEVNULL, process_group=0
        )
        _running.add(process.pid)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"took longer than {seconds} s"
        finally:
            _running.discard(process.pid)
            _kill(process.pid)
            process.wait()
    return "" if process.returncode == 0 else "could not be run (see log.txt)"


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _kill_running() -> None:
    for group in tuple(_running):
        _kill(group)


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


def points_of(results: Collection[dict[str, Any]]) -> str:
    """Return in words what an assignment earned: "14 of 14 points, and 10 to be read"."""
    read = [result for result in results if result["score"] is not None]
    earned, of = sum(r["score"] for r in read), sum(r["points"] for r in read)
    open_ = sum(result["points"] for result in results) - of
    return f"{earned:g} of {of:g} points" + (f", and {open_:g} to be read" if open_ else "")


def _write_feedback(
    student: str, graded: Mapping[Submission, dict[str, Any]], output: Path
) -> None:
    """Write feedback/STUDENT.html: the scores and reasons, and each notebook as it ran."""
    parts = [f"<h1>{html.escape(student)}</h1>"]
    for one, scores in graded.items():
        kept = _kept(one, output)
        parts.append(f"<h2>{one.assignment}: {points_of(scores['cells'].values())}</h2>")
        parts.append(f"<p>{html.escape(scores['reason'])}</p><table>")
        for cell, result in scores["cells"].items():
            got = "-" if result["score"] is None else f"{result['score']:g}"
            reason = html.escape(result["reason"] if result["reason"] != scores["reason"] else "")
            parts.append(
                f"<tr><td>{cell}</td><td>{got} of {result['points']:g}</td><td>{reason}</td></tr>"
            )
        parts.append("</table>")
        if (kept / "executed.ipynb").is_file():
            try:
                executed = nbformat.read(kept / "executed.ipynb", as_version=4)
                if not executed.cells:  # it was refused
                    continue
                shown, _ = HTMLExporter().from_notebook_node(shown_to_student(executed))
            except Exception as error:  # an output that nbconvert cannot draw
                shown = f"The notebook cannot be shown: {type(error).__name__}"
            frame = html.escape(shown)
            parts.append(f'<iframe sandbox srcdoc="{frame}" style="width:100%;height:80vh">')
            parts.append("</iframe>")
    title = f"<title>{html.escape(student)}</title><style>td {{ white-space: nowrap }}</style>"
    page = f"<!doctype html><meta charset=utf-8>{title}" + "\n".join(parts)
    files.write_bytes(output / "feedback" / f"{student}.html", page.encode(errors="replace"))
