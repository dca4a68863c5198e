"""The marks that a person gave: read from a table, and put among the scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from advlab.classroom import spreadsheets
from advlab.classroom.submissions import CourseError, Submission

MARKS, COMMENT = ["student", "assignment", "cell", "score"], "comment"
BY_HAND = "marked by hand"


def read_marks(path: Path) -> pd.DataFrame:
    """Return the marks that a person gave: for each cell a row with `MARKS` and `COMMENT`.

    The index is the number of the row in the file. Columns may be in any order and among others,
    separated by commas, semicolons or tabs; scores may have a decimal comma. A file without
    comments gives empty ones.

    Raises:
        CourseError: if it cannot be read, has no such columns, a score that is no number, or two
            scores for one cell.
    """
    try:
        sheet = spreadsheets.read(path)
        found = {name: sheet.column(name) for name in MARKS}
        places = {name: place for name, place in found.items() if place is not None}
        comments = sheet.column(COMMENT)
        if len(places) < len(MARKS):
            raise ValueError(f"it needs the columns {', '.join(MARKS)}")
    except (OSError, ValueError) as error:
        raise CourseError(f"cannot read {path}: {error}") from error
    marks: dict[int, dict[str, Any]] = {}
    first: dict[tuple[str, str, str], int] = {}
    for row, cells in enumerate(sheet.rows[1:], 2):
        if not any(cell.strip() for cell in cells):
            continue
        try:
            given = {name: spreadsheets.plain(cells[place]) for name, place in places.items()}
            score = spreadsheets.number(given["score"])
        except IndexError:
            raise CourseError(f"{path}, row {row}: it has {len(cells)} cells, too few") from None
        except ValueError as error:
            raise CourseError(f"{path}, row {row}: the score {error}") from error
        one = (given["student"], given["assignment"].lower(), given["cell"])
        before = first.setdefault(one, row)
        if before != row and marks[before]["score"] != score:
            raise CourseError(
                f"{path}: rows {before} and {row} give {one[2]} of {one[1]} of {one[0]} two scores"
            )
        told = "" if comments is None else "".join(cells[comments : comments + 1]).strip()
        marks[row] = dict(zip((*MARKS, COMMENT), (*one, score, told), strict=True))
    return pd.DataFrame.from_dict(marks, orient="index", columns=[*MARKS, COMMENT])


def give_marks(graded: Mapping[Submission, dict[str, Any]], marks: pd.DataFrame) -> None:
    """Put `marks` into the scores, in place.

    Raises:
        CourseError: if there is no such cell, or the mark is below 0 or above the cell's points.
    """
    cells = {(one.student, one.assignment): scores["cells"] for one, scores in graded.items()}
    for row in marks.itertuples():
        result = cells.get((row.student, row.assignment), {}).get(row.cell)
        told = (
            f"row {row.Index}: the mark {row.score:g} for {row.cell} of {row.assignment} of "
            f"{row.student}"
        )
        if result is None:
            raise CourseError(f"{told}: there is no such cell in this folder")
        if not 0 <= row.score <= result["points"]:
            raise CourseError(f"{told}: the cell has 0 to {result['points']:g} points")
        result.update(score=row.score, reason=BY_HAND, comment=row.comment)
