"""README.md: links, commands and measured numbers."""

import json
import re

import nbformat
import pandas as pd
import pytest
from conftest import write_lesson
from nbformat.v4 import new_markdown_cell

from advlab import files
from advlab.catalogue import Lesson
from advlab.upkeep import readme

ROOT = files.repository()
OLD_TIME = readme.time_line(99, 9)
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "data/README.md", readme.GUIDE])
def test_local_links_and_pictures_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    local = [t for t in targets if not t.startswith("http")]
    assert [t for t in local if not (ROOT / page).parent.joinpath(t).exists()] == []


def test_make_targets_that_it_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`?\bmake ([a-z]+)\b(?=`|$|\s+#|;| runs| opens)", README, re.M))
    assert {"run", "test", "lab", "retrain"} <= named
    assert [name for name in named if f"\n{name}:" not in makefile] == []


def test_measured_blocks_are_what_the_committed_results_give():
    assert readme.refreshed(README, ROOT) == README
    guide = (ROOT / readme.GUIDE).read_text(encoding="utf-8")
    assert readme.refreshed(guide, ROOT, readme.GUIDE_BLOCKS) == guide


def test_new_lesson_is_listed_before_it_was_timed(empty_home, monkeypatch):
    new = Lesson("09_new", "About it", lambda settings: [], minutes=30, after=("01",))
    monkeypatch.setattr(
        readme,
        "LESSONS",
        {"01_first": Lesson("01_first", "It", new.needs, minutes=60), "09_new": new},
    )
    for name in readme.LESSONS:
        write_lesson(empty_home, name, "")
        path = empty_home / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        notebook.cells.insert(0, new_markdown_cell(f"# Title\n\n{OLD_TIME}"))
        nbformat.write(notebook, path)
    times = {"profiles": {"lesson": {"01_first": 12.3}, "quick": {"01_first": 4.5}}}
    (empty_home / "figures").mkdir()
    (empty_home / "figures" / "times.json").write_text(json.dumps(times))
    lines = [re.sub(" +", " ", line) for line in readme.lessons_block(empty_home).splitlines()]
    assert lines[2:] == [
        "| [01](notebooks/01_first.ipynb) | It | 60 min | | 12 s | 4 s |",
        "| [09](notebooks/09_new.ipynb) | About it | 30 min | 01 | not timed yet | not timed yet |",
    ]
    readme.refresh_headers(empty_home)
    headers = [
        nbformat.read(path, as_version=4).cells[0].source.splitlines()[2]
        for path in readme.lesson_paths(empty_home)
    ]
    assert headers == [readme.time_line(12.3, 4.5), OLD_TIME]


def test_tables_show_numbers_as_they_are_given():
    lines = readme.markdown(pd.DataFrame({"x": ["1.50", "a"], "y": ["2,000", ""]})).splitlines()
    assert lines[2].split() == ["|", "1.50", "|", "2,000", "|"]
    assert lines[3].split() == ["|", "a", "|", "|"]


def test_a_missing_mark_is_named():
    with pytest.raises(ValueError, match="<!-- results"):
        readme.refreshed("no marks here", ROOT)


def test_first_screen_has_a_picture_and_the_two_commands():
    first = "\n".join(README.splitlines()[:25])
    assert "![" in first
    assert "make run" in first
    assert "make test" in first
