"""The site: the lessons as they ran, solutions, assignments, results and the package, as pages.

`build` lays out the pages in a folder and lets Sphinx (with MyST-NB) write them. No notebook is
executed. `site_pages/` has the pages that are of the site alone, and Sphinx's settings.
"""

import pkgutil
import posixpath
import re
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

import advlab
from advlab import files
from advlab.upkeep import anywhere, explorer, prose, readme

# The clone's pages of which the site's own pages are made, and where links to them lead.
SOURCES = ("figures", "notebooks", "data", "advlab")
PAGES = {
    "figures/README.md": "results.md",
    "figures/README.md#speed": "speed.md",
    "figures/README.md#what-differs-from-the-papers-procedure": "differences.md",
    "notebooks/README.md": "lessons.md",
    "notebooks/solutions": "solutions.md",
    "notebooks/assignments": "assignments.md",
    "data/README.md": "data.md",
    "advlab/README.md": "package.md",
    "advlab/README.md#more-than-one-machine": "machines.md",
}
OWN_PAGES = Path(__file__).parent / "site_pages"
COPIED = ("LICENSE", "constraints.txt", "figures")  # what pages link to, or show
HIDDEN = {"parameters": "hide-input", anywhere.TAG: "remove-cell"}  # what MyST-NB calls it
LEFT_OUT = ("__main__", "cli", "_torchvision")  # modules that nobody imports
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<to>[^)\s:]+)\)")
_ANCHOR = re.compile(r"(?<=\]\()#[^)]*(?=\))")
_EXERCISE = re.compile(r"^## .*", re.M)
_SAVED = re.compile(r"lesson\.save\(\s*\"(\w+)\"")


class SiteError(RuntimeError):
    """The site cannot be built."""


def need_sphinx() -> None:
    """Raise a `SiteError` where the extra `site` is not installed."""
    try:
        import myst_nb  # noqa: F401
        import pydata_sphinx_theme  # noqa: F401
    except ImportError as error:
        told = f"the site needs its extra: pip install '.[course,site]' ({error})"
        raise SiteError(told) from None


def relink(text: str, folder: str, page: str = "") -> str:
    """Return a page of the clone whose links lead to pages of the site.

    Args:
        text: Of `folder`/README.md.
        folder: Its place in the clone.
        page: Folder of the page of the site that shows it; "": the first one's.
    """

    def leads(link: re.Match[str]) -> str:
        here = link["to"].startswith("#")
        path, mark, part = (f"README.md{link['to']}" if here else link["to"]).partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        to = PAGES.get(path + mark + part)
        if to is None and here:
            return link[0]
        if to is None and (files.home() / path).is_dir():
            return link["text"]  # a folder is no page
        if path.startswith("advlab/") and path.endswith(".py"):
            to = f"api/{path[:-3].replace('/', '.')}.md"
        return f"[{link['text']}]({posixpath.relpath(to or path + mark + part, page or '.')})"

    return _LINK.sub(leads, text)


def prepared(notebook: NotebookNode, name: str, alts: dict[str, str]) -> NotebookNode:
    """Return a notebook as MyST-NB reads it best.

    Exercises are linked to their solutions, and each solution is behind a fold. Anchors are written
    as MyST makes them (JupyterLab keeps capitals), the text of a fold becomes Markdown, the cell of
    parameters is folded, the one for Colab left out, and a figure gets a text in its place.

    Args:
        notebook: As committed; it is changed.
        name: Of its page, such as "02_fgsm" or "solutions/02_fgsm".
        alts: Those texts, by the name under which the cell saves its figure, or by "page: heading".
    """
    heading, solved = "", f"They are all [solved](solutions/{name}.ipynb). Try them first."
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = prose.HINT.sub(_unfold, _ANCHOR.sub(_as_anchor, cell.source))
            cell.source = cell.source.replace(prose.EXERCISES, f"{prose.EXERCISES}\n\n{solved}")
            heading = [heading, *re.findall(r"^##+ (.*)", cell.source, re.M)][-1]
            continue
        tags = cell.metadata.get("tags", [])
        tags += [HIDDEN[tag] for tag in tags if tag in HIDDEN]
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            cell.metadata["mystnb"] = {"image": {"alt": alt(cell, name, heading, alts)}}
    if name.startswith("solutions/"):
        _fold_answers(notebook)
    return notebook


def alt(cell: NotebookNode, name: str, heading: str, alts: dict[str, str]) -> str:
    """Return a text in place of the figure that a cell shows.

    Args:
        cell: With code.
        name: Of the cell's page; see `prepared`.
        heading: Of the cell's section.
        alts: As in `prepared`.
    """
    keys = [*_SAVED.findall(cell.source), f"{name}: {heading}"]
    told = next((alts[key] for key in keys if key in alts), "")
    return told or f"Figure of the section {heading}; the text below says what it shows"


