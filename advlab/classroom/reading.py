"""Reading by hand: a page for each such answer of an assignment, of the whole class.

It holds the rubric, all answers, and a form. Its script writes a CSV for `read_marks`.
"""

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import nbformat
from jinja2 import Environment
from markupsafe import Markup
from nbformat import NotebookNode

from advlab.classroom import feedback, merging, page
from advlab.classroom.marks import BY_HAND
from advlab.classroom.submissions import Submission
from advlab.store import code_hash

STYLE = f"""{feedback.STYLE}
.bar {{ position: sticky; top: 0; z-index: 1; background: #fff; border-bottom: 1px solid #bbb;
  padding: .6rem 0; display: flex; gap: 1.5rem; align-items: center; flex-wrap: wrap }}
.mark {{ display: flex; gap: 1rem; align-items: flex-start; flex-wrap: wrap; margin: .6rem 0 2rem }}
textarea {{ width: 36rem; max-width: 100%; height: 4.5em; font: inherit; display: block }}
input[type=number] {{ width: 6rem; font: inherit; display: block }}
details {{ margin: .6rem 0 }}
button {{ font: inherit; padding: .3rem 1rem }}
body:has(#hide:checked) .student {{ visibility: hidden }}
@media print {{ .bar {{ display: none }} }}
"""
# A space before what a spreadsheet would take for a formula; `read_marks` takes it away.
SCRIPT = """
const form = document.querySelector("form");
const answers = [...form.querySelectorAll("article")];
const score = (answer) => answer.querySelector("input");
const comment = (answer) => answer.querySelector("textarea");
let saved = true;
function count() {
  const read = answers.filter((answer) => score(answer).value !== "").length;
  document.getElementById("read").textContent = `${read} of ${answers.length} have a mark`;
}
form.addEventListener("input", () => { saved = false; count(); });
addEventListener("beforeunload", (event) => { if (!saved) event.preventDefault(); });
document.getElementById("save").addEventListener("click", () => {
  for (const answer of answers) score(answer).required = comment(answer).value.trim() !== "";
  if (!form.reportValidity()) return;
  const {assignment, cell} = form.dataset;
  const rows = [["student", "assignment", "cell", "score", "comment"]];
  for (const answer of answers.filter((answer) => score(answer).value !== ""))
    rows.push([answer.dataset.student, assignment, cell, score(answer).value,
      comment(answer).value.trim().replace(/^[=+@-]/, " $&")]);
  const lines = rows.map((row) => row.map((text) => `"${text.replaceAll('"', '""')}"`).join(","));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(["\\ufeff" + lines.join("\\r\\n") + "\\r\\n"]));
  link.download = `marks-${assignment}-${cell}.csv`;
  link.click();
  saved = true;
});
count();
"""
# As in `feedback`, what students wrote is escaped; the one script that runs is known by its hash.
PAGE = (
    feedback.HEAD
    + """<title>{{ assignment }}: {{ cell }} of {{ answers | length }} students</title>
<style>{{ style }}</style>
</head>
<body>
<h1>{{ assignment }}: {{ cell }}, {{ "%g" % points }} points</h1>
<details open>
<summary>Question and rubric</summary>
{% for html in rubric %}{{ html | safe }}{% endfor %}
</details>
<details>
<summary>The answer in the source</summary>
{{ solution | safe }}
</details>
<form data-assignment="{{ assignment }}" data-cell="{{ cell }}" autocomplete="off">
<div class="bar">
<button type="button" id="save">Download the marks</button>
<span id="read" role="status"></span>
<label><input type="checkbox" id="hide"> hide names</label>
</div>
<p class="note">Nothing is kept in this page: download the marks before you close it, and hand them
to <code>advlab course grade FOLDER --marks FILE</code>. This page then shows them, and you can go
on. A mark without a number is left out.</p>
{% for student, result, cells in answers %}
<article data-student="{{ student }}">
<h2>{{ loop.index }} of {{ answers | length }}: <span class="student">{{ student }}</span></h2>
{% if result.reason and result.reason not in (by_hand, "to be read") %}
<p class="note">{{ result.reason }}</p>
{% endif %}
{% if cells %}
<div class="notebook">
{% for html in cells %}<div class="cell answer">{{ html | safe }}</div>{% endfor %}
</div>
{% else %}
<p class="note">The answer cannot be shown; graded/{{ student }}/{{ assignment }} tells why.</p>
{% endif %}
<div class="mark">
<label>Points (0 to {{ "%g" % points }})
<input type="number" min="0" max="{{ "%g" % points }}" step="any"
 value="{{ "%g" % result.score if result.reason == by_hand }}"></label>
<label>Comment for the student
<textarea>
{{ result.comment }}</textarea></label>
</div>
</article>
{% endfor %}
</form>
<script>{{ script }}</script>
</body>
</html>
"""
)
TEMPLATE = Environment(autoescape=True).from_string(PAGE)


