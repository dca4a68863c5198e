"""README.md and the pages beside what they tell of: links, commands and measured numbers."""

import json
import re

import nbformat
import pandas as pd
import pytest
from conftest import write_lesson
from nbformat.v4 import new_markdown_cell

from advlab import files
from advlab.bench import scale
from advlab.bench.measure import missed_by
from advlab.catalogue import Lesson
from advlab.upkeep import readme

ROOT = files.repository()
OLD_TIME = readme.time_line(99, 9)
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), ROOT / readme.GUIDE)
}
README = PAGES["README.md"]
each_page = pytest.mark.parametrize("page", sorted(PAGES))


def anchors(text):
    """Return the anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_pages_of_the_clone_are_found():
    assert {"CONTRIBUTING.md", "CHANGELOG.md", "data/README.md", *readme.PAGES} <= PAGES.keys()


@each_page
def test_local_links_and_pictures_lead_somewhere(page):
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)", PAGES[page]):
        path, _, part = link.partition("#")
        if path.startswith("http"):
            continue
        target = (folder / path).resolve() if path else ROOT / page
        assert target.exists(), link
        if part:
            assert part in anchors(target.read_text(encoding="utf-8")), link


@each_page
def test_make_targets_that_it_names_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:^|`)make ([a-z]+)\b", PAGES[page], re.M))
    assert [name for name in named if f"\n{name}:" not in makefile] == []
    assert page != "README.md" or {"run", "test", "lab"} <= named


@pytest.mark.parametrize("page", sorted(readme.PAGES))
def test_measured_blocks_are_what_the_committed_results_give(page):
    assert readme.refreshed(PAGES[page], ROOT, readme.PAGES[page]) == PAGES[page]


def with_figures(home, **changed):
    """Copy the tables of figures/ that README.md tells of; `changed`: what one of them says."""
    (home / "figures").mkdir()
    for name in (*readme.TABLES.values(), "audit.csv"):
        rows = pd.read_csv(ROOT / "figures" / name)
        for column, (model, value) in changed.items() if name == "audit.csv" else ():
            rows.loc[(rows["model"] == model) & (rows["attack"] == "autoattack"), column] = value
        rows.to_csv(home / "figures" / name, index=False)
    return home


def bench_rows():
    return pd.read_csv(ROOT / "figures" / "bench.csv")


def test_each_target_that_was_missed_is_explained():
    told = set(re.findall(r"^- \*\*([^*]+)\*\*", PAGES["figures/README.md"], re.M))
    missed = {row.part for row in bench_rows().itertuples() if missed_by(row) > 0}
    assert missed == told


def test_what_is_said_of_many_workers_is_in_the_table():
    rows = bench_rows().query("part == 'workers' and what.str.contains('simulated')")
    (note,) = set(rows["note"])
    work, path = re.findall(r"([\d.]+) h", note)
    page = " ".join(PAGES["advlab/README.md"].split())
    assert rows["what"].str.contains(f"sweep of {scale.SEEDS} seeds").all()
    assert f"a sweep of five seeds ({work} h of work) on 16 and on 256" in page
    assert set(rows["way"]) == {f"{number} workers" for number in scale.WORKERS}
    assert f"sleep a {scale.FASTER}th of" in page
    assert f"(baseline, directions, augmented model, table) is {path} h" in page


def test_what_is_said_of_the_search_is_in_its_table():
    rows = pd.read_csv(ROOT / "figures" / "search.csv").set_index("step")
    page = " ".join(PAGES["figures/README.md"].split())
    below = rows[(rows["p"] < 0.05) & (rows["better"] < rows["worse"])]
    assert set(below.index) == {"crops of 4 pixels", "8/255 in training", "TRADES"}
    assert "Crops, TRADES and 8/255 keep fewer images than the recipe as it is." in page
    assert (rows["p"].drop(below.index).drop("as robust") >= 0.05).all()
    both = rows["both"]
    assert (both[["weight decay 0.002", "soft labels and weight decay"]] > both["as robust"]).all()
    gains = "Weight decay, with or without soft labels, gains too little for 5,000 images to show;"
    assert f"{gains} soft labels alone gain nothing." in page
    assert both["half soft labels"] <= both["as robust"]
    assert set(rows["n"]) == {5_000}


def test_what_is_said_of_bfloat16_is_in_the_tables():
    rows = bench_rows().query("part == 'precision'")
    full, half = (rows[rows["way"].str.contains(f"in {kind}")] for kind in ("float", "bfloat"))
    by_test = list(zip(full["value"], half["value"], full["note"], strict=True))
    p = [note.rpartition("p = ")[2] for *_, note in by_test]
    both = [f"{one:.2f} {other:.2f}" for one, other, _ in by_test]
    assert both == ["75.05 75.87", "68.16 69.98", "26.75 32.24"]
    page = " ".join(PAGES["figures/README.md"].split())
    assert f"clean 75.0 and 75.9 % (p = {p[0]}); under the paper's FGSM at 0.02 68.2" in page
    assert f"68.2 and 70.0 % (p = {p[1]}), at 0.1 26.8 and 32.2 % (p = {p[2]})" in page
    seeds = pd.read_csv(ROOT / "figures" / "seeds.csv")
    own = "attack == 'fgsm-per-image' and source_seed == seed and model == 'cnn eps=0.005'"
    kept = 100 * seeds.query(own).groupby("test_eps")["accuracy"].agg(["min", "max"])
    low, high = kept.loc[0.1]
    assert f"at 0.1 they keep {low:.1f} to {high:.1f} %" in page
    short = [kept["min"][eps] - full["value"].iloc[at] for at, eps in enumerate((0.0, 0.02))]
    assert f"keeps {short[0]:.1f} and {short[1]:.1f} points less than the lowest" in page


def test_lines_from_another_machine_say_so(empty_home):
    rows = bench_rows()
    rows.loc[rows["part"].isin(["workers", "start"]), ["machine", "torch"]] = "another", "9.9"
    # Of a part that both machines have measured, the lines are named.
    rows.loc[rows["what"] == "advlab reproduce", ["machine", "torch"]] = "another", "9.9"
    (empty_home / "figures").mkdir()
    rows.to_csv(empty_home / "figures" / "bench.csv", index=False)
    first, *_ = readme.bench_block(empty_home).splitlines()
    own = rows.iloc[0]
    assert first.startswith(f"Machine: {own['machine']}; torch {own['torch']}.")
    told = "*memory: advlab reproduce, start, workers*: measured at another time. Machine: another"
    assert f"{told}; torch 9.9." in first
    assert ("*precision* is accuracies" in first) == ("precision" in set(rows["part"]))


def test_findings_are_not_told_when_the_tables_do_not_show_them(empty_home):
    with_figures(empty_home, high=("cnn eps=0.2", 0.3))
    with pytest.raises(ValueError, match=r"cnn eps=0.2 gains .* Write the sentences"):
        readme.findings_block(empty_home)


def with_lengths(home, shares=(0.75, 0.5, 0.49), sigma=0.25, n=100):
    """Write made-up tables of lessons 09 and 11 into a home."""
    (home / "figures").mkdir()
    names = ["baseline", "eps = 0.2", "robust"]
    rows = [
        {"network": name, "attack": attack, "images": 40, "l2": length}
        for attack, lengths in {"DeepFool": (9, 9, 9), "C&W": (0.171, 0.208, float("inf"))}.items()
        for name, length in zip(names, lengths, strict=True)
    ]
    pd.DataFrame(rows).to_csv(home / "figures" / "l09_distortions.csv")
    proved = {"sigma": sigma, "radius": (0.0, 0.3, 0.325), "certified": shares, "n": n}
    far = {"sigma": 0.5, "radius": (9.0,), "certified": (1.0,), "n": 7}  # of another noise
    both = pd.concat([pd.DataFrame(proved), pd.DataFrame(far)])
    both.to_csv(home / "figures" / "l11_certified.csv")
    return home


def test_board_has_the_lengths_that_were_measured_and_dashes(empty_home):
    models = ["cnn robust", "cnn noise", "cnn eps=0.2", "cnn-lstm robust"]
    board = pd.DataFrame({"clean": ["1", "2", "3", "4"]}, index=models)
    made, told = readme.with_lengths(board, with_lengths(empty_home))
    assert made.columns.tolist() == ["clean", "minimal L2 (n = 40)", "certified L2 (n = 100)"]
    assert made["minimal L2 (n = 40)"].tolist() == ["inf", "-", "0.208", "-"]
    assert made["certified L2 (n = 100)"].tolist() == ["-", "0.3", "-", "-"]
    assert "that C&W found" in told
    assert "under noise of 0.25 is proved to be right for half" in told
    assert board.columns.tolist() == ["clean"]


def test_a_length_that_no_model_of_the_board_has_is_no_column(empty_home):
    board = pd.DataFrame({"clean": ["1", "2"]}, index=["cnn baseline", "cnn fgsm"])
    made, told = readme.with_lengths(board, with_lengths(empty_home))
    assert made.columns.tolist() == ["clean", "minimal L2 (n = 40)"]
    assert "certified" not in told
    made, told = readme.with_lengths(board.iloc[1:], empty_home)
    assert made.columns.tolist() == ["clean"]
    assert told == ""


def test_a_vote_that_is_proved_for_fewer_than_half_has_radius_0(empty_home):
    board = pd.DataFrame({"clean": ["1"]}, index=["cnn noise"])
    made, _ = readme.with_lengths(board, with_lengths(empty_home, shares=(0.4, 0.3, 0.2)))
    assert made["certified L2 (n = 100)"].tolist() == ["0"]


def test_a_refresh_of_the_pages_touches_no_notebook(empty_home, monkeypatch):
    # `advlab bench --publish` does no more than this.
    page = empty_home / "figures" / "README.md"
    page.parent.mkdir()
    page.write_text("<!-- a: generated -->\nold\n<!-- end of a -->\n")
    monkeypatch.setattr(readme, "PAGES", {"figures/README.md": {"a": lambda home: "new"}})
    write_lesson(empty_home, "01_first", "")
    lesson = empty_home / "notebooks" / "01_first.ipynb"
    before = lesson.stat().st_mtime_ns, lesson.read_bytes()
    readme.refresh(empty_home, ["figures/README.md"])
    assert page.read_text() == "<!-- a: generated -->\nnew\n<!-- end of a -->\n"
    assert (lesson.stat().st_mtime_ns, lesson.read_bytes()) == before


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
    lines = [re.sub(" +", " ", line) for line in readme.times_block(empty_home).splitlines()]
    assert lines[2:] == [
        "| [01](01_first.ipynb) | It | 60 min | | 12 s | 4 s |",
        "| [09](09_new.ipynb) | About it | 30 min | 01 | not timed yet | not timed yet |",
    ]
    listed = readme.lessons_block(empty_home).splitlines()[-1]
    assert re.sub(" +", " ", listed) == "| [09](notebooks/09_new.ipynb) | About it | 30 min | 01 |"
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
    with pytest.raises(ValueError, match="<!-- trial"):
        readme.refreshed("no marks here", ROOT, readme.PAGES["figures/README.md"])


def test_readme_fits_a_screen_and_has_a_picture_and_the_two_commands():
    first = "\n".join(README.splitlines()[:15])
    assert "![" in first
    assert "make run" in first
    assert "make test" in first
    told = re.sub(r"^\|.*\n", "", README, flags=re.M)  # the tables are what it leads to
    assert len(told.split()) < 450
