"""What a reader of the committed notebooks would trip over.

`python -m advlab.upkeep.hygiene [NOTEBOOK ...]` prints it, and ends with 1 if there is anything;
without names it looks at all notebooks of the clone. Before a commit pre-commit does that.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from advlab import files

LARGEST = 1_000_000  # bytes: a larger file is slow to open and to review
LONGEST = 30  # lines of a code cell: more is plumbing, which belongs in the package
CHECKED = "nbval-check-output"
# An absolute path, but not a part of an address or of a relative path.
LOCAL_PATH = re.compile(r"(?<![\w:/.~-])(?:/[A-Za-z]+/[\w.-]+|[A-Z]:\\Users)")
TRACES = ("papermill", "execution")  # what runners write into a cell: times, and where it ran


def _joined(text: Any) -> str:
    return "".join(text) if isinstance(text, list) else str(text)


def shown(output: dict[str, Any]) -> str:
    """Return all text that an output shows; pictures are left out."""
    parts = [_joined(output.get("text", "")), _joined(output.get("traceback", ""))]
    for kind, value in output.get("data", {}).items():
        if not kind.startswith("image/"):
            parts.append(_joined(value) if isinstance(value, str | list) else json.dumps(value))
    return "".join(parts)


def _of_output(output: dict[str, Any]) -> Iterator[str]:
    text = shown(output)
    if output.get("output_type") == "error":
        yield "ends in an error"
    if output.get("name") == "stderr":
        yield f"prints to stderr: {text.strip()[:80]!r}"
    if found := LOCAL_PATH.search(text):
        yield f"shows a path of the machine it ran on: {found[0]}"
    if "\x1b[" in text or "\r" in text:
        yield "shows control characters of a terminal"


def _of_cell(cell: dict[str, Any]) -> Iterator[str]:
    metadata, outputs = cell.get("metadata", {}), cell.get("outputs", [])
    yield from (f"keeps the metadata {name!r} of a run" for name in TRACES if name in metadata)
    if CHECKED in metadata.get("tags", []) and not outputs:
        yield f"is tagged {CHECKED} but holds no output"
    if (lines := len(_joined(cell["source"]).splitlines())) > LONGEST:
        yield f"has {lines} lines; over {LONGEST} it is plumbing that belongs in the package"
    for output in outputs:
        yield from _of_output(output)


def problems(path: Path) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong with the notebook at `path`."""
    if (size := path.stat().st_size) > LARGEST:
        yield f"{size / 1e6:.1f} MB; over {LARGEST / 1e6:.0f} MB it is slow to open and to review"
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells = [cell for cell in notebook["cells"] if _joined(cell["source"]).strip()]
    except (ValueError, KeyError, TypeError) as error:
        yield f"not a readable notebook ({error!r})"
        return
    for name in {"widgets", "papermill"} & notebook.get("metadata", {}).keys():
        yield f"the metadata hold {name!r}, which some viewers cannot show"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    counts = [cell.get("execution_count") for cell in code]
    if counts != list(range(1, len(code) + 1)):
        yield f"not executed once from top to bottom (execution counts {counts[:6]} ...)"
    if not {"assignments", "solutions"} & set(path.resolve().parts):
        tags = {tag for cell in code for tag in cell["metadata"].get("tags", [])}
        for tag in sorted({"parameters", CHECKED} - tags):
            yield f"no cell is tagged {tag}"
    for number, cell in enumerate(code, 1):
        yield from (f"code cell {number} {problem}" for problem in _of_cell(cell))


def committed(home: Path) -> list[Path]:
    """Return the notebooks of a clone: lessons, solutions and assignments."""
    found = sorted((home / "notebooks").rglob("*.ipynb"))
    return [path for path in found if ".ipynb_checkpoints" not in path.parts]


def main() -> int:
    """Print the problems of the notebooks that are named, or of all; return the exit code."""
    paths = [Path(name) for name in sys.argv[1:]] or committed(files.home())
    lines = [f"{path}: {problem}" for path in paths for problem in problems(path)]
    print(*lines, sep="\n", end="\n" if lines else "")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
