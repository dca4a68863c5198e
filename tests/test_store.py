"""The store and the zoo: what is found again, and what is measured, crafted or trained anew."""

import gc
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch
from conftest import TINY, as_checkpoint

from advlab import catalogue, models, store
from advlab.attacks import fgsm_direction
from advlab.checkpoints import CheckpointError, save, weights_hash
from advlab.data import ImageData, Split
from advlab.evaluation import accuracy_table
from advlab.forward import evaluate
from advlab.recipes import PAPER, Recipe
from advlab.store import Store, Zoo, code_hash, key

# --- keys


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """Return a function that edits modules of a copy of the package, to which the keys turn."""
    package = tmp_path / "package"
    shutil.copytree(store.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(store, "PACKAGE", package)

    def change(module, old, new):
        path = package / f"{module}.py"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        code_hash.cache_clear()

    yield change
    code_hash.cache_clear()


def keys():
    return {kind: key(kind, "asked") for kind in store.CODE}


@pytest.mark.parametrize(
    ("module", "old", "new", "others"),
    [
        # An attack, the CNN's forward, and how a model is called decide all; the rest decide less.
        ("attacks", "gradient.sign()", "gradient.sign().neg()", set(store.CODE)),
        ("models", "return self.network(images)", "return -self.network(images)", set(store.CODE)),
        ("models", "(128, 2))", "(128, 1))", set(store.CODE)),
        ("forward", "CHUNK = 100", "CHUNK = 50", set(store.CODE)),
        ("catalogue", "alpha=eps / 8, steps=20", "alpha=eps / 8, steps=2", {"measurement"}),
        ("evaluation", "eps == 0", "eps == 1", {"measurement"}),
        ("autoattack", 'attacker.square.n_queries = asked["queries"]', "pass", {"autoattack"}),
        ("recipes", 'PAPER = Recipe("paper", epochs=10', 'PAPER = Recipe("paper", 9', {"model"}),
        ("training", "loss.backward()", "(-loss).backward()", {"model"}),
        (
            "store",
            "per_image_statistics=True",
            "per_image_statistics=False",
            {"model", "directions"},
        ),
        ("plots", '"""Figures from', '"""Other figures from', set()),
        ("audit", "HUGE = 0.5", "HUGE = 0.4", set()),
    ],
)
def test_edited_code_changes_the_keys_that_it_decides(edit, module, old, new, others):
    before = keys()
    edit(module, old, new)
    after = keys()
    assert {kind for kind in after if after[kind] != before[kind]} == others


def test_comments_and_layout_change_no_key(edit):
    before, whole = keys(), code_hash(package=store.PACKAGE)
    for module in {name for names in store.CODE.values() for name in names}:
        edit(module, "\n\n\ndef ", "\n# A comment.\n\n\n\ndef ")
        edit(module, ") -> ", ")  ->  ")
    assert keys() == before
    assert code_hash(package=store.PACKAGE) == whole


def test_code_is_that_of_the_first_call(edit):
    # A process that runs on keeps the code that it imported, whatever is written into the files.
    before = code_hash("attacks", package=store.PACKAGE)
    path = store.PACKAGE / "attacks.py"
    path.write_text("")
    assert code_hash("attacks", package=store.PACKAGE) == before


def test_code_is_read_in_many_threads_at_once(request):
    # Where Python code runs in the collector (Hypothesis has such code), threads change in the
    # middle of parsing, and CPython 3.11 raised SystemError while a class was graded.
    gc.callbacks.append(lambda *_: time.sleep(0))
    request.addfinalizer(gc.callbacks.pop)
    with ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(lambda _: code_hash.__wrapped__("attacks"), range(40)))
    assert set(hashes) == {code_hash("attacks")}


def test_key_is_of_all_that_was_asked(monkeypatch):
    ones = torch.ones(3)
    asked = [("a", 1), ("a", 2), ("b", 1), ("a", 1.5), ("a", None), ("a", ones), ("a", -ones)]
    asked += [("a", ones.bfloat16()), ("a", ones.long()), ("a",), ("a", [1])]
    found = {key("measurement", *one) for one in asked}
    assert len(found) == len(asked)
    assert key("measurement", "a", torch.ones(3)) in found
    assert key("model", "a", 1) not in found
    monkeypatch.setattr(torch, "__version__", "2.0")
    assert key("measurement", "a", 1) not in found
    with pytest.raises(TypeError, match="cannot be part of a key"):
        key("measurement", object())


# --- what is kept


