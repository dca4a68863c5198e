"""The environment of a clone, made with Python alone; and what is installed in Colab."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from advlab import files
from advlab.upkeep import setup

ROOT = files.repository()


@pytest.fixture
def clone(tmp_path):
    """A folder with what tells a clone."""
    for name in setup.LOCKED:
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def commands(monkeypatch):
    """What would have been run."""
    told = []

    def run(command, **how):
        told.append(command)
        Path(how.get("cwd", "."), ".venv").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return told


def make_environment(clone, made="{}", quote=""):
    """Write what tells where an environment was made, and that it is complete."""
    script = setup.python_in(clone / ".venv").parent / "activate"
    script.parent.mkdir(parents=True)
    script.write_text(f"export VIRTUAL_ENV={quote}{made.format(clone / '.venv')}{quote}\n")
    (clone / ".venv" / "installed").write_text("")


@pytest.mark.parametrize(
    ("settings", "index"),
    [
        ({}, ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]),
        ({"TORCH_INDEX": "https://another"}, ["--extra-index-url", "https://another"]),
        ({"TORCH_INDEX": ""}, []),
        ({"PIP_EXTRA_INDEX_URL": "https://of.pip"}, []),
    ],
)
def test_the_locked_torch_comes_first_and_its_cpu_build_unless_told(settings, index):
    first, rest = setup.installing(Path("python"), settings)
    assert first[-2:] == ["torch", "torchvision"]
    assert first[first.index("--retries") + 2 : -2] == index
    assert "--extra-index-url" not in rest
    for words in (first, rest):
        assert words[words.index("--constraint") + 1] == "constraints.txt"


@pytest.mark.parametrize("made", [None, "/elsewhere/.venv", "{}", "/moved{}", "{}x"])
@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_environment_that_belongs_to_another_folder_is_made_anew(clone, commands, made, quote):
    if made:
        make_environment(clone, made, quote)
    assert setup.make(clone) == setup.python_in(clone / ".venv")
    if made == "{}":
        assert commands == []
        return
    new, *installing = commands
    assert new == [sys.executable, "-m", "venv", "--clear", str(clone / ".venv")]
    assert installing == setup.installing(setup.python_in(clone / ".venv"), os.environ)
    assert (clone / ".venv" / "installed").is_file()


def test_an_own_environment_of_this_python_is_known(tmp_path):
    venv.create(tmp_path / ".venv")
    assert setup.belongs_here(tmp_path / ".venv")
    moved = (tmp_path / ".venv").rename(tmp_path / "other")
    assert not setup.belongs_here(moved)
    assert setup.python_in(moved).exists()


@pytest.mark.parametrize("name", setup.LOCKED)
def test_environment_is_renewed_when_other_versions_are_asked_for(clone, commands, name):
    make_environment(clone)
    mark = clone / ".venv" / "installed"
    os.utime(clone / name, (mark.stat().st_mtime + 9,) * 2)
    setup.make(clone)
    assert commands[0] == [sys.executable, "-m", "venv", str(clone / ".venv")]  # not emptied


def test_extras_are_added(clone, commands):
    make_environment(clone)
    setup.make(clone, ["course", "site"])
    assert [words[-2:] for words in commands] == [["--editable", ".[course,site]"]]


def test_failure_ends_with_its_exit_code_and_leaves_the_environment_unready(clone, monkeypatch):
    failed = subprocess.CompletedProcess([], 7)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit) as told:
        setup.make(clone)
    assert told.value.code == 7
    assert not (clone / ".venv" / "installed").exists()


def test_old_python_and_no_clone_are_told(clone, monkeypatch):
    with pytest.raises(SystemExit, match="is no clone of the repository"):
        setup.make(clone / "nowhere")
    monkeypatch.setattr(sys, "version_info", (3, 10, 9))
    with pytest.raises(SystemExit, match=r"Python 3\.11 or newer is needed.*make PYTHON="):
        setup.make(clone)


def test_setup_needs_nothing_but_python():
    # -S: without site-packages.
    command = [sys.executable, "-S", "-m", "advlab", "setup", "--help"]
    env = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "Make .venv in this clone" in done.stdout, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="make is not asked for there")
def test_make_sets_up_by_the_same_command():
    done = subprocess.run(["make", "-n", "doctor"], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith("make")] == [
        "python3 -m advlab setup",
        ".venv/bin/python -m advlab doctor",  # a script would name its old folder
    ]


# --- in Colab


@pytest.fixture
def colab(monkeypatch, commands):
    """Installed versions, which a test changes, and what would have been run."""
    versions = dict.fromkeys([*setup.LESSONS_NEED, "torch", "torchvision"], "99")

    def version(name):
        if name not in versions:
            raise setup.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(setup, "version", version)
    return versions, commands


def test_colab_s_torch_and_widgets_stay_as_they_are(colab):
    versions, commands = colab
    versions |= {"ipython": "7.34", "ipywidgets": "7.7.1"}
    setup.complete()
    [command] = commands
    assert command[:5] == [sys.executable, "-m", "pip", "install", "--quiet"]
    named = [word.split(">")[0] for word in command[5:]]
    assert named == [n for n in setup.LESSONS_NEED if n not in setup.COLABS_OWN]
    assert all(">=" in word for word in command[5:])


def test_what_is_not_there_at_all_is_installed(colab, monkeypatch):
    versions, commands = colab
    missing = {name: versions.pop(name) for name in ("ipython", "ipywidgets")}

    def run(command, **how):
        commands.append(command)
        versions.update(missing)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    setup.complete()
    assert {word.split(">")[0] for word in commands[0][5:]} == set(setup.LESSONS_NEED)


@pytest.mark.parametrize(("torch", "told"), [("2.1.0+cu118", r"here is 2\.1\.0"), (None, "none")])
def test_torch_that_is_not_supported_is_named(colab, torch, told):
    versions, _ = colab
    versions["torch"] = torch
    if torch is None:
        del versions["torch"]
    with pytest.raises(RuntimeError, match=rf"advlab needs torch>=.*{told}.*Choose a newer"):
        setup.complete()


def test_package_that_was_replaced_while_in_use_asks_for_a_new_session(colab, monkeypatch):
    versions, _ = colab

    def run(command, **how):
        versions.update(numpy="100")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"^numpy was in use .* Restart session"):
        setup.complete()


def test_failure_of_pip_is_told(colab, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="cannot install what the lessons need: no network"):
        setup.complete()
