"""A page for each student: the points, the reasons, and each notebook as it ran."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment

from advlab import files
from advlab.classroom.submissions import Submission

# Names, reasons and notebooks are a student's words: all are escaped, no script of theirs runs, and
# nothing is fetched. The frame obeys the policy of the page around it.
PAGE = """<!doctype html>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; font-src data:; style-src 'unsafe-inline'">
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


def _drawn(path: Path) -> str:
    """Return a page that was drawn when its notebook was graded; "" if there is none."""
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8")
    return ""


def write(student: str, graded: Mapping[Submission, dict[str, Any]], output: Path) -> None:
    """Write feedback/STUDENT.html from the scores of a student's submissions."""
    assignments = [
        (
            one.assignment,
            "not graded yet" if scores["again"] else points_of(scores["cells"].values()),
            scores,
            _drawn(one.kept(output) / "page.html"),
        )
        for one, scores in graded.items()
    ]
    template = Environment(autoescape=True).from_string(PAGE)
    page = template.render(student=student, assignments=assignments)
    files.write_bytes(output / "feedback" / f"{student}.html", page.encode(errors="replace"))
