"""The published numbers, as printed, and the comparison with them."""

import pandas as pd
import pytest

from advlab import paper


def entry(arch, train_eps, test_eps):
    rows = paper.published()
    chosen = rows.query("architecture == @arch and train_eps == @train_eps")
    return chosen[chosen["test_eps"] == test_eps].iloc[0]


def test_published_has_sixty_entries():
    rows = paper.published()
    assert len(rows) == 60
    assert list(rows.columns) == ["architecture", "train_eps", "test_eps", "accuracy", "loss"]
    assert not rows.duplicated(["architecture", "train_eps", "test_eps"]).any()
    assert set(rows["architecture"]) == {"cnn", "cnn-lstm"}
    assert rows["accuracy"].between(0.09, 0.81).all()
    assert rows["loss"].notna().sum() == 22


def test_published_entries_are_as_printed():
    assert entry("cnn", 0.0, 0.0)["accuracy"] == pytest.approx(0.804)
    assert entry("cnn", 0.2, 0.1)["accuracy"] == pytest.approx(0.755)
    assert entry("cnn", 0.01, 0.06)["accuracy"] == pytest.approx(0.598)
    assert entry("cnn-lstm", 0.2, 0.02)["accuracy"] == pytest.approx(0.701)
    assert entry("cnn-lstm", 0.005, 0.1)["accuracy"] == pytest.approx(0.301)
    assert entry("cnn", 0.0, 0.1)["loss"] == 6.3698
    assert pd.isna(entry("cnn", 0.0, 0.0)["loss"])
    assert entry("cnn-lstm", 0.2, 0.0)["loss"] == 1.0846


def test_tables_have_the_papers_shape():
    for table in paper.TABLES.values():
        assert tuple(table) == paper.TABLE_TRAIN_EPS
        assert {len(row) for row in table.values()} == {len(paper.TEST_EPS)} == {6}
        for train_eps in (0.0, 0.005, 0.01, 0.015):
            assert list(table[train_eps]) == sorted(table[train_eps], reverse=True)
        assert list(table[0.2]) == sorted(table[0.2])


# --- comparison


@pytest.fixture
def ours():
    """Rows one point above the paper's, with one entry that the paper does not have."""
    rows = paper.published().assign(data="CIFAR-10")
    rows["accuracy"] += 0.01
    extra = rows.iloc[:1].assign(train_eps=0.5)
    return pd.concat([rows, extra], ignore_index=True)


def test_compare_gives_the_difference_in_points(ours):
    compared = paper.compare(ours)
    assert len(compared) == 60
    assert list(compared.columns) == [
        *("architecture", "train_eps", "test_eps", "ours", "paper", "difference"),
    ]
    assert compared["difference"].to_numpy() == pytest.approx(1.0)
    assert compared["paper"][0] == pytest.approx(80.4)
    assert compared["ours"][0] == pytest.approx(81.4)


@pytest.mark.parametrize("names", [["Shapes-10"], ["CIFAR-10", "Shapes-10"]])
def test_compare_refuses_other_data(ours, names):
    ours["data"] = [names[i % len(names)] for i in range(len(ours))]
    with pytest.raises(ValueError, match=r"from .*Shapes-10; the paper's numbers are for CIFAR-10"):
        paper.compare(ours)


def test_wide_is_laid_out_as_in_the_paper():
    rows = paper.published()
    laid = paper.wide(rows[rows["architecture"] == "cnn"])
    assert list(laid.index) == ["baseline", "eps = 0.005", "eps = 0.01", "eps = 0.015", "eps = 0.2"]
    assert list(laid.columns) == ["0", "0.02", "0.04", "0.06", "0.08", "0.1"]
    assert (laid.index.name, laid.columns.name) == ("trained with", "test eps")
    expected = [[value / 100 for value in row] for row in paper.TABLE_1.values()]
    assert laid.to_numpy().tolist() == expected
    losses = paper.wide(rows[rows["architecture"] == "cnn-lstm"], "loss")
    assert losses.loc["baseline", "0.1"] == 3.8892
