"""A page for each student: the points, the reasons, and each notebook as it ran."""

import copy
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import nbformat
from jinja2 import Environment
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from advlab import files
from advlab.classroom.submissions import Submission

HIDDEN_TESTS = re.compile("### BEGIN HIDDEN TESTS.*?### END HIDDEN TESTS", re.DOTALL)
# Names, reasons and notebooks are a student's words: all are escaped, and no script of theirs runs.
PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{{ student }}</title>
<style>td { white-space: nowrap } iframe { width: 100%; height: 80vh }</style>
<h1>{{ student }}</h1>
{% for name, points, scores, shown in assignments %}
<h2>{{ name }}: {{ points }}</h2>
<p>{{ scores.reason }}</p>
<table>
{% for cell, result in scores.cells.items() %}
<tr>
<td>{{ cell }}</td>
<td>{{ "-" if result.score is none else "%g" % result.score }} of {{ "%g" % result.points }}</td>
<td>{{ result.reason if result.reason != scores.reason }}</td>
</tr>
{% endfor %}
</table>
{% if shown %}<iframe sandbox srcdoc="{{ shown }}"></iframe>{% endif %}
{% endfor %}
"""


def points_of(results: Collection[dict[str, Any]]) -> str:
    """Return in words what an assignment earned: "14 of 14 points, and 10 to be read"."""
    read = [result for result in results if result["score"] is not None]
    earned, of = sum(r["score"] for r in read), sum(r["points"] for r in read)
    open_ = sum(result["points"] for result in results) - of
    return f"{earned:g} of {of:g} points" + (f", and {open_:g} to be read" if open_ else "")


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


def _as_html(executed: Path) -> str:
    """Return an executed notebook as a page; "" if there is none, or none that was run."""
    if not executed.is_file():
        return ""
    try:
        notebook = nbformat.read(executed, as_version=4)
        if not notebook.cells:  # it was refused
            return ""
        return HTMLExporter().from_notebook_node(shown_to_student(notebook))[0]
    except Exception as error:  # an output that nbconvert cannot draw
        return f"The notebook cannot be shown: {type(error).__name__}"


def write(student: str, graded: Mapping[Submission, dict[str, Any]], output: Path) -> None:
    """Write feedback/STUDENT.html from the scores of a student's submissions."""
    assignments = [
        (
            one.assignment,
            points_of(scores["cells"].values()),
            scores,
            _as_html(one.kept(output) / "executed.ipynb"),
        )
        for one, scores in graded.items()
    ]
    template = Environment(autoescape=True).from_string(PAGE)
    page = template.render(student=student, assignments=assignments)
    files.write_bytes(output / "feedback" / f"{student}.html", page.encode(errors="replace"))
