"""The batch runner, on lessons of two cells."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import pytest
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_notebook, new_output

from advlab import checkpoints, data, paper
from advlab.tools import batch, train
from advlab.training import Recipe

PARAMETERS = "profile = 'auto'\nseed = 0\nword = 'quiet'"


def write_lesson(home: Path, name: str, code: str) -> None:
    """Write a notebook with a parameters cell and one more."""
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(code)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    (home / "notebooks").mkdir(exist_ok=True)
    nbformat.write(notebook, home / "notebooks" / f"{name}.ipynb")


@pytest.fixture
def lessons(empty_home, monkeypatch):
    """A clone with two lessons that leave traces of their running, and no models to train."""
    monkeypatch.setattr(batch, "_train", lambda *args: None)
    for name in ("01_first", "02_second"):
        trace = f"open({str(empty_home / name)!r}, 'a').write(word)\nprint(seed)"
        write_lesson(empty_home, name, trace)
    return empty_home


def run_quick(home: Path, **settings) -> Path:
    """Run the lessons of `home` on Shapes-10."""
    return batch.run(profile="quick", dataset="shapes10", output_dir=str(home / "out"), **settings)


def test_run_executes_in_order_and_passes_parameters(lessons):
    output = run_quick(lessons, seed=3, parameters={"word": "loud"})
    assert (lessons / "01_first").read_text() == (lessons / "02_second").read_text() == "loud"
    executed = nbformat.read(output / "notebooks" / "02_second.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text.strip() == "3"


@pytest.mark.parametrize("name", ["02_second", "02", "second", "02_second.ipynb"])
def test_choose_lessons_takes_short_names(lessons, name):
    assert list(batch.choose_lessons([name])) == ["02_second"]


def test_unknown_lesson_is_refused_by_name(lessons):
    with pytest.raises(batch.BatchError, match=r"'07_seventh'.*01_first, 02_second"):
        run_quick(lessons, names=["07_seventh"])


def test_unknown_parameter_is_refused_by_name(lessons):
    with pytest.raises(batch.BatchError, match=r"'wrod'.*word"):
        run_quick(lessons, parameters={"wrod": "loud"})


def test_unknown_profile_is_refused_by_name(lessons):
    with pytest.raises(ValueError, match="'fast'"):
        batch.run(profile="fast", dataset="shapes10")


def test_failing_lesson_stops_the_run_and_resume_goes_on(lessons):
    write_lesson(lessons, "02_second", "raise KeyError('out of cheese')")
    with pytest.raises(batch.BatchError) as failure:
        run_quick(lessons)
    assert "02_second failed" in str(failure.value)
    assert "out of cheese" in str(failure.value)
    partly = lessons / "out" / "notebooks" / "02_second.partial.ipynb"
    assert str(partly) in str(failure.value)
    assert nbformat.read(partly, as_version=4).cells[1].execution_count == 1
    write_lesson(lessons, "02_second", "print('mended')")
    output = run_quick(lessons, resume=True)
    assert (lessons / "01_first").read_text() == "quiet"  # once, not twice
    assert (output / "notebooks" / "02_second.ipynb").is_file()


def test_run_with_defaults_leaves_the_lessons_as_written(lessons):
    output = run_quick(lessons)
    executed = nbformat.read(output / "notebooks" / "01_first.ipynb", as_version=4)
    source = nbformat.read(lessons / "notebooks" / "01_first.ipynb", as_version=4)
    assert [c.source for c in executed.cells] == [c.source for c in source.cells]


def test_run_without_resume_starts_again(lessons):
    run_quick(lessons)
    run_quick(lessons)
    assert (lessons / "01_first").read_text() == "quietquiet"


def test_resume_with_other_settings_is_refused(lessons):
    run_quick(lessons, seed=1)
    with pytest.raises(batch.BatchError, match=r"settings.*'seed': 1"):
        run_quick(lessons, seed=2, resume=True)


def test_two_runs_in_one_folder_are_refused(lessons):
    (lessons / "out").mkdir()
    with (
        FileLock(lessons / "out" / ".lock"),
        pytest.raises(batch.BatchError, match="another run is writing"),
    ):
        run_quick(lessons)


def test_output_folder_that_cannot_be_written_is_named(lessons):
    (lessons / "out").write_text("a file in the way")
    with pytest.raises(OSError, match=r"out.*Free some space|out.*choose a folder"):
        run_quick(lessons)


def test_killed_run_goes_on_from_the_last_finished_lesson(lessons):
    write_lesson(lessons, "02_second", "import time\ntime.sleep(600)")
    code = (
        "import sys; from pathlib import Path; from advlab import files; from advlab.tools import "
        "batch; files.home = lambda: Path(sys.argv[1]); batch._train = lambda *a: None; "
        "batch.run(profile='quick', dataset='shapes10', output_dir=sys.argv[1] + '/out')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(lessons)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    record = lessons / "out" / "run.json"
    deadline = time.monotonic() + 120
    while not record.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert record.is_file(), "the first lesson did not finish"
    write_lesson(lessons, "02_second", "print('this time')")
    output = run_quick(lessons, resume=True)
    assert (lessons / "01_first").read_text() == "quiet"
    executed = nbformat.read(output / "notebooks" / "02_second.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == "this time\n"


def test_clean_notebook_keeps_what_a_terminal_would_show():
    pieces = [
        new_output("stream", name="stdout", text="bar  1%\rbar 50%"),
        new_output("stream", name="stdout", text="\r       \rdone\n"),
    ]
    cell = new_code_cell("x", outputs=pieces, metadata={"papermill": {}, "tags": []})
    notebook = new_notebook(cells=[cell], metadata={"papermill": {}, "widgets": {}})
    cleaned = batch.clean_notebook(notebook)
    assert [output.text for output in cleaned.cells[0].outputs] == ["done\n"]
    assert not cleaned.metadata
    assert not cleaned.cells[0].metadata


def open_tiny_zoo(folder: str) -> checkpoints.Zoo:
    """Open a zoo of tiny models; at module level, so that worker processes can call it."""
    recipe = Recipe("tiny", epochs=1, batch_size=32)
    return checkpoints.Zoo(data.Shapes10(64, 32), recipe, 0, Path(folder), progress=False)


def test_train_models_trains_what_is_missing_in_processes(tmp_path, capfd):
    make_zoo = partial(open_tiny_zoo, str(tmp_path))
    open_tiny_zoo(str(tmp_path)).get("cnn-lstm")
    before = (tmp_path / "cnn-lstm-baseline-seed0.safetensors").stat().st_mtime_ns
    train.train_models(make_zoo, [("cnn-lstm", 0.0), ("cnn", 0.0), ("cnn", 0.2)], jobs=2)
    assert make_zoo().find("cnn", 0.2)
    assert (tmp_path / "cnn-lstm-baseline-seed0.safetensors").stat().st_mtime_ns == before
    assert "2/2 models" in capfd.readouterr().out


def test_summary_compares_only_what_is_fair(tmp_path, capsys):
    console = batch.Console(width=200)
    figures = tmp_path / "figures"
    figures.mkdir()
    for arch, name in batch.readme.TABLES.items():
        rows = paper.published()
        rows = rows[rows["architecture"] == arch].drop(columns="loss")
        rows = rows.assign(data="Shapes-10", recipe="quick", n=500, seed=0, source="x baseline")
        rows.to_csv(figures / name, index=False)
    batch.print_summary(tmp_path, console)
    shown = capsys.readouterr().out
    assert "Shapes-10" in shown
    assert "paper's in brackets" not in shown
    assert "mean absolute difference" not in shown
    for name in batch.readme.TABLES.values():
        text = (figures / name).read_text().replace("Shapes-10", "CIFAR-10")
        (figures / name).write_text(text.replace("quick", "paper"))
    batch.print_summary(tmp_path, console)
    shown = capsys.readouterr().out
    assert "80.4 (80.4)" in shown
    assert "mean absolute difference 0.00" in shown
