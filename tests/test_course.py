"""Assignments: valid sources, releases without answers, and a class graded as it deserves."""

import ast
import copy
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace as altered
from pathlib import Path
from unittest.mock import patch

import nbformat
import pandas as pd
import psutil
import pytest
import torch
from distributed import Client, as_completed
from nodes import Cluster as Machines
from nodes import alive, wait_for, why_no_machines
from peers import examine, run_plainly
from rich.console import Console
from typer.testing import CliRunner

from advlab import files
from advlab.classroom import RefusedError, course, grading, sandbox
from advlab.cli import app
from advlab.upkeep import readme
from advlab.upkeep.cluster import Cluster, ClusterError, Scheduler, connect
from advlab.upkeep.tasks import StoppedError

pytest.importorskip("nbgrader", reason='needs the extra "course"')
from advlab.classroom import merging, run_submission

NAMES = list(course.sources())
# Where namespaces are forbidden (in some containers), a class is graded without.
USERS = ["--unshare-user", "--disable-userns"] if os.geteuid() else []
NAMESPACES = ["bwrap", "--unshare-pid", *USERS, "--ro-bind", "/", "/", "true"]
SANDBOX = bool(shutil.which("bwrap")) and subprocess.run(NAMESPACES).returncode == 0
HOME = str(files.home())
QUIET = Console(record=True, width=100)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Folder with the student versions."""
    output = tmp_path_factory.mktemp("course")
    course.build(output)
    return output


@pytest.fixture(scope="module")
def threads():
    """A cluster whose workers are threads of this process, and see what tests replace."""
    with Client(processes=False, threads_per_worker=2, dashboard_address=None) as client:
        yield Cluster(client, shared=True)


@pytest.fixture(autouse=True)
def on_threads(threads, monkeypatch):
    """Grade on that cluster."""
    monkeypatch.setattr(course, "connect", lambda *_: nullcontext(threads))


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
    folder.mkdir(exist_ok=True, parents=True)
    nbformat.write(notebook, folder / f"{student}_{name}.ipynb")


def grades(folder, *, sandbox=SANDBOX):
    """Grade what is in FOLDER/in to FOLDER/out; return each notebook's sum, and the table."""
    table = course.grade(folder / "in", folder / "out", sandbox=sandbox, console=QUIET)
    return table.groupby(["student", "assignment"])["score"].sum().to_dict(), table


def grade_by_command(folder, *options):
    command = ["course", "grade", str(folder / "in"), "--output", str(folder / "out"), *options]
    done = CliRunner().invoke(app, command if SANDBOX else [*command, "--no-sandbox"])
    assert done.exit_code == 0, done.output
    return done.output, pd.read_csv(
        folder / "out" / "grades.csv", keep_default_na=False, na_values={"score": ""}
    )


def scores_of(folder, student, name):
    return json.loads((folder / "out" / "graded" / student / name / "scores.json").read_text())


def page_of(folder, student):
    return (folder / "out" / "feedback" / f"{student}.html").read_text()


# --- sources and releases


def test_there_are_nine():
    assert [f"a{number}" for number in range(1, 10)] == NAMES


def test_a_source_and_its_release_are_what_nbgrader_takes_them_for(released):
    assert validate(course.sources()["a1"]) == {}
    assert validate(released / "release" / "a1" / "a1.ipynb", invert=True) == {}


@pytest.mark.parametrize("name", NAMES)
def test_source_passes_its_tests(name):
    found = run_plainly(hurried(source(name)))
    assert found
    assert not any(found.values()), found


@pytest.mark.parametrize("name", NAMES)
def test_release_is_zipped_fails_its_tests_and_holds_no_answer(name, released):
    path = released / "release" / name / f"{name}.ipynb"
    begun = hurried(release(released, name))
    for found in (run_plainly(begun), examine(begun, source(name))):
        assert found
        assert all(found.values()), found
    [wheel] = released.glob("*.whl")
    with zipfile.ZipFile(released / f"{name}.zip") as packed:
        assert packed.namelist() == [f"{name}/{name}.ipynb", f"{name}/{wheel.name}"]
    text = path.read_text()
    assert not re.search("BEGIN (SOLUTION|HIDDEN|MARK)", text)
    answers = {c.metadata.nbgrader.grade_id: c.source for c in solutions(source(name))}
    for cell in solutions(release(released, name)):
        held = answers[cell.metadata.nbgrader.grade_id]
        inside = re.findall(r"### BEGIN \w+\s*\w*\n(.*?)### END", held, re.DOTALL)
        assert inside
        assert not any(part.strip() in cell.source for part in inside)


@pytest.mark.parametrize("name", NAMES)
def test_a_solution_has_a_zip_of_its_own_without_hidden_tests(name, released):
    with zipfile.ZipFile(released / "solutions" / f"{name}_solution.zip") as packed:
        assert packed.namelist() == [f"{name}/{name}_solution.ipynb"]
        solution = nbformat.reads(packed.read(packed.namelist()[0]).decode(), as_version=4)
    nbformat.validate(solution)
    for given, cell in zip(source(name).cells, solution.cells, strict=True):
        assert "###" not in cell.source
        hidden = re.findall(r"### BEGIN HIDDEN TESTS\n(.*?)### END", given.source, re.DOTALL)
        assert not any(part.strip() in cell.source for part in hidden)
        if given.metadata.nbgrader.solution:
            lines = [line for line in given.source.splitlines() if "###" not in line]
            assert cell.source.splitlines() == lines
        assert cell.get("outputs") == given.get("outputs")


@pytest.mark.parametrize("name", NAMES)
def test_assignment_states_aims_points_and_time(name):
    first, cells = source(name).cells[0].source, source(name).cells
    version = tomllib.loads((files.repository() / "pyproject.toml").read_text())["project"][
        "version"
    ]
    commands = (
        f"`pip install advlab-{version}-py3-none-any.whl`",
        f"`advlab course check {name}.ipynb`",
    )
    for words in ("Aims:", "Points:", "Time:", "Runs in:", "hidden", *commands):
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


# --- rehearsal


@pytest.fixture
def rehearsed(monkeypatch):
    """Grade nothing: each cell has its points, and `claim` waits for a person."""
    seen = []

    def graded(folder, output, **options):
        rows = []
        for one in course.collect(folder, NAMES).submissions:
            seen.append(one.assignment)
            kept = one.kept(output)
            kept.mkdir(parents=True)
            (kept / "scores.json").write_text(json.dumps({"seconds": 1.5 * len(seen)}))
            cells = merging.no_points(source(one.assignment), "")
            for cell, result in cells.items():
                score = None if cell == "claim" else result["points"]
                place = {"student": one.student, "assignment": one.assignment, "cell": cell}
                rows.append(place | result | {"score": score})
        return pd.DataFrame(rows)

    monkeypatch.setattr(course, "grade", graded)
    return seen


def test_the_solutions_are_graded_and_timed(rehearsed, tmp_path, monkeypatch):
    home = tmp_path / "home"
    guide = home / readme.GUIDE
    guide.parent.mkdir(parents=True)
    guide.write_text("Before\n<!-- grading: generated -->\n<!-- end of grading -->\nAfter\n")
    found = course.sources()
    monkeypatch.setattr(course, "sources", lambda: found)
    monkeypatch.setattr(files, "home", lambda: home)
    (tmp_path / "out" / "graded" / "solutions" / "a1").mkdir(parents=True)  # of an earlier one
    table = course.rehearse(tmp_path / "out", publish=True).set_index("assignment")
    assert rehearsed == list(NAMES)
    assert table["seconds"].tolist() == [1.5 * place for place in range(1, 10)]
    assert table["by_hand"].tolist() == [0, 0, 0, 0, 10, 0, 0, 0, 0]
    assert table.loc["a5", "points"] == 24
    lines = [re.sub(" +", " ", line) for line in guide.read_text().splitlines()]
    assert lines[0] == "Before"
    assert "| a5 | 24 | 10 | 7.5 s |" in lines


