"""What a class handed in is found, whichever system it comes from; marks that a person gave."""

import io
import os
import struct
import unicodedata
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from advlab.classroom import RefusedError, archives, submissions
from advlab.classroom.marks import give_marks, read_marks
from advlab.classroom.submissions import CourseError, Person

NAMES = ["a1", "a2", "a3", "a4", "a5", "a6"]
UUID = "550e8400-e29b-41d4-a716-446655440000"
LAID = {  # below the class's folder: whose it is; None for what is left out
    "flat_a1.ipynb": ("flat", "a1"),
    "nested/a2/a2.ipynb": ("nested", "a2"),
    "BEN_A2.ipynb": ("BEN", "a2"),
    "eva/a1/A1.IPYNB": ("eva", "a1"),
    "Jo\u0308rg_a1.ipynb": ("J\u00f6rg", "a1"),  # as macOS writes it
    "Seán O'Brien_a3.ipynb": ("Seán O'Brien", "a3"),
    # Moodle
    "Ada Lovelace_123_assignsubmission_file_a1.ipynb": ("Ada Lovelace", "a1"),
    "Ada Lovelace_456_assignsubmission_file_/mine_a2.ipynb": ("Ada Lovelace", "a2"),
    "Ada Lovelace_789_assignsubmission_file_ada_a3.ipynb": ("Ada Lovelace", "a3"),
    "Anna-Lena Müller_790_assignsubmission_file_/a3/a3.ipynb": ("Anna-Lena Müller", "a3"),
    "Anna-Lena Müller_801_assignsubmission_file/a4.ipynb": ("Anna-Lena Müller", "a4"),
    "a2/Bo_802_assignsubmission_file_/a2.ipynb": ("Bo", "a2"),
    # Canvas
    "doejane_10234_556677_a2.ipynb": ("doejane_10234", "a2"),
    "doejane_LATE_10234_556701_a3.ipynb": ("doejane_10234", "a3"),
    "doejane_10234_556800_my_a4-2.ipynb": ("doejane_10234", "a4"),
    f"doejane_10234_556900_a5-{UUID}.ipynb": ("doejane_10234", "a5"),
    "doejane_10999_556678_a2.ipynb": ("doejane_10999", "a2"),
    "müllerannalena_10300_556679_a2.ipynb": ("müllerannalena_10300", "a2"),
    "doe--jane-late_10400_556680_a2.ipynb": ("doe--jane_10400", "a2"),  # in older versions
    "submissions/roe_10500_556681_a2.ipynb": ("roe_10500", "a2"),
    # GitHub Classroom
    "a2-anna/a2.ipynb": ("anna", "a2"),
    "a2-anna-lena-99/a2.ipynb": ("anna-lena-99", "a2"),
    "a3-anna/a3/a3.ipynb": ("anna", "a3"),
    "a4-submissions/a4-anna/a4.ipynb": ("anna", "a4"),
    # none
    "notes.txt": None,
    "x_a9.ipynb": None,
    "eva/a1/a2.ipynb": None,
    "eva/a2.ipynb": None,
    "a2-anna/README.md": None,
    "a2-anna/a3.ipynb": None,
    ".._a1.ipynb": None,  # a student whose folder would be outside
    "a2-../a2.ipynb": None,
    "m\udcfcller_a1.ipynb": None,  # no UTF-8: Windows puts such names into zips
    "_9_assignsubmission_file_a2.ipynb": None,  # of nobody
    "=1+1_a1.ipynb": None,  # a formula, in a table
    "a\\b_a1.ipynb": None,  # a folder, for Windows
    f"{'x' * 246}_a1.ipynb": None,  # its page would have no name
    # A student decides what lies in their folder, and not whose it is.
    "eva/a2/Ada Lovelace_1_assignsubmission_file_a2.ipynb": None,
    "eva/doejane_10234_999999_a5.ipynb": None,
    "a2-eva/doejane_10234_999999_a6.ipynb": None,
}
SYSTEMS_OWN = [
    "._flat_a1.ipynb",
    ".DS_Store",
    "Thumbs.db",
    "nested/a2/desktop.ini",
    "nested/a2/timestamp.txt",
    "nested/a2/.ipynb_checkpoints/a2-checkpoint.ipynb",
    "__MACOSX/._flat_a1.ipynb",
    "a2-anna/.git/config",
]


