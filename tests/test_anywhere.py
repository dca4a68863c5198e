"""Links to Colab and Binder, the cell that installs advlab in Colab, and a reader's copy."""

import re
import sys

import nbformat
import pytest
from conftest import write_lesson
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from advlab import __version__, files
from advlab.upkeep import anywhere, readme

ROOT = files.repository()
NOTEBOOKS = anywhere.notebooks(ROOT)
ADDRESS = '[project]\nname = "advlab"\n[project.urls]\nRepository = "{}"\n'
HEADER = "# 01 · It\n\n**Study time:** 5 minutes.\n\n{}\n\nText."
TIMES = readme.time_line(20, 10)


@pytest.fixture
def clone(empty_home):
    """A clone with one lesson and a page of solutions; returns its folder."""
    write_lesson(empty_home, "01_first", "1 + 1")
    write_lesson(empty_home, "solutions/01_first", "1 + 1")
    path = empty_home / "notebooks" / "01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, new_markdown_cell(HEADER.format(TIMES)))
    nbformat.write(notebook, path)
    (empty_home / "README.md").write_text(
        "# advlab\n\n<!-- links: generated -->\n\n<!-- end of links -->\n\nText.\n"
    )
    (empty_home / "pyproject.toml").write_text('[project]\nname = "advlab"\n')
    return empty_home


def executed() -> nbformat.NotebookNode:
    """Return a notebook that was run."""
    result = new_output("execute_result", {"text/plain": "2"}, execution_count=2)
    printed = new_output("stream", name="stdout", text="x\n")
    cells = [
        new_code_cell("profile = 'auto'", metadata={"tags": ["parameters"]}, execution_count=1),
        new_markdown_cell("Two."),
        new_code_cell("1 + 1", outputs=[result], execution_count=2),
        new_code_cell("", execution_count=None),
        new_code_cell("print('x')", outputs=[printed], execution_count=3),
    ]
    return new_notebook(cells=cells)


# --- as committed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_each_lesson_and_solution_has_its_cell_and_links(path):
    # If this fails: advlab links
    assert nbformat.writes(anywhere.prepared(path, ROOT)) + "\n" == path.read_text(encoding="utf-8")
    [cell] = [c for c in nbformat.read(path, as_version=4).cells if c.id == anywhere.TAG]
    assert cell.outputs == []


def test_readme_has_the_badges_of_the_address():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.refreshed(text, ROOT, {"links": anywhere.badges}) == text


def test_cell_does_nothing_outside_colab(monkeypatch):
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    names = {}
    exec(anywhere.CELL.format(wheel="none"), names)
    assert names.keys() == {"__builtins__", "sys"}


# --- with a public address


@pytest.mark.parametrize("end", ["", "/", ".git"])
def test_one_address_makes_badges_links_and_the_wheel_s(clone, end):
    (clone / "pyproject.toml").write_text(ADDRESS.format(f"https://github.com/An-Owner/a.lab{end}"))
    anywhere.refresh()
    tag = f"v{__version__}"
    colab = "https://colab.research.google.com/github/An-Owner/a.lab/blob/"
    colab += f"{tag}/notebooks/01_first.ipynb"
    binder = f"https://mybinder.org/v2/gh/An-Owner/a.lab/{tag}?urlpath=lab/tree/notebooks"
    page = (clone / "README.md").read_text()
    assert re.findall(r"\]\((http\S+)\)\]\((\S+)\)", page) == [
        (anywhere.COLAB_BADGE, colab),
        (anywhere.BINDER_BADGE, binder),
    ]
    lesson = nbformat.read(clone / "notebooks" / "01_first.ipynb", as_version=4)
    line = f"**Without installing anything:** [in Colab]({colab}), "
    line += f"[in Binder]({binder}/01_first.ipynb)."
    assert lesson.cells[0].source == HEADER.format(f"{TIMES}\n\n{line}")
    for name in ("01_first", "solutions/01_first"):
        code = nbformat.read(clone / "notebooks" / f"{name}.ipynb", as_version=4).cells
        [cell] = [c for c in code if c.id == "colab"]
        wheel = f"https://github.com/An-Owner/a.lab/releases/download/{tag}/advlab-"
        assert f'"{wheel}{__version__}-py3-none-any.whl"' in cell.source


def test_address_that_goes_takes_the_links_with_it(clone):
    anywhere.refresh()
    before = [path.read_bytes() for path in sorted(clone.rglob("*.*"))]
    about = (clone / "pyproject.toml").read_text()
    (clone / "pyproject.toml").write_text(ADDRESS.format("https://github.com/an/other"))
    anywhere.refresh()
    assert b"an/other" in (clone / "notebooks" / "01_first.ipynb").read_bytes()
    (clone / "pyproject.toml").write_text(about)
    anywhere.refresh()
    assert [path.read_bytes() for path in sorted(clone.rglob("*.*"))] == before


@pytest.mark.parametrize("address", ["https://example.org/a/b", "https://github.com/a", "github"])
def test_address_that_colab_cannot_read_is_refused(clone, address):
    (clone / "pyproject.toml").write_text(ADDRESS.format(address))
    with pytest.raises(ValueError, match=r"it must be https://github\.com/OWNER/NAME"):
        anywhere.refresh()


# --- the cell


def test_cell_comes_behind_the_parameters_and_leaves_the_outputs(tmp_path):
    before = executed()
    notebook = anywhere.with_cell(executed(), "a.whl")
    assert [cell.id == "colab" for cell in notebook.cells[:3]] == [False, True, False]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, None, 4]
    assert code[2].outputs[0].execution_count == 3
    assert code[2].outputs[0].data == before.cells[2].outputs[0].data
    assert code[4].outputs == before.cells[4].outputs
    once = nbformat.writes(notebook)
    assert nbformat.writes(anywhere.with_cell(notebook, "a.whl")) == once
    assert '"b.whl"' in anywhere.with_cell(notebook, "b.whl").cells[1].source
    nbformat.validate(notebook)


def test_cell_of_a_notebook_that_was_not_run_was_not_run():
    notebook = executed()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(execution_count=None, outputs=[])
    cells = anywhere.with_cell(notebook, "a.whl").cells
    assert not any(cell.get("execution_count") for cell in cells)


def test_notebook_without_a_place_for_cell_or_links_is_named():
    with pytest.raises(ValueError, match="no cell is tagged 'parameters'"):
        anywhere.with_cell(new_notebook(cells=[new_code_cell("1")]), "a.whl")
    with pytest.raises(ValueError, match=r"no line .*Time on two cores"):
        anywhere.with_links("# Title", "an/owner", "notebooks/01.ipynb")


# --- a copy


def test_copy_of_the_lessons_keeps_what_its_reader_wrote(tmp_path):
    folder = tmp_path / "mine"
    found = dict(anywhere.copy_lessons(folder))
    names = {path.relative_to(folder).as_posix() for path in found}
    assert names == {p.relative_to(ROOT / "notebooks").as_posix() for p in NOTEBOOKS}
    assert set(found.values()) == {True}
    one = folder / "02_fgsm.ipynb"
    one.write_text("my answers")
    (folder / "01_baseline.ipynb").unlink()
    again = dict(anywhere.copy_lessons(folder))
    assert [path for path, new in again.items() if new] == [folder / "01_baseline.ipynb"]
    assert one.read_text() == "my answers"


def test_copy_over_the_clone_is_refused():
    with pytest.raises(ValueError, match="holds the repository's own files"):
        list(anywhere.copy_lessons(ROOT / "notebooks"))