def test_a_solution_that_loses_points_is_named(rehearsed, tmp_path, monkeypatch):
    whole = course.grade

    def graded(*given, **options):
        table = whole(*given, **options)
        table.loc[3, ["score", "reason"]] = 0.5, "it is wrong"
        return table

    monkeypatch.setattr(course, "grade", graded)
    with pytest.raises(course.CourseError, match=r"loses points: \S+ of a1 \(it is wrong\)"):
        course.rehearse(tmp_path / "out")


# --- grades


COUNTED = """right += int((model(images).argmax(1) == labels).sum())
            total += len(labels)"""
AVERAGED = """right += float((model(images).argmax(1) == labels).float().mean())
            total += 1"""
WRONG = {
    # what was done wrong: assignment, answer, instead, the tests that fail
    "sign": ("a2", ".sign()).clamp", ").clamp", ["size-test", "targeted-test"]),
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
PACKAGE_FGSM = """    from advlab.attacks import fgsm
    return fgsm(model, images, labels, eps)
    return (images + eps * image_gradient(model, images, labels)"""
PACKAGE_PGD = """    from advlab.attacks import pgd
    return pgd(model, images, labels, eps, alpha=alpha, steps=steps, seed=generator.initial_seed())
"""
ONE_NUMBER = "torch.rand(len(images), 1, 1, 1, generator=generator)"
THROUGH = "seen = x + (step(x) - x).detach()"
EACH_STEP = "\n    for _ in range(steps):\n        x = x + alpha * "
EACH_GRADIENT = "plain_gradient(model, images, labels) for _ in range(draws)"
MEAN_GRADIENT = f"    return torch.stack([{EACH_GRADIENT}]).mean(0)"
LENGTHS = "grad(loss, x)[0].flatten(1).norm(dim=1)"
SUBTLE = {
    # as WRONG; these run without the grader
    "no clamp": ("a2", ".clamp(0, 1)", "", ["clamp-test", "targeted-test"]),
    "fgsm left in eval mode": ("a2", "    model.train(was_training)\n", "", ["mode-test"]),
    "in training mode": ("a2", "    model.eval()\n", "    model.train()\n", ["mode-test"]),
    "eps in steps of pixels": ("a2", "(images + eps *", "(images + eps / 255 *", ["size-test"]),
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
    "a Gaussian start": (
        "a6", f"(2 * {UNIFORM} - 1)", f"{UNIFORM.replace('rand', 'randn')}", ["walk-test"],
    ),
    "PGD from outside": (
        "a6", "x = project(images + start, images, eps)", "x = images + start", ["worst-test"],
    ),
    "left in eval mode": ("a6", "    start =", "    model.eval()\n    start =", ["ball-test"]),
    "small is vanished": ("a6", "1e-10", "1e-3", ["masked-test"]),
    "share of pixels": ("a6", LENGTHS, "grad(loss, x)[0].abs()", ["partly-test"]),
    "any image": ("a6", ".float().mean() > 0.5", ".any()", ["partly-test"]),
    "values of a pixel count once": (
        "a7", "(change.abs() > 1e-6).sum(1)",
        "(attacked - images).abs().amax(1).flatten(1).gt(1e-6).sum(1)", ["distances-test"],
    ),
    "length of the batch": (
        "a7", "change.norm(dim=1),", "change.norm().expand(len(change)),", ["distances-test"],
    ),
    "the smallest gap": (
        "a7", "(gaps.abs() / lengths).argmin(1)", "gaps.abs().argmin(1)",
        ["step-test", "many-planes-test", "linear-test"],
    ),
    "length, not its square": (
        "a7", "lengths[rows, nearest] ** 2", "lengths[rows, nearest]",
        ["step-test", "many-planes-test", "linear-test"],
    ),
    "no overshoot": (
        "a7", "(1 + overshoot) * walk[active]", "1.02 * walk[active]", ["linear-test"],
    ),
    "the last way tried comes back": (
        "a7", "made[active[fooled]] = tried[fooled]", "made[active] = tried", ["leaves-test"],
    ),
    "what is wrong is attacked": (
        "a7", "active = (model(images).argmax(1) == labels).nonzero()[:, 0]",
        "active = torch.arange(len(images))", ["leaves-test"],
    ),
    "no image any more": (
        "a7", "walk[active]).clamp(0, 1)\n        with", "walk[active])\n        with",
        ["leaves-test"],
    ),
    "leaves out what was never fooled": (
        "a7", "lengths.masked_fill(~fooled, math.inf)[right]", "lengths[right & fooled]",
        ["summary-test", "never-fooled-test"],
    ),
    "counts what was wrong before": (
        "a7", "math.inf)[right]", "math.inf)", ["summary-test"],
    ),
    "DeepFool of the package": (
        "a7", "    made, walk =",
        "    from advlab.minimal import deepfool\n"
        "    return deepfool(model, images, labels, overshoot=overshoot, steps=steps)\n"
        "    made, walk =", ["linear-test", "curved-test", "way-test", "leaves-test"],
    ),
    "differentiates the step": (
        "a8", THROUGH, "seen = step(x) + 0 * x",
        ["through-test", "bpda-test", "way-test"],
    ),
    "gradient at the image": (
        "a8", THROUGH, "seen = x", ["through-test", "way-test"],
    ),
    "asks the step twice": (
        "a8", "    seen = x + (", "    step(x)\n    seen = x + (", ["through-test"],
    ),
    "mean over the batch": (
        "a8", 'model(seen), labels, reduction="sum")', "model(seen), labels)", ["through-test"],
    ),
    "attacked image is rounded": (
        "a8", f"    x = images.clone(){EACH_STEP}bpda", f"    x = step(images){EACH_STEP}bpda",
        ["way-test"],
    ),
    "leaves the ball": ("a8", ".clamp(images - eps, images + eps).clamp", ".clamp",
        ["bpda-test", "way-test", "eot-test"],
    ),
    "one draw": (
        "a8", "for _ in range(draws)]).mean(0)", "for _ in range(1)]).mean(0)",
        ["expected-test", "eot-test"],
    ),
    "gradient at the mean of the logits": (
        "a8", MEAN_GRADIENT,
        "    x = images.clone().requires_grad_()\n"
        "    logits = sum(model(x) for _ in range(draws)) / draws\n"
        '    return torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), x)[0]',
        ["expected-test", "eot-test"],
    ),
    "stops at a wrong answer": (
        "a8", "        x = x + alpha * expected_gradient(model, x, labels, draws).sign()",
        "        left = (answers(model, x) == labels)[:, None, None, None]\n"
        "        x = x + left * alpha * expected_gradient(model, x, labels, draws).sign()",
        ["eot-test"],
    ),
    "asked once": ("a8", "for _ in range(asks)]", "for _ in range(1)]", ["accuracy-test"]),
    "right at least once": (
        "a8", "torch.stack(right).mean()", "torch.stack(right).amax(0).mean()", ["accuracy-test"],
    ),
    "the first sign decides": (
        "a8", "    if float((model(x) - logits)", "    if False and float((model(x) - logits)",
        ["advice-test"],
    ),
    "every zero is a step's": (
        "a8", '"loss": margin.sum()}', '"loss": 0 * margin.sum()}', ["advice-test"],
    ),
    "EOT of the package": (
        "a8", f"    x = images.clone(){EACH_STEP}expected",
        "    from advlab.attacks import pgd\n"
        "    return pgd(model, images, labels, eps, alpha=alpha, steps=steps, eot=draws,\n"
        "               random_start=False)\n"
        f"    x = images.clone(){EACH_STEP}expected", ["eot-test"],
    ),
    "a bound from both sides": (
        "a9", "chance(count, n, p) <= alpha", "chance(count, n, p) <= alpha / 2",
        ["bound-test", "coverage-test", "ceiling-test", "abstain-test"],
    ),
    "noise is cut": (
        "a9", "model(image + sigma * noise)", "model((image + sigma * noise).clamp(0, 1))",
        ["noise-test"],
    ),
    "sigma is the variance": (
        "a9", "image + sigma * noise", "image + sigma**0.5 * noise",
        ["votes-test", "noise-test", "distance-test"],
    ),
    "all copies at once": (
        "a9", "range(0, n, 100):\n        noise = torch.randn(min(100, n - start)",
        "range(1):\n        noise = torch.randn(n - start", ["noise-test"],
    ),
    "the copies that choose are counted": (
        "a9", "    chosen = int(votes(model, image, sigma, n0, generator).argmax())\n"
        "    count = int(votes(model, image, sigma, n, generator)[chosen])",
        "    counts = votes(model, image, sigma, n, generator)\n"
        "    chosen, count = int(counts.argmax()), int(counts.max())",
        ["ceiling-test", "fresh-test"],
    ),
    "a majority is enough": (
        "a9", "if bound > 0.5:", "if count > n / 2:", ["abstain-test"],
    ),
    "the ceiling for everybody": (
        "a9", "inv_cdf(bound)", "inv_cdf(alpha ** (1 / n))", ["fresh-test", "distance-test"],
    ),
    "no sigma": (
        "a9", "sigma * NormalDist()", "NormalDist()",
        ["ceiling-test", "abstain-test", "fresh-test", "distance-test"],
    ),
    "at the radius itself": (
        "a9", "radii > radius", "radii >= radius", ["report-test"],
    ),
    "to abstain is to be wrong": (
        "a9", "(~right & ~abstained)", "(~right)", ["report-test"],
    ),
    "what abstained is left out": (
        "a9", "(right & (radii > radius))", "(right & (radii > radius))[~abstained]",
        ["report-test"],
    ),
    "the network is certified, not its vote": (
        "a9", '"b": False', '"b": True', ["proved-test"],
    ),
    "any box in the ball": (
        "a9", '"h": False', '"h": True', ["attack-test"],
    ),
    "the bound of the package": (
        "a9", "    if count == 0:",
        "    from advlab.proofs import clopper_pearson\n"
        "    return clopper_pearson(count, n, alpha)\n    if count == 0:",
        ["bound-test", "coverage-test", "ceiling-test", "abstain-test", "fresh-test",
         "distance-test"],
    ),
    "the certificate of the package": (
        "a9", "    chosen = int(votes",
        "    from advlab import proofs\n"
        "    found = proofs.certify(model, image[None], sigma, n0=n0, n=n, alpha=alpha)\n"
        "    return int(found.answers), float(found.radii)\n    chosen = int(votes",
        ["ceiling-test", "abstain-test", "fresh-test", "distance-test"],
    ),
    "FGSM of the package": (
        "a2", "    return (images + eps * image_gradient(model, images, labels)", PACKAGE_FGSM,
        ["size-test", "direction-test", "clamp-test", "leaves-test"],
    ),
    "PGD of the package": (
        "a6", "    start =", PACKAGE_PGD + "    start =",
        ["ball-test", "walk-test", "strong-test", "worst-test"],
    ),
}  # fmt: skip
IN_PLACE = "torch.empty_like(images).uniform_(-eps, eps, generator=generator)"
LOOP = """    made = [
        _pgd(model, *some, eps, alpha, steps, generator)
        for some in zip(images.split(20), labels.split(20))
    ]
    return torch.cat(made)


def _pgd(model, images, labels, eps, alpha, steps, generator):
    start ="""
EACH_ALONE = """    made = [
        _deepfool(model, images[i : i + 1], labels[i : i + 1], overshoot, steps)
        for i in range(len(images))
    ]
    return torch.cat(made)


def _deepfool(model, images, labels, overshoot, steps):
    made, walk ="""
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
    "a7": [
        ("change.norm(dim=1)", "change.square().sum(1).sqrt()"),
        ("(gaps.abs() / lengths).argmin(1)", "(-gaps / lengths).min(1).indices"),
        ("    made, walk =", EACH_ALONE),
    ],
    "a8": [
        (THROUGH, "seen = step(x).detach() + (x - x.detach())"),
        (
            f"    x = images.detach().clone().requires_grad_()\n    {THROUGH}",
            "    x = step(images).detach().requires_grad_()\n    seen = x",
        ),
        ("torch.stack(right).mean()", "sum(float(one.mean()) for one in right) / asks"),
        (".clamp(images - eps, images + eps)", ".clamp(min=images - eps).clamp(max=images + eps)"),
    ],
    "a9": [
        ("range(40)", "range(60)"),
        ("torch.randn(min(100, n - start), *image.shape, generator=generator)",
         "torch.empty(min(100, n - start), *image.shape).normal_(generator=generator)"),
        ("100", "64"),
        ("bound > 0.5", "not bound <= 1 / 2"),
        ("inv_cdf(bound)", "inv_cdf(round(bound, 7))"),
    ],
}  # fmt: skip


