"""Checkpoints: round trips, every kind of bad file, the zoo, faults while writing."""

import errno
import functools
import json
import os
import pickle
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import TINY, assert_same_state, make_small_cnn

from advlab import checkpoints, models
from advlab.checkpoints import CheckpointError, Zoo, load, load_weights, save, weights_hash
from advlab.data import ImageData, Split
from advlab.evaluation import evaluate, name_of
from advlab.training import FAST, PAPER, Recipe


def metadata_of(model, **more):
    return {"arch": "cnn", "train_eps": 0.0, "seed": 0, "weights_hash": weights_hash(model), **more}


@pytest.fixture
def saved(tmp_path):
    """A file of an untrained CNN, with the model."""
    model = models.build("cnn", 3)
    path = tmp_path / "models" / "one.safetensors"
    save(model, metadata_of(model, history=[{"epoch": 1, "train_loss": 2.5}]), path)
    return path, model


def test_saved_model_and_metadata_come_back(saved):
    path, model = saved
    checkpoint = load(path)
    assert_same_state(checkpoint.model, model.state_dict())
    assert not checkpoint.model.training
    assert checkpoint.path == path
    assert checkpoint.history == [{"epoch": 1, "train_loss": 2.5}]
    assert checkpoint.metadata["arch"] == "cnn"
    assert checkpoints.read_metadata(path) == checkpoint.metadata


def test_hash_is_of_every_weight_and_buffer():
    model = make_small_cnn()
    first = weights_hash(model)
    assert weights_hash(make_small_cnn()) == first
    for name, tensor in model.state_dict().items():
        old = tensor.clone()
        tensor.add_(1)
        assert weights_hash(model) != first, name
        tensor.copy_(old)
    assert weights_hash(model.to(memory_format=torch.channels_last)) == first


# --- bad files


def test_truncated_file_is_refused(saved):
    path, _ = saved
    content = path.read_bytes()
    for size in (0, 5, 500, len(content) - 1):
        path.write_bytes(content[:size])
        for read in (load, functools.partial(load_weights, arch="cnn")):
            with pytest.raises(CheckpointError, match=r"one.safetensors is damaged or no safetens"):
                read(path)


def test_one_altered_byte_of_the_weights_is_refused(saved):
    path, _ = saved
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"was altered: .* Delete it and get it again"):
        load(path)


def test_foreign_safetensors_are_refused_with_the_way_to_try_them(tmp_path):
    model = models.build("cnn")
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"foreign file.*advlab evaluate FILE --arch"):
        load(path)
    assert_same_state(load_weights(path, "cnn").model, model.state_dict())


@pytest.mark.parametrize("metadata", [{}, {"arch": "resnet", "weights_hash": ""}], ids=str)
def test_foreign_metadata_are_refused_by_name(tmp_path, metadata):
    path = tmp_path / "odd.safetensors"
    save(models.build("cnn"), metadata, path)
    with pytest.raises(CheckpointError, match=r"odd\.safetensors"):
        load(path)


def test_wrong_architecture_is_refused(saved, tmp_path):
    path, model = saved
    with pytest.raises(CheckpointError, match="does not fit this architecture"):
        load_weights(path, "cnn-lstm")
    save(model, metadata_of(model) | {"arch": "cnn-lstm"}, path)
    with pytest.raises(CheckpointError, match="does not fit this architecture"):
        load(path)
    ten = tmp_path / "ten.pth"
    torch.save(models.CNN(num_outputs=10).state_dict(), ten)
    with pytest.raises(CheckpointError, match=r"(?s)ten.pth does not fit.*network.19.weight"):
        load_weights(ten, "cnn")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    model = models.build("cnn")
    model.network[0].weight.data[0, 0, 0, 0] = value
    ours, theirs = tmp_path / "w.safetensors", tmp_path / "w.pth"
    save(model, metadata_of(model), ours)
    torch.save(model.state_dict(), theirs)
    for read in (lambda: load(ours), lambda: load_weights(theirs, "cnn")):
        with pytest.raises(CheckpointError, match="not finite numbers; get it again"):
            read()


