"""Batch runs, on lessons of two cells: which run, what is kept, and what stops them."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
from conftest import write_lesson
from filelock import FileLock
from rich.console import Console

from advlab import files, paper, recipes
from advlab.catalogue import LESSONS
from advlab.upkeep import readme, runs
from advlab.upkeep.kernels import OwnKernel
from advlab.upkeep.runs import BatchError, choose_lessons
from advlab.upkeep.tasks import Options


@pytest.fixture
def lessons(empty_home):
    """A clone with two lessons that leave traces of their running, and no models to train."""
    for name in ("01_first", "02_second"):
        write_lesson(empty_home, name, leave_trace(empty_home, name))
    return empty_home


def leave_trace(home: Path, name: str) -> str:
    return f"open({str(home / name)!r}, 'a').write(word)\nprint(seed)"


def run_quick(home: Path, *names: str, seed: int = 0, **more) -> Path:
    """Run the lessons of `home` on Shapes-10."""
    options = Options("quick", "shapes10", output_dir=str(home / "out"), seed=seed)
    return runs.run(names, options, **more)


def shown(output: Path, name: str) -> str:
    """Return what the last cell of an executed lesson printed."""
    executed = nbformat.read(output / "notebooks" / f"{name}.ipynb", as_version=4)
    return executed.cells[-1].outputs[0].text.strip()


def read_record(output: Path) -> dict:
    return json.loads((output / "run.json").read_text())


def test_run_executes_in_order_and_passes_parameters(lessons):
    output = run_quick(lessons, seed=3, parameters={"word": "loud"})
    assert (lessons / "01_first").read_text() == (lessons / "02_second").read_text() == "loud"
    assert shown(output, "02_second") == "3"


def test_lessons_see_the_options_in_their_environment(lessons, monkeypatch):
    monkeypatch.setenv("ADVLAB_PROFILE", "paper")
    monkeypatch.delenv("ADVLAB_DEVICE", raising=False)
    names = ["ADVLAB_PROFILE", "ADVLAB_DATASET", "ADVLAB_DEVICE", "ADVLAB_OUTPUT"]
    write_lesson(lessons, "01_first", f"import os\nprint([os.environ[n] for n in {names}])")
    output = run_quick(lessons, "01")
    assert shown(output, "01_first") == str(["quick", "shapes10", "cpu", str(output)])
    executed, source = (
        nbformat.read(home / "notebooks" / "01_first.ipynb", as_version=4)
        for home in (output, lessons)
    )  # without parameters, as they were written
    assert [c.source for c in executed.cells] == [c.source for c in source.cells]
    assert os.environ["ADVLAB_PROFILE"] == "paper"
    assert "ADVLAB_DEVICE" not in os.environ


@pytest.mark.parametrize("name", ["02_second", "02", "second", "02_second.ipynb"])
def test_choose_lessons_takes_short_names(lessons, name):
    assert list(choose_lessons([name])) == ["02_second"]


def test_solutions_run_only_when_asked_for(lessons):
    name = "solutions/01_first"
    write_lesson(lessons, name, "print('solved')")
    assert list(choose_lessons([])) == ["01_first", "02_second"]
    assert list(choose_lessons(["01", "solutions"])) == ["01_first", name]
    assert shown(run_quick(lessons, "solutions"), name) == "solved"
    assert not (lessons / "01_first").exists()


def test_models_are_those_of_the_catalogue_s_lessons_in_the_order_of_training(lessons):
    settings = recipes.PROFILES["lesson"]
    options, everything = Options("lesson", "cifar10"), settings.paper_models()
    everything += [*settings.adversarial_models(), ("cnn", settings.noise)]
    for names in (["01_baseline"], ["05_architecture_comparison"], list(LESSONS)):
        paths = {name: lessons / "notebooks" / f"{name}.ipynb" for name in names}
        found = runs.needed_models(paths, options)
        assert set(found) == {m for name in names for m in LESSONS[name].needs(settings)}
        assert found == sorted(found, key=everything.index)
    assert runs.needed_models(choose_lessons(["01"]), options) == []  # not in the catalogue


@pytest.mark.parametrize(
    ("names", "parameters", "message"),
    [
        (["07_seventh"], {}, r"unknown lesson '07_seventh'; there are 01_first, 02_second"),
        ([], {"wrod": "loud"}, r"unknown parameter 'wrod'; the lessons have .*word"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(lessons, names, parameters, message):
    with pytest.raises(BatchError, match=message):
        run_quick(lessons, *names, parameters=parameters)


def test_two_runs_in_one_folder_are_refused(lessons):
    (lessons / "out").mkdir()
    with (
        FileLock(lessons / "out" / ".lock"),
        pytest.raises(BatchError, match="another run is writing"),
    ):
        run_quick(lessons)


def test_output_folder_that_cannot_be_written_is_named(lessons):
    (lessons / "out").write_text("a file in the way")
    with pytest.raises(OSError, match=r"out.*Free some space|out.*choose a folder"):
        run_quick(lessons)


SURROUNDINGS = """\
import sys, warnings
import matplotlib.pyplot as plt
from advlab import plots
warnings.warn('once', DeprecationWarning)
plots.use_style()
plt.plot([0, 1])
plt.title('$x_1$')
plt.show()
print(sys.executable, __debug__)
"""


def test_what_a_user_has_set_for_other_programs_changes_no_lesson(lessons, monkeypatch, tmp_path):
    spec = {"argv": ["false"], "display_name": "other", "language": "python"}
    startup = "raise SystemExit('not of this lesson')"
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nbackend: svg\n")
    for name, content in (("kernels/python3/kernel.json", json.dumps(spec)), ("a.py", startup)):
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text(content)
    (tmp_path / "ipython" / "profile_default" / "startup").mkdir(parents=True)
    (tmp_path / "ipython" / "profile_default" / "startup" / "0.py").write_text(
        "plt = sys = None; 1/0"
    )
    long = tmp_path / ("t" * 82)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    for name, value in {
        "MPLBACKEND": "Agg",
        "MATPLOTLIBRC": tmp_path,
        "PYTHONWARNINGS": "error",
        "PYTHONOPTIMIZE": "1",
        "PYTHONSTARTUP": tmp_path / "own" / "a.py",
        "JUPYTER_PATH": tmp_path / "own",
        "IPYTHONDIR": tmp_path / "ipython",
        "TMPDIR": long,
    }.items():
        monkeypatch.setenv(name, str(value))
    write_lesson(lessons, "01_first", SURROUNDINGS)
    executed = nbformat.read(
        run_quick(lessons, "01") / "notebooks" / "01_first.ipynb", as_version=4
    )
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert f"{sys.executable} True\n" in [output.get("text") for output in outputs]


def test_kernel_starts_without_a_home_folder(monkeypatch, tmp_path):
    manager = OwnKernel(connection_file=str(tmp_path / "k.json"))
    assert "HOME" not in manager.kernel_spec.env
    monkeypatch.setattr(files, "user_home", lambda: None)
    assert manager.kernel_spec.env["HOME"] == str(tmp_path)


def test_a_kernels_threads_that_wait_leave_the_cores_to_others(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    manager = OwnKernel(connection_file=str(tmp_path / "k.json"))
    assert manager.kernel_spec.env["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # who asks for it may have it
    assert manager.kernel_spec.env["OMP_WAIT_POLICY"] == "active"


def test_a_kernel_is_not_interrupted_at_the_end_of_its_notebook(lessons, monkeypatch):
    # All but idle, it would now and then print that it caught Ctrl-C.
    sent, usual = [], OwnKernel._async_signal_kernel

    async def signalled(self, signum):
        sent.append(signum)
        await usual(self, signum)

    monkeypatch.setattr(OwnKernel, "_async_signal_kernel", signalled)
    run_quick(lessons, "01")
    assert sent == []


def test_full_disk_is_named_with_the_notebook(lessons, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.papermill, "execute_notebook", full)
    with pytest.raises(BatchError, match=r"write \S+01_first\.partial\.ipynb: No space left"):
        run_quick(lessons, "01")


# --- going on


def test_failing_lesson_is_named_the_others_go_on_and_so_does_resume(lessons):
    write_lesson(lessons, "00_zeroth", "raise KeyError('out of cheese')")
    write_lesson(lessons, "02_second", "raise KeyError('out of ham')")
    with pytest.raises(
        BatchError, match=r"00_zeroth failed in cell 2[^$]*02_second failed"
    ) as failure:
        run_quick(lessons)
    assert (lessons / "01_first").read_text() == "quiet"
    write_lesson(lessons, "00_zeroth", "print('mended')")
    partly = lessons / "out" / "notebooks" / "02_second.partial.ipynb"
    assert "out of ham" in str(failure.value)
    assert str(partly) in str(failure.value)
    assert nbformat.read(partly, as_version=4).cells[1].execution_count == 1
    write_lesson(lessons, "02_second", "print('mended')")
    output = run_quick(lessons, resume=True)
    assert (lessons / "01_first").read_text() == "quiet"  # once, not twice
    assert shown(output, "02_second") == "mended"


def test_lesson_that_was_edited_since_runs_again_and_the_others_do_not(lessons, capsys):
    output = run_quick(lessons)
    committed = lessons / "notebooks" / "01_first.ipynb"  # outputs are no edit
    committed.write_bytes((output / "notebooks" / "01_first.ipynb").read_bytes())
    write_lesson(lessons, "02_second", "print('edited')")
    output = run_quick(lessons, resume=True)
    printed = capsys.readouterr().out
    assert re.search(r"01_first +done before", printed)
    assert re.search(r"02_second +was edited since, and runs again", printed)
    assert (lessons / "01_first").read_text() == "quiet"
    assert shown(output, "02_second") == "edited"
    run_quick(lessons, resume=True)
    assert len(re.findall("done before", capsys.readouterr().out)) == 2


@pytest.mark.parametrize(
    ("asked", "code", "torch", "message"),
    [
        ({"seed": 2}, "abc", None, "seed 1, now 2"),
        ({"parameters": {"word": "loud"}}, "abc", None, "word none, now loud"),
        ({}, "fed", None, "code of advlab abc, now fed"),
        ({}, "abc", "9.9", r"torch \S+, now 9.9"),
    ],
)
def test_resume_of_another_run_says_what_differs(lessons, monkeypatch, asked, code, torch, message):
    monkeypatch.setattr(runs, "code_hash", lambda: "abc")
    output = run_quick(lessons, "01", seed=1)
    before = (output / "run.json").read_bytes()
    monkeypatch.setattr(runs, "code_hash", lambda: code)
    if torch:
        monkeypatch.setattr(runs.torch, "__version__", torch)
    with pytest.raises(BatchError, match=rf"the run in .*out was made with {message}\. Go back"):
        run_quick(lessons, "01", **{"seed": 1, **asked}, resume=True)
    assert (output / "run.json").read_bytes() == before
    assert (lessons / "01_first").read_text() == "quiet"


@pytest.mark.parametrize(
    "content", ["", "{}", '{"settings": {', "[1]", '{"settings": {}, "seconds": {}}']
)
def test_damaged_record_is_named_with_the_mend(lessons, content):
    record = lessons / "out" / "run.json"
    record.parent.mkdir()
    record.write_text(content)
    with pytest.raises(BatchError, match=rf"{re.escape(str(record))} is damaged.* Delete it"):
        run_quick(lessons, "01", resume=True)
    run_quick(lessons, "01")
    assert read_record(lessons / "out")["notebooks"]


def test_record_holds_the_most_memory_until_a_run_without_resume_starts_again(lessons):
    record = read_record(run_quick(lessons, "01"))
    assert record["peak_mb"] > 50  # one interpreter with torch is more
    (lessons / "out" / "run.json").write_text(json.dumps(record | {"peak_mb": 1_000_000}))
    again = read_record(run_quick(lessons, resume=True))
    assert again["peak_mb"] == 1_000_000
    assert list(again["seconds"]) == ["01_first", "02_second"]
    assert read_record(run_quick(lessons, "01"))["peak_mb"] < 1_000_000
    assert (lessons / "01_first").read_text() == "quietquiet"


def test_killed_run_goes_on_from_the_last_finished_lesson(lessons):
    write_lesson(lessons, "02_second", "import time\ntime.sleep(600)")
    code = (
        "import sys; from pathlib import Path; from advlab import files; from advlab.upkeep import "
        "runs, tasks; files.home = lambda: Path(sys.argv[1]); "
        "options = tasks.Options('quick', 'shapes10', output_dir=sys.argv[1] + '/out'); "
        "runs.run(options=options)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(lessons)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    record = lessons / "out" / "run.json"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if record.is_file() and read_record(record.parent)["notebooks"]:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(read_record(record.parent)["notebooks"]) == ["01_first"]
    write_lesson(lessons, "02_second", "print('this time')")
    output = run_quick(lessons, resume=True)
    assert (lessons / "01_first").read_text() == "quiet"
    assert shown(output, "02_second") == "this time"


# --- the summary


def test_summary_compares_only_what_is_fair(tmp_path, capsys):
    console = Console(width=200)
    figures = tmp_path / "figures"
    figures.mkdir()
    for arch, name in readme.TABLES.items():
        rows = paper.published()
        rows = rows[rows["architecture"] == arch].drop(columns="loss")
        rows = rows.assign(data="Shapes-10", recipe="quick", n=500, seed=0, source="x baseline")
        rows.to_csv(figures / name, index=False)
    runs.print_summary(tmp_path, console)
    shown = capsys.readouterr().out
    assert "Shapes-10" in shown
    assert "paper's in brackets" not in shown
    assert "mean absolute difference" not in shown
    recipe = "quick"
    for fair in ("paper", "fast"):
        for name in readme.TABLES.values():
            text = (figures / name).read_text().replace("Shapes-10", "CIFAR-10")
            (figures / name).write_text(text.replace(recipe, fair))
        recipe = fair
        runs.print_summary(tmp_path, console)
        shown = capsys.readouterr().out
        assert "80.4 (80.4)" in shown
        assert "mean absolute difference is 0.00" in shown
