"""Assignments: valid sources, releases without answers, and a class graded as it deserves."""

import copy
import json
import os
import re
import shutil
import socket
import time
import zipfile
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from advlab import files
from advlab.cli import app
from advlab.tools import course

pytest.importorskip("nbgrader", reason='needs the extra "course"')
from advlab.tools import run_submission

NAMES = list(course.sources())
SANDBOX = bool(shutil.which("bwrap"))
QUIET = Console(record=True, width=100)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Folder with the student versions."""
    output = tmp_path_factory.mktemp("course")
    course.build(output)
    return output


def validate(path, **how):
    from nbgrader.validator import Validator
    from traitlets.config import Config

    config = Config()
    config.ExecutePreprocessor.timeout = 300  # seconds a cell; its own 30 are few on a busy machine
    return Validator(config=config, **how).validate(str(path))


def source(name):
    return nbformat.read(course.sources()[name], as_version=4)


def release(released, name):
    return nbformat.read(released / "release" / name / f"{name}.ipynb", as_version=4)


def solutions(notebook):
    return [c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("solution")]


def replace(notebook, old, new):
    """Replace `old` by `new` in the answers of `notebook`."""
    changed = [cell for cell in solutions(notebook) if old in cell.source]
    assert changed, f"no answer holds {old!r}"
    for cell in changed:
        cell.source = cell.source.replace(old, new)


def put(folder, student, name, notebook, old="", new=""):
    """Hand in `notebook`, with `old` replaced by `new` in its answers."""
    if old:
        replace(notebook, old, new)
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / f"{student}_{name}.ipynb")


def grades(folder, output):
    table = course.grade(folder, output, sandbox=SANDBOX, console=QUIET)
    return table.groupby(["student", "assignment"])["score"].sum().to_dict(), table


# --- sources and releases


def test_there_are_six():
    assert NAMES == ["a1", "a2", "a3", "a4", "a5", "a6"]


@pytest.mark.parametrize("name", NAMES)
def test_source_is_valid(name):
    assert validate(course.sources()[name]) == {}


@pytest.mark.parametrize("name", NAMES)
def test_release_fails_its_tests_and_holds_no_answer(name, released):
    path = released / "release" / name / f"{name}.ipynb"
    assert validate(path, invert=True) == {}
    text = path.read_text()
    assert not re.search("BEGIN (SOLUTION|HIDDEN|MARK)", text)
    answers = {c.metadata.nbgrader.grade_id: c.source for c in solutions(source(name))}
    for cell in solutions(release(released, name)):
        held = answers[cell.metadata.nbgrader.grade_id]
        inside = re.findall(r"### BEGIN \w+\s*\w*\n(.*?)### END", held, re.DOTALL)
        assert inside
        assert not any(part.strip() in cell.source for part in inside)


@pytest.mark.parametrize("name", NAMES)
def test_assignment_states_aims_points_and_time(name):
    first, cells = source(name).cells[0].source, source(name).cells
    for words in ("Aims:", "Points:", "Time:", "Runs in:", "hidden"):
        assert words in first
    points = sum(c.metadata.nbgrader.points for c in cells if c.metadata.nbgrader.grade)
    assert f"**Points:** {points}" in first


def test_an_assignment_that_cannot_be_graded_is_refused(tmp_path, empty_home):
    folder = empty_home / "notebooks" / "assignments" / "project"
    folder.mkdir(parents=True)
    committed = files.repository() / "notebooks" / "assignments" / "a1" / "a1.ipynb"
    shutil.copy(committed, folder / "project.ipynb")
    with pytest.raises(course.CourseError, match="an assignment is named a7/a7"):
        course.sources()
    task = nbformat.read(committed, as_version=4)
    task.cells[0].metadata.nbgrader.task = True
    (folder.parent / "a7").mkdir()
    nbformat.write(task, folder.parent / "a7" / "a7.ipynb")
    shutil.rmtree(folder)
    with pytest.raises(course.CourseError, match="a7: no task cells"):
        course.build(tmp_path / "out")


def test_each_release_is_zipped(released):
    for name in NAMES:
        with zipfile.ZipFile(released / f"{name}.zip") as packed:
            assert packed.namelist() == [f"{name}/{name}.ipynb"]


# --- grades


COUNTED = """right += int((model(images).argmax(1) == labels).sum())
            total += len(labels)"""
AVERAGED = """right += float((model(images).argmax(1) == labels).float().mean())
            total += 1"""
WRONG = {
    # what was done wrong: assignment, answer, instead, the tests that fail
    "sign": ("a2", ".sign()).clamp", ").clamp", ["size-test", "targeted-test"]),
    "clamp": ("a2", ".clamp(0, 1)", "", ["clamp-test", "targeted-test"]),
    "mode": ("a2", "    model.train(was_training)\n", "", ["mode-test"]),
    "train": ("a2", "    model.eval()\n", "    model.train()\n", ["mode-test"]),
    "pixels": ("a2", "(images + eps *", "(images + eps / 255 *", ["size-test"]),
    "averages": ("a4", COUNTED, AVERAGED, ["exact-test"]),
}


OWN_WRONG_GRADIENT = """    x = images.clone().requires_grad_()
    F.cross_entropy(model(x), {labels}).backward()
    return (images {sign} eps * x.grad"""
OF_ORIGINAL = """    at = images.clone().requires_grad_()
    loss = F.cross_entropy(model(at), labels, reduction="sum")
    gradient = torch.autograd.grad(loss, at)[0]"""
OF_START = """    loss = F.cross_entropy(model(x), labels, reduction="sum")
    gradient = torch.autograd.grad(loss, x)[0]"""
Z_TEST = (
    "(attacked - clean) / math.sqrt(clean * (n - clean) / n + attacked * (n - attacked) / n) > 1.96"
)
UNIFORM = "torch.rand(images.shape, generator=generator)"
ONE_NUMBER = "torch.rand(len(images), 1, 1, 1, generator=generator)"
LENGTHS = "grad(loss, x)[0].flatten(1).norm(dim=1)"
SUBTLE = {
    # as WRONG; these run without the grader
    "fgsm in training mode": (
        "a2", "return (images + eps", "model.train()\n    return (images + eps", ["leaves-test"],
    ),
    "fgsm's backward": (
        "a2", "    return (images + eps * image_gradient(model, images, labels)",
        OWN_WRONG_GRADIENT.format(labels="labels", sign="+"), ["leaves-test"],
    ),
    "targeted backward": (
        "a2", "    return (images - eps * image_gradient(model, images, targets)",
        OWN_WRONG_GRADIENT.format(labels="targets", sign="-"), ["leaves-test"],
    ),
    "clears .grad": (
        "a2", "    was_training", "    model.zero_grad()\n    was_training", ["mode-test"],
    ),
    "whole steps": ("a2", "return steps / 255", "return int(steps) / 255", ["pixels-test"]),
    "gradient of the original": ("a4", OF_START, OF_ORIGINAL, ["ball-test"]),
    "a start per image": ("a4", UNIFORM, ONE_NUMBER, ["start-test"]),
    "start on one side": ("a4", f"(2 * {UNIFORM} - 1)", UNIFORM, ["start-test"]),
    "start outside": ("a4", "start).clamp(0, 1)", "start)", ["ball-test"]),
    "trains on originals": ("a4", "model(made), labels", "model(images), labels", ["step-test"]),
    "crafts in eval mode": (
        "a4", "    made = attack(model, images, labels, eps, generator)",
        "    made = attack(model.eval(), images, labels, eps, generator)\n    model.train()",
        ["step-test"],
    ),
    "gradients add up": ("a4", "    optimiser.zero_grad()\n", "", ["step-test"]),
    "sum / 32": (
        "a4", "cross_entropy(model(made), labels)",
        "cross_entropy(model(made), labels, reduction='sum') / 32", ["step-test"],
    ),
    "with gradients": ("a4", "torch.no_grad()", "torch.enable_grad()", ["eval-test"]),
    "another interval": (
        "a5", "interval(attacked, n)[0] > interval(clean, n)[1]", Z_TEST, ["alarm-test"],
    ),
    "another source": ("a5", "made = fgsm(source,", "made = fgsm(target,", ["transfer-test"]),
    "alpha ignored": ("a6", "x + alpha *", "x + eps / 4 *", ["walk-test"]),
    "last point ignored": (
        "a6", "        rank", "        if step and step == steps:\n            break\n        rank",
        ["walk-test"],
    ),
    "last if never wrong": ("a6", "rank = loss", "rank = step", ["worst-test"]),
    "a PGD start per image": ("a6", UNIFORM, ONE_NUMBER, ["walk-test", "worst-test"]),
    "PGD from outside": (
        "a6", "x = project(images + start, images, eps)", "x = images + start", ["worst-test"],
    ),
    "left in eval mode": ("a6", "    start =", "    model.eval()\n    start =", ["ball-test"]),
    "small is vanished": ("a6", "1e-10", "1e-3", ["masked-test"]),
    "share of pixels": ("a6", LENGTHS, "grad(loss, x)[0].abs()", ["partly-test"]),
    "any image": ("a6", ".float().mean() > 0.5", ".any()", ["partly-test"]),
}  # fmt: skip
IN_PLACE = "torch.empty_like(images).uniform_(-eps, eps, generator=generator)"
LOOP = """    made = [
        _pgd(model, *one, eps, alpha, steps, generator)
        for one in zip(images[:, None], labels[:, None])
    ]
    return torch.cat(made)


def _pgd(model, images, labels, eps, alpha, steps, generator):
    start ="""
OTHERWISE_RIGHT = {
    "a2": [
        ("eps * image_gradient", "eps * 1.0 * image_gradient"),
        ("return steps / 255", "return float(steps) / 255.0"),
    ],
    "a4": [
        (f"(2 * {UNIFORM} - 1) * eps", IN_PLACE),
        (f"(2 * {UNIFORM} - 1) * eps", f"(1 - 2 * {UNIFORM}) * eps"),
        (" + 1.25 * eps * gradient.sign()", ".add(gradient.sign(), alpha=1.25 * eps)"),
    ],
    "a6": [
        ("    start =", LOOP),
        (f"(2 * {UNIFORM} - 1) * eps", IN_PLACE),
        ("        logits = model(x)", "        model(x)\n        logits = model(x)"),
    ],
}  # fmt: skip


def failing(name, old, new):
    """Run the code of an assignment with `old` replaced in its answers; return what failed."""
    notebook = source(name)
    replace(notebook, old, new)
    space, failed = {}, []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            try:
                exec(cell.source, space)
            except Exception:
                failed.append(cell.metadata.nbgrader.grade_id)
    return failed


@pytest.mark.parametrize("error", SUBTLE)
def test_a_subtle_error_costs_points(error):
    name, old, new, tests = SUBTLE[error]
    assert failing(name, old, new) == tests


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [(name, *one) for name, pairs in OTHERWISE_RIGHT.items() for one in pairs],
)
def test_what_is_right_in_another_way_costs_nothing(name, old, new):
    assert failing(name, old, new) == []


STRIPS = """import ast
class Strip(ast.NodeTransformer):
    def visit_Assert(self, node):
        return ast.Pass()
get_ipython().ast_transformers.append(Strip())"""
HOSTILE = {
    "loops": "while True: pass",
    "strips": STRIPS,
    "crashes": "import os; os._exit(1)",
    "prints": "while True: print('x' * 10**6)",
    "eats": "x = [bytes(10**9) for _ in range(100)]",
    "swallows": "get_ipython().set_custom_exc((Exception,), lambda *a, **k: None)",
    "replaces": "import torch\ntorch.allclose = torch.equal = lambda *a, **k: True",
    "shadows": "def all(x): return True\ndef float(x): return 0.0",
}


def hand_in_a_class(folder, released):
    """Write thirty submissions: perfect, untouched, partial, wrong and hostile ones."""
    for name in NAMES:
        put(folder, "perfect", name, source(name))
        put(folder, "empty", name, release(released, name))
    for name in ("a1", "a3"):
        begun = release(released, name)
        solutions(begun)[0].source = solutions(source(name))[0].source
        put(folder, "begun", name, begun)
    for student, (name, old, new, _) in WRONG.items():
        put(folder, student, name, source(name), old, new)
    for student, code in HOSTILE.items():
        notebook = release(released, "a2")
        solutions(notebook)[0].source = code
        put(folder, student, "a2", notebook)
    (folder / "text_a2.ipynb").write_text("not a notebook")
    (folder / "huge_a2.ipynb").write_bytes(b" " * 21_000_000)
    assert len(list(folder.iterdir())) == 30


def test_a_class_of_thirty_gets_the_grades_it_deserves(released, tmp_path):
    hand_in_a_class(tmp_path / "in", released)
    command = ["course", "grade", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command if SANDBOX else [*command, "--no-sandbox"])
    assert done.exit_code == 0, done.output
    table = pd.read_csv(
        tmp_path / "out" / "grades.csv", keep_default_na=False, na_values={"score": ""}
    )
    full = table["score"] == table["points"]
    by_hand = table["score"].isna()
    assert set(table["cell"][by_hand]) == {"claim"}

    perfect = table["student"] == "perfect"
    assert list(table["assignment"][perfect].unique()) == NAMES
    assert list(table["reason"][perfect & ~full & ~by_hand]) == []
    empty = table["student"] == "empty"
    assert list(table["assignment"][empty].unique()) == NAMES
    assert table["score"][empty].sum() == 0

    begun = table["student"] == "begun"
    earned = table[begun & full].groupby("assignment")["cell"].agg(list).to_dict()
    assert earned == {"a1": ["size-test"], "a3": ["direction-test", "add-test"]}
    assert table["score"][begun & ~full].sum() == 0

    lost = table[table["student"].isin(WRONG) & ~full]
    assert lost.groupby("student")["cell"].agg(list).to_dict() == {
        student: tests for student, (*_, tests) in WRONG.items()
    }
    assert lost["score"].sum() == 0

    hostile = table["student"].isin([*HOSTILE, "text", "huge"])
    assert table["student"][hostile].nunique() == 10
    assert table["score"][hostile].sum() == 0
    reasons = table.groupby("student")["reason"].agg(" ".join)
    assert (reasons[[*HOSTILE, "text", "huge"]] != "").all()
    assert (table["reason"][hostile & ~full] != "not run").all(), "each row tells why"
    told = " ".join(done.output.split())
    assert "a2 of text: not a notebook: NotJSONError" in told
    assert "a2 of huge: the file has 21 MB" in told
    assert "rely on: an assertion cannot fail" in reasons["strips"]
    assert "rely on: all was replaced" in reasons["shadows"]
    scores = json.loads((tmp_path / "out" / "graded" / "loops" / "a2" / "scores.json").read_text())
    assert scores["reason"] == f"took longer than {course.CELL_SECONDS} s a cell, or 300 s in all"
    assert scores["seconds"] > course.CELL_SECONDS
    # A line for each assignment: how many, and how long they took.
    lines = done.output.split("longest_s\n")[1].splitlines()[: len(NAMES)]
    counts = {name: int(count) for name, count, *_ in (line.split() for line in lines)}
    assert counts == table.groupby("assignment")["student"].nunique().to_dict()

    pages = {path.stem for path in (tmp_path / "out" / "feedback").iterdir()}
    assert pages == set(table["student"])
    # The page of a student with a mark to come says so, and none tells what the hidden tests are.
    assert (
        "14 of 14 points, and 10 to be read"
        in (tmp_path / "out" / "feedback" / "perfect.html").read_text()
    )
    texts = [path.read_text() for path in (tmp_path / "out" / "feedback").iterdir()]
    assert not any("HIDDEN TESTS" in text or "SystemRandom().randrange" in text for text in texts)
    assert "# hidden tests" in (tmp_path / "out" / "feedback" / "perfect.html").read_text()
    for student in ("text", "huge", "empty"):
        page = (tmp_path / "out" / "feedback" / f"{student}.html").read_text()
        assert "BEGIN SOLUTION" not in page


@pytest.fixture
def port():
    """A port of this machine at which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        socket.create_connection(address, 2).close()  # it can be reached from here
        yield address[1]


@pytest.mark.skipif(not SANDBOX, reason="bubblewrap is not installed")
def test_sandbox_keeps_files_network_and_sources_away(tmp_path, monkeypatch, port):
    victim, outside = tmp_path / "victim.txt", files.home() / "outputs" / "written.txt"
    victim.write_text("mine")
    monkeypatch.setenv("GRADER_TOKEN", "secret")
    folder, home = tmp_path / "in", str(Path.home())
    folder.mkdir()
    put(folder / "neighbour", "notes", "a1", source("a1"))
    probes = [  # each must end in an error
        f"open({str(outside)!r}, 'w')",
        f"import os\nos.remove({str(victim)!r})",
        "import advlab\nopen(advlab.__file__, 'a')",
        f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)",
        f"open({str(course.sources()['a1'])!r})",
        f"import os\nos.listdir({str(files.home() / '.git')!r})",
        f"open({str(folder / 'neighbour' / 'notes_a1.ipynb')!r})",
        f"import pathlib\n[p for p in pathlib.Path({home!r}).iterdir() if p.is_file()][0]",
        "import os\nos.listdir('/run')[0]",
        "import os\nos.environ['GRADER_TOKEN']",
        f"import os\nos.kill({os.getpid()}, 0)",
    ]
    notebook = source("a1")
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in probes]
    (folder / "eve" / "a1").mkdir(parents=True)
    nbformat.write(notebook, folder / "eve" / "a1" / "a1.ipynb")
    totals, _ = grades(folder, tmp_path / "out")
    assert totals == {("eve", "a1"): 20}
    assert victim.read_text() == "mine"
    assert not outside.exists()
    executed = nbformat.read(tmp_path / "out/graded/eve/a1/executed.ipynb", as_version=4)
    found = {
        cell.source: [o.output_type for o in cell.outputs]
        for cell in executed.cells[-len(probes) :]
    }
    assert found == {code: ["error"] for code in probes}


