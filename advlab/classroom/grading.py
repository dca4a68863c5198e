"""Grade submissions on the workers of a cluster, which need not share this machine's disk.

A submission and its assignment travel to a worker as bytes, and what comes of them travels back. On
the worker a submission runs in a process of its own, which is killed in time. The assignment, with
its answers, is on no disk there: it goes to that process through a pipe.
"""

import asyncio
import html
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from secrets import randbelow, token_hex
from typing import Any

import nbformat
import psutil
from distributed import Worker, get_worker

import advlab
from advlab import files
from advlab.classroom import RefusedError, sandbox
from advlab.classroom.merging import clean, no_points
from advlab.classroom.probe import PID_NAMESPACE
from advlab.classroom.submissions import CourseError, Submission
from advlab.store import code_hash
from advlab.upkeep import tasks
from advlab.upkeep.kernels import short_folder
from advlab.upkeep.processes import kill_children

CELL_SECONDS, SECONDS, MEGABYTES = 60, 300, 8_000
SEEDS = 1_000_000  # among which one is drawn for each submission
PAGE_SECONDS, LARGEST_PAGE = 60, 20_000_000  # to draw a notebook; bytes
LARGEST_RESULT, LARGEST_LOG = 50_000_000, 100_000  # bytes that a process may write, and that count
PROBE_SECONDS = 300  # to try the sandbox; importing torch may take most of a minute
USER_NEEDS = "It needs bubblewrap 0.8 or later and user namespaces; install them"
ROOT_NEEDS = (
    "As root it needs bubblewrap 0.8 or later and setpriv (of util-linux). Submissions run as user "
    f"{sandbox.STRANGER}: a container must have that user, who must be able to read Python, its "
    "packages and advlab (chmod -R o+rX, on their folders). See to it, grade as another user"
)
LOOK = 0.2  # seconds between two looks at what a process does
LARGEST_FILE = 100_000_000  # bytes; saved outputs, which nobody reads, may be most of them
# The modules whose code decides a score, or how it is shown.
GRADER = ["examining", "grading", "merging", "page", "remote", "run_submission", "sandbox"]
GRADER = [f"classroom/{name}" for name in [*GRADER, "tokens"]]
GRADER += ["upkeep/kernels", "upkeep/processes"]


def need_nbgrader() -> None:
    """Raise a CourseError where a package of the extra "course" is not installed."""
    for name in ("nbgrader", "latex2mathml", "setuptools"):
        if find_spec(name) is None:
            told = f"assignments need {name}; install it with"
            raise CourseError(f'{told}: pip install -e ".[course]"')


@dataclass(frozen=True)
class Hidden:
    """What no submission may see, on the machine that asks; each worker adds what is its own.

    Args:
        folders: Absolute paths.
        secrets: Files in them.
    """

    folders: tuple[Path, ...]
    secrets: tuple[Path, ...]

    def here(self, own: Path) -> "Hidden":
        """Return the same with a worker's clone, its user's home, and its `own` folder."""
        package = Path(advlab.__file__).resolve().parent.parent
        clones = [files.home(), *filter(files.is_clone, [package])]
        answers = [
            path
            for folder in (*clones, files.shipped())
            for path in folder.glob("notebooks/assignments/*/*.ipynb")
        ]
        user = filter(None, [files.user_home()])
        # The sandbox has a /tmp of its own.
        added = [path.absolute() for path in (*clones, *user, own) if path != Path("/tmp")]
        both = ((*self.folders, *added), (*self.secrets, *answers))
        return Hidden(*(tuple(dict.fromkeys(paths)) for paths in both))


