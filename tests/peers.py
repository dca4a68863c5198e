"""An assignment run in this process: plainly, as students run it, or examined, as the grader does.

For the grader two threads hold the two sides, and only texts go over.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from queue import Queue
from threading import Thread
from unittest.mock import patch

from advlab import attacks, forward, minimal, models, proofs, training
from advlab.classroom import merging
from advlab.classroom.examining import Examiner
from advlab.classroom.remote import Peer

# What tests take away for good, in a process of their own.
TAKEN = ((attacks, "check_batch"), (forward, "check_batch"), (models, "CNN"))
TAKEN += ((training, "fastest_layout"), (minimal, "check_batch"))
TAKEN += ((proofs, "check_images"), (proofs, "_lower_bound"))


class Line:
    """A student's side in a thread, and the way to it."""

    def __init__(self, space):
        self.there, self.back, self.sent = Queue(), Queue(), []
        self.peer = Peer(self._ask, space)
        Thread(target=self._serve, daemon=True).start()
        self.back.get()

    def _ask(self, message):
        self.back.put(json.dumps(message))
        return json.loads(self.there.get())

    def _serve(self):
        found = self._ask({"ready": True})
        while found["do"] != "end":
            if found["do"] == "forget":
                self.peer.forget()
                found = self._ask({})
            else:
                found = self._ask(self.peer.answer(found))

    def exchange(self, message):
        """Send a message from the tests' side; return what comes back."""
        self.sent.append(message)
        self.there.put(json.dumps(message))
        return json.loads(self.back.get())

    def close(self):
        self.there.put('{"do": "end"}')


@contextmanager
def given_back() -> Iterator[None]:
    """Give back what tests take away."""
    with ExitStack() as stack:
        for module, name in TAKEN:
            stack.enter_context(patch.object(module, name, getattr(module, name)))
        yield


def run_plainly(notebook):
    """Return why each test in `notebook` fails, or "", where it is run from top to bottom."""
    space, found = {"__name__": "__main__"}, {}
    with given_back():
        for cell in notebook.cells:
            if cell.cell_type == "code":
                error = ""
                try:
                    exec(cell.source, space)
                except Exception as raised:
                    error = f"{type(raised).__name__}: {raised}"
                if cell.metadata.nbgrader.grade:
                    found[cell.metadata.nbgrader.grade_id] = error
    return found


def examine(notebook, source, seed=0):
    """Return why each test of `source` fails, or "", with the answers of `notebook`."""
    space, found = {"__name__": "__main__"}, {}
    line = Line(space)
    examiner = Examiner(line.exchange, seed)
    with given_back():
        for cell, own in zip(notebook.cells, source.cells, strict=True):
            if cell.cell_type != "code":
                continue
            block, error = own.metadata.nbgrader, ""
            if block.grade:
                found[block.grade_id] = examiner.examine(own.source)
                examiner.restore()
                line.exchange({"do": "forget"})
                continue
            try:
                exec(cell.source, space)
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
            if block.solution:
                examiner.answered(merging.DEFINED.findall(own.source), error)
            else:
                examiner.give(cell.source)
    line.close()
    return found
