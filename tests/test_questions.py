"""The questions of all lessons, for Anki and for Moodle, and the text that they are read from."""

import csv
import re
from xml.etree import ElementTree

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from advlab import files
from advlab.upkeep import prose, questions, readme

ROOT = files.repository()
CODE = re.compile(r"<(pre|code)>.*?</\1>", re.S)


@pytest.fixture(scope="module")
def found():
    return questions.collect(ROOT)


def text_of(path):
    return "\n\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)


def test_blocks_keep_together_what_belongs_together():
    text = "# A\nword\n\n$$\na\n\nb\n$$\n\n1. one\n\n   more\n2. two\n\n```\nx\n\n# y\n```\n## B"
    kept = [
        "# A",
        "word",
        "$$\na\n\nb\n$$",
        "1. one\n\n   more\n2. two",
        "```\nx\n\n# y\n```",
        "## B",
    ]
    assert list(prose.blocks(text)) == kept
    assert prose.items(kept[3]) == ["1. one\n\n   more", "2. two"]
    assert prose.items("word") == ["word"]


def test_every_prediction_and_exercise_of_every_lesson_is_a_question(found):
    names = [one.name for one in found]
    assert len(set(names)) == len(names)
    for lesson in readme.lesson_paths(ROOT):
        number = lesson.stem[:2]
        asked = text_of(lesson).count(prose.PREDICT)
        solved = re.findall(r"^## (\d+) ", text_of(prose.solution_of(lesson)), re.M)
        own = [f"advlab-{number}-prediction-{k}" for k in range(1, asked + 1)]
        own += [f"advlab-{number}-exercise-{k}" for k in solved]
        assert [name for name in names if name.startswith(f"advlab-{number}-")] == own


def test_every_question_has_an_answer_and_its_formulas_are_for_mathjax(found):
    for one in found:
        assert len(CODE.sub("", one.back)) > 20, one.name
        assert one.front.count("\\(") == one.front.count("\\)")
        assert "$" not in CODE.sub("", one.front + one.back), one.name
        assert ".ipynb" not in CODE.sub("", one.front + one.back), one.name
    assert sum(one.front.count("\\(") + one.back.count("\\(") for one in found) > 10
    assert {tag for one in found for tag in one.tags if "lesson" not in tag} == {
        "prediction", "exercise", "easy", "medium", "hard", "open",
    }  # fmt: skip


def write_pair(home, asked, solution):
    for name, cells in {"01_first": asked, "solutions/01_first": solution}.items():
        path = home / "notebooks" / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(new_notebook(cells=cells), path)
    return home


ASKED = [
    new_markdown_cell(
        "# T\n\n## 1. Size\n\nIt is $a < b$.\n\n> **Predict, then run.** How\n> many?"
    ),
    new_code_cell("guess = Prediction('x', 0, 1)"),
    new_code_cell("f(1)", outputs=[new_output("stream", text="7 < 8\n")]),
    new_markdown_cell(
        "Seven; see [lesson 02](02_next.ipynb).\n\n## Your turn\n\n1. **Hard, 9 minutes.** Do\n"
        "   $$x_1 * y_2$$\n   <details><summary>Hint</summary>Look.</details>\n\n"
        "## References\n\n1. No"
    ),
]
SOLVED = [
    new_markdown_cell("# S\n\n## 1 It\n\nFirst."),
    new_code_cell("a; b"),
    new_markdown_cell("Last."),
]


def test_a_question_is_what_is_asked_and_its_answer_what_is_then_said(empty_home):
    prediction, exercise = questions.collect(write_pair(empty_home, ASKED, SOLVED))
    assert prediction.tags == ("lesson-01", "prediction")
    assert "<p>It is \\(a &lt; b\\).</p>" in prediction.front
    assert "How\nmany?</strong>" in prediction.front
    assert prediction.back == "<pre>7 &lt; 8</pre>\n<p>Seven; see lesson 02.</p>\n"
    assert exercise.tags == ("lesson-01", "exercise", "hard")
    assert "\\[x_1 * y_2\\]" in exercise.front
    assert "Look" not in exercise.front
    shown = "<p><strong>Hint.</strong>Look.</p>\n<p>First.</p>\n<pre>a; b</pre>\n<p>Last.</p>\n"
    assert exercise.back.replace("</strong> ", "</strong>") == shown


def test_an_exercise_without_a_solution_is_named(empty_home):
    write_pair(empty_home, ASKED, SOLVED[:1] and [new_markdown_cell("# S")])
    with pytest.raises(questions.QuestionError, match=r"exercise 1 of 01_first.ipynb has no"):
        questions.collect(empty_home)


def test_outside_a_clone_there_are_no_questions(empty_home, tmp_path):
    with pytest.raises(questions.QuestionError, match="is no clone"):
        questions.write(tmp_path)


def test_files_parse_and_say_the_same(found, tmp_path):
    table, bank = questions.write(tmp_path)
    head, rows = [], []
    for line in table.read_text(encoding="utf-8").splitlines(keepends=True):
        (rows if rows or not line.startswith("#") else head).append(line)
    assert "#tags column:3\n" in head
    read = list(csv.reader(rows, delimiter=";"))
    assert read == [[one.front, one.back, " ".join(one.tags)] for one in found]
    quiz = ElementTree.parse(bank).getroot()
    essays = quiz.findall("question[@type='essay']")
    assert len(essays) == len(found)
    for essay, one in zip(essays, found, strict=True):
        assert essay.findtext("name/text") == essay.findtext("idnumber") == one.name
        assert essay.findtext("questiontext/text") == one.front
        assert essay.findtext("graderinfo/text") == essay.findtext("generalfeedback/text")
        assert essay.findtext("graderinfo/text") == one.back
    groups = quiz.findall("question[@type='category']")
    assert len(groups) == len(readme.lesson_paths(ROOT))
