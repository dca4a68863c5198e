"""Try to break out of the sandbox that this runs in; print what worked, as JSON.

Started by `grading.check_sandbox` before a class is graded. Whatever it can do, an answer cell of a
student can do, too.
"""

import ctypes
import importlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# From <sys/mount.h> and <sched.h>.
MS_REMOUNT, MS_BIND, MNT_DETACH, CLONE_NEWUSER = 0x20, 0x1000, 0x2, 0x10000000
PID_NAMESPACE = Path("/proc/self/ns/pid")


def break_out(job: dict[str, Any]) -> Iterator[str]:
    """Yield each thing that works and should not: "unmount /home", say.

    Args:
        job: hidden: folders that the sandbox covers; secrets: files in them; token: what stands in
            the grader's environment; port: where the grader listens; pid_namespace: the grader's.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if int(_status("CapEff"), 16) or int(_status("CapPrm"), 16):
        yield "act as the administrator (it holds capabilities)"
    for folder in (*job["hidden"], "/tmp", "/run"):
        if libc.umount2(os.fsencode(folder), MNT_DETACH) == 0:
            yield f"unmount {folder}"
    if libc.mount(None, b"/", None, MS_REMOUNT | MS_BIND, None) == 0:
        yield "mount / anew, writable"
    for folder in (*job["hidden"], "/", sys.prefix, str(Path(__file__).parent)):
        if _writes(Path(folder) / "written-by-advlab-probe"):
            yield f"write to {folder}"
    for secret in job["secrets"]:
        if os.path.lexists(secret):
            yield f"read {secret}"
    for environ in Path("/proc").glob("[0-9]*/environ"):
        if job["token"].encode() in _read(environ):
            yield "read the grader's environment"
    if str(PID_NAMESPACE.readlink()) == job["pid_namespace"]:
        yield "see the grader's processes"
    if _connects(job["port"]):
        yield "open a network connection"
    if libc.unshare(CLONE_NEWUSER) == 0:  # last: it changes what this may do
        yield "make a user namespace, in which it is administrator"


def _status(field: str) -> str:
    """Return a field of what the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{field}:"))


def _writes(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
        path.unlink()
    except OSError:
        return False
    return True


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # another user's, or it has just ended
        return b""


def _connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 2).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    broken = list(break_out(json.load(sys.stdin)))
    if not broken:
        for module in ("ipykernel", "torch"):  # what a submission needs is there
            importlib.import_module(module)
    print(json.dumps(broken))
