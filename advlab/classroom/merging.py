"""The notebook that is run for a submission: the assignment, with the student's answers in it."""

import re
from typing import Any

import nbformat
from nbformat import NotebookNode

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
    name = grade_id(cell)
    metadata = {"nbgrader": {"grade_id": name}} if name else {}
    return new_cell(cell.cell_type, cell.source, metadata)


def new_cell(kind: str, source: str, metadata: dict[str, Any]) -> NotebookNode:
    """Return a cell that has not run."""
    kinds = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    return kinds.get(kind, nbformat.v4.new_raw_cell)(source, metadata=metadata)


def grade_id(cell: NotebookNode) -> str | None:
    """Return the name that nbgrader gave a cell; None for a cell that a student added."""
    block = cell.get("metadata", {}).get("nbgrader")
    name = block.get("grade_id") if isinstance(block, dict) else None
    return name if isinstance(name, str) else None


def named(assignment: NotebookNode) -> dict[str, NotebookNode]:
    """Return the cells of an assignment, by name."""
    return {name: cell for cell in assignment.cells if (name := grade_id(cell))}


# nbgrader has these three, but students do not have nbgrader.
def is_solution(cell: NotebookNode) -> bool:
    """Return whether a cell of an assignment is an answer."""
    return bool(cell.metadata.get("nbgrader", {}).get("solution"))


def is_grade(cell: NotebookNode) -> bool:
    """Return whether a cell of an assignment has points: it holds tests, or a person grades it."""
    return bool(cell.metadata.get("nbgrader", {}).get("grade"))


def is_locked(cell: NotebookNode) -> bool:
    """Return whether a cell of an assignment is given: a student is not to change it."""
    locked = is_grade(cell) or bool(cell.metadata.get("nbgrader", {}).get("locked"))
    return locked and not is_solution(cell)


def match(
    source: NotebookNode, submitted: NotebookNode
) -> tuple[dict[str, NotebookNode], dict[str | None, list[NotebookNode]]]:
    """Return which cells of a submission are the assignment's.

    A cell that lost its name is known by what it says.

    Returns:
        These, by name; and a student's own, by the name of the cell that they stand behind (None
        at the start), copies of answers and tests among them.
    """
    found: dict[str, NotebookNode] = {}
    own: dict[str | None, list[NotebookNode]] = {}
    known = named(source)
    there = {grade_id(cell) for cell in submitted.cells}
    unnamed = {name: cell for name, cell in known.items() if name not in there}
    last = None
    for cell in submitted.cells:
        name = grade_id(cell)
        if name not in known:
            name = next((n for n, given in unnamed.items() if _is_alike(given, cell)), None)
        if name is None or name in found:
            own.setdefault(last, []).append(cell)
        else:
            found[name], last = cell, name
    return found, own


def merge(source: NotebookNode, submitted: NotebookNode) -> NotebookNode:
    """Return the assignment with the answers of a submission.

    Text and tests are those of `source`, whatever the submission made of them; a student's own
    cells stay behind the cell that they were written after. An answer that is not there is replaced
    by a cell that says so.

    Raises:
        RefusedError: if there is no cell of this assignment.
    """
    found, own = match(source, submitted)
    for added in own.values():
        for cell in added:
            cell.metadata.pop("nbgrader", None)
    cells = list(own.get(None, []))
    for name, cell in named(source).items():
        if is_solution(cell):
            if not found:
                raise RefusedError("it has no cell of this assignment: is it another's notebook?")
            if name in found:
                cell.source = found[name].source
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
