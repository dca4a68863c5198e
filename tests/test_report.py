"""Audit of anybody's classifier: targets by name, and a report that says what was measured."""

import base64
import html
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import balance, draw_pictures, make_small_cnn
from rich.console import Console
from torch import nn

from advlab import checkpoints, files, minimal, models
from advlab.audit import CHECKLIST, Trial
from advlab.data import DataSpec, ImageData, Split
from advlab.upkeep import pages, report, targets

MINE = """
import sys
import torch
from advlab import _torchvision
from torchvision.models import resnet18
import beside

assert beside.WORD == "found"

class Kept(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = resnet18(num_classes=10)

    def forward(self, images):
        return self.model(images)

def resnet():
    torch.manual_seed(0)
    return resnet18(num_classes=10)

def three():
    torch.manual_seed(0)
    return resnet18(num_classes=3)

def kept():
    torch.manual_seed(1)
    return Kept()

def sized(classes, width=3):
    return resnet()

def broken():
    raise KeyError("no such layer")

def word():
    return "resnet"

def leaves():
    sys.exit(3)

model = torch.nn.Flatten()
"""


@pytest.fixture
def mine(tmp_path) -> Path:
    """A file of a user's, which imports another one beside it."""
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "beside.py").write_text("WORD = 'found'\n")
    path = tmp_path / "user" / "mine.py"
    path.write_text(MINE)
    yield path
    for name in ("beside", "advlab_target_mine"):
        sys.modules.pop(name, None)


@pytest.fixture
def labelled(shapes) -> tuple[nn.Module, ImageData]:
    """A model with large margins that is right about 60 images, so that attacks have work."""
    images = shapes.test.images[:60]
    model = make_small_cnn()
    labels = balance(model, images / 255)
    last = model[-1]
    with torch.no_grad():
        last.weight *= 3
        last.bias *= 3
    return model, ImageData(shapes.spec, shapes.train, Split(images, labels))