def test_result_is_computed_once(tmp_path):
    kept, calls = Store(tmp_path), []

    def compute():
        calls.append(1)
        return [3, float("nan"), {"a": None}]

    assert str(kept.remember("abc", compute)) == str(kept.remember("abc", compute))
    kept.remember("abd", compute)
    assert len(calls) == 2
    for _ in range(2):
        Store(None).remember("abc", compute)
    assert len(calls) == 4


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2.5]", b"\xff\xfe", b"{}\n{}", None])
def test_damaged_result_is_computed_again(tmp_path, content):
    Store(tmp_path).remember("abc", lambda: [1, 2.5])
    (path,) = tmp_path.rglob("*.json")
    whole = path.read_bytes()
    # Or one digit of the result, which is then as good as any other.
    path.write_bytes(whole.replace(b"2.5", b"3.5") if content is None else content)
    assert Store(tmp_path).remember("abc", lambda: [7, 2.5]) == [7, 2.5]
    assert Store(tmp_path).remember("abc", lambda: None) == [7, 2.5]


EPS = (0.0, 0.02, 0.1)


@pytest.fixture
def some(shapes):
    return replace(shapes, test=shapes.test.first(20))


@pytest.fixture
def measured(trained, some, tmp_path):
    """Return a function that asks for a table, and tells whether a model was asked for it."""
    asked = []
    hooks = [c.model.register_forward_hook(lambda *args: asked.append(1)) for c in trained]

    def measure(targets=trained[:1], data=some, eps=EPS, **options):
        asked.clear()
        accuracy_table(targets, data, eps, store=Store(tmp_path / "measured"), **options)
        return bool(asked)

    yield measure
    for hook in hooks:
        hook.remove()


def test_measured_anew_is_all_that_differs_and_nothing_else(measured, trained, some, monkeypatch):
    baseline, augmented = trained
    assert measured()
    assert not measured()
    assert not measured(source=baseline)  # what white box is
    assert not measured(data=some.to("cpu"))
    assert not measured(eps=[0.1])
    assert not measured(seed=1)  # FGSM draws no number
    assert measured([augmented])
    assert measured(eps=[0.03])
    assert measured(source=augmented)
    assert measured(attack="fgsm-per-image")
    mirrored = Split(some.test.images.flip(3), some.test.labels)
    relabelled = Split(some.test.images, some.test.labels.flip(0))
    for test in (some.test.first(15), mirrored, relabelled):
        assert measured(data=replace(some, test=test))
    # A clean measurement is the same whatever the attack and the training images.
    fewer = replace(some, train=some.train.first(9))
    assert not measured(data=fewer, eps=[0.0], attack="noise", source=augmented, seed=5)
    # Noise is the same whatever the source, and another for every seed.
    assert measured(attack="noise")
    assert not measured(attack="noise", source=augmented)
    assert measured(attack="noise", seed=1)
    assert measured(eps=[0.02], attack="rfgsm")
    assert measured(eps=[0.02], attack="rfgsm", seed=1)
    assert measured(eps=[0.02], attack="mi-fgsm")
    assert not measured(eps=[0.02], attack="mi-fgsm", seed=1)
    monkeypatch.setattr(torch, "__version__", "2.0")
    assert measured()
    assert not measured()


def test_pgd_that_does_nothing_does_not_find_the_old_results(measured, edit, monkeypatch):
    assert measured(eps=[0.02], attack="pgd-20")
    monkeypatch.setattr(catalogue, "pgd", lambda model, images, *args, **options: images)
    assert not measured(eps=[0.02], attack="pgd-20")  # the files are as they were
    edit("attacks", "        made = _walk(", "        return images or _walk(")
    assert measured(eps=[0.02], attack="pgd-20")
    assert not measured(eps=[0.02], attack="pgd-20")
    edit("attacks", "        return images or _walk(", "        made = _walk(")
    assert not measured(eps=[0.02], attack="pgd-20")


def test_the_two_readings_of_the_hybrid_are_told_apart(some, tmp_path):
    # Their state dicts have the same names: a published file fits either.
    targets = []
    for arch in ("cnn-lstm", "cnn-lstm-positions"):
        model = models.build(arch).eval()
        model.cnn[0].weight.data *= 20  # untrained, the LSTM hardly depends on the image
        targets.append(as_checkpoint(model, tmp_path / arch, arch=arch))
    without = accuracy_table(targets, some, [0.0])
    assert without["loss"].nunique() == 2
    for _ in range(2):
        found = accuracy_table(targets, some, [0.0], store=Store(tmp_path / "kept"))
        pd.testing.assert_frame_equal(found, without)


