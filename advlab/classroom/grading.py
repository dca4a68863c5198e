"""Grade one submission: started in a process of its own, killed in time, kept for the next run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import file_digest, sha256
from pathlib import Path
from secrets import token_hex
from typing import Any

import nbformat

from advlab import files
from advlab.classroom.probe import PID_NAMESPACE
from advlab.classroom.sandbox import sandboxed
from advlab.classroom.submissions import CourseError, Submission
from advlab.store import code_hash
from advlab.upkeep.kernels import short_folder

CELL_SECONDS, SECONDS, MEGABYTES = 60, 300, 8_000
# The modules whose code decides a score.
GRADER = [f"classroom/{name}" for name in ("grading", "merging", "run_submission", "sandbox")]
GRADER += ["upkeep/kernels", "upkeep/processes"]
_running: set[int] = set()  # process groups of submissions


def check_sandbox(hide: Sequence[Path], secrets: Sequence[Path]) -> None:
    """Start Python under bubblewrap once, and try from inside what a submission must not do.

    Args:
        hide: The folders that the sandbox covers.
        secrets: Files in them.

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
    with _work_folder() as work, socket.create_server(("127.0.0.1", 0)) as server:
        job = {
            "hidden": [str(path) for path in hide],
            "secrets": [str(path) for path in secrets],
            "token": token,
            "port": server.getsockname()[1],
            "pid_namespace": str(PID_NAMESPACE.readlink()),
        }
        done = subprocess.run(
            [*sandboxed(work, hide), sys.executable, "-m", "advlab.classroom.probe"],
            input=json.dumps(job),
            env={**os.environ, "ADVLAB_PROBE": token},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise CourseError(
            f"the sandbox does not work on this machine: {done.stderr.strip()}\n"
            f"It needs bubblewrap 0.8 or later and user namespaces; install them, {accept}"
        )
    if broken := json.loads(done.stdout):
        raise CourseError(
            f"the sandbox does not hold on this machine; a program in it can {'; '.join(broken)}. "
            f"Nothing was graded. Use another machine, {accept}"
        )


@contextmanager
def _work_folder() -> Iterator[Path]:
    """Yield a folder that goes at the end, whatever was made of it meanwhile."""
    work = Path(tempfile.mkdtemp(prefix="g", dir=short_folder()))
    try:
        yield work
    finally:  # neither goes where a link leads, or minds how deep folders are nested
        subprocess.run(["chmod", "-R", "u+rwX", work], check=False, capture_output=True)
        subprocess.run(["rm", "-rf", work], check=False, capture_output=True)


def grade_one(
    one: Submission, source: Path, output: Path, hide: Sequence[Path] | None
) -> dict[str, Any]:
    """Return the scores of a submission: those of an earlier run, if nothing changed since.

    Args:
        one: The submission.
        source: The instructor's notebook of its assignment.
        output: Where `grade` writes.
        hide: The folders that the sandbox covers; None for no sandbox.

    Returns:
        reason (why the notebook could not be run to its end, or ""), seconds, and cells: for each
        graded cell its points, score (None where a person must read the answer) and reason.
    """
    kept = one.kept(output)
    written = kept / "scores.json"
    try:
        identity = _identity(one, source, sandbox=hide is not None)
        if written.is_file():
            scores = json.loads(written.read_text())
            if scores.get("identity") == identity:
                return scores
        shutil.rmtree(kept, ignore_errors=True)
        files.make_folder(kept)
        start = time.perf_counter()
        reason = _run(one, source, kept, hide)
        seconds = round(time.perf_counter() - start, 1)
        if written.is_file():
            scores = json.loads(written.read_text())
            scores |= {"seconds": seconds, "identity": identity}
            files.write_bytes(written, json.dumps(scores, indent=2).encode())
            return scores
    except OSError as error:  # cannot be read, or the disk is full: no reason to stop the others
        reason = str(error)
    from advlab.classroom.merging import no_points  # needs nbgrader, which may not be installed

    # Not this submission's doing, maybe: without an identity in its scores it is tried again.
    cells = no_points(nbformat.read(source, as_version=4), reason)
    return {"reason": reason, "cells": cells, "seconds": 0.0}


def _identity(one: Submission, source: Path, *, sandbox: bool) -> str:
    """Return a hash of what a score depends on: the notebook, its source, the code that grades."""
    digest = sha256(f"{sandbox} {code_hash(*GRADER)}".encode())
    for path in (one.path, source):
        with path.open("rb") as opened:
            digest.update(file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _run(one: Submission, source: Path, kept: Path, hide: Sequence[Path] | None) -> str:
    """Run a submission; it writes its scores to the folder `kept`. Return why it could not."""
    limits = {"cell_seconds": CELL_SECONDS, "seconds": SECONDS, "megabytes": MEGABYTES}
    with _work_folder() as work:
        paths = [str(path.absolute()) for path in (source, one.path, work, kept)]
        hidden = None if hide is None else [str(path) for path in hide]
        job = json.dumps({"paths": paths, "hidden": hidden, "limits": limits})
        command = [sys.executable, "-m", "advlab.classroom.run_submission", job]
        # It ends by itself in time, unless something is badly wrong.
        return _run_limited(command, kept / "log.txt", SECONDS + 120)


def _run_limited(command: Sequence[str], log: Path, seconds: int) -> str:
    """Run `command`, kill it and its children after `seconds`; return why it failed."""
    with log.open("wb") as written:
        process = subprocess.Popen(
            command, stdout=written, stderr=written, stdin=subprocess.DEVNULL, process_group=0
        )
        _running.add(process.pid)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"took longer than {seconds} s"
        finally:
            _running.discard(process.pid)
            _kill(process.pid)
            process.wait()
    return "" if process.returncode == 0 else "could not be run (see log.txt)"


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def kill_running() -> None:
    """Kill all submissions that run now, with all that they started."""
    for group in tuple(_running):
        _kill(group)
