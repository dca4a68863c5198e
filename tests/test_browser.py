"""In a real browser: JupyterLab on loopback, headless Chromium, the explorer's slider moved."""

import json
import os
import secrets
import subprocess
import sys
import time

import nbformat
import pytest
from conftest import CHROMIUM, artefact, shared_folder
from nbformat.reader import NotJSONError

from advlab import files

pytest.importorskip("playwright", reason='needs the extra "browser"')
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")

EXPLORER = """
import time

import torch
from advlab import datasets, models, recipes, training
from advlab.widgets import AttackExplorer


class Slow(torch.nn.Module):
    def forward(self, x):
        time.sleep(0.5)
        first = 10 + x.flatten(1).mean(1, keepdim=True)  # the answer is always class 0
        return torch.cat([first, torch.zeros(len(x), 9)], dim=1)


shapes = datasets.Shapes10(500, 60)
networks = {"cnn": models.build("cnn"), "slow": Slow(), "cnn-lstm": models.build("cnn-lstm")}
for name in ("cnn", "cnn-lstm"):
    training.fit(networks[name], shapes.train, recipes.QUICK)
AttackExplorer(networks, shapes, index=int((shapes.test.labels == 0).nonzero()[0]))
"""


def told_url(path):
    """Return where the server is that wrote the file; None while it is writing."""
    try:
        return json.loads(path.read_text())["url"]
    except json.JSONDecodeError:
        return None


@pytest.fixture
def lab(tmp_path, tmp_path_factory):
    """A JupyterLab on loopback with a token; gives (address, token, folder)."""
    token, folder, runtime = secrets.token_hex(16), tmp_path / "work", tmp_path / "runtime"
    folder.mkdir()
    set_ = {"JUPYTER_RUNTIME_DIR": str(runtime), "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    set_ |= {"ADVLAB_PROFILE": "quick", "ADVLAB_DATASET": "shapes10"}
    set_ |= {"ADVLAB_OUTPUT": str(tmp_path / "out"), "PYTHONPATH": str(files.home())}
    # Where the other tests of lessons keep the small models.
    set_["ADVLAB_CACHE"] = str(shared_folder(tmp_path_factory, "lessons"))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--ServerApp.root_dir={folder}"]
    command += [f"--IdentityProvider.token={token}", "--LabApp.collaborative=False"]
    with (tmp_path / "log.txt").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | set_)
        try:
            end, url = time.monotonic() + 60, None
            while not url and time.monotonic() < end:
                time.sleep(0.2)
                url = next(map(told_url, runtime.glob("jpserver-*.json")), None)
            assert url, (tmp_path / "log.txt").read_text()[-2000:]
            yield url, token, folder
        finally:
            server.terminate()
            server.wait(60)


def open_and_run(page, lab, name):
    """Open the notebook, and choose Run, Run All Cells."""
    address, token, _ = lab
    page.goto(f"{address}lab/tree/{name}?token={token}")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    # Before the kernel is connected, running cells would ask which kernel to take.
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def wait_for_change(page, shown, before):
    """Wait until the element no longer shows the text `before`."""
    page.wait_for_function(
        "([e, text]) => e.innerText !== text", arg=[shown.element_handle(), before]
    )


def write_explorer(folder):
    """Write a notebook that shows the explorer; return its name."""
    cell = nbformat.v4.new_code_cell(EXPLORER)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata=kernel)
    nbformat.write(notebook, folder / "explorer.ipynb")
    return "explorer.ipynb"


CANCEL = "[...document.querySelectorAll('button')].find(b => b.innerText === 'Cancel')"
# What a reader of the focused control is told: its label, or its own text.
FOCUSED = """() => {
    const e = document.activeElement, row = e.closest('.widget-inline-hbox');
    return e.innerText.trim() && e.tagName !== 'SELECT' ? e.innerText.trim()
        : row ? row.querySelector('.widget-label').innerText : e.tagName;
}"""


def test_moving_the_slider_and_choosing_an_attack_change_the_answer(page, lab):
    open_and_run(page, lab, write_explorer(lab[2]))
    numbers = page.locator(".widget-html", has_text="L-inf")
    numbers.wait_for(timeout=240_000)
    assert "L-inf 8.0/255" in numbers.inner_text()
    handle = page.locator(".widget-slider", has_text="eps (of 255)").locator(".noUi-handle")
    handle.focus()
    page.keyboard.press("Home")
    page.get_by_text("L-inf 0.0/255").wait_for()
    bars = page.locator(".widget-html table")
    before = bars.inner_text()  # the same probabilities twice
    for steps in range(1, 9):
        page.keyboard.press("ArrowRight")
        page.get_by_text(f"L-inf {steps}.0/255").wait_for()
    wait_for_change(page, bars, before)
    # A slow attack runs beside the kernel's answers to the browser, and still reports.
    before = numbers.inner_text()
    page.get_by_label("attack", exact=True).select_option("pgd")
    wait_for_change(page, numbers, before)
    page.wait_for_function(CANCEL + ".disabled")
    # On a laptop, with the files shown: the answers stand beside the controls, and none is cut off.
    page.set_viewport_size({"width": 1280, "height": 800})
    controls = page.get_by_label("model", exact=True).bounding_box()
    answers, room = bars.bounding_box(), page.locator(".jp-OutputArea-output").bounding_box()
    assert answers["x"] > controls["x"] + controls["width"]
    assert answers["x"] + answers["width"] <= room["x"] + room["width"]
    assert answers["y"] + answers["height"] - controls["y"] < 600
    page.screenshot(path=artefact("explorer.png"))


