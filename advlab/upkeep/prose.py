"""The text of a notebook in blocks: headings, paragraphs, lists, tables, formulas."""

import re
from collections.abc import Iterator
from pathlib import Path

from nbformat import NotebookNode

PREDICT = "**Predict, then run.**"  # begins the questions of the lessons
EXERCISES = "## Your turn"  # the heading in each lesson
HIDDEN = "hide-cell"  # the tag of cells that are for the tests alone
HINT = re.compile(
    r"^(?P<in> *)<details><summary>(?P<head>.*?)</summary>(?P<text>.+?)</details>", re.M | re.S
)
_HEADING = re.compile(r"(#+) +(.*)")
_ITEM = re.compile(r"^(?=\d+\. )", re.M)


def blocks(text: str) -> Iterator[str]:
    """Yield the blocks of Markdown, which empty lines separate.

    A heading is a block of its own. Code between fences, a formula between `$$`, and what is
    indented below an item of a list are not separated.
    """
    block: list[str] = []
    for line in text.splitlines():
        whole = "\n".join(block)
        inside = whole.count("```") % 2 or whole.count("$$") % 2
        starts = bool(_HEADING.match(line)) or (block and not block[-1] and line[:1] != " ")
        if block and not inside and (starts or _HEADING.match(block[-1])):
            yield whole.strip("\n")
            block = []
        block.append(line)
    if block:
        yield "\n".join(block).strip("\n")


def heading(block: str) -> tuple[int, str]:
    """Return the level of a heading and its text; 0 and nothing for another block."""
    found = _HEADING.fullmatch(block)
    return (len(found[1]), found[2]) if found else (0, "")


def items(block: str) -> list[str]:
    """Return the items of a numbered list, each with its number; another block as it is."""
    return [item.strip("\n") for item in _ITEM.split(block) if item.strip()]


def unquoted(block: str) -> str:
    """Return a quotation without its marks."""
    return re.sub(r"^> ?", "", block, flags=re.M)


def printed(cell: NotebookNode) -> str:
    """Return what a code cell printed."""
    streams = [output.text for output in cell.outputs if output.output_type == "stream"]
    return "".join(streams).rstrip("\n")


def tags(cell: NotebookNode) -> list[str]:
    """Return the tags of a cell."""
    return list(cell.metadata.get("tags", []))


def solution_of(lesson: Path) -> Path:
    """Return the notebook with the solutions of a lesson's exercises."""
    return lesson.parent / "solutions" / lesson.name