# --- the zoo


def tiny_zoo(data, folder, recipe=TINY, seed=0, **options):
    return Zoo(data, recipe, seed, folder, **{"progress": False, **options})


def forbid(monkeypatch, name):
    def fail(*args, **kwargs):
        raise AssertionError(f"{name} again")

    monkeypatch.setattr(store, name, fail)


def with_train(data, train):
    return ImageData(data.spec, train, data.test)


def test_zoo_says_in_what_a_model_differs_and_trains_another(tiny_shapes, tmp_path, monkeypatch):
    path = tiny_zoo(tiny_shapes, tmp_path).get("cnn").path
    forbid(monkeypatch, "fit")
    train, labels = tiny_shapes.train, tiny_shapes.train.labels.clone()
    labels[0] = (labels[0] + 1) % 10
    relabelled = with_train(tiny_shapes, Split(train.images, labels))
    renamed = replace(tiny_shapes, spec=replace(tiny_shapes.spec, name="mine"))
    others = {
        "recipe's lr 0.002, not 0.001": {"recipe": replace(TINY, lr=1e-3)},
        "recipe's name 'tiny', not 'big', recipe's epochs 2, not 9": {
            "recipe": replace(TINY, name="big", epochs=9)
        },
        "seed 0, not 1": {"seed": 1},
        rf"data_md5 '{tiny_shapes.md5}', not '\w+'": {"data": relabelled},
        r"data_md5 .*, train_n 64, not 32": {"data": with_train(tiny_shapes, train.first(32))},
        "data 'Shapes-10', not 'mine'": {"data": renamed},
    }
    for what, options in others.items():
        zoo = tiny_zoo(**{"data": tiny_shapes, "folder": tmp_path, **options})
        assert re.fullmatch(what, zoo.mismatch(path, "cnn"))
        assert zoo.find("cnn") is None
        with pytest.raises(AssertionError, match="fit again"):
            zoo.get("cnn")
    zoo = tiny_zoo(tiny_shapes, tmp_path)
    assert zoo.mismatch(path, "cnn") == ""
    assert zoo.mismatch(path, "cnn-lstm") == "arch 'cnn', not 'cnn-lstm'"
    assert "train_eps 0.0, not 0.1, recipe's flip True, not False" in zoo.mismatch(path, "cnn", 0.1)
    assert zoo.find("cnn-lstm") is zoo.find("cnn", 0.1) is None


def write_untrained(zoo, train_eps=0.0, fields=None):
    """Write a file that says it is what `zoo` wants, with a recipe of some fields alone."""
    model, metadata = models.build("cnn"), zoo.identity("cnn", train_eps)
    if fields:
        metadata["recipe"] = {name: metadata["recipe"][name] for name in fields}
    path = zoo.folder / zoo.file_name("cnn", train_eps)
    save(model, metadata | {"weights_hash": weights_hash(model), "history": []}, path)
    return path


@pytest.mark.parametrize("train_eps", [0.0, 0.2])
def test_file_from_before_the_new_fields_is_found(tiny_shapes, tmp_path, train_eps):
    zoo = tiny_zoo(tiny_shapes, tmp_path, PAPER)
    path = write_untrained(zoo, train_eps, ("name", "epochs", "batch_size", "lr", "flip"))
    assert zoo.find("cnn", train_eps) == path
    for change in ({"one_cycle": True}, {"epochs": 3}, {"lr": 1.0}):
        other = tiny_zoo(tiny_shapes, tmp_path, replace(PAPER, **change))
        assert other.find("cnn", train_eps) is None, change
    write_untrained(zoo, train_eps, ("batch_size", "lr", "flip"))
    assert zoo.find("cnn", train_eps) is None  # it lacks more than the new fields


def test_augmented_model_has_the_epochs_of_augmented_sets(tiny_shapes, tmp_path):
    recipe = Recipe("r", epochs=1, batch_size=32, augmented_epochs=2)
    augmented = tiny_zoo(tiny_shapes, tmp_path, recipe).get("cnn", 0.2)
    assert [row["epoch"] for row in augmented.history] == [1, 2]
    assert augmented.metadata["recipe"] == asdict(recipe.for_augmented_set())
    assert len(tiny_zoo(tiny_shapes, tmp_path, recipe).get("cnn").history) == 1
    # That many epochs are that recipe's own: the same file, whichever way it is asked for.
    same = replace(recipe, epochs=2, augmented_epochs=None)
    assert tiny_zoo(tiny_shapes, tmp_path, same).find("cnn", 0.2) == augmented.path