def _fold_answers(notebook: NotebookNode) -> None:
    """Put what stands below each heading of a notebook with solutions behind a fold."""
    ends = chain([""], repeat("</details>\n\n"))
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _EXERCISE.sub(
                lambda heading: f"{next(ends)}{heading[0]}\n\n<details><summary>Solution</summary>",
                cell.source,
            )
    notebook.cells.append(new_markdown_cell("</details>"))


def _as_anchor(link: re.Match[str]) -> str:
    return "#" + re.sub(r"[^\w-]", "", link[0].lower())


def _unfold(fold: re.Match[str]) -> str:
    """Return a fold whose text is Markdown: between empty lines, as far in as it stands."""
    space, text = fold["in"], fold["text"].strip()
    parts = f"<details><summary>{fold['head']}</summary>", text, "</details>"
    return "\n\n".join(space + part for part in parts)


def module_names() -> Iterator[str]:
    """Yield the names of the package's modules."""
    for module in pkgutil.walk_packages(advlab.__path__, "advlab."):
        if not module.ispkg and module.name.rpartition(".")[2] not in LEFT_OUT:
            yield module.name


def _notebook(path: Path, name: str, alts: dict[str, str]) -> bytes:
    return nbformat.writes(prepared(nbformat.read(path, as_version=4), name, alts)).encode()


def pages() -> dict[str, bytes]:
    """Return the sources of all pages, and what they need, by their paths in the site's folder."""
    from advlab.classroom import course

    home, made = files.home(), {}
    for top in (OWN_PAGES, *(home / name for name in COPIED)):
        for path in [top] if top.is_file() else filter(Path.is_file, top.rglob("*")):
            root = top if top == OWN_PAGES else home
            made[path.relative_to(root).as_posix()] = path.read_bytes()
    alts = tomllib.loads(made.pop("alts.toml").decode())
    for folder in SOURCES:
        text = (home / folder / "README.md").read_text(encoding="utf-8")
        made[f"{folder}/README.md"] = relink(text, folder).encode()
    text, folder = (
        (home / readme.GUIDE).read_text(encoding="utf-8"),
        posixpath.dirname(readme.GUIDE),
    )
    made[readme.GUIDE] = relink(text, folder, folder).encode()
    solved = sorted((home / "notebooks" / "solutions").glob("*.ipynb"))
    for path in (*readme.lesson_paths(home), *solved):
        name = path.relative_to(home / "notebooks").with_suffix("").as_posix()
        made[f"notebooks/{name}.ipynb"] = _notebook(path, name, alts)
    with tempfile.TemporaryDirectory() as folder:
        for name, path in course.release(Path(folder)).items():
            made[f"notebooks/assignments/{name}/{name}.ipynb"] = _notebook(path, name, alts)
    for name in module_names():
        made[f"api/{name}.md"] = API.format(title=name.removeprefix("advlab."), name=name).encode()
    for name, script in explorer.scripts().items():
        made[f"_static/explorer/{name}"] = script
    return made


API = """# {title}

```{{eval-rst}}
.. automodule:: {name}
   :members:
```
"""


def lay_out(folder: Path) -> None:
    """Write the pages' sources to `folder`, but not what it has already: Sphinx then skips it."""
    made = {folder / name: content for name, content in pages().items()}
    for path in filter(Path.is_file, folder.rglob("*")):
        if path not in made:
            path.unlink()
    for path, content in made.items():
        if not path.is_file() or path.read_bytes() != content:
            files.write_bytes(path, content)


def build(output: Path) -> Path:
    """Build the site.

    Args:
        output: Gets the pages. What Sphinx keeps between builds is beside it, in NAME-work.

    Returns:
        The first page.

    Raises:
        SiteError: without the extra `site`, outside a clone, or if Sphinx has a warning (printed).
        CourseError: as `course.release`.
    """
    need_sphinx()
    from sphinx.cmd.build import build_main

    if not files.is_clone(files.home()):
        raise SiteError(f"{files.home()} is no clone of the repository; run this in one")
    work = output.with_name(f"{output.name}-work")
    lay_out(work / "pages")
    asked = ["-b", "html", "-q", "-W", "--keep-going", "-d", str(work / "doctrees")]
    if build_main([*asked, str(work / "pages"), str(work / "html")]):
        raise SiteError("the site has warnings, printed above; mend them first")
    left_out = shutil.ignore_patterns("*.map", ".buildinfo", "webpack-macros.html")
    shutil.copytree(work / "html", output, ignore=left_out, dirs_exist_ok=True)
    return output / "index.html"
