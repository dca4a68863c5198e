"""What is set, where things lie, and how they are written: to a temporary name, then moved."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

if TYPE_CHECKING:
    import pandas as pd


NAMES = ("CACHE", "DATA", "DATASET", "DEVICE", "OUTPUT", "PROFILE", "SCHEDULER", "THREADS")
SETTINGS = [f"ADVLAB_{name}" for name in NAMES]
SOURCES = ("advlab", "data", "figures", "notebooks", "tests")  # folders of a clone
PACKAGE = Path(__file__).resolve().parent
PACKED = "_repository"  # in an installed wheel: notebooks, tables and models (see setup.py)


def setting(value: str | None, variable: str = "", default: str = "") -> str:
    """Return the first of `value` and the environment's `variable` that says more than "auto"."""
    said = (value, os.environ.get(variable))
    return next((one for one in said if one not in (None, "", "auto")), default)


def is_clone(folder: Path) -> bool:
    """Tell whether `folder` is a clone of the repository."""
    return (folder / "pyproject.toml").is_file() and (folder / "advlab" / "files.py").is_file()


def repository() -> Path | None:
    """Return the clone that holds the current folder, or else this package; None without one."""
    here = Path.cwd()
    places = (here, *here.parents, PACKAGE.parent)
    return next(filter(is_clone, places), None)


def home() -> Path:
    """Return the folder for data and outputs: the clone, or the current folder without one."""
    return repository() or Path.cwd()


def clone() -> Path:
    """Return the clone of the repository, into which results are published.

    Raises:
        FileNotFoundError: if there is none.
    """
    if repository() is None:
        raise FileNotFoundError(
            f"no clone of the repository holds {Path.cwd()}, and this writes into one; run it there"
        )
    return home()


def shipped() -> Path:
    """Return the folder of what comes with advlab, which is only read.

    It holds notebooks/, figures/ (tables) and data/checkpoints/. It is the clone, or the wheel's
    copy without one. A wheel that was made for students has no copy; then it is the current folder.
    """
    packed = PACKAGE / PACKED
    return packed if repository() is None and packed.is_dir() else home()


def results_folder(name: str | Path) -> Path:
    """Return the folder for results called `name`, absolute.

    Raises:
        ValueError: if it is a clone of the repository, a folder of its sources or one of the
            installed package, which results would be written over.
    """
    folder = Path(name).expanduser().resolve()
    sources = is_clone(folder.parent) and folder.name in SOURCES
    if is_clone(folder) or sources or folder.is_relative_to(PACKAGE):
        raise ValueError(
            f"the output folder {folder} holds the repository's own files, and results would be "
            "written over them; choose another, such as outputs/mine"
        )
    return folder


def shipped_checkpoints() -> Path:
    """Return the folder of the trained models that come with advlab."""
    return shipped() / "data" / "checkpoints"


def cache_dir() -> Path:
    """Return the folder for what can always be made again: `ADVLAB_CACHE` or the user's cache.

    Raises:
        OSError: if there is neither.
    """
    chosen = setting(None, "ADVLAB_CACHE")
    if not chosen and user_home() is None:
        raise OSError("you have no home folder; set HOME or ADVLAB_CACHE to a folder of your own")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("advlab")


def user_home() -> Path | None:
    """Return the user's home folder; None where HOME is not set and the system knows of none."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def _explained(error: OSError, path: Path) -> OSError:
    return type(error)(
        error.errno,
        f"cannot write {path}: {error.strerror or error}. Free some space, or choose a folder "
        "that you may write to (ADVLAB_CACHE, ADVLAB_OUTPUT, or the option of the command)",
    )


def kind_of(path: Path) -> str:
    """Return what a file that was to hold data is instead: empty, a web page ...; "" if unknown."""
    with path.open("rb") as opened:
        start = opened.read(200).lstrip().lower()
    if not start:
        return "empty"
    kinds = {b"<!doctype html": "a web page", b"<html": "a web page"}
    kinds[b"version https://git-lfs"] = "a pointer of Git LFS (git lfs pull)"
    return next((kind for sign, kind in kinds.items() if start.startswith(sign)), "")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let an OSError of the block name `path` and the mend: a full disk names neither."""
    try:
        yield
    except OSError as error:
        raise _explained(error, path) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; move it there once the block has written it.

    A block that fails or a process that is killed leaves the old `path` as it was.

    Raises:
        OSError: if the folder cannot be written or the disk is full; names `path` and the mend.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
    finally:
        if temporary.exists():
            temporary.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically (see `atomic_write`)."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_table(path: Path, table: "pd.DataFrame") -> None:
    """Write a tidy table to `path` as CSV with six digits, atomically."""
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def make_folder(path: Path) -> None:
    """Create folder `path` and its parents, if need be.

    Raises:
        OSError: if it cannot be created or written to; names it and the mend.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "permission denied")