BREEDS = """import os, time
for _ in range({processes}):
    if os.fork() == 0:
        held = bytearray(b"x") * {size}
        time.sleep(60)
        os._exit(0)
time.sleep(60)"""


@pytest.mark.parametrize(("processes", "size"), [(8, 400_000_000), (250, 1)])
def test_a_submission_is_stopped_that_starts_too_much(processes, size, tmp_path, monkeypatch):
    monkeypatch.setattr(course, "MEGABYTES", 2_000)
    notebook = source("a1")
    notebook.cells.append(nbformat.v4.new_code_cell(BREEDS.format(processes=processes, size=size)))
    put(tmp_path / "in", "many", "a1", notebook)
    totals, _ = grades(tmp_path / "in", tmp_path / "out")
    scores = json.loads((tmp_path / "out" / "graded" / "many" / "a1" / "scores.json").read_text())
    assert scores["reason"] == "the kernel died (crashed, or ran out of memory)"
    assert totals == {("many", "a1"): 20}, "what was earned before stays"


def test_time_of_a_cell_ends_with_that_of_the_notebook(monkeypatch):
    monkeypatch.setattr(run_submission.time, "monotonic", lambda: 100.0)
    assert run_submission.time_left(end=400.0, seconds=60) == 60
    assert run_submission.time_left(end=130.0, seconds=60) == 30
    assert run_submission.time_left(end=90.0, seconds=60) == 1  # a cell that is quick may still run


