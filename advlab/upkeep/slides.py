"""Slides of the lessons as they ran: a file each, with reveal.js and the figures inside.

Nobody tags cells for it. A rule does, while the slides are made: a heading starts a slide, and what
is short or can be looked at follows on it, or below it where it is full. What answers a question
comes after it. Long paragraphs are notes for the speaker (key S); long code is left out. What is
larger than a screen all the same, such as a long table, is drawn smaller when it is shown.
"""

import html
import importlib.util
import re
import tomllib
from collections.abc import Iterable, Iterator
from math import ceil
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import SlidesExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from advlab import files
from advlab.upkeep import prose, runs, site

ROOM = 16.5  # lines of text that a slide holds
WIDE = 84  # characters of such a line
SMALL = 0.72  # a line of code, in lines of text
WIDE_CODE = 104  # characters of such a line
SMALLEST = 60  # percent of its size to which a slide that is too full may shrink
LONGEST_TEXT = 40  # words of a paragraph: a longer one is for the speaker's notes
LONGEST_CODE = 20  # lines of a cell: longer code is left to the notebook
LONGEST_OUTPUT = 34  # printed lines: longer ones go on below, from a blank line on
TIMES = "**Time on two cores:**"  # how long the notebook runs
UNTOLD = ("References",)  # sections that are left out
REVEAL = ("dist/reset.css", "dist/reveal.css", "dist/theme/white.css")
SCRIPTS = ("dist/reveal.js", "plugin/notes/notes.js")
_FONTS = re.compile(r"@import url\([^)]*\);")  # the reader's own fonts will do
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<to>[^)\s]+)\)")
_LESSON = re.compile(r"(?P<name>\d\d_\w+)\.ipynb")


class SlidesError(RuntimeError):
    """The slides cannot be made."""


def reveal_files() -> dict[str, str]:
    """Return what slides need of reveal.js: text by its path there.

    It comes with the package sphinx-revealjs, so that neither making nor showing slides needs a
    network.

    Raises:
        SlidesError: if the package is not installed, or does not hold one of them.
    """
    found = importlib.util.find_spec("sphinx_revealjs")
    if found is None or not found.submodule_search_locations:
        raise SlidesError(
            "slides need reveal.js, which comes with an extra: pip install '.[course,site]'"
        )
    folder = Path(found.submodule_search_locations[0]) / "_static" / "revealjs"
    for name in (*REVEAL, *SCRIPTS):
        if not (folder / name).is_file():
            raise SlidesError(
                f"sphinx-revealjs has no {name} in {folder}; install the version of constraints.txt"
            )
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in (*REVEAL, *SCRIPTS)}
    return {name: _FONTS.sub("", text) for name, text in texts.items()}


def how(block: str) -> str:
    """Return where a block of Markdown goes: "slide", "subslide", "notes", or "-" (it follows)."""
    level, _ = prose.heading(block)
    if level:
        return "slide" if level < 3 else "subslide"
    if prose.PREDICT in block:
        return "subslide"
    if block.startswith((">", TIMES)):
        return "notes"
    shown = block.startswith(("$$", "|", "- ", "* ", "```", "\\begin")) or block[0].isdigit()
    return "-" if shown or len(block.split()) <= LONGEST_TEXT else "notes"


def lines(cell: NotebookNode) -> float:
    """Return about how many lines of text a cell takes on a slide."""
    if cell.cell_type == "code":
        shown = [] if cell.metadata.get("transient") else [cell.source]
        shown += [output.text for output in cell.outputs if "text" in output]
        if any("text/html" in output.get("data", {}) for output in cell.outputs):
            return ROOM  # a figure
        return sum(SMALL * _wrapped(text, WIDE_CODE) + 1 for text in shown)
    level, _ = prose.heading(cell.source)
    taken = 3.0 if level else 0.6
    for line in cell.source.splitlines():
        taken += 2.5 if line.startswith("$$") else ceil(len(line) / WIDE)
    return taken


def _wrapped(text: str, wide: int) -> int:
    return sum(max(1, ceil(len(line) / wide)) for line in text.splitlines())


def _linked(text: str) -> str:
    """Return Markdown whose links lead to slides, or elsewhere on the web; others are text."""

    def leads(link: re.Match[str]) -> str:
        if link["to"].startswith("http"):
            return link[0]
        lesson = _LESSON.fullmatch(link["to"])
        return f"[{link['text']}]({lesson['name']}.html)" if lesson else link["text"]

    return _LINK.sub(leads, text)


def _texts(cell: NotebookNode) -> Iterator[tuple[NotebookNode, str]]:
    for block in prose.blocks(prose.HINT.sub("", cell.source)):
        for part in prose.items(block):
            yield new_markdown_cell(_linked(part)), how(part)


def _picture(output: NotebookNode, alt: str) -> NotebookNode:
    """Return an output with a figure as HTML, which has room for a text in its place."""
    inside = "".join(output.data["image/png"].split())
    shown = f'<figure><img alt="{html.escape(alt)}" src="data:image/png;base64,{inside}"></figure>'
    return nbformat.v4.new_output("display_data", data={"text/html": shown})


