"""Where things lie, and how they are written: to a temporary name first, then moved."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

if TYPE_CHECKING:
    import pandas as pd


def repository() -> Path | None:
    """Return the clone that holds this package, or None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() else None


def home() -> Path:
    """Return the folder for data and outputs: the clone, or the current folder without one."""
    return repository() or Path.cwd()


def shipped_checkpoints() -> Path:
    """Return the folder of the trained models that come with the repository."""
    return home() / "data" / "checkpoints"


def cache_dir() -> Path:
    """Return the folder for what can always be made again: `ADVLAB_CACHE` or the user's cache."""
    chosen = os.environ.get("ADVLAB_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("advlab")


def _explained(error: OSError, path: Path) -> OSError:
    return type(error)(
        error.errno,
        f"cannot write {path}: {error.strerror or error}. Free some space, or choose a folder "
        "that you may write to (ADVLAB_CACHE, ADVLAB_OUTPUT, or the option of the command)",
    )


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; move it there once the block has written it.

    A block that fails or a process that is killed leaves the old `path` as it was.

    Raises:
        OSError: if the folder cannot be written or the disk is full; names `path` and the mend.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise _explained(error, path) from error
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
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _explained(error, path) from error
    if not os.access(path, os.W_OK):
        raise _explained(PermissionError(13, "permission denied"), path)
