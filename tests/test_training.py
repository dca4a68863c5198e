"""Training: recipes, the augmented set, determinism, going on after a kill."""

import copy
import math
import os
import resource
from dataclasses import replace

import pytest
import torch
from conftest import TINY, assert_same_state, make_small_cnn

from advlab import models, training
from advlab.attacks import fgsm, fgsm_direction, pgd
from advlab.checkpoints import weights_hash
from advlab.data import Split
from advlab.datasets import Shapes10
from advlab.forward import evaluate
from advlab.recipes import ADVERSARIES, Recipe
from advlab.training import (
    AugmentedSet,
    attack_batch,
    crop_some,
    fit,
    flip_some,
    hold_out,
    measure_on_validation,
    overfitted_catastrophically,
)

# --- AugmentedSet


def test_augmented_set_is_originals_then_attacked(small_cnn, shapes):
    images, labels = shapes.train.batch(slice(None))
    directions = fgsm_direction(small_cnn, images, labels)
    augmented, before = AugmentedSet(shapes.train, directions, 0.07), shapes.train.images.clone()
    expected = torch.cat([images, fgsm(small_cnn, images, labels, 0.07)])
    assert len(augmented) == 320
    order = torch.randperm(320, generator=torch.Generator().manual_seed(0))
    for index in order.split(64):
        found, found_labels = augmented.batch(index)
        assert torch.equal(found, expected[index])
        assert torch.equal(found_labels, labels.repeat(2)[index])
    assert torch.equal(shapes.train.images, before)


def test_directions_of_other_images_are_refused(shapes):
    with pytest.raises(ValueError, match=r"\(3, 3, 32, 32\) do not belong to images \(160,"):
        AugmentedSet(shapes.train, torch.zeros(3, 3, 32, 32, dtype=torch.int8), 0.1)