def lay(folder, name, content=b"", time=None):
    """Write a file; `time` in seconds."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if time is not None:
        os.utime(path, (time, time))
    return path


def zipped(files, day=1):
    """Return a zip of these contents by name, all of one day."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2026, 3, day, 12, 0, 0)), content)
    return packed.getvalue()


def whose(handed):
    return {(one.student, one.assignment) for one in handed.submissions}


# --- whose it is


def test_what_systems_hand_out_is_found_and_other_files_named(tmp_path):
    for name in (*LAID, *SYSTEMS_OWN):
        lay(tmp_path, name)
    (tmp_path / "link_a1.ipynb").symlink_to("/etc/passwd")
    handed = submissions.collect(tmp_path, NAMES)
    found = {
        one.path.relative_to(tmp_path).as_posix(): (one.student, one.assignment)
        for one in handed.submissions
    }
    assert found == {name: one for name, one in LAID.items() if one}
    left_out = {name for name, one in LAID.items() if not one} | {"link_a1.ipynb"}
    assert set(handed.left_out) == {submissions.printable(name) for name in left_out}


def test_numbers_and_lateness_are_kept(tmp_path):
    for name in LAID:
        lay(tmp_path, name)
    handed = submissions.collect(tmp_path, NAMES)
    found = {(one.student, one.assignment): one for one in handed.submissions}
    assert found["Ada Lovelace", "a1"].number == "123"
    assert found["Ada Lovelace", "a2"].number == "456"
    assert found["doejane_10234", "a2"].number == "10234"
    assert {key for key, one in found.items() if one.late} == {
        ("doejane_10234", "a3"),
        ("doe--jane_10400", "a2"),
    }
    assert "a3: late, says Canvas: doejane_10234" in handed.notes


def test_names_that_canvas_hides_are_refused(tmp_path):
    lay(tmp_path, "anna_a1.ipynb")
    lay(tmp_path, "anon_Ab3dE_556677_a2.ipynb")
    handed = submissions.collect(tmp_path, NAMES)
    assert whose(handed) == {("anna", "a1")}
    assert handed.left_out == [
        "anon_Ab3dE_556677_a2.ipynb: Canvas hid whose it is; download it again with the names shown"
    ]


def test_a_student_who_takes_another_name_stays_one_in_canvas(tmp_path):
    lay(tmp_path, "doejane_7_100_a1.ipynb")
    lay(tmp_path, "roejane_7_200_a2.ipynb")
    handed = submissions.collect(tmp_path, NAMES)
    assert whose(handed) == {("roejane_7", "a1"), ("roejane_7", "a2")}


NAMESAKES = ["Kim Lee_11_assignsubmission_file_/a1.ipynb"]
NAMESAKES += [f"Kim Lee_{n}_assignsubmission_file_/a2.ipynb" for n in (21, 22)]


def test_students_of_one_name_are_never_taken_for_one(tmp_path):
    for name in (*NAMESAKES, "Bo_23_assignsubmission_file_/a2.ipynb"):
        lay(tmp_path, name)
    handed = submissions.collect(tmp_path, NAMES)
    apart = {("Kim Lee_11", "a1"), ("Kim Lee_21", "a2"), ("Kim Lee_22", "a2"), ("Bo", "a2")}
    assert whose(handed) == apart
    assert [note for note in handed.notes if "several students are called Kim Lee" in note]


def test_worksheets_tell_students_of_one_name_apart(tmp_path):
    for name in NAMESAKES[:2]:  # they never handed in the same assignment
        lay(tmp_path, name)
    people = {"11": "kim1@uni.edu", "21": "kim2@uni.edu", "22": "kim1@uni.edu"}
    people = {number: Person("Kim Lee", email, True) for number, email in people.items()}
    handed = submissions.collect(tmp_path, NAMES, people)
    assert whose(handed) == {("Kim Lee (kim1@uni.edu)", "a1"), ("Kim Lee (kim2@uni.edu)", "a2")}
    assert not handed.notes


# --- one student twice


