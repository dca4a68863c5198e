"""Run one submission and score it; started by `grading.run` in a process of its own.

The notebook's code runs in a kernel, and the kernel in a sandbox. The tests run in this process,
which is outside, and ask the kernel for what its functions return: nothing that a submission does
can answer for a test, or read one that is hidden.
"""

import ast
import asyncio
import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from queue import Empty
from typing import Any

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_core.utils import ensure_async
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from advlab.classroom import RefusedError, merging, sandbox
from advlab.classroom.examining import Ended, Examiner
from advlab.classroom.merging import clean, grade_id, is_grade, is_locked
from advlab.classroom.remote import PREFIX
from advlab.upkeep.kernels import OwnKernel
from advlab.upkeep.processes import kill_children

# Bytes of what a notebook prints, and of pictures that it shows, that are kept.
LARGEST = {"text": 1_000_000, "pictures": 8_000_000}
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
FLOOD = 100_000_000  # bytes of both at which it is stopped
PR_SET_CHILD_SUBREAPER = 36  # from linux/prctl.h
LARGEST_ERROR = 10_000  # bytes of an error that are kept
LARGEST_NOTEBOOK = 20_000_000  # bytes of one that ran, with what it printed
OUTPUTS = ("stream", "display_data", "execute_result", "error")
START_SECONDS = 60  # that a sandbox may take to start
NOT_RUN = "not run"
CUT = {
    "text": "[More than 1 MB was printed: from here on nothing is kept.]",
    "pictures": "[Pictures of more than 8 MB were shown: from here on none is kept.]",
}
# Run around a cell with tests. A name of Python's that a notebook gave a meaning of its own, such
# as `max`, has Python's meanwhile.
PUT_ASIDE = """
import builtins as _b
_own = {_n: globals().pop(_n) for _n in [*globals()] if _n[0] != "_" and hasattr(_b, _n)}
"""
# Run first: `exit()` in a cell would end the kernel, and the tests behind it with it.
STAY = "get_ipython().ask_exit = lambda: None"
PUT_BACK = "globals().update(_own)"
SERVE = "__import__('advlab.classroom.remote', fromlist=['serve']).serve(get_ipython())"
LARGEST_MESSAGE = 100_000_000  # characters that a function may return
LISTEN = 0.05  # seconds between two looks at what else it does
MANY, LEAST = 1_000, 100  # messages that are taken at once; bytes for which each counts
NO_KERNEL = "the notebook's kernel does not answer any more"


