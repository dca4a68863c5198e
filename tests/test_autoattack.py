"""AutoAttack: whose code it is, what is kept of it, and that an interrupted run goes on."""

import pickle
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from conftest import balance, make_batch, make_small_cnn
from torch import nn

from advlab import models
from advlab.attacks import pgd
from advlab.autoattack import FLAGS, answers_vary, auto_attack
from advlab.forward import ask, holds, predict
from advlab.store import Store


def test_without_its_package_it_says_how_to_get_it(small_cnn, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r'pip install "advlab\[audit\]"'):
        auto_attack(small_cnn, *make_batch(2))


def tiny(classes, n=12):
    """Return a model of so many classes on 8 x 8 pixels, and `n` images that it gets right."""
    model, (images, _) = make_small_cnn(0, (3, 8, 8), classes), make_batch(n, shape=(3, 8, 8))
    return model, images, balance(model, images)


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 8])
def test_it_is_at_least_as_strong_as_pgd_on_any_number_of_classes(classes):
    pytest.importorskip("pyautoattack", reason='needs the extra "audit"')
    model, images, labels = tiny(classes)
    state = torch.get_rng_state()
    held = auto_attack(model, images, labels, 0.02, queries=20)
    assert torch.equal(torch.get_rng_state(), state)
    assert int(held.sum()) < 12
    for loss in ("ce", "margin"):
        made = pgd(model, images, labels, 0.02, alpha=0.0025, steps=20, loss=loss)
        assert not (held & ~holds(model, made, labels)).any()


def test_it_takes_what_the_other_attacks_take(tmp_path):
    pytest.importorskip("pyautoattack", reason='needs the extra "audit"')
    model, images, labels = tiny(3)
    how = {"eps": 0.01, "attacks": ["apgd-ce", "square"], "queries": 5}
    expected = auto_attack(model, images, labels, **how)
    assert 0 < int(expected.sum()) < 12
    with torch.inference_mode():
        found = [auto_attack(model, images.clone(), labels.clone(), **how)]
    for one in (
        images.clone().requires_grad_(),
        images.double(),
        images.to(memory_format=torch.channels_last),
        images.repeat_interleave(2, dim=3)[..., ::2],
    ):
        found.append(auto_attack(model, one, labels, store=Store(tmp_path), **how))
    found.append(auto_attack(lambda x: model(x).double(), images, labels, **how))
    assert all(torch.equal(one, expected) for one in found)
    assert images.grad is None
    with pytest.raises(ValueError, match="label 3 has no logit"):
        auto_attack(model, images, labels + 1, **how)


class Noisy(nn.Module):
    """Answers at random: noise on every image, in eval mode too."""

    def __init__(self, model, size=0.05):
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x):
        return self.model(x + self.size * torch.randn_like(x))


def test_answers_at_random_need_the_version_that_averages():
    pytest.importorskip("pyautoattack", reason='needs the extra "audit"')
    network, images, labels = tiny(3)
    images, labels = images[:4], labels[:4]
    model = Noisy(network).eval()
    with pytest.raises(ValueError, match=r'answers differently .*; give version="rand"'):
        auto_attack(model, images, labels)
    assert answers_vary(model, images)
    assert not answers_vary(network, images)
    parts = {"version": "rand", "attacks": ["apgd-ce"]}
    torch.manual_seed(0)
    held = auto_attack(model, images, labels, 0.05, **parts)
    made = pgd(model, images, labels, 0.05, alpha=0.00625, steps=20)
    assert int(held.sum()) <= int(holds(model, made, labels).sum())
    assert torch.equal(auto_attack(model, images, labels, 0.05, **parts), held)


def by_package(model, images, labels, eps, norm, version, parts):
    """Return which images hold by the authors' code as it is."""
    from pyautoattack import AutoAttack

    torch.manual_seed(0)
    targets = predict(model, images[:1]).shape[1] - 1  # a model at random draws here, too
    options = {"eps": eps, "norm": {"linf": "Linf", "l2": "L2"}[norm], "version": version}
    attacker = AutoAttack(lambda x: ask(model, x).clone(), seed=0, **options)
    attacker.attacks_to_run, attacker.square.n_queries = parts, 20
    attacker.apgd_targeted.n_target_classes = attacker.fab.n_target_classes = targets
    _, found = attacker.run_standard_evaluation(images, labels)
    return found == labels


