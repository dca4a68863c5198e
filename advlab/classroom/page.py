"""A notebook as it ran, drawn as a page.

It holds what its student wrote, so a process of its own draws it, with limits: `python -m
advlab.classroom.page` reads a notebook and writes its page.
"""

import copy
import sys
from contextlib import redirect_stdout

import nbformat
from nbformat import NotebookNode

NOT_SHOWN = "The notebook cannot be shown: {}"
MEMORY = 4 << 30  # bytes of addresses
LONGEST_TEXT = 10_000  # characters of an output


def in_short(notebook: NotebookNode) -> NotebookNode:
    """Return an executed notebook with the beginnings of long texts: they take minutes to draw."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts = output if "text" in output else output.get("data", {})
            for kind, text in texts.items():
                if isinstance(text, str) and "image/" not in kind and len(text) > LONGEST_TEXT:
                    texts[kind] = f"{text[:LONGEST_TEXT]}\n[cut]"
    return notebook


def draw(notebook: NotebookNode) -> str:
    """Return an executed notebook as a page; "" if nothing of it was run."""
    from nbconvert import HTMLExporter  # not for those who only start this

    if not notebook.cells:  # it was refused
        return ""
    try:
        return HTMLExporter().from_notebook_node(in_short(notebook))[0]
    except Exception as error:  # an output that nbconvert cannot draw
        return NOT_SHOWN.format(type(error).__name__)


def main() -> None:
    """Draw the notebook that comes through a pipe."""
    import resource  # not on Windows, where nothing is graded

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with redirect_stdout(sys.stderr):
        drawn = draw(nbformat.reads(sys.stdin.buffer.read().decode(), as_version=4))
    sys.stdout.buffer.write(drawn.encode(errors="replace"))


if __name__ == "__main__":
    main()