def test_changed_tests_and_given_functions_are_put_back(tmp_path):
    easy, lax = source("a1"), source("a6")
    for cell in easy.cells:
        if cell.metadata.nbgrader.grade:
            cell.source = "pass"
    put(tmp_path / "in", "easy", "a1", easy, "return (n + 2", "return 1 + (n + 2")
    # `right` is what its tests count with.
    weak = "    return images\nright = lambda *arguments: 0\ndef unused():\n    start ="
    put(tmp_path / "in", "lax", "a6", lax, "    start =", weak)
    totals, table = grades(tmp_path / "in", tmp_path / "out")
    assert totals["easy", "a1"] < 20
    lost = table[(table["student"] == "lax") & (table["score"] == 0)]["cell"]
    assert {"strong-test", "worst-test"} <= set(lost)


def test_what_a_student_adds_costs_nothing(tmp_path, monkeypatch):
    notebook = source("a1")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    cells = [one for cell in code for one in (cell, copy.deepcopy(cell))]
    strange = nbformat.v4.new_code_cell("1", metadata={"nbgrader": "x"})
    display = "from IPython.display import display\ndisplay({'text/markdown': 5}, raw=True)"
    notebook.cells = [*cells, strange, nbformat.v4.new_code_cell(display)]
    notebook.cells.append(nbformat.v4.new_markdown_cell("half an emoji: \ud83d"))
    monkeypatch.chdir(tmp_path)  # a class is where you are, mostly
    Path("in").mkdir()
    Path("in/eager_a1.ipynb").write_text(json.dumps(notebook))
    totals, _ = grades(Path("in"), Path("out"))
    assert totals == {("eager", "a1"): 20}
    assert "a1: 20 of 20 points" in Path("out/feedback/eager.html").read_text()


