"""Evaluation: intervals, exact counts, the accuracy table, the smallest eps."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import balance, make_batch, make_small_cnn

from advlab import datasets, evaluation, files
from advlab.attacks import fgsm, pgd
from advlab.catalogue import ATTACKS, Attack
from advlab.checkpoints import load, load_weights
from advlab.evaluation import accuracy_table, confusion, evaluate, holds, minimal_eps, wilson
from advlab.store import Store

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


def test_table_is_white_box_or_transfer_from_a_source(trained, shapes):
    baseline, (images, labels) = trained[0], shapes.test.batch(slice(None))
    white = accuracy_table(trained, shapes, [0.02], attack="fgsm-per-image")
    moved = accuracy_table(trained, shapes, [0.02], attack="fgsm-per-image", source=baseline)
    assert set(moved["source"]) == {"cnn baseline"}
    for table, sources in ((white, trained), (moved, (baseline, baseline))):
        for row, target, source in zip(table.itertuples(), trained, sources, strict=True):
            made = fgsm(source.model, images, labels, 0.02, per_image_statistics=True)
            assert evaluate(target.model, made, labels) == (row.correct, row.loss)
    assert white["loss"][1] != moved["loss"][1]


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_has_its_rows_and_eps_0_is_the_clean_accuracy(trained, tiny_shapes, attack):
    table = accuracy_table(trained, tiny_shapes, [0.0, 0.03], attack=attack, source=trained[1])
    assert set(table["attack"][1::2]) == {attack}
    clean = [evaluate(one.model, *tiny_shapes.test.batch(slice(None))) for one in trained]
    assert list(zip(table["correct"][::2], table["loss"][::2], strict=True)) == clean


def test_table_refuses_bad_eps_and_attack_before_measuring(trained, shapes):
    with pytest.raises(ValueError, match=r"eps is 1\.2; it must be"):
        accuracy_table([None, *trained], shapes, [0.0, 1.2])
    with pytest.raises(ValueError, match="unknown attack 'cw'; choose one of fgsm"):
        accuracy_table(trained, shapes, [0.1], attack="cw")


def test_two_models_of_one_name_are_refused_before_measuring(trained, shapes):
    with pytest.raises(ValueError, match="two targets are called cnn baseline, and a table"):
        accuracy_table([*trained, trained[0]], shapes, [0.0])
    row = {"test_eps": 0.1, "attack": "fgsm", "model": "weights"}
    rows = pd.DataFrame([row | {"accuracy": 0.8}, row | {"accuracy": 0.0}])
    with pytest.raises(ValueError, match=r"two rows are of weights under fgsm at eps 0\.1; keep"):
        evaluation.board(rows, 0.1)


def test_nothing_is_kept_of_an_attack_whose_code_nobody_can_hash(
    trained, shapes, tmp_path, monkeypatch
):
    kept, found = tmp_path / "kept", []
    for shade in (0.1, 0.9):  # it is edited in between
        attack = Attack("grey", "", lambda m, x, y, eps, seed, s=shade: x.new_full(x.shape, s))
        monkeypatch.setitem(ATTACKS, "grey", attack)
        table = accuracy_table(trained[:1], shapes, [0.1], attack="grey", store=Store(kept))
        found.append(table["loss"][0])
    assert found[0] != found[1]
    assert not kept.exists()


def test_foreign_weights_are_called_by_their_file(trained, shapes, tmp_path):
    path = tmp_path / "published.pth"
    torch.save(trained[0].model.state_dict(), path)
    table = accuracy_table([load_weights(path, "cnn")], shapes, [0.0, 0.1])
    assert set(table["model"]) == {"published"}
    assert table["train_eps"].isna().all()


# --- one image at a time


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
    both = holds(model, ATTACKS["pgd-50x3"](model, images, labels, eps), labels)
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
    near = minimal_eps(linear_model, images, labels, largest=1)
    assert torch.equal(near.isinf(), found > 1 / 255)
    assert near.isinf().any()


def test_minimal_eps_by_pgd_is_no_larger(learned):
    model, test = learned
    images, labels = test.first(20).batch(slice(None))
    one = minimal_eps(model, images, labels, largest=40)
    many = minimal_eps(model, images, labels, attack="pgd-20", largest=40)
    assert float((many <= one).float().mean()) >= 0.9
    assert many.median() <= one.median()


@pytest.mark.parametrize("largest", [0, 256])
def test_minimal_eps_refuses_a_range_that_is_none(small_cnn, largest):
    with pytest.raises(ValueError, match=f"largest is {largest}; it (counts steps|must be)"):
        minimal_eps(small_cnn, *make_batch(2), largest=largest)


# --- what is committed

SAMPLE = [
    ("table1_cnn", "cnn baseline", "fgsm-per-image", 0.0),
    ("table2_cnn_lstm", "cnn-lstm eps=0.2", "fgsm-per-image", 0.0),
    ("l02_noise", "cnn baseline", "noise", 0.02),
    ("l05_positions", "cnn-lstm-positions baseline", "fgsm-per-image", 0.04),
    ("l06_transfer_and_white_box", "cnn eps=0.2", "fgsm-per-image", 0.04),
    ("l06_transfer_and_white_box", "cnn-lstm eps=0.005", "fgsm-per-image", 0.04),
    ("l06_transfer_and_white_box", "cnn eps=0.01", "fgsm", 0.04),
    ("l07_methods", "cnn fgsm", "fgsm", 8 / 255),
    ("l07_architectures", "cnn-lstm robust", "fgsm", 8 / 255),
    ("l07_trade_off", "cnn rs-fgsm-eps4", "pgd-20", 4 / 255),
]


def test_committed_numbers_are_measured_again(cifar10_root):
    data = datasets.load("cifar10", cifar10_root)

    def shipped(name):
        stem = name.replace(" ", "-").replace("=", "")
        return load(files.shipped_checkpoints() / f"{stem}-seed0.safetensors")

    for file, name, attack, eps in SAMPLE:
        table = pd.read_csv(files.repository() / "figures" / f"{file}.csv")
        asked = (table["model"] == name) & (table["attack"] == attack)
        row = table[asked & ((table["test_eps"] - eps).abs() < 1e-6)].iloc[0]
        source = None if row["source"] == evaluation.WHITE_BOX else shipped(row["source"])
        some = replace(data, test=data.test.first(int(row["n"])))
        found = accuracy_table([shipped(name)], some, [eps], attack=attack, source=source).iloc[0]
        for column in ("model", "source", "data", "recipe", "seed", "correct", "n"):
            assert found[column] == row[column], (file, name, column)
        for column in ("loss", "train_eps"):
            assert found[column] == pytest.approx(row[column], rel=1e-4), (file, name, column)
