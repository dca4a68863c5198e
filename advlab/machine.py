"""What this machine offers."""

import os

DEVICES = ("auto", "cpu", "cuda", "mps")


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
