"""A page for each student: the points, the reasons, and each notebook as it ran."""

import base64
import json
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from advlab import files
from advlab.classroom.lateness import Late
from advlab.classroom.submissions import Submission
from advlab.store import code_hash

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1b1b; background: #fff }
table { border-collapse: collapse; width: 100% }
caption { text-align: left; font-weight: 600; padding: .4rem 0 }
th, td { border: 1px solid #bbb; padding: .25rem .6rem; text-align: left; vertical-align: top }
tbody th { font-weight: normal }
.points { white-space: nowrap }
.points + td { width: 60% }
.comment { white-space: pre-line; margin: .3rem 0 0 }
.notebook { border: 2px solid #888; border-radius: 6px; margin: 1rem 0; padding: .5rem 1rem }
.note, .whose { color: #555; font-size: .85rem; margin: .2rem 0 }
.cell { border-left: 4px solid #ddd; padding-left: .8rem; margin: .8rem 0; overflow: auto }
.cell.answer { border-color: #2f6fb0 }
.cell:target { outline: 2px solid #c25700; outline-offset: -2px }
.cell table { width: auto }
pre { background: #f5f5f5; padding: .5rem; margin: .4rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .85rem }
pre.output { background: none; border: 1px solid #ddd }
img { max-width: 100% }
.c1, .ch { color: #5a6b5a } .k, .kn, .kc, .ow { color: #7b1fa2 }
.s1, .s2, .sd, .se, .si { color: #9c3600 } .mi, .mf { color: #00629b }
@media print {
  body { max-width: none; margin: 0; font-size: 11pt }
  h1, h2, caption { break-after: avoid }
  tr, img { break-inside: avoid }
  section + section { break-before: page }
  .cell { overflow: hidden }
}
"""
# Names, reasons and notebooks are a student's words: all are escaped (see `page`), no script runs,
# and nothing is fetched. What they wrote stays in its frame.
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width">
<meta name="made-of" content="{{ made_of }}">
"""
PAGE = (
    HEAD
    + """<title>{{ assignments | map(attribute=0) | join(", ") }}: {{ student }}</title>
<style>{{ style }}</style>
</head>
<body>
<h1>{{ student }}</h1>
{% for name, points, scores, late, cells in assignments %}
<section>
<h2>{{ name }}: {{ points }}</h2>
{% if scores.reason %}<p>{{ scores.reason }}</p>{% endif %}
{% if late %}<p>{{ late }} (the points here are those before that)</p>{% endif %}
<table>
<caption>Points of {{ name }}</caption>
<thead>
<tr><th scope="col">cell</th><th scope="col">points</th><th scope="col">reason</th></tr>
</thead>
<tbody>
{% for cell, result in scores.cells.items() %}
<tr>
<th scope="row">
{%- if cell in cells | map(attribute="name") %}<a href="#{{ name }}-{{ cell }}">{{ cell }}</a>
{%- else %}{{ cell }}{% endif -%}
</th>
<td class="points">
{{- "-" if result.score is none else "%g" % result.score }} of {{ "%g" % result.points -}}
</td>
<td>{{ result.reason if result.reason != scores.reason }}
{%- if result.comment %}<p class="comment">{{ result.comment }}</p>{% endif %}</td>
</tr>
{% endfor %}
</tbody>
</table>
{% if cells %}
<h3>The notebook of {{ name }}, as it ran</h3>
<p class="note">All in this frame is the notebook's own, and gives no points.</p>
<div class="notebook">
{% for cell in cells %}
<div class="cell{{ " answer" if cell.answer }}"
{%- if cell.name %} id="{{ name }}-{{ cell.name }}"{% endif %}>
{% if cell.answer %}<p class="whose">written by the student</p>
{% elif cell.name in scores.cells %}<p class="whose">{{ cell.name }}</p>{% endif %}
{{ cell.html | safe }}</div>
{% endfor %}
</div>
{% endif %}
</section>
{% endfor %}
</body>
</html>
"""
)
TEMPLATE = Environment(autoescape=True).from_string(PAGE)


def points_of(results: Collection[dict[str, Any]]) -> str:
    """Return in words what an assignment earned: "14 of 14 points, and 10 to be read"."""
    read = [result for result in results if result["score"] is not None]
    earned, of = sum(r["score"] for r in read), sum(r["points"] for r in read)
    open_ = sum(result["points"] for result in results) - of
    return f"{earned:g} of {of:g} points" + (f", and {open_:g} to be read" if open_ else "")


def drawn(one: Submission, output: Path) -> bytes:
    """Return the cells that were drawn when a notebook was graded, as JSON (see `page.draw`)."""
    with suppress(FileNotFoundError):
        return (one.kept(output) / "page.json").read_bytes()
    return b"[]"


def policy(style: str, script: str = "") -> str:
    """Return a Content-Security-Policy that allows this style, this script and pictures inside."""
    allowed = {"style-src": style, "script-src": script}
    hashes = "".join(
        f"; {kind} 'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"
        for kind, text in allowed.items()
        if text
    )
    return f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:{hashes}"


def write_changed(path: Path, made_of: str, render: Callable[[str], str]) -> None:
    """Write a page, unless the one that is there was made of the same.

    Args:
        path: Of the page.
        made_of: What it is made of, hashed. The page must hold it in its first kilobyte.
        render: Returns the page, for its hash.
    """
    with suppress(FileNotFoundError), path.open("rb") as there:
        if made_of.encode() in there.read(1024):
            return
    files.write_bytes(path, render(made_of).encode(errors="replace"))


def write(
    student: str,
    graded: Mapping[Submission, dict[str, Any]],
    late: Mapping[Submission, Late],
    output: Path,
) -> None:
    """Write feedback/STUDENT.html from the scores of a student's submissions, and what was late."""
    digest = sha256(f"{student} {code_hash('classroom/feedback')}".encode())
    pages = {one: drawn(one, output) for one in graded}
    for one, scores in graded.items():
        digest.update(f"{one.assignment} {json.dumps(scores)} {late.get(one)}".encode())
        digest.update(sha256(pages[one]).digest())

    def render(made_of: str) -> str:
        assignments = [
            (
                one.assignment,
                "not graded yet" if scores["again"] else points_of(scores["cells"].values()),
                scores,
                late[one].reason if one in late else "",
                json.loads(pages[one]),
            )
            for one, scores in graded.items()
        ]
        return TEMPLATE.render(
            student=student,
            assignments=assignments,
            made_of=made_of,
            policy=policy(STYLE),
            style=Markup(STYLE),
        )

    path = output / "feedback" / f"{student}.html"
    write_changed(path, digest.hexdigest(), render)