@pytest.mark.parametrize(
    ("older", "newest"),
    [
        ("doejane_7_100_a2.ipynb", "doejane_7_200_a2-1.ipynb"),
        ("doejane_7_100_a2-9.ipynb", "doejane_7_200_a2-10.ipynb"),
        ("doejane_7_100_a2-1.ipynb", "doejane_7_100_a2-2.ipynb"),
        ("doejane_7_10000000000000001_a2.ipynb", "doejane_7_10000000000000002_a2.ipynb"),
        ("doejane_7_100_a2-7.ipynb", f"doejane_LATE_7_200_a2-{UUID}.ipynb"),
        ("anna_a2.ipynb", "a2-anna/a2.ipynb"),
        ("anna/a2/a2.ipynb", "anna_a2.zip"),
    ],
)
def test_the_newest_counts_and_all_are_named(older, newest, tmp_path):
    content = zipped({"a2/a2.ipynb": b""})
    # The file's time says nothing where Canvas's numbers do.
    canvas = older.startswith("doejane")
    lay(tmp_path, older, time=3e9 if canvas else 1e9)
    lay(tmp_path, newest, content, time=2e9)
    handed = submissions.collect(tmp_path, NAMES)
    assert [one.path for one in handed.submissions] == [tmp_path / newest]
    told = handed.notes[0]
    assert "is there 2 times" in told
    assert older in told
    assert told.endswith(f"the newest is graded: {newest}")


def test_where_the_newest_cannot_be_told_nobody_guesses(tmp_path):
    lay(tmp_path, "ben_a1.ipynb")
    for name in ("anna_a2.ipynb", "anna/a2/a2.ipynb"):
        lay(tmp_path, name, time=1e9)
    handed = submissions.collect(tmp_path, NAMES)
    assert whose(handed) == {("ben", "a1")}
    assert len(handed.left_out) == 2
    assert "which is the newest cannot be told" in handed.left_out[0]


def test_a_folder_in_which_nothing_can_be_graded_is_refused(tmp_path):
    for name in ("anna_a2.ipynb", "anna/a2/a2.ipynb"):
        lay(tmp_path, name, time=1e9)
    with pytest.raises(CourseError, match="which is the newest cannot be told"):
        submissions.collect(tmp_path, NAMES)


def test_the_best_counts_if_that_is_asked(tmp_path):
    for n, time in enumerate((3e9, 1e9, 2e9)):
        lay(tmp_path, f"{n}.zip", zipped({"anna_a2.ipynb": str(n).encode()}, day=3 - n), time)
    lay(tmp_path, "ben_a2.ipynb")
    handed = submissions.collect(tmp_path, NAMES, newest=False)
    assert handed.notes == [
        "a2 of anna is there 3 times: 0.zip/anna_a2.ipynb, 1.zip/anna_a2.ipynb, "
        "2.zip/anna_a2.ipynb; the best counts"
    ]
    ben, *anna = sorted(handed.submissions, key=lambda one: one.attempt)
    assert [one.read(1) for one in anna] == [b"2", b"1", b"0"]
    kept = [one.kept(tmp_path).name for one in (ben, *anna)]
    assert kept == ["a2", "a2-1", "a2-2", "a2-3"]

    def score(*points, again=False):
        cells = {f"c{i}": {"score": n} for i, n in enumerate(points)}
        return {"cells": cells, "again": again}

    graded = dict(zip(anna, [score(1, None), score(2, 3), score(5, 0)], strict=True))
    assert list(submissions.best(graded | {ben: score(0)})) == [anna[1], ben]
    graded[anna[2]] = score(None, None, again=True)
    assert list(submissions.best(graded)) == [anna[2]], "it may be the best"


def test_nbgraders_timestamp_says_when(tmp_path):
    lay(tmp_path, "anna/a2/a2.ipynb", time=2e9)
    lay(tmp_path, "anna/a2/timestamp.txt", b"2026-03-01 10:30:00.123456 UTC\n")
    lay(tmp_path, "ben/a2/a2.ipynb", time=2e9)
    lay(tmp_path, "ben/a2/timestamp.txt", b"yesterday")
    lay(tmp_path, "eva_7_1_a2.ipynb", time=2e9)
    handed = submissions.collect(tmp_path, NAMES)
    found = {one.student: one for one in handed.submissions}
    assert found["anna"].time == datetime(2026, 3, 1, 10, 30, 0, 123456, UTC)
    assert found["anna"].stamped
    assert found["ben"].time.timestamp() == 2e9
    assert not found["ben"].stamped
    assert found["eva_7"].time is None, "the file has the time of the download"