class _Payload:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, writer):
    proof = tmp_path / "ran"
    payload = {"network.0.weight": _Payload(f"touch {proof}")}
    path = tmp_path / "evil.pth"
    if writer == "torch":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    with pytest.raises(CheckpointError, match=r"evil.pth is refused: .* could run code"):
        load_weights(path, "cnn")
    assert not proof.exists()
    # It is a real one: without the protection it runs.
    torch.load(path, weights_only=False) if writer == "torch" else pickle.loads(path.read_bytes())
    assert proof.exists()


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_plain_state_dict_loads(tmp_path, arch):
    model = models.build(arch, 4)
    path = tmp_path / "published.pth"
    torch.save(model.state_dict(), path)
    checkpoint = load_weights(path, arch)
    assert_same_state(checkpoint.model, model.state_dict())
    assert not checkpoint.model.training
    assert checkpoint.metadata["arch"] == arch
    assert checkpoint.metadata["weights_hash"] == weights_hash(model)
    assert checkpoint.metadata["train_eps"] is None
    assert checkpoint.metadata["seed"] is None


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"w": torch.ones(1)}}])
def test_pth_that_is_no_state_dict_is_refused(tmp_path, content):
    path = tmp_path / "odd.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"odd.pth holds no state dict"):
        load_weights(path, "cnn")


def test_file_that_is_no_pickle_is_refused(tmp_path):
    path = tmp_path / "text.pth"
    path.write_text("hello")
    with pytest.raises(CheckpointError, match=r"text.pth is refused: it is damaged"):
        load_weights(path, "cnn")


def test_missing_file_and_unknown_architecture_are_named(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match=r"no weights file .*gone.pth"):
        load_weights(tmp_path / "gone.pth", "cnn")
    with pytest.raises(ValueError, match="unknown architecture 'resnet'; choose one of cnn"):
        load_weights(saved[0], "resnet")


# --- the zoo


def tiny_zoo(data, folder, **options):
    settings = {"recipe": TINY, "seed": 0, "device": "cpu", "progress": False, **options}
    return Zoo(data, settings.pop("recipe"), settings.pop("seed"), folder, **settings)


