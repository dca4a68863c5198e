"""The tests of an assignment, in a process in which no student's code is.

They call what a student wrote in the kernel of the sandbox (see `remote`).
"""

import ast
import random
import re
from collections.abc import Iterable
from typing import Any

import torch
from IPython.core.inputtransformer2 import TransformerManager

from advlab.classroom.merging import clean
from advlab.classroom.remote import Exchange, Peer, Student


class Ended(BaseException):
    """The kernel cannot be asked any more; no test takes that for an error of the student's."""


class Examiner:
    """Holds what an assignment gives and its tests, and examines a student's functions by them.

    Args:
        exchange: The line to the kernel; see `remote.Peer`.
        seed: Of what the tests draw.
    """

    def __init__(self, exchange: Exchange, seed: int) -> None:
        self._peer = Peer(exchange)
        self._peer.prepare = self._replace
        self._space: dict[str, Any] = {"__name__": "__main__"}
        self._students: dict[str, Student] = {}
        self._broken: dict[str, str] = {}
        self._replaced: dict[str, Any] = {}
        self._drawn = random.Random(seed)

    def give(self, source: str) -> None:
        """Run a cell that the assignment gives, unless it calls what a student wrote."""
        plain = TransformerManager().transform_cell(source)  # of %magics and !commands
        tree = ast.parse(plain)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        if not names & (self._students.keys() | {"get_ipython"}):
            self._run(plain)

    def answered(self, names: Iterable[str], error: str) -> None:
        """Note that a student's cell was to define `names`, and why it failed, or ""."""
        for name in names:
            self._students[name] = Student(self._peer, name)
            self._broken[name] = error

    def examine(self, source: str) -> str:
        """Run a cell with tests; return why it failed, or ""."""
        self._space |= self._students
        # Elsewhere `images.requires_grad = True` would break what a test does next.
        self._peer.needs_told = bool(re.search(r"assert .*\.requires_grad\b", source))
        try:
            self._run(source)
        except Exception as error:
            return self._reason(error)
        finally:
            self._peer.forget()
        return ""

    def restore(self) -> None:
        """Give a student's names their meaning back, where a test that failed had replaced them."""
        self._space |= self._students
        self._replace()

    def _run(self, source: str) -> None:
        state, drawn = random.getstate(), random.SystemRandom
        # What tests draw, by whatever way, is drawn from the seed.
        random.seed(self._drawn.getrandbits(32))
        torch.manual_seed(self._drawn.getrandbits(32))
        random.SystemRandom = lambda: self._drawn  # type: ignore[assignment,misc]
        try:
            exec(compile(source, "<tests>", "exec"), self._space)
        finally:
            random.SystemRandom = drawn  # type: ignore[misc]
            random.setstate(state)

    def _replace(self) -> None:
        """Tell the kernel of names of a student's to which the tests gave another meaning."""
        for name, own in self._students.items():
            now = self._space.get(name, own)
            if now is not self._replaced.get(name, own):
                self._replaced[name] = now
                self._peer.replace(name, None if now is own else now)

    def _reason(self, error: Exception) -> str:
        kind, text = type(error).__name__, str(error)
        told = f"{kind}: {text}".removesuffix(": ")
        theirs = bool(getattr(error, "__notes__", None))
        if theirs and isinstance(error, NameError):
            named = re.match("name '(\\w+)' is not defined", text)
            if named and self._broken.get(named[1]):
                return clean(f"the cell with {named[1]} failed: {self._broken[named[1]]}")
        if not theirs and not isinstance(error, AssertionError) and self._peer.last:
            return clean(f"{self._peer.last} ({told})")
        return clean(told)
