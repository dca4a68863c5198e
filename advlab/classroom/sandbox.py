"""What a program that nobody has read may see and touch: bubblewrap's words."""

import os
import platform
import re
import site
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

import advlab
from advlab.upkeep.processes import kill_children, share_of_memory

TEMPORARY = 1 << 30  # bytes that it may write to /tmp, and as many to /dev/shm
SOCKETS = 1 << 20  # bytes for the folder of its sockets
INODE = 1 << 10  # bytes that a file takes beside its content, about
CHANNELS = 5  # sockets of a kernel
PROCESSES, THREADS = 200, 1_000  # that a notebook may start
NOBODY = "65534"  # whom a user's program is taken for inside; outside it is that user
# Whom root's program is, inside and outside. Debian (policy, 9.2.2) and systemd (UIDS-GIDS.md) give
# this number to nobody, so it owns no file.
STRANGER = "65533"
NAMESPACES = [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts", "cgroup-try")]
# What root needs to become another, and gives up with that.
CHANGES = ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")
KEPT = re.compile("(PYTHON)?PATH|LANG|LD_LIBRARY_PATH|(OMP|MKL|OPENBLAS)_.*")  # of the environment
# What is seen of the system. The linker, fonts and the clock look into /etc.
SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
ETC = ("alternatives", "fonts", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime")

# What is seen of this package: nothing that answers an assignment.
OURS = ["__init__", "_torchvision", "data", "datasets", "files", "paper", "shapes"]
OURS += [f"classroom/{name}" for name in ("__init__", "probe", "remote")]

# Calls that are refused, by machine: what the system calls it (linux/audit.h), and the numbers of
# the calls (asm/unistd.h). Memory that some give belongs to no process and no folder, so nobody
# could see how much it is; others speak to parts of the kernel that no notebook needs, or to the
# process that holds the sandbox, or make a user namespace, in which a program is administrator.
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
REFUSED = {
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "vmsplice": (278, 75),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "clone3": (435, 435),  # its flags cannot be looked at; the C library then takes clone
}
SOCKET, SOCKETPAIR, MMAP, CLONE = (41, 198), (53, 199), (9, 222), (56, 220)
FAMILIES = (1, 2, 10, 16)  # of sockets: local, internet (of which there is none inside), netlink
NEW_USER = 0x10000000  # flag of clone, a user namespace
HIDES = 0x21  # flags of mmap, shared and without a file: its pages count while they are mapped only
X32 = 0x40000000  # bit of the numbers of an older way to make the same calls
# From linux/bpf_common.h, linux/filter.h and linux/seccomp.h; 38 is ENOSYS.
LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
CALL, MACHINE, ARGUMENTS = 0, 4, 16  # offsets, each argument has 8 bytes
ANSWERS = {"allow": 0x7FFF0000, "refuse": 0x00050000 | 38}


def _filter() -> bytes:
    """Return the program that refuses calls on this machine; nothing where it is not known."""
    if platform.machine() not in MACHINES:
        return b""
    which = list(MACHINES).index(platform.machine())
    # Each step with its name, and where it goes if it holds and if not; "" is the next one.
    steps = [("", LOAD, MACHINE, "", ""), ("", EQUAL, [*MACHINES.values()][which], "", "refuse")]
    steps += [("", LOAD, CALL, "", ""), ("", AT_LEAST, X32, "refuse", "")]
    steps += [("", EQUAL, call[which], "refuse", "") for call in REFUSED.values()]
    steps += [("", EQUAL, call[which], "family", "") for call in (SOCKET, SOCKETPAIR)]
    steps += [("", EQUAL, CLONE[which], "clone", "")]
    steps += [("", EQUAL, MMAP[which], "flags", "allow")]
    steps += [("family", LOAD, ARGUMENTS, "", "")]
    steps += [("", EQUAL, family, "allow", "") for family in FAMILIES[:-1]]
    steps += [("", EQUAL, FAMILIES[-1], "allow", "refuse")]
    steps += [("clone", LOAD, ARGUMENTS, "", ""), ("", AND, NEW_USER, "", "")]
    steps += [("", EQUAL, NEW_USER, "refuse", "allow")]
    steps += [("flags", LOAD, ARGUMENTS + 3 * 8, "", ""), ("", AND, HIDES, "", "")]
    steps += [("", EQUAL, HIDES, "refuse", "allow")]
    steps += [(name, RETURN, answer, "", "") for name, answer in ANSWERS.items()]
    places = {name: place for place, (name, *_) in enumerate(steps) if name}
    return b"".join(
        struct.pack("HBBI", code, *(places.get(to, at + 1) - at - 1 for to in ends), value)
        for at, (_, code, value, *ends) in enumerate(steps)
    )


def sockets(work: Path) -> Path:
    """Return the folder through which a program is spoken to; in the sandbox it is its own."""
    return work / "r"


def connection_file(work: Path) -> Path:
    """Return the one file of `work` that is seen in the sandbox."""
    return work / "k.json"


def sandboxed(work: Path, hidden: Sequence[Path]) -> list[str]:
    """Return the words before a command that take from it the network and the disk.

    It sees the system's programs, Python and `OURS` of this package, and nothing else: what of the
    folders `hidden` lies in these is covered. It can write to memory alone, to an amount that is
    limited.
    It has no capabilities and can become nobody else. A user's program is in a user namespace, the
    only way in which a user can take anything from it. Root's needs none: it has another id than
    root before its first step, for this machine too. Neither can make a namespace.

    Args:
        work: The grader's folder for this program; what the kernel refuses is written there.
        hidden: Folders that hold answers or what is the user's.
    """
    calls = work / "calls"
    calls.write_bytes(_filter())
    connection = connection_file(work)
    connection.touch(mode=0o600)  # a program that is no kernel has none
    files = f'8<"$0/{connection.name}" 9<"$0/{calls.name}"'
    words = ["sh", "-c", f'exec "$@" {files}', str(work)]
    # Without keys of the grader's, and without JPY_PARENT_PID, a process that the kernel would take
    # for dead. bubblewrap itself starts so: inside, it is process 1 and can be read.
    kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
    kept |= {"HOME": "/tmp", "USER": "nobody"}
    if site.ENABLE_USER_SITE:
        kept["PYTHONUSERBASE"] = site.getuserbase()
    words += ["env", "-i", *(f"{name}={value}" for name, value in kept.items())]
    words += ["bwrap", *(["--seccomp", "9"] if calls.stat().st_size else [])]
    words += ["--proc", "/proc", "--dev", "/dev", *_memory("/dev/shm"), "--remount-ro", "/dev"]
    words += [*_seen(hidden), *_memory("/tmp")]
    # Below /tmp, perhaps, and so after it. A copy, as its program may be another user than ours.
    words += [*_parents(connection), "--perms", "0444", "--ro-bind-data", "8", str(connection)]
    words += _memory(str(sockets(work)), SOCKETS)
    # A second guard: /proc/sys can be written by root's id alone, which no program here has.
    words += ["--remount-ro", "/proc", "--remount-ro", "/", *NAMESPACES, "--cap-drop", "ALL"]
    words += ["--chdir", "/tmp", "--die-with-parent", "--new-session"]
    return [*words, *(_as_a_stranger() if os.geteuid() == 0 else _as_nobody()), "--"]


def _as_nobody() -> list[str]:
    """Return bubblewrap's words for a user's program: who it is taken for in its namespace."""
    words = ["--unshare-user", "--disable-userns"]
    return [*words, "--uid", NOBODY, "--gid", NOBODY]


def _as_a_stranger() -> list[str]:
    """Return the words for root's program: who it becomes before its first step."""
    words = [word for name in CHANGES for word in ("--cap-add", name)]
    words += ["--", "setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"]
    return [*words, *(f"--{name}=-all" for name in ("inh-caps", "ambient-caps", "bounding-set"))]


@cache
def scope(megabytes: int) -> list[str]:
    """Return words before a command that limit its memory, and that of all that it starts.

    Only systemd can, where it manages this user's processes. Elsewhere there are none, and the
    grader adds up what they hold, several times a second.
    """
    words = ["systemd-run", *(["--user"] if os.geteuid() else []), "--scope", "--quiet"]
    words += ["-p", f"MemoryMax={megabytes}M", "-p", "MemorySwapMax=0"]
    try:
        works = subprocess.run([*words, "true"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        works = False
    return words if works else []


def _memory(folder: str, size: int = TEMPORARY) -> list[str]:
    return ["--perms", "1777", "--size", str(size), "--tmpfs", folder]


def _parents(path: Path) -> list[str]:
    """Return the words for the folders above a mount, which all may pass.

    bubblewrap itself makes them for root alone.
    """
    return [word for folder in [*path.parents][-2::-1] for word in ("--dir", str(folder))]


def _seen(hidden: Sequence[Path]) -> list[str]:
    """Return the words that show the system, Python and `OURS`, without `hidden`."""
    words = []
    system = [Path("/", name) for name in SYSTEM] + [Path("/etc", name) for name in ETC]
    for path in system:
        if path.is_symlink():
            words += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            words += [*_parents(path), "--ro-bind", str(path), str(path)]
    python = [Path(sys.prefix), Path(sys.base_prefix)]
    if site.ENABLE_USER_SITE:
        python.append(Path(site.getusersitepackages()))
    python = [path for path in dict.fromkeys(python) if path.is_dir()]
    python += [path.resolve() for path in python if path.resolve() != path]
    covered = [path.resolve() for path in hidden if path.is_dir()]
    shown = [*system, *python]
    covered = [path for path in dict.fromkeys(covered) if any(map(path.is_relative_to, shown))]
    if both := [str(path) for path in covered if path in shown]:
        raise ValueError(
            f"Python lies in {both[0]}, and so does what no submission may see; give it a folder "
            "of its own, such as .venv"
        )
    mounts = {path: ["--tmpfs", str(path)] for path in covered}
    mounts |= {path: ["--ro-bind", str(path), str(path)] for path in python}
    package = Path(advlab.__file__).parent
    for place in dict.fromkeys((package, package.resolve())):
        mounts[place] = ["--tmpfs", str(place)]
        for path in (place / f"{name}.py" for name in OURS):
            mounts[path] = ["--ro-bind", str(path), str(path)]
        covered.append(place)
    # A mount covers what is below it, so the deeper ones come later.
    for path in sorted(mounts, key=lambda path: len(path.parts)):
        words += [*_parents(path), *mounts[path]]
    return words + [word for path in covered for word in ("--remount-ro", str(path))]


def link_sockets(work: Path) -> list[int]:
    """Make the sockets of the sandbox that this process started reachable, at `sockets`.

    Returns:
        Descriptors, to be kept open as long as the sockets are used; none if these are not all
        there yet. The sockets are found through them: what a program in the sandbox puts in their
        place later is not.
    """
    outside = sockets(work)
    for process in psutil.Process().children(recursive=True):
        with suppress(OSError):  # it has just ended, or is not yet where it will be
            found = sorted(Path(f"/proc/{process.pid}/root{outside}").glob("k-*"))
            if len(found) == CHANNELS:
                opened = [os.open(path, os.O_PATH | os.O_NOFOLLOW) for path in found]
                outside.mkdir()
                for path, number in zip(found, opened, strict=True):
                    (outside / path.name).symlink_to(f"/proc/{os.getpid()}/fd/{number}")
                return opened
    return []


def seen_from_outside(pid: int) -> list[str]:
    """Return what a program in a sandbox could do, by what this process sees of it.

    Args:
        pid: Of the process that was started with the words of `sandboxed`.
    """
    *_, inside = psutil.Process(pid).children(recursive=True)
    could = []
    ids = {*inside.uids()}
    if os.geteuid() == 0:
        status = Path(f"/proc/{inside.pid}/status").read_text(encoding="utf-8")
        groups = next(line for line in status.splitlines() if line.startswith("Groups:"))
        ids |= {*inside.gids(), *map(int, groups.split()[1:])}
    if 0 in ids:
        could.append("be root on this machine")
    if not share_of_memory(inside) or not _memory_of_files([inside]):
        could.append("hold memory that the grader cannot see")
    return could


def limit(pid: int, megabytes: int) -> None:
    """Kill all that a process has started when it is too many, or holds too much memory.

    What it wrote to files of its sandbox is memory, too. So is what a process holds that has ended
    but for one of its threads, and of which the system tells nothing.
    """
    with suppress(psutil.NoSuchProcess):  # it has ended
        started = psutil.Process(pid).children(recursive=True)
        held, threads, hides = _memory_of_files(started), 0, False
        for process in started:
            held += share_of_memory(process)
            with suppress(psutil.Error):  # this one has
                own = process.num_threads()
                threads += own
                hides |= own > 1 and process.status() == psutil.STATUS_ZOMBIE
        if hides or len(started) > PROCESSES or threads > THREADS or held > megabytes << 20:
            kill_children(pid)


def _memory_of_files(processes: Sequence[psutil.Process]) -> int:
    """Return the bytes that processes in a sandbox hold in files; 0 where there is no sandbox."""
    for process in processes:
        root = Path(f"/proc/{process.pid}/root")
        with suppress(OSError):  # it has just ended
            if not root.samefile("/"):
                found = [os.statvfs(root / folder) for folder in ("tmp", "dev/shm")]
                return sum(
                    (f.f_blocks - f.f_bfree) * f.f_frsize + (f.f_files - f.f_ffree) * INODE
                    for f in found
                )
    return 0
