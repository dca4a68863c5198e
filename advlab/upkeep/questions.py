"""The questions of all lessons as a table for Anki, and as a question bank for Moodle.

Each "Predict, then run" is a question, and what the lesson then says is its answer. Each exercise
is a question, and its solution is the answer. Formulas stay TeX, between the marks that MathJax
looks for. Figures are left to the lessons.
"""

import csv
import html
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mistune
import nbformat
from nbconvert.filters.markdown_mistune import MarkdownWithMath
from nbformat import NotebookNode

from advlab import files
from advlab.upkeep import prose, readme

# What Anki reads before the first line: https://docs.ankiweb.net/importing/text-files.html
HEAD = "#separator:Semicolon\n#html:true\n#notetype:Basic\n#deck:advlab\n#tags column:3\n"
LONGEST = 40  # printed lines: more are left to the lesson
_LEVEL = re.compile(r"\d+\. \*\*(\w+)[^*]*\*\* *")
_NUMBER = re.compile(r"(\d+) (.*)")


class QuestionError(RuntimeError):
    """The lessons do not hold what a question needs."""


@dataclass(frozen=True)
class Question:
    """A question.

    Args:
        name: Its own, such as "advlab-02-prediction-3"; it stays when others are added after it.
        tags: The lesson's, its kind, and how hard an exercise is; none has a space.
        front: What is asked, HTML.
        back: The answer, HTML.
    """

    name: str
    tags: tuple[str, ...]
    front: str
    back: str


class _Renderer(mistune.HTMLRenderer):
    """Draws Markdown; links within the clone are text, formulas are TeX for MathJax."""

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return super().link(text, url, title) if url.startswith("http") else text

    def inline_math(self, body: str) -> str:
        return f"\\({html.escape(body.strip(), quote=False)}\\)"

    def block_math(self, body: str) -> str:
        return f"<p>\\[{html.escape(body.strip(), quote=False)}\\]</p>\n"

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")


def drawn(text: str) -> str:
    """Return Markdown as HTML."""
    return MarkdownWithMath(_Renderer(escape=False)).render(text)


def _pre(text: str) -> str:
    return f"<pre>{html.escape(text, quote=False)}</pre>\n"


def _answer(cells: list[NotebookNode], code: bool) -> str:
    """Return cells as HTML: text, what was printed, and the `code` where that is asked for."""
    parts = []
    for cell in cells:
        if cell.cell_type == "markdown":
            parts.append(drawn(cell.source))
            continue
        if code:
            parts.append(_pre(cell.source))
        told = prose.printed(cell)
        if 0 < len(told.splitlines()) <= LONGEST:
            parts.append(_pre(told))
    return "".join(parts)


def _until(cell: NotebookNode) -> NotebookNode:
    """Return the text of a cell up to its first heading or question."""
    kept = []
    for block in prose.blocks(cell.source):
        if prose.heading(block)[0] or prose.PREDICT in block:
            break
        kept.append(block)
    return nbformat.v4.new_markdown_cell("\n\n".join(kept))


def _reading(cells: list[NotebookNode]) -> list[NotebookNode]:
    """Return the cells that answer the question before them: code, and the text that reads it."""
    found: list[NotebookNode] = []
    for cell in cells:
        if cell.cell_type == "markdown":
            return [*found, _until(cell)]
        if "Prediction(" not in cell.source and prose.HIDDEN not in prose.tags(cell):
            found.append(cell)
    return found


def predictions(lesson: Path) -> Iterator[Question]:
    """Yield the questions of a lesson that its next figure answers."""
    cells = nbformat.read(lesson, as_version=4).cells
    number, section, count, before = lesson.stem[:2], "", 0, ""
    for place, cell in enumerate(cells):
        for block in prose.blocks(cell.source) if cell.cell_type == "markdown" else ():
            level, title = prose.heading(block)
            if prose.PREDICT in block:
                count += 1
                asked = prose.unquoted(block).replace(prose.PREDICT, "").strip()
                where = f"Lesson {number}, {section}"
                yield Question(
                    f"advlab-{number}-prediction-{count}",
                    (f"lesson-{number}", "prediction"),
                    drawn(f"*{where}*\n\n{before}\n\n**{asked}**"),
                    _answer(_reading(cells[place + 1 :]), code=False),
                )
            section = title or section
            before = "" if level or block.startswith(">") else block