class Times(nn.Module):
    """Logits times a factor: the same answers, other gradients."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, images):
        return self.factor * self.model(images)


def audit(tmp_path, model, data, **options):
    folder = tmp_path / "report"
    found = report.audit_model(model, data, name="mine", output=folder, **options)
    return found, (folder / "report.md").read_text(), (folder / "report.html").read_text()


def rows_of(text: str, title: str) -> list[list[str]]:
    """Return the cells of the table under a title, without its head."""
    lines = text.partition(f"## {title}\n\n")[2].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# --- sizes and targets


@pytest.mark.parametrize(
    ("text", "eps"), [("8/255", 8 / 255), ("0.03", 0.03), (" 2 / 255 ", 2 / 255), ("1", 1.0)]
)
def test_eps_is_read_as_people_write_it(text, eps):
    assert targets.parse_eps(text) == eps


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("8", "eps is 8.0; .* from 0 to 1.*8/255"),
        ("-1/255", "from 0 to 1"),
        ("1/0", "'1/0' is no number; write 8/255 or 0.03"),
        ("nan", "'nan' is no number"),
        ("1e999", "is no number"),
        ("eight", "'eight' is no number"),
    ],
)
def test_no_eps_is_named(text, told):
    with pytest.raises(ValueError, match=told):
        targets.parse_eps(text)


def test_a_target_is_told_from_the_name_of_a_shipped_model():
    assert all(map(targets.is_target, ("mine.py:make", "mine.py", "a/w.pth", "w.safetensors")))
    assert not any(map(targets.is_target, ("cnn-eps0.2", "cnn")))


def test_a_function_is_imported_with_what_lies_beside_it(mine):
    before = list(sys.path)
    model = targets.load_function(f"{mine}:resnet")
    assert type(model).__name__ == "ResNet"
    assert not model.training
    assert sys.path == before


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("nothing", "has no function nothing; there are Kept, resnet, three, kept"),
        ("sized", r"needs arguments \(classes\); .* def make_model\(\): return sized\(...\)"),
        ("broken", r"broken\(\) in .* failed in line 34: KeyError: 'no such layer'"),
        ("word", "returned str; it must return the model, an nn.Module"),
        ("leaves", "failed in line 40: SystemExit: 3"),
        ("model", r"is a model, not a function; .* def make_model\(\): return model"),
    ],
)
def test_a_function_that_gives_no_model_is_named(mine, function, told):
    with pytest.raises(ValueError, match=told):
        targets.load_function(f"{mine}:{function}")


@pytest.mark.parametrize("target", ["mine.py", "mine.py:", "mine:make", "mine.txt:make", ":make"])
def test_a_target_of_another_form_is_named(target):
    with pytest.raises(ValueError, match=r"names no function .* FILE.py:FUNCTION"):
        targets.load_function(target)


def test_a_missing_file_and_one_that_fails_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file none\.py"):
        targets.load_function("none.py:make")
    bad = tmp_path / "bad.py"
    for code, told in [
        ("import absent_package", "line 1: ModuleNotFoundError: No module named 'absent_package'"),
        ("\ndef make(:\n    pass", r"importing .* failed: SyntaxError: .*line 2"),
    ]:
        bad.write_text(code)
        with pytest.raises(ValueError, match=told):
            targets.load_function(f"{bad}:make")
        assert "advlab_target_bad" not in sys.modules


def test_weights_go_into_the_function_s_model(mine, shapes, tmp_path):
    saved = targets.load_function(f"{mine}:kept")
    with torch.no_grad():
        saved.model.fc.bias += 1
    path = tmp_path / "w.pth"
    for state in (saved.state_dict(), {"state_dict": nn.DataParallel(saved).state_dict()}):
        torch.save(state, path)
        opened = targets.open_target(f"{mine}:kept", shapes, path)
        assert torch.equal(opened.model.model.fc.bias, saved.model.fc.bias)
    assert opened.name == "mine:kept"
    assert opened.metadata["weights_hash"] == checkpoints.weights_hash(saved)
    with pytest.raises(ValueError, match="does not fit this architecture"):
        targets.open_target(f"{mine}:three", shapes, path)


def test_two_functions_are_never_taken_for_one(mine, shapes):
    first, second = (targets.open_target(f"{mine}:{name}", shapes) for name in ("resnet", "kept"))
    assert (first.arch, first.name) != (second.arch, second.name)
    assert first.arch.startswith("ResNet of ")


def test_a_weights_file_of_ours_is_a_target(trained, shapes, tmp_path):
    opened = targets.open_target(str(trained[0].path), shapes)
    assert opened.arch == "cnn"
    torch.save(trained[0].model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="give --arch"):
        targets.open_target(str(tmp_path / "w.pth"), shapes)
    opened = targets.open_target(str(tmp_path / "w.pth"), shapes, arch="cnn")
    assert opened.metadata["weights_hash"] == trained[0].metadata["weights_hash"]
    with pytest.raises(ValueError, match=r"leave --weights x\.pth out"):
        targets.open_target(str(tmp_path / "w.pth"), shapes, Path("x.pth"))


def test_a_model_that_does_not_fit_the_data_is_named(mine, shapes):
    with pytest.raises(ValueError, match=r"3 outputs, Shapes-10 has 10 classes \(disc, ring"):
        targets.open_target(f"{mine}:three", shapes)
    with pytest.raises(
        ValueError, match=r"fails on images of shape \(3, 32, 32\) .*1 channels|1, "
    ):
        targets.check_fit(models.build("cnn", shape=(1, 28, 28)), shapes)
    with pytest.raises(ValueError, match=r"it must return logits of shape \(2, classes\)"):
        targets.check_fit(nn.Conv2d(3, 10, 3), shapes)


# --- the report


def test_every_line_of_the_checklist_has_a_meaning():
    assert list(pages.MEANING) == [check for check, _ in CHECKLIST]


def test_the_report_says_what_the_trial_measured(labelled, tmp_path):
    model, data = labelled
    settings = report.Settings(eps=2 / 255, n=50, seed=3)
    found, text, page = audit(tmp_path, model, data, settings=settings, source=make_small_cnn(1))
    images, labels = data.test.first(50).batch(slice(None))
    trial = Trial(model, images, labels, make_small_cnn(1), 2 / 255, 3, 10)
    pd.testing.assert_frame_equal(found.accuracies, trial.accuracies())
    pd.testing.assert_frame_equal(found.checklist, trial.checklist())
    assert [row[:2] for row in rows_of(text, "Checklist")] == [
        [row.check, row.verdict] for row in trial.checklist().itertuples()
    ]
    for cells, row in zip(
        rows_of(text, "Accuracies"), trial.accuracies().itertuples(), strict=True
    ):
        assert cells[0] == row.test
        assert float(cells[1].split()[0]) == pytest.approx(row.eps, abs=1e-5)
        interval = f"{100 * row.low:.1f} to {100 * row.high:.1f}"
        assert cells[2:] == [f"{100 * row.accuracy:.1f}", interval, str(row.correct), "50"]
        assert f">{interval}</td>" in page
    lengths = minimal.distortion(model, images, labels, minimal.deepfool(model, images, labels))
    middle = float(lengths["l2"].median())  # all are right
    assert 0.01 < middle < 1
    assert f"DeepFool found is {middle:.3g} long in L2, the median of 50 images" in found.distance
    assert "for 0 it found none" in text
    settings = dict(rows_of(text, "Settings"))
    assert settings["parameters"] == "8,830"
    assert settings["hash of the weights"] == checkpoints.weights_hash(model)
    assert (settings["eps"], settings["seed"]) == ("0.007843 (2/255)", "3")
    assert torch.__version__ in settings["versions"]


def test_the_page_needs_nothing_else(labelled, tmp_path):
    model, data = labelled
    _, text, page = audit(tmp_path, model, data, settings=report.Settings(eps=2 / 255, n=20))
    assert text.count("](report.png)") == 1
    inside = re.search(r'src="data:image/png;base64,([^"]+)"', page)[1]
    assert base64.b64decode(inside) == (tmp_path / "report" / "report.png").read_bytes()
    assert '<html lang="en">' in page
    assert "<title>Audit of mine</title>" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert str(tmp_path) not in text + page
    assert str(files.home()) not in text + page
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "report.html",
        "report.md",
        "report.png",
    ]


def test_logits_times_1000_raise_an_alarm_that_is_explained(labelled, tmp_path):
    model, data = labelled
    settings = report.Settings(eps=1 / 255)
    found, text, _ = audit(tmp_path, model, data, settings=settings)
    assert "ALARM" not in set(found.checklist["verdict"])
    assert "What the alarms mean" not in text
    found, text, page = audit(tmp_path, Times(model, 1000), data, settings=settings)
    check = "gradients neither vanish nor explode"
    assert found.checklist.set_index("check")["verdict"][check] == "ALARM"
    assert "<strong>ALARM</strong>" in page
    assert f"- **{check}.** {' '.join(pages.MEANING[check])}" in text
    assert html.escape(pages.MEANING[check][0]) in page


def test_a_model_at_chance_is_told_first(shapes, tmp_path):
    data = ImageData(shapes.spec, shapes.train, shapes.test.first(40))
    found, text, _ = audit(tmp_path, make_small_cnn(), data)
    first = text.splitlines()[2]
    assert first.startswith("**The clean accuracy, ")
    assert "is not above chance" in first
    assert found.summary in first
    assert set(found.checklist["verdict"][1:]) == {"not run"}


def test_answers_at_random_are_averaged_by_autoattack(labelled, tmp_path, monkeypatch):
    model, data = labelled
    asked = {}

    def auto_attack(model, images, labels, eps, **options):
        asked.update(options)
        return labels == 0

    monkeypatch.setattr(report, "auto_attack", auto_attack)
    model = nn.Sequential(nn.Dropout(0.1), model)
    model[0].register_forward_hook(lambda _, x, y: x[0] + 0.01 * torch.randn_like(x[0]))
    settings = report.Settings(eps=0.0005, n=20, autoattack=True)
    found, text, _ = audit(tmp_path, model, data, settings=settings)
    assert asked["version"] == "rand"
    told = dict(rows_of(text, "Settings"))["AutoAttack"]
    assert told.startswith("version rand: APGD-CE, APGD-DLR")
    lines = found.checklist.set_index("check")
    assert lines["verdict"]["the same answer to the same image"] == "ALARM"
    assert lines["measured"]["black box weaker than white box"] == "answers at random"
    assert found.distance == "The shortest way out was not looked for: answers at random."


@pytest.mark.parametrize("outputs", [3, 10])
def test_autoattack_has_its_row_and_names_its_parts(outputs, tmp_path):
    pytest.importorskip("pyautoattack", reason='needs the extra "audit"')
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 1, 28, 28), generator=generator, dtype=torch.uint8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, outputs)).eval()
    labels = balance(model, images / 255) % 3
    spec = DataSpec("grey", "Grey", (1, 28, 28), ("a", "b", "c"))
    data = ImageData(spec, Split(images, labels), Split(images, labels))
    settings = report.Settings(eps=1 / 255, autoattack=True)
    found, text, _ = audit(tmp_path, model, data, settings=settings)
    last = found.accuracies.iloc[-1]
    assert (last.test, last.n) == ("AutoAttack", 6)
    assert last.correct <= found.accuracies["correct"].iloc[0]
    told = dict(rows_of(text, "Settings"))["AutoAttack"]
    assert ("APGD-T was left out" in told) == (outputs < 4)


def test_texts_of_the_user_s_are_shown_as_they_are(labelled, tmp_path):
    model, data = labelled
    name = "<script>alert(1)</script> | `a` *b* $x$ [c](d)\nnext"
    spec = DataSpec("x", "a<b> & c|d", data.shape, ("<i>", "x|y", *data.classes[2:]))
    data = ImageData(spec, data.train, data.test)
    settings, folder = report.Settings(eps=1 / 255, n=10), tmp_path / "out"
    report.audit_model(model, data, name=name, output=folder, settings=settings)
    page = (folder / "report.html").read_text()
    shown = html.unescape(re.sub(r"<[^>]*>", "\n", page.partition("<body>")[2]))
    assert f"Audit of {name.replace(chr(10), ' ')}\n" in shown
    assert "a<b> & c|d" in shown
    assert "10 (<i>, x|y, square" in shown
    assert "<script>" not in page
    assert "<i>" not in page


def test_a_model_without_a_gradient_is_reported_on(labelled, tmp_path, monkeypatch):
    model, data = labelled

    class Blind(Times):
        def forward(self, images):
            with torch.no_grad():
                return self.model(images)

    class InNumpy(Times):
        def forward(self, images):
            return self.model(torch.from_numpy(images.numpy()))

    monkeypatch.setattr("advlab.audit.auto_attack", lambda model, x, y, eps, **options: y < 5)
    check = "a gradient leads from the answers to the pixels"
    settings = report.Settings(n=20)
    for blind in (Blind(model, 1.0), InNumpy(model, 1.0)):
        found, text, _ = audit(tmp_path, blind, data, settings=settings)
        assert found.checklist.set_index("check")["verdict"][check] == "ALARM"
        assert f"- **{check}.** {pages.escape(pages.MEANING[check][0])[:40]}" in text
        assert found.accuracies["test"].tolist() == ["clean", "noise", "Square, 1,000 queries"]
        assert found.distance == "The shortest way out was not looked for: no gradient."
    settings = report.Settings(n=20, autoattack=True)
    with pytest.raises(ValueError, match="the logits carry no gradient, and AutoAttack needs one"):
        audit(tmp_path, Blind(model, 1.0), data, settings=settings)


def test_large_images_get_fewer_ways_out_at_once(labelled, monkeypatch):
    model, data = labelled
    images, labels = data.test.first(7).batch(slice(None))
    expected, sizes = Trial(model, images, labels).lengths, []

    def watched(model, images, labels):
        sizes.append(len(images))
        return minimal.deepfool(model, images, labels)

    monkeypatch.setattr("advlab.audit.deepfool", watched)
    monkeypatch.setattr("advlab.audit.PIXELS", 32 * 32 // 33)  # as if they were 33 times as large
    torch.testing.assert_close(Trial(model, images, labels).lengths, expected)
    assert sizes == [3, 3, 1]


def test_ways_out_that_were_not_found_are_told(labelled):
    model, data = labelled
    images, labels = data.test.first(6).batch(slice(None))
    trial = Trial(model, images, labels)
    trial.__dict__["lengths"] = torch.tensor([1.0, 2.0, torch.inf, torch.inf])
    told = report._distance(trial)
    assert "is 2 long in L2, the median of 4 images that are right (for 2 it found none" in told
    trial.__dict__["lengths"] = torch.tensor([])
    assert report._distance(trial).endswith("looked for: no image is right as it is.")


def test_a_report_that_cannot_be_written_leaves_the_old_one(labelled, tmp_path, monkeypatch):
    model, data = labelled
    settings = report.Settings(eps=1 / 255, n=10)
    _, before, _ = audit(tmp_path, model, data, settings=settings)
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(28)))
    with pytest.raises(OSError, match="cannot write"):
        audit(tmp_path, Times(model, 2.0), data, settings=settings)
    assert (tmp_path / "report" / "report.md").read_text() == before
    assert len(list((tmp_path / "report").iterdir())) == 3


# --- the command's function


def test_resnet18_from_a_file_to_its_report(mine, empty_home, monkeypatch):
    monkeypatch.chdir(mine.parent)
    console = Console(record=True, width=120)
    settings = report.Settings(n=40)
    found = report.run(
        "mine.py:resnet", settings, source="mine.py:kept", dataset="shapes10", console=console
    )
    assert set(found.accuracies["n"]) == {40}
    assert set(found.checklist["verdict"][1:]) == {"not run"}  # nobody has trained it
    folder = empty_home / "outputs" / "audit" / "user-mine.py-resnet-shapes10"
    text = (folder / "report.md").read_text()
    assert text.startswith("# Audit of user/mine.py:resnet\n")
    assert dict(rows_of(text, "Settings"))["parameters"] == "11,181,642"
    shown = console.export_text()
    assert found.summary in shown.replace("\n", " ")
    assert f"Written: {folder / 'report.html'}" in shown
    assert all(check in shown for check in found.checklist["check"])


def test_a_folder_of_pictures_of_three_classes(mine, tmp_path):
    for name in ("one", "two", "three"):
        draw_pictures(tmp_path / "own pictures", name, 10)
    found = report.run(
        f"{mine}:three",
        dataset=f"folder:{tmp_path / 'own pictures'}",
        output_dir=str(tmp_path / "out"),
        console=Console(record=True),
    )
    assert set(found.accuracies["n"]) == {6}
    text = (tmp_path / "out" / "report.md").read_text()
    assert str(tmp_path) not in text
    assert dict(rows_of(text, "Settings"))["data"] == "folder own pictures"
