"""The site: what it is made of; built once in a session, its links and sizes, and in a browser."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import numpy as np
import pytest
from conftest import CHROMIUM, REAL_DATA, artefact, make_small_cnn, shared_folder
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from advlab import files, widgets
from advlab.datasets import Shapes10
from advlab.upkeep import explorer, prose, site

LARGEST_PAGE = 1_500_000  # bytes: a page with its pictures, and the explorer with its first image
LARGEST_THEME = 1_200_000  # scripts, styles and fonts that all pages share, and a browser keeps
LARGEST_EXPLORER = 3_000_000
LOADED = {"script": "src", "link": "href", "img": "src", "source": "src", "iframe": "src"}


# --- what it is made of


def test_notebook_gets_links_folds_and_texts_in_place_of_pictures():
    text = "[x](#3.-How-large-is-eps?)\n\n## 3. How large is eps?\n\n1. Do it.\n"
    text += "   <details><summary>Hint</summary>Call `f`\n   again.</details>\n\n## Your turn"
    figure = new_output("display_data", data={"image/png": "abc"})
    cells = [
        new_code_cell("seed = 0", metadata={"tags": ["parameters"]}),
        new_code_cell("", metadata={"tags": ["colab"]}),
        new_markdown_cell(text),
        new_code_cell('lesson.save(\n    "known", figure)', outputs=[figure]),
        new_code_cell("plt.show()", outputs=[figure]),
    ]
    made = site.prepared(new_notebook(cells=cells), "02_fgsm", {"known": "a curve that falls"})
    first, colab, prose, known, unknown = made.cells
    assert first.metadata["tags"] == ["parameters", "hide-input"]
    assert colab.metadata["tags"] == ["colab", "remove-cell"]
    assert "[x](#3-how-large-is-eps)" in prose.source
    fold = "   <details><summary>Hint</summary>\n\n   Call `f`\n   again.\n\n   </details>"
    assert fold in prose.source
    assert "## Your turn\n\nThey are all [solved](solutions/02_fgsm.ipynb)" in prose.source
    assert known.metadata["mystnb"] == {"image": {"alt": "a curve that falls"}}
    assert "section Your turn" in unknown.metadata["mystnb"]["image"]["alt"]


def test_each_solution_is_behind_a_fold():
    cells = [
        new_markdown_cell("# Solutions\n\nTry them first."),
        new_markdown_cell("Of both.\n\n## 1 A"),
        new_code_cell("7"),
        new_markdown_cell("So 7.\n\n## 2 B\n\nText."),
        new_code_cell("8"),
    ]
    made = site.prepared(new_notebook(cells=cells), "solutions/02_fgsm", {})
    fold = "<details><summary>Solution</summary>"
    assert [cell.source for cell in made.cells] == [
        "# Solutions\n\nTry them first.",
        f"Of both.\n\n## 1 A\n\n{fold}",
        "7",
        f"So 7.\n\n</details>\n\n## 2 B\n\n{fold}\n\nText.",
        "8",
        "</details>",
    ]


@pytest.mark.parametrize(
    ("folder", "link", "expected"),
    [
        ("advlab", "[a](attacks.py)", "[a](api/advlab.attacks.md)"),
        ("figures", "[a](../notebooks/solutions/)", "[a](solutions.md)"),
        ("figures", "[a](../data/checkpoints/)", "a"),
        ("figures", "[a](../data/README.md)", "[a](data.md)"),
        ("figures", "[a](seeds.csv)", "[a](figures/seeds.csv)"),
        ("figures", "![a](bench.png)", "![a](figures/bench.png)"),
        ("figures", "[a](#speed)", "[a](speed.md)"),
        ("figures", "[a](#the-trial)", "[a](#the-trial)"),
        ("data", "[a](../figures/README.md#speed)", "[a](speed.md)"),
        ("data", "[a](https://x.org/b)", "[a](https://x.org/b)"),
    ],
)
def test_links_of_the_clone_lead_to_pages(folder, link, expected):
    assert site.relink(link, folder) == expected


def test_links_of_the_guide_lead_to_pages_from_where_it_is():
    text = "[a](../../advlab/README.md#more-than-one-machine), [b](a1/a1.ipynb), [c](#late-work)"
    found = site.relink(text, "notebooks/assignments", "notebooks/assignments")
    assert found == "[a](../../machines.md), [b](a1/a1.ipynb), [c](#late-work)"


def test_every_lesson_has_the_heading_under_which_the_solutions_are_linked():
    for path in sorted((files.home() / "notebooks").glob("[0-9]*.ipynb")):
        source = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
        assert source.count(prose.EXERCISES) == 1, path.name


# --- the explorer's data


@pytest.fixture
def networks():
    return {"one": make_small_cnn(0), "two": make_small_cnn(1)}


def tile_of(page, place, side=32):
    content = base64.b64decode(page["sprite"].partition(",")[2])
    sheet = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    top, left = side * (place // explorer.COLUMNS), side * (place % explorer.COLUMNS)
    return sheet[top : top + side, left : left + side].transpose(2, 0, 1)


@pytest.mark.parametrize("attack", ["fgsm", widgets.TARGETED, "pgd", "noise"])
def test_page_shows_what_the_panel_computes(attack, networks, monkeypatch):
    monkeypatch.setattr(explorer, "CHOICES", (attack,))
    monkeypatch.setattr(explorer, "EPS", (0, 2, 8))
    data = Shapes10(1, 20)
    (page,) = explorer.compute(networks, data, [5])
    images, labels = data.test.batch(slice(5, 6))
    label = int(labels[0])
    target = (label + 1) % 10 if attack == widgets.TARGETED else None
    found = page["made"][f"{attack}|two|{'' if target is None else target}"]
    asked = (networks, "two", images[0], label, attack)
    assert np.array_equal(tile_of(page, 0), (255 * images[0]).round().numpy())
    for step, eps in enumerate((2, 8)):
        panel = widgets.attack_one(*asked, eps / 255, target=target or 0)
        told = found["at"][step]
        shown = tile_of(page, 0) + tile_of(page, found["tile"] + step) - 128
        assert np.array_equal(shown, (255 * panel.attacked).round().numpy())
        assert (told["linf"], told["l2"]) == (round(panel.linf, 1), round(panel.l2, 2))
        assert told["survives"] is panel.survives
        for shares, name in zip(told["after"], networks, strict=True):
            assert shares == pytest.approx(1000 * panel.after[name].numpy(), abs=0.51)
    own = f"{attack}|two|{label}"
    assert own not in page["made"]  # nothing is moved towards its own class


def test_chosen_images_are_right_and_one_of_each_class(networks):
    data = Shapes10(1, 60)
    chosen = explorer.choose(networks, data)
    labels = [int(data.test.labels[index]) for index in chosen]
    assert labels == sorted(set(labels))
    for index in chosen:
        image, label = data.test.batch(slice(index, index + 1))
        assert all(int(model(image).argmax()) == int(label[0]) for model in networks.values())


def test_without_a_trained_model_the_page_says_so():
    made = explorer.scripts("shapes10")
    assert list(made) == ["data.js"]
    assert b"no trained model for" in made["data.js"]
    assert b"Shapes-10" in made["data.js"]


def test_page_has_the_panels_controls_by_their_names():
    page = (site.OWN_PAGES / "explorer.html").read_text()
    panel = widgets.AttackExplorer({"one": make_small_cnn(0)}, Shapes10(1, 20))
    shared = (panel.index, panel.source, panel.attack, panel.target, panel.eps)
    for control in shared:
        assert f">{control.description}</label>" in page
    assert f">{panel.random.description}</button>" in page
    assert set(explorer.CHOICES) <= set(widgets.CHOICES)


# --- built


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Return the folder of the site, built once in the run from the committed notebooks."""
    for name, extra in (
        ("myst_nb", "site"),
        ("pydata_sphinx_theme", "site"),
        ("nbgrader", "course"),
    ):
        pytest.importorskip(name, reason=f'needs the extra "{extra}"')
    folder = shared_folder(tmp_path_factory, "site")
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "log.txt").is_file():
            own = {"ADVLAB_DATA": REAL_DATA} if REAL_DATA else {"ADVLAB_DATASET": "shapes10"}
            env = {name: v for name, v in os.environ.items() if name not in files.SETTINGS}
            env |= own | {"ADVLAB_CACHE": str(folder / "cache")}
            command = [sys.executable, "-m", "advlab", "site", "--output", str(folder / "html")]
            start = time.monotonic()
            done = subprocess.run(
                command, env=env, capture_output=True, text=True, cwd=files.home()
            )
            told = f"{done.stdout}{done.stderr}built in {time.monotonic() - start:.0f} s"
            (folder / "log.txt").write_text(told)
    told = (folder / "log.txt").read_text()
    assert "Open in a browser" in told, told[-3000:]
    assert "WARNING" not in told
    return folder / "html"


