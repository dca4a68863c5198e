"""Late work, totals, and the gradebooks of Canvas and Moodle that are filled in."""

import csv
import re
import subprocess
import sys
from contextlib import nullcontext
from datetime import datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from advlab import files
from advlab.classroom import gradebooks, lateness
from advlab.classroom.lateness import Late
from advlab.classroom.submissions import CourseError, Person, Submission
from advlab.cli import app

NAMES = ["a1", "a2", "a3", "a4", "a5", "a6"]
POINTS = dict(zip(NAMES, (20, 25, 20, 25, 24, 25), strict=True))
HERE = Path("x.ipynb")

# --- late work

DUE = datetime.fromisoformat("2026-10-05T23:59:00+02:00")
POLICY = """
percent_per_day = 10
free_days = 2
cutoff_days = 5
[due]
A1 = 2026-10-05T23:59:00+02:00
a2 = 2026-10-19T23:59:00+02:00
[extensions.a1]
"Jo\u0308rg" = 2026-10-08T23:59:00+02:00
[submitted.a2]
lea = 2026-10-20T10:00:00+02:00
"""


def policy(folder, text=POLICY):
    (folder / "due.toml").write_text(text, encoding="utf-8")
    return lateness.read(folder / "due.toml", NAMES)


def handed(student, days, name="a1", **how):
    """A submission that came so many days after the assignment was due."""
    due = DUE + timedelta(days=14 * (name == "a2"))
    time = None if days is None else due + timedelta(days=days)
    return Submission(student, name, HERE, time=time, **how)


@pytest.mark.parametrize(
    ("student", "days", "share", "told"),
    [
        ("anna", -1, 1.0, ""),
        ("anna", 0, 1.0, ""),
        ("anna", 0.001, 1.0, "1 day late by the time of the file, 1 of them free: 0 % off"),
        ("anna", 3.5, 0.8, "4 days late by the time of the file, 2 of them free: 20 % off"),
        ("anna", 5.0, 0.7, "30 % off"),
        ("anna", 5.1, 0.0, "6 days late by the time of the file, more than 5 days: no points"),
        ("Jörg", 3.0, 1.0, ""),
        ("Jörg", 6.0, 0.9, "3 days late"),
    ],
)
def test_late_days_cost_what_the_policy_says(student, days, share, told, tmp_path):
    one = handed(student, days)
    judged = lateness.judge([one], policy(tmp_path))[one]
    assert judged.share == pytest.approx(share)
    assert told in judged.reason
    assert bool(told) == bool(judged.reason)


@pytest.mark.parametrize(("per", "share"), [("term", 0.9), ("assignment", 1.0)])
def test_free_days_are_of_a_term_or_of_an_assignment(per, share, tmp_path):
    second, first = own = [handed("anna", 1.5, "a2"), handed("anna", 0.5)]
    judged = lateness.judge(own, policy(tmp_path, f'per = "{per}"\n{POLICY}'))
    assert judged[first].share == 1.0, "it was due first"
    assert judged[second].share == pytest.approx(share)


