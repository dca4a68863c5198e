"""Run one submission and score it; started by `course.grade` in a process of its own.

The notebook's code runs in a kernel, and the kernel in a sandbox. This process, which reads the
kernel's answers and writes the scores, is outside: nothing that a submission does to its own files
changes what is recorded.
"""

import argparse
import ast
import asyncio
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import psutil
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbgrader.utils import is_grade, is_locked, is_solution

from advlab import files
from advlab.tools.sandbox import sandboxed
from advlab.upkeep.processes import share_of_memory

LARGEST_OUTPUT = 1_000_000  # bytes that a notebook may print
PROCESSES = 200  # that it may start
NOT_RUN = "not run"
# Runs after a cell with tests, to see whether the submission changed what the tests rely on.
CANARY = """
import builtins as _b, random as _r, torch as _t
for _name in ("abs", "all", "any", "float", "int", "isinstance", "len", "max", "min", "sum"):
    if type(getattr(_b, _name)).__module__ != "builtins" or _name in globals():
        raise SystemError(f"{_name} was replaced")
if _t.equal(_t.zeros(1), _t.ones(1)) or _t.allclose(_t.zeros(1), _t.ones(1)):
    raise SystemError("torch was changed")
if len({_r.SystemRandom().randrange(10**6) for _ in range(9)}) < 2:
    raise SystemError("random was changed")
"""


class RefusedError(ValueError):
    """The submission cannot be run at all."""


def read(path: Path) -> NotebookNode:
    """Return the notebook at `path`.

    What is not needed, and editors get wrong (outputs, counts, ids), is left out.

    Raises:
        RefusedError: if it is no notebook, or too large to be one of ours.
    """
    if path.stat().st_size > 20_000_000:
        raise RefusedError(f"the file has {path.stat().st_size / 1e6:.0f} MB")
    try:
        found = nbformat.reads(path.read_bytes().decode("utf-8-sig"), as_version=4)
        notebook = nbformat.v4.new_notebook(cells=[_only_text(cell) for cell in found.cells])
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises many kinds for what is not a notebook
        told = (str(error).splitlines() or [""])[0]
        raise RefusedError(clean(f"not a notebook: {type(error).__name__}: {told}")) from error
    return notebook


def _only_text(cell: NotebookNode) -> NotebookNode:
    """Return a new cell with the text of `cell`, and what nbgrader knows it by."""
    kinds = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    new = kinds.get(cell.cell_type, nbformat.v4.new_raw_cell)(cell.source)
    if name := _grade_id(cell):
        new.metadata.nbgrader = {"grade_id": name}
    return new


def _grade_id(cell: NotebookNode) -> str | None:
    block = cell.get("metadata", {}).get("nbgrader")
    name = block.get("grade_id") if isinstance(block, dict) else None
    return name if isinstance(name, str) else None


def merge(source: NotebookNode, submitted: NotebookNode) -> NotebookNode:
    """Return the assignment with the answers of a submission.

    Text and tests are those of `source`, whatever the submission made of them; a student's own
    cells, copies of answers and tests among them, stay behind the cell that they were written
    after.

    Raises:
        RefusedError: if an answer's cell is missing.
    """
    answers: dict[str, NotebookNode] = {}
    own: dict[str | None, list[NotebookNode]] = {}
    known = {name: cell for cell in source.cells if (name := _grade_id(cell))}
    last = None
    for cell in submitted.cells:
        name = _grade_id(cell)
        if name not in known or name in answers:
            cell.metadata.pop("nbgrader", None)
            own.setdefault(last, []).append(cell)
            continue
        answers[name], last = cell, name
    cells = list(own.get(None, []))
    for name, cell in known.items():
        if is_solution(cell):
            if not answers:
                raise RefusedError("it has no cell of this assignment: is it another's notebook?")
            if name not in answers:
                raise RefusedError(f"the cell for the answer {name} is missing")
            cell.source = answers[name].source
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        cells += [cell, *own.get(name, [])]
    return nbformat.v4.new_notebook(cells=cells, metadata=source.metadata)


def clean(text: str) -> str:
    """Return the start of a text that a submission chose, fit for a table."""
    text = "".join(c if c.isprintable() else " " for c in text)[:300]
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text  # no formula, for a spreadsheet


def definitions(cells: Sequence[NotebookNode]) -> str:
    """Return the imports, functions and classes that an assignment gives in `cells`."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    given = [c for c in cells if c.cell_type == "code" and is_locked(c) and not is_grade(c)]
    plain = TransformerManager().transform_cell  # of %magics and !commands
    statements = [node for cell in given for node in ast.parse(plain(cell.source)).body]
    return "\n".join(ast.unparse(node) for node in statements if isinstance(node, kinds))


class Runner(NotebookClient):
    """Runs every cell, goes on after an error, and stops listening to what prints too much."""

    printed = 0

    def output(self, outs: Any, msg: dict[str, Any], display_id: str, cell_index: int) -> Any:
        """Keep an output, unless the notebook has printed too much already."""
        self.printed += len(json.dumps(msg["content"], default=str))
        if self.printed > LARGEST_OUTPUT and msg["msg_type"] != "error":
            return None
        return super().output(outs, msg, display_id, cell_index)


def _manager(work: Path, sandbox: bool, megabytes: int, hidden: list[Path]) -> AsyncKernelManager:
    """Return a kernel manager whose kernel is limited, and talks through a file in `work`."""
    manager = AsyncKernelManager(transport="ipc", connection_file=str(work / "k.json"))
    manager.ip = str(work / "k")
    limit = f'ulimit -v {megabytes * 1024}; ulimit -f 200000; exec "$@"'
    argv = ["/bin/sh", "-c", limit, "sh", *(sandboxed(work, hidden) if sandbox else [])]
    argv += [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager._kernel_spec = KernelSpec(argv=argv, display_name="submission", language="python")
    return manager


async def _error_of(runner: Runner, index: int, code: str) -> str | None:
    """Run `code` in the submission's kernel; return the text of its error, None without one."""
    cell = runner.nb.cells[index]
    try:
        await runner.async_execute_cell(nbformat.v4.new_code_cell(code), index, store_history=False)
    except CellExecutionError as error:
        return clean(error.evalue)
    finally:
        runner.nb.cells[index] = cell  # where the client put what it ran
    return None


