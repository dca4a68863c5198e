"""The checklist: no alarm for an honest model, an alarm for what only looks robust."""

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import as_checkpoint, balance, encoded, make_batch, make_small_cnn
from PIL import Image
from torch import nn
from torch.nn import functional

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


CHANCE, SAME = "clean accuracy is above chance", "the same answer to the same image"
FLAT, STEP = "gradients neither vanish nor explode", "a tiny step does what the gradient says"
SCALE = "the loss hides nothing that the margin shows"
CLASSES = "every answer is a class of the data"
PATH = "a gradient leads from the answers to the pixels"
CLAIM = "the worst attack leaves what is claimed"


def verdicts(table):
    return dict(zip(table["check"], table["verdict"], strict=True))


def test_audit_of_an_honest_model_has_no_alarm(learned, no_square):
    model, test = learned
    images, labels = test.first(40).batch(slice(None))
    table = audit.audit(model, images, labels, eps=0.004, classes=10)
    assert list(table.columns) == ["check", "verdict", "measured", "n"]
    assert len(table) == 16
    found = verdicts(table)
    assert found.pop(BLACK_BOX) == "not run"
    assert found.pop("white box at least as strong as transfer") == "not run"
    assert found.pop(CLAIM) == "not run"
    assert set(found.values()) == {"pass"}
    assert set(table["n"]) == {40}


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
    images, labels = test.first(30).batch(slice(None))

    def masked(x):
        return 1000 * model(x)

    found = verdicts(audit.audit(masked, images, labels, source=model, eps=0.03))
    for check in (
        "white box at least as strong as transfer",
        "accuracy falls to 0 as eps grows",
        "gradients neither vanish nor explode",
    ):
        assert found[check] == "ALARM", check


def test_a_claim_is_held_against_the_worst_attack(learned, no_square):
    model, test = learned
    images, labels = test.first(40).batch(slice(None))
    trial = audit.Trial(model, images, labels, eps=0.03)
    shares = [trial.iterated, trial.on_margin, trial.converged, trial.sweep[-1]]
    assert trial.worst == min(shares) < 0.5
    for claim, verdict in ((trial.worst, "pass"), (0.75, "ALARM"), (None, "not run")):
        found = verdicts(replace(trial, claim=claim).checklist())
        assert found.pop(CLAIM) == verdict
        assert "ALARM" not in found.values()  # nothing else is wrong with an honest weak model


def test_a_claim_is_held_against_transfer_and_square_too(learned, monkeypatch):
    model, test = learned
    images, labels = test.first(40).batch(slice(None))

    def masked(x):
        return 1000 * model(x)

    monkeypatch.setattr(audit, "auto_attack", lambda *_, **__: torch.zeros(40, dtype=torch.bool))
    assert audit.Trial(masked, images, labels, eps=0.03).worst == 0
    monkeypatch.setattr(audit, "auto_attack", lambda *_, **__: torch.ones(40, dtype=torch.bool))
    transferred = audit.Trial(masked, images, labels, source=model, eps=0.03)
    assert transferred.worst <= transferred.transfer[0] < transferred.white


@pytest.mark.parametrize("claim", [-0.1, 1.1, 75.5])
def test_a_claim_that_is_no_share_is_refused(claim):
    batch = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=f"claim is {claim}; an accuracy is a share"):
        audit.Trial(nn.Flatten(), *batch, claim=claim)


class Changed(nn.Module):
    """A model whose images, or logits, are changed by a function of them."""

    def __init__(self, model, before=lambda x: x, after=lambda x, logits: logits):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(x, self.model(self.before(x)))


class KWinners(nn.Module):
    """The highest of a layer's values stay, the others are 0 (Xiao et al. 2020, 1905.10510)."""

    def forward(self, x):
        flat = x.flatten(1)
        return (flat * (flat >= flat.topk(int(0.3 * flat.shape[1])).values[:, -1:])).view_as(x)


def k_winners(model):
    changed = copy.deepcopy(model)
    for k, layer in enumerate(changed.network):
        if isinstance(layer, nn.ReLU):
            changed.network[k] = KWinners()
    return changed


def drops_out(model):
    changed = copy.deepcopy(model)
    changed.network[-1].register_forward_pre_hook(lambda _, x: functional.dropout(x[0], 0.3))
    return changed


def resized(x):
    size = int(torch.randint(26, 32, ()))
    return functional.pad(functional.interpolate(x, size), (0, 32 - size, 0, 32 - size))


def jpeg(x):
    """Return 8-bit pictures as JPEG keeps them; as if nothing had happened for the gradient."""
    pictures = [(255 * image).byte().permute(1, 2, 0).numpy() for image in x.detach()]
    files = [encoded(Image.fromarray(picture), "JPEG") for picture in pictures]
    kept = [torch.from_numpy(np.array(Image.open(io.BytesIO(file)))) for file in files]
    return x + (torch.stack(kept).permute(0, 3, 1, 2) / 255 - x).detach()


def abstain(x, logits):
    """Return the logits with one more, the highest where the two best are near each other."""
    return torch.cat([logits, logits.topk(2).values[:, 1:] + 1], 1)


