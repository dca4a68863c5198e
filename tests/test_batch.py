"""The batch runner, on lessons of two cells."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from conftest import write_lesson
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_notebook, new_output

from advlab import checkpoints, data, paper, session
from advlab.tools import batch, train
from advlab.training import Recipe


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


def test_solutions_run_only_when_asked_for(lessons):
    name = "solutions/01_first"
    write_lesson(lessons, name, "print('solved')")
    assert list(batch.choose_lessons([])) == ["01_first", "02_second"]
    assert list(batch.choose_lessons(["01", "solutions"])) == ["01_first", name]
    output = run_quick(lessons, names=["solutions"])
    executed = nbformat.read(output / "notebooks" / f"{name}.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text.strip() == "solved"
    assert not (lessons / "01_first").exists()


def test_unknown_lesson_is_refused_by_name(lessons):
    with pytest.raises(batch.BatchError, match=r"'07_seventh'.*01_first, 02_second"):
        run_quick(lessons, names=["07_seventh"])


def test_unknown_parameter_is_refused_by_name(lessons):
    with pytest.raises(batch.BatchError, match=r"'wrod'.*word"):
        run_quick(lessons, parameters={"wrod": "loud"})


def test_unknown_profile_is_refused_by_name(lessons):
    with pytest.raises(ValueError, match="'slow'"):
        batch.run(profile="slow", dataset="shapes10")


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


def read_record(output: Path) -> dict:
    return json.loads((output / "run.json").read_text())


def test_record_holds_the_most_memory_of_all_parts(lessons):
    record = read_record(run_quick(lessons))
    assert record["peak_mb"] > 50  # one interpreter with torch is more
    assert list(record["seconds"]) == ["01_first", "02_second"]
    (lessons / "out" / "run.json").write_text(json.dumps(record | {"peak_mb": 1_000_000}))
    assert read_record(run_quick(lessons, resume=True))["peak_mb"] == 1_000_000


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


def test_clean_notebook_keeps_a_widget_s_picture_alone():
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "image/png": "abc"}
    cell = new_code_cell("x", outputs=[new_output("display_data", data=view)])
    cleaned = batch.clean_notebook(new_notebook(cells=[cell]))
    assert cleaned.cells[0].outputs[0].data == {"image/png": "abc"}


def open_tiny_zoo(folder: str) -> checkpoints.Zoo:
    """Open a zoo of tiny models; at module level, so that worker processes can call it."""
    recipe = Recipe("tiny", epochs=1, batch_size=32)
    return checkpoints.Zoo(data.Shapes10(64, 32), recipe, 0, Path(folder), progress=False)


def test_train_models_trains_what_is_missing_in_processes(tmp_path, capfd):
    make_zoo = partial(open_tiny_zoo, str(tmp_path))
    open_tiny_zoo(str(tmp_path)).get("cnn-lstm")
    before = (tmp_path / "cnn-lstm-baseline-seed0.safetensors").stat().st_mtime_ns
    wanted = [("cnn-lstm", 0.0), ("cnn", 0.0), ("cnn", 0.2)]
    assert train.train_models(make_zoo, wanted, jobs=2) == 2
    assert make_zoo().find("cnn", 0.2)
    assert (tmp_path / "cnn-lstm-baseline-seed0.safetensors").stat().st_mtime_ns == before
    assert "2/2 models" in capfd.readouterr().out


def test_environment_is_set_unset_and_restored(monkeypatch):
    monkeypatch.setenv("ADVLAB_ONE", "before")
    monkeypatch.setenv("ADVLAB_TWO", "before")
    monkeypatch.delenv("ADVLAB_THREE", raising=False)
    names = ("ADVLAB_ONE", "ADVLAB_TWO", "ADVLAB_THREE")
    with train.environment(ADVLAB_ONE="inside", ADVLAB_TWO=None, ADVLAB_THREE="inside"):
        assert [os.environ.get(name) for name in names] == ["inside", None, "inside"]
    assert [os.environ.get(name) for name in names] == ["before", "before", None]


def test_worker_imports_neither_plotting_nor_papermill():
    code = "import sys, advlab.tools.train; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"matplotlib", "papermill", "seaborn"} & set(loaded.stdout.split())


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
    recipe = "quick"
    for fair in ("paper", "fast"):
        for name in batch.readme.TABLES.values():
            text = (figures / name).read_text().replace("Shapes-10", "CIFAR-10")
            (figures / name).write_text(text.replace(recipe, fair))
        recipe = fair
        batch.print_summary(tmp_path, console)
        shown = capsys.readouterr().out
        assert "80.4 (80.4)" in shown
        assert "mean absolute difference 0.00" in shown


# --- the whole paper from nothing


@pytest.fixture
def whole_run(empty_home, monkeypatch):
    """A home in which a run leaves its record and a figure; returns what each run was asked for."""
    asked = []

    def run(lessons, *, output_dir, console=None, **settings):
        assert tuple(lessons) == batch.PAPER_LESSONS
        output = Path(output_dir)
        kept = sorted(path.name for path in output.iterdir()) if output.exists() else []
        cache = os.environ["ADVLAB_CACHE"]
        asked.append({**settings, "output_dir": output, "kept": kept, "cache": cache})
        (output / "figures").mkdir(parents=True, exist_ok=True)
        (output / "run.json").write_text('{"seconds": {}, "peak_mb": 1}')
        return output

    monkeypatch.setattr(batch, "run", run)
    monkeypatch.setattr(
        batch,
        "_tables_of_seed",
        lambda seed, place: pd.DataFrame({"seed": [seed] * 2, "accuracy": [0.5, seed / 3]}),
    )
    return asked


def test_reproduce_runs_the_fast_profile_with_a_cache_of_its_own(whole_run, empty_home):
    before = os.environ["ADVLAB_CACHE"]
    output = batch.reproduce(dataset="shapes10")
    assert output == empty_home / "outputs" / "fast-shapes10"
    assert whole_run == [
        {
            "profile": "fast",
            "dataset": "shapes10",
            "data_dir": "auto",
            "output_dir": output,
            "resume": False,
            "kept": [],
            "cache": str(output / "cache"),
        }
    ]
    assert os.environ["ADVLAB_CACHE"] == before
    assert not (output / "figures" / "l04_seeds.csv").exists()  # one seed has its tables anyway
    assert not (empty_home / "figures").exists()


@pytest.mark.parametrize(("resume", "kept"), [(False, []), (True, ["figures", "old", "run.json"])])
def test_reproduce_starts_from_nothing_unless_it_resumes(whole_run, resume, kept):
    output = batch.reproduce(dataset="shapes10")
    (output / "old").touch()
    batch.reproduce(dataset="shapes10", resume=resume)
    assert (whole_run[1]["resume"], whole_run[1]["kept"]) == (resume, kept)


def test_reproduce_writes_the_tables_of_all_seeds(whole_run):
    output = batch.reproduce(2, dataset="shapes10")
    table = pd.read_csv(output / "figures" / "l04_seeds.csv")
    assert table["seed"].tolist() == [0, 0, 1, 1]
    assert table["accuracy"].tolist() == [0.5, 0, 0.5, 0.333333]


@pytest.mark.parametrize("seeds", [0, -1])
def test_reproduce_refuses_no_seeds(whole_run, seeds):
    with pytest.raises(ValueError, match=f"seeds is {seeds}; train with one seed at least"):
        batch.reproduce(seeds, dataset="shapes10")
    assert whole_run == []


@pytest.mark.parametrize("dataset", ["shapes10", "auto"])
def test_other_data_than_cifar10_are_not_published(whole_run, no_network, dataset):
    output = batch.reproduce(dataset="shapes10")
    with pytest.raises(batch.BatchError, match=r"--publish: there is no CIFAR-10"):
        batch.reproduce(dataset=dataset, publish=True)
    assert (output / "run.json").exists()  # refused before anything is removed
    assert len(whole_run) == 1


@pytest.mark.parametrize("seeds", [1, 2])
def test_publish_copies_the_record_and_the_table_of_seeds(
    whole_run, empty_home, fake_cifar10, seeds
):
    output = session.default_output("fast", "cifar10")
    figures = empty_home / "figures"
    batch.reproduce(seeds, data_dir=str(fake_cifar10))
    for seed in (0, 1):
        path = output / "checkpoints" / f"cnn-baseline-seed{seed}.safetensors"
        checkpoints.save(torch.nn.Linear(1, 1), {"seconds": 7.06 + seed}, path)
    assert not figures.exists()
    batch.reproduce(seeds, data_dir=str(fake_cifar10), resume=True, publish=True)
    assert whole_run[0]["data_dir"] == str(fake_cifar10)
    record = json.loads((output / "run.json").read_text())
    published = json.loads((figures / "reproduce.json").read_text())
    assert published == record | {"models": {"cnn-baseline-seed0": 7.1}}
    assert (figures / "l04_seeds.csv").exists() == (seeds > 1)
    if seeds > 1:
        table = (output / "figures" / "l04_seeds.csv").read_bytes()
        assert (figures / "l04_seeds.csv").read_bytes() == table


def test_reproduce_runs_the_lessons_of_the_paper(lessons, monkeypatch):
    monkeypatch.setattr(batch, "PAPER_LESSONS", ("01",))
    output = batch.reproduce(dataset="shapes10")
    record = read_record(output)
    assert record["settings"] == {"profile": "fast", "dataset": "shapes10", "seed": 0}
    assert list(record["seconds"]) == ["01_first"]
    assert [path.name for path in (output / "notebooks").iterdir()] == ["01_first.ipynb"]


def test_tables_of_a_seed_are_the_papers_two(tiny_shapes, tmp_path, monkeypatch):
    asked, opened = [], []

    def make_zoo(*arguments):
        opened.append(arguments)
        recipe = Recipe("tiny", epochs=1, batch_size=32)
        return checkpoints.Zoo(tiny_shapes, recipe, arguments[2], tmp_path, progress=False)

    def train_models(make_zoo, wanted):
        asked.extend(wanted)
        return 0

    monkeypatch.setattr(batch, "open_zoo", make_zoo)
    monkeypatch.setattr(batch, "train_models", train_models)
    place = {"dataset": "shapes10", "data_dir": "auto", "output_dir": "out"}
    table = batch._tables_of_seed(7, place)
    assert set(opened) == {("fast", "shapes10", 7, "auto", "out")}
    assert asked[:2] == [("cnn-lstm", 0.0), ("cnn", 0.0)]  # baselines first
    assert set(asked) == {(arch, eps) for arch in paper.TABLES for eps in paper.TABLE_TRAIN_EPS}
    assert len(asked) == 10
    cells = paper.published()[["architecture", "train_eps", "test_eps"]]
    assert table[["architecture", "train_eps", "test_eps"]].to_numpy().tolist() == (
        cells.to_numpy().tolist()
    )
    assert set(table["seed"]) == {7}
    assert set(table["attack"]) == {"fgsm-per-image"}
    for arch, rows in table.groupby("architecture"):
        assert set(rows["source"]) == {f"{arch} baseline"}
