"""The slides of the lessons: where each cell goes, and what a browser shows without a network."""

import nbformat
import pytest
from conftest import CHROMIUM, artefact
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from advlab import files
from advlab.upkeep import prose, readme, runs, slides

for name, extra in (("sphinx_revealjs", "site"), ("latex2mathml", "course")):
    pytest.importorskip(name, reason=f'needs the extra "{extra}"')
PICTURE = new_output("display_data", data={"image/png": "abc"})
LONG = "word " * 60
# Shows every slide, and returns the texts of those of which a part lies outside the window.
TOO_LARGE = """() => Reveal.getSlides().filter(slide => {
    const { h, v } = Reveal.getIndices(slide);
    Reveal.slide(h, v);
    return [slide, ...slide.querySelectorAll('*')].some(part => {
        const box = part.getBoundingClientRect();
        return box.bottom > innerHeight || box.right > innerWidth;
    }) || slide.scrollHeight > slide.clientHeight;
}).map(slide => slide.innerText.slice(0, 80))"""


def laid_out(*cells):
    """Return the slides of some cells: (where, what)."""
    made = slides.deck(new_notebook(cells=list(cells)), "02_fgsm", {"known": "a curve"})
    for cell in made.cells:
        shown = cell.source or "".join(o.get("text", "figure") for o in cell.outputs)
        yield cell.metadata["slideshow"]["slide_type"], shown.strip()


def test_a_heading_starts_a_slide_and_long_prose_is_for_the_speaker():
    text = f"# T\n\nshort\n\n{LONG}\n\n## 1. A\n\n$$x$$\n\n> **On other data.** No.\n\n"
    text += "## References\n\nX"
    assert list(laid_out(new_markdown_cell(text))) == [
        ("slide", "# T"),
        ("-", "short"),
        ("notes", LONG.strip()),
        ("slide", "## 1. A"),
        ("-", "$$x$$"),
        ("notes", "> **On other data.** No."),
    ]


def test_the_answer_to_a_question_is_on_the_next_slide():
    asked = new_markdown_cell(f"## 1. A\n\n> {prose.PREDICT} How many?")
    answer = new_code_cell("f()", outputs=[new_output("stream", text="7")])
    where = list(laid_out(asked, answer))
    running = ("subslide", '<p class="running">1. A</p>')
    question = ("-", f"> {prose.PREDICT} How many?")
    assert where == [("slide", "## 1. A"), running, question, running, ("-", "f()"), ("-", "7")]


def test_long_code_parameters_and_cells_for_the_tests_are_left_out_but_not_what_they_show():
    shown = [new_output("stream", text="7"), PICTURE]
    cells = [
        new_markdown_cell("# T"),
        new_code_cell("x = 1", metadata={"tags": ["parameters"]}, outputs=shown),
        new_code_cell("x = 1", metadata={"tags": [prose.HIDDEN]}, outputs=shown),
        new_code_cell("guess = Prediction('x', 0, 1)"),
        new_code_cell("x\n" * 21, outputs=shown),
    ]
    below = ("subslide", '<p class="running">T</p>')
    assert list(laid_out(*cells)) == [("slide", "# T"), ("-", "7"), below, ("-", "figure")]


def test_what_does_not_fit_goes_on_below():
    text = "## 1. A\n\n" + "\n\n".join(f"- {'x' * 80}" * 1 for _ in range(12))
    where = [place for place, _ in laid_out(new_markdown_cell(text))]
    assert where[0] == "slide"
    assert where.count("subslide") == 1


def test_a_page_has_reveal_inside_and_a_text_for_each_figure():
    cell = new_code_cell('lesson.save("known", figure)', outputs=[PICTURE])
    text = new_markdown_cell("# T\n\n$a_1 < b$, [next](03_next.ipynb), [code](../advlab/data.py)")
    deck = slides.deck(new_notebook(cells=[text, cell]), "02_fgsm", {"known": 'a "curve"'})
    page = slides.drawn(deck, "T & U", slides.reveal_files())
    assert "<title>T &amp; U</title>" in page
    assert 'alt="a &quot;curve&quot;"' in page or "alt='a \"curve\"'" in page
    assert "<math" in page
    assert 'href="03_next.html"' in page
    assert "data.py" not in page
    assert "reveal.js 5" in page
    for fetched in ('src="http', 'href="http', "@import", "cdnjs", "unpkg"):
        assert fetched not in page