def spoil(document, what):
    """Do to a notebook what editors do; Jupyter opens it all the same."""
    code = next(cell for cell in document["cells"] if cell["cell_type"] == "code")
    if what == "no outputs":
        del code["outputs"]
    elif what == "no count":
        del code["execution_count"]
    elif what == "an id before ids":
        document["nbformat_minor"] = 4
    elif what == "an id with a #":
        code["id"] = "#VSC-1a2b"
    elif what == "an unnamed stream":
        code["outputs"] = [{"output_type": "stream", "text": "x"}]
    elif what == "an unnamed kernel":
        document["metadata"]["kernelspec"] = {"name": "python3"}
    elif what == "a strange grade_id":
        document["cells"].append(copy.deepcopy(code))
        document["cells"][-1]["metadata"]["nbgrader"] = {"grade_id": ["a list"]}


@pytest.mark.parametrize(
    "what",
    ["no outputs", "no count", "an id before ids", "an id with a #", "an unnamed stream",
     "an unnamed kernel", "a strange grade_id", "a byte order mark"],
)  # fmt: skip
def test_a_notebook_that_jupyter_opens_is_graded(what, tmp_path):
    document = json.loads(course.sources()["a2"].read_text())
    spoil(document, what)
    encoding = "utf-8-sig" if what == "a byte order mark" else "utf-8"
    (tmp_path / "it.ipynb").write_text(json.dumps(document), encoding)
    merged = run_submission.merge(source("a2"), run_submission.read(tmp_path / "it.ipynb"))
    nbformat.validate(merged)
    assert [c.source for c in solutions(merged)] == [c.source for c in solutions(source("a2"))]