def _solutions(path: Path) -> dict[str, list[NotebookNode]]:
    """Return the cells that solve each exercise, by its number."""
    found: dict[str, list[NotebookNode]] = {}
    number = ""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            if number and prose.HIDDEN not in prose.tags(cell):
                found[number].append(cell)
            continue
        for block in prose.blocks(cell.source):
            level, title = prose.heading(block)
            if level == 2:
                head = _NUMBER.fullmatch(title)
                number = head[1] if head else ""
                if number:
                    found[number] = []
            elif number:
                found[number].append(nbformat.v4.new_markdown_cell(block))
    return found


def _exercise_texts(lesson: Path) -> list[str]:
    cells = nbformat.read(lesson, as_version=4).cells
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    asked = text.partition(prose.EXERCISES)[2].partition("\n## ")[0]
    return [item for item in prose.items(asked) if item[0].isdigit()]


def exercises(lesson: Path) -> Iterator[Question]:
    """Yield the exercises of a lesson, each with its solution.

    Raises:
        QuestionError: if one has no solution.
    """
    number, solved = lesson.stem[:2], _solutions(prose.solution_of(lesson))
    for item in _exercise_texts(lesson):
        own = item.partition(".")[0]
        if not solved.get(own):
            told = f"exercise {own} of {lesson.name} has no section '## {own} ...' in its solutions"
            raise QuestionError(told)
        hints = "".join(
            f"**{hint['head']}.** {hint['text'].strip()}" for hint in prose.HINT.finditer(item)
        )
        level = _LEVEL.match(item)
        asked = prose.HINT.sub("", item)
        asked = re.sub(r"^ {1,3}", "", asked.partition(". ")[2], flags=re.M)
        yield Question(
            f"advlab-{number}-exercise-{own}",
            (f"lesson-{number}", "exercise", *([level[1].lower()] if level else [])),
            drawn(f"*Lesson {number}, exercise {own}*\n\n{asked.strip()}"),
            drawn(hints) + _answer(solved[own], code=True),
        )


def collect(home: Path) -> list[Question]:
    """Return the questions of all lessons, in order."""
    return [
        question
        for lesson in readme.lesson_paths(home)
        for kind in (predictions, exercises)
        for question in kind(lesson)
    ]


def anki(questions: list[Question]) -> str:
    """Return a table that Anki imports: front; back; tags."""
    text = io.StringIO()
    table = csv.writer(text, delimiter=";", quoting=csv.QUOTE_ALL, lineterminator="\n")
    table.writerows([one.front, one.back, " ".join(one.tags)] for one in questions)
    return HEAD + text.getvalue()


def _moodle_text(question: ElementTree.Element, name: str, content: str, **attrs: Any) -> None:
    part = ElementTree.SubElement(question, name, attrs)
    ElementTree.SubElement(part, "text").text = content


def moodle(questions: list[Question]) -> bytes:
    """Return Moodle XML: an essay question each, whose answer is for who marks and as feedback."""
    quiz = ElementTree.Element("quiz")
    lesson = ""
    for one in questions:
        if one.tags[0] != lesson:
            lesson = one.tags[0]
            group = ElementTree.SubElement(quiz, "question", type="category")
            _moodle_text(group, "category", f"$course$/top/advlab/{lesson}")
        asked = ElementTree.SubElement(quiz, "question", type="essay")
        _moodle_text(asked, "name", one.name)
        _moodle_text(asked, "questiontext", one.front, format="html")
        _moodle_text(asked, "generalfeedback", one.back, format="html")
        settings = {"defaultgrade": "1", "penalty": "0", "hidden": "0", "idnumber": one.name}
        settings |= {"responseformat": "editor", "responserequired": "1"}
        settings |= {"responsefieldlines": "10", "attachments": "0", "attachmentsrequired": "0"}
        for name, value in settings.items():
            ElementTree.SubElement(asked, name).text = value
        _moodle_text(asked, "graderinfo", one.back, format="html")
        _moodle_text(asked, "responsetemplate", "", format="html")
        tags = ElementTree.SubElement(asked, "tags")
        for tag in one.tags:
            _moodle_text(tags, "tag", tag)
    ElementTree.indent(quiz)
    return ElementTree.tostring(quiz, encoding="utf-8", xml_declaration=True)


def write(folder: Path) -> list[Path]:
    """Write questions.csv (Anki) and questions.xml (Moodle) from the clone's lessons.

    Returns:
        Both paths.

    Raises:
        QuestionError: outside a clone, or if an exercise has no solution.
    """
    if not files.is_clone(files.home()):
        raise QuestionError(f"{files.home()} is no clone of the repository; run this in one")
    found = collect(files.home())
    table, bank = folder / "questions.csv", folder / "questions.xml"
    files.write_bytes(table, anki(found).encode())
    files.write_bytes(bank, moodle(found))
    return [table, bank]
