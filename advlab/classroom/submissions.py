"""What a class handed in: whose notebook lies where, and the marks that a person gave."""

import os
import re
import stat
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from advlab.classroom import RefusedError

# Where a notebook may lie below the class's folder. Moodle adds a number to a student's name.
LAYOUTS = [
    re.compile(layout)
    for layout in (
        r"(?P<student>[^/]+)_(?i:(?P<name>a\d+)\.ipynb)",
        r"(?P<student>[^/]+_\d+_assignsubmission_file(_[^/]*)?)/([^/]+_)?(?i:(?P<name>a\d+)\.ipynb)",
        r"(?P<student>[^/]+)/(?i:(?P<name>a\d+)/(?P=name)\.ipynb)",
    )
]
MOODLE = re.compile(r"_\d+_assignsubmission_file(_.*)?$")
LONGEST = 200  # bytes of a student's name; of a file's, systems take 255
MARKS = ["student", "assignment", "cell", "score"]
BY_HAND = "marked by hand"


class CourseError(RuntimeError):
    """The class cannot be graded as asked; the message says what to do."""


@dataclass(frozen=True)
class Submission:
    """A student's notebook for an assignment."""

    student: str
    assignment: str
    path: Path

    def kept(self, output: Path) -> Path:
        """Return the folder for its scores, its log and the notebook as it ran."""
        return output / "graded" / self.student / self.assignment


def _submission(folder: Path, path: Path, names: Collection[str]) -> Submission | None:
    """Return whose notebook lies at `path` in the class's `folder`; None if it is none."""
    below = path.relative_to(folder)
    # A link could lead anywhere, a pipe keep one waiting for ever; hidden files are a system's own,
    # as "._anna_a2.ipynb".
    if (
        path.is_symlink()
        or not path.is_file()
        or any(p.startswith(".") or not p.isprintable() for p in below.parts)
    ):
        return None
    found = next(filter(None, (layout.fullmatch(below.as_posix()) for layout in LAYOUTS)), None)
    if not found or found["name"].lower() not in names:
        return None
    # Systems write one name in two ways: "ö", or "o" and two dots.
    student = unicodedata.normalize("NFC", MOODLE.sub("", found["student"]))
    # A spreadsheet would compute what begins as a formula.
    if not student or student[0] in "=+-@" or len(student.encode()) > LONGEST:
        return None
    return Submission(student, found["name"].lower(), path)


def read_regular(path: Path, largest: int) -> bytes:
    """Return what a file holds.

    Raises:
        OSError: if it cannot be read, or is a link.
        RefusedError: if it is larger than `largest` bytes, or a pipe or another thing that is no
            file.
    """
    # It may have been exchanged since it was found.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise RefusedError("it is no regular file")
        if found.st_size > largest:
            raise RefusedError(f"the file has {found.st_size / 1e6:.0f} MB")
        return file.read(largest)


def collect(folder: Path, names: Collection[str]) -> tuple[list[Submission], list[Path]]:
    """Return the submissions in `folder`, and the files that are none.

    Args:
        folder: nbgrader's layout STUDENT/NAME/NAME.ipynb, or flat: STUDENT_NAME.ipynb; or what
            Moodle's "download all submissions" makes of either. Case does not matter for NAME.
        names: The assignments.

    Raises:
        CourseError: if the folder is missing, or holds no submission, or one twice.
    """
    if not folder.is_dir():
        raise CourseError(f"there is no folder {folder}")
    found: dict[tuple[str, str], Submission] = {}
    paths, others = _files_below(folder)
    for path in paths:
        one = _submission(folder, path, names)
        if one is None:
            others.append(path)
            continue
        first = found.setdefault((one.student, one.assignment), one)
        if first is not one:
            raise CourseError(
                f"{one.assignment} of {one.student} is there twice: {first.path} and {one.path}; "
                "remove one, or give it another name if they are two students"
            )
    if not found:
        raise CourseError(
            f"{folder} holds no submission: neither STUDENT/a2/a2.ipynb nor STUDENT_a2.ipynb"
        )
    return list(found.values()), others


def _files_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return all files and links below `folder`, and the folders that cannot be read."""
    errors: list[OSError] = []
    found = []
    for root, folders, names in os.walk(folder, onerror=errors.append):
        below = [Path(root, name) for name in (*names, *folders)]
        found += [path for path in below if path.is_symlink() or not path.is_dir()]
    return sorted(found), [Path(error.filename) for error in errors]


def read_marks(path: Path) -> pd.DataFrame:
    """Return the marks that a person gave: a row for a cell, with the columns `MARKS`, and comment.

    A file without comments gives empty ones.

    Raises:
        CourseError: if it cannot be read, or has other columns or a score that is no number.
    """
    try:
        # A student may be called None.
        found = pd.read_csv(
            path,
            dtype={"student": str, "comment": str},
            keep_default_na=False,
            na_values={"score": ""},
        )
        marks = found[MARKS].assign(comment=found.get("comment", ""))
        marks["comment"] = marks["comment"].fillna("")  # of a row that ends before it
        marks["score"] = marks["score"].astype(float)
    except (OSError, ValueError, KeyError) as error:
        raise CourseError(
            f"cannot read {path}: {error}; it needs the columns {', '.join(MARKS)}"
        ) from error
    return marks


def give_marks(graded: Mapping[Submission, dict[str, Any]], marks: pd.DataFrame) -> None:
    """Put `marks` into the scores, in place.

    Raises:
        CourseError: if there is no such cell, or the mark is below 0 or above the cell's points.
    """
    cells = {(one.student, one.assignment): scores["cells"] for one, scores in graded.items()}
    for row in marks.itertuples(index=False):
        result = cells.get((row.student, row.assignment), {}).get(row.cell)
        told = f"the mark {row.score:g} for {row.cell} of {row.assignment} of {row.student}"
        if result is None:
            raise CourseError(f"{told}: there is no such cell in this folder")
        if not 0 <= row.score <= result["points"]:
            raise CourseError(f"{told}: the cell has 0 to {result['points']:g} points")
        result.update(score=row.score, reason=BY_HAND, comment=row.comment.strip())
