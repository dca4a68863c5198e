"""environment.yml, pyproject.toml and the Makefile say the same."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import advlab
from advlab import files

ROOT = files.repository()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


def requirements() -> dict[str, str]:
    """Return what pyproject.toml asks for, by conda-forge name: package to versions."""
    texts = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    parsed = [Requirement(text) for text in texts]
    return {CONDA_NAMES.get(r.name, r.name): str(r.specifier) for r in parsed}


def test_conda_environment_has_the_same_packages_and_versions():
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = [Requirement(line) for line in lines if isinstance(line, str)]
    found = {r.name: str(r.specifier) for r in conda}
    assert found.pop("python") == PROJECT["requires-python"]
    assert "pip" in found
    del found["pip"]
    assert found == requirements()
    assert lines[-1] == {"pip": ["-e .[audit]"]}


def test_constraints_lock_every_requirement_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins == sorted(set(pins), key=str.upper)
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)  # none that PyPI has not
    locked = {canonicalize_name(name): v for name, v in (pin.split("==") for pin in pins)}
    extras = PROJECT["optional-dependencies"].values()
    for text in (*PROJECT["dependencies"], *chain.from_iterable(extras)):
        asked = Requirement(text)
        assert asked.specifier.contains(locked[canonicalize_name(asked.name)]), text
    assert not any("==" in text for text in PROJECT["dependencies"])


def test_version_is_the_same_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert {PROJECT["version"], cited["version"], newest[1]} == {advlab.__version__}
    required = {"cff-version", "message", "title", "authors", "license", "date-released"}
    assert required <= cited.keys()


def hooks():
    """Return the entries of the hooks before a commit."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    return [hook["entry"].split() for repo in config["repos"] for hook in repo["hooks"]]


def test_hooks_before_a_commit_check_what_make_lint_checks():
    shown = subprocess.run(
        ["make", "--dry-run", "--always-make", "lint"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for entry in hooks():
        assert " ".join(entry[1:]) in shown  # python is that of .venv


def test_generated_files_are_marked_and_notebooks_are_compared_by_cells():
    names = ["notebooks/02_fgsm.ipynb", "figures/bench.csv", "figures/README.md", "constraints.txt"]
    asked = ["git", "check-attr", "diff", "merge", "linguist-generated", "--", *names]
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("this is no clone of git's")
    shown = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = dict(line.rsplit(": ", 1) for line in shown.splitlines())
    assert found[f"{names[0]}: diff"] == found[f"{names[0]}: merge"] == "jupyternotebook"
    marked = {name: found[f"{name}: linguist-generated"] for name in names}
    assert marked == dict(zip(names, ["unspecified", "set", "unspecified", "set"], strict=True))


def test_ci_runs_the_commands_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    for command in ("make run", "make test"):
        assert command in readme
        assert f"run: {command}" in workflow
    assert "make test" in (ROOT / ".ci/run").read_text()


@pytest.mark.skipif(os.name != "posix", reason="make is not asked for there")
@pytest.mark.parametrize(
    ("said", "seen"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")]
)
def test_kernels_of_make_lab_leave_cores_to_others(said, seen, tmp_path):
    shown = tmp_path / "python"  # in the place of the environment's
    shown.write_text('#!/bin/sh\necho "$OMP_WAIT_POLICY"\n')
    shown.chmod(0o755)
    env = {name: v for name, v in os.environ.items() if name != "OMP_WAIT_POLICY"} | said
    command = ["make", "--silent", "lab", "PYTHON=true", f"BIN={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [seen]


@pytest.mark.parametrize("module", ["advlab.upkeep.runs", "advlab.classroom.page"])
def test_who_reads_notebooks_builds_no_grammar_of_addresses(module):
    code = f"import sys, {module}, nbformat; print(sys.modules['rfc3987_syntax'])"
    code += "; nbformat.validate(nbformat.v4.new_notebook())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
