"""Retraining and reproducing: from nothing, with a cache of their own, and what is published."""

import json
import os
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from conftest import write_lesson
from nbformat.v4 import new_code_cell, new_notebook, new_output

from advlab import checkpoints, lab
from advlab.data import DataError
from advlab.upkeep import publish
from advlab.upkeep.runs import BatchError
from advlab.upkeep.tasks import Options


def test_clean_notebook_keeps_what_a_terminal_would_show_and_of_a_widget_its_picture():
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "image/png": "abc"}
    pieces = [
        new_output("stream", name="stdout", text="bar  1%\rbar 50%"),
        new_output("stream", name="stdout", text="\r       \rdone\n"),
        new_output("display_data", data=view),
    ]
    cell = new_code_cell("x", outputs=pieces, metadata={"papermill": {}, "tags": []})
    notebook = new_notebook(cells=[cell], metadata={"papermill": {}, "widgets": {}})
    cleaned = publish.clean_notebook(notebook)
    text, picture = cleaned.cells[0].outputs
    assert (text.text, picture.data) == ("done\n", {"image/png": "abc"})
    assert not cleaned.metadata
    assert not cleaned.cells[0].metadata


# --- the whole paper from nothing


@pytest.fixture
def whole_run(empty_home, monkeypatch):
    """A home in which a run leaves its record and a figure; returns what each run was asked for."""
    asked = []

    def run(lessons, options, *, resume, **more):
        assert tuple(lessons) == publish.PAPER_LESSONS
        output = Path(options.output_dir)
        kept = sorted(path.name for path in output.iterdir()) if output.exists() else []
        asked.append((options, resume, kept, os.environ["ADVLAB_CACHE"]))
        (output / "figures").mkdir(parents=True, exist_ok=True)
        (output / "run.json").write_text('{"seconds": {}, "peak_mb": 1}')
        return output

    monkeypatch.setattr(publish, "run", run)

    def sweep(what, options, **more):
        assert (what.recipes, what.attacks, options) == (("fast",), (), asked[-1][0])
        table = Path(options.output_dir) / "sweep.csv"
        table.write_text("".join(f"{seed}\n" for seed in ("seed", *what.seeds)))
        return table

    monkeypatch.setattr(publish.sweep, "run", sweep)
    return asked


def test_reproduce_runs_the_fast_profile_with_a_cache_of_its_own(whole_run, empty_home):
    before = os.environ["ADVLAB_CACHE"]
    output = publish.reproduce(dataset="shapes10")
    assert output == empty_home / "outputs" / "fast-shapes10"
    options = Options("fast", "shapes10", output_dir=str(output))
    assert whole_run == [(options, False, [], str(output / "cache"))]
    assert os.environ["ADVLAB_CACHE"] == before
    assert not (output / "figures" / "fast_seeds.csv").exists()  # one seed has its tables anyway
    assert not (empty_home / "figures").exists()


@pytest.mark.parametrize(("resume", "kept"), [(False, []), (True, ["figures", "old", "run.json"])])
def test_reproduce_starts_from_nothing_unless_it_resumes(whole_run, resume, kept):
    output = publish.reproduce(dataset="shapes10")
    (output / "old").touch()
    publish.reproduce(dataset="shapes10", resume=resume)
    assert whole_run[1][1:3] == (resume, kept)


def test_reproduce_writes_the_tables_of_all_seeds(whole_run):
    output = publish.reproduce(2, dataset="shapes10")
    assert pd.read_csv(output / "figures" / "fast_seeds.csv")["seed"].tolist() == [0, 1]


@pytest.mark.parametrize("dataset", ["shapes10", "auto"])
def test_other_data_than_cifar10_are_not_published(whole_run, no_network, dataset):
    output = publish.reproduce(dataset="shapes10")
    with pytest.raises(BatchError, match=r"--publish: there is no CIFAR-10"):
        publish.reproduce(dataset=dataset, publish=True)
    assert (output / "run.json").exists()  # refused before anything is removed
    assert len(whole_run) == 1


