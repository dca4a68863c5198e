"""What is left of a run that is stopped: everything that was finished, and no process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from conftest import draw_pictures, write_lesson
from nodes import alive, wait_for

ENDLESS = ("98_endless", "99_endless")
# SIGABRT then prints where each thread is.
SETTINGS = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


@pytest.fixture
def clone(tmp_path):
    """A clone: one lesson needs two models, two need none and never end, one core runs one."""
    clone = tmp_path / "clone"
    for name in ("pyproject.toml", "advlab/files.py"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
    write_lesson(clone, "01_baseline", "print('done')")
    for name in ENDLESS:
        write_lesson(clone, name, "import time\ntime.sleep(600)")
    for name in ("cat", "dog"):
        draw_pictures(tmp_path / "pictures", name, 200)
    return clone


@pytest.fixture
def run(clone):
    """Start `advlab run` in the clone, on one core; what it prints goes to the file log."""
    started = []

    def start() -> psutil.Popen:
        data = f"folder:{clone.parent / 'pictures'}"
        options = ["--profile", "paper", "--dataset", data, "--output-dir", "out", "--resume"]
        with (clone / "log").open("w") as log:
            process = psutil.Popen(
                ["taskset", "1", sys.executable, "-m", "advlab", "run", *options],
                cwd=clone,
                env={**os.environ, **SETTINGS},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def kept(clone: Path) -> dict[str, int]:
    """Return the files of models, done or half done, and when they were written."""
    found = (clone / "out" / "checkpoints").glob("[!.]*.s*")  # temporary files come and go
    return {path.name: path.stat().st_mtime_ns for path in found}


@contextmanager
def named_if_left(started: list[psutil.Process], when: str) -> Iterator[None]:
    """When the block fails, say which of the processes that were started are left."""
    try:
        yield
    except AssertionError as error:
        left = [p.as_dict(["pid", "status", "cmdline"]) for p in alive(started)]
        raise AssertionError(f"{error}, {when}; left: {left}") from error


def stop_after_an_epoch(clone: Path, run: Callable[[], psutil.Popen], number: int) -> str:
    """Send a signal to a run that trains; return what it has printed."""
    before, process = kept(clone), run()
    wait_for(lambda: kept(clone) != before, "an epoch", 90)
    started = process.children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: all that was started gets it
    else:
        process.send_signal(number)
    try:
        assert process.wait(30) != 0
    except psutil.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        process.wait(10)
        pytest.fail(f"runs 30 s after signal {number}; printed: {(clone / 'log').read_text()}")
    with named_if_left(started, f"after signal {number}"):
        wait_for(lambda: not alive(started), "no process is left", 30)  # they may get little time
    left = kept(clone)
    time.sleep(1)
    assert kept(clone) == left
    return (clone / "log").read_text()


def test_run_that_is_stopped_stops_at_once_and_goes_on(clone, run):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        printed = stop_after_an_epoch(clone, run, number)
        assert "Traceback" not in printed
        if number != signal.SIGKILL:
            assert "--resume" in printed
            assert "leaked" not in printed  # semaphores, as Python's own tracker says
    for name in ENDLESS:
        write_lesson(clone, name, "print('in the end')")
    assert run().wait(120) == 0, (clone / "log").read_text()
    assert json.loads((clone / "out" / "run.json").read_text())["notebooks"].keys() == {
        "01_baseline",
        *ENDLESS,
    }
