"""What a class handed in: whose notebook lies where."""

import io
import os
import re
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from advlab.classroom import RefusedError, archives

# Where a notebook may lie in the class's folder or zip, by system. A student decides what stands
# behind their own name, so the first system that fits decides.
#
# Canvas: NAME_USER_ATTACHMENT_FILE, or NAME_LATE_USER_... (`lib/content_zipper.rb` of
# instructure/canvas-lms). Moodle: NAME_PARTICIPANT_assignsubmission_file_, before the file or as
# its folder (`mod/assign/classes/downloader.php` of moodle/moodle); its number of a participant is
# another one in each assignment.
ROOT = r"(?:(?:a\d+(?:-submissions)?|submissions)/)?"
LAYOUTS = {
    system: re.compile(layout, re.IGNORECASE)
    for system, layout in {
        "moodle": ROOT + r"(?P<student>[^/]+?)_(?P<number>\d{1,20})_assignsubmission_file"
        r"(?:_|(?:_[^/]*)?/(?:.+/)?)(?P<file>[^/]+)",
        "canvas": ROOT + r"(?P<student>[^/]+?)(?P<late>[_-]late)?_(?P<number>\d{1,20})_"
        r"(?P<attachment>\d{1,20})_(?P<file>[^/]+)",
        "github": ROOT + r"(?P<name>a\d+)-(?P<student>(?!submissions/)[^/]+)/(?:(?P=name)/)?"
        r"(?P<file>(?P=name)\.(?:ipynb|zip))",
        "nbgrader": r"(?P<student>[^/]+)/(?P<name>a\d+)/(?P<file>(?P=name)\.(?:ipynb|zip))",
        "flat": r"(?P<student>[^/]+)_(?P<file>a\d+\.(?:ipynb|zip))",
    }.items()
}
# Canvas adds a number to a name that a student hands in again, and a UUID after the seventh.
NAMED = re.compile(
    r"(?:.+_)?(?P<name>a\d+)(?:-(?:(?P<again>\d{1,9})|[\da-f]{8}(?:-[\da-f]{4}){3}-[\da-f]{12}))?"
    r"\.(?:ipynb|zip)",
    re.IGNORECASE,
)
ANONYMOUS = re.compile(r"anon_[^_]+_\d+")  # before the file's name, where Canvas hides names
CLASS_ZIP = re.compile(ROOT + r"[^/]+\.zip", re.IGNORECASE)
SYSTEM_FILES = {".ds_store", "desktop.ini", "thumbs.db", "timestamp.txt"}
SYSTEM_FOLDERS = {".ipynb_checkpoints", "__macosx", ".git"}
LONGEST = 200  # bytes of a student's name; of a file's, systems take 255
LARGEST_ZIP = 100_000_000  # bytes of a student's zip in the class's


class CourseError(RuntimeError):
    """The class cannot be graded as asked; the message says what to do."""


@dataclass(frozen=True)
class Submission:
    """A student's notebook for an assignment.

    Args:
        student: The same in all assignments.
        assignment: Such as "a2".
        path: Of the notebook, or of a zip.
        members: What to open in that zip; the last is the notebook.
        system: A key of `LAYOUTS`.
        number: Of the student in Canvas, or of the participant in Moodle; "" elsewhere.
        late: Whether Canvas says so.
        order: Of several of one student, the largest is the newest; empty if that is not known.
        attempt: Of several that are graded, which one it is, from 1; 0 for one alone.
        time: When it was handed in; None if nothing says so.
        stamped: Whether nbgrader wrote that time down; else it is the file's.
    """

    student: str
    assignment: str
    path: Path
    members: tuple[str, ...] = ()
    system: str = "flat"
    number: str = ""
    late: bool = False
    order: tuple[float, ...] = ()
    attempt: int = 0
    time: datetime | None = None
    stamped: bool = False

    def kept(self, output: Path) -> Path:
        """Return the folder for its scores, its log and the notebook as it ran."""
        attempt = f"-{self.attempt}" if self.attempt else ""
        return output / "graded" / self.student / f"{self.assignment}{attempt}"

    def read(self, largest: int) -> bytes:
        """Return the notebook's file.

        Raises:
            OSError: if it cannot be read, or is a link.
            RefusedError: if it is larger than `largest` bytes, no file, or its zip is damaged.
        """
        return _read(self.path, self.members, largest)