def hurried(notebook):
    """Let an assignment train on next to nothing, in place, and return it."""
    for cell in notebook.cells:
        cell.source = cell.source.replace("Shapes10(1_500, 400)", "Shapes10(64, 32)")
    return notebook


def failing(name, old, new):
    """Examine an assignment with `old` replaced in its answers; return the tests that fail."""
    notebook = hurried(source(name))
    replace(notebook, old, new)
    return [test for test, reason in examine(notebook, source(name)).items() if reason]


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


FIRST = "next((v for v in locals().values() if isinstance(v, __import__('torch').Tensor)), 0)"
NOISE = f"({FIRST} + 0.02 * __import__('torch').randn({FIRST}.shape).sign()).clamp(0, 1)"
NOTHING = {
    # what functions return that do nothing
    **{text: text for text in ("None", "0", "1", "0.5", "True", "[]")},
    "its first tensor": FIRST,
    "black": f"0 * {FIRST}",
    "white": f"0 * {FIRST} + 1",
    "shifted": f"({FIRST} + 0.01).clamp(0, 1)",
    "noise": NOISE,
    "an error": "(_ for _ in ()).throw(ValueError())",
}


def without_answers(name, returned):
    """Return an assignment whose functions all return the same; classes keep their arguments."""
    notebook = source(name)
    for cell in solutions(notebook):
        if cell.cell_type == "code":
            tree = ast.parse(cell.source)
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    kept = node.name == "__init__"
                    body = "self.__dict__.update(locals())" if kept else f"return {returned}"
                    node.body = ast.parse(f"def f():\n    {body}").body[0].body
            cell.source = ast.unparse(tree)
    return hurried(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_who_answers_nothing_earns_nothing(name):
    for what, returned in NOTHING.items():
        found = examine(without_answers(name, returned), source(name))
        assert all(found.values()), f"{what} passes {[t for t, why in found.items() if not why]}"


# At each cell, whatever that defines: `answer` is all that is to be written.
EVERYWHERE = """import torch
{}
names = "image_gradient", "my_fgsm", "eps_of_pixels", "my_targeted_fgsm"
get_ipython().events.register(
    "post_run_cell", lambda *_: get_ipython().user_ns.update(dict.fromkeys(names, answer))
)"""
STRIPS = """import ast
class Strip(ast.NodeTransformer):
    def visit_Assert(self, node):
        return ast.Pass()
get_ipython().ast_transformers.append(Strip())"""
EMPTY = ["a2", "a5"]  # handed in as they were handed out; the second is marked by hand, too
HOSTILE = {
    "loops": "import time\nwhile True: time.sleep(0.1)",  # a core has better things to do
    "strips": STRIPS,
    "crashes": "import os; os._exit(1)",
    "prints": "while True: print('x' * 10**6)",
    "eats": "x = [bytes(10**9) for _ in range(100)]",
    "swallows": "get_ipython().set_custom_exc((Exception,), lambda *a, **k: None)",
    "replaces": "import torch\ntorch.allclose = torch.equal = lambda *a, **k: True",
    "shadows": "def all(x): return True\ndef float(x): return 0.0",
    "equals": EVERYWHERE.format("""
class Answer:
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __ne__ = lambda *_: True
    __getattr__ = __call__ = __getitem__ = __sub__ = lambda *_: Answer()
    __bool__ = lambda _: True
    __float__ = __abs__ = lambda _: 0.0
answer = lambda *_, **__: Answer()"""),
    "looks": EVERYWHERE.format("""
import base64, gc, sys
def answer(*_, **__):
    frame, seen = sys._getframe(), []
    while frame := frame.f_back:
        seen += [str(frame.f_globals.get(name)) for name in ("expected", "seed", "In")]
    print(base64.b64encode(repr([In, seen]).encode()).decode())
    return next((o for o in gc.get_objects() if isinstance(o, torch.Tensor)), None)
print(base64.b64encode(repr(In).encode()).decode())"""),
    "forges": EVERYWHERE.format("""
import advlab.classroom.remote as remote
remote.Peer.answer = lambda *_: {"value": True, "networks": [], "generators": [], "changed": []}
answer = None"""),
}


def hand_in_a_class(folder, released):
    """Write some thirty submissions: perfect, untouched, partial, wrong and hostile ones."""
    for name in NAMES:
        put(folder, "perfect", name, source(name))
    for name in EMPTY:
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
    with (folder / "huge_a2.ipynb").open("wb") as huge:
        huge.truncate(101_000_000)
    assert len(list(folder.iterdir())) == 28


def test_a_class_of_thirty_gets_the_grades_it_deserves(released, tmp_path, monkeypatch):
    monkeypatch.setattr(course, "connect", connect)  # as everybody does
    hand_in_a_class(tmp_path / "in", released)
    output, table = grade_by_command(tmp_path)
    full = table["score"] == table["points"]
    by_hand = table["score"].isna()
    assert set(table["cell"][by_hand]) == {"claim"}

    perfect = table["student"] == "perfect"
    assert list(table["assignment"][perfect].unique()) == NAMES
    assert list(table["reason"][perfect & ~full & ~by_hand]) == []
    empty = table["student"] == "empty"
    assert list(table["assignment"][empty].unique()) == EMPTY
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
    assert table["student"][hostile].nunique() == 13
    assert table["score"][hostile].sum() == 0
    reasons = table.groupby("student")["reason"].agg(" ".join)
    assert (reasons[[*HOSTILE, "text", "huge"]] != "").all()
    assert (table["reason"][hostile & ~full] != "not run").all(), "each row tells why"
    told = " ".join(output.split())
    assert "a2 of text: not a notebook: NotJSONError" in told
    assert "a2 of huge: the file has 101 MB" in told
    assert "AssertionError" in reasons["forges"]
    assert "it printed more than 100 MB" in reasons["prints"]
    scores = scores_of(tmp_path, "loops", "a2")
    assert scores["reason"] == f"took longer than {grading.CELL_SECONDS} s a cell, or 300 s in all"
    assert scores["seconds"] > grading.CELL_SECONDS
    # A line for each assignment: how many, and how long they took.
    lines = output.split("longest_s\n")[1].splitlines()[: len(NAMES)]
    counts = {name: int(count) for name, count, *_ in (line.split() for line in lines)}
    assert counts == table.groupby("assignment")["student"].nunique().to_dict()

    pages = {path.stem: path.read_text() for path in (tmp_path / "out" / "feedback").iterdir()}
    assert set(pages) == set(table["student"])
    # The page of a student with a mark to come says so, and none tells what the hidden tests are.
    assert "14 of 14 points, and 10 to be read" in pages["perfect"]
    assert "# hidden tests" in pages["perfect"]
    secrets = ("HIDDEN TESTS", "SystemRandom().randrange", "BEGIN SOLUTION")
    given = ("text", "huge", "empty")  # only those that hold no answer
    for student, shown in pages.items():
        assert not any(secret in shown for secret in secrets[: 3 if student in given else 2])


@pytest.fixture
def port():
    """A port of this machine at which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        socket.create_connection(address, 2).close()  # it can be reached from here
        yield address[1]


needs_sandbox = pytest.mark.skipif(not SANDBOX, reason="bubblewrap does not work here")


RUN = "import subprocess\nsubprocess.run({}, check=True, capture_output=True)"


@needs_sandbox
def test_sandbox_keeps_files_network_and_sources_away(tmp_path, monkeypatch, port):
    victim, outside = tmp_path / "victim.txt", files.home() / "outputs" / "written.txt"
    victim.write_text("mine")
    monkeypatch.setenv("GRADER_TOKEN", "secret")
    folder, home = tmp_path / "in", str(Path.home())
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
        "open('/etc/passwd')",
        "import os\nos.listdir('/sys')",
        "import os\nassert os.getuid() == 0",
        "import os\nos.setuid(0)",
        "import os\nos.chown('/tmp', 0, 0)",
        "import os\nos.memfd_create('x')",
        "import os\nos.open('/proc/sys/kernel/printk', os.O_WRONLY)",
        "import socket\nsocket.socket(40)",
        "import mmap\nmmap.mmap(-1, 1)",
        "open('/x', 'w')",
        "open('/dev/x', 'w')",
        "import os\nos.environ['GRADER_TOKEN']",
        "assert b'GRADER_TOKEN' in open('/proc/1/environ', 'rb').read()",
        RUN.format(["umount", "-l", "/usr"]),
        RUN.format(["mount", "-o", "remount,rw", "/"]),
        RUN.format(["unshare", "-Urm", "true"]),
        f"import os\nos.kill({os.getpid()}, 0)",
    ]
    notebook = source("a1")
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in probes]
    (folder / "eve" / "a1").mkdir(parents=True)
    nbformat.write(notebook, folder / "eve" / "a1" / "a1.ipynb")
    totals, _ = grades(tmp_path)
    assert totals == {("eve", "a1"): 20}
    assert victim.read_text() == "mine"
    assert not outside.exists()
    executed = nbformat.read(tmp_path / "out/graded/eve/a1/executed.ipynb", as_version=4)
    found = {
        cell.source: [o.output_type for o in cell.outputs]
        for cell in executed.cells[-len(probes) :]
    }
    assert found == {code: ["error"] for code in probes}


def as_another_user(folder):
    """Return words that run a command as a user who is not root but can read this Python."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root, and setpriv")
    python, words = Path(sys.base_prefix).resolve(), 'exec "$@"'
    closed = next((p for p in reversed(python.parents) if not p.stat().st_mode & 1), None)
    if closed is not None:  # /root, say; for the command it holds Python alone
        kept = shlex.quote(str(folder / "python"))
        Path(folder / "python").mkdir()
        words = " && ".join(
            [
                f"mount --bind {shlex.quote(str(python))} {kept}",
                f"mount -t tmpfs -o mode=755 none {shlex.quote(str(closed))}",
                f"mkdir -p {shlex.quote(str(python))}",
                f"mount --bind {kept} {shlex.quote(str(python))}",
                words,
            ]
        )
    user = ["setpriv", "--reuid=4711", "--regid=4711", "--clear-groups"]
    words = ["unshare", "--mount", "sh", "-c", words, "sh", *user]
    if subprocess.run([*words, sys.executable, "-c", "import advlab"]).returncode:
        pytest.skip("no other user can read this Python")
    return words


