"""AutoAttack: whose code it is, what is kept of it, and that an interrupted run goes on."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_batch, make_small_cnn
from torch import nn

from advlab import autoattack, models
from advlab.attacks import pgd
from advlab.autoattack import auto_attack
from advlab.forward import holds, predict
from advlab.store import Store


def test_without_its_package_it_says_how_to_get_it(small_cnn, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r'pip install "advlab\[audit\]"'):
        auto_attack(small_cnn, *make_batch(2))


def test_it_is_at_least_as_strong_as_pgd(learned):
    pytest.importorskip("pyautoattack", reason='needs the extra "audit"')
    model, test = learned
    images, labels = test.first(30).batch(slice(None))
    state = torch.get_rng_state()
    held = auto_attack(model, images, labels, 0.01, attacks=["apgd-ce"])
    assert torch.equal(torch.get_rng_state(), state)
    made = pgd(model, images, labels, 0.01, alpha=0.00125, steps=20)
    assert int(held.sum()) <= int(holds(model, made, labels).sum()) + 1


@pytest.fixture
def calls(monkeypatch):
    """In place of pyautoattack: an attack that turns every other image grey; notes its images."""
    seen = []

    class AutoAttack:
        def __init__(self, model, **options):
            self.options = options
            self.square, self.fab, self.apgd_targeted = (SimpleNamespace() for _ in range(3))

        def run_standard_evaluation(self, images, labels, batch_size):
            asked = {"attacks": self.attacks_to_run, "queries": self.square.n_queries}
            targets = vars(self.fab), vars(self.apgd_targeted)
            seen.append((len(images), self.options | asked, targets))
            made = images.clone()
            made[::2] = 0.5
            return made, labels

    monkeypatch.setitem(sys.modules, "pyautoattack", SimpleNamespace(AutoAttack=AutoAttack))
    monkeypatch.setattr(autoattack, "version", lambda name: "0.1")
    return seen


def test_interrupted_run_goes_on(small_cnn, calls, tmp_path):
    images, _ = make_batch(230)
    labels = predict(small_cnn, images).argmax(1)
    labels[5] = (labels[5] + 1) % 10
    whole = auto_attack(small_cnn, images, labels, store=Store(tmp_path))
    assert [n for n, *_ in calls] == [100, 100, 30]
    assert calls[0][1:] == (
        {
            **{"norm": "Linf", "eps": 8 / 255, "seed": 0, "queries": 5_000, "device": "cpu"},
            "attacks": ["apgd-ce", "apgd-t", "fab-t", "square"],
        },
        ({}, {}),
    )
    lost, damaged, _ = sorted(tmp_path.rglob("*.json"))
    lost.unlink()
    damaged.write_text("[true]")
    calls.clear()
    again = auto_attack(small_cnn, images, labels, store=Store(tmp_path))
    assert len(calls) == 2
    assert torch.equal(again, whole)
    assert whole.shape == (230,)
    assert not whole[5]


def test_parts_of_other_models_attacks_and_seeds_are_not_mixed(calls, tmp_path, monkeypatch):
    images, labels = make_batch(5)
    hybrids = [models.build(arch) for arch in ("cnn-lstm", "cnn-lstm-positions")]  # same weights
    options = [
        {},
        {"eps": 0.1},
        {"seed": 1},
        {"queries": 9},
        {"norm": "l2"},
        {"attacks": ["square"]},
    ]
    asked = [(make_small_cnn(0), images, labels, one) for one in options]
    asked += [(model, images, labels, {}) for model in (make_small_cnn(1), *hybrids)]
    asked += [(make_small_cnn(0), images.flip(3), labels, {})]
    asked += [(make_small_cnn(0), images, (labels + 1) % 10, {})]
    for _ in range(2):
        for model, x, y, one in asked:
            auto_attack(model, x, y, store=Store(tmp_path), **one)
        assert len(calls) == len(asked)
    assert calls[5][1]["attacks"] == ["square"]
    monkeypatch.setattr(autoattack, "version", lambda name: "0.2")
    auto_attack(make_small_cnn(0), images, labels, store=Store(tmp_path))
    assert len(calls) == len(asked) + 1


def test_nothing_is_kept_of_code_that_no_key_can_hold(small_cnn, calls, tmp_path):
    class Defended(nn.Module):
        """Could be edited in a notebook: its weights, its name and its answers stay the same."""

        def __init__(self):
            super().__init__()
            self.model = small_cnn

        def forward(self, x):
            return self.model(x)

    for model in (small_cnn.forward, Defended(), nn.Sequential(Defended())):
        for _ in range(2):
            auto_attack(model, *make_batch(5), store=Store(tmp_path))
    assert len(calls) == 6
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("outputs", "parts", "targets"),
    [(2, 3, 1), (3, 3, 2), (4, 4, 3), (9, 4, 8), (10, 4, None), (100, 4, None)],
)
def test_few_classes_leave_fewer_targets_and_parts(calls, outputs, parts, targets):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, outputs))
    batch = make_batch(3, classes=2)
    auto_attack(model, *batch)
    _, asked, found = calls[0]
    assert len(asked["attacks"]) == parts
    assert found == (({"n_target_classes": targets} if targets else {}),) * 2
    with pytest.raises(ValueError, match=f"no attack 'apgd' on {outputs} outputs; choose some of"):
        auto_attack(model, *batch, attacks=["apgd", "square"])
    if outputs < 4:
        with pytest.raises(ValueError, match="no attack 'apgd-t' on"):
            auto_attack(model, *batch, attacks=["apgd-t"])