@dataclass(frozen=True)
class Person:
    """Who a participant of Moodle is, by a grading worksheet.

    Args:
        name: Full name.
        email: Address, or "" if Moodle hides it.
        shared: Whether another participant has the same name.
    """

    name: str
    email: str
    shared: bool


@dataclass
class Handed:
    """What was found.

    Args:
        submissions: One for each student and assignment, or all of them (see `collect`).
        left_out: What is no submission, a line each, with the reason if there is one to tell.
        notes: Lines on submissions that were there more than once, and on students of one name.
    """

    submissions: list[Submission] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _File:
    """A file of the class's, in its folder or in a zip there.

    Args:
        shown: Path below the folder, through the zip.
        name: Path below the folder, or in the zip: what tells whose it is.
        path: Where it, or the zip, is on disk.
        members: Of the zip.
        time: When it was last changed; None if a zip holds no such time.
    """

    shown: str
    name: str
    path: Path
    members: tuple[str, ...]
    time: datetime | None


# --- reading


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a file.

    Raises:
        OSError: if it cannot be read, or is a link.
        RefusedError: if it is a pipe or another thing that is no file.
    """
    # It may have been exchanged since it was found.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise RefusedError("it is no regular file")
        yield file


def read_regular(path: Path, largest: int) -> bytes:
    """Return what a file holds.

    Raises:
        OSError: if it cannot be read, or is a link.
        RefusedError: if it is larger than `largest` bytes, or a pipe or another thing that is no
            file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise RefusedError(f"the file has {size / 1e6:.0f} MB")
        return file.read(largest)


@contextmanager
def _open(path: Path, members: tuple[str, ...]) -> Iterator[BinaryIO]:
    if members:
        yield io.BytesIO(_read(path, members, LARGEST_ZIP))
    else:
        with open_regular(path) as file:
            yield file


def _read(path: Path, members: tuple[str, ...], largest: int) -> bytes:
    if not members:
        return read_regular(path, largest)
    with _open(path, members[:-1]) as file, archives.opened(file) as archive:
        return archives.read(archive, members[-1], largest)


# --- finding


def collect(
    folder: Path,
    names: Collection[str],
    people: Mapping[str, Person] | None = None,
    *,
    newest: bool = True,
) -> Handed:
    """Return the submissions in `folder`, and what else is there.

    Args:
        folder: nbgrader's layout STUDENT/NAME/NAME.ipynb; flat: STUDENT_NAME.ipynb; what Canvas or
            Moodle let one download, or the repositories of GitHub Classroom; zips of these. A
            student's notebook may be in a zip, too. Case does not matter for NAME.
        names: The assignments.
        people: By their numbers, who Moodle's participants are: tells apart who share a name.
        newest: Of what a student handed in for an assignment, keep the newest alone. That is the
            last upload to Canvas; elsewhere the last by nbgrader's timestamp, or else by the time
            of the file.

    Raises:
        CourseError: if the folder is missing, or holds no submission.
    """
    if not folder.is_dir():
        raise CourseError(f"there is no folder {folder}")
    handed = Handed()
    shown = _all_submissions(folder, names, handed)
    found = list(shown)
    apart = dict(zip(found, _told_apart(_renamed(found), people or {}, handed.notes), strict=True))
    same = defaultdict(list)
    for one, told in apart.items():
        same[told.student, told.assignment].append(one)
    for several in same.values():
        if len(several) == 1:
            handed.submissions.append(apart[several[0]])
        elif newest:
            handed.submissions += [apart[one] for one in _newest(several, shown, handed)]
        else:
            handed.submissions += [
                replace(apart[one], attempt=n) for n, one in enumerate(_sorted(several), 1)
            ]
            handed.notes.append(f"{_told(several, shown)}; the best counts")
    if not handed.submissions:
        left_out = f". Left out: {'; '.join(handed.left_out[:5])}" if handed.left_out else ""
        raise CourseError(
            f"{folder} holds no submission: neither STUDENT/a2/a2.ipynb nor STUDENT_a2.ipynb, nor "
            f"what Canvas, Moodle or GitHub Classroom let one download{left_out}"
        )
    for name in names:
        own = [one for one in handed.submissions if one.assignment == name]
        if late := [one.student for one in own if one.late]:
            handed.notes.append(f"{name}: late, says Canvas: {', '.join(late)}")
    return handed