@pytest.mark.parametrize("text", ["", "[]", '{"cells": 5}', '{"cells": [5], "nbformat": 4}'])
def test_what_is_no_notebook_is_refused(text, tmp_path):
    (tmp_path / "it.ipynb").write_text(text)
    with pytest.raises(run_submission.RefusedError, match=r"not a notebook: .+: ."):
        run_submission.read(tmp_path / "it.ipynb")


def test_another_assignments_notebook_is_told(tmp_path):
    with pytest.raises(run_submission.RefusedError, match="is it another's notebook"):
        run_submission.merge(source("a1"), nbformat.v4.new_notebook())


def test_given_functions_may_stand_beside_magics():
    given = nbformat.v4.new_code_cell("%matplotlib inline\n!ls\ndef f():\n    return 1")
    given.metadata.nbgrader = {"grade_id": "f", "locked": True, "grade": False, "solution": False}
    assert run_submission.definitions([given]) == "def f():\n    return 1"


def test_answers_graded_by_hand_wait_for_a_mark(tmp_path, monkeypatch):
    block = {"grade": True, "solution": True, "locked": False, "points": 5, "schema_version": 3}
    block |= {"task": False}
    assignment = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("pass", metadata={"nbgrader": block | {"grade_id": "code"}}),
            nbformat.v4.new_markdown_cell("", metadata={"nbgrader": block | {"grade_id": "text"}}),
        ]
    )
    (tmp_path / "a1.ipynb").write_text(nbformat.writes(assignment))
    monkeypatch.setattr(course, "sources", lambda: {"a1": tmp_path / "a1.ipynb"})
    put(tmp_path / "in", "empty", "a1", assignment)
    assignment.cells.append(nbformat.v4.new_markdown_cell("The answer, in a cell of its own."))
    put(tmp_path / "in", "below", "a1", assignment)
    _, table = grades(tmp_path / "in", tmp_path / "out")
    table = table.set_index(["student", "cell"])["score"]
    assert table["empty", "text"] == 0
    waits = table[[("empty", "code"), ("below", "code"), ("below", "text")]]
    assert waits.isna().all()
    page = tmp_path / "out" / "feedback" / "below.html"
    assert "0 of 0 points, and 10 to be read" in page.read_text()

    (tmp_path / "marks.csv").write_text("student,assignment,cell,score\nbelow,a1,text,3.5\n")
    command = ["course", "grade", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    command += ["--marks", str(tmp_path / "marks.csv")]
    done = CliRunner().invoke(app, command if SANDBOX else [*command, "--no-sandbox"])
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "out" / "grades.csv").set_index(["student", "cell"])
    assert table.loc[("below", "text"), "score"] == 3.5
    assert table.loc[("below", "text"), "reason"] == "marked by hand"
    assert "3.5 of 5 points, and 5 to be read" in page.read_text()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("student,cell\none,x", "it needs the columns student, assignment, cell, score"),
        ("student,assignment,cell,score\none,a1,x,good", "could not convert"),
        ("student,assignment,cell,score\none,a1,y,1", "mark 1 for y of a1 of one: there is no"),
        ("student,assignment,cell,score\none,a1,x,9", "mark 9 for x of .*: the cell has 0 to 4"),
        ("student,assignment,cell,score\none,a1,x,", "the cell has 0 to 4"),
    ],
)
def test_marks_without_a_place_are_refused(rows, message, tmp_path):
    (tmp_path / "marks.csv").write_text(rows)
    graded = {course.Submission("one", "a1", tmp_path): {"cells": {"x": {"points": 4}}}}
    with pytest.raises(course.CourseError, match=message):
        course._mark(graded, course.read_marks(tmp_path / "marks.csv"))


