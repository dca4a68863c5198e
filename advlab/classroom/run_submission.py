"""Run one submission and score it; started by `grading.run` in a process of its own.

The notebook's code runs in a kernel, and the kernel in a sandbox. This process, which reads the
kernel's answers and tells the scores, is outside: nothing that a submission does to its own files
changes what is recorded.
"""

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
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import nbformat
import psutil
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbgrader.utils import is_grade, is_locked

from advlab.classroom import merging
from advlab.classroom.merging import RefusedError, clean, grade_id
from advlab.classroom.sandbox import sandboxed
from advlab.upkeep.kernels import OwnKernel
from advlab.upkeep.processes import kill_children, share_of_memory

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

    def output(
        self, outs: Any, msg: dict[str, Any], display_id: str | None, cell_index: int
    ) -> Any:
        """Keep an output, unless the notebook has printed too much already."""
        self.printed += len(json.dumps(msg["content"], default=str))
        if self.printed > LARGEST_OUTPUT and msg["msg_type"] != "error":
            return None
        return super().output(outs, msg, display_id, cell_index)


def _manager(work: Path, hidden: Sequence[Path] | None, megabytes: int) -> OwnKernel:
    """Return a kernel manager whose kernel is limited, and talks through a file in `work`."""
    manager = OwnKernel(transport="ipc", connection_file=str(work / "k.json"))
    manager.ip = str(work / "k")
    limit = f'ulimit -v {megabytes * 1024}; ulimit -f 200000; exec "$@"'
    covers = [] if hidden is None else sandboxed(work, hidden)
    manager.words = ["/bin/sh", "-c", limit, "sh", *covers]
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


async def _run(runner: Runner, notebook: NotebookNode, results: dict[str, dict[str, Any]]) -> None:
    """Execute `notebook` in place, and write each graded cell's score and reason to `results`.

    Raises:
        RefusedError, CellTimeoutError, DeadKernelError: if it cannot go on; what was scored stays.
    """
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    async with runner.async_setup_kernel(**quiet):
        for index, cell in enumerate(notebook.cells):
            result = results.get(grade_id(cell) or "") if cell.cell_type == "code" else None
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
            if result is None or merging.by_hand(cell):
                continue
            changed = await _error_of(runner, index, CANARY)
            if await _error_of(runner, index, "assert False") is None:
                changed = "an assertion cannot fail"
            if changed is not None:
                reason = f"the submission changed what the tests rely on: {changed}"
            result.update(score=0 if reason else result["points"], reason=reason)


def _watch(megabytes: int, parent: int) -> None:
    """Kill the kernel and all that it started when they are too many, or hold too much memory.

    End with the process `parent`, too, which may have been killed.
    """
    while True:
        alone = os.getppid() != parent
        children = psutil.Process().children(recursive=True)
        many = len(children) > PROCESSES
        if alone or many or sum(map(share_of_memory, children)) > megabytes << 20:
            kill_children()
        if alone:
            os._exit(1)
        time.sleep(0.2)


def time_left(end: float, seconds: int) -> float:
    """Return how long the next cell may take: `seconds`, or less if the notebook's time is up."""
    return max(1.0, min(seconds, end - time.monotonic()))


def score(
    source: NotebookNode,
    submission: bytes,
    work: Path,
    hidden: Sequence[Path] | None,
    *,
    cell_seconds: int,
    seconds: int,
    megabytes: int,
) -> tuple[NotebookNode, dict[str, Any]]:
    """Return the executed notebook, and its scores: a reason for all, and a result per cell.

    Args:
        source: The assignment.
        submission: The student's file.
        work: A folder through which the kernel is spoken to.
        hidden: What the kernel's sandbox covers; None for no sandbox.
        cell_seconds, seconds: That a cell and the notebook may take.
        megabytes: That the kernel may ask for.
    """
    results = merging.no_points(source, NOT_RUN)
    notebook, reason = nbformat.v4.new_notebook(), ""
    try:
        notebook = merging.merge(source, merging.read(submission))
        merging.leave_to_a_person(notebook, results)
        end = time.monotonic() + seconds
        runner = Runner(
            notebook,
            km=_manager(work, hidden, megabytes),
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


def main(job: dict[str, Any], submission: bytes) -> dict[str, Any]:
    """Do a `job` as `grading.run` describes it; return the scores, and the notebook as it ran."""
    # A soft limit, of this process alone: the kernel gets its own.
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    os.environ["OMP_NUM_THREADS"] = "1"
    watched = (job["limits"]["megabytes"], job["parent"])
    threading.Thread(target=_watch, args=watched, daemon=True).start()
    hidden = None if job["hidden"] is None else [Path(path) for path in job["hidden"]]
    assignment = nbformat.reads(job["assignment"], as_version=4)
    work = Path(job["work"])
    notebook, scores = score(assignment, submission, work, hidden, **job["limits"])
    return {"scores": scores, "executed": nbformat.writes(notebook)}


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        asked = json.loads(sys.stdin.buffer.readline())
        found = main(asked, sys.stdin.buffer.read())
    print(json.dumps(found))
