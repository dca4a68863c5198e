"""The lessons: as committed, through papermill on Shapes-10, and through nbval.

nbval runs on CIFAR-10 where it is: between them the two see both data sets.

The solutions of their exercises, and the assignments, as committed; test_course.py runs the latter.
"""

import os
import re
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import REAL_DATA, shared_folder
from nbconvert import PythonExporter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from advlab import catalogue, files
from advlab.upkeep import anywhere, hygiene
from advlab.upkeep.readme import time_line

ROOT = files.repository()
LESSONS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
ASSIGNMENTS = sorted((ROOT / "notebooks" / "assignments").glob("*/*.ipynb"))
NBVAL_DATASET = "cifar10" if REAL_DATA else "shapes10"
by_name = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
by_solution = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
each_notebook = pytest.mark.parametrize(
    "path", [*LESSONS, *SOLUTIONS, *ASSIGNMENTS], ids=lambda p: f"{p.parent.name}-{p.stem}"
)


def read_code(path):
    """Return the code cells of a notebook that have code."""
    cells = nbformat.read(path, as_version=4).cells
    return [c for c in cells if c.cell_type == "code" and c.source.strip()]


def shown_text(output) -> str:
    """Return all text that an output shows."""
    data = output.get("data", {})
    parts = [output.get("text", ""), "".join(output.get("traceback", []))]
    return "".join(parts + [str(v) for kind, v in data.items() if not kind.startswith("image/")])


def has_tag(cell, tag: str) -> bool:
    """Tell whether a cell is tagged `tag`."""
    return tag in cell.metadata.get("tags", [])


def test_lessons_are_those_of_the_catalogue():
    assert [p.stem for p in LESSONS] == list(catalogue.LESSONS)


def test_each_lesson_has_solutions():
    assert [p.name for p in SOLUTIONS] == [p.name for p in LESSONS]


@each_notebook
def test_notebook_is_committed_as_it_should_be(path):
    assert list(hygiene.problems(path)) == []


def spoilt(change):
    """Return a lesson that has one thing wrong."""
    code = [
        new_code_cell("seed = 0", metadata={"tags": ["parameters"]}, execution_count=1),
        new_code_cell(
            "print(1)",
            metadata={"tags": ["nbval-check-output"]},
            execution_count=2,
            outputs=[new_output("stream", text="1")],
        ),
    ]
    notebook = new_notebook(cells=[new_markdown_cell("# Title"), *code])
    change(notebook, *code)
    return notebook


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda n, a, b: None, ""),
        (lambda n, a, b: n.metadata.update(widgets={}), "metadata hold 'widgets'"),
        (lambda n, a, b: b.metadata.update(execution={}), "code cell 2 keeps the metadata"),
        (lambda n, a, b: b.update(execution_count=3), "not executed once from top to bottom"),
        (lambda n, a, b: a.metadata.clear(), "no cell is tagged parameters"),
        (lambda n, a, b: b.metadata.clear(), "no cell is tagged nbval-check-output"),
        (lambda n, a, b: b.outputs.clear(), "code cell 2 is tagged nbval-check-output but"),
        (lambda n, a, b: b.update(source="x\n" * 31), "code cell 2 has 31 lines"),
        (lambda n, a, b: b.outputs[0].update(name="stderr"), "prints to stderr: '1'"),
        (lambda n, a, b: b.outputs.append(new_output("error")), "ends in an error"),
        (lambda n, a, b: b.outputs[0].update(text="in /home/me"), "it ran on: /home/me"),
        (lambda n, a, b: b.outputs[0].update(text="\x1b[31m"), "control characters"),
        (lambda n, a, b: n.metadata.update(x="y" * 1_000_001), "1.0 MB; over 1 MB"),
    ],
)
def test_what_is_wrong_with_a_notebook_is_named(change, told, tmp_path, monkeypatch, capsys):
    path = tmp_path / "01_first.ipynb"
    path.write_text(nbformat.writes(spoilt(change)))
    monkeypatch.setattr(sys, "argv", ["hygiene", str(path)])
    assert hygiene.main() == bool(told)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == bool(told), lines
    assert all(told in line and str(path) in line for line in lines)