@pytest.mark.parametrize("seeds", [1, 2])
def test_publish_copies_the_record_and_the_table_of_seeds(
    whole_run, empty_home, fake_cifar10, seeds
):
    output = lab.default_output("fast", "cifar10")
    figures = empty_home / "figures"
    publish.reproduce(seeds, data_dir=str(fake_cifar10))
    for seed in (0, 1):
        path = output / "checkpoints" / f"cnn-baseline-seed{seed}.safetensors"
        checkpoints.save(torch.nn.Linear(1, 1), {"seconds": 7.06 + seed}, path)
    assert not figures.exists()
    publish.reproduce(seeds, data_dir=str(fake_cifar10), resume=True, publish=True)
    assert whole_run[0][0].data_dir == str(fake_cifar10)
    record = json.loads((output / "run.json").read_text())
    published = json.loads((figures / "reproduce.json").read_text())
    assert published == record | {"models": {"cnn-baseline-seed0": 7.1}}
    assert (figures / "fast_seeds.csv").exists() == (seeds > 1)
    if seeds > 1:
        table = (output / "figures" / "fast_seeds.csv").read_bytes()
        assert (figures / "fast_seeds.csv").read_bytes() == table


# --- retraining


@pytest.fixture
def clone(empty_home, fake_cifar10, monkeypatch):
    """A clone with one lesson, made-up data and nothing to train; says what it found in its cache.

    The times of its profiles are not written into pages and headers, which it has not.
    """
    monkeypatch.setenv("ADVLAB_DATA", str(fake_cifar10))
    monkeypatch.delenv("ADVLAB_OUTPUT")
    for name in ("refresh", "refresh_headers"):
        monkeypatch.setattr(publish.readme, name, lambda home: None)
    code = (
        "import os, pathlib\n"
        "cache = pathlib.Path(os.environ['ADVLAB_CACHE'])\n"
        "print((cache / 'measured').exists())\n"
        "cache.mkdir(parents=True, exist_ok=True)\n"
        "(cache / 'measured').touch()\n"
        "figures = pathlib.Path(os.environ['ADVLAB_OUTPUT']) / 'figures'\n"
        "figures.mkdir(exist_ok=True)\n"
        "(figures / 'new.csv').touch()"
    )
    write_lesson(empty_home, "01_first", code)
    return empty_home


def test_retrain_reads_no_cache_of_the_user_s_and_publishes(clone):
    cache = Path(os.environ["ADVLAB_CACHE"])
    cache.mkdir()
    (cache / "measured").touch()
    publish.retrain()
    folders = [clone / "outputs" / f"{name}-cifar10" for name in ("paper", "lesson", "quick")]
    for folder in (*folders, clone):
        executed = nbformat.read(folder / "notebooks" / "01_first.ipynb", as_version=4)
        assert executed.cells[-1].outputs[0].text.strip() == "False"
    assert (folders[0] / "cache" / "measured").exists()
    assert [path.name for path in cache.iterdir()] == ["measured"]
    assert (clone / "figures" / "new.csv").exists()
    times = json.loads((clone / "figures" / "times.json").read_text())
    assert {name: list(parts) for name, parts in times["profiles"].items()} == {
        "lesson": ["01_first"],
        "quick": ["01_first"],
    }


def test_lessons_are_timed_anew_with_nothing_measured_and_the_rest_of_the_times_is_kept(clone):
    path = clone / "figures" / "times.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"machine": "trained here", "processes": 7, "profiles": {"lesson": {"x": 1}}}')
    publish.time_lessons()
    times = json.loads(path.read_text())
    assert (times["machine"], times["processes"]) == ("trained here", 7)
    assert times["timed_on"] == publish.machine()
    assert {name: list(parts) for name, parts in times["profiles"].items()} == {
        "lesson": ["01_first"],
        "quick": ["01_first"],
    }
    for profile in ("lesson", "quick"):
        executed = clone / "outputs" / f"{profile}-cifar10" / "notebooks" / "01_first.ipynb"
        assert nbformat.read(executed, as_version=4).cells[-1].outputs[0].text.strip() == "False"


def test_retrain_without_cifar10_removes_nothing(clone, monkeypatch, no_network):
    kept = clone / "outputs" / "paper-cifar10" / "hours of work"
    kept.mkdir(parents=True)
    monkeypatch.delenv("ADVLAB_DATA")
    with pytest.raises(DataError, match="CIFAR-10 is not here"):
        publish.retrain()
    assert kept.exists()
