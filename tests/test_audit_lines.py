"""The checklist: no alarm for an honest model, an alarm for what only looks robust."""

import pytest
import torch
from conftest import as_checkpoint, balance
from torch import nn

from advlab import audit, models
from advlab.audit import Trial
from advlab.autoattack import auto_attack
from advlab.data import DataSpec, ImageData, Split
from advlab.evaluation import accuracy_table, minimal_eps, wilson
from advlab.forward import predict
from advlab.store import Store

BLACK_BOX = "black box weaker than white box"


@pytest.fixture
def no_square(monkeypatch):
    """Leave out the line that needs another package and minutes."""

    def missing(*args, **options):
        raise ImportError

    monkeypatch.setattr(audit, "auto_attack", missing)


def verdicts(table):
    return dict(zip(table["check"], table["verdict"], strict=True))


def test_audit_of_an_honest_model_has_no_alarm(learned, no_square):
    model, test = learned
    images, labels = test.first(60).batch(slice(None))
    table = audit.audit(model, images, labels, eps=0.004)
    assert list(table.columns) == ["check", "verdict", "measured", "n"]
    assert len(table) == 9
    found = verdicts(table)
    assert found.pop(BLACK_BOX) == "not run"
    assert found.pop("white box at least as strong as transfer") == "not run"
    assert set(found.values()) == {"pass"}
    assert set(table["n"]) == {60}


class Toy(nn.Module):
    """Two classes; the margin of class 0 is a function of how far the image is from grey."""

    def __init__(self, margin):
        super().__init__()
        self.margin = margin

    def forward(self, x):
        margin = self.margin(x - 0.5)
        return torch.stack([margin, torch.zeros_like(margin)], dim=1)


def ridge(change):
    """Fall a little, rise, then fall below 0 at the end of the step: small steps stay in front."""
    t = change.flatten(1).mean(1) / 0.1
    return torch.where(t < 0.25, 1 - t, torch.where(t < 0.5, 0.75 + 4 * (t - 0.25), 5.75 - 8 * t))


def brittle(change):
    """Fall with every pixel that changes, whatever its sign."""
    return 0.01 - change.flatten(1).abs().mean(1)


@pytest.mark.parametrize(
    ("margin", "check"),
    [
        (ridge, "iterated attack at least as strong as one step"),
        (brittle, "noise of the same size does little"),
    ],
)
def test_audit_hears_what_a_toy_model_does(margin, check, no_square):
    images, labels = torch.full((40, 3, 32, 32), 0.5), torch.zeros(40, dtype=torch.long)
    assert verdicts(audit.audit(Toy(margin), images, labels, eps=0.1))[check] == "ALARM"


def test_audit_sees_through_a_masked_model(learned, no_square):
    model, test = learned
    images, labels = test.first(60).batch(slice(None))

    def masked(x):
        return 1000 * model(x)

    found = verdicts(audit.audit(masked, images, labels, source=model, eps=0.03))
    for check in (
        "white box at least as strong as transfer",
        "accuracy falls to 0 as eps grows",
        "gradients neither vanish nor explode",
    ):
        assert found[check] == "ALARM", check


def test_audit_asks_no_black_box_where_nothing_is_left(learned, monkeypatch):
    monkeypatch.setattr(audit, "auto_attack", None)
    model, test = learned
    trial = Trial(model, *test.first(60).batch(slice(None)), eps=0.2)
    row = trial.checklist().set_index("check").loc[BLACK_BOX]
    assert row["verdict"] == "pass"
    assert row["measured"] == "white box 0.0 %, nothing is left to break"
    assert "Square, 1,000 queries" not in set(trial.accuracies()["test"])


def test_accuracies_are_what_the_lines_measured(small_cnn, monkeypatch):
    images = torch.rand(50, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = balance(small_cnn, images)
    held = torch.arange(50) < 20
    monkeypatch.setattr(audit, "auto_attack", lambda *args, **options: held)
    trial = Trial(small_cnn, images, labels, source=small_cnn, eps=0.001)
    rows = trial.accuracies()
    assert rows["test"].value_counts().to_dict() == {
        **{"clean": 1, "noise": 1, "FGSM": 4, "PGD, 20 steps": 2, "PGD, 100 steps x 2": 1},
        **{"FGSM, transfer": 3, "Square, 1,000 queries": 1},
    }
    for row in rows.itertuples():
        assert (row.n, row.accuracy) == (50, row.correct / 50)
        assert (row.low, row.high) == wilson(row.correct, 50)
    found = rows.set_index(["test", "eps"])["accuracy"]
    assert found["clean", 0.0] == 1
    assert found["FGSM", 0.001] == found["FGSM, transfer", 0.001] == pytest.approx(trial.sweep[-1])
    assert found["PGD, 20 steps", 0.5] == pytest.approx(trial.huge)
    assert found["Square, 1,000 queries", 0.001] == 0.4
    assert list(rows.query("test == 'FGSM'")["eps"]) == [0.00025, 0.0005, 0.00075, 0.001]


@pytest.mark.parametrize("eps", [0, -0.1, 8])
def test_size_that_is_none_is_refused(small_cnn, batch, eps):
    with pytest.raises(ValueError, match=f"eps is {eps}; "):
        Trial(small_cnn, *batch, eps=eps)


@pytest.mark.parametrize(
    ("arch", "shape", "classes"),
    [("cnn", (1, 28, 28), 3), ("cnn-lstm", (1, 28, 28), 2), ("cnn-lstm", (3, 20, 24), 3)],
)
def test_any_image_and_number_of_classes_goes_over_the_bench(arch, shape, classes, tmp_path):
    pytest.importorskip("pyautoattack", reason='needs the extra "audit"')
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, *shape), generator=draw, dtype=torch.uint8)
    model = models.build(arch, 0, shape, classes).eval()
    balance(model, pixels / 255)
    if arch == "cnn":  # of its 64 outputs those without a class never win, as in a trained one
        model.network[-1].bias.data[classes:] -= 100
    labels = predict(model, pixels / 255).argmax(1)
    labels[0] = (labels[0] + 1) % classes
    split = Split(pixels, labels)
    names = tuple("abc")[:classes]
    data = ImageData(DataSpec("toy", "Toy", shape, names), split, split)
    target = as_checkpoint(model, tmp_path / "toy.pth", arch=arch)

    table = accuracy_table([target], data, [0.0, 0.1], attack="pgd-20", store=Store(tmp_path))
    assert table["correct"][0] == 11
    images, labels = split.batch(slice(None))
    assert minimal_eps(model, images, labels)[0] == 0
    held = auto_attack(model, images, labels, 0.1, queries=20, store=Store(tmp_path))
    assert int(held.sum()) <= table["correct"][1]
    trial = Trial(model, images, labels, source=model)
    assert set(trial.checklist()["verdict"]) <= {"pass", "ALARM"}
    assert trial.accuracies()["correct"][0] == 11