def test_a_student_called_none_has_marks(tmp_path):
    (tmp_path / "marks.csv").write_text("student,assignment,cell,score\nNone,a1,x,1\n")
    assert list(course.read_marks(tmp_path / "marks.csv")["student"]) == ["None"]


def test_missing_answer_is_named(tmp_path):
    notebook = source("a1")
    notebook.cells = [c for c in notebook.cells if c.metadata.nbgrader.grade_id != "build-solution"]
    put(tmp_path / "in", "short", "a1", notebook)
    grades(tmp_path / "in", tmp_path / "out")
    scores = json.loads((tmp_path / "out" / "graded" / "short" / "a1" / "scores.json").read_text())
    assert scores["reason"] == "the cell for the answer build-solution is missing"


def test_what_was_graded_is_not_run_again(tmp_path, monkeypatch):
    put(tmp_path / "in", "one", "a1", source("a1"))
    before, _ = grades(tmp_path / "in", tmp_path / "out")
    monkeypatch.setattr(course, "_run_limited", lambda *args: pytest.fail("ran again"))
    after, _ = grades(tmp_path / "in", tmp_path / "out")
    assert after == before
    assert len(pd.read_csv(tmp_path / "out" / "grades.csv")) == 5


def test_a_file_that_could_not_be_read_is_graded_later(tmp_path, monkeypatch):
    put(tmp_path / "in", "one", "a1", source("a1"))
    (one,), _ = course.collect(tmp_path / "in")
    kept = tmp_path / "out" / "graded" / "one" / "a1"
    kept.mkdir(parents=True)
    identity = course._identity(one, course.sources()["a1"], sandbox=SANDBOX)
    (kept / "identity").write_text(identity)  # as if graded before
    with monkeypatch.context() as patch:
        patch.setattr(course, "_identity", lambda *a, **k: (tmp_path / "not there").read_text())
        totals, table = grades(tmp_path / "in", tmp_path / "out")
    assert totals == {("one", "a1"): 0}
    assert "No such file" in table["reason"][0]
    assert not (kept / "identity").exists()