def _all_submissions(folder: Path, names: Collection[str], handed: Handed) -> dict[Submission, str]:
    """Return all submissions below `folder`, each with its path to show; name what is none."""
    files = _all_files(folder, handed)
    stamps = {
        (one.path if one.members else None, one.name): one for one in files if _is_stamp(one.name)
    }
    shown = {}
    for file in files:
        if _is_systems(file.name):
            continue
        reason = ""
        try:
            one = _submission(file, names, stamps)
        except (RefusedError, OSError) as error:
            one, reason = None, f": {error}"
        if one is None:
            handed.left_out.append(printable(file.shown) + reason)
        else:
            shown[one] = printable(file.shown)
    return shown


def printable(text: str) -> str:
    """Return a name as it can be printed."""
    return text if text.isprintable() else ascii(text)


def _is_stamp(name: str) -> bool:
    return name.rpartition("/")[2] == "timestamp.txt"


def _is_systems(name: str) -> bool:
    """Tell whether a system put this file there, and not a person."""
    *folders, last = name.lower().split("/")
    return last in SYSTEM_FILES or last.startswith("._") or not SYSTEM_FOLDERS.isdisjoint(folders)


def _all_files(folder: Path, handed: Handed) -> list[_File]:
    """Return all files below `folder`, and those in the class's zips; name what is no file."""
    found = []
    paths, unreadable = _files_below(folder)
    for path in (*unreadable, *paths):
        name = path.relative_to(folder).as_posix()
        try:
            # A link could lead anywhere, a pipe keep one waiting for ever.
            state = path.lstat()
            if not stat.S_ISREG(state.st_mode):
                handed.left_out.append(printable(name))
                continue
            time = datetime.fromtimestamp(state.st_mtime).astimezone()
            file = _File(name, name, path, (), time)
            if CLASS_ZIP.fullmatch(name) and _whose(name) is None and not _is_systems(name):
                found += _unpacked(file, handed)
            else:
                found.append(file)
        except (ValueError, OverflowError, OSError) as error:  # a time in the year 10000, too
            handed.left_out.append(f"{printable(name)}: {error}")
    return found


def _files_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return all files and links below `folder`, and the folders that cannot be read."""
    errors: list[OSError] = []
    found = []
    for root, folders, names in os.walk(folder, onerror=errors.append):
        folders[:] = [name for name in folders if name.lower() not in SYSTEM_FOLDERS]
        found += [Path(root, name) for name in names]
        for path in (Path(root, name) for name in folders):
            with suppress(PermissionError):  # the walk comes there, and says so
                found += [path] if path.is_symlink() else []
    return sorted(found), [Path(error.filename) for error in errors]


def _unpacked(file: _File, handed: Handed) -> list[_File]:
    """Return the files in a zip of the class's."""
    with _open(file.path, ()) as opened, archives.opened(opened) as archive:
        members = [one for one in archives.members(archive) if not _is_systems(one.name)]
        stamps = [one for one in archives.members(archive) if _is_stamp(one.name)]
    # Who packs a folder has its name before all others.
    first = {one.name.partition("/")[0] + "/" for one in members}
    wrapped = len(first) == 1 and not any(_whose(one.name) for one in members)
    cut = len(first.pop()) if wrapped else 0
    found = []
    for one in (*members, *stamps):
        shown = f"{file.shown}/{one.name}"
        if one.fault or not one.known:
            fault = one.fault or "its name is in an unknown encoding; unpack the zip"
            handed.left_out.append(f"{printable(shown)}: {fault}")
            continue
        time = None
        with suppress(ValueError, OverflowError):  # a day that no month has
            time = datetime(*one.date).astimezone()
        found.append(_File(shown, one.name[cut:], file.path, (one.raw,), time))
    return found