def test_metadata_say_what_the_model_is(trained, shapes):
    baseline, augmented = (checkpoint.metadata for checkpoint in trained)
    assert [checkpoint.name for checkpoint in trained] == ["cnn baseline", "cnn eps=0.1"]
    assert (baseline["train_eps"], augmented["train_eps"]) == (0.0, 0.1)
    assert baseline["recipe"] == asdict(TINY)
    assert augmented["recipe"] == asdict(TINY.for_augmented_set())
    assert (baseline["data"], baseline["data_md5"]) == ("Shapes-10", shapes.md5)
    assert (baseline["shape"], baseline["classes"]) == ([3, 32, 32], 10)
    assert (baseline["n"], baseline["train_n"], baseline["seed"]) == (130, 160, 0)
    assert set(baseline["versions"]) == {"advlab", "torch", "torchvision"}
    # New weights from the same seed, not the baseline's: the paper trains each from scratch.
    assert baseline["weights_hash"] != augmented["weights_hash"]
    for checkpoint in trained:
        # A curve for the baselines alone.
        curve = [("test_accuracy" in row) for row in checkpoint.history]
        assert curve == [checkpoint.metadata["train_eps"] == 0] * 2
        correct, _ = evaluate(checkpoint.model, *shapes.test.batch(slice(None)))
        assert abs(checkpoint.metadata["correct"] - correct) <= 1  # another memory format
        assert checkpoint.metadata["test_accuracy"] == checkpoint.metadata["correct"] / 130


def test_directions_are_the_baselines_and_crafted_once(zoo, trained, shapes, monkeypatch, edit):
    images, labels = shapes.train.batch(slice(None))
    expected = fgsm_direction(trained[0].model, images, labels, per_image_statistics=True)
    assert torch.equal(zoo.directions("cnn"), expected)
    forbid(monkeypatch, "fgsm_direction")
    assert zoo.directions("cnn") is zoo.directions("cnn")
    again = tiny_zoo(shapes, zoo.folder)
    assert torch.equal(again.directions("cnn"), expected)
    edit("attacks", "gradient.sign()", "gradient.sign().neg()")
    with pytest.raises(AssertionError, match="fgsm_direction again"):
        tiny_zoo(shapes, zoo.folder).directions("cnn")


def test_shipped_folder_is_used_first_and_never_written(tiny_shapes, tmp_path):
    shipped, folder = tmp_path / "shipped", tmp_path / "own"
    expected = tiny_zoo(tiny_shapes, shipped).get("cnn")
    for path in shipped.iterdir():
        if path.suffix != ".safetensors":
            path.unlink()
    before = {path.name: path.read_bytes() for path in shipped.iterdir()}
    zoo = tiny_zoo(tiny_shapes, folder, shipped=shipped)
    found = zoo.get("cnn")
    assert (found.path.parent, found.metadata) == (shipped, expected.metadata)
    assert zoo.why_not_shipped("cnn") == ""
    assert zoo.why_not_shipped("cnn", 0.2) == "there is no shipped cnn-eps0.2-seed0.safetensors"
    augmented = zoo.get("cnn", 0.2)  # trained, with the shipped baseline as source
    assert augmented.path.parent == folder
    other = tiny_zoo(tiny_shapes, folder, replace(TINY, lr=1e-3), shipped=shipped)
    assert other.why_not_shipped("cnn") == "recipe's lr 0.002, not 0.001"
    assert other.get("cnn").path.parent == folder
    assert tiny_zoo(tiny_shapes, folder).why_not_shipped("cnn") == ""  # none are asked for
    assert {path.name: path.read_bytes() for path in shipped.iterdir()} == before


def test_damaged_files_are_named_and_not_silently_replaced(tiny_shapes, tmp_path, monkeypatch):
    zoo = tiny_zoo(tiny_shapes, tmp_path)
    zoo.directions("cnn")
    (directions,) = tmp_path.glob("*-directions-*.safetensors")
    for path, ask in ((directions, "directions"), (zoo.get("cnn").path, "get")):
        path.write_bytes(path.read_bytes()[:-7])
        forbid(monkeypatch, "fit")
        with pytest.raises(CheckpointError, match=rf"{path.name} is damaged"):
            getattr(tiny_zoo(tiny_shapes, tmp_path), ask)("cnn")


