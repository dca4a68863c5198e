"""Evaluation: intervals, exact counts, the accuracy table, its cells on disk."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import balance, make_batch, make_small_cnn
from torch import nn

from advlab import evaluation, models
from advlab.attacks import fgsm, pgd
from advlab.checkpoints import Checkpoint, weights_hash
from advlab.data import Split
from advlab.evaluation import (
    accuracy_table,
    attack_direction,
    attacked,
    audit,
    auto_attack,
    confusion,
    evaluate,
    holds,
    minimal_eps,
    predict,
    wilson,
)

# --- Wilson intervals


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # these four: Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
        (5, 10, 0.2366, 0.7634),
        (8037, 10_000, 0.7958, 0.8114),
    ],
)
def test_wilson_gives_known_intervals(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=5.1e-5)


def test_wilson_stays_in_range_and_holds_the_proportion():
    for n in (1, 7, 10_000):
        for correct in {0, 1, n // 2, n}:
            low, high = wilson(correct, n)
            assert 0 <= low <= correct / n <= high <= 1
            assert low < high


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(correct, n):
    with pytest.raises(ValueError, match=f"{correct} correct of {n}; need"):
        wilson(correct, n)


# --- evaluate


class ByFirstPixel(nn.Module):
    """Handmade: the red value of the first pixel, in tenths, is the class."""

    def forward(self, images):
        return F.one_hot((images[:, 0, 0, 0] * 10).long().clamp(max=9), 10).float() * 4


@pytest.fixture
def known():
    """Return 130 images of known class by `ByFirstPixel`, 93 of them labelled so."""
    images, _ = make_batch(130)
    labels = (torch.arange(130) * 7) % 10
    images[:, 0, 0, 0] = labels / 10 + 0.05
    labels[93:] = (labels[93:] + 1) % 10
    return images, labels


def test_evaluate_counts_exactly(known):
    # 130 images are a chunk of 100 and one of 30: an average of batch averages would be
    # (93/100 + 0/30) / 2 = 46.5 %, not 71.5 %.
    correct, loss = evaluate(ByFirstPixel(), *known)
    assert correct == 93
    right = -math.log(math.exp(4) / (math.exp(4) + 9))
    wrong = right + 4
    assert loss == pytest.approx((93 * right + 37 * wrong) / 130, rel=1e-5)


def test_evaluate_runs_in_eval_mode_and_restores_it(batch):
    model = nn.Sequential(make_small_cnn(), nn.Dropout(0.5))
    expected = evaluate(model.eval(), *batch)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    model[0][2].eval()
    assert evaluate(model, *batch) == expected
    assert model.training
    assert not model[0][2].training
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_predict_is_float32_inside_autocast(small_cnn, batch):
    expected = predict(small_cnn, batch[0])
    with torch.autocast("cpu", torch.bfloat16):
        found = predict(small_cnn, batch[0])
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_predict_does_not_depend_on_chunks(small_cnn):
    images, _ = make_batch(130)
    whole = predict(small_cnn, images)
    alone = torch.cat([predict(small_cnn, image[None]) for image in images])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)


def test_evaluate_refuses_bad_input(small_cnn, batch):
    images, labels = batch
    with pytest.raises(ValueError, match="must lie in"):
        evaluate(small_cnn, images * 2, labels)
    with pytest.raises(ValueError, match="label 10 has no logit: the model returned 10"):
        evaluate(small_cnn, images, labels * 0 + 10)


# --- confusion


def test_confusion_counts_true_by_predicted():
    true, predicted = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 2, 2, 0])
    counts = confusion(true, predicted, ["a", "b", "c"])
    assert counts.to_numpy().tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]
    assert list(counts.index) == list(counts.columns) == ["a", "b", "c"]
    assert (counts.index.name, counts.columns.name) == ("true", "predicted")


def test_confusion_does_not_misplace_a_logit_without_label():
    # The paper's CNN has 64 logits: class 12 can be predicted.
    with pytest.raises(ValueError, match="12"):
        confusion(torch.tensor([0, 1]), torch.tensor([12, 1]), [str(i) for i in range(10)])


# --- attacks


def test_noise_is_random_signs_by_seed(small_cnn):
    images, labels = make_batch(40)
    noise = attack_direction("noise", small_cnn, images, labels, seed=1)
    assert noise.dtype == torch.int8
    assert set(noise.unique().tolist()) == {-1, 1}
    assert abs(float(noise.float().mean())) < 0.012  # 4 standard deviations
    assert torch.equal(noise, attack_direction("noise", small_cnn, images, labels, seed=1))
    assert not torch.equal(noise, attack_direction("noise", small_cnn, images, labels, seed=2))


def test_unknown_attack_is_named_with_the_choices(small_cnn, batch):
    with pytest.raises(ValueError, match=r"'pgd-9'; choose one of fgsm, fgsm-per-image, noise"):
        attack_direction("pgd-9", small_cnn, *batch)


# --- the table

COLUMNS = ["model", "architecture", "train_eps", "test_eps", "attack", "source", "data", "recipe"]
COLUMNS += ["seed", "accuracy", "low", "high", "loss", "correct", "n"]
EPS = (0.0, 0.02, 0.1)


def test_table_has_a_row_per_model_and_eps(trained, shapes):
    table = accuracy_table(trained, shapes, EPS)
    assert list(table.columns) == COLUMNS
    assert list(table["model"]) == ["cnn baseline"] * 3 + ["cnn eps=0.1"] * 3
    assert list(table["test_eps"]) == [0.0, 0.02, 0.1] * 2
    assert set(table["data"]) == {"Shapes-10"}
    assert set(table["source"]) == {"white box"}
    assert set(table["n"]) == {130}
    for row in table.itertuples():
        assert row.accuracy == row.correct / 130
        assert (row.low, row.high) == wilson(row.correct, 130)


def test_table_is_white_box_without_a_source(trained, shapes):
    table = accuracy_table(trained, shapes, [0.02])
    images, labels = shapes.test.batch(slice(None))
    for checkpoint, row in zip(trained, table.itertuples(), strict=True):
        attacked = fgsm(checkpoint.model, images, labels, 0.02)
        assert evaluate(checkpoint.model, attacked, labels) == (row.correct, row.loss)


def test_table_is_transfer_with_a_source(trained, shapes):
    baseline, robust = trained
    table = accuracy_table(trained, shapes, [0.02], attack="fgsm-per-image", source=baseline)
    assert set(table["source"]) == {"cnn baseline"}
    images, labels = shapes.test.batch(slice(None))
    attacked = fgsm(baseline.model, images, labels, 0.02, per_image_statistics=True)
    expected = [evaluate(checkpoint.model, attacked, labels) for checkpoint in (baseline, robust)]
    assert list(table["correct"]) == [correct for correct, _ in expected]
    assert list(table["loss"]) == [loss for _, loss in expected]
    white = accuracy_table([robust], shapes, [0.02], attack="fgsm-per-image")
    assert white["loss"][0] != table["loss"][1]


@pytest.mark.parametrize("attack", evaluation.ATTACKS)
def test_eps_zero_is_the_clean_accuracy_for_every_attack(trained, shapes, attack):
    table = accuracy_table(trained, shapes, [0.0], attack=attack, source=trained[1])
    clean = [evaluate(model.model, *shapes.test.batch(slice(None))) for model in trained]
    assert list(zip(table["correct"], table["loss"], strict=True)) == clean


def test_table_refuses_bad_eps_and_attack_before_measuring(trained, shapes, forwards):
    with pytest.raises(ValueError, match=r"eps is 1\.2; it must be"):
        accuracy_table(trained, shapes, [0.0, 1.2])
    assert forwards == []
    with pytest.raises(ValueError, match="unknown attack 'cw'"):
        accuracy_table(trained, shapes, [0.1], attack="cw")


@pytest.fixture
def forwards(trained):
    """List that grows with every forward pass of a trained model."""
    calls = []
    hooks = [
        checkpoint.model.register_forward_hook(lambda *args: calls.append(1))
        for checkpoint in trained
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def test_measured_cells_are_not_measured_again(trained, shapes, tmp_path, forwards):
    baseline, _ = trained
    options = {"cells": tmp_path / "cells", "source": baseline}
    first = accuracy_table(trained, shapes, EPS, **options)
    assert forwards
    forwards.clear()
    second = accuracy_table(trained, shapes, EPS, **options)
    assert forwards == []
    pd.testing.assert_frame_equal(first, second)
    # White box of the baseline is the same cell as transfer from itself.
    accuracy_table([baseline], shapes, EPS, cells=tmp_path / "cells")
    assert forwards == []
    pd.testing.assert_frame_equal(first, accuracy_table(trained, shapes, EPS, source=baseline))


def test_cells_depend_on_all_that_they_should(trained, shapes, tmp_path, forwards):
    baseline, robust = trained
    cells = tmp_path / "cells"
    accuracy_table([baseline], shapes, EPS, cells=cells)

    def measures(targets, data=shapes, eps=EPS, **options):
        forwards.clear()
        accuracy_table(targets, data, eps, cells=cells, **options)
        return bool(forwards)

    assert not measures([baseline])
    assert measures([robust])
    assert measures([baseline], source=robust)
    assert measures([baseline], attack="noise")
    assert measures([baseline], attack="fgsm-per-image")
    assert measures([baseline], eps=[0.03])
    fewer = type(shapes)(shapes.name, shapes.classes, shapes.train, shapes.test.first(120))
    assert measures([baseline], data=fewer)
    mirrored = Split(shapes.test.images.flip(3), shapes.test.labels)
    other = type(shapes)(shapes.name, shapes.classes, shapes.train, mirrored)
    assert measures([baseline], data=other)
    # A clean cell is the same whatever the attack and the training images.
    renamed = type(shapes)(shapes.name, shapes.classes, shapes.train.first(9), shapes.test)
    assert not measures([baseline], data=renamed, eps=[0.0], attack="noise", source=robust)


def changed_copy(checkpoint, path):
    """Return `checkpoint` with one weight changed."""
    model = models.build("cnn")
    model.load_state_dict(checkpoint.model.state_dict())
    model.network[19].bias.data[0] += 3.0
    metadata = {**checkpoint.metadata, "weights_hash": weights_hash(model)}
    return Checkpoint(model.eval(), metadata, path)


def test_changed_weights_are_measured_anew(trained, shapes, tmp_path):
    cells = tmp_path / "cells"
    old = accuracy_table(trained[:1], shapes, EPS, cells=cells)
    changed = changed_copy(trained[0], tmp_path)
    new = accuracy_table([changed], shapes, EPS, cells=cells)
    assert not old["loss"].equals(new["loss"])
    pd.testing.assert_frame_equal(new, accuracy_table([changed], shapes, EPS))


def test_cells_tell_the_two_sequence_readings_apart(shapes, tmp_path):
    # The state dicts of both readings have the same names: a published file fits either.
    checkpoints = []
    for arch in ("cnn-lstm", "cnn-lstm-positions"):
        model = models.build(arch, 0).eval()
        model.cnn[0].weight.data *= 20  # untrained, the LSTM hardly depends on the image
        metadata = {"arch": arch, "train_eps": None, "seed": None, "recipe": {"name": None}}
        metadata["weights_hash"] = weights_hash(model)
        checkpoints.append(Checkpoint(model, metadata, tmp_path))
    without = accuracy_table(checkpoints, shapes, [0.0])
    assert without["loss"][0] != without["loss"][1]
    with_cells = accuracy_table(checkpoints, shapes, [0.0], cells=tmp_path / "cells")
    pd.testing.assert_frame_equal(with_cells, without)


def test_damaged_cell_is_measured_again(trained, shapes, tmp_path):
    expected = accuracy_table(trained[:1], shapes, [0.0], cells=tmp_path / "cells")
    (cell,) = (tmp_path / "cells").rglob("*.json")
    cell.write_text("")
    found = accuracy_table(trained[:1], shapes, [0.0], cells=tmp_path / "cells")
    pd.testing.assert_frame_equal(found, expected)


def test_foreign_weights_are_called_by_their_file(trained, shapes, tmp_path):
    from advlab.checkpoints import load_weights

    path = tmp_path / "published.pth"
    torch.save(trained[0].model.state_dict(), path)
    table = accuracy_table([load_weights(path, "cnn")], shapes, [0.0, 0.1])
    assert set(table["model"]) == {"published"}
    assert table["train_eps"].isna().all()


def test_table_shows_progress_only_when_asked(trained, shapes, capsys):
    accuracy_table(trained[:1], shapes, [0.0])
    assert capsys.readouterr() == ("", "")


# --- one image at a time


def test_holds_counts_what_evaluate_counts(small_cnn):
    images, labels = make_batch(130)
    found = holds(small_cnn, images, labels)
    assert found.dtype == torch.bool
    assert int(found.sum()) == evaluate(small_cnn, images, labels)[0]


@pytest.mark.parametrize("attack", evaluation.ATTACKS)
def test_every_attack_keeps_its_eps(small_cnn, attack):
    images, labels = make_batch(8)
    made = attacked(attack, small_cnn, images, labels, 0.03)
    assert float((made - images).abs().max()) <= 0.03 + 1e-6
    assert made.min() >= 0
    assert made.max() <= 1
    assert torch.equal(attacked(attack, small_cnn, images, labels, 0), images)


def test_unknown_attack_is_refused(small_cnn):
    with pytest.raises(ValueError, match="unknown attack 'magic'; choose one of fgsm"):
        attacked("magic", small_cnn, *make_batch(2), 0.1)


def test_pgd_in_a_table_is_pgd(trained, shapes):
    baseline, robust = trained
    some = replace(shapes, test=shapes.test.first(40))
    table = accuracy_table([robust], some, (0.0, 0.04), attack="pgd-20", seed=2)
    images, labels = some.test.batch(slice(None))
    made = pgd(robust.model, images, labels, 0.04, alpha=0.005, steps=20, seed=2)
    assert table["correct"].tolist() == [
        evaluate(robust.model, shown, labels)[0] for shown in (images, made)
    ]
    moved = accuracy_table([robust], some, (0.04,), attack="pgd-20", source=baseline)
    assert moved["source"].tolist() == ["cnn baseline"]


def test_board_has_a_column_per_attack_and_the_best_model_first():
    rows = pd.DataFrame(
        [
            ("weak", 0.0, "clean", 0.9),
            ("weak", 8 / 255, "fgsm", 0.5),
            ("weak", 8 / 255, "autoattack", 0.0),
            ("strong", 0.0, "clean", 0.7),
            ("strong", 8 / 255, "fgsm", 0.4),
            ("strong", 0.0313725, "autoattack", 0.3),  # as a CSV keeps 8/255
            ("strong", 4 / 255, "autoattack", 0.6),
        ],
        columns=["model", "test_eps", "attack", "accuracy"],
    )
    found = evaluation.board(rows)
    assert list(found.columns) == ["clean", "fgsm", "autoattack"]
    assert found.index.tolist() == ["strong", "weak"]
    assert found.loc["strong"].tolist() == [0.7, 0.4, 0.3]
    assert evaluation.board(rows, 4 / 255).columns.tolist() == ["clean", "autoattack"]
    with pytest.raises(ValueError, match=r"no row has test_eps 0\.5"):
        evaluation.board(rows, 0.5)


def test_restarts_on_both_losses_break_what_either_breaks():
    model, (images, labels) = make_small_cnn(), make_batch(32)
    labels = balance(model, images)
    eps = 0.001  # breaks about half of them
    options = {"alpha": eps / 8, "steps": 50, "restarts": 3}
    by_loss = [
        holds(model, pgd(model, images, labels, eps, loss=loss, **options), labels)
        for loss in ("ce", "margin")
    ]
    both = holds(model, attacked("pgd-50x3", model, images, labels, eps), labels)
    assert 0 < int(both.sum()) < 32
    assert bool((both <= (by_loss[0] & by_loss[1])).all())


def test_minimal_eps_of_a_linear_model_is_known(linear_model):
    images, _ = make_batch(30)
    images = images * 0.5 + 0.25
    with torch.no_grad():
        logits = linear_model(images)
    labels = logits.argmax(1)
    weight = linear_model[1].weight.detach()
    slope = (weight[0] - weight[1]).abs().sum()  # of the margin, along FGSM's direction
    exact = (logits[:, 0] - logits[:, 1]).abs() / slope
    found = minimal_eps(linear_model, images, labels)
    assert (found >= exact).all()
    assert (found <= exact + 1 / 255 + 1e-6).all()
    torch.testing.assert_close(found * 255, (found * 255).round())
    wrong = minimal_eps(linear_model, images, 1 - labels)
    assert (wrong == 0).all()


def test_minimal_eps_is_inf_for_what_holds(linear_model):
    images, _ = make_batch(30)
    labels = linear_model(images).argmax(1)
    found = minimal_eps(linear_model, images, labels, largest=1)
    reached = minimal_eps(linear_model, images, labels)
    assert torch.equal(found.isinf(), reached > 1 / 255)
    assert found.isinf().any()


def test_minimal_eps_by_pgd_is_no_larger(learned):
    model, test = learned
    images, labels = test.first(20).batch(slice(None))
    one = minimal_eps(model, images, labels, largest=40)
    many = minimal_eps(model, images, labels, attack="pgd-20", largest=40)
    assert float((many <= one).float().mean()) >= 0.9
    assert many.median() <= one.median()


@pytest.mark.parametrize("largest", [0, 256])
def test_minimal_eps_refuses_a_range_that_is_none(small_cnn, largest):
    with pytest.raises(ValueError, match=f"largest is {largest}; it counts steps of 1/255"):
        minimal_eps(small_cnn, *make_batch(2), largest=largest)


# --- AutoAttack


def test_auto_attack_without_its_package_says_how_to_get_it(small_cnn, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r'pip install "advlab\[audit\]"'):
        auto_attack(small_cnn, *make_batch(2))


def test_auto_attack_is_at_least_as_strong_as_pgd(learned, tmp_path):
    pytest.importorskip("pyautoattack", reason='needs the extra "audit"')
    model, test = learned
    images, labels = test.first(30).batch(slice(None))
    state = torch.get_rng_state()
    held = auto_attack(model, images, labels, 0.01, attacks=["apgd-ce"], folder=tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    made = pgd(model, images, labels, 0.01, alpha=0.00125, steps=20)
    assert int(held.sum()) <= int(holds(model, made, labels).sum()) + 1


@pytest.fixture
def fake_auto_attack(monkeypatch):
    """In place of pyautoattack: an attack that turns every other image grey; counts its images."""
    seen = []

    class AutoAttack:
        def __init__(self, model, **options):
            self.options = options
            self.square = SimpleNamespace(n_queries=None)

        def run_standard_evaluation(self, images, labels, batch_size):
            seen.append((len(images), self.options | {"queries": self.square.n_queries}))
            made = images.clone()
            made[::2] = 0.5
            return made, labels

    monkeypatch.setitem(sys.modules, "pyautoattack", SimpleNamespace(AutoAttack=AutoAttack))
    return seen


def test_interrupted_auto_attack_goes_on(small_cnn, fake_auto_attack, tmp_path, monkeypatch):
    images, _ = make_batch(230)
    labels = predict(small_cnn, images).argmax(1)
    labels[5] = (labels[5] + 1) % 10
    whole = auto_attack(small_cnn, images, labels, folder=tmp_path)
    assert [n for n, _ in fake_auto_attack] == [100, 100, 30]
    assert fake_auto_attack[0][1] == {
        "norm": "Linf",
        "eps": 8 / 255,
        "seed": 0,
        "queries": 5_000,
    }
    sorted(tmp_path.iterdir())[0].unlink()
    fake_auto_attack.clear()
    again = auto_attack(small_cnn, images, labels, folder=tmp_path)
    assert len(fake_auto_attack) == 1  # the part that was lost
    assert torch.equal(again, whole)
    assert whole.shape == (230,)
    assert not whole[5]


def test_parts_are_found_again_when_the_logits_differ_in_their_last_bits(
    small_cnn, fake_auto_attack, tmp_path, monkeypatch
):
    images, labels = make_batch(20)
    auto_attack(small_cnn, images, labels, folder=tmp_path)
    exact = evaluation.predict  # another number of threads rounds in another order
    monkeypatch.setattr(evaluation, "predict", lambda *args: exact(*args) * (1 + 1e-6))
    auto_attack(small_cnn, images, labels, folder=tmp_path)
    assert len(fake_auto_attack) == 1


def test_damaged_part_of_auto_attack_is_computed_again(small_cnn, fake_auto_attack, tmp_path):
    images, labels = make_batch(20)
    whole = auto_attack(small_cnn, images, labels, folder=tmp_path)
    (part,) = tmp_path.iterdir()
    for content in ("[true", "[1]", '{"a": 1}'):
        part.write_text(content)
        assert torch.equal(auto_attack(small_cnn, images, labels, folder=tmp_path), whole)
    assert len(fake_auto_attack) == 4


def test_parts_of_other_models_attacks_and_seeds_are_not_mixed(fake_auto_attack, tmp_path):
    images, labels = make_batch(5)
    for model in (make_small_cnn(0), make_small_cnn(1)):
        for options in ({}, {"eps": 0.1}, {"seed": 1}, {"queries": 9}, {"norm": "l2"}):
            auto_attack(model, images, labels, folder=tmp_path, **options)
    auto_attack(make_small_cnn(0), images, (labels + 1) % 10, folder=tmp_path)
    auto_attack(make_small_cnn(0), images, labels, folder=tmp_path, attacks=["square"])
    assert fake_auto_attack[-1][1]["attacks"] == ["square"]
    assert len(list(tmp_path.iterdir())) == len(fake_auto_attack) == 12
    assert fake_auto_attack[-1][1]["version"] == "custom"


# --- the audit


@pytest.fixture
def no_square(monkeypatch):
    """Leave out the line that needs another package and minutes."""

    def missing(*args, **options):
        raise ImportError

    monkeypatch.setattr(evaluation, "auto_attack", missing)


def verdicts(table):
    return dict(zip(table["check"], table["verdict"], strict=True))


def test_audit_of_an_honest_model_has_no_alarm(learned, no_square):
    model, test = learned
    images, labels = test.first(60).batch(slice(None))
    table = audit(model, images, labels, eps=0.004)
    assert len(table) == 9
    found = verdicts(table)
    assert found.pop("black box weaker than white box") == "not run"
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
    assert verdicts(audit(Toy(margin), images, labels, eps=0.1))[check] == "ALARM"


def test_audit_asks_no_black_box_where_nothing_is_left(learned, no_square):
    model, test = learned
    images, labels = test.first(60).batch(slice(None))
    row = (
        audit(model, images, labels, eps=0.2)
        .set_index("check")
        .loc["black box weaker than white box"]
    )
    assert row["verdict"] == "pass"
    assert row["measured"] == "white box 0.0 %, nothing is left to break"


def test_audit_sees_through_a_masked_model(learned, no_square):
    model, test = learned
    images, labels = test.first(120).batch(slice(None))

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return 1000 * self.model(x)

    found = verdicts(audit(Masked().eval(), images, labels, source=model, eps=0.03))
    for check in (
        "white box at least as strong as transfer",
        "accuracy falls to 0 as eps grows",
        "gradients neither vanish nor explode",
    ):
        assert found[check] == "ALARM", check