def forbid_training(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(checkpoints, "fit", fail)


def test_zoo_trains_once_and_then_loads(tiny_shapes, tmp_path, monkeypatch):
    first = tiny_zoo(tiny_shapes, tmp_path).get("cnn")
    forbid_training(monkeypatch)
    second = tiny_zoo(tiny_shapes, tmp_path).get("cnn")
    assert second.metadata == first.metadata
    assert_same_state(second.model, first.model.state_dict())


def test_zoo_trains_again_where_anything_differs(tiny_shapes, tmp_path, monkeypatch):
    tiny_zoo(tiny_shapes, tmp_path).get("cnn")
    forbid_training(monkeypatch)
    labels = tiny_shapes.train.labels.clone()
    labels[0] = (labels[0] + 1) % 10
    relabelled = replace_train(tiny_shapes, Split(tiny_shapes.train.images, labels))
    others = {
        "recipe": tiny_zoo(tiny_shapes, tmp_path, recipe=replace(TINY, lr=1e-3)),
        "seed": tiny_zoo(tiny_shapes, tmp_path, seed=1),
        "data": tiny_zoo(relabelled, tmp_path),
        "size": tiny_zoo(replace_train(tiny_shapes, tiny_shapes.train.first(32)), tmp_path),
    }
    for what, zoo in others.items():
        assert zoo.find("cnn") is None, what
        with pytest.raises(AssertionError, match="trained again"):
            zoo.get("cnn")
    for arch, eps in (("cnn-lstm", 0.0), ("cnn", 0.1)):
        assert tiny_zoo(tiny_shapes, tmp_path).find(arch, eps) is None


def replace_train(data, train):
    return ImageData(data.name, data.classes, train, data.test)


FIELDS_OF_OLD = ("name", "epochs", "batch_size", "lr", "flip")


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
    zoo = tiny_zoo(tiny_shapes, tmp_path, recipe=PAPER)
    path = write_untrained(zoo, train_eps, FIELDS_OF_OLD)
    assert zoo.find("cnn", train_eps) == path
    for change in ({"one_cycle": True}, {"epochs": 3}, {"lr": 1.0}):
        other = tiny_zoo(tiny_shapes, tmp_path, recipe=replace(PAPER, **change))
        assert other.find("cnn", train_eps) is None, change


def test_old_file_that_lacks_more_than_the_new_fields_is_not_found(tiny_shapes, tmp_path):
    zoo = tiny_zoo(tiny_shapes, tmp_path, recipe=PAPER)
    write_untrained(zoo, fields=("batch_size", "lr", "flip"))
    assert zoo.find("cnn") is None


@pytest.mark.parametrize("train_eps", [0.0, 0.2])
def test_recipes_do_not_take_each_others_files(tiny_shapes, tmp_path, train_eps):
    for made, asked in ((PAPER, FAST), (FAST, PAPER)):
        written = write_untrained(tiny_zoo(tiny_shapes, tmp_path, recipe=made), train_eps)
        assert tiny_zoo(tiny_shapes, tmp_path, recipe=made).find("cnn", train_eps) == written
        assert tiny_zoo(tiny_shapes, tmp_path, recipe=asked).find("cnn", train_eps) is None


def test_robust_model_has_the_epochs_of_augmented_sets(tiny_shapes, tmp_path):
    recipe = Recipe("r", epochs=1, batch_size=32, augmented_epochs=2)
    robust = tiny_zoo(tiny_shapes, tmp_path, recipe=recipe).get("cnn", 0.2)
    assert [row["epoch"] for row in robust.history] == [1, 2]
    assert robust.metadata["recipe"] == asdict(recipe.for_augmented_set())
    assert len(tiny_zoo(tiny_shapes, tmp_path, recipe=recipe).get("cnn").history) == 1
    # That many epochs are that recipe's own: the same file, whichever way it is asked for.
    same = replace(recipe, epochs=2, augmented_epochs=None)
    assert tiny_zoo(tiny_shapes, tmp_path, recipe=same).find("cnn", 0.2) == robust.path
    other = replace(recipe, augmented_epochs=3)
    assert tiny_zoo(tiny_shapes, tmp_path, recipe=other).find("cnn", 0.2) is None


def test_metadata_say_what_the_model_is(trained, zoo, shapes):
    baseline, robust = (checkpoint.metadata for checkpoint in trained)
    assert baseline["arch"] == "cnn"
    assert (baseline["train_eps"], robust["train_eps"]) == (0.0, 0.1)
    assert baseline["recipe"] == asdict(TINY)
    assert robust["recipe"] == asdict(TINY.for_augmented_set())
    assert (baseline["data"], baseline["data_md5"]) == ("Shapes-10", shapes.md5)
    assert (baseline["n"], baseline["train_n"], baseline["seed"]) == (130, 160, 0)
    assert len(baseline["history"]) == 2
    assert set(baseline["versions"]) == {"advlab", "torch", "torchvision"}
    for checkpoint in trained:
        correct, _ = evaluate(checkpoint.model, *shapes.test.batch(slice(None)))
        assert abs(checkpoint.metadata["correct"] - correct) <= 1  # another memory format
        expected = checkpoint.metadata["correct"] / 130
        assert checkpoint.metadata["test_accuracy"] == pytest.approx(expected)


def test_robust_model_starts_anew(trained, tiny_shapes):
    # New weights from the same seed, not the baseline's: the paper trains each model from scratch.
    baseline, robust = trained
    assert baseline.metadata["weights_hash"] != robust.metadata["weights_hash"]
    assert len(robust.history) == 2


def test_directions_are_the_baselines_with_per_image_statistics(zoo, trained, shapes):
    from advlab.attacks import fgsm_direction

    images, labels = shapes.train.batch(slice(None))
    expected = fgsm_direction(trained[0].model, images, labels, per_image_statistics=True)
    assert torch.equal(zoo.directions("cnn"), expected)
    again = tiny_zoo(shapes, zoo.folder)
    assert torch.equal(again.directions("cnn"), expected)


def test_directions_are_crafted_once(zoo, trained, shapes, monkeypatch):
    zoo.directions("cnn")

    def fail(*args, **kwargs):
        raise AssertionError("crafted again")

    monkeypatch.setattr(checkpoints, "fgsm_direction", fail)
    assert len(zoo.directions("cnn")) == 160
    assert len(tiny_zoo(shapes, zoo.folder).directions("cnn")) == 160


def test_shipped_folder_is_used_first_and_never_written(tiny_shapes, tmp_path, monkeypatch):
    shipped, folder = tmp_path / "shipped", tmp_path / "own"
    expected = tiny_zoo(tiny_shapes, shipped).get("cnn")
    for path in shipped.iterdir():
        if path.suffix != ".safetensors":
            path.unlink()
    before = {path.name: path.read_bytes() for path in shipped.iterdir()}
    zoo = tiny_zoo(tiny_shapes, folder, shipped=shipped)
    found = zoo.get("cnn")
    assert found.path.parent == shipped
    assert found.metadata == expected.metadata
    robust = zoo.get("cnn", 0.2)  # not shipped: trained, with the shipped baseline as source
    assert robust.path.parent == folder
    other = tiny_zoo(tiny_shapes, folder, shipped=shipped, seed=1).get("cnn")  # does not match
    assert other.path.parent == folder
    assert {path.name: path.read_bytes() for path in shipped.iterdir()} == before


def test_damaged_checkpoint_is_not_silently_replaced(tiny_shapes, tmp_path, monkeypatch):
    zoo = tiny_zoo(tiny_shapes, tmp_path)
    path = zoo.get("cnn").path
    path.write_bytes(path.read_bytes()[:-7])
    forbid_training(monkeypatch)
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged"):
        zoo.get("cnn")


def test_damaged_directions_are_named(tiny_shapes, tmp_path):
    tiny_zoo(tiny_shapes, tmp_path).directions("cnn")
    (path,) = tmp_path.glob("*-directions-*.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=path.name):
        tiny_zoo(tiny_shapes, tmp_path).directions("cnn")


def test_zoo_refuses_unknown_architecture_and_eps(tiny_shapes, tmp_path):
    zoo = tiny_zoo(tiny_shapes, tmp_path)
    with pytest.raises(ValueError, match=r"unknown architecture 'vgg'; choose one of cnn, "):
        zoo.get("vgg")
    with pytest.raises(ValueError, match=r"eps is 1.5; it must be a number from 0 to 1"):
        zoo.get("cnn", 1.5)
    assert list(tmp_path.glob("*.safetensors")) == []


def test_killed_training_goes_on_where_it_was(tiny_shapes, tmp_path):
    expected = tiny_zoo(tiny_shapes, tmp_path / "whole").get("cnn")

    def kill(name, row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_zoo(tiny_shapes, tmp_path / "killed", on_epoch=kill).get("cnn")
    epochs = []
    zoo = tiny_zoo(
        tiny_shapes, tmp_path / "killed", on_epoch=lambda name, row: epochs.append(row["epoch"])
    )
    found = zoo.get("cnn")
    assert epochs == [2]
    assert found.metadata["weights_hash"] == expected.metadata["weights_hash"]
    assert list((tmp_path / "killed").glob("*.state")) == []


def test_two_processes_at_once_train_once(tmp_path):
    script = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from advlab.checkpoints import Zoo
        from advlab.data import Shapes10
        from advlab.training import Recipe
        folder, me = Path({str(tmp_path)!r}), sys.argv[1]
        zoo = Zoo(
            Shapes10(256, 32), Recipe("r", epochs=3), 0, folder / "zoo", device="cpu",
            progress=False, on_epoch=lambda name, row: print("epoch", row["epoch"], flush=True),
        )
        assert zoo.find("cnn") is None
        (folder / me).touch()
        while len(list(folder.glob("ready-*"))) < 2:
            time.sleep(0.01)
        print(zoo.get("cnn").metadata["weights_hash"])
    """)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, f"ready-{i}"], stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sorted(len(lines) for lines in outputs) == [1, 4]  # three epochs in one of them
    assert outputs[0][-1] == outputs[1][-1]


def test_learning_curve_is_of_baselines_alone(tiny_shapes, tmp_path):
    zoo = tiny_zoo(tiny_shapes, tmp_path)
    for training_eps in (0.0, 0.1):
        found = zoo.get("cnn", training_eps)
        assert all(("test_accuracy" in row) == (training_eps == 0) for row in found.history)
        correct, _ = evaluate(found.model, *tiny_shapes.test.batch(slice(None)))
        assert abs(found.metadata["correct"] - correct) <= 1  # rounding of two ways to compute it
        assert found.metadata["test_accuracy"] == found.metadata["correct"] / 32


# --- adversarial recipes

RS_FGSM = Recipe("rs", 1, 32, adversary="rs-fgsm", eps=0.05, alpha=0.06)


def test_zoo_trains_by_an_adversarial_recipe_once(tiny_shapes, tmp_path, monkeypatch):
    zoo = tiny_zoo(tiny_shapes, tmp_path)
    found = zoo.get("cnn", RS_FGSM)
    assert found.path.name == "cnn-rs-seed0.safetensors"
    assert found.metadata["train_eps"] == 0.05
    assert found.metadata["recipe"]["adversary"] == "rs-fgsm"
    assert {"val_accuracy", "val_pgd_accuracy"} <= set(found.history[0])
    assert name_of(found) == "cnn rs"
    assert zoo.get("cnn").metadata["weights_hash"] != found.metadata["weights_hash"]
    forbid_training(monkeypatch)
    again = tiny_zoo(tiny_shapes, tmp_path).get("cnn", RS_FGSM)
    assert again.metadata == found.metadata


def test_other_adversary_is_another_model(tiny_shapes, tmp_path):
    zoo = tiny_zoo(tiny_shapes, tmp_path)
    zoo.get("cnn", RS_FGSM)
    assert zoo.find("cnn", RS_FGSM) is not None
    assert zoo.find("cnn", replace(RS_FGSM, eps=0.04)) is None


def test_adversarial_training_holds_out_its_validation_images(tiny_shapes, tmp_path, monkeypatch):
    asked = {}

    def fit(model, data, recipe, **options):
        asked.update(train=data, validation=options["validation"], test=options["test"])
        return checkpoints_fit(model, data, recipe, **options)

    checkpoints_fit = checkpoints.fit
    monkeypatch.setattr(checkpoints, "fit", fit)
    tiny_zoo(tiny_shapes, tmp_path).get("cnn", RS_FGSM)
    assert (len(asked["train"]), len(asked["validation"])) == (58, 6)
    assert asked["test"] is None


# --- faults while writing


def test_folder_that_cannot_be_made_is_named_with_the_mend(tiny_shapes, tmp_path):
    # A file in place of the folder: root, who may write everywhere, is stopped as well.
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    with pytest.raises(OSError, match=r"cannot write .*blocked.* choose a folder .*ADVLAB_CACHE"):
        tiny_zoo(tiny_shapes, blocked / "zoo").get("cnn")
    assert blocked.read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_named_with_the_mend(tiny_shapes, tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    with pytest.raises(PermissionError, match=r"cannot write .*read-only.* choose a folder"):
        tiny_zoo(tiny_shapes, folder).get("cnn")


def test_full_disk_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    path, _ = saved
    before = path.read_bytes()
    write = Path.write_bytes

    def full(self, content):
        write(self, content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    model = models.build("cnn", 9)
    with pytest.raises(OSError, match=r"cannot write .*one.safetensors: No space.*Free") as caught:
        save(model, metadata_of(model), path)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_metadata_are_readable_without_advlab(saved):
    with safetensors.safe_open(saved[0], framework="pt") as file:
        text = json.loads(file.metadata()["advlab"])
    assert text["format"] == checkpoints.FORMAT