def test_flip_is_per_image():
    images = torch.rand(400, 3, 4, 4)
    flipped = flip_some(images, torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    same = (flipped == images).flatten(1).all(1)
    assert bool((mirrored ^ same).all())
    assert abs(int(mirrored.sum()) - 200) < 40  # 4 standard deviations
    assert torch.equal(flipped, flip_some(images, torch.Generator().manual_seed(0)))


# --- fit


def fitted(split, seed=0, recipe=TINY, **options):
    """Train a new small CNN on `split`; return it with its history."""
    model = make_small_cnn()
    return model, fit(model, split, recipe, seed=seed, **options)


class Watched:
    """`n` images of a split; `watch` is told the index of each batch."""

    def __init__(self, split, n, watch):
        self.split, self.n, self.watch = split, n, watch

    def __len__(self):
        return self.n

    def batch(self, index):
        self.watch(index)
        return self.split.batch(index)


def watch_steps(monkeypatch, look):
    """Let `look` see the optimiser's group of parameters after each of Adam's steps."""

    class Spy(torch.optim.Adam):
        def step(self, *args, **options):
            super().step(*args, **options)
            look(self.param_groups[0])

    monkeypatch.setattr(torch.optim, "Adam", Spy)


def test_same_seed_gives_the_same_weights_and_the_random_state_stays(shapes):
    torch.manual_seed(1)
    first, _ = fitted(shapes.train, seed=3)
    torch.manual_seed(2)
    expected = torch.rand(4)
    torch.manual_seed(2)
    second, _ = fitted(shapes.train, seed=3)
    assert torch.equal(torch.rand(4), expected)
    assert_same_state(second, first.state_dict())
    other, _ = fitted(shapes.train, seed=4)
    assert weights_hash(other) != weights_hash(first)


def test_real_architectures_train_deterministically(tiny_shapes):
    for arch in ("cnn", "cnn-lstm"):
        hashes = set()
        for _ in range(2):
            model = models.build(arch, 1)
            fit(model, tiny_shapes.train, TINY, seed=1)
            hashes.add(weights_hash(model))
        assert len(hashes) == 1
        assert weights_hash(models.build(arch, 1)) not in hashes


def test_history_holds_the_figures_of_each_epoch(shapes):
    rows = []
    model, history = fitted(shapes.train, test=shapes.test, on_epoch=rows.append)
    assert rows == history
    assert [row["epoch"] for row in history] == [1, 2]
    columns = {"epoch", "train_loss", "train_accuracy", "seconds", "images_per_second"}
    assert all(set(row) == columns | {"test_loss", "test_accuracy"} for row in history)
    assert not model.training
    correct, loss = evaluate(model, *shapes.test.batch(slice(None)))
    assert history[-1]["test_accuracy"] == pytest.approx(correct / 130, abs=1.5 / 130)
    assert history[-1]["test_loss"] == pytest.approx(loss, rel=1e-3)
    for row in history:
        assert 0 < row["train_loss"] < 20
        assert (row["train_accuracy"] * 160) == pytest.approx(round(row["train_accuracy"] * 160))
        assert row["images_per_second"] == pytest.approx(160 / row["seconds"])
    _, without_test = fitted(shapes.train)
    assert set(without_test[0]) == columns


def test_training_figures_are_exact_means_over_images(tiny_shapes):
    seen = []
    split = Watched(tiny_shapes.train, 50, seen.append)
    # A step so small that the weights stay: the loss of every batch can be computed afterwards.
    recipe = Recipe("still", epochs=1, batch_size=20, lr=1e-30, flip=False)
    _, history = fitted(split, recipe=recipe, precision="float32")
    model, batches = make_small_cnn().train(), [tiny_shapes.train.batch(index) for index in seen]
    with torch.no_grad():
        logits = torch.cat([model(images) for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    expected = float(torch.nn.functional.cross_entropy(logits, labels))
    assert [len(labels) for _, labels in batches] == [20, 20, 10]
    assert history[0]["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert history[0]["train_accuracy"] == int((logits.argmax(1) == labels).sum()) / 50


def test_learning_curve_decides_nothing(shapes):
    with_test, _ = fitted(shapes.train, test=shapes.test)
    without, _ = fitted(shapes.train)
    assert_same_state(with_test, without.state_dict())


def test_order_of_the_images_is_another_each_epoch(tiny_shapes):
    seen = []
    split = Watched(tiny_shapes.train, 50, seen.append)
    fitted(split, recipe=Recipe("r", epochs=3, batch_size=20))
    assert [len(index) for index in seen] == [20, 20, 10] * 3
    epochs = [torch.cat(seen[i : i + 3]) for i in (0, 3, 6)]
    for order in epochs:
        assert torch.equal(order.sort().values, torch.arange(50))
    assert not torch.equal(epochs[0], epochs[1])


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of each step that `fit` takes."""
    seen = []
    watch_steps(monkeypatch, lambda group: seen.append(group["lr"]))
    return seen


@pytest.mark.parametrize("final_lr", [0.1, 0.001])
def test_one_cycle_rises_to_lr_and_falls_to_its_final_rate(tiny_shapes, rates, final_lr):
    recipe = Recipe("cycle", epochs=5, batch_size=16, lr=4e-3, one_cycle=True, final_lr=final_lr)
    fitted(tiny_shapes.train, recipe=recipe)
    assert len(rates) == 20
    peak = rates.index(max(rates))
    assert peak == 5  # 30 % of 20 steps end with the sixth
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    expected = [4e-3 / 10, 4e-3, 4e-3 * final_lr]
    assert [rates[0], rates[peak], rates[-1]] == pytest.approx(expected, rel=1e-3)


def test_learning_rate_is_constant_without_one_cycle(tiny_shapes, rates):
    fitted(tiny_shapes.train, recipe=Recipe("flat", epochs=4, batch_size=16, lr=4e-3))
    assert rates == [4e-3] * 16


def test_progress_is_text_and_nothing_goes_to_standard_error(tiny_shapes, capsys):
    fitted(tiny_shapes.train)
    assert capsys.readouterr() == ("", "")
    fitted(tiny_shapes.train, progress="my model")
    shown = capsys.readouterr()
    assert "my model" in shown.out
    assert shown.err == ""


# --- going on after a kill

FOUR = Recipe("four", epochs=4, batch_size=32, lr=2e-3)
TRADES = {"adversary": "trades", "eps": 0.05, "alpha": 0.06, "beta": 2.0}


class _Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def killed(split, path, batch, **options):
    """Leave the state of a training that was killed before its batch of that number."""
    batches = []

    def kill(index):
        batches.append(index)
        if len(batches) == batch + 1:  # a few images are looked at first, to tell the training
            raise _Killed

    with pytest.raises(_Killed):
        fitted(Watched(split, len(split), kill), state_path=path, **options)


@pytest.mark.parametrize(
    ("recipe", "validated"),
    [
        (FOUR, False),
        (replace(FOUR, one_cycle=True), False),
        (replace(FOUR, average=0.9, one_cycle=True, optimiser="sgd", **TRADES), True),
        (replace(FOUR, average=0.9, soft=0.5, adversary="pgd", eps=0.05, alpha=0.06), False),
    ],
)
@pytest.mark.parametrize("batch", [11, 13])  # of five an epoch: the third's first, and its middle
def test_resumed_training_equals_an_uninterrupted_one(shapes, tmp_path, recipe, validated, batch):
    options = {"recipe": recipe, "test": shapes.test.first(20)}
    if validated:
        options["validation"] = shapes.test.first(40)
    whole, expected = fitted(shapes.train, **options)
    state, rows = tmp_path / "training.state", []
    killed(shapes.train, state, batch, **options)
    resumed, history = fitted(shapes.train, state_path=state, on_epoch=rows.append, **options)
    assert [row["epoch"] for row in rows] == [3, 4]
    assert_same_state(resumed, whole.state_dict())
    assert not state.exists()
    for one, other in zip(expected, history, strict=True):
        same = [name for name in one if name not in ("seconds", "images_per_second")]
        assert [one[name] for name in same] == [other[name] for name in same]


@pytest.mark.parametrize("damage", ["truncated", "text", "pickle"])
def test_damaged_state_is_refused_by_name(tiny_shapes, tmp_path, damage):
    path = tmp_path / "training.state"
    killed(tiny_shapes.train, path, 3)
    content = path.read_bytes()
    if damage == "pickle":
        torch.save({"identity": os.system}, path)
    else:
        path.write_bytes(content[:-200] if damage == "truncated" else b"not a state")
    with pytest.raises(ValueError, match=r"(?s)training.state is damaged; delete it to train"):
        fitted(tiny_shapes.train, state_path=path)


def test_state_of_another_training_is_not_used(tiny_shapes, tmp_path):
    path, split = tmp_path / "training.state", tiny_shapes.train
    signs = torch.ones_like(split.images, dtype=torch.int8)
    weak, strong = AugmentedSet(split, signs, 0.1), AugmentedSet(split, signs, 0.5)
    for data, seed, other, other_seed in ((split, 1, split, 2), (weak, 0, strong, 0)):
        killed(data, path, len(data) // 32 + 1, seed=seed)  # in its second epoch
        expected, _ = fitted(other, seed=other_seed)
        found, history = fitted(other, seed=other_seed, state_path=path)
        assert len(history) == 2
        assert_same_state(found, expected.state_dict())


@pytest.fixture
def small_disk():
    """Let no file grow beyond 10 kB, as on a full disk; a function sets it, the end lifts it."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_full_disk_while_saving_the_state_names_path_and_mend(tiny_shapes, tmp_path, small_disk):
    path = tmp_path / "training.state"
    small_disk()
    with pytest.raises(OSError, match=r"cannot write .*training.state.*Free some space"):
        fitted(tiny_shapes.train, state_path=path)
    assert list(tmp_path.iterdir()) == []


# --- bfloat16 is for training alone


def test_weights_stay_float32(shapes):
    half, _ = fitted(shapes.train, precision="bfloat16")
    full, _ = fitted(shapes.train, precision="float32")
    for model in (half, full):
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert weights_hash(half) != weights_hash(full)


@pytest.mark.parametrize(("has_units", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_bfloat16_where_it_is_fast(tiny_shapes, monkeypatch, has_units, chosen):
    monkeypatch.setattr(training, "has_fast_bf16", lambda device: has_units)
    expected, _ = fitted(tiny_shapes.train, precision=chosen)
    for found, _ in (fitted(tiny_shapes.train), fitted(tiny_shapes.train, precision="auto")):
        assert_same_state(found, expected.state_dict())


def test_training_stops_at_the_first_loss_that_is_no_number(tiny_shapes, tmp_path):
    model, state = make_small_cnn(), tmp_path / "state.pt"
    told = r"epoch 1: the loss is (nan|inf).*Lower the learning rate \(1e\+30\)"
    with pytest.raises(RuntimeError, match=told):
        fit(model, tiny_shapes.train, replace(TINY, lr=1e30), state_path=state)
    assert not state.exists()


@pytest.mark.parametrize("n", [1, 32, 33, 65])
def test_a_last_batch_of_one_image_joins_the_one_before(shapes, n):
    class Features(torch.nn.Sequential):  # whose batch norm is of (N, C)
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    sizes = []
    layers = [torch.nn.Flatten(), torch.nn.Linear(3072, 4)]
    if n > 1:
        layers.append(torch.nn.BatchNorm1d(4))
    model = Features(*layers, torch.nn.Linear(4, 10))
    history = fit(model, shapes.train.first(n), replace(TINY, epochs=1, one_cycle=True))
    assert sizes == {1: [1], 32: [32], 33: [33], 65: [32, 33]}[n]
    assert math.isfinite(history[0]["train_loss"])


@pytest.mark.parametrize("n", range(11))
def test_too_few_images_are_told(tiny_shapes, n):
    split = Split(tiny_shapes.train.images[:n], tiny_shapes.train.labels[:n])
    if n == 0:
        with pytest.raises(ValueError, match="there are no images to train on"):
            fit(make_small_cnn(), split, TINY)
    if n < 10:
        with pytest.raises(ValueError, match=f"there are {n} training images; at least 10 are"):
            hold_out(split)
    else:
        assert [len(part) for part in hold_out(split)] == [n - 1, 1]


def test_unknown_precision_is_refused_by_name(tiny_shapes):
    model = make_small_cnn()
    with pytest.raises(ValueError, match="precision 'float8'; choose one of auto, bfloat16"):
        fit(model, tiny_shapes.train, TINY, precision="float8")
    assert_same_state(model, make_small_cnn().state_dict())


# --- learning (the longest test of the suite: about 15 s on one idle core)


def test_cnn_learns_shapes10_and_fgsm_fools_it(learned):
    model, test = learned
    images, labels = test.batch(slice(None))
    clean = evaluate(model, images, labels)[0]
    attacked = evaluate(model, fgsm(model, images, labels, 0.1), labels)[0]
    assert clean >= 900, "of 1,000"
    assert attacked < 300, "of 1,000"


# --- adversarial training


def adversarial(name, **options):
    attack = {"sigma": 0.2} if name == "noise" else {"eps": 0.05, "alpha": 0.06}
    return replace(TINY, **{"name": name, "adversary": name, **attack, **options})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ADVERSARIES[1:-1])  # noise is no attack
@pytest.mark.parametrize("steps", [1, 3])
def test_attacked_batch_keeps_norm_and_range(shapes, name, steps):
    model = make_small_cnn().train()
    images, labels = shapes.train.batch(slice(0, 20))
    made = attack_batch(model, images, labels, adversarial(name, steps=steps), generator())
    assert made.shape == images.shape
    assert made.min() >= 0
    assert made.max() <= 1
    assert float((made - images).abs().max()) <= 0.05 + 1e-6
    assert float((made - images).abs().mean()) > 0.02
    assert not made.requires_grad
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fgsm_of_a_batch_is_fgsm_with_batch_statistics(shapes):
    model = make_small_cnn().train()
    images, labels = shapes.train.batch(slice(0, 20))
    made = attack_batch(model, images, labels, adversarial("fgsm", alpha=0.05), generator())
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), labels), x)
    expected = (images + 0.05 * gradient.sign()).clamp(0, 1)
    assert float(((made - expected).abs() > 1e-6).float().mean()) < 1e-3


def test_trades_attacks_in_eval_mode_and_the_models_own_answer(shapes):
    model = make_small_cnn().train()
    images, labels = shapes.train.batch(slice(0, 20))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = adversarial("trades", steps=3, alpha=0.02)
    made = attack_batch(model, images, labels, recipe, generator())
    assert_same_state(model, before)  # no running statistics were touched
    other = attack_batch(model, images, (labels + 1) % 10, recipe, generator())
    assert torch.equal(made, other)  # the labels play no part


def test_loss_of_trades_is_its_formula(shapes):
    model = make_small_cnn().train()
    images, labels = shapes.train.batch(slice(0, 20))
    recipe = adversarial("trades", beta=6.0)
    twin = copy.deepcopy(model)  # the loss changes the running statistics
    loss, _ = training._loss(model, images, labels, recipe, generator())
    made = attack_batch(twin, images, labels, recipe, generator())
    clean, attacked = twin(torch.cat([images, made])).chunk(2)
    p, q = clean.softmax(1), attacked.softmax(1)
    gap = (p * (p.log() - q.log())).sum(1).mean()
    expected = torch.nn.functional.cross_entropy(clean, labels) + 6 * gap
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ADVERSARIES[1:])
def test_adversarial_training_is_reproducible_and_differs(shapes, name):
    first, _ = fitted(shapes.train, recipe=adversarial(name, beta=1.0))
    again, _ = fitted(shapes.train, recipe=adversarial(name, beta=1.0))
    assert_same_state(again, first.state_dict())
    plain, _ = fitted(shapes.train, recipe=Recipe("plain", 2, 32, 2e-3))
    assert weights_hash(plain) != weights_hash(first)


def test_adversarial_training_makes_more_robust():
    shapes = Shapes10(4_000, 200)
    images, labels = shapes.test.batch(slice(None))
    eps, held = 4 / 255, []
    short = {"epochs": 8, "batch_size": 32, "lr": 3e-3, "one_cycle": True}
    attack = {"eps": eps, "alpha": 1.25 * eps, "warm_up": 0.7}
    for recipe in (Recipe("plain", **short), adversarial("rs-fgsm", **short, **attack)):
        model, _ = fitted(shapes.train, recipe=recipe, precision="float32")
        attacked = pgd(model, images, labels, eps, alpha=eps / 4, steps=10)
        held.append(evaluate(model, attacked, labels)[0])
    assert held[1] > held[0] + 20  # a tenth of the images


def test_fit_warms_up_over_the_whole_training(tiny_shapes, monkeypatch):
    seen = []

    def spy(model, images, labels, recipe, generator):
        seen.append(recipe.eps)
        return images

    monkeypatch.setattr(training, "attack_batch", spy)
    fitted(tiny_shapes.train, recipe=adversarial("pgd", eps=0.04, warm_up=0.5))
    assert seen == pytest.approx([0.02, 0.04, 0.04, 0.04])  # two epochs of two batches


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
def test_optimiser_is_the_recipes(tiny_shapes, monkeypatch, name, kind):
    made = []
    real = training._schedule
    monkeypatch.setattr(training, "_schedule", lambda o, *rest: made.append(o) or real(o, *rest))
    fitted(tiny_shapes.train, recipe=replace(TINY, optimiser=name, weight_decay=0.25))
    (optimiser,) = made
    assert type(optimiser) is kind
    assert optimiser.defaults["weight_decay"] == 0.25
    assert optimiser.defaults.get("nesterov", False) == (name == "sgd")


def test_average_of_the_weights_is_the_result(tiny_shapes):
    plain, _ = fitted(tiny_shapes.train)
    averaged, _ = fitted(tiny_shapes.train, recipe=replace(TINY, average=0.25))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        watch_steps(patch, lambda group: seen.append(group["params"][0].detach().clone()))
        fitted(tiny_shapes.train)
    expected = seen[0]
    for decay, weights in zip((2 / 11, 0.25, 0.25), seen[1:], strict=True):
        expected = decay * expected + (1 - decay) * weights
    torch.testing.assert_close(next(averaged.parameters()).detach(), expected)
    assert weights_hash(plain) != weights_hash(averaged)


def test_soft_labels_are_half_of_the_averaged_answer_to_the_clean_images(shapes):
    model, averaged = make_small_cnn().train(), make_small_cnn(1).train()
    images, labels = shapes.train.batch(slice(0, 20))
    before = {name: tensor.clone() for name, tensor in averaged.state_dict().items()}
    recipe = adversarial("pgd", average=0.9, soft=0.25)
    twin = copy.deepcopy(model)
    loss, _ = training._loss(model, images, labels, recipe, generator(), averaged)
    assert averaged.training
    assert_same_state(averaged, before)
    made = attack_batch(twin, images, labels, recipe, generator())
    true = torch.nn.functional.one_hot(labels, 10)
    expected = 0.75 * true + 0.25 * averaged.eval()(images).softmax(1)
    wanted = -(expected * twin(made).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)


def test_soft_labels_come_from_the_average_of_the_weights_in_training(tiny_shapes):
    recipe = adversarial("pgd", average=0.9)
    hard, _ = fitted(tiny_shapes.train, recipe=recipe)
    soft, _ = fitted(tiny_shapes.train, recipe=replace(recipe, soft=0.5))
    assert weights_hash(hard) != weights_hash(soft)


def test_noise_is_new_in_every_step_and_not_clipped(shapes):
    model, seen = make_small_cnn().train(), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    images, labels = shapes.train.batch(slice(0, 20))
    recipe, draw = adversarial("noise", sigma=0.5), generator()
    for _ in range(2):
        loss, logits = training._loss(model, images, labels, recipe, draw)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))
    for shown in seen:
        assert float((shown - images).std()) == pytest.approx(0.5, rel=0.02)
        assert float(shown.min()) < -0.5
    assert not torch.equal(*seen)
    assert len(seen) == 2


