"""What students run before they hand in: right sentences, on their own machines."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from typer.testing import CliRunner

from advlab import files
from advlab.classroom import course, grading, merging, run_submission, selfcheck
from advlab.cli import app

pytest.importorskip("nbgrader", reason='needs the extra "course"')


@pytest.fixture(scope="module")
def handed_out(tmp_path_factory):
    """A folder with what a student unpacked: a1.ipynb, and the wheel."""
    folder = tmp_path_factory.mktemp("course")
    a1 = course.sources()["a1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(course, "sources", lambda: {"a1": a1})
        zipped, _ = course.build(folder)  # and the solution
    with zipfile.ZipFile(zipped) as packed:
        packed.extractall(folder / "unpacked")
    return folder / "unpacked" / "a1"


def answered(handed_out):
    """Return a1 as it was handed out, with right answers; and its cells, by name."""
    notebook = nbformat.read(handed_out / "a1.ipynb", as_version=4)
    solved = nbformat.read(course.sources()["a1"], as_version=4)
    answers = {c.metadata.nbgrader.grade_id: c.source for c in solved.cells}
    for cell in notebook.cells:
        if cell.metadata.nbgrader.solution:
            cell.source = answers[cell.metadata.nbgrader.grade_id]
    return notebook, {cell.metadata.nbgrader.grade_id: cell for cell in notebook.cells}


def write(path, notebook):
    nbformat.write(notebook, path)
    return path


def refuse(*_, **__):
    pytest.fail("it was run")


# --- on a student's machine


def test_a_right_notebook_is_ready_without_clone_and_nbgrader(handed_out, tmp_path):
    [wheel] = handed_out.glob("*.whl")
    notebook, cells = answered(handed_out)
    assert f"`pip install {wheel.name}`" in cells["text-00"].source
    assert "`advlab course check a1.ipynb`" in cells["text-00"].source
    with zipfile.ZipFile(wheel) as packed:
        assert not [name for name in packed.namelist() if name.endswith((".ipynb", ".pyc"))]
        packed.extractall(tmp_path / "site")
    missing = "raise ModuleNotFoundError('no nbgrader here')"
    (tmp_path / "site" / "nbgrader.py").write_text(missing)
    path = write(tmp_path / "Zoë O'Neil-Müller a1 (2).ipynb", notebook)
    before = path.read_bytes()
    command = [sys.executable, "-m", "advlab", "course", "check", path.name]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{path.name}: can be handed in\n")
    for test in ("size", "shapes", "parameters", "build-shape", "build-order"):
        assert f"{test}-test (" in done.stdout
    assert done.stdout.count("points): passes") == 5
    assert path.read_bytes() == before
    assert {one.name for one in tmp_path.iterdir()} == {"site", path.name}


def test_nothing_needs_what_windows_has_not():
    for path in files.repository().glob("advlab/**/*.py"):
        for node in ast.parse(path.read_text()).body:
            for alias in getattr(node, "names", []) if isinstance(node, ast.Import) else []:
                assert alias.name not in {"fcntl", "grp", "pwd", "resource", "termios"}, path


# --- what is said


OWN = {
    # a cell before the first answer, and what is said of it
    "max = 3\ndef len(x): return 3": "gives len, max another meaning than Python does",
    "print(later)": "NameError: name 'later' is not defined. Cell 6 (later = 3) gives later its",
    "print(gone)": "No cell gives gone a meaning: did you change or delete the one that did?",
    "later = 3": None,
    "open('data.csv')": "No such file .* The grader has the notebook alone",
    "here = '{mine}'": "names {mine}, which is on your machine",
    "from advlab import attacks, datasets": "imports advlab.attacks, which the grader does not",
    "def load():\n    from google.colab import files": "imports google.colab, which the",
    "  !pip install ./nosuch": "installs packages, which does nothing",
    "for _ in range(3): print('x' * 500_000)": "shows more text than the grader keeps",
    "def f(:": "fails when all is run from the top: SyntaxError",
    "input('Who are you? ')": "asks with input()",
    "exit()": None,
    "import sys\nsys.exit()": "fails when all is run from the top: SystemExit",
    "t = '/'.join(['a/b', '/', '/' + 'x' * 9_000, '/tmp', '\\0'])": None,
}


@pytest.fixture(scope="module")
def messy(handed_out, tmp_path_factory):
    """What is said of a notebook with all that may go wrong; and whose file its cells name."""
    notebook, cells = answered(handed_out)
    folder = tmp_path_factory.mktemp("messy")
    notebook.cells.remove(cells["text-02"])
    notebook.cells.remove(cells["build-solution"])
    cells["stack"].source += "[:3]"
    cells["size-test"].source = "pass"
    cells["shapes-solution"].metadata = {}  # as an editor leaves it
    wrong = cells["parameters-solution"]
    wrong.source = wrong.source.replace("return total", "return 1 + total")
    at = notebook.cells.index(cells["size-solution"])
    mine = Path(__file__).as_posix()
    own = [code.replace("{mine}", mine) for code in OWN]
    notebook.cells[at:at] = [new_code_cell(code) for code in own]
    notebook.cells.append(new_code_cell("import os\nos._exit(1)"))
    notebook.cells.append(new_code_cell("'never run'"))
    return selfcheck.check(write(folder / "a1.ipynb", notebook))


def about(report, place):
    """Return what is said of the cells whose place begins so."""
    return [told for told in (*report.costs, *report.notes) if told.startswith(place)]


@pytest.mark.parametrize("code", OWN)
def test_a_cell_of_ones_own_is_spoken_of_only_if_there_is_something_to_say(code, messy):
    place = f"Cell {[*OWN].index(code) + 3} ("
    said = OWN[code]
    if said is None:
        assert about(messy, place) == []
    else:
        [told] = about(messy, place)
        assert re.search(re.escape(said).replace(r"\.\*", ".*").replace(r"\{mine\}", ".*"), told)


def test_what_became_of_the_cells_handed_out_is_said(messy):
    missing = "The cell build-solution, which is for your answer, is missing."
    assert missing in messy.costs
    put_back = "the grader puts back what was handed out."
    assert f"The cell text-02 is missing; {put_back}" in messy.notes
    changed = [told for told in messy.notes if "was changed" in told]
    assert [told.split(" (")[1] for told in changed] == [
        f"size-test) holds tests, and was changed; {put_back}",
        f"stack) holds what is given, and was changed; {put_back}",
    ]
    assert not about(messy, "Cell 23 (shapes"), "the answer without a name is known"


def test_visible_tests_are_told_as_the_grader_finds_them(messy):
    found = {told.split(" ")[0]: told.split(": ", 1)[1] for told in messy.tests}
    assert found["size-test"] == found["shapes-test"] == "passes"
    assert found["parameters-test"].startswith("fails. AssertionError: the paper's CNN with its 64")
    assert "the cell for the answer build-solution is missing" in found["build-shape-test"]
    lost = "These get no points, see below: parameters-test, build-shape-test, build-order-test."
    assert lost in messy.costs


def test_where_the_grader_would_stop_is_said(messy):
    [told] = [told for told in messy.costs if "would stop" in told]
    assert "(import os) is where the grader would stop: the kernel died" in told


def test_what_was_not_answered_is_said_and_the_exit_code_is_1(handed_out, tmp_path):
    missing = tmp_path / "none.ipynb"
    done = CliRunner().invoke(app, ["course", "check", str(missing), str(handed_out / "a1.ipynb")])
    assert done.exit_code == 1
    told = " ".join(done.output.split())
    assert "none.ipynb: not ready yet This would cost points: - It cannot be graded: " in told
    assert told.count("-solution) holds no answer yet.") == 4
    assert "size-test (4 points): fails. NotImplementedError" in told


def graded_cell(kind, name, source="", **block):
    block = {"grade": True, "solution": False, "locked": True, "points": 2, **block}
    return merging.new_cell(kind, source, {"nbgrader": {"grade_id": name, **block}})


def test_slow_cells_answers_for_a_person_and_hidden_tests_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "CELL_SECONDS", 4)
    person = {"solution": True, "locked": False}
    cells = [
        graded_cell("markdown", "claim", "YOUR ANSWER HERE", **person),
        graded_cell("markdown", "beside", "YOUR ANSWER HERE", **person),
        graded_cell("code", "secret-test"),
        graded_cell("code", "last-test", "assert True"),
    ]
    notebook = new_notebook(cells=cells)
    selfcheck.hand_out(notebook)
    notebook.cells.insert(2, new_markdown_cell("My answer, in a cell of its own."))
    slow = [new_code_cell(f"import time; time.sleep({seconds})") for seconds in (2.5, 60)]
    notebook.cells[4:4] = slow
    report = selfcheck.check(write(tmp_path / "a7.ipynb", notebook))
    assert report.tests == [
        "claim (2 points): fails. no answer",
        "beside (2 points): a person reads your answer",
        "secret-test (2 points): all its tests are hidden",
        "last-test (2 points): fails. took longer than 4 s a cell, or 300 s in all",
    ]
    stop, lost = report.costs
    assert stop.startswith("Cell 6 (import time; time.sleep(60)) is where the grader would stop: ")
    assert lost == "These get no points, see below: claim, last-test."
    [slow] = report.notes
    assert re.match(r"Cell 5 .* took [23] s\. A cell may take 4 s", slow)


# --- what is never run


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda text: "not a notebook", "not a notebook: NotJSONError"),
        (lambda text: text.replace('"handed_out"', '"lost"'), "it does not say what was handed"),
        (lambda text: text.replace('"points"', '"p"'), "it does not say what was handed"),
        (lambda text: json.dumps(json.loads(text) | {"cells": []}), "is it another's notebook"),
    ],
)
def test_what_cannot_be_graded_is_refused_with_the_reason(
    made, told, handed_out, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_submission, "score", refuse)
    path = tmp_path / "a1.ipynb"
    path.write_text(made((handed_out / "a1.ipynb").read_text()))
    report = selfcheck.check(path)
    assert [told in line for line in report.costs] == [True], report.costs
    monkeypatch.setattr(grading, "LARGEST_FILE", path.stat().st_size - 1)
    assert "the file has 0 MB, and more than 0 MB are refused" in str(selfcheck.check(path))
