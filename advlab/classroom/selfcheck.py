"""What students ask before they hand in: would this notebook lose points, and what does it pass?

It is run as the grader runs it, on the student's own machine: without network, clone, nbgrader or
sandbox. What was handed out stands in the notebook's own metadata.
"""

import ast
import builtins
import json
import re
import symtable
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

from advlab.classroom import RefusedError, grading, merging, run_submission, sandbox
from advlab.classroom.merging import clean, grade_id, is_grade, is_locked, is_solution
from advlab.upkeep.kernels import OwnKernel

KEY = "advlab"  # of what a notebook's metadata say of the assignment
INSTALLS = re.compile(r"^\s*[%!].*\bpip\d? install", re.MULTILINE)
UNDEFINED = re.compile(r"name '(\w+)' is not defined")
SHARED = ("tmp", "dev", "proc", *sandbox.SYSTEM)  # folders that the grader has, too
MODULES = {name.replace("/", ".") for name in sandbox.OURS}  # of advlab, that the grader has
LONG = 0.5  # of a cell's time: another machine may take twice as long
# What a cell ends with that is told of otherwise: an empty answer, a question that nobody answers.
TOLD = ("NotImplementedError", "StdinNotImplementedError")


@dataclass
class Report:
    """What was found in a notebook, in sentences.

    Args:
        path: Its file.
        costs: What would cost points.
        notes: What is good to know.
        tests: What became of each cell that has points.
    """

    path: Path
    costs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tests: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = {
            "This would cost points:": self.costs,
            "Good to know:": self.notes,
            "The visible tests, as the grader would find them (it has hidden ones, too):": (
                self.tests
            ),
        }
        lines = [f"{self.path}: {'not ready yet' if self.costs else 'can be handed in'}"]
        for title, told in parts.items():
            if told:
                lines += [title, *(f"  - {line}" for line in told)]
        return "\n".join(lines)


def hand_out(released: NotebookNode) -> None:
    """Write into the metadata of a student version, in place, what was handed out."""
    cells = [
        {"cell_type": c.cell_type, "source": c.source, "nbgrader": c.metadata.nbgrader}
        for c in merging.named(released).values()
    ]
    released.metadata[KEY] = {"handed_out": cells}


def _handed_out(content: bytes) -> NotebookNode:
    """Return the student version that a file was made of.

    Raises:
        RefusedError: if the file does not say.
    """
    try:
        cells = json.loads(content.decode("utf-8-sig"))["metadata"][KEY]["handed_out"]
        made = nbformat.v4.new_notebook(
            cells=[
                merging.new_cell(cell["cell_type"], cell["source"], {"nbgrader": cell["nbgrader"]})
                for cell in cells
            ]
        )
        nbformat.validate(made)
        merging.no_points(made, "")  # which wants them all
    except Exception as error:  # an editor, or a person, may have made anything of it
        raise RefusedError(
            "it does not say what was handed out. If it is an assignment, an editor has removed "
            "that: copy your answers into the notebook that you were given, and check that one"
        ) from error
    return made


def check(path: Path) -> Report:
    """Run a notebook as the grader does, but for the hidden tests; the file is left as it is.

    Args:
        path: A student version with answers.

    Raises:
        Exception: of any kind, if no kernel can be started.
    """
    report = Report(path)
    try:
        content = _content(path)
        submitted, given = merging.read(content), _handed_out(content)
        found, _ = merging.match(given, submitted)
        merged = merging.merge(deepcopy(given), submitted)
    except (RefusedError, OSError) as error:
        report.costs.append(f"It cannot be graded: {error}.")
        return report
    names = {id(cell): name for name, cell in found.items()}
    places = {
        id(cell): _place(number, names.get(id(cell)), cell)
        for number, cell in enumerate(submitted.cells, 1)
    }
    where = [
        places.get(id(found.get(name := grade_id(cell) or "", cell)), f"The cell {name}")
        for cell in merged.cells
    ]
    _compare(given, found, places, report)
    theirs = [name for name, cell in merging.named(given).items() if is_locked(cell)]
    for cell in submitted.cells:
        if cell.cell_type == "code" and names.get(id(cell)) not in theirs:
            _read(cell.source, places[id(cell)], report)
    executed, scores = _run(given, content)
    _judge(executed, where, scores, report)
    _score(given, scores, report)
    return report