def test_a_file_that_is_no_notebook_is_named(tmp_path):
    path = tmp_path / "half.ipynb"
    path.write_text('{"cells": [')
    assert "not a readable notebook" in "".join(hygiene.problems(path))


def test_hygiene_looks_at_all_notebooks():
    assert {*LESSONS, *SOLUTIONS, *ASSIGNMENTS} == set(hygiene.committed(ROOT))


@pytest.mark.parametrize("path", [*LESSONS, *SOLUTIONS], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_notebook_is_a_script_too(path):
    # Without a notebook around it, `display` and the like are no names unless they are imported.
    script, _ = PythonExporter().from_filename(path)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"]
    done = subprocess.run(command, input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@by_name
def test_lesson_has_parameters_and_checked_cells(path):
    code = read_code(path)
    assert has_tag(code[0], "parameters")
    names = set(re.findall(r"^(\w+) = ", code[0].source, re.M))
    assert {"profile", "dataset", "seed", "data_dir", "output_dir"} <= names
    checked = [c for c in code if has_tag(c, "nbval-check-output")]
    assert len(checked) >= 2
    for cell in checked:
        assert cell.outputs, cell.source
        assert "False" not in shown_text(cell.outputs[0])


@by_solution
def test_solution_answers_each_exercise_of_its_lesson(path):
    def prose(notebook):
        cells = nbformat.read(notebook, as_version=4).cells
        return "\n".join(c.source for c in cells if c.cell_type == "markdown")

    asked = prose(LESSONS[SOLUTIONS.index(path)]).split("## Your turn")[1].split("\n## ")[0]
    exercises = re.findall(r"^(\d+)\. ", asked, re.M)
    assert len(exercises) >= 5
    assert re.findall(r"^## (\d+) ", prose(path), re.M) == exercises
    assert len(re.findall(r"^\d+\. \*\*(?:Easy|Medium|Hard|Open)\b", asked, re.M)) == len(exercises)
    assert [c for c in read_code(path) if has_tag(c, "nbval-check-output")]


@by_name
def test_lesson_has_its_parts(path):
    cells = nbformat.read(path, as_version=4).cells
    prose = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    for part in ("You will learn", "Contents", "Your turn", "What you learned", "References"):
        assert part in prose, part
    assert 2 <= prose.count("**Predict, then run.**") <= 7
    lesson = catalogue.LESSONS[path.stem]
    assert f"**Study time:** about {lesson.minutes} minutes" in cells[0].source
    assert all(f"[lesson {number}](" in cells[0].source for number in lesson.after)
    assert "TODO" not in prose
    assert len(prose.split()) <= 2_500
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert sum(not has_tag(cell, anywhere.TAG) for cell in code) <= 20


@by_name
def test_checks_for_the_tests_are_folded_away(path):
    for cell in read_code(path):
        if has_tag(cell, "hide-cell"):
            folded = {"outputs_hidden": True, "source_hidden": True}
            assert cell.metadata.get("jupyter") == folded, cell.source


@each_notebook
def test_no_line_of_a_paragraph_becomes_a_list(path):
    # A year at the beginning of a line, with a full stop, would be the number of an item.
    cells = nbformat.read(path, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert re.findall(r"^ *\d{3,}[.)] .*", prose, re.M) == []


@by_name
def test_nothing_stands_between_a_prediction_and_its_answer(path):
    # The question ends its cell of text; then come the reader's range, if any, and the answer.
    cells = nbformat.read(path, as_version=4).cells
    for cell, after, last in zip(cells, cells[1:], cells[2:], strict=False):
        if cell.cell_type == "markdown" and "**Predict, then run.**" in cell.source:
            rest = cell.source.rpartition("**Predict, then run.**")[2]
            assert "\n\n" not in rest.strip()
            answer = last if "Prediction(" in after.source else after
            assert after.cell_type == answer.cell_type == "code"
            assert answer.outputs
    assert time_line(1, 1).split(" about")[0] in cells[0].source


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Settings for lessons run in other processes: one thread, and models shared by all of them.

    They find no scipy, which is here when an extra ([bench]) is, and not on a student's machine.
    """
    missing = tmp_path_factory.mktemp("missing")
    (missing / "scipy").mkdir()
    (missing / "scipy" / "__init__.py").write_text("raise ModuleNotFoundError('no scipy here')")
    paths = [str(missing), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "ADVLAB_CACHE": str(shared_folder(tmp_path_factory, "lessons")),
        **({"ADVLAB_DATA": REAL_DATA} if REAL_DATA else {}),
    }


def run_command(command: list[str], environment: dict[str, str], cwd) -> str:
    """Run a command; return what it prints, and fail with it."""
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_all_lessons_run_by_papermill(environment, tmp_path):
    command = [sys.executable, "-m", "advlab", "run", "--profile", "quick"]
    command += ["--dataset", "shapes10", "--output-dir", str(tmp_path / "out")]
    shown = run_command(command, environment, tmp_path)
    assert "they compare with nothing in the paper" in " ".join(shown.split())
    executed = sorted((tmp_path / "out" / "notebooks").iterdir())
    assert [p.name for p in executed] == [p.name for p in LESSONS]
    for path, committed in zip(executed, LESSONS, strict=True):
        for found, expected in zip(read_code(path), read_code(committed), strict=True):
            if has_tag(expected, "nbval-check-output"):
                texts = ["".join(map(shown_text, cell.outputs)) for cell in (found, expected)]
                assert texts[0] == texts[1], f"{path.name}: {expected.source}"
    figures = tmp_path / "out" / "figures"
    for stem in ("fig1_fgsm", "fig4_cnn_accuracy", "fig7_cnn_lstm_loss"):
        assert 0 < (figures / f"{stem}.png").stat().st_size < 150_000
    assert (ROOT / "figures" / "fig1_fgsm.png").is_file()


def test_lessons_run_on_a_folder_of_pictures(environment, tmp_path):
    rng = np.random.default_rng(0)
    for k, name in enumerate(("left", "right", "both")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 90, (30, 40, 3), dtype=np.uint8)
            pixels[:, :20] += 120 * (k != 1)
            pixels[:, 20:] += 120 * (k != 0)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    command = [sys.executable, "-m", "advlab", "run", "02", "05", "--profile", "quick"]
    command += ["--dataset", f"folder:{tmp_path / 'pictures'}@40", "--output-dir", "out"]
    shown = run_command(command, environment, tmp_path)
    assert "nothing compares with the paper" in " ".join(shown.split())
    table = pd.read_csv(tmp_path / "out" / "figures" / "fig2_accuracies.csv")
    assert (set(table["data"]), set(table["n"])) == ({"folder pictures"}, {12})


@pytest.mark.parametrize("path", [*LESSONS, *SOLUTIONS], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_checked_outputs_repeat_in_nbval(path, environment, tmp_path):
    # nbval compares the outputs of the cells tagged `nbval-check-output`.
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-q"]
    command += ["-o", "addopts=", "-p", "no:cacheprovider", "--nbval-cell-timeout=600", str(path)]
    settings = {
        "ADVLAB_PROFILE": "quick",
        "ADVLAB_DATASET": NBVAL_DATASET,
        "ADVLAB_OUTPUT": str(tmp_path),
    }
    assert "passed" in run_command(command, environment | settings, tmp_path)


def test_one_lesson_runs_by_the_command_of_the_readme_from_any_folder(environment, tmp_path):
    command = [sys.executable, "-m", "papermill", str(LESSONS[2]), "out.ipynb", "--no-progress-bar"]
    command += ["-p", "profile", "quick", "-p", "seed", "1", "-p", "dataset", "shapes10"]
    run_command([*command, "-p", "output_dir", str(tmp_path / "o")], environment, tmp_path)
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    shown = "".join(shown_text(o) for c in executed.cells for o in c.get("outputs", []))
    assert "profile quick | Shapes-10" in shown
    assert "seed 1" in shown


def test_one_lesson_runs_by_nbconvert(environment, tmp_path):
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute"]
    command += [str(LESSONS[0]), "--output-dir", str(tmp_path)]
    # In the profile that it has without CIFAR-10 when nothing is said.
    settings = {"ADVLAB_DATASET": "shapes10", "ADVLAB_OUTPUT": str(tmp_path / "o")}
    run_command(command, environment | settings, tmp_path)
    assert (tmp_path / LESSONS[0].name).is_file()
