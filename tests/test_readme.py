"""README.md: links, commands and measured numbers."""

import re

import pytest

from advlab import files
from advlab.tools import readme

ROOT = files.repository()
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "data/README.md"])
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


def test_a_missing_mark_is_named():
    with pytest.raises(ValueError, match="<!-- results"):
        readme.refreshed("no marks here", ROOT)


def test_first_screen_has_a_picture_and_the_two_commands():
    first = "\n".join(README.splitlines()[:25])
    assert "![" in first
    assert "make run" in first
    assert "make test" in first