def test_the_policy_in_the_guide_can_be_used(tmp_path):
    guide = files.home() / "notebooks" / "assignments" / "README.md"
    (text,) = re.findall(r"```toml\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    found = policy(tmp_path, text)
    assert (found.percent_per_day, found.free_days, found.cutoff_days) == (10, 3, 7)
    assert found.extensions["a2"]["Anna Müller"] > found.due["a2"]


def test_what_is_not_due_is_never_late(tmp_path):
    assert lateness.judge([handed("anna", 9, "a3")], policy(tmp_path)) == {}


MOODLE_TIME = {("a1", "7"): (DUE + timedelta(days=4)).replace(tzinfo=None)}


@pytest.mark.parametrize(
    ("one", "share", "told"),
    [
        (handed("x", None, system="canvas"), 1.0, ""),
        (handed("x", None, system="canvas", late=True), None, "Canvas says late, and not by how"),
        (handed("x", None, system="moodle"), None, "put the time into [submitted.a1]"),
        (handed("x", None, system="github"), None, "nothing says when it came"),
        (handed("x", None, system="moodle", number="7"), 0.8, "4 days late by Moodle's worksheet"),
        (handed("x", 3, system="nbgrader", stamped=True), 0.9, "late by nbgrader's timestamp"),
        (handed("lea", None, "a2", system="github"), 1.0, "1 day late by the course's record"),
    ],
)
def test_a_time_that_nothing_says_is_never_guessed(one, share, told, tmp_path):
    judged = lateness.judge([one], policy(tmp_path), MOODLE_TIME)[one]
    assert judged.share == (share if share is None else pytest.approx(share))
    assert told in judged.reason


def test_free_days_are_unknown_after_a_time_that_is(tmp_path):
    own = [handed("x", None, system="github"), handed("x", 1, "a2"), handed("x", 9, "a2")]
    first, second, third = (lateness.judge([own[0], one], policy(tmp_path)).get(one) for one in own)
    assert first.share is None
    assert second == Late(
        None, "1 day late by the time of the file; how many free days were left cannot be known"
    )
    assert third.share == 0, "it is too late in any case"
    without = policy(tmp_path, POLICY.replace("free_days = 2", "free_days = 0"))
    assert lateness.judge(own[:2], without)[own[1]].share == pytest.approx(0.9)


def test_a_name_in_the_policy_that_nobody_has_is_told(tmp_path):
    found = policy(tmp_path)
    assert lateness.strangers([handed("Jörg", 1), handed("Lea", 1, "a2")], found) == [
        "submitted.a2: nobody called 'lea' handed in a2"
    ]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("percent_per_day = 10", "", "it says nothing of 'percent_per_day'"),
        ("= 10", "= 110", "percent_per_day is 110"),
        ("= 10", '= "10"', "percent_per_day is '10'"),
        ("free_days = 2", "free_days = 1.5", "free_days is 1.5; it is a whole number"),
        ("free_days = 2", "free_days = -1", "free_days is -1"),
        ("free_days", "freedays", "there is no 'freedays'; there are due, percent_per_day"),
        ("free_days = 2", 'per = "week"', "per is 'week'"),
        ("A1 =", "a7 =", "due: 'a7' is none of a1, a2"),
        ("a2 = 2026-10-19T23:59:00+02:00", "a2 = 2026-10-19T23:59:00", "due: a2 is .* time zone"),
        ("a2 = 2026-10-19T23:59:00+02:00", "a2 = 2026-10-19", "due: a2 is .* time zone"),
        ("extensions.a1", "extensions.a3", "extensions: 'a3' is none of a1, a2"),
        ("[extensions.a1]", "[extensions]", "extensions: '.*' is none of a1, a2"),
        ("[extensions.a1]", "[extensions]\na1 = 3\n[submitted.a1]", "extensions.a1 is 3; .* table"),
        ("[due]", "[due", "cannot read .*due.toml"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(old, new, told, tmp_path):
    assert old in POLICY
    with pytest.raises(CourseError, match=told):
        policy(tmp_path, POLICY.replace(old, new))


# --- totals


def scores(*values, points=10):
    cells = {f"c{i}": {"points": points, "score": v, "reason": ""} for i, v in enumerate(values)}
    return {"reason": "", "cells": cells, "seconds": 0.1, "seed": 1, "again": False}


def test_totals_are_empty_where_something_is_not_known():
    graded = {
        Submission("Jörg", "a1", HERE): scores(10, 5),
        Submission("Jörg", "a2", HERE): scores(7),
        Submission("anna", "a2", HERE): scores(7, None),
        Submission("ben", "a10", HERE): scores(4),
        Submission("ben", "a2", HERE): scores(9),
    }
    first, second, _, _, last = graded
    late = {
        first: Late(0.9, "1 day late"),
        second: Late(1.0, ""),
        last: Late(None, "nothing says when"),
    }
    table = gradebooks.totals(gradebooks.earned(graded, late), late).set_index("student")
    columns = ["a1", "a1 late", "a2", "a2 late", "a10", "total"]
    assert list(table.columns) == columns
    assert table.index.tolist() == ["Jörg", "anna", "ben"]
    assert table.loc["Jörg", ["a1", "a1 late", "a2", "total"]].tolist() == [
        13.5,
        "1 day late",
        7,
        20.5,
    ]
    assert table.loc["anna", ["a2", "total"]].isna().all()
    assert table.loc["ben", ["a2", "total"]].isna().all()
    assert table.loc["ben", "a2 late"] == "nothing says when"
    assert table.loc["ben", "a10"] == 4


# --- gradebooks

# As `lib/gradebook_exporter.rb` of Canvas writes it.
CANVAS = """\
Student,ID,SIS User ID,SIS Login ID,Section,FGSM by hand: a2 (111),A3 (112),Essay (113),a2 and a3 \
(114),Current Score,Final Score
,,,,,,Manual Posting,,,,
    Points Possible,,,,,25.00,20.00,10.00,45.00,(read only),(read only)
"O'Brien, Seán",10234,S1,sean,"A, morning",,,,,,
"Müller, ""Lena"" Anna-Lena",10235,S2,lena,A,3.00,EX,,,,
"Doe, Jane",10236,S3,jane,A,,N/A,,,,
"=Student, Test",99,,f00,A,,,7.00,,,
"""
# As `mod/assign/gradingtable.php` of Moodle writes it.
MOODLE = """\
Identifier,Full name,Email address,Status,Grade,Maximum Grade,Grade can be changed,Last modified \
(submission),Last modified (grade),Feedback comments\r
Participant 701,Seán O'Brien,sean@uni.edu,Submitted for grading,,25.00,Yes,"Monday, 5 October \
2026, 11:58 PM",-,"<p>Well, ""done""</p>\r
<p>Twice</p>"\r
Participant 702,Kim Lee,kim1@uni.edu,Submitted for grading,3.00,25.00,Yes,"Tuesday, October 6, \
2026, 12:05\u202fAM",-,\r
Participant 703,Kim Lee,kim2@uni.edu,No submission,,25.00,No,-,-,\r
"""
# The same as its language packs have it, without addresses, and with what some courses show.
GERMAN = """\
ID,Vollständiger Name,Matrikelnummer,Status,Bewertung,Bestwertung,Status im Bewertungsworkflow,\
Bewertung kann geändert werden,Zuletzt geändert (Abgabe),Zuletzt geändert (Bewertung),\
Feedback als Kommentar\r
Teilnehmer/in701,Seán O'Brien,25,Zur Bewertung abgegeben,,"25,00",Nicht bewertet,Ja,"Montag, 5. \
Oktober 2026, 23:58",-,\r
Teilnehmer/in702,Kim Lee,,Zur Bewertung abgegeben,"3,00","25,00",Nicht bewertet,Ja,"Dienstag, 6. \
Oktober 2026, 00:05",-,Nein\r
Teilnehmer/in703,Kim Lee,26,Keine Abgabe,,"25,00",Nicht bewertet,Nein,-,-,\r
"""
SPANISH = """\
Identificador,Nombre completo,Dirección de correo,Estado,Calificación,Calificación máxima,La \
calificación puede ser cambiada,Última modificación (entrega),Última modificación \
(calificación),Comentarios de retroalimentación\r
Participante 701,Seán O'Brien,sean@uni.edu,Enviado para calificar,,"25,00",Sí,"lunes, 5 de \
octubre de 2026, 23:58",-,"<p>Bien, 25</p>"\r
Participante 702,Kim Lee,kim1@uni.edu,Enviado para calificar,"3,00","25,00",Sí,"martes, 6 de \
octubre de 2026, 00:05","martes, 6 de octubre de 2026, 10:05",\r
Participante 703,Kim Lee,kim2@uni.edu,No entregado,,"25,00",No,-,-,\r
"""


def written(folder, name, text, encoding="utf-8"):
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def canvas(number, name="a2"):
    return Submission(f"s_{number}", name, HERE, system="canvas", number=str(number))


def moodle(number, name="a2"):
    return Submission(f"S {number}", name, HERE, system="moodle", number=str(number))


def filled(path, points, output):
    """Fill a gradebook; return its cells, and what was told."""
    (book,) = gradebooks.read([path], POINTS)
    made, notes = gradebooks.fill(book, points, output)
    with made.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file, delimiter=book.sheet.separator)), notes