def by_hand(cell: NotebookNode) -> bool:
    """Return whether a person grades this cell: it is the answer itself."""
    return is_grade(cell) and is_solution(cell)


async def _run(runner: Runner, notebook: NotebookNode, results: dict[str, dict[str, Any]]) -> None:
    """Execute `notebook` in place, and write each graded cell's score and reason to `results`.

    Raises:
        RefusedError, CellTimeoutError, DeadKernelError: if it cannot go on; what was scored stays.
    """
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    async with runner.async_setup_kernel(**quiet):
        for index, cell in enumerate(notebook.cells):
            result = results.get(_grade_id(cell) or "") if cell.cell_type == "code" else None
            if result is not None:  # names that the tests use may have been given a new meaning
                await _error_of(runner, index, definitions(notebook.cells[:index]))
            reason = ""
            try:
                await runner.async_execute_cell(cell, index)
            except CellTimeoutError:
                raise
            except CellExecutionError as error:
                reason = clean(f"{error.ename}: {error.evalue}".removesuffix(": "))
            if runner.printed > LARGEST_OUTPUT:
                raise RefusedError(f"it printed more than {LARGEST_OUTPUT // 1_000_000} MB")
            if result is None or by_hand(cell):
                continue
            changed = await _error_of(runner, index, CANARY)
            if await _error_of(runner, index, "assert False") is None:
                changed = "an assertion cannot fail"
            if changed is not None:
                reason = f"the submission changed what the tests rely on: {changed}"
            result.update(score=0 if reason else result["points"], reason=reason)


def _watch(megabytes: int) -> None:
    """Kill the kernel and all that it started when they are too many, or hold too much memory."""
    while True:
        children = psutil.Process().children(recursive=True)
        many = len(children) > PROCESSES
        if many or sum(map(share_of_memory, children)) > megabytes << 20:
            for child in children:
                with suppress(psutil.Error):  # it has just ended
                    child.kill()
        time.sleep(0.2)


def time_left(end: float, seconds: int) -> float:
    """Return how long the next cell may take: `seconds`, or less if the notebook's time is up."""
    return max(1.0, min(seconds, end - time.monotonic()))


def score(
    source: NotebookNode,
    submission: Path,
    work: Path,
    *,
    cell_seconds: int,
    seconds: int,
    **options: Any,
) -> tuple[NotebookNode, dict[str, Any]]:
    """Return the executed notebook, and its scores: a reason for all, and a result per cell."""
    results = {
        _grade_id(cell): {"points": cell.metadata.nbgrader.points, "score": 0, "reason": NOT_RUN}
        for cell in source.cells
        if is_grade(cell)
    }
    notebook, reason = nbformat.v4.new_notebook(), ""
    try:
        notebook = merge(source, read(submission))
        for cell, after in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
            if by_hand(cell):
                own = after is not None and _grade_id(after) is None  # the answer may stand there
                empty = cell.source.strip() in ("", "YOUR ANSWER HERE") and not own
                results[_grade_id(cell)].update(
                    score=0 if empty else None, reason="no answer" if empty else "to be read"
                )
        end = time.monotonic() + seconds
        runner = Runner(
            notebook,
            km=_manager(work, **options),
            timeout_func=lambda _: time_left(end, cell_seconds),
        )
        asyncio.run(_run(runner, notebook, results))
    except RefusedError as error:
        reason = str(error)
    except CellTimeoutError:
        reason = f"took longer than {cell_seconds} s a cell, or {seconds} s in all"
    except DeadKernelError:
        reason = "the kernel died (crashed, or ran out of memory)"
    except Exception as error:  # a submission may break more than is foreseen here
        reason = clean(f"could not be run to its end: {type(error).__name__}: {error}")
    for result in results.values():
        if result["reason"] == NOT_RUN:
            result["reason"] = reason or NOT_RUN
    return notebook, {"reason": reason, "cells": results}


def main() -> None:
    """Run the submission that the command line names; write executed.ipynb and scores.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("source", "submission", "work", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--sandbox", action="store_true")
    for name in ("--cell-seconds", "--seconds", "--megabytes"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--hide", type=Path, action="append", default=[])
    given = parser.parse_args()
    # A soft limit, of this process alone: the kernel gets its own.
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=_watch, args=[given.megabytes], daemon=True).start()
    notebook, scores = score(
        nbformat.read(given.source, as_version=4),
        given.submission,
        given.work,
        cell_seconds=given.cell_seconds,
        seconds=given.seconds,
        sandbox=given.sandbox,
        megabytes=given.megabytes,
        hidden=given.hide,
    )
    files.write_bytes(given.output / "scores.json", json.dumps(scores, indent=2).encode())
    text = nbformat.writes(notebook).encode(errors="replace")
    files.write_bytes(given.output / "executed.ipynb", text)


if __name__ == "__main__":
    main()