def test_what_could_not_be_run_is_run_again(tmp_path, monkeypatch):
    put(tmp_path / "in", "one", "a1", source("a1"))
    with monkeypatch.context() as patch:
        patch.setattr(course, "_run_limited", lambda *args: "the disk is full")
        totals, table = grades(tmp_path / "in", tmp_path / "out")
    assert set(table["reason"]) == {"the disk is full"}
    assert totals == {("one", "a1"): 0}
    again, _ = grades(tmp_path / "in", tmp_path / "out")
    assert again == {("one", "a1"): 20}


def test_a_disk_that_is_full_does_not_stop_the_others(tmp_path, monkeypatch):
    put(tmp_path / "in", "one", "a1", source("a1"))
    write_bytes = files.write_bytes

    def full(path, content):
        if path.name == "scores.json":
            raise OSError(28, "No space left on device")
        write_bytes(path, content)

    monkeypatch.setattr(files, "write_bytes", full)
    totals, table = grades(tmp_path / "in", tmp_path / "out")
    assert totals == {("one", "a1"): 0}
    assert table["reason"].str.contains("No space left").all()


def test_an_interrupted_run_does_not_wait(tmp_path, monkeypatch):
    put(tmp_path / "in", "one", "a1", source("a1"))
    ended = []

    def sleep(one, source, kept, hide):
        ended.append(course._run_limited(["sleep", "30"], kept / "log.txt", 60))
        return ended[0]

    def interrupt(tasks):
        while not course._running:
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(course, "_run", sleep)
    monkeypatch.setattr(course, "as_completed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        grades(tmp_path / "in", tmp_path / "out")
    assert ended == ["could not be run (see log.txt)"], "it was killed, and did not end by itself"


@pytest.mark.parametrize("text", ["=1+1", "a\r\nb\x00", "\ud800"])
def test_reasons_are_fit_for_a_table(text):
    cleaned = run_submission.clean(text)
    assert cleaned.encode()
    assert cleaned.isprintable()
    assert not cleaned.startswith("=")


# --- what cannot be graded


def test_a_sandbox_that_does_not_work_stops_the_run(tmp_path, monkeypatch):
    put(tmp_path / "in", "one", "a1", source("a1"))
    refuse = ["sh", "-c", "echo no namespaces here >&2; exit 1", "sh"]
    monkeypatch.setattr(course, "sandboxed", lambda work, hidden: refuse)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    with pytest.raises(course.CourseError, match="no namespaces here"):
        course.grade(tmp_path / "in", tmp_path / "out", console=QUIET)


def test_both_layouts_are_found_and_other_files_named(tmp_path):
    put(tmp_path, "flat", "a1", source("a1"))
    nested = tmp_path / "nested" / "a2"
    nested.mkdir(parents=True)
    nbformat.write(source("a2"), nested / "a2.ipynb")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "x_a9.ipynb").touch()
    (tmp_path / "link_a1.ipynb").symlink_to("/etc/passwd")
    (tmp_path / "._flat_a1.ipynb").touch()  # macOS puts such files into zips
    (tmp_path / ".._a1.ipynb").touch()  # a student whose folder would be outside
    (tmp_path / "m\udcfcller_a1.ipynb").touch()  # no UTF-8: Windows puts such names into zips
    (tmp_path / "BEN_A2.ipynb").touch()
    (tmp_path / "Jo\u0308rg_a1.ipynb").touch()  # as macOS writes it
    (tmp_path / "Ada Lovelace_123_assignsubmission_file_a1.ipynb").touch()  # Moodle
    moodle = tmp_path / "Ada Lovelace_456_assignsubmission_file_"
    moodle.mkdir()
    (moodle / "mine_a2.ipynb").touch()
    (tmp_path / "Ada Lovelace_789_assignsubmission_file_ada_a3.ipynb").touch()
    (tmp_path / "_9_assignsubmission_file_a2.ipynb").touch()  # of nobody
    (tmp_path / "=1+1_a1.ipynb").touch()  # a formula, in a table
    (tmp_path / f"{'x' * 246}_a1.ipynb").touch()  # its page would have no name
    found, others = course.collect(tmp_path)
    assert [(one.student, one.assignment) for one in found] == [
        ("Ada Lovelace", "a1"), ("Ada Lovelace", "a2"), ("Ada Lovelace", "a3"), ("BEN", "a2"),
        ("Jörg", "a1"), ("flat", "a1"), ("nested", "a2"),
    ]  # fmt: skip
    left_out = {"notes.txt", "x_a9.ipynb", "link_a1.ipynb", "._flat_a1.ipynb", ".._a1.ipynb"}
    left_out |= {"m\udcfcller_a1.ipynb", "_9_assignsubmission_file_a2.ipynb"}
    left_out |= {"=1+1_a1.ipynb", f"{'x' * 246}_a1.ipynb"}
    assert {path.name for path in others} == left_out


def test_a_submission_that_is_there_twice_is_named(tmp_path):
    put(tmp_path, "anna", "a1", source("a1"))
    (tmp_path / "anna" / "a1").mkdir(parents=True)
    nbformat.write(source("a1"), tmp_path / "anna" / "a1" / "a1.ipynb")
    both = "a1 of anna is there twice: .*a1.ipynb and .*a1.ipynb; remove one, or give it another"
    with pytest.raises(course.CourseError, match=both):
        course.collect(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    put(tmp_path, "anna", "a1", source("a1"))
    (tmp_path / "lea" / "a1").mkdir(parents=True)
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "lea":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found, others = course.collect(tmp_path)
    assert [one.student for one in found] == ["anna"]
    assert others == [tmp_path / "lea"]


def test_a_folder_that_holds_nothing_is_refused(tmp_path):
    with pytest.raises(course.CourseError, match="holds no submission"):
        course.collect(tmp_path)
    with pytest.raises(course.CourseError, match="there is no folder"):
        course.collect(tmp_path / "none")


def test_without_bubblewrap_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    refused = CliRunner().invoke(app, ["course", "grade", str(tmp_path)])
    assert refused.exit_code == 1
    assert "--no-sandbox" in refused.output