def definitions(cells: Sequence[NotebookNode]) -> str:
    """Return the imports, functions and classes that an assignment gives in `cells`."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    given = [c for c in cells if c.cell_type == "code" and is_locked(c) and not is_grade(c)]
    plain = TransformerManager().transform_cell  # of %magics and !commands
    statements = [node for cell in given for node in ast.parse(plain(cell.source)).body]
    return "\n".join(ast.unparse(node) for node in statements if isinstance(node, kinds))


class Runner(NotebookClient):
    """Runs every cell, goes on after an error, and stops listening to what prints too much.

    Args:
        work: Folder through which the kernel is spoken to.
        sandboxed: Whether that is in a sandbox.
        cell_seconds, seconds: That a cell and the notebook may take.
    """

    sent, started = 0, False

    def __init__(
        self,
        notebook: NotebookNode,
        work: Path,
        *,
        sandboxed: bool,
        cell_seconds: int,
        seconds: int,
        **more: Any,
    ) -> None:
        super().__init__(notebook, timeout_func=self.time_left, **more)
        self.work, self.sandboxed, self.cell_seconds = work, sandboxed, cell_seconds
        self.kept = dict.fromkeys(LARGEST, 0)  # bytes of what was printed and shown
        self.opened: list[int] = []  # descriptors of the sandbox's sockets
        self.end = time.monotonic() + seconds

    def time_left(self, _: NotebookNode | None = None) -> float:
        """Return the seconds that a cell may take now."""
        return max(0.1, min(self.cell_seconds, self.end - time.monotonic()))

    @property
    def manager(self) -> Any:
        """The manager of the kernel, which is there once it was started."""
        return self.km

    def count(self, size: int) -> None:
        """Count bytes that the notebook printed, and stop it where it floods."""
        self.sent += size
        if self.sent > FLOOD:  # it may print faster than anybody reads, and never end
            kill_children()

    async def async_start_new_kernel_client(self) -> Any:
        """Return a client that speaks to the kernel, which may be in a sandbox.

        Raises:
            OSError: if that did not start.
        """
        end = time.monotonic() + START_SECONDS
        while self.sandboxed and not self.opened:
            if time.monotonic() > end or not await ensure_async(self.manager.is_alive()):
                raise OSError("the sandbox did not start")
            await asyncio.sleep(0.02)
            self.opened = sandbox.link_sockets(self.work)
        return await super().async_start_new_kernel_client()

    def process_message(self, msg: dict[str, Any], cell: NotebookNode, cell_index: int) -> Any:
        """Take a message of the kernel, but no output once the notebook has printed too much.

        Once it has shown too many pictures, none of these is taken. Why a cell failed is, in any
        case and once. Later changes of what is shown, and what widgets say, are not.
        """
        kind, content = msg["msg_type"], {**msg["content"]}
        content.pop("transient", None)
        if not isinstance(content.get("execution_count"), int):
            content.pop("execution_count", None)
        if kind == "error":
            content = _cut(content)
        msg = {**msg, "content": content}
        size, pictures = len(json.dumps(content, default=str)), _pictures(content)
        self.count(size)
        if kind in ("status", "execute_input", "clear_output"):
            return super().process_message(msg, cell, cell_index)
        failed = any(output.output_type == "error" for output in cell.get("outputs", []))
        sizes = {"text": size - pictures, "pictures": pictures}
        full = self._full(sizes)
        if kind not in OUTPUTS or (full and (kind != "error" or failed)):
            return None
        for what, own in sizes.items():
            self.kept[what] += own
        if not full and (full := self._full(sizes)):  # this one is too much
            text = {"msg_type": "stream"}
            msg = {**msg, **text, "header": {**msg["header"], **text}}
            msg["content"] = {"name": "stderr", "text": CUT[full[0]]}
        return super().process_message(msg, cell, cell_index)

    def _full(self, sizes: Mapping[str, int]) -> list[str]:
        """Return of what there is too much already, among that of which there is some."""
        return [what for what, size in sizes.items() if size and self.kept[what] > LARGEST[what]]


def _pictures(content: Mapping[str, Any]) -> int:
    """Return the bytes of the pictures in a message."""
    data = content.get("data")
    shown = [data[kind] for kind in PICTURES if kind in data] if isinstance(data, dict) else []
    return sum(len(json.dumps(picture, default=str)) for picture in shown)


def _cut(error: dict[str, Any]) -> dict[str, Any]:
    """Return an error whose texts are not longer than `LARGEST_ERROR`."""
    lines = "\n".join(map(str, error.get("traceback") or []))
    if len(lines) > LARGEST_ERROR:
        lines = f"{lines[:LARGEST_ERROR]}\n[cut]"
    texts = {name: str(error.get(name))[:LARGEST_ERROR] for name in ("ename", "evalue")}
    return {**error, **texts, "traceback": [lines]}


def manager(
    work: Path, hidden: Sequence[Path] | None, scope: Sequence[str], megabytes: int
) -> OwnKernel:
    """Return a kernel manager whose kernel is limited, and talks through a file in `work`.

    Args:
        work: The grader's folder for this kernel.
        hidden: What its sandbox covers; None for no sandbox.
        scope: Words before its command; see `sandbox.scope`.
        megabytes: That it may ask for.
    """
    made = OwnKernel(transport="ipc", connection_file=str(sandbox.connection_file(work)))
    made.ip = str(sandbox.sockets(work) / "k")
    limits = f"-v {megabytes * 1024}", "-f 200000", "-n 1024", "-c 0"
    limit = "; ".join(f"ulimit {one}" for one in limits) + '; exec "$@"'
    covers = [] if hidden is None else sandbox.sandboxed(work, hidden)
    if hidden is None:
        sandbox.sockets(work).mkdir()
    made.words = [*scope, "/bin/sh", "-c", limit, "sh", *covers]
    return made


class Line:
    """The line from the tests, which run in a thread, to a kernel; it is opened when it is used."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.loop = runner, asyncio.get_running_loop()
        self.failed: Exception | None = None
        self._serving, self._end, self._listened = "", 0.0, 0.0

    def exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message of the tests; return what the kernel says next.

        Raises:
            Ended: if it cannot say anything any more; `failed` is why.
            RuntimeError: if it ended its part of the conversation.
        """
        said = asyncio.run_coroutine_threadsafe(self._exchange(json.dumps(message)), self.loop)
        try:
            return json.loads(said.result())
        except (CellTimeoutError, DeadKernelError) as error:
            self.failed = error
            raise Ended from error

    async def _exchange(self, text: str) -> str:
        if not self._serving:
            self._serving = self._client.execute(SERVE, store_history=False, allow_stdin=True)
            self._end = time.monotonic() + self.runner.time_left()
            await self._said()  # that it is ready
        if time.monotonic() > self._end:
            raise CellTimeoutError("the tests' time is up")
        self._client.input(text)
        return await self._said()

    @property
    def _client(self) -> Any:
        return self.runner.kc  # there is one, as the kernel has been started

    async def _said(self) -> str:
        """Return what the kernel says of its own accord."""
        while True:
            now = time.monotonic()
            if now > self._end:
                raise CellTimeoutError("the tests' time is up")
            if now > self._listened + LISTEN:
                await self._listen()
                self._listened = time.monotonic()
            with suppress(Empty):
                said = await self._client.get_stdin_msg(timeout=LISTEN)
                text = str(said["content"].get("prompt"))
                if len(text) > LARGEST_MESSAGE:
                    raise RuntimeError(f"it returned more than {LARGEST_MESSAGE // 10**6} MB")
                if text.startswith(PREFIX):
                    return text.removeprefix(PREFIX)
                self._client.input("")  # a student's own `input`
            if not await ensure_async(self.runner.manager.is_alive()):
                raise DeadKernelError("Kernel died")

    async def _listen(self) -> None:
        """Take what is printed meanwhile, which nobody sees, and see whether the line is open."""
        for channel in (self._client.get_iopub_msg, self._client.get_shell_msg):
            with suppress(Empty):
                for _ in range(MANY):
                    message = await channel(timeout=0)
                    text = json.dumps(message["content"], default=str)
                    self.runner.count(LEAST + len(text))
                    ended = message["parent_header"].get("msg_id") == self._serving
                    if ended and message["msg_type"] == "execute_reply":
                        self._serving = ""
                        raise RuntimeError(NO_KERNEL)

    async def close(self) -> None:
        """End the conversation, if there was one."""
        try:
            while self._serving:
                self._client.input('{"do": "end"}')
                await self._said()  # until it has nothing to say any more
        except (RuntimeError, CellTimeoutError):
            self._serving = ""


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


async def _executed(runner: Runner, index: int) -> str:
    """Run a cell in the submission's kernel; return its error, or ""."""
    try:
        await runner.async_execute_cell(runner.nb.cells[index], index)
    except CellTimeoutError:
        raise
    except CellExecutionError as error:
        return clean(f"{error.ename}: {error.evalue}".removesuffix(": "))
    return ""


