"""Late work: when assignments are due, and what a late one loses."""

import math
import tomllib
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from advlab.classroom.spreadsheets import plain
from advlab.classroom.submissions import CourseError, Submission

DAY = timedelta(days=1)


@dataclass(frozen=True)
class Policy:
    """What the file `--due` says.

    Args:
        due: When each assignment is due; those that are missing are never late.
        percent_per_day: That a late day takes off the points earned, 0 to 100.
        free_days: Late days of each student that take nothing off.
        per: For which those are: the "term" or an "assignment".
        cutoff_days: Late days after which nothing is earned; None for no end.
        extensions: By assignment and student, when it is due for them.
        submitted: By assignment and student, when it was handed in, where nothing else says so.
    """

    due: dict[str, datetime]
    percent_per_day: float
    free_days: int = 0
    per: str = "term"
    cutoff_days: int | None = None
    extensions: dict[str, dict[str, datetime]] = field(default_factory=dict)
    submitted: dict[str, dict[str, datetime]] = field(default_factory=dict)


@dataclass(frozen=True)
class Late:
    """What being late does to an assignment's points.

    Args:
        share: Of the points that stays, 0 to 1; None if that cannot be known.
        reason: In words; "" if it was in time.
    """

    share: float | None
    reason: str


def read(path: Path, names: Collection[str]) -> Policy:
    """Return the policy in a TOML file.

    Args:
        path: Its keys are the arguments of `Policy`; all but `due` and `percent_per_day` may be
            missing.
        names: The assignments.

    Raises:
        CourseError: if it cannot be read, or holds anything else; names the key.
    """
    try:
        with path.open("rb") as file:
            return _policy(tomllib.load(file), names)
    except (OSError, ValueError) as error:
        raise CourseError(f"cannot read {path}: {error}") from error


def _policy(given: dict[str, Any], names: Collection[str]) -> Policy:
    known = list(Policy.__dataclass_fields__)
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"there is no {unknown[0]!r}; there are {', '.join(known)}")
    if missing := [key for key in ("due", "percent_per_day") if key not in given]:
        raise ValueError(f"it says nothing of {missing[0]!r}")
    percent = given["percent_per_day"]
    if not _is_number(percent) or not 0 <= percent <= 100:
        raise ValueError(f"percent_per_day is {percent!r}; it is a number from 0 to 100")
    for key in ("free_days", "cutoff_days"):
        days = given.get(key, 0)
        if not _is_number(days) or days != int(days) or days < 0:
            raise ValueError(f"{key} is {days!r}; it is a whole number of days")
    if given.get("per", "term") not in ("term", "assignment"):
        raise ValueError(f'per is {given["per"]!r}; it is "term" or "assignment"')
    due = _times("due", given["due"], names)
    of_students = {
        key: {
            name: _times(f"{key}.{name}", times)
            for name, times in _table(key, given.get(key, {}), due).items()
        }
        for key in ("extensions", "submitted")
    }
    return Policy(**{**given, "due": due, **of_students})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _table(key: str, value: Any, names: Collection[str] | None) -> dict[str, Any]:
    """Return a table whose keys are names of assignments, or with None of students."""
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}; it is a table, [{key}]")
    if names is None:
        return {plain(name): one for name, one in value.items()}
    if unknown := [name for name in value if name.lower() not in names]:
        raise ValueError(f"{key}: {unknown[0]!r} is none of {', '.join(names)}")
    return {name.lower(): one for name, one in value.items()}


def _times(key: str, value: Any, names: Collection[str] | None = None) -> dict[str, datetime]:
    times = _table(key, value, names)
    for name, time in times.items():
        if not isinstance(time, datetime) or time.tzinfo is None:
            raise ValueError(
                f"{key}: {name} is {time}; write day, hour and time zone, such as "
                "2026-10-05T23:59:00+02:00"
            )
    return times


def strangers(submissions: Collection[Submission], policy: Policy) -> list[str]:
    """Return a line for each student in the policy who handed nothing in: a misspelt name, say."""
    there = {(one.student, one.assignment) for one in submissions}
    return [
        f"{key}.{name}: nobody called {student!r} handed in {name}"
        for key, table in (("extensions", policy.extensions), ("submitted", policy.submitted))
        for name, times in table.items()
        for student in times
        if (student, name) not in there
    ]


def judge(
    submissions: Collection[Submission],
    policy: Policy,
    times: Mapping[tuple[str, str], datetime] | None = None,
) -> dict[Submission, Late]:
    """Return what being late does to each submission.

    When one was handed in is said by the policy's `submitted`; else by Moodle's grading worksheet;
    else by nbgrader's timestamp; else by the file, unless a system let one download it: that has
    the time of the download. Canvas says LATE in the name, and not by how much.

    Args:
        submissions: One for each student and assignment.
        policy: The policy.
        times: By assignment and participant's number, what Moodle's worksheets say, without a time
            zone: it is taken to be that of the day when the assignment is due.
    """
    of_students = defaultdict(list)
    for one in submissions:
        if one.assignment in policy.due:
            of_students[one.student].append(one)
    judged = {}
    for own in of_students.values():
        left: int | None = policy.free_days
        for one in sorted(own, key=lambda one: policy.due[one.assignment]):
            if policy.per == "assignment":
                left = policy.free_days
            judged[one], left = _judge(one, policy, times or {}, left)
    return judged


def _judge(
    one: Submission,
    policy: Policy,
    times: Mapping[tuple[str, str], datetime],
    left: int | None,
) -> tuple[Late, int | None]:
    """Return what being late does to `one`, and how many free days are left; None if unknown."""
    due = policy.extensions.get(one.assignment, {}).get(one.student, policy.due[one.assignment])
    time, source = _handed_in(one, policy, times, due)
    if time is None and one.system == "canvas" and not one.late:
        return Late(1.0, ""), left
    if time is None:
        what = "Canvas says late, and not by how much" if one.late else "nothing says when it came"
        return Late(None, f"{what}; put the time into [submitted.{one.assignment}]"), left and None
    days = max(0, math.ceil((time - due) / DAY))
    if not days:
        return Late(1.0, ""), left
    told = f"{_days(days)} late by {source}"
    if policy.cutoff_days is not None and days > policy.cutoff_days:
        return Late(0.0, f"{told}, more than {_days(policy.cutoff_days)}: no points"), left
    if left is None:
        return Late(None, f"{told}; how many free days were left cannot be known"), None
    free = min(days, left)
    off = min(100.0, policy.percent_per_day * (days - free))
    told += f", {free} of them free" if free else ""
    return Late(1 - off / 100, f"{told}: {off:g} % off"), left - free


def _handed_in(
    one: Submission,
    policy: Policy,
    times: Mapping[tuple[str, str], datetime],
    due: datetime,
) -> tuple[datetime | None, str]:
    """Return when `one` was handed in, or None, and what says so."""
    if time := policy.submitted.get(one.assignment, {}).get(one.student):
        return time, "the course's record"
    if one.system == "moodle" and (time := times.get((one.assignment, one.number))):
        return time.replace(tzinfo=due.tzinfo), "Moodle's worksheet"
    return one.time, "nbgrader's timestamp" if one.stamped else "the time of the file"


def _days(n: int) -> str:
    return f"{n} day" if n == 1 else f"{n} days"
