"""Answers that are nearly the same: a hint to read both, never a verdict.

Answers are compared by runs of tokens, or of words. What the assignment hands out, its solution
and many students share says nothing, and is left out.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TypeAlias

import nbformat
import pandas as pd
from nbformat import NotebookNode

from advlab.classroom import feedback, tokens
from advlab.classroom.merging import SOLUTION, grade_id, is_solution
from advlab.classroom.submissions import Submission

RUN = 8  # tokens, or words, that are compared at once
LEAST = 20  # runs of an answer's own; fewer are too few to say anything
ALIKE = 0.8  # share of two answers' runs that both have
MANY, SHARE = 4, 5  # a run that more students have, and more than one in five, is common knowledge
Runs: TypeAlias = set[tuple[str, ...]]
COLUMNS = ["assignment", "cell", "student", "other", "alike"]


def pairs(graded: Iterable[Submission], sources: Mapping[str, Path], output: Path) -> pd.DataFrame:
    """Return the pairs of students whose answers are nearly the same.

    Args:
        graded: The submissions.
        sources: The instructor's notebook of each assignment.
        output: Where `course.grade` writes.

    Returns:
        assignment, cell, student, other, alike (share of what both wrote, from `ALIKE` to 1), the
        most alike first.
    """
    answers: dict[tuple[str, str], dict[str, Runs]] = {}
    for one in graded:
        for cell in json.loads(feedback.drawn(one, output)):
            if "tokens" in cell:
                whose = answers.setdefault((one.assignment, cell["name"]), {})
                whose[one.student] = _runs(cell["tokens"])
    known = {
        (assignment, grade_id(cell)): _known(cell)
        for assignment, path in sources.items()
        for cell in nbformat.read(path, as_version=4).cells
        if is_solution(cell)
    }
    rows = [
        (*place, *pair)
        for place, own in answers.items()
        for pair in _alike(own, known.get(place, set()))
    ]
    found = pd.DataFrame(rows, columns=COLUMNS)
    return found.sort_values("alike", ascending=False, kind="stable")


def _known(cell: NotebookNode) -> Runs:
    """Return what an answer holds that was handed out, or is that of the source."""
    handed_out = SOLUTION.sub("raise NotImplementedError()", cell.source)
    both = (tokens.of_answer(text, cell.cell_type) for text in (cell.source, handed_out))
    return set().union(*map(_runs, both))


def _alike(answers: Mapping[str, Runs], known: Runs) -> Iterator[tuple[str, str, float]]:
    """Yield pairs of students, and what share of their own runs both have."""
    counts = Counter(run for runs in answers.values() for run in runs)
    many = max(MANY, len(answers) // SHARE)
    common = known | {run for run, count in counts.items() if count > many}
    own = {student: runs - common for student, runs in answers.items()}
    left = sorted(student for student, runs in own.items() if len(runs) >= LEAST)
    for one, other in combinations(left, 2):
        a, b = own[one], own[other]
        share = 2 * len(a & b) / (len(a) + len(b))
        if share >= ALIKE:
            yield one, other, round(share, 2)


def _runs(found: Sequence[str]) -> Runs:
    """Return the runs of `RUN` tokens."""
    return {tuple(found[at : at + RUN]) for at in range(len(found) - RUN + 1)}