def _content(path: Path) -> bytes:
    """Return what a file holds.

    Raises:
        OSError: if it cannot be read.
        RefusedError: if the grader would not read it.
    """
    size, largest = path.stat().st_size / 1e6, grading.LARGEST_FILE / 1e6
    if size > largest:
        raise RefusedError(
            f"the file has {size:.0f} MB, and more than {largest:.0f} MB are refused. Clear its "
            "outputs, and save it"
        )
    return path.read_bytes()


def _place(number: int, name: str | None, cell: NotebookNode) -> str:
    """Return how a cell is called, at the beginning of a sentence."""
    first = next(filter(None, map(str.strip, cell.source.splitlines())), "empty")
    return f"Cell {number} ({name or clean(first)[:40]})"


def _compare(
    given: NotebookNode,
    found: Mapping[str, NotebookNode],
    places: Mapping[int, str],
    report: Report,
) -> None:
    """Report what became of the cells that were handed out."""
    for name, cell in merging.named(given).items():
        own, put_back = found.get(name), "the grader puts back what was handed out"
        if merging.by_hand(cell):
            continue  # a person reads it, and what stands behind it
        if is_solution(cell):
            if own is None:
                report.costs.append(f"The cell {name}, which is for your answer, is missing.")
            elif _is_empty(cell, own):
                report.costs.append(f"{places[id(own)]} holds no answer yet.")
        elif own is None:
            report.notes.append(f"The cell {name} is missing; {put_back}.")
        elif own.source.split() != cell.source.split():
            what = "tests" if is_grade(cell) else "what is given"
            report.notes.append(f"{places[id(own)]} holds {what}, and was changed; {put_back}.")


def _is_empty(given: NotebookNode, own: NotebookNode) -> bool:
    same = own.source.split() in ([], given.source.split())
    return same or "raise NotImplementedError" in own.source


def _read(source: str, place: str, report: Report) -> None:
    """Report what a student's code does that is otherwise where it is graded."""
    if INSTALLS.search(source):
        report.notes.append(f"{place} installs packages, which does nothing where it is graded.")
    plain = TransformerManager().transform_cell(source)  # of %magics and !commands
    try:
        tree = ast.parse(plain)
    except (SyntaxError, ValueError):
        return  # running it tells why
    report.costs += [f"{place} {told}" for told in dict.fromkeys(_asks_for(tree))]
    if taken := sorted(name for name in _binds(source) if hasattr(builtins, name)):
        report.notes.append(
            f"{place} gives {', '.join(taken)} another meaning than Python does. Where tests run, "
            "Python's counts; choose another name."
        )


def _binds(source: str) -> set[str]:
    """Return the names to which a cell gives a meaning outside its functions."""
    try:
        plain = TransformerManager().transform_cell(source)
        symbols = symtable.symtable(plain, "cell", "exec").get_symbols()
    except (SyntaxError, ValueError):
        return set()
    bound = [s for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace()]
    return {symbol.get_name() for symbol in bound if symbol.get_name()[0] != "_"}


def _asks_for(tree: ast.AST) -> Iterator[str]:
    """Yield what code asks for that is not there where it is graded."""
    for node in ast.walk(tree):
        modules = []
        match node:
            case ast.Call(func=ast.Name(id="input")):
                yield "asks with input(); nobody answers where it is graded."
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module="advlab", names=names):
                modules = [f"advlab.{alias.name}" for alias in names]
            case ast.ImportFrom(module=str(name)):
                modules = [name]
            case ast.Constant(value=str(text)) if _is_elsewhere(text):
                yield f"names {clean(text)}, which is on your machine and not on the grader's."
        for name in modules:
            ours = name.startswith("advlab.") and name.removeprefix("advlab.") not in MODULES
            if ours or name.startswith("google.colab"):
                yield f"imports {name}, which the grader does not have."


