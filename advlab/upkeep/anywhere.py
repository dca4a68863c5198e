"""The lessons outside a clone: a copy to open in JupyterLab, and the way to Colab and Binder.

What depends on the repository's public address is made of `[project.urls]` in pyproject.toml. With
no address there is no link, and the wheel that Colab installs is one that the reader uploads.
"""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from advlab import __version__, files
from advlab.upkeep import readme

TAG = "colab"  # of the cell that installs advlab there
WHEEL = f"advlab-{__version__}-py3-none-any.whl"
_GITHUB = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)/?")
_LINKS = re.compile(r"\n\n\*\*Without installing anything:\*\* .*")
_TIMES = re.compile(r"\*\*Time on two cores:\*\*.*(?:\n.+)*")
COLAB_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
BINDER_BADGE = "https://mybinder.org/badge_logo.svg"
CELL = """\
# In Google Colab only: install advlab beside the torch that is there. Elsewhere this does nothing.
import sys

if "google.colab" in sys.modules:
    import subprocess

    wheel = "{wheel}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, wheel], check=True)

    from advlab.upkeep import setup

    setup.complete()"""


# --- the public address


def github_name(home: Path) -> str:
    """Return OWNER/NAME of the repository on GitHub; "" while it has no public address.

    Raises:
        ValueError: if the address is not on GitHub, which Colab and Binder read here.
    """
    about = tomllib.loads((home / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = about.get("urls", {}).get("Repository", "")
    if not address:
        return ""
    if (found := _GITHUB.fullmatch(address)) is None:
        raise ValueError(
            f"[project.urls] in pyproject.toml: Repository is {address!r}; it must be "
            "https://github.com/OWNER/NAME"
        )
    return found[1].removesuffix(".git")


def colab_url(repository: str, path: str) -> str:
    """Return where Colab opens a notebook of this version; `path` is that in the clone."""
    return f"https://colab.research.google.com/github/{repository}/blob/v{__version__}/{path}"


def binder_url(repository: str, path: str) -> str:
    """Return where Binder opens a notebook, or a folder, of this version."""
    return f"https://mybinder.org/v2/gh/{repository}/v{__version__}?urlpath=lab/tree/{path}"


def wheel_url(repository: str) -> str:
    """Return where this version's wheel is; without an address, its name beside the notebook."""
    if not repository:
        return WHEEL
    return f"https://github.com/{repository}/releases/download/v{__version__}/{WHEEL}"


def badges(home: Path) -> str:
    """Return README.md's badges; "" while there is no address."""
    if not (where := github_name(home)):
        return ""
    first = readme.lesson_paths(home)[0].relative_to(home).as_posix()
    return (
        f"[![Open lesson 01 in Colab]({COLAB_BADGE})]({colab_url(where, first)})\n"
        f"[![Open all lessons in Binder]({BINDER_BADGE})]({binder_url(where, 'notebooks')})"
    )


# --- in the notebooks


def with_cell(notebook: NotebookNode, wheel: str) -> NotebookNode:
    """Put the cell for Colab behind the cell of parameters, or make it anew; return the notebook.

    It has no output, so an executed notebook stays one: the cells below it are counted on.

    Args:
        notebook: It is changed.
        wheel: What pip is to install.

    Raises:
        ValueError: if no cell is tagged "parameters".
    """
    ran = any(cell.get("execution_count") for cell in notebook.cells)
    notebook.cells = [cell for cell in notebook.cells if TAG not in _tags(cell)]
    places = [at for at, cell in enumerate(notebook.cells, 1) if "parameters" in _tags(cell)]
    if not places:
        raise ValueError("no cell is tagged 'parameters', behind which the one for Colab stands")
    source = CELL.format(wheel=wheel)
    about = {"tags": [TAG], "jupyter": {"source_hidden": True}}  # nothing to read for a learner
    notebook.cells.insert(places[0], new_code_cell(source, id=TAG, metadata=about))
    if ran:
        code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
        for number, cell in enumerate(code, 1):
            cell.execution_count = number
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = number
    return notebook


def _tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def with_links(source: str, repository: str, path: str) -> str:
    """Return a lesson's header with its line of links; without the line while there is no address.

    Raises:
        ValueError: if the header has no line of times, behind which it stands.
    """
    source = _LINKS.sub("", source)
    times = _TIMES.search(source)
    if times is None:
        raise ValueError("the header has no line **Time on two cores:** ...")
    if not repository:
        return source
    line = (
        f"\n\n**Without installing anything:** [in Colab]({colab_url(repository, path)}), "
        f"[in Binder]({binder_url(repository, path)})."
    )
    return source.replace(times[0], times[0] + line)


def prepared(path: Path, home: Path) -> NotebookNode:
    """Return a lesson, or a page of solutions, with its cell for Colab and its links."""
    notebook, where = nbformat.read(path, as_version=4), github_name(home)
    first = notebook.cells[0]
    if path.parent == home / "notebooks":
        first.source = with_links(first.source, where, path.relative_to(home).as_posix())
    return with_cell(notebook, wheel_url(where))


def notebooks(home: Path) -> list[Path]:
    """Return the notebooks that have the cell: lessons, and the solutions of their exercises."""
    return [*readme.lesson_paths(home), *sorted((home / "notebooks/solutions").glob("*.ipynb"))]


def refresh() -> None:
    """Write badges, links and cells into a clone's README.md and notebooks.

    Raises:
        FileNotFoundError: outside a clone.
        ValueError: as `github_name`, `with_cell` and `with_links`.
    """
    home = files.clone()
    for path in notebooks(home):
        text = nbformat.writes(prepared(path, home)) + "\n"
        files.write_bytes(path, text.encode())
    page = home / "README.md"
    text = readme.refreshed(page.read_text(encoding="utf-8"), home, {"links": badges})
    files.write_bytes(page, text.encode())


# --- a reader's copy


def copy_lessons(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Copy lessons and solutions into `folder`; a notebook that is there is kept, changed or not.

    Yields:
        Each notebook in `folder`, and whether it was written.

    Raises:
        ValueError: as `files.results_folder`.
        OSError: if it cannot be written; names the folder and the mend.
    """
    folder, home = files.results_folder(folder), files.shipped()
    for path in notebooks(home):
        target = folder / path.relative_to(home / "notebooks")
        new = not target.exists()
        if new:
            files.write_bytes(target, path.read_bytes())
        yield target, new
