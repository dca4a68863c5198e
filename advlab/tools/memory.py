"""How much memory processes hold."""

import threading

import psutil


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