UNTRUE = [  # made from a model, heard by the line of this name
    ("noise", lambda m: Changed(m, lambda x: x + 0.05 * torch.randn_like(x)), SAME),
    ("resize and pad", lambda m: Changed(m, resized), SAME),
    ("flip", lambda m: Changed(m, lambda x: x.flip(3) if torch.rand(()) < 0.5 else x), SAME),
    ("dropout", drops_out, SAME),
    ("detached", lambda m: Changed(m, after=lambda _, logits: logits.detach()), PATH),
    ("JPEG without a derivative", lambda m: Changed(m, lambda x: jpeg(x).detach()), PATH),
    ("8 bits", lambda m: Changed(m, lambda x: (255 * x).round() / 255), FLAT),
    ("JPEG", lambda m: Changed(m, jpeg), STEP),
    ("k-winners", k_winners, STEP),
    ("x 1000", lambda m: Changed(m, after=lambda _, logits: 1_000 * logits), SCALE),
    ("sigmoid", lambda m: Changed(m, after=lambda _, logits: logits.sigmoid()), SCALE),
    ("detector", lambda m: Changed(m, after=abstain), CLASSES),
]


@pytest.mark.parametrize(("make", "check"), [u[1:] for u in UNTRUE], ids=[u[0] for u in UNTRUE])
def test_the_line_for_it_hears_what_only_looks_robust(learned, make, check):
    model, test = learned
    images, labels = test.first(30).batch(slice(None))
    judge = dict(audit.CHECKLIST)[check]
    for network, passes in ((model, True), (make(model).eval(), False)):
        torch.manual_seed(0)
        assert judge(Trial(network, images, labels, eps=0.02, classes=64))[0] is passes


def test_an_audit_goes_on_without_a_gradient(learned, monkeypatch):
    model, test = learned
    images, labels = test.first(40).batch(slice(None))
    monkeypatch.setattr(audit, "auto_attack", lambda *_, **__: torch.arange(40) < 20)
    blind = Changed(model, after=lambda _, logits: logits.detach())
    trial = Trial(blind, images, labels, model, eps=0.03, classes=64, claim=0.9)
    found = trial.checklist().set_index("check")
    without = found[found["measured"] == "needs a gradient"]
    assert set(without["verdict"]) == {"not run"}
    assert len(without) == 9
    assert "adaptive.StraightThrough" in found["measured"][PATH]
    told = "Square, 1,000 queries, 50.0 %; to compare it needs a gradient"
    assert found["measured"][BLACK_BOX] == told
    assert found["verdict"].drop(without.index).to_dict() == {
        **{CHANCE: "pass", SAME: "pass", PATH: "ALARM", BLACK_BOX: "not run", CLASSES: "pass"},
        **{"never more accurate than on clean images": "pass", CLAIM: "ALARM"},
    }
    assert trial.worst == min(0.5, trial.transfer[0])
    assert list(trial.accuracies()["test"]) == [
        *("clean", "noise", "FGSM, transfer", "FGSM, transfer", "FGSM, transfer"),
        "Square, 1,000 queries",
    ]


def test_what_answers_at_random_is_asked_and_attacked_several_times(learned, no_square):
    model, test = learned
    images, labels = test.first(30).batch(slice(None))
    drawn = torch.Generator().manual_seed(0)

    def noisy(x):
        return model((x + 0.1 * torch.randn(x.shape, generator=drawn)).clamp(0, 1))

    trial, same = Trial(noisy, images, labels, eps=0.02), Trial(model, images, labels, eps=0.02)
    assert same.averaged is None
    assert trial.averaged < trial.iterated - 0.05  # an image that was wrong by chance stays
    assert trial.worst <= trial.white <= trial.averaged
    row = trial.accuracies().set_index("test").loc["PGD, 20 steps, 10 answers a step"]
    assert row["correct"] == round(30 * trial.averaged)
    told = trial.checklist().set_index("check")["measured"][SAME]
    assert f"10 a step {100 * trial.averaged:.1f} %, 1 a step {100 * trial.iterated:.1f} %" in told

    def undecided(x):  # right in every second answer
        undecided.calls += 1
        return model(x).roll(undecided.calls % 2, 1)

    undecided.calls = 0
    clean = same.clean
    assert Trial(undecided, images, labels).clean == pytest.approx(clean * 0.4, abs=clean / 4)
    assert 0.3 < Trial(undecided, images, labels).clean < 0.7


def test_a_vanished_gradient_names_what_to_try(learned):
    model, test = learned
    images, labels = test.first(30).batch(slice(None))
    judge = dict(audit.CHECKLIST)[FLAT]
    assert "try" not in judge(Trial(model, images, labels))[1]
    masked = Changed(model, after=lambda _, logits: 10_000 * logits)
    assert judge(Trial(masked, images, labels))[1].endswith("then BPDA")


def test_a_line_needs_more_than_one_image_that_differs():
    images, labels = make_batch(100)
    trial = Trial(make_small_cnn(), images, labels)
    low = [trial.interval(share)[0] > audit.LITTLE for share in (0, 0.01, 0.02, 0.03)]
    assert low == [False, False, False, True]


def test_nothing_is_asked_of_a_model_at_chance(learned):
    model, test = learned
    images, labels = test.first(40).batch(slice(None))
    table = audit.audit(model, images, (labels + 1) % 10)
    assert list(table["verdict"]) == ["ALARM"] + 15 * ["not run"]
    assert set(table["measured"][1:]) == {"clean accuracy is at chance"}
    judge = dict(audit.CHECKLIST)[CHANCE]
    assert judge(Trial(model, images, labels))[0] is True
    assert judge(Trial(model, images[:2], labels[:1].repeat(2))) == (None, "needs two classes")


def test_classes_that_the_labels_pass_are_refused(small_cnn, batch):
    with pytest.raises(ValueError, match="classes is 2, but there is a label 9"):
        Trial(small_cnn, batch[0], batch[1] * 0 + 9, classes=2)


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
    trial = Trial(model, images, labels, source=model, classes=classes, claim=0.5)
    assert set(trial.checklist()["verdict"]) <= {"pass", "ALARM"}
    assert trial.accuracies()["correct"][0] == 11