def _results(cell: NotebookNode, alt: str) -> Iterator[tuple[NotebookNode, str]]:
    """Yield a cell for each output of a code cell that is shown: figures, and printed lines."""
    for output in cell.outputs:
        if "image/png" in output.get("data", {}):
            yield _shown(_picture(output, alt)), "subslide"
        elif output.output_type == "stream":
            for text in _screens(output.text):
                yield _shown(nbformat.v4.new_output("stream", text=text)), "-"


def _shown(output: NotebookNode) -> NotebookNode:
    """Return a cell of which an output is shown, and no code."""
    return new_code_cell(outputs=[output], metadata={"transient": {"remove_source": True}})


def _screens(printed: str) -> list[str]:
    """Return printed lines in parts that a slide can hold, where blank lines allow it."""
    if len(printed.splitlines()) <= LONGEST_OUTPUT:
        return [printed]
    return [part.strip("\n") + "\n" for part in printed.split("\n\n") if part.strip()]


def _code(cell: NotebookNode, alt: str) -> Iterator[tuple[NotebookNode, str]]:
    if {"parameters", prose.HIDDEN} & set(prose.tags(cell)) or "Prediction(" in cell.source:
        return
    if len(cell.source.splitlines()) <= LONGEST_CODE:
        yield new_code_cell(cell.source), "-"
    yield from _results(cell, alt)


def parts(notebook: NotebookNode, name: str, alts: dict[str, str]) -> Iterator[tuple[Any, str]]:
    """Yield what the slides of a notebook are made of: cells, and where each goes (see `how`)."""
    section, told = "", True
    for cell in notebook.cells:
        if cell.cell_type == "code":
            yield from _code(cell, site.alt(cell, name, section, alts)) if told else ()
            continue
        for part, where in _texts(cell):
            level, title = prose.heading(part.source)
            if level:
                section, told = title, title not in UNTOLD
            if told:
                yield part, where


def deck(notebook: NotebookNode, name: str, alts: dict[str, str]) -> NotebookNode:
    """Return a notebook whose cells are slides, tagged as nbconvert reads it.

    Args:
        notebook: A lesson, executed; it is left as it is.
        name: Of the lesson, such as "02_fgsm".
        alts: Texts in place of figures; see `site.alt`.
    """
    made = nbformat.v4.new_notebook(metadata=notebook.metadata)
    section, left = "", 0.0

    def add(cell: NotebookNode, where: str) -> None:
        cell.metadata["slideshow"] = {"slide_type": where}
        made.cells.append(cell)

    for cell, where in parts(notebook, name, alts):
        if where == "notes":
            add(cell, where)
            continue
        need = lines(cell)
        if where == "slide":
            section, left = prose.heading(cell.source)[1], ROOM
        elif where == "subslide" or need > left:
            add(new_markdown_cell(f'<p class="running">{html.escape(section)}</p>'), "subslide")
            left, where = ROOM - 1, "-"
        add(cell, where)
        left -= ROOM if prose.PREDICT in cell.source else need
    return made


class _Renderer(IPythonRenderer):
    """Draws formulas as MathML, which browsers know without a script."""

    def inline_math(self, body: str) -> str:
        return _formula(body, "inline")

    def block_math(self, body: str) -> str:
        return _formula(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return _formula(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")


def _formula(tex: str, display: str) -> str:
    from advlab.classroom.page import formula  # its extra is asked for in `write`

    return formula(tex, display)


class _Exporter(SlidesExporter):
    """nbconvert's slides in a template of our own, in which nothing is fetched."""

    def markdown2html(self, context: Any, source: str) -> str:
        renderer = _Renderer(escape=False, exclude_anchor_links=True)
        return MarkdownWithMath(renderer=renderer).render(source)

    markdown2html.jinja_pass_arg = SlidesExporter.markdown2html.jinja_pass_arg  # type: ignore


def drawn(slides: NotebookNode, title: str, reveal: dict[str, str]) -> str:
    """Return slides as a page.

    Args:
        slides: As `deck` returns it.
        title: Of the page.
        reveal: As `reveal_files` returns it.
    """
    exporter = _Exporter(template_file=str(Path(__file__).with_name("slides.html.j2")))
    told = {"reveal_files": reveal, "title": title, "smallest": SMALLEST}
    page, _ = exporter.from_notebook_node(slides, told)
    return str(page)


def write(folder: Path, names: Iterable[str] = ()) -> Iterator[Path]:
    """Write the slides of lessons, NAME.html each, and yield their paths.

    Args:
        folder: Gets them.
        names: Of the lessons; all for none.

    Raises:
        SlidesError: without the extras `course` and `site`.
        BatchError: for an unknown lesson.
    """
    reveal = reveal_files()
    if importlib.util.find_spec("latex2mathml") is None:
        raise SlidesError("slides need an extra for formulas: pip install '.[course,site]'")
    alts = tomllib.loads((site.OWN_PAGES / "alts.toml").read_text(encoding="utf-8"))
    for name, path in runs.choose_lessons(names).items():
        notebook = nbformat.read(path, as_version=4)
        title = prose.heading(next(prose.blocks(notebook.cells[0].source)))[1]
        page = drawn(deck(notebook, name, alts), title or name, reveal)
        files.write_bytes(folder / f"{name}.html", page.encode())
        yield folder / f"{name}.html"