async def _run(
    runner: Runner,
    notebook: NotebookNode,
    results: dict[str, dict[str, Any]],
    tests: Mapping[str, str],
    answers: Mapping[str, Sequence[str]],
    seed: int,
) -> None:
    """Execute `notebook` in place, and write each graded cell's score and reason to `results`.

    Args:
        runner: Of the notebook.
        notebook: From `merging.merge`.
        results: By graded cell.
        tests: By graded cell, with those that are hidden.
        answers: What each answer is to define.
        seed: Of what the tests draw.

    Raises:
        RefusedError, CellTimeoutError, DeadKernelError: if it cannot go on; what was scored stays.
    """
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    async with runner.async_setup_kernel(**quiet):
        runner.started = True
        await _error_of(runner, 0, STAY)
        line = Line(runner)
        examiner = Examiner(line.exchange, seed)

        async def on_this_side(work: Callable[..., str | None], *given: Any) -> str:
            try:
                found = await asyncio.to_thread(work, *given)
            except Ended as error:
                raise line.failed or error from error
            finally:
                await line.close()
            return found or ""

        for index, cell in enumerate(notebook.cells):
            if time.monotonic() > runner.end:
                raise CellTimeoutError("the notebook's time is up")
            name = grade_id(cell) or ""
            if cell.cell_type != "code" or merging.by_hand(cell):
                await _executed(runner, index)
            elif name in results:
                await _error_of(runner, index, definitions(notebook.cells[:index]) + PUT_ASIDE)
                shown = await _executed(runner, index)
                reason = await on_this_side(examiner.examine, tests[name])
                await on_this_side(examiner.restore)
                await _error_of(runner, index, PUT_BACK)
                results[name].update(score=0 if reason else results[name]["points"], reason=reason)
                if reason != shown:  # the page says what counted
                    told = reason or "these tests pass in the grader's own process"
                    cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text=told))
            else:
                error = await _executed(runner, index)
                if name in answers:
                    examiner.answered(answers[name], error)
                elif is_locked(cell):
                    await on_this_side(examiner.give, cell.source)