def test_canvas_gradebook_is_filled_and_else_as_it_was(tmp_path):
    path = written(tmp_path, "Grades-CS101.csv", CANVAS, "utf-8-sig")
    points = {
        canvas(10234): 22.5,
        canvas(10235): None,  # to be read
        canvas(777): 1.0,
        canvas(10234, "a3"): 20.0,
        canvas(10235, "a3"): 9.0,
        canvas(10236, "a3"): 8.0,
        canvas(10234, "a1"): 5.0,
        moodle(10236): 4.0,
    }
    rows, notes = filled(path, points, tmp_path / "out")
    expected = list(csv.reader(CANVAS.splitlines()))
    expected[3][5:7] = ["22.5", "20"]
    assert rows == expected
    content = (tmp_path / "out" / "gradebooks" / path.name).read_bytes()
    assert content.startswith(b"\xef\xbb\xbf")
    assert b"\r" not in content
    assert '"Müller, ""Lena"" Anna-Lena"' in content.decode()
    assert path.read_bytes() == CANVAS.encode("utf-8-sig")
    assert notes == [
        "Grades-CS101.csv, a2: not complete yet, left as it was: s_10235",
        "Grades-CS101.csv, a2: not in it: s_777",
        "Grades-CS101.csv, a2: from elsewhere, without a number: S 10236",
        "Grades-CS101.csv, a2: nothing is graded of: Doe, Jane; =Student, Test",
        "Grades-CS101.csv, a3: is excused: s_10235",
        "Grades-CS101.csv, a3: need not hand it in: s_10236",
        "Grades-CS101.csv, a3: nothing is graded of: =Student, Test",
    ]