def test_validation_keeps_the_best_epoch(shapes, monkeypatch):
    scores = iter([0.3, 0.5, 0.4])
    seen = []

    def measured(model, validation, eps, seed=0):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"val_accuracy": 0.9, "val_fgsm_accuracy": 0.6, "val_pgd_accuracy": next(scores)}

    monkeypatch.setattr(training, "measure_on_validation", measured)
    recipe = replace(adversarial("rs-fgsm"), epochs=3)
    model, history = fitted(shapes.train, recipe=recipe, validation=shapes.test)
    assert [row["val_pgd_accuracy"] for row in history] == [0.3, 0.5, 0.4]
    assert_same_state(model, seen[1])


def test_validation_figures_are_those_of_the_attacks(shapes):
    model = make_small_cnn()
    split = shapes.test.first(110)
    found = measure_on_validation(model, split, 0.01)
    images, labels = split.batch(slice(None))
    expected = {
        "val_accuracy": images,
        "val_fgsm_accuracy": fgsm(model, images, labels, 0.01),
        "val_pgd_accuracy": pgd(model, images, labels, 0.01, alpha=0.0025, steps=10),
    }
    for name, shown in expected.items():
        assert found[name] == pytest.approx(evaluate(model, shown, labels)[0] / 110, abs=1.5 / 110)