def test_zoo_refuses_unknown_architecture_and_eps(tiny_shapes, tmp_path):
    zoo = tiny_zoo(tiny_shapes, tmp_path)
    with pytest.raises(ValueError, match=r"unknown architecture 'vgg'; choose one of cnn, "):
        zoo.get("vgg")
    with pytest.raises(ValueError, match=r"eps is 1.5; it must be a number from 0 to 1"):
        zoo.get("cnn", 1.5)
    assert list(tmp_path.glob("*.safetensors")) == []


def test_killed_training_goes_on_where_it_was_if_the_code_is_the_same(tiny_shapes, tmp_path, edit):
    expected = tiny_zoo(tiny_shapes, tmp_path / "whole").get("cnn")
    epochs = []

    def kill(name, row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    def note(name, row):
        epochs.append(row["epoch"])

    for edited in (False, True):
        with pytest.raises(KeyboardInterrupt):
            tiny_zoo(tiny_shapes, tmp_path / "killed", on_epoch=kill).get("cnn")
        if edited:
            edit("training", "loss.backward()", "(-loss).backward()")
        found = tiny_zoo(tiny_shapes, tmp_path / "killed", on_epoch=note).get("cnn")
        assert found.metadata["weights_hash"] == expected.metadata["weights_hash"]
        found.path.unlink()
    assert epochs == [2, 1, 2]


def test_two_at_once_train_once(tiny_shapes, tmp_path):
    epochs, both = [], threading.Barrier(2)

    def get(_):
        zoo = tiny_zoo(tiny_shapes, tmp_path, on_epoch=lambda name, row: epochs.append(row))
        assert zoo.find("cnn") is None
        both.wait(60)
        return zoo.get("cnn").metadata["weights_hash"]

    with ThreadPoolExecutor(2) as threads:  # as good as processes: each has a lock file of its own
        assert len(set(threads.map(get, range(2)))) == 1
    assert len(epochs) == 2


RS_FGSM = Recipe("rs", 1, 32, adversary="rs-fgsm", eps=0.05, alpha=0.06)


def test_noise_is_trained_on_with_all_images_and_has_a_name_of_its_own(tiny_shapes, tmp_path):
    noise = replace(TINY, name="noise", adversary="noise", sigma=0.25, epochs=1)
    found = tiny_zoo(tiny_shapes, tmp_path).get("cnn", noise)
    assert (found.path.name, found.name) == ("cnn-noise-seed0.safetensors", "cnn noise")
    assert found.metadata["recipe"]["sigma"] == 0.25
    assert found.history[0].keys() == {
        "epoch", "train_loss", "train_accuracy", "seconds", "images_per_second"
    }  # fmt: skip
    seen = found.metadata["images_per_second"] * found.metadata["seconds"]
    assert seen == pytest.approx(len(tiny_shapes.train))


def test_zoo_trains_by_an_adversarial_recipe_once(tiny_shapes, tmp_path, monkeypatch):
    asked = {}

    def fit(model, data, recipe, **options):
        asked.update(options, train=data)
        return real_fit(model, data, recipe, **options)

    real_fit = store.fit
    monkeypatch.setattr(store, "fit", fit)
    zoo = tiny_zoo(tiny_shapes, tmp_path)
    found = zoo.get("cnn", RS_FGSM)
    assert (len(asked["train"]), len(asked["validation"])) == (58, 6)
    assert asked["test"] is None
    assert (found.path.name, found.name) == ("cnn-rs-seed0.safetensors", "cnn rs")
    assert found.metadata["train_eps"] == 0.05
    assert found.metadata["recipe"]["adversary"] == "rs-fgsm"
    assert {"val_accuracy", "val_pgd_accuracy"} <= set(found.history[0])
    assert zoo.get("cnn").metadata["weights_hash"] != found.metadata["weights_hash"]
    forbid(monkeypatch, "fit")
    assert tiny_zoo(tiny_shapes, tmp_path).get("cnn", RS_FGSM).metadata == found.metadata
    assert zoo.find("cnn", replace(RS_FGSM, eps=0.04)) is None


def test_folder_that_cannot_be_made_is_named_with_the_mend(tiny_shapes, tmp_path):
    # A file in place of the folder: root, who may write everywhere, is stopped as well.
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    with pytest.raises(OSError, match=r"cannot write .*blocked.* choose a folder .*ADVLAB_CACHE"):
        tiny_zoo(tiny_shapes, blocked / "zoo").get("cnn")
    assert blocked.read_text() == "a file"