def test_canvas_gradebook_with_semicolons_has_decimal_commas(tmp_path):
    text = (
        "LastName;FirstName;ID;SIS Login ID;Section;a2 (111)\n"
        "    Points Possible;;;;;25,00\nDoe;Jane;7;jane;A;\n"
    )
    rows, _ = filled(written(tmp_path, "g.csv", text), {canvas(7): 22.5}, tmp_path / "out")
    assert rows[2] == ["Doe", "Jane", "7", "jane", "A", "22,5"]


@pytest.mark.parametrize(
    ("text", "grade", "email"),
    [(MOODLE, "22.5", "kim1@uni.edu"), (GERMAN, "22,5", ""), (SPANISH, "22,5", "kim1@uni.edu")],
    ids=["English", "German", "Spanish"],
)
def test_moodle_worksheet_is_filled_and_else_as_it_was(text, grade, email, tmp_path):
    path = written(tmp_path, "Grades-CS101-a2-4711.csv", text)
    points = {moodle(701): 22.5, moodle(703): 1.0, moodle(9): 1.0, moodle(702, "a3"): 1.0}
    rows, notes = filled(path, points, tmp_path / "out")
    expected = list(csv.reader(text.splitlines(keepends=True)))
    expected[1][4] = grade
    assert rows == expected
    assert notes == [
        "Grades-CS101-a2-4711.csv, a2: has a grade that Moodle has locked: S 703",
        "Grades-CS101-a2-4711.csv, a2: not in it: S 9",
        "Grades-CS101-a2-4711.csv, a2: nothing is graded of: Kim Lee",
    ]
    (book,) = gradebooks.read([path], POINTS)
    people = gradebooks.people([book])
    assert people["702"] == Person("Kim Lee", email, True)
    assert not people["701"].shared
    assert gradebooks.times([book]) == {
        ("a2", "701"): datetime(2026, 10, 5, 23, 58),
        ("a2", "702"): datetime(2026, 10, 6, 0, 5),
    }


