"""A notebook as it ran, drawn cell by cell.

It holds what its student wrote, so a process of its own draws it, with limits: `python -m
advlab.classroom.page` reads a notebook and writes its cells (see `draw`). Nothing of a student's
HTML gets through: texts are escaped, formulas are MathML of few attributes, pictures are data.
"""

import base64
import html
import json
import re
import sys
from contextlib import redirect_stdout
from typing import Any
from xml.etree import ElementTree

import mistune
import nbformat
import pygments
from latex2mathml.converter import convert_to_element
from nbconvert.filters.ansi import strip_ansi
from nbconvert.filters.markdown_mistune import MarkdownWithMath
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from pygments.token import Comment, Keyword, Number, String, Text

from advlab.classroom import tokens
from advlab.classroom.merging import grade_id, is_solution

MEMORY = 4 << 30  # bytes of addresses
LONGEST_TEXT = 10_000  # characters of an output: longer ones take minutes to draw
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
COLOURED = (Comment, Keyword, Number, String)
# Not href, class or style, which TeX can set.
FORMULA = {"accent", "columnalign", "display", "displaystyle", "fence", "form", "linethickness"}
FORMULA |= {"mathvariant", "maxsize", "minsize", "scriptlevel", "stretchy", "width", "xmlns"}
_ARG = re.compile(r"\\arg(?![a-zA-Z])")


class _Renderer(mistune.HTMLRenderer):
    """Draws Markdown; links and pictures are shown as text, as they could lead anywhere."""

    def heading(self, text: str, level: int, **attrs: Any) -> str:
        level = min(level + 2, 6)  # below the page's own
        return f"<h{level}>{text}</h{level}>\n"

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return f"{text} ({html.escape(url)})"

    def image(self, text: str, url: str, title: str | None = None) -> str:
        return f"[picture: {text}]"

    def block_code(self, code: str, info: str | None = None) -> str:
        return f"<pre>{html.escape(code)}</pre>\n"

    def block_math(self, body: str) -> str:
        return formula(body, "block")

    def inline_math(self, body: str) -> str:
        return formula(body, "inline")

    def latex_environment(self, name: str, body: str) -> str:
        return formula(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")


def formula(tex: str, display: str) -> str:
    """Return TeX as MathML; as it is, where that cannot be made.

    Args:
        tex: Without dollars.
        display: "block" or "inline".
    """
    try:
        return _mathml(tex.strip(), display)
    except Exception:  # many kinds, an IndexError among them
        return f"<code>${html.escape(tex)}$</code>"


def _mathml(tex: str, display: str) -> str:
    tex = _ARG.sub(r"\\operatorname{arg}", tex)  # the one function of TeX that it does not know
    drawn = convert_to_element(tex, display=display)
    for element in drawn.iter():
        # What it leaves to be escaped holds entities of its own.
        element.text = html.unescape(element.text or "")
        for name, value in list(element.attrib.items()):
            if name not in FORMULA or value.startswith("-"):  # a space that is no step back
                del element.attrib[name]
    return ElementTree.tostring(drawn, encoding="unicode", short_empty_elements=False)


def markdown(text: str) -> str:
    """Return Markdown as HTML, its own HTML escaped."""
    plugins = [mistune.import_plugin(name) for name in ("table", "strikethrough")]
    return MarkdownWithMath(_Renderer(escape=True), plugins=plugins).render(text)


def _code(source: str) -> str:
    # A span for each name would be most of the page.
    parts = (
        (kind if any(kind in coloured for coloured in COLOURED) else Text, text)
        for kind, text in pygments.lex(source, PythonLexer())
    )
    return f"<pre>{pygments.format(parts, HtmlFormatter(nowrap=True))}</pre>\n"


def _text(text: Any) -> str:
    text = strip_ansi(str(text))
    cut = f"{text[:LONGEST_TEXT]}\n[cut]" if len(text) > LONGEST_TEXT else text
    return f'<pre class="output">{html.escape(cut)}</pre>\n'


def _output(output: NotebookNode) -> str:
    """Return an output drawn; HTML is shown as its plain text."""
    if output.output_type == "stream":
        return _text(output.text)
    if output.output_type == "error":
        return _text("\n".join(map(str, output.traceback)))
    data = output.get("data", {})
    for kind in PICTURES:
        if isinstance(inside := data.get(kind), str):
            if kind == "image/svg+xml":
                inside = base64.b64encode(inside.encode(errors="replace")).decode()
            address = html.escape(f"data:{kind};base64,{''.join(inside.split())}")
            return f'<p><img src="{address}" alt="output of the cell above"></p>\n'
    for kind in ("text/markdown", "text/latex"):
        if isinstance(inside := data.get(kind), str) and len(inside) <= LONGEST_TEXT:
            return f'<div class="output">{markdown(inside)}</div>\n'
    return _text(data.get("text/plain", "[an output that is no text and no picture]"))


def draw_cell(cell: NotebookNode) -> str:
    """Return a cell as HTML, with its outputs."""
    drawn = _code(cell.source) if cell.cell_type == "code" else markdown(cell.source)
    return drawn + "".join(map(_output, cell.get("outputs", [])))


def draw(notebook: NotebookNode) -> list[dict[str, Any]]:
    """Return the cells of an executed notebook; none if it was refused.

    Returns:
        For each cell name (nbgrader's; None for a student's own cell), answer (whether the student
        wrote it), html, and tokens (of an answer; see `tokens`).
    """
    cells = []
    for cell in notebook.cells:
        name = grade_id(cell)
        drawn: dict[str, Any] = {"name": name, "html": draw_cell(cell)}
        drawn["answer"] = name is None or is_solution(cell)
        if name and is_solution(cell):
            drawn["tokens"] = tokens.of_answer(cell.source, cell.cell_type)
        cells.append(drawn)
    return cells


def main() -> None:
    """Draw the notebook that comes through a pipe."""
    import resource  # not on Windows, where nothing is graded

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with redirect_stdout(sys.stderr):
        drawn = draw(nbformat.reads(sys.stdin.buffer.read().decode(), as_version=4))
    sys.stdout.buffer.write(json.dumps(drawn).encode())


if __name__ == "__main__":
    main()