@dataclass(frozen=True)
class Work:
    """A submission as it travels.

    Args:
        assignment, submission: Notebooks, the second the student's.
        seed: Of what the tests draw.
    """

    assignment: bytes
    submission: bytes
    seed: int

    def identity(self, *, sandboxed: bool) -> str:
        """Return a hash of what a score depends on: both, and the code that grades."""
        digest = sha256(f"{sandboxed} {code_hash(*GRADER)}".encode())
        for notebook in (self.assignment, self.submission):
            digest.update(sha256(notebook).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class Ran:
    """What came of a submission.

    Args:
        scores: See `land`; None if it could not be run.
        reason: Why not.
        executed: The notebook as it ran.
        page: The same, drawn (see `page.draw`), as JSON.
        log: What was printed beside.
    """

    scores: dict[str, Any] | None
    reason: str
    executed: bytes = b""
    page: bytes = b"[]"
    log: bytes = b""


# --- on the machine that asks


def pack(one: Submission, source: Path, seed: int | None = None) -> Work:
    """Return what a worker needs for a submission.

    Args:
        one: The submission.
        source: The instructor's notebook of its assignment.
        seed: Of what the tests draw; None draws one.

    Raises:
        OSError: if one cannot be read.
        RefusedError: if the submission is too large to be one of ours, or no file.
    """
    seed = randbelow(SEEDS) if seed is None else seed
    return Work(source.read_bytes(), one.read(LARGEST_FILE), seed)


def earlier(
    one: Submission, source: Path, output: Path, *, sandboxed: bool, seed: int | None = None
) -> dict[str, Any] | None:
    """Return the scores of an earlier run into the folder `output`.

    None if anything changed, or if its tests were drawn by another `seed` than is asked for.
    """
    written = one.kept(output) / "scores.json"
    with suppress(OSError, ValueError):
        scores = json.loads(written.read_text(encoding="utf-8"))
        same = scores.get("identity") == pack(one, source).identity(sandboxed=sandboxed)
        if same and seed in (None, scores.get("seed")):
            return scores
    return None


def land(one: Submission, output: Path, identity: str, ran: Ran) -> dict[str, Any]:
    """Write what came of a submission to where it is kept; return its scores.

    Args:
        one: The submission.
        output: Where `course.grade` writes.
        identity: That of its `Work`.
        ran: What came of it.

    Returns:
        reason (why the notebook could not be run to its end, or ""), seconds, seed (of what the
        tests drew), again (whether it must be tried again), and cells: for each graded cell its
        points, score (None where a person must read the answer) and reason.

    Raises:
        OSError: if it could not be run, or cannot be written.
    """
    kept = one.kept(output)
    shutil.rmtree(kept, ignore_errors=True)
    files.write_bytes(kept / "log.txt", ran.log)
    if ran.scores is None:
        raise OSError(ran.reason)
    files.write_bytes(kept / "executed.ipynb", ran.executed)
    files.write_bytes(kept / "page.json", ran.page)
    scores = ran.scores | {"identity": identity, "again": False}
    files.write_bytes(kept / "scores.json", json.dumps(scores, indent=2).encode())
    return scores


def not_graded(source: Path, error: Exception) -> dict[str, Any]:
    """Return scores, as `land` does, for what was not run; no later run finds them again.

    They are empty, as a fault of the machine is no mark, unless the file itself is to blame.
    """
    refused = isinstance(error, RefusedError)
    kind = "" if refused or isinstance(error, OSError) else f"{type(error).__name__}: "
    reason = clean(f"{kind}{error}")
    cells = no_points(nbformat.read(source, as_version=4), reason, 0 if refused else None)
    return {"reason": reason, "cells": cells, "seconds": 0.0, "seed": None, "again": not refused}


# --- on a worker


async def check(hidden: Hidden | None, dask_worker: Worker) -> None:
    """Do what `check_worker` does, beside all else that the worker does."""
    await asyncio.to_thread(check_worker, hidden, Path(dask_worker.local_directory))


@cache
def check_worker(hidden: Hidden | None, own: Path) -> None:
    """See once whether a worker can grade.

    Args:
        hidden: None for no sandbox.
        own: The worker's own folder.

    Raises:
        CourseError: without nbgrader; or see `check_sandbox`.
    """
    need_nbgrader()
    if hidden:
        check_sandbox(hidden.here(own), own)


def check_sandbox(hidden: Hidden, own: Path) -> None:
    """Start Python under bubblewrap once, and try from inside what a submission must not do.

    Args:
        hidden: What the sandbox covers, and what no program in it may read.
        own: The worker's own folder.

    Raises:
        CourseError: if bubblewrap is not there, or fails, with what it printed; or if the sandbox
            does not hold, with what could be done in it.
    """
    accept = "or accept that with --no-sandbox"
    if not shutil.which("bwrap"):
        raise CourseError(
            "bubblewrap is not installed, and without it a submission could read and change this "
            f"machine's files. Install it (Debian: apt install bubblewrap), {accept}"
        )
    token = token_hex()
    with _work_folder(own) as work, socket.create_server(("127.0.0.1", 0)) as server:
        job = {
            "own": ["/tmp", "/dev/shm", str(sandbox.sockets(work))],
            "largest": sandbox.TEMPORARY,
            "hidden": [str(path) for path in hidden.folders],
            "secrets": [str(path) for path in hidden.secrets],
            "token": token,
            "port": server.getsockname()[1],
            "pid_namespace": str(PID_NAMESPACE.readlink()),
        }
        try:
            words = sandbox.sandboxed(work, hidden.folders)
        except ValueError as error:
            raise CourseError(f"{error}, {accept}") from error
        try:
            broken = _probed(words, job, token)
        except TimeoutError as error:
            raise CourseError(
                f"the sandbox did not answer within {PROBE_SECONDS} s. Is this machine that busy? "
                f"Try again, {accept}"
            ) from error
        except OSError as error:
            needs = ROOT_NEEDS if os.geteuid() == 0 else USER_NEEDS
            raise CourseError(
                f"the sandbox does not work on this machine: {error}\n{needs}, {accept}"
            ) from error
    if broken:
        raise CourseError(
            f"the sandbox does not hold on this machine; a program in it can {'; '.join(broken)}. "
            f"Nothing was graded. Use another machine, {accept}"
        )


def _probed(words: Sequence[str], job: dict[str, Any], token: str) -> list[str]:
    """Run the probe in a sandbox; return what it could do, by itself and by what is seen of it.

    Args:
        words: Of the sandbox.
        job: See `probe.break_out`.
        token: Put into the environment.

    Raises:
        TimeoutError: if it does not answer in time.
        OSError: if it cannot be run, with what it printed.
    """
    how: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        command = [*words, sys.executable, "-m", "advlab.classroom.probe"]
        how["env"] = {**os.environ, "ADVLAB_PROBE": token}
        process = subprocess.Popen(command, stderr=log, **how)
        answer: Any = process.stdout  # a pipe
        clock = threading.Timer(PROBE_SECONDS, process.kill)
        clock.start()
        try:
            with suppress(BrokenPipeError):  # it has failed
                print(json.dumps(job), file=process.stdin, flush=True)
            said = answer.readline()
            # It waits now, until its input ends.
            broken = [*json.loads(said), *sandbox.seen_from_outside(process.pid)] if said else []
            process.communicate()
            in_time = clock.is_alive()
        finally:
            clock.cancel()
            process.kill()
        if not in_time:
            raise TimeoutError
        if process.returncode or not said:
            log.seek(0)
            raise OSError(log.read().strip() or "the program in it said nothing")
    return broken


@contextmanager
def _work_folder(own: Path) -> Iterator[Path]:
    """Yield a folder that goes at the end, whatever was made of it meanwhile.

    It is in the worker's `own`: where that is killed, the next one to start removes it.
    """
    work = Path(tempfile.mkdtemp(prefix="g", dir=short_folder(str(own))))
    try:
        yield work
    finally:  # neither goes where a link leads, or minds how deep folders are nested
        subprocess.run(["chmod", "-R", "u+rwX", work], check=False, capture_output=True)
        subprocess.run(["rm", "-rf", work], check=False, capture_output=True)


def run(work: Work, hidden: Hidden | None) -> Ran:
    """Run a submission, in a sandbox unless `hidden` is None.

    Raises:
        CourseError: see `check_worker`.
        StoppedError: if nobody waits for it any longer.
        OSError: for a full disk, say.
    """
    own = Path(get_worker().local_directory)
    check_worker(hidden, own)
    start = time.perf_counter()
    with _work_folder(own) as folder:
        job = {
            "assignment": work.assignment.decode(),
            "work": str(folder),
            "hidden": [str(path) for path in hidden.here(own).folders] if hidden else None,
            "limits": {"cell_seconds": CELL_SECONDS, "seconds": SECONDS},
            "megabytes": MEGABYTES,
            "scope": sandbox.scope(MEGABYTES),
            "seed": work.seed,
            "parent": os.getpid(),
        }
        given = json.dumps(job).encode() + b"\n" + work.submission
        command = [sys.executable, "-m", "advlab.classroom.run_submission"]
        # It ends by itself in time, unless something is badly wrong.
        reason, made, log = _run_limited(command, given, SECONDS + 120, MEGABYTES)
    if reason:
        return Ran(None, reason, log=log)
    found = json.loads(made)
    scores = found["scores"] | {"seconds": round(time.perf_counter() - start, 1), "seed": work.seed}
    executed = found["executed"].encode(errors="replace")
    drawn, more = _draw(executed)
    return Ran(scores, "", executed, drawn, log + more)


def _draw(executed: bytes) -> tuple[bytes, bytes]:
    """Return a notebook's cells, drawn, or one that says why there are none; and the log."""
    command = [sys.executable, "-m", "advlab.classroom.page"]
    reason, drawn, log = _run_limited(command, executed, PAGE_SECONDS)
    if not reason and len(drawn) > LARGEST_PAGE:
        reason = f"its page would have {len(drawn) / 1e6:.0f} MB"
    if reason:
        told = html.escape(f"The notebook cannot be shown: {reason}")
        drawn = json.dumps([{"name": None, "answer": False, "html": told}]).encode()
    return drawn, log


def _send(pipe: int, given: bytes) -> None:
    with suppress(BrokenPipeError), os.fdopen(pipe, "wb", buffering=0) as file:
        left = memoryview(given)
        while left:  # until the reader has ended
            left = left[file.write(left) :]


def _run_limited(
    command: Sequence[str], given: bytes, seconds: int, megabytes: int | None = None
) -> tuple[str, bytes, bytes]:
    """Run `command`, and kill it and its children after `seconds`, or when nobody waits for it.

    Args:
        command: What is run.
        given: For its standard input.
        seconds: That it may take.
        megabytes: That what it starts may hold; more, and that is killed.

    Returns:
        Why it failed or "", and what it wrote to its standard output and error.
    """
    end = time.monotonic() + seconds
    # Without a name: no other submission sees them.
    with tempfile.TemporaryFile() as made, tempfile.TemporaryFile() as log:
        reads, writes = os.pipe()
        how: dict[str, Any] = {"stdin": reads, "stdout": made, "stderr": log}
        process = subprocess.Popen(command, process_group=0, **how)
        os.close(reads)
        threading.Thread(target=_send, args=(writes, given), daemon=True).start()
        reason = f"took longer than {seconds} s"
        try:
            while time.monotonic() < end:
                tasks.check_wanted("grading")
                with suppress(subprocess.TimeoutExpired):
                    reason = "could not be run (see log.txt)" if process.wait(LOOK) else ""
                    break
                if max(os.fstat(file.fileno()).st_size for file in (made, log)) > LARGEST_RESULT:
                    reason = f"wrote more than {LARGEST_RESULT // 1_000_000} MB"
                    break
                if megabytes is not None:
                    sandbox.limit(process.pid, megabytes)
        finally:
            with suppress(psutil.NoSuchProcess):  # has ended
                kill_children(process.pid)
            process.kill()
            process.wait()
        for file in (made, log):
            file.seek(0)
        return reason, made.read(LARGEST_RESULT), log.read(LARGEST_LOG)