def test_moodle_worksheet_with_decimal_commas_is_filled_with_them(tmp_path):
    comma = written(tmp_path, "a2.csv", MOODLE.replace("25.00", '"25,00"'))
    rows, _ = filled(comma, {moodle(701): 22.5}, tmp_path / "out")
    assert rows[1][4] == "22,5"


FULL_MARKS = """\
ID,Status,Bewertung,Bestwertung,Bewertung kann geändert werden,Zuletzt geändert (Bewertung)
Teilnehmer/in1,Zur Bewertung abgegeben,25,25,Ja,"Montag, 5. Oktober 2026, 23:58"
Teilnehmer/in2,Zur Bewertung abgegeben,25,25,Ja,"Montag, 5. Oktober 2026, 23:59"
"""


def test_where_names_are_hidden_and_all_have_full_marks(tmp_path):
    path = written(tmp_path, "a2.csv", FULL_MARKS)
    rows, notes = filled(path, {moodle(1): 3.5}, tmp_path / "out")
    assert [row[2:4] for row in rows[1:]] == [["3.5", "25"], ["25", "25"]]
    assert notes == ["a2.csv, a2: nothing is graded of: Teilnehmer/in2"]
    books = gradebooks.read([path], POINTS)
    assert gradebooks.people(books) == {}
    assert gradebooks.times(books) == {}, "when it was graded is not when it was handed in"


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("jeudi 1 août 2030, 09:07", datetime(2030, 8, 1, 9, 7)),
        ("lundi 31 décembre 2029 à 12h00", datetime(2029, 12, 31, 12, 0)),
        ("sexta-feira, 3 de março de 2028 às 16:20", datetime(2028, 3, 3, 16, 20)),
        ("Samstag, 3. Ma\u0308rz 2029, 18:05", datetime(2029, 3, 3, 18, 5)),
        ("Sunday, 7 May 2028, 12:01 AM", datetime(2028, 5, 7, 0, 1)),
        ("domingo, 7 de mayo de 2028, 12:01 p. m.", datetime(2028, 5, 7, 12, 1)),
        ("poniedziałek, 5 października 2026, 23:58", None),
        ("Sunday, 31 February 2028, 12:01 AM", None),
        ("-", None),
    ],
)
def test_moodles_times_are_read_or_left_open(text, time):
    assert gradebooks._time(text) == time


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a2.csv", "Name,Points\nx,1\n", "neither a gradebook exported from Canvas"),
        ("a2.csv", "", "its first line is empty"),
        ("Grades-CS.csv", MOODLE, "its name says no assignment; rename it"),
        ("Grades-A1-a2.csv", MOODLE, "its name says a1 and a2; rename it"),
        ("a1.csv", MOODLE, "no column says 20 for each participant, as the maximum"),
        (
            "a2.csv",
            re.sub("Submitted for grading|No submission", "25", MOODLE),
            "several columns say 25 for each participant",
        ),
        ("a2.csv", MOODLE.replace("Participant 702", "Person 702"), "neither a gradebook"),
        ("a2.csv", MOODLE.partition("\r\n")[0], "neither a gradebook exported from Canvas"),
        (
            "g.csv",
            CANVAS.replace("25.00", "100"),
            "'FGSM by hand: a2 .111.' has 100 points, and a2 25",
        ),
        ("g.csv", CANVAS.replace("Essay", "More a2"), "are both for a2; remove one"),
        ("g.csv", CANVAS.replace("a2", "b2").replace("3 (", "9 ("), "no column is named after"),
        ("g.csv", CANVAS + "x,1\n", "not all as many cells"),
    ],
)
def test_a_gradebook_that_cannot_be_filled_is_refused(name, text, told, tmp_path):
    with pytest.raises(CourseError, match=f"cannot read the gradebook .*{name}: .*{told}"):
        gradebooks.read([written(tmp_path, name, text)], POINTS)