@pytest.mark.parametrize(
    ("curve", "epoch"),
    [([0.1, 0.3, 0.35], None), ([0.3, 0.35, 0.1, 0.3], 3), ([0.3, 0.16], None), ([0.3, 0.0], 2)],
)
def test_catastrophic_overfitting_is_a_fall_to_under_half(curve, epoch):
    history = [
        {"epoch": i, "val_fgsm_accuracy": value, "val_pgd_accuracy": value}
        for i, value in enumerate(curve, 1)
    ]
    assert overfitted_catastrophically(history) == epoch
    first = {"epoch": 1, "val_fgsm_accuracy": 0.16, "val_pgd_accuracy": 0.07}
    assert overfitted_catastrophically([first]) == 1


@pytest.mark.parametrize(("n", "held"), [(160, 16), (50, 5), (50_000, 5_000)])
def test_held_out_images_are_not_trained_on(n, held):
    images = torch.zeros(n, 1, 1, 1, dtype=torch.uint8)
    rest, kept = hold_out(Split(images, torch.arange(n)))
    assert rest.labels.tolist() == list(range(n - held))
    assert kept.labels.tolist() == list(range(n - held, n))


def test_crops_are_the_images_moved_within_zeros():
    images = torch.rand(40, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    made = crop_some(images, 2, torch.Generator().manual_seed(1))
    assert made.shape == images.shape
    padded, moves = torch.nn.functional.pad(images, [2] * 4), set()
    for whole, piece in zip(padded, made, strict=True):
        found = [
            (up, left)
            for up in range(5)
            for left in range(5)
            if torch.equal(whole[:, up : up + 5, left : left + 6], piece)
        ]
        assert len(found) == 1
        moves.update(found)
    assert {up for up, _ in moves} == {left for _, left in moves} == set(range(5))
    assert torch.equal(made, crop_some(images, 2, torch.Generator().manual_seed(1)))


def test_a_recipe_that_crops_trains_on_other_images(tiny_shapes):
    plain, _ = fitted(tiny_shapes.train)
    cropped, _ = fitted(tiny_shapes.train, recipe=replace(TINY, crop=2))
    assert weights_hash(plain) != weights_hash(cropped)


# --- any image, any number of classes


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize(
    ("arch", "shape", "classes"), [("cnn", (1, 28, 28), 10), ("cnn-lstm", (3, 20, 24), 2)]
)
def test_every_recipe_trains_on_any_image(adversary, arch, shape, classes):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (48, *shape), generator=draw, dtype=torch.uint8)
    split = Split(pixels, torch.arange(48) % classes)
    model = models.build(arch, 0, shape, classes)
    before, options, train = weights_hash(model), {}, split
    if adversary == "fixed":
        recipe = replace(TINY, epochs=1)
        train = AugmentedSet(split, fgsm_direction(model, *split.batch(slice(None))), 0.1)
    else:
        recipe = replace(adversarial(adversary, beta=1.0, steps=2), epochs=1)
        options["validation"] = split.first(10) if recipe.on_the_fly else None
    (row,) = fit(model, train, recipe, test=split, **options)
    assert weights_hash(model) != before
    assert all(math.isfinite(value) for value in row.values())
    assert model(split.batch(slice(0, 2))[0]).shape == (2, max(classes, 64 if arch == "cnn" else 2))
