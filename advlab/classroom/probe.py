"""Try to break out of the sandbox that this runs in; print what worked, as JSON.

Started by `grading.check_sandbox` before a class is graded. Whatever it can do, an answer cell of a
student can do, too.
"""

import ctypes
import errno
import importlib
import json
import mmap
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

# From <sys/mount.h>, <sched.h> and <sys/ipc.h>.
MS_REMOUNT, MS_BIND, MNT_DETACH, CLONE_NEWUSER, IPC_CREAT = 0x20, 0x1000, 0x2, 0x10000000, 0o1000
CLONE, CLONE3 = {"x86_64": 56, "aarch64": 220}, 435  # <asm/unistd.h>; the second on all machines
PTRACE_SEIZE, AF_ALG, AF_VSOCK = 0x4206, 38, 40  # <linux/ptrace.h>, <sys/socket.h>
WRITTEN_BY_ROOT = ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/printk", "/proc/1/mem")
PID_NAMESPACE = Path("/proc/self/ns/pid")
MOUNT = re.compile(r"(?:\S+ ){4}(\S+) ")  # where, in a line of /proc/self/mountinfo


def break_out(job: dict[str, Any]) -> Iterator[str]:
    """Yield each thing that works and should not: "unmount /home", say.

    Args:
        job: own: folders in memory, to which it may write; hidden: folders that hold secrets;
            secrets: files in them; token: what stands in the grader's environment; port: where the
            grader listens; pid_namespace: the grader's.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if any(int(_status(f"Cap{name}"), 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")):
        yield "act as the administrator (it holds capabilities)"
    if os.getuid() == 0:
        yield "be root"
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    mounts = [_unescaped(found[1]) for found in map(MOUNT.match, lines) if found]
    elsewhere = [f for f in job["hidden"] if not any(map(Path(f).is_relative_to, job["own"]))]
    folders = {*mounts, *elsewhere, "/etc", sys.prefix, str(Path(__file__).parent)}
    for folder in sorted(folders - {*job["own"]}):
        if _writes(Path(folder) / "written-by-advlab-probe"):
            yield f"write to {folder}"
    for folder in job["own"]:
        if os.statvfs(folder).f_blocks * os.statvfs(folder).f_frsize > job["largest"]:
            yield f"write without limit to {folder}"
    for secret in job["secrets"]:
        if os.path.lexists(secret):
            yield f"read {secret}"
    for environ in Path("/proc").glob("[0-9]*/environ"):
        if job["token"].encode() in _read(environ):
            yield "read the grader's environment"
    if str(PID_NAMESPACE.readlink()) == job["pid_namespace"]:
        yield "see the grader's processes"
    for path in WRITTEN_BY_ROOT:
        with suppress(OSError):
            os.close(os.open(path, os.O_WRONLY))
            yield f"write to {path}"
    if libc.ptrace(PTRACE_SEIZE, 1, None, None) == 0:
        yield "take hold of the process that keeps it here"
    if _connects(job["port"]):
        yield "open a network connection"
    for family in (AF_ALG, AF_VSOCK):
        with suppress(OSError):
            socket.socket(family, socket.SOCK_STREAM).close()
            yield f"make a socket of family {family}, which no namespace keeps here"
    if os.path.lexists("/etc/passwd") or os.path.lexists("/sys"):
        yield "see more of the system than its programs"
    if _hides_memory(libc):
        yield "hold memory that nobody can measure"
    # Last, as these change what is there.
    for folder in mounts:
        if libc.mount(None, os.fsencode(folder), None, MS_REMOUNT | MS_BIND, None) == 0:
            yield f"mount {folder} anew, writable"
        if libc.umount2(os.fsencode(folder), MNT_DETACH) == 0:
            yield f"unmount {folder}"
    if libc.unshare(CLONE_NEWUSER) == 0 or _clones(libc):
        yield "make a user namespace, in which it is administrator"
    with suppress(OSError):
        os.setuid(0)
        yield "become root"


def _clones(libc: ctypes.CDLL) -> bool:
    """Tell whether a process in a user namespace of its own can be started, in either way."""
    clone = CLONE.get(os.uname().machine)
    child = libc.syscall(clone, CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0) if clone else -1
    if child == 0:
        os._exit(0)
    libc.syscall(CLONE3, None, 0)  # no such arguments, or no such call?
    return child > 0 or ctypes.get_errno() != errno.ENOSYS


def _status(field: str) -> str:
    """Return a field of what the kernel says of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{field}:"))


def _unescaped(path: str) -> str:
    return re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), path)


def _hides_memory(libc: ctypes.CDLL) -> bool:
    with suppress(OSError):
        os.close(os.memfd_create("x"))
        return True
    with suppress(OSError):
        mmap.mmap(-1, 1).close()
        return True
    libc.vmsplice(-1, None, 0, 0)  # no such file, or no such call?
    return ctypes.get_errno() != errno.ENOSYS or libc.shmget(0, 1, IPC_CREAT) >= 0


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
    broken = list(break_out(json.loads(sys.stdin.readline())))
    if not broken:
        for module in ("ipykernel", "torch"):  # what a submission needs is there
            importlib.import_module(module)
    print(json.dumps(broken), flush=True)
    sys.stdin.read()  # until the grader has looked at this process from outside