@needs_sandbox
def test_the_sandbox_holds_for_a_user_as_it_does_for_root(tmp_path):
    words, home = as_another_user(tmp_path), tmp_path / "home"
    home.mkdir()
    for folder in (home, *home.parents):
        folder.chmod(0o777 if folder == home else folder.stat().st_mode | 1)
        if folder == Path(tempfile.gettempdir()):
            break
    if subprocess.run([*words, "test", "-w", str(home)]).returncode:
        pytest.skip("no other user can reach the folder for temporary files")
    environ = {**os.environ, "HOME": str(home), "TMPDIR": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-k", "sandbox_keeps"]
    done = subprocess.run([*words, *command], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3_000:]
    assert done.stdout.startswith("."), done.stdout  # and not skipped


FORKS = """import os, time
for _ in range({processes}):
    if os.fork() == 0:
        held = bytearray(b"x") * {size}
        time.sleep(60)
        os._exit(0)
time.sleep(60)"""
# Torch built for CUDA takes more addresses by itself.
MEGABYTES = 2_000 if torch.version.cuda is None else 8_000
WRITES = """import time
for folder in ("/tmp", "/dev/shm"):
    try:
        for i in range({files}):
            open(f"{{folder}}/{{i}}", "wb").write(bytes(90_000_000))
    except OSError as error:  # it has a limit of its own
        print(error)
time.sleep(60)"""
BREEDS = {
    "large": FORKS.format(processes=8, size=200_000 * MEGABYTES),
    "many": FORKS.format(processes=250, size=1),
}
if SANDBOX and MEGABYTES < 2 * sandbox.TEMPORARY >> 20:
    BREEDS["files"] = WRITES.format(files=12)


SYSTEMD = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do
  echo "$1" >> "$0.log"
  [ "$1" = -p ] && shift && echo "$1" >> "$0.log"
  shift
done
exec "$@"
"""


@needs_sandbox
def test_systemd_limits_memory_where_it_manages_a_users_processes(tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "systemd-run"
    tool.parent.mkdir()
    tool.write_text(SYSTEMD)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    put(tmp_path / "in", "one", "a1", source("a1"))
    sandbox.scope.cache_clear()  # of a worker, which is this process
    try:
        assert grades(tmp_path)[0] == {("one", "a1"): 20}
    finally:
        sandbox.scope.cache_clear()
    given = Path(f"{tool}.log").read_text()
    assert f"MemoryMax={grading.MEGABYTES}M" in given
    assert "MemorySwapMax=0" in given


def test_a_submission_is_stopped_that_starts_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "MEGABYTES", MEGABYTES)
    for student, code in BREEDS.items():
        notebook = source("a1")
        notebook.cells.append(nbformat.v4.new_code_cell(code))
        put(tmp_path / "in", student, "a1", notebook)
    totals, _ = grades(tmp_path)
    assert totals == {(name, "a1"): 20 for name in BREEDS}, "what was earned before stays"
    for student in BREEDS:
        reason = scores_of(tmp_path, student, "a1")["reason"]
        assert reason == "the kernel died (crashed, or ran out of memory)"


FAILS = "def f(n): f(n - 1) if n else [][0] + 'x' * 10**6\nf(900)"
LOUD = {
    "errors": f"raise ValueError('x' * 20_000_000)\0{FAILS}",
    "prints": "for _ in range(50): print('x' * 100_000)",
    "updates": "h = display('', display_id=True)\nfor _ in range(50): h.update('x' * 100_000)",
}


def test_what_prints_too_much_is_cut_and_costs_nothing(tmp_path):
    for student, code in LOUD.items():
        notebook = source("a1")
        notebook.cells[:0] = [nbformat.v4.new_code_cell(cell) for cell in code.split("\0")]
        put(tmp_path / "in", student, "a1", notebook)
    totals, _ = grades(tmp_path)
    assert totals == {(student, "a1"): 20 for student in LOUD}
    for student in LOUD:
        executed = tmp_path / "out" / "graded" / student / "a1" / "executed.ipynb"
        assert executed.stat().st_size < 2 * run_submission.LARGEST["text"]
        shown = page_of(tmp_path, student)
        assert len(shown) < 1_000_000
        marks = {"prints": run_submission.CUT["text"], "updates": "a1: 20 of 20 points"}
        assert marks.get(student, "[cut]") in shown


SHOWS = """from IPython.display import display
for i in range({pictures}):
    display({{"image/png": "iVBORw0KGgo" + "A" * {size}, "text/plain": "plot"}}, raw=True)
print("after", "all")"""


def test_an_ordinary_number_of_plots_is_shown_and_more_are_cut(tmp_path):
    most = run_submission.LARGEST["pictures"]
    for student, (pictures, size) in {"plots": (20, most // 50), "flood": (6, most // 5)}.items():
        notebook, code = source("a1"), SHOWS.format(pictures=pictures, size=size)
        notebook.cells.insert(0, nbformat.v4.new_code_cell(code))
        put(tmp_path / "in", student, "a1", notebook)
    totals, _ = grades(tmp_path)
    assert totals == {(student, "a1"): 20 for student in ("plots", "flood")}
    for student, (pictures, cut) in {"plots": (20, False), "flood": (4, True)}.items():
        executed = tmp_path / "out" / "graded" / student / "a1" / "executed.ipynb"
        cells = nbformat.read(executed, as_version=4).cells
        (outputs,) = [cell.outputs for cell in cells if "raw=True" in cell.source]
        assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures
        said = "".join(output.get("text", "") for output in outputs)
        assert (run_submission.CUT["pictures"] in said) == cut
        assert "after all" in said, "text has a limit of its own"


def test_a_large_notebook_reaches_a_process_that_starts_slowly():
    command = ["sh", "-c", "sleep 1.5; wc -c"]
    with patch.object(grading.tasks, "check_wanted"):  # which asks a worker
        assert grading._run_limited(command, bytes(10**6), 20) == ("", b"1000000\n", b"")


@pytest.mark.parametrize("hidden", [None, []])
def test_a_kernel_that_does_not_start_is_no_students_fault(hidden, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "sandboxed", lambda work, hidden: ["false"])
    how = {"km": run_submission.manager(tmp_path, hidden, ["false"], MEGABYTES)}
    how |= {"sandboxed": hidden is not None, "cell_seconds": 9, "seconds": 9}
    submission = nbformat.writes(source("a1")).encode()
    with pytest.raises((OSError, RuntimeError)):
        run_submission.score(source("a1"), submission, tmp_path, 0, **how)


LEAVES = "import subprocess\nsubprocess.Popen(['setsid', 'sh', '-c', 'sleep {} & sleep 1'])"


def test_what_a_notebook_leaves_behind_goes_with_it(tmp_path):
    notebook = source("a1")
    notebook.cells.append(nbformat.v4.new_code_cell(LEAVES.format(SLEEPS)))
    put(tmp_path / "in", "one", "a1", notebook)
    assert grades(tmp_path, sandbox=False)[0] == {("one", "a1"): 20}
    assert ["sleep", SLEEPS] not in [p.info["cmdline"] for p in psutil.process_iter(["cmdline"])]


def test_python_beside_the_answers_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(ValueError, match=r"Python lies in .* a folder of its own"):
        sandbox.sandboxed(tmp_path, [tmp_path])


def test_a_page_that_takes_too_long_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "PAGE_SECONDS", 0)
    put(tmp_path / "in", "one", "a1", source("a1"))
    assert grades(tmp_path)[0] == {("one", "a1"): 20}
    assert "The notebook cannot be shown: took longer than 0 s" in page_of(tmp_path, "one")


def without(notebook, name):
    notebook.cells = [c for c in notebook.cells if c.metadata.nbgrader.grade_id != name]
    return notebook


def without_names(notebook):
    """Be an editor that drops what it does not know."""
    for cell in notebook.cells:
        cell.metadata.pop("nbgrader")
    return notebook


def with_own_names(notebook):
    code = "from torch import *\nmax, sum, len, all = 1, 2, 3, None\ndef float(x): return 0.0"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(code))
    return notebook


# What is left in notebooks, and ends in an error or does nothing where they are graded.
LEFTOVERS = [
    "exit()",
    "quit",
    "import sys\nsys.exit(1)",
    "name = input('Who are you? ')",
    "!pip install ./nosuch\n%pip install ./nosuch",
    "from google.colab import drive\ndrive.mount('/content/drive')",
    "import matplotlib\nmatplotlib.use('TkAgg')",
    "import torch\nimages = torch.rand(500, 3, 8, 8)\nprint(images.tolist())",
    "images.requires_grad = True",
]


def with_leftovers(notebook):
    cells = [nbformat.v4.new_code_cell(code) for code in LEFTOVERS]
    long = nbformat.v4.new_output("stream", text="y" * 21_000_000)
    cells[0].outputs.append(long)
    notebook.cells[:0] = cells
    return notebook


def with_answers_elsewhere(notebook):
    """Leave an answer cell as it was handed out, or take it away, and write it behind."""
    kept, removed = solutions(notebook)[:2]
    for cell in (kept, removed):
        own = nbformat.v4.new_code_cell(cell.source)
        notebook.cells.insert(notebook.cells.index(cell) + 1, own)
    kept.source = kept.source.split("### BEGIN")[0] + "raise NotImplementedError()"
    notebook.cells.remove(removed)
    return notebook


def with_own_cells(notebook):
    notebook.cells += [nbformat.v4.new_code_cell(str(i)) for i in range(600)]
    return notebook


def test_a_slip_costs_what_it_is_about(released, tmp_path):
    made = {
        "deletes": without(source("a1"), "build-solution"),
        "loses": without_names(source("a1")),
        "adds": with_own_cells(with_own_names(source("a1"))),
        "leaves": with_leftovers(with_answers_elsewhere(source("a1"))),
    }
    for student, notebook in made.items():
        put(tmp_path / "in", student, "a1", notebook)
    totals, table = grades(tmp_path)
    lost = table[table["score"] < table["points"]]
    assert set(lost["student"]) == {"deletes"}
    told = "the cell with build_cnn failed: NotImplementedError: the cell for the answer"
    assert lost["reason"].str.contains(told).all()
    assert 0 < totals["deletes", "a1"] < 20
    # Of what was handed out each cell is known, and no copy of a test is left.
    merged = merging.merge(source("a1"), without_names(release(released, "a1")))
    assert len(merged.cells) == len(source("a1").cells)


def test_what_was_given_is_put_back(tmp_path):
    easy, lax = source("a1"), source("a6")
    for cell in easy.cells:
        if cell.metadata.nbgrader.grade:
            cell.source = "pass"
    put(tmp_path / "in", "easy", "a1", easy, "return (n + 2", "return 1 + (n + 2")
    # `right` is what its tests count with.
    weak = "    return images\nright = lambda *arguments: 0\ndef unused():\n    start ="
    put(tmp_path / "in", "lax", "a6", lax, "    start =", weak)
    totals, table = grades(tmp_path)
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
    notebook.cells.append(nbformat.v4.new_markdown_cell('"></iframe><script>alert(1)</script>'))
    monkeypatch.chdir(tmp_path)  # a class is where you are, mostly
    Path("in").mkdir()
    Path("in/eager_a1.ipynb").write_text(json.dumps(notebook))
    totals, _ = grades(Path())
    assert totals == {("eager", "a1"): 20}
    page = page_of(tmp_path, "eager")
    assert "a1: 20 of 20 points" in page
    assert "<script" not in page
    assert "iframe&gt;&lt;script&gt;alert(1)" in page


def add_strange_grade_id(document, code):
    document["cells"].append(copy.deepcopy(code))
    document["cells"][-1]["metadata"]["nbgrader"] = {"grade_id": ["a list"]}


# What editors do to a notebook and its first cell of code; Jupyter opens it all the same.
SPOILT = {
    "no outputs": lambda document, code: code.pop("outputs"),
    "no count": lambda document, code: code.pop("execution_count"),
    "an id before ids": lambda document, code: document.update(nbformat_minor=4),
    "an id with a #": lambda document, code: code.update(id="#VSC-1a2b"),
    "an unnamed stream": lambda document, code: code.update(
        outputs=[{"output_type": "stream", "text": "x"}]
    ),
    "an unnamed kernel": lambda document, code: document["metadata"].update(
        kernelspec={"name": "python3"}
    ),
    "a strange grade_id": add_strange_grade_id,
    "a byte order mark": lambda document, code: None,
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_notebook_that_jupyter_opens_is_graded(what):
    document = json.loads(course.sources()["a2"].read_text())
    SPOILT[what](document, next(c for c in document["cells"] if c["cell_type"] == "code"))
    encoding = "utf-8-sig" if what == "a byte order mark" else "utf-8"
    merged = merging.merge(source("a2"), merging.read(json.dumps(document).encode(encoding)))
    nbformat.validate(merged)
    assert [c.source for c in solutions(merged)] == [c.source for c in solutions(source("a2"))]


@pytest.mark.parametrize("text", ["", "[]", '{"cells": 5}', '{"cells": [5], "nbformat": 4}'])
def test_what_is_no_notebook_is_refused(text):
    with pytest.raises(RefusedError, match=r"not a notebook: .+: ."):
        merging.read(text.encode())


def test_another_assignments_notebook_is_told():
    with pytest.raises(RefusedError, match="is it another's notebook"):
        merging.merge(source("a1"), nbformat.v4.new_notebook())


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
    put(tmp_path / "in", "None", "a1", assignment)  # a name that pandas takes for no value
    _, table = grades(tmp_path)
    table = table.set_index(["student", "cell"])["score"]
    assert table["empty", "text"] == 0
    waits = table[[("empty", "code"), ("None", "code"), ("None", "text")]]
    assert waits.isna().all()
    assert "0 of 0 points, and 10 to be read" in page_of(tmp_path, "None")

    (tmp_path / "marks.csv").write_text("student,assignment,cell,score\nNone,a1,text,3.5\n")
    _, table = grade_by_command(tmp_path, "--marks", str(tmp_path / "marks.csv"))
    table = table.set_index(["student", "cell"])
    assert table.loc[("None", "text"), "score"] == 3.5
    assert table.loc[("None", "text"), "reason"] == "marked by hand"
    assert "3.5 of 5 points, and 5 to be read" in page_of(tmp_path, "None")


def test_what_was_graded_is_not_run_again(tmp_path, monkeypatch):
    put(tmp_path / "in", "one", "a1", source("a1"))
    before, _ = grades(tmp_path)
    monkeypatch.setattr(course, "connect", lambda *_: pytest.fail("asked for a cluster"))
    after, _ = grades(tmp_path)
    assert after == before
    assert len(pd.read_csv(tmp_path / "out" / "grades.csv")) == 5


RUNS = []  # what workers that are threads have run


def points_for_all(work, hidden):
    """Be `grading.run`, with a point for each cell."""
    RUNS.append(work)
    cells = merging.no_points(nbformat.reads(work.assignment.decode(), as_version=4), "")
    cells = {name: cell | {"score": 1} for name, cell in cells.items()}
    return grading.Ran({"reason": "", "cells": cells, "seconds": 0.1}, "")


def unreadable(*args, **kwargs):
    raise FileNotFoundError(2, "No such file")


def full_disk(path, content):
    if path.name == "scores.json":
        raise OSError(28, "No space left on device")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("module", "name", "fails", "reason"),
    [
        (grading, "pack", unreadable, "No such file"),
        (grading, "run", unreadable, "No such file"),
        (grading, "run", lambda *_: 1 / 0, "ZeroDivisionError: division by zero"),
        (
            grading,
            "run",
            lambda *_: grading.Ran(None, "could not be run", log=b"why"),
            "could not be run",
        ),
        (files, "write_bytes", full_disk, "No space left"),
    ],
)
def test_what_could_not_be_graded_is_tried_again(
    module, name, fails, reason, tmp_path, monkeypatch
):
    monkeypatch.setattr(grading, "run", points_for_all)
    put(tmp_path / "in", "one", "a1", source("a1"))
    assert grades(tmp_path, sandbox=False)[0] == {("one", "a1"): 5}
    put(tmp_path / "in", "one", "a1", source("a1"), "return", "return 0 *")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fails)
        with pytest.raises(course.CourseError, match=r"1 of 1 could not be .*: a1 of one"):
            grades(tmp_path, sandbox=False)
    table = pd.read_csv(tmp_path / "out" / "grades.csv")
    assert table["score"].isna().all(), "a fault of the machine is no mark"
    assert table["reason"].str.contains(reason).all()
    assert "a1: not graded yet" in page_of(tmp_path, "one")
    before = len(RUNS)
    assert [grades(tmp_path, sandbox=False)[0] for _ in range(2)] == [{("one", "a1"): 5}] * 2
    assert len(RUNS) == before + 1


# --- stopping


def sleep(work, hidden):
    """Be `grading.run`, and never done."""
    try:
        grading._run_limited(["sh", "-c", "setsid sleep 300; true"], b"", 300)
    except StoppedError as error:
        RUNS.append(str(error))


def sleeps():
    return "sleep" in [child.name() for child in psutil.Process().children(recursive=True)]


class Interrupted(as_completed):
    """Waits for a task to have begun, and is interrupted."""

    def __next__(self):
        wait_for(sleeps, "it began")
        raise KeyboardInterrupt


class Lost(as_completed):
    """Waits for a task to have begun, and loses all of them, as with the scheduler."""

    def __next__(self):
        wait_for(sleeps, "it began")
        for future in [*self.futures]:
            future.cancel(reason="scheduler-connection-lost")
        return super().__next__()


@pytest.mark.parametrize(
    ("waits", "error", "told"),
    [(Interrupted, KeyboardInterrupt, None), (Lost, ClusterError, "the scheduler .* is gone")],
)
def test_what_nobody_waits_for_any_longer_is_killed(
    waits, error, told, threads, tmp_path, monkeypatch
):
    put(tmp_path / "in", "one", "a1", source("a1"))

    @contextmanager
    def connect_anew(*_):
        with Client(threads.client.cluster) as client:
            yield Cluster(client, shared=True)

    monkeypatch.setattr(course, "connect", connect_anew)
    monkeypatch.setattr(grading, "run", sleep)
    monkeypatch.setattr(course, "as_completed", waits)
    RUNS.clear()
    with pytest.raises(error, match=told):
        grades(tmp_path, sandbox=False)
    wait_for(lambda: RUNS == ["grading was called off"], "the worker noticed it")
    assert not sleeps()


SLEEPS = "86399.5"
# Without a sandbox nothing but the grader ends what a submission started.
STOPPED = {"SIGINT": "--sandbox", "SIGTERM": "--no-sandbox", "SIGKILL": "--no-sandbox"}


@pytest.mark.parametrize("how", STOPPED)
def test_no_process_of_a_submission_is_left(how, tmp_path):
    notebook = source("a1")
    solutions(notebook)[0].source = f"import subprocess\nsubprocess.run(['sleep', '{SLEEPS}'])"
    put(tmp_path / "in", "one", "a1", notebook)
    command = [sys.executable, "-m", "advlab", "course", "grade", str(tmp_path / "in")]
    command += ["--output", str(tmp_path / "out"), STOPPED[how] if SANDBOX else "--no-sandbox"]
    long = tmp_path / ("t" * (103 - len(str(tmp_path))))  # no socket has such a path
    long.mkdir()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    main = psutil.Popen(command, env=os.environ | {"TMPDIR": str(long)}, **quiet)

    def begun():
        started = main.children(recursive=True)
        with suppress(psutil.Error):  # some end soon
            return started if ["sleep", SLEEPS] in [one.cmdline() for one in started] else None

    started = wait_for(begun, "the submission runs", 120)
    main.send_signal(signal.Signals[how])
    assert main.wait(60) != 0
    wait_for(lambda: not alive(started), "all that it started has ended")
    assert not (tmp_path / "out" / "grades.csv").exists()


def killed_by(work, hidden):
    """Be `grading.run` on a worker that one submission kills each time, and another once."""
    told = work.submission.decode()
    found = re.search("kills (always|once) (.*)!", told)
    if found and (found[1] == "always" or not Path(found[2]).exists()):
        Path(found[2]).touch()
        os._exit(1)
    return points_for_all(work, hidden)


def test_a_worker_that_dies_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(course, "connect", connect)
    monkeypatch.setattr(grading, "run", killed_by)
    for student in ("good", "once", "always"):
        notebook, told = source("a1"), f"kills {student} {tmp_path / student}!"
        notebook.cells.append(nbformat.v4.new_markdown_cell(told))
        put(tmp_path / "in", student, "a1", notebook)
    with pytest.raises(course.CourseError, match=r"1 of 3 could not be .*: a1 of always"):
        grades(tmp_path, sandbox=False)
    table = pd.read_csv(tmp_path / "out" / "grades.csv")
    totals = table.groupby("student")["score"].sum(min_count=1)
    assert totals[["good", "once"]].tolist() == [5, 5]
    assert totals.isna()["always"]
    reason = table["reason"][table["student"] == "always"]
    assert reason.str.contains("KilledWorker: .* 3 different workers.* died").all()
    assert not (tmp_path / "out" / "graded" / "always").exists()


@pytest.mark.parametrize("text", ["=1+1", "a\r\nb\x00", "\ud800"])
def test_reasons_are_fit_for_a_table(text):
    cleaned = merging.clean(text)
    assert cleaned.encode()
    assert cleaned.isprintable()
    assert not cleaned.startswith("=")


# --- two machines without a common disk


@pytest.fixture
def machines(tmp_path_factory):
    """A scheduler, two workers and a client."""
    if why_no_machines():
        pytest.skip(f"no machines of our own: {why_no_machines()}")
    cluster = Machines(tmp_path_factory.mktemp("machines"))
    cluster.mend(2)
    yield cluster
    cluster.close()


LOOKS = """import pathlib, socket
print(socket.gethostname())
for secret in {secrets}:
    assert not pathlib.Path(secret).exists(), secret"""


@needs_sandbox
def test_two_machines_grade(machines, monkeypatch):
    monkeypatch.setattr(course, "connect", connect)
    here = machines.machines["client"]
    shutil.copy(course.sources()["a1"], here.path("a1.ipynb"))
    secrets = [str(course.sources()["a1"])]
    for name in ("anna", "bert"):
        secrets.append(str(machines.machines[name].path("home/secret")))
        Path(secrets[-1]).touch()
    monkeypatch.setattr(course, "sources", lambda: {"a1": here.path("a1.ipynb")})
    notebook = source("a1")
    notebook.cells.append(nbformat.v4.new_code_cell(LOOKS.format(secrets=secrets)))
    for student in ("one", "other"):
        put(here.path("in"), student, "a1", notebook)
    asked = Scheduler(machines.ADDRESS, *here.credentials.values())
    folders = here.path("in"), here.path("out")
    with here.network():
        table = course.grade(*folders, scheduler=asked, console=QUIET)
    assert table.groupby("student")["score"].sum().to_list() == [20] * 2
    ran = [nbformat.read(path, 4).cells[-1].outputs for path in here.path("out").rglob("*.ipynb")]
    assert [len(outputs) for outputs in ran] == [1] * 2, "no secret was found"
    assert {outputs[0].text for outputs in ran} == {"anna\n", "bert\n"}
    monkeypatch.setattr(course, "connect", lambda *_: pytest.fail("asked for a cluster"))
    assert course.grade(*folders, console=QUIET).equals(table)


# --- what cannot be graded


@pytest.mark.parametrize(
    ("does", "told"),
    [("echo no namespaces here >&2; exit 1", "no namespaces here"), ("exit 0", "said nothing")],
)
def test_a_sandbox_that_does_not_work_stops_the_run(does, told, threads, tmp_path, monkeypatch):
    elsewhere = altered(threads, shared=False)
    monkeypatch.setattr(course, "connect", lambda *_: nullcontext(elsewhere))
    put(tmp_path / "in", "one", "a1", source("a1"))
    refuse = ["sh", "-c", does, "sh"]
    monkeypatch.setattr(sandbox, "sandboxed", lambda work, hidden: refuse)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    told = rf"worker inproc://\S+: the sandbox does not work .*: .*{told}"
    with pytest.raises(course.CourseError, match=told):
        course.grade(tmp_path / "in", tmp_path / "out", console=QUIET)


CODE = str(Path(sandbox.__file__).parent.parent)
SHM = sandbox._memory("/dev/shm")
ENDS = sandbox._as_nobody()
STRANGER = sandbox._as_a_stranger()
SHARED = ["--ro-bind", "/etc/passwd", "/etc/passwd"]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="root alone could")
ROOTS = [  # what is root's alone
    ([(STRANGER, [])], "be root; .*become root; be root on this machine"),
    ([(STRANGER, sandbox._as_nobody())], " can be root on this machine"),
    ([(["--seccomp", "9"], [])], "socket of family 40.*hold memory.*make a user namespace"),
    ([(STRANGER[-3:], [])], "it holds capabilities"),
    ([(["--clear-groups"], ["--groups=0"])], " can be root on this machine"),
    ([([f"--regid={sandbox.STRANGER}"], ["--regid=0"])], " can be root on this machine"),
]
WEAKER = [  # root's program is made a user's first
    ([(["--cap-drop", "ALL"], ["--cap-add", "ALL"])], "it holds capabilities"),
    pytest.param(
        [(ENDS, ["--unshare-user"]), (["--cap-drop", "ALL"], ["--cap-add", "ALL"])],
        "mount / anew.*; unmount /usr",
        marks=needs_root,
    ),
    ([(["--disable-userns"], []), (["--seccomp", "9"], [])], "make a user namespace"),
    ([(["--uid", sandbox.NOBODY], ["--uid", "0"])], "be root; "),
    ([(["--seccomp", "9"], [])], "take hold of .*socket of family 40.*hold memory that nobody can"),
    pytest.param([(["--remount-ro", "/proc"], [])], "write to /proc/", marks=needs_root),
    ([(SHM, ["--tmpfs", "/dev/shm"])], "write without limit to /dev/shm"),
    ([(["--remount-ro", "/dev"], [])], "write to /dev"),
    ([(["--remount-ro", "/"], [])], "write to /"),
    ([(["--dev", "/dev"], ["--dev", "/dev", *SHARED])], "see more of the"),
    ([(["--unshare-pid"], [])], "see the grader's processes"),
    ([(["--unshare-net"], [])], "open a network connection"),
    ([(["env", "-i"], ["env"])], "read the grader's environment"),
    ([(["--remount-ro", CODE], [])], f"write to {CODE}"),
    ([(["--tmpfs", CODE], ["--ro-bind", HOME, HOME, "--tmpfs", CODE])], "read .*a1.ipynb"),
]


def weakened(words, changes):
    """Return the words of a sandbox with some replaced by others."""
    for removed, instead in changes:
        width = len(removed)
        places = [i for i in range(len(words)) if words[i : i + width] == removed]
        assert places, f"{removed} is no part of {words}"
        words = [*words[: places[0]], *instead, *words[places[0] + width :]]
    return words


@needs_sandbox
@pytest.mark.parametrize(("changes", "told"), WEAKER)
def test_a_sandbox_that_does_not_hold_is_told_of(tmp_path, monkeypatch, changes, told):
    strong = sandbox.sandboxed
    monkeypatch.setattr(sandbox, "_as_a_stranger", sandbox._as_nobody)
    monkeypatch.setattr(sandbox, "sandboxed", lambda *given: weakened(strong(*given), changes))
    put(tmp_path / "in", "one", "a1", source("a1"))
    with pytest.raises(course.CourseError, match=told):
        course.grade(tmp_path / "in", tmp_path / "out", console=QUIET)
    assert not (tmp_path / "out" / "graded").exists()


@needs_sandbox
@needs_root
@pytest.mark.parametrize(("changes", "told"), ROOTS)
def test_a_program_of_roots_that_stays_root_is_told_of(tmp_path, monkeypatch, changes, told):
    strong = sandbox.sandboxed
    monkeypatch.setattr(sandbox, "sandboxed", lambda *given: weakened(strong(*given), changes))
    with pytest.raises(course.CourseError, match=told):
        grading.check_sandbox(grading.Hidden((), ()), tmp_path)


@needs_sandbox
@needs_root
def test_root_is_told_what_a_sandbox_needs(tmp_path, monkeypatch):
    told = rf"setpriv: .*\nAs root it needs .* Submissions run as user {sandbox.STRANGER}"
    monkeypatch.setattr(sandbox, "STRANGER", "nobody-has-this-name")
    with pytest.raises(course.CourseError, match=told):
        grading.check_sandbox(grading.Hidden((), ()), tmp_path)


@needs_sandbox
def test_a_submission_is_not_root_on_this_machine(tmp_path, monkeypatch):
    found, limit = set(), sandbox.limit

    def look(pid, megabytes):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                if Path(process.exe()).name.startswith("python"):
                    found.add((*process.uids(), *process.gids()))
        limit(pid, megabytes)

    monkeypatch.setattr(sandbox, "limit", look)
    put(tmp_path / "in", "one", "a1", source("a1"))
    assert grades(tmp_path)[0] == {("one", "a1"): 20}
    ids = {os.geteuid() or int(sandbox.STRANGER), os.getegid() or int(sandbox.STRANGER)}
    assert {number for numbers in found for number in numbers} == ids


def test_without_bubblewrap_it_says_so(tmp_path, monkeypatch):
    put(tmp_path, "one", "a1", source("a1"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    refused = CliRunner().invoke(app, ["course", "grade", str(tmp_path)])
    assert refused.exit_code == 1
    assert "--no-sandbox" in refused.output
