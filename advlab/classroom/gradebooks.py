"""Grades as other systems take them: a table of totals, and Canvas's and Moodle's own files.

Canvas: the file of Grades > Export; `lib/gradebook_exporter.rb` and `lib/gradebook_importer.rb` of
instructure/canvas-lms say what is in it and how it is read back. Moodle: an assignment's grading
worksheet; `mod/assign/gradingtable.php` writes it, and `importgradeslib.php` in
`mod/assign/feedback/offline` of moodle/moodle reads it. Both are filled in where a grade is
complete, and are else as they came.
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

PARTICIPANT = re.compile(r"(\D+)(\d+)")  # "Participant 701", in any language
NO = {"no", "nein", "non", "não", "nee", "nej", "nei", "nie", "ne", "нет"}
# When something was done, or that it was not: the words differ, the numbers do not.
TIME = re.compile(r"-|(?=.*\b\d{4}\b).*\b\d{1,2} ?[:.h] ?\d{2}\b.*")
HALF_DAY = re.compile(r"\d ?([ap])\.? ?m\b")
MONTHS = {
    word: number
    for language in (
        "january february march april may june july august september october november december",
        "januar februar märz april mai juni juli august september oktober november dezember",
        "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
        "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
        "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre "
        "dicembre",
        "janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro",
        "januari februari maart april mei juni juli augustus september oktober november december",
    )
    for number, word in enumerate(language.split(), 1)
}
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
        name: Place of the column with the students' names, or of another that tells who they are.
        email, submitted: Places of their addresses, and of when they handed in; None without.
    """

    path: Path
    system: str
    sheet: Sheet
    columns: list[Column]
    name: int
    email: int | None = None
    submitted: int | None = None


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
    id_, section = sheet.column("id"), sheet.column("section")
    if id_ is not None and section is not None:
        columns = _canvas_columns(sheet, id_, section, points)
        name = sheet.column("student", "lastname") or 0
        return Gradebook(path, "canvas", sheet, columns, name)
    participants = _participants(sheet)
    if not participants:
        raise ValueError(
            "it is neither a gradebook exported from Canvas (columns ID, Section) nor a grading "
            "worksheet of Moodle (whose first column says Participant 701, in any language)"
        )
    named = _named(path.stem, points)
    if len(named) != 1:
        told = " and ".join(named) or "no assignment"
        raise ValueError(f"its name says {told}; rename it, such as worksheet-a2.csv")
    return _worksheet(path, sheet, participants, named[0], points[named[0]])


def _participants(sheet: Sheet) -> dict[str, int]:
    """Return the rows of Moodle's participants, by number; none if there is any other row."""
    rows = {i: PARTICIPANT.fullmatch(plain(row[0])) for i, row in enumerate(sheet.rows) if row}
    del rows[0]  # the headings
    words = {one and one[1] for one in rows.values()}
    return {one[2]: i for i, one in rows.items() if one} if len(words) == 1 else {}


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


def _worksheet(
    path: Path, sheet: Sheet, numbers: dict[str, int], name: str, points: float
) -> Gradebook:
    """Return Moodle's grading worksheet for the assignment `name`, which has `points`.

    Moodle writes headings in the language of whoever exports it, so columns are known by what is in
    them, and by their order: the participant, name and address (unless they are hidden), status,
    grade, maximum grade, whether the grade can be changed, when it was handed in, and when graded.
    """
    cells = list(zip(*(sheet.rows[i] for i in numbers.values()), strict=True))
    full = [place for place in range(3, len(cells)) if _all_are(points, cells[place])]
    # All may have that grade, too, which stands before it.
    if not full or full[-1] - full[0] > 1:
        raise ValueError(
            f"{'several columns say' if full else 'no column says'} {points:g} for each "
            f"participant, as the maximum grade must, which {name} has; set it to {points:g} in "
            "Moodle, and export the worksheet anew"
        )
    highest = full[-1]
    locked = {}
    for i in numbers.values():
        said = sheet.rows[i][highest + 1 : highest + 3]  # a state of marking may stand between
        if not NO.isdisjoint(plain(cell).lower() for cell in said):
            locked[i] = "has a grade that Moodle has locked"
    comma = any("," in cell for cell in cells[highest])
    who = range(2, highest - 1)
    emails = [place for place in who if any(cells[place]) and _all_hold("@", cells[place])]
    times = [
        place
        for place in range(highest + 1, len(cells))
        if all(TIME.fullmatch(" ".join(cell.split())) for cell in cells[place])
    ]
    return Gradebook(
        path,
        "moodle",
        sheet,
        [Column(name, highest - 1, numbers, locked, comma)],
        name=1 if who else 0,
        email=emails[0] if emails else None,
        # Without a file to hand in, there is but the time of grading.
        submitted=times[0] if len(times) > 1 else None,
    )


def _all_hold(sign: str, cells: Collection[str]) -> bool:
    return all(sign in cell for cell in cells if cell)


def _all_are(number: float, cells: Collection[str]) -> bool:
    try:
        return all(spreadsheets.number(cell) == number for cell in cells)
    except ValueError:
        return False


def people(books: Collection[Gradebook]) -> dict[str, Person]:
    """Return who Moodle's participants are, by number."""
    found = {}
    for book in books:
        if book.system == "moodle" and book.name:
            rows = {number: book.sheet.rows[i] for number, i in book.columns[0].numbers.items()}
            often = Counter(plain(row[book.name]) for row in rows.values())
            for number, row in rows.items():
                name = plain(row[book.name])
                address = "" if book.email is None else row[book.email].strip()
                found[number] = Person(name, address, often[name] > 1)
    return found


def times(books: Collection[Gradebook]) -> dict[tuple[str, str], datetime]:
    """Return when Moodle's participants handed in, by assignment and number, without time zone."""
    found = {}
    for book in books:
        if book.submitted is not None:
            column = book.columns[0]
            for number, i in column.numbers.items():
                if time := _time(book.sheet.rows[i][book.submitted]):
                    found[column.assignment, number] = time
    return found


def _time(text: str) -> datetime | None:
    """Return the time that Moodle wrote, in one of the languages of `MONTHS`; None if it is none.

    All write the day before the year, and both before the time: "Monday, 5 October 2026, 11:58 PM",
    "October 5, 2026", "5. Oktober 2026, 23:58", "5 de octubre de 2026, 23:58".
    """
    text = " ".join(plain(text).lower().split())  # some spaces are narrow
    numbers = [int(digits) for digits in re.findall(r"\d+", text)]
    months = [MONTHS[word] for word in re.findall(r"[^\W\d_]+", text) if word in MONTHS]
    half = HALF_DAY.search(text)
    with suppress(ValueError):
        day, year, hour, minute = numbers
        (month,) = months
        if half:
            hour = hour % 12 + (12 if half[1] == "p" else 0)
        return datetime(year, month, day, hour, minute)
    return None


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
            rows[i][book.name] for number, i in column.numbers.items() if number not in known
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
