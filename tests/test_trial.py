"""`advlab audit`: rows for every shipped model, resumable, and nothing half published."""

import shutil
from contextlib import nullcontext

import pandas as pd
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from advlab import autoattack, evaluation, files, lab
from advlab.cli import app
from advlab.data import ImageData
from advlab.lab import Lab
from advlab.recipes import Profile
from advlab.store import Store
from advlab.upkeep import readme, trial


@pytest.fixture
def house(empty_home, trained, shapes, zoo, monkeypatch, tmp_path):
    """A repository that ships two models, on 40 images, with an AutoAttack that is instant."""
    shipped = empty_home / "data" / "checkpoints"
    shipped.mkdir(parents=True)
    for checkpoint in trained:
        shutil.copy(checkpoint.path, shipped)
    monkeypatch.setattr(files, "shipped_checkpoints", lambda: shipped)
    few = ImageData(shapes.spec, shapes.train, shapes.test.first(40))
    opened = Lab("lesson", Profile(zoo.recipe), few, zoo, tmp_path, Store(tmp_path / "kept"))
    monkeypatch.setattr(lab, "start", lambda *args, **kwargs: opened)
    calls = []

    def auto_attack(model, images, labels, eps, **options):
        calls.append((len(images), eps))
        return torch.arange(len(images)) % 4 == 0

    monkeypatch.setattr(autoattack, "auto_attack", auto_attack)
    monkeypatch.setattr(trial, "connect", lambda scheduler: nullcontext())
    here = lambda cluster, options, trials: [one.rows(opened.store) for one in trials]  # noqa: E731
    monkeypatch.setattr(trial, "_measure", here)
    return calls


def run(**options):
    console = Console(record=True, width=120)
    return trial.run(console=console, **options), console.export_text()


def test_every_shipped_model_is_attacked(house):
    table, text = run(auto_n=20)
    assert set(table["model"]) == {"cnn baseline", "cnn eps=0.1"}
    counts = table.groupby(["attack", "test_eps"]).size().to_dict()
    assert counts == {
        ("clean", 0.0): 2,
        ("fgsm", trial.EPS): 2,
        ("pgd-20", trial.EPS): 2,
        ("pgd-50x3", trial.EPS): 2,
        ("autoattack", trial.EPS): 2,
    }
    auto = table[table["attack"] == "autoattack"]
    assert list(auto["n"]) == [20, 20]
    assert list(auto["correct"]) == [5, 5]
    low, high = evaluation.wilson(5, 20)
    assert auto[["low", "high"]].iloc[0].tolist() == [low, high]
    assert set(table.loc[table["attack"] == "pgd-20", "n"]) == {40}
    assert set(table.loc[table["attack"] == "pgd-50x3", "n"]) == {20}
    assert set(table["device"]) == {"cpu"}
    assert "25.0" in text
    written = pd.read_csv(files.home() / "outputs" / "audit" / "audit.csv")
    assert len(written) == len(table)


def test_no_more_images_than_there_are_fewer_and_no_auto_attack(house):
    table, _ = run(names=["cnn-baseline"])
    assert set(house) == {(40, trial.EPS)}
    assert set(table["n"]) == {40}
    house.clear()
    table, _ = run(auto_n=0, test_n=30)
    assert not house
    assert set(table["n"]) == {30}


def test_the_swept_model_is_attacked_at_every_size(house, monkeypatch):
    monkeypatch.setattr(trial, "SWEPT", "cnn eps=0.1")
    table, _ = run(auto_n=20)
    sizes = table[(table["attack"] == "autoattack") & (table["model"] == "cnn eps=0.1")]
    assert list(sizes["test_eps"]) == [*trial.SWEEP, trial.EPS]


def test_pairs_are_compared_on_the_same_images_and_written(house):
    _, text = run(auto_n=20)
    assert "25.0 (11.2 to 46.9)" in text  # 5 of 20, and the interval
    pairs = pd.read_csv(files.home() / "outputs" / "audit" / "audit_pairs.csv")
    columns = ["model", "other", "model_only", "other_only", "n", "p", "p_corrected"]
    assert list(pairs) == columns
    assert pairs.iloc[0].tolist() == ["cnn baseline", "cnn eps=0.1", 0, 0, 20, 1.0, 1.0]