def _whose(name: str) -> tuple[str, re.Match[str]] | None:
    """Return the system that gave a path its name, and what that says; None for none."""
    for system, layout in LAYOUTS.items():
        if found := layout.fullmatch(name):
            return system, found
    return None


def _submission(
    file: _File, names: Collection[str], stamps: Mapping[tuple[Path | None, str], _File]
) -> Submission | None:
    """Return what was handed in as `file`; None if nothing was.

    Raises:
        OSError: if it is a zip that cannot be read.
        RefusedError: if it is a zip, and damaged or without exactly one notebook; or if Canvas hid
            whose it is.
    """
    # Hidden files are a system's own.
    if any(part.startswith(".") or not part.isprintable() for part in file.name.split("/")):
        return None
    if not (known := _whose(file.name)):
        return None
    system, found = known
    said = found.groupdict()
    number = said.get("number") or ""
    # Systems write one name in two ways: "ö", or "o" and two dots.
    student = unicodedata.normalize("NFC", said["student"]).strip()
    if system == "canvas":  # without its number, it may be another's name
        student += f"_{number}"
    if system == "flat" and ANONYMOUS.fullmatch(student):
        raise RefusedError("Canvas hid whose it is; download it again with the names shown")
    named = NAMED.fullmatch(said["file"])
    assignment = named["name"].lower() if named else ""
    is_zip = said["file"].lower().endswith(".zip")
    unnamed_zip = is_zip and not named and system in ("canvas", "moodle")
    if not _is_fit(student) or not (assignment in names or unnamed_zip):
        return None
    members = file.members
    if is_zip:
        member, assignment = _notebook_in(file, [assignment] if assignment else names)
        members = (*members, member)
    again = int(named["again"] or 0) if named else 0
    stamp = _stamped(file, stamps) if system == "nbgrader" else None
    time = stamp or file.time
    order: tuple[float, ...] = () if time is None else (time.timestamp(),)
    if system == "canvas":
        order = (int(said["attachment"]), again)  # each upload has a larger number
    return Submission(
        student,
        assignment,
        file.path,
        members,
        system=system,
        number=number,
        late=bool(said.get("late")),
        order=order,
        # The others' files have the time of the download, or of the copy.
        time=time if system in ("nbgrader", "flat") else None,
        stamped=stamp is not None,
    )


def _is_fit(student: str) -> bool:
    """Tell whether a name can be that of a folder and stand in a table."""
    return (
        bool(student)
        and student[0] not in "=+-@."  # a spreadsheet would compute what begins as a formula
        and not {"/", "\\"} & set(student)
        and "_assignsubmission_" not in student
        and len(student.encode()) <= LONGEST
    )


def _stamped(file: _File, stamps: Mapping[tuple[Path | None, str], _File]) -> datetime | None:
    """Return when a submission was handed in, as nbgrader wrote it beside; None if it did not."""
    where = file.path if file.members else None
    stamp = stamps.get((where, file.name.rpartition("/")[0] + "/timestamp.txt"))
    if stamp is None:
        return None
    with suppress(ValueError, OverflowError, OSError):
        text = _read(stamp.path, stamp.members, 1_000).decode().strip()
        time = datetime.fromisoformat(text.removesuffix(" UTC"))
        return time if time.tzinfo else time.replace(tzinfo=UTC)  # as nbgrader takes it
    return None


def _notebook_in(file: _File, names: Collection[str]) -> tuple[str, str]:
    """Return the one notebook in a student's zip, and which of the assignments it is of.

    Raises:
        OSError: if it cannot be read.
        RefusedError: if it is damaged, or holds none or several.
    """
    with _open(file.path, file.members) as opened, archives.opened(opened) as archive:
        found = []
        for one in archives.members(archive):
            last = one.name.rpartition("/")[2]
            named = NAMED.fullmatch(last)
            if not named or last.lower().endswith(".zip") or _is_systems(one.name):
                continue
            if named["name"].lower() in names:
                found.append((one, named["name"].lower()))
    if not found:
        raise RefusedError(f"the zip holds no {' or '.join(f'{name}.ipynb' for name in names)}")
    if len(found) > 1:
        first, second = (ascii(one.name) for one, _ in found[:2])
        raise RefusedError(
            f"the zip holds several notebooks, {first} and {second}; leave one in. If it is the "
            "class's, give it a name without _a2"
        )
    (member, assignment) = found[0]
    if member.fault:
        raise RefusedError(f"{member.name!a} in the zip is refused: {member.fault}")
    return member.raw, assignment