def _end_with(parent: int) -> None:
    """End when the process `parent` has, which may have been killed, with all that was started."""
    while os.getppid() == parent:
        time.sleep(0.2)
    kill_children()
    os._exit(1)


def score(
    source: NotebookNode, submission: bytes, work: Path, seed: int, **more: Any
) -> tuple[NotebookNode, dict[str, Any]]:
    """Return the executed notebook, and its scores: a reason for all, and a result per cell.

    Args:
        source: The assignment.
        submission: The student's file.
        work: A folder through which the kernel is spoken to.
        seed: Of what the tests draw.
        more: For `Runner`: its limits, and the kernel's manager.

    Raises:
        Exception: of any kind, if the kernel could not be started.
    """
    results, answers = merging.no_points(source, NOT_RUN), merging.defined(source)
    notebook, reason, runner = nbformat.v4.new_notebook(), "", None
    try:
        notebook = merging.merge(source, merging.read(submission))
        merging.leave_to_a_person(notebook, results)
        tests = merging.hide_tests(notebook)
        runner = Runner(notebook, work, **more)
        asyncio.run(_run(runner, notebook, results, tests, answers, seed))
    except RefusedError as error:
        reason = str(error)
    except CellTimeoutError:
        limits = f"{more['cell_seconds']} s a cell, or {more['seconds']} s in all"
        reason = f"took longer than {limits}"
    except DeadKernelError:
        reason = "the kernel died (crashed, or ran out of memory)"
        if runner is not None and runner.sent > FLOOD:
            reason = f"it printed more than {FLOOD // 1_000_000} MB"
    except Exception as error:  # a submission may break more than is foreseen here
        if runner is not None and not runner.started:
            raise  # nothing of the submission has run: the fault is this machine's
        reason = clean(f"could not be run to its end: {type(error).__name__}: {error}")
    for result in results.values():
        if result["reason"] == NOT_RUN:
            result["reason"] = reason or NOT_RUN
    return notebook, {"reason": reason, "cells": results}


def main(job: dict[str, Any], submission: bytes) -> dict[str, Any]:
    """Do a `job` as `grading.run` describes it; return the scores, and the notebook as it ran."""
    import resource  # not on Windows, where nothing is graded

    # A soft limit, of this process alone: the kernel gets its own.
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    os.environ["OMP_NUM_THREADS"] = "1"
    work = Path(job["work"])
    # What a kernel leaves behind becomes a child of this process, and goes with it.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    threading.Thread(target=_end_with, args=(job["parent"],), daemon=True).start()
    hidden = None if job["hidden"] is None else [Path(path) for path in job["hidden"]]
    assignment = nbformat.reads(job["assignment"], as_version=4)
    how = {"km": manager(work, hidden, job["scope"], job["megabytes"]), **job["limits"]}
    how["sandboxed"] = hidden is not None
    try:
        notebook, scores = score(assignment, submission, work, job["seed"], **how)
    finally:
        kill_children()  # a kernel that was started, and to which nobody could speak
    executed = nbformat.writes(notebook)
    if len(executed) > LARGEST_NOTEBOOK:  # no page would show it
        executed = nbformat.writes(nbformat.v4.new_notebook())
    return {"scores": scores, "executed": executed}


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        asked = json.loads(sys.stdin.buffer.readline())
        found = main(asked, sys.stdin.buffer.read())
    print(json.dumps(found))