def test_the_keyboard_alone_reaches_every_control_and_cancels(page, lab):
    open_and_run(page, lab, write_explorer(lab[2]))
    page.locator(".widget-html", has_text="L-inf").wait_for(timeout=240_000)
    page.get_by_label("model", exact=True).focus()
    reached = [page.evaluate(FOCUSED)]
    for _ in range(10):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(FOCUSED))
    assert reached == [
        "model", "beside it", "gradient of", "attack", "eps (of 255)", "8", "steps", "of class",
        "image", "Random image", "Own picture (0)",
    ]  # fmt: skip
    page.get_by_label("gradient of", exact=True).focus()
    page.keyboard.press("s")  # "slow"
    page.keyboard.press("Tab")
    page.keyboard.press("p")  # "pgd"
    page.wait_for_function(f"!{CANCEL}.disabled")  # and so are the steps, which only pgd has
    steps = page.locator(".widget-slider", has_text="steps")
    steps.locator(".noUi-handle").focus()
    page.keyboard.press("End")
    steps.get_by_text("200", exact=True).wait_for()
    page.wait_for_timeout(1_000)  # the attack of 20 steps is stopped; that of 200 takes 100 s
    page.wait_for_function(f"!{CANCEL}.disabled")
    told = page.locator(".widget-html", has_text="Cancelled; what is shown")
    told.wait_for(state="detached")
    shown = page.locator(".widget-html", has_text="L-inf").inner_text()
    page.get_by_role("button", name="Cancel").focus()
    page.keyboard.press("Enter")
    page.wait_for_function(CANCEL + ".disabled")
    told.wait_for()
    assert page.locator(".widget-html", has_text="L-inf").inner_text() == shown


def test_lesson_02_runs_from_top_to_bottom_without_an_error(page, lab):
    notebook = nbformat.read(files.home() / "notebooks" / "02_fgsm.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = None, []
    nbformat.write(notebook, lab[2] / "02_fgsm.ipynb")
    open_and_run(page, lab, "02_fgsm.ipynb")
    saved = lab[2] / "02_fgsm.ipynb"
    end, code = time.monotonic() + 600, [None]
    # JupyterLab draws only the cells in view, so what is saved tells how far it is.
    while not all(cell and cell.execution_count for cell in code) and time.monotonic() < end:
        page.wait_for_timeout(2_000)
        page.keyboard.press("Control+s")
        try:
            cells = nbformat.read(saved, as_version=4).cells
        except NotJSONError:  # read while it was being written
            continue
        code = [cell for cell in cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert [o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    page.locator(".jp-Notebook .widget-html", has_text="L-inf").first.scroll_into_view_if_needed()
    page.screenshot(path=artefact("lesson02.png"))


def test_marks_given_in_the_page_for_reading_are_marks_for_the_grader(page, tmp_path):
    pytest.importorskip("nbgrader", reason='needs the extra "course"')
    from advlab.classroom import course, merging, reading, submissions
    from advlab.classroom.marks import read_marks

    path = course.sources()["a5"]
    cells = merging.no_points(nbformat.read(path, as_version=4), "to be read", None)
    names = ("Anna-Lena", "Jörg O'Neil", "Zoë")
    graded = {submissions.Submission(name, "a5", tmp_path): {"cells": cells} for name in names}
    drawn = [{"name": "claim", "html": "<script>document.title = 'x'</script><p>my claim</p>"}]
    for one in graded:
        files.write_bytes(one.kept(tmp_path) / "page.json", json.dumps(drawn).encode())
    (written,) = reading.write(graded, {"a5": path}, tmp_path)
    page.goto(written.as_uri())
    assert page.title() == "a5: claim of 3 students", "no script runs but the page's own"
    assert len(page.errors) == 3
    page.get_by_label("Comment").nth(1).fill('=good, "but"\nwhich n?')
    page.get_by_role("button").click()  # a comment without a mark is not let go
    page.get_by_label("Points").nth(1).fill("7.5")
    page.get_by_label("Points").nth(2).fill("10")
    page.get_by_text("2 of 3 have a mark").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button").click()
    assert download.value.suggested_filename == "marks-a5-claim.csv"
    marks = read_marks(download.value.path())
    assert marks["student"].tolist() == ["Jörg O'Neil", "Zoë"]
    assert marks["score"].tolist() == [7.5, 10]
    assert [text.strip() for text in marks["comment"]] == ['=good, "but"\nwhich n?', ""]