def _is_elsewhere(text: str) -> bool:
    """Return whether a text names a file that is here, and not where notebooks are graded."""
    try:
        path = Path(text).expanduser()
        shared = len(path.parts) < 2 or path.parts[1] in SHARED
        return path.is_absolute() and not shared and path.exists()
    except (OSError, RuntimeError, ValueError):  # it is too long, say
        return False


def _run(given: NotebookNode, content: bytes) -> tuple[NotebookNode, dict[str, Any]]:
    """Run what the grader would run, in a folder that is as empty as the grader's."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as made, redirect_stdout(StringIO()):
        empty = Path(made, "empty")
        empty.mkdir()
        return run_submission.score(
            deepcopy(given),
            content,
            Path(made),
            seed=0,
            km=OwnKernel(connection_file=str(Path(made, "kernel.json"))),
            sandboxed=False,
            cell_seconds=grading.CELL_SECONDS,
            seconds=grading.SECONDS,
            resources={"metadata": {"path": str(empty)}},
        )


def _judge(
    executed: NotebookNode, where: Sequence[str], scores: Mapping[str, Any], report: Report
) -> None:
    """Report what came of running a notebook, whose cells are called as in `where`."""
    cells = list(zip(where, executed.cells, strict=True))
    for at, (place, cell) in enumerate(cells):
        outputs = cell.get("outputs", [])
        errors = [o for o in outputs if o.output_type == "error" and o.ename not in TOLD]
        if errors and grade_id(cell) not in scores["cells"]:
            told = clean(f"{errors[0].ename}: {errors[0].evalue}")
            hint = _hint(errors[0], cells[at + 1 :])
            report.costs.append(f"{place} fails when all is run from the top: {told}.{hint}")
        for what, cut in run_submission.CUT.items():
            if any(cut in output.get("text", "") for output in outputs):
                rest = f"more {what} than the grader keeps; the rest is cut off"
                report.notes.append(f"{place} shows {rest}.")
        if (seconds := _seconds(cell)) > LONG * grading.CELL_SECONDS:
            report.notes.append(
                f"{place} took {seconds:.0f} s. A cell may take {grading.CELL_SECONDS} s, and the "
                "grader's machine may be slower."
            )
    if scores["reason"]:
        begun = [place for place, cell in cells if "execution" in cell.metadata]
        report.costs.append(
            f"{['The start', *begun][-1]} is where the grader would stop: {scores['reason']}. What "
            "comes after it gets no points."
        )


def _hint(error: NotebookNode, after: Sequence[tuple[str, NotebookNode]]) -> str:
    """Return what helps against an error of a cell, given the cells `after` it; or ""."""
    if error.ename == "FileNotFoundError":
        return " The grader has the notebook alone, and no file beside it."
    if not (missing := UNDEFINED.search(error.evalue)):
        return ""
    name = missing[1]
    for place, cell in after:
        if cell.cell_type == "code" and name in _binds(cell.source):
            return f" {place} gives {name} its meaning, and comes later: move it up."
    return f" No cell gives {name} a meaning: did you change or delete the one that did?"


def _seconds(cell: NotebookNode) -> float:
    """Return how long a cell ran; 0 if it did not, or not to its end."""
    times = cell.metadata.get("execution", {})
    begun, ended = (times.get(f"iopub.status.{state}") for state in ("busy", "idle"))
    if not (begun and ended):
        return 0.0
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(begun)).total_seconds()


def _score(given: NotebookNode, scores: Mapping[str, Any], report: Report) -> None:
    """Report what became of each cell that has points."""
    failed = []
    for name, result in scores["cells"].items():
        cell, points = merging.named(given)[name], f"{result['points']:g} points"
        if result["score"] is None:
            report.tests.append(f"{name} ({points}): a person reads your answer")
        elif result["score"] < result["points"]:
            report.tests.append(f"{name} ({points}): fails. {result['reason']}")
            failed.append(name)
        else:
            seen = "passes" if cell.source.strip() else "all its tests are hidden"
            report.tests.append(f"{name} ({points}): {seen}")
    if failed:
        report.costs.append(f"These get no points, see below: {', '.join(failed)}.")