class Page(HTMLParser):
    """What a page loads, where it leads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads, self.leads, self.anchors, self.without_alt = [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors.update(filter(None, (found.get("id"), found.get("name"))))
        if tag == "a" and found.get("href"):
            self.leads.append(found["href"])
        if tag in LOADED and found.get(LOADED[tag]) and found.get("rel") not in ("next", "prev"):
            self.loads.append(found[LOADED[tag]])
        if tag == "img" and not found.get("alt", "").strip():
            self.without_alt.append(found.get("src"))


@pytest.fixture(scope="session")
def read(built):
    return {path.relative_to(built).as_posix(): Page(path) for path in built.rglob("*.html")}


def test_site_has_every_lesson_solution_assignment_and_module(read):
    found = set(read)
    for path in (files.home() / "notebooks").rglob("*.ipynb"):
        name = path.relative_to(files.home()).with_suffix(".html").as_posix()
        assert name in found
    for module in ("attacks", "data", "evaluation", "widgets", "upkeep.site"):
        assert f"api/advlab.{module}.html" in found
    assert {"results.html", "speed.html", "notebooks/assignments/README.html"} <= found


def test_assignments_are_the_students_versions(built):
    hidden = re.compile("BEGIN (SOLUTION|HIDDEN TESTS)")
    for path in (files.home() / "notebooks/assignments").glob("*/*.ipynb"):
        page = (built / f"notebooks/assignments/{path.stem}/{path.stem}.html").read_text()
        assert not hidden.search(page)
        assert "NotImplementedError" in page or "YOUR ANSWER HERE" in page
    for path in built.rglob("*"):
        assert path.suffix != ".ipynb", f"{path} may hold solutions"


def test_nothing_is_loaded_from_elsewhere(built, read):
    for name, page in read.items():
        for address in page.loads:
            assert not urlsplit(address).scheme, f"{name} loads {address}"
            assert not address.startswith("//"), f"{name} loads {address}"
    for path in (*built.rglob("*.css"), *built.rglob("*.js")):
        text = path.read_text(encoding="utf-8")
        far = re.findall(r"url\(['\"]?https?:[^)]*\)|@import[^;]*https?:", text)
        assert not far, path


def test_internal_links_lead_somewhere(built, read):
    for name, page in read.items():
        for address in (*page.leads, *page.loads):
            parts = urlsplit(address)
            if parts.scheme:
                continue
            there = ((built / name).parent / unquote(parts.path)).resolve() if parts.path else None
            target = there.relative_to(built.resolve()).as_posix() if there else name
            assert (built / target).is_file(), f"{name} links to {address}"
            if parts.fragment and target in read:
                assert unquote(parts.fragment) in read[target].anchors, f"{name}: {address}"


def test_pages_are_small(built, read):
    for name, page in read.items():
        path = built / name
        loaded = {(path.parent / urlsplit(one).path).resolve() for one in page.loads}
        theme = {one for one in loaded if (built / "_static").resolve() in one.parents}
        own = {path, *(loaded - theme)}
        if name == "index.html" and REAL_DATA:
            own.add(built / "_static/explorer/image0.js")
        for found, limit in ((own, LARGEST_PAGE), (theme, LARGEST_THEME)):
            size = sum(one.stat().st_size for one in found)
            assert size <= limit, f"{name} loads {size:,} bytes"
    whole = sum(path.stat().st_size for path in (built / "_static/explorer").iterdir())
    assert whole <= LARGEST_EXPLORER


def test_pictures_have_texts_and_formulas_are_drawn(built, read):
    assert not {name: page.without_alt for name, page in read.items() if page.without_alt}
    lesson = (built / "notebooks/02_fgsm.html").read_text()
    assert lesson.count("<math") > 10
    for path in built.glob("notebooks/**/*.html"):
        text = path.read_text()
        assert "<code>$" not in text, f"{path.name} has a formula that is not drawn"
        raw = re.findall(r"<m\w+[^>]*>\\\w+", text)
        assert not raw, f"{path.name} shows commands of TeX: {raw}"


def test_solutions_are_folded(built):
    for path in (files.home() / "notebooks/solutions").glob("*.ipynb"):
        page = (built / f"notebooks/solutions/{path.stem}.html").read_text()
        # Nothing but the fold is between the heading of an exercise and the next one.
        parts = re.split(r"<h2>", page.split("</article>")[0])[1:]
        assert len(parts) >= 5
        for part in parts:
            below = part.split("</h2>", 1)[1].strip()
            assert below.startswith("<details><summary>Solution</summary>"), part[:200]
            assert part.count("</details>") == part.count("<details")


# --- in a browser


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_search_finds_label_leaking(page, built):
    page.goto((built / "search.html").as_uri() + "?q=label+leaking")
    page.locator("#search-results li a").first.wait_for()
    page.get_by_text("Search finished").wait_for()
    found = page.locator("#search-results li a").evaluate_all("all => all.map(a => a.href)")
    assert any("notebooks/" in address for address in found)
    assert page.errors == []


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_pages_fit_a_phone_and_tell_of_no_error(page, built):
    page.set_viewport_size({"width": 390, "height": 844})
    lesson = "notebooks/04_robust_training.html"
    for name in ("index.html", lesson, "results.html", "api/advlab.attacks.html"):
        page.goto((built / name).as_uri())
        page.wait_for_load_state("load")
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{name} is {wide} px too wide"
        if name == lesson:
            page.screenshot(path=artefact("site-phone.png"))
    assert page.errors == []


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
@pytest.mark.skipif(not REAL_DATA, reason="the shipped models are of CIFAR-10, which is not here")
def test_visitor_fools_the_network_by_keyboard(page, built):
    page.goto((built / "index.html").as_uri())
    verdict = page.locator(".explorer-verdict")
    verdict.get_by_text("cnn baseline says").wait_for()
    page.get_by_label("eps (of 255)").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.get_by_text("eps 8/255").wait_for()
    assert "cnn baseline is fooled" in verdict.inner_text()
    data = (built / "_static/explorer/image0.js").read_text()
    told = json.loads(data.removeprefix("Explorer.take(").rstrip().removesuffix(");"))
    linf = told["made"]["fgsm|cnn baseline|"]["at"][3]["linf"]
    assert f"L-inf {linf:.1f}/255" in page.locator(".explorer-numbers").inner_text()
    page.get_by_label("attack", exact=True).select_option(widgets.TARGETED)
    page.get_by_text("moves towards").wait_for()
    page.get_by_role("button", name="Random image").click()
    page.wait_for_function("document.querySelectorAll('script[src*=image]').length === 2")
    page.screenshot(path=artefact("site-explorer.png"))
    assert page.errors == []