@pytest.mark.parametrize(
    ("classes", "norm", "eps", "noise", "parts"),
    [
        (3, "linf", 0.01, 0, ["apgd-ce", "fab-t", "square"]),
        (5, "linf", 0.01, 0, ["apgd-t"]),
        (5, "l2", 0.1, 0, ["apgd-t"]),
        (5, "linf", 0.2, 0, ["apgd-ce", "apgd-t"]),
        # Asked once more about a point that broke it, this one is right now and then.
        (3, "linf", 0.01, 0.5, ["apgd-ce"]),
    ],
)
def test_no_image_leaves_that_its_authors_code_holds(classes, norm, eps, noise, parts):
    pytest.importorskip("pyautoattack", reason='needs the extra "audit"')
    model, images, labels = tiny(classes, 6 if noise else 12)
    asked, version = [], "rand" if noise else "standard"
    if noise:
        model = Noisy(model, noise).eval()
    model.register_forward_hook(lambda *_: asked.append(1))
    how = {"norm": norm, "version": version, "attacks": parts, "queries": 20}
    found = auto_attack(model, images, labels, eps, **how)
    ours = len(asked)
    expected = by_package(model, images, labels, eps, norm, version, parts)
    assert torch.equal(found, expected)
    if eps == 0.2:
        assert not found.any()
        assert 4 * ours < len(asked) - ours
    else:
        assert 0 < int(found.sum()) < len(found)


def test_parts_are_computed_elsewhere_in_any_way_that_maps(small_cnn, calls, tmp_path):
    images, _ = make_batch(130)
    images = torch.cat([images[:100], images])  # two parts that are equal, and a third
    labels = predict(small_cnn, images).argmax(1)

    def elsewhere(function, parts):
        sent = [pickle.dumps(part) for part in parts]
        sizes.extend(map(len, sent))
        return map(function, map(pickle.loads, sent))

    sizes = []
    expected = auto_attack(small_cnn, images, labels)
    for _ in range(2):
        found = auto_attack(small_cnn, images, labels, store=Store(tmp_path), each=elsewhere)
        assert torch.equal(found, expected)
    assert len(calls) == 6
    # A slice would have been sent with all that it is cut from.
    assert 100 * 3 * 32 * 32 * 4 < sizes[0] == sizes[1] < 2.5 * sizes[2] + images[:30].nbytes


def test_its_warnings_name_a_file_that_is_there(caplog):
    pytest.importorskip("pyautoattack", reason='needs the extra "audit"')
    network, images, labels = tiny(3)
    how = {"attacks": ["apgd-ce"], "queries": 1}
    auto_attack(lambda x: network(x).softmax(1), images, labels, 0.001, **how)
    assert "probability distribution" in caplog.text
    assert f"See {FLAGS}" in caplog.text


@pytest.fixture
def calls(monkeypatch):
    """In place of pyautoattack: an attack that turns every other image grey; notes its images."""
    seen = []

    class AutoAttack:
        def __init__(self, model, **options):
            self.model, self.options = model, options
            self.square, self.fab = SimpleNamespace(), SimpleNamespace()
            self.apgd, self.apgd_targeted = (SimpleNamespace(attack_single_run=0) for _ in "12")

        def run_standard_evaluation(self, images, labels, batch_size):
            asked = {"attacks": self.attacks_to_run, "queries": self.square.n_queries}
            aimed = self.fab, self.apgd_targeted
            targets = tuple(getattr(attack, "n_target_classes", None) for attack in aimed)
            seen.append((len(images), self.options | asked, targets))
            made = images.clone()
            made[::2] = 0.5
            return made, self.model(made).argmax(1)

    monkeypatch.setitem(sys.modules, "pyautoattack", SimpleNamespace(AutoAttack=AutoAttack))
    monkeypatch.setattr(metadata, "version", lambda name: "0.1")
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
            "version": "standard",
            "attacks": ["apgd-ce", "apgd-t", "fab-t", "square"],
        },
        (None, None),
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
    monkeypatch.setattr(metadata, "version", lambda name: "0.2")
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
    auto_attack(model, *batch, version="rand")
    averaged = ["apgd-ce"] if outputs < 3 else ["apgd-ce", "apgd-dlr"]
    assert (calls[1][1]["version"], calls[1][1]["attacks"]) == ("rand", averaged)
    assert found == (targets, targets)
    with pytest.raises(ValueError, match=f"no attack 'apgd' on {outputs} outputs; choose some of"):
        auto_attack(model, *batch, attacks=["apgd", "square"])
    if outputs < 4:
        with pytest.raises(ValueError, match="no attack 'apgd-t' on"):
            auto_attack(model, *batch, attacks=["apgd-t"])