def _renamed(found: Sequence[Submission]) -> list[Submission]:
    """Return the same submissions, with one name for each of Canvas's students: the latest."""
    names = {}
    for one in sorted(found, key=lambda one: one.order):
        if one.system == "canvas":
            names[one.number] = one.student
    return [
        replace(one, student=names[one.number]) if one.system == "canvas" else one for one in found
    ]


def _told_apart(
    found: Sequence[Submission], people: Mapping[str, Person], notes: list[str]
) -> list[Submission]:
    """Return the same submissions with another name for each of Moodle's students who share one.

    Their numbers tell two of them apart in one assignment, and only their addresses in all.
    """
    numbers = defaultdict(set)
    persons: dict[Submission, Person | None] = {}
    for one in found:
        if one.system == "moodle":
            numbers[one.student, one.assignment].add(one.number)
            persons[one] = people.get(one.number)
    shared = {student for (student, _), several in numbers.items() if len(several) > 1}
    shared |= {one.student for one, person in persons.items() if person and person.shared}
    told, unknown = [], defaultdict(list)
    for one in found:
        if one in persons and one.student in shared:
            person = persons[one]
            student = f"{one.student} ({person.email})" if person and person.email else ""
            if not _is_fit(student):
                student = f"{one.student}_{one.number}"
                unknown[one.student].append(f"{student} ({one.assignment})")
            one = replace(one, student=student)
        told.append(one)
    notes += [
        f"several students are called {student}, and Moodle's numbers are other ones in each "
        f"assignment: {', '.join(names)} may be one student or several; to know, give each "
        "assignment's grading worksheet with --gradebook"
        for student, names in unknown.items()
    ]
    return told


def _sorted(several: Sequence[Submission]) -> list[Submission]:
    """Return what a student handed in for an assignment, the newest last if that is known."""
    return sorted(several, key=lambda one: (one.order, one.path, one.members))


def _told(several: Sequence[Submission], shown: Mapping[Submission, str]) -> str:
    one, places = several[0], ", ".join(shown[one] for one in several)
    return f"{one.assignment} of {one.student} is there {len(several)} times: {places}"


def _newest(
    several: Sequence[Submission], shown: Mapping[Submission, str], handed: Handed
) -> list[Submission]:
    """Return the newest of what a student handed in for an assignment; none if none is."""
    *_, second, last = _sorted(several)
    mixed = len({one.system == "canvas" for one in several}) > 1
    if mixed or not all(one.order for one in several) or second.order == last.order:
        handed.left_out += [
            f"{shown[one]}: which is the newest cannot be told; remove the others, or give them "
            "another name if they are two students"
            for one in several
        ]
        handed.notes.append(f"{_told(several, shown)}; none is graded")
        return []
    handed.notes.append(f"{_told(several, shown)}; the newest is graded: {shown[last]}")
    return [last]


def best(graded: Mapping[Submission, dict[str, Any]]) -> dict[Submission, dict[str, Any]]:
    """Return the scores of each student's best submission for an assignment.

    What a person must read counts nothing yet, and of equal ones the first is kept. One that must
    be graded again may be the best, and is kept, too.
    """
    same = defaultdict(list)
    for one in graded:
        same[one.student, one.assignment].append(one)

    def rank(one: Submission) -> tuple[bool, float, int]:
        cells = graded[one]["cells"].values()
        return graded[one]["again"], sum(cell["score"] or 0 for cell in cells), -one.attempt

    return {one: graded[one] for several in same.values() for one in [max(several, key=rank)]}
