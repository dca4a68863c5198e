"""What this machine has to compute with, and how a long computation shows where it is.

Torch's own threads wait for each other at every operator: where another program wants a core, two
of them can be ten times slower than one. So what can be cut is shared among Python threads with one
torch thread each (`in_threads`), and what cannot, a training, takes the cores that are free.
"""

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from tqdm import tqdm

from advlab import files

T = TypeVar("T")
LITTLE = 0.5  # of a core: what others use of it that does not cost a thread
DEVICES = ("auto", "cpu", "cuda", "mps")
OWN_GROUPS, LIMITS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # of Linux
GRANTS = ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")  # control groups 2 and 1

_lock = threading.Lock()
_helping = 0  # threads that are at work for `in_threads` in this process, beside its callers'


def own_cores() -> set[int]:
    """Return the numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cores() -> int:
    """Return how many cores this process may use: those it may run on, within its `quota`."""
    return math.ceil(min(len(own_cores()), quota()))


def quota() -> float:
    """Return how many cores' time Linux's control groups grant; infinity without a limit."""
    granted = [math.inf]
    with suppress(OSError):
        for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds or "cpu" in kinds.split(","):  # version 2 names no kinds
                group = LIMITS / kinds / path.lstrip("/")
                # A limit holds for all groups below; in a container the upper ones are not shown.
                granted += map(_granted, [group, *group.parents])
    return min(granted)


def _granted(group: Path) -> float:
    for names in GRANTS:
        with suppress(OSError, ValueError):  # "max" is no number, and no limit
            texts = [(group / name).read_text(encoding="utf-8") for name in names]
            quota, period = map(float, " ".join(texts).split())
            if quota > 0:  # -1 is no limit, either
                return quota / period
    return math.inf


def threads() -> int:
    """Return how many threads to compute with: ADVLAB_THREADS, or as many as `cores`.

    Never more than torch has in this process now: who gave it one thread meant it.

    Raises:
        ValueError: if ADVLAB_THREADS is no whole number from 1 on.
    """
    said = files.setting(None, "ADVLAB_THREADS")
    if said and not (said.isascii() and said.isdecimal() and int(said)):
        raise ValueError(f"ADVLAB_THREADS is {said!r}; give a whole number from 1 on, or auto")
    torchs = torch.get_num_threads()
    return min(torchs, int(said) if said else cores()) if torchs > 1 else 1


def busy_cores(seconds: float = 0.2) -> float:
    """Return how many of its cores other processes keep from this one, by a look of `seconds`."""
    mine, start = time.process_time(), time.perf_counter()
    busy: Any = psutil.cpu_percent(seconds, percpu=True)
    mine = (time.process_time() - mine) / (time.perf_counter() - start)
    return max(0.0, sum(busy[core] for core in own_cores() if core < len(busy)) / 100 - mine)


def free_threads() -> int:
    """Return how many threads a training that starts now should have, at least 1.

    Those of `threads`, less the cores that others keep busy (unless ADVLAB_THREADS is set).

    Raises:
        ValueError: as `threads`.
    """
    allowed = threads()
    if allowed == 1 or files.setting(None, "ADVLAB_THREADS"):
        return allowed
    free = len(own_cores()) - busy_cores()
    return max(1, min(allowed, int(free + LITTLE)))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch have `count` threads of its own in this Python thread, then as many as before."""
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_threads(work: Callable[..., T], parts: Sequence[tuple], limit: int | None = None) -> list[T]:
    """Return ``[work(*part) for part in parts]``, computed by several Python threads.

    Each has one torch thread. There are `limit`, less those that help other calls; the caller's is
    one, and the others take over its modes (gradients, inference).

    Args:
        work: Called with each of `parts`.
        parts: Its arguments.
        limit: How many threads may work in this process; None for as many as `threads` says.

    Raises:
        BaseException: of the first part that fails. No further part is begun then, nor after
            Ctrl-C, and no thread is at work when the error comes.
    """
    if len(parts) == 1:
        with torch_threads(1):
            return [work(*parts[0])]
    limit = limit or threads()
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    left = deque(enumerate(parts))
    found: dict[int, T] = {}
    failed: dict[int, BaseException] = {}

    def take() -> None:
        while left:
            with suppress(IndexError):  # another thread took the last one
                number, part = left.popleft()
                try:
                    found[number] = work(*part)
                except BaseException as error:
                    failed[number] = error
                    left.clear()

    def help_out() -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            take()

    helpers: list[Future[None]] = []
    with torch_threads(1), _helpers(len(parts), limit) as count:
        try:
            with suppress(RuntimeError):  # the system has no more: those there are do it all
                helpers += [_executor(limit).submit(help_out) for _ in range(count)]
            take()
        finally:
            left.clear()
            wait(helpers)
    if failed:  # parts are begun in order: the first of these fails first in one thread, too
        raise failed[min(failed)]
    return [found[number] for number in range(len(parts))]


@cache
def _executor(limit: int) -> ThreadPoolExecutor:
    """Return the threads that help, which stay: a new one needs 2 ms for its first convolutions."""
    return ThreadPoolExecutor(limit - 1, "advlab", torch.set_num_threads, (1,))


if hasattr(os, "register_at_fork"):  # a child process has none of its parent's threads
    os.register_at_fork(after_in_child=_executor.cache_clear)


@contextmanager
def _helpers(parts: int, limit: int) -> Iterator[int]:
    """Yield how many threads may help a caller, so that calls at once share `limit` of them."""
    global _helping
    with _lock:
        count = max(0, min(parts, limit - _helping) - 1)
        _helping += count
    try:
        yield count
    finally:
        with _lock:
            _helping -= count


def pick_device(device: str = "auto") -> torch.device:
    """Return the device to compute on; "auto" takes ADVLAB_DEVICE, or cuda, then mps, then the CPU.

    Raises:
        ValueError: if there is no such device on this machine.
    """
    device = files.setting(device, "ADVLAB_DEVICE", "auto")
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}  # how many there are
    there["mps"] = int(torch.backends.mps.is_available())
    if device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if there[name]))
    kind, _, number = device.partition(":")
    if not (number or "0").isdecimal() or int(number or 0) >= there.get(kind, 0):
        found = ", ".join(name for name, count in there.items() if count)
        raise ValueError(f"device {device!r} is not on this machine; choose auto, or {found}")
    return torch.device(device)


def has_fast_bf16(device: torch.device) -> bool:
    """Tell whether bfloat16 is computed in hardware (elsewhere it would be slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not `torch.cpu.get_capabilities`, which torch 2.9 does not have.
    in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and in_hardware


class _Bar(tqdm):
    """A bar that only threads of its own process share."""


# Else it is the system's semaphore, which a worker that is killed leaves behind.
_Bar.set_lock(threading.RLock())


def progress_bar(label: str | None, total: int, unit: str) -> tqdm:
    """Return a progress bar; none is shown for `label` None.

    It is text on standard output, in notebooks too: a bar made of widgets would leave state behind
    that some viewers refuse, and standard error would look like a warning.
    """
    return _Bar(
        total=total,
        desc=label,
        disable=label is None,
        unit=unit,
        unit_scale=total >= 100_000,
        file=sys.stdout,
        leave=False,
        mininterval=1.0,
        ncols=100,
    )
