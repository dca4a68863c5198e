"""Grades as other systems take them: a table of totals, and Canvas's and Moodle's own files.

Canvas: the file of Grades > Export; `lib/gradebook_exporter.rb` and `lib/gradebook_importer.rb` of
instructure/canvas-lms say what is in it and how it is read back. Moodle: an assignment's grading
worksheet; `mod/assign/feedback/offline/importgradeslib.php` and `locallib.php` of moodle/moodle.
Both are filled in where a grade is complete, and are else as they came.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from advlab import files
from advlab.classroom import spreadsheets, statistics
from advlab.classroom.lateness import Late
from advlab.classroom.spreadsheets import Sheet, plain
from advlab.classroom.submissions import CourseError, Person, Submission, printable

PARTICIPANT = re.compile(r"\D*(\d+)")
# What Moodle writes in English, and what it wrote in older versions.
MOODLE_TIMES = ("%A, %d %B %Y, %I:%M %p", "%A, %B %d, %Y, %I:%M %p")
SEVERAL = 5  # names in a printed line


@dataclass(frozen=True)
class Column:
    """Where an assignment's grades stand.

    Args:
        assignment: Such as "a2".
        place: Of the column.
        numbers: Rows of the sheet, by the number of the student or participant.
        locked: Of these, the rows that no grade may be written into, with the reason.
        comma: Whether numbers have a decimal comma.
    """

    assignment: str
    place: int
    numbers: dict[str, int]
    locked: dict[int, str]
    comma: bool


@dataclass(frozen=True)
class Gradebook:
    """A file of another system's that is to be filled in.

    Args:
        path: Where it came from.
        system: "canvas" or "moodle".
        sheet: What it holds.
        columns: One for each assignment in it.
    """

    path: Path
    system: str
    sheet: Sheet
    columns: list[Column]


def read(paths: Collection[Path], points: Mapping[str, float]) -> list[Gradebook]:
    """Read files exported from Canvas or Moodle; their columns tell which.

    Args:
        paths: The files. The name of Moodle's, and the titles of Canvas's columns, must hold the
            name of the assignment, such as a2.
        points: Of each assignment.

    Raises:
        CourseError: for a file that is neither, or says nothing of our assignments or other points
            than they have; or if two have one name or one assignment.
    """
    books = []
    for path in paths:
        try:
            books.append(_read(path, points))
        except (OSError, ValueError) as error:
            raise CourseError(f"cannot read the gradebook {path}: {error}") from error
    names = Counter(book.path.name for book in books)
    names.update(
        f"{column.assignment} in {book.system}" for book in books for column in book.columns
    )
    if twice := [name for name, n in names.items() if n > 1]:
        raise CourseError(f"two gradebooks are for {twice[0]}, or called that; give one of them")
    return books


def _read(path: Path, points: Mapping[str, float]) -> Gradebook:
    sheet = spreadsheets.read(path)
    if any(len(row) != len(sheet.rows[0]) for row in sheet.rows if row):
        raise ValueError("its rows have not all as many cells as the first")
    identifier, grade = sheet.column("identifier"), sheet.column("grade")
    if identifier is not None and grade is not None:
        named = _named(path.stem, points)
        if len(named) != 1:
            told = " and ".join(named) or "no assignment"
            raise ValueError(f"its name says {told}; rename it, such as worksheet-a2.csv")
        column = _moodle_column(sheet, identifier, grade, named[0], points)
        return Gradebook(path, "moodle", sheet, [column])
    id_, section = sheet.column("id"), sheet.column("section")
    if id_ is not None and section is not None:
        return Gradebook(path, "canvas", sheet, _canvas_columns(sheet, id_, section, points))
    raise ValueError(
        "it is neither a gradebook exported from Canvas (columns ID, Section) nor a grading "
        "worksheet of Moodle in English (columns Identifier, Grade)"
    )


def _named(text: str, points: Mapping[str, float]) -> list[str]:
    """Return the assignments that a title names."""
    words = {word.lower() for word in re.findall(r"[^\W_]+", text)}
    return [name for name in points if name in words]


def _check_points(given: str, title: str, name: str, points: Mapping[str, float]) -> None:
    if given.strip() and spreadsheets.number(given) != points[name]:
        raise ValueError(
            f"{title!r} has {given.strip()} points, and {name} {points[name]:g}; set that right "
            "where the file comes from, and export it anew, or take the column out"
        )


def _canvas_columns(
    sheet: Sheet, id_: int, section: int, points: Mapping[str, float]
) -> list[Column]:
    header = sheet.rows[0]
    possible = next(
        (row for row in sheet.rows if row and row[0].strip() == "Points Possible"), None
    )
    numbers = {
        row[id_].strip(): i
        for i, row in enumerate(sheet.rows)
        if i and row and row[id_].strip().isdecimal()
    }
    columns: dict[str, Column] = {}
    for place in range(section + 1, len(header)):
        title = re.fullmatch(r"(.*) \(\d+\)", plain(header[place]))
        named = _named(title[1], points) if title else []
        if len(named) != 1:
            continue
        name = named[0]
        if name in columns:
            first = header[columns[name].place]
            raise ValueError(f"{first!r} and {header[place]!r} are both for {name}; remove one")
        if possible:
            _check_points(possible[place], header[place], name, points)
        said = {i: sheet.rows[i][place].strip() for i in numbers.values()}
        reasons = {"EX": "is excused", "N/A": "need not hand it in"}
        locked = {i: reasons[text.upper()] for i, text in said.items() if text.upper() in reasons}
        columns[name] = Column(name, place, numbers, locked, sheet.separator == ";")
    if not columns:
        raise ValueError("no column is named after an assignment, such as “a2 (12345)”")
    return list(columns.values())


def _moodle_column(
    sheet: Sheet, identifier: int, grade: int, name: str, points: Mapping[str, float]
) -> Column:
    highest, change = sheet.column("maximum grade"), sheet.column("grade can be changed")
    numbers, locked, comma = {}, {}, False
    for i, row in enumerate(sheet.rows):
        found = PARTICIPANT.fullmatch(row[identifier].strip()) if i and row else None
        if not found:
            continue
        numbers[found[1]] = i
        if highest is not None:
            _check_points(row[highest], sheet.rows[0][grade], name, points)
            comma = comma or "," in row[highest]
        if change is not None and row[change].strip().lower() == "no":
            locked[i] = "has a grade that Moodle has locked"
    return Column(name, grade, numbers, locked, comma)


def people(books: Collection[Gradebook]) -> dict[str, Person]:
    """Return who Moodle's participants are, by number."""
    found = {}
    for book in books:
        name, email = book.sheet.column("full name"), book.sheet.column("email address")
        if book.system == "moodle" and name is not None:
            rows = {number: book.sheet.rows[i] for number, i in book.columns[0].numbers.items()}
            often = Counter(plain(row[name]) for row in rows.values())
            for number, row in rows.items():
                address = "" if email is None else row[email].strip()
                found[number] = Person(plain(row[name]), address, often[plain(row[name])] > 1)
    return found