def test_two_gradebooks_for_one_assignment_are_refused(tmp_path):
    paths = [written(tmp_path, name, MOODLE) for name in ("a2.csv", "again-a2.csv")]
    with pytest.raises(CourseError, match="two gradebooks are for a2 in moodle"):
        gradebooks.read(paths, POINTS)


def test_a_gradebook_is_not_written_over_itself(tmp_path):
    (tmp_path / "gradebooks").mkdir()
    path = written(tmp_path / "gradebooks", "a2.csv", MOODLE)
    with pytest.raises(CourseError, match="is written by this command"):
        filled(path, {}, tmp_path)


# --- all of it


@pytest.fixture
def course(monkeypatch):
    """The course's module; 10 points for each cell, and no notebook runs."""
    pytest.importorskip("nbgrader", reason='needs the extra "course"')
    from advlab.classroom import course

    monkeypatch.setattr(course, "connect", lambda *_: nullcontext(None))
    monkeypatch.setattr(course, "_check_workers", lambda *_: None)
    monkeypatch.setattr(course, "_results", lambda _, ones, *__: ((o, scores(10)) for o in ones))
    return course


def test_a_class_of_moodle_is_graded_late_and_into_its_worksheet(course, tmp_path):
    for who in ("Seán O'Brien_701", "Kim Lee_702"):
        folder = tmp_path / "in" / f"{who}_assignsubmission_file_"
        folder.mkdir(parents=True)
        (folder / "a2.ipynb").touch()
    sheet = written(tmp_path, "Grades-CS101-a2-4711.csv", MOODLE)
    due = "percent_per_day = 10\n[due]\na2 = 2026-10-05T23:59:00+02:00"
    due = written(tmp_path, "due.toml", due)
    command = ["course", "grade", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    command += ["--gradebook", str(sheet), "--due", str(due), "--no-sandbox"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    raw = pd.read_csv(tmp_path / "out" / "grades.csv")
    assert raw["score"].tolist() == [10, 10]
    table = pd.read_csv(tmp_path / "out" / "totals.csv", keep_default_na=False)
    assert table.to_dict("records") == [
        {
            "student": "Kim Lee (kim1@uni.edu)",
            "a2": 9.0,
            "a2 late": "1 day late by Moodle's worksheet: 10 % off",
            "total": 9.0,
        },
        {"student": "Seán O'Brien", "a2": 10.0, "a2 late": "", "total": 10.0},
    ]
    with (tmp_path / "out" / "gradebooks" / sheet.name).open(newline="") as file:
        assert [row["Grade"] for row in csv.DictReader(file)] == ["10", "9", ""]
    assert "a2: nothing is graded of: Kim Lee" in done.output


def test_what_is_unknown_is_told_and_the_class_graded(course, tmp_path):
    (tmp_path / "in" / "a2-anna").mkdir(parents=True)
    (tmp_path / "in" / "a2-anna" / "a2.ipynb").touch()
    due = written(tmp_path, "due.toml", "percent_per_day = 9\n[due]\na2 = 2026-10-05T23:59:00Z")
    console = Console(record=True, width=200)
    course.grade(tmp_path / "in", tmp_path / "out", sandbox=False, due=due, console=console)
    assert "a2 of anna: nothing says when it came" in console.export_text()
    assert pd.read_csv(tmp_path / "out" / "totals.csv")["a2"].isna().all()


HOLDS = """import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_graders_never_share_a_folder(course, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "anna_a1.ipynb").touch()
    (tmp_path / "out").mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path / "out/.lock")], **pipes)
    assert other.stdout.readline()
    folders = tmp_path / "in", tmp_path / "out"
    with pytest.raises(CourseError, match=r"another run is grading into .*out; wait"):
        course.grade(*folders, sandbox=False)
    other.kill()  # its lock goes with it
    other.communicate()
    for _ in range(2):
        course.grade(*folders, sandbox=False)
