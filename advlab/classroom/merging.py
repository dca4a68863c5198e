"""The notebook that is run for a submission: the assignment, with the student's answers in it."""

import re
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbgrader.utils import is_grade, is_solution

from advlab.classroom import RefusedError

MISSING = 'raise NotImplementedError("the cell for the answer {} is missing")'
MARKERS = re.compile(r"^ *### (?:BEGIN|END) (?:SOLUTION|MARK SCHEME) *\n?", re.MULTILINE)
SOLUTION = re.compile("### BEGIN SOLUTION.*?### END SOLUTION", re.DOTALL)
HIDDEN_TESTS = re.compile("### BEGIN HIDDEN TESTS.*?### END HIDDEN TESTS", re.DOTALL)
DEFINED = re.compile(r"^(?:def|class) +(\w+)", re.MULTILINE)


def read(content: bytes) -> NotebookNode:
    """Return the notebook that a file holds.

    What is not needed, and editors get wrong (outputs, counts, ids), is left out.

    Raises:
        RefusedError: if it is no notebook.
    """
    try:
        found = nbformat.reads(content.decode("utf-8-sig"), as_version=4)
        notebook = nbformat.v4.new_notebook(cells=[_only_text(cell) for cell in found.cells])
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises many kinds for what is not a notebook
        told = (str(error).splitlines() or [""])[0]
        raise RefusedError(clean(f"not a notebook: {type(error).__name__}: {told}")) from error
    return notebook


def _only_text(cell: NotebookNode) -> NotebookNode:
    """Return a new cell with the text of `cell`, and what nbgrader knows it by."""
    kinds = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    new = kinds.get(cell.cell_type, nbformat.v4.new_raw_cell)(cell.source)
    if name := grade_id(cell):
        new.metadata.nbgrader = {"grade_id": name}
    return new


def grade_id(cell: NotebookNode) -> str | None:
    """Return the name that nbgrader gave a cell; None for a cell that a student added."""
    block = cell.get("metadata", {}).get("nbgrader")
    name = block.get("grade_id") if isinstance(block, dict) else None
    return name if isinstance(name, str) else None


def merge(source: NotebookNode, submitted: NotebookNode) -> NotebookNode:
    """Return the assignment with the answers of a submission.

    Text and tests are those of `source`, whatever the submission made of them; a student's own
    cells, copies of answers and tests among them, stay behind the cell that they were written
    after. A cell that lost its name is known by what it says; an answer that is not there is
    replaced by a cell that says so.

    Raises:
        RefusedError: if there is no cell of this assignment.
    """
    answers: dict[str, NotebookNode] = {}
    own: dict[str | None, list[NotebookNode]] = {}
    known = {name: cell for cell in source.cells if (name := grade_id(cell))}
    there = {grade_id(cell) for cell in submitted.cells}
    unnamed = {name: cell for name, cell in known.items() if name not in there}
    last = None
    for cell in submitted.cells:
        name = grade_id(cell)
        if name not in known:
            name = next((n for n, given in unnamed.items() if _is_alike(given, cell)), None)
        if name is None or name in answers:
            cell.metadata.pop("nbgrader", None)
            own.setdefault(last, []).append(cell)
            continue
        answers[name], last = cell, name
    cells = list(own.get(None, []))
    for name, cell in known.items():
        if is_solution(cell):
            if not answers:
                raise RefusedError("it has no cell of this assignment: is it another's notebook?")
            if name in answers:
                cell.source = answers[name].source
            else:
                cell.source = MISSING.format(name) if cell.cell_type == "code" else ""
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        cells += [cell, *own.get(name, [])]
    return nbformat.v4.new_notebook(cells=cells, metadata=source.metadata)


def _is_alike(given: NotebookNode, cell: NotebookNode) -> bool:
    """Return whether `cell` is `given`, a cell of the source, as it was handed out or answered."""
    if cell.cell_type != given.cell_type:
        return False
    if is_solution(given):
        names = set(DEFINED.findall(given.source))
        return bool(names) and names <= set(DEFINED.findall(cell.source))
    return HIDDEN_TESTS.sub("", given.source).split() == cell.source.split()


def defined(source: NotebookNode) -> dict[str, list[str]]:
    """Return the functions and classes that each answer of an assignment is to define."""
    return {
        name: DEFINED.findall(cell.source)
        for cell in source.cells
        if is_solution(cell) and cell.cell_type == "code" and (name := grade_id(cell))
    }


def clean(text: str) -> str:
    """Return the start of a text that a submission chose, fit for a table."""
    text = "".join(c if c.isprintable() else " " for c in text)[:300]
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text  # no formula, for a spreadsheet


def no_points(
    source: NotebookNode, reason: str, score: int | None = 0
) -> dict[str, dict[str, Any]]:
    """Return a result for each graded cell of an assignment: its points, the score and reason."""
    return {
        name: {"points": cell.metadata.nbgrader.points, "score": score, "reason": reason}
        for cell in source.cells
        if is_grade(cell) and (name := grade_id(cell))
    }


def without_markers(text: str) -> str:
    """Return the text of an answer of a source without the lines that nbgrader finds it by."""
    return MARKERS.sub("", text).rstrip("\n")


def hide_tests(notebook: NotebookNode) -> dict[str, str]:
    """Take the hidden tests out of a merged notebook; return the cells' whole tests, by name."""
    tests = {}
    for cell in notebook.cells:
        if is_grade(cell) and not is_solution(cell) and (name := grade_id(cell)):
            tests[name] = cell.source
            cell.source = HIDDEN_TESTS.sub("# hidden tests", cell.source)
    return tests


def by_hand(cell: NotebookNode) -> bool:
    """Return whether a person grades this cell: it is the answer itself."""
    return is_grade(cell) and is_solution(cell)


def leave_to_a_person(notebook: NotebookNode, results: dict[str, dict[str, Any]]) -> None:
    """Take the score from the `results` that a person decides on, if there is an answer to read."""
    for cell, after in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        if by_hand(cell):
            own = after is not None and grade_id(after) is None  # the answer may stand there
            empty = cell.source.strip() in ("", "YOUR ANSWER HERE") and not own
            results[cell.metadata.nbgrader.grade_id].update(
                score=0 if empty else None, reason="no answer" if empty else "to be read"
            )
