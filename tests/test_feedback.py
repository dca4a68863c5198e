"""What a class gets back: pages, reading by hand, statistics, changes, and hints at copies."""

import ast
import base64
import copy
import csv
import io
import json
import re
import time
from contextlib import nullcontext
from hashlib import sha256
from html.parser import HTMLParser

import nbformat
import pandas as pd
import pytest
from distributed import Client
from rich.console import Console

from advlab import files
from advlab.classroom import course, grading, statistics, submissions
from advlab.classroom.marks import BY_HAND, MARKS
from advlab.upkeep.cluster import Cluster

pytest.importorskip("nbgrader", reason='needs the extra "course"')
from advlab.classroom import merging, page, similarity, tokens

NAMES = list(course.sources())
CLAIM = "Under *transfer* 85.8 %, white box $0 \\pm 1$ %: no robustness is claimed."
# Elements and attributes that a page may hold; none of them runs, fetches or covers anything.
FORMULAS = {"math", "mfrac", "mi", "mn", "mo", "mover", "mpadded", "mrow", "mspace", "msqrt"}
FORMULAS |= {"mstyle", "msub", "msubsup", "msup", "mtable", "mtd", "mtext", "mtr"}
DRAWN = {"blockquote", "br", "code", "del", "div", "em", "h3", "h4", "h5", "h6", "hr", "img", "li"}
DRAWN |= {"ol", "p", "pre", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"}
VOID = {"br", "hr", "img", "input", "meta"}
ATTRIBUTES = page.FORMULA | {"alt", "class", "src", "start"}


class Elements(HTMLParser):
    """The elements of a page, and what is wrong with its order."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.texts = [], [], {}
        self.feed(text)
        assert self.open == [], "each element is closed"

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def source():
    return {name: nbformat.read(path, as_version=4) for name, path in course.sources().items()}


@pytest.fixture(scope="module")
def threads():
    with Client(processes=False, threads_per_worker=1, dashboard_address=None) as client:
        yield Cluster(client, shared=True)


def points_for_all(work, hidden):
    """Be `grading.run` without a kernel: full points for what an answer does not say it lacks."""
    assignment = nbformat.reads(work.assignment.decode(), as_version=4)
    executed = merging.merge(copy.deepcopy(assignment), merging.read(work.submission))
    results = merging.no_points(assignment, "")
    for name, result in results.items():
        lacks = f"lacks {name}" in work.submission.decode()
        result.update(score=0 if lacks else result["points"])
        result.update(reason=f"AssertionError: eps 0.0{len(work.submission)}" if lacks else "")
    merging.leave_to_a_person(executed, results)
    merging.hide_tests(executed)
    drawn = json.dumps(page.draw(executed)).encode()
    scores = {"reason": "", "cells": results, "seconds": 0.1, "seed": work.seed}
    return grading.Ran(scores, "", nbformat.writes(executed).encode(), drawn)


class Class:
    """A class in a folder, and what was printed when it was graded."""

    def __init__(self, folder, source):
        self.folder, self.source, self.printed = folder, source, ""
        self.out = folder / "out"

    def hand_in(self, student, name, *changes, claim=None):
        notebook = copy.deepcopy(self.source[name])
        for cell in notebook.cells:
            if merging.grade_id(cell) == "claim" and claim is not None:
                cell.source = claim
            if cell.metadata.nbgrader.solution:
                for old, new in changes:
                    cell.source = cell.source.replace(old, new)
        path = self.folder / "in" / student / name / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)

    def grade(self, **more):
        console = Console(file=io.StringIO(), width=200)
        table = course.grade(self.folder / "in", self.out, sandbox=False, console=console, **more)
        self.printed = console.file.getvalue()
        return table

    def page(self, student):
        return (self.out / "feedback" / f"{student}.html").read_text()

    def read(self, name):
        return pd.read_csv(self.out / name, keep_default_na=False)


@pytest.fixture
def school(tmp_path, source, threads, monkeypatch):
    monkeypatch.setattr(course, "connect", lambda *_: nullcontext(threads))
    monkeypatch.setattr(grading, "run", points_for_all)
    return Class(tmp_path, source)


# --- a notebook, drawn


@pytest.mark.parametrize("name", NAMES)
def test_every_formula_of_an_assignment_is_shown_in_a_small_page(name, source):
    drawn = "".join(cell["html"] for cell in page.draw(source[name]))
    texts = [cell.source for cell in source[name].cells if cell.cell_type == "markdown"]
    written = len(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", "".join(texts), re.DOTALL))
    assert drawn.count("<math ") == written
    assert "$" not in drawn
    assert len(drawn) < 50_000


def output(**data):
    return nbformat.v4.new_output("display_data", {k.replace("_", "/"): v for k, v in data.items()})


SVG = '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
HOSTILE = [
    nbformat.v4.new_markdown_cell(text)
    for text in (
        "# a1: 20 of 20 points\n<script>alert(1)</script>\n\n<h1 style='position:fixed'>20</h1>",
        "[x](javascript:alert(1)) ![y](https://evil.example/y.png) <https://evil.example> [a](#a1)",
        r"$\text{<script>alert(1)</script></math><h1>}$ $\href{javascript:alert(1)}{x}$",
        r"$\style{position:fixed}{x} \class{points}{x} \kern-99em x \color{white}{x}$ $\frac{1$",
        '```py"><script>alert(1)\n</pre>\n```\n\n<!-- \n\n</div></section></body>\n\n&lt;b&gt;',
        "half an emoji: \ud83d, $$" + "{" * 3_000 + "$$",
        "> > > - 1. |a|b|\n\n|a|b|\n|-|-|\n|</td></table>|`</code>`|",
    )
]
HOSTILE += [
    nbformat.v4.new_code_cell(
        "'</pre><script>alert(1)</script>' # </span>",
        outputs=[
            output(text_html="<script>alert(1)</script>", text_plain="</pre><b>x"),
            output(image_png='"><script>alert(1)</script>'),
            output(**{"image_svg+xml": SVG}),
            output(text_markdown="<iframe src=x></iframe>"),
            output(text_latex=r"$\text{<b>}$"),
            output(text_html="<form><input></form>"),
            nbformat.v4.new_output("stream", text="\x1b[31m<meta http-equiv=refresh>" * 9_999),
            nbformat.v4.new_output(
                "error", ename="E", evalue="", traceback=["\x1b[0m<b>", "</pre>"]
            ),
        ],
    )
]


def test_nothing_of_a_hostile_notebook_becomes_markup():
    for cell in page.draw(nbformat.v4.new_notebook(cells=HOSTILE)):
        elements = Elements(cell["html"])
        assert {name for name, _ in elements.found} <= FORMULAS | DRAWN
        for name, attributes in elements.found:
            assert attributes.keys() <= ATTRIBUTES, name
            assert not any(value.startswith("-") for value in attributes.values())
            if name == "img":
                assert re.match(r"data:image/(png|jpeg|svg\+xml);base64,", attributes["src"])
        assert "\x1b" not in cell["html"]
        assert len(cell["html"]) < 60_000


def test_what_is_known_of_an_output_is_shown():
    cell = nbformat.v4.new_code_cell("1")
    shown = {
        "a table": output(text_html="<table>", text_plain="a table"),
        "a <em>text</em>": output(text_markdown="a *text*", text_plain="x"),
        "data:image/png;base64,AAAA": output(image_png="AA\nAA\n", text_plain="x"),
        "no text and no picture": output(text_html="<b>"),
        "boom": nbformat.v4.new_output("error", ename="E", evalue="", traceback=["boom"]),
        "5": output(text_plain="5"),
    }
    cell.outputs = [*shown.values()]
    drawn = page.draw_cell(cell)
    assert [text for text in shown if text not in drawn] == []


# --- the page of a student


def test_a_page_says_whose_it_is_and_leads_to_the_cells(school):
    school.hand_in("Jörg O'Neil-Groß", "a1", ("### END SOLUTION", "# lacks size-test"))
    school.hand_in("Jörg O'Neil-Groß", "a2")
    school.grade()
    shown = Elements(school.page("Jörg O'Neil-Groß"))
    assert shown.all("html") == [{"lang": "en"}]
    assert shown.texts["title"] == "a1, a2: Jörg O'Neil-Groß"
    assert shown.texts["caption"] == "Points of a1Points of a2"
    assert "a1: 16 of 20 points" in shown.texts["h2"]
    scopes = [attributes.get("scope") for attributes in shown.all("th")]
    assert scopes[:4] == ["col", "col", "col", "row"]
    assert None not in scopes
    links = [attributes["href"] for attributes in shown.all("a")]
    assert links[:2] == ["#a1-size-test", "#a1-shapes-test"]
    ids = [attributes["id"] for _, attributes in shown.found if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert not {"iframe", "script", "link"} & {name for name, _ in shown.found}
    assert "@media print" in shown.texts["style"]


def allowed(text, kind, policy):
    digest = base64.b64encode(sha256(text.encode()).digest()).decode()
    return f"{kind} 'sha256-{digest}'" in policy


def test_a_page_allows_its_own_style_and_script_alone(school):
    school.hand_in("Zoë", "a5", claim=CLAIM)
    school.grade()
    for path in (school.out / "feedback" / "Zoë.html", school.out / "reading" / "a5-claim.html"):
        shown = Elements(path.read_text())
        policy = shown.all("meta")[1]["content"]
        assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'")
        assert "unsafe" not in policy
        assert allowed(shown.texts["style"], "style-src", policy)
        script = shown.texts.get("script")
        assert allowed(script, "script-src", policy) if script else "script-src" not in policy


def test_all_assignments_make_a_page_below_300_kb(school):
    for name in NAMES:
        school.hand_in("Ada", name, claim=CLAIM)
    school.grade()
    path = school.out / "feedback" / "Ada.html"
    assert path.stat().st_size < 300_000
    assert "BEGIN HIDDEN" not in path.read_text()


def test_only_what_changed_is_written_again(school, tmp_path):
    for student in ("Ada", "Bo"):
        school.hand_in(student, "a5", claim=CLAIM)
    school.grade()
    pages = [*school.out.glob("feedback/*.html"), *school.out.glob("reading/*.html")]
    before = {path: path.stat().st_ino for path in pages}
    assert len(before) == 3
    school.grade()
    assert {path: path.stat().st_ino for path in pages} == before
    (tmp_path / "marks.csv").write_text("student,assignment,cell,score\nBo,a5,claim,8\n")
    school.grade(marks=[tmp_path / "marks.csv"])
    changed = {path.stem for path in pages if path.stat().st_ino != before[path]}
    assert changed == {"Bo", "a5-claim"}
    assert "22 of 24 points" in school.page("Bo")


def test_a_page_says_what_being_late_costs(school):
    school.hand_in("anna", "a2")
    due = school.folder / "due.toml"
    due.write_text(
        "percent_per_day = 10\n[due]\na2 = 2026-10-19T23:59:00+02:00\n"
        "[submitted.a2]\nanna = 2026-10-20T08:15:00+02:00\n"
    )
    school.grade()
    assert "late" not in school.page("anna")
    school.grade(due=due)
    assert "10 % off (the points here are those before that)" in school.page("anna")
    assert school.read("totals.csv")["a2"].tolist() == [22.5]


# --- reading by hand


def as_the_script_writes(rows):
    """Return marks.csv as the page's script makes it."""
    written = io.StringIO()
    csv.writer(written, quoting=csv.QUOTE_ALL).writerows([[*MARKS, "comment"], *rows])
    return b"\xef\xbb\xbf" + written.getvalue().encode()


def test_one_page_holds_all_answers_the_rubric_and_the_marks(school, tmp_path):
    school.hand_in("Anna-Lena", "a5", claim=CLAIM)
    school.hand_in("eve", "a5", claim="<script>alert(1)</script></article>")
    school.hand_in("Zoë", "a5", claim="YOUR ANSWER HERE")
    school.hand_in("only-a1", "a1")
    table = school.grade()
    assert table["score"].isna().sum() == 2
    path = school.out / "reading" / "a5-claim.html"
    assert f"to be read by a person: {path}" in school.printed
    text = path.read_text()
    shown = Elements(text)
    assert [one["data-student"] for one in shown.all("article")] == ["Anna-Lena", "eve", "Zoë"]
    assert "names the threat model" in text, "the rubric"
    assert "The images were made with the baseline" in text, "the answer of the source"
    assert "MARK SCHEME" not in text
    assert "85.8 %, white box <math " in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&lt;/article&gt;" in text
    assert len(shown.all("script")) == 1
    assert '<p class="note">no answer</p>' in text
    numbers = [one for one in shown.all("input") if one["type"] == "number"]
    assert [one["value"] for one in numbers] == ["", "", ""]
    assert {one["max"] for one in numbers} == {"10"}

    comment = 'Good: "no robustness"; <b>but</b>\nwhich n?'
    rows = [["Anna-Lena", "a5", "claim", "7.5", comment], ["eve", "a5", "claim", "0", " =1+1"]]
    (tmp_path / "marks.csv").write_bytes(as_the_script_writes(rows))
    table = school.grade(marks=[tmp_path / "marks.csv"]).set_index(["student", "cell"])
    assert table["score"]["Anna-Lena", "claim"] == 7.5
    assert "comment" not in table.columns
    page_ = Elements(school.page("Anna-Lena"))
    assert comment in page_.texts["p"]
    assert '<p class="comment">=1+1</p>' in school.page("eve")
    shown = Elements(path.read_text())
    numbers = [one["value"] for one in shown.all("input") if one["type"] == "number"]
    assert numbers == ["7.5", "0", ""]
    assert comment in shown.texts["textarea"]


def test_marks_of_several_files_are_given(school, tmp_path):
    school.hand_in("Ada", "a5", claim=CLAIM)
    for name, row in {"one": "a5,claim,8", "two": "a5,alarm-test,1.5"}.items():
        header = "student,assignment,cell,score,comment"  # a row may end before the comment
        (tmp_path / f"{name}.csv").write_text(f"{header}\nAda,{row}\n")
    table = school.grade(marks=[tmp_path / "one.csv", tmp_path / "two.csv"]).set_index("cell")
    assert table["score"][["claim", "alarm-test"]].tolist() == [8, 1.5]
    assert set(table["reason"][["claim", "alarm-test"]]) == {BY_HAND}
    assert 'class="comment"' not in school.page("Ada")


# --- of the class


def test_statistics_tell_of_each_question(school):
    school.hand_in("Ada", "a1")
    for student in ("Bo", "Conor"):
        school.hand_in(student, "a1", ("### END SOLUTION", f"# lacks size-test {student}"))
    school.hand_in("Ada", "a5", claim=CLAIM)
    school.grade()
    found = school.read("statistics.csv").set_index("cell")
    size, claim = found.loc["size-test"], found.loc["claim"]
    assert (size["assignment"], size["points"], size["submissions"]) == ("a1", 4, 3)
    assert (float(size["mean"]), size["zero"], size["full"], size["open"]) == (0.3333, 2, 1, 0)
    assert size["reason"].startswith("AssertionError: eps 0.0")
    assert found.loc["shapes-test", "reason"] == ""
    assert (claim["mean"], claim["zero"], claim["full"], claim["open"]) == ("", 0, 0, 1)
    assert re.search(r"a1 +size-test +4 +3 +0.33 +2 +1 +0", school.printed)


def test_the_most_common_reason_is_told_whatever_numbers_it_holds():
    reasons = ["E (seed 1)", "F", "E (seed 2)", "", "marked by hand"]
    table = pd.DataFrame({"assignment": "a1", "cell": "x", "points": 4, "score": [0, 0, 0, 4, 1]})
    assert statistics.of_questions(table.assign(reason=reasons))["reason"].item() == "E (seed 1)"


def test_who_changed_is_told_and_kept(school):
    for student in ("None", "007", "Zoë"):
        school.hand_in(student, "a1")
    school.grade()
    assert not (school.out / "changes.csv").exists()
    school.grade()
    assert not (school.out / "changes.csv").exists()
    school.hand_in("None", "a1", ("### END SOLUTION", "# lacks size-test"))
    school.hand_in("Ada", "a1")
    school.grade()
    assert "other scores than in the last run: 1, in" in school.printed
    assert re.search(r"\n *None +a1 +size-test +4 +0 +AssertionError", school.printed)
    school.hand_in("None", "a1")
    school.hand_in("007", "a1", ("### END SOLUTION", "# lacks shapes-test"))
    (school.folder / "in" / "Zoë" / "a1" / "a1.ipynb").unlink()
    school.grade()
    found = school.read("changes.csv")
    assert list(found.columns) == ["student", "assignment", "cell", "old", "new", "reason", "when"]
    told = found[["student", "cell", "old", "new"]].to_numpy().tolist()[:3]
    assert [(*names, float(old), float(new)) for *names, old, new in told] == [
        ("None", "size-test", 4, 0),
        ("007", "shapes-test", 5, 0),
        ("None", "size-test", 0, 4),
    ]
    gone = found[found["student"] == "Zoë"]
    assert set(gone["reason"]) == {"not handed in any more"}
    assert set(gone["new"]) == {""}


def test_what_is_no_table_of_grades_stops_nobody(school):
    school.hand_in("Ada", "a1")
    files.write_bytes(school.out / "grades.csv", b"student;score\nAda;3\n")
    assert len(school.grade()) == 5
    assert "whose score changed cannot be told: " in school.printed
    assert "has no column assignment, cell" in school.printed


# --- copies


ONE = '''def my_pgd(model, images, labels, eps, alpha, steps, generator):
    """Return the worst point."""
    def ask(at):
        with torch.enable_grad():
            at = at.detach().requires_grad_(True)
            scores = model(at)
            wrong = scores.max(dim=1).indices.ne(labels)
            losses = -scores.log_softmax(1).gather(1, labels.view(-1, 1)).squeeze(1)
            losses.sum().backward()
        return losses.detach() + wrong * 1000, at.grad
    best, kept = None, None
    here = project(images + eps * (1 - 2 * torch.rand(images.size())), images, eps)
    for number in range(1 + steps):
        value, slope = ask(here)
        if best is None:
            best, kept = value, here
        kept = torch.where((value > best)[:, None, None, None], here, kept)
        best = torch.maximum(best, value)
        here = project(here + torch.sign(slope) * alpha, images, eps)
    return kept
'''
OTHER = """def my_pgd(model, images, labels, eps, alpha, steps, generator):
    noise = torch.empty_like(images).uniform_(-eps, eps, generator=generator)
    points = [project(images + noise, images, eps)]
    while len(points) <= steps:
        x = points[-1].clone()
        x.requires_grad = True
        F.cross_entropy(model(x), labels).backward()
        points.append(project(x.detach() + alpha * torch.sgn(x.grad), images, eps))
    with torch.no_grad():
        outs = [model(p) for p in points]
    table = torch.stack([F.cross_entropy(o, labels, reduction="none") for o in outs])
    wrong = torch.stack([o.argmax(-1) != labels for o in outs])
    table[wrong] += 100
    index = table.argmax(0)
    return torch.stack([points[i][k] for k, i in enumerate(index.tolist())])
"""
RENAMED = {"value": "v", "slope": "g", "best": "top", "kept": "result", "here": "x", "ask": "f"}


class Rename(ast.NodeTransformer):
    def visit_Name(self, node):
        return ast.Name(RENAMED.get(node.id, node.id), node.ctx)

    def visit_FunctionDef(self, node):
        node.name = RENAMED.get(node.name, node.name)
        return self.generic_visit(node)


def disguised(code):
    """Return code with other names, comments and layout, and a line more."""
    text = ast.unparse(Rename().visit(ast.parse(code))).replace(
        "    x = project", "    # on\n    x = project"
    )
    return text.replace("    return result", "    print(top)\n    return result")


def hand_in_code(school, student, code):
    body = next(
        cell.source
        for cell in school.source["a6"].cells
        if merging.grade_id(cell) == "pgd-solution"
    )
    school.hand_in(student, "a6", (body, code))


def test_a_copy_is_hinted_at_and_what_all_may_share_is_not(school):
    hand_in_code(school, "Ada", ONE)
    hand_in_code(school, "Bo", disguised(ONE))
    hand_in_code(school, "Conor", OTHER)
    for student in ("Zoë", "Jörg"):  # the reference
        school.hand_in(student, "a6")
    for student in ("lea", "mia"):  # what was handed out
        hand_in_code(school, student, "def my_pgd(model):\n    raise NotImplementedError()")
    school.grade()
    found = school.read("similar.csv")
    assert found[["assignment", "cell", "student", "other"]].to_numpy().tolist() == [
        ["a6", "pgd-solution", "Ada", "Bo"]
    ]
    assert 0.8 <= found["alike"].item() < 1
    assert "pairs of answers that are much alike: 1" in school.printed
    assert "a hint to read both, and no verdict" in school.printed


def test_copied_texts_are_hinted_at_and_common_code_is_not(school):
    claim = " ".join(f"word{i}" for i in range(60))
    for student in ("Ada", "Bo"):
        school.hand_in(student, "a5", claim=claim if student == "Ada" else claim.upper())
    for k in range(submissions.LONGEST // 40):
        hand_in_code(school, f"s{k}", ONE)
    assert len(school.grade()["student"].unique()) == 7
    found = school.read("similar.csv")
    assert found[["cell", "student", "other", "alike"]].to_numpy().tolist() == [
        ["claim", "Ada", "Bo", 1.0]
    ]


def test_tokens_say_what_code_does():
    code = "def f(x):  # why\n    return x.clamp(0, 1) if x else 'a'\n"
    other = 'def g( image ):\n  return image.clamp(0,1) if image else "b"'
    assert tokens.of_answer(code, "code") == tokens.of_answer(other, "code")
    assert "clamp" in tokens.of_answer(code, "code")
    assert tokens.of_answer("x = (1", "code")[:3] == ["name", "=", "("]
    assert tokens.of_answer("Größe, *eps*", "markdown") == ["grösse", "eps"]


def test_similarity_of_a_large_class_is_fast():
    runs = {f"s{k}": {(str(i), str(i * k % 23)) for i in range(150)} for k in range(100)}
    start = time.process_time()
    list(similarity._alike(runs, set()))
    assert time.process_time() - start < 2
