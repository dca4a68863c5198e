"""environment.yml, pyproject.toml and the Makefile say the same."""

import re
import tomllib

import yaml
from packaging.requirements import Requirement

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


def test_each_conda_package_has_a_reason_beside_it():
    lines = (ROOT / "environment.yml").read_text().split("dependencies:\n")[1].splitlines()
    for line in lines:
        assert line.strip() == "- pip:" or re.search(r"# \w+", line), line


def test_ci_runs_the_commands_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    for command in ("make run", "make test"):
        assert command in readme
        assert f"run: {command}" in workflow
    assert "make test" in (ROOT / ".ci/run").read_text()