def times(books: Collection[Gradebook]) -> dict[tuple[str, str], datetime]:
    """Return when Moodle's participants handed in, by assignment and number, without time zone."""
    found = {}
    for book in books:
        place = book.sheet.column("last modified (submission)")
        if book.system == "moodle" and place is not None:
            column = book.columns[0]
            for number, i in column.numbers.items():
                text = " ".join(book.sheet.rows[i][place].split())  # some spaces are narrow
                for form in MOODLE_TIMES:
                    with suppress(ValueError):
                        found[column.assignment, number] = datetime.strptime(text, form)
    return found


def write(
    books: Collection[Gradebook],
    graded: Mapping[Submission, dict[str, Any]],
    late: Mapping[Submission, Late],
    output: Path,
    console: Console,
) -> None:
    """Write totals.csv and the filled gradebooks into `output`; print what is not in them."""
    points = earned(graded, late)
    statistics.write(totals(points, late), output / "totals.csv")
    for one, judged in late.items():
        if judged.share is None:
            line = f"{one.assignment} of {one.student}: {judged.reason}"
            console.print(line, style="yellow", markup=False)
    for book in books:
        written, notes = fill(book, points, output)
        console.print(f"filled in: {written}", markup=False)
        for line in notes:
            console.print(line, style="yellow", markup=False)


