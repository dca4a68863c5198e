"""The wheel, without a clone: its commands, and a lesson in a new environment, as in Colab.

The second takes torch from this environment, by links, and all else from the package index. The
oldest torch that advlab supports is tested where the index of torch's CPU builds can be reached.
"""

import json
import os
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution, requires
from pathlib import Path

import nbformat
import pytest
from conftest import shared_folder
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from advlab import files
from advlab.upkeep import anywhere, setup

ROOT = files.repository()
LARGEST = 60_000_000  # bytes; the package index takes 100 MB
ATTEMPT = ["--retries", "1", "--timeout", "15"]
QUICK = {"ADVLAB_PROFILE": "quick", "ADVLAB_DATASET": "shapes10", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this clone, built in a copy: setuptools leaves files where it works."""
    pytest.importorskip("setuptools", reason='needs the extra "course"')
    source, built = (tmp_path_factory.mktemp(name) for name in ("source", "built"))
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to(ROOT / name)
    pack = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    run([sys.executable, "-c", pack, str(built)], cwd=source)
    [path] = built.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder into which the wheel was unpacked, as pip does it."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder)
    return folder


@pytest.fixture
def cache(tmp_path_factory):
    """Settings with a cache of models that the tests of the lessons share."""
    return {**QUICK, "ADVLAB_CACHE": str(shared_folder(tmp_path_factory, "lessons"))}


def run(command, *, cwd, settings=None, fails=False) -> str:
    """Run a command without this clone on its path; return what it prints."""
    env = {name: v for name, v in os.environ.items() if not name.startswith(("ADVLAB", "PYTHONP"))}
    how = {"cwd": cwd, "env": env | (settings or {}), "capture_output": True, "text": True}
    done = subprocess.run(command, **how)
    told = done.stdout + done.stderr
    assert fails is None or bool(done.returncode) == fails, told[-4000:]
    return told


def test_wheel_holds_what_the_lessons_read(wheel):
    assert wheel.name == anywhere.WHEEL
    assert wheel.stat().st_size < LARGEST
    with zipfile.ZipFile(wheel) as packed:
        names = {name for name in packed.namelist() if "/_repository/" in name}
    parts = ["notebooks/**/*.ipynb", "figures/*.csv", "data/checkpoints/*.safetensors"]
    wanted = {path.relative_to(ROOT).as_posix() for part in parts for path in ROOT.glob(part)}
    assert len(wanted) > 60
    assert {f"advlab/_repository/{name}" for name in wanted} <= names
    assert not [name for name in names if name.endswith((".py", ".png"))]


def test_commands_work_without_a_clone(installed, cache, tmp_path):
    on = {**cache, "PYTHONPATH": str(installed)}
    advlab = [sys.executable, "-m", "advlab"]
    before = sorted(installed.rglob("*.ipynb")), sorted(installed.rglob("*.csv"))
    run([*advlab, "run", "02"], cwd=tmp_path, settings=on)
    output = tmp_path / "outputs" / "quick-shapes10"
    assert (output / "figures" / "fig1_fgsm.png").is_file()
    assert (output / "notebooks" / "02_fgsm.ipynb").is_file()
    told = run([*advlab, "lessons"], cwd=tmp_path, settings=on)
    assert "Open them: jupyter lab lessons" in told
    assert (tmp_path / "lessons" / "02_fgsm.ipynb").is_file()
    told = run([*advlab, "retrain"], cwd=tmp_path, settings=on, fails=True)
    assert "no clone of the repository holds" in told
    told = run([*advlab, "doctor"], cwd=tmp_path, settings=on | {"HOME": str(tmp_path)}, fails=None)
    assert "trained models, all intact" in told
    assert before == (sorted(installed.rglob("*.ipynb")), sorted(installed.rglob("*.csv")))
    assert not (tmp_path / "data").exists()


def test_assignments_are_built_without_a_clone(installed, cache, tmp_path):
    pytest.importorskip("nbgrader", reason='needs the extra "course"')
    on = {**cache, "PYTHONPATH": str(installed)}
    run([sys.executable, "-m", "advlab", "course", "build"], cwd=tmp_path, settings=on)
    made = tmp_path / "outputs" / "course"
    assert {path.stem for path in made.glob("a*.zip")} == {
        path.stem for path in (ROOT / "notebooks" / "assignments").glob("*/*.ipynb")
    }
    [students] = made.glob("*.whl")
    with zipfile.ZipFile(students) as packed:
        assert not [name for name in packed.namelist() if "_repository" in name]


def test_lesson_finds_tables_and_models_of_the_wheel(installed, tmp_path):
    code = "from advlab import files, paper; import pandas as pd; print(files.shipped()); "
    code += "print(len(pd.read_csv(files.shipped() / 'figures' / 'seeds.csv')), files.home())"
    command = [sys.executable, "-c", code]
    told = run(command, cwd=tmp_path, settings={"PYTHONPATH": str(installed)}).split()
    assert told[0] == str(installed / "advlab" / "_repository")
    assert int(told[1]) > 100
    assert told[2] == str(tmp_path)


# --- as in Colab


class OtherKernel(AsyncKernelManager):
    """A kernel of another environment."""

    python = ""
    kernel_spec = property(
        lambda self: KernelSpec(
            argv=[self.python, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            language="python",
        )
    )


def link(names, folder):
    """Link installed packages, and all that they need, into a folder."""
    todo, done = list(names), set()
    while todo:
        name = canonicalize_name(todo.pop())
        if name in done:
            continue
        done.add(name)
        found = distribution(name)
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top).resolve())
        asked = [Requirement(text) for text in found.requires or []]
        todo += [r.name for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]


def lowest(name: str) -> str:
    """Return the lowest version of a package that advlab takes, as pip is asked for it."""
    [asked] = [r for r in map(Requirement, requires("advlab")) if r.name == name]
    [least] = [one.version for one in asked.specifier if one.operator == ">="]
    return f"{name}=={least}"


@pytest.mark.skipif(os.name != "posix", reason="links need rights that Windows does not give")
@pytest.mark.parametrize("torch", ["this", "oldest"])
def test_lesson_runs_as_in_colab_with_its_wheel_alone(wheel, cache, tmp_path, torch, monkeypatch):
    # What is in use elsewhere lies outside the environment: pip replaces nothing of it.
    links, environment, content = (tmp_path / name for name in ("links", "env", "content"))
    venv.create(environment, with_pip=True)
    python = setup.python_in(environment)
    packages = next(environment.glob("lib/python*/site-packages"))
    (links / "google" / "colab").mkdir(parents=True)
    (links / "google" / "colab" / "__init__.py").write_text("")
    (packages / "links.pth").write_text(f"{links}\nimport google.colab\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", *ATTEMPT]
    if torch == "this":
        link(["torch", "torchvision"], links)
    else:
        wanted = [lowest("torch"), lowest("torchvision")]
        command = [*pip, "--index-url", setup.CPU_TORCH, *wanted]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"needs {setup.CPU_TORCH}, which does not answer")
    if subprocess.run([*pip, "ipykernel"], capture_output=True).returncode:
        pytest.skip("needs the package index, which does not answer")
    content.mkdir()
    (content / wheel.name).symlink_to(wheel)
    notebook = nbformat.read(ROOT / "notebooks" / "02_fgsm.ipynb", as_version=4)
    anywhere.with_cell(notebook, wheel.name)
    ask = "import advlab, json, torch; from advlab import files; print(json.dumps("
    ask += "[advlab.__file__, str(files.shipped()), torch.__version__]))"
    notebook.cells.append(nbformat.v4.new_code_cell(ask))
    monkeypatch.setattr(OtherKernel, "python", str(python))
    for name in ("PYTHONPATH", "ADVLAB_OUTPUT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in cache.items():
        monkeypatch.setenv(name, value)
    how = {"kernel_manager_class": OtherKernel, "timeout": 300}
    NotebookClient(notebook, **how, resources={"metadata": {"path": content}}).execute()
    [cell] = [cell for cell in notebook.cells if cell.id == anywhere.TAG]
    assert cell.outputs == []
    where, shipped, version = json.loads(notebook.cells[-1].outputs[0].text)
    assert Path(where) == packages / "advlab" / "__init__.py"
    assert Path(shipped) == packages / "advlab" / "_repository"
    if torch == "oldest":
        assert version.partition("+")[0] == lowest("torch").partition("==")[2]
    assert (content / "outputs" / "quick-shapes10" / "figures" / "fig1_fgsm.png").is_file()
