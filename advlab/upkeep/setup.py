"""What is installed before advlab runs: a clone's environment; in Colab, what is missing there.

`python -m advlab setup` makes the environment on any system, and `make` calls it. Only Python
itself is imported here, because nothing else may be there yet.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

CLONE = Path(__file__).resolve().parent.parent.parent
LOCKED = ("pyproject.toml", "constraints.txt")  # an environment is older than neither
# On Linux, PyPI's torch brings gigabytes of CUDA; this index has the build for processors.
CPU_TORCH = "https://download.pytorch.org/whl/cpu"
# What the lessons import beside torch. The rest of advlab's requirements are for its command line.
LESSONS_NEED = ["filelock", "ipython", "ipywidgets", "matplotlib", "numpy", "pandas"]
LESSONS_NEED += ["platformdirs", "psutil", "safetensors", "seaborn", "tqdm"]
# In Colab the running kernel uses these two already, and the page shows their widgets.
COLABS_OWN = ("ipython", "ipywidgets")


# --- a clone's environment


def python_in(environment: Path, system: str = os.name) -> Path:
    """Return the Python of a virtual environment; `system` is as in `os.name`."""
    return environment / ("Scripts/python.exe" if system == "nt" else "bin/python")


def belongs_here(environment: Path) -> bool:
    """Tell whether an environment was made where it lies: it does not move with its folder."""
    named = re.compile(rf"[='\"]{re.escape(str(environment))}(?=['\"\s])")
    script = python_in(environment).parent / "activate"
    return script.is_file() and bool(named.search(script.read_text(encoding="utf-8")))


def is_ready(environment: Path) -> bool:
    """Tell whether an environment belongs here and is no older than what is asked for."""
    mark = environment / "installed"
    if not (belongs_here(environment) and mark.is_file()):
        return False
    asked = (environment.parent / name for name in LOCKED)
    return all(mark.stat().st_mtime >= path.stat().st_mtime for path in asked)


def pip(python: Path) -> list[str]:
    """Return the words that install the versions that the committed numbers were made with."""
    words = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    return [*words, "--constraint", "constraints.txt"]


def installing(python: Path, settings: Mapping[str, str]) -> list[list[str]]:
    """Return the commands that fill an environment.

    Torch comes first, and is alone asked for at an index of its own: pip would ask there for every
    package, and wait for each answer where that index cannot be reached.

    Args:
        python: That of the environment.
        settings: Environment variables. TORCH_INDEX names another index for torch, or none if
            empty; none is named either where PIP_EXTRA_INDEX_URL, pip's own variable, names one.
    """
    usual = "" if settings.get("PIP_EXTRA_INDEX_URL") else CPU_TORCH
    index = settings.get("TORCH_INDEX", usual)
    torch = [*pip(python), "--no-deps", "--retries", "1"]
    torch += [*(["--extra-index-url", index] if index else []), "torch", "torchvision"]
    return [torch, [*pip(python), "--editable", ".[test,audit]"]]


def make(clone: Path, extras: Sequence[str] = ()) -> Path:
    """Make or renew the environment `.venv` of a clone, unless it is ready; add `extras` to it.

    Returns:
        Its Python.

    Raises:
        SystemExit: if Python is too old, `clone` is none, or a command fails (which says why).
    """
    if sys.version_info < (3, 11):  # noqa: UP036  (nothing has checked it yet)
        raise SystemExit(
            "Python 3.11 or newer is needed. Name one: make PYTHON=/path/to/python3.11 ..., or "
            "/path/to/python3.11 -m advlab setup"
        )
    if not (clone / "constraints.txt").is_file():
        raise SystemExit(f"{clone} is no clone of the repository, and setup makes one's .venv")
    environment = clone / ".venv"
    python = python_in(environment)
    commands = []
    if not is_ready(environment):
        anew = [] if belongs_here(environment) else ["--clear"]
        commands = [[sys.executable, "-m", "venv", *anew, str(environment)]]
        commands += installing(python, os.environ)
    if extras:
        more = [*pip(python), "--quiet", "--editable", f".[{','.join(extras)}]"]
        commands.append(more)
    for command in commands:
        if code := subprocess.run(command, cwd=clone).returncode:
            raise SystemExit(code)
    (environment / "installed").touch()
    return python


def main(words: Sequence[str]) -> None:
    """Make .venv in this clone, with all that the lessons and their tests need."""
    parser = argparse.ArgumentParser("advlab setup", description=main.__doc__)
    told = "course, site, browser or bench: what these commands and tests need beside that"
    parser.add_argument("extra", nargs="*", help=told)
    python = make(CLONE, parser.parse_args(words).extra)
    print(f"Ready: {python.relative_to(CLONE)} -m advlab ...")


# --- in Colab


def found(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those of the packages that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def complete() -> None:
    """Install what the lessons need and this Python lacks; its torch and its widgets stay.

    Raises:
        RuntimeError: if pip fails; if its torch is older than advlab needs; or if a package was
            replaced that this process had already imported.
    """
    before = found(LESSONS_NEED)
    asked = {re.split(r"[^\w.-]", text)[0]: text for text in requires("advlab") or []}
    kept = [name for name in COLABS_OWN if name in before]
    wanted = [asked[name] for name in LESSONS_NEED if name not in kept]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *wanted]
    # Of a success nothing is shown: pip complains that the command line's requirements are missing.
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip cannot install what the lessons need: {done.stderr.strip()}")
    importlib.invalidate_caches()
    _check_torch({name: asked[name] for name in ("torch", "torchvision")})
    after = found(LESSONS_NEED)
    replaced = [name for name in before if before[name] != after[name] and name in sys.modules]
    if replaced:
        raise RuntimeError(
            f"{', '.join(replaced)} was in use and is now of another version. Choose Runtime > "
            "Restart session, and run the lesson again"
        )


def _check_torch(asked: Mapping[str, str]) -> None:
    from packaging.requirements import Requirement  # matplotlib has brought it

    there = found(asked)
    for name, text in asked.items():
        if not Requirement(text).specifier.contains(there.get(name, "0"), prereleases=True):
            raise RuntimeError(
                f"advlab needs {text}; here is {there.get(name, 'none')}. Choose a newer runtime "
                "version (Runtime > Change runtime type), or install that torch yourself"
            )