# --- zips

CLASSES = {
    "Canvas": ["doejane_10234_556677_a2.ipynb", "müller_LATE_2_3_a2.ipynb"],
    "Moodle": ["Anna Müller_123_assignsubmission_file_/a2.ipynb"],
    "GitHub": ["a2-submissions/a2-anna/a2.ipynb", "a2-submissions/a2-b-c/a2.ipynb"],
    "nbgrader": ["submitted/anna/a2/a2.ipynb", "submitted/ben/a2/a2.ipynb"],
    "flat": ["anna_a2.ipynb", "ben_a2.ipynb"],
    "a folder": ["my class/anna_a2.ipynb", "my class/ben_a2.ipynb"],
}


@pytest.mark.parametrize("system", CLASSES)
def test_zips_of_a_class_are_read(system, tmp_path):
    files = {name: name.encode() for name in CLASSES[system]}
    notes = next(iter(files)).rpartition("/")[0] + "/notes.txt"
    lay(tmp_path, "CS101-a2-4711.zip", zipped({**files, "__MACOSX/x": b"", notes.strip("/"): b""}))
    handed = submissions.collect(tmp_path, NAMES)
    assert {one.read(1_000) for one in handed.submissions} == set(files.values())
    assert [line.rpartition("/")[2] for line in handed.left_out] == ["notes.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["CS101-a2-4711.zip"]


@pytest.mark.parametrize(
    "name",
    [
        "doejane_10234_556677_a2.zip",
        "doejane_10234_556677_My Homework.zip",
        "Anna_1_assignsubmission_file_/Abgabe.zip",
        "Anna_1_assignsubmission_file_a2.zip",
        "a2-anna/a2.zip",
        "anna/a2/a2.zip",
        "anna_A2.ZIP",
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_zips_that_students_hand_in_are_read(name, packed, tmp_path):
    own = {"__MACOSX/a2/._a2.ipynb": b"", "a2/notes.txt": b"", "a2/A2.ipynb": b"mine"}
    if packed:
        lay(tmp_path, "class.zip", zipped({name: zipped(own)}))
    else:
        lay(tmp_path, name, zipped(own))
    handed = submissions.collect(tmp_path, NAMES)
    assert [(one.assignment, one.read(10)) for one in handed.submissions] == [("a2", b"mine")]
    assert not handed.left_out
    with pytest.raises(RefusedError, match="the file has"):
        handed.submissions[0].read(3)


def test_members_of_a_zip_have_times_of_their_own(tmp_path):
    lay(tmp_path, "old.zip", zipped({"anna_a2.ipynb": b"old"}, day=1), time=3e9)
    lay(tmp_path, "new.zip", zipped({"anna_a2.ipynb": b"new"}, day=2), time=1e9)
    handed = submissions.collect(tmp_path, NAMES)
    assert [one.read(10) for one in handed.submissions] == [b"new"]


def encrypted(content):
    """Set the flag of the one member."""
    at = content.index(b"PK\x01\x02") + 8
    return content[:6] + b"\x01\x00" + content[8:at] + b"\x01\x00" + content[at + 2 :]


def named_in(content, raw):
    """Put raw bytes in place of XXXX in the names."""
    return content.replace(b"XXXX", raw)


def listing(n):
    """Return a zip that says its list of members has n bytes."""
    content = zipped({"a2.ipynb": b""})
    at = content.index(b"PK\x05\x06") + 12
    return content[:at] + struct.pack("<L", n) + content[at + 4 :]


def link():
    info = zipfile.ZipInfo("a2.ipynb")
    info.external_attr = 0o120777 << 16
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    return packed.getvalue()


def rare(how):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", how) as archive:
        archive.writestr("a2.ipynb", b"x")
    return packed.getvalue()


def twice():
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a2.ipynb", b"1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a2.ipynb", b"2")
    return packed.getvalue()


BAD = {  # a student's zip: why it is left out
    "no zip": (lambda: b"PK\x03\x04 but no more", "its end is missing"),
    "empty": (lambda: b"", "its end is missing"),
    "damaged": (lambda: listing(7), "cannot be read as a zip"),
    "list before it": (lambda: listing(9_000), "cannot be read as a zip"),
    "none": (lambda: zipped({"a3.ipynb": b""}), "holds no a2.ipynb"),
    "several": (lambda: zipped({"a2.ipynb": b"", "old/a2.ipynb": b""}), "several notebooks"),
    "outside": (lambda: zipped({"../../a2.ipynb": b""}), "leads out of the zip"),
    "absolute": (lambda: zipped({"/tmp/a2.ipynb": b""}), "leads out of the zip"),
    "windows": (lambda: zipped({"x\\..\\y/a2.ipynb": b""}), "leads out of the zip"),
    "link": (link, "holds no a2.ipynb"),
    "list": (lambda: listing(99_000_000), "lists too many files"),
    "twice": (twice, "several notebooks"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_zip_is_named_and_stops_nobody(what, packed, tmp_path):
    make, told = BAD[what]
    lay(tmp_path, "good_a2.ipynb")
    if packed:
        lay(tmp_path, "class.zip", zipped({"bad_a2.zip": make()}))
    else:
        lay(tmp_path, "bad_a2.zip", make())
    handed = submissions.collect(tmp_path, NAMES)
    assert whose(handed) == {("good", "a2")}
    assert len(handed.left_out) == 1
    assert "bad_a2.zip: " in handed.left_out[0]
    assert told in handed.left_out[0]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (encrypted(zipped({"a2.ipynb": b"x"})), "encrypted"),
        (zipped({"a2.ipynb": b"x" * 99})[20:], "cannot be read as a zip"),
        (rare(zipfile.ZIP_LZMA), "packed in a rare way"),
        (zipped({"a2.ipynb": b"\0" * 2_000_000}), "the file has 2 MB"),
    ],
)
def test_what_cannot_be_taken_out_of_a_zip_is_refused_when_it_is_read(content, told, tmp_path):
    lay(tmp_path, "anna_a2.zip", content)
    (one,) = submissions.collect(tmp_path, NAMES).submissions
    with pytest.raises(RefusedError, match=told):
        one.read(1_000_000)


def test_a_bad_zip_of_the_class_is_named_and_stops_nobody(tmp_path):
    lay(tmp_path, "good_a2.ipynb")
    lay(tmp_path, "damaged.zip", zipped({"anna_a2.ipynb": b""})[:-30])
    outside = {"../anna_a2.ipynb": b"", "ben_a2.ipynb": b"", "more.zip": zipped({})}
    lay(tmp_path, "outside.zip", zipped(outside))
    handed = submissions.collect(tmp_path, NAMES)
    assert whose(handed) == {("good", "a2"), ("ben", "a2")}
    assert [line.partition(":")[0] for line in handed.left_out] == [
        "damaged.zip",
        "outside.zip/../anna_a2.ipynb",
        "outside.zip/more.zip",
    ]


def test_a_name_in_a_zip_is_never_guessed(tmp_path):
    content = zipped({"XXXX_a2.ipynb": b"mac", "good_a2.ipynb": b""})
    lay(tmp_path, "mac.zip", named_in(content, "Jör".encode()))  # UTF-8 that does not say so
    content = zipped({"XXXX_a2.ipynb": b"old"})
    lay(tmp_path, "windows.zip", named_in(content, "J\x94rg".encode("latin-1")))  # in code page 850
    handed = submissions.collect(tmp_path, NAMES)
    assert whose(handed) == {("Jör", "a2"), ("good", "a2")}
    assert "its name is in an unknown encoding" in handed.left_out[0]
    assert handed.submissions[0].read(10) == b"mac"


def test_a_zip_that_lists_more_than_memory_holds_is_not_opened(monkeypatch):
    large = io.BytesIO(listing(1 << 31))
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(RefusedError, match="too many"), archives.opened(large):
        pass


# --- what is no file


def test_what_is_no_file_is_left_out_and_never_waited_for(tmp_path):
    lay(tmp_path, "one_a1.ipynb", b"x" * 11)
    pipe, link = tmp_path / "pipe_a1.ipynb", tmp_path / "link_a1.ipynb"
    os.mkfifo(pipe)
    link.symlink_to("one_a1.ipynb")
    handed = submissions.collect(tmp_path, NAMES)
    assert whose(handed) == {("one", "a1")}
    assert set(handed.left_out) == {pipe.name, link.name}
    # One may become the other after it was found.
    with pytest.raises(RefusedError, match="no regular file"):
        submissions.read_regular(pipe, 10)
    with pytest.raises(OSError, match="symbolic links"):
        submissions.read_regular(link, 10)
    with pytest.raises(RefusedError, match="the file has 0 MB"):
        submissions.read_regular(tmp_path / "one_a1.ipynb", 10)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    lay(tmp_path, "anna_a1.ipynb")
    (tmp_path / "lea" / "a1").mkdir(parents=True)
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "lea":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    handed = submissions.collect(tmp_path, NAMES)
    assert whose(handed) == {("anna", "a1")}
    assert handed.left_out == ["lea"]


def test_a_folder_that_holds_nothing_is_refused(tmp_path):
    with pytest.raises(CourseError, match="holds no submission"):
        submissions.collect(tmp_path, NAMES)
    with pytest.raises(CourseError, match="there is no folder"):
        submissions.collect(tmp_path / "none", NAMES)


# --- marks

HEAD = "student,assignment,cell,score\n"


def marked(path):
    """Give the marks in a file to a class of one; return the score."""
    scores = {"cells": {"x": {"points": 4}}}
    one = submissions.Submission("Jörg", "a1", path)
    give_marks({one: scores}, read_marks(path))
    return scores["cells"]["x"].get("score")


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "Jörg,a1,x,3.5",
        HEAD + 'Jörg,a1,x,"3,5"',
        "student;assignment;cell;score\r\nJörg;a1;x;3,5\r\n;;;\r\n",
        "student\tassignment\tcell\tscore\nJörg\ta1\tx\t3,50",
        "Cell, Score ,STUDENT,Remark,Assignment\nx, 3.5 , Jörg ,good, A1 ",
        unicodedata.normalize("NFD", HEAD + "Jörg,a1,x,3.5"),
        "\ufeff" + HEAD + "Jörg,a1,x,3.5\nJörg,A1,x,3.50\n",
    ],
)
def test_marks_are_read_as_spreadsheets_write_them(text, tmp_path):
    (tmp_path / "marks.csv").write_text(text, encoding="utf-8", newline="")
    assert marked(tmp_path / "marks.csv") == 3.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("student,cell\none,x", "it needs the columns student, assignment, cell, score"),
        ("student,Student,assignment,cell,score\n", "the column 'student' is there 2 times"),
        ("", "its first line is empty"),
        (HEAD + "Jörg,a1,x,good", "row 2: the score 'good' is no number"),
        (HEAD + "Jörg,a1,x,nan", "row 2: the score 'nan' is no number"),
        (HEAD + "Jörg,a1,x,", "row 2: the score '' is no number"),
        (HEAD + 'Jörg,a1,x,"1,000"', "row 2: .* may be thousands or decimals"),
        (HEAD + "\nJörg,a1,x,9", "row 3: the mark 9 for x of .*: the cell has 0 to 4"),
        (HEAD + "Jörg,a1,x,-1", "row 2: the mark -1 for x of .*: the cell has 0 to 4"),
        (HEAD + "Jörg,a1,y,1", "row 2: the mark 1 for y of a1 of Jörg: there is no"),
        (HEAD + "Jörg,a1", "row 2: it has 2 cells, too few"),
        (HEAD + "Jörg,a1,x,1\nJörg,A1,x,2", "rows 2 and 3 give x of a1 of Jörg two scores"),
        (HEAD + '"Jörg,a1,x,1', "it is no CSV"),
    ],
)
def test_marks_without_a_place_are_refused(text, message, tmp_path):
    (tmp_path / "marks.csv").write_text(text, encoding="utf-8")
    with pytest.raises(CourseError, match=message):
        marked(tmp_path / "marks.csv")


def test_marks_in_another_encoding_are_refused(tmp_path):
    (tmp_path / "marks.csv").write_text(HEAD + "Jörg,a1,x,1", encoding="latin-1")
    with pytest.raises(CourseError, match="not in UTF-8"):
        marked(tmp_path / "marks.csv")