def test_the_two_best_are_attacked_on_more_images(house, monkeypatch):
    def auto_attack(model, images, labels, eps, **options):
        asked.append(len(images))
        return torch.arange(len(images)) < (30 if options["progress"].startswith("cnn eps") else 12)

    asked = []
    monkeypatch.setattr(autoattack, "auto_attack", auto_attack)
    run(auto_n=20, best_n=40)
    assert asked.count(40) == 2
    best = pd.read_csv(files.home() / "outputs" / "audit" / "audit_best.csv")
    low, high = evaluation.wilson(30, 40)
    assert best.iloc[0].tolist()[:7] == pytest.approx(["cnn eps=0.1", 0.75, low, high, 30, 40, 18])
    assert best.iloc[1].tolist()[4:7] == [12, 40, 0]
    assert list(best["p"]) == pytest.approx([2 * 0.5**18] * 2)


def test_of_some_models_only_the_longer_attack_is_published(house, monkeypatch):
    monkeypatch.setattr(ImageData, "papers", True)
    monkeypatch.setattr(files, "clone", files.home)
    with pytest.raises(ValueError, match="of some models, what --best-n adds"):
        run(auto_n=20, names=["cnn-"], publish=True)
    run(auto_n=20, best_n=40, names=["cnn-"], publish=True)
    written = {path.name for path in (files.home() / "figures").iterdir()}
    assert written == {"audit_best.csv"}
    assert (files.home() / "outputs" / "audit" / "audit.csv").is_file()


@pytest.mark.parametrize("options", [{"auto_n": 0}, {"auto_n": 20, "names": ["cnn-baseline"]}])
def test_the_two_best_of_fewer_or_of_none_attacked_are_refused(house, options):
    with pytest.raises(ValueError, match=r"best_n is 40, .* give two models or more, and auto_n"):
        run(best_n=40, **options)
    assert not house


def held(*right, n=40):
    """Return which of `n` images hold: those numbered."""
    found = torch.zeros(n, dtype=torch.bool)
    found[list(right)] = True
    return found


def test_models_are_compared_two_by_two_the_best_first():
    found = {"none": held(), "b": held(*range(20)), "a": held(*range(30)), "c": held(*range(5, 25))}
    table = trial.compare(found)
    assert list(zip(table["model"], table["other"], strict=True)) == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]
    assert list(table["model_only"]) == [10, 10, 5]
    assert list(table["other_only"]) == [0, 0, 5]
    assert table["p"].tolist() == pytest.approx([2 * 0.5**10, 2 * 0.5**10, 1.0])
    assert table["p_corrected"].tolist() == pytest.approx([6 * 0.5**10, 6 * 0.5**10, 1.0])
    assert readme.pairs_text(table) == (
        "Under AutoAttack on the same 40 images (McNemar's exact test, corrected for 3 pairs after "
        "Holm): `a` is ahead of `b` (10 images against 0, p = 0.0059); `b` cannot be "
        "told from `c` (5 images against 5, p = 1)."
    )
    assert "McNemar's exact test): `a` is ahead of" in readme.pairs_text(table.head(1))


def test_a_column_of_other_numbers_of_images_is_refused(house):
    table, _ = run(auto_n=20)
    first = (table["model"] == "cnn baseline") & (table["attack"] == "autoattack")
    table.loc[first, "n"] = 10
    with pytest.raises(
        ValueError, match="autoattack was measured on 10 images of one model and 20"
    ):
        readme.board_table(table)


def test_unknown_model_is_refused_by_name_without_a_traceback(house):
    refused = CliRunner().invoke(app, ["audit", "vgg"])
    assert refused.exit_code == 1
    assert "no model is called vgg; there are cnn-baseline" in " ".join(refused.output.split())
    assert "Traceback" not in refused.output


def test_nothing_but_cifar10_is_published(house):
    with pytest.raises(ValueError, match="--publish"):
        run(publish=True)
    assert not (files.home() / "figures").exists()


def test_published_auto_attack_is_at_least_as_strong_as_pgd_and_not_by_far():
    table = pd.read_csv(files.repository() / "figures" / "audit.csv")
    table = table[(table["test_eps"] - trial.EPS).abs() < 1e-6]
    correct = table.pivot_table(index=["model", "n"], columns="attack", values="correct").dropna(
        subset=["autoattack", "pgd-50x3"]
    )
    assert len(correct) == table["model"].nunique()
    assert bool((correct["autoattack"] <= correct["pgd-50x3"]).all())
    n = correct.index.get_level_values("n")
    assert bool(((correct["pgd-50x3"] - correct["autoattack"]) / n <= 0.03).all())
