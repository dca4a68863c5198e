"""What a class made of each question, and whose score a later run changed."""

import re
from pathlib import Path

import pandas as pd

from advlab import files
from advlab.classroom.marks import BY_HAND

KEYS = ["student", "assignment", "cell"]
CHANGES = [*KEYS, "old", "new", "reason", "when"]


def of_questions(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each graded cell: what the class made of it.

    Args:
        table: See `course.grade`.

    Returns:
        assignment, cell, points, submissions, mean (share of the points, from 0 to 1, of the
        answers that have a score), zero and full (how many got none and all of them), open (how
        many have no score yet), reason (the most common one for a score that is not full; numbers
        in it differ from student to student, and one of them is shown).
    """
    table = table.sort_values("assignment", kind="stable")
    cells = table.groupby(["assignment", "cell"], sort=False)
    rows = [
        {
            "assignment": assignment,
            "cell": cell,
            "points": rows["points"].iloc[0],
            "submissions": len(rows),
            "mean": round((rows["score"] / rows["points"]).mean(), 4),
            "zero": (rows["score"] == 0).sum(),
            "full": (rows["score"] == rows["points"]).sum(),
            "open": rows["score"].isna().sum(),
            "reason": _most_common(rows.loc[rows["score"] < rows["points"], "reason"]),
        }
        for (assignment, cell), rows in cells
    ]
    return pd.DataFrame(rows)


def _most_common(reasons: pd.Series) -> str:
    reasons = reasons[~reasons.isin(["", BY_HAND])]
    if reasons.empty:
        return ""
    kinds = reasons.map(lambda reason: re.sub(r"\d+", "", reason))
    return reasons[kinds == kinds.value_counts().index[0]].iloc[0]


def changes(before: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Return the scores that are not those of an earlier grades.csv.

    Args:
        before: The file, which need not be there.
        table: What is to replace it; see `course.grade`.

    Returns:
        student, assignment, cell, old and new (scores; new is empty where there is none now) and
        reason (of the new one). A first score is no change.

    Raises:
        ValueError: if it is no grades.csv.
    """
    if not before.exists():
        return pd.DataFrame(columns=[*KEYS, "old", "new", "reason"])
    # A student may be called None, or 007.
    old = pd.read_csv(
        before, dtype=dict.fromkeys(KEYS, str), keep_default_na=False, na_values={"score": ""}
    )
    if missing := {*KEYS, "score"} - set(old.columns):
        raise ValueError(f"{before} has no column {', '.join(sorted(missing))}")
    old = old[[*KEYS, "score"]].rename(columns={"score": "old"}).dropna(subset="old")
    both = old.merge(table[[*KEYS, "score", "reason"]], on=KEYS, how="left", indicator=True)
    both = both.rename(columns={"score": "new"})
    both["reason"] = both["reason"].where(both["_merge"] == "both", "not handed in any more")
    # A number that was written and read again may differ in its last digit.
    same = (both["old"] - both["new"]).abs() < 1e-9
    return both.loc[~same, [*KEYS, "old", "new", "reason"]]


def keep_changes(found: pd.DataFrame, path: Path, when: str) -> None:
    """Add changes to those of earlier runs in `path`, which begins with the first."""
    earlier = pd.read_csv(path, dtype=str, keep_default_na=False) if path.exists() else None
    write(pd.concat([earlier, found.assign(when=when)])[CHANGES], path)


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV."""
    with files.atomic_write(path) as temporary:
        table.to_csv(temporary, index=False, encoding="utf-8-sig")  # Excel takes it for Latin else
