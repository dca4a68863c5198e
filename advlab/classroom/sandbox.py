"""What a program that nobody has read may see and touch: bubblewrap's words."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import advlab

TEMPORARY = 1 << 30  # bytes that it may write to /tmp
KEPT = re.compile("(PYTHON)?PATH|LANG|LD_LIBRARY_PATH|(OMP|MKL|OPENBLAS)_.*")  # of the environment


def sandboxed(work: Path, hidden: Sequence[Path]) -> list[str]:
    """Return the words before a command that take from it the network and most of the disk.

    It sees the system, Python and this package, but nothing else in the folders `hidden`; it starts
    in an empty /tmp of its own, and `work` is where it is spoken to. It has no capabilities, also
    where the grader is root, and can get none: it is in a user namespace and can make no other.
    """
    # In /run are the sockets of services that would act for the grader.
    hidden = [path.resolve() for path in (Path("/run"), *hidden)]
    hidden = [path for path in hidden if path.is_dir() and path != path.parent]
    covered = [Path("/tmp"), *hidden]
    needed = [Path(name) for name in (sys.prefix, sys.base_prefix, Path(advlab.__file__).parent)]
    mounts = {path: ["--size", str(TEMPORARY), "--tmpfs", str(path)] for path in covered}
    for path in {*needed, *(path.resolve() for path in needed)}:
        if any(path.is_relative_to(folder) for folder in covered):
            mounts[path] = ["--ro-bind", str(path), str(path)]
    mounts[work] = ["--bind", str(work), str(work)]
    # Without keys of the grader's, and without JPY_PARENT_PID, a process that the kernel would take
    # for dead. bubblewrap itself starts so: inside, it is process 1 and can be read.
    kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
    words = ["env", "-i", *(f"{name}={value}" for name, value in {**kept, "HOME": "/tmp"}.items())]
    words += ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    words += ["--size", str(TEMPORARY), "--tmpfs", "/dev/shm"]
    # A mount covers what is below it, so the deeper ones come later.
    for path in sorted(mounts, key=lambda path: len(path.parts)):
        words += mounts[path]
    words += [word for path in hidden for word in ("--remount-ro", str(path))]
    words += ["--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
    return [*words, "--chdir", "/tmp", "--die-with-parent", "--new-session", "--"]