def test_without_reveal_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(slides.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(slides.SlidesError, match=r"\[course,site\]"):
        slides.reveal_files()


def test_an_unknown_lesson_is_named(tmp_path):
    with pytest.raises(runs.BatchError, match="unknown lesson 'nothing'"):
        list(slides.write(tmp_path, ["nothing"]))


def test_every_lesson_has_slides_with_all_its_figures_and_questions():
    for path in readme.lesson_paths(files.home()):
        notebook = nbformat.read(path, as_version=4)
        made = slides.deck(notebook, path.stem, {})
        pictures = [
            o
            for c in notebook.cells
            for o in c.get("outputs", [])
            if "image/png" in o.get("data", {})
        ]
        shown = [
            o for c in made.cells for o in c.get("outputs", []) if "text/html" in o.get("data", {})
        ]
        assert len(shown) == len(pictures), path.name
        asked = [cell for cell in made.cells if prose.PREDICT in cell.source]
        assert len(asked) == sum(cell.source.count(prose.PREDICT) for cell in notebook.cells)


def test_printed_lines_that_no_slide_holds_go_on_below_from_a_blank_line_on():
    tables = ["head\n" + "row\n" * 20, "other\n" + "row\n" * 18]
    printed = new_output("stream", text="\n".join(tables))
    shown = list(laid_out(new_markdown_cell("# T"), new_code_cell("x\n" * 21, outputs=[printed])))
    below = ("subslide", '<p class="running">T</p>')
    assert shown == [
        ("slide", "# T"),
        below,
        ("-", tables[0].strip()),
        below,
        ("-", tables[1].strip()),
    ]
    fits = new_output("stream", text="row\n" * 10 + "\n" + "row\n" * 10)
    assert len(list(laid_out(new_code_cell("x\n" * 21, outputs=[fits])))) == 2


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_slides_are_shown_from_a_disk_and_nothing_is_fetched(page, tmp_path):
    (path,) = slides.write(tmp_path, ["02"])
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.set_viewport_size({"width": 1280, "height": 720})
    page.goto(path.as_uri())
    page.wait_for_function("window.Reveal && Reveal.isReady()")
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    count = page.evaluate("Reveal.getTotalSlides()")
    assert count > 20
    for _ in range(count):
        page.keyboard.press("Space")
    assert page.evaluate("Reveal.isLastSlide()")
    page.screenshot(path=artefact("slides.png"))
    assert page.errors == []


def open_slides(page, path):
    """Show slides in a window of the size for which they are made."""
    page.set_viewport_size({"width": 1280, "height": 720})
    page.goto(path.as_uri())
    page.wait_for_function("window.Reveal && Reveal.isReady()")


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_no_slide_of_a_lesson_is_larger_than_the_screen(page, tmp_path):
    for path in slides.write(tmp_path):
        open_slides(page, path)
        assert page.evaluate(TOO_LARGE) == [], path.name


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_a_long_table_is_drawn_smaller_but_not_too_small_to_read(page, tmp_path):
    sizes, fits = {}, {}
    for rows in (20, 33, 90):
        table = new_output("stream", text="a row\n" * rows)
        cells = [new_markdown_cell("# T"), new_code_cell("x\n" * 21, outputs=[table])]
        deck = slides.deck(new_notebook(cells=cells), "02_fgsm", {})
        path = tmp_path / f"{rows}.html"
        path.write_text(slides.drawn(deck, "T", slides.reveal_files()), encoding="utf-8")
        open_slides(page, path)
        fits[rows] = not page.evaluate(TOO_LARGE)
        sizes[rows] = page.evaluate("parseFloat(Reveal.getCurrentSlide().style.fontSize)")
    assert fits == {20: True, 33: True, 90: False}
    assert sizes[20] == 100 > sizes[33] > sizes[90] == slides.SMALLEST
