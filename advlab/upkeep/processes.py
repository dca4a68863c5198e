"""What processes are started with, and how much memory they hold."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import psutil

# The C library of Linux gives large blocks back to the system as soon as they are freed, and a
# training step asks for the same ones again: workers keep them (`advlab bench` measures it), but
# not those of 20 MB or more, which are pieces of the data set.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(20 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Set environment variables (None: unset them) for the processes that are started inside."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def kill_children(of: int | None = None) -> None:
    """Kill all that a process, by default this one, has started, and what that has started."""
    for process in psutil.Process(of).children(recursive=True):
        with suppress(psutil.Error):
            # Python's own, which ends by itself and would complain; a submission may be called so.
            own = process.ppid() == os.getpid() and "resource_tracker" in str(process.cmdline())
            if not own:
                process.kill()


class PeakMemory:
    """Watches the memory of this process and its children; a context manager.

    Memory that processes share counts once (Linux; elsewhere each process's own counts alone).

    Args:
        interval: Seconds between two looks.
    """

    def __init__(self, interval: float = 1.0) -> None:
        self.megabytes = 0.0
        self._interval, self._stop = interval, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        stopping = False
        while not stopping:  # and once more at the end: a last peak counts too
            stopping = self._stop.wait(self._interval)
            used = sum(map(share_of_memory, [me, *me.children(recursive=True)]))
            self.megabytes = max(self.megabytes, used / 1e6)


def share_of_memory(process: psutil.Process) -> int:
    """Return the bytes that `process` holds; what it shares is divided among those who share it."""
    try:
        memory = process.memory_full_info()
    except psutil.Error:  # it has just ended
        return 0
    return getattr(memory, "pss", memory.uss)
