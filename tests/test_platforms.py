"""What other systems than Linux need; nothing here was run on one."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import PureWindowsPath

import pytest
import yaml

from advlab import files

ROOT = files.repository()
# Imports the package twice: once for what it stands on, and again without what Windows lacks.
IMPORT_AS_ON_WINDOWS = """
import importlib, os, pkgutil, signal, socket, sys
import advlab

def load():
    found = pkgutil.walk_packages(advlab.__path__, "advlab.")
    names = [m.name for m in found if not m.name.endswith("__main__")]
    for name in names:
        importlib.import_module(name)
    return names

names = load()
for name in [name for name in sys.modules if name.startswith("advlab.")]:
    del sys.modules[name]
for name in "crypt fcntl grp nis posix pty pwd resource spwd syslog termios tty".split():
    sys.modules[name] = None
for name in "SIGKILL SIGCHLD SIGUSR1 SIGALRM SIGHUP SIGQUIT setitimer alarm pthread_kill".split():
    delattr(signal, name)
for name in ("fork killpg getuid geteuid getgid setsid getpgid mkfifo uname getloadavg chown "
             "sched_getaffinity statvfs O_NOFOLLOW O_NONBLOCK O_PATH O_CLOEXEC WNOHANG").split():
    delattr(os, name)
del socket.AF_UNIX
load()
print(len(names))
"""


def test_every_module_can_be_imported_without_what_windows_lacks():
    command = [sys.executable, "-c", IMPORT_AS_ON_WINDOWS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 70


def test_files_are_read_and_written_in_one_encoding():
    # On Windows it is another one unless it is named. Ruff sees only what is surely a path.
    for path in [*(ROOT / "advlab").rglob("*.py"), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                named = {word.arg for word in node.keywords}
                if node.func.attr in ("read_text", "write_text"):
                    assert "encoding" in named, f"{path.name}, line {node.lineno}"


def test_a_clone_can_be_checked_out_on_windows():
    if not (ROOT / ".git").exists():
        pytest.skip("needs git's list of files")
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    assert [name for name, n in Counter(map(str.casefold, listed)).items() if n > 1] == []
    for name in listed:
        assert len(name) < 100  # of the 260 characters that a path may have
        assert not re.search(r'[<>:"|?*\\]', name)
        for part in name.split("/"):
            assert not PureWindowsPath(part).is_reserved(), name
            assert part[-1] not in ". ", name


def test_github_runs_every_system_and_python():
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    pythons = {"3.11", "3.12", "3.13", "3.14"}
    assert set(jobs["lessons"]["strategy"]["matrix"]["python"]) == pythons
    other = jobs["systems"]["strategy"]["matrix"]
    assert set(other["os"]) == {"windows-latest", "macos-latest"}
    assert set(other["python"]) == pythons
    commands = "\n".join(step.get("run", "") for step in jobs["systems"]["steps"])
    assert not re.search(r"\bmake\b", commands)
    for one in ("python -m advlab setup", "advlab doctor", "advlab run", "pytest"):
        assert one in commands