def earned(
    graded: Mapping[Submission, dict[str, Any]], late: Mapping[Submission, Late]
) -> dict[Submission, float | None]:
    """Return the points of each submission after what being late took off.

    None where a cell is still to be read, or where it cannot be known how late it was.
    """
    found: dict[Submission, float | None] = {}
    for one, scores in graded.items():
        cells = [result["score"] for result in scores["cells"].values()]
        share = late[one].share if one in late else 1.0
        found[one] = None if None in cells or share is None else round(sum(cells) * share, 2)
    return found


def totals(
    points: Mapping[Submission, float | None], late: Mapping[Submission, Late]
) -> pd.DataFrame:
    """Return a row for each student.

    Columns are student, each assignment (empty where nothing was handed in, or its points are not
    known yet), what being late did to it if it may, and total (empty if one is not known).
    """
    rows: dict[str, dict[str, Any]] = {}
    names = sorted({one.assignment for one in points}, key=lambda name: int(name[1:]))
    judged = {one.assignment for one in points if one in late or one.late}
    columns = [c for name in names for c in (name, *([f"{name} late"] if name in judged else []))]
    for one, number in points.items():
        row = rows.setdefault(one.student, {"student": one.student})
        row[one.assignment] = number
        said = "late, says Canvas" if one.late else ""
        row[f"{one.assignment} late"] = late[one].reason if one in late else said
    for row in rows.values():
        known = [row[name] for name in names if name in row]
        row["total"] = None if None in known else round(sum(known), 2)
    table = pd.DataFrame(rows.values(), columns=["student", *columns, "total"])
    return table.sort_values("student", kind="stable")


def fill(
    book: Gradebook, points: Mapping[Submission, float | None], output: Path
) -> tuple[Path, list[str]]:
    """Write a gradebook with the grades that are complete; the rest of it stays as it was.

    Args:
        book: The gradebook.
        points: See `earned`.
        output: Gets gradebooks/NAME.

    Returns:
        The file, and lines on who stands in one place and not in the other.

    Raises:
        CourseError: if it would be written over the file that it came from.
        OSError: if it cannot be written.
    """
    written = output / "gradebooks" / book.path.name
    if written.exists() and written.samefile(book.path):
        raise CourseError(f"{book.path} is written by this command; give the file as exported")
    rows = [list(row) for row in book.sheet.rows]
    shown = book.sheet.column("full name", "student", "lastname") or 0
    notes = []
    for column in book.columns:
        own = {one: n for one, n in points.items() if one.assignment == column.assignment}
        known = {one.number: (one, n) for one, n in own.items() if one.system == book.system}
        told: dict[str, list[str]] = {}
        for number, (one, earned_) in known.items():
            i = column.numbers.get(number)
            if i is None:
                told.setdefault("not in it", []).append(one.student)
            elif i in column.locked:
                told.setdefault(column.locked[i], []).append(one.student)
            elif earned_ is None:
                told.setdefault("not complete yet, left as it was", []).append(one.student)
            else:
                text = f"{earned_:g}"
                rows[i][column.place] = text.replace(".", ",") if column.comma else text
        told["from elsewhere, without a number"] = [
            one.student for one in own if one.system != book.system
        ]
        told["nothing is graded of"] = [
            rows[i][shown] for number, i in column.numbers.items() if number not in known
        ]
        notes += [
            f"{book.path.name}, {column.assignment}: {what}: {_some(names)}"
            for what, names in told.items()
            if names
        ]
    filled = Sheet(rows, book.sheet.separator, book.sheet.newline, book.sheet.mark)
    files.write_bytes(written, filled.content())
    return written, notes


def _some(names: Sequence[str]) -> str:
    shown = "; ".join(printable(name) for name in names[:SEVERAL])
    return shown + (f" and {len(names) - SEVERAL} more" if len(names) > SEVERAL else "")