def write(
    graded: Mapping[Submission, dict[str, Any]], sources: Mapping[str, Path], output: Path
) -> list[Path]:
    """Write reading/ASSIGNMENT-CELL.html for each answer that a person reads.

    Args:
        graded: The scores of each submission, with the marks that were given.
        sources: The instructor's notebook of each assignment.
        output: Where `course.grade` writes.

    Returns:
        The pages of the assignments that were handed in.
    """
    pages = []
    for assignment, path in sources.items():
        source = nbformat.read(path, as_version=4)
        whole = {one: graded[one] for one in graded if one.assignment == assignment}
        for index, cell in enumerate(source.cells):
            if whole and merging.by_hand(cell):
                rubric = [page.markdown(text) for text in _before(source, index)]
                pages.append(_write(assignment, cell, rubric, whole, output))
    return pages


def _before(source: NotebookNode, index: int) -> list[str]:
    """Return the texts between the answer or test before a cell, and that cell."""
    texts: list[str] = []
    for cell in reversed(source.cells[:index]):
        if merging.is_grade(cell) or merging.is_solution(cell):
            break
        if cell.cell_type == "markdown":
            texts.insert(0, cell.source)
    return texts


def _solution(cell: NotebookNode) -> NotebookNode:
    return NotebookNode(cell | {"source": merging.without_markers(cell.source)})


def _answer(cells: list[dict[str, Any]], name: str) -> Iterator[str]:
    """Yield the drawn cells of an answer: its own, and those that the student added after it."""
    found = False
    for cell in cells:
        found = cell["name"] == name or (found and cell["name"] is None)
        if found:
            yield cell["html"]


def _write(
    assignment: str,
    cell: NotebookNode,
    rubric: list[str],
    graded: Mapping[Submission, dict[str, Any]],
    output: Path,
) -> Path:
    name = merging.grade_id(cell) or ""
    drawn = {one: feedback.drawn(one, output) for one in graded}
    results = {one: scores["cells"][name] for one, scores in graded.items()}
    code = code_hash("classroom/feedback", "classroom/page", "classroom/reading")
    digest = sha256(f"{cell} {rubric} {code}".encode())
    for one, result in results.items():
        digest.update(f"{one.student} {json.dumps(result)}".encode())
        digest.update(sha256(drawn[one]).digest())

    def render(made_of: str) -> str:
        answers = [
            (one.student, results[one], list(_answer(json.loads(drawn[one]), name)))
            for one in sorted(graded, key=lambda one: one.student.casefold())
        ]
        return TEMPLATE.render(
            assignment=assignment,
            cell=name,
            points=cell.metadata.nbgrader.points,
            rubric=rubric,
            solution=page.draw_cell(_solution(cell)),
            answers=answers,
            by_hand=BY_HAND,
            made_of=made_of,
            policy=feedback.policy(STYLE, SCRIPT),
            style=Markup(STYLE),
            script=Markup(SCRIPT),
        )

    path = output / "reading" / f"{assignment}-{name}.html"
    feedback.write_changed(path, digest.hexdigest(), render)
    return path
